"""Checkpoints of others as views: who wrote it, what it holds, where that lies."""
