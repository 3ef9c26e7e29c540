"""Sizes of a BERT or RoBERTa, and the `config.json` of the Hugging Face layout that has them."""

import dataclasses
from pathlib import Path
from typing import Any, Self

from examples.common.errors import WeightsError
from examples.pretrained.json_file import read_json

# Field to key, as both architectures have them.
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
}
# As transformers has them where the file does not say.
_DEFAULTS = {
    "norm_eps": ("layer_norm_eps", 1e-12),
    "activation": ("hidden_act", "gelu"),
    "hidden_dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    "init_std": ("initializer_range", 0.02),
}
_PAD_TOKENS = {"bert": 0, "roberta": 1}
ACTIVATIONS = ("gelu", "gelu_new", "relu")
_CLASSES = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder with a head on its first token.

    Raises:
      ValueError: if a size is not positive, sizes do not fit, or a name is not known.
    """

    architecture: str
    """bert or roberta: they number positions differently and have other heads."""
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    positions: int
    """Rows of the table of positions; RoBERTa leaves the first pad_token + 1 unused."""
    token_types: int
    outputs: int = 2
    """Numbers that the head gives: classes, or 1 for a regression."""
    pad_token: int = 0
    norm_eps: float = 1e-12
    activation: str = "gelu"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float = 0.1
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in (*_KEYS, "outputs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a number from 1 on, got {value!r}")
        for name in ("hidden_dropout", "attention_dropout", "head_dropout"):
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
        if self.architecture not in _CLASSES:
            raise ValueError(
                f"architecture must be one of {', '.join(_CLASSES)}; got {self.architecture!r}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}"
            )
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not a multiple of heads={self.heads}")

    @property
    def first_position(self) -> int:
        """Row of the table of positions that the first token has."""
        return self.pad_token + 1 if self.architecture == "roberta" else 0

    @property
    def max_length(self) -> int:
        """The most tokens in a row."""
        return self.positions - self.first_position

    def with_dropout(self, rate: float | None) -> Self:
        """With one rate everywhere, or as it is."""
        if rate is None:
            return self
        return dataclasses.replace(
            self, hidden_dropout=rate, attention_dropout=rate, head_dropout=rate
        )


def read_config(directory: Path, outputs: int) -> tuple[EncoderConfig, dict[str, Any]]:
    """The configuration of a model with so many outputs, and all of its `config.json`.

    Raises:
      WeightsError: if the file is missing or damaged, or the model is none of those known here.
    """
    path = directory / "config.json"
    raw = read_json(path)
    architecture = raw.get("model_type")
    if architecture not in _CLASSES:
        raise WeightsError(
            f"{path}: unknown architecture {architecture!r}: model_type must be one of "
            f"{', '.join(_CLASSES)}"
        )
    kind = raw.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise WeightsError(f"{path}: position_embedding_type must be 'absolute', got {kind!r}")
    missing = [key for key in _KEYS.values() if key not in raw]
    if missing:
        raise WeightsError(f"{path}: {', '.join(missing)} is missing")
    values = {field: raw[key] for field, key in _KEYS.items()}
    values |= {field: raw.get(key, default) for field, (key, default) in _DEFAULTS.items()}
    head_dropout = raw.get("classifier_dropout")
    pad_token = raw.get("pad_token_id")
    try:
        config = EncoderConfig(
            architecture=architecture,
            outputs=outputs,
            pad_token=_PAD_TOKENS[architecture] if pad_token is None else pad_token,
            head_dropout=values["hidden_dropout"] if head_dropout is None else head_dropout,
            **values,
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from error
    return config, raw


def classifier_config(
    config: EncoderConfig, raw: dict[str, Any], labels: tuple[str, ...]
) -> dict[str, Any]:
    """`config.json` of the fine-tuned model; without labels it is a regression."""
    names = labels or ("LABEL_0",)
    return {
        **raw,
        "architectures": [_CLASSES[config.architecture]],
        "dtype": "float32",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification" if labels else "regression",
    }
