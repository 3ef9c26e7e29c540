"""MaxText: pre-training by its trainer, sharded, with its checkpoints and resume.

pip install maxtext   # Python 3.12; its extra "tpu" or "cuda12" has what it imports
JAX_NUM_CPU_DEVICES=4 NPROC=32 python examples/recipes/maxtext_trainer.py
"""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")  # before MaxText starts: without Google Cloud

import jax
import maxtext  # pyrefly: ignore[missing-import]
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.optimizers import optimizers  # pyrefly: ignore[missing-import]
from maxtext.trainers.pre_train import train  # pyrefly: ignore[missing-import]
from maxtext.utils.muon_utils import (  # pyrefly: ignore[missing-import]
    get_muon_weight_dimension_numbers,
)
from maxtext.utils.sharding import nnx_construct_named_sharding  # pyrefly: ignore[missing-import]

import natgalore_jax as ng


def get_optimizer(config, schedule, model=None, mesh=None):
    """Instead of the function of this name in MaxText."""
    tx = ng.natural_galore_adamw(
        schedule,
        rank=4,
        update_interval=3,
        weight_decay=config.adam_weight_decay,
        # Scanned layers are the second axis in MaxText; its own rules for Muon say so.
        axes=get_muon_weight_dimension_numbers(model, config),
    )
    with logical_axis_rules(config.logical_axis_rules):
        params_at = nnx_construct_named_sharding(nnx.state(model, nnx.Param), mesh)
    # for_nnx: nnx.Optimizer would copy the shardings of the weights onto the low-rank state.
    return ng.training.for_nnx(tx, nnx.as_pure(params_at))


SETTINGS = {
    "run_name": "tiny",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "enable_goodput_recording": False,
    "async_checkpointing": False,
    "checkpoint_period": 4,
    "learning_rate": 1e-2,
    "warmup_steps_fraction": 0.0,
    "learning_rate_schedule_steps": 8,
    "per_device_batch_size": 1,
    "max_target_length": 16,
    "vocab_size": 64,
    "base_emb_dim": 32,
    "base_mlp_dim": 64,
    "base_num_decoder_layers": 2,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "head_dim": 8,
    "dtype": "float32",
    "attention": "dot_product",
    "sharding_tolerance": 1.0,  # tiny arrays stay whole
}


def run(steps: int, directory: Path):
    """The losses and the state of training to this step, from the newest checkpoint on."""
    tensor = 2 if jax.device_count() % 2 == 0 else 1
    metrics = directory / f"{steps}.jsonl"
    settings = SETTINGS | {
        "steps": steps,
        "base_output_directory": directory,
        "metrics_file": metrics,
        "ici_fsdp_parallelism": jax.device_count() // tensor,
        "ici_tensor_parallelism": tensor,
    }
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    config, recorder = train.initialize(
        ["", str(base), *(f"{name}={value}" for name, value in settings.items())]
    )
    state = train.train_loop(config, recorder)
    lines = map(json.loads, metrics.read_text().splitlines())
    return [line["learning/loss"] for line in lines], state


def main():
    optimizers.get_optimizer = get_optimizer
    losses = []
    with tempfile.TemporaryDirectory() as directory:
        for steps in (4, 8):  # the second call resumes
            more, state = run(steps, Path(directory))
            losses += more
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses, state


if __name__ == "__main__":
    main()
