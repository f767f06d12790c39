"""Playing an environment by hand: input, output and records."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from running import composed, environment, train, train_rows

from reopold_agent.data.demonstrations import load_demonstrations
from reopold_agent.envs import ENVS, register_env
from reopold_agent.envs.from_config import make_env
from reopold_agent.envs.registration import task_seed
from reopold_agent.envs.spaces import UnicodeText
from reopold_agent.errors import DataError, ReopoldError
from reopold_agent.play.__main__ import main
from reopold_agent.play.calls import BadWordsError, call_text
from reopold_agent.play.options import split_words
from reopold_agent.play.pictures import answers_sixel, blocks, detect, drawn, iterm, kitty, sixel
from reopold_agent.play.session import play
from reopold_agent.policies.loading import ModelSpec, load_processing
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.demonstrations import demonstrated
from reopold_agent.rollout.from_config import make_runner
from reopold_agent.tools import TOOLS, find_tool_call
from reopold_agent.tools.schema import check_arguments
from reopold_agent.types import IMAGE_MARK


def game(tmp_path: Path, typed: str, *words: str) -> str:
    """What a player sees whose input is a file."""
    out = io.StringIO()
    folder = () if any(w.startswith("folder=") for w in words) else (f"folder={tmp_path / 'p'}",)
    assert play([*words, *folder], io.StringIO(typed), Console(file=out, width=100)) == 0
    return out.getvalue()


def answers(split: str = "train", index: int = 0) -> tuple[str, ...]:
    """What the embedded task's right answers are."""
    env: Any = make_env(composed("env=pixel_reasoner")[0])
    env.reset(options={"split": split, "index": index})
    return tuple(env.unwrapped.episode.task.answers)


# Calls from a few words


def schema(**properties: dict[str, Any]) -> dict[str, Any]:
    required = [name for name, each in properties.items() if not each.pop("optional", False)]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"function": {"name": "look", "parameters": parameters}}


BOX = {"type": "array", "items": {"type": "number"}}
WHOLE: dict[str, Any] = {"type": "integer"}
WORD: dict[str, Any] = {"type": "string"}
MIXED = {
    "where": {"type": "string"},
    "box": BOX,
    "image": {"type": "integer"},
    "sharp": {"type": "boolean", "optional": True},
}


@pytest.mark.parametrize(
    ("properties", "words", "arguments"),
    [
        ({"box": BOX, "image": WHOLE}, "0 0.5 1 2 3", {"box": [0, 0.5, 1, 2], "image": 3}),
        ({"box": BOX, "image": WHOLE}, "image=3 1 2", {"box": [1, 2], "image": 3}),
        ({"box": BOX, "image": WHOLE}, "box=[1,2.5] 4", {"box": [1, 2.5], "image": 4}),
        (MIXED, "'the left' 1 2 7", {"where": "the left", "box": [1, 2], "image": 7}),
        (MIXED, "x 1 7 sharp=true", {"where": "x", "box": [1], "image": 7, "sharp": True}),
        ({"a": WORD, "b": {**WHOLE, "optional": True}}, "7 8", {"a": "7", "b": 8}),
        ({"a": {"type": "object"}}, 'a=\'{"x": 1}\'', {"a": {"x": 1}}),
        ({}, "", {}),
        ({"a": WORD}, '{"a": [1]}', {"a": [1]}),  # as typed, right or wrong
    ],
)  # fmt: skip
def test_words_become_the_arguments(
    properties: dict[str, Any], words: str, arguments: dict[str, Any]
) -> None:
    found = find_tool_call(call_text(schema(**{k: dict(v) for k, v in properties.items()}), words))
    assert found is not None
    assert (found.name, found.arguments) == ("look", arguments)


@pytest.mark.parametrize(
    ("properties", "words", "told"),
    [
        ({"box": BOX, "image": WHOLE}, "3", r"no value is left for box\. .*BOX\.\.\. IMAGE"),
        ({"image": WHOLE}, "1 2", "'2' is one value too many"),
        ({"image": WHOLE}, "1.5", "image must be of type integer, got '1.5'"),
        ({"image": WHOLE}, "true", "image must be of type integer"),
        ({"box": BOX}, "1 x", "box must be of type number, got 'x'"),
        ({"a": BOX, "b": BOX}, "1 2", "name them, as in a=1,2"),
        ({"a": WORD}, "'x", "close the quotation marks"),
    ],
)  # fmt: skip
def test_words_that_make_no_call_are_reported(
    properties: dict[str, Any], words: str, told: str
) -> None:
    with pytest.raises(BadWordsError, match=told):
        call_text(schema(**{k: dict(v) for k, v in properties.items()}), words)


