"""``core fp6``: quantize a model's folder, bring it back, look at it, compare it with others."""

from __future__ import annotations

import click

from core_fp6.commands.converting import dequantize, quantize
from core_fp6.commands.looking import compare, inspect


@click.group("fp6")
def fp6() -> None:
    """Quantize models to six-bit weights, look at them, compare them with other formats.

    \b
    Example:
      core fp6 quantize models/mine models/mine-fp6
      core fp6 inspect models/mine-fp6
      core fp6 compare models/mine
    """


for command in (quantize, dequantize, inspect, compare):
    fp6.add_command(command)
