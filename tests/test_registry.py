"""Registries: names, aliases, and other packages' plugins, good and broken."""

from __future__ import annotations

import logging
import sys
import threading
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore

from reopold_agent import registry
from reopold_agent.cli import groups
from reopold_agent.envs import ENVS, load_env, register_env
from reopold_agent.envs.registration import EnvEntry
from reopold_agent.errors import ConfigError, ReopoldError, UnknownNameError
from reopold_agent.registry import Registry
from reopold_agent.tools import TOOLS


@dataclass(frozen=True)
class Thing:
    """What the registry of these tests holds."""

    words: str


def things() -> Registry[Thing]:
    return Registry("thing", "reopold_agent.test_things", Thing)


# Names


def test_things_are_found_by_name_and_alias() -> None:
    names, thing = things(), Thing("a")
    assert names.register("apple", thing, aliases=("pear",)) is thing
    assert names.get("apple") is names.get("pear") is thing
    assert names.names() == list(names) == ["apple"]
    assert "apple" in names
    assert "pear" in names
    assert "plum" not in names
    assert 3 not in names


def test_the_decorator_registers_and_gives_the_thing_back() -> None:
    names, thing = things(), Thing("a")
    assert names.add("apple", aliases=("pear",))(thing) is thing
    assert names.get("pear") is thing


def test_an_unknown_name_says_what_was_meant() -> None:
    names = things()
    names.register("crop_image", Thing("a"), aliases=("zoom_in",))
    with pytest.raises(UnknownNameError) as caught:
        names.get("crop_imgae")
    assert str(caught.value) == (
        "no thing is called 'crop_imgae'. Did you mean 'crop_image'? Known: crop_image, zoom_in."
    )
    assert isinstance(caught.value, KeyError)
    with pytest.raises(UnknownNameError) as caught:
        names.get("xyz")
    assert str(caught.value) == "no thing is called 'xyz'. Known: crop_image, zoom_in."
    with pytest.raises(UnknownNameError, match="Known: none"):
        things().get("x")


def test_the_projects_own_registries_say_it_too() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no tool is called 'crop'.*Did you mean 'crop_image'"
    ):
        TOOLS.get("crop")
    with pytest.raises(UnknownNameError, match=r"no environment .*Did you mean 'pixel_reasoner'"):
        load_env("pixel_resoner")
    assert load_env("pixel_reasoner").id == "reopold/PixelReasoner-v0"


@pytest.mark.parametrize(
    ("name", "aliases", "taken"),
    [
        ("apple", (), "apple"),
        ("pear", (), "pear"),
        ("plum", ("apple",), "apple"),
        ("plum", ("fig", "pear"), "pear"),
    ],
)
def test_a_taken_name_is_refused_and_nothing_changes(
    name: str, aliases: tuple[str, ...], taken: str
) -> None:
    names, first = things(), Thing("first")
    names.register("apple", first, aliases=("pear",))
    with pytest.raises(ConfigError, match=f"two things are called '{taken}'"):
        names.register(name, Thing("second"), aliases=aliases)
    assert names.names() == ["apple"]
    assert names.get("apple") is names.get("pear") is first
    assert "fig" not in names


def test_an_equal_but_other_thing_is_still_another() -> None:
    names = things()
    names.register("apple", Thing("a"))
    with pytest.raises(ConfigError):
        names.register("apple", Thing("a"))


def test_the_same_thing_may_be_registered_again() -> None:
    names, thing = things(), Thing("a")
    names.register("apple", thing)
    names.register("apple", thing, aliases=("pear",))
    assert names.get("pear") is thing


# Plugins


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``plugins(name="module source" or "module:attr")``: modules and their entry points."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def install(group: str, points: dict[str, str], **modules: str) -> None:
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        made = [metadata.EntryPoint(name, value, group) for name, value in points.items()]
        monkeypatch.setattr(
            registry.metadata,
            "entry_points",
            lambda group: [point for point in made if point.group == group],
        )

    yield install
    for name in set(sys.modules) - before:
        if name.startswith("plug_"):
            del sys.modules[name]


