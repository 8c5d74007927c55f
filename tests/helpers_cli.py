"""Running a command of `mono-internvl` in this process."""

from typer.testing import CliRunner, Result

from mono_internvl_cli import app


def run(*arguments, **kwargs) -> Result:
    """What the command printed where, its exit status, and the exception that ended it."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **kwargs)


def failure(*arguments, **kwargs) -> str:
    """The error of a command that must fail with status 1 and exactly one line, and print no answer."""
    result = run(*arguments, **kwargs)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]
