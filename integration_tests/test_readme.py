"""What the READMEs show works as it stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from workspace import ROOT, Page, packages

from core.contributions import MODEL, Transform
from core.hooks import Hooks
from core.testing import tiny
from core.testing.fixtures import make_run, plugin_of

README = Page(ROOT / "README.md")
TRAIN, RESUME, PLUGIN = README.blocks("python")


def given() -> dict[str, Any]:
    """The model and the batches that the examples speak of."""
    return {"model": tiny.llama().train(), "loader": [tiny.batch(seed) for seed in range(3)]}


def test_the_training_example_trains_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = given()
    before = names["model"].lm_head.weight.detach().clone()
    README.run(names, TRAIN)
    trained = names["model"].lm_head.weight.detach().clone()
    assert not trained.equal(before)
    assert (tmp_path / "runs/mine/checkpoints/step-00000003/manifest.json").is_file()

    names["model"].lm_head.weight.data.zero_()
    README.run(names, RESUME)
    assert names["model"].lm_head.weight.equal(trained)
    assert capsys.readouterr().out == "going on after step 3\n"


def test_the_training_example_takes_few_lines_of_core() -> None:
    assert sum("run" in line or "core" in line for line in TRAIN.splitlines()) < 10


def test_the_plugin_example_is_a_plugin(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    README.run(names, PLUGIN)
    plugins = plugin_of(names["Plugin"](), "hello")
    (found,) = plugins.collect_from(["hello"], Hooks.core_transforms, None)
    assert isinstance(found.value, Transform)
    with make_run(tmp_path, plugins=plugins, enable=["hello"]) as run:
        model = run.apply(MODEL, tiny.llama())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("package", packages(), ids=lambda path: path.name)
def test_the_example_of_a_package_runs(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Page(package / "README.md")
    names = given()
    for block in page.blocks("python"):
        page.run(names, block)


def test_the_two_commands_are_those_of_the_workspace() -> None:
    assert README.text.index("-m nox -s demo") < README.text.index("python3 -m nox  ")
    assert 'python3 -m pip install "nox[uv]" && python3 -m nox' in (ROOT / ".ci/run").read_text()


def test_the_table_names_every_package() -> None:
    for package in packages():
        row = f"| [`{package.name}`](packages/{package.name}/README.md) |"
        (line,) = [line for line in README.text.splitlines() if line.startswith(row)]
        assert line.endswith("| here |")
    for line in README.text.splitlines():
        if line.endswith("| planned |"):
            assert not (ROOT / "packages" / line.split("`")[1]).exists()
