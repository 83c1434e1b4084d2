"""The options of Dynamo's encode component: flags, this project's variables and Dynamo's."""

from __future__ import annotations

import pytest

from sidecar.integrations.dynamo.images import Bounds
from sidecar.integrations.dynamo.options import Options, SettingsError


def test_a_model_is_all_that_must_be_said() -> None:
    options = Options.parse(["--model", "m"], {})
    assert options.server == ("127.0.0.1:50051",) and options.namespace == "dynamo" and options.served_name == "m"
    assert options.embedding_transfer_mode == "local" and not options.uses_tls


def test_flags_come_before_variables() -> None:
    environment = {"EPD_SERVER": "x:1", "DYN_NAMESPACE": "ns", "DYN_VLLM_EMBEDDING_TRANSFER_MODE": "nixl-read"}
    options = Options.parse(["--model", "m"], environment)
    assert options.server == ("x:1",) and options.namespace == "ns" and options.embedding_transfer_mode == "nixl-read"
    flags = ["--server", "a:1,b:2", "--server", "c:3", "--namespace", "mine", "--embedding-transfer-mode", "local"]
    options = Options.parse(["--model", "m", *flags], environment)
    assert options.server == ("a:1", "b:2", "c:3") and options.namespace == "mine"
    assert options.embedding_transfer_mode == "local"


def test_dynamos_variables_hold() -> None:
    environment = {"DYN_DISCOVERY_BACKEND": "file", "DYN_REQUEST_PLANE": "nats", "DYN_EVENT_PLANE": "zmq"}
    environment |= {"DYN_ENCODER_DEVICE": "cuda:0", "DYN_NAMESPACE": "ns", "DYN_NAMESPACE_WORKER_SUFFIX": "v2"}
    options = Options.parse(["--model", "m"], environment)
    assert (options.discovery_backend, options.request_plane, options.event_plane) == ("file", "nats", "zmq")
    assert options.encoder_device == "cuda:0" and options.namespace == "ns-v2"


def test_sizes_are_given_as_prefill_has_them() -> None:
    options = Options.parse(["--model", "m", "--mm-processor-kwargs", '{"max_pixels": 1003520}'], {})
    assert options.mm_processor_kwargs == Bounds(None, 1003520)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--request-seconds", "0"], "--request-seconds must be above 0"),
        (["--request-seconds", "nan"], "--request-seconds must be above 0"),
        (["--unread-seconds", "60"], r"--unread-seconds \(60\) must be more than --request-seconds \(60\)"),
        (["--local-bytes", "0"], "--local-bytes must be at least 1"),
        (["--local-directory", "/nowhere"], "/nowhere is no directory"),
        (["--namespace", "a.b"], "--namespace must be of letters"),
        (["--server", ","], "--server: no address"),
        (["--server", "nonsense"], "--server: 'nonsense' is not host:port"),
        (["--embedding-transfer-mode", "pigeon"], "must be one of local, nixl-write, nixl-read, got 'pigeon'"),
        (["--discovery-backend", "x"], "--discovery-backend must be one of kubernetes, etcd, file, mem"),
        (["--fingerprint", "f00"], "--fingerprint must be the 64 hexadecimal digits"),
        (["--mm-processor-kwargs", "[]"], "must be a JSON object"),
        (["--mm-processor-kwargs", '{"do_resize": 0}'], "do_resize cannot be honoured"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Options.parse(["--model", "m", *flags], {})
