"""A rule stands in one place: what may be written out only there is looked for in every other source file."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parent.parent
OUTSIDE = ("tests", "examples", "build")
SOURCES = [
    path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py")])
    if path.relative_to(ROOT).parts[0] not in OUTSIDE and path.name != "setup.py"
]


def nodes(kind: type[ast.AST], *, but: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(place, node) of the nodes of a kind in the source files, except in `but`."""
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if name not in but:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, kind):
                    yield f"{name}:{getattr(node, 'lineno', 0)}", node


def test_the_walk_finds_the_sources():
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"tiling_mono_internvl.py", "modeling_mono_internvl.py", "training/run.py", "cli/chat.py"} <= names


def test_the_side_of_a_visual_token_stands_once():
    """28 px, its square and its values: `PATCH_SIZE` and `PATCH_DIM`. (The command line's help imports no library.)"""
    allowed = ("tiling_mono_internvl.py", "cli/expand.py", "cli/tiles.py")
    found = [
        place
        for place, node in nodes(ast.Constant, but=allowed)
        if type(node.value) is int and node.value in (28, 28**2, 3 * 28**2)
    ]
    assert not found, f"write PATCH_SIZE or PATCH_DIM of tiling_mono_internvl: {found}"


def test_the_thumbnail_rule_stands_once():
    """One more tile where there is more than one: `count_tiles`."""

    def asks_for_more_than_one(node: ast.AST) -> bool:
        return any(
            isinstance(part, ast.Compare)
            and ast.unparse(part).endswith(" > 1")
            and any(word in ast.unparse(part.left) for word in ("tiles", "rows", "count"))
            for part in ast.walk(node)
        )

    found = [
        place
        for place, node in nodes(ast.BinOp, but=("tiling_mono_internvl.py",))
        if isinstance(node.op, ast.Add) and asks_for_more_than_one(node.right)
    ]
    assert not found, f"call count_tiles of tiling_mono_internvl: {found}"


def test_the_names_of_tile_options_are_listed_once():
    names = {"min_tiles", "max_tiles", "use_thumbnail"}
    found = [
        place
        for place, node in nodes(ast.Tuple, but=("tiling_mono_internvl.py",))
        if names <= {getattr(item, "value", None) for item in node.elts}
    ]
    assert not found, f"write TILE_OPTIONS of tiling_mono_internvl: {found}"


def test_control_ids_are_read_and_not_computed():
    """Where `<img>`, the turns' ends and the like stand is a field of the configuration or a token of the tokenizer."""
    ids = ("image_token_id", "vocab_size", "image_token")
    found = [
        place
        for place, node in nodes(ast.BinOp, but=("configuration_mono_internvl.py",))
        if isinstance(node.op, (ast.Add, ast.Sub))
        and isinstance(node.right, ast.Constant)
        and ast.unparse(node.left).split(".")[-1] in ids
    ]
    assert not found, f"take it from the configuration or the tokenizer: {found}"
