"""The entry ``quantization_config`` of a model with six-bit weights."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Self, TypeVar

from transformers.utils.quantization_config import QuantizationConfigMixin

from core.errors import SettingsError, closest
from core_fp6.layouts import natural
from core_fp6.weights.numbers import parse
from core_fp6.weights.packed import require_six_bits
from core_fp6.weights.scaling import Scheme

_Value = TypeVar("_Value")


class _Method(StrEnum):
    # diffusers asks for the ``value`` of a method, as if it were one of its own.
    FP6 = "core_fp6"


METHOD = _Method.FP6
"""The ``quant_method``."""


class FP6Config(QuantizationConfigMixin):
    """How the weights of a model are held: for ``from_pretrained`` and in ``config.json``.

    Args:
        format: ``e2m3`` or ``e3m2``.
        group_size: columns that share a scale: 32, 64, 128 or 256, or 0 for one scale per row.
        skip: modules to leave out beside output layers, embeddings and routers, as patterns.
        layout_version: of the planes in the files.
        modules_to_not_convert: names of the modules that were left out; known after quantizing.

    Raises:
        SettingsError: for a value that is not allowed, naming it and what is.
    """

    def __init__(
        self,
        format: str = "e2m3",
        group_size: int = 128,
        skip: Sequence[str] = (),
        *,
        layout_version: int = natural.VERSION,
        modules_to_not_convert: Sequence[str] | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        known = "format", "group_size", "skip", "layout_version", "modules_to_not_convert"
        for key in unknown:
            raise SettingsError(
                f"quantization_config has no field {key!r}{closest(key, known)}",
                fix=f"known: {', '.join(known)}",
            )
        if layout_version != natural.VERSION:
            raise SettingsError(
                f"quantization_config has layout_version {layout_version!r}",
                why=f"this core-fp6 reads version {natural.VERSION}",
                fix="update core-fp6, or quantize the model again with this one",
            )
        if quant_method != METHOD:
            raise SettingsError(
                f"quantization_config has quant_method {quant_method!r}", why=f"not {METHOD!r}"
            )
        self.quant_method: Any = METHOD
        self.layout_version = layout_version
        self.format = _is("format", format, str)
        self.group_size = _is("group_size", group_size, int)
        self.skip = _names("skip", skip)
        self.modules_to_not_convert = (
            None
            if modules_to_not_convert is None
            else _names("modules_to_not_convert", modules_to_not_convert)
        )
        require_six_bits(self.scheme.format)

    @property
    def scheme(self) -> Scheme:
        """Format and group size."""
        return Scheme(parse(self.format), self.group_size)

    def completed(self, modules_to_not_convert: Sequence[str]) -> Self:
        """The same, with the modules that were left out."""
        return type(self)(
            self.format,
            self.group_size,
            self.skip,
            layout_version=self.layout_version,
            modules_to_not_convert=modules_to_not_convert,
        )


def _is(key: str, value: Any, kind: type[_Value]) -> _Value:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SettingsError(
            f"quantization_config has {key} {value!r}", why=f"it is no {kind.__name__}"
        )
    return value


def _names(key: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise SettingsError(
            f"quantization_config has {key} {value!r}", why="it is no list of names"
        )
    return list(value)
