"""Reads answers that are one of a few: an option by letter or by text, yes or no."""
# ruff: noqa: RUF001  # the tables have words of other languages

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from reopold_agent.judges import cues
from reopold_agent.judges.text import latex_plain, normal, same_answer, trim, words_only

Letters: TypeAlias = frozenset[str]
"""The chosen options, as lower-case letters; nearly always one."""

_YES = frozenset(
    {
        *("yes", "yeah", "yep", "yup", "true", "correct", "right", "y", "sure", "certainly"),
        *("absolutely", "definitely", "affirmative", "oui", "si", "sí", "ja", "да", "sim", "evet"),
        *("はい", "是", "是的", "对", "对的", "正确", "有", "예", "네", "نعم", "हाँ", "हां", "có"),
    }
)
_NO = frozenset(
    {
        *("no", "nope", "nah", "false", "incorrect", "wrong", "n", "negative", "untrue", "non"),
        *(
            "nein",
            "нет",
            "não",
            "hayır",
            "nie",
            "nee",
            "いいえ",
            "否",
            "不",
            "不是",
            "不是的",
            "不对",
        ),
        *("错", "错误", "没有", "无", "아니요", "아니오", "لا", "नहीं", "không", "tidak"),
    }
)
_NOT_SO = re.compile(
    r"not\s+(?:really|at all|quite|exactly|the case|true|correct|right|so|necessarily)\b"
    r"|(?:(?:of course|clearly|obviously)\s+not|(?:i|we)\s+(?:do not|don't)\s+think\s+so)$"
    r"|(?:it|that|this|they|he|she|there)\s*(?:(?:is|are|was|were|does|do|has|have)(?:\s*not|n't)"
    r"|(?:'s|'re) not)(?:\s+(?:true|correct|right|the case|so))?$"
)
_KNOWN = _YES | _NO
_ADJECTIVES = {"true", "correct", "right", "sure", "negative", "false", "incorrect", "wrong"}
_ADJECTIVES |= {"y", "n", "certainly", "absolutely", "definitely"}
_EXPLAINING = {"because", "since", "as", "for", "it", "that", "this", "there", "they", "he", "she"}
_SO_FIRST = re.compile(
    r"^(?:(?:so|therefore|thus|hence|well|oh|overall)[\s,:*]+(?=(?:yes|no)\b)"
    r"|(?:no\s+doubt|(?:based\s+on|according\s+to|looking\s+at|judging\s+(?:by|from)|from|in)\b"
    r"[^,.;:!?]{1,60}),[\s*]*(?=(?:yes|no)[\s*]*(?:[,.;:!]|$)))"
)
"""What may stand before a yes or no: "Based on the picture, yes"."""

_PAUSE = re.compile(r"[^\W\d_]+(?:\s*[^\w\s'’/&-]|\s+-|\s*$)")
"""A word that punctuation separates from what follows: "yes, there is no cat"."""

_OR = re.compile(r"([^\W\d_]+)\b[\W_]*(and\b|or\b|&|/|和|或)?[\W_]*([^\W\d_]+)")
_ENDS_WITH = re.compile(
    r"(?:(?:so|thus|therefore|hence|overall|then|oh|well|ok|okay|and|the|my|our|your|final|correct|right|short"
    r"|answer|result|verdict|response|statement|claim|assertion|sentence|given|above|in|conclusion|is|are"
    r"|was|it|that|this|they|[ds]|re|be|would|will|must|should|has|have|to|i|we|say|vote|think|clearly"
    r"|definitely|certainly|absolutely|indeed|obviously|surely|simply|just|also|really|very"
    rf"|both|all)[\s,:*'’-]+|(?:{cues.any_of(cues.ANSWER_IS)})[\s*]*)*([^\W\d_]+)"
)
_SO = re.compile(
    r"(?:of course|indeed|(?:i|we)\s+(?:do\s+)?think\s+so"
    r"|(?:it|that|this|they|he|she|there)\s+(?:is|are|was|were|does|do|has|have))$"
)
_CAN_BE_WORDS = "ai"
"""Letters that are words: "a car", "I see"."""

_FEW_WORDS = 5
"""Longest sentence in which a capital letter by itself is an option ("Definitely B!")."""

