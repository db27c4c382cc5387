"""Checkpoint formats: exact for every kind of tensor, clear about damage, modest in what they claim."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.checkpoints.convert import detect
from core.checkpoints.values import encode
from core.contributions import CheckpointFormat, Converter
from core.discovery import BUILTIN
from core.errors import CoreError
from core.hooks import Hooks
from core.testing.contract.check import Skip, checks_of, remark, require
from core.testing.contract.dcp import cases, convert, read, sample, stream, write
from core.testing.contract.subject import Subject
from core.testing.contract.transforms import same

if TYPE_CHECKING:
    from core.run import Run

LIMIT = 0.05
"""Seconds that ``detect`` may take."""


def round_trip(subject: Subject) -> None:
    """Every dtype and shape comes back bit for bit, or is refused by a CoreError."""
    for fmt in _writable(subject):
        refused = {}
        for name, tensors in cases().items():
            path = subject.folder() / "saved"
            with subject.run() as run:
                try:
                    write(fmt, path, tensors, run)
                except CoreError as error:
                    refused[name] = error.why or error.what
                    continue
                found = read(fmt, path, tensors, run)
            require(same(tensors, found), f"{fmt.name!r} changes a checkpoint that is {name}")
        reasons = "; ".join(sorted(set(refused.values())))
        if len(refused) == len(cases()):
            raise Skip(f"{fmt.name!r} refuses plain tensors: {reasons}")
        if refused:
            remark(f"{fmt.name!r} refuses {', '.join(refused)}: {reasons}")


def source_unchanged(subject: Subject) -> None:
    """Writing changes none of the tensors that are written."""
    for fmt in _writable(subject):
        tensors, untouched = sample(), sample()
        path = subject.folder() / "saved"
        _write_sample(subject, fmt, path, tensors)
        require(any(path.iterdir()), f"{fmt.name!r} writes nothing at the path it is given")
        require(same(tensors, untouched), f"{fmt.name!r} changes the tensors that it writes")


def recognises_own(subject: Subject) -> None:
    """detect() recognises what the format wrote, within 50 ms."""
    for fmt in _writable(subject):
        path = subject.folder() / "saved"
        _write_sample(subject, fmt, path)
        require(fmt.detect(path), f"{fmt.name!r} does not recognise what it wrote")
        _require_fast(fmt, path)


def ignores_others(subject: Subject) -> None:
    """detect() is false on everything that is not the format, within 50 ms."""
    if not subject.formats:
        raise Skip("the plugin has no checkpoint formats")
    for what, path in _strangers(subject.folder()):
        for fmt in subject.formats:
            require(not fmt.detect(path), f"{fmt.name!r} takes {what} for its own")
            _require_fast(fmt, path)
    for stranger, path in _other_formats(subject):
        for fmt in subject.formats:
            if fmt.name != stranger:
                found = fmt.detect(path)
                require(not found, f"{fmt.name!r} takes a {stranger!r} checkpoint for its own")


def unambiguous(subject: Subject) -> None:
    """A run that looks at what the format wrote finds the format, beside all of core's."""
    for fmt in _writable(subject):
        path = subject.folder() / "saved"
        _write_sample(subject, fmt, path)
        with subject.run() as run:
            try:
                found = detect(path, run).value
            except CoreError as error:
                reason = f"what {fmt.name!r} wrote is not found to be its own: {error.what}"
                raise AssertionError(f"{reason}; does it extend another format?") from None
        require(found == fmt, f"what {fmt.name!r} wrote is taken for {found.name!r}")


def streams(subject: Subject) -> None:
    """The writer takes one tensor at a time, each read when it is asked for, as in a conversion."""
    formats = _writable(subject)
    (dcp,) = [found for found in _own_formats(subject) if found.name == "dcp"]
    tensors = {**sample(), "model.scale": torch.tensor(3.5), "model.none": torch.empty(0, 3)}
    original = subject.folder() / "saved"
    with subject.run() as run:
        write(dcp, original, tensors, run)
    for fmt in formats:
        target = subject.folder() / "converted"
        with subject.run() as run:
            try:
                stream(fmt, dcp, original, target, run)
            except CoreError as error:
                raise Skip(f"{fmt.name!r} refuses plain tensors: {error.what}") from None
            found = read(fmt, target, tensors, run)
        require(same(tensors, found), f"{fmt.name!r} changes tensors that are converted")


