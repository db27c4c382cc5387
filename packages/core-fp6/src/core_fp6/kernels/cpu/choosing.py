"""Which variant computes: the best one that the processor and the compiler allow, chosen once."""

from __future__ import annotations

import logging
import os
import threading

from core.errors import SettingsError
from core_fp6.kernels.cpu.building import BuildError, load
from core_fp6.kernels.cpu.eager import Eager
from core_fp6.kernels.cpu.features import BUILDS, Build, Variant, processor
from core_fp6.kernels.cpu.native import Native

logger = logging.getLogger(__name__)

NAMES = (*(build.name for build in BUILDS), "eager")
"""All variants, best first."""


class _Choice:
    """What computes in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.kernel: Native | Eager | None = None

    def renew_lock(self) -> None:
        """In a child of fork(): another thread may have held the lock then."""
        self.lock = threading.Lock()


_choice = _Choice()
os.register_at_fork(after_in_child=_choice.renew_lock)


def chosen() -> Native | Eager:
    """What computes in this process; chosen, and built if need be, at the first call.

    Raises:
        SettingsError: when ``CORE_FP6_CPU`` names a variant that does not exist or work here.
    """
    if _choice.kernel is None:
        with _choice.lock:
            if _choice.kernel is None:
                _choice.kernel = _find(None)
    return _choice.kernel


def force(name: str | None) -> Variant:
    """Compute with one variant from now on; None chooses anew, as at the first call.

    Raises:
        SettingsError: when there is no such variant, or it does not work here.
    """
    found = _find(name)
    with _choice.lock:
        _choice.kernel = found
    return found.variant


def _find(name: str | None) -> Native | Eager:
    name = name or os.environ.get("CORE_FP6_CPU")
    return _named(name) if name else _best()


def _best() -> Native | Eager:
    reasons: list[str] = []
    for build in BUILDS:
        try:
            return _native(build, "; ".join(reasons) or "the processor has all it needs")
        except BuildError as error:
            reasons.append(f"not {build.name}: {error}")
    why = "; ".join(reasons)
    logger.warning(
        "products with six-bit weights are computed by torch, many times slower than by the C"
        " kernels of core-fp6: %s; install a C compiler (gcc or clang), or name one in CC",
        why,
    )
    return Eager(Variant("eager", why))


def _named(name: str) -> Native | Eager:
    if name == "eager":
        return Eager(Variant(name, "asked for"))
    for build in BUILDS:
        if build.name == name:
            try:
                return _native(build, "asked for")
            except BuildError as error:
                raise SettingsError(
                    f"the CPU variant {name} does not work here",
                    why=str(error),
                    fix="unset CORE_FP6_CPU to have the best one that works",
                ) from error
    raise SettingsError(
        f"no CPU variant {name!r}", why=f"there are {', '.join(NAMES)}", fix="choose one of these"
    )


def _native(build: Build, reason: str) -> Native:
    missing = [feature for feature in build.features if feature not in processor()]
    if missing:
        raise BuildError(f"the processor has no {', '.join(missing)}")
    return Native(load(build), Variant(build.name, reason), bfloat16=build.bfloat16)
