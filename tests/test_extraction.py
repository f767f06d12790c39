"""Answers in the forms of real responses: options, yes or no, counts, texts, cues of an answer."""
# ruff: noqa: E501, RUF001  # tables, with letters and punctuation of other scripts

from __future__ import annotations

import pytest
from real_data import real_data

from reopold_agent.judge.agreement import by_kind, compare, count, read_cases
from reopold_agent.judges import grade
from reopold_agent.judges.rules import reference_problem

COLOURS = ["red", "blue", "green", "black"]
LENGTHS = ["12", "15", "18", "20"]
EXPRESSIONS = ["$\\frac{20}{3}$", "$\\frac{10}{3}$", "$5$", "$\\sqrt{2}$"]

BOXED_B = """
B ; (B) ; \\text{B} ; \\textbf{(B)} ; \\mathrm{B} ; \\mathcal{B} ; [B] ; \\{B\\} ; b ; (b) ; b. ; 'B' ; **B**
B) 12 ; B. 12 ; B: 12 ; B.12 ; B=12 ; B - 12 ; B → 12 ; B, 12 ; B (12) ; B 12 ; B\\ 12 ; B 145°
\\text{(B) }12 ; \\textbf{(B)}\\ \\frac{3}{4} ; \\text{(B) \\frac{20}{3}} ; \\text{B. } 12 \\text{ cm} ; (B)\\, 12
Option B ; \\text{option (B)} ; Option B: 12 ; \\text{Choice B} ; The answer is B ; B is correct ; Answer: B
选项B ; 选B ; （B） ; Ｂ ; B：12 ; B、12 ; B。
"""
FREE_B = """
B ; B. ; (B) ; **B.** 12 ; (B) 12 is correct. ; Answer: **B** ; **Answer: (B) 12** ; Ans: B ; ANSWER: B
The answer is (B). ; The answer is option B. ; The correct answer is **B. 12** ; The answer should be B.
Therefore (B) is the correct answer. ; Hence, option B is correct. ; **B** is the correct answer. ; So B.
I would choose option B. ; I'd go with B. ; We select B. ; I think it's (B). ; which matches choice (B).
The answer is B because there are 3 cars. ; The best answer is B, since A is too long. ; Answer: (B) 5 of 7
The answer: B, it cannot be A or C. ; It's not A, therefore I think it's B ; B, not A ; B不是 A
Option A: no. Option C: no.~~The correct answer is **B**. ; ### Answer~B ; ### Final Answer~~**B**
B~~Because the car is at the left. ; The answer is B. Option A is wrong. ; The answer is b.
<answer>(B) 12</answer> ; {"answer": "B"} ; ```json~{"why": "A or B", "answer": "B"}~``` ; {'choice': 'B'}
答案：B ; 答案是（B） ; 正确答案为：B。 ; 故选B ; 因此选B ; 所以答案是选项B ; 答えはBです。 ; 正解：B ; 정답은 B입니다.
Réponse : B ; La bonne réponse est la B. ; La respuesta correcta es la B. ; Die richtige Antwort ist B.
A resposta correta é a B. ; La risposta è B ; Правильный ответ: B ; الإجابة الصحيحة هي B ; Jawabannya adalah B
B for sure ; Definitely B! ; Not A but B ; It's option B, not option C. ; Answer: B~~A is smaller than C.
The correct answer is~~$$\\boxed{B}$$ ; **Answer: \\boxed{B}** ; \\boxed{B} (15) ; The correct answer is $\\textbf{(B)}$.
选项 B 正确 ; 所以选项B正确。 ; 综上所述，答案为B。 ; 故答案为：B ; 我选择B ; (B)가 정답입니다 ; Bが正解です ; La opción B es correcta.
A resposta é a letra B. ; Верный ответ: B ; सही उत्तर B है ; Rätt svar är B ; Správná odpověď je B ; Răspunsul corect este B
I would say the answer is B ; I’d say the answer is B. ; B would be my answer. ; I would answer B. ; I'd respond with B.
The right answer is the second option, B. ; We can say that the answer is B.
Đáp án là B ; उत्तर: B ; คำตอบคือ B ; Odpowiedź: B ; Het antwoord is B
"""


def cells(table: str) -> list[str]:
    """The cells of a table, separated by semicolons between spaces; "~" is a line end."""
    lines = [cell for line in table.strip().splitlines() for cell in line.split(" ; ")]
    return [cell.replace("~", "\n").strip() for cell in lines]


