"""Who may talk to a served engine: TLS and mutual TLS against the real server."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from puzzle_trtllm.errors import PuzzleError, ServeError
from puzzle_trtllm.serve.client.tls import ClientTls
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient, generate
from puzzle_trtllm.serve.triton.probe import http_status
from puzzle_trtllm.serve.triton.security import GrpcTls, tls_of_files
from puzzle_trtllm.serve.triton.server import TritonServer
from tests.front_door.cli import invoke
from tests.serve.certificates import Authority
from tests.serve.scripted import SCRIPTED, scripted_engine

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by openssl")


@pytest.fixture(scope="module")
def engine(make_checkpoint, tmp_path_factory):
    checkpoint = make_checkpoint([(4, None), (2, 16)])
    return scripted_engine(tmp_path_factory.mktemp("scripted") / "engine", checkpoint)


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "other")


@pytest.fixture(scope="module")
def mutual(engine, authority: Authority) -> Iterator[TritonServer]:
    cert, key = authority.sign("server")
    with TritonServer(engine, tls=GrpcTls(cert=cert, key=key, root_cert=authority.cert), **SCRIPTED) as server:
        yield server


def refusal(url: str, tls: ClientTls | None) -> ServeError:
    """How the server, or our own check of it, turns a client away."""

    async def connect() -> None:
        async with TritonLlmClient(url, tls=tls):
            pass

    with pytest.raises(ServeError) as error:
        asyncio.run(connect())
    return error.value


def test_a_client_with_a_certificate_is_served(mutual: TritonServer, authority: Authority) -> None:
    cert, key = authority.sign("client")
    tls = ClientTls(ca_cert=authority.cert, client_cert=cert, client_key=key)
    assert generate("hello", url=mutual.grpc_url, tls=tls, max_tokens=5).text == "hello"


def test_the_command_line_speaks_mutual_tls_too(mutual: TritonServer, authority: Authority) -> None:
    cert, key = authority.sign("shell")
    files = ("--ca-cert", str(authority.cert), "--client-cert", str(cert), "--client-key", str(key))
    result = invoke("generate", "hello", "--max-tokens", "5", "--url", mutual.grpc_url, *files)
    assert (result.exit_code, result.stdout) == (0, "hello\n")


def test_mutual_tls_refuses_everybody_else(mutual: TritonServer, authority: Authority, stranger: Authority) -> None:
    cert, key = stranger.sign("stranger")
    url = mutual.grpc_url
    assert refusal(url, None).status == "UNAVAILABLE"  # plain text
    assert refusal(url, ClientTls(ca_cert=authority.cert)).status == "UNAVAILABLE"  # no certificate
    of_another = ClientTls(ca_cert=authority.cert, client_cert=cert, client_key=key)
    assert refusal(url, of_another).status == "UNAVAILABLE"


def test_under_plain_tls_only_the_server_shows_a_certificate(engine, authority: Authority, stranger: Authority) -> None:
    cert, key = authority.sign("plain")
    with TritonServer(engine, host="0.0.0.0", tls=GrpcTls(cert=cert, key=key), **SCRIPTED) as server:
        url, ours = server.grpc_url, ClientTls(ca_cert=authority.cert)
        assert generate("hello", url=url, tls=ours, max_tokens=5).text == "hello"
        assert refusal(url, None).status == "UNAVAILABLE"
        assert refusal(url, ClientTls(ca_cert=stranger.cert)).status == "UNAVAILABLE"
        # HTTP has no TLS: it must not be a way around. 127.0.0.2 reaches what listens on all addresses.
        ready = f"{server.http_url}/v2/health/ready"
        assert http_status(ready) == 200
        assert http_status(ready.replace("127.0.0.1", "127.0.0.2")) is None
        assert http_status(server.metrics_url.replace("127.0.0.1", "127.0.0.2")) == 200


# --- checked before anything starts -----------------------------------------------------------------------------


def test_a_missing_file_is_named(engine, authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.sign("missing")
    nowhere = tmp_path / "nowhere.pem"
    for tls in (
        GrpcTls(cert=nowhere, key=key),
        GrpcTls(cert=cert, key=nowhere),
        GrpcTls(cert=cert, key=key, root_cert=nowhere),
    ):
        with pytest.raises(ServeError) as error:
            TritonServer(engine, tls=tls).start()
        assert str(error.value) == f"{nowhere}: cannot be read: No such file or directory"


def test_the_key_of_another_certificate_is_found_out(authority: Authority) -> None:
    cert, _ = authority.sign("one")
    _, key = authority.sign("two")
    with pytest.raises(ServeError, match=r"two\.key: not the key of the certificate \(expected the key of .*one\.pem"):
        GrpcTls(cert=cert, key=key).check()


def test_what_is_no_certificate_is_found_out(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.sign("good")
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("not a certificate")
    with pytest.raises(ServeError, match=r"wrong\.pem.*not a certificate and its key that can be read"):
        GrpcTls(cert=wrong, key=key).check()
    with pytest.raises(ServeError, match=r"wrong\.pem: holds no certificate"):
        GrpcTls(cert=cert, key=key, root_cert=wrong).check()
    assert "wrong.pem" in str(refusal("127.0.0.1:9", ClientTls(ca_cert=wrong)))


@pytest.mark.parametrize(
    ("given", "missing"), [({"cert"}, "--grpc-key"), ({"key"}, "--grpc-cert"), ({"root_cert"}, "--grpc-cert")]
)
def test_options_of_tls_that_miss_another_one(given: set[str], missing: str) -> None:
    files = {name: Path(name) if name in given else None for name in ("cert", "key", "root_cert")}
    with pytest.raises(PuzzleError, match=f"^{missing}: missing"):
        tls_of_files(**files)
    assert tls_of_files(None, None, None) is None


def test_a_clients_certificate_without_its_key(authority: Authority) -> None:
    error = refusal("127.0.0.1:9", ClientTls(client_cert=authority.cert))
    assert "belong together" in str(error) and "\n" not in str(error)
