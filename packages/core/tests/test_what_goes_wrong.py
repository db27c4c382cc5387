"""Every way in which plugins go wrong, and what the user then sees, through the real command line.

The plugins are distributions that are really installed; see ``conftest.py``.
"""

from __future__ import annotations

import json
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Site

Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def listed(shared_site: Site) -> CompletedProcess[str]:
    return shared_site.core("plugins", "--json")


@pytest.fixture(scope="module")
def rows(listed: CompletedProcess[str]) -> Rows:
    return {row["name"]: row for row in json.loads(listed.stdout)["plugins"]}


@pytest.fixture(scope="module")
def doctor(shared_site: Site) -> CompletedProcess[str]:
    return shared_site.core("doctor", "core.installation", "--json")


@pytest.mark.parametrize(
    ("name", "state", "reason"),
    [
        ("good", "active", ""),
        ("functions", "active", ""),
        ("fails", "broken", "ImportError: libfoo.so missing"),
        ("exits", "broken", "SystemExit: 3"),
        ("prints", "active", "prints at import: 'welcome to my plugin'"),
        ("misspelled", "broken", "unknown hook 'core_command'; did you mean 'core_commands'?"),
        ("unmarked", "broken", "core_engines is not marked"),
        ("wrapper", "broken", "core_engines is a wrapper"),
        ("empty", "broken", "implements no hook"),
        ("raising", "broken", "core_commands: RuntimeError: no commands today"),
        ("thief", "broken", "its command 'plan' is core's already"),
        ("train", "broken", "the name 'train' belongs to core"),
        ("core (core-stored)", "broken", "the name 'core' belongs to core"),
        (
            "twin",
            "conflict",
            "both core-twin-a and core-twin-b call themselves 'twin'; uninstall one of them",
        ),
        (
            "tomorrow",
            "incompatible",
            "made for hook API 2, this core has 1; upgrade core or downgrade core-tomorrow",
        ),
        (
            "yesterday",
            "incompatible",
            "made for hook API 0, this core has 1; upgrade core-yesterday or downgrade core",
        ),
    ],
)
def test_every_plugin_has_its_state_and_reason(
    rows: Rows, name: str, state: str, reason: str
) -> None:
    assert (rows[name]["state"], rows[name]["reason"]) == (state, reason)


def test_a_wrong_argument_is_named_with_its_hook(rows: Rows) -> None:
    assert rows["argument"]["state"] == "broken"
    assert (
        rows["argument"]["reason"] == "core_transforms has no argument 'runs'; did you mean 'run'?"
    )


def test_a_slow_import_is_told(site: Site) -> None:
    site.install("core-slow", "import time; time.sleep(1.1)\n" + site.good)
    shown = site.core("plugins", "--json")
    slow = next(row for row in json.loads(shown.stdout)["plugins"] if row["name"] == "slow")
    assert slow["state"] == "active"
    assert slow["reason"].startswith("takes 1.")


def test_plugins_lists_all_in_one_order_and_succeeds(
    listed: CompletedProcess[str], rows: Rows
) -> None:
    assert listed.returncode == 0
    assert listed.stderr == ""
    known = [name for name in rows if rows[name]["distribution"] and name != "core"]
    mine = [name for name in known if rows[name]["state"] not in ("incompatible", "not installed")]
    assert next(iter(rows)) == "core"
    assert [name for name in mine if "(" not in name] == sorted(n for n in mine if "(" not in n)
    assert (rows["good"]["distribution"], rows["good"]["version"]) == ("core-good", "1.0")


def test_help_prints_with_the_commands_of_the_plugins_that_work(shared_site: Site) -> None:
    shown = shared_site.core("--help")
    assert shown.returncode == 0
    assert "hello" in shown.stdout
    assert "Says hello." in shown.stdout
    assert "plugins" in shown.stdout
    assert shared_site.core("hello").stdout == "hello\n"


