"""Aligns the tokens of two tokenizers in a text that both write: spans with the same bytes.

A student's turn is cut wherever a token ends on both sides (TRL's ``gold`` cuts at the same
places). A span is the least that both can be asked about: the student's tokens in it stand for the
same bytes as the teacher's. With equal tokenizers each span is one token.

The teacher reads the turn in its own canonical tokens. Special tokens map by meaning, not by bytes:
the end of a turn to the teacher's end of a turn, any other to the teacher's token of that name.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from unicodedata import normalize

import numpy as np
from transformers import PreTrainedTokenizerBase

from reopold_agent.errors import VocabularyMismatchError
from reopold_agent.policies.tags import special_tags, split_at
from reopold_agent.types import IntArray, span_count

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a teacher reads in place of bytes that are no character."""


@dataclass(frozen=True)
class AlignedTurn:
    """One turn of a student in the tokens of its teacher.

    Attributes:
        ids: (T,) int64: the teacher's tokens.
        student: (S,) int64: the span of each token of the student, from 0; -1 for none.
        teacher: (T,) int64: the span of each token of the teacher; -1 for none.
    """

    ids: IntArray
    student: IntArray
    teacher: IntArray

    @property
    def spans(self) -> int:
        """Number of spans."""
        return span_count(self.student)


@dataclass(frozen=True)
class Encoded:
    """A text in a tokenizer's tokens.

    Attributes:
        ids: the tokens.
        runs: the text in runs, each as given and as the tokenizer normalises it.
        pieces: the bytes of each token.
    """

    ids: list[int]
    runs: list[tuple[str, str]]
    pieces: list[bytes]

    @property
    def ends(self) -> list[int] | None:
        """Where each token ends in the bytes of the normalised text.

        None if the tokens stand for other bytes than the text's.
        """
        written, expected = b"".join(self.pieces), self._expected
        # SentencePiece, and some byte-level tokenizers, put a space before a text.
        extra = len(written) - len(expected)
        if extra not in (0, 1) or written != b" " * extra + expected:
            return None
        ends = itertools.accumulate(len(piece) for piece in self.pieces)
        return [max(0, end - extra) for end in ends]

    def difference(self) -> str:
        """Says where the tokens' bytes first differ from the text's."""
        written, expected = b"".join(self.pieces), self._expected
        pairs = enumerate(zip(written, expected, strict=False))
        at = next((k for k, (a, b) in pairs if a != b), min(len(written), len(expected)))
        return f"its tokens of {_around(expected, at)!r} stand for {_around(written, at)!r}"

    @property
    def _expected(self) -> bytes:
        return "".join(shown for _, shown in self.runs).encode()


class TokenBytes:
    """The bytes that each token of a tokenizer stands for.

    Two kinds of tokenizers say so exactly: byte-level ones (GPT-2, Qwen, Llama 3) and those of
    SentencePiece with a token for each byte (Llama 2, Mistral).

    Args:
        tokenizer: a fast tokenizer.
        whose: the tokenizer's owner, for messages.

    Raises:
        VocabularyMismatchError: the bytes of its tokens are not known; the message says why.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _unaligned(whose, "it has no tokenizer.json, which gives the bytes of tokens")
        self.tokenizer, self.whose = tokenizer, whose
        normalizer = backend.normalizer
        self._normalise: Callable[[str], str] | None = None
        # This part alone: to write the whole tokenizer as JSON would take most of the time here.
        decoder = backend.decoder
        decoders = _decoders(None if decoder is None else json.loads(decoder.__getstate__()))
        if "ByteLevel" in decoders:
            alphabet = _byte_alphabet()

            def read(token: str) -> bytes:
                return bytes(alphabet[character] for character in token)

            self._normalise = None if normalizer is None else normalizer.normalize_str
        elif "ByteFallback" in decoders:
            read = _sentencepiece_bytes
        else:
            found = ", ".join(sorted(decoders)) or "none"
            raise _unaligned(
                whose,
                f"its decoder ({found}) is neither byte-level nor SentencePiece's with bytes",
            )
        added = tokenizer.added_tokens_decoder
        self._tags = special_tags(tokenizer)
        names = {i: str(t.content) for i, t in added.items() if t.special}
        self.special = {i: name for i, name in names.items() if name not in self._tags}
        self.by_name = {name: i for i, name in self.special.items()}
        self._bytes: dict[int, bytes] = {}
        for token, i in tokenizer.get_vocab().items():
            if i in added:
                self._bytes[i] = str(added[i].content).encode()
                continue
            try:
                self._bytes[i] = read(token)
            except KeyError as error:
                raise _unaligned(
                    whose, f"its token {i}, {token!r}, has {error}, which stands for no byte"
                ) from error

    def of(self, token_id: int) -> bytes:
        """Returns the bytes of a token; none for an id that the tokenizer does not name."""
        return self._bytes.get(token_id, b"")

    def encode(self, text: str) -> Encoded:
        """Encodes text as an assistant's words: special tokens but tags are ordinary text."""
        ids: list[int] = []
        for piece in split_at(text, self._tags):
            if piece in self._tags:
                ids.append(self._tags[piece])
            elif piece:
                encoded = self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)
                ids += [int(i) for i in encoded["input_ids"]]
        runs = [(text, text)] if self._normalise is None else _runs(text, self._normalise)
        return Encoded(ids, runs, [self.of(i) for i in ids])

    def check(self, texts: Sequence[str]) -> None:
        """Checks that the tokens of texts stand for their bytes.

        Raises:
            VocabularyMismatchError: they do not, or the tokenizer changes the text, as one that
                writes all in lower case; the message shows the first place.
        """
        for text in texts:
            encoded = self.encode(text)
            for given, shown in encoded.runs:
                if not _same_text(given, shown):
                    raise _unaligned(self.whose, f"it reads {given!r} of {text!r} as {shown!r}")
            if encoded.ends is None:
                raise _unaligned(self.whose, encoded.difference())


