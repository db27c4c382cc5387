"""Conversion between checkpoint formats: by the target's own way, or by reader and writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.checkpoints.streaming import streamed
from core.choice import choose
from core.contributions import CheckpointFormat, Converter, Progress
from core.errors import CheckpointError
from core.plugins import Contributed
from core.storage import new_folder, require_free

if TYPE_CHECKING:
    from core.run import Run


@dataclass(frozen=True)
class Conversion:
    """What a conversion does, known before a byte of a tensor is read.

    Attributes:
        source: path that is read.
        target: folder that appears.
        source_format: format found in ``source``.
        target_format: format of ``target``.
        work: what carries it out.
    """

    source: Path
    target: Path
    source_format: CheckpointFormat
    target_format: CheckpointFormat
    work: Converter


def detect(path: Path, run: Run) -> Contributed[CheckpointFormat]:
    """Find the format of what is at ``path``; a dialect goes before the format that it extends.

    Raises:
        CheckpointError: when no format, or more than one, recognises it.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    formats = run.checkpoints.formats()
    found = [c for c in formats if c.value.reader is not None and c.value.detect(path)]
    extended = {c.value.extends for c in found}
    dialects = [c for c in found if not extended & {c.value.name, c.id}]
    if len(dialects) == 1:
        return dialects[0]
    names = ", ".join(sorted(c.value.name for c in (found or formats)))
    state = f"looks like {names}" if found else "is of no known format"
    fix = "`core convert --from` names one" if found else f"known formats: {names}"
    raise CheckpointError(f"{path} {state}", fix=fix)


def plan(
    source: Path,
    target: Path,
    to: str,
    run: Run,
    *,
    from_format: str = "auto",
    skip_objects: bool = False,
) -> Conversion:
    """Check a conversion without writing anything.

    Args:
        source: checkpoint file or folder.
        target: folder to create; must not exist.
        to: name of the target format.
        run: the run whose plugins offer the formats.
        from_format: name of the source's format; ``auto`` finds it by looking.
        skip_objects: leave out entries that are no tensors instead of refusing them.

    Raises:
        CheckpointError: for an unknown or damaged source, or a target that exists or overlaps it.
        PluginError: for an unknown format.
    """
    _require_apart(source, target)
    read_as = _source_format(source, from_format, run)
    written_as = choose(
        "checkpoint format",
        to,
        run.checkpoints.formats(),
        lambda f: "" if f.writer or f.convert else "it cannot be written",
    ).value
    work: Converter
    if written_as.convert is not None:
        work = written_as.convert(source, read_as, run)
    else:
        work = streamed(source, read_as, written_as, run, skip_objects=skip_objects)
    return Conversion(source, target, read_as, written_as, work)


def execute(conversion: Conversion, progress: Progress | None = None) -> None:
    """Carry the conversion out.

    Raises:
        CheckpointError: when reading or writing fails; the target does not exist then.
    """
    with new_folder(conversion.target) as folder:
        conversion.work.write(folder, progress or _silent)


def _silent(name: str, size: int) -> None:
    """Report nothing."""


def _require_apart(source: Path, target: Path) -> None:
    """Refuse a target that is taken, or that lies in the source; links are followed."""
    real_source, real_target = source.resolve(), target.resolve()
    if real_source == real_target:
        raise CheckpointError(f"{source} and {target} are the same", fix="choose another target")
    if real_source in real_target.parents:
        raise CheckpointError(f"{target} lies inside of {source}", fix="choose another target")
    if real_target in real_source.parents:
        raise CheckpointError(f"{source} lies inside of {target}", fix="choose another target")
    require_free(target)


def _source_format(source: Path, name: str, run: Run) -> CheckpointFormat:
    if name == "auto":
        return detect(source, run).value
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    return choose(
        "checkpoint format",
        name,
        run.checkpoints.formats(),
        lambda f: "" if f.reader else "it cannot be read",
    ).value
