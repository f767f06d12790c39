"""What to tell a user of an error of theirs: a line on what is wrong, a line on what to do."""

from __future__ import annotations

import difflib
import errno
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reopold_agent.errors import ReopoldError, first_line

_WRITE = "Choose a place where you may write (hydra.run.dir=FOLDER), or mend its permissions."
_KIND = (
    "A file is where a folder is needed, or the other way round: choose another path, or move it."
)
_FULL = "Make room, or choose another disk (hydra.run.dir=FOLDER); the same command goes on."

_OF_THE_SYSTEM = {
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
    errno.EADDRINUSE: "Choose another port (port=0 takes a free one), or end what listens there.",
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
    """The command as the user called it, for messages."""
    first = Path(sys.argv[0])
    if first.suffix == ".py":
        module = first.parent.name if first.stem == "__main__" else first.stem
        return f"python -m reopold_agent.{module}"
    return first.name


def explain(error: BaseException, config: str | None = None) -> tuple[str, str] | None:
    """What is wrong and what to do; None where it is a bug of ours.

    Args:
        error: what was raised; its causes are looked at too.
        config: the command's Hydra configuration (``train`` ...), for the names that exist.
    """
    if isinstance(error, ReopoldError):
        return split(str(error))
    if _is_hydras(error):
        return _of_hydra(error, config)
    for each in _causes(error):
        if isinstance(each, ReopoldError):
            return split(str(each))
        if _named(each, "torch", "OutOfMemoryError"):
            return "the GPU's memory is full: " + first_line(each), _MEMORY
        if isinstance(each, MemoryError) or (
            isinstance(each, RuntimeError) and "DefaultCPUAllocator" in str(each)
        ):
            return "this machine's memory is full", _MEMORY
        if _is_hubs(each):
            return f"the Hugging Face hub gave no answer: {first_line(each)}", _HUB
        if isinstance(each, OSError) and each.errno in _OF_THE_SYSTEM:
            where = f": {each.filename}" if each.filename is not None else ""
            return f"{each.strerror}{where}", _OF_THE_SYSTEM[each.errno]
    return None


def split(message: str) -> tuple[str, str]:
    """A message as what is wrong and what to do: further lines, sentences or a part after ';'."""
    what, line_break, rest = message.partition("\n")
    if line_break:
        return what, rest
    sentence = re.match(r"(.+?[\w'\")\]}][.])\s+(?=[A-Z])(.+)", message)
    if sentence is None:
        sentence = re.match(r"(.+?);\s+(.+)", message)
    if sentence is not None:
        # A part after ';' begins small; a setting or a path must not be changed.
        return sentence.group(1), re.sub(r"^[a-z](?=[a-z]*[ ,])", _upper, sentence.group(2))
    return message, f"`{program()} --help` lists what there is."


def _upper(letter: re.Match[str]) -> str:
    return letter.group().upper()


# Hydra


def _of_hydra(error: BaseException, config: str | None) -> tuple[str, str]:
    text = str(error)
    overridden = re.search(r"Could not (?:override|delete|append[^']*) '([^']+)'", text)
    if type(error).__name__ == "OverrideParseException":
        return _unreadable(getattr(error, "override", ""), first_line(error), config)
    if overridden is not None and "already at" in text:
        return f"'{overridden.group(1)}' exists already.", "Leave out the + before it."
    if overridden is not None:
        key = overridden.group(1)
        value_error = error.__cause__ if "full_key" in text else None
        if value_error is not None and "not in struct" not in text:
            return f"{key}: {first_line(value_error)}", _everything(config)
        return f"unknown setting '{key}'.", _meant(key, config)
    if text.startswith("Ambiguous value"):
        word = re.search(r"'([^']+)'", text)
        key, _, value = (word.group(1) if word else "").partition("=")
        return (
            f"{key}={value} has several values.",
            f"Write '{key}=[{value}]' for a list, or add --multirun to run once with each.",
        )
    if "requires --multirun" in text:
        return first_line(error), "Add --multirun to run once with each value."
    missing = getattr(error, "missing_cfg_file", None)
    options = getattr(error, "options", None)
    if missing and options:
        group, _, name = str(missing).rpartition("/")
        close = difflib.get_close_matches(name, options, n=1)
        hint = f"Did you mean '{close[0]}'? " if close else ""
        return f"the group '{group}' has no option '{name}'.", f"{hint}Known: {', '.join(options)}."
    key = getattr(error, "full_key", None)
    return f"{key}: {first_line(error)}" if key else first_line(error), _everything(config)


def _unreadable(word: str, reason: str, config: str | None) -> tuple[str, str]:
    if "=" in word:
        return f"'{word}' cannot be read: {reason}", (
            "A value with spaces, commas or one of []{}()$: needs quotes for the shell and for "
            """Hydra: 'key="a value"', 'key=[1,2]'."""
        )
    for group in _groups(config):
        from reopold_agent.hydra_groups import options_of

        if word in options_of(group):
            return f"'{word}' is no key=value.", f"Did you mean '{group}={word}'?"
    return f"'{word}' is no key=value.", _meant(word.lstrip("-+~"), config)


def _meant(key: str, config: str | None) -> str:
    """A hint at the setting or group that a key may stand for."""
    known = [*_settings(config), *_groups(config)]
    plain = key.lstrip("+~")
    last = plain.rpartition(".")[2]
    found = difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
    found = found or [name for name in known if name.rpartition(".")[2] == last][:3]
    if not found:
        by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.7)
        found = [by_last[name] for name in close]
    hint = f"Did you mean {' or '.join(repr(name) for name in found)}? " if found else ""
    return hint + _everything(config)


def _everything(config: str | None) -> str:
    if config is None:
        return f"`{program()} --help` lists what there is."
    return f"`reopold {config} --cfg job` shows every setting, --help the groups too."


def _groups(config: str | None) -> list[str]:
    if config is None:
        return []
    from reopold_agent.hydra_groups import groups_of

    return groups_of(config)


def _settings(config: str | None) -> list[str]:
    """The settings that exist with the groups that the command line selects."""
    if config is None:
        return []
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    groups = _groups(config)
    chosen = [word for word in sys.argv[1:] if word.partition("=")[0] in groups]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("reopold_agent.configs", version_base="1.3"):
            composed = OmegaConf.to_container(compose(config, chosen))
    except (HydraException, ValueError):  # one of the groups is the next error of this command
        return []
    return list(_keys(composed))


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _is_hydras(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf refuse what the user gave them."""
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


def _named(error: BaseException, package: str, name: str) -> bool:
    """Whether it is of a class of a package that need not be imported for this."""
    return any(
        each.__name__ == name and each.__module__.split(".")[0] == package
        for each in type(error).__mro__
    )


def _is_hubs(error: BaseException) -> bool:
    if any(each.__module__.startswith("huggingface_hub.") for each in type(error).__mro__):
        return True
    return _named(error, "requests", "ConnectionError") or _named(error, "httpx", "TransportError")
