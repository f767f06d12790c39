"""verl's configuration of each recipe, by verl's own validation. Starts nothing.

Needs the environment that ``.ci/run`` builds: ``pytest -m full_env``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import composed

from reopold_agent.errors import ConfigError
from reopold_agent.objectives import Reopold
from reopold_agent.policies.attention import IMPLEMENTATION, installed_kernels
from reopold_agent.train.engine import needs_teacher, run_objective
from reopold_agent.train.learning_rate import learning_rate_factor
from reopold_agent.train.verl import engine as verl_engine
from reopold_agent.train.verl.compose import (
    FROZEN_DTYPE,
    LORA_SETTINGS,
    check_supported,
    verl_config,
)
from reopold_agent.train.verl.engine import VerlEngine
from reopold_agent.train.verl.overrides import INSTEAD

pytestmark = pytest.mark.full_env

pytest.importorskip("verl", reason="needs the full environment")

RECIPES = (
    *("paper_agentic", "paper_math_1_5b", "paper_math_7b"),
    *("paper_geometry_3b", "paper_geometry_7b"),
)
CONTEXTS = {"student": 32768, "teacher": 32768}


def settings(*words: str, contexts: dict[str, int] = CONTEXTS) -> Any:
    config, _ = composed(*words)
    objective = run_objective(config)
    check_supported(config, objective)
    return verl_config(
        config,
        Path("/run"),
        with_teacher=needs_teacher(config, objective),
        device="cuda",
        contexts=contexts,
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_verl_takes_the_recipe(recipe: str) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy, need_teacher_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config, _ = composed(f"recipe={recipe}")
    theirs = settings(f"recipe={recipe}")
    validate_config(theirs, need_reference_policy(theirs), need_critic(theirs))
    assert not need_critic(theirs)
    assert need_teacher_policy(theirs)
    assert not need_reference_policy(theirs)
    distillation = omega_conf_to_dataclass(theirs.distillation)  # verl's own checks of the teacher
    assert list(distillation.teacher_models) == ["default"]
    rollout = omega_conf_to_dataclass(theirs.actor_rollout_ref.rollout)
    assert rollout.max_model_len >= rollout.prompt_length + rollout.response_length + 1
    assert theirs.data.train_batch_size == config.batch.prompts
    assert rollout.n == config.batch.samples
    assert theirs.actor_rollout_ref.actor.ppo_mini_batch_size == config.batch.mini_batch
    assert rollout.response_length == config.rollout.max_response_tokens
    assert theirs.trainer.total_training_steps == config.steps
    optim = theirs.actor_rollout_ref.actor.optim
    assert optim.total_training_steps == config.steps * config.batch.updates
    assert (optim.lr, list(optim.betas)) == (config.optimizer.lr, [0.9, 0.999])
    gpus = theirs.trainer.n_gpus_per_node + theirs.distillation.n_gpus_per_node
    assert gpus == config.engine.gpus_per_node == 8
    # Each mini-batch divides evenly over the student's GPUs.
    assert config.batch.mini_batch * config.batch.samples % theirs.trainer.n_gpus_per_node == 0


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_verl_takes_the_recipe_for_fewer_gpus(gpus: int) -> None:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    few = ("recipe=paper_agentic", f"engine.gpus_per_node={gpus}", "engine.teacher_gpus_per_node=0")
    theirs = settings(*(few if gpus > 1 else ("recipe=agentic_1x80gb",)))
    validate_config(theirs, need_reference_policy(theirs), need_critic(theirs))
    assert theirs.trainer.n_gpus_per_node == theirs.distillation.n_gpus_per_node == gpus
    fsdp = theirs.actor_rollout_ref.actor.fsdp_config
    assert fsdp.param_offload == fsdp.optimizer_offload == (gpus == 1)


def test_a_teacher_on_the_students_gpus() -> None:
    words = ("recipe=paper_agentic", "engine.teacher_gpus_per_node=0")
    theirs = settings(*words)
    assert theirs == settings(*words, "engine.teacher=shared")
    assert theirs.distillation.n_gpus_per_node == theirs.trainer.n_gpus_per_node == 8
    teacher = theirs.distillation.teacher_models.teacher_model.inference
    assert teacher.free_cache_engine
    assert teacher.enable_sleep_mode
    student = theirs.actor_rollout_ref.rollout
    assert teacher.gpu_memory_utilization == student.gpu_memory_utilization
    own = settings("recipe=paper_agentic").distillation.teacher_models.teacher_model.inference
    assert not own.free_cache_engine  # its servers never sleep
    assert own.gpu_memory_utilization > teacher.gpu_memory_utilization


def test_servers_that_generate_ahead_never_sleep() -> None:
    assert settings("recipe=paper_agentic").actor_rollout_ref.rollout.free_cache_engine
    ahead = settings("recipe=paper_agentic", "engine.ahead=1").actor_rollout_ref.rollout
    assert not ahead.free_cache_engine


def test_servers_on_gpus_of_their_own() -> None:
    """verl's standalone servers: awake, with the weights sent to them."""
    theirs = settings(
        "recipe=paper_agentic", "engine.rollout_gpus_per_node=2", "engine.teacher_gpus_per_node=2"
    )
    assert theirs.trainer.n_gpus_per_node == 4
    assert theirs.distillation.n_gpus_per_node == 2
    rollout = theirs.actor_rollout_ref.rollout
    assert (rollout.nnodes, rollout.n_gpus_per_node) == (1, 2)
    assert rollout.checkpoint_engine.backend == "nccl"
    assert not rollout.free_cache_engine
    before = settings("recipe=paper_agentic").actor_rollout_ref.rollout
    assert before.checkpoint_engine.backend == "naive"  # in place


