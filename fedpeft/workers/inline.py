"""Work in this very process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fedpeft.workers.allocator import keep_freed_memory
from fedpeft.workers.base import InlineValue, Job, Result, Shared


class InlineWorkers:
    """No processes: `submit` returns when the work is done."""

    width = 1

    def __init__(self) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()

    def share(self, value: Any) -> Shared:
        """The value itself."""
        return InlineValue(value)

    def submit(self, function: Callable[..., Result], *args: Any) -> Job[Result]:
        """Run at once; an exception is kept in the job."""
        job: Job[Result] = Job(lambda job: None)
        try:
            job.finish(function(*args))
        except Exception as error:
            job.fail(error)
        return job

    def wait(self, jobs: Iterable[Job[Any]]) -> list[Job[Any]]:
        """All of them."""
        return list(jobs)

    def close(self) -> None:
        """Nothing to end."""

    def abort(self) -> None:
        """Nothing to end."""
