# posfield with CUDA: torch's wheels from PyPI bring it, the host needs a driver and the NVIDIA container toolkit alone.
#   docker build -t posfield .
#   docker run --gpus all --shm-size 16g -v "$PWD:/workspace" posfield pretrain --config intertwined_vits16_1gpu data.root=photos
# Not built so far: there was no Docker where it was written. Detectron2 is not in it; the torchvision engine is.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/posfield
COPY . .
# OpenCV last: mmengine requires the one for desktops, which needs libGL.
RUN pip install --no-cache-dir --constraint constraints.txt "setuptools<81" wheel \
    && pip install --no-cache-dir --no-build-isolation --constraint constraints.txt ".[all]" \
    && pip install --no-cache-dir --constraint constraints.txt --force-reinstall --no-deps opencv-python-headless
WORKDIR /workspace
ENTRYPOINT ["posfield"]
