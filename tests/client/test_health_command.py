"""`python -m sidecar health` as a container's probe runs it."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse

ROOT = Path(__file__).parents[2]


def health(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "GRPC_"))}
    return subprocess.run(
        [sys.executable, "-m", "sidecar", "health", *arguments],
        cwd=ROOT,
        env={**kept, "GRPC_VERBOSITY": "NONE", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def server_saying(serve):
    def start(status):
        servicer = HealthServicer()
        servicer.set("", status)
        return serve(health=servicer).address

    return start


def test_a_serving_server_is_0(server_saying):
    answer = health("--server", server_saying(HealthCheckResponse.SERVING))
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "SERVING\n", "")


def test_a_draining_server_is_1(server_saying):
    answer = health("--server", server_saying(HealthCheckResponse.NOT_SERVING))
    assert (answer.returncode, answer.stdout, answer.stderr) == (1, "NOT_SERVING\n", "")


def test_the_address_comes_from_the_environment_and_a_pods_proxy_is_not_asked(server_saying):
    address = server_saying(HealthCheckResponse.SERVING)
    assert health(EPD_SERVER=address, http_proxy="http://127.0.0.1:9", no_proxy="").returncode == 0


def test_each_service_has_its_own_status(serve):
    servicer = HealthServicer()
    servicer.set("epd.encoder.v1.Encoder", HealthCheckResponse.NOT_SERVING)
    address = serve(health=servicer).address
    assert health("--server", address).returncode == 0
    assert health("--server", address, "--service", "epd.encoder.v1.Encoder").stdout == "NOT_SERVING\n"


def test_a_service_that_the_server_does_not_know_is_1(serve):
    answer = health("--server", serve().address, "--service", "epd.encoder.v9.Encoder")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "NOT_FOUND" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_nobody_there_is_2():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        answer = health("--server", address)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith(f"no server answers at {address}: ")
    assert len(answer.stderr.splitlines()) == 1


def test_a_server_that_does_not_answer_in_time_is_2():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        answer = health("--server", f"127.0.0.1:{silent.getsockname()[1]}", "--timeout", "0.2")
    assert (answer.returncode, answer.stdout) == (2, "")


@pytest.fixture
def tls_server(tmp_path):
    """A serving server with a certificate for the name "encoder", and the file of its authority."""
    authority = trustme.CA()
    certificate = authority.issue_cert("encoder")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    pair = (certificate.private_key_pem.bytes(), b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    yield f"127.0.0.1:{port}", str(tmp_path / "ca.pem")
    server.stop(0).wait()


def test_a_probe_on_loopback_names_whom_the_certificate_is_for(tls_server):
    address, ca = tls_server
    assert health("--server", address, "--tls-ca", ca, "--tls-name", "encoder").stdout == "SERVING\n"
    assert health("--server", address, "--tls-ca", ca).returncode == 2, "the certificate is not for 127.0.0.1"
    assert health("--server", address).returncode == 2, "plaintext to a TLS server"


def test_tls_flags_that_will_not_do_are_one_line(tmp_path):
    (tmp_path / "text").write_text("no certificate")
    (tmp_path / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    files = [["--tls-ca", str(tmp_path / name)] for name in ("none.pem", "text", "broken.pem")]
    for flags in (["--tls-name", "encoder"], *files):
        answer = health(*flags)
        assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1)
        assert "--tls-ca" in answer.stderr


def test_no_time_at_all_is_refused():
    answer = health("--timeout", "0")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "must be above 0" in answer.stderr


def test_a_probe_imports_neither_the_client_nor_an_array_library():
    code = "import sys; from sidecar.__main__ import main; main(['health', '--server', '127.0.0.1:1']); print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"numpy", "PIL", "openvino", "sidecar.client", "sidecar.settings", "sidecar.commands.serve"}
    assert not heavy & set(answer.stdout.split())


def test_help_lists_every_command():
    answer = subprocess.run([sys.executable, "-m", "sidecar", "--help"], cwd=ROOT, capture_output=True, text=True)
    listed = [line.split()[0] for line in answer.stdout.splitlines() if line.startswith("    ")]
    assert answer.returncode == 0
    assert {"serve", "encode", "info", "health"} <= set(listed)
