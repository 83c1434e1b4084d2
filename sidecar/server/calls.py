"""Every call from its start to its end: who calls, what the call holds, and what is told of it in log, metrics and traces."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from grpc_status import rpc_status

from sidecar.engine.memory import Memory
from sidecar.engine.observer import StageTimes
from sidecar.engine.scheduler import Encoded
from sidecar.errors import EncoderError, Fault, ShuttingDown, fault_of
from sidecar.monitoring.metrics import EMBEDDING, Metrics
from sidecar.monitoring.request_log import RequestRecord
from sidecar.monitoring.tracing import RequestSpan, Tracing
from sidecar.server.callers import Caller, Metadata, caller_of
from sidecar.server.load_report import trailing_metadata
from sidecar.server.model import Model
from sidecar.vision.dtypes import Array

logger = logging.getLogger(__name__)

_SERVICE = "epd.encoder.v1.Encoder"
_NO_TIME = StageTimes()
_MOST_METHOD = 100
# So many times the limit is where clients that hold nothing are refused too.
_NEWCOMERS = 2
# How long a caller may take to be told that its call is over.
_TELLING_S = 0.5
# Faults of this server, as against what a caller did or may try again.
_OURS = ("INTERNAL", "LANE_FAULT", "NO_LANE")


@dataclass(slots=True, eq=False)
class Call:
    """One call. `model` answers it to its end, whatever is loaded meanwhile; `leases` are those it has handed out; `task`
    carries it out."""

    calls: Calls
    context: Any
    model: Model
    caller: Caller
    record: RequestRecord
    span: RequestSpan
    task: asyncio.Task[Any] | None = None
    leases: list[str] = field(default_factory=list)
    held_bytes: int = 0
    _rows: Counter[int] = field(
        default_factory=Counter
    )  # answers that wait with rows in ordinary memory, by the rows' id

    def admit(self, size: int) -> None:
        """Hold a request's bytes.

        Raises:
            Overloaded: if the calls in hand hold too much. One alone passes, whatever its size.
        """
        # One more for a client that holds nothing: nobody takes all of it from the others.
        spare = 0 if self.calls.held_by[self.caller.client] else (_NEWCOMERS - 1) * self.calls.memory.most
        self.calls.memory.check(size - spare)
        self.hold(size)

    def hold(self, size: int) -> None:
        """Count bytes against the budget until `give_back`, or the end of the call."""
        self.held_bytes += size
        self.calls.memory.take(size)
        self.calls.held_by[self.caller.client] += size

    def give_back(self, size: int) -> None:
        """Return bytes that the call no longer holds to the budget."""
        self.held_bytes -= size
        self.calls.memory.give(size)
        self.calls.held_by[self.caller.client] -= size
        if not self.calls.held_by[self.caller.client]:
            del self.calls.held_by[self.caller.client]

    def hold_rows(self, rows: Array) -> None:
        """Count an answer's rows; equal items of one call share them, and they count once."""
        if not self._rows[id(rows)]:
            self.hold(rows.nbytes)
        self._rows[id(rows)] += 1

    def give_back_rows(self, rows: Array) -> None:
        """Return an answer's rows to the budget, unless another answer waits with the same."""
        self._rows[id(rows)] -= 1
        if not self._rows[id(rows)]:
            del self._rows[id(rows)]
            self.give_back(rows.nbytes)

    async def abort(self, error: EncoderError) -> NoReturn:
        """End the call with an error."""
        fault = fault_of(error)
        self.record.code = fault.code.name
        self.span.failed(fault.code, fault.message)
        self.calls.metrics.refused(fault.reason)
        status = rpc_status.to_status(fault.status())
        trailing = (*status.trailing_metadata, *_report(self.model))
        await self.context.abort(status.code, status.details, trailing)
        raise AssertionError("abort returns never")

    def answered(self, index: int, encoded: Encoded | None, fault: Fault | None) -> None:
        """An item has its answer."""
        record, metrics = self.record, self.calls.metrics
        if encoded is None:
            assert fault is not None
            ours = fault.reason in _OURS
            record.failed += ours
            record.refused += not ours
            metrics.answered(fault.reason, "encoded")
            if ours:
                metrics.error(fault.reason, fault.message)
            self.span.item(index, fault.reason, _NO_TIME)
            return
        record.answered += 1
        record.cached += encoded.cached
        record.coalesced += encoded.coalesced
        record.add(encoded.times)
        metrics.answered(EMBEDDING, "cache" if encoded.cached else "coalesced" if encoded.coalesced else "encoded")
        self.span.item(index, EMBEDDING, encoded.times)


