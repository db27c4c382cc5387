"""What every replica builds in its own process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from starlette.types import ASGIApp

from core_splitfuse.serving.loop import EngineLoop


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model to serve and the run to do it in; calling it builds them.

    Args:
        model: folder in the Hugging Face layout, absolute.
        name: what clients call it.
        settings: TOML file with settings.
        assignments: single settings.
        enable: plugins that may change the model.
        disable: plugins that are not looked at.
        everything_off: look at no plugin.
        max_body: bytes of a request at most.
        max_queue: answers that may wait for their first token.
        max_tokens_default: tokens of a chat's answer where the client does not say.
        stuck_after: seconds without a pass until the engine counts as stuck.
        tool_format: how the model writes calls of tools.
    """

    model: Path
    name: str
    settings: Path | None = None
    assignments: tuple[str, ...] = ()
    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    everything_off: bool = False
    max_body: int
    max_queue: int
    max_tokens_default: int
    stuck_after: float
    tool_format: str

    @classmethod
    def of(
        cls,
        ctx: click.Context,
        settings: Path | None,
        assignments: Sequence[str],
        enable: Sequence[str],
        **served: Any,
    ) -> Recipe:
        """Take over what a command was told, as ``core.cli.options.make_run`` understands it.

        Args:
            ctx: of the command.
            settings: TOML file with settings.
            assignments: single settings.
            enable: plugins that may change the model, besides those of the settings.
            served: the other fields.
        """
        from core.settings import gather, names

        root = ctx.find_root().params
        values = gather(settings, assignments=assignments)
        return cls(
            settings=None if settings is None else settings.resolve(),
            assignments=tuple(assignments),
            enable=(*names(values, "enable"), *enable),
            disable=(*names(values, "disable"), *root["no_plugin"]),
            everything_off=root["no_plugins"],
            **served,
        )

    def __call__(self) -> tuple[EngineLoop, ASGIApp]:
        from core.discovery import discover
        from core.distributed import Ranks
        from core.run import start
        from core_splitfuse.serving.app import create_app
        from core_splitfuse.serving.opening import open_model

        # Open for as long as the process lives.
        run = start(
            self.settings,
            set=self.assignments,
            enable=self.enable or None,
            quiet=True,
            plugins=discover(disabled=self.disable, everything_off=self.everything_off),
            ranks=Ranks(),
        )
        loop, served = open_model(
            run,
            self.model,
            name=self.name,
            max_waiting=self.max_queue,
            stuck_after=self.stuck_after,
            tool_format=self.tool_format,
        )
        app = create_app(
            loop, served, max_body=self.max_body, default_tokens=self.max_tokens_default
        )
        return loop, app
