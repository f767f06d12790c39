"""Composing and checking a run's configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from running import composed

from reopold_agent.cli.groups import check_once, prepare_groups
from reopold_agent.config import (
    COMMON_SETTINGS,
    BatchConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ServerConfig,
    TrainConfig,
    build,
)
from reopold_agent.errors import ConfigError, UnknownNameError
from reopold_agent.objectives import Objective, Reopold, RunFacts, make_objective

CONFIGS = Path(__file__).parents[1] / "reopold_agent" / "configs"


# Types


def test_nested_values_become_typed() -> None:
    made = build(
        OptimizerConfig, {"lr": 1, "warmup_steps": 3}
    )  # YAML writes a whole float as an integer
    assert made.lr == 1.0
    assert isinstance(made.lr, float)
    assert made.warmup_steps == 3
    model = build(ModelConfig, {"path": "x", "lora": {"r": 4}, "revision": None})
    assert model.lora == {"r": 4}
    assert model.revision is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"path": "x", "pth": 1}, ["'model.student.pth'", "Did you mean 'model.student.path'?"]),
        ({"path": "x", "zzzzzz": 1}, ["unknown setting 'model.student.zzzzzz'"]),
        ({}, ["'model.student.path' is missing"]),
        ({"path": None}, ["'model.student.path' must be set"]),
        ({"path": 3}, ["'model.student.path' must be str, got 3"]),
        ({"path": "x", "lora": 3}, ["'model.student.lora' must be dict, got 3"]),
        ({"path": "x", "gradient_checkpointing": 1}, ["must be bool, got 1"]),
        ({"path": "x", "dtype": "float23"}, ["dtype", "float32", "Did you mean 'float32'?"]),
        ({"path": "x", "attention": "flash_attention_2"}, ["sdpa, eager"]),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(ModelConfig, values, "model.student.")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [True, 2.0, "2", [2], {"a": 2}])
def test_only_an_integer_is_an_integer(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"'samples' must be int"):
        build(BatchConfig, {"samples": value})


@pytest.mark.parametrize("value", [True, "1e-6", float("nan"), float("inf")])
def test_only_a_finite_number_is_a_float(value: Any) -> None:
    with pytest.raises(ConfigError, match="'lr' must be"):
        build(OptimizerConfig, {"lr": value})


# Composition


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("env=pixel_reasoner",),
        ("model=qwen2_5_vl_3b",),
        ("data=pixel_reasoner_rl",),
        ("model=qwen2_5_vl_3b", "data=verl", "data.train.path=a", "data.eval.path=b"),
    ],
)
def test_every_group_composes(words: tuple[str, ...]) -> None:
    config, raw = composed(*words)
    assert isinstance(config, TrainConfig)
    assert {f.name for f in dataclasses.fields(config)} == raw.keys() | {"mix"}  # of mixtures only


def test_all_yaml_files_parse() -> None:
    files = list(CONFIGS.rglob("*.yaml"))
    assert len(files) >= 9
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text("utf-8")), dict), file


def test_the_default_is_the_embedded_task() -> None:
    config, _ = composed()
    assert config.env.id == "reopold/PixelReasoner-v0"
    assert config.data.train is not None
    assert config.data.train["source"] == "demo"
    assert config.model.student.path == "demo:student"
    assert (config.seed, config.resume) == (0, "auto")
    assert config.evaluation.tasks >= 256
    assert (config.sampling.temperature, config.sampling.top_p) == (1.0, 1.0)


def test_the_paper_s_setting() -> None:
    config, _ = composed("model=qwen2_5_vl_3b")
    assert config.steps == 40
    assert vars(config.batch) == {"prompts": 128, "samples": 8, "mini_batch": 64}
    assert (config.optimizer.lr, config.optimizer.max_grad_norm) == (1e-6, 1.0)
    assert objective("model=qwen2_5_vl_3b") == Reopold(0.1, 0.2, 0.33, switch_step=13)
    assert (config.rollout.max_turns, config.evaluation.max_turns) == (2, 5)
    assert config.rollout.max_response_tokens == 8192
    assert config.data.train is not None
    assert config.data.train["path"] == "TIGER-Lab/PixelReasoner-RL-Data"
    for limits in (config.pixels.prompt, config.pixels.observation):
        assert limits.min_pixels % 784 == limits.max_pixels % 784 == 0


def test_a_data_group_on_the_command_line_beats_the_model_s() -> None:
    config, _ = composed(
        "model=qwen2_5_vl_3b", "data=verl", "data.train.path=a", "data.eval.path=b"
    )
    assert config.data.train is not None
    assert (config.data.train["source"], config.data.train["path"]) == ("verl", "a")
    assert config.batch.prompts == 128


def test_data_that_must_be_named_is_asked_for_by_its_keys() -> None:
    with pytest.raises(ConfigError, match=r"data\.eval\.path, data\.train\.path"):
        composed("data=verl")


def test_a_key_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'stes'. Did you mean 'steps'"):
        composed("+stes=3")
    with pytest.raises(Exception, match="Could not override 'stes'"):
        composed("stes=3")


def test_sections_of_a_plugin_override_the_models() -> None:
    """`EnvEntry.config` may bring budgets that suit the environment."""
    node = {
        "env": {"name": "plug", "id": "plug/Plug-v0", "takes_data": False, "kwargs": {}},
        "batch": {"prompts": 6, "mini_batch": 3},
        "rollout": {"max_turns": 7},
    }
    store = ConfigStore.instance()
    store.store(group="env", name="plug", node=node, package="_global_")
    try:
        config, _ = composed("env=plug")
    finally:
        store.repo["env"].pop("plug.yaml")
    assert vars(config.batch) == {"prompts": 6, "samples": 1, "mini_batch": 3}
    assert config.rollout.max_turns == 7
    assert config.rollout.max_turn_tokens == composed()[0].rollout.max_turn_tokens


@pytest.mark.parametrize(
    ("word", "close"),
    [
        ("env=pixel_resoner", "pixel_reasoner"),
        ("model=qwen2_5_vl_3", "qwen2_5_vl_3b"),
        ("data=verll", "verl"),
        ("objective=reopol", "reopold"),
        ("engine=locall", "local"),
    ],
)
def test_an_unknown_option_says_what_was_meant(word: str, close: str) -> None:
    with pytest.raises(UnknownNameError, match=f"Did you mean '{close}'"):
        prepare_groups([word])


def test_known_options_and_other_words_pass() -> None:
    prepare_groups(["env=pixel_reasoner", "model=demo", "seed=3", "--cfg", "job", "-m", "env=a,b"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "optimizer.lr=1 seed=2 optimizer.lr=2",
            r"'optimizer\.lr' is given twice: .*=1 and .*=2\.\n",
        ),
        (
            "env=math env=geometry",
            r"'env' is given twice.*\nLeave one out, or run the command once",
        ),
        ("seed=1 ++seed=2", "'seed' is given twice"),
        ("+a.b=1 +a.b=2", "'a.b' is given twice"),
        ("seed=0,1 seed=2 --multirun", "'seed' is given twice"),
        ("hydra.run.dir=a hydra.run.dir=b", "twice"),
        ("+a={b:{c:1,c:2}}", r"'c' is given twice in \+a=\{b:\{c:1,c:2\}\}\.\nLeave one out"),
        ("model.teachers={math:A,math:B}", r"'math' is given .*\nAn environment has one teacher:"),
        ("model.teachers={math:{path:A,path:B}}", r"'path' is given twice in .*\nLeave one out"),
        ("model.teachers={a:A} model.teachers=null", "'model.teachers' is given twice"),
        ("a=null a={b:1} a={b:2}", "'a' is given twice: a={b:1} and a={b:2}"),
        ("a=null a=1", "'a' is given twice"),
        ("tracking=wandb tracking=[mlflow]", r"Write 'tracking=\[wandb,mlflow\]' for both"),
    ],
)
def test_a_setting_that_is_given_twice_is_refused(words: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_once(words.split())


def test_one_value_for_each_setting_passes() -> None:
    check_once(
        ["env=math", "env=math", "--cfg", "job", "env.kwargs={a: {b: 1}, b: 2}", "seed=0,1", "-m"]
    )
    check_once(["~objective", "+objective=rkl", "policy/role@policy.student=vllm", "policy=vllm"])
    check_once(["policy/role@policy.student=vllm", "policy/role@policy.teacher=server"])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "data.train.path=[a,b]",
            r"'data\.train\.path' takes one path, got \['a', 'b'\]\.\nPut the",
        ),
        ("data.eval.path=7", r"'data\.eval\.path' must be str, got 7"),
        ("data.train.limit=ten", r"'data\.train\.limit' must be int, got 'ten'"),
        ("data.train.limit=0", r"'data\.train\.limit' must be positive or null, got 0"),
        ("+data.demonstrations={path: [a, b]}", r"'data\.demonstrations\.path' takes one path"),
    ],
)
def test_settings_of_data_have_the_types_that_loading_needs(word: str, told: str) -> None:
    given = ("env=math", "data=math_jsonl", "data.train.path=a", "data.eval.path=b")
    with pytest.raises(ConfigError, match=told):
        composed(*given, word)


# Values that cannot work are refused before anything is loaded


@pytest.mark.parametrize(
    "word",
    [
        "steps=-1",
        "steps=2.5",
        "steps=many",
        "seed=-1",
        "resume=allways",
        "batch.prompts=0",
        "batch.mini_batch=5",
        "rollout.concurrency=0",
        "rollout.max_turn_tokens=0",
        "rollout.max_response_tokens=-1",
        "rollout.env_seconds=0",
        "sampling.temperature=-0.5",
        "sampling.top_p=0",
        "sampling.top_p=1.1",
        "optimizer.lr=0",
        "optimizer.lr=nan",
        "optimizer.beta1=1",
        "optimizer.beta2=-0.1",
        "optimizer.eps=0",
        "optimizer.weight_decay=-1",
        "optimizer.warmup_steps=-1",
        "optimizer.lr_scheduler_type=linear",
        "optimizer.max_grad_norm=0",
        "evaluation.tasks=-1",
        "evaluation.every=-1",
        "checkpoint.every=-1",
        "checkpoint.keep=0",
        "logging.every=-1",
        "engine.name=other",
        "engine.device=gpu",
        "engine.precision=float16",
        "engine.old_logp=never",
        "engine.threads=0",
        "engine.max_tokens_per_pass=0",
        "engine.packed=1",
        "engine.attention=eager",
        "model.student.dtype=float8",
        "model.teacher.attention=flash_attention_2",
    ],
)
def test_a_setting_that_cannot_work_is_named(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(word)
    assert word.partition("=")[0].split(".")[-1] in str(caught.value)


def test_where_the_teacher_is() -> None:
    verl = composed("engine=verl")[0].engine
    assert verl.shares_gpus
    assert verl.teacher_memory_share == verl.student_server.memory_share < 0.85
    own = composed("engine=verl", "engine.teacher_gpus_per_node=2")[0].engine
    assert not own.shares_gpus
    assert own.teacher_memory_share == 0.85
    for words, message in (
        (("shared", "2"), r"gives the teacher some of its own\.\nSet engine\.teacher_gpus"),
        (("separate", "0"), r"engine\.teacher_gpus_per_node=0\.\nGive their number"),
        (("both", "0"), r"engine\.teacher must be one of shared, separate"),
    ):
        teacher, gpus = words
        settings = (f"engine.teacher={teacher}", f"engine.teacher_gpus_per_node={gpus}")
        with pytest.raises(ConfigError, match=message):
            composed("engine=verl", *settings)


def test_no_steps_and_no_held_out_tasks() -> None:
    config, _ = composed("steps=0")
    assert (config.steps, config.evaluation.tasks) == (0, 256)
    with pytest.raises(ConfigError, match=r"evaluates nothing\.\nSet one of them"):
        composed("steps=0", "evaluation.tasks=0")
    with pytest.raises(ConfigError, match=r"\nUse engine=local, or `reopold evaluate env=math"):
        composed("env=math", "engine=verl", "steps=0")
    with pytest.raises(ConfigError, match=r"`reopold evaluate 'env=\[pixel_reasoner,geometry\]'"):
        composed("env=[pixel_reasoner,geometry]", "model=demo", "engine=verl", "steps=0")
    config, _ = composed(
        "env=math", "data=math_jsonl", "data.train.path=x", "evaluation.tasks=0", "objective=grpo",
        "model.teacher=null",
    )  # fmt: skip
    assert config.data.eval is None  # neither held-out rows nor a teacher are needed
    assert (config.evaluation.every, config.evaluation.teacher) == (0, False)
    with pytest.raises(ConfigError, match=r"data\.eval\.path"):
        composed("env=math", "data=math_jsonl", "data.train.path=x")


@pytest.mark.parametrize(
    ("share", "steps", "switch"),
    [(0.33, 60, 20), (0.33, 40, 13), (0.33, 1, 0), (0.5, 3, 2), (0.0, 9, 0), (1.0, 9, 9)],
)
def test_the_switch_is_a_share_of_the_steps(share: float, steps: int, switch: int) -> None:
    made = objective(f"objective.switch_share={share}", f"steps={steps}")
    assert isinstance(made, Reopold)
    assert made.switch_step == switch


def test_an_absolute_switch_wins() -> None:
    for words, switch in (
        (("objective.switch_step=0",), 0),
        (("objective.switch_step=7", "objective.switch_share=0.9"), 7),
    ):
        made = objective(*words)
        assert isinstance(made, Reopold)
        assert made.switch_step == switch
    assert Reopold(switch_step=None).switch_step is None


# Objectives: their settings are their own fields

OBJECTIVES = sorted(path.stem for path in (CONFIGS / "objective").glob("*.yaml"))


def objective(*words: str) -> Objective:
    """Builds the objective of a run with these settings."""
    config, _ = composed(*words)
    settings = {key: value for key, value in config.objective.items() if key != "name"}
    made = make_objective(config.objective["name"], settings)
    return made.for_run(RunFacts(config.steps, config.rollout.max_response_tokens))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_file_of_every_objective_lists_its_settings(name: str) -> None:
    """The file lists every setting, with the class's own defaults."""
    config, _ = composed(f"objective={name}")
    settings = {k: v for k, v in config.objective.items() if k not in COMMON_SETTINGS}
    made = make_objective(name, settings)
    assert config.objective["name"] == name
    assert set(settings) == {f.name for f in dataclasses.fields(made)}  # type: ignore[arg-type]
    assert made == type(made)()


