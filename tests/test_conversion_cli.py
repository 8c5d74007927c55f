"""`mono-internvl expand` and `convert`: what they print where, and their exit statuses."""

import json
import sys
import types

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from helpers_cli import failure, run
from helpers_dense import dense_state, write_dense
from mono_internvl.conversion.source import HTTP_LIBRARIES


OPTIONS = ("--tile-size", 56, "--vision-hidden-size", 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("conversion")
    write_dense(base / "dense")
    result = run("expand", base / "dense", base / "native", *OPTIONS)
    assert result.exit_code == 0, result.output
    return base, result


def test_expand_says_what_it_made_and_what_it_found(folders):
    base, result = folders
    first, second = result.stdout.splitlines()
    assert first.startswith(f"{base / 'native'}: 37 tensors, ") and first.endswith(" in 1 file")
    assert second == (
        "verified: last hidden states bit-identical (largest difference 0), largest difference of logits 0"
    )
    assert "written in" in result.stderr


def test_convert_and_check(folders, tmp_path):
    base, _ = folders
    result = run("convert", base / "native", tmp_path / "official", "--to", "official", "--no-verify")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1] == "not verified"
    assert json.loads((tmp_path / "official" / "config.json").read_text())["model_type"] == "internvl_chat"
    checked = run("convert", "--check", tmp_path / "official")
    assert checked.exit_code == 0 and "by size and header (it was made without --manifest)" in checked.stdout
    made = run("convert", base / "native", tmp_path / "hashed", "--to", "official", "--no-verify", "--manifest")
    assert made.exit_code == 0, made.output
    assert "by every byte" in run("convert", "--check", tmp_path / "hashed").stdout
    with (tmp_path / "official" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert "model.safetensors has" in failure("convert", "--check", tmp_path / "official")


def test_dry_run_shows_what_would_go_up(folders):
    base, _ = folders
    result = run("convert", base / "native", "--push-to-hub", "someone/model", "--private", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.endswith("  model.safetensors") for line in lines)
    assert "would go to the private repository someone/model, branch main" in lines[-1]


def test_upload(folders, monkeypatch):
    from mono_internvl.conversion import publish

    base, _ = folders
    calls = []

    def answer(name: str) -> str:
        print("progress of the Hub's client")
        calls.append(name)
        return "https://hub/x"

    for name in ("create_repo", "upload_large_folder"):
        monkeypatch.setattr(publish.HfApi, name, lambda self, *a, name=name, **k: answer(name))
    result = run("convert", base / "native", "--push-to-hub", "someone/model")
    assert result.exit_code == 0 and calls == ["create_repo", "upload_large_folder"]
    assert result.stdout.splitlines()[-1] == "https://hub/x"
    assert "progress" not in result.stdout and "progress" in result.stderr


def test_mistakes_are_one_line(folders, tmp_path):
    base, _ = folders
    assert "is not empty" in failure("expand", base / "dense", base / "native", *OPTIONS)
    assert "no such model folder" in failure("expand", tmp_path / "nowhere", tmp_path / "out")
    assert "native layout already" in failure("convert", base / "native", tmp_path / "out", "--to", "native")
    assert "overflow to NaN" in failure("expand", base / "dense", tmp_path / "out", "--dtype", "float16")
    bad = write_dense(tmp_path / "bad", state={**dense_state(), "x": dense_state()["output.weight"]})
    assert "1 unexpected: x in" in failure("expand", bad, tmp_path / "out", *OPTIONS)


@pytest.mark.parametrize("library", [*HTTP_LIBRARIES, None])
def test_a_hub_that_is_not_reached_is_one_line(tmp_path, monkeypatch, library):
    class HTTPError(Exception):
        """As in those libraries, no OSError."""

    if library is None:
        # The client that is installed; its own errors are made of its library's.
        (theirs,) = {
            kind.__module__.split(".")[0]: kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"
        }.values()
        assert theirs.__module__.split(".")[0] in HTTP_LIBRARIES
        error = theirs("refused")
    else:
        module = types.ModuleType(library)
        module.HTTPError = HTTPError
        monkeypatch.setitem(sys.modules, library, module)
        error = HTTPError("refused")

    def fails(*given, **options):
        raise error

    monkeypatch.setattr(HfApi, "list_repo_files", fails)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for command in (("expand",), ("export", "mlx"), ("convert",)):
        options = ("--to", "native") if command == ("convert",) else ()
        message = failure(*command, "nobody/nothing-2b", tmp_path / "out", *options)
        assert message == "error: nobody/nothing-2b is not in the Hub's cache, and the Hub was not reached: refused"
    # Where nobody waits for it, it is one line, too.
    monkeypatch.setattr("mono_internvl.conversion.expand_checkpoint", fails)
    assert failure("expand", tmp_path, tmp_path / "out") == "error: refused"


@pytest.mark.parametrize(
    "arguments",
    [
        ("expand", "a", "b", "--visual-attention-experts", "kv"),
        ("expand", "a", "b", "--dtype", "int8"),
        ("expand", "a", "b", "--dry-run"),
        ("expand", "a", "b", "--push-to-hub", "nowhere"),
        ("convert", "a", "b"),
        ("convert", "a", "b", "--to", "ours"),
        ("convert", "a"),
        ("convert", "a", "b", "--check"),
    ],
)
def test_wrong_usage(arguments):
    assert run(*arguments).exit_code == 2
