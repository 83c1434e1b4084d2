"""Settings: a flag, else its variable, else the default; a value that cannot be is refused by its flag's name."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pwd
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.__main__ import main
from sidecar.settings import Settings, SettingsError, _default_cache

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
REQUIRED = {"artifact": "a"}

# For each setting: a text on the command line, another in the environment, and what the two mean.
SAMPLES: dict[str, tuple[str, Any, str, Any]] = {
    "artifact": ("from-flag", Path("from-flag"), "from-env", Path("from-env")),
    "listen": ("unix:/a, [::1]:80", ("unix:/a", "[::1]:80"), "0.0.0.0:0", ("0.0.0.0:0",)),
    "socket_mode": ("0660", "0660", "666", "666"),
    "device": ("cpu, ov:GPU", ("cpu", "ov:GPU"), "xpu:0", ("xpu:0",)),
    "runtime": ("onnx", "onnx", "torch", "torch"),
    "precision": ("int8", "int8", "bf16", "bf16"),
    "embedding_dtype": ("float16", "float16", "float32", "float32"),
    "threads": ("3", 3, "0", 0),
    "streams": ("2", 2, "4", 4),
    "batch_patches": ("0", 0, "100", 100),
    "cpus": ("0-3,8", (0, 1, 2, 3, 8), "7", (7,)),
    "numa_node": ("1", 1, "-1", -1),
    "warm_up_seconds": ("0", 0.0, "2.5", 2.5),
    "preprocess_threads": ("4", 4, "1", 1),
    "cache_dir": ("none", None, "/c", Path("/c")),
    "trial": ("never", "never", "auto", "auto"),
    "max_message_bytes": ("1000", 1000, "2147483647", 2**31 - 1),
    "max_items": ("1", 1, "7", 7),
    "message_seconds": ("12.5", 12.5, "1", 1.0),
    "max_image_pixels": ("5", 5, "6", 6),
    "max_frames": ("2", 2, "8", 8),
    "max_item_patches": ("7", 7, "8", 8),
    "max_queue_items": ("3", 3, "4", 4),
    "max_queue_patches": ("9", 9, "10", 10),
    "max_held_bytes": ("11", 11, "12", 12),
    "max_connections": ("0", 0, "5", 5),
    "max_connection_calls": ("1", 1, "2", 2),
    "connection_idle_seconds": ("1", 1.0, "2.5", 2.5),
    "store": ("none", None, "/dev/shm/s", Path("/dev/shm/s")),
    "store_bytes": ("13", 13, "4611686018427387904", 1 << 62),
    "lease_seconds": ("0.5", 0.5, "60", 60.0),
    "tls_cert": ("c.pem", Path("c.pem"), "none", None),
    "tls_key": ("k.pem", Path("k.pem"), "none", None),
    "tls_client_ca": ("ca.pem", Path("ca.pem"), "none", None),
    "token_file": ("t", Path("t"), "none", None),
    "url_input": ("true", True, "no", False),
    "url_hosts": ("a.example, b.example", ("a.example", "b.example"), "c.example", ("c.example",)),
    "url_bytes": ("14", 14, "15", 15),
    "url_seconds": ("1", 1.0, "0.5", 0.5),
    "metrics_listen": ("127.0.0.1:9090", "127.0.0.1:9090", "none", "none"),
    "watch_artifact": ("on", True, "off", False),
    "drain_seconds": ("0", 0.0, "2.5", 2.5),
    "allow_below_bar": ("true", True, "no", False),
    "allow_unsealed": ("on", True, "0", False),
    "log_level": ("debug", "debug", "error", "error"),
    "log_format": ("json", "json", "text", "text"),
}
# What a setting makes no sense without.
COMPANIONS = {
    "tls_cert": ["--tls-key", "k.pem"],
    "tls_key": ["--tls-cert", "c.pem"],
    "tls_client_ca": ["--tls-cert", "c.pem", "--tls-key", "k.pem"],
    "url_hosts": ["--url-input"],
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read(arguments: list[str], environment: dict[str, str] | None = None) -> Settings:
    """As the command reads them."""
    parser = argparse.ArgumentParser()
    Settings.add_arguments(parser)
    return Settings.from_sources(vars(parser.parse_args(arguments)), environment or {})


def with_artifact(arguments: list[str]) -> list[str]:
    return arguments if "--artifact" in arguments else [*arguments, "--artifact", "a"]


def test_every_setting_is_tried_here() -> None:
    assert SAMPLES.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_flag_wins_over_the_environment_and_that_over_the_default(name: str) -> None:
    on_line, by_flag, in_environment, by_environment = SAMPLES[name]
    variables = {f"EPD_{name.upper()}": in_environment}
    beside = COMPANIONS.get(name, [])
    assert getattr(read(with_artifact([flag(name), on_line, *beside]), variables), name) == by_flag
    without = [] if name == "artifact" else ["--artifact", "a"]
    companions = [] if by_environment is None else beside
    assert getattr(read([*without, *companions], variables), name) == by_environment
    if name != "artifact":
        assert getattr(read(without), name) == FIELDS[name].default
        # A manifest of Kubernetes or compose that fills in nothing leaves the default.
        assert getattr(read(without, {f"EPD_{name.upper()}": ""}), name) == FIELDS[name].default


def test_the_artifact_is_required() -> None:
    for environment in ({}, {"EPD_ARTIFACT": ""}):
        with pytest.raises(SettingsError, match=r"--artifact \(or EPD_ARTIFACT\) is required"):
            read([], environment)


def test_dynamos_variable_names_the_device_unless_ours_or_the_flag_does() -> None:
    artifact = ["--artifact", "a"]
    dynamo = {"DYN_ENCODER_DEVICE": "cuda"}
    assert read(artifact).device == ("cpu",)
    assert read(artifact, dynamo).device == ("cuda",)
    assert read(artifact, {**dynamo, "EPD_DEVICE": "xpu"}).device == ("xpu",)
    assert read(artifact, {**dynamo, "EPD_DEVICE": ""}).device == ("cuda",)
    assert read([*artifact, "--device", "ov:GPU"], {**dynamo, "EPD_DEVICE": "xpu"}).device == ("ov:GPU",)


def test_a_device_flag_given_again_is_one_more_lane() -> None:
    several = read(["--artifact", "a", "--device", "cpu", "--device=cuda:0,cuda:1", "--device", "cpu"])
    assert several.device == ("cpu", "cuda:0", "cuda:1", "cpu")


def test_a_flag_given_again_is_taken_by_its_last_value() -> None:
    assert read(["--artifact", "a", "--threads", "1", "--threads", "2"]).threads == 2


def test_a_bare_flag_switches_on() -> None:
    assert read(["--artifact", "a", "--allow-below-bar"]).allow_below_bar is True
    assert (
        read(["--artifact", "a", "--allow-below-bar", "false"], {"EPD_ALLOW_BELOW_BAR": "1"}).allow_below_bar is False
    )


# The least that each may be.
LEAST = {
    **dict.fromkeys(("threads", "batch_patches"), 0),
    **dict.fromkeys(("max_message_bytes", "max_items", "max_image_pixels", "max_frames"), 1),
    **dict.fromkeys(("max_item_patches", "max_queue_items", "max_queue_patches", "url_bytes"), 1),
}
WIDE = {"store_bytes": 0, "max_held_bytes": 1}
SECONDS = ("drain_seconds", "warm_up_seconds", "lease_seconds", "url_seconds")
WRONG = [
    *((name, value) for name in (*LEAST, *WIDE) for value in ("x", "1.5", "1e3", "nan")),
    *((name, str(least - 1)) for name, least in (LEAST | WIDE).items()),
    *((name, str(2**31)) for name in LEAST),
    *((name, str(2**62 + 1)) for name in WIDE),
    *(("streams", value) for value in ("0", "1025", "two")),
    *(("numa_node", value) for value in ("-2", "1024", "x")),
    *(("cpus", value) for value in ("x", "3-1", "-1", "1-", "0,,a", "0-4096", "9" * 5000)),
    *((name, value) for name in SECONDS for value in ("x", "-1", "nan", "inf", "1e300", "86401")),
    *((name, "0") for name in ("lease_seconds", "url_seconds")),
    *(("listen", value) for value in (",", "127.0.0.1", "localhost", "host:", "host:99999", "host:-1", ":80", "a:b")),
    *(("listen", "127.0.0.1:0,host"), ("listen", "host:８０"), ("listen", "unix:")),
    *(("metrics_listen", value) for value in ("127.0.0.1", "9090", ":9090", "host:99999", "unix:/run/metrics")),
    *((name, "maybe") for name in ("allow_below_bar", "allow_unsealed", "url_input", "watch_artifact")),
    *(("runtime", "tensorrt"), ("precision", "fp8"), ("embedding_dtype", "uint8"), ("log_level", "loud")),
    *(("log_format", "xml"), ("tls_client_ca", "ca.pem"), ("url_hosts", "a.example")),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_that_cannot_be_is_refused_by_its_flags_name(name: str, value: str) -> None:
    for arguments, environment in (([f"{flag(name)}={value}"], {}), ([], {f"EPD_{name.upper()}": value})):
        with pytest.raises(SettingsError) as raised:
            read(with_artifact(arguments), environment)
        message = str(raised.value)
        assert message.startswith(flag(name) + " ")
        assert "invalid literal" not in message
        assert re.search(r"must be|takes|needs", message)  # what would be right


@pytest.mark.parametrize("given", ["tls_cert", "tls_key"])
def test_half_of_a_key_pair_is_refused(given: str) -> None:
    with pytest.raises(SettingsError, match="--tls-cert and --tls-key must be given together"):
        read(["--artifact", "a", flag(given), "x.pem"])


def test_a_device_of_no_name_is_refused() -> None:
    with pytest.raises(SettingsError, match="--device must name a device"):
        read(["--artifact", "a", "--device", ","])


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"cpus", "url_hosts"}))
def test_a_flag_that_is_given_as_nothing_is_refused(name: str) -> None:
    """`--artifact "$DIR"` with DIR unset is no wish for the working directory; an empty variable counts as not set."""
    with pytest.raises(SettingsError, match=f"^{flag(name)} is empty; give it a value, or leave the flag out"):
        Settings.from_sources(REQUIRED | {name: ""}, {})
    assert Settings.from_sources(REQUIRED, {f"EPD_{name.upper()}": ""}) == Settings.from_sources(REQUIRED, {})


def test_a_list_that_is_empty_by_default_may_be_given_as_nothing() -> None:
    assert read(["--artifact", "a", "--cpus", "", "--url-hosts", ""]) == read(["--artifact", "a"])


def test_a_value_from_the_environment_is_traced_to_its_variable() -> None:
    with pytest.raises(SettingsError, match="--threads must be a whole number, got 'many' from EPD_THREADS"):
        read(["--artifact", "a"], {"EPD_THREADS": "many"})


@given(name=st.sampled_from(sorted(FIELDS)), text=st.text(max_size=12))
def test_whatever_the_text_it_is_taken_or_refused_by_name(name: str, text: str) -> None:
    try:
        taken = Settings.from_sources({**REQUIRED, name: text}, {})
    except SettingsError as error:
        assert flag(name) in str(error)
    else:
        assert isinstance(getattr(taken, name), type(SAMPLES[name][1]) | type(None) | Path)


def test_settings_do_not_change_once_they_are_made() -> None:
    settings = read(["--artifact", "a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.threads = 2  # type: ignore[misc]


def test_help_tells_every_flag_variable_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    # argparse breaks lines where it likes, in words too.
    text = re.sub(r"\s+", "", capsys.readouterr().out)
    for name, field in FIELDS.items():
        assert flag(name) in text
        assert f"EPD_{name.upper()}" in text
        assert re.sub(r"\s+", "", field.metadata["help"]) in text
        if field.default is not dataclasses.MISSING and field.default not in (None, ()):
            shown = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
            assert f"default{shown}" in text
    assert "DYN_ENCODER_DEVICE" in text


def test_the_command_says_in_one_line_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("EPD_", "DYN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EPD_MAX_ITEMS", "0")
    assert main(["serve", "--artifact", "a"]) == 2
    assert capsys.readouterr().err == "sidecar serve: --max-items must be from 1 to 2147483647, got 0\n"
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == "sidecar serve: --artifact (or EPD_ARTIFACT) is required\n"


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a user id of its own choice."""

    def unknown(_: int) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert _default_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert _default_cache() == Path("/cache/epd-encoder-sidecar")


@pytest.mark.parametrize("name", ["--token-file", "--tls-cert", "--tls-key", "--tls-client-ca"])
def test_a_flag_that_was_to_protect_the_server_is_not_lost_to_an_empty_variable(name: str) -> None:
    """`--token-file "$TOKENS"` with TOKENS unset is no wish for a server without tokens."""
    with pytest.raises(SettingsError, match=f"^{name} is empty; "):
        Settings.from_sources(REQUIRED | {name[2:].replace("-", "_"): ""}, {})
    variable = "EPD_" + name[2:].replace("-", "_").upper()
    assert Settings.emptied_variables({variable: "", "EPD_STORE": ""}) == [variable]
    assert Settings.emptied_variables({variable: "none"}) == []
