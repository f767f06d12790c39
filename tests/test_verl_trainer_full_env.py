"""The trainer's own parts, with stand-ins for verl's workers and servers. Starts nothing.

Needs the environment that ``.ci/run`` builds: ``pytest -m full_env``.
"""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reopold_agent.errors import CheckpointError, ConfigError, ServerStalledError
from reopold_agent.train.verl.checkpoints import newest_checkpoint
from reopold_agent.train.verl.stop import StoppedError, StopRequest

pytestmark = pytest.mark.full_env

pytest.importorskip("verl", reason="needs the full environment")


class Replica:
    """A server of a teacher; writes down what happens."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    async def wake_up(self) -> None:
        self.events.append("wakes")

    async def sleep(self) -> None:
        self.events.append("sleeps")


class Saves:
    """A worker group that writes checkpoints, or fails as Ray hands a worker's error on."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save_checkpoint(self, path: str, *_: Any, **__: Any) -> None:
        from ray.exceptions import RayTaskError

        Path(path).mkdir()
        if self.error is not None:
            made = RayTaskError("save_checkpoint", "Traceback: long", self.error)
            raise made.as_instanceof_cause()


def trainer(folder: Path, **parts: Any) -> Any:
    from reopold_agent.train.verl.trainer import Trainer

    made = Trainer.__new__(Trainer)
    made.config = SimpleNamespace(
        trainer=SimpleNamespace(default_local_dir=str(folder), max_actor_ckpt_to_keep=1)
    )
    made.train_dataloader = SimpleNamespace(state_dict=dict)
    made.checkpoint_callback = SimpleNamespace(on_save=lambda **_: None)
    made.actor_rollout_wg = Saves()
    made.global_steps, made._made, made._saved, made.timing_raw = 4, 0, 0, {}
    made._loader_before = None
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def test_a_ranks_full_disk_is_two_lines(tmp_path: Path) -> None:
    trainer(tmp_path, global_steps=3)._save_checkpoint()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CheckpointError) as caught:
        trainer(tmp_path, actor_rollout_wg=Saves(full))._save_checkpoint()
    first, second = str(caught.value).splitlines()
    assert first.endswith("global_step_4: No space left on device")
    assert "last good checkpoint is" in second
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "global_step_3"
    assert not (tmp_path / "global_step_4").exists()


