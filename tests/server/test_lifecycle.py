"""A server's life: what it takes to start, and how it ends without losing what it accepted."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pictures import encoded, picture
from servers import ROOT, Server, exit_code, spawn

from sidecar.client import Embedding, EncodeError, EncoderClient, ItemError, Result
from sidecar.items import Item, image_item, rgb_image_item
from sidecar.pb import encoder_pb2 as pb
from sidecar.vision.dtypes import DType

SMALL = image_item(encoded(picture(56, 56)))

StartServer = Callable[..., Server]
_numbers = itertools.count()


def slow() -> Item:
    """4096 patches, half a second or more, that no other item equals: what is known already takes no time."""
    return rgb_image_item(picture(28 * 32, 28 * 32), key=f"slow-{next(_numbers)}")


def slower() -> Item:
    """16384 patches: several seconds."""
    return rgb_image_item(picture(28 * 64, 28 * 64), key=f"slower-{next(_numbers)}")


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def refused_start(artifact: Path, directory: Path, listen: str, *flags: str) -> str:
    """The log of a server that ends with code 2 instead of serving."""
    process, log = spawn(artifact, directory, *flags, listen=listen)
    assert exit_code(process) == 2, log.read_text()
    return log.read_text()


def accepted(server: Server, work: Future[list[Result]]) -> None:
    """Return once a call that was just made is being worked on."""
    # The log says nothing of calls under way, so look at what they cost: the process is busy.
    stat = Path(f"/proc/{server.process.pid}/stat")

    def ticks() -> int:
        fields = stat.read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before, ends = ticks(), time.monotonic() + 20
    while ticks() < before + 10:  # a tenth of a second of processor time
        assert not work.done() and time.monotonic() < ends, "the call was to take longer"
        time.sleep(0.01)


def test_a_port_in_use_is_told_before_anything_is_loaded(server: Server, toy_artifact: Path, tmp_path: Path) -> None:
    log = refused_start(toy_artifact, tmp_path, server.address)
    assert log == (
        f"sidecar serve: cannot listen on {server.address}: it is in use, or not an address of this machine\n"
    )
    with server.client() as client:
        assert isinstance(client.encode([SMALL])[0], Embedding)


def test_the_socket_of_a_living_server_is_not_taken(server: Server, toy_artifact: Path, tmp_path: Path) -> None:
    log = refused_start(toy_artifact, tmp_path, f"unix:{server.socket}")
    assert log == f"sidecar serve: another server is listening on unix:{server.socket}\n"
    with EncoderClient(f"unix:{server.socket}") as client:
        assert client.info(timeout_s=10)


def test_an_address_that_cannot_be_is_refused(toy_artifact: Path, tmp_path: Path) -> None:
    log = refused_start(toy_artifact, tmp_path, f"unix:{tmp_path}/missing/sock")
    assert "its directory does not exist" in log and log.count("\n") == 1


def test_a_socket_file_that_a_killed_server_left_is_replaced(start_server: StartServer, tmp_path: Path) -> None:
    left = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(left))
    assert left.is_socket()  # and nobody listens
    server = start_server("--listen", f"127.0.0.1:0,unix:{left}")
    with EncoderClient(f"unix:{left}") as client:
        assert isinstance(client.encode([SMALL], timeout_s=20)[0], Embedding)
    assert server.terminate() == 0
    assert not left.exists()


def test_nothing_it_makes_is_open_to_others_whatever_the_umask(start_server: StartServer, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "run").mkdir()
        flags = ("--cache-dir", str(tmp_path / "run" / "cache"), "--listen", f"127.0.0.1:0,unix:{tmp_path}/run/sock")
        server = start_server(*flags, "--warm-up-seconds", "0")
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "run").rglob("*") if path.lstat().st_mode & 0o022]
    assert any((tmp_path / "run" / "cache").rglob("*")) and made == []
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600


def test_a_socket_may_be_for_a_group(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("--listen", f"127.0.0.1:0,unix:{tmp_path}/sock", "--socket-mode", "0660")
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o660


def test_sigterm_finishes_what_was_accepted(start_server: StartServer, background: ThreadPoolExecutor) -> None:
    server = start_server("--threads", "1")
    with server.client() as client:
        work = background.submit(client.encode, [slow(), slow(), SMALL], 60)
        accepted(server, work)
        assert server.terminate() == 0
        assert [type(result) for result in work.result(5)] == [Embedding] * 3
        with pytest.raises(EncodeError, match="UNAVAILABLE"):
            client.encode([SMALL], timeout_s=2)
    assert server.log.read_text().endswith("stopped\n")


def test_sigterm_while_it_loads_is_a_clean_end(toy_artifact: Path, tmp_path: Path) -> None:
    """The first process of a container does not die of a signal that it does not handle."""
    process, log = spawn(toy_artifact, tmp_path, listen=f"unix:{tmp_path / 'sock'}")
    ends = time.monotonic() + 30
    while not (tmp_path / "sock").exists() and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.005)
    said = log.read_text()
    process.terminate()
    assert exit_code(process) == 0, log.read_text()
    assert "ready" not in said


def test_a_health_watcher_is_told_and_does_not_hold_up_the_end(start_server: StartServer) -> None:
    server = start_server("--drain-seconds", "20")
    with server.channel() as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        started = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - started < 5
        assert [answer.status for answer in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]


def test_a_drain_ends_when_its_time_is_over(start_server: StartServer, background: ThreadPoolExecutor) -> None:
    server = start_server("--drain-seconds", "0.2", "--threads", "1")
    with server.client() as client:
        work = background.submit(client.encode, [slower(), slower()], 60)
        accepted(server, work)
        started = time.monotonic()
        code = server.terminate()
        assert time.monotonic() - started < 4
        with pytest.raises(EncodeError, match="UNAVAILABLE"):
            work.result(5)
    # 1 where a run was still going on, 0 where the item had got no further than preprocessing.
    endings = {0: " stopped\n", 1: "its callers were told to go elsewhere\n"}
    assert server.log.read_text().endswith(endings[code])


def test_cancelled_calls_do_not_run(server: Server, background: ThreadPoolExecutor) -> None:
    """One slow item runs; six behind it are given up, by cancelling or by a deadline; the next waits for the one only."""
    logged = len(server.log.read_text())
    with server.client() as client, server.stub() as stub:
        first = background.submit(client.encode, [slow()], 60)
        accepted(server, first)
        calls = [stub.Encode(pb.EncodeRequest(items=[slow(), slow()])) for _ in range(2)]
        calls.append(stub.Encode(pb.EncodeRequest(items=[slow(), slow()]), timeout=0.15))
        time.sleep(0.15)
        for call in calls:
            call.cancel()
        (late,) = client.encode([SMALL], timeout_s=60)
        (early,) = first.result(60)
        assert isinstance(late, Embedding) and isinstance(early, Embedding)
        assert late.times.queue_ms < 1.5 * early.times.run_ms
    # The third one's items may have been refused at once, since they could not be done in time.
    assert server.logged("items=2 answered=0 failed=0", 3, since=logged).count("items=2 answered=0 failed=0") == 3


def test_overload_says_when_to_come_back(start_server: StartServer, background: ThreadPoolExecutor) -> None:
    server = start_server("--max-queue-patches", "5000", "--threads", "1")
    with server.client() as client:
        client.encode([slow()])  # from here on it knows how fast it is
        first = background.submit(client.encode, [slow()], 60)
        accepted(server, first)
        refused, served = client.encode([slow(), SMALL], timeout_s=60)
        assert isinstance(served, Embedding)  # the small one found room
        assert isinstance(refused, ItemError)
        assert refused.code == "RESOURCE_EXHAUSTED"
        assert "this item has 4096, the limit is 5000" in refused.message
        tries = 0
        while isinstance(refused, ItemError):  # who comes back when told to gets in before long
            assert refused.retry_delay_s is not None and 0 < refused.retry_delay_s < 30
            assert (tries := tries + 1) < 10
            time.sleep(refused.retry_delay_s)
            (refused,) = client.encode([slow()], timeout_s=60)
        assert isinstance(first.result(60)[0], Embedding)


def test_a_cache_that_cannot_be_written_costs_time_only(start_server: StartServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    server = start_server("--cache-dir", str(tmp_path / "file" / "cache"))
    assert "WARNING" in server.log.read_text() and "--cache-dir" in server.log.read_text()
    with server.client() as client:
        assert isinstance(client.encode([SMALL])[0], Embedding)
    assert server.terminate() == 0


def test_by_default_it_serves_what_the_checkpoint_computes_in(server: Server, start_server: StartServer) -> None:
    """--precision bf16, embeddings in the checkpoint's bfloat16: half the bytes, and the same rows within rounding."""
    narrow = start_server("--precision", "bf16", "--threads", "1")
    photo = rgb_image_item(picture(112, 140))
    with server.client() as client, narrow.client() as other:
        (exact,), (rounded,) = client.encode([photo]), other.encode([photo])
        info = other.info()
    assert isinstance(exact, Embedding) and isinstance(rounded, Embedding)
    assert (rounded.dtype, info.embedding_dtype) == (DType.BFLOAT16, pb.BFLOAT16)
    assert (rounded.lane.precision, info.lanes[0].precision) == ("bf16", "bf16")
    assert ", 1 threads, " in info.lanes[0].device
    assert rounded.fingerprint == exact.fingerprint  # interchangeable
    rows, reference = rounded.float32(), exact.float32()
    cosines = (rows * reference).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(reference, axis=1)
    assert cosines.min() > 0.998
    assert narrow.terminate() == 0


