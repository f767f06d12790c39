"""Generation and scoring against plain forward passes and Hugging Face's own `generate`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PADDED_ROWS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from reopold_agent.errors import ModelError
from reopold_agent.objectives.chunks import BANNED
from reopold_agent.policies import generation, kv_cache
from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.batch import TrajectoryBatch
from reopold_agent.policies.generation import sample_tokens
from reopold_agent.policies.grouping import split_by_tokens
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.types import Completion, EncodedImage, Request, Sampling, Trajectory

T1 = Sampling()
GREEDY = Sampling(temperature=0)


def model_inputs(policy: TransformersPolicy, ids: Sequence[int], images: Any) -> dict[str, Any]:
    """What a user of the model would pass for one sequence; positions are left to the model."""
    ids_1L = torch.tensor([list(ids)])
    inputs: dict[str, Any] = {"input_ids": ids_1L}
    if policy.adapter.vision is not None:
        inputs["mm_token_type_ids"] = (ids_1L == policy.adapter.image_token_id).int()
    if images:
        assert policy.adapter.vision is not None
        inputs["pixel_values"], inputs["image_grid_thw"] = policy.adapter.vision.patches(images)
    return inputs


def full_pass(policy: TransformersPolicy, ids: Sequence[int], images: Any) -> Tensor:
    """(L - 1, V) log-probs of one plain forward pass; row i predicts ``ids[i + 1]``."""
    logits = policy.adapter.model(**model_inputs(policy, ids, images)).logits[0, :-1].float()
    logits = logits.index_fill(1, policy.banned, -torch.inf)
    return torch.log_softmax(logits, -1)


@dataclass
class Talk:
    """A scripted conversation: what to send when, and what came back."""

    key: int
    ids: list[int]
    images: list[EncodedImage]
    budgets: list[int]
    observations: list[tuple[list[int], list[EncodedImage]]] = field(default_factory=list)
    joins_at: int = 0
    delay: int = 0
    spans: list[tuple[int, Completion]] = field(default_factory=list)

    def request(self) -> Request:
        turn = len(self.spans)
        return Request(
            self.key, list(self.ids), list(self.images), self.budgets[turn], (7, self.key, turn)
        )


def play(policy: TransformersPolicy, talks: Sequence[Talk], sampling: Sampling = T1) -> list[Talk]:
    """Runs the talks together; turns and newcomers enter whenever their step has come."""
    talks = [
        Talk(t.key, list(t.ids), list(t.images), t.budgets, t.observations, t.joins_at, t.delay)
        for t in talks
    ]
    generator = policy.generator(sampling)
    due = {t.key: t.joins_at for t in talks}
    by_key = {t.key: t for t in talks}
    clock = 0
    while due or generator.in_flight:
        entering = [key for key, at in due.items() if at <= clock]
        if entering:
            generator.submit([by_key[key].request() for key in entering])
            for key in entering:
                del due[key]
        for completion in generator.step():
            talk = by_key[completion.key]
            talk.spans.append((len(talk.ids), completion))
            talk.ids += completion.ids
            if len(talk.spans) == len(talk.budgets):
                generator.release(talk.key)
                continue
            ids, images = talk.observations[len(talk.spans) - 1]
            talk.ids += ids
            talk.images += images
            due[talk.key] = clock + 1 + talk.delay
        clock += 1
    assert generator.in_flight == 0
    return talks


@pytest.fixture(scope="module")
def words(chat: ChatRenderer) -> list[int]:
    banned = {*chat.forbidden_ids, *chat.stop_ids}
    return [i for i in range(len(chat.tokenizer)) if i not in banned]


@pytest.fixture(scope="module")
def shown(chat: ChatRenderer) -> Callable[[EncodedImage], list[int]]:
    names = chat.tokenizer.convert_tokens_to_ids

    def ids(image: EncodedImage) -> list[int]:
        pads = [names("<|image_pad|>")] * image.tokens
        return [names("<|vision_start|>"), *pads, names("<|vision_end|>")]

    return ids


@pytest.fixture(scope="module")
def talks(
    words: list[int],
    shown: Callable[[EncodedImage], list[int]],
    encode: Callable[..., EncodedImage],
) -> list[Talk]:
    """Nine conversations of one to three turns; some with pictures, of different lengths.

    They share a text prefix of 20 tokens (computed once by the policy), join at different times
    and stay away for different numbers of steps.
    """
    rng = np.random.default_rng(0)
    prefix = rng.choice(words, 20).tolist()
    made = []
    for key in range(9):
        images = [encode(10 * key + i, 56 + 28 * (key % 3), 140) for i in range(key % 3)]
        ids = [*prefix, *[i for image in images for i in shown(image)]]
        ids += rng.choice(words, 3 + 5 * (key % 4)).tolist()
        observations = []
        for turn in range(2):
            more = [encode(100 + key, 28, 56 + 28 * turn)] if key % 2 else []
            text = rng.choice(words, 2 + 3 * turn + key % 3).tolist()
            observations.append(([*[i for m in more for i in shown(m)], *text], more))
        budgets = [int(b) for b in rng.integers(1, 14, 1 + key % 3)]
        made.append(
            Talk(
                100 - key,
                ids,
                images,
                budgets,
                observations,
                joins_at=3 * (key // 4),
                delay=key % 4,
            )
        )
    return made


@pytest.fixture(scope="module")
def stopping_policy(
    make_policy: Callable[..., TransformersPolicy], model: Any, chat: ChatRenderer
) -> TransformersPolicy:
    """Many ids stop a turn, so that turns of a batch end at different times."""
    return make_policy(model, stop_ids=[*chat.stop_ids, *range(20, 70)])


def assert_equals_full_pass(policy: TransformersPolicy, talks: Sequence[Talk]) -> None:
    for talk in talks:
        with torch.no_grad():
            logp = full_pass(policy, talk.ids, talk.images)
        for start, turn in talk.spans:
            rows = logp[start - 1 : start - 1 + len(turn.ids)]
            chosen = rows.gather(1, torch.tensor(turn.ids)[:, None])[:, 0]
            np.testing.assert_allclose(turn.logp, chosen.numpy(), atol=1e-4)
            entropy = torch.special.entr(rows.exp()).sum(-1)
            np.testing.assert_allclose(turn.entropy, entropy.numpy(), atol=1e-4)


def same_tokens(one: Sequence[Talk], other: Sequence[Talk]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.ids == b.ids
        for (_, first), (_, second) in zip(a.spans, b.spans, strict=True):
            assert first.finish == second.finish
            np.testing.assert_allclose(first.logp, second.logp, atol=1e-4)
            np.testing.assert_allclose(first.entropy, second.entropy, atol=1e-4)


# Generation


@pytest.mark.parametrize("sampling", [T1, GREEDY, Sampling(0.7, 0.9)])
def test_log_probs_of_generation_equal_one_full_pass(
    stopping_policy: TransformersPolicy, talks: list[Talk], sampling: Sampling
) -> None:
    played = play(stopping_policy, talks, sampling)
    assert_equals_full_pass(stopping_policy, played)
    turns = [turn for talk in played for _, turn in talk.spans]
    assert len(turns) == sum(len(t.budgets) for t in talks)
    assert {turn.finish for turn in turns} == {"stop", "length"}
    for talk in played:
        for (_, turn), budget in zip(talk.spans, talk.budgets, strict=True):
            assert 1 <= len(turn.ids) <= budget
            assert len(turn.ids) == len(turn.logp) == len(turn.entropy)
            stopped = turn.ids[-1] in stopping_policy.stop_ids
            assert turn.finish == ("stop" if stopped else "length")
            assert stopped or len(turn.ids) == budget
            assert not any(i in stopping_policy.stop_ids for i in turn.ids[:-1])


@pytest.mark.parametrize("tokens_per_pass", [1, 60, 150])
def test_small_passes_change_nothing(
    make_policy: Callable[..., TransformersPolicy],
    model: Any,
    stopping_policy: TransformersPolicy,
    talks: list[Talk],
    tokens_per_pass: int,
) -> None:
    small = make_policy(
        model, stop_ids=sorted(stopping_policy.stop_ids), max_tokens_per_pass=tokens_per_pass
    )
    same_tokens(play(small, talks), play(stopping_policy, talks))


def test_a_sequence_does_not_depend_on_its_batch(
    stopping_policy: TransformersPolicy, talks: list[Talk]
) -> None:
    together = play(stopping_policy, talks)
    alone = [play(stopping_policy, [talk])[0] for talk in talks]
    same_tokens(together, alone)
    other_times = [
        Talk(t.key, t.ids, t.images, t.budgets, t.observations, 2 * (t.key % 5), 3 - t.delay)
        for t in reversed(talks)
    ]
    same_tokens(together, play(stopping_policy, other_times)[::-1])


def test_the_seed_decides(policy: TransformersPolicy, words: list[int]) -> None:
    def tokens(seed: tuple[int, ...], key: int) -> tuple[int, ...]:
        generator = policy.generator(T1)
        generator.submit([Request(key, words[:9], [], 12, seed)])
        while True:
            for completion in generator.step():
                return completion.ids

    assert tokens((1, 2), 0) == tokens((1, 2), 5)
    assert len({tokens(seed, 0) for seed in [(1, 2), (1, 3), (2, 1), (0,)]}) == 4


@pytest.fixture
def passes(policy: TransformersPolicy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens) of every forward pass of the body from now on."""
    shapes: list[tuple[int, int]] = []
    original = ModelAdapter.hidden_states

    def watched(self: ModelAdapter, ids_BT: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append((ids_BT.shape[0], ids_BT.shape[1]))
        return original(self, ids_BT, *args, **kwargs)

    monkeypatch.setattr(ModelAdapter, "hidden_states", watched)
    return shapes


def test_what_is_known_is_not_computed_again(
    policy: TransformersPolicy, words: list[int], passes: list[tuple[int, int]]
) -> None:
    generator = policy.generator(T1)
    generator.submit([Request(k, words[:30], [], 1, (k,)) for k in range(8)])
    assert passes == [(1, 30)]  # a group's prompt once
    said = {c.key: c.ids for c in generator.step()}
    passes.clear()
    more = [Request(k, [*words[:30], *said[k], *words[:4]], [], 1, (k,)) for k in range(8)]
    generator.submit(more)
    assert max(tokens for _, tokens in passes) == 5  # its last token and the observation
    assert sum(rows for rows, _ in passes) <= 8
    passes.clear()
    other = [Request(20 + k, [*words[:25], *words[k : k + 9]], [], 1, (k,)) for k in range(4)]
    generator.submit(other)
    assert passes == [(1, 25), (4, 9)]  # what new prompts begin with once, then the rest


@pytest.mark.parametrize("most", [40, 100])
def test_passes_stay_within_their_bound(
    make_policy: Callable[..., TransformersPolicy],
    model: Any,
    talks: list[Talk],
    trajectories: list[Trajectory],
    passes: list[tuple[int, int]],
    most: int,
) -> None:
    policy = make_policy(model, max_tokens_per_pass=most)
    play(policy, talks)
    policy.score(trajectories)
    assert all(rows == 1 or rows * tokens <= most for rows, tokens in passes)
    assert any(rows > 1 and tokens > 1 for rows, tokens in passes)


def test_long_sequences_outgrow_the_cache(
    policy: TransformersPolicy, words: list[int], make_policy: Any, model: Any
) -> None:
    endless = make_policy(model, stop_ids=[])
    rng = np.random.default_rng(3)
    talks = [
        Talk(
            key,
            rng.choice(words, length).tolist(),
            [],
            [70, 90],
            [(rng.choice(words, 40).tolist(), [])],
            joins_at=at,
        )
        for key, (length, at) in enumerate([(3, 0), (61, 0), (64, 5), (150, 60)])
    ]
    played = play(endless, talks)
    assert_equals_full_pass(endless, played)


def test_copies_of_a_prompt_equal_separate_prompts(
    stopping_policy: TransformersPolicy,
    words: list[int],
    shown: Callable[[EncodedImage], list[int]],
    encode: Callable[..., EncodedImage],
) -> None:
    image, other = encode(1, 84, 84), encode(2, 84, 84)
    prompts: list[tuple[list[int], list[EncodedImage]]] = [
        ([*words[:18], *shown(image), *words[30:34]], [image]),
        ([*words[:18], *shown(other), *words[30:34]], [other]),  # same ids, another picture
        (words[:23], []),
    ]
    talks = [
        Talk(10 * p + sample, ids, images, [6, 6], [([*words[5:9]], [])])
        for sample in range(4)
        for p, (ids, images) in enumerate(prompts)
    ]
    together = play(stopping_policy, talks)
    assert_equals_full_pass(stopping_policy, together)
    same_tokens(together, [play(stopping_policy, [talk])[0] for talk in talks])
    assert len({tuple(t.ids) for t in together}) > 6


def test_equal_sequences_that_continue_together(
    policy: TransformersPolicy, words: list[int]
) -> None:
    # Keys 0 and 1 sample the same (same seed) and come back in one call, with a newcomer whose
    # ids happen to be the same as well.
    generator = policy.generator(T1)

    def finish() -> dict[int, Completion]:
        done: dict[int, Completion] = {}
        while generator.in_flight:
            done |= {c.key: c for c in generator.step()}
        return done

    prompt = words[:20]
    generator.submit([Request(k, prompt, [], 5, (3,)) for k in (0, 1)])
    first = finish()
    assert first[0].ids == first[1].ids
    ids = [*prompt, *first[0].ids, *words[40:43]]
    for keys in ([0, 1, 2], [2, 0, 1]):
        generator = policy.generator(T1)
        generator.submit([Request(k, prompt, [], 5, (3,)) for k in (0, 1)])
        finish()
        generator.submit([Request(k, ids, [], 7, (4, k)) for k in keys])
        done = finish()
        for key in (0, 1, 2):
            talk = Talk(key, [*ids, *done[key].ids], [], [7], spans=[(len(ids), done[key])])
            assert_equals_full_pass(policy, [talk])
        for key in (0, 1, 2):
            generator.release(key)


def test_a_turn_can_be_released_in_mid_flight(
    make_policy: Callable[..., TransformersPolicy], model: Any, words: list[int]
) -> None:
    policy = make_policy(model, stop_ids=[])
    generator = policy.generator(T1)
    for victim in range(4):
        keys = [10 * victim + k for k in range(4)]
        generator.submit([Request(k, words[k : k + 8 + k % 3], [], 9, (k,)) for k in keys])
        for _ in range(3):
            generator.step()
        generator.release(keys[victim])
        assert generator.in_flight == 3
        done: dict[int, Completion] = {}
        while generator.in_flight:
            done |= {c.key: c for c in generator.step()}
        for key in keys:
            if key == keys[victim]:
                assert key not in done
                continue
            ids = words[key : key + 8 + key % 3]
            talk = Talk(key, [*ids, *done[key].ids], [], [9], spans=[(len(ids), done[key])])
            assert_equals_full_pass(policy, [talk])
        for key in set(keys) - {keys[victim]}:
            generator.release(key)
    with pytest.raises(KeyError):
        generator.release(0)


def test_greedy_equals_hugging_face_generate(
    policy: TransformersPolicy,
    words: list[int],
    shown: Callable[[EncodedImage], list[int]],
    encode: Callable[..., EncodedImage],
) -> None:
    prompts: list[tuple[list[int], list[EncodedImage]]] = []
    for seed in range(6):
        images = [encode(seed + 7 * i, 84, 140 - 28 * i) for i in range(seed % 3)]
        text = np.random.default_rng(seed).choice(words, 12).tolist()
        prompts.append(([*text[:5], *[i for im in images for i in shown(im)], *text[5:]], images))
    played = play(
        policy, [Talk(k, ids, images, [24]) for k, (ids, images) in enumerate(prompts)], GREEDY
    )
    for talk, (ids, images) in zip(played, prompts, strict=True):
        expected = policy.adapter.model.generate(
            **model_inputs(policy, ids, images),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=24,
            suppress_tokens=policy.banned.tolist(),
            eos_token_id=sorted(policy.stop_ids),
            pad_token_id=0,
        )
        assert talk.ids == expected[0].tolist()
    assert len({tuple(t.ids[-5:]) for t in played}) > 2


@pytest.mark.parametrize("elements", [1, 2**12])
def test_a_large_vocabulary_gives_the_same_tokens(
    stopping_policy: TransformersPolicy,
    talks: list[Talk],
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the product's order, and however many rows are sampled from at once."""
    expected = play(stopping_policy, talks)
    monkeypatch.setattr(generation, "_LARGE_WEIGHTS", 0)
    monkeypatch.setattr(generation, "_CACHED_ELEMENTS", elements)
    same_tokens(play(stopping_policy, talks), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(
    make_model: Any,
    make_policy: Callable[..., TransformersPolicy],
    stopping_policy: TransformersPolicy,
    talks: list[Talk],
    attention: str,
) -> None:
    other = make_policy(make_model(attention=attention), stop_ids=sorted(stopping_policy.stop_ids))
    assert other.adapter.text_config._attn_implementation == attention
    played = play(other, talks)
    same_tokens(played, play(stopping_policy, talks))
    assert_equals_full_pass(other, played)


def test_bfloat16_generation_agrees_with_bfloat16_scoring(
    make_model: Any, make_policy: Callable[..., TransformersPolicy], talks: list[Talk]
) -> None:
    for attention in ("sdpa", "eager"):
        policy = make_policy(make_model(attention=attention).bfloat16())
        for talk in play(policy, talks):
            with torch.no_grad():
                logp = full_pass(policy, talk.ids, talk.images)
            for start, turn in talk.spans:
                rows = logp[start - 1 : start - 1 + len(turn.ids)]
                chosen = rows.gather(1, torch.tensor(turn.ids)[:, None])[:, 0]
                assert np.abs(np.array(turn.logp) - chosen.numpy()).mean() < 0.15


def test_autocast_generation_agrees_with_an_autocast_pass(
    stopping_policy: TransformersPolicy, talks: list[Talk]
) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        played = play(stopping_policy, talks)
        for talk in played:
            with torch.no_grad():
                logp = full_pass(stopping_policy, talk.ids, talk.images)
            for start, turn in talk.spans:
                rows = logp[start - 1 : start - 1 + len(turn.ids)]
                chosen = rows.gather(1, torch.tensor(turn.ids)[:, None])[:, 0]
                assert np.abs(np.array(turn.logp) - chosen.numpy()).mean() < 0.1


def test_the_cache_is_not_copied_for_every_newcomer(
    policy: TransformersPolicy, words: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = []
    original = kv_cache._resized
    monkeypatch.setattr(
        kv_cache, "_resized", lambda *args: grown.append(args[1]) or original(*args)
    )
    generator = policy.generator(T1)
    generator.submit([Request(k, words[:7], [], 1, (k,)) for k in range(150)])
    for k in range(150, 300):
        generator.submit([Request(k, words[:7], [], 1, (k,))])
    layers_and_kinds = 4
    assert len(grown) / layers_and_kinds < 40  # growing by one slot would take 299


def test_slots_of_released_sequences_are_used_again(
    policy: TransformersPolicy, words: list[int]
) -> None:
    generator = policy.generator(T1)
    for start in range(0, 60, 3):
        keys = range(start, start + 3)
        generator.submit([Request(k, words[k : k + 7], [], 2, (k,)) for k in keys])
        while generator.in_flight:
            generator.step()
        for key in keys:
            generator.release(key)
    assert generator._cache._keys[0].shape[0] == 3


def test_a_text_only_model(words: list[int], make_model: Any) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    adapter = ModelAdapter(Qwen2ForCausalLM(config).eval(), None, None)
    policy = TransformersPolicy(adapter, allowed_ids=290, forbidden_ids=[3], stop_ids=range(5, 30))
    rng = np.random.default_rng(1)
    talks = [
        Talk(
            key,
            rng.integers(30, 290, 18 + 3 * key).tolist(),
            [],
            [6, 9],
            [(rng.integers(30, 290, 4).tolist(), [])],
            joins_at=key // 2,
        )
        for key in range(5)
    ]
    played = play(policy, talks)
    assert_equals_full_pass(policy, played)
    image = EncodedImage(np.zeros((28, 28, 3), np.uint8), (1, 2, 2), 0)
    ids, positions = torch.zeros(1, 3).long(), torch.zeros(3, 1, 3).long()
    with pytest.raises(ModelError, match="takes no pictures"):
        adapter.hidden_states(ids, positions, [image], None)


# What may be sampled


@pytest.fixture(scope="module")
def tempted_policy(
    make_model: Any, make_policy: Callable[..., TransformersPolicy]
) -> TransformersPolicy:
    """A model that would love to say what it must not: forbidden and padded rows are huge."""
    model = make_model(tie_word_embeddings=False)
    policy = make_policy(model)
    with torch.no_grad():
        model.lm_head.weight[policy.banned] *= 40
    return policy


def test_banned_ids_are_never_sampled_and_have_no_probability(
    tempted_policy: TransformersPolicy, chat: ChatRenderer, words: list[int]
) -> None:
    policy = tempted_policy
    banned = set(policy.banned.tolist())
    size = len(chat.tokenizer)
    assert banned == {*chat.forbidden_ids, *range(size, size + PADDED_ROWS)}
    assert policy.adapter.vocabulary_rows == size + PADDED_ROWS
    rng = np.random.default_rng(0)
    talks = [Talk(k, rng.choice(words, 6).tolist(), [], [15]) for k in range(30)]
    for sampling in (T1, GREEDY, Sampling(2.0, 0.95)):
        played = play(policy, talks, sampling)
        assert not any(i in banned for t in played for i in t.ids)
        assert_equals_full_pass(policy, played)
    logits = policy.adapter.model(input_ids=torch.tensor([talks[0].ids])).logits
    assert logits[0, -1].argmax().item() in banned  # it was tempted


def test_scores_exclude_banned_ids_from_the_normaliser(
    tempted_policy: TransformersPolicy, random_trajectory: Callable[..., Trajectory]
) -> None:
    trajectory = random_trajectory(3)
    logp, entropy = reference_scores(tempted_policy, trajectory)
    score = tempted_policy.score([trajectory], with_entropy=True)[0]
    np.testing.assert_allclose(score.logp, logp, atol=1e-4)
    np.testing.assert_allclose(score.entropy, entropy, atol=1e-4)
    assert entropy.max() < math.log(tempted_policy.adapter.vocabulary_rows - PADDED_ROWS - 3)


def test_sampled_frequencies_match_the_probabilities(
    policy: TransformersPolicy, words: list[int]
) -> None:
    draws, prompt = 4000, words[:7]
    with torch.no_grad():
        logp = full_pass(policy, [*prompt, 0], [])[-1]
    for temperature, top_p in [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)]:
        generator = policy.generator(Sampling(temperature, top_p))
        generator.submit([Request(k, prompt, [], 1, (5, k)) for k in range(draws)])
        seen = torch.zeros(len(logp))
        for completion in generator.step():
            seen[completion.ids[0]] += 1
        expected = draws * nucleus(torch.softmax(logp.double() / temperature, -1), top_p)
        assert seen.sum() == draws
        assert not seen[expected == 0].any()
        common = expected >= 5
        pooled = [(seen[~common].sum(), expected[~common].sum())] if (~common).any() else []
        cells = [*zip(seen[common], expected[common], strict=True), *pooled]
        statistic = sum(float((s - e) ** 2 / e) for s, e in cells if e > 0)
        freedom = len(cells) - 1
        assert freedom > 10
        assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Plain loop: the fewest most likely ids whose probability reaches top_p, renormalised."""
    kept = torch.zeros_like(probabilities)
    total = 0.0
    for index in probabilities.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept[index] = probabilities[index]
        total += float(probabilities[index])
    return kept / kept.sum()


@given(
    st.integers(0, 10_000),
    st.floats(0.05, 1.0),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8),
)
def test_sample_tokens_inverts_the_distribution(
    seed: int, top_p: float, temperature: float, uniforms: list[float]
) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 2
    logits[0, 3] = logits[0, 11] = BANNED
    allowed = torch.softmax(logits[0].double() / temperature, -1)
    cut = nucleus(allowed, top_p)
    u = torch.tensor(uniforms, dtype=torch.float64)
    ids = sample_tokens(logits.expand(len(u), -1), u, Sampling(temperature, top_p))
    assert ids.dtype == torch.int64
    assert (cut[ids] > 0).all()
    assert not ((ids == 3) | (ids == 11)).any()
    if top_p == 1:
        below = torch.tensor([allowed[:i].sum() for i in ids.tolist()])
        assert (below <= u + 1e-9).all()
        assert (u <= below + allowed[ids] + 1e-9).all()


@pytest.mark.parametrize("sampling", [T1, Sampling(0.7), Sampling(0.7, 0.9)])
def test_draws_in_place_are_those_of_the_plain_formula(sampling: Sampling) -> None:
    """Of Qwen's vocabulary, id by id; the logits are left as they were."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 151_936, generator=generator) * 3
    uniform = torch.rand(6, dtype=torch.float64, generator=generator)
    ids = sample_tokens(logits, uniform, sampling)
    for passed in (logits, logits.double()):
        before = passed.clone()
        assert torch.equal(sample_tokens(passed, uniform, sampling), ids)
        assert torch.equal(passed, before)
    weights = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    order = torch.arange(weights.shape[1]).expand_as(weights)
    if sampling.top_p < 1:
        weights, order = weights.sort(dim=-1, descending=True)
        weights = weights.where(weights.cumsum(-1) - weights < sampling.top_p, 0.0)
    cumulative = weights.cumsum(dim=-1)
    places = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)
    assert ids.tolist() == order.gather(1, places)[:, 0].tolist()


def test_extreme_draws_stay_on_possible_ids() -> None:
    last = 1 - 2.0**-53
    logits = torch.tensor([[BANNED, 0.0, 1.0, BANNED, 2.0, BANNED, BANNED]]).repeat(3, 1)
    u = torch.tensor([0.0, 0.5, last], dtype=torch.float64)
    for sampling in (T1, Sampling(0.01), Sampling(1.0, 0.999), Sampling(5.0, 0.01)):
        assert set(sample_tokens(logits, u, sampling).tolist()) <= {1, 2, 4}
    assert sample_tokens(logits, u, T1).tolist() == [1, 4, 4]
    assert sample_tokens(logits, u, Sampling(1.0, 0.01)).tolist() == [4, 4, 4]


@pytest.mark.parametrize("arguments", [(-0.1, 1.0), (1.0, 0.0), (1.0, 1.01)])
def test_impossible_sampling_is_refused(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Sampling(*arguments)


# Misuse


def test_requests_that_do_not_continue_are_refused(
    policy: TransformersPolicy, words: list[int]
) -> None:
    generator = policy.generator(T1)
    prompt = words[:8]
    generator.submit([Request(1, prompt, [], 3, (0,))])
    with pytest.raises(ValueError, match="in flight"):
        generator.submit([Request(1, [*prompt, 5], [], 3, (0,))])
    completion = None
    while completion is None:
        completion = next(iter(generator.step()), None)
    told = [*prompt, *completion.ids]
    changed = [*prompt[:-1], prompt[-1] + 1, *completion.ids, 7]
    with pytest.raises(ValueError, match="do not continue"):
        generator.submit([Request(1, changed, [], 3, (0,))])
    with pytest.raises(ValueError, match=r"no new token|do not continue"):
        generator.submit([Request(1, prompt[:4], [], 3, (0,))])
    with pytest.raises(ValueError, match="max_tokens"):
        generator.submit([Request(1, [*told, 7], [], 0, (0,))])
    generator.submit([Request(1, [*told, 7], [], 2, (0,))])
    done = []
    while generator.in_flight:
        done += generator.step()
    talk = Talk(1, [*told, 7, *done[0].ids], [], [2], spans=[(len(told) + 1, done[0])])
    assert_equals_full_pass(policy, [talk])
    assert generator.step() == []
    generator.release(1)
    with pytest.raises(KeyError):
        generator.release(1)


def test_placeholders_must_match_the_pictures(
    policy: TransformersPolicy,
    words: list[int],
    shown: Callable[[EncodedImage], list[int]],
    encode: Callable[..., EncodedImage],
) -> None:
    image = encode(1)
    for ids, images in [(words[:5], [image]), (shown(image), []), (shown(image)[1:-2], [image])]:
        with pytest.raises(ModelError, match="placeholder"):
            policy.adapter.positions(ids, images)
        with pytest.raises(ModelError, match="placeholder"):
            policy.generator(T1).submit([Request(0, ids, images, 3, (0,))])


def test_unsupported_models_are_refused(make_model: Any) -> None:
    model = make_model()
    model.lm_head = torch.nn.Linear(64, model.config.text_config.vocab_size)
    with pytest.raises(ModelError, match="bias"):
        ModelAdapter(model, None, None)
    model = make_model()
    model.config.text_config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ModelError, match="flash_attention_2"):
        ModelAdapter(model, None, None)


# Positions


def test_positions_are_the_models_own(
    policy: TransformersPolicy,
    random_trajectory: Callable[..., Trajectory],
    encode: Callable[..., EncodedImage],
) -> None:
    images = [encode(1, 84, 140), encode(2, 140, 56), encode(3, 28, 28)]
    trajectory = random_trajectory(1, images, turns=3)
    assert len(trajectory.images) == 3
    inputs = model_inputs(policy, trajectory.ids.tolist(), images)
    expected, _ = policy.adapter.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    found = policy.adapter.positions(trajectory.ids, images)
    assert torch.equal(found, expected[:, 0])
    # By hand, for the first picture: rows and columns count from the position it starts at.
    first = int((trajectory.ids == policy.adapter.image_token_id).argmax())
    block = found[:, first : first + 15] - first
    assert block[0].tolist() == [0] * 15
    assert block[1].tolist() == [row for row in range(3) for _ in range(5)]
    assert block[2].tolist() == list(range(5)) * 3
    assert found[:, first + 15].tolist() == [first + 5] * 3
    text = random_trajectory(2)
    assert torch.equal(
        policy.adapter.positions(text.ids, []), torch.arange(len(text.ids)).expand(3, -1)
    )


# Scoring


def reference_scores(policy: TransformersPolicy, trajectory: Trajectory) -> tuple[Any, Any]:
    with torch.no_grad():
        rows = full_pass(policy, trajectory.ids.tolist(), trajectory.images)
    chosen = rows.gather(1, torch.tensor(trajectory.ids)[1:, None])[:, 0]
    entropy = torch.special.entr(rows.exp()).sum(-1)
    mask = trajectory.loss_mask[1:]
    padded = [np.concatenate([[0], np.where(mask, x.numpy(), 0)]) for x in (chosen, entropy)]
    return padded[0], padded[1]


@pytest.fixture(scope="module")
def trajectories(
    random_trajectory: Callable[..., Trajectory], encode: Callable[..., EncodedImage]
) -> list[Trajectory]:
    return [
        random_trajectory(
            seed, [encode(seed + i, 56 + 28 * i, 84) for i in range(seed % 4)], 1 + seed % 3, 9
        )
        for seed in range(10)
    ]


@pytest.mark.parametrize("tokens_per_pass", [1, 50, 120, 10_000])
def test_scores_equal_plain_passes(
    make_policy: Callable[..., TransformersPolicy],
    model: Any,
    trajectories: list[Trajectory],
    tokens_per_pass: int,
) -> None:
    policy = make_policy(model, max_tokens_per_pass=tokens_per_pass)
    order = np.random.default_rng(tokens_per_pass).permutation(len(trajectories))
    scores = policy.score([trajectories[i] for i in order], with_entropy=True)
    assert len(scores) == len(trajectories)
    for score, index in zip(scores, order, strict=True):
        logp, entropy = reference_scores(policy, trajectories[index])
        assert score.logp.dtype == score.entropy.dtype == np.float32
        assert score.logp.shape == trajectories[index].ids.shape
        np.testing.assert_allclose(score.logp, logp, atol=1e-4)
        np.testing.assert_allclose(score.entropy, entropy, atol=1e-4)
        assert not score.logp[~trajectories[index].loss_mask].any()


def test_scores_without_entropy_and_of_odd_inputs(
    policy: TransformersPolicy, trajectories: list[Trajectory]
) -> None:
    assert policy.score([]) == []
    score = policy.score(trajectories[:1])[0]
    assert not score.entropy.any()
    assert score.logp.any()
    silent = copy.copy(trajectories[1])
    silent.loss_mask = np.zeros_like(silent.loss_mask)
    scores = policy.score([silent, trajectories[2]], with_entropy=True)
    assert not scores[0].logp.any()
    np.testing.assert_allclose(
        scores[1].logp, reference_scores(policy, trajectories[2])[0], atol=1e-4
    )


def test_score_never_reads_outcomes_or_recorded_values(
    policy: TransformersPolicy, trajectories: list[Trajectory]
) -> None:
    changed = copy.copy(trajectories[3])
    changed.reward, changed.success = 99.0, True
    changed.logp = changed.entropy = np.full_like(changed.logp, -7)
    changed.teacher_logp = None
    one, other = (policy.score([t], with_entropy=True)[0] for t in (trajectories[3], changed))
    assert np.array_equal(one.logp, other.logp)
    assert np.array_equal(one.entropy, other.entropy)


def test_score_turns_dropout_off_and_leaves_the_mode(
    make_model: Any,
    make_policy: Callable[..., TransformersPolicy],
    trajectories: list[Trajectory],
) -> None:
    model = make_model(attention_dropout=0.5)
    policy = make_policy(model)
    scores = [policy.score(trajectories[:3]) for _ in range(2)]
    model.train()
    trained = policy.score(trajectories[:3])
    assert model.training
    for one, *others in zip(trained, *scores, strict=True):
        for other in others:
            assert np.array_equal(one.logp, other.logp)
    assert not any(p.grad is not None for p in model.parameters())


def test_generation_turns_dropout_off(
    make_model: Any,
    make_policy: Callable[..., TransformersPolicy],
    talks: list[Talk],
) -> None:
    model = make_model(attention_dropout=0.5)
    policy = make_policy(model)
    expected = play(policy, talks[:3])
    model.train()
    same_tokens(play(policy, talks[:3]), expected)


def test_gradients_of_a_padded_batch_equal_those_of_plain_passes(
    make_model: Any,
    make_policy: Callable[..., TransformersPolicy],
    trajectories: list[Trajectory],
) -> None:
    model = make_model()
    policy = make_policy(model)
    chosen = trajectories[:5]
    batch = TrajectoryBatch.build(policy.adapter, chosen)
    assert batch.attention_BT is not None
    logp_BT = batch.scatter(policy.logprobs(batch)[0])
    rng = torch.Generator().manual_seed(0)
    upstream = [torch.randn(len(t.ids), generator=rng) for t in chosen]
    total = sum(
        (logp_BT[row, : len(weights)] * weights).sum() for row, weights in enumerate(upstream)
    )
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    expected_total = torch.zeros(())
    for trajectory, weights in zip(chosen, upstream, strict=True):
        rows = full_pass(policy, trajectory.ids.tolist(), trajectory.images)
        picked = rows.gather(1, torch.tensor(trajectory.ids)[1:, None])[:, 0]
        mask = torch.tensor(trajectory.loss_mask)[1:]
        expected_total = expected_total + (picked * weights[1:])[mask].sum()
    wanted = torch.autograd.grad(expected_total, list(model.parameters()), allow_unused=True)
    assert total.item() == pytest.approx(expected_total.item(), abs=1e-3)
    for (name, _), one, other in zip(model.named_parameters(), found, wanted, strict=True):
        assert one is not None, name
        assert other is not None, name
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(scale, 1e-3), msg=name)
        assert scale > 0, name


def test_equal_lengths_need_no_mask_and_change_nothing(
    policy: TransformersPolicy,
    random_trajectory: Callable[..., Trajectory],
    encode: Callable[..., EncodedImage],
) -> None:
    one = random_trajectory(4, [encode(4, 84, 84)])
    twins = [one, copy.copy(one)]
    twins[1].images = [encode(5, 84, 84)]  # as long, another picture
    batch = TrajectoryBatch.build(policy.adapter, twins)
    assert batch.attention_BT is None
    for score, twin in zip(policy.score(twins), twins, strict=True):
        np.testing.assert_allclose(score.logp, reference_scores(policy, twin)[0], atol=1e-4)


@given(st.lists(st.integers(1, 60), max_size=25), st.integers(1, 150))
def test_split_by_tokens_covers_everything_within_the_limit(lengths: list[int], most: int) -> None:
    groups = split_by_tokens(lengths, most)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= most
    assert groups == split_by_tokens(lengths, most)
