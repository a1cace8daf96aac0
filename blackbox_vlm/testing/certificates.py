"""Certificates for an https server on this machine, right and wrong ones. Needs trustme."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest


class Authority:
    """Signs certificates; who trusts `ca_file` trusts them.

    Args:
        folder: for the file.
    """

    def __init__(self, folder: Path) -> None:
        trustme = pytest.importorskip("trustme", reason="trustme makes the certificates")
        self._authority = trustme.CA()
        self.ca_file = folder / "authority.pem"
        self._authority.cert_pem.write_to_path(str(self.ca_file))

    def sign(self, host: str = "127.0.0.1", *, expired: bool = False) -> ssl.SSLContext:
        """What a server of this host needs for https."""
        dates = {"not_before": _year(2000), "not_after": _year(2001)} if expired else {}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._authority.issue_cert(host, **dates).configure_cert(context)
        return context


def _year(year: int) -> datetime:
    return datetime(year, 1, 1, tzinfo=UTC)
