"""Checkpoints at the speed of the disk, every iteration, never lost.

Everything public is imported here on first use, so that the writer process loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "BalancedSavePlanner": "core_fastpersist.dcp.balance",
    "NativeReader": "core_fastpersist.dcp.reader",
    "NativeWriter": "core_fastpersist.dcp.native",
    "SafetensorsReader": "core_fastpersist.dcp.shards_reader",
    "SafetensorsWriter": "core_fastpersist.dcp.shards",
    "Staging": "core_fastpersist.dcp.staging",
    "WriteOptions": "core_fastpersist.direct.newfile",
    "adopt": "core_fastpersist.arena",
    "load": "core_fastpersist.files.loading",
    "save": "core_fastpersist.files.storing",
    "verify": "core_fastpersist.verification",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from core_fastpersist.arena import adopt as adopt
    from core_fastpersist.dcp.balance import BalancedSavePlanner as BalancedSavePlanner
    from core_fastpersist.dcp.native import NativeWriter as NativeWriter
    from core_fastpersist.dcp.reader import NativeReader as NativeReader
    from core_fastpersist.dcp.shards import SafetensorsWriter as SafetensorsWriter
    from core_fastpersist.dcp.shards_reader import SafetensorsReader as SafetensorsReader
    from core_fastpersist.dcp.staging import Staging as Staging
    from core_fastpersist.direct.newfile import WriteOptions as WriteOptions
    from core_fastpersist.files.loading import load as load
    from core_fastpersist.files.storing import save as save
    from core_fastpersist.verification import verify as verify


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
