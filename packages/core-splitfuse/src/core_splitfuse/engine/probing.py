"""Does the model compute the same in packed passes? Refused by layer and reason where it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.equivalence import decoder, probe_tokens, record, require_calls, require_equivalent
from core.errors import CoreError, ModelError
from core_splitfuse.attention.function import NAME
from core_splitfuse.attention.spans import Span
from core_splitfuse.attention.store import Store, make_store
from core_splitfuse.engine.runner import Runner

_PATTERNS = frozenset({"full_attention", "sliding_attention"})


def refuse_unknown_layers(model: nn.Module) -> None:
    """Refuse what no pass over stored keys and values can compute, by name.

    Raises:
        ModelError: for encoder-decoders, recurrent layers and patterns of attention of other kinds.
    """
    config: Any = getattr(decoder(model), "config", None)
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} cannot be served", why="it has an encoder")
    layers = set(getattr(config, "layer_types", None) or ()) - _PATTERNS
    if layers:
        why = f"it has layers of the kind {min(layers)!r}"
        raise ModelError(f"{name} cannot be served", why=why)


def measure(runner: Runner, *, verify: bool) -> int:
    """Run a few tokens in packed passes, and return the bytes that one takes in the store.

    Args:
        runner: of the model.
        verify: compare every layer with the model's own way.

    Raises:
        ModelError: for a model that computes something else.
    """
    model = runner.model
    if not verify:
        tokens = probe_tokens(model, 1)[:1]
        store = _store(runner, tokens)
        _pass(runner, store, [(tokens, 0, 0, 1)])
        return _bytes(model, store)
    tokens = _within_reach(model, probe_tokens(model))
    before = record(model, tokens)
    store = _store(runner, tokens)
    try:
        after = record(model, tokens, attention=NAME, run=lambda ids: _packed(runner, store, ids))
    except CoreError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ModelError(f"{type(model).__name__} fails in packed passes", why=why) from error
    require_calls(after, NAME)
    require_equivalent(before, after)
    return _bytes(model, store)


def _bytes(model: nn.Module, store: Store) -> int:
    if not store.bytes_per_token:
        raise ModelError(f"{type(model).__name__} has no layer that keeps keys and values")
    return store.bytes_per_token


def _packed(runner: Runner, store: Store, tokens: Tensor) -> Tensor:
    """All logits, in passes that cut both rows, mix them, and end with a single token."""
    length = tokens.shape[1]
    if getattr(runner.policy, "atomic_prefill", False):
        passes = [[(tokens, 0, 0, length)], [(tokens, 1, 0, length)]]
    else:
        cut, end = length // 2, length - 1
        passes = [
            [(tokens, 0, 0, cut)],
            [(tokens, 0, cut, length), (tokens, 1, 0, cut)],
            [(tokens, 1, cut, end)],
            [(tokens, 1, end, length)],
        ]
    logits = torch.cat([_pass(runner, store, parts) for parts in passes])
    return logits.view(*tokens.shape, -1)


def _pass(runner: Runner, store: Store, parts: list[tuple[Tensor, int, int, int]]) -> Tensor:
    spans: list[Span] = []
    ids: list[int] = []
    for tokens, row, begin, end in parts:
        length = tokens.shape[1]
        blocks = -(-length // store.block_size)
        # Every other block, so that nothing lies behind each other.
        table = [2 * (row * blocks + index) for index in range(blocks)]
        spans.append(Span(len(ids), begin, end, table, prompt=length, known=length))
        ids += tokens[row, begin:end].tolist()
    return runner.run(ids, spans, store, range(len(ids)), record=False)


def _store(runner: Runner, tokens: Tensor) -> Store:
    """Of small blocks, so that the few tokens have several."""
    size = 16 if runner.device.type == "cuda" else 4
    blocks = tokens.shape[0] * -(-tokens.shape[1] // size)
    return make_store(2 * blocks * size, size, runner.device)


def _within_reach(model: nn.Module, tokens: Tensor) -> Tensor:
    config: Any = getattr(decoder(model), "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    return tokens if longest is None else tokens[:, :longest]
