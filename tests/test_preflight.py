"""`reopold preflight`: healthy pairs pass without a warning, each planted fault is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from running import composed
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from reopold_agent.config import TrainConfig
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.envs.registration import ENVS, register_env
from reopold_agent.errors import ConfigError, VocabularyMismatchError
from reopold_agent.objectives import Reopold
from reopold_agent.plan.compose import plan_run
from reopold_agent.plan.hardware import Gpu
from reopold_agent.policies.base import PolicyRole
from reopold_agent.policies.loading import LoadedModel, load_model, resolve_path
from reopold_agent.policies.registry import POLICIES, PolicyKind
from reopold_agent.preflight import play as playing
from reopold_agent.preflight.__main__ import main, parse
from reopold_agent.preflight.figures import (
    CALLS,
    END,
    MARKS,
    OPENING,
    WORDS,
    ToolUse,
    gap_of,
    token_groups,
    tool_use_of,
)
from reopold_agent.preflight.findings import Finding, judged, unfit
from reopold_agent.preflight.play import Played, play
from reopold_agent.preflight.projection import project, published
from reopold_agent.preflight.report import as_values, lines_of
from reopold_agent.train.banner import preflight_note
from reopold_agent.train.setup import load_models
from reopold_agent.types import Completion, Sampling, StopReason, Task, ToolCall, Trajectory, Turn

CPU = ("engine.device=cpu", "engine.threads=1")
Edit = Callable[[dict[str, torch.Tensor], Any], None]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Global random state kept."""
    with torch.random.fork_rng(devices=[]):
        yield


def config_of(*words: str) -> TrainConfig:
    return composed(*CPU, *words)[0]


def flight(*words: str, episodes: int = 16) -> tuple[Played, list[Finding]]:
    played = play(config_of(*words), episodes, lambda text: None)
    return played, judged(played)


def problem(*words: str) -> str:
    """What the first finding says; it is a problem."""
    _, found = flight(*words)
    assert found
    assert found[0].status == "problem", found
    assert found[0].advice.endswith((".", ")"))
    return found[0].text


