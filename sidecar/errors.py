"""What can go wrong with an item or a request, and the one table that turns it into a gRPC status.

The way of an item, and where it may leave it:

    message → Invalid…            the caller must change something
    fetch   → UrlUnreachable      the URL's server did not give the picture
    queue   → Overloaded          the caller may come back
    run     → LaneFault           this server's runtime failed
    reply   → Embeddings that are not finite are a LaneFault too

Only the messages of these classes reach a client. Anything else is answered as an internal error without details, and the
log has the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from sidecar.vision.grid import GridError
from sidecar.vision.pixels import PixelError

_DOMAIN = "epd.encoder.v1"


class EncoderError(Exception):
    """Base of everything that a client is told about."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"


class InvalidRequest(EncoderError):
    """The request as a whole cannot be served."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class InvalidItem(EncoderError):
    """The item cannot be encoded, now or later."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ITEM"


class TooLarge(InvalidItem):
    """The item is over one of this server's limits."""

    reason = "ITEM_TOO_LARGE"


class UrlRefused(InvalidItem):
    """What the item's URL names is not fetched, or what came from there is not taken."""

    reason = "URL_REFUSED"


class UrlUnreachable(EncoderError):
    """The URL's server did not give the picture this time; another try may get it."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "URL_UNREACHABLE"


class Overloaded(EncoderError):
    """The queue is full; the same item may pass after `retry_after_s` seconds."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShuttingDown(EncoderError):
    """The server takes no new work."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "SHUTTING_DOWN"


class CannotFinish(EncoderError):
    """The item would not be done before its deadline."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_CANNOT_BE_MET"


class NoLane(EncoderError):
    """Every lane is out of service; they are tried again after `retry_after_s` seconds."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NO_LANE"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotStored(EncoderError):
    """The store has no embedding under this key."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "NOT_STORED"


class LaneFault(EncoderError):
    """The runtime failed on this item; the message is written for the client and says nothing of the inside."""

    code = grpc.StatusCode.INTERNAL
    reason = "LANE_FAULT"


@dataclass(frozen=True, slots=True)
class Fault:
    """An error as a client sees it."""

    code: grpc.StatusCode
    reason: str
    message: str
    retry_after_s: float | None = None

    def status(self, metadata: Mapping[str, str] | None = None) -> status_pb2.Status:
        """As google.rpc.Status: ErrorInfo says what was wrong, RetryInfo when to come back."""
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=_DOMAIN, metadata=dict(metadata or {}))
        details = [_packed(info)]
        if self.retry_after_s is not None:
            delay = Duration()
            delay.FromMilliseconds(max(1, round(self.retry_after_s * 1000)))
            details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        return status_pb2.Status(code=self.code.value[0], message=self.message, details=details)


def fault_of(error: BaseException) -> Fault:
    """The table. An error that is not in it is ours: its text stays in the log."""
    if isinstance(error, (Overloaded, NoLane)):
        return Fault(error.code, error.reason, str(error), error.retry_after_s)
    if isinstance(error, EncoderError):
        return Fault(error.code, error.reason, str(error))
    if isinstance(error, (PixelError, GridError)):
        return Fault(InvalidItem.code, InvalidItem.reason, str(error))
    return Fault(grpc.StatusCode.INTERNAL, "INTERNAL", "internal error; the server's log has the details")


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
