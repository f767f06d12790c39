"""Collects the rows of a step: episodes of the student, or those of an expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from reopold_agent.config import BatchConfig, TrainConfig
from reopold_agent.data.demonstrations import Demonstration, load_demonstrations
from reopold_agent.errors import ConfigError
from reopold_agent.objectives import SFT, Needs, Objective
from reopold_agent.policies.base import Policy
from reopold_agent.rollout.demonstrations import demonstrated
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner, RolloutStats
from reopold_agent.train.data_order import TaskOrder
from reopold_agent.train.nonfinite import invalid_outcome
from reopold_agent.train.roles import computing
from reopold_agent.train.rows import Row, StepBatch, set_advantages
from reopold_agent.types import Sampling, Trajectory


class Collector:
    """Plays the episodes of a step, or reads recorded ones, as the objective needs.

    Args:
        config: the run's configuration.
        objective: decides who plays and which groups are informative.
        runner: plays the episodes.
        student, teacher: policies that may play the episodes.
        tasks: number of training tasks of each environment.
        recorded: the expert's conversations (`read_demonstrations`), for objectives that train on
            them.

    Raises:
        DataError: a conversation does not fit the budgets, or has pictures that cannot be read.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        runner: RolloutRunner,
        student: Policy,
        teacher: Policy | None,
        tasks: Mapping[str, int],
        recorded: Sequence[Demonstration] | None = None,
    ) -> None:
        self.config, self.objective, self.runner = config, objective, runner
        self.student, self.teacher = student, teacher
        self.sampling = Sampling(config.sampling.temperature, config.sampling.top_p)
        self._recorded = recorded
        if recorded is not None:
            for number, each in enumerate(recorded):
                # Reports a bad demonstration before the first step. The trajectory is not kept,
                # because the pictures of thousands of conversations would fill the memory.
                demonstrated(each, number, runner)
            tasks = {"": len(recorded)}
        self.order = TaskOrder(tasks, config.seed, config.weights)

    @property
    def played(self) -> bool:
        """Whether episodes are played in the environment, so that their outcome is known."""
        return self._recorded is None

    @property
    def actor(self) -> str:
        """The source of the tokens: ``student``, ``teacher`` or ``recorded``."""
        if self._recorded is not None:
            return "recorded"
        return "teacher" if self.objective.needs & Needs.DEMONSTRATIONS else "student"

    def collect(
        self, step: int, position: int, on_done: Callable[[Row], None] | None = None
    ) -> StepBatch:
        """Collects the rows of a step.

        While the objective finds too few groups informative, further prompts are rolled out.

        Args:
            step: training step from 0.
            position: number of task draws used before.
            on_done: called with the row of each played episode as it ends.

        Raises:
            ConfigError: every episode ended in an environment error.
        """
        config, objective = self.config, self.objective
        batch = StepBatch(position)
        if self._recorded is not None:
            return self._read_rows(batch)
        for number in range(objective.max_rollout_rounds):
            tasks = [self.order[batch.position + k] for k in range(config.batch.prompts)]
            batch.position += config.batch.prompts
            episodes = step_episodes(tasks, config.batch.samples)
            seed = (config.seed, 1, step) if number == 0 else (config.seed, 1, step, number)
            batch.add(self.play(episodes, seed, on_done), self.runner.stats)
            if not batch.usable:
                error = str(batch.rows[0].trajectory.info.get("error", "unknown")).split("\n", 1)[0]
                raise ConfigError(
                    f"step {step}: every episode of the batch ended in an error of the "
                    f"environment or the policy; the first was: {error}\n"
                    "train.log has all of it; reopold play plays a task by hand (docs/play.md)."
                )
            self._drop_invalid_outcomes(batch)
            batch.chosen = self._choose(batch.usable)
            self._drop_invalid_outcomes(batch)  # again, because advantages are set now
            if len({row.trajectory.group for row in batch.chosen}) >= config.batch.prompts:
                break
        return batch

    def play(
        self,
        episodes: Sequence[EpisodeSpec],
        seed: tuple[int, ...],
        on_done: Callable[[Row], None] | None = None,
    ) -> list[Row]:
        """Plays episodes; returns their rows in the given order.

        Args:
            episodes: the episodes to play.
            seed: determines every random draw (`RolloutRunner.run`).
            on_done: called with the row of each episode as it ends.

        Raises:
            ConfigError: the teacher has to play, and there is none.
        """
        policy = self._actor()
        ended: dict[tuple[tuple[str, int], int], Row] = {}

        def make_row(trajectory: Trajectory) -> None:
            row = Row(trajectory)
            ended[trajectory.group, trajectory.sample] = row
            if on_done is not None:
                on_done(row)

        with computing(policy):
            played = self.runner.run(policy, episodes, self.sampling, seed, on_done=make_row)
        return [ended[t.group, t.sample] for t in played]

    def _read_rows(self, batch: StepBatch) -> StepBatch:
        assert self._recorded is not None
        count = self.config.batch.prompts * self.config.batch.samples
        numbers = [self.order[batch.position + k][1] for k in range(count)]
        rows = [Row(demonstrated(self._recorded[i], i, self.runner)) for i in numbers]
        batch.position += count
        batch.add(rows, RolloutStats())
        batch.chosen = batch.usable
        return batch

    def _actor(self) -> Policy:
        if not self.objective.needs & Needs.DEMONSTRATIONS:
            return self.student
        if self.teacher is None:
            raise ConfigError("demonstrations by the teacher need model.teacher")
        return self.teacher

    def _drop_invalid_outcomes(self, batch: StepBatch) -> None:
        """Drops episodes whose outcome is not finite, where the objective learns from outcomes."""
        if not self.objective.needs & Needs.OUTCOME:
            return
        checked = [(row, invalid_outcome(row.trajectory)) for row in batch.usable]
        invalid = [(row, why) for row, why in checked if why is not None]
        batch.invalid += invalid
        batch.drop([row for row, _ in invalid])

    def _choose(self, usable: list[Row]) -> list[Row]:
        """Returns the rows to update on; for objectives that need outcomes, sets advantages."""
        objective = self.objective
        if isinstance(objective, SFT) and objective.only_successes:
            return [row for row in usable if row.trajectory.success]
        if not objective.needs & Needs.OUTCOME:
            return usable
        groups: dict[tuple[str, int], list[Row]] = {}
        for row, informative in zip(usable, set_advantages(objective, usable), strict=True):
            if informative:
                groups.setdefault(row.trajectory.group, []).append(row)
        whole = list(groups.values())[: self.config.batch.prompts]
        return [row for group in whole for row in group]


