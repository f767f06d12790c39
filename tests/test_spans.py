"""Tests the alignment of two tokenizers: spans with the same bytes, whatever the merges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reopold_agent.config import PixelConfig, PixelsConfig, ViewConfig
from reopold_agent.errors import VocabularyMismatchError
from reopold_agent.policies.spans import AlignedTurn, Aligner, TokenBytes, _byte_alphabet
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.reading import _SAMPLES, Reader, Shown, make_aligner
from reopold_agent.types import Message, StopReason, Trajectory, Turn

ALPHABET = {byte: character for character, byte in _byte_alphabet().items()}


def byte_level(
    merges: list[tuple[bytes, bytes]],
    special: tuple[str, ...] = ("<end>",),
    added: tuple[str, ...] = (),
    nfc: bool = False,
) -> PreTrainedTokenizerFast:
    """Makes a byte-level tokenizer with the given merges."""

    def spell(data: bytes) -> str:
        return "".join(ALPHABET[byte] for byte in data)

    vocabulary = {spell(bytes([byte])): byte for byte in range(256)}
    pairs = []
    for left, right in merges:
        if spell(left) in vocabulary and spell(right) in vocabulary:
            pairs.append((spell(left), spell(right)))
            vocabulary.setdefault(spell(left + right), len(vocabulary))
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if nfc:
        raw.normalizer = normalizers.NFC()
    raw.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    raw.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    fast: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = fast(tokenizer_object=raw, clean_up_tokenization_spaces=False)
    return made


def aligner(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> Aligner:
    return Aligner(TokenBytes(student, "the student"), TokenBytes(teacher, "the teacher"))


def groups(aligned: AlignedTurn, ids: list[int]) -> list[tuple[list[int], list[int]]]:
    """Returns the tokens of each span on both sides."""
    return [
        (
            [int(i) for i, at in zip(ids, aligned.student, strict=True) if at == span],
            [int(i) for i, at in zip(aligned.ids, aligned.teacher, strict=True) if at == span],
        )
        for span in range(aligned.spans)
    ]


def test_spans_end_where_tokens_end_on_both_sides() -> None:
    student = byte_level([(b"t", b"h"), (b"th", b"e"), (b"c", b"a"), (b"ca", b"t")])
    teacher = byte_level([(b"h", b"e"), (b" ", b"c"), (b"a", b"t")])
    ids = student("the cat", add_special_tokens=False)["input_ids"]
    aligned = aligner(student, teacher).align(ids)
    told = [(student.decode(a), teacher.convert_ids_to_tokens(b)) for a, b in groups(aligned, ids)]
    # the | _ cat  and  t he | _c at: "the" is a span; " cat" has no common cut within.
    assert told == [("the", ["t", "he"]), (" cat", ["Ġc", "at"])]


def test_equal_tokenizers_give_a_span_per_token() -> None:
    student = byte_level([(b"a", b"b"), (b"ab", b"c")])
    ids = student("abcab <end>", add_special_tokens=False)["input_ids"]
    aligned = aligner(student, student).align(ids)
    assert aligned.ids.tolist() == ids
    assert aligned.student.tolist() == aligned.teacher.tolist() == list(range(len(ids)))


def test_the_end_of_a_turn_is_aligned_by_meaning() -> None:
    student, teacher = byte_level([]), byte_level([], special=("<eos>", "<other>"))
    made = aligner(student, teacher)
    end = student.convert_tokens_to_ids("<end>")
    without = made.align([*b"ab", end])
    assert without.student.tolist() == [0, 1, -1]
    assert without.ids.tolist() == [*b"ab"]
    made.ends[end] = teacher.convert_tokens_to_ids("<eos>")
    aligned = made.align([*b"ab", end])
    assert aligned.student.tolist() == [0, 1, 2]
    assert aligned.ids.tolist() == [*b"ab", teacher.convert_tokens_to_ids("<eos>")]


def test_special_tokens_that_the_student_spells_are_text() -> None:
    student, teacher = byte_level([], special=()), byte_level([], special=("<end>",))
    aligned = aligner(student, teacher).align([*b"a<end>"])
    assert aligned.ids.tolist() == [*b"a<end>"]
    assert aligned.spans == 6


def test_a_tag_is_one_token_here_and_several_there() -> None:
    student, teacher = byte_level([], added=("<tool>",)), byte_level([(b"x", b"<")])
    ids = student("x<tool>y", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    aligned = aligner(student, teacher).align(ids)
    # x< is one token of the teacher, so that the tag's span begins with x.
    assert aligned.student.tolist() == [0, 0, 1]
    assert aligned.teacher.tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_a_special_tag_is_a_word_on_either_side() -> None:
    tags = ("<tool_call>", "</tool_call>")
    special, plain = byte_level([], special=("<end>", *tags)), byte_level([], added=tags)
    words = [*b"a", *special.convert_tokens_to_ids(["<tool_call>"]), *b"b"]
    aligned = aligner(special, plain).align(words)
    assert aligned.ids.tolist() == [*b"a", *plain.convert_tokens_to_ids(["<tool_call>"]), *b"b"]
    assert aligned.student.tolist() == aligned.teacher.tolist() == [0, 1, 2]
    back = aligner(plain, special).align(aligned.ids.tolist())
    assert back.ids.tolist() == words
    assert back.student.tolist() == [0, 1, 2]
    spelled = aligner(special, byte_level([])).align(words)
    assert spelled.ids.tolist() == [*b"a<tool_call>b"]
    assert spelled.student.tolist() == [0, 1, 2]


def test_a_character_that_is_cut_off_has_no_span() -> None:
    student = byte_level([(b"a", b"\xe2")])
    euro = "€".encode()
    aligned = aligner(student, byte_level([])).align([*b"xy", *euro[:2]])
    assert aligned.student.tolist() == [0, 1, -1, -1]
    assert aligned.ids.tolist() == [*b"xy"]
    # A token that holds whole characters and a part of the next is lost with it.
    both = student.convert_tokens_to_ids("aâ")
    aligned = aligner(student, byte_level([])).align([*b"x", both])
    assert aligned.student.tolist() == [0, -1]
    assert (aligned.ids.tolist(), aligned.teacher.tolist()) == ([*b"xa"], [0, -1])


def test_bytes_that_are_no_character_have_no_span() -> None:
    aligned = aligner(byte_level([]), byte_level([])).align([*b"a", 0xFF, *b"b"])
    assert aligned.student.tolist() == [0, -1, 1]
    assert bytes(aligned.ids.tolist()) == "a\N{REPLACEMENT CHARACTER}b".encode()
    # U+FFFD that the student spells is a character like others.
    ids = [*"a\N{REPLACEMENT CHARACTER}b".encode()]
    aligned = aligner(byte_level([]), byte_level([])).align(ids)
    assert aligned.student.tolist() == list(range(5))


def test_a_character_split_differently_is_one_span() -> None:
    student = byte_level([(b"\xe2", b"\x82")])
    teacher = byte_level([(b"\x82", b"\xac")])
    ids = student("a€b", add_special_tokens=False)["input_ids"]
    aligned = aligner(student, teacher).align(ids)
    assert aligned.student.tolist() == [0, 1, 1, 2]
    assert aligned.teacher.tolist() == [0, 1, 1, 2]


def test_a_teacher_that_normalises_reads_its_own_form() -> None:
    written = "xe\N{COMBINING ACUTE ACCENT}y"
    student, teacher = byte_level([]), byte_level([], nfc=True)
    ids = [*written.encode()]
    aligned = aligner(student, teacher).align(ids)
    assert bytes(aligned.ids.tolist()).decode() == "x\N{LATIN SMALL LETTER E WITH ACUTE}y"
    assert aligned.student.tolist() == [0, 1, 1, 1, 2]
    assert aligned.teacher.tolist() == [0, 1, 1, 2]


def test_a_normaliser_that_loses_text_is_refused_and_rare_losses_have_no_span() -> None:
    student, teacher = byte_level([]), byte_level([])
    teacher.backend_tokenizer.normalizer = normalizers.Lowercase()
    told = r"the teacher cannot .*: it reads 'B' of 'aBc' as 'b'\.\n"
    with pytest.raises(VocabularyMismatchError, match=told):
        TokenBytes(teacher, "the teacher").check(["abc", "aBc"])
    teacher.backend_tokenizer.normalizer = normalizers.NFKC()
    made = aligner(student, teacher)
    made.teacher.check(_SAMPLES)
    aligned = made.align([*"x\N{SUPERSCRIPT TWO}y".encode()])
    assert bytes(aligned.ids.tolist()) == b"x2y"
    assert aligned.student.tolist() == [0, -1, -1, 1]
    assert aligned.teacher.tolist() == [0, -1, 1]


def sentencepiece(words: list[str]) -> PreTrainedTokenizerFast:
    """Makes a tokenizer as Llama 2's: a space before the text, and a token for each byte."""
    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in [mark, *"abcdefgh", *words]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
    )
    raw.decoder = decoders.Sequence(
        [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = fast(tokenizer_object=raw, unk_token="<unk>")
    return made


def test_sentencepiece_puts_a_space_before_the_text() -> None:
    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    student, teacher = byte_level([(b"a", b"b")]), sentencepiece(["ab", f"{mark}ab"])
    ids = student("ab c€", add_special_tokens=False)["input_ids"]
    made = aligner(student, teacher)
    made.teacher.check(["ab c€"])
    aligned = made.align(ids)
    tokens = teacher.convert_ids_to_tokens(aligned.ids.tolist())
    assert tokens == [f"{mark}ab", mark, "c", "<0xE2>", "<0x82>", "<0xAC>"]
    assert aligned.student.tolist() == [0, 1, 2, 3, 4, 5]
    assert aligned.teacher.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_tokenizer_whose_bytes_are_unknown_is_refused() -> None:
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    fast: Any = PreTrainedTokenizerFast
    with pytest.raises(VocabularyMismatchError, match=r"the teacher .*WordPiece.*\nUse a byte"):
        TokenBytes(fast(tokenizer_object=raw), "the teacher")


def test_a_tokenizer_that_changes_texts_is_refused_with_the_first_place() -> None:
    made = byte_level([])
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    with pytest.raises(VocabularyMismatchError, match="'ab cd' stand for 'abcd'"):
        TokenBytes(made, "the teacher").check(["ab", "ab cd"])


MERGES = st.lists(
    st.tuples(st.binary(min_size=1, max_size=3), st.binary(min_size=1, max_size=2)), max_size=20
)
TEXTS = st.text(
    alphabet=st.sampled_from("abc <>€é\N{COMBINING ACUTE ACCENT}\N{GRINNING FACE}\n"), max_size=24
)


def merges_of(texts: list[str], cuts: list[int]) -> list[tuple[bytes, bytes]]:
    """Makes merges that occur: pieces of the texts' bytes, cut anywhere, characters split too."""
    found = []
    for text, cut in zip(texts, cuts, strict=False):
        data = text.encode()[cut : cut + 4]
        found += [(data[:1], data[1:2]), (data[:2], data[2:3]), (data[1:2], data[2:3])]
    return [(a, b) for a, b in found if a and b]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TEXTS, max_size=6),
    st.lists(TEXTS, max_size=6),
    st.lists(st.integers(0, 20), min_size=6, max_size=6),
    st.lists(st.integers(0, 300), max_size=40),
    TEXTS,
    st.booleans(),
)
@example(["e\N{COMBINING ACUTE ACCENT}"], [], [0] * 6, [], "e\N{COMBINING ACUTE ACCENT}", True)
def test_spans_hold_the_same_bytes_and_every_token_once(
    of_student: list[str],
    of_teacher: list[str],
    cuts: list[int],
    sampled: list[int],
    text: str,
    nfc: bool,
) -> None:
    student = byte_level(merges_of(of_student, cuts))
    teacher = byte_level(merges_of(of_teacher, cuts[::-1]), nfc=nfc)
    made = aligner(student, teacher)
    ids = student(text, add_special_tokens=False)["input_ids"] + [i for i in sampled if i < 256]
    aligned = made.align(ids)
    assert len(aligned.student) == len(ids)
    # What the teacher reads is the text that the student wrote, with U+FFFD for other bytes.
    written = b"".join(made.student.of(i) for i in ids)
    read = b"".join(made.teacher.of(int(i)) for i in aligned.ids)
    shown = written.decode("utf-8", "replace")
    normalizer = teacher.backend_tokenizer.normalizer
    if nfc:
        shown = normalizer.normalize_str(shown)
    assert shown.startswith(read.decode())
    assert shown.removeprefix(read.decode()).strip("\N{REPLACEMENT CHARACTER}") == ""
    for mine, theirs in groups(aligned, ids):
        assert min(len(mine), len(theirs)) > 0
        left = b"".join(made.student.of(i) for i in mine)
        right = b"".join(made.teacher.of(i) for i in theirs)
        assert left == right or normalizer.normalize_str(left.decode()) == right.decode()
    for spans in (aligned.student, aligned.teacher):
        inside = spans[spans >= 0]
        assert (np.diff(inside) >= 0).all()  # contiguous and in order
        assert set(inside.tolist()) == set(range(aligned.spans))
    # No span could be cut further: within one, no token ends on both sides.
    for mine, theirs in groups(aligned, ids):
        if nfc:
            continue
        ends = [
            {sum(len(table.of(i)) for i in tokens[: k + 1]) for k in range(len(tokens) - 1)}
            for table, tokens in ((made.student, mine), (made.teacher, theirs))
        ]
        assert not ends[0] & ends[1]


