"""A batch means what it means to a model of transformers that is given all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from core.errors import DataError
from core_fpdt.parallel.batches import read_batch

IDS = torch.arange(1, 13).view(2, 6)


def test_positions_count_from_0_in_one_document() -> None:
    read = read_batch({"input_ids": IDS})
    assert read.positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert read.documents.tolist() == [[0] * 6] * 2
    assert read.targets is None
    assert (read.rows, read.length, read.learnt) == (2, 6, 0)


@given(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=6), min_size=1, max_size=3))
def test_documents_are_those_that_transformers_finds(packs: list[list[int]]) -> None:
    length = max(map(sum, packs))
    rows = [[*pack, length - sum(pack)] if sum(pack) < length else pack for pack in packs]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    read = read_batch({"input_ids": torch.ones_like(positions), "position_ids": positions})
    expected = find_packed_sequence_indices(positions)
    if expected is None:  # a single document in every row
        expected = torch.zeros_like(positions)
    assert read.documents.long().equal(expected)
    assert read.positions is positions


def test_a_mask_is_padding_and_hides_that_positions_start_again() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    read = read_batch({"input_ids": IDS, "position_ids": positions, "attention_mask": mask})
    assert read.documents.tolist() == [[-1, -1, 0, 0, 0, 0], [0, 0, 0, 0, 0, -1]]


def test_labels_are_shifted_across_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    labels = IDS.clone()
    labels[1, 3] = -100
    read = read_batch({"input_ids": IDS, "labels": labels, "position_ids": positions})
    assert read.targets is not None
    assert read.targets.tolist() == [[2, 3, 4, 5, 6, -100], [8, 9, -100, 11, 12, -100]]
    assert read.learnt == 9


def test_labels_that_are_shifted_stay_as_they_are() -> None:
    read = read_batch({"input_ids": IDS, "labels": IDS, "shift_labels": IDS + 1})
    assert read.targets is not None
    assert read.targets.equal(IDS + 1)


@pytest.mark.parametrize(
    ("hidden", "ignored", "learnt"),
    [((3, 6), (4, 6), 0), ((3, 6), (5, 6), 1), ((0, 3), (0, 0), 0), ((2, 3), (2, 3), 1)],
)
def test_padding_that_sees_tokens_predicts_nothing(
    hidden: tuple[int, int], ignored: tuple[int, int], learnt: int
) -> None:
    mask, labels = torch.ones(1, 6), IDS[:1].clone()
    mask[:, slice(*hidden)] = 0
    labels[:, slice(*ignored)] = -100
    whole = {"input_ids": IDS[:1], "labels": labels, "attention_mask": mask}
    if not learnt:
        assert read_batch(whole).learnt == int((labels[:, 1:] != -100).sum())
        return
    with pytest.raises(DataError, match=f"{learnt} tokens of padding have something to predict"):
        read_batch(whole)


def test_what_runs_along_the_sequence_is_told_from_the_rest() -> None:
    more = {
        "token_type_ids": torch.zeros(2, 6),
        "one_row": torch.zeros(1, 6, 3),
        "three_rows": torch.zeros(3, 6),
        "short": torch.zeros(2, 5),
        "flat": torch.zeros(6),
        "use_cache": False,
    }
    read = read_batch({"input_ids": IDS, **more})
    assert set(read.along) == {"input_ids", "token_type_ids", "one_row"}
    assert set(read.rest) == {"three_rows", "short", "flat", "use_cache"}


def test_embeddings_are_sequences_too() -> None:
    read = read_batch({"inputs_embeds": torch.zeros(2, 6, 4)})
    assert (read.rows, read.length, set(read.along)) == (2, 6, {"inputs_embeds"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"input_ids": None}, "no sequences to share: its input_ids or inputs_embeds are NoneType"),
        ({"input_ids": torch.ones(6)}, "no sequences to share"),
        ({"input_ids": torch.ones(2, 0)}, "no sequences to share"),
        ({"input_ids": torch.ones(0, 6)}, "no sequences to share"),
        ({"labels": IDS[:, :5]}, "labels does not fit to 2 sequences of 6 tokens: it is (2, 5)"),
        ({"labels": [1, 2]}, "labels does not fit to 2 sequences of 6 tokens: it is list"),
        ({"shift_labels": IDS[:, :5]}, "shift_labels does not fit"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask does not fit"),
        ({"attention_mask": torch.ones(3, 6)}, "attention_mask does not fit"),
        ({"position_ids": torch.ones(3, 2, 6)}, "position_ids does not fit"),
        ({"num_items_in_batch": torch.ones(2)}, "num_items_in_batch is not one number"),
        ({"num_items_in_batch": 0}, "num_items_in_batch is 0"),
        ({"num_items_in_batch": float("nan")}, "num_items_in_batch is nan"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError) as refused:
        read_batch({"input_ids": IDS, **change})
    assert told in str(refused.value)
