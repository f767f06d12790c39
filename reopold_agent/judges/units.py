"""Recognises units after numbers, and compares them."""

from __future__ import annotations

import re

from reopold_agent.judges.text import latex_plain, sizes_differ

_KNOWN = {
    "m": "m meter metre",
    "cm": "cm centimeter centimetre",
    "mm": "mm millimeter millimetre",
    "km": "km kilometer kilometre",
    "in": "in inch inche",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "g": "g gram",
    "kg": "kg kilogram",
    "mg": "mg milligram",
    "lb": "lb pound",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "l": "l liter litre",
    "ml": "ml milliliter millilitre",
    "deg": "° deg degree",
    "rad": "rad radian",
    "cent": "cent",
    "dollar": "dollar buck usd us",
    "n": "newton",
    "j": "j joule",
    "w": "watt",
    "mph": "mph",
}
_SYNONYMS = {
    "celsius": "° deg degree centigrade c", "fahrenheit": "° deg degree f", "kelvin": "k",
    "£": "gbp pound quid", "€": "eur euro", "₹": "rs inr rupee", "₽": "rub ruble rouble",
    "yen": "¥ jpy", "yuan": "¥ cny rmb", "₩": "krw won", "cent": "¢",
    "person": "people", "man": "men", "woman": "women", "child": "children kid",
    "kb": "kilobyte", "mb": "megabyte", "gb": "gigabyte", "tb": "terabyte",
    "hz": "hertz", "khz": "kilohertz", "mhz": "megahertz", "ghz": "gigahertz",
    "kw": "kilowatt", "kj": "kilojoule", "v": "volt", "a": "amp ampere", "ohm": "Ω",
    "pa": "pascal", "kpa": "kilopascal", "mol": "mole", "kcal": "kilocalorie", "cal": "calorie",
    "oz": "ounce", "gal": "gallon", "ton": "tonne t", "kg": "kilo kilogramme", "g": "gramme",
    "week": "wk", "month": "mo", "bc": "bce", "ad": "ce",
    "january": "jan", "february": "feb", "march": "mar", "april": "apr", "june": "jun",
    "july": "jul", "august": "aug", "september": "sep sept", "october": "oct", "november": "nov",
    "december": "dec",
}  # fmt: skip
"""Other words for what need not be a simple unit."""

_ALIASES = {alias: name for name, aliases in _KNOWN.items() for alias in aliases.split()}
_MEANINGS: dict[str, set[str]] = {}
for _names in (_KNOWN, _SYNONYMS):
    for _name, _aliases in _names.items():
        for _alias in (_name, *_aliases.split()):
            _MEANINGS.setdefault(_alias, {_alias}).add(_name)
_RATES = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "mps": "m/s"}
_RATE = re.compile(rf"\b({'|'.join(_RATES)})\b", re.IGNORECASE)
_INVERSE = re.compile(r"[\s·*]*\b([a-z]+)\s*\^\s*\{?\s*-(\d)\s*\}?", re.IGNORECASE)
_TOKEN = re.compile(r"[^\W\d_]+|[$€£¥₹₽₩¢%°/]|\^\s*\{?\s*\d")
_AREA = re.compile(r"\b(?:square\s+|sq\.?\s*(?!uare))([a-z]+)", re.IGNORECASE)
_VOLUME = re.compile(r"\b(?:cubic|cu\.?)\s+([a-z]+)", re.IGNORECASE)
_POWER = re.compile(r"([a-z°]+)\s*(?:\^\s*\{?\s*([23])\s*\}?)?", re.IGNORECASE)
_WORDS = re.compile(r"[a-zµμΩ]{2,}(?:[\s-][a-z]+){0,4}", re.IGNORECASE)
_COMPOUND = re.compile(
    r"[a-zµμΩ°]+\.?(?:\s*\^\s*\{?\s*-?\d\s*\}?|[23](?!\d))?"
    r"(?:(?:\s*(?:/|\\cdot|·|\*|\bper\b)\s*|\s+)[a-zµμΩ°]+\.?(?:\s*\^\s*\{?\s*-?\d\s*\}?)?){0,4}",
    re.IGNORECASE,
)
_NOT_UNITS = frozenset(
    {"and", "or", "to", "plus", "minus", "times", "pi", "is", "if", "not", "mod"}
)

_LETTERS = "mgshlLNJWVAKFC"
"""Units of a single letter."""


