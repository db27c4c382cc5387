"""How Megatron's own GPT models lie over tensor-parallel ranks, by the names of parameters."""

from __future__ import annotations

from core_ucp.layout.fused import Fused, Segment
from core_ucp.layout.holders import Replicate
from core_ucp.layout.layout import Layout
from core_ucp.layout.rules import Rule, Rules
from core_ucp.layout.shards import Shard

AXIS = "tp"


def gpt_rules(gated: bool) -> Rules:
    """Rules for the names of Megatron-core, and for those from before.

    The rows of a fused qkv are grouped by query group, so a rank's part of them is contiguous.

    Args:
        gated: whether the first layer of an MLP holds a gate and a value, each cut on its own.
    """
    rows, columns = Shard(0, AXIS), Shard(1, AXIS)
    first: Layout = Fused(0, AXIS, (Segment(), Segment())) if gated else rows
    table: list[tuple[str, Layout]] = [
        ("**word_embeddings.weight", rows),
        ("**output_layer.{kind}", rows),
        ("**linear_qkv.weight", rows),
        ("**linear_qkv.bias", rows),
        ("**query_key_value.{kind}", rows),
        ("**linear_proj.weight", columns),
        ("**attention.dense.weight", columns),
        ("**linear_fc1.weight", first),
        ("**linear_fc1.bias", first),
        ("**dense_h_to_4h.{kind}", first),
        ("**linear_fc2.weight", columns),
        ("**dense_4h_to_h.weight", columns),
    ]
    rules = [Rule(match, layout, optional=True) for match, layout in table]
    rest = Rule("**", Replicate(), optional=True, precedence=1)
    return Rules((*rules, rest), origin="the rules of Megatron's GPT models")