OPTION_B = [f"\\boxed{{{cell}}}" for cell in cells(BOXED_B)] + cells(FREE_B)


@pytest.mark.parametrize("kind", ["option", "auto"])
@pytest.mark.parametrize("response", OPTION_B)
def test_an_option_in_any_form_is_its_letter(response: str, kind: str) -> None:
    verdict = grade(response, "B", kind)
    assert verdict.correct, verdict
    other = grade(response, "D", kind)
    assert not other.correct
    assert not other.undecided, other


@pytest.mark.parametrize(
    ("response", "gold", "options"),
    [
        ("\\boxed{15}", "B", LENGTHS),
        ("\\boxed{15 \\text{ cm}}", "B", LENGTHS),
        ("\\boxed{B. 15}", "B", LENGTHS),
        ("The answer is 15.", "B", LENGTHS),
        ("\\boxed{20/3}", "A", EXPRESSIONS),
        ("\\boxed{\\dfrac{20}{3}}", "A", EXPRESSIONS),
        ("\\boxed{2^{1/2}}", "D", EXPRESSIONS),
        ("\\boxed{\\text{The color is blue}}", "B", COLOURS),
        ("The car is blue.", "B", COLOURS),
        ("(B) blue", "B", COLOURS),
        ("No, the line isn't longer.", "B", ["Yes", "No"]),
        ("Yes.\nThe left one is longer.", "A", ["Yes", "No"]),
        ("A blue car", "B", ["a red car", "a blue car"]),
        ("A red car", "A", ["a red car", "a blue car"]),
        ("The colour is dark red.", "C", ["red", "blue", "dark red"]),
        ("\\boxed{3000, 4000}", "C", ["4000, 3000", "1", "3000, 4000"]),
        ("\\boxed{None of these}", "B", ["5", "none of these"]),
        ("\\boxed{AC}", "A, C", None),
        ("\\boxed{C, A}", "AC", None),
        ("The answers are A and C.", "AC", None),
        ("答案：A、C", "AC", None),
        ("\\boxed{A}", "(A) Yes", None),
        ("Yes", "(A) Yes", None),
        ("\\boxed{B}", "B. 12", None),
        ("\\boxed{12}", "B. 12", None),
    ],
)
def test_the_value_of_an_option_is_its_letter(
    response: str, gold: str, options: list[str] | None
) -> None:
    verdict = grade(response, gold, "option", options=options)
    assert verdict.correct, verdict


@pytest.mark.parametrize(
    ("response", "options"),
    [
        ("\\boxed{B. 12}", LENGTHS),  # the text of A
        ("The correct answer is (B) 12.", LENGTHS),
        ("The answer is B. 12", LENGTHS),
        ("\\boxed{17}", LENGTHS),
        ("\\boxed{12}", None),
        ("The answer is A or B.", None),
        ("It could be B.", None),
        ("I am not sure, maybe B", None),
        ("B is incorrect.", None),
        ("Option B is wrong.", None),
        ("The answer is not B.", None),
        ("B would not be my answer.", None),
        ("They would say the answer is B.", None),
        ("I would not say the answer is B.", None),
        ("A bus", None),
        ("The answer is a bus.", None),
        ("The boxes are labelled A, B and C.", None),
        ("In the triangle ABC we have AB = 5", None),
        ("Therefore the length of BC is 5 cm, so point P lies on the circle.", None),
        ("It is high in vitamin C.", None),
        ("So the shop is on level D.", None),
        ("Hence the ratio of A to B is 2.", None),
        ("The dog is next to building C.", None),
        ("None of the above", COLOURS),
        ("The car is not blue.", COLOURS),
        ("It is red or blue.", COLOURS),
    ],
)
def test_a_response_that_names_no_option_is_undecided(
    response: str, options: list[str] | None
) -> None:
    verdict = grade(response, "B", "option", options=options)
    assert (verdict.correct, verdict.undecided) == (False, True), verdict
    assert verdict.reason


