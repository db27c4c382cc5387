"""Text, tokens, their order, and the baseline that is counted on them."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import core
from core.recipes import corpus
from core.recipes.optim import learning_rate_factor
from core.recipes.settings import TrainSettings
from core.recipes.tokens import Order, prepare
from core.recipes.trigram import Trigram


def test_files_folders_and_json_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert sorted(corpus.documents([str(tmp_path)], 0)) == ["one", "three", "two"]
    assert corpus.documents([str(tmp_path)], 0) == corpus.documents([str(tmp_path)], 0)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jsonl", '{"text": "a"}\n{"txet": "b"}', "line 2"),
        ("x.jsonl", "not json\n", "line 1"),
        ("x.txt", "", "too little text"),
        ("x.bin", "a", "holds no text"),
    ],
)
def test_bad_text_is_one_clear_error(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(core.DataError, match=reason):
        corpus.documents([str(tmp_path)], 0)
    with pytest.raises(core.DataError, match="does not exist"):
        corpus.documents([str(tmp_path / "absent")], 0)


def test_a_single_document_can_still_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"part {i}" for i in range(100)))
    training, held = corpus.split(corpus.documents([str(tmp_path / "a.txt")], 0), 0.05)
    assert held
    assert training
    assert not set(training) & set(held)


def test_the_standard_library_is_always_there() -> None:
    texts = corpus.documents([corpus.STDLIB], 0)
    assert sum(len(text) for text in texts) > 3_000_000


def test_too_little_text_for_a_batch_says_what_to_do(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("hello world " * 5)
    train = {"text": [str(tmp_path)], "vocabulary": 257}
    with (
        core.start(folder=tmp_path / "run", train=train) as run,
        pytest.raises(core.DataError, match=r"lower train\.sequence_length"),
    ):
        prepare(run, run.settings(TrainSettings))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_epoch_shows_every_sequence_once(count: int, batch: int, seed: int) -> None:
    sequences = torch.arange(count)[:, None]
    order = Order(sequences, batch, seed)
    seen = torch.cat([order.batch(step) for step in range(3 * count)]).flatten().tolist()
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert torch.equal(Order(sequences, batch, seed).batch(5), order.batch(5))


def test_the_schedule_warms_up_and_cools_down() -> None:
    wanted = TrainSettings(steps=100, warmup_steps=10, final_learning_rate=0.1)
    factors = [learning_rate_factor(step, wanted) for step in range(101)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert max(factors) == 1
    assert factors[-1] == pytest.approx(0.1)


def slow_trigram(training: list[list[int]], held: list[list[int]], size: int) -> float:
    """The same interpolation, written down one token at a time."""
    unigram, bigram, trigram = (
        Counter[int](),
        Counter[tuple[int, ...]](),
        Counter[tuple[int, ...]](),
    )
    for row in training:
        unigram.update(row)
        bigram.update(pairwise(row))
        trigram.update(zip(row, row[1:], row[2:], strict=False))

    def backed(
        table: Counter[tuple[int, ...]], context: tuple[int, ...], t: int, p: float
    ) -> float:
        total = sum(n for key, n in table.items() if key[:-1] == context)
        kinds = sum(1 for key in table if key[:-1] == context)
        return (table[(*context, t)] + kinds * p) / (total + kinds) if total else p

    everything = sum(unigram.values()) + size
    losses = []
    for row in held:
        for index in range(1, len(row)):
            one = (unigram[row[index]] + 1) / everything
            two = backed(bigram, (row[index - 1],), row[index], one)
            context = (row[index - 2], row[index - 1])
            three = backed(trigram, context, row[index], two) if index > 1 else two
            losses.append(-math.log(three))
    return sum(losses) / len(losses)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_trigram_is_an_interpolated_trigram(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    training = torch.randint(0, 5, (6, 7), generator=generator)
    held = torch.randint(0, 5, (3, 6), generator=generator)
    expected = slow_trigram(training.tolist(), held.tolist(), 5)
    assert Trigram(training, 5).loss(held) == pytest.approx(expected, rel=1e-9)


def test_the_trigram_is_a_distribution() -> None:
    training = torch.randint(0, 4, (5, 8), generator=torch.Generator().manual_seed(1))
    model = Trigram(training, 4)
    two_contexts = [(0, 1), (3, 3)]
    for a, b in two_contexts:
        rows = torch.tensor([[a, b, token] for token in range(4)])
        single = torch.tensor([[a, b]])
        each = [2 * model.loss(row[None]) - model.loss(single) for row in rows]
        assert sum(math.exp(-loss) for loss in each) == pytest.approx(1)


def test_settings_of_a_run_can_be_given_again(tmp_path: Path) -> None:
    with core.start(folder=tmp_path, train={"steps": 3, "config": {"rope_theta": 5.0}}) as run:
        run.write_description()
        first = run.settings(TrainSettings)
    with core.start(tmp_path / "settings.json", folder=tmp_path) as again:
        assert again.settings(TrainSettings) == first
    assert json.loads((tmp_path / "plan.json").read_text())["plan"] == []
