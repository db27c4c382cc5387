"""Settings of the section ``[train]``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from core.contributions import Settings


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """Training of a causal language model; the defaults are those of ``core run quickstart``."""

    model: str = "small:quickstart"
    """``family:preset`` for fresh weights, or a local folder in the Hugging Face layout."""

    config: dict[str, Any] = field(default_factory=dict)
    """Configuration fields to replace in a preset, such as ``num_hidden_layers``."""

    text: Annotated[tuple[str, ...], MinLen(1)] = ("stdlib",)
    """Text files, JSON lines files with a ``text`` field, folders of them, or ``stdlib`` for the
    Python sources of the running interpreter."""

    text_limit: Annotated[int, Ge(0)] = 2_000_000
    """Characters of training text, in whole documents; 0 takes all of it."""

    tokenizer: str = "auto"
    """Folder or ``tokenizer.json`` to use; ``auto`` takes the model folder's own, or trains one."""

    vocabulary: Annotated[int, Ge(257)] = 2048
    """Size of a tokenizer that is trained here."""

    held_out: Annotated[float, Gt(0), Le(0.5)] = 0.05
    """Share of the documents that is kept for evaluation."""

    sequence_length: Annotated[int, Ge(2)] = 128
    """Tokens in a training sequence."""

    batch_size: Annotated[int, Ge(1)] = 8
    """Sequences in an optimizer step, over all ranks and accumulation steps."""

    accumulate: Annotated[int, Ge(1)] = 1
    """Forward and backward passes in an optimizer step."""

    steps: Annotated[int, Ge(1)] = 800
    """Optimizer steps."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """``muon`` steps the weight matrices of the layers with Muon and the rest with AdamW."""

    learning_rate: Annotated[float, Gt(0)] = 4e-3
    """Peak learning rate of AdamW."""

    muon_learning_rate: Annotated[float, Gt(0)] = 2e-2
    """Peak learning rate of Muon."""

    final_learning_rate: Annotated[float, Ge(0), Le(1)] = 0.05
    """Learning rate at the end of the cosine, as a share of the peak."""

    warmup_steps: Annotated[int, Ge(0)] = 50
    """Steps of linear warm-up."""

    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Decoupled weight decay of matrices."""

    clip: Annotated[float, Ge(0)] = 1.0
    """Largest gradient norm; 0 does not clip."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16`` runs forward and backward under autocast."""

    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How several ranks share the work; ``auto`` is ``fsdp2``."""

    sequence_ranks: Annotated[int, Ge(1)] = 1
    """Ranks that share each sequence; more than one takes a plugin that cuts batches."""

    evaluate_every: Annotated[int, Ge(0)] = 100
    """Steps between evaluations on held-out text; 0 evaluates at the end only."""

    evaluate_sequences: Annotated[int, Ge(1)] = 256
    """Sequences of held-out text to evaluate on."""

    save_every: Annotated[int, Ge(0)] = 50
    """Steps between checkpoints; 0 saves at the end only."""

    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of weights and of the order of sequences."""
