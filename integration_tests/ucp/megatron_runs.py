"""Makes a real ``torch_dist`` checkpoint with Megatron-core, and the whole tensors beside it.

Called as ``python megatron_runs.py save FOLDER`` it writes ``FOLDER/iter_0000007`` on two ranks of
tensor parallelism, with ``FOLDER/truth.pt``. Called as ``python megatron_runs.py load FOLDER OUT``
it loads a checkpoint with Megatron-core on one rank and keeps what it got in ``OUT``; further pairs
may follow.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LAYERS, HIDDEN, INNER, VOCABULARY, PADDED = 2, 8, 12, 50, 64
STATES = ("exp_avg", "exp_avg_sq", "param")


def shapes() -> dict[str, tuple[int, ...]]:
    """Whole shapes of the weights; those of layers carry an axis of layers."""
    return {
        "embedding.word_embeddings.weight": (PADDED, HIDDEN),
        "decoder.layers.self_attention.linear_qkv.weight": (LAYERS, 3 * HIDDEN, HIDDEN),
        "decoder.layers.self_attention.linear_proj.weight": (LAYERS, HIDDEN, HIDDEN),
        "decoder.layers.mlp.linear_fc1.weight": (LAYERS, 2 * INNER, HIDDEN),
        "decoder.layers.mlp.linear_fc2.weight": (LAYERS, HIDDEN, INNER),
        "decoder.layers.mlp.linear_fc2.bias": (LAYERS, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
    }


def cut(key: str) -> int | None:
    """The dimension that tensor parallelism cuts, counted without the axis of layers."""
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return 1
    return None if "layernorm" in key or key.endswith("bias") else 0


def truth() -> dict[str, torch.Tensor]:
    """All tensors by the keys that Megatron gives them in files."""
    torch.manual_seed(0)
    found = {key: torch.randn(shape).to(torch.bfloat16) for key, shape in shapes().items()}
    found["embedding.word_embeddings.weight"][VOCABULARY:] = 0
    for key in shapes():
        for state in STATES:
            moment = torch.randn(shapes()[key])
            if state == "param":
                moment = found[key].float() + moment * 2.0**-12
            if key.startswith("embedding"):
                moment[VOCABULARY:] = 0
            found[f"optimizer.state.{state}.{key}"] = moment
    for key in shapes():
        found[key] = found[f"optimizer.state.param.{key}"].to(torch.bfloat16)
    return found


def common() -> dict[str, Any]:
    """What Megatron keeps once beside the tensors."""
    groups: list[dict[str, Any]] = [
        {"params": [0, 1], "lr": 0.01, "wd_mult": 1.0, "is_expert_parallel": False, "step": 7},
        {"params": [2, 3], "lr": 0.01, "wd_mult": 0.0, "is_expert_parallel": False, "step": 7},
    ]
    for group in groups:
        group["weight_decay"] = 0.1 * group["wd_mult"]
    return {
        "args": argparse.Namespace(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=1,
            vocab_size=VOCABULARY,
            padded_vocab_size=PADDED,
            consumed_train_samples=448,
            params_dtype=torch.bfloat16,
        ),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "opt_param_scheduler": {"max_lr": 0.01, "num_steps": 448},
        "optimizer": {"optimizer": {"param_groups": groups}, "grad_scaler": {"scale": 1024.0}},
    }


def sharded(values: dict[str, torch.Tensor | None], rank: int, ranks: int) -> Iterator[Any]:
    """Megatron's descriptions of what a rank holds; a gated unit is two chunks of one key."""
    from megatron.core.dist_checkpointing import ShardedTensor

    for key, whole in values.items():
        name = key.rpartition("decoder.")[2] if "decoder." in key else key
        dim = cut(key)
        layers = range(LAYERS) if name.startswith("layers.") else [None]
        for layer in layers:
            tensor = whole if layer is None or whole is None else whole[layer]
            prepended = [] if layer is None else [(0, layer, LAYERS)]
            parts = [(tensor, 0, 1)]
            if key.endswith("linear_fc1.weight") and tensor is not None:
                gate, up = tensor.chunk(2)
                parts = [(gate, 0, 2), (up, 1, 2)]
            for part, index, count in parts:
                assert part is not None
                axis = 0 if layer is None else 1
                local, offsets = part, prepended
                if dim is not None:
                    local = part.chunk(ranks, dim)[rank]
                    position = index * ranks + rank
                    offsets = [*prepended, (dim + axis, position, ranks * count)]
                yield ShardedTensor.from_rank_offsets(
                    key,
                    local.contiguous(),
                    *offsets,
                    replica_id=0 if dim is not None else rank,
                    prepend_axis_num=axis,
                    allow_shape_mismatch=key.endswith("word_embeddings.weight"),
                )


def save(folder: Path, rank: int, ranks: int) -> None:
    """Save one checkpoint on all ranks."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state: dict[str, Any] = {"tensors": list(sharded(dict(truth()), rank, ranks)), **common()}
    generator = [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.get_rng_state()}]
    state["rng_state"] = ShardedObject("rng_state", generator, (1, ranks), (0, rank))
    path = folder / "iter_0000007"
    if rank == 0:
        path.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
        torch.save(truth(), folder / "truth.pt")
    dist.barrier()
    dist_checkpointing.save(state, str(path))


def load(folder: Path, out: Path) -> None:
    """Load whole tensors with Megatron-core."""
    from megatron.core import dist_checkpointing

    room = {key: torch.zeros_like(tensor) for key, tensor in truth().items()}
    state: dict[str, Any] = {"tensors": list(sharded(dict(room), 0, 1))}
    loaded = dist_checkpointing.load(state, str(folder))
    found: dict[str, list[torch.Tensor]] = {}
    for description, tensor in zip(sharded(dict(room), 0, 1), loaded["tensors"], strict=True):
        found.setdefault(description.key, []).append(tensor)
    kept = {key: torch.cat([t.reshape(-1) for t in parts]) for key, parts in found.items()}
    others = {key: value for key, value in loaded.items() if key != "tensors"}
    torch.save({"tensors": kept, "common": others}, out)


def on_ranks(count: int, work: Callable[[int], object]) -> None:
    """Run on forked ranks; the parent has imported everything once."""
    import megatron.core.dist_checkpointing  # noqa: F401

    meeting = Path(tempfile.mkdtemp()) / "meeting"
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(r, count, meeting, work)) for r in range(count)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(250)
    if any(rank.exitcode != 0 for rank in ranks):
        sys.exit(f"ranks ended with {[rank.exitcode for rank in ranks]}")


def _rank(rank: int, count: int, meeting: Path, work: Callable[[int], object]) -> None:
    torch.set_num_threads(1)
    # Megatron-core asks for a GPU in two places, and uses it in neither of them here.
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    # A file, because a port that is free now may be taken before the ranks meet there.
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    work(rank)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Save or load."""
    verb, *paths = sys.argv[1:]
    if verb == "save":
        on_ranks(2, lambda rank: save(Path(paths[0]), rank, 2))
    else:
        pairs = list(zip(map(Path, paths[::2]), map(Path, paths[1::2]), strict=True))
        on_ranks(1, lambda _: [load(*pair) for pair in pairs])


if __name__ == "__main__":
    main()
