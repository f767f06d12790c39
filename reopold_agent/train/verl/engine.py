"""Starts a run on verl: checks, Ray, the process that drives it, and the summary at the end."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reopold_agent.common import processes
from reopold_agent.common.files import replaced_folder, write_json_atomic
from reopold_agent.config import TrainConfig
from reopold_agent.errors import CheckpointError, ConfigError, MissingExtraError, ReopoldError
from reopold_agent.objectives import Objective
from reopold_agent.policies.loading import (
    ModelSpec,
    Processing,
    check_available,
    check_for_vllm,
    check_vocabularies,
    load_model,
    load_processing,
    student_spec,
    without_weights,
)
from reopold_agent.policies.saving import read_back
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.checks import checked_run
from reopold_agent.tracking.metrics import read_metrics
from reopold_agent.tracking.plots import make_plots
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.summary import print_summary
from reopold_agent.train.banner import (
    banner,
    exploration_note,
    importance_note,
    leak_note,
    learning_rate_note,
    outcome_note,
    preflight_note,
    self_teacher_note,
    show_banner,
)
from reopold_agent.train.engine import (
    Engine,
    effective_importance_cap,
    model_specs,
    run_objective,
)
from reopold_agent.train.finish import next_commands, save_student, summarise
from reopold_agent.train.interrupts import Interrupts, say_stopped
from reopold_agent.train.verl.checkpoints import ADAPTER, newest_checkpoint, steps_of
from reopold_agent.train.verl.compose import (
    check_adapter,
    check_supported,
    run_device,
    student_kernel,
    verl_config,
)
from reopold_agent.train.verl.follow import Follower
from reopold_agent.train.verl.stop import StoppedError, StopRequest
from reopold_agent.train.verl.supported import student_gpus

_log = logging.getLogger(__name__)

PLUGIN = "reopold_agent.train.verl.plugin"
OBJECT_STORE_BYTES = 2 * 2**30
"""Memory of a cluster that this engine starts for ``engine.device=cpu``; else Ray decides."""

PRETENDED_CPUS = 64
"""The number of CPUs that Ray assumes on a laptop. Ray would otherwise refuse to start all of
verl's processes, although they wait more than they compute."""


