"""Every peer serves the same model: greedy tokens in float32 are those of the plain engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from core.engines import generate
from core.engines.plain import PlainEngine
from core.errors import EngineError
from core_splitfuse.benchmarking.comparison import compare
from core_splitfuse.benchmarking.peers.child import CHILDREN, Child, require
from core_splitfuse.benchmarking.peers.continuous import continuous
from core_splitfuse.benchmarking.peers.generate import one_by_one, padded
from core_splitfuse.benchmarking.peers.llama_cpp import llama_cpp
from core_splitfuse.benchmarking.peers.ours import prefill_first, splitfuse
from core_splitfuse.benchmarking.peers.peer import MissingPeerError
from core_splitfuse.benchmarking.peers.stepwise import Stepwise
from core_splitfuse.benchmarking.peers.vllm import vllm
from core_splitfuse.benchmarking.workload import Lengths, queries
from core_splitfuse.settings import SplitFuseSettings

SETTINGS = SplitFuseSettings(budget=16, kv_tokens=4096)
PEERS = [
    splitfuse(SETTINGS),
    prefill_first(SETTINGS),
    continuous(32, tokens=2048),
    padded(3),
    one_by_one(),
]


@pytest.fixture(scope="module")
def requests():
    return [query.request() for query in queries(Lengths(24, 6), 5, 96, seed=1)]


@pytest.fixture(scope="module")
def plain(subject, requests):
    return [answer.ids for answer in generate(PlainEngine(subject.build()), requests)]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_tokens_are_those_of_the_plain_engine(peer, subject, requests, plain):
    opened = peer.open(subject)
    assert [answer.ids for answer in generate(opened.engine, requests)] == plain
    assert not opened.engine.busy
    opened.engine.close()


COUNTING = """
import os, sys
from lines import own_output, serve
class Counting:
    def __init__(self): self.left = {}
    def add(self, number, prompt, answer): self.left[number] = [answer, prompt[0]]
    def busy(self): return bool(self.left)
    def step(self):
        print("this is for the log")
        if any(first == 66 for _, first in self.left.values()):
            sys.exit("the cat walked over the keyboard")
        made = []
        for number, state in list(self.left.items()):
            state[0] -= 1
            made.append((number, state[0], state[0] == 0))
            if not state[0]: del self.left[number]
        sum(range(100_000))
        return made
serve(Counting(), own_output())
"""


@pytest.fixture
def child(tmp_path):
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    made = Child(sys.executable, str(script), {}, {"PYTHONPATH": str(CHILDREN)})
    yield made
    made.close()


def test_a_peer_may_live_in_another_process(child, requests):
    began = child.seconds()
    answers = generate(child, requests)
    assert [a.ids for a in answers] == [
        tuple(range(r.sampling.max_new_tokens - 1, -1, -1)) for r in requests
    ]
    assert child.seconds() > began > 0
    assert not child.busy


def test_a_process_that_ends_says_why(child):
    query = queries(Lengths(8, 4), 1, 96, seed=0)[0].request()
    generate(child, [query])
    with pytest.raises(EngineError, match="cat walked"):
        generate(child, [[66, 1]])


def test_what_is_not_installed_is_a_row_of_its_own(subject):
    peers = [one_by_one(), vllm(16, "/nowhere/python"), llama_cpp(16, "/nowhere/python")]
    found = compare(peers, {}, subject)
    assert list(found.missing) == ["vLLM CPU 16", "llama.cpp 16"]
    assert "/nowhere/python does not run" in found.missing["vLLM CPU 16"]
    with pytest.raises(MissingPeerError, match="this_is_nobody is not installed"):
        require(sys.executable, "this_is_nobody", "")


def test_the_children_need_nothing_but_the_standard_library():
    for script in Path(CHILDREN).glob("*.py"):
        text = script.read_text()
        assert "core_splitfuse" not in text
        assert "from core" not in text
        assert "import torch" not in text


def test_a_call_that_fails_half_way_fails_where_it_is_stepped():
    def work(report):
        report(1)
        raise ValueError("no more")

    steps = Stepwise(work)
    assert steps.next() == 1
    with pytest.raises(EngineError, match="no more"):
        steps.next()
