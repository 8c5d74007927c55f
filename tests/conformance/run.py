"""Run transformers' own model tests on Mono-InternVL.

    python tests/conformance/run.py [pytest arguments]

The tests are not part of the transformers wheel, and they must fit the installed version exactly. So this fetches that
version's source archive from PyPI (10 MB, once), takes the few files it needs out of it into
`~/.cache/mono-internvl/conformance/<version>` (`MONO_INTERNVL_CACHE` moves it), and runs pytest on the suites beside
this file. That takes about two minutes of one CPU core; with a GPU the tests that ask for one run too.
Needs `pip install parameterized`.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


HERE = Path(__file__).resolve().parent
SUITES = ("model_suite.py", "compile_suite.py")
NEEDED = ("test_modeling_common.py", "test_configuration_common.py")
# The common tests import three files that the archive leaves out. What they test is no part of this run; generation
# has its tests in tests/.
STUBS = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs: dict = {}\n",
}


def cache_folder(version: str) -> Path:
    base = os.environ.get("MONO_INTERNVL_CACHE") or Path.home() / ".cache" / "mono-internvl"
    return Path(base) / "conformance" / version


def download(version: str, folder: Path) -> Path:
    """The source archive of `version`, fetched by pip if it is not there."""
    archive = folder / f"transformers-{version}.tar.gz"
    if archive.exists():
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            + ["--no-binary", ":all:", "--dest", fresh, f"transformers=={version}"],
            check=True,
        )
        os.replace(Path(fresh) / archive.name, archive)
    return archive


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def extract(archive: Path, folder: Path) -> Path:
    """A package `hf_tests` of the needed files and the stubs; returns the folder to import it from."""
    package = folder / "suite" / "hf_tests"
    root = archive.name.removesuffix(".tar.gz")
    files = dict(STUBS)
    if not all((package / name).exists() for name in NEEDED):
        with tarfile.open(archive) as tar:
            for name in NEEDED:
                member = tar.extractfile(f"{root}/tests/{name}")
                if member is None:
                    raise SystemExit(f"{archive} has no tests/{name}; delete it and try again")
                files[name] = member.read().decode()
    for name in ("", *(str(Path(stub).parent) for stub in STUBS)):
        files[str(Path(name) / "__init__.py")] = ""
    for name, text in files.items():
        write(package / name, text)
    return package.parent


def main() -> int:
    if importlib.util.find_spec("parameterized") is None:
        raise SystemExit("the tests need one more package: pip install parameterized")
    version = importlib.metadata.version("transformers")
    folder = cache_folder(version)
    suite = extract(download(version, folder), folder)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(suite), os.environ.get("PYTHONPATH", "")])}
    # Markers and their warnings belong to transformers' own configuration, so ours is left out.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(HERE), "-q", "-p", "no:cacheprovider"]
    command += ["-W", "ignore", *(str(HERE / name) for name in SUITES), *sys.argv[1:]]
    print(f"transformers {version}: tests from {suite}", flush=True)
    return subprocess.run(command, env=environment, cwd=HERE).returncode


if __name__ == "__main__":
    raise SystemExit(main())
