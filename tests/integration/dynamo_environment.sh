#!/usr/bin/env bash
# An environment in which Dynamo's frontend, prefill and decode workers run on CPU, with NIXL and this project's encode worker:
#     tests/integration/dynamo_environment.sh VENV
# As environment.sh, which makes it; the vLLM is the one that this Dynamo was built for.
set -euo pipefail
if [ $# -ne 1 ]; then
    echo "usage: $0 VENV" >&2
    exit 2
fi
exec "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "$1" 0.31.0 1.6.1
