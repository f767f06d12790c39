"""An evaluation from its configuration to its files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import torch
from omegaconf import OmegaConf

import reopold_agent.envs  # noqa: F401  # registers the environments
from reopold_agent.config import PixelsConfig, PolicyConfig, ToolsConfig, build, config_differences
from reopold_agent.errors import CheckpointError
from reopold_agent.eval.benchmarks import Benchmark, LoadedBenchmark, load_benchmark, select
from reopold_agent.eval.judging import judge_rows
from reopold_agent.eval.latency import LatencyPoint, measure_latency
from reopold_agent.eval.play import Row, play_benchmark
from reopold_agent.eval.plots import make_plots
from reopold_agent.eval.report import markdown, write_page
from reopold_agent.eval.results import benchmark_results
from reopold_agent.judges.llm import Judge, make_judge
from reopold_agent.policies.base import Closeable, Policy
from reopold_agent.policies.loading import (
    LoadedModel,
    ModelSpec,
    Processing,
    check_available,
    device_name,
    load_model,
    load_processing,
    model_path,
    pick_device,
)
from reopold_agent.policies.registry import is_trainers_own, make_policy, reads_weights
from reopold_agent.policies.vision import PixelLimits
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import RolloutLimits, RolloutRunner
from reopold_agent.tracking.files import write_text_atomic
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.tracking.signals import sigterm_as_interrupt
from reopold_agent.tracking.summary import write_json_atomic
from reopold_agent.types import IMAGE_MARK, Sampling

FREE_TO_CHANGE = ("judge", "ks", "engine", "benchmark", "suite", "latency", "tracking", "tools")
"""Settings that do not influence a response: a resumed evaluation may change them."""


@dataclass(frozen=True)
class PlayConfig:
    """How the benchmarks of one kind are played."""

    env: str
    temperature: float
    top_p: float
    max_turns: int
    max_response_tokens: int
    max_turn_tokens: int
    env_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalEngineConfig:
    """Where and how fast; changes no result."""

    device: str = "auto"
    threads: int | None = None
    concurrency: int = 64
    env_seconds: float = 120.0
    max_tokens_per_pass: int = 16384


@dataclass(frozen=True)
class LatencyConfig:
    """Seconds per question for k answers in parallel (paper, figures 1b and 13); off if empty."""

    ks: list[int] = field(default_factory=list)
    questions: int = 8


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything about an evaluation; see ``configs/evaluate.yaml``."""

    benchmarks: dict[str, Any]
    checkpoint: str
    agentic: PlayConfig
    single: PlayConfig
    pixels: PixelsConfig
    engine: EvalEngineConfig
    latency: LatencyConfig
    judge: dict[str, Any]
    ks: list[int]
    seed: int
    benchmark: list[str] = field(default_factory=list)
    suite: str | None = None
    samples: int | None = None
    revision: str | None = None
    dtype: str = "auto"
    attention: str = "sdpa"
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    tracking: dict[str, Any] = field(default_factory=dict)
    tools: ToolsConfig = field(default_factory=ToolsConfig)


