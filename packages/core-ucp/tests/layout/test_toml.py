"""Rules files: what they say, and the place of every mistake in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from core.errors import CheckpointError
from core_ucp.layout import toml
from core_ucp.layout.layouts import (
    Alias,
    Average,
    Chain,
    Expert,
    Fused,
    Gather,
    Owner,
    Pad,
    Refused,
    Replicate,
    Segment,
    Shard,
    StridedShard,
)
from core_ucp.layout.lenses import (
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
)
from core_ucp.layout.mesh import Mesh
from core_ucp.layout.rules import Rule, Rules

EVERYTHING = Rules(
    (
        Rule("a", Replicate()),
        Rule("b", Shard(0, "tp", (1, 2)), dtype=torch.float32),
        Rule("c", Chain((StridedShard(0, "dp", 2), Shard(0, "tp", "stored")))),
        Rule("d", Fused(1, "tp", (Segment(), Segment(4, "replicate"), Segment(2, sizes=(0, 2))))),
        Rule("e", Gather(0, "tp", ((0, 1), (1,)), 2), optional=True),
        Rule("f", Chain((Owner({"pp": (0, 1)}), Expert(0, "ep", ((1,), (0,)))))),
        Rule("g", Chain((Pad(0, size="stored", unpadded=50257), Shard(0, "tp", "stored")))),
        Rule("h", Pad(0, multiple=128, axis="tp", unpadded=50257), precedence=3),
        Rule("(?P<m>i)", Alias("{m}.j"), regex=True, paper="replicated_params"),
        Rule("j", Average("tp"), lenses=(Transpose("j"), Scale("j", -2))),
        Rule('k"\\\u007f\t✓', Refused("it is secret")),
    ),
    (
        Rename("{n**}", "m.{n}"),
        Split("q", ("a", "b"), 1, (2, 1)),
        Merge(("a", "b"), "q"),
        Stack("e.{i}", "e", "i", 1),
        Unstack("e", "e.{i}", "i"),
        Permute("x", 1, (1, 0), regex=True),
        QueryGroups("x", 4, 2, back=True),
        Rotary("x", 4),
        Transpose("x", (0, 2, 1)),
        Scale("x", 1),
    ),
    Mesh({"pp": 2, "tp": 2, "odd name": 1}, ("tp", "pp", "odd name")),
    lossy=True,
)


def test_everything_comes_back_from_toml_and_json(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(toml.dumps(EVERYTHING))
    (tmp_path / "rules.json").write_text(json.dumps(toml.table_of_rules(EVERYTHING)))
    assert toml.load(tmp_path / "rules.toml") == EVERYTHING
    assert toml.load(tmp_path / "rules.json") == EVERYTHING
    used = {
        type(step) for r in EVERYTHING.rules for step in getattr(r.layout, "layouts", [r.layout])
    }
    assert used == set(toml.LAYOUTS.values())
    assert {type(lens) for lens in EVERYTHING.lenses} == set(toml.LENSES.values())


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_name_comes_back(name: str) -> None:
    rules = Rules((Rule("x", Refused(name)),), mesh=Mesh({name: 1}))
    assert toml.loads(toml.dumps(rules)) == rules


def test_a_lens_of_a_rule_is_for_the_names_of_the_rule() -> None:
    text = """
        [[rule]]
        match = "l.{n}.qkv.{k}"
        layout = { kind = "fused", dim = 0, axis = "tp", segments = [{}, {}, {}] }
        lenses = [{ kind = "split", to = ["l.{n}.q.{k}", "l.{n}.k.{k}", "l.{n}.v.{k}"] }]
    """
    (rule,) = toml.loads(text).rules
    assert rule.lenses == (Split("l.{n}.qkv.{k}", ("l.{n}.q.{k}", "l.{n}.k.{k}", "l.{n}.v.{k}")),)


def layout(text: str) -> str:
    return f'[[rule]]\nmatch = "a"\nlayout = {text}'


MISTAKES = [
    ("x =", "r.toml is no valid TOML"),
    ("rules = 1", "r.toml has the key 'rules'; did you mean 'rule'?"),
    ("rule = 1", "r.toml: rule is 1: allowed is tables that begin with [[rule]]"),
    ("version = 2", "r.toml: version is 2: allowed is 1"),
    ("version = '1'", "r.toml: version is '1': allowed is a whole number"),
    ("lossy = 1", "r.toml: lossy is 1: allowed is true or false"),
    ("mesh = 1", "r.toml: mesh is 1: allowed is a table"),
    ("[mesh]\naxes = {tp = 0}", "r.toml: mesh: axis 'tp' of a mesh has 0 ranks"),
    ("[mesh]\naxes = {tp = 'x'}", "r.toml: mesh.axes.tp is 'x': allowed is a whole number"),
    ("[mesh]\naxes = {tp = 2}\norder = ['pp']", "does not name each axis of ['tp'] once"),
    ("[mesh]\nax = {}", "r.toml: mesh has the key 'ax'"),
    ("[[rule]]", "r.toml: rule[0] lacks 'match'"),
    ("[[rule]]\nmatch = 1", "r.toml: rule[0].match is 1: allowed is a text"),
    ("[[rule]]\nmatch = ''", "r.toml: rule[0]: a pattern of names is empty"),
    ("[[rule]]\nmatch = '('\nregex = true", "r.toml: rule[0]: '(' is no pattern of names"),
    ("[[rule]]\nmatch = 'a'\ndtype = 'fp3'", "rule[0].dtype is 'fp3': allowed is a dtype"),
    ("[[rule]]\nmatch = 'a'\nlens = 1", "rule[0] has the key 'lens'; did you mean 'lenses'?"),
    ("[[rule]]\nmatch = 'a'\nlenses = [1]", "r.toml: rule[0].lenses[0] is 1: allowed is a table"),
    (layout("1"), "r.toml: rule[0].layout is 1: allowed is a table"),
    (layout("{}"), "r.toml: rule[0].layout.kind is None: allowed is one of replicate, shard"),
    (layout("{kind = 'shrad'}"), "did you mean 'shard'?"),
    (layout("{kind = 'shard', dim = 0}"), "rule[0].layout lacks 'axis': Shard needs dim, axis"),
    (layout("{kind = 'shard', dim = 0.5, axis = 'tp'}"), "layout.dim is 0.5: allowed is a whole"),
    (layout("{kind = 'shard', dim = true, axis = 'tp'}"), "layout.dim is True: allowed is a whole"),
    (
        layout("{kind = 'shard', dim = 0, axis = 'tp', sizes = 'even'}"),
        "layout.sizes is 'even': allowed is 'ceil' or 'balanced' or 'stored' or a list",
    ),
    (
        layout("[{kind = 'replicate'}, {kind = 'shard', dim = 0, axis = 'tp', sizes = [1, 'x']}]"),
        "rule[0].layout[1].sizes[1] is 'x': allowed is a whole number",
    ),
    (
        layout("{kind = 'fused', dim = 0, axis = 'tp', segments = [{wdth = 1}]}"),
        "layout.segments[0] has the key 'wdth'; did you mean 'width'?",
    ),
    (layout("{kind = 'fused', dim = 0, axis = 'tp', segments = []}"), "has no segment"),
    (layout("{kind = 'gather', dim = 0, axis = 'tp', blocks = [[0], [2]]}"), "leaves out"),
    (layout("{kind = 'pad', dim = 0}"), "needs one of multiple and size"),
    (layout("{kind = 'owner', at = {pp = 'last'}}"), "layout.at.pp is 'last': allowed is a whole"),
    ("[[lens]]\nkind = 'split'\nmatch = 'a'", "r.toml: lens[0] lacks 'to': Split needs match, to"),
    ("[[lens]]\nkind = 'merge'\nmatch = 'a'\nto = 'b'", "lens[0].match is 'a': allowed is a list"),
    ("[[lens]]\nkind = 'permute'\nmatch = 'a'\ndim = 0\norder = [0, 0]", "each block once"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        toml.loads(text, "r.toml")
    assert message in str(caught.value)


def test_files_that_are_no_rules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        toml.load(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        toml.load(tmp_path / "bytes.toml")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="no valid JSON"):
        toml.load(tmp_path / "deep.json")
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(toml.LARGEST + 1)
    with pytest.raises(CheckpointError, match="is larger than"):
        toml.load(tmp_path / "large.toml")