def changed(folder: Path, model: str, edit: Edit) -> str:
    """Copies an embedded checkpoint with other weights."""
    shutil.copytree(resolve_path(f"demo:{model}"), folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights, AutoTokenizer.from_pretrained(folder))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def embedding(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    (name,) = [each for each in weights if each.endswith("embed_tokens.weight")]
    return weights[name]


def knows_as(**words: str) -> Edit:
    """The model knows some tokens under other ids: it was trained with other words."""

    def edit(weights: dict[str, torch.Tensor], tokenizer: Any) -> None:
        rows = embedding(weights)
        for mark, other in words.values():
            pair = torch.tensor(tokenizer.convert_tokens_to_ids([mark, other]))
            rows[pair] = rows[pair.flip(0)]

    return edit


def never_writes(part: str) -> Edit:
    def edit(weights: dict[str, torch.Tensor], tokenizer: Any) -> None:
        ids = [i for token, i in tokenizer.get_vocab().items() if part in token]
        embedding(weights)[ids] = 0.0  # a logit of 0, far below the others

    return edit


# Healthy pairs


class Looker(PixelReasonerEnv):
    """A plugin's environment, which grades by itself."""

    def reward(self, task: Task, answer: str, *args: Any, **kwargs: Any) -> tuple[float, bool]:
        return float(bool(answer)), bool(answer)


@pytest.fixture
def looker() -> Iterator[None]:
    name = "reopold_tests/Looker-v0"
    register_env("looker", id=name, entry_point=Looker)
    yield
    gymnasium.registry.pop(name)
    del ENVS._things["looker"]


@pytest.mark.usefixtures("looker")
@pytest.mark.parametrize("env", ["pixel_reasoner", "math", "geometry", "looker"])
def test_a_matching_pair_passes(env: str) -> None:
    played, found = flight(f"env={env}")
    assert found == []
    assert played.outcome.episodes == 16
    assert played.gap is not None
    assert 0 < played.gap.largest < 1e-4  # recomputed, not the sampler's own numbers
    assert played.gradient
    assert (played.tools.calls > 0) == (env in ("pixel_reasoner", "looker"))
    assert (played.unread is None) == (env == "looker")
    rewards = {group.name: group for group in played.rewards}
    parts = [rewards[name].tokens for name in (CALLS, WORDS, END) if name in rewards]
    assert sum(parts) - played.tools.calls == rewards["all tokens"].tokens  # ends with its mark
    assert all(group.sure_reward > -0.1 for group in played.rewards if group.sure)
    projection = project(played, (*CPU, f"env={env}"))
    lines = lines_of(played, projection, None)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    assert projection.plan is not None
    assert projection.plan.work.response == pytest.approx(played.lengths.response, rel=1e-3)


def test_objectives_on_outcomes_get_groups_and_need_no_teacher() -> None:
    words = ("env=math", "objective=grpo", "model.teacher=null", "evaluation.teacher=false")
    played, found = flight(*words)
    assert (played.rewards, found) == ([], [])
    assert played.outcome.episodes == 16
    words = (*words, "sampling.top_p=1e-9")
    _, found = flight(*words, episodes=8)
    assert "no group of episodes has both" in found[0].text


def test_demonstrations_are_not_played() -> None:
    with pytest.raises(ConfigError, match=r"from which objective=sft does not learn\.\nStart"):
        flight("env=math", "objective=sft", "objective.source=teacher")


# Faults: what the student does


def test_tools_that_are_never_called(tmp_path: Path) -> None:
    path = changed(tmp_path / "s", "student", never_writes("<tool_call>"))
    told = problem(f"model.student.path={path}")
    assert told.startswith("no episode of 16 calls a tool; the environment has crop_image")


def test_calls_that_mostly_fail() -> None:
    calls = [ToolCall("zoom", {}, False, "There is no tool"), ToolCall("", {}, False, "No JSON")]
    turns = [Turn(1, 2, "zoom", "stop", call) for call in (*calls, ToolCall("crop", {}, True))]
    t = replace(trajectory([["a"]], [0.0]), turns=[*turns, Turn(1, 2, "I crop it", "stop")])
    tools = tool_use_of([t], ["crop"])
    errors = {"unknown tool": 1, "not readable": 1}
    assert tools == ToolUse(("crop",), 1, 0, 3, errors, "There is no tool", 1)
    played, _ = flight(episodes=2)
    (found,) = judged(replace(played, tools=tools))
    assert found.status == "warning"
    assert "2 of 3 tool calls fail (1 unknown tool, 1 not readable): There is" in found.text
    (found,) = judged(replace(played, tools=replace(tools, calls=0, errors={})))
    assert found.advice.startswith("1 turns name a tool, but write no <tool_call>")


def test_few_episodes_prove_no_habit() -> None:
    played, _ = flight(episodes=2)
    none = replace(played.tools, calls=0, errors={})
    for episodes, status in ((1, "warning"), (7, "warning"), (8, "problem")):
        outcome = replace(played.outcome, episodes=episodes, failed=0, by_prompt=0)
        found, *_ = judged(replace(played, tools=none, outcome=outcome))
        assert found.status == status, episodes
        assert found.text.startswith(f"no episode of {episodes} calls a tool")


def test_what_never_succeeds_and_what_the_teacher_would_not_write() -> None:
    played, _ = flight("env=math")
    lost = replace(played.outcome, success=0.0)
    (found,) = judged(replace(played, outcome=lost))
    assert (found.status, found.text) == ("warning", "none of 16 episodes succeeds")
    assert judged(replace(played, outcome=replace(lost, episodes=7, answered=7))) == []

    def floored(name: str) -> list[Any]:
        rewards = [replace(g, below=0.75) if g.name == name else g for g in played.rewards]
        return judged(replace(played, rewards=rewards))

    (found,) = floored(WORDS)
    assert found.status == "warning"
    assert "(other words 75%)" in found.text
    assert floored(OPENING) == []  # a matching teacher, too, often begins otherwise


def test_too_long_prompts_are_not_blamed_on_the_environment() -> None:
    played, _ = flight("env=math", episodes=2)
    outcome = replace(played.outcome, by_prompt=1, error="engine.max_prompt_tokens is 10")
    (found,) = judged(replace(played, outcome=outcome))
    assert found.advice.startswith("Raise engine.max_prompt_tokens")


def test_a_response_that_is_too_short() -> None:
    _, found = flight("rollout.max_response_tokens=4", "+env.kwargs.tools=[]")
    assert found[0].text == "all of 16 episodes are truncated: 16 by length, 0 by turns"
    assert "rollout.max_turn_tokens" in found[0].advice
    played, (found_one, *more) = flight("rollout.max_turns=1")
    assert [each.text for each in more] == ["none of 16 episodes succeeds"]
    assert played.outcome.by_turns == played.tools.episodes == 6
    assert found_one.text.startswith("all of 6 episodes that call a tool are truncated: 0 by len")
    assert found_one.advice == "Raise rollout.max_turns (now 1)."


def test_answers_that_no_rule_can_read(tmp_path: Path) -> None:
    path = changed(tmp_path / "s", "arithmetic_student", never_writes("boxed"))
    told = problem("env=math", f"model.student.path={path}")
    assert told == "none of 15 answers can be read: the response has no box"


# Faults: what the teacher knows


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            {"a": ("<tool_call>", "<|video_pad|>"), "b": ("</tool_call>", "<|endoftext|>")},
            "the teacher rejects the tools' words",
        ),
        ({"a": ("<|im_end|>", "<|endoftext|>")}, "the teacher rejects the end of a turn"),
    ],
)
def test_a_teacher_with_other_words(
    tmp_path: Path, words: dict[str, tuple[str, str]], told: str
) -> None:
    path = changed(tmp_path / "t", "teacher", knows_as(**words))
    assert problem(f"model.teacher.path={path}").startswith(told)


