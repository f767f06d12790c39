"""Rollouts: scripted environments with a scripted policy, and with the real one."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import pytest
from conftest import random_picture
from test_chat import whole_conversation

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.errors import EnvironmentCodeError
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer, observation_message
from reopold_agent.rollout.runner import EpisodeSpec, RolloutLimits, RolloutRunner
from reopold_agent.rollout.workers import Worker
from reopold_agent.types import (
    IMAGE_MARK,
    Completion,
    EncodedImage,
    Message,
    Observation,
    Request,
    Sampling,
    StopReason,
    ToolCall,
    Trajectory,
)

T1 = Sampling()
PROMPT_PIXELS = PixelLimits(112 * 112, 112 * 112)
OBSERVATION_PIXELS = PixelLimits(56 * 56, 56 * 56)
SYSTEM = "You are a helpful assistant."


@dataclass
class Behaviour:
    """What the scripted environment does; functions of (task index, turn)."""

    turns: Callable[[int], int] = lambda index: 2
    images: Callable[[int, int], int] = lambda index, turn: 1
    before: Callable[[int, int], None] = lambda index, turn: None
    ending: Callable[[int], dict[str, Any]] = lambda index: {"terminated": True}
    change: Callable[[int, int, Observation], Any] = lambda index, turn, observation: observation


class StoryEnv(gymnasium.Env[Any, str]):
    """Shows pictures for some turns and then ends; keeps a record of all it was told."""

    def __init__(self, behaviour: Behaviour, record: list[Any]) -> None:
        self.behaviour, self.record = behaviour, record
        self.closed = False
        record.append(("made", self))

    def _observe(self, text: str) -> Any:
        count = self.behaviour.images(self.index, self.turn)
        images = tuple(
            random_picture(int(self.np_random.integers(1000)), 60 + 7 * i, 90) for i in range(count)
        )
        observation: Observation = {"text": IMAGE_MARK * count + text, "images": images}
        return self.behaviour.change(self.index, self.turn, observation)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.index, self.turn = options["index"], 0
        self.record.append(("reset", seed, dict(options)))
        self.behaviour.before(self.index, 0)
        info = {"task_id": f"story-{self.index}", "system_prompt": SYSTEM}
        return self._observe(f"\nWhat is in picture {self.index}?\n\nGuidelines:"), info

    def step(self, action: str) -> Any:
        self.turn += 1
        self.record.append(("step", self.index, action))
        self.behaviour.before(self.index, self.turn)
        call = ToolCall("look", {"turn": self.turn}, ok=True)
        if self.turn < self.behaviour.turns(self.index):
            info = {"tool_call": call}
            return self._observe(f"Here, after {action!r}:\n"), 0.25, False, False, info
        end = {"terminated": False, "truncated": False, "info": {}}
        end |= self.behaviour.ending(self.index)
        last: Observation = {"text": "", "images": ()}
        return last, 1.0, end["terminated"], end["truncated"], end["info"]

    def close(self) -> None:
        self.closed = True


@dataclass
class ScriptedPolicy:
    """Says what ``script(request, turn)`` gives, one token a step; checks how it is used."""

    script: Callable[[Request, int], Sequence[int]]
    requests: list[Request] = field(default_factory=list)
    most_in_flight: int = 0
    sessions: list[ScriptedGenerator] = field(default_factory=list)

    def generator(self, sampling: Sampling) -> ScriptedGenerator:
        self.sessions.append(ScriptedGenerator(self))
        return self.sessions[-1]


class ScriptedGenerator:
    def __init__(self, policy: ScriptedPolicy) -> None:
        self.policy = policy
        self.known: dict[int, list[int]] = {}
        self.turns: dict[int, int] = {}
        self.flying: dict[int, tuple[list[int], int, str]] = {}

    @property
    def in_flight(self) -> int:
        return len(self.flying)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            known, ids = self.known.get(request.key, []), list(request.ids)
            assert request.key not in self.flying
            assert ids[: len(known)] == known
            assert len(ids) > len(known)
            assert request.max_tokens >= 1
            frozen = Request(
                request.key,
                ids,
                list(request.images),
                request.max_tokens,
                request.seed,
                request.stop_ids,
            )
            self.policy.requests.append(frozen)
            turn = self.turns.get(request.key, 0)
            said = list(self.policy.script(frozen, turn))
            finish = "stop" if len(said) <= request.max_tokens else "length"
            self.flying[request.key] = (said[: request.max_tokens], 0, finish)
            self.known[request.key], self.turns[request.key] = ids, turn + 1
        self.policy.most_in_flight = max(self.policy.most_in_flight, len(self.flying))

    def step(self) -> list[Completion]:
        done = []
        for key, (said, count, finish) in list(self.flying.items()):
            if count < len(said):
                self.flying[key] = (said, count + 1, finish)
                continue
            del self.flying[key]
            self.known[key] = self.known[key] + said
            logp = tuple(-(i + 1) / 8 for i in range(len(said)))
            entropy = tuple((i + 1) / 4 for i in range(len(said)))
            done.append(Completion(key, tuple(said), logp, entropy, finish))  # type: ignore[arg-type]
        return done

    def release(self, key: int) -> None:
        del self.known[key], self.turns[key]


@pytest.fixture
def record() -> list[Any]:
    return []


@pytest.fixture
def make_runner(
    chat: ChatRenderer, vision: VisionProcessor, record: list[Any]
) -> Callable[..., RolloutRunner]:
    def make(behaviour: Behaviour | None = None, **limits: Any) -> RolloutRunner:
        return RolloutRunner(
            lambda: StoryEnv(behaviour or Behaviour(), record),
            chat,
            vision,
            prompt_pixels=PROMPT_PIXELS,
            observation_pixels=OBSERVATION_PIXELS,
            limits=RolloutLimits(**limits),
        )

    return make


@pytest.fixture
def scripted(say: Callable[..., list[int]]) -> ScriptedPolicy:
    """Answers of different lengths; every other one without an end of turn."""
    return ScriptedPolicy(
        lambda request, turn: say(
            f"Turn {turn} of {request.key}: " + "x7 " * (request.key % 5),
            end=(request.key + turn) % 2 == 0,
        )
    )


def specs(count: int, samples: int = 1, split: str = "train") -> list[EpisodeSpec]:
    return [EpisodeSpec(split, i, s) for i in range(count) for s in range(samples)]


def check_trajectory(chat: ChatRenderer, trajectory: Trajectory) -> None:
    """What holds for every trajectory, however it ended."""
    length = len(trajectory.ids)
    for name, dtype in [("loss_mask", bool), ("logp", np.float32), ("entropy", np.float32)]:
        values = getattr(trajectory, name)
        assert values.shape == (length,)
        assert values.dtype == dtype
    covered = np.zeros(length, bool)
    for turn in trajectory.turns:
        assert trajectory.prompt_length <= turn.start < turn.end <= length
        assert not covered[turn.start : turn.end].any()
        covered[turn.start : turn.end] = True
    assert np.array_equal(covered, trajectory.loss_mask)
    assert not trajectory.logp[~covered].any()
    assert not trajectory.entropy[~covered].any()
    assert (trajectory.logp[covered] <= 0).all()
    assert trajectory.response_tokens == covered.sum()
    pads = int((trajectory.ids == chat.image_id).sum())
    assert pads == sum(image.tokens for image in trajectory.images)
    ends = chat.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    assert [int((trajectory.ids == i).sum()) for i in ends] == [len(trajectory.images)] * 2
    assert not np.isin(trajectory.ids[covered], chat.forbidden_ids).any()


# Several environments at once


def test_environments_of_a_mixture_keep_their_rules(
    chat: ChatRenderer, vision: VisionProcessor, make_runner: Any, say: Any
) -> None:
    free = ChatRenderer(chat.tokenizer, stop_at_tool_call=False)
    records: dict[str, list[Any]] = {"long": [], "short": []}

    def member(name: str, rules: ChatRenderer, side: int, **limits: Any) -> RolloutRunner:
        behaviour = Behaviour(turns=lambda index: 9)
        return RolloutRunner(
            lambda: StoryEnv(behaviour, records[name]),
            rules,
            vision,
            prompt_pixels=PixelLimits(side**2, side**2),
            observation_pixels=OBSERVATION_PIXELS,
            limits=RolloutLimits(**limits),
        )

    members = {
        "long": member("long", chat, 112, max_turns=3, concurrency=1),
        "short": member("short", free, 56, max_turns=1, max_turn_tokens=3, concurrency=1),
    }
    runner = RolloutRunner(
        lambda: pytest.fail("only members play"),
        chat,
        vision,
        prompt_pixels=PROMPT_PIXELS,
        observation_pixels=OBSERVATION_PIXELS,
        limits=RolloutLimits(concurrency=4),
        members=members,
    )
    policy = ScriptedPolicy(lambda request, turn: say(f"Turn {turn}: x7 x7", end=True))
    episodes = [EpisodeSpec("train", i, 0, name) for i in range(2) for name in members]
    played = runner.run(policy, episodes, T1, (1,))
    assert [(t.env, t.index) for t in played] == [(e.env, e.index) for e in episodes]
    assert policy.most_in_flight == 4  # together, whatever the members' own concurrency
    assert {t.env: len(t.turns) for t in played} == {"long": 3, "short": 1}
    large, small = (next(t for t in played if t.env == name).images[0] for name in members)
    assert large.tokens > small.tokens
    assert [t.turns[0].finish for t in played] == ["stop", "length"] * 2
    asked = {rules.chat.stop_ids for rules in members.values()}
    assert {tuple(sorted(request.stop_ids or ())) for request in policy.requests} == asked
    assert len(asked) == 2
    # One index and sample in two environments: other random draws.
    assert len({request.seed for request in policy.requests}) == len(policy.requests)
    alone = members["short"].run(policy, [EpisodeSpec("train", 0, 0, "short")], T1, (1,))
    assert policy.requests[-1].stop_ids is None
    assert policy.requests[-1].seed == (1, 0, 0, 0)
    assert alone[0].env == "short"
    runner.close()
    assert all(env.closed for made in records.values() for kind, env, *_ in made if kind == "made")


# What a trajectory holds


def test_ids_are_the_templates_rendering_and_the_mask_is_the_students(
    chat: ChatRenderer,
    vision: VisionProcessor,
    make_runner: Any,
    scripted: ScriptedPolicy,
    record: list[Any],
    say: Any,
) -> None:
    behaviour = Behaviour(turns=lambda i: 1 + i % 4, images=lambda i, turn: (i + turn) % 3)
    runner = make_runner(behaviour, max_turns=5)
    trajectories = runner.run(scripted, specs(8), T1, (1,))
    for index, trajectory in enumerate(trajectories):
        check_trajectory(chat, trajectory)
        assert len(trajectory.turns) == 1 + index % 4
        env = StoryEnv(behaviour, [])
        seed, options = next(
            (e[1], e[2]) for e in record if e[0] == "reset" and e[2]["index"] == index
        )
        observation, _ = env.reset(seed=seed, options=options)
        messages = [Message("system", (SYSTEM,))]
        pixels, images = PROMPT_PIXELS, []
        for turn in range(len(trajectory.turns) + 1):
            shown = [vision.encode(image, pixels) for image in observation["images"]]
            messages.append(observation_message(observation, shown))
            images += shown
            if turn == len(trajectory.turns):
                break
            before = whole_conversation(chat.tokenizer, messages, True)
            found = trajectory.turns[turn]
            assert trajectory.ids[: found.start].tolist() == before
            expected = list(scripted.script(Request(index, [], [], 1, ()), turn))
            assert trajectory.ids[found.start : found.end].tolist() == expected
            assert found.text == chat.text(expected)
            assert found.finish == "stop"
            messages.append(Message("assistant", (found.text,)))
            observation, *_ = env.step(found.text)
            pixels = OBSERVATION_PIXELS
            if turn + 1 == len(trajectory.turns):
                break
            assert found.observation == observation["text"]
        assert trajectory.images == images
        assert trajectory.ids[: trajectory.prompt_length].tolist() == whole_conversation(
            chat.tokenizer, messages[:2], True
        )
        assert len(trajectory.ids) == trajectory.turns[-1].end


def test_logs_of_an_episode(
    chat: ChatRenderer, make_runner: Any, scripted: ScriptedPolicy, record: list[Any]
) -> None:
    ending = {"terminated": True, "info": {"success": True, "answer": "7", "other": object()}}
    behaviour = Behaviour(turns=lambda i: 3, ending=lambda i: ending)
    (trajectory,) = make_runner(behaviour).run(scripted, [EpisodeSpec("eval", 4, 2)], T1, (1,))
    assert (trajectory.task_id, trajectory.index, trajectory.sample) == ("story-4", 4, 2)
    assert trajectory.stop_reason is StopReason.ANSWER
    assert trajectory.success is True
    assert trajectory.reward == 1.5
    assert trajectory.info == {"success": True, "answer": "7"}
    assert [c.arguments for c in trajectory.tool_calls] == [{"turn": 1}, {"turn": 2}]
    assert trajectory.teacher_logp is None
    assert trajectory.seconds > 0
    for turn in trajectory.turns:
        count = turn.end - turn.start
        logp, entropy = (x[turn.start : turn.end] for x in (trajectory.logp, trajectory.entropy))
        assert logp.tolist() == [-(i + 1) / 8 for i in range(count)]
        assert entropy.tolist() == [(i + 1) / 4 for i in range(count)]
    told = [entry[2] for entry in record if entry[0] == "step"]
    assert told == [turn.text for turn in trajectory.turns]
    assert not any("<|" in text for text in told)
    options = next(entry[2] for entry in record if entry[0] == "reset")
    assert options == {"split": "eval", "index": 4}


@pytest.mark.parametrize(
    ("end", "reason", "success"),
    [
        ({"terminated": True, "info": {"success": False}}, StopReason.ANSWER, False),
        ({"terminated": True}, StopReason.ANSWER, True),
        ({"truncated": True, "info": {"success": False}}, StopReason.MAX_TURNS, False),
        ({"truncated": True, "info": {"time_limit": True}}, StopReason.TIME_LIMIT, True),
        ({"terminated": True, "truncated": True}, StopReason.ANSWER, True),
    ],
)
def test_stop_reasons_of_the_environment(
    make_runner: Any, scripted: ScriptedPolicy, end: Any, reason: StopReason, success: bool
) -> None:
    runner = make_runner(Behaviour(ending=lambda i: end))
    (trajectory,) = runner.run(scripted, specs(1), T1, (1,))
    assert trajectory.stop_reason is reason
    assert trajectory.success is success


# Budgets


def test_turn_limit(
    chat: ChatRenderer, make_runner: Any, scripted: ScriptedPolicy, record: list[Any]
) -> None:
    runner = make_runner(Behaviour(turns=lambda i: 99), max_turns=3)
    for trajectory in runner.run(scripted, specs(5), T1, (1,)):
        check_trajectory(chat, trajectory)
        assert trajectory.stop_reason is StopReason.MAX_TURNS
        assert len(trajectory.turns) == 3
        assert len(trajectory.ids) == trajectory.turns[-1].end  # no observation nobody answers
        assert trajectory.success is False
    assert sum(entry[0] == "step" for entry in record) == 15


def test_every_budget_holds_and_no_image_is_cut(
    chat: ChatRenderer, make_runner: Any, scripted: ScriptedPolicy
) -> None:
    behaviour = Behaviour(turns=lambda i: 4, images=lambda i, turn: 1 + turn % 2)
    (unlimited,) = make_runner(behaviour).run(scripted, [EpisodeSpec("train", 0)], T1, (1,))
    full = len(unlimited.ids) - unlimited.prompt_length
    seen = set()
    for budget in range(1, full + 3):
        runner = make_runner(behaviour, max_response_tokens=budget)
        (trajectory,) = runner.run(scripted, [EpisodeSpec("train", 0)], T1, (1,))
        check_trajectory(chat, trajectory)
        used = len(trajectory.ids) - trajectory.prompt_length
        assert used <= budget
        assert trajectory.ids.tolist() == unlimited.ids[: len(trajectory.ids)].tolist()
        assert len(trajectory.ids) == trajectory.turns[-1].end
        seen.add(trajectory.stop_reason)
        if budget >= full:
            assert trajectory.stop_reason is StopReason.ANSWER
            assert used == full
        else:
            assert trajectory.stop_reason is StopReason.MAX_TOKENS
    assert seen == {StopReason.ANSWER, StopReason.MAX_TOKENS}


def test_an_observation_must_leave_room_for_one_token(
    chat: ChatRenderer, make_runner: Any, scripted: ScriptedPolicy
) -> None:
    (whole,) = make_runner().run(scripted, specs(1), T1, (1,))
    second = whole.turns[1].start - whole.prompt_length
    for budget, turns in [(second, 1), (second + 1, 2)]:
        runner = make_runner(max_response_tokens=budget)
        (trajectory,) = runner.run(scripted, specs(1), T1, (1,))
        assert len(trajectory.turns) == turns
        assert trajectory.stop_reason is StopReason.MAX_TOKENS
        assert trajectory.turns[0].observation  # what it was is on record, though not added
        if turns == 2:
            assert trajectory.turns[1].end - trajectory.turns[1].start == 1
            assert trajectory.turns[1].finish == "length"
        else:
            assert trajectory.images == whole.images[:1]


def test_turn_budget_cuts_a_turn_and_the_episode_continues(
    chat: ChatRenderer, make_runner: Any, say: Any
) -> None:
    policy = ScriptedPolicy(lambda request, turn: say("a b c d e f g h i j k l m"))
    (trajectory,) = make_runner(max_turn_tokens=5).run(policy, specs(1), T1, (1,))
    check_trajectory(chat, trajectory)
    assert [turn.end - turn.start for turn in trajectory.turns] == [5, 5]
    assert [turn.finish for turn in trajectory.turns] == ["length", "length"]
    assert trajectory.ids[trajectory.turns[0].end] == chat.turn_end_id
    assert not trajectory.loss_mask[trajectory.turns[0].end]
    # The last turn was cut: the environment took it for an answer, but it is none.
    assert trajectory.stop_reason is StopReason.MAX_TOKENS
    assert [request.max_tokens for request in policy.requests] == [5, 5]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_turns": 0},
        {"concurrency": 0},
        {"max_turn_tokens": 0},
        {"max_response_tokens": 0},
        {"env_seconds": 0.0},
    ],
)
def test_impossible_limits_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        RolloutLimits(**limits)


# Environments that misbehave


def raise_for(indices: set[int], at_turn: int) -> Callable[[int, int], None]:
    def before(index: int, turn: int) -> None:
        if index in indices and turn == at_turn:
            raise RuntimeError(f"broken tool of task {index}")

    return before


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_an_environment_that_raises_loses_its_episode_only(
    chat: ChatRenderer,
    make_runner: Any,
    scripted: ScriptedPolicy,
    turn: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    behaviour = Behaviour(turns=lambda i: 3, before=raise_for({1, 4}, turn))
    good = make_runner(Behaviour(turns=lambda i: 3)).run(scripted, specs(6), T1, (1,))
    runner = make_runner(behaviour, concurrency=3)
    trajectories = runner.run(scripted, specs(6), T1, (1,))
    for index, trajectory in enumerate(trajectories):
        check_trajectory(chat, trajectory)
        assert trajectory.index == index
        if index in (1, 4):
            assert trajectory.stop_reason is StopReason.ENV_ERROR
            assert f"broken tool of task {index}" in trajectory.info["error"]
            assert "Traceback" in trajectory.info["error"]
            assert len(trajectory.turns) == turn
            assert trajectory.success is False
        else:
            assert trajectory.stop_reason is StopReason.ANSWER
            assert trajectory.ids.tolist() == good[index].ids.tolist()
    assert "broken tool of task 4" in caplog.text
    assert scripted.sessions[-1].known == {}  # every sequence was released
    again = runner.run(scripted, specs(6), T1, (1,))  # the runner is still usable
    assert [t.stop_reason for t in again] == [t.stop_reason for t in trajectories]


def test_a_constructor_that_raises_loses_its_episodes(
    chat: ChatRenderer, vision: VisionProcessor, scripted: ScriptedPolicy, record: list[Any]
) -> None:
    lock, made = threading.Lock(), []

    def make() -> StoryEnv:
        with lock:
            made.append(1)
            if len(made) == 2:
                raise OSError("no licence for a second one")
        return StoryEnv(Behaviour(), record)

    runner = RolloutRunner(
        make,
        chat,
        vision,
        prompt_pixels=PROMPT_PIXELS,
        observation_pixels=OBSERVATION_PIXELS,
        limits=RolloutLimits(),
    )
    reasons = [t.stop_reason for t in runner.run(scripted, specs(4), T1, (1,))]
    assert sorted(reasons) == ["answer", "answer", "answer", "env_error"]


@pytest.mark.parametrize("turn", [0, 1])
def test_environments_that_hang_cost_one_time_limit_together(
    chat: ChatRenderer, make_runner: Any, scripted: ScriptedPolicy, turn: int
) -> None:
    release = threading.Event()

    def before(index: int, at: int) -> None:
        if index % 2 and at == turn:
            release.wait(30)

    runner = make_runner(Behaviour(before=before), env_seconds=0.5)
    started = time.perf_counter()
    trajectories = runner.run(scripted, specs(12), T1, (1,))
    seconds = time.perf_counter() - started
    release.set()
    for index, trajectory in enumerate(trajectories):
        check_trajectory(chat, trajectory)
        expected = StopReason.ENV_ERROR if index % 2 else StopReason.ANSWER
        assert trajectory.stop_reason is expected
        if index % 2:
            assert "0.5 s" in trajectory.info["error"]
    assert 0.5 <= seconds < 2.0, "hung environments must be waited for together, not in turn"


def test_a_hung_environment_does_not_keep_the_process() -> None:
    program = """
