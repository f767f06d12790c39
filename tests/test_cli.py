"""``reopold`` as a user types it: help, errors in two lines, exit statuses, tab completion."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import SMALL, environment, lines, start, train_rows, wait_until, words

from reopold_agent.cli.commands import COMMANDS
from reopold_agent.cli.completion import candidates
from reopold_agent.cli.messages import split_message

SHIM = (
    f"#!{sys.executable}\nimport sys\n"
    "from reopold_agent.cli.__main__ import main\nsys.exit(main())\n"
)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which ``reopold`` runs the entry point."""
    place = tmp_path_factory.mktemp("bin")
    (place / "reopold").write_text(SHIM)
    (place / "reopold").chmod(0o755)
    env = environment()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "COLUMNS"):
        env.pop(name, None)
    return {**env, "PATH": f"{place}{os.pathsep}{env['PATH']}", "NETRC": str(place / "netrc")}


def reopold(
    shell: dict[str, str], *arguments: str, **settings: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["reopold", *arguments],
        env=shell,
        capture_output=True,
        text=True,
        timeout=120,
        **settings,  # type: ignore[call-overload]
    )


# The list of commands


def test_the_entry_point_is_this_module() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    scripts = project.split("[project.scripts]\n")[1].split("\n\n")[0]
    assert scripts == 'reopold = "reopold_agent.cli.__main__:main"'


