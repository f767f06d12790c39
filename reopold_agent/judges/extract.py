"""Finds the answer in a response: in a box, else in an unambiguous statement."""
# ruff: noqa: RUF001  # full-width punctuation is listed in order to replace it

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from reopold_agent.judges import counts, cues
from reopold_agent.judges.boxed import boxed_answer
from reopold_agent.judges.numbers import SCALE_WORD, parse_quantity
from reopold_agent.judges.text import latex_plain, undoubled

__all__ = ["Found", "closing", "final_part", "find_answer", "is_certain", "is_prose", "value_in"]

_THOUGHT_START, _THOUGHT_END = "<think>", "</think>"
_CHAT_MARK = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id)\|>")
_BOX_TOKENS = re.compile(r"<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.DOTALL)
"""The box of GLM's vision models."""

_TAG, _TAG_END = "<answer>", "</answer>"
_FENCE = re.compile(r"```[\w-]*\n(.*?)\n?```", re.DOTALL)
_FULL_WIDTH = str.maketrans(
    {
        "：": ":",
        "，": ",",
        "（": "(",
        "）": ")",
        "＝": "=",
        "．": ".",
        "。": ".\n",
        "！": "!\n",
        "？": "?\n",
    }
)

_OTHERWISE = re.compile(cues.OTHERWISE, re.IGNORECASE)
_POLITE = re.compile(r"\s*I hope (?:it|this) is correct\.?\s*$", re.IGNORECASE)
_CLOSING = re.compile(rf"[\s*_>#-]*(?:{cues.CLOSING})", re.IGNORECASE)
_MARKED = re.compile(
    r"(?:(?m:^)\s*####\s*(?=\S)|(?<!#)####\s*(?=[-+$£€(\\.]*\d|\\))(?!.*\banswer\b)",
    re.IGNORECASE,
)
"""The end of GSM8K's solutions, "#### 18": in a line of its own, or a value behind other words."""

_FIELD = re.compile(
    r"[\"'](?:\w+[_ -]?)?(?:answer|option|choice)[\"']\s*:\s*"
    r"(\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[-+]?[\d.,/]+|true|false|\[[^\[\]{}]*\])",
    re.IGNORECASE,
)
"""The answer's field in a JSON object, or in a Python dictionary."""

_ARROW = r"\s*(?:→|->|[-–—](?=\s+\(?[A-J]\b))"
_STATED = re.compile(
    rf"(?:\bfinal\s+(?:answer|result)\b(?:\s+is\b|{_ARROW})?|\banswer\b{_ARROW}"
    r"|\b(?:answer|option|choice)\s+is\b"
    r"|\banswers\s+are\b"
    r"|\banswer\b(?=\s*(?:\*\*)?\s*[:=])|\A\s*answer\b"
    r"|(?m:^)[\s#*_>-]*(?:the\s+)?(?:(?:final|correct)\s+)?(?:answer|result|solution)[\s*_]*:?[*_]*\s*(?m:$)"
    r"|(?m:^)[\s*_]*(?:ans(?:\s*[:.=])|(?:result|total)\s*[:=])"
    rf"|{cues.any_of(cues.ANSWER_IS)})[\s*:=]*",
    re.IGNORECASE,
)
_LETTER_CUE = re.compile(r"(?m:^)[\s*_]*A\s*:[\s*]*(?=\S)")
""" "A: 18", where A is short for "answer": not for a question with options."""

_CONCLUSION = re.compile(
    r"\b(?:therefore|thus|hence|so|consequently|in conclusion|we (?:find|get|have|conclude) that"
    rf"|this (?:gives|means))\b|{cues.any_of(cues.CONCLUSION)}",
    re.IGNORECASE,
)
_INTENT = re.compile(
    r"\W*(?:let me|let's|let us|i(?:'ll| will| need| want| should| am going)"
    r"|we (?:need|should|will)"
    r"|next|first|zoom|crop|look|if|unless|suppos(?:e|ing)|to (?:find|solve|answer|determine))\b",
    re.IGNORECASE,
)
"""Start of a sentence that says what will be done, not what was found."""

_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\\.)\s+(?=[A-Z\[(*$\\]|[^\W\da-zà-ÿа-я_])|\n+")
_COPULA = re.compile(
    r"(?:\b(?:is|are|was|(?:equal|comes|amounts|adds up|sums|simplifies|reduces|evaluates)\s+to"
    r"|equals?|be)\b|(?<![<>!=\\:])=|:(?=\s))\s*"
    r"(?:\s*\b(?:equal to|approximately|about|exactly|simply)\b)?\s*:?\s*",
    re.IGNORECASE,
)
_ONES = "one|two|three|four|five|six|seven|eight|nine"
_BELOW_HUNDRED = (
    rf"(?:(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(?:[\s-]+(?:{_ONES})\b(?!-))?"
    rf"|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|{_ONES})"
)
_NEGATED = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|hardly|than|least|most|un\w+)|n't)\s+"
    r"(?:\w+\s+){0,2}\Z",
    re.IGNORECASE,
)
""" "Not" or "than" shortly before "be" or "equal to": "does not equal", "greater than or equal"."""

