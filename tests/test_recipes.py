"""Recipes of the paper's runs: every value against the paper's own words."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from real_data import find_real_data, real_data
from running import command, composed, train, train_rows

from reopold_agent.cli.groups import prepare_groups
from reopold_agent.config import VERL_SETTINGS
from reopold_agent.errors import ConfigError, UnknownNameError
from reopold_agent.plan.compose import plan_run
from reopold_agent.plan.estimate import largest_pass
from reopold_agent.train.settings import compose_run
from reopold_agent.train.verl.compose import lengths as verl_lengths

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "reopold_agent" / "configs" / "recipe"
NAMES = (
    *("paper_agentic", "paper_math_1_5b", "paper_math_7b"),
    *("paper_geometry_3b", "paper_geometry_7b"),
)

ADAMW = "AdamW optimizer (Loshchilov and Hutter, 2019) with a constant learning rate"
CONSTANT = {"optimizer.lr_scheduler_type": "constant", "optimizer.warmup_steps": 0}
MATH: list[tuple[str, dict[str, Any]]] = [
    (
        "maximum response length of 8192 and a sampling temperature of 1.0",
        {"rollout.max_response_tokens": 8192, "sampling.temperature": 1.0, "sampling.top_p": 1.0},
    ),
    ("The global batch size is set to 128", {"batch.prompts": 128}),
    ("with a mini-batch size of 32, resulting in 4 gradient updates", {"batch.mini_batch": 32}),
    ("The student policy is trained for 300 iterations", {"steps": 300}),
    (ADAMW, CONSTANT),
    (
        "a single node equipped with 8 NVIDIA H100 80GB GPUs",
        {"engine.nodes": 1, "engine.gpus_per_node": 8},
    ),
    ("We employ Verl (Sheng et al., 2025) for on-policy distillation", {"engine.name": "verl"}),
    (
        "https://huggingface.co/datasets/Elliott/Openr1-Math-46k-8192",
        {"data.train.path": "Elliott/Openr1-Math-46k-8192", "env.name": "math"},
    ),
]
GEOMETRY: list[tuple[str, dict[str, Any]]] = [
    (
        "enforcing a maximum response length of 2048 and a sampling temperature of 1.0",
        {"rollout.max_response_tokens": 2048, "sampling.temperature": 1.0, "sampling.top_p": 1.0},
    ),
    (
        "trained for 60 iterations with a batch size of 128 and a mini-batch size of 64",
        {"steps": 60, "batch.prompts": 128, "batch.mini_batch": 64},
    ),
    (
        "the same hardware setup (a single 8 NVIDIA H100 node)",
        {"engine.nodes": 1, "engine.gpus_per_node": 8},
    ),
    ("on-policy distillation using Verl (Sheng et al., 2025)", {"engine.name": "verl"}),
    ("We train the student model on Geometry3K", {"env.name": "geometry"}),
    (
        "Qwen2.5-VL-32B-Instruct, trained with NoisyRollout (Liu et al., 2025b), as the teacher",
        {"model.teacher.path": "xyliu6/NoisyRollout-Geo3K-32B"},
    ),
]
SAID: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "paper_agentic": [
        (
            "maximum response length of 8192 and a temperature of 1.0",
            {"rollout.max_response_tokens": 8192, "sampling.temperature": 1.0},
        ),
        ("We set the maximum round for 2.", {"rollout.max_turns": 2}),
        (
            "We maintain a batch size of 128 and a mini-batch size of 64",
            {"batch.prompts": 128, "batch.mini_batch": 64},
        ),
        ("The student policy undergoes training for 40 iterations", {"steps": 40}),
        (ADAMW, CONSTANT),
        (
            "GPU hours on a single node with 8 NVIDIA H100 80GB GPUs",
            {"engine.nodes": 1, "engine.gpus_per_node": 8, "engine.name": "verl"},
        ),
        ("we set the maximum round for 5,", {"evaluation.max_turns": 5}),
        (
            "sampling temperature of 1.0, and top-p of 1.0. For training",
            {"sampling.top_p": 1.0, "evaluation.max_turns": 5},
        ),
        (
            "https://huggingface.co/datasets/TIGER-Lab/PixelReasoner-RL-Data",
            {"data.train.path": "TIGER-Lab/PixelReasoner-RL-Data"},
        ),
        (
            "the SFTed Qwen2.5-VL-3B-Instruct (Jiang et al., 2025) as the student policy and "
            "Pixel-Reasoner-7B (Su et al., 2025) as the teacher",
            {
                "model.student.path": "VerlTool/pixel-reaoner-qwen2-5vl-3b-sft",
                "model.teacher.path": "TIGER-Lab/PixelReasoner-RL-v1",
            },
        ),
    ],
    "paper_math_1_5b": [
        *MATH,
        (
            "DeepSeek-R1-Distill-Qwen-1.5B and 7B (Guo et al., 2025), employing "
            "SkyWork-OR1(-Math)-7B and SkyWork-OR1-32B-Preview",
            {
                "model.student.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
                "model.teacher.path": "Skywork/Skywork-OR1-Math-7B",
            },
        ),
    ],
    "paper_math_7b": [
        *MATH,
        (
            "DeepSeek-R1-Distill-Qwen-1.5B and 7B (Guo et al., 2025), employing "
            "SkyWork-OR1(-Math)-7B and SkyWork-OR1-32B-Preview",
            {
                "model.student.path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
                "model.teacher.path": "Skywork/Skywork-OR1-32B-Preview",
            },
        ),
    ],
    "paper_geometry_3b": [
        *GEOMETRY,
        (
            "We adopt Qwen2.5-VL-3/7B-Instruct",
            {"model.student.path": "Qwen/Qwen2.5-VL-3B-Instruct"},
        ),
    ],
    "paper_geometry_7b": [
        *GEOMETRY,
        (
            "We adopt Qwen2.5-VL-3/7B-Instruct",
            {"model.student.path": "Qwen/Qwen2.5-VL-7B-Instruct"},
        ),
    ],
}
LOST = {
    "batch.samples": 8,
    "optimizer.lr": 1e-6,
    "objective.name": "reopold",
    "objective.mixture": 0.1,
    "objective.top_share": 0.2,
    "objective.switch_share": 0.33,
}
"""Numbers that the paper's text lost; the defaults of the specification."""


