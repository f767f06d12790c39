"""Finding the answer in a response: boxes, then statements that leave no doubt."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reopold_agent.boxed import boxes, extract_boxed
from reopold_agent.judges.text import latex_plain, undoubled

__all__ = [
    "Found",
    "boxed_answer",
    "boxes",
    "extract_boxed",
    "final_part",
    "find_answer",
    "is_prose",
    "open_box",
    "value_in",
]

_THOUGHT_START, _THOUGHT_END = "<think>", "</think>"
_CHAT_MARK = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id)\|>")
_TAG, _TAG_END = "<answer>", "</answer>"

_BETWEEN_BOXES = re.compile(
    r"(?:(?!\n\s*\n)[^\w\\{}]|\\[()\[\],;!: ]|\\q?quad"
    r"|\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|\band\b|\bor\b){0,40}"
)
"""Only separators, no empty line: "\\boxed{1} and \\boxed{2}" is one answer of two parts."""

_HEDGE = re.compile(
    r"\b(?:maybe|perhaps|might|could|possibly|probably|not sure|unsure|unclear|guess|cannot|can't"
    r"|don't know|do not know|either|unknown|not enough|assum\w+)\b",
    re.IGNORECASE,
)
_OTHERWISE = re.compile(
    r"\b(?:not|never|without|except|less|more|greater|fewer|smaller|larger|bigger|least|most"
    r"|between|than|up to|over|under"
    r"|(?:step|case|part|equation|eq|question|problem|figure|page)\.? \d)\b|n't\b",
    re.IGNORECASE,
)
"""Words that make a sentence's only number something else than its answer."""

_POLITE = re.compile(r"\s*I hope (?:it|this) is correct\.?\s*$", re.IGNORECASE)
_STATED = re.compile(
    r"(?:\bfinal\s+answer\b(?:\s+is\b)?|\b(?:answer|option|choice)\s+is\b"
    r"|\banswer\b(?=\s*(?:\*\*)?\s*[:=])|\A\s*answer\b)[\s*:=]*",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(
    r"\b(?:therefore|thus|hence|so|consequently|in conclusion|we (?:find|get|have|conclude) that"
    r"|this (?:gives|means))\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\[(*$\\])|\n+")
_COPULA = re.compile(
    r"(?:\b(?:is|are|was|equals?|be|to)\b|(?<![<>!=\\:])=|:(?=\s))\s*"
    r"(?:\s*\b(?:equal to|approximately|about|exactly|simply)\b)?\s*:?\s*",
    re.IGNORECASE,
)
_MATH_SPAN = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\\d$])\$(?!\s*\d[\d,.]*\s+[a-z])([^$\n]+?)\$",
    re.DOTALL,
)
_NUMBER_SPAN = re.compile(
    r"(?<![\w.,/^])[-+]?[$€£¥₹]?(?:\d{1,3}(?:,\d{3})+|\d+(?:[ ]\d{3})*)?(?:[.,]?\d+)?"
    r"(?<=\d)(?:/\d+)?(?:\s*(?:%|\\%|percent\b|pct\b))?(?![\w])"
)
_PRICE = re.compile(r"([-+]?\d[\d.,]*\s*[$€£¥])(?=\s+[A-Za-z])")
"""A currency sign after a number, and a sentence that goes on: "15 $ per person"."""

_NEWLINES = re.compile(r"\s*\n\s*")
_WORD = re.compile(r"[A-Za-z]{2,}")
_COMMAND = re.compile(
    r"\\(?:begin|end)\s*\{[^{}]*\}|\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*\}|\\[A-Za-z]+"
)

_LONGEST_CLOSING = 3000
"""Characters at the end of a response in which its statement of the answer is looked for."""

_LONGEST_STATEMENT = 400
_LONGEST_BARE = 400
_FEW_WORDS = 4


@dataclass(frozen=True)
class Found:
    """An answer in a response.

    Attributes:
        text: the answer as written.
        where: ``boxed``, ``stated`` ("the answer is ..."), ``concluded`` (the one value of the
            closing sentence) or ``bare`` (the response is nothing but an answer).
        prose: it is a sentence rather than a value; equality proves it right, but inequality
            proves nothing.
    """

    text: str
    where: str
    prose: bool = False


def boxed_answer(text: str) -> str | None:
    """The last box, with those right before it when only commas, "and" or "or" stand between."""
    found = boxes(text)
    if not found:
        return None
    start = found[-1].start
    parts = [found[-1].content(text)]
    for box in reversed(found[:-1]):
        if box.end > start or not _BETWEEN_BOXES.fullmatch(text, box.end, start):
            break
        start, content = box.start, box.content(text)
        if content != parts[0]:
            parts.insert(0, content)
    return ", ".join(parts)


def open_box(text: str) -> str | None:
    """Content of a last box whose brace is never closed. For reference answers only.

    In a response an open box is one that was cut off: ``\\boxed{12`` may have become 123.
    """
    opened = [match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]
    return text[opened[-1] :].strip().rstrip("$").strip() or None if opened else None


def final_part(response: str) -> str:
    """What follows the thoughts, up to the end of the turn, without closing remarks."""
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
    # Only its end is searched: patterns that start with spaces take quadratic time on many.
    split = max(0, len(text) - 200)
    return text[:split] + _POLITE.sub("", text[split:])


