"""Out: emissions become frames, and frames leave by AF_PACKET."""
