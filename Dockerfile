# A GPU node with the project and its operator built: `docker build -t deformable-detr .`, then
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" --user "$(id -u)" -e HOME=/tmp deformable-detr \
#     ddetr train r50_deformable data.train=... data.val=...
# The CUDA compiler must be of torch's CUDA, as in cluster.yaml. No GPU is needed to build.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

# Ubuntu replaces a package's old version, so that a pin here would end the next build.
# hadolint ignore=DL3008
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/ddetr/bin:$PATH \
    DEFORMABLE_OP_CACHE=/opt/ddetr/ops \
    PYTHONUNBUFFERED=1
WORKDIR /opt/source

# The large packages first: this layer changes with constraints.txt alone. DeepSpeed's build imports torch, hence two steps.
COPY constraints.txt ./
RUN python3 -m venv /opt/ddetr \
    && pip install --no-cache-dir -c constraints.txt setuptools wheel ninja torch torchvision

COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY jobs jobs
COPY tune tune
RUN pip install --no-cache-dir -c constraints.txt --no-build-isolation '.[export,s3]'

# From another folder, so that the installed package is built and not the copy beside it.
WORKDIR /work
RUN python -m pipeline.csrc.build --device cpu && python -m pipeline.csrc.build --device cuda

RUN useradd --create-home --uid 1001 ddetr && chown ddetr /work /opt/ddetr/ops
USER 1001
CMD ["ddetr", "--help"]
