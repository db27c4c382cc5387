"""Whatever the cut of the source and the order of the target, every element arrives in its place."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from core.errors import CheckpointError
from core_ucp.execution import copying, planning
from core_ucp.execution.copying import execute
from core_ucp.execution.digest import digest_of
from core_ucp.execution.planning import plan
from core_ucp.targets.target import NewFile, Target, Wanted
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom

SHAPES = st.lists(st.integers(0, 9), max_size=4)
lenient = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@lenient
@given(data=st.data(), shape=SHAPES, size=st.sampled_from([1, 2, 4, 8, 16]))
def test_any_cut_into_any_order(by_hand: Any, data: Any, shape: list[int], size: int) -> None:
    kinds = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128]
    dtype = next(kind for kind in kinds if kind.itemsize == size)
    count = torch.Size(shape).numel() * size
    tensor = (torch.arange(count) % 251).to(torch.uint8).view(dtype).reshape(shape)
    cut = data.draw(by_hand.cuts(len(shape)))
    order = data.draw(st.permutations(range(len(shape))))
    block = data.draw(st.sampled_from([64, 1024, 2**20]))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "BLOCK", block)
        patch.setattr(copying, "BLOCK", block)
        view = by_hand.stored(Path(folder) / "in", tensor, cut)
        made = plan(view, by_hand.wanted(tensor, list(order)))
        digests = execute(made, Path(folder) / "out")
        written = (Path(folder) / "out" / "inner" / "out").read_bytes()
    expected = tensor.permute(list(order)).contiguous() if shape else tensor
    assert written == b"12345678" + by_hand.octets(expected)
    assert digests["model.w"] == digest_of(by_hand.octets(tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(by_hand: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(300, 7, generator=generator) * 10.0 ** torch.randint(
        -8, 8, (300, 1), generator=generator
    )
    tensor[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    view = by_hand.stored(tmp_path / "in", tensor, by_hand.cut(1, (3,)))
    execute(plan(view, by_hand.wanted(tensor, [0, 1], dtype)), tmp_path / "out")
    written = (tmp_path / "out" / "inner" / "out").read_bytes()[8:]
    assert written == by_hand.octets(tensor.to(dtype))


def test_a_power_of_two_is_applied(by_hand: Any, tmp_path: Path) -> None:
    tensor = torch.randn(5, 3)
    view = by_hand.stored(tmp_path / "in", tensor, by_hand.cut(None, (4,)))
    atom = view.atoms["model.w"]
    view.atoms["model.w"] = Atom(atom.shape, atom.dtype, atom.pieces, exponent=-3)
    execute(plan(view, by_hand.wanted(tensor, [0, 1])), tmp_path / "out")
    written = (tmp_path / "out" / "inner" / "out").read_bytes()[8:]
    assert written == by_hand.octets(tensor / 8)


@pytest.mark.parametrize("exponent", [10, -20, 200, -200])
def test_a_power_of_two_that_loses_bits_is_refused(
    by_hand: Any, tmp_path: Path, exponent: int
) -> None:
    tensor = torch.tensor([1.0, 65504.0, 6.1e-5]).half()
    view = by_hand.stored(tmp_path / "in", tensor, by_hand.cut(0, (1,)))
    atom = view.atoms["model.w"]
    view.atoms["model.w"] = Atom(atom.shape, atom.dtype, atom.pieces, exponent=exponent)
    with pytest.raises(CheckpointError, match=rf"w cannot be multiplied by 2\^{exponent}"):
        execute(plan(view, by_hand.wanted(tensor, [0])), tmp_path / "out")


def test_a_copy_in_the_wanted_type_is_taken_before_one_is_rounded(
    by_hand: Any, tmp_path: Path
) -> None:
    tensor = torch.randn(6)
    view = by_hand.stored(tmp_path / "in", tensor, by_hand.cut(None, ()))
    half = torch.arange(6.0).to(torch.bfloat16)
    (tmp_path / "in" / "half").write_bytes(by_hand.octets(half))
    file = view.files.add("half")
    view.twins["model.w"] = Atom((6,), torch.bfloat16, Pieces.dense((6,), file, 0, 2))
    execute(plan(view, by_hand.wanted(tensor, [0], torch.bfloat16)), tmp_path / "out")
    assert (tmp_path / "out" / "inner" / "out").read_bytes()[8:] == by_hand.octets(half)


def refused(view: Any, target: Target, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        plan(view, target)


def test_holes_overlaps_and_clashes_are_found_before_anything_is_written(
    by_hand: Any, tmp_path: Path
) -> None:
    tensor = torch.arange(12.0).reshape(4, 3)
    view = by_hand.stored(tmp_path / "in", tensor, by_hand.cut(0, (2,)))
    whole = view.atoms["model.w"]
    target = by_hand.wanted(tensor, [0, 1])

    def with_pieces(pieces: Pieces) -> Any:
        view.atoms["model.w"] = Atom(whole.shape, whole.dtype, pieces)
        return view

    rows = torch.tensor
    refused(
        with_pieces(whole.pieces.take(rows([0]).numpy())), target, "6 of 12 elements are missing"
    )
    refused(with_pieces(whole.pieces.take(rows([0, 1, 1]).numpy())), target, "is there twice")
    with_pieces(whole.pieces)
    (found,) = target.wanted
    twice = Target(target.files, (found, found))
    refused(view, twice, "would overwrite a part of inner/out")
    short = Target((NewFile("inner/out", 40),), target.wanted)
    refused(view, short, "does not fit into inner/out")
    header = Target((NewFile("inner/out", 56, ((4, b"12345678"),)),), target.wanted)
    refused(view, header, "would overwrite a part of inner/out")
    other = Wanted("model.v", found.atom)
    refused(view, Target(target.files, (other,)), "has no model.v")
    integers = Wanted("model.w", Atom((4, 3), torch.int32, found.atom.pieces))
    refused(view, Target(target.files, (integers,)), "cannot become torch.int32")


def test_a_source_that_changes_while_it_is_read_is_refused(by_hand: Any, tmp_path: Path) -> None:
    tensor = torch.arange(12.0)
    view = by_hand.stored(tmp_path / "in", tensor, by_hand.cut(None, (5,)))
    made = plan(view, by_hand.wanted(tensor, [0]))

    def touch(size: int) -> None:
        (tmp_path / "in" / "1").write_bytes(b"abc" + bytes(28))

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        execute(made, tmp_path / "out", progress=touch)
    assert not list((tmp_path / "out").rglob("out"))


def test_a_truncated_source_is_named(by_hand: Any, tmp_path: Path) -> None:
    tensor = torch.arange(12.0)
    view = by_hand.stored(tmp_path / "in", tensor, by_hand.cut(None, (5,)))
    (tmp_path / "in" / "0").write_bytes(b"abc")
    view = type(view)(
        tmp_path / "in", "x", type(view.files)(tmp_path / "in", ["0", "1"]), view.atoms
    )
    refused(view, by_hand.wanted(tensor, [0]), "0 is truncated: model.w ends at byte 23 of 3")


def test_columns_of_several_atoms_may_interleave(by_hand: Any, tmp_path: Path) -> None:
    """As where q, k and v are stored side by side in one matrix of (in, out)."""
    tensor = torch.arange(12.0).reshape(4, 3)
    view = by_hand.stored(tmp_path / "in", tensor, by_hand.cut(0, (1,)))
    view.atoms["model.v"] = view.atoms["model.w"]
    placed = []
    for number, key in enumerate(("model.w", "model.v")):
        pieces = Pieces.dense((4, 3), 0, 12 * number, 4)
        pieces.stride[:] = [24, 4]
        placed.append(Wanted(key, Atom((4, 3), torch.float32, pieces)))
    execute(plan(view, Target((NewFile("both", 96),), tuple(placed))), tmp_path / "out")
    both = (tmp_path / "out" / "both").read_bytes()
    assert both == by_hand.octets(torch.cat([tensor, tensor], dim=1))
