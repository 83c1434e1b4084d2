"""Seconds from starting the process to ready, without and with a warm compile cache; medians, in turn."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from bench.server import serving


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.restart", description=__doc__)
    parser.add_argument("--artifact", type=Path, default=Path("artifacts/random-3b"))
    parser.add_argument("--precision", default="bf16,int8")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        log, cache = Path(scratch) / "log", Path(scratch) / "cache"
        for precision in options.precision.split(","):
            flags = ("--precision", precision)
            seconds: dict[str, list[float]] = {"no cache": [], "cold cache": [], "warm cache": []}
            for _ in range(options.runs):
                shutil.rmtree(cache, ignore_errors=True)
                for kind, place in (("no cache", "none"), ("cold cache", str(cache)), ("warm cache", str(cache))):
                    with serving(options.artifact, log, *flags, "--cache-dir", place) as server:
                        seconds[kind].append(server.ready_s)
            size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
            figures = ", ".join(f"{kind} {statistics.median(found):.2f} s" for kind, found in seconds.items())
            print(f"{precision}: process start to ready: {figures}; cache {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