def test_a_client_that_comes_before_it_is_ready_waits_and_is_served(
    toy_artifact: Path, tmp_path: Path, start_server: StartServer
) -> None:
    process, log = spawn(toy_artifact, tmp_path, listen=f"unix:{tmp_path / 'sock'}")
    try:
        with EncoderClient(f"unix:{tmp_path / 'sock'}") as client:
            client.wait_ready(timeout_s=30)
            assert isinstance(client.encode([SMALL], timeout_s=20)[0], Embedding)
    finally:
        process.terminate()
        assert exit_code(process) == 0, log.read_text()


def test_a_call_beyond_what_may_be_held_is_told_to_come_back(
    start_server: StartServer, background: ThreadPoolExecutor
) -> None:
    server = start_server("--max-held-bytes", "1000000", "--threads", "1")
    with server.client() as client:
        work = background.submit(client.encode, [slower()], 60)  # alone it passes, whatever its size
        accepted(server, work)
        with pytest.raises(EncodeError, match="RESOURCE_EXHAUSTED.*calls in hand hold") as refused:
            client.encode([slower()], 60)
        assert refused.value.retry_delay_s == 1.0
        assert isinstance(work.result(60)[0], Embedding)
        assert isinstance(client.encode([slow()], 60)[0], Embedding), "what was held was not given back"