_INFINITIVE = (
    "be",
    "equal",
    "comes",
    "amounts",
    "adds",
    "sums",
    "simplifies",
    "reduces",
    "evaluates",
)
_ALTERNATIVE = re.compile(
    r"\bor\s+(?=\S*\d)|\d\S*\s+(?:or\b|and\s+a\s+half)"
    rf"|{SCALE_WORD}\s+and\s+{_BELOW_HUNDRED}\b",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(r"\b(?:if|unless|suppos(?:e|ing)|were)\b", re.IGNORECASE)
_REASON = re.compile(
    r"\s*,?\s*\b(?:because|since|as|which|where|given|due to|(?:and|but) not)\b"
    r"|\s*[;(]|,\s+(?=[a-z]{2})|\s+–\s",
    re.IGNORECASE,
)
"""Start of what explains a stated answer: "18, since there are ..."."""

_MATH_SPAN = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\\d$])\$(?!\s*\d[\d,.]*\s+[a-z])([^$\n]+?)\$",
    re.DOTALL,
)
_WIDE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3"
"""Kana, Chinese characters and Hangul, which stand next to numbers without a space."""

_NUMBER_SPAN = re.compile(
    rf"(?<![^\W{_WIDE}])(?<![.,/^])[-+]?[$€£¥₹]?(?:\d{{1,3}}(?:,\d{{3}})+|\d+(?:[ ]\d{{3}})*)?"
    rf"(?:[.,]?\d+)?(?<=\d)(?:/\d+)?(?:[\s-]+{SCALE_WORD}\b)*(?:\s*(?:%|\\%|percent\b|pct\b))?"
    rf"(?![^\W{_WIDE}])(?!\s*[百千万亿萬億](?![克米瓦卡升]))"
)
_FOREIGN_NOUN = r"[^\W\d_]*[\u00c0-\u024f\u0400-\u1fff\u3040-\ud7ff][^\s\d]*(?:\s+[^\s\d]+){0,2}"
_PRICE = re.compile(r"([-+]?\d[\d.,]*\s*[$€£¥])(?=\s+[A-Za-z])")
"""A number with a currency sign after it, followed by more words: "15 $ per person"."""

_BOLD = re.compile(r"\*\*\s*([^*\n]{1,60}?)\s*\*\*")
_QUOTED = re.compile(r"[\"“]([^\"“”\n]{1,60})[\"”]")
_COUNT = (
    rf"\d[\d,]*(?:\.\d+)?(?![\d/%°+])(?:[\s-]+{SCALE_WORD}\b)*"
    rf"|(?:{_BELOW_HUNDRED}|an?)(?:[\s-]+{SCALE_WORD}\b(?:[\s-]+(?:and\s+)?{_BELOW_HUNDRED}\b(?!-))?)+"
    rf"|{_BELOW_HUNDRED}(?![\s-]+{SCALE_WORD}\b)|half\s+a\s+dozen|zero|no|none|a\s+single|a\s+pair"
    r"|a\s+couple"
)
"""A number in digits or words with all of its scales: "3 hundred", "two dozen", "a hundred"."""

