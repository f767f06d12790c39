"""Plays an environment by hand: ``python -m reopold_agent.play env=pixel_reasoner``.

You are the model: you see the question, the pictures and the tools' answers, and type what the
model would say. Words that ``python -m reopold_agent.train`` takes are taken here too (an
environment, its data, the budgets; no model is loaded), and these (docs/play.md):

  split=train       or eval, which is played with evaluation.max_turns
  index=0           the first task
  seed=N            of the environment; without it a task gets the seed that every run gives it
  pictures=auto     drawn if the terminal can (kitty, iterm, sixel), else their paths; blocks draws
                    them coarsely in any terminal with 24-bit colour; path draws nothing
  folder=DIR        where pictures are saved; without it a new folder for temporary files
  record=FILE.jsonl append episodes as demonstrations for objective=sft objective.source=recorded
  keep=right        record those that are right, or all
  tokenizer=PATH    count tokens as a rollout does: a checkpoint's folder (no weights needed),
                    demo:student or a hub id

Input that is no terminal is read line by line: ... < actions.txt
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO

from rich.console import Console

from reopold_agent.command import errors_for_people
from reopold_agent.config import TrainConfig
from reopold_agent.engines.environments import make_env
from reopold_agent.errors import ConfigError
from reopold_agent.plan import compose_run
from reopold_agent.playing.game import Game, Rules
from reopold_agent.playing.lines import Lines
from reopold_agent.playing.pictures import answers_sixel, check_mode, detect
from reopold_agent.playing.record import Recorder
from reopold_agent.playing.screen import Screen, speaks_utf8
from reopold_agent.tracking.progress import is_terminal


@dataclass(frozen=True)
class PlayOptions:
    """The command's own words; see the module."""

    split: str = "train"
    index: int = 0
    seed: int | None = None
    pictures: str = "auto"
    folder: str | None = None
    record: str | None = None
    keep: str = "right"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_mode(self.pictures)
        for name, known in (("split", ("train", "eval")), ("keep", ("right", "all"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {' or '.join(known)}, got '{getattr(self, name)}'")


def split_words(words: Sequence[str]) -> tuple[PlayOptions, list[str]]:
    """The command's own settings, and the run's words.

    Raises:
        ConfigError: a value is wrong.
    """
    own = {each.name for each in fields(PlayOptions)}
    given: dict[str, object] = {}
    rest = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in own:
            rest.append(word)
        elif name in ("index", "seed"):
            if not value.isdecimal():
                raise ConfigError(f"{name} must be a whole number from 0, got '{value}'")
            given[name] = int(value)
        else:
            given[name] = value
    return PlayOptions(**given), rest  # type: ignore[arg-type]  # checked word by word


def play(words: Sequence[str], source: IO[str], console: Console) -> int:
    """Plays with what a command line says.

    Args:
        words: ``key=value``.
        source: the player's lines.
        console: where to show things.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.

    Raises:
        ReopoldError: a setting is wrong, or the environment or its first task cannot be had.
    """
    options, rest = split_words(words)
    config = compose_run(rest)
    recorder = None if options.record is None else Recorder(Path(options.record).expanduser())
    turns = _max_turns(config, options.split)
    env = make_env(config, max_turns=turns)
    try:
        screen = Screen(console, _folder(options), _drawing(options.pictures, source, console))
        lines = Lines(source, screen.say, lambda line: game.complete(line))
        rules = Rules(options.split, turns, options.seed, options.keep)
        budget = None
        if options.tokenizer is not None:
            # Imported here because it needs transformers, which takes seconds.
            from reopold_agent.playing.budget import Budget

            budget = Budget(config, options.tokenizer)
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


def _max_turns(config: TrainConfig, split: str) -> int:
    return config.rollout.max_turns if split == "train" else config.evaluation.max_turns


def _folder(options: PlayOptions) -> Path:
    if options.folder is not None:
        return Path(options.folder).expanduser()
    return Path(tempfile.mkdtemp(prefix="reopold-play-"))


def _drawing(mode: str, source: IO[str], console: Console) -> str:
    if mode != "auto":
        return mode
    terminal = source.isatty() and is_terminal(console)
    return detect(os.environ, terminal, lambda: answers_sixel(source, console.file))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    speaks_utf8()
    with errors_for_people():
        return play(words, sys.stdin, Console())
    return 2  # never reached: errors end the process


if __name__ == "__main__":
    sys.exit(main())