def is_unit(text: str) -> bool:
    """Returns whether the text after a number can be a unit or a counted noun."""
    words = re.findall(r"[a-zµμΩ]+", text, re.IGNORECASE)
    if text.strip() == "°" or re.fullmatch(r"°\s*[CF]?", text.strip()):
        return True
    if not words or _NOT_UNITS & {word.lower() for word in words}:
        return False
    if _COMPOUND.fullmatch(text) is None and _WORDS.fullmatch(text) is None:
        return False
    if len(words) == 1 and len(words[0]) == 1:
        # "5 x" and "2 n" are products; "5 m" is a length.
        return words[0] in _LETTERS
    return True


def is_product(unit: str, *, glued: bool) -> bool:
    """Returns whether letters after a number are certainly a product of symbols, not a unit.

    Args:
        unit: the letters, perhaps with powers: "xy", "ab^2", "a b".
        glued: whether they follow the number without a space. "2pq" is a product then; "2 pq" may
            be a unit of another language, and only the usual names of variables are symbols.
    """
    plain = re.sub(r"\s*\^\s*\{?\s*\d+\s*\}?", "", unit.replace("\\cdot", " ")).strip()
    letters = re.sub(r"[\s*·]+", "", plain)
    if not re.fullmatch(r"[a-z]{1,3}|[A-Z]{1,3}", letters):
        return False
    if letters != plain:  # "a b"; "N m" has two cases
        return any(letter not in _LETTERS for letter in letters)
    word = letters.lower()
    if glued and len(word) == 1:
        return True
    if word in _ABBREVIATIONS or {word, word.removesuffix("s"), letters} & _MEANINGS.keys():
        return letters in ("ad", "bc")  # years, in capitals only
    rising = letters == "".join(sorted(set(letters)))
    if glued and word != "pi":
        return len(word) < 3 or rising or not re.search("[aeiou]", word)
    return rising and len(word) > 1 and bool(re.fullmatch("[xyz]+|[abc]+|mn|pq|uv", word))


_ABBREVIATIONS = frozenset({
    "ms", "us", "ns", "nm", "um", "pm", "am", "dm", "dl", "cl", "cc", "hp", "px", "pt", "pts",
    "pcs", "sq", "db", "ev", "oz", "ha", "gm", "mw", "gw", "mj", "mv", "kv", "ma", "kn", "kt",
    "ah", "wh", "kwh", "mwh", "mah", "fps", "rpm", "bpm", "ppm", "ppb", "dpi", "psi", "atm",
    "bar", "bps", "mps", "gps", "mmhg", "std", "stk", "st", "nd", "rd", "th", "id",
})  # fmt: skip
"""Short units, and words beside numbers, that the tables above lack."""


def dimension_of(unit: str) -> tuple[str, int] | None:
    """Returns name and power of a simple unit ("square inches": ("in", 2)); None if unknown."""
    text = _AREA.sub(r"\1^2", unit.strip())
    text = _VOLUME.sub(r"\1^3", text).strip(" .{}")
    match = _POWER.fullmatch(text)
    if match is None:
        return None
    word = match[1] if match[1] in _ALIASES else match[1].lower()
    name = _ALIASES.get(word) or (_ALIASES.get(word.removesuffix("s")) if len(word) > 2 else None)
    return None if name is None else (name, int(match[2] or 1))


def parted(answer: str) -> tuple[str, str]:
    """Returns a value and the known unit behind it: "2\\sqrt{3}\\text{ m/s}", "36\\pi cm^2".

    Few letters are a unit only in a text command, or if they are the usual ones of lengths and the
    like: "2\\sqrt{3} N" and "\\frac12 mg" may be products.

    Returns:
        The value without its unit, in plain LaTeX, and the unit; without one the answer and "".
    """
    spelled = _SPELLED.search(answer) is not None
    plain = latex_plain(_SPELLED_START.sub(r" \g<0>", answer)).replace("$", "").strip(" .")
    for gap in _GAP.finditer(plain):
        unit = plain[gap.end() :]
        words = _LETTERS_ALONE.findall(unit)
        usual = "/" in unit or all(len(each) > 2 or each in _PLAIN for each in words)
        if _UNIT.fullmatch(unit) and all(map(_is_known, words)) and (spelled or usual):
            return plain[: gap.start()], unit
    return answer, ""


