"""The distributed engine's parts that need neither verl nor Ray."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import composed, last_of_each

from reopold_agent.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    ServerStalledError,
    StorageError,
)
from reopold_agent.objectives import Reopold, TokenBatch
from reopold_agent.policies import loading
from reopold_agent.policies.loading import ModelSpec
from reopold_agent.policies.lora import with_adapter
from reopold_agent.train.collect import step_episodes
from reopold_agent.train.data_order import TaskOrder
from reopold_agent.train.interrupts import Interrupts
from reopold_agent.train.totals import TokenTotals
from reopold_agent.train.verl import engine as verl_engine
from reopold_agent.train.verl.checkpoints import newest_checkpoint, save_checkpoint, steps_of
from reopold_agent.train.verl.client import (
    Servers,
    SharedPictures,
    VerlGenerator,
    VerlPolicy,
    aligned_scores,
)
from reopold_agent.train.verl.compose import check_adapter
from reopold_agent.train.verl.engine import VerlEngine
from reopold_agent.train.verl.follow import Follower
from reopold_agent.train.verl.overrides import check_overrides
from reopold_agent.train.verl.records import EPISODE, from_row, pixels_of, to_row
from reopold_agent.train.verl.stop import StoppedError, StopRequest
from reopold_agent.train.verl.tasks import StepTasks
from reopold_agent.train.verl.watch import Watch
from reopold_agent.types import (
    Completion,
    EncodedImage,
    Request,
    Sampling,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)


def trajectory(prompt: int = 3, response: int = 5, seed: int = 0) -> Trajectory:
    rng = np.random.default_rng(seed)
    length = prompt + response
    mask = np.zeros(length, dtype=np.bool_)
    mask[prompt:] = rng.random(response) < 0.7
    mask[prompt] = True
    call = ToolCall("crop_image", {"bbox_2d": [0, 0, 1, 1]}, ok=False, error="too small")
    return Trajectory(
        task_id="t7",
        index=7,
        sample=2,
        prompt_length=prompt,
        ids=rng.integers(0, 100, length),
        loss_mask=mask,
        logp=np.where(mask, -rng.random(length), 0).astype(np.float32),
        entropy=np.zeros(length, np.float32),
        images=[EncodedImage(np.full((28, 56, 3), 9, np.uint8), (1, 2, 4), 2)],
        turns=[Turn(prompt, length, "words", "stop", call)],
        stop_reason=StopReason.ANSWER,
        reward=0.5,
        success=True,
        info={"answer": "B"},
        seconds=1.5,
        teacher_logp=np.where(mask, -2 * rng.random(length), 0).astype(np.float32),
        prompt_digest="0f1e",
    )


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_row_gives_the_same_trajectory_back(prompt: int, response: int, seed: int) -> None:
    before = trajectory(prompt, response, seed)
    row = to_row(before)
    own = np.arange(response, dtype=np.float32)
    row["old_log_probs"], row["entropy"] = torch.from_numpy(own), torch.from_numpy(own + 1)
    training_row = from_row(row)
    after, logp = training_row.trajectory, training_row.old_logp
    assert logp is not None
    assert [(p == i.pixels).all() for p, i in zip(pixels_of(row), before.images, strict=True)]
    for name, value in vars(before).items():
        got = getattr(after, name)
        if isinstance(value, np.ndarray) and name != "entropy":
            np.testing.assert_array_equal(got, value, err_msg=name)
            assert got.dtype == value.dtype, name
        elif name not in ("images", "entropy"):
            assert got == value, name
    live = before.loss_mask[prompt:]
    np.testing.assert_array_equal(logp[prompt:], own * live)
    np.testing.assert_array_equal(after.entropy[prompt:], (own + 1) * live)
    assert not logp[:prompt].any()


def test_a_row_is_in_verls_alignment() -> None:
    before = trajectory()
    row = to_row(before)
    assert before.teacher_logp is not None
    # Entry i belongs to token i + 1.
    np.testing.assert_array_equal(row["teacher_logprobs"][:-1].numpy(), before.teacher_logp[1:])
    assert row["position_ids"].dim() == 1  # nested 3-axis positions break on equal lengths
    assert row["rm_scores"].tolist() == [0, 0, 0, 0, 0.5]
    assert json.loads(row[EPISODE])["turns"][0]["tool_call"]["error"] == "too small"
    before.teacher_logp = None  # until a teacher on shared GPUs scores it
    unscored = to_row(before)
    assert row.keys() - unscored.keys() == {"teacher_logprobs"}
    assert from_row(unscored).trajectory.teacher_logp is None
    assert row["multi_modal_inputs"]["pixels"][0].dtype == np.uint8


def test_teacher_scores_are_checked_and_shifted() -> None:
    t = trajectory()
    ids = np.append(t.ids[1:], 0)
    values = np.linspace(-1, -2, len(ids)).astype(np.float32)
    scores = aligned_scores(t, ids, values)
    position = int(np.nonzero(t.loss_mask)[0][0])
    assert scores[position] == values[position - 1]
    assert not scores[~t.loss_mask].any()
    with pytest.raises(ModelError, match="scored 9 tokens of task t7, which has 8"):
        aligned_scores(t, np.append(ids, 0), np.append(values, 0))
    wrong = ids.copy()
    wrong[2] += 1
    with pytest.raises(ModelError, match="at position 3"):
        aligned_scores(t, wrong, values)
    infinite = values.copy()
    infinite[position - 1] = -np.inf
    with pytest.raises(NonFiniteError, match="not finite"):
        aligned_scores(t, ids, infinite)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"algorithm.rollout_correction.rollout_is": "token"}, "Set objective.importance_cap ins"),
        ({"algorithm": {"rollout_correction": {"bypass_mode": True}}}, "objective.importance_cap"),
        ({"algorithm.use_kl_in_reward": True}, "Set objective= and its settings instead."),
        ({"actor_rollout_ref.actor": {"ppo_epochs": 2}}, "Set batch.* instead."),
        ({"actor_rollout_ref.rollout.temperature": 0.7}, "Set sampling.* instead."),
        ({"trainer.test_freq": 5}, "Set evaluation.* instead."),
        ({"actor_rollout_ref.model.use_remove_padding": True}, "Set engine.packed instead."),
        ({"actor_rollout_ref.model.lora_rank": 8}, "Set model.student.lora instead."),
        (
            {"actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2},
            "Set rollout.max_response_tokens, ",
        ),
    ],
)
def test_verls_settings_that_would_not_act_are_refused(
    overrides: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_overrides(overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert told in lines[1]
    check_overrides({"trainer.balance_batch": False, "actor_rollout_ref.rollout.max_num_seqs": 7})


UNSUPPORTED = [
    (["objective=gkd"], "Use engine=local."),
    (["model.student.lora={r: 8, use_dora: true}"], "Leave it out (there are r, lora_alpha, "),
    (["model.student.lora={r: 8, modules_to_save: [norm]}"], "Leave it out (there are r, "),
    (["model.student.lora={r: 8, init_lora_weights: pissa}"], "Leave it out (there are r, "),
    (["engine.attention=flash_attention_2"], "Use engine.attention=auto, which takes sdpa there."),
    (["engine.teacher_gpus_per_node=2"], "Raise the first or lower the others; "),
    (["engine.student_server.tensor_parallel=3"], "Choose a divisor of 1, or another "),
    (
        ["engine.gpus_per_node=4", "engine.student_server.tensor_parallel=3"],
        "Choose a number of GPUs that vLLM can share it out among: 1, 2.",
    ),
    (["+engine.overrides={algorithm.gamma: 0.5}"], "Set objective= and its settings instead."),
    (["engine.device=cuda:1"], "Use auto, cuda or cpu."),
]
TWO_GPUS = (
    "engine=verl",
    "engine.device=cpu",
    "engine.gpus_per_node=2",
    "engine.teacher_gpus_per_node=1",
)


@pytest.mark.parametrize(("words", "advice"), UNSUPPORTED)
def test_what_it_cannot_do_is_told_without_verl(
    words: list[str], advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_verl() -> None:
        raise MissingExtraError("verl", "verl,vllm", "engine=verl")

    def start(*words: str) -> None:
        config, raw = composed(*last_of_each(*TWO_GPUS, *words))
        VerlEngine(config, raw, tmp_path, []).run()

    monkeypatch.setattr(verl_engine, "_require_verl", no_verl)
    with pytest.raises(MissingExtraError):
        start()
    with pytest.raises(ConfigError) as caught:
        start(*words)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(advice)


@pytest.mark.parametrize(
    ("student", "lora", "told"),
    [
        ("arithmetic_student", {"target_modules": ["nothing_like_it"]}, "nothing_like_it"),
        (
            "arithmetic_student",
            {"target_modules": ["q_proj", "v_porj"]},
            r"names 'v_porj', which this model does not have\.\nDid you mean 'v_proj'\? Its linear "
            r"layers: down_proj, gate_proj, k_proj, ",
        ),
        (
            "student",
            {"target_modules": "all-linear", "inference_mode": True},
            r"leaves nothing to train\.\nLeave out inference_mode",
        ),
        (
            "student",
            {"target_modules": ["layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [0]},
            "",
        ),
        ("arithmetic_student", {"target_modules": ["lm_head"]}, "must not cover the output emb"),
        ("student", {"target_modules": ["embed_tokens"]}, "Leave embed_tokens out"),
        ("student", {"target_modules": "all-linear", "r": 8}, ""),
    ],
)
def test_an_adapter_that_does_not_fit_is_told_without_weights(
    student: str, lora: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(loading, "load_model", None)
    specs = {"student": ModelSpec(f"demo:{student}", lora=lora)}
    with pytest.raises(ModelError, match=told) if told else nullcontext():
        VerlEngine._check_models(specs)


def test_an_adapter_of_a_separate_input_embedding_is_refused(make_model: Any) -> None:
    pytest.importorskip("peft")
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ConfigError) as caught:
        check_adapter(with_adapter(model, {"target_modules": ["embed_tokens"]}))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("Leave embed_tokens out of model.student.lora.target_modules")


@pytest.mark.parametrize("seeded", [False, True])
def test_requests_have_seeds_of_their_own_or_none(seeded: bool) -> None:
    """On GPUs a seed makes vLLM draw row by row; without it the engine's own is used."""
    servers = Servers(None, None, frozenset({1}), SharedPictures(), "student", 9.0, seeded)  # type: ignore[arg-type]
    generator = VerlGenerator(servers, Sampling(1.0, 1.0))
    sent = [
        generator._parameters(Request(key, (1, 2), (), seed=(0, key), max_tokens=4))
        for key in (0, 1, 0)
    ]
    assert ["seed" in each for each in sent] == [seeded] * 3
    if seeded:
        assert sent[0]["seed"] == sent[2]["seed"] != sent[1]["seed"]


