"""Loss and gradients of ranks that share sequences are those of the plain model on one rank.

``on_rank`` is what the ranks run: every case in one process group, held against a model that is neither
chunked nor shared.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from core.errors import DataError, ModelError
from core.testing import tiny
from core_fpdt import enable

if TYPE_CHECKING:
    from conftest import Launch

LENGTH = 53
CHUNK = 16
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Of the norm of each gradient."""

Batch = dict[str, Any]


@contextmanager
def doubles() -> Generator[None]:
    """Compute in float64 where models ask for float32, as norms and losses of all families do.

    What they round to float32 differs in its last digit now and then.
    """

    def wider(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            args = tuple(map(_wide, args))
            return function(*args, **{name: _wide(value) for name, value in kwargs.items()})

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        patch.setattr(Tensor, "to", wider(Tensor.to))
        patch.setattr(nn.functional, "softmax", wider(nn.functional.softmax))
        yield


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def plain(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, tiny.VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def padded() -> Batch:
    """One row padded on the right, one on the left."""
    whole = plain()
    real = torch.ones_like(whole["input_ids"])
    real[0, 40:] = 0
    real[1, :9] = 0
    labels = whole["labels"].masked_fill(real == 0, -100)
    labels[1, 9] = -100  # predicted by padding
    return {**whole, "labels": labels, "attention_mask": real}


def packed() -> Batch:
    parts = [torch.arange(n) for n in (5, 1, 30, LENGTH - 36)]
    return {**plain(), "position_ids": torch.cat(parts).expand(2, -1)}


BOTH = (2, 4)


@dataclass(frozen=True)
class Case:
    """A model, a batch, settings, and what the model is wrapped in.

    Args:
        family: of the model.
        changes: to its configuration.
        batch: makes the batch.
        settings: of :func:`enable`.
        wrap: ``fsdp2`` or ``ddp``.
        dtype: of the model.
        worlds: numbers of ranks it runs on.
    """

    family: str = "Llama"
    changes: Mapping[str, Any] = field(default_factory=dict)
    batch: Callable[[], Batch] = plain
    settings: Mapping[str, Any] = field(default_factory=dict)
    wrap: str = ""
    dtype: torch.dtype = torch.float64
    worlds: tuple[int, ...] = (2,)


HEADS3 = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
HEADS6 = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
HEADS15 = {"hidden_size": 60, "num_attention_heads": 15, "num_key_value_heads": 3}
WINDOW = {"sliding_window": 16}
MIXED = {
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS = {"experts_implementation": "eager"}  # the others know no float64
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
ONE_KEY = {"num_key_value_heads": 1}
CASES = {
    "plain": Case(),
    "in float32": Case(dtype=torch.float32, worlds=BOTH),
    "padded": Case(batch=padded, worlds=BOTH),
    "packed": Case(batch=packed),
    "whole chunks": Case(batch=lambda: plain(length=64)),
    "one chunk": Case(settings={"chunk_tokens": 4096}),
    "shorter than the ranks": Case("Mixtral", EXPERTS, lambda: plain(3, length=3), worlds=BOTH),
    "a short last chunk": Case("GPT2", NO_DROPOUT, lambda: plain(length=33), worlds=BOTH),
    "windows": Case("Mistral", WINDOW),
    "windows, packed, in float32": Case("Mistral", WINDOW, packed, {}, "", torch.float32, BOTH),
    "mixed windows, padded": Case("Gemma3Text", MIXED, padded),
    "mixed windows, packed, key order": Case(
        "Gemma3Text", MIXED, packed, {"order": "key"}, worlds=BOTH
    ),
    "sinks": Case("GptOss", {**MIXED, **EXPERTS}, padded, worlds=BOTH),
    "sinks, key order": Case("GptOss", {**MIXED, **EXPERTS}, settings={"order": "key"}),
    "learned positions": Case("GPT2", NO_DROPOUT, padded),
    "experts": Case("Mixtral", EXPERTS, packed),
    "one head of keys": Case(changes=ONE_KEY, worlds=BOTH),
    "one head of keys, key order": Case(changes=ONE_KEY, settings={"order": "key"}),
    "three heads": Case(changes=HEADS3),
    "six heads": Case(changes=HEADS6, batch=packed, worlds=(4,)),
    "groups across ranks": Case(changes=HEADS15, batch=padded, worlds=BOTH),
    "nothing kept": Case(batch=packed, settings={"keep_output": 0.0, "keep_keys": False}),
    "half kept": Case("Mistral", WINDOW, settings={"keep_output": 0.5}),
    "half kept, key order": Case(settings={"keep_output": 0.5, "order": "key"}, worlds=BOTH),
    "feed-forward in pieces": Case(batch=padded, settings={"mlp_chunks": 3}),
    "in a file": Case(batch=padded, settings={"offload": "file"}),
    "probed": Case("Phi3", settings={"strict": True}, dtype=torch.float32),
    "fsdp2": Case(batch=padded, wrap="fsdp2"),
    "fsdp2, windows, in float32": Case(
        "Mistral", WINDOW, packed, {}, "fsdp2", torch.float32, worlds=BOTH
    ),
    "fsdp2, one head of keys": Case(changes=ONE_KEY, wrap="fsdp2"),
    "ddp": Case("Qwen3", {}, packed, wrap="ddp", worlds=BOTH),
}


def on_rank(folder: Path) -> dict[str, Any]:
    world = dist.get_world_size()
    cases = {name: case for name, case in CASES.items() if world in case.worlds}
    said: dict[str, Any] = {name: compare(case) for name, case in cases.items()}
    said["evaluated"] = evaluated()
    with doubles():
        said["accumulated"] = accumulated()
    said["differ"] = {name: differ(change) for name, change in CHANGES.items()}
    said["uncut"] = uncut()
    if world == 4:
        with doubles():
            said["two groups"] = two_groups()
    return said


def make(case: Case) -> nn.Module:
    return tiny.build(case.family, **case.changes).to(case.dtype).train()


def shared(case: Case, where: Any = None) -> tuple[nn.Module, Any]:
    """The model on these ranks, and what cuts its batches."""
    model = make(case)
    settings = {"chunk_tokens": CHUNK, "strict": False, **case.settings}
    enabled = enable(model, group=where or dist.group.WORLD, **settings)
    if case.wrap == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
        for layer in model.get_submodule("model.layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return (nn.parallel.DistributedDataParallel(model) if case.wrap == "ddp" else model), enabled


def compare(case: Case) -> dict[str, float]:
    """How far loss and gradients are off, as a share of their norms; known to the first rank."""
    with doubles() if case.dtype == torch.float64 else nullcontext():
        return differences(case)


def differences(case: Case) -> dict[str, float]:
    whole = case.batch()
    model, enabled = shared(case)
    loss = model(**enabled.shard(whole), use_cache=False).loss
    loss.backward()
    found = {"loss": mean(loss.detach()), **gradients(model, averaged=bool(case.wrap))}
    enabled.disable()
    return off(found, expected(case, whole)) if dist.get_rank() == 0 else {}


def expected(case: Case, whole: Batch) -> dict[str, Tensor]:
    model = make(case)
    loss = model(**whole, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model, averaged=True)}


def gradients(model: nn.Module, *, averaged: bool) -> dict[str, Tensor]:
    """Gradients by name, averaged over ranks if they are not yet."""
    found = {}
    for name, parameter in model.named_parameters():
        if (grad := parameter.grad) is not None:
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name.removeprefix("module.")] = grad.clone() if averaged else mean(grad)
    return found


def mean(value: Tensor) -> Tensor:
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    return {
        name: float((found[name] - tensor).norm() / tensor.norm().clamp_min(1e-12))
        for name, tensor in wanted.items()
    }


def evaluated() -> float:
    """How far the loss is off in evaluation."""
    case = CASES["mixed windows, padded"]
    whole = case.batch()
    model, enabled = shared(case)
    model.eval()
    with doubles(), torch.no_grad():
        found = mean(model(**enabled.shard(whole), use_cache=False).loss)
        wanted = make(case).eval()(**whole, use_cache=False).loss
    enabled.disable()
    return float((found - wanted).abs() / wanted)


def accumulated() -> dict[str, float]:
    """Two forward passes before the backward passes, as preferences are learnt."""
    case = Case()
    first, second = plain(), plain(length=40, seed=1)
    model, enabled = shared(case)
    losses = [model(**enabled.shard(whole), use_cache=False).loss for whole in (first, second)]
    (losses[0] + 0.5 * losses[1]).backward()
    found = gradients(model, averaged=False)
    enabled.disable()
    alone = make(case)
    losses = [alone(**whole, use_cache=False).loss for whole in (first, second)]
    (losses[0] + 0.5 * losses[1]).backward()
    return off(found, gradients(alone, averaged=True))


CHANGES: dict[str, Callable[[Batch], tuple[Batch, int]]] = {
    "length": lambda _: (plain(length=LENGTH - 1), CHUNK),
    "tokens": lambda _: (plain(seed=1), CHUNK),
    "chunks": lambda whole: (whole, CHUNK + 1),
}


def differ(change: Callable[[Batch], tuple[Batch, int]]) -> str:
    """What a rank hears when the last one comes with something else; training goes on after it."""
    whole, chunk = plain(), CHUNK
    if dist.get_rank() == dist.get_world_size() - 1:
        whole, chunk = change(whole)
    case = Case(settings={"chunk_tokens": chunk})
    model, enabled = shared(case)
    try:
        model(**enabled.shard(whole), use_cache=False).loss.backward()
    except DataError as error:
        return error.what
    finally:
        enabled.disable()
    return "nothing"


def uncut() -> str:
    """What a rank hears that gives the model a whole batch."""
    model, enabled = shared(Case())
    try:
        model(**plain())
    except ModelError as error:
        return error.what
    finally:
        enabled.disable()
    return "nothing"


def two_groups() -> dict[str, float]:
    """Two groups of two ranks with data of their own, sharded over all four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    batches = [plain(rows=1), {**padded()}]
    case = Case(wrap="fsdp2")
    model, enabled = shared(case, mesh)
    loss = model(**enabled.shard(batches[group_of(mesh)]), use_cache=False).loss
    loss.backward()
    found = {"loss": mean(loss.detach()), **gradients(model, averaged=True)}
    enabled.disable()
    alone = make(case)
    counts = [int((whole["labels"][:, 1:] != -100).sum()) for whole in batches]
    total = sum(
        alone(**whole, use_cache=False).loss * count
        for whole, count in zip(batches, counts, strict=True)
    ) / sum(counts)
    total.backward()
    return off(found, {"loss": total.detach(), **gradients(alone, averaged=True)})


def group_of(mesh: DeviceMesh) -> int:
    return int(mesh.get_local_rank("dp"))


@pytest.fixture(scope="module")
def of_two(launch: Launch) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return launch(__file__, 2)


@pytest.fixture(scope="module")
def of_four(launch: Launch) -> list[dict[str, Any]]:
    """What each of four ranks found."""
    return launch(__file__, 4)


def require_exact(name: str, found: dict[str, float]) -> None:
    tolerance = TOLERANCE[CASES[name].dtype]
    assert found
    assert {one: far for one, far in found.items() if not far <= tolerance} == {}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if 2 in case.worlds])
def test_two_ranks_equal_one(of_two: list[dict[str, Any]], name: str) -> None:
    require_exact(name, of_two[0][name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if 4 in case.worlds])
def test_four_ranks_equal_one(of_four: list[dict[str, Any]], name: str) -> None:
    require_exact(name, of_four[0][name])


def test_evaluation_is_shared_too(
    of_two: list[dict[str, Any]], of_four: list[dict[str, Any]]
) -> None:
    for rank in (*of_two, *of_four):
        assert rank["evaluated"] < 1e-12


def test_two_forward_passes_before_the_backward_passes(of_two: list[dict[str, Any]]) -> None:
    for rank in of_two:
        assert max(rank["accumulated"].values()) < 1e-12


def test_two_groups_of_two_ranks_equal_one(of_four: list[dict[str, Any]]) -> None:
    for rank in of_four:
        assert max(rank["two groups"].values()) < 1e-12


@pytest.mark.parametrize("name", CHANGES)
def test_ranks_that_differ_raise_everywhere(of_four: list[dict[str, Any]], name: str) -> None:
    heard = "ranks 0 and 3 share sequences, but differ"
    assert [rank["differ"][name] for rank in of_four] == [heard] * 4


def test_a_batch_that_nobody_cut_is_refused(of_two: list[dict[str, Any]]) -> None:
    assert [rank["uncut"] for rank in of_two] == ["this batch is not cut for the ranks"] * 2
