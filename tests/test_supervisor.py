"""Chains of parts that are no vLLM: they start together and end together, whatever is killed."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.launch.chain import NOT_READY, PART_DIED, STOPPED
from deploy.launch.ports import HOST, PortError, Ports
from deploy.launch.processes import descendants
from deploy.launch.readiness import answers

ROOT = Path(__file__).parents[1]
ENDS_S = 30.0

# Runs a chain of one stage for each object of its second argument, {name: program}; a part is ready once it has said who it is.
LAUNCHER = """
import json, sys
from pathlib import Path
from deploy.launch.chain import Chain, run
from deploy.launch.supervisor import Part

directory = Path(sys.argv[1])
stages = [
    [
        Part(name=name, command=[sys.executable, "-c", program, str(directory / name)], where="here",
             ready=(directory / name).exists)
        for name, program in stage.items()
    ]
    for stage in json.loads(sys.argv[2])
]
chain = Chain(name="test", stages=stages, url="nowhere", hint="go on", ready_s=float(sys.argv[3]), grace_s=1.0)
sys.exit(run(chain, directory, directory / "scratch"))
"""
# Writes its own id and that of a child which has left its session, as daemons do.
PART = """
import os, pathlib, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
draft = pathlib.Path(sys.argv[1] + ".draft")
draft.write_text(f"{os.getpid()} {child.pid}")
draft.rename(sys.argv[1])
signal.pause()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + PART
SILENT = "import signal; signal.pause()"
FAILING = "import sys; print('no such model'); sys.exit(7)"


@dataclass
class Launched:
    """A chain as a user starts it."""

    front: subprocess.Popen[str]
    directory: Path

    def until(self, words: str) -> str:
        """The line with these words, and nothing before it is read again."""
        assert self.front.stdout is not None
        for line in self.front.stdout:
            if words in line:
                return line
        raise AssertionError(f"it ended without {words!r}")

    def guard(self) -> int:
        return int(Path(f"/proc/{self.front.pid}/task/{self.front.pid}/children").read_text())

    def handle(self, name: str) -> list[int]:
        """Handles of a part and its child, which stay theirs when they have ended."""
        return [os.pidfd_open(int(process)) for process in (self.directory / name).read_text().split()]

    def output(self) -> str:
        """The rest of it. Reading ends when nobody is left who could write."""
        return self.front.communicate(timeout=ENDS_S)[0]


def ended(handles: list[int]) -> bool:
    """Whether all of them end, in time."""
    for handle in handles:
        if not select.select([handle], [], [], ENDS_S)[0]:
            return False
        os.close(handle)
    return True


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """launch({name: program}, …) starts a chain with a stage for each argument."""
    launched: list[Launched] = []

    def start(*stages: dict[str, str], ready_s: float = ENDS_S) -> Launched:
        (tmp_path / "scratch").mkdir()
        front = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(tmp_path), json.dumps(stages), str(ready_s)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        launched.append(Launched(front, tmp_path))
        return launched[-1]

    yield start
    for each in launched:
        for process in [*descendants(each.front.pid), each.front.pid]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        each.front.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_every_part_and_what_the_parts_started(launch, number):
    chain = launch({"one": PART, "two": PART})
    chain.until("go on")
    handles = chain.handle("one") + chain.handle("two")
    chain.front.send_signal(number)
    assert "stopping" in chain.output()
    assert ended(handles)
    assert chain.front.returncode == STOPPED
    assert not (chain.directory / "scratch").exists()


def test_a_part_that_dies_takes_the_chain_with_it_and_its_log_is_shown(launch):
    chain = launch({"one": PART, "two": PART})
    chain.until("go on")
    with (chain.directory / "two.log").open("a") as log:
        log.write("its last words\n")
    handles = chain.handle("one") + chain.handle("two")
    signal.pidfd_send_signal(chain.handle("two")[0], signal.SIGKILL)
    told = chain.output()
    assert "two was killed by SIGKILL" in told and "its last words" in told
    assert ended(handles)
    assert chain.front.returncode == PART_DIED


def test_a_part_that_fails_at_start_is_named_and_the_next_stage_never_starts(launch):
    chain = launch({"one": PART, "two": FAILING}, {"three": PART})
    told = chain.output()
    assert "two ended with exit code 7" in told and "no such model" in told
    assert "three" not in told
    assert chain.front.returncode == PART_DIED


