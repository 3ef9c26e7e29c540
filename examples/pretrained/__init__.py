"""Published weights: where they are, how they are read, and which parameter each tensor is."""

from examples.pretrained.locate import (
    METHOD_MODEL as METHOD_MODEL,
    locate_model as locate_model,
    model_of_method as model_of_method,
)
from examples.pretrained.names import (
    Filled as Filled,
    Stored as Stored,
    fill as fill,
    tensors_of as tensors_of,
)
from examples.pretrained.tensors import read_tensors as read_tensors, write_tensors as write_tensors
