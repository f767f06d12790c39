"""A vLLM engine driven by one thread of this process; the model runs in separate processes.

Callers on any thread submit jobs and are notified when one has ended, so a trainer can generate
with one engine while another scores. The callers ask whether the engine has stalled, so that none
waits for one that hangs; the time of a request is not limited, since it may wait in the queue.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

from reopold_agent.errors import MissingExtraError, ModelError, ModelServerError
from reopold_agent.policies.vllm.settings import VllmSettings, start_environment

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One request to the engine.

    Attributes:
        prompt: vLLM's ``TokensPrompt`` as a dictionary.
        parameters: vLLM's ``SamplingParams``.
        ended: called on the engine's thread once ``output`` or ``error`` is set.
        output: vLLM's ``RequestOutput``.
        error: why there is no output.
    """

    prompt: Mapping[str, Any]
    parameters: Any
    ended: Callable[[Job], None]
    output: Any = None
    error: str | None = None


class VllmEngine:
    """Starts a vLLM engine and drives its step loop on a daemon thread.

    Args:
        name: ``student`` or ``teacher``, for messages.
        arguments: keyword arguments of `vllm.EngineArgs`.
        settings: time limits and the environment.
        make: makes the engine; tests pass a fake one.

    Raises:
        MissingExtraError: vLLM is not installed.
        ModelError: the engine did not start; the message gives vLLM's reason.
    """

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        settings: VllmSettings,
        *,
        make: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        self.name = name
        self._commands: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._numbers = itertools.count()
        self.broken: str | None = None
        """Why the engine can no longer be used; None while it works."""
        self._progress = time.monotonic()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._serve,
            args=(make or make_engine, dict(arguments), settings, started),
            name=f"vllm-{name}",
            daemon=True,
        )
        self._thread.start()
        try:
            started.result(settings.start_seconds)
        except FutureTimeoutError as error:
            self._commands.put(None)  # ends the engine if it still starts later
            raise ModelError(
                f"the {name}'s vLLM engine did not start within {settings.start_seconds:g} s"
            ) from error

    @property
    def idle_seconds(self) -> float:
        """Seconds since vLLM last made a step for its requests; 0 while there are none."""
        return time.monotonic() - self._progress if self._jobs else 0.0

    def start(self, job: Job) -> None:
        """Submits a job to the engine and returns at once."""
        self._commands.put(lambda engine: self._add(engine, job))

    def abort(self, job: Job) -> None:
        """Cancels a job; its ``ended`` is no longer called."""
        self._commands.put(lambda engine: self._remove(engine, job))

    def call(self, function: Callable[[Any], T], seconds: float, what: str) -> T:
        """Runs ``function(engine)`` on the engine's thread and returns what it returns.

        Args:
            function: gets vLLM's ``LLMEngine``.
            seconds: time limit.
            what: description of the call, for messages.

        Raises:
            ModelServerError: the call failed or took too long.
        """
        future: Future[T] = Future()

        def run(engine: Any) -> None:
            try:
                if self.broken is not None:
                    raise ModelServerError(self.broken)
                future.set_result(function(engine))
            # vLLM may raise anything; the caller gets it.
            except Exception as error:
                future.set_exception(error)

        self._commands.put(run)
        try:
            return future.result(seconds)
        except FutureTimeoutError as error:
            raise ModelServerError(
                f"{what} in the {self.name}'s vLLM engine took more than {seconds:g} s"
            ) from error
        except ModelServerError:
            raise
        except Exception as error:
            raise ModelServerError(
                f"{what} in the {self.name}'s vLLM engine failed: {type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """Ends the engine and its processes."""
        self._commands.put(None)
        self._thread.join(timeout=30.0)
        if self._thread.is_alive():
            _log.error("the %s's vLLM engine did not end within 30 s", self.name)

    # On the engine's thread

    def _serve(
        self,
        make: Callable[[Mapping[str, Any]], Any],
        arguments: Mapping[str, Any],
        settings: VllmSettings,
        started: Future[None],
    ) -> None:
        try:
            with start_environment(settings):
                engine = make(arguments)
        except MissingExtraError as error:
            started.set_exception(error)
            return
        # vLLM's own errors come in many kinds, and its process may end for any reason.
        except (Exception, SystemExit) as error:
            failure = ModelError(
                f"the {self.name}'s vLLM engine did not start: {type(error).__name__}: {error}"
            )
            failure.__cause__ = error
            started.set_exception(failure)
            return
        started.set_result(None)
        try:
            while self._run_commands(engine):
                if self._jobs:
                    self._step(engine)
        finally:
            engine.engine_core.shutdown()

    def _run_commands(self, engine: Any) -> bool:
        """Runs pending commands, waiting for one if no job runs; returns False to stop."""
        while True:
            try:
                command = self._commands.get(block=not self._jobs)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(engine)

    def _add(self, engine: Any, job: Job) -> None:
        if self.broken is not None:
            return self._end(job, error=self.broken)
        name = f"{self.name}-{next(self._numbers)}"
        try:
            engine.add_request(name, job.prompt, job.parameters)
        # vLLM rejected the request (too long, bad picture), or its process has died.
        except Exception as error:
            return self._end(job, error=f"{type(error).__name__}: {error}")
        if not self._jobs:
            self._progress = time.monotonic()
        self._jobs[name] = job
        return None

    def _remove(self, engine: Any, job: Job) -> None:
        names = [name for name, each in self._jobs.items() if each is job]
        for name in names:
            del self._jobs[name]
        if names and self.broken is None:
            engine.abort_request(names)

    def _step(self, engine: Any) -> None:
        try:
            outputs = engine.step()
        # The engine's process died or its loop failed; no job in flight will be answered.
        except Exception as error:
            self.broken = f"the vLLM engine has failed: {type(error).__name__}: {error}"
            _log.exception("the %s's vLLM engine failed", self.name)
            for job in list(self._jobs.values()):
                self._end(job, error=self.broken)
            self._jobs.clear()
            return
        self._progress = time.monotonic()  # a step waits until the model has computed a token
        for output in outputs:
            if output.finished and output.request_id in self._jobs:
                self._end(self._jobs.pop(output.request_id), output=output)

    @staticmethod
    def _end(job: Job, *, output: Any = None, error: str | None = None) -> None:
        job.output, job.error = output, error
        job.ended(job)


def make_engine(arguments: Mapping[str, Any]) -> Any:
    """Starts a `vllm.LLMEngine` whose model runs in a separate process.

    Raises:
        MissingExtraError: vLLM is not installed.
    """
    try:
        from vllm import EngineArgs, LLMEngine
    except ImportError as error:
        raise MissingExtraError("vllm", "vllm", "policy=vllm") from error
    return LLMEngine.from_engine_args(EngineArgs(**arguments), enable_multiprocessing=True)