def test_help_lists_every_command_and_imports_nothing_slow(shell: dict[str, str]) -> None:
    plain = reopold(shell)
    assert plain.returncode == 0
    assert reopold(shell, "--help").stdout == plain.stdout
    for name, command in COMMANDS.items():
        (line,) = [each for each in plain.stdout.splitlines() if each.startswith(f"  {name} ")]
        assert command.summary in line
        assert line.endswith(command.example)
        assert command.example.startswith((f"reopold {name}", "eval"))
    slow = ("torch", "hydra", "omegaconf", "numpy", "rich", "yaml", "scipy")
    code = f"""
import sys
sys.argv = ["reopold"]
from reopold_agent.cli.__main__ import main
main()
assert not set({slow!r}) & set(sys.modules), sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=shell, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_every_command_has_a_module_and_a_help(shell: dict[str, str]) -> None:
    def ask(name: str) -> tuple[str, subprocess.CompletedProcess[str]]:
        return name, reopold(shell, name, "--help")

    with ThreadPoolExecutor(3) as pool:
        answers = dict(pool.map(ask, COMMANDS))
    for name, done in answers.items():
        assert done.returncode == 0, (name, done.stderr)
        assert re.search(rf"reopold_agent\.{name}|reopold {name}", done.stdout), name
        assert done.stderr == "", name
    for name, groups in {
        "train": ("env", "model", "objective", "engine", "policy", "tracking", "recipe", "data"),
        "evaluate": ("judge", "policy", "tracking"),
        "judge": ("judge",),
        "serve": ("policy",),
    }.items():
        text = answers[name].stdout
        listed = text.split("== Groups (group=option) ==\n")[1].split("\n\n")[0]
        assert {line.split()[0] for line in listed.splitlines()} >= {*groups}
        assert f"reopold {name} " in text.split("== Examples ==")[1]
    assert "gpu=h100" in answers["plan"].stdout or "gpus=8" in answers["plan"].stdout
    assert "benchmarks" not in answers["train"].stdout.split("== Settings")[0]
    assert "objective" not in answers["evaluate"].stdout.split("== Settings")[0]


def test_version(shell: dict[str, str]) -> None:
    import reopold_agent

    done = reopold(shell, "--version")
    assert done.stdout.strip() == f"reopold-agent {reopold_agent.__version__}"


# What users get wrong


@dataclass(frozen=True)
class Mistake:
    """A command line, the problem that the message names, and its advice."""

    command: str
    wrong: str
    advice: str
    run: bool = False  # the words of a short run behind it
    environment: tuple[tuple[str, str], ...] = ()


EVERY = "`reopold train --cfg job` shows every setting"

MISTAKES = [
    Mistake("tarin", "there is no command 'tarin'.", "Did you mean `reopold train`?"),
    Mistake("train stps=3", "unknown setting 'stps'.", f"Did you mean 'steps'? {EVERY}"),
    Mistake("train batch.promts=4", "unknown setting 'batch.promts'.", "mean 'batch.prompts'?"),
    Mistake("train lr=1e-3", "unknown setting 'lr'.", "mean 'optimizer.lr'?"),
    Mistake("train envv=math", "unknown setting 'envv'.", "mean 'env'?"),
    Mistake("train zzzzz=1", "unknown setting 'zzzzz'.", EVERY),
    Mistake("train +stps=3", "unknown setting 'stps'.", "mean 'steps'?"),
    Mistake(
        "train engine.teacher=shared", "'engine.teacher' is a setting of engine=verl.", "Leave"
    ),
    Mistake("train engine.student_server.eager=1", "of engine=verl.", "Leave it out, or use"),
    Mistake("train +engine.offload=true", "'engine.offload' is a setting of", "Leave it"),
    Mistake("train data.train.path=x", "needs the format of the rows", "Known: geometry3k, "),
    Mistake("train +steps=3", "'steps' exists already.", "Leave out the +"),
    Mistake("train env=pixel_resoner", "no environment is called", "mean 'pixel_reasoner'? Known:"),
    Mistake("train objective=repold", "no objective is called", "mean 'reopold'?"),
    Mistake("train tracking=[wandb,mlflo]", "no tracker is called 'mlflo'.", "mean 'mlflow'?"),
    Mistake("train recipe=null", "no recipe is called 'null'.", "Known: agentic_1x24gb"),
    Mistake("train hydra/launcher=x", "has no option 'x'.", "Known: basic"),
    Mistake("train pixel_reasoner", "'pixel_reasoner' is not key=value.", "'env=pixel_reasoner'?"),
    Mistake("train --mutirun", "there is no flag '--mutirun'.", "mean '--multirun'?"),
    Mistake("train steps=many", "'steps' must be int, got 'many'", "--help"),
    Mistake("train seed=1,2", "seed=1,2 has several values.", "  Add --multirun to run once"),
    Mistake("train env=[math,geometry]", "comes with a model of its own: math with", "model="),
    Mistake("train env=math,geometry", "has several values.", "  Add --multirun to run once with"),
    Mistake("train tools.read=a,b", "has several values.", "'tools.read=[a,b]' for a list, or add"),
    Mistake("train tracking=wandb,mlflow", "several values.", "tracking=[wandb,mlflow]' for"),
    *[
        Mistake(f"{start}={value}", f"'{start.split()[-1]}' takes one option, got {value}", "once")
        for start, value in (
            ("train model", "[demo,figures]"),
            ("train objective", "[grpo,rkl]"),
            ("plan recipe", "[paper_agentic,paper_math_7b]"),
            ("evaluate judge", "[gemini,local]"),
            ("evaluate model", "[a,b]"),
            ("evaluate env=math data", "[demo,verl]"),
            ("serve policy", "[vllm,server]"),
            ("serve model", "[a,b]"),
            ("study name=ablation -- env", "[math,geometry]"),
        )
    ],
    Mistake("train env=math env=geometry", "'env' is given twice: env=math and", "Leave one out"),
    Mistake("evaluate env=math env=geometry", "'env' is given twice", "'env=[math,geometry]' for"),
    Mistake("study name=ablation name=x", "'name' is given twice: name=ablation", "Leave one out"),
    Mistake("plan gpus=8 gpus=16", "'gpus' is given twice: gpus=8 and gpus=16.", "Leave one out"),
    Mistake("train default_batch=x", "default_batch must be one of single, group; got 'x'", "each"),
    Mistake("train seed=[1", "'seed=[1' cannot be read", "needs quotes"),
    Mistake("train steps=${foo}", "steps: Interpolation key 'foo' not found", "--help"),
    Mistake("train hydra.run.dir=${no}", "hydra.run.dir: Interpolation key 'no'", EVERY),
    Mistake("train data=verl", "must be given: data.eval.path, data.train.path", "--help"),
    Mistake("train --config-dir /nosuch", "configurations '/nosuch' is not there.", "Name one"),
    Mistake("train hydra.run.dir=FILE", "File exists: FILE", "where a folder is needed", True),
    Mistake("train hydra.run.dir=FILE/x", "Not a directory: FILE/x", "choose another path", True),
    Mistake("train tracking=wandb", "tracking=wandb has no API key.", "wandb login", True),
    Mistake(
        "train model.student.path=some/where",
        "the student 'some/where' is neither a local folder nor",
        "hf download some/where",
        True,
    ),
    Mistake("evaluate benchmark=demoo", "no benchmark is called 'demoo'.", "mean 'demo'?"),
    Mistake(
        "evaluate agentic.env=nonsense", "agentic.env=nonsense: ", "Known: reopold/Geometry-v0"
    ),
    Mistake("evaluate env=math env.id=math", "env.id=math: ", "Did you mean 'reopold/Math-v0'?"),
    Mistake(
        "train env.id=nonsense/X-v0", "env.id=nonsense/X-v0: Namespace", "Known: reopold/", True
    ),
    Mistake("serve port=99999", "port must be from 0 to 65535, got 99999", "reopold serve --help"),
    Mistake("serve port=PORT model=demo:student", "cannot listen on 127.0.0.1:PORT", "port=N"),
    Mistake("compare nosuch", "nosuch has no results.json", "finished evaluation?"),
    Mistake("judge chek", "no command 'chek' of judge.", "Did you mean 'check'?"),
    Mistake("judge check nosuch.jsonl", "nosuch.jsonl: No such file", "Give a file of labelled"),
    Mistake("judge check FILE", "FILE, line 1: not JSON", "A line is one JSON object"),
    Mistake("judge check judge=gemni", "no judge is called 'gemni'.", "mean 'gemini'?"),
    Mistake("judge check outptu=x", "unknown setting 'outptu'.", "Did you mean 'output'?"),
    Mistake("plan gpus=x", "gpus must be a number, got 'x'", "reopold plan --help"),
    Mistake("plan envv=math", "unknown setting 'envv'.", "mean 'env'?"),
    Mistake("study name=abl", "no study is called 'abl'.", "mean 'ablation'?"),
    Mistake("study nme=ablation", "unknown key 'nme'.", "mean 'name'?"),
    Mistake("completion bsh", "no completion for 'bsh'.", "Known: bash, zsh, fish"),
]


@pytest.fixture(scope="module")
def answers(
    shell: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, subprocess.CompletedProcess[str]]:
    """Messages for each mistake, from a few processes at a time, because each takes seconds."""
    place = tmp_path_factory.mktemp("mistakes")
    (place / "FILE").write_text("not a folder")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])

        def make(mistake: Mistake) -> tuple[str, subprocess.CompletedProcess[str]]:
            arguments = mistake.command.replace("PORT", port).split()
            if mistake.run:
                arguments += SMALL
            done = reopold(shell, *arguments, cwd=place)
            done.stderr = done.stderr.replace(port, "PORT")
            return mistake.command, done

        with ThreadPoolExecutor(3) as pool:
            return dict(pool.map(make, MISTAKES))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.command)
def test_a_mistake_is_reported_in_two_lines(
    mistake: Mistake, answers: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    done = answers[mistake.command]
    assert done.returncode == 2, done.stderr
    first, *rest = done.stderr.rstrip("\n").split("\n")
    assert first.startswith("error: ")
    assert mistake.wrong in first
    assert rest, "nothing says what to do"
    assert all(line.startswith("  ") for line in rest)
    assert mistake.advice in "\n".join(rest)
    assert len(rest) == 1 or mistake.command.endswith("some/where")  # a download in three lines
    assert "Traceback" not in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_the_traceback_too(shell: dict[str, str]) -> None:
    done = reopold({**shell, "REOPOLD_DEBUG": "1"}, "train", "stps=3")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "ConfigCompositionException" in done.stderr
    assert "error: unknown setting 'stps'.\n  Did you mean 'steps'?" in done.stderr


RAISES = """
import errno, sys
from reopold_agent.cli.hydra import report_errors
sys.argv = ["reopold train"]
with report_errors("Stopped.", "train"):
    {}
