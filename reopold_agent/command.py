"""What the Hydra commands share: from a composed configuration to plain values, and errors out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reopold_agent.errors import ConfigError, ReopoldError


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
        raise ConfigError(str(error).splitlines()[0]) from error
    if not isinstance(raw, dict):
        raise ConfigError("the configuration is not a group of settings")
    return {str(key): value for key, value in raw.items()}


@contextmanager
def errors_for_people(stopped: str = "") -> Iterator[None]:
    """Ends the process with a message instead of a traceback for errors that a user can mend.

    Exit status 2 for a `ReopoldError` (``REOPOLD_DEBUG=1`` shows the traceback), 130 for Ctrl-C,
    after printing ``stopped``.
    """
    try:
        yield
    except ReopoldError as error:
        if os.environ.get("REOPOLD_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if stopped:
            print(stopped, file=sys.stderr)
        sys.exit(130)
