"""Loss and every gradient of a model in chunks are those of the model, family by family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import core_fpdt
from core.testing.tiny import VOCABULARY, build

CHUNK = 16
TAMED = 0.4
"""Factor of the weights in single precision: those of tiny models are so large that the rounding of
one layer is magnified by the next. In double precision they stay, and show every mistake."""
EXACT, PRECISE = 2e-6, 1e-11
WINDOWS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
QUIET = {"attention_dropout": 0.0, "residual_dropout": 0.0}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Apertus": {},
    "Arcee": {},
    "Cohere": {},
    "Cohere2": WINDOWS,
    "DeepseekV3": {
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.0,
    },
    "Ernie4_5": {"head_dim": 8},
    "Exaone4": WINDOWS,
    "FlexOlmo": EXPERTS,
    "GPT2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "GPTNeoX": {},
    "Gemma": {"head_dim": 8},
    "Gemma2": {
        **WINDOWS,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3Text": WINDOWS,
    "Gemma4Text": {
        **WINDOWS,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "Glm4": {},
    "Glm4Moe": {
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "GptOss": {**WINDOWS, **MIXTURE},
    "Granite": {
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "logits_scaling": 2.0,
    },
    "GraniteMoe": MIXTURE,
    "Helium": {"head_dim": 8},
    "HunYuanDenseV1": {"head_dim": 8},
    "HunYuanMoEV1": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "JetMoe": {"kv_channels": 8, **MIXTURE},
    "Llama": {},
    "Llama4Text": {
        "head_dim": 8,
        "attention_chunk_size": 11,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "attn_temperature_tuning": True,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
    },
    "MiniMaxM2": {"head_dim": 8, **MIXTURE},
    "Ministral": {**WINDOWS, "head_dim": 8},
    "Mistral": {"sliding_window": 9},
    "Mixtral": MIXTURE,
    "Nemotron": {},
    "Olmo2": {},
    "Olmo3": WINDOWS,
    "Olmoe": EXPERTS,
    "Persimmon": {},
    "Phi": {},
    "Phi3": {},
    "Qwen2": {**WINDOWS, "use_sliding_window": True},
    "Qwen3": {},
    "Qwen3Moe": {"head_dim": 8, "moe_intermediate_size": 16, **EXPERTS},
    "SeedOss": {"head_dim": 8, **QUIET},
    "SmolLM3": {},
    "StableLm": {},
    "Starcoder2": {},
}
FORMS = ["plain", "ragged", "padded right", "padded left", "packed"]

ROUNDS = {"Cohere", "Cohere2", "Gemma", "Gemma2", "Gemma3Text", "Gemma4Text", "Helium"}
"""Families that compute norms in float32 in any model; a router in float32 rounds too."""
ROUTERS = {"DeepseekV3", "Glm4Moe"}
EAGER = {"Gemma2", "GptOss"}
"""Families whose attention only transformers' eager function computes."""
NANS = {"Gemma2"}
"""Families that give NaN in float64 where a row sees nothing."""


@dataclass(frozen=True)
class Run:
    """What one forward and backward pass gave; ``gradients`` by name, the input's is ``input``."""

    loss: float
    gradients: Mapping[str, Tensor]


