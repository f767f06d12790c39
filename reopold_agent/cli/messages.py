"""Turns an exception into a two-line message: what is wrong and what to do."""

from __future__ import annotations

import difflib
import errno
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from reopold_agent.config import EngineConfig, group_word
from reopold_agent.errors import ReopoldError, first_line, suggestion

_WRITE = "Choose a folder that you may write to (hydra.run.dir=FOLDER), or change its permissions."
_KIND = "A file is where a folder is needed, or vice versa: choose another path, or move it."
_FULL = "Free space or choose another disk (hydra.run.dir=FOLDER); the same command then continues."

_ADVICE_BY_ERRNO = {
    errno.EACCES: _WRITE,
    errno.EPERM: _WRITE,
    errno.EROFS: _WRITE,
    errno.ENOTDIR: _KIND,
    errno.EISDIR: _KIND,
    errno.EEXIST: _KIND,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EADDRINUSE: "Choose another port (port=0 picks a free one), or stop what listens there.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n 65536), or lower rollout.concurrency.",
    errno.ENOMEM: "Give the machine more memory, or lower batch.prompts and rollout.concurrency.",
}

_MEMORY = (
    "Lower engine.max_tokens_per_micro_batch (the update) or engine.max_tokens_per_pass, "
    "rollout.concurrency (generation), or set model.student.gradient_checkpointing=true; "
    "`reopold plan` estimates what fits."
)

_HUB = (
    "Check the network, or give a folder on this machine in place of the hub's name "
    "(model.student.path=DIR, data.train.path=DIR); gated models also need `hf auth login`."
)


def program() -> str:
    """Returns the command as the user called it, for messages."""
    first = Path(sys.argv[0])
    if first.suffix == ".py":
        module = first.parent.name if first.stem == "__main__" else first.stem
        return f"python -m reopold_agent.{module}"
    return first.name


def explain(
    error: BaseException, config: str | None = None, *, sweeps: bool = True
) -> tuple[str, str] | None:
    """Returns what is wrong and what to do; None if the error is a bug.

    Args:
        error: the exception; its causes are examined too.
        config: the command's Hydra configuration (``train`` ...), whose names are suggested.
        sweeps: whether the command knows ``--multirun``.
    """
    if isinstance(error, ReopoldError):
        return split_message(str(error))
    if _is_hydra_error(error):
        return _explain_hydra(error, config, sweeps)
    for each in _causes(error):
        if isinstance(each, ReopoldError):
            return split_message(str(each))
        if _has_class(each, "torch", "OutOfMemoryError"):
            return "the GPU's memory is full: " + first_line(each), _MEMORY
        if isinstance(each, MemoryError) or (
            isinstance(each, RuntimeError) and "DefaultCPUAllocator" in str(each)
        ):
            return "this machine's memory is full", _MEMORY
        if _is_hub_error(each):
            return f"the Hugging Face hub did not answer: {first_line(each)}", _HUB
        if isinstance(each, OSError) and each.errno in _ADVICE_BY_ERRNO:
            where = f": {each.filename}" if each.filename is not None else ""
            return f"{each.strerror}{where}", _ADVICE_BY_ERRNO[each.errno]
    return None


def split_message(message: str) -> tuple[str, str]:
    """Splits a message into what is wrong and what to do.

    The second part is what follows the first line, else the first sentence, else the first ';'.
    """
    what, line_break, rest = message.partition("\n")
    if line_break:
        return what, rest
    sentence = re.match(r"(.+?[\w'\")\]}][.])\s+(?=[A-Z])(.+)", message)
    if sentence is None:
        sentence = re.match(r"(.+?);\s+(.+)", message)
    if sentence is not None:
        # What follows ';' begins in lower case; a setting or a path there must stay as it is.
        return sentence.group(1), re.sub(r"^[a-z](?=[a-z]*[ ,])", _upper, sentence.group(2))
    return message, _all_settings_hint(None)


def _upper(letter: re.Match[str]) -> str:
    return letter.group().upper()


# Hydra


