"""All that is told to the kernel about BPF, and is not C: objects, maps, rings, hooks."""
