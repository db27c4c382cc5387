"""Direct I/O: aligned memory, files written in parallel chunks, digests; needs no torch."""
