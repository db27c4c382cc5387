"""A model without its weights, and which parameter of it each tensor of a folder belongs to.

Names on disk are not always those of the model: transformers renames keys of older checkpoints and
merges the experts of a layer while it loads. The same rules are asked here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from core.errors import CheckpointError, ModelError, closest
from core.plugins import one_line
from core_fp6.streaming.source import CONFIG

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from core_fp6.streaming.source import Source

_BY_ROWS = frozenset({"MergeModulelist", "Concatenate", "Chunk", "Split"})
"""What transformers may do to a weight on its way into the model that leaves its rows whole."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a folder belongs.

    Attributes:
        parameters: of the model that it becomes, or a part of.
        operations: what is done to it on the way, by the names of transformers' classes.
    """

    parameters: tuple[str, ...]
    operations: frozenset[str] = frozenset()


def build(source: Source) -> PreTrainedModel:
    """Build the model of a folder on the meta device; no code of the folder is run.

    Raises:
        ModelError: when transformers does not know the model.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            str(source.path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(f"cannot read {source.path / CONFIG}", why=one_line(error)) from error
    name = (config.architectures or ["model of no class"])[0]
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ModelError(
            f"{source.path} is a {name}",
            why="transformers has no such class",
            fix="name one of transformers' classes under architectures in config.json",
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind(config)
    except Exception as error:
        raise ModelError(f"cannot build the model of {source.path}", why=one_line(error)) from error
    return model


def places(model: PreTrainedModel, source: Source) -> dict[str, Place]:
    """Where the tensors of a folder belong, by their names; without those that have no place.

    Raises:
        CheckpointError: when a parameter of the model is not in the folder.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    at: dict[str, Any] = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": state}
    found: dict[str, Place] = {}
    for key in source.entries:
        target, pattern = rename_source_key(key, renamings, converters, **at)
        if target not in state and key in state:
            # A rule for older checkpoints matches a name that is right already.
            target, pattern = rename_source_key(key, [], [], **at)
        if target in state:
            found[key] = _place(target, by_pattern.get(pattern or ""))
    _require_all(model, state, found, source)
    return found


def by_key(found: Mapping[str, Place], chosen: Mapping[str, int]) -> dict[str, int]:
    """Which tensors of a folder make the chosen parameters, and how many columns those have.

    Args:
        found: places of the tensors.
        chosen: columns of the parameters.

    Raises:
        ModelError: when a tensor cannot be quantized by itself.
    """
    columns: dict[str, int] = {}
    for key, place in found.items():
        taken = [name for name in place.parameters if name in chosen]
        if not taken:
            continue
        others = place.operations - _BY_ROWS
        if others or len(taken) < len(place.parameters):
            how = f"loading applies {', '.join(sorted(others))} to it"
            shared = f"it is also a part of {sorted({*place.parameters} - {*taken})}"
            raise ModelError(
                f"{key} cannot be quantized by itself",
                why=how if others else shared,
                fix="load the model, call core_fp6.quantize and save_pretrained",
            )
        columns[key] = chosen[taken[0]]
    return columns


def _place(target: str, converter: Any) -> Place:
    if converter is None:
        return Place((target,))
    first, *others = converter.target_patterns
    parameters = target, *(target.replace(first, other) for other in others)
    return Place(parameters, frozenset(type(each).__name__ for each in converter.operations))


def _require_all(
    model: PreTrainedModel, state: Mapping[str, Tensor], found: Mapping[str, Place], source: Source
) -> None:
    """Refuse a folder without a parameter, which loading would fill with random numbers."""
    made = {name for place in found.values() for name in place.parameters}
    optional: Any = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    for name in state:
        known = name in made or name in model.all_tied_weights_keys
        if not known and not any(re.search(pattern, name) for pattern in optional):
            raise CheckpointError(
                f"{source.path} lacks {name}",
                why="the configuration asks for it" + closest(name, list(source.entries)),
                fix="fetch the folder again",
            )