def test_a_teacher_that_knows_other_ids(tmp_path: Path) -> None:
    def shift(weights: dict[str, torch.Tensor], tokenizer: Any) -> None:
        rows = embedding(weights)
        rows[3:300] = rows[3:300].roll(1, 0).clone()

    path = changed(tmp_path / "t", "arithmetic_teacher", shift)
    told = problem("env=math", f"model.teacher.path={path}")
    assert told.startswith("the teacher rejects most of what the student is sure of")


def other(folder: Path, name: str, file: str, edit: Callable[[str], str]) -> str:
    """Copies an embedded checkpoint with another text file."""
    shutil.copytree(resolve_path(f"demo:{name}"), folder)
    path = folder / file
    path.write_text(edit(path.read_text("utf-8")), "utf-8")
    return str(folder)


def test_a_teacher_whose_template_differs(tmp_path: Path) -> None:
    path = other(
        tmp_path / "t",
        "teacher",
        "chat_template.jinja",
        lambda t: t.replace("<|im_start|>", "### "),
    )
    played, (found,) = flight(f"model.teacher.path={path}")
    assert found.status == "warning"
    assert "where its own has '### system" in found.text
    rewards = [replace(group, sure_reward=-3.0) for group in played.rewards]
    found, *_ = judged(replace(played, rewards=rewards))
    assert found.status == "problem"  # the template explains why it rejects all
    assert "where its own has '### system" in found.text


def test_a_template_that_the_student_was_not_trained_with(tmp_path: Path) -> None:
    template = Path(resolve_path("demo:student"), "chat_template.jinja").read_text("utf-8")
    (tmp_path / "t.jinja").write_text(template.replace("<|im_start|>", "### "), "utf-8")
    given = f"model.chat_template={tmp_path / 't.jinja'}"
    told = "model.chat_template writes other prompts than the own one of demo:student"
    alone = ["objective=grpo", "model.teacher=null", "evaluation.teacher=false"]
    for words in ([], alone):
        _, found = flight(given, *words, episodes=8)
        assert found[0].status == "problem"
        assert found[0].text == f"{told}; it is no model's own"
    teacher = other(
        tmp_path / "t",
        "teacher",
        "chat_template.jinja",
        lambda t: t.replace("<|im_start|>", "### "),
    )
    _, found = flight(given, f"model.teacher.path={teacher}", episodes=8)
    assert ("warning", told) in [(each.status, each.text) for each in found]


def test_a_vocabulary_with_shifted_ids(tmp_path: Path) -> None:
    def shift(text: str) -> str:
        values = json.loads(text)
        vocab = values["model"]["vocab"]
        one, another = list(vocab)[300:302]
        vocab[one], vocab[another] = vocab[another], vocab[one]
        return json.dumps(values)

    path = other(tmp_path / "t", "teacher", "tokenizer.json", shift)
    with pytest.raises(VocabularyMismatchError, match="disagree on 2 token ids"):
        flight(f"model.teacher.path={path}")


def test_one_vocabulary_that_cuts_text_otherwise(tmp_path: Path) -> None:
    def without_merges(text: str) -> str:
        values = json.loads(text)
        values["model"]["merges"] = values["model"]["merges"][:40]
        return json.dumps(values)

    path = other(tmp_path / "t", "teacher", "tokenizer.json", without_merges)
    told = problem(f"model.teacher.path={path}")
    assert told.startswith("student and teacher cut text into other ids: '")


@pytest.mark.parametrize(("longest", "status"), [(6272, "problem"), (25088, "warning")])
def test_a_teacher_with_other_pixel_limits(tmp_path: Path, longest: int, status: str) -> None:
    def limits(text: str) -> str:
        values = json.loads(text)
        values["size"]["longest_edge"] = longest
        return json.dumps(values)

    path = other(tmp_path / "t", "teacher", "preprocessor_config.json", limits)
    _, (found,) = flight(f"model.teacher.path={path}")
    assert found.status == status
    said = "16 tokens for the student's processor and" if status == "problem" else f"{longest:,}"
    assert said in found.text


