"""Notices when a server has stopped working, however long its queue is.

How long a request takes says nothing: it waits for its turn and then writes as much as it likes, so
a limit on that time would end the longest answers of a full server first. A server that works gives
a token to some request every fraction of a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from reopold_agent.errors import ServerStalledError

T = TypeVar("T")


class Watch:
    """The requests of one server, on its event loop.

    Args:
        clock: seconds on any scale.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running = 0
        self._latest = clock()

    async def noted(self, outputs: AsyncIterator[T]) -> AsyncIterator[T]:
        """Yields a request's outputs and notes when each arrives."""
        async for output in outputs:
            self._latest = self._clock()
            yield output

    async def run(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """Runs a request and returns its result.

        Args:
            work: reads its outputs through `noted`; being cancelled takes it out of the server.
            seconds: most seconds without an output of any request while some are running.

        Raises:
            ServerStalledError: that time has passed; the request has been cancelled by then.
        """
        if not self._running:
            self._latest = self._clock()
        self._running += 1
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                left = self._latest + seconds - self._clock()
                if left <= 0:
                    raise ServerStalledError(f"no request got a token for {seconds:g} s")
                await asyncio.wait([task], timeout=left)
            return task.result()
        finally:
            self._running -= 1
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