@pytest.mark.parametrize(
    ("tool", "words"), [("crop_image", "0.1 0.1 0.5 0.5 1"), ("select_frames", "1 3 4")]
)
def test_the_packages_tools_take_what_is_made(tool: str, words: str) -> None:
    found = find_tool_call(call_text(TOOLS.get(tool).schema(), words))
    assert found is not None
    assert check_arguments(TOOLS.get(tool).function, found.arguments)


# A game from a file


def test_a_game_is_played_to_its_score(tmp_path: Path) -> None:
    right = answers()[0]
    typed = f"/call crop_image 0 0 0.5 0.5 1\n\\boxed{{{right}}}\n\nno idea\n/quit\nnever read\n"
    seen = game(tmp_path, typed, "env=pixel_reasoner")
    assert "task 0 of 4096 in train (demo-train-0-0), 3 turns" in seen
    assert "Which digit is written" in seen
    assert '"arguments": {"bbox_2d": [0, 0, 0.5, 0.5], "target_image": 1}' in seen
    assert "Here is the cropped image (Image Size: 112x112):" in seen
    assert "right: reward 1, ended by answer" in seen
    assert "task 1 of 4096" in seen
    assert "wrong: reward 0, ended by answer" in seen
    assert f"right answer: {answers(index=1)[0]}" in seen
    assert "2 episodes, 1 right (0.50), mean reward 0.50" in seen
    assert "never read" not in seen
    with Image.open(tmp_path / "p" / "task-0-picture-2.png") as crop:
        assert crop.size == (112, 112)
    assert f"picture 2: 112x112, {tmp_path / 'p' / 'task-0-picture-2.png'}" in seen


def test_the_splits_have_their_own_tasks_and_budgets(tmp_path: Path) -> None:
    four = "evaluation.max_turns=4"
    seen = game(tmp_path, "", "env=pixel_reasoner", "split=eval", "index=3", four)
    assert re.search(r"task 3 of \d+ in eval \(demo-eval-1-3\), 4 turns", seen)
    seen = game(tmp_path, "/task 9\n/task 99999\n/task x\n", "env=math", "rollout.max_turns=1")
    assert "in train" in seen
    assert "task 9 of" in seen
    assert "there is no task 99999" in seen
    assert "/task takes a number" in seen
    with pytest.raises(ReopoldError):
        game(tmp_path, "", "env=pixel_reasoner", "data.train=null", "data.eval=null")


def test_a_tool_error_is_shown_once_and_a_call_in_the_last_turn_ends_it(tmp_path: Path) -> None:
    crop = "/call crop_image 0 0 1 1 9\n"
    seen = game(tmp_path, crop + crop, "env=pixel_reasoner", "rollout.max_turns=2")
    assert seen.count("There is no image 9; the images are numbered 1 to 1.") == 2  # one a call
    assert "wrong: reward 0, ended by max_turns" in seen


def test_commands_show_what_there_is(tmp_path: Path) -> None:
    typed = "/tools\n/system\n/state\n/look 1\n/look 7\n/nothing\n/call nothing 1\n"
    typed += "/call crop_image 0.5 x\n\\boxed{0}\nlate\n/call crop_image 0 0 1 1 1\n/help\n"
    seen = game(tmp_path, typed, "env=pixel_reasoner")
    assert "/call crop_image BBOX_2D... TARGET_IMAGE" in seen
    assert '"name": "select_frames"' in seen
    assert "You are provided with function signatures within <tools></tools>" in seen
    assert "picture 1: shown 28x28, the model sees 112x112, tools work on 224x224" in seen
    assert seen.count("task-0-picture-1.png") == 2  # at the start, and by /look
    assert "there is no picture '7'; there are 1, from 1" in seen
    assert "there is no command /nothing; there are /help" in seen
    assert "there is no tool 'nothing'; there are: crop_image, select_frames" in seen
    assert "target_image must be of type integer, got 'x'" in seen
    assert seen.count("the episode is over, so this was not sent") == 2
    assert "/raw                   a turn of several lines" in seen
    assert "1 episodes, " in seen


