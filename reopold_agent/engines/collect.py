"""The trajectories of a step: the student's own, or an expert's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from reopold_agent.config import BatchConfig, TrainConfig
from reopold_agent.data.demonstrations import Demonstration, load_demonstrations
from reopold_agent.engines.data_order import DataOrder
from reopold_agent.engines.nonfinite import Suspects, unusable_outcome
from reopold_agent.engines.roles import computing
from reopold_agent.errors import ConfigError
from reopold_agent.objectives import SFT, Needs, Objective, Outcomes
from reopold_agent.policies.base import Policy
from reopold_agent.rollout.demonstrations import demonstrated
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner, RolloutStats
from reopold_agent.types import Sampling, Trajectory


@dataclass
class Collected:
    """The episodes of a step: all, those without an error, and those the update is made on.

    ``position`` is the number of task draws used so far.
    """

    position: int
    trajectories: list[Trajectory] = field(default_factory=list)
    usable: list[Trajectory] = field(default_factory=list)
    chosen: list[Trajectory] = field(default_factory=list)
    stats: RolloutStats = field(default_factory=RolloutStats)

    def drop(self, failed: Sequence[Trajectory]) -> None:
        """Takes out trajectories that cannot be learned from after all."""
        gone = {id(t) for t in failed}
        self.usable = [t for t in self.usable if id(t) not in gone]
        self.chosen = [t for t in self.chosen if id(t) not in gone]

    def add(self, fresh: Sequence[Trajectory], stats: RolloutStats) -> None:
        """Adds episodes and where their time went."""
        self.trajectories += fresh
        self.usable += [t for t in fresh if t.trainable]
        for name, value in vars(stats).items():
            setattr(self.stats, name, getattr(self.stats, name) + value)


class Collector:
    """Rolls out, or reads, what a step trains on, as the objective needs it.

    Args:
        config: the run's.
        objective: says who acts and which groups are informative.
        runner: plays episodes.
        student, teacher: who may act.
        tasks: number of training tasks.
        suspects: what to do about rewards that are no numbers.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        runner: RolloutRunner,
        student: Policy,
        teacher: Policy | None,
        tasks: int,
        suspects: Suspects,
    ) -> None:
        self.suspects = suspects
        self.config, self.objective, self.runner = config, objective, runner
        self.student, self.teacher = student, teacher
        self.sampling = Sampling(config.sampling.temperature, config.sampling.top_p)
        self._recorded: list[Demonstration] | None = None
        if objective.needs & Needs.DEMONSTRATIONS and not objective.needs & Needs.TEACHER:
            self._recorded = self._read()
            tasks = len(self._recorded)
        self.order = DataOrder(tasks, config.seed)

    @property
    def played(self) -> bool:
        """Whether trajectories come from the environment, which says how they ended."""
        return self._recorded is None

    @property
    def actor(self) -> str:
        """Whose tokens the trajectories hold: ``student``, ``teacher`` or ``recorded``."""
        if self._recorded is not None:
            return "recorded"
        return "teacher" if self.objective.needs & Needs.DEMONSTRATIONS else "student"

    def collect(
        self, step: int, position: int, on_done: Callable[[Trajectory], None] | None = None
    ) -> Collected:
        """The step's trajectories; draws go on at ``position``.

        ``on_done`` is called with each trajectory that is played, as its episode ends.

        Further prompts are rolled out while the objective finds too few groups informative.

        Raises:
            ConfigError: every episode ended in an environment error.
        """
        config, objective = self.config, self.objective
        collected = Collected(position)
        if self._recorded is not None:
            count = config.batch.prompts * config.batch.samples
            numbers = [self.order[position + k] for k in range(count)]
            drawn = [demonstrated(self._recorded[i], i, self.runner) for i in numbers]
            collected.position += count
            collected.add(drawn, RolloutStats())
            collected.chosen = collected.usable
            return collected
        policy = self._actor()
        for number in range(objective.roll_outs):
            drawn_tasks = [self.order[collected.position + k] for k in range(config.batch.prompts)]
            collected.position += config.batch.prompts
            episodes = step_episodes(drawn_tasks, config.batch.samples)
            seed = (config.seed, 1, step) if number == 0 else (config.seed, 1, step, number)
            with computing(policy):
                fresh = self.runner.run(policy, episodes, self.sampling, seed, on_done=on_done)
            collected.add(fresh, self.runner.stats)
            if not collected.usable:
                raise ConfigError(
                    f"step {step}: every episode of the batch ended in an error of the "
                    f"environment or the policy; the first was: "
                    f"{fresh[0].info.get('error', 'unknown')}"
                )
            self._check_outcomes(collected)
            collected.chosen = self._choose(collected.usable)
            self._check_outcomes(collected)  # now with advantages
            if len({t.index for t in collected.chosen}) >= config.batch.prompts:
                break
        return collected

    def _actor(self) -> Policy:
        if not self.objective.needs & Needs.DEMONSTRATIONS:
            return self.student
        if self.teacher is None:
            raise ConfigError("demonstrations by the teacher need model.teacher")
        return self.teacher

    def _check_outcomes(self, collected: Collected) -> None:
        """Leaves out episodes whose outcome is no number, where the objective learns from it."""
        if not self.objective.needs & Needs.OUTCOME:
            return
        pairs = [(t, unusable_outcome(t)) for t in collected.usable]
        findings = [(t, wrong) for t, wrong in pairs if wrong is not None]
        collected.drop(self.suspects.left_out(findings))

    def _choose(self, usable: list[Trajectory]) -> list[Trajectory]:
        """Those that the update is made on; with outcomes, their advantages are set."""
        objective = self.objective
        if isinstance(objective, SFT) and objective.only_successes:
            return [t for t in usable if t.success]
        if not objective.needs & Needs.OUTCOME:
            return usable
        outcomes = outcomes_of(usable)
        advantages = objective.advantages(outcomes).tolist()
        keep = objective.informative(outcomes).tolist()
        groups: dict[int, list[Trajectory]] = {}
        for trajectory, advantage, kept in zip(usable, advantages, keep, strict=True):
            trajectory.advantage = advantage
            if kept:
                groups.setdefault(trajectory.index, []).append(trajectory)
        whole = list(groups.values())[: self.config.batch.prompts]
        return [trajectory for group in whole for trajectory in group]

    def _read(self) -> list[Demonstration]:
        spec = self.config.data.demonstrations
        if spec is None:
            raise ConfigError(
                "objective.source=recorded needs data.demonstrations, for example "
                "'+data.demonstrations={path: expert.jsonl}'"
            )
        recorded = load_demonstrations(spec)
        for number, each in enumerate(recorded):
            # What is wrong with one is said before the first step. The result is not kept: the
            # pictures of some thousand conversations would fill the memory.
            demonstrated(each, number, self.runner)
        return recorded


