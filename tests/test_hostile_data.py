"""Untrusted data: errors are counted before training; nothing in it is followed or run."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import random_picture
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image
from running import composed, train
from test_rollout import ScriptedPolicy

import reopold_agent
from reopold_agent.common.pixels import PixelLimits
from reopold_agent.config import DataChecks, build
from reopold_agent.data import load_tasks, rows
from reopold_agent.data.checks import BadRowsError, CheckedTasks, checked_task
from reopold_agent.data.demonstrations import load_demonstrations
from reopold_agent.data.images import BytesImage
from reopold_agent.data.pictures import PictureFolder
from reopold_agent.data.row_formats import COLUMNS, FORMATS
from reopold_agent.data.urls import UrlImage, UrlRules
from reopold_agent.envs.from_config import checked_tasks
from reopold_agent.envs.pixel_reasoner import PixelReasonerEnv
from reopold_agent.errors import CheckpointError, ConfigError, DataError, ModelError
from reopold_agent.evaluate.benchmarks import Benchmark, load_benchmark
from reopold_agent.judges.llm.local import LocalBackend, LocalSettings
from reopold_agent.policies.loading import ModelSpec, check_available, load_model, resolve_path
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import EpisodeSpec, RolloutLimits, RolloutRunner
from reopold_agent.train.checkpoint import restore
from reopold_agent.types import Sampling, StopReason, Task

PACKAGE = Path(reopold_agent.__file__).parent


def png(seed: int = 1, width: int = 60, height: int = 60) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random_picture(seed, height, width)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, listed: list[Any], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in listed]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


def load(folder: Path, **more: Any) -> CheckedTasks:
    checks = {key: more.pop(key) for key in list(more) if key in vars(DataChecks())}
    spec = {"source": "pixel_reasoner", "path": str(folder), **more}
    if checks:
        spec["checks"] = checks
    return cast(CheckedTasks, load_tasks(spec))


def good(name: str, **more: Any) -> dict[str, Any]:
    return {"qid": name, "question": "How many?", "answer": "1", **more}


# One report of everything


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Ten lines, two of which are fine."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "a.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return write(
        folder,
        [
            good("a", image="a.png"),
            "{not json",
            {"question": "?", "text": "no such column"},
            good("b", question=" "),
            good("c", answer=[]),
            good("d", image="../secret.png"),
            good("e", image="link.png"),
            good("f", image="gone.png"),
            good("g", image="https://example.com/a.png?token=secret"),
            good("a"),
        ],
    )


KINDS = {
    "unreadable line": 1,
    "missing column": 1,
    "no question": 1,
    "no answer": 1,
    "path": 2,
    "missing picture": 1,
    "URL": 1,
    "duplicate id": 1,
}


def test_everything_that_is_wrong_is_counted_by_kind_in_one_table(
    mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BadRowsError) as caught:
        load(mixed)
    report = caught.value.report
    assert {kind: problem.rows for kind, problem in report.problems.items()} == KINDS
    assert (report.rows, report.usable) == (10, 2)
    lines = str(caught.value).splitlines()
    assert lines[0] == (f"8 of 10 rows of {mixed} cannot be used; 1 repeat an id and are kept:")
    assert lines[1] == (
        "  unreadable line       1  rows.jsonl, line 2: Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)"
    )
    assert (
        "  missing column        1  rows.jsonl, row 1: no column answer or label; found: question, "
        "text; source 'pixel_reasoner' needs: question, answer or label" in lines
    )
    assert sum(line.startswith("  path                  2  ") for line in lines) == 1
    assert "secret" not in "".join(line for line in lines if "https:" in line)
    assert lines[-1] == "Correct them, or leave them out with on_bad_row=skip."
    with caplog.at_level(logging.WARNING):
        tasks = load(mixed, on_bad_row="skip")
    assert [task.id for task in tasks] == ["a", "a"]
    assert tasks.report.record()["problems"]["path"]["rows"] == 2
    assert "8 of 10 rows" in caplog.text
    assert json.loads(json.dumps(tasks.report.record())) == tasks.report.record()


def test_references_that_no_rule_can_compare_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prose = "The two triangles have the same height and base"
    folder = write(
        tmp_path / "rows",
        [
            good("a"),
            good("b", answer=prose),
            good("c", answer=prose),
            good("d", answer=[prose, "7"]),
        ],
    )
    with caplog.at_level(logging.WARNING):
        tasks = load(folder)
    assert len(tasks) == 4  # they are used: a response may repeat the reference
    assert len(caplog.records) == 1
    assert "2 of 4 rows" in caplog.text
    assert f"the reference is a sentence       2  rows.jsonl, row 1: {prose}" in caplog.text
    assert tasks.report.record()["references"]["the reference is a sentence"]["rows"] == 2


def test_ids_that_repeat_are_kept_skipped_or_refused(mixed: Path) -> None:
    with pytest.raises(BadRowsError, match=r"let ids repeat with data\.checks\.duplicates=keep"):
        load(mixed, on_bad_row="skip", duplicates="fail")
    assert len(load(mixed, on_bad_row="skip", duplicates="skip")) == 1
    clean = write(mixed / "clean", [good("a"), good("b")])
    assert len(load(clean, duplicates="fail")) == 2
    assert load(clean).report.problems == {}
    only = write(mixed / "only", [good("a"), good("a")])
    assert len(load(only)) == 2
    assert len(load(only, duplicates="skip")) == 1  # on_bad_row=fail is about other things


def test_the_report_lies_in_the_run_folder_also_when_the_run_is_refused(
    mixed: Path, tmp_path: Path
) -> None:
    clean = write(tmp_path / "clean", [good("a"), good("b")])
    words = ["data=pixel_reasoner_rl", "data.env_kwargs={}", f"data.train.path={mixed}",
             f"data.eval.path={clean}", "data.train.split=null"]  # fmt: skip
    with pytest.raises(BadRowsError, match="8 of 10 rows"):
        train(tmp_path / "run", *words)
    told = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert list(told) == ["train"]
    assert {kind: each["rows"] for kind, each in told["train"]["problems"].items()} == KINDS
    assert not (tmp_path / "run" / "config.yaml").exists()  # nothing to resume
    config, _ = composed(*words, "data.train.on_bad_row=skip", "data.checks.duplicates=skip")
    assert checked_tasks(config, tmp_path / "report.json") == {
        "pixel_reasoner": {"train": 1, "eval": 2}
    }
    told = json.loads((tmp_path / "report.json").read_text())
    assert (told["train"]["rows"], told["train"]["usable"]) == (10, 1)
    assert len(told["eval"].pop("sha256")) == len(told["eval"].pop("pictures_sha256")) == 64
    assert told["eval"] == {
        "source": "pixel_reasoner", "path": str(clean), "rows": 2, "usable": 2,
        "pictures_checked": 0, "problems": {},
    }  # fmt: skip
    embedded, _ = composed()
    checked_tasks(embedded, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.checks.duplicates=ignore", "must be one of keep, skip, fail; got 'ignore'"),
        ("data.checks.pictures=some", "must be one of none, sample, all; got 'some'"),
        ("data.checks.url_seconds=0", "must be positive"),
        ("data.checks.allow_urls=maybe", "must be bool"),
    ],
)
def test_settings_that_do_not_exist_are_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(word)


def test_a_benchmark_counts_its_rows_the_same_way(mixed: Path) -> None:
    with pytest.raises(BadRowsError, match=r"benchmark mine: 8 of 10 rows") as caught:
        load_benchmark(Benchmark("mine", "pixel_reasoner", "s", "agentic", path=str(mixed)))
    expected = {kind: count for kind, count in KINDS.items() if kind != "duplicate id"}
    assert {k: p.rows for k, p in caught.value.report.problems.items()} == expected


# Files


SAID = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "1"}]}


def test_a_line_that_is_too_long_is_named_and_what_follows_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 200)
    folder = write(tmp_path, [good("a"), good("b", more="x" * 1000), "", good("c")])
    tasks = load(folder, on_bad_row="skip")
    assert [task.id for task in tasks] == ["a", "c"]
    ((where, message),) = tasks.report.problems["unreadable line"].examples
    assert (where, message) == ("rows.jsonl, line 2", "longer than 200 bytes")


def test_without_a_reader_of_bad_lines_the_first_one_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [good("a"), "[1]"])
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: expected an object, got list"):
        list(rows.read_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        load_demonstrations({"path": str(write(tmp_path / "expert", [SAID, "[1]"]))})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.tsv", "rows.parquet"])
def test_an_empty_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        load(tmp_path)
    if name == "rows.json":
        (tmp_path / name).write_bytes(b"[]")
        with pytest.raises(BadRowsError, match=r"no usable rows in .* it is empty"):
            load(tmp_path)


def test_tsv_files(tmp_path: Path) -> None:
    picture = "A" * 300_000  # longer than csv's own limit, as pictures in base64 are
    head = "qid\tquestion\tanswer\tdata\n"
    (tmp_path / "a.tsv").write_text(f"\ufeff{head}a\tQ?\t1\t{picture}\n\nb\tQ?\t2\t\n")
    assert [(t.id, t.answers) for t in load(tmp_path)] == [("a", ("1",)), ("b", ("2",))]
    (tmp_path / "a.tsv").write_bytes(head.encode() + b"a\tQ?\t1\t\nb\t\xff\t2\t\n")
    with pytest.raises(DataError, match=r"cannot read .*a\.tsv at row"):
        load(tmp_path, limit=9)


@pytest.mark.parametrize(("suffix", "named"), [("tsv", "tab"), ("csv", "comma")])
def test_a_row_with_other_fields_than_the_header_is_refused(
    suffix: str, named: str, tmp_path: Path
) -> None:
    lines = [
        "question\tA\tB\tanswer\thint",
        "What\tnow?\tone\ttwo\tB\t",  # the last field is empty, and yet all are shifted
        '"Which\none?"\tone\ttwo\tA\t',
        "Why?\tone two\tB\t",
        "Who?\tone\ttwo\tA",
    ]
    text = "\n".join(lines).replace("\t", "\t" if suffix == "tsv" else ",")
    (tmp_path / f"a.{suffix}").write_text(text)
    with pytest.raises(BadRowsError, match="3 of 4 rows of") as told:
        load(tmp_path)
    quoted = f"a text with a {named} or a line's end must be in double quotes"
    assert f"a.{suffix}, line 2: 6 fields, the header has 5; {quoted}" in str(told.value)
    assert f"a.{suffix}, line 5: 4 fields, the header has 5" in str(told.value)
    assert [*told.value.report.problems] == ["unreadable line"]
    assert [t.answers for t in load(tmp_path, on_bad_row="skip")] == [("A",)]
    with pytest.raises(DataError, match=rf"a\.{suffix}, line 2: 6 fields"):
        list(rows.read_rows(tmp_path / f"a.{suffix}"))


def test_narrow_floats_of_parquet_are_the_decimals_that_were_written(tmp_path: Path) -> None:
    for width, kind in ((np.float32, pa.float32()), (np.float16, pa.float16())):
        written = [0.1, 23.7, 3.14, 3.0, None]
        values = [each if each is None else width(each) for each in written]
        scores = [{"scores": [value]} for value in values]
        nested = pa.array(scores, pa.struct([("scores", pa.list_(kind))]))
        table = {"question": ["?"] * 5, "answer": pa.array(values, kind), "nested": nested}
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        rows_read = list(rows.read_rows(tmp_path / "a.parquet"))
        assert [row["answer"] for row in rows_read] == written
        assert [row["nested"]["scores"] for row in rows_read] == [[each] for each in written]
    answers = [task.answers[0] for task in load(tmp_path, on_bad_row="skip")]
    assert answers == ["0.1", "23.7", "3.14", "3"]


def test_a_parquet_file_with_broken_text_says_how_far_it_was_read(tmp_path: Path) -> None:
    texts = pa.array([b"fine"] * 300 + [b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    table = pa.table({"question": texts, "answer": pa.array(["1"] * 301)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet after row 255"):
        load(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["A", "0", "../x", "http://h/x", "a.png", "\ud800", "<image>"])
    | st.sampled_from(["", "\0", "####"])
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["bytes", "path", "image", "role", "content", "task"]), inner,
                      max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = sorted(
    {name for each in COLUMNS.values() for names in each for name in names}
    | set(re.findall(r"(?:row\.get|list_of)\((?:row, )?\"(\w+)\"",
                     (PACKAGE / "data" / "row_formats.py").read_text()))
    | {"qid", "image", "is_video", "images", "extra_info", "options", "choices", "metadata",
       "image_2", "videos", "multi_modal_data", "system"}
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(FORMATS)),
    st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6),
    st.lists(JSON, min_size=4, max_size=4),
)
def test_whatever_a_row_holds_it_is_a_task_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, row: dict[str, Any], values: list[Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "rows"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(b"")
    needed = dict(zip([names[0] for names in COLUMNS[name]], values, strict=False))
    pictures = PictureFolder(folder)
    row = {**needed, **row}
    try:
        task = checked_task(
            lambda: FORMATS[name](row, 3, folder, pictures), row, COLUMNS[name], name
        )
    except DataError as error:
        event(type(error).__name__)
        return
    assert task.question.strip()
    assert all(isinstance(each, str) for each in (task.id, *task.answers))
    "".join((task.id, task.question, *task.answers)).encode("utf-8")


# Pictures


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Twenty rows, pictures 3 and 11 of which are damaged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.png").write_bytes(b"no picture" if i in (3, 11) else png(i))
    return write(folder, [good(str(i), image=f"{i}.png") for i in range(20)])


def test_pictures_are_opened_before_training_where_that_is_asked_for(damaged: Path) -> None:
    assert len(load(damaged)) == 20
    with pytest.raises(
        BadRowsError, match=r"unreadable picture       2  rows\.jsonl, row 3: .*3\.png"
    ):
        load(damaged, pictures="all")
    tasks = load(damaged, pictures="all", on_bad_row="skip")
    assert [t.id for t in tasks] == [str(i) for i in range(20) if i not in (3, 11)]
    assert tasks.report.pictures == 20


def test_a_sample_of_the_pictures_is_spread_over_all(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(b"x")
    write(
        tmp_path,
        [good(str(i), image="bad.png" if i in (0, 1, 299) else "a.png") for i in range(300)],
    )
    with pytest.raises(BadRowsError) as caught:
        load(tmp_path, pictures="sample")
    assert caught.value.report.pictures == 64
    assert caught.value.report.problems["unreadable picture"].rows == 2  # the first and the last


def test_a_picture_that_vanishes_during_training_loses_its_episode_only(
    damaged: Path, tokenizer: Any, vision: VisionProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    spec = {"source": "pixel_reasoner", "path": str(damaged), "split": "train"}
    tasks = load_tasks(spec)
    (damaged / "5.png").unlink()
    chat = ChatRenderer(tokenizer)
    runner = RolloutRunner(
        lambda: PixelReasonerEnv(data={"train": tasks, "eval": None}),
        chat,
        vision,
        prompt_pixels=PixelLimits(56 * 56, 56 * 56),
        observation_pixels=PixelLimits(56 * 56, 56 * 56),
        limits=RolloutLimits(),
    )
    said = [*chat.tokenizer("\\boxed{1}", add_special_tokens=False)["input_ids"], chat.turn_end_id]
    policy: Any = ScriptedPolicy(lambda request, turn: said)
    with caplog.at_level(logging.ERROR):
        played = runner.run(
            policy, [EpisodeSpec("train", i) for i in (2, 3, 4, 5)], Sampling(), (1,)
        )
    assert [t.stop_reason for t in played] == [
        StopReason.ANSWER, StopReason.ENV_ERROR, StopReason.ANSWER, StopReason.ENV_ERROR
    ]  # fmt: skip
    assert [t.trainable for t in played] == [True, False, True, False]
    assert f"{damaged / '5.png'} does not exist" in caplog.text
    assert f"{damaged / '3.png'} is not a readable picture" in caplog.text


# URLs


class Site(BaseHTTPRequestHandler):
    """A server that misbehaves in many ways."""

    protocol_version = "HTTP/1.0"
    seen: list[str]

    def do_GET(self) -> None:
        """Answers by path."""
        self.seen.append(self.path)
        name, _, more = self.path.partition("?")[0].removeprefix("/").partition("/")
        if name == "ok":
            self._send(200, png(7))
        elif name == "text":
            self._send(200, b"<html>no picture</html>")
        elif name == "gone":
            self._send(404, b"")
        elif name == "big":
            self._send(200, b"", {"Content-Length": "99999999"})
        elif name == "endless":
            self._send(200, b"")
            while self._more(b"x" * 65_536):
                pass
        elif name == "drip_without_end":
            self._send(200, png(7))
            while self._more(b"x"):
                time.sleep(0.05)
        elif name == "drip":
            self._send(200, b"", {"Content-Length": "1000"})
            while self._more(b"x"):
                time.sleep(0.05)
        elif name == "dripping_head":
            while self._more(b"H"):
                time.sleep(0.05)
        elif name == "cut":
            self._send(200, png(7)[:50], {"Content-Length": "5000"})
        elif name == "hop":
            left = int(more)
            self._send(302, b"", {"Location": f"/hop/{left - 1}" if left else "/ok"})
        elif name == "to":
            self._send(302, b"", {"Location": more})
        elif name == "nowhere":
            self._send(302, b"")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def _more(self, data: bytes) -> bool:
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except OSError:
            return False
        return True

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def site() -> Iterator[str]:
    """Its address; ``Site.seen`` are the paths that were asked for."""
    Site.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def rules(tmp_path: Path, **more: Any) -> UrlRules:
    return UrlRules(cache=tmp_path / "cache", **{"allow_private": True, "seconds": 60.0, **more})


def test_urls_are_refused_before_anything_is_asked(site: str, tmp_path: Path) -> None:
    write(tmp_path, [good("a", image=f"{site}/ok")])
    with pytest.raises(BadRowsError, match=r"data\.checks\.allow_urls=true downloads it"):
        load(tmp_path)
    load(tmp_path, allow_urls=True)  # nothing is downloaded yet
    assert Site.seen == []


def test_an_allowed_picture_is_downloaded_once(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    write(tmp_path / "data", [good("a", image=[f"{site}/ok", f"{site}/hop/2"])])
    tasks = load(tmp_path / "data", allow_urls=True, allow_private_urls=True, pictures="all")
    assert tasks.report.pictures == 2
    asked = len(Site.seen)
    assert Site.seen == ["/ok", "/hop/2", "/hop/1", "/hop/0", "/ok"]
    for image in tasks[0].images:
        assert np.array_equal(np.asarray(image.open()), random_picture(7, 60, 60))
    assert len(Site.seen) == asked
    kept = list((tmp_path / "home" / "reopold-agent" / "pictures").iterdir())
    assert len(kept) == 2
    refused = load(tmp_path / "data", allow_urls=True)
    assert refused[0].images[0].open()  # from the folder; the network is not asked


def test_the_setting_counts_for_recorded_conversations(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    asked = [{"type": "image_url", "image_url": {"url": f"{site}/ok"}}, {"text": "Which?"}]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "7"}]}
    file = write(tmp_path / "expert", [row]) / "rows.jsonl"
    words = ("objective=sft", "objective.source=recorded", "model.teacher=null", "steps=1",
             "evaluation.teacher=false", "evaluation.tasks=0",
             f"+data.demonstrations={{path: {file}}}")  # fmt: skip
    with pytest.raises(DataError, match=r"row 0: message 0: .*data\.checks\.allow_urls=true"):
        train(tmp_path / "refused", *words)
    assert Site.seen == []
    train(tmp_path / "run", *words, "data.checks.allow_urls=true",
          "data.checks.allow_private_urls=true")  # fmt: skip
    assert Site.seen == ["/ok"]
    (found,) = load_demonstrations({"path": str(file), "checks": {"allow_urls": True}})
    assert found.turns[0].parts[1] == "Which?"
    with pytest.raises(ConfigError, match=r"unknown setting 'data\.checks\.urls'"):
        load_demonstrations({"path": str(file), "checks": {"urls": True}})


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("/gone", {}, "404"),
        ("/text", {}, "not a readable picture"),
        ("/big", {}, "larger than 50000000 bytes"),
        ("/endless", {"max_bytes": 1_000_000}, "larger than 1000000 bytes"),
        ("/hop/3", {}, "more than 3 redirects"),
        ("/nowhere", {}, "more than 3 redirects"),
        ("/to/file:///etc/hostname", {}, "only http and https"),
        ("/to/ftp://127.0.0.1/x", {}, "only http and https"),
        ("/cut", {}, "closed connection without sending complete"),
        ("/drip", {"seconds": 1.0}, "took too long"),
        ("/drip_without_end", {"seconds": 1.0}, "took too long"),
        ("/dripping_head", {"seconds": 1.0}, "took too long|too long|cannot download"),
        ("/ok?key=secret", {"max_bytes": 10}, "larger than 10 bytes"),
    ],
)
def test_bad_manners_are_a_data_error_within_limits(
    site: str, tmp_path: Path, path: str, more: dict[str, Any], message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        UrlImage(site + path, rules(tmp_path, **more)).open()
    assert time.monotonic() - started < 30
    assert "secret" not in str(caught.value)
    cache = tmp_path / "cache"
    assert not cache.exists() or not list(cache.iterdir())  # what is no picture is not kept


PRIVATE = [
    "127.0.0.1", "127.1.2.3", "localhost", "0.0.0.0", "10.0.0.1", "172.16.9.9", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "2130706433", "[::1]", "[fe80::1]", "[fd00::1]",
    "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::1]",
    "224.0.0.1", "0x7f000001",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_addresses_of_this_network_are_refused(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any, **__: Any) -> socket.socket:
        pytest.fail("connected")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(DataError, match=r"its own network|cannot download"):
        UrlImage(f"http://{host}:80/x.png", rules(tmp_path, allow_private=False)).open()


def test_names_are_looked_up_once_and_redirects_are_checked_again(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that means a public address when checked and this machine when connected to."""
    port = int(site.rsplit(":", 1)[1])
    numbers: list[str] = []
    real = socket.create_connection

    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        numbers.append(host)
        number = {"pictures.example": "93.184.215.14", "both.example": "93.184.215.14"}.get(
            host, host
        )
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port))]
        if host == "both.example":
            found.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port)))
        return found

    def connect(address: tuple[str, int], *more: Any) -> socket.socket:
        assert address[0] == "93.184.215.14"  # a number: nobody can change its meaning
        return real(("127.0.0.1", port), *more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    strict = rules(tmp_path, allow_private=False)
    assert UrlImage("http://pictures.example/ok", strict).open().size == (60, 60)
    assert numbers.count("pictures.example") == 1
    with pytest.raises(DataError, match=r"is at 127\.0\.0\.1, an address of this machine"):
        UrlImage(f"http://pictures.example/to/{site}/ok", strict).open()
    with pytest.raises(DataError, match=r"is at 10\.0\.0\.1"):
        UrlImage("http://both.example/ok", strict).open()


@pytest.mark.parametrize("name", ["ftp://h/x", "data:image/png;base64,AA", "gopher://h", "HTTP://"])
def test_other_schemes_are_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, [good("a", image=name)])
    with pytest.raises(BadRowsError, match="only http and https URLs"):
        load(tmp_path, allow_urls=True)


