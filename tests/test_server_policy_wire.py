"""`policy=server` against a scripted server on loopback: vLLM's wire format, and every failure."""

from __future__ import annotations

import itertools
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from judge_server import Reply, send_reply

from reopold_agent.errors import (
    ConfigError,
    ModelError,
    ModelServerError,
    NonFiniteError,
    PolicyRequestError,
    ServerStalledError,
)
from reopold_agent.policies.base import Closeable, RunsBeside, ScoresBeside
from reopold_agent.policies.server import ServerPolicy, make_server_policy
from reopold_agent.train.rows import Row
from reopold_agent.train.scoring import Scoring
from reopold_agent.types import (
    Completion,
    EncodedImage,
    Request,
    Sampling,
    StopReason,
    Trajectory,
)

ROWS, SIZE, FORBIDDEN, STOP = 20, 16, (3, 7), (2,)
"""A vocabulary of 16 ids, two of them forbidden, in a model with 4 padded rows."""

MODEL = "teacher-7b"


def distribution(previous: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The fake model: the next id's probabilities depend on the one before; all ids have some."""
    weights = np.random.default_rng(previous).dirichlet(np.full(ROWS, 0.5)) + 1e-4
    return np.asarray(weights / weights.sum())


def allowed_logp(previous: int, token: int) -> float:
    p = distribution(previous)
    masked = [*FORBIDDEN, *range(SIZE, ROWS)]
    return float(np.log(p[token] / (1 - p[masked].sum())))


@dataclass
class Seen:
    path: str
    headers: dict[str, str]
    body: Any
    at: float


def listed(previous: int, token: int, most: int) -> dict[str, Any]:
    """vLLM's entry of a position: the most likely ids and the token itself."""
    logp = np.log(distribution(previous))
    count = ROWS if most < 0 else most
    ids = dict.fromkeys([token, *np.argsort(-logp)[:count].tolist()])
    return {str(i): {"logprob": float(logp[i]), "rank": 1, "decoded_token": f"<{i}>"} for i in ids}


def vllm_answer(seen: Seen) -> Any:
    """What vLLM answers, in the form that `test_server_policy_full_env` meets for real."""
    if seen.path == "/v1/models":
        return {"object": "list", "data": [{"id": MODEL, "max_model_len": 512}]}
    assert seen.path == "/v1/completions"
    body = seen.body
    assert body["model"] == MODEL
    prompt = body["prompt"]
    choice: dict[str, Any] = {
        "index": 0,
        "text": "",
        "finish_reason": "length",
        "prompt_token_ids": prompt,
        "token_ids": [1],
        "logprobs": None,
        "prompt_logprobs": None,
    }
    if "prompt_logprobs" in body:
        most = body["prompt_logprobs"]
        choice["prompt_logprobs"] = [
            None,
            *[listed(a, b, most) for a, b in itertools.pairwise(prompt)],
        ]
    else:
        assert body["logit_bias"] == {str(i): -100.0 for i in [*FORBIDDEN, *range(SIZE, ROWS)]}
        assert body["stop_token_ids"] == list(STOP)
        # It always says 4, 5, 2, and stops there or at the limit.
        ids = [4, 5, 2][: body["max_tokens"]]
        before = [prompt[-1], *ids[:-1]]
        entries = [listed(a, b, body["logprobs"]) for a, b in zip(before, ids, strict=True)]
        choice["token_ids"] = ids
        choice["logprobs"] = {
            "tokens": [f"token_id:{i}" for i in ids],
            "token_logprobs": [e[str(i)]["logprob"] for e, i in zip(entries, ids, strict=True)],
            "top_logprobs": [
                {f"token_id:{i}": value["logprob"] for i, value in e.items()} for e in entries
            ],
            "text_offset": [],
        }
    return {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": [choice]}


Script = Callable[[Seen, int], "Reply | None"]
"""From a request and its number among the POSTs to a reply; None is the usual one."""


class Fake:
    def __init__(self, port: int = 0) -> None:
        self.script: Script = lambda seen, number: None
        self.seen: list[Seen] = []
        self.connections = self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.open: list[socket.socket] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                with outer.lock:
                    outer.connections += 1
                    outer.open.append(self.connection)

            def do_GET(self) -> None:
                outer.answer(self)

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: Any) -> None:
                pass  # clients of these tests hang up in the middle

        self.http = Server(("127.0.0.1", port), Handler)
        self.port = int(self.http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        seen = Seen(handler.path, headers, json.loads(raw) if raw else None, time.monotonic())
        if seen.path == "/v1/info":
            send_reply(handler, Reply({"detail": "Not Found"}, 404))
            return
        with self.lock:
            number = len(self.posts)
            self.seen.append(seen)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = self.script(seen, number) or Reply(vllm_answer(seen))
            time.sleep(reply.delay)
        finally:
            with self.lock:
                self.in_flight -= 1
        send_reply(handler, reply)

    @property
    def posts(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.body is not None]

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
        for connection in self.open:  # as when its process ends
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


@contextmanager
def client(*urls: str, rows: int | None = ROWS, **settings: Any) -> Iterator[ServerPolicy]:
    quick = {"retries": 2, "backoff_seconds": 0.02, "max_backoff_seconds": 0.5}
    policy = make_server_policy(
        {"urls": list(urls), "top_logprobs": -1, **quick, **settings},
        tokenizer_size=SIZE,
        forbidden_ids=FORBIDDEN,
        stop_ids=STOP,
        image_token_id=None,
        vocabulary_rows=rows,
    )
    try:
        yield policy
    finally:
        policy.close()


def trajectory(seed: int = 0, length: int = 12) -> Trajectory:
    rng = np.random.default_rng(seed)
    words = [i for i in range(SIZE) if i not in FORBIDDEN]
    ids = rng.choice(words, length)
    mask = np.zeros(length, dtype=np.bool_)
    mask[4:7] = mask[9:] = True
    zeros = np.zeros(length, dtype=np.float32)
    return Trajectory(
        task_id=f"task-{seed}",
        index=seed,
        sample=0,
        prompt_length=4,
        ids=ids,
        loss_mask=mask,
        logp=zeros,
        entropy=zeros,
        images=[],
        turns=[],
        stop_reason=StopReason.ANSWER,
        reward=0.0,
        success=False,
    )


def expected(each: Trajectory) -> list[float]:
    ids = each.ids.tolist()
    return [allowed_logp(ids[i - 1], ids[i]) if each.loss_mask[i] else 0.0 for i in range(len(ids))]


def until_done(generator: Any, seconds: float = 30.0) -> list[Completion]:
    done: list[Completion] = []
    deadline = time.monotonic() + seconds
    while generator.in_flight:
        assert time.monotonic() < deadline
        done += generator.step()
    return done


def test_scores_are_over_the_allowed_ids_and_at_their_tokens(fake: Fake) -> None:
    with client(fake.url) as policy:
        assert isinstance(policy, ScoresBeside)
        assert isinstance(policy, Closeable)
        for each, score in zip(
            [trajectory(0), trajectory(1)],
            policy.score([trajectory(0), trajectory(1)]),
            strict=True,
        ):
            np.testing.assert_allclose(score.logp, expected(each), rtol=1e-5)
            assert score.logp.dtype == np.float32
            assert not score.entropy.any()
        assert policy.mask_bound.largest < 1e-9  # all ids were listed
        with pytest.raises(ValueError, match="entrop"):
            policy.score([trajectory()], with_entropy=True)


@pytest.mark.parametrize("most", [0, 1, 4, 12])
@pytest.mark.parametrize("rows", [ROWS, None])
def test_unlisted_masked_ids_are_bounded(fake: Fake, most: int, rows: int | None) -> None:
    each = trajectory(3, 40)
    with client(fake.url, top_logprobs=most, rows=rows) as policy:
        (score,) = policy.score([each])
        bound = policy.mask_bound
    short = np.array(expected(each))[each.loss_mask] - score.logp[each.loss_mask]
    assert (short > -1e-5).all()  # never too high
    assert short.max() <= bound.largest + 1e-5
    assert short.mean() <= bound.mean + 1e-5
    assert bound.tokens == each.response_tokens
    if most == 12 and rows:
        assert bound.largest < 0.5  # it says something, too


def test_the_bound_holds_where_the_token_is_rarer_than_the_unlisted_ids(fake: Fake) -> None:
    # A token of almost no probability is listed beside the likely ones; taking the bound on the
    # unlisted ids from it would be far too small.
    p = np.full(ROWS, 0.04)
    p[5], p[4] = 1e-9, 0.28
    p /= p.sum()
    each = trajectory(0)
    each.ids[each.loss_mask] = 5

    def script(seen: Seen, number: int) -> Reply | None:
        if seen.path != "/v1/completions":
            return None
        answer = vllm_answer(seen)
        answer["choices"][0]["prompt_logprobs"] = [None] + [
            {str(i): {"logprob": math.log(p[i])} for i in (t, 4, 0)}
            for t in seen.body["prompt"][1:]
        ]
        return Reply(answer)

    fake.script = script
    with client(fake.url, top_logprobs=2) as policy:
        (score,) = policy.score([each])
        truth = math.log(p[5] / (1 - p[[*FORBIDDEN, *range(SIZE, ROWS)]].sum()))
        assert 0 < truth - score.logp[each.loss_mask].min() <= policy.mask_bound.largest + 1e-4


def test_turns_come_with_log_probs_over_the_allowed_ids(fake: Fake) -> None:
    with client(fake.url, top_logprobs=ROWS) as policy:
        generator = policy.generator(Sampling(0.7, 0.9))
        assert isinstance(generator, RunsBeside)
        generator.submit([Request(0, [8, 9], [], 10, (1, 2)), Request(1, [8, 9], [], 2, (1, 3))])
        with pytest.raises(ValueError, match="in flight"):
            generator.submit([Request(0, [8, 9], [], 10, (1, 2))])
        whole, cut = sorted(until_done(generator), key=lambda turn: turn.key)
    assert (whole.ids, whole.finish) == ((4, 5, 2), "stop")
    assert (cut.ids, cut.finish) == ((4, 5), "length")
    truth = [allowed_logp(9, 4), allowed_logp(4, 5), allowed_logp(5, 2)]
    np.testing.assert_allclose(whole.logp, truth, rtol=1e-6)
    body = fake.posts[0].body
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.7, 0.9, 0)
    assert len({seen.body["seed"] for seen in fake.posts}) == 2


def tampered(change: Callable[[dict[str, Any]], None]) -> Script:
    def script(seen: Seen, number: int) -> Reply | None:
        if seen.path != "/v1/completions":
            return None
        answer = vllm_answer(seen)
        change(answer["choices"][0])
        return Reply(answer)

    return script


def other_ids(choice: dict[str, Any]) -> None:
    choice["prompt_token_ids"] = [*choice["prompt_token_ids"][:-1], 1]


def one_more_id(choice: dict[str, Any]) -> None:
    choice["prompt_token_ids"] = [0, *choice["prompt_token_ids"]]


def one_log_prob_less(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"].pop()


def shifted(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [None, None, *choice["prompt_logprobs"][1:-1]]


def missing(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"][5] = None


def without_ids(choice: dict[str, Any]) -> None:
    del choice["prompt_token_ids"]


def impossible(choice: dict[str, Any]) -> None:
    for entry in choice["prompt_logprobs"][1:]:
        for value in entry.values():
            value["logprob"] = -9999.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_ids, "id 1 instead of"),
        (one_more_id, "13 ids instead of 12"),
        (one_log_prob_less, "11 log-probs for 12"),
        (missing, "position 5"),
        (without_ids, "return_token_ids"),
        (impossible, "probability 0"),
    ],
)
def test_answers_about_something_else_are_refused(
    fake: Fake, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    fake.script = tampered(change)
    with client(fake.url) as policy, pytest.raises(ModelError, match=words) as caught:
        policy.score([trajectory()])
    assert fake.url in str(caught.value)
    assert len(fake.posts) == 1  # asking again would not help


def test_log_probs_that_are_off_by_one_are_refused(fake: Fake) -> None:
    fake.script = tampered(shifted)
    # The one token listed besides the most likely shows whose entry it is.
    with client(fake.url, top_logprobs=0) as policy, pytest.raises(ModelError, match="other ids"):
        policy.score([trajectory(2, 30)])


def test_nan_is_refused_by_name(fake: Fake) -> None:
    def nan(choice: dict[str, Any]) -> None:
        for value in choice["prompt_logprobs"][5].values():
            value["logprob"] = float("nan")

    fake.script = tampered(nan)
    with client(fake.url) as policy, pytest.raises(NonFiniteError, match="not finite"):
        policy.score([trajectory()])


def once(*replies: Reply) -> Script:
    def script(seen: Seen, number: int) -> Reply | None:
        return replies[number] if seen.body is not None and number < len(replies) else None

    return script


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"error": "overloaded"}, 503),
        Reply({"error": {"message": "broken", "code": 500}}, 500),
        Reply({"error": "slow down"}, 429),
        Reply(reset=True),
        Reply({"choices": []}, cut=True),
        Reply(b"<html>a proxy's page</html>"),
    ],
)
def test_temporary_failures_are_tried_again(fake: Fake, reply: Reply) -> None:
    fake.script = once(reply, reply)
    with client(fake.url) as policy:
        (score,) = policy.score([trajectory()])
    np.testing.assert_allclose(score.logp, expected(trajectory()), rtol=1e-5)
    assert len(fake.posts) == 3


