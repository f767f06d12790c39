"""What the commands share: Hydra's start, plain values, exit statuses, and errors for people."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reopold_agent.errors import ConfigError, Terminated
from reopold_agent.user_errors import explain, program

PROBLEMS = 1
"""Exit status of a check that found something; Python's own of an error that is a bug, too."""

USER = 2
"""Exit status of what the user can mend."""

INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141
"""Exit statuses after Ctrl-C, SIGTERM, and when the reader of the output is gone (``| head``)."""


def run_hydra(
    task: Callable[[DictConfig], object], config: str, arguments: list[str], stopped: str = ""
) -> None:
    """Runs a command that Hydra composes.

    Args:
        task: what to do with the composed configuration.
        config: name of the configuration in `reopold_agent.configs`.
        arguments: the words of the command line.
        stopped: printed after Ctrl-C.
    """
    from reopold_agent.hydra_groups import prepare_groups

    def guarded(composed: DictConfig) -> None:
        # Here too: Hydra would print a line of its own on the way out.
        with errors_for_people(stopped, config):
            task(composed)

    main = hydra.main(
        version_base="1.3", config_path="pkg://reopold_agent.configs", config_name=config
    )
    with errors_for_people(stopped, config):
        _check_flags(arguments)
        prepare_groups(arguments, config)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's errors through to `explain`
        main(guarded)()


def _check_flags(arguments: list[str]) -> None:
    """Says what is wrong with a flag in fewer words than argparse, which prints all of Hydra's.

    Raises:
        ConfigError: Hydra has no such flag.
    """
    known = get_args_parser()._option_string_actions
    for word in arguments:
        flag = word.partition("=")[0]
        if flag.startswith("--") and not any(each.startswith(flag) for each in known):
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f"Did you mean '{close[0]}'? " if close else ""
            raise ConfigError(
                f"there is no flag '{flag}'. {hint}Settings are key=value; `{program()} --help` "
                "lists them."
            )


def plain_values(composed: DictConfig) -> dict[str, Any]:
    """A composed configuration, resolved, as plain values.

    Raises:
        ConfigError: settings are missing (all are named) or cannot be resolved.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"these settings must be given: {', '.join(missing)}")
    try:
        raw = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(where + str(error).splitlines()[0]) from error
    if not isinstance(raw, dict):
        raise ConfigError("the configuration is not a group of settings")
    return {str(key): value for key, value in raw.items()}


@contextmanager
def errors_for_people(stopped: str = "", config: str | None = None) -> Iterator[None]:
    """Ends the process with a message instead of a traceback for errors that a user can mend.

    Two lines, what is wrong and what to do, and exit status 2 for what `user_errors.explain`
    knows; ``REOPOLD_DEBUG=1`` shows the traceback before them. Other errors pass: they are bugs.
    Ctrl-C ends with 130 and SIGTERM with 143, after printing ``stopped``.

    Args:
        stopped: what to say after Ctrl-C.
        config: the command's Hydra configuration, for the names that exist.
    """
    try:
        yield
        sys.stdout.flush()  # or a closed pipe would be found by the interpreter, at its end
    except KeyboardInterrupt as error:
        if stopped:
            print(stopped, file=sys.stderr)
        sys.exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        told = explain(error, config)
        if told is None:
            raise
        if os.environ.get("REOPOLD_DEBUG") == "1":
            traceback.print_exc()
        print("error: " + "\n  ".join([told[0], *told[1].strip("\n").split("\n")]), file=sys.stderr)
        sys.exit(USER)
