"""Large weights are rounded and repacked a piece at a time, which shows in no code."""

import pytest
import torch

from core.errors import ModelError
from core_fp6 import E2M3, E3M2, Scheme
from core_fp6.weights.packed import quantize


@pytest.mark.parametrize("shape", [(700, 1030), (3, 250, 1030), (3, 1 << 20)])
@pytest.mark.parametrize("scheme", [Scheme(E2M3, 128), Scheme(E3M2, 0)], ids=str)
def test_pieces_make_the_whole(scheme, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scale = scheme.encode(weight)
    packed = quantize(weight, scheme)
    assert torch.equal(packed.codes(), codes)
    assert torch.equal(packed.scale, scale)
    moved = packed.to("execution")
    assert torch.equal(moved.codes(), codes)
    assert torch.equal(moved.to("natural").low, packed.low)
    given = quantize(weight, scheme, scale=2 * scale)
    assert torch.equal(given.codes(), scheme.encode(weight, 2 * scale)[0])


def test_what_codes_cannot_say_is_counted_over_all_pieces():
    weight = torch.zeros(700, 1030)
    weight[0, 0] = weight[699, 1029] = float("nan")
    with pytest.raises(ModelError, match="2 of its 721000 values"):
        quantize(weight, Scheme())
