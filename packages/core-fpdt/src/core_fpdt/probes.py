"""What ``core doctor`` and ``core bench`` say of training in chunks on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

from core import Reading
from core_fpdt.enabling import enable
from core_fpdt.kernels.choosing import KERNELS
from core_fpdt.measuring.meter import Meter
from core_fpdt.settings import FPDTSettings
from core_fpdt.store.budget import disk_budget, host_budget

if TYPE_CHECKING:
    from core import Run

_GIB = 2**30
_LEAST = 8
"""GiB of host memory below which offloading is not worth much."""


def chunks(run: Run) -> Iterator[Reading]:
    """Which kernels attend here, and how much memory chunks may take."""
    settings = run.settings(FPDTSettings)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    for name, kernel in KERNELS.items():
        reason = kernel.unavailable(run.device, dtype)
        yield Reading(
            name=f"kernel {name}", status="skip" if reason else "ok", value=reason or "works"
        )
    host = host_budget(settings.host_memory)
    enough = host.available >= _LEAST * _GIB
    yield Reading(
        name="host memory for chunks",
        status="ok" if enough else "warn",
        value=host.available / _GIB,
        unit="GiB",
        advice="" if enough else 'offload to a fast disk: fpdt.offload = "file"',
    )
    disk = disk_budget(settings.folder)
    yield Reading(
        name=f"disk for chunks ({disk.where})",
        status="ok",
        value=disk.available / _GIB,
        unit="GiB",
    )


def training(run: Run, tokens: int = 4096, rounds: int = 3) -> Iterator[Reading]:
    """A training step of a small Llama in chunks, against gradient checkpointing.

    Args:
        run: gives the device.
        tokens: of the sequence.
        rounds: interleaved steps of both, of which the median counts.
    """
    ours = _small_llama(tokens).to(run.device).train()
    peer = copy.deepcopy(ours)
    peer.gradient_checkpointing_enable()  # type: ignore[operator]
    ids = torch.randint(1, 256, (1, tokens), device=run.device)
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    with enable(ours, chunk_tokens=1024):
        for _ in range(rounds):
            for name, model in (("ours", ours), ("peer", peer)):
                seconds[name].append(_step(model, ids))
        peaks = {name: _peak(model, ids) for name, model in (("ours", ours), ("peer", peer))}
    where = f"{tokens} tokens, {run.device.type}, against gradient checkpointing"
    yield Reading(
        name="time of a step",
        status="ok",
        value=median(seconds["ours"]) / median(seconds["peer"]),
        unit="x",
        limit=f"{where}; median of {rounds} interleaved",
    )
    yield Reading(
        name="memory of a step beside the weights",
        status="ok",
        value=peaks["ours"] / peaks["peer"],
        unit="x",
        limit=f"{where}; bytes of live tensors",
    )


def _small_llama(tokens: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=tokens,
    )
    return LlamaForCausalLM(config)


def _step(model: nn.Module, ids: torch.Tensor) -> float:
    begin = _now(ids.device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    return _now(ids.device) - begin


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    # Of the processor, as machines are shared.
    return time.process_time()


def _peak(model: nn.Module, ids: torch.Tensor) -> int:
    with Meter() as meter:
        _step(model, ids)
    return meter.peak