@pytest.mark.parametrize(("tasks", "prompts"), [(10, 4), (3, 5), (7, 7)])
def test_draws_are_those_of_the_local_engine(tasks: int, prompts: int) -> None:
    samples, steps = 3, 6
    order = TaskOrder({"math": tasks}, 11, {"math": 1.0})
    rows = StepTasks(order, prompts, samples, steps)
    assert len(rows) == prompts * steps
    for step in range(steps):
        drawn = [order[step * prompts + k] for k in range(prompts)]
        expected = [(e.env, e.index, e.sample) for e in step_episodes(drawn, samples)]
        got = []
        for place in range(prompts):
            row = rows[step * prompts + place]
            assert (row["step"], row["position"]) == (step, step * prompts + place)
            got += [(row["env"], row["index"], row["first_sample"] + k) for k in range(samples)]
        assert got == expected
        assert len(set(got)) == len(got)  # no episode twice


def test_totals_do_not_depend_on_the_split() -> None:
    rng = np.random.default_rng(0)

    def tensor(scale: float) -> torch.Tensor:
        return torch.from_numpy(-scale * rng.random((6, 5))).float()

    batch = TokenBatch(tensor(1), tensor(1), tensor(6), -tensor(1), tensor(1) < -0.3)
    objective = Reopold(switch_step=1)

    def totals(rows: slice) -> TokenTotals:
        part = TokenBatch(*[value[rows] for value in vars(batch).values() if value is not None])
        result = TokenTotals()
        result.add(objective.terms(part, 0, None), part.loss_mask)
        return result

    whole = totals(slice(0, 6))
    merged = TokenTotals()
    for start in (0, 2, 3):
        merged.merge(totals(slice(start, {0: 2, 2: 3, 3: 6}[start])))
    assert merged.denominator == whole.denominator > 0
    assert merged.tokens == whole.tokens == int(batch.loss_mask.sum())
    assert merged.loss == pytest.approx(whole.loss)
    assert merged.shares() == pytest.approx(whole.shares())


