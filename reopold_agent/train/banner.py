"""The lines that a run begins with: what is trained, on what, and how."""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reopold_agent.config import (
    COSINE,
    IMPORTANCE_CAP,
    OUTCOME_DEFAULTS,
    OVER,
    ModelConfig,
    OutcomeConfig,
    PixelConfig,
    TrainConfig,
    ViewConfig,
    whole_weights,
)
from reopold_agent.envs.from_config import MADE, report_keys
from reopold_agent.errors import ConfigError
from reopold_agent.objectives import Needs, Objective, Reopold, RunFacts
from reopold_agent.policies.architecture import find_architecture
from reopold_agent.policies.loading import ModelSpec, Processing
from reopold_agent.policies.templates import ChatTemplate
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.tracking.progress import Progress
from reopold_agent.tracking.run_folder import RunFolder
from reopold_agent.train.engine import reference_spec
from reopold_agent.train.settings import billions
from reopold_agent.train.teachers import TeacherSettings, run_teachers

_log = logging.getLogger(__name__)

_WIDTH = 80
_USUAL = [(key, "batch") for key in OVER]
_LABEL = 11


def show_banner(
    progress: Progress,
    lines: Sequence[str],
    config: TrainConfig,
    student: Processing,
    notes: Sequence[str | None] = (),
) -> None:
    """Prints the lines of `banner`, notes and warnings, and writes them to the run's log.

    The warnings are for a student of the embedded tasks that gets other data, and for a chat
    template that writes other prompts than the student's own.
    """
    progress.lines([*lines, ""])
    for line in lines:
        _log.info("%s", line)
    told = [note for note in notes if note is not None]
    if ChatRenderer(student.tokenizer).other_prompts():
        told.append(
            f"warning: the chat template {_source(config)} writes other prompts than the own one "
            f"of {student.spec.path}, which that model was trained with"
        )
    paths = [(each.data.train or {}).get("path") for each in config.members.values()]
    if student.spec.path.startswith("demo:") and any(paths):
        told.append(
            f"warning: {student.spec.path} is made for the embedded tasks and too small for other "
            "data; take model=qwen2_5_vl, model=qwen3_vl or model=causal_lm with "
            "model.student.path=DIR model.teacher.path=DIR"
        )
    for text in told:
        progress.lines(textwrap.wrap(text, _WIDTH, subsequent_indent="  "))
        _log.warning("%s", text)


def exploration_note(config: TrainConfig, objective: Objective) -> str | None:
    """Says that a run explores less than its number of steps suggests; None if it does not.

    A run keeps the step of the switch to refinement that it found when it was started, so that one
    which goes on for more steps does not explore again.

    Args:
        config: the run's configuration.
        objective: made for this run.
    """
    objective = objective.own
    if not isinstance(objective, Reopold) or not objective.switch_share or not config.steps:
        return None
    if (given := config.objective.get("switch_step")) is not None:  # as the user has set it
        if given < config.steps or not given:
            return None
        return (
            f"note: every step explores, because objective.switch_step={given} is not before the "
            f"end of the run's {_count(config.steps, 'step')}."
        )
    share, switch = objective.switch_share, objective.switch_step
    facts = RunFacts(config.steps, config.rollout.max_response_tokens)
    usual = replace(objective, switch_step=None).for_run(facts).switch_step or 0
    rule = f"objective.switch_share={share:g} of {_count(config.steps, 'step')}"
    if switch == usual and switch:
        return None
    if switch == usual:
        return (
            f"note: no step explores, because {rule} is less than half a step. More steps in this "
            "folder will not explore either: for that, start anew, with more steps or with "
            "objective.switch_step=1."
        )
    if not switch:
        return (
            "note: no step explores. The run was started with too few steps for that, and going on "
            f"keeps this. To explore for {_count(usual, 'step')} ({rule}), start anew in another "
            "hydra.run.dir."
        )
    return (
        f"note: exploration ends after step {switch}, as when the run was started with fewer "
        f"steps. For {_count(usual, 'step')} of it ({rule}), start anew in another hydra.run.dir."
    )


def outcome_note(config: TrainConfig) -> str | None:
    """Warns of a schedule of the outcome that begins with the run's last step or later.

    Args:
        config: the run's configuration.
    """
    outcome = OutcomeConfig.of(config.objective)
    start, end = outcome.outcome_from, outcome.outcome_end
    if end is None or end == outcome.outcome or not 0 < config.steps <= start + 1:
        return None
    return (
        f"warning: objective.outcome_end={end:g} has no effect: objective.outcome="
        f"{outcome.outcome:g} counts until step {start} (objective.outcome_from, from 0), and the "
        f"run has {_count(config.steps, 'step')}. Set an earlier step, or more steps."
    )


