"""Towers that return several vectors an item: regions and patches of an image, words of a caption."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from esl_fast.model.sequences import Sequences, SpecialTokens
from esl_fast.model.towers import KnownTokens

BERT_CONTEXT = 77


class ProjectedRegions(nn.Module):
    """Image tower for precomputed regions ``(N, R, F)``: a linear map plus a two-layer MLP with batch norm."""

    def __init__(self, feature_dim: int, embed_dim: int) -> None:
        super().__init__()
        hidden = max(1, embed_dim // 2)
        self.linear = nn.Linear(feature_dim, embed_dim)
        self.inner, self.norm, self.outer = (
            nn.Linear(feature_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, embed_dim),
        )
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, regions: Tensor, lengths: Tensor | None = None) -> Sequences:
        if lengths is None:
            return Sequences(self._project(regions.flatten(0, 1)).view(*regions.shape[:2], -1))
        # Only real regions go through: padding must not enter the statistics of the batch.
        real = torch.arange(regions.shape[1], device=regions.device) < lengths[:, None]
        projected = self._project(regions[real])
        vectors = projected.new_zeros(*regions.shape[:2], projected.shape[-1])
        return Sequences(vectors.masked_scatter(real.unsqueeze(-1), projected), lengths)

    def _project(self, rows: Tensor) -> Tensor:
        if self.norm.training and len(rows) == 1:
            raise ValueError("batch norm takes two regions or more in training: use larger or fewer batches")
        return self.linear(rows) + self.outer(torch.relu(self.norm(self.inner(rows))))


class PatchTokens(nn.Module):
    """An open_clip vision tower's patches, each projected as the pooled embedding would be."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        if not isinstance(tower, VisionTransformer | ModifiedResNet):
            raise ValueError(f"patch tokens need open_clip's own ViT or ResNet, not a {type(tower).__name__}")
        if isinstance(tower, VisionTransformer):
            tower.output_tokens = True
        self.tower = tower

    def forward(self, images: Tensor, lengths: Tensor | None = None) -> Sequences:
        tower = self.tower
        if isinstance(tower, VisionTransformer):
            _, tokens = tower(images)
            return Sequences(tokens if tower.proj is None else tokens @ tower.proj)
        maps = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(images)))))
        # What the attention pool would make of one position that attends to itself alone.
        return Sequences(tower.attnpool.c_proj(tower.attnpool.v_proj(maps.flatten(2).mT)))


class TextTokens(nn.Module):
    """An open_clip text transformer's tokens, start and end of text included, each projected."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        if not isinstance(tower, TextTransformer) or tower.cls_emb is not None or tower.attn_mask is None:
            raise ValueError("word tokens need open_clip's own causal text transformer")
        if tower.pool_type not in ("argmax", "eos"):
            raise ValueError(f"word tokens end where the text does, which pool_type {tower.pool_type!r} does not say")
        self.tower = tower

    def extent(self, tokens: Tensor) -> Tensor:
        """``(M,)``, how far each row of tokens reaches, the end of text included."""
        if self.tower.pool_type == "eos":
            tokens = (tokens == self.tower.eos_id).int()
        return tokens.argmax(-1) + 1

    def forward(self, tokens: Tensor) -> Sequences:
        tower, count = self.tower, tokens.shape[1]
        x = tower.token_embedding(tokens)
        x = x + tower.positional_embedding[:count].to(x.dtype)
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:count, :count]))
        projection = tower.text_projection
        if projection is not None:
            x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
        return Sequences(x, self.extent(tokens))


class WordEmbeddings(KnownTokens):
    """Text tower for small data: one embedding a token, order ignored; tokens that training never saw share entry 1.

    A caption without tokens is one unknown token.
    """

    def __init__(self, size: int, embed_dim: int) -> None:
        super().__init__(nn.Embedding(size, embed_dim, padding_idx=0))

    @staticmethod
    def extent(tokens: Tensor) -> Tensor:
        """``(M,)``, how far each row of tokens reaches: CLIP's end of text is its highest id."""
        return tokens.argmax(-1) + 1

    def forward(self, tokens: Tensor) -> Sequences:
        # Start and end of text are no words.
        lengths = (self.extent(tokens) - 2).clamp(min=1)
        entries = self.entry_of[tokens[:, 1:-1] if tokens.shape[1] > 2 else tokens[:, 1:]]
        entries = torch.where(entries == 0, 1, entries)
        padding = torch.arange(entries.shape[1], device=tokens.device) >= lengths[:, None]
        return Sequences(self.embedding(entries.masked_fill(padding, 0)), lengths)


