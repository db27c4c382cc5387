"""What importing the plugin costs and changes, seen from fresh interpreters."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from weakref import WeakKeyDictionary

from core.testing.contract.check import Skip, checks_of, require
from core.testing.contract.fresh import Answer, ask
from core.testing.contract.subject import Subject

LIMIT = 3.0
"""CPU of the import, in multiples of a bare interpreter."""

WATCHED = (
    "torch",
    "torch.distributed.checkpoint",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
)
"""Libraries whose functions the import must leave alone."""

_REPEATS = 5
_answers: WeakKeyDictionary[Subject, Answer] = WeakKeyDictionary()


def no_torch(subject: Subject) -> None:
    """Importing the plugin loads none of torch, transformers, numpy and pydantic."""
    heavy = _once(subject).report["heavy"]
    require(
        not heavy,
        f"importing {subject.plugin.target} loads {', '.join(heavy)}; "
        "import them inside the functions that need them",
    )


def cheap(subject: Subject) -> None:
    """Importing the plugin costs at most three times the CPU of a bare interpreter."""
    reports = [_once(subject).report]
    ratio = _ratio(reports)
    while ratio > LIMIT and len(reports) < _REPEATS:
        reports.append(ask(subject, "import").report)
        ratio = _ratio(reports)
    require(
        ratio <= LIMIT,
        f"importing {subject.plugin.target} costs {ratio:.1f} times a bare interpreter, "
        f"limit {LIMIT:g}; `python -X importtime` shows what takes long",
    )


def quiet(subject: Subject) -> None:
    """Importing the plugin prints nothing and warns of nothing."""
    printed = _once(subject).printed.strip()
    require(not printed, f"importing {subject.plugin.target} prints {printed[:200]!r}")


def no_threads(subject: Subject) -> None:
    """Importing the plugin starts no thread."""
    started = _once(subject).report["threads"]
    require(started <= 0, f"importing {subject.plugin.target} starts {started} thread(s)")


def same_environment(subject: Subject) -> None:
    """Importing the plugin changes no environment variable."""
    changed = _once(subject).report["environment"]
    require(not changed, f"importing {subject.plugin.target} changes {', '.join(changed)}")


def no_patches(subject: Subject) -> None:
    """Importing the plugin replaces and registers nothing in torch and transformers."""
    require_unpatched(subject, _installed())


def require_unpatched(subject: Subject, libraries: tuple[str, ...]) -> None:
    """Fail when importing the plugin changes one of ``libraries``."""
    if not libraries:
        raise Skip("neither torch nor transformers is installed")
    report = ask(subject, "patches", *libraries).report
    patched = report["patched"]
    require(
        not patched,
        f"importing {subject.plugin.target} replaces {', '.join(patched[:5])}; "
        "change a model in a transform instead",
    )
    registered = report["registered"]
    require(
        not registered,
        f"importing {subject.plugin.target} registers {', '.join(registered[:5])}; "
        "do it in core_setup",
    )


@cache
def _installed() -> tuple[str, ...]:
    return tuple(name for name in WATCHED if find_spec(name.partition(".")[0]) is not None)


def _once(subject: Subject) -> Answer:
    if subject not in _answers:
        _answers[subject] = ask(subject, "import")
    return _answers[subject]


def _ratio(reports: list[dict[str, float]]) -> float:
    least = min(report["seconds"] for report in reports)
    return least / min(report["interpreter"] for report in reports)


CHECKS = checks_of("imports", no_torch, cheap, quiet, no_threads, same_environment, no_patches)
