#!/usr/bin/env bash
# Makes .cuda-venv, an environment with the CUDA build of torch and Triton, for `bench.py compile`: 5 GB, no GPU needed.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .cuda-venv
.cuda-venv/bin/pip install torch==2.14.1 numpy tqdm
.cuda-venv/bin/python -c "import torch, triton; assert torch.version.cuda, 'not a CUDA build'; print(torch.__version__)"
