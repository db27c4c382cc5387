"""A planted fault fails the check that is there for it, with a message that names it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from core import (
    BATCH,
    MODEL,
    CheckpointFormat,
    Description,
    EngineType,
    Hooks,
    ModelError,
    ModelFamily,
    Phase,
    Probe,
    Reading,
    Recipe,
    Settings,
    Storage,
    Token,
    Transform,
    hookimpl,
)
from core.attention import attention
from core.builtin import Builtin
from core.checkpoints.dcp import DcpReader
from core.engines.plain import PlainEngine
from core.errors import CoreError, EngineError, PluginError
from core.plugins import Plugins
from core.storage import FileSink, FileSource, publish
from core.testing import contract, tiny
from core.testing.contract import Outcome, Subject
from core.testing.fixtures import plugin_of


def outcome(instance: object, check: str, name: str = "bad") -> Outcome:
    """What one check says of a plugin in memory."""
    plugins = instance if isinstance(instance, Plugins) else plugin_of(instance, name)
    chosen = [c for c in contract.checks([check.partition(".")[0]]) if c.name == check]
    (found,) = contract.run_checks(Subject(name, plugins), chosen)
    return found


def assert_fails(instance: object, check: str, message: str) -> None:
    found = outcome(instance, check)
    assert (found.status, message in found.text) == ("fail", True), found


def yielding(hook: str, *values: object) -> Hooks:
    """A plugin whose hook yields the given contributions."""

    def yields(self: object) -> tuple[object, ...]:
        return values

    def yields_for_a_run(self: object, run: object) -> tuple[object, ...]:
        return values

    chosen = yields_for_a_run if hook == "core_transforms" else yields
    chosen.__name__ = hook
    kind = type("Yielding", (Hooks,), {hook: hookimpl(chosen)})
    made: Hooks = kind()
    return made


# Contributions and settings


def nothing(*args: object, **kwargs: object) -> Any:
    return {}


def test_wrong_kind_of_contribution() -> None:
    assert_fails(
        yielding("core_engines", Reading(name="x", status="ok")), "contributions.kinds", "a Reading"
    )
    assert_fails(
        yielding("core_settings", int), "contributions.kinds", "no dataclass of core.Settings"
    )
    assert_fails(yielding("core_commands", 3), "contributions.kinds", "yields a int")


def test_names_and_summaries() -> None:
    bad = yielding("core_recipes", Recipe(name="Train_It", summary="Trains", main=nothing))
    assert_fails(bad, "contributions.names", "'Train_It' (recipes)")
    assert_fails(bad, "contributions.summaries", "'Train_It': 'Trains'")
    good = yielding("core_recipes", Recipe(name="train-it", summary="Trains.", main=nothing))
    assert outcome(good, "contributions.summaries").status == "ok"


def test_two_of_one_name() -> None:
    recipe = Recipe(name="twice", summary="Runs.", main=nothing)
    assert_fails(yielding("core_recipes", recipe, recipe), "contributions.unique", "'twice'")


def test_lambda_does_not_pickle() -> None:
    recipe = Recipe(name="local", summary="Runs.", main=lambda run: {})
    assert_fails(yielding("core_recipes", recipe), "contributions.picklable", "no lambdas")


@dataclass(frozen=True, kw_only=True)
class Undocumented(Settings):
    size: int = 3


@dataclass(frozen=True, kw_only=True)
class Required(Settings):
    size: int
    """Size."""


@dataclass
class Loose(Settings):
    __pydantic_config__ = {"extra": "ignore", "use_attribute_docstrings": True}  # noqa: RUF012
    size: int = 3
    """Size."""


@dataclass(frozen=True, kw_only=True)
class Unstable(Settings):
    size: int = 0
    """Size."""

    def __post_init__(self) -> None:
        if self.size > 0:
            object.__setattr__(self, "size", self.size + 1)


@pytest.mark.parametrize(
    ("kind", "check", "message"),
    [
        (Undocumented, "settings.documented", "no docstring below size"),
        (Required, "settings.defaults", "give every field a default"),
        (Loose, "settings.frozen", "frozen=True"),
        (Loose, "settings.unknown-key", "accepts unknown keys"),
        (Unstable, "settings.round-trip", "became"),
    ],
)
def test_settings(kind: type[Settings], check: str, message: str) -> None:
    assert_fails(yielding("core_settings", kind), check, message)


# Probes and commands


def raising(run: object) -> Any:
    raise RuntimeError("no disk")


def unknown_status(run: object) -> Any:
    yield Reading(name="disk", status="bad")  # type: ignore[arg-type]


def mute(run: object) -> Any:
    yield Reading(name="disk", status="warn")


def slow(run: object) -> Any:
    time.sleep(0.05)
    yield Reading(name="disk", status="ok")


@pytest.mark.parametrize(
    ("measure", "check", "message"),
    [
        (raising, "probes.never-raise", "raises RuntimeError: no disk"),
        (nothing, "probes.never-raise", "gives no reading"),
        (unknown_status, "probes.readings", "status 'bad'"),
        (mute, "probes.advice", "'disk'"),
        (slow, "probes.fast", "say slow=True"),
    ],
)
def test_probes(measure: Any, check: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.testing.contract.probes.LIMIT", 0.04)
    assert_fails(
        yielding("core_probes", Probe(name="disk", summary="Looks.", measure=measure)),
        check,
        message,
    )


def test_slow_probes_are_not_run() -> None:
    probe = Probe(name="disk", summary="Looks.", measure=raising, slow=True)
    found = outcome(yielding("core_probes", probe), "probes.never-raise")
    assert (found.status, found.text) == ("skip", "all probes are slow: disk")


# Models and transforms


def broken_family(preset: str, overrides: Any) -> Any:
    return "no module"


def careless_family(preset: str, overrides: Any) -> nn.Module:
    return nn.Linear(2, 2)


def test_model_families() -> None:
    def family(build: Any) -> Hooks:
        made = ModelFamily(name="f", summary="Builds.", presets=("a",), build=build)
        return yielding("core_models", made)

    assert_fails(family(broken_family), "models.presets", "f:a is a str, no module")
    assert_fails(family(careless_family), "models.unknown-override", "ignores an unknown")


def returns_none(model: nn.Module, run: object) -> Any:
    return None


def returns_text(model: nn.Module, run: object) -> Any:
    class Text(str):  # weakly referable, unlike str
        pass

    return Text("changed")


def draws_unseeded(model: nn.Module, run: object) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).mul_(1 + time.perf_counter_ns() % 1000 / 1000)
    return model


def steals_attention(model: Any, run: object) -> nn.Module:
    model.set_attn_implementation(
        "eager" if model.config._attn_implementation != "eager" else "sdpa"
    )
    return model


class _Scaled(nn.Module):
    """Multiplies by a number that is in no state."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args: Any) -> Any:
        return self.inner(*args) * self.factor


