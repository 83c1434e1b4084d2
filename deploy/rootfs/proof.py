"""What must be true of the image and its container, each a named check; the last line counts them."""

# ruff: noqa: T201  # printing is what it does

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.rootfs.container import Container
from deploy.rootfs.context import Context
from deploy.rootfs.dockerfile import Dockerfile
from deploy.rootfs.outside import Outside
from deploy.rootfs.stages import Builder, Image

REPOSITORY = Path(__file__).parents[2]
PHOTOS = REPOSITORY / "export" / "photos"

_READY_S = 120.0
_STOP_S = 30.0
_MOST_PACKAGES_MB = 500
_PACKAGES = "opt/epd/lib/python3.11/site-packages"
_BUILD_TOOLS = ("cc", "gcc", "g++", "clang", "ld", "make", "cmake", "pip", "pip3")
_SIGTERM_BIT = 1 << (signal.SIGTERM - 1)


class Proof:
    """`work` takes logs and volumes."""

    def __init__(self, builder: Builder, artifact: Path, work: Path) -> None:
        self.passed = self.failed = 0
        self._builder, self._artifact, self._work = builder, artifact, work

    def run(self) -> None:
        started = time.monotonic()
        image = self._builder.build(self._builder.dockerfile.stages[-1].name)
        baked = self._builder.build("baked")
        print(f"built in {time.monotonic() - started:.0f} s", flush=True)
        self._look_at(image)
        self._serve(image)
        self._serve_baked(baked)
        self._stop_early(image)
        self._refuse(image)

    def check(self, name: str, holds: bool, detail: str = "") -> bool:
        self.passed, self.failed = self.passed + holds, self.failed + (not holds)
        print(f"{'ok    ' if holds else 'FAILED'} {name}{f': {detail}' if detail else ''}", flush=True)
        return holds

    def _look_at(self, image: Image) -> None:
        """What lies in the image, and what must not."""
        root, base = image.root, self._builder.base_root
        places = [_below(root, directory) for directory in image.environment["PATH"].split(":")]
        found = [tool for tool in _BUILD_TOOLS if any((place / tool).exists() for place in places)]
        self.check("no compilers and no pip in the image", not found, ", ".join(found))
        heavy = [name for name in ("torch", "transformers", "onnxruntime") if (root / _PACKAGES / name).exists()]
        self.check("neither torch nor transformers in the image", not heavy, ", ".join(heavy))
        lent = [self._builder.outside.place, "/etc/pip.conf", "/root/.cache", "/root/.config"]
        left = [path for path in lent if _below(root, path).exists()]
        left += ["/etc/resolv.conf"] if (root / "etc/resolv.conf").read_text() else []
        self.check("nothing of the machine that built it is left in the image", not left, ", ".join(left))
        regular = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
        risen = [path for path in regular if path.stat().st_mode & 0o6000]
        risen = [path for path in risen if not (base / path.relative_to(root)).exists()]
        self.check("no setuid program beside Debian's", not risen, ", ".join(map(str, risen)))
        modules = list((root / _PACKAGES / "sidecar").rglob("*.py"))
        slow = [path.name for path in modules if not list(path.parent.glob(f"__pycache__/{path.stem}.*.pyc"))]
        self.check("every module of ours has its byte code", bool(modules) and not slow, ", ".join(slow))
        packages = _megabytes(root / _PACKAGES)
        self.check(
            f"the packages take less than {_MOST_PACKAGES_MB} MB", packages < _MOST_PACKAGES_MB, f"{packages} MB"
        )
        print(
            f"sizes: image {_megabytes(root)} MB, of it Debian {_megabytes(base)} MB, packages {packages} MB",
            flush=True,
        )

    def _serve(self, image: Image) -> None:
        """The artifact mounted and a volume for the compile cache: start, look, encode, stop, start again."""
        cache = self._work / "cache"
        cache.mkdir()
        user, _, group = image.user.partition(":")
        shutil.chown(cache, int(user), int(group))
        volumes = {"/artifact": self._artifact, "/cache": cache, "/mnt": PHOTOS}
        with self._container(image, "serve", volumes) as container:
            if not self._healthy(container, image, "the HEALTHCHECK passes"):
                return
            status = container.status()
            words = Path(f"/proc/{container.pid}/cmdline").read_text().split("\0")
            first = status["NSpid"].split()[-1] == "1" and words[:-1] == [*image.entrypoint, *image.command]
            self.check("the server itself is PID 1", first, " ".join(words))
            self.check("it runs as the image's user", status["Uid"].split() == [user] * 4, status["Uid"])
            masks = [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")]
            self.check("it has no privileges and can get none", not any(masks) and status["NoNewPrivs"] == "1")
            mounts = [line.split() for line in Path(f"/proc/{container.pid}/mountinfo").read_text().splitlines()]
            options = [row[5].split(",") for row in mounts if row[4] == "/"]
            self.check("its root file system is read-only", bool(options) and "ro" in options[-1])
            self._encode_photos(container, image)
            self.check("compiled models are kept in /cache", any(cache.rglob("*.blob")))
            store = Path(f"/proc/{container.pid}/root{image.environment['EPD_STORE']}")
            self.check("embeddings are kept in /dev/shm", store.is_dir() and any(store.rglob("*")))
            url = f"http://127.0.0.1:{image.environment['EPD_METRICS_LISTEN'].rpartition(':')[2]}/metrics"
            get = f"import urllib.request as request; print(request.urlopen({url!r}, timeout=10).read().decode())"
            answer = container.execute(["python", "-c", get], timeout_s=20)
            series = [line for line in answer.stdout.splitlines() if line and not line.startswith("#")]
            self.check("metrics are served", bool(series), f"{len(series)} series" if series else answer.stderr)
            lines = container.log.read_text().splitlines()
            plain = [line for line in lines if not line.startswith("{")]
            self.check("the log is JSON", bool(lines) and not plain, " / ".join(plain))
            self._stops(container, "SIGTERM ends it")
        with self._container(image, "again", volumes) as container:
            self._healthy(container, image, "a second start is healthy")

    def _serve_baked(self, image: Image) -> None:
        with self._container(image, "baked") as container:
            if self._healthy(container, image, "with the artifact baked in and no volume at all it is healthy"):
                self._stops(container, "SIGTERM ends it")

    def _stop_early(self, image: Image) -> None:
        """PID 1 has no default actions: a SIGTERM for which it has no handler is lost."""
        with self._container(image, "early", {"/artifact": self._artifact}) as container:
            _until(lambda: container.pid is not None or not container.running, _READY_S)
            _until(
                lambda: not container.running or bool(int(container.status()["SigCgt"], 16) & _SIGTERM_BIT), _READY_S
            )
            self._stops(container, "SIGTERM during its start ends it")

    def _refuse(self, image: Image) -> None:
        with self._container(image, "empty") as container:
            code = container.wait(_READY_S)
        lines = container.log.read_text().splitlines()
        told = code == 2 and bool(lines) and not any("Traceback" in line for line in lines)
        self.check("without an artifact it says so and ends with 2", told, " / ".join(lines))

    def _container(self, image: Image, name: str, volumes: Mapping[str, Path] | None = None) -> Container:
        return Container(image, self._work / f"{name}.log", volumes)

    def _healthy(self, container: Container, image: Image, name: str) -> bool:
        started = time.monotonic()
        probes: list[float] = []

        def probe() -> bool:
            if container.pid is None:
                return False
            began = time.monotonic()
            answer = container.execute(image.healthcheck, timeout_s=20)
            probes.append(time.monotonic() - began)
            return (answer.returncode, answer.stdout) == (0, "SERVING\n")

        healthy = _until(lambda: not container.running or probe(), _READY_S) and container.running
        detail = f"{time.monotonic() - started:.1f} s after its start, the last of {len(probes)} probes took "
        detail += f"{probes[-1]:.2f} s" if probes else "no time"
        return self.check(name, healthy, detail if healthy else container.log.read_text())

    def _encode_photos(self, container: Container, image: Image) -> None:
        photos = sorted(path.name for path in PHOTOS.iterdir() if path.suffix != ".md")
        encode = [*image.entrypoint, "encode", *(f"/mnt/{name}" for name in photos)]
        answer = container.execute([*encode, "--json", "--out", "/tmp/out.safetensors"], timeout_s=120)
        rows = [json.loads(line) for line in answer.stdout.splitlines()]
        encoded = {row["name"]: row["tokens"] for row in rows if "error" not in row}
        detail = ", ".join(f"{name} {tokens} tokens" for name, tokens in encoded.items())
        self.check("photos are encoded", answer.returncode == 0 and sorted(encoded) == photos, detail or answer.stderr)

    def _stops(self, container: Container, name: str) -> None:
        started = time.monotonic()
        try:
            code: int | None = container.stop(_STOP_S)
        except subprocess.TimeoutExpired:
            code = None
        detail = f"code {code} after {time.monotonic() - started:.1f} s"
        self.check(name, code == 0, detail if code == 0 else f"{detail}\n{container.log.read_text()}")


def _until(holds: Callable[[], bool], timeout_s: float) -> bool:
    ends = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > ends:
            return False
        time.sleep(0.02)
    return True


def _below(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _megabytes(path: Path) -> int:
    usage = ["du", "--summarize", "--block-size=1M", str(path)]
    return int(subprocess.run(usage, capture_output=True, text=True, check=True).stdout.split()[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "work", "caches", "artifact"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that containers end with us
    artifact = options.artifact.resolve()
    builder = Builder(
        Dockerfile.parse((REPOSITORY / "deploy" / "Dockerfile").read_text()),
        Context(REPOSITORY),
        base_root=options.base,
        work=options.work / "stages",
        caches=options.caches,
        outside=Outside(),
        report=lambda line: print(line, flush=True),
        build_contexts={"artifact": artifact},
    )
    proof = Proof(builder, artifact, options.work)
    try:
        proof.run()
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        proof.check("the proof comes to its end", False, str(error))
    print(f"{proof.passed} passed, {proof.failed} failed")
    return 1 if proof.failed else 0


if __name__ == "__main__":
    sys.exit(main())
