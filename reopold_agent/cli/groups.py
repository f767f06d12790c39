"""Hydra's config groups, with the environments, objectives, trackers and judges of plugins."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import (  # type: ignore[attr-defined]
    CommonTokenStream,
    InputStream,
    OverrideLexer,
)
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reopold_agent.envs import ENVS, load_env
from reopold_agent.envs.registration import GYM
from reopold_agent.errors import ConfigError, UnknownNameError, first_line

_log = logging.getLogger(__name__)

_FOLDER_FLAGS = ("--config-dir", "-cd")

SEARCH_PATH = "hydra.searchpath"
"""Hydra's setting for further places with configurations."""

SEVERAL = ("tracking",)
"""Groups of which one run may select several options, as a list."""

_CHECKPOINT = ("checkpoint", "model")
"""Names of the word ``model=`` in commands where it is a checkpoint, not a group."""

_SECTIONS = ("data", "pixels", "rollout", "batch", "sampling", "optimizer", "evaluation", "model")


def prepare_groups(arguments: Sequence[str], config: str = "train") -> None:
    """Registers plugins' options with Hydra and checks the options that a command line selects.

    Args:
        arguments: the arguments of the command line.
        config: the command's configuration, ``train``, ``evaluate``, ``judge`` or ``serve``.

    Raises:
        UnknownNameError: a group (``env=``, ``model=``, ``tracking=`` ...) has no such option; the
            message lists the known ones and the closest match.
        ConfigError: the configuration of the selected plugin has an unknown section, or a group of
            a single choice is given a list.
    """
    _check_lists(arguments, groups_of(config))
    OmegaConf.register_new_resolver("groups", _group_list, replace=True)  # for --help
    OmegaConf.register_new_resolver("options", lambda g: ", ".join(options_of(g)), replace=True)
    _store_environments(arguments)
    _store_objectives(_builtin_options("objective"))
    _store_trackers()
    if "judge" in groups_of(config):
        _store_judges()
    places = _search_path(arguments)
    if any("://" in place for place in places):
        return  # only Hydra knows the options in a package
    for argument in arguments:
        group, equals, value = argument.partition("=")
        sweep = "," in value and not value.startswith("[")  # [a,b] selects several at once
        if not equals or not value or sweep or group not in groups_of(config):
            continue
        for name in value.strip("[]").split(","):
            if group == "env" and name.startswith(GYM):
                continue  # stored above
            known = {*options_of(group), *_options_in(places, group)}
            if name.strip() not in known:
                where = ", ".join(str(Path(place, group)) for place in places)
                where = where and f"the package's configs/{group} or {where}"
                raise UnknownNameError(_noun(group), name.strip(), known, where)


def searched(words: Sequence[str]) -> list[str]:
    """Returns words with Hydra's flag ``--config-dir DIR`` as its setting ``hydra.searchpath``.

    `hydra.compose` takes the setting only. As with the flag, the folder comes after the package's
    own configurations and before those of the user's ``hydra.searchpath``.

    Raises:
        ConfigError: the flag names no folder, or the user's own setting is no list of them.
    """
    rest, flags = list(words), [w for w in words if w.partition("=")[0] in _FOLDER_FLAGS]
    if not flags:
        return rest
    at = rest.index(flags[0])
    _, equals, folder = rest.pop(at).partition("=")
    if not equals:
        folder = rest.pop(at) if at < len(rest) else ""
    if not (folder and Path(folder).is_dir()):
        raise ConfigError(
            f"the folder of configurations '{folder}' is not there.\n"
            "Name one that holds env/NAME.yaml or options of other groups: --config-dir DIR."
        )
    own = place_words(rest)
    places = [str(Path(folder).absolute()), *_search_path(own)]
    # Hydra's quoted strings are JSON's where they have no control characters.
    word = f"{SEARCH_PATH}=[{','.join(json.dumps(p, ensure_ascii=False) for p in places)}]"
    return [word, *(each for each in rest if each not in own)]


def place_words(words: Sequence[str]) -> list[str]:
    """Returns the words that name places of the user's configurations.

    These are ``hydra.searchpath=[...]``, and ``--config-dir`` with its folder, in one word or two.
    """
    return [
        word
        for before, word in zip(("", *words), words, strict=False)
        if before in _FOLDER_FLAGS or key_of(word) in (SEARCH_PATH, *_FOLDER_FLAGS)
    ]


def _search_path(words: Sequence[str]) -> list[str]:
    """Returns the places in which Hydra looks for options beside the package: folders or URLs.

    Raises:
        ConfigError: ``hydra.searchpath`` is no list of them.
    """
    found: list[str] = []
    for word in place_words(searched(words)):
        try:
            value: Any = OverridesParser.create().parse_override(word).value()
        except HydraException:
            value = None
        if not isinstance(value, list) or not all(isinstance(place, str) for place in value):
            raise ConfigError(
                f"'{word}' is no list of folders.\nWrite '{SEARCH_PATH}=[DIR]' or --config-dir DIR."
            )
        found += [place.removeprefix("file://") for place in value]
    return found


