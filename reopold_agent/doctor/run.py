"""Checks the parts of a run: models, data, environment, plugins, judge and trackers."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from reopold_agent.config import ModelConfig, TrainConfig, model_key
from reopold_agent.doctor.base import Finding, Status
from reopold_agent.doctor.hub import cached, hub_token, is_hub_id, is_offline, reach
from reopold_agent.doctor.machine import cannot_connect
from reopold_agent.envs.from_config import make_env, num_tasks
from reopold_agent.envs.registration import task_seed
from reopold_agent.envs.spaces import parts_of
from reopold_agent.errors import ConfigError, ReopoldError
from reopold_agent.policies.architecture import find_architecture
from reopold_agent.registry import Registry
from reopold_agent.train.teachers import run_teachers

REGISTRIES = {
    "envs": "reopold_agent.envs:ENVS",
    "tools": "reopold_agent.tools:TOOLS",
    "judges": "",  # two registries share this group, so neither rejects a plugin
    "objectives": "reopold_agent.objectives:OBJECTIVES",
    "policies": "reopold_agent.policies.registry:POLICIES",
    "trackers": "reopold_agent.tracking.trackers.base:TRACKERS",
}
"""Registries of plugins by entry-point group (``reopold_agent.envs`` and so on)."""


def plugins() -> Iterator[Finding]:
    """Checks that plugins of other packages load."""
    points = {
        (point.group, point.name): (point, str(package.metadata["Name"]))
        for package in metadata.distributions()
        for point in package.entry_points
        if point.group.startswith("reopold_agent.")
    }
    for _, (point, owner) in sorted(points.items()):
        text = f"{point.name} ({point.group}) of {owner}"
        group = point.group.removeprefix("reopold_agent.")
        if group not in REGISTRIES:
            known = [f"reopold_agent.{each}" for each in REGISTRIES]
            close = difflib.get_close_matches(point.group, known)
            hint = f"; did it mean {close[0]}?" if close else ""
            yield Finding("plugins", "warning", f"{text}: there is no such group{hint}",
                          f"Tell the authors of {owner}, or: pip uninstall {owner}")  # fmt: skip
            continue
        try:
            point.load()
            rejected = _rejection(group, point.name)
        except (Exception, SystemExit) as error:  # third-party code may do anything
            yield Finding("plugins", "problem", f"{text} does not load: {type(error).__name__}: "
                          f"{error}", f"pip install --upgrade {owner}, or: pip uninstall {owner}",
                          )  # fmt: skip
            continue
        if rejected:
            yield Finding("plugins", "problem", f"{text} is not used: {rejected}",
                          f"Tell the authors of {owner}, or: pip uninstall {owner}")  # fmt: skip
        else:
            yield Finding("plugins", "ok", f"{text} loads")
    if not points:
        yield Finding("plugins", "info", "none installed")


def _rejection(group: str, name: str) -> str:
    """Returns why the group's registry rejects a plugin that loads; empty if it accepts it."""
    module, _, attribute = REGISTRIES[group].partition(":")
    if not module:
        return ""
    registry: Registry[Any] = getattr(import_module(module), attribute)
    registry.load_plugins()
    return registry.failures.get(name, "")


def models_of(config: TrainConfig) -> dict[str, ModelConfig]:
    """Returns the models that the run reads, by role."""
    found: dict[str, ModelConfig] = {"student": config.model.student}
    return {**found, **{teacher.role: teacher.model for teacher in run_teachers(config)}}


def downloads(config: TrainConfig) -> list[tuple[str, float]]:
    """Returns the hub models that must be downloaded, with their bytes in half precision."""
    found = []
    for spec in {m.path: m for m in models_of(config).values()}.values():
        if is_hub_id(spec.path) and cached(spec.path, "models", spec.revision) is None:
            try:
                size = 2.0 * find_architecture(spec.path).parameters
            except ConfigError:
                continue
            found.append((spec.path, size))
    return found