def test_doctor_fails_and_names_each_bad_plugin(doctor: CompletedProcess[str]) -> None:
    assert doctor.returncode == 1, doctor.stderr
    status = {found["name"]: found["status"] for found in json.loads(doctor.stdout)}
    bad = {name.removeprefix("plugin ") for name, value in status.items() if value == "fail"}
    assert {"fails", "exits", "misspelled", "raising", "twin", "tomorrow", "thief"} <= bad
    assert {status["plugin good"], status["plugin functions"]} == {"ok"}
    assert status["plugin prints"] == "warn"


def test_doctor_asks_every_hook(site: Site) -> None:
    for hook in ("settings", "checkpoints", "engines", "models", "recipes", "probes"):
        source = f"class Plugin(Hooks):\n    @hookimpl\n    def core_{hook}(self):\n        1 / 0\n"
        site.install(f"core-no-{hook}", source)
    ended = site.core("doctor", "core.installation", "--json")
    assert ended.returncode == 1
    status = {found["name"]: found["value"] for found in json.loads(ended.stdout)}
    for hook in ("settings", "checkpoints", "engines", "models", "recipes", "probes"):
        said = f"broken: core_{hook}: ZeroDivisionError: division by zero"
        assert status[f"plugin no-{hook}"] == said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "plugin 'fails' is broken: ImportError: libfoo.so missing"),
        ("twin", "both core-twin-a and core-twin-b call themselves 'twin'"),
        ("tomorrow", "plugin 'tomorrow' is incompatible: made for hook API 2"),
        ("goud", "no plugin 'goud' is installed; did you mean 'good'?"),
    ],
)
def test_a_run_that_names_a_bad_plugin_stops(shared_site: Site, name: str, said: str) -> None:
    ended = shared_site.core("run", "train", "--enable", name)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert not (shared_site.work / "runs").exists()


def test_a_run_that_names_several_bad_plugins_hears_of_all(shared_site: Site) -> None:
    ended = shared_site.core("plan", "--enable", "fails", "--enable", "good", "--enable", "goud")
    assert ended.returncode == 2
    assert "libfoo.so" in ended.stderr
    assert "no plugin 'goud'" in ended.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fails", "plugin 'fails' is broken: ImportError: libfoo.so missing"),
        ("raising", "plugin 'raising' is broken: core_commands: RuntimeError"),
        ("tomorrow", "plugin 'tomorrow' is incompatible"),
        ("helo", "no command 'helo'; did you mean 'hello'?"),
        ("plguins", "did you mean 'plugins'?"),
    ],
)
def test_an_unknown_command_answers_with_the_state(
    shared_site: Site, command: str, said: str
) -> None:
    ended = shared_site.core(command)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_plugin_and_its_variable_switch_off_before_import(shared_site: Site) -> None:
    off = ["--no-plugin", "exits", "--no-plugin", "prints", "plugins", "--json"]
    shown = shared_site.core(*off, env={"CORE_DISABLE": "fails, tomorrow"})
    states = {row["name"]: row for row in json.loads(shown.stdout)["plugins"]}
    for name in ("exits", "prints", "fails", "tomorrow"):
        assert (states[name]["state"], states[name]["reason"]) == (
            "disabled",
            "switched off by name",
        )
    assert states["good"]["state"] == "active"
    refused = shared_site.core("--no-plugin", "good", "run", "train", "--enable", "good")
    assert refused.returncode == 2
    assert "plugin 'good' is disabled: switched off by name" in refused.stderr
    assert "plugin 'good' is disabled" in shared_site.core("--no-plugin", "good", "good").stderr


@pytest.mark.parametrize("way", ["option", "variable"])
def test_all_plugins_can_be_switched_off(shared_site: Site, way: str) -> None:
    args = ["--no-plugins"] if way == "option" else []
    env = {} if way == "option" else {"CORE_NO_PLUGINS": "1"}
    shown = shared_site.core(*args, "plugins", "--json", env=env)
    states = {row["name"]: row["state"] for row in json.loads(shown.stdout)["plugins"]}
    assert states.pop("core") == "active"
    assert set(states.values()) <= {"disabled", "not installed"}
    assert "fails" in states


