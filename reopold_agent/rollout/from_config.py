"""Makes a rollout runner from the configuration of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.config import TeacherConfig, TrainConfig
from reopold_agent.envs.from_config import make_env
from reopold_agent.policies.spans import Aligner
from reopold_agent.policies.vision import VisionProcessor
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.reading import Reader, Readers
from reopold_agent.rollout.runner import Env, RolloutLimits, RolloutRunner


def make_runner(
    config: TrainConfig,
    chat: ChatRenderer,
    vision: VisionProcessor | None,
    *,
    split: str = "train",
    max_turns: int | None = None,
    concurrency: int | None = None,
    wrap: Callable[[Env], Env] | None = None,
    reader: Reader | Readers | Mapping[str, Reader | Readers | None] | None = None,
    plays_as: Reader | None = None,
) -> RolloutRunner:
    """Makes the runner for a run's environment and budgets, or for all those of a mixture.

    Args:
        config: the run's.
        chat: renders conversations for the policy's tokenizer.
        vision: encodes pictures; None for text-only models.
        split: whose limit of assistant turns holds, ``train`` or ``eval``.
        max_turns: assistant turns, in place of that limit.
        concurrency: episodes at once; None takes the configuration's.
        wrap: wraps each environment, for example to record what it shows.
        reader: makes the teacher's form of each episode (`make_reader`); several teachers have
            one for each environment, or several where tasks name their teachers.
        plays_as: renders for a teacher with a view that plays the episodes itself.
    """

    turns = config.max_turns(split) if max_turns is None else max_turns
    members = {}
    if config.mix is not None:
        for name, member in config.members.items():
            stop = member.rollout.stop_at_tool_call
            own = ChatRenderer(chat.tokenizer, stop_at_tool_call=stop)
            read: Reader | Readers | None
            if isinstance(reader, Mapping):
                read = reader[name]  # of the mixture's name, which need not be `EnvConfig.name`
            else:
                read = reader.for_pixels(member.pixels) if isinstance(reader, Reader) else reader
            members[name] = make_runner(
                member,
                own,
                vision,
                split=split,
                max_turns=max_turns,
                reader=read,
                plays_as=None if plays_as is None else plays_as.for_pixels(member.pixels),
            )

    def make() -> Env:
        env = make_env(config, max_turns=turns)
        return env if wrap is None else wrap(env)

    return RolloutRunner(
        make,
        chat,
        vision,
        prompt_pixels=PixelLimits(**vars(config.pixels.prompt)),
        observation_pixels=PixelLimits(**vars(config.pixels.observation)),
        limits=RolloutLimits(
            max_response_tokens=config.rollout.max_response_tokens,
            max_turn_tokens=config.rollout.max_turn_tokens,
            max_turns=turns,
            env_seconds=config.rollout.env_seconds,
            concurrency=config.rollout.concurrency if concurrency is None else concurrency,
            max_prompt_tokens=config.engine.max_prompt_tokens,
        ),
        reader=reader.get(config.env.name) if isinstance(reader, Mapping) else reader,
        plays_as=plays_as,
        members=members,
        teacher_key=config.model.teacher_key,
    )


def make_reader(
    config: TrainConfig,
    teacher: TeacherConfig | None,
    chat: ChatRenderer,
    vision: VisionProcessor | None,
    context: int | None = None,
    aligner: Aligner | None = None,
) -> Reader | None:
    """Makes what gives a teacher its form of the student's episodes; None if it reads them as is.

    Args:
        config: the run's.
        teacher: the settings of the teacher; None without one.
        chat, vision: of the teacher; the student's unless it is aligned.
        context: longest sequence of the teacher, if it has one.
        aligner: translates turns for an aligned teacher with other tokens.
    """
    if teacher is None or (teacher.view.empty and teacher.align is None):
        return None
    pixels = config.pixels
    return Reader(teacher.view, chat, vision, pixels=pixels, max_tokens=context, aligner=aligner)
