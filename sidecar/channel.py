"""How a client reaches a sidecar: its channel's settings, gRPC's errors in words of ours, and waiting until it is ready."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from sidecar.replies import ClientError, EncodeError, ProtocolError, RequestTooLargeError, item_error

# gRPC's own balancing by the servers' load reports. The default blackout, 10 s during which a new server's reports are
# not yet believed, is longer than a burst of requests.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [
        {"weighted_round_robin": {"blackoutPeriod": "1s", "weightUpdatePeriod": "1s"}},
        {"round_robin": {}},
    ]
}
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    # gRPC would take `http_proxy` for sidecars too, whose exceptions (`no_proxy`) are for names of the world outside.
    ("grpc.enable_http_proxy", 0),
    # The server's limit decides what a request may weigh. Replies come in chunks below gRPC's default of 4 MB.
    ("grpc.max_send_message_length", -1),
    # A server that has frozen, or whose host vanished without a word, is noticed within 25 s during a call. Servers allow a ping
    # in 10 s.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A sidecar that restarts is found again within 5 s; gRPC's default may sleep for 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)
# For a channel over many sidecars on which whole items are encoded, one a call, and nothing is left behind in a store.
FLEET_OPTIONS: tuple[tuple[str, Any], ...] = (
    *((name, value) for name, value in CHANNEL_OPTIONS if name != "grpc.service_config"),
    # Those that do not say SERVING get no calls. Not for other clients: leases are given back to a sidecar that drains.
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG | {"healthCheckConfig": {"serviceName": ""}})),
)
RELEASE_S = 5.0
_READY_POLL_S = 0.2


class _FailedCall(Protocol):
    """What a sync and an asyncio RpcError have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...


class Patience:
    """How long `wait_ready` goes on, and what it says when it gives up."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ends = time.monotonic() + timeout_s
        self._last = "it did not answer"

    def remaining_s(self) -> float:
        return max(self._ends - time.monotonic(), 0.001)

    def is_serving(self, answer: health_pb2.HealthCheckResponse) -> bool:
        self._last = f"it says {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def endure(self, failure: ClientError) -> None:
        """Remember a failure that waiting may mend; raise any other."""
        if not isinstance(failure, EncodeError) or failure.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            raise failure
        if failure.code == "UNAVAILABLE":  # the other one is this wait's own end and tells nothing
            self._last = failure.message

    def pause_s(self) -> float:
        """How long to sleep before the next try.

        Raises:
            EncodeError: if there is no time for one.
        """
        remaining = self._ends - time.monotonic()
        if remaining <= 0:
            raise EncodeError("DEADLINE_EXCEEDED", f"the server is not ready after {self._timeout_s:g} s: {self._last}")
        return min(_READY_POLL_S, remaining)


def check_target(address: str | None, channel: object | None) -> None:
    if (address is None) == (channel is None):
        raise ValueError("a client needs either an address or a channel")


@contextmanager
def own_errors() -> Generator[None, None, None]:
    """Raise gRPC's errors as this package's."""
    try:
        yield
    except grpc.RpcError as error:
        raise failure_of(error) from error


def failure_of(error: grpc.RpcError) -> ClientError:
    call = cast(_FailedCall, error)
    try:
        status = rpc_status.from_call(cast(Any, error))
    except (ValueError, DecodeError):  # details that contradict the status, or are none
        status = None
    if status is not None:
        return item_error(status).as_exception()
    code, message = call.code().name, call.details() or "no reason given"
    # Whoever cancels its own call gets no error of gRPC's; a server does this to calls that reach it in its last moment.
    if code == "CANCELLED":
        return EncodeError("UNAVAILABLE", f"the call was ended before it was taken up: {message}")
    # gRPC reports both limits with one code, and only its words, which give both sizes, tell which side refused.
    if code == "RESOURCE_EXHAUSTED" and "message larger than max" in message:
        if "CLIENT:" in message:
            return ProtocolError(f"the server sent a message that is too large to receive: {message}")
        advice = "send fewer items in a call, smaller pictures, or encoded ones instead of pixels"
        return RequestTooLargeError(code, f"the request is larger than the server takes; {advice} ({message})")
    return EncodeError(code, message)
