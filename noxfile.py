"""Everything one does with this repository: ``python -m nox --list``.

The packages are the folders of ``packages/``; nothing here lists them. Versions come from the
dependency groups of ``pyproject.toml``.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")
DIST = ROOT / "dist"

# uv does not read pip's variable; with this line both find the wheels of a local folder.
os.environ.setdefault("UV_FIND_LINKS", ",".join(os.environ.get("PIP_FIND_LINKS", "").split()))
# Many tests start processes of their own, and torch compiled anew in each would take most of the time.
os.environ.setdefault("UV_COMPILE_BYTECODE", "1")

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typecheck", "foreign", "tests"]


def group(*names: str) -> list[str]:
    """Requirements of dependency groups, with the torch of ``CORE_TORCH`` where that is set."""
    torch = os.environ.get("CORE_TORCH")
    found = nox.project.dependency_groups(GROUPS, *names)
    return [torch if torch and re.match(r"torch\b(?!-)", line) else line for line in found]


def install_all(session: nox.Session, *groups: str) -> None:
    """Install the known-good set and all packages, editable."""
    editable = [part for name in PACKAGES for part in ("-e", f"packages/{name}")]
    session.install(*group("known-good", *groups), *editable)


def install_wheels(session: nox.Session, *packages: str, groups: tuple[str, ...] = ()) -> None:
    """Install built wheels with what they declare, held to the known-good versions."""
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(group("known-good")) + "\n", encoding="utf-8")
    folder = Path(os.environ.get("CORE_WHEELS", DIST))
    wheels = [str(next(folder.glob(f"{name.replace('-', '_')}-[0-9]*.whl"))) for name in packages]
    extras = ["[torch]" if name == "core" else "" for name in packages]
    found = [wheel + extra for wheel, extra in zip(wheels, extras, strict=True)]
    session.install("-c", str(constraints), *group(*groups), *found)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the quickstart with all packages into runs/quickstart."""
    install_all(session)
    session.run("core", "run", "quickstart", "--overwrite", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests in one environment with all packages; they build the documentation too."""
    install_all(session, "test", "types", "docs")
    # The tests of a file share what they set up; each process keeps to one thread.
    spread = ("-n", "auto", "--dist", "loadfile")
    session.run("pytest", *spread, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def foreign(session: nox.Session) -> None:
    """Run the tests that need DeepSpeed, Megatron, torchao or Ray, with these installed."""
    install_all(session, "test", "foreign")
    session.run("pytest", "integration_tests/ucp", *session.posargs)
    session.install(*group("peers"))
    names = "quality", "test_mx.py", "models/test_quantizing_a_model.py"
    peers = [f"packages/core-fp6/tests/{name}" for name in names]
    session.run("pytest", *peers, *session.posargs)
    session.install(*group("replicas"))
    session.run("pytest", "packages/core-splitfuse/tests/replicas", *session.posargs)


@nox.session(requires=["wheels"], reuse_venv=False)
@nox.parametrize("package", PACKAGES)
def isolated(session: nox.Session, package: str) -> None:
    """Run one package's tests with core and its own declared dependencies only."""
    install_wheels(session, *dict.fromkeys(["core", package]), groups=("test", "types"))
    session.run("pytest", f"packages/{package}/tests", *session.posargs)


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check types with mypy and pyright."""
    install_all(session, "test", "types")
    session.run("mypy")
    session.run("pyright")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    install_all(session, "docs")
    session.run("sphinx-build", "-nW", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build sdist and wheel of every package into dist/, unless CORE_WHEELS names built ones."""
    if "CORE_WHEELS" in os.environ:
        session.log("using the wheels of %s", os.environ["CORE_WHEELS"])
        return
    session.install(*group("build"))
    for name in PACKAGES:
        for old in DIST.glob(f"{name.replace('-', '_')}-[0-9]*"):
            old.unlink()
        session.run("python", "-m", "build", "--no-isolation", "-o", "dist", f"packages/{name}")


@nox.session(requires=["wheels"], reuse_venv=False)
def journey(session: nox.Session) -> None:
    """Walk a newcomer's path: install, look around, write a plugin, train, convert, generate."""
    install_wheels(session, *PACKAGES, groups=("test", "types"))
    folder = Path(session.create_tmp())
    shutil.rmtree(folder)
    folder.mkdir()
    session.chdir(folder)
    session.run("core", "plugins")
    session.run("core", "new", "core-hello")
    session.install("./core-hello")
    session.run("core", "check", "hello")
    small = ("model=small:tiny", "steps=20", "text_limit=200000")
    session.run("core", "run", "train", "--out", "run", *[f"--set=train.{s}" for s in small])
    last = "run/checkpoints/step-00000020"
    session.run("core", "convert", last, "exported", "--to", "safetensors")
    session.run("core", "generate", "run/model", "--prompt", "def ", "--max-new-tokens", "8")


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks of all packages, or those named: ``-- packages/core/benchmarks/x.py``."""
    install_all(session, "test")
    scripts = session.posargs or sorted(map(str, Path().glob("packages/*/benchmarks/*.py")))
    for script in scripts:
        session.run("python", script)
    session.run("core", "bench")


@nox.session(venv_backend="none")
def bump(session: nox.Session) -> None:
    """Set the version of all packages: ``python -m nox -s bump -- 0.2.0``."""
    if len(session.posargs) != 1 or not re.fullmatch(r"\d+\.\d+\.\d+", session.posargs[0]):
        session.error("say one version, such as: python -m nox -s bump -- 0.2.0")
    line = re.compile(r'^(version|__version__) = "[^"]+"$', re.MULTILINE)
    for name in PACKAGES:
        folder = ROOT / "packages" / name
        module = folder / "src" / name.replace("-", "_") / "__init__.py"
        for file in (folder / "pyproject.toml", module):
            text, count = line.subn(rf'\1 = "{session.posargs[0]}"', file.read_text("utf-8"))
            if count != 1:
                session.error(f"{file} has {count} versions")
            file.write_text(text, encoding="utf-8")