def test_each_teacher_has_servers_of_its_own() -> None:
    from verl.utils.config import omega_conf_to_dataclass

    theirs = settings(
        "recipe=paper_agentic",
        "model.teacher=null",
        "model.teachers={pixel_reasoner: demo:teacher, default: demo:student}",
    )
    teachers = omega_conf_to_dataclass(theirs.distillation).teacher_models
    assert list(teachers) == ["pixel_reasoner", "default"]
    found = [Path(each.model_path).name for each in teachers.values()]
    assert found == ["teacher", "student"]
    # Each has half of the four GPUs, and all other settings of a single one.
    assert [each.num_replicas for each in teachers.values()] == [2, 2]
    (single,) = omega_conf_to_dataclass(
        settings("recipe=paper_agentic", "model.teacher.path=demo:teacher").distillation
    ).teacher_models.values()
    for each in teachers.values():
        assert each.inference == single.inference


def test_every_key_of_verls_distillation_loss_is_set() -> None:
    from verl.workers.config import DistillationLossConfig

    loss = settings("recipe=paper_agentic").distillation.distillation_loss
    # Ours never calls that loss, so none of its parts may act: no clamp, no task reward.
    assert loss.loss_max_clamp is None
    assert loss.log_prob_min_clamp is None
    assert loss.use_task_rewards is False
    assert DistillationLossConfig().loss_max_clamp is not None  # the default that differs


def test_rows_are_packed_on_gpus_with_the_kernel_that_is_installed() -> None:
    def model(*words: str) -> tuple[bool, str]:
        theirs = settings("recipe=paper_agentic", *words).actor_rollout_ref.model
        return theirs.use_remove_padding, theirs.override_config.attn_implementation

    assert model() == (True, IMPLEMENTATION + installed_kernels()[0])
    assert model("engine.attention=sdpa") == (True, IMPLEMENTATION + "sdpa")
    assert model("engine.packed=false") == (False, "sdpa")
    assert model("engine.packed=false", "model.student.attention=eager") == (False, "eager")


def test_servers_expect_pictures_of_the_size_that_they_get() -> None:
    """Otherwise they start with a picture of 12.8 million pixels, and with videos."""
    pixels = (
        "pixels={prompt: {min_pixels: 3136, max_pixels: 50176}, "
        "observation: {min_pixels: 3136, max_pixels: 100352}}"
    )
    theirs = settings("recipe=paper_agentic", pixels)
    for server in (
        theirs.actor_rollout_ref.rollout,
        theirs.distillation.teacher_models.teacher_model.inference,
    ):
        arguments = server.engine_kwargs.vllm
        assert arguments.mm_processor_kwargs == {"do_resize": False, "max_pixels": 100352}
        assert arguments.limit_mm_per_prompt == {"video": 0}


def test_verl_trains_an_adapter_beside_frozen_weights() -> None:
    from verl.utils.config import omega_conf_to_dataclass

    def parts(*words: str) -> tuple[Any, Any]:
        theirs = settings("recipe=paper_agentic", *words).actor_rollout_ref
        return theirs.model, omega_conf_to_dataclass(theirs.actor)

    lora = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
    words = "model.student.lora={r: 4, lora_dropout: 0.1, target_modules: all-linear}"
    model, actor = parts(words, "model.student.dtype=bfloat16")
    # Merged: servers know no adapter.
    assert model.lora == {"merge": True, LORA_SETTINGS: lora, FROZEN_DTYPE: "bfloat16"}
    assert model.lora_rank == 4
    assert actor.checkpoint.save_lora_only
    assert "hf_model" not in actor.checkpoint.save_contents
    model, actor = parts("model.student.dtype=bfloat16")
    assert model.lora_rank == 0
    assert not actor.checkpoint.save_lora_only
    assert "hf_model" in actor.checkpoint.save_contents


def test_the_tokens_of_a_pass_are_those_of_the_settings() -> None:
    words = ["engine.max_tokens_per_micro_batch=5000", "engine.max_tokens_per_pass=6000"]
    theirs = settings("recipe=paper_agentic", *words).actor_rollout_ref
    assert theirs.actor.ppo_max_token_len_per_gpu == 5000
    assert theirs.rollout.log_prob_max_token_len_per_gpu == 6000


