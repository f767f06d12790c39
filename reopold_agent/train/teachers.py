"""Says which of a run's teachers teaches which episode.

With ``model.teacher`` there is one. With ``model.teachers`` there is one for each environment, or
with ``model.teacher_key`` the one that a task names; some of them may be the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from reopold_agent.config import DEFAULT_TEACHER, TeacherConfig, TrainConfig, teacher_name
from reopold_agent.errors import ConfigError

if TYPE_CHECKING:
    from reopold_agent.rollout.runner import EpisodeSpec
    from reopold_agent.types import Task, Trajectory

T = TypeVar("T")


@dataclass(frozen=True)
class TeacherSettings:
    """One teacher of a run, for all of its names.

    Attributes:
        names: those in ``model.teachers``; only `DEFAULT_TEACHER` for ``model.teacher``.
        role: what messages call it: ``teacher``, and ``teacher NAME`` where there are several.
        model: its checkpoint.
        policy: its kind of policy, with that kind's settings.
    """

    names: tuple[str, ...]
    role: str
    model: TeacherConfig
    policy: dict[str, Any]

    @property
    def label(self) -> str:
        """Names the policy and the checkpoint, for messages."""
        return f"{self.policy['name']}, {self.model.path}"


def run_teachers(config: TrainConfig) -> list[TeacherSettings]:
    """Returns the distinct teachers of a run: names with equal settings share one."""
    found: list[TeacherSettings] = []
    for name, model in config.model.all_teachers.items():
        policy = config.policy.of_teacher(name)
        for number, other in enumerate(found):
            if (other.model, other.policy) == (model, policy):
                found[number] = TeacherSettings((*other.names, name), other.role, model, policy)
                break
        else:
            role = "teacher" if config.model.teachers is None else f"teacher {name}"
            found.append(TeacherSettings((name,), role, model, policy))
    return found


def check_teachers(config: TrainConfig) -> None:
    """Checks that each environment of a run has a teacher, and each teacher an environment.

    Raises:
        ConfigError: names the setting and the way out.
    """
    teachers = config.model.teachers or {}
    strangers = sorted(set(config.policy.teachers or ()) - set(teachers))
    if strangers:
        raise ConfigError(
            f"policy.teachers.{strangers[0]} is for a teacher that model.teachers lacks.\nLeave it "
            f"out, or add model.teachers.{strangers[0]}=PATH."
        )
    if not teachers or config.model.teacher_key is not None:  # the rows decide, once they are read
        return
    envs = list(config.weights)
    unused = sorted(set(teachers) - {DEFAULT_TEACHER, *envs})
    if unused:
        raise ConfigError(
            f"model.teachers.{unused[0]} is the teacher of an environment that is not in the run, "
            f"which has {', '.join(envs)}.\nLeave it out (~model.teachers.{unused[0]}, if model= "
            "brings it), or add the environment to env=[...]."
        )
    missing = [name for name in envs if name not in teachers]
    if missing and DEFAULT_TEACHER not in teachers:
        raise ConfigError(
            f"model.teachers has no teacher for env={missing[0]}.\nAdd "
            f"+model.teachers.{missing[0]}=PATH, or +model.teachers.{DEFAULT_TEACHER}=PATH for all "
            "environments without one of their own."
        )


def teaches(
    config: TrainConfig, teacher: TeacherSettings, env: str, task: Task | None = None
) -> bool:
    """Tells whether a task of an environment, or one that names no teacher, has this one."""
    key = config.model.teacher_key
    named = "" if key is None or task is None else task.named_teacher(key)
    return config.model.teacher_name(env, named) in teacher.names


def by_teacher(
    config: TrainConfig, trajectories: Sequence[Trajectory]
) -> dict[str, list[Trajectory]]:
    """Returns the trajectories of each teacher by its name in ``model.teachers``, in their order.

    Empty where tasks do not name their teachers: then they are those of environments.
    """
    found: dict[str, list[Trajectory]] = {}
    for each in trajectories if config.model.teacher_key is not None else ():
        name = config.model.teacher_name(each.env, each.teacher)
        if name is not None:  # held-out tasks may have none, if no teacher is evaluated
            found.setdefault(name, []).append(each)
    return found


class Teachers(Generic[T]):
    """Something that each teacher of a run has, such as its policy, and which one an episode needs.

    Args:
        by_name: the things by the names in ``model.teachers``; empty without a teacher.
    """

    def __init__(self, by_name: Mapping[str, T]) -> None:
        self._by_name = dict(by_name)

    @classmethod
    def of_run(cls, config: TrainConfig, by_role: Mapping[str, T]) -> Teachers[T]:
        """Returns those of a run, given by role (`run_teachers`); roles may be missing."""
        return cls(
            {
                name: by_role[each.role]
                for each in run_teachers(config)
                if each.role in by_role
                for name in each.names
            }
        )

    @property
    def distinct(self) -> list[T]:
        """Each once, in the order of the settings."""
        return list({id(each): each for each in self._by_name.values()}.values())

    @property
    def only(self) -> T | None:
        """The one that teaches every episode; None with none, or with several."""
        found = self.distinct
        return found[0] if len(found) == 1 else None

    def named(self, env: str, teacher: str = "") -> T:
        """Returns that of an environment, or of its tasks that name a teacher.

        Raises:
            ValueError: there is none, which the checks before a run exclude.
        """
        name = teacher_name(self._by_name, env, teacher)
        if name is None:
            raise ValueError(
                f"an episode of '{teacher or env}' needs the teacher, and there is none"
            )
        return self._by_name[name]

    def of(self, episode: Trajectory | EpisodeSpec) -> T:
        """Returns that of an episode."""
        return self.named(episode.env, episode.teacher)

    def parts(self, episodes: Sequence[Trajectory | EpisodeSpec]) -> list[tuple[T, list[int]]]:
        """Returns each that some of the episodes need, with their positions."""
        found: dict[int, tuple[T, list[int]]] = {}
        for position, episode in enumerate(episodes):
            one = self.of(episode)
            found.setdefault(id(one), (one, []))[1].append(position)
        return list(found.values())
