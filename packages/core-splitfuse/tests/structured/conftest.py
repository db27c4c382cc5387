"""A tokenizer with all bytes, and tiny random models with as many token ids, and with more."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from core import Request, Sampling, generate
from core.engines.plain import PlainEngine
from core.recipes.tokens import train_tokenizer
from core.testing import tiny
from core_splitfuse import Engine, SplitFuseSettings
from core_splitfuse.serving.structured import Grammars, read_wanted

VOCABULARY = 384
PADDED = 400  # Models often have more rows than their tokenizer has tokens.


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    text = (
        inspect.getsource(json) + '{"name": "Ada", "tags": ["a", "b"], "size": 1.5, "on": true}' * 9
    )
    made = Tokenizer.from_str(train_tokenizer([text], VOCABULARY))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def grammars(tokenizer: PreTrainedTokenizerFast) -> Grammars:
    return Grammars(tokenizer, PADDED, [tokenizer.eos_token_id])


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny.llama(
        vocab_size=PADDED, num_hidden_layers=1, hidden_size=16, max_position_embeddings=4096
    )


@pytest.fixture
def answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, grammars: Grammars
) -> Callable[..., list[tuple[str, str]]]:
    """Random answers of a random model: (text, why it ended) of each seed."""

    def ask(
        body: dict[str, Any], seeds: range, most: int = 1500, engine: str = "splitfuse"
    ) -> list[tuple[str, str]]:
        grammar = grammars.compile(read_wanted(body))
        ends = (tokenizer.eos_token_id,)
        # Without this, most of the test would be white space between the tokens of the JSON.
        blank = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isspace()]
        requests = [
            Request(
                prompt=[1 + seed % 90],
                constraint=grammar.constraint(ends),
                sampling=Sampling(
                    temperature=2.0,
                    seed=seed,
                    stop_ids=ends,
                    max_new_tokens=most,
                    logit_bias=dict.fromkeys(blank, -9.0),
                ),
            )
            for seed in seeds
        ]
        if engine == "plain":
            runs: Any = PlainEngine(model)
        else:
            runs = Engine(model, SplitFuseSettings(kv_tokens=len(seeds) * (most + 32)))
        made = generate(runs, requests)
        runs.close()
        return [
            (tokenizer.decode(answer.ids, skip_special_tokens=True), answer.finish)
            for answer in made
        ]

    return ask
