"""Folders that are damaged, hostile or interrupted: a clear error, and nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError, ModelError, SettingsError
from core.testing import tiny
from core_fp6.inspecting import inspect_folder
from core_fp6.streaming import shards
from core_fp6.streaming.dequantizing import dequantize_folder
from core_fp6.streaming.quantizing import quantize_folder

Folders = Callable[..., Path]
MIXTRAL_KEY = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def digests(folder: Path) -> dict[str, str]:
    """What lies in a folder, to see whether it changes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file, padded so that the data stays where it is."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * max(0, size - len(text))
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


# What is refused, and leaves nothing


def refused(error: type[Exception], match: str, source: Path, target: Path, **options: Any) -> None:
    """A conversion fails with a clear error, and neither folder shows it."""
    before = digests(source) if source.is_dir() else {}
    parents = {*target.parent.iterdir()}
    with pytest.raises(error, match=match):
        quantize_folder(source, target, **options)
    assert {*target.parent.iterdir()} == parents
    assert (digests(source) if source.is_dir() else {}) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_codes_cannot_say_are_counted(
    folders: Folders, tmp_path: Path, value: float
) -> None:
    source = copy(folders("Mixtral"), tmp_path / "source")
    (file,) = (f for f in source.glob("*.safetensors") if MIXTRAL_KEY in load_file(f))
    content = load_file(file)
    content[MIXTRAL_KEY][3, :2] = value
    save_file(content, file, metadata={"format": "pt"})
    refused(ModelError, f"{MIXTRAL_KEY}.*\n?.*2 of its 1536", source, tmp_path / "six")
    # What is not quantized may be what it wants.
    quantize_folder(source, tmp_path / "six", skip=["model.layers.1.mlp.experts"])


def test_wrong_options_are_refused(folders: Folders, tmp_path: Path) -> None:
    source, target = folders(), tmp_path / "six"
    refused(SettingsError, "no format 'fp6'", source, target, format="fp6")
    refused(SettingsError, "not packed as e2m2", source, target, format="e2m2")
    refused(SettingsError, "no group size 100", source, target, group_size=100)
    refused(SettingsError, "matches", source, target, skip=["no_such_layer"])


def test_folders_that_overlap_or_exist_are_refused(folders: Folders, tmp_path: Path) -> None:
    source = copy(folders(), tmp_path / "source")
    refused(CheckpointError, "overlap", source, source / "inside")
    refused(CheckpointError, "overlap", source, source)
    (tmp_path / "link").symlink_to(source)
    refused(CheckpointError, "overlap", source, tmp_path / "link" / "inside")
    refused(CheckpointError, "overlap", source, source / ".." / "source")
    (tmp_path / "there").mkdir()
    refused(CheckpointError, "exists already", source, tmp_path / "there")
    with pytest.raises(CheckpointError, match="overlap"):
        dequantize_folder(source, source / "inside")


def test_what_is_no_model_is_refused(folders: Folders, tmp_path: Path) -> None:
    target = tmp_path / "six"
    refused(CheckpointError, "does not exist", tmp_path / "absent", target)
    (tmp_path / "file").write_text("x")
    refused(CheckpointError, "is no folder", tmp_path / "file", target)
    (tmp_path / "empty").mkdir()
    refused(CheckpointError, "neither", tmp_path / "empty", target)
    source = copy(folders(), tmp_path / "source")
    (source / "config.json").unlink()
    refused(CheckpointError, "config.json", source, target)
    (source / "config.json").write_text("{")
    refused(CheckpointError, "config.json is damaged", source, target)
    (source / "config.json").write_text("[]")
    refused(CheckpointError, "no JSON object", source, target)
    (source / "config.json").write_text('{"model_type": "no_such_model"}')
    refused(ModelError, "no_such_model", source, target)