# Other people's environments


class Parrot(gymnasium.Env[Any, str]):
    """No `ToolEnv`: what it is told to show and to do is in the action."""

    action_space = UnicodeText(1000)
    observation_space = UnicodeText(1000)
    heard: list[str]
    seeds: list[int | None]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        Parrot.seeds.append(seed)
        if options["index"] == 13:
            raise RuntimeError("unlucky")
        return "say \x1b[31mred\x1b[0m\x07\r\nor\u202e not", {
            "system_prompt": "be\x1b]0;x\x07 kind"
        }

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Parrot.heard.append(action)
        if action == "crash":
            raise ValueError("it broke")
        if action == "hang":
            threading.Event().wait(60)
        if action == "picture":
            return np.full((4, 6, 3), 9, np.uint8), 0.25, False, False, {}
        if action == "both":
            shown = {"text": f"a{IMAGE_MARK}b", "images": (np.zeros((2, 2, 3), np.uint8),)}
            return shown, 0.0, False, False, {}
        if action == "odd":
            return 42, 0.0, False, False, {}
        return "", float(action == "win"), action in ("win", "lose"), False, {}


@pytest.fixture
def parrot() -> Iterator[str]:
    Parrot.heard, Parrot.seeds = [], []
    config = {"rollout": {"max_turns": 4}, "evaluation": {"max_turns": 4}}
    register_env("parrot", id="test/Parrot-v0", entry_point=Parrot, config=config)
    yield "env=parrot"
    gymnasium.registry.pop("test/Parrot-v0")
    del ENVS._things["parrot"]


def test_an_environment_without_tools_or_tasks_is_played(tmp_path: Path, parrot: str) -> None:
    seen = game(tmp_path, "picture\nboth\nodd\nwin\n\nlose\n/tools\n/system\n", parrot)
    assert "task 0 of 1048576 in train (train-0), 4 turns" in seen
    assert "picture 1: 6x4" in seen
    assert re.search(r"\na\npicture 2: 2x2, \S+\nb\n", seen)
    assert "\n42\n" in seen
    assert "right: reward 1.25, ended by answer" in seen
    assert "right answer" not in seen  # nobody knows it
    assert "2 episodes, 1 right (0.50), mean reward 0.62" in seen
    assert "this environment has no tools" in seen
    assert Parrot.seeds == [task_seed("train", 0), task_seed("train", 1)]
    game(tmp_path, "lose\n", parrot, "seed=5")
    assert Parrot.seeds[-1] == 5


def test_what_the_player_says_arrives_word_for_word(tmp_path: Path, parrot: str) -> None:
    call = '<tool_call>\n{"name": "x"}\n</tool_call>'
    typed = f" spaces kept \n{call} and more\n/raw\n/quit is said\n\n  </think>\n/end\n"
    game(tmp_path, typed + "<tool_call> open\n/end\n", parrot)
    assert Parrot.heard == [
        " spaces kept ",
        f"{call} and more",
        "/quit is said\n\n  </think>",
        "<tool_call> open",
    ]


def test_a_failing_environment_loses_its_episode_only(tmp_path: Path, parrot: str) -> None:
    seen = game(tmp_path, "crash\nwin\n/task 13\nwin\n/task 2\nwin\n", parrot)
    assert "the environment failed in step" in seen
    assert "it broke" in seen
    assert "wrong: reward 0, ended by env_error" in seen
    assert "the environment failed in reset" in seen
    assert Parrot.heard == ["crash", "win"]  # nothing is sent between episodes
    assert "2 episodes, 1 right" in seen


def test_an_environment_that_hangs_is_given_up(tmp_path: Path, parrot: str) -> None:
    started = time.monotonic()
    typed = "hang\nwin\n/next\nwin\n"
    seen = game(tmp_path, typed, parrot, "rollout.env_seconds=0.5")
    assert time.monotonic() - started < 30
    told = "failed in step: it did not answer within 0.5 s (rollout.env_seconds).\nAnother task"
    assert told in seen
    assert "Traceback" not in seen
    assert Parrot.heard == ["hang", "win"]
    assert "2 episodes, 1 right" in seen  # of a new environment


