"""Words: one normal form, options by letter or text, yes and no."""
# ruff: noqa: RUF001  # the tables of look-alikes are there to replace them

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

_MAX_NESTING = 8
"""``\\text{}`` in ``\\text{}``: deeper than this is noise, and each level costs a pass."""

_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt|cal)|mbox|hbox|operatorname|bf|rm"
    r"|emph|underline|bold(?:symbol)?)\s*\*?\s*\{([^{}]*)\}"
)
_MARKS = re.compile(r"\\\\|\\\$|\$|\\[()\[\]]")
_SPACE = re.compile(
    r"\\\\|\\[,;:!> ]|~|\\q?quad\b|\\(?:displaystyle|textstyle|limits)\b|\\hspace\{[^{}]*\}"
)
_SIZE = re.compile(
    r"\\(?:left|right|[bB]ig{1,2}[lrm]?)\b\s*\.?(?=\s*(?:[()\[\]|.]|\\[{}|]|\\[lr]))"
)
_FRACTION = re.compile(r"\\[dtc]frac\b")
_DEGREE = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b|\\textdegree\b|º")
_DOUBLED = re.compile(r"\\\\(?=(?:boxed|text|frac|sqrt|begin|end|left|le\b|ge\b|in\b|cdot|pi\b))")
_SAME = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "’": "'", "‘": "'", "“": '"', "”": '"',
        "\u00a0": " ", "\u202f": " ", "\u2009": " ", "，": ",", "：": ":", "（": "(", "）": ")",
        "％": "%", "＄": "$", "。": ".", "；": ";", "？": "?", "！": "!",
    }
)  # fmt: skip
_SYMBOLS = {
    "×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "π": "\\pi ", "∞": "\\infty ", "≤": "\\le ",
    "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ",
    "±": "\\pm ", "²": "^2", "³": "^3", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ",
}  # fmt: skip
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\w+))")

_YES = frozenset({"yes", "true", "correct", "right", "y"})
_NO = frozenset({"no", "false", "incorrect", "wrong", "n"})
_ARTICLE = re.compile(r"^(?:the|a|an)\s+")
_LETTER = re.compile(r"\(?\s*([a-z])\s*\)?\s*[.:)]?$")
_LED = re.compile(r"(?:\(\s*([a-z])\s*\)|([a-z])\s*[.:)])(?:\s|$)")
_NAMED = re.compile(r"(?:option|choice|answer)\s*:?\s*\(?([a-z])\)?\s*[.:)]?(?:\s|$)")


def latex_plain(text: str) -> str:
    """The same mathematics with fewer spellings: no delimiters, sizes, spaces or text commands.

    Spelling only; the value never changes. Row ends (two backslashes) of matrices are kept.
    """
    text = undoubled(text.translate(_SAME))
    for symbol, command in _SYMBOLS.items():
        if symbol in text:
            text = text.replace(symbol, command)
    text = _ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2] or m[3]}}}", text)
    text = _FRACTION.sub(r"\\frac", _SIZE.sub("", text))
    text = text.replace("{,}", ",").replace("\\%", "%").replace("\\!", "")
    text = _DEGREE.sub("°", text.replace("\\varnothing", "\\emptyset"))
    for _ in range(_MAX_NESTING):
        previous, text = text, _TEXT_COMMAND.sub(r"\1", text)
        if previous == text:
            break
    text = _SPACE.sub(_kept, _MARKS.sub(_kept, text))
    return " ".join(text.split())


def _kept(match: re.Match[str]) -> str:
    # Row ends come first in the patterns: "\\\\ x" is no backslash with a LaTeX space.
    found = match.group()
    return found if found == "\\\\" else "$" if found == "\\$" else " "


def undoubled(text: str) -> str:
    """LaTeX that was escaped twice on its way here: every backslash is doubled, row ends too."""
    return text.replace("\\\\", "\\") if _DOUBLED.search(text) else text


def trim(text: str) -> str:
    """Without punctuation and quotes around it."""
    text = " ".join(text.split()).strip(" ,;:\"'`*").rstrip(" .,;:\"'`*?")
    # The point of ".5" and the sign of "5!" (120) belong to the number.
    text = text if re.match(r"\.\d", text) else text.lstrip(" .,;:!\"'`*")
    return text if re.search(r"[\w})]!$", text) else text.rstrip(" .,;:!\"'`*?")


def normal(text: str) -> str:
    """Case, accents' spelling, punctuation around and spaces do not matter in this form."""
    plain = trim(latex_plain(text).replace("$", ""))
    return unicodedata.normalize("NFC", plain.casefold()).strip()


def words_only(text: str) -> str:
    """`normal` without articles in front, hyphens and inner punctuation."""
    text = _ARTICLE.sub("", normal(text))
    return " ".join(re.sub(r"[^\w\s%.+/&-]|(?<=\w)-(?=\w)|\.(?!\d)", " ", text).split())


def same_text(answer: str, expected: str) -> bool:
    """Whether two phrases are the same words; never for empty ones."""
    mine, wanted = normal(answer), normal(expected)
    if mine == wanted:
        return bool(mine)
    mine, wanted = words_only(answer), words_only(expected)
    return mine == wanted and bool(re.search(r"\w", mine)) and not _signs_differ(answer, expected)


def _signs_differ(answer: str, expected: str) -> bool:
    """Dropping punctuation may not drop mathematics: "x - 1" is not "x 1"."""
    return any(answer.count(sign) != expected.count(sign) for sign in "+*/^=<>\\|()[]{}-!")


def yes_no(text: str) -> bool | None:
    """True for yes, False for no, None if the text is neither or both."""
    words = re.findall(r"[a-z]+", normal(text))
    said = {word for word in words if word in _YES or word in _NO}
    if not words or not said:
        return None
    kinds = {word in _YES for word in said}
    if len(kinds) == 2:
        # "No, that is not right": the first word answers, the rest explains.
        return (words[0] in _YES) if words[0] in _YES | _NO and words[1:2] != ["and"] else None
    if "not" in words[:3] and words[0] not in _YES | _NO:
        return None
    return kinds.pop() if words[0] in said or len(words) <= 4 else None


def option_letter(text: str, options: Mapping[str, str] | None = None) -> str | None:
    """The option that a text names, as a lower-case letter.

    Args:
        text: "B", "(b)", "B. a red car", "option B" or, where ``options`` are known, the text
            of one of them.
        options: text by letter.
    """
    mine = normal(text)
    for pattern in (_LETTER, _NAMED):
        match = pattern.fullmatch(mine) or (pattern is _NAMED and pattern.match(mine)) or None
        if match:
            return str(match.group(1))
    match = _LED.match(mine)
    if match:
        return match.group(1) or match.group(2)
    if options:
        named = [letter.lower() for letter, option in options.items() if same_text(text, option)]
        if len(named) == 1:
            return named[0]
    return None


def letter_of(expected: str) -> str | None:
    """The letter if a reference answer is an option's letter, bare or in brackets.

    Bare lower-case letters, and those after J, are variables rather than options.
    """
    plain = trim(latex_plain(expected).replace("$", ""))
    match = _LETTER.fullmatch(plain.lower())
    if match is None or (len(plain) == 1 and plain not in "ABCDEFGHIJ"):
        return None
    return match.group(1)


def options_by_letter(options: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Options as a mapping; a sequence is lettered from A, and letters in the texts are dropped."""
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
