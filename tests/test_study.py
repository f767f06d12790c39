"""The studies: their runs, interruption at any time, and their conclusions."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest
from PIL import Image
from running import command, composed, last_of_each, lines, start, wait_until, without_timings

from reopold_agent.common.statistics import bootstrap_confidence
from reopold_agent.errors import CheckpointError, ConfigError, UnknownNameError
from reopold_agent.objectives import OBJECTIVES, make_objective
from reopold_agent.study.__main__ import main
from reopold_agent.study.analyse import (
    band,
    difference,
    estimate,
    mean_curve,
    reach,
    reach_over_seeds,
    reach_share,
    smoothed,
)
from reopold_agent.study.claims import better, greater_mean, reaches, verdict_of
from reopold_agent.study.collect import ProbeResult, Results
from reopold_agent.study.grid import (
    Probe,
    Run,
    Setting,
    Study,
    expand,
    merge_overrides,
    without_effect,
)
from reopold_agent.study.options import parse, usage
from reopold_agent.study.report import MARK, index, write_report
from reopold_agent.study.run import Work, check_overrides, locked, run_all
from reopold_agent.study.studies import STUDIES, find_study
from reopold_agent.study.tables import reach_table

# What a study is


def small_study(**changes: object) -> Study:
    fields = {
        "name": "small",
        "title": "Small",
        "mirrors": "nothing",
        "base": ("env=pixel_reasoner", "optimizer.lr=1e-3", "batch.prompts=4"),
        "settings": (
            Setting("a", "A", ("objective=rkl",)),
            Setting("b", "B", ("objective=reopold", "optimizer.lr=2e-3"), longer=2.5, probe=True),
        ),
        "steps": 10,
        "report": "ablation",
        "seeds": 2,
        "probe": Probe(tasks=2, samples=2, points=5),
    }
    return Study(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_grid_is_settings_times_seeds_with_the_settings_words_on_top(tmp_path: Path) -> None:
    runs = expand(small_study(), tmp_path, seeds=[0, 7], extra=["optimizer.lr=5e-3", "+new.key=1"])
    assert [run.name for run in runs] == ["a/seed-0", "b/seed-0", "a/seed-7", "b/seed-7"]
    assert runs[2].folder == tmp_path / "runs" / "a" / "seed-7"
    assert runs[2].log == tmp_path / "runs" / "a" / "seed-7.log"
    assert sorted(runs[2].overrides) == sorted(
        [
            *("env=pixel_reasoner", "objective=rkl", "seed=7", "steps=10"),
            *("optimizer.lr=5e-3", "batch.prompts=4", "+new.key=1"),  # the command's, on the base
        ]
    )
    assert set(runs[1].overrides) >= {"optimizer.lr=2e-3", "steps=25", "checkpoint.every=5"}
    assert runs[0].probed is None
    assert runs[1].probed is not None
    assert runs[0].overrides[:2] == (
        "env=pixel_reasoner",
        "steps=10",
    )  # groups before single settings
    shorter = expand(small_study(), tmp_path, seeds=[0], only=["b"], steps=2)
    assert [run.setting.label for run in shorter] == ["b"]
    assert "steps=5" in shorter[0].overrides


def test_words_that_a_study_replaces_are_told_or_refused(tmp_path: Path) -> None:
    settings = small_study().settings
    told = without_effect(["optimizer.lr=5e-3", "objective=grpo", "+new.key=1"], settings)
    assert told == [
        "'optimizer.lr=5e-3' has no effect on b, which set 'optimizer.lr' themselves",
        "'objective=grpo' has no effect on a, b, which set 'objective' themselves",
    ]
    for word in ("seed=4", "evaluation.tasks=0"):
        with pytest.raises(ConfigError, match=word.partition("=")[0]):
            expand(small_study(), tmp_path, seeds=[0], extra=[word])


def test_the_later_of_two_words_stays() -> None:
    assert merge_overrides(["a.b=1", "c=2"], ["+a.b=3"], ["c=4"]) == ("c=4", "+a.b=3")
    for bad in ("nothing", "=3"):
        with pytest.raises(ConfigError, match="key=value"):
            merge_overrides([bad])


def test_unknown_names_are_reported_with_the_closest_one(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'ablation'"):
        find_study("ablaton")
    with pytest.raises(UnknownNameError, match="Did you mean 'reopold'"):
        parse(["name=ablation", "only=rkl,repold"])
    with pytest.raises(ConfigError, match=r"Did you mean 'seeds'.*after --, as in: -- seed=3"):
        parse(["name=ablation", "seed=3"])
    with pytest.raises(ConfigError, match=r"name=ablation\|"):
        parse(["seeds=3"])
    with pytest.raises(ConfigError, match="two settings are called a"):
        small_study(settings=(Setting("a", "", ()), Setting("a", "", ())))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=[0,0]"], "different seeds"),
        (["seeds=0"], "at least 1"),
        (["seeds=many"], "whole number"),
        (["seeds=[-1]"], "not be negative"),
        (["jobs=none"], "whole number"),
        (["report=yes"], "report=only"),
        (["ablation"], "not key=value"),
    ],
)
def test_wrong_values_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(["name=ablation", *words])


def test_the_command_line_is_read() -> None:
    options = parse(
        ["name=rho", "seeds=[3,1]", "jobs=4", "steps=7", "out=/x/y", "--", "optimizer.lr=1", "a=b"]
    )
    assert (options.name, options.seeds, options.jobs, options.steps) == ("rho", (3, 1), 4, 7)
    assert options.out == Path("/x/y")
    assert options.extra == ("optimizer.lr=1", "a=b")
    assert parse(["name=rho"]).seeds == (0, 1, 2, 3, 4)
    assert parse(["name=rho", "seeds=2", "report=only"]).report_only
    assert parse(["name=rho"]).out == Path.cwd() / "studies" / "rho"


def test_help_names_every_study_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert printed == usage()
    for study in STUDIES.values():
        assert study.title in printed
        assert all(setting.label in printed for setting in study.settings)


@pytest.mark.parametrize("name", list(STUDIES))
def test_every_setting_of_every_study_is_a_configuration(name: str, tmp_path: Path) -> None:
    by_steps = set()
    for run in expand(STUDIES[name], tmp_path, seeds=[0]):
        config, _ = composed(*run.overrides)
        settings = {k: v for k, v in config.objective.items() if k != "name"}
        make_objective(config.objective["name"], settings)
        assert config.evaluation.tasks == config.evaluation.curve_tasks
        updates = config.batch.prompts // config.batch.mini_batch
        shape = (config.batch.prompts * config.batch.samples, updates, config.optimizer.lr)
        if run.setting.label == "grpo":  # whole groups; compared by episodes, not by steps
            assert shape[1] == (4 if "env=math" in run.overrides else 1)
        else:
            by_steps.add(shape)
    assert len(by_steps) == 1  # what is compared by steps has the same batch, updates and rate


# Numbers


def test_smoothing_and_reaching_by_hand() -> None:
    assert smoothed([0.0, 0.3, 0.9, 0.6]) == pytest.approx([0.0, 0.4, 0.6, 0.6])
    assert smoothed([0.5]) == [0.5]
    assert smoothed([0.5, 0.7]) == [0.5, 0.7]
    curve = [(0.0, 0.0), (10.0, 0.3), (20.0, 0.9), (30.0, 0.6)]
    assert reach(curve, 0.2) == pytest.approx(5.0)  # half-way to the smoothed 0.4 at 10
    assert reach(curve, 0.5) == pytest.approx(15.0)
    assert reach(curve, 0.6) == pytest.approx(20.0)
    assert reach(curve, 0.61) is None  # the peak of 0.9 is one point's luck
    assert reach(curve, 0.0) == 0.0
    assert reach([], 0.0) is None


def test_an_interval_over_seeds() -> None:
    # Hesterberg's table: for n = 5, t 2.776 x sqrt(5/4) = 3.104 normal standard deviations.
    assert bootstrap_confidence(5) == pytest.approx(0.99809, abs=1e-5)
    # t 2.0395 with 31 degrees of freedom, as in the printed tables.
    assert bootstrap_confidence(32) == pytest.approx(0.96175, abs=1e-5)
    assert bootstrap_confidence(1000) == pytest.approx(0.95, abs=1e-3)
    with pytest.raises(ValueError, match="at least two"):
        bootstrap_confidence(1)
    two = estimate([0.2, 0.4])
    assert (two.mean, two.low, two.high, two.n) == (pytest.approx(0.3), 0.2, 0.4, 2)
    assert estimate([0.5]).low is None
    five = estimate([0.1, 0.2, 0.3, 0.4, 0.5])
    assert five.low is not None
    assert five.high is not None
    assert 0.1 <= five.low < 0.15
    assert 0.45 < five.high <= 0.5
    assert estimate([0.3, 0.1, 0.5, 0.2, 0.4]) == five  # seeded, and the order does not matter
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_differences_are_paired_by_seed() -> None:
    found = difference({0: 0.1, 1: 0.5, 2: 0.9}, {1: 0.6, 0: 0.3, 5: 0.0})
    assert found is not None
    assert found.estimate.mean == pytest.approx(0.15)
    assert (found.better, found.worse, found.estimate.n) == (2, 0, 2)
    assert verdict_of(found) == "not decided"  # two seeds that agree decide nothing
    low, high = ({seed: x + seed / 100 for seed in range(5)} for x in (0.2, 0.3))
    assert verdict_of(difference(low, high)) == "yes"
    assert verdict_of(difference(high, low)) == "no"
    assert verdict_of(difference(low, {**high, 3: 0.0})) == "not decided"
    assert verdict_of(difference({0: 0.3}, {0: 0.9})) == "not decided"
    assert difference({0: 0.3}, {1: 0.9}) is None
    assert verdict_of(None) == "not measured"


def test_curves_over_seeds() -> None:
    curves = [[(0.0, 0.0), (5.0, 0.4), (10.0, 0.6)], [(0.0, 0.2), (10.0, 0.8)]]
    assert mean_curve(curves) == [(0.0, pytest.approx(0.1)), (10.0, pytest.approx(0.7))]
    points = band(curves)
    assert (points[1][1].low, points[1][1].high) == (0.6, 0.8)


def test_reaching_over_seeds_counts_those_that_never_do() -> None:
    curves = {
        0: [(0.0, 0.0), (10.0, 1.0)],
        1: [(0.0, 0.0), (10.0, 0.5)],
        2: [(0.0, 0.0), (10.0, 0.2)],
    }
    found = reach_over_seeds(curves, 0.5)
    assert found.per_seed == {0: 5.0, 1: 10.0, 2: None}
    assert found.reached == 2
    assert found.median == 10.0
    assert found.of_mean == pytest.approx(0.5 / (1.7 / 3) * 10)
    assert found.low == pytest.approx(5.0)  # three times the first seed
    assert found.high is None  # some draws never arrive
    nowhere = reach_over_seeds(curves, 2.0)
    assert (nowhere.median, nowhere.of_mean, nowhere.low, nowhere.high) == (None,) * 4


def test_the_share_of_another_methods_run() -> None:
    fast = {seed: [(0.0, 0.0), (10.0, 1.0), (20.0, 1.0)] for seed in range(3)}
    slow = {seed: [(0.0, 0.0), (40.0, 0.5)] for seed in range(3)}
    share, low, high = reach_share(fast, slow)
    # Smoothed, the fast one is at 2/3 after 10: the 0.5 is reached after 7.5 of 40.
    assert share == pytest.approx(7.5 / 40)
    assert low == pytest.approx(share)
    assert high == pytest.approx(share)
    assert reach_share(slow, fast) == (None, None, None)


def test_probes_by_hand() -> None:
    probe = ProbeResult(3, [[1, 0], [0, 0], [1, 1]], {1: [0.5, 0.0, 1.0], 2: [1.0, 0.0, 1.0]}, 4.0)
    assert probe.avg == pytest.approx(0.5)
    assert probe.pass_at(1) == pytest.approx(0.5)
    assert probe.pass_at(2) == pytest.approx(2 / 3)
    assert probe.maj_at(2) == pytest.approx(2 / 3)
    assert probe.numbers()["right_by_task"] == [1, 0, 2]


# Claims, on runs written by hand


def write_run(run: Run, curve: Sequence[float], *, every: int = 10, **step: float) -> None:
    """A finished run whose held-out success was this, every ``every`` steps of 32 episodes."""
    run.folder.mkdir(parents=True)
    last = (len(curve) - 1) * every
    rows: list[dict[str, object]] = [
        {"kind": "train", "step": i, "rollout/episodes": 32.0, "time/step": 1.0, **step}
        for i in range(last)
    ]
    for place, success in enumerate(curve):
        for sampling in ("sampled", "greedy"):
            row = {"kind": "eval", "who": "student", "step": place * every, "sampling": sampling}
            rows.append({**row, "curve": 0 < place * every < last, "success": success, "n": 8})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run.folder / "metrics.jsonl").write_text(text)
    (run.folder / "summary.json").write_text("{}")


def results_of(out: Path, curves: dict[str, Sequence[float]], seeds: int = 5) -> Results:
    """Runs of the study of efficiency; seed s has 0.01 x s more success at its end."""
    runs = expand(STUDIES["efficiency"], out, seeds=range(seeds), only=list(curves))
    for run in runs:
        curve = curves[run.setting.label]
        write_run(run, [*curve[:-1], curve[-1] + 0.01 * run.seed])
    return Results(runs, out)


RISES = (0.1, 0.8, 0.8, 0.8, 0.8)
SLOW = (0.1, 0.2, 0.3, 0.4, 0.5)


def test_reaching_in_half_the_steps_is_judged_by_the_interval(tmp_path: Path) -> None:
    found = results_of(tmp_path / "a", {"reopold": RISES, "rkl": SLOW})
    claim = reaches("c", found, "reopold", "rkl", 0.5, episodes=False)
    # The target is 0.52 (0.5 and the mean of 0 to 0.04); smoothed, Reopold has 0.5667 after 10.
    assert claim.verdict == "yes"
    there = (0.52 - 0.1) / (1.7 / 3 - 0.1) * 10
    assert "target 0.520, RKL's end after 40 steps" in claim.here
    assert f"mean curve {there:.0f} steps, {there / 40:.2f} of the run" in claim.here
    assert "seeds that get there 5 of 5" in claim.here
    assert "own mean curve is first there at 40" in claim.here
    other = reaches("c", found, "rkl", "reopold", 0.5, episodes=False)
    assert other.verdict == "no"
    assert "mean curve not reached" in other.here
    narrow = reaches("c", found, "reopold", "rkl", 0.1, episodes=True)
    assert narrow.verdict == "no"
    assert "RKL's end after 1280 episodes" in narrow.here
    assert reaches("c", found, "reopold", "grpo", 0.5, episodes=True).verdict == "not measured"
    few = results_of(tmp_path / "b", {"reopold": RISES, "rkl": SLOW}, seeds=2)
    assert reaches("c", few, "reopold", "rkl", 0.5, episodes=False).verdict == "not decided"


def test_a_baseline_that_does_not_learn_is_no_target(tmp_path: Path) -> None:
    found = results_of(tmp_path, {"reopold": RISES, "rkl": (0.5, 0.1, 0.1, 0.0, 0.0)})
    claim = reaches("c", found, "reopold", "rkl", 0.5, episodes=False)
    assert claim.verdict == "not decided"
    assert "does not learn here" in claim.here
    table = reach_table(found, "rkl", ["reopold", "rkl"], episodes=True)
    assert "says nothing" in table.note


def test_the_table_of_reaching(tmp_path: Path) -> None:
    found = results_of(tmp_path, {"reopold": RISES, "rkl": SLOW})
    table = reach_table(found, "rkl", ["reopold", "rkl"], episodes=True)
    assert table.title == "Episodes until RKL's final success, 0.520"
    there = (0.52 - 0.1) / (1.7 / 3 - 0.1) * 320
    ours, theirs = table.rows
    assert ours[:3] == ["Reopold", "1280", f"{there:.0f}"]
    assert ours[4:] == ["5 of 5", f"{there:.0f}", f"{there:.0f} to {there:.0f}"]
    # Ends 0.50 to 0.54: three seeds get to their mean, the best one soonest.
    assert theirs[2] == "1280"
    before = (0.3 + 0.4 + 0.54) / 3
    soonest = 960 + (0.52 - before) / (0.54 - before) * 320
    assert theirs[4:] == ["3 of 5", "1280", f"{soonest:.0f} to 1280"]


def test_better_settings_and_gradient_norms(tmp_path: Path) -> None:
    runs = expand(STUDIES["ablation"], tmp_path, seeds=range(5), only=["rkl", "rkl_sg"])
    for run in runs:
        worse = run.setting.label == "rkl"
        end = 0.2 + 0.01 * run.seed + (0.0 if worse else 0.1)
        write_run(run, (0.1, end), grad_norm=7.0 + run.seed + (3.0 if worse else 0.0))
    found = Results(runs, tmp_path)
    claim = better("c", found, "rkl", "rkl_sg")
    assert (claim.verdict, claim.here[:6]) == ("yes", "+0.100")
    assert "better in 5 and worse in 0 of 5 seeds" in claim.here
    norms = greater_mean("c", found, "grad_norm", "rkl_sg", "rkl")
    assert (norms.verdict, "difference 3 [3, 3]" in norms.here) == ("yes", True)
    write_report(runs, tmp_path, ["python", "a b"])
    page = (tmp_path / "README.md").read_text("utf-8")
    assert "| (1) stop-gradient improves RKL (table 5.2) | +0.100" in page
    assert "python 'a b'" in page


def test_the_family_is_ranked_and_its_newcomers_are_compared(tmp_path: Path) -> None:
    ends = {"rkl_sg": 0.5, "reopold": 0.7, "exopd": 0.6}
    runs = expand(STUDIES["family"], tmp_path, seeds=range(5), only=list(ends))
    for run in runs:
        write_run(run, (0.1, ends[run.setting.label] + 0.01 * run.seed))
    write_report(runs, tmp_path, ["python"])
    page = (tmp_path / "README.md").read_text("utf-8")
    table = page.split("## Final success")[1].split("##")[0]
    ranked = ["| Reopold |", "| ExOPD |", "| RKL + stop-gradient (1) |"]
    assert sorted(ranked, key=table.index) == ranked
    found = {
        claim["claim"]: claim
        for claim in json.loads((tmp_path / "numbers.json").read_text())["claims"]
    }
    over, under = (
        found[f"ExOPD beats {other} (not in the paper)"]
        for other in ("RKL + stop-gradient (1)", "Reopold")
    )
    assert (over["verdict"], over["here"][:6]) == ("yes", "+0.100")
    assert (under["verdict"], under["here"][:6]) == ("no", "-0.100")
    assert found["Reopold beats SFT (table 5.3)"]["verdict"] == "not measured"


def test_the_family_has_equal_episodes_and_updates(tmp_path: Path) -> None:
    sizes, known = set(), set()
    for run in expand(STUDIES["family"], tmp_path, seeds=[0]):
        config, _ = composed(*run.overrides)
        batch = config.batch
        sizes.add(
            (config.steps, batch.prompts, batch.samples, batch.mini_batch, config.optimizer.lr)
        )
        known.add(config.objective["name"])
    assert len(sizes) == 1
    assert known == set(OBJECTIVES.names())


def test_runs_from_a_repository_without_a_commit_can_be_reported(tmp_path: Path) -> None:
    runs = expand(STUDIES["ablation"], tmp_path, seeds=[0, 1], only=["rkl"])
    for run, commit in zip(runs, (None, "0123456789abcdef"), strict=True):
        write_run(run, (0.1, 0.2))
        made = {"git": {"commit": commit, "dirty": commit is None}}
        (run.folder / "versions.json").write_text(json.dumps(made))
    write_report(runs, tmp_path, ["python"])
    page = (tmp_path / "README.md").read_text("utf-8")
    assert "commit none yet with uncommitted changes, 0123456789ab." in page


# Running


def work(name: str, folder: Path, code: str, **settings: object) -> Work:
    done = folder / f"{name}.done"
    code = f"import pathlib, time\nT = pathlib.Path({str(folder)!r})\n{code}"
    return Work(
        name=name,
        command=lambda: [sys.executable, "-c", code],
        log=folder / f"{name}.log",
        done=done.is_file,
        **settings,  # type: ignore[arg-type]
    )


def ok(name: str, seconds: float = 0.0) -> str:
    """Notes when it began and ended."""
    return (
        f"a = time.monotonic(); time.sleep({seconds}); b = time.monotonic()\n"
        f"(T / '{name}.done').write_text(f'{{a}} {{b}}')"
    )


def times(folder: Path, name: str) -> tuple[float, float]:
    begin, end = (folder / f"{name}.done").read_text().split()
    return float(begin), float(end)


def test_a_failure_is_shown_and_the_others_continue(tmp_path: Path) -> None:
    first = work("first", tmp_path, "print('on the way'); raise SystemExit('no such number')")
    second = work("second", tmp_path, ok("second"))
    works = [
        first,
        second,
        work("probe", tmp_path, ok("probe"), after=[first]),
        work("either", tmp_path, ok("either"), after=[first, second]),
        work("quiet", tmp_path, "pass"),  # ends well, but has not done what it should
        work("killed", tmp_path, "import os; os.kill(os.getpid(), 9)"),
    ]
    said: list[str] = []
    failures = run_all(works, 2, said.append)
    assert set(failures) == {"first", "probe", "quiet", "killed"}
    assert "exit status 1" in failures["first"]
    assert "no such number" in failures["first"]
    assert "killed by signal 9" in failures["killed"]
    assert failures["probe"] == "first failed"
    assert (tmp_path / "second.done").is_file()
    assert (tmp_path / "either.done").is_file()  # one of two is enough
    assert not (tmp_path / "probe.done").exists()
    assert any("FAILED" in line and "no such number" in line for line in said)


def test_work_waits_for_what_it_needs_and_runs_alone_if_it_measures(tmp_path: Path) -> None:
    base = work("base", tmp_path, ok("base", 2.0))
    works = [
        work("timed", tmp_path, ok("timed", 0.2), alone=True),
        base,
        work("other", tmp_path, ok("other", 0.3)),
        work("follows", tmp_path, ok("follows", 0.3), after=[base]),
    ]
    assert run_all(works, 3, lambda _: None) == {}
    assert times(tmp_path, "follows")[0] >= times(tmp_path, "base")[1]
    assert times(tmp_path, "other")[0] < times(tmp_path, "base")[1]  # at the same time
    begin = times(tmp_path, "timed")[0]
    assert all(times(tmp_path, n)[1] <= begin for n in ("base", "other", "follows"))
    said: list[str] = []
    assert run_all(works, 3, said.append) == {}
    assert said == ["4 of 4 are already done"]


def test_a_changed_definition_is_refused(tmp_path: Path) -> None:
    runs = expand(small_study(), tmp_path, seeds=[0])
    check_overrides(runs, tmp_path)
    changed = expand(small_study(), tmp_path, seeds=[0, 1], extra=["optimizer.lr=7e-3"])
    figures = tmp_path / "models/student.json"
    figures.parent.mkdir()
    figures.touch()
    check_overrides(runs, tmp_path)
    assert figures.exists()
    check_overrides(changed, tmp_path)  # nothing has been run yet
    assert not figures.exists()  # they may be those of another model
    check_overrides(runs, tmp_path)
    (runs[0].folder).mkdir(parents=True)
    (runs[0].folder / "config.yaml").touch()
    with pytest.raises(CheckpointError, match=r"a: optimizer\.lr=1e-3 -> optimizer\.lr=7e-3"):
        check_overrides(changed, tmp_path)
    check_overrides(runs, tmp_path)  # the refusal changed nothing
    check_overrides(
        expand(small_study(), tmp_path, seeds=[5, 6]), tmp_path
    )  # more seeds are welcome


def test_one_command_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(CheckpointError, match="another study command"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


# The command

SETTINGS = (
    "batch.prompts=4",
    "batch.mini_batch=2",
    "rollout.max_turns=2",
    "evaluation.tasks=6",
    "evaluation.curve_tasks=6",
    "evaluation.every=1",
    "evaluation.max_turns=2",
)


def study_command(out: Path, *words: str, extra: tuple[str, ...] = SETTINGS) -> list[str]:
    module = [sys.executable, "-m", "reopold_agent.study"]
    own = last_of_each("name=agentic", f"out={out}", "steps=2", "jobs=2", *words)
    return [*module, *own, "--", *extra]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    place = tmp_path_factory.mktemp("study")
    out = place / "agentic"
    words = ("only=rkl,reopold", "seeds=2", f"docs={place / 'docs'}")
    done = command(study_command(out, *words), place)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done


def end_success(folder: Path, sampling: str) -> float:
    (row,) = [
        row
        for row in lines(folder / "metrics.jsonl")
        if (row["kind"], row["step"], row.get("sampling"), row.get("curve"))
        == ("eval", 2, sampling, False)
    ]
    return float(row["success"])


def test_words_above_the_mark_of_the_index_stay(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "numbers.json").write_text('{"command": "c", "claims": []}')
    first = index(tmp_path)
    assert first.startswith("# Studies")
    (tmp_path / "README.md").write_text("# Mine\n\nWhat I think.\n\n" + first[first.index(MARK) :])
    again = index(tmp_path)
    assert again.startswith("# Mine\n\nWhat I think.\n\n" + MARK)
    assert again.partition(MARK)[2] == first.partition(MARK)[2]


@pytest.mark.slow
def test_the_report_says_what_the_runs_measured(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = whole
    text = (out / "README.md").read_text("utf-8")
    cells = {
        row[0]: row
        for line in text.split("## Final success")[1].split("##")[0].splitlines()
        if len(row := [cell.strip() for cell in line.strip("|").split("|")]) > 3
    }
    ends = {}
    for label, title in (("rkl", "RKL"), ("reopold", "Reopold")):
        for column, sampling in ((2, "sampled"), (3, "greedy")):
            values = [end_success(out / "runs" / label / f"seed-{s}", sampling) for s in (0, 1)]
            expected = f"{fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
            assert cells[title][column] == expected  # of two seeds the interval is their span
            ends[label, sampling] = values
        assert cells[title][1] == "2"
    gaps = [b - a for a, b in zip(ends["rkl", "sampled"], ends["reopold", "sampled"], strict=True)]
    assert cells["Reopold"][5].startswith(
        f"{fmean(gaps):+.3f} [{min(gaps):+.3f}, {max(gaps):+.3f}]"
    )
    assert re.search(r"\| Reopold beats RKL \(table 5.3\) \|.*\| \*\*not decided\*\* \|", text)
    assert re.search(r"Reopold beats GRPO .*\*\*not measured\*\*", text)
    words = " ".join(study_command(out, "only=rkl,reopold", "seeds=2")[3:6])
    assert f"python -m reopold_agent.study {words}" in text  # the exact command
    assert "2 settings, seeds 0, 1." in text
    for who, name in (("student", "student before training"), ("teacher", "teacher")):
        (point,) = json.loads((out / "models" / f"{who}.json").read_text("utf-8"))["points"]
        average = fmean(right for task in point["correct"] for right in task)
        assert cells[name][2] == f"{average:.3f} (avg@4)"

    numbers = json.loads((out / "numbers.json").read_text("utf-8"))
    assert len(numbers["runs"]) == 4
    run = next(r for r in numbers["runs"] if (r["setting"], r["seed"]) == ("reopold", 1))
    rows = lines(out / "runs" / "reopold" / "seed-1" / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    assert run["steps"]["rollout/episodes"] == [row["rollout/episodes"] for row in train]
    assert run["steps"]["entropy/mean"] == pytest.approx(
        [row["entropy/mean"] for row in train], rel=1e-4
    )
    curve = [p for p in run["curve"] if p["sampling"] == "sampled"]
    assert [p["step"] for p in curve] == [0, 1, 2]
    assert curve[-1]["success"] == end_success(out / "runs" / "reopold" / "seed-1", "sampled")

    figures = re.findall(r"\]\((\w+\.png)\)", text)
    assert "episodes.png" in figures
    for name in figures:
        with Image.open(out / name) as picture:
            assert min(picture.size) > 150
        assert (out / name).stat().st_size < 150_000
    docs = out.parent / "docs" / "agentic"
    assert {path.name for path in docs.iterdir()} == {"README.md", "numbers.json", *figures}
    assert (docs / "README.md").read_text("utf-8") == text
    assert done.stderr == ""


@pytest.mark.slow
def test_a_second_call_runs_nothing_and_other_words_are_refused(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = whole
    summaries = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/summary.json")}
    assert len(summaries) == 4
    done = command(study_command(out, "only=rkl,reopold", "seeds=2"), out.parent)
    assert done.returncode == 0, done.stderr
    assert "6 of 6 are already done" in done.stdout  # four runs, student and teacher
    only = command(study_command(out, "only=rkl,reopold", "seeds=3", "report=only"), out.parent)
    assert only.returncode == 0, only.stderr
    assert "leaves out 2 unfinished runs" in only.stdout
    assert "**Incomplete**" in (out / "README.md").read_text("utf-8")
    words = study_command(out, "only=rkl,reopold", "seeds=2", extra=(*SETTINGS, "optimizer.lr=1"))
    refused = command(words, out.parent)
    assert refused.returncode == 2
    assert "rkl: - -> optimizer.lr=1" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert {
        path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/summary.json")
    } == summaries


@pytest.mark.slow
def test_a_study_killed_in_mid_run_continues(
    whole: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    words = study_command(out, "only=reopold", "seeds=2")
    process = start(words, tmp_path)
    folder = out / "runs" / "reopold" / "seed-0"
    wait_until(lambda: bool(lines(folder / "metrics.jsonl")), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = (folder / "metrics.jsonl").read_bytes()
    time.sleep(1.5)
    assert (folder / "metrics.jsonl").read_bytes() == before  # its runs died with it
    assert not (folder / "summary.json").exists()
    done = command(words, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in (0, 1):
        name = f"runs/reopold/seed-{seed}/metrics.jsonl"
        assert without_timings(lines(out / name)) == without_timings(lines(whole[0] / name))


@pytest.mark.slow
def test_ctrl_c_lets_the_runs_save(tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    words = study_command(out, "only=reopold", "seeds=1", "steps=50")
    process = start(words, tmp_path)
    folder = out / "runs" / "reopold" / "seed-0"
    wait_until(lambda: len(lines(folder / "metrics.jsonl")) > 3, process)
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping 1 runs" in printed
    assert "The same command continues" in error
    assert "Traceback" not in error
    assert list((folder / "checkpoints").glob("step-*"))  # the trainer saved before it ended


@pytest.mark.slow
def test_a_run_that_cannot_start_fails_alone(tmp_path: Path) -> None:
    out = tmp_path / "failing"
    (out / "runs" / "rkl").mkdir(parents=True)
    (out / "runs" / "rkl" / "seed-0").touch()  # a file where its folder should be
    done = command(study_command(out, "only=rkl,reopold", "seeds=1"), tmp_path)
    assert done.returncode == 1
    assert "rkl/seed-0  FAILED, exit status" in done.stdout
    assert "seed-0.log" in done.stdout
    assert "1 failed: rkl/seed-0" in done.stdout
    text = (out / "README.md").read_text("utf-8")
    assert "**Incomplete**: without rkl/seed-0." in text
    assert re.search(r"\| Reopold \| 1 \| \d\.\d{3} \(one seed\) \|", text)
    assert "Traceback" not in done.stderr
