"""Whether files hold what belongs to six-bit weights, told from their headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from core.errors import ModelError
from core_fp6.layouts import natural
from core_fp6.models.sixbit import HIGH, SCALE, parts_of
from core_fp6.weights.scaling import Scheme

_DTYPES = {"BF16": "bfloat16", "F32": "float32", "U8": "uint8"}
Entry = tuple[str, tuple[int, ...]]
"""Dtype, as safetensors names it, and shape of a tensor."""


def check_files(files: Iterable[str | Path], scheme: Scheme) -> None:
    """Refuse safetensors files in which planes and scales do not fit each other.

    Only headers are read. Values of scales are checked where weights are made of them.

    Args:
        files: all shards of a model; other kinds of files are passed over.
        scheme: what the weights are said to be.

    Raises:
        ModelError: naming the first tensor that is missing or has another shape or dtype.
    """
    held: dict[str, Entry] = {}
    for file in map(Path, files):
        if file.suffix == ".safetensors":
            held.update(_entries(file))
    for key in sorted(held):
        for end in (HIGH, SCALE):
            if key.endswith(end):
                _check(key.removesuffix(end), held, scheme)


def _entries(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            return {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except SafetensorError as error:
        raise ModelError(
            f"cannot read {file.name}", why=str(error), fix="the file is damaged: get it again"
        ) from None


def _check(name: str, held: Mapping[str, Entry], scheme: Scheme) -> None:
    low, high, scale = parts_of(name)
    if high not in held and low not in held:
        return  # scales of something else
    for part in (low, high, scale):
        if part not in held:
            raise ModelError(
                f"{part} is missing",
                why="a six-bit weight is two planes and scales",
                fix="the files are incomplete: get them again, or quantize the model again",
            )
    rows, width = held[high][1][:-1], held[high][1][-1]
    _require(low, held[low], "U8", [(*rows, 2 * width)], scheme)
    _require(high, held[high], "U8", [(*rows, width)], scheme)
    if scheme.group_size:
        columns = range(natural.STEP * (width - 1) + 1, natural.STEP * width + 1)
        shapes = sorted({(*rows, scheme.groups(count)) for count in columns})
        _require(scale, held[scale], "BF16", shapes, scheme)
    else:
        _require(scale, held[scale], "F32", [rows], scheme)


def _require(
    part: str, found: Entry, dtype: str, shapes: list[tuple[int, ...]], scheme: Scheme
) -> None:
    if found[0] == dtype and found[1] in shapes:
        return
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    raise ModelError(
        f"{part} does not fit the other tensors of a {scheme.name} weight",
        why=f"it is {_DTYPES.get(found[0], found[0])} {list(found[1])}, "
        f"not {_DTYPES[dtype]} {wanted}",
        fix="the file is damaged or of another configuration: quantize the model again",
    )