_THERE_ARE = re.compile(
    r"(?:\bthere\s+(?:(?:appear|seem)s?\s+to\s+be|is|are|was|were)|\bthere's|\b(?:i|we)\s+(?:can\s+)?"
    r"(?:see|count(?:ed)?|find|found|spot|identify)|\b(?:picture|image|photo|figure)\s+(?:shows?|contains?|has|depicts?))"
    r"\s+(?:exactly\s+|only\s+|just\s+|a\s+total\s+of\s+|in\s+total\s+)?"
    rf"(?:\*\*)?({_COUNT})\b(?!-[a-z])(?:\*\*)?([^.!?\n]*)",
    re.IGNORECASE,
)
_ARE = re.compile(
    rf"\A({_COUNT})\s+(?:[a-z]+\s+){{1,4}}?(?:is|are|can be)\b([^.!?\n]*)", re.IGNORECASE
)
""" "Three dogs are in the picture." """

_ONE = r"\bone\s+(?!(?:of|on|in|at|is|can|by|with)\b)[a-z]+"
_ONE_OF_SEVERAL = re.compile(
    rf"(?:{_ONE}[^.!?\n]*\b(?:and|but|while)\b|\b(?:and|but|while)\s+(?:there\s+is\s+)?{_ONE})"
    r"[^.!?\n]*[.!?]*\Z",
    re.IGNORECASE,
)
_THERE_ARE_NONE = re.compile(
    r"\bthere\s+(?:is|are|was|were)(?:n't|\s+not)\s+any\b"
    r"|\b(?:do not|don't|cannot|can't)\s+see\s+any\b",
    re.IGNORECASE,
)
_SCALES = re.compile(rf"\b{SCALE_WORD}\b", re.IGNORECASE)
_IN_WORDS = re.compile(rf"(?:{_COUNT})(?:[\s-](?:{_COUNT}))*(?:\s+[a-z]+)?", re.IGNORECASE)
_BEFORE_DISPLAY = re.compile(r"(?<=[A-Za-z,:])[ \t]*\n\s*(?=\\\[|\$\$)")
_TOTAL = re.compile(
    rf"\b(?:a\s+total\s+of|in\s+total|altogether|the\s+total\s+is),?\s+(?:\*\*)?({_COUNT})\b"
    rf"|\b({_COUNT})(?:\*\*)?(?:\s+[a-z]+){{0,2}}\s+(?:in\s+total|altogether)\b",
    re.IGNORECASE,
)
_NEWLINES = re.compile(r"\s*\n\s*")
_WORD = re.compile(rf"[{_WIDE}]{{2,}}|[^\W\d_{_WIDE}]{{2,}}")
_COMMAND = re.compile(
    r"\\(?:begin|end)\s*\{[^{}]*\}|\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*\}|\\[A-Za-z]+"
)

_LONGEST_CLOSING = 3000
"""Number of characters at the end of a response that are searched for a statement of the answer."""

_IS = re.compile(
    r"\b(?:is|are|was|were)\b"
    r"|\b(?:it|he|she|that|this|there|here|what|who)['\N{RIGHT SINGLE QUOTATION MARK}]s\b",
    re.IGNORECASE,
)
"""Not the "'s" of "the woman's jacket"."""

_LONGEST_STATEMENT = 400
_LONGEST_BARE = 400
_FEW_WORDS = 4


@dataclass(frozen=True)
class Found:
    """An answer that was found in a response.

    Attributes:
        text: the answer as written.
        where: ``boxed``; ``marked`` ("#### 18", a JSON field); ``bare`` (the response is nothing
            but an answer); ``stated`` ("the answer is ...", in any language of `cues`);
            ``concluded`` (the only value, or the only bold one, of the closing sentence); ``led``
            (the response starts with it); ``named`` (it contains the text of one option).
        prose: the answer is a sentence rather than a value: if it equals the reference it is right,
            but otherwise it need not be wrong.
    """

    text: str
    where: str
    prose: bool = False


