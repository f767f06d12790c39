"""A training step beside those of TRL and verl, on the same models, prompts, tokens and threads.

    python benchmarks/peers.py [--quick] [--trl DIR] [--cases one_turn ...]

Cases, with a student of 108 and a teacher of 221 million random parameters, the real vocabulary of
151,936 ids and 8 episodes in float32:

* ``one_turn``: GSM8K, 64 new tokens: ``reopold`` and ``gkd`` against ``DistillationTrainer``, which
  has the divergence of ``gkd``. All tokens are trained on, as before Reopold's refinement.
* ``one_turn_grpo``: the same with groups of 2: ``grpo`` against ``GRPOTrainer``.
* ``two_turns_tool``: the embedded pictures; a crop, then an answer: ``grpo`` against
  ``GRPOTrainer`` with ``environment_factory``.
* ``group``: 8 samples of one prompt of 1,024 tokens: ``grpo`` against ``GRPOTrainer``.
* ``verl``: the task of ``one_turn_grpo`` with verl's own trainer, below.

Each side of TRL's cases is a process of its own (`peers_side`); they make their steps in turn, and
the first does not count. TRL is in the folder ``--trl``, or is installed into a cache of its own,
beside this interpreter's packages. The last line is JSON: medians of ours/theirs, and for each case
``floor_<case>``: ours over the sum of its bare parts (prefill, decoding, the teacher's pass, the
student's forward and backward pass) at the rate of matrix products measured here. Likewise
``memory_floors`` has our peak over what a step has to hold (`bare_memory`). Under ``cpu``
are the same from CPU seconds, which other programs disturb less.

``verl`` needs the environment with verl and vLLM, and no TRL. It runs ``verl.trainer.main_ppo``
(``algorithm.adv_estimator=grpo``), our ``engine=verl`` and our ``engine=local`` one after the
other, in two rounds, because verl's processes take most of the memory. Every process has one
thread; prompts are the same ids, and the reward is `peers_reward`'s. Seconds are those that each
side logs for its steps (verl: ``timing_s/step``); start-up, the first step and checkpoints are left
out. verl has its defaults as far as a CPU allows: rows are padded, for its packed rows need
flash-attn. What lets it start on a CPU is in `peers_verl`. In the last line ``verl_engine`` and
``verl_local`` are the medians of ours/verl's. ``--quick`` and ``--tiny`` leave it out, unless
``--cases`` names it: it takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peers_side import Script, Side
from real_size import Machine, find_data, measure, working_folder
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reopold_agent.data.loading import load_tasks
from reopold_agent.plan import flops
from reopold_agent.policies.architecture import Architecture, find_architecture
from reopold_agent.policies.loading import resolve_path
from reopold_agent.tools.parse import write_tool_call
from reopold_agent.tracking.metrics import read_json_lines

ROOT = Path(__file__).resolve().parent.parent
TRL = ("trl==1.16.0", "jmespath")
"""What is installed for TRL, besides what this interpreter has."""

CACHE = Path("~/.cache/reopold-agent/peers").expanduser()

PIXELS = 224 * 224
"""Of every picture: 64 tokens."""


# What is compared


@dataclass(frozen=True)
class Size:
    """Shapes of the models, and tokens."""

    student: tuple[int, int, int, int, int]
    """Width, feed-forward width, layers, heads, key-value heads."""

    teacher: tuple[int, int, int, int, int]
    vocab: int | None
    """Rows of the vocabulary; None: as many as the tokenizer has."""

    new_tokens: int = 64
    long_prompt: int = 1024
    call_tokens: int = 64
    answer_tokens: int = 32


REAL = Size((512, 2048, 8, 8, 2), (768, 3072, 12, 12, 4), 151_936)
TINY = Size((64, 96, 2, 2, 1), (64, 96, 3, 2, 1), None, 12, 96, 64, 12)
EPISODES = 8


@dataclass(frozen=True)
class Case:
    """A comparison.

    Attributes:
        ours: our objectives.
        theirs: TRL's trainer.
        samples: episodes per prompt.
        pictures: whether the models see pictures.
    """

    ours: tuple[str, ...]
    theirs: str
    samples: int = 1
    pictures: bool = False


CASES = {
    "one_turn": Case(("reopold", "gkd"), "distillation"),
    "one_turn_grpo": Case(("grpo",), "grpo", samples=2),
    "two_turns_tool": Case(("grpo",), "grpo", samples=2, pictures=True),
    "group": Case(("grpo",), "grpo", samples=8),
}


def named(case: str, objective: str) -> str:
    """Returns the name of a comparison in the result."""
    return f"{case}_{objective}" if case == "one_turn" else case


# Models and prompts


def write_models(folder: Path, size: Size, tokenizer: Path, template: Path | None) -> None:
    """Writes models with random weights below a folder, unless they are there.

    Args:
        folder: gets ``student``, ``teacher`` and ``student_vl``.
        size: their shapes.
        tokenizer: a folder.
        template: the chat template of ``student_vl``; without one that is left out.
    """
    known = AutoTokenizer.from_pretrained(tokenizer)
    for name, shape in (
        ("student", size.student),
        ("teacher", size.teacher),
        ("student_vl", size.student),
    ):
        target = folder / name
        pictures = name.endswith("vl")
        if (target / "config.json").is_file() or (pictures and template is None):
            continue
        torch.manual_seed(0)
        config = (_vision if pictures else _text)(shape, size.vocab or len(known), known)
        kind = Qwen2_5_VLForConditionalGeneration if pictures else Qwen2ForCausalLM
        model = kind(config)
        model.generation_config.eos_token_id = known.convert_tokens_to_ids("<|im_end|>")
        model.save_pretrained(target)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, target / file)
        if pictures and template is not None:
            shutil.copyfile(template, target / "chat_template.jinja")
            pixels = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
            Qwen2VLImageProcessorPil(size=pixels).save_pretrained(target)
            frames = {"video_processor_type": "Qwen2VLVideoProcessor", "size": pixels}
            (target / "video_preprocessor_config.json").write_text(json.dumps(frames), "utf-8")


def _text(shape: Sequence[int], vocab: int, tokenizer: Any) -> PretrainedConfig:
    return Qwen2Config(**_decoder(shape, vocab, tokenizer))


def _vision(shape: Sequence[int], vocab: int, tokenizer: Any) -> PretrainedConfig:
    half = shape[0] // shape[3] // 2
    text = _decoder(shape, vocab, tokenizer)
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1_000_000.0,
        "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
    }

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": 4,
            "hidden_size": shape[0] // 2,
            "intermediate_size": shape[0],
            "num_heads": max(1, shape[3] // 2),
            "out_hidden_size": shape[0],
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
        },
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def _decoder(shape: Sequence[int], vocab: int, tokenizer: Any) -> dict[str, Any]:
    hidden, mlp, layers, heads, kv_heads = shape
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": int(tokenizer.convert_tokens_to_ids("<|im_end|>")),
        "pad_token_id": int(tokenizer.convert_tokens_to_ids("<|endoftext|>")),
    }


def questions(number: int) -> tuple[list[str], str]:
    """Returns questions of GSM8K, or made ones that are as long; and which they are."""
    folder = find_data("math")
    if folder is not None and (folder / "gsm8k_test.jsonl").is_file():
        lines = (folder / "gsm8k_test.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line)["question"] for line in lines[:number]], "GSM8K"
    made = (
        "A shop sells {0} boxes of {1} pencils on Monday and {2} boxes on Tuesday. Each pencil "
        "costs {3} cents. On Wednesday it sells half as many boxes as on the first two days "
        "together. How many dollars does it take on the three days?"
    )
    given = [made.format(n + 3, 2 * n + 4, n + 7, 5 * n + 5) for n in range(number)]
    return given, "made questions (REOPOLD_REAL_DATA has no GSM8K)"


def write_rows(folder: Path, case: str, size: Size, tokenizer: Any) -> str:
    """Writes the training rows of a case; returns what they are. The answer to all is 1."""
    folder.mkdir(parents=True)
    if CASES[case].pictures:
        source = {"source": "demo", "split": "train", "size": EPISODES, "seed": 0}
        tasks = load_tasks({**source, "video_share": 0.0, "small_share": 0.0})
        rows = []
        for number in range(EPISODES // CASES[case].samples):
            task = tasks[number]
            task.images[0].open().save(folder / f"{number}.png")
            row = {"qid": f"q{number}", "question": f"<image>{task.question}", "is_video": False}
            rows.append({**row, "answer": ["1"], "image": [f"{number}.png"]})
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
        return "pictures of the embedded task"
    number = EPISODES // CASES[case].samples
    given, what = questions(number)
    if case == "group":
        several, what = questions(64)
        ids = tokenizer(" ".join(several))["input_ids"][: size.long_prompt - 64]
        given = [tokenizer.decode(ids)]
    rows = [{"question": text, "answer": "#### 1"} for text in given]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return what


def script_of(case: str, size: Size, tokenizer: Any) -> Script:
    """Returns what the episodes of a case have to be: half of them succeed."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    answers = [ids("\\boxed{1}"), ids("\\boxed{2}")]
    lengths, tails = [size.new_tokens], [answers if CASES[case].samples > 1 else [[], []]]
    if CASES[case].pictures:
        call = {"bbox_2d": [0.2, 0.2, 0.8, 0.8], "target_image": 1}
        said = ids(write_tool_call("crop_image", call) + "<|im_end|>")
        lengths = [max(size.call_tokens, len(said)), size.answer_tokens]
        tails = [[said, said], [each + ids("<|im_end|>") for each in answers]]
    special = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    filler = ids("a")[0]
    return Script(lengths, tails, special, len(tokenizer), filler)


