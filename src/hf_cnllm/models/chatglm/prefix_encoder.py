"""P-tuning v2 as the ChatGLM line has it: learned keys and values in front of every layer's (arXiv 2110.07602).

The prefix is not rotated, every token attends to it, and it does not count in the positions. It lives in the ordinary
key/value cache like any other past; a forward pass without a cache hands it to the layers.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

PREFIX_KEY = "prefix_encoder."
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class PrefixEncoder(nn.Module):
    """Learned keys and values of `config.pre_seq_len` positions for all layers.

    Args:
        projection_size: width of the embedding that the MLP starts from (`prefix_projection` only).
    """

    def __init__(self, config: PreTrainedConfig, projection_size: int):
        super().__init__()
        self.num_layers = config.num_layers
        self.num_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.dropout = nn.Dropout(config.prefix_dropout)
        all_layers = self.num_layers * 2 * self.num_heads * self.head_dim
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.pre_seq_len, projection_size)
            self.trans: nn.Module = nn.Sequential(
                nn.Linear(projection_size, config.hidden_size),
                nn.Tanh(),
                nn.Linear(config.hidden_size, all_layers),
            )
        else:
            self.embedding = nn.Embedding(config.pre_seq_len, all_layers)
            self.trans = nn.Identity()

    def initialized_as_in_torch(self) -> list[nn.Module]:
        """The parts that start from torch's own initialization, as in the originals; the model's is much smaller."""
        return [self.embedding, *(part for part in self.trans.children() if isinstance(part, nn.Linear))]

    def forward(self, batch_size: int, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of each layer, (2, batch_size, heads, pre_seq_len, head_dim) in `dtype`."""
        # By calls of the modules, for which weights come that were offloaded.
        device = None if self.embedding.weight.is_meta else self.embedding.weight.device
        states = self.trans(self.embedding(torch.arange(self.embedding.num_embeddings, device=device)))
        states = self.dropout(states.to(dtype).expand(batch_size, *states.shape))
        states = states.view(batch_size, -1, self.num_layers, 2, self.num_heads, self.head_dim)
        return list(states.permute(2, 3, 0, 4, 1, 5))

    def put_in_front(
        self, cache: Cache | None, inputs_embeds: Tensor, num_layers: int
    ) -> tuple[list[Tensor] | None, Cache]:
        """Puts the prefix of the first `num_layers` into a static cache if that is empty; else the layers get it, and write it
        together with the first tokens: of what is written first some caches (fp8) take the scale of all keys.

        Returns:
            What the layers are to put in front of their keys and values (None if the cache holds it), and the past
            that masks and positions are to be made for, which has the prefix in front either way.
        """
        if cache is not None and not is_empty(cache):
            return None, cache
        prefix = self(len(inputs_embeds), inputs_embeds.dtype)[:num_layers]
        if cache is not None and cache.is_compileable:
            return None, write_prefix(cache, prefix)
        return prefix, write_prefix(DynamicCache(), prefix[:1])


def is_empty(cache: Cache) -> bool:
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return False  # a static cache that counts on the device has been through its prefill, which is not compiled
    return int(length) == 0


def write_prefix(cache: Cache, prefix: list[Tensor]) -> Cache:
    for layer_idx, (keys, values) in enumerate(prefix):
        cache.update(keys, values, layer_idx)
    return cache


def load_prefix_encoder(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Loads what the original P-tuning scripts save: the weights of the prefix encoder alone.

    Args:
        model: loaded from the base checkpoint with the run's `pre_seq_len` and `prefix_projection`, e.g.
            `AutoModel.from_pretrained("THUDM/chatglm2-6b", pre_seq_len=128)`.
        checkpoint: a weight file (`.safetensors`, `.bin`, `.pt`), or a folder with `model.safetensors` or
            `pytorch_model.bin`. Other weights in it are left alone.

    Raises:
        FileNotFoundError: no weight file there.
        ValueError: the model has no prefix encoder, the file holds none, or its sizes are others.
    """
    encoders = [module for module in model.modules() if isinstance(module, PrefixEncoder)]
    if not encoders:
        raise ValueError("this model has no prefix encoder: load it with `pre_seq_len` set to what it was tuned with")
    stored = _read(Path(checkpoint)).items()
    weights = {name.rpartition(PREFIX_KEY)[2]: tensor for name, tensor in stored if PREFIX_KEY in name}
    expected = {name: tuple(tensor.shape) for name, tensor in encoders[0].state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        raise ValueError(
            f"{checkpoint} does not fit this model's prefix encoder: it holds {found or 'no prefix encoder'}, the model "
            f"has {expected}. `pre_seq_len` and `prefix_projection` must be those of the tuning run."
        )
    encoders[0].load_state_dict(weights)


def _read(checkpoint: Path) -> dict[str, Tensor]:
    candidates = [checkpoint / name for name in WEIGHT_FILES] if checkpoint.is_dir() else [checkpoint]
    for file in candidates:
        if file.is_file():
            if file.suffix == ".safetensors":
                return load_file(file)
            return torch.load(file, map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"no prefix encoder weights at {checkpoint}; looked for {', '.join(map(str, candidates))}")
