"""A Dockerfile as stages of instructions, and the parts of its language that ours uses.

It knows the syntax alone: what an instruction does is in `stages.py`. What it does not know it refuses, so that nothing is
passed over in silence. Source: https://docs.docker.com/reference/dockerfile/
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

KEYWORDS = (
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM"),
    *("HEALTHCHECK", "LABEL", "RUN", "STOPSIGNAL", "USER", "WORKDIR"),
)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")


class DockerfileError(ValueError):
    """What this reader does not know or the Dockerfile does not say."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """`flags` are the --name=value before the arguments, in order; `text` is the rest, as written on one line."""

    line: int
    keyword: str
    flags: tuple[tuple[str, str], ...]
    text: str

    def flag(self, name: str) -> str | None:
        return next((value for given, value in self.flags if given == name), None)

    def command(self, text: str | None = None) -> list[str]:
        """The arguments to execute: those of the exec form, or a shell and its command."""
        text = self.text if text is None else text
        if text.startswith("["):
            words: list[str] = json.loads(text)
            return words
        return ["/bin/sh", "-c", text]

    def pairs(self) -> dict[str, str]:
        """name=value words, quotes taken off."""
        words = [word.partition("=") for word in shlex.split(self.text)]
        if not all(separator for _, separator, _ in words):
            raise DockerfileError(f"line {self.line}: {self.keyword} takes name=value")
        return {name: value for name, _, value in words}


@dataclass(frozen=True, slots=True)
class Stage:
    """`base` is as written, with variables of the arguments before the first FROM filled in."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, keyword: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.keyword == keyword]


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """`arguments` are the defaults of ARG before the first FROM; a stage without a name has its number."""

    arguments: dict[str, str]
    stages: list[Stage]

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Raises:
            DockerfileError: with the line of what is not understood.
        """
        arguments: dict[str, str] = {}
        stages: list[Stage] = []
        for instruction in _instructions(text):
            if instruction.keyword == "FROM":
                words = instruction.text.split()
                if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
                    raise DockerfileError(f"line {instruction.line}: FROM takes an image, and AS with a name")
                name = words[2] if len(words) == 3 else str(len(stages))
                stages.append(Stage(name, expand(words[0], arguments)))
            elif stages:
                stages[-1].instructions.append(instruction)
            elif instruction.keyword == "ARG":
                arguments |= instruction.pairs()
            else:
                raise DockerfileError(f"line {instruction.line}: {instruction.keyword} before the first FROM")
        return cls(arguments, stages)

    def stage(self, name: str) -> Stage:
        """
        Raises:
            DockerfileError: if there is none of that name.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise DockerfileError(f"there is no stage {name!r}; there are {', '.join(stage.name for stage in self.stages)}")

    def lineage(self, name: str) -> list[Stage]:
        """A stage and those that it is FROM, the first one first."""
        stage = self.stage(name)
        names = {stage.name for stage in self.stages}
        return [*(self.lineage(stage.base) if stage.base in names else []), stage]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """$NAME, ${NAME} and ${NAME:-default}; one that is not set is empty, as in a shell."""

    def value(match: re.Match[str]) -> str:
        plain, braced, default = match.groups()
        return variables.get(plain or braced) or default or ""

    return _VARIABLE.sub(value, text)


def _instructions(text: str) -> list[Instruction]:
    instructions = []
    pending, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        # Comments vanish, even between the lines of one instruction.
        if line.lstrip().startswith("#") or (not pending and not line.strip()):
            continue
        first = first if pending else number
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1]
        else:
            instructions.append(_instruction(pending + line, first))
            pending = ""
    if pending:
        raise DockerfileError(f"line {first}: the last line goes on")
    return instructions


def _instruction(text: str, line: int) -> Instruction:
    keyword, _, rest = text.strip().partition(" ")
    if keyword.upper() not in KEYWORDS:
        raise DockerfileError(f"line {line}: {keyword} is not known here")
    flags = []
    rest = rest.strip()
    while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
        flags.append((match[1], match[2]))
        rest = rest[match.end() :]
    return Instruction(line, keyword.upper(), tuple(flags), rest)
