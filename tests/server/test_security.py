"""TLS and tokens, against real servers whose authorities live as long as a test."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from sidecar.__main__ import main
from sidecar.client import AsyncEncoderClient, EncodeError, EncoderClient
from sidecar.credentials import CredentialsError, client_credentials, named_tokens, read_token
from sidecar.pb import encoder_pb2 as pb
from sidecar.server import security
from sidecar.server.listening import warn_of_open_sockets, warn_of_plaintext
from sidecar.server.security import BearerTokens, SecurityError, TokenInterceptor, server_credentials
from sidecar.settings import Settings

SERVICE = "epd.encoder.v1.Encoder"
ALICE, BOB = "alices-token-0123456789", "bobs-token-9876543210=="
# Each channel shakes hands for itself.
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))


class Certificates:
    """An authority's certificate and key on disk, in a directory of their own."""

    def __init__(self, directory: Path, authority: trustme.CA | None = None) -> None:
        directory.mkdir(exist_ok=True)
        self.authority = authority or trustme.CA()
        self.ca, self.cert, self.key = (directory / name for name in ("ca.pem", "cert.pem", "key.pem"))
        self.authority.cert_pem.write_to_path(self.ca)
        self.renew(self.authority)

    def renew(self, authority: trustme.CA) -> None:
        issued = authority.issue_cert("localhost")
        self.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        self.key.write_bytes(issued.private_key_pem.bytes())


@pytest.fixture
def ours(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "theirs")


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\nalice:{ALICE}\n\n{BOB}  # nameless\n")
    path.chmod(0o600)
    return path


async def info(request: bytes, context: Any) -> bytes:
    return pb.InfoResponse(version="9.9").SerializeToString()