def test_overrides_come_last_and_unknown_keys_are_refused() -> None:
    word = "+engine.overrides={actor_rollout_ref.rollout.max_num_seqs: 7}"
    assert settings("recipe=paper_agentic", word).actor_rollout_ref.rollout.max_num_seqs == 7
    with pytest.raises(ConfigError, match=r"no setting 'trainer\.nodes'"):
        settings("recipe=paper_agentic", "+engine.overrides={trainer.nodes: 7}")


@pytest.mark.parametrize(
    ("word", "expected"),
    [("recipe=paper_agentic", ("token", 2.0)), ("objective.importance_cap=3", ("token", 3.0)),
     ("objective.importance_cap=null", (None, 2.0))],
)  # fmt: skip
def test_the_cap_is_verls_own_threshold(word: str, expected: tuple[Any, float]) -> None:
    correction = settings("recipe=paper_agentic", word).algorithm.rollout_correction
    assert (correction.rollout_is, correction.rollout_is_threshold) == expected
    assert not correction.bypass_mode
    assert correction.rollout_rs is None


@pytest.mark.parametrize("weighed", [True, False])
def test_a_run_weighs_the_tokens_of_objectives_that_draw_them(
    weighed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers' settings, the workers and the log get the cap that takes effect."""
    given: list[tuple[Any, Any]] = []
    monkeypatch.setattr(Reopold, "weighs_tokens", weighed)
    monkeypatch.setattr(
        VerlEngine, "_train", lambda self, config, theirs, *_: given.append((config, theirs))
    )
    monkeypatch.setattr(verl_engine, "_environment", lambda device: {})
    monkeypatch.setattr(VerlEngine, "_finish", lambda self, seconds: {})
    words = ("env=pixel_reasoner", "engine=verl", "engine.device=cpu", "objective.importance_cap=3")
    config, raw = composed(*words, "engine.gpus_per_node=1")
    VerlEngine(config, raw, tmp_path / "run", []).run()
    ((started, theirs),) = given
    assert started.importance_cap == (3.0 if weighed else None)
    assert theirs.algorithm.rollout_correction.rollout_is == ("token" if weighed else None)
    assert config.importance_cap == 3.0  # as the run's own record has it


def test_the_learning_rate_is_the_local_engine_s() -> None:
    from verl.utils.config import omega_conf_to_dataclass

    from reopold_agent.train.verl.training import FsdpEngine

    words = ("steps=5", "batch.prompts=8", "batch.mini_batch=4", "optimizer.warmup_steps=2")
    words = (*words, "optimizer.lr_scheduler_type=cosine", "optimizer.lr=0.1")
    theirs = settings("recipe=paper_agentic", *words).actor_rollout_ref.actor.optim
    engine = SimpleNamespace(optimizer_config=omega_conf_to_dataclass(theirs))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=theirs.lr)
    rates = FsdpEngine._build_lr_scheduler(engine, optimizer)
    found = []
    for _ in range(10):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
    expected = [learning_rate_factor(done, "cosine", 2, 10) for done in range(10)]
    assert found == pytest.approx([0.1 * share for share in expected])


def test_the_keys_of_verl_that_nothing_reads_exist() -> None:
    from omegaconf import OmegaConf

    theirs = settings("recipe=paper_agentic")
    absent = object()
    for key in INSTEAD:
        assert OmegaConf.select(theirs, key, default=absent) is not absent, key


def test_verl_takes_the_words_of_the_benchmark_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    peers = importlib.import_module("peers")
    with initialize_config_module("verl.trainer.config", version_base=None):
        theirs = compose("ppo_trainer", peers.verl_words(tmp_path, 200, peers.REAL, 3))
    assert (need_critic(theirs), need_reference_policy(theirs)) == (False, False)
    validate_config(theirs, False, False)
    assert theirs.actor_rollout_ref.rollout.max_model_len == 264
    assert theirs.actor_rollout_ref.model.custom_chat_template == "{{messages[0].content}}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=gkd"], r"needs more \(DISTRIBUTIONS\)"),
        (["objective=grpo", "objective.drop_equal_groups=true"], "trains on every group"),
        (["engine.teacher_gpus_per_node=8"], "leaves no GPU for the student"),
        (["engine.teacher=shared"], "engine.teacher=shared uses the student's GPUs"),
        (
            ["engine.teacher=separate", "engine.teacher_gpus_per_node=0"],
            "engine.teacher=separate needs GPUs of its own",
        ),
        (["engine.student_server.tensor_parallel=3"], "does not divide the 4 GPUs"),
        (["engine.old_logp=rollout"], "engine.old_logp=recompute"),
        (["model.student.attention=eager"], "=eager pads rows, and this run packs them"),
        (["policy=vllm"], "starts vLLM servers for both roles"),
        (["model.student.lora={r: 8, bias: all}"], r"not model\.student\.lora\.bias=all"),
        (["engine.compile=true"], "does not support engine.compile"),
        (
            ["model.teacher.follow=0.9", "model.teacher.dtype=float32"],
            "does not support model.teacher.follow",
        ),
        (["engine.max_prompt_tokens=30000"], "do not fit the models' context of 32768"),
    ],
)
def test_unsupported_settings_are_reported(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings("recipe=paper_agentic", *words)
