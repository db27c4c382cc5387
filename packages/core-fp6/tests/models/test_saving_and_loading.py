"""Saved models compute the same bits in other processes, on one rank and on two.

This file is also what those processes run: ``python test_saving_and_loading.py ROOT``.
"""

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from core_fp6 import FP6Config, FP6Experts, FP6Linear, dequantize, quantize
from core_fp6.models.sixbit import sixbit_modules

GROUPS = {"format": "e2m3", "group_size": 64}
ROWS = {"format": "e3m2", "group_size": 0}
SPLIT = {"format": "e2m3", "group_size": 128}
"""Of some groups two ranks have 64 columns each."""
CASES = {
    "llama-groups": GROUPS,
    "llama-rows": ROWS,
    "phi3-rows": ROWS,
    "qwen2-groups": GROUPS,
    "mistral-groups": GROUPS,
    "mixtral-groups": GROUPS,
    "mixtral-rows": ROWS,
    "llama-split": SPLIT,
    "mixtral-split": SPLIT,
    "qwen3-moe-groups": GROUPS,
}
NEW = 8
CUT = "llama-rows", "phi3-rows", "qwen2-groups", "mixtral-rows", "llama-split", "mixtral-split"
"""Cases that are loaded on two ranks too."""
CUT_WHEN_LOADED = "llama-rows", "qwen2-groups", "mixtral-rows", "mixtral-split"
REFUSED: dict[str, Callable[[], dict[str, Any]]] = {
    "uneven": lambda: {"quantization_config": FP6Config()},
    "uneven-six": dict,
    "nan": lambda: {"quantization_config": FP6Config()},
}
"""Models that two ranks refuse, and how they are loaded."""