@pytest.mark.parametrize(("made", "saved", "kept"), [(4, 2, "global_step_4"), (2, 2, None)])
def test_what_was_done_is_saved_before_a_stop(
    tmp_path: Path, made: int, saved: int, kept: str | None
) -> None:
    (tmp_path / ".stop").touch()
    files = SimpleNamespace(truncate_after=lambda _: None)
    stopped = trainer(tmp_path, _made=made, _saved=saved, metrics=files, trajectories=files)
    stopped._stop = StopRequest(tmp_path)
    with pytest.raises(StoppedError):
        stopped.fit(None)
    newest = newest_checkpoint(tmp_path)
    assert (newest and newest.name) == kept


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer whose teacher shares the student's GPUs; ``lost`` cannot be scored."""
    import transfer_queue
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    events: list[str] = []
    manager = SimpleNamespace(rollout_replicas=[Replica(events)])
    made = trainer(
        tmp_path,
        _shared=True,
        events=events,
        lost=set(),
        teacher_model_manager=SimpleNamespace(teacher_model_managers={"default": manager}),
    )

    def score(keys: list[str], step: int) -> set[str]:
        events.append(f"scores {' '.join(keys)} of step {step}")
        if made.lost is None:
            raise RuntimeError("a worker died")
        return set(made.lost)

    made.rollouts = SimpleNamespace(score=score)
    monkeypatch.setattr(
        transfer_queue, "kv_clear", lambda keys, partition_id: events.append(f"clears {keys[0]}")
    )
    monkeypatch.setattr(
        PPOTrainerSync,
        "_balance_batch",
        lambda self, batch, metrics: events.append(f"divides {' '.join(batch.keys)}"),
    )
    return made


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_next_steps_episodes_begin_before_the_update_and_end_before_new_weights(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    events: list[str] = []
    given = [0]  # draws that the loader has given

    def draw(self: Any) -> None:
        assert self._position == given[0]
        given[0] += 2
        events.append(f"generates {self._position // 2}")

    monkeypatch.setattr(PPOTrainerSync, "prepare_step", draw)
    monkeypatch.setattr(PPOTrainerSync, "on_sample_end", lambda self: events.append("sampled"))
    monkeypatch.setattr(PPOTrainerSync, "on_step_end", lambda self: events.append("weights"))
    rollouts = SimpleNamespace(failure=None, wait=lambda: events.append("waits"), seconds=1.5)
    config = SimpleNamespace(
        engine=SimpleNamespace(ahead=ahead), steps=3, batch=SimpleNamespace(prompts=2)
    )
    made = trainer(tmp_path, rollouts=rollouts, run_config=config)
    made.train_dataloader = SimpleNamespace(state_dict=lambda: {"given": given[0]})
    for step in range(3):
        made.global_steps = step + 1
        made.prepare_step()
        made.on_sample_end()
        events.append(f"updates {step}")
        made._save_checkpoint()
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        # A resume draws the tasks of the next step, also if these are being generated.
        assert torch.load(newest / "data.pt") == {"given": 2 * (step + 1)}
        made.on_step_end()
        made._staleness = 7
    expected = []
    for step in range(3):
        expected += [f"generates {step}"] if step == 0 or not ahead else []
        expected += ["waits", "sampled"]
        expected += [f"generates {step + 1}"] if ahead and step < 2 else []
        expected += [f"updates {step}", "waits", "weights"]
    assert events == expected


def batch() -> Any:
    from transfer_queue import KVBatchMeta

    return KVBatchMeta(keys=["a", "b"], tags=[{}, {}], partition_id="train")


def test_a_teacher_on_shared_gpus_wakes_only_to_score(shared: Any) -> None:
    shared.lost = {"a"}
    shared._balance_batch(batch(), {})
    scored = ["wakes", "scores a b of step 3", "sleeps"]
    assert shared.events == [*scored, "clears a", "divides b"]
    assert shared.timing_raw["teacher"] >= 0


def test_a_step_that_cannot_be_scored_ends_the_run(shared: Any) -> None:
    shared.lost = {"a", "b"}
    with pytest.raises(ConfigError, match="step 3: no episode"):
        shared._balance_batch(batch(), {})
    shared.lost = None
    with pytest.raises(RuntimeError, match="a worker died"):
        shared._balance_batch(batch(), {})
    assert shared.events[-1] == "sleeps"


class Actor:
    """A method of a Ray actor without Ray: its arguments are copied, as Ray's are."""

    def __init__(self, method: Any) -> None:
        self._method = method

    async def remote(self, **arguments: Any) -> Any:
        return await self._method(**pickle.loads(pickle.dumps(arguments)))


class Engine:
    """vLLM's asynchronous engine: a token takes 20 ms, and from ``stops`` tokens on none comes."""

    def __init__(self, stops: int) -> None:
        self._stops = stops
        self.events: list[tuple[str, str]] = []

    async def generate(
        self, *, sampling_params: Any, request_id: str, **_: Any
    ) -> AsyncIterator[Any]:
        self.events.append(("begin", request_id))
        ids: list[int] = []
        try:
            while len(ids) < sampling_params.max_tokens:
                await asyncio.sleep(0.02 if len(ids) < self._stops else 60)
                ids.append(7)
                values = [{7: SimpleNamespace(logprob=-0.5)} for _ in ids]
                answer = SimpleNamespace(
                    token_ids=list(ids), logprobs=values, finish_reason="length"
                )
                yield SimpleNamespace(outputs=[answer], prompt_logprobs=None)
        except (asyncio.CancelledError, GeneratorExit):
            self.events.append(("abort", request_id))
            raise


def asked(engine: Engine, tokens: int) -> Any:
    """What our client gets through verl's client and verl's server from that engine."""
    from verl.workers.rollout.llm_server import LLMServerClient

    from reopold_agent.train.verl.client import Servers, SharedPictures
    from reopold_agent.train.verl.server import Server

    settings = {
        "max_model_len": 100, "response_length": 90, "prompt_length": 10, "full_determinism": False,
        "enable_rollout_routing_replay": False, "mtp": None, "get": lambda name, default: default,
    }  # fmt: skip
    server = Server.__new__(Server)
    vars(server).update(
        config=SimpleNamespace(**settings),
        model_config=SimpleNamespace(processor=None, lora_rank=0, lora={}),
        replica_rank=0, global_steps=0, _disaggregation_role="null", _pd_decode_peers=[],
        _submission_paused=False, _admitting=0,
    )  # fmt: skip
    server.engine = engine  # as verl does once vLLM has started

    async def fields() -> list[str]:
        return []

    async def acquire(request_id: str) -> Any:
        return "server", SimpleNamespace(generate=Actor(server.generate))

    balancer = SimpleNamespace(
        require_acquire_fields=Actor(fields),
        require_release_fields=Actor(fields),
        acquire_server=Actor(acquire),
        release_server=SimpleNamespace(remote=lambda **_: None),
    )
    whole = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(name="vllm")))

    async def request() -> Any:
        client = LLMServerClient(whole, balancer)
        loop, stops = asyncio.get_running_loop(), frozenset({2})
        servers = Servers(client, loop, stops, SharedPictures(), "teacher", 0.15, retries=1)
        parameters = {"max_tokens": tokens, "logprobs": True}
        return await servers.request([1, 2, 3], [], parameters, "session")

    return asyncio.run(request())


