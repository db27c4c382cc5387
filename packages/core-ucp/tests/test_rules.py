"""Rules of a file or a plugin, from the command line to the bits of the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import core as host
from core.discovery import plugins_from
from core_ucp.plugin import Plugin

Core = Callable[..., Any]
HEADS, GROUPS, WIDTH = 4, 2, 8

FUSED = """
[[lens]]
kind = "merge"
match = [
  "model.layers.{n}.self_attn.q_proj.weight",
  "model.layers.{n}.self_attn.k_proj.weight",
  "model.layers.{n}.self_attn.v_proj.weight",
]
to = "decoder.layers.{n}.self_attention.linear_qkv.weight"
parts = [4, 2, 2]

[[lens]]
kind = "query-groups"
match = "decoder.layers.{n}.self_attention.linear_qkv.weight"
heads = 4
groups = 2

[[lens]]
kind = "merge"
match = ["model.layers.{n}.mlp.gate_proj.weight", "model.layers.{n}.mlp.up_proj.weight"]
to = "decoder.layers.{n}.mlp.linear_fc1.weight"
"""
APART = """
[[lens]]
kind = "query-groups"
match = "decoder.layers.{n}.self_attention.linear_qkv.weight"
heads = 4
groups = 2
back = true

[[lens]]
kind = "split"
match = "decoder.layers.{n}.self_attention.linear_qkv.weight"
to = [
  "model.layers.{n}.self_attn.q_proj.weight",
  "model.layers.{n}.self_attn.k_proj.weight",
  "model.layers.{n}.self_attn.v_proj.weight",
]
parts = [4, 2, 2]

[[lens]]
kind = "split"
match = "decoder.layers.{n}.mlp.linear_fc1.weight"
to = ["model.layers.{n}.mlp.gate_proj.weight", "model.layers.{n}.mlp.up_proj.weight"]
"""


def rules(folder: Path, text: str) -> Path:
    path = folder / "rules.toml"
    path.write_text(text)
    return path


def converted(core: Core, source: Path, target: Path, to: str, *words: object) -> Path:
    said = core("convert", source, target, "--to", to, *words)
    assert said.code == 0, said
    return target


def manifest(folder: Path) -> Any:
    return json.loads((folder / "ucp.json").read_text())


@pytest.fixture(name="llama", scope="module")
def _llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``save_pretrained`` of a model with grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=HEADS * WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("llama") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_weights_are_fused_and_come_apart_bit_for_bit(
    core: Core, llama: Path, tmp_path: Path
) -> None:
    words = "--rules", rules(tmp_path, FUSED)
    middle = converted(core, llama, tmp_path / "fused", "universal", *words)
    before, fused = load_file(llama / "model.safetensors"), {}
    for path in middle.glob("*.safetensors"):
        fused |= load_file(path)
    # One query group of Megatron: its queries, then its key, then its value.
    head = "model.layers.1.self_attn"
    query, key, value = (before[f"{head}.{x}_proj.weight"].split(WIDTH) for x in "qkv")
    expected = torch.cat([*query[:2], key[0], value[0], *query[2:], key[1], value[1]])
    assert torch.equal(fused["model.decoder.layers.1.self_attention.linear_qkv.weight"], expected)
    assert not any("q_proj" in name or "gate_proj" in name for name in fused)

    words = "--rules", rules(tmp_path, APART), "--set", f"ucp.config={llama}"
    back = converted(core, middle, tmp_path / "back", "huggingface", *words)
    after = load_file(back / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model = LlamaForCausalLM.from_pretrained(back)
    assert torch.equal(model.state_dict()[f"{head}.q_proj.weight"], torch.cat(query))
    assert manifest(middle)["lossy"] == []


def test_states_and_hyper_parameters_follow_their_weights(
    core: Core, saved: Any, tmp_path: Path
) -> None:
    path = rules(tmp_path, "[[lens]]\nkind = 'rename'\nmatch = '0.{x}'\nto = 'first.{x}'\n")
    target = converted(core, saved.full, tmp_path / "out", "universal", "--rules", path)
    found = manifest(target)
    assert "optim.state.first.weight.exp_avg" in found["atoms"]
    assert not any(".0." in key for key in found["atoms"])
    hyper = json.dumps(found["resume"]["hyper"])
    assert "first.weight" in hyper
    assert "0.weight" not in hyper


# Rounding


DTYPE = '[[rule]]\nmatch = "0.{x}"\ndtype = "bfloat16"\n\n[[rule]]\nmatch = "1.{x}"\n'


def test_rounding_is_done_and_recorded(core: Core, saved: Any, tmp_path: Path) -> None:
    words = "--rules", rules(tmp_path, DTYPE)
    target = converted(core, saved.full, tmp_path / "out", "universal", *words)
    found: dict[str, torch.Tensor] = {}
    for path in target.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == saved.truth.keys()
    for key, tensor in saved.truth.items():
        rounded = tensor.bfloat16() if key.startswith("model.0.") else tensor
        assert found[key].dtype == rounded.dtype, key
        assert torch.equal(found[key], rounded), key
    assert manifest(target)["lossy"] == [
        "model.0.weight is rounded to torch.bfloat16",
        "model.0.bias is rounded to torch.bfloat16",
    ]
    assert core("ucp", "verify", target).code == 0
    # What was lost once stays said.
    again = converted(core, target, tmp_path / "again", "universal")
    assert manifest(again)["lossy"] == manifest(target)["lossy"]


def test_whole_numbers_are_not_rounded(core: Core, tmp_path: Path) -> None:
    torch.save({"count": torch.tensor([1, 2])}, tmp_path / "in.pt")
    path = rules(tmp_path, '[[rule]]\nmatch = "count"\ndtype = "float32"\n')
    words = "--to", "universal", "--rules", path
    said = core("convert", tmp_path / "in.pt", tmp_path / "out", *words)
    assert "the rule 'count' wants model.count as torch.float32: it is torch.int64" in said.error


# Copies that differ


def ranks(folder: Path, apart: float) -> Path:
    """What two tensor-parallel ranks of Megatron save; their norms are ``apart``."""
    for rank in range(2):
        path = folder / "iter_0000001" / f"mp_rank_{rank:02}"
        path.mkdir(parents=True)
        model = {
            "decoder.final_layernorm.weight": torch.arange(4.0) + rank * apart,
            "decoder.layers.0.mlp.linear_fc2.weight": torch.full((4, 3), float(rank)),
        }
        torch.save({"model": model, "iteration": 1}, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    return folder


AVERAGE = """
{lossy}
[[rule]]
match = "decoder.final_layernorm.weight"
layout = {{ kind = "average", axis = "tp" }}

