"""Serves with llama.cpp; arguments: one JSON object.

Batches are made as llama.cpp's server makes them: the last token of everybody who generates, then
prompts in the order of arrival, up to the size of a batch.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# The script's own folder is where the interpreter looks first.
lines: Any = import_module("lines")
gguf_file: Any = import_module("gguf_file")


@dataclass
class Slot:
    """A request, and how far it is."""

    number: int
    waiting: list[int]
    left: int
    place: int = 0
    row: int = -1


class LlamaCpp:
    """The library under the server, driven pass by pass."""

    def __init__(self, model: str, budget: int, longest: int, slots: int, threads: int) -> None:
        self._api: Any = import_module("llama_cpp")
        self._numpy: Any = import_module("numpy")
        api = self._api
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            gguf_file.convert(Path(model), path)
            wanted = api.llama_model_default_params()
            self._model = api.llama_model_load_from_file(str(path).encode(), wanted)
        if not self._model:
            sys.exit("llama.cpp does not load the model")
        options = api.llama_context_default_params()
        options.n_ctx = longest * 4
        options.n_batch = options.n_ubatch = budget
        options.n_seq_max = slots
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = True
        self._context = api.llama_init_from_model(self._model, options)
        if not self._context:
            sys.exit("llama.cpp makes no context")
        self._words: int = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._budget = budget
        self._batch = api.llama_batch_init(budget, 0, 1)
        self._free = deque(range(slots))
        self._queue: deque[Slot] = deque()
        self._running: dict[int, Slot] = {}

    def add(self, number: int, prompt: list[int], answer: int) -> None:
        self._queue.append(Slot(number, prompt, answer))

    def busy(self) -> bool:
        return bool(self._queue or self._running)

    def step(self) -> list[tuple[int, int, bool]]:
        while self._queue and self._free:
            self._running[self._free.popleft()] = self._queue.popleft()
        self._fill()
        code = self._api.llama_decode(self._context, self._batch)
        if code:
            sys.exit(f"llama_decode returned {code}")
        return [
            self._draw(place, slot) for place, slot in list(self._running.items()) if slot.row >= 0
        ]

    def _fill(self) -> None:
        batch, room = self._batch, self._budget
        batch.n_tokens = 0
        generating = [item for item in self._running.items() if len(item[1].waiting) == 1]
        prompts = [item for item in self._running.items() if len(item[1].waiting) > 1]
        for sequence, slot in (*generating, *prompts):
            taken, slot.waiting = slot.waiting[:room], slot.waiting[room:]
            for token in taken:
                self._put(token, sequence, slot)
            room -= len(taken)
            if taken and not slot.waiting:
                slot.row = batch.n_tokens - 1
                batch.logits[slot.row] = True

    def _put(self, token: int, sequence: int, slot: Slot) -> None:
        batch = self._batch
        row = batch.n_tokens
        batch.token[row], batch.pos[row] = token, slot.place
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = False
        slot.place += 1
        batch.n_tokens = row + 1

    def _draw(self, sequence: int, slot: Slot) -> tuple[int, int, bool]:
        found = self._api.llama_get_logits_ith(self._context, slot.row)
        token = int(self._numpy.ctypeslib.as_array(found, shape=(self._words,)).argmax())
        slot.left -= 1
        slot.waiting, slot.row = [token], -1
        if not slot.left:
            memory = self._api.llama_get_memory(self._context)
            self._api.llama_memory_seq_rm(memory, sequence, -1, -1)
            del self._running[sequence]
            self._free.append(sequence)
        return slot.number, token, not slot.left


if __name__ == "__main__":
    output = lines.own_output()
    lines.serve(LlamaCpp(**json.loads(sys.argv[1])), output)
