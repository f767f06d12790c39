"""Trains a student: ``python -m reopold_agent.train env=pixel_reasoner``.

``--help`` lists groups and settings, ``--cfg job`` prints the whole configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from reopold_agent.command import plain_values, run_hydra
from reopold_agent.config import TrainConfig, build


def load_config(composed: DictConfig) -> tuple[TrainConfig, dict[str, Any]]:
    """Checks a composed configuration.

    Returns:
        The typed configuration, and the same as plain values.

    Raises:
        ConfigError: names the setting and what is wrong with it.
    """
    values = plain_values(composed)
    for name in ("default_steps", "default_batch", "batches"):  # defaults of groups for others
        values.pop(name, None)
    return build(TrainConfig, values), values


def run(composed: DictConfig) -> dict[str, Any]:
    """Runs the training that Hydra composed; returns the summary."""
    config, raw = load_config(composed)
    folder = Path(HydraConfig.get().runtime.output_dir)
    command = list(HydraConfig.get().overrides.task)
    # Imported here so that --help and configuration errors do not wait for PyTorch.
    if config.engine.name == "verl":
        from reopold_agent.engines.verl.engine import VerlEngine

        return VerlEngine(config, raw, folder, command).run()
    from reopold_agent.engines.local import LocalEngine

    return LocalEngine(config, raw, folder, command).run()


def main() -> None:
    """Entry point."""
    run_hydra(run, "train", sys.argv[1:])


if __name__ == "__main__":
    main()