# Nothing is run


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[Evil]:
    """Something that must never be made; that it would be is checked first."""
    probe = Evil(tmp_path / "probe")
    pickle.loads(pickle.dumps(probe))
    assert (tmp_path / "probe").is_dir()
    made = Evil(tmp_path / "run")
    yield made
    assert not made.marker.exists(), "the pickle was run"


def student_without(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "student"
    shutil.copytree(resolve_path("demo:student"), folder)
    for name in names:
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_weights_in_a_pickle_are_refused_and_not_run(tmp_path: Path, evil: Evil, how: str) -> None:
    folder = student_without(tmp_path)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"a": evil}, folder / "pytorch_model.bin",
               _use_new_zipfile_serialization=how == "zip")  # fmt: skip
    with pytest.raises(ModelError, match=r"lacks weights \(\*\.safetensors\)"):
        check_available(ModelSpec(str(folder)), "student")
    # With another safetensors file beside it, that the check of the folder takes for the weights.
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_model(ModelSpec(str(folder)), "student", torch.device("cpu"))
    with pytest.raises(ModelError):
        LocalBackend(LocalSettings(str(folder)))._load()


def test_a_pickle_beside_good_weights_is_not_looked_at(tmp_path: Path, evil: Evil) -> None:
    folder = student_without(tmp_path)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        torch.save(evil, folder / name)
    load_model(ModelSpec(str(folder)), "student", torch.device("cpu"))


def test_an_optimizer_state_that_would_run_code_is_refused(tmp_path: Path, evil: Evil) -> None:
    checkpoint = tmp_path / "step-000001"
    checkpoint.mkdir()
    torch.save({"optimizer": evil, "scheduler": {}}, checkpoint / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        restore(checkpoint, cast(Any, None))
    (checkpoint / "state.pt").write_bytes(pickle.dumps(evil, protocol=2))
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        restore(checkpoint, cast(Any, None))


def test_an_adapter_in_a_pickle_is_refused(tmp_path: Path, evil: Evil) -> None:
    pytest.importorskip("peft")
    lora = {"r": 2, "target_modules": ["q_proj"]}
    spec = ModelSpec("demo:student", lora=lora)
    model = load_model(spec, "student", torch.device("cpu"))
    model.save(tmp_path / "saved")
    (tmp_path / "saved" / "adapter_model.safetensors").unlink()
    torch.save({"a": evil}, tmp_path / "saved" / "adapter_model.bin")
    with pytest.raises(ModelError, match="cannot load the adapter"):
        load_model(spec, "student", torch.device("cpu"), saved=tmp_path / "saved")


def test_pickles_in_rows_are_bytes_and_nothing_else(tmp_path: Path, evil: Evil) -> None:
    data = pickle.dumps(evil)
    buffer = io.BytesIO()
    np.save(buffer, np.array([evil], dtype=object), allow_pickle=True)
    rows_ = [
        {"problem": "?", "answer": "1", "images": [{"bytes": each}]}
        for each in (data, buffer.getvalue())
    ]
    pq.write_table(pa.Table.from_pylist(rows_), tmp_path / "train.parquet")
    tasks = load_tasks({"source": "geometry3k", "path": str(tmp_path)})
    for index in range(2):
        with pytest.raises(DataError, match="is not a readable picture"):
            tasks[index].images[0].open()
    # Metadata of pandas and of extension types is not run either.
    table = pa.Table.from_pylist([{"problem": "?", "answer": "1"}])
    meta = {b"pandas": data, b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": data}  # fmt: skip
    marked = pa.field("problem", pa.string(), metadata=meta)
    schema = pa.schema([marked, pa.field("answer", pa.string())], metadata=meta)
    pq.write_table(table.cast(schema), tmp_path / "train.parquet")
    load_tasks({"source": "geometry3k", "path": str(tmp_path / "train.parquet")})
    for name in ("rows.npy", "rows.pkl", "rows.pt"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="is not one of"):
            load(tmp_path / name)


def test_postscript_is_no_picture(tmp_path: Path) -> None:
    """Pillow hands it to Ghostscript, a program of its own."""
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match="is not a readable picture"):
        BytesImage(page).open()


AUTO = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}


def test_a_checkpoint_with_code_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    folder = student_without(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": AUTO}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    with pytest.raises(ModelError) as caught:
        check_available(ModelSpec(str(folder)), "student")
    assert "model.student.trust_remote_code=true" in str(caught.value)
    assert "contains Python code, which is not run by default" in str(caught.value)
    with pytest.raises(ModelError):
        LocalBackend(LocalSettings(str(folder)))._load()
    assert not marker.exists()


def test_code_of_checkpoints_is_off_in_every_configuration() -> None:
    found = []
    for file in (PACKAGE / "configs").rglob("*.yaml"):
        pairs = list(_pairs(yaml.safe_load(file.read_text("utf-8"))))
        found += [(file.name, value) for key, value in pairs if key == "trust_remote_code"]
    assert len(found) > 8
    assert not any(value for _, value in found), found
    assert not ModelSpec("x").trust_remote_code
    assert not LocalSettings("x").trust_remote_code
    assert build(DataChecks, {}) == DataChecks(allow_urls=False, allow_private_urls=False)


def _pairs(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _pairs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner)


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_no_line_of_the_package_unpickles_or_evaluates() -> None:
    """Also what no test reaches. `torch.load` and `numpy.load` only in their safe form."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            where = f"{file.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                found += [where for each in node.names if each.name.split(".")[0] in UNSAFE]
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE:
                found += [where for each in node.names if each.name != "UnpicklingError"]
            if isinstance(node, ast.Call) and not _is_safe(node):
                found.append(where)
    assert found == []


def _is_safe(call: ast.Call) -> bool:
    named = {each.arg: each.value for each in call.keywords}

    def is_set(name: str, value: object) -> bool:
        given = named.get(name)
        return isinstance(given, ast.Constant) and given.value is value

    text = ast.unparse(call.func)
    if text in ("eval", "exec", "compile", "__import__"):
        return False
    if text in ("torch.load",):
        return is_set("weights_only", True)
    if text in ("np.load", "numpy.load"):
        return "allow_pickle" not in named or is_set("allow_pickle", False)
    if text.endswith(("yaml.load", "load_from_disk", "unsafe_load")):
        return False
    if text.endswith(".from_pretrained") and re.search(r"[Mm]odel", text) and "Peft" not in text:
        return is_set("use_safetensors", True)
    return not is_set("trust_remote_code", True)


def test_the_check_of_the_source_finds_what_it_looks_for() -> None:
    for line in ("torch.load(f)", "torch.load(f, weights_only=False)", "eval('1')", "yaml.load(f)",
                 "np.load(f, allow_pickle=True)", "AutoModel.from_pretrained(p)",
                 "AutoConfig.from_pretrained(p, trust_remote_code=True)"):  # fmt: skip
        assert not _is_safe(cast(Any, ast.parse(line).body[0]).value), line
    for line in (
        "torch.load(f, weights_only=True)",
        "np.load(f)",
        "model.eval()",
        "yaml.safe_load(f)",
    ):
        assert _is_safe(cast(Any, ast.parse(line).body[0]).value), line


def test_a_task_of_any_source_may_stand_for_itself() -> None:
    """`checked_task` passes good ones on as they are."""
    task = Task("t", "Q?", ("1",))
    assert checked_task(lambda: task, {"question": "Q?"}, (("question",),), "mine") is task
