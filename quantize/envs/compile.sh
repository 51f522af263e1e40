#!/bin/sh
# Compile every lock. A lock names versions only, never where they came from.
set -eu
cd "$(dirname "$0")"
common="--python-version 3.11 --no-emit-index-url --no-emit-find-links --no-annotate --quiet"
common="$common --custom-compile-command"
[ -z "${PIP_FIND_LINKS:-}" ] && backend="--torch-backend cpu" || backend="--find-links $PIP_FIND_LINKS"
for name in llmcompressor vllm; do
    uv pip compile $common "make locks" --python-platform x86_64-manylinux_2_28 $backend \
        --excludes excludes.txt "$name.cpu.in" --output-file "$name.cpu.lock"
    uv pip compile $common "make locks" --python-platform x86_64-manylinux_2_35 \
        "$name.cuda.in" --output-file "$name.cuda.lock"
done
uv pip compile $common "make locks" lmeval.in --output-file lmeval.lock