def hides_state(model: Any, run: object) -> nn.Module:
    model.lm_head = _Scaled(model.lm_head, float(model.lm_head.weight.sum()))
    return model


def refuses_all(model: nn.Module, run: object) -> nn.Module:
    raise ModelError("not this one", why="it is tiny")


def transforming(apply: Any, *claims: str, stage: Any = MODEL) -> Hooks:
    made = Transform(
        stage=stage, name="change", apply=apply, phase=Phase.KERNEL, claims=frozenset(claims)
    )
    return yielding("core_transforms", made)


@pytest.mark.parametrize(
    ("apply", "check", "message"),
    [
        (returns_none, "transforms.returns", "returned None"),
        (returns_text, "transforms.returns", "turns LlamaForCausalLM into a Text"),
        (draws_unseeded, "transforms.same-seed", "the weights differ"),
        (steals_attention, "transforms.claims", "changes attention of LlamaForCausalLM"),
        (hides_state, "transforms.state-dict", "not in the state"),
    ],
)
def test_transforms(apply: Any, check: str, message: str) -> None:
    assert_fails(transforming(apply), check, message)


def test_second_application(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.plan._refuse_twice", lambda *args: None)
    assert_fails(transforming(unchanged), "transforms.twice", "can be applied twice")


def unchanged(subject: Any, run: object) -> Any:
    return subject


def shuffles(batch: Any, run: object) -> Any:
    return {"input_ids": batch["input_ids"] + time.perf_counter_ns() % 1000}


def test_batches() -> None:
    bad = transforming(shuffles, stage=BATCH)
    assert_fails(bad, "transforms.batches", "two results for one batch")
    assert outcome(transforming(unchanged, stage=BATCH), "transforms.batches").status == "ok"


def test_refused_models_are_skipped_with_the_reason() -> None:
    found = outcome(transforming(refuses_all), "transforms.returns")
    assert found.status == "skip"
    assert "'change' refuses llama: it is tiny" in found.text


def test_unknown_claims_are_a_warning() -> None:
    found = outcome(transforming(unchanged, "kettle"), "transforms.claims")
    assert (found.status, "'kettle'" in found.text) == ("warn", True)


# Attention and positions


def deaf_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
) -> tuple[Any, None]:
    """Causal attention that ignores its mask, and with it padding and windows."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    causal = query.shape[2] > 1
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return out.transpose(1, 2), None


def detached_attention(module: Any, query: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query.detach(), *args, **kwargs)


def test_attention_that_ignores_its_mask() -> None:
    from transformers.masking_utils import sdpa_mask

    bad = attention("bad_deaf", deaf_attention, sdpa_mask, verify=False)
    assert_fails(yielding("core_transforms", bad), "attention.equivalent", "layer 0")


def test_attention_without_gradients() -> None:
    from transformers.masking_utils import sdpa_mask

    bad = yielding("core_transforms", attention("bad_detached", detached_attention, sdpa_mask))
    assert outcome(bad, "attention.equivalent").status == "ok"
    assert_fails(bad, "attention.gradients", "the gradient of")


def test_attention_that_is_never_called() -> None:
    assert_fails(transforming(unchanged, "attention"), "attention.called", "still uses 'sdpa'")


def test_positions_without_a_policy() -> None:
    assert_fails(transforming(unchanged, "positions"), "attention.policy", "no policy is in force")


# Checkpoints and storages


def format_of(**changed: Any) -> Hooks:
    """DCP, with something wrong in it."""
    (dcp,) = [f for f in Builtin().core_checkpoints() if f.name == "dcp"]
    parts = {"detect": dcp.detect, "reader": dcp.reader, "writer": dcp.writer, **changed}
    made: Any = CheckpointFormat(name="bad", summary="Holds tensors.", **parts)
    return yielding("core_checkpoints", made)


class _Zeros(DcpReader):
    """Reads nothing, and keeps it to itself."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        done: Any = torch.futures.Future()
        done.set_result(None)
        return done