def learning_rate_note(config: TrainConfig, saved: Mapping[str, Any] | None) -> str | None:
    """Says that the learning rate does not get as high, or gets higher, than a user may think.

    Args:
        config: the run's configuration.
        saved: the configuration in the folder, if the run continues.

    Returns:
        None if it does as the settings say.
    """
    warmup, updates = config.optimizer.warmup_steps, config.updates
    if warmup > updates:
        return (
            f"note: the learning rate rises over optimizer.warmup_steps={warmup} updates, and the "
            f"run has {updates:,}: it ends at {updates / warmup:.2g} of optimizer.lr."
        )
    falls = config.optimizer.lr_scheduler_type == COSINE
    if saved is None or saved["steps"] >= config.steps or not falls:
        return None
    return (
        f"note: the learning rate goes on higher than it was: it falls to 0 over "
        f"{_count(config.steps, 'step')} now, not over {saved['steps']:,}."
    )


def importance_note(config: TrainConfig, objective: Objective) -> str | None:
    """Says that ``objective.importance_cap`` has no effect, or is missed; None if neither is so.

    Args:
        config: the run's configuration.
        objective: the run's.
    """
    cap = config.importance_cap
    if config.engine.ahead and objective.weighs_tokens and cap is None:
        return (
            "warning: engine.ahead=1 trains on tokens that older weights sampled, and "
            "objective.importance_cap=null leaves that uncorrected."
        )
    if objective.weighs_tokens or cap is None or cap == IMPORTANCE_CAP:
        return None
    return (
        f"note: objective.importance_cap={cap:g} has no effect with objective="
        f"{config.objective['name']}, whose tokens have no importance weights."
    )


def preflight_note(config: TrainConfig, objective: Objective, resumed: bool) -> str | None:
    """Offers a preflight before a new run of a model that is not embedded; None for others.

    Args:
        config: the run's configuration.
        objective: the run's; those that learn from demonstrations play no episodes of the student.
        resumed: whether the run goes on from a checkpoint.
    """
    played = not objective.needs & Needs.DEMONSTRATIONS
    if resumed or not played or config.model.student.path.startswith("demo:"):
        return None
    return "note: `reopold preflight` with the same words plays 16 episodes before any update."


_ENOUGH_TO_SPLIT = 500
"""Of fewer rows the 2 % that are held out may be none."""


def leak_note(report: Path) -> str | None:
    """Warns of held-out tasks that are training tasks; None if there are none.

    Args:
        report: the report on the rows, if there is one.
    """
    splits = json.loads(report.read_text("utf-8")) if report.is_file() else {}
    found = {key: each for key, each in splits.items() if each.get("trained_on")}
    leaks = list(found.values())
    if not leaks:
        return None
    common, held_out = (sum(each[k] for each in leaks) for k in ("trained_on", "usable"))
    enough = max(each["usable"] for each in leaks) >= _ENOUGH_TO_SPLIT
    share = ", or a share of these: ++data.train.part=train ++data.eval.part=held_out"
    advice = f"Give data.eval other rows{share if enough else ''}."
    if all(key.rpartition("/")[2] == MADE for key in found):
        advice = "Let the environment's load_tasks(split) make other tasks for 'eval'."
    return (
        f"warning: {common:,} of {held_out:,} held-out tasks are training tasks, so that held-out "
        f"success shows what was learned by heart. {advice}"
    )


def self_teacher_note(config: TrainConfig, objective: Objective) -> str | None:
    """Warns of teachers that know no more than the student did at the start; None for others."""
    models = config.model
    teachers = models.all_teachers
    names = [
        name
        for name, each in teachers.items()
        if each.view.empty and (each.follow == 0 or name in models.self_taught)
    ]
    if not objective.needs & Needs.TEACHER or not names:
        return None
    alone = models.teacher is not None
    keys = ["model.teacher"] if alone else [f"model.teachers.{name}" for name in names]
    kinds = {None: "the student's own start", 0.0: "a copy of the student"}
    what = kinds.get(teachers[names[0]].follow, "an average of the student")
    return (
        f"warning: {' and '.join(keys)}: {what}, which reads what the student reads, so that it "
        f"can only hold the student where it was. Give it {keys[0]}.view, a hint, say."
    )


