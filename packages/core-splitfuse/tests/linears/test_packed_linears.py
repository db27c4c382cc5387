"""Packed linear layers compute the same, and give everything back."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from core.engines import Sampling, generate
from core.engines.plain import PlainEngine
from core.errors import EngineError
from core.testing import tiny
from core_splitfuse import Engine
from core_splitfuse.linears.model import PackedLinears

FAMILIES = ["Llama", "Qwen2", "Qwen3", "Phi", "Phi3", "GPTNeoX", "OPT", "Gemma2", "DeepseekV3"]
SAMPLING = Sampling(max_new_tokens=12)


class Twice(nn.Module):
    """Two linear layers, one of which brings a class of its own."""

    def __init__(self, layer: nn.Linear, other: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.other = other


class Scaled(nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(rows)


def answers(engine: Any) -> list[tuple[int, ...]]:
    return [answer.ids for answer in generate(engine, tiny.prompts(4), SAMPLING)]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def require_equal(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, weight in model.named_parameters():
        integers = {2: torch.int16, 4: torch.int32}[weight.element_size()]
        assert torch.equal(weight.view(integers), before[name].view(integers)), name


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=2),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_packed_layer_gives_what_it_gave(
    rows: list[int], width: int, out: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias=bias).to(dtype)
    given_rows = torch.randn(*rows, width, dtype=dtype)
    before = weights(layer)
    with torch.no_grad():
        wanted = layer(given_rows)
        packed = PackedLinears(layer)
        found = layer(given_rows)
    packed.restore()
    # One rounding of a sum of up to 70 products.
    torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps * 4, atol=1e-5)
    require_equal(layer, before)


def test_rows_need_not_lie_behind_each_other() -> None:
    layer = nn.Linear(8, 6)
    rows = torch.randn(8, 5).t()
    with torch.no_grad():
        wanted = layer(rows)
        PackedLinears(layer)
        torch.testing.assert_close(layer(rows), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_stay_the_same(family: str) -> None:
    model = tiny.build(family)
    wanted = answers(PlainEngine(model))
    with Engine(model, budget=23, kv_tokens=512, pack_linears=True) as engine:
        assert answers(engine) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closing_gives_back_the_very_same_parameters(dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    before, objects = weights(model), dict(model.named_parameters())
    shapes = {name: (w.shape, w.dtype, w.requires_grad) for name, w in objects.items()}
    engine = Engine(model, kv_tokens=256, pack_linears=True)
    packed = dict(model.named_parameters())
    assert packed.keys() == objects.keys()
    for name, weight in packed.items():
        assert weight is objects[name]
        assert (weight.shape, weight.dtype, weight.requires_grad) == shapes[name]
    engine.close()
    engine.close()
    assert all(weight is objects[name] for name, weight in model.named_parameters())
    require_equal(model, before)
    loss = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_state_dict_tells_the_real_values() -> None:
    model = tiny.llama()
    before = weights(model)
    with Engine(model, kv_tokens=256, pack_linears=True):
        state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_memory_does_not_double() -> None:
    # So large that the allocator gives every one back to the system.
    width, size = 3000, 3000 * 3000 * 4
    layers = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(4)])
    process = psutil.Process()
    before = process.memory_info().rss
    packed = PackedLinears(layers)
    assert process.memory_info().rss - before < 2 * size
    packed.restore()
    assert process.memory_info().rss - before < 2 * size


def test_a_tied_head_is_left_alone() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    wanted = answers(PlainEngine(model))
    with Engine(model, kv_tokens=512, pack_linears=True) as engine:
        assert not model.get_input_embeddings().weight.isnan().any()
        assert answers(engine) == wanted


def test_other_classes_and_replaced_forwards_are_left_alone() -> None:
    patched = nn.Linear(4, 4)
    patched.forward = lambda rows: rows  # type: ignore[method-assign]
    for other in (Scaled(4, 4), patched):
        layer = nn.Linear(4, 4)
        packed = PackedLinears(Twice(layer, other))
        assert len(packed) == 1
        assert layer.weight.isnan().all()
        assert not other.weight.isnan().any()


def test_a_weight_in_a_flat_buffer_is_left_alone() -> None:
    flat = torch.ones(16)
    inside, alone = nn.Linear(4, 4), nn.Linear(4, 4)
    inside.weight.data = flat.view(4, 4)
    packed = PackedLinears(Twice(inside, alone))
    assert len(packed) == 1
    packed.restore()
    flat.fill_(3.0)
    assert (inside.weight == 3).all()


def test_a_layer_that_is_used_twice_is_left_alone() -> None:
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    second.weight = first.weight
    assert len(PackedLinears(nn.Sequential(first, second, third))) == 1


def test_new_weights_are_loaded_and_packed() -> None:
    model, other = tiny.llama(), tiny.llama(seed=5)
    wanted = answers(PlainEngine(other))
    with Engine(model, kv_tokens=512, pack_linears=True) as engine:
        answers(engine)
        engine.load_weights(other.named_parameters())
        assert model.lm_head.weight.isnan().all()
        assert answers(engine) == wanted
    require_equal(model, weights(other))


def test_refused_weights_change_nothing() -> None:
    model = tiny.llama()
    before, wanted = weights(model), answers(PlainEngine(model))
    with Engine(model, kv_tokens=512, pack_linears=True) as engine:
        good = {"lm_head.weight": torch.zeros_like(before["lm_head.weight"])}
        with pytest.raises(EngineError, match="no weight 'nobody'"):
            engine.load_weights({**good, "nobody": torch.zeros(1)}.items())
        assert answers(engine) == wanted
    require_equal(model, before)


@pytest.mark.parametrize("told", [False, True])
def test_a_weight_that_was_replaced_is_used(told: bool) -> None:
    model, other = tiny.llama(), tiny.llama(seed=5)
    wanted = answers(PlainEngine(other))
    engine = Engine(model, kv_tokens=512, pack_linears=True)
    answers(engine)
    for (name, new), mine in zip(other.named_parameters(), model.parameters(), strict=True):
        if told:
            mine.data = new.data.clone()
        else:
            place, _, kind = name.rpartition(".")
            setattr(model.get_submodule(place), kind, nn.Parameter(new.data.clone()))
    if told:
        engine.weights_changed()
    assert answers(engine) == wanted
    engine.close()
    require_equal(model, weights(other))


def test_weights_that_were_made_in_inference_mode_stay_so() -> None:
    with torch.inference_mode():
        model = tiny.llama()
    wanted, before = answers(PlainEngine(model)), weights(model)
    kinds = [weight.is_inference() for weight in model.parameters()]
    with Engine(model, kv_tokens=512, pack_linears=True) as engine:
        assert answers(engine) == wanted
    assert [weight.is_inference() for weight in model.parameters()] == kinds
    require_equal(model, before)


def test_a_model_that_was_cast_meanwhile_keeps_its_values() -> None:
    model = tiny.llama()
    wanted = {name: weight.bfloat16() for name, weight in weights(model).items()}
    with Engine(model, kv_tokens=256, pack_linears=True):
        model.bfloat16()
    require_equal(model, wanted)


def test_writing_and_training_are_refused() -> None:
    model = tiny.llama()
    with Engine(model, kv_tokens=256, pack_linears=True):
        with pytest.raises(EngineError, match="gives no gradients"):
            model(input_ids=torch.tensor([[1, 2, 3]]))
        with pytest.raises(RuntimeError), torch.no_grad():
            model.lm_head.weight.add_(1)
        with pytest.raises(RuntimeError):
            model.load_state_dict(tiny.llama(seed=5).state_dict())


def test_what_cannot_be_packed_is_refused_and_left_as_it_was() -> None:
    with torch.device("meta"):
        elsewhere = nn.Linear(4, 4)
    with pytest.raises(EngineError, match="one is on meta"):
        PackedLinears(nn.Sequential(nn.Linear(4, 4), elsewhere))
    with pytest.raises(EngineError, match="has no linear layer that can be packed"):
        PackedLinears(Scaled(4, 4))
    first = nn.Linear(4, 4)
    before = weights(first)
    with pytest.raises(EngineError, match="float64"):
        PackedLinears(nn.Sequential(first, nn.Linear(4, 4).double()))
    require_equal(first, before)
    assert "forward" not in first.__dict__


class Peeks(nn.Module):
    """A head that reads the weight of its layer instead of calling it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, self.layer.weight)


