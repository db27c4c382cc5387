"""The paper's patterns, and the dictionaries in which DeepSpeed writes them."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import CheckpointError
from core_ucp.layout import patterns
from core_ucp.layout.layouts import (
    Average,
    Chain,
    Expert,
    Fused,
    Owner,
    Pad,
    Refused,
    Replicate,
    Segment,
    Shard,
)
from core_ucp.layout.mesh import Mesh
from core_ucp.layout.patterns import from_deepspeed

TP = Mesh({"tp": 2})
STORED = Segment(sizes="stored")


def test_every_pattern_of_the_paper_has_a_layout() -> None:
    assert patterns.unique_params() == Replicate()
    assert patterns.unique_params({"pp": 1}) == Owner({"pp": 1})
    assert patterns.replicated_params() == Replicate()
    assert patterns.fragment_params(1) == Shard(1, "tp", "stored")
    assert patterns.fragment_params(0, sizes=(3, 2)) == Shard(0, "tp", (3, 2))
    assert patterns.fused_halves() == Fused(0, "tp", (STORED, STORED))
    assert patterns.fused_params((4, 1)) == Fused(0, "tp", (Segment(4), Segment(1)))
    assert patterns.fused_params((4, 1), shares=((3, 1), (1, 0))) == Fused(
        0, "tp", (Segment(4, sizes=(3, 1)), Segment(1, sizes=(1, 0)))
    )
    assert patterns.expert_params() == Expert(0, "ep")
    assert patterns.expert_params(inside=Shard(2, "tp")) == Chain((Expert(0, "ep"), Shard(2, "tp")))
    assert patterns.params_to_average() == Average("tp")
    assert patterns.vocabulary_params(50257) == Chain(
        (Pad(0, size="stored", unpadded=50257), Shard(0, "tp", "stored"))
    )


AUTOTP: dict[str, Any] = {
    "universal_checkpoint_version": 0.4,
    "parameter_with_row_parallelism_patterns": [r"^l\.0\.o\.weight$"],
    "tp_replicated_parameter_patterns": [r"^norm\.weight$"],
    "vocabulary_parameter_patterns": [r"^embed\.weight$"],
    "original_vocab_size": 11,
    "parameter_with_sub_params": [
        {"patterns": [r"^l\.0\.qkv\.weight$"], "shape": [(5, 2, 2), -1], "partition_dim": 0}
    ],
    "sub_param_shard_widths": {r"^l\.0\.qkv\.weight$": [[3, 2], [1, 1], [1, 1]]},
    "autotp_unsupported_parameter_patterns": {r"^odd\.weight$": "a layer of its own"},
}


def test_patterns_of_autotp() -> None:
    rules = from_deepspeed(AUTOTP, TP)
    names = ["l.0.o.weight", "norm.weight", "embed.weight", "l.0.qkv.weight", "l.0.up.weight"]
    found = {name: rule.layout for name, rule in rules.assign(names).items()}
    assert found == {
        "l.0.o.weight": Shard(1, "tp", "stored"),
        "norm.weight": Replicate(),
        "embed.weight": patterns.vocabulary_params(11),
        "l.0.qkv.weight": patterns.fused_params((5, 2, 2), shares=((3, 2), (1, 1), (1, 1))),
        "l.0.up.weight": Shard(0, "tp", "stored"),
    }
    assert rules.find("odd.weight").layout == Refused("a layer of its own")
    assert rules.mesh == TP
    with pytest.raises(CheckpointError, match="'norm.weight' of the patterns of DeepSpeed counts"):
        rules.assign(names[:1] + names[2:])


MEGATRON: dict[str, Any] = {
    "universal_checkpoint_version": 0.2,
    "tp_replicated_parameter_patterns": [r"\d+.norm.weight", r"\d+.o.bias"],
    "parameter_to_average_patterns": [r"\d+.seq_norm"],
    "parameter_with_row_parallelism_patterns": [r"\d+.o.weight", r"\d+.down"],
    "vocabulary_parameter_patterns": [r"\d+.word_embeddings.weight", "tied"],
    "original_vocab_size": 11,
    "parameter_with_2_sub_params_cat_dim_0": [r"\d+.up.weight"],
    "parameter_with_sub_params": [
        {"patterns": [r"\d+.qkv.weight"], "shape": ((4, 2, 2), 8), "partition_dim": 0},
        {"patterns": [r"\d+.three"], "shape": (3, -1), "partition_dim": 0},
    ],
    "expert_parameter_patterns": [r".*\.experts\.w[123]$"],
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("3.norm.weight", Replicate()),
        ("3.norm.weight_of_something_longer", Replicate()),
        ("3.o.weight", Shard(1, "tp", "stored")),
        ("3.o.bias", Replicate()),
        ("1.word_embeddings.weight", patterns.vocabulary_params(11)),
        ("3.up.weight", Fused(0, "tp", (STORED, STORED))),
        ("3.qkv.weight", Fused(0, "tp", (Segment(4), Segment(2), Segment(2)))),
        ("3.three", Fused(0, "tp", (STORED,) * 3)),
        ("anything.else", Shard(0, "tp", "stored")),
        ("x.3.norm.weight", Shard(0, "tp", "stored")),
    ],
)
def test_patterns_of_megatron_deepspeed(name: str, layout: object) -> None:
    assert from_deepspeed(MEGATRON, TP).find(name).layout == layout


def test_averages_of_deepspeed_need_permission() -> None:
    with pytest.raises(CheckpointError, match="3.seq_norm would be averaged"):
        from_deepspeed(MEGATRON, TP).find("3.seq_norm")
    assert from_deepspeed(MEGATRON, TP, lossy=True).find("3.seq_norm").layout == Average("tp")


def test_experts_need_an_axis_of_their_own() -> None:
    mesh = Mesh({"ep": 2, "tp": 1})
    assert from_deepspeed(MEGATRON, mesh).find("l.experts.w1").layout == Expert(0, "ep")


def test_a_vocabulary_that_another_list_names_too_is_both() -> None:
    info = {**MEGATRON, "tp_replicated_parameter_patterns": ["tied.embed", "norm"]}
    rules = from_deepspeed(info, TP)
    assert rules.find("tied.embed.weight").layout == Chain(
        (Pad(0, size="stored", unpadded=11), Replicate())
    )
    assert rules.find("tied.other.weight").layout == patterns.vocabulary_params(11)
    assert rules.find("norm").layout == Replicate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"original_vocab_size": None}, "original_vocab_size of DeepSpeed is None"),
        ({"sub_param_shard_widths": {}}, "records no sub_param_shard_widths"),
        (
            {"sub_param_shard_widths": {r"^l\.0\.qkv\.weight$": [[3, 2], [1, 1]]}},
            "they should be those of 2 ranks",
        ),
        (
            {"sub_param_shard_widths": {r"^l\.0\.qkv\.weight$": [[5], [2], [2]]}},
            "they should be those of 2 ranks",
        ),
        ({"universal_checkpoint_version": 0.3}, "5 wide, which 2 ranks do not share"),
        ({"parameter_with_sub_params": [{"patterns": ["x"]}]}, "cannot be read"),
        ({"parameter_with_sub_params": 3}, "it is no list"),
        ({"parameter_with_sub_params": [3]}, "cannot be read"),
        (
            {
                "parameter_with_sub_params": [
                    {"patterns": ["x"], "shape": ("a",), "partition_dim": 0}
                ]
            },
            "cannot be read",
        ),
        (
            {"sub_param_shard_widths": {r"^l\.0\.qkv\.weight$": [["a", 2], [1, 1], [1, 1]]}},
            "they should be those of 2 ranks",
        ),
        ({"sub_param_shard_widths": [1]}, "it should be a dictionary"),
        ({"universal_checkpoint_version": "new"}, "it should be a number"),
        ({"tp_replicated_parameter_patterns": "x"}, "it should be a list of texts"),
        ({"tp_replicated_parameter_patterns": ["("]}, "is no pattern of names"),
    ],
)
def test_a_dictionary_that_contradicts_itself_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_deepspeed({**AUTOTP, **change}, TP).find("x")
