"""Semantic duplicates: clusters of dense embeddings, as Baichuan 2 and SemDeDup (Abbas et al. 2023, arXiv 2303.09540)."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupFilter
from datatrove.utils.batching import batched
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ...hub.places import check_is_checkpoint

if TYPE_CHECKING:
    from .pipeline import Job

BATCH, MAX_TOKENS = 32, 512
ONE_CLUSTER = 4096  # so few are compared all with all
SAMPLE, ROUNDS = 100_000, 10


class Embed(PipelineStep):
    """Writes the embeddings of a task's documents, `NNNNN.npy` (documents, width): the mean of a model's last hidden states,
    of length 1.

    Args:
        model: a checkpoint that AutoModel and AutoTokenizer load.
    """

    type, name = "🧭 - EMBED", "mean of hidden states"

    def __init__(self, model: str, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    @torch.no_grad()
    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.model, padding_side="right")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model = AutoModel.from_pretrained(self.model).eval()
        if torch.cuda.is_available():
            model = model.cuda()
        vectors = [np.empty((0, model.config.hidden_size), dtype=np.float32)]
        for batch in batched(data, BATCH):
            texts = [document.text for document in batch]
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            hidden = model(**inputs.to(model.device)).last_hidden_state
            mask = inputs["attention_mask"].to(hidden)[..., None]
            means = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors.append(normalize(means.float(), dim=-1).cpu().numpy())
        Path(self.output).mkdir(parents=True, exist_ok=True)
        np.save(Path(self.output, f"{rank:05d}.npy"), np.concatenate(vectors))


class ClusterEmbeddings(PipelineStep):
    """Of documents of one cluster that are more similar than a threshold, all but the first are listed for removal."""

    type, name = "🫂 - DEDUP", "clusters of embeddings"

    def __init__(self, embeddings: str, output: str, threshold: float) -> None:
        super().__init__()
        self.embeddings, self.output, self.threshold = embeddings, output, threshold

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        parts = [np.load(path) for path in sorted(Path(self.embeddings).glob("*.npy"))]
        vectors = torch.from_numpy(np.concatenate(parts))
        clusters = cluster(vectors)
        repeated = torch.zeros(len(vectors), dtype=torch.bool)
        for number in range(int(clusters.max()) + 1 if len(clusters) else 0):
            members = (clusters == number).nonzero().flatten()
            repeated[members[find_repeated(vectors[members], self.threshold)]] = True
        self.stat_update("removed_documents", value=int(repeated.sum()))
        Path(self.output).mkdir(parents=True, exist_ok=True)
        start = 0
        for task, part in enumerate(parts):
            found = repeated[start : start + len(part)].nonzero().flatten()
            found.numpy().astype("<u4").tofile(Path(self.output, f"{task:06d}.remove"))
            start += len(part)


def cluster(vectors: Tensor, seed: int = 0) -> Tensor:
    """Spherical k-means with about √n clusters.

    Args:
        vectors: (n, width), of length 1.

    Returns:
        Tensor: (n,), the number of each one's cluster.
    """
    if len(vectors) <= ONE_CLUSTER:
        return torch.zeros(len(vectors), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    sample = vectors[torch.randperm(len(vectors), generator=generator)[:SAMPLE]]
    centers = sample[: round(len(vectors) ** 0.5)].clone()
    for _ in range(ROUNDS):
        nearest = _nearest(sample, centers)
        sums = torch.zeros_like(centers).index_add_(0, nearest, sample)
        centers = torch.where(sums.norm(dim=-1, keepdim=True) > 0, normalize(sums, dim=-1), centers)
    return _nearest(vectors, centers)


def _nearest(vectors: Tensor, centers: Tensor) -> Tensor:
    return torch.cat([(part @ centers.T).argmax(-1) for part in vectors.split(ONE_CLUSTER)])


def find_repeated(vectors: Tensor, threshold: float) -> Tensor:
    """(n,) bool: those whose cosine with an earlier one, itself not repeated, reaches the threshold."""
    repeated = torch.zeros(len(vectors), dtype=torch.bool)
    for start in range(0, len(vectors), ONE_CLUSTER):
        block = vectors[start : start + ONE_CLUSTER]
        kept = vectors[:start][~repeated[:start]]
        own = block @ block.T >= threshold
        seen = (block @ kept.T >= threshold).any(-1) if len(kept) else torch.zeros(len(block), dtype=torch.bool)
        for i in range(len(block)):
            seen[i] |= bool((own[i, :i] & ~seen[:i]).any())
        repeated[start : start + len(block)] = seen
    return repeated


def semantic_duplicates(job: "Job") -> list[PipelineStep]:
    settings = job.settings
    if settings.embedder is None:
        raise ValueError("the stage embedding needs --embedder, a checkpoint that embeds texts")
    check_is_checkpoint(settings.embedder, "--embedder")
    AutoConfig.from_pretrained(settings.embedder)
    embeddings, remove = job.folder("embeddings"), job.folder("remove")
    job.add_pass([job.documents(), Embed(settings.embedder, embeddings)])
    job.add_pass([ClusterEmbeddings(embeddings, remove, settings.embedding_threshold)], tasks=1)
    return [MinhashDedupFilter(remove)]
