"""One training step of a Qwen2.5-VL-3B with LoRA, at its real size, on real photographs.

    python benchmarks/real_size.py                # half a minute for 7.5 GB, then some minutes
    python benchmarks/real_size.py --tiny         # the same in seconds, for a test

The checkpoint has the exact shapes of Qwen2.5-VL-3B-Instruct (3,754,622,976 parameters) and
random weights. The teacher is the same checkpoint but for its last decoder layers and final norm,
which are drawn from another seed: so it scores otherwise than the student, the gradient is not
zero, and all other files are the student's own (links), of which the system keeps one copy in
memory. With ``--own-teacher`` it is a whole second checkpoint, as in real training.

A process of its own makes the run with the product's code: load, play, score, update, checkpoint
and ``final/``. This one samples the memory of it and its children (PSS, mapped files included)
and prints, for each phase, its peak, its seconds by the clock and by the CPU (over the threads),
and the least that its FLOPs (`plan.flops`) and the weights that decoding reads take at the rates
measured here. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reopold_agent.common.memory import share_bytes
from reopold_agent.common.processes import descendants
from reopold_agent.plan import flops
from reopold_agent.policies.architecture import Architecture, find_architecture
from reopold_agent.policies.loading import resolve_path

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 10**9
TEACHERS_OWN = 2
"""Last decoder layers of the teacher that differ from the student's."""

STEP = ("generate", "sync", "old_logp", "teacher", "update")
"""Phases of a training step."""

LORA = "{r: 16, lora_alpha: 32, target_modules: '.*language_model.*[.](q|k|v|o|gate|up|down)_proj'}"
"""Adapters of the decoder. The vision tower stays as it is, as in most recipes."""

QUESTIONS = (
    ("What is written on the largest sign?", "STOP"),
    ("Which colour is the object on the left?", "red"),
)
"""Questions with answers, which nobody compares: random weights do not answer."""


# The checkpoints


