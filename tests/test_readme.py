"""The README's Python runs as it stands there."""

import re

from conftest import ROOT


def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    # The released checkpoint is not at hand, and needs a GPU as written there; a server has its own check
    # (`serving/check_vllm.py`).
    runnable = [block for block in blocks if "OpenGVLab/" not in block and "openai" not in block]
    assert len(runnable) == len(blocks) - 2 >= 3
    names: dict = {}
    for block in runnable:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("2\n")  # two circles
    assert len(names["history"]) == 1 and len(names["outputs"]) == 2
