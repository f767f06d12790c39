"""Composes a mixture: the words ``env=[NAME,NAME]`` and ``mix.*`` of a command line.

Each environment's settings are those of a run of it alone. They become one option of the group
``env``, so that everything that reads Hydra's configuration finds them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reopold_agent.cli.groups import (
    key_of,
    options_of,
    place_words,
    prepare_groups,
    refuse_data,
    searched,
)
from reopold_agent.cli.messages import explain
from reopold_agent.errors import ConfigError, suggestion

SECTIONS = ("env", "data", "pixels", "rollout", "evaluation.max_turns")
"""Settings that belong to an environment. All others are the run's."""

_BOUNDS: dict[str, Callable[[Iterable[Any]], Any]] = {
    **dict.fromkeys(("max_response_tokens", "max_turn_tokens", "max_turns", "env_seconds"), max),
    "stop_at_tool_call": any,
}
"""How `TrainConfig.rollout` of a mixture follows from its environments'."""

_typed: dict[str, tuple[list[str], set[str]]] = {}
"""The words that made each stored option, and the keys of the words that were added with it."""


def mixed_words(words: Sequence[str]) -> list[str]:
    """Returns the words for Hydra, with a mixture as one option of the group ``env``.

    A list of one environment is that environment; without a list nothing changes.

    Raises:
        ConfigError: a word of the mixture is wrong, or means one environment only.
        UnknownNameError: there is no such environment or option.
    """
    listed = [word for word in words if key_of(word) == "env" and word.partition("=")[2][:1] == "["]
    about = [word for word in words if key_of(word).partition(".")[0] == "mix"]
    names = _names(listed[0]) if len(listed) == 1 else []
    if len(names) < 2 and about:
        raise ConfigError(
            f"'{key_of(about[0])}' is a setting of a mixture.\n"
            "Name its environments, env=[NAME,NAME], or leave it out."
        )
    if not names:
        return list(words)
    if len(names) == 1:
        return [f"env={names[0]}" if word in listed else word for word in words]
    settings = searched(words)
    places = place_words(settings)
    prepare_groups([*places, *(f"env={name}" for name in names)])
    rest = [word for word in settings if word not in (*listed, *about)]
    _check(rest, names)
    own = {name: _own_words(about, name) for name in names}
    weights = _weights(about, names)
    known = {*(word for each in own.values() for word, _ in each)}
    for word in about:
        if word not in known and not key_of(word).startswith("mix.weights"):
            hint = suggestion(key_of(word), [f"mix.envs.{name}" for name in names])
            raise ConfigError(
                f"'{key_of(word)}' is no setting of the mixture.\n"
                f"{hint}Write mix.weights={{NAME: 2}} or mix.envs.NAME.KEY=VALUE."
            )
    members, of_run = _members(rest, {name: [w for _, w in each] for name, each in own.items()})
    option = "+".join(names).replace("/", "_")
    env = {"name": option, "id": "", "takes_data": False, "kwargs": {}}
    node = {"env": env, "mix": {"weights": weights, "envs": members}}
    ConfigStore.instance().store(group="env", name=option, node=node, package="_global_")
    added = [*of_run, *_bounds(members)]
    replaced = [*listed, *about, *(word for word in rest if _of_member(word))]
    _typed[f"env={option}"] = replaced, {key_of(word) for word in added}
    made: list[str] = []
    for word in words:  # in place: Hydra takes no settings behind a flag that follows settings
        if word in listed:
            made += [f"env={option}", *added]
        elif word not in replaced:
            made.append(word)
    return made


def as_typed(words: Sequence[str]) -> list[str]:
    """Returns a command line's words as the user gave them to `mixed_words`."""
    typed, added = next((_typed[word] for word in words if word in _typed), ([], set()))
    return [*typed, *(word for word in words if word not in _typed and key_of(word) not in added)]


