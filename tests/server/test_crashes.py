"""Native code that crashes is a message that names lane, signal and what to try; a server that served before serves on."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
from pictures import encoded, picture
from servers import exit_code, spawn, start
from stubs import another, with_stub

from sidecar.client import Embedding
from sidecar.items import image_item

SMALL = image_item(encoded(picture(56, 56)))
QUICK = ("--warm-up-seconds", "0", "--threads", "1", "--precision", "f32")


def wait_for(what: str, log: Path) -> None:
    ends = time.monotonic() + 30
    while what not in log.read_text():
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.02)


def has_ended(pid: str) -> bool:
    """Whether a process has, within a second; who inherits it may leave it a zombie."""
    ends = time.monotonic() + 1
    while time.monotonic() < ends:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("child import SIGFPE", "was ended by SIGFPE while loading"),
        ("child compile SIGILL", "was ended by SIGILL while loading"),
        ("child infer SIGSEGV", "was ended by SIGSEGV in its first run"),
        ("child compile SIGKILL", "was ended by SIGKILL while loading; most likely for want of memory"),
    ],
)
def test_a_crash_at_the_start_is_a_message_and_code_2(
    order: str, said: str, toy_artifact: Path, tmp_path: Path
) -> None:
    process, log = spawn(
        toy_artifact, tmp_path, *QUICK, listen="127.0.0.1:0", added=with_stub(order, tmp_path / "cache")
    )
    assert exit_code(process) == 2, log.read_text()
    text = log.read_text()
    assert f"sidecar serve: lane cpu: openvino/f32 on cpu {said}" in text
    assert "docs/operations.md" in text.splitlines()[-1]
    assert text.index("lane cpu: loading openvino/f32 on cpu, 1 threads") < text.index("a child process tries")


def test_a_crash_on_a_reload_leaves_the_old_model_serving(toy_artifact: Path, tmp_path: Path) -> None:
    order, served = tmp_path / "order", tmp_path / "served"
    order.write_text("")
    shutil.copytree(toy_artifact, served)
    server = start(served, tmp_path, *QUICK, added=with_stub(order, tmp_path / "cache"))
    try:
        order.write_text("child compile SIGSEGV")
        another(toy_artifact, served)
        server.process.send_signal(signal.SIGHUP)
        wait_for("is not served, the old one still is: ", server.log)
        said = "the old one still is: lane cpu: openvino/f32 on cpu was ended by SIGSEGV while loading"
        assert said in server.log.read_text()
        with server.client() as client:
            assert isinstance(client.encode([SMALL], timeout_s=20)[0], Embedding)
    finally:
        server.process.terminate()
        assert exit_code(server.process) == 0


def test_a_crash_of_the_server_itself_is_told_by_it_and_by_the_next(toy_artifact: Path, tmp_path: Path) -> None:
    process, log = spawn(
        toy_artifact,
        tmp_path,
        *QUICK,
        listen="127.0.0.1:0",
        added=with_stub("server infer SIGSEGV", tmp_path / "cache"),
    )
    assert exit_code(process) == -signal.SIGSEGV, log.read_text()
    assert "Fatal Python error: Segmentation fault" in log.read_text()
    server = start(toy_artifact, tmp_path, *QUICK, added=with_stub("", tmp_path / "cache"))
    text = server.log.read_text()
    assert "WARNING" in text and "the process that loaded openvino/f32 last" in text and "child process tries" in text
    assert server.terminate() == 0
    again = start(toy_artifact, tmp_path, *QUICK, added=with_stub("", tmp_path / "cache"))
    text = again.log.read_text()  # it has run here by now
    assert "WARNING" not in text and "child process" not in text
    assert again.terminate() == 0


def test_a_clean_end_is_code_0_whatever_native_libraries_do_at_theirs(toy_artifact: Path, tmp_path: Path) -> None:
    server = start(toy_artifact, tmp_path, *QUICK, added=with_stub("server exit SIGABRT", tmp_path / "cache"))
    assert server.terminate() == 0
    assert server.log.read_text().endswith("stopped\n")


@pytest.mark.parametrize("order", ["child compile 600", "server compile 600"])
def test_sigterm_while_a_runtime_compiles_ends_it_at_once(order: str, toy_artifact: Path, tmp_path: Path) -> None:
    process, log = spawn(
        toy_artifact, tmp_path, *QUICK, listen=f"unix:{tmp_path / 'sock'}", added=with_stub(order, tmp_path / "cache")
    )
    wait_for("a child process tries", log)
    ends = time.monotonic() + 30
    while order.startswith("server") and not list((tmp_path / "cache").rglob("*.loading")):
        assert time.monotonic() < ends
        time.sleep(0.02)
    time.sleep(0.3)
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    assert pids or order.startswith("server")
    begun = time.monotonic()
    process.terminate()
    assert exit_code(process) == 0, log.read_text()
    assert time.monotonic() - begun < 1
    assert log.read_text().endswith("stopped before it was ready\n")
    assert all(has_ended(pid) for pid in pids)
    assert not (tmp_path / "sock").exists()
    assert not list((tmp_path / "cache").rglob("*.loading"))  # it did not crash


@pytest.mark.parametrize("who", ["child", "server"])
def test_sigterm_while_a_reload_compiles_ends_within_the_drain(who: str, toy_artifact: Path, tmp_path: Path) -> None:
    """The drain has nothing to wait for."""
    order, served = tmp_path / "order", tmp_path / "served"
    order.write_text("")
    shutil.copytree(toy_artifact, served)
    trial = ("--trial", "never") if who == "server" else ()
    server = start(served, tmp_path, *QUICK, *trial, added=with_stub(order, tmp_path / "cache"))
    order.write_text(f"{who} compile 600")
    another(toy_artifact, served)
    server.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert server.log.read_text().count("lane cpu: loading") == 2
    begun = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - begun < 1
