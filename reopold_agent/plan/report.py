"""Shows a plan as tables for the terminal, or as plain values."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from reopold_agent.plan.estimate import Plan
from reopold_agent.plan.hardware import GIB
from reopold_agent.plan.paper import FITTED_ON, PAPER_RUNS
from reopold_agent.policies.architecture import Architecture

PARTS = ("generate", "teacher", "old_logp", "update", "sync", "switch")

LEFT_OUT = (
    "Left out: start-up, evaluations, checkpoints, tools and graders, input, waiting for "
    "the slowest server, communication beyond what the shares of peak contain."
)


def as_values(plan: Plan) -> dict[str, Any]:
    """Returns the plan as plain values: seconds, FLOPs, tokens, bytes."""
    work, layout = plan.work, plan.layout
    return {
        "gpu": plan.gpu.name,
        "gpus": {
            "all": layout.gpus,
            "student": layout.student,
            "rollout": layout.rollout,
            "teacher": layout.teacher,
        },
        "schedule": layout.schedule,
        "models": {
            role: {"path": m.name, "parameters": m.parameters, "shapes": m.source}
            for role, m in (("student", plan.student), ("teacher", plan.teacher))
            if m is not None
        },
        "tokens_per_episode": {
            "prompt": work.prompt,
            "prompt_pictures": work.prompt_pictures.total,
            "response": work.response,
            "observation": work.observation,
            "observation_pictures": work.observation_pictures.total,
        },
        "episodes_per_step": work.episodes,
        "tokens_per_step": work.tokens,
        "steps": plan.config.steps,
        "flops_per_step": {
            **{name: getattr(plan.flops, name) for name in ("prompt", "decode")},
            **{name: getattr(plan.flops, name) for name in ("teacher", "old_logp", "update")},
            "all": plan.flops.total,
            "vision_share": plan.flops.vision,
        },
        "seconds_per_step": {
            **{part: getattr(plan.seconds, part) for part in PARTS},
            "all": plan.seconds.total,
        },
        "shares": {part: plan.seconds.share(part) for part in PARTS},
        "overlap": plan.seconds.overlap,
        "gpu_hours": plan.gpu_hours,
        "memory_bytes": {
            role.role: {"gpus": role.gpus, "of": plan.gpu.memory, "phases": dict(role.phases)}
            for role in plan.memory
        },
        "sequences_per_server": layout.student_server.slots,
        "assumptions": assumptions(plan),
        "fits": plan.fits,
        "changes": list(plan.changes),
        "costs": list(plan.costs),
        "warnings": list(plan.warnings),
    }


def assumptions(plan: Plan) -> dict[str, str]:
    """Returns the assumed and measured figures with their sources."""
    rates = plan.rates
    found = {
        "update": f"{rates.train.value / 1e12:.4g} TFLOP/s per GPU ({rates.train.source})",
        "passes without gradient": (
            f"{rates.score.value / 1e12:.4g} TFLOP/s per GPU ({rates.score.source})"
        ),
        "decoding": f"{rates.bandwidth.value / 1e12:.4g} TB/s per GPU ({rates.bandwidth.source})",
        "decoding, per iteration": (
            f"{rates.iteration.value * 1e3:.4g} ms besides ({rates.iteration.source})"
        ),
        "data sheet": f"{plan.gpu.name}: {plan.gpu.source}",
        "student's shapes": plan.student.source,
    }
    if plan.teacher is not None:
        found["teacher's shapes"] = plan.teacher.source
    lengths = {
        "prompt": plan.work.prompt,
        "response": plan.work.response,
        "observation": plan.work.observation,
    }
    for name, source in plan.work.sources.items():
        found[f"{name} length"] = f"{lengths[name]:.0f} tokens ({source})"
    return found


def print_plan(plan: Plan, console: Console) -> None:
    """Prints all tables of a plan."""
    work, layout = plan.work, plan.layout
    division = f"{layout.student} student, {layout.teacher} teacher"
    if layout.rollout:
        division += f", {layout.rollout} rollout"
    if layout.schedule != "pools":
        division = "all do everything in turn" if layout.gpus > 1 else "one does everything"
        if layout.schedule == "local" and plan.config.policy.teacher["name"] == "server":
            division = "one for the student, the teacher on another machine"
    models = [_named(plan.student), *([_named(plan.teacher)] if plan.teacher else [])]
    console.print(
        f"{' from '.join(models)}; {layout.gpus} x {plan.gpu.name}: {division}",
        markup=False,
        highlight=False,
    )
    console.print(
        f"A step: {work.prompts} prompts x {work.samples} = {work.episodes} episodes of "
        f"{work.prompt:.0f} (pictures {work.prompt_pictures.total:.0f}) + {work.response:.0f} + "
        f"{work.observation:.0f} tokens (prompt, response, observation), "
        f"{work.tokens / 1e6:.3g} M tokens",
        markup=False,
        highlight=False,
    )
    console.print(_time_table(plan, console))
    console.print(_memory_table(plan, console))
    console.print("Assumptions", highlight=False)
    for name, text in assumptions(plan).items():
        console.print(f"  {name}: {text}", markup=False, highlight=False, soft_wrap=True)
    left_out = LEFT_OUT
    if not all(teacher.view.empty for teacher in plan.config.model.all_teachers.values()):
        left_out = f"{LEFT_OUT} So is what the teacher's view adds to its prompts and pictures."
    console.print(f"  {left_out}", markup=False, highlight=False, soft_wrap=True)
    if plan.changes:
        quoted = " ".join(shlex.quote(word) for word in plan.changes)
        lines = [f"The settings of this division of the GPUs: {quoted}"]
        if plan.costs:
            lines = [
                f"As it is, the run does not fit; this plan changes: {quoted}",
                f"What this costs: {'; '.join(plan.costs)}.",
            ]
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in plan.warnings:
        console.print(f"! {line}", markup=False, highlight=False, soft_wrap=True)
    if not plan.warnings:
        console.print("Everything fits.", highlight=False)


def _named(model: Architecture) -> str:
    millions = model.parameters / 1e6
    size = f"{millions / 1e3:.2f} B" if millions > 100 else f"{millions:.2f} M"
    return f"{model.name} ({size})"


def _table(console: Console, title: str, *columns: str) -> Table:
    style = box.SIMPLE_HEAD if console.is_terminal else box.ASCII
    table = Table(title=title, box=style, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def _time_table(plan: Plan, console: Console) -> Table:
    counted, seconds = plan.flops, plan.seconds
    work = {
        "generate": counted.prompt + counted.decode,
        **{part: getattr(counted, part) for part in ("teacher", "old_logp", "update")},
    }
    title = f"A step (vision towers: {counted.vision:.0%} of the FLOPs)"
    table = _table(console, title, "part", "PFLOP", "seconds", "share")
    for part in PARTS:
        during = (part == "teacher" and seconds.overlap and plan.teacher is not None) or (
            part in ("old_logp", "update") and seconds.ahead
        )
        table.add_row(
            f"{part} (meanwhile)" if during else part,
            f"{work[part] / 1e15:.4g}" if part in work else "-",
            f"{getattr(seconds, part):.3g}",
            f"{seconds.share(part):.1%}",
        )
    table.add_row("step", f"{counted.total / 1e15:.4g}", f"{seconds.total:.3g}", "100%")
    table.add_row(
        f"{plan.config.steps} steps",
        "-",
        f"{seconds.total * plan.config.steps:.3g}",
        f"{plan.gpu_hours:.3g} GPU-hours",
    )
    return table


def _memory_table(plan: Plan, console: Console) -> Table:
    total = plan.gpu.memory / GIB
    table = _table(
        console, f"Memory per GPU, GiB of {total:.1f}", "GPU", "phase", "needed", "of it"
    )
    table.columns[1].justify = table.columns[3].justify = "left"
    for role in plan.memory:
        for phase, parts in role.phases.items():
            shown = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items())
            table.add_row(
                f"{role.role} ({role.gpus})", phase, f"{sum(parts.values()) / GIB:.1f}", shown
            )
    return table


PAPER_HEADER = (
    *("recipe", "paper, GPU-hours", "plan", "error"),
    *("paper, teacher's share", "plan, teacher", "plan, generation"),
)


def paper_rows(plans: Mapping[str, Plan]) -> list[list[str]]:
    """Returns the cells of the comparison with the paper, under `PAPER_HEADER`."""
    rows = []
    for name, plan in plans.items():
        said = PAPER_RUNS[name]
        error = plan.gpu_hours / said.gpu_hours - 1
        rows.append(
            [
                name,
                f"{said.gpu_hours:.0f}",
                f"{plan.gpu_hours:.0f}",
                "fitted" if name == FITTED_ON else f"{error:+.0%}",
                "-" if said.teacher is None else f"{said.teacher:.1%}",
                f"{plan.seconds.share('teacher'):.1%}",
                f"{plan.seconds.share('generate'):.1%}",
            ]
        )
    return rows


def print_paper(plans: Mapping[str, Plan], console: Console) -> None:
    """Prints the comparison with the paper and its assumptions."""
    table = _table(console, "The paper's runs, all GPUs doing everything in turn", *PAPER_HEADER)
    for row in paper_rows(plans):
        table.add_row(*row)
    console.print(table)
    for name, plan in plans.items():
        for key, text in assumptions(plan).items():
            if key.endswith("length"):
                console.print(
                    f"{name}: {key} {text}", markup=False, highlight=False, soft_wrap=True
                )
    shared: Sequence[str] = [
        f"{key}: {text}"
        for key, text in assumptions(next(iter(plans.values()))).items()
        if not key.endswith(("length", "shapes"))
    ]
    for line in (*shared, LEFT_OUT):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
