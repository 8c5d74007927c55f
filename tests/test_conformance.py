"""How `tests/conformance/run.py` compares a suite's outcomes with the list of expected failures."""

import json
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).resolve().parent / "conformance"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import expected
    import run

    yield run, expected
    for name in ("run", "sources", "expected"):
        sys.modules.pop(name, None)


def result(run, **outcomes):
    return run.Result("peft", tests={f"T::{name}": (outcome, "why") for name, outcome in outcomes.items()})


def test_every_expected_failure_names_a_suite_and_a_reason(modules):
    run, expected = modules
    for failure in expected.FAILURES:
        assert failure.suite in run.SUITES and failure.reason and failure.tests
    assert all((FOLDER / suite.file).exists() for suite in run.SUITES.values())


def test_a_failure_is_explained_unexpected_or_stale(modules):
    run, expected = modules
    failures = (expected.Failure("peft", ("T::a*[x]", "T::b"), "because"),)
    outcomes = {"a1[x]": "failed", "a2[x]": "skipped", "b": "failed", "c": "passed"}
    assert run.judge(result(run, **outcomes), "5.24.0", failures) == ({"T::a1[x]": "because", "T::b": "because"}, [])
    wrong = run.judge(result(run, **{**outcomes, "c": "failed"}), "5.24.0", failures)[1]
    assert wrong == ["peft: T::c failed: why"]
    wrong = run.judge(result(run, **{**outcomes, "a2[x]": "passed"}), "5.24.0", failures)[1]
    assert wrong == ["peft: T::a2[x] passes, but expected.py lists it as failing"]
    gone = {"a1[x]": "failed", "c": "passed"}
    assert run.judge(result(run, **gone), "5.24.0", failures)[1] == [
        "peft: expected.py lists T::b, but no such test fails"
    ]
    # Of a part of a suite nothing can be said about the rest.
    part = result(run, **gone)
    part.whole = False
    assert run.judge(part, "5.24.0", failures)[1] == []
    assert run.judge(result(run), "5.24.0", failures)[1] != []


def test_an_entry_holds_for_its_versions(modules):
    run, expected = modules
    failures = (expected.Failure("peft", ("T::a",), "because", ">=5.18"),)
    assert run.judge(result(run, a="failed"), "5.24.0", failures)[1] == []
    assert run.judge(result(run, a="failed"), "5.17.0", failures)[1] == ["peft: T::a failed: why"]
    assert run.judge(result(run, a="passed"), "5.17.0", failures)[1] == []


def test_another_error_is_not_the_expected_one(modules):
    run, expected = modules
    failures = (expected.Failure("peft", ("T::a",), "because", says="wh"),)
    assert run.judge(result(run, a="failed"), "5.24.0", failures) == ({"T::a": "because"}, [])
    failures = (expected.Failure("peft", ("T::a",), "because", says="else"),)
    assert run.judge(result(run, a="failed"), "5.24.0", failures)[1][-1] == "peft: T::a failed: why"


def test_a_test_has_the_worst_of_its_outcomes(modules, tmp_path):
    run, _ = modules
    file = tmp_path / "outcomes.jsonl"
    lines = [("passed", ""), ("failed", "subtest"), ("passed", "")]
    entries = [{"test": "suite.py::T::a", "outcome": outcome, "reason": reason} for outcome, reason in lines]
    file.write_text("\n".join(map(json.dumps, entries)))
    assert run.read_outcomes(file) == {"T::a": ("failed", "subtest")}


def test_a_suite_without_its_sources_says_so(modules, tmp_path):
    run, _ = modules
    options, rest = run.parse(["--suite", "generation,trl"])
    results = [run.run_suite(name, tmp_path, options, rest) for name in options.suite]
    assert [entry.missing.partition(",")[0] for entry in results] == [
        "needs --transformers-source",
        "needs --trl-source",
    ]
    assert "not run: needs --trl-source" in run.table(results, "5.24.0")
    with pytest.raises(SystemExit):
        run.parse(["--suite", "tokeniser"])
