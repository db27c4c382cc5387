"""The state that a layer is run in, kept so that it can be run again the same way."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class Conditions:
    """Autocast and the modes of modules as they are now, to be entered again.

    Args:
        device: where the layer runs.
        module: the layer.
    """

    def __init__(self, device: torch.device, module: nn.Module) -> None:
        self._modes = [(part, part.training) for part in module.modules()]
        self._device = device
        self._enabled = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)

    @contextmanager
    def again(self) -> Generator[None]:
        """Run under the same autocast, without its cache, and train or evaluate as then.

        The cache would hand weights that were cast without a graph to the pass that needs one.
        """
        changed = [part for part, training in self._modes if part.training != training]
        for part in changed:
            part.training = not part.training
        try:
            with torch.autocast(
                self._device.type, dtype=self._dtype, enabled=self._enabled, cache_enabled=False
            ):
                yield
        finally:
            for part in changed:
                part.training = not part.training


def random_state(device: torch.device) -> list[Tensor]:
    """The state of the random generators that a layer on ``device`` may draw from."""
    if device.type == "cuda":
        return [torch.get_rng_state(), torch.cuda.get_rng_state(device)]
    return [torch.get_rng_state()]


@contextmanager
def replayed(state: list[Tensor], device: torch.device) -> Generator[None]:
    """Draw what was drawn after ``state`` was taken; the generators are left as they were."""
    with ExitStack() as stack:
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.set_rng_state(state[0])
        if devices:
            torch.cuda.set_rng_state(state[1], device)
        yield