def test_a_stage_starts_when_the_one_before_it_is_ready(launch):
    chain = launch({"one": PART}, {"two": PART})
    told = [chain.until("one "), chain.until("one "), chain.until("two "), chain.until("two ")]
    assert ["starts" in line for line in told] == [True, False, True, False]
    chain.until("ready after")


def test_a_part_that_is_never_ready_is_given_up(launch):
    chain = launch({"one": PART, "two": SILENT}, ready_s=2.0)
    assert "two is not ready after 2 s" in chain.output()
    assert chain.front.returncode == NOT_READY


def test_it_can_be_stopped_while_parts_are_starting(launch):
    chain = launch({"one": SILENT})
    chain.until("starts")
    chain.front.send_signal(signal.SIGINT)
    assert "stopping" in chain.output()
    assert chain.front.returncode == STOPPED


def test_a_part_that_will_not_end_is_killed_after_the_grace(launch):
    chain = launch({"one": STUBBORN})
    chain.until("go on")
    handles = chain.handle("one")
    chain.front.send_signal(signal.SIGTERM)
    assert "one        is killed" in chain.output()
    assert ended(handles)
    assert chain.front.returncode == STOPPED


def test_nothing_is_left_when_the_command_is_killed(launch):
    chain = launch({"one": PART, "two": STUBBORN})
    chain.until("go on")
    handles = chain.handle("one") + chain.handle("two") + [os.pidfd_open(chain.guard())]
    chain.front.kill()
    assert ended(handles)
    assert not (chain.directory / "scratch").exists()


def test_nothing_is_left_when_the_guard_is_killed(launch):
    chain = launch({"one": PART, "two": STUBBORN})
    chain.until("go on")
    handles = chain.handle("one") + chain.handle("two")
    os.kill(chain.guard(), signal.SIGKILL)
    chain.output()
    assert ended(handles)
    assert chain.front.returncode == 128 + signal.SIGKILL
    assert not (chain.directory / "scratch").exists()


def test_a_shell_that_ignores_ctrl_c_for_its_jobs_does_not_keep_the_chain_from_it(launch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, as from `command &` in a script
    try:
        chain = launch({"one": PART})
    finally:
        signal.signal(signal.SIGINT, before)
    chain.until("go on")
    chain.front.send_signal(signal.SIGINT)
    chain.output()
    assert chain.front.returncode == STOPPED


def test_a_port_is_its_parts_to_listen_on_and_nobody_elses_to_take():
    ports = Ports({})
    port = ports.take("ROUTER_PORT")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port))
    with socket.create_server((HOST, port)):  # with SO_REUSEADDR, as servers have it
        socket.create_connection((HOST, port)).close()
        with pytest.raises(PortError, match=f"DECODE_PORT={port}: Address already in use; leave it out for a free one"):
            Ports({"DECODE_PORT": str(port)}).take("DECODE_PORT")


def test_no_port_is_given_out_twice():
    first, second = Ports({}), Ports({})
    taken = [ports.take("PORT") for _ in range(200) for ports in (first, second)]
    assert len(set(taken)) == len(taken)


def test_a_port_of_the_environment_is_taken_as_it_is():
    port = Ports({}).take("PREFILL_PORT")  # free again: its keeper is gone
    ports = Ports({"PREFILL_PORT": str(port), "DECODE_PORT": str(port)})
    assert ports.take("PREFILL_PORT") == port
    with pytest.raises(PortError, match="DECODE_PORT=.* is another part's port too"):
        ports.take("DECODE_PORT")


@pytest.mark.parametrize("text", ["0", "65536", "http", "-1"])
def test_a_port_that_is_none_is_refused(text):
    with pytest.raises(PortError, match="ROUTER_PORT must be a port"):
        Ports({"ROUTER_PORT": text}).take("ROUTER_PORT")


def test_there_must_be_a_port_for_each_encoder():
    assert len(Ports({}).take_many("ENCODER_PORTS", 3)) == 3
    with pytest.raises(PortError, match="ENCODER_PORTS must name 3 ports, one an encoder; it names 2"):
        Ports({"ENCODER_PORTS": "5001, 5002"}).take_many("ENCODER_PORTS", 3)


def test_a_server_that_is_not_there_does_not_answer():
    port = Ports({}).take("PORT")
    assert not answers(f"http://{HOST}:{port}/health")()
