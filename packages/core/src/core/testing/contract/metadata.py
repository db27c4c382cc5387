"""What the distribution says of itself."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from core.testing.contract.check import Skip, checks_of, require
from core.testing.contract.subject import Subject

_LOWER = (">=", ">", "==", "~=")
_UPPER = ("<", "<=", "==", "~=")


def entry_point(subject: Subject) -> None:
    """The entry point of a distribution core-NAME is called NAME."""
    if subject.is_core:
        raise Skip("core's own plugin has no entry point")
    name = re.sub(r"[-_.]+", "-", subject.distribution.name).lower()
    require(
        name == f"core-{subject.name}",
        f"the entry point {subject.name!r} belongs to the distribution {name!r}; "
        f"call it {name.removeprefix('core-')!r}, or the distribution 'core-{subject.name}'",
    )


def core_requirement(subject: Subject) -> None:
    """The requirement of core has a lower and an upper bound."""
    if subject.is_core:
        raise Skip("core does not require itself")
    found = [r for r in subject.distribution.requires or () if re.match(r"core\s*([^\w.-]|$)", r)]
    require(found, "the distribution does not require core; add 'core>=0.1,<1' to dependencies")
    versions = found[0].partition(";")[0]
    operators = re.findall(r"[<>=~!]+", versions)
    require(
        set(operators) & set(_LOWER) and set(operators) & set(_UPPER),
        f"{versions.strip()!r} has no lower or no upper bound; write 'core>=0.1,<1'",
    )


def py_typed(subject: Subject) -> None:
    """The package has a py.typed file, so that type checkers read it."""
    package = subject.plugin.target.partition(":")[0].partition(".")[0]
    spec = find_spec(package) if package and package != "__main__" else None
    if spec is None:
        raise Skip("the plugin has no module of its own")
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    require(places, f"{package} is a single module, which cannot have py.typed; make it a package")
    typed = any((place / "py.typed").is_file() for place in places)
    require(typed, f"{package} has no py.typed; add an empty file of that name")


def licence(subject: Subject) -> None:
    """The distribution declares a licence."""
    metadata = subject.distribution.metadata
    declared = [metadata[key] for key in ("License-Expression", "License") if key in metadata]
    declared += [c for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    require(any(declared), 'no licence is declared; add license = "..." to [project]')


CHECKS = checks_of("metadata", entry_point, core_requirement, py_typed, licence)
