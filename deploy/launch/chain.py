"""A chain from its first part's start to its last one's end: stages that follow each other, lines for people, an exit code."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.launch.processes import guarded
from deploy.launch.supervisor import ChainError, NotReady, Part, StopRequested, Supervisor

STOPPED, PART_DIED, BAD_SETTINGS, NOT_READY = 0, 1, 2, 3
EXIT_CODES = (
    "exit codes: 0 stopped by Ctrl-C or SIGTERM, 1 a part died, 2 settings that will not do, 3 not ready in time"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """
    Attributes:
        name: that each line begins with.
        stages: parts that start together; the next stage's once these are ready.
        url: where it is served.
        hint: what to try, told once all is ready.
        ready_s: how long a stage may take.
        grace_s: how long parts may take to end.
    """

    name: str
    stages: Sequence[Sequence[Part]]
    url: str
    hint: str
    ready_s: float = 600.0
    grace_s: float = 20.0


def run(chain: Chain, logs: Path, scratch: Path) -> int:
    """Run it until it is stopped or a part dies. Nothing of it is running afterwards.

    Args:
        logs: where each part's log goes.
        scratch: a directory of the parts', removed at the end.

    Returns:
        The exit code.
    """
    return guarded(lambda: _run(chain, logs), lambda: shutil.rmtree(scratch, ignore_errors=True))


def _run(chain: Chain, logs: Path) -> int:
    def say(line: str) -> None:
        sys.stdout.write(f"{chain.name}: {line}\n")
        sys.stdout.flush()

    supervisor = Supervisor(logs, say)
    started = time.monotonic()
    try:
        for stage in chain.stages:
            for part in stage:
                supervisor.start(part)
            supervisor.wait_until_ready(chain.ready_s)
        say(f"ready after {time.monotonic() - started:.1f} s: {chain.url}")
        say(chain.hint)
        supervisor.watch()
    except StopRequested:
        say("stopping")
        return STOPPED
    except NotReady as error:
        say(str(error))
        return NOT_READY
    except ChainError as error:
        say(str(error))
        return PART_DIED
    finally:
        supervisor.end(chain.grace_s)