class VerlEngine(Engine):
    """Trains a student on verl; with several nodes the run folder is on a path that all share."""

    def _run(self) -> dict[str, Any]:
        config = self.config
        checkpoint = newest_checkpoint(self.folder.checkpoints)
        saved = self._check_folder(checkpoint)
        done = 0 if checkpoint is None else steps_of(checkpoint)
        if done >= config.steps and self.folder.summary.is_file():
            return self._state.show_again()
        if saved is not None and saved["steps"] < config.steps:
            raise ConfigError(
                f"engine=verl cannot continue {self.folder.path} for more steps than the "
                f"{saved['steps']} that it was started with.\nStart a run from its student: "
                f"model.student.path={self.folder.final} hydra.run.dir=FOLDER."
            )
        objective = run_objective(config, saved)
        check_supported(config, objective)
        device = run_device(config.engine)
        student_kernel(config, device)  # refuses one that is not there
        specs = model_specs(config, objective)
        _require_verl()  # after what a machine without verl can tell
        os.environ.update(_environment(device))  # before anything of verl is imported here
        with_teacher = len(specs) > 1
        student, contexts = self._check_models(specs)
        self._state.check_models(checkpoint is not None, specs)
        config, tasks = checked_run(config, student, contexts.values(), self.folder.data_report)
        if config.engine.seeded_requests is None:
            engine = replace(config.engine, seeded_requests=device == "cpu")
            config = replace(config, engine=engine)
        notes = [
            self._state.check_data(checkpoint is not None),
            exploration_note(config, objective),
            learning_rate_note(config, saved),
            importance_note(config, objective),
            outcome_note(config),
            preflight_note(config, objective, checkpoint is not None),
            self_teacher_note(config, objective),
            leak_note(self.folder.data_report),
        ]
        # For verl's settings, the workers and the log, which all read the configuration.
        weights = {"importance_cap": effective_importance_cap(config, objective)}
        config = replace(config, objective={**config.objective, **weights})
        composed = verl_config(
            config, self.folder.path, with_teacher=with_teacher, device=device, contexts=contexts
        )
        _require_sender(composed.actor_rollout_ref.rollout.checkpoint_engine.backend)
        self._begin(objective, saved)
        self.folder.write_versions(device=device)
        started = time.perf_counter()
        with Progress(config.steps) as progress:
            precision = config.engine.precision
            if precision == "auto":
                precision = "float32" if device == "cpu" else "bfloat16"
            lines = banner(
                config,
                self.folder,
                student,
                tasks,
                device=f"{config.engine.nodes} x {config.engine.gpus_per_node} {device}",
                precision=precision,
                objective=objective,
                teacher=with_teacher,
            )
            show_banner(progress, lines, config, student, notes)
            progress.start(config.steps, done)
            if checkpoint is not None:
                progress.note(f"continuing from {checkpoint} at step {done}")
            progress.note("starting Ray, the trainer and the vLLM servers; this takes minutes")
            try:
                with Follower(self.folder.metrics, progress):
                    self._train(config, composed, objective, tasks, device, with_teacher)
            except KeyboardInterrupt as error:
                progress.stop()
                self._say_stopped(at_once=not isinstance(error.__cause__, StoppedError))
                raise
        return self._finish(time.perf_counter() - started)

    @staticmethod
    def _check_models(specs: Mapping[str, ModelSpec]) -> tuple[Processing, dict[str, int]]:
        """Checks the models' files and vocabularies; returns the student's processing and the
        context lengths by role."""
        contexts = {}
        for role, spec in specs.items():
            found = check_available(spec, role)
            check_for_vllm(found, spec.path, role)
            contexts[role] = int(found.get_text_config().max_position_embeddings)
        student = load_processing(specs["student"], "student")
        for role, spec in specs.items():
            if role != "student":
                check_vocabularies(student, load_processing(spec, role), role)
        if student.spec.lora is not None:
            check_adapter(without_weights(student))
        return student, contexts

    def _train(
        self,
        config: TrainConfig,
        composed: Any,
        objective: Objective,
        tasks: Mapping[str, Mapping[str, int]],
        device: str,
        with_teacher: bool,
    ) -> None:
        """Runs `runner.TaskRunner` on this machine and waits for it."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        from verl.trainer.ppo.utils import need_critic, need_reference_policy
        from verl.utils.config import validate_config

        validate_config(composed, need_reference_policy(composed), need_critic(composed))
        with self._cluster(composed, device, with_teacher):
            from reopold_agent.train.verl.runner import TaskRunner

            here = NodeAffinitySchedulingStrategy(
                node_id=ray.get_runtime_context().get_node_id(), soft=False
            )
            actor = ray.remote(TaskRunner).options(num_cpus=1, scheduling_strategy=here)
            runner = actor.remote(config, objective, str(self.folder.path), dict(tasks))
            running = [runner.run.remote(composed)]
            with Interrupts() as interrupts:
                StopRequest(self.folder.path).wait(
                    lambda seconds: bool(ray.wait(running, timeout=seconds)[0]), interrupts
                )
            self.interrupted = interrupts.error() if interrupts.received else None
            try:
                ray.get(running)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, StoppedError):
                    raise interrupts.error() from cause
                if isinstance(cause, ReopoldError):
                    raise cause from error
                _log.error("the processes' logs are in /tmp/ray/session_latest/logs of each node")
                raise

    def _say_stopped(self, *, at_once: bool) -> None:
        """Says what is saved, what is lost, and how to go on.

        Args:
            at_once: whether the trainer could not finish its step.
        """
        newest = newest_checkpoint(self.folder.checkpoints)
        if newest is None:
            lost = "the steps made so far are lost" if at_once else "nothing was trained yet"
            state = f"before the first checkpoint; {lost}.\nStart again with:"
        elif at_once:
            state = f"at once; what came after {newest} is lost.\nContinue with:"
        else:
            state = f"after step {steps_of(newest)}; saved {newest}.\nContinue with:"
        say_stopped(state, self._command, self.folder.path)

    @contextmanager
    def _cluster(self, composed: Any, device: str, with_teacher: bool) -> Iterator[None]:
        """Connects to a running cluster, or starts one on this machine."""
        import ray
        from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

        engine = self.config.engine
        environment = get_ppo_ray_runtime_env(composed)
        environment["env_vars"] = {
            **environment.get("env_vars", {}),
            **_environment(device),
            "TRANSFER_QUEUE_ENABLE": "1",
        }
        address = engine.ray_address or os.environ.get("RAY_ADDRESS")
        arguments: dict[str, Any] = {"runtime_env": environment, "log_to_driver": False}
        if address is not None:
            arguments["address"] = address
        elif device == "cpu":
            # Ray would kill processes at 95 % of the memory, and a laptop is smaller than a node.
            os.environ.setdefault("RAY_memory_usage_threshold", "0.98")
            gpus = student_gpus(engine, with_teacher) + engine.rollout_gpus_per_node
            gpus += engine.teacher_gpus_per_node if with_teacher else 0
            arguments.update(
                num_cpus=PRETENDED_CPUS,
                num_gpus=gpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
            )
        try:
            ray.init(**arguments)
        except ConnectionError as error:
            raise ConfigError(f"no Ray cluster answers at {address}: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()

    def _finish(self, seconds: float) -> dict[str, Any]:
        """Exports the student as ``final/`` and writes summary and plots."""
        checkpoint = newest_checkpoint(self.folder.checkpoints)
        if checkpoint is None:
            raise CheckpointError(f"verl left no checkpoint in {self.folder.checkpoints}")
        if not self._export(checkpoint / "actor"):
            _log.warning("%s was not read back: too little memory is free", self.folder.final)
        rows = read_metrics(self.folder.metrics)
        summary = summarise(rows, self.config, self.folder.path)
        summary["seconds"] = round(seconds, 1)
        summary["next"] = next_commands(self.config, self.folder.path, self._command)
        write_json_atomic(self.folder.summary, summary)
        make_plots(self.folder.path)
        print_summary(summary)
        return summary

    def _export(self, actor: Path) -> bool:
        """Writes the student of a checkpoint as ``final/``; returns whether it was read back."""
        spec = student_spec(self.config.model)
        if spec.lora is not None:
            cpu = torch.device("cpu")
            student = load_model(spec, "student", cpu, saved=actor / ADAPTER)
            return save_student(student, self.folder, ChatRenderer(student.tokenizer))
        exported = actor / "huggingface"
        if not (exported / "config.json").is_file():
            raise CheckpointError(f"verl exported no model to {exported}")
        # verl writes files of torchvision's picture processor; replace them by the student's.
        processing = load_processing(spec, "student")
        with replaced_folder(self.folder.final) as temporary:
            shutil.copytree(exported, temporary, dirs_exist_ok=True)
            processing.save_processing(temporary)
            return read_back(temporary, spec, spec.dtype) is not None


def _environment(device: str) -> dict[str, str]:
    """Returns the environment variables that every process of the run needs."""
    common = {"VERL_USE_EXTERNAL_MODULES": PLUGIN, processes.SWITCH: "1"}
    if device != "cpu":
        return common
    return {
        **common,
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def _require_verl() -> None:
    for package in ("verl", "ray", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "verl,vllm", "engine=verl")
    try:
        trl = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return
    if int(trl.split(".")[0]) >= 1:
        raise ConfigError(
            f"verl imports a class of trl that trl {trl} no longer has, if trl is installed; run "
            "pip uninstall trl (verl needs none)"
        )


def _require_sender(backend: str) -> None:
    """Refuses verl's way to send weights over NCCL where a package of it is missing."""
    if backend == "nccl" and importlib.util.find_spec("cupy") is None:
        raise ConfigError(
            "engine.rollout_gpus_per_node sends weights with verl's nccl, which needs cupy.\nRun "
            "pip install cupy-cuda12x (cupy-cuda13x beside a PyTorch for CUDA 13), or set "
            "engine.rollout_gpus_per_node=0."
        )