def chat_of(tokenizer: PreTrainedTokenizerFast, end: str) -> ChatRenderer:
    tokenizer.chat_template = (
        "{% for each in messages %}<begin>{{ each.role }}:{{ each.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}<begin>assistant:{% endif %}"
    )
    return ChatRenderer(tokenizer)


def episode_of(turns: list[list[int]], between: list[int], rng: np.random.Generator) -> Trajectory:
    """Makes an episode whose log-probs are multiples of 1/256: their sums are exact."""
    ids, mask, made = [*between], [False] * len(between), []
    for sampled in turns:
        made.append(Turn(len(ids), len(ids) + len(sampled), "", "stop"))
        ids += [*sampled, *between]
        mask += [True] * len(sampled) + [False] * len(between)
    length = made[-1].end  # an episode ends with the student's tokens
    loss_mask = np.array(mask[:length])
    return Trajectory(
        task_id="",
        index=0,
        sample=0,
        prompt_length=len(between),
        ids=np.array(ids[:length]),
        loss_mask=loss_mask,
        logp=np.where(loss_mask, -rng.integers(0, 2048, length) / 256, 0).astype(np.float32),
        entropy=np.zeros(length, np.float32),
        images=[],
        turns=made,
        stop_reason=StopReason.ANSWER,
        reward=0.0,
        success=False,
    )