def banner(
    config: TrainConfig,
    folder: RunFolder,
    student: Processing,
    tasks: Mapping[str, Mapping[str, int]],
    *,
    device: str,
    precision: str,
    objective: Objective,
    teacher: bool,
    kernel: str | None = None,
) -> list[str]:
    """Returns the lines, of at most 80 columns unless a path is longer.

    Args:
        config: the run's configuration, as the checks before training completed it.
        folder: the run folder, with the report on the rows.
        student: the student's tokenizer and picture processor.
        tasks: number of tasks by environment and split.
        device: name of the device.
        precision: dtype of the computation.
        objective: the objective made for this run.
        teacher: whether the run has a teacher.
        kernel: attention kernel of packed rows; None where rows are padded.
    """
    models, batch, engine = config.model, config.batch, config.engine
    rows = {
        "student": _model(models.student) + (", LoRA" if models.student.lora is not None else ""),
        "teacher": "none",
        "reference": "",
        "template": _source(config),
        "mixture": _shares(config),
        "data": _rows(config, "train", tasks, folder.data_report),
        "held out": _rows(config, "eval", tasks, folder.data_report),
        "objective": _objective(config.objective, objective),
        "optimizer": f"AdamW, lr {_rate(config)}, {_count(batch.updates, 'update')} a step",
        "pixels": f"pictures {_pixels(config.pixels.prompt)}; "
        f"of tools {_pixels(config.pixels.observation)}",
        "tokens": _tokens(config),
        "steps": f"{config.steps} x {_count(batch.prompts, 'prompt')} x "
        f"{_count(batch.samples, 'sample')}",
        "engine": f"{engine.name} on {device}, {precision}"
        + ("" if kernel is None else f", rows packed by {kernel}"),
        "run": str(folder.path),
    }
    if teacher:
        rows["teacher"] = "; ".join(_teacher(each) for each in run_teachers(config))
        if models.teacher_key is not None:
            rows["teacher"] += f"; each task's by '{models.teacher_key}'"
    reference = reference_spec(config, objective)
    if reference is None:
        del rows["reference"]
    else:
        rows["reference"] = _model(reference) + ", frozen"
    if config.mix is None:
        del rows["mixture"]
    if models.chat_template is None:
        del rows["template"]
    if student.vision is None:
        del rows["pixels"]
    lines: list[str] = []
    for label, text in rows.items():
        lines += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=label.ljust(_LABEL),
            subsequent_indent=" " * _LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _source(config: TrainConfig) -> str:
    template = config.model.chat_template
    return template.source if isinstance(template, ChatTemplate) else str(template)


def _model(spec: ModelConfig | ModelSpec) -> str:
    try:
        size = f", {billions(find_architecture(spec.path).parameters)} parameters"
    except ConfigError:  # only on a server, or of a family whose size is not known
        size = ""
    revision = "" if spec.revision is None else f" at {spec.revision}"
    return f"{spec.path}{revision}{size}, {spec.dtype} weights"


def _teacher(teacher: TeacherSettings) -> str:
    names = "" if teacher.role == "teacher" else f"{', '.join(teacher.names)}: "
    follows = ", follows the student" if teacher.model.follow is not None else ""
    return names + _model(teacher.model) + follows + _view(teacher.model.view)


def _view(view: ViewConfig) -> str:
    """Returns what a teacher reads otherwise than the student; "" if nothing."""
    told = ["its own system message"] if view.system is not None else []
    told += [f"hint {view.hint}"] if view.hint is not None else []
    for name, limits in (
        ("pictures", view.pixels.prompt),
        ("those of tools", view.pixels.observation),
    ):
        told += [f"{name} {_pixels(limits)}"] if limits is not None else []
    return f"; reads {', '.join(told)}" if told else ""


def _shares(config: TrainConfig) -> str:
    weights = whole_weights(config.weights)
    total = sum(weights.values())
    return ", ".join(f"{name} {weight} of {total} draws" for name, weight in weights.items())


def _rows(
    config: TrainConfig, split: str, tasks: Mapping[str, Mapping[str, int]], report: Path
) -> str:
    if split not in config.splits:
        return "not played"
    found: dict[str, Any] = json.loads(report.read_text("utf-8")) if report.is_file() else {}
    told = []
    for name, member in config.members.items():
        if not member.env.takes_data:
            told.append(f"tasks of env={name}")
            continue
        spec = getattr(member.data, split) or {}
        row = found.get(report_keys(config, name)[split])
        lost = row["rows"] - row["usable"] if row is not None else 0
        left_out = f" ({lost:,} left out)" if lost else ""
        where = spec.get("path") or f"{spec.get('source')} (embedded)"
        count = tasks[name][split]
        told.append(f"{_count(count, 'row')} of {where}{left_out}")
        if split == "eval":
            told[-1] += f", {min(config.evaluation.tasks, count):,} played"
    return "; ".join(told)


def _objective(settings: Mapping[str, Any], objective: Objective) -> str:
    hidden = {"name"} if objective.weighs_tokens else {"name", "importance_cap"}
    if objective is objective.own:
        hidden |= set(OUTCOME_DEFAULTS)  # without effect
    told = {key: value for key, value in settings.items() if (key, value) not in _USUAL}
    shown = [f"{key} {value}" for key, value in told.items() if key not in hidden and value]
    return ", ".join([str(settings["name"]), *shown])


def _pixels(limits: PixelConfig) -> str:
    low, high = f"{limits.min_pixels:,}", f"{limits.max_pixels:,}"
    return high if low == high else f"{low} to {high}"


def _tokens(config: TrainConfig) -> str:
    rollout, most = config.rollout, config.engine.max_prompt_tokens
    prompt = "any prompt" if most is None else f"prompt at most {most:,}"
    return (
        f"{prompt}, response {rollout.max_response_tokens:,} in at most "
        f"{_count(rollout.max_turns, 'turn')} of {rollout.max_turn_tokens:,}"
    )


def _rate(config: TrainConfig) -> str:
    settings = config.optimizer
    told, warmup = f"{settings.lr:g}", settings.warmup_steps
    if warmup:
        told += f" after a warm-up of {_count(warmup, 'update')}"
    if warmup >= config.updates > 0:
        return f"{told} (the run has {config.updates:,})"
    return told + (", falling to 0 (cosine)" if settings.lr_scheduler_type == COSINE else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
