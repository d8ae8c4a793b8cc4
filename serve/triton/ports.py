"""TCP ports: free ones for tests and demos, and a plain word when a wanted one is taken."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from puzzle_trtllm.errors import ServeError


@contextmanager
def hold_ports(host: str, wanted: dict[str, int]) -> Iterator[dict[str, int]]:
    """The ports to use: those wanted (by purpose), and a free one wherever 0 was asked for.

    Within the block no other process is given one of them when it asks for any free port, and a server that names one
    can listen on it: Linux allows that beside a socket which is bound, with SO_REUSEADDR on both, and does not listen.
    Raises ServeError naming a port that is in use, or held by another server that is still starting.
    """
    with ExitStack() as held:
        ports: dict[str, int] = {}
        for purpose, port in wanted.items():
            if port in ports.values():
                raise _in_use(port, purpose)
            ports[purpose] = int(held.enter_context(_bind(host, port, purpose)).getsockname()[1])
            held.enter_context(_claim(host, ports[purpose], purpose))
        yield ports


@contextmanager
def reserve_port(host: str, port: int, purpose: str) -> Iterator[int]:
    """As `hold_ports`, one, for a process that holds it itself before it listens: it makes the claim of a server."""
    with _bind(host, port, purpose) as bound:
        yield int(bound.getsockname()[1])


def choose_ports(host: str, wanted: dict[str, int]) -> dict[str, int]:
    """As `hold_ports`, but not held: until the server's own bind another process can still take one."""
    with hold_ports(host, wanted) as ports:
        return ports


def numeric_address(host: str) -> str:
    """What to listen on for a name, as IPv4 if it has that. Raises ServeError for one that nobody knows."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}: {error.strerror}") from None
    return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])


def reachable(host: str, port: int) -> str:
    """host:port for clients on the machine of a server that listens there, maybe on all addresses."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(host: str, port: int, purpose: str) -> socket.socket:
    """A socket on the port; not listening, so it only fails where somebody listens."""
    address = numeric_address(host)
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    # As servers do: a port in TIME_WAIT is free, one that is listened on is not.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((address, port))
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise _in_use(port, purpose) from None
        raise ServeError(f"cannot listen on {host}:{port} ({purpose}): {error.strerror}") from None
    return bound


def _claim(host: str, port: int, purpose: str) -> socket.socket:
    """A name of the network namespace, gone with its socket: for minutes of loading nobody listens on the port, and
    another server of ours could hold it as well."""
    name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        name.bind(f"\0puzzle-trtllm {numeric_address(host)} {port}")
    except OSError:
        name.close()
        raise _in_use(port, purpose) from None
    return name


def _in_use(port: int, purpose: str) -> ServeError:
    return ServeError(f"port {port} ({purpose}) is in use", expected="a free port, or 0 to have one chosen")
