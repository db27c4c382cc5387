"""A folder with six-bit weights that is read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from core.errors import CheckpointError, ModelError, SettingsError
from core.plugins import one_line
from core_fp6.integrations.config import METHOD, FP6Config
from core_fp6.integrations.transformers import FP6HfQuantizer
from core_fp6.models.sixbit import parts_of, sixbit_modules
from core_fp6.streaming import skeleton
from core_fp6.weights.packed import Packed, checked

if TYPE_CHECKING:
    from core_fp6.streaming.source import Source


class Quantized:
    """What a folder of a quantized model should hold, as loading would expect it.

    Args:
        source: the folder.

    Raises:
        CheckpointError: when a parameter of the model is missing.
        ModelError: when nothing in it is quantized by this package, or transformers does not know
            the model.
        SettingsError: for a format or a layout version that is not known here.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.config = _config(source)
        self.model = skeleton.build(source)
        places = skeleton.places(self.model, source)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self.shapes = {
            key: self.model.get_parameter_or_buffer(place.parameters[0]).shape
            for key, place in places.items()
            if not place.operations
        }
        FP6HfQuantizer(self.config, pre_quantized=True).preprocess_model(self.model)
        columns = {
            f"{name}.{part}": count
            for name, module in sixbit_modules(self.model)
            for part, count in module.columns.items()
        }
        self.columns: Mapping[str, int] = skeleton.by_key(places, columns)

    @cached_property
    def parts(self) -> frozenset[str]:
        """Names of all planes and scales."""
        return frozenset(part for key in self.columns for part in parts_of(key))

    def packed(self, key: str) -> Packed:
        """A quantized weight, in the memory of the files.

        Args:
            key: name of its low plane, one of :attr:`columns`.

        Raises:
            CheckpointError: when its high plane or its scales are missing.
            ModelError: when planes or scales cannot be those of such a weight.
        """
        for part in parts_of(key):
            if part not in self.source.entries:
                raise CheckpointError(
                    f"{self.source.path} lacks {part}",
                    why=f"config.json says that {key} is quantized",
                    fix="quantize the model again",
                )
        low, high, scale = map(self.source.tensor, parts_of(key))
        found = checked(low, high, scale, self.config.scheme, self.columns[key], key)
        wanted = self.shapes.get(key, found.shape)
        if found.shape != wanted:
            raise ModelError(f"{key} is of another model", why=_differ(found.shape, wanted))
        return found

    def require_plain(self, key: str) -> None:
        """Make sure that a tensor that is not quantized has the shape that the model asks for.

        Raises:
            ModelError: when it has not.
        """
        shape = self.source.entries[key].shape
        wanted = self.shapes.get(key)
        if wanted is not None and shape != tuple(wanted):
            raise ModelError(f"{key} is of another model", why=_differ(shape, wanted))


def _config(source: Source) -> FP6Config:
    found = source.config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        other = found.get("quant_method") if isinstance(found, dict) else "nothing"
        raise ModelError(
            f"{source.path} has no six-bit weights",
            why=f"config.json names {other} as quantization",
            fix="`core fp6 quantize` makes such a folder",
        )
    try:
        return FP6Config(**found)
    except TypeError as error:
        why = one_line(error)
        raise SettingsError(f"quantization_config of {source.path} is none", why=why) from None


def _differ(found: Any, wanted: Any) -> str:
    return f"its shape is {list(found)}, the configuration asks for {list(wanted)}"
