"""Every shell and Python block of README.md and docs/ is run, or a comment above it says why not.

    <!-- not run: needs a GPU -->

A page's blocks run in order in one folder; a page other than the quickstart goes on from the
quickstart's artifacts. `jexport` runs in this process, any other line of a shell block in bash.
What is not run is parsed: each `jexport` command by click, each `make` target by the Makefile.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from jexport import checkpoints, cli, recipe

PROJECT = Path(__file__).parents[2]
PAGES = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")])
QUICKSTART = PROJECT / "docs" / "quickstart.md"
CHECKPOINT, ARTIFACTS = "toy-jina", "artifacts"
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WHY_NOT = re.compile(r"<!-- not run: (.{8,}) -->\n\Z")
RUN, READ, SHOWN = ("bash", "python"), ("toml",), ("text",)
ELSEWHERE = ("writing-a-target.md",)
"""Its block becomes a module of a copy of jexport: test_writing_a_target.py."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block. why_not: why it is not run, '' where it is."""

    page: Path
    line: int
    language: str
    code: str
    why_not: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8") if text is None else text
    found = []
    for match in FENCE.finditer(text):
        why_not = WHY_NOT.search(text[: match.start()])
        found.append(
            Block(
                page=page,
                line=text[: match.start()].count("\n") + 1,
                language=match[1],
                code=match[2],
                why_not=why_not[1] if why_not else "",
            )
        )
    return found


def commands(code: str) -> Iterator[str]:
    """The commands of a shell block, comments and continued lines aside."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line


EVERY = [block for page in PAGES for block in blocks(page)]
TO_RUN = [block for block in EVERY if block.language in RUN and not block.why_not]
PAGES_TO_RUN = sorted({block.page for block in TO_RUN} - {QUICKSTART})


class Session:
    """Runs the blocks of one page in a folder."""

    def __init__(self, folder: Path, command: Callable[..., Any], module: types.ModuleType) -> None:
        self.folder, self.command, self.module = folder, command, module

    def run(self, block: Block) -> None:
        """Run one block; an AssertionError or the block's own error where it fails."""
        if block.language == "python":
            exec(compile(block.code, str(block), "exec", dont_inherit=True), self.module.__dict__)
            return
        for line in commands(block.code):
            words = shlex.split(line, comments=True)
            if words[0] == "jexport":
                answer = self.command(*words[1:])
                assert answer.code == 0, f"{block}: {line}\n{answer.err}"
            else:
                subprocess.run(["bash", "-euc", line], cwd=self.folder, check=True, timeout=60)


def run_page(page: Path, folder: Path, command: Callable[..., Any]) -> None:
    """Run a page's blocks in `folder`."""
    name = f"page_{page.stem.replace('-', '_')}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(checkpoints, "LAYOUTS", checkpoints.LAYOUTS)
        patch.setitem(sys.modules, name, types.ModuleType(name))
        session = Session(folder, command, sys.modules[name])
        for block in blocks(page):
            if block.language in RUN and not block.why_not:
                session.run(block)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are many times as fast on one thread when the other core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory, cli: Callable[..., Any]) -> Path:
    """The folder of somebody who did what the quickstart says."""
    folder = tmp_path_factory.mktemp("quickstart")
    run_page(QUICKSTART, folder, cli)
    return folder


def test_the_quickstart_runs(quickstart: Path) -> None:
    assert (quickstart / "vectors.npy").is_file()


@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=lambda page: page.name)
def test_a_pages_blocks_run(
    page: Path, quickstart: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    if page.name in ELSEWHERE:
        pytest.skip("test_writing_a_target.py")
    shutil.copytree(quickstart / ARTIFACTS, tmp_path / ARTIFACTS, symlinks=True)
    if not any(f"jexport toy {CHECKPOINT}" in block.code for block in blocks(page)):
        shutil.copytree(quickstart / CHECKPOINT, tmp_path / CHECKPOINT)
    run_page(page, tmp_path, cli)


def unclear(found: list[Block]) -> list[str]:
    """Blocks of which nobody can say whether they are to be run."""
    known = (*RUN, *READ, *SHOWN)
    return [str(block) for block in found if block.language not in known]


def test_every_block_is_run_or_says_why_not() -> None:
    assert len(TO_RUN) >= 15
    assert not unclear(EVERY), "name the language of these blocks: bash, python, toml, text"


def test_recipes_are_recipes() -> None:
    found = [block for block in EVERY if block.language == "toml"]
    assert found
    for block in found:
        recipe.from_table(tomllib.loads(block.code), origin=str(block))


def parsed(words: list[str]) -> None:
    """Raise click's error for a command or an option that there is not."""
    command: click.Command = cli.root
    context = click.Context(command, info_name="jexport")
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, words)  # type: ignore[assignment]
        context = click.Context(command, info_name=name, parent=context)
    command.make_parser(context).parse_args(list(words))


def stale(block: Block) -> list[str]:
    """The lines of a shell block that name a command, an option or a target that there is not."""
    targets = re.findall(r"^([a-z0-9-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    found = []
    for line in commands(block.code):
        program, *words = shlex.split(line, comments=True)
        if program == "jexport":
            try:
                parsed(words)
            except click.UsageError as error:
                found.append(f"{block}: {line}: {error}")
        elif program == "make" and not {word for word in words if "=" not in word} <= {*targets}:
            found.append(f"{block}: {line}: no such target")
    return found


def test_what_is_not_run_names_what_there_is() -> None:
    shown = [block for block in EVERY if block.language == "bash" and block.why_not]
    assert len(shown) > 5
    assert not [line for block in shown for line in stale(block)]


# --- the guards above can fail ------------------------------------------------------------------


def page_of(text: str) -> list[Block]:
    return blocks(Path("page.md"), text)


def test_a_block_without_a_language_or_a_reason_is_seen() -> None:
    assert unclear(page_of("```\njexport list\n```\n")) == ["page.md:1"]
    [marked] = page_of("<!-- not run: needs a GPU -->\n```bash\nnvidia-smi\n```\n")
    assert marked.why_not == "needs a GPU"
    for above in ("<!-- not run: -->\n", "<!-- not run: needs a GPU -->\n\nBut:\n", "text\n"):
        [block] = page_of(f"{above}```bash\nfalse\n```\n")
        assert not block.why_not


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("bash\njexport verify nowhere", AssertionError),
        ("bash\nfalse", subprocess.CalledProcessError),
        ("python\nassert not 1", AssertionError),
        ("python\nimport jexport.nothing", ModuleNotFoundError),
    ],
)
def test_a_block_that_fails_fails(
    code: str, error: type[Exception], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    [block] = page_of(f"```{code}\n```\n")
    with pytest.raises(error):
        Session(tmp_path, cli, types.ModuleType("page")).run(block)


def test_a_stale_command_is_seen() -> None:
    [block] = page_of("```bash\njexport build --tusk none\njexport bulid\nmake nothing\n```\n")
    assert len(stale(block)) == 3
    [block] = page_of("```bash\njexport build --task none \\\n  --jobs 2  # both\nmake docs\n```\n")
    assert not stale(block)
