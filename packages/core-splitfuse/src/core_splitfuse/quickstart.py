"""The step of this package in core's quickstart: the trained model serves several clients at once."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from core import Row
from core.engines.common import evaluating
from core.errors import EngineError

if TYPE_CHECKING:
    from pathlib import Path

    from core import Run
    from core.recipes.quickstart import Tour

CLIENTS = 8
_PROMPT, _NEW, _ROUNDS = 48, 32, 3
_START = 120.0
"""Seconds that the server may take to start."""


@dataclass(frozen=True)
class _Round:
    """What clients saw: all their texts, and the seconds until each had its own."""

    texts: list[str]
    seconds: list[float]

    @property
    def rate(self) -> float:
        """Tokens a second over all clients."""
        return CLIENTS * _NEW / max(self.seconds)


def serve_clients(run: Run, tour: Tour) -> Iterator[Row]:
    """Let clients complete held-out code at the same time, by ``core serve`` and by ``generate``.

    Raises:
        EngineError: when the server does not start, or says something else than ``generate``.
    """
    prompts: list[list[int]] = tour.data.held_out[:CLIENTS, :_PROMPT].tolist()
    ours: list[_Round] = []
    plain: list[_Round] = []
    with _server(tour.folder / "model") as address:
        _at_once(address, prompts)  # not measured: everything is compiled and loaded after it
        for _ in range(_ROUNDS):
            plain.append(_one_by_one(tour, prompts))
            ours.append(_at_once(address, prompts))
        metrics = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    same = sum(a == b for a, b in zip(ours[-1].texts, plain[-1].texts, strict=True))
    if same < CLIENTS:
        raise EngineError(
            f"{CLIENTS - same} of {CLIENTS} answers of the server differ from model.generate"
        )
    yield _speed(ours, plain)
    yield _wait(ours, plain)
    yield Row(
        what="answers of the server that model.generate gives, too",
        ours=f"{same} of {CLIENTS}",
        note=f"greedy, {_PROMPT} tokens of held-out code and {_NEW} new ones; "
        f"{_count(metrics, 'generation_tokens_total')} tokens by its /metrics",
    )


def _speed(ours: Sequence[_Round], plain: Sequence[_Round]) -> Row:
    mine, theirs = (statistics.median(each.rate for each in rounds) for rounds in (ours, plain))
    return Row(
        what=f"tokens per second, {CLIENTS} clients at once",
        ours=f"{mine:,.0f} a second, {mine / theirs:.1f}x",
        plain=f"{theirs:,.0f} a second",
        note=f"plain way: model.generate, one after the other; median of {_ROUNDS} rounds in turn",
    )


def _wait(ours: Sequence[_Round], plain: Sequence[_Round]) -> Row:
    """The slowest of so few clients is their tail."""
    slowest, median = (
        statistics.median(of(a.seconds) / of(b.seconds) for a, b in zip(plain, ours, strict=True))
        for of in (max, statistics.median)
    )
    return Row(
        what="wait of the slowest client, and of the median one",
        ours=f"1/{slowest:.1f}, 1/{median:.1f}",
        plain="1, 1",
        note="until the answer is complete; over HTTP, with the plain way inside the process",
    )


@contextmanager
def _server(model: Path) -> Generator[str]:
    """The address of ``core serve``, which runs inside the ``with`` block."""
    command = [sys.executable, "-m", "core", "serve", str(model), "--port", "0", "--json"]
    settings = ("--set", "engine.name=splitfuse")
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, *settings], stdout=pipe, stderr=pipe, text=True) as process:
        killer = threading.Timer(_START, process.kill)
        killer.start()
        try:
            assert process.stdout is not None and process.stderr is not None  # noqa: PT018
            line = process.stdout.readline()
            killer.cancel()
            if not line:
                why = process.stderr.read().strip().splitlines()[-1:]
                raise EngineError("core serve did not start", why="".join(why))
            yield str(json.loads(line)["address"])
        finally:
            killer.cancel()
            process.terminate()


def _at_once(address: str, prompts: Sequence[Sequence[int]]) -> _Round:
    """Every prompt from a client of its own."""
    texts, seconds = [""] * len(prompts), [0.0] * len(prompts)
    failures: list[Exception] = []

    def client(index: int) -> None:
        body = {"prompt": list(prompts[index]), "max_tokens": _NEW, "temperature": 0}
        data = json.dumps({"model": "model", "ignore_eos": True, **body}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", data, headers)
        begin = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                texts[index] = json.load(answer)["choices"][0]["text"]
        except Exception as error:
            failures.append(error)
        seconds[index] = time.perf_counter() - begin

    clients = [threading.Thread(target=client, args=(index,)) for index in range(len(prompts))]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    if failures:
        raise EngineError("a client of core serve got no answer", why=str(failures[0]))
    return _Round(texts, seconds)


def _one_by_one(tour: Tour, prompts: Sequence[Sequence[int]]) -> _Round:
    """The same, each when the one before has ended."""
    model: Any = tour.model
    tokenizer: Any = tour.data.tokenizer
    device = next(model.parameters()).device
    texts: list[str] = []
    seconds: list[float] = []
    begin = time.perf_counter()
    with evaluating(model):
        for prompt in prompts:
            ids = torch.tensor([prompt], device=device)
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            whole = tokenizer.decode(made[0], skip_special_tokens=True)
            texts.append(whole[len(tokenizer.decode(prompt, skip_special_tokens=True)) :])
            seconds.append(time.perf_counter() - begin)
    return _Round(texts, seconds)


def _count(metrics: str, name: str) -> int:
    lines = (line for line in metrics.splitlines() if name in line and not line.startswith("#"))
    return int(float(next(lines, "0 0").rsplit(" ", 1)[1]))
