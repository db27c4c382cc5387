"""Checkpoints for DeepSpeed, made for the run that is to load them."""

from core_ucp.targets.deepspeed.building import build as build
from core_ucp.targets.deepspeed.options import DeepSpeedOptions as DeepSpeedOptions
