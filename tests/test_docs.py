"""README and documentation: the site builds, links resolve, commands and code work."""

from __future__ import annotations

import html.parser
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from docs_pages import PAGES, ROOT, SHELL, Block, all_blocks, blocks, commands, with_files
from running import environment
from test_plugin import install

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = all_blocks()
RESULTS = (ROOT / "docs" / "results" / "README.md").read_text("utf-8")

SKIPPED = {
    "docs/cli.md": 2,  # the pattern of a command; an error on purpose
    "docs/coming_from.md": 3,  # the other projects' own code, to compare with
    "docs/judges.md": 1,  # asks Gemini
    "docs/objective.md": 1,  # the pattern of a command
    "docs/one_gpu.md": 1,  # downloads of checkpoints
}
"""Blocks that are marked to be left out. Whoever marks one says so here."""

needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason='needs the documentation\'s tools: pip install -e ".[docs]"',
)


def runs(block: Block) -> bool:
    # A block that shows a file of the repository is that file's tests' business.
    return block.skip is None and block.file is None


# The reader itself


def test_blocks_are_read_with_their_marks_and_indentation(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (
        "- item:\n  ```\n  pip install x \\\n      y\n  ```\n<!-- test: skip (why) -->\n"
        "```python\n1\n```\n\n```bash\nA=1 python -m a c='d'; reopold plan && ls # no python -m\n"
        "```\n"
        "<!-- test: skip (too far away) -->\ntext\n```\nreopold-plan\n```\n"
        "<!-- file: a/b.py -->\n```python\n2\n```\n"
    )
    page.write_text(text, "utf-8")
    found = list(blocks(page, tmp_path))
    assert [(b.language, b.line, b.skip) for b in found] == [
        ("", 2, None),
        ("python", 7, "why"),
        ("bash", 11, None),
        ("", 16, None),
        ("python", 20, None),
    ]
    assert [b.file for b in found] == [None, None, None, None, "a/b.py"]
    words = [[command.words for command in commands(block)] for block in found]
    assert words[0] == [("pip", "install", "x", "y")]
    assert words[2] == [("python", "-m", "a", "c=d"), ("reopold", "plan")]


def test_no_block_is_skipped_silently() -> None:
    assert Counter(block.page for block in BLOCKS if block.skip) == SKIPPED


# Commands and code


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example packages are installed."""
    examples = ("reopold_rotated", "reopold_shop", "reopold_objective")
    site = install(tmp_path_factory.mktemp("plugins"), *examples)
    return {**environment(), "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


def failures(found: list[tuple[str, tuple[str, ...]]], env: dict[str, str], cwd: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docs_commands.py")],
        input=json.dumps(found),
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [" | ".join(each) for each in json.loads(done.stdout)]


@pytest.mark.slow
def test_every_command_is_one(plugins: dict[str, str], tmp_path: Path) -> None:
    shell = [block for block in BLOCKS if block.language in SHELL and runs(block)]
    found = [(each.place, each.words) for block in shell for each in commands(block)]
    ours = [words for _, words in found if any("reopold" in word for word in words)]
    assert len(ours) > 80  # the pages have that many; fewer means that they are not read
    wrong = failures(found, plugins, tmp_path)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_commands_that_are_wrong_are_found(plugins: dict[str, str], tmp_path: Path) -> None:
    lines = [
        "python -m reopold_agent.train env=pixel_reasonr",
        "python -m reopold_agent.train optimizer.learning_rate=1",
        "python -m reopold_agent.train objective=grpo objective.mixture=0.1",
        "python -m reopold_agent.evaluate benchmark=vstr",
        "python -m reopold_agent.evaluate judge=gemeni",
        "python -m reopold_agent.study name=ablations",
        "python -m reopold_agent.plan recipe=paper_agentic gpu=h100_8gb",
        "python -m reopold_agent.plan recipe=paper_agentic --yaml",
        "python -m reopold_agent.serve model=DIR prt=1",
        "python -m reopold_agent.compare one --papers agentic",
        "python -m reopold_agent.nothing",
        "reopold trian",
        "reopold train seed=0,one --multirun optimizer.lrr=1",
        "reopold play env=maths",
        "reopold play env=math recrd=x",
        "reopold doctor recipe=paper_agentik",
        "reopold doctor --jsn",
        "reopold view --exprt x run",
        "reopold --versoin",
        "reopold-trian",
        "pip install -e .[tests]",
        "pip install -e examples/reopold_rotted",
        "python benchmarks/stp.py",
    ]
    found = [(f"line {n}", tuple(line.split())) for n, line in enumerate(lines)]
    wrong = failures(found, plugins, tmp_path)
    assert [each.split(" | ")[0] for each in wrong] == [place for place, _ in found], wrong


def python_pages() -> list[str]:
    return sorted({b.page for b in BLOCKS if b.language == "python" and runs(b)})


@pytest.mark.slow
@pytest.mark.parametrize("document", python_pages())
def test_python_of_a_page_runs(document: str, plugins: dict[str, str], tmp_path: Path) -> None:
    """All blocks of a page in order, in one namespace, in a separate process."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # as if it ran in a clone
    ours = [b for b in BLOCKS if b.page == document and b.language == "python" and runs(b)]
    # Empty lines in front, so that a traceback names the line of the page.
    parts = [
        f"exec(compile({chr(10) * block.line + block.text!r}, {document!r}, 'exec'), space)"
        for block in ours
    ]
    code = "\n".join(["space = {'__name__': 'page'}", *parts])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=plugins,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_pages_with_python_are_the_ones_we_think() -> None:
    expected = {"add_a_tool", "add_an_environment", "coming_from", "environments", "quickstart"}
    assert {f"docs/{name}.md" for name in expected} <= set(python_pages())


def test_settings_in_toml_and_json_can_be_read() -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    seen = 0
    for block in BLOCKS:
        if block.language == "toml" and runs(block):
            tomllib.loads(block.text)
            seen += 1
        elif block.language == "json" and runs(block):
            json.loads(block.text)
    assert seen >= 3


# What GitHub shows, where the site adds nothing


def sections(text: str) -> Iterator[tuple[str, str, bool]]:
    """Each heading of a page, what stands below it, and whether a deeper heading follows."""
    prose = re.sub(r"```.*?```", "(a block of code)", text, flags=re.DOTALL)
    parts = re.split(r"^(#+) (.+)$", prose, flags=re.MULTILINE)
    depths = [len(mark) for mark in parts[1::3]]
    for number, (heading, body) in enumerate(zip(parts[2::3], parts[3::3], strict=True)):
        yield heading, body, depths[number + 1 : number + 2] > [depths[number]]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_section_says_something_on_github(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.startswith(("# ", "<!--")), "a page begins with its title"
    for heading, body, parent in sections(text):
        assert not re.search(r"^(:::|--8<--)", body, re.MULTILINE), f"{heading}: for the site only"
        visible = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
        assert parent or len(visible.split()) >= 3, f"{heading}: empty on GitHub"


def test_blocks_that_show_files_are_those_files() -> None:
    shown = [block for block in BLOCKS if block.file is not None]
    assert len(shown) >= 5
    for block in shown:
        file = ROOT / str(block.file)
        assert block.text == file.read_text("utf-8"), "python tests/docs_pages.py copies it anew"


def test_files_are_copied_into_their_blocks_again(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("NEW = 1\n", "utf-8")
    page = "# A\n<!-- file: a.py -->\n```python\nOLD = 1\n```\n```python\nKEPT = 1\n```\n"
    assert with_files(page, tmp_path) == page.replace("OLD", "NEW")


def test_reference_entries_name_their_object_and_its_source() -> None:
    seen = 0
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for heading, body, _ in sections(page.read_text("utf-8")):
            for name in re.findall(r"<!-- (?:api|members): (\S+) -->", body):
                seen += 1
                module, _, last = name.rpartition(".")
                found = getattr(importlib.import_module(module), last, None)
                found = importlib.import_module(name) if found is None else found
                where = getattr(found, "__module__", name).replace(".", "/") + ".py"
                assert f"[Source](../../{where})" in body, f"{page.name}: {name} is in {where}"
                if "<!-- api:" in body:
                    assert heading == f"`{last}`"
                else:
                    named = set(re.findall(r"`(\w+)`", body))
                    own = {k for k, v in vars(found).items() if inspect.isclass(v)}
                    own -= {k for k in own if getattr(found, k).__module__ != name}
                    assert {k for k in own if k[0] != "_"} - named == set(), page.name
    assert seen > 60


# README


def test_readme_opens_with_the_two_commands_on_one_screen() -> None:
    first, second, *_ = [b.text.strip() for b in BLOCKS if b.page == "README.md"]
    assert first == "pip install -e . && python -m reopold_agent.train env=pixel_reasoner"
    assert second == 'pip install -e ".[test]" && pytest'
    assert len(README.splitlines()) <= 66


def test_readme_says_what_the_results_say() -> None:
    """Its table is that of seed 0 in docs/results."""
    ours = dict(re.findall(r"^\| `env=(\w+)`[^|]*\|([^\n]+)\|$", README, re.MULTILINE))
    theirs = {}
    pixel = next(line for line in RESULTS.splitlines() if line.startswith("| 0 |"))
    cells = [cell.strip() for cell in pixel.strip("|").split("|")]
    theirs["pixel_reasoner"] = (cells[1], cells[6], cells[4].split(" ")[0])
    for name in ("math", "geometry"):
        line = next(line for line in RESULTS.splitlines() if line.startswith(f"| {name} | 0 |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        theirs[name] = (cells[2], cells[5], cells[4])
    assert {k: tuple(c.strip() for c in v.split("|")) for k, v in ours.items()} == theirs


def slug(heading: str) -> str:
    """The anchor that GitHub, and the site, give to a heading."""
    plain = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain))


def links(path: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(path: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    return {slug(each) for each in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    "document",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_work_on_github(document: Path) -> None:
    for link in links(document):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        target, anchor = urldefrag(link)
        place = (document.parent / target).resolve() if target else document
        assert place.exists(), f"{link}: nothing is there"
        assert place.is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(place), f"{link}: no such heading"


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def build(project: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=project,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


class _Html(html.parser.HTMLParser):
    """Ids, links, and what a page would load by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given.get("href", ""))


@needs_mkdocs
@pytest.mark.slow
def test_the_site_builds_whole_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages: dict[Path, _Html] = {}
    for path in site.rglob("*.html"):
        if path.name == "404.html":  # its links start at the host
            continue
        pages[path] = _Html()
        pages[path].feed(path.read_text("utf-8"))
    assert len(pages) > 45
    for path, page in pages.items():
        for load in page.loads:
            assert not re.match(r"(https?:)?//", load), f"{path} loads {load}"
            assert (path.parent / unquote(load.partition("?")[0])).exists(), f"{path}: {load}"
        for link in page.links:
            if re.match(r"(https|mailto|javascript):", link):
                continue
            target, anchor = urldefrag(unquote(link))
            goal = (path.parent / target).resolve() if target else path
            goal = goal / "index.html" if goal.is_dir() else goal
            assert goal.exists(), f"{path.relative_to(site)} links to {link}"
            if anchor and goal in pages:
                assert anchor in pages[goal].ids, f"{path.relative_to(site)} links to {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\((https?:)?//", style.read_text("utf-8")), style


@needs_mkdocs
@pytest.mark.slow
def test_files_of_the_repository_have_pages(site: Path) -> None:
    def text(page: str) -> str:
        return (site / page / "index.html").read_text("utf-8")

    assert "sbatch" in text("files/deploy/slurm.sh")
    assert "def rotate_image" in re.sub(r"<[^>]+>", "", text("add_a_tool"))  # the file, shown
    assert 'href="../files/deploy/slurm.sh/"' in text("cluster")
    assert "tasks.py" in text("files/examples/reopold_rotated")  # a folder is a list


@needs_mkdocs
@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    names = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    known = {name.rsplit(".", 1)[-1] for name in names}
    constants = {"BASE_PROMPT", "ENVS", "JUDGES", "KINDS", "OBJECTIVES", "TOOLS"}
    helpers = {"close_workers", "crop_image", "select_frames"}
    for package in ("envs", "tools", "judges", "objectives", "data"):
        public = set(importlib.import_module(f"reopold_agent.{package}").__all__)
        assert public - known - constants - helpers == set(), package
    for module in ("types", "errors"):
        found = importlib.import_module(f"reopold_agent.{module}")
        own = {k for k, v in vars(found).items() if getattr(v, "__module__", "") == found.__name__}
        assert {name for name in own if not name.startswith("_")} - known == set(), module


@needs_mkdocs
@pytest.mark.slow
def test_every_setting_is_explained_with_its_defaults(site: Path) -> None:
    page = re.sub(r"<[^>]+>", " ", (site / "reference/settings/index.html").read_text("utf-8"))
    row = re.search(r"max_tokens_per_micro_batch\s+tokens of one[^`]*?int\s+(\d+)", page)
    assert row is not None
    assert row[1] == "8192"
    rates = re.search(r"lr\s+learning rate\.\s+float\s+(\S+)\s+(\S+)", page)
    assert rates is not None
    assert float(rates[1]) == 1e-6
    assert float(rates[2]) != float(rates[1])  # the embedded models' own


def small_project(folder: Path, page: str) -> Path:
    (folder / "docs" / "sub").mkdir(parents=True)
    (folder / "docs" / "index.md").write_text("# Home\n\n## There\n", "utf-8")
    (folder / "docs" / "sub" / "page.md").write_text(page, "utf-8")
    (folder / "code").mkdir()
    (folder / "code" / "some.py").write_text('TEXT = """\n```\n[no](link.md)\n"""\n', "utf-8")
    (folder / "NOTES.md").write_text(
        "# Notes\n[code](code/some.py), [home](docs/index.md)\n", "utf-8"
    )
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    configuration = (ROOT / "mkdocs.yml").read_text("utf-8")
    # The project's own settings, without its pages and what only they need.
    own = configuration[: configuration.index("\nnav:")]
    own = own.replace("extra_css:\n  - stylesheets/extra.css\n", "")
    (folder / "mkdocs.yml").write_text(own, "utf-8")
    return folder


@needs_mkdocs
@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[x](../../code/none.py)", "code/none.py"),
        ("[x](../nothing.md)", "nothing.md"),
        ("[x](../index.md#nowhere)", "nowhere"),
        ("::: reopold_agent.nothing", "reopold_agent.nothing"),
        ("## `nothing`\nText.\n<!-- api: reopold_agent.nothing -->", "reopold_agent.nothing"),
        ("<!-- members: reopold_agent.nothing -->", "reopold_agent.nothing"),
        ("<!-- settings: reopold_agent.config:Nothing -->", "Nothing"),
    ],
)
def test_a_page_that_points_nowhere_fails_the_build(text: str, said: str, tmp_path: Path) -> None:
    done = build(small_project(tmp_path, f"# Page\n{text}\n"), tmp_path / "site")
    assert done.returncode != 0
    assert said in done.stdout + done.stderr


@needs_mkdocs
@pytest.mark.slow
def test_links_out_of_the_pages_become_pages(tmp_path: Path) -> None:
    page = (
        "# Page\n[notes](../../NOTES.md#notes), [folder](../../code), `[code](../../none.py)`\n\n"
        "```\n[block](../../none.py)\n```\n[home](../index.md#there)\n"
    )
    done = build(small_project(tmp_path, page), tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "site/sub/page/index.html").read_text("utf-8")
    assert 'href="../../files/NOTES/#notes"' in text
    assert 'href="../../files/code/"' in text
    assert "[code](../../none.py)" in text
    notes = (tmp_path / "site/files/NOTES/index.html").read_text("utf-8")
    assert 'href="../code/some.py/"' in notes
    assert 'href="../.."' in notes
    code = (tmp_path / "site/files/code/some.py/index.html").read_text("utf-8")
    assert "[no](link.md)" in re.sub(r"<[^>]+>", "", code)


# Figures that pages repeat


def test_one_gpu_says_what_the_plan_says() -> None:
    from reopold_agent.plan.compose import plan_run

    page = (ROOT / "docs" / "one_gpu.md").read_text("utf-8")
    agentic = ["env=pixel_reasoner", "model=qwen2_5_vl_3b"]
    lora = "model.student.lora={r: 16, lora_alpha: 32, target_modules: all-linear}"
    for words, row in (
        (agentic, r"3B student, all weights, 7B teacher \| [^|]+ \| ([\d.]+) \| ([\d.]+) \| "),
        ([*agentic, "gpu=h200"], r"the same \| `h200` \| ([\d.]+) \| ([\d.]+) \| fits"),
        (
            [*agentic, "policy=server", "policy.teacher.urls=[http://gpu2:8100]"],
            r"on another machine \| [^|]+ \| ([\d.]+) \| ([\d.]+) \| fits",
        ),
        ([*agentic, lora], r"LoRA of rank 16[^|]+\| [^|]+ \| ([\d.]+) \| ([\d.]+) \| fits"),
        (
            ["env=math", "model=r1_distill_1_5b", "data.eval.path=x"],
            r"1\.5B, all weights[^|]+\| [^|]+ \| ([\d.]+) \| ([\d.]+) \| fits",
        ),
    ):
        plan = plan_run(words)
        most = max(sum(p.values()) for role in plan.memory for p in dict(role.phases).values())
        found = re.search(row, page)
        assert found is not None, row
        assert (found[1], found[2]) == (f"{most / 2**30:.1f}", f"{plan.gpu.memory / 2**30:.1f}")


def test_one_gpu_says_what_lora_under_verl_needs() -> None:
    from reopold_agent.plan.compose import plan_run

    page = " ".join((ROOT / "docs" / "one_gpu.md").read_text("utf-8").split())
    lora = "'model.student.lora={r: 32, lora_alpha: 64, target_modules: all-linear}'"
    words = f"{lora} model.student.dtype=bfloat16 optimizer.lr=1e-5"
    assert f"`{words}`" in page
    two = ["recipe=paper_agentic", "engine.gpus_per_node=2", "engine.teacher_gpus_per_node=0"]
    for run, where in (
        ([*two, "gpu=l40s"], "on 2 x 48 GB"),
        (["recipe=agentic_1x80gb", "engine.offload=false"], "For other GPUs"),
    ):
        plan = plan_run([*run, *shlex.split(words)])
        assert plan.fits
        most = max(sum(p.values()) for role in plan.memory for p in dict(role.phases).values())
        hours = plan.gpu_hours / plan.layout.gpus
        assert re.search(rf"{most / 2**30:.1f} GiB and {hours:.1f} hours\S* {where}", page)


def test_eight_gpus_from_zero_says_what_the_plan_says() -> None:
    from reopold_agent.plan.compose import plan_run

    page = (ROOT / "docs" / "verl.md").read_text("utf-8")
    plan = plan_run(["recipe=paper_agentic", "gpus=8"])
    most = [max(sum(p.values()) for p in dict(role.phases).values()) for role in plan.memory]
    student, teacher = (f"{each / 2**30:.1f} GiB" for each in most)
    hours = plan.gpu_hours
    for words in (f"{student}, {teacher} of", f"{hours / 8:.1f} hours, {hours:.1f} GPU-hours"):
        assert words in page, words
