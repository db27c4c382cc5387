"""Commands as a user calls them, and folders of tiny models to call them with."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.cli import main
from core.recipes.models import quiet_transformers
from core.testing import tiny


@dataclass(frozen=True)
class Said:
    """What a command has said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of standard output, which has to be one JSON value."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one clear error on standard error, of a command that says nothing else."""
        assert self.code == 2, self
        assert not self.out, self
        assert "Traceback" not in self.err, self
        return self.err


def call(*words: object) -> Said:
    """Call ``core``; an exception that no user should see goes through."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture
def core() -> Callable[..., Said]:
    """Calls the command line as a user does: exit status, standard output, standard error."""
    return call


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 4},
}
"""Changes to the tiny models that are written into folders."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes folders of tiny models, in several shards, which nobody changes."""
    quiet_transformers()
    made: dict[str, Path] = {}

    def folder(family: str = "Llama", **changes: Any) -> Path:
        key = f"{family}{changes}"
        if key not in made:
            model: Any = tiny.build(family, **{**FAMILIES.get(family, {}), **changes})
            made[key] = tmp_path_factory.mktemp("models") / "model"
            model.save_pretrained(made[key], max_shard_size="30KB")
            (made[key] / "notes.txt").write_text("kept")
        return made[key]

    return folder