def final_part(response: str) -> str:
    """Returns the text after the thoughts, up to the end of the turn, without closing remarks."""
    if _THOUGHT_END in response:
        after = response.rsplit(_THOUGHT_END, 1)[1]
        response = after if after.strip() else response.replace(_THOUGHT_END, "")
    mark = _CHAT_MARK.search(response)
    if mark is not None and response[: mark.start()].strip():
        response = response[: mark.start()]
    end = response.rfind(_TAG_END)
    start = response.rfind(_TAG, 0, end) if end >= 0 else -1
    if start >= 0 and response[start + len(_TAG) : end].strip():
        response = response[start + len(_TAG) : end]
    return _without_politeness(response.strip())


def _without_politeness(text: str) -> str:
    # Only the end is searched: a pattern that starts with spaces takes quadratic time on many.
    split = max(0, len(text) - 200)
    return text[:split] + _POLITE.sub("", text[split:])


def closing(response: str) -> str | None:
    """Returns the end of a response that may state its answer; None if it was cut off.

    Full-width punctuation is unified, and closing remarks ("Let me know ...") are removed.
    """
    text = final_part(response)
    if re.search(r"\\(?:f?boxed|framebox|fbox)(?![a-z])", text):
        return None  # the answer was cut off; the text before it does not contain the answer
    if _THOUGHT_START in text and _THOUGHT_END not in response:
        return None  # cut off while thinking: only a box would count as an answer there
    text = text[-_LONGEST_CLOSING:].translate(_FULL_WIDTH).strip()
    fenced = _FENCE.fullmatch(text)
    text = fenced[1].strip() if fenced else text
    text = _BEFORE_DISPLAY.sub(" ", text)
    # Line ends within a displayed formula do not end a sentence.
    text = _MATH_SPAN.sub(lambda match: _NEWLINES.sub(" ", match.group()), text)
    while (sentences := _sentences(text)) and len(sentences) > 1 and _CLOSING.match(sentences[-1]):
        text = text[: text.rindex(sentences[-1])].rstrip()
    return text


def find_answer(response: str, *, kind: str = "auto") -> Found | None:
    """Returns the answer of a response, or None if none is unambiguous.

    Args:
        response: the final turn.
        kind: ``option``: "A: ..." begins an option, not an answer; ``count``: "there are three
            dogs" states a count; ``yes_no``: no number is looked for ("there is no dog").
    """
    response = _BOX_TOKENS.sub(r"\\boxed{\1}", undoubled(response))
    boxed = boxed_answer(final_part(response))
    if boxed is not None:
        return Found(boxed, "boxed")
    text = closing(response)
    if not text:
        return None
    words = kind == "yes_no"
    found = _marked(text) or _bare(text) or _stated(text, letters=kind == "option", whole=words)
    if found is not None or words or _retracted(text):
        return found
    if kind == "count" and (counted := _counted(text)) is not None:
        return counted
    found = _concluded(text)
    # "There is one dog and there are two cats": elsewhere "one" is a pronoun, and no second value.
    return None if kind == "count" and found and _ONE_OF_SEVERAL.search(text) else found


def is_prose(text: str) -> bool:
    """Returns whether an answer is a sentence rather than a value with a unit."""
    words = _WORD.findall(_COMMAND.sub(" ", _MATH_SPAN.sub(" ", _without_text_command(text))))
    return len(words) >= _FEW_WORDS or (len(words) == 3 and not re.match(r"\W*[\d]", text))


def value_in(text: str, kind: str = "auto") -> str | None:
    """Returns the only value in a sentence; None if it is hedged or there are several."""
    if len(text) > _LONGEST_STATEMENT or cues.HEDGE.search(text):
        return None
    plain = _without_text_command(text)
    found = (_counted(plain) if kind == "count" else None) or _value_of(plain, "")
    return None if found is None else found.text


def phrases(response: str) -> list[str]:
    """Returns what a response of one certain sentence may name: quoted, in bold, or after "is"."""
    said = closing(response) or ""
    if len(said) > _LONGEST_BARE or len(_sentences(said)) != 1 or not is_certain(said):
        return []
    if re.search(r"\b(?:not?|never|neither|nor|or|but)\b|n't\b", said, re.IGNORECASE):
        return []
    ends = [said[match.end() :] for match in _IS.finditer(said)][:1]
    for pattern in (_BOLD, _QUOTED):
        found = [match[1] for match in pattern.finditer(said)]
        ends += found if len(found) == 1 else []
    return [each.strip(" *.!") for each in ends]


