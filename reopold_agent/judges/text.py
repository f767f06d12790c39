"""Compares texts: plain form of LaTeX, normal form, same words."""
# ruff: noqa: RUF001  # the tables list look-alikes in order to replace them

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_MAX_NESTING = 8
"""Of ``\\text{}`` in ``\\text{}``: deeper nesting is noise, and each level costs a pass."""

_PRIME_COMMANDS = re.compile(r"\^\s*(?:\{\s*(?:\\prime\s*)+\}|\\prime(?![A-Za-z]))")
_UNIT_FRACTION = re.compile(
    r"\\[dt]?frac\s*\{\s*\\(?:text|mathrm)\s*\{([A-Za-z .]+)\}\s*\}"
    r"\s*\{\s*\\(?:text|mathrm)\s*\{([A-Za-z .]+)\}\s*(\^\s*\{?\d\}?)?\s*\}"
)
""" "\\frac{\\text{mi}}{\\text{h}}"."""

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
_DEGREE = re.compile(
    r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\s*\^\s*(?:\{\s*o\s*\}|o\b)|\\degree\b|\\textdegree\b|º"
)
_BRACED_COMMAS = re.compile(r"(?<![\d,.])\d+(?:\{,\}\d+)+")
_DOUBLED = re.compile(
    r"(?<!\\)\\\\(?=(?:boxed|text|frac|sqrt|begin|end|left|le\b|ge\b|in\b|cdot|pi\b))"
)
_TRIPLED = re.compile(r"(?<!\\)\\{3}(?=[a-z])")
_PUNCTUATION = frozenset("，：（）；？！")
"""Full-width signs that stand between answers and sentences, where each rule reads them itself."""

_HALF = {wide: chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5E)}
"""Full-width characters; the last of their block, a tilde, marks ranges."""

_HALF |= {ord("｛"): "\\{", ord("｝"): "\\}"}  # a set, not a group
_HALF_SIGNS = {wide: half for wide, half in _HALF.items() if chr(wide) not in _PUNCTUATION}
_SAME = _HALF | str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "’": "'", "‘": "'", "“": '"', "”": '"',
        "\u00a0": " ", "\u202f": " ", "\u2009": " ", "。": ".", "…": "...",
    }
)  # fmt: skip
_SYMBOLS = {
    "×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "π": "\\pi ", "∞": "\\infty ", "≤": "\\le ",
    "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ",
    "±": "\\pm ", "²": "^2", "³": "^3", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}",
    "¾": "\\frac{3}{4}", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ",
}  # fmt: skip
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]*[⁰¹⁴⁵⁶⁷⁸⁹⁻][⁰¹²³⁴⁵⁶⁷⁸⁹⁻]*")
"""Powers in raised digits, apart from a lone square or cube."""

_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_ROOT = re.compile(r"(?:√|根号)\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\w+))")

_ARTICLE = re.compile(r"^(?:the|a|an)\s+")


@lru_cache(maxsize=1024)  # one comparison asks for the same text several times
def latex_plain(text: str) -> str:
    """Unifies the spelling of mathematics: no delimiters, sizes, spaces or text commands.

    The value never changes. Row ends (two backslashes) of matrices are kept.
    """
    text = _with_currency(undoubled(text.translate(_SAME)))
    text = _RAISED.sub(lambda match: "^{" + match.group().translate(_LOWERED) + "}", text)
    for symbol, command in _SYMBOLS.items():
        if symbol in text:
            text = text.replace(symbol, command)
    text = _UNIT_FRACTION.sub(r"\\text{ \1/\2}\3", text)
    text = _ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2] or m[3]}}}", text)
    text = _FRACTION.sub(r"\\frac", _SIZE.sub("", _ONE_ROW.sub(_row, text)))
    text = _BRACED_COMMAS.sub(_separated, text).replace("{,}", ",")
    text = _PRIME_COMMANDS.sub(lambda found: "'" * found[0].count("prime"), text)
    text = text.replace("{.}", ".").replace("{:}", ":")
    text = text.replace("\\%", "%").replace("\\!", "")
    text = _DEGREE.sub("°", text.replace("\\varnothing", "\\emptyset"))
    text = text.replace("\\langle", "(").replace("\\rangle", ")")
    text = re.sub(r"(?<![A-Za-z])oo(?![A-Za-z])", r"\\infty ", text)
    text = re.sub(r"(?<!\\)\\\\\s*$", "", text)
    text = _SPACE.sub(_kept, _MARKS.sub(_kept, text))
    for _ in range(_MAX_NESTING):
        previous, text = text, _TEXT_COMMAND.sub(r"\1", text)
        if previous == text:
            break
    return " ".join(text.split())


