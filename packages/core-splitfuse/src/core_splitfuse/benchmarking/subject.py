"""The model that is served: a Llama with random weights, for speed does not depend on values."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

_SMALL: Mapping[str, int] = {
    "vocab_size": 8000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
_ENDS: Mapping[str, Any] = {
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Subject:
    """A Llama that every peer gets a copy of its own of.

    Args:
        shape: fields of ``LlamaConfig``.
        dtype: name of a torch dtype.
        device: where it computes.
        seed: of the weights.
    """

    shape: Mapping[str, int] = field(default_factory=lambda: _SMALL)
    dtype: str = "bfloat16"
    device: str = "cpu"
    seed: int = 0

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.shape["vocab_size"]

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return self.shape["max_position_embeddings"]

    def build(self) -> nn.Module:
        """Make a copy, in evaluation mode."""
        import torch
        import transformers

        dtype = getattr(torch, self.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            fields: dict[str, Any] = {**self.shape, **_ENDS}
            config = transformers.LlamaConfig(**fields)
            model: Any = transformers.LlamaForCausalLM(config)
            model.to(device=self.device, dtype=dtype)
        return cast("nn.Module", model.eval())

    def describe(self) -> dict[str, object]:
        """What figures depend on, as JSON."""
        count = sum(p.numel() for p in self.build().parameters())
        return {"parameters": count, "dtype": self.dtype, "device": self.device, **self.shape}

    @contextmanager
    def saved(self) -> Generator[Path]:
        """A folder with the model in it, for peers that load one; removed afterwards."""
        from core.recipes.models import quiet_transformers

        quiet_transformers()
        model: Any = self.build()
        with TemporaryDirectory(prefix="core-subject-") as name:
            model.save_pretrained(name)
            path = Path(name) / "config.json"
            saved = json.loads(path.read_text())
            # Readers of other versions of transformers look for the old name.
            saved["torch_dtype"] = self.dtype
            path.write_text(json.dumps(saved))
            yield Path(name)
