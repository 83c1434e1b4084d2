"""`python -m sidecar plan`, with costs from everywhere that they may come from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Server

from sidecar.__main__ import main

GIVEN = ("--gpu", "2,0.004", "--cpu", "5,0.1")
Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Plan:
    """plan(*flags): the exit code, what was printed, and what was printed as an error."""

    def run(*flags: object) -> tuple[int, str, str]:
        try:
            code = main(["plan", *(str(flag) for flag in flags)])
        except SystemExit as exit:  # argparse's
            code = int(exit.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_it_answers_in_one_sentence(plan: Plan) -> None:
    code, out, err = plan(*GIVEN, "--rate", 50, "--target-p95-ms", 100, "--requests", 1000)
    assert (code, err) == (0, "")
    assert re.search(r"^answer     none: 1 GPU alone is enough, p95 [\d.]+ ms\.$", out, re.MULTILINE)
    assert re.search(r"^crossover  1 CPU sidecar beside 1 GPU ", out, re.MULTILINE)


def test_a_target_out_of_reach_fails(plan: Plan) -> None:
    code, out, _ = plan(*GIVEN, "--rate", 50, "--target-ms", 1, "--cpus", "0-2", "--requests", 500)
    assert code == 1 and "out of reach" in out


def test_one_seed_is_one_answer(plan: Plan) -> None:
    flags = (*GIVEN, "--rate", 100, "--requests", 800, "--cpus", 1, "--json")
    first, again, other = (plan(*flags, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_another_percentile_may_be_asked_for(plan: Plan) -> None:
    _, out, _ = plan(*GIVEN, "--rate", 20, "--target-p99-ms", 500, "--requests", 500, "--json")
    assert json.loads(out)["target"] == {"percent": 99, "ms": 500.0}


def test_what_was_measured_already_has_a_name(plan: Plan) -> None:
    code, out, _ = plan("--gpus", 0, "--cpu", "amx-16-bf16", "--rate", 1, "--cpus", 1, "--requests", 200)
    assert code == 0 and "docs/performance.md: 3B tower at real size, random weights" in out


def test_a_plot_is_drawn(plan: Plan, tmp_path: Path) -> None:
    target = tmp_path / "plan.svg"
    assert plan(*GIVEN, "--rate", 50, "--requests", 300, "--cpus", "0-1", "--plot", target)[0] == 0
    assert target.read_text().startswith("<svg ")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((*GIVEN,), "what arrives? give --rate, --burst with --every, or --trace"),
        (("--rate", 1), "what does a run on a GPU cost? give --gpu or --from"),
        (("--gpu", "1,1", "--rate", 1), "what does a run on a CPU cost? give --cpu or --from"),
        ((*GIVEN, "--burst", 3), "--burst and --every must be given together"),
        ((*GIVEN, "--rate", 1, "--trace", "x.csv"), "--trace says what arrives: leave out --rate, --burst and --size"),
        ((*GIVEN, "--trace", "nowhere.csv"), "nowhere.csv: No such file or directory"),
        ((*GIVEN, "--rate", 1, "--gpus", 0, "--cpus", 0), "neither GPUs nor CPUs: give --gpus or --cpus"),
        ((*GIVEN, "--rate", 1, "--plot", "plan.png"), "plan.png: a plot is written as .svg"),
        ((*GIVEN, "--rate", 1, "--plot", "no/where.svg"), "no/where.svg: there is no directory no"),
        (("--save-costs", "x.json"), "--save-costs of what? give --from ADDRESS, a sidecar that runs"),
        (("--gpu", "fast", "--cpu", "1,1", "--rate", 1), "'fast' is no costs: write milliseconds as 2.5,0.004"),
        (("--gpu", "0,0", "--cpu", "1,1", "--rate", 1), "0,0: a run must cost something"),
        (("--gpu", "no.json", "--cpu", "1,1", "--rate", 1), "no.json: No such file or directory"),
        (("--gpu", "no.jsonl", "--cpu", "1,1", "--rate", 1), "no.jsonl: No such file or directory"),
        (("--gpus", 0, "--from", "127.0.0.1:1", "--rate", 1), "no encoder sidecar answers at 127.0.0.1:1"),
        (("--gpus", 0, "--from", "http://127.0.0.1:1", "--rate", 1), "no status page answers at http://127.0.0.1:1"),
    ],
)
def test_nonsense_is_told_in_a_line(plan: Plan, flags: tuple[object, ...], told: str) -> None:
    code, out, err = plan(*flags)
    assert code == 2 and out == ""
    assert told in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--rate", "0", "must be above 0"),
        ("--cpus", "4-2", "write how many as 3, or from and to as 0-8"),
        ("--cpus", "many", "write how many as 3, or from and to as 0-8"),
        ("--cpus", "0-9999", "at most 256"),
        ("--gpus", "-1", "must be at least 0"),
        ("--size", "9x9", "too small"),
        ("--target-p95-ms", "nan", "must be above 0"),
    ],
)
def test_a_flag_that_is_wrong_is_told_by_its_name(plan: Plan, flag: str, value: str, told: str) -> None:
    code, _, err = plan(*GIVEN, "--rate", 1, flag, value)
    assert code == 2
    assert f"argument {flag}" in err and told in err


def test_a_running_sidecar_is_measured_and_kept(plan: Plan, server: Server, tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    size = ("--size", "224x224,336x336")
    code, out, err = plan("--from", server.address, "--save-costs", costs, "--measure-seconds", 0.5, *size)
    assert (code, err) == (0, "") and f"{server.address}, " in out
    (entry,) = json.loads(costs.read_text())["costs"]
    assert entry["run"]["per_patch_ms"] + entry["run"]["per_pair_ms"] > 0
    assert {"prepare", "publish", "overhead"} <= set(entry)
    assert {"64", "256", "576"} <= set(entry["spread"])
    code, out, _ = plan("--gpus", 0, "--from", costs, "--rate", 2, "--cpus", 1, *size, "--json", "--requests", 200)
    assert code == 0 and json.loads(out)["rows"][0]["latency_ms"]["p50"] > 1.0


def test_lanes_of_one_kind_are_counted(plan: Plan, start_server, tmp_path: Path) -> None:
    server = start_server("--device", "cpu", "--device", "cpu", "--metrics-listen", "127.0.0.1:0")
    page = re.search(r"status page on (\S+)", server.log.read_text())[1]
    by_page, by_address = tmp_path / "page.json", tmp_path / "address.json"
    size = ("--size", "224x224")
    assert plan("--from", server.address, "--save-costs", by_address, "--measure-seconds", 0.5, *size)[0] == 0
    assert plan("--from", page, "--save-costs", by_page)[0] == 0
    for file in (by_page, by_address):
        (entry,) = json.loads(file.read_text())["costs"]
        assert entry["streams"] == 2


def test_a_cpu_lane_is_no_gpu(plan: Plan, server: Server) -> None:
    code, _, err = plan("--from", server.address, "--rate", 1, "--measure-seconds", 0.1)
    assert code == 2 and "has no GPU lane, only openvino/CPU" in err


def test_a_status_page_tells_what_its_lanes_know(plan: Plan, start_server) -> None:
    server = start_server("--threads", "1", "--metrics-listen", "127.0.0.1:0")
    page = re.search(r"status page on (\S+)", server.log.read_text())[1]
    early = plan("--gpus", 0, "--from", page, "--rate", 1)
    assert early[0] == 2 and "no status page of a sidecar that has encoded something" in early[2]
    assert main(["load", "--server", server.address, "--requests", "12", "--size", "224x224", "--json"]) == 0
    code, out, err = plan("--gpus", 0, "--from", page, "--rate", 1, "--cpus", 1, "--requests", 200)
    assert (code, err) == (0, "") and f"{page}, 12 runs of openvino/CPU" in out


def test_what_load_recorded_is_a_trace_and_tells_costs(plan: Plan, server: Server, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    sent = ("--rate", "20", "--requests", "30", "--size", "224x224:2,448x448:1", "--items-per-request", "2")
    assert main(["load", "--server", server.address, "--record", str(record), "--json", *sent]) == 0
    code, out, err = plan("--gpus", 0, "--cpu", record, "--trace", record, "--cpus", 1, "--json")
    assert code == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert (figures["traffic"]["pictures"], figures["traffic"]["requests"]) == (60, 30)
    slowest: dict[int, float] = {}
    for line in map(json.loads, record.read_text().splitlines()):
        slowest[line["request"]] = max(line["latency_ms"], slowest.get(line["request"], 0.0))
    # Not how near they are, which bench/plan.py and the soak test measure where nothing else runs.
    assert 0 < figures["rows"][0]["latency_ms"]["p50"] < 20 * max(slowest.values())