# Faults: the sampler


class Off:
    """A sampler whose log-probs are off by a factor."""

    def __init__(self, role: PolicyRole) -> None:
        model = load_model(role.processing.spec, role.role, torch.device("cpu"))
        self.policy = model.policy(forbidden_ids=role.forbidden_ids, stop_ids=role.stop_ids)
        self.factor = float(role.settings["factor"])

    def generator(self, sampling: Sampling) -> Any:
        inner = self.policy.generator(sampling)
        step = inner.step

        def off() -> list[Completion]:
            return [
                Completion(
                    c.key, c.ids, tuple(self.factor * x for x in c.logp), c.entropy, c.finish
                )
                for c in step()
            ]

        inner.step = off  # type: ignore[method-assign]
        return inner

    def sync(self, model: Any) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


@pytest.mark.parametrize(("factor", "status"), [(1.6, "problem"), (1.25, "warning"), (1.01, "")])
def test_a_sampler_whose_log_probs_are_off(
    monkeypatch: pytest.MonkeyPatch, factor: float, status: str
) -> None:
    monkeypatch.setitem(POLICIES._things, "off", PolicyKind(Off))
    played, found = flight(
        "env=math", "policy.student.name=off", f"+policy.student.factor={factor}"
    )
    assert [each.status for each in found] == ([status] if status else [])
    assert played.gap is not None
    if status:
        assert f"{played.gap.mean:.2g} nats from the trainer's" in found[0].text


# Figures by hand


def trajectory(pieces: Sequence[Sequence[str]], logp: Sequence[float], **values: Any) -> Trajectory:
    """An episode whose id is the place of its piece, after a prompt of one token."""
    turns, at = [], 1
    for turn in pieces:
        turns.append(Turn(at, at + len(turn), "".join(turn), "stop"))
        at += len(turn)
    given = np.array([0.0, *logp], np.float32)
    return Trajectory(
        task_id="t",
        index=0,
        sample=0,
        prompt_length=1,
        ids=np.arange(at),
        loss_mask=np.arange(at) > 0,
        logp=given,
        entropy=np.zeros(at, np.float32),
        images=[],
        turns=turns,
        stop_reason=StopReason.ANSWER,
        reward=0.0,
        success=False,
        **values,
    )


def test_groups_of_tokens_by_hand() -> None:
    turns = [["I ", "look", "<tool", "_call>x", "y</tool_call>", " ok"], ["so", "!"]]
    words = ["?", *turns[0], *turns[1]]
    teacher = -np.arange(9, dtype=np.float32)
    t = trajectory(turns, [0.0] * 7 + [-1.0], teacher_logp=teacher)
    groups = {
        g.name: (g.tokens, round(g.reward, 3), round(g.below, 3), g.sure, g.sure_reward)
        for g in token_groups([t], [t.logp], -3.0, lambda ids: "".join(words[i] for i in ids))
    }
    assert groups == {
        "all tokens": (8, -4.375, 0.75, 7, -4.0),
        "turn 1": (6, -3.5, 0.667, 6, -3.5),
        "turn 2": (2, -7.0, 1.0, 1, -7.0),
        OPENING: (2, -4.0, 0.5, 2, -4.0),
        CALLS: (3, -4.0, 1.0, 3, -4.0),
        MARKS: (3, -4.0, 1.0, 3, -4.0),
        WORDS: (3, -3.333, 0.333, 3, -2.0),
        END: (2, -6.5, 1.0, 1, -6.0),
    }


def test_the_gap_by_hand() -> None:
    t = trajectory([["a", "b"]], [-1.0, -2.0])
    gap = gap_of([t], [np.array([9.0, -1.0 + np.log(2), -2.0 - np.log(4)], np.float32)])
    assert gap is not None
    assert gap.mean == pytest.approx(1.5 * np.log(2))
    assert gap.largest == pytest.approx(2 * np.log(2))
    assert (gap.lowest, gap.highest) == pytest.approx((0.25, 2.0))
    assert gap.weight == pytest.approx(1.125)
    assert gap_of([], []) is None