class Calls:
    """Those under way, and what they hold together."""

    def __init__(
        self,
        metrics: Metrics,
        tracing: Tracing,
        memory: Memory,
        name_of: Callable[[Metadata], str | None] | None = None,
    ) -> None:
        """`name_of`: the name of a caller's token."""
        self.metrics = metrics
        self.memory = memory
        self.held_by: Counter[str] = Counter()  # by client
        self._under_way: set[Call] = set()
        self._ended = asyncio.Event()
        self._tracing = tracing
        self._name_of = name_of

    def turned_away(self, method: str, peer: str) -> None:
        """A call had no token of this server's, and was never begun."""
        code = grpc.StatusCode.UNAUTHENTICATED.name
        # What it asked for is its own invention.
        RequestRecord(method=method[:_MOST_METHOD], peer=peer, code=code).log(logger)
        self.metrics.refused(code)
        self.metrics.request("other", code, 0.0)

    @contextmanager
    def begin(self, method: str, context: Any, bytes_in: int, model: Model) -> Iterator[Call]:
        started = time.perf_counter()
        caller = caller_of(context, self._name_of)
        record = RequestRecord(method=method, peer=caller.peer, client=caller.client, bytes_in=bytes_in)
        context.set_trailing_metadata(_report(model))
        with self._tracing.request(context.invocation_metadata() or (), f"{_SERVICE}/{method}") as span:
            call = Call(self, context, model, caller, record, span, asyncio.current_task())
            self._under_way.add(call)
            record.trace_id = span.trace_id
            try:
                yield call
            except (asyncio.CancelledError, GeneratorExit):
                # Nobody is left to use or release them.
                if call.leases and model.scheduler.store:
                    model.scheduler.store.release(call.leases)
                if record.code == "OK":  # else it was sent away
                    record.code = grpc.StatusCode.CANCELLED.name
                raise
            except Exception as error:
                if record.code == "OK":
                    record.code = grpc.StatusCode.UNKNOWN.name
                    logger.error("%s failed", method, exc_info=error)
                raise
            finally:
                self._under_way.discard(call)
                self._ended.set()
                call.give_back(call.held_bytes)
                record.ms = (time.perf_counter() - started) * 1e3
                record.log(logger)
                self.metrics.request(method, record.code, record.ms / 1e3)

    @property
    def idle(self) -> bool:
        """Whether no call is under way."""
        return not self._under_way

    async def finished(self) -> None:
        """Return once no call is under way."""
        while self._under_way:
            await self._one_ends()

    async def ended(self, model: Model) -> None:
        """Return once no call is under way that began with this model."""
        while self._of(model):
            await self._one_ends()

    async def send_away(self, model: Model) -> int:
        """End the calls that began with this model with UNAVAILABLE, and return how many they were.

        A caller who does not read finds it behind what was on its way already.
        """
        calls = self._of(model)
        await asyncio.gather(*map(_send_away, calls))
        return len(calls)

    def _of(self, model: Model) -> list[Call]:
        return [call for call in self._under_way if call.model is model]

    async def _one_ends(self) -> None:
        self._ended.clear()
        await self._ended.wait()


async def _send_away(call: Call) -> None:
    # gRPC's exception for an aborted call, and its error where the call ends in this moment, have no common class.
    with suppress(Exception):
        async with asyncio.timeout(_TELLING_S):
            await call.abort(
                ShuttingDown("the model that this call began with has been replaced; send the items again")
            )
    if call.task is not None:
        call.task.cancel()


def _report(model: Model) -> tuple[tuple[str, str | bytes], ...]:
    return trailing_metadata(model.scheduler.lanes)