def _names(word: str) -> list[str]:
    """Returns the environments in a word ``env=[NAME,NAME]``.

    Raises:
        ConfigError: there is none, or one is named twice.
    """
    names = [name.strip(" '\"") for name in word.partition("=")[2].strip("[] ").split(",")]
    names = [name for name in names if name]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not names or twice is not None:
        what = "no environment" if twice is None else f"{twice} twice"
        raise ConfigError(
            f"{word} names {what}.\nName each once; mix.weights={{NAME: 2}} gives one more draws."
        )
    return names


def _check(words: Sequence[str], names: Sequence[str]) -> None:
    """Refuses words that leave open which environment is meant.

    Raises:
        ConfigError: names the word and its form in a mixture.
    """
    for word in words:
        key = key_of(word)
        if key.lstrip("~").partition(".")[0] in ("env", "data"):
            raise ConfigError(
                f"'{key}' leaves open which environment of env=[{','.join(names)}] is meant.\n"
                f"Write mix.envs.{names[0]}.{word.lstrip('+')}, and likewise for the others."
            )


def _of_member(word: str) -> bool:
    """Tells whether a word sets something that belongs to environments: it is for all of them."""
    key = key_of(word)
    return key != "rollout.concurrency" and any(
        f"{key}.".startswith(f"{section}.") for section in SECTIONS
    )


def _own_words(about: Sequence[str], name: str) -> list[tuple[str, str]]:
    """Returns the words of one environment, as given and as in a run of it alone.

    Raises:
        ConfigError: one is not a setting that an environment has of its own.
    """
    prefix, found = f"mix.envs.{name}.", []
    for word in about:
        key, equals, value = word.partition("=")
        plain = key.lstrip("+~")
        if not plain.startswith(prefix):
            continue
        own = plain.removeprefix(prefix)
        if own == "env" or not equals or not _of_member(own):
            raise ConfigError(
                f"'{plain}': an environment has no {own} of its own.\n"
                f"It has {', '.join(SECTIONS)}; all else is the run's: {own}=VALUE."
            )
        sign = key[: len(key) - len(plain)]
        found.append((word, f"{sign}{own}={value}"))
    return found


