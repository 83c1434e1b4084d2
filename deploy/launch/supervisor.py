"""Parts of a chain as processes that start, become ready and end together.

It knows nothing of what the parts are: a part is a command, a name, and a way to ask whether it is ready. It runs in the guard of
`processes.guarded`, single-threaded, with the signals blocked that it waits for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from deploy.launch.processes import STOP, WAITED, as_part_of

_LOOK_S = 0.25
_TAIL_LINES, _TAIL_BYTES = 20, 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """
    Attributes:
        name: of the part and of its log.
        command: the program, found on PATH, and its arguments.
        where: its address, for people.
        ready: True once it can serve; it is asked again and again.
        environment: variables beside those of the supervisor.
    """

    name: str
    command: Sequence[str]
    where: str
    ready: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)


class ChainError(Exception):
    """The chain cannot go on. The message says which part, why, and how its log ends."""


class StartError(ChainError):
    """A part's program cannot be started."""


class PartDied(ChainError):
    """A part has ended, in whatever way."""


class NotReady(ChainError):
    """A part took longer than it may."""


class StopRequested(Exception):
    """A signal asks for the end."""


@dataclass(slots=True)
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    ready: bool = False


class Supervisor:
    """Parts are started, waited for, watched, ended; `say` gets a line for each event."""

    def __init__(self, logs: Path, say: Callable[[str], None]) -> None:
        self._logs = logs
        self._say = say
        self._running: list[_Running] = []

    def start(self, part: Part) -> None:
        """Raises:
        StartError: if there is no such program, or it may not be run.
        """
        log = self._logs / f"{part.name}.log"
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    part.command,
                    env={**os.environ, **part.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=as_part_of(os.getpid()),
                )
            except OSError as error:
                raise StartError(f"{part.name} does not start: {part.command[0]}: {error.strerror}") from error
        self._running.append(_Running(part, process, log, time.monotonic()))
        self._say(f"{part.name:10} starts, process {process.pid}, log {log}")

    def wait_until_ready(self, timeout_s: float) -> None:
        """Until all that were started are.

        Raises:
            PartDied, NotReady, StopRequested
        """
        ends = time.monotonic() + timeout_s
        while waiting := [running for running in self._running if not running.ready]:
            self._look(_LOOK_S)
            for running in waiting:
                if running.part.ready():
                    running.ready = True
                    took_s = time.monotonic() - running.started
                    self._say(f"{running.part.name:10} ready after {took_s:.1f} s on {running.part.where}")
                elif time.monotonic() > ends:
                    raise NotReady(
                        f"{running.part.name} is not ready after {timeout_s:.0f} s; {running.log} ends:\n{_tail(running.log)}"
                    )

    def watch(self) -> NoReturn:
        """Raises:
        PartDied, StopRequested
        """
        while True:
            self._look(None)

    def end(self, grace_s: float) -> None:
        """Tell all parts to end, kill those that take longer than the grace, or all at once when told to stop again. Their own
        children are the guard's to kill."""
        for running in self._alive():
            running.process.terminate()
        ends = time.monotonic() + grace_s
        while self._alive() and (left_s := ends - time.monotonic()) > 0:
            got = signal.sigtimedwait(WAITED, left_s)
            if got is not None and got.si_signo in STOP:
                break
        for running in self._alive():
            self._say(f"{running.part.name:10} is killed: it did not end by itself")
            running.process.kill()
            running.process.wait()

    def _look(self, timeout_s: float | None) -> None:
        """Wait for a signal, or a while; raise what it means."""
        got = signal.sigwaitinfo(WAITED) if timeout_s is None else signal.sigtimedwait(WAITED, timeout_s)
        if got is not None and got.si_signo in STOP:
            raise StopRequested
        for running in self._running:
            if (code := running.process.poll()) is not None:
                raise PartDied(f"{running.part.name} {_ending(code)}; {running.log} ends:\n{_tail(running.log)}")

    def _alive(self) -> list[_Running]:
        return [running for running in self._running if running.process.poll() is None]


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:]) or "    (nothing)"
