"""Settings of published fine-tuning runs, and that of `make finetune`.

The GaLore paper trains 30 epochs of 16 rows (CoLA 32) of at most 512 tokens, with the learning
rates below (table 6); its repository's command has no warm-up and no weight decay, and refreshes
every 500 steps. The Natural GaLore paper (section 3.2)
trains 3 epochs of 32 rows and takes the best of three learning rates on the validation split;
the one in the middle is here, the others are NATURAL_GALORE_RATES. Both project the matrices of the
layers at rank 4 or 8 and train everything else in full, embeddings included.
"""

from typing import NamedTuple

from examples.finetune.encoder.methods import MethodConfig

NATURAL_GALORE_RATES = (1e-5, 2e-5, 3e-5)
_RATES = {
    4: {"mrpc": 3e-5, "cola": 3e-5},  # 1e-5 for the others
    8: {"sst2": 2e-5, "mrpc": 2e-5, "qqp": 2e-5, "rte": 2e-5, "stsb": 3e-5},
}
_INTERVAL = 500


class Protocol(NamedTuple):
    """Settings of a preset; every option of the command line overrides a part of it."""

    methods: tuple[str, ...]
    model: str
    epochs: int
    batch_size: int
    max_length: int
    warmup: float
    method: MethodConfig


def _published(rank: int, rate: float) -> MethodConfig:
    return MethodConfig(
        learning_rate=rate,
        rank=rank,
        update_interval=_INTERVAL,
        scale=16 / rank,  # 4 and 2
        project_head=False,
        embeddings="full",
        moment_bits=None,
    )


def _galore(rank: int, task: str) -> Protocol:
    return Protocol(
        methods=("published-galore",),
        model="roberta-base",
        epochs=30,
        batch_size=32 if task == "cola" else 16,
        max_length=512,
        warmup=0.0,
        method=_published(rank, _RATES[rank].get(task, 1e-5)),
    )


def _natural_galore(rank: int, task: str) -> Protocol:
    return _galore(rank, task)._replace(
        methods=("published-natural-galore",),
        epochs=3,
        batch_size=32,
        method=_published(rank, NATURAL_GALORE_RATES[1]),
    )


def _default(_task: str) -> Protocol:
    return Protocol(
        methods=("adamw", "natural-galore"),
        model="minilm",
        epochs=2,
        batch_size=32,
        max_length=128,
        warmup=0.1,
        method=MethodConfig(),
    )


PROTOCOLS = {
    "default": _default,
    "galore-rank-4": lambda task: _galore(4, task),
    "galore-rank-8": lambda task: _galore(8, task),
    "natural-galore-rank-4": lambda task: _natural_galore(4, task),
    "natural-galore-rank-8": lambda task: _natural_galore(8, task),
}
