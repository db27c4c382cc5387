"""What ``core doctor`` says of the C kernels of a package."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

from core.contributions import Reading
from core.errors import SettingsError
from core.native.choosing import Variant

PATIENCE = 3.0
"""Seconds that kernels may take to be compiled before they are reported as not ready."""


def reading(
    name: str,
    variant: Callable[[], Variant],
    *,
    slow: Collection[str],
    advice: str,
) -> Reading:
    """Which variant computes, and why.

    Args:
        name: of the reading.
        variant: builds the kernels if need be.
        slow: variants that deserve a warning.
        advice: what to do about these.

    Example:
        >>> reading("kernel", lambda: Variant("torch", "no C"), slow=["torch"], advice="").status
        'warn'
    """
    builder = ThreadPoolExecutor(1)
    try:
        found = builder.submit(variant).result(PATIENCE)
    except TimeoutError:
        value, later = "is being compiled for its first use", "ask again in a moment"
        return Reading(name=name, status="skip", value=value, advice=later)
    except SettingsError as error:
        why = f"{error.what}: {error.why}"
        return Reading(name=name, status="fail", value=why, advice=error.fix)
    finally:
        builder.shutdown(wait=False)
    bad = found.name in slow
    return Reading(
        name=name,
        status="warn" if bad else "ok",
        value=found.name,
        limit=found.reason,
        advice=advice if bad else "",
    )
