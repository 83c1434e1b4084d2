"""Carry out a Dockerfile's stages in directories: what an engine does with them, without an engine.

Each stage is a copy of its base; RUN is a process in it under namespaces of its own (`enter.sh`). What the outer machine
needs to reach its package registries is there while a RUN runs, and at no other time.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from deploy.rootfs.context import Context
from deploy.rootfs.dockerfile import Dockerfile, DockerfileError, Instruction, expand
from deploy.rootfs.outside import Outside

ENTER = Path(__file__).with_name("enter.sh")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Image:
    """A root file system and the configuration that a container of it starts with."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()
    stop_signal: str = "SIGTERM"
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Builder:
    """`base_root` stands for the image of the first FROM; `work` takes the stages, `caches` what outlives a build;
    `build_contexts` are directories that take the place of stages of their names."""

    dockerfile: Dockerfile
    context: Context
    base_root: Path
    work: Path
    caches: Path
    outside: Outside
    report: Callable[[str], None]
    arguments: Mapping[str, str] = field(default_factory=dict)
    build_contexts: Mapping[str, Path] = field(default_factory=dict)
    _built: dict[str, Image] = field(default_factory=dict)

    def build(self, name: str) -> Image:
        """The image of a stage, with the stages that it needs.

        Raises:
            DockerfileError: if an instruction asks for what is not known here.
            subprocess.CalledProcessError: if a RUN fails.
        """
        if name not in self._built:
            stage = self.dockerfile.stage(name)
            image = self._start(stage.base, self.work / name)
            declared: dict[str, str] = {}
            for instruction in stage.instructions:
                image = self._carry_out(instruction, image, declared)
            self._built[name] = image
        return self._built[name]

    def _start(self, base: str, root: Path) -> Image:
        if any(stage.name == base for stage in self.dockerfile.stages):
            image = replace(self.build(base), root=root)
            source: Path | None = self.build(base).root
        else:
            image = Image(root)
            source = None if base == "scratch" else self.base_root
        root.mkdir(parents=True)
        if source is not None:
            subprocess.run(["cp", "--archive", "--reflink=auto", f"{source}/.", str(root)], check=True)
        return image

    def _carry_out(self, instruction: Instruction, image: Image, declared: dict[str, str]) -> Image:
        """One instruction; `declared` are the build arguments that the stage has asked for so far."""
        variables = {**declared, **image.environment}
        text = expand(instruction.text, variables)
        expanded = replace(instruction, text=text)
        match instruction.keyword:
            case "RUN":
                self._run(instruction, image, variables)
            case "COPY":
                self._copy(expanded, image)
            case "ARG":
                # Without a default it is the one before the first FROM.
                defaults = expanded.pairs() if "=" in text else {text: self.dockerfile.arguments.get(text, "")}
                declared |= {name: self.arguments.get(name, default) for name, default in defaults.items()}
            case "ENV":
                return replace(image, environment={**image.environment, **expanded.pairs()})
            case "LABEL":
                return replace(image, labels={**image.labels, **expanded.pairs()})
            case "USER":
                return replace(image, user=text if ":" in text else f"{text}:0")
            case "WORKDIR":
                workdir = os.path.normpath(PurePosixPath(image.workdir, text))
                _inside(image.root, workdir).mkdir(parents=True, exist_ok=True)
                return replace(image, workdir=workdir)
            case "ENTRYPOINT":
                return replace(image, entrypoint=tuple(instruction.command()), command=())
            case "CMD":
                return replace(image, command=tuple(instruction.command()))
            case "HEALTHCHECK":
                command = instruction.text.removeprefix("CMD").strip()
                return replace(image, healthcheck=tuple(instruction.command(command)))
            case "STOPSIGNAL":
                return replace(image, stop_signal=text)
            case "EXPOSE":
                pass
            case unknown:
                raise DockerfileError(f"line {instruction.line}: {unknown} is not carried out here")
        return image

    def _copy(self, instruction: Instruction, image: Image) -> None:
        *sources, target = instruction.command() if instruction.text.startswith("[") else instruction.text.split()
        destination = _inside(image.root, str(PurePosixPath(image.workdir, target)))
        origin = instruction.flag("from")
        mode = instruction.flag("chmod")
        unknown = {name for name, _ in instruction.flags} - {"from", "chmod"}
        if unknown:
            raise DockerfileError(f"line {instruction.line}: COPY --{unknown.pop()} is not known here")
        if origin is None:
            context = self.context
        elif origin in self.build_contexts:
            context = Context(self.build_contexts[origin])
        else:
            source = self.build(origin).root
            for name in sources:
                start = _inside(source, name)
                destination.mkdir(parents=True, exist_ok=True)
                whole = f"{start}/." if start.is_dir() else str(start)
                subprocess.run(["cp", "--archive", "--reflink=auto", whole, str(destination)], check=True)
            return
        into = target.endswith("/") or len(sources) > 1 or destination.is_dir() or target in (".", "./")
        context.copy(sources, destination, into=into, mode=None if mode is None else int(mode, 8))

    def _run(self, instruction: Instruction, image: Image, variables: Mapping[str, str]) -> None:
        self.report(f"RUN {' '.join(instruction.text.split())[:100]}")
        with tempfile.TemporaryDirectory() as lent, _mount_points(image.root) as mount_point:
            settings = self.outside.lend(Path(lent))
            binds = [(Path(lent), mount_point(f"{self.outside.place}/"))]
            if (resolv := Path("/etc/resolv.conf")).is_file():
                binds.append((resolv, mount_point("/etc/resolv.conf")))
            for mount in [value for name, value in instruction.flags if name == "mount"]:
                options = dict(option.split("=", 1) for option in mount.split(","))
                target = options["target"]
                if options["type"] == "cache":
                    source = self.caches / re.sub(r"\W+", "-", target).strip("-")
                    source.mkdir(parents=True, exist_ok=True)
                    binds.append((source, mount_point(f"{target}/")))
                elif options["type"] == "secret":
                    if (secret := Path(lent) / options["id"]).is_file():  # one that is not given is left out
                        binds.append((secret, mount_point(target)))
                else:
                    raise DockerfileError(f"line {instruction.line}: RUN --mount={mount} is not known here")
            binding = [word for source, target in binds for word in ("--bind", f"{source}:{target}")]
            user = [] if image.user == "0:0" else ["--user", image.user]  # root keeps its capabilities in a build
            unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts"]
            subprocess.run(
                [*unshare, str(ENTER), *binding, *user, str(image.root), image.workdir, *instruction.command()],
                env={"HOME": "/root", **settings, **variables},
                stdin=subprocess.DEVNULL,
                check=True,
            )


def _inside(root: Path, path: str) -> Path:
    """A path of the image, as a path of ours. `..` cannot leave the root; links in our own images do not try."""
    return root / os.path.normpath("/" + path).lstrip("/")


@contextmanager
def _mount_points(root: Path) -> Iterator[Callable[[str], str]]:
    """A function that makes sure that a path, a directory if it ends with "/", is there to be mounted on. What had to be
    made for that is removed in the end."""
    made: list[Path] = []

    def mount_point(path: str) -> str:
        target = _inside(root, path)
        missing = [directory for directory in (target, *target.parents) if not os.path.lexists(directory)]
        for directory in reversed(missing[1:]):
            directory.mkdir()
        if missing:
            target.mkdir() if path.endswith("/") else target.touch()
        made.extend(missing)
        return path.rstrip("/")

    try:
        yield mount_point
    finally:
        for path in sorted(made, reverse=True):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
