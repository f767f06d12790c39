"""Evaluates a model on benchmarks: ``python -m reopold_agent.evaluate benchmark=demo``.

``--help`` lists settings, ``--cfg job`` prints the whole configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from reopold_agent.cli.hydra import report_errors, run_hydra
from reopold_agent.evaluate.words import prepared_words

_INPUTS = ("sampling", "budget", "pixels", "prompt", "files", "environment")
"""Entries of a benchmark's results that are settings, not measurements."""


def run(composed: DictConfig) -> dict[str, Any]:
    """Runs the evaluation that Hydra composed; returns the results."""
    # Imported here so that --help and configuration errors do not wait for PyTorch.
    from reopold_agent.evaluate.report import print_results
    from reopold_agent.evaluate.run import Evaluation, load_config
    from reopold_agent.tracking.trackers import make_trackers, send_results

    config, raw = load_config(composed)
    folder = Path(HydraConfig.get().runtime.output_dir)
    make_trackers(config.tracking)  # reports their errors before any work is done
    results = Evaluation(config, raw, folder).run()
    send_results(config.tracking, folder, raw, _figures(results))
    print_results(results)
    print(f"In {folder}: results.json, results.md, report.html, responses.jsonl, plots")
    return results


def _figures(results: dict[str, Any]) -> dict[str, float]:
    """Returns the measurements of ``results.json`` as ``demo/accuracy`` or ``demo/pass_at_k/4``."""
    from reopold_agent.tracking.trackers import flat_settings

    figures = {}
    for benchmark, found in results["benchmarks"].items():
        made = {key: value for key, value in found.items() if key not in _INPUTS}
        for key, value in flat_settings(made).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                name = "/".join(part for part in (benchmark, *key.split(".")) if part)
                figures[name] = float(value)
    return figures


def main() -> None:
    """Entry point."""
    stopped = "\nStopped. The same command with the same hydra.run.dir continues."
    with report_errors(stopped, "evaluate"):
        sys.argv[1:] = prepared_words(sys.argv[1:])
    run_hydra(run, "evaluate", sys.argv[1:], stopped)


if __name__ == "__main__":
    main()
