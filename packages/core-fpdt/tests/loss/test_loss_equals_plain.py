"""Loss and every gradient are those of logits that were computed as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.testing import tiny
from core_fpdt.loss.logits import LazyLogits
from core_fpdt.settings import FPDTSettings

IN_FULL = {
    "labels": {},
    "shift_labels": {"shift_labels": tiny.batch(3)["labels"]},
    "number of items, int": {"num_items_in_batch": 17},
    "number of items, tensor": {"num_items_in_batch": torch.tensor(17)},
}


@pytest.mark.parametrize("case", IN_FULL)
def test_loss_of_the_model(
    family: str, case: str, build: Any, lazy: Any, gradients: Any, require_close: Any, batch: Any
) -> None:
    model = build(family)
    inputs = batch | IN_FULL[case]
    plain = gradients(model, lambda: model(**inputs).loss)
    lazy(model)
    require_close(gradients(model, lambda: model(**inputs).loss), plain, 1e-5)


CLASSES = 101
"""A number that no width of a tiny model is."""


class Rows(TorchDispatchMode):
    """The most rows of as many numbers as there are classes that a tensor had."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            real = isinstance(value, torch.Tensor) and not value.is_meta and value.dim() > 0
            if real and value.shape[-1] == CLASSES:
                self.most = max(self.most, value.numel() // CLASSES)
        return result


def test_the_models_loss_never_has_its_logits(
    family: str, build: Any, lazy: Any, batch: Any
) -> None:
    model = build(family, vocab_size=CLASSES)
    lazy(model)
    with Rows() as rows:
        output = model(**batch)
        output.loss.backward()
    assert isinstance(output.logits, LazyLogits)
    assert "not computed" in repr(output.logits)
    transposed = model.config.hidden_size  # what multiplies by the head reads (hidden, classes)
    assert 0 < rows.most <= max(10, transposed) < batch["labels"].numel()


def test_everything_in_double_precision(
    family: str, build: Any, lazy: Any, gradients: Any, require_close: Any, batch: Any
) -> None:
    model = build(family).double()

    def loss() -> Any:
        logits = model(batch["input_ids"]).logits[..., :-1, :]
        return F.cross_entropy(
            logits.reshape(-1, logits.size(-1)), batch["labels"][:, 1:].flatten()
        )

    plain = gradients(model, loss)
    lazy(model)
    require_close(gradients(model, loss), plain, 1e-12)


LOSSES: dict[str, Any] = {
    "shifted": lambda x, y: F.cross_entropy(x[..., :-1, :].flatten(0, 1), y[:, 1:].reshape(-1)),
    "contiguous": lambda x, y: F.cross_entropy(
        x[:, :-1].contiguous().view(-1, x.shape[-1]), y[:, 1:].contiguous().view(-1)
    ),
    "module": lambda x, y: nn.CrossEntropyLoss()(x.view(-1, x.shape[-1]), y.view(-1)),
    "classes first": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "permuted": lambda x, y: F.cross_entropy(x.float().permute(0, 2, 1), y, reduction="sum"),
    "mask of rows": lambda x, y: F.cross_entropy(x[y != -100], y[y != -100]),
    "one row": lambda x, y: F.cross_entropy(x[1], y[1]),
    "one token": lambda x, y: F.cross_entropy(x[1, 3], y[1, 3]),
    "chosen tokens": lambda x, y: F.cross_entropy(
        x[:, torch.tensor([3, 1, 3])].flatten(0, 1), y[:, [3, 1, 3]].flatten()
    ),
    "squeezed": lambda x, y: F.cross_entropy(x[:1].squeeze(0), y[:1].squeeze(0)),
    "temperature": lambda x, y: F.cross_entropy((2 - 3 * x / 7.0).flatten(0, 1), y.flatten()),
    "capped": lambda x, y: F.cross_entropy((5 * torch.tanh(x / 5)).flatten(0, 1), y.flatten()),
    "shift by class": lambda x, y: F.cross_entropy(
        (x + torch.linspace(-1, 1, x.shape[-1])).flatten(0, 1), y.flatten()
    ),
    "sum": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum") / 100,
    "weighted tokens": lambda x, y: (
        F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none") * torch.arange(48)
    ).mean(),
    "weighted, classes first": lambda x, y: (
        F.cross_entropy(x.transpose(1, 2), y, reduction="none").square().sum()
    ),
    "weighted classes": lambda x, y: F.cross_entropy(
        x.flatten(0, 1), y.flatten(), torch.linspace(0, 2, x.shape[-1])
    ),
    "smoothing": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), label_smoothing=0.1),
    "both, and another mark": lambda x, y: F.cross_entropy(
        x.flatten(0, 1),
        y.flatten().masked_fill(y.flatten() < 0, 7),
        torch.linspace(0, 2, x.shape[-1]),
        ignore_index=7,
        label_smoothing=0.1,
    ),
    "device and dtype": lambda x, y: F.cross_entropy(
        x.to("cpu").to(torch.float32).to(y.device, torch.float64).flatten(0, 1), y.flatten()
    ),
    "loss scaling": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()) * 0.25,
    "twice": lambda x, y: (
        F.cross_entropy(x.flatten(0, 1), y.flatten())
        + F.cross_entropy(x[:, :5].flatten(0, 1), y[:, 2:7].flatten())
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_of_others(
    case: str, build: Any, lazy: Any, gradients: Any, require_close: Any, batch: Any
) -> None:
    model = build()
    last: list[Any] = []

    def loss() -> Any:
        last.append(model(batch["input_ids"]).logits)
        return LOSSES[case](last[-1], batch["labels"])

    plain = gradients(model, loss)
    lazy(model)
    require_close(gradients(model, loss), plain, 1e-5)
    assert "not computed" in repr(last[-1])


def test_a_loss_that_is_not_known_reads_them(
    build: Any, lazy: Any, gradients: Any, require_close: Any, batch: Any
) -> None:
    model = build()

    def loss() -> Any:
        x, y = model(batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten()
        likely = F.cross_entropy(x, torch.softmax(torch.linspace(0, 1, 96), 0).expand(48, 96))
        picked = x.log_softmax(-1).gather(-1, y.clamp_min(0)[:, None]).mean()
        return likely - picked + F.cross_entropy(x, y) + x.square().mean()

    plain = gradients(model, loss)
    lazy(model)
    require_close(gradients(model, loss), plain, 1e-5)


@pytest.mark.parametrize("items", [None, 10], ids=["mean", "sum"])
def test_without_a_single_label(
    items: int | None, build: Any, lazy: Any, gradients: Any, batch: Any
) -> None:
    model = build()
    inputs = batch | {"labels": torch.full_like(batch["labels"], -100)}
    inputs |= {"num_items_in_batch": items} if items else {}
    plain = gradients(model, lambda: model(**inputs).loss)
    lazy(model)
    found = gradients(model, lambda: model(**inputs).loss)
    assert plain.keys() == found.keys()
    for name in plain:
        assert torch.equal(plain[name].nan_to_num(9.0), found[name].nan_to_num(9.0)), name
    assert found["loss"].isnan() if items is None else found["loss"] == 0


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_half_precision_is_as_near_to_the_truth(
    autocast: bool, family: str, build: Any, lazy: Any, gradients: Any, batch: Any
) -> None:
    if family == "Qwen3Moe":
        pytest.skip("which experts are chosen depends on rounding")
    model = build(family)
    truth = gradients(model, lambda: model(**batch).loss)
    if not autocast:
        model = model.bfloat16()

    def loss() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**batch).loss

    plain = gradients(model, loss)
    lazy(model)
    found = gradients(model, loss)
    assert {name: t.dtype for name, t in found.items()} == {n: t.dtype for n, t in plain.items()}
    assert abs(found["loss"] - plain["loss"]) <= 1e-5 * abs(plain["loss"])
    off = [
        sum(float((each[name].float() - exact).square().sum()) for name, exact in truth.items())
        for each in (found, plain)
    ]
    assert off[0] <= 1.2 * off[1]


def test_a_loss_of_logits_in_half_precision_has_their_dtype(
    build: Any, lazy: Any, batch: Any
) -> None:
    model = build().bfloat16()
    lazy(model)
    logits = model(batch["input_ids"]).logits.flatten(0, 1)
    assert F.cross_entropy(logits, batch["labels"].flatten()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert F.cross_entropy(logits, batch["labels"].flatten()).dtype == torch.float32
    assert "not computed" in repr(logits)


@pytest.mark.parametrize("frozen", ["lm_head", "model", "model.embed_tokens"])
def test_frozen_parts(
    frozen: str, build: Any, lazy: Any, gradients: Any, require_close: Any, batch: Any
) -> None:
    model = build()
    model.get_submodule(frozen).requires_grad_(False)
    plain = gradients(model, lambda: model(**batch).loss)
    lazy(model)
    require_close(gradients(model, lambda: model(**batch).loss), plain, 1e-5)


def test_with_adapters_on_the_layers(
    build: Any, lazy: Any, gradients: Any, require_close: Any, batch: Any
) -> None:
    model = get_peft_model(build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    plain = gradients(model, lambda: model(**batch).loss)
    lazy(model)
    require_close(gradients(model, lambda: model(**batch).loss), plain, 1e-5)
    assert "not computed" in repr(model(**batch).logits)


def test_a_head_with_an_adapter_stays_as_it_is(
    build: Any, batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from core_fpdt.loss.head import replace_head

    model = get_peft_model(build(), LoraConfig(target_modules=["lm_head"]))
    with caplog.at_level("INFO", "core"):
        undo = replace_head(model, FPDTSettings(loss_chunk_bytes=1024))
    assert "not a plain linear module" in caplog.text
    assert not isinstance(model(**batch).logits, LazyLogits)
    undo()


def test_evaluation(build: Any, lazy: Any, batch: Any) -> None:
    model = build().eval()
    with torch.no_grad():
        plain = model(**batch)
        lazy(model)
        found = model(**batch)
    assert torch.allclose(found.loss, plain.loss, rtol=1e-6)
    assert not found.loss.requires_grad
    assert "not computed" in repr(found.logits)
    assert torch.equal(found.logits, plain.logits)
    with torch.inference_mode():
        found = model(**batch)
        assert torch.allclose(found.loss, plain.loss, rtol=1e-6)
        assert torch.allclose(found.logits[:, -1], plain.logits[:, -1], rtol=1e-5, atol=1e-5)


def test_generation_is_unchanged(build: Any, lazy: Any) -> None:
    model = build().eval()
    prompt = torch.arange(1, 31)[None]
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(prompt, max_new_tokens=8, do_sample=False, **wanted)
    lazy(model)
    found = model.generate(prompt, max_new_tokens=8, do_sample=False, **wanted)
    assert torch.equal(found.sequences, plain.sequences)
    for ours, theirs in zip(found.logits, plain.logits, strict=True):
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, theirs)


def test_what_fits_is_a_plain_tensor_and_the_head_can_be_put_back(
    build: Any, lazy: Any, batch: Any
) -> None:
    model = build()
    undo = lazy(model, 2**20)
    assert type(model(**batch).logits) is torch.Tensor
    undo()
    undo = lazy(model)
    assert type(model(**batch).logits) is LazyLogits
    undo()
    assert type(model(**batch).logits) is torch.Tensor
    assert "forward" not in vars(model.lm_head)
