"""The worker's flags, each with a variable; what Dynamo itself reads from the environment (DYN_…) stays Dynamo's."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sidecar.integrations.dynamo.handover import MODES
from sidecar.integrations.dynamo.protocol import Bounds


class OptionsError(ValueError):
    """An option cannot be meant as it is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Raises:
    OptionsError: if a value is out of range.
    """

    servers: tuple[str, ...]
    model: str
    model_name: str
    namespace: str
    component: str
    endpoint: str
    mode: str
    directory: Path
    directory_bytes: int
    unread_s: float
    request_s: float
    drain_s: float
    bounds: Bounds
    fingerprint: str | None
    device: str
    tls: bool
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    token_file: Path | None
    log_level: str

    def __post_init__(self) -> None:
        if not self.servers:
            raise OptionsError("--server needs the address of a sidecar, such as 127.0.0.1:50051")
        for name, seconds in (
            ("--request-seconds", self.request_s),
            ("--unread-seconds", self.unread_s),
            ("--drain-seconds", self.drain_s),
        ):
            if not 0 < seconds <= 86_400:
                raise OptionsError(f"{name} must be more than 0 and at most 86400, got {seconds:g}")
        if self.directory_bytes < 1:
            raise OptionsError(f"--local-bytes must be at least 1, got {self.directory_bytes}")
        if self.mode == "local" and not self.directory.is_dir():
            raise OptionsError(f"--local-directory {self.directory} is no directory")
        for part in (self.namespace, self.component, self.endpoint):
            if not part or "." in part or "/" in part:
                raise OptionsError(f"a namespace, component and endpoint have no dots and slashes; got {part!r}")


def parse(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Options:
    """Raises:
    OptionsError: if a value is out of range.
    SystemExit: of argparse.
    """

    def variable(name: str, default: str = "") -> str:
        return environment.get(name) or default

    parser = argparse.ArgumentParser(
        prog="python -m sidecar.integrations.dynamo",
        description="Dynamo's encode component, which has its images encoded by one or many sidecars.",
        epilog="Dynamo's own variables hold as for its other workers: DYN_NAMESPACE, DYN_DISCOVERY_BACKEND, DYN_FILE_KV, "
        "DYN_REQUEST_PLANE, DYN_EVENT_PLANE, DYN_SYSTEM_PORT and the others.",
    )
    add = parser.add_argument
    add(
        "--server",
        action="append",
        metavar="ADDRESS",
        help="sidecars: host:port, dns:///name:port, unix:/path; several with commas "
        "or the flag several times (EPD_SERVER; 127.0.0.1:50051)",
    )
    add(
        "--model",
        required=True,
        help="prefill's checkpoint: a directory, or a hub id. Where its files are on this host, the sidecars "
        "must prove to hold its weights",
    )
    add("--model-name", "--served-model-name", default="", help="the name that prefill serves it by (--model)")
    add("--fingerprint", help="expect this one instead of the checkpoint's (EPD_FINGERPRINT)")
    add(
        "--namespace",
        default=variable("DYN_NAMESPACE", "dynamo"),
        help="Dynamo's namespace (DYN_NAMESPACE; %(default)s)",
    )
    add("--component", default="encode", help="%(default)s is where prefill looks")
    add("--endpoint", default="generate", help="%(default)s is where prefill looks")
    add(
        "--embedding-transfer-mode", dest="mode", choices=MODES, default="local", help="as prefill has it (%(default)s)"
    )
    add(
        "--local-directory",
        type=Path,
        default=Path("/dev/shm"),
        help="where the files of local mode lie; prefill must see it under the same name (%(default)s)",
    )
    add(
        "--local-bytes",
        type=int,
        default=1 << 30,
        help="so many bytes of files at a time; who would add more waits (%(default)s)",
    )
    add("--unread-seconds", type=float, default=120.0, help="a file that nobody reads goes after so long (%(default)s)")
    add(
        "--request-seconds",
        type=float,
        default=60.0,
        help="longest that a request may take, asking again included (%(default)s)",
    )
    add("--drain-seconds", type=float, default=30.0, help="how long SIGTERM waits for what is under way (%(default)s)")
    add("--min-pixels", type=int, help="as prefill's --mm-processor-kwargs")
    add("--max-pixels", type=int, help="as prefill's --mm-processor-kwargs")
    add("--log-level", choices=("debug", "info", "warning", "error"), default=variable("EPD_LOG_LEVEL", "info"))
    group = parser.add_argument_group("TLS and tokens", "Any of the --tls flags calls the sidecars over TLS.")
    group.add_argument("--tls", action="store_true", help="trust the authorities that gRPC knows by itself")
    for name, what in (
        ("ca", "trust the authorities in this PEM file"),
        ("cert", "certificate of this worker"),
        ("key", "its key"),
    ):
        group.add_argument(f"--tls-{name}", metavar="FILE", type=Path, help=what)
    group.add_argument("--token-file", metavar="FILE", type=Path, help="send the first token in this file")
    given = parser.parse_args(arguments)
    bounds = [given.min_pixels, given.max_pixels]
    if any(pixels is not None and pixels < 1 for pixels in bounds):
        raise OptionsError("--min-pixels and --max-pixels must be at least 1")
    servers = given.server or [variable("EPD_SERVER", "127.0.0.1:50051")]
    return Options(
        servers=tuple(address.strip() for server in servers for address in server.split(",") if address.strip()),
        model=given.model,
        model_name=given.model_name or given.model,
        namespace=given.namespace,
        component=given.component,
        endpoint=given.endpoint,
        mode=given.mode,
        directory=given.local_directory,
        directory_bytes=given.local_bytes,
        unread_s=given.unread_seconds,
        request_s=given.request_seconds,
        drain_s=given.drain_seconds,
        bounds=Bounds(*bounds),
        fingerprint=given.fingerprint or environment.get("EPD_FINGERPRINT") or None,
        device=variable("DYN_ENCODER_DEVICE"),
        tls=given.tls,
        tls_ca=given.tls_ca,
        tls_cert=given.tls_cert,
        tls_key=given.tls_key,
        token_file=given.token_file,
        log_level=given.log_level,
    )
