"""Who may talk to the server: TLS on gRPC, and protocols that only callers with a secret may use.

Triton has TLS for gRPC alone, so under TLS its HTTP endpoint (the same model, in plain text) listens on loopback only.
A certificate that does not load would show as a server that never gets ready; everything is tried here first.

    GrpcTls(cert=..., key=...)                     clients check the server
    GrpcTls(cert=..., key=..., root_cert=...)      and the server lets in only clients with a certificate of that CA
    Restriction(protocols=("model-repository",), secret=...)

What administers a server is closed to all where nobody has a secret for it: NVIDIA's servers let every client map any
shared memory of theirs, that of the Python backend included, and make the log as loud as it likes.

The secret travels in a header of every call, so it needs TLS beyond one host; and tritonserver takes it as an argument,
so whoever lists this host's processes can read it until the server is ready (then process.py writes over it).
"""

from __future__ import annotations

import secrets
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.client.secret import SECRET_HEADER, read_secret
from puzzle_trtllm.serve.client.tls import load_authority, load_identity

PROTOCOLS = (
    "metadata",
    "inference",
    "shared-memory",
    "model-config",
    "model-repository",
    "statistics",
    "trace",
    "logging",
)
"""What can be restricted. Triton's `health` is left out: probes, ours and Kubernetes', carry no secret."""


_ADMINISTRATION = ("model-repository", "shared-memory", "trace", "logging")


@dataclass(frozen=True, kw_only=True)
class GrpcTls:
    """PEM files: the server's certificate chain and key; with `root_cert` clients must show a certificate of it."""

    cert: Path
    key: Path
    root_cert: Path | None = None

    def check(self) -> None:
        """Raises ServeError in one line for a file that is missing, is no PEM, or a key of another certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load_identity(context, self.cert, self.key)
        if self.root_cert is not None:
            load_authority(context, self.root_cert)

    def options(self) -> dict[str, object]:
        """tritonserver's options, without the leading dashes."""
        options = {
            "grpc-use-ssl": "true",
            "grpc-server-cert": self.cert.absolute(),
            "grpc-server-key": self.key.absolute(),
        }
        if self.root_cert is None:
            return options
        return options | {"grpc-use-ssl-mutual": "true", "grpc-root-cert": self.root_cert.absolute()}


def tls_of_files(cert: Path | None, key: Path | None, root_cert: Path | None) -> GrpcTls | None:
    """What the three options of `serve` mean together. Raises ServeError when some are missing."""
    if cert is None and key is None and root_cert is None:
        return None
    for option, file in (("--grpc-cert", cert), ("--grpc-key", key)):
        if file is None:
            raise ServeError("missing", key=option, expected="--grpc-cert and --grpc-key together")
    assert cert is not None and key is not None
    return GrpcTls(cert=cert, key=key, root_cert=root_cert)


@dataclass(frozen=True, kw_only=True)
class Restriction:
    """Protocols, over gRPC and HTTP alike, that need the secret in a header. Raises ServeError for an unknown one."""

    protocols: tuple[str, ...]
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise ServeError(
                    "not a protocol that can be restricted",
                    key="--restricted",
                    found=repr(protocol),
                    expected=f"some of {','.join(PROTOCOLS)}",
                )

    def options(self) -> dict[str, object]:
        """tritonserver's options, without the leading dashes."""
        rule = f"{','.join(self.protocols)}:{SECRET_HEADER}={self.secret}"
        return {"grpc-restricted-protocol": rule, "http-restricted-api": rule}


def closed_to_all(restriction: Restriction | None) -> Restriction | None:
    """Administration that `restriction` gives to nobody, under a secret that nobody is told; None: it gives all."""
    given = () if restriction is None else restriction.protocols
    closed = tuple(protocol for protocol in _ADMINISTRATION if protocol not in given)
    return Restriction(protocols=closed, secret=secrets.token_hex(32)) if closed else None


def restriction_of_options(protocols: str | None, secret_file: Path | None) -> Restriction | None:
    """What `--restricted a,b` and `--secret FILE` of `serve` mean together. Raises ServeError."""
    if protocols is None and secret_file is None:
        return None
    if protocols is None or secret_file is None:
        missing = "--restricted" if protocols is None else "--secret"
        raise ServeError("missing", key=missing, expected="--restricted and --secret together")
    names = tuple(name.strip() for name in protocols.split(","))
    return Restriction(protocols=names, secret=read_secret(secret_file))
