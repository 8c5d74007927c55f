"""Where the pictures of a request may come from: the request itself, the public network, and what the options open.

A server fetches for strangers. What it may reach is therefore asked of the address that it connects to and not of the
URL, so that names of private addresses, decimal, octal and IPv6 spellings, redirects and names that change between two
look-ups all come to the same.
"""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ..image_loading_mono_internvl import FETCH_HEADERS, file_url_path, prefixed, printable, read_data_uri


# Of one connection or one silence; how long all pictures of a request may take is the caller's to say.
_STEP_SECONDS = 10.0
_REDIRECTS = 5
# Of characters that a data: URL may write as %XX: each is an object while it is read. base64 needs none.
_MOST_ESCAPES = 1_000_000
# IPv6 networks that carry an IPv4 address in their last 32 bits: as written of old, and behind NAT64 (RFC 4291, 6052).
_CARRIERS = (ipaddress.ip_network("::/96"), ipaddress.ip_network("64:ff9b::/96"))


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public network; an IPv4 address inside of an IPv6 one decides."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _CARRIERS[0] or ip in _CARRIERS[1]:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


class PublicTransport(httpx.AsyncHTTPTransport):
    """Looks a host up once, refuses it if one of its addresses is not public, and connects to what was looked up."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """As httpx asks for it.

        Raises:
            ValueError: the host has an address that is not public.
        """
        url, host = request.url, request.url.raw_host.decode("ascii")
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpx.ConnectError(f"no such host ({error.strerror or error})", request=request) from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not all(map(is_public, addresses)):
            # Which address it is would tell a stranger about the network.
            raise ValueError(
                f"{printable(str(url))} is not on the public network, and pictures from elsewhere are off "
                "(--allow-private-network)"
            )
        failure: Exception = httpx.ConnectError("no address", request=request)
        for address in addresses:
            # The certificate is checked against the name; the Host header has it already.
            pinned = httpx.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,
                extensions={**request.extensions, "sni_hostname": host},
            )
            try:
                return await super().handle_async_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure


@dataclass(frozen=True)
class PictureSources:
    """What a server reads pictures from.

    Attributes:
        max_bytes: a picture of more bytes is refused.
        private_network: URLs may lead to any address. The machine's proxy settings count then.
        folder: files of the server's machine may be read below this one; None: none at all.
    """

    max_bytes: int
    private_network: bool = False
    folder: Path | None = None

    async def read(self, source: Any, where: str, what: str = "picture") -> bytes:
        """The bytes of a picture or of another `what`, not decoded. `where` names its place in the request.

        Raises:
            ValueError: not a source that is allowed, or too many bytes.
            OSError: it cannot be fetched, or there is no such file.
        """
        if isinstance(source, bytes):
            return source
        if not isinstance(source, str):
            given = "none is given" if source is None else f"not {type(source).__name__}"
            raise ValueError(f"{where}: a {what} must be a data: or http(s) URL, {given}")
        text = source.strip()
        scheme, colon, rest = text.partition(":")
        scheme = scheme.lower() if colon else ""
        try:
            if scheme == "data":
                if text.count("%") > _MOST_ESCAPES:
                    raise ValueError(f"the data: URL escapes more than {_MOST_ESCAPES:,} characters; give it as base64")
                return await asyncio.to_thread(read_data_uri, text, what)
            if scheme in ("http", "https") and rest.startswith("//"):
                return await self._fetch(text)
            if scheme == "file":
                self._check_files_are_read(text)
                return await asyncio.to_thread(self._read_file, str(file_url_path(text)), text, what)
            if rest.startswith("//"):
                raise ValueError(f"{printable(text)} cannot be fetched: only http, https and data: URLs are read")
            self._check_files_are_read(text)
            return await asyncio.to_thread(self._read_file, text, text, what)
        except (ValueError, OSError) as error:
            raise prefixed(error, where) from error

    def _check_files_are_read(self, given: str) -> None:
        if self.folder is None:
            raise ValueError(
                f"{printable(given)} is neither a data: nor an http(s) URL, and files of the server's machine are off "
                "(--allow-local-files FOLDER)"
            )

    def _read_file(self, path: str, given: str, what: str) -> bytes:
        """A regular file below the folder, behind all links."""
        name = printable(given)
        assert self.folder is not None
        try:
            folder = self.folder.resolve(strict=True)
            file = (folder / path).resolve()
            # Said alike of what exists and of what does not.
            if not file.is_relative_to(folder):
                raise ValueError(f"{name} lies outside of the folder whose files this server reads")
            if not file.is_file():
                raise FileNotFoundError(f"no such {what}: {name}")
            with file.open("rb") as opened:
                data = opened.read(self.max_bytes + 1)
        except (OSError, ValueError) as error:
            if isinstance(error, (FileNotFoundError, ValueError)) and name in str(error):
                raise
            raise ValueError(f"{name} is not a usable path: {getattr(error, 'strerror', None) or error}") from error
        self._check_size(len(data), name)
        return data

    async def _fetch(self, url: str) -> bytes:
        name, data = printable(url), bytearray()
        client = httpx.AsyncClient(
            transport=None if self.private_network else PublicTransport(),
            timeout=_STEP_SECONDS,
            follow_redirects=True,
            max_redirects=_REDIRECTS,
            # Packed data could unpack to a thousand times its bytes.
            headers={**FETCH_HEADERS, "Accept-Encoding": "identity"},
        )
        try:
            async with client, client.stream("GET", url) as response:
                response.raise_for_status()
                async for chunk in response.aiter_bytes():
                    data += chunk
                    self._check_size(len(data), name)
        except httpx.HTTPStatusError as error:
            status = f"{error.response.status_code} {error.response.reason_phrase}"
            raise ConnectionError(f"cannot fetch {name}: {status}") from error
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise ConnectionError(f"cannot fetch {name}: {error or type(error).__name__}") from error
        return bytes(data)

    def _check_size(self, size: int, name: str) -> None:
        if size > self.max_bytes:
            raise ValueError(f"{name} has more than the {self.max_bytes:,} bytes that a picture may have (--max-body)")
