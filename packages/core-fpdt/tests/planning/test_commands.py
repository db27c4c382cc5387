"""``core fpdt plan`` and ``probe``: what a user sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from core.cli import cli, main
from core.testing.tiny import llama
from core_fpdt.commands import fpdt

HEADLINE = ("--model", "llama-3-8b", "--sequence", "2M", "--gpus", "4", "--hbm", "80GiB")


def run(*arguments: str) -> Result:
    root = click.Group("core", params=list(cli.params))
    root.add_command(fpdt)
    return CliRunner().invoke(root, ["fpdt", *arguments], catch_exceptions=False)


def test_the_headline_as_a_table() -> None:
    said = run("plan", *HEADLINE, "--host", "1TiB")
    assert said.exit_code == 0, said.output
    for text in (
        "fits             yes",
        "then the host is full",
        "residual stream",
        "by model FLOPs",
    ):
        assert text in said.output


def test_the_headline_as_json() -> None:
    said = run("plan", *HEADLINE, "--host", "1TiB", "--json")
    found: dict[str, Any] = json.loads(said.output)
    assert found["fits"]
    assert found["limit"] == "host"
    assert found["longest"] >= 2 * 2**20
    assert found["device_bytes"] == pytest.approx(sum(found["device_parts"].values()))
    assert found["step_seconds"] == pytest.approx(
        sum(phase["seconds"] for phase in found["phases"].values())
    )


def test_what_does_not_fit_says_so() -> None:
    said = run("plan", *HEADLINE, "--host", "1TiB", "--exact")
    assert said.exit_code == 1
    assert "fits             NO" in said.output
    assert "advice: the host lacks" in said.output


def test_settings_are_heeded() -> None:
    arguments = ("--host", "1TiB", "--json", "--set", "fpdt.chunk_tokens=65536")
    found = json.loads(run("plan", *HEADLINE, *arguments).output)
    assert found["chunk_tokens"] == 65536
    more = (
        "--set",
        "fpdt.keep_output=0",
        "--set",
        "fpdt.order=key",
        "--set",
        "fpdt.keep_keys=false",
    )
    found = json.loads(run("plan", *HEADLINE, *arguments, *more).output)
    assert (found["keep_output"], found["order"], found["keep_keys"]) == (0, "key", False)


def test_options_of_the_machine_are_heeded() -> None:
    options = ("--device", "h100", "--node", "2", "--link", "10GB", "--sharing", "2")
    found = json.loads(run("plan", *HEADLINE, "--host", "1TiB", *options, "--json").output)
    assert found["device"] == "h100"
    assert found["host_bytes_per_node"] == pytest.approx(2 * found["host_bytes"])
    fast = json.loads(run("plan", *HEADLINE, "--host", "1TiB", *options[:4], "--json").output)
    transfer = [each["phases"]["forward"]["transfer"] for each in (found, fast)]
    assert transfer[0] == pytest.approx(10 * transfer[1])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"memory.{suffix}"
    said = run("plan", *HEADLINE, "--host", "1TiB", "--plot", str(picture))
    assert said.exit_code == 0
    assert f"wrote {picture}" in said.output
    assert picture.stat().st_size > 10_000
    if suffix == "svg":
        assert "attention outputs" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--model", "llama-3-8c", "--sequence", "2M"), "did you mean 'llama-3-8b'"),
        (("--model", "llama-3-8b", "--sequence", "2X"), "is no number of tokens"),
        (("--model", "llama-3-8b", "--sequence", "2M", "--hbm", "big"), "is no number of bytes"),
        (("--model", "llama-3-8b", "--sequence", "2M", "--device", "h10"), "did you mean"),
        (("--model", "llama-3-8b", "--sequence", "2M", "--set", "fpdt.order=up"), "fpdt.order"),
        (
            ("--model", "llama-3-8b", "--sequence", "2M", "--plot", "plan.bmp"),
            "no picture can be drawn into plan.bmp",
        ),
        (
            ("--model", "llama-3-8b", "--sequence", "2M", "--gpus", "0"),
            "Invalid value for '--gpus'",
        ),
    ],
)
def test_wrong_input_is_one_clear_error(
    arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fpdt", "plan", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert text in said
    assert "Traceback" not in said


def test_probing_a_folder(tmp_path: Path) -> None:
    model: Any = llama(num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    said = run("probe", str(tmp_path))
    assert said.exit_code == 0, said.output
    assert "LlamaDecoderLayer  same" in said.output


def test_probing_as_json() -> None:
    said = run("probe", "tiny:Qwen3", "--json")
    assert said.exit_code == 0, said.output
    (found,) = json.loads(said.output)
    assert found == {"layer": 0, "kind": "Qwen3DecoderLayer", "alike": 3, "reason": ""}


@pytest.mark.parametrize("name", ["tiny:Nothing", "nowhere/at/all", "family:preset"])
def test_probing_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fpdt", "probe", name])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_has_examples() -> None:
    for command in ((), ("plan",), ("probe",)):
        said = run(*command, "--help")
        assert said.exit_code == 0
        assert "Example:" in said.output
