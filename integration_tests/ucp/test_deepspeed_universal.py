"""What DeepSpeed's own converter makes is read where it is right, and refused where it is wrong."""

from __future__ import annotations

import pytest
from ucp.deepspeed_cases import CASES
from ucp.deepspeed_runs import Lab, RunError
from ucp.reading import snapshot

from core.errors import CheckpointError
from core_ucp.sources.deepspeed import detect, open_view
from core_ucp.view.keys import MODEL

FAST = ("zero1-dp2", "zero3-dp2", "zero3-frozen", "zero1-autotp")
SLOW = (
    "zero1-dp4-fp16",
    "zero1-tied",
    "zero1-aligned",
    "zero1-gpt2",
    "zero1-fp32",
    "zero2-frozen",
    "zero3-dp4-fp32",
    "zero3-fp16",
    "zero3-llama",
    "zero1-autotp-dp2",
    "zero3-autotp",
    "pipeline",
    "pipeline-dp2",
)


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.nightly) for name in SLOW)]
)
def test_it_is_the_same_as_the_checkpoint(name: str, lab: Lab) -> None:
    case = CASES[name]
    folder = lab.universal(case)
    assert detect(folder)
    assert detect(folder.parent)
    view, original = open_view(folder), open_view(lab.saved(case).folder)
    view.prove()
    assert snapshot(view) == snapshot(original)
    assert view.aliases == original.aliases
    assert set(view.twins) in (set(original.twins), set())
    assert view.resume.step == original.resume.step
    assert view.resume.counters == original.resume.counters
    assert view.resume.scheduler == original.resume.scheduler
    assert view.resume.scaler == original.resume.scaler
    assert view.resume.optimizer == original.resume.optimizer
    if case.tp * case.pp == 1:
        assert view.resume.hyper == original.resume.hyper


def test_weights_that_the_converter_has_confused_are_refused(lab: Lab) -> None:
    case = CASES["zero2-round-robin"]
    folder = lab.universal(case)
    with pytest.raises(CheckpointError, match=r"\d+ of \d+ differ .* confused their order"):
        open_view(folder)
    open_view(lab.saved(case).folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stage0-fp32", "optim_states.pt"),
        ("moe", "invalid for input of size"),
        pytest.param("zero1-sgd", "exp_avg", marks=pytest.mark.nightly),
        pytest.param("zero3-sgd", "exp_avg", marks=pytest.mark.nightly),
        pytest.param("moe-dp4", "invalid for input of size", marks=pytest.mark.nightly),
    ],
)
def test_where_the_converter_fails_we_read_the_checkpoint(name: str, reason: str, lab: Lab) -> None:
    with pytest.raises(RunError, match=reason):
        lab.universal(CASES[name])
    open_view(lab.saved(CASES[name]).folder).prove()


def test_what_the_converter_loses_is_in_the_checkpoint(lab: Lab) -> None:
    case = CASES["zero3-frozen"]
    folder = lab.universal(case)
    frozen = MODEL + "blocks.0.up.weight"
    assert not (folder / "zero" / "blocks.0.up.weight").exists()
    assert frozen in open_view(lab.saved(case).folder).atoms
    assert frozen in open_view(folder).atoms  # from the copied files beside


def test_a_universal_folder_without_the_common_file(lab: Lab, tmp_path_factory: object) -> None:
    assert isinstance(tmp_path_factory, pytest.TempPathFactory)
    from ucp.deepspeed_runs import copy

    folder = copy(lab.universal(CASES["zero3-dp2"]), tmp_path_factory.mktemp("cut") / "u")
    (folder / "zero" / "head.weight" / "fp32.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"head\.weight/fp32\.pt is no archive"):
        open_view(folder)