async def encode(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for index in range(len(pb.EncodeRequest.FromString(request).items)):
        yield pb.EncodeResponse(index=index, error={"code": 3, "message": "a test"}).SerializeToString()


@asynccontextmanager
async def serving(
    credentials: grpc.ServerCredentials | None = None, tokens: BearerTokens | None = None
) -> AsyncIterator[str]:
    """The address of a server whose handlers take and give bytes."""
    server = grpc.aio.server(interceptors=[TokenInterceptor(tokens)] if tokens else [])
    handlers = {
        "Info": grpc.unary_unary_rpc_method_handler(info),
        "Encode": grpc.unary_stream_rpc_method_handler(encode),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    health = health_aio.HealthServicer()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((SERVICE,), server)
    listen = "127.0.0.1:0"
    port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    await server.start()
    try:
        yield f"localhost:{port}"
    finally:
        await server.stop(0)


async def version(address: str, credentials: grpc.ChannelCredentials | None = None, token: str | None = None) -> str:
    async with AsyncEncoderClient(address, credentials=credentials, token=token, options=OPTIONS) as client:
        return (await client.info(timeout_s=10)).version


async def refusal(call: Awaitable[Any]) -> str:
    with pytest.raises(EncodeError) as raised:
        await call
    return raised.value.code


def test_over_tls_a_caller_who_trusts_the_authority_is_served(ours: Certificates) -> None:
    async def run() -> None:
        async with serving(server_credentials(ours.cert, ours.key, None)) as address:
            assert await version(address, client_credentials(ours.ca, None, None)) == "9.9"

    asyncio.run(run())


def test_over_tls_a_server_of_another_authority_or_without_tls_is_not_trusted(
    ours: Certificates, theirs: Certificates
) -> None:
    async def run() -> None:
        async with serving(server_credentials(ours.cert, ours.key, None)) as address, serving() as plain:
            assert await refusal(version(address, client_credentials(theirs.ca, None, None))) == "UNAVAILABLE"
            assert await refusal(version(plain, client_credentials(ours.ca, None, None))) == "UNAVAILABLE"
            assert await refusal(version(address)) == "UNAVAILABLE"

    asyncio.run(run())


def test_mutual_tls_wants_a_certificate_of_the_right_authority(ours: Certificates, theirs: Certificates) -> None:
    async def run() -> None:
        async with serving(server_credentials(ours.cert, ours.key, theirs.ca)) as address:
            known = client_credentials(ours.ca, theirs.cert, theirs.key)
            assert await version(address, known) == "9.9"
            assert await refusal(version(address, client_credentials(ours.ca, None, None))) == "UNAVAILABLE"
            stranger = client_credentials(ours.ca, ours.cert, ours.key)
            assert await refusal(version(address, stranger)) == "UNAVAILABLE"

    asyncio.run(run())


def test_a_renewed_certificate_is_taken_up_on_every_port(ours: Certificates, theirs: Certificates) -> None:
    async def run() -> None:
        credentials = server_credentials(ours.cert, ours.key, None)
        async with serving(credentials) as first, serving(credentials) as second:
            assert await version(first, client_credentials(ours.ca, None, None)) == "9.9"
            ours.renew(theirs.authority)
            for address in (first, second):
                assert await version(address, client_credentials(theirs.ca, None, None)) == "9.9"
                assert await refusal(version(address, client_credentials(ours.ca, None, None))) == "UNAVAILABLE"

    asyncio.run(run())


def test_a_client_authority_that_is_withdrawn_no_longer_lets_anybody_in(
    ours: Certificates, theirs: Certificates
) -> None:
    async def run() -> None:
        async with serving(server_credentials(ours.cert, ours.key, theirs.ca)) as address:
            caller = client_credentials(ours.ca, theirs.cert, theirs.key)
            assert await version(address, caller) == "9.9"
            theirs.ca.write_bytes(ours.ca.read_bytes())
            assert await refusal(version(address, caller)) == "UNAVAILABLE"

    asyncio.run(run())


@pytest.mark.parametrize("damage", ["half written", "key of another", "gone", "empty"])
def test_a_broken_renewal_keeps_the_certificate_and_warns_once(
    ours: Certificates, theirs: Certificates, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    def break_it() -> None:
        if damage == "half written":
            ours.cert.write_bytes(ours.cert.read_bytes()[:300])
        elif damage == "key of another":
            ours.key.write_bytes(theirs.key.read_bytes())
        elif damage == "gone":
            ours.key.unlink()
        else:
            ours.key.write_bytes(b"")

    async def run() -> None:
        async with serving(server_credentials(ours.cert, ours.key, None)) as address:
            break_it()
            for _ in range(2):
                assert await version(address, client_credentials(ours.ca, None, None)) == "9.9"
            (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
            assert "TLS certificates read before stay in use: --tls-" in warning.getMessage()
            ours.renew(theirs.authority)  # and mended, it is taken up
            assert await version(address, client_credentials(theirs.ca, None, None)) == "9.9"

    asyncio.run(run())


def test_certificates_that_will_not_do_are_told_by_their_flags(
    ours: Certificates, theirs: Certificates, tmp_path: Path
) -> None:
    junk, nowhere, encrypted, damaged = (tmp_path / name for name in ("junk", "nowhere", "encrypted", "damaged"))
    junk.write_text("no PEM")
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", ours.key, "-out", encrypted, "-passout", "pass:secret"], check=True
    )
    for cert, key, client_ca, message in (
        (nowhere, ours.key, None, r"^--tls-cert: \S+ cannot be read: No such file"),
        (ours.cert, nowhere, None, r"^--tls-key: \S+ cannot be read: No such file"),
        (ours.cert, ours.key, nowhere, r"^--tls-client-ca: \S+ cannot be read: No such file"),
        (ours.cert, tmp_path, None, r"^--tls-key: \S+ cannot be read: it is not a regular file"),
        (junk, ours.key, None, "^--tls-cert: the file holds no certificate"),
        (damaged, ours.key, None, "^--tls-cert or --tls-key: the file is damaged"),
        (ours.cert, junk, None, "^--tls-key: the file holds no private key"),
        (ours.cert, encrypted, None, "^--tls-key: the key is encrypted"),
        (ours.cert, ours.key, junk, "^--tls-client-ca: the file holds no certificates"),
        (ours.cert, theirs.key, None, "^--tls-cert and --tls-key: the key is not the certificate's"),
    ):
        with pytest.raises(SecurityError, match=message):
            server_credentials(cert, key, client_ca)


@pytest.mark.parametrize("over_tls", [True, False])
def test_a_caller_with_a_token_is_served_by_every_method(ours: Certificates, token_file: Path, over_tls: bool) -> None:
    async def run() -> None:
        served = server_credentials(ours.cert, ours.key, None) if over_tls else None
        async with serving(served, BearerTokens(token_file)) as address:
            credentials = client_credentials(ours.ca, None, None) if over_tls else None
            async with AsyncEncoderClient(address, credentials=credentials, token=ALICE) as client:
                assert (await client.info(timeout_s=10)).version == "9.9"
                assert len(await client.encode([pb.Item(), pb.Item()], timeout_s=10)) == 2

            def blocking() -> None:
                with EncoderClient(address, credentials=credentials, token=BOB) as client:
                    assert client.info(timeout_s=10).version == "9.9"
                    assert len(client.encode([pb.Item()], timeout_s=10)) == 1

            await asyncio.to_thread(blocking)

    asyncio.run(run())


def test_a_token_may_be_part_of_a_channels_credentials(ours: Certificates, token_file: Path) -> None:
    async def run() -> None:
        async with serving(server_credentials(ours.cert, ours.key, None), BearerTokens(token_file)) as address:
            assert await version(address, client_credentials(ours.ca, None, None, ALICE)) == "9.9"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ([], "wants a token"),
        ([("authorization", f"Bearer {ALICE}x")], "not one of"),
        ([("authorization", f"Bearer {ALICE[:-1]}")], "not one of"),
        ([("authorization", f"Basic {ALICE}")], "not one of"),
        ([("authorization", ALICE)], "not one of"),
        ([("authorization", "Bearer alice")], "not one of"),
        ([("authorization", f"Bearer alice:{ALICE}")], "not one of"),
        ([("authorization", "Bearer ")], "not one of"),
        ([("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {BOB}")], "not one of"),
        ([("authorization-bin", f"Bearer {ALICE}".encode())], "wants a token"),
    ],
)
def test_a_caller_without_a_good_token_is_sent_away_from_every_method(
    token_file: Path, metadata: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def run() -> None:
        async with serving(None, BearerTokens(token_file)) as address, grpc.aio.insecure_channel(address) as channel:

            async def unary(method: str) -> None:
                await channel.unary_unary(method)(b"", timeout=10, metadata=metadata)

            async def stream() -> None:
                async for _ in channel.unary_stream(f"/{SERVICE}/Encode")(b"", timeout=10, metadata=metadata):
                    pass

            async def reflect() -> None:
                new_stub: Any = reflection_pb2_grpc.ServerReflectionStub
                call = new_stub(channel).ServerReflectionInfo(timeout=10, metadata=metadata)
                await call.read()  # nothing was sent: the refusal waits for nothing

            for call in (unary(f"/{SERVICE}/Info"), unary("/no.such/Method"), stream(), reflect()):
                with pytest.raises(grpc.aio.AioRpcError, match=words) as raised:
                    await call
                assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert ALICE[:-1] not in str(raised.value.details())

    asyncio.run(run())
    assert ALICE[:-1] not in caplog.text


def test_probes_need_no_token_and_tools_do(token_file: Path) -> None:
    async def run() -> None:
        async with serving(None, BearerTokens(token_file)) as address, grpc.aio.insecure_channel(address) as channel:
            new_health: Any = health_pb2_grpc.HealthStub
            health = new_health(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
            new_stub: Any = reflection_pb2_grpc.ServerReflectionStub
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            metadata = [("authorization", f"bearer {BOB}")]
            listed = await new_stub(channel).ServerReflectionInfo(iter([request]), timeout=10, metadata=metadata).read()
            assert SERVICE in [service.name for service in listed.list_services_response.service]

    asyncio.run(run())


def test_tokens_are_replaced_while_the_server_runs(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    new = "carols-token-0123456789"

    def replace() -> None:
        token_file.write_text(f"carol:{new}\n")

    async def run() -> None:
        async with serving(None, BearerTokens(token_file)) as address:
            assert await version(address, token=ALICE) == "9.9"
            replace()
            assert await version(address, token=new) == "9.9"
            assert await refusal(version(address, token=ALICE)) == "UNAUTHENTICATED"

    asyncio.run(run())
    assert not any(secret in caplog.text for secret in (ALICE, new))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_text("dave:too-few\n"), "line 1: a token has"),
        (lambda path: path.write_text("# nobody\n"), "no token"),
        (lambda path: path.write_text(""), "no token"),
        (lambda path: path.chmod(0o644), "mode 0644"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), os.mkfifo(path, 0o600)), "not a regular file"),
    ],
)
def test_a_token_file_that_will_not_do_lets_nobody_in(
    token_file: Path, spoil: Callable[[Path], object], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After a moment: an editor that writes in place empties it first."""
    caplog.set_level(logging.INFO)
    now = 0.0
    tokens = BearerTokens(token_file, clock=lambda: now)
    metadata, content = [("authorization", f"Bearer {ALICE}")], token_file.read_text()
    spoil(token_file)
    assert tokens.name_of(metadata) == "alice"
    now = 1.9
    assert tokens.name_of(metadata) == "alice"
    now = 2.1
    assert tokens.name_of(metadata) is None
    now = 3600.0
    assert tokens.name_of(metadata) is None
    warning, error = caplog.records
    assert (warning.levelno, error.levelno) == (logging.WARNING, logging.ERROR)
    assert words in warning.getMessage() and words in error.getMessage()
    assert "too-few" not in caplog.text
    token_file.unlink(missing_ok=True)
    token_file.write_text(content)
    token_file.chmod(0o600)
    assert tokens.name_of(metadata) == "alice", "mended, it is taken up"


def test_a_token_that_is_withdrawn_while_nobody_calls_is_not_let_in_by_the_next_call(
    token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "_WATCH_S", 0.001)
    now = 0.0
    looks: list[float] = []

    def clock() -> float:
        looks.append(now)
        return now

    tokens = BearerTokens(token_file, clock=clock)
    token_file.unlink()

    async def idle() -> None:
        nonlocal now
        watching = asyncio.create_task(tokens.watch())
        while not looks:  # the file's absence is noticed although nobody calls
            await asyncio.sleep(0.001)
        now = 2.1
        watching.cancel()

    asyncio.run(asyncio.wait_for(idle(), 10))
    assert tokens.name_of([("authorization", f"Bearer {ALICE}")]) is None


def test_a_token_file_that_is_being_written_turns_nobody_away(token_file: Path) -> None:
    now = 0.0
    tokens = BearerTokens(token_file, clock=lambda: now)
    metadata, content = [("authorization", f"Bearer {ALICE}")], token_file.read_text()
    for _ in range(3):
        token_file.write_text("")
        assert tokens.name_of(metadata) == "alice"
        now += 1.5
        token_file.write_text(content)
        assert tokens.name_of(metadata) == "alice"
        now += 1.5


def test_an_expired_certificate_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificates = Certificates(tmp_path / "ours")
    now = datetime.now(UTC)
    for ends, words in (
        (now - timedelta(days=1), "expired at"),
        (now + timedelta(days=2), "expires at"),
        (now + timedelta(days=90), None),
    ):
        issued = certificates.authority.issue_cert("localhost", not_after=ends)
        certificates.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        certificates.key.write_bytes(issued.private_key_pem.bytes())
        caplog.clear()
        server_credentials(certificates.cert, certificates.key, None)
        warnings = [record.getMessage() for record in caplog.records]
        assert len(warnings) == (words is not None)
        if words:
            assert warnings[0].startswith("--tls-cert: ") and words in warnings[0]
            assert f"{ends:%Y-%m-%d %H:%M}" in warnings[0]


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        (("0.0.0.0:50051",), "whoever reaches 0.0.0.0:50051 may call"),
        (("127.0.0.1:50051", "[::]:50051"), "whoever reaches [::]:50051 may call"),
        (("127.0.0.1:50051", "unix:/run/epd.sock"), None),
    ],
)
def test_an_open_port_in_plain_text_is_warned_of(
    listen: tuple[str, ...], words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(artifact=Path("a"), listen=listen)
    warn_of_plaintext(settings, encrypted=False)
    assert [words in record.getMessage() for record in caplog.records] == ([True] if words else [])
    warn_of_plaintext(settings, encrypted=True)
    assert len(caplog.records) == bool(words)


@pytest.mark.parametrize(
    ("mode", "listen", "tokens", "warned"),
    [
        ("0600", "unix:/run/epd.sock", None, False),
        ("0660", "unix:/run/epd.sock", None, False),
        ("0777", "unix:/run/epd.sock", None, True),
        ("0662", "unix:/run/epd.sock", None, True),
        ("0777", "unix:/run/epd.sock", Path("tokens"), False),
        ("0777", "127.0.0.1:1", None, False),
    ],
)
def test_a_socket_that_every_user_may_use_is_warned_of(
    mode: str, listen: str, tokens: Path | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_open_sockets(Settings(artifact=Path("a"), listen=(listen,), socket_mode=mode, token_file=tokens))
    assert [f"--socket-mode {mode}" in record.getMessage() for record in caplog.records] == [True] * warned


@pytest.mark.parametrize(
    ("mode", "open_to_others"),
    [(0o600, False), (0o400, False), (0o440, False), (0o640, False), (0o644, True), (0o620, True), (0o602, True)],
)
def test_a_token_file_that_others_can_use_is_refused(token_file: Path, mode: int, open_to_others: bool) -> None:
    token_file.chmod(mode)
    if open_to_others:
        with pytest.raises(SecurityError, match=f"^--token-file: .* is open to other users .mode {mode:04o}.: chmod"):
            BearerTokens(token_file)
    else:
        assert BearerTokens(token_file).name_of([("authorization", f"Bearer {ALICE}")]) == "alice"


def test_a_mounted_secret_is_read_and_followed_through_its_links(tmp_path: Path) -> None:
    """Kubernetes turns one link to another directory; the file's own path never changes."""
    for version_name, token in (("v1", ALICE), ("v2", BOB)):
        (tmp_path / version_name).mkdir()
        (tmp_path / version_name / "tokens").write_text(f"caller:{token}")
        (tmp_path / version_name / "tokens").chmod(0o440)
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "tokens").symlink_to("..data/tokens")
    tokens = BearerTokens(tmp_path / "tokens")
    assert tokens.name_of([("authorization", f"Bearer {ALICE}")]) == "caller"
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").rename(tmp_path / "..data")
    assert tokens.name_of([("authorization", f"Bearer {ALICE}")]) is None
    assert tokens.name_of([("authorization", f"Bearer {BOB}")]) == "caller"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no token"),
        (b"# alice:" + ALICE.encode(), "holds no token"),
        (b"\nalice:fifteen-letters", "line 2: a token has at least 16"),
        (b"alice: with spaces in between it", "line 1: a token has"),
        (b"the boss:" + ALICE.encode(), "line 1: a name has"),
        (b":" + ALICE.encode(), "line 1: a name has"),
        (b"\xff\xfe" + ALICE.encode(), "not UTF-8"),
        (ALICE.encode() * 60_000, "has over 1048576 bytes"),
    ],
)
def test_a_token_file_that_will_not_do_is_told_without_its_tokens(token_file: Path, content: bytes, words: str) -> None:
    token_file.write_bytes(content)
    with pytest.raises(SecurityError, match=f"^--token-file: .*{words}") as raised:
        BearerTokens(token_file)
    assert ALICE not in str(raised.value) and "fifteen" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_names_of_tokens_are_those_of_their_lines() -> None:
    assert list(named_tokens(f"alice:{ALICE}\n\n{BOB} # b\n a : {BOB}")) == [
        ("alice", ALICE),
        ("line 3", BOB),
        ("a", BOB),
    ]


