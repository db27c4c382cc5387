"""A request that is being answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.engines import Request
from core.engines.sampling import Answer
from core.errors import EngineError
from core.positions.policy import ModelPositions, Positions
from core.positions.tokens import RequestState
from core_splitfuse.scheduling.sequence import Sequence

EXTRAS = ("priority", "deadline", "cache_salt", "atomic_prefill", "positions")
"""Names of ``request.extras`` that the engine understands."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a request may ask of this engine beyond the contract.

    Args:
        priority: higher ones are admitted first.
        deadline: seconds from now after which the request is cancelled.
        cache_salt: only requests with the same one share cached prefixes.
        atomic_prefill: compute the prompt in one pass, however long it is.
        positions: policy of positions of this request.
    """

    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""
    atomic_prefill: bool = False
    positions: Positions | None = None

    @classmethod
    def of(cls, given: Mapping[str, object]) -> Extras:
        """Check the extras of a request.

        Raises:
            EngineError: for a value of another type.
        """
        allowed: Mapping[str, tuple[type, ...]] = {
            "priority": (int,),
            "deadline": (int, float),
            "cache_salt": (str,),
            "atomic_prefill": (bool,),
            "positions": (Positions,),
        }
        for name, value in given.items():
            if value is not None and not isinstance(value, allowed[name]):
                kinds = " or ".join(kind.__name__ for kind in allowed[name])
                what = f"{name} must be {kinds}, not {type(value).__name__}"
                raise EngineError(what)
        known: dict[str, Any] = {name: v for name, v in given.items() if v is not None}
        return cls(**known)


@dataclass(eq=False)
class Active:
    """A request with its answer so far, and the sequence that stands for it in the scheduler.

    Args:
        request: what was asked.
        sequence: its tokens.
        extras: what it asks of this engine.
        expires: time at which it is cancelled, in seconds of a monotonic clock.
        policy: of positions, in force for it.
        followers: requests with the same prompt, which wait for it to be computed.
    """

    request: Request
    sequence: Sequence
    extras: Extras
    expires: float | None = None
    policy: Positions | None = None
    regime: tuple[int, ...] = ()
    state: RequestState = field(default_factory=RequestState)
    begun: set[int] = field(default_factory=set[int])
    followers: list[Active] = field(default_factory=list["Active"])
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.answer = Answer(self.request)

    @property
    def number(self) -> int:
        """The id that the engine gave out."""
        return self.sequence.id

    def twin_of(self, other: Active) -> bool:
        """Whether the prompt of another request is also the prompt of this one."""
        mine, its = self.sequence, other.sequence
        return (
            mine.salt == its.salt
            and mine.atomic == its.atomic
            and mine.priority == its.priority
            and self.extras.positions is other.extras.positions
            and mine.tokens == its.tokens
        )


def looks_at_prompts(policy: Positions | None) -> bool:
    """Whether a policy decides something by the prompt, so that nothing of it may be skipped."""
    if policy is None:
        return False
    return getattr(type(policy), "begin", None) is not ModelPositions.begin
