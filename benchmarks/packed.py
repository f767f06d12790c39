"""Padded against packed rows: old log-probs and an update over rows of exponentially spread length.

    python benchmarks/packed.py [--rows 32] [--mean 150] [--tokens 2048] [--repeats 5] [--compile]

A random Qwen2 of 4 layers, width 256 and a vocabulary of 8,192. The variants (``--compile``: also
packed rows with compiled layers) are measured in turns in one process on one thread, with the same
limit on the tokens of a pass. Printed: median seconds of the processor, their ratio, the share of
computed positions that were padding, and the largest difference of log-probs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from reopold_agent.policies.adapter import ModelAdapter
from reopold_agent.policies.attention import attend_by_rows
from reopold_agent.policies.batch import PassTokens, TrajectoryBatch
from reopold_agent.policies.compiling import compile_layers
from reopold_agent.policies.grouping import split_by_tokens
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.types import StopReason, Trajectory

VOCABULARY = 8192


def rows(number: int, mean: int) -> list[Trajectory]:
    """Prompts of 32 tokens, and responses whose lengths are spread exponentially."""
    rng = np.random.default_rng(0)
    made = []
    for length in 33 + np.minimum(rng.exponential(mean, number).astype(int), 8 * mean):
        loss = np.arange(length) >= 32
        zeros = np.zeros(length, dtype=np.float32)
        made.append(
            Trajectory(
                task_id="", index=0, sample=0, prompt_length=32,
                ids=rng.integers(0, VOCABULARY, length), loss_mask=loss, logp=zeros, entropy=zeros,
                images=[], turns=[], stop_reason=StopReason.ANSWER, reward=0.0, success=False,
            )
        )  # fmt: skip
    return made


def policies(tokens: int, *, compiled: bool) -> dict[str, TransformersPolicy]:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    padded = Qwen2ForCausalLM(config)
    packed = copy.deepcopy(padded)
    attend_by_rows(packed, "sdpa")
    models = {"padded": padded, "packed": packed}
    if compiled:
        models["compiled"] = copy.deepcopy(packed)
        compile_layers(models["compiled"])
    return {
        name: TransformersPolicy(
            ModelAdapter(model, None, None),
            allowed_ids=VOCABULARY, forbidden_ids=(), stop_ids=(), max_tokens_per_pass=tokens,
        )
        for name, model in models.items()
    }  # fmt: skip


def update(policy: TransformersPolicy, part: list[Trajectory]) -> None:
    policy.adapter.model.zero_grad()
    lengths, packed = [len(row.ids) for row in part], policy.adapter.packed
    for group in split_by_tokens(lengths, policy.max_tokens_per_pass, packed=packed):
        batch = TrajectoryBatch.build(policy.adapter, [part[i] for i in group])
        policy.logprobs(batch)[0].sum().backward()  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 32), ("mean", 150), ("tokens", 2048), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    part = rows(options.rows, options.mean)
    lengths = sorted(len(row.ids) for row in part)
    print(f"{len(part)} rows of {lengths[0]} to {lengths[-1]} tokens, {sum(lengths):,} in all")
    variants = policies(options.tokens, compiled=options.compile)
    seconds: dict[str, dict[str, list[float]]] = {"old log-probs": {}, "update": {}}
    logp = {}
    for repeat in range(options.repeats + 1):
        for name, policy in variants.items():
            policy.passes = PassTokens()
            started = time.process_time()
            logp[name] = np.concatenate([each.logp for each in policy.score(part)])
            scored = time.process_time()
            update(policy, part)
            if repeat:  # the first one warms up
                seconds["old log-probs"].setdefault(name, []).append(scored - started)
                seconds["update"].setdefault(name, []).append(time.process_time() - scored)
    for phase, found in seconds.items():
        for one, other in itertools.pairwise(variants):
            ratios = [a / b for a, b in zip(found[one], found[other], strict=True)]
            slow, fast = (statistics.median(found[name]) for name in (one, other))
            print(
                f"{phase:14} {one} {slow:.2f} s, {other} {fast:.2f} s: "
                f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    shares = {name: f"{policy.passes.padding_share:.2f}" for name, policy in variants.items()}
    largest = max(abs(logp["padded"] - each).max() for each in logp.values())
    print(f"padding {shares}, largest difference {largest:.1e}")


if __name__ == "__main__":
    main()
