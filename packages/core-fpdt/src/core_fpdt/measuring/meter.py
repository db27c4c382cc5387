"""What tensors take while a model runs: exact, and the same on every machine.

The resident memory of a process depends on its allocator, and ``torch.cuda.max_memory_allocated`` on
a GPU. Here the storages that operators give out are summed while they live, so that a test on a CPU
can say what a token costs. What a kernel takes inside of itself is not seen.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Predicate = Callable[[torch.UntypedStorage], bool]

_hosted: ContextVar[bool] = ContextVar("hosted", default=False)


class Kind(Enum):
    """What a storage holds."""

    ACTIVATION = "activation"
    PARAMETER = "parameter"
    GRADIENT = "gradient"
    HOST = "host"


@contextmanager
def hosted() -> Generator[None]:
    """Count storages that are made inside as host memory, on whatever device they are.

    Example:
        >>> with Meter() as meter, hosted():
        ...     kept = torch.empty(1024, dtype=torch.uint8)
        >>> meter.peak, meter.host_peak
        (0, 1024)
    """
    token = _hosted.set(True)
    try:
        yield
    finally:
        _hosted.reset(token)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the storages that live while it is entered; views count once.

    Storages that existed before count from the first operator that reads them. Host memory is what
    is made under :func:`hosted`, what is mapped from a file, what is pinned, and what ``host`` says.

    Args:
        model: its parameters, and their gradients once autograd has stored them, count apart.
        host: tells of further storages that they are host memory.

    Example:
        >>> with Meter() as meter:
        ...     left = torch.ones(256)
        ...     right = (left * 2)[1:]
        ...     del left
        >>> meter.current, meter.peak
        (1024, 2048)
    """

    def __init__(self, model: nn.Module | None = None, host: Predicate | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._host = host
        self._sizes: dict[int, tuple[Kind, int]] = {}
        self._dead: deque[int] = deque()
        self._handles: list[Any] = []
        self._live = dict.fromkeys(Kind, 0)
        self._peaks = dict.fromkeys(Kind, 0)
        self._device_peak = 0

    def __enter__(self) -> Meter:
        parameters = list(self._model.parameters()) if self._model is not None else []
        self._see(parameters, Kind.PARAMETER)
        self._see([p.grad for p in parameters if p.grad is not None], Kind.GRADIENT)
        for parameter in parameters:
            if parameter.requires_grad:
                hooked: Any = parameter
                self._handles.append(hooked.register_post_accumulate_grad_hook(self._stored))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(kind not in _PLAIN and hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a wrapper comes back with what it holds
        given = dict(kwargs or {})
        self._see(_tensors((args, given)))
        result = func(*args, **given)
        self._see(_tensors(result))
        return result

    @property
    def current(self) -> int:
        """Bytes of activations that live now."""
        return self._now(Kind.ACTIVATION)

    @property
    def peak(self) -> int:
        """The most bytes of activations that lived at once."""
        return self._peaks[Kind.ACTIVATION]

    @property
    def device_peak(self) -> int:
        """The most bytes of activations, parameters and gradients that lived at once."""
        return self._device_peak

    @property
    def host_current(self) -> int:
        """Bytes of host memory that live now."""
        return self._now(Kind.HOST)

    @property
    def host_peak(self) -> int:
        """The most bytes of host memory that lived at once."""
        return self._peaks[Kind.HOST]

    @property
    def parameters(self) -> int:
        """Bytes of the parameters of the model."""
        return self._now(Kind.PARAMETER)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of the parameters that live now."""
        return self._now(Kind.GRADIENT)

    def _stored(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._see([parameter.grad], Kind.GRADIENT)

    def _see(self, tensors: Iterable[Tensor], kind: Kind | None = None) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if _is_hollow(storage):
                continue
            self._bury()  # what lived at this address before is gone
            # The storage's object lives as long as the storage, whoever else refers to it.
            key = id(storage)
            if key not in self._sizes:
                chosen = kind or (Kind.HOST if self._is_host(storage) else Kind.ACTIVATION)
                last = weakref.finalize(storage, self._dead.append, key)
                last.atexit = False
                self._count(key, chosen, storage.nbytes())
            elif kind is not None and self._sizes[key][0] is not kind:
                self._count(key, kind, self._forget(key))

    def _is_host(self, storage: torch.UntypedStorage) -> bool:
        if _hosted.get() or storage.filename is not None:
            return True
        if self._host is not None and self._host(storage):
            return True
        return storage.device.type == "cpu" and torch.cuda.is_available() and storage.is_pinned()

    def _count(self, key: int, kind: Kind, size: int) -> None:
        self._sizes[key] = kind, size
        self._live[kind] += size
        self._peaks[kind] = max(self._peaks[kind], self._live[kind])
        device = sum(self._live.values()) - self._live[Kind.HOST]
        self._device_peak = max(self._device_peak, device)

    def _forget(self, key: int) -> int:
        kind, size = self._sizes.pop(key)
        self._live[kind] -= size
        return size

    def _bury(self) -> None:
        # Storages die in any thread and between any two instructions: they only leave a note.
        while self._dead:
            self._forget(self._dead.popleft())

    def _now(self, kind: Kind) -> int:
        self._bury()
        return self._live[kind]


def per_token(measure: Callable[[int], float], short: int, long: int) -> float:
    """Bytes that one more token costs: the slope between two lengths.

    Args:
        measure: bytes at a number of tokens.
        short: the smaller number of tokens.
        long: the larger one.

    Example:
        >>> per_token(lambda tokens: 1000 + 8 * tokens, 64, 128)
        8.0
    """
    if not 0 < short < long:
        raise ValueError(f"no slope between {short} and {long} tokens")
    return (measure(long) - measure(short)) / (long - short)


_PLAIN = (Tensor, nn.Parameter)


def _is_hollow(storage: torch.UntypedStorage) -> bool:
    """Whether it has a size and no memory: of meta tensors, and of tensors that wrap others."""
    if storage.device.type == "meta":
        return True
    try:
        return storage.nbytes() > 0 and storage.data_ptr() == 0
    except RuntimeError:  # so PyTorch says of the storages of wrappers
        return True


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
