"""Makes the policies of a run of the local engine: those that generate, learn and teach."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from reopold_agent.config import TrainConfig
from reopold_agent.errors import ConfigError, MissingExtraError
from reopold_agent.objectives import Needs, Objective
from reopold_agent.policies.base import Closeable, Policy, TakesWeights
from reopold_agent.policies.batch import PassTokens
from reopold_agent.policies.loading import LoadedModel, Processing
from reopold_agent.policies.registry import POLICIES, TRANSFORMERS, is_trainers_own, make_policy
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.rollout.chat import ChatRenderer


@dataclass
class Roles:
    """The policies of a run.

    Attributes:
        trainer: the student that learns, in this process.
        sampler: generates the student's episodes: the trainer itself, or a copy that is
            synchronised after every update.
        teacher: scores (and, for demonstrations, generates); None for objectives without one.
    """

    trainer: TransformersPolicy
    sampler: Policy
    teacher: Policy | None

    @property
    def separate(self) -> bool:
        """Whether the sampler is a copy with separate weights."""
        return self.sampler is not self.trainer

    @property
    def own_teacher(self) -> TransformersPolicy | None:
        """The teacher if it is a model in this process, which gives whole distributions."""
        return self.teacher if isinstance(self.teacher, TransformersPolicy) else None

    def take_passes(self) -> PassTokens:
        """Returns the tokens of the passes since the last call, of the models in this process."""
        total = PassTokens()
        for policy in (self.trainer, self.own_teacher):
            if policy is not None:
                total += policy.passes
                policy.passes = PassTokens()
        return total

    def required_teacher(self) -> Policy:
        """Returns the teacher.

        Raises:
            ConfigError: the run has none.
        """
        if self.teacher is None:
            raise ConfigError("this run needs a teacher, but model.teacher is null")
        return self.teacher

    def sync(self) -> None:
        """Gives the sampler the trainer's weights."""
        if isinstance(self.sampler, TakesWeights):
            self.sampler.wake()
            self.sampler.sync(self.trainer.adapter.model)

    def rest(self) -> None:
        """Lets the sampler release accelerator memory while the trainer computes."""
        if isinstance(self.sampler, TakesWeights):
            self.sampler.sleep()

    def wake(self) -> None:
        """Takes the sampler's memory again where its weights did not change."""
        if isinstance(self.sampler, TakesWeights):
            self.sampler.wake()

    def close(self) -> None:
        """Ends processes and connections."""
        for policy in (self.sampler, self.teacher):
            if isinstance(policy, Closeable):
                policy.close()


def check_roles(config: TrainConfig, objective: Objective) -> None:
    """Checks that ``policy`` fits the rest of the run, before anything is loaded.

    Raises:
        UnknownNameError: there is no such kind of policy.
        ConfigError: this kind cannot do what the run needs; the message says what to set.
        MissingExtraError: its package is not installed.
    """
    student, teacher = config.policy.student, config.policy.teacher
    for settings in (student, teacher):
        if not is_trainers_own(settings):
            package = POLICIES.get(settings["name"]).package
            if package is not None and find_spec(package) is None:
                raise MissingExtraError(package, package, f"policy {settings['name']}")
    if not is_trainers_own(student) and config.engine.old_logp == "rollout":
        raise ConfigError(
            f"engine.old_logp=rollout needs entropies with the samples, and "
            f"policy.student.name={student['name']} gives none; use engine.old_logp=recompute "
            "(or auto)"
        )
    if config.model.teacher is None or is_trainers_own(teacher):
        return
    if objective.needs & Needs.DISTRIBUTIONS:
        raise ConfigError(
            f"objective={config.objective['name']} compares whole distributions, which "
            f"policy.teacher.name={teacher['name']} does not give; use "
            f"policy.teacher.name={TRANSFORMERS}"
        )
    if config.model.teacher.follow is not None:
        raise ConfigError(
            "model.teacher.follow changes the teacher's weights in the run; use "
            f"policy.teacher.name={TRANSFORMERS}"
        )


def make_roles(
    config: TrainConfig, chat: ChatRenderer, student: LoadedModel, teacher: Processing | None
) -> Roles:
    """Makes the policies, and gives the sampler the trainer's weights.

    Args:
        config: the run's configuration.
        chat: gives the ids that are forbidden and those that end a turn.
        student: the model that learns.
        teacher: a `LoadedModel` if the teacher is in this process.

    Raises:
        ReopoldError: a policy cannot be made; processes that were started are ended.
    """
    trainer = _own(config, chat, student)
    roles = Roles(trainer, trainer, None)
    try:
        if not is_trainers_own(config.policy.student):
            roles.sampler = _made(config, "student", chat, student)
            if not isinstance(roles.sampler, TakesWeights):
                raise ConfigError(
                    f"policy.student.name={config.policy.student['name']} cannot take the "
                    f"trainer's weights; use {TRANSFORMERS} or vllm"
                )
            roles.sync()
        if isinstance(teacher, LoadedModel):
            roles.teacher = _own(config, chat, teacher)
        elif teacher is not None:
            roles.teacher = _made(config, "teacher", chat, teacher)
    except BaseException:
        roles.close()
        raise
    return roles


def computing(policy: Policy) -> AbstractContextManager[Any]:
    """Returns the autocast context to enter once around many passes of a policy."""
    return policy.adapter.autocast() if isinstance(policy, TransformersPolicy) else nullcontext()


def _own(config: TrainConfig, chat: ChatRenderer, model: LoadedModel) -> TransformersPolicy:
    return model.policy(
        forbidden_ids=chat.forbidden_ids,
        stop_ids=chat.stop_ids,
        max_tokens_per_pass=config.engine.max_tokens_per_pass,
    )


def _made(config: TrainConfig, role: str, chat: ChatRenderer, processing: Processing) -> Policy:
    precision = config.engine.precision
    if precision == "auto":
        precision = "bfloat16" if torch.cuda.is_available() else "float32"
    return make_policy(
        role,
        getattr(config.policy, role),
        processing,
        dtype=precision,
        forbidden_ids=chat.forbidden_ids,
        stop_ids=chat.stop_ids,
    )


def teacher_name(config: TrainConfig) -> str:
    """Returns the name of the run's teacher in messages."""
    path = "" if config.model.teacher is None else f", {config.model.teacher.path}"
    return f"{config.policy.teacher['name']}{path}"
