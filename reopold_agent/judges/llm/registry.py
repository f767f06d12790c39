"""Judges by name, and making one from a configuration.

Other packages add theirs by the entry-point group ``reopold_agent.judges``. It is also the group
of graders (`reopold_agent.judges.JUDGES`, which decide by rule and are chosen by environments), so
an entry point should point to a module whose import registers what it has, in either.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from reopold_agent.errors import ConfigError
from reopold_agent.judges.llm.base import Backend, Judge, Price
from reopold_agent.judges.llm.cache import ReplyCache
from reopold_agent.judges.llm.gemini import KEY_VARIABLES, GeminiBackend, GeminiSettings, gemini_key
from reopold_agent.judges.llm.judge import LlmJudge
from reopold_agent.judges.llm.limits import Limits
from reopold_agent.judges.llm.local import LocalBackend, LocalSettings
from reopold_agent.judges.llm.none import NoJudge
from reopold_agent.judges.llm.openai_compatible import ChatBackend, ChatSettings
from reopold_agent.judges.llm.redact import key_from_environment
from reopold_agent.judges.registry import Judge as Grader
from reopold_agent.registry import Registry

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgeMaker:
    """How a judge is made.

    Attributes:
        name: as ``judge=NAME`` selects it.
        make: makes it of its settings (the configuration without ``name``).
    """

    name: str
    make: Callable[[Mapping[str, Any]], Judge]


class _LlmJudges(Registry[JudgeMaker]):
    def _take(self, name: str, thing: object) -> None:
        if not isinstance(thing, Grader):  # the group's other kind; the other registry takes it
            super()._take(name, thing)


LLM_JUDGES: Registry[JudgeMaker] = _LlmJudges("judge", "reopold_agent.judges", JudgeMaker)


def make_judge(config: Mapping[str, Any]) -> Judge:
    """The judge of a configuration: ``{"name": "gemini", ...settings}``.

    Without a key, ``gemini`` becomes a judge that decides nothing and counts what it is asked.

    Raises:
        UnknownNameError: no judge has that name.
        ConfigError: a setting is unknown, missing or out of range.
        MissingExtraError: its package is not installed.
    """
    settings = {str(key): value for key, value in config.items()}
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError("judge.name is missing; known: " + ", ".join(LLM_JUDGES.names()))
    return LLM_JUDGES.get(name).make(settings)


def judge_of(backend: Backend, settings: Mapping[str, Any], **defaults: Any) -> Judge:
    """A judge over a backend, with the common settings (limits, cache, price).

    For other packages too: write a `Backend`, register a `JudgeMaker` whose ``make`` ends here.

    Args:
        backend: the way to the model.
        settings: the user's; what the backend itself takes is no longer among them.
        defaults: this provider's own, where the settings say nothing: ``concurrency=1``.
    """
    common = {**defaults, **settings}
    cache, longest = common.pop("cache", "auto"), common.pop("longest_response", 32_000)
    price = common.pop("price", None)
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 100:
        raise ConfigError(f"judge.longest_response={longest} must be an integer >= 100")
    if price is not None and not isinstance(price, Mapping):
        raise ConfigError("judge.price must have input_per_million and output_per_million")
    path = cache_path(cache)
    limits = settings_of(Limits, common)
    return LlmJudge(
        backend,
        limits,
        cache=None if path is None else ReplyCache(path),
        price=None if price is None else settings_of(Price, price, "price."),
        longest_response=longest,
    )


def cache_path(setting: object) -> Path | None:
    """The file of the setting ``cache``: "auto" is one for all runs of the user."""
    if setting is None:
        return None
    if not isinstance(setting, (str, Path)) or not str(setting):
        raise ConfigError(f"judge.cache={setting!r} must be a file, 'auto' or null")
    if setting == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "reopold-agent" / "judge.sqlite"
    return Path(setting).expanduser()


def settings_of(kind: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    """A dataclass of settings, checked.

    Raises:
        ConfigError: a name is unknown (with the closest match), missing, or of another type.
    """
    known: dict[str, Field[Any]] = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name in known:
            continue
        if "key" in name:
            raise ConfigError(
                f"judge.{prefix}{name}: keys are read from the environment, because settings are "
                "recorded"
            )
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ConfigError(
            f"judge.{prefix}{name} is not known.{hint} Known: {', '.join(sorted(known))}."
        )
    hints = get_type_hints(kind)
    for name, each in known.items():
        if name not in given or given[name] == "???":  # Hydra's mark for what must be given
            if each.default is MISSING and each.default_factory is MISSING:
                raise ConfigError(f"judge.{prefix}{name} must be given")
        elif not _fits(given[name], hints[name]):
            raise ConfigError(f"judge.{prefix}{name}={given[name]!r} must be {_plain(hints[name])}")
    return kind(**given)


def _fits(value: object, hint: Any) -> bool:
    kinds = getattr(hint, "__args__", (hint,))
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, tuple(kinds))


def _plain(hint: Any) -> str:
    names = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false"}
    kinds = getattr(hint, "__args__", (hint,))
    return " or ".join(names.get(kind.__name__, "null") for kind in kinds)


def _split(kind: type[Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {each.name for each in fields(kind)}
    mine = {key: value for key, value in settings.items() if key in own}
    return mine, {key: value for key, value in settings.items() if key not in own}


def _gemini(settings: Mapping[str, Any]) -> Judge:
    mine, common = _split(GeminiSettings, settings)
    endpoint, sdk = common.pop("endpoint", None), common.pop("sdk", "auto")
    checked = settings_of(GeminiSettings, mine)
    key = gemini_key()
    if not key:
        reason = f"no key: {' or '.join(KEY_VARIABLES)} is not set"
        _log.warning("judge=gemini: %s. Rules decide alone; the rows are counted.", reason)
        return NoJudge(f"gemini:{checked.model}", reason)
    backend = GeminiBackend(checked, key, endpoint=endpoint, sdk=sdk)
    return judge_of(backend, common)


def _openai_compatible(settings: Mapping[str, Any]) -> Judge:
    mine, common = _split(ChatSettings, settings)
    variable = common.pop("key_env", "OPENAI_API_KEY")
    key = key_from_environment([variable] if variable else [])
    backend = ChatBackend(settings_of(ChatSettings, mine), key, str(variable))
    return judge_of(backend, common)


def _local(settings: Mapping[str, Any]) -> Judge:
    mine, common = _split(LocalSettings, settings)
    backend = LocalBackend(settings_of(LocalSettings, mine))
    # One prompt at a time on this machine; the first one waits for the model to be loaded.
    return judge_of(backend, common, concurrency=1, timeout=1800.0, deadline=1800.0, attempts=1)


def _none(settings: Mapping[str, Any]) -> Judge:
    if settings:
        raise ConfigError(f"judge=none takes no settings, but got {', '.join(settings)}")
    return NoJudge()


for _name, _make in {
    "gemini": _gemini,
    "openai_compatible": _openai_compatible,
    "local": _local,
    "none": _none,
}.items():
    LLM_JUDGES.register(_name, JudgeMaker(_name, _make))
