"""All replicas of a model: started, watched, asked and ended."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any

from starlette.types import Message

from core.errors import EngineError
from core_splitfuse.replicas.calls import Call
from core_splitfuse.replicas.replica import Build, Replica
from core_splitfuse.serving.loop import UnavailableError

APPLICATION = "core-splitfuse"
DEPLOYMENT = "replica"

_STORE = 256 * 2**20
"""Bytes of shared memory for what is on its way between processes."""

_ASKED_FOR = 5.0
"""Seconds that replicas may take to tell their figures."""


class LostReplicaError(UnavailableError):
    """The replica that was answering is gone."""


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """How replicas are run.

    Args:
        replicas: how many.
        threads: of each one.
        gpus: CUDA devices of each one.
        threshold: tokens that a replica may have more to compute than the least busy one, and still
            get the calls whose prompts it knows.
        health_every: seconds between two looks at a replica.
        health_timeout: seconds that it may take to answer them.
        patience: seconds that calls wait for a replica when none runs.
        grace: seconds that running answers may take when a replica is ended.
    """

    replicas: int = 2
    threads: int = 1
    gpus: float = 0
    threshold: int = 8192
    health_every: float = 2.0
    health_timeout: float = 30.0
    patience: float = 30.0
    grace: float = 60.0


def options_for(replicas: int, device: str, grace: float) -> FleetOptions:
    """Share a machine among replicas: its cores, or a CUDA device for each.

    Args:
        replicas: how many.
        device: kind of device that they run on, such as ``cpu``.
        grace: seconds that running answers may take when a replica is ended.
    """
    cores = len(os.sched_getaffinity(0))
    return FleetOptions(
        replicas=replicas,
        threads=max(1, cores // replicas),
        gpus=1 if device == "cuda" else 0,
        grace=grace,
    )


class Fleet:
    """Replicas of one model, run by Ray Serve.

    With ``RAY_ADDRESS`` in the environment they run in that cluster. Otherwise Ray is started on this
    machine and for it, with a token that nobody else knows, and ended with the fleet.

    Args:
        build: makes the engine's loop and the application, in every process.
        options: how they are run.

    Raises:
        EngineError: when Ray is missing, or the replicas do not start.

    Example::

        with Fleet(build, FleetOptions(replicas=2)) as fleet:
            async for messages in fleet.ask(call):
                print(messages)
    """

    def __init__(self, build: Build, options: FleetOptions) -> None:
        self.options = options
        self.draining = False
        self._open = 0
        self._ray, self._serve = _ray()
        with ExitStack() as undo:
            if _start(self._ray, options):
                undo.callback(self._ray.shutdown)
                undo.callback(self._serve.shutdown)
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            self._serve.start(http_options={"location": "NoServer"})
            undo.callback(self._serve.delete, APPLICATION)
            self._handle = self._deploy(build)
            self._undo = undo.pop_all()

    @property
    def idle(self) -> bool:
        """Whether no call is being answered."""
        return self._open == 0

    @property
    def problem(self) -> str:
        """Never anything: replicas are replaced when they cannot answer."""
        return ""

    def drain(self) -> None:
        """Take no more calls; those in flight go on."""
        self.draining = True

    @contextmanager
    def answering(self) -> Generator[None]:
        """Count a call as being answered.

        Raises:
            UnavailableError: when no more are taken.
        """
        if self.draining:
            raise UnavailableError("the server is shutting down")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def running(self) -> int:
        """How many replicas can answer."""
        states: Any = await asyncio.to_thread(self._states)
        return sum(count for state, count in states.items() if str(state).endswith("RUNNING"))

    async def figures(self) -> Sequence[tuple[str, bytes]]:
        """Names of the replicas, and what each one's ``/metrics`` tells, of those that answer."""
        asked = self._handle.broadcast("figures")
        try:
            found = await asked.results_async(timeout_s=_ASKED_FOR, return_exceptions=True)
        except TimeoutError:
            return []
        return [told for told in found if not isinstance(told, BaseException)]

    async def ask(self, call: Call) -> AsyncGenerator[list[Message]]:
        """Let a replica answer, whichever the router chooses.

        Raises:
            LostReplicaError: when it is gone before the answer has ended.
            UnavailableError: when there is none for a while.
        """
        answer = self._handle.options(stream=True, method_name="call").remote(call)
        try:
            waited_for = await self._first(answer)
            while waited_for is not None:
                yield waited_for
                waited_for = await anext(answer, None)
        except (self._ray.exceptions.RayError, self._serve.exceptions.RayServeException) as error:
            if isinstance(error, self._ray.exceptions.RayTaskError):
                raise
            why = "the call ends here, others are answered"
            raise LostReplicaError("the replica was lost", why=why) from error
        finally:
            answer.cancel()

    def close(self) -> None:
        """End all replicas, and Ray if it was started here."""
        self._undo.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _first(self, answer: Any) -> list[Message] | None:
        """What comes first, which may take long; but not when nobody works at it."""
        coming = asyncio.ensure_future(anext(answer, None))
        seen = time.monotonic()
        try:
            while not (await asyncio.wait({coming}, timeout=1.0))[0]:
                if await self.running():
                    seen = time.monotonic()
                elif time.monotonic() - seen > self.options.patience:
                    raise UnavailableError("no replica runs", why="new ones do not come up")
            messages: list[Message] | None = coming.result()
        finally:
            coming.cancel()
        return messages

    def _status(self) -> Any:
        application = self._serve.status().applications.get(APPLICATION)
        return application.deployments.get(DEPLOYMENT) if application else None

    def _states(self) -> Any:
        status = self._status()
        return status.replica_states if status else {}

    def _why(self) -> str:
        """What went wrong in a replica that did not start: the end of its traceback."""
        status = self._status()
        lines = str(status.message).strip().splitlines() if status else []
        return lines[-1] if lines else "Ray Serve does not tell"

    def _deploy(self, build: Build) -> Any:
        from core_splitfuse.replicas.router import PrefixRouter

        options = self.options
        config: Any = import_module("ray.serve.config")
        deployment = self._serve.deployment(
            Replica,
            name=DEPLOYMENT,
            num_replicas=options.replicas,
            # Engines keep queues of their own, and say when these are full.
            max_ongoing_requests=2**16,
            max_constructor_retry_count=1,
            ray_actor_options={"num_cpus": options.threads, "num_gpus": options.gpus},
            health_check_period_s=options.health_every,
            health_check_timeout_s=options.health_timeout,
            graceful_shutdown_timeout_s=options.grace,
            graceful_shutdown_wait_loop_s=0.5,
            request_router_config=config.RequestRouterConfig(
                request_router_class=PrefixRouter,
                request_router_kwargs={"threshold": options.threshold},
            ),
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        bound = deployment.bind(build, options.threads)
        try:
            return self._serve.run(bound, name=APPLICATION, route_prefix=None)
        except RuntimeError as error:
            raise EngineError("the replicas do not start", why=self._why()) from error


def _ray() -> tuple[Any, Any]:
    # All of it is read at the first import. Figures of use are not sent to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS"):
        # Or Ray listens on all addresses of the machine. Those of its servers that do so nevertheless
        # run what they are sent: they have to ask for a token, which only these processes know.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        return import_module("ray"), import_module("ray.serve")
    except ImportError as error:
        fix = "pip install 'core-splitfuse[ray]'"
        raise EngineError("several replicas need Ray Serve", why=str(error), fix=fix) from error


def _start(ray: Any, options: FleetOptions) -> bool:
    """Start Ray on this machine or connect to a cluster; whether it was started here."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "WARNING", "namespace": APPLICATION}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return False
    ray.init(
        address="local",
        num_cpus=options.replicas * options.threads + 1,
        object_store_memory=_STORE,
        include_dashboard=False,
        **quiet,
    )
    return True
