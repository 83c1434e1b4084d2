"""`python -m sidecar plan`: how many CPU sidecars beside so many GPUs for this traffic?"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import math
import urllib.error
import urllib.request
from pathlib import Path

from sidecar.client import AsyncEncoderClient, ClientError, EncodeError
from sidecar.commands import BAD_ARGUMENTS, FAILED, INTERRUPTED, NO_SERVER, print_error, print_no_server, printable
from sidecar.commands.connection import proofs
from sidecar.commands.plan_flags import add_plan_arguments, check, cpus_of, limits_of, sizes_of, target_of
from sidecar.credentials import CredentialsError
from sidecar.plan import costs as costs_module
from sidecar.plan.answer import plan
from sidecar.plan.costs import Costs, CostsError
from sidecar.plan.measure import answers_of, costs_in, costs_of, measure
from sidecar.plan.plot import write_plot
from sidecar.plan.report import as_json, lines
from sidecar.plan.simulation import CPU, GPU, Fleet
from sidecar.plan.traffic import Traffic, generated, recorded

_STATUS_TIMEOUT_S = 10.0
_MOST_STATUS_BYTES = 16 << 20

_WORDS = """\
COSTS is one of
  fixed,per_patch[,per_pair]   milliseconds, such as 2.5,0.004
  FILE.json                    that --save-costs wrote
  FILE.jsonl                   that `python -m sidecar load --record` wrote: costs as they were under that load
  http://HOST:PORT             a running sidecar's status page (--metrics-listen): what its lanes know by themselves
  HOST:PORT, unix:/PATH        a running sidecar, which is sent pictures for --measure-seconds
  NAME                         measured already: %s

Latencies are of whole requests, from arrival to the end of the slowest picture: what encoding adds to the time to the first
token. A request that is refused everywhere counts as one that never ends. docs/planning.md says what the model
holds and what not.

Exit code: 0 if the target is met, or none was given; 1 if it is not; 2 if the arguments are wrong or a sidecar does not answer.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="how many CPU sidecars beside so many GPUs for this traffic",
        description=__doc__,
        epilog=_WORDS % ", ".join(costs_module.measured()),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_plan_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        check(arguments)
        return asyncio.run(_run(arguments))
    except (ValueError, CredentialsError) as error:  # of which costs, traffic and grids are some
        print_error(str(error))
        return BAD_ARGUMENTS
    except OSError as error:
        print_error(": ".join(map(str, filter(None, (error.filename, error.strerror or error)))))
        return BAD_ARGUMENTS
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED


async def _run(arguments: argparse.Namespace) -> int:
    sources = _Sources(arguments)
    try:
        if arguments.save_costs is not None:
            found = await sources.read(arguments.source)
            costs_module.save(arguments.save_costs, found)
            print("\n".join(printable(f"{arguments.save_costs}: {costs.source}") for costs in found))
            return 0
        gpu = await sources.of(GPU) if arguments.gpus else None
        cpu = await sources.of(CPU) if max(cpus_of(arguments)) else None
    except ClientError as error:
        if isinstance(error, EncodeError) and error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            print_no_server(sources.asked, error)
        else:
            print_error(f"{sources.asked}: {error}")
        return NO_SERVER
    return _planned(arguments, gpu, cpu)


def _planned(arguments: argparse.Namespace, gpu: Costs | None, cpu: Costs | None) -> int:
    fleet = Fleet(
        gpus=arguments.gpus,
        cpus=0,
        gpu=gpu.borrowing(cpu) if gpu else None,
        cpu=cpu.borrowing(gpu) if cpu else None,
        joined=arguments.joined,
        cold=arguments.cold,
        timeout_s=arguments.timeout or math.inf,
        limits=limits_of(arguments),
    )
    target = target_of(arguments)
    found = plan(
        _traffic(arguments), fleet, cpus_of(arguments), target, seed=arguments.seed, curves=arguments.plot is not None
    )
    if arguments.json:
        print(json.dumps(as_json(found), ensure_ascii=False))
    else:
        print("\n".join(printable(line) for line in lines(found)))
    if arguments.plot is not None:
        write_plot(arguments.plot, found)
    return FAILED if target and not found.chosen else 0


def _traffic(arguments: argparse.Namespace) -> Traffic:
    if arguments.trace is not None:
        traffic = recorded(arguments.trace)
    else:
        traffic = generated(
            arguments.requests,
            sizes_of(arguments),
            arguments.seed,
            rate_per_s=arguments.rate,
            burst=arguments.burst or 0,
            every_s=arguments.every or 0.0,
            items_per_request=arguments.items_per_request,
        )
    return traffic.at_speed(arguments.speed)


class _Sources:
    """Where costs come from. `asked`: the last sidecar that was."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._known: dict[str, list[Costs]] = {}
        self.asked = ""

    async def of(self, kind: str) -> Costs:
        """Of a kind's lane.

        Raises:
            CostsError: if there are none, or more than one.
        """
        text = getattr(self._arguments, kind) or self._arguments.source
        if text is None:
            raise CostsError(f"what does a run on a {kind.upper()} cost? give --{kind} or --from")
        found = await self.read(text)
        # Of the lanes of one sidecar, those on such a device; what stands alone was meant.
        fitting = [costs for costs in found if ("CPU" in costs.name.upper()) == (kind == CPU)]
        if len(found) == 1 and getattr(self._arguments, kind):
            return found[0]
        if not fitting:
            lanes = ", ".join(costs.name for costs in found)
            raise CostsError(f"{text} has no {kind.upper()} lane, only {lanes}; give --{kind}")
        return fitting[0]

    async def read(self, text: str) -> list[Costs]:
        """Raises:
        CostsError: if the text names none.
        ClientError: if a sidecar does not answer.
        OSError: if a file cannot be read.
        """
        if text not in self._known:
            self._known[text] = await self._read(text)
        return self._known[text]

    async def _read(self, text: str) -> list[Costs]:
        if (numbers := costs_module.given(text)) is not None:
            return [numbers]
        if (known := costs_module.measured().get(text)) is not None:
            return [known]
        if text.startswith(("http://", "https://")):
            return costs_in(await asyncio.to_thread(_status, text), text)
        if text.endswith(".jsonl"):
            return costs_of(answers_of(Path(text)), text)
        if text.endswith(".json"):
            return costs_module.load(Path(text))
        if ":" not in text:
            names = ", ".join(costs_module.measured())
            raise CostsError(
                f"{text!r} is no costs: write milliseconds as 2.5,0.004, a .json file, an address, or {names}"
            )
        self.asked = text
        async with AsyncEncoderClient(text, **proofs(self._arguments)) as client:
            return await measure(client, text, sizes_of(self._arguments), self._arguments.measure_seconds)


def _status(url: str) -> dict[str, object]:
    """Of a status page.

    Raises:
        CostsError: if nothing of the kind is there.
    """
    try:
        with urllib.request.urlopen(
            f"{url.rstrip('/').removesuffix('/status.json')}/status.json", timeout=_STATUS_TIMEOUT_S
        ) as page:
            document = json.loads(page.read(_MOST_STATUS_BYTES))
    except urllib.error.HTTPError as error:
        raise CostsError(f"{url}: no status page there: {error.code} {error.reason}") from error
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise CostsError(f"no status page answers at {url}: {reason}") from error
    except (ValueError, RecursionError, http.client.HTTPException) as error:
        raise CostsError(
            f"{url}: not a sidecar's status page; give what --metrics-listen of the sidecar says"
        ) from error
    if not isinstance(document, dict):
        raise CostsError(f"{url}: not a sidecar's status page; give what --metrics-listen of the sidecar says")
    return document
