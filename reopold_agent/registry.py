"""Names to things, open to other packages.

A registry is filled by decorators of this package and by entry points of installed packages. An
entry point's module is imported when its name, or the list of names, is first needed; one that
fails is reported by name and does not stop the others.
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
    """A set of named things.

    Args:
        kind: what they are, for messages ("tool").
        group: entry-point group of third parties. An entry point may point to a thing, or to a
            module whose import registers things.
        of: their type; an entry point to anything else but a module is a failed plugin.
    """

    def __init__(self, kind: str, group: str, of: type[T]) -> None:
        self.kind, self.group, self._of = kind, group, of
        self._things: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._loaded = False
        # Environments are made on threads; a second one must wait for the first one's imports.
        self._lock = threading.RLock()
        self.failures: dict[str, str] = {}

    def register(self, name: str, thing: T, *, aliases: tuple[str, ...] = ()) -> T:
        """Adds a thing.

        Raises:
            ConfigError: the name or an alias is taken by another thing.
        """
        for each in (name, *aliases):
            taken = self._things.get(self._aliases.get(each, each))
            if taken is not None and taken is not thing:
                raise ConfigError(
                    f"two {self.kind}s are called '{each}'; rename one of them or uninstall the "
                    "package that brings it"
                )
        self._things[name] = thing
        self._aliases.update(dict.fromkeys(aliases, name))
        return thing

    def add(self, name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[T], T]:
        """Decorator form of `register`."""
        return lambda thing: self.register(name, thing, aliases=aliases)

    def get(self, name: str) -> T:
        """The thing of that name or alias.

        Raises:
            UnknownNameError: lists what exists and the closest match; names of plugins that
                failed to import are among the log's warnings.
        """
        if self._aliases.get(name, name) not in self._things:
            self.load_plugins()
        found = self._things.get(self._aliases.get(name, name))
        if found is None:
            raise UnknownNameError(self.kind, name, [*self._things, *self._aliases])
        return found

    def names(self) -> list[str]:
        """All names, without aliases, sorted."""
        self.load_plugins()
        return sorted(self._things)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self.load_plugins()
        return name in self._things or name in self._aliases

    def load_plugins(self) -> None:
        """Imports the entry points of the group, once."""
        with self._lock:
            if not self._loaded:
                self._loaded = True
                self._load_all()

    def _load_all(self) -> None:
        for point in metadata.entry_points(group=self.group):
            try:
                self._take(point.name, point.load())
            # Third-party code (a module may even call sys.exit): named, and the others go on.
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

    def _take(self, name: str, thing: object) -> None:
        if isinstance(thing, ModuleType):
            return  # by being imported it has registered what it has
        if not isinstance(thing, self._of):
            raise TypeError(
                f"it points to a {type(thing).__name__}; it must point to a {self._of.__name__}, "
                "or to a module that registers some"
            )
        if not any(thing is known for known in self._things.values()):
            self.register(name, thing)
