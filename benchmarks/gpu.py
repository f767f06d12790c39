"""Everything that wants a GPU, in one command of under 8 minutes, without a network.

    python benchmarks/gpu.py                      # one GPU with 90 GB or more
    python benchmarks/gpu.py --tiny               # all of it on a small model, on the CPU too
    python benchmarks/gpu.py --wheels .whl        # beforehand: packages for a bare machine

Parts, each in a process of its own with a time limit, so that one that fails leaves the others:

    machine      versions, memory, rates of matrix products and of reading weights
    parity       a small model in bfloat16 against float32 on the CPU: log-probs, gradient, tokens
    checkpoint   writes Qwen2.5-VL-3B's exact shapes with random weights (`real_size`)
    lora         two steps of the local engine with LoRA; the second is measured
    bare         the same episodes with plain Hugging Face calls: generate, forward, backward
    packed       rows of exponentially spread lengths, padded and packed with each kernel
    compiled     the same with the first kernel, and with ``engine.compile``
    all_weights  as lora, with all weights in float32 under autocast; nothing is saved
    bare_all     as bare, with all weights

Results go to ``benchmarks/results/gpu.json`` after every part (those of ``--tiny``, or of a CPU, to
``results/gpu_trial.json``), and a table is printed. The exit status is 1 if a part failed or its
check did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

PARTS: Mapping[str, float] = {
    "machine": 45,
    "parity": 60,
    "checkpoint": 90,
    "lora": 100,
    "bare": 80,
    "packed": 80,
    "compiled": 90,
    "all_weights": 100,
    "bare_all": 80,
}
"""Names of the parts in their order, and most seconds of each."""


# In the processes of the parts


@dataclass(frozen=True)
class Context:
    """What a part works with.

    Attributes:
        folder: shared by the parts; ``real/`` has the checkpoints.
        device: ``cuda`` or ``cpu``.
        tiny: a small model.
        seconds: the part's time limit.
    """

    folder: Path
    device: str
    tiny: bool
    seconds: float

    def settings(self, **changes: Any) -> Any:
        """Returns the settings of `real_size` for a step on this device."""
        import real_size

        chosen = real_size.Settings(
            tiny=self.tiny,
            episodes=2 if self.tiny else 16,
            response=6 if self.tiny else 128,
            picture_tokens=64 if self.tiny else 1024,
            device=self.device,
            steps=2,
            seconds=self.seconds,
            words=["engine.threads=1"] if self.tiny else [],
        )
        return replace(chosen, **changes)


def part_machine(context: Context) -> dict[str, Any]:
    """Versions, and rates of the hardware."""
    import real_size
    import torch

    from reopold_agent.policies.architecture import find_architecture

    shapes = find_architecture("demo:student" if context.tiny else "Qwen/Qwen2.5-VL-3B-Instruct")
    rates = real_size.measure(shapes, 16, context.device, torch.bfloat16)
    names = ("torch", "transformers", "peft", "numpy", "tokenizers")
    found: dict[str, Any] = {name: version(name) for name in names}
    found["python"] = sys.version.split()[0]
    if context.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_gib"] = properties.total_memory / 2**30
    found["tflops"] = rates.flops / 1e12
    found["weights_gb_per_second"] = rates.bandwidth / 1e9
    return found


def part_parity(context: Context) -> dict[str, Any]:
    """Log-probs, gradients and greedy tokens on the device against the CPU in float32."""
    import numpy as np
    import real_size
    import torch
    from transformers import AutoTokenizer

    from reopold_agent.policies.batch import TrajectoryBatch
    from reopold_agent.policies.loading import ModelSpec, load_model, resolve_path

    # Products are exact by default, but not the convolution that makes patches.
    torch.backends.cudnn.allow_tf32 = False
    folder = context.folder / "parity"
    tokenizer = Path(resolve_path("demo:student"))
    config = real_size.shapes(AutoTokenizer.from_pretrained(tokenizer), tiny=True)
    if not folder.exists():
        real_size.write_checkpoint(folder, config, tokenizer, dtype=torch.float32, std=0.15)

    def outcome(device: str, autocast: torch.dtype | None) -> dict[str, Any]:
        loaded = load_model(
            ModelSpec(str(folder)), "student", torch.device(device), autocast=autocast
        )
        policy = loaded.policy(forbidden_ids=[], stop_ids=[])
        rows = spread_rows(loaded, number=8, mean=60, most=400, picture=16)
        logp = np.concatenate(
            [s.logp[r.loss_mask] for s, r in zip(policy.score(rows), rows, strict=True)]
        )
        batch = TrajectoryBatch.build(loaded.adapter, rows)
        policy.logprobs(batch)[0].mean().backward()  # type: ignore[no-untyped-call]
        parameters = loaded.adapter.model.parameters()
        gradient = torch.cat([p.grad.flatten().cpu() for p in parameters if p.grad is not None])
        return {"logp": logp, "gradient": gradient, "ids": greedy(policy, rows[:4], 24)}

    exact = outcome("cpu", None)

    def against(other: Mapping[str, Any]) -> dict[str, float]:
        difference = np.abs(other["logp"] - exact["logp"])
        same = [a == b for a, b in zip(other["ids"], exact["ids"], strict=True)]
        gap = float((other["gradient"] - exact["gradient"]).norm() / exact["gradient"].norm())
        return {
            "logp_mean": float(difference.mean()),
            "logp_max": float(difference.max()),
            "gradient": gap,
            "greedy_rows": float(np.mean(same)),
        }

    bfloat16 = torch.bfloat16
    found = {
        "cpu_bfloat16": against(outcome("cpu", bfloat16)),
        "device_bfloat16": against(outcome(context.device, bfloat16)),
        "device_float32": against(outcome(context.device, None)),
    }
    allowed = {key: 2 * found["cpu_bfloat16"][key] + 1e-3 for key in ("logp_mean", "gradient")}
    held = all(found["device_bfloat16"][key] <= most for key, most in allowed.items())
    near = found["device_float32"]["logp_max"] < 1e-3
    return {**found, "allowed": allowed, "holds": held and near}


def part_checkpoint(context: Context) -> dict[str, Any]:
    """Writes the student and the teacher."""
    import real_size

    folder = context.folder / "real"
    shutil.rmtree(folder, ignore_errors=True)
    parameters, teacher = real_size.prepare(folder, context.settings())
    return {"parameters": parameters, "teacher": teacher}


def part_lora(context: Context) -> dict[str, Any]:
    """A step with LoRA, by phase, with the plan's memory beside it."""
    return engine_step(context, context.settings(save=context.tiny))


