"""Words that introduce, conclude, hedge or negate an answer, in the languages of real responses.

A response in a language that is not listed here is not misread: without a cue, only a response that
is nothing but an answer is decided by rule. The list of languages follows that of OpenAI's
simple-evals (``MULTILINGUAL_ANSWER_REGEXES`` in ``common.py``).
"""
# ruff: noqa: RUF001  # letters of other scripts are meant

from __future__ import annotations

import re

ANSWER_IS = {
    "ar": (
        r"(?:الإجابة|الاجابة|الجواب|إجابة)(?:\s+(?:الصحيحة|النهائية|الصحيح|النهائي))?"
        r"\s*(?:هي|هو|:)"
    ),
    "bn": r"উত্তর\s*(?:হল|হলো|:)",
    "cs": r"\bodpověď\s*(?:je|zní|:)",
    "da": r"\bsvar(?:et)?\s*(?:er|är|:)",
    "de": r"\b(?:antwort(?:möglichkeit)?|lösung|ergebnis|option)\s*(?:ist|lautet|:)",
    "el": r"απάντηση\s*(?:είναι|:)",
    "es": r"\b(?:respuesta|opción|alternativa|solución)(?:\s+(?:final|correcta))?\s*(?:es|:)",
    "fa": r"پاسخ(?:\s+(?:نهایی|صحیح))?\s*:",
    "fi": r"\bvastaus\s*(?:on|:)",
    "fr": r"\bréponse(?:\s+(?:finale|correcte))?\s*(?:est|:)",
    "he": r"התשובה(?:\s+(?:הנכונה|הסופית))?\s*(?:היא|:)",
    "hi": r"उत्तर\s*(?:है|:)",
    "hu": r"\bválasz\s*:",
    "id": r"\bjawaban(?:nya)?(?:\s+(?:yang\s+benar|akhir|akhirnya))?\s*(?:adalah|ialah|:)",
    "it": r"\b(?:risposta|soluzione)(?:\s+(?:finale|corretta|esatta))?\s*(?:è|:)",
    "ja": r"(?:答え|解答|回答|正解|答案|答)\s*(?:は|:)",
    "ko": r"(?:정답|해답|답변|답)\s*(?:은|는|:)",
    "nl": r"\bantwoord\s*(?:is|luidt|:)",
    "pl": r"\bodpowiedź(?:\s+to|\s*:)",
    "pt": r"\b(?:resposta|opção|alternativa|solução)(?:\s+(?:final|correta|certa))?\s*(?:é|:)",
    "ro": r"\brăspuns(?:ul)?(?:\s+(?:final|corect))?\s*(?:este|:)",
    "ru": r"\b(?:ответ|вариант)(?:\s+(?:равен|это)|\s*[:—–-])",
    "th": r"คำตอบ(?:ที่ถูกต้อง)?\s*(?:คือ|:)",
    "tr": r"\b(?:cevap|yanıt)\s*:",
    "uk": r"\bвідповідь\s*[:—–-]",
    "vi": r"(?:đáp\s+án|câu\s+trả\s+lời)(?:\s+(?:đúng|cuối\s+cùng))?\s*(?:là|:)",
    "zh": (
        r"(?:答案|答|结果|結果|选项|選項|正解)(?:应该|應該|应当|应|就|即)?\s*(?:是|为|為|选|選|:|=)"
        r"|(?:故|因此|所以|应该|应|我|应当|所以答案)?,?\s*(?:选择|選擇|选|選)(?:项|項|答案)?\s*[:是为]?"
        r"(?=\s*[(\[*$]{0,3}\s*[A-J](?![A-Za-z]))"
    ),
}
"""What stands directly before an answer, by language; English is in `extract` and `choices`."""

CONCLUSION = {
    "ar": r"لذا|لذلك|إذن|وبالتالي",
    "bn": r"সুতরাং|অতএব|তাই",
    "de": r"\b(?:daher|somit|folglich|deshalb|insgesamt)\b",
    "es": r"\bpor (?:lo )?tanto\b|\bentonces\b|\ben conclusión\b|\ben total\b",
    "fr": r"\bdonc\b|\bainsi\b|\bpar conséquent\b|\ben conclusion\b|\bau total\b",
    "hi": r"इसलिए|अतः",
    "id": r"\b(?:jadi|oleh karena itu|maka)\b",
    "it": r"\b(?:quindi|pertanto|dunque)\b",
    "ja": r"したがって|従って|よって|ゆえに|合計",
    "ko": r"따라서|그러므로",
    "nl": r"\b(?:dus|daarom)\b",
    "pl": r"\b(?:zatem|więc)\b",
    "pt": r"\b(?:portanto|logo|em conclusão)\b",
    "ru": r"\b(?:следовательно|значит|поэтому|итак|таким образом)\b",
    "sw": r"\b(?:kwa hiyo|hivyo)\b",
    "te": r"కాబట్టి",
    "th": r"ดังนั้น",
    "tr": r"\b(?:dolayısıyla|bu nedenle|sonuç olarak)\b",
    "vi": r"\b(?:vậy|do đó|vì vậy)\b",
    "zh": r"因此|所以|综上所述|综上|故|于是|总之|结论|總共|总共|一共|共有|答:",
}
"""Words that mark a conclusion."""

