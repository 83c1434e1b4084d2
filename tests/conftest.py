"""The toy checkpoint, its artifact, and real servers of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, StartServer, start

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16 as published checkpoints are, so that f32 and bf16 share one graph and one trace."""
    from export.synthetic import make_checkpoint  # imports torch, which many tests do without

    return make_checkpoint("toy", tmp_path_factory.mktemp("checkpoint") / "toy", dtype="bfloat16")


@pytest.fixture(scope="session")
def toy_artifact(toy_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenVINO, f32 first."""
    from rich.console import Console

    from export.pipeline import Job, export

    job = Job(
        model=str(toy_checkpoint),
        out=tmp_path_factory.mktemp("artifact") / "toy",
        formats=("openvino",),
        precisions=("f32", "bf16"),
    )
    return export(job, Console(quiet=True)).directory


@pytest.fixture(scope="session")
def start_server(toy_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """start_server(*flags) serves the toy artifact; what still runs at the end is ended."""
    servers: list[Server] = []

    def begin(*flags: str, artifact: Path = toy_artifact) -> Server:
        servers.append(start(artifact, tmp_path_factory.mktemp("server"), *flags))
        return servers[-1]

    yield begin
    living = [server for server in servers if server.process.poll() is None]
    for server in living:
        assert server.terminate() == 0, server.log.read_text()


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> Server:
    """One for everybody: float32 all through, one thread so that slow is slow everywhere, and limits quickly reached."""
    return start_server(
        *("--threads", "1"),
        *("--precision", "f32", "--embedding-dtype", "float32"),
        *("--max-items", "16", "--max-item-patches", "16384", "--max-image-pixels", "4000000"),
    )
