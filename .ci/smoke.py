"""The installed package without the clone: the README's examples, some steps of training."""

import importlib.metadata
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng

installed = pathlib.Path(ng.__file__).parent
assert "site-packages" in installed.parts, f"not an installed package: {installed}"
assert (installed / "py.typed").exists(), "type checkers would ignore the annotations"
for name in ("flax", "orbax", "pytest", "examples", "tests"):
    assert importlib.util.find_spec(name) is None, f"{name} was installed with the library"

metadata = importlib.metadata.metadata("natgalore-jax")
assert metadata["Version"] == ng.__version__
readme = metadata.get_payload()
examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
assert len(examples) > 1, f"the README has {len(examples)} examples"

# The examples run one after the other, and each of their optimizers takes a step.
params = {"up": {"kernel": jnp.ones((160, 192))}, "bias": jnp.ones(192)}
grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
scope = {}
for example in examples:
    exec(example, scope)
    tx = scope.pop("tx")
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    moved = jax.tree.map(lambda u: bool(jnp.isfinite(u).all() and (u != 0).any()), updates)
    assert all(jax.tree.leaves(moved)), example
assert jnp.isfinite(scope["loss"])

target = jax.random.normal(jax.random.key(1), (16, 24))
loss = lambda p: jnp.mean((p["w"] - target) ** 2)  # noqa: E731
tx = ng.natural_galore_adamw(0.1, rank=4)
params = {"w": jnp.zeros((16, 24))}
state, first = tx.init(params), loss(params)
for _ in range(5):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
assert loss(params) < first
losses = f"loss {first:.3f} -> {loss(params):.3f}"
print(f"natgalore_jax {ng.__version__}: {len(examples)} examples of the README, {losses}")