def part_all_weights(context: Context) -> dict[str, Any]:
    """A step with all weights, which needs 16 bytes each; they are not saved."""
    return engine_step(context, context.settings(save=False, all_weights=True))


def engine_step(context: Context, settings: Any) -> dict[str, Any]:
    """Makes the step; adds tokens per second and the plan's peak to what was measured."""
    import real_size

    folder = context.folder / "real"
    found = real_size.real_size(folder, settings)
    sampled = sum(found["response_tokens"])
    whole = sampled + sum(found["prompt_tokens"])
    tokens = {"generate": sampled, "old_logp": whole, "teacher": whole, "update": whole}
    found["tokens_per_second"] = {
        name: tokens[name] / found["seconds"][name] for name in tokens if found["seconds"].get(name)
    }
    found["holds"] = 0 < found["grad_norm"] < float("inf")
    words = [word for word in real_size.overrides(folder, settings) if "engine.threads" not in word]
    try:
        found["plan_gib"] = planned(words, found)
    except Exception as error:  # a plan that fails must not hide what was measured
        found["plan_gib"] = {}
        found["plan_failed"] = repr(error)
    return found


def planned(words: Sequence[str], found: Mapping[str, Any]) -> dict[str, float]:
    """Returns the plan's GiB of each phase for the lengths that were measured."""
    from reopold_agent.plan.compose import plan_run
    from reopold_agent.plan.hardware import GIB
    from reopold_agent.plan.report import as_values

    episodes = len(found["prompt_tokens"])
    pictures = sum(found["picture_tokens"]) / episodes
    plan = plan_run(
        [
            *(word for word in words if not word.startswith("engine.device=cpu")),
            f"prompt={sum(found['prompt_tokens']) / episodes - pictures:.0f}",
            "pictures=1",
            f"response={max(found['response_tokens'])}",
            "gpu=h200",
        ]
    )
    roles = as_values(plan)["memory_bytes"].values()
    return {
        f"{phase}": sum(parts.values()) / GIB
        for role in roles
        for phase, parts in role["phases"].items()
    }


