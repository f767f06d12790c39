"""Environments whose verdict comes from what the tools did, not from the last answer's text."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from PIL import Image
from running import composed
from test_envs import call
from test_rollout import ScriptedPolicy, specs

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.envs import from_config
from reopold_agent.envs.base import ToolEnv, take_turn
from reopold_agent.errors import ConfigError, EnvironmentCodeError, ToolResultError
from reopold_agent.judges import Judge, Verdict
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import EpisodeSpec, RolloutLimits, RolloutRunner
from reopold_agent.tools import EpisodeState, Isolation, Tool, ToolResult
from reopold_agent.types import IMAGE_MARK, Sampling, StopReason, Task, TaskSource, Trajectory

PIXELS = PixelLimits(56 * 56, 56 * 56)


def step_on(state: EpisodeState, by: int) -> ToolResult:
    """Moves by so many fields; the goal is at 3."""
    state.extra["at"] += by
    won = state.extra["at"] == 3
    return ToolResult(f"You are at {state.extra['at']}.", done=won, reward=1.0 if won else -0.1)


def stop_here(state: EpisodeState) -> ToolResult:
    """Ends the game and leaves the verdict to the environment."""
    return ToolResult("You stop.", done=True)


TOOLS_OF_WALK = [Tool("move", step_on, "Moves."), Tool("stop", stop_here, "Stops.")]


class Walk(ToolEnv):
    """A walk on a line from 0 to 3."""

    default_guideline: ClassVar[str] = ""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"tools": TOOLS_OF_WALK, **settings})

    def load_tasks(self, split: str, **source: Any) -> TaskSource:
        return [Task("walk", "Walk to 3.", ("3",))]

    def begin(self, task: Task, state: EpisodeState) -> None:
        state.extra["at"] = 0

    def reward(self, task: Task, answer: str, state: EpisodeState) -> tuple[float, bool]:
        near = state.extra["at"] == 2
        return 0.5, near

    def truncation_reward(self, task: Task, state: EpisodeState) -> tuple[float, bool]:
        return -float(state.extra["at"]), state.extra["at"] == 1


class Quiz(ToolEnv):
    """Any answer is right."""

    def load_tasks(self, split: str) -> TaskSource:
        return [Task("quiz", "What?", ("3",))]

    def reward(self, task: Task, answer: str) -> tuple[float, bool]:
        return 1.0, True


class StrictQuiz(Quiz):
    """Unless it is cut."""

    def truncation_reward(self, task: Task, state: EpisodeState) -> tuple[float, bool]:
        return -1.0, False


def walk(**settings: Any) -> Walk:
    env = Walk(**settings)
    env.reset(seed=0)
    return env


def move(by: int) -> str:
    return call("move", {"by": by})


def test_a_tool_gives_rewards_and_ends_the_episode() -> None:
    env = walk()
    observation, reward, terminated, truncated, info = env.step(move(1))
    assert (observation["text"], reward, terminated, truncated) == (
        "You are at 1.",
        -0.1,
        False,
        False,
    )
    observation, reward, terminated, truncated, info = env.step(move(2))
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["success"], info["answer"], info["tool_call"].ok) == (True, None, True)
    assert observation["text"] == "You are at 3."  # viewers show the end
    assert env.episode is None


def test_the_winning_call_in_the_last_turn_counts() -> None:
    assert walk(max_turns=1).step(move(3))[1:4] == (1.0, True, False)


@pytest.mark.parametrize(("at", "success"), [(2, True), (1, False)])
@pytest.mark.parametrize("last", [call("stop"), "I am done."])
def test_the_state_decides_whether_a_tool_or_an_answer_ended_it(
    at: int, success: bool, last: str
) -> None:
    env = walk()
    env.step(move(at))
    _, reward, terminated, _, info = env.step(last)
    assert (reward, terminated, info["success"]) == (0.5, True, success)


@pytest.mark.parametrize("given", [True, False])
def test_the_tools_own_verdict_comes_first(given: bool) -> None:
    def end(state: EpisodeState) -> ToolResult:
        return ToolResult("over", done=True, reward=-1.0, success=given)

    env = walk(tools=[Tool("end", end, "Ends.")])
    _, reward, terminated, _, info = env.step(call("end"))
    assert (reward, terminated, info["success"]) == (-1.0, True, given)


@pytest.mark.parametrize(
    ("settings", "turns"),
    [
        ({"max_turns": 2}, [move(1), call("nothing")]),
        ({"max_turns": 2}, [move(1), "<tool_call>"]),
        ({"max_response_tokens": 12, "count_tokens": lambda t: t.count(" ")}, [move(1), " " * 20]),
    ],
)
def test_the_hook_at_truncation(settings: dict[str, Any], turns: list[str]) -> None:
    env = walk(**settings)
    for turn in turns:
        _, reward, terminated, truncated, info = env.step(turn)
    assert (reward, terminated, truncated, info["success"]) == (-1.0, False, True, True)


def test_the_last_steps_reward_and_the_truncations_are_added() -> None:
    env = walk(max_turns=1)
    _, reward, _, truncated, info = env.step(move(2))
    assert (reward, truncated, info["success"]) == (-0.1 - 2.0, True, False)


def test_rewards_with_two_arguments_keep_working() -> None:
    class Old(Walk):
        def reward(self, task: Task, answer: str) -> tuple[float, bool]:  # type: ignore[override]
            graded, right = super(Walk, self).reward(task, answer)  # as it was called before
            return 2 * graded, right

    env = Old()
    env.reset(seed=0)
    assert env.step("\\boxed{3}")[1:3] == (2.0, True)


@pytest.mark.parametrize(
    "given",
    [
        1.0,
        (float("nan"), True),
        ("x", True),
        None,
        ("0.5", True),
        (0.0, {"why": "wrong"}),
        (1.0, "False"),
        (1.0, None),
        (1.0, 0.5),
        (1.0, np.array([False, False])),
    ],
)
def test_a_verdict_that_is_none_is_the_developers_error(given: Any) -> None:
    class Wrong(Walk):
        def reward(self, task: Task, answer: str, state: EpisodeState) -> Any:
            return given

    env = Wrong()
    env.reset(seed=0)
    told = r"^Wrong\.reward returned .*, not a reward and a success\.\nReturn two values, a finite "
    with pytest.raises(EnvironmentCodeError, match=told):
        env.step("done")


@pytest.mark.parametrize("success", [0, False, 0.0, np.bool_(False), np.int64(0), np.float32(0)])
def test_a_success_is_a_boolean_or_the_number_0_or_1(success: Any) -> None:
    class Graded(Walk):
        def reward(self, task: Task, answer: str, state: EpisodeState) -> Any:
            return np.float32(0.5), (success if answer == "no" else 1 - int(success))

    for answer in ("no", "yes"):
        env = Graded()
        env.reset(seed=0)
        _, reward, _, _, info = env.step(answer)
        assert reward == 0.5
        assert info["success"] is (answer == "yes")


@pytest.mark.parametrize("answers", [(), ("",), (" ", "\n")])
def test_forgotten_answers_are_refused_where_the_rules_decide(answers: tuple[str, ...]) -> None:
    class Forgot(ToolEnv):
        def load_tasks(self, split: str) -> list[Task]:
            return [Task(f"{split}-1", "1+1", answers)]

    told = (
        r"^task 'train-1' of \w+ has no accepted answers, .*\nGive Task\(id, question, answers\) "
        r"some, or define \w+\.reward\("
    )
    with pytest.raises(EnvironmentCodeError, match=told):
        Forgot().task("train", 0)
    with pytest.raises(EnvironmentCodeError, match=told):
        Forgot().reset(options={"index": 0})

    def end(state: EpisodeState) -> ToolResult:
        return ToolResult("over", done=True, reward=1.0)

    env = Forgot(tools=[Tool("end", end, "Ends.")])  # the tool decides
    env.reset(options={"index": 0})
    assert env.step(call("end"))[1] == 1.0
    env.reset(options={"index": 0})
    with pytest.raises(EnvironmentCodeError, match=told):
        env.step("2")

    class Own(Forgot):
        def reward(self, task: Task, answer: str) -> tuple[float, bool]:  # type: ignore[override]
            return float(answer == "2"), answer == "2"

    own = Own()
    own.reset(options={"index": 0})
    assert own.step("2")[1] == 1.0
    rated = Forgot(judge=Judge("brief", lambda response, given: Verdict(True, response)))
    rated.reset(options={"index": 0})
    assert rated.step("2")[1] == 1.0


@pytest.mark.parametrize(
    "values",
    [
        {"reward": float("nan")},
        {"reward": "1"},
        {"success": True},
        {"success": True, "reward": 1.0},
        {"success": True, "done": True},
        {"success": {"why": "wrong"}, "done": True, "reward": 1.0},
        {"success": "False", "done": True, "reward": 1.0},
    ],
)
def test_impossible_results_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ToolResultError):
        ToolResult("text", **values)


def test_more_pictures_than_can_be_shown_do_not_undo_the_end() -> None:
    def many(state: EpisodeState) -> ToolResult:
        return ToolResult(IMAGE_MARK * 3, (Image.new("RGB", (9, 9)),) * 3, done=True, reward=1)

    env = walk(tools=[Tool("many", many, "Shows.")], max_pictures=2)
    observation, reward, terminated, _, info = env.step(call("many"))
    assert (reward, terminated, info["success"]) == (1.0, True, True)
    assert observation["images"] == ()


def test_a_tool_in_a_worker_process_ends_the_episode_too() -> None:
    env = walk(tool_isolation=Isolation(mode="process"))
    assert env.step(move(1))[1:4] == (-0.1, False, False)
    _, reward, terminated, _, info = env.step(move(2))
    assert (reward, terminated, info["success"]) == (1.0, True, True)


@pytest.mark.parametrize("kind", ["static", "class", "keyword", "default", "other default"])
def test_the_state_is_given_however_reward_takes_it(kind: str) -> None:
    class Static(Walk):
        @staticmethod
        def reward(task: Task, answer: str, state: EpisodeState) -> tuple[float, bool]:  # type: ignore[override]
            return 0.5, state.extra["at"] == 2

    class OfClass(Walk):
        @classmethod
        def reward(cls, task: Task, answer: str, state: EpisodeState) -> tuple[float, bool]:  # type: ignore[override]
            return 0.5, state.extra["at"] == 2

    class Keyword(Walk):
        def reward(self, task: Task, answer: str, *, state: Any = None) -> tuple[float, bool]:  # type: ignore[override]
            return 0.5, state.extra["at"] == 2

    class Default(Walk):
        def reward(self, task: Task, answer: str, state: Any = None) -> tuple[float, bool]:
            return 0.5, state.extra["at"] == 2

    class Other(Walk):
        def reward(self, task: Task, answer: str, strict: bool = False) -> tuple[float, bool]:  # type: ignore[override]
            return 0.5, strict is False

    kinds = {
        "static": Static,
        "class": OfClass,
        "keyword": Keyword,
        "default": Default,
        "other default": Other,
    }
    env = kinds[kind]()
    env.reset(seed=0)
    env.step(move(2))
    assert env.step("done")[4]["success"]


def test_a_reward_that_needs_more_is_refused_when_the_environment_is_made() -> None:
    class Needs(Walk):
        def reward(self, task: Task, answer: str, state: Any, more: Any) -> tuple[float, bool]:  # type: ignore[override]
            return 0.0, False

    with pytest.raises(ConfigError, match=r"missing a required argument: 'more'\.\nDefine it as"):
        Needs()


def test_what_a_tool_does_after_its_time_does_not_count() -> None:
    def late(state: EpisodeState) -> ToolResult:
        state.extra["begun"] = True
        time.sleep(0.6)
        state.extra["late"] = True
        return ToolResult("too late")

    env = walk(tools=[Tool("late", late, "Is late.", timeout_s=0.2)])
    observation = env.step(call("late"))[0]
    assert "did not finish within 0.2 seconds" in observation["text"]
    time.sleep(0.8)
    assert env.episode is not None
    assert env.episode.extra == {"at": 0, "begun": True}


def test_a_time_limit_around_the_environment_asks_the_hook() -> None:
    limited = TimeLimit(Walk(), 1)
    limited.reset(seed=0)
    _, reward, terminated, truncated, info = take_turn(limited, move(1))
    assert (terminated, truncated, info["success"]) == (False, True, True)
    assert reward == pytest.approx(-1.1)
    limited.reset(seed=0)
    assert take_turn(limited, move(3))[1:4] == (1.0, True, True)  # it ended by itself


# In a rollout: code that is wrong, and budgets that the environment does not know


class Faulty(Quiz):
    """Its second task is as a test says."""

    def __init__(self, **settings: Any) -> None:
        self.given = settings.pop("given", {})
        super().__init__(**settings)

    def load_tasks(self, split: str) -> Any:
        return [Task("right", "What?", ("3",)), Task(**{**WHOLE, **self.given})]

    def reward(self, task: Task, answer: str) -> Any:
        return 1.0 if task.id == "number" else super(Quiz, self).reward(task, answer)


@dataclass(frozen=True)
class Pixels:
    def open(self) -> Any:
        return np.zeros((40, 40, 3), np.uint8)


WHOLE = {"id": "wrong", "question": "What?", "answers": ("3",)}
FAULTS = [
    (
        {"answers": 12},
        r"^the answers of task 'wrong' of Faulty are 12, .*\nWrite answers=\('12',\)",
    ),
    ({"answers": "12"}, r"^the answers of .* are '12', not .*\nWrite answers=\('12',\)"),
    ({"answers": [1, 2]}, r"^the answers .* are \[1, 2\], .*\nWrite answers=\('1', '2',\)"),
    ({"images": (Pixels(),)}, r"^open\(\) .* 'wrong' of Faulty .* type ndarray\.\nReturn a PIL"),
    ({"images": ("a.png",)}, r"^the images of .* are \('a\.png',\)\.\nGive a tuple of objects"),
    ({"question": None}, r"^the question of task 'wrong' of Faulty is None\.\nGive a string"),
    ({"metadata": None}, r"^the metadata .* None\.\nGive a dict"),
    ({"metadata": {"system_message": 3}}, r"^metadata\['system_message'\] .*\nGive a string"),
    ({"id": "number"}, r"^Faulty\.reward returned 1\.0, not a reward .*\nReturn two values"),
]


@pytest.mark.parametrize(("given", "told"), FAULTS)
def test_wrong_code_ends_a_run_at_its_first_episode_and_later_only_its_own(
    chat: ChatRenderer,
    say: Callable[..., list[int]],
    given: dict[str, Any],
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = RolloutRunner(
        lambda: Faulty(given=given),
        chat,
        None,
        prompt_pixels=PIXELS,
        observation_pixels=PIXELS,
        limits=RolloutLimits(concurrency=1),
    )
    policy = ScriptedPolicy(lambda request, turn: say("3"))
    wrong, right = EpisodeSpec("train", 1), EpisodeSpec("train", 0)
    with pytest.raises(EnvironmentCodeError, match=told):
        runner.run(policy, [wrong, right], Sampling(), (1,))
    played = runner.run(policy, [right, wrong], Sampling(), (1,))
    assert [each.stop_reason for each in played] == [StopReason.ANSWER, StopReason.ENV_ERROR]
    assert re.match(told, played[1].info["error"])
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("returned", [(i for i in "ab"), None, {"a": 1}, "tasks", {1, 2}])
def test_tasks_that_are_no_sequence_are_refused(returned: Any) -> None:
    class Streamed(ToolEnv):
        def load_tasks(self, split: str) -> Any:
            return returned

    told = r"^Streamed\.load_tasks\('eval'\) returned .*, not a sequence of tasks\.\nReturn a list"
    with pytest.raises(EnvironmentCodeError, match=told):
        Streamed().num_tasks("eval")


def test_what_is_no_task_is_refused() -> None:
    class Rows(ToolEnv):
        def load_tasks(self, split: str) -> Any:
            return [{"question": "What?"}]

    with pytest.raises(
        EnvironmentCodeError, match=r"^Rows gives a value of type dict as a task\.\n"
    ):
        Rows().reset(seed=0)


@pytest.mark.parametrize(("given", "told"), FAULTS[:-1])
def test_the_first_task_is_looked_at_before_a_run(
    given: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class First(Faulty):
        def load_tasks(self, split: str) -> Any:
            return super().load_tasks(split)[1:]

    First.__name__ = "Faulty"
    monkeypatch.setattr(from_config, "make_env", lambda config: First(given=given))
    with pytest.raises(EnvironmentCodeError, match=told):
        from_config.checked_tasks(composed("env=math")[0], tmp_path / "report.json")


@pytest.mark.parametrize(
    ("limits", "stop"),
    [
        ({"max_turns": 1}, StopReason.MAX_TURNS),
        ({"max_response_tokens": 40}, StopReason.MAX_TOKENS),
    ],
)
def test_the_hook_runs_when_the_rollout_ends_an_episode(
    chat: ChatRenderer,
    say: Callable[..., list[int]],
    limits: dict[str, Any],
    stop: StopReason,
) -> None:
    policy = ScriptedPolicy(lambda request, turn: say(move(1)))
    runner = RolloutRunner(
        lambda: Walk(max_turns=9),
        chat,
        None,
        prompt_pixels=PIXELS,
        observation_pixels=PIXELS,
        limits=RolloutLimits(**limits),
    )
    (trajectory,) = runner.run(policy, specs(1), Sampling(), (1,))
    moved = sum(call.ok for call in trajectory.tool_calls)
    assert trajectory.stop_reason is stop
    assert trajectory.reward == pytest.approx(-0.1 * moved - moved)
    assert trajectory.success is (moved == 1)


@pytest.mark.parametrize("limits", [{"max_turn_tokens": 8}, {"max_response_tokens": 8}])
@pytest.mark.parametrize(("env", "expected"), [(Quiz, (1.0, True)), (StrictQuiz, (-1.0, False))])
def test_a_cut_turn_is_graded_unless_the_environment_has_the_hook(
    chat: ChatRenderer,
    say: Callable[..., list[int]],
    limits: dict[str, Any],
    env: type[Quiz],
    expected: tuple[float, bool],
) -> None:
    def played(words: str) -> Trajectory:
        policy = ScriptedPolicy(lambda request, turn: say(words))
        pixels = {"prompt_pixels": PIXELS, "observation_pixels": PIXELS}
        runner = RolloutRunner(env, chat, None, **pixels, limits=RolloutLimits(**limits))
        return runner.run(policy, specs(1), Sampling(), (1,))[0]

    cut = played("three " * 20)
    assert cut.stop_reason is StopReason.MAX_TOKENS
    assert (cut.reward, cut.success) == expected
    whole = played("three")
    assert whole.stop_reason is StopReason.ANSWER
    assert (whole.reward, whole.success) == (1.0, True)


def test_a_cut_call_is_a_bad_call_and_the_episode_goes_on() -> None:
    env = walk()
    assert take_turn(env, move(1)[:20], "length")[2:4] == (False, False)
    terminated, truncated, info = take_turn(env, "I am at", "length")[2:]
    assert (terminated, truncated, info["success"], info["answer"]) == (False, True, False, None)
    assert info["cut_short"]
    env.reset(seed=0)
    assert take_turn(env, "I am at 0")[1:4] == (0.5, True, False)


def test_a_trajectory_sums_rewards_and_keeps_the_end(
    chat: ChatRenderer, say: Callable[..., list[int]]
) -> None:
    policy = ScriptedPolicy(lambda request, turn: say(move(1)))
    runner = RolloutRunner(
        Walk, chat, None, prompt_pixels=PIXELS, observation_pixels=PIXELS, limits=RolloutLimits()
    )
    (trajectory,) = runner.run(policy, specs(1), Sampling(), (1,))
    assert trajectory.stop_reason is StopReason.ANSWER
    assert trajectory.reward == pytest.approx(0.8)
    assert trajectory.success
    assert trajectory.turns[-1].observation == "You are at 3."
    assert np.all(trajectory.loss_mask[trajectory.turns[-1].start :])  # the end is not rendered
