"""Folders of DCP with the hyper-parameters of an optimizer, which lie there as pickles."""

from __future__ import annotations

from pathlib import Path

from core.checkpoints.layout import MANIFEST
from core_ucp.files.metadata import METADATA
from core_ucp.sources.dcp import detect as is_dcp, open_view as open_view


def detect(path: Path) -> bool:
    """Whether DCP has written a folder with hyper-parameters, and nobody anything beside them.

    Core's own reader gives the tensors of such a folder. Plain values are in the view.
    """
    own = (path / MANIFEST).is_file() or any(path.glob(f"{METADATA}.*"))
    if own or not is_dcp(path):
        return False
    try:
        content = (path / METADATA).read_bytes()
    except OSError:
        return False
    # Names as they lie in the pickle, which is not opened for a look.
    return b"BytesStorageMetadata" in content and b"param_groups" in content
