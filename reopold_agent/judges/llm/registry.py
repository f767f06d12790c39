"""Makes judges from a configuration, by name.

Other packages add judges through the entry-point group ``reopold_agent.judges``. Graders, which
decide by rule and are chosen by environments (`reopold_agent.judges.JUDGES`), share this group,
so an entry point should name a module that registers its judges and graders on import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from reopold_agent.common.files import cache_folder
from reopold_agent.common.secrets import key_from_environment
from reopold_agent.errors import ConfigError, suggestion
from reopold_agent.judges.llm.base import Backend, Price, ProseJudge
from reopold_agent.judges.llm.cache import ReplyCache
from reopold_agent.judges.llm.gemini import KEY_VARIABLES, GeminiBackend, gemini_key
from reopold_agent.judges.llm.gemini_types import GeminiSettings
from reopold_agent.judges.llm.judge import LlmJudge
from reopold_agent.judges.llm.limits import Limits
from reopold_agent.judges.llm.local import LocalBackend, LocalSettings
from reopold_agent.judges.llm.none import NoJudge
from reopold_agent.judges.registry import Judge
from reopold_agent.registry import Registry

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgeMaker:
    """A named way to make a judge.

    Attributes:
        name: the name in ``judge=NAME``.
        make: makes the judge from its settings (the configuration without ``name``).
    """

    name: str
    make: Callable[[Mapping[str, Any]], ProseJudge]


class _LlmJudges(Registry[JudgeMaker]):
    def _add_loaded(self, name: str, thing: object) -> None:
        if not isinstance(thing, Judge):  # graders share the group; their registry takes them
            super()._add_loaded(name, thing)


LLM_JUDGES: Registry[JudgeMaker] = _LlmJudges("judge", "reopold_agent.judges", JudgeMaker)


def make_judge(config: Mapping[str, Any]) -> ProseJudge:
    """Makes the judge of a configuration ``{"name": "gemini", ...settings}``.

    Without a key, ``gemini`` becomes a judge that decides nothing and counts its requests.

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


def judge_of(backend: Backend, settings: Mapping[str, Any], **defaults: Any) -> ProseJudge:
    """Makes a judge of a backend and the common settings (limits, cache, price).

    Other packages use it too: they write a `Backend` and register a `JudgeMaker` whose ``make``
    returns the result of this function.

    Args:
        backend: sends prompts to the model.
        settings: the user's settings, without those of the backend itself.
        defaults: the provider's defaults of common settings, such as ``concurrency=1``.
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
    """Returns the file of the setting ``cache``; "auto" is one file for all runs of the user."""
    if setting is None:
        return None
    if not isinstance(setting, (str, Path)) or not str(setting):
        raise ConfigError(f"judge.cache={setting!r} must be a file, 'auto' or null")
    if setting == "auto":
        return cache_folder() / "judge.sqlite"
    return Path(setting).expanduser()


def settings_of(kind: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    """Returns a dataclass of checked settings.

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
        raise ConfigError(
            f"judge.{prefix}{name} is not known. {suggestion(name, known)}"
            f"Known: {', '.join(sorted(known))}."
        )
    hints = get_type_hints(kind)
    for name, each in known.items():
        if name not in given or given[name] == "???":  # Hydra's mark for a mandatory setting
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


def _gemini(settings: Mapping[str, Any]) -> ProseJudge:
    mine, common = _split(GeminiSettings, settings)
    endpoint, sdk = common.pop("endpoint", None), common.pop("sdk", "auto")
    checked = settings_of(GeminiSettings, mine)
    key = gemini_key()
    if not key:
        reason = f"no key: {' or '.join(KEY_VARIABLES)} is not set"
        _log.warning(
            "judge=gemini: %s. Only the rules decide; the rows for a judge are counted.", reason
        )
        return NoJudge(f"gemini:{checked.model}", reason)
    backend = GeminiBackend(checked, key, endpoint=endpoint, sdk=sdk)
    return judge_of(backend, common)


def _openai_compatible(settings: Mapping[str, Any]) -> ProseJudge:
    # Imported here: httpx takes a tenth of a second, and other judges do not need it.
    from reopold_agent.judges.llm.openai_compatible import ChatBackend, ChatSettings

    mine, common = _split(ChatSettings, settings)
    variable = common.pop("key_env", "OPENAI_API_KEY")
    key = key_from_environment([variable] if variable else [])
    backend = ChatBackend(settings_of(ChatSettings, mine), key, str(variable))
    return judge_of(backend, common)


def _local(settings: Mapping[str, Any]) -> ProseJudge:
    mine, common = _split(LocalSettings, settings)
    backend = LocalBackend(settings_of(LocalSettings, mine))
    # The model runs one prompt at a time; the first one waits until it is loaded.
    return judge_of(backend, common, concurrency=1, timeout=1800.0, deadline=1800.0, attempts=1)


def _none(settings: Mapping[str, Any]) -> ProseJudge:
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
