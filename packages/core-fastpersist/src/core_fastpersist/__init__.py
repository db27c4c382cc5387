"""Checkpoints at the speed of the disk, every iteration, never lost."""

from __future__ import annotations

__version__ = "0.1.0"