def _explain_hydra(error: BaseException, config: str | None, sweeps: bool) -> tuple[str, str]:
    text = str(error)
    overridden = re.search(r"Could not (?:override|delete|append[^']*) '([^']+)'", text)
    if type(error).__name__ == "OverrideParseException":
        return _explain_syntax(getattr(error, "override", ""), first_line(error), config)
    if overridden is not None and "already at" in text:
        return f"'{overridden.group(1)}' exists already.", "Leave out the + before it."
    if overridden is not None:
        key = overridden.group(1)
        of_group = _explain_group(key, config)
        if of_group is not None:
            return of_group
        value_error = error.__cause__ if "full_key" in text else None
        if value_error is not None and "not in struct" not in text:
            return f"{key}: {first_line(value_error)}", _all_settings_hint(config)
        if re.fullmatch(r"data\.(train|eval)\.path", key):
            from reopold_agent.cli.groups import options_of
            from reopold_agent.data.loading import EMBEDDED

            formats = [name for name in options_of("data") if name not in EMBEDDED]
            return (
                f"'{key}' needs the format of the rows: the embedded tasks have no files.",
                f"Add data=NAME. Known: {', '.join(formats)}.",
            )
        if key in {f"engine.{name}" for name, _ in dotted(asdict(EngineConfig()))}:
            return verl_only(key)
        # For key={name: value} the cause names the key below that is not there.
        unknown = str(getattr(error.__cause__, "full_key", None) or key)
        if unknown.startswith(_NAMED):
            group = ".".join(unknown.split(".")[:2])
            more = (
                f" A new name needs a + before the word: +{key}=... To replace all names, write "
                f"{group}=null before '{group}={{...}}'."
            )
            return f"unknown setting '{unknown}'.", _suggest(unknown, config) + more
        return f"unknown setting '{unknown}'.", _suggest(unknown, config)
    if text.startswith("Ambiguous value"):
        word = re.search(r"'([^']+)'", text)
        key, _, value = (word.group(1) if word else "").partition("=")
        advice = "add --multirun to run once with each." if sweeps else "give one value."
        if _takes_list(key, config):
            advice = f"write '{key}=[{value}]' for a list, or {advice}"
        return f"{key}={value} has several values.", advice[0].upper() + advice[1:]
    if "requires --multirun" in text:
        more = "Add --multirun to run once with each value." if sweeps else "Give one value."
        return first_line(error), more
    unchosen = re.match(r"You must specify '([^']+)'", text)
    if unchosen is not None:
        from reopold_agent.cli.groups import options_of

        group = unchosen.group(1)
        return f"{group}=NAME must be given.", f"Known: {', '.join(options_of(group))}."
    missing = getattr(error, "missing_cfg_file", None)
    options = getattr(error, "options", None)
    if missing and options:
        group, _, name = str(missing).rpartition("/")
        hint = suggestion(name, options)
        return f"the group '{group}' has no option '{name}'.", f"{hint}Known: {', '.join(options)}."
    key = getattr(error, "full_key", None)
    return f"{key}: {first_line(error)}" if key else first_line(error), _all_settings_hint(config)


_NAMED = ("model.teachers.", "policy.teachers.")
"""Groups to which users add settings by names of their own."""

_MAY_BE_NULL = {
    "model.teacher": "model.teachers",
    "model.teachers": "model.teacher",
    "policy.teachers": None,
    "model.student.lora": None,
}
"""Groups that may be null, and what is then set in their place."""


def _explain_group(key: str, config: str | None) -> tuple[str, str] | None:
    """Explains a key of a group that is null here, or of a teacher that is a path: it has no keys.

    Returns:
        None for other keys.
    """
    group = next((each for each in _MAY_BE_NULL if key.startswith(f"{each}.")), None)
    if group is None:
        return None
    words = [word.lstrip("+").partition("=") for word in sys.argv[1:]]
    settings = _settings(config)
    settings |= {name: value for name, _, value in words if key.startswith(f"{name}.")}
    given: dict[str, Any] = {}
    what, others = f"unknown setting '{key}'.", ""
    if settings.get(group) in (None, "null"):
        what = f"there is no '{key}', since {group} is null here."
        other = _MAY_BE_NULL[group]
        if other is not None and settings.get(other) is not None:
            what = f"{what[:-1]}, and {other} is set."
            others = f"{other}=null "
    elif group == "model.teachers" and key.count(".") > 2:
        group = ".".join(key.split(".")[:3])
        given["path"] = "PATH"
        if isinstance(settings.get(group), str):
            given["path"] = settings[group]
            what = f"there is no '{key}', since {group} is a path here."
    else:
        return None
    for name, equals, value in words:
        if equals and name.startswith(f"{group}."):
            *above, last = name.removeprefix(f"{group}.").split(".")
            place = given
            for each in above:
                place = place.setdefault(each, {})
            place[last] = value
    if group == "model.student.lora":  # peft knows no parts of most models that see
        given.setdefault("target_modules", "all-linear")
    return what, f"Set it as a whole: {others}{group_word(group, given)}."


