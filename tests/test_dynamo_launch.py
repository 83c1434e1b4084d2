"""`deploy/launch/dynamo_epd.sh`: what it starts, with which flags and ports. Dynamo is a stand-in that answers its probes."""

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

from deploy.launch.chain import BAD_SETTINGS, PART_DIED, STOPPED, Chain
from deploy.launch.dynamo_epd import plan
from deploy.launch.ports import Ports
from deploy.launch.settings import SettingsError
from deploy.launch.supervisor import Part

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "deploy" / "launch" / "dynamo_epd.sh"
WORKERS = ("encode", "prefill", "decode")
# As a Python that has Dynamo: asked what it lacks, it says nothing.
ANSWERS_ALL = f"""#!{sys.executable}
import http.server, os, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{{"data": [{{"id": "model"}}]}}')

if "-c" not in sys.argv:
    named = sys.argv[sys.argv.index("--http-port") + 1] if "--http-port" in sys.argv else os.environ["DYN_SYSTEM_PORT"]
    http.server.HTTPServer(("127.0.0.1", int(named)), Answer).serve_forever()
"""


def command(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def dynamo(tmp_path: Path) -> Path:
    return command(tmp_path / "python-with-dynamo", ANSWERS_ALL)


def planned(dynamo: Path, given: Mapping[str, str] | None = None, devices: tuple[str, ...] = ("cpu",)) -> Chain:
    given = {"DYNAMO_PYTHON": str(dynamo), **(given or {})}
    artifact = None if "SIDECARS" in given else Path("artifact")
    # A plan makes its discovery's directory, so each has a scratch of its own.
    scratch = dynamo.parent / f"scratch-{len(list(dynamo.parent.iterdir()))}"
    scratch.mkdir()
    return plan("some/model", artifact, devices, given, Ports(given), scratch)


def part(chain: Chain, name: str) -> Part:
    return next(part for stage in chain.stages for part in stage if part.name == name)


def value(part: Part, flag: str) -> str:
    """The last of them counts, as in vLLM."""
    assert flag in part.command, part.command
    return part.command[len(part.command) - list(reversed(part.command)).index(flag)]


def config(part: Part, flag: str) -> Any:
    return json.loads(value(part, flag))


def test_each_worker_is_told_its_role_and_prefill_alone_asks_encoders(dynamo):
    chain = planned(dynamo)
    prefill, decode = part(chain, "prefill"), part(chain, "decode")
    assert [value(worker, "--disaggregation-mode") for worker in (prefill, decode)] == ["prefill", "decode"]
    assert "--route-to-encoder" in prefill.command and "--route-to-encoder" not in decode.command
    for worker in (prefill, decode):
        assert "--enable-mm-embeds" in worker.command
        assert config(worker, "--kv-transfer-config")["kv_connector"] == "NixlConnector"


def test_one_encode_worker_stands_before_all_encoders(dynamo):
    chain = planned(dynamo, devices=("cpu", "cuda:0"))
    encoders = [part(chain, "encoder-0"), part(chain, "encoder-1")]
    assert [value(encoder, "--device") for encoder in encoders] == ["cpu", "cuda:0"]
    assert len({value(encoder, "--store") for encoder in encoders}) == 2
    assert value(part(chain, "encode"), "--server").split(",") == [encoder.where for encoder in encoders]
    assert value(part(chain, "encode"), "--model") == "some/model"


def test_encoders_come_first_so_that_a_wrong_device_is_told_before_a_model_is_loaded(dynamo):
    stages = [[part.name for part in stage] for stage in planned(dynamo).stages]
    assert stages == [["encoder-0"], [*WORKERS], ["frontend"]]


def test_sidecars_that_run_already_are_used_and_none_is_started(dynamo):
    chain = planned(dynamo, {"SIDECARS": "10.0.0.1:50051, dns:///encoders:50051"})
    assert [part.name for stage in chain.stages for part in stage] == [*WORKERS, "frontend"]
    assert value(part(chain, "encode"), "--server") == "10.0.0.1:50051,dns:///encoders:50051"


def test_two_chains_do_not_find_each_others_workers(dynamo):
    chains = [planned(dynamo), planned(dynamo)]
    for variable in ("DYN_NAMESPACE", "DYN_FILE_KV"):
        seen = [{part(chain, name).environment[variable] for name in (*WORKERS, "frontend")} for chain in chains]
        assert [len(names) for names in seen] == [1, 1] and seen[0] != seen[1]


def test_neither_etcd_nor_nats_is_wanted_unless_the_user_says_so(dynamo):
    environment = part(planned(dynamo), "prefill").environment
    planes = ("DYN_DISCOVERY_BACKEND", "DYN_REQUEST_PLANE", "DYN_EVENT_PLANE", "DYN_TCP_RPC_HOST")
    assert [environment[name] for name in planes] == ["file", "tcp", "zmq", "127.0.0.1"]
    told = part(planned(dynamo, {"DYN_DISCOVERY_BACKEND": "etcd", "DYN_NAMESPACE": "mine"}), "encode").environment
    assert (told["DYN_DISCOVERY_BACKEND"], told["DYN_NAMESPACE"]) == ("etcd", "mine")


@pytest.mark.parametrize("mode", ["local", "nixl-write", "nixl-read"])
def test_both_sides_of_the_transfer_are_told_the_same_mode(dynamo, mode):
    chain = planned(dynamo, {"TRANSFER_MODE": mode})
    assert {value(part(chain, name), "--embedding-transfer-mode") for name in ("encode", "prefill")} == {mode}


def ports_of(chain: Chain) -> list[int]:
    parts = [part for stage in chain.stages for part in stage]
    named = [
        value(part, flag)
        for part in parts
        for flag in ("--http-port", "--listen", "--metrics-listen")
        if flag in part.command
    ]
    variables = ("DYN_SYSTEM_PORT", "VLLM_NIXL_SIDE_CHANNEL_PORT")
    named += [part.environment[name] for part in parts for name in variables if name in part.environment]
    return [int(address.rpartition(":")[2]) for address in named]


def test_two_chains_share_no_port(dynamo):
    # Both plans hold their ports while they live, as two launchers do.
    held = [Ports({}), Ports({})]
    given = {"DYNAMO_PYTHON": str(dynamo)}
    scratches = [dynamo.parent / name for name in ("one", "two")]
    chains = []
    for ports, scratch in zip(held, scratches, strict=True):
        scratch.mkdir()
        chains.append(plan("model", Path("artifact"), ["cpu", "cpu"], given, ports, scratch))
    ports = [port for chain in chains for port in ports_of(chain)]
    assert len(ports) == 20
    assert len(set(ports)) == len(ports)


def test_ports_can_be_named(dynamo):
    names = ("FRONTEND_PORT", "WORKER_SYSTEM_PORT", "PREFILL_SYSTEM_PORT", "DECODE_SYSTEM_PORT", "PREFILL_NIXL_PORT")
    names += ("DECODE_NIXL_PORT", "ENCODER_PORTS", "ENCODER_METRICS_PORTS")
    free = Ports({})
    given = {name: str(free.take(name)) for name in names}
    del free
    chain = planned(dynamo, given)
    assert sorted(ports_of(chain)) == sorted(int(port) for port in given.values())
    assert chain.url.endswith(given["FRONTEND_PORT"])


def test_a_status_port_is_one_that_dynamo_can_read(dynamo):
    # It keeps it in 16 bits with a sign.
    chain = planned(dynamo)
    assert all(int(part(chain, name).environment["DYN_SYSTEM_PORT"]) < 32768 for name in WORKERS)


@pytest.mark.parametrize(("platform", "variable"), [("cuda", "CUDA_VISIBLE_DEVICES"), ("xpu", "ZE_AFFINITY_MASK")])
def test_each_worker_sees_its_own_devices(dynamo, platform, variable):
    chain = planned(dynamo, {"DEVICE_PLATFORM": platform, "DECODE_DEVICES": "2,3"})
    assert part(chain, "prefill").environment[variable] == "0"
    assert part(chain, "decode").environment[variable] == "2,3"
    assert config(part(chain, "decode"), "--kv-transfer-config")["kv_buffer_device"] == platform
    assert "--enforce-eager" not in part(chain, "decode").command


@pytest.mark.parametrize(("visible", "devices"), [("4,7", ["4", "7"]), ("5", ["5", "5"])])
def test_workers_stay_on_the_devices_that_the_user_lets_them_see(dynamo, visible, devices):
    chain = planned(dynamo, {"DEVICE_PLATFORM": "cuda", "CUDA_VISIBLE_DEVICES": visible})
    assert [part(chain, name).environment["CUDA_VISIBLE_DEVICES"] for name in ("prefill", "decode")] == devices


def test_what_the_user_set_stays(dynamo):
    given = {"OMP_NUM_THREADS": "3", "UCX_TLS": "rc", "PYTHONPATH": "/mine"}
    given |= {"VLLM_ARGS": "--dtype 'float32' --max-num-seqs 4", "DECODE_ARGS": "--max-num-seqs 8"}
    given |= {"WORKER_ARGS": "--model-name toy", "FRONTEND_ARGS": "--router-mode random"}
    chain = planned(dynamo, given)
    prefill, decode = part(chain, "prefill"), part(chain, "decode")
    assert not {"OMP_NUM_THREADS", "UCX_TLS"} & prefill.environment.keys()
    assert prefill.environment["PYTHONPATH"].endswith(":/mine")
    assert value(prefill, "--dtype") == "float32"
    assert (value(prefill, "--max-num-seqs"), value(decode, "--max-num-seqs")) == ("4", "8")
    assert value(part(chain, "encode"), "--model-name") == "toy"
    assert value(part(chain, "frontend"), "--router-mode") == "random"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"DEVICE_PLATFORM": "tpu"}, "DEVICE_PLATFORM must be one of cpu, cuda, xpu, got 'tpu'"),
        ({"TRANSFER_MODE": "nixl"}, "TRANSFER_MODE must be one of local, nixl-write, nixl-read, got 'nixl'"),
        (
            {"DYNAMO_PYTHON": "no-such-python"},
            "there is no command no-such-python: say where it is, DYNAMO_PYTHON=/path/to/no-such-python dynamo_epd.sh",
        ),
        ({"VLLM_ARGS": "--chat-template 'a"}, "VLLM_ARGS: no closing quotation"),
        ({"READY_SECONDS": "soon"}, "READY_SECONDS must be a number of seconds, got 'soon'"),
    ],
)
def test_settings_that_will_not_do_are_named(dynamo, given, words):
    with pytest.raises(SettingsError, match=words):
        planned(dynamo, given)