def converts(subject: Subject) -> None:
    """What a format makes in its own way is recognised and holds every bit of the source."""
    refused = {}
    for fmt in _converting(subject):
        with subject.run(checkpoint={"format": "core.dcp"}) as run:
            source, weights = _trained(run)
            try:
                target, work = _converted(subject, fmt, source, run)
            except CoreError as error:
                refused[fmt.name] = error.why or error.what
                continue
            _require_facts(fmt, work)
            found = _read_converted(fmt, target, weights, run)
            require(same(found, weights), f"{fmt.name!r} changes bits")
    reasons = "; ".join(f"{name!r} refuses a run: {why}" for name, why in refused.items())
    if len(refused) == len(_converting(subject)):
        raise Skip(reasons)
    if refused:
        remark(reasons)


def describes(subject: Subject) -> None:
    """describe() tells a step and plain values that a checkpoint of core can hold."""
    checked = False
    for fmt in _converting(subject):
        with subject.run(checkpoint={"format": "core.dcp"}) as run:
            source, _ = _trained(run)
            try:
                target, _ = _converted(subject, fmt, source, run)
            except CoreError:
                continue
            if fmt.describe is None or not fmt.detect(target):
                continue
            found, checked, tensors = fmt.describe(target, run), True, dict[str, Tensor]()
        step: Any = found.step
        require(isinstance(step, int) and step >= 0, f"step {step!r} is no count")
        for name, value in found.values.items():
            try:
                encode(value, name, tensors)
            except CoreError as error:
                raise AssertionError(f"{fmt.name!r} describes {name!r}: {error}") from None
            require(not tensors, f"{fmt.name!r} describes {name!r}, which holds a tensor")
    if not checked:
        raise Skip("no format of the plugin describes what it makes")


def damaged(subject: Subject) -> None:
    """A file that is cut, emptied or missing gives one CoreError when it is read."""
    for fmt in _writable(subject):
        original = subject.folder() / "saved"
        _write_sample(subject, fmt, original)
        names = [p.relative_to(original) for p in sorted(original.rglob("*")) if p.is_file()]
        for name in names:
            for what, damage in _DAMAGES.items():
                path = subject.folder() / "saved"
                shutil.copytree(original, path)
                damage(path / name)
                _require_error(subject, fmt, path, f"{name} that {what}")


def _require_error(subject: Subject, fmt: CheckpointFormat, path: Path, what: str) -> None:
    with subject.run() as run:
        try:
            found = read(fmt, path, sample(), run)
        except CoreError:
            return
        except AssertionError as error:
            raise AssertionError(f"{error}, for {what}") from None
    # Some files are not needed to read these tensors: then they must be right.
    require(same(found, sample()), f"{fmt.name!r} reads wrong tensors from {what}")


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "is cut in half": _halve,
    "lacks its last byte": _cut,
    "is empty": _empty,
    "is missing": Path.unlink,
}


def _writable(subject: Subject) -> list[CheckpointFormat]:
    if not subject.formats:
        raise Skip("the plugin has no checkpoint formats")
    found = [f for f in subject.formats if f.writer is not None and f.reader is not None]
    if not found:
        raise Skip("no format of the plugin can be both written and read")
    return found


def _converting(subject: Subject) -> list[CheckpointFormat]:
    found = [fmt for fmt in subject.formats if fmt.convert is not None]
    if not found:
        raise Skip("no format of the plugin converts in a way of its own")
    return found


class _Model(nn.Module):
    """A model of the sample's weights."""

    def __init__(self) -> None:
        super().__init__()
        weights = {name.removeprefix("model."): tensor for name, tensor in sample().items()}
        self.embedding = nn.Embedding(32, 8, _weight=weights["embedding.weight"])
        self.layer = nn.Linear(8, 8, bias=False)
        self.layer.weight = nn.Parameter(weights["layer.weight"])
        self.bias = nn.Parameter(weights["bias"])