def is_certain(text: str) -> bool:
    """Returns whether a sentence has no words of doubt."""
    return not cues.HEDGE.search(text)


def is_asserted(text: str) -> bool:
    """Returns whether a sentence has no words of doubt, negation, comparison or refusal."""
    doubts = (cues.HEDGE, cues.DENIED, cues.REFUSED, _OTHERWISE, _ALTERNATIVE)
    return not any(each.search(text) for each in doubts)


def _without_text_command(text: str) -> str:
    return latex_plain(text) if "\\text" in text or "\\mbox" in text else text


def _sentences(text: str) -> list[str]:
    return [each.strip() for each in _SENTENCE_END.split(text) if each and each.strip()]


def _marked(text: str) -> Found | None:
    """Returns the answer of GSM8K's mark, or of the field of a JSON object, fenced or not."""
    marks = list(_MARKED.finditer(text))
    if marks:
        said = text[marks[-1].end() :].strip().split("\n", 1)[0].strip(" *")
        return Found(said, "marked", prose=is_prose(said)) if said else None
    fields = _FIELD.findall(text)
    if not fields or "{" not in text:
        return None
    value = fields[-1]
    if value[0] in "\"'":
        # JSON undoes escapes; a Python string, or LaTeX with single backslashes, is taken as it is.
        try:
            value = json.loads(value)
        except ValueError:
            value = value[1:-1]
        value = fields[-1][1:-1] if any(ord(c) < 32 for c in value) else value
    value = value.strip().strip("[]") if value.startswith("[") and "," in value else value.strip()
    return Found(value, "marked", prose=is_prose(value)) if value else None


def _bare(text: str) -> Found | None:
    if not text or len(text) > _LONGEST_BARE or "\n\n" in text:
        return None
    rest = _COMMAND.sub(" ", _MATH_SPAN.sub(" ", text))
    words = _WORD.findall(rest)
    wide = sum(len(word) for word in words if re.match(f"[{_WIDE}]", word))
    doubtful = cues.HEDGE.search(text) or cues.DENIED.search(text)
    few = len(words) <= _FEW_WORDS and wide <= 3 * _FEW_WORDS
    if few and not _cue(text) and not doubtful and len(_sentences(text)) == 1:
        if wide and re.search(r"\d", rest):
            return None  # "图中有3只狗" is a sentence
        text = _without_counter(re.sub(r"^[=∴]\s*|^__|__$", "", text))
        return Found(text, "bare", prose=len(words) > 1 and not _MATH_SPAN.search(text))
    return None


def _cue(text: str) -> bool:
    """Returns whether words introduce the value: then only the value is the answer."""
    return bool(
        _STATED.search(text)
        or _LETTER_CUE.match(text)
        or _CONCLUSION.search(text)
        or re.search(r"[A-Za-z]{2,}\s*(?:\bis\b|\bare\b|:)\s", _MATH_SPAN.sub(" ", text))
        or re.match(r"\s*(?:the\s+)?answer\b", text, re.IGNORECASE)
        or re.search(
            r"\b(?:there|it|that|this)\s*(?:'s|is|are)(?:n't)?\b|\b(?:i|we)\s+[a-z]",
            text,
            re.IGNORECASE,
        )
    )


def _stated(text: str, *, letters: bool, whole: bool) -> Found | None:
    """Returns what a cue introduces: its value, or all of it (``whole``)."""
    found = list(_STATED.finditer(text))
    if not found and not letters:
        found = list(_LETTER_CUE.finditer(text))[-1:]
    if not found:
        return None
    rest = text[found[-1].end() : found[-1].end() + _LONGEST_STATEMENT].strip()
    rest = _without_politeness(rest)
    if _retracted(text) or is_denied(text[: found[-1].end()]):
        return None
    said = _SENTENCE_END.split(rest, maxsplit=1)[0] if rest else ""
    said = said.strip().strip("\"'*`").lstrip("# ").removesuffix('"').strip()
    said = re.sub(cues.VERB_AT_END, "", said)
    if (
        not said
        or re.match(r"(?:not|never|n't|unknown)\b", said, re.IGNORECASE)
        or cues.HEDGE.search(said)
    ):
        return None
    if whole:
        return Found(said, "stated", prose=True)
    head = _REASON.split(said, maxsplit=1)[0].strip()
    if head != said and _is_value(head):
        return Found(head, "stated")
    return _value_of(said, "stated") or Found(said, "stated", prose=len(_WORD.findall(said)) > 2)


