"""The corpus pipeline for pre-training, on datatrove: see `pipeline.run` and docs/data_pipelines.md. Needs the extra `data`."""

from .pipeline import STAGES, Settings, run

__all__ = ["STAGES", "Settings", "run"]