@dataclass
class Aligner:
    """Translates a student's turns into its teacher's tokens.

    Attributes:
        student, teacher: the bytes of their tokens.
        ends: the student's tokens that end a turn, each with the teacher's.
    """

    student: TokenBytes
    teacher: TokenBytes
    ends: dict[int, int] = field(default_factory=dict)

    def align(self, ids: Sequence[int]) -> AlignedTurn:
        """Returns a turn in the teacher's tokens, with the spans of both sides.

        A token of the student has no span if the teacher has nothing of that meaning: a special
        token that it lacks, bytes that are no character (it reads U+FFFD), a character that is
        cut off at the end of a text (it reads nothing), and one that its tokenizer replaces by
        another (``\u00b2`` by ``2``, with NFKC).

        Args:
            ids: the tokens that the student sampled.
        """
        turn = _Turn()
        words: list[int] = []
        for token in map(int, ids):
            name, meant = self.student.special.get(token), self.ends.get(token)
            if name is None and meant is None:
                words.append(token)
                continue
            self._add_words(words, turn)
            words = []
            if meant is None and name is not None:
                meant = self.teacher.by_name.get(name)
            turn.add([-1], [], []) if meant is None else turn.add([0], [meant], [0])
        self._add_words(words, turn)
        values = turn.ids, turn.student, turn.teacher
        return AlignedTurn(*(np.asarray(each, np.int64) for each in values))

    def _add_words(self, tokens: Sequence[int], turn: _Turn) -> None:
        """Adds the text between special tokens."""
        if not tokens:
            return
        pieces = [self.student.of(token) for token in tokens]
        ends = list(itertools.accumulate(len(piece) for piece in pieces))
        characters = _characters(b"".join(pieces))
        encoded = self.teacher.encode("".join(each.text for each in characters))
        teacher_ends = encoded.ends
        if teacher_ends is None:  # `check` has found nothing, but this text is special
            turn.add([-1] * len(tokens), encoded.ids, [-1] * len(encoded.ids))
            return
        places = _places(characters, encoded.runs)
        # Each span has the name of its end's position among all the ends that both sides have.
        common = sorted(set(ends) & {places[end] for end in teacher_ends if end in places} - {0})
        known = sorted(places)
        asked = [
            # A token that ends inside a character, or in a normalised run, ends with it.
            bisect_left(common, max(1, places[known[bisect_left(known, end)]]))
            for end in teacher_ends
        ]
        found = [
            bisect_left(common, end) if piece else -1
            for piece, end in zip(pieces, ends, strict=True)
        ]
        kept: list[bool] = []
        for given, shown in encoded.runs:
            kept += [_same_text(given, shown)] * len(given)
        at, lost = 0, {-1, len(common)}
        for each, same in zip(characters, kept, strict=True):
            at += each.size
            if not (each.spelled and same):
                lost.add(bisect_left(common, at))
        number = {span: k for k, span in enumerate(sorted(set(found) & set(asked) - lost))}
        turn.add(
            [number.get(s, -1) for s in found], encoded.ids, [number.get(s, -1) for s in asked]
        )