class Shown:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def step(self, row: Any) -> None:
        self.rows.append(row)

    evaluation = step


def test_rows_of_another_process_are_shown_once_and_whole(tmp_path: Path) -> None:
    path, shown = tmp_path / "metrics.jsonl", Shown()
    path.write_text(json.dumps({"kind": "train", "step": 0}) + "\n")
    follower = Follower(path, shown, seconds=0.01)  # type: ignore[arg-type]
    with follower, path.open("a") as stream:
        stream.write(json.dumps({"kind": "eval", "step": 1}) + "\n" + '{"kind": "train",')
        stream.flush()
        deadline = time.monotonic() + 10
        while not shown.rows and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [row["step"] for row in shown.rows] == [1]
        stream.write(' "step": 2}\n')
    assert [row["step"] for row in shown.rows] == [1, 2]


def shards(folder: Path) -> None:
    (folder / "actor").mkdir()
    (folder / "actor" / "model.pt").write_bytes(b"weights")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_are_kept_and_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 9, 10):
        saved = save_checkpoint(tmp_path, step, 2, shards)
        assert newest_checkpoint(tmp_path) == saved
        assert steps_of(saved) == step
    tracker = "latest_checkpointed_iteration.txt"
    assert names(tmp_path) == ["global_step_10", "global_step_9", tracker]
    # Whoever goes back to an earlier one keeps the later ones until they are replaced.
    (tmp_path / tracker).write_text("9")
    (tmp_path / "global_step_9.copy").mkdir()
    save_checkpoint(tmp_path, 9, 1, shards)
    assert names(tmp_path) == ["global_step_10", "global_step_9", "global_step_9.copy", tracker]
    (tmp_path / tracker).write_text("11")
    with pytest.raises(CheckpointError, match="there are: global_step_10, global_step_9"):
        newest_checkpoint(tmp_path)


