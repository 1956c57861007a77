"""What a place to run functions must offer, and a function that runs there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar, cast

Result = TypeVar("Result")


class Shared(Protocol):
    """A value that many tasks take, sent to each process once."""

    def get(self) -> Any:
        """The value."""
        ...


class InlineValue:
    """A shared value of this very process."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        """The value."""
        return self._value


class Job(Generic[Result]):
    """A submitted call and, once it is done, what became of it.

    Args:
        wait: blocks until this job is done.
    """

    def __init__(self, wait: Callable[[Job[Any]], object]) -> None:
        self._wait = wait
        self._result: Result | None = None
        self._error: Exception | None = None
        self.done = False

    def finish(self, result: Result) -> None:
        """The call returned."""
        self._result, self.done = result, True

    def fail(self, error: Exception) -> None:
        """The call raised."""
        self._error, self.done = error, True

    def exception(self) -> Exception | None:
        """What the call raised, if it did; waits for its end."""
        if not self.done:
            self._wait(self)
        return self._error

    def result(self) -> Result:
        """What the call returned; waits for its end.

        Raises:
            FederationError: the worker process died.
            Exception: what the call raised.
        """
        error = self.exception()
        if error is not None:
            raise error
        return cast(Result, self._result)


class Workers(Protocol):
    """A place to run functions. One thread at a time may use it."""

    @property
    def width(self) -> int:
        """How many run at a time."""
        ...

    def share(self, value: Any) -> Shared:
        """Prepare a value that several tasks take."""
        ...

    def submit(self, function: Callable[..., Result], *args: Any) -> Job[Result]:
        """Run ``function(*args)``; module-level functions and picklable arguments only."""
        ...

    def wait(self, jobs: Iterable[Job[Any]]) -> list[Job[Any]]:
        """Those of `jobs` that are done; blocks until one is. Empty if there are none."""
        ...

    def close(self) -> None:
        """Let running work finish and end the processes; nothing is left behind."""
        ...

    def abort(self) -> None:
        """End the processes now, whatever they are doing; nothing is left behind."""
        ...
