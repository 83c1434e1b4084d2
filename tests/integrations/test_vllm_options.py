"""What an operator may say in `ec_connector_extra_config`, and what a wrong word is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sidecar.integrations.vllm.options import Options, OptionsError


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPD_VLLM_LOAD_TOWER", raising=False)


def options(address: Any = "encoder:50051", **more: Any) -> Options:
    return Options.from_config({"address": address, **more})


def test_an_address_is_enough() -> None:
    chosen = options()
    assert chosen.addresses == ["encoder:50051"]
    assert chosen.failure == "local" and chosen.may_encode_locally
    assert chosen.directory == Path("/dev/shm")
    assert not chosen.uses_tls


def test_null_leaves_the_default() -> None:
    assert options(timeout_s=None, directory=None, fingerprint=None) == options()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"adress": "encoder:50051"}, "adress"),
        ({"address": None}, "address"),
        ({"address": ""}, "address"),
        ({"address": []}, "address"),
        ({"address": 50051}, "address"),
        ({"address": ["encoder:50051", 7]}, "address"),
        ({"address": ["encoder:50051", "unix:/tmp/socket"]}, "unix:/tmp/socket"),
        ({"address": "http://encoder:50051"}, "http://encoder:50051"),
        ({"address": "encoder"}, "'encoder' is not host:port"),
        ({"address": "a:1,b:2"}, "give several as a JSON list"),
        ({"on_failure": "retry"}, "on_failure"),
        ({"on_failure": True}, "on_failure"),
        ({"on_failure": "local", "load_tower": False}, "on_failure"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": "60"}, "timeout_s"),
        ({"timeout_s": True}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"unreachable_s": -1}, "unreachable_s"),
        ({"unreachable_s": "2"}, "unreachable_s"),
        ({"attempts": 0}, "attempts"),
        ({"attempts": 1.5}, "attempts"),
        ({"attempts": True}, "attempts"),
        ({"ahead_bytes": 0}, "ahead_bytes"),
        ({"ahead_bytes": "1 GiB"}, "ahead_bytes"),
        ({"load_tower": "no"}, "load_tower"),
        ({"load_tower": 0}, "load_tower"),
        ({"tls": "true"}, "tls"),
        ({"store": "on"}, "store"),
        ({"store": "relative/store"}, "store"),
        ({"store": False}, "store"),
        ({"directory": 7}, "directory"),
        ({"token_file": 7}, "token_file"),
        ({"tls_ca": ["ca.pem"]}, "tls_ca"),
        ({"tls_cert": 7}, "tls_cert"),
        ({"tls_key": 7}, "tls_key"),
        ({"fingerprint": "abc"}, "fingerprint"),
        ({"fingerprint": 7}, "fingerprint"),
        ({"fingerprint": "z" * 64}, "fingerprint"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionsError) as raised:
        Options.from_config({"address": "encoder:50051", **wrong})
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_address_is_asked_for() -> None:
    with pytest.raises(OptionsError, match='needs "address": "host:port"'):
        Options.from_config({})


@pytest.mark.parametrize(
    ("address", "several"),
    [
        ("encoder:50051", False),
        ("unix:/run/epd.sock", False),
        ("[::1]:50051", False),
        (["encoder:50051"], False),
        ("dns:///encoder:50051", True),
        (["127.0.0.1:1", "encoder:2"], True),
    ],
)
def test_a_list_or_a_name_to_follow_may_be_several(address: str | list[str], several: bool) -> None:
    assert options(address).may_be_several is several


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        (["127.0.0.1:1", "encoder"], "'encoder' is not host:port"),
        (["127.0.0.1:1", ":50051"], "':50051' is not host:port"),
        (["127.0.0.1:1", "encoder:port"], "'encoder:port' is not host:port"),
        (["127.0.0.1:1", "unix:/run/epd.sock"], "a list may hold host:port only, got unix:/run/epd.sock"),
        ("127.0.0.1:1,127.0.0.1:2", "give several as a JSON list"),
    ],
)
def test_what_is_no_address_is_refused(addresses: str | list[str], said: str) -> None:
    with pytest.raises(OptionsError, match="address: ") as raised:
        options(addresses)
    assert said in str(raised.value)


def test_vllm_that_can_encode_by_itself_is_soon_out_of_patience() -> None:
    assert options().patience_s == 2.0
    assert options(timeout_s=0.5).patience_s == 0.5
    assert options(on_failure="fail").patience_s == 60.0
    assert options(on_failure="fail", timeout_s=5).patience_s == 5
    assert options(unreachable_s=7).patience_s == 7


def test_without_a_tower_requests_fail_that_cannot_be_had() -> None:
    chosen = options(load_tower=False)
    assert chosen.failure == "fail" and not chosen.may_encode_locally
    assert options(load_tower=True, on_failure="fail").failure == "fail"


@pytest.mark.parametrize("value", ["0", "false", "False", "no"])
def test_the_variable_leaves_the_tower_out(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("EPD_VLLM_LOAD_TOWER", value)
    assert not options().load_tower
    assert options().failure == "fail"


def test_the_option_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPD_VLLM_LOAD_TOWER", "0")
    assert options(load_tower=True).load_tower


@pytest.mark.parametrize("value", ["", "1", "true", "yes"])
def test_the_variable_may_also_say_nothing_new(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("EPD_VLLM_LOAD_TOWER", value)
    assert options().load_tower


def test_any_file_of_tls_turns_it_on() -> None:
    assert options(tls=True).uses_tls
    for name in ("tls_ca", "tls_cert", "tls_key"):
        assert options(**{name: "~/file.pem"}).uses_tls


def test_paths_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/operator")
    assert options(token_file="~/token").token_file == Path("/home/operator/token")
