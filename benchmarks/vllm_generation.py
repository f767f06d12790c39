"""Generation with vLLM against transformers in the local engine (`policy=vllm`).

    python benchmarks/vllm_generation.py [--episodes 32] [--repeats 5] [--large]

Needs the extra `vllm`. ``--large`` gives the model 100 million parameters that do not change
its outputs: layers whose output projections are zero, and wider MLPs likewise. The episodes stay
the same, and a forward pass costs as much as in a small real model.

Both play the same episodes of the embedded task with the same weights; only the policy behind the
rollout differs. Printed: seconds in generation, best of the repeats (the first, in which vLLM
warms up, is shown apart), and their ratio; how far the two are apart in the log-probs of the
tokens that vLLM sampled; and seconds of scoring them.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import demo_config, demo_loop

from reopold_agent.policies.loading import ModelSpec, load_model
from reopold_agent.rollout.runner import EpisodeSpec
from reopold_agent.types import Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    settings = ["policy=vllm", "policy.student.name=transformers"]
    if options.large:
        enlarge(folder / "model")
        settings.append(f"model.teacher.path={folder / 'model'}")
    started = time.perf_counter()
    config = demo_config(*settings)
    loop = demo_loop(config, folder / "run")
    print(f"vLLM's start: {time.perf_counter() - started:.0f} s")
    # The teacher: it plays the episodes that a trained student plays, two turns with a tool call.
    model = load_model(ModelSpec(config.model.teacher.path), "teacher", torch.device("cpu"))
    own = model.policy(
        forbidden_ids=loop.collector.runner.chat.forbidden_ids,
        stop_ids=loop.collector.runner.chat.stop_ids,
        max_tokens_per_pass=config.engine.max_tokens_per_pass,
    )
    vllm: Any = loop.roles.teacher
    try:
        compare({"vLLM": vllm, "transformers": own}, loop, options)
        episodes = [EpisodeSpec("eval", i) for i in range(options.episodes)]
        played = loop.evaluation.runner.run(vllm, episodes, Sampling(), (0,))
        pairs = zip(played, own.score(played), strict=True)
        gaps = np.concatenate([np.abs(t.logp - s.logp)[t.loss_mask] for t, s in pairs])
        print(f"log-prob difference: mean {gaps.mean():.1e}, max {gaps.max():.1e}")
        for name, policy in (("vLLM", vllm), ("transformers", own)):
            seconds = []
            for _ in range(options.repeats):
                begun = time.perf_counter()
                policy.score(played)
                seconds.append(time.perf_counter() - begun)
            print(f"scoring with {name}: {min(seconds):.3f} s")
    finally:
        loop.close()


def enlarge(folder: Path, layers: int = 16, width: int = 32768) -> None:
    """Writes the embedded teacher with more layers and wider MLPs that compute the same."""
    small: Any = load_model(ModelSpec("demo:teacher"), "teacher", torch.device("cpu"))
    config = copy.deepcopy(small.config)
    text = config.text_config
    text.num_hidden_layers, text.intermediate_size = layers, width
    text.layer_types = ["full_attention"] * layers
    with torch.no_grad():
        model: Any = type(small.adapter.model)(config)
        weights = small.adapter.model.state_dict()
        for name, value in model.state_dict().items():
            outwards = name.endswith(("o_proj.weight", "down_proj.weight"))
            if outwards and "language_model" in name:
                value.zero_()
            given = weights.get(name)
            if given is not None:
                value[tuple(slice(0, size) for size in given.shape)] = given
    model.save_pretrained(folder)
    small.tokenizer.save_pretrained(folder)
    small.vision.processor.save_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.0f} million parameters")


def compare(policies: dict[str, Any], loop: Any, options: argparse.Namespace) -> None:
    episodes = [EpisodeSpec("eval", i) for i in range(options.episodes)]
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(options.repeats + 1):
        for name, policy in policies.items():
            played = loop.evaluation.runner.run(policy, episodes, Sampling(), (0,))
            seconds[name].append(loop.evaluation.runner.stats.generate_seconds)
    turns, tokens = sum(len(t.turns) for t in played), sum(t.response_tokens for t in played)
    print(f"{options.episodes} episodes, {turns} turns, {tokens} sampled tokens")
    for name, values in seconds.items():
        print(f"{name}: first {values[0]:.3f} s, then best {min(values[1:]):.3f} s")
    ratio = min(seconds["transformers"][1:]) / min(seconds["vLLM"][1:])
    print(f"transformers / vLLM: {ratio:.2f}")


if __name__ == "__main__":
    main()