_ONE_ROW = re.compile(
    r"\\begin\{(aligned|align|gathered|split|equation)(\*?)\}(.*?)\\end\{\1\2\}", re.DOTALL
)
"""An environment for displayed equations."""


def _row(match: re.Match[str]) -> str:
    row = match[3].strip().removesuffix("\\\\")
    return (
        match[0]
        if "\\\\" in row
        else row.replace("\\&", "\0").replace("&", " ").replace("\0", "\\&")
    )


def _with_currency(text: str) -> str:
    r"""Returns "$5 to $10" as "\$5 to \$10": of delimiters at least the last precedes no number."""
    signs = re.findall(r"(?<!\\)\$(\.?\d)?", text)
    return re.sub(r"(?<!\\)\$", r"\\$", text) if len(signs) > 1 and all(signs) else text


def half_width(text: str) -> str:
    """Returns a text with letters, digits and mathematical signs in place of full-width ones."""
    return text if text.isascii() else text.translate(_HALF_SIGNS)


def undelimited(text: str) -> str:
    """Removes spaces and "$" around mathematics; beside numbers alone it is a currency sign."""
    text = _with_currency(text.strip())
    if text.count("$") == 1:
        if "\\$" in text:
            return text
        if re.fullmatch(r"\$\s*[-+]?[\d.,]+(?:\s*[a-z]+)?|[-+]?[\d.,]+\s*\$", text, re.IGNORECASE):
            return text.replace("$", "\\$")
    return text.strip(" $")


def plain_text(text: str) -> str:
    """Returns a text without LaTeX: "\\$40\\%" is "$40%", "\\text{Red}" is "Red"."""
    if "\\" not in text and (text.count("$") != 2 or _with_currency(text) != text):
        return text  # one "$" is a currency sign
    plain = latex_plain(text)
    plain = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", plain)
    for symbol, command in _SYMBOLS.items():
        plain = plain.replace(command.strip(), symbol) if command.startswith("\\") else plain
    return re.sub(r"\\(?=[#&_{}])", "", plain)


def _separated(match: re.Match[str]) -> str:
    """Writes "1{,}234" as "1,234", and "3{,}5", whose comma is no separator, as "3.5"."""
    found = match.group()
    thousands = re.fullmatch(r"[1-9]\d{0,2}(?:\{,\}\d{3})+", found)
    return found.replace("{,}", "." if found.count(",") == 1 and not thousands else ",")


def _kept(match: re.Match[str]) -> str:
    # Row ends come first in the patterns: "\\\\ x" is not a backslash and a LaTeX space.
    found = match.group()
    return found if found == "\\\\" else "$" if found == "\\$" else " "


def undoubled(text: str) -> str:
    """Undoes a double escape of LaTeX, where every backslash is doubled, also in row ends.

    Three backslashes before a command are a row end and a command in a matrix, else a mistake.
    """
    if "\\begin" not in text:
        text = _TRIPLED.sub(r"\\", text)
    return text.replace("\\\\", "\\") if _DOUBLED.search(text) else text


def trim(text: str) -> str:
    """Removes punctuation and quotes around a text."""
    text = " ".join(text.split()).strip(" ,;:\"'`*").rstrip(" .,;:\"'`*?")
    # The point of ".5" and the sign of "5!" (120) belong to the number.
    text = text if re.match(r"\.\d", text) else text.lstrip(" .,;:!\"'`*")
    factorial = re.search(r"(?:[\d})]|(?<![^\W\d_])[^\W\d_])!+$", text)
    return text if factorial else text.rstrip(" .,;:!\"'`*?")


def normal(text: str) -> str:
    """Returns a form without differences in case, accents' encoding, outer punctuation, spaces."""
    plain = trim(latex_plain(text).replace("$", ""))
    return unicodedata.normalize("NFC", plain.casefold()).strip()


def words_only(text: str) -> str:
    """Returns `normal` without leading articles, hyphens and inner punctuation."""
    text = _ARTICLE.sub("", normal(text))
    return " ".join(re.sub(r"[^\w\s%.+/&-]|(?<=\w)-(?=\w)|\.(?!\d)", " ", text).split())


