"""``reopold judge check``: how often rules and a judge agree with labelled pairs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as composed
from hydra import initialize_config_module
from judge_server import (
    USAGE,
    Reply,
    Seen,
    gemini_text,
    google_error,
    install_judge,
    serving,
)
from running import environment, wait_until

from reopold_agent.errors import ConfigError, DataError
from reopold_agent.judge.__main__ import prepared_words, run
from reopold_agent.judge.agreement import (
    Counts,
    by_kind,
    by_rule,
    by_source,
    compare,
    count,
    extractions,
    read_cases,
)

pytest.importorskip("google.genai", reason='needs google-genai: pip install -e ".[test]"')

PAIRS = [
    {"pred": "\\boxed{7}", "gold": "7", "expected": 1, "kind": "count", "source": "one"},
    {"pred": "\\boxed{8}", "gold": "7", "expected": 0, "kind": "count", "source": "one"},
    {"pred": "\\boxed{9} is too much, 7", "gold": "7", "expected": 1, "source": "two", "id": "x"},
    {"pred": "It might be 7 or 8.", "gold": "7", "expected": 1, "source": "two"},
    {"pred": "It might be 3 or 4.", "gold": "4", "expected": 0, "source": "two"},
    {"pred": "Either 5 or 6, who knows?", "gold": "5", "expected": 1, "source": "two"},
]
"""The rules agree on 1 and 2, decide 3 wrongly, and leave 4, 5 and 6 undecided (5 is not right)."""

ANSWERS = {"boxed{7}": "7", "boxed{8}": "8", "too much": "7", "7 or 8": "7", "3 or 4": "4"}
"""The judge repairs 3 and 4 and breaks 5; for 6 its service is too busy."""

LIMITED = google_error(429, "Resource has been exhausted", "RESOURCE_EXHAUSTED")


def replies(seen: Seen, _: int) -> Reply:
    shown = seen.body["contents"][0]["parts"][0]["text"]
    for text, answer in ANSWERS.items():
        if text in shown:
            return gemini_text(json.dumps({"answer": answer}))
    return LIMITED


@pytest.fixture(autouse=True)
def environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", "AIzaSyTEST-0123456789_abcdefghijklmnopqr")
    for name in ("GOOGLE_API_KEY", "GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_GEMINI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "it's labelled.jsonl", PAIRS)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def gemini(url: str, cache: Path) -> list[str]:
    words = ["sdk=google-genai", f"endpoint={url}", f"cache={cache}", "attempts=1"]
    return ["judge=gemini", *(f"judge.{word}" for word in words)]


def check(*words: str) -> None:
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        run(composed("judge", prepared_words(["check", *words])))


def rows_of(shown: str, heading: str) -> dict[str, list[str]]:
    """The cells of a printed table by the first cell of their row."""
    table = shown.split(f"| {heading} ")[1].split("\n+")[0]
    rows = [[cell.strip() for cell in row.split("|")] for row in table.splitlines()[2:]]
    return {row[1]: row[2:-1] for row in rows}


def test_the_rules_alone(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(str(file), f"output={tmp_path / 'check.json'}")
    shown = capsys.readouterr().out
    half = "50.0% (18.8% to 81.2%)"  # Wilson: 1/2 -+ 1.96 sqrt(1/24 + 1.96^2/144) / (1 + 1.96^2/6)
    assert rows_of(shown, "rules alone: source") == {
        "two": ["4", "1", "1", "2", "25.0% (4.6% to 69.9%)"],
        "one": ["2", "2", "0", "0", "100.0% (34.2% to 100.0%)"],
        "all": ["6", "3", "1", "2", half],
    }
    kinds = rows_of(shown, "rules alone: kind")
    assert [kinds["auto"][:4], kinds["count"][:4]] == [["4", "1", "1", "2"], ["2", "2", "0", "0"]]
    assert rows_of(shown, "rules alone: found, without a box")["all"][:4] == ["3", "1", "0", "2"]
    assert "A judge would be asked about 3 of 6 responses" in shown
    assert "line 3, id x: label 1, gold 7, response \\boxed{9} is too much, 7\n" in shown
    assert shown.count("\n  rules alone: ") == 3
    saved = json.loads((tmp_path / "check.json").read_text("utf-8"))
    assert saved["file"] == str(file)
    assert saved["judge"]["responses"] == 3
    rules = saved["ways"]["rules alone"]
    assert (rules["pairs"], rules["agree"], rules["wrong"], rules["undecided"]) == (6, 3, 1, 2)
    assert rules["source"]["one"]["agreement"] == 1.0
    assert [each["line"] for each in saved["disagreements"]] == [3, 4, 6]
    assert saved["disagreements"][0]["verdicts"]["rules alone"]["extracted"] == "9"


def test_a_judge_repairs_one_pair_and_breaks_one(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(replies) as server:
        words = [str(file), *gemini(server.url, tmp_path / "cache")]
        check(*words)
        assert len(server.seen) == 3
        shown = capsys.readouterr().out
        check(*words)
        assert len(server.seen) == 4  # only what failed is asked again
        again = capsys.readouterr().out
    ways = rows_of(shown, "way of grading")
    assert {way: row[:4] for way, row in ways.items()} == {
        "rules alone": ["6", "3", "1", "2"],
        "rules, then the judge": ["6", "3", "2", "1"],
    }
    assert rows_of(shown, "rules, then the judge: source")["two"][:4] == ["4", "1", "2", "1"]
    assert "rules, then the judge: repairs 1 and breaks 1 of 6 pairs" in shown
    assert "asked about 3 of 6 responses, 2 decided, 0 from the cache, 3 calls, 202 tokens" in shown
    assert "failures: http_429 1\n" in shown
    assert f"versions: {USAGE['modelVersion']} 2\n" in shown
    assert "  rules, then the judge: wrong, extracted 4 (judge+boxed:number)\n" in shown
    assert (
        "  rules, then the judge: undecided, extracted nothing (after 1 attempts: HTTP 429" in shown
    )
    assert "2 decided, 2 from the cache, 1 calls, 0 tokens" in again
    assert rows_of(again, "way of grading") == ways


def test_the_judge_on_every_response(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "check.json"
    with serving(replies) as server:
        check(
            *gemini(server.url, tmp_path / "cache"),
            str(file),
            "all=true",
            "disagreements=1",
            f"output={output}",
        )
        assert len(server.seen) == 6
        assert not any('"expected"' in str(seen.body) for seen in server.seen)
    shown = capsys.readouterr().out
    rows = {way: row[:4] for way, row in rows_of(shown, "way of grading").items()}
    assert rows["rules, then the judge"] == ["6", "3", "2", "1"]
    assert rows["the judge alone"] == ["6", "4", "1", "1"]
    assert "the judge alone: repairs 2 and breaks 1 of 6 pairs" in shown
    assert "... and 3 more disagreements: disagreements=null lists all." in shown
    saved = json.loads(output.read_text("utf-8"))
    alone = saved["ways"]["the judge alone"]
    assert (alone["repaired"], alone["broken"], alone["p_value"]) == (2, 1, 1.0)
    assert saved["judge"]["counters"]["input_tokens"] == 505
    assert [each["line"] for each in saved["disagreements"]] == [3, 4, 5, 6]
    assert saved["disagreements"][2]["verdicts"]["the judge alone"]["outcome"] == "wrong"


def test_without_a_key_the_rules_are_checked(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GEMINI_API_KEY")
    check(str(file), "judge=gemini", "all=true")
    shown = capsys.readouterr().out
    assert "A judge would be asked about 6 of 6 responses" in shown
    assert "then the judge" not in shown


def test_the_judge_is_shown_the_question_and_its_options(tmp_path: Path) -> None:
    pair = {"pred": "Red or blue?", "gold": "A", "expected": 0, "kind": "option"}
    rows = [
        {**pair, "question": "Which?", "options": ["red", "blue"]},
        {**pair, "options": {"B": "blue", "A": "red"}},
        {**pair, "kind": "text", "options": {"strict": False}},
    ]
    compared = compare(read_cases(written(tmp_path / "pairs.jsonl", rows)))
    asked = extractions(compared, everything=True)
    assert [each.options for each in asked] == [("red", "blue"), ("red", "blue"), ()]
    assert [each.question for each in asked] == ["Which?", "", ""]
    assert [(each.kind, each.id) for each in asked] == [
        ("option", "0"),
        ("option", "1"),
        ("text", "2"),
    ]


def test_the_shipped_pairs_are_checked_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    check("disagreements=0")
    shown = capsys.readouterr().out
    assert rows_of(shown, "rules alone: kind")["all"][0] == "459"
    assert "\n  rules alone: " not in shown


def test_text_of_a_file_does_not_control_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {
        "pred": "1 or\n2\x1b[2J\u202e\ud800",
        "gold": "[red]1\x07",
        "expected": 1,
        "source": "[bold]a\x1b[1mb\nc",
        "note": "why\rnot",
    }
    check(str(written(tmp_path / "pairs.jsonl", [pair])))
    shown = capsys.readouterr().out
    assert "[bold]a [1mb c" in shown
    assert "gold [red]1 , response 1 or 2 [2J ; note: why not\n" in shown
    assert not any(c in shown for c in "\x1b\x07\r\u202e\ud800")


def test_ctrl_c_keeps_the_replies(file: Path, tmp_path: Path) -> None:
    def slow(seen: Seen, number: int) -> Reply:
        reply = replies(seen, number)
        reply = Reply(**vars(reply))
        reply.delay = 0 if number == 0 else 60
        return reply

    with serving(slow) as server:
        words = [*gemini(server.url, tmp_path / "cache"), "judge.concurrency=1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "reopold_agent.judge", "check", str(file), *words],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: len(server.seen) == 2, process)
        process.send_signal(signal.SIGINT)
        shown, error = process.communicate(timeout=60)
        assert process.returncode == 130, error
        assert error.strip() == (
            "Stopped. A judge's replies so far are in its cache; the same command continues."
        )
        assert shown == ""
        server.script = replies
        output = tmp_path / "check.json"
        check(str(file), *words, f"output={output}")
        assert json.loads(output.read_text("utf-8"))["judge"]["counters"]["cached"] == 1


def test_a_judge_of_another_package(file: Path, tmp_path: Path) -> None:
    install_judge(tmp_path, "7")
    words = ["check", str(file), "judge=mine", "+judge.cache=null"]
    done = subprocess.run(
        [sys.executable, "-m", "reopold_agent.judge", *words],
        env={**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Judge mine v1: asked about 3 of 6 responses, 3 decided" in done.stdout


# Wrong input, which is found before a judge is asked


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no labelled pairs"),
        ("\n \n", "holds no labelled pairs"),
        ('\n{"gold": "1"', "line 2: not JSON: Expecting ',' delimiter at character 13"),
        ('\n{"gold": "1", "pred": "1"}', "line 2: a labelled pair needs expected"),
        ('\n{"pred": "1"}', "line 2: a labelled pair needs gold and expected"),
        ("\n[1]", "line 2: not a JSON object"),
        ('\n{"gold": "1", "pred": 1, "expected": 1}', "line 2: pred must be a text"),
        ('\n{"gold": 1, "pred": "1", "expected": 1}', "line 2: gold must be a text or a list"),
        ('{"gold": "1", "pred": "1", "expected": 2}', "line 1: expected must be 1 .* got 2"),
        ('{"gold": "1", "pred": "1", "expected": "yes"}', "expected must be 1 .* got 'yes'"),
        ('{"gold": "1", "pred": "1", "expected": 1, "kind": "letter"}', "kind must be one of"),
        ('{"gold": "1", "pred": "1", "expected": 1, "question": 3}', "question must be a text"),
        ('{"gold": "1", "pred": "1", "expected": 1, "options": "A"}', "options must be"),
        ('{"gold": "1", "pred": "1", "expected": 1, "options": {"A": 1}}', "options must be"),
        ("\x00\xff", "not a text file in UTF-8"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(text.encode("latin-1"))
    with serving(replies) as server:
        with pytest.raises(DataError, match=message) as raised:
            check(str(file), *gemini(server.url, tmp_path / "cache"))
        assert server.seen == []
    what, advice = str(raised.value).split("\n")
    assert what.startswith(str(file))
    assert "A line is one JSON object" in advice


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nosuch.jsonl"], "nosuch.jsonl: No such file or directory\nGive a file"),
        (["FOLDER"], "Is a directory\nGive a file"),
        (["one", "two"], "there can only be one file"),
        (["disagreements=-1"], "disagreements must be a number of pairs"),
        (["output=nosuch/check.json"], "a file in a folder that exists"),
        (["output=FOLDER"], "a file in a folder that exists"),
        (["FILE", "output=FILE"], "would replace the labelled pairs"),
        (["judge=gemini", "judge.sdk=none"], "sdk"),
    ],
)
def test_wrong_words_are_refused(
    file: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    plain = written(tmp_path / "plain.jsonl", PAIRS)
    replaced = [w.replace("FOLDER", str(tmp_path)).replace("FILE", str(plain)) for w in words]
    with pytest.raises((ConfigError, DataError), match=message):
        check(*replaced)
    assert plain.read_text("utf-8") == file.read_text("utf-8")


def test_a_separator_inside_a_text_is_not_the_end_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    pair = '{"pred": "first\u2028\\\\boxed{7}", "gold": "7", "expected": 1}'
    file.write_text(f"\ufeff{pair}\r\n", encoding="utf-8")
    (only,) = compare(read_cases(file))
    assert only.agrees


def test_outcomes_of_labelled_pairs(tmp_path: Path) -> None:
    rows = [
        {"gold": "B", "pred": "\\boxed{a bus}", "expected": 1, "kind": "option", "source": "one",
         "options": ["a car", "a bus"]},
        {"gold": ["3", "4"], "pred": "3", "expected": 1, "kind": "count", "source": "one"},
        {"gold": "7", "pred": "\\boxed{8}", "expected": 1, "source": "two"},
        {"gold": "7", "pred": "It might be 7 or 8.", "expected": 1, "source": "two"},
        {"gold": "f(x)", "pred": "\\boxed{f(y)}", "expected": 1, "options": {"strict": False}},
    ]  # fmt: skip
    compared = compare(read_cases(written(tmp_path / "pairs.jsonl", rows)))
    assert [each.outcome for each in compared] == ["agree", "agree", "wrong", "undecided", "agree"]
    assert [each.has_box for each in compared] == [True, False, True, False, True]
    sources = count(compared, by_source)
    assert list(sources) == ["one", "two", "no source"]
    assert sources["two"] == Counts(agree=0, wrong=1, undecided=1)
    assert (sources["one"].pairs, sources["one"].share) == (2, 1.0)
    assert sources["one"].interval[0] == pytest.approx(0.342, abs=1e-3)
    assert set(count(compared, by_kind)) == {"option", "count", "auto"}
    assert set(count(compared, by_rule)) == {"boxed", "bare", "undecided"}