def compute(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return {"logits": logits(model, ids), "tokens": tokens}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def family(case: str) -> str:
    return case.rpartition("-")[0]


@pytest.fixture(scope="module")
def root(build: Callable[..., PreTrainedModel], ids: torch.Tensor, tmp_path_factory: Any) -> Path:
    """For each case the plain and the quantized model, and what two other processes got."""
    folder: Path = tmp_path_factory.mktemp("saved")
    for case, how in CASES.items():
        model = build(family(case), intermediate_size=384 if how is SPLIT else 256)
        model.save_pretrained(folder / case / "plain")
        quantize(model, **how)
        model.save_pretrained(folder / case / "six")
        torch.save(compute(model, ids), folder / case / "here.pt")
    torch.save(ids, folder / "ids.pt")
    model = build("llama", intermediate_size=252, num_hidden_layers=1)
    model.save_pretrained(folder / "uneven")
    quantize(model)
    model.save_pretrained(folder / "uneven-six")
    model = build("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 200] = float("nan")
    model.save_pretrained(folder / "nan")
    launch(folder)
    return folder


def launch(folder: Path) -> None:
    """Run this file on two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


def work(folder: Path) -> None:
    """Load every case alone, then on both ranks; keep what rank 0 gets."""
    import core_fp6.integrations.transformers  # noqa: F401 # what core does before it loads models

    logging.disable_progress_bar()
    ids = torch.load(folder / "ids.pt")
    dist.init_process_group("gloo")
    both = DistributedConfig(tp_size=2, tp_plan="auto")
    experts = DistributedConfig(tp_size=2, ep_size=2)
    for case, how in CASES.items():
        six, plain = folder / case / "six", folder / case / "plain"
        first = dist.get_rank() == 0
        got = compute(AutoModelForCausalLM.from_pretrained(six), ids) if first else {}
        if case in CUT:
            model = AutoModelForCausalLM.from_pretrained(six, distributed_config=both)
            got["both"] = logits(model, ids)
            model.save_pretrained(folder / case / "from-both")
        if case in CUT_WHEN_LOADED:
            model = AutoModelForCausalLM.from_pretrained(
                plain, quantization_config=FP6Config(**how), distributed_config=both
            )
            got["both, quantized when loaded"] = logits(model, ids)
        if case == "mixtral-rows":
            model = AutoModelForCausalLM.from_pretrained(six, distributed_config=experts)
            got["experts on both"] = logits(model, ids)
            model = AutoModelForCausalLM.from_pretrained(six)
            whole = model.state_dict()
            for layer in [*model.model.layers, model]:
                fully_shard(layer)
            got["FSDP"] = logits(model, ids)
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            gathered = get_model_state_dict(model, options=options)
            assert all(torch.equal(gathered[name], whole[name]) for name in gathered)
        if first:
            torch.save(got, folder / case / "there.pt")
    for kind, how in REFUSED.items():
        try:
            AutoModelForCausalLM.from_pretrained(folder / kind, distributed_config=both, **how())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            (folder / f"{kind}-{dist.get_rank()}").write_text(said)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_another_process_gets_the_same_bits(root, case):
    here = torch.load(root / case / "here.pt")
    there = torch.load(root / case / "there.pt")
    assert torch.equal(there["logits"], here["logits"])
    assert torch.equal(there["tokens"], here["tokens"])


@pytest.mark.parametrize(
    ("case", "way"),
    [
        *((case, "both") for case in CUT),
        *((case, "both, quantized when loaded") for case in CUT_WHEN_LOADED),
        ("mixtral-rows", "experts on both"),
        ("mixtral-rows", "FSDP"),
    ],
)
def test_two_ranks_get_what_one_does(root, case, way):
    there = torch.load(root / case / "there.pt")[way]
    here = torch.load(root / case / "here.pt")["logits"]
    torch.testing.assert_close(there, here, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", CUT)
def test_two_ranks_save_what_one_does(root, case):
    one = load_file(root / case / "six" / "model.safetensors")
    both = load_file(root / case / "from-both" / "model.safetensors")
    # Of tied weights transformers saves both, when it has gathered them from ranks.
    assert one.keys() == both.keys() - {"lm_head.weight"} | (one.keys() & {"lm_head.weight"})
    assert all(torch.equal(one[name], both[name]) for name in one)


def test_columns_that_cannot_be_cut_are_named(root):
    for rank in range(2):
        for kind in ("uneven", "uneven-six"):
            message = (root / f"{kind}-{rank}").read_text()
            name = "ModelError: model.layers.0.mlp.down_proj.weight cannot be cut for 2 ranks"
            assert message.startswith(name)
            assert "252 columns are no multiple of 2 times 4" in message


def test_all_ranks_refuse_what_one_of_them_sees(root):
    messages = [(root / f"nan-{rank}").read_text() for rank in range(2)]
    name = "ModelError: model.layers.0.mlp.down_proj.weight cannot be quantized"
    assert messages[0].startswith(f"{name}: another rank has NaN")
    assert messages[1].startswith(f"{name}: 1 of its 16384 values are NaN")


@pytest.mark.parametrize("case", CASES)
def test_quantizing_while_loading_gives_the_same_bits(root, case, ids):
    model = AutoModelForCausalLM.from_pretrained(
        root / case / "plain", quantization_config=FP6Config(**CASES[case])
    )
    here = torch.load(root / case / "here.pt")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, here["logits"])
    again = root / case / "again"
    model.save_pretrained(again)
    one, other = (load_file(f / "model.safetensors") for f in (root / case / "six", again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", ["llama-groups", "phi3-rows", "mixtral-groups"])
def test_greedy_text_is_that_of_the_dequantized_model(root, case, ids):
    model = AutoModelForCausalLM.from_pretrained(root / case / "six")
    here = torch.load(root / case / "here.pt")
    plain = compute(dequantize(copy.deepcopy(model)), ids)
    torch.testing.assert_close(plain["logits"], here["logits"], rtol=0, atol=2e-6)
    assert torch.equal(plain["tokens"], here["tokens"])


def test_experts_lie_in_files_as_the_checkpoint_of_the_model_has_them(root):
    files = load_file(root / "mixtral-rows" / "six" / "model.safetensors")
    start = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    shapes = {key: tuple(files[key].shape) for key in files if key.startswith(start)}
    assert shapes == {start: (256, 64), f"{start}_hi": (256, 32), f"{start}_scale": (256,)}
    plain = load_file(root / "mixtral-rows" / "plain" / "model.safetensors")
    assert {key.removesuffix("_hi").removesuffix("_scale") for key in files} == plain.keys()


def test_a_quantized_model_that_is_dequantized_saves_as_a_plain_one(root, tmp_path, ids):
    model = AutoModelForCausalLM.from_pretrained(root / "mixtral-groups" / "six")
    dequantize(model).save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not list(sixbit_modules(read))
    plain = load_file(root / "mixtral-groups" / "plain" / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == plain.keys()
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)


def test_the_body_of_a_model_loads_without_its_head(root, ids):
    whole = AutoModelForCausalLM.from_pretrained(root / "llama-groups" / "six")
    body = type(whole.model).from_pretrained(root / "llama-groups" / "six")
    assert torch.equal(body(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_another_dtype_leaves_codes_and_scales_alone(root):
    folder = root / "llama-rows" / "six"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (_, ours), (_, theirs) in zip(sixbit_modules(model), sixbit_modules(exact), strict=True):
        assert torch.equal(ours.dequantized(), theirs.dequantized())
        assert ours.weight_scale.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for n, p in model.named_parameters() if "_scale" in n)


def test_skipped_modules_stay_plain_when_loaded(build, tmp_path, ids):
    model = build("mixtral")
    quantize(model, skip=["q_proj", "model.layers.0.mlp.experts"])
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.config.quantization_config.modules_to_not_convert == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.experts",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    ]
    attention, mlp = read.model.layers[1].self_attn, read.model.layers[1].mlp
    assert not isinstance(attention.q_proj, FP6Linear)
    assert isinstance(attention.k_proj, FP6Linear)
    assert isinstance(mlp.experts, FP6Experts)
    assert not isinstance(read.model.layers[0].mlp.experts, FP6Experts)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_forward_pass_compiles_as_one_graph(build, name, ids):
    model = build(name, num_hidden_layers=1)
    quantize(model, group_size=64)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        got = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
