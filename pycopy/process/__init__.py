"""This process: its loop, signals, standing in the background, and what it says."""
