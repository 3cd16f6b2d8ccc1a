"""Which of two ways a change goes: answered here under the lease, or decided by the satellite."""

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from dcsfs.fs.volume import Volume
from network.errors import PreconditionFailed

P = ParamSpec("P")
R = TypeVar("R")


class LeaseChanged(Exception):
    """The lease came or went while a change was prepared: it has to be begun again."""


class _TwoWays(Protocol):
    @property
    def volume(self) -> Volume:
        """Whose lease counts."""

    def check_writable(self) -> None:
        """Raise FsError on a read-only mount, and after its cache disk has failed."""

    @property
    def shared(self) -> object:
        """Has a method of the same name for each that is decorated."""


S = TypeVar("S", bound=_TwoWays)


def by_lease(
    alone: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Run the decorated method under the lease, and `shared`'s method of that name without."""

    @functools.wraps(alone)
    async def change(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        self.check_writable()
        while True:
            was_shared = self.volume.is_shared
            try:
                if not was_shared:
                    return await alone(self, *args, **kwargs)
                result: R = await getattr(self.shared, alone.__name__)(*args, **kwargs)
            except LeaseChanged:
                continue
            except PreconditionFailed:
                if was_shared == self.volume.is_shared:
                    raise
                continue  # the lease went, and with it what was known
            return result

    return change  # type: ignore[return-value]  # wraps() hides that the signature is the same
