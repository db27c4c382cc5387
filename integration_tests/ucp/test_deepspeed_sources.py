"""Every kind of DeepSpeed run is read as what its engine held when it saved, bit for bit."""

from __future__ import annotations

import pytest
import torch
from ucp.deepspeed_cases import CASES, FAST, SLOW, Case
from ucp.deepspeed_runs import Lab
from ucp.reading import bits, replica, snapshot, tensor

from core_ucp.sources.deepspeed import detect, open_view
from core_ucp.view.keys import MODEL, OPTIMIZER, parse_key
from core_ucp.view.view import View

ALL = [
    *(pytest.param(case, id=case.name) for case in FAST),
    *(pytest.param(case, id=case.name, marks=pytest.mark.nightly) for case in SLOW),
]


def expected_of(truth: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masters and states; weights without masters and buffers as they compute."""
    exact = {key: value for key, value in truth.items() if not key.startswith("half.")}
    halves = {
        MODEL + key.removeprefix("half."): value
        for key, value in truth.items()
        if key.startswith("half.")
    }
    return halves | exact


@pytest.mark.parametrize("case", ALL)
def test_all_tensors(case: Case, lab: Lab) -> None:
    saved = lab.saved(case)
    view = open_view(saved.folder)
    view.prove()
    truth = saved.truth()
    assert snapshot(view) == {key: bits(value) for key, value in expected_of(truth).items()}
    for key, twin in view.twins.items():
        half = tensor(view, twin)
        assert bits(half) == bits(truth[f"half.{key.removeprefix(MODEL)}"])
        assert bits(half) == bits(tensor(view, view.atoms[key]).to(half.dtype))
    for atom in view.atoms.values():
        assert bits(replica(view, atom)) == bits(tensor(view, atom))
    view.files.require_unchanged()


@pytest.mark.parametrize("case", ALL)
def test_everything_else(case: Case, lab: Lab) -> None:
    saved = lab.saved(case)
    view, facts = open_view(saved.tag_folder), saved.facts
    resume = view.resume
    assert detect(saved.folder)
    assert detect(saved.tag_folder)
    assert resume.counters["global_steps"] == facts["global_steps"] == case.steps
    assert resume.counters["global_samples"] == facts["global_samples"]
    assert resume.optimizer == case.optimizer
    assert resume.client == {"tokens_seen": 12 * case.steps}
    assert resume.scaler.get("cur_scale") == (facts["scale"] if case.precision == "fp16" else None)
    assert resume.scheduler == facts["scheduler"]
    assert view.details["stage"] == case.stage
    assert view.mesh.get("tp", 1) == case.tp
    assert view.mesh.get("pp", 1) == case.pp
    assert view.mesh.get("ep", 1) == case.ep
    assert view.mesh["dp"] == case.world // (case.tp * case.pp) or case.stage == 0
    if case.pp == 1:
        owner = {"blocks": "embed.weight"}.get(case.model, "decoder.transformer.wte.weight")
        alias = {"blocks": "head.weight"}.get(case.model, "decoder.lm_head.weight")
        assert view.aliases == ({alias: owner} if case.tied else {})


@pytest.mark.parametrize(
    "name",
    ["zero1-dp2", "zero2-round-robin", "zero3-dp2", "stage0-fp32"]
    + [pytest.param(name, marks=pytest.mark.nightly) for name in ("zero3-fp16", "stage0-fp16")],
)
def test_settings_are_those_of_each_parameter(name: str, lab: Lab) -> None:
    saved = lab.saved(CASES[name])
    view = open_view(saved.folder)
    hyper = view.resume.hyper
    trained = {key.removeprefix(MODEL) for key in saved.truth() if key.startswith(MODEL)}
    assert set(hyper) == trained
    for parameter in trained:
        decays = view.atoms[MODEL + parameter].shape
        assert hyper[parameter]["weight_decay"] == (0.1 if len(decays) > 1 else 0.0)
        assert hyper[parameter]["lr"] > 0
        assert tuple(hyper[parameter]["betas"]) == (0.9, 0.999)
        assert "params" not in hyper[parameter]


@pytest.mark.nightly
def test_skipped_steps_are_no_steps_of_the_optimizer(lab: Lab) -> None:
    view = open_view(lab.saved(CASES["zero1-overflow"]).folder)
    skipped = view.resume.counters["skipped_steps"]
    assert skipped > 0
    assert view.resume.step == 5 - skipped
    assert not view.remarks


@pytest.mark.parametrize("name", ["zero3-dp2", "zero1-dp2"])
def test_every_parameter_has_a_step_of_its_own(name: str, lab: Lab) -> None:
    view = open_view(lab.saved(CASES[name]).folder)
    steps = {
        key: float(tensor(view, atom)) for key, atom in view.atoms.items() if key.endswith(".step")
    }
    assert set(steps.values()) == {3.0}
    assert len(steps) == sum(key.startswith(MODEL) for key in view.atoms) - 1  # a buffer has none


def test_states_belong_to_parameters(lab: Lab) -> None:
    for name in ("zero1-dp2", "moe", "pipeline", "zero1-autotp"):
        view = open_view(lab.saved(CASES[name]).folder)
        for key, atom in view.atoms.items():
            part = parse_key(key)
            assert part is not None
            if key.startswith(OPTIMIZER) and part.state != "step":
                assert atom.shape == view.atoms[MODEL + part.parameter].shape


def test_parameters_of_a_pipeline_come_in_the_order_of_its_stages(lab: Lab) -> None:
    view = open_view(lab.saved(CASES["pipeline"]).folder)
    weights = [key.removeprefix(MODEL) for key in view.atoms if key.startswith(MODEL)]
    assert list(view.resume.hyper) == weights


def test_nothing_is_read_but_heads(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from core_ucp.view.files import Files

    saved = lab.saved(CASES["zero1-dp2"])
    seen: list[int] = []
    plain = Files.read_into

    def counted(self: Files, index: int, offset: int, buffer: memoryview) -> None:
        seen.append(len(buffer))
        plain(self, index, offset, buffer)

    monkeypatch.setattr(Files, "read_into", counted)
    view: View = open_view(saved.folder)
    names = [view.files.path(index) for index in range(len(view.files))]
    assert {path.name for path in names} == {path.name for path in saved.tag_folder.glob("*.pt")}
    assert sum(seen) < 300_000