def test_the_budget_of_turns_ends_an_episode(tmp_path: Path, parrot: str) -> None:
    seen = game(tmp_path, "odd\n" * 5, parrot, "rollout.max_turns=3")
    assert Parrot.heard == ["odd"] * 3
    assert "ended by max_turns" in seen


def test_texts_cannot_steer_the_terminal(tmp_path: Path, parrot: str) -> None:
    seen = game(tmp_path, "/system\n\x1b[2Jwin\n", parrot)
    assert not [c for c in seen if not c.isprintable() and c != "\n"]
    assert "say  [31mred [0m \nor  not" in seen
    assert "be ]0;x  kind" in seen
    assert Parrot.heard == ["\x1b[2Jwin"]  # what is said is the player's own


# Recording


def test_a_recorded_game_is_a_demonstration(tmp_path: Path) -> None:
    file = tmp_path / "mine" / "human.jsonl"
    right = answers(index=1)[0]
    typed = f"\\boxed{{none}}\n\n/call crop_image 0 0 0.5 1 1\n<image> is it \\boxed{{{right}}}\n"
    words = ("env=pixel_reasoner", f"record={file}", "tokenizer=demo:student")
    seen = game(tmp_path, typed, *words)
    assert "not recorded: it is wrong" in seen
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [(r["id"], r["success"], r["index"]) for r in rows] == [("demo-train-0-1", True, 1)]
    (found,) = load_demonstrations({"path": str(file)})
    assert [turn.role for turn in found.turns] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert found.turns[-1].parts == (f"<image> is it \\boxed{{{right}}}",)  # no picture, only words
    # The ids that training makes of it are those that the game counted.
    config, _ = composed("env=pixel_reasoner")
    processing = load_processing(ModelSpec("demo:student"), "student")
    chat = ChatRenderer(processing.tokenizer)
    runner = make_runner(config, chat, processing.vision, max_turns=3)
    trajectory = demonstrated(found, 0, runner)
    shown = processing.vision
    assert shown is not None
    env: Any = make_env(config)
    observation, _ = env.reset(options={"split": "train", "index": 1})
    first = shown.encode(observation["images"][0], runner.prompt_pixels)
    assert np.array_equal(trajectory.images[0].pixels, first.pixels)
    counted = [int(n) for n in re.findall(r"prompt (\d+) tokens", seen)][-1]
    assert trajectory.prompt_length == counted
    used = [int(n) for n in re.findall(r"(\d+) of \d+ used", seen)][-1]
    assert len(trajectory.ids) == counted + used

    game(tmp_path, typed, *words[:2], "keep=all")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [r["success"] for r in rows] == [True, False, True]
    assert len(list((file.parent / "human_pictures").iterdir())) == 3  # equal ones are one file


def test_earlier_turns_of_a_row_are_shown_counted_and_recorded(tmp_path: Path) -> None:
    turns = [("user", "What is 2 + 2?"), ("assistant", "4, of course."), ("user", "And 3 + 4?")]
    row = {
        "data_source": "own",
        "prompt": [{"role": role, "content": text} for role, text in turns],
        "reward_model": {"ground_truth": "7"},
    }
    rows, file = tmp_path / "rows.jsonl", tmp_path / "human.jsonl"
    rows.write_text(json.dumps(row) + "\n", "utf-8")
    words = ["env=math", "data=verl", f"data.train.path={rows}", f"data.eval.path={rows}"]
    typed = "\\boxed{7}\n"
    model = "demo:arithmetic_student"
    seen = game(tmp_path, typed, *words, f"record={file}", f"tokenizer={model}")
    assert "earlier turn of the assistant:\n4, of course.\n" in seen
    config, _ = composed(*words)
    processing = load_processing(ModelSpec(model), "student")
    chat = ChatRenderer(processing.tokenizer, stop_at_tool_call=config.rollout.stop_at_tool_call)
    runner = make_runner(config, chat, processing.vision, max_turns=1)
    env: Any = make_env(config)
    ids, _ = runner.prompt(*env.reset(options={"split": "train", "index": 0}))
    assert f"prompt {len(ids)} tokens" in seen
    # Nothing is trained on an answer that the row brought along.
    (found,) = load_demonstrations({"path": str(file)})
    assert [turn.trained for turn in found.turns if turn.role == "assistant"] == [False, True]
    trajectory = demonstrated(found, 0, runner)
    answer = chat.turn_ids("\\boxed{7}")
    assert trajectory.ids.tolist() == [*ids, *answer]
    assert trajectory.loss_mask.sum() == len(answer)


