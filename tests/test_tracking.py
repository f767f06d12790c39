"""Output and files of a run: exact numbers, files that survive a kill, output without escapes."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from reopold_agent.common.files import dump_json
from reopold_agent.common.statistics import wilson_interval
from reopold_agent.errors import CheckpointError, DataError
from reopold_agent.tracking import (
    JsonLines,
    MetricsWriter,
    Progress,
    RunFolder,
    distillation_statistics,
    evaluation_statistics,
    print_summary,
    read_json_lines,
    read_metrics,
    rollout_statistics,
    save_pictures,
    to_json,
    trajectory_record,
    write_json_atomic,
)
from reopold_agent.tracking import metrics as metrics_module
from reopold_agent.tracking.history import History
from reopold_agent.tracking.plots import main as plots_main
from reopold_agent.tracking.plots import make_plots
from reopold_agent.tracking.statistics import HISTOGRAM_EDGES, abs_by_decile, reward_histogram
from reopold_agent.tracking.trajectories import TokenUse, row_head, token_means
from reopold_agent.types import EncodedImage, Region, StopReason, ToolCall, Trajectory, Turn

FLOOR = math.log(0.1) / 0.9
ROOT = Path(__file__).resolve().parents[1]


def episode(
    rng: np.random.Generator,
    *,
    scored: bool = True,
    success: bool = True,
    calls: tuple[bool, ...] = (True,),
    stop: StopReason = StopReason.ANSWER,
    reward: float = 1.0,
    length: int = 40,
) -> Trajectory:
    mask = rng.random(length) < 0.6
    mask[:8] = False
    entropy = np.where(mask, rng.gamma(0.5, 1.0, length), 0).astype(np.float32)
    logp = np.where(mask, -rng.gamma(0.5, 1.0, length), 0).astype(np.float32)
    teacher = np.where(mask, -rng.gamma(0.5, 3.0, length), 0).astype(np.float32)
    image = EncodedImage(rng.integers(0, 255, (28, 56, 3), dtype=np.uint8), (1, 2, 4), 2)
    turns = [
        Turn(8, 16, "zoom", "stop", ToolCall("crop_image", {"box": (0, 1)}, ok, None, 0.1), "ok")
        for ok in calls
    ]
    turns.append(Turn(20, length, "\\boxed{3}", "stop"))
    return Trajectory(
        task_id="demo/1",
        index=1,
        sample=0,
        prompt_length=8,
        ids=np.arange(length, dtype=np.int64),
        loss_mask=mask,
        logp=logp,
        entropy=entropy,
        images=[image, image],
        turns=turns,
        stop_reason=stop,
        reward=reward,
        success=success,
        info={"answer": "3", "pixels": image.pixels},
        teacher_logp=teacher if scored else None,
    )


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # the first two from Newcombe 1998, table I (method 3)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_has_the_known_values(
    successes: int, n: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_at_other_confidence_and_out_of_range() -> None:
    known = {0.5: (0.130338, 0.159985), 0.9: (0.112098, 0.184399), 0.99: (0.096906, 0.210117)}
    for confidence, expected in known.items():
        assert wilson_interval(37, 256, confidence) == pytest.approx(expected, abs=1e-6)
    for bad in ((-1, 3, 0.95), (4, 3, 0.95), (1, 3, 1.0), (1, 3, 0.0)):
        with pytest.raises(ValueError, match="got"):
            wilson_interval(*bad)


@given(st.integers(0, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_rate_and_is_symmetric(pair: tuple[int, int]) -> None:
    successes, n = pair
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= successes / n <= high
    mirrored = wilson_interval(n - successes, n)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


def test_distillation_statistics_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    trajectories = [episode(rng) for _ in range(9)]
    rewards, entropies = [], []
    for t in trajectories:
        assert t.teacher_logp is not None
        for i in range(len(t.ids)):
            if t.loss_mask[i]:
                rewards.append(float(t.teacher_logp[i] - t.logp[i]))
                entropies.append(float(t.entropy[i]))
    n = len(rewards)
    threshold = sorted(entropies, reverse=True)[math.ceil(0.2 * n) - 1]
    row = distillation_statistics(trajectories, floor=FLOOR, threshold=threshold)

    assert row["reward/mean"] == pytest.approx(sum(rewards) / n)
    assert (row["reward/min"], row["reward/max"]) == (min(rewards), max(rewards))
    assert row["reward/floor"] == FLOOR
    clipped = [max(r, FLOOR) for r in rewards]
    assert row["reward/clipped_mean"] == pytest.approx(sum(clipped) / n, rel=1e-6)
    below = sum(r <= FLOOR for r in rewards)
    assert 0 < below < n
    assert row["reward/below_floor"] == below / n
    assert row["mask/exploration_share"] == (n - below) / n
    assert row["mask/refinement_share"] == math.ceil(0.2 * n) / n
    assert row["entropy/mean"] == pytest.approx(sum(entropies) / n)
    assert row["entropy/threshold"] == threshold
    for p in (10, 50, 90, 99):
        place = (n - 1) * p / 100
        low, high = sorted(entropies)[math.floor(place)], sorted(entropies)[math.ceil(place)]
        expected = low + (high - low) * (place - math.floor(place))
        assert row["entropy/percentiles"][str(p)] == pytest.approx(expected)
    counts = [0] * 100
    for r in rewards:
        counts[min(99, max(0, math.floor((r + 20) * 4)))] += 1
    assert row["reward/histogram"] == {"edges": list(HISTOGRAM_EDGES), "counts": counts}
    assert sum(row["reward/clipped_histogram"]["counts"]) == n
    floor_bin = row["reward/clipped_histogram"]["counts"].index(
        next(c for c in row["reward/clipped_histogram"]["counts"] if c)
    )
    assert HISTOGRAM_EDGES[floor_bin] <= FLOOR < HISTOGRAM_EDGES[floor_bin + 1]
    order = sorted(range(n), key=lambda i: entropies[i])  # no ties in these
    start = 0
    for decile in range(10):
        size = n // 10 + (decile < n % 10)
        part = [abs(rewards[i]) for i in order[start : start + size]]
        assert row["reward/abs_by_entropy_decile"][decile] == pytest.approx(sum(part) / size)
        start += size


def test_histogram_counts_edges_and_beyond() -> None:
    histogram = reward_histogram([-np.inf, -99, -20, -19.75, -0.01, 0, 0.24, 0.25, 5, 7, np.inf])
    counts = dict(enumerate(histogram["counts"]))
    assert {i: c for i, c in counts.items() if c} == {0: 3, 1: 1, 79: 1, 80: 2, 81: 1, 99: 3}
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1 == 101
    assert sum(reward_histogram([math.nan])["counts"]) == 0


def test_deciles_do_not_depend_on_the_order_of_ties() -> None:
    rng = np.random.default_rng(1)
    entropy = rng.integers(0, 4, 97).astype(np.float32)
    reward = rng.normal(size=97)
    order = rng.permutation(97)
    assert abs_by_decile(reward, entropy) == pytest.approx(
        abs_by_decile(reward[order], entropy[order])
    )
    assert abs_by_decile([-1.0, 3.0], [7.0, 7.0], groups=2) == [2.0, 2.0]
    few = abs_by_decile([1.0, -2.0, math.inf], [0.0, 1.0, 2.0])
    assert few[:2] == [1.0, 2.0]
    assert all(math.isnan(value) for value in few[2:])


def test_statistics_survive_infinities_nan_and_nothing() -> None:
    rng = np.random.default_rng(2)
    t = episode(rng)
    at = np.flatnonzero(t.loss_mask)
    assert t.teacher_logp is not None
    t.teacher_logp[at[0]] = -np.inf
    t.teacher_logp[at[1]] = np.nan
    t.entropy[at[2]] = np.nan
    row = distillation_statistics([t], floor=FLOOR, threshold=0.0)
    assert row["reward/nonfinite"] == 2
    assert row["entropy/nonfinite"] == 1
    assert math.isfinite(row["reward/mean"])
    assert math.isfinite(row["reward/min"])
    n = len(at)
    kept = round(row["mask/exploration_share"] * n)
    below = round(row["reward/below_floor"] * n)
    assert kept + below == n - 1  # NaN is neither
    assert row["mask/refinement_share"] == (n - 1) / n
    assert sum(row["reward/histogram"]["counts"]) == n - 1

    unscored = distillation_statistics([episode(rng, scored=False)], floor=FLOOR, threshold=1.0)
    assert not any(key.startswith("reward/") for key in unscored)
    assert "entropy/mean" in unscored
    assert distillation_statistics([]) == {}
    bare = distillation_statistics([episode(rng)])
    assert "reward/mean" in bare
    assert "reward/floor" not in bare
    assert "mask/refinement_share" not in bare


def test_recomputed_logp_and_entropy_replace_the_recorded_ones() -> None:
    rng = np.random.default_rng(8)
    trajectories = [episode(rng), episode(rng, scored=False), episode(rng)]
    other = [episode(rng) for _ in trajectories]
    given = distillation_statistics(
        trajectories,
        floor=FLOOR,
        threshold=0.5,
        logp=[t.logp for t in other],
        entropy=[t.entropy for t in other],
    )
    for t, new in zip(trajectories, other, strict=True):
        t.logp, t.entropy = new.logp, new.entropy
    assert given == distillation_statistics(trajectories, floor=FLOOR, threshold=0.5)
    with pytest.raises(ValueError, match="one value per id"):
        distillation_statistics(trajectories[:1], logp=[other[0].logp[1:]])
    with pytest.raises(ValueError, match="shorter"):
        distillation_statistics(trajectories, logp=[other[0].logp])


def test_shares_agree_with_the_objective() -> None:
    torch = pytest.importorskip("torch")
    from reopold_agent.objectives import Reopold, TokenBatch
    from reopold_agent.objectives.pieces import reward_floor

    t = episode(np.random.default_rng(3), length=400)
    assert t.teacher_logp is not None
    at = np.flatnonzero(t.loss_mask)
    # Rewards exactly at the float32 floor are where an unlike comparison would show.
    t.logp[at[:20]] = 0
    t.teacher_logp[at[:20]] = np.float32(FLOOR)
    values = (t.logp, t.logp, t.teacher_logp, t.entropy, t.loss_mask)
    batch = TokenBatch(*(torch.from_numpy(v)[None] for v in values))
    objective = Reopold(switch_step=1)
    threshold = objective.threshold(batch.entropy, batch.loss_mask)
    row = distillation_statistics([t], floor=reward_floor(0.1), threshold=threshold)
    for step, key in ((0, "mask/exploration_share"), (1, "mask/refinement_share")):
        kept = float(objective.terms(batch, step, threshold).denominator)
        assert row[key] == pytest.approx(kept / len(at), abs=1e-12)


def test_rollout_and_evaluation_statistics() -> None:
    rng = np.random.default_rng(4)
    trajectories = [
        episode(rng, success=True, calls=(True, False), reward=1.0),
        episode(rng, success=False, calls=(), stop=StopReason.MAX_TURNS, reward=0.0),
        episode(rng, success=False, calls=(True,), stop=StopReason.ENV_ERROR, reward=math.nan),
        episode(rng, success=True, calls=(True,), reward=1.0),
    ]
    row = rollout_statistics(trajectories)
    assert row["rollout/success"] == 0.5
    assert row["rollout/reward"] == pytest.approx(2 / 3)
    assert row["rollout/tool_rate"] == 0.75
    assert row["rollout/tool_errors"] == 0.25
    assert row["rollout/tool_calls"] == 1.0
    assert row["rollout/turns"] == 2.0
    tokens = [int(t.loss_mask.sum()) for t in trajectories]
    assert row["rollout/response_tokens"] == sum(tokens) / 4
    stops = {k.removeprefix("rollout/stop/"): v for k, v in row.items() if "/stop/" in k}
    assert stops == {
        "answer": 0.5,
        "max_turns": 0.25,
        "max_tokens": 0.0,
        "time_limit": 0.0,
        "env_error": 0.25,
        "policy_error": 0.0,
    }
    evaluation = evaluation_statistics(trajectories)
    assert (evaluation["low"], evaluation["high"]) == wilson_interval(2, 4)
    assert (evaluation["success"], evaluation["n"], evaluation["tool_rate"]) == (0.5, 4, 0.75)
    assert evaluation["stop/env_error"] == 0.25

    none = rollout_statistics([])
    assert math.isnan(none["rollout/success"])
    assert none["rollout/episodes"] == 0
    assert math.isnan(rollout_statistics([episode(rng, calls=())])["rollout/tool_errors"])
    assert evaluation_statistics([])["n"] == 0


# --- files -----------------------------------------------------------------------------------


def train(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, **values}


def evaluation(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "who": "student", "sampling": "sampled", **values}


def strict(constant: str) -> None:
    raise AssertionError(f"not strict JSON: {constant}")


def test_odd_values_become_strict_json(tmp_path: Path) -> None:
    import torch

    class Odd:
        def __str__(self) -> str:
            return "odd"

    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(
            train(
                0,
                nan=math.nan,
                inf=-math.inf,
                deep={"a": [np.float32("nan"), np.float64(0.5)], 7: np.int64(3)},
                array=np.array([[1.0, np.inf]]),
                tensor=torch.tensor([1, 2]),
                scalar=torch.tensor(0.5, dtype=torch.bfloat16),
                long=np.longdouble(1.5),
                flag=np.True_,
                stop=StopReason.ANSWER,
                path=Path("a/b"),
                words={"b", "a"},
                call=ToolCall("crop", {"box": (1, 2)}, True),
                odd=Odd(),
                text="line\nbreak \u2028 \ud800 é",
            )
        )
    data = path.read_bytes()
    assert data.count(b"\n") == 1
    row = json.loads(data, parse_constant=strict)
    assert row["nan"] is None
    assert row["inf"] is None
    assert row["deep"] == {"a": [None, 0.5], "7": 3}
    assert row["array"] == [[1.0, None]]
    assert (row["tensor"], row["scalar"], row["long"]) == ([1, 2], 0.5, 1.5)
    assert (row["flag"], row["stop"], row["path"], row["odd"]) == (True, "answer", "a/b", "odd")
    assert row["words"] == ["a", "b"]
    assert row["call"]["arguments"] == {"box": [1, 2]}
    assert row["text"] == "line\nbreak \u2028 \ud800 é"
    assert read_metrics(tmp_path) == [row]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
        max_leaves=12,
    )
)
def test_to_json_never_fails(value: Any) -> None:
    json.dumps(to_json(value), allow_nan=False)


def test_metrics_rows_need_kind_and_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for row in ({"step": 1}, {"kind": "test", "step": 1}, {"kind": "train", "step": None}):
            with pytest.raises(ValueError, match="a row of metrics needs"):
                writer.write(row)
        writer.write(train(np.int64(2)))  # type: ignore[arg-type]  # as engines have it
    assert read_metrics(tmp_path) == [train(2)]


def test_truncate_after_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(evaluation(0))
        for step in range(5):
            writer.write(train(step, loss=0.1 * step))
            writer.write(evaluation(step + 1))
        before = path.read_bytes()
        assert writer.truncate_after(5) == 0
        assert path.read_bytes() == before
        # Row of train step 3 and the evaluation after 4 updates belong to what comes next.
        assert writer.truncate_after(3) == 4
        rows = read_metrics(path)
        assert [r["step"] for r in rows if r["kind"] == "train"] == [0, 1, 2]
        assert [r["step"] for r in rows if r["kind"] == "eval"] == [0, 1, 2, 3]
        for step in (3, 4):
            writer.write(train(step, loss=0.1 * step))
            writer.write(evaluation(step + 1))
        assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_long_file_is_continued_without_reading_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trajectories.jsonl"
    lines = [
        json.dumps({"kind": "train", "step": step, "ids": [100_000] * 2000}) + "\n"
        for step in range(1000)
    ]
    path.write_text("".join([*lines, '{"kind": "tra']))
    parsed = []
    monkeypatch.setattr(metrics_module, "_parse", lambda line: parsed.append(line))
    tracemalloc.start()
    with JsonLines(path) as writer:
        assert writer.truncate_after(990) == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.read_text() == "".join(lines[:990])
    assert parsed == [b'{"kind": "tra']
    assert peak < 4e6 < path.stat().st_size


def test_rows_in_another_order_are_read_completely(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.jsonl"
    path.write_text(
        '{"step": 5, "kind": "eval"}\n\n{"step": 5}\n{"kind": "train", "step": 5.0}\n{"kind": 1}\n'
    )
    with JsonLines(path) as lines:
        assert lines.truncate_after(5) == 2
    assert path.read_text() == '{"step": 5, "kind": "eval"}\n{"kind": 1}\n'
    path.write_text('{"kind": "train", "step": 0}\n{"kind": "train", "step": 1, \n{"step": 2}\n')
    damaged = pytest.raises(DataError, match=r"trajectories\.jsonl, line 2")
    with JsonLines(path) as lines, damaged:
        lines.truncate_after(0)


def test_rows_are_spread_over_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(10)))
    assert [row["step"] for row in read_json_lines(path, 4)] == [0, 3, 6, 9]
    assert len(read_json_lines(path, 10)) == 10


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_half_written_last_line_is_repaired(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(train(0, name="é"))
        writer.write(train(1, name="é", values=[1, 2, 3]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    expected = [train(0, name="é")] + [train(1, name="é", values=[1, 2, 3])] * (cut == 1)
    assert read_metrics(path) == expected
    with MetricsWriter(path) as writer:
        writer.truncate_after(9)
        writer.write(train(2))
    assert read_metrics(path) == [*expected, train(2)]
    assert path.read_bytes().endswith(b"\n")


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 0}\n{"kind": \n{"kind": "train", "step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_json_lines(path)
    with pytest.raises(DataError, match="there is no file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_row_that_does_not_fit_the_disk_leaves_no_half_line(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    path = tmp_path / "metrics.jsonl"
    code = (
        "import resource, sys\n"
        "from reopold_agent.tracking.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "writer.write({'kind': 'train', 'step': 0})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, -1))\n"  # room for half of the next row
        "try:\n"
        "    writer.write({'kind': 'train', 'step': 1})\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
        "writer.write({'kind': 'train', 'step': 2})\n"
    )
    with start(code, str(path)) as process:
        assert process.communicate(timeout=60)[0] == "StorageError\n"
    assert read_metrics(path) == [train(0), train(2)]


def test_lines_survive_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys\n"
        "from reopold_agent.tracking.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for step in range(10**9):\n"
        "    writer.write({'kind': 'train', 'step': step, 'values': list(range(200))})\n"
        "    if step == 300:\n"
        "        print('ready', flush=True)\n"
    )
    with start(code, str(path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    steps = [row["step"] for row in read_metrics(path)]
    assert len(steps) > 300
    assert steps == list(range(len(steps)))
    with MetricsWriter(path) as writer:
        writer.truncate_after(100)
    assert [row["step"] for row in read_metrics(path)] == list(range(100))


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_trajectory_record_and_pictures(tmp_path: Path) -> None:
    t = episode(np.random.default_rng(5), calls=(False,))
    assert t.turns[0].tool_call is not None
    t.turns[0].tool_call.regions = (Region(1, (0.0, 0.25, 0.5, 1.0)),)
    folder = RunFolder(tmp_path)
    paths = save_pictures(t, tmp_path)
    assert paths == save_pictures(t, tmp_path)
    assert len(set(paths)) == 1  # the same picture twice
    assert [f"pictures/{p.name}" for p in folder.pictures.iterdir()] == paths[:1]
    with Image.open(tmp_path / paths[0]) as picture:
        assert np.array_equal(np.asarray(picture), t.images[0].pixels)

    t.ids[1:6] = 99
    row = trajectory_record(t, 7, pictures=paths, decode=lambda ids: "".join(f"<{i}>" for i in ids))
    with JsonLines(folder.trajectories) as lines:
        lines.write(row)
    (read,) = read_json_lines(folder.trajectories)
    assert (read["kind"], read["step"], read["task_id"]) == ("train", 7, "demo/1")
    assert (read["stop_reason"], read["success"], read["reward"]) == ("answer", True, 1.0)
    assert read["turns"][0]["tool_call"] == {
        "name": "crop_image",
        "arguments": {"box": [0, 1]},
        "ok": False,
        "error": None,
        "seconds": 0.1,
        "regions": [{"image": 1, "box": [0.0, 0.25, 0.5, 1.0]}],
    }
    assert read["turns"][0]["observation"] == "ok"
    assert read["turns"][1]["tool_call"] is None
    image = {"grid": [1, 2, 4], "tokens": 2, "width": 56, "height": 28, "picture": paths[0]}
    assert read["images"] == [image, image]
    assert read["info"] == {"answer": "3"}  # no array in a text file
    assert read["ids"] == t.ids.tolist()
    assert np.array_equal(np.asarray(read["loss_mask"], bool), t.loss_mask)
    for key in ("logp", "entropy", "teacher_logp"):
        assert np.array_equal(np.asarray(read[key], np.float32), getattr(t, key))
    assert (read["token_reward"], read["kept"]) == (None, None)  # not trained on
    use = TokenUse(np.maximum(t.logp, np.float32(-1.1)), t.loss_mask)
    used = json.loads(dump_json(trajectory_record(t, 7, use=use)))
    assert np.array_equal(np.asarray(used["token_reward"], np.float32), use.reward)
    assert used["kept"] == [int(m) for m in t.loss_mask]
    assert read["prompt"] == "<0><99>*5<6><7>"
    assert read["tokens"] == [f"<{i}>" for i in t.ids]
    line = dump_json(row)
    head = row_head(line)
    assert head == {key: read[key] for key in [*read][: [*read].index("ids")]}
    means = head["token_means"]
    assert t.teacher_logp is not None
    assert means == token_means(read)
    ratio = (t.teacher_logp - t.logp)[t.loss_mask].mean()
    assert means == {
        "ratio": pytest.approx(ratio, abs=1e-6),
        "entropy": pytest.approx(t.entropy[t.loss_mask].mean(), abs=1e-6),
        "kept": None,
    }
    assert row_head(line[:-1]) is None  # cut off
    t.turns[0].tool_call.arguments = {"token_means": {"a": 1}, "ids": [1]}
    head = row_head(dump_json({**trajectory_record(t, 7), "turns": row["turns"]}))
    assert head is not None
    assert head["turns"] == read["turns"]
    old = {key: value for key, value in trajectory_record(t, 7).items() if key != "token_means"}
    assert row_head(dump_json(old)) is None
    with pytest.raises(ValueError, match="picture paths"):
        trajectory_record(t, 0, pictures=["a"])
    t.teacher_logp = None
    bare = trajectory_record(t, 0, kind="eval", who="teacher")
    assert (bare["teacher_logp"], bare["prompt"], bare["tokens"]) == (None, None, None)


def test_run_folder_layout_and_versions(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "run")
    assert not folder.path.exists()
    with folder.lock():
        assert folder.path.is_absolute()
        assert {p.name for p in folder.path.iterdir() if p.is_dir()} == {
            "pictures",
            "plots",
            "checkpoints",
        }
        folder.write_config("seed: 0\n")
        assert folder.config.read_text() == "seed: 0\n"
        assert folder.checkpoint(20) == folder.path / "checkpoints" / "step-000020"
        for name in ("step-000020", "step-000003", "step-000030.tmp", "other"):
            (folder.checkpoints / name).mkdir()
        assert folder.checkpoint_steps() == [3, 20]
        now = folder.write_versions("one card")
        written = json.loads(folder.versions.read_text())
        assert written == now
        assert written["device"] == "one card"
        assert written["packages"]["numpy"] == np.__version__
        assert written["cpu_count"] == os.cpu_count()
        assert {"python", "platform", "git", "reopold_agent"} <= set(written)
        folder.write_versions("one card")
        assert "earlier" not in json.loads(folder.versions.read_text())
        folder.write_versions("two cards")
        assert json.loads(folder.versions.read_text())["earlier"] == [now]
        folder.write_versions("one card")
        earlier = json.loads(folder.versions.read_text())["earlier"]
        assert [e["device"] for e in earlier] == ["one card", "two cards"]
    (tmp_path / "file").write_text("")
    refused = pytest.raises(CheckpointError, match="cannot make the run folder")
    with refused, RunFolder(tmp_path / "file").lock():
        pass


def test_git_state_of_the_projects_own_checkout_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reopold_agent.tracking import run_folder

    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        subprocess.run(command, check=True, capture_output=True)

    try:
        git("init")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert run_folder._git(tmp_path) is None  # no pyproject.toml: someone else's repository
    (tmp_path / "pyproject.toml").write_text("")
    assert run_folder._git(tmp_path) == {"commit": None, "dirty": True}
    git("add", ".")
    git("commit", "-m", "x")
    state = run_folder._git(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "new.py").write_text("")
    assert (run_folder._git(tmp_path) or {})["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert run_folder._git(tmp_path) is None


def test_lock_refuses_a_second_process_and_dies_with_the_first(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from reopold_agent.tracking.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).lock():\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with start(code, str(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        refused = pytest.raises(CheckpointError, match=rf"in use by process {process.pid} on")
        with refused, RunFolder(tmp_path).lock():
            pass
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    folder = RunFolder(tmp_path)
    again = pytest.raises(CheckpointError, match="in use")
    with folder.lock(), again, RunFolder(tmp_path).lock():
        pass
    with folder.lock():
        pass


def test_write_json_atomic_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"before": {"success": math.nan}})
    write_json_atomic(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


# --- display ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROW = {
    "kind": "train",
    "step": 11,
    "phase": "exploration",
    "reward/mean": -0.321,
    "rollout/success": 0.406,
    "rollout/tool_rate": 0.875,
    "tokens_per_second": 1234.4,
    "time/step": 2.0,
}
EVAL = {
    "kind": "eval",
    "step": 20,
    "who": "student",
    "sampling": "sampled",
    "success": 0.72,
    "low": 0.66,
    "high": 0.77,
    "n": 256,
    "tool_rate": 1.0,
}


def test_plain_progress_is_single_lines_without_escape_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what CI services set
    stream = io.StringIO()
    now = [0.0]
    with Progress(console=Console(file=stream), clock=lambda: now[0]) as progress:
        progress.start(60, done=11)
        now[0] = 100.0  # an evaluation before the first step must not count
        progress.activity("rollout 3/32")
        progress.step(ROW)
        now[0] = 102.0
        progress.step({**ROW, "step": 12})
        progress.evaluation(EVAL)
        progress.evaluation({**EVAL, "who": "teacher", "step": 0})
        progress.note("two\nlines [bold]kept[/bold] \x1b[31mred")
    text = stream.getvalue()
    assert "\x1b" not in text
    assert text.splitlines() == [
        "step 12/60 exploration  success 0.41  reward -0.32  tools 0.88  tok/s 1,234  1:36 left",
        "step 13/60 exploration  success 0.41  reward -0.32  tools 0.88  tok/s 1,234  1:34 left",
        "held-out: student 0.72 (0.66 to 0.77) after 20 steps, sampled, tool rate 1.00, n 256",
        "held-out: teacher 0.72 (0.66 to 0.77), sampled, tool rate 1.00, n 256",
        "two lines [bold]kept[/bold] [31mred",
    ]


def test_plain_progress_on_a_stream_that_knows_ascii_only() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    progress = Progress(console=Console(file=stream))
    progress.note("naïve")
    assert raw.getvalue() == b"na?ve\n"


@pytest.mark.parametrize("width", [60, 80, 140])
def test_live_progress_fits_the_width(width: int) -> None:
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, width=width, legacy_windows=False)
    with Progress(console=console, clock=iter(range(1000)).__next__) as progress:
        progress.start(60)
        progress.evaluation(EVAL)
        progress.step({**ROW, "step": 3})
        progress.activity("rollout 3/32 [b]")
        assert progress._live is not None
        plain = Console(file=io.StringIO(), width=width)
        plain.print(progress._live.renderable)
        lines = plain.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO
        progress.note("done")
    assert len(lines) == 4
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("step 4/60")
    assert "exploration" in lines[0]
    assert lines[0].rstrip().endswith("left")
    assert [word in lines[1] for word in ("0.41", "-0.32", "0.88", "1,234")] == [True] * 4
    assert lines[2].startswith("held-out student 0.72 (0.66 to 0.77) after 20 steps")
    assert lines[3].startswith("rollout 3/32 [b]")
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is back


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
@pytest.mark.parametrize(
    "odd", [None, math.nan, math.inf, -1e300, "text", [1], {}, 10**400, True, np.float32(1)]
)
def test_progress_never_raises(stream: io.StringIO, odd: Any) -> None:
    console = Console(file=stream, force_terminal=stream.isatty(), width=60)
    with Progress(console=console) as progress:
        progress.start(odd, odd)
        progress.step(dict.fromkeys(ROW, odd) | {"step": odd})
        progress.step({})
        progress.step({"step": 5, "phase": odd})
        progress.evaluation(dict.fromkeys(EVAL, odd))
        progress.evaluation({})
        progress.note(str(odd))
        progress.activity("")
    progress.stop()
    progress.step(ROW)


SUMMARY: dict[str, Any] = {
    "env": "pixel_reasoner",
    "steps": 60,
    "seed": 0,
    "train_seconds": 46.2,
    "seconds": 131.0,
    "before": {**EVAL, "success": 0.141, "low": 0.1, "high": 0.19, "greedy": {"success": 0.68}},
    "teacher": {**EVAL, "success": 0.86, "greedy": {"success": 0.9}},
    "after": {**EVAL, "success": 0.75, "greedy": {"success": 0.86}},
    "next": ["python -m reopold_agent.evaluate run=" + "x" * 120],
}


def test_summary_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    (tmp_path / "metrics.jsonl").write_text("")
    stream = io.StringIO()
    print_summary({**SUMMARY, "run": str(tmp_path)}, Console(file=stream))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert text.isascii()
    assert "Held-out success 0.14 -> 0.75 (teacher 0.86), pixel_reasoner" in text
    assert "60 steps in 0:46, 2:11 in all, seed 0" in text
    (before,) = [line for line in text.splitlines() if "student before" in line]
    assert [cell.strip() for cell in before.split("|")[2:-1]] == [
        "0.14",
        "0.10 to 0.19",
        "0.68",
        "1.00",
        "256",
    ]
    assert "metrics.jsonl" in text
    assert "final" not in text  # only what exists
    assert "  " + SUMMARY["next"][0] in text.splitlines()  # can be copied: not wrapped


def test_summary_on_a_terminal_and_with_holes() -> None:
    stream = Terminal()
    print_summary(SUMMARY, Console(file=stream, force_terminal=True, width=80))
    assert "\x1b[" in stream.getvalue()
    stream = Terminal()
    print_summary(SUMMARY, Console(file=stream, force_terminal=True, color_system=None, width=60))
    table = stream.getvalue().splitlines()[3:8]
    assert table[0].split() == ["T", "1", "95", "%", "interval", "greedy", "tools", "n"]
    assert table[2].split()[:5] == ["student", "before", "0.14", "0.10", "to"]
    assert not any("\u2026" in line for line in table)  # no cell was cut short
    assert all(len(line) <= 60 for line in table)
    stream = io.StringIO()
    print_summary({**SUMMARY, "teacher": None}, Console(file=stream))  # evaluation.teacher=false
    assert "teacher" not in stream.getvalue().replace("(teacher -)", "")
    for holes in ({}, {"before": None, "after": {"success": None}, "steps": "x", "seconds": "y"}):
        print_summary(holes, Console(file=io.StringIO()))


# --- plots -----------------------------------------------------------------------------------


def write_run(path: Path, steps: int, every: int, *, switch: int = 4) -> None:
    rng = np.random.default_rng(6)
    with RunFolder(path).lock() as folder, MetricsWriter(folder.metrics) as writer:
        for step in range(steps + 1):
            if every and step % every == 0:
                episodes = [episode(rng, success=bool(rng.random() < 0.5)) for _ in range(20)]
                for who, sampling in (("student", "sampled"), ("student", "greedy")):
                    row = evaluation_statistics(episodes)
                    writer.write(evaluation(step) | {"who": who, "sampling": sampling} | row)
                if step == 0:
                    writer.write(evaluation(0) | {"who": "teacher"} | row)
            if step == steps:
                break
            episodes = [episode(rng, success=bool(rng.random() < 0.5)) for _ in range(4)]
            row = distillation_statistics(episodes, floor=FLOOR, threshold=1.0)
            phase = "exploration" if step < switch else "refinement"
            row |= {"phase": phase, "mask/kept_share": row[f"mask/{phase}_share"]}
            row |= rollout_statistics(episodes) | {"ratio/ppo_clip_share": 0.0}
            row |= {"time/generate": 0.5, "time/teacher": 0.1, "time/update": 0.4}
            writer.write(train(step, **row))


NAMES = ["success.png", "reward_histogram.png", "entropy_and_masks.png", "time.png"]


@pytest.mark.parametrize(("steps", "every"), [(12, 4), (1, 0), (2, 1), (0, 1)])
def test_plots_exist_and_are_not_blank(tmp_path: Path, steps: int, every: int) -> None:
    write_run(tmp_path, steps, every)
    settings = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    paths = make_plots(tmp_path)
    assert [p.name for p in paths] == (NAMES if steps else NAMES[:1])
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width >= 1000
            assert picture.height >= 600
            grey = np.asarray(picture.convert("L"))
        assert len(np.unique(grey)) > 50
        assert 0.005 < float((grey < 250).mean()) < 0.9
    assert dict(matplotlib.rcParams) == settings
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_plots_cope_with_missing_keys_and_nulls(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        train(0, **{"rollout/success": None, "reward/mean": None, "entropy/mean": 0.5}),
        train(1, **{"rollout/success": 0.5, "time/update": 1.0, "entropy/percentiles": None}),
        train(2, **{"reward/histogram": {"edges": [0, 1], "counts": [0]}, "reward/mean": 1.0}),
        train(3, **{"reward/abs_by_entropy_decile": [None, 1.0]}),
        evaluation(1, success=None),
        evaluation(2, success=0.5),
        {"kind": "eval", "success": 0.4, "who": "teacher", "sampling": "sampled"},
    ]
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        for row in rows:
            lines.write(row)
    assert [p.name for p in make_plots(tmp_path)] == NAMES


def test_plots_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert plots_main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""
    write_run(tmp_path, 2, 1)
    assert plots_main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "plots" / n) for n in NAMES]
    assert plots_main([str(tmp_path / "absent")]) == 1
    assert "there is no file" in capsys.readouterr().err


def test_history_windows_switch_and_repeated_steps() -> None:
    histogram = {"edges": [0.0, 1.0, 2.0], "counts": [1, 2]}
    rows = [
        train(s, phase="exploration" if s < 7 else "refinement", h=histogram, x=s)
        for s in range(20)
    ]
    rows.append(train(3, phase="exploration", x=99, h=histogram))  # the last of a step counts
    history = History(rows)
    assert history.switch_step == 7
    assert history.last_step == 20
    assert history.series("x")[1].tolist() == [0, 1, 2, 99, *range(4, 20)]
    (first, start_rows), (last, end_rows) = history.windows("h")
    assert (first, last) == ("steps 0 to 1", "steps 18 to 19")
    assert History.histogram(start_rows, "h")[1].tolist() == [2, 4]
    end_rows[0]["h"] = {"edges": [0.0, 5.0], "counts": [9]}  # other bins: cannot be added
    assert History.histogram(end_rows, "h")[1].tolist() == [1, 2]
    assert History([train(0, phase="refinement")]).switch_step is None
