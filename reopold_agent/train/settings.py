"""Composes and checks a training run's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reopold_agent.cli.groups import check_once, key_of, prepare_groups, refuse_data, searched
from reopold_agent.cli.hydra import plain_values
from reopold_agent.cli.messages import explain, verl_only
from reopold_agent.config import TrainConfig, build, flatten, only_for_verl
from reopold_agent.errors import ConfigError, ReopoldError
from reopold_agent.policies.architecture import find_architecture
from reopold_agent.policies.templates import chat_template
from reopold_agent.train.mixture import mixed_words
from reopold_agent.train.teachers import check_teachers

_INTERNAL = ("default_steps", "default_batch", "batches", "size", "sizes", "toy")
"""Defaults of groups for others."""

_SIZES = {"small": 1.0, "medium": 5.0}
"""Upper bounds of the sizes of ``model=qwen2_5_vl`` and the like, in 1e9 parameters."""

TOY_PARAMETERS = 20_000_000
"""Models with fewer parameters may be trained with the settings of the embedded ones."""


def load_config(composed: DictConfig) -> tuple[TrainConfig, dict[str, Any]]:
    """Checks a composed configuration.

    Returns:
        The typed configuration, and the same values untyped.

    Raises:
        ConfigError: a setting is wrong; the message names it.
    """
    if composed.evaluation.tasks == 0:  # held-out data is not needed, so its path may be missing
        held_out = composed.data.get("eval")
        if held_out is not None and OmegaConf.missing_keys(held_out):
            composed.data.eval = None
    if composed.get("size") == "auto":
        composed.size = _size(composed.model.student)
    objective = composed.get("objective") or {}
    if objective.get("outcome") or objective.get("outcome_end"):
        composed.default_batch = "group"  # as for objectives that learn from outcomes alone
    values = plain_values(composed)
    for name in _INTERNAL:
        values.pop(name, None)
    config = build(TrainConfig, values)
    check_teachers(config)
    if config.model.chat_template is not None:  # read once: workers elsewhere lack the file
        template = chat_template(config.model.chat_template)
        config = replace(config, model=replace(config.model, chat_template=template))
    return config, values


def _student_path(student: Any) -> str | None:
    """Returns the student's path; None if it is missing or of another type, reported elsewhere."""
    if not isinstance(student, DictConfig) or OmegaConf.is_missing(student, "path"):
        return None
    return student.path if isinstance(student.path, str) else None


def _size(student: Any) -> str:
    """Returns ``small``, ``medium`` or ``large``; ``auto`` if the checkpoint is not here yet."""
    if _student_path(student) is None:
        return "auto"
    try:
        billions = find_architecture(student.path).parameters / 1e9
    except ReopoldError:  # reported where the checkpoint is needed
        return "auto"
    return next((size for size, most in _SIZES.items() if billions < most), "large")


def check_student(composed: DictConfig, words: Sequence[str] = ()) -> None:
    """Fetches the student's ``config.json``; refuses settings of the embedded models for others.

    Settings that the user, a plugin or another group has set are not the embedded models'.

    Args:
        composed: the composed configuration.
        words: the command line's settings, which may give values of ``toy``.

    Raises:
        ConfigError: names these settings, and the option of ``model`` to take instead.
        ModelError: the checkpoint cannot be read.
    """
    student = composed.model.student
    unresolved: Any = OmegaConf.to_container(composed, resolve=False)
    given = {f"${{{word.partition('=')[0].lstrip('+')}}}" for word in words}
    found = [
        key
        for key, value in flatten(unresolved).items()
        if str(value).startswith("${toy.") and value not in given
    ]
    path = _student_path(student)
    if path is None or path.startswith("demo:") or not (found or "size" in composed):
        return
    # Imported here so that other configuration errors do not wait for PyTorch.
    from reopold_agent.policies.loading import ModelSpec, check_available, family, resolve_path

    spec = ModelSpec(path, student.revision, trust_remote_code=student.trust_remote_code)
    kind = family(check_available(spec, "student", weights=False))
    parameters = find_architecture(resolve_path(spec.path)).parameters
    keys = [key for key in found if kind.tower or not key.startswith("pixels.")]
    if parameters < TOY_PARAMETERS or not keys:
        return
    listed = ", ".join(f"{key}={OmegaConf.select(composed, key)}" for key in keys)
    raise ConfigError(
        f"the student {spec.path} has {billions(parameters)} parameters, but {listed} are settings "
        f"of the embedded models.\nAdd model={kind.option}, or set these to the values that you "
        "want."
    )


def billions(parameters: int) -> str:
    """Formats a number of parameters: 0.3M, 494M, 3.8B."""
    if parameters < 999.5e6:
        millions = parameters / 1e6
        return f"{millions:.1f}M" if millions < 10 else f"{millions:.0f}M"
    return f"{parameters / 1e9:.1f}B"


def check_engine(composed: DictConfig, words: Sequence[str]) -> None:
    """Refuses settings of ``engine=verl`` for ``engine=local``, which would do nothing with them.

    Those of a recipe for ``engine=verl`` stay, so that ``engine=local`` can be put behind it.

    Args:
        composed: the composed configuration.
        words: the command line's settings.

    Raises:
        ConfigError: names the first of these settings.
    """
    if composed.engine.name != "local":
        return
    for word in words:
        key = key_of(word)
        if only_for_verl(key):
            raise ConfigError("\n".join(verl_only(key)))


def check_data(composed: DictConfig, words: Sequence[str]) -> None:
    """Refuses data, of the command line or a recipe, for an environment that takes none.

    Args:
        composed: the composed configuration; `mixed_words` has checked that of a mixture.
        words: the command line's settings.

    Raises:
        ConfigError: names the setting.
    """
    if composed.env.takes_data or "mix" in composed:
        return
    refuse_data(words, composed.env.name)
    keys = {key_of(word) for word in words}
    given = [s for s in ("train", "eval") if (composed.data.get(s) or {}).get("path") is not None]
    if "recipe" in keys and "data" not in keys and given:
        refuse_data([f"data.{given[0]}.path"], composed.env.name)


def compose_run(words: Sequence[str], *, with_student: bool = False) -> TrainConfig:
    """Composes and checks the configuration that ``python -m reopold_agent.train`` would use.

    Args:
        words: the arguments of the command line.
        with_student: also check that the settings suit the student (`check_student`).

    Raises:
        ConfigError: an argument is not a setting, or given twice.
        UnknownNameError: a group has no such option.
    """
    check_once(words)
    words = mixed_words(searched(words))
    prepare_groups(words)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            composed = compose("train", list(words))
            check_engine(composed, words)
            check_data(composed, words)
            if with_student:
                check_student(composed, words)
            return load_config(composed)[0]
    except (HydraException, OmegaConfBaseException) as error:
        told = explain(error, "train", sweeps=False)
        assert told is not None  # all errors of Hydra are explained
        raise ConfigError("\n".join(told)) from error
