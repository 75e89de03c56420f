"""Downloads one file over HTTP from permitted hosts, at checked addresses, within limits of size and time.

Proxies from the environment are not used, since a proxy resolves host names itself, so that the addresses could not
be checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any

from hfbatch.data.filesystem import one_line, redact

if TYPE_CHECKING:
    from yarl import URL

WEB = ("http", "https")
MOST_REDIRECTS = 5
CHUNK = 1 << 18
NAT64 = IPv6Network("64:ff9b::/96")
METADATA = frozenset((ip_address("168.63.129.16"),))
"""Metadata addresses of clouds, which serve secrets, but are not registered as private: Azure's."""


class FileRefusedError(ValueError):
    """A row names a file that is not permitted or too large; the message gives the line of the spec that permits it."""


@dataclass(frozen=True)
class Permit:
    """The files that may be downloaded."""

    hosts: tuple[str, ...]
    """Names, *.names, addresses and networks, each with or without `:port`; if empty, all hosts at public addresses."""
    schemes: tuple[str, ...]
    max_bytes: int
    timeout: float
    spec: str
    """The section of the spec with the rules, such as `input.files`."""

    def check_url(self, url: URL) -> None:
        """:raises FileRefusedError: for a scheme, host or literal address that the permit does not allow."""
        host, port = (url.raw_host or "").lower(), url.port
        if url.scheme not in self.schemes:
            raise FileRefusedError(
                f"{shown(str(url))} has the scheme {url.scheme}; to allow it, add it to {self.spec}.schemes: [{url.scheme}]"
            )
        if self.hosts and not (self._names(host, port) or self._holds(host, port)):
            raise FileRefusedError(
                f"{shown(str(url))} is on a host that rows may not name; to allow it, add it to {self.spec}.hosts: [{host}]"
            )
        if ":" in host or host.replace(".", "").isdigit():  # a literal address, which is not resolved
            self.check_address(host, host, port)

    def check_address(self, host: str, address: str, port: int | None) -> None:
        """:raises FileRefusedError: for an address that is not public, unless the permit lists it. The host name is not
        enough, since its owner can let it resolve to any address."""
        try:
            real = embedded(ip_address(address))
        except ValueError as error:
            raise FileRefusedError(f"host {address!r} is neither a name nor a whole address") from error
        local = host == "localhost" and "localhost" in self._entries(port)
        if is_public(real) or local or self._holds(str(real), port):
            return
        named = ", ".join(dict.fromkeys((host, str(real))))
        raise FileRefusedError(
            f"host {host} is at {address}, an address that is not public; to allow it, add it to {self.spec}.hosts: [{named}]"
        )

    def _names(self, host: str, port: int | None) -> bool:
        """Returns whether an entry is this host's name or a pattern that matches it."""
        return any(fnmatchcase(host, entry) for entry in self._entries(port))

    def _holds(self, address: str, port: int | None) -> bool:
        """Returns whether an entry is this address or a network that contains it."""
        for entry in self._entries(port):
            with suppress(ValueError):
                if ip_address(address) in ip_network(entry, strict=False):
                    return True
        return False

    def _entries(self, port: int | None) -> Iterator[str]:
        """Yields the entries that apply to a port, without the port."""
        for entry in self.hosts:
            name, _, number = entry.rpartition(":")
            has_port = number.isdigit() and (":" not in name or name.endswith("]")) and name
            if not has_port or int(number) == port:
                yield (name if has_port else entry).strip("[]")


def embedded(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Returns the IPv4 address embedded in an IPv6 address, if there is one; else the address itself."""
    if isinstance(address, IPv4Address):
        return address
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
    if inner is None and not int(address) >> 32 and int(address) > 1:  # ::a.b.c.d, the deprecated form
        inner = IPv4Address(int(address))
    return inner or address


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Returns whether an address is reachable from the whole Internet and not a service of a cloud."""
    return address.is_global and not address.is_multicast and address not in METADATA


def download(name: str, permit: Permit) -> bytes:
    """Downloads the content of a URL: one GET per redirect, without cookies.

    :raises FileRefusedError: for a URL, redirect or address that the permit does not allow, or a file over the limit.
    :raises OSError: if the host is not found, the status is not 200, or the download exceeds the timeout.
    """
    import aiohttp
    from fsspec.asyn import get_loop, sync

    try:
        return sync(get_loop(), _download, name, permit)
    except TimeoutError as error:
        raise TimeoutError(
            f"{shown(name)} took longer than {permit.spec}.timeout, {permit.timeout:g} s"
        ) from error
    except (aiohttp.ClientError, OSError) as error:
        raise OSError(f"{shown(name)} cannot be downloaded: {one_line(error)}") from error


async def _download(name: str, permit: Permit) -> bytes:
    import aiohttp
    from yarl import URL

    url = URL(name)
    connector = aiohttp.TCPConnector(resolver=_checking_resolver(permit), use_dns_cache=False)
    # This timeout covers the whole download; aiohttp's own timeouts start again at each redirect.
    async with (
        asyncio.timeout(permit.timeout),
        aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None),
            trust_env=False,
        ) as session,
    ):
        for _ in range(MOST_REDIRECTS + 1):
            permit.check_url(url)
            async with session.get(url, allow_redirects=False) as answer:
                target = answer.headers.get("Location")
                if answer.status in {301, 302, 303, 307, 308} and target:
                    url = url.join(URL(target))
                    continue
                if answer.status != 200:
                    raise OSError(f"the answer is {answer.status} {answer.reason}")
                return await _body(answer, permit)
    raise OSError(f"more than {MOST_REDIRECTS} redirects")


async def _body(answer: Any, permit: Permit) -> bytes:
    """Reads the body of an answer up to the limit, whatever length it claims."""
    parts, size = [], answer.content_length or 0
    if size <= permit.max_bytes:
        size = 0
        async for part in answer.content.iter_chunked(CHUNK):
            size += len(part)
            if size > permit.max_bytes:
                break
            parts.append(part)
    if size > permit.max_bytes:
        raise too_large(shown(str(answer.url)), permit.max_bytes, permit.spec)
    return b"".join(parts)


def too_large(name: str, limit: int, spec: str) -> FileRefusedError:
    """Returns the error for a file that has more bytes than the limit."""
    return FileRefusedError(f"{name} has more bytes than {spec}.max_bytes, {limit:,}; raise it to allow this")


def _checking_resolver(permit: Permit) -> Any:
    """Returns a resolver for a session that passes on only checked addresses, to which the session then connects."""
    from aiohttp.abc import AbstractResolver
    from aiohttp.resolver import ThreadedResolver

    class Resolver(AbstractResolver):
        async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[Any]:
            found = await ThreadedResolver().resolve(host, port, family)
            for one in found:
                permit.check_address(host, one["host"], port)
            return found

        async def close(self) -> None:
            """Does nothing: no resource is open."""

    return Resolver()


def shown(name: str, most: int = 120) -> str:
    """Returns a path or URL for messages: without secrets, and shortened."""
    text = redact(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"
