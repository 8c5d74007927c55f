"""Run other projects' own tests on Mono-InternVL.

    python tests/conformance/run.py [--suite model,peft] [--transformers-source FOLDER] [--trl-source FOLDER]
                                    [pytest arguments]

The tests belong to no wheel and must fit the installed versions. So this takes them from the source archives of the
installed transformers and PEFT on PyPI, fetched once into `~/.cache/mono-internvl/conformance` (`MONO_INTERNVL_CACHE`
moves it). transformers' archive leaves out generation, continuous batching and pipelines, and TRL's all tests: those
suites need a git checkout of the release, and without one they are left out and the table says so.

Each suite is a pytest run of its own. Its failures are compared with `expected.py`: one that does not stand there, and
one that stands there and does not fail, end the run with status 1. docs/conformance.md has the results.
Needs `pip install parameterized`.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sources
from expected import FAILURES, Failure
from packaging.specifiers import SpecifierSet


HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Suite:
    """`source`: the checkout without which there is nothing to run; `packages`: what must be installed; `slow`: with
    the tests that upstream calls slow, of which most are quick on a nano."""

    file: str
    what: str
    source: str | None = None
    packages: tuple[str, ...] = ()
    slow: bool = False


SUITES = {
    "model": Suite("model_suite.py", "ModelTesterMixin"),
    "compile": Suite("compile_suite.py", "our own, compiled"),
    "generation": Suite("generation_suite.py", "GenerationTesterMixin", source="transformers", slow=True),
    "training": Suite("training_suite.py", "TrainingTesterMixin"),
    "image_processor": Suite("image_processor_suite.py", "ImageProcessingTestMixin"),
    "processor": Suite("processor_suite.py", "ProcessorTesterMixin"),
    "tokenizer": Suite("tokenizer_suite.py", "TokenizerTesterMixin, TokenizersBackendTesterMixin"),
    "pipeline": Suite("pipeline_suite.py", "ImageTextToTextPipelineTests", source="transformers", slow=True),
    "continuous_batching": Suite(
        "continuous_batching_suite.py", "continuous batching", source="transformers", slow=True
    ),
    "peft": Suite("peft_suite.py", "PEFT's decoder models", packages=("peft", "datasets")),
    "trl": Suite("trl_suite.py", "TRL's trainers with pictures", source="trl", packages=("trl", "datasets")),
}


@dataclass
class Result:
    """What one suite gave; `tests`: `Class::test` -> (passed, failed or skipped, why)."""

    suite: str
    tests: dict[str, tuple[str, str]] = field(default_factory=dict)
    missing: str = ""
    status: int = 0
    seconds: float = 0.0
    whole: bool = True

    def count(self, outcome: str) -> int:
        return Counter(kind for kind, _ in self.tests.values())[outcome]


def read_outcomes(path: Path) -> dict[str, tuple[str, str]]:
    """The outcome of each test; a test with several (subtests, a failing tear-down) has the worst of them."""
    order = ("passed", "skipped", "failed")
    tests: dict[str, tuple[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        entry = json.loads(line)
        # The file is the suite's name already.
        name = entry["test"].partition("::")[2] or entry["test"]
        outcome, reason = entry["outcome"], entry["reason"]
        if name not in tests or order.index(outcome) > order.index(tests[name][0]):
            tests[name] = (outcome, reason)
    return tests


def matches(test: str, pattern: str) -> bool:
    """Whether a test's id is meant; `*` stands for anything, and brackets for themselves."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), test, re.S) is not None


def applicable(suite: str, version: str, failures: Sequence[Failure] = FAILURES) -> list[Failure]:
    return [
        failure
        for failure in failures
        if failure.suite == suite and SpecifierSet(failure.versions, prereleases=True).contains(version)
    ]


def judge(result: Result, version: str, failures: Sequence[Failure] = FAILURES) -> tuple[dict[str, str], list[str]]:
    """Each expected failure with its reason, and what is wrong: failures that nobody expected, and stale entries."""
    explained: dict[str, str] = {}
    wrong = []
    for failure in applicable(result.suite, version, failures):
        for pattern in failure.tests:
            met = [test for test in result.tests if matches(test, pattern)]
            failed = [
                test for test in met if result.tests[test][0] == "failed" and failure.says in result.tests[test][1]
            ]
            explained.update(dict.fromkeys(failed, failure.reason))
            wrong += [
                f"{result.suite}: {test} passes, but expected.py lists it as failing"
                for test in met
                if result.tests[test][0] == "passed"
            ]
            if not failed and result.whole and not result.missing:
                wrong.append(f"{result.suite}: expected.py lists {pattern}, but no such test fails")
    for test, (outcome, reason) in result.tests.items():
        if outcome == "failed" and test not in explained:
            first = next((line for line in reason.splitlines() if line.strip()), "")
            wrong.append(f"{result.suite}: {test} failed: {first[:200]}")
    if not result.missing and not result.tests:
        wrong.append(f"{result.suite}: no test ran (pytest's status {result.status})")
    elif result.status not in (0, 1):
        wrong.append(f"{result.suite}: pytest ended with status {result.status}")
    return explained, wrong


