"""Data that chat models write or judge: Self-Instruct and Alpaca (`self_instruct`), pairwise verdicts (`judge`). See
docs/data_pipelines.md. Needs the extra `data`."""