def test_a_student_is_trained_on_what_was_played(tmp_path: Path) -> None:
    file = tmp_path / "human.jsonl"
    typed = "".join(f"\\boxed{{{answers(index=i)[0]}}}\n\n" for i in range(4))
    game(tmp_path, typed, "env=pixel_reasoner", f"record={file}")
    words = ("env=pixel_reasoner", "objective=sft", "objective.source=recorded", "steps=1",
             "model.teacher=null", "evaluation.teacher=false", "evaluation.every=0")  # fmt: skip
    train(tmp_path / "run", *words, f"+data.demonstrations={{path: {file}}}")
    (row,) = train_rows(tmp_path / "run")
    assert np.isfinite(row["loss"])
    assert row["loss"] > 0


def test_an_impossible_record_file_is_refused_before_the_game(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must end in \.jsonl"):
        game(tmp_path, "", "env=math", f"record={tmp_path / 'x.json'}")
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be written: Is a directory"):
        game(tmp_path, "", "env=math", f"record={tmp_path / 'dir.jsonl'}")


@pytest.mark.parametrize(("most", "ended"), [(40, "max_tokens"), (41, "answer")])
def test_tokens_end_an_episode_as_in_a_rollout(tmp_path: Path, most: int, ended: str) -> None:
    # A call of 17 tokens and a result of 23: the student needs room for one more.
    words = (f"rollout.max_response_tokens={most}", "rollout.max_turn_tokens=10")
    seen = game(
        tmp_path, "/call crop_image 0 0 1 1 1\n\\boxed{1}\n", "tokenizer=demo:student", *words
    )
    assert f"turn 17 tokens; a model would be cut off after 10; 17 of {most} used" in seen
    assert (
        f"observation 23 tokens (pictures as the model sees them: 56x56 = 4); 40 of {most}" in seen
    )
    assert ("a rollout would end here, out of tokens" in seen) == (ended == "max_tokens")
    assert f"ended by {ended}" in seen


def test_only_counting_tokens_loads_pytorch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom reopold_agent.play.__main__ import main\n"
        f"main(['env=pixel_reasoner', 'folder={tmp_path}'])\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="/call crop_image 0 0 1 1 1\n\\boxed{1}\n",
        capture_output=True, text=True, timeout=120, env=environment(), cwd=tmp_path, check=True,
    )  # fmt: skip
    assert "ended by answer" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


# Words of the command


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("pictures=jpeg", "pictures must be one of auto, path"),
        ("split=test", "split is train or eval, got 'test'"),
        ("keep=some", "keep is right or all"),
        ("index=-1", "index must be a whole number from 0"),
        ("seed=x", "seed must be a whole number"),
        ("env=pixel_resoner", "Did you mean 'pixel_reasoner'"),
        ("rollout.max_turn=3", "rollout"),
        ("index=99999", ""),
    ],
)
def test_wrong_words_end_in_two_lines(
    word: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    if not told:  # a task that is not there is no reason to stop: another can be chosen
        assert main([word]) == 0
        assert "there is no task 99999" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as ended:
        main([word])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) <= 2


def test_own_settings_are_separated_from_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    options, rest = split_words(["env=math", "index=4", "pictures=path", "data.train.split=x"])
    assert (options.index, options.pictures) == (4, "path")
    assert rest == ["env=math", "data.train.split=x"]
    assert main(["--help"]) == 0
    assert "record=FILE.jsonl" in capsys.readouterr().out


# Pictures in terminals


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, "path"),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, "path"),
        ({"KITTY_WINDOW_ID": "1"}, "path"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, "path"),
        ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app"}, "path"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, "path"),
    ],
)
def test_terminals_are_known_by_their_variables(variables: dict[str, str], mode: str) -> None:
    assert detect(variables, True) == mode
    assert detect(variables, False, lambda: pytest.fail("a pipe is not asked")) == "path"


