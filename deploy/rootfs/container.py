"""A container of an image without an engine: PID 1 of its own namespaces, a read-only root, no privileges."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from deploy.rootfs.stages import ENTER, Image

_NAMESPACES = ("--mount", "--pid", "--net", "--ipc", "--uts")


class Container:
    """Leave it by the end of a `with` and nothing of it goes on."""

    def __init__(
        self,
        image: Image,
        log: Path,
        volumes: Mapping[str, Path] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`volumes` are directories by where they appear; `log` takes what the process prints."""
        self._image = image
        self._environment = {**image.environment, **(environment or {})}
        self.log = log
        binds = [word for target, source in (volumes or {}).items() for word in ("--bind", f"{source}:{target}")]
        flags = ["--read-only", *binds, "--tmpfs", "/tmp", "--user", image.user]
        enter = [str(ENTER), *flags, str(image.root), image.workdir]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["unshare", *_NAMESPACES, "--fork", "--kill-child", *enter, *image.entrypoint, *image.command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def pid(self) -> int | None:
        """Its PID 1 as this machine numbers it; None before it is there or once it has ended."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        try:
            numbers = children.read_text().split()
        except OSError:
            return None
        return int(numbers[0]) if numbers else None

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def execute(self, command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        """A further process in it, as the image's user.

        Raises:
            subprocess.TimeoutExpired: after `timeout_s`.
        """
        user, _, group = self._image.user.partition(":")
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--net", "--ipc", "--uts", "--root", "--wd"]
        return subprocess.run(
            [*enter, "--setuid", user, "--setgid", group, "--", *command],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def status(self) -> dict[str, str]:
        """/proc/PID/status of its PID 1."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def stop(self, timeout_s: float) -> int:
        """The image's stop signal, and the exit code.

        Raises:
            subprocess.TimeoutExpired: if it has not ended after `timeout_s`.
        """
        if (pid := self.pid) is not None:
            signal_number = signal.Signals[self._image.stop_signal]
            subprocess.run(["kill", f"-{signal_number.value}", str(pid)], check=False)
        return self._process.wait(timeout_s)

    def wait(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # By itself: becoming the image's user took from it what --kill-child had asked of the kernel (PR_SET_PDEATHSIG).
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
