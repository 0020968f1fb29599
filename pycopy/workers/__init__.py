"""``--workers``: the master process, its workers, and what is whose."""
