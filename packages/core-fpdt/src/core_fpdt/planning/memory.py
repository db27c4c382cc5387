"""What a step takes on a device and on its host, by part.

The device is looked at in the moments in which it can be fullest: while a chunk goes forward through
attention or the feed-forward part, while it comes back through either, and during the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core_fpdt.planning.job import Job
from core_fpdt.settings import JOINED_CHUNKS

Parts = Mapping[str, float]

_FLOAT = 4
_COPIES = 4
"""Tensors of the size of a piece of the logits that exist at once."""
_BUFFERS = 3
"""Chunks of a lane on the device at once: one is read, one is filled, one is written back."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Args:
        moment: when the device is fullest.
        device: what is on it then, by part.
        host: what is outside of it at most, by part.
    """

    moment: str
    device: Parts
    host: Parts

    @property
    def device_bytes(self) -> float:
        """On the device at its fullest."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        """Outside of the device."""
        return sum(self.host.values())

    @property
    def activations(self) -> float:
        """On the device at its fullest, without weights, gradients and optimizer."""
        return sum(size for part, size in self.device.items() if part not in _STATES)


def memory(job: Job) -> Memory:
    """Predict what a step takes."""
    common = {**_states(job, on="device"), "reserve": job.hardware.reserve}
    moments = {name: {**common, **parts} for name, parts in _moments(job).items()}
    if job.offload == "none":
        moments = {name: parts | _kept(job, name) for name, parts in moments.items()}
        host = _states(job, on="host")
    else:
        host = _kept(job, "backward") | _states(job, on="host")
    fullest = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(fullest, _some(moments[fullest]), _some(host))


def kept_per_token(job: Job, *, output: float | None = None) -> float:
    """Bytes that a token leaves in a layer between the passes, over all ranks.

    Args:
        job: what is planned.
        output: share of the tokens whose attention output is kept; that of the job by default.
    """
    share = job.kept if output is None else output
    b, ranks = job.element, job.sharing
    queries, keys = job.query_width * ranks, 2 * job.key_width * ranks
    lse = _FLOAT * queries / job.shape.head_dim
    return job.shape.hidden * b + share * (queries * b + lse) + job.settings.keep_keys * keys * b


def _some(parts: Parts) -> Parts:
    return {part: size for part, size in parts.items() if size}


def _kept(job: Job, moment: str) -> dict[str, float]:
    """Chunks that wait, and what belongs to the one layer that is run."""
    shape, b = job.shape, job.element
    local, whole = job.local, job.sequence
    queries, keys = job.query_width, 2 * job.key_width
    lse = _FLOAT * queries / shape.head_dim
    kept_keys = shape.layers if job.settings.keep_keys else int(moment != "loss")
    # In a file that is mapped, a lane has room for all tokens.
    mapped = job.offload == "file" and not job.staged
    outputs = float(job.kept > 0) if mapped else job.kept
    if job.order == "query":
        sums = whole * keys * _FLOAT
    else:
        # Queries, gradients of outputs and float32 gradients of queries; outputs where not kept.
        sums = whole * queries * (2 * b + _FLOAT) + (1 - outputs) * whole * (queries * b + lse)
    return {
        "layer inputs": shape.layers * local * shape.hidden * b,
        "attention outputs": shape.layers * outputs * whole * (queries * b + lse),
        "keys and values": kept_keys * whole * keys * b,
        "sums of a layer": sums if moment.startswith("backward") else 0.0,
    }


def _states(job: Job, on: str) -> dict[str, float]:
    own = job.shape.parameters / job.gpus
    if job.states == "none":
        sizes = (own * job.element, own * job.element, 0.0)
        return dict(zip(_STATES, sizes, strict=True)) if on == "device" else {}
    sizes = (own * _FLOAT, own * _FLOAT, own * 2 * _FLOAT)
    return dict(zip(_STATES, sizes, strict=True)) if on == job.states else {}


def _moments(job: Job) -> dict[str, dict[str, float]]:
    """Activations and buffers by moment."""
    stream = job.local * job.shape.hidden * job.element
    always = {
        "rotary tables": 0.0
        if job.shape.positions
        else 2 * job.local * job.shape.head_dim * job.element,
        "gathered weights": _gathered(job),
        "buffers": _buffers(job, backward=False),
    }
    ahead = {**always, "residual stream": 2 * stream}
    back = {**ahead, "buffers": _buffers(job, backward=True)}
    shape, b = job.shape, job.element
    first = shape.hidden * shape.intermediate * shape.experts * b
    # The sums are made when the first chunk is through.
    sums = shape.layer_parameters * _FLOAT * (job.chunks > 1)
    return {
        "forward, attention": {
            **ahead,
            "chunk": _forward_attention(job),
            "exchange": _exchange(job),
        },
        "forward, feed-forward": {**ahead, "chunk": _forward_mlp(job)},
        "loss": {**always, "residual stream": 3 * stream, "loss": _loss(job)},
        "backward, feed-forward": {
            **back,
            "gradients of a layer": sums + first,
            "chunk": _backward_mlp(job),
        },
        "backward, attention": {
            **back,
            "gradients of a layer": sums + shape.layer_parameters * b,
            "chunk": _backward_attention(job),
            "exchange": _exchange(job),
        },
    }


def _gathered(job: Job) -> float:
    """Weights that are whole on every rank: this layer, the next one, and the tables."""
    if job.states == "none" or (job.gpus == 1 and job.states == "device" and job.element == _FLOAT):
        return 0.0
    shape = job.shape
    tables = shape.parameters - shape.layers * shape.layer_parameters
    return (2 * shape.layer_parameters + tables) * job.element


def _qkv(job: Job) -> float:
    """Bytes of queries, keys and values of a chunk, in the heads of this rank."""
    return job.chunk * (job.query_width + 2 * job.key_width) * job.element


def _norm(job: Job) -> float:
    """Bytes that autograd keeps of a norm: a float32 copy, and the result before and after scaling."""
    copy = 0 if job.element == _FLOAT else _FLOAT
    return job.local_chunk * job.shape.hidden * (2 * job.element + copy)


def _hidden(job: Job) -> float:
    return job.local_chunk * job.shape.hidden * job.element


def _inner(job: Job) -> float:
    """Bytes of the inner width of the feed-forward part, of the tokens that are in it at once."""
    tokens = job.local_chunk / job.settings.mlp_chunks
    return tokens * job.shape.intermediate * job.shape.active * job.element


def _forward_attention(job: Job) -> float:
    # The running output, one block's, and their sum are float32.
    merged = 3 * job.chunk * job.query_width * _FLOAT
    return _hidden(job) + _qkv(job) + merged


def _forward_mlp(job: Job) -> float:
    return 3 * _hidden(job) + job.shape.matrices * _inner(job)


def _backward_mlp(job: Job) -> float:
    # Gate, its activation, and what it multiplies; each with its gradient. GPT-2's activation is made
    # of elementary steps, which are kept.
    inner = 6 if job.shape.gated else 7
    return 2 * _norm(job) + 2 * _hidden(job) + _qkv(job) + _output(job) + inner * _inner(job)


def _backward_attention(job: Job) -> float:
    queries = job.chunk * job.query_width
    added = _qkv(job)
    if not job.staged:
        joined = min(JOINED_CHUNKS, max(1, job.chunks - 1))
        added += (joined - 1) * 2 * job.chunk * job.key_width * job.element
    # The gradient of the output, and the sum of those of the queries.
    total = queries * (job.element + _FLOAT)
    return _norm(job) + 2 * _hidden(job) + _qkv(job) + _output(job) + total + added


def _output(job: Job) -> float:
    """What attention gave for a chunk, unless it is read where it waits."""
    in_place = job.kept == 1 and not job.staged
    return 0.0 if in_place else job.chunk * job.query_width * job.element


def _buffers(job: Job, *, backward: bool) -> float:
    """Chunks of every lane on their way to the host or back."""
    if not job.staged:
        return 0.0
    b, c = job.element, job.chunk
    keys, queries = 2 * job.key_width, job.query_width
    output = c * (queries * b + _FLOAT * queries / job.shape.head_dim)
    lanes = _hidden(job) + c * keys * b + output * (job.settings.keep_output > 0)
    if backward and job.order == "query":
        lanes += c * keys * _FLOAT
    elif backward:
        # Queries, gradients of outputs, and float32 gradients of queries.
        lanes += c * queries * (2 * b + _FLOAT)
    return _BUFFERS * lanes


def _exchange(job: Job) -> float:
    """What is sent and what is received, while queries, keys and values change hands."""
    return 0.0 if job.sharing == 1 else 2 * _qkv(job)


def _loss(job: Job) -> float:
    """A piece of the logits with its gradient, and the head's gradient in float32."""
    logits = job.local * job.shape.vocabulary * _FLOAT
    if logits * _COPIES <= job.settings.loss_chunk_bytes:
        # Few enough for the model's own loss: three copies, and those of 16 bits.
        return logits * 3 + logits / _FLOAT * (job.element % _FLOAT)
    return job.settings.loss_chunk_bytes + job.shape.head_parameters * _FLOAT


_STATES = ("weights", "gradients", "optimizer")
