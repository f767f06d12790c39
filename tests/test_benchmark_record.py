"""``benchmarks/record.py`` keeps figures; ``benchmarks/scaling.py`` on a small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_figures_are_kept_and_worse_ones_told(benchmarks: None, tmp_path: Path) -> None:
    import record

    (tmp_path / "gpu.json").write_text('{"device": "cpu"}')
    first = [
        "step 0: 1 s\n",
        '{"a": 1.0, "b": 2.0, "none": null, "torch": "2", "cpu": {"d": 1.5}}\n',
        "\n",
    ]
    assert record.add("step", first, tmp_path) == []
    later = ['{"a": 1.09, "b": 2.5, "none": 1.0, "c<": 3.0}']
    assert record.add("step", later, tmp_path) == ["WORSE: step b 2 -> 2.5 (+25%)"]
    runs = json.loads((tmp_path / "step.json").read_text())
    assert runs[0]["figures"] == {"a": 1.0, "b": 2.0, "cpu/d": 1.5}
    assert runs[1]["figures"]["b"] == 2.5
    page = record.page(tmp_path)
    assert page.count("<tr><td>") == 4
    assert "<td>c&lt;</td><td>3</td><td>3 to 3</td>" in page
    assert 'points="0.0,12.0 240.0,0.0"' in page  # b: 2, then 2.5, which is the top
    for bad in ([], ["a failure\n"], ["[1]"]):
        with pytest.raises(ValueError, match="the last line of step holds no figures"):
            record.add("step", bad, tmp_path)


def test_commands_on_a_run_like_those_of_training(
    benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling: Any = pytest.importorskip("scaling")
    from reopold_agent.tracking.trajectories import row_head

    assert scaling.exponents([(8, 1), (16, 4), (32, 16)]) == pytest.approx((2, 2))
    scaling.write_data(tmp_path / "data", 30)
    scaling.write_run(tmp_path / "run", 100)
    for name in ("one", "two"):
        scaling.write_answers(tmp_path / name, 20)
    with (tmp_path / "run" / "trajectories.jsonl").open("rb") as lines:
        assert all(row_head(line) for line in lines)
    for name in sorted(set(scaling.COMMANDS) - {"plots"}):
        scaling.COMMANDS[name](tmp_path)
    with (tmp_path / "run" / "trajectories.jsonl").open("rb") as lines:
        assert sum(1 for _ in lines) == 64  # of 4 steps the last two were dropped
    # A step of the kind whose turns are written down: two calls and an answer.
    monkeypatch.setattr(scaling, "EPISODES", 2)
    seconds, tokens = scaling.step_seconds("tools", 2, tmp_path / "step", 1)
    assert seconds > 0
    assert tokens > 100
    sys.modules.pop("scaling")
