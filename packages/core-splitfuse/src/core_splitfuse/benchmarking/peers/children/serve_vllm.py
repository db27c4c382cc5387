"""Serves with vLLM's engine inside this process; arguments: one JSON object."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

# The script's own folder is where the interpreter looks first.
lines: Any = import_module("lines")


class Vllm:
    """vLLM's own ``step``, greedy and without text."""

    def __init__(self, model: str, budget: int, longest: int, dtype: str) -> None:
        vllm: Any = import_module("vllm")
        self._prompt: Any = import_module("vllm.inputs").TokensPrompt
        self._sampling: Any = vllm.SamplingParams
        arguments = vllm.EngineArgs(
            model=model,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_num_batched_tokens=budget,
            max_num_seqs=min(budget, 128),
            max_model_len=longest,
            enable_chunked_prefill=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self._engine: Any = vllm.LLMEngine.from_engine_args(arguments)
        self._made: dict[str, int] = {}

    def add(self, number: int, prompt: list[int], answer: int) -> None:
        wanted = self._sampling(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        self._made[str(number)] = 0
        self._engine.add_request(str(number), self._prompt(prompt_token_ids=prompt), wanted)

    def step(self) -> list[tuple[int, int, bool]]:
        found: list[tuple[int, int, bool]] = []
        for output in self._engine.step():
            ids = output.outputs[0].token_ids
            new = list(ids[self._made[output.request_id] :])
            self._made[output.request_id] = len(ids)
            number = int(output.request_id)
            found += [
                (number, token, output.finished and index == len(new) - 1)
                for index, token in enumerate(new)
            ]
        return found

    def busy(self) -> bool:
        return bool(self._engine.has_unfinished_requests())


if __name__ == "__main__":
    output = lines.own_output()
    lines.serve(Vllm(**json.loads(sys.argv[1])), output)
