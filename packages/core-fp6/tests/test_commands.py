"""``core fp6 quantize``, ``dequantize``, ``inspect`` and ``compare``: what a user sees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from core.recipes.tokens import train_tokenizer
from core.testing import tiny

Core = Callable[..., Any]
Folders = Callable[..., Path]

TEXT = "The quick brown fox jumps over the lazy dog, and none of it matters.\n\n" * 60


@pytest.fixture(name="six")
def _six(core: Core, folders: Folders, tmp_path: Path) -> Path:
    """A quantized folder that a test may change."""
    said = core("fp6", "quantize", folders(), tmp_path / "six", "--group-size", "32")
    assert said.code == 0, said
    return tmp_path / "six"


@pytest.fixture(name="speaking", scope="session")
def _speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, and a text."""
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("speaking")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(train_tokenizer([TEXT], 300)), eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder / "model")
    model: Any = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=64)
    model.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change the section of the quantization."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def replace_tensor(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change one tensor of a folder with a single file; leave it out where None comes back."""
    file = folder / "model.safetensors"
    content = load_file(file)
    made = change(content.pop(name))
    save_file(content if made is None else {**content, name: made}, file, {"format": "pt"})


# Help


@pytest.mark.parametrize("command", ["quantize", "dequantize", "inspect", "compare"])
def test_help_shows_an_example(core: Core, command: str) -> None:
    said = core("fp6", command, "--help")
    assert said.code == 0
    assert f"core fp6 {command} " in said.out


# quantize and dequantize


def test_quantize_tells_what_it_did(core: Core, folders: Folders, tmp_path: Path) -> None:
    said = core("fp6", "quantize", folders(), tmp_path / "six")
    assert said.code == 0
    assert "e2m3-g128" in said.out
    assert "lm_head: the output layer" in said.out
    assert f"wrote {tmp_path / 'six'}" in said.out
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "six").config.quantization_config
    assert (found.format, found.group_size) == ("e2m3", 128)


def test_quantize_as_json(core: Core, folders: Folders, tmp_path: Path) -> None:
    words = (
        "--format",
        "e3m2",
        "--group-size",
        "0",
        "--skip",
        "o_proj",
        "--skip",
        "model.layers.0",
    )
    found = core("fp6", "quantize", folders(), tmp_path / "six", *words, "--json").json
    assert found["scheme"] == "e3m2-row"
    assert 0 < found["coverage"] < 1
    assert found["bytes_after"] < found["bytes_before"]
    assert "model.layers.2.self_attn.o_proj" in found["left_out"]
    assert not [name for name in found["quantized"] if "o_proj" in name or "layers.0" in name]


