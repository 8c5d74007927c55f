"""`mono-internvl convert SRC DST --to official|native`.

Also `convert --check FOLDER`, and `convert FOLDER --push-to-hub REPO`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import ImageTokenOption, note, quiet_libraries, stderr_console


if TYPE_CHECKING:
    from mono_internvl.conversion import Report


# `mono_internvl.conversion.convert.LAYOUTS`.
LAYOUTS = ("official", "native")

DestinationArgument = Annotated[Path, typer.Argument(metavar="DST", help="folder to make")]
ShardOption = Annotated[str, typer.Option(metavar="SIZE", help="most bytes of a weight file, such as 2GB or 500MB")]
BaseModelOption = Annotated[
    str | None, typer.Option(metavar="ID", help="base model for the model card, where SRC is a folder")
]
VerifyOption = Annotated[bool, typer.Option("--verify/--no-verify", help="run both on fixed prompts and compare")]
ManifestOption = Annotated[
    bool, typer.Option("--manifest", help="hash every weight file; --check then compares every byte")
]
PushOption = Annotated[str | None, typer.Option(metavar="REPO", help="then upload to this Hub repository")]
PrivateOption = Annotated[bool, typer.Option("--private", help="make the repository private")]
RevisionOption = Annotated[str | None, typer.Option(metavar="BRANCH", help="branch to upload to  [default: main]")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="with --push-to-hub: show what would go up, and stop")]


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="folder or Hub id of a Mono-InternVL, or nano")],
    destination: Annotated[Path | None, typer.Argument(metavar="[DST]", help="folder to make")] = None,
    to: Annotated[str | None, typer.Option(metavar="LAYOUT", help=" or ".join(LAYOUTS))] = None,
    check: Annotated[bool, typer.Option("--check", help="compare SRC's weight files with its conversion.json")] = False,
    image_token_id: ImageTokenOption = None,
    max_shard_size: ShardOption = "1GB",
    base_model: BaseModelOption = None,
    verify: VerifyOption = True,
    manifest: ManifestOption = False,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    revision: RevisionOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Convert a Mono-InternVL between the official layout and ours, without a change of any value.

    With --check SRC is compared with its conversion.json. With --push-to-hub and no DST, SRC is uploaded as it is.
    """
    check_publishing(push_to_hub, private, revision, dry_run)
    if check:
        if destination is not None or to is not None or push_to_hub is not None:
            raise typer.BadParameter("takes one folder and nothing else", param_hint="--check")
        _check(source)
    elif destination is None:
        if push_to_hub is None or to is not None:
            raise typer.BadParameter("is missing: say where to write", param_hint="DST")
        publish(_local_folder(source), push_to_hub, private, revision, dry_run)
    else:
        one_of(to, LAYOUTS, "--to")
        from mono_internvl.conversion import convert_checkpoint

        quiet_libraries()
        with byte_bar("converting") as progress:
            report = convert_checkpoint(
                source,
                destination,
                to or "",
                max_shard_size=max_shard_size,
                image_token_id=image_token_id,
                base_model=base_model,
                verify=verify,
                manifest=manifest,
                progress=progress,
            )
        show(report)
        publish(destination, push_to_hub, private, revision, dry_run)


def _local_folder(source: str) -> Path:
    """The folder that SRC names, which a Hub id does not."""
    from mono_internvl.common.models import find_folder

    folder = find_folder(source)
    if folder is None:
        raise FileNotFoundError(f"no such model folder: {source}; only a folder of this machine will do here")
    return folder


def _check(folder: str) -> None:
    from mono_internvl.conversion import check_checkpoint

    with byte_bar("comparing") as progress:
        found = check_checkpoint(_local_folder(folder), progress)
    how = "by every byte" if found.hashed else "by size and header (it was made without --manifest)"
    typer.echo(f"{folder}: {found.files} files are what conversion.json says, {how}")


# ------------------------------------------------------------------------------------------------- shared with `expand`


def one_of(value: str | None, allowed: Sequence[str], option: str) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"{value or 'nothing'} is not one of {', '.join(allowed)}", param_hint=option)


def check_publishing(push_to_hub: str | None, private: bool, revision: str | None, dry_run: bool) -> None:
    """Options that mean nothing without --push-to-hub are wrong usage; so is a name that is no repository."""
    if push_to_hub is None and (private or revision is not None or dry_run):
        raise typer.BadParameter("--private, --revision and --dry-run need it", param_hint="--push-to-hub")
    if push_to_hub is not None and push_to_hub.strip("/").count("/") != 1:
        raise typer.BadParameter(f"{push_to_hub} is not a repository (owner/name)", param_hint="--push-to-hub")


@contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes and rate on stderr, on terminals only; yields `update(done, total)`."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = stderr_console()
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(report: Report) -> None:
    """What was made on stdout, how long it took on stderr."""
    from mono_internvl.common.files import readable_bytes

    size = f"{report.tensors} tensors, {readable_bytes(report.nbytes)} in {report.shards} file"
    typer.echo(f"{report.folder}: {size}{'s' if report.shards > 1 else ''}")
    seconds = f"written in {report.writing_seconds:.1f} s"
    if report.differences is None:
        typer.echo("not verified")
    else:
        found = report.differences
        typer.echo(
            f"verified: last hidden states bit-identical (largest difference {found.hidden_states:g}), "
            f"largest difference of logits {found.logits:g}"
        )
        seconds += f", verified in {report.verifying_seconds:.1f} s"
    note(seconds)


def publish(folder: Path, repo: str | None, private: bool, revision: str | None, dry_run: bool) -> None:
    """Show what goes up; upload it unless it is a dry run."""
    if repo is None:
        return
    from mono_internvl.common.files import readable_bytes
    from mono_internvl.conversion.publish import files_to_publish, publish_checkpoint

    files = files_to_publish(folder)
    for name, size in files.items():
        typer.echo(f"{readable_bytes(size):>10}  {name}")
    kind = "private repository" if private else "repository"
    target = f"{kind} {repo}, branch {revision or 'main'}"
    total = f"{len(files)} files, {readable_bytes(sum(files.values()))}"
    if dry_run:
        typer.echo(f"{total} would go to the {target}")
        return
    note(f"{total} go to the {target}")
    # The Hub's client prints its progress.
    with redirect_stdout(sys.stderr):
        address = publish_checkpoint(folder, repo, private=private, revision=revision)
    typer.echo(address)
