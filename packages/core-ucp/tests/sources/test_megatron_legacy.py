"""``mp_rank`` files of Megatron: tensor, pipeline and expert parallel parts come together."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError
from core_ucp.sources.megatron import detect, open_view
from core_ucp.view.view import View

SameBits = Callable[[View, Mapping[str, torch.Tensor]], None]
HIDDEN, INNER, VOCABULARY, PADDED, LAYERS = 4, 6, 10, 12, 4


def whole(experts: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a model with four layers."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (PADDED, HIDDEN)}
    for layer in range(LAYERS):
        head = f"decoder.layers.{layer}"
        shapes[f"{head}.self_attention.linear_qkv.weight"] = (3 * HIDDEN, HIDDEN)
        shapes[f"{head}.self_attention.linear_qkv.bias"] = (3 * HIDDEN,)
        shapes[f"{head}.self_attention.linear_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{head}.input_layernorm.weight"] = (HIDDEN,)
        mlps = [f"{head}.mlp"]
        if experts:
            mlps = [f"{head}.mlp.experts.local_experts.{index}" for index in range(experts)]
        for mlp in mlps:
            shapes[f"{mlp}.linear_fc1.weight"] = (2 * INNER, HIDDEN)
            shapes[f"{mlp}.linear_fc2.weight"] = (HIDDEN, INNER)
    shapes["decoder.final_layernorm.weight"] = (HIDDEN,)
    return {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}


def part(name: str, tensor: torch.Tensor, tp: int, ranks: int) -> torch.Tensor:
    """What a tensor-parallel rank holds, as Megatron's layers cut their weights."""
    if "linear_fc1" in name:
        return torch.cat([half.chunk(ranks)[tp] for half in tensor.chunk(2)])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(ranks, 1)[tp].contiguous()
    return tensor if "layernorm" in name else tensor.chunk(ranks)[tp].clone()


def local(name: str, stage: int, stages: int, ep: int, eps: int, experts: int) -> str | None:
    """Name of a parameter in the file of a rank, if it is there."""
    words = name.split(".")
    if "layers" in words:
        each = LAYERS // stages
        index = int(words[2])
        if index // each != stage:
            return None
        words[2] = str(index % each)
    elif stage != (0 if words[0] == "embedding" else stages - 1):
        return None
    if "local_experts" in words:
        each, place = experts // eps, words.index("local_experts") + 1
        if int(words[place]) // each != ep:
            return None
        words[place] = str(int(words[place]) % each)
    return ".".join(words)


def optimizer_of(model: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The state of Megatron's optimizer with masters in full precision."""
    matrices = [name for name, tensor in model.items() if tensor.dim() > 1]
    vectors = [name for name, tensor in model.items() if tensor.dim() == 1]
    order = [*matrices, *vectors]
    numbers = {name: index for index, name in enumerate(order)}
    groups = [
        {"params": [numbers[n] for n in names], "lr": 0.1, "wd_mult": wd, "step": 3}
        for names, wd in ((matrices, 1.0), (vectors, 0.0))
    ]
    states = {numbers[n]: {"exp_avg": t.float() * 2} for n, t in model.items()}
    masters = [[model[name].float() for name in names] for names in (matrices, vectors)]
    inner = {"state": states, "param_groups": groups}
    return {"optimizer": inner, "fp32_from_fp16_params": masters}


def written(folder: Path, tp: int, pp: int, ep: int = 1, experts: int = 0) -> Path:
    """One iteration as Megatron's ``torch`` format leaves it."""
    args = argparse.Namespace(
        swiglu=True,
        vocab_size=VOCABULARY,
        padded_vocab_size=PADDED,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
    )
    for stage in range(pp):
        for expert in range(ep):
            for rank in range(tp):
                model = {
                    name: part(key, tensor, rank, tp)
                    for key, tensor in whole(experts).items()
                    if (name := local(key, stage, pp, expert, ep, experts)) is not None
                }
                name = f"mp_rank_{rank:02}"
                name += f"_{stage:03}" if pp > 1 else ""
                name += f"_{expert:03}" if ep > 1 else ""
                path = folder / "iter_0000003" / name
                path.mkdir(parents=True)
                state = {"args": args, "iteration": 3, "model": model}
                state["optimizer"] = optimizer_of(model)
                torch.save(state, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return folder


def expected(experts: int = 0) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, tensor in whole(experts).items():
        kept = tensor[:VOCABULARY] if "word_embeddings" in name else tensor
        found[f"model.{name}"] = kept.float()
        found[f"optim.state.{name}.exp_avg"] = kept.float() * 2
        found[f"optim.state.{name}.step"] = torch.tensor(3.0)
    return found


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_every_bit_is_found(tp: int, pp: int, tmp_path: Path, same_bits: SameBits) -> None:
    written(tmp_path, tp, pp)
    assert detect(tmp_path)
    view = open_view(tmp_path)
    same_bits(view, expected())
    assert view.mesh == {"tp": tp, "pp": pp}
    assert view.resume.step == 3
    assert view.twins.keys() == {f"model.{name}" for name in whole()}


def test_experts_of_several_ranks(tmp_path: Path, same_bits: SameBits) -> None:
    view = open_view(written(tmp_path, 2, 2, 2, experts=4))
    same_bits(view, expected(experts=4))
    norm = view.atoms["model.decoder.final_layernorm.weight"]
    assert norm.replicas is not None
    assert len(norm.replicas) == 3


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path, 2, 2)
    gone = folder / "iter_0000003" / "mp_rank_01_001"
    (gone / "model_optim_rng.pt").rename(tmp_path / "elsewhere.pt")
    gone.rmdir()
    with pytest.raises(CheckpointError, match="tp=1 pp=1 ep=0"):
        open_view(folder)


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path, 2, 1)
    path = folder / "iter_0000003" / "mp_rank_01" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    state["model"][name] = state["model"][name][:2].clone()
    del state["optimizer"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=name):
        open_view(folder)


def test_interleaved_stages_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00"
    path.mkdir()
    torch.save({"model0": {}, "model1": {}}, path / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match="interleaved"):
        open_view(tmp_path)


def test_the_distributed_optimizer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00"
    path.mkdir()
    state = {
        "model": {"w": torch.ones(2)},
        "optimizer": {"optimizer": {"param_groups": [{"params": [0]}]}},
    }
    torch.save(state, path / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match="distributed optimizer") as caught:
        open_view(tmp_path)
    assert "torch_dist" in caught.value.fix


def test_the_copy_of_the_embedding_in_the_last_stage_is_an_alias(tmp_path: Path) -> None:
    for stage, model in enumerate(
        (
            {"embedding.word_embeddings.weight": torch.ones(4, 2)},
            {
                "output_layer.weight": torch.ones(4, 2),
                "decoder.final_layernorm.weight": torch.ones(2),
            },
        )
    ):
        path = tmp_path / f"mp_rank_00_{stage:03}"
        path.mkdir()
        torch.save({"model": model}, path / "model_optim_rng.pt")
    view = open_view(tmp_path)
    assert view.aliases == {"output_layer.weight": "embedding.word_embeddings.weight"}
    assert "model.output_layer.weight" not in view.atoms
