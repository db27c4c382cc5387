"""All kinds of checkpoints that can be opened, and which one is at a path."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import CheckpointError, closest

if TYPE_CHECKING:
    from core_ucp.layout.rules import Rules
    from core_ucp.view.view import View

_DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What readers run into where a value is not of the kind that its program writes there."""


@dataclass(frozen=True)
class Source:
    """A kind of checkpoint.

    Attributes:
        name: what ``--from`` calls it.
        summary: one sentence.
        module: with ``detect(path)`` and ``open_view(path, rules)``; imported when it is needed.
        extends: name of the kind that this is a dialect of: what both recognise is of the dialect.
    """

    name: str
    summary: str
    module: str
    extends: str = ""

    def detect(self, path: Path) -> bool:
        """Whether a path holds this kind of checkpoint."""
        found: Callable[[Path], bool] = import_module(self.module).detect
        return found(path)

    def open(self, path: Path, rules: Rules | None = None) -> View:
        """Open a checkpoint of this kind.

        Raises:
            CheckpointError: when it is damaged or incomplete.
        """
        found: Callable[[Path, Rules | None], View] = import_module(self.module).open_view
        try:
            view = found(path, rules)
        except _DAMAGE as error:
            raise CheckpointError(
                f"{path} cannot be read as {self.name}",
                why=f"its files hold other values than {self.name} writes: {error!r}",
            ) from error
        if rules is None:
            return view
        from core_ucp.layout.seeing import seen

        return seen(view, rules)


_PACKAGE = "core_ucp.sources"
SOURCES = (
    Source("universal", "Universal folders.", f"{_PACKAGE}.universal"),
    Source("deepspeed", "DeepSpeed: ZeRO 0 to 3, AutoTP, pipelines, MoE.", f"{_PACKAGE}.deepspeed"),
    Source("megatron", "Megatron: torch_dist and mp_rank files.", f"{_PACKAGE}.megatron", "dcp"),
    Source("accelerate", "Folders of accelerate's save_state.", f"{_PACKAGE}.accelerate"),
    Source("ranks", "A torch.save per rank, as verl writes it.", f"{_PACKAGE}.ranks"),
    Source("torch-save", "One torch.save of a whole state.", f"{_PACKAGE}.full"),
    Source("torch-dcp", "Folders of DCP with plain values.", f"{_PACKAGE}.torch_dcp", "dcp"),
    Source("dcp", "Folders of torch.distributed.checkpoint.", f"{_PACKAGE}.dcp"),
    Source("safetensors", "Safetensors files of Hugging Face.", f"{_PACKAGE}.huggingface"),
)
"""In no order: what two recognise is of the one that extends the other."""


def named(name: str) -> Source | None:
    """The kind of a name, if there is one."""
    return next((source for source in SOURCES if source.name == name), None)


def open_checkpoint(
    path: str | os.PathLike[str], name: str = "auto", rules: Rules | None = None
) -> View:
    """Open whatever checkpoint is at a path.

    Args:
        path: file or folder.
        name: of its kind; ``auto`` finds it by looking.
        rules: how parameters are laid out, where the files do not say it.

    Raises:
        CheckpointError: when it is of no known kind, damaged, or incomplete.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if name != "auto":
        chosen = named(name)
        if chosen is None:
            known = [source.name for source in SOURCES]
            raise CheckpointError(
                f"no kind of checkpoint is called {name!r}",
                why=f"known: {', '.join(known)}{closest(name, known)}",
            )
        return chosen.open(path, rules)
    found = [source for source in SOURCES if source.detect(path)]
    extended = {source.extends for source in found}
    kinds = [source for source in found if source.name not in extended]
    if len(kinds) == 1:
        return kinds[0].open(path, rules)
    names = ", ".join(source.name for source in (kinds or SOURCES))
    state = f"looks like {names}" if kinds else "is of no known kind"
    fix = "name one with `--from`" if kinds else f"known: {names}"
    raise CheckpointError(f"{path} {state}", fix=fix)