def test_a_python_without_dynamo_is_told_from_one_that_does_not_run(dynamo, tmp_path):
    bare = command(tmp_path / "bare", "#!/bin/sh\necho dynamo.frontend dynamo.vllm\n")
    with pytest.raises(SettingsError, match=r"bare lacks dynamo.frontend, dynamo.vllm: say which python has ai-dynamo"):
        planned(dynamo, {"DYNAMO_PYTHON": str(bare)})
    broken = command(tmp_path / "broken", "#!/bin/sh\necho cannot find its library >&2\nexit 127\n")
    with pytest.raises(SettingsError, match=r"broken is no Python that runs: cannot find its library"):
        planned(dynamo, {"DYNAMO_PYTHON": str(broken)})


def test_this_python_is_found_to_lack_what_it_lacks(dynamo):
    bare = command(dynamo.with_name("isolated"), f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    with pytest.raises(SettingsError, match="isolated lacks dynamo, vllm, grpc: "):
        planned(dynamo, {"DYNAMO_PYTHON": str(bare)})


def launch(dynamo: Path, *arguments: str, **given: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "DYN_"))}
    return subprocess.Popen(
        [SCRIPT, *arguments],
        env={**kept, "PYTHON": sys.executable, "DYNAMO_PYTHON": str(dynamo), **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "given", "words"),
    [
        (("random:toy",), {}, "vLLM cannot load random:toy: give a checkpoint's directory"),
        (("model",), {}, "there is no artifact in artifacts/model: first `make export MODEL=model`, or name another"),
        (("model", "/nowhere"), {}, "there is no artifact in /nowhere: /nowhere has no manifest.json, or name another"),
        (
            ("model",),
            {"SIDECARS": "127.0.0.1:1", "FRONTEND_PORT": "http"},
            "FRONTEND_PORT must be a port from 1 to 65535, got 'http'",
        ),
        (("model",), {"ENCODER_DEVICES": " , "}, "no device is named: give --device cpu"),
        (("model",), {"SIDECARS": " , "}, "SIDECARS names none"),
    ],
)
def test_the_command_refuses_in_one_line(dynamo, arguments, given, words):
    process = launch(dynamo, *arguments, **given)
    out, error = process.communicate(timeout=30)
    assert process.returncode == BAD_SETTINGS
    assert error.startswith("dynamo_epd.sh: ") and words in error and error.count("\n") == 1
    assert out == ""


def test_a_device_that_is_not_there_ends_it_before_dynamo_starts(dynamo, toy_artifact, tmp_path):
    process = launch(dynamo, "model", str(toy_artifact), "--device", "ov:GPU.7", LOG_DIR=str(tmp_path / "logs"))
    told, _ = process.communicate(timeout=60)
    assert process.returncode == PART_DIED
    assert "encoder-0 ended with exit code" in told and "ov:GPU.7" in told
    assert [log.name for log in (tmp_path / "logs").iterdir()] == ["encoder-0.log"]


def test_the_command_starts_real_encoders_and_stops_at_ctrl_c(dynamo, toy_artifact, tmp_path):
    logs = tmp_path / "logs"
    process = launch(dynamo, "model", str(toy_artifact), "--encoders", "2", LOG_DIR=str(logs))
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
    names = ("encoder-0", "encoder-1", *WORKERS, "frontend")
    assert {log.name for log in logs.iterdir()} == {f"{name}.log" for name in names}
    assert "ready on" in (logs / "encoder-1.log").read_text()
