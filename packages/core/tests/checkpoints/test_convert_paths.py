"""``core convert`` on the command line: which formats, which disks, which paths."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import core
from core.builtin import Builtin
from core.checkpoints import convert
from core.checkpoints.dcp import DcpWriter
from core.checkpoints.safetensors import SafetensorsReader
from core.cli import cli
from core.testing.fixtures import make_run, plugin_of


def call(*words: object) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, words)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    dcp.save({"x": torch.arange(6.0)}, checkpoint_id=tmp_path / "in")
    return tmp_path / "in"


def is_folder(path: Path) -> bool:
    return path.is_dir()


def read_safetensors(path: Path, run: core.Run) -> SafetensorsReader:
    return SafetensorsReader(path)


class Nested(DcpWriter):
    """Puts a file into a folder of its own."""

    def finish(self, metadata: Any, results: Any) -> None:
        folder = Path(self.path) / "extra"
        folder.mkdir()
        (folder / "notes.txt").write_text("hello", encoding="utf-8")
        super().finish(metadata, results)


def write_nested(path: Path, run: core.Run) -> Nested:
    return Nested(path)


class Greedy(core.Hooks):
    """Takes every folder for its own, and writes folders in folders."""

    @core.hookimpl
    def core_checkpoints(self) -> Iterator[core.CheckpointFormat]:
        yield core.CheckpointFormat(
            name="greedy", summary="Reads all.", detect=is_folder, reader=read_safetensors
        )
        (plain,) = [f for f in Builtin().core_checkpoints() if f.name == "dcp"]
        yield core.CheckpointFormat(
            name="nested",
            summary="Writes folders.",
            detect=plain.detect,
            reader=plain.reader,
            writer=write_nested,
        )


def test_the_source_format_can_be_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    with make_run(tmp_path / "run", plugins=plugin_of(Greedy(), "other")) as run:
        with pytest.raises(core.CheckpointError, match=r"greedy, safetensors[\s\S]*--from"):
            convert.plan(folder, tmp_path / "out", "dcp", run)
        for name in ("safetensors", "other.greedy"):
            found = convert.plan(folder, tmp_path / "out", "dcp", run, from_format=name)
            assert found.work.tensors == 1
        with pytest.raises(core.PluginError, match="did you mean"):
            convert.plan(folder, tmp_path / "out", "dcp", run, from_format="gredy")
        with pytest.raises(core.CheckpointError, match="absent does not exist"):
            convert.plan(tmp_path / "absent", tmp_path / "out", "dcp", run, from_format="dcp")
    assert call(folder, tmp_path / "out", "--to", "dcp", "--from", "safetensors").exit_code == 0


def test_a_named_format_that_is_not_there_is_one_clear_error(source: Path, tmp_path: Path) -> None:
    with (
        make_run(tmp_path / "run") as run,
        pytest.raises(core.CheckpointError, match="has no safetensors file"),
    ):
        convert.plan(source, tmp_path / "out", "dcp", run, from_format="safetensors")


def test_files_in_folders_are_listed_and_checked(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with make_run(tmp_path / "run", plugins=plugin_of(Greedy(), "other")) as run:
        path = run.save({"model": model}, 1).durable()
        plan = convert.plan(path, tmp_path / "out", "nested", run, from_format="dcp")
        convert.execute(plan)
        other = torch.nn.Linear(2, 2)
        run.load({"model": other}, tmp_path / "out")
        assert torch.equal(other.weight, model.weight)
        (tmp_path / "out" / "extra" / "notes.txt").unlink()
        with pytest.raises(core.CheckpointError, match="notes.txt is missing"):
            run.load({"model": other}, tmp_path / "out")


def test_the_storage_is_that_of_the_disks_at_hand(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path | None] = []
    with make_run(tmp_path / "run") as run:
        storage = run.checkpoints.storage

        def record(path: Path | None = None) -> Any:
            asked.append(path)
            return storage(path)

        monkeypatch.setattr(run.checkpoints, "storage", record)
        target = tmp_path / "elsewhere" / "out"
        convert.execute(convert.plan(source, target, "safetensors", run))
    assert [path and path.parent for path in asked] == [tmp_path, target.parent]


def test_settings_reach_the_conversion(source: Path, tmp_path: Path) -> None:
    words = [source, tmp_path / "out", "--to", "safetensors", "--set", "checkpoint.storage=absent"]
    result = call(*words)
    assert result.exit_code != 0
    assert "absent" in f"{result.output}{result.exception}"
    assert not (tmp_path / "out").exists()
    file = tmp_path / "settings.toml"
    file.write_text('[checkpoint]\nstorage = "files"\n', encoding="utf-8")
    assert call(*words[:4], "--settings", file).exit_code == 0


def test_standard_output_is_json_alone(source: Path, tmp_path: Path) -> None:
    result = call(source, tmp_path / "out", "--to", "safetensors", "--json")
    assert json.loads(result.stdout)["bytes"] == 24
    assert not result.stderr


def test_source_and_target_that_overlap_are_refused(source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(source)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with make_run(tmp_path) as run:
        for first, second, reason in [
            (source, source, "are the same"),
            (source, link, "are the same"),
            (link, source, "are the same"),
            (source, source / "out", "lies inside"),
            (source, link / "out", "lies inside"),
            (link, source / "deep" / "out", "lies inside"),
            (source, tmp_path, "lies inside"),
        ]:
            with pytest.raises(core.CheckpointError, match=reason) as caught:
                convert.plan(first, second, "safetensors", run)
            assert "remove" not in caught.value.fix
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_links_are_followed_to_the_source_and_kept_at_the_target(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    refused = call(source, tmp_path / "nowhere", "--to", "safetensors")
    assert "exists already" in f"{refused.output}{refused.exception}"
    assert (tmp_path / "nowhere").is_symlink()
    assert call(tmp_path / "link", tmp_path / "out", "--to", "safetensors").exit_code == 0
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["x"]


def test_an_interrupted_conversion_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(name: str, size: int) -> None:
        raise KeyboardInterrupt

    with make_run(tmp_path / "run") as run:
        for to in ("safetensors", "dcp"):
            plan = convert.plan(source, tmp_path / "out", to, run)
            with pytest.raises(KeyboardInterrupt):
                convert.execute(plan, interrupt)
            assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
