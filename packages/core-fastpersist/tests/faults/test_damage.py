"""Cut files and flipped bits at every kind of byte, and files that somebody has made up."""

from __future__ import annotations

import gc
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from core.errors import CheckpointError
from core_fastpersist import (
    NativeReader,
    NativeWriter,
    SafetensorsReader,
    SafetensorsWriter,
    Staging,
    WriteOptions,
    load,
    save,
)
from core_fastpersist.coverage import SUFFIX, digests_of
from core_fastpersist.direct.digests import Digests, digest

FORMATS = ["fastpersist", "fastpersist-safetensors"]
each_format = pytest.mark.parametrize("format", FORMATS)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def saved(training: Callable[..., Any]) -> Callable[[str], Any]:
    """A run with the checkpoints of steps 1 and 2, and the digests of what they hold."""

    def make(format: str) -> Any:
        trained = training(
            "copy, thread", checkpoint={"keep": 0, "format": format}, fastpersist={"chunk": 1}
        )
        trained.values = {}
        for step in (1, 2):
            trained.step()
            trained.values[step] = trained.digest()
            trained.save(step).durable()
        trained.newest = trained.folder / "checkpoints" / "step-00000002"
        return trained

    return make


def outcome(trained: Any) -> str:
    """How the newest checkpoint loads: ``right``, ``older``, or the error."""
    trained.spoil()
    try:
        loaded = trained.load()
    except CheckpointError as error:
        return str(error)
    if loaded.step == 1:
        # By the documented policy: what is seen to be incomplete is passed over, and told.
        assert any("step-00000002" in remark for remark in loaded.remarks), loaded.remarks
        assert trained.digest() == trained.values[1]
        return "older"
    assert (loaded.step, loaded.path) == (2, trained.newest)
    assert trained.digest() == trained.values[2], "wrong values were loaded"
    return "right"


