"""Chat templates for ``chat_template=NAME|FILE``, in place of a checkpoint's own.

The shipped ones write the same prompts as the templates of the models that they are named after,
but keep earlier turns as they were written, thoughts included, so that more turns only append.
Each is a few values (``NAME.jinja``) in front of one body (``_body.jinja``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reopold_agent.errors import ConfigError, first_line, suggestion

_FOLDER = Path(__file__).parent
_MAX_LENGTH = 1_000_000

SHIPPED = tuple(sorted(p.stem for p in _FOLDER.glob("[!_]*.jinja")))
"""Names of the shipped templates."""


class ChatTemplate(str):
    """The Jinja text of a template that a setting gave.

    Attributes:
        source: the setting's value, a name or a file.
        own: the checkpoint's own template, which this one replaces; None if it has none.
    """

    source: str
    own: str | None

    def __new__(cls, text: str, source: str, own: str | None = None) -> ChatTemplate:
        """Makes the text with what is known about it."""
        made = super().__new__(cls, text)
        made.source, made.own = source, own
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (str(self), self.source, self.own)


def chat_template(given: str) -> ChatTemplate:
    """Returns the template that a setting names; one that was read before is unchanged.

    Args:
        given: a name of `SHIPPED`, or a file.

    Raises:
        ConfigError: there is no such template, or the file cannot be read.
    """
    if isinstance(given, ChatTemplate):
        return given
    if given in SHIPPED:
        parts = (_FOLDER / f"{name}.jinja" for name in (given, "_body"))
        return ChatTemplate("".join(part.read_text("utf-8") for part in parts), given)
    known = ", ".join(SHIPPED)
    try:
        with Path(given).expanduser().open(encoding="utf-8-sig") as stream:
            text = stream.read(_MAX_LENGTH + 1)
    except (FileNotFoundError, IsADirectoryError) as error:
        hint = suggestion(given, SHIPPED)
        raise ConfigError(
            f"chat_template={given} is neither a file nor a shipped template. {hint}".rstrip()
            + f"\nGive the path of a Jinja file, or one of {known}."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"chat_template={given[:80]} cannot be read: {first_line(error)[:200]}\n"
            f"Give a Jinja file in UTF-8, or one of {known}."
        ) from error
    if not text.strip() or len(text) > _MAX_LENGTH:
        wrong = "is empty" if not text.strip() else f"has more than {_MAX_LENGTH:,} characters"
        raise ConfigError(f"chat_template={given} {wrong}.\nGive a Jinja file, or one of {known}.")
    return ChatTemplate(text, given)
