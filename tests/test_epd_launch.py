"""`deploy/launch/epd.sh`: what it starts, with which flags, on which ports. vLLM is a stand-in here that answers its probes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deploy.launch.chain import BAD_SETTINGS, STOPPED, Chain
from deploy.launch.epd import SettingsError, plan
from deploy.launch.ports import Ports
from deploy.launch.supervisor import Part

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "deploy" / "launch" / "epd.sh"
ANSWERS_ALL = f"""#!{sys.executable}
import http.server, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A directory with a `vllm` and a `vllm-router`."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("vllm", "vllm-router"):
        (directory / name).write_text(ANSWERS_ALL)
        (directory / name).chmod(0o755)
    return directory


def planned(commands: Path, given: Mapping[str, str] | None = None, devices: tuple[str, ...] = ("cpu",)) -> Chain:
    given = {"VLLM": str(commands / "vllm"), **(given or {})}
    artifact = None if given.get("CONNECTOR") == "off" else Path("artifact")
    return plan("some/model", artifact, devices, given, Ports(given), Path("scratch"))


def part(chain: Chain, name: str) -> Part:
    return next(part for stage in chain.stages for part in stage if part.name == name)


def value(part: Part, flag: str) -> str:
    """The last of them counts, as in vLLM."""
    assert flag in part.command, part.command
    return part.command[len(part.command) - list(reversed(part.command)).index(flag)]


def config(part: Part, flag: str) -> Any:
    return json.loads(value(part, flag))


def test_prefill_and_decode_run_in_their_roles_behind_the_router(commands):
    chain = planned(commands)
    prefill, decode, router = (part(chain, name) for name in ("prefill", "decode", "router"))
    assert config(prefill, "--kv-transfer-config")["kv_role"] == "kv_producer"
    assert config(decode, "--kv-transfer-config")["kv_role"] == "kv_consumer"
    assert "--vllm-pd-disaggregation" in router.command
    assert (value(router, "--prefill"), value(router, "--decode")) == (prefill.where, decode.where)
    assert chain.stages[-1] == [router]


def test_prefill_knows_every_encoder_and_decode_none(commands):
    chain = planned(commands, devices=("cpu", "cuda:0"))
    encoders = [part(chain, "encoder-0"), part(chain, "encoder-1")]
    assert [value(encoder, "--device") for encoder in encoders] == ["cpu", "cuda:0"]
    assert len({value(encoder, "--store") for encoder in encoders}) == 2
    transfer = config(part(chain, "prefill"), "--ec-transfer-config")
    assert (transfer["ec_connector"], transfer["ec_role"]) == ("EncoderSidecarConnector", "ec_consumer")
    assert transfer["ec_connector_extra_config"]["address"] == [encoder.where for encoder in encoders]
    assert "--ec-transfer-config" not in part(chain, "decode").command


def test_without_the_connector_prefill_has_its_own_tower(commands):
    chain = planned(commands, {"CONNECTOR": "off"})
    assert [part.name for stage in chain.stages for part in stage] == ["prefill", "decode", "router"]
    assert "--ec-transfer-config" not in part(chain, "prefill").command


def test_options_reach_the_connector(commands):
    chain = planned(commands, {"CONNECTOR_OPTIONS": '{"on_failure": "fail"}'})
    options = config(part(chain, "prefill"), "--ec-transfer-config")["ec_connector_extra_config"]
    assert options["on_failure"] == "fail" and options["address"]


def ports_of(chain: Chain) -> list[int]:
    flags = ("--port", "--prometheus-port", "--listen", "--metrics-listen")
    ports = [
        int(value(part, flag).rpartition(":")[2])
        for stage in chain.stages
        for part in stage
        for flag in flags
        if flag in part.command
    ]
    return ports + [int(part(chain, name).environment["VLLM_NIXL_SIDE_CHANNEL_PORT"]) for name in ("prefill", "decode")]


def test_two_chains_share_no_port(commands):
    # Both plans hold their ports while they live, as two launchers do.
    held = [Ports({}), Ports({})]
    given = {"VLLM": str(commands / "vllm")}
    chains = [plan("model", Path("artifact"), ["cpu", "cpu"], given, ports, Path("scratch")) for ports in held]
    ports = ports_of(chains[0]) + ports_of(chains[1])
    assert len(ports) == 20
    assert len(set(ports)) == len(ports)


def test_ports_can_be_named(commands):
    names = ("ROUTER_PORT", "PREFILL_PORT", "DECODE_PORT", "PREFILL_NIXL_PORT", "DECODE_NIXL_PORT")
    names += ("ROUTER_METRICS_PORT", "ENCODER_PORTS", "ENCODER_METRICS_PORTS")
    free = Ports({})
    given = {name: str(free.take(name)) for name in names}
    del free
    chain = planned(commands, given)
    assert sorted(ports_of(chain)) == sorted(int(port) for port in given.values())
    assert chain.url.endswith(given["ROUTER_PORT"])


