"""Makes the policies of a run of the local engine: those that generate, learn and teach."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from reopold_agent.config import TrainConfig, ViewPixels, model_key
from reopold_agent.errors import ConfigError, MissingExtraError
from reopold_agent.objectives import Needs, Objective
from reopold_agent.policies.base import Closeable, Policy, TakesWeights
from reopold_agent.policies.batch import PassTokens
from reopold_agent.policies.loading import LoadedModel, Processing
from reopold_agent.policies.registry import POLICIES, TRANSFORMERS, is_trainers_own, make_policy
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.train.teachers import Teachers, TeacherSettings, run_teachers
from reopold_agent.train.vocabularies import teacher_chat


@dataclass
class Roles:
    """The policies of a run.

    Attributes:
        trainer: the student that learns, in this process.
        sampler: generates the student's episodes: the trainer itself, or a copy that gets its
            weights between two steps' episodes.
        teachers: score (and, for demonstrations, generate); empty for objectives without one.
    """

    trainer: TransformersPolicy
    sampler: Policy
    teachers: Teachers[Policy]

    @property
    def separate(self) -> bool:
        """Whether the sampler is a copy with separate weights."""
        return self.sampler is not self.trainer

    @property
    def teacher(self) -> Policy | None:
        """The teacher of all episodes; None with none, or with several."""
        return self.teachers.only

    @property
    def own_teachers(self) -> list[TransformersPolicy]:
        """The teachers that are models in this process, which give whole distributions."""
        return [each for each in self.teachers.distinct if isinstance(each, TransformersPolicy)]

    def release_teachers(self) -> None:
        """Gives a CPU's memory of the teachers' weights back while the student learns."""
        for teacher in self.own_teachers:
            teacher.adapter.release_weights()

    def take_passes(self) -> PassTokens:
        """Returns the tokens of the passes since the last call, of the models in this process."""
        total = PassTokens()
        for policy in (self.trainer, *self.own_teachers):
            total += policy.passes
            policy.passes = PassTokens()
        return total

    def teacher_of(self, env: str) -> Policy:
        """Returns the teacher of an environment.

        Raises:
            ConfigError: the run has none.
        """
        if not self.teachers.distinct:
            raise ConfigError("this run needs a teacher, but model.teacher is null")
        return self.teachers.named(env)

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
        for policy in (self.sampler, *self.teachers.distinct):
            if isinstance(policy, Closeable):
                policy.close()


def check_roles(config: TrainConfig, objective: Objective) -> None:
    """Checks that ``policy`` fits the rest of the run, before anything is loaded.

    Raises:
        UnknownNameError: there is no such kind of policy.
        ConfigError: this kind cannot do what the run needs; the message says what to set.
        MissingExtraError: its package is not installed.
    """
    student = config.policy.student
    teachers = run_teachers(config)
    policies = [each.policy for each in teachers] or [config.policy.teacher]
    for settings in (student, *policies):
        if not is_trainers_own(settings):
            package = POLICIES.get(settings["name"]).package
            if package is not None and find_spec(package) is None:
                raise MissingExtraError(package, package, f"policy {settings['name']}")
    if objective.needs & Needs.DEMONSTRATIONS and len(teachers) > 1:
        raise ConfigError(
            f"objective={config.objective['name']} learns from episodes that one teacher plays, "
            f"and model.teachers has {len(teachers)}.\nSet model.teachers=null and model.teacher, "
            "or another objective."
        )
    if not is_trainers_own(student) and config.engine.old_logp == "rollout":
        raise ConfigError(
            f"engine.old_logp=rollout needs entropies with the samples, and "
            f"policy.student.name={student['name']} gives none; use engine.old_logp=recompute "
            "(or auto)"
        )
    if config.engine.ahead:
        _check_ahead(config, objective)
    stops = {member.rollout.stop_at_tool_call for member in config.members.values()}
    for teacher in teachers:
        _check_aligned(teacher, config, objective)
        if is_trainers_own(teacher.policy):
            continue
        if len(stops) > 1 and config.evaluation.teacher and teacher.policy["name"] == "server":
            raise ConfigError(
                "a server ends all turns alike, but rollout.stop_at_tool_call differs between the "
                "environments of this run.\nSet it for all, or evaluation.teacher=false."
            )
        key = "policy.teacher"
        if teacher.names[0] in (config.policy.teachers or {}):
            key = f"policy.teachers.{teacher.names[0]}"
        if objective.needs & Needs.DISTRIBUTIONS:
            raise ConfigError(
                f"objective={config.objective['name']} compares whole distributions, which "
                f"{key}.name={teacher.policy['name']} does not give; use {key}.name={TRANSFORMERS}"
            )
        if teacher.model.follow is not None:
            raise ConfigError(
                "model.teacher.follow changes the teacher's weights in the run; use "
                f"{key}.name={TRANSFORMERS}"
            )


def _check_ahead(config: TrainConfig, objective: Objective) -> None:
    """Checks that generation can be ahead of the update."""
    if objective.needs & Needs.DEMONSTRATIONS:
        raise ConfigError(
            f"engine.ahead=1 generates the student's episodes early, and objective="
            f"{config.objective['name']} does not train on them.\nSet engine.ahead=0."
        )
    if config.engine.old_logp == "rollout":
        raise ConfigError(
            "engine.ahead=1 needs the log-probs of the weights before the update, and "
            "engine.old_logp=rollout takes those of older ones.\nSet engine.old_logp=recompute "
            "(or auto), or engine.ahead=0."
        )
    if config.policy.student.get("sleep"):
        raise ConfigError(
            "engine.ahead=1 generates while the trainer computes, and policy.student.sleep=true "
            "gives the sampler's memory back meanwhile.\nSet one of the two to its default."
        )


def _check_aligned(teacher: TeacherSettings, config: TrainConfig, objective: Objective) -> None:
    """Checks that the objective can use a teacher with another vocabulary, if this is one."""
    key = model_key(teacher.role, "align")
    reasons = {
        Needs.DISTRIBUTIONS: "compares whole distributions",
        Needs.DEMONSTRATIONS: "trains on tokens that the teacher writes",
        Needs.REFERENCE: "compares each token with a reference model",
    }
    reason = next((why for need, why in reasons.items() if need in objective.needs), None)
    if teacher.model.align is not None and reason is not None:
        raise ConfigError(
            f"objective={config.objective['name']} {reason}, and {key}={teacher.model.align} gives "
            "spans of tokens the teacher's log-probs only.\nChoose an objective that learns "
            f"from sampled tokens, such as reopold, or set {key}=null for one vocabulary."
        )


def make_roles(
    config: TrainConfig,
    chat: ChatRenderer,
    student: LoadedModel,
    teachers: Mapping[str, Processing],
) -> Roles:
    """Makes the policies, and gives the sampler the trainer's weights.

    Args:
        config: the run's configuration.
        chat: gives the ids that are forbidden and those that end a turn.
        student: the model that learns.
        teachers: by role (`run_teachers`); a `LoadedModel` if the teacher is in this process.

    Raises:
        ReopoldError: a policy cannot be made; processes that were started are ended.
    """
    trainer = own_policy(config, chat, student)
    roles = Roles(trainer, trainer, Teachers({}))
    try:
        if is_trainers_own(config.policy.student):
            if config.engine.ahead:
                roles.sampler = own_policy(config, chat, student, copied=True)
        else:
            roles.sampler = _made(config, "student", config.policy.student, chat, student)
            if not isinstance(roles.sampler, TakesWeights):
                raise ConfigError(
                    f"policy.student.name={config.policy.student['name']} cannot take the "
                    f"trainer's weights; use {TRANSFORMERS} or vllm"
                )
            roles.sync()
        made: dict[str, Policy] = {}
        for teacher in run_teachers(config) if teachers else ():
            model = teachers[teacher.role]
            own = chat if teacher.model.align is None else teacher_chat(config, model)
            if isinstance(model, LoadedModel):
                policy: Policy = own_policy(config, own, model)
            else:
                view = teacher.model.view.pixels
                policy = _made(config, "teacher", teacher.policy, own, model, view)
            made[teacher.role] = policy
            # At once, to be closed if another one fails.
            roles.teachers = Teachers.of_run(config, made)
    except BaseException:
        roles.close()
        raise
    return roles


def computing(policy: Policy) -> AbstractContextManager[Any]:
    """Returns the autocast context to enter once around many passes of a policy."""
    return policy.adapter.autocast() if isinstance(policy, TransformersPolicy) else nullcontext()


def own_policy(
    config: TrainConfig, chat: ChatRenderer, model: LoadedModel, *, copied: bool = False
) -> TransformersPolicy:
    """Returns the policy of a model in this process, or of a copy of it."""
    return model.policy(
        forbidden_ids=chat.forbidden_ids,
        stop_ids=chat.stop_ids,
        max_tokens_per_pass=config.engine.max_tokens_per_pass,
        copied=copied,
    )


def _made(
    config: TrainConfig,
    role: str,
    settings: Mapping[str, Any],
    chat: ChatRenderer,
    processing: Processing,
    view: ViewPixels | None = None,
) -> Policy:
    precision = config.engine.precision
    if precision == "auto":
        precision = "bfloat16" if torch.cuda.is_available() else "float32"
    return make_policy(
        role,
        settings,
        processing,
        dtype=precision,
        forbidden_ids=chat.forbidden_ids,
        stop_ids=chat.stop_ids,
        max_pixels=config.pixels.most(view),
        seed=config.seed,
    )