def flat(recipe: str, *words: str) -> dict[str, Any]:
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        values = OmegaConf.to_container(
            compose("train", [f"recipe={recipe}", *words]), resolve=True
        )
    found: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}{key}.", value)
        else:
            found[prefix[:-1]] = node

    walk("", values)
    return found


SMALL = {"agentic_1x80gb": "h100_80gb", "agentic_1x48gb": "l40s", "agentic_1x24gb": "rtx_4090"}
"""Recipes for one GPU, with the GPU on which they are planned."""


def test_there_are_five_and_those_for_one_gpu() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == sorted([*NAMES, *SMALL])


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_for_one_gpu_fits_and_is_otherwise_the_paper_s(name: str) -> None:
    made = plan_run([f"recipe={name}"])
    assert (made.layout.gpus, made.gpu.name) == (1, SMALL[name])
    assert plan_run([f"recipe={name}", "gpu=h200"]).gpu.name == "h200"
    slow = made.config.engine.name == "local" and made.config.policy.student["name"] != "vllm"
    assert [line[:24] for line in made.warnings] == ["generation without vLLM "] * slow
    assert made.fits
    for role in made.memory:
        assert role.peak[1] <= 0.9 * made.gpu.memory, role.peak
    whole, own = flat("paper_agentic"), flat(name)
    changed = {key for key, value in own.items() if whole.get(key, value) != value}
    allowed = ("engine.", "policy.", "rollout.concurrency", "optimizer.lr", "model.student.")
    assert all(key.startswith(allowed) for key in changed), changed
    assert (own["optimizer.lr"] == 1e-6) == ("model.student.lora.r" not in own)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agentic_1x48gb", "agentic_1x24gb"])
