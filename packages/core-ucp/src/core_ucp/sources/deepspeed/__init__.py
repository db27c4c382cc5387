"""Checkpoints of DeepSpeed: all stages of ZeRO, tensor and pipeline parallelism, experts."""

from __future__ import annotations

from core_ucp.sources.deepspeed.folder import detect as detect
from core_ucp.sources.deepspeed.opening import open_view as open_view
