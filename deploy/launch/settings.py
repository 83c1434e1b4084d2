"""What the launch scripts read from the environment, and what they say of what will not do."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path


class SettingsError(ValueError):
    """Settings that will not do."""


def flags(given: Mapping[str, str], variable: str) -> list[str]:
    try:
        return shlex.split(given.get(variable, ""))
    except ValueError as error:
        raise SettingsError(f"{variable}: {str(error).lower()}") from error


def seconds(given: Mapping[str, str], variable: str, default: str) -> float:
    try:
        return float(given.get(variable, default))
    except ValueError:
        raise SettingsError(f"{variable} must be a number of seconds, got {given[variable]!r}") from None


def program(name: str, variable: str, script: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SettingsError(
            f"there is no command {name}: say where it is, {variable}=/path/to/{Path(name).name} {script} …"
        )
    return found


def artifact_of(model: str, named: Path | None) -> Path:
    """Where the artifact of `model` is, unless it is named.

    Raises:
        SettingsError: if there is none.
    """
    if model.startswith("random:"):
        raise SettingsError(f"vLLM cannot load {model}: give a checkpoint's directory, such as demo/checkpoint-toy")
    # `make export` writes it there.
    artifact: Path = named or Path("artifacts") / model.replace(":", "-").replace("/", "--")
    if not (artifact / "manifest.json").is_file():
        advice = f"{artifact} has no manifest.json" if named else f"first `make export MODEL={model}`"
        raise SettingsError(f"there is no artifact in {artifact}: {advice}, or name another")
    return artifact


def example(url: str, model: str = "") -> str:
    request: dict[str, object] = {"model": model} if model else {}
    request |= {"messages": [{"role": "user", "content": "What is a sidecar?"}], "max_tokens": 32}
    return f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(request)}'"