[[rule]]
match = "**.linear_fc2.weight"
layout = {{ kind = "shard", dim = 1, axis = "tp" }}
"""


def test_an_average_is_refused_without_permission(core: Core, tmp_path: Path) -> None:
    source = ranks(tmp_path / "in", apart=1.0)
    words = "--to", "universal", "--rules", rules(tmp_path, AVERAGE.format(lossy=""))
    said = core("convert", source, tmp_path / "out", *words).error
    assert "decoder.final_layernorm.weight would be averaged" in said
    assert "lossy = true" in said
    assert not (tmp_path / "out").exists()


def test_an_average_with_permission_is_the_mean_and_recorded(core: Core, tmp_path: Path) -> None:
    source = ranks(tmp_path / "in", apart=1.0)
    words = "--rules", rules(tmp_path, AVERAGE.format(lossy="lossy = true"))
    target = converted(core, source, tmp_path / "out", "universal", *words)
    (path,) = target.glob("model*.safetensors")
    found = load_file(path)
    assert torch.equal(found["model.decoder.final_layernorm.weight"], torch.arange(4.0) + 0.5)
    halves = found["model.decoder.layers.0.mlp.linear_fc2.weight"]
    assert torch.equal(halves, torch.tensor([0.0, 0, 0, 1, 1, 1]).repeat(4, 1))
    key = "model.decoder.final_layernorm.weight"
    assert manifest(target)["lossy"] == [f"{key} is the mean of its copies"]
    assert core("ucp", "verify", target).code == 0


def test_copies_that_should_be_equal_and_are_not_are_refused(core: Core, tmp_path: Path) -> None:
    source = ranks(tmp_path / "in", apart=1.0)
    said = core("convert", source, tmp_path / "out", "--to", "universal").error
    assert "the copies of model.decoder.final_layernorm.weight differ" in said
    assert "mp_rank_01" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    same = ranks(tmp_path / "same", apart=0.0)
    assert core("convert", same, tmp_path / "out", "--to", "universal").code == 0


# Mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules = 1", "has the key 'rules'; did you mean 'rule'?: allowed are"),
        ("[[rule]]\nmatch = '**'\nlayout = {kind = 'shrad'}", "kind is 'shrad': allowed is one of"),
        ("[[rule]]\nmatch = '**'\ndtype = 'fp3'", "rule[0].dtype is 'fp3': allowed is a dtype"),
        ("[[rule]]\nmatch = '0.{x}'", "is for 1.weight: the closest rule is '0.{x}'"),
        (
            "[[rule]]\nmatch = '0.weigth'\n[[rule]]\nmatch = '**'\nprecedence = 1",
            "counts for no parameter: the closest name is '0.weight'",
        ),
        ("[[lens]]\nkind = 'transpose'\nmatch = '2.weight'", "no parameter has such a name"),
    ],
)
def test_a_mistake_is_named_with_its_place(
    core: Core, saved: Any, tmp_path: Path, text: str, message: str
) -> None:
    path = rules(tmp_path, text)
    commands = [
        ("convert", saved.full, tmp_path / "out", "--to", "universal"),
        ("convert", saved.full, tmp_path / "out", "--to", "dcp"),
        ("ucp", "inspect", saved.full),
    ]
    for command in commands:
        assert message in core(*command, "--rules", path).error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["dcp", "safetensors"])
def test_rules_that_a_reader_of_core_would_ignore_are_refused(
    core: Core, saved: Any, tmp_path: Path, to: str
) -> None:
    path = rules(tmp_path, DTYPE)
    words = "--from", "dcp", "--to", to, "--rules", path
    said = core("convert", saved.dcp, tmp_path / "out", *words).error
    assert f"the rules '{path}' would be ignored" in said
    assert "read as dcp" in said


# Rules of a plugin


def tables() -> Mapping[str, Any]:
    return {"lens": [{"kind": "rename", "match": "{n**}", "to": "mine.{n}"}]}


class Models(host.Hooks):
    """A package of models that knows how its parameters are called elsewhere."""

    @host.hookimpl
    def core_models(self) -> Iterator[host.ParameterRules]:
        yield host.ParameterRules(name="renamed", summary="Renames.", tables=tables)


def bring(monkeypatch: pytest.MonkeyPatch, **plugins: object) -> None:
    """Let the command line find these plugins, and no others."""
    found = plugins_from({"ucp": Plugin(), **plugins})

    def discovered(**options: object) -> object:
        return found

    monkeypatch.setattr("core.cli.discover", discovered)
    monkeypatch.setattr("core.cli.options.discover", discovered)


@pytest.mark.parametrize("name", ["renamed", "models.renamed"])
def test_rules_of_a_plugin_are_found_by_name(
    core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bring(monkeypatch, models=Models())
    (tmp_path / "in").mkdir()
    save_file({"w": torch.arange(3.0)}, tmp_path / "in" / "model.safetensors")
    words = "--rules", name
    target = converted(core, tmp_path / "in", tmp_path / "out", "universal", *words)
    assert list(manifest(target)["atoms"]) == ["model.mine.w"]
    found = core("ucp", "inspect", tmp_path / "in", *words, "--json").json
    assert [row["key"] for row in found["tensors"]] == ["model.mine.w"]
    assert core("ucp", "diff", tmp_path / "in", target, *words).code == 0


def test_rules_that_nobody_or_two_bring(
    core: Core, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(monkeypatch, models=Models(), others=Models())
    words = "convert", saved.full, tmp_path / "out", "--to", "universal", "--rules"
    said = core(*words, "renmed").error
    assert "there are no rules 'renmed': it is no file, and plugins bring" in said
    assert "did you mean 'renamed'?" in said
    two = core(*words, "renamed").error
    assert "the rules 'renamed' are brought by models.renamed and others.renamed" in two
    assert core(*words, "others.renamed").code == 0