def part_bare(context: Context) -> dict[str, Any]:
    """The episodes of `lora` with plain Hugging Face calls."""
    return bare_step(context, lora=True)


def part_bare_all(context: Context) -> dict[str, Any]:
    """The episodes of `all_weights` with plain Hugging Face calls."""
    return bare_step(context, lora=False)


def bare_step(context: Context, *, lora: bool) -> dict[str, Any]:
    """Generates, scores and differentiates the episodes that the engine's step left behind."""
    import real_size
    import torch
    import yaml

    from reopold_agent.policies.batch import TrajectoryBatch
    from reopold_agent.policies.grouping import split_by_tokens
    from reopold_agent.policies.loading import ModelSpec, load_model

    settings = context.settings()
    autocast = torch.bfloat16 if context.device == "cuda" or not lora else None
    spec = ModelSpec(
        str(context.folder / "real" / "student"),
        dtype="bfloat16" if lora else "float32",
        lora=yaml.safe_load(real_size.LORA) if lora else None,
        gradient_checkpointing=True,
    )
    loaded = load_model(spec, "student", torch.device(context.device), autocast=autocast)
    rows = recorded_rows(loaded, context.folder / "real" / "trajectories.jsonl", settings.episodes)
    model: Any = loaded.adapter.model
    adapter = loaded.adapter
    lengths = [len(row.ids) for row in rows]
    batches = [
        TrajectoryBatch.build(adapter, [rows[i] for i in group])
        for group in split_by_tokens(lengths, 8192)
    ]

    def logits(batch: TrajectoryBatch) -> torch.Tensor:
        pixel_values, grids = loaded.vision.patches(batch.images)  # type: ignore[union-attr]
        with adapter.autocast():
            output = model(
                input_ids=batch.ids_BT,
                attention_mask=batch.attention_BT,
                position_ids=batch.positions_3BT,
                pixel_values=pixel_values.to(adapter.device),
                image_grid_thw=grids.to(adapter.device),
                use_cache=False,
            ).logits
        picked = output[batch.row_N, batch.before_N].float()
        targets = batch.ids_BT[batch.row_N, batch.column_N, None]
        return torch.log_softmax(picked, dim=-1).gather(1, targets)[:, 0]

    def score() -> None:
        with torch.no_grad():
            for batch in batches:
                logits(batch)

    def update() -> None:
        model.train()
        for batch in batches:
            logits(batch).mean().backward()  # type: ignore[no-untyped-call]
        model.eval()
        model.zero_grad(set_to_none=True)

    def generate() -> None:
        with torch.inference_mode(), adapter.autocast():
            static_generate(loaded, rows)

    model.eval()
    sampled = sum(row.response_tokens for row in rows)
    tokens = {"generate": sampled, "score": sum(lengths), "update": sum(lengths)}
    calls: dict[str, Callable[[], None]] = {"generate": generate, "score": score, "update": update}
    seconds = {}
    peaks = {}
    for name, call in calls.items():
        call()  # warms up
        synchronize(context.device)
        if context.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        call()
        synchronize(context.device)
        seconds[name] = time.perf_counter() - started
        if context.device == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    return {
        "seconds": seconds,
        "tokens_per_second": {name: tokens[name] / seconds[name] for name in seconds},
        "gpu_peaks_gib": peaks,
    }


