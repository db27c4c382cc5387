"""Beam search finds what transformers' own finds, and shares what beams have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import core
from core.engines import Request
from core.engines.plain import PlainEngine
from core.testing import tiny
from core_splitfuse import Engine, beam_search

PROMPT = tiny.prompts(5)[4]


def by_transformers(model: Any, beams: int, stop: int | None, **options: Any) -> list[list[int]]:
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
        **options,
    )
    rows = [row[len(PROMPT) :].tolist() for row in out]
    return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPTNeoX"])
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_the_beams_are_those_of_transformers(family: str, beams: int) -> None:
    model = tiny.build(family)
    with Engine(model, block_size=4) as engine:
        found = beam_search(engine, PROMPT, beams, max_new_tokens=10)
        assert [list(beam.ids) for beam in found] == by_transformers(model, beams, None)
        assert engine.stats().reused_tokens > 0
        assert engine.stats().kv_used == 0
    scores = [beam.score for beam in found]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("early", [False, True])
def test_beams_end_as_those_of_transformers(penalty: float, early: bool) -> None:
    model = tiny.llama()
    with PlainEngine(model) as engine:
        free = beam_search(engine, PROMPT, 4, max_new_tokens=10)
        stop = free[1].ids[5]
        found = beam_search(
            engine,
            PROMPT,
            4,
            max_new_tokens=10,
            stop_ids=[stop],
            length_penalty=penalty,
            early_stopping=early,
        )
    wanted = by_transformers(model, 4, stop, length_penalty=penalty, early_stopping=early)
    assert penalty > 1 or any(stop in row for row in wanted)
    assert list(found[0].ids) == wanted[0]


def test_what_cannot_be_searched_is_refused() -> None:
    with Engine(tiny.llama()) as engine:
        with pytest.raises(core.EngineError, match="33 beams"):
            beam_search(engine, PROMPT, 33, max_new_tokens=2)
        with pytest.raises(core.EngineError, match="empty"):
            beam_search(engine, [], 2, max_new_tokens=2)
        engine.add(Request(prompt=PROMPT))
        with pytest.raises(core.EngineError, match="busy"):
            beam_search(engine, PROMPT, 2, max_new_tokens=2)
