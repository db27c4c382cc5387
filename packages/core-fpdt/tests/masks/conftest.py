"""What the tests of masks share: assembling a mask of tiles, and asking transformers for one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from core_fpdt.masks import Kind, LazyMask, lazy_mask

NAME = "fpdt_tests_of_masks"


def assembled(mask: LazyMask, cuts: list[int]) -> Tensor:
    """The mask put together of its tiles, believing what they say of themselves."""
    (first, last), (begin, end) = mask.queries, mask.keys
    rows = sorted({first, last, *(c for c in cuts if first < c < last)})
    columns = sorted({begin, end, *(c for c in cuts if begin < c < end)})
    parts = []
    for queries in itertools.pairwise(rows):
        row = [said(mask, queries, keys) for keys in itertools.pairwise(columns)]
        parts.append(torch.cat(row, -1))
    return torch.cat(parts, -2)


def said(mask: LazyMask, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    tile = mask.tile(queries, keys)
    shape = (mask.batch, 1, queries[1] - queries[0], keys[1] - keys[0])
    match tile.kind:
        case Kind.EMPTY:
            with pytest.raises(ValueError, match="empty"):
                tile.visible()
            return torch.zeros(shape, dtype=torch.bool)
        case Kind.FULL:
            seen = torch.ones(shape, dtype=torch.bool)
        case Kind.CAUSAL:
            seen = torch.ones(shape, dtype=torch.bool).tril()
        case Kind.PARTIAL:
            seen = tile.visible()
            assert seen.dtype == torch.bool
            assert seen.is_contiguous()
            assert seen.shape[-2:] == shape[-2:]
            return seen.expand(mask.batch, *seen.shape[1:])
    assert torch.equal(tile.visible().expand(shape), seen)
    return seen


@pytest.fixture(name="assembled")
def _assembled() -> Callable[[LazyMask, list[int]], Tensor]:
    return assembled


@pytest.fixture
def both_ways() -> Callable[..., tuple[LazyMask, Tensor]]:
    """The arguments of a mask function to our mask and to that of transformers."""

    def made(**arguments: Any) -> tuple[LazyMask, Tensor]:
        dense = sdpa_mask(**arguments, allow_is_causal_skip=False)
        assert dense is not None
        return lazy_mask(**arguments), dense.bool()

    return made


@pytest.fixture(scope="session")
def entry() -> Iterator[Callable[..., tuple[LazyMask, Tensor]]]:
    """One of transformers' ``create_..._mask`` with our mask registered, and as it is."""
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lazy_mask)

    def made(
        create: Any, length: int, batch: int, changes: dict[str, Any], **arguments: Any
    ) -> Any:
        config = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
        for name, value in changes.items():
            setattr(config, name, value)
        arguments = {"attention_mask": None, "past_key_values": None, **arguments}
        embeddings = torch.zeros(batch, length, 8)
        config._attn_implementation = NAME
        mask = create(config, embeddings, **arguments)
        config._attn_implementation = "eager"
        dense = create(config, embeddings, **arguments, allow_is_causal_skip=False)
        return mask, dense == 0

    yield made
    del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[NAME]