def room(script: Script) -> int:
    """Returns the tokens that a response may have besides its turns: what tools say."""
    return 512 * (len(script.lengths) - 1)


def words_of(case: str, objective: str, folder: Path, script: Script, threads: int) -> list[str]:
    """Returns the words of our training command."""
    setting = CASES[case]
    prompts, rows = EPISODES // setting.samples, folder / f"rows_{case}"
    models = "student_vl" if setting.pictures else "student"
    words = [
        f"objective={objective}",
        "steps=10000",
        f"model.student.path={folder / models}",
        f"model.teacher.path={folder / 'teacher'}",
        "model.teacher.dtype=float32",
        f"batch.prompts={prompts}",
        f"batch.samples={setting.samples}",
        f"batch.mini_batch={prompts}",
        f"rollout.max_turns={len(script.lengths)}",
        f"rollout.max_turn_tokens={max(script.lengths)}",
        f"rollout.max_response_tokens={sum(script.lengths) + room(script)}",
        "evaluation.tasks=0",
        "checkpoint.every=0",
        "logging.trajectories=0",
        f"engine.threads={threads}",
        "engine.device=cpu",
        "engine.packed=true",  # no padding; samples of a task share their prompt
        "optimizer.lr=1e-6",
        "data.eval=null",
    ]
    if objective == "reopold":
        words.append("objective.switch_step=10000")  # all tokens are trained on
    if setting.pictures:
        kinds = ["env=pixel_reasoner", "model=qwen2_5_vl", "data=pixel_reasoner_rl"]
        limits = [
            f"pixels.{part}.{most}_pixels={PIXELS}"
            for part in ("prompt", "observation")
            for most in ("min", "max")
        ]
        return [*kinds, *words, *limits, f"data.train.path={rows}", "data.train.part=null"]
    kinds = ["env=math", "model=causal_lm", "data=math_jsonl"]
    return [*kinds, *words, f"data.train.path={rows / 'train.jsonl'}"]


