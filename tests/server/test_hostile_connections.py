"""What callers can do with connections alone, without a token and without a request."""

from __future__ import annotations

import logging
import re
import time
import urllib.request
from collections import Counter

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hostile import connect, resetting
from servers import Server, StartServer

from sidecar.monitoring.metrics import Metrics
from sidecar.server.arrivals import Arrivals
from sidecar.server.listening import connections_for
from sidecar.settings import Settings

MOST_CONNECTIONS = 12


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server(
        *("--max-connections", str(MOST_CONNECTIONS), "--connection-idle-seconds", "1", "--warm-up-seconds", "0"),
        *("--threads", "1", "--metrics-listen", "127.0.0.1:0"),
    )


def metric(server: Server, sample: str) -> float:
    found = re.search(r"status page on (\S+)", server.log.read_text())
    assert found
    with urllib.request.urlopen(f"{found[1]}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return float(next(line for line in text.splitlines() if line.startswith(f"{sample} ")).rpartition(" ")[2])


def check(address: str, timeout_s: float = 10) -> str:
    """What grpc.health.v1 answers on a connection of its own."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def test_calls_beside_a_connection_that_resets_streams_are_answered(server: Server) -> None:
    """HTTP/2 rapid reset: the queue of all callers is not one caller's to fill."""
    sample = 'epd_encoder_calls_arrived_total{service="encoder"}'
    before = metric(server, sample)
    outcomes: Counter[str] = Counter()
    with resetting(server.address, "/epd.encoder.v1.Encoder/Encode"), server.client() as client:
        time.sleep(0.5)  # until its streams have piled up
        for _ in range(15):
            outcomes[check(server.address)] += 1
            assert client.info(timeout_s=10).version
    assert outcomes == {"OK": 15}
    assert metric(server, sample) - before > 1000, "what was reset is counted"


def test_idle_connections_make_room_for_new_callers(server: Server) -> None:
    held = [connect(server.address) for _ in range(MOST_CONNECTIONS + 5)]
    try:
        assert check(server.address, timeout_s=0.5) == "UNAVAILABLE", "there is no room yet"
        assert check(f"unix:{server.socket}") == "OK", "each address has room of its own"
        ends = time.monotonic() + 15
        while check(server.address) != "OK":
            assert time.monotonic() < ends
            time.sleep(0.1)
    finally:
        for connection in held:
            connection.close()


def test_connections_leave_descriptors_for_everything_else() -> None:
    one = Settings(artifact="a", listen=("127.0.0.1:0",))  # type: ignore[arg-type]
    two = Settings(artifact="a", listen=("127.0.0.1:0", "unix:/s"))  # type: ignore[arg-type]
    assert connections_for(one, 256) == 128
    assert connections_for(two, 256) == 64
    assert connections_for(one, 65_536) == 1024
    assert connections_for(one, 64) == 8


def test_a_flood_of_calls_without_requests_is_told_once_a_window(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    metrics = Metrics()
    arrivals = Arrivals(metrics, clock=lambda: now)

    def arrive(calls: int, answered: int) -> None:
        nonlocal now
        for _ in range(calls):
            arrivals.count("/epd.encoder.v1.Encoder/Encode")
        for _ in range(answered):
            metrics.request("Encode", "OK", 0.0)
        now += 10

    with caplog.at_level(logging.WARNING):
        arrive(30_000, 30_000)  # many, and each a request: that is load
        arrive(30_000, 10)
        arrive(1, 1)
        arrive(1, 1)
    (record,) = caplog.records
    assert record.getMessage().startswith("29990 of 30000 calls in 10 s ended before their request arrived")
