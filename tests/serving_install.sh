#!/usr/bin/env bash
# A serving install alone: no extras. It must hold neither torch nor transformers, take less than 500 MB, and serve.
# ARTIFACT may name an artifact; without it the development environment exports the toy one.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
scratch=$(mktemp -d)
server=
finish() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    rm -rf "$scratch"
}
trap finish EXIT

artifact=${ARTIFACT:-}
if [ -z "$artifact" ]; then
    artifact=$scratch/artifact
    .venv/bin/python -m export --model random:toy --out "$artifact" --precision bf16 >"$scratch/export.log"
fi

"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check .
cp -r export/photos "$scratch/photos"
cd "$scratch" # so that the installed package is what is imported
installed=$(venv/bin/python -m pip list --disable-pip-version-check --format=freeze)
if grep -iE '^(torch|transformers|onnxruntime)==' <<<"$installed"; then
    echo "a serving install must not hold these" >&2
    exit 1
fi
megabytes=$(du -sm venv/lib/python*/site-packages | cut -f1)
echo "serving install: $megabytes MB in site-packages"
[ "$megabytes" -lt 500 ]

venv/bin/python -m sidecar serve --artifact "$artifact" --listen "unix:$scratch/sidecar.sock" --store "$scratch/store" 2>serve.log &
server=$!
for _ in $(seq 300); do
    grep -q 'ready on' serve.log && break
    kill -0 "$server" || { cat serve.log; exit 1; }
    sleep 0.1
done
venv/bin/python -m sidecar encode photos/*.jpg photos/*.png photos/*.webp --server "unix:$scratch/sidecar.sock" --out out.safetensors
kill "$server"
wait "$server"
server=
echo "serving install: 1 passed, 0 failed"
