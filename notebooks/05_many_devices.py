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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/natgalore/natgalore_jax/blob/main/notebooks/05_many_devices.ipynb)
#
# # Many devices
#
# The same program on one device and on eight: sharded weights with a state that follows them, devices that sum
# low-rank gradients only, and a checkpoint that another mesh restores. The eight devices are simulated on the CPU, so that
# this shows what is where and that the numbers agree, and no speed. It takes about half a minute.

# %%
# Installs the library where it is missing, as on Colab; does nothing otherwise.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("natgalore_jax") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    library = "natgalore-jax[examples] @ git+https://github.com/natgalore/natgalore_jax"
    subprocess.check_call([*pip, library])

# %% [markdown]
# All of this must be in the environment before jax is imported. Simulated devices wait for one another in the threads of
# one pool, which `NPROC` makes large enough on a machine with few cores.

# %%
import os

SIZE = os.environ.get("NATGALORE_NOTEBOOK_SIZE", "default")  # "tiny", "default" or "large"
STEPS, WIDTH, RANK = {"tiny": (4, 32, 4), "default": (60, 256, 16), "large": (500, 2048, 64)}[SIZE]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["NPROC"] = "32"

# %%
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp

import natgalore_jax as ng

plt.rcParams.update(
    {"figure.dpi": 96, "font.size": 9, "axes.titlesize": 9, "axes.grid": True, "grid.alpha": 0.3}
)
plt.rcParams["axes.prop_cycle"] = plt.cycler(
    color=["black", "tab:red", "tab:blue", "tab:orange", "tab:green", "tab:purple"],
    linestyle=["-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1))],
)
print(len(jax.devices()), "devices")

# %% [markdown]
# ## The program
#
# A network of two matrices learns to imitate a random one. `make_step` is written without a word about devices.

# %%
BATCH = 64


def init(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (WIDTH, 2 * WIDTH)) / jnp.sqrt(WIDTH),
        "down": jax.random.normal(down, (2 * WIDTH, WIDTH)) / jnp.sqrt(2 * WIDTH),
    }


def outputs(params, x):
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def loss(params, batch):
    x, y = batch
    return jnp.mean((outputs(params, x) - y) ** 2)


def make_step(tx):
    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def train(step, params, state, batches):
    losses = []
    for batch in batches:
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    return params, state, np.array(losses)


teacher, start = jax.device_get((init(jax.random.key(0)), init(jax.random.key(1))))
# Inputs with a decaying spectrum, as activations of networks have.
decay = np.arange(1, WIDTH + 1) ** -0.5
inputs = np.random.default_rng(0).normal(size=(STEPS, BATCH, WIDTH)) * decay
inputs = inputs.astype(np.float32)
batches = [(x, np.asarray(outputs(teacher, x))) for x in inputs]
tx = ng.natural_galore_adamw(0.005, rank=RANK, update_interval=10, weight_decay=0.0)

# %% [markdown]
# On one device:

# %%
one_params, one_state, one_losses = train(make_step(tx), start, tx.init(start), batches)
print(f"loss {one_losses[0]:.4f} -> {one_losses[-1]:.4f}")

# %% [markdown]
# ## Weights and state on a mesh
#
# Two axes: rows of a batch are sharded over `data`, weights over both. Only the arguments say so. The axes are left to
# XLA (`AxisType.Auto`); on explicit ones, the default of `jax.make_mesh`, the library works too.

# %%
auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
shardings = {
    "up": jax.NamedSharding(mesh, jax.P("data", "model")),
    "down": jax.NamedSharding(mesh, jax.P("model", "data")),
}
rows = jax.NamedSharding(mesh, jax.P("data"))
params = jax.device_put(start, shardings)
jax.debug.visualize_array_sharding(params["up"])

# %% [markdown]
# `ng.training.state_shardings` says where the state belongs, from shapes alone. Moments follow the side that was not projected, the
# basis follows the other one, and a mesh axis that would be left idle is used as well.

# %%
state_shardings = ng.training.state_shardings(tx, params)
state = jax.jit(tx.init, out_shardings=state_shardings)(params)
P, mu = optax.tree.get(state, "basis")[0]["up"], optax.tree.get(state, "mu")["up"]
for name, array in {"weight": params["up"], "basis P": P, "first moment": mu}.items():
    shard = array.addressable_shards[0].data.shape
    print(f"{name:13}{array.shape!s:>12}  {array.sharding.spec!s:32} on each device {shard}")

# %%
print("first moment of down, m × r:")
jax.debug.visualize_array_sharding(optax.tree.get(state, "mu")["down"])

# %% [markdown]
# The bytes on each device, counted:


# %%
def bytes_on(device, tree):
    shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
    return sum(s.data.nbytes for s in shards if s.device == device)


whole = sum(x.nbytes for x in jax.tree.leaves(state))
adamw = ng.memory_report(tx, params).adamw_state_bytes
print(f"state, whole: {whole / 1e3:.1f} kB (AdamW: {adamw / 1e3:.1f} kB)")
print("on each device, kB:", [round(bytes_on(d, state) / 1e3, 1) for d in jax.devices()])

# %% [markdown]
# The same step, compiled for the mesh:

