"""Composes each study's report from tables, figures and claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from reopold_agent.study import claims, figures
from reopold_agent.study.analyse import difference
from reopold_agent.study.claims import Claim, show
from reopold_agent.study.collect import Results
from reopold_agent.study.figures import styled
from reopold_agent.study.tables import Table, final_table, probe_table, reach_table


@dataclass
class Page:
    """Content of a report.

    Attributes:
        claims: claims of the paper with their verdicts.
        tables: tables in order.
        figures: file name, caption and figure, in order.
        notes: sentences on what cannot be concluded.
    """

    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[str, str, Figure]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, caption: str, figure: Figure | None) -> None:
        """Adds a figure, unless there was nothing to draw."""
        if figure is not None:
            self.figures.append((f"{name}.png", caption, figure))


def ablation(results: Results) -> Page:
    """Composes table 5.2; figures 3, 4, 5, 6, 11, 14; table 8."""
    return _ablation(results, list(results.records))


def _ablation(results: Results, shown: Sequence[str]) -> Page:
    """Composes the page of the ablation, with curves of the ``shown`` settings."""
    parts = ["rkl", "rkl_sg", "rkl_sg_clip", "rkl_sg_clip_entropy", "reopold"]
    page = Page(claims=_paper_claims(results))
    page.tables.append(final_table(results, "rkl"))
    table = probe_table(results)
    page.tables += [table] if table else []
    page.add("success", "Held-out success (table 5.2)", styled(_success, results, shown))
    page.add(
        "reward_histogram",
        "Reward of single tokens (figure 4)",
        styled(figures.histogram_figure, results, "rkl"),
    )
    page.add(
        "reward_by_entropy",
        "Reward by entropy (figure 5)",
        styled(figures.decile_figure, results, ["rkl", "reopold"]),
    )
    page.add(
        "entropy",
        "Entropy, avg@k and pass@k over training (figure 6)",
        styled(figures.exploration_figure, results, ["rkl", "rkl_sg_clip_entropy", "reopold"]),
    )
    for name, key, title, unit, share in (
        ("gradient_norm", "grad_norm", "Gradient norm (figure 3)", "norm before clipping", False),
        (
            "clip_share",
            "ratio/ppo_clip_share",
            "Tokens that a PPO clip of 0.2 would cut (figure 11)",
            "share of tokens",
            True,
        ),
    ):
        chosen = parts[:2] if key == "grad_norm" else parts
        drawn = styled(figures.series_figure, results, chosen, key, title, unit, share=share)
        page.add(name, title, drawn)
    page.add("time", "Parts of a step (figure 14)", styled(figures.time_figure, results, shown))
    return page


def family(results: Results) -> Page:
    """Composes `ablation`'s page for all objectives, ranked, and each newcomer's comparisons."""
    apart = ("skew_rkl", *NEWCOMERS)
    page = _ablation(results, [label for label in results.records if label not in apart])
    page.claims += [
        claims.better(f"Reopold beats {other.upper()} (table 5.3)", results, other, "reopold")
        for other in ("grpo", "sft")
    ]
    page.claims += _efficiency_claims(results)
    for label in NEWCOMERS:
        for other in ("rkl_sg", "reopold"):
            text = f"{results.title(label)} beats {results.title(other)} (not in the paper)"
            page.claims.append(claims.better(text, results, other, label))
    page.tables[0] = final_table(results, "rkl_sg", ranked=True)
    page.notes.append(
        "Every objective has the same number of episodes and updates; SFT's episodes are the "
        "teacher's own. They have one turn, so that SOD's weights are all 1 and it is RKL with "
        "stop-gradient."
    )
    page.tables += _reach_tables(results)
    others = [label for label in ("rkl_sg", "reopold", *apart) if label in results.records]
    page.add("success_others", "The other objectives", styled(_success, results, others))
    return page


def sensitivity(results: Results) -> Page:
    """Composes figure 12, the table on rho, and the switch."""
    name = results.study.name
    page = Page(tables=[final_table(results, None)])
    axis = {
        "lambda": "lambda (mixture weight)",
        "rho": "rho (share of tokens kept)",
        "switch": "share of the steps that explore",
    }[name]
    if name == "lambda":
        page.claims = [
            claims.smaller_range(
                "Reopold is less sensitive to lambda than skew RKL (figure 12)",
                results,
                "reopold",
                "skew_rkl",
            ),
            claims.worst_beats_best(
                "Reopold's lowest accuracy is above skew RKL's highest (appendix A.2)",
                results,
                "reopold",
                "skew_rkl",
            ),
        ]
    elif name == "rho":
        for family in ("rkl_sg_clip_entropy", "reopold"):
            page.claims += [
                claims.better(
                    f"a strict threshold (0.2) beats a loose one ({loose}), {family} (section 5.3)",
                    results,
                    f"{family}-{loose}",
                    f"{family}-0.2",
                )
                for loose in ("0.5", "1")
            ]
        page.claims.append(
            claims.better(
                "exploring first bears a very strict threshold (0.1) better than refinement alone "
                "does (not in the paper)",
                results,
                "rkl_sg_clip_entropy-0.1",
                "reopold-0.1",
            )
        )
    else:
        page.claims = [
            claims.better(
                "exploring first (0.33) beats refinement alone (0) (section 4.3)",
                results,
                "reopold-0",
                "reopold-0.33",
            ),
            claims.better(
                "refining after 0.33 of the steps beats exploration alone (1)",
                results,
                "reopold-1",
                "reopold-0.33",
            ),
        ]
    drawn = styled(figures.sensitivity_figure, results, axis, log=name == "lambda")
    page.add("sensitivity", f"Final success over {axis}", drawn)
    for family in dict.fromkeys(results.setting(label).family for label in results.records):
        labels = [label for label in results.records if results.setting(label).family == family]
        page.add(f"success_{family}", f"Curves of {family}", styled(_success, results, labels))
    return page


def efficiency(results: Results) -> Page:
    """Composes figure 1(a)."""
    page = Page(tables=[final_table(results, "rkl")])
    page.claims = _efficiency_claims(results)
    labels = list(results.records)
    page.tables += _reach_tables(results)
    drawn = styled(figures.success_figure, results, labels, episodes=True, log=True)
    page.add("episodes", "Held-out success by episodes (figure 1a; logarithmic from 100)", drawn)
    short = [label for label in labels if label != "grpo"]
    page.add("steps", "Held-out success by steps", styled(_success, results, short))
    return page


def scaling(results: Results) -> Page:
    """Composes figures 1(b) and 13."""
    page = Page(tables=[final_table(results, "rkl")])
    table = probe_table(results)
    page.tables += [table] if table else []
    latencies = {name: results.latency(name) for name in (*results.records, "teacher")}
    latencies = {name: values for name, values in latencies.items() if values}
    if latencies:
        ks = list(next(iter(latencies.values())))
        rows = [
            [
                "teacher" if name == "teacher" else results.title(name),
                *(f"{values[k]:.3f}" for k in ks),
            ]
            for name, values in latencies.items()
        ]
        header = ["model", *(f"k = {k}" for k in ks)]
        page.tables.append(Table("Seconds per question, k answers in parallel", header, rows))
    for kind, place in (("pass", "1b"), ("maj", "13")):
        page.claims.append(_scaling_claim(results, kind, place))
    page.claims.append(
        claims.faster_than_teacher(
            "Reopold reaches the teacher's pass@k sooner, up to 3.32 times (figure 1b)",
            results,
            "reopold",
        )
    )
    page.notes.append(
        "The embedded teacher is exactly as large as its student, so that the paper's gain in "
        "latency (a 3B or 7B student against a 32B teacher) cannot appear here: only what comes "
        "from the quality of the answers and from their length can."
    )
    drawn = styled(figures.scaling_figure, results, list(results.records))
    page.add("scaling", "pass@k and maj@k by latency (figures 1b and 13)", drawn)
    return page


def agentic(results: Results) -> Page:
    """Composes table 5.3."""
    page = Page(tables=[final_table(results, "rkl")])
    page.claims = [
        claims.better(f"Reopold beats {other.upper()} (table 5.3)", results, other, "reopold")
        for other in ("rkl", "grpo", "sft")
    ]
    page.claims += _efficiency_claims(results)
    labels = list(results.records)
    page.tables += _reach_tables(results)
    drawn = styled(figures.success_figure, results, labels, episodes=True, log=True)
    page.add("episodes", "Held-out success by episodes (logarithmic from 100)", drawn)
    key = "rollout/tool_rate"
    tools = styled(
        figures.series_figure,
        results,
        labels,
        key,
        "Episodes that call a tool",
        "share",
        share=True,
    )
    page.add("tools", "Tool calls in training", tools)
    page.add("time", "Parts of a step", styled(figures.time_figure, results, labels))
    return page


def _paper_claims(results: Results) -> list[Claim]:
    """Tests table 5.2, figures 3, 4, 5, 6, 11, 14, and table 8."""
    return [
        claims.better("(1) stop-gradient improves RKL (table 5.2)", results, "rkl", "rkl_sg"),
        claims.better("(2) the reward clip improves (1)", results, "rkl_sg", "rkl_sg_clip"),
        claims.better(
            "(3) the entropy mask improves (1+2)", results, "rkl_sg_clip", "rkl_sg_clip_entropy"
        ),
        claims.better("(4) two phases improve (1+2+3)", results, "rkl_sg_clip_entropy", "reopold"),
        claims.better("Reopold beats RKL", results, "rkl", "reopold"),
        claims.better("Reopold beats GKD (table 8)", results, "gkd", "reopold"),
        claims.greater_mean(
            "stop-gradient lowers gradient norms (figure 3)", results, "grad_norm", "rkl_sg", "rkl"
        ),
        claims.heavy_tail("rewards have a heavy negative tail (figure 4)", results, "rkl"),
        claims.low_entropy_is_silent(
            "the lower 60 % of tokens by entropy carry hardly any reward (figure 5)",
            results,
            "rkl",
        ),
        claims.greater_mean(
            "RKL's entropy collapses faster than Reopold's (figure 6; first third of the steps)",
            results,
            "entropy/mean",
            "rkl",
            "reopold",
            until=1 / 3,
        ),
        claims.rises("Reopold raises avg@k and pass@k together (figure 6)", results, "reopold"),
        claims.below(
            "PPO's clip would cut less than 0.2 % of tokens (figure 11)",
            results,
            "reopold",
            "ratio/ppo_clip_share",
            0.002,
            0.1,
        ),
        claims.time_share(
            "the teacher takes 8 to 22 % of a step (figure 14)", results, "reopold", 0.08, 0.22
        ),
    ]


def _reach_tables(results: Results) -> list[Table]:
    return [
        reach_table(results, target, list(results.records), episodes=True)
        for target in ("rkl", "rkl_sg", "grpo")
        if target in results.records
    ]


def _efficiency_claims(results: Results) -> list[Claim]:
    return [
        claims.reaches(
            "Reopold reaches RKL's final success in at most half of its steps (figure 1a)",
            results,
            "reopold",
            "rkl",
            0.5,
            episodes=False,
        ),
        claims.reaches(
            "the same against RKL with stop-gradient, the usual on-policy distillation (not in the "
            "paper)",
            results,
            "reopold",
            "rkl_sg",
            0.5,
            episodes=False,
        ),
        claims.reaches(
            "Reopold reaches GRPO's final success in at most a sixth of its samples",
            results,
            "reopold",
            "grpo",
            1 / 6,
            episodes=True,
        ),
    ]


def _scaling_claim(results: Results, kind: str, place: str) -> Claim:
    text = f"Reopold's {kind}@k is above RKL's at every k (figure {place})"
    finals = {
        label: {s: r.probes[-1] for s, r in results.records.get(label, {}).items() if r.probes}
        for label in ("rkl", "reopold")
    }
    if not all(finals.values()):
        return Claim(text, "-", claims.MISSING)
    found, parts = [], []
    for k in next(iter(finals["rkl"].values())).ks:
        first, second = (
            {s: p.pass_at(k) if kind == "pass" else p.maj_at(k) for s, p in finals[label].items()}
            for label in ("rkl", "reopold")
        )
        gap = difference(first, second)
        if gap is not None:
            found.append(gap)
            parts.append(f"k {k}: {show(gap.estimate, '+.3f')}")
    signs = [gap.sign for gap in found]
    if not signs:
        return Claim(text, "-", claims.MISSING)
    verdict = claims.YES if min(signs) == 1 else claims.NO if min(signs) == -1 else claims.UNDECIDED
    return Claim(text, "; ".join(parts), verdict)


def _success(results: Results, labels: Sequence[str]) -> Figure | None:
    return figures.success_figure(results, labels)


NEWCOMERS = ("outcome", "exopd", "eopd", "iw_opd", "sod")
"""Settings of `family` that are later than the paper, or not in it."""

PAGES: dict[str, Callable[[Results], Page]] = {
    "ablation": ablation,
    "sensitivity": sensitivity,
    "efficiency": efficiency,
    "scaling": scaling,
    "agentic": agentic,
    "family": family,
}
"""By `Study.report`."""