def test_retry_after_is_waited_for_up_to_a_limit(fake: Fake) -> None:
    fake.script = once(
        Reply({}, 429, {"Retry-After": "0.3"}), Reply({}, 503, {"Retry-After": "3600"})
    )
    with client(fake.url) as policy:
        policy.score([trajectory()])
    first, second, third = (seen.at for seen in fake.posts)
    assert second - first >= 0.29
    assert 0.4 <= third - second < 5


def test_failures_are_named_and_the_good_results_kept(fake: Fake) -> None:
    bad = trajectory(1)

    def script(seen: Seen, number: int) -> Reply | None:
        is_bad = seen.body is not None and seen.body["prompt"] == bad.ids.tolist()
        return Reply({"error": {"message": "too long"}}, 400) if is_bad else None

    fake.script = script
    with client(fake.url) as policy:
        with pytest.raises(PolicyRequestError, match="too long") as caught:
            policy.score([trajectory(0), bad, trajectory(2)])
        assert list(caught.value.failed) == [1]
        np.testing.assert_allclose(caught.value.scores[2].logp, expected(trajectory(2)), rtol=1e-5)
        assert len(fake.posts) == 3  # what was refused is not asked again
        # As the engine does it: dropped and counted, the rest goes on.
        scoring = Scoring(policy)
        batch = [Row(each) for each in (trajectory(0), bad, trajectory(2))]
        for each in batch:
            scoring.begin(each)
        assert [row.trajectory for row in scoring.finish(batch, step=0).failed] == [bad]
        assert batch[0].trajectory.teacher_logp is not None
        scoring.close()