class _Turn:
    """The tokens and spans of a turn so far."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.student: list[int] = []
        self.teacher: list[int] = []
        self._spans = 0

    def add(self, student: Sequence[int], ids: Sequence[int], teacher: Sequence[int]) -> None:
        """Adds tokens of both sides; their spans are numbered from 0, -1 for none."""
        first = self._spans
        self.student += [first + span if span >= 0 else -1 for span in student]
        self.teacher += [first + span if span >= 0 else -1 for span in teacher]
        self.ids += ids
        self._spans = first + 1 + max(student, default=-1)


@dataclass(frozen=True)
class _Character:
    """A character that a teacher reads.

    Attributes:
        text: the character.
        size: the student's bytes that it stands for.
        spelled: whether they are the character's own.
    """

    text: str
    size: int
    spelled: bool = True


def _characters(data: bytes) -> list[_Character]:
    """Reads UTF-8. Bytes that are no character become U+FFFD, as with ``errors="replace"``.

    A character that is cut off at the end is left out.
    """
    characters: list[_Character] = []
    while data:
        try:
            good, bad, cut = data.decode(), 0, False
        except UnicodeDecodeError as error:
            good, bad = data[: error.start].decode(), error.end - error.start
            cut = error.reason == "unexpected end of data" and error.end == len(data)
        characters += [_Character(text, len(text.encode())) for text in good]
        if cut:
            break
        if bad:
            characters.append(_Character(REPLACEMENT, bad, spelled=False))
        data = data[len(good.encode()) + bad :]
    return characters


def _places(characters: Sequence[_Character], runs: Sequence[tuple[str, str]]) -> dict[int, int]:
    """Maps places in the bytes that the teacher reads to the student's bytes, where they have one.

    Args:
        characters: the text.
        runs: the same text, each run as given and as the teacher's tokenizer normalises it.
    """
    places = {0: 0}
    remaining = iter(characters)
    at = shown_at = 0
    for given, shown in runs:
        for each in itertools.islice(remaining, len(given)):
            if given == shown and each.spelled:
                places.update((shown_at + k, at + k) for k in range(1, each.size))
            at += each.size
            if given == shown:
                shown_at += len(each.text.encode())
                places[shown_at] = at
        if given != shown:
            shown_at += len(shown.encode())
            places[shown_at] = at
    return places


def _runs(text: str, normalise: Callable[[str], str]) -> list[tuple[str, str]]:
    """Splits text into the shortest runs that a tokenizer normalises one by one."""
    whole = normalise(text)
    if whole == text:
        return [(text, text)]
    runs: list[tuple[str, str]] = []
    for character in text:
        if runs:
            given, shown = runs[-1]
            joined = normalise(given + character)
            if joined != shown + normalise(character):
                runs[-1] = given + character, joined
                continue
        runs.append((character, normalise(character)))
    if "".join(shown for _, shown in runs) != whole:
        return [(text, whole)]  # marks that change places across others: one run
    return runs


def _same_text(given: str, shown: str) -> bool:
    """Tells whether two texts are equal but for the form of their accents (Unicode's NFC)."""
    return given == shown or normalize("NFC", given) == normalize("NFC", shown)


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's characters for bytes: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _decoders(described: dict[str, object] | None) -> set[str]:
    """Returns the kinds of decoders that a tokenizer.json names."""
    if described is None:
        return set()
    parts = described.get("decoders")
    if isinstance(parts, list):
        return {kind for part in parts for kind in _decoders(part)}
    return {str(described.get("type"))}


def _around(data: bytes, at: int) -> str:
    return data[max(0, at - 8) : at + 8].decode(errors="replace")


def _unaligned(whose: str, why: str) -> VocabularyMismatchError:
    return VocabularyMismatchError(
        f"the tokenizer of {whose} cannot be aligned by bytes: {why}.\n"
        "Use a byte-level tokenizer (Qwen, Llama 3), or a teacher with the student's tokenizer."
    )
