"""The DCP reader: tensors in the order of the file, every chunk held against its digest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from core.checkpoints.dcp import DcpReader
from core_fastpersist.coverage import digests_of
from core_fastpersist.direct.reading import check_file
from core_fastpersist.storage import DirectSource


class NativeReader(DcpReader):
    """Reads any DCP folder past the page cache, and without running its pickles.

    Takes the place of ``FileSystemReader`` in ``dcp.load``. Folders of
    :class:`core_fastpersist.NativeWriter` have digests, which are checked on the way.

    Args:
        path: folder of the checkpoint.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(Path(path), DirectSource(Path(path)))

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        path = Path(self.path) / ".metadata"
        digests = digests_of(path) if path.is_file() else None
        if digests is not None:
            check_file(path, digests)
        return super().read_metadata(*args, **kwargs)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def place(item: object) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]  # type: ignore[attr-defined]
            return info.relative_path, info.offset

        return super().read_data(
            dataclasses.replace(plan, items=sorted(plan.items, key=place)), planner
        )
