"""Signals that stop a command: Ctrl-C, and SIGTERM, with which clusters end jobs (SLURM, ...)."""

from __future__ import annotations

import signal
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from reopold_agent.errors import Terminated


def accept_sigint() -> None:
    """Makes SIGINT raise `KeyboardInterrupt` in a process that was started with it ignored.

    Shells start the background commands of a script that way, and Python then leaves SIGINT
    ignored: ``kill -INT`` would not stop a command. Only the main thread can set this.
    """
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_interrupt() -> None:
    """Tells Python that a `KeyboardInterrupt` was handled.

    CPython notes one that leaves code compiled from text, as when a dataclass is defined during an
    import. At its end ``python -m`` then kills itself with SIGINT, whatever status the program
    gave (``_Py_UnhandledKeyboardInterrupt``), unless more such code has run since.
    """
    namedtuple("_", ())  # made from text


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated` within the block; a second one ends the process at once.

    Only the main thread can handle signals; in another one the block just runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
