"""The choice of a replica: the longest known prefix, unless the loads differ too much."""

from __future__ import annotations

import json

from hypothesis import given, strategies as st

from core_splitfuse.replicas.calls import weigh
from core_splitfuse.replicas.choice import BLOCK, Prefixes, blocks_of, in_order

names = st.lists(st.sampled_from("abcdef"), min_size=1, unique=True)
numbers = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 1000))


@given(names, numbers, numbers, st.integers(0, 1000))
def test_every_replica_is_named_once(
    replicas: list[str], known: dict[str, int], loads: dict[str, int], threshold: int
) -> None:
    assert sorted(in_order(replicas, known, loads, threshold)) == sorted(replicas)


@given(names, numbers, numbers, st.integers(0, 1000))
def test_the_longest_prefix_wins_unless_the_loads_differ_too_much(
    replicas: list[str], known: dict[str, int], loads: dict[str, int], threshold: int
) -> None:
    first = in_order(replicas, known, loads, threshold)[0]
    least = min(loads.get(name, 0) for name in replicas)
    longest = max(known.get(name, 0) for name in replicas)
    keepers = [name for name in replicas if known.get(name, 0) == longest]
    free = min(loads.get(name, 0) for name in keepers)
    if longest and free - least <= threshold:
        assert (known.get(first, 0), loads.get(first, 0)) == (longest, free)
    else:
        assert loads.get(first, 0) == least


@given(names, numbers)
def test_without_a_known_prefix_tokens_decide(replicas: list[str], loads: dict[str, int]) -> None:
    order = in_order(replicas, {}, loads, 0)
    assert [loads.get(name, 0) for name in order] == sorted(loads.get(n, 0) for n in replicas)


@given(st.binary(max_size=600), st.binary(max_size=600), st.binary(max_size=600))
def test_blocks_are_equal_as_far_as_prompts_are(shared: bytes, one: bytes, other: bytes) -> None:
    first, second = blocks_of(shared + one), blocks_of(shared + other)
    assert len(first) == len(shared + one) // BLOCK
    whole = len(shared) // BLOCK
    assert first[:whole] == second[:whole]
    assert not set(blocks_of(shared + one, b"salt")) & set(first)
    for index, (x, y) in enumerate(zip(first, second, strict=False)):
        end = (index + 1) * BLOCK
        assert (x == y) == ((shared + one)[:end] == (shared + other)[:end])


@given(st.lists(st.tuples(st.sampled_from("ab"), st.binary(max_size=1200)), max_size=8))
def test_what_was_remembered_is_known(prompts: list[tuple[str, bytes]]) -> None:
    prefixes = Prefixes()
    for name, prompt in prompts:
        prefixes.remember(name, blocks_of(prompt))
    for name, prompt in prompts:
        assert prefixes.known(name, blocks_of(prompt + b"more" * BLOCK)) >= len(prompt) // BLOCK
    prefixes.keep_only({"b"})
    assert all(prefixes.known("a", blocks_of(prompt)) == 0 for _, prompt in prompts)


def test_the_oldest_blocks_are_forgotten_from_their_ends() -> None:
    prefixes = Prefixes(kept=6)
    old, new = blocks_of(b"a" * BLOCK * 4), blocks_of(b"b" * BLOCK * 4)
    prefixes.remember("x", old)
    prefixes.remember("x", new)
    assert prefixes.known("x", new) == 4
    assert prefixes.known("x", old) == 2


def test_a_growing_chat_keeps_its_blocks() -> None:
    turns = [{"role": "user", "content": f"question {i} " * 30} for i in range(4)]
    calls = [weigh(json.dumps({"messages": turns[:n]}).encode()) for n in (2, 4)]
    (small, early), (large, late) = calls
    assert small < large
    assert early == late[: len(early)]
    assert len(late) > len(early) > 3


def test_tokens_of_a_call() -> None:
    def tokens(**body: object) -> int:
        return weigh(json.dumps(body).encode())[0]

    assert tokens(prompt=[1, 2, 3], max_tokens=10) == 13
    assert tokens(prompt=[[1, 2], [3]], max_tokens=10, n=2) == 43
    assert tokens(prompt="x" * 40, max_tokens=10) == 20
    assert tokens(messages=[], max_completion_tokens=5, max_tokens=9) == 6
    assert tokens(prompt="", max_tokens=10**30) == 2**20
    assert tokens(prompt=[1], max_tokens="many") > 1


@given(
    st.binary()
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
        _dump := lambda x: json.dumps(
            {"prompt": x, "messages": x, "n": x, "max_tokens": x}
        ).encode()
    )
)
def test_no_body_is_too_odd(body: bytes) -> None:
    tokens, _ = weigh(body)
    assert 0 <= tokens <= 2**20


def test_a_body_of_brackets_is_no_call() -> None:
    assert weigh(b"[" * 10**6) == (0, ())
    assert weigh(b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}")[0] > 0
