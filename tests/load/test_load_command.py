"""`python -m sidecar load` against real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import ROOT, Server

from sidecar.__main__ import main
from sidecar.load.pictures import FORMATS

PHOTOS = sorted((ROOT / "export" / "photos").glob("*.[jpw]*"))
KINDS = ("answered", "refused", "expired", "cancelled", "failed")


@pytest.fixture
def load(server: Server, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """load(*flags): the exit code and the JSON."""

    def run(*flags: object, at: Server = server) -> tuple[int, dict[str, Any]]:
        code = main(["load", "--server", at.address, "--json", *(str(flag) for flag in flags)])
        return code, json.loads(capsys.readouterr().out)

    return run


def begin(server: Server, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sidecar", "load", "--server", server.address, "--json", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRPC_VERBOSITY": "NONE"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_calls(server: Server, count: int, process: subprocess.Popen[str]) -> None:
    """Until the server has answered so many."""
    while server.log.read_text().count("method=Encode") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("picture_format", FORMATS)
def test_every_format_is_answered(load, picture_format: str) -> None:
    code, figures = load("--format", picture_format, "--size", "56x56,84x112", "--requests", 12, "--concurrency", 4)
    assert code == 0
    assert (figures["sent"], figures["answered"], figures["missing"]) == (12, 12, 0)
    assert figures["from_store"] == figures["coalesced"] == 0  # no picture comes twice
    assert figures["latency_ms"]["answered"]["p50"] > figures["server_ms"]["run"]["p50"] > 0
    assert figures["per_second"]["patches"] == pytest.approx(4 * figures["per_second"]["tokens"], rel=0.01)


def test_an_open_loop_over_several_connections(load) -> None:
    code, figures = load("--rate", 200, "--duration", 0.5, "--channels", 3, "--items-per-request", 2, "--size", "56x56")
    assert code == 0
    assert figures["sent"] == figures["answered"] == 2 * figures["requests"] > 100
    assert figures["settings"]["arrivals"] == "poisson"


def test_photos_are_sent_as_they_are(load) -> None:
    assert len(PHOTOS) == 3
    code, figures = load("--requests", 3, "--photos", *PHOTOS)
    assert code == 0
    assert figures["answered"] == figures["settings"]["photos"] == 3


def test_deadlines_and_cancellations_lose_nothing(load) -> None:
    code, figures = load(
        *("--rate", 300, "--requests", 150, "--size", "56x56,448x448", "--channels", 2),
        *("--timeout", "0.001-2", "--cancel-fraction", 0.5, "--cancel-within", 0.1, "--items-per-request", 2),
    )
    assert code == 0
    assert figures["sent"] == 300 == sum(figures[kind] for kind in KINDS)
    assert figures["cancelled"] > 0
    assert figures["expired"] + figures["refused"] > 0


def test_an_overloaded_server_refuses_and_is_asked_again_if_told_to(load, start_server) -> None:
    busy = start_server("--threads", "1", "--max-queue-patches", "1500")
    flags = ("--requests", 20, "--concurrency", 10, "--size", "448x448", "--channels", 2)
    code, figures = load(*flags, at=busy)
    assert code == 0
    assert figures["refused"] > 0
    assert {(cause["code"], cause["reason"]) for cause in figures["causes"]} == {("RESOURCE_EXHAUSTED", "OVERLOADED")}
    code, figures = load(*flags, "--retry", at=busy)
    assert code == 0
    assert figures["answered"] == 20
    assert figures["retried"] > 0


def test_a_server_that_dies_fails_items_and_the_sum_still_holds(start_server) -> None:
    victim = start_server("--threads", "1")
    process = begin(victim, "--requests", "120", "--concurrency", "4", "--size", "448x448")
    wait_for_calls(victim, 3, process)
    victim.process.kill()
    out, err = process.communicate(timeout=60)
    figures = json.loads(out)
    assert process.returncode == 1, err
    assert figures["answered"] >= 3
    assert figures["failed"] > 0
    assert figures["missing"] == 0


def test_ctrl_c_reports_what_was_sent_until_then(start_server) -> None:
    own = start_server("--threads", "1")
    process = begin(own, "--requests", "1000000", "--concurrency", "3", "--size", "112x112")
    wait_for_calls(own, 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    figures = json.loads(out)
    assert figures["answered"] >= 5
    assert figures["missing"] == 0
    assert "Traceback" not in err


def test_a_person_gets_the_sum_and_a_plot(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.svg"
    assert main(["load", "--server", server.address, "--requests", "5", "--size", "56x56", "--plot", str(plot)]) == 0
    captured = capsys.readouterr()
    assert "5 = 5 + 0 + 0 + 0 + 0" in captured.out
    assert "seed" in captured.out
    assert captured.err == ""  # no terminal, no progress
    assert plot.read_text().startswith("<svg")


def test_no_server_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--server", f"unix:{tmp_path}/nobody"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no encoder sidecar answers at")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--arrivals", "uniform"], "--arrivals is of an open loop: give --rate too"),
        (["--zipf", "1"], "--zipf draws from a catalogue"),
        (["--photos", "x.jpg", "--size", "56x56"], "--photos are sent as they are"),
        (["--photos", "nowhere.jpg"], "nowhere.jpg: No such file or directory"),
        (["--plot", "plot.png"], "a plot is written as .svg or .html"),
        (["--plot", "nowhere/plot.svg"], "there is no directory nowhere"),
        (["--tls-cert", "x.pem"], "--tls-cert and --tls-key go together"),
    ],
)
def test_what_does_not_go_together_is_told(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_a_record_has_a_line_for_each_item(load, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    sent = ("--requests", 10, "--items-per-request", 2, "--catalogue", 4, "--size", "56x84,112x112", "--concurrency", 3)
    code, figures = load(*sent, "--record", record)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert code == 0 and len(lines) == 20
    assert sorted(line["request"] for line in lines) == sorted([*range(10)] * 2)
    assert [line["time_s"] for line in lines] == sorted(line["time_s"] for line in lines)
    assert {(line["width"], line["height"], line["patches"]) for line in lines} <= {(56, 84, 24), (112, 112, 64)}
    assert sum(line["cached"] or line["coalesced"] for line in lines) == figures["from_store"] + figures["coalesced"]
    encoded = [line for line in lines if not line["cached"] and not line["coalesced"]]
    assert all(line["latency_ms"] > line["stages"]["run"] > 0 for line in encoded)
    assert {line["lane"] for line in lines} == set(figures["lanes"])


def test_a_record_has_what_was_refused_with_its_size(load, start_server, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    busy = start_server("--threads", "1", "--max-queue-patches", "1500")
    code, figures = load("--requests", 20, "--concurrency", 10, "--channels", 2, "--record", record, at=busy)
    refused = [line for line in map(json.loads, record.read_text().splitlines()) if line["outcome"] == "refused"]
    assert code == 0 and len(refused) == figures["refused"] > 0
    assert {(line["width"], line["height"], line["patches"]) for line in refused} == {(448, 448, 1024)}


def test_photos_that_are_none_are_recorded_without_a_size(load, tmp_path: Path) -> None:
    record, broken = tmp_path / "record.jsonl", tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    code, _ = load("--requests", 2, "--photos", PHOTOS[0], broken, "--record", record)
    good, bad = map(json.loads, record.read_text().splitlines())
    assert code == 1
    assert (good["outcome"], bad["outcome"]) == ("answered", "failed")
    assert good["width"] > 100 and "width" not in bad and "patches" not in bad


def test_a_record_that_cannot_be_written_is_told_before_anything_is_sent(capsys, tmp_path: Path) -> None:
    code = main(["load", "--server", "127.0.0.1:1", "--record", str(tmp_path / "no" / "record.jsonl")])
    assert code == 2
    assert "there is no directory" in capsys.readouterr().err