# The command


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["env=math", *CPU, "episodes=4", "hydra.run.dir=run"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "ok"
    assert told["outcome"]["episodes"] == 4
    assert set(told["seconds"]) == {
        *("start", "generate", "environment", "old_logp", "teacher", "update")
    }
    assert told["step_seconds"]["generate"] == pytest.approx(8 * told["seconds"]["generate"])
    assert told["plan"]["gpu_hours"] > 0
    with pytest.raises(SystemExit) as ended:
        main([*words, "rollout.max_response_tokens=2"])
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert len(shown.err.splitlines()) == 2
    assert shown.err.startswith("error: all of 4 episodes are truncated")
    assert "all of 4 episodes" not in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []  # nothing that a run could resume


def test_under_verl_it_plays_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["engine=verl", "engine.gpus_per_node=2", "engine.teacher_gpus_per_node=1", "env=math"]
    assert main([*words, "engine.device=cpu", "episodes=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("engine=verl: the episodes are played in this process")
    assert "GPU-hours on 2 x h100_80gb" in " ".join(shown.split())
    played, _ = flight(*words, episodes=2)
    assert played.gradient is None  # of one process, which FSDP divides over GPUs
    assert as_values(played, project(played, words), None, [])["step_seconds"] is None


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("objective=gkd", "objective=gkd needs more"),
        ("model.student.lora={r: 8, use_dora: true}", "engine=verl trains plain LoRA"),
        ("engine.teacher_gpus_per_node=2", "leaves no GPU for the student"),
        ("+engine.overrides={algorithm.gamma: 0.5}", "'algorithm.gamma' would not act"),
    ],
)
def test_it_refuses_what_verl_cannot_train(
    word: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(playing, "load_models", None)  # nothing is loaded before
    with pytest.raises(ConfigError, match=told):
        flight("engine=verl", "engine.gpus_per_node=2", word, episodes=2)


@pytest.mark.parametrize(
    "words",
    [
        ["gpu=nope"],
        ["gpus=0"],
        ["gpus=2"],
        ["engine=verl", "gpus=12"],
        ["engine=verl", "gpus=8", "engine.nodes=2"],
        ["schedule=shared"],  # the plan's own
        ["measured=RUN"],
    ],
)
def test_hardware_that_makes_no_sense_is_refused_before_anything_is_loaded(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(playing, "load_models", None)
    with pytest.raises(SystemExit) as ended:
        main(["env=math", *words, *CPU])
    assert ended.value.code == 2


def test_a_plan_that_does_not_fit() -> None:
    tiny = Gpu("tiny", 2**29, 1e12, 1e12, 1, "")
    plan = plan_run(["env=math", "engine.precision=float32"], tiny)
    found, *_ = unfit(plan)
    assert found.text.startswith("by the plan: does not fit: student and teacher, ")
    assert found.advice
    assert unfit(plan_run(["env=math"])) == []


def test_nothing_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[LoadedModel] = []

    def load(*arguments: Any, **settings: Any) -> Any:
        student, teachers = load_models(*arguments, **settings)
        loaded.append(student)
        return student, teachers

    monkeypatch.setattr(playing, "load_models", load)
    played, _ = flight("env=math", episodes=2)
    assert played.gradient
    model = loaded[0].adapter.model
    assert all(each.grad is None for each in model.parameters())
    spec = loaded[0].spec
    fresh = load_model(spec, "student", torch.device("cpu")).adapter.model.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


def test_the_words_of_the_command_line() -> None:
    episodes, run, plan = parse(["recipe=paper_agentic", "gpus=8", "hydra.run.dir=a", "seed=1"])
    assert (episodes, run) == (16, ["recipe=paper_agentic", "seed=1"])
    assert plan == ["recipe=paper_agentic", "gpus=8", "seed=1"]
    for word in ("episodes=0", "episodes=x", "--jsn"):
        with pytest.raises(ConfigError):
            parse([word])


def test_settings_of_the_embedded_models_are_refused_for_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["env=math", "seed=-1"])
    assert "seed must not be negative" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["env=math", "seed=0,1"])
    assert "--multirun" not in capsys.readouterr().err  # which this command has not


def test_the_published_figures() -> None:
    assert published(["recipe=paper_agentic"]) == {
        "success": {"pixel": 0.46, "vstar": 0.712},
        "gpu_hours": 120,
    }
    assert published(["recipe=paper_math_7b"]) == {"success": {}, "gpu_hours": 312}
    assert published(["env=math"]) is None


def test_training_offers_it_for_real_models() -> None:
    embedded = config_of()
    assert preflight_note(embedded, Reopold(), resumed=False) is None
    config, _ = composed(
        "model=qwen2_5_vl", "model.student.path=org/s", "model.teacher.path=org/t", "data=none"
    )
    note = preflight_note(config, Reopold(), resumed=False)
    assert note is not None
    assert "reopold preflight" in note
    assert preflight_note(config, Reopold(), resumed=True) is None
