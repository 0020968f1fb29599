"""Correctness, side by side: pycopy and tcpcopy on the same cases (``-m tests.bench.cases``)."""
