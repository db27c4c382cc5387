"""The real server in front of a small model that writes what a test dictates, and a browser."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from core import Request
from core.engines.plain import PlainEngine
from core.recipes.tokens import train_tokenizer
from core.testing import tiny
from core_splitfuse.serving.app import create_app
from core_splitfuse.serving.loop import EngineLoop
from core_splitfuse.serving.served import Served
from core_splitfuse.serving.structured import Grammars, read_wanted

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHROMIUM = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Dictated:
    """A real engine, held to a text by a grammar, that takes its time.

    Args:
        engine: the real one.
        tokenizer: of its model.
        vocabulary: of its model.

    Attributes:
        texts: what it writes next, one after the other; anything at all after them.
        pause: seconds that every pass takes longer.
        prompts: what it was asked, as text.
    """

    def __init__(self, engine: Any, tokenizer: Any, vocabulary: int) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._grammars = Grammars(tokenizer, vocabulary, [tokenizer.eos_token_id])
        self.texts: list[str] = []
        self.pause = 0.0
        self.prompts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add(self, request: Request) -> int:
        self.prompts.append(self._tokenizer.decode(request.prompt))
        if self.texts:
            wanted = read_wanted({"guided_choice": [self.texts.pop(0)]})
            assert wanted is not None
            request = replace(request, constraint=self._grammars.compile(wanted).constraint())
        return self._engine.add(request)

    def step(self) -> Any:
        time.sleep(self.pause)
        return self._engine.step()


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """Serve: ``with start(api_key="k") as (address, engine)``."""
    described = train_tokenizer(["the quick brown fox " * 9], 300)

    @contextmanager
    def begin(
        response_template: dict[str, Any] | None = None, **options: Any
    ) -> Iterator[tuple[str, Dictated]]:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(described),
            eos_token="<|endoftext|>",
            chat_template=TEMPLATE,
            response_template=response_template,
        )
        size = len(tokenizer)
        model = tiny.llama(vocab_size=size, max_position_embeddings=2048, num_hidden_layers=1)
        engine = Dictated(PlainEngine(model), tokenizer, size)
        with EngineLoop(engine) as loop:
            served = Served.of(model, tokenizer, "tiny-writer")
            config = uvicorn.Config(
                create_app(loop, served, **options), port=0, log_level="warning", lifespan="off"
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run)
            thread.start()
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            try:
                port = server.servers[0].sockets[0].getsockname()[1]
                yield f"http://127.0.0.1:{port}/", engine
            finally:
                server.should_exit = server.force_exit = True
                thread.join()

    return begin


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without a screen, as a selenium driver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    for flag in [*CHROMIUM, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield made
    finally:
        made.quit()


class Page:
    """The chat page as somebody at the keyboard has it."""

    def __init__(self, browser: Any, address: str, engine: Dictated) -> None:
        self.browser = browser
        self.engine = engine
        browser.get_log("browser")
        browser.get(address)

    def at(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def wait(self, what: Callable[[], Any], seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < end, "it does not come to hold"
            time.sleep(0.02)
        return found

    def hidden(self, selector: str) -> bool:
        return not self.at(selector).is_displayed()

    def type(self, *keys: str) -> None:
        self.at("#input").send_keys(*keys)

    def say(self, text: str) -> None:
        self.wait(lambda: self.at("#model").text == "tiny-writer")
        self.type(text, "\ue007")

    def answered(self, count: int) -> str:
        """Wait until there are so many answers, and return the last one's text."""
        self.wait(lambda: len(self.all(".message.assistant .facts")) == count)
        return str(self.all(".message.assistant .body")[-1].text)

    def picture(self, path: Path) -> None:
        self.browser.save_screenshot(str(path))


@pytest.fixture
def open_page(browser: Any, start: Callable[..., Any]) -> Iterator[Callable[..., Page]]:
    """Serve with the given options, and open the page."""
    with ExitStack() as stack:
        yield lambda **options: Page(browser, *stack.enter_context(start(**options)))


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page()
