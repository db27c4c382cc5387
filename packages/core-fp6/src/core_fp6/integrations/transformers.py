"""Six-bit weights in ``from_pretrained`` and ``save_pretrained``.

Importing this module registers both classes with transformers.

Example:
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained(  # doctest: +SKIP
    ...     "meta-llama/Llama-3.1-8B", quantization_config=FP6Config()
    ... )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightTransform
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from core.errors import ModelError, SettingsError
from core_fp6.integrations import tensor_parallel
from core_fp6.integrations.config import METHOD, FP6Config
from core_fp6.models.checking import check_files
from core_fp6.models.experts import FP6Experts
from core_fp6.models.linear import FP6Linear
from core_fp6.models.selecting import Selection, kind_refused, select, select_but
from core_fp6.models.sixbit import SixBit, parts_of, prepare, sixbit_modules
from core_fp6.weights.scaling import Scheme

__all__ = ["FP6Config", "FP6HfQuantizer", "attach", "forget", "register"]


class FP6HfQuantizer(HfQuantizer):
    """Makes room for six-bit weights before a model is loaded, and fills it."""

    serialized_names = {"weight": list(parts_of("weight"))}  # noqa: RUF012 # as it is declared
    quantization_config: FP6Config

    def __init__(self, quantization_config: FP6Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.refused: list[ModelError] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse device maps that keep a part of the model elsewhere.

        Raises:
            SettingsError: for a part on the CPU or the disk beside other devices.
        """
        given = kwargs.get("device_map")
        devices = {str(device) for device in given.values()} if isinstance(given, dict) else set()
        if "disk" in devices or (len(devices) > 1 and "cpu" in devices):
            raise SettingsError(
                f"device_map uses {', '.join(sorted(devices))}",
                why="six-bit weights are not moved to and fro between devices",
                fix="place the model on accelerators only, or on the CPU only",
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            check_files(kwargs.get("checkpoint_files") or (), config.scheme)
            selection = select_but(model, config.modules_to_not_convert or ())
        else:
            selection = select(model, config.skip)
            self.quantization_config = config.completed(not_converted(model, selection))
        for name, module in selection.chosen.items():
            model.set_submodule(name, make_room(module, config.scheme))

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a parameter is a part of a six-bit weight.

        transformers leaves the shapes of these to us: they are checked after loading.
        """
        module, part = get_module_from_name(model, param_name)
        return isinstance(module, SixBit) and any(part in parts_of(w) for w in module.columns)

    def get_quantize_ops(self) -> Quantize:
        """What turns one loaded tensor into planes and scales."""
        return Quantize(self)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.refused:
            first, *others = self.refused
            more = f"; so {', '.join(other.what for other in others)}" if others else ""
            raise ModelError(first.what, why=first.why + more, fix=first.fix)
        _require_loaded(model)
        prepare(model)
        cast(Any, model)._weight_conversions = _conversions(self, model)
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Say how planes and scales are cut where the plan cuts weights."""
        super().update_parallel_plan(model, plan)
        tensor_parallel.complete(model, plan)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from core_fp6.models.quantizing import dequantize

        return dequantize(model, dtype)

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Models with six-bit weights can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` sees single operators."""
        return True


class Quantize(ConversionOps):
    """Rounds one weight as soon as it is read."""

    def __init__(self, quantizer: FP6HfQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Planes and scales of weights, by the names of their parameters.

        A weight that is refused is noted and left out: an error here would end up in a report of
        transformers, far from its reason.
        """
        model = cast(PreTrainedModel, kwargs["model"])
        made: dict[str, Any] = {}
        for name, tensors in input_dict.items():
            weight = cast(Tensor, tensors[0] if isinstance(tensors, list) else tensors)
            module, part = get_module_from_name(model, name)
            if not isinstance(module, SixBit) or part not in module.columns:
                made[name] = tensors
                continue
            room = cast(Tensor, getattr(module, part))
            try:
                _require_plain(weight, name)
                new = tensor_parallel.quantize(
                    room, weight, module.scheme, module.columns[part], name
                )
            except ModelError as error:
                self.quantizer.refused.append(error)
                # The model is not handed out, so what it gets does not matter.
                new = 3 * (torch.empty(0, dtype=torch.uint8),)
            made.update(zip(parts_of(name), new, strict=True))
        return made


def register() -> None:
    """Make ``quant_method: core_fp6`` known to transformers; again is fine."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(FP6Config)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(FP6HfQuantizer)
    tensor_parallel.register()


def attach(model: nn.Module, scheme: Scheme, skip: Sequence[str], selection: Selection) -> None:
    """Let ``save_pretrained`` of a model that was quantized in memory write what it is."""
    if not isinstance(model, PreTrainedModel):
        return
    config = FP6Config(
        scheme.format.name,
        scheme.group_size,
        skip,
        modules_to_not_convert=not_converted(model, selection),
    )
    said = cast(Any, model)
    said.hf_quantizer = FP6HfQuantizer(config, pre_quantized=False)
    said.config.quantization_config = config
    said.is_quantized, said.quantization_method = True, METHOD
    said._weight_conversions = _conversions(said.hf_quantizer, model)


def forget(model: nn.Module) -> None:
    """Undo :func:`attach`, and what ``from_pretrained`` noted."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(model, PreTrainedModel) and isinstance(quantizer, FP6HfQuantizer):
        cast(Any, quantizer).remove_quantization_config(model)
        cast(Any, model)._weight_conversions = _plain_conversions(model)


def not_converted(model: nn.Module, selection: Selection) -> list[str]:
    """Names of the modules that could have been quantized and are not."""
    return [name for name in selection.left_out if kind_refused(model.get_submodule(name)) is None]


def make_room(module: nn.Module, scheme: Scheme) -> SixBit:
    """A module on the meta device for the weights of another."""
    if not isinstance(module, nn.Linear):
        made: SixBit = FP6Experts(module, scheme, "meta")
    else:
        made = FP6Linear(module.in_features, module.out_features, scheme, device="meta")
        made.register_parameter("bias", module.bias)
    # Missing planes are refused after loading; there is nothing to initialize at random.
    cast(Any, made)._is_hf_initialized = True
    cast(Any, made)._hf_quantized_needs_local_tp = True
    return made


def _require_plain(weight: Tensor, name: str) -> None:
    if not weight.is_floating_point():
        raise ModelError(
            f"{name} cannot be quantized",
            why=f"it is {weight.dtype}: the checkpoint is quantized already",
            fix="load it without quantization_config, or load the original",
        )


def _require_loaded(model: PreTrainedModel) -> None:
    missing = [
        f"{name}.{part}"
        for name, module in sixbit_modules(model)
        for weight in module.columns
        for part in parts_of(weight)
        if not getattr(getattr(module, part), "_is_hf_initialized", False)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{missing[0]}{more} cannot be loaded",
            why="the checkpoint does not have it",
            fix="the files are incomplete or of another configuration: quantize the model again, "
            "or leave new modules out with skip",
        )


def _plain_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """How the checkpoint of the model names and merges weights, planes and scales aside."""
    used = getattr(model, "_weight_conversions", None)
    if used is None:
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        used = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    return [entry for entry in used if not _is_of_part(entry)]


def _conversions(quantizer: FP6HfQuantizer, model: PreTrainedModel) -> list[WeightTransform]:
    """The same with a copy of each merge for planes and scales, to be undone when saving."""
    plain = _plain_conversions(model)
    return list(cast(Any, quantizer).update_weight_conversions(plain, model))


def _is_of_part(entry: WeightTransform) -> bool:
    return all(source.endswith(parts_of("weight")[1:]) for source in entry.source_patterns)


register()
