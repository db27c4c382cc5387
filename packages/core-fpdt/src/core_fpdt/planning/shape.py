"""The sizes of a model that memory and time depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import ModelError, closest

_UNLIKE = 0.1
"""Share of the parameters of layers that may be missing from our count: biases, norms."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder in numbers.

    Args:
        name: for messages.
        layers: number of layers.
        hidden: width of the hidden states.
        heads: query heads.
        key_heads: heads of keys and values.
        head_dim: width of a head.
        intermediate: width inside the feed-forward part; of one expert.
        vocabulary: token ids.
        gated: the feed-forward part has three matrices, not two.
        tied: embeddings and output head are one matrix.
        experts: of each layer; 1 for dense models.
        active: experts that a token goes to.
        positions: learned positions.
        windows: for each layer, the keys that a token sees, with itself; 0 for all before it. All
            zero if empty.

    Raises:
        ModelError: for sizes that no model has.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    gated: bool = True
    tied: bool = False
    experts: int = 1
    active: int = 1
    positions: int = 0
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = (self.layers, self.hidden, self.heads, self.key_heads, self.head_dim)
        more = (self.intermediate, self.vocabulary, self.experts, self.active)
        if min(*sizes, *more) < 1 or self.heads % self.key_heads or self.active > self.experts:
            raise ModelError(f"{self.name} has impossible sizes", why=repr(self))
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise ModelError(f"{self.name} has {self.layers} layers, {len(self.windows)} windows")

    @property
    def query_width(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.key_heads * self.head_dim

    @property
    def matrices(self) -> int:
        """Matrices of a feed-forward part."""
        return 3 if self.gated else 2

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer, without biases and norms."""
        return self._layer(self.experts)

    @property
    def active_parameters(self) -> int:
        """Parameters of a layer that a token is multiplied with."""
        return self._layer(self.active)

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        tables = self.head_parameters * (1 if self.tied else 2) + self.positions * self.hidden
        return self.layers * self.layer_parameters + tables

    @property
    def window_counts(self) -> Mapping[int, int]:
        """Number of layers by window."""
        windows = self.windows or (0,) * self.layers
        return {window: windows.count(window) for window in sorted(set(windows))}

    def _layer(self, experts: int) -> int:
        attention = 2 * self.hidden * (self.query_width + self.key_width)
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + router + experts * self.matrices * self.hidden * self.intermediate


def from_config(config: Any, name: str = "") -> ModelShape:
    """Read the shape of a model from the configuration of transformers.

    The model is made without memory, to see whether the shape explains its parameters.

    Args:
        config: of any decoder.
        name: for messages; the model type by default.

    Raises:
        ModelError: for a model that is built otherwise.
    """
    text = config.get_text_config()
    name = name or str(config.model_type)
    if getattr(text, "kv_lora_rank", None):
        why = "its keys and values are compressed (kv_lora_rank)"
        raise ModelError(f"{name} is not made like other decoders", why=why)
    try:
        shape = _read(text, name)
        real = _count(text)
    except ModelError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"the shape of {name} cannot be read", why=why) from error
    shapes = [replace(shape, gated=gated) for gated in (True, False)]
    best = min(shapes, key=lambda each: abs(each.parameters - real))
    if abs(best.parameters - real) > _UNLIKE * best.layers * best.layer_parameters:
        raise ModelError(
            f"{name} is not made like other decoders",
            why=f"it has {real:,} parameters; its sizes explain {best.parameters:,}",
            fix="plan with the shape of a similar model",
        )
    return best


def from_name(name: str) -> ModelShape:
    """The shape of a known model, or of a local folder with a ``config.json``.

    Raises:
        ModelError: for a name that is neither.
    """
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    folder = Path(name)
    if (folder / "config.json").is_file():
        return from_config(_load(folder), folder.name)
    known = sorted(SHAPES)
    raise ModelError(
        f"no model {name!r}{closest(name, known)}",
        why="it is no folder with a config.json",
        fix=f"known: {', '.join(known)}",
    )


def _load(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(f"cannot read {folder}", why=str(error).splitlines()[0]) from error


def _read(config: Any, name: str) -> ModelShape:
    heads = int(config.num_attention_heads)
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts") or 1
    inner = _first(config, "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size")
    inner = (_first(config, "moe_intermediate_size") if experts > 1 else 0) or inner
    hidden = int(config.hidden_size)
    learned = "rope_parameters" not in config.to_dict()
    return ModelShape(
        name=name,
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        heads=heads,
        key_heads=_first(config, "num_key_value_heads") or heads,
        head_dim=_first(config, "head_dim") or hidden // heads,
        intermediate=inner or 4 * hidden,
        vocabulary=int(config.vocab_size),
        tied=bool(config.tie_word_embeddings),
        experts=experts,
        active=_first(config, "num_experts_per_tok", "moe_topk") or 1,
        positions=_first(config, "max_position_embeddings") if learned else 0,
        windows=_windows(config),
    )


def _windows(config: Any) -> tuple[int, ...]:
    layers = int(config.num_hidden_layers)
    window = _first(config, "sliding_window")
    by_type = {
        "sliding_attention": window,
        "chunked_attention": _first(config, "attention_chunk_size"),
    }
    if types := getattr(config, "layer_types", None):
        found = tuple(by_type.get(kind, 0) for kind in types)
    else:
        found = (window if getattr(config, "use_sliding_window", True) else 0,) * layers
    return found if any(found) else ()


def _first(config: Any, *names: str) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value > 0), 0)


def _count(config: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = make.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _llama(name: str, layers: int, hidden: int, heads: int, inner: int, **more: Any) -> ModelShape:
    fields: dict[str, Any] = {"key_heads": 8, "vocabulary": 128256, "head_dim": 128, **more}
    return ModelShape(
        name=name, layers=layers, hidden=hidden, heads=heads, intermediate=inner, **fields
    )


def _gpt(name: str, layers: int, hidden: int, heads: int) -> ModelShape:
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_heads=heads,
        head_dim=hidden // heads,
        intermediate=4 * hidden,
        vocabulary=50257,
        gated=False,
        tied=True,
    )


SHAPES: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _llama("llama-3-8b", 32, 4096, 32, 14336),
        _llama("llama-3-70b", 80, 8192, 64, 28672),
        _llama("llama-3.1-405b", 126, 16384, 128, 53248),
        _llama("llama-3.2-1b", 16, 2048, 32, 8192, head_dim=64, tied=True),
        _llama("llama-3.2-3b", 28, 3072, 24, 8192, tied=True),
        _llama("mistral-7b", 32, 4096, 32, 14336, vocabulary=32000),
        _llama("mixtral-8x7b", 32, 4096, 32, 14336, vocabulary=32000, experts=8, active=2),
        _llama("qwen3-8b", 36, 4096, 32, 12288, vocabulary=151936),
        _llama("qwen3-32b", 64, 5120, 64, 25600, vocabulary=151936),
        _llama(
            "qwen3-30b-a3b",
            48,
            2048,
            32,
            768,
            key_heads=4,
            vocabulary=151936,
            experts=128,
            active=8,
        ),
        _gpt("gpt-2.7b", 32, 2560, 32),
        _gpt("gpt-6.7b", 32, 4096, 32),
        _gpt("gpt-13b", 40, 5120, 40),
        _gpt("gpt-30b", 48, 7168, 56),
        _gpt("gpt-175b", 96, 12288, 96),
    )
}
"""Shapes of published models by name; the GPT models have rotary positions, as in the paper's runs."""
