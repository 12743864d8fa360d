# For GPU servers: the repository with everything of requirements.txt. torch's wheel brings CUDA's libraries, so the
# host needs NVIDIA's driver and container toolkit only. NOT BUILT by its authors so far: no daemon was at hand.
#
#   docker build -t icetransfer .
#   docker run --gpus all --ipc=host -v "$PWD/egs:/icetransfer/egs" -v "$PWD/results:/icetransfer/results" \
#       icetransfer egs/nl/run.sh --init ml --hours 8min
#
# With no command it says what it finds. --ipc=host: the processes that load batches share memory.
FROM python:3.12-slim-bookworm

# g++: Triton compiles its launcher where the GPU is. git: the commit in provenance.json.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /icetransfer
COPY requirements.txt .
RUN python -m pip install --no-cache-dir --requirement requirements.txt

COPY . .
RUN python -m pip install --no-cache-dir --no-deps --editable .

# The recipes use the active environment; without this they would make a .venv.
ENV VIRTUAL_ENV=/usr/local
CMD ["icetransfer", "doctor"]
