"""The ports of a server: free ones, wanted ones that are taken, and addresses that cannot be listened on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.serve.triton.ports import choose_ports, hold_ports
from puzzle_trtllm.serve.triton.server import TritonServer
from tests.serve.scripted import scripted_engine


@pytest.fixture(scope="module")
def engine(make_checkpoint, tmp_path_factory):
    return scripted_engine(tmp_path_factory.mktemp("scripted") / "engine", make_checkpoint([(4, None), (2, 16)]))


@pytest.mark.parametrize(
    ("option", "purpose"), [("grpc_port", "gRPC"), ("http_port", "HTTP"), ("metrics_port", "metrics")]
)
def test_a_port_in_use_is_named_before_anything_starts(engine, option: str, purpose: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"^port {port} \({purpose}\) is in use") as error:
            TritonServer(engine, **{option: port}).start()
    assert "\n" not in str(error.value)


def test_free_ports_differ_from_each_other() -> None:
    ports = choose_ports("127.0.0.1", dict.fromkeys("abc", 0))
    assert len(set(ports.values())) == 3 and all(ports.values())


@contextmanager
def nobody_elses_port() -> Iterator[int]:
    """A port that is given to nobody who asks for any, and that a server may take all the same."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_no_port_can_be_two_things(engine) -> None:
    with nobody_elses_port() as port, pytest.raises(ServeError, match=rf"^port {port} \(gRPC\) is in use"):
        TritonServer(engine, http_port=port, grpc_port=port).start()


def test_a_held_port_is_the_servers_and_given_to_nobody_else() -> None:
    """A hundred sockets at once that ask for any port, a few hundred times: without the hold some are given it."""
    with hold_ports("127.0.0.1", {"a": 0}) as ports:
        server = socket.create_server(("127.0.0.1", ports["a"]))
    with server, socket.create_connection(server.getsockname()) as client:
        assert server.accept()[1] == client.getsockname()
    with hold_ports("127.0.0.1", {"a": 0}) as ports:
        for _ in range(300):
            others = [socket.socket() for _ in range(100)]
            for other in others:
                other.bind(("127.0.0.1", 0))
            given = {other.getsockname()[1] for other in others}
            for other in others:
                other.close()
            assert ports["a"] not in given


def test_a_port_of_a_server_that_is_still_starting_is_in_use() -> None:
    """The engine may load for minutes before it listens; then the other one would, and say that it serves."""
    with nobody_elses_port() as port:
        with hold_ports("127.0.0.1", {"gRPC": port}) as ports:
            with pytest.raises(ServeError, match=rf"^port {port} \(gRPC\) is in use"):
                choose_ports("127.0.0.1", ports)
            assert choose_ports("127.0.0.2", ports) == ports
        assert choose_ports("127.0.0.1", ports) == ports == {"gRPC": port}


def test_a_name_that_nobody_knows(engine, monkeypatch) -> None:
    def unknown(*_: object, **__: object) -> None:  # without a name server, or with a slow one, it is another error
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ServeError, match=r"^cannot listen on no\.such\.host: Name or service not known$"):
        TritonServer(engine, host="no.such.host").start()


def test_an_address_that_is_not_ours(engine) -> None:
    with pytest.raises(ServeError, match=r"cannot listen on 203\.0\.113\.1"):
        TritonServer(engine, host="203.0.113.1").start()
