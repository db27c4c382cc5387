"""What a machine can hold and do, as far as a plan needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.errors import SettingsError, closest

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device and the node around it; bytes, bytes per second, FLOP per second.

    Rates are what is reached, not what is printed on the box; only ``flops`` is the peak, which
    utilization is a share of.

    Args:
        name: for messages.
        memory: of one device.
        reserve: bytes of it that no tensor gets: context, communication buffers, fragmentation.
        flops: dense 16-bit peak.
        forward: share of the peak that attention reaches forwards, in blocks of thousands of tokens.
        backward: the same backwards.
        matmul: share of the peak that matrix products reach.
        bandwidth: of the device's memory.
        link: between host and device, in both directions together.
        sharing: devices behind one such link.
        peer: to devices of the same node, per device.
        network: to other nodes, per device.
        node: devices of a node.
        host: memory of a node.
        host_share: share of it that chunks and states may take.
    """

    name: str
    memory: float
    reserve: float
    flops: float
    forward: float
    backward: float
    matmul: float
    bandwidth: float
    link: float
    sharing: int
    peer: float
    network: float
    node: int = 8
    host: float = 2048.0 * GIB
    host_share: float = 0.8

    @property
    def own_link(self) -> float:
        """Bytes per second between host and one device while all use the link."""
        return self.link / self.sharing

    def changed(self, **fields: Any) -> Hardware:
        """The same with other values; ``None`` leaves a field as it is.

        Raises:
            SettingsError: for values that no machine has.
        """
        made = replace(self, **{key: value for key, value in fields.items() if value is not None})
        wrong = [
            name
            for name, value in vars(made).items()
            if name not in ("name", "reserve") and not value > 0
        ]
        if wrong:
            raise SettingsError(f"{wrong[0]} of {self.name} must be above 0")
        return made


def hardware(name: str) -> Hardware:
    """Known hardware by name.

    Raises:
        SettingsError: for an unknown name.
    """
    if name.lower() not in HARDWARE:
        known = sorted(HARDWARE)
        raise SettingsError(
            f"no device {name!r}{closest(name, known)}", fix=f"known: {', '.join(known)}"
        )
    return HARDWARE[name.lower()]


_A100 = Hardware(
    name="a100",
    memory=80.0 * GIB,
    reserve=4.0 * GIB,
    flops=312e12,
    # FlashAttention-2 (arXiv 2307.08691) reports up to 0.73 and 0.63.
    forward=0.68,
    backward=0.58,
    matmul=0.75,
    bandwidth=1.9e12,
    link=25e9,
    sharing=2,
    peer=240e9,
    network=23e9,
)
_H100 = Hardware(
    name="h100",
    memory=80.0 * GIB,
    reserve=4.0 * GIB,
    flops=989e12,
    # FlashAttention-3 (arXiv 2407.08608) reports up to 0.75 and 0.58, cuDNN about the same.
    forward=0.60,
    backward=0.50,
    matmul=0.70,
    bandwidth=3.1e12,
    link=50e9,
    sharing=1,
    peer=360e9,
    network=45e9,
)
HARDWARE: Mapping[str, Hardware] = {
    each.name: each
    for each in (
        _A100,
        replace(_A100, name="a100-40g", memory=40.0 * GIB, bandwidth=1.4e12),
        _H100,
        replace(_H100, name="h200", memory=140.0 * GIB, bandwidth=4.4e12),
        replace(_H100, name="b200", memory=178.0 * GIB, flops=2250e12, bandwidth=7e12, peer=720e9),
        replace(_A100, name="l40s", memory=45.0 * GIB, flops=362e12, bandwidth=0.8e12, peer=20e9),
        Hardware(
            name="cpu",
            memory=16.0 * GIB,
            reserve=0.0,
            flops=1e11,
            forward=0.6,
            backward=0.6,
            matmul=0.8,
            bandwidth=1e10,
            link=4e9,
            sharing=1,
            peer=2e9,
            network=1e9,
            node=1,
            host=64.0 * GIB,
        ),
    )
}
"""Devices by name. A100 boards put two of them behind one link to the host."""