def _weights(about: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Returns the weight of each environment, 1 by default.

    Raises:
        ConfigError: the words weigh an environment that is not in the mixture, or cannot be read.
    """
    given: dict[str, Any] = {}
    parser = OverridesParser.create()
    for word in about:
        key = key_of(word)
        if key == "mix.weights" or key.startswith("mix.weights."):
            try:
                value: Any = parser.parse_override(f"_={word.partition('=')[2]}").value()
            except HydraException as error:
                raise ConfigError(
                    f"{word} cannot be read.\nWrite 'mix.weights={{{names[0]}: 2}}'."
                ) from error
            name = key.removeprefix("mix.weights").lstrip(".")
            value = {name: value} if name else value
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"mix.weights must name environments, got {value}.\n"
                    f"Write 'mix.weights={{{names[0]}: 2}}'."
                )
            given.update({str(each): weight for each, weight in value.items()})
    for name in given:
        if name not in names:
            hint = suggestion(name, names)
            raise ConfigError(
                f"mix.weights.{name}: the mixture has no such environment.\n"
                f"{hint}It has {', '.join(names)}."
            )
    return {name: given.get(name, 1.0) for name in names}


def _members(
    words: Sequence[str], own: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Any], list[str]]:
    """Composes each environment's settings.

    With a model of the user's, they are those of ``env=NAME`` with that model. The embedded models
    are made for one task each, so that with these an environment keeps what its own brings.

    Args:
        words: the run's, without the mixture's.
        own: those of each environment.

    Returns:
        The settings by name, and words that complete the run's: its model, if none is given.

    Raises:
        ConfigError: no model is given and the environments bring several, or a setting is wrong.
    """
    shared = [word for word in words if _of_member(word)]
    places = place_words(words)
    choices = [word for word in words if key_of(word) in ("model", "recipe")]
    of_run = ["data=none"]
    if not choices:
        brought = {name: _composed([f"env={name}", *places])[1]["model"] for name in own}
        if len(set(brought.values())) > 1:
            told = ", ".join(f"{name} with {model}" for name, model in brought.items())
            advice = "model=generalist" if "generalist" in options_of("model") else "model=NAME"
            raise ConfigError(
                f"each of these environments comes with a model of its own: {told}.\n"
                f"Choose one student for all: {advice}."
            )
        of_run.append(f"model={next(iter(brought.values()))}")
    played_word = [word for word in words if key_of(word) == "evaluation.tasks"]
    run, chosen = _composed([*choices, *played_word, *of_run, *places])
    model = [] if "toy" in run else [f"model={chosen['model']}", *choices]
    model = list({key_of(word): word for word in model}.values())
    played = bool(run.evaluation.tasks)
    members = {}
    for name, mine in own.items():
        try:
            its = [f"env={name}", *model, *_overridden(shared, mine), *mine, *places]
            composed, _ = _composed(its)
            if not composed.env.takes_data:
                refuse_data(mine, name)
            members[name] = _plain(composed, name, played)
        except ConfigError as error:
            text = str(error)
            raise ConfigError(
                text if text.startswith("these") else f"mix.envs.{name}: {text}"
            ) from error
    return members, of_run


def _overridden(shared: Sequence[str], own: Sequence[str]) -> list[str]:
    """Returns the words for all environments that one does not set itself."""
    keys = {key_of(word) for word in own}
    return [word for word in shared if key_of(word) not in keys]


def _composed(words: Sequence[str]) -> tuple[DictConfig, Mapping[str, str]]:
    """Composes a run; returns it with the options of its groups."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            found = compose("train", list(words), return_hydra_config=True)
            chosen = dict(found.hydra.runtime.choices)
            OmegaConf.set_struct(found, False)
            del found["hydra"]
            return found, chosen
    except (HydraException, OmegaConfBaseException) as error:
        told = explain(error, "train", sweeps=False)
        assert told is not None  # all errors of Hydra are explained
        raise ConfigError("\n".join(told)) from error
    finally:
        GlobalHydra.instance().clear()


def _plain(composed: DictConfig, name: str, played: bool) -> dict[str, Any]:
    """Returns an environment's sections as plain values.

    Raises:
        ConfigError: some are missing; the message names them as settings of the mixture.
    """
    held_out = composed.data.get("eval")
    if not played and held_out is not None and OmegaConf.missing_keys(held_out):
        composed.data.eval = None  # it is not needed, so its path may be missing
    parts = [section.partition(".")[0] for section in SECTIONS]
    missing = [
        f"mix.envs.{name}.{key}"
        for key in sorted(OmegaConf.missing_keys(composed))
        if key.partition(".")[0] in parts
    ]
    if missing:
        raise ConfigError(f"these settings must be given: {', '.join(missing)}")
    values: dict[str, Any] = {
        part: OmegaConf.to_container(composed[part], resolve=True, throw_on_missing=True)
        for part in parts
    }
    values["evaluation"] = {"max_turns": values["evaluation"]["max_turns"]}
    values["rollout"].pop("concurrency", None)  # of all environments together
    return values


def _bounds(members: Mapping[str, Any]) -> list[str]:
    """Returns the words that set the run's own limits to bounds over its environments."""
    every = list(members.values())
    words = [
        f"rollout.{key}={str(bound(each['rollout'][key] for each in every)).lower()}"
        for key, bound in _BOUNDS.items()
    ]
    for part in ("prompt", "observation"):
        for key, bound in (("min_pixels", min), ("max_pixels", max)):
            value = bound(each["pixels"][part][key] for each in every)
            words.append(f"pixels.{part}.{key}={value}")
    turns = max(each["evaluation"]["max_turns"] for each in every)
    return [*words, f"evaluation.max_turns={turns}"]
