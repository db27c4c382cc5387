"""Long sequences are classified without a mask, and what is evaluated is kept within bounds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils as made

from core_fpdt.masks import Kind, LazyMask, lazy_mask
from core_fpdt.masks.evaluated import Extent, Unknown
from core_fpdt.masks.evaluating import Evaluator
from core_fpdt.masks.rules import Causal

LENGTH, CHUNK = 2**20, 2**14
SPANS = [(start, start + CHUNK) for start in range(0, LENGTH, CHUNK)]


class Meter(TorchDispatchMode):
    """Counts elements that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.total += tensor.numel()
        return result


def packed() -> Any:
    """Documents of 100,000 tokens, as transformers finds them."""
    positions = torch.arange(LENGTH).view(1, -1) % 100_000
    ids = made.find_packed_sequence_indices(positions)
    assert ids is not None
    inner = made.sliding_window_causal_mask_function(40_000)
    return made.packed_sequence_compatibility_function(inner, positions, ids)


def kinds(mask: LazyMask) -> Counter[Kind]:
    return Counter(mask.tile(queries, keys).kind for queries in SPANS for keys in SPANS)


CASES = {
    "causal": (lambda: made.causal_mask_function, (64, 64 * 63 // 2, 0)),
    # Two whole chunks back are within reach; the third is cut by the window.
    "window": (lambda: made.sliding_window_causal_mask_function(40_000), (64, 63, 62 + 61)),
    "chunks": (
        lambda: made.chunked_causal_mask_function(2 * CHUNK, torch.zeros(1, dtype=torch.long)),
        (64, 32, 0),
    ),
    "bidirectional": (lambda: made.bidirectional_mask_function, (0, 64 * 64, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_million_tokens_are_classified_by_arithmetic(name) -> None:
    make, (causal, full, cut) = CASES[name]
    mask = lazy_mask(batch_size=1, q_length=LENGTH, kv_length=LENGTH, mask_function=make())
    with Meter() as meter:
        found = kinds(mask)
    assert (found[Kind.CAUSAL], found[Kind.FULL], found[Kind.PARTIAL]) == (causal, full, cut)
    assert meter.total == 0


def test_a_million_packed_tokens_are_classified_from_the_ends_of_ranges() -> None:
    mask = lazy_mask(batch_size=1, q_length=LENGTH, kv_length=LENGTH, mask_function=packed())
    with Meter() as meter:
        found = kinds(mask)
    assert meter.largest <= LENGTH, "no tile was evaluated"
    assert meter.total <= 32 * LENGTH
    starts = range(0, LENGTH, 100_000)
    inside = [s for s in SPANS if s[0] // 100_000 == (s[1] - 1) // 100_000]
    assert found[Kind.CAUSAL] == len(inside) == len(SPANS) - len(starts) + 1
    assert found[Kind.PARTIAL] <= 4 * len(SPANS)
    assert found[Kind.FULL] > 0


def test_padding_of_a_batch_is_classified_from_ranges() -> None:
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, : 3 * CHUNK] = False
    real[1, -5 * CHUNK + 7 :] = False
    mask = lazy_mask(batch_size=2, q_length=LENGTH, kv_length=LENGTH, attention_mask=real)
    with Meter() as meter:
        found = kinds(mask)
    assert meter.largest <= 2 * LENGTH
    assert mask.tile(SPANS[2], SPANS[1]).kind == Kind.PARTIAL, "one row sees it, the other does not"
    assert mask.tile(SPANS[30], SPANS[30]).kind == Kind.CAUSAL
    assert mask.tile(SPANS[63], SPANS[62]).kind == Kind.PARTIAL
    # Rows hidden for different reasons still make an empty tile.
    assert found[Kind.EMPTY] == 64 * 63 // 2


def test_rows_may_be_hidden_for_different_reasons() -> None:
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, 4:] = False
    ids = torch.tensor([[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]])
    function = made.and_masks(
        made.bidirectional_mask_function, made.packed_sequence_mask_function(ids)
    )
    mask = lazy_mask(
        batch_size=2, q_length=8, kv_length=8, mask_function=function, attention_mask=real
    )
    assert mask.tile((0, 4), (4, 8)).kind == Kind.EMPTY
    assert mask.tile((4, 8), (4, 8)).kind == Kind.PARTIAL


def test_an_unknown_function_is_not_asked_where_others_decide() -> None:
    asked: list[int] = []

    def theirs(batch: Any, head: Any, query: Any, key: Any) -> Any:
        asked.append(torch.broadcast_tensors(query, key)[0].numel())
        return (query + key) % 3 > 0

    function = made.and_masks(made.causal_mask_function, theirs)
    mask = lazy_mask(batch_size=1, q_length=64, kv_length=64, mask_function=function)
    spans = [(start, start + 8) for start in range(0, 64, 8)]
    assert mask.horizon(16) == 16
    for queries in spans:
        for keys in spans:
            assert (mask.tile(queries, keys).kind == Kind.EMPTY) == (keys[0] > queries[0])
    assert asked == [64] * 36
    for _ in range(3):  # the layers to come
        for queries in spans:
            mask.tile(queries, (0, 8)).visible()
    assert len(asked) == 36


def test_layers_share_what_was_evaluated() -> None:
    function = made.sliding_window_causal_mask_function(5)
    mask = lazy_mask(batch_size=1, q_length=64, kv_length=64, mask_function=function)
    first = mask.tile((32, 48), (16, 32))
    again = mask.tile((32, 48), (16, 32))
    assert first is again
    assert first.visible() is again.visible()


def test_what_is_kept_is_bounded_and_stays_right() -> None:
    side = 64
    asked: list[int] = []

    def theirs(batch: Any, head: Any, query: Any, key: Any) -> Any:
        asked.append(int(query.flatten()[0]))
        return (query + key) % 7 > 0

    cpu = torch.device("cpu")
    spans = [(index * side, (index + 1) * side) for index in range(8)]
    rule = Unknown(Extent(1, (0, 8 * side), (0, side), cpu), theirs)
    evaluator = Evaluator(1, cpu, room=4 * side * side + 1)
    for queries in spans:
        evaluator(rule, queries, (0, side))
        assert evaluator.used() <= 4 * side * side
    assert asked == [queries[0] for queries in spans]
    for queries in reversed(spans[4:]):
        evaluator(rule, queries, (0, side))
    assert len(asked) == 8, "the last four are still there"
    wanted = (torch.arange(side)[:, None] + torch.arange(side)) % 7 > 0
    assert torch.equal(evaluator(rule, spans[0], (0, side))[0, 0], wanted)
    evaluator(rule, spans[4], (0, side))
    evaluator(rule, spans[7], (0, side))
    assert asked[8:] == [0, 7 * side], "the one used longest ago gave its place"


def test_a_tile_larger_than_all_room_is_evaluated_every_time() -> None:
    evaluator = Evaluator(1, torch.device("cpu"), room=15)
    for _ in range(2):
        assert torch.equal(
            evaluator(Causal(), (0, 4), (0, 4))[0, 0], torch.ones(4, 4).tril().bool()
        )
        assert evaluator.used() == 0
