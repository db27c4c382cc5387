"""What a store has moved, for reports and for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What a store did since it was made.

    Args:
        put: bytes that left the device, for host memory or a file.
        fetched: bytes that came back.
        late: chunks that were got before anybody had asked to bring them.
        used: bytes in use outside of the device.
        peak: the most there ever were.
    """

    put: int = 0
    fetched: int = 0
    late: int = 0
    used: int = 0
    peak: int = 0

    def take(self, nbytes: int) -> None:
        """Note bytes that are taken outside of the device; negative ones are given back."""
        self.used += nbytes
        self.peak = max(self.peak, self.used)
