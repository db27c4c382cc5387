"""``core fastpersist verify`` and ``inspect``: exit status, tables and JSON."""

from __future__ import annotations

import json
import os
import pickle
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from core.cli import cli, main
from core.testing.fixtures import make_run, plugin_of
from core_fastpersist.dcp.native import NativeWriter
from core_fastpersist.direct.newfile import WriteOptions
from core_fastpersist.files.storing import save
from core_fastpersist.inspection import inspect
from core_fastpersist.plugin import Plugin

CHUNK = 4096
STATE: dict[str, Any] = {
    "model": {"w": torch.arange(6000.0).reshape(60, 100), "b": torch.ones(7, dtype=torch.bfloat16)},
    "betas": (0.9, 0.999),
    "names": ["a", "b"],
    "step": 3,
}


def core(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["fastpersist", *map(str, arguments)])


def answer(result: Result) -> Any:
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    save(STATE, tmp_path / "x.safetensors", options=WriteOptions(chunk=CHUNK))
    return tmp_path / "x.safetensors"


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    state = {"w": torch.arange(5000.0).reshape(50, 100), "step": torch.tensor(3), "o": {"lr": 0.1}}
    dcp.save(state, storage_writer=NativeWriter(tmp_path / "dcp"), no_dist=True)
    return tmp_path / "dcp"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_verify_says_that_all_is_sound(file: Path) -> None:
    result = core("verify", file)
    assert result.exit_code == 0
    assert "damages: 0; sound files: 1; not covered by digests: 0" in result.stdout
    found = answer(core("verify", file, "--json"))
    assert (found["sound"], found["damages"], found["not_covered"]) == (True, 0, 0)


def test_verify_names_the_damage_and_exits_with_1(file: Path) -> None:
    flip(file, file.stat().st_size - 1)
    result = core("verify", file)
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("fail")]
    assert "x.safetensors" in line
    found = answer(core("verify", file, "--json"))
    (damage,) = found["findings"]
    assert not found["sound"]
    assert damage["file"] == str(file)
    assert damage["end"] == file.stat().st_size
    assert damage["begin"] <= file.stat().st_size - 1
    assert damage["begin"] % CHUNK == 0
    assert damage["chunk"] is not None
    assert {len(damage["expected"]), len(damage["actual"])} == {32}
    assert damage["actual"] in result.stdout.replace("\n", "").replace(" ", "")


def test_verify_of_nothing_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SystemExit) as ended:
            main(["fastpersist", "verify", str(path)])
        assert ended.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_file_without_digests_is_a_warning(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "plain.safetensors")
    result = core("verify", tmp_path / "plain.safetensors")
    assert result.exit_code == 0
    assert "not covered by digests: 1" in result.stdout


def test_inspect_shows_what_a_file_holds(file: Path) -> None:
    found = answer(core("inspect", file, "--json"))
    tensors = {row["name"]: row for row in found["tensors"]}
    assert tensors["model.w"]["dtype"] == "F32"
    assert tensors["model.w"]["shape"] == [60, 100]
    assert tensors["model.w"]["bytes"] == 24000
    offset = tensors["model.w"]["offset"]
    stored = file.read_bytes()[offset : offset + 24000]
    assert stored == STATE["model"]["w"].numpy().tobytes()
    assert offset % tensors["model.w"]["alignment"] == 0
    assert tensors["model.b"]["dtype"] == "BF16"
    assert found["header"]["by core-fastpersist"] is True
    assert found["header"]["bytes"] == file.stat().st_size
    assert found["header"]["data from byte"] % found["header"]["alignment of the data"] == 0
    assert found["digests"]["bytes of a chunk"] == CHUNK
    assert found["metadata"] == {"format": "pt"}
    text = core("inspect", file).stdout
    assert "model.w" in text
    assert "betas" not in text


def test_inspect_shows_the_tree(file: Path) -> None:
    lines = core("inspect", file, "--tree").stdout.splitlines()
    start = lines.index("tree")
    assert lines[start + 1 :] == [
        "dict of 4",
        "  model: dict of 2",
        "    w: tensor F32 [60, 100], 'model.w'",
        "    b: tensor BF16 [7], 'model.b'",
        "  betas: tuple of 2",
        "    0: 0.9",
        "    1: 0.999",
        "  names: list of 2",
        "    0: 'a'",
        "    1: 'b'",
        "  step: 3",
    ]


def test_the_tree_tells_views_and_parameters_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    tree = {"whole": whole, "half": whole[6:], "p": torch.nn.Parameter(torch.ones(2))}
    save(tree, tmp_path / "x.safetensors")
    text = core("inspect", tmp_path / "x.safetensors", "--tree").stdout
    assert "  half: tensor float32 [6], view of 'whole'" in text
    assert "  p: parameter, tensor F32 [2], 'p'" in text


def test_inspect_reads_files_of_others(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "plain.safetensors", {"who": "somebody"})
    found = answer(core("inspect", tmp_path / "plain.safetensors", "--json"))
    assert found["header"]["by core-fastpersist"] is False
    assert found["metadata"] == {"who": "somebody"}
    assert found["tree"] is None
    text = core("inspect", tmp_path / "plain.safetensors", "--tree").stdout
    assert "another program wrote this" in text