class Evaluation:
    """Plays, judges and scores. Files: ``responses.jsonl``, ``judged.jsonl``, ``results.json``,
    and for people ``results.md``, ``report.html`` and ``plots``.

    Args:
        config: the checked configuration.
        raw: the same as plain values, for the folder and for comparing on resume.
        folder: where to; an interrupted evaluation in it is continued.
    """

    def __init__(self, config: EvaluateConfig, raw: Mapping[str, Any], folder: Path) -> None:
        self.config, self._raw, self.folder = config, dict(raw), RunFolder(folder)
        self.rows: dict[str, list[Row]] = {}

    def run(self) -> dict[str, Any]:
        """Evaluates and returns what ``results.json`` holds.

        Raises:
            ReopoldError: anything the user can mend. Data and judge are checked before a model
                is loaded.
        """
        with sigterm_as_interrupt(), self.folder.lock():
            self._check_resume()
            chosen = select(self.config.benchmarks, self.config.benchmark, self.config.suite)
            loaded = [load_benchmark(self._sampled(benchmark)) for benchmark in chosen]
            spec = self._model_spec()
            check_available(spec, "model", weights=reads_weights(self.config.policy.student))
            with make_judge(self.config.judge) as judge:
                self.folder.write_config(OmegaConf.to_yaml(OmegaConf.create(self._raw)))
                return self._run(loaded, spec, judge)

    def _run(
        self, loaded: Sequence[LoadedBenchmark], spec: ModelSpec, judge: Judge
    ) -> dict[str, Any]:
        device = pick_device(self.config.engine.device)
        if self.config.engine.threads is not None:
            torch.set_num_threads(self.config.engine.threads)
        elif spec.path.startswith("demo:"):
            torch.set_num_threads(1)  # a model this small is fastest on one thread
        own = is_trainers_own(self.config.policy.student)
        if own:
            model: Processing = load_model(spec, "model", device)
        else:
            weights = reads_weights(self.config.policy.student)
            model = load_processing(spec, "model", weights=weights)
        self.folder.write_versions(device=device_name(device))
        results: dict[str, Any] = {
            "model": {
                "path": self.config.checkpoint,
                "loaded": spec.path,
                "revision": spec.revision,
                "dtype": spec.dtype,
            },
            "seed": self.config.seed,
            "benchmarks": {},
        }
        started = time.perf_counter()
        chat = ChatRenderer(model.tokenizer)
        policy = self._policy(model, chat)
        try:
            for each in loaded:
                name = each.benchmark.name
                results["benchmarks"][name] = self._benchmark(each, model, chat, policy, judge)
                write_json_atomic(self.folder.path / "results.json", results)
        finally:
            if isinstance(policy, Closeable):
                policy.close()
        results["judge"] = {**judge.describe(), "counters": judge.counters()}
        results["seconds"] = round(time.perf_counter() - started, 1)
        write_json_atomic(self.folder.path / "results.json", results)
        write_text_atomic(self.folder.path / "results.md", markdown(results))
        rows = [row for each in self.rows.values() for row in each]
        write_page(results, rows, self.folder.path, self.folder.path / "report.html")
        make_plots(results, self.folder.plots)
        return results

    def _policy(self, model: Processing, chat: ChatRenderer) -> Policy:
        """Who answers: ``policy.student`` of the configuration."""
        if isinstance(model, LoadedModel):
            return model.policy(
                forbidden_ids=chat.forbidden_ids,
                stop_ids=chat.stop_ids,
                max_tokens_per_pass=self.config.engine.max_tokens_per_pass,
            )
        return make_policy(
            "student",
            self.config.policy.student,
            model,
            dtype=model.spec.dtype,
            forbidden_ids=chat.forbidden_ids,
            stop_ids=chat.stop_ids,
        )

    def _benchmark(
        self,
        loaded: LoadedBenchmark,
        model: Processing,
        chat: ChatRenderer,
        policy: Policy,
        judge: Judge,
    ) -> dict[str, Any]:
        benchmark = loaded.benchmark
        play = self.config.agentic if benchmark.play == "agentic" else self.config.single
        runner = self._runner(loaded, play, chat, model)
        sampling = Sampling(play.temperature, play.top_p)
        folder = self.folder.path
        total = len(loaded.tasks) * benchmark.samples
        started = time.perf_counter()
        try:
            with Progress(total) as progress:
                progress.start(total, 0)
                done = 0

                def count(row: Row) -> None:
                    nonlocal done
                    done += 1
                    progress.activity(f"{benchmark.name}: {done} new answers")

                rows = play_benchmark(
                    runner,
                    policy,
                    benchmark,
                    loaded.tasks,
                    sampling=sampling,
                    seed=self.config.seed,
                    responses=folder / "responses.jsonl",
                    folder=folder,
                    on_row=count,
                )
            played = time.perf_counter() - started
            points: list[LatencyPoint] = []
            if self.config.latency.ks:
                points = measure_latency(
                    runner,
                    policy,
                    ks=self.config.latency.ks,
                    questions=min(self.config.latency.questions, len(loaded.tasks)),
                    sampling=sampling,
                    seed=self.config.seed,
                )
        finally:
            runner.close()
        rows = judge_rows(rows, judge, folder / "judged.jsonl")
        self.rows[benchmark.name] = rows
        return {
            **benchmark_results(rows, benchmark, ks=self.config.ks, seed=self.config.seed),
            "played_seconds": round(played, 1),
            "sampling": {"temperature": play.temperature, "top_p": play.top_p},
            "budget": {"max_turns": play.max_turns, "max_tokens": play.max_response_tokens},
            "pixels": self._pixels(benchmark),
            "prompt": self._prompt(loaded, play),
            "files": dict(loaded.files),
            "latency": [vars(point) for point in points],
        }

    def _runner(
        self, loaded: LoadedBenchmark, play: PlayConfig, chat: ChatRenderer, model: Processing
    ) -> RolloutRunner:
        pixels = build(PixelsConfig, self._pixels(loaded.benchmark), "pixels.")
        return RolloutRunner(
            lambda: make_benchmark_env(loaded, play, self.config.tools),
            chat,
            model.vision,
            prompt_pixels=PixelLimits(**vars(pixels.prompt)),
            observation_pixels=PixelLimits(**vars(pixels.observation)),
            limits=RolloutLimits(
                max_response_tokens=play.max_response_tokens,
                max_turn_tokens=play.max_turn_tokens,
                max_turns=play.max_turns,
                env_seconds=self.config.engine.env_seconds,
                concurrency=self.config.engine.concurrency,
            ),
        )

    def _prompt(self, loaded: LoadedBenchmark, play: PlayConfig) -> dict[str, str]:
        """The system message, and the first question as the model is shown it."""
        env = make_benchmark_env(loaded, play, self.config.tools)
        observation, info = env.reset(options={"split": "eval", "index": 0})
        env.close()
        first = observation["text"].replace(IMAGE_MARK, "<image>")
        return {"system": str(info["system_prompt"]), "first_question": first}

    def _pixels(self, benchmark: Benchmark) -> dict[str, Any]:
        if benchmark.pixels is not None:
            return dict(benchmark.pixels)
        limits = self.config.pixels
        return {"prompt": vars(limits.prompt), "observation": vars(limits.observation)}

    def _sampled(self, benchmark: Benchmark) -> Benchmark:
        if self.config.samples is None:
            return benchmark
        return Benchmark(**{**vars(benchmark), "samples": self.config.samples})

    def _model_spec(self) -> ModelSpec:
        dtype = self.config.dtype
        if dtype == "auto":
            dtype = (
                "bfloat16" if pick_device(self.config.engine.device).type == "cuda" else "float32"
            )
        return ModelSpec(
            path=model_path(self.config.checkpoint),
            revision=self.config.revision,
            dtype=dtype,
            attention=self.config.attention,
        )

    def _check_resume(self) -> None:
        if not self.folder.config.is_file() or not (self.folder.path / "responses.jsonl").exists():
            return
        saved: Any = OmegaConf.to_container(OmegaConf.load(self.folder.config))
        different = config_differences(saved, self._raw, FREE_TO_CHANGE)
        if different:
            raise CheckpointError(
                f"{self.folder.path} holds an evaluation with other settings (saved -> now):\n  "
                + "\n  ".join(different)
                + "\nGive the same settings to continue it, or another hydra.run.dir."
            )


def make_benchmark_env(
    loaded: LoadedBenchmark, play: PlayConfig, tools: ToolsConfig
) -> gymnasium.Env[Any, str]:
    """An environment whose split ``eval`` is the benchmark's rows."""
    isolation = dict(vars(tools))
    isolation["mode"] = isolation.pop("isolation")
    more: dict[str, Any] = {}
    if isolation["mode"] not in ("auto", "none"):
        more["tool_isolation"] = isolation
    return gymnasium.make(
        play.env,
        disable_env_checker=True,
        data={"eval": loaded.tasks},
        max_turns=play.max_turns,
        **more,
        **{**play.env_kwargs, **dict(loaded.benchmark.env_kwargs or {})},
    )