# The bare parts


def bare_parts(
    student: Architecture,
    teacher: Architecture | None,
    played: Mapping[str, Any],
    machine: Machine,
) -> dict[str, float]:
    """Returns the seconds of what a step has to compute, at the machine's rates.

    Equal prompts are prefilled once, and a turn after a call costs its new tokens. A decoding pass
    reads all weights once for all episodes. The backward pass costs two forward passes.

    Args:
        student: shapes of the model that generates and learns.
        teacher: of the one that scores; None without one.
        played: what our side answered about the episodes.
        machine: measured with as many rows as there are episodes, in float32.
    """
    text = student.text
    of_prompts = zip(played["prompt_tokens"], played["pictures"], strict=True)
    unique = dict(zip(played["prompt_of"], of_prompts, strict=True)).values()
    prefill = sum(
        flops.text_forward(text, length, 1) + _tower(student, pictures[:1])
        for length, pictures in unique
    )
    prefill += sum(_tower(student, pictures[1:]) for pictures in played["pictures"])
    passes = 0
    for number in range(max(map(len, played["turns"]))):
        rows = [turns for turns in played["turns"] if len(turns) > number]
        passes += max(turns[number][1] - turns[number][0] for turns in rows) - 1
        if number:
            prefill += sum(
                flops.text_forward(text, t[number][0], 1, t[number - 1][1] - 1) for t in rows
            )
    decoding = passes * text.parameters * 4 / machine.bandwidth
    tokens = sum(end - start for turns in played["turns"] for start, end in turns)

    def forward(model: Architecture) -> float:
        body = sum(flops.text_forward(model.text, length, 0) for length in played["lengths"])
        seen = sum(_tower(model, pictures) for pictures in played["pictures"])
        return body + seen + flops.logits_forward(model.text, tokens)

    return {
        "prefill": prefill / machine.flops,
        "decoding": decoding,
        "teacher": 0.0 if teacher is None else forward(teacher) / machine.flops,
        "forward and backward": 3 * forward(student) / machine.flops,
    }


