"""Settings of the section ``[ucp]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from core import Settings


@dataclass(frozen=True, kw_only=True)
class UcpSettings(Settings):
    """What converted checkpoints look like."""

    stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage of a DeepSpeed target."""

    world_size: Annotated[int, Ge(1)] = 1
    """Number of ranks that a DeepSpeed target is cut for."""

    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Floating point type of the weights of a Hugging Face target, or in which a DeepSpeed target
    trains; ``source`` keeps what the checkpoint has."""

    order: tuple[str, ...] = ()
    """Trained parameters in the order of the model, for a DeepSpeed target whose source has lost it:
    the names of ``model.named_parameters()``."""

    frozen: tuple[str, ...] = ()
    """Weights that a DeepSpeed target does not train, where the source does not tell."""

    buffers: tuple[str, ...] = ()
    """Buffers of the model, where the source does not tell them from frozen weights."""

    config: str = ""
    """Folder with ``config.json`` and tokenizer for a Hugging Face target whose source has none."""

    shard_size: Annotated[float, Ge(0.001)] = 4.0
    """GiB of tensors in one safetensors file."""

    vocabulary_multiple: Annotated[int, Ge(1)] = 1
    """A Megatron target pads the rows of its vocabulary to a multiple of this."""

    workers: Annotated[int, Ge(0), Le(64)] = 0
    """Threads that copy; 0 takes two, or one on a single processor."""
