"""Which store serves which settings."""

from __future__ import annotations

import torch

from core_fpdt.settings import FPDTSettings
from core_fpdt.store.budget import Budget, disk_budget, host_budget
from core_fpdt.store.contract import Store
from core_fpdt.store.counters import Counters
from core_fpdt.store.cuda_files import CudaFiles, FileRegions
from core_fpdt.store.file import FileStore
from core_fpdt.store.host import Cuda, Pinned
from core_fpdt.store.resident import ResidentStore
from core_fpdt.store.simulated import Simulated, plain_memory
from core_fpdt.store.slabs import REGION, MakeRegion, Slabs
from core_fpdt.store.staged import StagedStore
from core_fpdt.store.transport import Transport

_PAGE = 4096


def make_store(device: torch.device, settings: FPDTSettings) -> Store:
    """Make the store that the settings ask for.

    On CPUs host memory is the device itself, so that ``offload = "host"`` is the same as ``"none"``.

    Args:
        device: of the model.
        settings: its ``offload``, ``folder``, ``host_memory`` and ``delay``.

    Raises:
        CoreError: for a folder that cannot be written to.
    """
    budget = make_budget(device, settings)
    if settings.delay is not None:
        host = host_budget(settings.host_memory)
        return _staged(Simulated(settings.delay), plain_memory, host, region=_PAGE)
    if budget is None:
        return ResidentStore(device)
    if settings.offload != "file":
        return _staged(Cuda(device), Pinned(), budget)
    if device.type == "cpu":
        return FileStore(settings.folder)
    return _staged(CudaFiles(device), FileRegions(settings.folder), budget)


def make_budget(device: torch.device, settings: FPDTSettings) -> Budget | None:
    """What chunks may take outside of the device; nothing if they stay on it.

    Args:
        device: as for :func:`make_store`.
        settings: as for :func:`make_store`.

    Raises:
        CoreError: for a folder that cannot be written to.
    """
    if settings.delay is not None:
        return host_budget(settings.host_memory)
    if settings.offload == "file":
        return disk_budget(settings.folder)
    if device.type == "cpu" or settings.offload == "none":
        return None
    return host_budget(settings.host_memory)


def _staged(
    transport: Transport, make: MakeRegion, budget: Budget, region: int = REGION
) -> StagedStore:
    counters = Counters()
    return StagedStore(transport, Slabs(make, budget, counters, region), counters)
