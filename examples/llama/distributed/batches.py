"""The batches that a run trains on, and where it is in them."""

from typing import Any

import jax

from examples.common.errors import ConfigError
from examples.llama.data import (
    Splits,
    is_hub,
    make_streaming_iterator,
    make_train_iterator,
)
from examples.llama.distributed.devices import Devices
from examples.llama.run_config import RunConfig


def documents_end(config: RunConfig, splits: Splits) -> int | None:
    """The token that ends rows that are documents, None for packed rows."""
    return splits.end_of_text if config.data.rows == "documents" else None


class TrainBatches:
    """Batches without end: each process reads its share of them."""

    def __init__(self, config: RunConfig, splits: Splits, devices: Devices):
        self._devices = devices
        self._streamed = is_hub(config.data)
        rows = {"batch_size": config.batch_size, "seq_len": config.seq_len}
        rows |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
        self._rows = (
            make_streaming_iterator(config.data, splits, seed=config.seed, **rows)
            if self._streamed
            else make_train_iterator(
                splits.train, seed=config.seed, documents_end=documents_end(config, splits), **rows
            )
        )

    def next(self) -> Any:
        """The rows of the next batch, (B, T + 1), shared among the devices."""
        return self._devices.share(next(self._rows)["tokens"])

    def positions(self) -> list[Any]:
        """Where the processes are: one position for all, or with streamed data one for each."""
        position = self._rows.get_state()
        return self._devices.gather(position) if self._streamed else [position]

    def go_to(self, positions: list[Any]) -> None:
        """Goes on where `positions` were taken.

        Raises:
          ConfigError: if streamed data were shared among another number of processes.
        """
        if self._streamed and len(positions) != jax.process_count():
            raise ConfigError(
                f"{len(positions)} process(es) shared the streamed data: resume with as many, got "
                f"{jax.process_count()}"
            )
        self._rows.set_state(positions[jax.process_index() if self._streamed else 0])
