"""The example plugins, installed in separate folders and used from other processes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import write_plugin

from reopold_agent.config import OUTCOME_DEFAULTS

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def install(work: Path, *examples: str) -> Path:
    """The folder that pip installed examples into."""
    # Copies, because a build leaves its folders beside pyproject.toml.
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    sources = [shutil.copytree(EXAMPLES / each, work / each, ignore=ignored) for each in examples]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(work / "site"), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return work / "site"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example environment and its tools."""
    return install(tmp_path_factory.mktemp("plugin"), "reopold_rotated")


@pytest.fixture(scope="module")
def objective(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example objective."""
    return install(tmp_path_factory.mktemp("objective"), "reopold_objective")


def start(*arguments: str, path: list[Path], cwd: Path, timeout: float = 120) -> Any:
    """Runs this Python with ``path`` on its import path."""
    folders = os.pathsep.join(map(str, [*path, REPOSITORY]))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def answer_of(code: str, *path: Path, cwd: Path) -> Any:
    """What a program prints as JSON on its last line; its errors are this test's."""
    done = start("-W", "error", "-c", textwrap.dedent(code), path=list(path), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Discovery

ENVIRONMENTS = ["geometry", "math", "pixel_reasoner", "rotated_digits"]

LISTS = """
    import json, gymnasium, reopold_agent.envs
    from reopold_agent.envs import ENVS
    from reopold_agent.tools import TOOLS
    print(json.dumps([ENVS.names(), TOOLS.names()]))
"""


def test_installing_it_is_all_it_takes(installed: Path, tmp_path: Path) -> None:
    envs, tools = answer_of(LISTS, installed, cwd=tmp_path)
    assert envs == ENVIRONMENTS
    assert tools == ["brighten_image", "crop_image", "rotate_image", "select_frames"]
    envs, tools = answer_of(LISTS, cwd=tmp_path)
    assert "rotated_digits" not in envs
    assert "rotate_image" not in tools


def test_it_is_imported_from_where_it_was_installed_and_only_when_needed(
    installed: Path, tmp_path: Path
) -> None:
    code = """
        import json, sys
        import reopold_agent.envs, reopold_agent.tools
        before = "reopold_rotated" in sys.modules
        from reopold_agent.envs import load_env
        load_env("pixel_reasoner")
        known = "reopold_rotated" in sys.modules
        load_env("rotated_digits")
        import reopold_rotated
        heavy = "reopold_rotated.env" in sys.modules
        print(json.dumps([before, known, heavy, reopold_rotated.__file__]))
    """
    before, known, heavy, file = answer_of(code, installed, cwd=tmp_path)
    assert (before, known, heavy) == (False, False, False)
    assert Path(file).is_relative_to(installed)


def test_a_broken_plugin_is_named_and_stops_no_other(installed: Path, tmp_path: Path) -> None:
    broken = write_plugin(
        tmp_path / "site",
        "broken",
        """
        [reopold_agent.envs]
        a_broken_env = broken_env
        [reopold_agent.tools]
        a_broken_tool = broken_tool:gone
        a_string = broken_tool:not_a_tool
        a_missing_module = no_such_module
        """,
        broken_env="raise RuntimeError('cannot work here')",
        broken_tool="not_a_tool = 'text'",
    )
    code = """
        import json, logging
        heard = []
        class Ear(logging.Handler):
            def emit(self, record): heard.append((record.levelname, record.getMessage()))
        logging.getLogger("reopold_agent").addHandler(Ear())
        from reopold_agent.envs import ENVS
        from reopold_agent.tools import TOOLS
        print(json.dumps([ENVS.names(), TOOLS.names(), heard]))
    """
    envs, tools, heard = answer_of(code, broken, installed, cwd=tmp_path)
    assert envs == ENVIRONMENTS
    assert tools == ["brighten_image", "crop_image", "rotate_image", "select_frames"]
    assert {level for level, _ in heard} == {"WARNING"}
    words = {name: text for _, text in heard for name in BROKEN if f"'{name}'" in text}
    assert len(heard) == len(words) == len(BROKEN)
    for name, reason in BROKEN.items():
        assert reason in words[name]


BROKEN = {
    "a_broken_env": "cannot work here",
    "a_broken_tool": "gone",
    "a_string": "str",
    "a_missing_module": "no_such_module",
}


def test_a_plugin_cannot_take_a_name_of_the_core(tmp_path: Path) -> None:
    thief = write_plugin(
        tmp_path / "site",
        "thief",
        "[reopold_agent.tools]\ncrop_image = thief_tool\n",
        thief_tool="""
            from reopold_agent.tools import EpisodeState, ToolResult, tool
            @tool("zoom_in")
            def zoom_in(state: EpisodeState) -> ToolResult:
                "Does something else."
                return ToolResult("mine")
        """,
    )
    code = """
        import json
        from reopold_agent.tools import TOOLS, crop_image
        TOOLS.names()
        print(json.dumps([TOOLS.get("zoom_in") is crop_image, TOOLS.failures]))
    """
    kept, failures = answer_of(code, thief, cwd=tmp_path)
    assert kept
    assert "two tools are called 'zoom_in'" in failures["crop_image"]


def test_a_judge_of_another_package_grades(tmp_path: Path) -> None:
    site = write_plugin(
        tmp_path / "site",
        "lenient",
        "[reopold_agent.judges]\nlenient = lenient_judge:JUDGE\nrules = lenient_judge:JUDGE\n",
        lenient_judge="""
            from reopold_agent.judges import Judge, Verdict
            def grade(response, answers):
                return Verdict(answers[0] in response, response)
            JUDGE = Judge("lenient", grade)
        """,
    )
    code = """
        import json
        from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
        from reopold_agent.errors import UnknownNameError
        from reopold_agent.judges import JUDGES
        out = []
        for judge in ("rules", "lenient"):
            env = PixelReasonerEnv(judge=judge)
            env.reset(options={"split": "eval", "index": 0})
            digit = env.load_tasks("eval")[0].answers[0]
            _, reward, terminated, _, info = env.step(f"perhaps {digit}")
            out.append([reward, terminated, info["success"]])
        try:
            PixelReasonerEnv(judge="lenienr")
        except UnknownNameError as error:
            out.append(str(error))
        out.append(JUDGES.names())
        print(json.dumps(out))
    """
    assert answer_of(code, site, cwd=tmp_path) == [
        [0.0, True, False],
        [1.0, True, True],
        "no judge is called 'lenienr'. Did you mean 'lenient'? Known: lenient, rules.",
        ["lenient", "rules"],
    ]


# The environment


def test_it_keeps_gymnasiums_contract(installed: Path, tmp_path: Path) -> None:
    code = """
        import json, gymnasium, reopold_agent.envs
        from gymnasium.utils.env_checker import check_env
        from reopold_agent.envs import load_env
        made = gymnasium.make(load_env("rotated_digits").id, render_mode="rgb_array")
        check_env(made.unwrapped)
        print(json.dumps(list(made.reset(seed=1)[0]["images"][0].shape)))
    """
    assert answer_of(code, installed, cwd=tmp_path) == [28, 28, 3]


EPISODE = """
    import json, gymnasium, numpy as np, reopold_agent.envs
    from PIL import ImageEnhance
    from reopold_agent.demo.tasks import DemoTasks
    from reopold_agent.envs import load_env

    env = gymnasium.make(load_env("rotated_digits").id, disable_env_checker=True)
    out = []
    for index in range(3):
        observation, info = env.reset(options={"split": "eval", "index": index})
        task = env.unwrapped.load_tasks("eval", size=4096, seed=0)[index]
        original = DemoTasks("eval", 4096, 0, video_share=0.0)[index]
        row, column = original.metadata["cell"]
        box = [column / 4, row / 4, (column + 1) / 4, (row + 1) / 4]
        calls = [
            ("rotate_image", {"target_image": 1, "degrees": task.metadata["degrees"]}),
            ("brighten_image", {"target_image": 2, "factor": 1 / task.metadata["brightness"]}),
            ("crop_image", {"target_image": 3, "bbox_2d": box}),
        ]
        seen = []
        for name, arguments in calls:
            call = json.dumps({"name": name, "arguments": arguments})
            observation, *_, info = env.step(f"<tool_call>{call}</tool_call>")
            assert info["tool_call"].ok, observation["text"]
            seen.append(observation)
        upright = original.images[0].open()
        dark = ImageEnhance.Brightness(upright).enhance(task.metadata["brightness"])
        cell = np.asarray(upright)[row * 56 : row * 56 + 56, column * 56 : column * 56 + 56]
        _, reward, terminated, *_ = env.step("\\\\boxed{" + original.answers[0] + "}")
        out.append([
            bool((seen[0]["images"][0] == np.asarray(dark)).all()),
            int(np.abs(seen[2]["images"][0].astype(int) - cell.astype(int)).max()),
            seen[2]["text"].split(":")[0],
            reward,
            terminated,
        ])
    print(json.dumps(out))
"""


def test_an_episode_solved_by_its_tools(installed: Path, tmp_path: Path) -> None:
    for upright, difference, words, reward, terminated in answer_of(
        EPISODE, installed, cwd=tmp_path
    ):
        assert upright
        assert difference <= 10  # brightness 0.1 leaves a tenth of the 256 steps
        assert words == "Here is the cropped image (Image Size"
        assert (reward, terminated) == (1.0, True)


def test_its_tools_run_in_worker_processes(installed: Path, tmp_path: Path) -> None:
    made = "disable_env_checker=True"
    assert made in EPISODE
    code = textwrap.dedent(EPISODE.replace(made, f"{made}, tool_isolation='plugins'"))
    code += textwrap.dedent("""
        processes = env.unwrapped._runners["rotate_image"]
        print(json.dumps([out, len(processes.pids()), sorted(
            name for name, runs in env.unwrapped._runners.items() if runs is processes
        )]))
    """)
    inside, count, names = answer_of(code, installed, cwd=tmp_path)
    assert inside == answer_of(EPISODE, installed, cwd=tmp_path)
    assert count == 1
    assert names == ["brighten_image", "rotate_image"]  # crop_image is not a plugin's


def test_what_the_plugins_tools_refuse(installed: Path, tmp_path: Path) -> None:
    code = """
        import json
        from PIL import Image
        from reopold_agent.tools import TOOLS, EpisodeState
        from reopold_agent.types import Task
        state = EpisodeState(Task("t", "?", ("1",)), [Image.new("RGB", (40, 30), (10, 20, 30))])
        def said(name, **arguments):
            call, result = TOOLS.get(name).call(state, arguments)
            return [call.ok, call.error, [list(i.size) for i in result.images]]
        print(json.dumps([
            said("rotate_image", target_image=1, degrees=90),
            said("rotate_image", target_image=1, degrees=45),
            said("brighten_image", target_image=2),
            said("brighten_image", target_image=1, factor=11),
            list(TOOLS.get("brighten_image").call(state, {"target_image": 1})[1]
                 .images[0].getpixel((0, 0))),
        ]))
    """
    turned, wrong_turn, no_image, too_bright, pixel = answer_of(code, installed, cwd=tmp_path)
    assert turned == [True, None, [[30, 40]]]
    assert wrong_turn == [False, "'degrees' must be one of 90, 180, 270, got 45.", []]
    assert no_image[1] == "There is no image 2; the images are numbered 1 to 1."
    assert too_bright[1] == "'factor' must be above 0 and at most 10, got 11."
    assert pixel == [40, 80, 120]


def test_its_tasks_are_the_same_in_every_process(installed: Path, tmp_path: Path) -> None:
    code = """
        import hashlib, json
        from reopold_rotated.tasks import RotatedDigits
        def mark(task):
            pixels = task.images[0].open().tobytes()
            return [task.id, task.answers, hashlib.sha256(pixels).hexdigest()]
        sets = [RotatedDigits("train"), RotatedDigits("eval"), RotatedDigits("train", seed=1)]
        print(json.dumps([mark(tasks[i]) for tasks in sets for i in range(3)]))
    """
    first = answer_of(code, installed, cwd=tmp_path)
    assert first == answer_of(code, installed, cwd=tmp_path)
    assert len({digest for *_, digest in first}) == 9


# The command line


def train(*overrides: str, path: list[Path], cwd: Path, timeout: float = 300) -> Any:
    return start("-m", "reopold_agent.train", *overrides, path=path, cwd=cwd, timeout=timeout)


def test_its_configuration_is_composed_and_wins_over_the_models(
    installed: Path, tmp_path: Path
) -> None:
    from omegaconf import OmegaConf

    done = train("env=rotated_digits", "--cfg", "job", path=[installed], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    composed = OmegaConf.create(done.stdout)  # resolves the model's references
    assert composed["env"] == {
        "name": "rotated_digits",
        "id": "reopold_rotated/RotatedDigits-v0",
        "takes_data": False,
        "kwargs": {"tool_time_limit_s": 20.0},
    }
    # What the plugin sets is its own, what it does not is the model's.
    assert composed["rollout"]["max_turns"] == 4
    assert composed["rollout"]["max_response_tokens"] == 320
    assert composed["rollout"]["max_turn_tokens"] == 64
    assert composed["evaluation"]["max_turns"] == 4
    # The command line is above both.
    done = train(
        "env=rotated_digits", "rollout.max_turns=7", "--cfg", "job", path=[installed], cwd=tmp_path
    )
    assert OmegaConf.create(done.stdout)["rollout"]["max_turns"] == 7


def test_a_misspelt_environment_is_refused_with_the_closest_name(
    installed: Path, tmp_path: Path
) -> None:
    done = train("env=rotated_digit", path=[installed], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: no environment is called 'rotated_digit'.",
        f"  Did you mean 'rotated_digits'? Known: {', '.join(ENVIRONMENTS)}.",
    ]


def test_a_plugins_unknown_section_is_refused(tmp_path: Path) -> None:
    site = write_plugin(
        tmp_path / "site",
        "odd",
        "[reopold_agent.envs]\nodd = odd_env\n",
        odd_env="""
            from reopold_agent.envs import register_env
            register_env("odd", id="odd/Odd-v0", entry_point="odd_env:Env", config={"rolout": {}})
        """,
    )
    done = train("env=odd", path=[site], cwd=tmp_path)
    assert done.returncode == 2
    assert "environment 'odd': unknown sections rolout" in done.stderr


@pytest.mark.slow
def test_two_steps_of_training(installed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(
        "env=rotated_digits",
        "steps=2",
        "batch.prompts=4",
        "batch.mini_batch=4",
        "evaluation.tasks=4",
        "evaluation.every=0",
        f"hydra.run.dir={run}",
        path=[installed],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [0, 1]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    # The prompt offers the plugin's tools, and the tasks are the plugin's.
    trajectories = [json.loads(s) for s in (run / "trajectories.jsonl").read_text().splitlines()]
    assert len(trajectories) >= 2
    assert all("rotated-train-0-" in row["task_id"] for row in trajectories)
    assert all(
        '"name": "rotate_image"' in json.dumps(row).replace('\\"', '"') for row in trajectories
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["env"] == "rotated_digits"
    assert summary["after"]["n"] == 4


# An objective


OBJECTIVES = ["eopd", "exopd", "gkd", "grpo", "iw_opd", "reopold", "rkl", "rkl_sg", "rkl_sg_clip",
              "rkl_sg_clip_entropy", "sft", "skew_rkl", "sod"]  # fmt: skip


def test_an_installed_objective_is_an_option_with_its_fields_as_settings(
    objective: Path, tmp_path: Path
) -> None:
    import yaml

    done = train("objective=clamped_rkl", "--cfg", "job", path=[objective], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    composed = yaml.safe_load(done.stdout)
    own = {"name": "clamped_rkl", "limit": 2.5, "first_steps": 0}
    common = {"importance_cap": 2.0, "threshold_over": "batch", "normalise_over": "batch"}
    assert composed["objective"] == {**own, **common, **OUTCOME_DEFAULTS}
    assert composed["default_batch"] == "single"
    for words, told in (
        ("objective.limit=0", "objective.limit must be positive, got 0.0"),
        ("+objective.limits=1", "'objective.limits'.\n  Did you mean 'objective.limit'?"),
    ):
        done = train("objective=clamped_rkl", words, path=[objective], cwd=tmp_path)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_a_misspelt_objective_is_refused_with_the_closest_name(
    objective: Path, tmp_path: Path
) -> None:
    done = train("objective=clamped_rk", path=[objective], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: no objective is called 'clamped_rk'.",
        f"  Did you mean 'clamped_rkl'? Known: {', '.join(sorted([*OBJECTIVES, 'clamped_rkl']))}.",
    ]


BAD_OBJECTIVES = {
    "gone": "no_such_module",
    "raises": "cannot work here",
    "a_function": "it points to a function",
    "undecorated": "is not a dataclass derived from",
    "foreign": "is not a dataclass derived from",
    "odd_default": "a default of its settings is not a plain value",
    "grpo": "two objectives are called 'grpo'",
}


def test_a_broken_objective_is_named_and_stops_no_other(objective: Path, tmp_path: Path) -> None:
    broken = write_plugin(
        tmp_path / "site",
        "broken",
        """
        [reopold_agent.objectives]
        gone = no_such_module
        raises = broken_objective_raises
        a_function = broken_objective:function
        undecorated = broken_objective:Undecorated
        foreign = broken_objective:Foreign
        odd_default = broken_objective:OddDefault
        grpo = broken_objective:Good
        must_be_set = broken_objective:MustBeSet
        """,
        broken_objective_raises="raise RuntimeError('cannot work here')",
        broken_objective="""
            from dataclasses import dataclass, field
            from reopold_agent.objectives import Needs, Objective

            def function(): ...

            class Undecorated(Objective): ...

            @dataclass(frozen=True)
            class Foreign: ...

            @dataclass(frozen=True)
            class OddDefault(Objective):
                thing: object = field(default_factory=object)

            @dataclass(frozen=True)
            class Good(Objective): ...

            @dataclass(frozen=True)
            class MustBeSet(Objective):
                strength: float
                names: list = field(default_factory=lambda: ["a"])
        """,
    )
    done = train("objective=clamped_rkl", "--cfg", "job", path=[broken, objective], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    heard = done.stderr.splitlines()
    for name, reason in BAD_OBJECTIVES.items():
        (line,) = [each for each in heard if f"the objective plugin '{name}'" in each]
        assert reason in line
    assert len(heard) == len(BAD_OBJECTIVES)
    done = train("objective=odd_default", path=[broken], cwd=tmp_path)
    assert done.returncode == 2
    assert "no objective is called 'odd_default'" in done.stderr
    # A setting without a default must be given.
    done = train("objective=must_be_set", path=[broken], cwd=tmp_path)
    assert done.returncode == 2
    assert "error: these settings must be given: objective.strength" in done.stderr


@pytest.mark.slow
def test_training_with_an_installed_objective(objective: Path, tmp_path: Path) -> None:
    small = ("steps=2", "batch.prompts=4", "batch.mini_batch=4", "evaluation.tasks=1",
             "evaluation.every=0", "evaluation.teacher=false", "engine.device=cpu")  # fmt: skip
    for name, words, phases in (
        ("plain", (), ["training", "training"]),
        ("other", ("objective.limit=0.01", "objective.first_steps=1"), ["praise", "training"]),
    ):
        done = train(
            "objective=clamped_rkl",
            *small,
            *words,
            f"hydra.run.dir={tmp_path / name}",
            path=[objective],
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(
            r"objective=clamped_rkl .*seed=1", done.stdout
        )  # the next commands keep it
        text = (tmp_path / name / "metrics.jsonl").read_text()
        steps = [row for line in text.splitlines() if (row := json.loads(line))["kind"] == "train"]
        assert [row["phase"] for row in steps] == phases
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
        if name == "other":
            # Praise is at most 0.01 nats a token, and the loss is its mean.
            assert -0.0101 < steps[0]["loss"] < 0
            assert 0 < steps[0]["mask/kept_share"] < 1
            assert steps[1]["mask/kept_share"] == 1


def test_a_checkpoint_is_evaluated_in_the_plugins_environment(
    installed: Path, tmp_path: Path
) -> None:
    words = ["env=rotated_digits", "evaluation.tasks=3", "samples=2", "+env.kwargs.size=3"]
    done = start(
        *("-m", "reopold_agent.evaluate", *words, "hydra.run.dir=out"),
        path=[installed],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "env=rotated_digits decides about success. Held-out tasks (its own), T 1" in done.stdout
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]
    found = figures["rotated_digits"]
    assert (found["questions"], found["samples"], set(found["pass_at_k"])) == (3, 2, {"1", "2"})
    assert "rotate_image" in found["prompt"]["system"]
    assert found["budget"] == {"max_turns": 4, "max_tokens": 320}
    rows = [json.loads(row) for row in (tmp_path / "out" / "responses.jsonl").open()]
    assert {row["id"].split("-")[0] for row in rows} == {"rotated"}
    assert all(row["answers"] and row["question"].startswith("The picture is dark") for row in rows)
