"""Reads counts in words of other languages than English: "drei", "trois chats", "三个", "세 개"."""
# ruff: noqa: RUF001  # letters of other scripts are meant

from __future__ import annotations

import re
from functools import cache

from reopold_agent.judges import cues
from reopold_agent.judges.numbers import parse_quantity
from reopold_agent.judges.text import normal

WORDS = {
    "ar": (
        "صفر|واحد|اثنان/اثنين/اثنتان|ثلاثة/ثلاث|أربعة/أربع|خمسة/خمس|ستة/ست|سبعة/سبع|"
        "ثمانية/ثماني/ثمان|تسعة/تسع|عشرة/عشر|أحد عشر|اثنا عشر|ثلاثة عشر|أربعة عشر|"
        "خمسة عشر|ستة عشر|سبعة عشر|ثمانية عشر|تسعة عشر|عشرون"
    ),
    "bn": (
        "শূন্য|এক/একটি|দুই/দুটি|তিন/তিনটি|চার/চারটি|পাঁচ/পাঁচটি|ছয়|সাত|আট|নয়|দশ|"
        "এগারো|বারো|তেরো|চৌদ্দ|পনের|ষোল|সতের|আঠারো|উনিশ|বিশ"
    ),
    "cs": (
        "nula|jedna/jeden/jedno|dva/dvě|tři|čtyři|pět|šest|sedm|osm|devět|deset|"
        "jedenáct|dvanáct|třináct|čtrnáct|patnáct|šestnáct|sedmnáct|osmnáct|devatenáct|"
        "dvacet"
    ),
    "da": (
        "nul|||tre||fem|seks|syv|otte|||elleve|tolv|tretten|fjorten|femten|seksten|"
        "sytten|atten|nitten|tyve"
    ),
    "de": (
        "null|eins/ein/eine|zwei|drei|vier|fünf|sechs|sieben|acht|neun|zehn|elf|zwölf|"
        "dreizehn|vierzehn|fünfzehn|sechzehn|siebzehn|achtzehn|neunzehn|zwanzig"
    ),
    "el": (
        "μηδέν|ένα/ένας/μία|δύο|τρία/τρεις|τέσσερα/τέσσερις|πέντε|έξι|επτά/εφτά|"
        "οκτώ/οχτώ|εννέα/εννιά|δέκα|έντεκα|δώδεκα|δεκατρία|δεκατέσσερα|δεκαπέντε|"
        "δεκαέξι|δεκαεπτά|δεκαοκτώ|δεκαεννέα|είκοσι"
    ),
    "es": (
        "cero|uno/un/una|dos|tres|cuatro|cinco|seis|siete|ocho|nueve|diez|once|doce|"
        "trece|catorce|quince|dieciséis/dieciseis|diecisiete|dieciocho|diecinueve|"
        "veinte"
    ),
    "fa": (
        "صفر|یک|دو|سه|چهار|پنج|شش|هفت|هشت||ده|یازده|دوازده|سیزده|چهارده|پانزده|شانزده|"
        "هفده|هجده|نوزده|بیست"
    ),
    "fi": (
        "nolla|yksi|kaksi|kolme|neljä|viisi|kuusi|seitsemän|kahdeksan|yhdeksän|"
        "kymmenen|yksitoista|kaksitoista|kolmetoista|neljätoista|viisitoista|"
        "kuusitoista|seitsemäntoista|kahdeksantoista|yhdeksäntoista|kaksikymmentä"
    ),
    "fr": (
        "zéro|un/une|deux|trois|quatre|cinq|six|sept|huit|neuf|dix|onze|douze|treize|"
        "quatorze|quinze|seize|dix-sept|dix-huit|dix-neuf|vingt"
    ),
    "he": (
        "אפס|אחת/אחד|שתיים/שניים/שני/שתי|שלוש/שלושה|ארבע/ארבעה|חמש/חמישה|שש/שישה|"
        "שבע/שבעה|שמונה|תשע/תשעה|עשר/עשרה|אחת עשרה|שתים עשרה|שלוש עשרה|ארבע עשרה|"
        "חמש עשרה|שש עשרה|שבע עשרה|שמונה עשרה|תשע עשרה|עשרים"
    ),
    "hi": (
        "शून्य|एक|दो|तीन|चार|पांच/पाँच|छह/छः|सात|आठ|नौ|दस|ग्यारह|बारह|तेरह|चौदह|पंद्रह|"
        "सोलह|सत्रह|अठारह|उन्नीस|बीस"
    ),
    "hu": (
        "nulla|egy|kettő/két|három|négy|öt||hét|nyolc|kilenc|tíz|tizenegy|"
        "tizenkettő/tizenkét|tizenhárom|tizennégy|tizenöt|tizenhat|tizenhét|tizennyolc|"
        "tizenkilenc|húsz"
    ),
    "id": (
        "nol|satu|dua|tiga|empat|lima|enam|tujuh|delapan|sembilan|sepuluh|sebelas|"
        "dua belas|tiga belas|empat belas|lima belas|enam belas|tujuh belas|"
        "delapan belas|sembilan belas|dua puluh"
    ),
    "it": (
        "zero|uno/un/una|due|tre/trè|quattro|cinque|sei|sette|otto|nove|dieci|undici|"
        "dodici|tredici|quattordici|quindici|sedici|diciassette|diciotto|diciannove|"
        "venti"
    ),
    "ja": (
        "ゼロ|ひとつ/一つ/ひとり/一人|ふたつ/二つ/ふたり/二人|みっつ/三つ|よっつ/四つ|いつつ/五つ|むっつ/六つ|ななつ/七つ|やっつ/八つ|"
        "ここのつ/九つ|とお"
    ),
    "ko": (
        "영|하나/한/일|둘/두|셋/세|넷/네|다섯|여섯|일곱|여덟|아홉|열|열하나/열한|열둘/열두|열셋/열세|열넷/열네|열다섯|열여섯|열일곱|"
        "열여덟|열아홉|스물/스무"
    ),
    "nl": (
        "nul|één/een|twee|drie|vier|vijf|zes|zeven|acht|negen|tien|elf|twaalf|dertien|"
        "veertien|vijftien|zestien|zeventien|achttien|negentien|twintig"
    ),
    "pl": (
        "zero|jeden/jedna/jedno|dwa/dwie|trzy|cztery|pięć|sześć|siedem|osiem|dziewięć|"
        "dziesięć|jedenaście|dwanaście|trzynaście|czternaście|piętnaście|szesnaście|"
        "siedemnaście|osiemnaście|dziewiętnaście|dwadzieścia"
    ),
    "pt": (
        "zero|um/uma|dois/duas|três|quatro|cinco|seis|sete|oito|nove|dez|onze|doze|"
        "treze|catorze/quatorze|quinze|dezesseis/dezasseis|dezessete/dezassete|dezoito|"
        "dezenove/dezanove|vinte"
    ),
    "ro": (
        "zero|unu/un/una|doi/două|trei|patru|cinci|șase|șapte|opt|nouă|zece|unsprezece|"
        "doisprezece|treisprezece|paisprezece|cincisprezece|șaisprezece|șaptesprezece|"
        "optsprezece|nouăsprezece|douăzeci"
    ),
    "ru": (
        "ноль/нуль|один/одна/одно|два/две/двое|три/трое|четыре|пять|шесть|семь|восемь|"
        "девять|десять|одиннадцать|двенадцать|тринадцать|четырнадцать|пятнадцать|"
        "шестнадцать|семнадцать|восемнадцать|девятнадцать|двадцать"
    ),
    "sv": (
        "noll|ett|två|tre|fyra|fem|sex|sju|åtta|nio|tio|elva|tolv|tretton|fjorton|"
        "femton|sexton|sjutton|arton|nitton|tjugo"
    ),
    "th": (
        "ศูนย์|หนึ่ง|สอง|สาม|สี่|ห้า|หก|เจ็ด|แปด|เก้า|สิบ|สิบเอ็ด|สิบสอง|สิบสาม|สิบสี่|"
        "สิบห้า|สิบหก|สิบเจ็ด|สิบแปด|สิบเก้า|ยี่สิบ"
    ),
    "tr": (
        "sıfır|bir|iki|üç|dört|beş|altı|yedi|sekiz|dokuz||onbir/on bir|oniki/on iki|"
        "onüç/on üç|ondört/on dört|onbeş/on beş|onaltı/on altı|onyedi/on yedi|"
        "onsekiz/on sekiz|ondokuz/on dokuz|yirmi"
    ),
    "uk": (
        "нуль|один/одна/одне|два/дві|три|чотири|п'ять|шість|сім|вісім|дев'ять|десять|"
        "одинадцять|дванадцять|тринадцять|чотирнадцять|п'ятнадцять|шістнадцять|"
        "сімнадцять|вісімнадцять|дев'ятнадцять|двадцять"
    ),
    "vi": (
        "|một|hai|ba|bốn|năm|sáu|bảy|tám|chín|mười|mười một|mười hai|mười ba|mười bốn|"
        "mười lăm|mười sáu|mười bảy|mười tám|mười chín|hai mươi"
    ),
}
"""The numbers from 0 to 20 by language; other forms of a number follow a slash.

Words that are also frequent English words ("on", "fire", "to") are left out.
"""

