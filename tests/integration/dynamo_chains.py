"""The chain inside Dynamo as `deploy/launch/dynamo_epd.sh` starts it, and further encode workers beside its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from chains import EpdChain
from vllm_servers import ROOT

# `make test-integration` says where it is.
DYNAMO_ENVIRONMENT = Path(os.environ.get("EPD_DYNAMO_ENV", ROOT / ".venv-dynamo")).absolute()
_PYTHON = str(DYNAMO_ENVIRONMENT / "bin" / "python")
_READY = "serving dyn://"


class DynamoChain(EpdChain):
    script = "dynamo_epd.sh"

    def own_environment(self) -> dict[str, str]:
        return {"DYNAMO_PYTHON": _PYTHON, "WORKER_ARGS": "--model-name toy"}

    def files(self) -> list[Path]:
        """Embeddings of `local` mode that lie there now."""
        return [path for path in self.scratch().rglob("*.safetensors") if "epd-dynamo-" in path.parent.name]

    @contextmanager
    def worker(self, model: Path, servers: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """One more encode worker in this chain, once it serves; ended by SIGTERM, since Dynamo asks one that was killed for ten
        more seconds."""
        environment = self._environment("encode") | {"DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "2"}
        environment.pop("DYN_SYSTEM_PORT")
        command = [_PYTHON, "-P", "-m", "sidecar.integrations.dynamo", "--server", ",".join(servers)]
        command += ["--model", str(model), "--model-name", "toy", "--local-directory", str(self.scratch())]
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            wait_for(log, _READY, process)
            yield process
            process.terminate()
            process.wait(60)
        finally:
            process.kill()
            process.wait()

    def scratch(self) -> Path:
        """Its directory in shared memory."""
        return Path(self._environment("encode")["DYN_FILE_KV"]).parent

    def _environment(self, part: str) -> dict[str, str]:
        lines = Path(f"/proc/{self.process(part)}/environ").read_text().split("\0")
        return dict(line.split("=", 1) for line in lines if "=" in line)


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    ends = time.monotonic() + timeout_s
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None and time.monotonic() < ends, log.read_text(errors="replace")[-4000:]
        time.sleep(0.05)
