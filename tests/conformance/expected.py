"""Others' tests that fail on Mono-InternVL, each with its reason; `run.py` fails on a missing or a stale one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """`tests`: patterns of `Class::test` ids in the suite, of which each must fail; `versions` of transformers (as pip
    writes them) where that is so, all if empty."""

    suite: str
    tests: tuple[str, ...]
    reason: str
    versions: str = ""


FAILURES: tuple[Failure, ...] = ()