def table(results: Sequence[Result], version: str) -> str:
    """Markdown: each suite with what passed, failed with a reason, failed without one, and was skipped."""
    lines = ["| suite | | passed | failed, with reason | unexplained | skipped | s |", "|---|---|---|---|---|---|---|"]
    for result in results:
        start = f"| {result.suite} | {SUITES[result.suite].what} |"
        if result.missing:
            lines.append(f"{start} not run: {result.missing} | | | | |")
            continue
        explained, _ = judge(result, version)
        failed = result.count("failed")
        numbers = (result.count("passed"), len(explained), failed - len(explained), result.count("skipped"))
        lines.append(f"{start} {' | '.join(map(str, numbers))} | {result.seconds:.0f} |")
    return "\n".join(lines)


def run_suite(name: str, folder: Path, options: argparse.Namespace, rest: Sequence[str]) -> Result:
    suite = SUITES[name]
    result = Result(name, whole=not rest)
    if suite.source and getattr(options, f"{suite.source}_source") is None:
        result.missing = f"needs --{suite.source}-source, a checkout of the installed version"
        return result
    for package in suite.packages:
        if importlib.util.find_spec(package) is None:
            result.missing = f"needs pip install {package}"
            return result
    if name == "peft":
        sources.peft_tests(folder)
    if name == "trl":
        sources.trl_tests(folder, options.trl_source)
    outcomes, scratch = folder / f"{name}.jsonl", folder / "scratch"
    scratch.mkdir(exist_ok=True)
    path = [str(folder), str(folder / f"only_{name}"), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry for entry in path if entry),
        "CONFORMANCE_OUTCOMES": str(outcomes),
        # What upstream tests leave behind goes with the run's folder.
        "TMPDIR": str(scratch),
        # Nothing here may depend on what the Hub holds today.
        "HF_HUB_OFFLINE": "1",
        "RUN_SLOW": "1" if suite.slow else "0",
    }
    # Markers and their warnings belong to the other projects' configurations, so ours is left out.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(HERE), "-q", "-p", "no:cacheprovider"]
    command += ["-p", "outcomes", "--disable-warnings", "--tb=short", str(HERE / suite.file), *rest]
    print(f"== {name}: {suite.what}", flush=True)
    start = time.perf_counter()
    # Upstream tests name files relative to the root of their project.
    result.status = subprocess.run(command, env=environment, cwd=folder).returncode
    result.seconds = time.perf_counter() - start
    result.tests = read_outcomes(outcomes)
    return result


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default=",".join(SUITES), help="names with commas between them; default: all")
    parser.add_argument("--transformers-source", type=Path, metavar="FOLDER", help="a git checkout of transformers")
    parser.add_argument("--trl-source", type=Path, metavar="FOLDER", help="a git checkout of TRL")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="an empty folder to leave sources and outcomes in")
    options, rest = parser.parse_known_args(arguments)
    options.suite = options.suite.split(",")
    if unknown := [name for name in options.suite if name not in SUITES]:
        parser.error(f"unknown suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    return options, rest


def main(arguments: Sequence[str] | None = None) -> int:
    options, rest = parse(arguments)
    if importlib.util.find_spec("parameterized") is None:
        raise SystemExit("the tests need one more package: pip install parameterized")
    version = importlib.metadata.version("transformers")
    print(f"transformers {version}: common tests from {sources.archive('transformers')}")
    for project, file in (("transformers", "src/transformers/__init__.py"), ("trl", "VERSION")):
        if folder := getattr(options, f"{project}_source"):
            setattr(options, f"{project}_source", folder.resolve())
            installed, found = importlib.metadata.version(project), sources.checkout_version(folder, file)
            print(f"{project} {installed}: further tests from {folder}, which is {found}", flush=True)
    with contextlib.ExitStack() as stack:
        work = options.keep
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="conformance-")))
        work.mkdir(parents=True, exist_ok=True)
        sources.transformers_tests(work, options.transformers_source)
        results = [run_suite(name, work, options, rest) for name in options.suite]
    wrong = [line for result in results for line in judge(result, version)[1]]
    print(f"\ntransformers {version}\n\n{table(results, version)}\n")
    print("\n".join(wrong) if wrong else "0 unexplained")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
