"""What plugins contribute: frozen dataclasses yielded by the hooks.

Contributions are plain data with functions in them. They must pickle (no lambdas), because spawned
workers discover plugins again and compare what they find. torch is a name for type checkers here:
importing this module never imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.checkpoint.planner import SavePlanner
    from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

    from core.engines import Engine
    from core.run import Run
    from core.storage import ByteSink, ByteSource

T = TypeVar("T")


class Settings:
    """Base of settings dataclasses; a plugin's section in the settings file is its own name.

    Subclasses are frozen, keyword-only dataclasses. Constraints are ``Annotated`` with the marks of
    ``annotated_types``; the docstring under a field is its documentation.

    Example:
        >>> from dataclasses import dataclass
        >>> from typing import Annotated
        >>> from annotated_types import Ge, Le
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Fp(Settings):
        ...     bits: Annotated[int, Ge(4), Le(8)] = 6
        ...     '''Bits per weight.'''
        >>> Fp().bits
        6
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }


@dataclass(frozen=True)
class Stage(Generic[T]):
    """A point of a run at which enabled transforms are chained over one subject of type ``T``.

    Stages compare by name; third parties may make new ones.
    """

    name: str
    once: bool = True  # is it a mistake to apply a transform twice to one subject?


class Phase(IntEnum):
    """Coarse order of transforms inside one stage; lower runs first."""

    STRUCTURE = 10
    KERNEL = 20
    PRECISION = 30
    PARALLEL = 40
    COMPILE = 50


MODEL: Stage[nn.Module] = Stage("model")
"""The model after its weights are loaded and before the optimizer is built."""

BATCH: Stage[MutableMapping[str, Tensor]] = Stage("batch", once=False)
"""One batch of named tensors, before it goes to the device."""

PIPELINE: Stage[Any] = Stage("pipeline")
"""A diffusers pipeline, before its first step."""


@dataclass(frozen=True, kw_only=True)
class Transform(Generic[T]):
    """A change that an enabled plugin makes to the subject of a stage.

    Args:
        stage: where it runs; fixes the type of the subject.
        name: short name, unique in its plugin; the id is ``plugin.name``.
        apply: takes the subject and the run, returns the subject or its replacement.
        phase: coarse order among strangers.
        claims: exclusive slots it takes, such as ``attention``, ``positions``, ``linear``,
            ``mlp``, ``loss``, ``embedding``. Two claimants of one slot are an error.
        after: ids (or unique short names) that must run earlier, where they are in the plan.
        before: ids (or unique short names) that must run later.
    """

    stage: Stage[T]
    name: str
    apply: Callable[[T, Run], T]
    phase: Phase = Phase.STRUCTURE
    claims: frozenset[str] = frozenset()
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


def always_works(subject: object) -> str:
    """Give no reason against ``subject``: the default of every ``works`` field."""
    return ""


Progress = Callable[[str, int], None]
"""Called, from any thread, with what is being converted and with its bytes."""