class Family:
    """A tiny model of a family, as it is and in chunks, in both precisions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = build(name, num_hidden_layers=2, **FAMILIES[name]).train()
        self.model.set_attn_implementation("eager")
        self._large = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(TAMED)
        self.whole: dict[str, Run] = {form: run(self.model, form) for form in FORMS}
        with core_fpdt.enable(self.model, chunk_tokens=CHUNK):
            self.chunked: dict[str, Run] = {form: run(self.model, form) for form in FORMS}

    @cached_property
    def precise(self) -> dict[str, tuple[Run, Run]]:
        """Whole and chunked in float64, with the weights as they are drawn."""
        model, forms = self._double(self._large)
        whole = {form: run(model, form) for form in forms}
        with core_fpdt.enable(model, chunk_tokens=CHUNK, strict=False):
            return {form: (whole[form], run(model, form)) for form in forms}

    @cached_property
    def exact(self) -> dict[str, Run]:
        """Whole in float64, with the weights of single precision."""
        model, forms = self._double(self.model)
        return {form: run(model, form) for form in forms}

    def _double(self, model: nn.Module) -> tuple[nn.Module, list[str]]:
        model = copy.deepcopy(model).double()
        model.set_experts_implementation("eager")
        # Eager attention may cast what hides to float32, where rows that see nothing become NaN.
        if self.name not in EAGER:
            model.set_attn_implementation("sdpa")
        return model, [form for form in FORMS if self.name not in NANS or "padded" not in form]

    def noise(self, name: str) -> float:
        """How far a gradient of the model as it is comes to lie from the exact one, at worst."""
        return max(
            float((self.whole[form].gradients[name] - exact.gradients[name]).norm())
            / float(exact.gradients[name].norm())
            for form, exact in self.exact.items()
        )


def batch(form: str) -> dict[str, Tensor]:
    """Two rows of tokens with their labels, of three chunks but for the plain ones."""
    length = 2 * CHUNK if form == "plain" else 41
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, VOCABULARY, (2, length), generator=generator)
    made = {"input_ids": tokens, "labels": tokens.clone()}
    if form == "packed":
        parts = [(20, 3, 18), (7, 34)]
        rows = [torch.cat([torch.arange(size) for size in sizes]) for sizes in parts]
        made["position_ids"] = torch.stack(rows)
    if form.startswith("padded"):
        real = torch.ones_like(tokens)
        if form == "padded right":
            real[0, 30:] = real[1, 13:] = 0
        else:
            real[0, :5] = real[1, :21] = 0
        made["attention_mask"] = real
        # The first real token is told by padding, whose own output means nothing.
        made["labels"][(real == 0) | (real.cumsum(1) == 1)] = -100
    return made


def run(model: nn.Module, form: str) -> Run:
    inputs = batch(form)
    embed: Callable[[Tensor], Tensor] = model.get_input_embeddings()
    leaf = embed(inputs.pop("input_ids")).detach().requires_grad_()
    model.zero_grad()
    loss = model(inputs_embeds=leaf, use_cache=False, **inputs).loss
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: gradient.double() for name, gradient in named.items()}
    return Run(float(loss.detach()), {"input": leaf.grad.double(), **gradients})


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    return Family(request.param)


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_in_single_precision(family: Family, form: str) -> None:
    whole, chunked = family.whole[form], family.chunked[form]
    assert chunked.loss == pytest.approx(whole.loss, rel=5e-7)
    assert set(chunked.gradients) == set(whole.gradients)
    assert len(whole.gradients) > 10
    largest = max(float(gradient.norm()) for gradient in whole.gradients.values())
    for name, wanted in whole.gradients.items():
        off = float((chunked.gradients[name] - wanted).norm())
        if off <= EXACT * float(wanted.norm()):
            continue
        # The model itself is not that exact: how far off is it, and are we farther?
        noise = family.noise(name)
        assert noise > EXACT / 2, name
        exact = family.exact[form].gradients[name]
        # A sum that cancels out is as exact as what was added.
        allowed = max(2 * noise * float(exact.norm()), EXACT * 1e-2 * largest)
        assert float((chunked.gradients[name] - exact).norm()) <= allowed, name


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_in_double_precision(family: Family, form: str) -> None:
    if form not in family.precise:
        pytest.skip("the model as it is gives NaN")
    whole, chunked = family.precise[form]
    tolerance = EXACT if family.name in ROUNDS | ROUTERS else PRECISE
    assert chunked.loss == pytest.approx(whole.loss, rel=tolerance)
    for name, wanted in whole.gradients.items():
        off = float((chunked.gradients[name] - wanted).norm())
        assert off <= tolerance * float(wanted.norm()), name
