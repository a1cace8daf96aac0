"""The one parser of endpoint URLs."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from blackbox_vlm.errors import InputError
from blackbox_vlm.images import quote

_PORTS = {"http": 80, "https": 443}
_USER = re.compile(r"([^/?#@]*:)?[/\\]*[^/?#]*@")  # looked for first: no other message repeats it
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")  # as the last label: an address in disguise
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?\.?")
_PATH = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*")
_QUERY = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*")


@dataclass(frozen=True, slots=True)
class Origin:
    """Who is spoken to; the host in punycode."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"


def parse_url(url: str) -> tuple[Origin, str, str]:
    """The origin, the path without a slash at the end, and the query string with its mark.

    Raises:
        InputError: another scheme than http or https, http beyond the loopback interface, a user
            name or password, a fragment, or anything that two parsers might read differently.
    """
    if _USER.match(url):
        raise InputError(
            "the endpoint's URL holds a user name or password; put the key into key_env instead"
        )
    if not url.isprintable() or " " in url or "\\" in url:
        raise _refusal(url, "it holds spaces, backslashes or control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refusal(url, "it cannot be read") from None
    scheme = parts.scheme.lower()
    if scheme not in _PORTS:
        raise _refusal(url, "wanted https://..., or http:// on this machine")
    if "#" in url:
        raise _refusal(url, "it has a fragment")
    if not _PATH.fullmatch(parts.path) or not _QUERY.fullmatch(parts.query):
        raise _refusal(url, "its path holds characters that belong escaped")
    host = _host(parts.hostname or "", url)
    origin = Origin(scheme, host, _PORTS[scheme] if port is None else port)
    if scheme == "http" and not _is_loopback(origin.host):
        raise _refusal(url, "http is for this machine only; use https")
    query = f"?{parts.query}" if parts.query else ""
    return origin, parts.path.rstrip("/"), query


def _host(name: str, url: str) -> str:
    if "%" in name:
        raise _refusal(url, "an IPv6 zone is not taken")
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        host = name.encode("idna").decode("ascii").lower()
    except UnicodeError:
        host = ""
    last = host.rstrip(".").rsplit(".", 1)[-1]
    if not _HOST.fullmatch(host) or _NUMBER.fullmatch(last):
        raise _refusal(url, "its host is no name and no address")
    return host


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refusal(url: str, why: str) -> InputError:
    """Says which URL, without the query string, where keys are put."""
    return InputError(f"the endpoint's URL {quote(url.split('?')[0].split('#')[0])}: {why}")
