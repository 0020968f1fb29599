"""Measurements in the lab; a command of its own (``python3 -m tests.bench``), never a test."""