class BertTokens(nn.Module):
    """BERT and a linear map of its last layer, one vector a word piece, [CLS] and [SEP] included."""

    def __init__(self, config: dict[str, Any], embed_dim: int, weights: str | None = None) -> None:
        super().__init__()
        bert = transformers().BertModel
        try:
            if weights is None:
                self.bert = bert(transformers().BertConfig(**config), add_pooling_layer=False)
            else:
                self.bert = bert.from_pretrained(weights, add_pooling_layer=False)
        except Exception as error:  # of a dozen types, for sizes that do not fit and for half a file
            told = " ".join(str(error).split())
            raise ValueError(f"no BERT can be made of {weights or config}: {type(error).__name__}: {told}") from error
        self.linear = nn.Linear(self.bert.config.hidden_size, embed_dim)

    @staticmethod
    def extent(tokens: Tensor) -> Tensor:
        """``(M,)``, how far each row of tokens reaches."""
        return (tokens != 0).sum(-1)  # 0 is [PAD]

    def forward(self, tokens: Tensor) -> Sequences:
        hidden = self.bert(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
        return Sequences(self.linear(hidden), self.extent(tokens))


def transformers() -> Any:
    """The package, or an ImportError that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a BERT text tower needs transformers: pip install 'esl_fast[bert]'") from error
    return transformers


def read_bert_folder(folder: str) -> tuple[dict[str, Any], bool]:
    """Configuration and vocabulary of a local BERT folder, and whether it holds weights.

    Raises FileNotFoundError or ValueError saying what is missing.
    """
    path = Path(folder)
    for name in ("config.json", "vocab.txt"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is no folder of a BERT model: it has no {name}")
    try:
        config = json.loads((path / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__}, not an object")
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is no BERT's configuration: {error}") from error
    if config.get("model_type", "bert") != "bert":
        raise ValueError(f"{path / 'config.json'}: model_type is {config['model_type']!r}; expected 'bert'")
    sizes = {key: config[key] for key in BERT_SIZES if key in config}
    try:
        vocabulary = [word for word in (path / "vocab.txt").read_text(encoding="utf-8").split("\n") if word]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path / 'vocab.txt'} is not UTF-8 text: {error}") from error
    if vocabulary[:1] != ["[PAD]"] or not {"[UNK]", "[CLS]", "[SEP]"} <= set(vocabulary):
        raise ValueError(f"{path / 'vocab.txt'} is no BERT's: expected [PAD] first, and [UNK], [CLS] and [SEP]")
    if len(vocabulary) > sizes.get("vocab_size", len(vocabulary)):
        raise ValueError(f"{path / 'vocab.txt'} has {len(vocabulary)} entries, vocab_size is {sizes['vocab_size']}")
    has_weights = any((path / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
    return {"config": sizes, "vocabulary": vocabulary}, has_weights


def give_vocabulary(bert: dict[str, Any], folder: str) -> None:
    """Add the vocabulary in a folder to a BERT without one. Raises ValueError if it is not this BERT's."""
    given, known = read_bert_folder(folder)[0]["vocabulary"], bert["config"].get("vocab_size")
    if bert.get("vocabulary") not in (None, given) or (known is not None and len(given) > known):
        raise ValueError(f"bert is {folder}, whose vocabulary of {len(given)} is not that of the checkpoint")
    bert["vocabulary"] = given


# What a BERT is built from again; everything else is the library's default.
BERT_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps", "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)  # fmt: skip


def _pretrained_tokenizer(bert: dict[str, Any]) -> Any:
    """Hugging Face's tokenizer of a configuration.

    An official checkpoint holds no vocabulary; bert-base-uncased's, with which all of them were trained, is asked for
    by name.
    """
    library = transformers().AutoTokenizer
    if bert.get("vocabulary") is None:
        try:
            return library.from_pretrained("bert-base-uncased")
        except OSError as error:
            raise OSError(
                "an official checkpoint has no vocabulary, and that of bert-base-uncased cannot be had from the "
                "Hugging Face hub: name a folder that holds it with --bert"
            ) from error
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(bert["vocabulary"]), encoding="utf-8")
        (Path(folder) / "config.json").write_text('{"model_type": "bert"}')
        return library.from_pretrained(folder, do_lower_case=True)


def bert_tokenizer(bert: dict[str, Any]) -> Callable[[list[str]], Tensor]:
    """Lower-case word pieces ``(M, T)`` of captions."""
    tokenizer = _pretrained_tokenizer(bert)
    context = min(BERT_CONTEXT, bert["config"].get("max_position_embeddings", BERT_CONTEXT))

    def tokenize(captions: list[str]) -> Tensor:
        pieces = tokenizer(captions, padding="max_length", truncation=True, max_length=context, return_tensors="pt")
        return pieces["input_ids"]

    return tokenize


def bert_special_tokens(bert: dict[str, Any]) -> SpecialTokens:
    """[CLS], [SEP] and [MASK]; bert-base-uncased's where the configuration holds no vocabulary."""
    if bert.get("vocabulary") is None:
        return SpecialTokens(101, 102, 103)
    missing = {"[CLS]", "[SEP]", "[MASK]"} - set(bert["vocabulary"])
    if missing:
        raise ValueError(f"BERT's vocabulary lacks {', '.join(sorted(missing))}")
    return SpecialTokens(*(bert["vocabulary"].index(token) for token in ("[CLS]", "[SEP]", "[MASK]")))


def bert_word_starts(bert: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Which of consecutive token ids begin a word: those whose piece does not go on from the one before."""
    names = bert.get("vocabulary")
    if names is None:
        tokenizer = _pretrained_tokenizer(bert)
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return np.array([not name.startswith("##") for name in names]).take