def test_settings_are_the_defaults(
    core: Core, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORE_FP6__GROUP_SIZE", "64")
    words = ("--set", "fp6.format=e3m2", "--json")
    assert core("fp6", "quantize", folders(), tmp_path / "a", *words).json["scheme"] == "e3m2-g64"
    said = core("fp6", "quantize", folders(), tmp_path / "b", *words, "--group-size", "32")
    assert said.json["scheme"] == "e3m2-g32"


def test_there_and_back(core: Core, folders: Folders, six: Path, tmp_path: Path) -> None:
    said = core("fp6", "dequantize", six, tmp_path / "plain", "--dtype", "bfloat16")
    assert said.code == 0
    assert f"wrote {tmp_path / 'plain'}" in said.out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype == torch.bfloat16
    found = core("fp6", "dequantize", six, tmp_path / "again", "--json").json
    assert found["bytes"] == sum(
        t.nbytes for t in load_file(tmp_path / "again" / "model.safetensors").values()
    )


def test_text_makes_other_scales(core: Core, speaking: Path, tmp_path: Path) -> None:
    source = speaking / "model"
    words = ("--group-size", "32", "--text", speaking / "text.txt")
    said = core("fp6", "quantize", source, tmp_path / "searched", *words)
    assert said.code == 0, said
    assert core("fp6", "quantize", source, tmp_path / "plain", *words[:2]).code == 0
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors") for name in ("searched", "plain")
    )
    assert ours.keys() == theirs.keys()
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    assert not torch.equal(ours[scale], theirs[scale])
    assert core("fp6", "inspect", tmp_path / "searched").code == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "searched")
    assert (tmp_path / "searched" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "e2m2"), "'e2m2' is not one of 'e2m3', 'e3m2'"),
        (("--group-size", "100"), "'100' is not one of '0', '32', '64', '128', '256'"),
        (("--skip", "no_such"), "no module of the model matches it"),
        (("--skip", "*"), "it is no pattern"),
        (("--set", "fp6.group_size=7"), "fp6.group_size = 7"),
        (("--text", "absent.txt"), "no tokenizer"),
    ],
)
def test_wrong_options_are_one_clear_error(
    core: Core, folders: Folders, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    said = core("fp6", "quantize", folders(), tmp_path / "six", *words)
    assert message in said.error
    assert (
        core("fp6", "quantize", folders(), tmp_path / "six", *words, "--json").error == said.error
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_targets_that_cannot_be_are_refused(
    core: Core, folders: Folders, six: Path, tmp_path: Path, command: str
) -> None:
    source = folders() if command == "quantize" else six
    (tmp_path / "taken").mkdir()
    assert "exists already" in core("fp6", command, source, tmp_path / "taken").error
    assert "overlap" in core("fp6", command, source, source / "inside").error
    assert (
        "absent does not exist" in core("fp6", command, tmp_path / "absent", tmp_path / "x").error
    )
    other = six if command == "quantize" else folders()
    expected = "quantized already" if command == "quantize" else "no six-bit weights"
    assert expected in core("fp6", command, other, tmp_path / "x").error
    assert not (tmp_path / "x").exists()


def test_missing_arguments_are_told(core: Core) -> None:
    assert "Missing argument 'SOURCE'" in core("fp6", "quantize").error
    assert "Missing argument 'TARGET'" in core("fp6", "dequantize", "x").error
    assert "no such command" in core("fp6", "qantize").error.lower()


# inspect


def test_inspect_shows_the_truth(core: Core, six: Path) -> None:
    said = core("fp6", "inspect", six)
    assert said.code == 0
    assert "a scale for groups of 32" in said.out
    assert "model.layers.0.mlp.down_proj.weight" in said.out
    found = core("fp6", "inspect", six, "--json").json
    content = load_file(six / "model.safetensors")
    assert found["nbytes"] == sum(tensor.nbytes for tensor in content.values())
    assert (found["format"], found["group_size"], found["layout_version"]) == ("e2m3", 32, 1)
    assert found["skipped"] == ["lm_head"]
    assert len(found["weights"]) == sum(name.endswith("_hi") for name in content) == 21
    assert found["bits_per_weight"] == pytest.approx(6.5, abs=0.05)
    assert not found["faults"]


def test_long_lists_are_cut(core: Core, folders: Folders, tmp_path: Path) -> None:
    core("fp6", "quantize", folders("Mixtral"), tmp_path / "six")
    assert "... and 8 more; --all shows them" in core("fp6", "inspect", tmp_path / "six").out
    whole = core("fp6", "inspect", tmp_path / "six", "--all").out
    assert whole.count("experts.3") == 9
    assert "--all" not in whole


WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (WEIGHT, lambda t: t[:, :-2].contiguous(), "is not part of a e2m3-g32 weight"),
        (f"{WEIGHT}_hi", lambda t: None, f"lacks {WEIGHT}_hi"),
        (f"{WEIGHT}_hi", lambda t: t.to(torch.int8), "is torch.int8"),
        (f"{WEIGHT}_scale", lambda t: t * 0, "scales are finite and positive"),
        (f"{WEIGHT}_scale", lambda t: t / 0, "scales are finite and positive"),
        (f"{WEIGHT}_scale", lambda t: t.float(), "is torch.float32"),
        (
            "model.norm.weight",
            lambda t: t[1:].contiguous(),
            "model.norm.weight is of another model",
        ),
    ],
)
def test_inspect_finds_what_cannot_be_right(
    core: Core, six: Path, name: str, change: Callable[[Any], Any], message: str
) -> None:
    replace_tensor(six, name, change)
    said = core("fp6", "inspect", six)
    assert said.code == 1
    assert "WRONG" in said.out
    assert message in said.out
    faults = core("fp6", "inspect", six, "--json")
    assert faults.code == 1
    assert len(faults.json["faults"]) == 1
    assert core("fp6", "dequantize", six, six.parent / "plain").error
    assert not (six.parent / "plain").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout_version": 9}, "layout_version 9"),
        ({"format": "e9m9"}, "no format e9m9"),
        ({"format": 5}, "format 5"),
        ({"group_size": 33}, "no group size 33"),
        ({"skip": 3}, "skip 3"),
        ({"colour": "red"}, "no field 'colour'"),
        ({"self": 1}, "quantization_config"),
        ({"quant_method": "gptq"}, "config.json names gptq"),
    ],
)
def test_a_configuration_that_lies_is_refused(
    core: Core, six: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(six, **changes)
    assert message in core("fp6", "inspect", six).error
    assert core("fp6", "dequantize", six, six.parent / "plain").error


def test_a_file_that_is_cut_short_is_refused(core: Core, six: Path) -> None:
    file = six / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "its header says" in core("fp6", "inspect", six).error


# compare


def test_compare_measures_and_draws(core: Core, speaking: Path, tmp_path: Path) -> None:
    words = ("--text", speaking / "text.txt", "--sequences", "3")
    names = ("e2m3-g128", "e3m2-row", "e2m3-g128-calibrated")
    chosen = [word for name in names for word in ("--variant", name)]
    picture = tmp_path / "quality.png"
    said = core("fp6", "compare", speaking / "model", *words, *chosen, "--plot", picture)
    assert said.code == 0, said
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name in ("unquantized", *names):
        assert name in said.out
    found = core("fp6", "compare", speaking / "model", *words, *chosen, "--json").json
    scores = {score["variant"]: score for score in found["scores"]}
    assert 0 < scores["e2m3-g128"]["kl"] < scores["e3m2-row"]["kl"]


def test_compare_refuses_what_it_cannot_measure(
    core: Core, speaking: Path, folders: Folders, six: Path, tmp_path: Path
) -> None:
    model, text = speaking / "model", speaking / "text.txt"
    assert "no variant 'fp5'" in core("fp6", "compare", model, "--variant", "fp5").error
    assert "absent is no model" in core("fp6", "compare", tmp_path / "absent").error
    assert "no tokenizer" in core("fp6", "compare", folders(), "--text", text).error
    assert (
        "absent does not exist"
        in core("fp6", "compare", model, "--text", tmp_path / "absent").error
    )
    assert (
        "Invalid value for '--sequences'" in core("fp6", "compare", model, "--sequences", 0).error
    )
    short = tmp_path / "short.txt"
    short.write_text("two\n\nwords")
    assert core("fp6", "compare", model, "--text", short).error
    shutil.copy(model / "tokenizer.json", six)
    shutil.copy(model / "tokenizer_config.json", six)
    assert "quantized already" in core("fp6", "compare", six, "--text", text).error