def models(config: TrainConfig) -> Iterator[Finding]:
    """Checks that each model is complete, and that student and teacher use the same token ids."""
    here: dict[str, str] = {}
    for role, spec in models_of(config).items():
        snapshot = cached(spec.path, "models", spec.revision) if is_hub_id(spec.path) else None
        if is_hub_id(spec.path) and snapshot is None:
            yield _not_cached(role, spec.path, "models", spec.revision)
        else:
            here[role] = spec.path if snapshot is None else str(snapshot)
    if here:
        yield from _read_models(config, here)


def _read_models(config: TrainConfig, here: dict[str, str]) -> Iterator[Finding]:
    """Reads all but the weights of models on this machine; ``here`` maps roles to paths."""
    # Imported here because they import transformers and PyTorch, which takes seconds.
    from reopold_agent.policies.loading import (
        ModelSpec,
        Processing,
        load_processing,
        resolve_path,
    )
    from reopold_agent.policies.registry import reads_weights
    from reopold_agent.rollout.checks import checked_runner
    from reopold_agent.train.vocabularies import check_fit

    ready: dict[str, Processing] = {}
    served = {each.role for each in run_teachers(config) if not reads_weights(each.policy)}
    for role, path in here.items():
        spec = models_of(config)[role]
        plain = ModelSpec(
            path,
            trust_remote_code=spec.trust_remote_code,
            chat_template=config.model.chat_template if role == "student" else None,
        )
        try:
            ready[role] = load_processing(plain, role, weights=role not in served)
        except ReopoldError as error:
            first, _, advice = str(error).partition("\n")
            if path != spec.path:
                advice = _download(spec.path, "models", model_key(role, "path"))
            yield Finding("models", "problem", first, advice)
            continue
        tokens = len(ready[role].tokenizer)
        where = resolve_path(path) if path == spec.path else f"the cache, {path}"
        yield Finding("models", "ok", f"{role} {spec.path}: complete, {tokens} tokens, in {where}")
    if "student" in ready:
        try:
            for member in config.members.values():
                checked_runner(member, ready["student"]).close()
        except ReopoldError as error:
            first, _, advice = str(error).partition("\n")
            yield Finding("models", "problem", first, advice)
    for teacher in run_teachers(config):
        if "student" not in ready or teacher.role not in ready:
            continue
        check_fit(config, teacher, ready["student"], ready[teacher.role])
        how = "map the same ids to the same tokens"
        if teacher.model.align is not None:
            how = f"have tokens that can be aligned by {teacher.model.align}"
        yield Finding("models", "ok", f"student and {teacher.role} {how}")


def servers(config: TrainConfig) -> Iterator[Finding]:
    """Checks that the servers of remote models answer."""
    policies = {"student": config.policy.student, "teacher": config.policy.teacher}
    policies.update({each.role: each.policy for each in run_teachers(config)})
    if config.model.teachers is not None:
        del policies["teacher"]
    for role, settings in policies.items():
        for address in settings.get("urls") or ():
            parts = urlsplit(str(address))
            port = parts.port or (443 if parts.scheme == "https" else 80)
            text = f"{role}'s server {parts.scheme}://{parts.hostname}:{port}"
            if error := cannot_connect(parts.hostname or "", port):
                yield Finding("servers", "problem", f"{text} does not answer: {error}",
                              "Start it there: python -m reopold_agent.serve model=DIR, or change "
                              f"policy.{role.replace('teacher ', 'teachers.')}.urls")  # fmt: skip
            else:
                yield Finding("servers", "ok", f"{text} answers")


def data(config: TrainConfig) -> Iterator[Finding]:
    """Checks that data sets from the hub are cached or can be downloaded."""
    for member in config.members.values():
        yield from _data(member)


def _data(config: TrainConfig) -> Iterator[Finding]:
    for split, spec in _hub_data(config).items():
        path = str(spec["path"])
        if cached(path, "datasets", spec.get("revision")) is None:
            yield _not_cached(split, path, "datasets", spec.get("revision"))
        else:
            yield Finding("data", "ok", f"{split} {path}: in the cache")


