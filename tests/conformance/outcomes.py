"""A pytest plugin that writes each test's outcome as a line of JSON, for `run.py` to compare with the expected ones."""

import json
import os


class Outcomes:
    def __init__(self, path: str):
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115

    def pytest_runtest_logreport(self, report):
        # A passed set-up or tear-down says nothing; one that fails or skips decides the test.
        if report.when != "call" and report.passed:
            return
        if report.skipped:
            # pytest gives (path, line, reason) for a skip and a traceback for an expected failure.
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        else:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr or "")
        line = {"test": report.nodeid, "outcome": report.outcome, "reason": reason[:2000]}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def pytest_collectreport(self, report):
        if report.failed:
            line = {"test": report.nodeid, "outcome": "failed", "reason": str(report.longrepr)[-2000:]}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()


def pytest_configure(config):
    if path := os.environ.get("CONFORMANCE_OUTCOMES"):
        config.pluginmanager.register(Outcomes(path), "conformance-outcomes")
