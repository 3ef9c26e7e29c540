"""The best epoch, and its model."""

from pathlib import Path

from examples.common.metrics import Record, of_kind
from examples.common.train_state import Params
from examples.finetune.planner.prepare import Prepared
from examples.llama.model.llama import with_params
from examples.llama.weights.files import PretrainedLlama, open_weights, read_params, replace_llama
from examples.llama.weights.runs import METHOD_MODEL


def best_epoch(records: list[Record]) -> Record:
    """The validation with the highest success rate after an epoch; of equal ones that of the
    lowest loss, then the earliest."""
    epochs = [record for record in of_kind(records, "validation") if record["step"] > 0]
    return max(epochs, key=lambda record: (record["metrics"]["success"], -record["loss"]))


def save_best(params: Params, prepared: Prepared, run_dir: Path) -> None:
    """Writes plain weights in the Hugging Face layout, instead of those before."""
    chat = prepared.chat
    model = PretrainedLlama(
        with_params(prepared.model, params),
        prepared.model,
        chat.tokenizer,
        chat.template,
        chat.end_ids,
    )
    replace_llama(model, run_dir / METHOD_MODEL)


def read_best(prepared: Prepared, run_dir: Path) -> Params:
    """The weights that `save_best` wrote."""
    return read_params(open_weights(str(run_dir / METHOD_MODEL)), prepared.model)
