"""A tally in figures and in words, for machines and for people: both say the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sidecar.load.tally import PERCENTILES, Kind, Outcome, Tally, percentile

# Beyond this the figures tell of the sender as much as of the server.
LATE_MS = 50.0

Summary = dict[str, Any]


def summary(tally: Tally, run: Mapping[str, object], server: Mapping[str, object]) -> Summary:
    """Plain data for JSON, with the run's settings and the server beside it.

    Counts are items, times milliseconds unless their names say otherwise.
    """
    counts, elapsed_s = tally.counts(), tally.elapsed_s
    answered = tally.of(Kind.ANSWERED)
    stored = [outcome for outcome in answered if outcome.cached]
    encoded = [outcome for outcome in answered if not outcome.cached]
    return {
        "requests": tally.requests,
        "sent": tally.sent,
        **{str(kind): count for kind, count in counts.items()},
        "missing": tally.missing,
        "from_store": len(stored),
        "coalesced": sum(outcome.coalesced for outcome in answered),
        "retried": tally.retried,
        "causes": [
            {
                "kind": str(kind),
                "code": cause.code,
                "reason": cause.reason,
                "items": count,
                "first_message": tally.first_messages.get(cause, ""),
            }
            for kind in Kind
            for cause, count in tally.causes(kind)
        ],
        "elapsed_s": round(elapsed_s, 3),
        "latency_ms": {
            name: _percentiles(_latencies(outcomes), (*PERCENTILES, 100))
            for name, outcomes in (
                ("answered", answered),
                ("encoded", encoded if stored else []),
                ("from_store", stored),
                ("refused", tally.of(Kind.REFUSED)),
            )
            if outcomes
        },
        "server_ms": {stage: _percentiles(times, (50, 95)) for stage, times in _stages(encoded).items() if any(times)},
        "per_second": {
            "items": _per_second(len(answered), elapsed_s),
            "patches": _per_second(sum(outcome.patches for outcome in answered), elapsed_s),
            "tokens": _per_second(sum(outcome.tokens for outcome in answered), elapsed_s),
        },
        "late_ms": _percentiles(tally.late_ms, (50, 99, 100)),
        "lanes": dict(Counter(_lane(outcome) for outcome in answered).most_common()),
        "server": dict(server),
        "settings": dict(run),
    }


def lines(figures: Summary) -> Iterator[str]:
    """The summary as a person reads it."""
    yield f"sent       {figures['sent']:>8,} items in {figures['requests']:,} requests, {figures['elapsed_s']:.1f} s"
    for kind in Kind:
        yield f"{kind:<10} {figures[kind]:>8,}{_remark(kind, figures)}".rstrip()
        for cause in figures["causes"]:
            if cause["kind"] == kind:
                name = f"{cause['code']} {cause['reason']}".rstrip()
                yield f"             {cause['items']:>8,} {name}, first: {cause['first_message']}"
    yield _sum(figures)
    if figures["retried"]:
        yield f"retried    {figures['retried']:>8,} times an item was sent again, as the server asked"
    yield from _table("latency, ms", figures["latency_ms"])
    yield from _table("server, ms", figures["server_ms"])
    rates = figures["per_second"]
    yield ""
    yield f"throughput {rates['items']:,.1f} items/s, {rates['patches']:,.0f} patches/s, {rates['tokens']:,.0f} tokens/s"
    if (late_ms := figures["late_ms"].get("p99", 0.0)) > LATE_MS:
        yield f"           requests went out {late_ms:,.0f} ms late (p99): this side was slow, and latencies include it"
    if figures["lanes"]:
        yield f"lanes      {', '.join(f'{lane} {count:,}' for lane, count in figures['lanes'].items())}"
    for name in ("server", "settings"):
        yield f"{name:<10} {', '.join(settings(figures[name]))}"


def settings(values: Mapping[str, object]) -> Iterator[str]:
    """Those that are set, each as its name and value."""
    for name, value in values.items():
        if value is not None:
            yield f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def sum_holds(figures: Summary) -> bool:
    return bool(figures["missing"] == 0)


def _sum(figures: Summary) -> str:
    """The one line that this is all about."""
    parts = " + ".join(f"{figures[kind]:,}" for kind in Kind)
    if sum_holds(figures):
        return f"sum        {figures['sent']:>8,} = {parts}"
    wrong = (
        f"{figures['missing']:,} items were LOST: sent, and never answered in any way"
        if figures["missing"] > 0
        else f"{-figures['missing']:,} items were answered TWICE"
    )
    return f"SUM BROKEN {figures['sent']:>8,} ≠ {parts}: {wrong}"


def _remark(kind: Kind, figures: Summary) -> str:
    if kind is Kind.ANSWERED:
        ways = {"from the store": figures["from_store"], "coalesced with others'": figures["coalesced"]}
        return "".join(f", {count:,} {way}" for way, count in ways.items() if count)
    return {Kind.EXPIRED: " at their deadlines", Kind.CANCELLED: " by this side"}.get(kind, "") * bool(figures[kind])


def _table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    if not rows:
        return
    yield ""
    yield f"{title:<12}" + "".join(f"{column:>10}" for column in next(iter(rows.values())))
    for name, values in rows.items():
        yield f"{name.replace('_', ' '):<12}" + "".join(f"{value:>10,.1f}" for value in values.values())


def _percentiles(values: Sequence[float], percents: Sequence[int]) -> dict[str, float]:
    names = {percent: f"p{percent}" if percent < 100 else "max" for percent in percents}
    return {names[percent]: round(percentile(values, percent), 3) for percent in percents} if values else {}


def _latencies(outcomes: Iterable[Outcome]) -> list[float]:
    return [outcome.latency_ms for outcome in outcomes]


def _stages(outcomes: Iterable[Outcome]) -> dict[str, list[float]]:
    stages: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        for stage, time_ms in outcome.stage_ms:
            stages[stage].append(time_ms)
    return stages


def _per_second(count: int, elapsed_s: float) -> float:
    return round(count / elapsed_s, 3) if elapsed_s else 0.0


def _lane(outcome: Outcome) -> str:
    lane = outcome.lane
    return "?" if lane is None else f"{lane.runtime}/{lane.device}/{lane.precision}"
