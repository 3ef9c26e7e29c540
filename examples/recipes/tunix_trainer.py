"""Tunix: full fine-tuning by its trainer, sharded, with its checkpoints and resume.

pip install google-tunix
JAX_NUM_CPU_DEVICES=4 NPROC=32 python examples/recipes/tunix_trainer.py
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tunix.models.llama3 import model as llama3  # pyrefly: ignore[missing-import]
from tunix.sft import peft_trainer  # pyrefly: ignore[missing-import]

import natgalore_jax as ng

CONFIG = llama3.ModelConfig(
    num_layers=2,
    vocab_size=64,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=4,
    rope_theta=10_000,
    norm_eps=1e-5,
)
Matrix = optax.contrib.MuonDimensionNumbers


def axes(params):
    """Attention kernels of Tunix have three axes: (embed, heads, head_dim), and back."""

    def of(path, x):
        name = jax.tree_util.keystr(path)
        if "o_proj" in name:
            return Matrix((0, 1), 2)
        return Matrix(0, (1, 2)) if x.ndim == 3 else Matrix() if x.ndim == 2 else None

    return jax.tree_util.tree_map_with_path(of, params)


@nnx.jit
def make_model():
    model = llama3.Llama3(CONFIG, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
    return model


def batches():
    rng = np.random.default_rng(0)
    while True:
        tokens = (rng.integers(CONFIG.vocab_size, size=(8, 1)) + np.arange(16)) % CONFIG.vocab_size
        yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))


def model_input(batch):
    rows, length = batch.input_tokens.shape
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), (rows, length)),
        "attention_mask": jnp.tril(jnp.ones((rows, length, length), bool)),
    }


def train(steps: int, directory: Path) -> peft_trainer.PeftTrainer:
    """Train up to this step, from the newest checkpoint in the directory on."""
    fsdp = 2 if jax.device_count() % 2 == 0 else 1
    mesh = jax.make_mesh(
        (fsdp, jax.device_count() // fsdp),
        ("fsdp", "tp"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    tx = ng.natural_galore_adamw(1e-2, rank=4, update_interval=3, axes=axes)
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=steps,
        max_steps=steps,
        checkpoint_root_directory=str(directory),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=steps),
    )
    with mesh:  # Tunix places inputs and state on this mesh.
        # for_nnx: nnx.Optimizer would copy the shardings of the weights onto the low-rank state.
        trainer = peft_trainer.PeftTrainer(make_model(), ng.training.for_nnx(tx), config)
        trainer.with_gen_model_input_fn(model_input).train(batches())
    return trainer


def main():
    with tempfile.TemporaryDirectory() as directory:
        trainers = [train(steps, Path(directory)) for steps in (4, 8)]  # the second one resumes
    losses = [
        loss for t in trainers for loss in t.metrics_logger.get_metric_history("", "loss", "train")
    ]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses, trainers[-1]


if __name__ == "__main__":
    main()
