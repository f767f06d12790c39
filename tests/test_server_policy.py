"""`policy=server` against our own server: scores, samples, pictures, wrong models, busy servers."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from running import environment, train

from reopold_agent.common.secrets import Secret
from reopold_agent.common.weights import weights_digest
from reopold_agent.config import build
from reopold_agent.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    ModelServerError,
    NonFiniteError,
    PolicyRequestError,
    ServerStalledError,
    VocabularyMismatchError,
)
from reopold_agent.evaluate.run import Evaluation, load_config
from reopold_agent.policies.loading import resolve_path
from reopold_agent.policies.server import Identity, ServerPolicy, ServerSettings, make_server_policy
from reopold_agent.policies.server.protocol import (
    Served,
    Vocabulary,
    picture_hash,
    picture_pixels,
    picture_to_json,
    tokenizer_fingerprint,
)
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.serve import service as service_module
from reopold_agent.serve.http import PolicyServer
from reopold_agent.serve.pictures import PictureStore
from reopold_agent.serve.service import BusyError, PolicyService
from reopold_agent.serve.serving import ServeConfig, serving
from reopold_agent.tracking.metrics import read_metrics
from reopold_agent.types import (
    Completion,
    EncodedImage,
    Request,
    Sampling,
    TokenScores,
    Trajectory,
)


@pytest.fixture
def vocabulary(chat: ChatRenderer, policy: TransformersPolicy) -> Vocabulary:
    return Vocabulary(
        size=len(chat.tokenizer),
        forbidden_ids=tuple(sorted(chat.forbidden_ids)),
        stop_ids=tuple(sorted(chat.stop_ids)),
        image_token_id=chat.image_id,
        fingerprint=tokenizer_fingerprint(chat.tokenizer),
        rows=policy.adapter.vocabulary_rows,
    )


@contextmanager
def opened(
    policy: Any,
    vision: VisionProcessor | None,
    vocabulary: Vocabulary,
    *,
    token: str = "",
    picture_bytes: int = 2**26,
    **service: Any,
) -> Iterator[PolicyServer]:
    running = PolicyService(policy, **service)
    store = PictureStore(vision, picture_bytes)
    served = Served("tiny", "v1", vocabulary, "transformers", True)
    server = PolicyServer("127.0.0.1", 0, running, store, served, token=Secret(token))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        running.close()


def url_of(server: PolicyServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@contextmanager
def connected(server: PolicyServer, vocabulary: Vocabulary, **settings: Any) -> Iterator[Any]:
    client = make_server_policy(
        {"urls": [url_of(server)], "retries": 0, "backoff_seconds": 0.01, **settings},
        tokenizer_size=vocabulary.size,
        forbidden_ids=vocabulary.forbidden_ids,
        stop_ids=vocabulary.stop_ids,
        image_token_id=vocabulary.image_token_id,
        tokenizer_fingerprint=vocabulary.fingerprint,
        vocabulary_rows=vocabulary.rows,
    )
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def trajectories(
    encode: Callable[..., EncodedImage], random_trajectory: Callable[..., Trajectory]
) -> list[Trajectory]:
    """Without, with one, and with several pictures; two share one."""
    shared = encode(1)
    return [
        random_trajectory(0),
        random_trajectory(1, [shared]),
        random_trajectory(2, [shared, encode(2, 84, 112), encode(3, 140, 56)], turns=3),
        random_trajectory(3, turns=1),
    ]


def test_scores_are_those_of_the_model_in_this_process(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    trajectories: list[Trajectory],
) -> None:
    expected = policy.score(trajectories, with_entropy=True)
    with opened(policy, vision, vocabulary) as server, connected(server, vocabulary) as client:
        scores = client.score(trajectories, with_entropy=True)
        plain = client.score(trajectories)
    for trajectory, mine, theirs, without in zip(
        trajectories, expected, scores, plain, strict=True
    ):
        assert theirs.logp.dtype == np.float32
        assert theirs.logp.shape == trajectory.ids.shape
        np.testing.assert_allclose(theirs.logp, mine.logp, atol=1e-6)
        np.testing.assert_allclose(theirs.entropy, mine.entropy, atol=1e-6)
        np.testing.assert_allclose(without.logp, mine.logp, atol=1e-6)
        assert not without.entropy.any()
        assert (theirs.logp[trajectory.loss_mask] < 0).all()
        assert not theirs.logp[~trajectory.loss_mask].any()


def play(policy: Any, encode: Callable[..., EncodedImage], sampling: Sampling) -> list[Completion]:
    """Two turns of four sequences; the second shows another picture."""
    chat_ids = [[7 + i, 9, 11, 13 + i] for i in range(4)]
    image_id = policy_image_id(policy)
    images = [[encode(i)] if i % 2 else [] for i in range(4)]
    ids = [
        [*words, *[image_id] * sum(image.tokens for image in pictures)]
        for words, pictures in zip(chat_ids, images, strict=True)
    ]
    generator = policy.generator(sampling)
    turns: list[Completion] = []
    for turn in range(2):
        generator.submit(
            [Request(key, ids[key], images[key], 7, (5, key, turn)) for key in range(4)]
        )
        done: dict[int, Completion] = {}
        deadline = time.monotonic() + 60
        while generator.in_flight:
            assert time.monotonic() < deadline
            done |= {completion.key: completion for completion in generator.step()}
        for key in range(4):
            turns.append(done[key])
            more = encode(10 + key, 56, 56)
            images[key] = [*images[key], more]
            ids[key] = [*ids[key], *done[key].ids, 8, *[image_id] * more.tokens, 9]
    for key in range(4):
        generator.release(key)
    return turns


def policy_image_id(policy: Any) -> int:
    if isinstance(policy, TransformersPolicy):
        assert policy.adapter.image_token_id is not None
        return policy.adapter.image_token_id
    return int(policy._ours._vocabulary.image_token_id)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 0.9), Sampling(0.0)])
def test_same_seeds_give_the_same_turns(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    encode: Callable[..., EncodedImage],
    sampling: Sampling,
) -> None:
    expected = play(policy, encode, sampling)
    with opened(policy, vision, vocabulary) as server, connected(server, vocabulary) as client:
        turns = play(client, encode, sampling)
        waited = time.monotonic() + 10
        while server.service._kept and time.monotonic() < waited:
            time.sleep(0.01)
        assert not server.service._kept  # `release` reached the server
    assert [turn.ids for turn in turns] == [turn.ids for turn in expected]
    assert [turn.finish for turn in turns] == [turn.finish for turn in expected]
    for mine, theirs in zip(expected, turns, strict=True):
        np.testing.assert_allclose(theirs.logp, mine.logp, atol=1e-5)
        np.testing.assert_allclose(theirs.entropy, mine.entropy, atol=1e-5)


def test_pictures_travel_once_and_come_again_when_they_were_forgotten(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    trajectories: list[Trajectory],
) -> None:
    sent: list[str] = []
    with opened(policy, vision, vocabulary) as server:
        put = server.pictures.put
        server.pictures.put = lambda name, said: (sent.append(name), put(name, said))[1]  # type: ignore[method-assign, func-returns-value]
        with connected(server, vocabulary, score_batch=1) as client:
            first = client.score(trajectories)
            distinct = {picture_hash(image) for t in trajectories for image in t.images}
            assert sorted(sent) == sorted(distinct)
            assert len(distinct) == 3
            client.score(trajectories)
            assert len(sent) == 3
            server.pictures._pictures.clear()  # as if others had filled the store
            again = client.score(trajectories)
            assert set(sent[3:]) == distinct  # two requests that both missed one may both send it
    for one, other in zip(first, again, strict=True):
        np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


def test_a_store_too_small_for_one_request_says_so(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    trajectories: list[Trajectory],
) -> None:
    with (
        opened(policy, vision, vocabulary, picture_bytes=1) as server,
        connected(server, vocabulary) as client,
        pytest.raises(ModelServerError, match="picture_gib"),
    ):
        client.score([trajectories[2]])


def test_pictures_arrive_unchanged(
    encode: Callable[..., EncodedImage], vision: VisionProcessor
) -> None:
    image = encode(4, 112, 140)
    said = json.loads(json.dumps(picture_to_json(image)))
    np.testing.assert_array_equal(picture_pixels(said), image.pixels)
    store = PictureStore(vision)
    store.put(picture_hash(image), said)
    assert store.get([picture_hash(image)])[picture_hash(image)].tokens == image.tokens
    with pytest.raises(DataError, match="hash"):
        store.put("0" * 64, said)
    with pytest.raises(DataError, match="grid"):
        store.put(picture_hash(image), {**said, "grid": [1, 2, 2]})
    with pytest.raises(DataError, match="PNG"):
        store.put("x", {"png": "????", "grid": [1, 2, 2]})
    with pytest.raises(DataError, match="text only"):
        PictureStore(None).put("x", said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 300}, "number of ids"),
        ({"fingerprint": "0" * 64}, "tokenizer is another"),
        ({"forbidden_ids": (1,)}, "forbidden ids"),
        ({"image_token_id": 17}, "placeholder"),
        ({"image_token_id": None}, "text only"),
    ],
)
def test_a_wrong_teacher_is_refused_by_name(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    change: dict[str, Any],
    words: str,
) -> None:
    with (
        opened(policy, vision, replace(vocabulary, **change)) as server,
        pytest.raises(VocabularyMismatchError, match=words) as caught,
        connected(server, vocabulary),
    ):
        pass
    assert url_of(server) in str(caught.value)
    assert "'tiny'" in str(caught.value)


def test_another_checkpoint_or_revision_is_refused(
    policy: TransformersPolicy, vision: VisionProcessor, vocabulary: Vocabulary
) -> None:
    with opened(policy, vision, vocabulary) as server:
        with connected(server, vocabulary, model="tiny", revision="v1"):
            pass
        for wrong in ({"model": "other"}, {"revision": "v2"}):
            with (
                pytest.raises(ModelError, match=next(iter(wrong.values()))),
                connected(server, vocabulary, **wrong),
            ):
                pass


def test_other_stop_ids_matter_to_generation_only(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    trajectories: list[Trajectory],
) -> None:
    other = replace(vocabulary, stop_ids=vocabulary.stop_ids[:1])
    with opened(policy, vision, other) as server, connected(server, vocabulary) as client:
        assert client.score(trajectories[:1])[0].logp.any()
        generator = client.generator(Sampling())
        generator.submit([Request(0, [7, 8, 9], [], 4, (1,))])
        with pytest.raises(ModelError, match="stop_at_tool_call=true"):
            until_done(generator)


def until_done(generator: Any, seconds: float = 30.0) -> list[Completion]:
    done: list[Completion] = []
    deadline = time.monotonic() + seconds
    while generator.in_flight:
        assert time.monotonic() < deadline
        done += generator.step()
    return done


def test_one_bad_trajectory_does_not_take_the_others_along(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    trajectories: list[Trajectory],
) -> None:
    bad = replace(trajectories[1], images=[], task_id="bad")  # placeholders without a picture
    with opened(policy, vision, vocabulary) as server, connected(server, vocabulary) as client:
        with pytest.raises(PolicyRequestError, match="1 of 3") as caught:
            client.score([trajectories[0], bad, trajectories[3]])
        assert list(caught.value.failed) == [1]
        assert "placeholder" in caught.value.failed[1]
        assert caught.value.scores[1] is None
        expected = policy.score([trajectories[0]])[0]
        np.testing.assert_allclose(caught.value.scores[0].logp, expected.logp, atol=1e-5)
        generator = client.generator(Sampling())
        generator.submit([Request(0, bad.ids.tolist(), [], 4, (1,))])
        (turn,) = until_done(generator)
        assert turn.error is not None
        assert "placeholder" in turn.error


def test_a_model_that_gives_nan_is_reported_as_such(
    vision: VisionProcessor, vocabulary: Vocabulary, trajectories: list[Trajectory]
) -> None:
    class Broken:
        def score(self, given: Sequence[Trajectory], **_: Any) -> list[TokenScores]:
            return [
                TokenScores(np.full(len(t.ids), np.nan, np.float32), np.zeros(len(t.ids)))
                for t in given
            ]

    with (
        opened(Broken(), vision, vocabulary) as server,
        connected(server, vocabulary) as client,
        pytest.raises(NonFiniteError, match="not finite"),
    ):
        client.score(trajectories[:1])


def drop_one(answer: dict[str, Any], name: str) -> dict[str, Any]:
    return {**answer, name: answer[name][:-1]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda score: {**score, "length": score["length"] + 1}, "instead of"),
        (lambda score: {**score, "ids": [*score["ids"][:-1], 1]}, "id 1 instead of"),
        (lambda score: drop_one(score, "ids"), "ids instead of"),
        (lambda score: drop_one(score, "logp"), "values of logp for"),
        (lambda score: {"length": score["length"]}, "not in the protocol's form"),
        (lambda score: None, "not in the protocol's form"),
    ],
)
def test_scores_of_something_else_are_refused(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    trajectories: list[Trajectory],
    change: Callable[[dict[str, Any]], Any],
    words: str,
) -> None:
    with opened(policy, vision, vocabulary) as server, connected(server, vocabulary) as client:
        answer = server.score
        server.score = lambda *asked: {"scores": list(map(change, answer(*asked)["scores"]))}  # type: ignore[method-assign]
        with pytest.raises(ModelError, match=words) as caught:
            client.score(trajectories[:1])
        assert url_of(server) in str(caught.value)
        server.score = lambda *asked: {"scores": []}  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="0 scores for 1"):
            client.score(trajectories[:1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda turn: {**turn, "length": 2}, "continued 2 ids"),
        (lambda turn: drop_one(turn, "logp"), "log-probs"),
        (lambda turn: {**turn, **{k: turn[k] * 9 for k in ("ids", "logp", "entropy")}}, "at most"),
        (lambda turn: {**turn, "finish": "cut"}, "'cut'"),
        (lambda turn: {}, "not in the protocol's form"),
    ],
)
def test_turns_of_something_else_are_refused(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    change: Callable[[dict[str, Any]], Any],
    words: str,
) -> None:
    with opened(policy, vision, vocabulary) as server, connected(server, vocabulary) as client:
        answer = server.generate
        server.generate = lambda *asked: change(answer(*asked))  # type: ignore[method-assign]
        generator = client.generator(Sampling())
        generator.submit([Request(0, [7, 8, 9], [], 4, (1,))])
        with pytest.raises(ModelError, match=words):
            until_done(generator)


def test_the_token_is_needed_and_stays_secret(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    trajectories: list[Trajectory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with opened(policy, vision, vocabulary, token="token-of-the-server") as server:
        for wrong in (None, "token-of-somebody-else"):
            if wrong:
                monkeypatch.setenv("TEACHER_KEY", wrong)
            with (
                pytest.raises(ModelServerError, match="TEACHER_KEY") as caught,
                connected(server, vocabulary, api_key_env="TEACHER_KEY"),
            ):
                pass
            assert "token-of" not in str(caught.value)
        monkeypatch.setenv("TEACHER_KEY", "token-of-the-server")
        with connected(server, vocabulary, api_key_env="TEACHER_KEY") as client:
            assert client.score(trajectories[:1])[0].logp.any()
            assert "token-of" not in repr(vars(client.transport))
        host, port = server.server_address[:2]
        raw = http.client.HTTPConnection(str(host), int(port), timeout=10)
        raw.request("GET", "/health")
        assert raw.getresponse().status == 200  # open to all


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, ""),
        (b"[]", 400, "object"),
        (b'{"sequences": [{"ids": [1, 2], "positions": [0]}]}', 400, "after the first"),
        (b'{"sequences": [{"ids": [1, 2], "positions": [2]}]}', 400, "within"),
        (b'{"sequences": [{"ids": [1, 99999], "positions": [1]}]}', 400, "below"),
        (b'{"sequences": [{"ids": [1, -2], "positions": [1]}]}', 400, "token ids"),
        (b'{"sequences": [{"ids": [1, 2], "positions": [1], "images": ["a"]}]}', 409, "not known"),
        (b'{"sequences": 5}', 400, "list"),
        (b" " * (2**20 + 1), 413, "bytes"),
    ],
)
def test_invalid_requests_are_refused(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    body: bytes,
    status: int,
    words: str,
) -> None:
    with opened(policy, vision, vocabulary) as server:
        server.max_body_bytes = 2**20
        host, port = server.server_address[:2]
        raw = http.client.HTTPConnection(str(host), int(port), timeout=10)
        raw.request("POST", "/v1/score", body)
        reply = raw.getresponse()
        said = json.loads(reply.read())
        assert reply.status == status
        assert words in said["error"]


class Slow:
    """Scores after a while; counts what is asked together."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, []  # type: ignore[var-annotated]

    def score(self, given: Sequence[Trajectory], **_: Any) -> list[TokenScores]:
        self.calls.append(len(given))
        time.sleep(self.seconds)
        return [TokenScores(-np.ones(len(t.ids), np.float32), np.zeros(len(t.ids))) for t in given]


