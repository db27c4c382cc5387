"""One process that has DeepSpeed imported and forks the ranks of runs; a script, not a module.

Started by :class:`ucp.deepspeed_runs.Lab`. Jobs come as lines of JSON and are answered by lines of
JSON; what DeepSpeed prints goes to standard error. Imports take ten to twenty seconds, which forked
ranks do not pay again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed
import deepspeed.checkpoint.ds_to_universal
import deepspeed.moe.layer
import deepspeed.pipe
import deepspeed.runtime.engine
import deepspeed.runtime.zero.stage3
import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch._inductor.decomposition
import torch._inductor.lowering
import torch.distributed as dist
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401
from safetensors.torch import save_file
from ucp.deepspeed_cases import Case
from ucp.deepspeed_models import BATCH, batch, build
from ucp.deepspeed_truth import gather

LIMIT = 200
"""Seconds that a run may take."""


def settings(case: Case) -> dict[str, Any]:
    """The DeepSpeed configuration of a case."""
    dp = case.world // (case.tp * case.pp)
    adam = {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}
    sgd = {"lr": 1e-1, "momentum": 0.9}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // dp if case.pp == 1 else BATCH // dp // 2,
        "gradient_accumulation_steps": 1 if case.pp == 1 else 2,
        "optimizer": {"type": case.optimizer, "params": sgd if case.optimizer == "SGD" else adam},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 40, "warmup_num_steps": 2, "warmup_max_lr": 1e-2},
        },
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.stage, **case.zero},
    }
    if case.precision != "fp32":
        config[case.precision] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 2}
    if case.tp > 1:
        config["tensor_parallel"] = {"autotp_size": case.tp}
    return config | case.settings


def engine_of(case: Case) -> Any:
    """A fresh engine."""
    model = build(case)
    if case.tp == 1:
        model.universal_checkpoint_info = {"universal_checkpoint_version": 0.4}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in case.frozen))
    return deepspeed.initialize(
        model=model, model_parameters=_groups(model, case), config=settings(case)
    )[0]


def _groups(model: torch.nn.Module, case: Case) -> Any:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if case.groups == 1:
        groups = [{"params": [p for _, p in trained]}]
    else:
        groups = [
            {"params": [p for _, p in trained if p.dim() > 1]},
            {"params": [p for _, p in trained if p.dim() <= 1], "weight_decay": 0.0, "lr": 5e-3},
        ]
    if case.model != "moe":
        return groups
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    return split_params_into_different_moe_groups_for_optimizer(
        [{**group, "name": f"group{index}"} for index, group in enumerate(groups)]
    )


def train(engine: Any, case: Case, steps: int) -> list[float]:
    """Losses of some steps, the mean over all ranks."""
    return [_step(engine, case) for _ in range(steps)]


def _step(engine: Any, case: Case) -> float:
    tokens, labels = batch(engine.global_steps)
    if case.pp > 1:
        dp = case.world // case.pp
        share = slice(*_share(engine.grid.get_data_parallel_rank(), dp))
        micro = zip(tokens[share].chunk(2), labels[share].chunk(2), strict=True)
        return float(engine.train_batch(data_iter=iter(list(micro))))
    dp = case.world // case.tp
    share = slice(*_share(dist.get_rank() // case.tp, dp))
    loss = engine(tokens[share], labels[share])
    engine.backward(loss)
    engine.step()
    mean = loss.detach().float().clone()
    dist.all_reduce(mean)
    return float(mean / case.world)


def _share(rank: int, dp: int) -> tuple[int, int]:
    return rank * BATCH // dp, (rank + 1) * BATCH // dp


def run_rank(rank: int, port: int, job: dict[str, Any]) -> None:
    """One rank of a job."""
    case = Case(**job["case"])
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    engine = engine_of(case)
    out = Path(job["out"])
    facts: dict[str, Any] = {}
    if job["load"]:
        path, client = engine.load_checkpoint(job["load"], tag=job["tag"])
        assert path is not None, f"DeepSpeed found nothing in {job['load']}"
        facts["loaded"] = {key: value for key, value in client.items() if key == "tokens_seen"}
        facts["steps_loaded"] = engine.global_steps
        _save(gather(engine, case), out / "loaded.safetensors", rank)
    facts["losses"] = train(engine, case, job["steps"])
    truth = gather(engine, case)
    _save(truth, out / "truth.safetensors", rank)
    if job["save"]:
        seen = engine.global_steps * BATCH
        engine.save_checkpoint(str(out / "checkpoint"), client_state={"tokens_seen": seen})
    facts |= _facts(engine)
    facts["continued"] = train(engine, case, job["more"])
    if job["more"]:
        _save(gather(engine, case), out / "final.safetensors", rank)
    if rank == 0:
        (out / "facts.json").write_text(json.dumps(facts))
    dist.barrier()


def _facts(engine: Any) -> dict[str, Any]:
    """What is no tensor."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "fp16_groups", None)
    groups = groups or [group["params"] for group in optimizer.param_groups]
    hyper = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    scaler = getattr(optimizer, "loss_scaler", getattr(optimizer, "loss_scale_config", None))
    return {
        "groups": [[names[id(p)] for p in group if id(p) in names] for group in groups],
        "hyper": json.loads(json.dumps(hyper, default=str)),
        "scale": getattr(scaler, "cur_scale", None),
        "scheduler": engine.lr_scheduler.state_dict(),
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
    }


def _save(tensors: dict[str, torch.Tensor], path: Path, rank: int) -> None:
    if rank == 0:
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)


def _child(rank: int, port: int, job: dict[str, Any]) -> None:
    try:
        run_rank(rank, port, job)
        code = 0
    except BaseException:
        (Path(job["out"]) / f"error-{rank}.txt").write_text(traceback.format_exc())
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo threads of a failed run would wait for each other


def fork(job: dict[str, Any]) -> str:
    """Run a job; returns what went wrong."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_child, args=(rank, port, job))
        for rank in range(job["case"]["world"])
    ]
    for process in ranks:
        process.start()
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            break
        time.sleep(0.02)
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
    if any(process.exitcode for process in ranks):
        errors = sorted(Path(job["out"]).glob("error-*.txt"))
        return "\n".join(path.read_text() for path in errors) or "the run took too long"
    return ""


def universal(job: dict[str, Any]) -> str:
    """DeepSpeed's own conversion; returns what went wrong."""
    from argparse import Namespace

    try:
        deepspeed.checkpoint.ds_to_universal.main(
            Namespace(
                input_folder=job["load"],
                output_folder=job["out"],
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    except Exception:
        return traceback.format_exc()
    return ""


def main() -> None:
    """Answer jobs until there are none."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile for minutes
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # slow, but right
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps({"ready": deepspeed.__version__}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        begun = time.monotonic()
        error = (universal if job["kind"] == "universal" else fork)(job)
        print(json.dumps({"error": error, "seconds": time.monotonic() - begun}), file=answers)


if __name__ == "__main__":
    main()
