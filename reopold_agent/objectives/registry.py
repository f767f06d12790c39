"""Objectives by name: this package's, and other packages' plugins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from reopold_agent.config import build
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
from reopold_agent.objectives.gkd import GKD
from reopold_agent.objectives.grpo import GRPO
from reopold_agent.objectives.sft import SFT
from reopold_agent.registry import Registry

T = TypeVar("T", bound=type[Objective])

OBJECTIVES: Registry[type] = Registry("objective", "reopold_agent.objectives", type)


def register_objective(name: str) -> Callable[[T], T]:
    """Class decorator: makes a frozen dataclass that is an `Objective` selectable by name.

    A third-party package uses it in a module that its ``reopold_agent.objectives`` entry point
    names. The class's fields are the settings of ``objective=NAME``.

    Raises:
        ConfigError: the name is taken, or the class is no such dataclass.
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
    "gkd": GKD,
    "grpo": GRPO,
    "sft": SFT,
}.items():
    OBJECTIVES.register(_name, _kind)


def make_objective(name: str, settings: Mapping[str, Any]) -> Objective:
    """The objective of that name with these settings.

    Raises:
        UnknownNameError: lists what exists and the closest match.
        ConfigError: an unknown setting, or a value out of range; names it.
    """
    kind = OBJECTIVES.get(name)
    if not (dataclasses.is_dataclass(kind) and issubclass(kind, Objective)):
        raise ConfigError(f"objective '{name}' is not a dataclass derived from Objective")
    objective: Objective = build(kind, settings, "objective.")
    return objective
