"""Name registry that plugins extend.

This package registers things with decorators, other packages through entry points. Entry points
are imported when an unknown name, or the list of names, is first asked for; one that fails is
reported by name and does not stop the others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from types import ModuleType
from typing import Generic, TypeVar

from reopold_agent.errors import ConfigError, UnknownNameError

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Registry(Generic[T]):
    """Maps names to things of one type.

    Args:
        kind: what the things are, for messages ("tool").
        group: entry-point group for plugins. An entry point refers to a thing, or to a module
            whose import registers things.
        of: type of the things; a plugin whose entry point refers to anything else fails.
    """

    def __init__(self, kind: str, group: str, of: type[T]) -> None:
        self.kind, self.group, self._of = kind, group, of
        self._things: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._loaded = False
        # Environments are made on several threads; all must wait for the first one's imports.
        self._lock = threading.RLock()
        self.failures: dict[str, str] = {}

    def register(self, name: str, thing: T, *, aliases: tuple[str, ...] = ()) -> T:
        """Adds a thing.

        Raises:
            ConfigError: another thing has this name or alias.
        """
        for each in (name, *aliases):
            taken = self._things.get(self._aliases.get(each, each))
            if taken is not None and taken is not thing:
                raise ConfigError(
                    f"two {self.kind}s are called '{each}'; rename one of them or uninstall the "
                    "package that provides it"
                )
        self._things[name] = thing
        self._aliases.update(dict.fromkeys(aliases, name))
        return thing

    def add(self, name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[T], T]:
        """Returns a decorator that registers what it decorates."""
        return lambda thing: self.register(name, thing, aliases=aliases)

    def get(self, name: str) -> T:
        """Returns the thing with that name or alias.

        Raises:
            UnknownNameError: no such name; the message lists the known names and the closest
                match. Plugins that failed to import are named in the log's warnings.
        """
        if self._aliases.get(name, name) not in self._things:
            self.load_plugins()
        found = self._things.get(self._aliases.get(name, name))
        if found is None:
            raise UnknownNameError(self.kind, name, [*self._things, *self._aliases])
        return found

    def names(self) -> list[str]:
        """Returns all names, sorted, without aliases."""
        self.load_plugins()
        return sorted(self._things)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self.load_plugins()
        return name in self._things or name in self._aliases

    def load_plugins(self) -> None:
        """Imports the group's entry points, once."""
        with self._lock:
            if not self._loaded:
                self._loaded = True
                self._load_all()

    def _load_all(self) -> None:
        for point in metadata.entry_points(group=self.group):
            try:
                self._add_loaded(point.name, point.load())
            # Third-party code may raise anything, even call sys.exit; the other plugins still load.
            except (Exception, SystemExit) as error:
                self.failures[point.name] = f"{type(error).__name__}: {error}"
                _log.warning(
                    "the %s plugin '%s' (%s) could not be loaded: %s: %s",
                    self.kind,
                    point.name,
                    point.value,
                    type(error).__name__,
                    error,
                )

    def _add_loaded(self, name: str, thing: object) -> None:
        if isinstance(thing, ModuleType):
            return  # its import has registered its things
        if not isinstance(thing, self._of):
            raise TypeError(
                f"it points to a {type(thing).__name__}; it must point to a {self._of.__name__}, "
                "or to a module that registers some"
            )
        if not any(thing is known for known in self._things.values()):
            self.register(name, thing)