def read_demonstrations(config: TrainConfig, objective: Objective) -> list[Demonstration] | None:
    """Returns the conversations that the objective trains on; None if it trains on played ones.

    Raises:
        ConfigError, DataError: they are not given, or cannot be read.
    """
    if not objective.needs & Needs.DEMONSTRATIONS or objective.needs & Needs.TEACHER:
        return None
    if config.mix is not None:
        raise ConfigError(
            "recorded demonstrations train in one environment, and this run has several.\n"
            f"Give one (env={next(iter(config.members))}), or another objective."
        )
    spec = config.data.specification("demonstrations")
    if spec is None:
        raise ConfigError(
            "objective.source=recorded needs data.demonstrations, for example "
            "'+data.demonstrations={path: expert.jsonl}'"
        )
    return load_demonstrations(spec)


def step_episodes(drawn: Sequence[tuple[str, int]], samples: int) -> list[EpisodeSpec]:
    """Returns ``samples`` episodes per drawn task, given by environment and index.

    A task drawn twice in one step (few tasks, or the end of a pass) gets further samples of its
    group, not the same random draws again.
    """
    used: Counter[tuple[str, int]] = Counter()
    episodes = []
    for task in drawn:
        first, (env, index) = used[task], task
        used[task] += samples
        episodes += [EpisodeSpec("train", index, first + k, env) for k in range(samples)]
    return episodes


def mini_batches(
    rows: Sequence[Row], config: BatchConfig, seed: tuple[int, ...]
) -> list[list[Row]]:
    """Splits rows into mini-batches of whole groups, in a random order that the seed determines."""
    updates = config.updates
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.trajectory.group, []).append(row)
    keys = list(groups)
    if updates > 1:
        keys = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
    parts = np.array_split(np.arange(len(keys)), updates)
    return [[row for i in part for row in groups[keys[i]]] for part in parts if len(part)]
