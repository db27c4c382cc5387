"""The backward pass of a layer, chunk by chunk, in one of two orders.

Both run the layer's own forward again for its graph, with attention replaced by a function that
returns what was saved, and never attend anew where the output was kept. They differ in what is moved
while attention is gone backwards (paper, section 4.2 has the second one, for fixed layers).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.errors import ModelError
from core_fpdt.kernels.contract import Gradients
from core_fpdt.kernels.sinks import sink_gradient
from core_fpdt.layer.call import LayerCall, reach
from core_fpdt.layer.collecting import Collected
from core_fpdt.layer.rows import Saved
from core_fpdt.layer.step import Inputs, Reached


class _Row(NamedTuple):
    """A row of attention as it was in the forward pass, in the heads of this rank."""

    inputs: Inputs
    output: Tensor
    lse: Tensor


class Order:
    """What both orders share.

    Args:
        call: the call to go backwards.
    """

    def __init__(self, call: LayerCall) -> None:
        self.call = call
        self.rows: dict[int, _Row] = {}

    def attend(self, index: int, inputs: Inputs) -> Tensor:
        """Attention of the replay: the saved output, with this order's backward."""
        found: Tensor = _Replaced.apply(  # type: ignore[no-untyped-call]
            self, index, inputs.scores, inputs.query, inputs.key, inputs.value, inputs.sinks
        )
        return found

    def restore(self, index: int, inputs: Inputs) -> Tensor:
        """Find or compute what attention gave for a chunk; for the tokens of this rank."""
        call = self.call
        own = call.sharing.to_heads(index, inputs)
        if call.keeps_output(index):
            output, lse = call.lane("output").get(index), call.lane("lse").get(index)
        else:
            precise, lse = call.row(index, own)
            output = precise.to(own.query.dtype)
        self.rows[index] = _Row(own, output, lse)
        # Not the tensor of the row itself: the graph of the replay would become its history.
        return call.sharing.to_sequence(index, output).detach()

    def forget(self, index: int) -> None:
        """Drop what belongs to a chunk that is finished."""
        self.rows.pop(index, None)
        if self.call.keeps_output(index):
            for name in ("output", "lse"):
                self.call.lane(name).done(index)
                self.call.lane(name).drop(index)

    def arrive(
        self, index: int, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Take the gradient of a chunk's attention output; give those of its inputs that are known."""
        raise NotImplementedError

    def saved(self, index: int, grad: Tensor) -> Saved:
        """What the kernels need, with the gradient in the heads of this rank."""
        row = self.rows[index]
        grad = self.call.sharing.heads_of(index, grad, row.inputs)
        return Saved(grad.to(row.inputs.query.dtype), row.output, row.lse)

    def sinks(self, row: _Row, saved: Saved, heads: int) -> Tensor | None:
        """The gradient of the sinks, where there are some."""
        if row.inputs.sinks is None:
            return None
        own = sink_gradient(saved.grad, saved.output, saved.lse, row.inputs.sinks)
        return self.call.sharing.sinks_of_all(own, heads)


class QueryOrder(Order):
    """Chunks from last to first; each walks over the keys it sees, whose gradients add up.

    When a chunk's turn comes, all later rows have added to the gradients of its keys and values: one
    pass finishes everything. Moves keys, values and their float32 gradients.
    """

    def run(self, grad: Tensor, collected: Collected) -> None:
        """Go backwards.

        Args:
            grad: (B, s, H) gradient of what the layer returned.
            collected: takes the gradients.
        """
        call = self.call
        call.project()
        inputs = call.inputs()
        for index in reversed(range(call.count)):
            inputs.prefetch(index - 1)
            piece = collected.leaf(inputs.get(index))
            result, wanted = call.again(index, piece, self.attend)
            begin, end = call.bounds(index)
            collected.add(index, [call.hidden_of(result)], [grad[:, begin:end]], piece, wanted)
            del result
            self.forget(index)
            inputs.done(index)
            inputs.drop(index)

    def arrive(
        self, index: int, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Walk over the keys that the chunk sees; all its gradients are complete then."""
        call, row, heads = self.call, self.rows[index], grad.shape[1]
        saved = self.saved(index, grad)
        keys, values = call.lane("keys"), call.lane("values")
        key_sums = call.lane("key gradients", precise=True)
        value_sums = call.lane("value gradients", precise=True)
        assert call.blocks is not None
        query = row.inputs.query
        total = torch.zeros(query.shape, dtype=call.accumulator, device=query.device)
        blocks = list(call.blocks.row(index, whole=keys.whole and key_sums.whole))
        for number, (first, last, tile) in enumerate(blocks):
            for block in blocks[number + 1 : number + 2]:
                for lane in (keys, values, key_sums, value_sums):
                    lane.prefetch(block.first)
            key, value = keys.get(first, last), values.get(first, last)
            added = call.blocks.gradients(query, key, value, tile, saved)
            keys.done(first)
            values.done(first)
            total += added.query
            key_sums.add(first, added.key, last)
            value_sums.add(first, added.value, last)
        whole = Gradients(
            total.to(query.dtype),
            _taken(key_sums, index, row.inputs.key),
            _taken(value_sums, index, row.inputs.value),
        )
        keys.drop(index)
        values.drop(index)
        local = call.sharing.gradients_to_sequence(index, whole)
        return local.query, local.key, local.value, self.sinks(row, saved, heads)


class KeyOrder(Order):
    """First the gradients of all attention outputs; then over chunks of keys, first to last.

    Moves queries, outputs, their gradients and the float32 gradients of queries: less where there are
    as many heads of keys as of queries. Runs what comes before attention twice.
    """

    _arrived = False

    def run(self, grad: Tensor, collected: Collected) -> None:
        """Go backwards; see :meth:`QueryOrder.run`."""
        call = self.call
        call.project()
        inputs = call.inputs()
        for index in reversed(range(call.count)):
            inputs.prefetch(index - 1)
            piece = collected.leaf(inputs.get(index))
            result, wanted = call.again(index, piece, self.attend)
            begin, end = call.bounds(index)
            collected.add(index, [call.hidden_of(result)], [grad[:, begin:end]], piece, wanted)
            del result
            inputs.done(index)
        if not self._arrived:
            # Nothing before attention wants a gradient.
            return
        for index in range(call.count):
            inputs.prefetch(index + 1)
            found = self._column(index)
            piece = collected.leaf(inputs.get(index))
            reached, wanted = call.again(index, piece, reach)
            if not isinstance(reached, Reached):
                raise ModelError(f"{call.name} cannot be replayed", why="it no longer attends")
            outputs = [reached.inputs.query, reached.inputs.key, reached.inputs.value]
            collected.add(index, outputs, list(found), piece, wanted)
            inputs.done(index)
            inputs.drop(index)

    def arrive(
        self, index: int, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Keep the gradient until the keys that the chunk sees have their turn."""
        self._arrived = True
        call, row = self.call, self.rows[index]
        saved = self.saved(index, grad)
        call.lane("queries").put(index, row.inputs.query)
        call.lane("output gradients").put(index, saved.grad)
        sinks = self.sinks(row, saved, grad.shape[1])
        if not call.keeps_output(index):
            call.lane("output").put(index, row.output)
            call.lane("lse").put(index, row.lse)
        else:
            call.lane("output").done(index)
            call.lane("lse").done(index)
        self.rows.pop(index)
        return None, None, None, sinks

    def _column(self, index: int) -> Gradients:
        """Go over all rows that see a chunk of keys; give the gradients of its inputs."""
        call = self.call
        assert call.blocks is not None
        streamed = [call.lane(n) for n in ("queries", "output gradients", "output", "lse")]
        sums = call.lane("query gradients", precise=True)
        key, value = call.lane("keys").get(index), call.lane("values").get(index)
        key_total, value_total = (
            torch.zeros(t.shape, dtype=call.accumulator, device=t.device) for t in (key, value)
        )
        rows = list(call.blocks.column(index))
        for number, row in enumerate(rows):
            for later in rows[number + 1 : number + 2]:
                for lane in (*streamed, sums):
                    lane.prefetch(later)
            query, grad, output, lse = (lane.get(row) for lane in streamed)
            tile = call.blocks.tile(row, index)
            added = call.blocks.gradients(query, key, value, tile, Saved(grad, output, lse))
            sums.add(row, added.query)
            key_total += added.key
            value_total += added.value
            for lane in streamed:
                lane.done(row)
        query = streamed[0].get(index)
        whole = Gradients(
            _taken(sums, index, query), key_total.to(key.dtype), value_total.to(value.dtype)
        )
        for lane in (call.lane("keys"), call.lane("values"), streamed[0]):
            lane.done(index)
        for lane in (call.lane("keys"), call.lane("values"), *streamed):
            lane.drop(index)
        return call.sharing.gradients_to_sequence(index, whole)


def _taken(sums: Any, index: int, like: Tensor) -> Tensor:
    """What a lane has added up for a chunk, in the dtype of its tensor; zeros where nothing was."""
    try:
        total = sums.get(index)
    except KeyError:
        return torch.zeros_like(like)
    result: Tensor = total.to(like.dtype, copy=True)
    sums.done(index)
    sums.drop(index)
    return result


class _Replaced(torch.autograd.Function):
    """Attention of a replay: gives what was saved, and hands its gradient to the order."""

    @staticmethod
    def forward(ctx: Any, order: Order, index: int, scores: Any, *tensors: Any) -> Tensor:
        ctx.order, ctx.index = order, index
        query, key, value, sinks = tensors
        return order.restore(index, Inputs(query, key, value, scores, sinks))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Any, ...]:
        return (None, None, None, *ctx.order.arrive(ctx.index, grad))
