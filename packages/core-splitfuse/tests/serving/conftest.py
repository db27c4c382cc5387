"""A small model, a tokenizer, and real servers in front of real engines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from core.engines.plain import PlainEngine
from core.testing import tiny
from core_splitfuse.serving.app import create_app
from core_splitfuse.serving.loop import EngineLoop
from core_splitfuse.serving.served import Served

VOCABULARY = 512
CONTEXT = 512
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = (
    "the quick brown fox jumps over the lazy dog and then it sleeps for a while",
    "def main():\n    print('hello world')\n    return {'answer': 42}\n",
    "naïve café e\u0301 a\u0308 — “quoted” … 日本語 한국어 ελληνικά русский",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 😀😃 hi 👩‍🚀 there",
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in whose vocabulary most emoji are several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    fields: Any = {"num_hidden_layers": 2, "eos_token_id": 0}
    return tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, **fields)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: Any, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Model and tokenizer as a folder in the Hugging Face layout."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def plain(model: Any) -> Any:
    return PlainEngine(model)


def splitfuse(model: Any) -> Any:
    from core_splitfuse import Engine, SplitFuseSettings

    return Engine(model, SplitFuseSettings(kv_tokens=4096))


ENGINES: dict[str, Callable[[Any], Any]] = {"plain": plain, "splitfuse": splitfuse}


@dataclass
class Live:
    """A server that listens."""

    address: str
    loop: EngineLoop
    served: Served
    key: str = "none"
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.address, timeout=60)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.address}/v1", api_key=self.key, max_retries=0, timeout=60
        )

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics by name and labels other than the model's name."""
        from prometheus_client.parser import text_string_to_metric_families

        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                labels = [v for k, v in sample.labels.items() if k != "model_name"]
                found[":".join([sample.name, *labels])] = sample.value
        return found

    def settle(self, what: Callable[[], bool], seconds: float = 20) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it does not come to hold"
            time.sleep(0.01)


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an application on a free port, in a thread."""
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture(scope="session")
def start(model: Any, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """Start a server in front of an engine: ``with start(engine, max_waiting=2) as live``."""

    @contextmanager
    def begin(
        engine: Any,
        *,
        max_waiting: int = 256,
        stuck_after: float = 60,
        tokenizer: Any = tokenizer,
        **options: Any,
    ) -> Iterator[Live]:
        served = Served.of(model, tokenizer, "tiny", context=engine.stats().kv_total)
        with EngineLoop(engine, max_waiting=max_waiting, stuck_after=stuck_after) as loop:
            app = create_app(loop, served, **options)
            with listening(app) as address:
                yield Live(address, loop, served, options.get("api_key", "none"))

    return begin


@pytest.fixture(scope="session", params=list(ENGINES))
def live(request: pytest.FixtureRequest, model: Any, start: Callable[..., Any]) -> Iterator[Live]:
    """One server for each engine, for all tests that only ask."""
    with start(ENGINES[request.param](model), default_tokens=48) as server:
        yield server


class Slowed:
    """A real engine whose passes take longer, wait, or fail, as a test wants.

    Args:
        engine: the real one.
        pause: seconds that every pass takes longer.

    Attributes:
        failures: passes that fail from now on.
        error: with what.
        hold: passes wait until it is set.
    """

    def __init__(self, engine: Any, pause: float = 0.0) -> None:
        self._engine = engine
        self.pause = pause
        self.failures = 0
        self.error: BaseException = RuntimeError("a kernel failed")
        self.hold = threading.Event()
        self.hold.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> Any:
        self.hold.wait()
        time.sleep(self.pause)
        if self.failures:
            self.failures -= 1
            raise self.error
        return self._engine.step()


@pytest.fixture(params=list(ENGINES))
def slowed(request: pytest.FixtureRequest, model: Any) -> Slowed:
    return Slowed(ENGINES[request.param](model))