def bare_memory(
    folder: Path, student: Architecture, teacher: Architecture | None, played: Mapping[str, Any]
) -> dict[str, float]:
    """Returns the GiB that a step has to hold: packages, weights and more in float32, activations.

    Samples of a task share their prompt. Pictures' towers are left out of the activations.

    Args:
        folder: of the student.
        student, teacher, played: as of `bare_parts`.
    """
    lengths, seen = [], set()
    rows = zip(played["prompt_of"], played["prompt_tokens"], played["lengths"], strict=True)
    for prompt, shared, length in rows:
        lengths.append(length - (shared if prompt in seen else 0))
        seen.add(prompt)
    script = str(Path(__file__).with_name("peers_bare.py"))
    words = [sys.executable, script, str(folder), json.dumps(lengths)]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    gib = 4 / 2**30
    return {
        **json.loads(output.splitlines()[-1]),
        "student": student.parameters * gib,
        "gradients and moments": 3 * student.parameters * gib,
        "teacher": 0.0 if teacher is None else teacher.parameters * gib,
    }


def _tower(model: Architecture, pictures: Sequence[int]) -> float:
    return 0.0 if model.vision is None else flops.vision_forward(model.vision, pictures)


# Running


class Process:
    """A side that waits for orders."""

    def __init__(self, kind: str, side: Side, python: str, path: Sequence[str]) -> None:
        self.log = Path(f"{side.folder}.log")
        spec = Path(f"{side.folder}.json")
        spec.write_text(json.dumps(asdict(side)), "utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *path, os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(side.threads),
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name("peers_side.py")), kind, str(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    def step(self) -> dict[str, Any]:
        """Has a step made; returns what was measured.

        Raises:
            SystemExit: the side has failed; the end of its log is shown.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.log} ends with:\n{self.log.read_text('utf-8')[-3000:]}")
        figures: dict[str, Any] = json.loads(line)
        return figures

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


@contextmanager
def closing(processes: list[Process]) -> Iterator[None]:
    """Ends the processes of a list at the end, also those that were added meanwhile."""
    try:
        yield
    finally:
        for process in processes:
            process.close()


@dataclass
class Settings:
    """What to run; see the command line's help."""

    size: Size = REAL
    threads: int = 2
    repeats: int = 5
    python: str = sys.executable
    trl: Path | None = None


def compare(case: str, folder: Path, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Runs a case; returns what was measured of each side's steps."""
    setting, size = CASES[case], settings.size
    models = folder / ("student_vl" if setting.pictures else "student")
    tokenizer = AutoTokenizer.from_pretrained(models)
    rows = folder / f"rows_{case}"
    if not rows.is_dir():
        print(f"{case}: {write_rows(rows, case, size, tokenizer)}")
    script = script_of(case, size, tokenizer)
    path = [] if settings.trl is None else [str(settings.trl)]
    runs: dict[str, list[dict[str, Any]]] = {}
    processes: list[Process] = []
    sides: dict[str, Process] = {}
    common: dict[str, Any] = {"threads": settings.threads, "script": asdict(script)}
    with closing(processes):

        def start(name: str, kind: str, **given: Any) -> dict[str, Any]:
            target = folder / f"{case}-{name}"
            shutil.rmtree(target, ignore_errors=True)
            side = Side(folder=str(target), **common, **given)
            sides[name] = Process(
                kind, side, settings.python if kind == "trl" else sys.executable, path
            )
            processes.append(sides[name])
            runs[name] = []
            return sides[name].step()

        for objective in setting.ours:
            words = words_of(case, objective, folder, script, settings.threads)
            first = start(objective, "ours", words=words)
        given: dict[str, Any] = {
            "trainer": setting.theirs,
            "student": str(models),
            "teacher": str(folder / "teacher") if setting.theirs == "distillation" else None,
            "episodes": EPISODES,
            "samples": setting.samples,
            "response": sum(script.lengths) + room(script),
        }
        if setting.pictures:
            given["words"] = words
        else:
            given["prompts"] = first["prompts"]
        start("trl", "trl", **given)
        for _ in range(settings.repeats):
            for name, side in sides.items():
                runs[name].append(side.step())
    return runs


def figures_of(
    case: str, folder: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], threads: int
) -> dict[str, Any]:
    """Prints a case and returns its figures by comparison: ratios to TRL's, and to the bare parts.

    Args:
        case: its name.
        folder: with the models.
        runs: the steps of each side, made in turn.
        threads: of PyTorch.
    """
    models = "student_vl" if CASES[case].pictures else "student"
    student = find_architecture(str(folder / models))
    teacher = find_architecture(str(folder / "teacher"))
    machine = measure(student, EPISODES, "cpu", torch.float32)
    print(
        f"\n{case}: {machine.flops / 1e9:.0f} GFLOP/s in products of 1,024 tokens, "
        f"{machine.bandwidth / 1e9:.1f} GB/s of weights in those of {EPISODES} "
        f"(float32, {threads} threads)"
    )
    heads = f"{'seconds':>22} {'CPU s':>8} {'tok/s':>7} {'GiB':>6}"
    print(f"{'side':12} {'prompts':>8} {'tokens':>7} {heads}")
    for name, steps in runs.items():
        seconds = [step["seconds"] for step in steps]
        middle = {key: statistics.median(step[key] for step in steps) for key in MEASURED}
        print(
            f"{name:12} {sum(steps[-1]['prompt_tokens']):8,} {steps[-1]['tokens']:7,} "
            f"{spread(seconds):>22} {middle['cpu_seconds']:8.2f} "
            f"{steps[-1]['tokens'] / middle['seconds']:7.1f} {middle['peak_gib']:6.2f}"
        )
    found: dict[str, Any] = {}
    for objective in CASES[case].ours:
        own = runs[objective]
        scores = teacher if CASES[case].theirs == "distillation" else None
        parts = bare_parts(student, scores, own[-1], machine)
        least = sum(parts.values())
        print(f"{objective}: bare parts " + ", ".join(f"{k} {v:.2f} s" for k, v in parts.items()))
        print("  its own parts " + ", ".join(f"{k} {v:.2f}" for k, v in own[-1]["parts"].items()))
        ratios = {
            key: [a[key] / b[key] for a, b in zip(own, runs["trl"], strict=True)]
            for key in MEASURED
        }
        memory = bare_memory(folder / models, student, scores, own[-1])
        print("  bare memory " + ", ".join(f"{k} {v:.2f} GiB" for k, v in memory.items()))
        held = [step["peak_gib"] / sum(memory.values()) for step in own]
        floors = [step["seconds"] / least for step in own]
        cpu_floors = [step["cpu_seconds"] / threads / least for step in own]
        for key, values in ratios.items():
            print(f"  ours/TRL's {key:12} {spread(values)}")
        print(f"  ours/bare parts {spread(floors)}, in CPU seconds {spread(cpu_floors)}")
        print(f"  ours/bare memory {spread(held)}")
        found[named(case, objective)] = {
            "ratios": ratios,
            "floors": floors,
            "cpu_floors": cpu_floors,
            "memory_floors": held,
            "bare": parts,
            "bare_memory": memory,
        }
    return found


MEASURED = ("seconds", "cpu_seconds", "peak_gib")


def spread(values: Sequence[float]) -> str:
    """Returns median, smallest and largest of values as text."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the medians of all comparisons with TRL; ``memory`` is the largest of theirs."""

    def medians(ratio: str, floor: str) -> dict[str, float]:
        names: dict[str, float] = {}
        for name, figures in found.items():
            names[name] = statistics.median(figures["ratios"][ratio])
            names[f"floor_{name}"] = statistics.median(figures[floor])
        return {name: round(value, 3) for name, value in names.items()}

    memory, floors = (
        {name: round(statistics.median(values(each)), 3) for name, each in found.items()}
        for values in (lambda each: each["ratios"]["peak_gib"], lambda each: each["memory_floors"])
    )
    return {
        **medians("seconds", "floors"),
        "memory": max(memory.values()),
        "memory_by_case": memory,
        "memory_floors": floors,
        "cpu": medians("cpu_seconds", "cpu_floors"),
    }


# verl's own trainer

VERL = "verl"
"""The name of this case."""

VERL_TASK = "one_turn_grpo"
VERL_SIDE = "verl's own"
VERL_ROUNDS = 2


def verl_words(folder: Path, prompt: int, size: Size, steps: int) -> list[str]:
    """Returns the words of verl's own command.

    Args:
        folder: has ``student`` and, as ``verl.jsonl``, the prompts.
        prompt: tokens of the longest prompt.
        size: of the models and responses.
        steps: how many.
    """
    prompts = EPISODES // CASES[VERL_TASK].samples
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    settings: dict[str, Any] = {
        "algorithm.adv_estimator": "grpo",
        "critic.enable": False,
        "data.train_files": folder / "verl.jsonl",
        "data.val_files": folder / "verl.jsonl",
        "data.train_batch_size": prompts,
        "data.max_prompt_length": prompt,
        "data.max_response_length": size.new_tokens,
        "data.dataloader_num_workers": 0,
        "actor_rollout_ref.model.path": folder / "student",
        "actor_rollout_ref.model.custom_chat_template": "'{{messages[0].content}}'",
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        f"{actor}.strategy": "fsdp2",
        f"{actor}.optim.lr": 1e-6,
        f"{actor}.ppo_mini_batch_size": prompts,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.use_torch_compile": False,
        f"{actor}.fsdp_config.use_torch_compile": False,
        f"+{actor}.fsdp_config.mixed_precision": (
            "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
        ),
        f"{rollout}.name": "vllm",
        f"{rollout}.n": CASES[VERL_TASK].samples,
        f"{rollout}.dtype": "float32",
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.gpu_memory_utilization": 0.1,
        f"{rollout}.max_model_len": prompt + size.new_tokens,
        f"{rollout}.enforce_eager": True,
        f"{rollout}.free_cache_engine": False,
        f"+{rollout}.enable_sleep_mode": False,
        f"{rollout}.load_format": "safetensors",
        f"{rollout}.agent.num_workers": 1,
        f"+{rollout}.engine_kwargs.vllm.kv_cache_memory_bytes": 2**28,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": "pkg://peers_reward",
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": 1,
        "trainer.nnodes": 1,
        "trainer.total_epochs": steps,
        "trainer.total_training_steps": steps,
        "trainer.logger": "[file]",
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.resume_mode": "disable",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "ray_kwargs.ray_init.num_cpus": 64,
        "+ray_kwargs.ray_init.num_gpus": 1,
        "+ray_kwargs.ray_init.object_store_memory": 2**30,
        "+ray_kwargs.ray_init.include_dashboard": False,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def run_verl(folder: Path, words: Sequence[str]) -> list[dict[str, float]]:
    """Runs verl's own command; returns the figures of its steps but the first.

    Raises:
        SystemExit: it has failed; the end of its log is shown.
    """
    log = folder / "verl-steps.jsonl"
    environment = {
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # the device under which verl registers its engine
        "VERL_USE_EXTERNAL_MODULES": "peers_verl",
        "VERL_FILE_LOGGER_PATH": str(log),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    _run([sys.executable, "-m", "verl.trainer.main_ppo", *words], folder / "verl.log", environment)
    return [
        {
            "seconds": row["timing_s/step"],
            "tokens": row["response_length/mean"] * EPISODES,
            "grad_norm": row["actor/grad_norm"],
            **_parts(row, "timing_s/"),
        }
        for row in [line["data"] for line in read_json_lines(log)][1:]
    ]


def run_ours(folder: Path, size: Size, engine: str, steps: int) -> list[dict[str, float]]:
    """Runs our command with an engine on the same task; returns figures as `run_verl`."""
    run = folder / f"verl-{engine}"
    shutil.rmtree(run, ignore_errors=True)
    words = [*our_words(folder, size, engine, steps), f"hydra.run.dir={run}"]
    _run([sys.executable, "-m", "reopold_agent.train", *words], Path(f"{run}.log"), {})
    rows = [row for row in read_json_lines(run / "metrics.jsonl") if row["kind"] == "train"]
    return [
        {
            "seconds": row["time/step"] - row.get("time/checkpoint", 0.0),
            "tokens": row["rollout/response_tokens"] * EPISODES,
            "grad_norm": row["grad_norm"],
            **_parts(row, "time/"),
        }
        for row in rows[1:]
    ]


def _parts(row: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Returns the seconds of a step's parts by name."""
    parts = {key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix)}
    del parts["step"]
    return parts


def our_words(folder: Path, size: Size, engine: str, steps: int) -> list[str]:
    """Returns the words of our training command with an engine."""
    script = Script([size.new_tokens], [], [], 0, 0)
    changed = {
        "steps": steps,
        "env": "digits",
        "logging.trajectories": EPISODES,
        "logging.every": 10_000,
        "objective.aggregate": "token",  # as verl's default
        "engine": engine,
    }
    if engine == "verl":
        changed |= {
            "engine.gpus_per_node": 1,
            "engine.rollout_workers": 1,
            "engine.seeded_requests": False,
        }
    words = words_of(VERL_TASK, "grpo", folder, script, 1)
    kept = [word for word in words if word.partition("=")[0] not in changed]
    return [*kept, *(f"{key}={value}" for key, value in changed.items())]


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    paths = [
        str(ROOT),
        str(Path(__file__).parent),
        str(log.parent / "site"),
        os.environ.get("PYTHONPATH", ""),
    ]
    common = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_worker_niceness": "0",
        "RAY_memory_usage_threshold": "0.98",
    }
    with log.open("w") as stream:
        ended = subprocess.run(
            command,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **common, **environment},
            check=False,
        )
    if ended.returncode:
        raise SystemExit(f"{log} ends with:\n{log.read_text('utf-8')[-3000:]}")


def write_prompts(folder: Path, tokenizer: Any) -> int:
    """Writes the prompts of our run for verl, as texts; returns the tokens of the longest."""
    rows = read_json_lines(folder / "verl-local" / "trajectories.jsonl")
    prompts = [row["ids"][: row["prompt_length"]] for row in rows]
    given = [
        {
            "data_source": "peers",
            "prompt": [{"role": "user", "content": text}],
            "reward_model": {"style": "rule", "ground_truth": ""},
        }
        for text in dict.fromkeys(map(tokenizer.decode, prompts))
    ]
    (folder / "verl.jsonl").write_text("\n".join(map(json.dumps, given)), "utf-8")
    return max(map(len, prompts))


def write_package(folder: Path) -> None:
    """Writes what pip leaves of a package, so that our command finds `peers_reward.DigitsEnv`."""
    package = folder / "peers-1.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: peers\nVersion: 1\n", "utf-8")
    points = "[reopold_agent.envs]\ndigits = peers_reward\n"
    (package / "entry_points.txt").write_text(points, "utf-8")


