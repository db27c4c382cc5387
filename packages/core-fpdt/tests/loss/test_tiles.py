"""Modules in tiles: output and gradients are those of the whole, and only the input is saved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from core.equivalence import decoder
from core.errors import ModelError
from core.testing import tiny
from core_fpdt.loss.tiles import feed_forward, final_norm, tile

WIDTH = 6


class Block(nn.Module):
    """A feed-forward module with everything in it: dropout, a tied and a frozen parameter."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 9)
        self.gate = nn.Linear(WIDTH, 9, bias=False)
        self.down = nn.Linear(9, WIDTH)
        self.again = nn.Linear(9, WIDTH, bias=False)
        self.again.weight = self.down.weight
        self.gate.weight.requires_grad_(False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        inside = self.drop(torch.relu(self.up(x)) * self.gate(x))
        return scale * (self.down(inside) + self.again(inside.square()))


def make(length: int = 11, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    block = Block(dropout).to(dtype)
    return block, torch.randn(2, length, WIDTH, dtype=dtype, requires_grad=True)


def gradients(block: nn.Module, x: Tensor, *args: Any) -> list[Tensor]:
    output = block(x, *args)
    inputs = [x, *(p for p in block.parameters() if p.requires_grad)]
    factors = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output * factors).sum(), inputs)]


@settings(deadline=None)
@given(length=st.integers(1, 40), cut=st.integers(1, 12), by_tokens=st.booleans())
def test_any_length_in_any_tiles(length: int, cut: int, by_tokens: bool) -> None:
    block, x = make(length)
    plain = gradients(block, x, 3.0)
    undo = tile(block, tokens=cut) if by_tokens else tile(block, pieces=cut)
    for ours, theirs in zip(gradients(block, x, 3.0), plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    undo()
    assert "forward" not in vars(block)


def test_gradients_against_differences() -> None:
    block, x = make(5)
    block.up.bias.data += 3.0  # away from the corner of the relu
    tile(block, tokens=2)
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *block.up.parameters()))


def test_only_the_input_is_saved() -> None:
    block, x = make(32)
    tile(block, tokens=4)
    saved: list[torch.Size] = []
    keep = torch.autograd.graph.saved_tensors_hooks
    with keep(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        block(x)
    assert saved == [x.shape, *(p.shape for p in block.parameters() if p.requires_grad)]


def test_inputs_are_not_written() -> None:
    block, x = make()
    tile(block, pieces=3)
    middle = x * 2
    before = middle.detach().clone()
    output = block(middle).sum()
    (middle.square().sum() + output).backward()  # PyTorch fails if middle was written
    assert torch.equal(middle.detach(), before)


def test_hooks_fire_once() -> None:
    block, x = make()
    plain = gradients(block, x)[2]
    tile(block, pieces=4)
    seen: list[Tensor] = []
    block.up.weight.register_hook(lambda grad: (seen.append(grad), grad * 0.5)[1])
    block(x).backward(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape))
    assert len(seen) == 1
    assert torch.allclose(block.up.weight.grad, plain * 0.5, rtol=1e-12)


def test_dropout_is_replayed() -> None:
    block, x = make(dropout=0.4)
    twin = copy.deepcopy(block)
    tile(block, tokens=4)
    torch.manual_seed(3)
    output = block(x)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    wanted = torch.cat([twin(part) for part in x.split(4, dim=1)], dim=1)
    assert torch.allclose(output, wanted, rtol=1e-12)
    output.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    wanted.square().sum().backward()
    for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12)