"""


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB')",
            2,
            ["error: the GPU's memory is full: CUDA out of memory.", "max_tokens_per_micro_batch"],
        ),
        ("raise MemoryError", 2, ["error: this machine's memory is full", "rollout.concurrency"]),
        (
            "import huggingface_hub.errors as e; raise e.OfflineModeIsEnabled('no network')",
            2,
            ["error: the Hugging Face hub did not answer: no network", "model.student.path=DIR"],
        ),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', 'RUN/x')",
            2,
            ["error: No space left on device: RUN/x", "Free space"],
        ),
        (
            "raise RuntimeError('deep') from PermissionError(13, 'Permission denied', '/x')",
            2,
            ["error: Permission denied: /x", "Choose a folder that you may write to"],
        ),
        (
            "raise OSError(errno.EADDRINUSE, 'Address already in use')",
            2,
            ["error: Address already in use", "another port"],
        ),
        ("raise KeyboardInterrupt", 130, ["Stopped."]),
        (
            "from reopold_agent.errors import Terminated; raise Terminated",
            143,
            ["Stopped."],
        ),
        ("print('x'); raise ZeroDivisionError('a bug')", 1, ["Traceback", "ZeroDivisionError"]),
        ("raise FileNotFoundError(2, 'No such file', 'ours')", 1, ["Traceback"]),
    ],
)
def test_messages_of_errors_from_libraries(
    code: str, status: int, told: list[str], shell: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RAISES.format(code)],
        env=shell,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    for text in told:
        assert text in done.stderr
    assert ("Traceback" in done.stderr) == (status == 1)


def test_head_of_the_output_is_no_error(shell: dict[str, str]) -> None:
    for line in ("reopold", "reopold study --help", "reopold train --cfg job"):
        # `true` reads nothing and is gone before there is anything to read.
        script = f"{line} | true; echo ${{PIPESTATUS[0]}} >&2"
        done = subprocess.run(
            ["bash", "-c", script], env=shell, capture_output=True, text=True, timeout=120
        )
        assert done.stderr.strip() in ("0", "141"), line


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ("a is wrong. Do b.", ("a is wrong.", "Do b.")),
        ("a is used; choose another", ("a is used", "Choose another")),
        ("a is used; a=1 is free", ("a is used", "a=1 is free")),
        ("it has x:\n  one\n  two", ("it has x:", "  one\n  two")),
        ("see e.g. verl 0.9. Do b.", ("see e.g. verl 0.9.", "Do b.")),
    ],
)
def test_messages_in_two_parts(message: str, parts: tuple[str, str]) -> None:
    assert split_message(message) == parts


# Stopped


def test_ctrl_c_while_models_are_loaded(shell: dict[str, str], tmp_path: Path) -> None:
    process = start(words(tmp_path / "run"), tmp_path)
    wait_until(lambda: (tmp_path / "run" / "train.log").exists(), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error


@pytest.mark.slow
def test_sigterm_saves_and_has_its_own_status(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(words(folder, "steps=50", "checkpoint.every=0"), tmp_path)
    wait_until(lambda: len(train_rows(folder)) >= 1, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143, error
    assert "Continue with:" in error
    assert os.listdir(folder / "checkpoints")
    assert lines(folder / "metrics.jsonl")


# Tab completion


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("reopold tr", ["train"], ["evaluate"]),
        ("reopold ", [*COMMANDS], []),
        ("reopold train env=pix", ["env=pixel_reasoner"], ["env=math"]),
        ("reopold train env=", ["env=geometry", "env=math", "env=pixel_reasoner"], []),
        ("reopold train batch.pro", ["batch.prompts="], ["batch.samples="]),
        ("reopold train tracking=", ["tracking=none", "tracking=wandb"], []),
        ("reopold train tracking=wandb tracking.wandb.pro", ["tracking.wandb.project="], []),
        ("reopold train engine=verl engine.gpus", ["engine.gpus_per_node="], []),
        ("reopold train po", ["policy=", "policy."], ["policy"]),
        ("reopold train ", ["env=", "steps=", "optimizer."], ["judge=", "benchmarks=", "hydra"]),
        ("reopold train --mu", ["--multirun"], ["--help"]),
        (
            "reopold evaluate ",
            ["model=", "judge=", "benchmark="],
            ["objective=", "recipe="],
        ),
        ("reopold evaluate benchmark=vs", ["benchmark=vstar"], ["benchmark=demo"]),
        ("reopold evaluate model=d", [], ["model=demo"]),
        ("reopold evaluate env=ma", ["env=math"], ["env=geometry"]),
        ("reopold evaluate env=math sam", ["samples=", "sampling."], []),
        (
            "reopold evaluate env=math rollout.max_t",
            ["rollout.max_turn_tokens="],
            ["rollout.max_turns="],
        ),
        ("reopold judge ", ["check"], ["judge=", "file="]),
        ("reopold judge check judge=", ["judge=gemini", "judge=none"], []),
        ("reopold judge check FILE judge=gemini judge.mo", ["judge.model="], []),
        ("reopold judge check FILE ", ["all=", "output=", "judge="], ["env=", "check"]),
        ("reopold serve po", ["policy=", "port="], ["model="]),
        ("reopold plan gpu", ["gpu=", "gpus="], []),
        ("reopold play env=pixel_reasoner split=", ["split=train", "split=eval"], []),
        ("reopold doctor --", ["--json"], ["--multirun"]),
        ("reopold doctor recipe=paper_a", ["recipe=paper_agentic"], []),
        ("reopold preflight ep", ["episodes="], []),
        ("reopold plan gpus=8 recipe=paper_m", ["recipe=paper_math_7b"], []),
        ("reopold study name=ab", ["name=ablation"], ["name=rho"]),
        ("reopold study name=rho -- optimizer.l", ["optimizer.lr="], []),
        ("reopold completion ", ["bash", "zsh", "fish"], []),
        ("reopold nosuch x", [], []),
    ],
)
def test_candidates(line: str, some: list[str], none: list[str]) -> None:
    found = candidates(line)
    assert {*some} <= {*found}
    assert not {*none} & {*found}
    word = "" if line.endswith(" ") else line.split()[-1]
    assert all(each.startswith(word) for each in found)


def type_into(shell: dict[str, str], program: list[str], keys: list[str], until: str) -> str:
    """Returns an interactive shell's output; waits for ``until`` after the last keys."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe(program[0], program, {**shell, "TERM": "dumb", "PS1": "$ "})
    shown = ""
    try:
        for number, text in enumerate(keys):
            os.write(terminal, text.encode())
            wait_for = until if number == len(keys) - 1 else "READY"
            deadline = time.monotonic() + 60
            while wait_for not in _without_control(shown) and time.monotonic() < deadline:
                if select.select([terminal], [], [], 0.1)[0]:
                    shown += os.read(terminal, 65536).decode(errors="replace")
            shown = shown if number == len(keys) - 1 else ""
        return _without_control(shown)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def _without_control(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|.\x08", "", text)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("reopold train env=pix\t", "reopold train env=pixel_reasoner"),
        ("reopold train seed=1 batch.pro\t", "batch.prompts="),
        ("reopold ev\t", "reopold evaluate"),
    ],
)
@pytest.mark.parametrize("name", ["bash", "zsh"])
def test_tab_in_a_real_shell(name: str, typed: str, shown: str, shell: dict[str, str]) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    program = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}[name]
    begin = "" if name == "bash" else "autoload -Uz compinit; compinit -u; "
    install = {"bash": "train -sc install=bash", "zsh": "completion zsh"}[name]
    # The quotes keep the echo of what is typed from looking like its answer.
    ready = f'{begin}eval "$(reopold {install})"; echo RE""ADY\n'
    assert shown in type_into(shell, program, [ready, typed], shown)


def test_completion_in_fish(shell: dict[str, str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    script = "reopold completion fish | source; complete -C 'reopold train env=pix'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", script],
        env=shell,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["env=pixel_reasoner"], done.stderr


def test_completion_scripts_are_the_same_through_hydras_flag(shell: dict[str, str]) -> None:
    for name in ("bash", "zsh", "fish"):
        plain = reopold(shell, "completion", name).stdout
        assert reopold(shell, "train", "-sc", f"install={name}").stdout == plain
        assert "reopold completion query" in plain
        removal = reopold(shell, "train", "-sc", f"uninstall={name}")
        assert removal.returncode == 0
        assert removal.stdout
    asked = {**shell, "COMP_LINE": "reopold train env=pix"}
    assert reopold(asked, "train", "-sc", "query=bash").stdout == "env=pixel_reasoner\n"
