"""Asks on several threads and yields the replies as they arrive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator

from reopold_agent.judges.llm.base import JudgeReply, JudgeRequest

Ask = Callable[[JudgeRequest, threading.Event], JudgeReply]


def run_in_threads(
    ask: Ask, requests: Iterable[JudgeRequest], threads: int, *, ordered: bool
) -> Iterator[JudgeReply]:
    """Asks on up to ``threads`` threads and yields the replies.

    The caller's thread reads ``requests``, at most two per thread ahead of the replies that were
    taken (four if ordered, because one slow reply delays those after it). When the caller stops
    early, nothing more is sent; attempts in flight end by themselves.

    Raises:
        The first exception of ``ask`` or ``requests``; waiting requests are dropped.
    """
    jobs: queue.SimpleQueue[tuple[int, JudgeRequest] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, JudgeReply | BaseException]] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while (job := jobs.get()) is not None and not stop.is_set():
            try:
                done.put((job[0], ask(job[1], stop)))
            # Not suppressed: it is raised where the replies are taken.
            except BaseException as error:
                done.put((job[0], error))
                stop.set()  # afterwards, so that the caller gets this error, not its consequences

    workers: list[threading.Thread] = []
    ahead = threads * (4 if ordered else 2)
    waiting: dict[int, JudgeReply] = {}
    asked = given = 0
    source, more = iter(requests), True
    try:
        while True:
            # Stops reading when a reply is ready: a slow source must not delay it.
            while more and asked - given < ahead and done.empty():
                request = next(source, None)
                if request is None:
                    more = False
                    break
                jobs.put((asked, request))
                asked += 1
                if len(workers) < threads:
                    # A daemon, so that the program can end without waiting for a reply.
                    workers.append(threading.Thread(target=work, name="judge", daemon=True))
                    workers[-1].start()
            if given == asked and not more:
                return
            index, result = done.get()
            if isinstance(result, BaseException):
                raise result
            waiting[index] = result
            while waiting and (not ordered or given in waiting):
                yield waiting.pop(given if ordered else index)
                given += 1
    finally:
        stop.set()
        for _ in workers:
            jobs.put(None)
