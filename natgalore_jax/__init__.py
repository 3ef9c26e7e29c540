"""Natural GaLore for JAX: low-rank, second-order, memory-efficient training with Optax."""

from importlib import metadata as _metadata

from natgalore_jax import contrib as contrib, training as training
from natgalore_jax._src.low_bits.adam import (
    scale_by_adam_8bit as scale_by_adam_8bit,
)
from natgalore_jax._src.low_bits.moments import (
    QuantizedState as QuantizedState,
    quantize_state as quantize_state,
)
from natgalore_jax._src.memory.report import (
    MemoryReport as MemoryReport,
    memory_report as memory_report,
)
from natgalore_jax._src.optimizers.galore import (
    galore_adamw as galore_adamw,
)
from natgalore_jax._src.optimizers.natural_galore import (
    lean_natural_galore_adamw as lean_natural_galore_adamw,
    natural_galore as natural_galore,
    natural_galore_adamw as natural_galore_adamw,
)
from natgalore_jax._src.optimizers.published import (
    paper_natural_galore_adamw as paper_natural_galore_adamw,
    published_galore_adamw as published_galore_adamw,
    published_natural_galore_adamw as published_natural_galore_adamw,
)
from natgalore_jax._src.optimizers.spectral import (
    clip_leading_singular_value as clip_leading_singular_value,
)
from natgalore_jax._src.params.axes import (
    MatrixAxes as MatrixAxes,
)
from natgalore_jax._src.params.static_args import (
    structural_args as structural_args,
)
from natgalore_jax._src.params.where import (
    hidden_matrices as hidden_matrices,
)
from natgalore_jax._src.states.entries import (
    FirstMoment as FirstMoment,
    SecondMoment as SecondMoment,
    register_state as register_state,
)
from natgalore_jax._src.subspace.chain import (
    chain as chain,
)
from natgalore_jax._src.subspace.compact_fisher import (
    CompactFisherState as CompactFisherState,
    compact_natural_gradient as compact_natural_gradient,
)
from natgalore_jax._src.subspace.project import (
    LowRankProjectState as LowRankProjectState,
    low_rank_project as low_rank_project,
)
from natgalore_jax._src.subspace.project_back import (
    ProjectBackState as ProjectBackState,
    project_back as project_back,
)
from natgalore_jax._src.subspace.woodbury import (
    WoodburyState as WoodburyState,
    woodbury_natural_gradient as woodbury_natural_gradient,
)

__version__ = _metadata.version("natgalore-jax")