NUMBERS = ["3", "4", "5", "No correct answer"]
REJECTED = """
Therefore, B cannot be the answer. ; So B is impossible. ; Thus B fails. ; The wrong answer is B. ; The incorrect option is B
The answer is unlikely to be B ; I'm not sure the answer is B ; B won't work. ; So B is out. ; Thus B is eliminated.
Therefore, (B) cannot be the answer. ; So option B must be wrong. ; Thus B contradicts the premise. ; So B is a trap.
I don't think it's B. ; I wouldn't choose B. ; It would be wrong to choose B. ; B is never correct. ; B might be correct.
A and B are wrong. ; A, B and C are wrong. ; Options A and B are wrong. ; (A) and (B) are impossible. ; A or B is right.
If B is correct, then x=1. ; If the answer is B then x = 1. ; Suppose the answer is B. ; B would be correct if x = 4.
The answer would be B if x were 4. ; The answer is neither A nor B. ; So we reject B. ; I doubt B. ; B: wrong
So B is incorrect because x = 4. ; If B were correct, x = 4. ; The wrong one is B. ; All but B are right. ; Is it B?
The student chose B. ; Tom says the answer is B. ; So B leads to a contradiction. ; The answer won't be B. ; B got eliminated.
The least likely answer is B. ; The option that is incorrect is B. ; It's unlikely that the answer is B.
"""
CHOSEN = """
If A is correct then x=1. But x=2. So B. ; A and C are wrong, so the answer is B. ; A and C are wrong. B is right.
So B must be correct. ; The answer is B, not A. ; A cannot be the answer. B is correct. ; Since A fails, it must be B.
Therefore, C cannot be the answer, so B. ; Suppose A is correct. Then x=1, a contradiction. So B. ; B is clearly correct.
Because A is impossible, the answer is B. ; The wrong answers are A and C. The answer is B. ; B is true, A is false.
Thus B is right. ; The answer is B because the others are impossible. ; Not A, but B. ; B, because A fails.
"""


@pytest.mark.parametrize("response", cells(REJECTED))
def test_a_rejected_option_is_not_chosen(response: str) -> None:
    for letter in "ABC":
        verdict = grade(response, letter, "option", options=NUMBERS)
        assert (verdict.correct, verdict.undecided) == (False, True), verdict


@pytest.mark.parametrize("response", cells(CHOSEN))
def test_an_option_beside_rejected_ones(response: str) -> None:
    for letter in "ABCD":
        verdict = grade(response, letter, "option", options=NUMBERS)
        assert (verdict.correct, verdict.undecided) == (letter == "B", False), verdict


def test_options_that_differ_are_wrong() -> None:
    assert not grade("\\boxed{12}", "B", "option", options=LENGTHS).undecided
    assert not grade("\\boxed{AB}", "A", "option").correct
    assert not grade("\\boxed{A}", "A, C").correct
    assert not grade("\\boxed{A. Johnson}", "A. Lincoln").correct
    assert not grade("\\boxed{B. Lincoln}", "A. Lincoln").correct


YES = """
Yes ; yes. ; **Yes** ; Yes, it is. ; Yep ; Yeah ; Sure ; True ; Correct. ; The answer is yes. ; Answer: Yes
So the answer is yes. ; Therefore, yes. ; Is it longer? Yes. ; Based on the picture, yes. ; {"answer": true}
Yes.~~The left line is longer. ; \\boxed{\\text{Yes, they are}} ; \\boxed{True} ; 是 ; 是的，一样长。 ; 答案：是
Of course! ; Indeed. ; It is. ; It does. ; They are. ; I think so. ; The statement is true. ; Absolutely
Oui ; Sí ; Ja ; Да ; はい ; 네 ; <answer>yes</answer>
Yes, there is no car. ; **Yes**, there is no difference. ; Final answer: Yes, there is no cat. ; Yes - there is no car
<answer>Yes, there is no cat</answer> ; \\boxed{\\text{Yes, there is no cat}} ; {"answer": "Yes, there is no cat"}
#### Yes, there is no cat ; Answer: Yes, not a single car is there. ; \\boxed{Yes, no car} ; Yes, that is not wrong.
So yes, there is no cat. ; Definitely yes. ; The answer is yes, there is no cat. ; **Answer:** Yes, there is no cat. ; True, there is no cat. ; Yes; nobody is there
Oui, il n'y a pas de chat. ; There is no doubt about it: yes.
"""
NO = """
No ; no. ; **No** ; No, it is not. ; Nope ; False ; Incorrect. ; Not really. ; Not exactly. ; It is not.
They aren't. ; That is not correct. ; Is it longer? No. ; The answer is **no**. ; {"answer": false}
Definitely not. ; Of course not. ; I don't think so. ; There is not. ; The statement is false. ; No way
No, there is no dog; there is a cat. ; \\boxed{\\text{No, they are not}} ; 否 ; 不 ; 不是 ; 没有 ; Non ; Nein
Нет ; いいえ ; 아니요 ; Não ; \\boxed{不对} ; No, there is no image of a dog. ; No, it is true that there is a dog.
No, the right line is longer. ; {"answer": "No, the right line is longer"} ; Correct answer: no ; I would say no.
"""


