"""Settings of the play command itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from reopold_agent.cli.groups import check_once
from reopold_agent.errors import ConfigError
from reopold_agent.play.pictures import check_mode


@dataclass(frozen=True)
class PlayOptions:
    """Settings of the command itself; ``reopold play --help`` explains them."""

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
    """Separates the command's own settings from those of the run, which it returns as words.

    Raises:
        ConfigError: a value is wrong, or a setting is given twice.
    """
    check_once(words)
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
