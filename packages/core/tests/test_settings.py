"""Settings: who wins, every problem at once with its source, and reading back what was written."""

from __future__ import annotations

import datetime
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tomli_w
from annotated_types import Ge, Le
from hypothesis import given, strategies as st

import core
from core.contributions import Settings
from core.discovery import plugins_from
from core.errors import SettingsError
from core.hooks import Hooks, hookimpl
from core.settings import check, gather, parse, read_file, schema, validate


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    threads: Annotated[int, Ge(1)] = 4
    """Threads that write."""

    path: Path = Path("data")
    """Where they write."""


@dataclass(frozen=True, kw_only=True)
class Demo(Settings):
    bits: Annotated[int, Ge(4), Le(8)] = 6
    """Bits per weight."""

    mode: Literal["fast", "exact"] = "fast"
    """How to round."""

    rate: float = 0.5
    """A rate."""

    name: str = "none"
    """A name."""

    flag: bool = False
    """A flag."""

    sizes: tuple[int, ...] = ()
    """Sizes."""

    colour: Colour = Colour.RED
    """A colour."""

    extra: Mapping[str, int] = field(default_factory=dict)
    """More figures."""

    inner: Inner = Inner()
    """A nested table."""


SECTIONS: Mapping[str, type[Settings]] = {"demo-one": Demo}


def made(environment: Mapping[str, str] | None = None, **sources: Any) -> Demo:
    values = gather(environment=environment or {}, **sources)
    demo = validate(values, SECTIONS, {})[Demo]
    assert isinstance(demo, Demo)
    return demo


def problems(
    environment: Mapping[str, str] | None = None,
    sections: Mapping[str, type[Settings]] = SECTIONS,
    **sources: Any,
) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        validate(gather(environment=environment or {}, **sources), sections, {})
    return refused.value.what.split("\n  ")[1:]


def file(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("sources", range(5))
def test_each_source_wins_over_the_ones_before_it(tmp_path: Path, sources: int) -> None:
    given: dict[str, Any] = {}
    if sources > 0:
        given["file"] = file(tmp_path, "[demo-one]\nbits = 5\nrate = 0.25")
    if sources > 1:
        given["environment"] = {"CORE_DEMO_ONE__BITS": "7"}
    if sources > 2:
        given["assignments"] = ["demo-one.bits=8"]
    if sources > 3:
        given["keywords"] = {"demo-one": {"bits": 4}}
    demo = made(**given)
    assert demo.bits == (6, 5, 7, 8, 4)[sources]
    assert demo.rate == (0.25 if sources else 0.5)


def test_later_assignments_win() -> None:
    assert made(assignments=["demo-one.bits=4", "demo-one.bits=5"]).bits == 5


def test_nested_keys_merge_from_all_sources(tmp_path: Path) -> None:
    demo = made(
        file=file(
            tmp_path, "[demo-one.inner]\nthreads = 2\npath = 'file'\n[demo-one.extra]\na = 1"
        ),
        environment={"CORE_DEMO_ONE__INNER__THREADS": "3"},
        assignments=["demo-one.extra={b = 2}"],
        keywords={"demo-one": {"extra": {"c": 3}}},
    )
    assert demo.inner == Inner(threads=3, path=Path("file"))
    assert demo.extra == {"a": 1, "b": 2, "c": 3}


def test_a_settings_object_counts_as_its_fields() -> None:
    demo = Demo(bits=8, inner=Inner(threads=9))
    assert made(keywords={"demo-one": demo}) == demo


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-0.5e3", -500.0),
        ("true", True),
        ('"5"', "5"),
        ("'a b'", "a b"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("1979-05-27", datetime.date(1979, 5, 27)),
        ("plain text", "plain text"),
        ("True", "True"),
        ("", ""),
        ("a.b", "a.b"),
        ("/data/run #3", "/data/run #3"),
        ("1\nother = 2", "1\nother = 2"),
        ("[unclosed", "[unclosed"),
    ],
)
def test_texts_are_read_in_the_grammar_of_toml(text: str, value: Any) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)


