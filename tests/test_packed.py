"""Packed rows: the same numbers as padded ones, without padding."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from families import SEEING, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from running import train, train_rows
from step_rows import states_of
from test_text_checkpoints import save_checkpoint, small_tokenizer
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from reopold_agent.config import EngineConfig
from reopold_agent.errors import CheckpointError, ConfigError, ModelError
from reopold_agent.objectives import DivergenceSettings
from reopold_agent.policies import attention
from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.attention import attend_by_rows, packed_kernel
from reopold_agent.policies.batch import PassTokens, TrajectoryBatch
from reopold_agent.policies.compiling import compile_layers
from reopold_agent.policies.grouping import split_by_tokens
from reopold_agent.policies.loading import ModelSpec, load_model
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.train import finish, setup
from reopold_agent.types import Completion, EncodedImage, Request, Sampling, Trajectory

KINDS = [
    *("qwen2_5_vl", "qwen2_5_vl sliding", "qwen2_5_vl checkpointed"),
    *("qwen2_vl", "qwen3_vl", "qwen3_vl checkpointed"),
    *("qwen2", "qwen2 sliding", "qwen3", "llama", "mistral"),
]


@pytest.fixture(scope="module")
def rows(
    random_trajectory: Callable[..., Trajectory], encode: Callable[..., EncodedImage]
) -> list[Trajectory]:
    """Episodes of very different lengths: three pictures of several windows, one, or none."""
    pictures = [encode(1, 168, 140), encode(2, 56, 84), encode(3, 84, 252)]
    return [
        random_trajectory(1, pictures, 3, 20),
        random_trajectory(2, [], 1, 1),
        random_trajectory(3, [encode(4)], 1, 6),
        random_trajectory(4, [], 2, 90),
        random_trajectory(5, [encode(5)], 1, 6),
    ]


def tiny(kind: str, make_model: Callable[..., Any], tokenizer: Any, seed: int = 0) -> Any:
    """A random model of a kind whose pictures, if it sees any, are those of ``make_model``."""
    name, _, variant = kind.partition(" ")
    seeing = make_model(
        seed,
        use_sliding_window=variant == "sliding",
        sliding_window=16 if variant == "sliding" else None,
        max_window_layers=1,
    )
    config = seeing.config
    if name == "qwen2_5_vl":
        model = seeing
    elif name in SEEING:
        model = tiny_model(tiny_config(name, tokenizer, {"patch_size": 14}), seed)
    else:
        text = {**config.text_config.to_dict(), "tie_word_embeddings": False}
        kinds: dict[str, tuple[Any, Any]] = {
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "llama": (LlamaConfig, LlamaForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
        }
        config_class, model_class = kinds[name]
        for key in ("model_type", "layer_types", "dtype", "architectures"):
            text.pop(key, None)
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10.0}
        if name == "mistral":
            text["sliding_window"] = 16
        made = config_class(**text)
        made._attn_implementation = "sdpa"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(made).eval()
    if variant == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def twin(model: Any, kernel: str = "sdpa") -> Any:
    """The same model with packed rows."""
    packed = copy.deepcopy(model)
    attend_by_rows(packed, kernel)
    return packed


def readable(rows: list[Trajectory], model: Any) -> list[Trajectory]:
    """The rows that a model reads: text models get those with pictures as text."""
    if hasattr(model.model, "get_rope_index"):
        return rows
    blind = [copy.copy(row) for row in rows]
    for row in blind:
        row.images = []
    return blind


@pytest.fixture
def make_pair(
    make_policy: Callable[..., TransformersPolicy], make_model: Callable[..., Any], chat: Any
) -> Callable[..., tuple[TransformersPolicy, TransformersPolicy]]:
    """``make_pair(kind, seed=0)``: policies of a model, with padded and with packed rows."""

    def make(kind: str, seed: int = 0, kernel: str = "sdpa") -> tuple[Any, Any]:
        model = tiny(kind, make_model, chat.tokenizer, seed)
        policies = make_policy(model), make_policy(twin(model, kernel))
        if not hasattr(model.model, "get_rope_index"):
            for policy in policies:
                policy.adapter.image_token_id = None
        return policies

    return make


def assert_close(one: Any, other: Any, name: str = "") -> None:
    """Within 1e-5, relative to the largest value where that is above 1."""
    a, b = np.asarray(one), np.asarray(other)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()), err_msg=name)


def gradients(policy: TransformersPolicy, values_N: Tensor) -> dict[str, Tensor]:
    """Gradients of a weighted sum of values at the loss tokens."""
    weights = torch.randn(len(values_N), generator=torch.Generator().manual_seed(0))
    model = policy.adapter.model
    model.zero_grad()
    (values_N * weights).sum().backward()  # type: ignore[no-untyped-call]
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_give_the_numbers_of_padded_ones(
    kind: str,
    rows: list[Trajectory],
    make_pair: Callable[..., tuple[TransformersPolicy, TransformersPolicy]],
) -> None:
    padded, packed = make_pair(kind)
    rows = readable(rows, padded.adapter.model)
    assert (padded.adapter.packed, packed.adapter.packed) == (False, True)
    assert packed.adapter.keeps_rows_apart()
    for policy in (padded, packed):
        policy.adapter.model.train()  # gradient checkpointing is off in evaluation
    batches = [TrajectoryBatch.build(policy.adapter, rows) for policy in (padded, packed)]
    assert batches[1].ids_BT.shape == (1, sum(len(row.ids) for row in rows))
    assert batches[1].attention_BT is None
    (logp_N, entropy_N), (packed_N, packed_entropy_N) = (
        policy.logprobs(batch, with_entropy=True)
        for policy, batch in zip((padded, packed), batches, strict=True)
    )
    assert entropy_N is not None
    assert packed_entropy_N is not None
    assert_close(packed_N.detach(), logp_N.detach())
    assert_close(packed_entropy_N, entropy_N)
    expected, found = gradients(padded, logp_N), gradients(packed, packed_N)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, name)


@pytest.mark.parametrize("settings", [DivergenceSettings(0.5), DivergenceSettings(0.5, top_k=8)])
def test_packed_rows_give_the_divergences_of_padded_ones(
    settings: DivergenceSettings,
    rows: list[Trajectory],
    make_pair: Callable[..., tuple[TransformersPolicy, TransformersPolicy]],
) -> None:
    (student, packed_student), (teacher, packed_teacher) = (
        make_pair("qwen2_5_vl", seed) for seed in (0, 1)
    )
    (expected, expected_logp), (found, logp) = (
        one.divergence(rows, other, states_of(rows, other), settings)
        for one, other in ((student, teacher), (packed_student, packed_teacher))
    )
    assert_close(found.detach(), expected.detach())
    assert_close(logp.detach(), expected_logp.detach())
    wanted = gradients(student, expected)
    for name, gradient in gradients(packed_student, found).items():
        assert_close(gradient, wanted[name], name)


def test_scores_do_not_depend_on_the_passes(
    rows: list[Trajectory],
    make_pair: Callable[..., tuple[TransformersPolicy, TransformersPolicy]],
) -> None:
    padded, packed = make_pair("qwen2_5_vl")
    longest, total = (f(len(row.ids) for row in rows) for f in (max, sum))
    expected = padded.score(rows, with_entropy=True)
    for most in (1, longest, 10_000):
        packed.max_tokens_per_pass = most
        packed.passes = PassTokens()
        for score, other in zip(packed.score(rows, with_entropy=True), expected, strict=True):
            assert_close(score.logp, other.logp)
            assert_close(score.entropy, other.entropy)
        assert (packed.passes.computed, packed.passes.real) == (total, total)
    assert padded.passes.computed == longest * len(rows)
    assert padded.passes.padding_share == pytest.approx(1 - total / (longest * len(rows)))


def continued(row: Trajectory, other: Trajectory, pictures: int) -> Trajectory:
    """A row's prompt, of which so many pictures, with the response of another."""
    start, begin = row.prompt_length, other.prompt_length
    shift = start - begin
    return dataclasses.replace(
        row,
        ids=np.concatenate([row.ids[:start], other.ids[begin:]]),
        loss_mask=np.concatenate([row.loss_mask[:start], other.loss_mask[begin:]]),
        logp=np.concatenate([row.logp[:start], other.logp[begin:]]),
        entropy=np.concatenate([row.entropy[:start], other.entropy[begin:]]),
        images=[*row.images[:pictures], *other.images],
        turns=[
            dataclasses.replace(t, start=t.start + shift, end=t.end + shift) for t in other.turns
        ],
    )