def test_unknown_terminals_are_asked_and_dumb_ones_are_not() -> None:
    assert detect({"TERM": "xterm"}, True, lambda: True) == "sixel"
    assert detect({"TERM": "tmux-256color", "TMUX": "x"}, True, lambda: True) == "sixel"
    assert detect({"TERM": "xterm"}, True, lambda: False) == "path"
    assert detect({"TERM": "dumb"}, True, lambda: pytest.fail("asked")) == "path"


@pytest.mark.parametrize(
    ("answer", "sixel_known"),
    [(b"\x1b[?62;4;22c", True), (b"\x1b[?64;14;22c", False), (b"\x1b[?4c", False), (b"", False)],
)  # fmt: skip
def test_a_terminal_is_asked_for_sixel_and_never_waited_for_long(
    answer: bytes, sixel_known: bool
) -> None:
    ours, theirs = pty.openpty()

    class Answering(io.StringIO):
        def write(self, text: str) -> int:
            assert text == "\x1b[c"
            os.write(ours, answer)
            return len(text)

    with os.fdopen(theirs, "r") as source:
        started = time.monotonic()
        assert answers_sixel(source, Answering()) is sixel_known
        assert time.monotonic() - started < 20
        os.write(ours, b"typed\n")  # what was typed before is not taken for the answer
        select.select([source], [], [], 10)
        assert answers_sixel(source, io.StringIO()) is False
        assert source.readline() == "typed\n"
    os.close(ours)


def photo(width: int, height: int) -> Image.Image:
    rows = np.arange(height)[:, None, None] * 255 // max(1, height - 1)
    columns = np.arange(width)[None, :, None] * 255 // max(1, width - 1)
    pixels = np.concatenate([rows + 0 * columns, columns + 0 * rows, 0 * (rows + columns)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_kittys_pieces_are_the_picture() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(image, 33))
    assert len(pieces) > 1
    assert pieces[0][0] == "a=T,f=100,q=2,c=33,m=1"
    assert [keys for keys, _ in pieces[1:]] == ["m=1"] * (len(pieces) - 2) + ["m=0"]
    assert all(len(data) <= 4096 for _, data in pieces)
    png = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in pieces))))
    assert np.array_equal(np.asarray(png), np.asarray(image))


def test_iterms_picture_has_its_length() -> None:
    image = photo(20, 10)
    found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);width=9:(.*)\x07", iterm(image, 9))
    assert found is not None
    png = base64.b64decode(found.group(2))
    assert len(png) == int(found.group(1))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(image))


def test_half_blocks_hold_two_pixels_each() -> None:
    image = photo(3, 5)
    lines = blocks(image, 80).splitlines()
    cells = [re.findall(r"38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", line) for line in lines]
    rows = np.array(cells, dtype=int).reshape(3, 3, 2, 3).transpose(0, 2, 1, 3).reshape(6, 3, 3)
    assert np.array_equal(rows[:5], np.asarray(image))
    assert all(line.endswith("\x1b[0m") for line in lines)
    assert len(blocks(photo(300, 100), 40).splitlines()) == 7  # 40 x 13 pixels


