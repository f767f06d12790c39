"""The studies, in one place. Numbers that were tuned are constants at the top."""

from __future__ import annotations

from reopold_agent.errors import UnknownNameError
from reopold_agent.study.grid import Probe, Setting, Study

STEPS = 80
"""Steps of a run under stress."""

HELD_OUT = 96
"""Held-out tasks of every evaluation. They are the same for a curve and for the final success that
it should reach."""

COMMON = (
    f"evaluation.tasks={HELD_OUT}",
    f"evaluation.curve_tasks={HELD_OUT}",
    "evaluation.every=10",
    "evaluation.teacher=false",  # once per study, by the probe, and not once per run
    "checkpoint.every=50",
    "checkpoint.keep=1",
    "logging.trajectories=0",
    "engine.device=cpu",
    "engine.threads=1",
)
"""Small evaluations and few files."""

STRESS = (
    "env=math",
    "model.student.path=demo:arithmetic_far",
    "batch.prompts=8",
    "batch.mini_batch=2",  # four updates per rollout, as in the paper's mathematics
    "optimizer.lr=1e-4",
    *COMMON,
)
"""A task on which the paper's method should matter: a student far from its teacher (the mean reward
of its tokens is -11 nats), small batches, several updates per rollout."""

PIXEL = ("env=pixel_reasoner", *COMMON)
"""The embedded tool-use task with its defaults."""

MODELS = Probe(tasks=HELD_OUT, samples=4)
"""Probe of studies whose settings have none: only for the student before training and the
teacher."""

GROUPS = ("batch.prompts=4", "batch.samples=8", "batch.mini_batch=1")
"""GRPO's batch under stress: a step is 32 episodes, of which an update sees one group of eight."""

GRPO_LONGER = 1.5
"""Factor on GRPO's steps under stress. With four times the episodes per step it sees six times as
many as distillation; the paper claims that Reopold needs at most a sixth of GRPO's samples."""

BRANCHES = (
    "env=math",
    "model.student.path=demo:branches_student",
    "model.teacher.path=demo:branches_teacher",
    "data.train.operations=[+,-]",
    "data.eval.operations=[+,-]",
    "batch.prompts=4",
    "batch.samples=4",  # groups for all, so that objectives with an outcome see no other episodes
    "batch.mini_batch=1",  # four updates per rollout, as in the paper's mathematics
    "optimizer.lr=1e-4",
    *COMMON,
    "evaluation.tasks=256",  # differences are smaller here
    "evaluation.curve_tasks=256",
    "evaluation.every=16",
)
"""A task with the rewards of the paper's figures 4 and 5: most tokens follow from the format or
from what was written; a few are choices, where the student's rewards have a heavy negative tail."""

_TITLES = {
    "rkl": "RKL",
    "rkl_sg": "RKL + stop-gradient (1)",
    "rkl_sg_clip": "+ reward clip (1+2)",
    "rkl_sg_clip_entropy": "+ entropy mask (1+2+3)",
    "reopold": "Reopold",
    "gkd": "GKD, full vocabulary",
    "gkd-top-5": "GKD, top 5",
    "sft": "SFT",
    "grpo": "GRPO",
    "skew_rkl": "Skew RKL",
    "outcome": "Reopold with outcome",
    "exopd": "ExOPD",
    "eopd": "EOPD",
    "iw_opd": "IW-OPD",
    "sod": "SOD",
}


def _setting(label: str, *words: str, longer: float = 1.0, probe: bool = False) -> Setting:
    """Returns a setting named after its objective, unless ``words`` choose another."""
    chosen = any(word.startswith("objective=") for word in words)
    overrides = words if chosen else (f"objective={label}", *words)
    return Setting(label, _TITLES.get(label, label), overrides, longer=longer, probe=probe)


def _sweep(objective: str, key: str, values: tuple[float, ...]) -> tuple[Setting, ...]:
    """Returns an objective with several values of one of its settings."""
    short = key.split(".")[-1]
    return tuple(
        Setting(
            label=f"{objective}-{value:g}",
            title=f"{_TITLES[objective]}, {short} {value:g}",
            overrides=(f"objective={objective}", f"{key}={value:g}"),
            family=objective,
            value=value,
        )
        for value in values
    )


