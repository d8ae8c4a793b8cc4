"""Throw-away certificates, made by the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Authority:
    """A CA of one test session: `cert`, and leaf certificates it signs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.cert, self._key = folder / "ca.pem", folder / "ca.key"
        self._openssl("req", "-x509", *_new_key(self._key), "-subj", "/CN=test CA", "-days", "2", "-out", self.cert)

    def sign(self, name: str) -> tuple[Path, Path]:
        """A certificate and its key."""
        cert, key, request = (self._folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        self._openssl("req", *_new_key(key), "-subj", f"/CN={name}", "-out", request)
        extensions = self._folder / f"{name}.ext"
        extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        signing = ("-CA", self.cert, "-CAkey", self._key, "-CAcreateserial", "-days", "2", "-extfile", extensions)
        self._openssl("x509", "-req", "-in", request, *signing, "-out", cert)
        return cert, key

    @staticmethod
    def _openssl(*arguments: str | Path) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def _new_key(key: Path) -> tuple[str | Path, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key)
