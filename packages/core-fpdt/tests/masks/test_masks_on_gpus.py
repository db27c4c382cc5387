"""Masks whose tensors are on a GPU: classified on the CPU, evaluated where the model is."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils as made

from core_fpdt.masks import LazyMask, lazy_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTH = 24


def masks(device: str) -> list[LazyMask]:
    ids = torch.tensor([[0] * 9 + [1] * 15, [0] * 20 + [1] * 4], device=device)
    places = torch.tensor([[*range(9), *range(15)], [*range(20), *range(4)]], device=device)
    starts = torch.tensor([0, 3], device=device)
    real = torch.arange(LENGTH, device=device).expand(2, -1) >= starts[:, None]
    known = made.chunked_causal_mask_function(7, starts)
    functions = [
        made.sliding_window_causal_mask_function(5),
        known,
        made.packed_sequence_compatibility_function(known, places, ids),
        made.or_masks(made.causal_mask_function, made.blockwise_overlay(ids - 1)),
        made.or_masks(made.causal_mask_function, lambda b, h, q, k: ids[b, q] == ids[b, k]),
    ]
    sizes = {"batch_size": 2, "q_length": LENGTH, "kv_length": LENGTH, "device": device}
    found = [lazy_mask(**sizes, mask_function=f, attention_mask=real) for f in functions]
    plain = lazy_mask(**sizes, mask_function=functions[0])
    return [*found, plain.with_documents(ids.cpu()), LazyMask.of(plain.dense())]


def test_every_tile_is_that_of_the_cpu() -> None:
    spans = [(start, start + 6) for start in range(0, LENGTH, 6)]
    for here, there in zip(masks("cpu"), masks("cuda"), strict=True):
        for queries in spans:
            for keys in spans:
                wanted, tile = here.tile(queries, keys), there.tile(queries, keys)
                assert tile.kind == wanted.kind
                if tile.evaluate is not None:
                    assert tile.visible().is_cuda
                    assert torch.equal(tile.visible().cpu(), wanted.visible())
        assert [there.horizon(e) for e in (1, 9, 20)] == [here.horizon(e) for e in (1, 9, 20)]
