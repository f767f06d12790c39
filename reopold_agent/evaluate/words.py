"""Prepares the words of ``reopold evaluate`` for Hydra: benchmarks, checkpoint, environments.

An environment's settings are those of ``reopold train env=NAME``: its own configuration, or that of
the run whose student is evaluated, and then the command line's.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reopold_agent.cli.groups import (
    SEVERAL,
    check_once,
    options_of,
    place_words,
    prepare_groups,
    refuse_data,
    searched,
)
from reopold_agent.cli.messages import dotted, explain
from reopold_agent.config import DataConfig, EvaluationConfig, build
from reopold_agent.data import load_tasks
from reopold_agent.data.fingerprint import tasks_digest
from reopold_agent.errors import ConfigError, DataError, ReopoldError, suggestion
from reopold_agent.tracking.run_folder import run_settings

_log = logging.getLogger(__name__)

SECTIONS = ("env", "data", "pixels", "rollout", "sampling", "evaluation")
"""Sections of a training run's settings that also say how its held-out tasks are played."""

TRAINING_ONLY = {
    "data.train": "the tasks are those of data.eval",
    "data.demonstrations": "the tasks are those of data.eval",
    "rollout.max_turns": "use evaluation.max_turns, the held-out tasks' limit",
    "evaluation.every": "an evaluation has no steps",
    "evaluation.curve_tasks": "use evaluation.tasks",
    "evaluation.teacher": "evaluate the teacher with model=",
}
"""Settings of these sections that an evaluation does not have, with a reason or what to use."""

_OF_ENVIRONMENTS = ("env", "data", "rollout", "evaluation", "model")
"""Sections that no benchmark has."""

_STUDENT = "model.student."
"""Prefix of the training settings that name a checkpoint: ``path`` and ``revision``."""

_LISTS = ("benchmark", "env", *SEVERAL)
"""Settings that may be lists."""


def prepared_words(words: Sequence[str]) -> list[str]:
    """Returns the arguments for Hydra.

    ``model=`` is a checkpoint here, but a Hydra group in training: it is passed on as
    ``checkpoint=``. The settings of the environments that ``env=`` names are composed and passed on
    as the section ``environments``.

    Raises:
        ConfigError: a word sets a benchmark that does not exist or a setting that an environment
            does not have, or a setting is given twice.
        UnknownNameError: there is no such environment or option; suggests the closest.
    """
    check_once(words, _LISTS)
    words = searched(words)
    places = place_words(words)
    _check_benchmarks(words)
    names = _listed(words, "env")
    if not names:
        for word in words:
            if _section(word) in _OF_ENVIRONMENTS and _key(word) not in ("env", "model"):
                raise ConfigError(
                    f"'{_key(word)}' is a setting of an environment.\nName the environment too "
                    "(env=NAME), or leave it out."
                )
        return [_addable(_checkpoint(word)) for word in words if _key(word) != "env"]
    groups, keys, rest = _divided(words)
    prepare_groups([*(f"env={name}" for name in names), *groups, *places], "train")
    checkpoint = _value(keys, f"{_STUDENT}path") or _value(rest, "checkpoint")
    bases = {
        name: _base(name, _composed("train", [f"env={name}", *groups, *places]), groups, checkpoint)
        for name in names
    }
    if not any(base["env"]["takes_data"] for base in bases.values()):
        refuse_data((*groups, *keys), names[0])
    settings = {name: _settings(name, bases[name], keys, places) for name in names}
    for name, each in settings.items():
        _warn_of_rows(checkpoint, name, each)
    students = {name: each.pop("model")["student"] for name, each in settings.items()}
    if _value(rest, "checkpoint") is None:
        rest = [*_default_checkpoint(students, rest), *rest]
    ConfigStore.instance().store(group="environments", name="chosen", node=settings)
    rest = [_addable(word) for word in rest]
    return ["+environments=chosen", *rest]  # first: nothing may follow Hydra's flags


