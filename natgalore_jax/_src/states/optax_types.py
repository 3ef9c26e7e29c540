"""Meaning of the fields of Optax's states; other fields are kept at a refresh."""

import numpy as np
import optax
from optax import contrib, transforms
from optax._src import transform  # three types of states that Optax does not export

from natgalore_jax._src.states.entries import (
    FirstMoment,
    Role,
    SecondMoment,
    StateType,
    register_state,
    register_type,
)

_FIRST, _SECOND = FirstMoment(), SecondMoment()
# Accumulated gradients, and previous gradients that are compared with the next gradient.
_GRADIENT = FirstMoment(resets=False)


def _all_but(position: int):
    """Axes of Adafactor's factors, which lack one of the two largest axes (ties as in NumPy)."""

    def axes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(shape) < 2:
            return [tuple(range(len(shape)))]
        missing = np.argsort(shape)[position]
        return [tuple(a for a in range(len(shape)) if a != missing)]

    return axes


_CENTRED: dict[str, Role] = {"mu": _FIRST, "nu": SecondMoment(mean="mu")}

_MOMENTS: dict[type, dict[str, Role]] = {
    # adam, adamw, nadam, radam, yogi, lamb, adopt; adamax, whose ν bounds sizes and may be averaged
    # as a second moment.
    optax.ScaleByAdamState: {"mu": _FIRST, "nu": _SECOND},
    optax.ScaleByAmsgradState: {"mu": _FIRST, "nu": _SECOND, "nu_max": _SECOND},
    # ν is the second moment of g − μ. contrib.acprop divides by ν of the previous step.
    optax.ScaleByBeliefState: {"mu": _FIRST, "nu": SecondMoment(resets=False)},
    # v averages differences of gradients, g is the last gradient.
    optax.ScaleByAdanState: {"m": _FIRST, "v": _FIRST, "n": _SECOND, "g": _GRADIENT},
    optax.ScaleByAdaDeltaState: {"e_g": _SECOND, "e_x": _SECOND},
    optax.ScaleByRssState: {"sum_of_squares": _SECOND},
    optax.ScaleByRmsState: {"nu": _SECOND},
    transform.ScaleByRmsWithCountState: {"nu": _SECOND},
    optax.ScaleByRStdDevState: _CENTRED,
    transform.ScaleByRStdDevWithCountState: _CENTRED,
    optax.ScaleByLionState: {"mu": _FIRST},
    optax.ScaleByNovogradState: {"mu": _FIRST},  # ν is the norm of the whole gradient
    optax.ScaleByRpropState: {"prev_updates": _GRADIENT},
    # μ are bounds on the squares along each axis, ν is a momentum.
    optax.ScaleBySM3State: {
        "mu": SecondMoment(axes=lambda shape: [(a,) for a in range(len(shape))]),
        "nu": _FIRST,
    },
    optax.FactoredState: {
        "v_row": SecondMoment(axes=_all_but(-1)),
        "v_col": SecondMoment(axes=_all_but(-2)),
        "v": _SECOND,
    },
    optax.TraceState: {"trace": _FIRST},
    optax.EmaState: {"ema": _FIRST},
    transform.ScaleByOptimisticGradientState: {"previous_gradient": _GRADIENT},
    optax.MultiStepsState: {"acc_grads": _GRADIENT},
    optax.ApplyEvery: {"grad_acc": _GRADIENT},
    contrib.ScaleByAdemamixState: {"m1": _FIRST, "m2": _FIRST, "nu": _SECOND},
    contrib.ScaleBySimplifiedAdEMAMixState: {"m": _FIRST, "n": _SECOND},
    contrib.MuonState: {"mu": _FIRST},
    contrib.SophiaState: {"mu": _FIRST},  # ν is the diagonal of the Hessian, of either sign
    contrib.MomoState: {"exp_avg": _FIRST},
    contrib.MomoAdamState: {"exp_avg": _FIRST, "exp_avg_sq": _SECOND},
    # grad_sum determines a step size that never falls: a reset would be inconsistent with it.
    contrib.ProdigyState: {"exp_avg": _FIRST, "exp_avg_sq": _SECOND, "grad_sum": _GRADIENT},
    contrib.DAdaptAdamWState: {
        "exp_avg": _FIRST,
        "exp_avg_sq": SecondMoment(resets=False),
        "grad_sum": _GRADIENT,
    },
}

for _state_type, _roles in _MOMENTS.items():
    register_state(_state_type, **_roles)

# Measurements, whose averages are registered types without being trees of parameters.
register_type(transforms.MonitorState, StateType())
