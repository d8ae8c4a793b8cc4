"""TLS of our gRPC clients: which CA to believe, and what to show to a server that wants to know us (mutual TLS).

gRPC takes PEM bytes and says nothing useful about wrong ones: a bad file ends in an endless handshake. So every file is
tried with Python's own `ssl` first. The server's certificate must name the host of the URL (subjectAltName; an address
needs an entry of its own, `IP:127.0.0.1`).
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.plain_file import read_bytes


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """PEM files. Without `ca_cert` the public authorities that come with gRPC are believed."""

    ca_cert: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None

    def credentials(self) -> Any:
        """grpc.ChannelCredentials. Raises ServeError in one line for a file that cannot be used."""
        import grpc  # type: ignore[import-untyped]

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca_cert is not None:
            load_authority(context, self.ca_cert)
        if self.client_cert is not None and self.client_key is not None:
            load_identity(context, self.client_cert, self.client_key)
        elif self.client_cert is not None or self.client_key is not None:
            raise ServeError("a client's certificate and its key belong together: one is missing")
        return grpc.ssl_channel_credentials(
            root_certificates=_bytes(self.ca_cert),
            private_key=_bytes(self.client_key),
            certificate_chain=_bytes(self.client_cert),
        )


def load_identity(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Try a certificate chain and its key. Raises ServeError."""
    for file in (cert, key):
        _require(file)
    try:
        # An empty password, because OpenSSL would ask the terminal for one.
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise ServeError("not the key of the certificate", file=key, expected=f"the key of {cert}") from None
        raise ServeError(
            "not a certificate and its key that can be read",
            file=f"{cert}, {key}",
            expected="PEM, key without password",
        ) from None


def load_authority(context: ssl.SSLContext, ca_cert: Path) -> None:
    """Try the certificates of a CA. Raises ServeError."""
    _require(ca_cert)
    try:
        context.load_verify_locations(ca_cert)
    except (ssl.SSLError, OSError):
        raise ServeError("holds no certificate that can be read", file=ca_cert, expected="PEM") from None


def _require(file: Path) -> None:
    read_bytes(file, ServeError)


def _bytes(file: Path | None) -> bytes | None:
    return None if file is None else file.read_bytes()