def test_a_recipe_with_lora_trains_at_a_small_size(name: str, tmp_path: Path) -> None:
    """The same shape on a CPU: an adapter on frozen bfloat16 weights, with tools and pictures."""
    train(
        *(tmp_path / "run", f"recipe={name}", "model=demo", "data=demo", "policy=transformers"),
        *("steps=1", "batch.prompts=2", "batch.mini_batch=2", "batch.samples=2"),
        *("rollout.max_response_tokens=110", "rollout.max_turn_tokens=60", "evaluation.every=0"),
        *("evaluation.tasks=2", "evaluation.teacher=false", "engine.max_prompt_tokens=null"),
    )
    (row,) = train_rows(tmp_path / "run")
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_values_are_the_paper_s(name: str) -> None:
    have = flat(name)
    for quote, values in SAID[name]:
        for key, value in values.items():
            assert have[key] == value, f"{key}: the paper says '{quote}'"
    for key, value in LOST.items():
        assert have[key] == value, key


@pytest.mark.parametrize("name", NAMES)
def test_the_quotes_are_in_the_paper(name: str) -> None:
    text = real_data("paper", "reopold.txt").read_text("utf-8")
    for quote, _ in SAID[name]:
        assert quote in text, quote


@pytest.mark.parametrize("name", NAMES)
def test_values_stand_beside_the_paper_s_words_or_a_reason(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text("utf-8").splitlines()
    keys = ("steps", "prompts", "samples", "mini_batch", "max_response_tokens", "max_turns")
    keys += ("temperature", "top_p", "lr", "teacher_gpus_per_node")
    for key in keys:
        line = next(each for each in lines if re.match(rf" *{key}: ", each))
        assert re.search(r"# .*(\"|lost|silent|an answer)", line), line


@pytest.mark.parametrize("name", NAMES)
def test_it_makes_a_typed_configuration(name: str) -> None:
    config, _ = composed(f"recipe={name}")
    engine = config.engine
    student = engine.gpus_per_node - engine.teacher_gpus_per_node
    assert engine.teacher_gpus_per_node % engine.teacher_server.tensor_parallel == 0
    assert config.batch.mini_batch * config.batch.samples % student == 0
    assert config.batch.prompts * config.batch.samples <= (
        config.rollout.concurrency * engine.rollout_workers
    )


@pytest.mark.parametrize("name", NAMES)
def test_words_of_the_command_line_win(name: str) -> None:
    config, _ = composed(
        *(f"recipe={name}", "engine=local", "batch.prompts=8", "batch.mini_batch=4", "steps=3"),
        *("rollout.max_response_tokens=77", "seed=5", "model.student.path=elsewhere"),
    )
    assert config.engine.name == "local"
    assert (config.batch.prompts, config.batch.mini_batch, config.batch.samples) == (8, 4, 8)
    assert (config.steps, config.seed, config.rollout.max_response_tokens) == (3, 5, 77)
    assert config.model.student.path == "elsewhere"


def test_settings_of_verl_alone_are_refused_by_the_local_engine() -> None:
    """Those of a recipe stay, or a recipe of ``engine=verl`` could not be tried with this one."""
    assert compose_run([f"recipe={NAMES[0]}", "engine=local"]).engine.gpus_per_node == 8
    for word in (
        "+engine.teacher=shared",
        "++engine.seeded_requests=true",
        "+engine.student_server.stall_seconds=3",
        "+engine.overrides={a.b: 1}",
        "engine.student_server.eager=true",
    ):
        told = r"'engine\.\w+(\.\w+)?' is a setting of engine=verl\.\nLeave it out, or use"
        with pytest.raises(ConfigError, match=told):
            compose_run([word])
    with pytest.raises(ConfigError, match=r"'engine\.gpus_per_node' is a setting of engine=verl"):
        compose_run([f"recipe={NAMES[0]}", "engine=local", "engine.gpus_per_node=4"])
    assert compose_run(["engine=verl", "engine.gpus_per_node=4"]).engine.gpus_per_node == 4
    with pytest.raises(ConfigError, match=r"unknown setting 'engine\.student_server\.egaer'"):
        compose_run(["engine=verl", "engine.student_server.egaer=true"])


def test_the_settings_of_verl_alone_are_those_of_its_file() -> None:
    files = resources.files("reopold_agent") / "configs" / "engine"
    keys = [
        set(yaml.safe_load((files / f"{n}.yaml").read_text("utf-8"))) for n in ("local", "verl")
    ]
    assert keys[1] - keys[0] == set(VERL_SETTINGS)
    assert keys[0] <= keys[1]


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_with_a_tenth_to_spare(name: str) -> None:
    """On the paper's 8 x 80 GB, by the plan, whose lengths are those of verl's configuration."""
    made = plan_run([f"recipe={name}", "gpus=8"])
    assert not [line for line in made.warnings if "fit" in line or "cannot start" in line]
    for role in made.memory:
        phase, most = role.peak
        assert most <= 0.9 * made.gpu.memory, (role.role, phase, most / made.gpu.memory)
    context = 131072  # of the students; 128000 with pictures
    prompt, longest = verl_lengths(made.config, context)
    assert prompt == made.config.engine.max_prompt_tokens  # set, so that no context decides
    largest = largest_pass(made.config, made.work, made.layout, updating=True)
    assert largest.longest == longest
    assert made.work.response_max == made.config.rollout.max_response_tokens
    assert made.work.prompt <= prompt
    shown = made.work.prompt_pictures.tokens, made.work.observation_pictures.tokens
    limits = made.config.pixels.prompt, made.config.pixels.observation
    for tokens, limit in zip(shown, limits, strict=True):
        assert tokens <= limit.max_pixels / 784
    assert bool(made.work.observation) == (made.config.rollout.max_turns > 1)


def test_other_options_of_its_groups_win() -> None:
    assert "objective.mixture" not in flat("paper_math_1_5b", "objective=rkl")
    assert composed("recipe=paper_math_1_5b", "objective=grpo")[0].objective["name"] == "grpo"
    small = flat("paper_agentic", "model=demo", "data=demo")
    assert small["model.student.path"] == "demo:student"
    assert small["data.train.source"] == "demo"
    assert small["batch.prompts"] == 128  # the recipe's
    words = ("data=verl", "data.train.path=a", "data.eval.path=b")
    assert flat("paper_math_7b", *words)["data.train.path"] == "a"


def test_a_recipe_can_be_taken_out_again() -> None:
    assert composed()[1] == composed("recipe=paper_agentic", "~recipe")[1]


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"paper_agentc.*Did you mean 'paper_agentic'"):
        prepare_groups(["recipe=paper_agentc"])