tree = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@given(tree)
def test_what_toml_writes_is_read_back(value: Any) -> None:
    text = tomli_w.dumps({"value": value}).removeprefix("value = ").strip("\n")
    assert parse(text) == value


@given(st.text())
def test_every_text_is_read_as_something(text: str) -> None:
    value = parse(text)
    assert value == text or tomllib.loads(f"value = {text}") == {"value": value}


demos = st.builds(
    Demo,
    bits=st.integers(4, 8),
    mode=st.sampled_from(["fast", "exact"]),
    rate=st.floats(allow_nan=False),
    name=st.text(),
    flag=st.booleans(),
    sizes=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(tuple),
    colour=st.sampled_from(Colour),
    extra=st.dictionaries(st.text(min_size=1), st.integers(0, 9), max_size=3),
    inner=st.builds(
        Inner,
        threads=st.integers(1, 99),
        path=st.text("abc/.", min_size=1).map(Path),
    ),
)


class DemoOne(Hooks):
    @hookimpl
    def core_settings(self) -> Any:
        yield Demo


@given(demos)
def test_a_runs_settings_are_read_back_from_its_folder(demo: Demo) -> None:
    plugins = plugins_from({"demo-one": DemoOne()})
    with core.start(plugins=plugins, demo_one=demo) as run:
        text = json.dumps(run.settings_tree())
        assert run.settings(Demo) == demo
    again = json.loads(text)
    with core.start(plugins=plugins, **{k: v for k, v in again.items() if k != "enable"}) as run:
        assert run.settings(Demo) == demo


@given(demos)
def test_settings_are_read_back_from_assignments(demo: Demo) -> None:
    quoted = tomli_w.dumps({"value": demo.name}).removeprefix("value = ").strip("\n")
    texts = [f"bits={demo.bits}", f"mode={demo.mode}", f"rate={demo.rate!r}", f"name={quoted}",
             f"flag={str(demo.flag).lower()}", f"sizes={list(demo.sizes)}",
             f"colour={demo.colour.value}", f"inner.threads={demo.inner.threads}"]  # fmt: skip
    got = made(assignments=[f"demo-one.{text}" for text in texts])
    inner = replace(demo.inner, path=Path("data"))
    assert got == replace(demo, extra={}, inner=inner)


def test_settings_json_is_a_settings_file(tmp_path: Path) -> None:
    plugins = plugins_from({"demo-one": DemoOne()})
    with core.start(plugins=plugins, folder=tmp_path, demo_one={"bits": 8}) as run:
        run.write_description()
    with core.start(tmp_path / "settings.json", plugins=plugins) as again:
        assert again.settings(Demo).bits == 8
        assert again.settings_tree() == run.settings_tree()


def test_all_problems_of_all_sections_are_told_with_their_sources(tmp_path: Path) -> None:
    text = "[demo-one]\nbits = 9\nbit = 5\n[demo-two]\nrate = 'high'\n[demo-tow]\nx = 1\n"
    lines = problems(
        sections={"demo-one": Demo, "demo-two": Demo},
        file=file(tmp_path, text),
        environment={"CORE_DEMO_ONE__MODE": "quick", "CORE_DEMO_TWO__INNER__THREAD": "3"},
        assignments=["demo-one.inner.threads=0"],
        keywords={"demo-two": {"flag": "perhaps"}},
    )
    start = str(tmp_path / "run.toml")
    assert sorted(lines) == sorted(
        [
            f"{start}: [demo-tow]: unknown section; no plugin 'demo-tow' is installed; did you mean"
            " 'demo-two'?",
            f"{start}: demo-one.bits = 9: Input should be less than or equal to 8",
            f"{start}: demo-one.bit = 5: unknown key; did you mean 'bits'?; known keys: bits, mode,"
            " rate, name, flag, sizes, colour, extra, inner",
            "environment CORE_DEMO_ONE__MODE: demo-one.mode = 'quick': Input should be 'fast' or"
            " 'exact'",
            "--set demo-one.inner.threads: demo-one.inner.threads = 0: Input should be greater than"
            " or equal to 1",
            f"{start}: demo-two.rate = 'high': Input should be a valid number, unable to parse"
            " string as a number",
            "keyword argument: demo-two.flag = 'perhaps': Input should be a valid boolean, unable to"
            " interpret input",
            "environment CORE_DEMO_TWO__INNER__THREAD: demo-two.inner.thread = 3: unknown key; did"
            " you mean 'threads'?; known keys: threads, path",
        ]
    )


