"""The families of models that see pictures, each against transformers' own classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_picture
from families import SEEING, picture_processor, save_checkpoint, tiny_config, tiny_model
from hydra import compose, initialize_config_module
from PIL import Image
from running import assert_same_weights, composed, train, train_rows
from test_policy import T1, Talk, assert_equals_full_pass, play
from transformers import ProcessorMixin, Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.errors import ConfigError, ModelError, VocabularyMismatchError
from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.attention import attend_by_rows
from reopold_agent.policies.base import PolicyRole
from reopold_agent.policies.batch import TrajectoryBatch
from reopold_agent.policies.loading import (
    ModelSpec,
    Processing,
    check_available,
    check_for_vllm,
    check_vocabularies,
    load_model,
    load_processing,
)
from reopold_agent.policies.templates import chat_template
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.policies.vllm import make_vllm_policy
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.train import finish, setup
from reopold_agent.train.engine import run_objective
from reopold_agent.train.settings import check_student, load_config
from reopold_agent.train.verl.engine import VerlEngine
from reopold_agent.types import EncodedImage, Message, Trajectory, Turn

PROCESSORS: dict[str, Any] = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
}
TEMPLATES = [
    *(("qwen2_vl", "qwen2_5_vl"), ("qwen2_5_vl", "qwen2_5_vl")),
    *(("qwen3_vl", "qwen3_vl"), ("qwen3_vl", "qwen3_vl_thinking")),
]
SIZES = [(90, 130), (300, 210), (40, 200), (33, 33)]
"""Heights and widths of the pictures."""


def limits(vision: VisionProcessor) -> PixelLimits:
    """The processor's own pixel limits."""
    size: Any = vision.processor.size
    return PixelLimits(int(size["shortest_edge"]), int(size["longest_edge"]))


def own_inputs(
    kind: str, chat: ChatRenderer, words: str, pictures: list[Any], monkeypatch: Any
) -> dict[str, torch.Tensor]:
    """What the family's own processor makes of a rendered conversation and its pictures."""
    # The real classes want a video processor, and its class torchvision.
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    processor = PROCESSORS[kind](picture_processor(kind), chat.tokenizer, None)
    images = [Image.fromarray(each) for each in pictures]
    return dict(processor(text=[words], images=images, return_tensors="pt"))