def static_generate(loaded: Any, rows: Sequence[Any]) -> None:
    """All first turns as one left-padded batch of ``model.generate``."""
    from common import left_padded

    adapter = loaded.adapter
    ids, mask = left_padded([row.ids[: row.prompt_length] for row in rows])
    pixel_values, grids = loaded.vision.patches([i for row in rows for i in row.images])
    longest = max(row.response_tokens for row in rows)
    device = adapter.device
    adapter.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        mm_token_type_ids=(ids == adapter.image_token_id).int().to(device),
        pixel_values=pixel_values.to(device),
        image_grid_thw=grids.to(device),
        do_sample=True,
        top_k=0,
        max_new_tokens=longest,
        min_new_tokens=longest,
        pad_token_id=0,
    )


def part_packed(context: Context) -> dict[str, Any]:
    """Scores and an update, padded and with each kernel of packed rows."""
    return rates_of(context, [(kernel, False) for kernel in (None, *kernels_of(context))])


def part_compiled(context: Context) -> dict[str, Any]:
    """Scores and an update with packed rows, with and without compiled layers."""
    return rates_of(context, [(kernels_of(context)[0], compiled) for compiled in (False, True)])


def kernels_of(context: Context) -> list[str]:
    """Returns the kernels of packed rows, fastest first."""
    from reopold_agent.policies.attention import installed_kernels

    return installed_kernels() if context.device == "cuda" else ["sdpa"]


