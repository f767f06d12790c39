"""Trains a student: ``python -m reopold_agent.train env=pixel_reasoner``.

``--help`` lists groups and settings, ``--cfg job`` prints the whole configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from reopold_agent.cli.groups import check_once, place_words
from reopold_agent.cli.hydra import report_errors, run_hydra
from reopold_agent.train.mixture import as_typed, mixed_words
from reopold_agent.train.settings import check_data, check_engine, check_student, load_config

if TYPE_CHECKING:
    from reopold_agent.train.engine import Engine


def run(composed: DictConfig) -> dict[str, Any]:
    """Runs the training that Hydra composed; returns the summary."""
    words = _as_typed(HydraConfig.get().overrides.task)
    check_engine(composed, words)
    check_data(composed, words)
    check_student(composed, words)
    config, raw = load_config(composed)
    folder = Path(HydraConfig.get().runtime.output_dir)
    command = started_with()
    # Imported here so that --help and configuration errors do not wait for PyTorch.
    engine: Engine
    if config.engine.name == "verl":
        from reopold_agent.train.verl.engine import VerlEngine

        engine = VerlEngine(config, raw, folder, command)
    else:
        from reopold_agent.train.setup import LocalEngine

        engine = LocalEngine(config, raw, folder, command)
    summary = engine.run()
    if engine.interrupted is not None and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise engine.interrupted  # this run is complete, and the next ones do not start
    return summary


def started_with() -> list[str]:
    """Returns the command line's words, for commands that repeat them elsewhere."""
    hydra = HydraConfig.get()
    folders = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    flags = [word for folder in folders for word in ("--config-dir", folder)]
    own = place_words(_as_typed(hydra.overrides.hydra))
    return [*flags, *own, *as_typed(_as_typed(hydra.overrides.task))]


def _as_typed(words: Any) -> list[str]:
    """Returns words of the command line; Hydra's list would resolve ``${...}`` in them."""
    plain: Any = OmegaConf.to_container(words, resolve=False)
    return [str(word) for word in plain]


def main() -> None:
    """Entry point."""
    with report_errors(config="train"):
        check_once(sys.argv[1:])
        sys.argv[1:] = mixed_words(sys.argv[1:])
    run_hydra(run, "train", sys.argv[1:])


if __name__ == "__main__":
    main()
