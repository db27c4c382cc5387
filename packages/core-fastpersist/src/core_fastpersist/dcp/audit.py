"""Finding out which tensors change between a submitted checkpoint and the next optimizer step.

Only such a tensor may be read late that nothing writes to before the optimizer does. Tensors do not
tell: fused AdamW changes parameters, and batch norm its statistics, without a new ``Tensor._version``. So
the first checkpoints are written from copies, and right before the next step of any optimizer the live
tensors are held against them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from core_fastpersist.tensors import source_of

logger = logging.getLogger("core_fastpersist")
_PART = 2**22


class Audit:
    """Knows which tensors of a run are safe to read late.

    Args:
        rounds: in how many checkpoints a tensor must not have changed before it is trusted; 0
            trusts all.
    """

    def __init__(self, rounds: int = 2) -> None:
        self.rounds = rounds
        self.volatile: set[str] = set()
        self._passed: Counter[str] = Counter()
        self._watched: dict[str, tuple[Tensor, Tensor]] = {}
        self._hook: RemovableHandle | None = None

    def unproven(self, names: Iterable[str]) -> set[str]:
        """Names of the tensors that must be copied in the next checkpoint."""
        return {n for n in names if n in self.volatile or self._passed[n] < self.rounds}

    def watch(self, live: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
        """Compare before the next step of any optimizer; both sides must stay alive until then."""
        self._watched = {n: (live[n], copies[n]) for n in copies if n not in self.volatile}
        if self._watched and self._hook is None:
            self._hook = register_optimizer_step_pre_hook(self._before_step)

    def compare(self) -> list[str]:
        """Hold the watched tensors against their copies now; returns those that have changed."""
        watched, self._watched = self._watched, {}
        changed = [name for name, (live, copy) in watched.items() if not _same(live, copy)]
        self._passed.update(watched.keys() - set(changed))
        self.volatile.update(changed)
        for name in changed:
            logger.info("%s changes between optimizer steps; every checkpoint copies it", name)
        return changed

    def close(self) -> None:
        """Stop watching."""
        self._watched = {}
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._watched:
            self.compare()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _same(live: Tensor, copy: Tensor) -> bool:
    return _hash(live) == _hash(copy)


def _hash(tensor: Tensor) -> bytes:
    source = source_of(local(tensor), "a watched tensor")
    if source.view is not None:
        return xxhash.xxh3_128_digest(source.view)
    hasher, part = xxhash.xxh3_128(), memoryview(bytearray(_PART))
    for begin in range(0, source.nbytes, _PART):
        length = min(_PART, source.nbytes - begin)
        source.copy(begin, begin + length, part[:length])
        hasher.update(part[:length])
    return hasher.digest()
