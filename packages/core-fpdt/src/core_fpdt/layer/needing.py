"""What the chunks of all layers will take, known when one chunk of one layer was run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Needed:
    """Bytes per token outside of the device.

    Args:
        inputs: of the hidden states of a layer.
        keys: of keys and values, if they are kept, in the heads of this rank.
        output: of the attention output and its lse, in the heads of this rank.
        share: of the tokens whose output is kept.
        sums: of what the backward pass of one layer has beside these.
        local: share of the tokens that this rank has.
    """

    inputs: float
    keys: float
    output: float
    share: float
    sums: float
    local: float

    def of_all(self, layers: int) -> Callable[[int], int]:
        """Bytes for a sequence of so many tokens, in a model of so many layers."""
        kept = self.inputs * self.local + self.keys + self.share * self.output
        return lambda tokens: int(tokens * (layers * kept + self.sums))

    def affordable(self, tokens: int, layers: int, available: int) -> float:
        """The share of the outputs that there is room for; negative where none would be enough."""
        nothing = replace(self, share=0.0).of_all(layers)(tokens)
        everything = replace(self, share=1.0).of_all(layers)(tokens)
        if everything <= available:
            return 1.0
        return (available - nothing) / max(everything - nothing, 1)


def per_token(tensor: Tensor, tokens: int) -> float:
    """Bytes of a chunk for each of its tokens."""
    return tensor.numel() * tensor.element_size() / max(tokens, 1)
