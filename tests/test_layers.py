"""The arrows of docs/design.md: who may import whom, and who may import what from outside."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# For each room, the parts of this project that it may import beside itself. The first match counts.
ALLOWED = {
    "sidecar/vision/": (),
    "sidecar/runtimes/": ("sidecar.vision",),
    "sidecar/engine/": ("sidecar.runtimes", "sidecar.store_file", "sidecar.vision", "sidecar.errors"),
    "sidecar/monitoring/": ("sidecar.engine", "sidecar.__version__"),
    "sidecar/urls/": ("sidecar.errors", "sidecar.vision"),
    "sidecar/server/": ("sidecar",),
    "sidecar/commands/plan": (
        "sidecar.commands",
        "sidecar.plan",
        "sidecar.load",
        "sidecar.client",
        "sidecar.credentials",
    ),
    "sidecar/plan/": ("sidecar.client", "sidecar.engine.cost", "sidecar.load", "sidecar.vision"),
    "sidecar/commands/serve.py": ("sidecar",),
    "sidecar/commands/health.py": ("sidecar.commands", "sidecar.credentials"),
    "sidecar/commands/load": (
        *("sidecar.commands", "sidecar.load", "sidecar.client"),
        *("sidecar.credentials", "sidecar.vision", "sidecar.pb"),
    ),
    "sidecar/load/": ("sidecar.client", "sidecar.replies", "sidecar.vision", "sidecar.pb"),
    "sidecar/commands/": (
        "sidecar.client",
        "sidecar.fleet",
        "sidecar.credentials",
        "sidecar.picture",
        "sidecar.vision",
        "sidecar.pb",
    ),
    "sidecar/integrations/__init__.py": (),
    "sidecar/integrations/chat_images.py": ("sidecar.items",),
    "sidecar/integrations/chat.py": (
        *("sidecar.client", "sidecar.replies"),
        *("sidecar.integrations.chat_images", "sidecar.integrations.tensor_file"),
    ),
    "sidecar/integrations/tensor_file.py": ("sidecar.vision",),
    "sidecar/integrations/vllm/": (
        *("sidecar.client", "sidecar.replies", "sidecar.items", "sidecar.credentials"),
        *("sidecar.store_file", "sidecar.vision", "sidecar.pb", "sidecar.fleet", "sidecar.addresses"),
        *("sidecar.integrations.checkpoint", "sidecar.integrations.owned_directory"),
    ),
    "sidecar/integrations/dynamo/": (
        *("sidecar.fleet", "sidecar.addresses", "sidecar.replies", "sidecar.items", "sidecar.credentials"),
        *("sidecar.flags", "sidecar.vision", "sidecar.pb"),
        *("sidecar.integrations.checkpoint", "sidecar.integrations.owned_directory"),
    ),
    "sidecar/integrations/checkpoint.py": ("sidecar.artifact", "sidecar.vision"),
    "sidecar/integrations/owned_directory.py": (),
    "sidecar/client.py": (
        *("sidecar.channel", "sidecar.credentials", "sidecar.exchange", "sidecar.items", "sidecar.replies"),
        *("sidecar.pb", "sidecar.vision"),
    ),
    "sidecar/channel.py": ("sidecar.replies",),
    "sidecar/addresses.py": (),
    "sidecar/fleet.py": (
        *("sidecar.addresses", "sidecar.fleet_errand", "sidecar.fleet_ways", "sidecar.credentials"),
        *("sidecar.items", "sidecar.pb", "sidecar.replies"),
    ),
    "sidecar/fleet_errand.py": ("sidecar.replies",),
    "sidecar/fleet_ways.py": (
        *("sidecar.addresses", "sidecar.channel", "sidecar.exchange", "sidecar.items", "sidecar.pb", "sidecar.replies"),
    ),
    "sidecar/exchange.py": ("sidecar.items", "sidecar.pb", "sidecar.replies"),
    "sidecar/credentials.py": (),
    "sidecar/items.py": ("sidecar.pb", "sidecar.vision"),
    "sidecar/replies.py": ("sidecar.items", "sidecar.pb", "sidecar.store_file", "sidecar.vision"),
    "sidecar/store_file.py": ("sidecar.vision",),
    "sidecar/picture.py": ("sidecar.vision",),
    "sidecar/artifact.py": ("sidecar.vision",),
    "sidecar/adopted.py": ("sidecar.artifact", "sidecar.runtimes", "sidecar.vision"),
    "sidecar/errors.py": ("sidecar.vision",),
    "sidecar/flags.py": (),
    "sidecar/machine.py": ("sidecar.flags",),
    "sidecar/settings.py": ("sidecar.flags", "sidecar.runtimes.loading", "sidecar.vision"),
    "export/": (
        "export",
        "sidecar.artifact",
        "sidecar.adopted",
        "sidecar.machine",
        "sidecar.runtimes",
        "sidecar.vision",
    ),
}
# Heavy packages and the only places that may import them.
HEAVY = {
    "torch": ("sidecar/vision/tower.py", "sidecar/runtimes/torch", "sidecar/integrations/", "export/"),
    "triton": ("sidecar/runtimes/torch_kernels.py",),
    "transformers": ("export/optimum_child.py",),
    "vllm": ("sidecar/integrations/vllm/",),
    "dynamo": ("sidecar/integrations/dynamo/",),
    "openvino": ("sidecar/runtimes/openvino.py", "sidecar/runtimes/optimum.py", "export/"),
    "onnxruntime": ("sidecar/runtimes/onnx.py",),
    "prometheus_client": ("sidecar/monitoring/", "sidecar/integrations/vllm/"),
    "aiohttp": ("sidecar/urls/",),
    "opentelemetry": ("sidecar/monitoring/tracing.py",),
}


def modules() -> list[str]:
    files = [*(ROOT / "sidecar").rglob("*.py"), *(ROOT / "export").rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in files if "/pb/" not in path.as_posix())


def imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("module", modules())
def test_arrows_point_one_way(module: str) -> None:
    room = next((room for room in ALLOWED if module.startswith(room)), None)
    if room is None:
        assert module in ("sidecar/__init__.py", "sidecar/__main__.py"), f"{module} has no place in docs/design.md"
        return
    own = room.removesuffix(".py").strip("/").replace("/", ".")
    for name in imports(module):
        if name.split(".")[0] not in ("sidecar", "export") or within(name, own):
            continue
        if name in ("sidecar", "sidecar.__version__"):
            continue
        assert any(within(name, allowed) for allowed in ALLOWED[room]), f"{module} must not import {name}"


@pytest.mark.parametrize("module", modules())
def test_heavy_packages_stay_where_they_belong(module: str) -> None:
    for name in imports(module):
        places = HEAVY.get(name.split(".")[0])
        assert places is None or any(module.startswith(place) for place in places), f"{module} must not import {name}"


def test_serving_imports_neither_torch_nor_transformers() -> None:
    code = "import sidecar.server.app, sidecar.runtimes.openvino, sidecar.client, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "onnxruntime", "huggingface_hub"} & set(loaded)


def test_the_connector_imports_neither_server_nor_vllm_before_vllm_asks() -> None:
    own = "options, files, features, fetcher, scheduler_half, identity"
    code = f"import sys; from sidecar.integrations.vllm import {own}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert not {"openvino", "sidecar.engine", "sidecar.runtimes", "sidecar.server", "vllm", "torch"} & set(loaded)