def environment(config: TrainConfig) -> Iterator[Finding]:
    """Checks that the environment can be made and shows its first task with its pictures.

    Nothing is downloaded: data sets from the hub must be cached.
    """
    for name, member in config.members.items():
        yield from _environment(name, member)


def _environment(env_name: str, config: TrainConfig) -> Iterator[Finding]:
    here: dict[str, Any] = {}
    for split, spec in _hub_data(config).items():
        snapshot = cached(str(spec["path"]), "datasets", spec.get("revision"))
        if snapshot is None:
            yield Finding("environment", "info", f"not checked: {spec['path']} is not cached")
            return
        here[split] = {**spec, "path": str(snapshot)}
    env = make_env(replace(config, data=replace(config.data, **here)))
    try:
        for split in config.splits:
            count = num_tasks(env, split)
            options = {"split": split, "index": 0}
            observation, info = env.reset(seed=task_seed(split, 0), options=options)
            parts = parts_of(observation)
            sizes = [f"{p.shape[1]}x{p.shape[0]}" for p in parts if not isinstance(p, str)]
            shown = f"pictures {', '.join(sizes)}" if sizes else "no picture"
            name = info.get("task_id", 0)
            text = f"{env_name}, {split}: {count} tasks; the first ({name}) has {shown}"
            status: Status = "ok" if observation in env.observation_space else "warning"
            advice = "" if status == "ok" else "Its observation is not in its observation_space."
            yield Finding("environment", status, text, advice)
    finally:
        env.close()


def keys(judge: dict[str, Any], config: TrainConfig, online: bool) -> Iterator[Finding]:
    """Checks that keys are set, without showing them.

    Args:
        judge: settings of the judge, as `reopold_agent.evaluate` composes them.
        config: the run's configuration.
        online: ask the judge's service whether it accepts the key.
    """
    from reopold_agent.doctor.judges import judge_findings

    yield from judge_findings(judge, online)
    text = "set" if hub_token() else "not set"
    yield Finding("keys", "info", f"Hugging Face token: {text} (gated repositories need one)")
    wandb = config.tracking.get("wandb")
    if isinstance(wandb, dict) and wandb.get("mode") != "offline":
        home = Path.home() / ".netrc"
        there = os.environ.get("WANDB_API_KEY") or (
            home.is_file() and "wandb" in home.read_text("utf-8", "replace")
        )
        if there or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
            yield Finding("keys", "ok", "Weights & Biases: set, or offline")
        else:
            yield Finding("keys", "problem", "Weights & Biases: no key",
                          "wandb login, or tracking.wandb.mode=offline")  # fmt: skip


def _hub_data(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Returns the data specifications, by split, that refer to the hub."""
    if not config.env.takes_data:
        return {}
    specs = {split: getattr(config.data, split) or {} for split in config.splits}
    return {split: spec for split, spec in specs.items() if is_hub_id(str(spec.get("path") or ""))}


def _not_cached(who: str, name: str, kind: str, revision: str | None) -> Finding:
    """Reports whether a hub repository that is not cached can be downloaded."""
    models = kind == "models"
    area = "models" if models else "data"
    setting = model_key(who, "path") if models else f"data.{who}.path"
    if is_offline():
        text = f"{who} {name}: not in the cache, and HF_HUB_OFFLINE forbids downloading it"
        return Finding(area, "problem", text, _download(name, kind, setting))
    there, why, advice = reach(name, "models" if models else "datasets", revision)
    status: Status = "ok" if there else "problem"
    hint = advice or ("" if there else _download(name, kind, setting))
    return Finding(area, status, f"{who} {name}: {why}", hint)


def _download(name: str, kind: str, setting: str) -> str:
    flag = "" if kind == "models" else " --repo-type dataset"
    folder = f"{'models' if kind == 'models' else 'data'}/{name.rpartition('/')[2]}"
    return (
        f"Where there is network access: hf download {name}{flag} --local-dir {folder}; then "
        f"{setting}={folder}"
    )
