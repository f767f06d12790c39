"""docs/objective.md: the names in it exist, and its commands run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from running import composed, train, train_rows

import reopold_agent
from reopold_agent.objectives import OBJECTIVES
from reopold_agent.train import finish, resume

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "objective.md").read_text("utf-8")


def commands() -> list[list[str]]:
    """The words of every training command, without ``python -m reopold_agent.train``."""
    blocks = "".join(re.findall(r"```\n(.*?)```", PAGE, re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    ours = [each for each in lines if each.startswith("python -m reopold_agent.train")]
    return [shlex.split(each)[3:] for each in ours if "NAME" not in each]


@pytest.fixture(autouse=True)
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plots; global random state kept."""
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    monkeypatch.setattr(resume, "make_plots", lambda folder: None)
    with torch.random.fork_rng(devices=[]):
        yield


def test_the_tests_it_names_exist() -> None:
    have = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        text = file.read_text("utf-8")
        have |= {file.name, f"tests/{file.name}"} | set(re.findall(r"^def (test_\w+)", text, re.M))
    named = set(re.findall(r"`((?:tests/)?test_\w+(?:\.py)?)`", PAGE))
    assert len(named) > 15
    assert sorted(named - have) == []


def test_the_functions_it_names_exist() -> None:
    named = set(re.findall(r"`((?:pieces|divergence|grpo|train|distillation)\.[\w.]+)`", PAGE))
    assert len(named) > 10
    for name in named:
        where = name if name.startswith("train") else f"objectives.{name}"
        parts = f"{reopold_agent.__name__}.{where}".split(".")
        module = next(
            ".".join(parts[:n])
            for n in range(len(parts) - 1, 0, -1)
            if not parts[n - 1][0].isupper()
        )
        thing: object = importlib.import_module(module)
        for part in parts[module.count(".") + 1 :]:
            thing = getattr(thing, part)


def test_the_classes_and_settings_it_names_are_the_objectives() -> None:
    for name in OBJECTIVES.names():
        assert f"`{name}`" in PAGE
        settings = [k for k in composed(f"objective={name}")[0].objective if k != "name"]
        # `source` and `only_successes` stand in commands.
        missing = [k for k in settings if not re.search(rf"`{k}[`=]|objective\.{k}=", PAGE)]
        assert not missing, name
        kind = OBJECTIVES.get(name).__name__
        assert re.search(rf"`{kind}[`.]", PAGE), kind


@pytest.mark.slow
def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = commands()
    assert len(listed) >= 10
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 60), (200, 30, 30)).save(name)
    rows = [json.loads(row) for row in _rows_of_the_page()]
    (tmp_path / "expert.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ("evaluation.tasks=1", "evaluation.every=0", "rollout.max_turn_tokens=20")
    train(tmp_path / "runs/mine", *few, "steps=2")
    for number, words in enumerate(listed):
        folder = tmp_path / f"run{number}"
        train(folder, *few, *words, "steps=1")
        (row,) = train_rows(folder)
        assert "loss" in row, words


def _rows_of_the_page() -> list[str]:
    (block,) = re.findall(r'```\n(\{"id".*?)```', PAGE, re.DOTALL)
    block = re.sub(r"\n +", " ", block).replace("{...}", "{}").replace("[...]", "[]")
    rows: list[str] = block.splitlines()
    assert len(rows) == 3
    return rows
