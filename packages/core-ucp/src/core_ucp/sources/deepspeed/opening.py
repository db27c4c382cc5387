"""A DeepSpeed checkpoint as a view: whichever stage of ZeRO, with all kinds of parallelism."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core_ucp.files.trees import number
from core_ucp.layout.holders import Replicate
from core_ucp.layout.layout import Layout
from core_ucp.layout.rules import Rules
from core_ucp.sources.deepspeed.agreement import Pair, require_agreement
from core_ucp.sources.deepspeed.content import Content, Model, config_of, open_content
from core_ucp.sources.deepspeed.experts import read_experts
from core_ucp.sources.deepspeed.folder import find
from core_ucp.sources.deepspeed.modules import read_module
from core_ucp.sources.deepspeed.pipeline import parameter_names, read_layers, stages
from core_ucp.sources.deepspeed.resume import counted_steps, read_resume
from core_ucp.sources.deepspeed.shares import Share, merge, with_replica
from core_ucp.sources.deepspeed.stage0 import read_stage0
from core_ucp.sources.deepspeed.tensor_parallel import join_shares, layouts_of
from core_ucp.sources.deepspeed.universal import read_universal, universal_content
from core_ucp.sources.deepspeed.zero3 import read_zero3
from core_ucp.sources.deepspeed.zero12 import read_zero12
from core_ucp.view.keys import extra_key, parse_key, weight_key
from core_ucp.view.view import Atom, View


def open_view(path: Path, rules: Rules | None = None) -> View:
    """Open what DeepSpeed has saved, or what its converter has made of that.

    Args:
        path: folder of a tag, or the folder that tags were saved into.
        rules: how parameters lie over tensor-parallel ranks, where the run does not say so.

    Raises:
        CheckpointError: when ranks are missing or do not fit together, naming what and where.
    """
    folder = find(path)
    if folder.universal:
        content = universal_content(folder)
        share = read_universal(content)
    else:
        content = open_content(folder)
        share = _whole(content, rules)
    model = content.models[min(content.models)]
    twins, atoms = _sorted(content, share)
    resume, tensors = read_resume(content, model, share.hyper, _step(content, atoms))
    atoms |= {extra_key(name): tensor.atom() for name, tensor in tensors.items()}
    return View(
        path=path,
        framework="deepspeed",
        files=content.files,
        atoms=atoms,
        aliases=share.aliases,
        twins=twins,
        resume=resume,
        mesh={} if folder.universal else _mesh(content),
        details=_details(content, model) | _named(content, model, resume.hyper),
        remarks=tuple(content.remarks),
    )


def _whole(content: Content, rules: Rules | None) -> Share:
    """All of the model, from the shares of all model-parallel ranks."""
    by_tp = [_pipeline(content, tp) for tp in range(content.tp)]
    if content.tp == 1:
        return merge(by_tp[0], str(content.folder.path))
    model = content.models[0, 0]
    buffers = {str(name) for name in model.tree.get("buffer_names") or ()}
    names = dict.fromkeys(
        name for share in by_tp[0] for name in (*parameter_names(share), *share.halves)
    )
    layouts = layouts_of(content, model, [n for n in names if n not in buffers], rules)
    stages_of = zip(*by_tp, strict=True)
    joined = [join_shares(content, shares, _lookup(layouts)) for shares in stages_of]
    return merge(joined, str(content.folder.path))


def _lookup(layouts: dict[str, Layout]) -> Callable[[str], Layout]:
    return lambda name: layouts.get(name, Replicate())


def _pipeline(content: Content, tp: int) -> list[Share]:
    """Shares of the stages of a pipeline for one tensor-parallel rank."""
    ranks = [pp * content.tp + tp for pp in range(content.pp)]
    shares = [_rank(content, mp) for mp in ranks]
    if not content.folder.layers:
        return shares
    trained = {name for share in shares for name in parameter_names(share)}
    layers = read_layers(content, tp, trained)
    if not content.stage:
        return _stage0_pipeline(content, ranks, layers)
    return [*shares, layers]


def _rank(content: Content, mp: int) -> Share:
    """What one model-parallel rank holds."""
    if content.stage == 3:
        share = read_zero3(content, mp)
    elif content.stage:
        share = read_zero12(content, mp)
    else:
        share = Share()
    read_module(content, mp, share)
    read_experts(content, mp, share)
    if not content.stage and not content.folder.layers:
        read_stage0(content, mp, share)
    return share


def _stage0_pipeline(content: Content, ranks: Sequence[int], layers: Share) -> list[Share]:
    """Stages without ZeRO: their optimizers number the parameters of their layers."""
    counts = [_trained(content.models[0, mp]) for mp in ranks]
    found: list[Share] = []
    for mp, names in zip(ranks, stages(layers, counts), strict=True):
        share = Share(halves={name: layers.halves[name] for name in names})
        read_stage0(content, mp, share)
        found.append(share)
    return found


def _trained(model: Model) -> int:
    tree = model.tree.get("optimizer") or {}
    inner = tree.get("optimizer_state_dict", tree)
    return sum(len(group.get("params", ())) for group in inner.get("param_groups", ()))


def _sorted(content: Content, share: Share) -> tuple[dict[str, Atom], dict[str, Atom]]:
    """Twins and atoms: a rounded weight is a twin where its master exists, else an atom."""
    atoms, twins = dict(share.atoms), dict[str, Atom]()
    pairs: list[Pair] = []
    for name, half in share.halves.items():
        key = weight_key(name)
        master = atoms.get(key)
        if name in share.aliases:
            continue
        if master is None:
            atoms[key] = half
            continue
        if master.shape != half.shape:
            raise content.fail(
                f"holds {key} as {list(master.shape)} and as {list(half.shape)}",
                why="files of several runs are mixed",
            )
        pairs.append((name, master, half))
        if master.dtype == half.dtype:
            atoms[key] = with_replica(key, master, half, str(content.folder.path))
        else:
            twins[key] = half
    require_agreement(content, pairs)
    for name, owner in share.aliases.items():
        if weight_key(owner) not in atoms:
            raise content.fail(f"does not hold {owner}", why=f"{name} is another name of it")
    return twins, atoms


def _step(content: Content, atoms: dict[str, Atom]) -> int | None:
    """Steps of the optimizer: those of the parameter that has most."""
    seen: dict[tuple[int, int], int] = {}
    for key, atom in atoms.items():
        part = parse_key(key)
        if part is not None and part.state == "step" and atom.relation == "scalar":
            place = int(atom.pieces.file[0]), int(atom.pieces.offset[0])
            if place not in seen:
                seen[place] = int(number(content.files, atom))
    steps = max(seen.values(), default=None)
    run = counted_steps(content.models[min(content.models)])
    if content.stage and steps is not None and run is not None and steps != run:
        content.remarks.append(f"the optimizer has made {steps} steps, and the run {run}")
    return steps


def _mesh(content: Content) -> dict[str, int]:
    experts = content.folder.experts
    sizes = {"pp": content.pp, "dp": content.dp, "tp": content.tp}
    if experts and content.optimizers:
        groups = content.optimizers[0, 0].tree.get("partition_count")
        sizes["ep"] = content.dp // min(groups) if isinstance(groups, list) else 1
    elif experts:
        sizes["ep"] = max(1, len(content.folder.expert_optimizers) // content.mp)
    return {axis: size for axis, size in sizes.items() if size > 1 or axis == "dp"}


def _details(content: Content, model: Model) -> dict[str, Any]:
    config = config_of(model.tree)
    found: dict[str, Any] = {
        "stage": "universal" if content.folder.universal else content.stage,
        "tag": content.folder.path.name,
        "version": str(model.tree.get("ds_version", "")),
    }
    for precision in ("bf16", "fp16"):
        section = config.get(precision)
        if isinstance(section, dict) and section.get("enabled"):
            found["precision"] = precision
    if content.folder.layers:
        found["pipeline"] = True
    zero = config.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("round_robin_gradients"):
        found["round_robin_gradients"] = True
    return found


def _named(
    content: Content, model: Model, hyper: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Names of buffers, of the parameters of every group, and the order of the model.

    A target that keeps flat buffers needs them; see :mod:`core_ucp.targets.deepspeed`.
    """
    module = model.tree.get("module")
    found: dict[str, Any] = {
        "buffers": [str(name) for name in model.tree.get("buffer_names") or ()],
        "order": [str(name) for name in module] if isinstance(module, Mapping) else [],
    }
    if content.mp == 1 and hyper and not content.folder.experts:
        found["groups"] = _groups(content, model, hyper)
    return found


def _groups(
    content: Content, model: Model, hyper: Mapping[str, Mapping[str, Any]]
) -> list[list[str]]:
    """Parameters of every group in the order in which the optimizer was given them."""
    groups: dict[int, list[str]] = {}
    for name, settings in hyper.items():
        groups.setdefault(id(settings), []).append(name)
    zero = config_of(model.tree).get("zero_optimization")
    dealt = isinstance(zero, Mapping) and bool(zero.get("round_robin_gradients"))
    if not dealt or content.stage not in (1, 2):
        return list(groups.values())
    return [_undealt(names, content.dp) for names in groups.values()]


def _undealt(names: list[str], ranks: int) -> list[str]:
    """Round-robin gradients deal parameters out to ranks; this is the order before."""
    order = [index for rank in range(ranks) for index in range(rank, len(names), ranks)]
    return [name for _, name in sorted(zip(order, names, strict=True))]