def test_a_model_that_reads_its_weights_itself_is_refused_and_left_as_it_was() -> None:
    model = tiny.llama()
    model.lm_head = Peeks(model.lm_head)
    before = weights(model)
    with pytest.raises(EngineError, match="reads"):
        Engine(model, kv_tokens=256, pack_linears=True)
    require_equal(model, before)


def test_an_engine_that_cannot_be_built_leaves_the_model_as_it_was() -> None:
    model = tiny.llama()
    before = weights(model)
    with pytest.raises(EngineError, match="no memory for keys and values"):
        Engine(model, kv_memory=1e-12, pack_linears=True)
    require_equal(model, before)


def test_a_model_that_does_not_train_is_packed_by_itself() -> None:
    model = tiny.llama()
    before = weights(model)
    with Engine(model, kv_tokens=256) as engine:
        require_equal(model, before)
        wanted = answers(engine)
    model.requires_grad_(False)
    with Engine(model, kv_tokens=256) as engine:
        assert model.get_submodule("lm_head").weight.isnan().all()
        assert answers(engine) == wanted
    require_equal(model, before)


def test_what_cannot_be_packed_is_served_as_it_is() -> None:
    model = tiny.llama().double().requires_grad_(False)
    before = model.state_dict()
    with Engine(model, kv_tokens=256) as engine:
        answers(engine)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