@pytest.fixture(params=TEMPLATES, ids=lambda each: each[1] if "thinking" in each[1] else each[0])
def episode(
    request: pytest.FixtureRequest, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """An episode of three turns with four pictures, and its model inputs by the processor."""
    kind, template = request.param
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = str(chat_template(template))
    chat, vision = ChatRenderer(tokenizer), VisionProcessor(picture_processor(kind))
    pictures = [random_picture(i, *size) for i, size in enumerate(SIZES)]
    seen = [vision.encode(each, limits(vision)) for each in pictures]
    system, question = Message("system", ("Be brief.",)), ("Which is larger, ", seen[0], seen[1])
    ids, images = chat.prompt([system, Message("user", question)])
    start, mask, turns = len(ids), [False] * len(ids), []
    for number, more in enumerate((seen[2:3], seen[3:], [])):
        said = chat.turn_ids(f"The {number}. one: yellow, I think.")
        turns.append(Turn(len(ids), len(ids) + len(said), "", "stop"))
        ids, mask = [*ids, *said], [*mask, *[True] * len(said)]
        if number < 2:
            told, shown = chat.continuation(Message("user", ("Look: ", *more)), said[-1])
            ids, mask, images = [*ids, *told], [*mask, *[False] * len(told)], [*images, *shown]
    # One placeholder for each picture, as the processor expects it.
    words = chat.raw(ids)
    for image in images:
        words = words.replace("<|image_pad|>" * image.tokens, "<image>", 1)
    values = np.zeros(len(ids), dtype=np.float32)
    trajectory = Trajectory(
        task_id="t",
        index=0,
        sample=0,
        prompt_length=start,
        images=images,
        ids=np.array(ids),
        loss_mask=np.array(mask),
        logp=values,
        entropy=values,
        turns=turns,
        stop_reason="answer",
        reward=0.0,
        success=False,
    )
    rendered = words.replace("<image>", "<|image_pad|>")
    model = tiny_model(tiny_config(kind, tokenizer))
    adapter = ModelAdapter(model, vision, chat.image_id)
    inputs = own_inputs(kind, chat, rendered, pictures, monkeypatch)
    return {
        "kind": kind,
        "chat": chat,
        "trajectory": trajectory,
        "inputs": inputs,
        "model": model,
        "policy": policy_of(adapter, chat),
    }


def policy_of(adapter: ModelAdapter, chat: ChatRenderer) -> TransformersPolicy:
    return TransformersPolicy(
        adapter,
        allowed_ids=len(chat.tokenizer),
        forbidden_ids=chat.forbidden_ids,
        stop_ids=chat.stop_ids,
    )


def test_inputs_are_the_processors_own(episode: dict[str, Any]) -> None:
    inputs, adapter = episode["inputs"], episode["policy"].adapter
    trajectory: Trajectory = episode["trajectory"]
    assert inputs["input_ids"][0].tolist() == trajectory.ids.tolist()
    patches, grids = adapter.vision.patches(trajectory.images)
    assert torch.equal(grids, inputs["image_grid_thw"])
    assert len({tuple(grid) for grid in grids.tolist()}) == len(SIZES)
    assert torch.equal(patches, inputs["pixel_values"])
    expected, _ = episode["model"].model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    assert torch.equal(adapter.positions(trajectory.ids, trajectory.images), expected[:, 0])


def test_prompts_in_the_real_vocabulary(
    qwen_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3's vocabulary is Qwen2.5's with four more tokens, which are not special."""
    tokenizer = copy.deepcopy(qwen_tokenizer)
    tokenizer.add_tokens(["<tool_response>", "</tool_response>", "<think>", "</think>"])
    tokenizer.chat_template = str(chat_template("qwen3_vl_thinking"))
    chat, vision = ChatRenderer(tokenizer), VisionProcessor(picture_processor("qwen3_vl"))
    pictures = [random_picture(i, *size) for i, size in enumerate(SIZES)]
    seen = [vision.encode(each, limits(vision)) for each in pictures]
    text = "Größe in ℝ², 質問: 3.14\n\n\tor 1,000?  "
    ids, images = chat.prompt(
        [
            Message("system", ("You may call <tools>{}</tools>.",)),
            Message("user", (text, *seen[:3], "and", seen[3], text)),
        ]
    )
    words = chat.raw(ids)
    for image in images:
        words = words.replace("<|image_pad|>" * image.tokens, "<image>", 1)
    assert words.endswith("<|im_start|>assistant\n<think>\n")
    words = words.replace("<image>", "<|image_pad|>")
    inputs = own_inputs("qwen3_vl", chat, words, pictures, monkeypatch)
    assert inputs["input_ids"][0].tolist() == ids


def test_scores_are_those_of_the_models_own_logits(episode: dict[str, Any]) -> None:
    trajectory: Trajectory = episode["trajectory"]
    with torch.no_grad():  # positions are the model's business here
        logits = episode["model"](**episode["inputs"]).logits[0, :-1].float()
    rows = logits.index_fill(1, episode["policy"].banned, -torch.inf).log_softmax(-1)
    logp = rows.gather(1, torch.tensor(trajectory.ids)[1:, None])[:, 0].numpy()
    entropy = torch.special.entr(rows.exp()).sum(-1).numpy()
    mask = trajectory.loss_mask[1:]
    packed = copy.deepcopy(episode["model"])
    attend_by_rows(packed, "sdpa")
    kept = episode["policy"].adapter
    both = (kept, ModelAdapter(packed, kept.vision, kept.image_token_id))
    short = copy.copy(trajectory)  # another row in the pass, of another length
    end = trajectory.turns[0].end
    short.ids, short.loss_mask = trajectory.ids[:end], trajectory.loss_mask[:end]
    short.turns, short.images = trajectory.turns[:1], trajectory.images[:2]
    for adapter in both:
        scores = policy_of(adapter, episode["chat"]).score([short, trajectory], with_entropy=True)
        for score in scores:
            own = mask[: len(score.logp) - 1]
            for found, expected in ((score.logp, logp), (score.entropy, entropy)):
                np.testing.assert_allclose(
                    found[1:][own], expected[: len(own)][own], rtol=0, atol=1e-5
                )


@pytest.fixture(params=SEEING)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_generation_with_a_cache_gives_the_log_probs_of_one_pass(
    kind: str, chat: ChatRenderer
) -> None:
    """Six conversations of two turns enter and leave the batch at different times."""
    vision = VisionProcessor(picture_processor(kind))
    model = tiny_model(tiny_config(kind, chat.tokenizer))
    policy = policy_of(ModelAdapter(model, vision, chat.image_id), chat)

    def ask(*parts: str | EncodedImage) -> tuple[list[int], list[EncodedImage]]:
        return chat.prompt([Message("user", ("Look at this carefully, please: ", *parts))])

    talks = []
    for key in range(6):
        images = [
            vision.encode(random_picture(10 * key + i, 40 + 30 * key, 70), limits(vision))
            for i in range(1 + key % 3)
        ]
        more = ask(images[-1], "?") if key % 2 else ask("?")
        talks.append(Talk(key, *ask(*images[:-1], "?"), [4, 6], [more], key // 2, key % 3))
    assert_equals_full_pass(policy, play(policy, talks, T1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_models_own_pass(
    episode: dict[str, Any], checkpointing: bool
) -> None:
    trajectory, model = episode["trajectory"], episode["model"]
    rows = model(**episode["inputs"]).logits[0, :-1].float()
    rows = rows.index_fill(1, episode["policy"].banned, -torch.inf).log_softmax(-1)
    chosen = rows.gather(1, torch.tensor(trajectory.ids)[1:, None])[:, 0]
    chosen[torch.from_numpy(trajectory.loss_mask[1:])].sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    still = {name for name, gradient in expected.items() if not gradient.any()}
    assert not still
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    policy = episode["policy"]
    policy.logprobs(TrajectoryBatch.build(policy.adapter, [trajectory]))[0].sum().backward()
    for name, parameter in model.named_parameters():
        scale = float(expected[name].abs().max())
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * max(1.0, scale), name


@pytest.mark.parametrize(
    ("targets", "tower"), [("all-linear", True), (r".*language_model.*\.(q|v|down)_proj", False)]
)
def test_lora_trains_with_the_tower_or_without(
    kind: str,
    targets: str,
    tower: bool,
    chat: ChatRenderer,
    tmp_path: Path,
    random_trajectory: Callable[..., Trajectory],
) -> None:
    save_checkpoint(tmp_path / "base", kind, chat.tokenizer)
    videos = "video_preprocessor_config.json"
    (tmp_path / "base" / videos).write_text('{"fps": 2}', "utf-8")
    spec = ModelSpec(str(tmp_path / "base"), lora={"r": 2, "target_modules": targets})
    loaded = load_model(spec, "student", torch.device("cpu"))
    assert loaded.vision is not None
    image = loaded.vision.encode(random_picture(1, 70, 90), limits(loaded.vision))
    policy = loaded.policy(forbidden_ids=chat.forbidden_ids, stop_ids=chat.stop_ids)
    batch = TrajectoryBatch.build(loaded.adapter, [random_trajectory(1, [image])])
    logp = policy.logprobs(batch)[0]
    logp.sum().backward()  # type: ignore[no-untyped-call]
    named = dict(loaded.adapter.model.named_parameters())
    got = {n for n, p in named.items() if p.grad is not None and p.grad.any()}
    assert got == {n for n in got if "lora_B" in n}  # A's gradient is zero while B is
    assert any(".language_model." in n for n in got)
    assert any(".visual." in n for n in got) == tower
    with torch.no_grad():
        for name in got:
            named[name] += 0.01
    moved = policy.logprobs(batch)[0].detach()
    assert not torch.allclose(moved, logp.detach(), atol=1e-4)
    loaded.save(tmp_path / "merged", merge=True)
    assert (tmp_path / "merged" / videos).read_text("utf-8") == '{"fps": 2}'
    plain = load_model(spec.saved_in(tmp_path / "merged"), "student", torch.device("cpu"))
    again = plain.policy(forbidden_ids=chat.forbidden_ids, stop_ids=chat.stop_ids)
    torch.testing.assert_close(again.logprobs(batch)[0].detach(), moved, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_trains_and_goes_on(
    family: str, tmp_path: Path, chat: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    models = [
        f"model.{role}.path={save_checkpoint(tmp_path / role, family, chat.tokenizer, seed)}"
        for seed, role in enumerate(("student", "teacher"))
    ]
    words = [*models, "batch.prompts=2", "batch.mini_batch=2", "evaluation.tasks=0"]
    words += ["optimizer.lr=1e-3", "rollout.max_turn_tokens=8", "objective.switch_step=1"]
    train(tmp_path / "whole", *words, "steps=2")
    train(tmp_path / "parts", *words, "steps=1")
    train(tmp_path / "parts", *words, "steps=2")
    assert_same_weights(tmp_path / "whole/final", tmp_path / "parts/final")
    for row in train_rows(tmp_path / "whole"):
        assert np.isfinite([row["loss"], row["reward/mean"]]).all()
        assert row["grad_norm"] > 0


def test_settings_are_those_of_the_family(tmp_path: Path, chat: ChatRenderer) -> None:
    folder = save_checkpoint(tmp_path / "model", "qwen3_vl", chat.tokenizer)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["text_config"]["intermediate_size"] = 200_000  # no longer a toy
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    words = [f"model.{role}.path={folder}" for role in ("student", "teacher")]
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        with pytest.raises(ConfigError, match=r"\nAdd model=qwen3_vl, or"):
            check_student(compose("train", words))
        made, _ = load_config(compose("train", ["model=qwen3_vl", "data=none", *words]))
    for given in (made.pixels.prompt, made.pixels.observation):
        assert given.min_pixels % 1024 == given.max_pixels % 1024 == 0


# What is refused


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ({"model_type": "qwen3_vl_moe"}, "qwen3_vl_moe"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": "qwen3_5"}, "qwen3_5"),
        ({"model_type": "qwen3_next"}, "qwen3_next"),
        ({"model_type": "llava"}, "llava"),
        ({"model_type": "internvl"}, "internvl"),
        ({"model_type": "gemma3"}, "gemma3"),
        ({"model_type": "of_tomorrow"}, "of_tomorrow"),
    ],
)
def test_other_families_are_refused_by_name(
    entries: dict[str, Any], name: str, tmp_path: Path, chat: ChatRenderer
) -> None:
    folder = save_checkpoint(tmp_path / "model", "qwen3_vl", chat.tokenizer)
    (folder / "config.json").write_text(json.dumps(entries), "utf-8")
    with pytest.raises(ModelError) as caught:
        check_available(ModelSpec(str(folder)), "student")
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"the student '{folder}' is a {name} model, which is not supported")
    assert "Qwen2-VL, Qwen2.5-VL, Qwen3-VL (with pictures)" in second
    assert "Qwen3, Llama, Mistral (text only)" in second


def test_a_text_model_on_a_server_may_be_of_any_family(tmp_path: Path, chat: ChatRenderer) -> None:
    folder = save_checkpoint(tmp_path / "model", "qwen3_vl", chat.tokenizer)
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}', "utf-8")
    assert check_available(ModelSpec(str(folder)), "teacher", weights=False).num_experts == 128


def test_a_teacher_of_another_family_is_refused(tmp_path: Path, chat: ChatRenderer) -> None:
    def load(kind: str, tokenizer: Any) -> Processing:
        folder = save_checkpoint(tmp_path / f"{kind}{len(tokenizer)}", kind, tokenizer)
        return load_processing(ModelSpec(str(folder)), "teacher")

    student, teacher = (load(kind, chat.tokenizer) for kind in ("qwen2_5_vl", "qwen3_vl"))
    with pytest.raises(ModelError, match=r"patch_size is 14 and 16, image_mean .*\nUse a teacher"):
        check_vocabularies(student, teacher)
    more = copy.deepcopy(chat.tokenizer)
    more.add_tokens(["<tool_response>", "</tool_response>"])
    with pytest.raises(VocabularyMismatchError, match=r"2 token ids.*\n.*'<tool_response>'"):
        check_vocabularies(student, load("qwen3_vl", more))
    check_vocabularies(teacher, load("qwen3_vl", chat.tokenizer))


def test_another_models_picture_processor_is_refused(tmp_path: Path, chat: ChatRenderer) -> None:
    folder = save_checkpoint(tmp_path / "model", "qwen3_vl", chat.tokenizer)
    picture_processor("qwen2_5_vl").save_pretrained(folder)
    with pytest.raises(ModelError, match=r"patch_size 16, .* has 14\.\nPut"):
        load_processing(ModelSpec(str(folder)), "student")


def test_a_qwen3_vl_whose_positions_vllm_would_not_mix_is_refused(
    tmp_path: Path, chat: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any weights are read: under verl, by a policy, and for either role of a run."""
    folder = save_checkpoint(tmp_path / "model", "qwen3_vl", chat.tokenizer)
    spec = ModelSpec(str(folder))
    check_for_vllm(check_available(spec, "student"), spec.path, "student")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rope = config["text_config"]["rope_parameters"]
    assert rope.pop("mrope_interleaved")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    told = 'config.json of the %s .* lacks "mrope_interleaved": true, without .*\nAdd it to text'
    with pytest.raises(ModelError, match=told % "student") as caught:
        VerlEngine._check_models({"student": spec})
    assert str(caught.value).count("\n") == 1
    role = PolicyRole("teacher", {}, load_processing(spec, "teacher"), "float32", (), ())
    with pytest.raises(ModelError, match=told % "teacher"):
        make_vllm_policy(role)
    monkeypatch.setattr(setup, "check_roles", lambda *_: None)  # asks for vLLM's package
    for name in ("student", "teacher"):
        words = [f"model.{each}.path={folder}" for each in ("student", "teacher")]
        run, _ = composed(*words, f"policy.{name}.name=vllm")
        with pytest.raises(ModelError, match=told % name):
            setup.prepared(run, run_objective(run), tmp_path / "report.json")
    del rope["mrope_section"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ModelError, match=r'true and "mrope_section": \[24, 20, 20\], without'):
        check_for_vllm(check_available(spec, "student"), spec.path, "student")