def test_an_objective_s_groups_fit_what_it_compares() -> None:
    single, group = composed()[0].batch, composed("objective=grpo")[0].batch
    assert vars(single) == {"prompts": 32, "samples": 1, "mini_batch": 32}
    assert vars(group) == {"prompts": 4, "samples": 8, "mini_batch": 4}
    given = composed("objective=grpo", "batch.prompts=2", "batch.mini_batch=1")[0].batch
    assert vars(given) == {"prompts": 2, "samples": 8, "mini_batch": 1}
    real = composed("model=qwen2_5_vl_3b", "objective=grpo")[0].batch
    assert vars(real) == {"prompts": 128, "samples": 8, "mini_batch": 64}


@pytest.mark.parametrize(
    "words",
    [
        "objective.mixture=1",
        "objective.top_share=0",
        "objective.switch_share=1.5",
        "objective.switch_step=-1",
        "objective.mixture=much",
        "objective=skew_rkl objective.mixture=0",
        "objective=gkd objective.beta=1.5",
        "objective=gkd objective.top_k=0",
        "objective=grpo objective.clip_low=1",
        "objective=grpo objective.aggregate=tokens",
        "objective=grpo objective.curiosity=-1",
        "objective=grpo objective.curiosity_target=2",
        "objective=grpo objective.rounds=0",
        "objective=sft objective.source=expert",
        "objective.importance_cap=0.9",
        "objective=grpo objective.importance_cap=much",
        "objective=sft objective.importance_cap=true",
    ],
)
def test_an_objective_s_setting_that_cannot_work_is_named(words: str) -> None:
    with pytest.raises(ConfigError, match="objective") as caught:
        objective(*words.split())
    assert words.split()[-1].partition("=")[0] in str(caught.value)


def test_settings_of_another_objective_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'objective\.mixture'"):
        objective("objective.name=grpo")
    with pytest.raises(ConfigError, match=r"'objective\.mixtur'. Did you mean '.*\.mixture'"):
        objective("+objective.mixtur=0.2")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'reopold'\? Known: eopd, exopd, g"):
        objective("objective.name=reopol")
    with pytest.raises(ConfigError, match=r"objective\.name must be set"):
        composed("objective.name=null")


def test_servers_are_named_by_their_setting() -> None:
    with pytest.raises(ConfigError, match=r"^engine\.teacher_server\.stall_seconds must be pos"):
        EngineConfig(teacher_server=ServerConfig(stall_seconds=0))