def how_to_add(name: str) -> str:
    """Returns the word that adds a benchmark to the command line."""
    return f"'+benchmarks.{name}={{path: DIR, format: FORMAT}}'"


def shipped_benchmarks() -> dict[str, Any]:
    """Returns the entries of ``configs/benchmarks/all.yaml``."""
    entries: dict[str, Any] = configuration("benchmarks/all.yaml")
    return entries


@cache
def configuration(file: str) -> Any:
    """Returns the values of a file of ``configs``, which is read once; they must not be changed."""
    return yaml.safe_load((resources.files("reopold_agent") / "configs" / file).read_text("utf-8"))


def _check_benchmarks(words: Sequence[str]) -> None:
    """Checks the names of benchmarks and environments where one may be taken for the other."""
    shipped = shipped_benchmarks()
    suites = {entry["suite"] for entry in shipped.values()}
    keys = [_key(word) for word in words]
    known = {*shipped, *(_benchmark(key) for key in keys if key.startswith("+"))}
    for key in keys:
        if key.startswith("benchmarks.") and _benchmark(key) not in known:
            hint = suggestion(_benchmark(key), sorted(known), prefix="benchmarks.", cutoff=0.7)
            raise ConfigError(
                f"'{key}': there is no benchmark '{_benchmark(key)}'.\n"
                f"{hint}One of your own is added with +: {how_to_add(_benchmark(key))}"
            )
    chosen = {which: _listed(words, which) for which in ("benchmark", "suite", "env")}
    touched = {_benchmark(key) for key in keys if key.lstrip("+").startswith("benchmarks.")}
    if not any(chosen.values()) and touched <= set(shipped) - {"demo"} and touched:
        named = ",".join(sorted(touched))
        raise ConfigError(
            f"benchmarks.{min(touched)} is set, but nothing says what to evaluate.\n"
            f"Add benchmark=[{named}], or leave it out."
        )
    places = {"benchmark": known, "suite": suites}
    if any(set(chosen[which]) - places[which] for which in places) or set(chosen["env"]) & known:
        prepare_groups(place_words(words), "train")  # so that environments of plugins are known
        places["env"] = set(options_of("env"))
        for which, names in chosen.items():
            for name in names:
                others = [f"{each}={name}" for each in places if name in places[each]]
                if name not in places[which] and others:
                    article = "an" if which == "env" else "a"
                    noun = "environment" if which == "env" else which
                    raise ConfigError(
                        f"'{name}' is not {article} {noun}.\nUse {' or '.join(others)}."
                    )


