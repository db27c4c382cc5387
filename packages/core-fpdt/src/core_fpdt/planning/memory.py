"""What a step takes on a device and on its host, by part.

The device is looked at in the moments in which it can be fullest: while a chunk goes forward through
attention or the feed-forward part, while it comes back through either, and during the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core_fpdt.planning.job import Job

Parts = Mapping[str, float]

_FLOAT = 4
_COPIES = 4
"""Tensors of the size of a piece of the logits that exist at once."""
_JOINED = 16
"""Most chunks of keys that one call goes over, where they lie behind each other."""
_BUFFERS = 2
"""Chunks of a lane on the device at once: the one that is used, and the next."""


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
    if job.order == "query":
        sums = whole * keys * _FLOAT
    else:
        # Queries, gradients of outputs and float32 gradients of queries; outputs where not kept.
        sums = whole * queries * (2 * b + _FLOAT) + (1 - job.kept) * whole * (queries * b + lse)
    return {
        "layer inputs": shape.layers * local * shape.hidden * b,
        "attention outputs": shape.layers * job.kept * whole * (queries * b + lse),
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
    # The last chunk of a lane may be short; the fullest moment is with a full one.
    stream = job.local * job.shape.hidden * job.element
    always = {"rotary tables": 2 * job.local * job.shape.head_dim * job.element}
    always |= {"gathered weights": _gathered(job)}
    layer = {**always, "residual stream": 2 * stream}
    back = {**layer, "gradients of a layer": _layer_gradients(job)}
    exchange = _exchange(job)
    return {
        "forward, attention": {
            **layer,
            "chunk": _forward_attention(job),
            "buffers": _buffers(job, backward=False),
            "exchange": exchange,
        },
        "forward, feed-forward": {**layer, "chunk": _forward_mlp(job)},
        "loss": {**always, "residual stream": 3 * stream, "loss": _loss(job)},
        "backward, feed-forward": {**back, "chunk": _backward_mlp(job)},
        "backward, attention": {
            **back,
            "chunk": _backward_attention(job),
            "buffers": _buffers(job, backward=True),
            "exchange": exchange,
        },
    }


def _gathered(job: Job) -> float:
    """Weights that are whole on every rank: this layer, the next one, and the tables."""
    if job.states == "none" or (job.gpus == 1 and job.states == "device" and job.element == _FLOAT):
        return 0.0
    shape = job.shape
    tables = shape.parameters - shape.layers * shape.layer_parameters
    return (2 * shape.layer_parameters + tables) * job.element


def _layer_gradients(job: Job) -> float:
    """Sums in float32, and what one chunk adds to them."""
    return job.shape.layer_parameters * (_FLOAT + job.element)


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
    # Gate, its activation, and what it multiplies; each with its gradient.
    inner = 6 if job.shape.gated else 3
    output = job.chunk * job.query_width * job.element
    return 2 * _norm(job) + 2 * _hidden(job) + _qkv(job) + output + inner * _inner(job)


def _backward_attention(job: Job) -> float:
    output = job.chunk * job.query_width * job.element
    total = job.chunk * job.query_width * _FLOAT
    added = _qkv(job)
    if job.offload == "none" or (job.offload == "file" and job.hardware.name == "cpu"):
        joined = min(_JOINED, max(1, job.chunks - 1))
        added += (joined - 1) * 2 * job.chunk * job.key_width * job.element
    return _norm(job) + 2 * _hidden(job) + _qkv(job) + 2 * output + total + added


def _buffers(job: Job, *, backward: bool) -> float:
    """Chunks that come from the host while others are used."""
    if job.offload == "none" or job.hardware.name == "cpu":
        return 0.0
    b, c = job.element, job.chunk
    keys, queries = 2 * job.key_width, job.query_width
    if not backward:
        return _BUFFERS * c * keys * b
    inputs = _BUFFERS * _hidden(job)
    if job.order == "query":
        return inputs + _BUFFERS * c * (keys * (b + _FLOAT) + queries * b)
    return inputs + _BUFFERS * c * queries * (3 * b + _FLOAT) + c * keys * (b + _FLOAT)


def _exchange(job: Job) -> float:
    """What is sent and what is received, while queries, keys and values change hands."""
    return 0.0 if job.sharing == 1 else 2 * _qkv(job)


def _loss(job: Job) -> float:
    """A piece of the logits with its gradient, and the head's gradient in float32."""
    everything = job.local * job.shape.vocabulary * _FLOAT * _COPIES
    return min(everything, job.settings.loss_chunk_bytes) + job.shape.head_parameters * _FLOAT


_STATES = ("weights", "gradients", "optimizer")
