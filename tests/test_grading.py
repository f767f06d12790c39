"""Grading: kinds of answers, where answers are found, math-verify's workers, real data."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reopold_agent
from reopold_agent.errors import ConfigError
from reopold_agent.judges import KINDS, equivalent, extract_boxed, grade
from reopold_agent.judges.agreement import compare, main, read_cases
from reopold_agent.judges.extract import find_answer
from reopold_agent.judges.math import MathPool, same_expression
from reopold_agent.judges.numbers import parse_quantity

REPOSITORY = Path(__file__).resolve().parents[1]
HANGS = "9^{9^{9^{9}}}"


def shared(name: str) -> Path:
    """A file of ``../shared/data``, beside the repository."""
    path = REPOSITORY.parent / "shared" / "data" / name
    if not path.is_file():
        pytest.skip(f"no real data at {path}")
    return path


def json_lines(name: str) -> list[dict[str, Any]]:
    lines = shared(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


SAME = """
x=1, x=2 | x=2, x=1  ;  10^\\circ\\text{C} | 10  ;  100 | 100m2  ;  10 | 10th  ;  1:2 | 1/2
\\begin{cases} x=1 \\\\ y=2 \\end{cases} | y=2, x=1  ;  \\emptyset | \\varnothing  ;  i | \\sqrt{-1}
0.5 | \\frac{1}{2}  ;  1\\frac{4}{5} | 9/5  ;  7/2 | 3.5  ;  10{,}000 | 10000
10,\\!080 | 10080  ;  1 000 | 1000  ;  12\\% | 0.12  ;  12\\% | 12 percent  ;  0.25 | 25\\%
\\$18.90 | 18.9 dollars  ;  45^\\circ | 45 degrees  ;  45° | 45  ;  5 \\text{ cm} | 5
864 \\mbox{ inches}^2 | 864 square inches  ;  1.04e-3 | 1.04 \\times 10^{-3}
3e8 | 3 * 10^8 m/s  ;  15.7 million | 15,700,000  ;  23 | twenty-three  ;  0 | none
\\frac{1}{3} | 0.3333  ;  1.22 | 1,22  ;  023 | 23  ;  120 | one hundred and twenty
10^{3} | 1000  ;  B | (B)  ;  \\text{(C)} | C. a dog  ;  D | option D  ;  yes | Yes, it is.
No | no  ;  True | yes  ;  \\text{Evelyn} | evelyn  ;  a red car | red car  ;  x-ray | X-Ray
x^2+2x+1 | (x+1)^2  ;  11\\sqrt5+11 | 11(1+\\sqrt{5})  ;  \\frac{\\sqrt3}{3} | 1/\\sqrt3
5! | 120  ;  p - q | -q+p  ;  2\\sqrt3 i | 2i\\sqrt{3}  ;  i(3-i) | 1+3i
\\sqrt2 | 1.4142  ;  x > 5 | 5 < x  ;  x \\le 3 | (-\\infty,3]  ;  y=2x+3 | y=3+2x
k=n+1 | n+1  ;  a+b=0 | b+a=0  ;  1,2,3 | 3, 2 and 1  ;  \\{1,2\\} | 2,1
(1,2),(3,4) | (3,4) and (1,2)  ;  x=2 \\text{ or } x=3 | 2,3  ;  (p,q)=(3,2) | (3,2)
(\\frac35,1] | (0.6, 1]  ;  [0, 1) | x \\in [0,1)  ;  \\pm 2 | 2, -2
(-\\infty,-2)\\cup(2,\\infty) | (2,\\infty)\\cup(-\\infty,-2)
\\begin{pmatrix}1\\\\2\\end{pmatrix} | \\begin{bmatrix} 1 \\\\ 2 \\end{bmatrix}
"""
DIFFERENT = """
x=1, y=2 | x=5, y=2  ;  a=1 | b=1  ;  x=1 \\text{ or } x=2 | x=2  ;  AB=5 | CD=5  ;  \\mathbb{R} | R
0.333 | \\frac13  ;  -1 | 1  ;  2 | 20  ;  3.61e-10 | 1e-10  ;  5 \\text{ cm} | 5 \\text{ m}
6m | 6  ;  100 | 100x  ;  7 | 7 or 8  ;  16386.16 | 16386.20  ;  5 | 5 and 6
12\\% | 1200  ;  B | the answer is C  ;  B | A or B  ;  yes | no  ;  no | Yes and no
even | odd  ;  red | dark red  ;  x^2 | x^3  ;  p - q | q-p  ;  x>5 | x \\ge 5
(1,2) | (2,1)  ;  (1,2) | [1,2]  ;  (1,2] | [1,2)  ;  7, 8 | 7  ;  1,2,3 | 1,2
\\pi | 3.14  ;  \\cos(x)=1 | \\sin(x)=1  ;  3a=b | 3  ;  1+2i | 1-2i
(-\\infty,3] | (-\\infty,3)  ;  x | y
\\begin{pmatrix}1\\\\2\\end{pmatrix} | \\begin{pmatrix}1&2\\end{pmatrix}
"""


def pairs(table: str) -> list[tuple[str, str]]:
    """Reference answer and answer: "gold | answer", separated by semicolons between spaces."""
    cells = [cell for line in table.strip().splitlines() for cell in line.split("  ;  ")]
    return [(gold, answer) for gold, answer in (cell.split(" | ") for cell in cells)]


@pytest.mark.parametrize(("gold", "answer"), pairs(SAME))
def test_same(gold: str, answer: str) -> None:
    verdict = grade(f"So \\boxed{{{answer}}}.", gold)
    assert verdict.correct, verdict
    assert verdict.extracted == answer
    assert not verdict.undecided
    assert grade(f"Thus \\boxed{{{answer}}}", f"$\\boxed{{{gold}}}$").correct
    assert grade(f"\\boxed{{{answer}}}", ["no such thing", gold]).correct


@pytest.mark.parametrize(("gold", "answer"), pairs(DIFFERENT))
def test_different(gold: str, answer: str) -> None:
    verdict = grade(f"So \\boxed{{{answer}}}.", gold)
    assert not verdict.correct, verdict


@pytest.mark.parametrize(
    ("answer", "gold", "kind", "how"),
    [
        ("B", "B", "auto", "boxed:option"),
        ("0.5", "1/2", "auto", "boxed:number"),
        ("Yes", "yes", "auto", "boxed:yes_no"),
        ("two dogs", "2", "count", "boxed:number"),
        ("(x+1)^2", "x^2+2x+1", "auto", "boxed:math-verify"),
        ("2, 1", "1,2", "auto", "boxed:list"),
        ("Evelyn", "evelyn", "text", "boxed:text"),
    ],
)
def test_how(answer: str, gold: str, kind: str, how: str) -> None:
    assert grade(f"\\boxed{{{answer}}}", gold, kind).how == how


def test_kinds_change_what_counts() -> None:
    assert not grade("\\boxed{10cm}", "10").correct  # mathematics: 10 times c times m
    assert grade("\\boxed{10cm}", "10", "number").correct
    assert grade("\\boxed{2.001}", "2", "number", tolerance=0.01).correct
    assert not grade("\\boxed{2.001}", "2", "count", tolerance=0.01).correct
    assert not grade("\\boxed{1,2}", "2,1", "ordered").correct
    assert grade("\\boxed{(1,2)}", "(2,1)", "list").correct
    assert not grade("\\boxed{0.5}", "1/2", "text").correct
    assert grade("\\boxed{C}", "\\text{(C)}", "math").correct
    assert grade("\\boxed{2\\sqrt3}", "3.4641", "number").correct
    assert not grade("\\boxed{2+1}", "3", "count").correct
    assert grade("\\boxed{0.33}", "1/3", precision=2).correct
    assert not grade("\\boxed{-2 \\le x \\le 7}", "x \\in [-2,7]").correct
    assert grade("\\boxed{-2 \\le x \\le 7}", "x \\in [-2,7]", set_relation=True).correct
    assert grade("\\boxed{f(y)}", "f(x)", strict=False).correct
    assert not grade("\\boxed{f(y)}", "f(x)").correct
    with pytest.raises(ConfigError, match="one of auto, option"):
        grade("\\boxed{1}", "1", "integer")


def test_options_by_text() -> None:
    options = ["A. a red car", "B. a bus", "a bicycle"]
    assert grade("\\boxed{a bus}", "B", options=options).correct
    assert grade("\\boxed{C}", "a bicycle", "option", options=options).correct
    assert not grade("\\boxed{a red car}", "B", options=options).correct
    assert not grade("\\boxed{a car}", "A", options=options).correct
    assert not grade("\\boxed{a bus}", "B").correct


@pytest.mark.parametrize(
    ("response", "text", "where"),
    [
        ("\\boxed{1} then \\boxed{2}", "2", "boxed"),
        ("\\boxed{1} and \\boxed{2}", "1, 2", "boxed"),
        ("\\boxed{1}, \\boxed{2} \\text{ or } \\boxed{3}", "1, 2, 3", "boxed"),
        ("\\boxed{4}\n\n\\boxed{4}", "4", "boxed"),
        ("<think>\\boxed{9}</think> It is \\boxed{3}<|im_end|>\\boxed{5}", "3", "boxed"),
        ("<answer>7</answer>", "7", "bare"),
        ("The answer is 42.", "42", "stated"),
        ("**Answer:** $x=3$", "$x=3$", "stated"),
        ("Final Answer: The largest $n$ is 34. I hope it is correct.", "34", "stated"),
        ("Long story.\nTherefore, the probability is 2/3.", "2/3", "concluded"),
        ("So it grows by 100%", "100%", "concluded"),
        ("12 apples", "12 apples", "bare"),
        ("$\\frac{1}{2}$", "$\\frac{1}{2}$", "bare"),
    ],
)
def test_where_answers_are_found(response: str, text: str, where: str) -> None:
    found = find_answer(response)
    assert found is not None
    assert (found.text, found.where) == (text, where)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "I do not know.",
        "The answer might be 7 or 8.",
        "The answer is not 7.",
        "We have 7 dogs. Then there are 3 cats and 2 birds to count.",
        "Perhaps 7",
        "Therefore, x is less than 7.",
        "So there are at least 7 of them.",
        "Thus it follows from equation 7.",
        "I compute 3 + 4 and then\n\n\\boxed{",
        "The answer is 7. \\boxed{7",
        "This problem cannot be solved, since 7 is missing.",
    ],
)
def test_what_is_left_to_a_judge(response: str) -> None:
    verdict = grade(response, "7")
    assert (verdict.correct, verdict.undecided, verdict.how) == (False, True, "undecided")


def test_a_sentence_in_the_box() -> None:
    assert grade("\\boxed{There are 3 dogs}", "3").correct
    assert grade("\\boxed{\\text{There are four people}}", "4").correct
    assert not grade("\\boxed{There are 4 dogs and 3 cats}", "3").correct
    assert grade("\\boxed{There are 4 dogs and 3 cats}", "3").undecided
    assert not grade("\\boxed{8}", "7").undecided


numbers = st.decimals(-(10**6), 10**6, places=3).map(lambda d: format(d, "f"))
answers = st.one_of(
    numbers,
    st.integers(0, 10**9).map(lambda i: f"{i:,}"),
    st.sampled_from(["\\frac{3}{7}", "x^2+1", "(1, 2]", "\\{1, 2\\}", "B", "yes", "a red car"]),
    st.lists(st.integers(-99, 99).map(str), min_size=2, max_size=5).map(", ".join),
)


@settings(max_examples=300, deadline=None)
@given(answers, st.sampled_from(["%s", "$%s$", "\\(%s\\)", " %s . ", "\\boxed{%s}", "$$ %s $$"]))
def test_an_answer_is_itself_however_it_is_set(answer: str, form: str) -> None:
    assert grade(f"\\boxed{{{answer}}}", form % answer).correct
    assert grade(f"Hence \\[\\boxed{{ {answer} }}\\]", answer).correct
    assert equivalent(form % answer, answer) or "boxed" in form


@settings(max_examples=300, deadline=None)
@given(st.permutations(["1", "2.5", "-3", "\\frac{1}{7}"]))
def test_lists_in_any_order_tuples_in_one(parts: list[str]) -> None:
    gold = "1, 2.5, -3, \\frac{1}{7}"
    assert equivalent(", ".join(parts), gold)
    assert equivalent(f"({', '.join(parts)})", f"({gold})") == (parts == gold.split(", "))


pieces = st.lists(
    st.sampled_from(
        ["\\boxed{", "}", "{", "$", "\\frac", "1", ",", "(", "]", "x", "=", "the answer is ", "yes",
         " and ", "%", "\\text{", "\\\\", "\n", "^", "e9", "\\begin{matrix}", "\\end{matrix}", "&",
         "°", "km", "\\infty", "\\cup", ":", "</think>", "not ", "million ", "\u2212", "√", "A. "]
    )
    | st.text(max_size=3),
    max_size=14,
).map("".join)  # fmt: skip


@settings(max_examples=700, deadline=None)
@given(pieces, pieces, st.sampled_from(KINDS))
def test_any_text_has_a_verdict(response: str, gold: str, kind: str) -> None:
    verdict = grade(response, [gold, "7"], kind)
    assert isinstance(verdict.correct, bool)
    assert isinstance(verdict.how, str)
    assert not (verdict.correct and verdict.undecided)
    assert verdict.extracted is not None or verdict.undecided


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_quantity_or_not(text: str) -> None:
    parse_quantity(text)


# Workers


@pytest.fixture
def pool() -> Iterator[MathPool]:
    pool = MathPool(2, cpu_seconds=1.0, wall_seconds=6.0)
    yield pool
    pool.close()
    assert pool.pids() == []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_hanging_expression_costs_seconds_and_leaves_nothing(pool: MathPool) -> None:
    assert pool.equal("x+1", "1+x")
    started = time.monotonic()
    assert not pool.equal("7", HANGS)
    assert not pool.equal("x^2", "(x+1)^{99999}")
    assert time.monotonic() - started < 20
    assert pool.equal("x+1", "1+x")
    pids = pool.pids()
    pool.close()
    assert not any(alive(pid) for pid in pids)
    assert pool.equal("2x", "x+x")  # it starts anew


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")
def test_a_worker_that_does_not_answer_is_killed(pool: MathPool) -> None:
    assert pool.equal("x+1", "1+x")
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    assert not pool.equal("2x", "x+x")
    assert 5 < time.monotonic() - started < 15
    assert not alive(pid)
    assert pool.equal("2x", "x+x")
    assert pool.pids() != [pid]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_worker_is_replaced(pool: MathPool) -> None:
    for _ in range(3):
        assert pool.equal("x+1", "1+x")
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGKILL)
        while alive(pid) and pool.pids():
            time.sleep(0.01)
    assert pool.equal("x+1", "1+x")


def test_threads_share_the_pool(pool: MathPool) -> None:
    def ask(number: int) -> bool:
        right = pool.equal(f"x+{number}", f"{number}+x")
        return right and not pool.equal(f"x+{number}", f"x-{number + 1}")

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(ask, range(1, 41)))
    assert 1 <= len(pool.pids()) <= 2


def test_a_hanging_expression_does_not_hold_up_other_threads(pool: MathPool) -> None:
    pool.equal("x", "x")
    hung = threading.Thread(target=pool.equal, args=("7", HANGS))
    hung.start()
    assert pool.equal("x+1", "1+x")
    hung.join()


def run_script(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    root = str(Path(reopold_agent.__file__).parents[1])
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
    )


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    done = run_script(
        "from reopold_agent.judges import grade\n"
        "from reopold_agent.judges.math import POOL\n"
        "print(grade('\\\\boxed{(x+1)^2}', 'x^2+2x+1').correct, *POOL.pids())\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer, pid = done.stdout.split()
    assert answer == "True"
    assert not alive(int(pid))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_program_leaves_no_worker(tmp_path: Path) -> None:
    done = run_script(
        "import os, signal, threading, time\n"
        "from reopold_agent.judges.math import POOL\n"
        "POOL.equal('x', 'x')\n"
        "threading.Thread(target=POOL.equal, args=('7', '9^{9^{9^{9}}}'), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(*POOL.pids(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        tmp_path,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def _in_child(queue: Any) -> None:
    queue.put(same_expression("x+5", "5+x"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_workers_of_its_own() -> None:
    assert same_expression("x+4", "4+x")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) is True
    child.join(timeout=60)
    assert child.exitcode == 0
    assert same_expression("x+6", "6+x")


# Real data


def test_agreement_with_labelled_pairs() -> None:
    compared = compare(read_cases(shared("grader/cases.jsonl")))
    agreed = sum(each.agrees for each in compared)
    assert len(compared) == 172
    # docs/grading.md names the two on which this grader keeps to its own rules.
    assert {each.case["id"] for each in compared if not each.agrees} <= {172, 258}
    assert agreed / len(compared) >= 0.97


def test_the_agreement_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cases.jsonl"
    rows = [
        {"id": 1, "gold": "1/2", "pred": "0.5", "expected": 1, "source": "here"},
        {"id": 2, "gold": "1/2", "pred": "0.6", "expected": 1, "source": "here", "note": "why"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert main([str(file)]) == 0
    assert main([str(file), "--at-least", "0.97"]) == 1
    shown = capsys.readouterr().out
    assert "50.0%" in shown
    assert "id 2: label 1, here 0" in shown
    assert "note: why" in shown
    assert main([str(tmp_path / "none.jsonl")]) == 2
    file.write_text('{"gold": "1"}\n', encoding="utf-8")
    assert main([str(file)]) == 2
    assert "line 1" in capsys.readouterr().err


def test_recorded_verdicts_on_real_responses() -> None:
    graded = wrong = 0
    for row in json_lines("rollouts/math_cot.jsonl"):
        for response, score in zip(row["code"], row["score"], strict=True):
            verdict = grade(response, row["gt"])
            graded += 1
            wrong += verdict.correct != bool(score)
            assert not verdict.undecided
    assert (graded, wrong) == (320, 0)


def test_reference_answers_against_themselves() -> None:
    rows = json_lines("math/math500.jsonl")
    assert sum(grade(f"\\boxed{{{row['answer']}}}", row["answer"]).correct for row in rows) == 500
    assert sum(grade(row["solution"], row["answer"]).correct for row in rows) == 500
    assert len(rows) == 500
    for row in json_lines("math/olympiadbench.sample.jsonl"):
        for answer in row["final_answer"]:
            assert grade(f"\\boxed{{{answer}}}", answer).correct, answer
    for row in json_lines("math/minerva_math.sample.jsonl"):
        gold = extract_boxed(row["solution"])
        assert gold
        assert grade(row["solution"], gold).correct, gold


def luffy_answers() -> list[str]:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(shared("luffy/valid.parquet")).to_pylist()
    return [row["reward_model"]["ground_truth"] for row in rows]


def test_luffy_answers_against_themselves_and_their_neighbours() -> None:
    answers = luffy_answers()
    assert len(answers) == 2019
    assert all(grade(f"\\boxed{{{answer}}}", answer).correct for answer in answers)
    # Different ones that are the same answer are few.
    distinct = sorted({answer for answer in answers if parse_quantity(answer) is not None})
    taken = [
        (a, b)
        for a, b in itertools.pairwise(distinct)
        if grade(f"\\boxed{{{a}}}", b).correct and parse_quantity(a) != parse_quantity(b)
    ]
    assert len(taken) <= 40
    values = [(parse_quantity(a), parse_quantity(b)) for a, b in taken]
    assert all(a and b and (a.value == b.value or a.percent != b.percent) for a, b in values), taken
