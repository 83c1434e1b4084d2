#!/usr/bin/env bash
# The EPD chain of stock vLLM on this machine, in the foreground: deploy/launch/epd.sh --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
# For the launcher, the sidecars and vLLM's connector alike, wherever this project is not installed.
export PYTHON PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -P -m deploy.launch.epd "$@"