def compare_verl(folder: Path, settings: Settings) -> dict[str, list[dict[str, float]]]:
    """Runs the case ``verl``; returns the figures of each side's steps."""
    size, steps = settings.size, settings.repeats + 1
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows = folder / f"rows_{VERL_TASK}"
    if not rows.is_dir():
        print(f"{VERL}: {write_rows(rows, VERL_TASK, size, tokenizer)}")
    write_package(folder / "site")
    runs: dict[str, list[dict[str, float]]] = {"local": [], "verl": [], VERL_SIDE: []}
    for _ in range(VERL_ROUNDS):
        runs["local"] += run_ours(folder, size, "local", steps)
        longest = write_prompts(folder, tokenizer)
        runs[VERL_SIDE] += run_verl(folder, verl_words(folder, longest, size, steps))
        runs["verl"] += run_ours(folder, size, "verl", steps)
    return runs


def figures_of_verl(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Prints the case ``verl`` and returns the medians of ours/verl's seconds."""
    print(f"\n{VERL}: {'side':12} {'tokens':>7} {'seconds':>22}  parts")
    for name, steps in runs.items():
        parts = {key: statistics.median(s.get(key, 0.0) for s in steps) for key in steps[-1]}
        seconds = spread([step["seconds"] for step in steps])
        del parts["seconds"]
        print(
            f"{name:12} {parts.pop('tokens'):7,.0f} {seconds:>22}  "
            + ", ".join(f"{key} {value:.2f}" for key, value in parts.items())
        )
    found = {}
    for name, engine in (("verl_engine", "verl"), ("verl_local", "local")):
        pairs = zip(runs[engine], runs[VERL_SIDE], strict=True)
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
        print(f"  {name:12} {spread(ratios)}")
        found[name] = round(statistics.median(ratios), 3)
    return found


def install_trl(cache: Path) -> str:
    """Installs TRL into an environment that sees this interpreter's packages; returns its Python.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    python = cache / "bin" / "python"
    if not (cache / "complete").is_file():
        venv.create(cache, clear=True, with_pip=True, symlinks=True)
        where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        own = subprocess.check_output([python, "-c", where], text=True).strip()
        (Path(own) / "beside.pth").write_text(sysconfig.get_paths()["purelib"], "utf-8")
        print(f"installing {' '.join(TRL)} into {cache}", file=sys.stderr)
        subprocess.run([python, "-m", "pip", "install", "-q", *TRL], check=True, stdout=sys.stderr)
        (cache / "complete").touch()
    return str(python)


def find_trl(settings: Settings) -> Path:
    """Returns the folder of TRL's package.

    Raises:
        SystemExit: it is not there.
    """
    path = "" if settings.trl is None else str(settings.trl)
    script = "import importlib.util as u; s = u.find_spec('trl'); print(s.origin if s else '')"
    environment = {**os.environ, "PYTHONPATH": path}
    found = subprocess.check_output([settings.python, "-c", script], text=True, env=environment)
    if not found.strip():
        raise SystemExit(f"there is no TRL in {path} (--trl)")
    return Path(found.strip()).parent


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 steps of each side, not 5")
    parser.add_argument("--tiny", action="store_true", help="small models, in seconds")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, VERL])
    parser.add_argument("--repeats", type=int, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--trl", type=Path, help="folder that TRL was installed into")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where it is installed otherwise")
    parser.add_argument("--folder", type=Path, help="where models and logs go, and stay")
    options = parser.parse_args()
    cases = options.cases or [*CASES, *([] if options.quick or options.tiny else [VERL])]
    with_verl = VERL in cases
    cases = [case for case in cases if case != VERL]
    if with_verl and not all(map(importlib.util.find_spec, ("verl", "vllm", "ray"))):
        print("verl is left out: it needs verl, vLLM and Ray")
        with_verl = False
    if not cases and not with_verl:
        return
    settings = Settings(
        size=TINY if options.tiny else REAL,
        threads=options.threads,
        repeats=options.repeats or (2 if options.quick else 5),
        python=sys.executable if options.trl or not cases else install_trl(options.cache),
        trl=options.trl,
    )
    if "two_turns_tool" in cases and importlib.util.find_spec("torchvision") is None:
        print("two_turns_tool is left out: Hugging Face's processor of pictures needs torchvision")
        cases.remove("two_turns_tool")
    torch.set_num_threads(settings.threads)
    package = find_trl(settings) if cases else None
    started = time.perf_counter()
    found: dict[str, Any] = {}
    beside_verl: dict[str, float] = {}
    with working_folder(options.folder) as folder:
        given = None if options.tiny else find_data("qwen_tokenizer")
        tokenizer = given or Path(resolve_path("demo:student"))
        template = package and package / "chat_templates" / "qwen3_vl.jinja"
        write_models(folder, settings.size, tokenizer, template)
        for case in cases:
            runs = compare(case, folder, settings)
            found |= figures_of(case, folder, runs, settings.threads)
        if with_verl:
            beside_verl = figures_of_verl(compare_verl(folder, settings))
    print(f"\n{time.perf_counter() - started:.0f} s")
    packages = ("torch", "transformers", *(("verl", "vllm") if with_verl else ()))
    result = {**summary(found), "threads": settings.threads} if found else {}
    versions = {name: version(name) for name in packages}
    print(json.dumps({**result, **beside_verl, **versions}))


if __name__ == "__main__":
    main()
