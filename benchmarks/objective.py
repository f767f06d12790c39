"""Measures the objectives: their share of a training step, and the memory of GKD's divergence.

    python benchmarks/objective.py share              # every objective on the embedded task
    python benchmarks/objective.py memory             # 4,096 tokens x 151,936 ids; about 5 GiB
    python benchmarks/objective.py memory --tokens 1024 --plain   # and with all logits; 8 GiB

``share``: seconds in the objective itself (thresholds, masks, rewards, advantages, the loss and
its backward pass down to the log-probs, or to the divergences) over the seconds of the step. gkd
and sft, whose cost is in the models' passes, are measured only if named.

``memory``: each variant in a separate process. Measures the peak above the inputs and above
the gradients themselves, as a ratio to the chunk of logits held at once (student's and teacher's).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reopold_agent.objectives import Objective
from reopold_agent.objectives.chunks import SLICE_ELEMENTS
from reopold_agent.objectives.divergence import divergence_of_states, generalised_jsd

NAMES = ("rkl", "rkl_sg", "rkl_sg_clip", "rkl_sg_clip_entropy", "reopold", "skew_rkl", "grpo")
CHUNK = 2 * SLICE_ELEMENTS * 4


class Stopwatch:
    """Wraps an objective's methods. The loss is made once more on the same batch, from the
    log-probs and divergences on, forward and backward; that is what is counted, and ``extra`` what
    it adds."""

    def __init__(self) -> None:
        self.own = self.extra = 0.0

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            found = method(*args, **kwargs)
            self.own += time.perf_counter() - started
            return found

        return call

    def terms(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(objective: Objective, batch: Any, step: int, threshold: float | None) -> Any:
            names = [n for n in ("logp", "divergence") if getattr(batch, n) is not None]
            leaves = {n: getattr(batch, n).detach().requires_grad_() for n in names}
            again = replace(batch, **leaves)
            started = time.perf_counter()
            method(objective, again, step, threshold).numerator.backward()
            seconds = time.perf_counter() - started
            self.own += seconds
            self.extra += seconds
            return method(objective, batch, step, threshold)

        return call


def share(name: str, steps: int) -> None:
    from common import demo_config, demo_loop

    folder = Path(tempfile.mkdtemp())
    overrides = ["optimizer.lr=1e-12"]  # every step then has the same kind of episodes
    if name == "reopold":
        overrides.append("objective.switch_step=1")  # refinement: a threshold and both masks
    if name == "grpo":
        overrides += ["objective.curiosity=0.5", "objective.call_penalty=0.05"]
    loop = demo_loop(demo_config(f"objective={name}", *overrides), folder)
    watch, kind = Stopwatch(), type(loop.objective)
    kind.terms = watch.terms(kind.terms)  # type: ignore[method-assign]
    for method in ("threshold", "advantages", "informative"):
        setattr(kind, method, watch.counted(getattr(kind, method)))
    shares, seconds, position = [], [], 0
    for step in range(steps + 1):
        watch.own = watch.extra = 0.0
        position = loop.step(step, position)
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        if step:  # the first step warms up
            shares.append(watch.own / (row["time/step"] - watch.extra))
            seconds.append(watch.own)
    print(
        f"{name:20} {1000 * statistics.median(seconds):6.2f} ms a step, share median "
        f"{100 * statistics.median(shares):.2f} % (highest {100 * max(shares):.2f} %), "
        f"{steps} steps, one thread",
        flush=True,
    )


def states(tokens: int, vocabulary: int, width: int, teacher: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(tokens, width, generator=generator).mul_(width**-0.5),
        torch.randn(vocabulary, width, generator=generator),
        torch.randn(tokens, teacher, generator=generator).mul_(teacher**-0.5),
        torch.randn(vocabulary, teacher, generator=generator),
        torch.randint(vocabulary, (tokens,), generator=generator),
    )


def plain(
    student: Any, student_weight: Any, teacher: Any, teacher_weight: Any, beta: float
) -> torch.Tensor:
    student_logp = torch.log_softmax((student @ student_weight.T).float(), dim=-1)
    with torch.no_grad():
        teacher_logp = torch.log_softmax((teacher @ teacher_weight.T).float(), dim=-1)
    return generalised_jsd(student_logp, teacher_logp, beta)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compute(
    variant: str, mode: str, beta: float, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The divergence and, with mode ``backward``, the gradients of its sum."""
    student, student_weight, teacher, teacher_weight, _ = inputs
    train = mode == "backward"
    student.requires_grad_(train)
    student_weight.requires_grad_(train)
    with torch.set_grad_enabled(train):
        if variant == "plain":
            divergence = plain(student, student_weight, teacher, teacher_weight, beta)
        else:
            divergence, _ = divergence_of_states(*inputs, beta)
    gradients = torch.autograd.grad(divergence.sum(), (student, student_weight)) if train else ()
    return divergence.detach(), gradients


def measure(variant: str, mode: str, options: argparse.Namespace) -> None:
    # Once with small inputs, so that the libraries' code is in memory; its pages count as resident.
    compute(variant, mode, options.beta, states(256, 4096, 256, 256))
    inputs = states(options.tokens, options.vocabulary, options.hidden, options.teacher_hidden)
    base, started, worked = peak_bytes(), time.perf_counter(), time.process_time()
    divergence, gradients = compute(variant, mode, options.beta, inputs)
    result = {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - worked,
        "extra": peak_bytes() - base - sum(g.numel() * 4 for g in gradients),
        "mean": float(divergence.mean()),
        "norms": [float(g.norm()) for g in gradients],
    }
    print(json.dumps(result))


def memory(options: argparse.Namespace) -> None:
    print(
        f"{options.tokens} tokens, {options.vocabulary} ids, hidden {options.hidden} and "
        f"{options.teacher_hidden}, beta {options.beta}, float32, {torch.get_num_threads()} "
        f"threads; a chunk of logits is {CHUNK / 2**20:.0f} MiB"
    )
    for mode in ("forward", "backward"):
        for variant in ("plain", "ours") if options.plain else ("ours",):
            done = subprocess.run(
                [sys.executable, *sys.argv, "--measure", variant, mode],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                print(f"{mode:8} {variant}: failed ({done.returncode}); not enough memory?")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{mode:8} {variant:5} {found['extra'] / 2**20:6.0f} MiB above inputs and gradients"
                f" (ratio to a chunk {found['extra'] / CHUNK:.2f}), {found['seconds']:.1f} s, "
                f"{found['cpu']:.1f} CPU s, mean {found['mean']:.6f}, norms of the gradients "
                f"{found['norms']}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("share", "memory"))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--names", default=",".join(NAMES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--teacher-hidden", type=int, default=2048)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "MODE"))
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure, options)
    elif options.part == "memory":
        memory(options)
    elif len(names := options.names.split(",")) == 1:
        share(names[0], options.steps)
    else:  # a process each: the methods of the classes are wrapped
        for name in names:
            command = [sys.executable, __file__, "share", "--names", name]
            subprocess.run([*command, "--steps", str(options.steps)], check=True)


if __name__ == "__main__":
    main()