def no_space(_: Any = None, __: Any = None) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torchs_own_error(_: Any) -> None:  # what torch.save raises on a full disk
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


@pytest.mark.parametrize("fails", [no_space, torchs_own_error])
def test_a_full_disk_leaves_verls_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Any
) -> None:
    earlier = save_checkpoint(tmp_path, 3, 1, shards)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))

    def half(folder: Path) -> None:
        shards(folder)
        fails(folder)

    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path, 4, 1, half)
    first, second = str(caught.value).splitlines()
    assert first.endswith("global_step_4: No space left on device")
    assert second.endswith(f"the last good checkpoint is {earlier}.")
    assert newest_checkpoint(tmp_path) == earlier
    assert names(tmp_path) == ["global_step_3", "latest_checkpointed_iteration.txt"]


def test_a_tracker_that_does_not_fit_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = save_checkpoint(tmp_path, 3, 1, shards)

    def until_the_tracker(folder: Path) -> None:
        shards(folder)
        monkeypatch.setattr(os, "replace", no_space)

    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(tmp_path, 4, 1, until_the_tracker)
    assert newest_checkpoint(tmp_path) == earlier


def test_a_signal_reaches_the_trainer(tmp_path: Path) -> None:
    request = StopRequest(tmp_path)
    (tmp_path / ".stop").touch()  # of a run that was killed
    seen = []

    def ended(_: float) -> bool:
        seen.append(request.made)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if request.made:
            with pytest.raises(StoppedError):
                request.obey()
        return request.made

    with Interrupts() as interrupts:
        request.wait(ended, interrupts)
    assert seen == [False, False, True]
    request.obey()  # withdrawn once the trainer has ended
    assert names(tmp_path) == []


# Time limits of servers


