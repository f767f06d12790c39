"""Generates the episodes of a step: when they are needed, or while the step before is trained.

With ``engine.ahead=1`` a step looks like this; W are the weights after so many updates::

    sampler   | episodes of step k+1 with W(k) ..................... | episodes of step k+2 with ...
    trainer   | step k: old log-probs W(k), scores, update to W(k+1) | step k+1: ...

`behaviour` corrects for the difference between the two, like that of any other sampler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reopold_agent.train.collect import Collector
from reopold_agent.train.roles import Roles
from reopold_agent.train.rows import Row, StepBatch
from reopold_agent.train.update import Updater

_CLOSE_SECONDS = 30.0
"""How long `RolloutsAhead.close` waits for a call of an environment that is still running."""


class Rollouts:
    """Generates each step's episodes with the weights that the step begins with.

    Args:
        collector: plays, or reads, the rows of a step.
        roles: the policies; the sampler gets the trainer's weights after every update.
        on_done: called with the row of each played episode as it ends.
    """

    def __init__(
        self, collector: Collector, roles: Roles, on_done: Callable[[Row], None] | None
    ) -> None:
        self._collector, self._roles, self._on_done = collector, roles, on_done

    def collect(self, step: int, position: int) -> StepBatch:
        """Returns the rows of a step, as `Collector.collect` does.

        Args:
            step: training step from 0.
            position: number of task draws used before the step.
        """
        return self._collector.collect(step, position, self._on_done)

    def before_update(self, step: int, position: int) -> None:
        """Prepares the sampler for the time in which the trainer computes.

        Args:
            step: training step from 0, whose rows have been collected.
            position: number of task draws used so far.
        """
        self._roles.rest()

    def after_update(self, changed: bool) -> None:
        """Gives the sampler the new weights; ``changed`` says whether there are any."""
        if changed:
            self._roles.sync()
        else:
            self._roles.wake()

    def use_current(self) -> None:
        """Gives the sampler the trainer's weights, if it has older ones, for an evaluation."""

    def state(self, step: int) -> dict[str, Any] | None:
        """Returns what a checkpoint before ``step`` needs to generate its episodes; None: nothing.

        It is made of numbers, strings and tensors on the CPU, as `torch.load` reads them safely.
        """
        return None

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint before ``step`` with its `state`."""

    def close(self) -> None:
        """Ends what is being generated."""


@dataclass(frozen=True)
class _Older:
    """The weights with which the episodes of a step are generated.

    Attributes:
        step: the step that trains on these episodes.
        updates: number of the run's updates that made them.
        weights: the trained weights by name, on the CPU.
    """

    step: int
    updates: int
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Pending:
    """Episodes that are being generated on ``thread`` with weights after ``updates`` updates."""

    thread: threading.Thread
    updates: int
    batch: Future[StepBatch]


class RolloutsAhead(Rollouts):
    """Generates the next step's episodes, on a thread, while this one's are scored and trained on.

    The sampler takes new weights between two steps' episodes, never during them.

    Args:
        collector, roles, on_done: as of `Rollouts`; ``on_done`` is called on the thread.
        updater: makes the updates.
        steps: of the run; the last one generates nothing more.
    """

    def __init__(
        self,
        collector: Collector,
        roles: Roles,
        on_done: Callable[[Row], None] | None,
        updater: Updater,
        steps: int,
    ) -> None:
        super().__init__(collector, roles, on_done)
        self._updater, self._steps = updater, steps
        self._pending: _Pending | None = None
        self._older: _Older | None = None
        self._outdated = False  # the sampler has not got the last update

    @property
    def _model(self) -> nn.Module:
        return self._roles.trainer.adapter.model

    def collect(self, step: int, position: int) -> StepBatch:
        """Returns the rows of a step, once they have been generated.

        Raises:
            BaseException: what was raised on the thread that generated them.
        """
        if self._pending is None:  # the first step of this process
            updates = self._updater.done
            if self._older is not None and self._older.step == step:
                with _weights(self._model, self._older.weights):
                    self._roles.sync()
                self._outdated, updates = True, self._older.updates
            else:
                self.use_current()
            self._pending = self._begin(step, position, updates)
        pending = self._pending
        batch = pending.batch.result()
        self._pending = None
        batch.staleness = self._updater.done - pending.updates
        return batch

    def before_update(self, step: int, position: int) -> None:
        """Begins to generate the next step's episodes with the weights before the update."""
        self.use_current()
        self._older = _Older(step + 1, self._updater.done, self._copied_weights())
        if step + 1 < self._steps:
            self._pending = self._begin(step + 1, position, self._updater.done)

    def after_update(self, changed: bool) -> None:
        """Remembers that the sampler's weights are old; it may be generating with them."""
        self._outdated = self._outdated or changed

    def use_current(self) -> None:
        """Waits until nothing is generated, and gives the sampler the trainer's weights."""
        if self._pending is not None:
            self._pending.thread.join()  # an error is raised where its step begins
        if self._outdated:
            self._roles.sync()
            self._outdated = False

    def state(self, step: int) -> dict[str, Any] | None:
        """Returns the older weights with which the episodes of ``step`` are generated.

        None for a step that failed: its episodes are generated again, with its own weights.
        """
        older = self._older
        if older is None or older.step != step:
            return None
        return {"updates": older.updates, "weights": dict(older.weights)}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Generates the episodes of ``step`` again, with the older weights."""
        self._older = _Older(step, int(state["updates"]), dict(state["weights"]))

    def close(self) -> None:
        """Stops the thread; what it generates is dropped."""
        if self._pending is not None:
            self._collector.runner.cancel()
            self._pending.thread.join(_CLOSE_SECONDS)

    def _begin(self, step: int, position: int, updates: int) -> _Pending:
        batch: Future[StepBatch] = Future()

        def collect() -> None:
            try:
                batch.set_result(self._collector.collect(step, position, self._on_done))
            # Whatever it is, the main thread raises it.
            except BaseException as error:
                batch.set_exception(error)

        # A daemon: an environment that hangs must not keep the process from ending.
        thread = threading.Thread(target=collect, daemon=True, name="reopold-ahead")
        thread.start()
        return _Pending(thread, updates, batch)

    def _copied_weights(self) -> dict[str, Tensor]:
        """Copies the trained weights to the CPU, over an older copy if there is one."""
        before = {} if self._older is None else self._older.weights
        copied = {}
        for name, weight in _trained(self._model):
            held = before.get(name)
            value = weight.detach()
            copied[name] = value.to("cpu", copy=True) if held is None else held.copy_(value)
        return copied


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, each) for name, each in model.named_parameters() if each.requires_grad)


@contextmanager
def _weights(model: nn.Module, others: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives a model other trained weights for the time of the block."""
    own = {name: each.detach().to("cpu", copy=True) for name, each in _trained(model)}
    _set(model, others)
    try:
        yield
    finally:
        _set(model, own)


@torch.no_grad()
def _set(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, each in _trained(model):
        each.copy_(weights[name])