def step_episodes(indices: Sequence[int], samples: int) -> list[EpisodeSpec]:
    """``samples`` episodes per drawn task. A task drawn twice in one step (few tasks, or the end
    of a pass) gets further samples of its group, not the same random draws again."""
    used: Counter[int] = Counter()
    episodes = []
    for index in indices:
        first = used[index]
        used[index] += samples
        episodes += [EpisodeSpec("train", index, first + k) for k in range(samples)]
    return episodes


def mini_batches(
    trajectories: Sequence[Trajectory], config: BatchConfig, seed: tuple[int, ...]
) -> list[list[Trajectory]]:
    """Whole groups per mini-batch, in a random order that the seed decides."""
    updates = config.prompts // config.mini_batch
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.index, []).append(trajectory)
    keys = list(groups)
    if updates > 1:
        keys = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
    parts = np.array_split(np.arange(len(keys)), updates)
    return [[t for i in part for t in groups[keys[i]]] for part in parts if len(part)]


def outcomes_of(trajectories: Sequence[Trajectory]) -> Outcomes:
    """How episodes ended, as objectives that compare them want it."""
    return Outcomes(
        reward=torch.tensor([t.reward for t in trajectories]),
        group=torch.tensor([t.index for t in trajectories]),
        tool_calls=torch.tensor([len(t.tool_calls) for t in trajectories]),
        tool_successes=torch.tensor([sum(c.ok for c in t.tool_calls) for t in trajectories]),
        tokens=torch.tensor([t.response_tokens for t in trajectories]),
    )
