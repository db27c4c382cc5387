"""How codes lie in memory: on disk, for kernels, and in the files of others."""
