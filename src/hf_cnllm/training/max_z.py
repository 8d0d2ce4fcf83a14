"""The max-z loss under gradient accumulation: its mean is over the positions of all micro-batches."""

from collections.abc import Iterator
from typing import Any

import torch


class CountPositions:
    """Stands in front of a Trainer: tells the loss of a model with max-z how many positions the whole accumulated batch has, over
    all processes, as Trainer tells it the number of learned tokens. Gradients are then those of the one big batch, whatever
    share of each micro-batch is learned, as long as that has no more padding: padded positions count, as in the original."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        batches, learned = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        trainer: Any = self
        if learned is not None and trainer.args.n_gpu <= 1 and getattr(trainer.model.config, "z_loss_weight", 0):
            positions = torch.tensor(sum(batch["labels"][..., 1:].numel() for batch in batches), device=device)
            if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
                positions = trainer.accelerator.gather(positions).sum() / trainer.get_tp_size()
            for batch in batches:
                batch["num_positions_in_batch"] = positions
        return batches, learned
