"""A model of transformers over the paged store: its own logits, and the engine's answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core.attention import use_attention
from core.engines import Request, Sampling, generate
from core.testing import tiny
from core_splitfuse.attention.function import NAME, Work, in_force
from core_splitfuse.attention.gpu import GraphRunner, Paged, Plan
from core_splitfuse.attention.spans import Ragged, Span
from core_splitfuse.engine import engine as engines
from core_splitfuse.engine.runner import Runner
from core_splitfuse.settings import SplitFuseSettings

CPU = torch.device("cpu")
IDS = list(range(3, 23)), list(range(40, 47))


def span(row: int, begin: int, end: int, table: list[int]) -> Span:
    return Span(row=row, begin=begin, end=end, table=table, prompt=end, known=end)


PASSES = [
    [(0, 0, 11), (1, 0, 6)],
    [(0, 11, 19), (1, 6, 7)],
    [(0, 19, 20)],
]
"""Sequence, begin and end of every span."""


@pytest.mark.parametrize(
    ("family", "padding"), [("Llama", False), ("Gemma2", True), ("GptOss", True)]
)
def test_logits_are_those_of_the_model(family: str, padding: bool) -> None:
    model: Any = tiny.build(family).eval()
    wanted = [model(torch.tensor([ids])).logits[0].detach() for ids in IDS]
    runner, store = Runner(model, SplitFuseSettings()), Paged(6 * 16, 16, CPU)

    def forward(plan: Plan) -> torch.Tensor:
        work = Work(Ragged([], 16, CPU), store)
        with in_force(work), store.planned(plan), use_attention(model, NAME), torch.no_grad():
            return model(
                input_ids=plan.ids.long()[None],
                position_ids=plan.positions.long()[None],
                use_cache=False,
                logits_to_keep=plan.rows.long(),
            ).logits[0]

    graphs = GraphRunner(forward, block_size=16, device=CPU, sequences=4, blocks=3)
    tables = [4, 1], [2]
    for chunks in PASSES:
        ids: list[int] = []
        spans: list[Span] = []
        for sequence, begin, end in chunks:
            spans.append(span(len(ids), begin, end, tables[sequence]))
            ids += IDS[sequence][begin:end]
        rows = [one.row + len(one) - 1 for one in spans]
        found = graphs.run(ids, spans, rows) if padding else runner.run(ids, spans, store, rows)
        exact = torch.stack([wanted[sequence][end - 1] for sequence, _, end in chunks])
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_answers_of_the_engine_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[Paged] = []

    def paged(slots: int, block_size: int, device: torch.device) -> Paged:
        stores.append(Paged(slots, block_size, device))
        return stores[-1]

    monkeypatch.setattr(engines, "make_store", paged)
    model: Any = tiny.build("Llama").eval()
    shared = list(range(5, 25))
    prompts = [shared, [*shared, 7], list(range(40, 46)), shared]
    sampling = Sampling(max_new_tokens=5)
    with engines.Engine(model, budget=12, kv_tokens=64, block_size=16, verify=False) as engine:
        requests = [Request(prompt=prompt, sampling=sampling) for prompt in prompts]
        answers = generate(engine, requests)
        stats = engine.stats()
    assert len(stores) == 1
    assert stores[0].bytes_per_token > 0
    assert stats.passes > 5
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
        assert list(answer.ids) == whole[0, len(prompt) :].tolist()
