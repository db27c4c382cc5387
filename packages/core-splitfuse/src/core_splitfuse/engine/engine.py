"""The engine of core's contract, with Dynamic SplitFuse in it (DeepSpeed-FastGen, arXiv 2401.08671)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from core.engines import EngineStats, FinishReason, Request, Token
from core.engines.common import check_request, replace_weights
from core.engines.regimes import Regimes
from core.engines.sampling import Drawn, draw_each
from core.errors import EngineError, ModelError
from core.identity import CacheIdentity, identity_of
from core.owners import take
from core_splitfuse.attention.store import make_store
from core_splitfuse.engine.active import EXTRAS, Active, Extras
from core_splitfuse.engine.capacity import blocks_of
from core_splitfuse.engine.passes import Done, Passes
from core_splitfuse.engine.probing import measure, refuse_unknown_layers
from core_splitfuse.engine.requests import Requests
from core_splitfuse.engine.runner import Runner
from core_splitfuse.engine.salts import Salts
from core_splitfuse.engine.weights import Weights
from core_splitfuse.linears.model import PackedLinears, pack
from core_splitfuse.scheduling.blocks import BlockPool
from core_splitfuse.scheduling.modes import make_scheduler
from core_splitfuse.settings import SplitFuseSettings

logger = logging.getLogger("core")

_BUDGETS = {"cuda": 768, "cpu": 128}
_BLOCKS = {"cuda": 64, "cpu": 16}


class Engine:
    """Serves a live transformers model, many requests in every pass.

    Nothing of the model is copied or changed; between two steps it can train. Answers are those of
    ``model.generate``, whatever else is in the pass.

    Args:
        model: a causal language model of transformers.
        settings: how passes are packed; ``changes`` replace fields.

    Raises:
        ModelError: for a model that computes something else in packed passes, by layer and reason.
        EngineError: when there is no memory for keys and values, or somebody else has the model's
            attention.

    Example::

        engine = Engine(model, budget=128)
        engine.add(Request(prompt=[1, 2, 3]))
        while engine.busy:
            print(engine.step())
    """

    def __init__(
        self, model: nn.Module, settings: SplitFuseSettings | None = None, **changes: Any
    ) -> None:
        _require_language_model(model)
        refuse_unknown_layers(model)
        self.model = model
        self._runner = Runner(model, replace(settings or SplitFuseSettings(), **changes))
        self.settings = _fitted(self._runner.settings, self._runner.device)
        with ExitStack() as undo:
            self._release = _taken(model)
            undo.callback(self._release)
            # An engine that nobody closed keeps nobody from the model.
            finalize(self, self._release)
            self._linears = _packed(model, self.settings.pack_linears)
            if self._linears is not None:
                undo.callback(self._linears.restore)
            per_token = measure(self._runner, verify=self.settings.verify)
            blocks = blocks_of(model, self.settings, per_token, self._runner.device)
            size = self.settings.block_size
            store = make_store(blocks * size, size, self._runner.device)
            self.scheduler = make_scheduler(BlockPool(blocks, size), self.settings)
            self._passes = Passes(self._runner, store, self.scheduler.cost)
            self._weights = Weights(model)
            self._salts = Salts(model, shares=self.settings.prefix_cache)
            self._requests = Requests(
                self.scheduler,
                self._salts,
                Regimes(model),
                # What is set aside for one request is not enough for two.
                follows=self.settings.admission != "no_evict",
            )
            self._ended: Counter[FinishReason] = Counter()
            self._prompt_tokens = self._new_tokens = 0
            undo.pop_all()

    @property
    def identity(self) -> CacheIdentity:
        """Everything that keys and values of this engine depend on."""
        return identity_of(self.model, str(self._weights.version))

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> int:
        check_request(getattr(self.model, "config", None), request, EXTRAS)
        extras = Extras.of(request.extras)
        if extras.positions is not None and not self.settings.unrotated_keys:
            raise EngineError(
                "a request brings a policy of positions",
                why="this engine keeps keys as the model rotates them",
                fix="build it with splitfuse.unrotated_keys",
            )
        policy = extras.positions or self._runner.policy
        return self._requests.accept(request, extras, policy).number

    def cancel(self, request: int) -> None:
        if request in self._requests:
            self._requests[request].cancelled = True

    def step(self) -> list[Token]:
        if self._weights.raised():
            self._start_over()
        made = [self._end(active, "cancelled") for active in self._requests.over()]
        work = self.scheduler.schedule()
        if not work.chunks:
            return made
        done = self._passes.run(work, self._requests)
        made += [self._end(self._requests[chunk.sequence.id], "error") for chunk in done.failed]
        for chunk in done.computed:
            self.scheduler.computed(chunk)
        return made + self._draw(done)

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        pool = scheduler.pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(self._requests) - len(scheduler.running),
            kv_used=pool.owned * pool.size,
            kv_total=pool.count * pool.size,
            passes=self._passes.count,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            reused_tokens=scheduler.reused,
            evictions=scheduler.evictions,
            ended=dict(self._ended),
        )

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        with self._linears.unpacked() if self._linears else nullcontext():
            replace_weights(self.model, tensors)
        self.weights_changed()

    def weights_changed(self) -> None:
        self._weights.raise_version()
        self._start_over()

    def close(self) -> None:
        for active in list(self._requests.values()):
            self._requests.forget(active)
        if self._linears is not None:
            self._linears.restore()
        self._release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_over(self) -> None:
        """All that was computed is of other weights."""
        if self._linears is not None:
            self._linears.refresh()
        self._salts.renew(self._weights.version)
        self._requests.recompute()

    def _draw(self, done: Done) -> list[Token]:
        """Draw the next tokens, and the first ones of requests that waited for a prompt."""
        answered: list[Active] = []
        logits: list[Tensor] = []
        for chunk, row in zip(done.ended, done.logits, strict=True):
            active = self._requests[chunk.sequence.id]
            twins = self._requests.begin(active)
            if not active.answer.tokens:
                self._prompt_tokens += active.sequence.prompt * len(twins)
            answered += twins
            logits += [row] * len(twins)
        if not answered:
            return []
        drawn = draw_each(torch.stack(logits), [active.answer for active in answered])
        return [self._token(*pair) for pair in zip(answered, drawn, strict=True)]

    def _token(self, active: Active, drawn: Drawn | Exception) -> Token:
        if isinstance(drawn, Exception):
            logger.warning("request %d failed: %s", active.number, drawn)
            return self._end(active, "error")
        self._new_tokens += 1
        token = Token(request=active.number, weights=self._weights.version, **drawn._asdict())
        if drawn.finish is None:
            self._requests.extend(active, drawn.id)
        else:
            self._end(active, drawn.finish)
        return token

    def _end(self, active: Active, finish: FinishReason) -> Token:
        self._requests.forget(active)
        self._ended[finish] += 1
        version = self._weights.version
        return Token(request=active.number, id=-1, finish=finish, weights=version)


def _fitted(settings: SplitFuseSettings, device: torch.device) -> SplitFuseSettings:
    """The settings with what suits the device where they leave it open."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    budget, size = settings.budget or _BUDGETS[kind], settings.block_size or _BLOCKS[kind]
    return replace(settings, budget=budget, block_size=size)


def _taken(model: nn.Module) -> Callable[[], None]:
    """Keep everybody else from the attention of the model."""
    try:
        return take(model, ["attention"], "an engine of core-splitfuse")
    except ModelError as error:
        raise EngineError(error.what, why=error.why, fix=error.fix) from error


def _packed(model: nn.Module, wanted: bool | str) -> PackedLinears | None:
    if wanted != "auto":
        return pack(model) if wanted else None
    parameters = list(model.parameters())
    if any(p.requires_grad or p.device.type != "cpu" for p in parameters):
        return None
    try:
        return pack(model)
    except EngineError as error:
        logger.info("linear layers stay as they are: %s", error)
        return None


def _require_language_model(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "vocab_size") or not hasattr(model, "generate"):
        why = "it is no causal language model of transformers"
        raise EngineError(f"{type(model).__name__} cannot be served", why=why)