def test_plugins_are_imported_when_first_needed_and_once(
    plugins: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "from test_registry import Thing\nprint('imported')\nplum = Thing('from afar')\n"
    plugins("reopold_agent.test_things", {"plum": "plug_a:plum"}, plug_a=source)
    names = things()
    own = names.register("apple", Thing("a"))
    assert names.get("apple") is own
    assert capsys.readouterr().out == ""
    assert names.get("plum").words == "from afar"
    assert names.names() == ["apple", "plum"]
    assert "pear" not in names
    assert capsys.readouterr().out == "imported\n"


BROKEN = {
    "raises": ("raise RuntimeError('no GPU here')", "RuntimeError: no GPU here"),
    "absent": ("import surely_not_installed_here", "ModuleNotFoundError: No module named"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "syntax": ("def (", "SyntaxError"),
    "wrong": ("thing = dict", "TypeError: it points to a type; it must point to a Thing"),
    "nothing": ("", "AttributeError"),
    "taken": ("from test_registry import Thing\nthing = Thing('x')", "ConfigError: two things"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_survive(
    plugins: Any, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    source, reason = BROKEN[kind]
    name = "apple" if kind == "taken" else "bad"
    plugins(
        "reopold_agent.test_things",
        {"plum": "plug_good:plum", name: "plug_bad:thing", "fig": "plug_good:fig"},
        plug_bad=source,
        plug_good="from test_registry import Thing\nplum = Thing('p')\nfig = Thing('f')\n",
    )
    names = things()
    names.register("apple", Thing("own"))
    with caplog.at_level(logging.WARNING):
        assert names.names() == ["apple", "fig", "plum"]
    assert names.get("apple").words == "own"
    assert names.get("fig").words == "f"
    assert list(names.failures) == [name]
    assert names.failures[name].startswith(reason)
    (record,) = [r for r in caplog.records if r.name == "reopold_agent.registry"]
    assert f"the thing plugin '{name}' (plug_bad:thing) could not be loaded" in record.getMessage()
    assert reason.split(":", maxsplit=1)[0] in record.getMessage()


def test_an_entry_point_may_name_a_module_or_something_it_has_registered(plugins: Any) -> None:
    names = things()
    sys.modules["plug_names"] = type(sys)("plug_names")
    sys.modules["plug_names"].names = names  # type: ignore[attr-defined]
    source = (
        "from plug_names import names\nfrom test_registry import Thing\n"
        "plum = names.register('plum', Thing('p'))\n"
    )
    plugins(
        "reopold_agent.test_things",
        {"anything": "plug_module", "plum": "plug_module:plum"},
        plug_module=source,
    )
    assert names.names() == ["plum"]
    assert names.failures == {}


def test_a_second_thread_waits_for_the_first_ones_imports(plugins: Any) -> None:
    source = "import time; time.sleep(0.4)\nfrom test_registry import Thing\nplum = Thing('p')\n"
    plugins("reopold_agent.test_things", {"plum": "plug_slow:plum"}, plug_slow=source)
    names = things()
    found: list[Any] = []

    def look() -> None:
        try:
            found.append(names.get("plum").words)
        except ReopoldError as error:
            found.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(timeout=10)
    assert found == ["p"] * 3


# Environments by name


@pytest.fixture
def environment() -> Any:
    """``environment(name, config)`` registers one and takes it out again."""
    import gymnasium

    made: list[EnvEntry] = []

    def make(name: str, config: dict[str, Any] | None = None) -> EnvEntry:
        entry = register_env(
            name, id=f"test_registry/{name}-v0", entry_point="nowhere:Nothing", config=config
        )
        made.append(entry)
        return entry

    yield make
    store = ConfigStore.instance()
    for entry in made:
        ENVS._things.pop(entry.name)
        gymnasium.registry.pop(entry.id)
        store.repo.get("env", {}).pop(f"{entry.name}.yaml", None)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a=b", "a.b", "../x"])
def test_a_name_that_hydra_could_not_select_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        register_env(name, id="test_registry/Bad-v0", entry_point="nowhere:Nothing")
    assert name not in ENVS


def test_an_environment_of_a_taken_name_is_refused_before_gymnasium_hears_of_it() -> None:
    import gymnasium

    with pytest.raises(ConfigError, match="two environments are called 'pixel_reasoner'"):
        register_env("pixel_reasoner", id="test_registry/Second-v0", entry_point="nowhere:Nothing")
    assert "test_registry/Second-v0" not in gymnasium.registry


def test_a_registered_environment_becomes_an_option_of_hydra(environment: Any) -> None:
    config = {"kwargs": {"size": 3}, "rollout": {"max_turns": 4}, "takes_data": True}
    environment("meadow", config)
    groups.prepare_groups(["env=meadow", "seed=1"])
    node = ConfigStore.instance().repo["env"]["meadow.yaml"]
    assert node.package == "_global_"
    assert node.node == {
        "env": {
            "name": "meadow",
            "id": "test_registry/meadow-v0",
            "takes_data": True,
            "kwargs": {"size": 3},
        },
        "rollout": {"max_turns": 4},
    }


def test_a_plugins_bad_configuration_stops_only_itself(
    environment: Any, caplog: pytest.LogCaptureFixture
) -> None:
    environment("meadow", {"rolout": {"max_turns": 4}})
    with caplog.at_level(logging.WARNING):
        groups.prepare_groups(["env=pixel_reasoner"])
    assert "environment 'meadow': unknown sections rolout" in caplog.text
    with pytest.raises(ConfigError, match="environment 'meadow': unknown sections rolout"):
        groups.prepare_groups(["env=meadow"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("env=pixel_resoner", "no environment is called 'pixel_resoner'. Did you mean 'pixel_reas"),
        ("model=demmo", "no model is called 'demmo'. Did you mean 'demo'"),
        ("data=verll", "no data set is called 'verll'. Did you mean 'verl'"),
        ("objective=reopld", "no objective is called 'reopld'. Did you mean 'reopold'"),
        ("engine=lokal", "no engine is called 'lokal'. Did you mean 'local'"),
    ],
)
def test_a_mistyped_group_is_explained(argument: str, message: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        groups.prepare_groups(["seed=1", argument])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("argument", ["env=pixel_reasoner", "seed=3", "env.kwargs.size=3", "env="])
def test_other_arguments_are_left_to_hydra(argument: str) -> None:
    groups.prepare_groups([argument])
