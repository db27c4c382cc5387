"""A dialect of a format is found as itself, and the format that it extends still reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import core
from core.builtin import Builtin
from core.checkpoints.convert import detect, plan
from core.checkpoints.streaming import Streamed
from core.contributions import CheckpointFormat
from core.discovery import plugins_from
from core.testing.fixtures import make_run

(DCP,) = [f for f in Builtin().core_checkpoints() if f.name == "dcp"]


def has_digests(path: Path) -> bool:
    return DCP.detect(path) and (path / "digests").is_file()


def has_seal(path: Path) -> bool:
    return has_digests(path) and (path / "seal").is_file()


def dialect(name: str, extends: str, detect: object = has_digests) -> CheckpointFormat:
    return CheckpointFormat(
        name=name,
        summary="DCP with something beside it.",
        detect=detect,  # type: ignore[arg-type]
        reader=DCP.reader,
        writer=DCP.writer,
        extends=extends,
    )


class Offering(core.Hooks):
    """A plugin with some formats."""

    def __init__(self, *formats: CheckpointFormat) -> None:
        self.formats = formats

    @core.hookimpl
    def core_checkpoints(self) -> Iterator[CheckpointFormat]:
        yield from self.formats


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    """A DCP folder with the marks of both dialects."""
    with make_run(tmp_path / "run") as run:
        folder = run.save({"x": torch.arange(3.0)}, 1).durable()
    (folder / "manifest.json").unlink()
    (folder / "digests").touch()
    (folder / "seal").touch()
    return folder


def found(folder: Path, *formats: CheckpointFormat) -> str:
    with make_run(folder.parent / "other", plugins=plugins_from({"x": Offering(*formats)})) as run:
        return detect(folder, run).value.name


@pytest.mark.parametrize("extends", ["dcp", "core.dcp"])
def test_a_dialect_goes_before_what_it_extends(folder: Path, extends: str) -> None:
    assert found(folder, dialect("checked", extends)) == "checked"
    (folder / "digests").unlink()
    assert found(folder, dialect("checked", extends)) == "dcp"


def test_a_dialect_of_a_dialect_goes_before_both(folder: Path) -> None:
    both = dialect("checked", "dcp"), dialect("sealed", "checked", has_seal)
    assert found(folder, *both) == "sealed"
    (folder / "seal").unlink()
    assert found(folder, *both) == "checked"


@pytest.mark.parametrize(
    "formats",
    [
        (dialect("checked", ""),),
        (dialect("checked", "dcp"), dialect("signed", "dcp")),
    ],
    ids=["strangers", "siblings"],
)
def test_what_no_dialect_decides_is_ambiguous(
    folder: Path, formats: tuple[CheckpointFormat, ...]
) -> None:
    with pytest.raises(core.CheckpointError, match="looks like checked, (dcp|signed)"):
        found(folder, *formats)


def test_the_extended_format_reads_a_dialect_when_it_is_named(folder: Path) -> None:
    plugins = plugins_from({"x": Offering(dialect("checked", "dcp"))})
    with make_run(folder.parent / "other", plugins=plugins) as run:
        conversion = plan(folder, folder.parent / "out", "dcp", run, from_format="dcp")
    assert conversion.source_format.name == "dcp"
    assert isinstance(conversion.work, Streamed)
    assert "x" in conversion.work.entries
