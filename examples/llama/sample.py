"""Continue prompts with a trained model: `python -m examples.llama.sample --help`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import tyro
from tokenizers import Tokenizer

from examples.common import cli
from examples.common.accelerators import announce_devices
from examples.common.config import INT32, check_range
from examples.common.errors import ConfigError
from examples.common.reporter import READING, Activity, on_stderr
from examples.common.text import printable
from examples.llama.data.tokenizer import cannot_encode, end_of_text
from examples.llama.model.generate import Sampling, stream
from examples.llama.model.llama import Llama
from examples.llama.weights.files import load_with_tokenizer

WRITING = Activity("compiling the model", "at once")


@dataclass(frozen=True)
class SampleConfig:
    """Continue a text with a trained model, on the terminal, token by token."""

    model: Annotated[str, tyro.conf.Positional]
    """The directory of a run or of an export, a directory in the Hugging Face layout, a GGUF file,
    a name on the hub, or smollm2-135m-instruct."""
    prompt: str = ""
    """The text to continue, by default the beginning of a document; of a text that leaves no room
    for --tokens, the end. The name of a special token is this token."""
    samples: int = 1
    """Continuations, one after the other."""
    tokens: int = 100
    """The most tokens of each; a row ends at the model's max_length too."""
    temperature: float = 0.8
    """0 takes the likeliest token, 1 samples from the model's distribution."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float | None = 0.95
    """Sample among the likeliest tokens whose probabilities sum to p only."""
    seed: int = 0
    """Of the samples."""
    step: int | None = None
    """Of a run: the step of the checkpoint; the newest one by default."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights and products."""


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.exit_code(lambda: run(cli.parse(SampleConfig, "examples.llama.sample", argv)))


def run(config: SampleConfig) -> int:
    """Load the model and print its samples."""
    check_range(config, "[1, inf)", "samples", "tokens")
    check_range(config, f"[0, {INT32})", "seed")
    try:
        sampling = Sampling(config.temperature, config.top_k, config.top_p)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    announce_devices()
    waiting = on_stderr()
    with waiting.during(READING):
        loaded, tokenizer = load_with_tokenizer(config.model, config.dtype, config.step)
    for i in range(config.samples):
        if config.samples > 1:
            print(f"{'' if i == 0 else chr(10)}--- {i + 1} of {config.samples}")
        text = continued(
            loaded.model,
            tokenizer,
            config.prompt,
            config.tokens,
            sampling,
            jax.random.fold_in(jax.random.key(config.seed), i),
            loaded.end_ids,
        )
        print(next(text), end="", flush=True)  # The prompt.
        with waiting.during(WRITING):
            first = next(text, "")
        print(first, end="", flush=True)
        for part in text:
            print(part, end="", flush=True)
        print()
    return 0


def continued(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    sampling: Sampling,
    key: jax.Array,
    end_ids: tuple[int, ...] = (),
) -> Iterator[str]:
    """`prompt`, or as much of its end as leaves room, and its continuation, part by part.

    Raises:
      DataError: if the prompt has no tokens, and the tokenizer no token that ends a document, or it
        has characters without a token.
    """
    room = model.config.max_length
    tokenizer.encode_special_tokens = False  # Of a run and of its export alike.
    try:
        whole, shown = tokenizer.encode(prompt).ids, ""
    except Exception as error:  # A plain one of the bindings.
        raise cannot_encode(error) from error
    ids = whole[-max(1, room // 2, room - tokens) :]
    if ids:
        shown = tokenizer.decode(ids)
    else:  # A document begins after the end of another one.
        ids = list(end_ids[:1]) or [end_of_text(tokenizer, "an empty --prompt")]
    yield printable(prompt if len(ids) == len(whole) else shown)
    length = min(tokens, room - len(ids))
    before, written = (ids if shown else []), []
    for token in stream(model, ids, length, sampling=sampling, end_ids=end_ids, key=key):
        written.append(token)
        text = tokenizer.decode(before + written)
        # Of a character of several bytes, the first tokens decode to a replacement character.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield printable(text[len(shown) :])
            shown = text
    rest = tokenizer.decode(before + written)
    yield printable(rest[len(shown) :])


if __name__ == "__main__":
    sys.exit(main())
