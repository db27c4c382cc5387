"""Mistakes of users and odd inputs: refused by name before any training, or exact."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from core.discovery import discover
from core.errors import CoreError, ModelError, SettingsError
from core.testing import tiny
from core.testing.fixtures import make_run
from core_fpdt import enable

CHUNK = 8


def _gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def _require_equal(model: nn.Module, batch: dict[str, Tensor], **settings: Any) -> None:
    """In float64, against the model as it is."""
    model = model.double()
    wanted = _gradients(copy.deepcopy(model), batch)
    with enable(model, chunk_tokens=CHUNK, strict=False, **settings):
        found = _gradients(model, batch)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-11 * tensor.norm().clamp_min(1.0), name


def _batch(length: int, rows: int = 1) -> dict[str, Tensor]:
    found = tiny.batch(rows=rows, length=length)
    return {"input_ids": found["input_ids"], "labels": found["labels"]}


# -- odd inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_any_length_and_number_of_rows(length: int, rows: int) -> None:
    _require_equal(tiny.llama(), _batch(length, rows))


def test_one_token_has_no_loss_and_still_its_hidden_states() -> None:
    model = tiny.llama().double()
    ids = torch.tensor([[7]])
    wanted = model(ids).logits
    with enable(model, chunk_tokens=CHUNK, strict=False):
        model.train()
        hidden = model.model(ids, use_cache=False).last_hidden_state
        found = model.lm_head(hidden)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        hidden.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("offload", ["none", "file"])
def test_documents_of_one_token(offload: str, tmp_path: Path) -> None:
    batch = _batch(29)
    lengths = [9, 1, 1, 7, 1, 10]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    _require_equal(tiny.llama(), batch, offload=offload, folder=str(tmp_path))


def test_labels_that_are_all_ignored_count_for_nothing() -> None:
    model = tiny.llama()
    batch = _batch(20)
    batch["labels"].fill_(-100)
    with enable(model, chunk_tokens=CHUNK):
        model.train()
        # As a rank without labels among others that have some.
        loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(5)).loss
        loss.backward()
        assert loss.item() == 0
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
        model.zero_grad()
        found = model(**batch, use_cache=False).loss
    assert torch.equal(found.isnan(), model(**batch, use_cache=False).loss.isnan())


# -- refused before any training -------------------------------------------------------------------


def test_enabling_twice() -> None:
    model = tiny.llama()
    with enable(model, chunk_tokens=CHUNK) as first:
        with pytest.raises(ModelError, match=r"LlamaForCausalLM .*already"):
            enable(model)
        _gradients(model, _batch(20))
        first.disable()
        with enable(model, chunk_tokens=CHUNK):
            _gradients(model, _batch(20))


def test_router_losses() -> None:
    model = tiny.build("Mixtral", num_local_experts=2, output_router_logits=True)
    with pytest.raises(ModelError, match="output_router_logits"):
        enable(model)
    model.config.output_router_logits = False
    with enable(model, chunk_tokens=CHUNK, strict=False):
        model.train()
        with pytest.raises(ModelError, match="output_router_logits"):
            model(**_batch(20), use_cache=False, output_router_logits=True)
        model.config.output_router_logits = True
        with pytest.raises(ModelError, match="output_router_logits"):
            model(**_batch(20), use_cache=False)


def _checkpoint_model(model: Any) -> None:
    model.gradient_checkpointing_enable()


def _checkpoint_layer(model: Any) -> None:
    model.model.layers[1]._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint


@pytest.mark.parametrize("switch_on", [_checkpoint_model, _checkpoint_layer])
def test_gradient_checkpointing_over_chunks(switch_on: Callable[[Any], None]) -> None:
    model: Any = tiny.llama()
    with enable(model, chunk_tokens=CHUNK):
        model.train()
        switch_on(model)
        with pytest.raises(ModelError, match=r"LlamaDecoderLayer .*gradient checkpointing"):
            model(**_batch(20), use_cache=False)
    model = tiny.llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient checkpointing is on"):
        enable(model)


class _Texts(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in _batch(20 + index).items()}


def _trainer(model: nn.Module, folder: Path, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {"per_device_train_batch_size": 1, "max_steps": 2, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(folder), save_strategy="no", **settings, **changes)
    return Trainer(model=model, args=arguments, train_dataset=_Texts())


def test_checkpointing_by_the_arguments_of_a_trainer(tmp_path: Path) -> None:
    model = tiny.llama()
    with (
        enable(model, chunk_tokens=CHUNK),
        pytest.raises(ModelError, match="gradient checkpointing"),
    ):
        _trainer(model, tmp_path, gradient_checkpointing=True).train()


def test_a_trainer_trains_in_chunks_as_without(tmp_path: Path) -> None:
    model = tiny.llama()
    losses = []
    for chunked in (False, True):
        same = copy.deepcopy(model)
        enabled = enable(same, chunk_tokens=CHUNK) if chunked else None
        losses.append(_trainer(same, tmp_path, gradient_checkpointing=False).train().training_loss)
        if enabled is not None:
            enabled.disable()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models(whole: bool) -> None:
    model = tiny.llama()
    compiled = model
    if whole:
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.raises(ModelError, match="compiled"):
        enable(compiled)


def test_compiling_an_enabled_model_leaves_chunks_as_they_are() -> None:
    model = tiny.llama().double()
    wanted = _gradients(copy.deepcopy(model), _batch(20))
    torch._dynamo.reset()
    with enable(model, chunk_tokens=CHUNK, strict=False):
        model.train()
        torch.compile(model, backend="eager")(**_batch(20), use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-11)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("fpdt", "message"),
    [
        ({"chunk_tokens": -1}, r"fpdt.chunk_tokens = -1.*greater than or equal to 0"),
        ({"keep_output": 1.5}, r"fpdt.keep_output = 1.5.*less than or equal to 1"),
        ({"order": "rows"}, r"fpdt.order = 'rows'.*'auto', 'query' or 'key'"),
        ({"offload": "nvme"}, r"fpdt.offload = 'nvme'.*'auto', 'none', 'host' or 'file'"),
        ({"kernel": "flash"}, r"fpdt.kernel = 'flash'.*'cpu_flash'"),
        ({"host_memory": "much"}, r"fpdt.host_memory = 'much'"),
        ({"keepkeys": False}, r"did you mean 'keep_keys'"),
    ],
)
def test_settings_of_a_run(tmp_path: Path, fpdt: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_run(tmp_path / "run", plugins=discover(), enable=["fpdt"], fpdt=fpdt)


def test_a_folder_for_files_that_is_none(tmp_path: Path) -> None:
    model = tiny.llama()
    with pytest.raises(CoreError, match=r"no chunks can be kept in .*missing(.|\n)*fpdt.folder"):
        enable(model, offload="file", folder=str(tmp_path / "missing"))
    assert model.config._attn_implementation != "core_fpdt"
    enable(model, chunk_tokens=CHUNK).disable()


def test_a_full_disk_in_the_middle_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    model = tiny.llama()
    wanted = _gradients(copy.deepcopy(model), _batch(20))
    real, calls = os.posix_fallocate, [0]

    def full(descriptor: int, begin: int, length: int) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise OSError(28, "No space left on device")
        real(descriptor, begin, length)

    with enable(model, chunk_tokens=CHUNK, offload="file", folder=str(tmp_path)) as enabled:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(CoreError, match="No space left on device"):
                _gradients(model, _batch(20))
        assert enabled.runner.store.used() == 0
        found = _gradients(model, _batch(20))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


# -- everything is put back ------------------------------------------------------------------------


def _state(model: nn.Module) -> list[Any]:
    modules = [(n, type(m), sorted(vars(m)), m.forward.__func__) for n, m in model.named_modules()]
    hooks = [
        (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    return [modules, hooks, model.config._attn_implementation, model.training]


@pytest.mark.parametrize("settings", [{}, {"mlp_chunks": 2, "offload": "file"}, {"delay": 1e-4}])
def test_disabling_puts_everything_back(settings: dict[str, Any]) -> None:
    model = tiny.mistral()
    before, logits = _state(model), model(tiny.batch()["input_ids"]).logits
    enabled = enable(model, chunk_tokens=CHUNK, **settings)
    _gradients(model, _batch(20))
    model.eval()
    enabled.disable()
    enabled.disable()
    assert _state(model) == before
    assert torch.equal(model(tiny.batch()["input_ids"]).logits, logits)


def test_weights_have_the_same_names_and_can_be_copied(tmp_path: Path) -> None:
    model = tiny.llama()
    names = list(model.state_dict())
    with enable(model, chunk_tokens=CHUNK):
        _gradients(model, _batch(20))
        assert list(model.state_dict()) == names
        state = pickle.loads(pickle.dumps(model.state_dict()))
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation != "core_fpdt"
    for other in (state, again.state_dict()):
        assert all(torch.equal(model.state_dict()[name], other[name]) for name in names)


def test_a_copy_of_an_enabled_model_trains_too() -> None:
    model = tiny.llama().double()
    wanted = _gradients(copy.deepcopy(model), _batch(20))
    with enable(model, chunk_tokens=CHUNK, strict=False):
        found = _gradients(copy.deepcopy(model), _batch(20))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11)
    found = _gradients(model, _batch(20))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