def test_classes_that_transformers_lacks_are_refused_and_no_code_is_run(
    folders: Folders, tmp_path: Path
) -> None:
    source, target = copy(folders(), tmp_path / "source"), tmp_path / "six"
    config = config_of(source)

    def told(**changes: Any) -> None:
        (source / "config.json").write_text(json.dumps({**config, **changes}))

    told(architectures=["EvilForCausalLM"])
    refused(ModelError, "EvilForCausalLM", source, target)
    told(architectures=["pipeline"])
    refused(ModelError, "no such class", source, target)
    told(architectures=None)
    refused(ModelError, "no class", source, target)
    (source / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    told(model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    refused(ModelError, "cannot read", source, target)
    assert not (tmp_path / "pwned").exists()


def test_a_folder_of_another_shape_is_refused(folders: Folders, tmp_path: Path) -> None:
    source, target = copy(folders(), tmp_path / "source"), tmp_path / "six"
    config = {**config_of(source), "num_hidden_layers": 4}
    (source / "config.json").write_text(json.dumps(config))
    refused(CheckpointError, r"lacks model\.layers\.3", source, target)


def test_quantized_folders_are_refused(folders: Folders, tmp_path: Path) -> None:
    quantize_folder(folders(), tmp_path / "six")
    refused(ModelError, "quantized already", tmp_path / "six", tmp_path / "twelve")
    with pytest.raises(ModelError, match="no six-bit weights"):
        dequantize_folder(folders(), tmp_path / "plain")
    with pytest.raises(ModelError, match="no six-bit weights"):
        inspect_folder(folders())


def test_damaged_files_are_refused(folders: Folders, tmp_path: Path) -> None:
    source, target = copy(folders(), tmp_path / "source"), tmp_path / "six"
    file = sorted(source.glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(CheckpointError, "bytes long", source, target)
    file.write_bytes((2**60).to_bytes(8, "little") + whole[8:])
    refused(CheckpointError, "damaged", source, target)
    file.write_bytes(whole[:4])
    refused(CheckpointError, "damaged|truncated", source, target)
    file.unlink()
    refused(CheckpointError, file.name, source, target)


def test_headers_that_lie_are_refused(folders: Folders, tmp_path: Path) -> None:
    source, target = copy(folders(), tmp_path / "source"), tmp_path / "six"
    file = min(source.glob("*.safetensors"))
    whole = file.read_bytes()
    first = next(iter(load_file(file)))

    def shape(header: dict[str, Any]) -> None:
        header[first]["shape"] = [2**40, 2**40]

    def beyond(header: dict[str, Any]) -> None:
        header[first]["data_offsets"] = [0, 10**12]

    def dtype(header: dict[str, Any]) -> None:
        header[first]["dtype"] = "F1"

    for lie in (shape, beyond, dtype):
        edit_header(file, lie)
        refused(CheckpointError, "damaged", source, target)
        file.write_bytes(whole)


def test_an_index_that_leaves_the_folder_is_refused(folders: Folders, tmp_path: Path) -> None:
    source, target = copy(folders(), tmp_path / "source"), tmp_path / "six"
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    for file, match in [
        ("../x.safetensors", "plain file name"),
        (5, "weight_map"),
        ("absent", "absent"),
    ]:
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: file}}))
        refused(CheckpointError, match, source, target)
    moved = {**index["weight_map"], "of_nobody.weight": index["weight_map"][name]}
    path.write_text(json.dumps({"weight_map": moved}))
    refused(CheckpointError, "does not hold of_nobody", source, target)
    path.write_text("[]")
    refused(CheckpointError, "no JSON object", source, target)


# Interruptions and memory


def test_a_disk_that_refuses_leaves_nothing(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    refused(CheckpointError, "No space left", folders(), tmp_path / "six")


def test_a_killed_conversion_leaves_no_folder_that_looks_whole(
    folders: Folders, tmp_path: Path
) -> None:
    script = (
        "import os, sys, signal; from pathlib import Path\n"
        "from core_fp6.streaming.quantizing import quantize_folder\n"
        "done = []\n"
        "def stop(size, total=None):\n"
        "    done.append(size)\n"
        "    if len(done) == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), shard_size=5000, progress=stop)\n"
    )
    source, target = folders(), tmp_path / "six"
    words = [sys.executable, "-c", script, str(source), str(target)]
    ended = subprocess.run(words, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    assert not (left / "config.json").exists()
    with pytest.raises(CheckpointError):
        inspect_folder(left)
    quantize_folder(source, target)
    assert not inspect_folder(target).faults


MEASURED = """
import re, sys
from pathlib import Path
from threading import Event, Thread
from core_fp6.streaming.dequantizing import dequantize_folder
from core_fp6.streaming.quantizing import quantize_folder

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def peak(work, *words):
    most, ended = [0], Event()
    def watch():
        while not ended.wait(0.002):
            most[0] = max(most[0], anonymous())
    thread = Thread(target=watch)
    thread.start()
    work(*words, shard_size=2**20)
    ended.set()
    thread.join()
    return most[0]

for place in map(Path, sys.argv[1:]):
    there = peak(quantize_folder, place / "source", place / "six")
    back = peak(dequantize_folder, place / "six", place / "plain")
    print(max(there, back))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024}
    places = []
    for layers in (1, 2, 14):
        places.append(tmp_path / f"{layers}")
        model: Any = tiny.llama(num_hidden_layers=layers, **sizes)
        model.bfloat16().save_pretrained(places[-1] / "source", max_shard_size="2MB")
    # Without fragmentation, which is the allocator's and not ours to measure.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", MEASURED, *map(str, places)]
    ended = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    _, small, large = map(int, ended.stdout.split())
    plain, packed = (
        sum(f.stat().st_size for f in (places[-1] / name).glob("*.safetensors"))
        for name in ("source", "six")
    )
    assert packed > 8e6
    assert plain > 25e6
    assert large - small < 4e6
