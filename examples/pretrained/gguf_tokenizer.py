"""The tokenizer that a GGUF file describes in its metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from examples.common.errors import WeightsError

_CONTROL = 3  # tokenizer.ggml.token_type of tokens such as <|im_end|>
_SPLITTERS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
}


def gguf_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """A byte-level BPE with the tokens and merges of the file.

    Raises:
      WeightsError: for another kind of tokenizer, or a part that is missing.
    """
    kind, splitter = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or splitter not in _SPLITTERS:
        raise WeightsError(
            f"{path}: unknown tokenizer: tokenizer.ggml.model must be 'gpt2', got {kind!r}; "
            f"tokenizer.ggml.pre one of {', '.join(_SPLITTERS)}, got {splitter!r}"
        )
    try:
        tokens, types, merges = (
            metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges")
        )
    except KeyError as error:
        raise WeightsError(f"{path}: {error.args[0]} is missing") from error
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # The bindings raise nothing more specific.
        raise WeightsError(f"{path}: tokenizer.ggml.merges: {error}") from error
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*_SPLITTERS[splitter], bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == _CONTROL
        ]
    )
    return tokenizer
