"""Shared by the benchmarks: the embedded task's models, environment and runner."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from hydra import compose, initialize_config_module

from reopold_agent.config import TrainConfig
from reopold_agent.envs.from_config import make_env, num_tasks
from reopold_agent.objectives import RunFacts, make_objective
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.train.engine import model_specs
from reopold_agent.train.interrupts import Interrupts
from reopold_agent.train.loop import TrainingLoop
from reopold_agent.train.settings import load_config
from reopold_agent.train.setup import load_models, make_loop


def left_padded(prompts: Sequence[npt.NDArray[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a batch for ``model.generate``: ids, and a mask that is 0 at the padding."""
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def last_line(figures: Mapping[str, float]) -> None:
    """Prints figures of which less is better; `all.sh` keeps those of a benchmark's last line."""
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}), flush=True)


def demo_config(*overrides: str) -> TrainConfig:
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        composed = compose(
            "train", overrides=["env=pixel_reasoner", "engine.device=cpu", *overrides]
        )
    return load_config(composed)[0]


def demo_loop(config: TrainConfig, folder: Path) -> TrainingLoop:
    """The training loop of the embedded task, ready for its first step."""
    torch.set_num_threads(config.engine.threads or 1)
    settings = dict(config.objective)
    objective = make_objective(settings.pop("name"), settings).for_run(
        RunFacts(config.steps, config.rollout.max_response_tokens)
    )
    student, teachers = load_models(config, model_specs(config, objective))
    probe = make_env(config)
    tasks = {config.env.name: {split: num_tasks(probe, split) for split in ("train", "eval")}}
    probe.close()
    run = RunFolder(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    return make_loop(
        config,
        objective,
        run,
        student,
        teachers,
        tasks,
        progress=Progress(config.steps),
        interrupts=Interrupts(),
    )
