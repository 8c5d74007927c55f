"""The house: who may import whom, and how long a file that people read may be."""

import ast
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT


# From the ground up: a room imports only what stands before it. Root files are named without `_mono_internvl`.
FLOORS = (
    *("tokenization", "compat", "tiling", "image_pixels", "image_files", "image_loading", "image_processing", "video"),
    *("configuration_checks", "configuration", "vocabulary", "prompt", "chat_template", "conversation", "encoding"),
    *("processing_options", "processor_loading", "counting", "processing", "weight_mapping", "loading"),
    *("expert_kernels", "experts", "attention", "rope", "vision", "queries", "norm", "output_head", "outputs"),
    *("training_mono_internvl", "generation", "streaming", "chat", "modeling"),
    *("common", "plates", "conversion", "export", "evaluation", "training", "serving", "benchmarks", "cli"),
)
ROOT_FILES = sorted(ROOT.glob("*_mono_internvl.py"))


def room(parts: tuple[str, ...]) -> str | None:
    """The room of a module, by its path inside the package."""
    if not parts:
        return None
    if not parts[0].endswith("_mono_internvl"):
        return parts[0] if (ROOT / parts[0] / "__init__.py").exists() else None
    return parts[0] if parts[0] == "training_mono_internvl" else parts[0].removesuffix("_mono_internvl")


def imports(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, path inside the package) of what a file imports of the project, inside of functions too.

    Imports for type checkers alone are none: a configuration names the model that is made of it.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    here = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            inside = tuple(node.module.split(".")) if node.module else ()
            for name in [()] if inside else [(alias.name,) for alias in node.names]:
                yield node.lineno, (*base, *inside, *name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mono_internvl":
            inside = tuple(node.module.split(".")[1:])
            for name in [()] if inside else [(alias.name,) for alias in node.names]:
                yield node.lineno, (*inside, *name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("mono_internvl", "mono_internvl_cli"):
                    name, *inside = alias.name.split(".")
                    yield node.lineno, (*(("cli",) if name == "mono_internvl_cli" else ()), *inside)


def sources() -> Iterator[tuple[str, Path]]:
    for path in ROOT_FILES:
        yield str(room((path.stem,))), path
    for folder in FLOORS:
        if (ROOT / folder).is_dir():
            for path in sorted((ROOT / folder).rglob("*.py")):
                yield folder, path


def test_every_room_has_a_floor():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert folders | {room((path.stem,)) for path in ROOT_FILES} == set(FLOORS)


def test_imports_go_down():
    """No circle, and nothing of the library hangs from its command line."""
    arrows = set()
    for name, path in sources():
        for line, target in imports(path):
            other = room(target)
            if other is not None and other != name:
                arrows.add((name, other))
                assert FLOORS.index(other) < FLOORS.index(name), f"{path.relative_to(ROOT)}:{line} imports {other}"
    assert {("modeling", "attention"), ("training", "modeling"), ("cli", "common")} <= arrows


def test_no_test_file_imports_another():
    """What two of them need is in `conftest.py` or in a `helpers_*.py`."""
    files = {path.stem: path for path in (ROOT / "tests").glob("test_*.py")}
    shared = {path.stem for path in (ROOT / "tests").glob("helpers_*.py")} | {"conftest"}
    used = set()
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            parts = {part for name in names for part in name.split(".")}
            assert not parts & set(files), f"tests/{path.name}:{node.lineno} imports {parts & set(files)}"
            used |= parts & shared
    assert used == shared


@pytest.mark.parametrize("path", ROOT_FILES, ids=lambda path: path.stem)
def test_root_files_can_be_read(path):
    text = path.read_text(encoding="utf-8")
    lines, most = len(text.splitlines()), 700 if path.stem == "modeling_mono_internvl" else 450
    assert lines <= most, f"{path.name} has {lines} lines of at most {most}: make another file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            doc = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            lines = (node.end_lineno or 0) - node.lineno + 1 - doc
            assert lines <= 60, f"{path.name}: {node.name} has {lines} lines of at most 60, its docstring not counted"


def test_no_test_draws_what_cannot_be_repeated():
    """`--seed` of conftest reaches the shared generators; one that seeds itself from the machine it does not."""
    machines = {"os.urandom", "random.SystemRandom", "uuid.uuid1", "uuid.uuid4"}
    without_seed = {"random.Random", "Random", "np.random.default_rng", "default_rng", "np.random.RandomState"}
    files = sorted((ROOT / "tests").rglob("*.py"))
    seeded = 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            seeded += name in without_seed and bool(node.args)
            drawn = name in machines or name.startswith("secrets.") or (name in without_seed and not node.args)
            assert not drawn, f"{path.relative_to(ROOT)}:{node.lineno}: {name} begins elsewhere in every run"
    assert seeded > 10


@pytest.mark.parametrize("time", ["first", "second"])
def test_every_test_begins_at_the_seed(pytestconfig, time):
    seed = pytestconfig.option.seed
    assert random.random() == random.Random(seed).random()
    assert np.random.random() == np.random.RandomState(seed).random_sample()
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(seed))
