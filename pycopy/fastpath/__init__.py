"""Sessions that the kernel keeps: their maps, their clock, and how they change hands.

The rules are in bpf/session.h, by the side of :mod:`pycopy.session`, whose words they use;
how a session's state reads on either side is :mod:`pycopy.fastpath.handover`.
"""