@pytest.mark.parametrize(("platform", "variable"), [("cuda", "CUDA_VISIBLE_DEVICES"), ("xpu", "ZE_AFFINITY_MASK")])
def test_each_worker_sees_its_own_devices(commands, platform, variable):
    chain = planned(commands, {"DEVICE_PLATFORM": platform, "DECODE_DEVICES": "2,3"})
    assert part(chain, "prefill").environment[variable] == "0"
    assert part(chain, "decode").environment[variable] == "2,3"
    assert config(part(chain, "decode"), "--kv-transfer-config")["kv_buffer_device"] == platform
    assert "--enforce-eager" not in part(chain, "decode").command


@pytest.mark.parametrize(("visible", "devices"), [("4,7", ["4", "7"]), ("5", ["5", "5"])])
def test_workers_stay_on_the_devices_that_the_user_lets_them_see(commands, visible, devices):
    chain = planned(commands, {"DEVICE_PLATFORM": "cuda", "CUDA_VISIBLE_DEVICES": visible})
    seen = [part(chain, name).environment["CUDA_VISIBLE_DEVICES"] for name in ("prefill", "decode")]
    assert seen == devices


def test_on_cpu_the_kv_cache_moves_over_tcp_and_workers_leave_each_other_room(commands):
    prefill = part(planned(commands), "prefill")
    assert config(prefill, "--kv-transfer-config")["kv_buffer_device"] == "cpu"
    assert prefill.environment["UCX_TLS"] == "tcp"
    assert int(prefill.environment["OMP_NUM_THREADS"]) <= max(1, len(os.sched_getaffinity(0)) // 2)


def test_what_the_user_set_stays(commands):
    given = {"OMP_NUM_THREADS": "3", "UCX_TLS": "rc", "PYTHONPATH": "/mine"}
    given |= {"VLLM_ARGS": "--dtype 'float32' --max-num-seqs 4", "DECODE_ARGS": "--max-num-seqs 8"}
    chain = planned(commands, given)
    prefill, decode = part(chain, "prefill"), part(chain, "decode")
    assert not {"OMP_NUM_THREADS", "UCX_TLS"} & prefill.environment.keys()
    assert prefill.environment["PYTHONPATH"].endswith(":/mine")
    assert value(prefill, "--dtype") == "float32"
    assert (value(prefill, "--max-num-seqs"), value(decode, "--max-num-seqs")) == ("4", "8")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"DEVICE_PLATFORM": "tpu"}, "DEVICE_PLATFORM must be one of cpu, cuda, xpu, got 'tpu'"),
        (
            {"VLLM": "no-such-vllm"},
            "there is no command no-such-vllm: say where it is, VLLM=/path/to/no-such-vllm epd.sh",
        ),
        ({"CONNECTOR_OPTIONS": "{"}, "CONNECTOR_OPTIONS is not JSON"),
        ({"CONNECTOR_OPTIONS": "[]"}, "CONNECTOR_OPTIONS must be a JSON object"),
        ({"VLLM_ARGS": "--chat-template 'a"}, "VLLM_ARGS: no closing quotation"),
        ({"READY_SECONDS": "soon"}, "READY_SECONDS must be a number of seconds, got 'soon'"),
    ],
)
def test_settings_that_will_not_do_are_named(commands, given, words):
    with pytest.raises(SettingsError, match=words.replace("[", r"\[")):
        planned(commands, given)


def launch(commands: Path, *arguments: str, **given: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "DYN_"))}
    return subprocess.Popen(
        [SCRIPT, *arguments],
        env={**kept, "PYTHON": sys.executable, "VLLM": str(commands / "vllm"), **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "given", "words"),
    [
        (("random:toy",), {}, "vLLM cannot load random:toy: give a checkpoint's directory"),
        (("model",), {"CONNECTOR": "maybe"}, "CONNECTOR must be on or off, got 'maybe'"),
        (
            ("model",),
            {"CONNECTOR": "off", "ROUTER_PORT": "http"},
            "ROUTER_PORT must be a port from 1 to 65535, got 'http'",
        ),
    ],
)
def test_the_command_refuses_in_one_line(commands, arguments, given, words):
    process = launch(commands, *arguments, **given)
    out, error = process.communicate(timeout=30)
    assert process.returncode == BAD_SETTINGS
    assert error.startswith("epd.sh: ") and words in error and error.count("\n") == 1
    assert out == ""


def test_the_command_starts_real_encoders_and_stops_at_ctrl_c(commands, toy_artifact, tmp_path):
    process = launch(
        commands, "model", str(toy_artifact), "--device", "cpu", "--device", "cpu", LOG_DIR=str(tmp_path / "logs")
    )
    try:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(line)
            if "try: curl" in line:
                break
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == STOPPED, "".join([*told, rest, error])
    assert sum("ready after" in line and "encoder-" in line for line in told) == 2
    logs = tmp_path / "logs"
    assert {log.name for log in logs.iterdir()} == {
        f"{name}.log" for name in ("encoder-0", "encoder-1", "prefill", "decode", "router")
    }
    assert "ready on" in (logs / "encoder-1.log").read_text()
