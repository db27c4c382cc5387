"""Checkpoints: saved over torch DCP, committed atomically, resumed on any number of ranks."""
