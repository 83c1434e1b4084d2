"""`ec_connector_extra_config`: what an operator may say, checked before vLLM starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from sidecar.addresses import AddressError, Addresses

OnFailure = Literal["local", "fail"]
_LONGEST_S = 86400
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_KINDS = {str: "text", int: "whole number"}
_SHARED_MEMORY = Path("/dev/shm")


class OptionsError(ValueError):
    """A configuration that cannot be meant. The message names the option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Attributes:
    address: where the sidecars are: `host:port` or `unix:/path`; or several, by `dns:///name:port` (all addresses of the name)
        or a list, among which gRPC deals items out by the rate that each reports.
    on_failure: what becomes of a request whose embedding cannot be had: `local` (vLLM's own tower encodes it) or `fail` (that
        request alone is answered with an error). Unset, it is `local` where vLLM has its tower and `fail` where not.
    timeout_s: how long an item may take, from the first ask to the checked file, retries included. Unset, 20 s where vLLM can
        encode by itself, else 60.
    unreachable_s: how much of that is spent on sidecars that cannot be reached. Unset, 2 s where vLLM can encode by itself,
        else all of it.
    attempts: how often an item is asked for again after an answer that is wrong, or an internal error.
    store: whether embeddings that lie on this host are linked instead of sent: `auto`, `off`, or the store's directory where
        it is mounted under another path than the sidecar names.
    directory: where this vLLM keeps the embeddings that its scheduler waits for; on the file system of the sidecar's
        store they are links, elsewhere copies. All workers must see it.
    ahead_bytes: embeddings of requests that wait in vLLM's queue may take so much. One request always may.
    fingerprint: of the artifact that sidecars must serve. Unset, it is computed from the checkpoint that vLLM has loaded.
    load_tower: false leaves the vision tower's weights out of vLLM, which still takes raw images.
    token_file: its first token goes out with each call.
    tls_ca, tls_cert, tls_key: PEM files; any of them turns TLS on. tls: true turns it on with gRPC's own list of authorities.
    """

    address: str | Sequence[str]
    on_failure: OnFailure | None = None
    timeout_s: float | None = None
    unreachable_s: float | None = None
    attempts: int = 3
    store: str = "auto"
    directory: Path = field(default=_SHARED_MEMORY)
    ahead_bytes: int = 1 << 30
    fingerprint: str | None = None
    load_tower: bool = True
    token_file: Path | None = None
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Raises:
        OptionsError: if an option is unknown, missing, or not what it should be.
        """
        known = {option.name: option for option in fields(cls)}
        if unknown := sorted(config.keys() - known.keys()):
            raise OptionsError(
                f"ec_connector_extra_config has no option {', '.join(unknown)}; there are {', '.join(sorted(known))}"
            )
        if config.get("address") is None:
            raise OptionsError('ec_connector_extra_config needs "address": "host:port" of a sidecar, or a list of them')
        values = {name: value for name, value in config.items() if value is not None}
        if "load_tower" not in values and os.environ.get("EPD_VLLM_LOAD_TOWER", "").lower() in ("0", "false", "no"):
            values["load_tower"] = False
        for name in ("directory", "token_file", "tls_ca", "tls_cert", "tls_key"):
            if name in values:
                _check(name, values[name], str)
                values[name] = Path(values[name]).expanduser()
        options = cls(**values)
        options._check()
        return options

    @property
    def may_encode_locally(self) -> bool:
        return self.failure == "local"

    @property
    def failure(self) -> OnFailure:
        return self.on_failure or ("local" if self.load_tower else "fail")

    @property
    def item_s(self) -> float:
        """For one item."""
        if self.timeout_s is not None:
            return self.timeout_s
        return 20.0 if self.may_encode_locally else 60.0

    @property
    def patience_s(self) -> float:
        """For sidecars that cannot be reached."""
        if self.unreachable_s is not None:
            return min(self.unreachable_s, self.item_s)
        return min(2.0, self.item_s) if self.may_encode_locally else self.item_s

    @property
    def addresses(self) -> list[str]:
        return [self.address] if isinstance(self.address, str) else list(self.address)

    @property
    def may_be_several(self) -> bool:
        """Whether two calls may reach two sidecars."""
        return len(self.addresses) > 1 or self.addresses[0].startswith("dns:")

    @property
    def uses_tls(self) -> bool:
        return self.tls or bool(self.tls_ca or self.tls_cert or self.tls_key)

    def _check(self) -> None:
        given = isinstance(self.address, (str, list, tuple)) and len(self.address) > 0
        if not given or not all(isinstance(address, str) and address for address in self.addresses):
            raise OptionsError('address must be "host:port", or a list of such')
        if odd := [address for address in self.addresses if "," in address]:
            raise OptionsError(f"address: {odd[0]!r} is not host:port; give several as a JSON list")
        try:
            Addresses(self.addresses)
        except AddressError as error:
            raise OptionsError(f"address: {error}") from error
        if self.failure not in ("local", "fail"):
            raise OptionsError(f'on_failure must be "local" or "fail", got {self.on_failure!r}')
        if self.may_encode_locally and not self.load_tower:
            raise OptionsError('on_failure "local" needs the tower: set load_tower to true, or on_failure to "fail"')
        for name in ("timeout_s", "unreachable_s"):
            if (seconds := getattr(self, name)) is not None:
                _check(name, seconds, (int, float))
                if not 0 < seconds <= _LONGEST_S:
                    raise OptionsError(f"{name} must be above 0 and at most {_LONGEST_S} (a day), got {seconds}")
        for name in ("attempts", "ahead_bytes"):
            _check(name, getattr(self, name), int)
            if getattr(self, name) < 1:
                raise OptionsError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("load_tower", "tls"):
            if not isinstance(getattr(self, name), bool):
                raise OptionsError(f"{name} must be true or false, got {getattr(self, name)!r}")
        _check("store", self.store, str)
        if self.store not in ("auto", "off") and not Path(self.store).is_absolute():
            raise OptionsError(f'store must be "auto", "off" or an absolute directory, got {self.store!r}')
        if self.fingerprint is not None and not _FINGERPRINT.fullmatch(str(self.fingerprint)):
            raise OptionsError(
                f"fingerprint must be the 64 hexadecimal digits that `python -m sidecar info` prints, got {self.fingerprint!r}"
            )


def _check(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = _KINDS[kind] if isinstance(kind, type) else "number"
        raise OptionsError(f"{name} must be a {wanted}, got {value!r}")
