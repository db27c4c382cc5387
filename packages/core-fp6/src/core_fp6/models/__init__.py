"""Models with six-bit weights in memory: which modules, what takes their place, and a report."""