@each_format
def test_a_flipped_bit_of_any_file_is_an_error_or_changes_nothing(
    format: str, saved: Callable[[str], Any]
) -> None:
    trained = saved(format)
    numbers = random.Random(5)
    assert outcome(trained) == "right"
    found: dict[str, set[str]] = {}
    for path in sorted(trained.newest.iterdir()):
        content = path.read_bytes()
        some = {numbers.randrange(len(content)) for _ in range(12)}
        for position in sorted({0, 7, 8, len(content) // 2, len(content) - 1} | some):
            flip(path, position, numbers.randrange(8))
            text = outcome(trained)
            path.write_bytes(content)
            kind = text if text in ("right", "older") else "error"
            if kind == "error":
                assert path.name.removesuffix(SUFFIX) in text, text
            found.setdefault(path.name, set()).add(kind)
    for name, kinds in found.items():
        # Everything that matters is covered; data and headers without an exception.
        allowed = {"error", "older"} if name == "manifest.json" else {"error"}
        if name.endswith(SUFFIX):  # the size of chunks does not matter where there is only one
            allowed.add("right")
        assert kinds <= allowed, found
    assert outcome(trained) == "right"


@each_format
def test_a_digest_that_does_not_fit_is_no_reason_to_load_an_older_checkpoint(
    format: str, saved: Callable[[str], Any]
) -> None:
    trained = saved(format)
    data = max(trained.newest.iterdir(), key=lambda path: path.stat().st_size)
    digests = digests_of(data)
    assert digests is not None
    for begin, end, expected in digests.ranges():
        content = data.read_bytes()
        flip(data, (begin + end) // 2)
        text = outcome(trained)
        data.write_bytes(content)
        assert f"{data} is damaged in bytes {begin:,} to {end:,}" in text
        assert f"and {expected} was written" in text
        assert "xxh3 is" in text


@each_format
def test_a_file_cut_anywhere_is_passed_over_for_the_checkpoint_before(
    format: str, saved: Callable[[str], Any]
) -> None:
    trained = saved(format)
    for path in sorted(trained.newest.iterdir()):
        content = path.read_bytes()
        for length in {0, 1, 8, 4096, len(content) // 2, len(content) - 1}:
            if length < len(content):
                path.write_bytes(content[:length])
                assert outcome(trained) == "older", (path.name, length)
        path.write_bytes(content + b"\0")
        if path.name != "manifest.json":
            assert outcome(trained) == "older", path.name
        path.unlink()
        assert outcome(trained) == "older", path.name
        path.write_bytes(content)
    assert outcome(trained) == "right"


@each_format
def test_a_cut_file_is_named_when_its_checkpoint_is_asked_for(
    format: str, saved: Callable[[str], Any]
) -> None:
    trained = saved(format)
    for path in sorted(trained.newest.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=path.name):
            trained.load(trained.newest)
        path.write_bytes(content)


# Without core's manifest


def state() -> dict[str, Any]:
    return {"w": torch.arange(60_000.0), "b": torch.ones(7), "n": {"lr": 0.5, "name": "x"}}


def dcp_folder(folder: Path, kind: str) -> Path:
    staging = Staging(mode="copy", writer="thread", options=WriteOptions(chunk=2**16))
    writer = NativeWriter if kind == "native" else SafetensorsWriter
    dcp.save(state(), storage_writer=writer(folder, staging), no_dist=True)
    return folder


def read_back(folder: Path, kind: str) -> dict[str, Any]:
    reader = NativeReader(folder) if kind == "native" else SafetensorsReader(folder)
    found = {"w": torch.zeros(60_000), "b": torch.zeros(7), "n": {"lr": 0.0, "name": ""}}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def require_right(found: dict[str, Any]) -> None:
    for name in ("w", "b"):
        assert torch.equal(found[name], state()[name])
    assert found["n"] == state()["n"]


KINDS = ["native", "sharded"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def test_readers_that_are_collected_anywhere_hold_nothing_up(tmp_path: Path) -> None:
    """The collector runs in whichever thread, also in one that another waits for."""
    folder = dcp_folder(tmp_path / "saved", "native")
    before = gc.get_threshold()
    gc.set_threshold(20, 2, 2)
    try:
        for _ in range(60):
            reader: Any = NativeReader(folder)
            dcp.load({"w": torch.zeros(60_000)}, storage_reader=reader, no_dist=True)
            reader.cycle = reader
            del reader
    finally:
        gc.set_threshold(*before)


@each_kind
def test_a_damaged_dcp_folder_is_an_error_or_loads_right(kind: str, tmp_path: Path) -> None:
    folder = dcp_folder(tmp_path / "saved", kind)
    require_right(read_back(folder, kind))
    numbers = random.Random(3)
    errors = 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        some = [numbers.randrange(len(content)) for _ in range(12)]
        for position in {0, 8, len(content) - 1, *some}:
            flip(path, position, numbers.randrange(8))
            errors += raises_or_is_right(folder, kind)
            path.write_bytes(content)
        for length in {0, 9, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:length])
            errors += raises_or_is_right(folder, kind)
            path.write_bytes(content)
    assert errors > 40


def raises_or_is_right(folder: Path, kind: str) -> bool:
    try:
        found = read_back(folder, kind)
    except (CheckpointException, CheckpointError) as error:
        if not cause(error):
            raise
        return True
    require_right(found)
    return False


def cause(error: BaseException) -> bool:
    """Whether it is an error of ours, inside of what DCP makes of it."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        return all(
            cause(inner) or "metadata is None" in str(inner) for inner, _ in failures.values()
        )
    return isinstance(error, CheckpointError)


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    for rank in range(3):
        sharding = {"w": {"saved_offsets": [rank * 10]}}
        from safetensors.torch import save_file

        save_file(
            {"w": torch.full((10,), float(rank))},
            folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(sharding), "DCP_VERSION": "1.0"},
        )
    found = {"w": torch.zeros(30)}
    dcp.load(found, storage_reader=SafetensorsReader(folder), no_dist=True)
    assert found["w"].unique().tolist() == [0.0, 1.0, 2.0]
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises((CheckpointException, CheckpointError), match="w"):
        dcp.load(found, storage_reader=SafetensorsReader(folder), no_dist=True)


# Single files


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_cut_or_empty_file_is_an_error_with_its_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save(state(), path, options=WriteOptions(chunk=2**16))
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 4095, 4096, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=name):
            load(path)
    # What a kill leaves behind before the header is written.
    path.write_bytes(bytes(4096) + content[4096:])
    with pytest.raises(CheckpointError, match=name):
        load(path)


@quick
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_safetensors_file_is_an_error(
    where: float, bit: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    if not path.exists():
        save(state(), path, options=WriteOptions(chunk=2**16))
    content = path.read_bytes()
    flip(path, int(where * len(content)), bit)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        load(path)
    path.write_bytes(content)


# Files that somebody has made up


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["xxh3_128", "0" * 32, "../x", "/etc/passwd", "w", "x.bin"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
GOOD = {"version": 1, "file": "x.bin", "algorithm": "xxh3_128", "start": 0, "chunk": 4096}


@settings(max_examples=70, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_made_up_sidecar_is_an_error(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(10_000))
    good = {**GOOD, "size": 10_000, "hashes": [digest(bytes(4096))] * 2 + [digest(bytes(1808))]}
    sidecar = tmp_path / f"x.bin{SUFFIX}"
    sidecar.write_text(json.dumps(good))
    assert digests_of(path) == Digests(0, 4096, 10_000, tuple(good["hashes"]))
    key = data.draw(st.sampled_from([*good, None]))
    value = data.draw(ANY)
    bad = value if key is None else {**good, key: value}
    sidecar.write_text(json.dumps(bad))
    if bad != good:
        try:
            found = digests_of(path)
        except CheckpointError as error:
            if "x.bin" not in str(error):
                raise
        else:
            from core_fastpersist.direct.reading import check_file

            assert found is not None
            with pytest.raises(CheckpointError, match=r"x\.bin"):
                check_file(path, found)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[" * 100_000, b'{"size": 1' + b"0" * 10_000 + b"}", b"\xff\xfe", b"{}"],
    ids=["empty", "null", "deep", "long number", "no text", "bare"],
)
def test_a_sidecar_that_is_none_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(100))
    (tmp_path / f"x.bin{SUFFIX}").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        digests_of(tmp_path / "x.bin")


def with_metadata(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """The sharded folder, its file rewritten by the stock library with other metadata."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        metadata = {
            k: v for k, v in file.metadata().items() if k[:11] != "fastpersist" or "obj" in k
        }
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=change(metadata))


@settings(max_examples=70, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("key", ["DCP_SHARDING_INFO", "fastpersist.objects"])
def test_made_up_metadata_of_shards_are_an_error_or_load_right(
    key: str, data: st.DataObject, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    if not folder.exists():
        dcp_folder(tmp_path / "template", "sharded")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "template", folder)
    names = st.sampled_from(["w", "b", "n.lr", "n.name"])
    place = st.fixed_dictionaries({"saved_offsets": ANY}) | ANY
    triple = st.tuples(
        st.sampled_from(["shard-00001-objects.bin", "../x", "/etc/passwd", ""]) | ANY,
        st.integers(-10, 2**70) | ANY,
        st.integers(-10, 2**70) | ANY,
    )
    value = data.draw(ANY | st.dictionaries(names, place | triple, max_size=4))

    def change(metadata: dict[str, str]) -> dict[str, str]:
        return {**metadata, key: json.dumps(value)}

    with_metadata(folder, change)
    try:
        found = read_back(folder, "sharded")
    except (CheckpointException, CheckpointError) as error:
        if not clear(error):
            raise
    else:
        assert torch.equal(found["b"], state()["b"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fastpersist.objects", {"n.lr": ["shard-00001-objects.bin", 0, 2**62]}),
        ("fastpersist.objects", {"n.lr": ["shard-00001-objects.bin", 0, 2**70]}),
        ("fastpersist.objects", {"n.lr": ["shard-00001-objects.bin", 0, -1]}),
        ("fastpersist.objects", {"n.lr": ["shard-00001-objects.bin", -(2**70), 5]}),
        ("fastpersist.objects", {"n.lr": ["../secret", 0, 5]}),
        ("fastpersist.objects", {"n.lr": ["gone", 0, 5]}),
        ("DCP_SHARDING_INFO", {"w": {"saved_offsets": [2**70]}}),
        ("DCP_SHARDING_INFO", {"w": {"saved_offsets": [2**63 - 1]}}),
        ("DCP_SHARDING_INFO", {"w": {"saved_offsets": [float("inf")]}}),
        ("DCP_SHARDING_INFO", {"w": {"saved_offsets": [-1]}}),
        ("DCP_SHARDING_INFO", {"w": {"saved_offsets": [0, 0]}}),
        ("DCP_SHARDING_INFO", {"w": {"saved_offsets": [5]}}),
    ],
)
def test_places_that_cannot_be_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    folder = dcp_folder(tmp_path / "saved", "sharded")
    (tmp_path / "secret").write_bytes(bytes(100))
    told: dict[str, Any] = {}

    def change(metadata: dict[str, str]) -> dict[str, str]:
        told.update(json.loads(metadata[key]))
        return {**metadata, key: json.dumps({**told, **value})}

    with_metadata(folder, change)
    with pytest.raises((CheckpointException, CheckpointError)) as error:
        read_back(folder, "sharded")
    assert cause(error.value), repr(error.value)


def clear(error: BaseException) -> bool:
    """No ``MemoryError``, no ``OverflowError``: ours, or what DCP says of a state that does not fit."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        return all(clear(inner) for inner, _ in failures.values())
    # The last is what DCP's planner says of an object whose bytes are those of another.
    allowed = CheckpointError | AssertionError | RuntimeError | pickle.UnpicklingError
    return isinstance(error, allowed) or (
        isinstance(error, ValueError) and "Size mismatch" in str(error)
    )


class Runs:
    """A pickle that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def forge(folder: Path, content: bytes) -> None:
    """Put other bytes into the place of the metadata, with a digest that is theirs."""
    (folder / ".metadata").write_bytes(content)
    digests = Digests(0, max(4096, len(content)), len(content), (digest(content),))
    told = {"version": 1, "file": ".metadata", **digests.as_json()}
    (folder / f".metadata{SUFFIX}").write_text(json.dumps(told))


def test_metadata_that_run_code_are_refused_and_not_run(tmp_path: Path) -> None:
    folder = dcp_folder(tmp_path / "saved", "native")
    mark = tmp_path / "ran"
    forge(folder, pickle.dumps(Runs(mark)))
    with pytest.raises(CheckpointError, match="refused"):
        NativeReader(folder).read_metadata()
    assert not mark.exists()


FORGERIES: dict[str, Callable[[Any], None]] = {
    "another file": lambda info: setattr(info, "relative_path", "../secret"),
    "absolute": lambda info: setattr(info, "relative_path", "/etc/passwd"),
    "before the file": lambda info: setattr(info, "offset", -5),
    "after the file": lambda info: setattr(info, "offset", 2**40),
    "huge": lambda info: setattr(info, "length", 2**62),
    "negative": lambda info: setattr(info, "length", -1),
    "no number": lambda info: setattr(info, "offset", "7"),
    "another tensor": lambda info: setattr(info, "offset", info.offset + 1),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_places_are_refused(forgery: str, tmp_path: Path) -> None:
    folder = dcp_folder(tmp_path / "saved", "native")
    (tmp_path / "secret").write_bytes(bytes(10**6))
    for index in range(4):
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        info = list(metadata.storage_data.values())[index]
        FORGERIES[forgery](info)
        original = (folder / ".metadata").read_bytes()
        forge(folder, pickle.dumps(metadata))
        with pytest.raises((CheckpointException, CheckpointError)) as error:
            read_back(folder, "native")
        if forgery != "no number":
            assert cause(error.value) or clear(error.value), repr(error.value)
        forge(folder, original)
    require_right(read_back(folder, "native"))


@quick
@given(where=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=6))
def test_metadata_with_any_bytes_changed_and_a_digest_to_match_are_an_error_or_load_right(
    where: float, value: bytes, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    if not folder.exists():
        dcp_folder(folder, "native")
    original = (folder / ".metadata").read_bytes()
    place = int(where * len(original))
    forge(folder, original[:place] + value + original[place + len(value) :])
    try:
        NativeReader(folder).read_metadata()
    except CheckpointError as error:
        if ".metadata" not in str(error) and "metadata was refused" not in str(error):
            raise
    finally:
        forge(folder, original)
