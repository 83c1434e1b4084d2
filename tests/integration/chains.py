"""EPD chains as `deploy/launch/epd.sh` and `dynamo_epd.sh` start them, with a real vLLM on CPU."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_servers import ANSWER_S, ROOT, VLLM_ENVIRONMENT, VllmServer

from deploy.launch.processes import descendants

# Two chains that start together share the cores of a small machine.
READY_S = 400
_ENDS_S = 60.0
VLLM_ARGS = """--served-model-name toy --dtype float32 --max-model-len 2048 --max-num-seqs 4
--limit-mm-per-prompt '{"image":4,"video":0}'"""


class EpdChain:
    """It has been started when this is made, and `wait_ready` returns once it serves. Its parts are found by what it prints."""

    script = "epd.sh"

    def __init__(self, model: Path, artifact: Path, logs: Path, devices: Sequence[str], **environment: str) -> None:
        """`environment` beside the tests' own; an image is answered with a sidecar's embedding or with an error, unless it says
        otherwise."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("EPD_", "DYN_"))}
        inherited |= {"PYTHON": sys.executable, "VLLM_ARGS": VLLM_ARGS, "LOG_DIR": str(logs)}
        inherited |= {"ENCODER_ARGS": "--precision f32 --embedding-dtype float32", "READY_SECONDS": str(READY_S)}
        inherited |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        flags = [flag for device in devices for flag in ("--device", device)]
        self.front = subprocess.Popen(
            [ROOT / "deploy" / "launch" / self.script, model, artifact, *flags],
            env=inherited | self.own_environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.logs = logs
        self.told = ""

    def own_environment(self) -> dict[str, str]:
        vllm = str(VLLM_ENVIRONMENT / "bin" / "vllm")
        return {"VLLM": vllm, "CONNECTOR_OPTIONS": '{"on_failure": "fail"}'}

    def wait_ready(self) -> None:
        """Raises:
        AssertionError: with what it printed, if it ends instead. It gives up by itself after `READY_S`.
        """
        assert self.front.stdout is not None
        for line in self.front.stdout:
            self.told += line
            if "try: curl" in line:
                return
        raise AssertionError(self.told)

    def vllm(self, name: str) -> VllmServer:
        """A part to be asked: `prefill`, `decode` or `router`."""
        found = re.search(rf"{name} +ready after .* on (\S+)", self.told)
        assert found, self.told
        return VllmServer(self.front, found[1], self.logs / f"{name}.log")  # type: ignore[arg-type]  # its output is text

    def process(self, name: str) -> int:
        found = re.search(rf"{name} +starts, process (\d+)", self.told)
        assert found, self.told
        return int(found[1])

    def handles(self) -> list[int]:
        """Of all its processes, those that vLLM started among them."""
        return [os.pidfd_open(process) for process in [self.front.pid, *descendants(self.front.pid)]]

    def wait_end(self) -> int:
        """The exit code; `told` has everything then."""
        self.told += self.front.communicate(timeout=_ENDS_S)[0]
        return self.front.returncode


def all_ended(handles: Sequence[int]) -> bool:
    """Whether none of these processes is left, now or soon."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    left = set(handles)
    while left and (ready := poll.poll(_ENDS_S * 1000)):
        for handle, _ in ready:
            poll.unregister(handle)
            os.close(handle)
            left.discard(handle)
    return not left


@contextmanager
def started(*chains: EpdChain) -> Iterator[None]:
    """With these chains ready; whatever the test leaves of them is killed."""
    try:
        for chain in chains:
            chain.wait_ready()
        yield
    finally:
        for chain in chains:
            if chain.front.poll() is None:
                chain.front.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    chain.front.communicate(timeout=ANSWER_S)
            chain.front.kill()  # its guard ends the rest
