#!/usr/bin/env bash
# The EPD chain inside NVIDIA Dynamo on this machine, in the foreground: deploy/launch/dynamo_epd.sh --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
# For the launcher, the sidecars and Dynamo's encode worker alike, wherever this project is not installed.
export PYTHON PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -P -m deploy.launch.dynamo_epd "$@"
