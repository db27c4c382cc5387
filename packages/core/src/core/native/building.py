"""C files become a library: compiled once, then found in the user's cache folder."""

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
from dataclasses import dataclass
from pathlib import Path

from core.native.processor import Build, processor

logger = logging.getLogger(__name__)

_SHARED = Path(__file__).parent
_FLAGS = "-O2", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-w"
_DIGEST = hashlib.sha256().digest_size
_SECONDS = 300
_OTHERS_MAY_WRITE = 0o022


class NativeError(Exception):
    """A variant cannot be built here; the text says why."""


@dataclass(frozen=True)
class Sources:
    """The C files of a package.

    Args:
        package: name of the distribution. In capitals and with underscores it begins the names of
            the variables that concern it: that of ``core-fp6`` are ``CORE_FP6_CACHE`` (folder of
            libraries) and ``CORE_FP6_CPU`` (variant).
        folder: where the files are.

    Example:
        >>> Sources("core-fp6", Path("native")).variable("CACHE")
        'CORE_FP6_CACHE'
    """

    package: str
    folder: Path

    def variable(self, name: str) -> str:
        """Name of an environment variable of this package."""
        return f"{self.package.upper().replace('-', '_')}_{name}"


def load(sources: Sources, build: Build) -> ctypes.CDLL:
    """The library of a variant, built unless the cache has it.

    Its name holds a digest of all that it was made of and for: sources, compiler, flags and the
    features of the processor. A digest of its content stands at its end, so that a damaged file is
    built again.

    Raises:
        NativeError: without a compiler that can build it.

    Example::

        library = load(Sources("core-hello", folder), Build("plain", (), ("hello.c",)))
    """
    compiler = find_compiler()
    command = [*compiler, *_FLAGS, *build.flags, "-I", str(_SHARED)]
    files = [*(str(sources.folder / name) for name in build.sources), str(_SHARED / "threads.c")]
    name = f"{build.name}-{_key(sources, build, compiler, command)}.so"
    folder = cache_folder(sources)
    try:
        _require_private(folder)
        path = folder / name
        if not _whole(path):
            if not os.access(folder, os.W_OK):
                raise PermissionError("it is read-only")
            _compile(command, files, path)
        return _open(path)
    except OSError as error:
        logger.warning(
            "the kernels of %s cannot be kept in %s (%s) and are built for this process alone;"
            " set %s to a folder that only you can write to",
            sources.package,
            folder,
            error.strerror or error,
            sources.variable("CACHE"),
        )
    with tempfile.TemporaryDirectory(prefix=f"{sources.package}-") as private:
        path = Path(private) / name
        _compile(command, files, path)
        return _open(path)


def find_compiler() -> list[str]:
    """The C compiler as a command: that of ``CC``, else that of Python, ``cc``, ``gcc``, ``clang``.

    Raises:
        NativeError: when there is none.
    """
    named = os.environ.get("CC")
    candidates = [named] if named else [sysconfig.get_config_var("CC"), "cc", "gcc", "clang"]
    for candidate in candidates:
        words = shlex.split(candidate or "")
        if words and shutil.which(words[0]):
            return words
    raise NativeError(
        f"CC is {named!r}, which is no command" if named else "there is no C compiler"
    )


def cache_folder(sources: Sources) -> Path:
    """Where a package's libraries are kept: its variable, or its name in the user's cache folder."""
    if named := os.environ.get(sources.variable("CACHE")):
        return Path(named)
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / sources.package


def _key(sources: Sources, build: Build, compiler: list[str], command: list[str]) -> str:
    # A path of this installation says nothing about what it holds.
    flags = [word for word in command if word != str(_SHARED)]
    # All features, because CC may ask the compiler for whatever there is.
    parts = [_run([*compiler, "--version"]), *flags, *sorted(processor()), *build.sources]
    for folder in (sources.folder, _SHARED):
        parts += [path.read_text("utf-8") for path in sorted(folder.glob("*.[ch]"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _compile(command: list[str], files: list[str], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        _run([*command, *files, "-o", str(temporary)])
        if not temporary.exists():
            raise NativeError(f"{command[0]} wrote nothing")
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
        raise NativeError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        said = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise NativeError(f"{command[0]} failed: {said}")
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
        raise NativeError(f"the library cannot be loaded: {error}") from error