def test_an_unknown_section_says_what_became_of_its_plugin() -> None:
    values = gather(environment={}, assignments=["fp.bits=6"])
    with pytest.raises(SettingsError, match=r"\[fp\]: plugin 'fp' is broken: ImportError"):
        validate(values, SECTIONS, {"fp": "plugin 'fp' is broken: ImportError"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("demo-one = 3", "demo-one = 3: must be a table of keys"),
        ("enable = 'demo-one'", "enable = 'demo-one': must be a list of plugin names"),
        ("disable = [1]", "disable = [1]: must be a list of plugin names"),
        ("bits = 5", "[bits]: unknown section"),
    ],
)
def test_misplaced_values_are_told(tmp_path: Path, text: str, said: str) -> None:
    (line,) = problems(file=file(tmp_path, text))
    assert line.startswith(f"{tmp_path / 'run.toml'}: {said}")


def test_the_source_is_that_of_the_value_in_force(tmp_path: Path) -> None:
    path = file(tmp_path, "[demo-one]\nbits = 9\n[demo-one.inner]\nthreads = 1")
    (line,) = problems(file=path, assignments=["demo-one=3"])
    assert line == "--set demo-one: demo-one = 3: must be a table of keys"
    (line,) = problems(file=path, assignments=["demo-one.bits=10"])
    assert line.startswith("--set demo-one.bits: demo-one.bits = 10")
    lines = problems(file=path, assignments=["demo-one.inner=3"])
    assert any(line.startswith("--set demo-one.inner: demo-one.inner = 3") for line in lines)


@pytest.mark.parametrize("text", ["demo-one.bits", "=5", "demo-one.=5", ".bits=5", ""])
def test_an_assignment_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="not of the form section.key=value"):
        gather(environment={}, assignments=[text])


@pytest.mark.parametrize(
    "name", ["CORE_DISABLE", "CORE_DEMO_BITS", "CORE___BITS", "CORE_DEMO__", "XCORE_DEMO__BITS"]
)
def test_other_variables_are_no_settings(name: str) -> None:
    assert gather(environment={name: "5"}).tree == {}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "[demo-one\n", "line 1"),
        ("a.json", "{", "cannot be parsed"),
        ("a.json", "[1]", "not a table"),
        ("a.json", "3", "not a table"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    path = file(tmp_path, text, name)
    with pytest.raises(SettingsError, match=said) as refused:
        read_file(path)
    assert str(path) in str(refused.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.toml", ".", "binary.toml"):
        with pytest.raises(SettingsError, match=str(tmp_path)):
            read_file(tmp_path / name)


@dataclass(frozen=True, kw_only=True)
class Broken(Settings):
    value: Missing = None  # type: ignore[name-defined]  # noqa: F821


def test_a_settings_class_that_makes_no_sense_is_its_sections_problem() -> None:
    lines = problems(sections={"broken": Broken, **SECTIONS}, assignments=["demo-one.bits=9"])
    assert len(lines) == 2
    assert lines[0].startswith("[broken]: its settings class Broken cannot be used")


def test_check_makes_one_object_or_tells_every_fault() -> None:
    assert check(Demo, bits=8) == Demo(bits=8)
    with pytest.raises(SettingsError) as refused:
        check(Demo, bits=9, mode="quick")
    assert "Demo.bits = 9" in str(refused.value)
    assert "Demo.mode = 'quick'" in str(refused.value)


def test_the_schema_documents_every_field_and_limit() -> None:
    properties = schema(Demo)["properties"]
    assert properties["bits"]["description"] == "Bits per weight."
    assert (properties["bits"]["minimum"], properties["bits"]["maximum"]) == (4, 8)


def test_a_run_knows_only_settings_of_its_plugins() -> None:
    with core.start(plugins=plugins_from({})) as run, pytest.raises(core.PluginError, match="Demo"):
        run.settings(Demo)