@pytest.mark.parametrize(
    ("response", "said"),
    [(cell, "yes") for cell in cells(YES)] + [(cell, "no") for cell in cells(NO)],
)
def test_yes_and_no(response: str, said: str) -> None:
    assert grade(response, said, "yes_no").correct
    other = grade(response, "no" if said == "yes" else "yes", "yes_no")
    assert (other.correct, other.undecided) == (False, False), other


@pytest.mark.parametrize(
    "response",
    ["The answer is almost yes", "The opposite of yes", "If so, yes", "It is too early to say yes", "certainly not no",
     "The answer is far from yes", "It would be wrong to say yes.", "This is never true.", "No one can say yes.",
     "It would be incorrect to say no.", "I would not say yes.", "The answer is hardly yes.", "The answer isn't yes.",
     "anything but yes", "I disagree with yes", "The wrong answer is yes.", "It's not necessarily yes.", "Right line",
     "I doubt that the answer is yes.", "It is rarely true.", "It isn't false", "Yes, no.", "If the answer is yes",
     "Not yes", "Yes/No", "yes no", "\\boxed{Yes/No}", "Yes and no", "Yes or no", "yes? no?", "Maybe yes", "I cannot determine, no.",
     "It depends", "The lines are equally long.", "\\boxed{}"],
)  # fmt: skip
def test_neither_yes_nor_no(response: str) -> None:
    for gold in ("yes", "no"):
        verdict = grade(response, gold, "yes_no")
        assert (verdict.correct, verdict.undecided) == (False, True), verdict


REFUSALS = """
No image was provided. ; There is no image. ; I have no idea. ; No information is given. ; \\boxed{no answer} ; No answer
No idea ; I see no image ; There is no way to tell. ; none of the above ; No picture is attached. ; No clue. ; N/A
There isn't an image. ; I cannot see any picture. ; No file was uploaded. ; Nothing was provided. ; keine Antwort
{"answer": "no answer"} ; \\boxed{\\text{No image was provided}} ; No visual information is available. ; No such image
<answer>no answer</answer> ; The answer is no image ; No parcel was sent. ; There is no telling. ; no comment ; No solution
"""


@pytest.mark.parametrize("response", cells(REFUSALS))
def test_a_refusal_is_neither_no_nor_none(response: str) -> None:
    for gold, kind in (("no", "yes_no"), ("yes", "yes_no"), ("0", "count"), ("1", "count")):
        verdict = grade(response, gold, kind)
        assert (verdict.correct, verdict.undecided) == (False, True), verdict
    for letter in "AB":
        assert grade(response, letter, "option", options=["Yes", "No"]).undecided


SCALES = """
There are 3 hundred people. | 300 ; There are 2 dozen eggs. | 24 ; There are 5 million people | 5000000
There are three hundred people. | 300 ; There are twenty-three dogs. | 23 ; There are a hundred people. | 100
There are one hundred and twenty people. | 120 ; There are 2.5 million people. | 2500000 ; \\boxed{2 dozen eggs} | 24
a total of 3 hundred people | 300 ; 3 hundred people are there in total. | 300 ; 2 dozen eggs altogether | 24
Two dozen eggs are in the box. | 24 ; The number of people is three hundred. | 300 ; Thus 2 dozen eggs are left. | 24
There are **3 hundred** people. | 300 ; There are five thousand two hundred people. | 5200 ; There are 2 lakh people. | 200000
There are half a dozen eggs. | 6 ; The answer is 3 hundred. | 300 ; There are 2 dozen eggs: 12 white and 12 brown. | 24
"""


