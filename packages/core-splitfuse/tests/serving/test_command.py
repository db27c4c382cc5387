"""``core serve`` as a process: it says where it listens, and ends without losing an answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from core.cli import main


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[tuple[Any, str]]:
    command = [sys.executable, "-m", "core", "serve", str(folder), "--port", "0", "--json"]
    with subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    ) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            yield process, told["address"]
        finally:
            process.kill()


@pytest.mark.parametrize("engine", [pytest.param("plain", marks=pytest.mark.nightly), "splitfuse"])
def test_sigterm_ends_the_server_after_the_answers(folder: Path, engine: str) -> None:
    with serving(folder, "--set", f"engine.name={engine}", CORE_API_KEY="k") as (process, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        fields: dict[str, Any] = {"max_tokens": 500, "logit_bias": {"0": -100}, "stream": True}
        stream = client.completions.create(model="tiny", prompt="the fox", **fields)
        chunks = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        refused = []
        for chunk in stream:
            chunks.append(chunk)
            if not refused:
                health = httpx.get(f"{address}/health").status_code
                refused += [503] if health == 503 else []
        assert refused == [503]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(20) == 0


def test_a_wrong_option_is_told_without_a_traceback(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, word in [
        (["--tool-format", "latin", str(folder)], "latin"),
        ([str(tmp_path)], "config.json"),
        (["--host", "203.0.113.7", str(folder)], "cannot listen"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--port", "0", *options])
        assert ended.value.code == 2
        assert word in capsys.readouterr().err


def test_an_open_address_without_a_key_is_warned_about(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--host", "203.0.113.7", "--port", "0", str(folder)])
    assert "no API key" in capsys.readouterr().err
