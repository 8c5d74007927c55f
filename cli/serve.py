"""`mono-internvl serve [MODEL]`: an OpenAI-compatible server on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    DEFAULT_MAX_PIXELS,
    DeviceOption,
    DtypeOption,
    ImageTokenOption,
    MaxTilesOption,
    check_dtype,
    load_model,
    note,
    status,
)


def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="model folder or Hub id  [default: the bundled nano]")
    ] = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="0: any that is free")] = 8000,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="what clients call the model  [default: its Hub id or folder]")
    ] = None,
    max_tiles: MaxTilesOption = None,
    max_requests: Annotated[
        int, typer.Option(min=1, metavar="N", help="most requests that wait or are answered at once")
    ] = 64,
    max_body: Annotated[
        int, typer.Option(min=1, metavar="MIB", help="largest body, and most bytes of a request's pictures")
    ] = 32,
    max_pixels: Annotated[
        int, typer.Option(min=1, metavar="N", help="most pixels of a request's pictures together")
    ] = DEFAULT_MAX_PIXELS,
    allow_local_files: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="clients may name pictures below it by path or file:// URL"),
    ] = None,
    allow_private_network: Annotated[
        bool, typer.Option("--allow-private-network", help="pictures may come from this machine's own network")
    ] = False,
    access_log: Annotated[bool, typer.Option("--access-log", help="a line for each request, on stderr")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    image_token_id: ImageTokenOption = None,
) -> None:
    """Answer OpenAI's clients: chat completions with pictures, streamed or whole. Ctrl-C or SIGTERM ends it.

    One answer at a time on one machine; more than that is vLLM's (docs/serving.md).
    """
    check_dtype(dtype)
    if allow_local_files is not None and not allow_local_files.is_dir():
        raise NotADirectoryError(f"--allow-local-files {allow_local_files} is not a folder")
    with status("loading"):
        try:
            import fastapi  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise ImportError("the server needs fastapi and uvicorn: pip install 'mono-internvl[serve]'") from error
        from mono_internvl.common.models import resolve_model, title_of
        from mono_internvl.serving.picture_sources import PictureSources
        from mono_internvl.serving.request_guard import LOOPBACK
        from mono_internvl.serving.server import ServerOptions, build_app, listen, run
    folder = resolve_model(model)
    bound = listen(host, port)
    loaded, processor = load_model(folder, device=device, dtype=dtype, image_token_id=image_token_id)
    options = ServerOptions(
        name=name or title_of(model),
        sources=PictureSources(max_body * 2**20, allow_private_network, allow_local_files),
        max_tiles=max_tiles,
        max_pixels=max_pixels,
        max_requests=max_requests,
        names=LOOPBACK if host in LOOPBACK else None,
    )
    address = f"[{host}]" if ":" in host else host
    note(f"{options.name} at http://{address}:{bound.getsockname()[1]}/v1  (Ctrl-C ends)")
    run(build_app(loaded, processor, options), bound, access_log=access_log)
