"""Plays the episodes of a preflight through the parts of a training step, without its update."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reopold_agent.config import TrainConfig
from reopold_agent.envs.base import ToolEnv
from reopold_agent.envs.from_config import make_env
from reopold_agent.errors import ConfigError, NonFiniteError
from reopold_agent.objectives import Needs, Objective
from reopold_agent.objectives.pieces import reward_floor
from reopold_agent.policies.loading import Processing, device_name
from reopold_agent.preflight.agreement import (
    different_ids,
    different_pictures,
    different_prompts,
    is_known_template,
    pixel_limits,
)
from reopold_agent.preflight.figures import (
    Gap,
    Outcome,
    TokenGroup,
    ToolUse,
    gap_of,
    outcome_of,
    token_groups,
    tool_use_of,
)
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.tracking.statistics import by_environment, distillation_statistics
from reopold_agent.train.behaviour import set_behaviour
from reopold_agent.train.collect import Collector, step_episodes
from reopold_agent.train.data_order import tasks_of
from reopold_agent.train.engine import run_objective
from reopold_agent.train.nonfinite import NonFiniteGuard
from reopold_agent.train.roles import make_roles
from reopold_agent.train.rows import (
    Row,
    StepBatch,
    entropy_threshold,
    set_advantages,
    trajectories_of,
)
from reopold_agent.train.setup import (
    compute_device,
    load_models,
    make_reference,
    make_scoring,
    make_updater,
    prepared,
    run_reader,
)
from reopold_agent.train.teachers import Teachers, run_teachers
from reopold_agent.train.timing import Clock
from reopold_agent.train.verl.compose import check_adapter, check_supported
from reopold_agent.types import StopReason, Trajectory

FLOOR = reward_floor(0.1)
"""Reward below which tokens are counted for objectives without a floor: the paper's."""


@dataclass(frozen=True)
class Agreement:
    """Where student and teacher differ; None where they do not.

    Attributes:
        ids: other ids for one text.
        pictures: other tokens for one picture.
        limits: other limits of their processors, which no picture here exceeds.
        prompts: another chat template of the teacher's.
        template: another chat template than the student's own, given by a setting.
        known: whether the run's chat template is one model's own.
        role: what messages call the teacher.
    """

    ids: str | None = None
    pictures: str | None = None
    limits: str | None = None
    prompts: str | None = None
    template: str | None = None
    known: bool = True
    role: str = "teacher"


@dataclass(frozen=True)
class Lengths:
    """Mean tokens per episode: prompt (and those of its pictures), response, observations; turns.

    ``longest`` is the longest response.
    """

    prompt: float
    pictures: float
    picture_tokens: float
    response: float
    longest: int
    observation: float
    turns: float


@dataclass(frozen=True)
class Played:
    """What the episodes of a preflight show.

    Attributes:
        config: the run's configuration, completed by the checks before training.
        objective: made for the run.
        device, precision: where and in which dtype was computed.
        outcome, tools, lengths: of the episodes.
        left_out: share of training tasks whose prompts are too long or cannot be used.
        entropy: mean entropy of the student's distributions at the sampled tokens, nats.
        rewards: R by kind of token; empty without a teacher.
        floor: reward below which tokens are counted.
        gap: between sampler and trainer; None without a usable episode.
        agreements: of the student and each teacher.
        invalid: why numbers cannot be trained on; "" if they can.
        uninformative: whether an objective that compares outcomes finds no difference.
        unread: number of answers that no rule can read; None if rules do not decide.
        why_unread: why the first of them cannot be read.
        gradient: norm of the gradient; None if it was not computed.
        seconds: of each phase.
        memory: most bytes in use: of the GPU, or of this process.
        gpu_memory: bytes of the GPU; None on a CPU.
    """

    config: TrainConfig
    objective: Objective
    device: str
    precision: str
    outcome: Outcome
    tools: ToolUse
    lengths: Lengths
    left_out: float
    entropy: float
    rewards: list[TokenGroup]
    floor: float
    gap: Gap | None
    agreements: list[Agreement]
    invalid: str
    uninformative: bool
    unread: int | None
    why_unread: str
    gradient: float | None
    seconds: dict[str, float]
    memory: float
    gpu_memory: float | None