HEDGE = re.compile(
    r"\b(?:maybe|may be|perhaps|might|could|possibly|probably|not sure|unsure|unclear|guess|cannot"
    r"|can't|don't know|do not know|either|unknown|not enough|assum\w+|unlikely"
    r"|(?<!no )(?<!without )(?<!beyond )(?<!without a )doubt(?:s|ed|ful)?"
    r"|uncertain|unconvinced|supposed(?:ly)?|allegedly"
    r"|(?:not|n't)\s+(?:\w+\s+)?(?:certain|clear|convinced|confident|obvious))\b"
    r"|可能|也许|或许|大概|不确定|无法|おそらく|かもしれ|아마|모르|возможно|может быть|наверное"
    r"|vielleicht|wahrscheinlich|möglicherweise|peut-être|probablement|quizás|tal vez|probablemente"
    r"|talvez|provavelmente|forse|probabilmente|ربما|قد يكون|शायद|belki|có thể|mungkin",
    re.IGNORECASE,
)
"""Words of doubt."""

DENIED = re.compile(
    r"\b(?:wrong|incorrect|false|mistaken|erroneous|invalid|worst|trap|tempting|naive|previous"
    r"|earlier|initial)"
    r"\s+(?:\w+\s+)?(?:answer|option|choice|result|value|solution|statement|claim|guess|one)s?\b"
    r"|\b(?:answer|option|choice|result|value|one)s?\s+(?:that|which)\s+(?:is|are)\s+"
    r"(?:not|wrong|incorrect|false)\b"
    r"|\bleast\s+(?:likely|plausible|probable|suitable)\b"
    r"|\b(?:wrong|incorrect|false|untrue|mistaken|absurd|impossible|a\s+mistake|an\s+error)"
    r"\s+(?:to|that)\b|\b(?:mistake|error|trap|distractor)\s+(?:is|was)\b"
    r"|\b(?:far\s+from|anything\s+but|hardly|scarcely|barely|rarely|seldom|short\s+of|disagree)\b"
    r"|(?:\bnot|n't|\bnever|\bcannot)\s+(?:\w+\s+)?"
    r"(?:think|believe|say|claim|choose|pick|select|accept|agree|conclude|true|the\s+case|proven)\b"
    r"|\bno\s+(?:one\s+\w+\s+\w+|proof|evidence|reason|guarantee)\b|\btempting\b|\bthought\b"
    r"|\bused\s+to\b"
    r"|(?<!\bi )(?<!\bwe )(?<!\bi would )(?<!\bwe would )(?<!\bi['’]d )(?<!\bwe['’]d )"
    r"(?<!\bi can )(?<!\bwe can )\b(?:says?|said|claims?|claimed|thinks?|believes?|believed)"
    r"\s+(?:that\s+)?(?:the|it|[A-J])\b"
    r"|\b(?:many|some|most|people|students?|they|you|he|she)\s+(?:(?:would|might|may|will)\s+)?"
    r"(?:choose|chose|pick(?:ed)?|select(?:ed)?|say|think)\b",
    re.IGNORECASE,
)
"""Words that deny what follows, or say it of a wrong answer: "it is wrong to say 5"."""

CLAUSE = re.compile(
    r"[;,:](?:\s|\Z)|\b(?:so|(?<!anything )but|therefore|thus|hence)\b", re.IGNORECASE
)
"""What separates a clause from the one before it."""

CONDITION = re.compile(
    r"\b(?:if|when|unless|suppos(?:e|ing)|whether|(?:let\s+us|let's)\s+say)\b[^,;:]*\Z",
    re.IGNORECASE,
)
"""A condition that is not yet complete: "if B" is no choice of B."""