@pytest.fixture(scope="module")
def groups(
    rows: list[Trajectory],
    random_trajectory: Callable[..., Trajectory],
    encode: Callable[..., EncodedImage],
) -> list[Trajectory]:
    """Samples of two tasks in turn, a row that is alone, and one like it but for its picture."""
    first, second, alone = rows[0], rows[3], rows[2]
    others = [random_trajectory(seed, [], 2, 5 + 3 * seed) for seed in (11, 12, 13)]
    # The picture that a tool showed is in the response.
    seen = random_trajectory(14, [encode(6), encode(7)], 2, 6)
    seen = dataclasses.replace(seen, images=seen.images[1:])
    # Encoded again, and so with another key: the same picture.
    again = [dataclasses.replace(image, key=-1 - n) for n, image in enumerate(first.images)]
    return [
        first,
        second,
        continued(dataclasses.replace(first, images=again), seen, 1),
        alone,
        continued(second, others[0], 0),
        dataclasses.replace(alone, images=[encode(8)]),
        continued(second, others[1], 0),
        continued(first, others[2], 1),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_a_task_share_their_prompt(
    kind: str,
    groups: list[Trajectory],
    make_pair: Callable[..., tuple[TransformersPolicy, TransformersPolicy]],
) -> None:
    padded, packed = make_pair(kind)
    rows = readable(groups, padded.adapter.model)
    seeing = bool(rows[0].images)
    for policy in (padded, packed):
        policy.adapter.model.train()
    batches = [TrajectoryBatch.build(policy.adapter, rows) for policy in (padded, packed)]
    shared = [rows[0].prompt_length] * 2 + [rows[1].prompt_length] * 2
    if not seeing:  # and then the last two differ in nothing
        shared.append(rows[3].prompt_length)
    assert batches[1].tokens == batches[1].ids_BT.numel() == batches[0].tokens - sum(shared)
    logp_N, packed_N = (
        policy.logprobs(batch)[0] for policy, batch in zip((padded, packed), batches, strict=True)
    )
    assert_close(packed_N.detach(), logp_N.detach())
    expected, found = gradients(padded, logp_N), gradients(packed, packed_N)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, name)


