"""README's tree, make targets and command lines agree with the disk, the Makefile and the command line's own parser."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from deltaserve.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def tree_paths() -> list[str]:
    """Paths of the tree block: ``path   phrase`` per line, folders end with a slash."""
    (tree,) = re.findall(r"<!-- tree -->\n```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return [line.split()[0] for line in tree.splitlines() if line.strip()]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return listed.stdout.splitlines()
    return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]


def commands() -> list[tuple[str, str]]:
    """Every ``deltaserve ...`` line of every document, continuation lines joined."""
    found = []
    for document in DOCUMENTS:
        for block in fenced(document.read_text(), "(?:bash|sh|console)"):
            for line in block.replace("\\\n", " ").splitlines():
                stripped = line.strip().removeprefix("$ ")
                if stripped.startswith("deltaserve "):
                    found.append((document.name, stripped.split(" #")[0]))
    return found


def test_every_path_of_the_tree_exists() -> None:
    missing = [path for path in tree_paths() if not (ROOT / path).exists()]
    assert not missing, f"README's tree names what is not there: {missing}"


def test_the_tree_names_every_folder_of_code() -> None:
    listed = {path.rstrip("/") for path in tree_paths()}
    holders = {"server/deltaserve", "kernels", "adapters_store", "trainer"}
    on_disk = set()
    for file in tracked():
        parts = Path(file).parts
        if len(parts) > 1 and not parts[0].startswith("."):
            on_disk.add(parts[0])
        for holder in holders:
            depth = len(Path(holder).parts)
            if str(Path(*parts[:depth])) == holder and len(parts) > depth + 1:
                on_disk.add(str(Path(*parts[: depth + 1])))
    on_disk -= {"server", "kernels", "adapters_store", "trainer"}  # each is shown by what it holds
    assert on_disk <= listed, f"not in README's tree: {sorted(on_disk - listed)}"


def test_make_targets_exist() -> None:
    named = set()
    for document in DOCUMENTS:
        text = document.read_text()
        named |= set(re.findall(r"`make ([a-z]+)`", text))
        for block in fenced(text, "(?:bash|sh|console)"):
            named |= set(re.findall(r"^(?:\$ )?make ([a-z]+)", block, flags=re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"serve", "test"} <= named
    assert named <= targets, f"documents name make targets that do not exist: {named - targets}"


@pytest.mark.parametrize(("document", "line"), commands(), ids=lambda value: value[:60])
def test_command_lines_parse(document: str, line: str) -> None:
    """The command exists and takes each option shown; values are not executed."""
    words = shlex.split(line)[1:]
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands") or words == ["--help"], f"{document}: no such command: {line}"
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for word in words:
        if word.startswith("-") and len(word) > 1:
            assert word.split("=")[0] in known, f"{document}: {line}: no option {word}"


def test_documents_show_commands() -> None:
    """The checks above are worth nothing when the documents' blocks are no longer found."""
    assert len(commands()) >= 8


def test_links_point_to_files() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (document.parent / target).exists(), f"{document.name} links to {target}, which is not there"
