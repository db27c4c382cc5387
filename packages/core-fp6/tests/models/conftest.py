"""Small models of transformers, built from configurations."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda **sizes: LlamaForCausalLM(LlamaConfig(**sizes)),
    "phi3": lambda **sizes: Phi3ForCausalLM(Phi3Config(**sizes)),
    "qwen2": lambda **sizes: Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)),
    "mistral": lambda **sizes: MistralForCausalLM(MistralConfig(**sizes)),
    "mixtral": lambda **sizes: MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)),
    "qwen3-moe": lambda **sizes: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)
    ),
}


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(scope="session")
def names() -> list[str]:
    return list(MODELS)


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedModel]:
    """Builds a family with weights that depend on nothing else, biases included."""

    def make(family: str = "llama", **sizes: int) -> PreTrainedModel:
        torch.manual_seed(0)
        model = MODELS[family](**(SIZES | sizes)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        return model

    return make


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
