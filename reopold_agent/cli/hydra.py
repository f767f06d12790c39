"""How commands start and end: Hydra, plain values, error messages and exit statuses."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reopold_agent.cli.messages import explain, program
from reopold_agent.common.signals import accept_sigint, end_interrupt
from reopold_agent.config import flatten
from reopold_agent.errors import ConfigError, Terminated, first_line, suggestion

_log = logging.getLogger(__name__)

PROBLEMS_FOUND = 1
"""Exit status of a check that found problems; also Python's own after an uncaught exception."""

USER_ERROR = 2
"""Exit status of an error that the user can fix."""

INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141
"""Exit statuses after Ctrl-C, SIGTERM, and when the reader of the output has ended (``| head``)."""


def run_hydra(
    task: Callable[[DictConfig], object], config: str, arguments: list[str], stopped: str = ""
) -> None:
    """Runs a command that Hydra composes.

    Args:
        task: called with the composed configuration.
        config: name of the configuration in `reopold_agent.configs`.
        arguments: the arguments of the command line.
        stopped: message to print after Ctrl-C.
    """
    from reopold_agent.cli.groups import check_once, prepare_groups

    def guarded(composed: DictConfig) -> None:
        # Handled in here too, since Hydra prints a line of its own for errors that reach it.
        folder = Path(HydraConfig.get().runtime.output_dir)
        with report_errors(stopped, config), _without_empty_folder(folder):
            try:
                task(composed)
            except Exception as error:
                if explain(error, config) is None:  # a bug, whose traceback goes to the log too
                    _log.info("ended by an error", exc_info=True)
                raise

    main = hydra.main(
        version_base="1.3", config_path="pkg://reopold_agent.configs", config_name=config
    )
    with report_errors(stopped, config):
        _check_flags(arguments)
        check_once(arguments)
        prepare_groups(arguments, config)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints its errors instead of raising them
        main(guarded)()


@contextmanager
def _without_empty_folder(folder: Path) -> Iterator[None]:
    """Removes the output folder, which Hydra creates, if nothing is in it at the end.

    Folders above it, up to the working directory, are removed too if they are empty.
    """
    try:
        yield
    finally:
        here = Path.cwd()
        while folder != here and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            if here not in folder.parents:
                break
            folder = folder.parent


def _check_flags(arguments: list[str]) -> None:
    """Checks flags with a shorter message than that of argparse, which prints all of Hydra's.

    Raises:
        ConfigError: Hydra has no such flag.
    """
    known = get_args_parser()._option_string_actions
    for word in arguments:
        flag = word.partition("=")[0]
        if flag.startswith("--") and not any(each.startswith(flag) for each in known):
            raise ConfigError(
                f"there is no flag '{flag}'. {suggestion(flag, known)}Settings are key=value; "
                f"`{program()} --help` lists them."
            )


def plain_values(composed: DictConfig) -> dict[str, Any]:
    """Resolves a composed configuration to plain values.

    Raises:
        ConfigError: settings are missing (the message names all) or cannot be resolved.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"these settings must be given: {', '.join(missing)}")
        raw = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        _check_choice(composed, error.full_key or "")
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(where + first_line(error)) from error
    if not isinstance(raw, dict):
        raise ConfigError("the configuration is not a group of settings")
    return {str(key): value for key, value in raw.items()}


def _check_choice(composed: DictConfig, key: str) -> None:
    """Says what a setting such as ``size`` may be, if ``key`` follows it: ``${sizes.${size}.lr}``.

    Raises:
        ConfigError: it chooses none of the values that there are.
    """
    unresolved: Any = OmegaConf.to_container(composed, resolve=False)
    followed = re.match(r"\$\{(\w+)\.\$\{(\w+)\}", str(flatten(unresolved).get(key)))
    if followed is None:
        return
    values, setting = followed.groups()
    known, chosen = list(composed[values]), str(composed[setting])
    if chosen not in known:
        raise ConfigError(
            f"{setting} must be one of {', '.join(known)}; got '{chosen}'.\n"
            f"{suggestion(chosen, known)}`reopold train --cfg job` shows what each sets ({values})."
        )


@contextmanager
def report_errors(stopped: str = "", config: str | None = None) -> Iterator[None]:
    """Ends the process with a message instead of a traceback for errors that a user can fix.

    Errors that `messages.explain` knows print two lines, what is wrong and what to do, and end with
    status 2; ``REOPOLD_DEBUG=1`` shows the traceback first. Other errors are bugs and pass through.
    Ctrl-C ends with status 130 and SIGTERM with 143, also in the background of a script.

    Args:
        stopped: message to print after Ctrl-C and SIGTERM.
        config: the command's Hydra configuration, whose names are suggested in messages.
    """
    try:
        accept_sigint()
        yield
        sys.stdout.flush()  # a closed pipe must raise here, where it is handled
    except KeyboardInterrupt as error:
        end_interrupt()
        if stopped:
            print(stopped, file=sys.stderr)
        sys.exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        explained = explain(error, config)
        if explained is None:
            raise
        if os.environ.get("REOPOLD_DEBUG") == "1":
            traceback.print_exc()
        what, advice = explained
        lines = [f"error: {what}", *advice.strip("\n").split("\n")]
        print("\n  ".join(lines), file=sys.stderr)
        sys.exit(USER_ERROR)
