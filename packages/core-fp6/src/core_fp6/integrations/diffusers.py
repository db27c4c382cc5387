"""Six-bit weights in ``from_pretrained`` and ``save_pretrained`` of diffusers.

diffusers has no functions to register with; :mod:`core_fp6.registering` puts this quantizer and
:class:`core_fp6.integrations.config.FP6Config` into its mappings.

Example:
    >>> from diffusers import FluxTransformer2DModel
    >>> from core_fp6 import FP6Config
    >>> transformer = FluxTransformer2DModel.from_pretrained(  # doctest: +SKIP
    ...     "black-forest-labs/FLUX.1-dev", subfolder="transformer", quantization_config=FP6Config()
    ... )
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ModelError
from core_fp6.integrations.config import METHOD, FP6Config
from core_fp6.models.linear import FP6Linear
from core_fp6.models.selecting import Selection, select, select_but
from core_fp6.models.sixbit import SixBit, parts_of, prepare, sixbit_modules
from core_fp6.weights import packed
from core_fp6.weights.scaling import Scheme

_Base: Any = import_module("diffusers.quantizers.base").DiffusersQuantizer


class FP6Quantizer(_Base):  # type: ignore[misc]  # pyright: ignore[reportUntypedBaseClass]
    """Quantizes the linear modules of a model while it is loaded, one weight at a time."""

    use_keep_in_fp32_modules = True
    quantization_config: FP6Config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from core_fp6.integrations.transformers import make_room, not_converted

        config = self.quantization_config
        if not self.pre_quantized:
            # Rooms would have other shapes than the weights that come: modules change one by one.
            selection = select(model, config.skip)
            self._chosen = frozenset(selection.chosen)
            config.modules_to_not_convert = not_converted(model, selection)
            return
        for name, module in select_but(model, config.modules_to_not_convert or ()).chosen.items():
            model.set_submodule(name, make_room(module, config.scheme))

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: Mapping[str, Tensor],
        **kwargs: Any,
    ) -> bool:
        """Whether a tensor of a checkpoint is a weight to quantize, or a part of a quantized one."""
        owner, _, part = param_name.rpartition(".")
        if not self.pre_quantized:
            return owner in self._chosen and part == "weight"
        module = model.get_submodule(owner)
        return isinstance(module, SixBit) and any(part in parts_of(n) for n in module.columns)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: Mapping[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put a tensor where it belongs; a plain weight is rounded first.

        Raises:
            ModelError: when the weight has NaN or infinities.
        """
        owner, _, part = param_name.rpartition(".")
        module = model.get_submodule(owner)
        if self.pre_quantized:
            # As it lies in the file: what is handed over has been cast to the dtype of the model.
            tensor = state_dict[param_name].to(target_device)
            module.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
            return
        weight = packed.quantize(
            param_value.to(target_device),
            self.quantization_config.scheme,
            layout="execution",
            name=param_name,
        )
        bias: Any = module.bias
        model.set_submodule(owner, FP6Linear.from_packed(weight, bias, module.training))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, module in sixbit_modules(model):
            missing = [
                part
                for weight in module.columns
                for part in parts_of(weight)
                if getattr(module, part).is_meta
            ]
            if missing:
                raise ModelError(
                    f"{name}.{missing[0]} cannot be loaded",
                    why="the checkpoint does not have it",
                    fix="the files are incomplete: quantize the model again",
                )
        return prepare(model)

    def dequantize(self, model: nn.Module) -> nn.Module:
        """Give a model plain weights again, in place."""
        from core_fp6.models.quantizing import dequantize

        return dequantize(model)

    @property
    def is_serializable(self) -> bool:
        """Models with six-bit weights can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True


def attach(model: nn.Module, scheme: Scheme, skip: Sequence[str], selection: Selection) -> None:
    """Let ``save_pretrained`` of a model that was quantized in memory write what it is."""
    from core_fp6.integrations.transformers import not_converted

    if not isinstance(model, import_module("diffusers").ModelMixin):
        return
    left_out = not_converted(model, selection)
    config = FP6Config(scheme.format.name, scheme.group_size, skip, modules_to_not_convert=left_out)
    said: Any = model
    said.hf_quantizer = FP6Quantizer(config, pre_quantized=True)
    said.is_quantized, said.quantization_method = True, METHOD
    said.register_to_config(quantization_config=config)


def forget(model: nn.Module) -> None:
    """Undo :func:`attach`, and what ``from_pretrained`` noted."""
    said: Any = model
    if isinstance(getattr(model, "hf_quantizer", None), FP6Quantizer):
        del said.hf_quantizer
        said.is_quantized = False
        kept = {key: value for key, value in said.config.items() if key != "quantization_config"}
        said._internal_dict = type(said.config)(kept)
