"""`policy=server` against real vLLM servers: ``vllm serve``, and our server computing with vLLM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_picture

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.errors import ModelError, PolicyRequestError
from reopold_agent.policies.loading import LoadedModel, ModelSpec, load_model, resolve_path
from reopold_agent.policies.server import ServerPolicy, make_server_policy
from reopold_agent.policies.server.protocol import tokenizer_fingerprint
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.types import (
    Completion,
    EncodedImage,
    Request,
    Sampling,
    StopReason,
    Trajectory,
)

pytestmark = [pytest.mark.full_env, pytest.mark.slow]

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


@contextmanager
def started(words: Sequence[str], url: str, log: Path) -> Iterator[Callable[[], str]]:
    """A server as a process group of its own, ended with all its children.

    Gives what waits for its first answer and returns its address.
    """
    with log.open("w") as out:
        process = subprocess.Popen(
            words,
            env={**os.environ, **ENVIRONMENT},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + 300

    def ready() -> str:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return url
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)

    try:
        yield ready
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """vLLM's server and ours, started at once: each takes half a minute to answer."""
    pytest.importorskip("vllm", reason="needs the full environment")
    ports = free_port(), free_port()
    words = [
        [
            *("vllm", "serve", resolve_path("demo:arithmetic_teacher")),
            *("--served-model-name", "arithmetic", "--host", "127.0.0.1"),
            *("--port", str(ports[0]), "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "512", "--max-num-seqs", "8"),
            *("--gpu-memory-utilization", "0.05", "--generation-config", "vllm"),
            *("--no-enable-chunked-prefill", "--max-logprobs", "-1"),
        ],
        [
            *(sys.executable, "-m", "reopold_agent.serve", "model=demo:teacher"),
            *(f"port={ports[1]}", "policy=vllm", "device=cpu"),
            *("policy.student.max_num_seqs=8", "policy.student.max_model_len=2048"),
        ],
    ]
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        ready = [
            stack.enter_context(started(each, f"http://127.0.0.1:{port}", folder / str(port)))
            for each, port in zip(words, ports, strict=True)
        ]
        yield ready[0](), ready[1]()


@pytest.fixture
def vllm_serve(servers: tuple[str, str]) -> str:
    return servers[0]


@pytest.fixture
def our_server(servers: tuple[str, str]) -> str:
    return servers[1]


def load(path: str) -> LoadedModel:
    return load_model(ModelSpec(path), "teacher", torch.device("cpu"))


@contextmanager
def connected(url: str, loaded: LoadedModel, **settings: Any) -> Iterator[ServerPolicy]:
    chat = ChatRenderer(loaded.tokenizer)
    policy = make_server_policy(
        {"urls": [url], "retries": 0, "timeout_seconds": 120.0, **settings},
        tokenizer_size=len(loaded.tokenizer),
        forbidden_ids=chat.forbidden_ids,
        stop_ids=chat.stop_ids,
        image_token_id=loaded.image_token_id,
        tokenizer_fingerprint=tokenizer_fingerprint(loaded.tokenizer),
        vocabulary_rows=loaded.adapter.vocabulary_rows,
    )
    try:
        yield policy
    finally:
        policy.close()


def local(model: LoadedModel) -> TransformersPolicy:
    chat = ChatRenderer(model.tokenizer)
    return model.policy(
        forbidden_ids=chat.forbidden_ids, stop_ids=chat.stop_ids, max_tokens_per_pass=8192
    )


def episode(
    model: LoadedModel, seed: int, length: int, images: Sequence[EncodedImage] = ()
) -> Trajectory:
    """Random words, the pictures in the middle of the prompt, two spans of the student's."""
    rng = np.random.default_rng(seed)
    chat = ChatRenderer(model.tokenizer)
    banned = {*chat.forbidden_ids, *chat.stop_ids}
    words = [i for i in range(len(model.tokenizer)) if i not in banned]
    ids = rng.choice(words, 5).tolist()
    start, end = (
        model.tokenizer.convert_tokens_to_ids(name)
        for name in ("<|vision_start|>", "<|vision_end|>")
    )
    for image in images:
        ids += [start, *[chat.image_id or 0] * image.tokens, end]
    prompt = len(ids)
    ids += rng.choice(words, length).tolist()
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[prompt + 2 : prompt + length // 2] = mask[prompt + length // 2 + 3 :] = True
    zeros = np.zeros(len(ids), dtype=np.float32)
    return Trajectory(
        task_id=f"task-{seed}",
        index=seed,
        sample=0,
        prompt_length=prompt,
        ids=np.array(ids, dtype=np.int64),
        loss_mask=mask,
        logp=zeros,
        entropy=zeros,
        images=list(images),
        turns=[],
        stop_reason=StopReason.ANSWER,
        reward=0.0,
        success=False,
    )


def continued(each: Trajectory, ids: Sequence[int]) -> Trajectory:
    """The trajectory with only these ids after it as the student's."""
    whole = np.array([*each.ids, *ids], dtype=np.int64)
    mask = np.zeros(len(whole), dtype=np.bool_)
    mask[len(each.ids) :] = True
    zeros = np.zeros(len(whole), dtype=np.float32)
    return Trajectory(
        task_id="",
        index=0,
        sample=0,
        prompt_length=len(each.ids),
        ids=whole,
        loss_mask=mask,
        logp=zeros,
        entropy=zeros,
        images=each.images,
        turns=[],
        stop_reason=StopReason.ANSWER,
        reward=0.0,
        success=False,
    )


def turns(policy: Any, prompts: Sequence[Trajectory], sampling: Sampling) -> list[Completion]:
    generator = policy.generator(sampling)
    generator.submit(
        [Request(k, p.ids.tolist(), p.images, 12, (3, k)) for k, p in enumerate(prompts)]
    )
    done: list[Completion] = []
    deadline = time.monotonic() + 120
    while generator.in_flight:
        assert time.monotonic() < deadline
        done += generator.step()
    assert [turn.error for turn in done] == [None] * len(prompts)
    return sorted(done, key=lambda turn: turn.key)


def check_turns(policy: Any, own: TransformersPolicy, prompts: Sequence[Trajectory]) -> None:
    """Greedy turns are the model's own; sampled ones depend on their seed and are scored right."""
    for mine, theirs in zip(
        turns(own, prompts, Sampling(0.0)), turns(policy, prompts, Sampling(0.0)), strict=True
    ):
        assert theirs.ids == mine.ids
        assert theirs.finish == mine.finish
    sampled = turns(policy, prompts, Sampling())
    assert [t.ids for t in sampled] == [t.ids for t in turns(policy, prompts, Sampling())]
    for prompt, turn in zip(prompts, sampled, strict=True):
        again = own.score([continued(prompt, turn.ids)])[0].logp[len(prompt.ids) :]
        np.testing.assert_allclose(turn.logp, again, atol=1e-3)


@pytest.fixture(scope="module")
def arithmetic() -> LoadedModel:
    return load("demo:arithmetic_teacher")


def test_vllm_serve_scores_text_as_transformers_does(
    vllm_serve: str, arithmetic: LoadedModel
) -> None:
    batch = [episode(arithmetic, seed, length) for seed, length in enumerate((8, 30, 60, 120))]
    expected = local(arithmetic).score(batch)
    with connected(vllm_serve, arithmetic, top_logprobs=-1, model="arithmetic") as policy:
        for each, mine, theirs in zip(batch, expected, policy.score(batch), strict=True):
            np.testing.assert_allclose(theirs.logp, mine.logp, atol=1e-3)
            assert (theirs.logp[each.loss_mask] < 0).all()
        assert policy.mask_bound.largest == 0
    with connected(vllm_serve, arithmetic, top_logprobs=20) as policy:
        low = [
            (mine.logp - theirs.logp)[each.loss_mask]
            for each, mine, theirs in zip(batch, expected, policy.score(batch), strict=True)
        ]
        assert np.concatenate(low).min() > -1e-3
        assert np.concatenate(low).max() < policy.mask_bound.largest + 1e-3
        assert policy.mask_bound.mean < 0.02


def test_vllm_serve_generates_over_the_allowed_ids(
    vllm_serve: str, arithmetic: LoadedModel
) -> None:
    prompts = [episode(arithmetic, seed, 20) for seed in range(4)]
    with connected(vllm_serve, arithmetic, top_logprobs=-1) as policy:
        check_turns(policy, local(arithmetic), prompts)
        streamed = turns(policy, prompts, Sampling())
        assert policy._vllm.streams
        policy._vllm.streams = False
        for one, other in zip(streamed, turns(policy, prompts, Sampling()), strict=True):
            assert (one.ids, one.finish) == (other.ids, other.finish)
            np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


def test_vllm_serve_says_what_it_has_and_what_is_too_long(
    vllm_serve: str, arithmetic: LoadedModel
) -> None:
    with (
        pytest.raises(ModelError, match=r"arithmetic.*another"),
        connected(vllm_serve, arithmetic, model="another"),
    ):
        pass
    with connected(vllm_serve, arithmetic) as policy:
        with pytest.raises(PolicyRequestError, match="HTTP 400") as caught:
            policy.score([episode(arithmetic, 0, 10), episode(arithmetic, 1, 600)])
        assert list(caught.value.failed) == [1]


def test_our_server_with_vllm_takes_pictures(
    our_server: str, random_pictures: Callable[[LoadedModel, int], list[EncodedImage]]
) -> None:
    model = load("demo:teacher")
    images = random_pictures(model, 3)
    batch = [
        episode(model, 0, 12),
        episode(model, 1, 20, images[:1]),
        episode(model, 2, 40, images),
        episode(model, 3, 30, images[1:2]),
    ]
    own = local(model)
    with connected(our_server, model, model="demo:teacher") as policy:
        for mine, theirs in zip(own.score(batch), policy.score(batch), strict=True):
            np.testing.assert_allclose(theirs.logp, mine.logp, atol=1e-3)
        check_turns(policy, own, batch)


@pytest.fixture
def random_pictures() -> Callable[[LoadedModel, int], list[EncodedImage]]:
    def make(model: LoadedModel, count: int) -> list[EncodedImage]:
        assert model.vision is not None
        limits = PixelLimits(784, 64 * 784)
        return [model.vision.encode(random_picture(i, 84, 112), limits) for i in range(count)]

    return make
