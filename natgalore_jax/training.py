"""Ways of running a training step: by layer, by device, in place, in 8 bits, in host memory."""

from natgalore_jax._src.kernels.linear_codes import (
    LinearCodes as LinearCodes,
)
from natgalore_jax._src.low_bits.stochastic_round import (
    apply_updates_stochastic as apply_updates_stochastic,
    stochastic_round as stochastic_round,
)
from natgalore_jax._src.low_bits.weights import (
    QuantizedWeights as QuantizedWeights,
    dequantize_weights as dequantize_weights,
    quantize_weights as quantize_weights,
)
from natgalore_jax._src.memory.compiled_step import (
    StepMemory as StepMemory,
)
from natgalore_jax._src.per_layer.accumulate import (
    AccumulatedState as AccumulatedState,
)
from natgalore_jax._src.per_layer.per_layer import (
    PerLayer as PerLayer,
    PerLayerMetrics as PerLayerMetrics,
    PerLayerState as PerLayerState,
    per_layer as per_layer,
)
from natgalore_jax._src.training.data_parallel import (
    data_parallel_step as data_parallel_step,
)
from natgalore_jax._src.training.for_nnx import (
    for_nnx as for_nnx,
)
from natgalore_jax._src.training.in_place import (
    in_place as in_place,
)
from natgalore_jax._src.training.low_rank_steps import (
    LowRankSteps as LowRankSteps,
    low_rank_steps as low_rank_steps,
)
from natgalore_jax._src.training.offload import (
    offload_state as offload_state,
    to_device as to_device,
    to_host as to_host,
)
from natgalore_jax._src.training.state_shardings import (
    longer_side_shardings as longer_side_shardings,
    state_shardings as state_shardings,
    with_shardings as with_shardings,
)