def _options_in(places: Sequence[str], group: str) -> set[str]:
    """Returns the options of a group in folders of the user's."""
    tops = [Path(place, group) for place in places]
    files = [(top, file) for top in tops for file in top.rglob("*.yaml")]
    return {file.relative_to(top).with_suffix("").as_posix() for top, file in files}


def _check_lists(arguments: Sequence[str], groups: Sequence[str]) -> None:
    """Refuses lists for groups of a single choice, of which Hydra would use the last option.

    Raises:
        ConfigError: names the group and the options in the list.
    """
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        group = key.partition("@")[0]  # policy/role@policy.student
        if not (group in groups or group in _CHECKPOINT or "/" in group) or group in SEVERAL:
            continue
        names = [name.strip() for name in value.strip("[]").split(",")]
        if value.startswith("[") and len(names) > 1:
            shown = _CHECKPOINT[-1] if group in _CHECKPOINT else key
            raise ConfigError(
                f"'{shown}' takes one option, got {value}.\n"
                f"Choose one of them ({shown}={names[0]}), or run the command once with each."
            )


def key_of(word: str) -> str:
    """Returns the key that a word of a command line sets, without the ``+`` that adds it."""
    return word.partition("=")[0].lstrip("+")


def check_once(words: Sequence[str], lists: Sequence[str] = SEVERAL) -> None:
    """Refuses a setting that is given twice with two values, of which only the last would count.

    In ``key={name: one, name: two}`` the name is given twice, too. ``key=null`` before
    ``key={...}`` is no such setting: it removes the names that the second would only add to.

    Args:
        words: the arguments of a command line; flags and words of other forms are passed over.
        lists: keys whose value may be a list.

    Raises:
        ConfigError: names the setting and both words.
    """
    first: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.lstrip("+")  # but ~KEY, which removes what +KEY then adds
        if not equals or key.startswith(("-", "~")):
            continue
        if "{" in value:
            _check_names(word)
        before = first.setdefault(key, word)
        if before.partition("=")[2] == value:
            continue
        if before.endswith("=null") and value.startswith("{"):
            first[key] = word
            continue
        advice = "Leave one out, or run the command once with each."
        if key in lists:
            both = ",".join(each.partition("=")[2].strip("[]") for each in (before, word))
            advice = f"Write '{key}=[{both}]' for both, or leave one out."
        shown = _CHECKPOINT[-1] if key in _CHECKPOINT else key
        raise ConfigError(f"'{shown}' is given twice: {before} and {word}.\n{advice}")


