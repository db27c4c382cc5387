"""Both type checkers find the mistakes of plugin authors, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("correct.py", "mistakes.py", "functions.py")
Lines = dict[str, set[int]]


def expected(file: str) -> set[int]:
    lines = (HERE / file).read_text(encoding="utf-8").splitlines()
    return {number for number, line in enumerate(lines, 1) if line.endswith("# error")}


def mypy(cache: Path) -> Lines:
    found: Lines = {file: set() for file in FILES}
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=mypy.ini", f"--cache-dir={cache}", *FILES],
        cwd=HERE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr
    for line in ended.stdout.splitlines():
        match = re.match(r"(\w+\.py):(\d+): error:", line)
        if match:
            found[match[1]].add(int(match[2]))
    return found


def pyright(cache: Path) -> Lines:
    found: Lines = {file: set() for file in FILES}
    settings = {"typeCheckingMode": "strict", "pythonVersion": "3.11"}
    (cache / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    for file in FILES:
        shutil.copy(HERE / file, cache)
    ended = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=cache, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode in (0, 1), ended.stdout + ended.stderr
    for problem in json.loads(ended.stdout)["generalDiagnostics"]:
        if problem["severity"] == "error":
            line = problem["range"]["start"]["line"] + 1
            found[Path(problem["file"]).name].add(line)
    return found


@pytest.fixture(scope="module", params=[mypy, pyright], ids=lambda checker: checker.__name__)
def checked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    checker: Callable[[Path], Lines] = request.param
    if find_spec(checker.__name__) is None:
        pytest.skip(f"{checker.__name__} is not installed")
    return checker(tmp_path_factory.mktemp(checker.__name__))


@pytest.mark.parametrize(("file", "count"), [("mistakes.py", 9), ("functions.py", 5)])
def test_every_mistake_is_found_and_nothing_else(checked: Lines, file: str, count: int) -> None:
    assert len(expected(file)) == count
    assert checked[file] == expected(file)


def test_a_correct_plugin_has_no_error(checked: Lines) -> None:
    assert checked["correct.py"] == set()