TURNS = st.tuples(TEXTS, st.lists(st.integers(0, 255), max_size=3), st.booleans())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(TEXTS, max_size=6),
    st.lists(TEXTS, max_size=6),
    st.lists(st.integers(0, 20), min_size=6, max_size=6),
    st.lists(TURNS, min_size=1, max_size=3),
    st.integers(0, 99),
)
@example(["abc"], ["bc<"], [0] * 6, [("abc<", [0xFF], True), ("€abc", [], False)] * 2, 0)
def test_rewards_carry_the_teachers_sums(
    of_student: list[str],
    of_teacher: list[str],
    cuts: list[int],
    turns: list[tuple[str, list[int], bool]],
    seed: int,
) -> None:
    """Of each span, in the turn that it belongs to; with the other tokens they are its total."""
    marks = ("<begin>", "<end>", "<own>")
    student = chat_of(byte_level(merges_of(of_student, cuts), special=marks), "<end>")
    merges = merges_of(of_teacher, cuts[::-1])
    teacher = chat_of(byte_level(merges, special=("<begin>", "<eot>")), "<eot>")
    made = make_aligner(student, teacher, "the teacher")
    assert made is not None
    rng = np.random.default_rng(seed)
    sampled = []
    for text, more, ends in turns:
        # The teacher has nothing like <own>.
        last = student.tokenizer.convert_tokens_to_ids("<end>" if ends else "<own>")
        words = student.tokenizer(text, add_special_tokens=False)["input_ids"]
        sampled.append([*words, *more, last])
    episode = episode_of(sampled, [*b"prompt"], rng)
    shown = Shown([Message("user", ("?",))], None, [Message("user", ("!",))] * (len(turns) - 1))
    pixels = PixelsConfig(PixelConfig(784, 784), PixelConfig(784, 784))
    reader = Reader(ViewConfig(), teacher, None, pixels=pixels, aligner=made)
    reading = reader.read(episode, shown)
    assert reading.teacher_spans is not None
    read = reading.trajectory.loss_mask
    values = np.full(len(read), np.nan, np.float32)  # of what the student did not write
    values[read] = -rng.integers(0, 2048, read.sum()) / 256
    scores = reading.to_student(episode, values)
    assert not scores[~episode.loss_mask].any()
    rewards = scores.astype(np.float64) - episode.logp
    at, total = 0, values[read & (reading.teacher_spans < 0)].sum(dtype=np.float64)
    for turn, ids in zip(episode.turns, sampled, strict=True):
        aligned = made.align(ids)
        theirs = values[read][at : at + len(aligned.ids)]
        assert reading.trajectory.ids[read][at : at + len(aligned.ids)].tolist() == [*aligned.ids]
        at += len(aligned.ids)
        found, logp = rewards[turn.start : turn.end], episode.logp[turn.start : turn.end]
        assert not found[aligned.student < 0].any()
        for span in range(aligned.spans):
            teachers = theirs[aligned.teacher == span].sum(dtype=np.float64)
            own = logp[aligned.student == span].sum(dtype=np.float64)
            assert set(found[aligned.student == span]) == {teachers - own}
            total += found[aligned.student == span][0] + own
    assert at == read.sum()
    assert total == values[read].sum(dtype=np.float64)