def test_no_prompt_is_shared_that_ends_inside_of_a_picture(
    groups: list[Trajectory],
    make_pair: Callable[..., tuple[TransformersPolicy, TransformersPolicy]],
) -> None:
    padded, packed = make_pair("qwen2_5_vl")
    image = padded.adapter.image_token_id
    rows = [groups[0], groups[2]]
    inside = int(np.flatnonzero(groups[0].ids == image)[1])
    rows = [dataclasses.replace(row, prompt_length=inside) for row in rows]
    for score, other in zip(packed.score(rows), padded.score(rows), strict=True):
        assert_close(score.logp, other.logp)
    assert packed.passes.computed == sum(len(row.ids) for row in rows)


def test_decoding_does_not_copy_the_keys_of_a_group_of_heads(
    make_pair: Callable[..., tuple[TransformersPolicy, TransformersPolicy]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    padded, packed = make_pair("qwen2")
    requests = [Request(n, list(range(10, 14 + 5 * n)), [], 6, seed=(n,)) for n in range(3)]

    def played(policy: TransformersPolicy) -> list[Completion]:
        generator = policy.generator(Sampling())
        generator.submit(requests)
        copied = attention.sdpa_attention_forward

        def prefill_only(module: Any, query: Tensor, *args: Any) -> Any:
            assert query.shape[2] > 1
            return copied(module, query, *args)

        monkeypatch.setattr(attention, "sdpa_attention_forward", prefill_only)
        done: list[Completion] = []
        while generator.in_flight:
            done += generator.step()
        monkeypatch.setattr(attention, "sdpa_attention_forward", copied)
        return sorted(done, key=lambda each: each.key)

    for one, other in zip(played(packed), played(padded), strict=True):
        assert one.ids == other.ids
        assert_close(one.logp, other.logp)
        assert_close(one.entropy, other.entropy)


def test_values_are_laid_out_as_the_ids(
    groups: list[Trajectory],
    make_pair: Callable[..., tuple[TransformersPolicy, TransformersPolicy]],
) -> None:
    _, packed = make_pair("qwen2_5_vl")
    batch = TrajectoryBatch.build(packed.adapter, groups)
    ids = torch.cat([torch.from_numpy(row.ids[row.loss_mask]) for row in groups])
    assert torch.equal(batch.ids_BT[batch.row_N, batch.column_N], ids)
    assert torch.equal(batch.aligned([row.ids for row in groups]), batch.ids_BT)
    mask = batch.aligned([row.loss_mask for row in groups])
    logp = batch.aligned([row.logp for row in groups])
    assert mask.sum() == len(ids)
    assert torch.equal(batch.scatter(logp[0, batch.column_N]), logp)


@given(st.lists(st.integers(1, 60), max_size=25), st.integers(1, 150))
def test_packed_passes_are_full(lengths: list[int], most: int) -> None:
    groups = split_by_tokens(lengths, most, packed=True)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in group) for group in groups]
    assert all(len(g) == 1 or total <= most for g, total in zip(groups, sums, strict=True))
    for one, total in enumerate(sums):  # no two of them would fit into one pass
        assert all(total + other > most for other in sums[one + 1 :])


