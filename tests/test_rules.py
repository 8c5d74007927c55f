"""A rule stands in one place: what may be written out only there is looked for in every other source file."""

import ast
import re
from collections.abc import Callable, Iterator
from typing import Any

from conftest import ROOT


OUTSIDE = ("tests", "examples", "build")
SOURCES = [
    path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py")])
    if path.relative_to(ROOT).parts[0] not in OUTSIDE and path.name != "setup.py"
]


def nodes(kind: type[ast.AST]) -> Iterator[tuple[str, int, Any]]:
    """(file, line, node) of the nodes of a kind in the source files."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield path.relative_to(ROOT).as_posix(), getattr(node, "lineno", 0), node


def places_elsewhere(kind: type[ast.AST], matches: Callable[[Any], bool], *, home: tuple[str, ...]) -> list[str]:
    """Where nodes match outside of the files that may hold them. Each of those must: else nothing is looked for."""
    found = [(name, line) for name, line, node in nodes(kind) if matches(node)]
    assert set(home) <= {name for name, _ in found}, f"the rule no longer finds what stands in {home}"
    return [f"{name}:{line}" for name, line in found if name not in home]


def test_the_walk_finds_the_sources():
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {"tiling_mono_internvl.py", "modeling_mono_internvl.py", "training/run.py", "cli/chat.py"} <= names


def test_the_side_of_a_visual_token_stands_once():
    """28 px, its square and its values: `PATCH_SIZE` and `PATCH_DIM`. (The command line's help imports no library.)"""

    def is_a_size(node: ast.Constant) -> bool:
        return type(node.value) is int and node.value in (28, 28**2, 3 * 28**2)

    home = ("tiling_mono_internvl.py", "cli/expand.py", "cli/tiles.py")
    found = places_elsewhere(ast.Constant, is_a_size, home=home)
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

    def adds_a_thumbnail(node: ast.BinOp) -> bool:
        return isinstance(node.op, ast.Add) and asks_for_more_than_one(node.right)

    found = places_elsewhere(ast.BinOp, adds_a_thumbnail, home=("tiling_mono_internvl.py",))
    assert not found, f"call count_tiles of tiling_mono_internvl: {found}"


def test_the_names_of_tile_options_are_listed_once():
    def lists_them(node: ast.Tuple) -> bool:
        return {"min_tiles", "max_tiles", "use_thumbnail"} <= {getattr(item, "value", None) for item in node.elts}

    found = places_elsewhere(ast.Tuple, lists_them, home=("tiling_mono_internvl.py",))
    assert not found, f"write TILE_OPTIONS of tiling_mono_internvl: {found}"


def test_control_ids_are_read_and_not_computed():
    """Where `<img>`, the turns' ends and the like stand is a field of the configuration or a token of the tokenizer."""

    def computes_an_id(node: ast.BinOp) -> bool:
        """`x.image_token_id - 2`, `config["vocab_size"] - FROM_END` and the like."""
        known = {"image_token_id", "vocab_size", "image_token"} & set(re.findall(r"\w+", ast.unparse(node.left))[-1:])
        number = isinstance(node.right, ast.Constant) or ast.unparse(node.right).isupper()
        return isinstance(node.op, (ast.Add, ast.Sub)) and bool(known) and number

    found = places_elsewhere(ast.BinOp, computes_an_id, home=("configuration_mono_internvl.py",))
    assert not found, f"take it from the configuration or the tokenizer: {found}"


def test_no_object_is_given_another_class():
    """It may be held elsewhere: a new object of the other class gets a copy of its state."""

    def assigns_a_class(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store)

    found = [f"{name}:{line}" for name, line, node in nodes(ast.Attribute) if assigns_a_class(node)]
    assert not found, f"make a new object: {found}"
    assert assigns_a_class(ast.parse("a.__class__ = B").body[0].targets[0])  # type: ignore[attr-defined]