class Converter(Protocol):
    """A conversion of one checkpoint, planned and checked."""

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are written."""
        ...

    @property
    def skipped(self) -> Sequence[str]:
        """Names of entries that are left out."""
        ...

    @property
    def remarks(self) -> Sequence[str]:
        """What the user should know of the result."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Further facts for a dry run, as JSON."""
        ...

    def write(self, folder: Path, progress: Progress) -> None:
        """Make the checkpoint in an empty folder, which core makes visible afterwards.

        Raises:
            CheckpointError: when reading or writing fails.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint says of itself beside its tensors.

    Args:
        step: optimizer steps done.
        values: plain values by name: ``optim.param_groups.<parameter>.lr``, ``scheduler``, ...
    """

    step: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """A checkpoint layout on disk, as DCP readers and writers.

    A converter is the reader of one format and the writer of another, so a new format is readable
    into and from all others at once.

    Example::

        def is_mine(path):
            return (path / "mine.json").is_file()

        def read(path, run):
            return MyReader(run.checkpoints.storage(path).value.source(path))

        yield CheckpointFormat(
            name="mine", summary="Checkpoints of my cluster.", detect=is_mine, reader=read
        )

    From then on ``core convert DIR OUT --to dcp`` reads such folders, and so does ``run.load``.

    Args:
        name: what ``checkpoint.format`` and ``core convert --to`` call it.
        summary: one sentence.
        detect: whether a path holds this format; fast, and false on everybody else's files.
        reader: opens a path for reading, or ``None`` when the format is only written.
        writer: opens a folder for writing, or ``None`` when runs cannot save in it. It must work
            under any planner. One that also is a DCP ``AsyncStager`` stages for itself.
        planner: plans which rank writes what; DCP's default unless given.
        preference: ``checkpoint.format = "auto"`` takes the highest that works; None: only by name.
        works: why it cannot be used for checkpoints in this folder, or an empty string.
        extends: name of the format that this is a dialect of, whose reader reads it too. What both
            recognise is of the dialect.
        convert: plans how a checkpoint that another format (or this one) reads becomes one of this
            format; takes the place of ``writer`` in ``core convert``. A CheckpointError refuses it.
        describe: step and plain values of a checkpoint that was not saved by a run of core. Its
            model is ``model.``, its optimizers are ``optim.`` then, as in torch's own state dicts.
        heeds_rules: whether reader and description heed ``checkpoint.rules``. Where they do not, the
            setting is refused instead of being ignored.
    """

    name: str
    summary: str
    detect: Callable[[Path], bool]
    reader: Callable[[Path, Run], StorageReader] | None = None
    writer: Callable[[Path, Run], StorageWriter] | None = None
    planner: Callable[[Run], SavePlanner] | None = None
    preference: int | None = None
    works: Callable[[Path], str] = always_works
    extends: str = ""
    convert: Callable[[Path, CheckpointFormat, Run], Converter] | None = None
    describe: Callable[[Path, Run], Description] | None = None
    heeds_rules: bool = False


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A way to move bytes between memory and a folder: the carrier below checkpoint writers.

    See :class:`core.storage.ByteSink` and :class:`core.storage.ByteSource`.

    Args:
        name: what ``checkpoint.storage`` calls it.
        summary: one sentence.
        sink: opens a folder for writing, which is created if needed; every rank opens one.
        source: opens an existing folder or file for reading.
        preference: ``checkpoint.storage = "auto"`` takes the highest that works.
        works: why it cannot be used on this disk, or an empty string.
    """

    name: str
    summary: str
    sink: Callable[[Path], ByteSink]
    source: Callable[[Path], ByteSource]
    preference: int | None = None
    works: Callable[[Path], str] = always_works


@dataclass(frozen=True, kw_only=True)
class EngineType:
    """An inference engine that can be built on a live model.

    Args:
        name: what ``engine.name`` calls it.
        summary: one sentence.
        build: makes an engine on the module itself, copying no parameter; an EngineError refuses it.
        preference: ``engine.name = "auto"`` takes the highest that works and does not refuse.
        works: why it cannot serve this model, or an empty string.
    """

    name: str
    summary: str
    build: Callable[[nn.Module, Run], Engine]
    preference: int | None = None
    works: Callable[[nn.Module], str] = always_works


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A family of models with named presets, built with fresh weights.

    Args:
        name: what ``train.model = "family:preset"`` calls it.
        summary: one sentence.
        presets: names of the presets.
        build: makes the model of a preset; ``overrides`` are configuration fields to replace.
    """

    name: str
    summary: str
    presets: tuple[str, ...]
    build: Callable[[str, Mapping[str, Any]], nn.Module]


@dataclass(frozen=True, kw_only=True)
class ParameterRules:
    """How the parameters of a model are cut, fused and padded where checkpoints do not say it.

    A plugin that reads foreign checkpoints documents the content; the settings call it by name.

    Args:
        name: what ``checkpoint.rules`` calls it.
        summary: one sentence.
        tables: makes the content of a rules file, as ``tomllib`` would parse it.
    """

    name: str
    summary: str
    tables: Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A pipeline that ``core run NAME`` executes.

    Args:
        name: what the command line calls it.
        summary: one sentence.
        main: runs it and returns named results for the closing table.
    """

    name: str
    summary: str
    main: Callable[[Run], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a recipe's closing table: what a step did, against the plain way.

    Args:
        what: what was measured.
        plain: the figure without the plugin, in the same run; empty where there is none.
        ours: the figure with it.
        note: conditions or remarks.
    """

    what: str
    ours: str
    plain: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that an installed plugin adds to another package's recipe.

    Args:
        recipe: name of the recipe it belongs to, such as ``quickstart``.
        name: short name of the step, shown while it runs.
        summary: one sentence.
        main: does the work on the recipe's own subject and returns rows for its closing table.
        order: steps run in ascending order; equal ones by plugin name.
    """

    recipe: str
    name: str
    summary: str
    main: Callable[[Run, Any], Iterable[Row]]
    order: int = 50


Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One result of a probe.

    Args:
        name: what was looked at.
        status: ``fail`` makes ``core doctor`` exit with 1.
        value: the figure or finding.
        unit: unit of ``value``; a ratio has the unit ``x``.
        limit: what the value is held against.
        advice: what to do about it.
    """

    name: str
    status: Status
    value: float | str = ""
    unit: str = ""
    limit: str = ""
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A check of this machine (fast: ``core doctor``) or a benchmark (slow: ``core bench``)."""

    name: str
    summary: str
    measure: Callable[[Run], Iterable[Reading]]
    slow: bool = False


CheckpointContribution = CheckpointFormat | Storage
ModelContribution = ModelFamily | ParameterRules
RecipeContribution = Recipe | Step