@pytest.mark.parametrize(("response", "gold"), [c.split(" | ") for c in cells(SCALES)])
def test_counts_keep_their_scales(response: str, gold: str) -> None:
    assert grade(response, gold, "count").correct
    for other in {"1", "2", "3", "5", "12", "20", "2.5", "100"} - {gold}:
        assert not grade(response, other, "count").correct
    verdict = grade(response, gold, "number")
    assert verdict.correct or verdict.undecided


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("3", "three"),
        ("3", "\\boxed{three (3)}"),
        ("3", "\\boxed{\\text{There are three dogs}}"),
        ("3", "There are three dogs."),
        ("3", "There are **three** dogs."),
        ("3", "I can see three dogs in the picture."),
        ("3", "There are 3 dogs: 2 on the left and 1 on the right."),
        ("3", "There are three dogs, one of them black."),
        ("3", "The number of dogs is three."),
        ("3", "图中有3只狗。"),
        ("3", "一共有3只。"),
        ("3", "개는 3마리입니다."),
        ("3", "犬は3匹です。"),
        ("3", "Il y a 3 chiens."),
        ("3", "Es gibt 3 Hunde."),
        ("0", "There are no dogs."),
        ("0", "There is no dog in the picture."),
        ("0", "There aren't any dogs."),
        ("0", "none"),
        ("0", "Nobody"),
        ("1", "There is one dog."),
        ("1", "There is a single dog."),
        ("2", "There are two people, one on the left and one on the right."),
        ("2", "\\boxed{a couple}"),
        ("12", "a dozen"),
        ("24", "two dozen"),
        ("6", "half a dozen"),
        ("3", "Only three."),
        ("3", "There appear to be three dogs."),
        ("3", "Three dogs are visible in the image."),
        ("3", "There are three dogs: one brown, one black, and one white."),
        ("0", "None of them."),
    ],
)
def test_counts(gold: str, response: str) -> None:
    verdict = grade(response, gold, "count")
    assert verdict.correct, verdict
    assert not grade(response, "5", "count").correct


@pytest.mark.parametrize(
    "response",
    ["\\boxed{at least 3}", "\\boxed{3+}", "There are at least 3 dogs.", "three or four", "There are 3 dogs and 2 cats.",
     "There are three-legged dogs.", "There are 3 hundred and fifty dogs.", "There are 3 or 4 hundred dogs.", "There are 3+ dogs.", "There are 3-4 dogs.", "There are 3 and a half dozen dogs.",
     "There are two or 3 dogs.", "three four", "\\boxed{three to four}", "There are 3 hundred and 4 thousand dogs.",
     "There are three dogs, two cats and a bird.", "3 or 4", "Maybe 3", "several", "I see a dog.",
     "There are three dogs on the left. On the right there are two."],
)  # fmt: skip
def test_no_certain_count(response: str) -> None:
    assert not grade(response, "3", "count").correct
    assert not grade("There are three dogs. So the answer is five.", "3", "count").correct


@pytest.mark.parametrize(
    "response", ["zero or one", "no or one dog", "no dogs or one dog", "0 or 1", "No, there are 3"]
)
def test_an_uncertain_zero(response: str) -> None:
    for form in (response, f"\\boxed{{{response}}}", f"There are {response}."):
        assert not grade(form, "0", "count").correct
    assert grade("\\boxed{zero or one}", "0", "count").undecided


SAME_TEXT = """
1000 | 1,000 ; 1,000 | 1000 ; 40 | 40 years ; 40 years | 40 ; 2.5 | 2.50 ; 2.50 | 2.5 ; 3 | three
5 million | 5,000,000 ; $5 million | 5 million ; 40% | 40 percent ; 40% | 40\\% ; 40% | 40 \\text{ percent}
facebook, twitter | Facebook and Twitter ; facebook, twitter | Twitter & Facebook ; e-mail | email
5 million | 5M ; $3B | $3 billion ; 5k | 5,000 ; facebook, twitter | Twitter/Facebook ; 10:00 am | 10 AM
3 times | three ; 2010 | in 2010 ; at&t | AT\\&T ; #metoo | \\#MeToo ; facebook, twitter | [Facebook, Twitter]
U.S. | US ; 25-34 | 25 to 34 ; 25-34 | 25 – 34 ; don't know | don’t know ; the iphone | \\text{iPhone}
hello world | Hello, world! ; women | \\textbf{Women} ; café | Café
"""
OTHER_TEXT = """
1000 | 100 ; 1000 | 1,001 ; 40 years | 40 days ; facebook, twitter | facebook ; iphone | samsung
1.5 m | 15 m ; 25-34 | 2534 ; 25-34 | 25 ; iphone | iphone 5 ; c++ | C ; 5 million | 5 ; 10:00 am | 10 pm ; 0.5 | 1/2
"""


