"""The files that a build may copy: a directory less what its .dockerignore names.

Source of the rules: https://docs.docker.com/build/concepts/context/#dockerignore-files
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path


class Context:
    def __init__(self, root: Path) -> None:
        self.root = root
        ignore = root / ".dockerignore"
        lines = ignore.read_text().splitlines() if ignore.is_file() else []
        self._rules = [_rule(line.strip()) for line in lines if line.strip() and not line.startswith("#")]

    def has(self, path: str) -> bool:
        """Whether a path relative to the root is left by .dockerignore: the last rule that matches it or one of its
        parents decides."""
        parts = path.split("/")
        ancestors = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        kept = True
        for pattern, keep in self._rules:
            if any(pattern.fullmatch(ancestor) for ancestor in ancestors):
                kept = keep
        return kept

    def files(self, source: str) -> Iterator[str]:
        """The files at or below `source`, relative to the root."""
        source = os.path.normpath(source.lstrip("/"))
        start = self.root / source
        paths = [start] if not start.is_dir() else sorted(path for path in start.rglob("*") if not path.is_dir())
        for path in paths:
            relative = path.relative_to(self.root).as_posix()
            if path.is_file() and self.has(relative):
                yield relative

    def copy(self, sources: list[str], target: Path, *, into: bool, mode: int | None) -> None:
        """COPY: a directory's contents, or files into `target`, or one file as `target`.

        Raises:
            FileNotFoundError: if a source is not there or wholly ignored.
        """
        for source in sources:
            start = self.root / os.path.normpath(source.lstrip("/"))
            files = list(self.files(source))
            if not files and not (start.is_dir() and source == "/"):
                raise FileNotFoundError(f"COPY {source}: there is no such file, or .dockerignore leaves it out")
            for name in files:
                path = self.root / name
                below = path.relative_to(start) if start.is_dir() else Path(path.name)
                destination = target / below if start.is_dir() or into else target
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, destination)
                os.chown(destination, 0, 0)
                destination.chmod(path.stat().st_mode & 0o777 if mode is None else mode)


def _rule(line: str) -> tuple[re.Pattern[str], bool]:
    """A line as a pattern of whole paths, and whether it brings them back."""
    keep = line.startswith("!")
    pattern = re.escape(os.path.normpath(line.lstrip("!").lstrip("/")))
    for wildcard, meaning in ((r"\*\*/", "(?:.*/)?"), (r"\*\*", ".*"), (r"\*", "[^/]*"), (r"\?", "[^/]")):
        pattern = pattern.replace(wildcard, meaning)
    return re.compile(pattern), keep