import time, gymnasium
from reopold_agent.rollout.workers import Worker
class Hung(gymnasium.Env):
    def step(self, action):
        while True: time.sleep(1)
worker = Worker(Hung)
worker.call(lambda env: env.step(""))
outcome = worker.result(0.2)
assert outcome.value is None and "no answer within 0.2 s" in outcome.error, outcome
worker.abandon()
print("done")
"""
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout == "done\n", result.stderr
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(
    "broken",
    [
        None,
        {"text": IMAGE_MARK, "images": ()},
        {"text": IMAGE_MARK, "images": (np.zeros((28, 28), np.float32),)},
        {"text": 7, "images": ()},
        {},
        np.zeros(5000),
    ],
)
def test_an_invalid_observation_loses_its_episode_only(
    chat: ChatRenderer, make_runner: Any, scripted: ScriptedPolicy, turn: int, broken: Any
) -> None:
    def change(index: int, at: int, observation: Observation) -> Any:
        return broken if index == 1 and at == turn else observation

    trajectories = make_runner(Behaviour(change=change)).run(scripted, specs(3), T1, (1,))
    assert [t.stop_reason for t in trajectories] == ["answer", "env_error", "answer"]
    for trajectory in trajectories:
        check_trajectory(chat, trajectory)
    assert trajectories[1].info["error"]
    assert len(trajectories[1].turns) == turn


@pytest.mark.parametrize(
    ("shown", "text", "pictures"),
    [
        ("A text.", "A text.", 0),
        (f"a {IMAGE_MARK} typed", "a   typed", 0),
        ({"text": "no pictures key"}, "no pictures key", 0),
        (
            {"text": "no mark", "images": (np.zeros((28, 28, 3), np.uint8),)},
            f"no mark{IMAGE_MARK}",
            1,
        ),
        (np.zeros((28, 28, 3), np.uint8), IMAGE_MARK, 1),
        (np.zeros((64, 64), np.uint8), IMAGE_MARK, 1),  # grey
        (np.int64(3), "3", 0),
        (np.array([10001.0, 0.5]), "[10001, 0.5]", 0),
        (
            {"text": "page", "goal": "buy", "screen": np.zeros((64, 64, 3), np.uint8)},
            f"{IMAGE_MARK}\ntext: page\ngoal: buy",
            1,
        ),
        (("look", np.zeros((64, 64, 3), np.uint8)), f"{IMAGE_MARK}\n[look]", 1),
    ],
)
def test_whatever_an_environment_shows_is_what_the_student_reads(
    chat: ChatRenderer,
    make_runner: Any,
    scripted: ScriptedPolicy,
    shown: Any,
    text: str,
    pictures: int,
) -> None:
    behaviour = Behaviour(change=lambda index, at, observation: shown if at == 1 else observation)
    (trajectory,) = make_runner(behaviour).run(scripted, specs(1), T1, (1,))
    check_trajectory(chat, trajectory)
    assert trajectory.turns[0].observation == text
    assert len(trajectory.images) == 1 + pictures  # the first turn has one


@pytest.mark.parametrize(
    ("info", "rewards", "success"),
    [
        ({}, [0.5, -0.25], True),  # their sum counts, not the last one
        ({}, [-0.5, 0.25], False),
        ({"success": False}, [1.0, 1.0], False),
        ({"is_success": np.True_}, [0.0, 0.0], True),
        ({"success": None}, [0.0, 1.0], True),
        ({"success": None, "is_success": True}, [0.0, 0.0], True),
    ],
)
def test_success_is_what_the_environment_says(
    chat: ChatRenderer,
    vision: VisionProcessor,
    scripted: ScriptedPolicy,
    info: dict[str, Any],
    rewards: list[float],
    success: bool,
) -> None:
    class Words(gymnasium.Env[Any, str]):
        """A game in words that knows nothing of this project."""

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            self.turn = 0
            return "Begin.", {}

        def step(self, action: str) -> Any:
            self.turn += 1
            end = self.turn == len(rewards)
            return "Go on.", rewards[self.turn - 1], end, False, info if end else {}

    runner = RolloutRunner(
        Words,
        chat,
        None,
        prompt_pixels=PROMPT_PIXELS,
        observation_pixels=OBSERVATION_PIXELS,
        limits=RolloutLimits(),
    )
    (trajectory,) = runner.run(scripted, specs(1), T1, (1,))
    assert (trajectory.reward, trajectory.success) == (sum(rewards), success)
    assert [turn.observation for turn in trajectory.turns] == ["Go on.", "Go on."]


def test_a_word_that_is_neither_true_nor_false_ends_a_run_that_has_no_answer_yet(
    chat: ChatRenderer, scripted: ScriptedPolicy
) -> None:
    class Unclear(gymnasium.Env[Any, str]):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            self.success: Any = True if options["index"] == 0 else "false"
            return "Begin.", {}

        def step(self, action: str) -> Any:
            return "Won.", 1.0, True, False, {"success": self.success}

    runner = RolloutRunner(
        Unclear,
        chat,
        None,
        prompt_pixels=PROMPT_PIXELS,
        observation_pixels=OBSERVATION_PIXELS,
        limits=RolloutLimits(concurrency=1),
    )
    with pytest.raises(EnvironmentCodeError, match="success='false'"):
        runner.run(scripted, specs(2)[1:], T1, (1,))
    stops = [t.stop_reason for t in runner.run(scripted, specs(2), T1, (1,))]
    assert stops == [StopReason.ANSWER, StopReason.ENV_ERROR]


def test_a_budget_is_a_success_only_by_the_environments_word(
    chat: ChatRenderer, scripted: ScriptedPolicy
) -> None:
    class Endless(gymnasium.Env[Any, str]):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            self.won = options["index"] == 0
            return "Begin.", {}

        def step(self, action: str) -> Any:
            return "Go on.", 1.0, False, False, {"success": True} if self.won else {}

    runner = RolloutRunner(
        Endless,
        chat,
        None,
        prompt_pixels=PROMPT_PIXELS,
        observation_pixels=OBSERVATION_PIXELS,
        limits=RolloutLimits(max_turns=2),
    )
    trajectories = runner.run(scripted, specs(2), T1, (1,))
    assert [(t.reward, t.success) for t in trajectories] == [(2.0, True), (2.0, False)]


@pytest.mark.parametrize("last", [None, {}, np.zeros(5000), {"text": 7}])
def test_what_is_shown_at_the_end_need_not_be_an_observation(
    chat: ChatRenderer, scripted: ScriptedPolicy, last: Any
) -> None:
    class Ending(gymnasium.Env[Any, str]):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            return "Begin.", {}

        def step(self, action: str) -> Any:
            return last, 1.0, True, False, {}

    runner = RolloutRunner(
        Ending,
        chat,
        None,
        prompt_pixels=PROMPT_PIXELS,
        observation_pixels=OBSERVATION_PIXELS,
        limits=RolloutLimits(),
    )
    (trajectory,) = runner.run(scripted, specs(1), T1, (1,))
    assert (trajectory.stop_reason, trajectory.success) == (StopReason.ANSWER, True)
    assert trajectory.turns[-1].observation == ""


# Order, groups, determinism


def test_results_keep_their_order_and_workers_are_reused(
    chat: ChatRenderer, make_runner: Any, scripted: ScriptedPolicy, record: list[Any]
) -> None:
    behaviour = Behaviour(
        turns=lambda i: 1 + (7 * i) % 4, before=lambda i, turn: time.sleep(0.002 * (i % 3))
    )
    runner = make_runner(behaviour, concurrency=4)
    wanted = specs(10, samples=2)[::-1] + specs(3, split="eval")
    counted: list[Trajectory] = []
    trajectories = runner.run(scripted, wanted, T1, (1,), on_done=counted.append)
    assert [(t.index, t.sample) for t in trajectories] == [(s.index, s.sample) for s in wanted]
    assert [len(t.turns) for t in trajectories] == [1 + (7 * s.index) % 4 for s in wanted]
    assert sorted(map(id, counted)) == sorted(map(id, trajectories))
    made = [entry[1] for entry in record if entry[0] == "made"]
    assert len(made) <= 4
    assert scripted.most_in_flight <= 4
    assert scripted.sessions[0].known == {}
    runner.run(scripted, wanted[:5], T1, (1,))
    assert len([entry for entry in record if entry[0] == "made"]) == len(made)
    runner.close()
    assert all(env.closed for env in made)
    assert runner.stats.sampled_tokens > 0


def test_nothing_to_play(make_runner: Any, scripted: ScriptedPolicy) -> None:
    assert make_runner().run(scripted, [], T1, (1,)) == []


def test_samples_of_a_group_face_the_same_task_with_their_own_randomness(
    make_runner: Any, scripted: ScriptedPolicy, record: list[Any]
) -> None:
    runner = make_runner()
    trajectories = runner.run(scripted, specs(3, samples=4), T1, (9, 5))
    runner.run(scripted, specs(3, split="eval"), T1, (1,))
    seeds = {}
    for _, seed, options in (entry for entry in record if entry[0] == "reset"):
        seeds.setdefault((options["split"], options["index"]), set()).add(seed)
    assert all(len(found) == 1 for found in seeds.values())
    assert len({next(iter(found)) for found in seeds.values()}) == 6
    for index in range(3):
        group = [t for t in trajectories if t.index == index]
        prompts = {tuple(t.ids[: t.prompt_length].tolist()) for t in group}
        assert len(prompts) == 1
        # One object: the policy computes the prompt of a group once.
        assert len({t.images[0].key for t in group}) == 1
    first = [r.seed for r in scripted.requests[:24]]
    assert len(set(first)) == 24
    assert all(seed[:2] == (9, 5) for seed in first)


def same(one: Sequence[Trajectory], other: Sequence[Trajectory]) -> None:
    for a, b in zip(one, other, strict=True):
        for name in ("ids", "loss_mask", "logp", "entropy"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        assert [i.grid for i in a.images] == [i.grid for i in b.images]
        for image, image2 in zip(a.images, b.images, strict=True):
            assert np.array_equal(image.pixels, image2.pixels)
        assert (a.stop_reason, a.reward, a.success) == (b.stop_reason, b.reward, b.success)
        assert [t.text for t in a.turns] == [t.text for t in b.turns]


def test_two_runs_are_bit_for_bit_equal_though_tools_take_random_time(
    chat: ChatRenderer, make_runner: Any, policy: TransformersPolicy
) -> None:
    clock = random.Random()
    behaviour = Behaviour(
        turns=lambda i: 1 + i % 3, before=lambda i, turn: time.sleep(clock.random() * 0.01)
    )
    limits = {"max_turn_tokens": 9, "concurrency": 5}
    runs = [
        make_runner(behaviour, **limits).run(policy, specs(6, samples=2), T1, (3, 1))
        for _ in range(3)
    ]
    same(runs[0], runs[1])
    same(runs[0], runs[2])
    for trajectory in runs[0]:
        check_trajectory(chat, trajectory)
    by_group = {t.index: set() for t in runs[0]}
    for t in runs[0]:
        by_group[t.index].add(tuple(t.ids.tolist()))
    assert all(len(found) == 2 for found in by_group.values())  # samples of a group differ
    (other,) = make_runner(behaviour, **limits).run(policy, specs(1), T1, (3, 2))
    assert other.ids.tolist() != runs[0][0].ids.tolist()  # another seed, another episode


def test_concurrency_changes_when_and_not_what(
    make_runner: Any, policy: TransformersPolicy
) -> None:
    behaviour = Behaviour(turns=lambda i: 1 + i % 3)
    runs = [
        make_runner(behaviour, max_turn_tokens=7, concurrency=c).run(policy, specs(7), T1, (4,))
        for c in (1, 3, 64)
    ]
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            np.testing.assert_allclose(a.logp, b.logp, atol=1e-4)


def test_recorded_log_probs_are_those_of_scoring(
    chat: ChatRenderer, make_runner: Any, policy: TransformersPolicy
) -> None:
    behaviour = Behaviour(turns=lambda i: 1 + i % 4, images=lambda i, turn: (i + turn) % 3)
    trajectories = make_runner(behaviour, max_turn_tokens=12).run(
        policy, specs(9, samples=2), T1, (6,)
    )
    assert max(len(t.turns) for t in trajectories) == 4
    scores = policy.score(trajectories, with_entropy=True)
    for trajectory, score in zip(trajectories, scores, strict=True):
        check_trajectory(chat, trajectory)
        np.testing.assert_allclose(score.logp, trajectory.logp, atol=1e-4)
        np.testing.assert_allclose(score.entropy, trajectory.entropy, atol=1e-4)


def test_greedy_ignores_the_seed(make_runner: Any, policy: TransformersPolicy) -> None:
    greedy = Sampling(temperature=0)
    runs = [
        make_runner(max_turn_tokens=6).run(policy, specs(3), greedy, seed) for seed in [(1,), (2,)]
    ]
    assert [t.ids.tolist() for t in runs[0]] == [t.ids.tolist() for t in runs[1]]


# Workers


def test_worker_reports_values_errors_and_times() -> None:
    worker = Worker(lambda: StoryEnv(Behaviour(), []))
    worker.call(lambda env: time.sleep(0.05) or 5)
    outcome = worker.result(5)
    assert (outcome.value, outcome.error) == (5, None)
    assert 0.05 <= outcome.seconds < 1
    worker.call(lambda env: [][1])
    outcome = worker.result(5)
    assert outcome.value is None
    assert outcome.error is not None
    assert outcome.error.startswith("IndexError: list index out of range\n")
    worker.close()


def test_a_worker_owns_one_environment_on_one_thread() -> None:
    made: list[Any] = []
    worker = Worker(lambda: StoryEnv(Behaviour(), made))
    threads = set()
    for _ in range(3):
        worker.call(lambda env: threads.add(threading.current_thread()))
        assert worker.result(5).error is None
    assert len(made) == 1
    (thread,) = threads
    assert thread.daemon
    worker.close()
    assert not thread.is_alive()
    assert made[0][1].closed


def test_images_are_encoded_objects(make_runner: Any, scripted: ScriptedPolicy) -> None:
    (trajectory,) = make_runner().run(scripted, specs(1), T1, (1,))
    assert [type(i) for i in trajectory.images] == [EncodedImage, EncodedImage]
    assert [i.pixels.shape[0] * i.pixels.shape[1] for i in trajectory.images] == [
        i.tokens * 784 for i in trajectory.images
    ]
    assert trajectory.images[0].tokens > trajectory.images[1].tokens


def test_pictures_are_resized_on_the_threads_of_their_environments(
    make_runner: Any, scripted: ScriptedPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the generator; the teacher's own form of an episode is made elsewhere."""
    runner = make_runner()
    threads = []
    whole = runner.vision.encode

    def encode(*arguments: Any) -> EncodedImage:
        threads.append(threading.current_thread().name)
        return whole(*arguments)

    monkeypatch.setattr(runner.vision, "encode", encode)
    (trajectory,) = runner.run(scripted, specs(1), T1, (1,))
    assert len(trajectory.images) == 2
    assert threads == ["reopold-env"] * 2