def test_a_server_that_is_down_for_good_ends_the_call(fake: Fake) -> None:
    fake.script = lambda seen, number: Reply({"error": "no"}, 500) if seen.body else None
    with client(fake.url) as policy:
        started = time.monotonic()
        with pytest.raises(PolicyRequestError, match="after 3 attempts"):
            policy.score([trajectory()])
        assert time.monotonic() - started < 10
        generator = policy.generator(Sampling())
        generator.submit([Request(7, [8, 9], [], 4, (1,))])
        (turn,) = until_done(generator)
        assert turn.key == 7
        assert turn.error is not None
        assert "HTTP 500" in turn.error


def test_a_silent_server_ends_the_run(fake: Fake) -> None:
    fake.script = lambda seen, number: Reply({}, delay=3.0) if seen.body is not None else None
    with client(fake.url, timeout_seconds=0.4, retries=1) as policy:
        started = time.monotonic()
        with pytest.raises(ServerStalledError, match=r"time limit|timed out") as caught:
            policy.score([trajectory()])
        assert "raise it" in str(caught.value).splitlines()[1]
        assert time.monotonic() - started < 2.5
        # A turn that is only late is not left out either.
        generator = policy.generator(Sampling())
        generator.submit([Request(7, [8, 9], [], 4, (1,))])
        with pytest.raises(ServerStalledError, match="a turn of sequence 7 failed after 2"):
            until_done(generator)