def test_strict_mode_raises_the_failure_of_a_plugin(shared_site: Site) -> None:
    off = ["--no-plugin", "argument", "--no-plugin", "empty", "--no-plugin", "exits"]
    ended = shared_site.core(
        *off, "--no-plugin", "core", "plugins", env={"CORE_STRICT": "1", "CORE_DISABLE": ""}
    )
    assert ended.returncode != 0
    assert "libfoo.so missing" in ended.stderr


def test_a_disabled_list_in_the_settings_file_is_not_imported(site: Site) -> None:
    site.install("core-loud", "open('imported', 'w').close()\n" + site.good)
    (site.work / "run.toml").write_text('disable = ["loud"]\nenable = ["loud"]\n')
    ended = site.core("plan", "--settings", "run.toml")
    assert ended.returncode == 2
    assert "plugin 'loud' is disabled: switched off by name" in ended.stderr
    assert not (site.work / "imported").exists()
    assert site.core("plugins").returncode == 0
    assert (site.work / "imported").exists()


def test_newer_plugins_are_found_when_older_metadata_hides_them(site: Site) -> None:
    site.install("core-late", site.good, plugin="", version="0.9", into="old")
    site.install("core-late", site.good, version="1.0", into="new")
    path = ("old", "new")
    names = {
        row["name"]
        for row in json.loads(site.core("plugins", "--json", path=path).stdout)["plugins"]
    }
    assert "late" not in names
    found = site.core("doctor", "core.installation", "--json", path=path)
    assert found.returncode == 1
    hidden = next(row for row in json.loads(found.stdout) if row["name"] == "plugin late")
    assert hidden["status"] == "fail"
    assert str(site.folder / "old") in hidden["value"]


def test_a_half_removed_distribution_does_not_stop_discovery(site: Site) -> None:
    site.install("core-half", site.good)
    site.install("core-whole", site.good)
    (site.folder / "core_half-1.0.dist-info" / "METADATA").unlink()
    shown = site.core("plugins", "--json")
    states = {row["name"]: row["state"] for row in json.loads(shown.stdout)["plugins"]}
    assert states["whole"] == "active"
    assert "half" in states
    assert "whole" in site.core("plugins").stdout
    assert site.core("doctor", "core.installation").returncode in (0, 1)


@pytest.mark.parametrize("shadow", ["core.py", "core/__init__.py"])
def test_a_file_called_core_beside_the_user_is_told(site: Site, shadow: str) -> None:
    (site.work / "core").mkdir()
    (site.work / shadow).write_text("")
    immune = site.core("doctor", "core.installation", "--json")
    told = {row["name"]: row for row in json.loads(immune.stdout)}["names in the working folder"]
    assert told["status"] == "warn"
    assert "No module named 'core.hooks'" in told["advice"]
    (site.work / "train.py").write_text("from core.hooks import Hooks")
    hit = site.python("train.py")
    assert "No module named 'core.hooks'" in hit.stderr


@pytest.mark.parametrize("stranger", ["stranger", "core"])
def test_a_foreign_distribution_that_provides_core_is_told(site: Site, stranger: str) -> None:
    site.install(stranger, "", plugin="", version="0.0.3", module="core.foreign")
    found = site.core("doctor", "core.installation", "--json")
    assert found.returncode == 1, found.stderr
    rows = {row["name"]: row for row in json.loads(found.stdout)}
    identity = rows["distribution of the package core"]
    assert identity["status"] == "fail"
    assert stranger in identity["value"]


TRANSFORMS = """
def same(subject, run):
    return subject

def nothing(subject, run):
    subject["changed"] = True

class Plugin(Hooks):
    @hookimpl
    def core_transforms(self, run):
        yield Transform(stage=BATCH, name="{name}", apply={apply}, {more})
"""