def test_inspect_shows_a_dcp_folder(folder: Path) -> None:
    found = answer(core("inspect", folder, "--json"))
    rows = {row["name"]: row for row in found["tensors"]}
    assert rows["w"] | {"chunks": 1} == {
        "name": "w",
        "dtype": "float32",
        "shape": [50, 100],
        "bytes": 20000,
        "chunks": 1,
    }
    assert rows["o.lr"]["dtype"] == "object"
    (data,) = folder.glob("*.distcp")
    files = {row["file"]: row for row in found["files"]}
    assert files[data.name]["items"] == 3
    assert files[data.name]["bytes"] == data.stat().st_size
    assert files[data.name]["digests"] == 1
    assert set(files) == {data.name, ".metadata"}
    (item,) = [row for row in found["items"] if row["name"] == "w"]
    assert item["offset"] + item["bytes"] <= data.stat().st_size
    assert "w" in core("inspect", folder).stdout


class Hostile:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path("pwned").write_text, ("x",))


def test_inspect_unpickles_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / ".metadata.xxh3.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    torch.save({"x": Hostile()}, tmp_path / "x.pt")
    assert answer(core("inspect", tmp_path / "x.pt", "--json"))["header"]["kind"] == "torch.save"
    with pytest.raises(SystemExit) as ended:
        main(["fastpersist", "inspect", str(folder)])
    assert ended.value.code == 2
    assert "refused" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


def test_inspect_shows_where_the_storages_of_a_pt_file_lie(tmp_path: Path) -> None:
    save(STATE, tmp_path / "x.pt")
    found = answer(core("inspect", tmp_path / "x.pt", "--json"))
    content = (tmp_path / "x.pt").read_bytes()
    (row,) = [row for row in found["records"] if row["bytes"] == 24000]
    wanted = STATE["model"]["w"].numpy().tobytes()
    assert content[row["offset"] : row["offset"] + 24000] == wanted
    assert row["alignment"] == 4096


def test_inspect_lists_the_checkpoints_of_a_run(tmp_path: Path) -> None:
    plugins = plugin_of(Plugin(), "fastpersist")
    with make_run(tmp_path / "run", plugins=plugins, checkpoint={"format": "fastpersist"}) as run:
        for step in (1, 2):
            run.save({"w": torch.ones(30), "epoch": 4}, step).durable()
    (tmp_path / "run/checkpoints/step-00000001/manifest.json").write_text("{")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        newest, damaged = answer(core("inspect", path, "--json"))["checkpoints"]
        assert (newest["step"], newest["state"]) == (2, "whole")
        assert (damaged["step"], damaged["format"]) == (1, "")
        assert "damaged" in damaged["state"]
    one = answer(core("inspect", tmp_path / "run/checkpoints/step-00000002", "--json"))
    assert one["manifest"]["step"] == 2
    assert json.loads(one["manifest"]["values"])["epoch"] == 4
    assert answer(core("verify", tmp_path / "run", "--json"))["damages"] == 1


def test_a_folder_of_safetensors_is_one_checkpoint(tmp_path: Path) -> None:
    with make_run(tmp_path / "run", checkpoint={"format": "safetensors"}) as run:
        path = run.save({"w": torch.ones(30)}, 1).durable()
    found = answer(core("inspect", path, "--json"))
    assert found["manifest"]["format"] == "safetensors"
    assert {"file": "model.safetensors", "name": "w"}.items() <= next(
        row for row in found["tensors"] if row["name"] == "w"
    ).items()


def test_long_tables_are_cut_with_a_count(tmp_path: Path) -> None:
    save({f"t{index}": torch.ones(1) for index in range(100)}, tmp_path / "x.safetensors")
    short = core("inspect", tmp_path / "x.safetensors", "--tree").stdout
    assert "tensors (100)" in short
    assert "… 60 more; --all shows them" in short
    assert "… 61 more; --all shows them" in short  # the tree has a root
    whole = core("inspect", tmp_path / "x.safetensors", "--all").stdout
    assert "more; --all" not in whole
    assert all(f"t{index} " in whole for index in range(100))


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"PK\x05\x06" + bytes(18)]
)
def test_inspect_of_something_else_is_an_error(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["fastpersist", "inspect", str(tmp_path / "x.bin")])
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_tree_that_nobody_wrote_is_one_error(file: Path) -> None:
    from core.errors import CheckpointError
    from core_fastpersist.outline import outline

    tensors = inspect(file)["tensors"]
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    for tree in ({"tensor": "absent"}, {"dict": 3}, {"what": 1}, {"": 1}, 1.5, {"tuple": {}}, deep):
        with pytest.raises(CheckpointError, match="damaged"):
            outline(tree, tensors)


def test_a_bar_is_shown_on_a_terminal_only(file: Path) -> None:
    assert core("verify", file).stderr == ""
    ours, terminal = pty.openpty()
    program = "from core.cli import main; main()"
    call = [sys.executable, "-P", "-c", program, "fastpersist", "verify", str(file), "--json"]
    with os.fdopen(ours, "rb", buffering=0) as shown:
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        done = subprocess.run(
            call, stdout=subprocess.PIPE, stderr=terminal, env=environment, check=True
        )
        os.close(terminal)
        assert b"verify" in shown.read(2**16)
    assert json.loads(done.stdout)["sound"] is True
