"""``final/`` is the trained student: merging, untying, and the comparison after saving."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from running import composed, train, weights
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen2_5_VLForConditionalGeneration,
)

from reopold_agent.common.memory import discard_pages, release_unchanged
from reopold_agent.errors import ModelError
from reopold_agent.policies import adapter, saving
from reopold_agent.policies.loading import (
    LoadedModel,
    ModelSpec,
    load_model,
    resolve_path,
    without_weights,
)
from reopold_agent.policies.lora import merged_weights
from reopold_agent.policies.saving import save_checked
from reopold_agent.train.setup import load_models
from reopold_agent.types import Trajectory

CPU = torch.device("cpu")
IDS = [5, 9, 3, 30, 12, 7, 9, 21, 14, 2, 33]

ADAPTERS: dict[str, dict[str, Any] | None] = {
    "all": None,
    "attention": {"r": 4, "target_modules": ["q_proj"]},
    "embedding": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "saved embedding": {
        "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]
    },
    "saved norm": {"r": 4, "target_modules": "all-linear", "modules_to_save": ["norm"]},
    "dora": {"r": 4, "target_modules": "all-linear", "use_dora": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, vision: Any
) -> dict[bool, Path]:
    """Checkpoints with tied and with separate embeddings."""
    made = {}
    for tied in (True, False):
        folder = made[tied] = tmp_path_factory.mktemp("base") / ("tied" if tied else "separate")
        config = tiny_config(tokenizer, tie_word_embeddings=tied, initializer_range=0.3)
        config.tie_word_embeddings = tied
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = Qwen2_5_VLForConditionalGeneration(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        vision.processor.save_pretrained(folder)
    return made


def trained(base: Path, lora: dict[str, Any] | None, dtype: str = "float32") -> LoadedModel:
    """A student whose trainable weights were all moved."""
    if lora is not None:
        pytest.importorskip("peft")
    student = load_model(ModelSpec(str(base), lora=lora, dtype=dtype), "student", CPU)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in student.adapter.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return student


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    values: torch.Tensor = model.eval()(input_ids=torch.tensor([IDS])).logits.float()
    return values.log_softmax(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "separate"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_saved_model_is_the_trained_one(
    adapter: str, tied: bool, dtype: str, bases: dict[bool, Path], tmp_path: Path
) -> None:
    student = trained(bases[tied], ADAPTERS[adapter], dtype)
    expected = logits(student.adapter.model)
    assert save_checked(student, tmp_path / "final", IDS)
    plain: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "final")
    assert str(plain.dtype) == f"torch.{dtype}"
    difference = (logits(plain) - expected).abs()
    assert difference.max() < 1e-3 if dtype == "float32" else difference.mean() < 0.2
    untied = not tied or "embedding" in adapter
    head = plain.get_output_embeddings().weight
    assert (plain.get_input_embeddings().weight is not head) == untied
    # Other programs, such as vLLM, go by the configuration.
    assert plain.config.tie_word_embeddings is not untied
    assert plain.config.get_text_config().tie_word_embeddings is not untied
    assert ("lm_head.weight" in load_file(tmp_path / "final/model.safetensors")) == untied


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
    ],
)
def test_adapters_of_the_output_embedding_are_refused(
    lora: dict[str, Any], bases: dict[bool, Path]
) -> None:
    with pytest.raises(ModelError, match="must not cover the output embedding"):
        trained(bases[True], {"r": 4, **lora})


def test_a_run_with_tied_embeddings_leaves_the_trained_student(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = "model.student.lora={r: 4, target_modules: [q_proj, embed_tokens]}"
    words = ("steps=1", "evaluation.tasks=0", "evaluation.teacher=false", "optimizer.lr=0.05")
    train(tmp_path, *words, lora)
    config, _ = composed(*words, lora)
    spec = ModelSpec(**vars(config.model.student))
    saved = tmp_path / "checkpoints/step-000001/model"
    student = load_model(spec, "student", CPU, saved=saved).adapter.model
    final: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "final")
    start: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(resolve_path("demo:student"))
    assert (logits(final) - logits(student)).abs().max() < 1e-3
    assert (logits(final) - logits(start)).abs().max() > 0.1


def test_a_final_model_that_differs_is_refused_and_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LoadedModel.save

    def wrong(self: LoadedModel, folder: Path, **settings: Any) -> None:
        save(self, folder, **settings)
        if settings.get("merge"):
            values = load_file(folder / "model.safetensors")
            name = next(iter(values))
            values[name][0] += 1
            save_file(values, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(LoadedModel, "save", wrong)
    with pytest.raises(ModelError, match="not the trained one: 2 weights differ") as caught:
        train(tmp_path, "steps=1", "evaluation.tasks=0", "evaluation.teacher=false")
    assert "The checkpoints are whole" in str(caught.value).splitlines()[1]
    assert not (tmp_path / "final").exists()
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    train(tmp_path, "steps=1", "evaluation.tasks=0", "evaluation.teacher=false")
    assert (tmp_path / "final").is_dir()


def test_what_is_read_back_takes_the_place_of_the_model(
    bases: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = trained(bases[True], ADAPTERS["attention"])
    base: Any = student.adapter.model
    base = base.get_base_model()
    left: list[int] = []
    equal = torch.equal

    def watched(one: torch.Tensor, other: torch.Tensor) -> bool:
        left.append(sum(parameter.numel() for parameter in base.parameters()))
        return equal(one, other)

    monkeypatch.setattr(torch, "equal", watched)
    assert save_checked(student, tmp_path / "final", IDS)
    assert left == sorted(left, reverse=True)  # freed one by one: never two whole models
    assert left[-1] < left[0] / 10
    assert sum(parameter.numel() for parameter in base.parameters()) == 0


def test_discarded_pages_leave_memory_and_their_neighbours_alone(tmp_path: Path) -> None:
    size = 2**20 + 1001  # the tensors share pages
    made = {name: torch.full((size,), i, dtype=torch.int32) for i, name in enumerate("abc")}
    save_file(made, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")
    for value in loaded.values():
        value += 7  # a page of its own for each that is written, and no longer the file's

    def resident() -> int:
        """Bytes of private pages of the mapping."""
        kept, inside = 0, False
        for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
            if line[:1] in "0123456789abcdef":
                low, _, high = line.split()[0].partition("-")
                inside = int(low, 16) <= loaded["b"].data_ptr() < int(high, 16)
            elif inside and line.startswith("Private_Dirty:"):
                kept += 1024 * int(line.split()[1])
        return kept

    before = resident()
    discard_pages(loaded["b"].data_ptr(), loaded["b"].nbytes)
    assert before - resident() > 0.99 * loaded["b"].nbytes
    assert (loaded["a"] == 7).all()
    assert (loaded["c"] == 9).all()


def resident(tensor: torch.Tensor) -> int:
    """Bytes in memory of the mapping that holds a tensor."""
    inside = False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if line[:1] in "0123456789abcdef":
            low, _, high = line.split()[0].partition("-")
            inside = int(low, 16) <= tensor.data_ptr() < int(high, 16)
        elif inside and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError


def test_only_what_a_file_still_holds_is_released(tmp_path: Path) -> None:
    loaded = []
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        save_file({"x": torch.arange(2**20), "y": torch.full((2**20,), number)}, path)
        loaded.append(load_file(path))
    kept, written = loaded
    written["y"][0] = 5  # its neighbours are the file's, and are not told apart
    own = torch.full((2**20,), 3)
    assert kept["x"].sum() + written["x"].sum() + kept["y"].sum() > 0  # read all
    everything = [*kept.values(), *written.values(), own]
    before = [each.clone() for each in everything]
    released = release_unchanged((each.data_ptr(), each.nbytes) for each in everything)
    kept_file = tmp_path / "0.safetensors"
    state = kept_file.stat()
    assert released == {str(kept_file): (state.st_size, state.st_mtime_ns)}
    assert resident(kept["x"]) < 2**16
    assert resident(written["x"]) >= written["x"].nbytes
    assert all(torch.equal(one, other) for one, other in zip(before, everything, strict=True))


GENERATION: list[dict[str, Any]] = [
    {"do_sample": False, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"temperature": 0.9, "top_p": 0.6},
    {"early_stopping": True, "length_penalty": 2.0},
    {"do_sample": True, "temperature": 0.7},
]


@pytest.mark.parametrize("lora", ["all", "attention"])
@pytest.mark.parametrize("settings", GENERATION)
def test_a_checkpoints_generation_settings_are_passed_on_even_if_they_contradict_each_other(
    settings: dict[str, Any], lora: str, bases: dict[bool, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases[True], base)
    (base / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    student = trained(base, ADAPTERS[lora])
    student.save(tmp_path / "checkpoint")
    student.save(tmp_path / "final", merge=True)
    written = json.loads((tmp_path / "final" / "generation_config.json").read_text("utf-8"))
    assert {key: written.get(key) for key in settings} == settings
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "final")
    assert {key: getattr(again.generation_config, key) for key in settings} == settings


def test_trained_weights_leave_their_file_and_a_teachers_stay(bases: dict[bool, Path]) -> None:
    config, _ = composed("env=math", "engine.device=cpu")
    specs = {"student": ModelSpec(str(bases[True])), "teacher": ModelSpec(str(bases[False]))}
    student, teachers = load_models(config, specs)
    teacher = teachers["teacher"]
    assert isinstance(teacher, LoadedModel)
    files = []
    for model in (student, teacher):
        weights = model.adapter.model.parameters()
        files.append(release_unchanged((each.data_ptr(), each.nbytes) for each in weights))
    assert files[0] == {}
    assert [Path(file).parent for file in files[1]] == [bases[False]]
    embedded, head = student.adapter.model.get_input_embeddings(), student.adapter.head
    assert embedded.weight is head.weight  # still tied


def test_a_teacher_whose_weights_were_released_scores_the_same(
    bases: dict[bool, Path],
    random_trajectory: Callable[..., Trajectory],
    chat: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter, "LARGE", 0)
    teacher = load_model(ModelSpec(str(bases[True])), "teacher", CPU)
    teacher.adapter.model.requires_grad_(False)
    policy = teacher.policy(forbidden_ids=chat.forbidden_ids, stop_ids=chat.stop_ids)
    (first,) = policy.score([random_trajectory(1, [])], with_entropy=True)
    weight = teacher.adapter.head.weight
    before = resident(weight)
    policy.adapter.release_weights()
    assert resident(weight) < before / 4
    (again,) = policy.score([random_trajectory(1, [])], with_entropy=True)
    assert np.array_equal(first.logp, again.logp)
    assert np.array_equal(first.entropy, again.entropy)
    # The pages are the file's: other weights must not teach in silence.
    file = next(bases[True].glob("*.safetensors"))
    policy.adapter.release_weights()
    os.utime(file, ns=(0, 1))
    with pytest.raises(
        ModelError, match=r"safetensors was changed while .*\nPut the file back"
    ) as told:
        policy.adapter.release_weights()
    assert str(told.value).count("\n") == 1
    kept = file.rename(file.with_suffix(".kept"))  # as most programs replace a file
    policy.adapter.release_weights()
    kept.rename(file)


def test_merging_that_changes_the_model_is_refused(
    tmp_path: Path, bases: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reopold_agent.policies import loading

    student = trained(bases[True], ADAPTERS["embedding"])
    monkeypatch.setattr(loading, "merge_adapter", lambda model: model.merge_and_unload())
    with pytest.raises(ModelError, match=r"log-probs differ by \d.* nats on average"):
        save_checked(student, tmp_path / "final", IDS)


def test_without_memory_to_read_it_back_the_merged_model_is_compared(
    tmp_path: Path, bases: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "usable_memory", lambda: 1000.0)
    monkeypatch.setattr(saving, "load_model", None)
    student = trained(bases[True], ADAPTERS["embedding"])
    assert not save_checked(student, tmp_path / "final", IDS)


def test_a_text_model_is_written_in_another_dtype(tmp_path: Path) -> None:
    base = Path(resolve_path("demo:arithmetic_student"))
    student = trained(base, ADAPTERS["embedding"])
    expected = logits(student.adapter.model)
    assert save_checked(student, tmp_path / "final", IDS, dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert plain.dtype == torch.bfloat16
    assert {value.dtype for value in weights(tmp_path / "final").values()} == {torch.bfloat16}
    assert (logits(plain) - expected).abs().mean() < 0.3


@pytest.mark.parametrize("adapter", ["embedding", "saved embedding", "saved norm", "dora"])
def test_what_vllm_cannot_follow_is_refused(adapter: str, bases: dict[bool, Path]) -> None:
    student = trained(bases[True], ADAPTERS[adapter])
    # engine=verl asks before there are weights.
    for model in (student.adapter.model, without_weights(student)):
        with pytest.raises(ModelError, match="vLLM"):
            list(merged_weights(model))


def test_vllm_gets_the_adapter_of_a_separate_embedding(bases: dict[bool, Path]) -> None:
    model: Any = trained(bases[False], ADAPTERS["embedding"]).adapter.model
    sent = {name: value.detach().clone() for name, value in merged_weights(model)}
    expected = dict(model.merge_and_unload().named_parameters())
    assert sent.keys() == expected.keys()
    assert all(torch.allclose(sent[name], expected[name], atol=1e-5) for name in sent)
