"""Hydra's groups with what plugins add: environments, objectives and trackers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reopold_agent.envs import ENVS
from reopold_agent.errors import ConfigError, UnknownNameError

_log = logging.getLogger(__name__)

_FOLDERS = ("--config-dir", "-cd", "hydra.searchpath")

_SECTIONS = ("data", "pixels", "rollout", "batch", "sampling", "optimizer", "evaluation", "model")


def prepare_groups(arguments: Sequence[str], config: str = "train") -> None:
    """Stores plugins' options with Hydra and checks the names of groups in a command line.

    Args:
        arguments: the words of the command line.
        config: the command's configuration, ``train``, ``evaluate`` or ``serve``.

    Raises:
        UnknownNameError: a group's word (``env=``, ``model=``, ``tracking=`` ...) names nothing;
            lists what exists and the closest match.
        ConfigError: the configuration of the plugin that is asked for has an unknown section.
    """
    OmegaConf.register_new_resolver("groups", _listing, replace=True)  # of --help
    _store_environments(arguments)
    _store_objectives(_options("objective"))
    _store_trackers()
    if any(word.startswith(_FOLDERS) for word in arguments):
        return  # the user's own folder of configurations may have options that only Hydra knows
    for argument in arguments:
        group, equals, value = argument.partition("=")
        sweep = "," in value and not value.startswith("[")  # brackets: several at once
        if not equals or not value or sweep or group not in groups_of(config):
            continue
        for name in value.strip("[]").split(","):
            if name.strip() not in options_of(group):
                raise UnknownNameError(_words(group), name.strip(), options_of(group))


def groups_of(config: str) -> list[str]:
    """The groups that a command's configuration selects from."""
    text = (resources.files("reopold_agent") / "configs" / f"{config}.yaml").read_text("utf-8")
    groups = [each for each in yaml.safe_load(text)["defaults"] if isinstance(each, dict)]
    return [name for each in groups for name in each if "/" not in name]


def options_of(group: str) -> list[str]:
    """The options of a group, with those that plugins added; `prepare_groups` stores these."""
    stored = ConfigStore.instance().repo.get(group, {})
    return sorted({*_options(group), *(name.removesuffix(".yaml") for name in stored)})


def _listing(config: str) -> str:
    """What ``--help`` says of a command's groups."""
    groups = sorted(groups_of(config))
    width = max(map(len, groups))
    return "\n".join(f"  {group:<{width}}  {', '.join(options_of(group))}" for group in groups)


def _store_environments(arguments: Sequence[str]) -> None:
    builtin = _options("env")
    store = ConfigStore.instance()
    for name in ENVS.names():
        if name in builtin:
            continue
        try:
            node = _node(name)
        except ConfigError as error:
            if f"env={name}" in arguments:
                raise
            _log.warning("%s", error)  # an installed plugin must not stop other environments
            continue
        store.store(group="env", name=name, node=node, package="_global_")


def _store_objectives(builtin: Sequence[str]) -> None:
    """Stores plugins' objectives with their default settings."""
    if not metadata.entry_points(group="reopold_agent.objectives"):
        return  # the registry imports PyTorch, which --help need not wait for
    from reopold_agent.objectives import OBJECTIVES, Needs, Objective

    for name in OBJECTIVES.names():
        if name in builtin:
            continue
        kind = OBJECTIVES.get(name)
        if not (dataclasses.is_dataclass(kind) and issubclass(kind, Objective)):
            _log.warning(
                "the objective plugin '%s' is left out: %s.%s is not a dataclass derived from "
                "reopold_agent.objectives.Objective",
                name,
                kind.__module__,
                kind.__qualname__,
            )
            continue
        settings = {each.name: _default(each) for each in dataclasses.fields(kind)}
        try:
            grouped = bool(kind().needs & Needs.OUTCOME)
        except (TypeError, ValueError):  # settings without a default: single episodes then
            grouped = False
        node = {
            "default_batch": "group" if grouped else "single",
            "objective": {"name": name, **settings},
        }
        try:
            OmegaConf.create(node)
        except OmegaConfBaseException as error:
            _log.warning(
                "the objective plugin '%s' is left out: a default of its settings is no plain "
                "value: %s",
                name,
                str(error).splitlines()[0],
            )
            continue
        ConfigStore.instance().store(group="objective", name=name, node=node, package="_global_")


def _store_trackers() -> None:
    """Stores plugins' trackers with their default settings."""
    if not metadata.entry_points(group="reopold_agent.trackers"):
        return
    from reopold_agent.tracking.trackers import TRACKERS

    for name in TRACKERS.names():
        kind = TRACKERS.get(name)
        if name in _options("tracking"):
            continue
        if not dataclasses.is_dataclass(kind):
            _log.warning("the tracker plugin '%s' is left out: it is no dataclass", name)
            continue
        settings = {each.name: _default(each) for each in dataclasses.fields(kind) if each.init}
        ConfigStore.instance().store(group="tracking", name=name, node={name: settings})


def _default(setting: dataclasses.Field[Any]) -> Any:
    if setting.default is not dataclasses.MISSING:
        return setting.default
    if setting.default_factory is not dataclasses.MISSING:
        return setting.default_factory()
    return MISSING


def _words(group: str) -> str:
    return {"env": "environment", "data": "data set", "tracking": "tracker"}.get(group, group)


def _options(group: str) -> list[str]:
    folder = resources.files("reopold_agent") / "configs" / group
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def _node(name: str) -> dict[str, Any]:
    entry = ENVS.get(name)
    sections = {key: value for key, value in entry.config.items() if key not in ("kwargs",)}
    unknown = [key for key in sections if key not in (*_SECTIONS, "takes_data")]
    if unknown:
        raise ConfigError(
            f"environment '{name}': unknown sections {', '.join(unknown)} in its config; known: "
            f"kwargs, takes_data, {', '.join(_SECTIONS)}"
        )
    env = {
        "name": name,
        "id": entry.id,
        "takes_data": bool(sections.pop("takes_data", False)),
        "kwargs": dict(entry.config.get("kwargs", {})),
    }
    return {"env": env, **{key: _plain(value) for key, value in sections.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
