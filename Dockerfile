# The pipeline with its environments installed from the same locks that `quantize setup` uses.
#
#   docker build -t quantize .                                  # CPU
#   docker build -t quantize --build-arg ACCELERATOR=cuda .     # GPU: run with --gpus all
#   docker run --rm -v "$PWD:/data" quantize run recipes/my-model.yaml --store /data/store
#
# A CUDA image needs no CUDA base: the locks bring CUDA's libraries as wheels, the driver comes from
# the host.
FROM python:3.11-slim-bookworm

ARG ACCELERATOR=cpu
ENV QUANTIZE_ACCELERATOR=${ACCELERATOR} \
    QUANTIZE_CACHE=/opt/quantize \
    PIP_NO_CACHE_DIR=1 \
    UV_NO_CACHE=1

# vLLM and Triton compile small kernels when they start.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev libnuma1 numactl git \
    && rm -rf /var/lib/apt/lists/*

COPY . /src
RUN pip install /src && quantize setup --all && rm -rf /src

# The driver is not visible while the image is built; from here on the machine decides.
ENV QUANTIZE_ACCELERATOR=
WORKDIR /data
ENTRYPOINT ["quantize"]
CMD ["--help"]