def test_an_answer_may_take_longer_than_a_stall() -> None:
    engine = Engine(stops=100)
    output = asked(engine, 20)  # 0.4 s
    assert list(output.token_ids) == [7] * 20
    assert list(output.log_probs) == [-0.5] * 20
    assert [kind for kind, _ in engine.events] == ["begin"]


def test_verls_server_takes_a_request_back_before_the_next_attempt() -> None:
    engine = Engine(stops=3)
    with pytest.raises(ServerStalledError, match=r"of the teacher .*\n.*teacher_server\.stall_sec"):
        asked(engine, 20)
    assert [kind for kind, _ in engine.events] == ["begin", "abort"] * 2
    names = [name for _, name in engine.events]
    assert names[0] == names[1] != names[2] == names[3]


def test_a_mixtures_loss_by_hand() -> None:
    """Counts before the passes, means over environments and thresholds, on verl's own tables."""
    import json

    import torch
    from tensordict import TensorDict
    from verl.utils.tensordict_utils import assign_non_tensor

    from reopold_agent.objectives.distillation import EntropyMaskedReverseKL, ReverseKLStopGradient
    from reopold_agent.train.verl.loss import ENV, STEP, THRESHOLD, ObjectiveLoss

    def nested(rows: list[list[float]]) -> torch.Tensor:
        parts = [torch.tensor(row) for row in rows]
        return torch.nested.nested_tensor(parts, layout=torch.jagged)

    prompts, responses = [[5, 6], [5, 6, 7], [5]], [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    rewards = [[1.0, 3, 9], [5.0, 7], [2.0, 9, 4, 6]]
    both = list(zip(prompts, responses, strict=True))
    data = TensorDict(
        {
            "prompts": nested(prompts),
            "responses": nested(responses),
            "input_ids": nested([p + r for p, r in both]),
            "attention_mask": nested([[1] * len(p + r) for p, r in both]),
            "response_mask": nested([[1, 1, 0], [1, 1], [1, 0, 1, 1]]),
            "old_log_probs": nested([[0.0] * len(r) for r in responses]),
            "entropy": nested([[float(i) for i in range(len(r))] for r in responses]),
            # Shifted: an entry belongs to the token after it.
            "teacher_logprobs": nested(
                [
                    [0.0] * (len(p) - 1) + own + [0.0]
                    for p, own in zip(prompts, rewards, strict=True)
                ]
            ),
            ENV: torch.tensor([0, 1, 0]),
        },
        batch_size=3,
    )
    assign_non_tensor(data, **{STEP: 0, THRESHOLD: json.dumps(None)})
    output = {"log_probs": nested([[0.0] * len(p + r) for p, r in both])}
    names = ["a", "b"]
    means = ObjectiveLoss(
        ReverseKLStopGradient(), weighted=False, names=names, means_by_environment=True
    )
    means.counts = means.count(data)
    assert means.counts == [5, 2]
    value, _ = means(output, data)
    assert float(value) == pytest.approx(-((1 + 3 + 2 + 4 + 6) / 5 + (5 + 7) / 2) / 2)
    assert means.take_totals().denominator == 0  # the engine divides by 1
    plain = ObjectiveLoss(ReverseKLStopGradient(), weighted=False)
    assert float(plain(output, data)[0]) == -(1 + 3 + 5 + 7 + 2 + 4 + 6)
    assert plain.take_totals().denominator == 7
    masked = ObjectiveLoss(EntropyMaskedReverseKL(), weighted=False, names=names)
    assign_non_tensor(data, **{THRESHOLD: json.dumps({"a": 2.0, "b": 1.0})})
    assert float(masked(output, data)[0]) == -(4 + 6 + 7)
