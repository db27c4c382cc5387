"""Which variant computes: the best one that the processor and the compiler allow, chosen once."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from core.errors import SettingsError
from core.native.building import NativeError, Sources, load
from core.native.processor import Build, processor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """What a package computes with.

    Args:
        name: of a build, or of the way without C.
        reason: why it is this one and none before it.
    """

    name: str
    reason: str


Kernel = TypeVar("Kernel")


class Kernels(Generic[Kernel]):
    """What a package computes with in this process; the environment can name a variant.

    Args:
        sources: C files of the package.
        builds: variants, best first.
        native: makes the kernel from a library.
        without: name of the way that needs no C.
        otherwise: makes the kernel that goes this way.
        loss: what it means that there is no C, as the beginning of a warning.

    Example::

        KERNELS = Kernels(
            Sources("core-hello", Path(__file__).with_name("native")),
            builds=[Build("avx2", ("avx2",), ("hello.c",)), Build("plain", (), ("hello.c",))],
            native=Native,
            without="torch",
            otherwise=Torch,
            loss="greetings are computed by torch, which takes longer",
        )
        KERNELS.chosen().greet()
    """

    def __init__(
        self,
        sources: Sources,
        builds: Sequence[Build],
        native: Callable[[ctypes.CDLL, Variant], Kernel],
        without: str,
        otherwise: Callable[[Variant], Kernel],
        loss: str,
    ) -> None:
        self.sources = sources
        self.builds = tuple(builds)
        self.names = (*(build.name for build in builds), without)
        self._native = native
        self._without = without
        self._otherwise = otherwise
        self._loss = loss
        self._lock = threading.Lock()
        self._found: Kernel | None = None
        os.register_at_fork(after_in_child=self._renew_lock)

    def chosen(self) -> Kernel:
        """What computes in this process; chosen, and built if need be, at the first call.

        Raises:
            SettingsError: when the environment names a variant that does not exist or work here.
        """
        if self._found is None:
            with self._lock:
                if self._found is None:
                    self._found = self._find(None)
        return self._found

    def force(self, name: str | None) -> Kernel:
        """Compute with one variant from now on; None chooses anew, as at the first call.

        Raises:
            SettingsError: when there is no such variant, or it does not work here.
        """
        found = self._find(name)
        with self._lock:
            self._found = found
        return found

    def _renew_lock(self) -> None:
        """In a child of fork(): another thread may have held the lock then."""
        self._lock = threading.Lock()

    def _find(self, name: str | None) -> Kernel:
        name = name or os.environ.get(self.sources.variable("CPU"))
        return self._named(name) if name else self._best()

    def _best(self) -> Kernel:
        reasons: list[str] = []
        for build in self.builds:
            try:
                return self._built(build, "; ".join(reasons) or "the processor has all it needs")
            except NativeError as error:
                reasons.append(f"not {build.name}: {error}")
        why = "; ".join(reasons)
        logger.warning(
            "%s: %s; install a C compiler (gcc or clang), or name one in CC", self._loss, why
        )
        return self._otherwise(Variant(self._without, why))

    def _named(self, name: str) -> Kernel:
        if name == self._without:
            return self._otherwise(Variant(name, "asked for"))
        for build in self.builds:
            if build.name == name:
                try:
                    return self._built(build, "asked for")
                except NativeError as error:
                    raise SettingsError(
                        f"the CPU variant {name} does not work here",
                        why=str(error),
                        fix=f"unset {self.sources.variable('CPU')} to have the best one that works",
                    ) from error
        raise SettingsError(
            f"no CPU variant {name!r}",
            why=f"there are {', '.join(self.names)}",
            fix="choose one of these",
        )

    def _built(self, build: Build, reason: str) -> Kernel:
        missing = [feature for feature in build.features if feature not in processor()]
        if missing:
            raise NativeError(f"the processor has no {', '.join(missing)}")
        return self._native(load(self.sources, build), Variant(build.name, reason))
