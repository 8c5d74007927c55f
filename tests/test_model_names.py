"""One rule for the names of models, whichever command is given one."""

import re
from pathlib import Path

import pytest
import typer

from helpers_cli import failure, run
from mono_internvl.common.models import (
    BUNDLED_MODEL,
    BUNDLED_TITLE,
    ModelError,
    NoSuchModel,
    find_folder,
    resolve_model,
    title_of,
)
from mono_internvl.conversion.source import find_source
from mono_internvl_cli import app


PLATE = BUNDLED_MODEL / "examples" / "plate.png"
RECORD = (
    """{"image": "%s", "conversations": [{"from": "human", "value": "<image>\\nHow many circles are there?"},
 {"from": "gpt", "value": "2"}]}""".replace("\n", "")
    % PLATE
)
# What the name of a model is called in usage lines.
METAVARS = {"MODEL", "[MODEL]", "SRC", "ADAPTER"}
# Command -> its arguments around a model's name, and a pattern of what it says of the nano (where it starts so, an
# error).
COMMANDS = {
    "chat": (("--model", "{}", PLATE, "How many circles are there?", "--device", "cpu"), "^2\n$"),
    "demo": (("--model", "{}", "--device", "cpu"), "the page of nano"),
    "serve": (("{}", "--port", "0", "--device", "cpu"), f"{BUNDLED_TITLE} at http"),
    "tiles": ((PLATE, "-o", "tiles.png", "--model", "{}"), "tile"),
    "attention": ((PLATE, "Hi", "-o", "map.png", "--model", "{}", "--device", "cpu"), "map.png"),
    "inspect": (("{}",), "nano"),
    "evaluate": (("--count", "1", "--model", "{}", "--device", "cpu"), "shape"),
    "expand": (("{}", "out"), "^error: .* is a Mono-InternVL already"),
    "convert": (("{}", "out", "--to", "official", "--no-verify"), "^out: "),
    "convert --check": (("{}",), "^error: .* has no conversion.json"),
    "convert --dry-run": (("{}", "--push-to-hub", "me/nano"), "would go to the repository me/nano"),
    "merge": (("{}", "out"), "^error: nano is not a LoRA folder"),
    "export gguf": (("{}", "out"), "^out: model.gguf"),
    "export mlx": (("{}", "out"), "^out: "),
}


def commands(group: typer.main.TyperGroup, *before: str):
    """(name, click command) of all that a user can call."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *before, name)
        else:
            yield " ".join([*before, name]), command


def test_every_command_that_takes_a_model_is_asked_here():
    # `train` reads its keys itself: tests/test_training.py. `benchmark` makes its models.
    found = {
        name
        for name, command in commands(typer.main.get_command(app))
        if any(option.metavar in METAVARS for option in command.params)
    }
    assert found == {name.split(" --")[0] for name in COMMANDS}


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """The words of a command line, in a folder where nothing has a model's name."""
    monkeypatch.chdir(tmp_path)

    def of(command: str, model: str) -> list[str]:
        if command == "export gguf":
            pytest.importorskip("gguf", reason="export gguf needs it")
        if command in ("demo", "serve", "attention"):
            pytest.importorskip({"demo": "gradio", "serve": "fastapi", "attention": "matplotlib"}[command])
        return [*command.split(), *(str(word).replace("{}", model) for word in COMMANDS[command][0])]

    return of


@pytest.mark.parametrize("command", COMMANDS)
def test_nano_is_the_bundled_model(command, arguments, monkeypatch):
    words = arguments(command, "nano")
    if command == "serve":
        monkeypatch.setattr("mono_internvl.serving.server.run", lambda *given, **options: None)
    if command == "demo":
        monkeypatch.setattr("mono_internvl.serving.demo.build_page", lambda *given, title: Page(title))
        monkeypatch.setattr("mono_internvl.serving.demo.launch_page", lambda page, *given: page.title)
    result = run(*words)
    assert re.search(COMMANDS[command][1], result.output), result.output
    assert result.exit_code == (1 if "error" in COMMANDS[command][1] else 0), result.output


class Page:
    def __init__(self, title: str):
        self.title = f"the page of {title}"

    def block_thread(self) -> None:
        """It ends at once."""


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_model_is_said_in_one_way(command, arguments):
    words = arguments(command, "./gone")
    expected = "error: no such model folder: ./gone (a Hub id looks like owner/name, the bundled model is nano)"
    assert failure(*words) == expected
    Path("file").write_text("")
    assert failure(*arguments(command, "file")) == "error: no such model folder: file is a file, not a model folder"


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder("nano") == BUNDLED_MODEL and resolve_model("nano") == resolve_model(None) == str(BUNDLED_MODEL)
    assert find_source("nano")[0] == BUNDLED_MODEL
    assert [title_of(name) for name in (None, "nano", BUNDLED_MODEL)] == [BUNDLED_TITLE] * 3
    assert find_source("nano")[1].name == find_source(BUNDLED_MODEL)[1].name == BUNDLED_TITLE
    Path("nano").mkdir()
    assert find_folder("nano") == Path("nano") and title_of("nano") == "nano"
    for find in (resolve_model, find_source):
        with pytest.raises(ValueError, match=r"nano is not a model folder: it has no config\.json"):
            find("nano")


@pytest.mark.parametrize("name", ["owner/name", "owner/na-me_1.5"])
def test_hub_ids(name):
    assert find_folder(name) is None and resolve_model(name) == title_of(name) == name


@pytest.mark.parametrize("name", ["gone", "./gone", "/gone/too", "~/gone", "a/b/c", "a/", "a\\b/c", "", "a b/c"])
def test_what_could_be_neither(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for find in (find_folder, resolve_model, find_source, title_of):
        # Whoever reads a folder may expect the one, whoever loads a model the other.
        for kind in (NoSuchModel, ModelError, FileNotFoundError, ValueError):
            with pytest.raises(kind, match="no such model folder: .*the bundled model is nano"):
                find(name)


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(NoSuchModel, match=r"link is a link to something that does not exist"):
        find_folder(tmp_path / "link")
