"""Evaluates a model on benchmarks: ``python -m reopold_agent.evaluate benchmark=demo``.

``--help`` lists settings, ``--cfg job`` prints the whole configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from reopold_agent.command import plain_values, run_hydra
from reopold_agent.config import build

_SET = ("sampling", "budget", "pixels", "prompt", "files")
"""Of a benchmark's results: what was asked for, not what came out."""


def run(composed: DictConfig) -> dict[str, Any]:
    """Runs the evaluation that Hydra composed; returns the results."""
    raw = plain_values(composed)
    if isinstance(raw.get("benchmark"), str):
        raw["benchmark"] = [raw["benchmark"]]
    # Imported here so that --help and configuration errors do not wait for PyTorch.
    from reopold_agent.eval.report import print_results
    from reopold_agent.eval.run import EvaluateConfig, Evaluation
    from reopold_agent.tracking.trackers import make_trackers, send_results

    folder = Path(HydraConfig.get().runtime.output_dir)
    config = build(EvaluateConfig, raw)
    make_trackers(config.tracking)  # what is wrong with them is said before any work is done
    results = Evaluation(config, raw, folder).run()
    send_results(config.tracking, folder, raw, _figures(results))
    print_results(results)
    print(f"In {folder}: results.json, results.md, report.html, responses.jsonl, plots")
    return results


def _figures(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of ``results.json`` by benchmark, as ``demo/accuracy`` or ``demo/pass_at_k/4``;
    without what was set."""
    from reopold_agent.tracking.trackers import flat_settings

    figures = {}
    for benchmark, found in results["benchmarks"].items():
        made = {key: value for key, value in found.items() if key not in _SET}
        for key, value in flat_settings(made).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                name = "/".join(part for part in (benchmark, *key.split(".")) if part)
                figures[name] = float(value)
    return figures


def main() -> None:
    """Entry point.

    ``model=`` is a group of Hydra's for training, and here it is a checkpoint: it goes under the
    name ``checkpoint``.
    """
    sys.argv = [
        f"checkpoint={word.removeprefix('model=')}" if word.startswith("model=") else word
        for word in sys.argv
    ]
    stopped = "\nStopped. The same command with the same hydra.run.dir continues."
    run_hydra(run, "evaluate", sys.argv[1:], stopped)


if __name__ == "__main__":
    main()
