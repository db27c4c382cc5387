"""Every example of the page on layouts works, and its tables name everything there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from core_ucp.layout import patterns, toml
from core_ucp.layout.layouts import Chain, Expert, Fused, Replicate, Shard
from core_ucp.layout.lenses import Rename, inverse

PAGE = Path(__file__).parents[4] / "docs" / "ucp-layouts.md"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_rules_of_a_model_are_complete(page: str) -> None:
    rules = toml.loads(blocks(page, "toml")[0], PAGE.name)
    names = ["embed.weight", "lm_head.weight"]
    for n in range(2):
        inside = ["attn.qkv.weight", "attn.qkv.bias", "attn.out.weight", "mlp.gate_up.weight"]
        inside += ["mlp.down.weight", "input_norm.weight", "post_norm.weight"]
        names += [f"layers.{n}.{name}" for name in inside]
    found = rules.assign(names)
    assert isinstance(found["layers.0.attn.qkv.bias"].layout, Fused)
    assert found["layers.1.mlp.down.weight"].layout == Shard(1, "tp")
    assert found["layers.1.post_norm.weight"].layout == Replicate()
    assert rules.mesh is not None
    whole, at = (50257, 8), rules.mesh.at(pp=1, tp=1)
    placed = found["embed.weight"].layout.place(whole, rules.mesh, at)
    assert placed.shape == (25216, 8)
    assert placed.boxes.size.tolist() == [[50257 - 25216, 8]]


def test_experts_and_lenses_are_what_the_text_says(page: str) -> None:
    _, experts, lenses = blocks(page, "toml")
    layout = toml.loads(experts).find("layers.3.moe.w1").layout
    placed = Expert(0, "ep", ((0, 3), (2, 1))), Shard(2, "tp", "balanced")
    assert layout == Chain(placed)
    seen = toml.loads(lenses).lenses
    assert isinstance(seen[-1], Rename)
    assert all(inverse(inverse(lens)) == lens for lens in seen)


def test_the_python_example_prints_what_it_says(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks(page, "python")
    exec(compile(code, PAGE.name, "exec"), {})
    expected = re.findall(r"# (.+)", code)
    assert capsys.readouterr().out.splitlines() == expected


def test_the_tables_name_every_kind_and_pattern(page: str) -> None:
    assert all(f'kind = "{kind}"' in page for kind in toml.LAYOUTS)
    assert all(f"`{kind}`" in page for kind in toml.LENSES)
    functions = [
        name
        for name, value in vars(patterns).items()
        if getattr(value, "__module__", "") == patterns.__name__
    ]
    assert len(functions) == 8
    assert all(name in page for name in functions)
    for paper in ("unique_params", "replicated_params", "fragment_params", "params_to_average"):
        assert f"| `{paper}`" in page
