"""Experts in one tensor compute what their plain ones do, or are left out with a reason."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    Llama4TextConfig,
    MiniMaxM3VLTextConfig,
    MixtralConfig,
    NemotronHConfig,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from core_fp6 import E2M3, E3M2, FP6Experts, Scheme
from core_fp6.models.selecting import select

KINDS = {
    "gate": lambda: MixtralExperts(
        MixtralConfig(hidden_size=72, intermediate_size=40, num_local_experts=5)
    ),
    "gate of its own": lambda: MiniMaxM3VLExperts(
        MiniMaxM3VLTextConfig(hidden_size=72, intermediate_size=40, num_local_experts=5)
    ),
    "no gate": lambda: NemotronHExperts(
        NemotronHConfig(hidden_size=72, moe_intermediate_size=40, n_routed_experts=5)
    ),
}


def experts(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = KINDS[kind]()
    made.config._experts_implementation = "eager"
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.1)
    return made


def routing(tokens: int, chosen: int = 2) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(tokens, 72)
    index = torch.stack([torch.randperm(5)[:chosen] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, chosen)


@pytest.mark.parametrize("scheme", [Scheme(E2M3, 32), Scheme(E3M2, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_they_compute_what_plain_experts_with_their_weights_do(kind, scheme):
    original = experts(kind)
    six = FP6Experts.from_experts(original, scheme)
    plain = six.to_experts()
    assert type(plain) is type(original)
    for name, weight in original.named_parameters():
        assert torch.equal(
            plain.get_parameter(name), scheme.decode(*scheme.encode(weight.detach()))
        )
    for tokens in (1, 2, 17):
        inputs = routing(tokens)
        torch.testing.assert_close(six(*inputs), plain(*inputs), rtol=2e-6, atol=2e-6)


def test_gradients_reach_tokens_and_routing_weights():
    six = FP6Experts.from_experts(experts("gate"), Scheme(E2M3, 32))
    hidden, index, weights = routing(6)
    grads = []
    for module in (six, six.to_experts()):
        inputs = hidden.clone().requires_grad_(), index, weights.clone().requires_grad_()
        module(*inputs).square().sum().backward()
        grads.append((inputs[0].grad, inputs[2].grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_routes_to_experts_of_other_ranks_add_nothing():
    six = FP6Experts.from_experts(experts("gate"), Scheme(E2M3, 32))
    hidden, index, weights = routing(4)
    expected = six(hidden, index, weights)
    beyond = torch.full((4, 1), 5)
    more = six(hidden, torch.cat((index, beyond), 1), torch.cat((weights, torch.zeros(4, 1)), 1))
    torch.testing.assert_close(more, expected)


def test_they_are_saved_in_natural_layout_and_load_again():
    six = FP6Experts.from_experts(experts("gate"), Scheme(E3M2, 0))
    state = six.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "gate_up_proj": (5, 80, 36),
        "gate_up_proj_hi": (5, 80, 18),
        "gate_up_proj_scale": (5, 80),
        "down_proj": (5, 72, 20),
        "down_proj_hi": (5, 72, 10),
        "down_proj_scale": (5, 72),
    }
    other = FP6Experts(experts("gate"), Scheme(E3M2, 0), "cpu")
    other.load_state_dict(state)
    inputs = routing(3)
    for copied in (other, copy.deepcopy(six)):
        assert torch.equal(copied(*inputs), six(*inputs))
    assert six.to(torch.bfloat16).gate_up_proj_scale.dtype == torch.float32


def test_they_compile_as_one_graph():
    six = FP6Experts.from_experts(experts("gate of its own"), Scheme(E2M3, 32))
    torch._dynamo.reset()
    compiled = torch.compile(six, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 5):
        inputs = routing(tokens)
        torch.testing.assert_close(compiled(*inputs), six(*inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: GptOssExperts(
                GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=2)
            ),
            "experts with transposed weights",
        ),
        (
            lambda: Llama4TextExperts(
                Llama4TextConfig(hidden_size=16, intermediate_size=8, num_local_experts=2)
            ),
            "Llama4TextExperts does not say how its experts compute",
        ),
    ],
    ids=["gpt-oss", "llama4"],
)
def test_experts_that_compute_otherwise_are_left_out_by_name(make, reason):
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": make()}), "other": nn.Linear(4, 4)})
    selection = select(model)
    assert list(selection.chosen) == ["other"]
    assert selection.left_out == {"mlp.experts": reason}
