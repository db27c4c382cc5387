"""Running probes: health checks and benchmarks give readings of one shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from core.contributions import Probe, Reading
from core.errors import PluginError, closest
from core.hooks import Hooks
from core.plugins import Contributed, one_line

if TYPE_CHECKING:
    from core.run import Run


@dataclass(frozen=True)
class Finding:
    """A reading, and the plugin and probe it came from."""

    plugin: str
    probe: str
    reading: Reading

    def as_json(self) -> dict[str, Any]:
        """Flat JSON object."""
        return {"plugin": self.plugin, "probe": self.probe, **asdict(self.reading)}


def select(run: Run, names: Sequence[str], *, slow: bool) -> list[Contributed[Probe]]:
    """Choose probes by plugin or by ``plugin.probe``; no names choose all.

    Raises:
        PluginError: for a name that no probe has.
    """
    offered = [c for c in run.plugins.collect_safely(Hooks.core_probes) if c.value.slow is slow]
    known = [*{c.plugin: None for c in offered}, *(c.id for c in offered)]
    for name in names:
        if name not in known:
            raise PluginError(
                f"no probe {name!r}" + closest(name, known), fix=f"known: {', '.join(known)}"
            )
    return [c for c in offered if not names or c.plugin in names or c.id in names]


def measure(run: Run, probes: Sequence[Contributed[Probe]]) -> Iterator[Finding]:
    """Run probes one by one; one that raises is a finding too."""
    for found in probes:
        try:
            for reading in cast(Iterable[object], found.value.measure(run)):
                if not isinstance(reading, Reading):
                    raise PluginError(f"yielded a {type(reading).__name__}, not a Reading")
                yield Finding(found.plugin, found.value.name, reading)
        except Exception as error:
            reading = Reading(name=found.value.name, status="fail", value=one_line(error))
            yield Finding(found.plugin, found.value.name, reading)