# %%
shared = jax.jit(make_step(tx), out_shardings=(shardings, state_shardings, None))
mesh_params, mesh_state, mesh_losses = train(
    shared, params, state, [jax.device_put(batch, rows) for batch in batches]
)
print(f"loss {mesh_losses[0]:.4f} -> {mesh_losses[-1]:.4f}")


def print_difference(losses, others):
    """In the first steps it is the rounding."""
    difference = np.maximum.accumulate(np.abs(losses - others) / others)
    parts = (f"{difference[i]:.1e} up to step {i + 1}" for i in (1, STEPS // 2, STEPS - 1))
    print("largest relative difference to one device:", ", ".join(parts))


print_difference(mesh_losses, one_losses)

# %% [markdown]
# Sums over devices are rounded in another order, and training amplifies the difference, the more so the higher the rate.
#
# ## Sums of low-rank gradients
#
# When weights are the same on all devices and each has rows of its own, the devices sum gradients at every step. They
# have the same bases, and projection is linear, so that
#
# $$P^\top \Bigl(\tfrac1D \sum_d G_d\Bigr) = \tfrac1D \sum_d P^\top G_d :$$
#
# $r \times n$ numbers are summed instead of $m \times n$. `ng.training.data_parallel_step` does that; a matrix that is due for a refresh is
# summed whole, once in `update_interval` steps. It needs an optimizer without a residual, which would need the whole
# gradient.

# %%
flat = jax.make_mesh((8,), ("data",), axis_types=auto[:1])
low_tx = ng.natural_galore_adamw(
    0.01, rank=RANK, update_interval=10, weight_decay=0.0, residual="none"
)
step = ng.training.data_parallel_step(loss, low_tx, flat)
everywhere = jax.NamedSharding(flat, jax.P())


def replicated():
    # Copies: the step donates what it is given.
    return jax.device_put(jax.tree.map(jnp.array, (start, low_tx.init(start))), everywhere)


parts = [jax.device_put(batch, jax.NamedSharding(flat, jax.P("data"))) for batch in batches]
_, _, low_losses = train(step, *replicated(), parts)
_, _, whole_losses = train(make_step(low_tx), start, low_tx.init(start), batches)
print_difference(low_losses, whole_losses)

# %% [markdown]
# What is summed in a step without a refresh, from the shapes:

# %%
low = jax.eval_shape(lambda p: optax.tree.get(low_tx.init(p), "mu"), start)
sent = {
    "whole gradients": sum(x.size for x in start.values()),
    "low-rank gradients": sum(x.size for x in low.values()),
}
for name, count in sent.items():
    print(f"{name:20}{4 * count / 1e3:9.1f} kB")

fig, (left, right) = plt.subplots(
    1, 2, figsize=(7.7, 3.6), width_ratios=(2, 1), layout="constrained"
)
left.plot(one_losses, label="one device")
left.plot(mesh_losses, label="8 devices, 4 × 2 mesh")
left.plot(whole_losses, label="one device, no residual")
left.plot(low_losses, label="8 devices, low-rank gradients")
left.set(xlabel="step", ylabel="loss", yscale="log")
left.legend()
right.bar(range(2), [4 * count / 1e3 for count in sent.values()])
right.set(ylabel="kB summed over devices a step")
right.grid(visible=False)
right.set_xticks(range(2), [name.replace(" ", "\n") for name in sent])
plt.show()

# %% [markdown]
# Eight devices follow one device with either optimizer. The optimizer without a residual learns more slowly on this problem:
# that is the price of the smaller sum. `python -m benchmarks.distributed.exchange` reads the bytes of all collectives from compiled
# programs of a LLaMA (docs/multi_host.md).
#
# ## A checkpoint, onto another mesh
#
# Orbax saves the arrays as they lie on the 4 × 2 mesh. They are restored onto a mesh of 2 × 4, whose shardings
# `ng.training.state_shardings` gives, and training goes on.

# %%
other = jax.make_mesh((2, 4), ("data", "model"), axis_types=auto)
new_shardings = {name: jax.NamedSharding(other, s.spec) for name, s in shardings.items()}
abstract = jax.eval_shape(lambda p: (p, tx.init(p)), start)
target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    (new_shardings, ng.training.state_shardings(tx, start, new_shardings)),
)
with tempfile.TemporaryDirectory() as directory, ocp.CheckpointManager(directory) as manager:
    manager.save(STEPS, args=ocp.args.StandardSave((mesh_params, mesh_state)))
    manager.wait_until_finished()
    new_params, new_state = manager.restore(STEPS, args=ocp.args.StandardRestore(target))
same = jax.tree.map(np.array_equal, (new_params, new_state), (mesh_params, mesh_state))
print("every bit is restored:", all(jax.tree.leaves(same)))
jax.debug.visualize_array_sharding(new_params["up"])

# %%
other_rows = jax.NamedSharding(other, jax.P("data"))
_, _, there = train(make_step(tx), new_params, new_state, [jax.device_put(batches[0], other_rows)])
_, _, here = train(make_step(tx), mesh_params, mesh_state, [jax.device_put(batches[0], rows)])
print(f"the next loss: {there[0]:.6f}, on the old mesh {here[0]:.6f}")

# %% [markdown]
# ## What to try next
#
# Set the mesh to 2 × 4 or 8 × 1 and the `RANK`; on real devices, leave out the lines that set `os.environ`.
#
# `examples/llama` does all of this for several processes and hosts, and survives kills and damaged checkpoints:
# docs/multi_host.md.
