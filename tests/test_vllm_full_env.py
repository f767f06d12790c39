"""``policy=vllm`` with the real vLLM (its CPU build) against transformers.

Needs the environment that ``.ci/run`` builds: ``pytest -m full_env``. An engine takes half a
minute to start, so most tests share two.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from running import composed, environment, train, train_rows, without_timings, words
from test_text_checkpoints import save_checkpoint, small_tokenizer

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.envs.from_config import make_env
from reopold_agent.errors import ServerStalledError
from reopold_agent.policies.loading import LoadedModel, ModelSpec, Processing, load_model
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.policies.vllm import VllmPolicy
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import EpisodeSpec, RolloutLimits, RolloutRunner
from reopold_agent.train.roles import Roles, make_roles
from reopold_agent.types import Message, Request, Sampling, Trajectory

pytestmark = [pytest.mark.full_env, pytest.mark.timeout(900)]

pytest.importorskip("vllm", reason="needs the full environment")

CPU = torch.device("cpu")
TOLERANCE = 1e-3
"""Of log-probs in float32, nats. Measured: 5e-6, and 2e-5 where the log-probs are about -15."""


@dataclass
class Pair:
    """Student and teacher of a task, each in vLLM and as transformers."""

    roles: Roles
    student: LoadedModel
    teacher: TransformersPolicy
    runner: RolloutRunner
    chat: ChatRenderer

    def vllm(self, role: str = "teacher") -> VllmPolicy:
        policy = self.roles.teacher if role == "teacher" else self.roles.sampler
        assert isinstance(policy, VllmPolicy)
        return policy

    def play(
        self, policy: Any, count: int = 12, seed: int = 0, **sampling: Any
    ) -> list[Trajectory]:
        episodes = [EpisodeSpec("eval", index) for index in range(count)]
        return self.runner.run(policy, episodes, Sampling(**sampling), (seed,))


@contextmanager
def pair(*overrides: str) -> Iterator[Pair]:
    config, _ = composed(*overrides)
    models = config.model
    student = load_model(ModelSpec(**vars(models.student)), "student", CPU)
    assert models.teacher is not None
    own = {each.name for each in fields(ModelSpec)}
    spec = {key: value for key, value in vars(models.teacher).items() if key in own}
    teacher = load_model(ModelSpec(**spec), "teacher", CPU)
    chat = ChatRenderer(student.tokenizer)
    runner = RolloutRunner(
        lambda: make_env(config),
        chat,
        student.vision,
        prompt_pixels=PixelLimits(**vars(config.pixels.prompt)),
        observation_pixels=PixelLimits(**vars(config.pixels.observation)),
        limits=RolloutLimits(
            max_response_tokens=config.rollout.max_response_tokens,
            max_turn_tokens=config.rollout.max_turn_tokens,
            max_turns=config.rollout.max_turns,
        ),
    )
    processing = {k: v for k, v in vars(teacher).items() if k != "adapter"}
    roles = make_roles(config, chat, student, {"teacher": Processing(**processing)})
    kinds = {"forbidden_ids": chat.forbidden_ids, "stop_ids": chat.stop_ids}
    try:
        yield Pair(roles, student, teacher.policy(**kinds, max_tokens_per_pass=16384), runner, chat)
    finally:
        runner.close()
        roles.close()


@pytest.fixture(scope="module")
def pictures() -> Iterator[Pair]:
    with pair("env=pixel_reasoner", "policy=vllm", "policy.teacher.retries=0") as made:
        yield made


def gap(one: Sequence[Any], other: Sequence[Any]) -> float:
    return max(float(np.abs(a.logp - b.logp).max()) for a, b in zip(one, other, strict=True))


# Log-probs


def test_several_turns_with_pictures_agree_with_transformers(pictures: Pair) -> None:
    played = pictures.play(pictures.vllm(), 24)
    assert sum(len(t.turns) > 1 and len(t.images) > 1 for t in played) >= 12, "the tool was used"
    assert all(call.ok for t in played for call in t.tool_calls)
    reference = pictures.teacher.score(played)
    assert gap(played, reference) < TOLERANCE
    assert gap(pictures.vllm().score(played), reference) < TOLERANCE


def test_another_models_tokens_are_scored_alike(pictures: Pair) -> None:
    """As in training: the student's tokens, of which the teacher thinks little."""
    played = pictures.play(pictures.vllm("student"), 24)
    reference = pictures.teacher.score(played)
    assert min(float(r.logp.min()) for r in reference) < -5
    assert gap(pictures.vllm().score(played), reference) < TOLERANCE
    assert gap(played, pictures.roles.trainer.score(played)) < TOLERANCE