def shapes(tokenizer: Any, *, tiny: bool) -> Qwen2_5_VLConfig:
    """Returns the configuration of Qwen2.5-VL-3B-Instruct, or a tiny one of the same structure.

    The vocabulary has the real 151,936 rows, whichever tokenizer is at hand.
    """

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    text = {
        "vocab_size": len(tokenizer) if tiny else 151_936,
        "hidden_size": 64 if tiny else 2048,
        "intermediate_size": 96 if tiny else 11_008,
        "num_hidden_layers": 4 if tiny else 36,
        "num_attention_heads": 2 if tiny else 16,
        "num_key_value_heads": 1 if tiny else 2,
        "max_position_embeddings": 128_000,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [4, 6, 6] if tiny else [16, 24, 24],
        },
    }
    vision = {
        "depth": 2 if tiny else 32,
        "hidden_size": 32 if tiny else 1280,
        "intermediate_size": 48 if tiny else 3420,
        "num_heads": 2 if tiny else 16,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [1] if tiny else [7, 15, 23, 31],
        "window_size": 112,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def write_checkpoint(
    folder: Path,
    config: Qwen2_5_VLConfig,
    tokenizer: Path,
    *,
    seed: int = 0,
    like: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    std: float = 0.02,
) -> int:
    """Writes a checkpoint with random weights, a shard at a time; returns its parameters.

    Args:
        folder: where to write.
        config: the shapes.
        tokenizer: folder of the tokenizer.
        seed: of the weights.
        like: a checkpoint of the same shapes whose files are linked, but for the last one, which
            has the last decoder layers and the final norm.
        dtype: of the weights.
        std: standard deviation of the weights.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    parameters = dict(model.named_parameters())
    last = _last_names(parameters, config.get_text_config().num_hidden_layers)
    shards: list[list[str]] = [[]]
    for name, value in parameters.items():
        if name in last:
            continue
        if shards[-1] and 2 * sum(parameters[n].numel() for n in (*shards[-1], name)) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
        assert value.is_meta
    shards.append(last)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def write(number: int) -> None:
        target = folder / files[number]
        if like is not None and number < len(shards) - 1:
            target.symlink_to((like / files[number]).resolve())
            return
        generator = torch.Generator(device).manual_seed(1000 * seed + number)
        values = {n: _random(n, parameters[n], generator, dtype, std) for n in shards[number]}
        save_file(values, target, {"format": "pt"})

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:  # each holds a shard
        list(pool.map(write, range(len(shards))))
    index = {
        "metadata": {"total_size": sum(p.numel() for p in parameters.values()) * dtype.itemsize},
        "weight_map": {n: f for f, names in zip(files, shards, strict=True) for n in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    config.dtype = dtype
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    return sum(p.numel() for p in parameters.values())


def _last_names(parameters: Mapping[str, nn.Parameter], layers: int) -> list[str]:
    own = [f".language_model.layers.{layers - 1 - i}." for i in range(TEACHERS_OWN)]
    return [n for n in parameters if n.endswith("language_model.norm.weight") or _any(own, n)]


def _any(parts: Sequence[str], name: str) -> bool:
    return any(part in name for part in parts)


def _random(
    name: str, like: Tensor, generator: torch.Generator, dtype: torch.dtype, std: float
) -> Tensor:
    """Returns weights as after Hugging Face's initialisation; biases and norms vary a little."""
    value = torch.empty(like.shape, dtype=dtype, device=generator.device)
    value.normal_(0.0, std, generator=generator)
    if "norm" in name or "ln_q" in name:
        value += 1.0
    return value.cpu()


# The pictures


def find_data(part: str) -> Path | None:
    """Returns a folder of the real data that the repository does not contain, or None."""
    places = [os.environ.get("REOPOLD_REAL_DATA"), ROOT.parent / "shared" / "data"]
    found = (Path(p).expanduser() / part for p in places if p)
    return next((path for path in found if path.is_dir()), None)


def write_rows(folder: Path, pictures: Path | None, episodes: int) -> str:
    """Writes training rows about photographs; returns which pictures they are."""
    folder.mkdir(parents=True)
    kinds = (".jpg", ".jpeg", ".png", ".webp")
    photographs = [] if pictures is None else sorted(pictures.rglob("*"))
    photographs = [p for p in photographs if p.suffix.lower() in kinds][:episodes]
    names = []
    for photograph in photographs:
        shutil.copyfile(photograph, folder / photograph.name)
        names.append(photograph.name)
    if not names:
        generator = np.random.default_rng(0)
        for number in range(episodes):
            noise = generator.integers(0, 255, (24, 32, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC)
            names.append(f"generated-{number}.jpg")
            picture.save(folder / names[-1])
    rows = [
        {
            "qid": f"q{i}",
            "question": f"<image>{question}",
            "answer": [answer],
            "image": [names[i % len(names)]],
            "is_video": False,
        }
        for i, (question, answer) in zip(range(episodes), itertools.cycle(QUESTIONS), strict=False)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    if photographs:
        return f"{len(names)} photographs: {', '.join(names)}"
    return f"{len(names)} GENERATED pictures: no photographs were found (--pictures DIR)"


# The run, in a process of its own


def run_child(folder: Path, words: list[str], *, save: bool) -> None:
    """Trains with the product's code and writes when each phase ended to ``folder/marks.jsonl``."""
    from hydra import compose, initialize_config_module

    from reopold_agent.common.processes import die_with_parent
    from reopold_agent.train import recovery, setup, timing
    from reopold_agent.train.settings import load_config

    die_with_parent()  # or it would go on when a time limit kills the parent
    logging.basicConfig(filename=folder / "train.log", level=logging.INFO)
    cuda = torch.cuda.is_available()
    marks = (folder / "marks.jsonl").open("a", encoding="utf-8")

    def mark(phase: str) -> None:
        if cuda:
            torch.cuda.synchronize()
        # Other programs disturb the seconds of the CPU less than those of the clock.
        worked = time.time() if cuda else time.process_time() / torch.get_num_threads()
        row: dict[str, Any] = {"phase": phase, "at": time.time(), "worked": worked}
        if cuda:
            row["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        marks.write(json.dumps(row) + "\n")
        marks.flush()

    def marked(module: Any, name: str, phase: str) -> None:
        function = getattr(module, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            mark("between")
            result = function(*args, **kwargs)
            mark(phase)
            return result

        setattr(module, name, called)

    mark("start")
    marked(setup, "load_model", "load")
    marked(setup, "make_loop", "prepare")
    if save:
        marked(recovery, "save_checkpoint", "checkpoint")
        marked(setup, "save_student", "final")
    else:
        recovery.save_checkpoint = lambda *_, **__: folder
        setup.save_student = lambda *_: True
    # The run's folder is removed, so that nobody can take what these lines offer.
    setup.show_summary = lambda *_: None
    setup.preflight_note = lambda *_: None
    lap = timing.Clock.lap

    def marked_lap(self: timing.Clock, name: str) -> None:
        lap(self, name)
        mark("generate" if name == "rollout" else name)

    timing.Clock.lap = marked_lap  # type: ignore[method-assign]
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        config, raw = load_config(compose("train", words))
    setup.LocalEngine(config, raw, folder / "run", words).run()
    mark("end")
    marks.close()


def pss_bytes(process: int) -> int:
    """Returns the proportional set size of a process and its children, mapped files included."""
    return sum(share_bytes(each) for each in (process, *descendants(process)))


@dataclass
class Phases:
    """Seconds and peak memory of the phases of a run.

    ``worked`` are seconds of the clock on a GPU, and on the CPU its own over the threads: what the
    phase takes on a machine that does nothing else, if its threads are never idle.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    worked: dict[str, float] = field(default_factory=dict)
    peak_gib: dict[str, float] = field(default_factory=dict)
    gpu_gib: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, marks: Path, samples: Sequence[tuple[float, int]]) -> Phases:
        """Assigns the samples of memory to the phases between the marks.

        A phase too short for a sample gets the one that is nearest to it.
        """
        phases = cls()
        rows = [json.loads(line) for line in marks.read_text("utf-8").splitlines()]
        for before, row in itertools.pairwise(rows):
            name = row["phase"] if row["phase"] not in ("between", "end") else "other"
            for sums, key in ((phases.seconds, "at"), (phases.worked, "worked")):
                if name == "generate":  # of several steps the last counts: the first warms up
                    for part in STEP:
                        sums.pop(part, None)
                sums[name] = sums.get(name, 0.0) + row[key] - before[key]
            inside = [bytes_ for at, bytes_ in samples if before["at"] <= at <= row["at"]]
            middle = (before["at"] + row["at"]) / 2
            nearest = min(samples, key=lambda sample: abs(sample[0] - middle))[1]
            peak = max(inside, default=nearest) / 2**30
            phases.peak_gib[name] = max(phases.peak_gib.get(name, 0.0), peak)
            if "gpu_gib" in row:
                phases.gpu_gib[name] = max(phases.gpu_gib.get(name, 0.0), row["gpu_gib"])
        return phases


def watch(command: Sequence[str], seconds: float) -> list[tuple[float, int]]:
    """Runs a command to its end, and returns samples of its memory: time, bytes.

    Raises:
        SystemExit: it failed, or took longer than ``seconds``.
    """
    samples: list[tuple[float, int]] = []
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr, env=_environment())
    try:
        while process.poll() is None:
            samples.append((time.time(), pss_bytes(process.pid)))
            if time.monotonic() - started > seconds:
                raise SystemExit(f"the run took longer than {seconds:.0f} s (--seconds)")
            time.sleep(0.5)  # reading it walks all pages
    finally:
        process.kill()
    if process.returncode:
        raise SystemExit(f"the run failed with {process.returncode}")
    return samples


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


# What the hardware can do


@dataclass(frozen=True)
class Machine:
    """Measured rates: FLOP/s of matrix products, and bytes/s of weights in decoding."""

    flops: float
    bandwidth: float


def measure(architecture: Architecture, rows: int, device: str, dtype: torch.dtype) -> Machine:
    """Measures products of the model's own shapes: many tokens at once, and ``rows`` at a time."""
    text = architecture.text
    # Several weights in turn, so that they come from memory and not from a cache.
    number = min(64, max(6, 2**28 // (text.mlp * text.hidden * dtype.itemsize)))
    weights = [torch.randn(text.mlp, text.hidden).to(device, dtype) for _ in range(number)]

    def best(tokens: int) -> float:
        states = torch.randn(tokens, text.hidden).to(device, dtype)

        def once() -> None:
            for weight in weights:
                nn.functional.linear(states, weight)
            if device != "cpu":
                torch.cuda.synchronize()

        once()
        return min(_worked(once, device) for _ in range(3)) / len(weights)

    with torch.no_grad():
        size = text.mlp * text.hidden
        return Machine(2 * 1024 * size / best(1024), dtype.itemsize * size / best(rows))


def _worked(call: Callable[[], None], device: str) -> float:
    """Returns seconds as `Phases.worked` has them."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    call()
    return (clock() - started) / (torch.get_num_threads() if device == "cpu" else 1)


def bounds(
    architecture: Architecture,
    trajectories: Sequence[Mapping[str, Any]],
    machine: Machine,
    *,
    lora: bool,
    value_bytes: int,
) -> dict[str, float]:
    """Returns the least seconds of each phase at the machine's rates."""
    text, vision = architecture.text, architecture.vision
    assert vision is not None
    prompts = [t["prompt_length"] for t in trajectories]
    responses = [t["response_tokens"] for t in trajectories]
    tower = flops.vision_forward(
        vision, [picture["tokens"] for t in trajectories for picture in t["images"]]
    )
    whole = sum(
        flops.text_forward(text, prompt + response, 0)
        for prompt, response in zip(prompts, responses, strict=True)
    )
    logits = flops.logits_forward(text, sum(responses))
    prefill = tower + sum(flops.text_forward(text, prompt, 1) for prompt in prompts)
    read = value_bytes * text.parameters * (max(responses) - 1)
    # Forward, again for the backward pass, and the gradients of the inputs; those of the weights
    # too without LoRA, and then the tower has all of them. Logits: forward, again, and gradients.
    passes = 3 if lora else 4
    update = passes * whole + (passes if lora else passes + 1) * logits + (1 if lora else 4) * tower
    forward = (tower + whole + logits) / machine.flops
    return {
        "generate": prefill / machine.flops + read / machine.bandwidth,
        "old_logp": forward,
        "teacher": forward,
        "update": update / machine.flops,
    }


# The benchmark


@dataclass
class Settings:
    """What to run; see the command line's help."""

    tiny: bool = False
    tokenizer: Path | None = None
    pictures: Path | None = None
    episodes: int = 2
    response: int = 32
    picture_tokens: int = 256
    all_weights: bool = False
    own_teacher: bool = False
    device: str = "cpu"
    steps: int = 1
    save: bool = True
    seconds: float = 900.0
    words: Sequence[str] = ()


def prepare(folder: Path, settings: Settings) -> tuple[int, str]:
    """Writes student, teacher and rows below a folder; returns parameters and the teacher."""
    given = settings.tokenizer or (None if settings.tiny else find_data("qwen_tokenizer"))
    tokenizer = given or Path(resolve_path("demo:student"))
    if given is None and not settings.tiny:
        print("Qwen's tokenizer was not found (--tokenizer DIR): the embedded models' is used")
    config = shapes(AutoTokenizer.from_pretrained(tokenizer), tiny=settings.tiny)
    student = folder / "student"
    parameters = write_checkpoint(student, config, tokenizer)
    like = None if settings.own_teacher else student
    write_checkpoint(folder / "teacher", config, tokenizer, seed=1, like=like)
    own = (folder / "teacher").glob("*.safetensors")
    size = sum(p.stat().st_size for p in own if not p.is_symlink()) / 2
    teacher = (
        f"the student's weights but for {size / 1e9:.4g} billion: the last {TEACHERS_OWN} layers "
        "and the final norm, from another seed"
    )
    return parameters, "weights of its own" if settings.own_teacher else teacher


def overrides(folder: Path, settings: Settings) -> list[str]:
    """Returns the words of the training command."""
    pixels = 784 * settings.picture_tokens
    words = [
        "env=pixel_reasoner",
        "model=qwen2_5_vl_3b",
        f"steps={settings.steps}",
        f"model.student.path={folder / 'student'}",
        f"model.teacher.path={folder / 'teacher'}",
        f"data.train.path={folder / 'rows'}",
        "data.train.part=null",
        f"batch.prompts={settings.episodes}",
        f"batch.mini_batch={settings.episodes}",
        "batch.samples=1",
        "rollout.max_turns=1",
        f"rollout.max_turn_tokens={settings.response}",
        f"rollout.max_response_tokens={settings.response}",
        f"pixels.prompt.min_pixels={min(pixels, 3136)}",
        f"pixels.prompt.max_pixels={pixels}",
        "evaluation.tasks=0",
        "checkpoint.every=0",
        "objective.switch_step=1",  # all tokens are trained on
        f"logging.trajectories={settings.episodes}",
        f"engine.device={settings.device}",
        "optimizer.lr=1e-5",
    ]
    if not settings.all_weights:
        words += [f"model.student.lora={LORA}", "model.student.dtype=bfloat16"]
    return [*words, *settings.words]


def real_size(folder: Path, settings: Settings) -> dict[str, Any]:
    """Makes a step with the checkpoints in a folder; returns what was measured.

    Args:
        folder: has ``student`` and ``teacher`` (`prepare`); the run is written beside them and
            removed.
        settings: what to run.
    """
    for name in ("rows", "run"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "marks.jsonl").unlink(missing_ok=True)
    pictures = write_rows(
        folder / "rows", settings.pictures or find_data("photos"), settings.episodes
    )
    architecture = find_architecture(str(folder / "student"))
    dtype = torch.bfloat16
    machine = measure(architecture, settings.episodes, settings.device, dtype)
    words = overrides(folder, settings)
    child = "--child" if settings.save else "--child-without-saving"
    command = [sys.executable, __file__, child, str(folder), *words]
    samples = watch(command, settings.seconds)
    phases = Phases.read(folder / "marks.jsonl", samples)
    run = folder / "run"
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    metrics = [row for row in rows if row["kind"] == "train"][-1]
    shutil.move(run / "trajectories.jsonl", folder / "trajectories.jsonl")
    shutil.rmtree(run)
    lines = (folder / "trajectories.jsonl").read_text("utf-8").splitlines()
    trajectories = [json.loads(line) for line in lines][-settings.episodes :]
    least = bounds(
        architecture,
        trajectories,
        machine,
        lora=not settings.all_weights,
        value_bytes=dtype.itemsize,
    )
    return {
        "peak_gib": round(max(size for _, size in samples) / 2**30, 2),
        "step_seconds": round(metrics["time/step"], 1),
        "seconds": {name: round(value, 2) for name, value in phases.seconds.items()},
        "worked_seconds": {name: round(value, 2) for name, value in phases.worked.items()},
        "least_seconds": {name: round(value, 2) for name, value in least.items()},
        "peaks_gib": {name: round(value, 2) for name, value in phases.peak_gib.items()},
        "gpu_peaks_gib": {name: round(value, 2) for name, value in phases.gpu_gib.items()},
        "pictures": pictures,
        "prompt_tokens": [t["prompt_length"] for t in trajectories],
        "picture_tokens": [p["tokens"] for t in trajectories for p in t["images"]],
        "response_tokens": [t["response_tokens"] for t in trajectories],
        "grad_norm": metrics["grad_norm"],
        "gflops": round(machine.flops / 1e9, 1),
        "weights_gb_per_second": round(machine.bandwidth / 1e9, 2),
        "lora": not settings.all_weights,
    }


def show(result: Mapping[str, Any]) -> None:
    """Prints seconds and memory by phase."""
    print(
        f"machine: {result['gflops']:.0f} GFLOP/s in products of 1,024 tokens, "
        f"{result['weights_gb_per_second']:.1f} GB/s of weights in decoding (bfloat16)"
    )
    print(f"{'phase':12} {'seconds':>9} {'worked':>9} {'at least':>9} {'ratio':>6} {'peak GiB':>9}")
    for name, seconds in result["seconds"].items():
        least, worked = result["least_seconds"].get(name), result["worked_seconds"][name]
        bound = "" if least is None else f"{least:9.2f} {worked / max(least, 1e-9):6.2f}"
        peak = result["peaks_gib"][name]
        print(f"{name:12} {seconds:9.2f} {worked:9.2f} {bound:16} {peak:9.2f}")


@contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """Yields a folder for the checkpoints: the given one, or a temporary one that is removed."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="reopold-real-size-") as folder:
        yield Path(folder)


def main() -> None:
    """Runs the benchmark."""
    if sys.argv[1:2] in (["--child"], ["--child-without-saving"]):
        run_child(Path(sys.argv[2]), sys.argv[3:], save=sys.argv[1] == "--child")
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small model, in seconds")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go, and stay")
    parser.add_argument("--tokenizer", type=Path, help="folder of Qwen2.5's tokenizer")
    parser.add_argument("--pictures", type=Path, help="folder of photographs")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--response", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--picture-tokens", type=int, default=256, help="at most, per picture")
    parser.add_argument("--all-weights", action="store_true", help="instead of LoRA")
    parser.add_argument("--own-teacher", action="store_true", help="share no weights with it")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=900.0, help="time limit of the run")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings of the training")
    options = vars(parser.parse_args())
    given = options.pop("folder")
    settings = Settings(**options)
    with working_folder(given) as folder:
        started = time.perf_counter()
        if not (folder / "teacher" / "config.json").is_file():
            parameters, teacher = prepare(folder, settings)
            written = {"parameters": parameters, "teacher": teacher}
            (folder / "written.json").write_text(json.dumps(written), "utf-8")
        written = json.loads((folder / "written.json").read_text("utf-8"))
        print(f"{written['parameters']:,} parameters ({time.perf_counter() - started:.0f} s)")
        print(f"teacher: {written['teacher']}")
        result = {**real_size(folder, settings), **written}
    print(result["pictures"])
    show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
