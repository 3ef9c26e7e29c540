"""Encoders so small that everything about them takes a moment, as directories of files."""

import json
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from examples.finetune.encoder.model import Inputs

FIXTURE = Path(__file__).parents[1] / "fixtures" / "encoder_logits.npz"


def arrays(case: str) -> dict[str, np.ndarray]:
    """Arrays that `make_encoder_logits` wrote for "bert" or "roberta"."""
    with np.load(FIXTURE) as file:
        return {k.removeprefix(f"{case}/"): file[k] for k in file if k.startswith(f"{case}/")}


def inputs(case: str) -> Inputs:
    """The batch that the logits are of; its last row is padded."""
    found = arrays(case)
    tokens, types = (found[name].astype(np.int32) for name in ("tokens", "types"))
    return Inputs(tokens, types, found["mask"].astype(bool))


def weights(case: str) -> dict[str, np.ndarray]:
    found = arrays(case)
    return {k.removeprefix("weights/"): v for k, v in found.items() if k.startswith("weights/")}


def write_model(directory: Path, case: str = "bert", tensors=None, **changes) -> Path:
    """The directory of a model; `changes` are to its config.json."""
    directory.mkdir(exist_ok=True)
    config = json.loads(str(arrays(case)["config"])) | changes
    (directory / "config.json").write_text(json.dumps(config))
    tensors = weights(case) if tensors is None else tensors
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def tokenizer() -> Tokenizer:
    """Words w4 to w49; rows begin with token 2 and sentences end with token 3."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(4, 50))]
    found = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return found


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Sentences of 3 to 8 words out of three (label 0), or out of three others."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        words = [
            f"w{rng.randrange(3) + (4 if i % 2 == 0 else 40)}" for _ in range(rng.randint(3, 8))
        ]
        rows.append((" ".join(words), i % 2))
    return rows


def write_rows(directory: Path, counts=None, label=str) -> Path:
    """Files of the task "own"."""
    directory.mkdir(exist_ok=True)
    for seed, (name, count) in enumerate((counts or {"train": 70, "dev": 20}).items()):
        rows = [{"sentence1": text, "label": label(y)} for text, y in sentences(count, seed)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text)
    return directory
