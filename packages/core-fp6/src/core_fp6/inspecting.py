"""What lies in a folder with six-bit weights, and whether it can be right."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import CheckpointError, ModelError
from core_fp6.models.sixbit import parts_of
from core_fp6.streaming.quantized import Quantized
from core_fp6.streaming.source import Source


@dataclass(frozen=True)
class Weight:
    """A quantized weight of a folder.

    Attributes:
        name: of its low plane.
        shape: of the weight.
        nbytes: of its planes and scales.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """What a folder holds.

    Attributes:
        path: of the folder.
        format: of the codes.
        group_size: columns that share a scale; 0 for rows.
        layout_version: of the planes.
        parameters: of the model.
        nbytes: of all tensors.
        weights: those that are quantized.
        skipped: modules that are not, though they have a weight.
        faults: what cannot be right, in sentences.
    """

    path: str
    format: str
    group_size: int
    layout_version: int
    parameters: int
    nbytes: int
    weights: tuple[Weight, ...]
    skipped: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def quantized_parameters(self) -> int:
        """Weights that are six-bit codes."""
        return sum(math.prod(weight.shape) for weight in self.weights)

    @property
    def coverage(self) -> float:
        """Share of the parameters that is quantized."""
        return self.quantized_parameters / self.parameters

    @property
    def bits_per_weight(self) -> float:
        """Bits of a quantized weight, its part of the scales included."""
        return 8 * sum(w.nbytes for w in self.weights) / max(1, self.quantized_parameters)

    def json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            **asdict(self),
            "quantized_parameters": self.quantized_parameters,
            "coverage": self.coverage,
            "bits_per_weight": self.bits_per_weight,
        }


def inspect_folder(path: Path) -> Inspection:
    """Hold headers, shapes and scales of a folder against its configuration; planes are not read.

    Raises:
        CheckpointError: when a file is missing, truncated or has a header that cannot be true.
        ModelError: when nothing is quantized, or transformers does not know the model.
        SettingsError: for a format or a layout version that is not known here.
    """
    weights: list[Weight] = []
    faults: list[str] = []
    with Source(path) as source:
        quantized = Quantized(source)
        for key in source.names():
            try:
                if key in quantized.columns:
                    shape = tuple(quantized.packed(key).shape)
                    weights.append(Weight(key, shape, sum(map(source.size, parts_of(key)))))
                elif key not in quantized.parts:
                    quantized.require_plain(key)
            except (CheckpointError, ModelError) as error:
                faults.append(f"{error.what}: {error.why}")
    config = quantized.config
    return Inspection(
        str(path),
        config.scheme.format.name,
        config.scheme.group_size,
        config.layout_version,
        quantized.parameters,
        source.nbytes,
        tuple(weights),
        tuple(config.modules_to_not_convert or ()),
        tuple(faults),
    )