def pairs(table: str) -> list[tuple[str, str]]:
    return [(gold, answer) for gold, answer in (cell.split(" | ") for cell in cells(table))]


@pytest.mark.parametrize(("gold", "answer"), pairs(SAME_TEXT))
def test_same_short_text(gold: str, answer: str) -> None:
    verdict = grade(f"\\boxed{{{answer}}}", gold, "text")
    assert verdict.correct, verdict


@pytest.mark.parametrize(("gold", "answer"), pairs(OTHER_TEXT))
def test_other_short_text(gold: str, answer: str) -> None:
    verdict = grade(f"\\boxed{{{answer}}}", gold, "text")
    assert (verdict.correct, verdict.undecided) == (False, False), verdict


TWELVE = """
12 ; 12. ; #### 12 ; 5 + 7 = 12 apples.~#### 12 ; He buys 5, then 7 more. #### 12 ; 5 * 2 = 10 #### $12 ; 5####12 ; ### Answer~12 ; ## Final Answer~~12 ; **Answer**~~12
**Answer:** 12 ; **Answer**: 12 ; **Final Answer:** $12$ ; Answer:~~12 ; A: 12 ; Ans. 12 ; Ans = 12
Result: 12 ; The final result is 12. ; The answer is 12 because 20-8=12. ; The answer is 12 (see above).
<answer>12</answer> ; {"answer": 12} ; {"answer": "12"} ; ```json~{"answer": 12}~``` ; {'answer': '12'}
```json~{"steps": ["5+7", "=12"], "final_answer": "12"}~``` ; Here it is:~{"Answer": 12} ; ```~12~```
答案是12 ; 答案：12 ; 答案为12。 ; 因此答案是12。 ; 所以答案是 $12$。 ; 答：一共有12个苹果。 ; 所以一共有12个苹果。
答えは12です。 ; よって、答えは12である。 ; 정답은 12입니다. ; 따라서 답은 12이다. ; Réponse : 12 ; La réponse est 12.
Donc, il a 12 pommes. ; La respuesta es 12. ; Por lo tanto, tiene 12 manzanas. ; Die Antwort ist 12.
Daher sind es 12. ; A resposta é 12. ; Portanto, são 12 maçãs. ; La risposta è 12. ; Quindi sono 12 mele.
Ответ: 12 ; Следовательно, у него 12 яблок. ; الإجابة هي 12 ; لذلك، لديه 12 تفاحة. ; Jawaban: 12 ; Cevap: 12
Đáp án: 12 ; उत्तर 12 है। ; คำตอบคือ 12 ; Odpowiedź: 12 ; Svar: 12 ; Antwoord: 12
Hence it is 12.~~Let me know if you have any questions! ; So it is 12.~~I hope this helps!
Primero, 5 * 3 = 15. Por lo tanto, Juan tiene 12 manzanas en total. ; Also hat er insgesamt 12 Äpfel.
Сначала 5 * 3 = 15. Таким образом, осталось 12 яблок. ; まず5×3=15です。したがって、合計で12個です。 ; पहले 5 * 3 = 15। इसलिए, कुल 12 सेब हैं।
먼저 5 * 3 = 15입니다. 따라서 총 12개입니다. ; 5 * 3 = 15 ดังนั้น มี 12 ผล ; أولاً 5 * 3 = 15. لذلك، المجموع هو 12. ; 首先5*3=15。因此，他一共有12个苹果。
The sum comes to 12. ; The least common multiple is 12. ; The number of people who are not married is 12.
x is equal to 12. ; The distance from A to B is 12. ; The answer is 12 and not 13. ; Thus x equals 12.
I got 12 ; __12__ ; Our final answer is 12. ; 12元 ; 12 яблок ; = 12 ; So there are more than 5, and he has **12** apples. ; We get 5 + 7 = 12. ; 重量 = 60 / 5 = 12千克
"""


@pytest.mark.parametrize("kind", ["math", "auto", "number"])
@pytest.mark.parametrize("response", cells(TWELVE))
def test_cues_of_an_answer(response: str, kind: str) -> None:
    verdict = grade(response, "12", kind)
    assert verdict.correct, verdict
    if "=" not in response and "5" not in response:
        other = grade(response.replace("12", "15"), "12", kind)
        assert (other.correct, other.undecided) == (False, False), other


