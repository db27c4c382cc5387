"""Who computes a block: by device, by what is asked for, and never in silence somebody else."""

from __future__ import annotations

import pytest
import torch

from core.errors import ModelError, SettingsError
from core_fpdt.kernels.casting import same_dtype
from core_fpdt.kernels.choosing import KERNELS, choose, table
from core_fpdt.kernels.contract import Scores
from core_fpdt.masks.tiles import Kind, Tile
from core_fpdt.settings import FPDTSettings

CPU = torch.device("cpu")
FULL = Tile(Kind.FULL, (0, 19), (0, 19))


def names(kernels) -> list[str]:
    return [kernel.name for kernel in kernels]


@pytest.mark.parametrize(
    ("kind", "capability", "wanted"),
    [
        ("cpu", (0, 0), ["cpu_flash", "reference"]),
        ("cuda", (7, 5), ["reference"]),
        ("cuda", (8, 0), ["aten_flash", "triton", "reference"]),
        ("cuda", (8, 9), ["aten_flash", "triton", "reference"]),
        ("cuda", (9, 0), ["cudnn", "aten_flash", "triton", "reference"]),
        ("cuda", (10, 0), ["cudnn", "aten_flash", "triton", "reference"]),
        ("cuda", (0, 0), ["reference"]),
        ("mps", (0, 0), ["reference"]),
    ],
)
def test_tables_by_device(kind, capability, wanted) -> None:
    assert names(table(kind, capability)) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_auto_on_cpus(dtype, attention) -> None:
    chooser = choose("auto", CPU, dtype)
    case = attention(dtype=dtype)
    assert chooser(*case.inputs, FULL, case.scores).name == "cpu_flash"
    assert chooser(*case.inputs, FULL, Scores(1.0, 30.0)).name == "reference"


def test_auto_leaves_out_what_cannot_have_the_dtype(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    device = torch.device("cuda", 99)  # capabilities are remembered
    assert names(choose("auto", device, torch.float64).kernels) == ["reference"]
    with pytest.raises(ModelError, match="not torch.float64"):
        choose("cudnn", device, torch.float64)
    for dtype in (torch.bfloat16, torch.float32):  # which autocast may cast
        found = names(choose("auto", device, dtype).kernels)
        assert found[:2] == ["cudnn", "aten_flash"]
        assert found[-1] == "reference"


def test_a_kernel_that_was_asked_for_is_never_replaced(attention) -> None:
    chooser = choose("cpu_flash", CPU, torch.float32)
    case = attention(dtype=torch.float32)
    assert chooser(*case.inputs, FULL, case.scores).name == "cpu_flash"
    with pytest.raises(
        ModelError, match="cpu_flash does not compute a full block: it has no softcap"
    ):
        chooser(*case.inputs, FULL, Scores(1.0, 30.0))


@pytest.mark.parametrize("name", ["aten_flash", "cudnn"])
def test_kernels_of_other_devices_are_refused_at_once(name: str) -> None:
    with pytest.raises(ModelError, match="it runs on CUDA devices, not on cpu") as caught:
        choose(name, CPU, torch.bfloat16)
    assert "auto" in caught.value.fix


def test_names_are_those_of_the_settings() -> None:
    from typing import get_args, get_type_hints

    known = get_args(get_type_hints(FPDTSettings)["kernel"])
    assert {"auto", *KERNELS} == set(known)
    with pytest.raises(SettingsError, match="no kernel is called 'flash'"):
        choose("flash", CPU, torch.float32)


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        ((torch.float32, torch.float32, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float32, torch.float32), torch.bfloat16),
        ((torch.float16, torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float64, torch.float64, torch.float64), torch.float64),
    ],
)
def test_one_dtype_for_all(dtypes, wanted, attention) -> None:
    given = [x.to(dtype) for x, dtype in zip(attention().inputs, dtypes, strict=True)]
    made = same_dtype(*given)
    assert {x.dtype for x in made} == {wanted}
    assert all(x is y for x, y in zip(given, made, strict=True) if x.dtype == wanted)
