"""The C kernels become a library: compiled once, then found in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import uuid
from pathlib import Path

from core_fp6.kernels.cpu.features import Build, processor

logger = logging.getLogger(__name__)

_NATIVE = Path(__file__).with_name("native")
_FLAGS = "-O2", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-w"
_DIGEST = hashlib.sha256().digest_size
_SECONDS = 300
_OTHERS_MAY_WRITE = 0o022


class BuildError(Exception):
    """A variant cannot be built here; the text says why."""


def load(build: Build) -> ctypes.CDLL:
    """The library of a variant, built unless the cache has it.

    Its name holds a digest of all that it was made of and for: sources, compiler, flags and the
    features of the processor. A digest of its content stands at its end, so that a damaged file is
    built again.

    Raises:
        BuildError: without a compiler that can build it.
    """
    compiler = find_compiler()
    command = [*compiler, *_FLAGS, *build.flags]
    name = f"{build.name}-{_key(build, compiler, command)}.so"
    folder = cache_folder()
    try:
        _require_private(folder)
        path = folder / name
        if not _whole(path):
            if not os.access(folder, os.W_OK):
                raise PermissionError("it is read-only")
            _compile(command, build, path)
        return _open(path)
    except OSError as error:
        logger.warning(
            "the kernels of core-fp6 cannot be kept in %s (%s) and are built for this process alone;"
            " set CORE_FP6_CACHE to a folder that only you can write to",
            folder,
            error.strerror or error,
        )
    with tempfile.TemporaryDirectory(prefix="core-fp6-") as private:
        path = Path(private) / name
        _compile(command, build, path)
        return _open(path)


def find_compiler() -> list[str]:
    """The C compiler as a command: that of ``CC``, else that of Python, ``cc``, ``gcc``, ``clang``.

    Raises:
        BuildError: when there is none.
    """
    named = os.environ.get("CC")
    candidates = [named] if named else [sysconfig.get_config_var("CC"), "cc", "gcc", "clang"]
    for candidate in candidates:
        words = shlex.split(candidate or "")
        if words and shutil.which(words[0]):
            return words
    raise BuildError(f"CC is {named!r}, which is no command" if named else "there is no C compiler")


def cache_folder() -> Path:
    """Where libraries are kept: ``CORE_FP6_CACHE``, or ``core-fp6`` in the user's cache folder."""
    if named := os.environ.get("CORE_FP6_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "core-fp6"


def _key(build: Build, compiler: list[str], command: list[str]) -> str:
    parts = [_run([*compiler, "--version"]), *command, *sorted(processor())]
    parts += [path.read_text("utf-8") for path in sorted(_NATIVE.glob("*.[ch]"))]
    return hashlib.sha256("\0".join([*parts, *build.sources]).encode()).hexdigest()[:24]


def _compile(command: list[str], build: Build, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    sources = [str(_NATIVE / source) for source in build.sources]
    try:
        _run([*command, *sources, "-o", str(temporary)])
        if not temporary.exists():
            raise BuildError(f"{command[0]} wrote nothing")
        content = temporary.read_bytes()
        with temporary.open("ab") as file:
            file.write(hashlib.sha256(content).digest())
        temporary.chmod(0o700)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        said = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise BuildError(f"{command[0]} failed: {said}")
    return done.stdout


def _require_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_MAY_WRITE:
        raise PermissionError("others can write to it")


def _whole(path: Path) -> bool:
    try:
        found, content = path.stat(), path.read_bytes()
    except FileNotFoundError:
        return False
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_MAY_WRITE:
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the library cannot be loaded: {error}") from error