@pytest.mark.parametrize(
    "response",
    ["The answer is between 10 and 14.", "At least 12", "The answer is not 12.", "Step 12",
     "I have 12 apples and 3 pears.", "It may be 12.", "x is greater than 12", "答案不是12", "大概12个",
     "至少12个", "La respuesta no es 12.", "Es sind mindestens 12.", "Let me look at region 12 again.",
     "Question 12 asks for", "The first number is 12 and the second is 13", "Первый шаг: 12 и 13",
     "Thus the length is not equal to 12.", "So x is never equal to 12", "Therefore, the limit does not equal 12.",
     "The answer is greater than or equal to 12.", "The answer ranges from 3 to 12.", "The wrong answer is 12.",
     "Therefore the value is close to 12.", "So x cannot be equal to 12.", "The answer is far from 12.",
     "It would be wrong to say 12.", "I'm not sure the answer is 12.", "I don't think the answer is 12.",
     "The answer is unlikely to be 12.", "Hence x differs from 12.", "Thus x exceeds 12.", "The answer was supposed to be 12.",
     "If the answer is 12 then it is even.", "The answer is at least equal to 12.",
     "The answer is as large as 12.", "I doubt that the answer is 12.", "A common wrong answer is 12.",
     "It is not the case that the answer is 12.", "No one says that the answer is 12.", "The answer is a multiple of 12.",
     "The answer is the square of 12.", "The naive answer is 12.", "The answer is divisible by 12.", "So 12 is impossible.",
     "Therefore the value is next to 12.", "Some say the answer is 12.", "It is false that x is 12.", "So the statement x is 12 is false.", "The answer is anything but 12.",
     "She had 12 apples. She gave 3 away. Then she bought 5.", "<think> 12", "двенадцать",
     "\\boxed{doce manzanas rojas}"],
)  # fmt: skip
def test_what_is_not_understood_is_undecided(response: str) -> None:
    verdict = grade(response, "12", "math")
    assert (verdict.correct, verdict.undecided) == (False, True), verdict


def test_words_in_another_script_are_not_wrong() -> None:
    assert grade("\\boxed{苹果}", "apple", "text").undecided
    assert not grade("\\boxed{pear}", "apple", "text").undecided


@pytest.mark.parametrize(
    ("gold", "kind", "problem"),
    [
        ("The larger one is at the left of the tree", "option", "not an option"),
        ("The dog is black", "yes_no", "neither yes nor no"),
        ("several", "count", "not a number"),
        ("", "math", "empty"),
        ("None", "auto", "empty"),
        ("Because the angles at the base are equal", "math", "a sentence"),
        ("The sum of all the numbers is odd", "auto", "a sentence"),
    ],
)
def test_a_reference_out_of_contract_is_named(gold: str, kind: str, problem: str) -> None:
    assert problem in reference_problem(gold, kind)
    verdict = grade("\\boxed{7}", gold, kind)
    assert (verdict.correct, verdict.undecided) == (False, True)
    assert problem in verdict.reason


@pytest.mark.parametrize(
    ("gold", "kind"),
    [("B", "option"), ("(B) a car", "option"), ("yes", "yes_no"), ("3", "count"), ("none", "count"),
     ("a long text that may be a sentence", "text"), ("x^2 + 1", "math"), ("\\text{no solution}", "math"),
     ("12 square units", "math"), ("London", "auto")],
)  # fmt: skip
def test_a_reference_within_contract(gold: str, kind: str) -> None:
    assert reference_problem(gold, kind) == ""


def test_without_a_reference_nothing_is_decided() -> None:
    for answers in (None, [], [None], [""]):
        verdict = grade("\\boxed{7}", answers)  # type: ignore[arg-type]
        assert (verdict.correct, verdict.undecided) == (False, True), answers
        assert "reference" in verdict.reason


def test_the_reference_in_other_words_counts_as_a_whole() -> None:
    assert grade("The answer is 42", "answer is 42").correct
    assert grade("The sum of all the numbers is odd.", "The sum of all the numbers is odd").correct


# Real data


@pytest.mark.parametrize("kind", ["option", "yes_no", "count", "text"])
def test_agreement_with_pairs_from_the_field(kind: str) -> None:
    cases = read_cases(real_data("grader/field_cases.jsonl"))
    counts = count(compare(case for case in cases if case["kind"] == kind), by_kind)[kind]
    assert counts.pairs > 10
    assert counts.wrong == 0
    # "The two lines are the same length." is yes only to those who know the question.
    assert counts.undecided <= (kind == "yes_no")
