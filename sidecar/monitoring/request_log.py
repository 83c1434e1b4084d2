"""The log: for people as `key=value`, for machines as one JSON object a line, and one line for each request.

Keys, peers and client names come from outside. Whatever they hold, a line stays a line: control characters are escaped, and
the lines of a traceback are indented, so that none of them can pass for a line of its own.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import warnings
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from sidecar.engine.observer import StageTimes
from sidecar.monitoring.log_writer import OWN, LogWriter

logger = logging.getLogger(__name__)

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")

_MOST_TEXT = 256
_PLAIN = re.compile(r"[\w.:/@+\[\]%-]+", re.ASCII)
# C0, DEL and C1 controls, lone surrogates, and what Unicode or a terminal takes for a new line or another direction.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FIELDS = "request_fields"


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What one call was and came to; filled in as it goes.

    items: asked for. answered: with an embedding. failed: with a fault of this server's. refused: with any other error.
    cached and coalesced: of those answered, from the store and from a neighbour's run. ms: the call's whole time; the stage
    times are sums over its items, which overlap.
    """

    method: str
    peer: str
    client: str = ""
    code: str = "OK"
    items: int = 0
    answered: int = 0
    failed: int = 0
    refused: int = 0
    cached: int = 0
    coalesced: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    ms: float = 0.0
    decode_ms: float = 0.0
    preprocess_ms: float = 0.0
    queue_ms: float = 0.0
    run_ms: float = 0.0
    publish_ms: float = 0.0
    trace_id: str = ""

    def add(self, times: StageTimes) -> None:
        """An item's stage times."""
        for stage in fields(times):
            setattr(self, stage.name, getattr(self, stage.name) + getattr(times, stage.name))

    def log(self, logger: logging.Logger) -> None:
        values = {field.name: _value(getattr(self, field.name)) for field in fields(self)}
        logger.info("request", extra={_FIELDS: values})


def configure_logging(level: str, format: LogFormat) -> None:
    """Send all logs to stderr; what was configured before is replaced.

    Python's warnings and exceptions that nobody catches go through the log too, so that each line has its form.

    Args:
        level: debug, info, warning or error, of this project's lines. Libraries' are taken from warning on: at finer levels they
            tell of callers' pictures, line by line.

    Raises:
        ValueError: if level or format is not known.
    """
    if format not in LOG_FORMATS:
        raise ValueError(f"must be one of {', '.join(LOG_FORMATS)}, got {format!r}")
    logging.getLogger(OWN).setLevel(level.upper())
    handler = LogWriter()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # Pillow warns of each odd picture that a caller sends, in words that differ, and Python remembers every one of them.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda raised: _log_uncaught(raised.exc_type, raised.exc_value, raised.exc_traceback)
    sys.unraisablehook = lambda raised: _log_uncaught(raised.exc_type, raised.exc_value, raised.exc_traceback)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None, /) -> None:
    if issubclass(kind, SystemExit):
        return
    raised = error or kind()
    logger.critical("an error that nothing caught", exc_info=(kind, raised, traceback))


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER: message key=value …`; empty values are left out."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_one_line(record.getMessage())]
        words += [f"{name}={_quoted(value)}" for name, value in _request_fields(record).items() if value != ""]
        line = f"{_time(record)} {record.levelname} {record.name}: {' '.join(words)}"
        if trace := _traceback(self, record):
            line += "".join(f"\n    {_one_line(part)}" for part in trace.split("\n"))
        return line


class JsonFormatter(logging.Formatter):
    """`{"time": …, "level": …, "logger": …, "message": …}` with a request's fields beside them, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_request_fields(record),
        }
        if trace := _traceback(self, record):
            entry["exception"] = trace
        return json.dumps(entry)


def _request_fields(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, _FIELDS, {})
    return found


def _value(value: str | float) -> str | float:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, str) and len(value) > _MOST_TEXT:
        return value[: _MOST_TEXT - 1] + "…"
    return value


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""


def _one_line(text: str) -> str:
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _quoted(value: str | float) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