def in_threads(count: int, function: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = [None] * count

    def run(i: int) -> None:
        try:
            results[i] = function(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_requests_that_wait_are_scored_together(trajectories: list[Trajectory]) -> None:
    slow = Slow(0.2)
    service = PolicyService(slow)  # type: ignore[arg-type]
    try:
        results = in_threads(8, lambda i: service.score([trajectories[i % 4]]))
    finally:
        service.close()
    assert all(isinstance(scores, list) and len(scores) == 1 for scores in results)
    assert sum(slow.calls) == 8
    assert len(slow.calls) <= 3


def test_requests_that_wait_together_fail_alone(trajectories: list[Trajectory]) -> None:
    class Picky(Slow):
        def score(self, given: Sequence[Trajectory], **_: Any) -> list[TokenScores]:
            scores = super().score(given)
            if any(each is trajectories[2] for each in given):
                raise RuntimeError("I do not like it")
            return scores

    service = PolicyService(Picky(0.1))  # type: ignore[arg-type]
    try:
        results = in_threads(4, lambda i: service.score([trajectories[i]]))
    finally:
        service.close()
    assert [type(each) for each in results] == [list, list, RuntimeError, list]


def test_a_full_service_turns_requests_away(trajectories: list[Trajectory]) -> None:
    service = PolicyService(Slow(0.3), max_waiting=2)  # type: ignore[arg-type]
    try:
        results = in_threads(6, lambda i: service.score([trajectories[0]]))
    finally:
        service.close()
    busy = [each for each in results if isinstance(each, BusyError)]
    assert len(busy) == 4
    with pytest.raises(ModelServerError, match="stopped"):
        service.score([trajectories[0]])


def test_a_busy_server_is_asked_again(
    vision: VisionProcessor, vocabulary: Vocabulary, trajectories: list[Trajectory]
) -> None:
    with (
        opened(Slow(0.05), vision, vocabulary, max_waiting=1) as server,
        connected(server, vocabulary, retries=20, max_backoff_seconds=0.1) as client,
    ):
        results = in_threads(6, lambda i: client.score([trajectories[0]]))
    assert [type(each) for each in results] == [list] * 6


def test_a_sequence_asked_for_again_takes_the_place_of_the_first(
    policy: TransformersPolicy,
) -> None:
    service = PolicyService(policy)
    try:
        long = Request(0, [7, 8, 9], [], 3000, (0,))  # with this seed 220 tokens, seconds
        results: list[Any] = []

        def first() -> None:
            try:
                results.append(service.generate("a", long, Sampling()))
            except ModelServerError as error:
                results.append(error)

        thread = threading.Thread(target=first)
        thread.start()
        deadline = time.monotonic() + 20
        while not service._kept and time.monotonic() < deadline:
            time.sleep(0.001)
        second = service.generate("a", Request(0, [7, 8, 9], [], 3, (2,)), Sampling())
        thread.join(30)
        assert len(second.ids) <= 3
        (ended,) = results
        assert isinstance(ended, ModelServerError)
        assert len(service._by_key) == len(service._kept) == 1
        # A continuation that is none starts over instead of failing.
        third = service.generate("a", Request(0, [9, 9], [], 3, (2,)), Sampling())
        generator = policy.generator(Sampling())
        generator.submit([Request(0, [9, 9], [], 3, (2,))])
        assert third.ids == until_done(generator)[0].ids
    finally:
        service.close()


def test_kept_sequences_are_bounded_and_forgotten(policy: TransformersPolicy) -> None:
    service = PolicyService(policy, max_kept=3, idle_seconds=0.2)
    try:
        for i in range(6):
            service.generate(str(i), Request(0, [7, 8, 9 + i], [], 2, (i,)), Sampling())
            assert len(service._kept) <= 3
        deadline = time.monotonic() + 20
        while service._kept and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not service._kept
        assert not service._by_key
    finally:
        service.close()


def test_a_policy_that_breaks_leaves_a_server_that_works(
    policy: TransformersPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = PolicyService(policy)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(
                type(policy.generator(Sampling())),
                "step",
                lambda self: (_ for _ in ()).throw(RuntimeError("out of memory")),
            )
            with pytest.raises(RuntimeError, match="out of memory"):
                service.generate("a", Request(0, [7, 8, 9], [], 4, (1,)), Sampling())
        done = service.generate("a", Request(0, [7, 8, 9], [], 4, (1,)), Sampling())
        assert done.ids
    finally:
        service.close()


class Patient:
    """A model whose steps take ``pause`` seconds; it ``hangs`` or ``fails`` after ten of them."""

    scoring_threads = 2

    def __init__(self, policy: TransformersPolicy, pause: float) -> None:
        self.policy, self.pause = policy, pause
        self.hangs, self.fails, self.released = False, False, threading.Event()

    def generator(self, sampling: Sampling) -> Any:
        inner = self.policy.generator(sampling)
        step, steps = inner.step, itertools.count()

        def slow() -> list[Completion]:
            time.sleep(self.pause)
            if next(steps) > 10 and self.hangs:
                self.released.wait(20)
            return step()

        inner.step = slow  # type: ignore[method-assign]
        return inner

    def score(self, given: Sequence[Trajectory], **settings: Any) -> list[TokenScores]:
        time.sleep(15 * self.pause)
        if self.fails:
            raise NonFiniteError("the model overflowed")
        return self.policy.score(given, **settings)


def test_a_slow_model_has_no_time_limit_and_one_that_stops_has(
    policy: TransformersPolicy,
    vision: VisionProcessor,
    vocabulary: Vocabulary,
    trajectories: list[Trajectory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_module, "BEAT_SECONDS", 0.05)
    requests = [Request(k, [7, 8, 9], [], 80, (k,)) for k in range(4)]

    def spoken(by: Any) -> dict[int, Any]:
        generator = by.generator(Sampling())
        generator.submit(requests)
        return {turn.key: (turn.ids, turn.error) for turn in until_done(generator)}

    expected = spoken(policy)
    assert max(len(ids) for ids, _ in expected.values()) * 0.04 > 2
    model = Patient(policy, 0.04)
    with opened(model, vision, vocabulary) as server:
        with connected(server, vocabulary, timeout_seconds=0.5) as client:
            assert spoken(client) == expected
        with connected(server, vocabulary, timeout_seconds=0.5, score_batch=1) as client:
            # Their own thread computes scores, and the model's shows that it is alive.
            turns = threading.Thread(target=spoken, args=(client,))
            turns.start()
            scores = client.score(trajectories)
            for mine, theirs in zip(policy.score(trajectories), scores, strict=True):
                np.testing.assert_allclose(theirs.logp, mine.logp, atol=1e-5)
            model.fails = True  # told in the answer that has begun
            with pytest.raises(NonFiniteError, match="the model overflowed"):
                client.score(trajectories[:1])
            turns.join(30)
            model.hangs = True
            with pytest.raises(ServerStalledError, match=r"timeout_seconds \(0\.5\)"):
                spoken(client)
        model.hangs = False
        model.released.set()
        deadline = time.monotonic() + 20
        while server.service.waiting and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server.service.waiting  # it knows that nobody waits any more
        assert not any(kept.turn for kept in server.service._kept.values())


@pytest.mark.slow
def test_the_command_serves_the_demo_and_ends_when_asked(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "reopold_agent.serve", "model=demo:teacher", "port=0", "threads=1"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(
            r"serving demo:teacher \(transformers\) at (http://127\.0\.0\.1:\d+)", line
        )
        assert found, line
        with pytest.raises(VocabularyMismatchError, match="demo:teacher"):
            ServerPolicy(settings_for(found.group(1)), Vocabulary(5, (), (), None)).check()
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert not list(tmp_path.iterdir())  # it writes nothing


def settings_for(url: str) -> ServerSettings:
    return ServerSettings(urls=[url], retries=0)


def test_a_training_with_the_teacher_behind_http_is_the_same_training(tmp_path: Path) -> None:
    config = build(ServeConfig, {"checkpoint": "demo:teacher", "port": 0, "threads": 1})
    with serving(config) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        train(
            tmp_path / "http",
            "steps=2",
            "evaluation.teacher=false",
            "policy=server",
            f"policy.teacher.urls=[{url_of(server)}]",
        )
        assert server.pictures._pictures  # it saw pictures
        server.shutdown()
    train(tmp_path / "here", "steps=2", "evaluation.teacher=false")
    there, here = (
        [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
        for name in ("http", "here")
    )
    assert len(there) == len(here) == 2
    for mine, theirs in zip(here, there, strict=True):
        assert theirs["teacher/dropped"] == 0
        for name in ("loss", "grad_norm", "reward/mean", "reward/min", "reward/max"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"urls": []},
        {"urls": ["ftp://x"]},
        {"urls": ["http://user:secret@x"]},
        {"urls": ["http://x", "http://x"]},
        {"kind": "triton"},
        {"max_in_flight": 0},
        {"timeout_seconds": 0.0},
        {"retries": -1},
        {"top_logprobs": -2},
        {"unknown": 1},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], vocabulary: Vocabulary) -> None:
    with pytest.raises(ConfigError):
        make_server_policy(
            {"urls": ["http://127.0.0.1:1"], **wrong},
            tokenizer_size=vocabulary.size,
            forbidden_ids=(),
            stop_ids=(),
            image_token_id=None,
        )


@contextmanager
def served(checkpoint: str) -> Iterator[str]:
    config = build(ServeConfig, {"checkpoint": checkpoint, "port": 0, "threads": 1})
    with serving(config) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield url_of(server)
        server.shutdown()


def evaluated(folder: Path, url: str, model: str, *more: str) -> dict[str, Any]:
    words = [
        "benchmark=arithmetic",
        f"checkpoint={model}",
        "policy=server",
        "policy/role@policy.student=server",
        f"policy.student.urls=[{url}]",
        "policy.student.retries=0",
        "single.max_response_tokens=8",
        *more,
    ]
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config = load_config(compose("evaluate", words))
    return Evaluation(*config, folder).run()


def test_an_evaluation_knows_the_served_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit = "benchmarks.arithmetic.limit=2"
    student, teacher = "demo:arithmetic_student", "demo:arithmetic_teacher"
    bare = tmp_path / "without_weights"
    source = Path(resolve_path(teacher))
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with served(student) as url:
        first = url
        with pytest.raises(ModelError, match=r"arithmetic_student.* not those of ") as caught:
            evaluated(tmp_path / "wrong", url, teacher, limit)
        assert str(caught.value).count("\n") == 1
        assert not (tmp_path / "wrong" / "results.json").exists()
        digest = weights_digest(Path(resolve_path(student)))
        found = evaluated(tmp_path / "right", url, student, limit)
        assert found["model"]["served"] == {"model": student, "weights": digest}
        assert json.loads((tmp_path / "right/model.json").read_text())["weights"] == digest
        assert "nothing tells" not in caplog.text
        # A folder without weights cannot be compared, so the name is told and the digest kept.
        evaluated(tmp_path / "bare", url, str(bare), limit)
        assert caplog.text.count("nothing tells whether these are the weights") == 1
        assert json.loads((tmp_path / "bare/model.json").read_text())["weights"] == digest
    with served(teacher) as url:
        rows = (tmp_path / "bare/responses.jsonl").read_text("utf-8").splitlines(True)
        (tmp_path / "bare/responses.jsonl").write_text(rows[0], "utf-8")
        config = tmp_path / "bare/config.yaml"
        config.write_text(config.read_text().replace(first, url))
        with pytest.raises(CheckpointError, match=r"another served model: .*student.*teacher"):
            evaluated(tmp_path / "bare", url, str(bare), limit)
        assert (tmp_path / "bare/responses.jsonl").read_text("utf-8") == rows[0]


def test_addresses_serve_the_same_weights() -> None:
    policy = ServerPolicy(
        ServerSettings(urls=["http://a", "http://b"]), Vocabulary(5, (), (), None), Identity("m")
    )
    first, second = policy.transport.addresses
    policy._same(first, Identity("m", "a" * 64))
    with pytest.raises(ModelError, match="at another address"):
        policy._same(second, Identity("m", "b" * 64))
    policy._same(second, Identity("copy", "a" * 64))
    with pytest.raises(ModelError, match="other weights or another name"):
        policy._same(first, Identity("m", "b" * 64))
    policy.close()