REFUSED = re.compile(
    r"(?:\b(?:no|without)\b|(?:\bnot|\bcannot|n't)\s+(?:\w+\s+)?(?:an?|any)\b)(?:\s+[\w'-]+){0,2}?\s+"
    r"(?:images?|pictures?|photos?|photographs?|diagram|figure|chart|graph|screenshot|video|file"
    r"|attachments?|input|document|text|passage|context|content|data|information|info|details?"
    r"|description|caption|evidence|indication|mention|hint|ideas?|clues?|answer|option|choice"
    r"|question|query|prompt|problem|task|solution|result|response|reply|comment|way(?=\s+(?:to|of|for|that|i|we)\b)|means|method"
    r"|basis|reason|sense|access|ability|knowledge|record|certainty|conclusion|consensus|telling"
    r"|knowing|explanation|judge?ment|decision|opinion|luck|link|thing|can\s+do)\b"
    r"|\b(?:no(?:\s+[\w'-]+){1,3}|nothing|none)\s+(?:(?:is|are|was|were|has\s+been|have\s+been)\s+)?"
    r"(?:provided|given|attached|uploaded|supplied|shared|specified|sent|received|asked)\b"
    r"|\bnone\s+of\s+(?:the|these|those)\s+(?:\w+\s+)?(?:above|below|options?|choices|answers)\b"
    r"|\bnone\s+of\s+the\s+(?:above|below)\b|\bn/a\b"
    r"|\b(?:kein\w*|aucune?|pas\s+d[e']|ning[uú]n[ao]?|nenhuma?|nessuna?|geen|нет)\s*"
    r"(?:antwort|ahnung|bild|angaben?|information\w*|idée|réponse|image|idea|respuesta|imagen"
    r"|resposta|imagem|ideia|risposta|immagine|antwoord|idee|afbeelding|ответа|изображения)\b",
    re.IGNORECASE,
)
"""Words that refuse an answer: "no" is neither the answer no nor the count 0 in "no image"."""

OTHERWISE = (
    r"\b(?:not|never|cannot|without|except|less|more|greater|fewer|smaller|larger|bigger|least|most"
    r"|between|than|up to|over|under|higher|lower|unequal|neither|nor|short of|far from|hardly"
    r"|other than|anything but|close(?:r|st)? to|differs?|different|rang(?:es?|ing)|approach(?:es)?"
    r"|var(?:y|ies)|exceeds?|bounded|tends? to|no longer"
    r"|as \w+ as|(?:is|are|was) (?:false|wrong|incorrect|untrue|impossible)"
    r"|(?:near|next) to|nothing like|distinct from|towards?|divisible"
    r"|(?:starts?|begins?) (?:from|at|with)"
    r"|(?:(?:multiple|square|cube|root|power|factor|divisor|reciprocal|inverse|opposite|part|third"
    r"|quarter|half|double|triple|fraction) of|twice|thrice|half)(?=\s*[\d$*\\(\x00-])"
    r"|(?:near(?:ly|er)?|almost|around|roughly"
    r"|above|below|beyond|within|out of)(?=\s*[\d$*\\(\x00-])"
    r"|(?:step|case|part|equation|eq|question|problem|figure|page|frame|region|image|picture|row"
    r"|column|line|box|panel|turn|round)\.? \d+)\b|n't\b"
    r"|不是|不等于|并非|没有|大于|小于|至少|至多|最多|超过|不到|不足|以上|以下|ではな|より|아니|이상|이하"
    r"|\bне\b|не менее|не более|больше|меньше|\bnicht\b|\bkein\w*|mehr als|weniger als|mindestens"
    r"|höchstens|\bpas\b|plus de|moins de|supérieure? à|inférieure? à|au moins|au plus|\bmás de\b"
    r"|\bmenos de\b|mayor que|menor que|\bno es\b|al menos|\bnão\b|mais de|maior que|menor que"
    r"|pelo menos|\bnon è\b|più di|meno di|almeno|أكبر من|أقل من|ليس"
)
"""Negations and comparisons: with them, the only number in a sentence need not be the answer."""

NEGATED = (
    r"\b(?:not|never|neither|nor|cannot be|\w+n't|is not|(?:all|everything|anything|none) but"
    r"|rather than|instead of"
    r"|except|unlike|(?:eliminat|exclud|reject|discard|dismiss)(?:es?|s|ed|ing)?"
    r"|rul(?:es?|ed|ing) out|non|pas|nicht|no es|não é|не|and not)"
    r"|不是|不选|并非|而非|排除|非|ではなく|아닌"
)
"""Words directly before an option that is not chosen."""

