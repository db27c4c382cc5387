"""Distributed checkpoints: writers, readers and a planner for ``torch.distributed.checkpoint``."""
