"""verl's synchronous trainer with this project's batches, objective, evaluation and files.

verl keeps the order of a step: rollouts into TransferQueue, log-probs and entropies by the
trainer's model, the objective's whole-batch numbers (here), updates, weights to the servers. With
``engine.ahead=1`` the next step's rollouts begin as soon as this step's are there, and the weights
wait for their end.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue
from tensordict import TensorDict
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from verl.checkpoint_engine import CheckpointEngineManager
from verl.protocol import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.rl_dataset import collate_fn
from verl.workers.rollout.llm_server import LLMServerManager
from verl.workers.utils.padding import response_to_nested

from reopold_agent.config import OVER, TrainConfig
from reopold_agent.errors import ConfigError, NonFiniteError
from reopold_agent.objectives import Needs, Objective
from reopold_agent.policies.batch import PassTokens
from reopold_agent.policies.loading import load_processing, student_spec
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.task_teachers import with_teachers
from reopold_agent.tracking.metrics import JsonLines, MetricsWriter, read_metrics
from reopold_agent.tracking.statistics import rollout_statistics
from reopold_agent.tracking.trajectories import TokenUse, save_pictures, trajectory_record
from reopold_agent.train.behaviour import invalid_behaviour
from reopold_agent.train.data_order import TaskOrder, tasks_of
from reopold_agent.train.evaluation import (
    EvaluationResult,
    check_prompts,
    ends_due,
    evaluation_row,
    held_out,
    success_by_teacher,
)
from reopold_agent.train.nonfinite import MAX_STEPS_WITHOUT_UPDATE, describe
from reopold_agent.train.rows import (
    Row,
    entropy_threshold,
    set_advantages,
    threshold_of,
    trajectories_of,
)
from reopold_agent.train.step_log import parts_of_step, sampler_gap, training_metrics
from reopold_agent.train.token_use import expected_use
from reopold_agent.train.totals import TokenTotals
from reopold_agent.train.update import UpdateStats
from reopold_agent.train.verl.checkpoints import save_checkpoint
from reopold_agent.train.verl.loss import (
    ADVANTAGES,
    ENV,
    STEP,
    TAUGHT,
    THRESHOLD,
    WEIGHTS,
    ObjectiveLoss,
)
from reopold_agent.train.verl.records import (
    EPISODE,
    environment_of,
    from_row,
    pixels_of,
    plain_rows,
)
from reopold_agent.train.verl.rollouts import TRAIN, RolloutManager
from reopold_agent.train.verl.stop import StoppedError, StopRequest
from reopold_agent.train.verl.tasks import StepTasks
from reopold_agent.train.verl.training import PASSES, TOTALS, StudentWorker, banned_ids
from reopold_agent.types import Sampling, Trajectory

POLL_SECONDS = 0.1
"""Pause between checks whether a step's episodes have arrived; verl's 2 s exceed a small step."""


class Trainer(PPOTrainerSync):
    """Trains one run; its files are those of the local engine.

    Args:
        verl_config: verl's whole configuration.
        config: ours.
        objective: for this run (`Objective.for_run`).
        folder: the run folder.
        tasks: number of tasks by environment and split.
    """

    def __init__(
        self,
        verl_config: Any,
        config: TrainConfig,
        objective: Objective,
        folder: Path,
        tasks: Mapping[str, Mapping[str, int]],
    ) -> None:
        self.run_config, self.objective, self.folder = config, objective, folder
        self._without_update = 0  # steps in a row
        self._prompts: dict[tuple[str, int], str] = {}
        self._stop = StopRequest(folder)
        self._made = self._saved = 0  # steps of this process, and the newest saved one
        # With `engine.ahead`: the loader before it gave the draws of the step that is generated,
        # and the updates made since the weights that generated this step's episodes.
        self._loader_before: dict[str, Any] | None = None
        self._staleness = 0
        self.task_counts = dict(tasks)
        self.metrics = MetricsWriter(folder / "metrics.jsonl")
        self.trajectories = JsonLines(folder / "trajectories.jsonl")
        processing = load_processing(student_spec(config.model), "student")
        self._vision = processing.vision
        self._banned = banned_ids(processing.tokenizer, processing.config)
        self._chat = ChatRenderer(
            processing.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call
        )
        self._allowed = len(processing.tokenizer)
        # verl's name for servers on the GPUs that train.
        self._enable_hybrid_replicas = not config.engine.rollout_gpus_per_node
        super().__init__(config=verl_config)
        self.replay_buffer.poll_interval = POLL_SECONDS

    # verl's hooks, in the order in which they are called

    def _init_dataloader(self) -> None:
        """Makes the loader of task draws; verl saves and restores its state."""
        config = self.run_config
        self.train_dataset = StepTasks(
            TaskOrder(tasks_of(self.task_counts, "train"), config.seed, config.weights),
            config.batch.prompts,
            config.batch.samples,
            config.steps,
        )
        self.val_dataset: list[Any] = []
        self.train_dataloader = StatefulDataLoader(
            dataset=self.train_dataset,
            batch_size=config.batch.prompts,
            num_workers=0,
            drop_last=True,
            collate_fn=collate_fn,
        )
        self.train_dataloader_it = None
        self.val_dataloader = None
        self.steps_per_epoch = self.total_training_steps = config.steps
        # verl's optimizer needs the length of its schedule.
        self.config.actor_rollout_ref.actor.optim.total_training_steps = config.updates

    def _init_resource_pool_mgr(self) -> None:
        """Makes verl's resource pools, with `StudentWorker` on the student's GPUs."""
        super()._init_resource_pool_mgr()
        student = Role.ActorRollout if self._enable_hybrid_replicas else Role.Actor
        self.role_worker_mapping[student] = ray.remote(StudentWorker)
        self._shared = self.use_teacher_policy and self.run_config.engine.shares_gpus
        if self._shared:
            pools = self.resource_pool_manager
            del pools.resource_pool_spec[pools.mapping[Role.TeacherModel]]
            pools.mapping[Role.TeacherModel] = pools.mapping[student]

    def _setup(self) -> None:
        """Starts verl's processes; then the servers that are on GPUs of their own.

        As in verl's `trainer_separate_async`.
        """
        super()._setup()
        if self._enable_hybrid_replicas:
            return
        self.llm_server_manager = LLMServerManager.create(config=self.config)
        settings = self.config.actor_rollout_ref.rollout.checkpoint_engine
        self.checkpoint_manager = CheckpointEngineManager(
            config=omega_conf_to_dataclass(settings),
            actor_wg=self.actor_rollout_wg,
            replicas=self.llm_server_manager.get_replicas(),
        )

    def on_init_end(self) -> None:
        """Sets the loss, bans ids at all servers, and sends them the weights."""
        weighted = self.run_config.importance_cap is not None
        loss = ObjectiveLoss(
            self.objective,
            weighted=weighted,
            names=list(self.run_config.members) if self._by_environment() else None,
            means_by_environment=self.run_config.by_environment("normalise_over"),
        )
        self.actor_rollout_wg.set_loss_fn(loss)
        replicas = [*self.llm_server_manager.get_replicas(), *self._teachers()]
        ray.get(
            [
                server.collective_rpc.remote(
                    "monkey_patch_model",
                    kwargs={"vocab_size": self._allowed, "banned_token_ids": self._banned},
                )
                for replica in replicas
                for server in replica.servers
            ]
        )
        super().on_init_end()

    def fit(self, agent_loop_manager: RolloutManager) -> None:
        """Trains from the checkpoint, or the start, to the last step."""
        self.rollouts = agent_loop_manager
        done = self.global_steps
        kept = done if done else -1
        self.metrics.truncate_after(kept)
        self.trajectories.truncate_after(kept)
        try:
            if not done:
                self._evaluate_ends(0, "student")
                if self.run_config.evaluation.teacher:
                    self._evaluate_ends(0, "teacher")
            self._stop.obey()
            super().fit(agent_loop_manager)
            self._evaluate_ends(self.run_config.steps, "student")
        except StoppedError:
            if self._made > self._saved:
                self._save_checkpoint()
            raise

    def prepare_step(self) -> dict[str, Any]:
        """Starts the step's rollouts, unless the step before has started them."""
        self._started = time.perf_counter()
        if self._loader_before is None:
            self._position = (self.global_steps - 1) * self.run_config.batch.prompts
            self._staleness = 0
            super().prepare_step()
        self._loader_before = None
        return {}

    def _next_train_batch(self, num_prompts: int | None = None) -> Any:
        batch = super()._next_train_batch(num_prompts)
        positions = [int(p) for p in batch["position"]]
        expected = list(range(self._position, self._position + len(positions)))
        if positions != expected:
            raise ConfigError(
                f"step {self.global_steps - 1}: verl's loader gave the draws {positions[:3]} ..., "
                f"but {expected[:3]} ... come next; its checkpoint does not fit this run"
            )
        return batch

    def _step_once(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._step_once(*args, **kwargs)
        except RuntimeError as error:
            if self.rollouts.failure is not None:  # verl itself only reports missing rows
                raise self.rollouts.failure from error
            raise

    def on_sample_end(self) -> None:
        """Stops the run if episodes failed for a permanent reason."""
        if self.rollouts.failure is not None:
            raise self.rollouts.failure
        self.rollouts.wait()
        self._generated = self.rollouts.seconds
        super().on_sample_end()
        if self.run_config.engine.ahead and self.global_steps < self.run_config.steps:
            self._loader_before = copy.deepcopy(self.train_dataloader.state_dict())
            self._position = self.global_steps * self.run_config.batch.prompts
            super().prepare_step()

    def on_step_end(self) -> None:
        """Gives the servers the new weights, once nothing is generated with older ones."""
        started = time.perf_counter()
        self.rollouts.wait()
        self.timing_raw["wait"] = time.perf_counter() - started
        super().on_step_end()

    def _balance_batch(
        self, batch: Any, metrics: dict[str, Any], *more: Any, **settings: Any
    ) -> Any:
        """Divides the episodes over the ranks, once a teacher on shared GPUs has scored them.

        The student's servers sleep by now, and the trainer has not begun.
        """
        if self._shared:
            started = time.perf_counter()
            with self._teacher_awake():
                lost = self.rollouts.score(batch.keys, self.global_steps - 1)
            self.timing_raw["teacher"] = time.perf_counter() - started
            if lost:
                transfer_queue.kv_clear(keys=list(lost), partition_id=batch.partition_id)
                batch = batch.select_keys([key for key in batch.keys if key not in lost])
            if not batch.keys:
                raise self._nothing_usable()
        return super()._balance_batch(batch, metrics, *more, **settings)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Computes threshold, weights and advantages over the whole batch, before it is split."""
        live = [not tag.get("is_padding", False) for tag in batch.tags]
        fields = ["prompts", "responses", "response_mask", "rollout_log_probs", "old_log_probs"]
        fields += ["entropy", EPISODE]  # without pictures
        fields += ["teacher_logprobs"] if self.use_teacher_policy else []
        table = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        )
        self._keys = [key for key, use in zip(batch.keys, live, strict=True) if use]
        every = plain_rows(table)
        rows = [from_row(row) for row, use in zip(every, live, strict=True) if use]
        if not rows:
            raise self._nothing_usable()
        self._rows: list[Row] = rows
        # These come from the trainer: if the student itself is broken, skipping rows cannot help.
        findings = invalid_behaviour(rows)
        if findings:
            raise NonFiniteError(describe(self.global_steps - 1, findings))
        one_by_one = self.run_config.by_environment("threshold_over")
        self._threshold = entropy_threshold(self.objective, rows, by_environment=one_by_one)
        made = importance_weights(table, self.config.algorithm.rollout_correction)
        if self._by_environment():
            names = list(self.run_config.members)
            made[ENV] = torch.tensor([names.index(environment_of(row)) for row in every])
        if Needs.OUTCOME in self.objective.needs:
            set_advantages(self.objective, rows)
            mask = table["response_mask"]
            mask_BT = mask.to_padded_tensor(0)
            for name, values in (
                (ADVANTAGES, [float(row.trajectory.advantage or 0.0) for row in rows]),
                (TAUGHT, [float(row.taught) for row in rows]),
            ):
                made[name] = response_to_nested(_spread(values, live, mask_BT), mask)
        if not made:
            return batch
        return transfer_queue.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict(made, batch_size=len(batch)),
        )

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Lets verl's workers make the updates of the step."""
        settings = self.config.actor_rollout_ref.actor
        mini_batch = settings.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        batch.extra_info.update(
            {STEP: self.global_steps - 1, THRESHOLD: json.dumps(self._threshold)},
            calculate_entropy=False,
            distillation_use_topk=False,
            distillation_only=False,
            global_batch_size=mini_batch,
            mini_batch_size=mini_batch,
            epochs=1,
            seed=self.run_config.seed,
            dataloader_kwargs={"shuffle": False},
            temperature=1.0,
        )
        output = self.actor_rollout_wg.update_actor(batch)["metrics"]
        counts = [TokenTotals(**one) for one in output[TOTALS]]
        self._passes = sum((PassTokens(**one) for one in output[PASSES]), PassTokens())
        norms = [float(norm) for norm in _listed(output["grad_norm"])]
        finite = [
            bool(np.isfinite([one.loss, norm]).all())
            for one, norm in zip(counts, norms, strict=True)
        ]
        totals = TokenTotals()
        for one, made in zip(counts, finite, strict=True):
            if made:
                totals.merge(one)
        losses = [one.loss for one, made in zip(counts, finite, strict=True) if made]
        kept_norms = [norm for norm, made in zip(norms, finite, strict=True) if made]
        self._update = UpdateStats(
            loss=float(np.mean(losses)) if losses else float("nan"),
            grad_norm=float(np.mean(kept_norms)) if losses else float("nan"),
            lr=float(_listed(output["lr"])[-1]),
            threshold=self._threshold,
            skipped=finite.count(False),
            **totals.shares(),
        )
        self._updates = len(losses)
        self._without_update = 0 if losses else self._without_update + 1
        if self._update.skipped and (
            self.run_config.on_nonfinite == "fail"
            or self._without_update >= MAX_STEPS_WITHOUT_UPDATE
        ):
            shown = [f"{one.loss:g} and {norm:g}" for one, norm in zip(counts, norms, strict=True)]
            first = ", ".join(row.trajectory.task_id for row in self._rows[:8])
            raise NonFiniteError(
                f"step {self.global_steps - 1}: loss and gradient norm by mini-batch are "
                f"{'; '.join(shown)}; verl did not make the updates that are not finite. The "
                f"step's tasks: {first} ...\nThe last checkpoint is valid; the same command with "
                "on_nonfinite=skip continues from it without such updates."
            )
        return batch

    def _save_checkpoint(self) -> None:
        """Lets verl's workers write a checkpoint, which is there whole or not at all."""

        def write(folder: Path) -> None:
            try:
                self.actor_rollout_wg.save_checkpoint(
                    str(folder / "actor"), None, self.global_steps, max_ckpt_to_keep=None
                )
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # the worker's own, such as a full disk
            # After a resume the episodes that were being generated are generated again.
            loader = self._loader_before
            torch.save(
                self.train_dataloader.state_dict() if loader is None else loader, folder / "data.pt"
            )

        settings = self.config.trainer
        target = save_checkpoint(
            Path(settings.default_local_dir),
            self.global_steps,
            settings.max_actor_ckpt_to_keep,
            write,
        )
        self.checkpoint_callback.on_save(
            trainer=self, global_step=self.global_steps, checkpoint_dir=str(target)
        )
        self._saved = self.global_steps

    def _compute_metrics(
        self, batch: Any, metrics: dict[str, Any], timing_raw: Any, global_steps: int, epoch: int
    ) -> None:
        """Writes the step's trajectories and then its row; ends the run here if it should stop."""
        step = global_steps - 1
        self._made = global_steps
        self._write_trajectories(step)
        trajectories = trajectories_of(self._rows)
        wanted = self.run_config.batch.prompts * self.run_config.batch.samples
        row = {
            **training_metrics(
                self.objective, step, self._rows, self._update, self.run_config.importance_cap
            ),
            **rollout_statistics(trajectories),
            **self._environments(step),
            "rollout/dropped": float(wanted - len(trajectories)),
            "rollout/trained_share": len(trajectories) / wanted,
            "perf/padding_share": self._passes.padding_share,
            **sampler_gap(self._rows),
            **self._skipped(),
            **_times(
                timing_raw,
                time.perf_counter() - self._started,
                self._generated if self.run_config.engine.ahead else None,
            ),
        }
        if self.run_config.engine.ahead:
            row["rollout/staleness"] = self._staleness
            self._staleness = self._updates
        sampled = sum(t.response_tokens for t in trajectories)
        row["tokens_per_second"] = sampled / max(1e-9, row["time/step"])
        self.metrics.write(row)
        every = self.run_config.evaluation.every
        if every and global_steps % every == 0 and global_steps < self.run_config.steps:
            self._evaluate("student", global_steps, self._sampling(), curve=True)
        if global_steps < self.run_config.steps:
            self._stop.obey()

    # Methods that verl does not call

    def _by_environment(self) -> bool:
        """Whether the loss needs to know which environment a token belongs to."""
        return any(self.run_config.by_environment(key) for key in OVER)

    def _use(self, row: Row, step: int) -> TokenUse:
        threshold = threshold_of(self._threshold, row.trajectory.env)
        return expected_use(self.objective, row, step, threshold)

    def _nothing_usable(self) -> ConfigError:
        return ConfigError(
            f"step {self.global_steps - 1}: no episode of the batch could be used; the log of "
            "the rollout workers gives the reason"
        )

    def _teachers(self) -> list[Any]:
        """Returns verl's replicas of all teachers."""
        manager = self.teacher_model_manager
        managers = () if manager is None else manager.teacher_model_managers.values()
        return [replica for one in managers for replica in one.rollout_replicas]

    @contextmanager
    def _teacher_awake(self) -> Iterator[None]:
        """Wakes teachers that have the student's GPUs, whose servers must be asleep.

        Sleeping servers keep their weights in the node's ordinary memory.
        """
        asyncio.run(_together([replica.wake_up() for replica in self._teachers()]))
        try:
            yield
        finally:
            asyncio.run(_together([replica.sleep() for replica in self._teachers()]))

    def _environments(self, step: int) -> dict[str, float]:
        """Returns the figures of each environment of a mixture, and of teachers that tasks name."""
        config = self.run_config
        if config.mix is None and config.model.teacher_key is None:
            return {}
        kept = [float(self._use(row, step).kept.sum()) for row in self._rows]
        return parts_of_step(config, trajectories_of(self._rows), kept)

    def _skipped(self) -> dict[str, int]:
        skips = self.run_config.on_nonfinite == "skip"
        return {"update/skipped": self._update.skipped} if skips else {}

    def _write_trajectories(self, step: int) -> None:
        settings = self.run_config.logging
        if not settings.every or step % settings.every:
            return
        chosen = self._rows[: settings.trajectories]
        self._fetch_pictures(trajectories_of(chosen), self._keys[: len(chosen)])
        for row in chosen:
            record = trajectory_record(
                row.trajectory,
                step=step,
                who="student",
                pictures=save_pictures(row.trajectory, self.folder),
                decode=self._chat.raw,
                use=self._use(row, step),
            )
            self.trajectories.write(record)

    def _fetch_pictures(self, trajectories: Sequence[Trajectory], keys: Sequence[str]) -> None:
        """Fetches the pictures of some trajectories; those of a whole step can be gigabytes."""
        if self._vision is None or not keys:
            return
        table = transfer_queue.kv_batch_get(
            keys=list(keys), partition_id=TRAIN, select_fields=["multi_modal_inputs"]
        )
        for trajectory, row in zip(trajectories, plain_rows(table), strict=True):
            trajectory.images = [self._vision.adopt(p) for p in pixels_of(row)]

    def _sampling(self) -> Sampling:
        return Sampling(self.run_config.sampling.temperature, self.run_config.sampling.top_p)

    def _evaluate_ends(self, step: int, who: str) -> None:
        if not self.run_config.evaluation.tasks:
            return
        rows = read_metrics(self.folder / "metrics.jsonl")
        for sampling in ends_due(rows, who, step, self._sampling()):
            self._evaluate(who, step, sampling, curve=False)

    def _evaluate(self, who: str, step: int, sampling: Sampling, *, curve: bool) -> None:
        settings = self.run_config.evaluation
        by_teacher = who == "teacher"
        swap = by_teacher and self._shared
        if swap:
            self.checkpoint_manager.sleep_replicas()
        wanted = settings.curve_tasks if curve else settings.tasks
        episodes = held_out(tasks_of(self.task_counts, "eval"), wanted)
        if by_teacher:
            episodes = with_teachers(self.run_config, episodes)
        with self._teacher_awake() if swap else nullcontext():
            played = self.rollouts.evaluate(
                episodes,
                sampling,
                (self.run_config.seed, 2),
                by_teacher=by_teacher,
                # What is missing at the ends is evaluated on resuming, a point of the curve is not.
                check=(lambda: None) if curve else self._stop.obey,
            )
        if swap:
            self.checkpoint_manager.update_weights(self.global_steps)  # wakes the student
        if not by_teacher:
            check_prompts(self._prompts, played)
        result = EvaluationResult.of(played)
        row = evaluation_row(result, who, step, sampling, curve=curve)
        self.metrics.write({**row, **success_by_teacher(self.run_config, played)})


def importance_weights(table: TensorDict, settings: Any) -> dict[str, Any]:
    """Returns verl's importance weights of a batch, nested, by their field `WEIGHTS`.

    Args:
        table: the batch, with ``response_mask``, ``rollout_log_probs`` and ``old_log_probs``.
        settings: verl's ``algorithm.rollout_correction``; without weights nothing is returned.
    """
    if settings.rollout_is is None:
        return {}
    names = ("response_mask", "rollout_log_probs", "old_log_probs")
    data = DataProto(batch=table.select(*names).to_padded_tensor())
    data, _ = compute_rollout_correction_and_add_to_batch(data, settings)
    return {WEIGHTS: response_to_nested(data.batch[WEIGHTS], table["response_mask"])}


def _spread(values: Sequence[float], live: Sequence[bool], mask_BT: Tensor) -> Tensor:
    """Returns the value of each live row at all of its tokens, and 0 elsewhere, (rows, time)."""
    spread_BT = torch.zeros(mask_BT.shape, dtype=torch.float32)
    spread_BT[torch.tensor(live)] = torch.tensor(values, dtype=torch.float32)[:, None]
    return spread_BT * mask_BT


def _times(raw: Mapping[str, float], total: float, generated: float | None) -> dict[str, float]:
    """Returns verl's timings under this project's names.

    A teacher with GPUs of its own scores during generation: its time is in ``time/generate``.

    Args:
        raw: of verl's own parts.
        total: seconds of the step.
        generated: seconds in which its episodes were generated during the step before, of which
            only the wait for the next ones is a part; None where the step waits for its own.
    """
    waited = raw.get("gen", 0.0) + raw.get("wait", 0.0)
    parts = {
        "generate" if generated is None else "wait": waited,
        "teacher": raw.get("teacher", 0.0),
        "old_logp": raw.get("old_log_prob", 0.0),
        "update": raw.get("update_actor", 0.0),
        "sync": raw.get("update_weights", 0.0),
        "checkpoint": raw.get("save_checkpoint", 0.0),
    }
    parts["other"] = max(0.0, total - sum(parts.values()))
    if generated is not None:
        parts["generate"] = generated
    return {**{f"time/{name}": value for name, value in parts.items()}, "time/step": total}


async def _together(calls: Sequence[Awaitable[Any]]) -> None:
    await asyncio.gather(*calls)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
