# bvae in a container, for the CPU or for CUDA.
#
#   docker build --tag bvae .
#   docker run --rm --volume "$PWD/runs:/bvae/runs" bvae make train
#   docker run --rm bvae make test
#
# For CUDA, with the NVIDIA container toolkit; the image's toolkit compiles the kernels, torch brings its own libraries:
#
#   docker build --tag bvae:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg TORCH='torch==2.13.0' .
#   docker run --rm --gpus all --ipc host --volume "$PWD/runs:/bvae/runs" bvae:cuda make train
#
# BASE    a Debian or Ubuntu with Python 3.11 or later among its packages
# TORCH   pip requirement; INDEX: where pip finds it (CPU builds of torch have an index of their own)

ARG BASE=debian:bookworm-slim
FROM ${BASE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ libjpeg-dev make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /bvae

# The longest step by itself: torch stays in the cache while the sources change.
ARG TORCH="torch>=2.11"
ARG INDEX=""
ENV TORCH=${TORCH} PIP_NO_CACHE_DIR=1 PIP_EXTRA_INDEX_URL=${INDEX}
COPY Makefile ./
RUN make torch

COPY . .
RUN make install

ENV PATH=/bvae/.venv/bin:${PATH}
CMD ["bvae", "--help"]