def same_text(answer: str, expected: str) -> bool:
    """Returns whether two phrases have the same words; false for empty ones."""
    mine, wanted = normal(answer), normal(expected)
    if mine == wanted:
        return bool(mine)
    if len({sign for sign in map(_currency, (answer, expected)) if sign}) > 1:
        return False
    mine, wanted = words_only(answer), words_only(expected)
    same = mine == wanted and bool(re.search(r"\w", mine))
    return same and not _signs_differ(normal(answer), normal(expected))


def same_answer(answer: str, expected: str) -> bool:
    """Returns whether two answers have the same words, and formulas the same symbols."""
    return same_text(answer, expected) and same_symbols(answer, expected)


def same_symbols(answer: str, expected: str) -> bool:
    """Returns whether two answers with the same words (`same_text`) have the same symbols.

    Letters in capitals and in small letters are two symbols (R and r), and f' is not f; but words,
    and what is in a text command, are written either way.
    """
    if primes_differ(answer, expected) or sizes_differ(answer, expected):
        return False
    formula = _FORMULA.search(answer) or _FORMULA.search(expected)
    return not formula or _symbols(answer) == _symbols(expected)


def primes_differ(answer: str, expected: str) -> bool:
    """Returns whether primes stand at other symbols (f' and f), or others at numbers (' and '').

    A number with primes, minutes or feet, beside one without is one with a unit.
    """
    symbols, values = [], []
    for each in map(latex_plain, (answer, expected)):
        found = [(one.casefold(), primes) for one, primes in _PRIMES.findall(each)]
        symbols.append([pair for pair in found if not pair[0].isdigit()])
        values.append([primes for one, primes in found if one.isdigit() and primes])
    primed = any(primes for each in symbols for _, primes in each)
    return (primed and symbols[0] != symbols[1]) or (all(values) and values[0] != values[1])


def sizes_differ(answer: str, expected: str) -> bool:
    """Returns whether units differ in a letter whose case tells the size: mW and MW, Gb and GB.

    "mw" and "MPH" are written without care, and say nothing.
    """
    mine, wanted = _SIZES.findall(answer), _SIZES.findall(expected)
    return bool(mine and wanted) and mine != wanted and answer.lower() == expected.lower()


_SIZES = re.compile(r"\b[mM](?=(?:Hz|W|J|A|V|g|m|s|L|l|N|Pa|eV)\b)|(?<=\b[KkMGT])[bB](?=\b|ps)")
_FORMULA = re.compile(r"\\[A-Za-z]|[=^_<>+*/]")
_PRIMES = re.compile(r"((?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|[)}\]]|\d(?!\d))((?:'|\N{PRIME})*)")
_LETTERS = re.compile(r"\\?[A-Za-z]+")


def _symbols(text: str) -> list[str]:
    plain = latex_plain(_TEXT_COMMAND.sub(" ", text))
    return [each if _is_symbols(each) else each.casefold() for each in _LETTERS.findall(plain)]


def _is_symbols(letters: str) -> bool:
    """Returns whether letters are a LaTeX command or a product of symbols, not a word."""
    usual = letters.islower() or letters.isupper() or letters.istitle()
    return letters.startswith("\\") or len(letters) < 3 or not usual


def _currency(text: str) -> str:
    """Returns the currency signs in a text; two "$" are delimiters of mathematics."""
    found = "".join(sorted({sign for sign in text if sign in "€£¥₹₽₩"}))
    return found or "$" * (text.count("$") == 1 or _with_currency(text) != text)


def joined(text: str) -> str:
    """Returns the letters and digits of a text, so that "e-mail" is "email" and "U.S." is "US".

    Points, commas and hyphens between digits stay.
    """
    plain = re.sub(r"\s+to\s+(?=\d)|\s*-\s*(?=\d)", "-", _ARTICLE.sub("", normal(text)))
    return re.sub(r"(?<!\d)[\s.,'-]+|[\s.,'-]+(?!\d)", "", plain)


def _signs_differ(answer: str, expected: str) -> bool:
    """Returns whether mathematical signs differ: "x - 1" is not "x 1" without punctuation."""
    return any(answer.count(sign) != expected.count(sign) for sign in "+*/^=<>\\|()[]{}-!")
