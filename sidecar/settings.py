"""Every setting of the server: one frozen object, filled from flags and `EPD_…` variables, that validates itself."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Self

from sidecar.flags import (
    SettingsError,
    add_arguments,
    cpu_list,
    flag,
    flag_name,
    number,
    path_or_none,
    setting,
    values_from,
    variables_of,
    whole,
    words,
)
from sidecar.runtimes.loading import RUNTIME_NAMES
from sidecar.vision.dtypes import DType

__all__ = ["Settings", "SettingsError"]

# What the contract's and gRPC's numbers can hold.
_MAX_INT = 2**31 - 1
_MAX_BYTES = 1 << 62
_MAX_SECONDS = 86_400.0
_MAX_PORT = 65_535
_MODE = re.compile("0?[0-7]{3}")

# What decides who may call.
_PROTECTING = ("tls_cert", "tls_key", "tls_client_ca", "token_file")
_EMBEDDING_DTYPES = ("auto", DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32)

# The least and the most that each may be.
_RANGES: dict[str, tuple[float, float]] = {
    "threads": (0, _MAX_INT),
    "streams": (1, 1024),
    "batch_patches": (0, _MAX_INT),
    "numa_node": (-1, 1023),
    "preprocess_threads": (0, _MAX_INT),
    "warm_up_seconds": (0, _MAX_SECONDS),
    "max_message_bytes": (1, _MAX_INT),
    "message_seconds": (0.1, _MAX_SECONDS),
    "max_items": (1, _MAX_INT),
    "max_image_pixels": (1, _MAX_INT),
    "max_frames": (1, _MAX_INT),
    "max_item_patches": (1, _MAX_INT),
    "max_queue_items": (1, _MAX_INT),
    "max_queue_patches": (1, _MAX_INT),
    "max_held_bytes": (1, _MAX_BYTES),
    "max_connections": (0, _MAX_INT),
    "max_connection_calls": (1, _MAX_INT),
    "connection_idle_seconds": (1, _MAX_SECONDS),
    "store_bytes": (0, _MAX_BYTES),
    "lease_seconds": (0.1, _MAX_SECONDS),
    "url_bytes": (1, _MAX_INT),
    "url_seconds": (0.1, _MAX_SECONDS),
    "drain_seconds": (0, _MAX_SECONDS),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "runtime": ("auto", *RUNTIME_NAMES),
    "precision": ("auto", "f32", "bf16", "int8"),
    "embedding_dtype": _EMBEDDING_DTYPES,
    "trial": ("auto", "never"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("text", "json"),
}


def _default_cache() -> Path | None:
    """None where there is no home: under a user id that only the container's runtime knows."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "epd-encoder-sidecar"
    except RuntimeError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Raises:
    SettingsError: if a value is out of range.
    """

    artifact: Path = setting("directory of the sealed artifact that `python -m export` wrote", parse=Path)
    listen: tuple[str, ...] = setting(
        "addresses to serve on, comma-separated: host:port, unix:/path; several are served at once. "
        "The default is reachable from this host only",
        ("127.0.0.1:50051",),
        parse=words,
    )
    socket_mode: str = setting(
        "mode of unix sockets in --listen: 0600, or 0660 for the group of the socket's directory, for callers of another user",
        "0600",
    )
    device: tuple[str, ...] = setting(
        "devices to encode on, one lane each, in the runtime's terms: cpu, ov:GPU, cuda:0, xpu:0; comma-separated, or the flag "
        "several times. The log and Info say what really ran",
        ("cpu",),
        parse=words,
        variables=("DYN_ENCODER_DEVICE",),
        repeatable=True,
    )
    runtime: str = setting(
        f"one of {', '.join(RUNTIME_NAMES)}, or auto: openvino where the artifact has it, torch for cuda and xpu",
        "auto",
    )
    precision: str = setting("f32, bf16 or int8, or auto: what the artifact names first for the runtime", "auto")
    embedding_dtype: str = setting(
        "dtype of the embeddings sent: bfloat16, float16, float32, or auto: the checkpoint's, which is what its prefill "
        "worker computes in",
        "auto",
    )
    threads: int = setting(
        "threads of a CPU lane's runtime; 0 takes the cores that the container really has, by affinity and cgroup quota, shared "
        "out among the CPU lanes",
        0,
        parse=whole,
    )
    streams: int = setting(
        "runs that a lane carries out side by side, sharing its threads. More than 1 trades latency for throughput where there "
        "are many cores and small items",
        1,
        parse=whole,
    )
    batch_patches: int = setting(
        "the most patches in one run of several items. Items share a run only while its fixed cost is worth sharing, by the "
        "lane's own measure; 0 for one item a run",
        8192,
        parse=whole,
    )
    cpus: tuple[int, ...] = setting("CPUs to stay on, such as 0-15,32; none given: where it is let", (), parse=cpu_list)
    numa_node: int = setting("NUMA node whose CPUs to stay on, and so its memory; -1: any", -1, parse=whole)
    warm_up_seconds: float = setting(
        "how long each lane may measure itself before it is ready; small items are always run", 3.0, parse=number
    )
    preprocess_threads: int = setting(
        "threads that decode and resize; 0: two, or beside a GPU as many as there are cores, at most eight. They share the cores "
        "with a CPU lane's runtime, so more of them slows its runs",
        0,
        parse=whole,
    )
    cache_dir: Path | None = setting(
        "where compiled models are kept, so that a restart is quick; none turns it off (read-only file systems)",
        _default_cache(),
        parse=path_or_none,
    )
    trial: str = setting(
        "auto: a child process loads each lane first, unless the same has run on this machine before and --cache-dir remembers "
        "it, so that a crash of native code is an error message; never: no child process",
        "auto",
    )
    max_message_bytes: int = setting(
        "largest request accepted. The whole of it is in memory at once, so it bounds what one caller can make us hold",
        64 << 20,
        parse=whole,
    )
    message_seconds: float = setting(
        "longest that one request may take to arrive; it bounds how long half of one can be held", 60.0, parse=number
    )
    max_items: int = setting("most items in one request", 256, parse=whole)
    max_image_pixels: int = setting(
        "largest picture decoded, in pixels before resizing; checked in the header before any pixel is decoded",
        64_000_000,
        parse=whole,
    )
    max_frames: int = setting("most frames in one video", 4096, parse=whole)
    max_item_patches: int = setting(
        "largest item encoded, in patches. Time grows with its square in the full-attention blocks",
        65_536,
        parse=whole,
    )
    max_queue_items: int = setting(
        "items that may be under way, from admission to answer; beyond it callers are told when to come back instead of being "
        "made to wait",
        2048,
        parse=whole,
    )
    max_queue_patches: int = setting("patches that may be under way; as --max-queue-items", 262_144, parse=whole)
    max_held_bytes: int = setting(
        "bytes of requests, pictures being fetched or decoded, and replies, in calls that are not over; beyond it new calls are "
        "told to come back, and large pictures wait. docs/operations.md says what a process needs in all",
        1 << 30,
        parse=whole,
    )
    max_connections: int = setting(
        "connections that may be open at once, for each address of --listen; more are closed as they arrive. 0: as many as the "
        "limit on open files allows, at most 1024",
        0,
        parse=whole,
    )
    max_connection_calls: int = setting(
        "calls that may be open at once on one connection; a gRPC client sends further ones as these end. Also bounds the time "
        "that a connection which opens and resets calls can take from others",
        256,
        parse=whole,
    )
    connection_idle_seconds: float = setting(
        "how long a connection without a call stays open; clients connect again with their next call",
        120.0,
        parse=number,
    )
    store: Path | None = setting(
        "directory of the store, in shared memory, for this sidecar alone; it is swept at start. none: nothing is kept, and "
        "every embedding is sent inline",
        Path("/dev/shm/epd-encoder"),
        parse=path_or_none,
    )
    store_bytes: int = setting(
        "capacity of the store; 0: half of its file system, at most 4 GiB. Beyond it the embedding used longest ago goes",
        0,
        parse=whole,
    )
    lease_seconds: float = setting(
        "how long a lease holds a stored embedding unless it is released", 120.0, parse=number
    )
    tls_cert: Path | None = setting("certificate chain in PEM; with --tls-key, serve TLS", None, parse=path_or_none)
    tls_key: Path | None = setting("private key in PEM", None, parse=path_or_none)
    tls_client_ca: Path | None = setting(
        "CA of the callers' certificates in PEM: mutual TLS, nobody else gets in", None, parse=path_or_none
    )
    token_file: Path | None = setting(
        "file of bearer tokens, one a line, `name:token` or `token`; without one of them only health is answered",
        None,
        parse=path_or_none,
    )
    url_input: bool = setting("take items by https or data URL, from public hosts only", False, parse=flag)
    url_hosts: tuple[str, ...] = setting("the only hosts to take URLs of; none given: any public one", (), parse=words)
    url_bytes: int = setting("largest picture fetched", 64 << 20, parse=whole)
    url_seconds: float = setting("longest that fetching one may take", 30.0, parse=number)
    metrics_listen: str = setting("host:port of /metrics and the status page, over HTTP; none: neither", "none")
    watch_artifact: bool = setting(
        "serve a new artifact when one takes the place of the served one; SIGHUP asks for the same", False, parse=flag
    )
    drain_seconds: float = setting(
        "how long SIGTERM waits for accepted work, and for leases, before giving up on them", 30.0, parse=number
    )
    allow_below_bar: bool = setting(
        "serve an artifact whose measured accuracy is below its bar, or was never measured", False, parse=flag
    )
    allow_unsealed: bool = setting(
        "serve a directory made by `optimum-cli export openvino`, which has no manifest", False, parse=flag
    )
    log_level: str = setting("debug, info, warning or error", "info")
    log_format: Literal["text", "json"] = setting("text or json, one line a request", "text")

    def __post_init__(self) -> None:
        if not self.listen:
            raise SettingsError("--listen needs at least one address")
        for address in self.listen:
            if not _is_unix(address):
                _check_address(address, "--listen", ", or unix:/path")
        if not _MODE.fullmatch(self.socket_mode):
            raise SettingsError(f"--socket-mode must be an octal mode such as 0600 or 0660, got {self.socket_mode!r}")
        if not self.device:
            raise SettingsError("--device must name a device, such as cpu")
        if self.metrics_listen != "none":
            _check_address(self.metrics_listen, "--metrics-listen", ", or none")
        for name, (least, most) in _RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise SettingsError(
                    f"{flag_name(name)} must be from {least:g} to {most:.0f}, got {getattr(self, name)}"
                )
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise SettingsError(f"{flag_name(name)} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self._check_security()

    def _check_security(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("--tls-cert and --tls-key must be given together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise SettingsError("--tls-client-ca needs --tls-cert and --tls-key")
        if self.url_hosts and not self.url_input:
            raise SettingsError("--url-hosts needs --url-input")

    @property
    def on_cpu(self) -> tuple[str, ...]:
        """The devices that are CPUs."""
        return tuple(device for device in self.device if device.removeprefix("ov:").lower() == "cpu")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """One flag for each field."""
        add_arguments(cls, parser)

    @staticmethod
    def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
        """Variables that look like settings and are none: mistyped, most likely."""
        known = {name for one in fields(Settings) for name in variables_of(one)} | {"EPD_SERVER"}
        return sorted(name for name in environment if name.startswith("EPD_") and name not in known)

    @staticmethod
    def emptied_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
        """Variables that were to protect the server, and are set to nothing."""
        protecting = [one for one in fields(Settings) if one.name in _PROTECTING]
        return [name for one in protecting for name in variables_of(one) if environment.get(name) == ""]

    @classmethod
    def from_sources(
        cls, flags: Mapping[str, str | list[str] | None], environment: Mapping[str, str] = os.environ
    ) -> Self:
        """Flags first, then the environment, then defaults.

        Raises:
            SettingsError: if a value does not parse, is out of range, or a required one is missing.
        """
        return cls(**values_from(cls, flags, environment))


def _is_unix(address: str) -> bool:
    return address.startswith(("unix:", "unix-abstract:")) and not address.endswith(":") and address.isprintable()


def _check_address(address: str, name: str, others: str) -> None:
    """gRPC would take a missing port for 443, and one that is too large for another one. `others`: what else it may be.

    Raises:
        SettingsError: if the address is not host:port.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= _MAX_PORT):
        raise SettingsError(
            f"{name} takes host:port with a port from 0 (any that is free) to {_MAX_PORT}{others}; got {address!r}"
        )
