"""Objectives by name: the built-in ones and plugins of other packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from reopold_agent.config import (
    COMMON_SETTINGS,
    OutcomeConfig,
    build,
    check_over,
    importance_cap,
)
from reopold_agent.errors import ConfigError
from reopold_agent.objectives.base import Objective
from reopold_agent.objectives.distillation import (
    ClippedReverseKL,
    EntropyMaskedReverseKL,
    Reopold,
    ReverseKL,
    ReverseKLStopGradient,
    SkewReverseKL,
)
from reopold_agent.objectives.eopd import EOPD
from reopold_agent.objectives.exopd import ExOPD
from reopold_agent.objectives.gkd import GKD
from reopold_agent.objectives.grpo import GRPO
from reopold_agent.objectives.outcome import WithOutcome, check_outcome
from reopold_agent.objectives.sft import SFT
from reopold_agent.objectives.weighted import IWOPD, SOD
from reopold_agent.registry import Registry

T = TypeVar("T", bound=type[Objective])

OBJECTIVES: Registry[type] = Registry("objective", "reopold_agent.objectives", type)


def register_objective(name: str) -> Callable[[T], T]:
    """Returns a class decorator that registers an objective, to be selected as ``objective=NAME``.

    The class is a frozen dataclass derived from `Objective`; its fields are the objective's
    settings. A third-party package uses the decorator in a module that its
    ``reopold_agent.objectives`` entry point names.

    Raises:
        ConfigError: the name is taken, or the class is not such a dataclass.
    """

    def add(kind: T) -> T:
        if not (dataclasses.is_dataclass(kind) and issubclass(kind, Objective)):
            raise ConfigError(
                f"objective '{name}' must be a dataclass derived from "
                "reopold_agent.objectives.Objective"
            )
        OBJECTIVES.register(name, kind)
        return kind

    return add


for _name, _kind in {
    "rkl": ReverseKL,
    "rkl_sg": ReverseKLStopGradient,
    "rkl_sg_clip": ClippedReverseKL,
    "rkl_sg_clip_entropy": EntropyMaskedReverseKL,
    "reopold": Reopold,
    "skew_rkl": SkewReverseKL,
    "iw_opd": IWOPD,
    "sod": SOD,
    "eopd": EOPD,
    "exopd": ExOPD,
    "gkd": GKD,
    "grpo": GRPO,
    "sft": SFT,
}.items():
    OBJECTIVES.register(_name, _kind)


def make_objective(name: str, settings: Mapping[str, Any]) -> Objective:
    """Makes the objective of that name with these settings.

    Args:
        name: of the objective.
        settings: its own and those that all objectives have. Of these the outcome's make the
            objective a `WithOutcome` if it counts; the others are only checked here.

    Raises:
        UnknownNameError: no such objective; the message lists those that exist.
        ConfigError: a setting is unknown or out of range; the message names it.
    """
    kind = OBJECTIVES.get(name)
    if not (dataclasses.is_dataclass(kind) and issubclass(kind, Objective)):
        raise ConfigError(f"objective '{name}' is not a dataclass derived from Objective")
    taken = sorted({field.name for field in dataclasses.fields(kind)} & set(COMMON_SETTINGS))
    if taken:
        raise ConfigError(
            f"objective '{name}' has a field '{taken[0]}', but objective.{taken[0]} is a setting "
            f"of every objective.\nRename the field of {kind.__module__}.{kind.__qualname__}."
        )
    importance_cap(settings)
    check_over(settings)
    own = {key: value for key, value in settings.items() if key not in COMMON_SETTINGS}
    objective: Objective = build(kind, own, "objective.")
    outcome = OutcomeConfig.of(settings)
    if not outcome.active:
        return objective
    check_outcome(name, objective)
    return WithOutcome(objective, outcome)
