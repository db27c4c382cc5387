"""Parts of tensor-parallel ranks that are themselves cut by ZeRO, for all patterns of DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from core.errors import CheckpointError
from core_ucp.layout.holders import Average
from core_ucp.layout.rules import Rule, Rules
from core_ucp.sources.deepspeed import open_view
from core_ucp.sources.registry import open_checkpoint

INFO = {
    "universal_checkpoint_version": 0.4,
    "tp_replicated_parameter_patterns": [r".*norm\.weight$"],
    "parameter_with_row_parallelism_patterns": [r".*down\.weight$"],
    "parameter_with_2_sub_params_cat_dim_0": [r".*gate_up\.weight$"],
    "vocabulary_parameter_patterns": [r"embed\.weight$"],
    "original_vocab_size": 11,
}


def sizes_of(total: int, ranks: int) -> list[int]:
    """A balanced split: the first ranks have one more."""
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def cut(name: str, whole: Tensor, ranks: int) -> list[Tensor]:
    """What every rank holds of a parameter."""
    if "norm" in name:
        return [whole] * ranks
    if "gate_up" in name:
        halves = [half.split(sizes_of(len(half), ranks)) for half in whole.chunk(2)]
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]
    if "embed" in name:
        padded = torch.cat([whole, torch.zeros(-len(whole) % ranks, *whole.shape[1:])])
        return list(padded.chunk(ranks))
    dim = 1 if "down" in name else 0
    return list(whole.split(sizes_of(whole.shape[dim], ranks), dim))


@settings(max_examples=30, deadline=None)
@given(
    tp=st.integers(1, 4),
    dp=st.integers(1, 3),
    width=st.integers(4, 9),
    stage=st.sampled_from([1, 3]),
)
def test_all_patterns(
    tp: int,
    dp: int,
    width: int,
    stage: int,
    writer: Any,
    values: Callable[..., dict[str, Tensor]],
    read: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    whole = {
        "embed.weight": values(11, 3),
        "norm.weight": values(5),
        "up.weight": values(width, 5, seed=1),
        "up.bias": values(width, seed=2),
        "down.weight": values(5, width, seed=3),
        "gate_up.weight": values(2 * width, 3, seed=4),
    }
    made = writer(tmp_path_factory.mktemp("tp"), dp, tp)
    for rank in range(tp):
        parts = {
            name: {state: cut(name, value, tp)[rank] for state, value in states.items()}
            for name, states in whole.items()
        }
        degrees = {"pp_degree": 1, "tp_degree": tp}
        more = {"universal_checkpoint_info": INFO, "checkpoint_parallel_dimensions": degrees}
        if stage == 1:
            made.model(rank, [parts], **more)
            made.zero12([parts], rank)
        else:
            made.zero3([parts], rank, **more)
    view = open_view(made.path)
    view.prove()
    for name, states in whole.items():
        if tp == 1 and name == "embed.weight":
            continue
        for state, value in states.items():
            key = f"optim.state.{name}.{state}" if state else f"model.{name}"
            assert torch.equal(read(view, key), value), key
    if tp > 1:
        assert view.atoms["model.norm.weight"].replicas is not None
        assert view.mesh == {"dp": dp, "tp": tp}


def test_averages_are_refused(
    writer: Any, values: Callable[..., dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = writer(tmp_path_factory.mktemp("mean"), 1, 2)
    info = {"parameter_to_average_patterns": ["^w$"]}
    degrees = {"pp_degree": 1, "tp_degree": 2}
    for rank in range(2):
        parts = {"w": values(4, seed=rank)}
        made.model(
            rank,
            [parts],
            universal_checkpoint_info=info,
            checkpoint_parallel_dimensions=degrees,
        )
        made.zero12([parts], rank)
    with pytest.raises(CheckpointError, match="w would be averaged"):
        open_view(made.path)


def test_averages_are_made_with_permission(
    writer: Any,
    values: Callable[..., dict[str, Tensor]],
    read: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = writer(tmp_path_factory.mktemp("mean"), 2, 2)
    degrees = {"pp_degree": 1, "tp_degree": 2}
    both = [values(5, seed=rank) for rank in range(2)]
    for rank, parts in enumerate(both):
        made.model(rank, [{"w": parts}], checkpoint_parallel_dimensions=degrees)
        made.zero12([{"w": parts}], rank)
    rules = Rules((Rule("w", Average("tp")),), lossy=True)
    view = open_checkpoint(made.path, "deepspeed", rules)
    view.prove()
    for state in ("", "exp_avg"):
        key = f"optim.state.w.{state}" if state else "model.w"
        mean = (both[0][state].double() + both[1][state].double()) / 2
        assert torch.equal(read(view, key), mean.float()), key
        assert f"{key} is the mean of its copies" in view.lossy


def test_pipelines_of_tensor_parallel_stages(
    writer: Any,
    values: Callable[..., dict[str, Tensor]],
    read: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    embed = values(6, 4)
    stages = [
        {"tied_modules.embed.weight": embed, "1.up.weight": values(5, 4, seed=1)},
        {"tied_modules.embed.weight": embed, "2.down.weight": values(4, 7, seed=2)},
    ]
    made = writer(tmp_path_factory.mktemp("pp"), 2, 4)
    info = {"parameter_with_row_parallelism_patterns": [r"\d+\.down\.weight$"]}
    degrees = {"pp_degree": 2, "tp_degree": 2}
    more = {"universal_checkpoint_info": info, "checkpoint_parallel_dimensions": degrees}
    for pp, whole in enumerate(stages):
        for tp in range(2):
            parts = {
                name: {state: cut(name, value, 2)[tp] for state, value in states.items()}
                if "tied" not in name
                else {state: value.chunk(2)[tp] for state, value in states.items()}
                for name, states in whole.items()
            }
            made.model(2 * pp + tp, [parts], **more, module=None)
            made.zero12([parts], 2 * pp + tp)
            for name, states in parts.items():
                layer = 0 if "tied" in name else int(name[0])
                local = "weight" if "tied" in name else name.partition(".")[2]
                file = made.path / f"layer_{layer:02d}-model_{tp:02d}-model_states.pt"
                torch.save({local: states[""].bfloat16()}, file)
    view = open_view(made.path)
    view.prove()
    assert view.mesh == {"pp": 2, "dp": 2, "tp": 2}
    for whole in stages:
        for name, states in whole.items():
            assert torch.equal(read(view, f"model.{name}"), states[""])
            assert torch.equal(read(view, f"optim.state.{name}.exp_avg"), states["exp_avg"])
            assert f"model.{name}" in view.twins
    assert view.atoms["model.tied_modules.embed.weight"].replicas is not None
    assert len(view.atoms) == 9
