#!/bin/sh
# Compile every lock. A lock names versions only, never where they came from.
set -eu
cd "$(dirname "$0")"
common="--python-version 3.11 --no-emit-index-url --no-emit-find-links --no-annotate --quiet"
common="$common --custom-compile-command"
backend="--torch-backend cpu"
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    backend=""
    for place in $PIP_FIND_LINKS; do backend="$backend --find-links $place"; done
fi
for name in llmcompressor llamacpp vllm autoawq gptqmodel; do
    override=""
    if [ -e "$name.override.txt" ]; then override="--override $name.override.txt"; fi
    uv pip compile $common "make locks" --python-platform x86_64-manylinux_2_28 $backend \
        --excludes excludes.txt $override "$name.cpu.in" --output-file "$name.cpu.lock"
    uv pip compile $common "make locks" --python-platform x86_64-manylinux_2_35 \
        "$name.cuda.in" --output-file "$name.cuda.lock"
done
uv pip compile $common "make locks" --python-platform x86_64-manylinux_2_28 lmeval.in --output-file lmeval.lock
