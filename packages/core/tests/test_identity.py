"""Two salts are equal if and only if every influence on keys and values is."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from hypothesis import given, strategies as st

from core.identity import CacheIdentity, identity_of
from core.positions.install import positions
from core.positions.policy import ModelPositions
from core.testing import tiny

# Few letters, so that boundaries between strings matter and equal ones occur.
TEXT = st.text("ab=,\x00", max_size=3)
PAIRS = st.dictionaries(TEXT, TEXT, max_size=3)
IDENTITIES = st.builds(
    CacheIdentity,
    model=TEXT,
    weights=TEXT,
    adapter=TEXT,
    positions=TEXT,
    positions_digest=TEXT,
    regime=TEXT,
    modality=PAIRS,
    extras=PAIRS,
)


@given(IDENTITIES, IDENTITIES)
def test_salts_are_equal_iff_fields_are(one: CacheIdentity, other: CacheIdentity) -> None:
    assert (one.salt() == other.salt()) == (asdict(one) == asdict(other))


@given(IDENTITIES, st.sampled_from(sorted(asdict(CacheIdentity()))), TEXT, TEXT)
def test_every_field_counts(one: CacheIdentity, name: str, key: str, text: str) -> None:
    value = {key: text} if name in ("modality", "extras") else text
    other = replace(one, **{name: value})
    assert (one.salt() == other.salt()) == (one == other)


@given(PAIRS, st.randoms())
def test_order_of_extras_does_not_count(extras: dict[str, str], order: object) -> None:
    items = list(extras.items())
    order.shuffle(items)  # type: ignore[attr-defined]
    assert CacheIdentity(extras=dict(items)).salt() == CacheIdentity(extras=extras).salt()


@given(IDENTITIES)
def test_survives_pickling_and_hashing(one: CacheIdentity) -> None:
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert hash(copy) == hash(one)
    assert copy.salt() == one.salt()


def test_same_salt_in_another_process() -> None:
    code = (
        "from core.identity import CacheIdentity as C;"
        "print(C(weights='é', extras={'b': '1', 'a': '2'}).salt())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    here = CacheIdentity(weights="é", extras={"a": "2", "b": "1"}).salt()
    assert runs == [here, here]


def test_later_changes_of_a_mapping_do_not_reach_it() -> None:
    extras = {"kv": "bf16"}
    identity = CacheIdentity(extras=extras)
    before = identity.salt()
    extras["kv"] = "fp8"
    assert identity.salt() == before


def test_policy_of_positions() -> None:
    base = CacheIdentity(weights="1")
    per_request = base.with_positions(ModelPositions(per_request=True), regime="long")
    assert per_request.positions == "model"
    assert len({i.salt() for i in (base, base.with_positions(ModelPositions()), per_request)}) == 3


@pytest.mark.parametrize("wrong", [{"weights": 3}, {"extras": {"bits": 6}}, {"modality": {1: ""}}])
def test_only_strings(wrong: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=next(iter(wrong))):
        CacheIdentity(**wrong)  # type: ignore[arg-type]


def test_lone_surrogates_are_told_apart() -> None:
    assert CacheIdentity(weights="\ud800").salt() != CacheIdentity(weights="\ud801").salt()


def test_identity_of_a_model_is_the_same_in_another_process() -> None:
    code = (
        "from core.identity import identity_of; from core.testing import tiny;"
        "print(identity_of(tiny.llama(seed=3), 'step-1').salt())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "3"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert found == identity_of(tiny.llama(), "step-1").salt()


def test_identity_of_models_that_differ() -> None:
    model = tiny.llama()
    salts = {
        identity_of(model, "1").salt(),
        identity_of(model, "2").salt(),
        identity_of(tiny.llama(rms_norm_eps=1e-3), "1").salt(),
        identity_of(tiny.qwen3(), "1").salt(),
        identity_of(tiny.llama().bfloat16(), "1").salt(),
    }
    with positions(model, ModelPositions(per_request=True)):
        salts.add(identity_of(model, "1").salt())
    assert len(salts) == 6