def _check_names(word: str) -> None:
    """Refuses a group of settings, ``KEY={NAME: VALUE, ...}``, with a name twice.

    Raises:
        ConfigError: names the setting and the name.
    """
    lexer = OverrideLexer(InputStream(word))
    parser = OverrideParser(CommonTokenStream(lexer))
    for each in (lexer, parser):
        each.removeErrorListeners()  # what cannot be read is told by Hydra
    nodes: list[Any] = [parser.override()]  # type: ignore[no-untyped-call]
    if parser.getNumberOfSyntaxErrors():
        return
    for node in nodes:
        nodes += getattr(node, "children", None) or []
        if not isinstance(node, OverrideParser.DictContainerContext):
            continue
        names = [pair.dictKey().getText() for pair in node.dictKeyValuePair()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            top = isinstance(node.parentCtx.parentCtx, OverrideParser.ValueContext)
            teacher = top and key_of(word) == "model.teachers"
            advice = "An environment has one teacher: leave" if teacher else "Leave"
            raise ConfigError(f"'{twice}' is given twice in {word}.\n{advice} one out.")


def refuse_data(words: Sequence[str], env: str) -> None:
    """Refuses words that give data to an environment that takes none.

    Args:
        words: of a command line; ``data=none`` may be among them.
        env: the environment's name.

    Raises:
        ConfigError: names the first of these words.
    """
    for word in words:
        key = key_of(word).lstrip("~")
        if key.partition(".")[0] == "data" and word != "data=none":
            raise ConfigError(
                f"'{key}': env={env} makes its own tasks and takes no data.\nLeave it out, or "
                "write data=none; the environment's settings are env.kwargs: "
                "+env.kwargs.NAME=VALUE."
            )


def groups_of(config: str) -> list[str]:
    """Returns the groups that a command's configuration selects from."""
    text = (resources.files("reopold_agent") / "configs" / f"{config}.yaml").read_text("utf-8")
    groups = [each for each in yaml.safe_load(text)["defaults"] if isinstance(each, dict)]
    return [name for each in groups for name in each if "/" not in name]


def options_of(group: str) -> list[str]:
    """Returns a group's options, with those of plugins once `prepare_groups` has run.

    Gymnasium's environments are not listed.
    """
    stored = {name.removesuffix(".yaml") for name in ConfigStore.instance().repo.get(group, {})}
    return sorted(
        {*_builtin_options(group), *(name for name in stored if not name.startswith(GYM))}
    )


def _group_list(config: str) -> str:
    """Lists a command's groups and their options for ``--help``."""
    groups = sorted(groups_of(config))
    width = max(map(len, groups))
    options = {group: ", ".join(options_of(group)) for group in groups}
    if "env" in options:
        options["env"] += f", {GYM}ID (any environment of Gymnasium)"
    return "\n".join(f"  {group:<{width}}  {options[group]}" for group in groups)


def _store_environments(arguments: Sequence[str]) -> None:
    builtin = _builtin_options("env")
    store = ConfigStore.instance()
    for name in ENVS.names():
        if name in builtin:
            continue
        try:
            node = _env_option(name)
        except ConfigError as error:
            if f"env={name}" in arguments:
                raise
            _log.warning("%s", error)  # a broken plugin must not stop other environments
            continue
        store.store(group="env", name=name, node=node, package="_global_")
    for name in _gymnasium_names(arguments):
        folder, _, file = f"env/{name}".rpartition("/")  # an id may have a namespace: ALE/Pong-v5
        store.store(group=folder, name=file, node=_env_option(name), package="_global_")


def _gymnasium_names(arguments: Sequence[str]) -> list[str]:
    """Returns the names of Gymnasium's environments in a command line, also in a sweep or list."""
    chosen = [word.removeprefix("env=") for word in arguments if word.startswith("env=")]
    names = [name.strip(" '\"[]") for each in chosen for name in each.split(",")]
    return [name for name in names if name.startswith(GYM) and name != GYM]


def _store_objectives(builtin: Sequence[str]) -> None:
    """Registers plugins' objectives with their default settings."""
    if not metadata.entry_points(group="reopold_agent.objectives"):
        return  # --help need not wait for PyTorch, which the registry imports
    from reopold_agent.objectives import OBJECTIVES, Needs, Objective

    for name in OBJECTIVES.names():
        if name in builtin:
            continue
        kind = OBJECTIVES.get(name)
        if not (dataclasses.is_dataclass(kind) and issubclass(kind, Objective)):
            _log.warning(
                "the objective plugin '%s' is ignored: %s.%s is not a dataclass derived from "
                "reopold_agent.objectives.Objective",
                name,
                kind.__module__,
                kind.__qualname__,
            )
            continue
        settings = {each.name: _default(each) for each in dataclasses.fields(kind)}
        try:
            grouped = bool(kind().needs & Needs.OUTCOME)
        except (TypeError, ValueError):  # settings without a default: assume single episodes
            grouped = False
        node = {
            "default_batch": "group" if grouped else "single",
            "objective": {"name": name, **settings},
        }
        try:
            OmegaConf.create(node)
        except OmegaConfBaseException as error:
            _log.warning(
                "the objective plugin '%s' is ignored: a default of its settings is not a plain "
                "value: %s",
                name,
                first_line(error),
            )
            continue
        ConfigStore.instance().store(group="objective", name=name, node=node, package="_global_")


def _store_trackers() -> None:
    """Registers plugins' trackers with their default settings."""
    if not metadata.entry_points(group="reopold_agent.trackers"):
        return
    from reopold_agent.tracking.trackers import TRACKERS

    for name in TRACKERS.names():
        kind = TRACKERS.get(name)
        if name in _builtin_options("tracking"):
            continue
        if not dataclasses.is_dataclass(kind):
            _log.warning("the tracker plugin '%s' is ignored: it is not a dataclass", name)
            continue
        settings = {each.name: _default(each) for each in dataclasses.fields(kind) if each.init}
        ConfigStore.instance().store(group="tracking", name=name, node={name: settings})


def _store_judges() -> None:
    """Registers plugins' judges; their settings are added with + (``+judge.model=NAME``)."""
    if not metadata.entry_points(group="reopold_agent.judges"):
        return
    from reopold_agent.judges.llm.registry import LLM_JUDGES

    for name in LLM_JUDGES.names():
        if name not in _builtin_options("judge"):
            ConfigStore.instance().store(group="judge", name=name, node={"name": name})


def _default(setting: dataclasses.Field[Any]) -> Any:
    if setting.default is not dataclasses.MISSING:
        return setting.default
    if setting.default_factory is not dataclasses.MISSING:
        return setting.default_factory()
    return MISSING


def _noun(group: str) -> str:
    return {"env": "environment", "data": "data set", "tracking": "tracker"}.get(group, group)


def _builtin_options(group: str) -> list[str]:
    folder = resources.files("reopold_agent") / "configs" / group
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def _env_option(name: str) -> dict[str, Any]:
    entry = load_env(name)
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
