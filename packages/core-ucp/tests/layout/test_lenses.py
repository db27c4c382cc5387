"""Lenses do to views what the same operation does to tensors, and undo it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers.models.llama.modeling_llama import rotate_half

from core.errors import CheckpointError
from core_ucp.layout.lenses import (
    Lens,
    Merge,
    Permute,
    QueryGroups,
    Rename,
    Rotary,
    Scale,
    Split,
    Stack,
    Transpose,
    Unstack,
    apply,
    inverse,
    inverses,
)
from core_ucp.view.view import View

Build = Callable[..., View]
Read = Callable[[View], dict[str, np.ndarray]]
ROLES = ("", "exp_avg", "exp_avg_sq")
LAWS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def state(shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, np.ndarray]]:
    """Weights, moments and steps whose elements are all different, but for the steps."""
    made: dict[str, dict[str, np.ndarray]] = {}
    first = 0
    for name, shape in shapes.items():
        made[name] = {}
        for role in ROLES:
            size = int(np.prod(shape))
            made[name][role] = np.arange(first, first + size).reshape(shape)
            first += size
        made[name]["step"] = np.array(7)
    return made


def key(name: str, role: str) -> str:
    return f"optim.state.{name}.{role}" if role else f"model.{name}"


def test_split_is_cutting_and_merge_is_joining(build: Build, read: Read) -> None:
    arrays = state({"l.0.qkv.weight": (12, 5), "l.0.qkv.bias": (12,), "l.0.o.weight": (3, 5)})
    view = build(arrays, {"l.0.qkv.weight": {"lr": 0.1}, "l.0.qkv.bias": {"lr": 0.2}})
    lens = Split(
        "l.{n}.qkv.{kind}", ("l.{n}.q.{kind}", "l.{n}.k.{kind}", "l.{n}.v.{kind}"), 0, (4, 1, 1)
    )
    seen = apply(view, [lens])
    found = read(seen)
    for kind in ("weight", "bias"):
        for role in ROLES:
            whole = arrays[f"l.0.qkv.{kind}"][role]
            for part, rows in (("q", whole[:8]), ("k", whole[8:10]), ("v", whole[10:])):
                assert (found[key(f"l.0.{part}.{kind}", role)] == rows).all()
        assert found[key(f"l.0.v.{kind}", "step")] == 7
    assert seen.resume.hyper["l.0.k.bias"] == {"lr": 0.2}
    assert "model.l.0.qkv.weight" not in found
    assert set(seen.twins) == {k for k in found if k.startswith("model.")}
    assert inverse(lens) == Merge(lens.to, lens.match, 0, (4, 1, 1))


def test_merged_steps_must_be_equal_copies(build: Build) -> None:
    arrays = state({"g.weight": (2, 3), "u.weight": (2, 3)})
    seen = apply(build(arrays), [Merge(("g.{k}", "u.{k}"), "gu.{k}")])
    step = seen.atoms["optim.state.gu.weight.step"]
    assert len(step.pieces) == 1
    assert step.replicas is not None
    assert step.replicas.offset.tolist() != step.pieces.offset.tolist()


def test_stack_is_stacking(build: Build, read: Read) -> None:
    arrays = state({f"mlp.experts.{e}.w1": (3, 4) for e in (1, 0, 2)})
    for dim in range(3):
        lens = Stack("mlp.experts.{e}.{w}", "mlp.experts.{w}", "e", dim)
        found = read(apply(build(arrays), [lens]))
        for role in ROLES:
            parts = [arrays[f"mlp.experts.{e}.w1"][role] for e in range(3)]
            assert (found[key("mlp.experts.w1", role)] == np.stack(parts, dim)).all()
    assert inverse(lens) == Unstack("mlp.experts.{w}", "mlp.experts.{e}.{w}", "e", 2)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_query_groups_are_those_of_megatron(
    build: Build, read: Read, heads: int, groups: int
) -> None:
    width, hidden, each = 2, 3, heads // groups
    arrays = state({"qkv": ((heads + 2 * groups) * width, hidden)})
    found = read(apply(build(arrays), [QueryGroups("qkv", heads, groups)]))
    for role in ROLES:
        # As Megatron takes its rows apart: [groups, queries of the group + key + value, width].
        split = found[key("qkv", role)].reshape(groups, each + 2, width, hidden)
        q, k, v = split[:, :each], split[:, each], split[:, each + 1]
        joined = [part.reshape(-1, hidden) for part in (q, k, v)]
        assert (np.concatenate(joined) == arrays["qkv"][role]).all()


def test_rotary_pairs_rotate_as_halves_do(build: Build, read: Read) -> None:
    heads, width = 2, 6
    arrays = state({"q": (heads * width, 1)})
    pairs = read(apply(build(arrays), [Rotary("q", heads)]))["model.q"].reshape(
        heads, width // 2, 2
    )
    halves = torch.tensor(arrays["q"][""]).reshape(heads, width)
    turned = rotate_half(halves)
    for head in range(heads):
        for j in range(width // 2):
            assert pairs[head, j].tolist() == [halves[head, j], halves[head, j + width // 2]]
            assert turned[head, j] == -pairs[head, j, 1]
            assert turned[head, j + width // 2] == pairs[head, j, 0]


@LAWS
@given(data=st.data())
def test_permute_and_transpose_are_those_of_numpy(
    build: Build, read: Read, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 6]), min_size=1, max_size=3)))
    arrays = state({"x": shape})
    dim = data.draw(st.integers(0, len(shape) - 1))
    count = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if shape[dim] % n == 0]))
    order = tuple(data.draw(st.permutations(range(count))))
    axes = tuple(data.draw(st.permutations(range(len(shape)))))
    lenses = [Permute("x", dim, order), Transpose("x", axes)]
    seen = apply(build(arrays), lenses)
    found, back = read(seen), read(apply(seen, inverses(lenses)))
    for role in ROLES:
        x = arrays["x"][role]
        blocks = np.split(x, count, dim)
        expected = np.concatenate([blocks[index] for index in order], dim).transpose(axes)
        assert (found[key("x", role)] == expected).all()
        assert (back[key("x", role)] == x).all()


LENSES: list[Lens] = [
    Rename("l.{n}.attn.{rest**}", "model.layers.{n}.self_attn.{rest}"),
    Rename(r"l\.(?P<n>\d+)\.attn\.(?P<r>[a-z.]+)", "{n}/{r}", regex=True),
    Rename("{all**}", "module.{all}"),
    Split("l.{n}.attn.qkv.weight", ("q.{n}", "k.{n}", "v.{n}"), 0, (2, 1, 1)),
    Split("l.{n}.attn.qkv.{k}", ("l.{n}.a.{k}", "l.{n}.b.{k}"), 0),
    Merge(("l.{n}.gate", "l.{n}.up"), "l.{n}.gate_up", 1),
    Stack("l.{n}.gate", "gates", "n", 2),
    Stack("l.{n}.attn.{what**}", "attn.{what}", "n"),
    Stack(r"l\.(?P<i>\d+)\.up", "ups", "i", regex=True),
    Unstack("stacked.w", "moe.{e}.w", "e"),
    Permute("l.*.gate", 1, (2, 0, 1)),
    QueryGroups("l.{n}.attn.qkv.*", 4, 2),
    Rotary("l.0.attn.qkv.*", 2),
    Transpose("l.*.up"),
    Transpose("stacked.w", (2, 0, 1)),
    Scale("l.**", 3),
]
SHAPES = {
    **{f"l.{n}.attn.qkv.weight": (16, 6) for n in range(2)},
    **{f"l.{n}.attn.qkv.bias": (16,) for n in range(2)},
    **{f"l.{n}.gate": (4, 6) for n in range(2)},
    **{f"l.{n}.up": (4, 6) for n in range(2)},
    "stacked.w": (3, 2, 4),
}


def same(left: View, right: View, read: Read) -> None:
    a, b = read(left), read(right)
    assert set(a) == set(b)
    assert all((a[name] == b[name]).all() and a[name].shape == b[name].shape for name in a)
    assert {k: v.exponent for k, v in left.atoms.items()} == {
        k: v.exponent for k, v in right.atoms.items()
    }
    assert left.resume.hyper == right.resume.hyper
    assert set(left.twins) == set(right.twins)
    assert left.aliases == right.aliases


@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: f"{type(lens).__name__}")
def test_every_lens_is_undone_by_its_inverse(lens: Lens, build: Build, read: Read) -> None:
    view = build(state(SHAPES), {name: {"lr": 0.1, "betas": (0.9, 0.95)} for name in SHAPES})
    seen = apply(view, [lens])
    assert set(seen.atoms) != set(view.atoms) or any(
        a.pieces is not view.atoms[k].pieces or a.exponent for k, a in seen.atoms.items()
    )
    same(apply(seen, [lens.inverse()]), view, read)
    if type(lens) is not Merge:
        assert lens.inverse().inverse() == lens


@LAWS
@given(order=st.permutations(range(len(LENSES))))
def test_lenses_are_undone_in_the_other_order(order: list[int], build: Build, read: Read) -> None:
    view = build(state(SHAPES), {name: {"lr": 0.1} for name in SHAPES})
    used: list[Lens] = []
    seen = view
    for index in order:
        try:
            seen = apply(seen, [LENSES[index]])
        except CheckpointError:
            continue  # an earlier one has taken its parameters
        used.append(LENSES[index])
    assert used
    same(apply(seen, inverses(used)), view, read)


def test_scale_follows_the_gradients(build: Build) -> None:
    seen = apply(build(state({"w": (2, 2)})), [Scale("w", 3)])
    powers = {k: atom.exponent for k, atom in seen.atoms.items()}
    assert powers == {
        "model.w": 3,
        "optim.state.w.exp_avg": -3,
        "optim.state.w.exp_avg_sq": -6,
        "optim.state.w.step": 0,
        "extra.rng": 0,
    }
    assert seen.twins["model.w"].exponent == 3


def test_a_tied_weight_is_renamed_on_both_sides(build: Build) -> None:
    arrays = state({"embed.weight": (4, 2)})
    view = build(arrays, aliases={"head.weight": "embed.weight"})
    assert apply(view, [Rename("{m}.weight", "model.{m}.w")]).aliases == {
        "model.head.w": "model.embed.w"
    }
    assert apply(view, [Rename("head.weight", "lm_head.weight")]).aliases == {
        "lm_head.weight": "embed.weight"
    }
    with pytest.raises(
        CheckpointError, match="embed.weight cannot be rearranged: it is tied to head"
    ):
        apply(view, [Transpose("embed.weight")])


PAIR = {"g.w": (2, 3), "u.w": (2, 3)}
REFUSED: list[tuple[str, dict[str, tuple[int, ...]], dict[str, Any], Lens, str]] = [
    ("names", PAIR, {}, Rename("h.*", "i"), "changes nothing"),
    ("collision", PAIR, {}, Rename("{m}.w", "x.w"), "two parameters would be called x.w"),
    ("group", PAIR, {}, Rename("{m}.w", "{n}.w"), "names the group 'n'"),
    ("missing", {"g.w": (2, 3)}, {}, Merge(("g.w", "u.w"), "gu"), "nothing matches 'u.w'"),
    ("hyper", PAIR, {"g.w": {"lr": 1}, "u.w": {"lr": 2}}, Merge(("g.w", "u.w"), "gu"), "hyper"),
    ("shapes", {"g.w": (2, 3), "u.w": (2, 4)}, {}, Merge(("g.w", "u.w"), "gu"), "of \\[\\[2, 3\\]"),
    ("widths", {"g.w": (2, 3), "u.w": (4, 3)}, {}, Merge(("g.w", "u.w"), "gu"), "correct `parts`"),
    ("uneven", {"g.w": (5, 3)}, {}, Split("g.w", ("a", "b")), "5 is not made of \\[1, 1\\]"),
    ("scalar", {"g": ()}, {}, Split("g", ("a", "b")), "g cannot be cut along dimension 0"),
    ("hole", {"e.0": (2,), "e.2": (2,)}, {}, Stack("e.{i}", "e", "i"), "number 1 of it is missing"),
    ("words", {"e.a": (2,)}, {}, Stack("e.{i}", "e", "i"), "'i' counts nothing"),
    ("zeros", {"e.00": (2,)}, {}, Stack("e.{i}", "e", "i"), "'i' counts nothing"),
    ("ragged", {"e.0": (2,), "e.1": (3,)}, {}, Stack("e.{i}", "e", "i"), "cannot be stacked"),
    ("none", {"e": (0, 2)}, {}, Unstack("e", "e.{i}", "i"), "cannot be unstacked"),
    ("blocks", PAIR, {}, Permute("g.w", 0, (2, 0, 1)), "not made of 3 equal blocks"),
    ("rotary", PAIR, {}, Rotary("g.w", 3), "no 3 rotary heads"),
    ("order", PAIR, {}, Transpose("g.w", (2, 0, 1)), "cannot be transposed"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_what_a_lens_cannot_change_is_named(case: Any, build: Build) -> None:
    _, shapes, hyper, lens, message = case
    with pytest.raises(CheckpointError, match=message):
        apply(build(state(shapes), hyper), [lens])


def test_states_that_nobody_may_cut_are_refused(build: Build) -> None:
    view = build(state({"w": (4, 2)}), relations={"exp_avg": "opaque"})
    with pytest.raises(
        CheckpointError, match="w cannot be rearranged: its state 'exp_avg' is opaque"
    ):
        apply(view, [Split("w", ("a", "b"))])
    assert "model.v" in apply(view, [Rename("w", "v")]).atoms


def test_an_unknown_state_is_not_scaled(build: Build) -> None:
    arrays = {"w": {"": np.zeros((2, 2)), "curvature": np.zeros((2, 2))}}
    with pytest.raises(CheckpointError, match="its state 'curvature'"):
        apply(build(arrays), [Scale("w", 1)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Permute("x", 0, (0, 2)),
        lambda: Permute("x", 0, ()),
        lambda: Transpose("x", (0, 0)),
        lambda: QueryGroups("x", 4, 3),
        lambda: inverse(Rename("a.*", "b")),
        lambda: inverse(Rename("a.{n}", "b")),
        lambda: inverse(Rename(r"a.(?P<n>\d+)", "b.{n}", regex=True)),
    ],
)
def test_lenses_that_lose_something_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(CheckpointError):
        make()
