"""Runs an evaluation, from its configuration to its files."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import reopold_agent.envs  # noqa: F401  # registers the environments
from reopold_agent.cli.hydra import plain_values
from reopold_agent.common.files import write_text_atomic
from reopold_agent.common.pixels import PixelLimits
from reopold_agent.common.signals import sigterm_as_interrupt
from reopold_agent.config import PolicyConfig, ToolsConfig, build, config_differences
from reopold_agent.envs.base import show_as
from reopold_agent.envs.from_config import shown_sizes
from reopold_agent.envs.registration import make_found
from reopold_agent.errors import CheckpointError, ConfigError, ModelError
from reopold_agent.evaluate.answers import (
    Row,
    answer_questions,
    benchmark_row,
    benchmark_seed,
    identity,
    read_rows,
)
from reopold_agent.evaluate.benchmarks import (
    EMBEDDED,
    Benchmark,
    LoadedBenchmark,
    load_benchmark,
    select,
)
from reopold_agent.evaluate.environments import (
    environment_questions,
    questions_digest,
    run_settings,
)
from reopold_agent.evaluate.judging import (
    judge_name,
    judge_rows,
    merged_row,
    read_replies,
    row_key,
)
from reopold_agent.evaluate.latency import LatencyPoint, measure_latency
from reopold_agent.evaluate.plots import make_plots
from reopold_agent.evaluate.protocol import Play, PlayConfig, differences, play_of
from reopold_agent.evaluate.questions import LOOKED_AT, Questions
from reopold_agent.evaluate.report import (
    differences_lines,
    environment_line,
    markdown,
    write_page,
)
from reopold_agent.evaluate.results import benchmark_results
from reopold_agent.evaluate.words import shipped_benchmarks
from reopold_agent.judges.llm import ProseJudge, make_judge
from reopold_agent.policies.base import Closeable, Policy
from reopold_agent.policies.loading import (
    LoadedModel,
    ModelSpec,
    Processing,
    check_available,
    context_length,
    device_name,
    known_weights,
    load_model,
    load_processing,
    model_path,
    pick_device,
    sees_pictures,
)
from reopold_agent.policies.registry import is_trainers_own, make_policy, reads_weights
from reopold_agent.policies.server import Identity, ServerPolicy
from reopold_agent.policies.templates import chat_template
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import RolloutLimits, RolloutRunner
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.tracking.summary import write_json_atomic
from reopold_agent.types import IMAGE_MARK, Sampling, StopReason

FREE_TO_CHANGE = ("judge", "ks", "engine", "benchmark", "suite", "latency", "tracking", "tools")
"""Settings that do not influence a response: a resumed evaluation may change them.

