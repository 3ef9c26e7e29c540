"""Function-calling data sets in one form, and which of their records are held out."""

from examples.finetune.planner.data.bfcl import load_bfcl as load_bfcl
from examples.finetune.planner.data.nestful import load_nestful as load_nestful
from examples.finetune.planner.data.splits import (
    Splits as Splits,
    apply_splits as apply_splits,
    split_by_tools as split_by_tools,
)
from examples.finetune.planner.data.tinyagent import load_tinyagent as load_tinyagent
