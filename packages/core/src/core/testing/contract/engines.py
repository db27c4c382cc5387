"""Engines: the model's own tokens, requests that do not disturb each other, a model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from core.contributions import EngineType
from core.engines import Engine, Request, Sampling, Token, generate
from core.errors import CoreError
from core.identity import CacheIdentity
from core.testing import tiny
from core.testing.contract.answers import NEW, Ids, prompts_for, reference
from core.testing.contract.check import Skip, checks_of, require, require_refused
from core.testing.contract.subject import Subject
from core.testing.contract.untouched import logits_of, overwrite, state_of

_OTHER = 7
_GREEDY = Sampling(max_new_tokens=NEW)
_DRAWN = Sampling(max_new_tokens=NEW, temperature=1.0, seed=3)


def greedy(subject: Subject) -> None:
    """Greedy answers are those of model.generate, token for token."""
    for engine_type, build in _pairs(subject):
        model, prompts = build(), prompts_for(build)
        with _engine(subject, engine_type, model) as engine:
            found = [list(c.ids) for c in generate(engine, prompts, _GREEDY)]
        for prompt, ids in zip(prompts, found, strict=True):
            _require_same(engine_type, ids, reference(build, prompt), f"{len(prompt)} tokens")


def live_weights(subject: Subject) -> None:
    """The engine runs on the live module: changed weights change the next tokens."""
    for engine_type, build in _pairs(subject):
        model, other, prompt = build(), build(seed=_OTHER), prompts_for(build)[0]
        with _engine(subject, engine_type, model) as engine:
            generate(engine, [prompt], _GREEDY)
            overwrite(model, other)
            (found,) = generate(engine, [prompt], _GREEDY)
        require(
            list(found.ids)[:4] == reference(build, prompt, seed=_OTHER)[:4],
            f"{engine_type.name!r} does not see weights that changed in the module",
        )


def weights_changed(subject: Subject) -> None:
    """weights_changed() raises the version of tokens, and the identity where there is one."""
    for engine_type, build in _pairs(subject):
        model, other, prompt = build(), build(seed=_OTHER), prompts_for(build)[0]
        with _engine(subject, engine_type, model) as engine:
            before, salt = generate(engine, [prompt], _GREEDY)[0], _salt(engine)
            overwrite(model, other)
            engine.weights_changed()
            after = generate(engine, [prompt], _GREEDY)[0]
            name = repr(engine_type.name)
            other_salt = salt is None or salt != _salt(engine)
            require(other_salt, f"{name} keeps its identity after weights_changed()")
        newer = min(after.weights) > max(before.weights)
        require(newer, f"{name} does not raise its version on weights_changed()")
        seen = list(after.ids)[:4] == reference(build, prompt, seed=_OTHER)[:4]
        require(seen, f"{name} answers with old weights after weights_changed()")


def load_weights(subject: Subject) -> None:
    """load_weights() replaces by name, raises the version, and refuses the unknown unchanged."""
    for engine_type, build in _pairs(subject):
        model, other, prompt = build(), build(seed=_OTHER), prompts_for(build)[0]
        with _engine(subject, engine_type, model) as engine:
            before = generate(engine, [prompt], _GREEDY)[0]
            name, weight = next(iter(other.named_parameters()))
            for bad in [("no.such.weight", weight), (name, weight.detach().flatten())]:
                given = [(name, torch.zeros_like(weight)), bad]
                what = (
                    f"{engine_type.name!r} accepts the weight {bad[0]!r} of {tuple(bad[1].shape)}"
                )
                require_refused(partial(engine.load_weights, given), what)
            again = generate(engine, [prompt], _GREEDY)[0]
            refused = again.ids == before.ids
            require(refused, f"{engine_type.name!r} keeps a part of weights that it refused")
            engine.load_weights(other.named_parameters())
            after = generate(engine, [prompt], _GREEDY)[0]
        loaded = list(after.ids)[:4] == reference(build, prompt, seed=_OTHER)[:4]
        require(loaded, f"{engine_type.name!r} answers with other weights than were loaded")
        newer = min(after.weights) > max(before.weights)
        require(newer, f"{engine_type.name!r} does not raise the version of its weights")


def refuses(subject: Subject) -> None:
    """Empty prompts, unknown token ids and too long requests are refused, and harm nobody."""
    for engine_type, build in _pairs(subject):
        model, prompt = build(), prompts_for(build)[0]
        longest = Sampling(max_new_tokens=10_000)
        bad = {
            "an empty prompt": Request(prompt=[]),
            "a negative token id": Request(prompt=[1, -1]),
            "a token id beyond the vocabulary": Request(prompt=[1, tiny.VOCABULARY]),
            "more tokens than the model holds": Request(prompt=[1], sampling=longest),
            "an unknown extra": Request(prompt=[1], extras={"no_such_extra_of_anybody": 1}),
        }
        with _engine(subject, engine_type, model) as engine:
            for what, request in bad.items():
                text = f"{engine_type.name!r} accepts {what}"
                require_refused(partial(engine.add, request), text)
            (found,) = generate(engine, [prompt], _GREEDY)
        _require_same(engine_type, list(found.ids), reference(build, prompt), "refused ones")


def cancel(subject: Subject) -> None:
    """A cancelled request ends with the reason 'cancelled'; the others go on undisturbed."""
    for engine_type, build in _pairs(subject):
        model, prompts = build(), prompts_for(build)
        with _engine(subject, engine_type, model) as engine:
            first, second = (engine.add(Request(prompt=p, sampling=_GREEDY)) for p in prompts[:2])
            made = [*engine.step(), *engine.step()]
            engine.cancel(first)
            engine.cancel(10**9)
            made += _drain(engine)
        ends = {t.request: t.finish for t in made if t.finish is not None}
        text = f"{engine_type.name!r} ends a cancelled request with {ends.get(first)!r}"
        require(ends.get(first) == "cancelled", text)
        ids = [t.id for t in made if t.request == second]
        _require_same(engine_type, ids, reference(build, prompts[1]), "a cancelled neighbour")


def stops(subject: Subject) -> None:
    """A stop id ends the answer, is its last token, and nothing comes after it."""
    for engine_type, build in _pairs(subject):
        model, prompt = build(), prompts_for(build)[0]
        wanted = reference(build, prompt)
        stop = next(i for i in wanted[2:] if i not in wanted[:2])
        expected = wanted[: wanted.index(stop) + 1]
        sampling = Sampling(max_new_tokens=NEW, stop_ids=(stop,))
        with _engine(subject, engine_type, model) as engine:
            (found,) = generate(engine, [prompt], sampling)
            idle = engine.step()
        right = found.finish == "stop" and list(found.ids) == expected
        require(right, f"{engine_type.name!r} does not stop at a stop id: {found.finish}")
        require(idle == [], f"{engine_type.name!r} makes tokens with no request queued")


def sampled(subject: Subject) -> None:
    """Drawn tokens depend on the request and its seed, not on what else is in the batch."""
    for engine_type, build in _pairs(subject):
        model, prompts = build(), prompts_for(build)
        with _engine(subject, engine_type, model) as engine:
            alone = generate(engine, prompts[:1], _DRAWN)[0]
            together = generate(engine, prompts, _DRAWN)[0]
        same = alone.ids == together.ids
        require(same, f"{engine_type.name!r}: a neighbour changes what a request draws")
        require(max(alone.logprobs) <= 0, f"{engine_type.name!r} gives a log-probability above 0")


def two_at_once(subject: Subject) -> None:
    """Two engines on one model, stepped in turn, do not disturb each other."""
    for engine_type, build in _pairs(subject):
        model, prompts = build(), prompts_for(build)
        with (
            _engine(subject, engine_type, model) as one,
            _engine(subject, engine_type, model) as two,
        ):
            engines = (one, two)
            for engine, prompt in zip(engines, prompts, strict=False):
                engine.add(Request(prompt=prompt, sampling=_GREEDY))
            made: list[list[Token]] = [[], []]
            for _ in range(4 * NEW):
                for tokens, engine in zip(made, engines, strict=True):
                    tokens.extend(engine.step())
        for tokens, prompt in zip(made, prompts, strict=False):
            ids = [token.id for token in tokens]
            _require_same(engine_type, ids, reference(build, prompt), "a second engine")


def restores(subject: Subject) -> None:
    """close() leaves the module as it was: parameters, modes, attention, hooks and logits."""
    for engine_type, build in _pairs(subject):
        model = build().train()
        before, logits = state_of(model), logits_of(model)
        engine = _build(subject, engine_type, model)
        generate(engine, prompts_for(build)[:1], _GREEDY)
        engine.close()
        after = state_of(model)
        changed = [what for what in before if before[what] != after[what]]
        require(not changed, f"close() of {engine_type.name!r} leaves {', '.join(changed)} changed")
        same = torch.equal(logits, logits_of(model))
        require(same, f"the model computes something else after close() of {engine_type.name!r}")


def _pairs(subject: Subject) -> list[tuple[EngineType, Callable[..., nn.Module]]]:
    """Every engine with every tiny model that it serves."""
    if not subject.engines:
        raise Skip("the plugin has no engines")
    found, refusals = [], []
    for engine_type in subject.engines:
        for name, build in tiny.MODELS.items():
            why = _refusal(subject, engine_type, build())
            if why:
                refusals.append(f"{engine_type.name!r} refuses {name}: {why}")
            else:
                found.append((engine_type, build))
    if not found:
        raise Skip("; ".join(refusals))
    return found


def _refusal(subject: Subject, engine_type: EngineType, model: nn.Module) -> str:
    before = state_of(model)
    reason = engine_type.works(model)
    if not reason:
        try:
            _build(subject, engine_type, model).close()
        except CoreError as error:
            reason = error.why or error.what
    # With ``auto`` another engine is built on the model that this one refused.
    if state_of(model) != before and reason:
        raise AssertionError(f"{engine_type.name!r} changes a model that it refuses")
    return reason


def _build(subject: Subject, engine_type: EngineType, model: nn.Module) -> Engine:
    with subject.run() as run:
        return engine_type.build(model, run)


@contextmanager
def _engine(subject: Subject, engine_type: EngineType, model: nn.Module) -> Generator[Engine]:
    with subject.run() as run:
        engine = engine_type.build(model, run)
        try:
            yield engine
        finally:
            engine.close()


def _salt(engine: Engine) -> str | None:
    found = getattr(engine, "identity", None)
    return found.salt() if isinstance(found, CacheIdentity) else None


def _drain(engine: Engine) -> list[Token]:
    made: list[Token] = []
    while engine.busy:
        made += engine.step()
    return made


def _require_same(engine_type: EngineType, ids: Sequence[int], wanted: Ids, beside: str) -> None:
    if list(ids) != wanted:
        at = next(
            (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), "the end"
        )
        raise AssertionError(
            f"{engine_type.name!r} differs from generate at token {at} ({beside}): "
            f"{list(ids)} instead of {wanted}"
        )


CHECKS = checks_of(
    "engines",
    greedy,
    live_weights,
    weights_changed,
    load_weights,
    refuses,
    cancel,
    stops,
    sampled,
    two_at_once,
    restores,
)
