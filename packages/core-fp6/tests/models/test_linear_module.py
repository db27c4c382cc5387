"""A linear module keeps its codes and scales through everything that happens to modules."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from core.errors import ModelError
from core_fp6 import E2M3, E3M2, FP6Linear, Scheme, prepare, quantize
from core_fp6.layouts import natural

SCHEMES = Scheme(E2M3, 32), Scheme(E3M2, 0)


def module(scheme: Scheme = SCHEMES[0], columns: int = 70, rows: int = 33) -> FP6Linear:
    torch.manual_seed(0)
    return FP6Linear.from_linear(nn.Linear(columns, rows), scheme)


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), tokens=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_it_computes_what_the_plain_module_of_its_weights_does(scheme, rows, columns, tokens):
    six = module(scheme, columns, rows)
    x = torch.randn(2, tokens, columns)
    exact = x.double() @ six.dequantized(dtype=torch.float64).T + six.bias.double()
    got = six(x)
    torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(six.to_linear()(x), got, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_its_state_dict_is_in_natural_layout(scheme):
    six = module(scheme)
    state = six.state_dict()
    assert list(state) == ["weight", "weight_hi", "weight_scale", "bias"]
    codes, scale = scheme.encode(plain_weight())
    assert torch.equal(natural.unpack(state["weight"], state["weight_hi"], 70), codes)
    assert torch.equal(state["weight_scale"], scale)
    assert six.layout == "execution"


def plain_weight() -> torch.Tensor:
    torch.manual_seed(0)
    return nn.Linear(70, 33).weight.detach()


@pytest.mark.parametrize(("device", "assign"), [("cpu", False), ("cpu", True), ("meta", True)])
def test_a_state_dict_loads_into_new_and_used_modules(device, assign):
    six = module()
    new = FP6Linear(70, 33, six.scheme, bias=True, device=device)
    new.load_state_dict(six.state_dict(), assign=assign)
    assert new.layout == "execution"
    assert same(new, six)
    other = FP6Linear.from_linear(nn.Linear(70, 33), six.scheme)
    new.load_state_dict(other.state_dict(), assign=assign)
    assert same(new, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_another_dtype_is_one_of_the_bias_alone(scheme, dtype):
    six, kept = module(scheme), module(scheme).state_dict()
    for changed in (copy.deepcopy(six).to(dtype), copy.deepcopy(six).type(dtype)):
        state = changed.state_dict()
        for name in ("weight", "weight_hi", "weight_scale"):
            assert torch.equal(state[name], kept[name])
            assert state[name].dtype == kept[name].dtype
        assert state["bias"].dtype == dtype


def test_copies_and_files_hold_the_same():
    six = module()
    buffer = io.BytesIO()
    torch.save(six.state_dict(), buffer)
    buffer.seek(0)
    read = FP6Linear(70, 33, six.scheme, bias=True)
    read.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 70)
    for copied in (copy.deepcopy(six), pickle.loads(pickle.dumps(six)), read):
        assert same(copied, six)
        assert torch.equal(copied(x), six(x))


def test_only_one_layout_is_held():
    six = module(columns=256, rows=64)
    held = sum(p.nbytes for p in six.parameters())
    assert held == 64 * 256 * 6 // 8 + 64 * 8 * 2 + 64 * 4
    x = torch.randn(1, 256)
    six(x)
    six.state_dict()
    assert sum(p.nbytes for p in six.parameters()) == held


def test_planes_set_one_by_one_are_prepared_once():
    six = module()
    new = nn.Sequential(FP6Linear(70, 33, six.scheme, bias=True))
    for name, tensor in six.state_dict().items():
        setattr(new[0], name, nn.Parameter(tensor, requires_grad=False))
    x = torch.randn(2, 70)
    with pytest.raises(ModelError, match="not ready"):
        new(x)
    assert torch.equal(prepare(new)(x), six(x))
    assert torch.equal(prepare(new)(x), six(x))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "weight",
            lambda t: t[:, :-2],
            r"weight is not part of a .* \[33, 34\], not .* \[33, 36\]",
        ),
        ("weight_hi", lambda t: t[:-1], "weight_hi is not part"),
        ("weight_hi", lambda t: t.to(torch.int32), "weight_hi is not part of .* torch.int32"),
        ("weight_scale", lambda t: t * float("nan"), "weight_scale has values that are no scales"),
        ("weight_scale", lambda t: -t, "weight_scale has values that are no scales"),
        ("weight_scale", lambda t: t.float(), "weight_scale is not part"),
    ],
)
def test_damaged_planes_are_refused_and_leave_the_module_alone(part, change, message):
    six, kept = module(), module()
    state = six.state_dict()
    with pytest.raises(RuntimeError, match=message):
        six.load_state_dict(state | {part: change(state[part])})
    assert same(six, kept)


def test_planes_do_not_load_without_their_scales():
    six = module()
    state = six.state_dict()
    del state["weight_scale"]
    with pytest.raises(RuntimeError, match="weight_scale is missing"):
        six.load_state_dict(state, strict=False)


def test_codes_are_not_trained():
    six = module()
    assert [name for name, p in six.named_parameters() if p.requires_grad] == ["bias"]
    with pytest.raises(ModelError, match=r"LoRA.*dequantize"):
        six.requires_grad_(True)
    x = torch.randn(3, 70, requires_grad=True)
    six(x).square().sum().backward()
    reference = six.to_linear()
    y = x.detach().clone().requires_grad_()
    reference(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(six.bias.grad, reference.bias.grad)


def test_it_compiles_as_one_graph_for_any_number_of_tokens():
    six = module()
    torch._dynamo.reset()
    compiled = torch.compile(six, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 2, 5):
        x = torch.randn(tokens, 70)
        assert torch.equal(compiled(x), six(x))


def test_it_exports_with_any_number_of_tokens():
    six = module()
    tokens = torch.export.Dim("tokens", min=1, max=64)
    exported = torch.export.export(six, (torch.randn(4, 70),), dynamic_shapes=({0: tokens},))
    x = torch.randn(7, 70)
    assert torch.equal(exported.module()(x), six(x))


def test_a_quantized_module_shares_nothing_but_its_bias_with_the_plain_one():
    model = nn.Sequential(nn.Linear(8, 8))
    bias = model[0].bias
    quantize(model, group_size=0)
    assert model[0].bias is bias
    assert isinstance(model[0], nn.Linear)
