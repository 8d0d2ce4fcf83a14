"""The package's benchmark as a script: `python scripts/benchmark.py ...` is `python -m hf_cnllm benchmark ...`."""

import sys

from hf_cnllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
