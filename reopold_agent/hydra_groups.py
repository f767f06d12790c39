"""Makes every registered environment an option of Hydra's ``env`` group."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from reopold_agent.envs import ENVS
from reopold_agent.errors import ConfigError, UnknownNameError

_log = logging.getLogger(__name__)

_SECTIONS = ("data", "pixels", "rollout", "batch", "sampling", "optimizer", "evaluation", "model")


def prepare_groups(arguments: Sequence[str]) -> None:
    """Stores plugins' environments with Hydra and checks the names of groups in a command line.

    Raises:
        UnknownNameError: an ``env=``, ``model=``, ``data=``, ``objective=`` or ``engine=`` names
            nothing; lists what exists and the closest match.
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
    known = {group: _options(group) for group in ("data", "model", "objective", "engine")}
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
    from reopold_agent.objectives import OBJECTIVES, Needs

    names = [name for name in OBJECTIVES.names() if name not in builtin]
    for name in names:
        kind = OBJECTIVES.get(name)
        settings = {
            each.name: MISSING if each.default is dataclasses.MISSING else each.default
            for each in dataclasses.fields(kind)
        }
        try:
            grouped = bool(kind().needs & Needs.OUTCOME)
        except TypeError:  # settings without a default; its episodes are then single ones
            grouped = False
        node = {
            "default_batch": "group" if grouped else "single",
            "objective": {"name": name, **settings},
        }
        ConfigStore.instance().store(group="objective", name=name, node=node, package="_global_")
    return names


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