def test_pictures_beyond_the_checkpoints_own_limits_keep_their_size(pictures: Pair) -> None:
    """The run's limits count; vLLM must not resize by those beside the checkpoint."""
    vision = pictures.student.vision
    assert vision is not None
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (280, 196, 3), dtype=np.uint8)
    image = vision.encode(noise, PixelLimits(784, 10**6))
    assert image.pixels.shape == (280, 196, 3)
    assert image.pixels.shape[0] * image.pixels.shape[1] > vision.processor.size["longest_edge"]
    ids, images = pictures.chat.prompt([Message("user", (image, "What colour is it?"))])
    (shown,) = pictures.play(pictures.vllm(), 1)
    sampled = shown.ids[shown.loss_mask].tolist()
    length = len(ids) + len(sampled)
    trajectory = replace(
        shown,
        ids=np.array([*ids, *sampled]),
        loss_mask=np.arange(length) >= len(ids),
        images=images,
    )
    reference = pictures.teacher.score([trajectory])
    assert gap(pictures.vllm().score([trajectory]), reference) < TOLERANCE


def test_text_agrees_with_transformers(tmp_path: Path) -> None:
    check_text("qwen2", "llama", tmp_path)  # `test_families_full_env` has two others


def check_text(student: str, teacher: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer("qwen25")
    sizes = {"hidden_size": 128, "head_dim": 32}  # vLLM's CPU build has no narrower heads
    paths = [
        f"model.{role}.path={save_checkpoint(tmp_path / role, tokenizer, family, seed, 3, **sizes)}"
        for seed, (role, family) in enumerate({"student": student, "teacher": teacher}.items())
    ]
    with pair("env=math", "policy=vllm", *paths) as text:
        for role, own in (("teacher", text.teacher), ("student", text.roles.trainer)):
            played = text.play(text.vllm(role), 24)
            reference = own.score(played)
            assert gap(played, reference) < TOLERANCE
            assert gap(text.vllm(role).score(played), reference) < TOLERANCE
        with changed(text, lambda name, value: value.mul_(1.05)):  # a model without pictures
            new = text.vllm("student").score(played)
            assert gap(new, text.roles.trainer.score(played)) < TOLERANCE
            assert gap(new, reference) > 0.05


def test_the_same_seeds_give_the_same_episodes(pictures: Pair) -> None:
    student = pictures.vllm("student")
    first, again = (pictures.play(student, 16, seed=5) for _ in range(2))
    other = pictures.play(student, 16, seed=6)
    assert [t.ids.tolist() for t in first] == [t.ids.tolist() for t in again]
    assert [t.ids.tolist() for t in first] != [t.ids.tolist() for t in other]


def test_greedy_episodes_are_those_of_transformers(pictures: Pair) -> None:
    played = [
        pictures.play(policy, 24, temperature=0.0) for policy in (pictures.vllm(), pictures.teacher)
    ]
    assert [t.ids.tolist() for t in played[0]] == [t.ids.tolist() for t in played[1]]


def test_samples_follow_the_distribution(pictures: Pair) -> None:
    """First tokens of many seeds against the probabilities of transformers."""
    (episode,) = pictures.play(pictures.vllm("student"), 1)
    prompt = episode.ids[: episode.prompt_length].tolist()
    count = 400
    generator = pictures.vllm("student").generator(Sampling())
    generator.submit([Request(i, prompt, episode.images[:1], 1, (9, i)) for i in range(count)])
    drawn = []
    while generator.in_flight:
        drawn += generator.step()
    ids, counts = np.unique([c.ids[0] for c in drawn], return_counts=True)
    logps = {c.ids[0]: c.logp[0] for c in drawn}
    for token, times in zip(ids, counts, strict=True):
        p = float(np.exp(logps[token]))
        assert abs(times / count - p) < 4 * np.sqrt(max(p * (1 - p), 0.01) / count)


# Weights


@contextmanager
def changed(pair: Pair, change: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """The trainer's weights changed and sent; afterwards the old ones are sent again."""
    model = pair.roles.trainer.adapter.model
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    try:
        with torch.no_grad():
            for name, value in model.named_parameters():
                change(name, value)
        pair.roles.sync()
        yield
    finally:
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(before[name])
        pair.roles.sync()


@pytest.mark.parametrize("part", ["", "visual", "language_model"])
def test_after_a_sync_vllm_has_the_new_weights(pictures: Pair, part: str) -> None:
    """Weights of the picture encoder too: its features are cached apart."""
    vllm, trainer = pictures.vllm("student"), pictures.roles.trainer
    played = pictures.play(vllm, 8)
    old = vllm.score(played)
    torch.manual_seed(1)

    def noise(name: str, value: torch.Tensor) -> None:
        if part in name:
            value.add_(torch.randn_like(value) * 0.05)

    with changed(pictures, noise):
        new = vllm.score(played)
        assert gap(new, trainer.score(played)) < TOLERANCE
        assert gap(new, old) > 0.05
        again = pictures.play(vllm, 8)
        assert gap(again, trainer.score(again)) < TOLERANCE
    assert gap(vllm.score(played), old) < TOLERANCE


def test_lora_adapters_arrive_merged(pictures: Pair) -> None:
    spec = replace(
        pictures.student.spec,
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
    )
    model = load_model(spec, "student", CPU)
    with torch.no_grad():
        for name, value in model.adapter.model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    own = model.policy(
        forbidden_ids=pictures.chat.forbidden_ids,
        stop_ids=pictures.chat.stop_ids,
        max_tokens_per_pass=16384,
    )
    vllm = pictures.vllm("student")
    vllm.sync(model.adapter.model)
    try:
        played = pictures.play(vllm, 8)
        assert gap(played, own.score(played)) < TOLERANCE
        assert gap(played, pictures.roles.trainer.score(played)) > 0.05, (
            "the adapter does something"
        )
    finally:
        pictures.roles.sync()


def test_forbidden_ids_have_no_probability(pictures: Pair) -> None:
    """The forbidden id's row is made the most likely of all; nothing may come of it."""
    forbidden = list(pictures.chat.forbidden_ids)

    def tempt(name: str, value: torch.Tensor) -> None:
        if name.endswith("embed_tokens.weight"):
            value[forbidden[-1]] = 3 * value.abs().mean(0) * torch.sign(value).sum(0).sign()
            value[forbidden[1]] = -value[forbidden[-1]]

    trainer = pictures.roles.trainer
    with changed(pictures, tempt):
        unmasked = TransformersPolicy(
            trainer.adapter, allowed_ids=trainer.adapter.vocabulary_rows, forbidden_ids=(),
            stop_ids=sorted(trainer.stop_ids),
        )  # fmt: skip
        played = pictures.play(pictures.vllm("student"), 16)
        masked, without = trainer.score(played), unmasked.score(played)
        assert gap(masked, without) > 0.1, "without the mask it has a share"
        assert not any(np.isin(t.ids[t.loss_mask], forbidden).any() for t in played)
        assert gap(played, masked) < TOLERANCE
        assert gap(pictures.vllm("student").score(played), masked) < TOLERANCE


# Failures


def test_a_request_that_vllm_refuses_loses_its_episode_only(pictures: Pair) -> None:
    generator = pictures.vllm().generator(Sampling())
    prompt = [30] * 8
    generator.submit([
        Request(0, prompt, [], 4, (0,)), Request(1, [30] * 5000, [], 4, (1,)),
        Request(2, prompt, [], 4, (2,)),
    ])  # fmt: skip
    completions = []
    while generator.in_flight:
        completions += generator.step()
    assert {c.key: c.error is None for c in completions} == {0: True, 1: False, 2: True}


def test_an_engine_that_computes_no_token_in_time_ends_the_run(pictures: Pair) -> None:
    vllm = pictures.vllm()
    settings = vllm.settings
    vllm.settings = replace(settings, seconds=1e-4)
    try:
        with pytest.raises(ServerStalledError, match=r"computed no token for 0\.0001 s"):
            pictures.play(vllm, 6)
    finally:
        vllm.settings = settings
    sound = pictures.play(vllm, 6)
    assert all(str(t.stop_reason) != "policy_error" for t in sound)


# Training


def test_a_step_is_the_same_whoever_scores(tmp_path: Path) -> None:
    few = ("env=pixel_reasoner", "steps=2", "evaluation.teacher=false", "evaluation.tasks=1")
    train(tmp_path / "transformers", *few)
    train(tmp_path / "vllm", *few, "policy.teacher={name: vllm}")
    own, other = train_rows(tmp_path / "transformers"), train_rows(tmp_path / "vllm")
    assert len(own) == len(other) == 2
    for first, second in zip(own, other, strict=True):
        assert second.pop("teacher/dropped") == 0
        first, second = without_timings(first), without_timings(second)
        assert first.keys() == second.keys()
        for key, value in first.items():
            if isinstance(value, float):
                assert second[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
            elif "histogram" not in key:  # a value on an edge may fall to either side
                assert second[key] == value or isinstance(value, (list, dict)), key


def test_the_command(tmp_path: Path) -> None:
    arguments = words(tmp_path / "run", "env=pixel_reasoner", "policy=vllm", "steps=2")
    process = subprocess.Popen(
        arguments, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out[-4000:]
    rows = train_rows(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        assert 0 <= row["sync/logp_gap_mean"] <= row["sync/logp_gap_max"] < TOLERANCE
        assert row["rollout/dropped"] == row["teacher/dropped"] == 0
        assert row["time/sync"] > 0
        assert np.isfinite(row["loss"])
    deadline = time.monotonic() + 30
    while left := [p for p in psutil.process_iter() if _session(p.pid) == process.pid]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.2)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
