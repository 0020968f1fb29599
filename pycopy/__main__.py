"""``python3 -m pycopy``."""

from pycopy.cli import script

if __name__ == "__main__":
    script()
