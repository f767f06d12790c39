"""Makes every registered environment and objective an option of Hydra's groups."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reopold_agent.envs import ENVS
from reopold_agent.errors import ConfigError, UnknownNameError

_log = logging.getLogger(__name__)

_SECTIONS = ("data", "pixels", "rollout", "batch", "sampling", "optimizer", "evaluation", "model")


def prepare_groups(arguments: Sequence[str]) -> None:
    """Stores plugins' options with Hydra and checks the names of groups in a command line.

    Raises:
        UnknownNameError: an ``env=``, ``model=``, ``data=``, ``objective=``, ``engine=``,
            ``policy=`` or ``recipe=`` names nothing; lists what exists and the closest match.
        ConfigError: the configuration of the plugin that is asked for has an unknown section.
    """
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
    groups = ("data", "model", "objective", "engine", "policy", "recipe")
    known = {group: _options(group) for group in groups}
    known["objective"] += _store_objectives(known["objective"])
    known["env"] = ENVS.names()
    for argument in arguments:
        group, equals, value = argument.partition("=")
        if equals and group in known and value and "," not in value and value not in known[group]:
            raise UnknownNameError(_words(group), value, known[group])


def _store_objectives(builtin: Sequence[str]) -> list[str]:
    """Stores plugins' objectives with their default settings; returns their names."""
    if not metadata.entry_points(group="reopold_agent.objectives"):
        return []  # the registry imports PyTorch, which --help need not wait for
    from reopold_agent.objectives import OBJECTIVES, Needs, Objective

    names = []
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
        names.append(name)
    return names


def _default(setting: dataclasses.Field[Any]) -> Any:
    if setting.default is not dataclasses.MISSING:
        return setting.default
    if setting.default_factory is not dataclasses.MISSING:
        return setting.default_factory()
    return MISSING


def _words(group: str) -> str:
    return {"env": "environment", "data": "data set"}.get(group, group)


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
