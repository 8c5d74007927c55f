"""Where the upstream tests come from: archives of the installed versions on PyPI; checkouts where those hold none."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]

# What the common tests import from files that transformers' archive leaves out, and that no suite here is about. A file
# of this name in a checkout goes first.
STUBS = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs: dict = {}\n",
}
# Exported graphs are no part of this run, whatever the sources hold.
EXPORTERS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n\n\nclass ExportGenerateTesterMixin:\n    pass\n"
}
# Upstream's pictures and sounds lie on the Hub. A picture is a picture to these tests; anything else stays a URL, which
# fails where it is opened.
FETCH = """
def url_to_local_path(url):
    return {picture!r} if url.endswith((".png", ".jpg", ".jpeg")) else url
"""
# Folders of a transformers checkout that the suites import from.
CHECKOUT_FOLDERS = ("generation", "pipelines")


def cache_folder() -> Path:
    base = os.environ.get("MONO_INTERNVL_CACHE") or Path.home() / ".cache" / "mono-internvl"
    return Path(base) / "conformance"


def archive(project: str) -> Path:
    """The source archive of the installed version of `project`, fetched by pip if it is not there."""
    version = importlib.metadata.version(project)
    folder = cache_folder() / version if project == "transformers" else cache_folder() / f"{project}-{version}"
    path = folder / f"{project}-{version}.tar.gz"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            + ["--no-binary", ":all:", "--dest", fresh, f"{project}=={version}"],
            check=True,
        )
        os.replace(Path(fresh) / path.name, path)
    return path


def unpack_tests(path: Path, into: Path) -> None:
    """The files of `tests/` in a source archive, without its folders; into a package of their own.

    Raises:
        SystemExit: the archive holds no tests.
    """
    root = path.name.removesuffix(".tar.gz")
    into.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path) as tar:
        for member in tar:
            place = Path(member.name)
            if member.isfile() and place.parent == Path(root, "tests") and place.suffix == ".py":
                (into / place.name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    if not any(into.iterdir()):
        raise SystemExit(f"{path} holds no tests; delete it and try again")
    (into / "__init__.py").touch()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def transformers_tests(work: Path, checkout: Path | None) -> None:
    """`work/hf_tests`: the installed version's common tests; of a checkout the folders that it leaves out."""
    package = work / "hf_tests"
    unpack_tests(archive("transformers"), package)
    for name in CHECKOUT_FOLDERS if checkout else ():
        shutil.copytree(checkout / "tests" / name, package / name)  # type: ignore[operator]
    for name, text in STUBS.items():
        if not (package / name).exists():
            write(package / name, text)
    for name, text in EXPORTERS.items():
        write(package / name, text)
    for folder in ("generation", "pipelines", "utils", "exporters"):
        write(package / folder / "__init__.py", "")
    # The common tests look for it beside their own folder.
    write(work / "utils" / "fetch_hub_objects_for_ci.py", FETCH.format(picture=str(ROOT / "examples" / "plate.png")))
    # The text that the tokenizer tests cut and pad.
    (package / "fixtures").mkdir()
    shutil.copy(ROOT / "README.md", package / "fixtures" / "sample_text.txt")
    # Some name their own package as it is called in a checkout.
    write(work / "tests" / "__init__.py", "")
    shutil.copytree(package / "exporters", work / "tests" / "exporters")
    # A tests folder by its usual name, for paths relative to the folder that pytest runs in.
    samples = work / "tests" / "fixtures" / "tests_samples" / "COCO"
    samples.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "plate.png", samples / "000000039769.png")


def peft_tests(work: Path) -> None:
    """`work/peft_tests`: the installed version's tests, which import diffusers for tests that are not run here."""
    unpack_tests(archive("peft"), work / "peft_tests")
    if importlib.util.find_spec("diffusers") is None:
        write(work / "only_peft" / "diffusers.py", "class StableDiffusionPipeline:\n    pass\n")


def trl_tests(work: Path, checkout: Path) -> None:
    package = work / "trl_tests"
    shutil.copytree(checkout / "tests", package)


def checkout_version(checkout: Path, file: str) -> str:
    """The version that a checkout says it is.

    Raises:
        SystemExit: it is no checkout of that project.
    """
    try:
        text = (checkout / file).read_text(encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"{checkout} is no checkout: {error}") from None
    found = re.search(r'^__version__ = "(.+)"$', text, re.M)
    return found[1] if found else text.strip()