def play(config: TrainConfig, episodes: int, tell: Callable[[str], None]) -> Played:
    """Plays the first episodes of a run and computes all that its first update would need.

    The tasks are those of the run's first step, one episode each (objectives that compare outcomes
    get groups). With ``engine=local`` the gradient is computed too, but no update is made.

    Args:
        config: the run's.
        episodes: how many to play.
        tell: shows what is being done.

    Raises:
        ReopoldError: the run could not start, or its models do not fit each other.
    """
    tell("checking the run")
    objective = run_objective(config)
    if objective.needs & Needs.DEMONSTRATIONS:
        raise ConfigError(
            f"a preflight plays the student's episodes, from which objective="
            f"{config.objective['name']} does not learn.\nStart the training itself with steps=1."
        )
    if config.engine.name == "verl":
        check_supported(config, objective)
    with tempfile.TemporaryDirectory() as folder:
        config, specs, tasks = prepared(config, objective, Path(folder) / "data_report.json")
    clock = Clock()
    tell("loading the models")
    student, teachers = load_models(config, specs)
    if config.engine.name == "verl":
        check_adapter(student.adapter.model)
    chat = ChatRenderer(student.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call)
    roles = make_roles(config, chat, student, teachers)
    scoring = make_scoring(config, objective, roles)
    reference = make_reference(config, objective, chat)
    guard = NonFiniteGuard("skip")
    reader = run_reader(config, chat, student, teachers)
    runner = make_runner(config, chat, student.vision, reader=reader)
    counts = tasks_of(tasks, "train")
    collector = Collector(config, objective, runner, roles.sampler, roles.teacher, counts)
    clock.lap("start")
    try:
        samples = min(config.batch.samples, episodes) if objective.needs & Needs.OUTCOME else 1
        drawn = [collector.order[k] for k in range(max(1, episodes // samples))]
        batch = StepBatch(len(drawn))
        done = 0

        def ended(row: Row) -> None:
            nonlocal done
            done += 1
            tell(f"playing: {done} of {len(drawn) * samples} episodes ended")
            if scoring is not None:
                scoring.begin(row)

        tell("playing")
        rows = collector.play(step_episodes(drawn, samples), (config.seed, 1, 0), ended)
        batch.add(rows, runner.stats)
        roles.rest()
        clock.lap("rollout")
        tell("computing log-probs")
        # Recomputed whatever `engine.old_logp` says: the gap is what is measured.
        invalid = set_behaviour(batch.usable, roles.trainer, "recompute")
        batch.drop([row for row, _ in invalid])
        clock.lap("old_logp")
        if scoring is not None:
            tell("scoring with the teacher")
            problems = scoring.finish(batch.usable, 0)
            invalid += problems.invalid
            batch.drop([*problems.failed, *(row for row, _ in problems.invalid)])
        if reference is not None and batch.usable:
            found = reference.score(batch.usable)
            invalid += found
            batch.drop([row for row, _ in found])
        clock.lap("teacher")
        usable = batch.usable
        uninformative = False
        if usable and objective.needs & Needs.OUTCOME:
            set_advantages(objective, usable)
            uninformative = not any(row.trajectory.advantage for row in usable)
        gradient = None
        wrong = f"{invalid[0][0]}: {invalid[0][1]}" if invalid else ""
        if usable and config.engine.name == "local":
            tell("computing a gradient")
            updater = make_updater(config, objective, roles, guard)
            try:
                threshold = entropy_threshold(
                    objective, usable, by_environment=config.by_environment("threshold_over")
                )
                gradient = updater.try_gradient(usable, 0, threshold)
            except NonFiniteError as error:
                wrong = wrong or str(error)
            clock.lap("update")
    finally:
        if scoring is not None:
            scoring.close()
        roles.close()
        runner.close()
    tell("reading the answers")
    trajectories = trajectories_of(rows)
    device, autocast = compute_device(config.engine)
    floor = FLOOR if objective.floor is None else objective.floor
    names, unread, why = _all_answers(config, trajectories)
    members = config.members.values()
    left_out = sum(len(each.data.left_out.get("train", ())) for each in members)
    logp = [row.behaviour[0] for row in usable]
    statistics = distillation_statistics(
        trajectories_of(usable), logp=logp, entropy=[row.behaviour[1] for row in usable]
    )
    taught = list(teachers.values()) if scoring else []
    template = Agreement(
        template=student.spec.path if chat.other_prompts() else None,
        known=is_known_template(student, taught),
    )
    # An aligned teacher may have other ids, pictures and prompts.
    aligned = {each.role for each in run_teachers(config) if each.model.align is not None}
    agreements = [
        _agreement(template, student, teachers[role], role, chat, [trajectories[i] for i in places])
        for role, places in Teachers.of_run(config, {role: role for role in teachers}).parts(
            trajectories if scoring else []
        )
        if role not in aligned
    ]
    generate = batch.stats.generate_seconds
    laps = clock.laps
    return Played(
        config=config,
        objective=objective,
        device=device_name(device),
        precision=str(autocast or torch.float32).removeprefix("torch."),
        outcome=outcome_of(trajectories),
        tools=tool_use_of(trajectories, names),
        lengths=_lengths(trajectories, chat.image_id),
        left_out=left_out / (left_out + sum(counts.values())),
        entropy=float(statistics.get("entropy/mean", float("nan"))),
        rewards=token_groups(trajectories_of(usable), logp, floor, chat.raw) if scoring else [],
        floor=floor,
        gap=gap_of(trajectories_of(usable), logp),
        agreements=agreements or [template],
        invalid=wrong,
        uninformative=uninformative,
        unread=unread,
        why_unread=why,
        gradient=gradient,
        seconds={
            "start": laps["start"],
            "generate": generate,
            "environment": max(0.0, laps["rollout"] - generate),
            **{name: laps[name] for name in ("old_logp", "teacher", "update") if name in laps},
        },
        memory=_memory(device),
        gpu_memory=(
            float(torch.cuda.get_device_properties(device).total_memory)
            if device.type == "cuda"
            else None
        ),
    )


def _memory(device: torch.device) -> float:
    """Returns the most bytes that were in use."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _agreement(
    template: Agreement,
    student: Processing,
    teacher: Processing,
    role: str,
    chat: ChatRenderer,
    trajectories: Sequence[Trajectory],
) -> Agreement:
    texts = [
        text
        for t in trajectories
        for text in (chat.raw(t.ids[: t.prompt_length].tolist()), *(turn.text for turn in t.turns))
    ]
    images = [image for t in trajectories for image in t.images]
    limits = None
    if student.vision is not None and teacher.vision is not None:
        ours, theirs = pixel_limits(student.vision), pixel_limits(teacher.vision)
        if ours != theirs:
            limits = f"{ours[0]:,} to {ours[1]:,} and {theirs[0]:,} to {theirs[1]:,} pixels"
    return replace(
        template,
        ids=different_ids(student, teacher, dict.fromkeys(texts)),
        pictures=different_pictures(student, teacher, images),
        limits=limits,
        prompts=different_prompts(student, teacher),
        role=role,
    )


def _all_answers(
    config: TrainConfig, trajectories: Sequence[Trajectory]
) -> tuple[tuple[str, ...] | None, int | None, str]:
    """Returns the results of `_answers` over all environments; None where one says nothing."""
    parts = by_environment(trajectories)
    every = [_answers(member, parts.get(name, ())) for name, member in config.members.items()]
    tools = [names for names, _, _ in every if names is not None]
    counts = [unread for _, unread, _ in every if unread is not None]
    return (
        tuple(dict.fromkeys(name for names in tools for name in names)) if tools else None,
        sum(counts) if len(counts) == len(every) else None,
        next((why for _, _, why in every if why), ""),
    )


def _answers(
    config: TrainConfig, trajectories: Sequence[Trajectory]
) -> tuple[tuple[str, ...] | None, int | None, str]:
    """Returns the environment's tools, how many answers no rule can read, and why the first.

    None for what the environment does not say, because it is no `ToolEnv`, or decides by itself.
    """
    made = make_env(config, max_turns=config.rollout.max_turns)
    env = made.unwrapped
    try:
        if not isinstance(env, ToolEnv):
            return None, None, ""
        names = tuple(tool.name for tool in env.tools)
        reasons: list[str] = []
        for t in trajectories:
            answer = t.info.get("answer")
            if t.stop_reason is not StopReason.ANSWER or not isinstance(answer, str):
                continue
            verdict = env.verdict(env.task("train", t.index), answer)
            if verdict is None:
                return names, None, ""
            if verdict.undecided:
                reasons.append(verdict.reason or "no rule can decide")
        return names, len(reasons), reasons[0] if reasons else ""
    finally:
        made.close()


def _lengths(trajectories: Sequence[Trajectory], image_id: int | None) -> Lengths:
    n = max(1, len(trajectories))
    shown = [_shown(t, image_id) for t in trajectories]
    return Lengths(
        prompt=sum(t.prompt_length for t in trajectories) / n,
        pictures=sum(count for count, _ in shown) / n,
        picture_tokens=sum(tokens for _, tokens in shown) / n,
        response=sum(t.response_tokens for t in trajectories) / n,
        longest=max((len(t.ids) - t.prompt_length for t in trajectories), default=0),
        observation=sum(len(t.ids) - t.prompt_length - t.response_tokens for t in trajectories) / n,
        turns=sum(len(t.turns) for t in trajectories) / n,
    )


def _shown(trajectory: Trajectory, image_id: int | None) -> tuple[int, int]:
    """Returns the number of pictures in the prompt, and their tokens."""
    if image_id is None:
        return 0, 0
    tokens = int((trajectory.ids[: trajectory.prompt_length] == image_id).sum())
    count, left = 0, tokens
    for image in trajectory.images:
        if left < image.tokens:
            break
        count, left = count + 1, left - image.tokens
    return count, tokens
