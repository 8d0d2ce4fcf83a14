"""A small classifier of sentences, trained on own examples: fastText's supervised model (Joulin et al. 2016, arXiv 1607.01759),
an average of embeddings of hashed words and pairs of words, and a line."""

import itertools
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .texts import ScriptTokenizer

SIZES = {"buckets": 2**17, "width": 16}
WEIGHTS, CONFIG = "model.safetensors", "config.json"
EPOCHS, BATCH, LEARNING_RATE = 10, 64, 0.02


class SentenceClassifier(nn.Module):
    """Probability that a sentence is good.

    Args:
        buckets: rows of the table that words and pairs are hashed into.
        width: of an embedding.
    """

    def __init__(self, buckets: int = SIZES["buckets"], width: int = SIZES["width"]) -> None:
        super().__init__()
        self.sizes = {"buckets": buckets, "width": width}
        self.embedding = nn.EmbeddingBag(buckets, width, mode="mean")
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.embedding.weight, std=1 / width)

    def forward(self, sentences: Sequence[str]) -> Tensor:
        """Logits (batch,)."""
        rows = [self._hash(sentence) for sentence in sentences]
        offsets = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0)
        return self.head(self.embedding(torch.tensor([i for row in rows for i in row]), offsets)).squeeze(-1)

    def _hash(self, sentence: str) -> list[int]:
        words = ScriptTokenizer().word_tokenize(sentence.lower()) or [""]
        grams = [*words, *(f"{first} {second}" for first, second in itertools.pairwise(words))]
        return [zlib.crc32(gram.encode()) % self.sizes["buckets"] for gram in grams]

    @torch.no_grad()
    def score(self, sentences: Sequence[str]) -> list[float]:
        return self(sentences).sigmoid().tolist() if sentences else []

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(self.sizes) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "SentenceClassifier":
        """Raises:
        ValueError: the folder holds no such model.
        """
        try:
            model = cls(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            model.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no quality model: {error}") from error
        return model


def train_classifier(examples: Iterable[tuple[str, bool]], seed: int = 0) -> SentenceClassifier:
    """Trains on (sentence, is good); good and bad count the same, however many there are of each.

    Raises:
        ValueError: there are no examples of one kind.
    """
    examples = list(examples)
    good = sum(label for _, label in examples)
    if good in (0, len(examples)):
        raise ValueError(f"quality needs examples of both kinds: {good} good and {len(examples) - good} bad sentences")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SentenceClassifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        loss_of = nn.BCEWithLogitsLoss(pos_weight=torch.tensor((len(examples) - good) / good))
        for _ in range(EPOCHS):
            order = torch.randperm(len(examples)).tolist()
            for start in range(0, len(order), BATCH):
                batch = [examples[index] for index in order[start : start + BATCH]]
                loss = loss_of(model([text for text, _ in batch]), torch.tensor([float(label) for _, label in batch]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model
