"""Evaluates a model on benchmarks: ``python -m reopold_agent.evaluate benchmark=demo``.

``--help`` lists settings, ``--cfg job`` prints the whole configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from reopold_agent.command import errors_for_people, plain_values
from reopold_agent.config import build


def run(composed: DictConfig) -> dict[str, Any]:
    """Runs the evaluation that Hydra composed; returns the results."""
    raw = plain_values(composed)
    if isinstance(raw.get("benchmark"), str):
        raw["benchmark"] = [raw["benchmark"]]
    # Imported here so that --help and configuration errors do not wait for PyTorch.
    from reopold_agent.eval.plots import make_plots
    from reopold_agent.eval.report import markdown, print_results, write_page
    from reopold_agent.eval.run import EvaluateConfig, Evaluation

    folder = Path(HydraConfig.get().runtime.output_dir)
    evaluation = Evaluation(build(EvaluateConfig, raw), raw, folder)
    results = evaluation.run()
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    rows = [row for each in evaluation.rows.values() for row in each]
    write_page(results, rows, folder, folder / "report.html")
    make_plots(results, folder / "plots")
    print_results(results)
    print(f"In {folder}: results.json, results.md, report.html, responses.jsonl, plots")
    return results


@hydra.main(version_base="1.3", config_path="pkg://reopold_agent.configs", config_name="evaluate")
def _hydra_main(composed: DictConfig) -> None:
    with errors_for_people("\nStopped. The same command with the same hydra.run.dir continues."):
        run(composed)


def main() -> None:
    """Entry point.

    ``model=`` is a group of Hydra's for training, and here it is a checkpoint: it goes under the
    name ``checkpoint``.
    """
    sys.argv = [
        f"checkpoint={word.removeprefix('model=')}" if word.startswith("model=") else word
        for word in sys.argv
    ]
    _hydra_main()


if __name__ == "__main__":
    main()