def test_callers_files_that_will_not_do_are_told_by_their_flags(ours: Certificates, tmp_path: Path) -> None:
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.write_text("# none\n")
    makes: list[tuple[Callable[[], Any], str]] = [
        (lambda: client_credentials(nowhere, None, None), "^--tls-ca: .* cannot be read: No such file"),
        (lambda: client_credentials(None, ours.cert, None), "^--tls-cert and --tls-key go together"),
        (lambda: client_credentials(None, None, ours.key), "^--tls-cert and --tls-key go together"),
        (lambda: client_credentials(None, ours.cert, nowhere), "^--tls-key: .* cannot be read"),
        (lambda: client_credentials(None, None, None, "short"), "^a token has at least 16"),
        (lambda: read_token(nowhere), "^--token-file: .* cannot be read: No such file"),
        (lambda: read_token(empty), "^--token-file: .* holds no token"),
        (lambda: EncoderClient("localhost:1", token="with\nline breaks, and spaces"), "^a token has"),
    ]
    for make, message in makes:
        with pytest.raises(CredentialsError, match=message):
            make()


def test_commands_call_over_tls_and_with_a_token(
    ours: Certificates, token_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        served = server_credentials(ours.cert, ours.key, ours.ca)
        async with serving(served, BearerTokens(token_file)) as address:
            mutual = ["--tls-ca", str(ours.ca), "--tls-cert", str(ours.cert), "--tls-key", str(ours.key)]
            with_token = ["info", "--server", address, *mutual, "--token-file", str(token_file)]
            assert await asyncio.to_thread(main, with_token) == 0
            assert "9.9" in capsys.readouterr().out
            assert await asyncio.to_thread(main, ["info", "--server", address, *mutual]) == 1
            assert "wants a token" in capsys.readouterr().err
            half = ["--tls-cert", str(ours.cert)]
            assert await asyncio.to_thread(main, ["info", "--server", address, *half]) == 2
            assert capsys.readouterr().err == "--tls-cert and --tls-key go together; one of them is missing\n"

    asyncio.run(run())