NONE = (
    r"(?:keine[rsn]?|kein|aucune?|ninguno|ninguna|ningún|nenhuma?|nessuno|nessuna|geen|ingen|inga"
    r"|żaden|brak|ни одного|ни одной|нет|没有|無|无|なし|ありません|いません|없음|없습니다|없다)"
)
_ZERO = re.compile(rf"{NONE}(?:\s+[^\W\d_]+)?")
_CLASSIFIER = (
    "[个個只隻匹头頭条條张張名人位台辆輛架艘本支枝把顶頂件朵棵颗"
    "顆块塊根座栋棟间間杯瓶碗盘盤枚扇盏盞羽冊軒つ]"
)
"""Chinese and Japanese words between a number and a noun, apart from those of pairs and groups."""

_WIDE = "\u3040-\u30ff\u3400-\u9fff"
_DIGITS = "[零〇一二两兩三四五六七八九十百]+"
_CHINESE = re.compile(rf"({_DIGITS})(?:{_CLASSIFIER}[{_WIDE}]{{0,4}})?")
_COUNTER = r"(?:개|마리|명|대|권|사람|장|송이|그루|채|병|잔)"


@cache
def _values() -> dict[str, int]:
    """Returns the value of each word; those that mean different numbers are left out."""
    found: dict[str, set[int]] = {}
    for words in WORDS.values():
        for value, forms in enumerate(words.split("|")):
            for form in filter(None, forms.split("/")):
                found.setdefault(normal(form), set()).add(value)
    return {word: values.pop() for word, values in found.items() if len(values) == 1}


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Returns what is a count with what is beside it, and what is any count in a sentence.

    Compiled when first used: with so many words this takes 0.2 s, which most processes never need.
    """
    word = rf"(?:{'|'.join(sorted(map(re.escape, _values()), key=len, reverse=True))})"
    count = re.compile(rf"({word})(?:\s*{_COUNTER})?((?:\s+[^\W\d_]+){{0,2}})")
    return count, re.compile(
        rf"(?<![^\W_])(?:{word}(?![^\W_])|{word}(?=\s*{_COUNTER})|\d[\d.,]*)"
        rf"|{_DIGITS}(?={_CLASSIFIER})|\d+(?=[{_WIDE}])",
    )


_AND = re.compile(r"\b(?:and|or|to|und|oder|et|ou|y|e|o|i|en|of|и|или)\b")


def read_count(text: str) -> int | None:
    """Returns the count that an answer is, alone or with a noun; None if it is not understood."""
    plain = normal(text)
    if len(plain) > 60:
        return None
    if cues.REFUSED.search(plain):
        return None
    if _ZERO.fullmatch(plain):
        return 0
    if re.search(cues.OTHERWISE, plain) or cues.HEDGE.search(plain):
        return None
    chinese = _CHINESE.fullmatch(plain)
    if chinese is not None:
        quantity = parse_quantity(chinese[1].translate(str.maketrans("〇兩", "零两")))
        return None if quantity is None else int(quantity.value)
    count, any_count = _patterns()
    found = count.fullmatch(plain)
    if found is None or any_count.search(found[2]) or _AND.search(found[2]):
        return None
    return _values()[found[1]]


def counted(text: str) -> int | None:
    """Returns the only number of a sentence that says how many there are, else None."""
    plain = normal(text)
    if re.search(cues.OTHERWISE, plain) or cues.HEDGE.search(plain) or len(plain) > 200:
        return None
    found = list(_patterns()[1].finditer(plain))
    if len(found) != 1:
        return None
    before, after = plain[: found[0].start()], plain[found[0].end() :]
    there = re.search(rf"(?:{cues.any_of(cues.THERE_ARE)})\s*\Z", before, re.IGNORECASE)
    if not there and not re.search(cues.THERE_AT_END, after):
        return None
    number = found[0].group()
    value, quantity = read_count(number), parse_quantity(number)
    return value if value is not None or quantity is None else int(quantity.value)
