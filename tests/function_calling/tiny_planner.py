"""A tiny random LLaMA that can be talked to, and records in TinyAgent's format."""

import itertools
import json
from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.finetune.planner.data import load_tinyagent
from examples.finetune.planner.plans.parse import write_plan
from examples.finetune.planner.prompts import write_prompt
from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import Llama
from examples.llama.weights.files import PretrainedLlama, save_llama
from examples.pretrained.chat import ChatTemplate

END = "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + '\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
_TOOLS = {
    "get_phone_number": "Ann",
    "get_email_address": "Bob",
    "open_and_get_file_path": "tax.pdf",
    "summarize_pdf": "$1",
    "maps_open_location": "Oslo",
    "open_note": "shopping",
}


def write_records(path: Path) -> Path:
    """20 records, each with a combination of tools of its own: 16 of them are trained on."""
    combinations = list(itertools.combinations(_TOOLS, 2)) + [(tool,) for tool in list(_TOOLS)[:5]]
    records = {}
    for i, tools in enumerate(combinations):
        steps = [{"tool_name": tool, "tool_args": [_TOOLS[tool]]} for tool in tools]
        if tools[0] == "summarize_pdf":  # It cannot take its own result.
            steps[0]["tool_args"] = ["tax.pdf"]
        question = " and ".join(tool.replace("_", " ") for tool in tools)
        records[f"r{i}"] = {
            "input": f"Please {question}, {'quickly ' * (i % 4)}now.",
            "output": [
                {"type": "plan", "parsed_output": [*steps, {"tool_name": "join", "tool_args": []}]}
            ],
        }
    path.write_text(json.dumps(records))
    return path


def tokenizer(records: Path) -> Tokenizer:
    """Trained on what it will encode, so that rows are short."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|begin|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        write_prompt(r.query, r.tools, details=False) + write_plan(r.plan)
        for r in load_tinyagent(records)
    ]
    found.train_from_iterator(texts, trainer)
    return found


def write_model(directory: Path, records: Path, template: str | None = TEMPLATE) -> Path:
    """The model in the Hugging Face layout."""
    words = tokenizer(records)
    config = ModelConfig(
        vocab_size=words.get_vocab_size(),
        hidden=16,
        intermediate=24,
        layers=2,
        heads=2,
        kv_heads=1,
        max_length=600,
        tied_embeddings=True,
    )
    tokens = {"bos_token": "<|begin|>", "eos_token": END}
    chat = None if template is None else ChatTemplate(template, tokens)
    model = Llama(config, rngs=nnx.Rngs(0))
    # Large enough that layers can choose a token.
    model.embed.embedding[...] *= 20
    save_llama(PretrainedLlama(model, config, words, chat, (1,)), directory)
    return directory


def options(directory: Path) -> dict:
    """Of a short run; the files are written into the directory."""
    records = write_records(directory / "records.json")
    return {
        "dataset": "tinyagent",
        "data": records,
        "model": str(write_model(directory / "model", records)),
        "epochs": 2,
        "batch_size": 2,
        "accumulate": 2,
        "max_length": 500,
        "buckets": 1,
        "eval_batch_size": 2,
        "new_tokens": 6,
    }


def command_line(directory: Path) -> list[str]:
    """The same for the program."""
    given = {**options(directory), "rank": 2, "interval": 2, "examples": 0, "negatives": 1}
    words = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items())
    return [word for pair in words for word in pair]