def is_denied(before: str) -> bool:
    """Returns whether the clause that a text ends with denies, doubts or supposes what follows."""
    said = _SENTENCE_END.split(before[-_LONGEST_STATEMENT:])[-1]
    said = cues.CLAUSE.split(said)[-1]
    doubts = (cues.DENIED, cues.HEDGE, cues.CONDITION, _NEGATED)
    return any(each.search(f"{said.rstrip()} ") for each in doubts)


def _retracted(text: str) -> bool:
    """Returns whether a stated answer is taken back."""
    stated = list(_STATED.finditer(text))
    return bool(stated) and cues.RETRACTED.search(text, stated[-1].end()) is not None


def _counted(text: str) -> Found | None:
    """Returns the count that "there are ..." states, if it is the only one.

    Numbers after it may only be the parts it is the sum of ("two people, one on each side") or a
    part of it ("five dogs, two of them black").
    """
    if _THERE_ARE_NONE.search(text) and len(_sentences(text)) == 1:
        return None if cues.REFUSED.search(text) else Found("0", "concluded")
    totals = {total[1] or total[2] for total in _TOTAL.finditer(text)}
    if len(totals) == 1 and not cues.HEDGE.search(text) and not _OTHERWISE.search(text):
        return Found(totals.pop(), "concluded")
    stated = list(_THERE_ARE.finditer(text)) or list(_ARE.finditer(text))
    if not stated and len(_sentences(text)) == 1 and (there := counts.counted(text)) is not None:
        return Found(str(there), "concluded")
    if len(stated) != 1 or cues.HEDGE.search(text):
        return None
    number, rest = stated[0][1], stated[0][2]
    if re.match(rf"\s*(?:or|to|and\s+(?:a\s+half|{_BELOW_HUNDRED}))\b|\s*[-–]\s*\d|[+%]", rest):
        return None
    parts = re.findall(
        rf"\b({_COUNT})\b(?!\s*(?:of\s+(?:them|which|these|those)|(?:on|in|at)\s+(?:each|either)|side"
        r"|another))",
        rest,
        re.IGNORECASE,
    )
    values = [_count_value(part) for part in parts]
    if parts and (
        re.search(r"\band\b", re.split("[,:;(]", rest)[0]) or sum(values) != _count_value(number)
    ):
        return None
    others = re.findall(rf"\b(?:{_COUNT})\b", text[stated[0].end() :], re.IGNORECASE)
    others = [other for other in others if other.lower() not in ("no", "one")]
    none = number.lower() in ("no", "none")
    if others or (none and cues.REFUSED.search(text)):
        return None
    return Found("0" if none else number, "concluded")


def _count_value(word: str) -> int:
    quantity = parse_quantity("0" if word.lower() == "no" else word)
    return -1 if quantity is None else int(quantity.value)


def _concluded(text: str) -> Found | None:
    sentences = _sentences(text)
    short = len(text) <= _LONGEST_BARE
    if not sentences:
        return None
    bold = _emphasised(sentences[-1])
    if bold is not None:
        return bold
    # A short text is its own conclusion; in a long one the conclusion must be marked ("Thus ...").
    said = text if short and len(sentences) == 1 else sentences[-1]
    found = list(_CONCLUSION.finditer(said))
    if not found and (not short or len(sentences) > 1 or _INTENT.match(said)):
        return None
    # "In total" may also stand after the value: then an earlier word marks the conclusion.
    for start in [match.end() for match in reversed(found)] or [0]:
        part = said[start:]
        if len(part) > _LONGEST_STATEMENT or cues.HEDGE.search(part):
            return None
        value = _value_of(part, "concluded")
        if value is not None or re.search(r"\d", part):
            return value
    return None


