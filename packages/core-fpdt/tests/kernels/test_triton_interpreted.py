"""The own kernels, run by Triton's interpreter: it has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
CASES = Path(__file__).parent / "interpreter"


@pytest.mark.parametrize("name", sorted(path.stem for path in CASES.glob("test_*.py")))
def test_cases_pass_in_the_interpreter(name: str, request: pytest.FixtureRequest) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, str(CASES / f"{name}.py")],
        cwd=request.config.rootpath,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
