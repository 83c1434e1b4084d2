"""Commands and clients in environments that are not a developer's: proxies, ASCII terminals, readers who leave."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors import safe_open

from sidecar.client import AsyncEncoderClient, EncoderClient
from sidecar.fleet import Fleet
from sidecar.pb import encoder_pb2 as pb

ROOT = Path(__file__).parents[2]
CAT = ROOT / "export" / "photos" / "cat-451x300.png"


def command(*arguments: object, **environment: str) -> dict[str, Any]:
    """What `subprocess` needs to run a command of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "LC_", "PYTHON"))}
    return {
        "args": [sys.executable, "-m", "sidecar", *map(str, arguments)],
        "cwd": ROOT,
        "env": kept | {"GRPC_VERBOSITY": "NONE"} | environment,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def test_no_client_takes_a_proxy_for_the_way_to_a_sidecar(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    address = serve(info=pb.InfoResponse(version="9.9")).address
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)

    async def ask() -> None:
        async with AsyncEncoderClient(address) as client:
            assert (await client.info(timeout_s=10)).version == "9.9"
        async with Fleet([address]) as fleet:
            ((_, info),) = (await fleet.infos(10)).items()
            assert isinstance(info, pb.InfoResponse)

    with EncoderClient(address) as client:
        assert client.info(timeout_s=10).version == "9.9"
    asyncio.run(ask())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_the_signs_is_no_reason_to_fail(
    serve: Any, good: Callable[[int], Any], tmp_path: Path, encoding: str
) -> None:
    server = serve(lambda *_: good(0))
    out = tmp_path / "o.safetensors"
    ran = subprocess.run(
        **command("encode", CAT, "--server", server.address, "--out", out, PYTHONIOENCODING=encoding),
        encoding=encoding,
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "cat-451x300.png: grid 1" in ran.stdout
    with safe_open(out, "np") as file:
        assert "cat-451x300.png" in file.keys()  # noqa: SIM118  # it is no mapping


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--server", "SERVER"], ["plan", "--help"]])
def test_a_reader_who_leaves_ends_a_command_without_a_word(serve: Any, arguments: list[str]) -> None:
    address = serve(info=pb.InfoResponse(version="9.9")).address
    read, write = os.pipe()
    os.close(read)
    try:
        said = [address if word == "SERVER" else word for word in arguments]
        ran = subprocess.run(**command(*said), stdout=write, timeout=60, check=False)
    finally:
        os.close(write)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, "")


def test_a_full_disk_under_the_output_is_told_in_a_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(**command("--help"), stdout=full, timeout=60, check=False)
    assert ran.returncode == 1
    assert ran.stderr == "standard output cannot be written: No space left on device; make room, or write elsewhere\n"


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_of_vllms_metrics_is_neither_used_nor_needed(tmp_path: Path, there: bool) -> None:
    directory = tmp_path / "multiproc"
    if there:
        directory.mkdir()
    program = """
import os
from sidecar.monitoring.metrics import Metrics
from prometheus_client import generate_latest
metrics = Metrics()
metrics.hit()
print(generate_latest(metrics.registry).decode())
assert os.environ["PROMETHEUS_MULTIPROC_DIR"]
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(ran.stdout)
        for sample in family.samples
    }
    assert samples["epd_encoder_cache_lookups_total", "hit"] == 1
    assert not there or list(directory.iterdir()) == []