Another judge is asked about the saved answers again (`judging.judge_rows`).
"""

DEFAULT = "demo"
"""Benchmark of a command that names neither benchmarks nor environments."""


@dataclass(frozen=True)
class EvalEngineConfig:
    """Device and concurrency; results do not depend on them."""

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
    pixels: dict[str, Any]
    protocol: dict[str, Any]
    sources: dict[str, Any]
    engine: EvalEngineConfig
    latency: LatencyConfig
    judge: dict[str, Any]
    ks: list[int]
    seed: int
    benchmark: list[str] = field(default_factory=list)
    suite: str | None = None
    environments: dict[str, Any] = field(default_factory=dict)
    samples: int | None = None
    revision: str | None = None
    dtype: str = "auto"
    attention: str = "sdpa"
    chat_template: str | None = None
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    tracking: dict[str, Any] = field(default_factory=dict)
    tools: ToolsConfig = field(default_factory=ToolsConfig)


def load_config(composed: DictConfig) -> tuple[EvaluateConfig, dict[str, Any]]:
    """Checks a composed configuration.

    Returns:
        The typed configuration, and the same values untyped.

    Raises:
        ConfigError: a setting is wrong; the message names it.
    """
    raw = plain_values(composed)
    named = raw.get("benchmark") or []
    raw["benchmark"] = [named] if isinstance(named, str) else named
    config = build(EvaluateConfig, raw)
    if config.samples is not None and config.samples < 1:
        raise ConfigError(f"samples must be at least 1, got {config.samples}")
    if config.chat_template is not None:
        config = replace(config, chat_template=chat_template(config.chat_template))
    return config, raw


class Evaluation:
    """An evaluation: rolls out, judges and scores.

    Writes ``responses.jsonl``, ``judged.jsonl`` and ``results.json``, and for readers
    ``results.md``, ``report.html`` and ``plots``.

    Args:
        config: the checked configuration.
        raw: the same as plain values, to be saved and to be compared on resume.
        folder: output folder; an interrupted evaluation in it is continued.
    """

    def __init__(self, config: EvaluateConfig, raw: Mapping[str, Any], folder: Path) -> None:
        self.config, self._raw, self.folder = config, dict(raw), RunFolder(folder)
        self.rows: dict[str, list[Row]] = {}
        self._saved: dict[str, list[Row]] = {}

    def run(self) -> dict[str, Any]:
        """Evaluates and returns the content of ``results.json``.

        Raises:
            ReopoldError: an error that the user can correct. Data and judge are checked before a
                model is loaded.
        """
        self.folder.refuse_other("evaluate")
        with sigterm_as_interrupt(), self.folder.lock():
            self._check_resume()
            asked = self._questions()
            self._saved = read_rows(self.folder.path / "responses.jsonl")
            self._check_answers(asked)
            spec = self._model_spec()
            weights = reads_weights(self.config.policy.student)
            found = check_available(spec, "model", weights=weights)
            model = self._check_model(spec, found)
            sees = sees_pictures(found)
            pictured = [each.name for each in asked if each.has_pictures]
            if pictured and not sees:
                raise ModelError(
                    f"{self.config.checkpoint} cannot see the pictures of {', '.join(pictured)}.\n"
                    "Give a vision-language checkpoint (model=DIR), or questions without pictures."
                )
            with make_judge(self.config.judge) as judge:
                self.folder.write_template(self.config.chat_template)
                self.folder.write_config(OmegaConf.to_yaml(OmegaConf.create(self._raw)))
                write_json_atomic(self.folder.model, model)
                return self._run(asked, spec, judge)

    def _questions(self) -> list[Questions]:
        """Reads the benchmarks' rows and opens the environments.

        Raises:
            ReopoldError: something cannot be found, read or made.
        """
        config = self.config
        chosen = select(config.benchmarks, config.benchmark, config.suite)
        if not chosen and not config.environments:
            chosen = select(config.benchmarks, [DEFAULT], None)
        loaded = [load_benchmark(self._sampled(benchmark)) for benchmark in chosen]
        asked = [self._benchmark_questions(each) for each in loaded]
        for name, sections in config.environments.items():
            settings = run_settings(name, sections, vars(config.tools), config.engine.concurrency)
            asked.append(
                environment_questions(
                    f"{name}-env" if name in config.benchmarks else name,
                    settings,
                    samples=config.samples or 1,
                    seed=config.seed,
                )
            )
        return asked

    def _run(
        self, asked: Sequence[Questions], spec: ModelSpec, judge: ProseJudge
    ) -> dict[str, Any]:
        device = pick_device(self.config.engine.device)
        if self.config.engine.threads is not None:
            torch.set_num_threads(self.config.engine.threads)
        elif spec.path.startswith("demo:"):
            torch.set_num_threads(1)  # a model this small is fastest on one thread
        self._check_turns(asked, spec)
        if is_trainers_own(self.config.policy.student):
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
            "benchmarks": self._earlier(),
        }
        kept = {*results["benchmarks"]} - {each.name for each in asked}
        if kept:
            results["kept"] = sorted(kept)
        started = time.perf_counter()
        chat: ChatRenderer | None = None
        policy: Policy | None = None
        limits = [limits for each in asked for limits in each.facts["pixels"].values()]
        most = max(int(each["max_pixels"]) for each in limits)
        try:
            for each in asked:
                needed = ChatRenderer(model.tokenizer, stop_at_tool_call=each.stop_at_tool_call)
                if policy is None or chat is None or chat.stop_ids != needed.stop_ids:
                    _close(policy)
                    policy = self._policy(model, needed, most)
                    results["model"].update(self._check_served(policy))
                chat = needed
                results["benchmarks"][each.name] = self._answer(each, model, chat, policy, judge)
                write_json_atomic(self.folder.path / "results.json", results)
        finally:
            _close(policy)
        results["judge"] = {**judge.describe(), "counters": judge.counters()}
        results["seconds"] = round(time.perf_counter() - started, 1)
        write_json_atomic(self.folder.path / "results.json", results)
        write_text_atomic(self.folder.path / "results.md", markdown(results))
        rows = [*self._kept_rows(kept), *(row for each in self.rows.values() for row in each)]
        write_page(results, rows, self.folder.path, self.folder.path / "report.html")
        make_plots(results, self.folder.plots)
        return results

    def _earlier(self) -> dict[str, Any]:
        """Returns the figures in the folder by benchmark: those that are not asked again stay."""
        path = self.folder.path / "results.json"
        if not (path.is_file() and (self.folder.path / "responses.jsonl").is_file()):
            return {}
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))["benchmarks"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error!r}\nRemove it, and give each command that used this "
                "folder again: the answers are still there."
            ) from error
        return found

    def _kept_rows(self, names: Collection[str]) -> list[Row]:
        """Returns the saved rows of these benchmarks, with the replies of their judge."""
        replies = read_replies(self.folder.path / "judged.jsonl")
        kept = (row for name, rows in self._saved.items() if name in names for row in rows)
        return [merged_row(row, replies.get(row_key(row))) for row in kept]

    def _check_turns(self, asked: Sequence[Questions], spec: ModelSpec) -> None:
        """Checks, before the model is loaded, that its chat template suits the turns to play.

        Raises:
            ModelError: it rewrites earlier turns, and several are possible.
        """
        weights = reads_weights(self.config.policy.student)
        model = load_processing(spec, "model", weights=weights)
        for each in asked:
            chat = ChatRenderer(model.tokenizer, stop_at_tool_call=each.stop_at_tool_call)
            runner = each.make_runner(chat, model.vision)
            runner.check_template()
            runner.close()

    def _policy(self, model: Processing, chat: ChatRenderer, max_pixels: int) -> Policy:
        """Makes the policy to evaluate: ``policy.student`` of the configuration."""
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
            max_pixels=max_pixels,
            seed=self.config.seed,
        )

    def _answer(
        self,
        questions: Questions,
        model: Processing,
        chat: ChatRenderer,
        policy: Policy,
        judge: ProseJudge,
    ) -> dict[str, Any]:
        """Rolls out and judges all answers; returns what is reported."""
        runner = questions.make_runner(chat, model.vision)
        context = context_length(model.config)
        if context is not None:
            room = context - 1  # the answer has a token
            if (runner.limits.max_prompt_tokens or context) > room:
                limit = "the room in the model's context"
                runner.limits = replace(runner.limits, max_prompt_tokens=room, prompt_limit=limit)
        folder = self.folder.path
        total = questions.count * questions.samples
        started = time.perf_counter()
        try:
            with Progress(total) as progress:
                progress.start(total, 0)
                # Before hours are spent on other questions, or asked in another way, than meant.
                if questions.benchmark is None:
                    progress.note(environment_line(questions.name, questions.facts))
                for line in differences_lines({questions.name: questions.facts}):
                    progress.note(line)
                most = questions.facts["budget"]["max_tokens"]
                if context is not None and most >= context:
                    progress.note(
                        f"warning: {questions.name}: an answer may have {most:,} tokens, and the "
                        f"model's context is {context:,}, the prompt included. What it writes "
                        "beyond that may be noise."
                    )
                done = 0

                def count(row: Row) -> None:
                    nonlocal done
                    done += 1
                    progress.activity(f"{questions.name}: {done} new answers")

                rows = answer_questions(
                    runner,
                    policy,
                    questions,
                    saved=self._saved.get(questions.name, ()),
                    responses=folder / "responses.jsonl",
                    folder=folder,
                    on_row=count,
                    context=context,
                )
            played = time.perf_counter() - started
            points: list[LatencyPoint] = []
            if self.config.latency.ks:
                points = measure_latency(
                    runner,
                    policy,
                    ks=self.config.latency.ks,
                    questions=min(self.config.latency.questions, questions.count),
                    sampling=questions.sampling,
                    seed=self.config.seed,
                )
        finally:
            runner.close()
        rows = judge_rows(rows, judge, folder / "judged.jsonl")
        self.rows[questions.name] = rows
        figures = benchmark_results(
            rows, questions.benchmark, ks=self.config.ks, seed=self.config.seed
        )
        return {
            **figures,
            "played_seconds": round(played, 1),
            **questions.facts,
            **({"judge": judge_name(rows, judge)} if questions.benchmark is not None else {}),
            **({"questions_sha256": questions_digest(rows)} if questions.benchmark is None else {}),
            "latency": [vars(point) for point in points],
        }

    def _benchmark_questions(self, loaded: LoadedBenchmark) -> Questions:
        benchmark, tasks = loaded.benchmark, loaded.tasks
        given = self.config.agentic if benchmark.play == "agentic" else self.config.single
        play = play_of(benchmark, self.config.protocol, given, self.config.pixels)
        judge = str(self.config.judge.get("name", "none"))
        # Embedded tasks are drawn when they are looked at.
        first = range(min(len(tasks), LOOKED_AT) if benchmark.format in EMBEDDED else len(tasks))
        return Questions(
            name=benchmark.name,
            count=len(tasks),
            samples=benchmark.samples,
            sampling=Sampling(play.temperature, play.top_p),
            seed=benchmark_seed(benchmark, self.config.seed),
            make_runner=lambda chat, vision: self._runner(loaded, given.env, play, chat, vision),
            row_of=lambda trajectory: benchmark_row(benchmark, tasks[trajectory.index], trajectory),
            has_pictures=any(tasks[index].images for index in first),
            facts={
                "sampling": {"temperature": play.temperature, "top_p": play.top_p},
                "budget": {"max_turns": play.max_turns, "max_tokens": play.max_response_tokens},
                "pixels": asdict(play.pixels),
                "prompt": self._prompt(loaded, given.env, play),
                "files": dict(loaded.files),
                "left_out": len(loaded.left_out),
                "left_out_rows": list(loaded.left_out),
                "repeats": loaded.repeats,
                "without_picture": loaded.blind,
                "protocol": str(self.config.protocol.get("name", "")),
                "differences": differences(loaded, play, judge),
            },
            benchmark=benchmark,
            identities=lambda indices: (identity(tasks[index]) for index in indices),
        )

    def _runner(
        self,
        loaded: LoadedBenchmark,
        env: str,
        play: Play,
        chat: ChatRenderer,
        vision: VisionProcessor | None,
    ) -> RolloutRunner:
        return RolloutRunner(
            lambda: make_benchmark_env(loaded, env, play, self.config.tools),
            chat,
            vision,
            prompt_pixels=PixelLimits(**vars(play.pixels.prompt)),
            observation_pixels=PixelLimits(**vars(play.pixels.observation)),
            limits=RolloutLimits(
                max_response_tokens=play.max_response_tokens,
                max_turn_tokens=play.max_turn_tokens,
                max_turns=play.max_turns,
                env_seconds=self.config.engine.env_seconds,
                concurrency=self.config.engine.concurrency,
            ),
        )

    def _prompt(self, loaded: LoadedBenchmark, env: str, play: Play) -> dict[str, str]:
        """Returns the system message and the first question as the model sees them."""
        made = make_benchmark_env(loaded, env, play, self.config.tools)
        observation, info = made.reset(options={"split": "eval", "index": 0})
        made.close()
        first = observation["text"].replace(IMAGE_MARK, "<image>")
        return {"system": str(info["system_prompt"]), "first_question": first}

    def _sampled(self, benchmark: Benchmark) -> Benchmark:
        """Returns the benchmark with the samples that its own setting, or that of all, says."""
        samples = self.config.samples or self.config.protocol.get("samples")
        usual = shipped_benchmarks().get(benchmark.name, {}).get("samples", Benchmark.samples)
        entry = self.config.benchmarks[benchmark.name]
        own = "samples" in entry and benchmark.name not in shipped_benchmarks()
        if HydraConfig.initialized():  # the composed settings do not tell who set the usual number
            words = HydraConfig.get().overrides.task
            own |= any(w.startswith(f"benchmarks.{benchmark.name}.samples=") for w in words)
        if samples is None or benchmark.samples != usual or own:
            return benchmark
        return replace(benchmark, samples=samples)

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
            chat_template=self.config.chat_template,
        )

    def _check_resume(self) -> None:
        if not self.folder.config.is_file() or not (self.folder.path / "responses.jsonl").exists():
            return
        saved: Any = OmegaConf.to_container(OmegaConf.load(self.folder.config))
        now = dict(self._raw)
        played = saved.get("environments", {}), now["environments"]
        # Kept, so that a later command that plays them again is compared with their settings.
        self._raw["environments"] = {**played[0], **played[1]}
        for each, own in zip((saved, now), played, strict=True):
            # Others may be added or left out, like benchmarks.
            each["environments"] = {name: own[name] for name in {*played[0]} & {*played[1]}}
        self.folder.same_template(saved, now, self.config.chat_template)
        different = config_differences(saved, now, FREE_TO_CHANGE)
        if different:
            raise CheckpointError(
                f"{self.folder.path} holds an evaluation with other settings (saved -> now):\n  "
                + "\n  ".join(different)
                + "\nGive the same settings to continue it, or another hydra.run.dir."
            )

    def _check_model(self, spec: ModelSpec, found: Any) -> dict[str, Any]:
        """Refuses to continue if the saved answers are those of other weights.

        Args:
            spec: the checkpoint.
            found: its configuration (`check_available`).

        Returns:
            What ``model.json`` is to say: where the weights are, and what tells them from others.

        Raises:
            CheckpointError: they are others, or ``model.json`` cannot be read.
        """
        own = reads_weights(self.config.policy.student)
        weights = known_weights(spec, found) if own else None  # else `_check_served` asks
        now = {"loaded": spec.path, "weights": weights}
        if not self._saved or not self.folder.model.is_file():  # or of an earlier version
            return now
        try:
            before: dict[str, Any] = json.loads(self.folder.model.read_text("utf-8"))
            loaded, had = before["loaded"], before["weights"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"cannot read {self.folder.model}: {error!r}\n"
                "Remove it if the model is still the same, or give another hydra.run.dir."
            ) from error
        if None in (had, weights):  # without weights of its own: those of a server
            return before if weights is None else now
        if had != weights:
            raise CheckpointError(
                f"{self.folder.path} holds answers of other weights: {loaded} then, "
                + ("which has changed since.\n" if loaded == spec.path else f"{spec.path} now.\n")
                + "Give another hydra.run.dir, or remove the folder to evaluate these in it."
            )
        return now

    def _check_served(self, policy: Policy) -> dict[str, Any]:
        """Refuses to continue if a server has another model than the one that gave saved answers.

        Returns:
            What ``results.json`` is to say of the served model; empty without a server.

        Raises:
            CheckpointError: it is another one.
        """
        if not isinstance(policy, ServerPolicy) or policy.served is None:
            return {}
        now = policy.served
        record: dict[str, Any] = json.loads(self.folder.model.read_text("utf-8"))
        if "served" in record:
            before = Identity(**record["served"])
            same = before.model == now.model
            if None not in (before.weights, now.weights):
                same = before.weights == now.weights
            if not same:
                raise CheckpointError(
                    f"{self.folder.path} holds answers of another served model: '{before.model}' "
                    f"then, '{now.model}' now"
                    + (", with other weights" if before.model == now.model else "")
                    + ".\nServe the first one again, or give another hydra.run.dir."
                )
        served = {"served": vars(now)}
        write_json_atomic(self.folder.model, {**record, "weights": now.weights, **served})
        return served

    def _check_answers(self, asked: Sequence[Questions]) -> None:
        """Refuses to continue if the questions are others than those of the saved answers."""
        for each in asked:
            rows = {row["index"]: row for row in self._saved.get(each.name, ())}
            if each.benchmark is None:  # an episode that did not start does not say what it asks
                rows = {i: row for i, row in rows.items() if row["stop"] != StopReason.ENV_ERROR}
            played = [index for index in sorted(rows) if index < each.count]
            if each.identities is None or not played:
                continue
            for index, found in zip(played, each.identities(played), strict=False):
                row = rows[index]
                # Earlier versions did not record all of it.
                if all(row[key] == value for key, value in found.items() if key in row):
                    continue
                if [*each.identities([index])] != [found]:
                    continue  # an environment that asks something else each time
                was, now = (str({**row, **known}["question"])[:40] for known in (row, found))
                told = f"was '{was}', now it is '{now}'"
                if was == now:
                    told = f"'{was}', has other words, answers, options or pictures now"
                raise CheckpointError(
                    f"{self.folder.path} holds answers to other questions of {each.name} "
                    f"(number {index} {told}).\n"
                    "Give the same data to continue it, or another hydra.run.dir."
                )


def _close(policy: Policy | None) -> None:
    if isinstance(policy, Closeable):
        policy.close()


def make_benchmark_env(
    loaded: LoadedBenchmark, env: str, play: Play, tools: ToolsConfig
) -> gymnasium.Env[Any, str]:
    """Makes the environment ``env`` (a Gymnasium id) with the benchmark's rows as ``eval``."""
    isolation = dict(vars(tools))
    isolation["mode"] = isolation.pop("isolation")
    more: dict[str, Any] = {}
    if isolation["mode"] not in ("auto", "none"):
        more["tool_isolation"] = isolation
    made = make_found(
        env,
        f"{loaded.benchmark.play}.env",
        data={"eval": loaded.tasks},
        max_turns=play.max_turns,
        **more,
        **play.env_kwargs,
    )
    show_as(made, shown_sizes(play.pixels))
    return made
