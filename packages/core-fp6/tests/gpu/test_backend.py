"""Which backend serves which device."""

from __future__ import annotations

import sys

import pytest
import torch

from core.errors import EngineError
from core_fp6 import ops


def test_processors_have_their_own() -> None:
    assert ops.backend(torch.device("cpu")).__name__ == "core_fp6.kernels.cpu"


def test_cuda_has_triton() -> None:
    pytest.importorskip("triton")
    assert ops.backend(torch.device("cuda")).__name__ == "core_fp6.kernels.gpu"


def test_other_devices_have_the_reference() -> None:
    assert ops.backend(torch.device("meta")).__name__ == "core_fp6.kernels.reference"


def test_without_triton_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("core_fp6.kernels.gpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delattr("core_fp6.kernels.gpu", raising=False)
    with pytest.raises(EngineError, match="pip install triton"):
        ops.backend(torch.device("cuda"))
