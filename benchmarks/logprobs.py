"""Log-prob and entropy of 4,096 tokens over 151,936 words: ours against plain ``log_softmax``.

    python benchmarks/logprobs.py            # the size of Qwen2.5-VL-3B; about 20 GiB of memory
    python benchmarks/logprobs.py --tokens 512 --vocabulary 32768 --hidden 512

Each variant runs in a separate process, so that its peak memory is measured alone. Printed are the
peaks above the inputs, the seconds, their ratios, and the largest difference of the values.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from reopold_agent.policies.logprobs import token_logprobs

REPEATS = 3


def inputs(tokens: int, vocabulary: int, width: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator) / width**0.5
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight, targets


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logp_NV = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    entropy = -(logp_NV.exp() * logp_NV).sum(dim=-1).detach()
    return logp_NV.gather(1, targets[:, None])[:, 0], entropy


def ours(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    logp, entropy = token_logprobs(hidden, weight, targets, with_entropy=True)
    assert entropy is not None
    return logp, entropy


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(variant: str, mode: str, size: tuple[int, int, int], out: Path) -> None:
    hidden, weight, targets = inputs(*size)
    # The gradient's weight: all tokens, or every fifth as in the refinement phase.
    grad = torch.ones(size[0])
    if mode == "top-20%":
        grad = (torch.arange(size[0]) % 5 == 0).float()
    train = mode != "forward"
    hidden.requires_grad_(train)
    weight.requires_grad_(train)
    if train:  # the gradients themselves are needed either way: not counted
        hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    function = plain if variant == "plain" else ours
    base = peak_bytes()
    seconds, cpu = [], []
    for _ in range(REPEATS):
        started, worked = time.perf_counter(), time.process_time()
        with torch.set_grad_enabled(train):
            logp, entropy = function(hidden, weight, targets)
            if train:
                logp.backward(grad)
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - worked)
    result = {"seconds": min(seconds), "cpu": min(cpu), "peak": peak_bytes() - base}
    values = {"logp": logp.detach(), "entropy": entropy}
    if train:
        assert hidden.grad is not None
        values["grad_hidden"] = hidden.grad / REPEATS
    torch.save(values, out)
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--modes", default="forward,all,top-20%")
    parser.add_argument("--measure", nargs=3, metavar=("VARIANT", "MODE", "OUT"))
    options = parser.parse_args()
    size = (options.tokens, options.vocabulary, options.hidden)
    if options.measure:
        variant, mode, out = options.measure
        measure(variant, mode, size, Path(out))
        return
    print(
        f"{size[0]} tokens, vocabulary {size[1]}, hidden {size[2]}, float32, "
        f"{torch.get_num_threads()} threads, best of {REPEATS}"
    )
    base = [
        sys.executable,
        __file__,
        *(
            f"--{k}={v}"
            for k, v in vars(options).items()
            if k in ("tokens", "vocabulary", "hidden")
        ),
    ]
    for mode in options.modes.split(","):
        results, values = {}, {}
        for variant in ("plain", "ours"):
            out = Path(f"/tmp/reopold-logprobs-{variant}.pt")
            done = subprocess.run(
                [*base, "--measure", variant, mode, str(out)], capture_output=True, text=True
            )
            if done.returncode:
                print(f"{mode:8} {variant}: failed ({done.returncode}); not enough memory?")
                continue
            results[variant] = json.loads(done.stdout.splitlines()[-1])
            values[variant] = torch.load(out, weights_only=True)
            out.unlink()
        if len(results) < 2:
            continue
        a, b = results["plain"], results["ours"]
        worst = max(
            float((values["plain"][k] - values["ours"][k]).abs().max()) for k in values["plain"]
        )
        print(
            f"{mode:8} peak {a['peak'] / 2**30:.2f} -> {b['peak'] / 2**30:.2f} GiB "
            f"(ratio {b['peak'] / a['peak']:.3f}), time {a['seconds']:.2f} -> {b['seconds']:.2f} s "
            f"(ratio {b['seconds'] / a['seconds']:.2f}; of CPU seconds, which other load disturbs "
            f"less, {b['cpu'] / a['cpu']:.2f}), largest difference {worst:.1e}"
        )


if __name__ == "__main__":
    main()