RETRACTED = re.compile(
    r"\b(?:wait|scratch\s+that|(?:i|we)\s+made\s+an?\s+(?:\w+\s+)?(?:mistake|error)"
    r"|let\s+me\s+(?:re\w+|correct)"
    r"|(?:that|this|it)(?:'s|\s+is|\s+was)\s+(?:wrong|incorrect|a\s+mistake|not\s+(?:right|correct))"
    r"|(?:that|this|it)\s+isn't\s+(?:right|correct))\b",
    re.IGNORECASE,
)
"""Words that take an answer back."""

CLOSING = (
    r"let me know\b|(?:please )?feel free\b|(?:i )?hope (?:this|that|it)\b"
    r"|if you (?:have|need|would)\b|is there anything\b|do you (?:have|need|want)\b"
    r"|would you like\b|thank(?:s| you)\b|great\b"
    r"|good luck\b|happy to help\b|well done\b|great job\b|please let\b|i am here\b|i'm here\b"
    r"|如果(?:你|您)|希望|如有"
)
"""Start of a closing remark after the answer."""

VERB_AT_END = r"\s*(?:です|である|となります|になります|だ|입니다|이다|입니다만|है|হয়)\s*[.!]*\s*$"
"""The verb after an answer in languages that put it there ("答えは12です")."""


THERE_ARE = {
    "de": (
        r"\b(?:es\s+(?:sind|gibt|ist)|(?:ich\s+sehe|sehe\s+ich|man\s+sieht|sieht\s+man|sind|zeigt)"
        r"(?:\s+hier)?)(?:\s+(?:insgesamt|genau))?"
    ),
    "es": r"\b(?:hay|veo|se\s+ven|aparecen|muestra)(?:\s+(?:exactamente|en\s+total))?",
    "fr": r"\b(?:il\s+y\s+a|je\s+vois|on\s+(?:voit|compte)|montre)"
    r"(?:\s+(?:exactement|au\s+total))?",
    "it": r"\b(?:ci\s+sono|c'è|vedo|si\s+vedono|mostra)(?:\s+(?:esattamente|in\s+totale))?",
    "nl": r"\b(?:er\s+(?:zijn|staan|is)|ik\s+zie)(?:\s+(?:precies|in\s+totaal))?",
    "pl": r"\b(?:jest|są|widać|widzę)",
    "pt": r"\b(?:há|existem|vejo|mostra)(?:\s+(?:exatamente|no\s+total))?",
    "ru": (
        r"(?:на\s+(?:этом\s+)?(?:изображении|картинке|фото|фотографии|рисунке)"
        r"(?:\s+(?:есть|видно|вижу|изображен[оы]|показан[оы]))?|\bздесь|\bвижу|\bвидно)(?:\s+ровно)?"
    ),
    "zh": r"(?:有|看到|看见|包含)了?",
}
"""What stands directly before the number of things that there are."""

THERE_AT_END = r"(?:います|あります|いる|ある|있습니다|있다|있어요|vardır|\bvar)\W*\Z"
"""The verb "there is" in languages that put it after the number."""

_COMMA_LANGUAGES = re.compile(
    r"\b(?:der|die|das|und|ist|ein|eine|nicht|antwort|lösung|ergebnis|wir|mit|von|beträgt|somit|daher"
    r"|le|la|les|est|donc|une|des|du|nous|réponse|avec|qui|dans"
    r"|el|los|las|es|por|lo|respuesta|que|para|con|entonces|del|uma|os|é|resposta|portanto|com|não"
    r"|il|è|risposta|che|quindi|della|sono|het|een|van|dus|antwoord|jest|odpowiedź|się|więc|oraz"
    r"|cevap|bir|için|adalah|jawaban|yang|là|đáp|và|của|este|răspuns|și|sunt|svaret|och|är|og|det"
    r"|vastaus|válasz|és|az|odpověď|[\u0370-\u03ff]{3,}|[\u0400-\u04ff]{2,})\b",
    re.IGNORECASE,
)
"""Frequent words of languages that write decimal commas, Greek words and Cyrillic ones."""

_ENGLISH = re.compile(
    r"\b(?:the|is|are|of|and|we|to|so|in|that|answer|therefore|with)\b", re.IGNORECASE
)


def writes_decimal_commas(text: str) -> bool:
    """Returns whether the language of a text is one that writes 3.5 as "3,5"."""
    found, english = len(_COMMA_LANGUAGES.findall(text)), len(_ENGLISH.findall(text))
    return found > english and (found > 1 or len(re.findall(r"[^\W\d_]{2,}", text)) <= 3)


def any_of(table: dict[str, str]) -> str:
    """Returns one pattern for all languages."""
    return "|".join(f"(?:{pattern})" for pattern in table.values())