# Kernels of GPUs, of which CPUs have stand-ins


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float, window: tuple[int, int]
) -> Tensor:
    """What the kernels compute, from the documentation of flash-attn: token by token."""
    assert query.dim() == 3
    assert bounds.dtype == torch.int32
    shared = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
    out = torch.empty_like(query)
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[first:last], key[first:last]) * scale
        places = torch.arange(last - first)
        ahead = places - places[:, None]
        left, right = window
        hidden = (ahead > right) & (right >= 0) | (ahead < -left) & (left >= 0)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, value[first:last])
    return out


def stand_in(monkeypatch: pytest.MonkeyPatch, kernel: str, longest: list[int]) -> None:
    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert dropout_p == 0
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        longest.append(max_seqlen_q)
        right = 0 if causal else window_size[1]
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return plain_attention(q, k, v, cu_seqlens_q, scale, (window_size[0], right))

    def with_groups(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
        max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert enable_gqa or query.shape[1] == key.shape[1]
        return flash_attn_varlen_func(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, scale, False, window_size
        )

    def without_groups(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
        max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        return with_groups(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale,
            window_size=window_size,
        )  # fmt: skip

    name = "flash_attn" if kernel == "flash_attention_2" else "torch.nn.attention.varlen"
    module: Any = ModuleType(name)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.varlen_attn = without_groups if kernel == "varlen of 2.11" else with_groups
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(attention, "_runs_here", lambda query: True)


@pytest.mark.parametrize("kernel", ["flash_attention_2", "varlen", "varlen of 2.11"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl sliding", "qwen2"])
def test_kernels_get_rows_and_windows(
    kernel: str,
    kind: str,
    rows: list[Trajectory],
    make_pair: Callable[..., tuple[TransformersPolicy, TransformersPolicy]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest: list[int] = []
    stand_in(monkeypatch, kernel, longest)
    padded, packed = make_pair(kind, kernel=kernel.split()[0])
    rows = readable(rows, padded.adapter.model)
    for score, other in zip(packed.score(rows), padded.score(rows), strict=True):
        assert_close(score.logp, other.logp)
    vision = [] if kind == "qwen2" else [64, 120]  # patches of the largest window and picture
    assert longest == [*vision, *[max(len(row.ids) for row in rows)] * 2]
    assert packed.adapter.keeps_rows_apart()


def test_half_precision_of_autocast_reaches_the_kernel(
    rows: list[Trajectory],
    make_policy: Callable[..., TransformersPolicy],
    make_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtypes = []
    monkeypatch.setattr(attention, "_runs_here", lambda query: dtypes.append(query.dtype) or False)
    model = twin(make_model())
    attend_by_rows(model, "varlen")
    policy = make_policy(model)
    policy.adapter._autocast = torch.bfloat16
    policy.score(rows)
    assert set(dtypes) == {torch.bfloat16}


# What is refused


@pytest.mark.parametrize(
    ("packed", "asked", "device", "installed", "kernel"),
    [
        (None, "auto", "cpu", ["varlen", "sdpa"], None),
        (None, "sdpa", "cpu", ["sdpa"], "sdpa"),
        (True, "auto", "cpu", ["flash_attention_2", "varlen", "sdpa"], "sdpa"),
        (None, "auto", "cuda", ["flash_attention_2", "varlen", "sdpa"], "flash_attention_2"),
        (None, "auto", "cuda", ["varlen", "sdpa"], "varlen"),
        (True, "auto", "cuda", ["sdpa"], "sdpa"),
        (None, "sdpa", "cuda", ["varlen", "sdpa"], "sdpa"),
        (None, "flash_attention_2", "cuda", ["flash_attention_2", "sdpa"], "flash_attention_2"),
        (False, "auto", "cuda", ["varlen", "sdpa"], None),
    ],
)
def test_where_rows_are_packed_and_by_which_kernel(
    monkeypatch: pytest.MonkeyPatch,
    packed: bool | None,
    asked: str,
    device: str,
    installed: list[str],
    kernel: str | None,
) -> None:
    monkeypatch.setattr(attention, "installed_kernels", lambda: installed)
    assert packed_kernel(EngineConfig(packed=packed, attention=asked), device) == kernel


@pytest.mark.parametrize("asked", ["flash_attention_2", "varlen"])
def test_a_kernel_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    with pytest.raises(ConfigError, match=r"computes on a CPU\.\nUse engine\.attention=auto"):
        packed_kernel(EngineConfig(attention=asked), "cpu")
    monkeypatch.setattr(attention, "installed_kernels", lambda: ["sdpa"])
    with pytest.raises(ConfigError, match=rf"{asked} needs .*not installed\.\nRun pip install"):
        packed_kernel(EngineConfig(attention=asked), "cuda")


@pytest.mark.parametrize("asked", ["flash_attention_2", "varlen", "sdpa"])
def test_a_kernel_for_padded_rows_is_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match=r"pads them\.\nLeave out one of the two"):
        EngineConfig(packed=False, attention=asked)


def test_a_kernel_that_does_not_load_is_refused(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ConfigError, match=r"does not load: .*\n.*take another: (varlen, )?sdpa"):
        attend_by_rows(make_model(), "flash_attention_2")


def test_eager_attention_is_refused() -> None:
    spec = ModelSpec("demo:student", attention="eager")
    with pytest.raises(ConfigError, match=r"model\.student\.attention=eager pads .*\nUse sdpa"):
        load_model(spec, "student", torch.device("cpu"), kernel="sdpa")


def test_models_that_would_mix_rows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Qwen3NextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=1,
        linear_num_value_heads=1,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        initializer_range=0.15,
    )
    recurrent: Any = Qwen3NextForCausalLM(config).eval()
    attend_by_rows(recurrent, "sdpa")
    assert not ModelAdapter(recurrent, None, None).keeps_rows_apart()
    folder = save_checkpoint(tmp_path, small_tokenizer("r1"), "qwen2", 0, padding=3)
    load_model(ModelSpec(str(folder)), "teacher", torch.device("cpu"), kernel="sdpa")
    monkeypatch.setattr(ModelAdapter, "keeps_rows_apart", lambda self: False)
    with pytest.raises(ModelError, match=r"the teacher .*\(Qwen2ForC.*\nSet engine\.packed=false"):
        load_model(ModelSpec(str(folder)), "teacher", torch.device("cpu"), kernel="sdpa")


# Compiled layers

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@needs_compiler
def test_compiled_layers_give_the_numbers_of_plain_ones(
    rows: list[Trajectory],
    make_pair: Callable[..., tuple[TransformersPolicy, TransformersPolicy]],
) -> None:
    plain, compiled = make_pair("qwen2_5_vl checkpointed")
    assert compile_layers(compiled.adapter.model) == 12
    counters.clear()
    (logp_N, _), (compiled_N, _) = (
        policy.logprobs(TrajectoryBatch.build(policy.adapter, rows)) for policy in (plain, compiled)
    )
    assert_close(compiled_N.detach(), logp_N.detach())
    found = gradients(compiled, compiled_N)
    for name, gradient in gradients(plain, logp_N).items():
        assert_close(found[name], gradient, name)
    for one, other in zip(plain.score(rows), compiled.score(rows), strict=True):
        assert_close(one.logp, other.logp)
    said = [turns(policy, rows[1]) for policy in (plain, compiled)]
    assert said[0] == said[1]
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def turns(policy: TransformersPolicy, row: Trajectory) -> tuple[int, ...]:
    """What a policy says greedily after a row's prompt."""
    generator = policy.generator(Sampling(0.0))
    ids = tuple(row.ids[: row.prompt_length].tolist())
    generator.submit([Request(key=0, ids=ids, images=(), max_tokens=4, seed=(0,))])
    done: list[Completion] = []
    while not done:
        done = generator.step()
    return done[0].ids


def test_what_cannot_be_compiled_is_told_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(function: Any) -> Any:
        def call(values: Tensor) -> Tensor:
            raise RuntimeError("no compiler\n(details)")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(setup, "load_model", None)
    with pytest.raises(ConfigError, match=r"compile here: no compiler\nInstall a C\+\+ compiler"):
        train(tmp_path, "steps=1", "engine.compile=true")


# Runs


@needs_compiler
def test_a_run_with_compiled_layers_is_the_run_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    words = ("steps=1", "evaluation.tasks=0", "batch.prompts=2", "batch.mini_batch=1",
             "batch.samples=3")  # fmt: skip
    for compiled in ("false", "true"):
        train(tmp_path / compiled, *words, f"engine.compile={compiled}")
    (plain,), (row,) = (train_rows(tmp_path / each) for each in ("false", "true"))
    for key in ("loss", "grad_norm", "reward/mean", "entropy/mean", "ratio/mean"):
        assert row[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-5), key
    with pytest.raises(CheckpointError, match=r"engine\.compile: True -> False"):
        train(tmp_path / "true", *words, "steps=2", "engine.compile=false")


def test_a_run_with_packed_rows_is_the_run_with_padded_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "make_plots", lambda folder: None)
    words = ("steps=1", "evaluation.tasks=0", "engine.old_logp=recompute", "batch.prompts=2",
             "batch.mini_batch=1", "batch.samples=3", "checkpoint.every=0")  # fmt: skip
    found = {}
    for packed in ("false", "true"):
        train(tmp_path / packed, *words, f"engine.packed={packed}")
        found[packed] = train_rows(tmp_path / packed)
        told = ", rows packed by sdpa" if packed == "true" else ""
        assert f"local on cpu, float32{told}\n" in capsys.readouterr().out
        saved = (tmp_path / packed / "final" / "config.json").read_text("utf-8")
        assert "flash" not in saved
    assert found["false"][0]["perf/padding_share"] > 0.01
    for padded, row in zip(found["false"], found["true"], strict=True):
        assert row["perf/padding_share"] == 0
        for key in ("loss", "grad_norm", "reward/mean", "entropy/mean", "ratio/mean"):
            assert row[key] == pytest.approx(padded[key], rel=1e-3, abs=1e-5), key
