"""What a comparison found: figures, table, JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """How a model does with its weights stored in one way.

    Args:
        variant: name of the way, or ``unquantized``.
        family: kind of its numbers.
        bits_per_weight: stored bits for each of the weights in question, scales included.
        bytes: of these weights.
        weight_error: Frobenius norm of the error over that of the weight, mean over all weights.
        kl: Kullback-Leibler divergence of its next-token distribution from that of the unquantized
            model, nats per token.
        perplexity: exponential of the mean negative log-likelihood of the text.
        agreement: share of positions where the most likely next token is the same.
    """

    variant: str
    family: str
    bits_per_weight: float
    bytes: int
    weight_error: float
    kl: float
    perplexity: float
    agreement: float


@dataclass(frozen=True)
class Comparison:
    """Several ways to store the weights of one model, on the same text.

    Args:
        model: class of the model.
        tokens: of the text.
        weights: values of the weights that are stored in other ways.
        parameters: of the whole model.
        calibration_tokens: of the text that scales were calibrated with, 0 without.
        unquantized: the model as it is.
        scores: in the order that was asked for.
        skipped: why variants are missing.
    """

    model: str
    tokens: int
    weights: int
    parameters: int
    calibration_tokens: int
    unquantized: Score
    scores: tuple[Score, ...]
    skipped: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, for :func:`core.cli.table.echo_table`."""
        head = ["weights", "bits", "MB", "error", "KL", "perplexity", "same next token"]
        rows = [_row(score) for score in (self.unquantized, *self.scores)]
        empty = ["-"] * (len(head) - 2)
        return head, [*rows, *([name, *empty, why] for name, why in self.skipped.items())]

    def print(self) -> None:
        """Print what was compared, and the table."""
        import click

        from core.cli.table import echo_table

        share = f"{self.weights:,} of {self.parameters:,} parameters of {self.model}"
        calibrated = f", calibrated with {self.calibration_tokens:,}"
        click.echo(
            f"{share}, on {self.tokens:,} tokens{calibrated if self.calibration_tokens else ''}"
        )
        echo_table(*self.table())


def _row(score: Score) -> list[str]:
    return [
        score.variant,
        f"{score.bits_per_weight:.3f}",
        f"{score.bytes / 1e6:,.2f}",
        f"{score.weight_error:.2%}",
        f"{score.kl:.2e}",
        f"{score.perplexity:.4f}",
        f"{score.agreement:.2%}",
    ]
