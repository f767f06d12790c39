"""The example shop, installed in a separate folder and used from other processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_plugin import answer_of, install, start


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("shop"), "reopold_shop")


Turn = "tuple[str, Any] | str"
PUT, DEAR, OTHER, BUY = ("put", "right"), ("put", "dear"), ("put", "other"), ("buy", None)
BAD: list[Turn] = [BUY, ("look", 7), ("put", 0), ("take", "right"), PUT, PUT, ("search", "shoe")]
BAD += [("look", "a"), ("lok", 1)]

EPISODES: dict[str, tuple[int, list[Turn]]] = {
    "right": (8, [("search", "kind"), ("look", "right"), PUT, BUY]),
    "too dear": (8, [DEAR, BUY]),
    "another": (8, [OTHER, BUY]),
    "too many": (8, [PUT, OTHER, BUY]),
    "twice the right look": (8, [PUT, DEAR, BUY]),
    "corrected": (8, [OTHER, ("take", "other"), PUT, BUY]),
    "answered": (8, [PUT, "I would take this one."]),
    "truncated": (2, [PUT, ("look", "right")]),
    "truncated with another": (2, [OTHER, ("look", "right")]),
    "truncated without": (1, [("search", "kind")]),
    "in the last turn": (2, [PUT, BUY]),
    "bad calls": (20, [*BAD, BUY]),
}
"""Turns allowed, and turns: a tool and its argument (an item's role, or as it is), or a text."""

PLAY = """
    import json, gymnasium
    from reopold_agent.envs import load_env
    from reopold_shop.tasks import draw

    def role_of(item, asked, budget):
        if item["price"] <= budget:
            return "right" if asked.items() <= item.items() else "other"
        return "dear" if asked.items() <= item.items() else None

    def text_of(turn, arguments):
        if isinstance(turn, str):
            return turn
        name, value = turn
        key = "kind" if name == "search" else "item"
        given = {} if value is None else {key: arguments.get(value, value)}
        return f"<tool_call>{json.dumps({'name': name, 'arguments': given})}</tool_call>"

    out = {}
    for name, (max_turns, turns) in json.loads(EPISODES).items():
        settings = {"max_turns": max_turns, "tool_isolation": ISOLATION}
        env = gymnasium.make(load_env("shop").id, disable_env_checker=True, **settings)
        env.reset(options={"split": "eval", "index": 3})
        task = env.unwrapped.task("eval", 3)
        asked, budget = task.metadata["asked"], task.metadata["budget"]
        arguments = {"kind": asked["kind"]}
        for number, item in enumerate(task.metadata["stock"], 1):
            arguments[role_of(item, asked, budget)] = number
        steps = []
        for turn in turns:
            observation, reward, terminated, truncated, info = env.step(text_of(turn, arguments))
            call = info["tool_call"]
            seen = None
            for item in task.metadata["stock"]:
                if any(draw(item).tobytes() == shown.tobytes() for shown in observation["images"]):
                    seen = asked.items() <= item.items()
            steps.append({
                "text": observation["text"], "reward": reward, "terminated": terminated,
                "truncated": truncated, "success": info.get("success"),
                "ok": call and call.ok, "seen": seen,
            })
        assert env.unwrapped.episode is None
        out[name] = steps
    runners = set(map(type, env.unwrapped._runners.values()))
    print(json.dumps([out, arguments, [each.__name__ for each in runners]]))
"""


def play(site: Path, cwd: Path, isolation: str = "none") -> Any:
    code = PLAY.replace("EPISODES", repr(json.dumps(EPISODES))).replace(
        "ISOLATION", repr(isolation)
    )
    return answer_of(code, site, cwd=cwd)


@pytest.fixture(scope="module")
def played(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return play(shop, tmp_path_factory.mktemp("played"))


@pytest.mark.parametrize(
    ("episode", "reward", "success", "truncated"),
    [
        ("right", 0.99, True, False),
        ("too dear", 0.0, False, False),
        ("another", 0.0, False, False),
        ("too many", 0.0, False, False),
        ("twice the right look", 0.0, False, False),
        ("corrected", 1.0, True, False),
        ("answered", 0.0, False, False),
        ("truncated", 0.19, False, True),
        ("truncated with another", -0.01, False, True),
        ("truncated without", 0.0, False, True),
        ("in the last turn", 1.0, True, False),
        ("bad calls", 1.0, True, False),
    ],
)
def test_what_was_bought_decides(
    played: Any, episode: str, reward: float, success: bool, truncated: bool
) -> None:
    *before, last = played[0][episode]
    assert not any(step["terminated"] or step["truncated"] for step in before)
    assert (last["terminated"], last["truncated"]) == (not truncated, truncated)
    assert last["success"] is success
    assert sum(step["reward"] for step in [*before, last]) == pytest.approx(reward)


def test_what_the_student_sees(played: Any) -> None:
    episodes, numbers, _ = played
    found, seen, put, bought = episodes["right"]
    right, other = numbers["right"], numbers["other"]
    assert f"item {right}, " in found["text"]
    assert f"item {numbers['dear']}, " in found["text"]
    assert seen["text"].startswith(f"Item {right}:\n")
    assert [step["seen"] for step in episodes["right"]] == [None, True, None, None]
    assert put["text"] == f"In the cart: [{right}]."
    assert bought["text"] == f"You have bought: [{right}]."
    carts = [step["text"] for step in episodes["corrected"][:3]]
    assert carts == [f"In the cart: {cart}." for cart in ([other], [], [right])]


def test_bad_calls_are_explained_and_change_nothing(played: Any) -> None:
    episodes, numbers, _ = played
    steps, right = episodes["bad calls"], numbers["right"]
    heard = [step["text"].removeprefix("Execution error:\n") for step in steps if not step["ok"]]
    assert heard == [
        "The cart is empty.",
        "There is no item 7; the items are numbered 1 to 6.",
        "There is no item 0; the items are numbered 1 to 6.",
        f"Item {right} is not in the cart.",
        f"Item {right} is in the cart already.",
        '\'kind\' must be one of "ball", "box", "tent", got "shoe".',
        "'item' must be an integer, got \"a\".",
        "There is no tool 'lok'. Tools: search, look, put, take, buy.",
    ]


def test_its_tools_run_in_worker_processes(shop: Path, played: Any, tmp_path: Path) -> None:
    for isolation in ("plugins", "process"):
        assert play(shop, tmp_path, isolation) == [*played[:2], ["ToolProcesses"]]


def test_its_tasks(shop: Path, tmp_path: Path) -> None:
    code = """
        import gymnasium, json
        from gymnasium.utils.env_checker import check_env
        from reopold_agent.envs import ENVS, load_env
        from reopold_agent.tools import TOOLS
        env = gymnasium.make(load_env("shop").id, render_mode="rgb_array").unwrapped
        check_env(env)
        tasks = [[env.task(split, n) for n in range(300)] for split in ("train", "eval")]
        asked = [[tuple(task.metadata["asked"].values()) for task in part] for part in tasks]
        fits = [
            sum(task.metadata["asked"].items() <= item.items()
                and item["price"] <= task.metadata["budget"] for item in task.metadata["stock"])
            for part in tasks for task in part
        ]
        looks = [sorted(set(part)) for part in asked]
        print(json.dumps([looks, sorted(set(fits)), ENVS.names(), TOOLS.names()]))
    """
    (train, held_out), fits, envs, tools = answer_of(code, shop, cwd=tmp_path)
    assert (len(train), len(held_out)) == (28, 8)
    assert not {tuple(look) for look in train} & {tuple(look) for look in held_out}
    for values in zip(*held_out, strict=True):  # nothing new but its combination
        assert len(set(values)) in (3, 4)
    assert fits == [1]
    assert envs == ["geometry", "math", "pixel_reasoner", "shop"]
    assert tools == ["crop_image", "select_frames"]  # its own are known to no other environment


@pytest.mark.slow
def test_it_is_trained_and_evaluated_by_the_commands(shop: Path, tmp_path: Path) -> None:
    small = ["batch.prompts=4", "batch.mini_batch=4", "evaluation.tasks=3", "evaluation.every=0"]
    train = ["-m", "reopold_agent.train", "env=shop", "steps=2", *small, "hydra.run.dir=run"]
    done = start(*train, path=[shop], cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    assert len(steps) == 2
    lines = (tmp_path / "run/trajectories.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert "Buy a " in row["prompt"]
        assert '"name": "search"' in row["prompt"]
        assert row["success"] is False  # nothing bought
    evaluate = ["-m", "reopold_agent.evaluate", "env=shop", "model=run", "evaluation.tasks=2"]
    done = start(*evaluate, "samples=2", "hydra.run.dir=out", path=[shop], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/results.json").read_text())["benchmarks"]["shop"]
    assert (found["questions"], found["samples"], found["accuracy"]) == (2, 2, 0.0)
    assert found["budget"] == {"max_turns": 8, "max_tokens": 640}
    assert (tmp_path / "out/report.html").exists()