def verl_only(key: str) -> tuple[str, str]:
    """Says that ``engine=local`` does not have a setting, and what to do."""
    return f"'{key}' is a setting of engine=verl.", "Leave it out, or use engine=verl."


def _explain_syntax(word: str, reason: str, config: str | None) -> tuple[str, str]:
    if "=" in word:
        return f"'{word}' cannot be read: {reason}", (
            "A value with spaces, commas or one of []{}()$: needs quotes for both the shell and "
            """Hydra: 'key="a value"', 'key=[1,2]'."""
        )
    for group in _groups(config):
        from reopold_agent.cli.groups import options_of

        if word in options_of(group):
            return f"'{word}' is not key=value.", f"Did you mean '{group}={word}'?"
    return f"'{word}' is not key=value.", _suggest(word.lstrip("-+~"), config)


def _suggest(key: str, config: str | None) -> str:
    """Suggests the setting or group that a mistyped key may stand for."""
    # The values of `toy` are behind settings of other names, which are the ones to set.
    settings = [name for name in _settings(config) if not name.startswith("toy.")]
    known = [*settings, *_groups(config)]
    plain = key.lstrip("+~")
    last = plain.rpartition(".")[2]
    found = difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
    found = found or [name for name in known if name.rpartition(".")[2] == last][:3]
    if not found:
        by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.7)
        found = [by_last[name] for name in close]
    hint = f"Did you mean {' or '.join(repr(name) for name in found)}? " if found else ""
    return hint + _all_settings_hint(config)


def _all_settings_hint(config: str | None) -> str:
    if config is None:
        return f"`{program()} --help` lists what is available."
    return f"`reopold {config} --cfg job` shows every setting, --help also the groups."


def _takes_list(key: str, config: str | None) -> bool:
    """Tells whether a list may be given: for some groups, and for settings with a list or null."""
    from reopold_agent.cli.groups import SEVERAL

    default = _settings(config).get(key)
    return key in SEVERAL or (key not in _groups(config) and isinstance(default, list | NoneType))


def _groups(config: str | None) -> list[str]:
    if config is None:
        return []
    from reopold_agent.cli.groups import groups_of

    return groups_of(config)


def _settings(config: str | None) -> dict[str, Any]:
    """Returns the settings and defaults that exist under the groups that the words select."""
    if config is None:
        return {}
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from reopold_agent.cli.groups import SEARCH_PATH, searched

    keys = (*_groups(config), SEARCH_PATH)
    chosen = [word for word in searched(sys.argv[1:]) if word.partition("=")[0] in keys]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            composed = OmegaConf.to_container(compose(config, chosen))
    except (HydraException, ValueError):  # a wrong group, which is not the error to report here
        return {}
    return dict(dotted(composed))


def dotted(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields settings and groups of settings with their dotted keys."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield f"{prefix}{key}", value
            yield from dotted(value, f"{prefix}{key}.")


def _is_hydra_error(error: BaseException) -> bool:
    """Tells whether Hydra or OmegaConf rejected the user's input."""
    if any(each.__module__.split(".")[0] in ("hydra", "omegaconf") for each in type(error).__mro__):
        return True
    if not isinstance(error, ValueError) or error.__cause__ is not None:
        return False
    last = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    return any(frame.f_globals.get("__name__", "").startswith("hydra.") for frame in last)


# Others


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _has_class(error: BaseException, package: str, name: str) -> bool:
    """Tells whether an error is of a class, without importing the class's package."""
    return any(
        each.__name__ == name and each.__module__.split(".")[0] == package
        for each in type(error).__mro__
    )


def _is_hub_error(error: BaseException) -> bool:
    if any(each.__module__.startswith("huggingface_hub.") for each in type(error).__mro__):
        return True
    return _has_class(error, "requests", "ConnectionError") or _has_class(
        error, "httpx", "TransportError"
    )
