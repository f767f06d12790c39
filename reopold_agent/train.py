"""Trains a student: ``python -m reopold_agent.train env=pixel_reasoner``.

``--help`` lists groups and settings, ``--cfg job`` prints the whole configuration.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reopold_agent.config import TrainConfig, build
from reopold_agent.errors import ConfigError, ReopoldError


def load_config(composed: DictConfig) -> tuple[TrainConfig, dict[str, Any]]:
    """Checks a composed configuration.

    Returns:
        The typed configuration, and the same as plain values.

    Raises:
        ConfigError: names the setting and what is wrong with it.
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
    values = {str(key): value for key, value in raw.items() if key != "default_steps"}
    return build(TrainConfig, values), values


def run(composed: DictConfig) -> dict[str, Any]:
    """Runs the training that Hydra composed; returns the summary."""
    config, raw = load_config(composed)
    # Imported here so that --help and configuration errors do not wait for PyTorch.
    from reopold_agent.engines.local import LocalEngine

    folder = Path(HydraConfig.get().runtime.output_dir)
    command = list(HydraConfig.get().overrides.task)
    return LocalEngine(config, raw, folder, command).run()


@hydra.main(version_base="1.3", config_path="pkg://reopold_agent.configs", config_name="train")
def _hydra_main(composed: DictConfig) -> None:
    try:
        run(composed)
    except ReopoldError as error:
        if os.environ.get("REOPOLD_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main() -> None:
    """Entry point: makes plugins' environments selectable, then hands over to Hydra."""
    from reopold_agent.hydra_groups import prepare_groups

    try:
        prepare_groups(sys.argv[1:])
    except ReopoldError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    _hydra_main()


if __name__ == "__main__":
    main()
