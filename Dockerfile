# btx in a container, without root and without a compiler:
#   docker build -t btx .                                              # torch for CPUs
#   docker build -t btx --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .     # for NVIDIA GPUs
#   docker run --rm -v "$PWD:/work" btx run demo                       # add --gpus all --shm-size 8g for GPUs
FROM python:3.12-slim

# Where torch comes from, and which extras of pyproject.toml are installed.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=data,lora,serve

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# pyproject.toml says which versions go together.
# hadolint ignore=DL3013
RUN pip install --extra-index-url "${TORCH_INDEX}" "torch>=2.11,<2.14" \
    && pip install ".[${EXTRAS}]" \
    && rm -rf /src/*

RUN useradd --create-home --uid 1000 btx && mkdir /work && chown btx /work
USER 1000
WORKDIR /work
# What Hugging Face fetches; mount a volume here to keep it.
ENV HF_HOME=/home/btx/.cache/huggingface

ENTRYPOINT ["btx"]
CMD ["--help"]
