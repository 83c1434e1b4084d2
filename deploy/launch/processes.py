"""What Linux does so that nothing outlives its parent: death signals, adoption of orphans, and a guard that is hard to kill.

A chain is three generations: the command in the terminal (the front), a guard that starts and watches the parts, and the parts
with all that they start themselves. Kill the front, and the guard is told and ends the parts; kill the guard, and its parts are
killed and whatever they had started falls to the front, which ends it. Only both at once leaves anything to chance.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Waited for, never handled: a handler would run wherever the program happens to be.
WAITED = {*STOP, signal.SIGCHLD}

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def adopt_orphans() -> None:
    """From now on, descendants whose parent ends become our children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int, number: signal.Signals) -> None:
    """Get the signal when `parent`, a process id, ends; for the child, right after the fork."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before it could be tied to
        os.kill(os.getpid(), number)


def as_part_of(parent: int) -> Callable[[], None]:
    """For subprocess's `preexec_fn`: killed with its parent, and with the signals that a program expects to find."""

    def prepare() -> None:
        die_with(parent, signal.SIGKILL)
        for number in STOP:  # a shell starts background jobs with SIGINT ignored
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    return prepare


def descendants(ancestor: int) -> list[int]:
    """Ids of all processes below it, zombies included, parents before their children."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # gone meanwhile
                # "pid (name) state ppid …", and a name may hold anything (proc_pid_stat(5))
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children[parent].append(int(entry.name))
    found = [ancestor]
    for process in found:
        found += children[process]
    return found[1:]


def kill_descendants() -> int:
    """Kill whatever is left below us, whichever group or session it moved to, and reap it. The number of those killed."""
    killed = set()
    while left := descendants(os.getpid()):
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        killed.update(left)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)  # a process in the kernel's hands dies when it comes out
    return len(killed)


def guarded(work: Callable[[], int], clean_up: Callable[[], None]) -> int:
    """Run `work` in a child, the guard; hand on signals that mean "stop"; return its exit code, with nothing left behind.

    `work` finds `WAITED` blocked and is to wait for them (`signal.sigtimedwait`). `clean_up` runs after everything has ended, in
    the guard and in us, so that it happens whichever of the two is killed; it must not mind a second time.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED)
    adopt_orphans()
    sys.stdout.flush()
    sys.stderr.flush()
    front = os.getpid()
    guard = os.fork()
    if guard == 0:
        os._exit(_guard(front, work, clean_up))
    while True:
        number = signal.sigwaitinfo(WAITED).si_signo
        if number != signal.SIGCHLD:
            os.kill(guard, signal.SIGTERM)
            continue
        process, status = os.waitpid(guard, os.WNOHANG)
        if process:
            break
    kill_descendants()
    clean_up()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _guard(front: int, work: Callable[[], int], clean_up: Callable[[], None]) -> int:
    code = 1
    try:
        die_with(front, signal.SIGTERM)
        os.setsid()  # Ctrl-C reaches the front alone, which tells us
        adopt_orphans()
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        kill_descendants()
        clean_up()
        with suppress(OSError):
            sys.stdout.flush()
    return code