_NEAR = 60
"""Number of characters beside a letter that tell whether it is an option."""

_OPEN, _CLOSE = r"[(\[{<]", r"[)\]}>]"
_ALONE = r"(?<![A-Za-zÀ-ɏ0-9_\\])([A-J])(?![A-Za-zÀ-ɏ0-9_'’^])"
_TOKEN = rf"(?:{_OPEN}\s*([A-Za-z])\s*{_CLOSE}|{_ALONE})"
"""A letter in brackets, or a capital letter by itself."""

_WHOLE = re.compile(rf"{_OPEN}?\s*([A-Za-z])\s*{_CLOSE}?\s*[.:,;、)]*")
_ITEM = r"(?:option|choice|answer|letter|选项|選項|选择|选|答案|opción|opção|вариант)"
_NAMED = re.compile(
    rf"(?:the\s+)?(?:(?:correct|right|final|best)\s+)?{_ITEM}s?\s*(?:is|are|:|=|是|为)?\s*(?=\W|[A-Z])",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"\s*(?:项|項|选项|が正解|is(?:\s+the)?\s+(?:correct|right|true|best|answer)|번|$)",
    re.IGNORECASE,
)
_LED = re.compile(
    rf"(?:{_OPEN}\s*([A-Za-z])\s*{_CLOSE}|([A-Za-z])\s*[.):、]"
    r"|([A-J])\s*(?:,|=(?!=)|[-–—](?=\s)|→|⇒|\\?->|\\(?:long)?[rR]ight[aA]rrow\b)"
    r"|([A-Z])(?=\s+[\d\\(+.$-])|([A-J])(?=\s+(?!(?:is|are|was|has)\b)[^\W\d_])|([A-Z])(?=[\u3040-\u9fff\uac00-\ud7a3]))\s*"
)
"""A letter before the option's text: "(B) 12", "B. 12", "B - 12", "B=12", "B 12", "B blue"."""

