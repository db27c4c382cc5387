"""How six-bit weights are cut for tensor parallelism.

transformers cuts every tensor of a module alike. Planes in natural layout can be cut like the
weight. Scales are kept whole where columns are cut: a cut may split a group, and scales of rows
have no columns.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import (
    _StridedShard,  # pyright: ignore[reportPrivateUsage] # as transformers cuts fused weights
)
from torch.nn.functional import pad
from transformers.distributed.parallel_utils import (
    ALL_PARALLEL_STYLES,
    replace_layer_number_by_wildcard,
)
from transformers.distributed.tensor_parallel import TensorParallelLayer

from core.errors import ModelError
from core_fp6.models.sharding import Cut, cut_dims, cut_of, without_lead
from core_fp6.models.sixbit import SCALE, sixbit_modules
from core_fp6.weights import packed
from core_fp6.weights.scaling import Scheme, require_finite

_WHOLE = "replicated_with_grad_allreduce"


class _Rows(TensorParallelLayer):
    """Scales of the rows of experts ``[experts, rows]``, cut at the rows."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        whole = cast(Tensor, getattr(module, param))
        last = whole.ndim - 1
        cut = Shard(last) if self.parts == 1 else _StridedShard(last, split_factor=self.parts)
        new = distribute_tensor(whole, mesh, [cut], src_data_rank=None)
        module.register_parameter(param, nn.Parameter(new, requires_grad=False))


_ROWS = {"colwise": "core_fp6_rows", "packed_colwise": "core_fp6_packed_rows"}


def register() -> None:
    """Add the styles of this module to those of transformers; again is fine."""
    for parts, name in enumerate(_ROWS.values(), 1):
        ALL_PARALLEL_STYLES.register(name, cast(Any, _Rows(parts)))


def complete(model: nn.Module, plan: dict[str, str]) -> None:
    """Correct a plan, in place, for the scales; planes are cut as the weights are."""
    for path, module in sixbit_modules(model):
        for name in module.columns:
            weight = replace_layer_number_by_wildcard(f"{path}.{name}")
            style = plan.get(weight) or plan.get(weight.rpartition(".")[0])
            if style is None:
                continue
            if "rowwise" in style:
                plan[weight + SCALE] = _WHOLE
            elif (
                style in _ROWS and not module.scheme.group_size and getattr(module, name).ndim == 3
            ):
                plan[weight + SCALE] = _ROWS[style]


def quantize(
    parameter: Tensor, weight: Tensor, scheme: Scheme, columns: int, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the part of a weight that is here, with scales that all ranks agree on.

    Args:
        parameter: the low plane that is filled; it says how the weight is cut.
        weight: what is here of the weight.
        scheme: format and group size.
        columns: of the whole weight.
        name: what errors call the weight.

    Returns:
        Planes of what is here in natural layout, and the scales, whole where columns are cut.

    Raises:
        ModelError: when the weight has NaN or infinities, here or on another rank, or cannot be
            cut so.
    """
    cut = cut_of(parameter, columns, name)
    if cut.is_whole():
        made = packed.quantize(weight, scheme, name=name)
        return made.low, made.high, made.scale
    led = pad(weight, (cut.lead(scheme), 0))
    whole = _agreed(parameter, led, scheme, cut)
    require_finite(weight, name)
    if not bool(torch.isfinite(whole).all()):
        raise ModelError(
            f"{name} cannot be quantized",
            why="another rank has NaN or infinite values of it",
            fix="repair the checkpoint, or leave the module out with skip",
        )
    made = packed.quantize(led, scheme, scale=cut.scales(scheme, whole), name=name)
    return *without_lead(made, cut), whole


def _agreed(parameter: Tensor, led: Tensor, scheme: Scheme, cut: Cut) -> Tensor:
    """The scales of all columns, of which every rank knows a part."""
    part = scheme.scales(led).float().nan_to_num(nan=float("inf"))
    # Where all weights are zero the scale is one, which must not win over that of another rank.
    none = scheme.scales((led != 0).to(led.dtype)) == 1
    part = torch.where(none, 0, part)
    whole = part
    if scheme.group_size:
        begin = cut.begin // scheme.group_size
        after = scheme.groups(cut.total) - begin - part.shape[-1]
        whole = pad(part, (begin, after))
    for dim, _ in cut_dims(parameter):
        mesh = cast(DTensor, parameter).device_mesh
        dist.all_reduce(whole, dist.ReduceOp.MAX, mesh.get_group(dim))
    return torch.where(whole == 0, 1, whole).to(scheme.scale_dtype)
