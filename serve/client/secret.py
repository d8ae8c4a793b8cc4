"""The shared secret of restricted protocols: its file, and the header that carries it.

Over HTTP the header is `puzzle-secret`; over gRPC Triton puts a prefix of its own before the name. The secret is read
from a file, so that it stands in no shell history: `openssl rand -hex 32 > secret`.
"""

from __future__ import annotations

import re
from pathlib import Path

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.plain_file import read_bytes

SECRET_HEADER = "puzzle-secret"
_SECRET = re.compile(r"[A-Za-z0-9_-]{16,}")


def read_secret(file: Path) -> str:
    """The secret in `file`. Raises ServeError for a file that cannot be read or holds no proper secret."""
    secret = read_bytes(file, ServeError).decode("utf-8", errors="replace").strip()
    if _SECRET.fullmatch(secret) is None:
        # What it holds is not shown: it may be a secret all the same.
        raise ServeError("no proper secret", file=file, expected="one line, 16 or more of A-Z a-z 0-9 _ -")
    return secret


def grpc_metadata(secret: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of a gRPC call."""
    return () if secret is None else ((f"triton-grpc-protocol-{SECRET_HEADER}", secret),)