class SlowServer:
    """A vLLM server in the units of a test: ``slots`` requests at once, a token takes 2 ms.

    It speaks as verl's client and hands requests to its engine as `verl.server.Server` does.
    """

    def __init__(self, slots: int, *, hangs_at: int | None = None) -> None:
        self.watch, self._slots = Watch(), asyncio.Semaphore(slots)
        self._hangs_at, self._tokens = hangs_at, 0
        self.events: list[tuple[str, tuple[int, ...]]] = []

    async def generate(self, session: str, *, stall_seconds: float, **request: Any) -> Any:
        return await self.watch.run(self._answer(request), stall_seconds)

    async def _answer(self, request: dict[str, Any]) -> Any:
        last = None
        async for output in self.watch.noted(self._engine(tuple(request["prompt_ids"]))):
            last = output
        return last

    async def _engine(self, prompt: tuple[int, ...]) -> AsyncIterator[Any]:
        self.events.append(("begin", prompt))
        ids: list[int] = []
        try:
            async with self._slots:
                while len(ids) < prompt[0]:  # the first id says how long the answer will be
                    self._tokens += 1
                    while self._hangs_at is not None and self._tokens >= self._hangs_at:
                        await asyncio.sleep(10)
                    await asyncio.sleep(0.002)
                    ids.append(5)
                    yield SimpleNamespace(
                        token_ids=ids, log_probs=[-1.0] * len(ids), stop_reason="completed"
                    )
        except (asyncio.CancelledError, GeneratorExit):
            self.events.append(("abort", prompt))
            raise
        self.events.append(("end", prompt))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def servers(server: Any, loop: asyncio.AbstractEventLoop, **settings: Any) -> Servers:
    return Servers(server, loop, frozenset({2}), SharedPictures(), "student", **settings)


def answered(server: Any, loop: asyncio.AbstractEventLoop, lengths: list[int]) -> list[Completion]:
    generator = VerlPolicy(servers(server, loop, stall_seconds=0.2)).generator(Sampling())
    generator.submit([Request(k, [n, k], [], 500, (k,)) for k, n in enumerate(lengths)])
    completions = []
    while generator.in_flight:
        completions += generator.step()
    return sorted(completions, key=lambda completion: completion.key)


def test_long_answers_of_a_full_server_are_not_cut_off(loop: asyncio.AbstractEventLoop) -> None:
    """Waiting for a place (0.9 s) and the longest answer (0.6 s) take longer than a stall (0.2)."""
    lengths = [300, 10, 10, 200, 10, 20, 150, 10, 5, 5]
    calm, full = SlowServer(len(lengths)), SlowServer(1)
    started = time.monotonic()
    for server in (calm, full):
        completions = answered(server, loop, lengths)
        assert [len(each.ids) for each in completions] == lengths
        assert [each.error for each in completions] == [None] * len(lengths)
        assert sum(kind == "begin" for kind, _ in server.events) == len(lengths)  # none sent twice
        assert not any(kind == "abort" for kind, _ in server.events)
    assert time.monotonic() - started > 1.2


def test_a_stalled_server_gets_no_second_copy_and_ends_the_run(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def quick(seconds: float) -> None:
        if seconds >= 2 and seconds != 10:
            pauses.append(seconds)
            seconds = 0
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", quick)
    server = SlowServer(4, hangs_at=30)
    with pytest.raises(ServerStalledError) as caught:
        answered(server, loop, [50])
    first, second = str(caught.value).splitlines()
    assert "vLLM server of the student stopped: in 0.2 s no request there got a token" in first
    assert "engine.student_server.stall_seconds" in second
    assert [kind for kind, _ in server.events] == ["begin", "abort"] * 3
    assert pauses == [2.0, 4.0]


def test_other_failures_of_a_server_leave_out_the_episode(
    loop: asyncio.AbstractEventLoop,
) -> None:
    class Refusing:
        async def generate(self, session: str, **request: Any) -> Any:
            raise ValueError("the prompt leaves no room")

    given = servers(Refusing(), loop, stall_seconds=1.0, retries=0)
    generator = VerlPolicy(given).generator(Sampling())
    generator.submit([Request(0, [1], [], 5, (0,))])
    (completion,) = generator.step()
    assert "leaves no room" in str(completion.error)


def test_weights_over_nccl_need_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs cupy\.\nRun pip install cupy-cuda12x"):
        verl_engine._require_sender("nccl")
    for backend in ("naive", "gloo", "nixl"):
        verl_engine._require_sender(backend)