def _emphasised(sentence: str) -> Found | None:
    """Returns the only value in bold print of a sentence ("... which makes it **66**.")."""
    bold = [match for match in _BOLD.finditer(sentence) if _is_value(match[1].rstrip("."))]
    if len({match[1] for match in bold}) != 1 or cues.HEDGE.search(sentence):
        return None
    if re.search(r"[.:]$", bold[0][1]) or _OTHERWISE.search(_before(sentence, bold[-1])):
        return None
    return Found(bold[0][1], "concluded")


def _before(sentence: str, match: re.Match[str]) -> str:
    """Returns the few words before a match, from the last comma on."""
    return re.split(r"[,;:]\s", sentence[: match.start()])[-1][-25:]


def _value_of(said: str, where: str) -> Found | None:
    """Returns the value of a sentence: its end after "is", or its only number or formula."""
    said = re.sub(cues.VERB_AT_END, "", said.strip()).rstrip(".!?").strip()
    masked = _masked(said)
    if len(set(re.findall(r"\b(?:is|are|was|were)\s+([-+]?\d[\d.,]*\d|\d)", masked))) > 1:
        return None  # "the first is 12 and the second is 13"
    if cues.DENIED.search(masked):
        return None
    tails = [
        said[match.end() :].strip()
        for match in _COPULA.finditer(masked)
        if not (match.group().startswith(_INFINITIVE) and _NEGATED.search(_before(said, match)))
        and not cues.CONDITION.search(said[: match.start()])
    ]
    for tail in [said, *tails]:
        priced = _PRICE.match(tail)
        if priced is not None:
            return Found(priced.group(1), where)
        # Of "72000 / 18 = 4000", only the result is the value; "x = 3" is one.
        if tail and _is_value(tail) and not re.match(r"[\d.,+*/() -]+=\s*\S", tail):
            return Found(_without_counter(tail), where)
    if any(each.search(masked) for each in (_OTHERWISE, _ALTERNATIVE, _SUPPOSED)):
        return None
    spans = list(_MATH_SPAN.finditer(said))
    loose = _NUMBER_SPAN.findall(_MATH_SPAN.sub(" ", said))
    loose = [number for number in loose if number.strip()]
    if len(spans) == 1 and not loose:
        start, end = spans[0].span()
        after = re.match(r"\s*(?:\\?%|percent\b|pct\b)", said[end:])
        return Found(said[start:end] + (after.group() if after else ""), where)
    if not spans and len(loose) == 1:
        return Found(loose[0].strip(), where)
    return None


def _without_counter(value: str) -> str:
    """Removes a counted noun in another script or with accents ("13只鸟", "12 Äpfel")."""
    match = re.fullmatch(rf"({_NUMBER_SPAN.pattern})\s*{_FOREIGN_NOUN}", value.rstrip(". "))
    if match is None or _OTHERWISE.search(value) or parse_quantity(value) is not None:
        return value
    return match[1]


def _masked(said: str) -> str:
    """Returns the sentence with formulas blanked, so that "=" in a formula does not split it."""
    return _MATH_SPAN.sub(lambda match: "\x00" * len(match.group()), said)


def _is_value(text: str) -> bool:
    rest = _COMMAND.sub(" ", _MATH_SPAN.sub(" 0 ", text))
    words = [w for w in _WORD.findall(_SCALES.sub(" ", rest)) if w.lower() not in ("and", "or")]
    if re.search(r"\b(?:is|are|was|equals?|not|never|than)\b|n't", rest):
        return False
    single = re.fullmatch(r"\(?[A-Z]\)?", text.strip())
    numbers = re.search(r"\d|\\[a-z]", rest) or _IN_WORDS.fullmatch(text.strip(" *"))
    if numbers and not re.search(r"\d", rest) and "\\" not in rest:
        return True
    # One word may follow the number, as its unit; one before it ("Answer 9") is not part of it.
    lead = re.match(r"\W*(?:(?:I\s+)?[^\W\d_]{2,}|[\u0400-\u1fff\u3040-\ud7ff])", rest)
    return bool(single) or (numbers is not None and lead is None and len(words) <= 1)
