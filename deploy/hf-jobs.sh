#!/bin/sh
# One recipe as a Hugging Face Job:
#
#     python3 -m pip wheel --no-deps -w dist /path/to/the/quantize/checkout
#     hf buckets create you/quantize-store
#     sh hf-jobs.sh my-model.yaml you/quantize-store
#
# Checked against the options of `hf` 2.4.0 (huggingface_hub), with `hf jobs run --dry-run` as far as
# it goes without an account; not run.
#
# A job's disk is gone when the job ends. What a run has finished is therefore copied to a bucket when
# the run ends, whether it worked or not, and back when the next one starts; the store checks every
# file before it uses it. A mounted bucket will not do: the store needs locks and hard links. Downloads
# (fetch/) are not copied: they come from the Hub anyway.
#
# HF Jobs cannot tell exit code 75 from others, so nothing is repeated automatically: run the same
# command again when the log ends with "run the same command again".
set -eu

recipe=${1:?a recipe file}
bucket=${2:?a bucket, owner/name}
flavor=${FLAVOR:-h200x4} # serve.tensor_parallel_size GPUs; see `hf jobs hardware`

folder=$(cd "$(dirname "$recipe")" && pwd)

hf jobs run --name quantize --flavor "$flavor" --timeout "${TIMEOUT:-24h}" --detach \
    --secrets HF_TOKEN \
    --env QUANTIZE_ACCELERATOR=cuda \
    --env BUCKET="hf://buckets/$bucket" \
    --env RECIPE="/recipes/$(basename "$recipe")" \
    --volume "$(pwd)/dist:/dist" \
    --volume "$folder:/recipes" \
    python:3.11-bookworm sh -c '
        set -eu
        pip install --quiet /dist/quantize-*.whl
        mkdir -p /store
        hf buckets sync "$BUCKET" /store --quiet
        code=0
        quantize run "$RECIPE" --store /store || code=$?
        hf buckets sync /store "$BUCKET" --exclude "fetch/*" --exclude "*/.staging/*" --quiet
        exit "$code"
    '