def _trained(run: Run) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of a run, and its weights by name."""
    model = _Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = run.save({"model": model, "optim": optimizer}, 1).durable()
    return path, {f"model.{name}": p.detach() for name, p in model.named_parameters()}


def _converted(
    subject: Subject, fmt: CheckpointFormat, source: Path, run: Run
) -> tuple[Path, Converter]:
    (dcp,) = [found for found in _own_formats(subject) if found.name == "dcp"]
    target = subject.folder() / "converted"
    return target, convert(fmt, dcp, source, target, run)


def _require_facts(fmt: CheckpointFormat, work: Converter) -> None:
    counts: list[Any] = [work.tensors, work.nbytes]
    require(all(isinstance(n, int) and n > 0 for n in counts), f"{fmt.name!r} counts {counts}")
    texts: list[Any] = [*work.skipped, *work.remarks]
    require(all(isinstance(text, str) for text in texts), f"{fmt.name!r} remarks {texts}")
    try:
        json.dumps(dict(work.describe()))
    except TypeError as error:
        raise AssertionError(f"{fmt.name!r} describes a conversion not as JSON: {error}") from None


def _read_converted(
    fmt: CheckpointFormat, target: Path, weights: dict[str, Tensor], run: Run
) -> dict[str, Tensor]:
    """The weights of a converted checkpoint; formats for models alone leave ``model.`` out."""
    reading = fmt
    if fmt.reader is None or not fmt.detect(target):
        try:
            reading = detect(target, run).value
        except CoreError as error:
            raise AssertionError(f"nobody reads what {fmt.name!r} makes: {error.what}") from None
    assert reading.reader is not None
    there = reading.reader(target, run).read_metadata().state_dict_metadata
    short = {name: name.removeprefix("model.") for name in weights if name not in there}
    wanted = {short.get(name, name): tensor for name, tensor in weights.items()}
    try:
        found = read(reading, target, wanted, run)
    except CoreError as error:
        raise AssertionError(f"what {fmt.name!r} makes cannot be read: {error.what}") from None
    return {name: found[short.get(name, name)] for name in weights}


def _write_sample(
    subject: Subject, fmt: CheckpointFormat, path: Path, tensors: dict[str, Tensor] | None = None
) -> None:
    with subject.run() as run:
        try:
            write(fmt, path, sample() if tensors is None else tensors, run)
        except CoreError as error:
            raise Skip(f"{fmt.name!r} refuses plain tensors: {error.what}") from None


def _require_fast(fmt: CheckpointFormat, path: Path) -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        fmt.detect(path)
        times.append(time.perf_counter() - started)
    took = f"{min(times) * 1000:.0f} ms"
    require(min(times) < LIMIT, f"detect() of {fmt.name!r} takes {took}, limit 50 ms")


def _strangers(folder: Path) -> Iterator[tuple[str, Path]]:
    """Paths that hold nobody's checkpoint, with what they are."""
    yield "a path that does not exist", folder / "absent"
    (folder / "empty").mkdir()
    yield "an empty folder", folder / "empty"
    for name, content in [("notes.txt", b"hello"), ("image.png", b"\x89PNG\r\n\x1a\n"), ("x", b"")]:
        (folder / name).write_bytes(content)
        yield f"the file {name}", folder / name
    (folder / "texts").mkdir()
    (folder / "texts" / "data.json").write_text("[]", encoding="utf-8")
    yield "a folder with a JSON file", folder / "texts"
    torch.save([1, 2, 3], folder / "numbers.pt")
    yield "a file of torch.save that is no state", folder / "numbers.pt"


def _other_formats(subject: Subject) -> Iterator[tuple[str, Path]]:
    """Checkpoints of core's own formats."""
    for fmt in _own_formats(subject):
        path = subject.folder() / "saved"
        _write_sample(subject, fmt, path)
        yield fmt.name, path


def _own_formats(subject: Subject) -> list[CheckpointFormat]:
    """Core's formats."""
    offered = subject.plugins.collect_from([BUILTIN], Hooks.core_checkpoints)
    return [found.value for found in offered if isinstance(found.value, CheckpointFormat)]


CHECKS = checks_of(
    "formats",
    round_trip,
    source_unchanged,
    recognises_own,
    ignores_others,
    unambiguous,
    streams,
    converts,
    describes,
    damaged,
)