def test_a_wish_to_stop_that_comes_twice_at_once_is_one(start_server: StartServer) -> None:
    """As `timeout` and a shell send it: to the process and to its group."""
    server = start_server("--threads", "1")
    for _ in range(2):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert server.process.wait(60) == 0
    assert server.log.read_text().endswith("stopped\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_while_it_loads_it_never_says_that_it_is_ready(
    toy_artifact: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process, log = spawn(toy_artifact, tmp_path, listen=f"unix:{tmp_path / 'sock'}")
    ends = time.monotonic() + 30
    while "this process has" not in log.read_text():
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.005)
    process.send_signal(number)
    assert exit_code(process) == 0
    assert "told to stop while loading" in log.read_text() and "ready on" not in log.read_text()


def test_signals_during_its_imports_neither_end_it_nor_are_lost(toy_artifact: Path, tmp_path: Path) -> None:
    """SIGHUP asks a server to reload, and by default ends a process that has not said otherwise yet."""
    package = tmp_path / "numpy"  # what takes longest to import
    package.mkdir()
    (package / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process, log = spawn(toy_artifact, tmp_path, listen=f"unix:{tmp_path / 'sock'}", added=path)
    ends = time.monotonic() + 30
    while "importing" not in log.read_text():
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.005)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    assert process.poll() is None
    process.terminate()
    assert exit_code(process, 5) == 0, log.read_text()


def test_sighup_while_it_loads_reloads_once_it_is_ready(toy_artifact: Path, tmp_path: Path) -> None:
    process, log = spawn(toy_artifact, tmp_path, "--threads", "1", listen=f"unix:{tmp_path / 'sock'}")
    try:
        waiting = ("this process has", "loaded anew once", " anew: equal weights")
        for number, what in enumerate(waiting):
            ends = time.monotonic() + 30
            while what not in log.read_text():
                assert process.poll() is None and time.monotonic() < ends, log.read_text()
                time.sleep(0.005)
            if number == 0:
                process.send_signal(signal.SIGHUP)
    finally:
        process.terminate()
        assert exit_code(process) == 0, log.read_text()


def test_a_mistyped_variable_is_told() -> None:
    from sidecar.settings import Settings

    environment = {"EPD_TOKEN_FIEL": "tokens", "EPD_PRECISION": "bf16", "EPD_SERVER": "x", "PATH": "", "EPD_": "1"}
    assert Settings.unknown_variables(environment) == ["EPD_", "EPD_TOKEN_FIEL"]


def test_calls_without_a_token_are_seen(start_server: StartServer, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("mine:0123456789abcdef\n")
    tokens.chmod(0o600)
    server = start_server("--token-file", str(tokens), "--threads", "1")
    with server.client() as stranger, EncoderClient(server.address, token="0123456789abcdef") as known:
        with pytest.raises(EncodeError, match="UNAUTHENTICATED.*wants a token"):
            stranger.info(timeout_s=20)
        assert known.info(timeout_s=20)
    log = server.logged('client="token mine"')
    assert "method=/epd.encoder.v1.Encoder/Info" in log and "code=UNAUTHENTICATED" in log
    assert "0123456789abcdef" not in log
