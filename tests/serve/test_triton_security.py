"""Who may talk to a served engine: TLS, mutual TLS and restricted protocols, against the real server."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from puzzle_trtllm.errors import PuzzleError, ServeError
from puzzle_trtllm.serve.client.tls import ClientTls
from puzzle_trtllm.serve.client.triton_client import TritonLlmClient, generate
from puzzle_trtllm.serve.triton.probe import http_status
from puzzle_trtllm.serve.triton.security import (
    GrpcTls,
    Restriction,
    closed_to_all,
    restriction_of_options,
    tls_of_files,
)
from puzzle_trtllm.serve.triton.server import TritonServer
from tests.front_door.cli import invoke
from tests.serve.certificates import Authority
from tests.serve.scripted import HANG_S, SCRIPTED, scripted_engine, short_lived, wait_until

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
    cert, key, root_cert = (Path(os.path.relpath(file)) for file in (*authority.sign("server"), authority.cert))
    tls = GrpcTls(cert=cert, key=key, root_cert=root_cert)
    with short_lived(TritonServer(engine, tls=tls, **SCRIPTED)) as server:
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
    with short_lived(TritonServer(engine, host="0.0.0.0", tls=GrpcTls(cert=cert, key=key), **SCRIPTED)) as server:
        url, ours = server.grpc_url, ClientTls(ca_cert=authority.cert)
        assert generate("hello", url=url, tls=ours, max_tokens=5).text == "hello"
        assert refusal(url, None).status == "UNAVAILABLE"
        assert refusal(url, ClientTls(ca_cert=stranger.cert)).status == "UNAVAILABLE"
        # HTTP has no TLS: it must not be a way around. 127.0.0.2 reaches what listens on all addresses.
        ready = f"{server.http_url}/v2/health/ready"
        metrics = server.metrics_url.replace("127.0.0.1", "127.0.0.2")
        wait_until(lambda: http_status(ready) == 200, what="an answer over HTTP")
        wait_until(lambda: http_status(metrics) == 200, what="an answer at another address")
        assert http_status(ready.replace("127.0.0.1", "127.0.0.2")) is None


# --- restricted protocols -----------------------------------------------------------------------------------------

SECRET = "0123456789abcdef-right"


def http_index(server: TritonServer, headers: dict[str, str]) -> int:
    """Status of a question to the model-repository API over HTTP."""
    return http_post(f"{server.http_url}/v2/repository/index", b"{}", headers)


def http_post(url: str, body: bytes, headers: dict[str, str] | None = None) -> int:
    request = urllib.request.Request(url, data=body, headers=headers or {}, method="POST")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=HANG_S) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def grpc_index(server: TritonServer, headers: dict[str, str]) -> list[str]:
    """The models that NVIDIA's own client is told of."""
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        return [model.name for model in client.get_model_repository_index(headers=headers).models]


@pytest.mark.parametrize(
    "path", ["repository/index", "systemsharedmemory/region/x/register", "cudasharedmemory/status", "logging"]
)
def test_administration_is_closed_where_nobody_has_a_secret_for_it(mutual: TritonServer, path: str) -> None:
    assert http_post(f"{mutual.http_url}/v2/{path}", b"{}") == 403


def test_what_is_closed_is_what_no_secret_opens() -> None:
    every = ("model-repository", "shared-memory", "trace", "logging")
    assert closed_to_all(None).protocols == every
    assert closed_to_all(Restriction(protocols=("inference", "trace"), secret=SECRET)).protocols == (
        *every[:2],
        "logging",
    )
    assert closed_to_all(Restriction(protocols=every, secret=SECRET)) is None
    assert closed_to_all(None).secret != closed_to_all(None).secret


@pytest.fixture(scope="module")
def restricted(engine) -> Iterator[TritonServer]:
    """Its model-repository API is for those with the secret."""
    restriction = Restriction(protocols=("model-repository",), secret=SECRET)
    with short_lived(TritonServer(engine, restriction=restriction, **SCRIPTED)) as server:
        yield server


def test_no_secret_is_listed_with_the_processes_of_a_server_that_is_ready(restricted: TritonServer) -> None:
    guard = int(Path(f"/proc/{restricted.pid}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (restricted.pid, guard):
        arguments = Path(f"/proc/{pid}/cmdline").read_text()
        assert re.findall(r"puzzle-secret=([^\0]*)", arguments) == ["*" * len(SECRET)] * 2 + ["*" * 64] * 2
    assert SECRET not in restricted.log_file.read_text()


def test_the_repository_api_is_open_only_to_callers_with_the_secret(restricted: TritonServer) -> None:
    grpc_header = "triton-grpc-protocol-puzzle-secret"
    assert http_index(restricted, {"puzzle-secret": SECRET}) == 200
    assert http_index(restricted, {"puzzle-secret": "0123456789abcdef-wrong"}) == 403
    assert http_index(restricted, {}) == 403
    assert grpc_index(restricted, {grpc_header: SECRET}) == ["tensorrt_llm"]
    for headers in ({}, {grpc_header: "0123456789abcdef-wrong"}, {"puzzle-secret": SECRET}):
        with pytest.raises(InferenceServerException, match="restricted"):
            grpc_index(restricted, headers)
    assert generate("hello", url=restricted.grpc_url, max_tokens=5).text == "hello"  # the rest stays open


def test_restricted_inference_opens_to_our_client_with_the_secret(engine, tmp_path: Path) -> None:
    restriction = Restriction(protocols=("inference", "model-config"), secret=SECRET)
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    with short_lived(TritonServer(engine, restriction=restriction, **SCRIPTED)) as server:
        arguments = ("generate", "hello", "--max-tokens", "5", "--url", server.grpc_url)
        assert invoke(*arguments, "--secret", str(file)).stdout == "hello\n"
        refused = invoke(*arguments)
        assert refused.exit_code == 2 and "restricted" in refused.stderr
        # Triton's JSON parser overflows its stack on this: whoever is not asked first ends the server.
        nested = b'{"text_input":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
        for path in ("models/tensorrt_llm/generate", "logging", "trace/setting", "repository/index"):
            assert http_post(f"{server.http_url}/v2/{path}", nested) == 403
        wait_until(lambda: http_status(f"{server.http_url}/v2/health/ready") == 200, what="it lives")


def test_options_of_a_restriction(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    assert restriction_of_options(None, None) is None
    both = restriction_of_options("model-repository, statistics", file)
    assert both == Restriction(protocols=("model-repository", "statistics"), secret=SECRET)
    assert SECRET not in repr(both)
    rule = f"model-repository,statistics:puzzle-secret={SECRET}"
    assert both.options() == {"grpc-restricted-protocol": rule, "http-restricted-api": rule}


@pytest.mark.parametrize(
    ("protocols", "secret", "message"),
    [
        ("model-repository", None, "--secret: missing"),
        (None, SECRET, "--restricted: missing"),
        ("model-repositry", SECRET, "found 'model-repositry', expected some of metadata,.*model-repository"),
        ("health", SECRET, "--restricted: not a protocol that can be restricted"),
        ("model-repository", "short", "secret: no proper secret"),
        ("model-repository", "with spaces and = signs", "secret: no proper secret"),
    ],
)
def test_a_wrong_restriction_is_one_clear_line(
    protocols: str | None, secret: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text(secret or "")
    with pytest.raises(ServeError, match=message) as error:
        restriction_of_options(protocols, None if secret is None else file)
    assert "\n" not in str(error.value) and (secret is None or secret not in str(error.value))


def test_a_secret_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="nowhere: cannot be read: No such file"):
        restriction_of_options("statistics", tmp_path / "nowhere")


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
