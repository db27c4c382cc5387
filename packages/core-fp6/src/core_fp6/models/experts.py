"""Experts of a mixture, whose weights lie side by side in tensors of three dimensions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from core_fp6 import ops
from core_fp6.models.sixbit import SixBit
from core_fp6.weights import packed
from core_fp6.weights.scaling import Scheme

DOWN = "down_proj"


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds weights of several experts in one parameter."""
    return any(
        weight.ndim == 3 and weight.is_floating_point()
        for weight in module.parameters(recurse=False)
    ) and hasattr(module, DOWN)


def names_of(experts: nn.Module) -> tuple[str, str]:
    """Names of the first and the second weight of experts that :func:`refusal` has no fault in."""
    return ("gate_up_proj" if cast(Any, experts).has_gate else "up_proj"), DOWN


def refusal(experts: nn.Module) -> str | None:
    """Why the weights of experts cannot become six-bit ones, or None where they can.

    What transformers says of its classes decides: weights ``[experts, rows, columns]``, a gate
    over the first product or an activation alone, no biases.
    """
    traits = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
    if not all(hasattr(experts, trait) for trait in traits):
        return f"{type(experts).__name__} does not say how its experts compute"
    said = cast(Any, experts)
    if said.is_transposed:
        return "experts with transposed weights"
    if said.has_bias:
        return "experts with biases"
    if said.has_post_expert_norm:
        return "experts followed by norms"
    held = {name for name, _ in [*experts.named_parameters(), *experts.named_buffers()]}
    further = held - set(names_of(experts))
    return f"experts with further tensors: {', '.join(sorted(further))}" if further else None


class FP6Experts(SixBit):
    """Experts with six-bit weights, called as those of transformers are.

    Args:
        original: the experts, from which everything but the weights is taken; it stays as it is.
        scheme: format and group size.
        device: of the parameters; that of ``original`` by default.
    """

    shell: Any

    def __init__(self, original: nn.Module, scheme: Scheme, device: Any = None) -> None:
        super().__init__()
        self.begin(scheme)
        weights = {name: cast(Tensor, getattr(original, name)) for name in names_of(original)}
        for name, weight in weights.items():
            self.add(name, weight.shape, device or weight.device)
        self.num_experts = len(weights[DOWN])
        # Its gate is asked for what lies between the products. It has no tensors left, and is kept
        # out of the modules of the model, where its class would promise weights.
        self.__dict__["shell"] = _without_weights(original)
        self.train(original.training)

    @classmethod
    def from_experts(
        cls,
        original: nn.Module,
        scheme: Scheme,
        scales: Mapping[str, Tensor | None] | None = None,
        name: str = "experts",
    ) -> FP6Experts:
        """Round the weights of experts.

        Args:
            original: experts that :func:`refusal` has no fault in; they stay as they are.
            scheme: format and group size.
            scales: scales to use, by the names of weights.
            name: what errors call the experts.

        Raises:
            ModelError: when a weight has NaN or infinities.
        """
        module = cls(original, scheme, "meta")
        for part in names_of(original):
            weight = packed.quantize(
                cast(Tensor, getattr(original, part)).detach(),
                scheme,
                scale=(scales or {}).get(part),
                layout="execution",
                name=f"{name}.{part}",
            )
            module.hold(part, weight)
        return module

    def to_experts(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Experts of the original class with the weights that the codes stand for."""
        experts = _without_weights(self.shell)
        for name in self.columns:
            experts.register_parameter(name, nn.Parameter(self.dequantized(name, dtype)))
        return experts.train(self.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts for each token.

        Args:
            hidden_states: ``[tokens, columns]``.
            top_k_index: int64 ``[tokens, chosen]``; what is beyond the last expert has weight 0, as
                expert parallelism marks experts of other ranks.
            top_k_weights: ``[tokens, chosen]``.

        Returns:
            ``[tokens, columns]`` in the dtype of ``hidden_states``.
        """
        tokens, chosen = top_k_index.shape
        first, second = self.columns
        index = top_k_index.reshape(-1).clamp(max=self.num_experts - 1)
        experts, order = torch.sort(index, stable=True)
        every = torch.arange(self.num_experts, device=index.device)
        ends = torch.searchsorted(experts, every, right=True).to(torch.int32)
        inner = ops.grouped_linear(hidden_states[order // chosen], self.packed(first), ends)
        gate = self.shell._apply_gate if self.shell.has_gate else self.shell.act_fn
        middle = self.led(gate(inner), second)
        outer = ops.grouped_linear(middle, self.packed(second), ends)
        weighted = outer * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        restored = weighted[torch.argsort(order)].view(tokens, chosen, -1)
        # Added up in a fixed order, as transformers' own grouped experts do.
        return restored.sum(1).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{type(self.shell).__name__}, experts={self.num_experts}, scheme={self.scheme.name}"


def _without_weights(experts: nn.Module) -> nn.Module:
    shell = copy.copy(experts)
    names = names_of(experts)
    held = experts.named_parameters(recurse=False)
    shell.__dict__["_parameters"] = {key: weight for key, weight in held if key not in names}
    return shell