def answer_of(length: int) -> list[int]:
    return [4 + i % 3 for i in range(length - 1)] + [2]


def streamed(seen: Seen, length: int, end: int | None = None) -> Iterator[bytes]:
    """The events of a turn of some length, as vLLM sends them; ``end`` cuts it short."""
    before = seen.body["prompt"][-1]
    for number, token in enumerate(answer_of(length)[:end]):
        entry = listed(before, token, seen.body["logprobs"])
        logprobs = {
            "tokens": [f"token_id:{token}"],
            "token_logprobs": [entry[str(token)]["logprob"]],
            "top_logprobs": [{f"token_id:{i}": value["logprob"] for i, value in entry.items()}],
        }
        part = {"index": 0, "text": "\u2028", "logprobs": logprobs, "token_ids": [token]}
        if not number:
            part["prompt_token_ids"] = seen.body["prompt"]
        before = token
        yield f"data: {json.dumps({'choices': [part]}, ensure_ascii=False)}\n\n".encode()
    if end is None:
        yield b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n'


def send_stream(handler: BaseHTTPRequestHandler, events: Iterator[bytes], pause: float) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for event in events:
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        time.sleep(pause)
    handler.wfile.write(b"0\r\n\r\n")


LENGTHS = [3, 40, 5, 28, 12, 1, 33, 8]
"""Tokens of answers; at 0.02 s each the longest takes longer than the client's limit."""


