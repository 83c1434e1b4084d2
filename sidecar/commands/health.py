"""`python -m sidecar health`: ask grpc.health.v1 how a server is; for container probes, which run it every few seconds.

It imports neither the client nor numpy, so that a probe costs little beside a server that needs the cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from sidecar.commands import (
    BAD_ARGUMENTS,
    FAILED,
    INTERRUPTED,
    NO_SERVER,
    add_server_argument,
    positive_float,
    print_error,
)
from sidecar.credentials import CredentialsError, client_credentials

_CHECK = "/grpc.health.v1.Health/Check"
_NOBODY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "health",
        help="print whether a server is serving",
        description="Print a server's status (grpc.health.v1). Exit code 0: SERVING; 1: any other answer; 2: no answer.",
        allow_abbrev=False,
    )
    add_server_argument(parser)
    parser.add_argument(
        "--service", metavar="NAME", default="", help="full name, as epd.encoder.v1.Encoder (default: the whole server)"
    )
    parser.add_argument("--timeout", metavar="SECONDS", type=positive_float, default=5.0, help="default: %(default)s")
    tls = parser.add_argument_group("TLS", "With --tls-ca the server is called over TLS. Health asks for no token.")
    tls.add_argument("--tls-ca", metavar="FILE", type=Path, help="trust the authorities in this PEM file")
    tls.add_argument("--tls-cert", metavar="FILE", type=Path, help="this caller's certificate, for mutual TLS")
    tls.add_argument("--tls-key", metavar="FILE", type=Path, help="the certificate's key")
    tls.add_argument("--tls-name", metavar="NAME", help="name in the server's certificate, if it is not in --server")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    ca, cert, key, name = arguments.tls_ca, arguments.tls_cert, arguments.tls_key, arguments.tls_name
    try:
        if ca is None and (cert or key or name):
            raise CredentialsError("--tls-cert, --tls-key and --tls-name need --tls-ca")
        credentials = None if ca is None else client_credentials(ca, cert, key)
        status = check(arguments.server, arguments.service, arguments.timeout, credentials, name)
    except CredentialsError as error:
        print_error(str(error))
        return BAD_ARGUMENTS
    except grpc.RpcError as error:
        if error.code() in _NOBODY:
            print_error(f"no server answers at {arguments.server}: {error.details()}")
            return NO_SERVER
        print_error(f"{arguments.server}: {error.code().name}: {error.details()}")
        return FAILED
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED
    sys.stdout.write(f"{status}\n")
    return 0 if status == "SERVING" else FAILED


def check(
    address: str,
    service: str,
    timeout_s: float,
    credentials: grpc.ChannelCredentials | None = None,
    tls_name: str | None = None,
) -> str:
    """The name of the status that the server at `address` gives for `service`; "" is the server as a whole.

    Args:
        credentials: for TLS; None is plaintext.
        tls_name: the name that the server's certificate must have; None means the one in `address`.

    Raises:
        grpc.RpcError: if there is no answer, or another than a status.
    """
    # A pod's proxy is for the world outside; a probe asks its own host.
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    if tls_name is not None:
        options.append(("grpc.ssl_target_name_override", tls_name))
    if credentials is None:
        opened = grpc.insecure_channel(address, options)
    else:
        opened = grpc.secure_channel(address, credentials, options)
    with opened as channel:
        ask = channel.unary_unary(_CHECK, HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString)
        answer: HealthCheckResponse = ask(HealthCheckRequest(service=service), timeout=timeout_s)
    names: dict[int, str] = {number: name for name, number in HealthCheckResponse.ServingStatus.items()}
    return names.get(answer.status, f"status {answer.status}")
