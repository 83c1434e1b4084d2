"""Every setting of the server: one frozen object, filled from flags and `EPD_…` variables, that validates itself.

A field's metadata is its documentation; the command line is generated from it, so flag, variable and help never disagree.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from sidecar.runtimes.loading import RUNTIME_NAMES
from sidecar.vision.dtypes import DType

# What the contract's and gRPC's numbers can hold.
_MAX_INT = 2**31 - 1
_MAX_DRAIN_S = 86_400.0
_MAX_PORT = 65_535

_EMBEDDING_DTYPES = ("auto", DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32)


class SettingsError(ValueError):
    """A setting that cannot be; the message names its flag."""


def _setting(
    help: str, default: Any = MISSING, *, parse: Callable[[str], Any] = str, variables: tuple[str, ...] = ()
) -> Any:
    """`variables` are further environment variables that are honoured, after EPD_<NAME>."""
    metadata = {"help": help, "parse": parse, "variables": variables}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def _flag(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in values:
        raise ValueError("must be true or false")
    return values[text.lower()]


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def _addresses(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _cache_dir(text: str) -> Path | None:
    return None if text in ("", "none") else Path(text)


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

    artifact: Path = _setting("directory of the sealed artifact that `python -m export` wrote", parse=Path)
    listen: tuple[str, ...] = _setting(
        "addresses to serve on, comma-separated: host:port, unix:/path; several are served at once. "
        "The default is reachable from this host only",
        ("127.0.0.1:50051",),
        parse=_addresses,
    )
    device: str = _setting(
        "device to encode on, in the runtime's terms: cpu, ov:GPU, cuda:0, xpu:0. The log and Info say what really ran",
        "cpu",
        variables=("DYN_ENCODER_DEVICE",),
    )
    runtime: str = _setting(
        f"one of {', '.join(RUNTIME_NAMES)}, or auto: openvino where the artifact has it, torch for cuda and xpu",
        "auto",
    )
    precision: str = _setting("f32, bf16 or int8, or auto: what the artifact names first for the runtime", "auto")
    embedding_dtype: str = _setting(
        "dtype of the embeddings sent: bfloat16, float16, float32, or auto: the checkpoint's, which is what its prefill "
        "worker computes in",
        "auto",
    )
    threads: int = _setting("threads of the runtime; 0 lets it take every core it is allowed", 0, parse=_whole)
    preprocess_threads: int = _setting(
        "threads that decode and resize. They share the cores with the runtime, so more of them slows the runs",
        2,
        parse=_whole,
    )
    cache_dir: Path | None = _setting(
        "where compiled models are kept, so that a restart is quick; none turns it off (read-only file systems)",
        _default_cache(),
        parse=_cache_dir,
    )
    max_message_bytes: int = _setting(
        "largest request accepted. The whole of it is in memory at once, so it bounds what one caller can make us hold",
        64 << 20,
        parse=_whole,
    )
    max_items: int = _setting("most items in one request", 256, parse=_whole)
    max_image_pixels: int = _setting(
        "largest picture decoded, in pixels before resizing; checked in the header before any pixel is decoded",
        64_000_000,
        parse=_whole,
    )
    max_item_patches: int = _setting(
        "largest item encoded, in patches. Time grows with its square in the full-attention blocks",
        65_536,
        parse=_whole,
    )
    max_queue_patches: int = _setting(
        "patches that may wait for a lane; beyond it callers are told when to come back instead of being made to wait",
        262_144,
        parse=_whole,
    )
    max_held_bytes: int = _setting(
        "bytes of requests and embeddings in calls that are not over; beyond it new calls are told to come back, so that "
        "callers who do not read their answers cannot fill the memory",
        1 << 30,
        parse=int,
    )
    drain_seconds: float = _setting(
        "how long SIGTERM waits for accepted work before giving up on it", 30.0, parse=_number
    )
    allow_below_bar: bool = _setting(
        "serve an artifact whose measured accuracy is below its bar, or was never measured", False, parse=_flag
    )
    allow_unsealed: bool = _setting(
        "serve a directory made by `optimum-cli export openvino`, which has no manifest", False, parse=_flag
    )
    log_level: str = _setting("debug, info, warning or error", "info")

    def __post_init__(self) -> None:
        if not self.listen:
            raise SettingsError("--listen needs at least one address")
        for address in self.listen:
            _check_address(address)
        if not self.device:
            raise SettingsError("--device must name a device, such as cpu")
        for name, least, most in (
            ("threads", 0, _MAX_INT),
            ("preprocess_threads", 1, _MAX_INT),
            ("max_message_bytes", 1, _MAX_INT),
            ("max_items", 1, _MAX_INT),
            ("max_image_pixels", 1, _MAX_INT),
            ("max_item_patches", 1, _MAX_INT),
            ("max_queue_patches", 1, _MAX_INT),
            ("max_held_bytes", 1, 1 << 62),
            ("drain_seconds", 0, _MAX_DRAIN_S),
        ):
            if not least <= getattr(self, name) <= most:
                raise SettingsError(f"{_flag_name(name)} must be from {least} to {most:.0f}, got {getattr(self, name)}")
        for name, known in (
            ("runtime", ("auto", *RUNTIME_NAMES)),
            ("precision", ("auto", "f32", "bf16", "int8")),
            ("embedding_dtype", _EMBEDDING_DTYPES),
            ("log_level", ("debug", "info", "warning", "error")),
        ):
            if getattr(self, name) not in known:
                raise SettingsError(
                    f"{_flag_name(name)} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """One flag for each field; what is not given on the command line is left to the environment."""
        for setting in fields(cls):
            variables = ", ".join(_variables(setting))
            default = (
                "" if setting.default is MISSING or setting.default == () else f", default {_shown(setting.default)}"
            )
            parser.add_argument(
                _flag_name(setting.name),
                default=None,
                metavar=setting.name.upper(),
                nargs="?" if setting.metadata["parse"] is _flag else None,
                const="true" if setting.metadata["parse"] is _flag else None,
                help=f"{setting.metadata['help']} ({variables}{default})".replace("%", "%%"),
            )

    @classmethod
    def from_sources(cls, flags: Mapping[str, str | None], environment: Mapping[str, str] = os.environ) -> Self:
        """Flags first, then the environment, then defaults. A variable that is set to nothing counts as not set.

        Raises:
            SettingsError: if a value does not parse, is out of range, or a required one is missing.
        """
        values: dict[str, Any] = {}
        for setting in fields(cls):
            given = {_flag_name(setting.name): flags.get(setting.name)}
            given |= {variable: environment.get(variable) or None for variable in _variables(setting)}
            source, text = next(((name, text) for name, text in given.items() if text is not None), ("", None))
            if text is None:
                if setting.default is MISSING and setting.default_factory is MISSING:
                    raise SettingsError(f"{_flag_name(setting.name)} (or {_variables(setting)[0]}) is required")
                continue
            try:
                values[setting.name] = setting.metadata["parse"](text)
            except ValueError as error:
                origin = "" if source == _flag_name(setting.name) else f" from {source}"
                raise SettingsError(f"{_flag_name(setting.name)} {error}, got {text!r}{origin}") from None
        return cls(**values)


def _check_address(address: str) -> None:
    """gRPC would take a missing port for 443, and one that is too large for another one.

    Raises:
        SettingsError: if the address is neither host:port nor a unix socket.
    """
    if address.startswith(("unix:", "unix-abstract:")) and not address.endswith(":") and address.isprintable():
        return
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= _MAX_PORT):
        raise SettingsError(
            f"--listen takes host:port with a port from 0 (any that is free) to {_MAX_PORT}, or unix:/path; got {address!r}"
        )


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variables(setting: Field[Any]) -> tuple[str, ...]:
    return (f"EPD_{setting.name.upper()}", *setting.metadata["variables"])


def _shown(default: Any) -> str:
    return ",".join(default) if isinstance(default, tuple) else str(default)
