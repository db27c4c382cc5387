"""A model that is small enough to be served in milliseconds."""

from __future__ import annotations

import pytest

from core_splitfuse.benchmarking.subject import Subject
from core_splitfuse.benchmarking.suite import Suite
from core_splitfuse.benchmarking.workload import Lengths
from core_splitfuse.settings import SplitFuseSettings

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="session")
def subject():
    return Subject(SHAPE, dtype="float32")


@pytest.fixture(scope="session")
def suite(subject):
    return Suite(
        subject,
        SplitFuseSettings(budget=16, kv_tokens=4096),
        Lengths(20, 6),
        requests=4,
        rounds=2,
        vllm_python="/nowhere/python",
        llama_python="/nowhere/python",
    )
