"""Samples several answers per held-out task from a trained model, for avg@k, pass@k and maj@k.

``python -m reopold_agent.study.probe RUN`` reads the configuration of a training run and evaluates
its checkpoints, its final student, its student before training, or its teacher.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import reopold_agent.envs  # noqa: F401  # registers the environments
from reopold_agent.cli.hydra import report_errors
from reopold_agent.common.files import dump_json, write_bytes_atomic
from reopold_agent.config import TrainConfig, build
from reopold_agent.envs.from_config import make_env, num_tasks
from reopold_agent.errors import DataError
from reopold_agent.evaluate.latency import measure_latency
from reopold_agent.evaluate.metrics import maj_at_k
from reopold_agent.judges.extract import find_answer
from reopold_agent.policies.base import Policy
from reopold_agent.policies.loading import ModelSpec, load_model
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.rollout.runner import EpisodeSpec, RolloutRunner
from reopold_agent.tracking.run_folder import run_settings
from reopold_agent.types import Sampling, Trajectory

SAMPLING = Sampling(1.0, 1.0)
"""The same as of held-out evaluations in training."""


def load_config(run: Path) -> TrainConfig:
    """Reads the configuration of a training run.

    Raises:
        DataError: the folder has none.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise DataError(f"{run} has no config.yaml; is it a training run?")
    config = build(TrainConfig, run_settings(run))
    if config.mix is not None:
        raise DataError(
            f"{run} trained on several environments, and a probe plays one.\n"
            f"Use `reopold evaluate {shlex.join([config.env_word, f'model={run}'])}`, with "
            "--config-dir if the run had it."
        )
    return config


def models_of(run: Path, config: TrainConfig, who: str) -> list[tuple[int, str]]:
    """Lists steps and paths of the models to probe.

    Args:
        run: the run's folder.
        config: its configuration.
        who: ``run`` (every checkpoint and the final model), ``final``, ``student`` (before
            training) or ``teacher``.

    Raises:
        DataError: the run has no such model.
    """
    if who == "student":
        return [(0, config.model.student.path)]
    if who == "teacher":
        if config.model.teacher is None:
            raise DataError(f"{run} has no teacher")
        return [(0, config.model.teacher.path)]
    final = [(config.steps, str(run / "final"))]
    if who == "final":
        return final
    saved = [
        (int(path.name.removeprefix("step-")), str(path / "model"))
        for path in sorted((run / "checkpoints").glob("step-*"))
    ]
    return [each for each in saved if each[0] < config.steps] + final


class Prober:
    """Loads models of a run and rolls out its held-out tasks."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        probe = make_env(config)
        self.tasks = num_tasks(probe, "eval")
        probe.close()

    def load(self, path: str) -> tuple[RolloutRunner, Policy]:
        """Loads a model and its rollout runner, with the turn limit of evaluations."""
        given = self.config.model.student
        spec = ModelSpec(path=path, dtype=given.dtype, attention=given.attention)
        model = load_model(spec, "model", torch.device("cpu"))
        chat = ChatRenderer(
            model.tokenizer, stop_at_tool_call=self.config.rollout.stop_at_tool_call
        )
        policy = model.policy(
            forbidden_ids=chat.forbidden_ids,
            stop_ids=chat.stop_ids,
            max_tokens_per_pass=self.config.engine.max_tokens_per_pass,
        )
        turns = self.config.evaluation.max_turns
        return make_runner(self.config, chat, model.vision, max_turns=turns), policy

    def play(self, path: str, tasks: int, samples: int) -> dict[str, Any]:
        """Grades ``samples`` answers to each of the first ``tasks`` held-out tasks.

        Returns:
            ``correct``: by task, 0 or 1 per sample; ``majority``: by k (powers of two), by task,
            the share of disjoint groups of k samples whose most frequent answer is right;
            ``tokens``, the mean number per answer.
        """
        runner, policy = self.load(path)
        count = min(tasks, self.tasks)
        episodes = [EpisodeSpec("eval", i, s) for i in range(count) for s in range(samples)]
        played = runner.run(policy, episodes, SAMPLING, (self.config.seed, 7))
        runner.close()
        groups: list[list[Trajectory]] = [[] for _ in range(count)]
        for trajectory in sorted(played, key=lambda t: (t.index, t.sample)):
            groups[trajectory.index].append(trajectory)
        verdicts = [[(_answer(t), t.success) for t in group] for group in groups]
        ks = [2**n for n in range(samples.bit_length()) if 2**n <= samples]
        return {
            "correct": [[int(right) for _, right in group] for group in verdicts],
            "majority": {str(k): [_majority(group, k) for group in verdicts] for k in ks},
            "tokens": statistics.fmean(t.response_tokens for t in played),
        }

    def latency(self, path: str, ks: Sequence[int], questions: int) -> list[dict[str, Any]]:
        """Measures the seconds per question until the last of k parallel answers."""
        runner, policy = self.load(path)
        points = measure_latency(
            runner,
            policy,
            ks=ks,
            questions=min(questions, self.tasks),
            sampling=SAMPLING,
            seed=self.config.seed,
        )
        runner.close()
        return [vars(point) for point in points]


def _answer(trajectory: Trajectory) -> str | None:
    found = find_answer(trajectory.turns[-1].text) if trajectory.turns else None
    return None if found is None else found.text


def _majority(samples: Sequence[tuple[str | None, bool]], k: int) -> float:
    starts = range(0, len(samples) - k + 1, k)
    return statistics.fmean(maj_at_k(samples[start : start + k]) for start in starts)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m reopold_agent.study.probe", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("run", type=Path, help="folder of a finished training run")
    parser.add_argument("--who", choices=("run", "final", "student", "teacher"), default="run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--latency", default="", help="measure these numbers of answers instead")
    parser.add_argument("--questions", type=int, default=16)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with report_errors():
        config = load_config(options.run)
        prober = Prober(config)
        models = models_of(options.run, config, options.who)
        found: dict[str, Any] = {"who": options.who}
        if options.latency:
            ks = [int(k) for k in options.latency.split(",")]
            found["latency"] = prober.latency(models[-1][1], ks, options.questions)
        else:
            found |= {"tasks": options.tasks, "samples": options.samples}
            found["points"] = [
                {"step": step, **prober.play(path, options.tasks, options.samples)}
                for step, path in models
            ]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(options.out, dump_json(found) + b"\n")


if __name__ == "__main__":
    main()
