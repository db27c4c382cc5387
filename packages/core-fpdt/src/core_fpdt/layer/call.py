"""One call of a decoder layer, run chunk by chunk: what it keeps, and how its chunks are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.softmax import Partial
from core_fpdt.kernels.choosing import Chooser
from core_fpdt.kernels.sinks import apply_sinks
from core_fpdt.layer.held import Held
from core_fpdt.layer.needing import Needed, per_token
from core_fpdt.layer.replaying import Conditions, random_state, replayed
from core_fpdt.layer.rows import Blocks
from core_fpdt.layer.slicing import Arguments
from core_fpdt.layer.step import Attending, Inputs, Reached, Step, in_force
from core_fpdt.layer.traffic import cheaper_order
from core_fpdt.masks.lazy import LazyMask
from core_fpdt.parallel.sharing import Sharing
from core_fpdt.store.contract import Lane, Store


@dataclass(frozen=True)
class Keeping:
    """What is kept between the forward and the backward pass beside the inputs of the layer.

    Args:
        output: share of the tokens, at the end, whose attention output and lse are kept. Rows cost
            the more to compute the later they are.
        keys: whether keys and values are.
        order: of the backward pass: ``query``, ``key``, or ``auto`` for the cheaper one.
    """

    output: float
    keys: bool
    order: str


class LayerCall:
    """One call of a layer.

    Args:
        layer: the layer.
        forward: its forward, taking hidden states and arguments.
        hidden: (B, s, H) hidden states of this rank.
        arguments: its other arguments.
        mask: who sees whom in the whole sequence.
        sharing: which tokens of each chunk this rank has, and how heads are exchanged.
        store: where chunks wait.
        kernels: what computes blocks of attention.
        keeping: what is kept; ``None`` for a pass that is not gone backwards.
        before_more: told what all chunks will take, when the first one was run; says what is kept.
        rotated: a policy of positions is in force.
    """

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        hidden: Tensor,
        arguments: Arguments,
        mask: LazyMask,
        sharing: Sharing,
        store: Store,
        kernels: Chooser,
        keeping: Keeping | None,
        before_more: Callable[[Needed], Keeping] | None = None,
        rotated: bool = False,
    ) -> None:
        self.layer = layer
        self.arguments = arguments
        self.sharing = sharing
        self.keeping = keeping
        self.device = hidden.device
        self.count = len(sharing.edges) - 1
        self.blocks: Blocks | None = None
        self._forward = forward
        self._rotated = rotated
        self._before_more = before_more
        self._mask = mask
        self._kernels = kernels
        self._store = store
        self._conditions = Conditions(hidden.device, layer)
        self._random: list[list[Tensor]] = []
        self._lanes: dict[str, Lane] = {}
        self._held: Held | None = None
        self._heads: tuple[int, int, int, int] | None = None
        self._attended: tuple[Inputs, Tensor, Tensor] | None = None
        self._shape: Callable[[Tensor], Any] = _only

    @property
    def name(self) -> str:
        """Class of the layer, for messages."""
        return type(self.layer).__name__

    def lane(self, name: str, *, dim: int = 2, precise: bool = False) -> Lane:
        """A lane of this call along the whole sequence, opened when it is first asked for.

        Args:
            name: what is in it.
            dim: the dimension of chunks that is the sequence.
            precise: whether it adds up, in float32 (float64 for float64).
        """
        if name not in self._lanes:
            local = name == "inputs"
            edges = self.sharing.local_edges if local else self.sharing.edges
            dtype = self.accumulator if precise else None
            whole = "keys" in name or "values" in name or precise
            self._lanes[name] = self._store.lane(name, edges, dim=dim, dtype=dtype, whole=whole)
        return self._lanes[name]

    @property
    def accumulator(self) -> torch.dtype:
        """What gradients of keys, values and queries are added up in."""
        double = any(p.dtype == torch.float64 for p in self.layer.parameters())
        return torch.float64 if double else torch.float32

    @property
    def offloads(self) -> bool:
        """Whether inputs wait off the device; else whoever calls must :meth:`hold` them."""
        return self._store.offloads

    @property
    def chosen_order(self) -> str:
        """The order of the backward pass; left open, it is what moves fewer bytes, if any move."""
        wanted = "auto" if self.keeping is None else self.keeping.order
        if wanted != "auto":
            return wanted
        return cheaper_order(*self._heads) if self.offloads and self._heads else "query"

    def hold(self, hidden: Tensor) -> None:
        """Take the hidden states that the forward pass ran on, where they stayed on the device."""
        self._held = Held(hidden, self.sharing.local_edges)

    def inputs(self) -> Lane | Held:
        """The chunks of hidden states."""
        return self.lane("inputs", dim=1) if self._held is None else self._held

    def close(self) -> None:
        """Give everything back that is kept."""
        for lane in self._lanes.values():
            lane.close()
        self._lanes = {}
        self._held = None

    def keeps_output(self, index: int) -> bool:
        """Whether the attention output of a chunk is kept."""
        if self.keeping is None:
            return False
        skipped = (1 - self.keeping.output) * self.sharing.edges[-1]
        return self.sharing.edges[index] >= skipped - 1e-9

    def bounds(self, index: int) -> tuple[int, int]:
        """Tokens ``[begin, end)`` of this rank that belong to a chunk."""
        return self.sharing.local_edges[index], self.sharing.local_edges[index + 1]

    def forward(self, hidden: Tensor) -> Tensor:
        """Run all chunks in order.

        Args:
            hidden: (B, s, H).

        Returns:
            (B, s, H) the hidden states that the layer returns.
        """
        output: Tensor | None = None
        for index in range(self.count):
            begin, end = self.bounds(index)
            piece = hidden[:, begin:end]
            if self.keeping is not None:
                self._random.append(random_state(self.device))
                if self.offloads:
                    self.lane("inputs", dim=1).put(index, piece)
            result = self.hidden_of(self.run(index, piece, self.attend))
            if output is None:
                output = result.new_empty((*hidden.shape[:2], *result.shape[2:]))
            output[:, begin:end] = result
            del result
            if index == 0 and self._before_more is not None and self.keeping is not None:
                self.keeping = self._before_more(self._needed(piece, self.keeping))
            self._attended = None
        if self.keeping is None:
            self.close()
        elif not self.keeping.keys:
            self._drop("keys", "values")
        assert output is not None
        return output

    def _needed(self, piece: Tensor, keeping: Keeping) -> Needed:
        """What the chunks of a layer take, seen from its first one."""
        here, whole = self.bounds(0)[1], self.sharing.edges[1]
        local = self.sharing.local_edges[-1] / self.sharing.edges[-1]
        inputs = per_token(piece, here)
        if self._attended is None:
            return Needed(inputs, 0.0, 0.0, 0.0, 0.0, local)
        own, output, lse = self._attended
        keys = per_token(own.key, whole) + per_token(own.value, whole)
        kept = per_token(output, whole) + per_token(lse, whole)
        precise = self.accumulator.itemsize / own.query.element_size()
        if self.chosen_order == "query":
            sums = precise * keys
        else:
            sums = (1 + precise) * per_token(own.query, whole) + 2 * kept
        if not keeping.keys:
            keys, sums = 0.0, sums + keys
        return Needed(inputs, keys, kept, keeping.output, sums, local)

    def _drop(self, *names: str) -> None:
        for name in names:
            if name in self._lanes:
                self._lanes.pop(name).close()

    def run(self, index: int, hidden: Tensor, attending: Attending) -> Any:
        """Run the layer on one chunk; its attention is ``attending``."""
        begin, end = self.bounds(index)
        args, kwargs, _ = self.arguments.chunk(begin, end, leaf=False)
        return self._run(index, attending, hidden, args, kwargs)

    def again(self, index: int, hidden: Tensor, attending: Attending) -> tuple[Any, list[Tensor]]:
        """Run the layer on one chunk as in the forward pass, now for its graph.

        Returns:
            What it returns, or the :class:`Reached` that ended it; and the chunks of its
            differentiable arguments, as leaves.
        """
        begin, end = self.bounds(index)
        args, kwargs, wanted = self.arguments.chunk(begin, end, leaf=True)
        with torch.enable_grad(), replayed(self._random[index], self.device):
            try:
                return self._run(index, attending, hidden, args, kwargs), wanted
            except Reached as reached:
                # Its frames hold the graph, and one of them holds it.
                return reached.with_traceback(None), wanted

    def _run(
        self,
        index: int,
        attending: Attending,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        step = Step(index, attending, self.arguments.find(LazyMask), self._rotated)
        with self._conditions.again(), in_force(step):
            return self._forward(hidden, *args, **kwargs)

    def hidden_of(self, result: Any) -> Tensor:
        """The hidden states in what the layer returned.

        Raises:
            ModelError: for a layer that returns more than these.
        """
        if isinstance(result, Tensor):
            return result
        if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
            rest: tuple[Any, ...] = result[1:]
            if not any(isinstance(value, Tensor) for value in rest):
                self._shape = _first(rest)
                return result[0]
        why = "it returns tensors beside its hidden states, which chunks cannot be put together to"
        raise ModelError(f"{self.name} cannot be run in chunks", why=why)

    def shaped(self, output: Tensor) -> Any:
        """Hidden states in the form in which the layer returns them."""
        return self._shape(output)

    def attend(self, index: int, inputs: Inputs) -> Tensor:
        """Attention of the forward pass: keep keys and values, attend, keep the result."""
        own = self.sharing.to_heads(index, inputs)
        query = own.query
        self._heads = query.shape[1], own.key.shape[1], query.shape[3], query.element_size()
        self.keep_keys(index, own)
        output, lse = self.row(index, own)
        output = output.to(own.query.dtype)
        if index == 0:
            self._attended = own, output, lse
        if self.keeps_output(index):
            self.lane("output").put(index, output)
            self.lane("lse").put(index, lse)
        return self.sharing.to_sequence(index, output)

    def keep_keys(self, index: int, own: Inputs) -> None:
        """Put keys and values of a chunk where later chunks find them."""
        self.lane("keys").put(index, own.key)
        self.lane("values").put(index, own.value)

    def row(self, index: int, own: Inputs) -> Partial:
        """Attend with a chunk of queries, of the heads of this rank."""
        if self.blocks is None:
            self.blocks = Blocks(self._mask, self.sharing.edges, self._kernels, own.scores)
        part = self.blocks.attend(index, own.query, self.lane("keys"), self.lane("values"))
        return part if own.sinks is None else apply_sinks(part, own.sinks)

    def project(self) -> None:
        """Compute keys and values of all chunks once more, where they were not kept."""
        if "keys" in self._lanes or self.blocks is None:
            return
        inputs = self.inputs()
        for index in range(self.count):
            with torch.no_grad():
                reached, _ = self.again(index, inputs.get(index), reach)
            if isinstance(reached, Reached):
                self.keep_keys(index, self.sharing.to_heads(index, reached.inputs))
            inputs.done(index)


def reach(index: int, inputs: Inputs) -> Tensor:
    """Attention that ends the run of a layer."""
    raise Reached(inputs)


def _only(output: Tensor) -> Any:
    return output


def _first(rest: Sequence[Any]) -> Callable[[Tensor], Any]:
    return lambda output: (output, *rest)