def find_answer(response: str) -> Found | None:
    """The answer of a response, or None where saying what it is would be a guess."""
    text = final_part(undoubled(response))
    boxed = boxed_answer(text)
    if boxed is not None:
        return Found(boxed, "boxed")
    if re.search(r"\\f?boxed\b", text):
        return None  # an answer was begun and cut off; what came before it was not the answer
    if _THOUGHT_START in text and _THOUGHT_END not in response:
        return None  # cut off while thinking: what is said there is a guess unless it is boxed
    text = text[-_LONGEST_CLOSING:]
    # A displayed formula has line ends of its own; they end no sentence.
    text = _MATH_SPAN.sub(lambda match: _NEWLINES.sub(" ", match.group()), text)
    return _bare(text) or _stated(text) or _concluded(text)


def is_prose(text: str) -> bool:
    """Whether an answer reads like a sentence rather than a value with a unit."""
    words = _WORD.findall(_COMMAND.sub(" ", _MATH_SPAN.sub(" ", _without_text_command(text))))
    return len(words) >= _FEW_WORDS or (len(words) == 3 and not re.match(r"\W*[\d]", text))


def value_in(text: str) -> str | None:
    """The one value that a sentence states; None if it is hedged or there are several."""
    if len(text) > _LONGEST_STATEMENT or _HEDGE.search(text):
        return None
    found = _value_of(_without_text_command(text), "")
    return None if found is None else found.text


def _without_text_command(text: str) -> str:
    return latex_plain(text) if "\\text" in text or "\\mbox" in text else text


def _bare(text: str) -> Found | None:
    if not text or len(text) > _LONGEST_BARE or "\n\n" in text:
        return None
    words = _WORD.findall(_COMMAND.sub(" ", _MATH_SPAN.sub(" ", text)))
    spans = _MATH_SPAN.findall(text)
    if len(words) <= _FEW_WORDS and not _cue(text) and not _HEDGE.search(text):
        return Found(text, "bare", prose=len(words) > 1 and not spans)
    return None


def _cue(text: str) -> bool:
    """Whether words lead up to the value: then the value alone is the answer."""
    return bool(
        _STATED.search(text)
        or _CONCLUSION.search(text)
        or re.search(r"[A-Za-z]{2,}\s*(?:\bis\b|\bare\b|:)\s", _MATH_SPAN.sub(" ", text))
        or re.match(r"\s*(?:the\s+)?answer\b", text, re.IGNORECASE)
    )


def _stated(text: str) -> Found | None:
    cues = list(_STATED.finditer(text))
    if not cues:
        return None
    rest = text[cues[-1].end() : cues[-1].end() + _LONGEST_STATEMENT].strip()
    rest = _without_politeness(rest)
    said = _SENTENCE_END.split(rest, maxsplit=1)[0] if rest else ""
    said = said.strip().strip("\"'*`").removesuffix('"').strip()
    if not said or re.match(r"(?:not|n't|unknown)\b", said, re.IGNORECASE) or _HEDGE.search(said):
        return None
    return _value_of(said, "stated") or Found(said, "stated", prose=len(_WORD.findall(said)) > 2)


def _concluded(text: str) -> Found | None:
    sentences = [s for s in _SENTENCE_END.split(text) if s and s.strip()]
    short = len(text) <= _LONGEST_BARE
    if not sentences:
        return None
    # The closing remark of a short text is the text; of a long one it must say so ("Thus ...").
    said = text if short and len(sentences) == 1 else sentences[-1]
    cues = list(_CONCLUSION.finditer(said))
    if not cues and not (short and len(sentences) == 1):
        return None
    if cues:
        said = said[cues[-1].end() :]
    if _HEDGE.search(said) or len(said) > _LONGEST_STATEMENT:
        return None
    return _value_of(said, "concluded")


def _value_of(said: str, where: str) -> Found | None:
    """The one value of a sentence: what it ends with after "is", or its only number or formula."""
    said = said.strip().rstrip(".!?").strip()
    tails = [said[match.end() :].strip() for match in _COPULA.finditer(_masked(said))]
    for tail in [said, *tails]:
        priced = _PRICE.match(tail)
        if priced is not None:
            return Found(priced.group(1), where)
        if tail and _is_value(tail):
            return Found(tail, where)
    if _OTHERWISE.search(_masked(said)):
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


def _masked(said: str) -> str:
    """The sentence with formulas blanked, so that an "=" within one does not split it."""
    return _MATH_SPAN.sub(lambda match: "\x00" * len(match.group()), said)


def _is_value(text: str) -> bool:
    rest = _COMMAND.sub(" ", _MATH_SPAN.sub(" 0 ", text))
    words = [w for w in _WORD.findall(rest) if w.lower() not in ("and", "or")]
    single = re.fullmatch(r"\(?[A-Z]\)?", text.strip())
    numbers = re.search(r"\d|\\[a-z]", rest)
    # One word may follow, a unit; one in front ("Answer 9") is not a part of the value.
    lead = re.match(r"\W*[A-Za-z]{2,}", rest)
    return bool(single) or (numbers is not None and lead is None and len(words) <= 1)
