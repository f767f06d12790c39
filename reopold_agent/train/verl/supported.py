"""What ``engine=verl`` refuses before anything starts; imports neither PyTorch nor verl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from reopold_agent.config import EngineConfig, TrainConfig
from reopold_agent.errors import ConfigError
from reopold_agent.policies.architecture import Architecture
from reopold_agent.train.verl.overrides import check_overrides

if TYPE_CHECKING:
    from reopold_agent.objectives import Objective

_LORA = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    "init_lora_weights",
)
"""Arguments of `peft.LoraConfig` with which an adapter is two matrices beside a weight, drawn
without a look at the weight or at data."""


def check_objective(name: str, objective: Objective) -> None:
    """Refuses an objective that learns from more than the student's samples of one rollout.

    Args:
        name: the objective's name, for messages.
        objective: the objective.

    Raises:
        ConfigError: names the setting and the way out.
    """
    from reopold_agent.objectives import Needs  # loads PyTorch

    beyond = objective.needs & ~(Needs.TEACHER | Needs.OUTCOME)
    if beyond:
        raise ConfigError(
            f"engine=verl trains on the student's own samples; objective={name} needs more "
            f"({beyond.name}).\nUse engine=local."
        )
    if objective.max_rollout_rounds > 1 or getattr(objective, "drop_equal_groups", False):
        raise ConfigError(
            "engine=verl trains on every group of a step, rolled out once.\nSet "
            "objective.drop_equal_groups=false, or use engine=local."
        )


def check_settings(config: TrainConfig) -> None:
    """Refuses settings that this engine does not have.

    Raises:
        ConfigError: names the setting and the way out.
    """
    if config.model.student.lora is not None:
        _check_lora(config.model.student.lora)
    teacher = config.model.teacher
    if teacher is not None and teacher.follow is not None:
        raise ConfigError("engine=verl does not support model.teacher.follow.\nUse engine=local.")
    if not all(each.view.empty for each in config.model.all_teachers.values()):
        raise ConfigError("engine=verl does not support model.teacher.view.\nUse engine=local.")
    if config.engine.compile:
        raise ConfigError(
            "engine=verl does not support engine.compile.\nLeave it out, or use engine=local."
        )
    others = [role for role in ("student", "teacher") if _policy(config, role) != "transformers"]
    if config.policy.teachers:
        others.append("teachers")
    if others:
        raise ConfigError(
            f"engine=verl starts vLLM servers for both roles, so it takes no policy.{others[0]}.\n"
            "Leave that at its default (policy=transformers), or use engine=local."
        )
    if any(each.align is not None for each in config.model.all_teachers.values()):
        raise ConfigError(
            "engine=verl scores the student's own token ids, so it takes no teacher with "
            "align=bytes.\nUse engine=local, or a teacher with the student's tokenizer."
        )
    if config.engine.ahead and config.model.all_teachers and config.engine.shares_gpus:
        raise ConfigError(
            "engine.ahead=1 generates while the student learns, and a teacher on the student's "
            "GPUs needs them alone.\nGive it GPUs of its own (engine.teacher_gpus_per_node=N), or "
            "set engine.ahead=0."
        )
    check_overrides(config.engine.overrides)
    if config.engine.old_logp != "recompute":
        raise ConfigError(
            "engine=verl takes log-probs and entropies from the trainer's own model.\nSet "
            "engine.old_logp=recompute, or use engine=local."
        )


def _check_lora(settings: Mapping[str, Any]) -> None:
    """Refuses adapters with more than two matrices beside each weight.

    Raises:
        ConfigError: names the setting and the way out.
    """
    beyond = [
        name
        for name, value in settings.items()
        if name not in _LORA and value not in (None, False, "none", [], {})
    ]
    started = settings.get("init_lora_weights", True)
    if started not in (True, False, "gaussian", "orthogonal"):
        beyond.append("init_lora_weights")
    if beyond:
        raise ConfigError(
            "engine=verl trains plain LoRA, whose servers get the merged weights, not "
            f"model.student.lora.{beyond[0]}={settings[beyond[0]]}.\n"
            f"Leave it out (there are {', '.join(_LORA)}), or use engine=local."
        )


def _policy(config: TrainConfig, role: str) -> str:
    return str(getattr(config.policy, role)["name"])


def student_gpus(engine: EngineConfig, with_teacher: bool) -> int:
    """Returns the number of GPUs per node on which the student trains.

    Raises:
        ConfigError: the GPUs cannot be divided so.
    """
    taken = {"rollout_gpus_per_node": engine.rollout_gpus_per_node}
    if with_teacher:
        if engine.rollout_gpus_per_node and engine.shares_gpus:
            raise ConfigError(
                "engine.rollout_gpus_per_node gives the student's servers GPUs of their own, and "
                "then the teacher's need some, too.\nSet engine.teacher_gpus_per_node=N, or "
                "engine.rollout_gpus_per_node=0."
            )
        taken["teacher_gpus_per_node"] = engine.teacher_gpus_per_node
    rest = engine.gpus_per_node - sum(taken.values())
    if rest < 1:
        others = " and ".join(f"engine.{key}={count}" for key, count in taken.items() if count)
        raise ConfigError(
            f"engine.gpus_per_node={engine.gpus_per_node} leaves no GPU for the student beside "
            f"{others}.\nRaise the first or lower the others; at 0 their servers are where the "
            "student trains."
        )
    for count, server, which in (
        (rollout_gpus(engine, rest), engine.student_server, "student_server"),
        (teacher_gpus(engine), engine.teacher_server, "teacher_server"),
    ):
        if which == "teacher_server" and not with_teacher:
            continue
        if count < 1 or count % server.tensor_parallel:
            raise ConfigError(
                f"engine.{which}.tensor_parallel={server.tensor_parallel} does not divide the "
                f"{count} GPUs per node that it has.\nChoose a divisor of {count}, or another "
                "engine.gpus_per_node, engine.teacher_gpus_per_node or "
                "engine.rollout_gpus_per_node."
            )
    return rest


def check_tensor_parallel(engine: EngineConfig, models: Iterable[tuple[str, Architecture]]) -> None:
    """Refuses servers whose GPUs cannot share their model out evenly.

    Args:
        engine: the settings of the servers.
        models: ``student`` or ``teacher``, and the shapes of such a model.

    Raises:
        ConfigError: names the setting, and the values that divide the model.
    """
    for role, model in models:
        parts = getattr(engine, f"{role}_server").tensor_parallel
        what = model.undivided(parts)
        if what is not None:
            good = [str(count) for count in range(1, parts) if model.undivided(count) is None]
            raise ConfigError(
                f"engine.{role}_server.tensor_parallel={parts} does not divide the {what} of "
                f"{model.name}.\nChoose a number of GPUs that vLLM can share it out among: "
                f"{', '.join(good)}."
            )


def teacher_replicas(engine: EngineConfig, teachers: int) -> int:
    """Returns the number of servers of each teacher: the GPUs are divided evenly among teachers.

    Args:
        engine: the engine's settings.
        teachers: number of distinct teachers.

    Raises:
        ConfigError: the GPUs cannot be divided so.
    """
    gpus = engine.nodes * teacher_gpus(engine)
    each = engine.teacher_server.tensor_parallel
    if gpus % (max(1, teachers) * each):
        which = "engine.gpus_per_node" if engine.shares_gpus else "engine.teacher_gpus_per_node"
        raise ConfigError(
            f"{teachers} teachers, each on {each} or a multiple of it, cannot divide {gpus} GPUs "
            f"evenly.\nSet {which} so that they are a multiple of {teachers * each}, or give fewer "
            "teachers."
        )
    return gpus // (max(1, teachers) * each)


def teacher_gpus(engine: EngineConfig) -> int:
    """Returns the number of GPUs per node on which the teacher's servers are."""
    return engine.gpus_per_node if engine.shares_gpus else engine.teacher_gpus_per_node


def rollout_gpus(engine: EngineConfig, students: int) -> int:
    """Returns the number of GPUs per node on which the student's servers are.

    Args:
        engine: the engine's settings.
        students: GPUs per node on which the student trains (`student_gpus`).
    """
    return engine.rollout_gpus_per_node or students
