"""TCP ports: free ones for tests and demos, and a plain word when a wanted one is taken."""

from __future__ import annotations

import errno
import socket

from puzzle_trtllm.errors import ServeError


def choose_ports(host: str, wanted: dict[str, int]) -> dict[str, int]:
    """The ports to use: those wanted (by purpose), and a free one wherever 0 was asked for.

    All are held open while choosing, so that they differ. Between this and the server's own bind another process can
    still take one. Raises ServeError naming a port that is in use.
    """
    sockets: list[socket.socket] = []
    try:
        ports = {}
        for purpose, port in wanted.items():
            listener = _bind(host, port, purpose)
            sockets.append(listener)
            ports[purpose] = int(listener.getsockname()[1])
        return ports
    finally:
        for listener in sockets:
            listener.close()


def _bind(host: str, port: int, purpose: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # As servers do: a port in TIME_WAIT is free, one that is listened on is not.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"port {port} ({purpose}) is in use", expected="a free port, or 0 to have one chosen"
            ) from None
        raise ServeError(f"cannot listen on {host}:{port} ({purpose}): {error.strerror}") from None
    return listener
