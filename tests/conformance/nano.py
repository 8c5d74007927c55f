"""A copy of the bundled nano for the suites, so that whatever a test writes stays out of the repository."""

import functools
import shutil
import tempfile
from pathlib import Path

import mono_internvl


ROOT = Path(mono_internvl.__file__).resolve().parent
PICTURE = ROOT / "examples" / "plate.png"


@functools.cache
def nano_folder() -> str:
    """The nano as it is published, without its code: the classes of the package are used."""
    folder = Path(tempfile.mkdtemp(prefix="nano-"))
    for pattern in ("*.json", "*.jinja", "*.safetensors"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder)
    return str(folder)
