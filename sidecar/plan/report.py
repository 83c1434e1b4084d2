"""A plan in words and in plain data: both say the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from sidecar.load.tally import PERCENTILES
from sidecar.plan.answer import Plan, Row, capacity_per_s, kinds
from sidecar.plan.costs import Costs
from sidecar.plan.simulation import CPU, GPU, Fleet

_FULL = 0.995  # from where on a queue grows for as long as the traffic lasts


def lines(plan: Plan) -> Iterator[str]:
    """As a person reads it."""
    traffic, fleet = plan.traffic, plan.fleet
    items = len(traffic.arrivals)
    yield f"traffic    {traffic.about}: {items:,} pictures in {traffic.requests:,} requests, {traffic.rate_per_s:,.4g} requests/s"
    if traffic.skipped:
        yield f"           {traffic.skipped:,} items of the trace needed no run, and are left out"
    for kind, costs in _costs(plan):
        yield f"{kind:<10} {_said(costs)}"
        yield f"           {costs.source}; one can run {capacity_per_s(traffic, _one(plan, kind)):,.4g} requests/s"
        if costs.unmeasured:
            yield f"           not measured, and counted as nothing: {', '.join(costs.unmeasured)}"
    layout = "lanes of one sidecar" if fleet.joined else "each a sidecar of its own, weighted by rate"
    yield f"layout     {layout}"
    yield ""
    yield from _table(plan)
    yield ""
    yield f"answer     {answer(plan)}"
    if said := crossover(plan):
        yield f"crossover  {said}"


def answer(plan: Plan) -> str:
    """In one sentence."""
    beside = f" beside {_gpus(plan.fleet.gpus)}" if plan.fleet.gpus else ""
    last = plan.rows[-1]
    if plan.target is None:
        got = _ms(last.latency_ms[plan.percent])
        return f"no target was given; with {_cpus(last.cpus, plan.fleet)}{beside} p{plan.percent} is {got}."
    goal = f"p{plan.percent} within {_ms(plan.target.ms)}"
    if plan.chosen is None:
        best = min(plan.rows, key=lambda row: row.latency_ms[plan.percent])
        return (
            f"not with up to {_cpus(last.cpus, plan.fleet)}{beside}: {goal} is out of reach, and the best is "
            f"{_ms(best.latency_ms[plan.percent])} with {_cpus(best.cpus, plan.fleet)}."
        )
    got = _ms(plan.chosen.latency_ms[plan.percent])
    if not plan.chosen.cpus:
        return f"none: {_gpus(plan.fleet.gpus)} alone {'is' if plan.fleet.gpus == 1 else 'are'} enough, p{plan.percent} {got}."
    return f"{_cpus(plan.chosen.cpus, plan.fleet)}{beside}: p{plan.percent} {got}, under the {_ms(plan.target.ms)} asked for."


def crossover(plan: Plan) -> str:
    """Where the CPU helps; empty if that was no question."""
    found = plan.crossover
    if found is None:
        return ""
    who = f"{_cpus(found.cpus, plan.fleet)} beside {_gpus(plan.fleet.gpus)}"
    verb = "lowers" if found.cpus == 1 else "lower"
    if found.rate_per_s is None:
        return f"{who} never {verb} p{plan.percent} at these costs, up to {found.looked_to:,.4g} requests/s"
    if not found.rate_per_s:
        return f"{who} {verb} p{plan.percent} at any rate"
    return f"{who} {verb} p{plan.percent} above {found.rate_per_s:,.3g} requests/s"


def as_json(plan: Plan) -> dict[str, Any]:
    """Times in milliseconds, rates in requests a second; null is never, or has no end."""
    return {
        "answer": {"cpus": plan.chosen.cpus if plan.chosen else None, "sentence": answer(plan)},
        "crossover": plan.crossover and {**asdict(plan.crossover), "sentence": crossover(plan)},
        "target": plan.target and asdict(plan.target),
        "traffic": {
            "about": plan.traffic.about,
            "pictures": len(plan.traffic.arrivals),
            "requests": plan.traffic.requests,
            "rate_per_s": _finite(plan.traffic.rate_per_s),
        },
        "gpus": plan.fleet.gpus,
        "joined": plan.fleet.joined,
        "costs": {kind: costs.as_json() for kind, costs in _costs(plan)},
        "rows": [
            {
                "cpus": row.cpus,
                "latency_ms": {f"p{percent}": _finite(ms) for percent, ms in row.latency_ms.items()},
                "utilisation": row.utilisation,
                "items": row.items,
                "refused": row.refused,
                "meets_target": plan.target.met(row) if plan.target else None,
            }
            for row in plan.rows
        ],
        "curves": [
            {"cpus": curve.cpus, "points": [(rate, _finite(ms)) for rate, ms in curve.points]} for curve in plan.curves
        ],
    }


def _table(plan: Plan) -> Iterator[str]:
    names = kinds(plan.rows)
    heads = [f"p{percent}, ms" for percent in PERCENTILES] + [f"{name} busy" for name in names]
    yield f"{'CPUs':<6}" + "".join(f"{head:>11}" for head in [*heads, "by CPUs", "refused"])
    for row in plan.rows:
        cells = [_cell(row.latency_ms[percent]) for percent in PERCENTILES]
        cells += [f"{row.utilisation[name]:.0%}" if name in row.utilisation else "" for name in names]
        cells += [f"{row.items.get(CPU, 0) / max(1, sum(row.items.values())):.0%}", f"{row.refused:.1%}"]
        yield f"{row.cpus:<6}" + "".join(f"{cell:>11}" for cell in cells) + _mark(plan, row)


def _mark(plan: Plan, row: Row) -> str:
    if plan.target and plan.target.met(row):
        return "  meets the target"
    return "  overloaded: the longer, the later" if max(row.utilisation.values()) >= _FULL else ""


def _costs(plan: Plan) -> Iterator[tuple[str, Costs]]:
    if plan.fleet.gpus and plan.fleet.gpu:
        yield GPU, plan.fleet.gpu
    if plan.fleet.cpu:
        yield CPU, plan.fleet.cpu


def _one(plan: Plan, kind: str) -> Fleet:
    return replace(plan.fleet, gpus=int(kind == GPU), cpus=int(kind == CPU))


def _said(costs: Costs) -> str:
    run = costs.run
    return f"{run.fixed_ms:.3g} ms + {run.per_patch_ms:.3g} ms a patch + {run.per_pair_ms:.3g} ms a pair"


def _cpus(count: int, fleet: Fleet) -> str:
    what = "CPU lane" if fleet.joined else "CPU sidecar"
    return f"1 {what}" if count == 1 else f"{count} {what}s"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _cell(ms: float) -> str:
    return f"{ms:,.1f}" if math.isfinite(ms) else "—"


def _ms(ms: float) -> str:
    return f"{ms:,.4g} ms" if math.isfinite(ms) else "never (requests are refused)"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
