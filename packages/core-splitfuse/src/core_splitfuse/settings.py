"""Settings of the section ``[splitfuse]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from core.contributions import Settings


@dataclass(frozen=True, kw_only=True)
class SplitFuseSettings(Settings):
    """How the engine packs passes, and what memory it may use."""

    budget: Annotated[int, Ge(0)] = 0
    """Tokens of a forward pass at most; a little more than what keeps the processor busy. 0 takes
    768 on CUDA devices and 128 on CPUs."""

    latency: Annotated[float, Ge(0)] = 0.0
    """Seconds that a pass may take; 0 lets the budget alone decide. The cost of passes is learned
    while serving, and at least 16 tokens of waiting prompts go along in any case."""

    partial_prompts: Annotated[int, Ge(1)] = 4
    """Prompts that share what decodes leave of the budget."""

    ageing: Annotated[int, Ge(1)] = 16
    """Passes that a prompt may be passed over by shorter ones before it goes first."""

    admission: Literal["optimistic", "no_evict"] = "optimistic"
    """``optimistic`` admits what fits now, and computes the newest requests anew when memory runs
    out; ``no_evict`` sets aside what a request can reach at most."""

    mode: Literal["split", "paper", "prefill_first"] = "split"
    """``paper`` follows DeepSpeed-FastGen: prompts in order of arrival, one of them cut, each only
    when all of it fits. ``prefill_first`` computes whole prompts before any decode, as engines
    without splitting do; it is there to compare with."""

    sequences: Annotated[int, Gt(0)] = 512
    """Sequences in a pass at most."""

    kv_tokens: Annotated[int, Ge(0)] = 0
    """Tokens of which keys and values are held; 0 takes what ``kv_memory`` gives."""

    kv_memory: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of the memory that is free when the engine is built, for keys and values."""

    block_size: Annotated[int, Ge(0)] = 0
    """Tokens in a block of the store; whole blocks are what a cached prefix consists of. On CUDA
    devices a power of two from 16 on. 0 takes 64 there and 16 on CPUs."""

    prefix_cache: bool = True
    """Keep the keys and values of ended requests, as long as nobody else needs the room."""

    unrotated_keys: bool = False
    """Keep keys unrotated, so that requests may bring policies of positions of their own."""

    pack_linears: bool | Literal["auto"] = "auto"
    """Repack the weights of linear layers for the CPU's matrix multiplication. Faster, and closing
    the engine puts the originals back; until then these parameters read as NaN, and only
    ``state_dict()`` tells their values. ``auto`` does so where no parameter wants a gradient, as in
    ``core serve``."""

    graphs: Literal["auto", "off"] = "auto"
    """On CUDA devices, replay recorded passes of some numbers of tokens."""

    verify: bool = True
    """Compare a few tokens with the model's own attention first, layer by layer."""