class Streaming(Fake):
    """Answers turns as streams, one after the other as a full server does; ``faults`` come first.

    "hang" stops after the first token, "cut" ends the stream there, "error" says one.
    """

    pause = 0.02
    faults: list[str]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path != "/v1/completions":
            super().answer(handler)
            return
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        seen = Seen(handler.path, {}, json.loads(raw), time.monotonic())
        assert seen.body["stream"] is True
        with self.lock:
            self.seen.append(seen)
            fault = self.faults.pop(0) if self.faults else ""
        length = LENGTHS[seen.body["seed"] % len(LENGTHS)]
        with self.queue:
            if not fault:
                send_stream(handler, streamed(seen, length), self.pause)
                return
            events = streamed(seen, length + 1, end=1)
            if fault == "error":
                said = {"error": {"message": "out of memory", "code": 500}}
                events = itertools.chain(events, [f"data: {json.dumps(said)}\n\n".encode()])
            if fault == "hang":
                handler.send_response(200)
                handler.send_header("Transfer-Encoding", "chunked")
                handler.end_headers()
                event = next(iter(events))
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                handler.connection.settimeout(20)
                assert handler.rfile.read(1) == b""  # until the client hangs up
                self.hung_up.append(time.monotonic())
                return
            send_stream(handler, events, 0.0)

    def __init__(self) -> None:
        self.faults, self.hung_up = [], []
        self.queue = threading.Lock()
        super().__init__()


@pytest.fixture
def streaming() -> Iterator[Streaming]:
    server = Streaming()
    yield server
    server.close()


def spoken(policy: ServerPolicy, count: int) -> dict[int, Completion]:
    generator = policy.generator(Sampling())
    generator.submit([Request(k, [8, 9, k % 6 + 8], [], 64, (k,)) for k in range(count)])
    return {turn.key: turn for turn in until_done(generator)}


def test_neither_the_queue_nor_the_length_of_an_answer_has_a_limit(streaming: Streaming) -> None:
    """Beside others, and alone: the same lengths, where the limit is below each of the two."""
    with client(streaming.url, timeout_seconds=0.5, retries=0) as policy:
        started = time.monotonic()
        turns = spoken(policy, 16)
        assert time.monotonic() - started > 2.0  # four times the limit
        streaming.pause = 0.0
        alone = {key: turn for key in range(16) for turn in [spoken(policy, key + 1)[key]]}
    assert [turn.error for turn in turns.values()] == [None] * 16
    assert {key: turn.ids for key, turn in turns.items()} == {k: t.ids for k, t in alone.items()}
    assert max(len(turn.ids) for turn in turns.values()) == max(LENGTHS)
    for key, turn in turns.items():
        before = [key % 6 + 8, *turn.ids[:-1]]
        wanted = [allowed_logp(a, b) for a, b in zip(before, turn.ids, strict=True)]
        np.testing.assert_allclose(turn.logp, wanted, rtol=1e-6)