_SEVERAL = re.compile(
    rf"{_OPEN}?[A-Z]{_CLOSE}?(?:\s*(?:,|、|;|&|\band\b|和|与|及|und|et|y|e|и)?\s*{_OPEN}?[A-Z]{_CLOSE}?)+\.?"
)
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|sf|tt)|mbox)\s*\{")
_MARKDOWN = re.compile(r"[*_`]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}")

_NOT_BEFORE = re.compile(
    rf"(?:{cues.NEGATED})\s*(?:(?:options?|choices?|the|be|both|either|选项)\s*)*"
    rf"(?:{_TOKEN}\s*(?:,\s*(?:(?:and|or|nor)\s+)?|and\s+|or\s+|nor\s+|&\s*))*[(\[]?$",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(rf"\s*(?:or|/|或|oder|ou|o|или|または)\s*(?:option\s+)?{_TOKEN}")
_OR_BEFORE = re.compile(rf"{_TOKEN}\s*(?:or|/)\s*(?:option\s+)?[(\[]?$")
_ANOTHER = re.compile(
    rf"\s*(?:,|&|and|和|、|und|et|и)\s*(?:(?:and|&)\s*)?(?:option\s+)?{_TOKEN}(?!\s*[.:)]?\s*\w*\s*(?:is|are|不)\b)"
)
_EXCLUDED = re.compile(
    r"(?:(?:is|are|was|were|(?:can|could|should|must|would|may|might|has\s+to|have\s+to)\s+be|looks?"
    r"|seems?|appears?)\s+(?:to\s+be\s+)?)?(?:(?!not\b)(?:both|all|also|\w+ly)\s+)?"
    r"(?:not\b|never\b|isn't|aren't|incorrect\b|wrong\b|false\b|untrue\b|impossible\b|invalid\b"
    r"|implausible\b|unlikely\b|inconsistent\b|inaccurate\b|out\b|(?:ruled|crossed)\s+out\b"
    r"|eliminated\b|excluded\b|discarded\b|rejected\b|dismissed\b|hardly\b|too\s)"
    r"|(?:is|are|was|were|does|do|did|can|could|will|would|should|must|may|might|has|have)"
    r"\s*(?:not\b|n't)|cannot\b|can't\b|won't\b|contradicts?\b|fails?\b|violates?\b|conflicts?\b"
    r"|不对|不正确|错",
    re.IGNORECASE,
)
"""What is said of an option that is not chosen."""

_OTHERS = rf"(?:\s*,?\s*(?:and|or|nor|&)\s*{_TOKEN}(?!\s*(?:is|was|has|does)\b)|\s*,\s*{_TOKEN})*"
"""Further letters of a list that one verb follows: "A, C and D are wrong"."""

_VERB = re.compile(
    r"\s+(?:is|are|was|were|has|have|had|does|do|did|can|could|will|would|should|must|may|might|cannot"
    r"|[a-z]+n't|looks?|seems?|appears?|becomes?|remains?|gives?|yields?|shows?|says?|gets?|got|leads?|turns?|violates?|needs?"
    r"|contradicts?|fails?|conflicts?|ignores?|misses|lacks?|works?|fits|holds)\b",
)
_GOOD = re.compile(
    r"\s+(?:(?:is|are|was|must\s+be|has\s+to\s+be|remains|becomes)\s+(?:\w+ly\s+|therefore\s+|thus\s+)?"
    r"(?:(?:the\s+)?(?:only\s+)?(?:\w+\s+)?(?:correct|right|true|best|accurate|appropriate|answer"
    r"|choice|option|one|match|chosen|left|valid)\b)|works|fits|holds|remains|matches|satisfies)"
    r"(?!.*\b(?:if|unless|provided)\b)",
)
"""What is said of the option that is chosen, after its letter."""

_EXPLAINS = re.compile(
    r"\s+(?:because|since|as|and|which|for|due|given|where|while|whereas|but|with|rather|instead)\b"
)
_IF_AFTER = re.compile(r"\s*,?\s*(?:only\s+)?(?:if|unless|when|provided|assuming)\b", re.IGNORECASE)
_STATED = re.compile(
    r"(?:\b(?:answer|option|choice)s?\s*(?:is|are|would be|should be|must be|will be"
    r"|:|=|→|->|[-–—](?=\s))"
    rf"|\banswer\b(?=\s*[(\[])|{cues.any_of(cues.ANSWER_IS)})[\s:=]*"
    r"(?:(?:the|la|le|el|a|o|il|die)\s+)?(?:(?:first|second|third|fourth|fifth|last)\s+(?=option|choice))?"
    r"(?:(?:option|choice|letter|选项|選項|opción|opção|letra"
    rf"|lettera|lettre|вариант)\s*[:,]?\s*)?{_TOKEN}",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"\b(?:leav(?:es|ing)(?:\s+only)?|only(?=\s+\(?[A-J]\)?\s+(?:satisf|match|fit|work|meet))"
    r"|i(?:['’]d|['’]ll| would| will)?\s+(?:choose|pick|select|say|answer"
    r"|(?:go|respond|reply)\s+(?:with|for))|choos(?:e|ing)"
    r"|pick|select(?:ing|ed)?|go(?:ing)?\s+with|it(?:'s|\s+is|\s+must\s+be|\s+should\s+be)"
    r"|must\s+be|corresponds?\s+to|match(?:es|ing)?|that\s+is|which\s+is|namely|thus|therefore"
    r"|hence|so)\s*[:,]?\s*"
    rf"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer|letter)\s*)?:?\s*{_TOKEN}",
    re.IGNORECASE,
)
_SAID_RIGHT = re.compile(rf"{_TOKEN}(?:\s*(?:,|&|and)\s*{_TOKEN})*")
_IS_RIGHT = re.compile(
    rf"(?:(?!{_TOKEN}|\b(?:not|never|hardly|cannot|if|wrong|unlikely)\b|n't)[^.!?\n]){{0,60}}?"
    r"(?:\bwould\s+be\s+my\s+(?:answer|choice|pick)\b"
    r"|\b(?:is|are|must\s+be)\s+(?:(?:the|my)\s+)?(?:only\s+|most\s+|final\s+)?"
    r"(?:correct|right|true|best|accurate|appropriate|answer)\b"
    r"|\bmatches\s+(?:our|my|this|the)\s+(?:\w+\s+)?(?:result|answer|calculation|value)\b"
    r"|正确|が正しい|が正解|이 정답)",
    re.IGNORECASE,
)
_ANY_OPTION = re.compile(
    # "f(t)" is a function, not option T.
    rf"(?:\b(?:option|choice)\s+)?(?:(?<!\b[A-Za-z]){_OPEN}\s*([A-Za-z])\s*{_CLOSE}|{_ALONE})"
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[^\sa-z])|\n+")
_QUESTION = re.compile(r"[^.!?\n]*\?")


def yes_no(text: str) -> bool | None:
    """Returns True for yes, False for no, None if the text is neither or both."""
    mine = normal(_QUESTION.sub(" ", text)) or ("" if text.count("?") > 1 else normal(text))
    words = re.findall(r"[^\W\d_]+", mine)
    if not words:
        return None
    if _NOT_SO.match(mine) or (
        words[0] in _YES and re.match(r"\w+\s+not\b(?!\W+(?:yes|no)\b)", mine)
    ):
        return False
    if _SO.match(mine):
        return True
    lead = leading(mine)
    if lead is not None or words[0] in _KNOWN - _ADJECTIVES:
        return lead
    # "The answer is yes": nothing else may stand before it ("far from yes", "I see no dog").
    last = _ENDS_WITH.fullmatch(mine) if len(words) <= _FEW_WORDS + 5 else None
    return last[1] in _YES if last and last[1] in _KNOWN else None


def leading(text: str) -> bool | None:
    """Returns whether a text begins with yes (True) or no (False); None if with neither or both."""
    mine = _SO_FIRST.sub("", normal(text))
    words = re.findall(r"[^\W\d_]+", mine)
    if not words or words[0] not in _KNOWN or not mine.startswith(words[0]) or _both(mine):
        return None
    if words[:2] == ["no", "doubt"]:
        return None
    paused = len(words) == 1 or _PAUSE.match(mine)
    return words[0] in _YES if paused or _explained(mine, words[0], words[1]) else None


def _both(mine: str) -> bool:
    """Returns whether yes and no stand side by side ("yes and no"), without a noun after "no"."""
    side = _OR.match(mine)
    if side is None or side[3] not in _KNOWN:
        return False
    noun = side[3] in ("no", "right") and re.match(r"\s+[^\W\d_]", mine[side.end() :])
    return (side[1] in _YES) != (side[3] in _YES) and not (noun and _PAUSE.match(mine))


def _explained(mine: str, first: str, after: str) -> bool:
    """Returns whether a yes or no without a pause is the answer: not "right line", "no image"."""
    if first in _ADJECTIVES:
        return after in _EXPLAINING
    return not (first == "no" and (after in ("one", "longer") or cues.REFUSED.match(mine)))


def chosen(
    text: str,
    options: Mapping[str, str] | None = None,
    same: Callable[[str, str], bool] = same_answer,
) -> Letters | None:
    """Returns the options that an answer names, or None.

    A letter that is followed by the text of another option contradicts itself and names none.

    Args:
        text: "B", "(b)", "B. a red car", "[B]", "B - 12", "option B", "A, C" or, if ``options``
            are given, the text or the value of one of them.
        options: texts by letter.
        same: compares an answer with an option's text.
    """
    options = options or {}
    plain = _plain(text)
    if not plain:
        return None
    item = _NAMED.match(plain)
    lead = re.compile(_TOKEN).match(plain, item.end() if item else 0)
    if lead and is_excluded(plain[lead.end() :]):
        return None
    match = _WHOLE.fullmatch(plain)
    if match:
        return _among(match[1], options)
    named = [letter.lower() for letter, option in options.items() if same_answer(text, option)]
    if len(named) == 1:
        return frozenset(named)
    if item and (rest := plain[item.end() :].strip()) and rest != plain:
        match = re.match(rf"(?:{_TOKEN}|([a-z])(?=[.):,]|$))", rest)
        if match:
            letters = _run(match, rest)
            if len(letters) != 1:
                return _among(letters, options) if letters else None
            return _checked(match, rest, options)
    if _SEVERAL.fullmatch(plain):
        found = re.findall(r"[A-Z]", plain)
        in_order = found == sorted(set(found))
        if in_order or not re.search(r"[A-Z]{2}", plain):
            return _among("".join(found), options)
    match = _LED.match(plain)
    if match and match[5] and _VERB.match(plain, match.end(5)):
        match = None
    if match and not (match[5] and match[5].lower() in _CAN_BE_WORDS):
        if not _ALTERNATIVE.match(plain, match.end(0)) and not re.match(
            r"(?:or|或)\b", plain[match.end() :]
        ):
            return _checked(match, plain, options)
    elif match and same_answer(plain[match.end() :], options.get(match[5].lower(), "")):
        return frozenset({match[5].lower()})  # "A blue car" is option A only if this is its text
    match = re.match(_TOKEN, plain)
    if match and _AFTER.fullmatch(plain, match.end()):
        return _among(match[1] or match[2], options)
    equal = [letter.lower() for letter, option in options.items() if same(text, option)]
    return frozenset(equal) if len(equal) == 1 else None


def stated_choice(text: str, options: Mapping[str, str] | None = None) -> Letters | None:
    """Returns the option that a longer response settles on, or None if it is not clear.

    Looked for in this order: "the answer is B"; "B is correct"; "I choose B". The last one of its
    form counts.
    """
    options = options or {}
    plain = _lines(text)
    for form in (_STATED, _SAID_RIGHT, _CHOSEN):
        found = [match for match in form.finditer(plain) if _settles(match, plain)]
        if form is _CHOSEN:
            found = [m for m in found if _stands_alone(m, plain, options)]
        if form is _SAID_RIGHT:
            found = [m for m in found if _is_option(m, plain) and _IS_RIGHT.match(plain, m.end())]
        if found:
            if cues.RETRACTED.search(plain, found[-1].end()):
                return None
            letters = _run(found[-1], plain)
            if form is _STATED and len(letters) == 1:
                said = plain[_start(found[-1]) :].split("\n", 1)[0]
                return agreeing(letters, said, options)
            return _among(letters, options) if letters else None
    return None


def last_choice(text: str, options: Mapping[str, str] | None = None) -> Letters | None:
    """Returns the only option of the last sentence that is not excluded ("B, not A"), or None."""
    sentences = [each for each in _SENTENCE.split(_lines(text)) if each and each.strip()]
    if not sentences or cues.HEDGE.search(sentences[-1]):
        return None
    short = len(sentences[-1].split()) <= _FEW_WORDS
    left = _letters_in(sentences[-1], alone=short)
    if len(left) != 1:
        return None
    if short and (cues.DENIED.search(sentences[-1]) or _something_said(sentences[-1])):
        return None
    (letter,) = left
    led = re.match(rf"\W*{letter}\s*[.):]", sentences[-1], re.IGNORECASE)
    at = 0 if led else sentences[-1].lower().rfind(f"({letter})")
    return agreeing(letter, sentences[-1][at:] if at >= 0 else letter, options or {})


def _something_said(sentence: str) -> bool:
    """Returns whether something else than that it is right is said of a letter: "B is a trap"."""
    found = re.finditer(_ALONE, sentence)
    return any(_VERB.match(sentence, m.end()) and not _GOOD.match(sentence, m.end()) for m in found)


def _letters_in(sentence: str, *, alone: bool = True) -> set[str]:
    """Returns the options that a sentence names and does not exclude.

    Args:
        sentence: the sentence.
        alone: a capital letter by itself counts, too, not only "(B)" and "option B".
    """
    return {
        _letter(match).lower()
        for match in _ANY_OPTION.finditer(sentence)
        if (alone or match[1] or len(match.group()) > 1)
        and not _NOT_BEFORE.search(_before(sentence, match))
        and not is_excluded(_after(sentence, match))
        and not cues.CONDITION.search(_before(sentence, match))
        and _is_option(match, sentence)
    }


def named_option(text: str, options: Mapping[str, str]) -> Letters | None:
    """Returns the only option whose text occurs in a sentence without a negation, or None."""
    said = f" {words_only(text)} "
    if names_letter(_plain(text)):
        return None  # a letter that contradicts the text, or that is rejected
    if re.search(r" (?:not|no|never|neither|nor|than|instead|except|or) |n't ", said):
        return None
    texts = {letter: words_only(option) for letter, option in options.items()}
    found = [letter for letter, option in texts.items() if option and f" {option} " in said]
    # "dark red" also contains "red": the longest text counts.
    found = [
        letter
        for letter in found
        if not any(f" {texts[letter]} " in f" {texts[o]} " for o in found if o != letter)
    ]
    return frozenset({found[0].lower()}) if len(found) == 1 else None


def letter_of(expected: str) -> str | None:
    """Returns the letter if a reference answer is an option: "B", "(B)", "(B) a car", "B. a car".

    Bare lower-case letters and letters after J count as variables, not as options.
    """
    plain = trim(latex_plain(expected).replace("$", ""))
    match = re.fullmatch(r"\(?\s*([A-Za-z])\s*\)?\s*[.:)]?", plain)
    if match is not None:
        return None if len(plain) == 1 and plain not in "ABCDEFGHIJ" else match[1].lower()
    match = re.match(r"(?:\(([A-J])\)|([A-J])[.):])\s+(?=\S)", plain)
    return None if match is None else (match[1] or match[2]).lower()


def letters_listed(expected: str) -> bool:
    """Returns whether a reference answer lists several options: "A, C", "(B)(D)", "A and B"."""
    plain = _plain(expected)
    return bool(_SEVERAL.fullmatch(plain)) and not re.search(r"[A-Z]{2}|[K-Z]", plain)


def text_of_option(expected: str) -> str:
    """Returns the text after the letter of a reference such as "(B) a car", else ""."""
    plain = trim(latex_plain(expected).replace("$", ""))
    match = re.match(r"(?:\([A-J]\)|[A-J][.):])\s+(?=\S)", plain)
    return plain[match.end() :] if match else ""


def options_by_letter(options: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Returns options by letter; a sequence is lettered from A and loses letters in its texts."""
    if options is None:
        return {}
    if isinstance(options, Mapping):
        return {str(key).lower(): str(value) for key, value in options.items()}
    lettered = {}
    for index, option in enumerate(options):
        letter = chr(ord("a") + index)
        text = re.sub(rf"^\s*\(?{letter}\s*[.:)]\s*", "", str(option), flags=re.IGNORECASE)
        lettered[letter] = text
    return lettered


def _lines(text: str) -> str:
    """Returns the text without LaTeX's and Markdown's marks, line by line."""
    plain = "\n".join(latex_plain(line).replace("$", " ").strip() for line in text.splitlines())
    return _MARKDOWN.sub("", unicodedata.normalize("NFKC", plain)).strip()


def _plain(text: str) -> str:
    plain = unicodedata.normalize("NFKC", latex_plain(text)).replace("$", " ")
    plain = _unwrapped(plain).replace("\\{", "{").replace("\\}", "}")
    plain = _MARKDOWN.sub("", " ".join(plain.split()))
    return plain.strip(" \"'“”‘’,;").rstrip(".!?。 ")


def _unwrapped(plain: str) -> str:
    """Removes text commands around formulas: "\\text{(A) \\frac{20}{3}}"."""
    while plain.endswith("}") and (command := _TEXT_COMMAND.match(plain)):
        plain = plain[command.end() : -1].strip()
    return plain


def _letter(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group)


def _among(letters: str, options: Mapping[str, str]) -> Letters | None:
    found = frozenset(letters.lower())
    return found if not options or found <= set(options) else None


def _checked(match: re.Match[str], plain: str, options: Mapping[str, str]) -> Letters | None:
    return agreeing(_letter(match), plain, options)


def agreeing(letter: str, rest: str, options: Mapping[str, str]) -> Letters | None:
    """Returns the letter unless the text after it is that of another option."""
    after = re.sub(rf"^\W*{letter}[^\w\\]*", "", rest, count=1, flags=re.IGNORECASE)
    if _EXCLUDED.match(after):
        return None
    others = [text for each, text in options.items() if each != letter.lower()]
    contradicts = any(same_answer(after, text) for text in others)
    if contradicts and not same_answer(after, options.get(letter.lower(), "")):
        return None
    return _among(letter, options)


def _run(match: re.Match[str], plain: str) -> str:
    """Returns the letters that a match begins with ("A and C"), or "" for alternatives."""
    letters, end = _letter(match), match.end()
    more = re.findall(_TOKEN, plain[_start(match) + 1 : end])
    letters += "".join(bracketed or alone for bracketed, alone in more)
    while another := _ANOTHER.match(plain, end):
        letters, end = letters + _letter(another), another.end()
    return "" if _ALTERNATIVE.match(plain, end) else letters


def _start(match: re.Match[str]) -> int:
    """Returns the position of the first letter of a match."""
    return next(match.start(i) for i, group in enumerate(match.groups(), 1) if group)


def _before(text: str, match: re.Match[str]) -> str:
    """Returns the few words before a match; all of a long text would take quadratic time."""
    return text[max(0, match.start() - _NEAR) : match.start()]


def _after(text: str, match: re.Match[str]) -> str:
    return text[match.end() : match.end() + _NEAR]


def _stands_alone(match: re.Match[str], plain: str, options: Mapping[str, str]) -> bool:
    """Returns whether what follows a letter says that it is right, is its text or explains it."""
    rest, text = plain[match.end() :], words_only(options.get(_letter(match).lower(), ""))
    says = re.match(r"\s+[a-z]", rest) and not _EXPLAINS.match(rest)
    own = bool(text) and words_only(rest.split("\n", 1)[0]).startswith(text)
    return not says or own or _GOOD.match(rest) is not None


def names_letter(text: str) -> bool:
    """Returns whether a text has a letter that may be an option, chosen or not."""
    return any(_is_option(match, text) for match in _ANY_OPTION.finditer(text))


def is_excluded(after: str) -> bool:
    """Returns whether the words after a letter reject it: "is wrong", "and C are wrong"."""
    others = re.match(_OTHERS, after)
    said = after[others.end() if others else 0 :]
    if _EXCLUDED.match(said.lstrip()) or _EXCLUDED.match(after.lstrip()):
        return True
    return re.match(r"\W+(?:wrong|incorrect|false)\W*(?:\n|$)", said, re.IGNORECASE) is not None


def _settles(match: re.Match[str], plain: str) -> bool:
    """Returns whether a letter is stated, not excluded, and not the word "a" or "I"."""
    if is_excluded(_after(plain, match)) or _IF_AFTER.match(_after(plain, match)):
        return False
    at = _start(match)
    sentence = plain[max(0, at - 60) : at].rsplit("\n", 1)[-1].rsplit(". ", 1)[-1]
    clause = cues.CLAUSE.split(sentence)[-1] + match.group()
    if any(each.search(clause) for each in (cues.DENIED, cues.CONDITION)):
        return False
    if any(each.search(sentence) for each in (_NOT_BEFORE, _OR_BEFORE, cues.HEDGE)):
        return False
    letter = _letter(match)
    bracketed = bool(match[1])
    after = _after(plain, match)
    if letter in "bcdefgh" and re.match(r"\s*(?:[.,;:]|$)", after):
        return True
    return bracketed or (letter.isupper() and not _is_word(letter, after))


def _is_word(letter: str, after: str) -> bool:
    """Returns whether a letter is the word "a" or "I", judged by what follows."""
    if letter.lower() not in _CAN_BE_WORDS or not re.match(r"\s+[a-z]", after):
        return False
    return not re.match(r"\s+(?:is|are|was|has|because|since|as|and|or|not)\b", after)


def _is_option(match: re.Match[str], sentence: str) -> bool:
    """Returns whether a letter is an option rather than a word, a point or a variable."""
    before, after = _before(sentence, match), _after(sentence, match)
    if match[1] or match.group().lower().startswith(("option", "choice")):
        return True
    if _is_word(match[2], after):
        return False
    if re.search(
        r"(?:point|angle|line|side|vertex|segment|plane|set|circle|figure|team|class|vitamin|type"
        r"|plan|level|building|letter|label|ratio of|[=<>+*/^-])\s*$",
        before,
        re.IGNORECASE,
    ):
        return False
    return re.match(r"\s*[=<>+*/^(-]", after) is None
