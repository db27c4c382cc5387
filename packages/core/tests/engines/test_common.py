"""What engines share: weights that are replaced as a whole, and answers to mixed requests."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

import core
from core.engines import Request, Sampling, generate
from core.engines.common import check_request, evaluating, replace_weights
from core.engines.plain import PlainEngine
from core.testing import tiny


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_a_refused_weight_leaves_all_as_they_were() -> None:
    model = tiny.llama()
    before = weights(model)
    name = next(iter(before))
    for wrong in [("nowhere", before[name]), (name, before[name][:1]), ("no", before[name])]:
        given = [(other, torch.zeros_like(w)) for other, w in before.items() if other != name]
        with pytest.raises(core.EngineError, match=wrong[0]):
            replace_weights(model, [*given, wrong])
    with pytest.raises(core.EngineError, match="no values"):
        replace_weights(model, [(name, before[name].to("meta"))])
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_whole_and_sharded_weights_are_not_mixed(mesh: DeviceMesh) -> None:
    model = nn.Linear(4, 4)
    sharded = copy.deepcopy(model)
    sharded.weight = nn.Parameter(distribute_tensor(sharded.weight.detach(), mesh))
    assert isinstance(sharded.weight, DTensor)
    with pytest.raises(core.EngineError, match="the model's is a DTensor and the new one is not"):
        replace_weights(sharded, [("bias", torch.zeros(4)), ("weight", torch.zeros(4, 4))])
    with pytest.raises(core.EngineError, match="the new one is a DTensor and the model's is not"):
        replace_weights(model, [("bias", torch.zeros(4)), ("weight", sharded.weight)])
    assert all(bool(m.bias.any()) for m in (model, sharded))
    replace_weights(sharded, [("weight", distribute_tensor(torch.ones(4, 4), mesh))])
    assert torch.equal(sharded.weight.full_tensor(), torch.ones(4, 4))


def test_tied_weights_have_all_their_names() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    value = torch.ones(tiny.VOCABULARY, 32)
    replace_weights(model, [("lm_head.weight", value)])
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), value)


def test_extras_that_an_engine_knows_pass() -> None:
    config = tiny.llama().config
    request = Request(prompt=[1], extras={"priority": 1})
    check_request(config, request, known_extras=("priority",))
    with pytest.raises(core.EngineError, match="priority"):
        check_request(config, request)


def test_modes_return_after_an_error() -> None:
    model = tiny.llama().train()
    model.get_submodule("model.layers.1").eval()
    before = [module.training for module in model.modules()]

    def stop() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_samples_of_one_prompt_have_seeds_of_their_own() -> None:
    engine = PlainEngine(tiny.llama())
    drawn = [Sampling(max_new_tokens=6, temperature=1.0, seed=seed) for seed in range(3)]
    requests = [Request(prompt=[1, 2, 3], sampling=sampling) for sampling in drawn]
    answers = generate(engine, [*requests, [1, 2, 3]], Sampling(max_new_tokens=4))
    assert len({answer.ids for answer in answers[:3]}) == 3
    assert [len(answer.ids) for answer in answers] == [6, 6, 6, 4]
    assert answers[1] == generate(engine, [[1, 2, 3]], drawn[1])[0]
