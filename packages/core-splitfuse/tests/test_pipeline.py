"""Texts in, texts out, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import core
from core.recipes.models import load_model
from core.recipes.tokens import load_tokenizer, train_tokenizer
from core.testing import tiny
from core_splitfuse import pipeline

TEXTS = ["def main(argument): return argument\n" * 3, "import os, sys\nprint('x')\n" * 3]
PROMPTS = ["def main(", "import ", "print('"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "tokenizer.json").write_text(train_tokenizer(TEXTS, 300), encoding="utf-8")
    model: Any = tiny.llama(vocab_size=320)
    model.save_pretrained(path)
    load_tokenizer(path).save_pretrained(path)
    return path


def by_transformers(folder: Path, prompt: str, new: int) -> list[int]:
    tokenizer: Any = load_tokenizer(folder)
    model: Any = load_model(folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [int(token) for token in out[0, ids.shape[1] :]]


def test_texts_are_those_of_transformers(folder: Path) -> None:
    tokenizer: Any = load_tokenizer(folder)
    with pipeline(folder, budget=8) as complete:
        answers = complete(PROMPTS, max_new_tokens=24)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert list(answer.ids) == by_transformers(folder, prompt, 24)
            assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
            assert "".join(complete.stream(prompt, max_new_tokens=24)) == answer.text
        assert complete.engine.stats().kv_used == 0


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(folder: Path) -> None:
    with pipeline(folder) as complete:
        (free,) = complete(PROMPTS[0], max_new_tokens=24)
        stop = free.text[5:8]
        (answer,) = complete(PROMPTS[0], stop=[stop], max_new_tokens=24)
        assert answer.text == free.text[: free.text.index(stop)]
        assert answer.finish == "stop"
        assert not complete.engine.busy


def test_a_stream_that_is_left_frees_its_memory(folder: Path) -> None:
    with pipeline(folder) as complete:
        stream = complete.stream(PROMPTS[0], max_new_tokens=64)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert complete.engine.stats().kv_used == 0


def test_bad_requests_are_refused_and_nothing_stays(folder: Path) -> None:
    with pipeline(folder) as complete:
        with pytest.raises(core.EngineError, match="do not fit"):
            complete([PROMPTS[0], "x" * 4000], max_new_tokens=8)
        assert not complete.engine.busy
        with pytest.raises(core.SettingsError, match="temperature"):
            complete(PROMPTS[0], temperature=-1)
    with pytest.raises(core.EngineError, match="tokenizer"):
        pipeline(tiny.llama())