def _divided(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Divides words into options and settings of environments, and those of the evaluation.

    Raises:
        ConfigError: a setting matters in training only.
    """
    groups: list[str] = []
    keys: list[str] = []
    rest: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        for setting, why in TRAINING_ONLY.items():
            if f"{key.lstrip('+~')}.".startswith(f"{setting}."):
                raise ConfigError(
                    f"'{key}' does not matter in an evaluation.\nLeave it out; {why}."
                )
        option = key == "model" and value in options_of("model") and not Path(value).exists()
        if option or key == "data":
            groups.append(word)
        elif key == "model" or _section(word) not in (*SECTIONS, "model"):
            rest.append(_checkpoint(word))
        elif key != "env":
            keys.append(word)
            if _section(word) == "pixels":  # benchmarks have it too
                rest.append(word)
    return groups, keys, rest


def _base(
    name: str, composed: dict[str, Any], groups: Sequence[str], checkpoint: str | None
) -> dict[str, Any]:
    """Replaces sections of a composed training run by those of the run that made the checkpoint.

    A run of another environment changes nothing, and data that the command line chooses stays.
    """
    _, run = _run_of(checkpoint, name, composed["env"]["name"])
    data_chosen = any(_key(word) == "data" for word in groups)
    for section in SECTIONS:
        if section in run and not (data_chosen and section in ("data", "pixels")):
            composed[section] = {**composed[section], **run[section]}
    if composed["evaluation"]["tasks"] == 0:  # the run had no held-out evaluation
        composed["evaluation"]["tasks"] = EvaluationConfig.tasks
    return composed


def _settings(
    name: str, base: Mapping[str, Any], keys: Sequence[str], places: Sequence[str]
) -> dict[str, Any]:
    """Returns the sections of one environment with the command line's settings, and ``model``."""
    node = {section: dict(base[section]) for section in SECTIONS}
    train = node["data"].get("train")
    for setting in TRAINING_ONLY:
        section, _, key = setting.partition(".")
        node[section].pop(key, None)
    student = base["model"]["student"]
    node["model"] = {"student": {key: student.get(key) for key in ("path", "revision")}}
    known = {key for key, _ in dotted(node)}
    if not node["env"]["takes_data"]:
        keys = [word for word in keys if _section(word) != "data"]
    for word in keys:
        if not word.startswith(("+", "~")) and _key(word) not in known:
            hint = suggestion(_key(word), sorted(known))
            if _key(word).startswith("env.kwargs."):
                hint = f"An argument that is not set yet takes a +: '+{word}'. "
            command = shlex.join(["reopold", "evaluate", *places, f"env={name}", "--cfg", "job"])
            raise ConfigError(
                f"unknown setting '{_key(word)}' of env={name}.\n{hint}"
                f"`{command}` shows its settings (environments.{name})."
            )
    ConfigStore.instance().store(name="_environment", node=node)
    found = _composed("_environment", keys)
    missing = [key for key, value in dotted(found) if value == "???"]
    if missing and found["env"]["takes_data"]:
        raise ConfigError(f"these settings must be given: {', '.join(missing)}")
    held_out = found["data"].get("eval")
    if found["env"]["takes_data"] and held_out is None and "data" not in found["env"]["kwargs"]:
        raise ConfigError(
            f"env={name} has no held-out tasks: data.eval is null.\nChoose data with a group, "
            "data=NAME data.eval.path=DIR."
        )
    _check_held_out(name, train, held_out)
    return found


def _check_held_out(name: str, train: Any, held_out: Any) -> None:
    """Refuses an evaluation on the rows that the student is trained on."""
    if not (isinstance(train, Mapping) and isinstance(held_out, Mapping)):
        return
    if all(train.get(key) == held_out.get(key) for key in ("source", "path", "split")):
        what = held_out.get("path") or held_out.get("source")
        raise ConfigError(
            f"env={name}: data.eval is the split of {what} that training uses.\n"
            "Choose held-out rows: data.eval.path=DIR or data.eval.split=NAME."
        )


def _warn_of_rows(checkpoint: str | None, name: str, settings: Mapping[str, Any]) -> None:
    """Warns if a run's held-out rows are no longer those that it was started with.

    Args:
        checkpoint, name: as of `_run_of`.
        settings: of the environment; other rows than the run's are the user's choice.
    """
    run, before = _run_of(checkpoint, name, settings["env"]["name"])
    held_out, recorded = settings["data"].get("eval"), None
    if run is not None and held_out is not None and before["data"].get("eval") == held_out:
        told = run / "data.json"
        splits = json.loads(told.read_text("utf-8")) if told.is_file() else {}
        recorded = splits.get("eval", splits.get(f"{name}/eval"))
    if recorded is None:
        return
    key = before["model"].get("teacher_key")
    data = build(DataConfig, {**settings["data"], "train": None}).specification("eval")
    try:
        tasks = load_tasks({**(data or {}), **({} if key is None else {"teacher": key})})
    except ReopoldError:  # the evaluation will tell
        return
    if tasks_digest(tasks, key) != recorded["sha256"]:
        _log.warning(
            "warning: the rows of data.eval, %s, are not those that %s was started with.\n"
            "Its held-out success was measured on other tasks; put the rows back to compare.",
            held_out.get("path"),
            run,
        )


def _run_of(
    checkpoint: str | None, name: str, registered: str
) -> tuple[Path | None, dict[str, Any]]:
    """Returns the run whose student is evaluated and its settings; none if it has another env.

    Args:
        checkpoint: the student.
        name: the option ``env=NAME``, by which a mixture knows its environments.
        registered: its ``env.name``, which a run of one environment has.
    """
    if checkpoint is None:
        return None, {}
    folder = Path(checkpoint).expanduser().absolute()
    for run in (folder, *folder.parents[:3]):  # also RUN/final, RUN/checkpoints/step-N/model
        if (run / "metrics.jsonl").is_file() and (run / "config.yaml").is_file():
            try:
                saved = run_settings(run)
            except DataError:  # no run's
                continue
            if (saved.get("env") or {}).get("name") == registered:
                return run, saved
            of_mixture = ((saved.get("mix") or {}).get("envs") or {}).get(name)
            if of_mixture is not None:
                turns = {**saved["evaluation"], **of_mixture["evaluation"]}
                return run, {**saved, **of_mixture, "evaluation": turns}
    return None, {}


def _composed(config: str, words: Sequence[str]) -> dict[str, Any]:
    try:
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            found = OmegaConf.to_container(compose(config, list(words)), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        told = explain(error)
        assert told is not None  # all errors of Hydra are explained
        raise ConfigError("\n".join(told)) from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _default_checkpoint(students: Mapping[str, Any], rest: Sequence[str]) -> list[str]:
    """Returns words that name the checkpoint: the student that training would start from.

    Raises:
        ConfigError: the environments' students, or a benchmark's default, differ.
    """
    found = {f"env={name}": (each["path"], each["revision"]) for name, each in students.items()}
    if any(_key(word) in ("benchmark", "suite") for word in rest):
        found["benchmark="] = ("demo:student", None)
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {path}" for name, (path, _) in found.items())
        raise ConfigError(f"which checkpoint? The defaults differ: {listed}.\nGive model=DIR.")
    path, revision = next(iter(found.values()))
    words = [f"checkpoint='{path}'"]
    if revision is not None and _value(rest, "revision") is None:
        words.append(f"revision='{revision}'")
    return words


def _checkpoint(word: str) -> str:
    return f"checkpoint={word.removeprefix('model=')}" if word.startswith("model=") else word


def _addable(word: str) -> str:
    """Lets a setting of a shipped benchmark be given that its entry lacks, such as ``pixels``."""
    name, _, key = _key(word).removeprefix("benchmarks.").partition(".")
    entry = shipped_benchmarks().get(name, {}) if word.startswith("benchmarks.") else {}
    return f"++{word}" if entry and key.partition(".")[0] not in entry else word


def _listed(words: Sequence[str], key: str) -> list[str]:
    """Returns the names that a word such as ``env=[math,geometry]`` lists.

    Raises:
        ConfigError: it is not a list of names.
    """
    value = _value(words, key)
    try:
        found = yaml.safe_load(value or "")
    except yaml.YAMLError as error:
        raise ConfigError(f"'{key}={value}' is not a list of names.\nWrite {key}=[A,B].") from error
    names = [] if found is None else found if isinstance(found, list) else [found]
    if isinstance(found, str) and "," in found:
        raise ConfigError(
            f"{key}={value} has several values.\nWrite '{key}=[{value}]' for all of them."
        )
    return list(dict.fromkeys(str(name) for name in names))


def _value(words: Sequence[str], key: str) -> str | None:
    """Returns the value that the last word for the key sets; None without such a word."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    return values[-1] if values else None


def _key(word: str) -> str:
    return word.partition("=")[0]


def _section(word: str) -> str:
    return _key(word).lstrip("+~").partition(".")[0]


def _benchmark(key: str) -> str:
    """Returns the benchmark of a key such as ``+benchmarks.mine.path``."""
    return [*key.lstrip("+").split("."), ""][1]