def test_the_command_shows_it(tmp_path: Path) -> None:
    words = ["python", "-m", "reopold_agent.train", "recipe=paper_agentic", "--cfg", "job"]
    shown = command(words, tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "gpus_per_node: 8" in shown.stdout
    assert "path: TIGER-Lab/PixelReasoner-RL-v1" in shown.stdout


EVALUATION = {
    "paper_agentic": (
        "we set the maximum round for 5, maximum response length of 8192, sampling temperature "
        "of 1.0, and top-p of 1.0",
        {
            "protocol.agentic.max_turns": 5,
            "protocol.agentic.max_response_tokens": 8192,
            "protocol.agentic.temperature": 1.0,
            "protocol.agentic.top_p": 1.0,
            "suite": "agentic",
        },
    ),
    "paper_math": (
        "maximum response length of 32768 and a sampling temperature of 0.6 and top-p of 0.95",
        {
            "protocol.math.max_response_tokens": 32768,
            "protocol.math.max_turn_tokens": 32768,
            "protocol.single.temperature": 0.6,
            "protocol.single.top_p": 0.95,
            "suite": "math",
        },
    ),
    "paper_geometry": (
        "maximum response length of 8192 and a sampling temperature of 0.6 and top-p of 0.95",
        {
            "protocol.single.max_response_tokens": 8192,
            "protocol.single.max_turn_tokens": 8192,
            "protocol.single.temperature": 0.6,
            "protocol.single.top_p": 0.95,
            "suite": "visual",
        },
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_its_evaluation_is_the_paper_s(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    found = re.search(r"#   python -m reopold_agent.evaluate (.*(?:\n#     .*)*)", text)
    assert found is not None
    words = shlex.split(found[1].replace("\\\n#", ""))
    words = [word for word in words if not word.startswith("model=")]
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        composed_evaluation = compose("evaluate", words)
    quote, values = next(v for k, v in EVALUATION.items() if name.startswith(k))
    for key, value in values.items():
        assert OmegaConf.select(composed_evaluation, key) == value, f"{key}: '{quote}'"
    if paper := find_real_data("paper", "reopold.txt"):
        assert quote in paper.read_text("utf-8")
