"""What the log says of a request, whatever callers put into it."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.engine.observer import StageTimes
from sidecar.monitoring.request_log import (
    LOG_FORMATS,
    JsonFormatter,
    LogFormat,
    RequestRecord,
    TextFormatter,
    configure_logging,
)

RECORD = RequestRecord(
    method="Encode",
    peer="ipv4:127.0.0.1:51234",
    client="prefill-0",
    items=3,
    answered=2,
    refused=1,
    bytes_in=1000,
    ms=12.3456,
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
)
FORMATTERS: dict[str, logging.Formatter] = {"text": TextFormatter(), "json": JsonFormatter()}


class Log:
    """Lines as a log's reader gets them."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self._stream = io.StringIO()
        handler = logging.StreamHandler(self._stream)
        handler.setFormatter(formatter)
        self.logger = logging.Logger("sidecar.test")
        self.logger.addHandler(handler)

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.removesuffix("\n").split("\n")


@pytest.fixture
def text() -> Log:
    return Log(TextFormatter())


@pytest.fixture
def json_log() -> Log:
    return Log(JsonFormatter())


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root, own = logging.getLogger(), logging.getLogger("sidecar")
    handlers, levels = root.handlers[:], (root.level, own.level)
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    with warnings.catch_warnings():
        yield root
        logging.captureWarnings(False)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def test_a_request_is_one_line_for_people(text: Log) -> None:
    RECORD.log(text.logger)
    (line,) = text.lines
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO sidecar\.test: request method=Encode ", line)
    for word in ("peer=ipv4:127.0.0.1:51234", "client=prefill-0", "code=OK", "items=3", "answered=2", "refused=1"):
        assert f" {word}" in line
    assert " ms=12.346 " in line
    assert line.endswith("trace_id=4bf92f3577b34da6a3ce929d0e0e4736")


def test_a_request_is_one_object_for_machines(json_log: Log) -> None:
    RECORD.log(json_log.logger)
    (line,) = json_log.lines
    entry = json.loads(line)
    assert datetime.fromisoformat(entry["time"]).utcoffset() is not None
    assert entry["time"].endswith("Z")
    assert (entry["level"], entry["logger"], entry["message"]) == ("info", "sidecar.test", "request")
    assert (entry["method"], entry["items"], entry["ms"], entry["failed"]) == ("Encode", 3, 12.346, 0)


def test_stage_times_are_summed_over_items(json_log: Log) -> None:
    record = RequestRecord(method="Encode", peer="unix:")
    record.add(StageTimes(decode_ms=1.5, run_ms=400.0))
    record.add(StageTimes(decode_ms=2.5, queue_ms=7.0))
    record.log(json_log.logger)
    entry = json.loads(json_log.text)
    assert [entry[f"{stage}_ms"] for stage in ("decode", "preprocess", "queue", "run", "publish")] == [4, 0, 7, 400, 0]


def test_what_is_empty_is_not_said_to_people(text: Log) -> None:
    RequestRecord(method="Info", peer="unix:").log(text.logger)
    assert "client=" not in text.text and "trace_id=" not in text.text


@pytest.mark.parametrize("format", LOG_FORMATS)
@given(
    hostile=st.text() | st.just("x\n2026-01-01T00:00:00.000Z INFO sidecar: forged") | st.just("\x1b[2J\u202e\u2028\r")
)
def test_no_caller_breaks_a_line(format: LogFormat, hostile: str) -> None:
    log = Log(FORMATTERS[format])
    RequestRecord(method="Encode", peer=hostile, client=hostile).log(log.logger)
    log.logger.info("item %s refused", hostile)
    assert len(log.lines) == 2
    assert len(log.text.splitlines()) == 2, "nor for readers who know more kinds of line ends"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", log.text)
    log.text.encode()


@given(client=st.text(max_size=200))
def test_what_a_caller_is_called_can_be_read_back(client: str) -> None:
    log = Log(JsonFormatter())
    RequestRecord(method="Encode", peer="unix:", client=client).log(log.logger)
    assert json.loads(log.text)["client"] == client


def test_a_value_with_blanks_cannot_pass_for_two(text: Log) -> None:
    RequestRecord(method="Encode", peer="unix:", client='a code=OK "b"').log(text.logger)
    assert r' client="a code=OK \"b\"" ' in text.text


def test_a_name_of_any_length_is_cut(json_log: Log) -> None:
    RequestRecord(method="Encode", peer="unix:", client="x" * 100_000).log(json_log.logger)
    assert len(json_log.text) < 2000


@pytest.mark.parametrize("format", LOG_FORMATS)
def test_a_traceback_cannot_pass_for_lines_of_the_log(format: LogFormat) -> None:
    log = Log(FORMATTERS[format])
    try:
        raise ValueError("x\n2026-01-01T00:00:00.000Z INFO sidecar: forged\x1b[2J")
    except ValueError:
        log.logger.exception("an item failed")
    assert "ValueError" in log.text
    assert "\x1b" not in log.text
    first, *others = log.lines
    assert "an item failed" in first
    assert all(line.startswith("    ") for line in others)
    if format == "json":
        assert "ValueError" in json.loads(first)["exception"]


@pytest.mark.parametrize("format", LOG_FORMATS)
def test_configuring_takes_over_the_whole_log(
    format: LogFormat, root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("warning", format)
    configure_logging("info", format)
    logging.getLogger("sidecar.anything").info("said once")
    logging.getLogger("sidecar.anything").debug("not said")
    logging.getLogger("a.library").info("nor this")
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert (json.loads(said.err)["message"] if format == "json" else said.err.strip()).endswith("said once")


def test_settings_that_cannot_be_are_refused(root_logger: logging.Logger) -> None:
    with pytest.raises(ValueError, match="must be one of text, json, got 'xml'"):
        configure_logging("info", "xml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LOUD"):
        configure_logging("loud", "text")


def test_everything_that_python_says_has_the_logs_form(
    root_logger: logging.Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    """Warnings, and what nothing catches in threads, finalizers and the main thread."""
    configure_logging("info", "json")
    for number in range(3):
        warnings.warn(f"odd thing {number}", UserWarning, stacklevel=1)

    def fail() -> None:
        raise ValueError("in a thread")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()

    class Unlucky:
        def __del__(self) -> None:
            raise ValueError("in a finalizer")

    Unlucky()
    sys.excepthook(ValueError, ValueError("in the main thread"), None)
    logging.getLogger().handlers[0].flush()
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert ["odd thing" in entry["message"] for entry in said] == [True] * 3 + [False] * 3
    for entry, where in zip(said[3:], ("thread", "finalizer", "main thread"), strict=True):
        assert f"ValueError: in a {where}".replace("a main", "the main") in entry["exception"]


def test_pictures_do_not_fill_the_log_with_warnings(
    root_logger: logging.Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pillow warns of each odd picture in words that differ."""
    configure_logging("debug", "json")
    for number in range(1000):
        warnings.warn_explicit(f"Corrupt EXIF data: {number}", UserWarning, "PIL/ExifTags.py", 1, "PIL.ExifTags")
        logging.getLogger("PIL.PngImagePlugin").debug("STREAM b'IHDR' %d", number)
    for number in range(1000):
        warnings.warn(f"another library's warning {number}", UserWarning, stacklevel=1)
    logging.getLogger().handlers[0].flush()
    said = [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines()]
    assert 20 <= len(said) <= 22
    assert all("another library's warning" in message for message in said)
