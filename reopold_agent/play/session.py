"""Plays an environment by hand: sets up the game and prints the score."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich.console import Console

from reopold_agent.common.terminal import is_terminal
from reopold_agent.envs.base import show_as
from reopold_agent.envs.from_config import make_env, shown_sizes
from reopold_agent.errors import ConfigError
from reopold_agent.play.game import Game, Rules
from reopold_agent.play.lines import Lines
from reopold_agent.play.options import PlayOptions, split_words
from reopold_agent.play.pictures import answers_sixel, detect
from reopold_agent.play.record import Recorder
from reopold_agent.play.screen import Screen
from reopold_agent.play.timed import Env, TimedEnv
from reopold_agent.train.settings import compose_run

if TYPE_CHECKING:
    from reopold_agent.play.budget import Budget


def play(words: Sequence[str], source: IO[str], console: Console) -> int:
    """Plays as the arguments of a command line request.

    Args:
        words: settings, each ``key=value``.
        source: the player's input.
        console: the output.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.

    Raises:
        ReopoldError: a setting is wrong, or the environment or its first task cannot be loaded.
    """
    options, rest = split_words(words)
    config = compose_run(rest)
    recorder = None if options.record is None else Recorder(Path(options.record).expanduser())
    if config.mix is not None:
        raise ConfigError(f"play is about one environment, got {config.env_word}.\nGive env=NAME.")
    turns = config.max_turns(options.split)
    budget: Budget | None = None

    def make() -> Env:
        made = make_env(config, max_turns=turns)
        if budget is not None and budget.factor is not None:
            show_as(made, shown_sizes(config.pixels, budget.factor))
        return made

    env = TimedEnv(make, config.rollout.env_seconds)
    try:
        screen = Screen(console, _folder(options), _drawing(options.pictures, source, console))
        lines = Lines(source, screen.say, lambda line: game.complete(line))
        rules = Rules(options.split, turns, options.seed, options.keep)
        if options.tokenizer is not None:
            # Imported here because it needs transformers, which takes seconds.
            from reopold_agent.play.budget import Budget

            budget = Budget(config, options.tokenizer)
            if budget.factor is not None:
                show_as(env.env, shown_sizes(config.pixels, budget.factor))
        game = Game(env, screen, lines, rules, recorder, budget)
        status = 0
        try:
            game.play(options.index)
        except KeyboardInterrupt:
            status = 130
        screen.say(f"\n{game.score()}", "bold")
        if screen.folder.is_dir():
            screen.say(f"pictures are in {screen.folder}", "dim")
        return status
    finally:
        env.close()


def _folder(options: PlayOptions) -> Path:
    if options.folder is not None:
        return Path(options.folder).expanduser()
    return Path(tempfile.mkdtemp(prefix="reopold-play-"))


def _drawing(mode: str, source: IO[str], console: Console) -> str:
    if mode != "auto":
        return mode
    terminal = source.isatty() and is_terminal(console)
    return detect(os.environ, terminal, lambda: answers_sixel(source, console.file))