def test_scores_wait_in_the_queue_without_limit(fake: Fake) -> None:
    queue = threading.Lock()

    def one_by_one(seen: Seen, number: int) -> None:
        if seen.body is not None:
            with queue:
                time.sleep(0.15)

    fake.script = one_by_one
    with client(fake.url, timeout_seconds=0.4, retries=0) as policy:
        scores = policy.score([trajectory(i) for i in range(8)])  # 1.2 s in all
    for i, score in enumerate(scores):
        np.testing.assert_allclose(score.logp, expected(trajectory(i)), rtol=1e-5)


def test_a_turn_that_stalls_is_given_up_before_it_is_asked_for_again(streaming: Streaming) -> None:
    streaming.faults = ["hang", "cut", "error"]
    with client(streaming.url, timeout_seconds=0.4, retries=3) as policy:
        turns = spoken(policy, 1)
        assert turns[0].error is None
        assert [seen.body["prompt"] for seen in streaming.seen if seen.body] == [[8, 9, 8]] * 4
        first, second, *_ = [seen.at for seen in streaming.seen if seen.body]
        assert 0.4 < second - first < 5
        (gone,) = streaming.hung_up
        assert gone - first < 5
        streaming.faults = ["hang"] * 4
        with pytest.raises(ServerStalledError, match=r"sent nothing for timeout_seconds \(0\.4\)"):
            spoken(policy, 1)


def test_an_absent_server_is_reported_at_the_start() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with (
        pytest.raises(ModelServerError, match="connecting failed after 2 attempts"),
        client(url, retries=1),
    ):
        pass


def test_a_dead_address_is_left_out_and_taken_back() -> None:
    first, second = Fake(), Fake()
    port = second.port
    try:
        with client(first.url, second.url, max_backoff_seconds=1.0) as policy:
            policy.score([trajectory(i) for i in range(6)])
            assert len(first.posts) == len(second.posts) == 3
            second.close()
            scores = policy.score([trajectory(i) for i in range(10)])
            for i, score in enumerate(scores):
                np.testing.assert_allclose(score.logp, expected(trajectory(i)), rtol=1e-5)
            assert len(first.posts) == 13
            second = Fake(port)
            time.sleep(1.1)
            policy.score([trajectory(i) for i in range(6)])
            assert len(second.posts) >= 2
            # Whoever is back is asked again what it serves.
            assert [seen.path for seen in second.seen].count("/v1/models") == 1
    finally:
        first.close()
        second.close()


def test_a_dead_address_is_not_tried_again_at_every_request() -> None:
    first, second = Fake(), Fake()
    try:
        patient = {"backoff_seconds": 20.0, "max_backoff_seconds": 20.0}
        with client(first.url, second.url, **patient) as policy:
            policy.score([trajectory(i) for i in range(4)])
            second.close()
            for i in range(10):
                policy.score([trajectory(i)])
            (dead,) = (each for each in policy.transport.addresses if each.url == second.url)
            assert dead.failures == 1
            assert len(first.posts) == 12
    finally:
        first.close()
        second.close()


def test_an_address_that_comes_back_with_another_model_is_refused() -> None:
    first, second = Fake(), Fake()
    try:
        with client(first.url, second.url, model=MODEL, max_backoff_seconds=1.0) as policy:
            policy.score([trajectory(i) for i in range(4)])
            port = second.port
            second.close()
            policy.score([trajectory(i) for i in range(4)])
            second = Fake(port)
            second.script = lambda seen, number: (
                Reply({"data": [{"id": "another-model"}]}) if seen.path == "/v1/models" else None
            )
            time.sleep(1.1)
            with pytest.raises(ModelError, match="another-model"):
                policy.score([trajectory(i) for i in range(6)])
            assert not second.posts
    finally:
        first.close()
        second.close()


