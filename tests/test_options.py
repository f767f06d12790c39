"""Rows with options: they are shown once, and answered by letter or by text, in every format."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import gymnasium
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import reopold_agent.envs  # noqa: F401  # registers the environments
from reopold_agent.data import load_tasks, write_verl
from reopold_agent.data.checks import BadRowsError, RowError
from reopold_agent.data.formats import acceptable_answers
from reopold_agent.data.options import options_of, right_options, with_options
from reopold_agent.evaluate.benchmarks import Benchmark, load_benchmark
from reopold_agent.judges import grade
from reopold_agent.types import Task

PETS = ["cat", "dog", "a red fish"]
LISTED = "\nOptions:\n(A) cat\n(B) dog\n(C) a red fish"
SOURCES = ("pixel_reasoner", "math_jsonl", "geometry3k", "vlmevalkit", "verl")


def one(folder: Path, source: str, row: dict[str, Any]) -> Task:
    if source == "verl":
        prompt = [{"role": "user", "content": row.pop("question")}]
        row = {**row, "prompt": prompt, "reward_model": {"ground_truth": row.pop("answer")}}
    file = folder / f"{len(list(folder.iterdir()))}.json"  # tasks of one file are loaded once
    file.write_text(json.dumps([row]))
    (task,) = list(load_tasks({"source": source, "path": str(file)}))
    assert isinstance(task, Task)
    return task


def refusal(folder: Path, source: str, row: dict[str, Any]) -> str:
    with pytest.raises(BadRowsError) as caught:
        one(folder, source, row)
    return str(caught.value)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("answer", ["B", "(b)", "dog", "B. dog", ["Dog"], "['B']"])
@pytest.mark.parametrize(
    "columns",
    [
        {"options": PETS},
        {"choices": PETS},
        dict(zip("ABC", PETS, strict=True)),
        {f"option_{letter}": pet for letter, pet in zip("abc", PETS, strict=True)},
        {f"choice{letter}": pet for letter, pet in zip("ABC", PETS, strict=True)},
        {"Options": PETS},
        {"CHOICES": PETS},
        {"option": PETS},
        {"option": dict(zip("ABC", PETS, strict=True))},
        {"choice": PETS},
        {"answer_choices": PETS},
        {"Answer Choices": PETS},
        {"candidates": PETS},
        {f"option{number}": pet for number, pet in enumerate(PETS, 1)},
        {f"option_{number}": pet for number, pet in enumerate(PETS, 1)},
        {f"choice{number}": pet for number, pet in enumerate(PETS)},
        {f"Option {letter}": pet for letter, pet in zip("ABC", PETS, strict=True)},
        {f"option {letter}": pet for letter, pet in zip("abc", PETS, strict=True)},
        {f"op{letter}": pet for letter, pet in zip("abc", PETS, strict=True)},
        {"options": None, "Options": PETS, "option_a": ""},
    ],
    ids=str,
)
def test_every_source_shows_options_and_knows_the_right_one(
    tmp_path: Path, source: str, answer: Any, columns: dict[str, Any]
) -> None:
    task = one(tmp_path, source, {"question": "Which pet?", "answer": answer, **columns})
    assert task.question == "Which pet?" + LISTED
    assert task.answers == ("B",)
    assert (task.metadata["answer_kind"], task.metadata["options"]) == ("option", PETS)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("answer", ["horse", "D", "dog or cat", 1, True])
def test_an_answer_that_is_no_option_is_a_problem(tmp_path: Path, source: str, answer: Any) -> None:
    row = {"question": "Which?", "answer": answer, "choices": PETS}
    told = refusal(tmp_path, source, row)
    assert f"the answer '{answer}' is neither the letter nor the text of one of 3 options" in told
    assert ("counted from 0, belongs in a column 'label'" in told) == (str(answer) == "1")


@pytest.mark.parametrize(
    "question",
    [
        "Which?\n(A) cat\n(B) dog\n(C) a red fish",
        "Which? (A) Cat (B) Dog (C) A red fish.",
        "Which?\nA. cat\nB. dog\nC. a red fish\nAnswer with the letter.",
        "Which? A. cat B. dog C. a  red fish",
        "Which?\nA: cat\nB: dog\nC: a red fish",
        "Which? A: cat; B: dog; C: a red fish",
        "Which?\n**A.** cat\n**B.** dog\n**C.** a red\tfish",
        "Which?\nA) cat\nB) dog\nC) a red fish",
        "Which? a) cat, b) dog, c) a red fish",
        "Which?\nA cat\nB dog\nC a red fish",
        "Which?\nA - cat\nB - dog\nC - a red fish",
        "Which?\n[A] cat [B] dog [C] a red fish",
        "哪个?A、cat;B、dog;C、a red fish",
        "哪个?(A)cat (B)dog (C)a red fish",
    ],
)
def test_options_that_the_question_lists_are_not_shown_again(question: str) -> None:
    assert with_options(question, PETS) == question


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (r"Find $x$. $\textbf{(A) } 7 \qquad \textbf{(B) } \frac{1}{2} \qquad (C)\ 90^\circ$",
         ["7", "$\\frac{1}{2}$", "$90^{\\circ}$"]),
        ("A. 1\nB. 12\nC. 123", ["1", "12", "123"]),
        ("(A) $3,000$ (B) 5%", ["$3,000$", "5%"]),
        ("The letter? (A) A (B) B", ["A", "B"]),
        ("Which? A. <image> B. <image>", ["<image>", "<image>"]),
    ],
)  # fmt: skip
def test_listed_options_in_formulas_and_numbers(question: str, options: list[str]) -> None:
    assert with_options(question, options) == question


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Cat, dog or a red fish?", PETS),  # the letters are not said
        ("Which? (A) cat (B) dog", PETS),
        ("Which?\n(A) cat\n(B) dogs\n(C) a red fish", PETS),
        ("Which? (A) 12 (B) 23", ["1", "2"]),
        ("Which? (A) 1.5 (B) 2,5", ["1", "2"]),
        ("If A:B = B:A, which is larger?", ["A", "B"]),
    ],
)
def test_other_questions_show_them(question: str, options: list[str]) -> None:
    shown = with_options(question, options)
    assert shown.startswith(question + "\nOptions:\n(A) ")
    assert with_options(shown, options) == shown


def test_a_question_that_lists_them_under_other_letters_is_a_problem(tmp_path: Path) -> None:
    row = {"question": "Which? (A) dog (B) cat (C) a red fish", "answer": "B", "options": PETS}
    assert "the 3 options under other letters" in refusal(tmp_path, "pixel_reasoner", row)


@pytest.mark.parametrize(
    "given",
    [
        ["cat", "dog", "a red fish", None, ""],
        "['cat', 'dog', 'a red fish']",
        '["cat", "dog", "a red fish"]',
        ["A. cat", "B. dog", "C. a red fish"],
        ["(A) cat", "(B) dog", "(C) a red fish"],
        "A. cat; B. dog; C. a red fish",
        "A. cat\nB. dog\nC. a red fish",
        {"B": "dog", "A": "cat", "C": "a red fish", "D": None},
        "{'A': 'cat', 'B': 'dog', 'C': 'a red fish'}",
        {"text": PETS, "label": ["A", "B", "C"]},
        {"text": PETS},
    ],
)
def test_forms_of_the_column(given: Any) -> None:
    assert options_of({"choices": given}, ()) == PETS


def test_we_maths_column_in_other_sources(tmp_path: Path) -> None:
    row = {"question": "Which?", "answer": "B", "option": "A. cat; B. dog"}
    assert one(tmp_path, "pixel_reasoner", row).metadata["options"] == ["cat", "dog"]
    assert "options" not in one(tmp_path, "pixel_reasoner", {**row, "option": "yes"}).metadata


@pytest.mark.parametrize("name", ["options", "choices"])
def test_options_in_verls_extra_info(tmp_path: Path, name: str) -> None:
    row = {"question": "Which pet?", "answer": "B", "extra_info": {"index": 3, name: PETS}}
    task = one(tmp_path, "verl", row)
    assert (task.question, task.answers) == ("Which pet?" + LISTED, ("B",))
    assert task.metadata["options"] == PETS


@pytest.mark.parametrize("column", [{"choice": "B"}, {"option": 2}, {"candidates": "cat or dog"}])
def test_columns_that_need_not_be_options(column: dict[str, Any]) -> None:
    assert options_of(column, ("B",)) == []


@pytest.mark.parametrize("given", [None, float("nan"), [], "", " ", "[]", [None, ""], {"A": None}])
def test_no_options(given: Any) -> None:
    assert options_of({"options": given}, ("dog",)) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (4, "'options' must be a list, got int"),
        ("cat or dog", "'options' must be a list, got str"),
        ("['cat', ", "'options' is no list"),
        ("['cat' 'dog']", "texts without a comma between them"),
        (r"['\frac{1}{2}', '2']", "backslashes in a written list must be doubled"),
        (["cat", None, "dog"], "option B of 3 is empty"),
        ([{"bytes": "x"}, "dog"], "an option must be a text or a number, got dict"),
        (list(range(11)), "11 options; 10 are possible"),
        ({"cat": 1, "dog": 2}, "a list, or an object with the keys A, B and so on"),
        ({"text": PETS, "label": ["1", "2", "3"]}, "with the keys A, B and so on"),
        ({"text": PETS, "label": 3}, "with the keys A, B and so on"),
        ({"text": PETS, "label": ["A"]}, "with the keys A, B and so on"),
    ],
)
def test_options_that_cannot_be_read(given: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        options_of({"options": given}, ("B",))


@pytest.mark.parametrize(
    ("given", "letters"),
    [
        (["B. 3", "A. 4"], "B, A"),
        (["A. x1", "C. y1", "D. z1"], "A, C, D"),
        (["(B) 3", "(C) 4"], "B, C"),
    ],
)
def test_options_with_other_letters_of_their_own_are_a_problem(
    given: list[str], letters: str
) -> None:
    with pytest.raises(RowError, match=f"own letters are {letters}; put them in the order A, B"):
        options_of({"options": given}, ("B",))


@pytest.mark.parametrize("given", [["J. Doe", "J. Poe"], ["A. Doe", "Poe"], ["B. Doe"]])
def test_initials_of_names_are_no_letters_of_options(given: list[str]) -> None:
    assert options_of({"options": given}, ("B",)) == given


# Columns A, B and so on


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({"A": 3, "B": 4}, "12"),  # the columns of a table
        ({"A": "3", "B": "4.5", "C": ""}, "12"),
        ({"A": 3, "C": 5}, "3"),
        ({"A": "cat"}, "cat"),
        ({"B": "cat", "C": "dog"}, "B"),
        ({"A": [1, 2], "B": [3, 4]}, "B"),
        ({"N": 5, "X": "left"}, "5"),
    ],
)
def test_other_columns_named_by_letters_are_no_options(
    tmp_path: Path, columns: dict[str, Any], answer: str
) -> None:
    task = one(tmp_path, "math_jsonl", {"problem": "How many?", "answer": answer, **columns})
    assert (task.question, task.answers) == ("How many?", (answer,))
    assert task.metadata["answer_kind"] == "math"


@pytest.mark.parametrize(
    ("columns", "answer", "options"),
    [
        ({"A": 3, "B": 4}, "B", ["3", "4"]),
        ({"A": 3.0, "B": 4.0, "C": float("nan")}, 4, ["3", "4"]),
        ({"A": "3", "B": "4"}, "4.0", ["3", "4"]),
        ({"A": "3 cm", "B": "4 cm", "N": 7}, "B", ["3 cm", "4 cm"]),
    ],
)
def test_numbers_that_the_answer_chooses_from_are_options(
    tmp_path: Path, columns: dict[str, Any], answer: Any, options: list[str]
) -> None:
    task = one(tmp_path, "math_jsonl", {"problem": "How long?", "answer": answer, **columns})
    assert (task.answers, task.metadata["options"]) == (("B",), options)
    assert "(B) 4" in task.question


@pytest.mark.parametrize(
    ("columns", "answer", "message"),
    [
        ({"A": "3 cm", "B": "4 cm"}, "12", "'12' is neither the letter nor the text of one of 2"),
        ({"A": 3, "B": 4}, "D", "'D' is neither the letter nor the text of one of 2"),
        ({"A": "3 cm", "B": "4 cm", "D": "5 cm"}, "B", "option C of 4 is empty"),
        (dict.fromkeys("ABCDEFGHIJKL", "x"), "B", "12 options; 10 are possible"),
    ],
)
def test_texts_that_the_answer_does_not_choose_from_are_a_problem(
    tmp_path: Path, columns: dict[str, Any], answer: str, message: str
) -> None:
    row = {"problem": "How long?", "answer": answer, **columns}
    assert message in refusal(tmp_path, "math_jsonl", row)


# Answers


@pytest.mark.parametrize(
    ("answers", "options", "right"),
    [
        (["A, C"], PETS, ("A, C",)),
        (["B", "dog"], PETS, ("B",)),
        (["A", "B"], PETS, ("A", "B")),
        ([r"\boxed{B}"], PETS, ("B",)),
        (["0.5"], ["1", r"\frac{1}{2}"], ("B",)),
        (["Q"], ["P", "Q", "R"], ("B",)),
        (["x"], ["y", "x"], ("B",)),
        (["B"], ["A", "B", "C"], ("B",)),
        (["2"], ["1", "2", "3"], ("B",)),  # an answer is no index
    ],
)
def test_right_options(answers: list[str], options: list[str], right: tuple[str, ...]) -> None:
    assert right_options(answers, options) == right


def test_an_answer_that_may_be_two_options_is_a_problem() -> None:
    with pytest.raises(RowError, match="the letter of one option and the text of another"):
        right_options(["A"], ["B", "A"])
    assert right_options(["A"], ["B", "A"], by_letter=True) == ("A",)  # the format says so
    with pytest.raises(RowError, match="'3' is the text of 2 of the 3 options"):
        right_options(["3"], ["3", "4", "3"])


@pytest.mark.parametrize("source", ["pixel_reasoner", "math_jsonl", "geometry3k", "vlmevalkit"])
@pytest.mark.parametrize("label", [1, 1.0, "1", "B"])
def test_the_hubs_label_counts_options_from_0(tmp_path: Path, source: str, label: Any) -> None:
    row = {"question": "Which?", "label": label, "choices": PETS}
    assert one(tmp_path, source, row).answers == ("B",)
    assert one(tmp_path, source, {**row, "answer": "dog"}).answers == ("B",)
    told = refusal(tmp_path, source, {**row, "answer": "cat"})
    assert "the answer is option A, but the column 'label' says" in told
    assert "the label 3 is none of 0 to 2" in refusal(tmp_path, source, {**row, "label": 3})
    answer = "no answer" if source != "math_jsonl" else "neither answer nor final_answer"
    assert "'²' is neither" in refusal(tmp_path, source, {**row, "label": "²"})
    for nothing in ({"label": -1}, {"choices": []}):
        assert answer in refusal(tmp_path, source, {**row, **nothing})


def test_a_label_that_is_no_option_leaves_the_solution_alone(tmp_path: Path) -> None:
    row = {"problem": "1 + 1?", "label": "algebra", "solution": r"\boxed{2}"}
    assert one(tmp_path, "math_jsonl", row).answers == ("2",)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        ("['3', 'three']", ("3", "three")),
        ('["3", "three"]', ("3", "three")),
        ('["3", 3.5]', ("3", "3.5")),
        ("[1, 2]", ("[1, 2]",)),
        ("[0, 1)", ("[0, 1)",)),
        ("{'a', 'b'}", ("{'a', 'b'}",)),
        ("[]", ("[]",)),
        ("[x, y]", ("[x, y]",)),
        (["3", "three"], ("3", "three")),
        (3.0, ("3",)),
        (2.5, ("2.5",)),
        (1e300, ("1e+300",)),
        (True, ("True",)),
        ('["a", null]', ("a",)),
        ('["a", true, 2.0]', ("a", "True", "2")),
        ("<answer> B </answer>", ("B",)),
        ("<think>3 < 4</think>\n<answer>4</answer>\n", ("4",)),
        (["<answer>3</answer>", "three"], ("3", "three")),
        ('{"answer": "B"}', ("B",)),
        ("{'answer': 3.0}", ("3",)),
        ("{}", ("{}",)),
    ],
)
def test_several_acceptable_answers(
    tmp_path: Path, source: str, answer: Any, answers: tuple[str, ...]
) -> None:
    assert one(tmp_path, source, {"question": "How many?", "answer": answer}).answers == answers


def test_olympiadbenchs_final_answer_is_one_of_several_parts(tmp_path: Path) -> None:
    for value in (["1", "2"], "['1', '2']"):
        row = {"question": "Which two?", "answer": None, "final_answer": value}
        assert one(tmp_path, "math_jsonl", row).answers == ("1, 2",)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("answer", [None, float("nan"), "", [], {"text": "3"}])
def test_no_answer(tmp_path: Path, source: str, answer: Any) -> None:
    told = refusal(tmp_path, source, {"question": "How many?", "answer": answer})
    wanted = "got dict" if isinstance(answer, dict) else "no answer"
    assert wanted in told


@pytest.mark.parametrize(
    "value", ["[null]", "<answer> </answer>", '{"answer": null}', '{"result": "B"}']
)
def test_texts_that_hold_no_answer(value: str) -> None:
    with pytest.raises(RowError) as caught:
        acceptable_answers(value)
    assert caught.value.kind == "no answer"


def test_a_list_as_numpy_prints_it_is_not_read_as_one_text() -> None:
    with pytest.raises(RowError, match="texts without a comma"):
        acceptable_answers("['3' 'three']")


# Real layouts


@pytest.mark.parametrize("more", [{}, {"options": ["red", "blue"]}])
def test_pixel_reasoners_questions_list_their_options(tmp_path: Path, more: Any) -> None:
    question = (
        "What is the color of the flag?\nchoices:\n\nA: red\nB: blue\n\n\nAnswer the question "
        "based on the options provided. You must include your final answer in \\boxed{A} form."
    )
    row = {"qid": "q", "question": question, "answer": ["B"], "is_video": False, **more}
    task = one(tmp_path, "pixel_reasoner", row)
    assert (task.question, task.answers) == (question, ("B",))


def test_intergps_rows_stay_free_form_and_others_show_their_choices(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "1.png")
    benchmark = Benchmark("mine", "parquet_pictures", path=str(tmp_path / "rows.json"))
    row = {"choices": ["30", "40"], "answer": "B", "image": "1.png"}
    for name, answers in (("problem_text", ("40",)), ("problem", ("B",))):
        (tmp_path / "rows.json").write_text(json.dumps([{name: "Find x.", **row}]))
        task = load_benchmark(benchmark).tasks[0]
        assert task.answers == answers
        assert ("(B) 40" in task.question) == (name == "problem")


def test_vlmevalkits_tsv_is_a_training_source(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(data, "PNG")
    rows = [
        {"index": 7, "image": base64.b64encode(data.getvalue()).decode(), "question": "Which?",
         "hint": "Look.", "A": "cat", "B": "dog", "answer": "B"},
        {"index": 8, "image": "7", "question": "How many?", "hint": "", "A": "", "B": "",
         "answer": "['3', 'three']"},
    ]  # fmt: skip
    with (tmp_path / "Mine.tsv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    choice, count = list(load_tasks({"source": "vlmevalkit", "path": str(tmp_path / "Mine.tsv")}))
    assert choice.question == "Hint: Look.\nWhich?\nOptions:\n(A) cat\n(B) dog"
    assert (choice.id, choice.answers, choice.metadata["answer_kind"]) == ("7", ("B",), "option")
    assert (count.id, count.answers) == ("8", ("3", "three"))
    assert [task.images[0].open().size for task in (choice, count)] == [(30, 30)] * 2


def tsv(folder: Path, *rows: dict[str, str]) -> dict[str, str]:
    with (folder / "Mine.tsv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return {"source": "vlmevalkit", "path": str(folder / "Mine.tsv")}


@pytest.mark.parametrize(
    ("texts", "answer", "options"),
    [
        (["3", "4", "nan", "NaN"], "B", ["3", "4"]),
        (["3", "4", "None", "null"], "B", ["3", "4"]),
        (["nan", "nan", "nan", "nan"], "4", None),
        (["3", "None", "4", ""], "B", ["3", "None", "4"]),
        (["3", "4", "5", "None of the above"], "B", ["3", "4", "5", "None of the above"]),
        (["3", "4", "5", "None"], "D", ["3", "4", "5", "None"]),  # the answer says so
        (["all", "None", "", ""], "A", ["all", "None"]),
    ],
)
def test_words_for_nothing_in_tsv_rows(
    tmp_path: Path, texts: list[str], answer: str, options: list[str] | None
) -> None:
    row = {"index": "1", "question": "Which?", "hint": "nan", "answer": answer}
    spec = tsv(tmp_path, {**row, **dict(zip("ABCD", texts, strict=True))})
    (task,) = list(load_tasks(spec))
    assert task.metadata.get("options") == options
    assert task.question.startswith("Which?")


@pytest.mark.parametrize("word", ["nan", "None", "NULL"])
def test_a_word_for_nothing_is_no_question_in_tsv_rows(tmp_path: Path, word: str) -> None:
    spec = tsv(tmp_path, {"index": "1", "question": word, "answer": "4"})
    with pytest.raises(BadRowsError, match="no question"):
        load_tasks(spec)


def test_the_last_option_none_stays_in_other_files(tmp_path: Path) -> None:
    pets = ["cat", "dog", "None"]
    for columns in ({"options": pets}, dict(zip("ABC", pets, strict=True))):
        row = {"question": "Which?", "answer": "B", **columns}
        assert one(tmp_path, "vlmevalkit", row).metadata["options"] == pets


@pytest.mark.parametrize("source", SOURCES)
def test_letters_as_answers_without_options_are_told_once(
    tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = one(tmp_path, source, {"question": "Which pet?", "answer": "B", "pets": PETS})
    assert task.answers == ("B",)
    (told,) = [each.getMessage() for each in caplog.records if "no options" in each.getMessage()]
    assert told.startswith("1 of 1 rows of ")
    assert "put them into one column 'options', as a list" in told


@pytest.mark.parametrize(
    ("question", "answer", "columns"),
    [
        ("Which pet?", "B", {"options": PETS}),
        ("Which pet? (A) cat (B) dog", "B", {}),
        ("Which pet? a) cat b) dog", "B", {}),
        ("Which of the options A to D?", "B", {}),
        ("Is the vitamin C or K?", "C", {}),
        ("Which pet?", "dog", {}),
        ("Which variable?", "x", {}),
    ],
)
def test_other_answers_are_not_told(
    tmp_path: Path, question: str, answer: str, columns: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one(tmp_path, "pixel_reasoner", {"question": question, "answer": answer, **columns})
    assert "no options" not in caplog.text


def test_options_survive_an_export_to_verl(tmp_path: Path) -> None:
    task = one(tmp_path, "math_jsonl", {"question": "Which?", "answer": "B", "options": PETS})
    plain = Task("t", "1 + 1?", ("2",))
    write_verl([plain, task], tmp_path / "out" / "rows.parquet", split="train")
    source = {"source": "verl", "path": str(tmp_path / "out" / "rows.parquet")}
    first, second = list(load_tasks(source))
    assert (first.question, "options" in first.metadata) == ("1 + 1?", False)
    assert (second.question, second.answers) == (task.question, task.answers)
    assert second.metadata["options"] == PETS
    write_verl([plain], tmp_path / "plain" / "rows.parquet", split="train")
    assert "options" not in pq.read_table(tmp_path / "plain" / "rows.parquet").column_names


def test_options_of_a_struct_column(tmp_path: Path) -> None:
    rows = [
        {"question": "Which?", "answer": "B", "options": {"A": "cat", "B": "dog", "C": None}},
        {"question": "Which?", "answer": "no", "options": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tasks = list(load_tasks({"source": "pixel_reasoner", "path": str(tmp_path / "rows.parquet")}))
    assert [task.metadata.get("options") for task in tasks] == [["cat", "dog"], None]


@pytest.mark.parametrize("name", ["SingleTurn", "PixelReasoner"])
@pytest.mark.parametrize(
    ("response", "reward"),
    [("B", 1), ("dog", 1), ("(B) dog", 1), ("A", 0), ("cat", 0), ("B. cat", 0), ("horse", 0)],
)
def test_training_rewards_the_letter_and_the_text(
    tmp_path: Path, name: str, response: str, reward: float
) -> None:
    task = one(tmp_path, "pixel_reasoner", {"question": "Q?", "answer": "dog", "options": PETS})
    env = gymnasium.make(f"reopold/{name}-v0", data={"train": [task]})
    env.reset(options={"split": "train", "index": 0})
    assert env.step(f"So it is \\boxed{{{response}}}.")[1] == reward
    env.close()


@pytest.mark.parametrize(("response", "right"), [("Q", True), ("B", True), ("P", False)])
def test_a_letter_that_is_no_label_is_an_options_text(response: str, right: bool) -> None:
    options = ["P", "Q", "R", "S"]
    assert grade(f"\\boxed{{{response}}}", "B", "option", options=options).correct == right


def test_vlmevalkits_columns_are_options_and_its_answers_letters(tmp_path: Path) -> None:
    row = {"question": "Which?", "A": "B", "B": "A", "answer": "A"}
    assert one(tmp_path, "vlmevalkit", row).answers == ("A",)
    told = refusal(tmp_path, "vlmevalkit", {**row, "A": "3", "B": "4", "answer": "12"})
    assert "'12' is neither the letter nor the text of one of 2 options" in told
