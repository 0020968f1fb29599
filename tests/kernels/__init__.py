"""The kernel matrix: pycopy on stock kernels, in guests; ``python3 -m tests.kernels``."""
