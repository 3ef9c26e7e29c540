"""Methods of other publications with as much memory or less."""

from natgalore_jax._src.contrib.alice import (
    ScaleByAliceState as ScaleByAliceState,
    alice_adamw as alice_adamw,
    scale_by_alice as scale_by_alice,
)
from natgalore_jax._src.contrib.apollo import (
    ScaleByApolloState as ScaleByApolloState,
    apollo_adamw as apollo_adamw,
    apollo_mini_adamw as apollo_mini_adamw,
    scale_by_apollo as scale_by_apollo,
)
from natgalore_jax._src.contrib.ldadam import (
    ScaleByLDAdamState as ScaleByLDAdamState,
    ldadamw as ldadamw,
    scale_by_ldadam as scale_by_ldadam,
)
from natgalore_jax._src.contrib.racs import (
    ScaleByRacsState as ScaleByRacsState,
    racs_adamw as racs_adamw,
    scale_by_racs as scale_by_racs,
)
from natgalore_jax._src.contrib.scale import (
    ScaleByColumnNormsState as ScaleByColumnNormsState,
    scale_by_column_norms as scale_by_column_norms,
    scale_sgd as scale_sgd,
)