def test_under_autocast() -> None:
    block, x = make(dtype=torch.float32)

    def passed() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output = block(x)
            assert output.dtype == torch.bfloat16
            # Beside the tiles, weights are used with gradients under the same autocast.
            loss = output.float().square().sum() + block.up(x).float().sum()
        return list(torch.autograd.grad(loss, [x, block.up.weight, block.down.weight]))

    plain = passed()
    tile(block, pieces=3)
    for ours, theirs in zip(passed(), plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_weight_gradients_in_half_precision_are_added_up_in_float32() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
    x = torch.rand(1, 600, WIDTH, dtype=torch.bfloat16) + 0.5
    tile(linear, tokens=1)
    linear(x).sum().backward()
    exact = x.double().sum((0, 1)).expand(WIDTH, -1)
    assert torch.allclose(linear.weight.grad.double(), exact, rtol=2**-8)


@pytest.mark.parametrize("frozen", ["input", "parameters", "all"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    block, x = make()
    tile(block, pieces=3)
    if frozen != "input":
        block.requires_grad_(False)
    x = x.detach().requires_grad_(frozen == "parameters")
    output = block(x)
    assert output.requires_grad == (frozen != "all")
    if frozen != "all":
        output.sum().backward()
        assert (x.grad is None) == (frozen == "input")
        assert (block.up.weight.grad is None) == (frozen == "parameters")


def test_without_gradients() -> None:
    block, x = make()
    plain = block(x)
    tile(block, pieces=3)
    with torch.no_grad():
        assert torch.allclose(block(x), plain)


def test_gradients_of_gradients_are_refused() -> None:
    block, x = make()
    tile(block, pieces=3)
    with pytest.raises(ModelError, match="gradients of gradients"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)


class Pair(nn.Module):
    def forward(self, x: Tensor, *more: Any) -> Any:
        return x, x


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        (Pair(), (), "a Pair cannot be run in tiles: .* returns tuple"),
        (Mean(), (), r"a Mean cannot be run in tiles: .* returns \(2, 6\)"),
        (Pair(), (torch.ones(2, 11),), "a Pair cannot be run in tiles: .* more than one tensor"),
    ],
)
def test_modules_that_do_not_fit_are_refused_by_name(
    module: nn.Module, args: Any, message: str
) -> None:
    _, x = make()
    tile(module, pieces=3)
    with pytest.raises(ModelError, match=message):
        module(x, *args)


def test_two_ways_to_cut_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="either"):
        tile(Block(), pieces=2, tokens=3)
    with pytest.raises(ValueError, match="either"):
        tile(Block())


def test_tiles_of_tiles_and_copies() -> None:
    block, x = make()
    plain = gradients(block, x)
    outer = tile(block, tokens=6), tile(block, tokens=5)
    twin = copy.deepcopy(block)
    for ours, theirs in zip(gradients(block, x), plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    block.up.weight.data.zero_()
    for ours, theirs in zip(gradients(twin, x), plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    outer[1]()
    outer[0]()
    assert "forward" not in vars(block)


NORMS = {
    "Llama": "norm",
    "GPT2": "ln_f",
    "GPTNeoX": "final_layer_norm",
    "Phi": "final_layernorm",
    "OPT": "final_layer_norm",
    "Cohere": "norm",
    "Bloom": "ln_f",
    "Mamba": "norm_f",
}


@pytest.mark.parametrize("family", NORMS)
def test_the_last_normalization_is_found(family: str) -> None:
    inner = decoder(tiny.build(family))
    assert final_norm(inner) is inner.get_submodule(NORMS[family])


PARTS = {
    "Llama": "mlp",
    "GPT2": "mlp",
    "GPTNeoX": "mlp",
    "Mixtral": "mlp",
    "Qwen3Moe": "mlp",
    "GraniteMoe": "block_sparse_moe",
    "OPT": "",
}


@pytest.mark.parametrize("family", PARTS)
def test_a_model_in_tiles(family: str) -> None:
    changes = {"num_experts": 4, "num_experts_per_tok": 2} if family == "Qwen3Moe" else {}
    model: Any = tiny.build(family, **changes)
    batch = tiny.batch()
    plain = model(**batch)
    plain.loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    inner = decoder(model)
    norm = final_norm(inner)
    assert norm is not None
    tile(norm, pieces=5)
    layers = getattr(inner, "layers", None) or getattr(inner, "h", None)
    for layer in layers:
        part = feed_forward(layer)
        if not PARTS[family]:
            assert part is None
        else:
            assert part is layer.get_submodule(PARTS[family])
            tile(part, tokens=7)
    found = model(**batch)
    found.loss.backward()
    assert torch.allclose(found.logits, plain.logits, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if wanted[name] is not None:
            scale = float(wanted[name].abs().max())
            assert torch.allclose(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5 * scale), name