class _Crashing(DcpReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_metadata(*args, **kwargs)
        except CoreError:
            raise EOFError("ran out of input") from None


class _Greedy(FileSystemWriter):
    """Stages nothing, so that later steps reach the file."""

    def stage(self, state_dict: Any) -> Any:
        return state_dict


class _Whole(FileSystemWriter):
    """Takes the tensors from the planner's state, which a conversion never holds as a whole."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        assert all(torch.is_tensor(tensor) for tensor in planner.state_dict.values())
        return super().write_data(plan, planner)


def _whole(path: Path, run: object) -> Any:
    return _Whole(path, thread_count=1)


def _zeros(path: Path, run: object) -> Any:
    return _Zeros(path)


def _crashing(path: Path, run: object) -> Any:
    return _Crashing(path)


def _greedy(path: Path, run: object) -> Any:
    return _Greedy(path, thread_count=1)


def _every_folder(path: Path) -> bool:
    return path.is_dir()


def _never(path: Path) -> bool:
    return False


@pytest.mark.parametrize(
    ("changed", "check", "message"),
    [
        ({"reader": _zeros}, "formats.round-trip", "changes a checkpoint"),
        ({"reader": _zeros}, "formats.damaged", "wrong tensors"),
        ({"reader": _crashing}, "formats.damaged", "raises EOFError, no CoreError"),
        ({"detect": _every_folder}, "formats.ignores-others", "takes an empty folder"),
        ({"detect": _never}, "formats.recognises-own", "does not recognise"),
        ({"detect": _never}, "formats.unambiguous", "is taken for 'dcp'"),
        ({}, "formats.unambiguous", "looks like bad, dcp; does it extend another format?"),
        ({"writer": _whole}, "formats.streams", "converting to 'bad' raises AttributeError"),
        ({"reader": _zeros}, "formats.streams", "changes tensors that are converted"),
        ({"writer": _greedy}, "saves.stable", "the state after a later step"),
    ],
)
def test_formats(changed: Any, check: str, message: str) -> None:
    assert_fails(format_of(**changed), check, message)


class _Copying:
    """Makes safetensors files of a DCP folder, and perhaps something else of them."""

    def __init__(self, source: Path, **changed: Any) -> None:
        self.source, self.changed = source, changed
        self.tensors, self.nbytes, self.skipped, self.remarks = 3, 12, (), ("made",)

    def describe(self) -> dict[str, Any]:
        return self.changed.get("facts", {})

    def write(self, folder: Path, progress: Any) -> None:
        from safetensors.torch import save_file
        from torch.distributed.checkpoint import format_utils

        format_utils.dcp_to_torch_save(self.source, folder / "all.pt")
        tensors = torch.load(folder / "all.pt")
        (folder / "all.pt").unlink()
        tensors = {name: tensor + self.changed.get("add", 0) for name, tensor in tensors.items()}
        if self.changed.get("short"):
            tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
        save_file(tensors, folder / self.changed.get("name", "model.safetensors"))


def _made(changed: dict[str, Any], **parts: Any) -> Hooks:
    def convert(source: Path, fmt: object, run: object) -> Any:
        if changed.get("refuse"):
            raise CoreError("cannot be", why="it is Tuesday")
        if changed.get("crash"):
            raise KeyError("x")
        return _Copying(source, **changed)

    made = CheckpointFormat(
        name="bad", summary="Holds tensors.", detect=_never, convert=convert, **parts
    )
    return yielding("core_checkpoints", made)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"add": 1}, "'bad' changes bits"),
        ({"name": "model.bin"}, "nobody reads what 'bad' makes"),
        ({"facts": {"what": object()}}, "not as JSON"),
        ({"crash": True}, "raises KeyError, no CoreError"),
    ],
)
def test_conversions_of_their_own(changed: dict[str, Any], message: str) -> None:
    assert_fails(_made(changed), "formats.converts", message)


@pytest.mark.parametrize("changed", [{}, {"short": True}])
def test_conversions_that_hold_every_bit(changed: dict[str, Any]) -> None:
    assert outcome(_made(changed), "formats.converts").status == "ok"


def test_conversions_that_are_refused() -> None:
    found = outcome(_made({"refuse": True}), "formats.converts")
    assert (found.status, "it is Tuesday" in found.text) == ("skip", True)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Description(step=-1), "step -1 is no count"),
        (Description(values={"loader": object()}), "'bad' describes 'loader'"),
        (Description(values={"w": torch.ones(2)}), "'w', which holds a tensor"),
        (Description(step=3, values={"lr": 0.5}), ""),
    ],
)
def test_descriptions(said: Description, message: str) -> None:
    def describe(path: Path, run: object) -> Description:
        return said

    def detect(path: Path) -> bool:
        return (path / "mine.safetensors").is_file()

    bad = _made({"name": "mine.safetensors"})
    (made,) = bad.core_checkpoints()
    found = yielding("core_checkpoints", replace(made, detect=detect, describe=describe))
    if message:
        assert_fails(found, "formats.describes", message)
    else:
        assert outcome(found, "formats.describes").status == "ok"


class _Private(FileSink):
    """Keeps a folder of its own, and renames it."""

    def __init__(self, path: Path) -> None:
        self._final = path
        super().__init__(path.with_name(f"{path.name}.tmp-{id(self)}"))

    def commit(self) -> None:
        super().commit()
        publish(self.path, self._final)


class _Littering(FileSink):
    def abort(self) -> None:
        self._close()


class _Sweeping(FileSink):
    """Takes the folder for its own."""

    def abort(self) -> None:
        super().abort()
        for path in self.path.iterdir():
            path.unlink()


class _Overwriting(FileSink):
    def open(self, name: str, size: int) -> None:
        (self.path / name).unlink(missing_ok=True)
        super().open(name, size)


class _Unfinished(FileSink):
    """Forgets a buffer."""

    def write_at(self, name: str, offset: int, data: Any) -> None:
        super().write_at(name, offset, data[:-1])


class _Unchecked(FileSink):
    def write_at(self, name: str, offset: int, data: Any) -> None:
        try:
            super().write_at(name, offset, data)
        except CoreError:
            return


class _Padding(FileSource):
    def read_into(self, name: str, offset: int, buffer: Any) -> None:
        try:
            super().read_into(name, offset, buffer)
        except CoreError:
            return


@pytest.mark.parametrize(
    ("changed", "check", "message"),
    [
        ({"sink": _Unfinished}, "storages.commit", "leaves a wrong data"),
        ({"sink": _Private}, "storages.shared", "exists already"),
        ({"sink": _Littering}, "storages.abort", "leaves dropped"),
        ({"sink": _Sweeping}, "storages.abort", "leaves no kept"),
        ({"sink": _Overwriting}, "storages.no-overwrite", "overwrites a file"),
        ({"sink": _Unchecked}, "storages.out-of-range", "accepts 4 bytes at 2"),
        ({"source": _Padding}, "storages.truncated", "reads 6 bytes at 0 of a file of 5"),
    ],
)
def test_storages(changed: Any, check: str, message: str) -> None:
    parts = {"sink": FileSink, "source": FileSource, **changed}
    storage = Storage(name="bad", summary="Moves bytes.", **parts)
    assert_fails(yielding("core_checkpoints", storage), check, message)


# Engines


class _Stale(PlainEngine):
    """Runs on a copy of the model."""

    def __init__(self, model: nn.Module) -> None:
        import copy

        super().__init__(copy.deepcopy(model))


class _Forgetful(PlainEngine):
    """Starts every step from the last token alone."""

    def _forward(self, active: Any) -> Any:
        active.cache = None
        return super()._forward(active)


class _Lenient(PlainEngine):
    """Takes what it is given."""

    def add(self, request: Any) -> int:
        return super().add(request) if request.prompt else -1


class _Unaware(PlainEngine):
    """Does not count weights that training changed."""

    def weights_changed(self) -> None:
        pass


class _Careless(PlainEngine):
    """Keeps a cache over a change of rotary frequencies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._regimes._attentions.clear()


class _Impolite(PlainEngine):
    """Changes the model first and then refuses it."""

    def __init__(self, model: nn.Module) -> None:
        model.train()
        raise EngineError("no such model")


class _Sticky(PlainEngine):
    """Leaves the model in another mode than it found it."""

    def close(self) -> None:
        self.model.eval()


class _Stubborn(PlainEngine):
    def cancel(self, request: int) -> None:
        pass


class _Talkative(PlainEngine):
    """Has always something to say, but not for ever."""

    idle = 0

    def step(self) -> list[Token]:
        made = super().step()
        self.idle += not made
        return made or ([Token(request=-1, id=0)] if self.idle == 1 else [])


@pytest.mark.parametrize(
    ("engine", "check", "message"),
    [
        (_Forgetful, "engines.greedy", "differs from generate at token"),
        (_Stale, "engines.live-weights", "does not see weights that changed"),
        (_Careless, "engines.greedy", "differs from generate at token 12"),
        (_Impolite, "engines.greedy", "changes a model that it refuses"),
        (_Unaware, "engines.weights-changed", "keeps its identity"),
        (_Lenient, "engines.refuses", "an empty prompt"),
        (_Sticky, "engines.restores", "training mode"),
        (_Talkative, "engines.stops", "with no request queued"),
        (_Stubborn, "engines.cancel", "ends a cancelled request with 'length'"),
    ],
)
def test_engines(engine: type[PlainEngine], check: str, message: str) -> None:
    def build(model: nn.Module, run: object) -> Any:
        return engine(model)

    made = EngineType(name="bad", summary="Generates.", build=build)
    assert_fails(yielding("core_engines", made), check, message)


# What core itself promises


def test_core_that_merges_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_only(*parts: Any) -> Any:
        return parts[0]

    monkeypatch.setattr("core.testing.contract.numerics.merge", first_only)
    found = outcome(plugin_of(Builtin(), "x"), "numerics.merge-is-exact", "core")
    assert (found.status, found.text) == ("fail", "merged outputs differ")


def test_core_whose_probe_notices_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.testing.contract.numerics.require_equivalent", nothing)
    found = outcome(plugin_of(Builtin(), "x"), "numerics.change-is-noticed", "core")
    assert (found.status, "passes for the same" in found.text) == ("fail", True)


def test_core_with_one_salt_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.identity.CacheIdentity.salt", lambda self: "salt")
    found = outcome(plugin_of(Builtin(), "x"), "numerics.identity", "core")
    assert (found.status, found.text) == ("fail", "two different identities have one salt")


# Of the suite itself


def test_tiny_models_say_many_different_tokens() -> None:
    from core.testing.contract.answers import reference

    for build in tiny.MODELS.values():
        most = max(len(set(reference(build, prompt))) for prompt in tiny.prompts())
        assert most > 10, build.__name__


def test_unknown_areas_and_checks_are_refused() -> None:
    with pytest.raises(CoreError, match="no area 'metdata'"):
        contract.checks(["metdata"])
    with pytest.raises(CoreError, match=r"no check 'engines\.fast'"):
        contract.suite("core", skip={"engines.fast": "why"})
    with pytest.raises(PluginError, match="no plugin 'absent'"):
        Subject("absent", plugin_of(Builtin(), "x"))


def test_every_check_says_what_it_demands() -> None:
    for check in contract.checks():
        assert check.summary.endswith("."), check.name
    names = [check.name for check in contract.checks()]
    assert len(set(names)) == len(names)
