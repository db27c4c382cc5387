"""What is to be planned: a model, a sequence, and the devices that share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from core.errors import SettingsError
from core_fpdt.layer.traffic import cheaper_order
from core_fpdt.planning.hardware import Hardware
from core_fpdt.planning.shape import ModelShape
from core_fpdt.settings import CHUNK_TOKENS, FPDTSettings

States = Literal["device", "host", "none"]

_MOST_TOKENS = 2**40
_MOST_DEVICES = 2**20


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training step of one sequence on each group of ranks.

    Args:
        shape: the model.
        hardware: each device, and the node around it.
        sequence: tokens of a sequence.
        gpus: devices in all; weights, gradients and optimizer are sharded over them.
        ranks: devices that share a sequence; the largest divisor of ``gpus`` that leaves each of
            them a query head, if 0.
        settings: how layers are run.
        element: bytes of an element of weights and activations while computing.
        states: where float32 weights, gradients and the optimizer's state are; ``none`` counts
            weights of ``element`` bytes and their gradients only, for a step without an optimizer.

    Raises:
        SettingsError: for values that do not fit together.
    """

    shape: ModelShape
    hardware: Hardware
    sequence: int
    gpus: int = 1
    ranks: int = 0
    settings: FPDTSettings = field(default_factory=FPDTSettings)
    element: int = 2
    states: States = "device"

    def __post_init__(self) -> None:
        if not 1 <= self.sequence <= _MOST_TOKENS:
            raise SettingsError(f"{self.sequence} tokens cannot be planned")
        if not 1 <= self.gpus <= _MOST_DEVICES:
            raise SettingsError(f"{self.gpus} devices cannot be planned")
        if self.ranks < 0 or (self.ranks and self.gpus % self.ranks):
            raise SettingsError(f"{self.gpus} devices cannot be groups of {self.ranks}")
        if self.ranks > self.shape.heads:
            raise SettingsError(
                f"{self.ranks} ranks cannot share a sequence",
                why=f"{self.shape.name} has {self.shape.heads} heads",
                fix="share it by fewer ranks, and train on more sequences at once",
            )

    @cached_property
    def sharing(self) -> int:
        """Ranks that share a sequence."""
        heads = self.shape.heads
        return self.ranks or max(n for n in range(1, heads + 1) if self.gpus % n == 0)

    @cached_property
    def chunk(self) -> int:
        """Tokens of a chunk, over all ranks that share the sequence."""
        usual = CHUNK_TOKENS["cpu" if self.hardware.name == "cpu" else "cuda"]
        return min(self.settings.chunk_tokens or usual, self.sequence)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.sequence // self.chunk)

    @property
    def local_chunk(self) -> float:
        """Tokens of a chunk on one rank."""
        return self.chunk / self.sharing

    @property
    def local(self) -> float:
        """Tokens of the sequence on one rank."""
        return self.sequence / self.sharing

    @cached_property
    def offload(self) -> Literal["none", "host", "file"]:
        """Where chunks wait; the host memory of a CPU is where they are anyway."""
        wanted = self.settings.offload
        if self.settings.delay is not None:
            return "host"
        if self.hardware.name == "cpu":
            return "file" if wanted == "file" else "none"
        return "host" if wanted == "auto" else wanted

    @property
    def staged(self) -> bool:
        """Whether chunks come back into buffers on the device, instead of being read in place."""
        if self.settings.delay is not None:
            return True
        return self.offload != "none" and self.hardware.name != "cpu"

    @cached_property
    def order(self) -> Literal["query", "key"]:
        """What the outer loop of the backward pass goes over."""
        if self.settings.order != "auto":
            return self.settings.order
        if self.offload == "none":
            return "query"
        shape = self.shape
        return cheaper_order(shape.heads, shape.key_heads, shape.head_dim, self.element)

    @property
    def query_width(self) -> float:
        """Width of the query heads of one rank; heads that do not divide evenly are filled up."""
        return -(-self.shape.heads // self.sharing) * self.shape.head_dim

    @property
    def key_width(self) -> float:
        """Width of the key heads of one rank, at least one."""
        return max(1.0, self.shape.key_heads / self.sharing) * self.shape.head_dim

    @property
    def kept(self) -> float:
        """Share of the tokens whose attention output is kept: whole chunks only."""
        skipped = (1 - self.settings.keep_output) * self.sequence
        first = -(-(skipped - 1e-9) // self.chunk)
        return max(0.0, 1 - first * self.chunk / self.sequence)

    @property
    def ranks_of_node(self) -> int:
        """Ranks whose host memory is that of one node."""
        return min(self.gpus, self.hardware.node)
