"""Writing and reading single checkpoints through a format, as core does it."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from core.checkpoints.convert import Conversion, execute
from core.checkpoints.reading import TensorPlanner
from core.checkpoints.streaming import streamed
from core.contributions import CheckpointFormat, Converter
from core.errors import CheckpointError, CoreError
from core.storage import new_folder

if TYPE_CHECKING:
    from core.run import Run

_NUMBERS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def cases() -> dict[str, dict[str, Tensor]]:
    """Small checkpoints by what is special about them."""
    twelve = torch.arange(12.0).reshape(3, 4) - 5
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1e-45])
    single = {
        **{str(dtype).removeprefix("torch."): twelve.abs().to(dtype) for dtype in _NUMBERS},
        "0-dim": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "non-contiguous": twelve.t(),
        "sliced": twelve[:, 1:3],
        "nan and inf": special,
    }
    found = {name: {"model.weight": tensor} for name, tensor in single.items()}
    found["tied"] = {"model.head.weight": twelve, "model.embedding.weight": twelve}
    found["overlapping"] = {"model.first": twelve[:2], "model.last": twelve[1:]}
    return found


def sample() -> dict[str, Tensor]:
    """A small checkpoint of several tensors, large enough to be cut."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embedding.weight": (32, 8), "model.layer.weight": (8, 8), "model.bias": (8,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(fmt: CheckpointFormat, path: Path, tensors: Mapping[str, Tensor], run: Run) -> None:
    """Write a checkpoint as a run does it: under the format's planner, into a folder of its own.

    Raises:
        CoreError: when the format refuses the tensors.
        AssertionError: for any other failure.
    """
    assert fmt.writer is not None
    try:
        with new_folder(path) as folder:
            planner = fmt.planner(run) if fmt.planner else None
            writer = fmt.writer(folder, run)
            with _alone():
                save(dict(tensors), storage_writer=writer, planner=planner, no_dist=True)
    except (Exception, CheckpointException) as error:
        raise _clear(error, f"writing as {fmt.name!r}") from error


def stream(
    fmt: CheckpointFormat, read_as: CheckpointFormat, source: Path, target: Path, run: Run
) -> None:
    """Convert a checkpoint from one format to another, as ``core convert`` does it.

    Raises:
        CoreError: when the format refuses the tensors.
        AssertionError: for any other failure.
    """
    try:
        work = streamed(source, read_as, fmt, run)
        execute(Conversion(source, target, read_as, fmt, work))
    except (Exception, CheckpointException) as error:
        raise _clear(error, f"converting to {fmt.name!r}") from error


def convert(
    fmt: CheckpointFormat, read_as: CheckpointFormat, source: Path, target: Path, run: Run
) -> Converter:
    """Convert a checkpoint in the way that is the format's own.

    Returns:
        what was planned, and is done.

    Raises:
        CoreError: when the format refuses the checkpoint.
        AssertionError: for any other failure.
    """
    assert fmt.convert is not None
    try:
        work = fmt.convert(source, read_as, run)
        execute(Conversion(source, target, read_as, fmt, work))
    except (Exception, CheckpointException) as error:
        raise _clear(error, f"converting to {fmt.name!r}") from error
    return work


def read(
    fmt: CheckpointFormat, path: Path, like: Mapping[str, Tensor], run: Run
) -> dict[str, Tensor]:
    """Read tensors of the names, shapes and dtypes of ``like``.

    Raises:
        CoreError: when the format finds the files damaged.
        AssertionError: for any other failure.
    """
    assert fmt.reader is not None
    found = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in like.items()}
    try:
        # First alone: dcp.load logs what this raises, and raises something else.
        metadata = fmt.reader(path, run).read_metadata()
        missing = sorted(found.keys() - metadata.state_dict_metadata.keys())
        if missing:  # a run refuses these by their names, whatever the format
            raise CheckpointError(f"{path} has no {', '.join(missing)}")
        reader = fmt.reader(path, run)
        with _alone():
            load(found, storage_reader=reader, planner=TensorPlanner(), no_dist=True)
    except (Exception, CheckpointException) as error:
        raise _clear(error, f"reading as {fmt.name!r}") from error
    return found


@contextmanager
def _alone() -> Generator[None]:
    """Without DCP's remark that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _clear(error: BaseException, what: str) -> Exception:
    """The one clear error inside of what DCP collected from its ranks; else a failed check."""
    inner: Any = error
    while isinstance(inner, CheckpointException) and inner.failures:
        inner, _ = next(iter(inner.failures.values()))
    if isinstance(inner, CoreError):
        return inner
    return AssertionError(f"{what} raises {type(inner).__name__}, no CoreError: {inner}")
