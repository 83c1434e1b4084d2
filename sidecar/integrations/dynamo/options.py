"""Every option of the worker: a flag, with a variable of this project's and Dynamo's own where it has one."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sidecar.addresses import AddressError, Addresses
from sidecar.flags import (
    SettingsError,
    add_arguments,
    flag,
    flag_name,
    number,
    path_or_none,
    setting,
    values_from,
    whole,
    words,
)
from sidecar.integrations.dynamo.handover import MODES
from sidecar.integrations.dynamo.images import Bounds, bounds

__all__ = ["Options", "SettingsError"]

# A second pool of workers for the same model, as Dynamo's operator starts one to replace the first.
_SUFFIX_VARIABLE = "DYN_NAMESPACE_WORKER_SUFFIX"
_NAMESPACE = re.compile(r"[\w-]+")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_LONGEST_S = 86_400.0
_CHOICES = {
    "embedding_transfer_mode": MODES,
    "discovery_backend": ("kubernetes", "etcd", "file", "mem"),
    "request_plane": ("tcp", "nats"),
    "response_plane": ("", "tcp", "quic"),
    "event_plane": ("", "zmq", "nats"),
    "log_level": ("debug", "info", "warning", "error"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Raises:
    SettingsError: if a value cannot be meant.
    """

    server: tuple[str, ...] = setting(
        "sidecars: host:port or dns:///name:port, each for all addresses of the name; or unix:/path",
        ("127.0.0.1:50051",),
        parse=words,
        repeatable=True,
    )
    model: str = setting(
        "prefill's checkpoint: a directory or a hub id. Where its files are on this host, sidecars must prove to hold its weights"
    )
    model_name: str = setting("the name that prefill serves it by; not given: as --model", "")
    fingerprint: str = setting("expect this artifact instead of the checkpoint's: 64 digits", "")
    mm_processor_kwargs: Bounds = setting("as prefill's: min_pixels and max_pixels of an image", Bounds(), parse=bounds)
    embedding_transfer_mode: str = setting(
        f"{', '.join(MODES)}; as prefill's", "local", variables=("DYN_VLLM_EMBEDDING_TRANSFER_MODE",)
    )
    local_directory: Path = setting(
        "where files of local mode lie, on a file system in memory; prefill must see it under the same name",
        Path("/dev/shm"),
        parse=Path,
    )
    local_bytes: int = setting("so many bytes of files at a time; what is more waits", 1 << 30, parse=whole)
    unread_seconds: float = setting("a file that nobody reads goes after so long", 180.0, parse=number)
    request_seconds: float = setting("longest that a request may take, asking again included", 60.0, parse=number)
    drain_seconds: float = setting(
        "how long SIGTERM waits for what is under way, after the time that others need to notice", 30.0, parse=number
    )
    namespace: str = setting("of Dynamo's", "dynamo", variables=("DYN_NAMESPACE",))
    discovery_backend: str = setting("kubernetes, etcd, file or mem", "etcd", variables=("DYN_DISCOVERY_BACKEND",))
    request_plane: str = setting("tcp or nats", "tcp", variables=("DYN_REQUEST_PLANE",))
    response_plane: str = setting("tcp or quic; not given: Dynamo's own", "", variables=("DYN_RESPONSE_PLANE",))
    event_plane: str = setting("zmq or nats; not given: Dynamo's own", "", variables=("DYN_EVENT_PLANE",))
    encoder_device: str = setting(
        "what the launcher asked for; a warning if the sidecars run elsewhere", "", variables=("DYN_ENCODER_DEVICE",)
    )
    tls: bool = setting("call the sidecars over TLS, as any --tls-… does", False, parse=flag)
    tls_ca: Path | None = setting("trust the authorities in this PEM file alone", None, parse=path_or_none)
    tls_cert: Path | None = setting("this worker's certificate, for mutual TLS", None, parse=path_or_none)
    tls_key: Path | None = setting("the certificate's key", None, parse=path_or_none)
    token_file: Path | None = setting("send the first token in this file", None, parse=path_or_none)
    log_level: str = setting("debug, info, warning or error; Dynamo's own log has DYN_LOG", "info")

    def __post_init__(self) -> None:
        try:
            Addresses(self.server)
        except AddressError as error:
            raise SettingsError(f"--server: {error}") from error
        if not self.model:
            raise SettingsError("--model must name prefill's checkpoint")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                choices = ", ".join(filter(None, known))
                raise SettingsError(f"{flag_name(name)} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("unread_seconds", "request_seconds", "drain_seconds"):
            if not 0 < getattr(self, name) <= _LONGEST_S:
                raise SettingsError(
                    f"{flag_name(name)} must be above 0 and at most {_LONGEST_S:.0f}, got {getattr(self, name)!r}"
                )
        if self.unread_seconds <= self.request_seconds:
            # Prefill reads only once it has the answers of all encode workers that a request's images went to.
            raise SettingsError(
                f"--unread-seconds ({self.unread_seconds:.12g}) must be more than --request-seconds ({self.request_seconds:.12g})"
            )
        if self.local_bytes < 1:
            raise SettingsError(f"--local-bytes must be at least 1, got {self.local_bytes}")
        if self.embedding_transfer_mode == "local" and not self.local_directory.is_dir():
            raise SettingsError(f"--local-directory {self.local_directory} is no directory")
        if not _NAMESPACE.fullmatch(self.namespace):
            raise SettingsError(
                f"--namespace must be of letters, digits, hyphens and underscores, got {self.namespace!r}"
            )
        if self.fingerprint and not _FINGERPRINT.fullmatch(self.fingerprint):
            raise SettingsError(
                f"--fingerprint must be the 64 hexadecimal digits that `python -m sidecar info` prints, got {self.fingerprint!r}"
            )

    @property
    def served_name(self) -> str:
        return self.model_name or self.model

    @property
    def uses_tls(self) -> bool:
        return self.tls or any((self.tls_ca, self.tls_cert, self.tls_key))

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Self:
        """From the command line, then the environment.

        Raises:
            SettingsError: if a value does not parse or cannot be meant.
            SystemExit: of argparse.
        """
        parser = argparse.ArgumentParser(
            prog="python -m sidecar.integrations.dynamo",
            description="Dynamo's encode component, which has its images encoded by one or many sidecars.",
            epilog="What Dynamo's runtime reads from the environment holds here too: DYN_FILE_KV, DYN_TCP_RPC_HOST, "
            "DYN_SYSTEM_PORT, DYN_LOG, DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS and the others.",
            allow_abbrev=False,
        )
        add_arguments(cls, parser)
        values = values_from(cls, vars(parser.parse_args(arguments)), environment)
        if suffix := environment.get(_SUFFIX_VARIABLE):
            values["namespace"] = f"{values.get('namespace', 'dynamo')}-{suffix}"
        return cls(**values)