@pytest.fixture(scope="module")
def chained(module_site: Site) -> Site:
    for name, apply, more in [
        ("ring", "same", 'claims=frozenset({"attention"})'),
        ("band", "same", 'claims=frozenset({"attention"})'),
        ("egg", "same", 'after=("hen.t",)'),
        ("hen", "same", 'after=("egg.t",)'),
        ("void", "nothing", ""),
    ]:
        source = TRANSFORMS.format(name="t", apply=apply, more=more)
        module_site.install(f"core-{name}", source)
    return module_site


def test_two_transforms_that_claim_one_slot_are_both_named(chained: Site) -> None:
    ended = chained.core("plan", "--enable", "ring", "--enable", "band")
    assert ended.returncode == 2
    assert "band.t and ring.t both replace 'attention'" in ended.stderr
    assert "enable only one" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_circular_order_is_printed(chained: Site) -> None:
    ended = chained.core("plan", "--enable", "egg", "--enable", "hen")
    assert ended.returncode == 2
    assert "egg.t -> hen.t -> egg.t" in ended.stderr or "hen.t -> egg.t -> hen.t" in ended.stderr


def test_a_transform_that_returns_none_is_named(chained: Site) -> None:
    program = """
import core
run = core.start(enable=["void"])
try:
    run.apply(core.BATCH, {})
except core.PlanError as error:
    print(error)
"""
    ended = chained.python("-P", "-c", program)
    assert "transform 'void.t' returned None" in ended.stdout, ended.stderr
    assert "it must return the batch" in ended.stdout


def test_a_misspelled_transform_of_an_enabled_plugin(chained: Site) -> None:
    ended = chained.core("plan", "--enable", "ring.tt")
    assert ended.returncode == 2
    assert "no transform 'ring.tt'; did you mean 'ring.t'?" in ended.stderr


SETTINGS = """
from dataclasses import dataclass
from typing import Annotated, Literal
from annotated_types import Ge, Le

@dataclass(frozen=True, kw_only=True)
class Numbers(Settings):
    bits: Annotated[int, Ge(4), Le(8)] = 6
    mode: Literal["fast", "exact"] = "fast"

class Plugin(Hooks):
    @hookimpl
    def core_settings(self):
        yield Numbers
"""


def test_all_wrong_settings_are_told_at_once(site: Site) -> None:
    site.install("core-speed-up", SETTINGS)
    site.install("core-bare", site.good)
    site.install("core-gone", "raise ImportError('no libgone')")
    (site.work / "run.toml").write_text(
        '[speed-up]\nbits = 9\nmode = "quick"\nbit = 5\n[gone]\na = 1\n[speedup]\nbits = 5\n'
        '[bare]\nx = 1\n[train]\nsteps = "many"\n[off]\nx = 1\n'
    )
    site.install("core-off", site.good)
    ended = site.core(
        "--no-plugin", "off", "plan", "--settings", "run.toml", "--set", "checkpoint.keep=-1",
        env={"CORE_SPEED_UP__BITS": "3"},
    )  # fmt: skip
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    lines = [line.strip() for line in ended.stderr.splitlines()]
    assert lines[0] == "error: 9 settings cannot be used"
    for line in [
        "environment CORE_SPEED_UP__BITS: speed-up.bits = 3: Input should be greater than or"
        " equal to 4",
        "run.toml: speed-up.mode = 'quick': Input should be 'fast' or 'exact'",
        "run.toml: speed-up.bit = 5: unknown key; did you mean 'bits'?; known keys: bits, mode",
        "run.toml: [gone]: plugin 'gone' is broken: ImportError: no libgone",
        "run.toml: [speedup]: unknown section; no plugin 'speedup' is installed;"
        " did you mean 'speed-up'?",
        "run.toml: [bare]: plugin 'bare' has no settings",
        "run.toml: [off]: plugin 'off' is disabled: switched off by name",
        "--set checkpoint.keep: checkpoint.keep = -1: Input should be greater than or equal to 0",
    ]:
        assert line in lines, ended.stderr
    assert any(line.startswith("run.toml: train.steps = 'many'") for line in lines)


