"""One training step in a fresh process, watched from outside.

Both benchmarks import this file; as a program it is the process that is watched: it builds the model,
says so, waits for a line, takes its steps, and prints what they cost as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
_POLL = 0.005
_LOSS_BYTES = 64 * MIB

# Large blocks go back to the system when they are freed, so that resident memory is memory in use.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Subject:
    """A decoder in the shape of Llama, in float32.

    Args:
        hidden: width.
        layers: number of layers.
        heads: query heads, two for each key head.
        vocabulary: token ids.
        chunk: tokens in a chunk of ours.
    """

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 32000
    chunk: int = 1024


@dataclass(frozen=True)
class Result:
    """What a step took.

    Args:
        fits: whether it ended within the budget.
        growth: bytes of anonymous resident memory at most, over what there was before the step.
        seconds: CPU time of the step.
        loss: what it computed.
    """

    fits: bool
    growth: int
    seconds: float = float("nan")
    loss: float = float("nan")


def measure(
    way: str, tokens: int, subject: Subject, *, budget: int | None = None, steps: int = 1
) -> Result:
    """Take steps in a fresh process; it is ended as soon as it grows beyond the budget.

    Args:
        way: a key of :data:`WAYS`.
        tokens: of the sequence.
        subject: the model.
        budget: bytes of anonymous resident memory that a step may add.
        steps: how many; CPU seconds are those of the last one.

    Raises:
        RuntimeError: when the process fails for another reason.
    """
    order = json.dumps({"way": way, "tokens": tokens, "steps": steps, **asdict(subject)})
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__)), order],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **_ALLOCATOR, **_ONE_THREAD},
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        # Libraries say things, too.
        if not any(line.strip() == "ready" for line in child.stdout):
            raise RuntimeError(f"{way} cannot be set up: see above")
        before = _resident(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        peak = before
        while child.poll() is None:
            peak = max(peak, _resident(child.pid))
            if budget is not None and peak - before > budget:
                child.kill()
                return Result(False, peak - before)
            time.sleep(_POLL)
        said = child.stdout.read()
    if child.returncode:
        raise RuntimeError(f"{way} failed at {tokens} tokens: see above")
    told = next(line for line in reversed(said.splitlines()) if line.startswith("{"))
    return Result(True, peak - before, **json.loads(told))


def _resident(process: int) -> int:
    """Bytes of anonymous resident memory; 0 when the process has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith("RssAnon")), "x 0")
    return int(line.split()[1]) * 1024


def _plain(model: Any, subject: Subject, stack: ExitStack) -> None:
    """As transformers does it, with PyTorch's attention."""


def _checkpointed(model: Any, subject: Subject, stack: ExitStack) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _checkpointed_with_our_loss(model: Any, subject: Subject, stack: ExitStack) -> None:
    from core_fpdt.loss.head import replace_head
    from core_fpdt.settings import FPDTSettings

    _checkpointed(model, subject, stack)
    stack.callback(replace_head(model, FPDTSettings(loss_chunk_bytes=_LOSS_BYTES)))


def _deepspeed_tiles(model: Any, subject: Subject, stack: ExitStack) -> None:
    """DeepSpeed's tiled feed-forward part and fused loss, under gradient checkpointing."""
    import torch
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP

    _checkpointed(model, subject, stack)
    for layer in model.model.layers:
        inner = type(layer.mlp).forward

        def tiled(x: Any, mlp: Any = layer.mlp, inner: Any = inner) -> Any:
            shards = -(-x.shape[1] // subject.chunk)
            return TiledMLP.apply(inner, mlp, x, shards, list(mlp.parameters()))

        layer.mlp.forward = tiled

    def loss_of(whole: Any, x: Any, y: Any) -> Any:
        logits = whole.lm_head(x).view(-1, subject.vocabulary)
        return torch.nn.functional.cross_entropy(logits, y.view(-1), reduction="sum")

    def forward(input_ids: Any, labels: Any, **_: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        states = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        rows = max(1, _LOSS_BYTES // (16 * subject.vocabulary))
        shards = -(-states.shape[1] // rows)
        weights = [model.lm_head.weight]
        total = TiledFusedLogitsLoss.apply(
            loss_of, model, states, shifted, None, shards, weights, "sum"
        )
        return CausalLMOutput(loss=total / (labels.shape[1] - 1))

    model.forward = forward


def _ours(offload: str) -> Callable[[Any, Subject, ExitStack], None]:
    def prepare(model: Any, subject: Subject, stack: ExitStack) -> None:
        import core_fpdt

        settings: dict[str, Any] = {"chunk_tokens": subject.chunk, "offload": offload}
        settings["loss_chunk_bytes"] = _LOSS_BYTES
        stack.enter_context(core_fpdt.enable(model, strict=False, **settings))

    return prepare


WAYS: Mapping[str, Callable[[Any, Subject, ExitStack], None]] = {
    "plain": _plain,
    "checkpointing": _checkpointed,
    "checkpointing, chunked loss": _checkpointed_with_our_loss,
    "deepspeed tiles": _deepspeed_tiles,
    "chunks": _ours("none"),
    "chunks in files": _ours("file"),
}
"""Ways to train, by the names that the benchmarks show."""


def main(arguments: Sequence[str]) -> None:
    """Be the process that is watched."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    order = json.loads(arguments[0])
    way, tokens, steps = order.pop("way"), order.pop("tokens"), order.pop("steps")
    subject = Subject(**order)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=subject.hidden,
            intermediate_size=subject.hidden * 11 // 4,
            num_hidden_layers=subject.layers,
            num_attention_heads=subject.heads,
            num_key_value_heads=max(1, subject.heads // 2),
            vocab_size=subject.vocabulary,
            max_position_embeddings=2**24,
            attn_implementation="sdpa",
        )
    ).train()
    ids = torch.randint(0, subject.vocabulary, (1, tokens))
    with ExitStack() as stack:
        WAYS[way](model, subject, stack)
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(steps):
            model.zero_grad()
            begin = time.process_time()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            seconds = time.process_time() - begin
    print(json.dumps({"seconds": seconds, "loss": float(loss.detach())}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