_SPELLED_START = re.compile(r"\\(?:text(?:rm|bf|it)?|mathrm|mbox)\s*\{")
_SPELLED = re.compile(rf"{_SPELLED_START.pattern}[^{{}}]*\}}\s*(?:\^\s*\{{?-?\d\}}?)?[\s.$]*\Z")
_PLAIN = frozenset({"m", "cm", "mm", "km", "dm", "ft", "in", "yd", "kg", "lb", "hr", "Hz"})
_GAP = re.compile(r"(?<=[\w})°])\s+(?=[A-Za-zµμΩ])|(?<=[})])(?=[A-Za-zµμΩ])")
_UNIT = re.compile(
    r"[A-Za-zµμΩ]+(?:\s*\^\s*\{?\s*-?\d\s*\}?|[23](?!\d))?"
    r"(?:(?:\s*/\s*|\s*\\cdot\s*|\s*·\s*|\s+)[A-Za-zµμΩ]+(?:\s*\^\s*\{?\s*-?\d\s*\}?|[23](?!\d))?){0,4}"
)
_LETTERS_ALONE = re.compile(r"(?<!\\)\b[A-Za-zµμΩ]+")
_BESIDE_UNITS = frozenset({"unit", "units", "per", "square", "sq", "squared", "cubic", "cubed"})


def _is_known(word: str) -> bool:
    if len(word) == 1:
        return word in _LETTERS
    known = _ABBREVIATIONS | _BESIDE_UNITS | _MEANINGS.keys() | _RATES.keys()
    return word.lower() in _BESIDE_UNITS or bool(_meaning(word) & known)


def same_unit(mine: str, wanted: str) -> bool | None:
    """Returns whether the words and signs beside two numbers agree; None if this is not certain.

    What only one side has, alone or after what both have ("40 years" and "40 years old"), makes no
    difference; a power or a "per" does.
    """
    if sizes_differ(mine, wanted):
        return None
    first, second = dimension_of(mine), dimension_of(wanted)
    if first is not None and second is not None:
        return first == second
    left, right = _meanings(mine), _meanings(wanted)
    if not left or not right:
        return True
    joined = [re.sub(r"[\s-]", "", unit.lower()) for unit in (mine, wanted)]
    if joined[0] == joined[1]:
        return True
    short, long = sorted((left, right), key=len)
    if any(not a & b for a, b in zip(short, long, strict=False)):
        return None
    more = long[len(short) :]
    return None if more and more[0] & _CHANGES else True


_CHANGES = {"/", "^2", "^3", "^4"}


def _meanings(unit: str) -> list[set[str]]:
    """Returns what each word and sign of a unit may mean."""
    unit = re.sub(r"(?<=[a-z])\.(?=[a-z])|\\cdot\b|[·*]", "", unit, flags=re.IGNORECASE)
    unit = _VOLUME.sub(r"\1^3", _AREA.sub(r"\1^2", unit))
    unit = re.sub(r"\s+squared\b", "^2", re.sub(r"\s+cubed\b", "^3", unit))
    unit = re.sub(r"(?<=[a-z])([23])\b", r"^\1", _INVERSE.sub(r"/\1^\2", unit))
    unit = re.sub(r"\bper\b", "/", unit, flags=re.IGNORECASE).replace("^1", "")
    unit = _RATE.sub(lambda match: _RATES[match[1].lower()], unit)
    found: list[set[str]] = []
    for token in _TOKEN.findall(unit):
        means = _meaning(re.sub(r"[\s{]", "", token))
        # "degrees Celsius" are "Celsius", and "$5 dollars" are "$5".
        if found and found[-1] & means:
            found[-1] = found[-1] & means
        else:
            found.append(means)
    return found


def _meaning(word: str) -> set[str]:
    """Returns the names of a unit, and a word itself in singular and small letters."""
    lower = word.lower()
    forms = {lower, *([lower[:-1]] if len(lower) > 3 and lower.endswith("s") else [])}
    forms |= {lower[:-2]} if len(lower) > 4 and lower.endswith("es") else set()
    forms |= {lower[:-3] + "y"} if len(lower) > 4 and lower.endswith("ies") else set()
    forms |= {lower[:-1]} if len(lower) == 3 and lower[:-1] in _MEANINGS else set()
    if word in _MEANINGS:
        forms.add(word)
    return forms.union(*(_MEANINGS.get(form, ()) for form in forms))
