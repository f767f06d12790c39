"""Shows a preflight on one screen of 80 columns, or as plain values."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from reopold_agent.common.terminal import duration, is_terminal, visible, write_plain
from reopold_agent.plan.hardware import GIB
from reopold_agent.preflight.figures import ALL
from reopold_agent.preflight.findings import Finding
from reopold_agent.preflight.play import Played
from reopold_agent.preflight.projection import Projection

_WIDTH = 80
_LABEL = 10
_NAME, _COLUMNS = 28, (9, 9, 12, 12)
_STYLES = {"problem": "bold red", "warning": "yellow"}

VERL = (
    "engine=verl: the episodes are played in this process, as engine=local does, with the run's",
    "models, prompts and limits; what its own servers sample shows in sync/logp_gap_mean of step 0",
)


def lines_of(played: Played, projection: Projection, paper: Mapping[str, Any] | None) -> list[str]:
    """Returns the lines of the report."""
    config, outcome, tools = played.config, played.outcome, played.tools
    lengths = played.lengths
    models = config.model.student.path
    if played.rewards and config.model.all_teachers:
        paths = dict.fromkeys(each.path for each in config.model.all_teachers.values())
        models += f" from {', '.join(paths)}"
    rows = [
        (
            "preflight",
            f"{models}; {outcome.episodes} episodes of {config.env_word} on {played.device}, "
            f"{played.precision}, no update",
        ),
        ("success", _success(played, paper)),
        (
            "ends",
            f"{outcome.answered} answered; truncated: {outcome.by_length} by length, "
            f"{outcome.by_turns} by turns, {outcome.by_prompt} by prompt"
            + (f", {outcome.by_time} by time" if outcome.by_time else "")
            + (f"; {outcome.failed} failed" if outcome.failed else ""),
        ),
        (
            "lengths",
            f"prompt {lengths.prompt:.0f}, response {lengths.response:.0f} (with observations at "
            f"most {lengths.longest} of {config.rollout.max_response_tokens}) tokens; "
            f"{lengths.turns:.1f} turns",
        ),
    ]
    if tools.names:
        errors = ", ".join(f"{count} {kind}" for kind, count in tools.errors.items())
        rows.append(
            (
                "tools",
                f"called in {tools.episodes} of {outcome.episodes} episodes; {tools.calls} calls, "
                f"errors: {errors or 'none'}",
            )
        )
    rows.append(("entropy", f"{played.entropy:.2f} nats"))
    lines = [line for label, text in rows for line in _wrapped(label, text)]
    if played.rewards:
        head = ("tokens", "mean R", f"R <= {played.floor:.2f}", "where sure")
        lines.append(_row("reward", "", head))
        for group in played.rewards:
            name = group.name if group.name == ALL else f"  {group.name}"
            reward, sure = _nats(group.reward), _nats(group.sure_reward)
            lines.append(_row("", name, (f"{group.tokens:,}", reward, f"{group.below:.1%}", sure)))
    gap = played.gap
    if gap is not None:
        text = (
            f"sampler to trainer: mean {gap.mean:.1e}, largest {gap.largest:.1e} nats; "
            f"importance weight {gap.weight:.3f} ({gap.lowest:.2f} to {gap.highest:.2f})"
        )
        lines += _wrapped("gap", text)
    lines += _wrapped("memory", _memory(played, projection))
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in played.seconds.items())
    lines += _wrapped("seconds", seconds)
    lines += _wrapped("the run", _run(played, projection, paper))
    return lines


def _success(played: Played, paper: Mapping[str, Any] | None) -> str:
    outcome = played.outcome
    text = f"{outcome.success:.2f} ({outcome.low:.2f} to {outcome.high:.2f})"
    if paper is not None and paper["success"]:
        shown = ", ".join(f"{value:.2f} on {name}" for name, value in paper["success"].items())
        text += f"; the paper's student at the start: {shown}"
    if played.unread:
        text += f"; {played.unread} of {outcome.answered} answers cannot be read"
    return text


def _memory(played: Played, projection: Projection) -> str:
    kind = "GPU" if played.gpu_memory is not None else "process"
    text = f"{played.memory / GIB:.2f} GiB at most ({kind}, without optimizer)"
    if projection.plan is None:
        return text
    planned = [(role.role, *role.peak) for role in projection.plan.memory]
    shown = "; ".join(f"{role}, {phase}: {size / GIB:.1f}" for role, phase, size in planned)
    return f"{text}; the plan's peak per GPU, GiB: {shown}"


def _run(played: Played, projection: Projection, paper: Mapping[str, Any] | None) -> str:
    steps, parts = played.config.steps, []
    if projection.step_seconds is not None:
        step = sum(projection.step_seconds.values())
        gpu = f", {step * steps / 3600:.2g} GPU-hours" if played.gpu_memory is not None else ""
        parts.append(f"{steps} steps of about {step:.3g} s: {duration(step * steps)}{gpu}")
    plan = projection.plan
    if plan is None:
        parts.append(f"no plan: {projection.why_not}")
    elif not projection.on_cpu:
        hours = plan.seconds.total * steps / 3600
        parts.append(
            f"the plan with these lengths: {hours:.3g} hours, {plan.gpu_hours:.3g} GPU-hours on "
            f"{plan.layout.gpus} x {plan.gpu.name}"
        )
    if paper is not None:
        parts.append(f"the paper: {paper['gpu_hours']:g} GPU-hours")
    return "; ".join(parts)


def show(
    played: Played,
    projection: Projection,
    paper: Mapping[str, Any] | None,
    found: Sequence[Finding],
    console: Console,
) -> None:
    """Prints the report and the findings."""
    live = is_terminal(console)
    lines = [(line, "") for line in lines_of(played, projection, paper)]
    if played.config.engine.name == "verl":
        lines = [*((line, "dim") for line in VERL), *lines]
    stops = bool(found) and found[0].status == "problem"  # the error that ends the command
    for each in found[stops:]:
        text = f"{each.text.rstrip('.')}. {each.advice}"
        lines += [(line, _STYLES[each.status]) for line in _wrapped(each.status, text)]
    if not found:
        lines.append(("nothing speaks against this run", "green"))
    for line, style in lines:
        if live:
            console.print(Text(line, style), highlight=False, soft_wrap=True)
        else:
            write_plain(console.file, line)


def as_values(
    played: Played,
    projection: Projection,
    paper: Mapping[str, Any] | None,
    found: Sequence[Finding],
) -> dict[str, Any]:
    """Returns all figures as plain values; nats, tokens, seconds and bytes. NaN becomes None."""
    plan = projection.plan
    steps = played.config.steps
    names = ("outcome", "tools", "lengths")
    values = {
        "status": next((each.status for each in found), "ok"),
        "findings": [asdict(each) for each in found],
        **{name: asdict(getattr(played, name)) for name in names},
        "agreements": [asdict(each) for each in played.agreements],
        "entropy": played.entropy,
        "floor": played.floor,
        "rewards": [asdict(group) for group in played.rewards],
        "gap": None if played.gap is None else asdict(played.gap),
        "left_out": played.left_out,
        "unread": played.unread,
        "gradient_norm": played.gradient,
        "device": played.device,
        "precision": played.precision,
        "memory_bytes": played.memory,
        "seconds": played.seconds,
        "step_seconds": projection.step_seconds,
        "plan": None
        if plan is None
        else {
            "gpu": plan.gpu.name,
            "gpus": plan.layout.gpus,
            "hours": plan.seconds.total * steps / 3600,
            "gpu_hours": plan.gpu_hours,
            "memory_bytes": {
                role.role: dict(zip(("phase", "bytes"), role.peak, strict=True))
                for role in plan.memory
            },
        },
        "published": None if paper is None else dict(paper),
    }
    plain = _finite(values)
    assert isinstance(plain, dict)
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(label: str, name: str, cells: Sequence[str]) -> str:
    shown = "".join(cell.rjust(width) for cell, width in zip(cells, _COLUMNS, strict=True))
    return f"{label:{_LABEL}}{name:{_NAME}}{shown}"


def _nats(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}" if math.isfinite(value) else "-"  # no -0.00


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        " ".join(visible(text).split()),
        _WIDTH,
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )
