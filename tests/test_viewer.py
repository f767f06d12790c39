"""The viewer without a browser: following files, responses of the server, the exported file.

``test_viewer_browser.py`` tests the page in a browser.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from running import train
from step_rows import rows_of
from viewer_rows import answer_row, serving, train_row, write

from reopold_agent.errors import ConfigError, DataError
from reopold_agent.objectives import TokenBatch
from reopold_agent.objectives.distillation import Reopold
from reopold_agent.tracking.html import page_json
from reopold_agent.train.engine import Engine
from reopold_agent.train.token_use import expected_use, token_uses
from reopold_agent.types import StopReason, Trajectory, Turn
from reopold_agent.view.__main__ import main
from reopold_agent.view.export import LONGEST_SIDE, export_page
from reopold_agent.view.lines import Follower
from reopold_agent.view.page import SCRIPTS, served_page
from reopold_agent.view.run import PAGE, Run
from reopold_agent.view.server import ViewerServer


def everything(run: Run) -> dict[str, Any]:
    """What a page gets that asks until there is no more."""
    rows: list[Any] = []
    metrics: list[Any] = []
    news = run.news()
    while True:
        rows = rows[: news["start"]["rows"]] + news["rows"]
        metrics = metrics[: news["start"]["metrics"]] + news["metrics"]
        if not news["more"]:
            return {**news, "rows": rows, "metrics": metrics}
        news = run.news(len(rows), len(metrics), news["generation"], news["facts_stamp"])


# --- following a file ------------------------------------------------------------------------


def test_follower_reads_each_finished_line_once_and_waits_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    follower = Follower(path)
    assert follower.read() == []  # not there yet
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": ')
    assert [line.row for line in follower.read()] == [{"a": 1}, {"a": 2}]
    assert follower.read() == []
    with path.open("ab") as stream:
        stream.write(b'3}\n\n[1]\nno json\n\xff\n{"a": 4}\n')
    lines = follower.read()
    assert [line.row for line in lines] == [{"a": 3}, {"a": 4}]
    assert follower.bad == 3  # the list, the words, the byte; an empty line is none
    assert follower.generation == 0
    data = path.read_bytes()
    assert json.loads(data[lines[1].offset :][: lines[1].length]) == {"a": 4}


def test_follower_stops_at_its_limits_and_continues(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [{"n": n} for n in range(10)])
    follower = Follower(path)
    assert [line.row["n"] for line in follower.read(max_rows=4)] == [0, 1, 2, 3]
    assert [line.row["n"] for line in follower.read(max_bytes=1)] == [4]
    assert [line.row["n"] for line in follower.read()] == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("longer", [False, True])
def test_follower_restarts_when_a_resumed_run_cut_the_file(tmp_path: Path, longer: bool) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [{"n": n} for n in range(5)])
    follower = Follower(path)
    follower.read()
    # Longer than before: only the bytes before the place say that this is another file.
    now = [{"m": n} for n in range(20 if longer else 2)]
    write(path, now)
    assert [line.row for line in follower.read()] == now
    assert follower.generation == 1
    path.unlink()
    assert follower.read() == []
    assert follower.generation == 2


def test_follower_sees_a_replaced_file_that_ends_like_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    end = {"pad": "x" * 5000}
    write(path, [{"n": 1}, end])
    follower = Follower(path)
    assert len(follower.read()) == 2
    write(tmp_path / "new", [{"n": 2}, end])
    (tmp_path / "new").replace(path)
    assert [line.row for line in follower.read()] == [{"n": 2}, end]


# --- a run -----------------------------------------------------------------------------------


def test_run_gives_all_rows_by_pages_and_whole_rows_by_number(tmp_path: Path) -> None:
    count = 2 * PAGE + 7
    write(tmp_path / "trajectories.jsonl", [train_row(n, n) for n in range(count)])
    write(tmp_path / "metrics.jsonl", [{"kind": "train", "step": 0, "loss": 1.5}])
    run = Run(tmp_path)
    first = run.news()
    assert (len(first["rows"]), first["more"]) == (PAGE, True)
    news = everything(run)
    assert [row["n"] for row in news["rows"]] == list(range(count))
    assert len({row["key"] for row in news["rows"]}) == count
    assert news["metrics"] == [{"kind": "train", "step": 0, "loss": 1.5}]
    for number in (0, PAGE, count - 1):
        assert run.record(number) == train_row(number, number)
    assert run.record(count) is None
    assert run.news(count, 1, news["generation"], news["facts_stamp"])["facts"] is None


def test_summary_of_a_training_row_has_its_figures() -> None:
    from reopold_agent.view.summaries import train_summary

    failed = {"name": "crop_image", "arguments": {}, "ok": False, "error": "too small"}
    turns = [
        {"start": 1, "end": 2, "text": "a", "tool_call": failed, "observation": "too small"},
        {"start": 2, "end": 4, "text": "It is 7.", "tool_call": None},
    ]
    row = train_summary(train_row(3, 12, turns=turns, success=False))
    assert row["key"] == "train/3/student/12/0"
    assert (row["verdict"], row["stop"], row["turns"]) == ("wrong", "answer", 2)
    assert (row["tools"], row["tool_errors"]) == (1, 1)
    assert (row["question"], row["answer"]) == ("Which?", "It is 7.")
    assert row["ratio"] == pytest.approx((-1.0 + 0.0 + 0.5) / 3)
    assert row["entropy"] == pytest.approx(0.2)
    assert row["kept"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"kind": None, "step": "x", "turns": 3, "info": [], "prompt": 5, "success": "yes"},
        {"turns": [None, 5, {"text": None, "tool_call": 7}], "logp": ["a"], "loss_mask": [1]},
        {"step": 10**400, "reward": 1e999, "loss_mask": {}, "teacher_logp": 0},
        {"teacher_logp": [1.0], "logp": [None], "loss_mask": [1], "entropy": [None], "kept": [1]},
    ],
)
def test_rows_of_other_programs_are_summarised_too(row: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "trajectories.jsonl", [row])
    (news,) = everything(Run(tmp_path))["rows"]
    assert news["verdict"] == "unknown"
    json.loads(page_json(news))
    write(tmp_path / "responses.jsonl", [row])
    assert len(everything(Run(tmp_path))["rows"]) == 1


def test_the_list_reads_no_more_of_a_row_than_its_head(tmp_path: Path) -> None:
    row = train_row(3)
    at = [*row].index("ids")
    means = {"ratio": -0.25, "entropy": 0.2, "kept": None}
    given = {**dict([*row.items()][:at]), "token_means": means, **dict([*row.items()][at:])}
    path = tmp_path / "trajectories.jsonl"
    write(path, [row, given])
    damaged = path.read_text("utf-8").replace('"teacher_logp": [0.0', '"teacher_logp": [x')
    path.write_text(damaged, "utf-8")
    run = Run(tmp_path)
    run.load_all()
    (summary,) = run.summaries
    assert run.bad == 1
    assert {key: summary[key] for key in means} == means
    assert summary["question"] == "Which?"


def test_growing_run_and_a_resumed_one(tmp_path: Path) -> None:
    rows = tmp_path / "trajectories.jsonl"
    write(tmp_path / "metrics.jsonl", [])
    run = Run(tmp_path)
    news = run.news()
    assert news["rows"] == []
    write(rows, [train_row(0), train_row(1)], end='{"kind": "tra')
    write(tmp_path / "metrics.jsonl", [{"kind": "train", "step": 0}])
    news = run.news(0, 0, news["generation"], news["facts_stamp"])
    assert [row["step"] for row in news["rows"]] == [0, 1]
    assert news["bad"] == 0
    write(tmp_path / "new", [train_row(0), train_row(7)])  # as `JsonLines.truncate_after` does
    (tmp_path / "new").replace(rows)
    news = run.news(2, 1, news["generation"], news["facts_stamp"])
    assert news["start"]["rows"] == 0
    assert [row["step"] for row in news["rows"]] == [0, 7]
    assert len(news["metrics"]) == 1
    record = run.record(1)
    assert record is not None
    assert record["step"] == 7


def test_a_task_drawn_twice_in_a_step_has_two_keys(tmp_path: Path) -> None:
    write(tmp_path / "trajectories.jsonl", [train_row(0), train_row(0)])
    keys = [row["key"] for row in everything(Run(tmp_path))["rows"]]
    assert keys == ["train/0/student/0/0", "train/0/student/0/0/2"]


def test_what_the_judge_found_is_merged_in_when_it_comes(tmp_path: Path) -> None:
    write(tmp_path / "responses.jsonl", [answer_row(0), answer_row(1)])
    run = Run(tmp_path)
    assert run.is_evaluation
    news = everything(run)
    assert [row["verdict"] for row in news["rows"]] == ["undecided", "undecided"]
    reply = {
        "key": "demo/0/0",
        "extracted": "7",
        "how": "found",
        "said": "He says 7.",
        "error": None,
        "judge": "gemini",
        "asked": True,
        "correct": True,
        "rule": "number",
    }
    write(tmp_path / "judged.jsonl", [reply])
    later = run.news(2, 0, news["generation"], news["facts_stamp"])
    assert later["start"]["rows"] == 0
    assert [row["verdict"] for row in later["rows"]] == ["right", "undecided"]
    assert (later["rows"][0]["judge"], later["rows"][0]["how"]) == ("gemini", "judge+number")
    record = run.record(0)
    assert record is not None
    assert record["judge"]["said"] == "He says 7."


def test_facts_name_the_command_and_what_is_damaged(tmp_path: Path) -> None:
    command = "# python -m reopold_agent.train env=math hydra.run.dir=/runs/a"
    (tmp_path / "config.yaml").write_text(f"{command}\nseed: 3\nenv:\n  name: math\n")
    (tmp_path / "summary.json").write_text('{"before": {"success": 0.5')
    (tmp_path / "versions.json").write_text("[1]")
    facts = Run(tmp_path).facts()
    assert facts["command"] == command.removeprefix("# ")
    assert facts["config"] == {"seed": 3, "env": {"name": "math"}}
    assert [problem.partition(" ")[0] for problem in facts["problems"]] == [
        "versions.json",
        "summary.json",
    ]
    (tmp_path / "config.yaml").write_text("a: [1\nb: }")
    assert any("config.yaml" in problem for problem in Run(tmp_path).facts()["problems"])


def test_a_training_run_records_its_command_for_the_page(tmp_path: Path) -> None:
    class Quick(Engine):
        def _run(self) -> dict[str, Any]:
            raise NotImplementedError

        def begin(self) -> None:
            self._begin(nothing, None)

    nothing: Any = None
    untemplated: Any = SimpleNamespace(model=SimpleNamespace(chat_template=None))
    words = ["env=math", "name='two\nlines'", "hydra.run.dir=elsewhere"]
    Quick(untemplated, {"seed": 3, "name": "two\nlines", "objective": {}}, tmp_path, words).begin()
    facts = Run(tmp_path).facts()
    assert facts["config"] == {"seed": 3, "name": "two\nlines", "objective": {}}
    command = facts["command"]
    assert command.startswith("python -m reopold_agent.train env=math ")
    assert command.endswith(f"hydra.run.dir={tmp_path}")
    assert "two lines" in command
    assert facts["problems"] == []


def test_a_folder_without_a_run_is_refused_in_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(DataError):
            Run(folder)
        with pytest.raises(SystemExit) as ended:
            main([str(folder), "--no-browser"])
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert str(folder) in message
        assert message.count("\n") == 2


def test_pictures_are_those_of_the_run_only(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    write(folder / "metrics.jsonl", [])
    for path in (folder / "pictures" / "a.png", folder / "secret.png", tmp_path / "out.png"):
        Image.new("RGB", (2, 2)).save(path)
    (folder / "pictures" / "link.png").symlink_to(tmp_path / "out.png")
    run = Run(folder)
    found = run.picture("pictures/a.png")
    assert found is not None
    assert found.name == "a.png"
    refused = (
        "pictures/b.png",
        "secret.png",
        "pictures/../secret.png",
        "pictures/../../out.png",
        "pictures/link.png",
        str(tmp_path / "out.png"),
        "config.yaml",
        "pictures/",
        "",
        "pictures/a.png\n",
        "pictures/.a.png",
    )
    assert [name for name in refused if run.picture(name) is not None] == []


# --- the server ------------------------------------------------------------------------------


def ask(
    server: ViewerServer, path: str, method: str = "GET", **headers: str
) -> http.client.HTTPResponse:
    """One request, its body read as ``response.body``."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    response.body = response.read()  # type: ignore[attr-defined]
    connection.close()
    return response


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    write(folder / "trajectories.jsonl", [train_row(0), train_row(1)])
    write(folder / "metrics.jsonl", [{"kind": "train", "step": 0, "loss": float("nan")}])
    (folder / "config.yaml").write_text("api_key: secret\n")
    Image.new("RGB", (2, 2)).save(folder / "pictures" / "a.png")
    return folder


def test_server_gives_page_assets_rows_and_pictures(run_folder: Path) -> None:
    with serving(run_folder) as server:
        page = ask(server, "/")
        assert page.status == 200
        text = page.body.decode()  # type: ignore[attr-defined]
        assert text == served_page()
        for name in re.findall(r'(?:src|href)="(assets/[^"]+)"', text):
            assert ask(server, f"/{name}").status == 200
        assert len(re.findall('src="assets/', text)) == len(SCRIPTS)
        news = json.loads(ask(server, "/api/news?run=0").body)  # type: ignore[attr-defined]
        assert len(news["rows"]) == 2
        assert news["metrics"][0]["loss"] is None  # NaN is no JSON
        row = json.loads(ask(server, "/api/record?run=0&n=1").body)  # type: ignore[attr-defined]
        assert row == train_row(1)
        picture = ask(server, "/api/picture?run=0&name=pictures/a.png")
        assert (picture.status, picture.headers["Content-Type"]) == (200, "image/png")


def test_server_sends_headers_that_keep_others_out(run_folder: Path) -> None:
    with serving(run_folder) as server:
        assert server.server_address[0] == "127.0.0.1"
        for path in ("/", "/assets/app.js", "/api/news", "/nothing"):
            headers = ask(server, path).headers
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:9999", 200),  # through `ssh -L`
        ("evil.example", 403),
        ("evil.example:7878", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("", 403),
    ],
)
def test_server_answers_to_its_own_name_only(run_folder: Path, host: str, status: int) -> None:
    with serving(run_folder) as server:
        assert ask(server, "/api/news?run=0", Host=host).status == status
        assert ask(server, "/", Host=host).status == status


def test_server_refuses_other_origins_and_methods(run_folder: Path) -> None:
    with serving(run_folder) as server:
        assert ask(server, "/api/news", Origin="http://evil.example").status == 403
        assert ask(server, "/api/news", Origin="null").status == 403
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            assert ask(server, "/api/news", method).status == 501


@pytest.mark.parametrize(
    "path",
    [
        "/config.yaml",
        "/assets/../run.py",
        "/assets/..%2frun.py",
        "/assets/page.html",
        "/../../etc/passwd",
        "/api/picture?run=0&name=config.yaml",
        "/api/picture?run=0&name=pictures/../config.yaml",
        "/api/picture?run=0&name=/etc/passwd",
        "/api/picture?run=0&name=pictures%2f..%2f..%2fout.png",
        "/api/picture?run=0",
        "/api/picture?run=-1&name=pictures/a.png",
        "/api/picture?run=9&name=pictures/a.png",
        "/api/record?run=0&n=99",
        "/api/record?run=0&n=-1",
        "/api/record?run=0&n=x",
        "/api/news?run=zero",
        "/api/nothing",
    ],
)
def test_server_gives_nothing_else(run_folder: Path, path: str) -> None:
    with serving(run_folder) as server:
        response = ask(server, path)
        assert response.status in (400, 404)
        assert b"secret" not in response.body  # type: ignore[attr-defined]


def test_a_port_that_is_taken_is_followed_by_the_next(run_folder: Path) -> None:
    with serving(run_folder) as first:
        port = first.server_address[1]
        with ViewerServer([Run(run_folder)], port) as second:
            assert port < second.server_address[1] <= port + 20


def test_command_serves_prints_its_address_and_ends_on_ctrl_c(run_folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "reopold_agent.view", str(run_folder), "--no-browser", "--port=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == str(run_folder)
        address = re.match(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        assert address is not None
        process.stdout.readline()
        assert f"ssh -N -L {address[1]}:127.0.0.1:{address[1]} " in process.stdout.readline()
        connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=30)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        process.send_signal(2)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_command_refuses_what_it_cannot_show(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(run_folder)
    for words in ([folder] * 3, [folder, "--limit=-1"], [folder, "--port=70000"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--no-browser"])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(ConfigError, match="none of the ports"):
        # Every port of this address is another process's as far as this one is concerned.
        _without_ports(run_folder)


def _without_ports(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def taken(*_: Any) -> None:
            raise OSError(98, "Address already in use")

        patch.setattr("socketserver.TCPServer.server_bind", taken)
        patch.setattr("http.server.HTTPServer.server_bind", taken)
        ViewerServer([Run(folder)], 7878)


# --- the exported file -----------------------------------------------------------------------


def embedded(page: Path) -> dict[str, Any]:
    """The data of an exported page, read as a browser would find it."""
    text = page.read_text(encoding="utf-8")
    element = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL
    )
    assert element is not None
    data: dict[str, Any] = json.loads(element[1])
    return data


def test_export_takes_a_share_of_the_episodes_and_says_so(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [{"picture": "pictures/a.png"}, {"picture": "pictures/../config.yaml"}]
    rows = [train_row(n, n, images=images) for n in range(10)]
    write(run_folder / "trajectories.jsonl", rows)
    target = tmp_path / "page.html"
    assert main([str(run_folder), "--export", str(target), "--limit", "5"]) == 0
    assert "5 of 10 episodes" in capsys.readouterr().out
    (run,) = embedded(target)["runs"]
    assert [row["step"] for row in run["rows"]] == [0, 2, 4, 6, 8]  # evenly over the run
    assert [row["n"] for row in run["rows"]] == [0, 1, 2, 3, 4]
    assert run["records"] == [rows[n] for n in (0, 2, 4, 6, 8)]
    assert run["all"] == 10
    assert list(run["pictures"]) == ["pictures/a.png"]
    assert run["pictures"]["pictures/a.png"].startswith("data:image/png;base64,")
    assert main([str(run_folder), "--export", str(target), "--limit", "0"]) == 0
    assert embedded(target)["runs"][0]["records"] == []


def test_export_of_two_runs_prefers_what_both_have(tmp_path: Path) -> None:
    runs = []
    for name, indices in (("a", range(8)), ("b", (6, 7, 20, 21))):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "trajectories.jsonl", [train_row(0, index) for index in indices])
        runs.append(Run(tmp_path / name))
    export_page(runs, tmp_path / "page.html", limit=3)
    one, other = embedded(tmp_path / "page.html")["runs"]
    assert [row["index"] for row in one["rows"]] == [0, 6, 7]
    assert [row["index"] for row in other["rows"]] == [6, 7, 20]


def test_export_shrinks_large_pictures_and_survives_damaged_ones(
    run_folder: Path, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 2000, 4), dtype=np.uint8)
    noise[..., 3] = np.arange(2000) >= 1000
    noise[..., 3] *= 255
    Image.fromarray(noise).save(run_folder / "pictures" / "large.png")
    (run_folder / "pictures" / "bad.png").write_bytes(b"no picture")
    names = ["pictures/large.png", "pictures/bad.png", "pictures/missing.png"]
    images = [{"picture": name} for name in names]
    write(run_folder / "trajectories.jsonl", [train_row(0, images=images)])
    export_page([Run(run_folder)], tmp_path / "page.html")
    pictures = embedded(tmp_path / "page.html")["runs"][0]["pictures"]
    assert pictures["pictures/bad.png"] == ""
    assert "pictures/missing.png" not in pictures
    import base64
    import io

    kind, _, data = pictures["pictures/large.png"].partition(",")
    assert kind == "data:image/jpeg;base64"
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert max(small.size) == LONGEST_SIDE
    assert small.getpixel((0, 0)) == (255, 255, 255)  # the noise is on a transparent ground


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no/page.html", "there is no folder DIR/no.\n  Make it, or give another --export\n"),
        (
            "page.html",
            "cannot write DIR/page.html: Is a directory.\n  Give another path to --export\n",
        ),
    ],
)
def test_export_where_nothing_can_be_written(
    name: str, told: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(SystemExit) as ended:
        main([str(run_folder), "--export", str(tmp_path / name)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {told}".replace("DIR", str(tmp_path))


def test_json_in_a_page_holds_no_markup() -> None:
    hostile = {"</script><script>": ["<!--", "\u2028\u2029", float("inf"), "\ud800", "@BODY@"]}
    text = page_json(hostile)
    assert "<" not in text
    assert "\u2028" not in text
    assert text.isascii()
    assert json.loads(text) == {
        "</script><script>": ["<!--", "\u2028\u2029", None, "\ud800", "@BODY@"]
    }


def test_the_pages_scripts_never_make_markup_of_text() -> None:
    from reopold_agent.view.page import asset

    for name in SCRIPTS:
        code = asset(name)
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc",
            code,
        )
        assert found == [], name
        assert "http" not in code.replace("http://www.w3.org/2000/svg", ""), name


# --- what the record says of each token ------------------------------------------------------


def scored(seed: int, length: int = 30) -> Trajectory:
    rng = np.random.default_rng(seed)
    mask = rng.random(length) < 0.6
    mask[:4] = False
    mask[5] = True
    values = [np.where(mask, -rng.gamma(0.7, 3.0, length), 0).astype(np.float32) for _ in "ab"]
    return Trajectory(
        task_id=f"t{seed}",
        index=seed,
        sample=0,
        prompt_length=4,
        ids=np.arange(length, dtype=np.int64),
        loss_mask=mask,
        logp=values[0],
        entropy=np.where(mask, rng.gamma(0.5, 1.0, length), 0).astype(np.float32),
        images=[],
        turns=[Turn(4, length, "x", "stop")],
        stop_reason=StopReason.ANSWER,
        reward=1.0,
        success=True,
        teacher_logp=values[1],
    )


@pytest.mark.parametrize("step", [0, 5])
def test_token_uses_are_the_objectives_masks_and_rewards(step: int) -> None:
    objective = Reopold(switch_step=3)
    trajectories = [scored(seed) for seed in range(4)]
    flat = {
        name: torch.from_numpy(
            np.concatenate([getattr(t, name)[t.loss_mask] for t in trajectories])
        )[None]
        for name in ("logp", "teacher_logp", "entropy")
    }
    live = torch.ones_like(flat["logp"], dtype=torch.bool)
    threshold = objective.threshold(flat["entropy"], live)
    batch = TokenBatch(flat["logp"], flat["logp"], flat["teacher_logp"], flat["entropy"], live)
    uses = token_uses(trajectories, objective.terms(batch, step, threshold))
    for trajectory, use in zip(trajectories, uses, strict=True):
        assert trajectory.teacher_logp is not None
        ratio = trajectory.teacher_logp - trajectory.logp
        floor = np.float32(objective.floor)
        expected = ratio > floor if step < 3 else trajectory.entropy >= np.float32(threshold)
        assert np.array_equal(use.kept, expected & trajectory.loss_mask)
        clipped = np.where(trajectory.loss_mask, np.maximum(ratio, floor), 0)
        assert np.array_equal(use.reward, clipped.astype(np.float32))
        alone = expected_use(objective, *rows_of([trajectory]), step, threshold)
        assert np.array_equal(alone.kept, use.kept)
        assert np.array_equal(alone.reward, use.reward)
    assert any(
        use.kept.any() and not use.kept[t.loss_mask].all()
        for t, use in zip(trajectories, uses, strict=True)
    )
    with pytest.raises(ValueError, match="loss tokens"):
        token_uses(trajectories[:2], objective.terms(batch, step, threshold))


@pytest.mark.slow
def test_a_real_run_records_every_tokens_use_and_is_shown(tmp_path: Path) -> None:
    train(
        tmp_path / "run",
        "env=pixel_reasoner",
        "steps=2",
        "batch.mini_batch=2",  # the second mini-batch meets a student that has moved
        "logging.trajectories=4",
        "evaluation.every=0",
        "evaluation.tasks=1",
        "evaluation.teacher=false",
    )
    run = Run(tmp_path / "run")
    news = everything(run)
    assert len(news["rows"]) == 8
    for step in (0, 1):
        (row,) = (m for m in news["metrics"] if m["kind"] == "train" and m["step"] == step)
        records = [run.record(r["n"]) for r in news["rows"] if r["step"] == step]
        tokens = [
            (record["kept"][i], record["token_reward"][i])
            for record in records
            if record is not None
            for i, live in enumerate(record["loss_mask"])
            if live
        ]
        # All episodes are recorded, so the shares are those of the whole step.
        assert np.mean([kept for kept, _ in tokens]) == pytest.approx(row["mask/kept_share"])
        assert min(reward for _, reward in tokens) >= np.float32(row["reward/floor"])
        mean = row["reward/clipped_mean"]
        assert np.mean([r for _, r in tokens]) == pytest.approx(mean, abs=0.05)
    export_page([run], tmp_path / "page.html")
    assert len(embedded(tmp_path / "page.html")["runs"][0]["records"]) == 8
