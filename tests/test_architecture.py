"""The import table and the file-length ceiling, read from the source by ``ast``: nothing is imported to check it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "deltaserve": ROOT / "server" / "deltaserve",
    "deltaserve_kernels": ROOT / "kernels" / "deltaserve_kernels",
    "deltaserve_store": ROOT / "adapters_store" / "deltaserve_store",
    "deltaserve_trainer": ROOT / "trainer" / "deltaserve_trainer",
}
EVERYWHERE = {"deltaserve", "deltaserve.core", "deltaserve.errors", "deltaserve.config", "deltaserve.metrics"}
ENGINE_FACE = {"deltaserve.engine.async_engine"}
ANY = {"*"}

# Who may import what of ours (prefixes); a part may always import itself.
ALLOWED: dict[str, set[str]] = {
    "deltaserve.core": set(),
    "deltaserve.errors": set(),
    "deltaserve.config": {"deltaserve.errors"},
    "deltaserve.metrics": {"deltaserve.core"},
    "deltaserve.logs": EVERYWHERE,
    "deltaserve.openmp": set(),
    "deltaserve.text": EVERYWHERE | {"deltaserve_store.added_tokens"},
    "deltaserve.remote": EVERYWHERE,
    "deltaserve.api": EVERYWHERE
    | ENGINE_FACE
    | {"deltaserve.admission", "deltaserve.text", "deltaserve.logs", "deltaserve_store"},
    "deltaserve.admission": EVERYWHERE | ENGINE_FACE | {"deltaserve.model", "deltaserve.deltas", "deltaserve_store"},
    "deltaserve.engine": EVERYWHERE
    | {"deltaserve.model", "deltaserve.adapters", "deltaserve_kernels", "deltaserve_store"},
    "deltaserve.adapters": EVERYWHERE | {"deltaserve.deltas", "deltaserve_kernels", "deltaserve_store"},
    "deltaserve.deltas": EVERYWHERE | {"deltaserve_kernels", "deltaserve_store"},
    "deltaserve.model": EVERYWHERE | {"deltaserve_kernels", "deltaserve_store"},
    "deltaserve.tinybase": {"deltaserve"},
    "deltaserve.runtime": ANY,
    "deltaserve.cli": ANY,
    "deltaserve_kernels": set(),
    "deltaserve_store": set(),
    "deltaserve_trainer": {
        "deltaserve",
        "deltaserve.config",
        "deltaserve.errors",
        "deltaserve.text",
        "deltaserve.tinybase",
        "deltaserve_store",
    },
    "deltaserve_trainer.merging": {"deltaserve_trainer.errors", "deltaserve_store"},
    "deltaserve_trainer.extraction": {
        "deltaserve_trainer.base",
        "deltaserve_trainer.errors",
        "deltaserve_trainer.merging",
        "deltaserve_store",
    },
}
# Third-party packages that only some parts may import.
CONFINED = {
    "fastapi": {"deltaserve.api"},
    "starlette": {"deltaserve.api"},
    "uvicorn": {"deltaserve.api", "deltaserve.runtime", "deltaserve.cli"},
    "pydantic": {"deltaserve.api", "deltaserve_trainer"},
    "peft": {"deltaserve_trainer"},
    "trl": {"deltaserve_trainer"},
    "accelerate": {"deltaserve_trainer"},
    "matplotlib": {"deltaserve_trainer", "deltaserve.tinybase"},
    "typer": {"deltaserve.cli"},
    "rich": {"deltaserve.cli", "deltaserve_trainer"},
    "prometheus_client": {"deltaserve.metrics"},
    "pickle": set(),
    "shelve": set(),
    "marshal": set(),
    "dill": set(),
}
MAX_LINES = 350


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    tree = ast.parse(path.read_text(), str(path))
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - (node.level - 1)] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                known = f"{base}.{alias.name}"
                yield (known if known in ALL else base), node.lineno


ALL = {name for name, _ in modules()}


def part_of(name: str) -> str:
    """The longest key of ``ALLOWED`` that covers this module."""
    keys = [key for key in ALLOWED if name == key or name.startswith(key + ".")]
    return max(keys, key=len, default="")


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_down_only(name: str, path: Path) -> None:
    part = part_of(name)
    if name == "deltaserve":
        assert not list(imports(name, path))
        return
    assert part, f"{name} is in no row of the import table: add it there and to the docs"
    allowed = ALLOWED[part]
    for imported, line in imports(name, path):
        top = imported.split(".")[0]
        if top in SOURCES:
            inside = imported == part or imported.startswith(part + ".")
            down = any(imported == key or (key != "deltaserve" and imported.startswith(key + ".")) for key in allowed)
            assert inside or down or allowed is ANY, f"{path}:{line}: {name} may not import {imported}"
        elif top in CONFINED:
            owners = CONFINED[top]
            assert any(name == owner or name.startswith(owner + ".") for owner in owners), (
                f"{path.relative_to(ROOT)}:{line}: {top} is confined to {sorted(owners) or 'nobody'}"
            )


@pytest.mark.parametrize("path", [path for _, path in modules()], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines (at most {MAX_LINES})"


def test_no_generic_top_level_package() -> None:
    """Our folders must never be importable as ``kernels``, ``server`` or ``adapters_store``."""
    for folder in ("server", "kernels", "adapters_store", "trainer", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
