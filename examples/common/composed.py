"""AdamW in a subspace from the library's parts: for settings that no ready-made optimizer has."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import optax

import natgalore_jax as ng

Fisher = Literal["none", "stored", "compact"]


def composed_adamw(
    fisher: Fisher,
    learning_rate: optax.ScalarOrSchedule,
    adam: optax.GradientTransformation,
    weight_decay: float = 0.0,
    mask: Any = None,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """GaLore or Natural GaLore around an inner optimizer.

    Args:
      fisher: "none" for GaLore; "stored" for Natural GaLore as published, whose Fisher matrix is
        made of stored gradients and acts before `adam`; "compact" for a compact Fisher matrix,
        which acts after it.
      learning_rate, weight_decay, mask: as in `optax.adamw`.
      adam: what runs in the subspace, and on unprojected parameters.
      settings: arguments of the parts, by name: of `ng.low_rank_project`, `ng.project_back` and, if
        there is one, the Fisher matrix.
    """

    def part(factory: Callable[..., Any], *args: Any) -> Any:
        own = [name for name in inspect.signature(factory).parameters if name in settings]
        return factory(*args, **{name: settings.pop(name) for name in own})

    opener, closer = part(ng.low_rank_project), part(ng.project_back)
    inside: tuple[Any, ...] = (adam,)
    if fisher == "stored":
        inside = (part(ng.woodbury_natural_gradient), adam)
    elif fisher == "compact":
        inside = (part(ng.compact_natural_gradient, adam),)
    if settings:
        raise TypeError(f"no part takes {', '.join(settings)}")
    return ng.chain(
        opener,
        *inside,
        closer,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def with_arguments_of(*parts: Callable[..., Any]) -> Callable[[Any], Any]:
    """Decorate a function to show the arguments of `parts` instead of its `**settings`."""

    def decorated(function: Any) -> Any:
        own = inspect.signature(function).parameters.values()
        named = {p.name: p for p in own if p.kind is not p.VAR_KEYWORD}
        of_parts = (p for part in parts for p in inspect.signature(part).parameters.values())
        shown = named | {
            p.name: p.replace(kind=p.KEYWORD_ONLY) for p in of_parts if p.name not in named
        }
        function.__signature__ = inspect.Signature(list(shown.values()))
        return function

    return decorated
