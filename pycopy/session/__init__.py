"""The sans-IO session engine: a small TCP client whose data and pace come from the capture.

No socket, clock, thread, logging handler, bcc or event loop is importable from here; a
test asserts it. Start reading at :mod:`pycopy.session.session`.
"""
