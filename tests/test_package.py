"""What travels: the wheel holds the code of every room, the command and the nano."""

import importlib.util
import os
import subprocess
import sys
import zipfile

import pytest

from conftest import ROOT


def test_the_wheel_holds_everything(tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools to build without a network")
    # A copy of the tracked files: building writes beside setup.py.
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in listed.stdout.decode().split("\0"):
        if name and not name.startswith("tests/") and (ROOT / name).exists():
            target = tmp_path / "src" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    done = subprocess.run(build, cwd=tmp_path / "src", capture_output=True, text=True)
    if "setuptools" in done.stderr and "No matching" in done.stderr:
        pytest.skip("this environment's setuptools is too old to build")
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = listed.stdout.decode().split("\0")
    rooms = {"", *(name.removesuffix("__init__.py") for name in tracked if name.endswith("/__init__.py"))}
    rooms = {room for room in rooms if not room.startswith("tests/")}
    for name in tracked:
        room, _, file = name.rpartition("/")
        travels = file.endswith(".py") and (room + "/" if room else "") in rooms and file != "setup.py"
        face = not room and file.endswith((".json", ".jinja", ".safetensors"))
        recipe = room.startswith("training/") and file.endswith(".yaml")
        template = room == "conversion/templates"
        if travels or face or recipe or template:
            assert (f"mono_internvl_{name}" if room == "cli" else f"mono_internvl/{name}") in names, name
    assert not any(name.startswith(("tests/", "mono_internvl/tests", "mono_internvl/cli")) for name in names)
    # What is installed answers, from a folder of its own.
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site")]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    chat = [sys.executable, "-m", "mono_internvl", "chat", str(ROOT / "examples" / "plate.png")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [*chat, "How many circles are there?"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("2\n", "")
    (script,) = (tmp_path / "site" / "bin").glob("mono-internvl*")
    assert "mono_internvl_cli" in script.read_text(encoding="utf-8")


def test_the_tests_run_in_a_clone_of_any_name(tmp_path):
    clone = tmp_path / "not-a-module"
    clone.symlink_to(ROOT, target_is_directory=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "has_a_floor"]
    command.append(str(clone / "tests" / "test_house.py"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-2000:]
