"""The flags of `python -m sidecar plan`, and what they mean together."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from sidecar.commands import positive_float, positive_int
from sidecar.commands.connection import add_credential_arguments
from sidecar.commands.load_flags import parsed_by, whole_number
from sidecar.load.mix import parse_sizes
from sidecar.load.pictures import Size
from sidecar.load.tally import PERCENTILES
from sidecar.plan.answer import Target
from sidecar.plan.sidecar import Limits

_DEFAULT_SIZES = {Size(448, 448): 1.0}
_DEFAULT_REQUESTS = 10_000
_MOST_SIDECARS = 256  # of each kind
_MOST_PICTURES = 5_000_000
_DEFAULT_CPUS = range(9)
_DEFAULT_MEASURE_S = 20.0


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    _add_cost_arguments(parser.add_argument_group("what encoding costs"))
    _add_traffic_arguments(parser.add_argument_group("what arrives"))
    _add_fleet_arguments(parser.add_argument_group("the fleet"))
    _add_target_arguments(parser.add_argument_group("what is wanted").add_mutually_exclusive_group())
    group = parser.add_argument_group("what comes out")
    group.add_argument("--json", action="store_true", help="the plan as one JSON object")
    group.add_argument("--plot", metavar="FILE.svg", type=Path, help="draw latency over the rate")
    add_credential_arguments(parser)


def check(arguments: argparse.Namespace) -> None:
    """See what argparse does not.

    Raises:
        ValueError: if arguments contradict each other, or a file could not be written.
    """
    arrives = arguments.rate or arguments.burst or arguments.trace
    if arguments.save_costs is not None and arguments.source is None:
        raise ValueError("--save-costs of what? give --from ADDRESS, a sidecar that runs")
    if arguments.save_costs is None and not arrives:
        raise ValueError("what arrives? give --rate, --burst with --every, or --trace")
    if arguments.trace and (arguments.rate or arguments.burst or arguments.size):
        raise ValueError("--trace says what arrives: leave out --rate, --burst and --size")
    if (arguments.burst is None) != (arguments.every is None):
        raise ValueError("--burst and --every must be given together")
    if not arguments.gpus and not max(cpus_of(arguments)):
        raise ValueError("neither GPUs nor CPUs: give --gpus or --cpus")
    if (items := arguments.requests * arguments.items_per_request) > _MOST_PICTURES and not arguments.trace:
        raise ValueError(f"{items} pictures are more than {_MOST_PICTURES}: fewer --requests say as much")
    if arguments.gpus > _MOST_SIDECARS:
        raise ValueError(f"--gpus must be at most {_MOST_SIDECARS}, got {arguments.gpus}")
    for target in (arguments.plot, arguments.save_costs):
        if target is not None and not target.parent.is_dir():
            raise ValueError(f"{target}: there is no directory {target.parent}")
    if arguments.plot is not None and arguments.plot.suffix.lower() != ".svg":
        raise ValueError(f"{arguments.plot}: a plot is written as .svg")


def sizes_of(arguments: argparse.Namespace) -> Mapping[Size, float]:
    sizes: Mapping[Size, float] = arguments.size or _DEFAULT_SIZES
    return sizes


def cpus_of(arguments: argparse.Namespace) -> range:
    """How many CPU sidecars to try."""
    cpus: range = arguments.cpus
    return cpus


def limits_of(arguments: argparse.Namespace) -> Limits:
    return Limits(**{name: getattr(arguments, name) for name in Limits.__slots__})


def target_of(arguments: argparse.Namespace) -> Target | None:
    for percent in PERCENTILES:
        if (ms := getattr(arguments, f"target_p{percent}_ms")) is not None:
            return Target(percent, ms)
    return None


def counts(text: str) -> range:
    """`3`, or `0-8`.

    Raises:
        ValueError: if it is neither, or too many.
    """
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last or last > _MOST_SIDECARS:
        raise ValueError(f"{text!r}: write how many as 3, or from and to as 0-8, at most {_MOST_SIDECARS}")
    return range(first, last + 1)


def _add_cost_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--cpu", metavar="COSTS", help="of a CPU sidecar")
    group.add_argument("--gpu", metavar="COSTS", help="of a GPU sidecar")
    group.add_argument(
        "--from",
        metavar="COSTS",
        dest="source",
        help="of either, by the lanes' devices, where the others are not given",
    )
    group.add_argument("--save-costs", metavar="FILE.json", type=Path, help="keep what --from says, and plan nothing")
    group.add_argument(
        "--measure-seconds",
        metavar="S",
        type=positive_float,
        default=_DEFAULT_MEASURE_S,
        help="how long a running sidecar is sent pictures, of --size and small ones (default: 20)",
    )


def _add_traffic_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rate", metavar="R", type=positive_float, help="so many requests a second, at random (Poisson)"
    )
    group.add_argument(
        "--burst", metavar="N", type=positive_int, help="so many requests at once, alone or beside --rate"
    )
    group.add_argument("--every", metavar="SECONDS", type=positive_float, help="from one burst to the next")
    group.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="what `load --record` wrote; or CSV or lines of JSON with time_s, patches or width and height, and request",
    )
    group.add_argument("--speed", metavar="F", type=positive_float, default=1.0, help="all of it so many times as fast")
    group.add_argument(
        "--size",
        metavar="WxH[:WEIGHT],…",
        type=parsed_by(parse_sizes),
        help="pictures of these sizes by weight, as 448x448:3,1280x720:1 (default: 448x448)",
    )
    group.add_argument("--items-per-request", metavar="K", type=positive_int, default=1, help="default: 1")
    group.add_argument(
        "--requests", metavar="N", type=positive_int, default=_DEFAULT_REQUESTS, help="how many (default: 10000)"
    )
    group.add_argument(
        "--seed", metavar="N", type=whole_number, default=0, help="another seed, another sample (default: 0)"
    )


def _add_fleet_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gpus", metavar="N", type=whole_number, default=1, help="default: 1; 0: CPUs alone")
    group.add_argument(
        "--cpus",
        metavar="N or N-M",
        type=parsed_by(counts),
        default=_DEFAULT_CPUS,
        help="how many CPU sidecars to try (default: 0-8)",
    )
    group.add_argument(
        "--joined", action="store_true", help="all as lanes of one sidecar, not each a sidecar of its own"
    )
    group.add_argument(
        "--cold", action="store_true", help="callers have just connected: for two seconds all sidecars get as much"
    )
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive_float,
        help="callers' patience: what cannot be done by then is refused",
    )
    for name, what in (
        ("preprocess_threads", "of each sidecar"),
        ("batch_patches", "of each sidecar"),
        ("max_queue_items", "of each sidecar"),
        ("max_queue_patches", "of each sidecar"),
    ):
        default = getattr(Limits(), name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="N",
            type=whole_number if name == "batch_patches" else positive_int,
            default=default,
            help=f"{what}, as its own flag (default: {default})",
        )


def _add_target_arguments(group: argparse._MutuallyExclusiveGroup) -> None:
    for percent in PERCENTILES:
        names = [f"--target-p{percent}-ms"] + ["--target-ms"] * (percent == 95)
        group.add_argument(
            *names,
            metavar="MS",
            type=positive_float,
            dest=f"target_p{percent}_ms",
            help=f"{percent}%% of the requests within so many milliseconds",
        )
