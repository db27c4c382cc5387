"""What quantizing did to a model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from core_fp6.weights.scaling import Scheme


@dataclass(frozen=True)
class Report:
    """Sizes before and after, and what was left out.

    Attributes:
        scheme: of the weights.
        quantized: parameters of each quantized module.
        left_out: why each other module with a matrix is not.
        parameters: of the whole model.
        bytes_before: of all parameters.
        bytes_after: of all parameters as they lie on disk.
        weight_bytes: of the quantized weights as they lie on disk, scales included.
    """

    scheme: Scheme
    quantized: dict[str, int]
    left_out: dict[str, str]
    parameters: int
    bytes_before: int
    bytes_after: int
    weight_bytes: int
    unseen: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """Modules that calibration did not reach; of experts, which ones."""

    @property
    def coverage(self) -> float:
        """Share of the parameters that is quantized."""
        return sum(self.quantized.values()) / self.parameters

    @property
    def bits_per_weight(self) -> float:
        """Bits of a quantized weight, its part of the scales included."""
        return 8 * self.weight_bytes / sum(self.quantized.values())

    def json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "scheme": self.scheme.name,
            "coverage": self.coverage,
            "bits_per_weight": self.bits_per_weight,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "parameters": self.parameters,
            "quantized_parameters": sum(self.quantized.values()),
            "quantized": dict(self.quantized),
            "left_out": dict(self.left_out),
            "unseen": {name: list(experts) for name, experts in self.unseen.items()},
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, for :func:`core.cli.table.echo_table`."""
        smaller = self.bytes_before / self.bytes_after
        share = f"{sum(self.quantized.values()):,} of {self.parameters:,}"
        rows = [
            ["modules", f"{len(self.quantized)} quantized"],
            ["parameters", f"{share} quantized, {self.coverage:.1%}"],
            ["bits per weight", f"{self.bits_per_weight:.3f}"],
            ["bytes", f"{self.bytes_before:,} before, {self.bytes_after:,} now: {smaller:.2f}x"],
        ]
        for (name, reason), count in _grouped(self.left_out).items():
            rows.append(["left out", f"{name}{f' ({count})' if count > 1 else ''}: {reason}"])
        for name, experts in self.unseen.items():
            which = f": experts {', '.join(map(str, experts))}" if experts else ""
            rows.append(["not calibrated", f"{name}{which}"])
        return ["weights", self.scheme.name], rows

    def print(self) -> None:
        """Print the table."""
        from core.cli.table import echo_table

        head, rows = self.table()
        echo_table(head, rows)

    def __str__(self) -> str:
        return "\n".join(": ".join(row) for row in [self.table()[0], *self.table()[1]])


def _grouped(left_out: dict[str, str]) -> Counter[tuple[str, str]]:
    """How many layers leave the same module out for the same reason."""
    return Counter((re.sub(r"\.\d+(?=\.|$)", ".*", name), why) for name, why in left_out.items())
