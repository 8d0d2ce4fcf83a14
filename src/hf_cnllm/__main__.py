import sys

from hf_cnllm.cli import main

sys.exit(main())
