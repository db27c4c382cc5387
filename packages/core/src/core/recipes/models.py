"""Models for recipes: presets of model families, or local Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from core.catalogue import packages
from core.contributions import ModelFamily
from core.errors import ModelError, closest
from core.hooks import Hooks
from core.plugins import one_line

if TYPE_CHECKING:
    from torch import nn

    from core.run import Run

_SMALL: Mapping[str, Mapping[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    "quickstart": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4},
}
_HEAD = 32


def build_model(run: Run, name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build ``family:preset`` with fresh weights, or load a local Hugging Face folder.

    Args:
        run: the run whose plugins offer the families.
        name: ``family:preset`` or a folder.
        config: configuration fields to replace.

    Raises:
        ModelError: for an unknown family or preset, or a folder that cannot be loaded.
    """
    family, colon, preset = name.partition(":")
    if not colon:
        return load_model(Path(name))
    offered = (c.value for c in run.plugins.collect(Hooks.core_models))
    families = {value.name: value for value in offered if isinstance(value, ModelFamily)}
    if family not in families:
        known = sorted(families)
        raise ModelError(f"no model family {family!r}" + closest(family, known), fix=_known(known))
    presets = families[family].presets
    if preset not in presets:
        raise ModelError(f"{family} has no preset {preset!r}", fix=_known(presets))
    return families[family].build(preset, config)


def load_model(path: Path) -> nn.Module:
    """Load a causal language model from a local folder; no code of the folder is run.

    Raises:
        ModelError: when transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is no model", why="it has no config.json")
    _require_quantizer(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(f"cannot load {path}", why=str(error).splitlines()[0]) from error
    return cast("nn.Module", model)


def _require_quantizer(path: Path) -> None:
    """Refuse weights that nobody here can read: transformers would only warn, and go on."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        method = (config.get("quantization_config") or {}).get("quant_method")
    except (AttributeError, ValueError) as error:
        raise ModelError(f"cannot load {path}", why=f"config.json: {one_line(error)}") from error
    if method is None or method in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    sellers = [package.name for package in packages() if method in package.quantizers]
    raise ModelError(
        f"cannot load {path}",
        why=f"its weights are quantized by {method!r}, which nothing installed here reads",
        fix=f"pip install {sellers[0]}" if sellers else "install the package that made it",
    )


def build_small(preset: str, overrides: Mapping[str, Any]) -> nn.Module:
    """Build a small decoder in the style of Phi-3.

    Raises:
        ModelError: for a configuration that transformers does not accept.
    """
    from transformers import Phi3Config, Phi3ForCausalLM

    shape = dict(_SMALL[preset])
    heads = shape["hidden_size"] // _HEAD
    fields: dict[str, Any] = {
        **shape,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 1024,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    unknown = [key for key in overrides if not hasattr(Phi3Config(), key)]
    if unknown:
        raise ModelError(f"Phi-3 has no configuration field {unknown[0]!r}", fix="see Phi3Config")
    try:
        return Phi3ForCausalLM(Phi3Config(**(fields | dict(overrides))))
    except Exception as error:
        raise ModelError("the model cannot be built", why=str(error).splitlines()[0]) from error


def quiet_transformers() -> None:
    """Switch the progress bars of transformers off; recipes show their own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


def _known(names: Any) -> str:
    return f"known: {', '.join(names)}"
