"""Text to batches: sources, splits, tokenizer, packing, and n-gram baselines."""

from examples.llama.data.config import DataConfig as DataConfig
from examples.llama.data.hub import is_hub as is_hub
from examples.llama.data.ngram import ngram_perplexity as ngram_perplexity
from examples.llama.data.packing import (
    document_rows as document_rows,
    eval_batches as eval_batches,
    eval_rows as eval_rows,
    make_train_iterator as make_train_iterator,
)
from examples.llama.data.splits import Splits as Splits, load_splits as load_splits
from examples.llama.data.streaming import make_streaming_iterator as make_streaming_iterator
