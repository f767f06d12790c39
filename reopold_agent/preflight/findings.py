"""Judges what a preflight has found: what would spoil the run, and what deserves a look.

The bounds on rewards come from the embedded pairs of models (docs/preflight.md has the table): of
the tokens that the student is sure of, a matching teacher finds half no less likely (medians of R
from -0.03 to 0.00 over 12 preflights, in every group of tokens), and one that does not know the
ids, the tool words or the end of a turn finds them far less likely (-2.9 to -18). Means and shares
do not tell the two apart: at the few tokens where the student decides what to do, a good teacher
may disagree by 15 nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from reopold_agent.common.statistics import wilson_interval
from reopold_agent.plan.estimate import Plan
from reopold_agent.preflight.figures import ALL, CALLS, END, MARKS, OPENING, TokenGroup
from reopold_agent.preflight.play import Agreement, Played
from reopold_agent.tools.parse import OPEN

REJECTED = -1.0
"""Median R of tokens that the student is sure of, nats, from which on the teacher rejects them."""

FEWEST = 4
"""Tokens that such a median needs, and episodes with calls of which all are truncated."""

GAP, GAP_NOTED = 0.05, 0.02
"""Mean difference between trainer's and sampler's log-probs, nats, that stops and that warns.

bfloat16 alone gives about 0.01. At 0.05 the importance weights are off by 5 % on average, a
quarter of PPO's clip, before the first update has changed anything.
"""

MOSTLY = 0.5
"""Share of truncated episodes, failed calls or unreadable answers that warns."""

RARE = 1 / 3
"""Upper end of the 95 % interval of a share of none up to which the episodes show that it is
rare: 8 episodes or more. With fewer, a student that calls tools now and then may call none."""

LEFT_OUT = 0.1
"""Share of rows left out that warns."""

_LOOK = "`reopold train` with the same words and steps=1, then `reopold view`"
"""How to see an episode, for advice."""


@dataclass(frozen=True)
class Finding:
    """Something that the episodes show.

    Attributes:
        status: a ``problem`` would spoil the run; a ``warning`` may.
        text: what is wrong.
        advice: what to do.
    """

    status: Literal["problem", "warning"]
    text: str
    advice: str


def judged(played: Played) -> list[Finding]:
    """Returns what was found, problems first, causes before what follows from them."""
    found = [
        *_failures(played),
        *_models(played),
        *_numbers(played),
        *_budgets(played),
        *_tools(played),
        *_teacher(played),
        *_answers(played),
    ]
    return sorted(found, key=lambda each: each.status)


def unfit(plan: Plan) -> list[Finding]:
    """Returns what the plan, with the lengths of the episodes, says does not fit the GPUs."""
    severe = [each for each in plan.warnings if "does not fit" in each or "cannot start" in each]
    halves = [each.partition(". ") for each in severe]
    return [Finding("warning", f"by the plan: {what}", advice) for what, _, advice in halves]


def _failures(played: Played) -> Iterator[Finding]:
    outcome = played.outcome
    lost = outcome.failed + outcome.by_prompt
    if lost:
        yield Finding(
            "problem" if lost == outcome.episodes else "warning",
            f"{lost} of {outcome.episodes} episodes ended in an error: {outcome.error}",
            "Mend the environment or the policy (docs/tools.md)."
            if outcome.failed
            else "Raise engine.max_prompt_tokens, or take tasks with shorter prompts.",
        )
    if played.left_out > LEFT_OUT:
        yield Finding(
            "warning",
            f"{played.left_out:.0%} of the training rows are left out",
            "data_report.json of a run names them; engine.max_prompt_tokens bounds prompts.",
        )


def _models(played: Played) -> Iterator[Finding]:
    rejected = ALL in [group.name for group in _rejected(played)]
    found = (finding for each in played.agreements for finding in _agrees(each, rejected))
    yield from dict.fromkeys(found)  # what concerns the student is found with each teacher


def _agrees(differ: Agreement, rejected: bool) -> Iterator[Finding]:
    if differ.ids is not None:
        yield Finding(
            "problem",
            f"student and {differ.role} cut text into other ids: {differ.ids}",
            "Use a teacher with the student's tokenizer: all of tokenizer.json must agree.",
        )
    if differ.pictures is not None:
        yield Finding(
            "problem",
            f"student and {differ.role} size pictures differently: {differ.pictures}",
            "Set pixels.prompt and pixels.observation within the limits of both processors "
            "(preprocessor_config.json), or make these equal.",
        )
    elif differ.limits is not None:
        yield Finding(
            "warning",
            f"the processors of student and {differ.role} have other limits: {differ.limits}",
            "No picture here exceeds them; keep pixels.* within both.",
        )
    if differ.template is not None:
        neither = "" if differ.known else "; it is no model's own"
        yield Finding(
            "warning" if differ.known else "problem",
            f"model.chat_template writes other prompts than the own one of {differ.template}"
            + neither,
            "Leave model.chat_template out, unless the student was trained with this template; "
            "such a student's folder should hold it (chat_template.jinja).",
        )
    if differ.prompts is not None:
        yield Finding(
            "problem" if rejected else "warning",
            f"the {differ.role}'s own chat template writes other prompts; it scores "
            f"{differ.prompts}",
            "Use the template that the teacher knows for both (model.chat_template=FILE), or "
            "another teacher.",
        )


def _numbers(played: Played) -> Iterator[Finding]:
    if played.invalid:
        yield Finding(
            "problem",
            f"some numbers cannot be trained on: {played.invalid}",
            "See docs/reliability.md; half precision that overflows needs dtype=bfloat16 or "
            "float32.",
        )
    gap = played.gap
    if gap is None or not gap.mean > GAP_NOTED:
        return
    stops = gap.mean > GAP
    bound = f"more than {GAP:g}" if stops else f"{GAP:g} would stop"
    yield Finding(
        "problem" if stops else "warning",
        f"the sampler's log-probs are {gap.mean:.2g} nats from the trainer's on average ({bound})",
        f"The sampler (policy.student.name={played.config.policy.student['name']}) must have the "
        "trainer's weights, ids and precision: docs/vllm.md.",
    )


def _budgets(played: Played) -> Iterator[Finding]:
    outcome, rollout = played.outcome, played.config.rollout
    usable = outcome.episodes - outcome.failed - outcome.by_prompt
    tools = played.tools
    every = outcome.truncated == usable
    few = outcome.truncated < MOSTLY * usable
    if not outcome.truncated or (few and (tools.cut < tools.episodes or tools.cut < FEWEST)):
        return
    ways = {
        f"rollout.max_turn_tokens (now {rollout.max_turn_tokens}) or rollout.max_response_tokens "
        f"(now {rollout.max_response_tokens})": outcome.by_length,
        f"rollout.max_turns (now {rollout.max_turns})": outcome.by_turns,
        "the environment's tool_time_limit_s": outcome.by_time,
    }
    way = max(ways, key=lambda name: ways[name])
    counts = f"{outcome.by_length} by length, {outcome.by_turns} by turns"
    whose = f"{'all' if every else outcome.truncated} of {usable} episodes"
    if few:
        whose = f"all of {tools.cut} episodes that call a tool"
    # An environment that the budget of turns always ends, such as a game, can still be won.
    yield Finding(
        "problem" if every and not outcome.success else "warning",
        f"{whose} are truncated: {counts}",
        f"Raise {way}.",
    )


def _tools(played: Played) -> Iterator[Finding]:
    tools = played.tools
    if not tools.names or played.gap is None:  # without a usable episode nothing is known
        return
    if not tools.calls:
        hint = (
            f"{tools.named} turns name a tool, but write no {OPEN}: the student knows another form "
            "of calls. Use a student trained with this one."
            if tools.named
            else "Begin with a student that calls tools (trained on demonstrations: objective=sft)."
            " An objective on the student's own samples cannot teach what it never does."
        )
        yield Finding(
            "problem" if _never(played) else "warning",
            f"no episode of {played.outcome.episodes} calls a tool; the environment has "
            + ", ".join(tools.names),
            hint,
        )
        return
    failed = sum(tools.errors.values())
    if failed >= MOSTLY * tools.calls:
        kinds = ", ".join(f"{count} {kind}" for kind, count in tools.errors.items())
        yield Finding(
            "warning",
            f"{failed} of {tools.calls} tool calls fail ({kinds}): {tools.example}",
            "Compare the tools' names and parameters with what the student was trained on.",
        )


def _never(played: Played) -> bool:
    """Returns whether what no episode does is rare, and not only the episodes few."""
    outcome = played.outcome
    return wilson_interval(0, outcome.episodes - outcome.failed - outcome.by_prompt)[1] <= RARE


def _rejected(played: Played) -> list[TokenGroup]:
    """Returns the kinds of token that the teacher rejects where the student is sure."""
    return [
        group for group in played.rewards if group.sure >= FEWEST and group.sure_reward <= REJECTED
    ]


def _teacher(played: Played) -> Iterator[Finding]:
    rejected = _rejected(played)
    names = [group.name for group in rejected]
    shown = "; ".join(f"{group.name} {group.sure_reward:.1f}" for group in rejected)
    what = f"(median R of the tokens that the student is sure of, nats: {shown})"
    if ALL in names:
        yield Finding(
            "problem",
            f"the teacher rejects most of what the student is sure of {what}",
            "It reads other ids, another chat template or another language of thought: use a "
            "teacher of the student's family, and the template that both know.",
        )
    elif {CALLS, MARKS} & set(names):
        yield Finding(
            "problem",
            f"the teacher rejects the tools' words {what}",
            "Training would unlearn the calls: use a teacher that was trained with this form of "
            "tool calls, or describe the tools in its words (words=, docs/tools.md).",
        )
    elif END in names:
        yield Finding(
            "problem",
            f"the teacher rejects the end of a turn {what}",
            "It ends turns with another token: use the chat template that both know "
            "(model.chat_template), or an instruction-tuned teacher.",
        )
    elif OPENING in names:
        yield Finding(
            "warning",
            f"the teacher would begin its turns otherwise {what}",
            "Often only a habit, which training changes; else it expects another chat template.",
        )
    elif names:
        yield Finding(
            "warning",
            f"the teacher rejects what the student is sure of in some places {what}",
            f"Look at an episode: {_LOOK}.",
        )
    # Not at the first tokens of turns, where a matching teacher often decides otherwise.
    unlikely = [
        group
        for group in played.rewards
        if group.tokens >= FEWEST and group.below >= MOSTLY and group.name != OPENING
    ]
    if unlikely and not names:
        shown = "; ".join(f"{group.name} {group.below:.0%}" for group in unlikely)
        yield Finding(
            "warning",
            f"most tokens of some kinds are at or below the reward floor ({shown})",
            f"The teacher would write otherwise there: look at an episode ({_LOOK}), at the chat "
            "template and at the student's form.",
        )


def _answers(played: Played) -> Iterator[Finding]:
    outcome, unread = played.outcome, played.unread
    if played.uninformative:
        yield Finding(
            "warning",
            f"no group of episodes has both successes and failures ({outcome.success:.0%} succeed)",
            f"objective={played.config.objective['name']} learns from differences: choose tasks "
            "that the student sometimes solves.",
        )
    elif not outcome.success and _never(played) and outcome.answered > (unread or 0):
        yield Finding(
            "warning",
            f"none of {outcome.episodes} episodes succeeds",
            "A teacher can still teach the student, objectives on outcomes cannot: look at an "
            f"answer ({_LOOK}), or choose easier tasks.",
        )
    if not unread or not outcome.answered or unread < MOSTLY * outcome.answered:
        return
    every = unread >= outcome.answered
    yield Finding(
        "problem" if every else "warning",
        f"{'none' if every else outcome.answered - unread} of {outcome.answered} answers can be "
        f"read: {played.why_unread}",
        "Ask for the form that the judge reads (docs/grading.md; env.kwargs.guideline), or take a "
        "student that writes it.",
    )