def decoded_sixel(text: str) -> np.ndarray[Any, Any]:
    """Reads sixel as a terminal does; written from the VT300 manual, not from our encoder."""
    head = re.match(r'\x1bPq"1;1;(\d+);(\d+)', text)
    assert head is not None
    assert text.endswith("\x1b\\")
    width, height = int(head.group(1)), int(head.group(2))
    pixels = np.full((height, width, 3), -1)
    palette: dict[int, tuple[int, ...]] = {}
    x = y = colour = 0
    body = text[head.end() : -2]
    token = re.compile(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|(\$)|(-)")
    for m in token.finditer(body):
        if m.group(1):
            palette[int(m.group(1))] = tuple(int(v) * 255 / 100 for v in m.groups()[1:4])
        elif m.group(5):
            colour = int(m.group(5))
        elif m.group(9):
            x = 0
        elif m.group(10):
            x, y = 0, y + 6
        else:
            bits, length = ord(m.group(7) or m.group(8)) - 63, int(m.group(6) or 1)
            for row in range(6):
                if bits >> row & 1:
                    pixels[y + row, x : x + length] = palette[colour]
            x += length
    assert "".join(m.group() for m in token.finditer(body)) == body
    return pixels


@pytest.mark.parametrize("size", [(40, 31), (1, 1), (7, 6)])
def test_sixel_draws_the_picture(size: tuple[int, int]) -> None:
    image = photo(*size)
    pixels = decoded_sixel(sixel(image))
    assert pixels.shape == (size[1], size[0], 3)
    assert (pixels >= 0).all()  # every pixel is set
    assert np.abs(pixels - np.asarray(image)).mean() < 12


def test_every_way_fits_the_terminal() -> None:
    wide = photo(3000, 20)
    assert drawn(wide, "path", 100) == ""
    assert "c=49," in drawn(wide, "kitty", 50)
    assert "width=49:" in drawn(wide, "iterm", 50)
    assert '"1;1;490;' in drawn(wide, "sixel", 50)
    assert "c=20," in drawn(photo(28, 28), "kitty", 50)  # a small crop is enlarged
    assert "c=6," in drawn(photo(100, 1000), "kitty", 100)
    assert len(drawn(photo(100, 1000), "blocks", 100).splitlines()) == 30


def test_pictures_are_drawn_where_asked_for(tmp_path: Path) -> None:
    assert "▀" in game(tmp_path, "", "env=pixel_reasoner", "pictures=blocks")
    assert "▀" not in game(tmp_path, "", "env=pixel_reasoner")
    assert "\x1b_Ga=T" in game(tmp_path, "", "env=pixel_reasoner", "pictures=kitty")


# At a terminal


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, tmp_path: Path, *words: str, term: str = "xterm-256color") -> None:
        self._ours, theirs = pty.openpty()
        self.seen = ""
        variables = {**environment(), "TERM": term, "PYTHONUNBUFFERED": "1"}
        for name in ("TMUX", "KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL"):
            variables.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "reopold_agent.play", *words, f"folder={tmp_path}"],
            stdin=theirs, stdout=theirs, stderr=theirs, env=variables, cwd=tmp_path,
            start_new_session=True, preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str) -> str:
        """Reads until the text appears; what was read before it is dropped."""
        end = time.monotonic() + 90
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self._ours], [], [], 1)[0]:
                try:
                    self.seen += os.read(self._ours, 65536).decode("utf-8", "replace")
                except OSError:  # the process has ended
                    assert text in self.seen, f"it ended: {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            os.close(self._ours)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str, **settings: str) -> Terminal:
        opened.append(Terminal(tmp_path, *words, **settings))
        return opened[-1]

    yield start
    for each in opened:
        each.process.kill()


def test_a_player_at_a_terminal(terminal: Callable[..., Terminal]) -> None:
    play_it = terminal("env=pixel_reasoner")
    play_it.wait_for("task 0 of 4096")
    play_it.wait_for("> ")
    play_it.type("/sta\t\r")  # the tab completes
    play_it.wait_for("turn 0 of 3")
    play_it.wait_for("> ")
    play_it.type("/call cr\t0 0 1 1 tar\t")
    play_it.wait_for("target_image=")
    play_it.type("\x7f1\r")  # completion leaves a space, which is taken back
    play_it.wait_for("picture 2: 224x224")
    play_it.wait_for("> ")
    play_it.type("\x1b[A\r")  # the arrow brings the line back
    play_it.wait_for("picture 3: 224x224")
    play_it.wait_for("> ")
    play_it.type("\\boxed{x}\r")
    play_it.wait_for("ended by answer")
    play_it.wait_for("> ")
    play_it.type("\x04")  # end of input
    play_it.wait_for("1 episodes, 0 right")
    assert play_it.close() == 0


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_ctrl_c_ends_with_the_score(terminal: Callable[..., Terminal], term: str) -> None:
    play_it = terminal("env=math", term=term)
    shown = play_it.wait_for("> ")
    assert ("\x1b" in shown) == (term != "dumb")
    play_it.type("half a li")
    play_it.wait_for("half a li")
    time.sleep(
        0.3
    )  # a signal before readline waits for input would only be seen after the next key
    play_it.type("\x03")
    play_it.wait_for("No episode was finished.")
    assert "Traceback" not in play_it.seen
    assert play_it.close() == 130