_LAMBDAS = (0.01, 0.1, 0.5, 0.9)
_RHOS = (0.1, 0.2, 0.5, 1.0)
_SWITCHES = (0.0, 0.15, 0.33, 0.66, 1.0)

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        Study(
            name="ablation",
            title="Ablation: what each part of Reopold does",
            mirrors="table 5.2 (parts 1 to 4), figures 3, 4, 5, 6, 11 and 14, table 8 (GKD)",
            base=STRESS,
            settings=(
                _setting("rkl", probe=True),
                _setting("rkl_sg"),
                _setting("rkl_sg_clip"),
                _setting("rkl_sg_clip_entropy", probe=True),
                _setting("reopold", probe=True),
                _setting("gkd"),
                _setting("gkd-top-5", "objective=gkd", "objective.top_k=5"),
                _setting("sft"),
            ),
            steps=STEPS,
            report="ablation",
            probe=Probe(tasks=64, samples=8, points=4),
        ),
        Study(
            name="lambda",
            title="Sensitivity to lambda: reward floor against skew RKL",
            mirrors="figure 12",
            base=STRESS,
            settings=(
                *_sweep("reopold", "objective.mixture", _LAMBDAS),
                *_sweep("skew_rkl", "objective.mixture", _LAMBDAS),
            ),
            steps=STEPS,
            report="sensitivity",
            probe=MODELS,
        ),
        Study(
            name="rho",
            title="Sensitivity to rho: how many tokens the entropy mask keeps",
            mirrors="the table of section 5.2 on the token threshold",
            base=STRESS,
            settings=(
                *_sweep("rkl_sg_clip_entropy", "objective.top_share", _RHOS),
                *_sweep("reopold", "objective.top_share", _RHOS),
            ),
            steps=STEPS,
            report="sensitivity",
            probe=MODELS,
        ),
        Study(
            name="switch",
            title="Sensitivity to the switch from exploration to refinement",
            mirrors="section 4.3 (the paper did not tune it: appendix C)",
            base=STRESS,
            settings=_sweep("reopold", "objective.switch_share", _SWITCHES),
            steps=STEPS,
            report="sensitivity",
            probe=MODELS,
        ),
        Study(
            name="efficiency",
            title="Sample efficiency against RKL and GRPO",
            mirrors="figure 1(a)",
            base=STRESS,
            settings=(
                _setting("reopold"),
                _setting("rkl"),
                _setting("rkl_sg"),
                _setting("grpo", *GROUPS, "evaluation.every=15", longer=GRPO_LONGER),
            ),
            steps=STEPS,
            report="efficiency",
            probe=MODELS,
        ),
        Study(
            name="scaling",
            title="Test-time scaling: pass@k and maj@k against latency",
            mirrors="figures 1(b) and 13",
            base=STRESS,
            settings=(_setting("rkl", probe=True), _setting("reopold", probe=True)),
            steps=STEPS,
            report="scaling",
            probe=Probe(tasks=64, samples=16, latency=(1, 2, 4, 8, 16)),
        ),
        Study(
            name="agentic",
            title="Agentic comparison: SFT, GRPO, RKL and Reopold with tools",
            mirrors="table 5.3",
            base=PIXEL,
            settings=(
                _setting("sft"),
                _setting(
                    "grpo", "objective.curiosity=0.5", "objective.call_penalty=0.05", longer=2.0
                ),
                _setting("rkl"),
                _setting("rkl_sg"),  # not in the paper's table; what most implementations do
                _setting("reopold"),
            ),
            steps=60,
            report="agentic",
            probe=MODELS,
            seconds=75.0,
        ),
        Study(
            name="family",
            title="The family: every objective where most tokens are free of reward",
            mirrors="table 5.2 (parts 1 to 4), figures 1(a), 3 to 6, 11 and 14, tables 5.3 and 8",
            base=BRANCHES,
            settings=(
                _setting("rkl", probe=True),
                _setting("rkl_sg", probe=True),
                _setting("rkl_sg_clip"),
                _setting("rkl_sg_clip_entropy"),
                _setting("reopold", probe=True),
                _setting("gkd"),
                _setting("grpo"),
                _setting("sft"),
                _setting("skew_rkl"),
                _setting("outcome", "objective=reopold", "objective.outcome=1"),
                _setting("exopd"),
                _setting("eopd"),
                _setting("iw_opd"),
                _setting("sod"),
            ),
            steps=STEPS,
            report="family",
            seconds=60.0,
            probe=Probe(tasks=64, samples=8),
        ),
    )
}


def find_study(name: str) -> Study:
    """Returns a study by name.

    Raises:
        UnknownNameError: lists the known studies and the closest match.
    """
    if name not in STUDIES:
        raise UnknownNameError("study", name, STUDIES)
    return STUDIES[name]
