# kw_mm on a machine with one NVIDIA GPU, from the lines of the README.
#
#   docker build -t kw_mm .
#   docker run --gpus 1 --shm-size 8g -it kw_mm
#
# This file has not been built: it was written where there is neither Docker nor a GPU. mmcv is
# compiled for the card, which takes a while. ARCH is its compute capability: 8.0 A100, 8.6 RTX
# 30x0, 8.9 RTX 40x0 and L4, 9.0 H100.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

ARG ARCH=9.0
ENV DEBIAN_FRONTEND=noninteractive PATH=/opt/venv/bin:$PATH

RUN apt-get update && apt-get install -y --no-install-recommends \
        python3 python3-dev python3-venv g++ git make libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/venv

WORKDIR /kw_mm
COPY requirements.txt ./
COPY tools/install tools/install
COPY kw_mm/versions.py kw_mm/versions.py

# torch first, because mmcv is compiled against it.
RUN pip install --no-cache-dir -c requirements.txt torch numpy setuptools wheel ninja psutil
RUN FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$ARCH python tools/install/build_mmcv.py -c requirements.txt
RUN pip install --no-cache-dir -r requirements.txt

COPY . .
RUN pip install --no-build-isolation --no-deps -e . \
    && python tools/install/check_env.py --pins requirements.txt
CMD ["bash"]