def test_connections_are_kept_and_requests_in_flight_bounded(fake: Fake) -> None:
    fake.script = lambda seen, number: (
        Reply(vllm_answer(seen), delay=0.02) if seen.body is not None else None
    )
    with client(fake.url, max_in_flight=4) as policy:
        policy.score([trajectory(i) for i in range(40)])
        assert len(fake.posts) == 40
        assert 2 <= fake.most_in_flight <= 4
        assert fake.connections <= 5


def test_a_kept_connection_that_the_server_closed_is_no_failure(fake: Fake) -> None:
    with client(fake.url, retries=0) as policy:
        policy.score([trajectory()])
        for connection in fake.open:
            connection.shutdown(socket.SHUT_RDWR)
        policy.score([trajectory()])
    assert len(fake.posts) == 2


def test_a_kept_connection_that_ends_with_the_next_request_is_no_failure(fake: Fake) -> None:
    fake.script = lambda seen, number: Reply(reset=True) if number == 1 else None
    with client(fake.url, retries=0) as policy:
        policy.score([trajectory()])
        policy.score([trajectory()])
        assert len(fake.posts) == 3
        fake.script = lambda seen, number: Reply(reset=True)  # now a fresh one ends too
        with pytest.raises(PolicyRequestError):
            policy.score([trajectory()])


def test_requests_under_way_survive_closing(fake: Fake) -> None:
    fake.script = lambda seen, number: Reply(vllm_answer(seen), delay=0.5)
    with client(fake.url, retries=0) as policy:
        scores: list[Any] = []
        thread = threading.Thread(target=lambda: scores.extend(policy.score([trajectory()])))
        thread.start()
        while not fake.posts:
            time.sleep(0.01)
        policy.close()
        thread.join(10)
    assert len(scores) == 1


def test_the_key_is_sent_and_never_shown(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_KEY", "sk-very-secret-key")
    fake.script = lambda seen, number: (
        Reply({"error": f"I heard {seen.headers.get('authorization')}"}, 500)
        if seen.body is not None
        else None
    )
    with (
        caplog.at_level(logging.DEBUG),
        client(fake.url, api_key_env="VLLM_KEY", retries=0) as policy,
    ):
        with pytest.raises(PolicyRequestError) as caught:
            policy.score([trajectory()])
        generator = policy.generator(Sampling())
        generator.submit([Request(0, [8, 9], [], 4, (1,))])
        (turn,) = until_done(generator)
    assert fake.posts[0].headers["authorization"] == "Bearer sk-very-secret-key"
    for text in (str(caught.value), repr(caught.value), caplog.text, str(turn.error)):
        assert "very-secret" not in text
    assert "I heard" in str(caught.value)


def test_the_served_model_must_be_the_wanted_one(fake: Fake) -> None:
    with client(fake.url, model=MODEL):
        pass
    with (
        pytest.raises(ModelError, match=f"{MODEL}.*teacher-32b"),
        client(fake.url, model="teacher-32b"),
    ):
        pass
    fake.script = lambda seen, number: (
        Reply({"data": [{"id": "a"}, {"id": "b"}]}) if seen.path == "/v1/models" else None
    )
    with pytest.raises(ConfigError, match=r"policy\.model"), client(fake.url):
        pass


def test_pictures_need_another_server(fake: Fake, encode: Callable[..., EncodedImage]) -> None:
    each = trajectory()
    each.images.append(encode(0))
    with client(fake.url) as policy, pytest.raises(ConfigError, match=r"reopold_agent\.serve"):
        policy.score([each])


def test_a_released_turn_is_not_heard_of_again(fake: Fake) -> None:
    def script(seen: Seen, number: int) -> Reply | None:
        if seen.body is None:
            return None
        return Reply(vllm_answer(seen), delay=0.2 if seen.body["max_tokens"] == 4 else 0.6)

    fake.script = script
    with client(fake.url) as policy:
        generator = policy.generator(Sampling())
        generator.submit([Request(0, [8, 9], [], 4, (1,))])
        generator.release(0)
        assert generator.in_flight == 0
        generator.submit([Request(0, [8, 9, 1], [], 2, (1,))])
        (turn,) = until_done(generator)
        assert turn.ids == (4, 5)  # the second one's, though the first one's came before
        assert generator.step() == []
