"""``python3 -m pycopy``."""

import sys

from pycopy.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
