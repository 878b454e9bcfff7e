"""How an operation chooses one of its implementations: one rule for all operations.

A config may name an implementation (`kernels.attention=splash`). If it cannot serve, an error says why and lists those
that can. "auto" takes the first of the platform's preferred ones that can serve; if it is not the first, the log says
once why, and what it costs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from model.kernels import backend

_log = logging.getLogger(__name__)


class Request(Protocol):
    """What an implementation reads to decide whether it can serve."""

    @property
    def backend(self) -> backend.Backend: ...


@dataclasses.dataclass(frozen=True)
class Platform:
    """A request for an operation with implementations that differ only by platform."""

    backend: backend.Backend


R = TypeVar("R", bound=Request, contravariant=True)


def serves_all(request: Request) -> str | None:
    """The refusal of an implementation that can serve every request."""
    return None


@dataclasses.dataclass(frozen=True)
class Implementation(Generic[R]):
    """One way to compute an operation."""

    platforms: tuple[str, ...]  # back ends that it runs on; an interpreted kernel runs on all
    run: Callable[..., Any]
    refusal: Callable[[R], str | None] = serves_all  # why it can't serve, as a clause: "it has no sinks"
    drawback: Callable[[R], str | None] = serves_all  # why "auto" prefers the next one
    cost: str = ""  # what it costs as a fallback, as a sentence; the log then warns


@dataclasses.dataclass(frozen=True)
class Operation(Generic[R]):
    """The implementations of an operation by name, and those that each platform prefers."""

    name: str  # the field of `backend.Kernels` that names an implementation
    implementations: Mapping[str, Implementation[R]]
    preferred: Mapping[str, tuple[str, ...]]  # by back end; "cpu": for "plain" on a CPU

    def choose(self, request: R) -> Implementation[R]:
        """The implementation that the config names, or the platform's.

        Raises:
          ValueError: the named one is unknown or cannot serve this request.
        """
        return self.implementations[self.chosen_name(request)]

    def require_plain(self, reason: str) -> None:
        """For a caller that computes the plain form itself: an error if the config names an implementation.

        Raises:
          ValueError: the config names one that is unknown or not plain; `reason` says why it can't serve, as a clause.
        """
        named = getattr(backend.kernels(), self.name)
        if named in ("auto", "plain"):
            return
        self._check_known(named)
        raise ValueError(f"kernels.{self.name}={named!r} can't serve this: {reason}. These can: plain.")

    def chosen_name(self, request: R) -> str:
        """The name of the implementation that `choose` returns."""
        named = getattr(backend.kernels(), self.name)
        if named == "auto":
            return self._automatic(request)
        self._check_known(named)
        if reason := self._refusal(named, request):
            can = ", ".join(name for name in self.implementations if self._refusal(name, request) is None)
            raise ValueError(f"kernels.{self.name}={named!r} can't serve this: {reason}. These can: {can}.")
        return named

    def _check_known(self, named: str) -> None:
        if named not in self.implementations:
            known = ", ".join(("auto", *self.implementations))
            raise ValueError(f"kernels.{self.name}={named!r} is not one of {known}.")

    def _automatic(self, request: R) -> str:
        platform = "cpu" if backend.for_cpu() and "cpu" in self.preferred else request.backend.name
        names, reasons = self.preferred[platform], {}
        for name in names:
            refused = self._refusal(name, request)
            reason = refused or self.implementations[name].drawback(request)
            if reason is None:
                if reasons:
                    said(self.name, name, *reasons[names[0]], self.implementations[name].cost)
                return name
            reasons[name] = f"{name!r} can't serve" if refused else f"{name!r} is passed over", reason
        why = "; ".join(f"{name!r}: {reason}" for name, (_, reason) in reasons.items())
        raise ValueError(f"no implementation of {self.name} can serve this on {request.backend.name}. {why}.")

    def _refusal(self, name: str, request: R) -> str | None:
        implementation, chosen = self.implementations[name], request.backend
        if chosen.name not in implementation.platforms and not chosen.interpret:
            platforms = " and ".join(implementation.platforms)
            return f"it runs on {platforms}, and kernels here are for {chosen.name}"
        return implementation.refusal(request)


@functools.cache
def said(operation: str, taken: str, what: str, reason: str, cost: str) -> None:
    """Logs once that an implementation runs instead of another."""
    level, costs = (logging.WARNING, " " + cost) if cost else (logging.INFO, "")
    _log.log(level, "kernels.%s: %r runs, since %s: %s.%s", operation, taken, what, reason, costs)
