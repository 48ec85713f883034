"""Choice of an implementation: the best that can serve a call, or the one that is asked for.

Every operation has a truth in XLA, which serves everywhere. Alternatives stand before it and may refuse: for the
device, the dtype, a shape. A refusal is a sentence, so that the choice can be seen and tested.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from kvbm_jax.kernels import target

__all__ = ["Choice", "Implementation", "Operation"]

_LOG = logging.getLogger(__name__)

Implementation = Literal["xla", "mosaic_gpu", "tpu"]
"""Names of implementations; an operation may lack some."""

_DEVICES = {"mosaic_gpu": target.refusal}


@dataclass(frozen=True)
class Choice:
    """Which implementation serves a call, and why none that stands before it does."""

    implementation: Implementation
    refusals: MappingProxyType[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Operation[**P, R]:
    """One operation and what implements it.

    Args:
      truth: in XLA; its name is the operation's.
      alternatives: names of others, the best first. Each is a module beside the truth's, with a function of the same
        name and parameters, and `refusal` of the same parameters: why it cannot serve, or None. It is imported when
        its device is there.
    """

    def __init__(self, truth: Callable[P, R], alternatives: tuple[Implementation, ...] = ()) -> None:
        self.name = truth.__name__
        self.implementations: tuple[Implementation, ...] = (*alternatives, "xla")
        self._truth = truth
        self._package = truth.__module__.rpartition(".")[0]

    def choose(self, implementation: Implementation | None, /, *args: P.args, **kwargs: P.kwargs) -> Choice:
        """Returns what would serve a call with these arguments.

        Raises:
          NotImplementedError: the implementation that is asked for does not exist or refuses.
        """
        if implementation is None:
            return self._best(*args, **kwargs)
        if implementation not in self.implementations:
            raise NotImplementedError(
                f"{self.name} has no implementation {implementation!r}; there is {', '.join(self.implementations)} "
                "(or None to choose)"
            )
        if reason := self._refusal(implementation, *args, **kwargs):
            raise NotImplementedError(f"{implementation} cannot serve this {self.name}: {reason}; use None to choose")
        return Choice(implementation)

    def __call__(self, implementation: Implementation | None, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs what `choose` finds; raises as it does."""
        chosen = self.choose(implementation, *args, **kwargs).implementation
        run: Callable[P, R] = self._truth if chosen == "xla" else getattr(self._module(chosen), self.name)
        return run(*args, **kwargs)

    def _best(self, *args: P.args, **kwargs: P.kwargs) -> Choice:
        refusals: dict[str, str] = {}
        for implementation in self.implementations[:-1]:
            reason = self._refusal(implementation, *args, **kwargs)
            if reason is None:
                return Choice(implementation, MappingProxyType(refusals))
            refusals[implementation] = reason
            if _DEVICES[implementation]() is None:
                _say_once(self.name, implementation, reason)
        return Choice("xla", MappingProxyType(refusals))

    def _refusal(self, implementation: Implementation, *args: P.args, **kwargs: P.kwargs) -> str | None:
        if implementation == "xla":
            return None
        if reason := _DEVICES[implementation]() or target.axes_refusal((args, kwargs)):
            return reason
        reason = self._module(implementation).refusal(*args, **kwargs)
        return None if reason is None else str(reason)

    def _module(self, implementation: Implementation) -> Any:
        return importlib.import_module(f"{self._package}.{implementation}")


@functools.cache
def _say_once(operation: str, implementation: str, reason: str) -> None:
    _LOG.warning("%s runs in XLA: %s cannot serve it, for %s", operation, implementation, reason)