def rates_of(context: Context, variants: Sequence[tuple[str | None, bool]]) -> dict[str, Any]:
    """Returns the rates of scores and an update, and how far log-probs are from the first's.

    Args:
        context: of the part.
        variants: kernels of packed rows (None: padded), and whether layers are compiled.
    """
    import numpy as np
    import real_size
    import torch
    import yaml

    from reopold_agent.policies.batch import TrajectoryBatch
    from reopold_agent.policies.grouping import split_by_tokens
    from reopold_agent.policies.loading import ModelSpec, load_model

    cuda = context.device == "cuda"
    spec = ModelSpec(
        str(context.folder / "real" / "student"),
        dtype="bfloat16",
        lora=yaml.safe_load(real_size.LORA),
        gradient_checkpointing=True,
    )
    size = {"number": 6, "mean": 40, "most": 200, "picture": 16}
    if not context.tiny:
        size = {"number": 32, "mean": 700, "most": 4000, "picture": 512}
    most = 512 if context.tiny else 16_384
    found: dict[str, Any] = {}
    reference = None
    for kernel, compiled in variants:
        torch.manual_seed(0)
        loaded = load_model(
            spec,
            "student",
            torch.device(context.device),
            autocast=torch.bfloat16 if cuda else None,
            kernel=kernel,
            compiled=compiled,
        )
        policy = loaded.policy(forbidden_ids=[], stop_ids=[], max_tokens_per_pass=most)
        rows = spread_rows(loaded, **size)
        lengths = [len(row.ids) for row in rows]

        def update(policy: Any = policy, rows: Any = rows, lengths: Any = lengths) -> None:
            adapter = policy.adapter
            for group in split_by_tokens(lengths, most, packed=adapter.packed):
                batch = TrajectoryBatch.build(adapter, [rows[i] for i in group])
                policy.logprobs(batch)[0].mean().backward()
            adapter.model.zero_grad(set_to_none=True)

        policy.score(rows)
        synchronize(context.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        scores = policy.score(rows)
        synchronize(context.device)
        scored = time.perf_counter()
        update()
        synchronize(context.device)
        first = time.perf_counter()
        update()
        synchronize(context.device)
        logp = np.concatenate([s.logp[r.loss_mask] for s, r in zip(scores, rows, strict=True)])
        reference = logp if reference is None else reference
        difference = np.abs(logp - reference)
        name = "compiled" if compiled else kernel or "padded"
        found[name] = {
            "tokens": sum(lengths),
            "score_tokens_per_second": sum(lengths) / (scored - started),
            "update_tokens_per_second": sum(lengths) / (time.perf_counter() - first),
            "gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
            "logp_mean_difference": float(difference.mean()),
            "logp_max_difference": float(difference.max()),
        }
        del policy, loaded
    worst = max(each["logp_mean_difference"] for each in found.values())
    return {**found, "holds": worst < 0.05}


def spread_rows(loaded: Any, *, number: int, mean: float, most: int, picture: int) -> list[Any]:
    """Random rows: prompts of 32 tokens, every third with a picture, and spread responses."""
    import numpy as np

    from reopold_agent.types import StopReason, Trajectory

    rng = np.random.default_rng(0)
    side = 28 * max(1, round(picture**0.5))
    adapter, rows = loaded.adapter, []
    special = {*loaded.tokenizer.all_special_ids, *loaded.tokenizer.added_tokens_decoder}
    text_ids = [i for i in range(len(loaded.tokenizer)) if i not in special]
    for index in range(number):
        images = []
        prompt = rng.choice(text_ids, 32)
        if index % 3 == 0:
            pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
            images = [loaded.vision.adopt(pixels)]
            inside = np.full(images[0].tokens, adapter.image_token_id)
            start = np.array([adapter.model.config.vision_start_token_id])
            prompt = np.concatenate([prompt[:8], start, inside, prompt[8:]])
        response = rng.choice(text_ids, 2 + min(most, int(rng.exponential(mean))))
        ids = np.concatenate([prompt, response]).astype(np.int64)
        zeros = np.zeros(len(ids), dtype=np.float32)
        rows.append(
            Trajectory(
                task_id=str(index), index=index, sample=0, prompt_length=len(prompt),
                ids=ids, loss_mask=np.arange(len(ids)) >= len(prompt), logp=zeros, entropy=zeros,
                images=images, turns=[], stop_reason=StopReason.ANSWER, reward=0.0, success=False,
            )
        )  # fmt: skip
    return rows


def recorded_rows(loaded: Any, file: Path, number: int) -> list[Any]:
    """The last rows of ``trajectories.jsonl``, with random pictures of the same sizes."""
    import numpy as np

    from reopold_agent.types import StopReason, Trajectory

    rng = np.random.default_rng(0)
    rows = []
    for line in file.read_text("utf-8").splitlines()[-number:]:
        row = json.loads(line)
        images = []
        for image in row["images"]:
            _, height, width = image["grid"]
            pixels = rng.integers(0, 255, (14 * height, 14 * width, 3), dtype=np.uint8)
            images.append(loaded.vision.adopt(pixels))
        zeros = np.zeros(len(row["ids"]), dtype=np.float32)
        rows.append(
            Trajectory(
                task_id="", index=0, sample=0, prompt_length=row["prompt_length"],
                ids=np.array(row["ids"], dtype=np.int64),
                loss_mask=np.array(row["loss_mask"], dtype=bool), logp=zeros, entropy=zeros,
                images=images, turns=[], stop_reason=StopReason.ANSWER, reward=0.0, success=False,
            )
        )  # fmt: skip
    return rows


def greedy(policy: Any, rows: Sequence[Any], tokens: int) -> list[Any]:
    """Continues prompts greedily; returns the ids by row."""
    from reopold_agent.types import Request, Sampling

    generator = policy.generator(Sampling(temperature=0.0))
    requests = [
        Request(
            key=i, ids=tuple(int(x) for x in row.ids[: row.prompt_length]),
            images=tuple(row.images), max_tokens=tokens, seed=(i,),
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip
    generator.submit(requests)
    done: dict[int, Any] = {}
    while len(done) < len(rows):
        done.update({completion.key: completion for completion in generator.step()})
    return [done[i].ids for i in range(len(rows))]


def synchronize(device: str) -> None:
    """Waits for the GPU's work."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


# In the process of the command


def run_part(command: Sequence[str], seconds: float, log: Path) -> str | None:
    """Runs a command with a time limit; returns what went wrong, or None.

    Its children end with it.
    """
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"took longer than its {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        lines = [line for line in log.read_text("utf-8").splitlines() if line.strip()]
        return f"status {status}: {' | '.join(lines[-3:])}"[:600]
    return None


def run_parts(
    parts: Mapping[str, float],
    command: Callable[[str, Path, float], Sequence[str]],
    out: Path,
    folder: Path,
    seconds: float,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Runs the parts in turn and writes the results after each.

    Args:
        parts: names, and most seconds of each.
        command: makes a part's command from its name, the file for its result and its seconds.
        out: where the results go.
        folder: for logs and the files of results.
        seconds: for all parts together.
        facts: what is written before the results, such as the device.
    """
    ends = time.monotonic() + seconds
    results: dict[str, Any] = {}
    for name, most in parts.items():
        limit = min(most, ends - time.monotonic())
        target = folder / f"{name}.json"
        started = time.monotonic()
        if limit < 1:
            problem: str | None = "no time was left"
        else:
            print(f"{name} ...", flush=True)
            problem = run_part(command(name, target, limit), limit, folder / f"{name}.log")
        found: dict[str, Any] = {}
        if problem is None:
            found = json.loads(target.read_text("utf-8"))
            problem = None if found.get("holds", True) else "its check does not hold"
        found = {"problem": problem, "part_seconds": round(time.monotonic() - started, 1), **found}
        results[name] = found
        print(f"{name}: {problem or 'done'}, {found['part_seconds']} s", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**facts, **results}, indent=1) + "\n", "utf-8")
    return results


def table(results: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a table of what was measured."""
    lines = []
    machine = results.get("machine", {})
    if "tflops" in machine:
        lines.append(
            f"{machine.get('gpu', 'cpu')}: {machine['tflops']:.1f} TFLOP/s, "
            f"{machine['weights_gb_per_second']:.0f} GB/s of weights, torch {machine['torch']}, "
            f"transformers {machine['transformers']}"
        )
    for name, found in results.get("parity", {}).items():
        if isinstance(found, Mapping) and "logp_mean" in found and "logp_max" in found:
            lines.append(
                f"parity {name:16} log-probs {found['logp_mean']:.1e} (most "
                f"{found['logp_max']:.1e}), gradient {found['gradient']:.1e}, equal greedy rows "
                f"{found['greedy_rows']:.2f}"
            )
    for part, bare in (("lora", "bare"), ("all_weights", "bare_all")):
        if "tokens_per_second" not in results.get(part, {}):
            continue
        found = results[part]
        plain = results.get(bare, {}).get("tokens_per_second", {})
        lines.append(
            f"{part:14} {'seconds':>8} {'at least':>9} {'tokens/s':>9} {'bare':>9} {'GiB':>7}"
        )
        for name, rate in found["tokens_per_second"].items():
            other = plain.get("score" if name in ("old_logp", "teacher") else name)
            peak = found["gpu_peaks_gib"].get(name)
            lines.append(
                f"  {name:12} {found['seconds'][name]:8.2f} "
                f"{found['least_seconds'].get(name, 0):9.2f} {rate:9.0f} "
                f"{'' if other is None else f'{other:.0f}':>9} "
                f"{'' if peak is None else f'{peak:.1f}':>7}"
            )
        if found.get("plan_gib"):
            plan = ", ".join(f"{k} {v:.1f}" for k, v in found["plan_gib"].items())
            lines.append(f"  planned GiB: {plan}")
    for name in ("packed", "compiled"):
        for variant, found in results.get(name, {}).items():
            if isinstance(found, Mapping):
                lines.append(
                    f"{name:8} {variant:18} score {found['score_tokens_per_second']:.0f} tokens/s, "
                    f"update {found['update_tokens_per_second']:.0f}, "
                    f"{found['gpu_peak_gib']:.1f} GiB, "
                    f"log-probs differ by {found['logp_mean_difference']:.1e}"
                )
    lines += [f"{k} FAILED: {v['problem']}" for k, v in results.items() if v.get("problem")]
    return lines


# Packages for a machine without a network

WHEELS = (
    "transformers",
    "tokenizers",
    "peft",
    "hydra-core",
    "omegaconf",
    "antlr4-python3-runtime",
    "gymnasium",
    "farama-notifications",
    "math-verify",
    "latex2sympy2_extended",
    "jsonschema",
    "jsonschema-specifications",
    "referencing",
    "rpds-py",
)
"""What a machine with PyTorch, a newer transformers and the usual scientific packages lacks, or has
in another version than ours. Versions are those installed here."""

WHEEL_BYTES = 64 * 2**20


def collect_wheels(folder: Path, python: str) -> int:
    """Downloads the wheels of `WHEELS` for Linux on x86-64; returns their bytes.

    Args:
        folder: where they go; it must not exist.
        python: version of the other machine's Python, such as ``3.12``.

    Raises:
        SystemExit: one cannot be had, or they are too large together.
    """
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip"]
    platforms = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28)] + ["manylinux2014_x86_64"]
    words = ["--implementation", "cp", "--python-version", python, "--only-binary=:all:"]
    words += [word for name in platforms for word in ("--platform", name)]
    for name in WHEELS:
        wanted = f"{name}=={version(name)}"
        command = [*pip, "download", "-q", "--no-deps", "-d", str(folder), *words, wanted]
        if name.startswith("antlr4"):  # only its source is published; it is pure Python
            command = [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), wanted]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"there is no wheel of {wanted} for Python {python}")
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > WHEEL_BYTES:
        raise SystemExit(f"the wheels take {size / 2**20:.0f} MiB, more than 64")
    return size


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in this order")
    parser.add_argument("--seconds", type=float, default=450.0, help="for all parts together")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: benchmarks/results/gpu.json; with --tiny or on a CPU results/gpu_trial.json",
    )
    parser.add_argument("--folder", type=Path, help="for checkpoints and logs (default: temporary)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="only collect the packages")
    parser.add_argument("--python", default="3.12", help="of the machine that gets the wheels")
    parser.add_argument("--part", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.wheels is not None:
        size = collect_wheels(options.wheels, options.python)
        print(f"{len(WHEELS)} wheels, {size / 2**20:.1f} MiB, in {options.wheels}")
        return 0
    if options.part is not None:
        name, file = options.part
        context = Context(options.folder, options.device, options.tiny, options.seconds)
        found = globals()[f"part_{name}"](context)
        Path(file).write_text(json.dumps(found), "utf-8")
        return 0
    names = options.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]}; there are {', '.join(PARTS)}")
    device = options.device or found_device()
    out = options.out or default_out(device, options.tiny)
    temporary = None if options.folder else tempfile.mkdtemp(prefix="reopold-gpu-")
    folder = (options.folder or Path(str(temporary))).resolve()
    folder.mkdir(parents=True, exist_ok=True)

    def command(name: str, target: Path, seconds: float) -> list[str]:
        words = [sys.executable, __file__, "--part", name, str(target), f"--seconds={seconds}"]
        words += ["--device", device, "--folder", str(folder)]
        return [*words, *(["--tiny"] if options.tiny else [])]

    try:
        chosen = {name: PARTS[name] for name in names}
        facts = {"device": device, "tiny": options.tiny}
        results = run_parts(chosen, command, out, folder, options.seconds, facts)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    print("\n".join(table(results)))
    print(f"in {out}")
    return int(any(found["problem"] for found in results.values()))


def default_out(device: str, tiny: bool) -> Path:
    """Returns the file of the results: a trial's is not where those of a GPU are kept."""
    if tiny or device == "cpu":
        return ROOT / "results" / "gpu_trial.json"
    return ROOT / "benchmarks" / "results" / "gpu.json"


def found_device() -> str:
    """Returns ``cuda`` where PyTorch sees a GPU, found out in a process of its own."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return "cpu" if subprocess.run([sys.executable, "-c", code], check=False).returncode else "cuda"


if __name__ == "__main__":
    sys.exit(main())
