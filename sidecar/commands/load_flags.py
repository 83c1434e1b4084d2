"""The flags of `python -m sidecar load`, and what they mean together: a pace, a mix, and clients' options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sidecar.commands import positive_float, positive_int
from sidecar.commands.connection import add_credential_arguments, proofs
from sidecar.load.drive import Pace
from sidecar.load.mix import Generated, Mix, Photos, parse_sizes, parse_timeout
from sidecar.load.pictures import FORMATS, PatchRules, Size

_DEFAULT_REQUESTS = 100
_DEFAULT_SIZES = {Size(448, 448): 1.0}
_DEFAULT_FORMAT = "jpeg"
_DEFAULT_TIMEOUT_S = (120.0, 120.0)
# gRPC shares connections between the channels of a process unless told not to.
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)

_Parsed = TypeVar("_Parsed")


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    add_credential_arguments(parser)
    _add_pace_arguments(parser.add_argument_group("how fast and how long"))
    _add_mix_arguments(parser.add_argument_group("what is sent"))
    _add_patience_arguments(parser.add_argument_group("deadlines, cancellations and retries"))


def check(arguments: argparse.Namespace) -> None:
    """See what argparse does not.

    Raises:
        ValueError: if arguments contradict each other, or the plot could not be written.
    """
    if arguments.arrivals and arguments.rate is None:
        raise ValueError("--arrivals is of an open loop: give --rate too")
    if arguments.photos and (arguments.size or arguments.format or arguments.catalogue):
        raise ValueError("--photos are sent as they are: leave out --size, --format and --catalogue")
    if arguments.zipf is not None and not (arguments.catalogue or arguments.photos):
        raise ValueError("--zipf draws from a catalogue: give --catalogue or --photos too")
    if (plot := arguments.plot) is not None:
        if plot.suffix.lower() not in (".svg", ".html"):
            raise ValueError(f"{plot}: a plot is written as .svg or .html")
        if not plot.parent.is_dir():
            raise ValueError(f"{plot}: there is no directory {plot.parent}")
    if (record := arguments.record) is not None and not record.parent.is_dir():
        raise ValueError(f"{record}: there is no directory {record.parent}")


def client_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """How each client connects and proves who it is: keyword arguments of AsyncEncoderClient.

    Raises:
        CredentialsError: if a certificate, key or token will not do.
    """
    return {**proofs(arguments), "options": _OWN_CONNECTION}


def pace_of(arguments: argparse.Namespace) -> Pace:
    return Pace(
        concurrency=arguments.concurrency,
        rate_per_s=arguments.rate,
        poisson=arguments.arrivals != "uniform",
        requests=_requests(arguments),
        duration_s=arguments.duration,
    )


def mix_of(arguments: argparse.Namespace, photos: Sequence[bytes], rules: PatchRules, seed: int) -> Mix:
    """Raises GridError if the model takes no patches of one of the sizes."""
    drawn_photos = len(photos) if photos and arguments.zipf is not None else None
    return Mix(
        pictures=Photos(photos)
        if photos
        else Generated(arguments.size or _DEFAULT_SIZES, arguments.format or _DEFAULT_FORMAT, rules, seed),
        seed=seed,
        items_per_request=arguments.items_per_request,
        catalogue=arguments.catalogue or drawn_photos,
        zipf=arguments.zipf or 0.0,
        timeout_s=arguments.timeout or _DEFAULT_TIMEOUT_S,
        cancel_fraction=arguments.cancel_fraction,
        cancel_within_s=arguments.cancel_within,
    )


def settings_of(arguments: argparse.Namespace, seed: int) -> dict[str, object]:
    """What repeats a run, under the names of the flags; None: not set."""
    open_loop, generated = arguments.rate is not None, not arguments.photos
    sizes = (arguments.size or _DEFAULT_SIZES).items()
    cancels = arguments.cancel_fraction > 0
    return {
        "concurrency": None if open_loop else arguments.concurrency,
        "rate": arguments.rate,
        "arrivals": (arguments.arrivals or "poisson") if open_loop else None,
        "requests": _requests(arguments),
        "duration": arguments.duration,
        "channels": arguments.channels,
        "size": ",".join(f"{size.width}x{size.height}:{weight:g}" for size, weight in sizes) if generated else None,
        "format": (arguments.format or _DEFAULT_FORMAT) if generated else None,
        "photos": None if generated else len(arguments.photos),
        "items-per-request": arguments.items_per_request,
        "catalogue": arguments.catalogue,
        "zipf": arguments.zipf,
        "timeout": "-".join(f"{seconds:g}" for seconds in dict.fromkeys(arguments.timeout or _DEFAULT_TIMEOUT_S)),
        "cancel-fraction": arguments.cancel_fraction if cancels else None,
        "cancel-within": arguments.cancel_within if cancels else None,
        "retry": "yes" if arguments.retry else None,
        "seed": seed,
    }


def _add_pace_arguments(group: argparse._ArgumentGroup) -> None:
    loop = group.add_mutually_exclusive_group()
    loop.add_argument(
        "--concurrency", metavar="N", type=positive_int, default=1, help="so many callers, each waits (default: 1)"
    )
    loop.add_argument(
        "--rate", metavar="R", type=positive_float, help="so many requests a second, whatever is answered"
    )
    group.add_argument("--arrivals", choices=("poisson", "uniform"), help="of --rate (default: poisson)")
    group.add_argument(
        "--requests", metavar="N", type=positive_int, help="end after these (default: 100 unless --duration is given)"
    )
    group.add_argument("--duration", metavar="SECONDS", type=positive_float, help="begin no request after this time")
    group.add_argument(
        "--channels", metavar="N", type=positive_int, default=1, help="separate connections (default: 1)"
    )


def _add_mix_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--size",
        metavar="WxH[:WEIGHT],…",
        type=parsed_by(parse_sizes),
        help="generated pictures of these sizes by weight, as 448x448:3,1920x1080:1 (default: 448x448)",
    )
    group.add_argument("--format", choices=FORMATS, help="of generated pictures (default: jpeg)")
    group.add_argument(
        "--photos",
        metavar="FILE",
        type=Path,
        nargs="+",
        help="send these over and over, in turn unless --zipf is given",
    )
    group.add_argument("--items-per-request", metavar="K", type=positive_int, default=1, help="default: 1")
    group.add_argument(
        "--catalogue", metavar="N", type=positive_int, help="draw from N pictures (default: no picture comes twice)"
    )
    group.add_argument(
        "--zipf",
        metavar="S",
        type=exponent,
        help="draw the picture of rank r in proportion to 1/r^S (default: 0, evenly)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=whole_number,
        help="the same requests again (default: others each time, and the report has it)",
    )


def _add_patience_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--timeout",
        metavar="SECONDS[-SECONDS]",
        type=parsed_by(parse_timeout),
        help="for each request; of two, each request's is drawn evenly over their orders of magnitude (default: 120)",
    )
    group.add_argument(
        "--cancel-fraction", metavar="F", type=fraction, default=0.0, help="cancel these, 0…1 (default: 0)"
    )
    group.add_argument(
        "--cancel-within", metavar="SECONDS", type=positive_float, default=1.0, help="at a random time (default: 1)"
    )
    group.add_argument("--retry", action="store_true", help="come back when a refusal says so, until the deadline")


def _requests(arguments: argparse.Namespace) -> int | None:
    """A run has an end, also where none was asked for."""
    requests: int | None = arguments.requests
    return _DEFAULT_REQUESTS if requests is None and arguments.duration is None else requests


def parsed_by(parse: Callable[[str], _Parsed]) -> Callable[[str], _Parsed]:
    """For argparse, which shows the message of no other error."""

    def parsed(text: str) -> _Parsed:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def fraction(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return number


def exponent(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def whole_number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number
