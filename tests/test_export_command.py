"""``reopold export``: a run's student as other programs load it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import train, weights
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from reopold_agent.errors import ConfigError
from reopold_agent.train import finish
from reopold_agent.train.export.__main__ import main
from reopold_agent.train.export.export import export

LORA = "model.student.lora={r: 4, target_modules: [q_proj, embed_tokens]}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "make_plots", lambda folder: None)
        train(folder, "steps=1", "evaluation.tasks=0", "evaluation.teacher=false", LORA)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=torch.arange(20)[None]).logits.float()
    return values.log_softmax(-1)


def test_a_student_is_exported_for_plain_transformers(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out", "bfloat16")
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert (logits(tmp_path / "out") - logits(run / "final")).abs().mean() < 0.1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) > 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "tokenizer.json", "preprocessor_config.json"}


def test_an_unfinished_run_gives_its_newest_checkpoint_merged(run: Path, tmp_path: Path) -> None:
    final, hidden = run / "final", run / "hidden"
    final.rename(hidden)
    try:
        export(run, tmp_path / "out", "float32")
    finally:
        hidden.rename(final)
    assert (logits(tmp_path / "out") - logits(final)).abs().max() < 1e-4


def test_wrong_uses_are_explained(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for arguments, said in (
        ((run, tmp_path / "out", "int8"), "Use bfloat16, float16, float32"),
        ((run, tmp_path, "float32"), "exists already"),
        ((run, tmp_path / "file", "float32"), "exists already"),
        ((tmp_path, tmp_path / "out", "float32"), "is not the folder of a training run"),
    ):
        with pytest.raises(ConfigError, match=said):
            export(*arguments)
    assert not (tmp_path / "out").exists()


def test_the_command_uploads_what_it_wrote(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **settings: Any) -> None:
            calls.append((name, settings))

        def upload_folder(self, repo_id: str, folder_path: Path) -> Any:
            assert (folder_path / "config.json").is_file()
            return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    out = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["reopold export", str(run), out, "dtype=float16", "push=a/b"])
    assert main() == 0
    assert calls == [("a/b", {"private": True, "exist_ok": True})]
    assert "https://huggingface.co/a/b" in capsys.readouterr().out
    for word, said in (("dtpe=float16", "Did you mean 'dtype'?"), ("push=a", "push=ORG/NAME")):
        monkeypatch.setattr(sys, "argv", ["reopold export", str(run), out, word])
        with pytest.raises(SystemExit):
            main()
        assert said in capsys.readouterr().err
