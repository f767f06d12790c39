"""The process that drives a run: a Ray actor on the machine that started it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transfer_queue
from omegaconf import OmegaConf

from reopold_agent.config import TrainConfig
from reopold_agent.objectives import Objective

_log = logging.getLogger(__name__)


class TaskRunner:
    """Runs a training; replaces ``verl.trainer.main_ppo.TaskRunnerV1``, as ``run_ppo`` allows.

    Args:
        config, objective, folder, tasks: as of `trainer.Trainer`.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        folder: str,
        tasks: Mapping[str, Mapping[str, int]],
    ) -> None:
        self._config, self._objective = config, objective
        self._folder, self._tasks = Path(folder), dict(tasks)

    def run(self, verl_config: Any) -> None:
        """Trains to the end."""
        from reopold_agent.train.verl.rollouts import RolloutManager
        from reopold_agent.train.verl.trainer import Trainer

        verl_config.transfer_queue.enable = True
        OmegaConf.resolve(verl_config)
        transfer_queue.init(verl_config.transfer_queue)
        try:
            trainer = Trainer(verl_config, self._config, self._objective, self._folder, self._tasks)
            trainer.init()
            rollouts = RolloutManager(
                self._config,
                trainer.get_llm_client(),
                trainer.get_teacher_client() or {},
                self._config.engine.rollout_workers,
            )
            trainer.fit(rollouts)
        finally:
            transfer_queue.close()