def test_settings_of_a_plugin_come_from_file_environment_and_command_line(site: Site) -> None:
    site.install("core-speed-up", SETTINGS)
    (site.work / "run.toml").write_text('[speed-up]\nbits = 5\nmode = "exact"\n')
    args = ("plan", "--json", "--settings", "run.toml", "--set", "speed-up.bits=8")
    ended = site.core(*args, env={"CORE_SPEED_UP__MODE": "fast"})
    assert json.loads(ended.stdout)["settings"]["speed-up"] == {"bits": 8, "mode": "fast"}


def test_a_plugin_that_fails_to_give_settings_does_not_stop_others(site: Site) -> None:
    broken = "class Plugin(Hooks):\n    @hookimpl\n    def core_settings(self):\n        1 / 0\n"
    site.install("core-fragile", broken)
    shown = site.core("plan", "--json")
    assert shown.returncode == 0, shown.stderr
    named = site.core("plan", "--enable", "fragile")
    assert named.returncode == 2
    assert "plugin 'fragile' is broken: core_settings: ZeroDivisionError" in named.stderr
    assert site.core("doctor", "core.installation").returncode == 1


WORKERS = """
import multiprocessing, pickle, sys
import core
from core.hooks import Hooks

def names(sent):
    found = core.discover()
    again = core.discover()
    assert found is again
    mine = [c.value for c in found.collect(Hooks.core_probes) if c.plugin == "good"]
    return [p.name for p in found], pickle.loads(sent) == mine

if __name__ == "__main__":
    here = core.discover()
    mine = [c.value for c in here.collect(Hooks.core_probes) if c.plugin == "good"]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for there, same in pool.map(names, [pickle.dumps(mine)] * 2, chunksize=1):
            assert there == [p.name for p in here]
            assert same and mine
    print("agreed")
"""


def test_spawned_workers_discover_the_same_and_say_nothing(site: Site) -> None:
    site.install("core-good", site.good)
    site.install("core-fails", "raise ImportError('libfoo.so missing')")
    (site.work / "workers.py").write_text(WORKERS)
    ended = site.python("workers.py")
    assert (ended.stdout, ended.stderr) == ("agreed\n", "")


OBSERVER = """
import core

class Plugin(Hooks):
    @hookimpl
    def core_event(self, run, event):
        if isinstance(event, core.StepEnded):
            raise RuntimeError("disk of the dashboard is full")
"""


def test_an_observer_that_raises_is_told_once_and_training_goes_on(site: Site) -> None:
    site.install("core-dashboard", OBSERVER)
    program = """
import core
with core.start() as run:
    for step in range(1, 4):
        run.emit(core.StepEnded(step=step))
    print(run.plugins.event_errors, run.plugins.event_seconds["dashboard"] > 0)
"""
    ended = site.python("-P", "-c", program)
    assert ended.stdout == "{'dashboard': 3} True\n"
    assert ended.stderr.count("plugin 'dashboard' failed to observe") == 1
    assert "RuntimeError: disk of the dashboard is full" in ended.stderr


def test_a_transform_that_raises_ends_with_its_plugin_named(site: Site) -> None:
    source = (
        TRANSFORMS.format(name="t", apply="fall", more="") + "\ndef fall(subject, run): 1 / 0\n"
    )
    site.install("core-faller", source)
    program = "import core; core.start(enable=['faller']).apply(core.BATCH, {})"
    ended = site.python("-P", "-c", program)
    assert ended.returncode == 1
    assert "in transform 'faller.t' of stage 'batch'" in ended.stderr


def test_a_hook_that_yields_the_wrong_thing_ends_with_its_plugin_named(site: Site) -> None:
    source = "class Plugin(Hooks):\n    @hookimpl\n    def core_transforms(self, run):\n        yield 3\n"
    site.install("core-three", source)
    ended = site.core("plan", "--enable", "three")
    assert ended.returncode == 2
    assert "core_transforms yielded a int, not a Transform" in ended.stderr
    assert "in plugin 'three', hook core_transforms" in ended.stderr
