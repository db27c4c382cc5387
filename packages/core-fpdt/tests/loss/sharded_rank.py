"""One of two ranks: ``python sharded_rank.py RANK FOLDER``.

Trains a model that FSDP2 has sharded, with lazy logits and tiles, and leaves the worst differences
to the whole model in ``FOLDER/RANK.json``.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from core.errors import ModelError
from core.testing import tiny
from core_fpdt.loss.head import replace_head
from core_fpdt.loss.tiles import feed_forward, final_norm, tile
from core_fpdt.settings import FPDTSettings

RANKS = 2


def inside(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def outside(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), batch["labels"][:, 1:].flatten())


def gradients(model: Any, loss: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model, batch).backward()
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def shard(model: Any, head: bool, freed: bool, mesh: Any) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if head:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True if freed else None)


def chunk(model: Any) -> None:
    replace_head(model, FPDTSettings(loss_chunk_bytes=16 * 1024))
    norm = final_norm(model)
    assert norm is not None
    tile(norm, pieces=3)
    for layer in model.model.layers:
        part = feed_forward(layer)
        assert part is not None
        tile(part, tokens=5)


def compare(head: bool, tied: bool, loss: Any, mesh: Any, first: bool) -> float:
    rank = dist.get_rank()
    batches = [tiny.batch(seed) for seed in range(RANKS)]
    plain = tiny.llama(tie_word_embeddings=tied).train()
    wanted = [gradients(plain, loss, batch) for batch in batches]
    model = tiny.llama(tie_word_embeddings=tied).train()
    if first:
        chunk(model)
    shard(model, head, False, mesh)
    if not first:
        chunk(model)
    with torch.no_grad():
        assert "not computed" in repr(model(**batches[rank]).logits)
    worst = 0.0
    for _ in range(2):
        for name, grad in gradients(model, loss, batches[rank]).items():
            mean = sum(each[name] for each in wanted) / RANKS
            worst = max(worst, float((grad - mean).norm() / mean.norm()))
    return worst


def refused(mesh: Any) -> str:
    """Logits that are read when FSDP has freed the weights of the head."""
    model = tiny.llama().train()
    shard(model, False, True, mesh)
    chunk(model)
    try:
        outside(model, tiny.batch())
    except ModelError as error:
        return str(error)
    return "nothing was raised"


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=limit)
    mesh = init_device_mesh("cpu", (RANKS,))
    found: dict[str, Any] = {
        f"head {head}, tied {tied}, {loss.__name__}, chunked first {first}": compare(
            head, tied, loss, mesh, first
        )
        for head, tied, first in ((False, False, True), (True, False, False), (False, True, False))
        for loss in (inside, outside)
    }
    result = {"differences": found, "refused": refused(mesh)}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), Path(sys.argv[2]))
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)  # the other one waits for this one in gloo
