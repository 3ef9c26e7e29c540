"""Bytes by hand, and against the state that init really makes."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
from composed import composed_adamw
from flax import nnx

import natgalore_jax as ng

PARAMS = {
    "embed": jnp.zeros((20, 6)),
    "tall": jnp.zeros((10, 6)),
    "wide": jnp.zeros((6, 10)),
    "square": jnp.zeros((7, 7)),
    "stack": jnp.zeros((3, 6, 10)),
    "bias": jnp.zeros(10),
}
LABELS = {k: "hidden" if v.ndim > 1 else "rest" for k, v in PARAMS.items()}


def natural(**kwargs):
    return composed_adamw("stored", 1e-2, **({"rank": 2, "history": 3} | kwargs))


def row(report, path):
    return next(p for p in report.parameters if p.path == path)


def sizes(p):
    return p.basis_bytes, p.history_bytes, p.inner_bytes, p.other_bytes


# A 6 × 10 float32 matrix at rank 2: numbers of the basis, of one low-rank gradient.
BY_SIDE = {"left": (6 * 2, 2 * 10), "right": (10 * 2, 6 * 2), "both": (16 * 2, 2 * 2)}
SMALL = 4 * (3 * 3 + 3 + 1)  # Gram matrix, checksums, number filled: four bytes each


@pytest.mark.parametrize("side", BY_SIDE)
def test_bytes_of_one_matrix_by_hand(side):
    basis, k = BY_SIDE[side]
    report = ng.memory_report(natural(side=side), PARAMS)
    wide = row(report, "wide")
    assert (wide.side, wide.rank, wide.layers, wide.projected) == (side, 2, 1, True)
    assert sizes(wide) == (4 * basis, 4 * 3 * k + SMALL, 4 * 2 * k, 0)
    assert wide.weight_bytes == 240 and wide.adamw_bytes == 480
    assert sizes(row(report, "embed")) == (0, 0, 2 * 480, 0)
    assert not row(report, "bias").projected


@pytest.mark.parametrize("factory", [ng.contrib.alice_adamw, ng.contrib.ldadamw])
def test_bases_of_optimizers_that_have_no_choice_of_side(factory):
    """Of five matrices with a shorter side of 6, and one of 7 × 7."""
    report = ng.memory_report(factory(1e-2, rank=2), PARAMS)
    assert report.part_bytes["basis"] == 4 * 2 * (5 * 6 + 7)
    assert row(report, "wide").inner_bytes >= 4 * 2 * 2 * 10
    assert report.alternative_state_bytes == {}


def test_a_stack_is_its_layers():
    report = ng.memory_report(natural(side="left"), PARAMS)
    stack, wide = row(report, "stack"), row(report, "wide")
    assert stack.layers == 3
    assert sizes(stack) == tuple(3 * x for x in sizes(wide))


def test_every_part_has_its_own_dtype():
    params = {"w": jnp.zeros((6, 10), jnp.bfloat16)}
    plain = row(ng.memory_report(natural(), params), "w")
    assert plain.dtype == "bfloat16"
    assert sizes(plain) == (2 * 12, 2 * 3 * 20 + SMALL, 2 * 2 * 20, 0)
    tx = natural(history_dtype=jnp.float32, mu_dtype=jnp.float32, basis_dtype=jnp.float32)
    assert sizes(row(ng.memory_report(tx, params), "w")) == (
        *(4 * 12, 4 * 3 * 20 + SMALL),
        *(4 * 20 + 2 * 20, 0),
    )


def test_tucker_has_one_basis_per_mode_and_no_sides():
    params = {"conv": jnp.zeros((2, 4, 5, 6))}
    conv = row(ng.memory_report(ng.galore_adamw(1.0, rank=(2, 3, 4)), params), "conv")
    assert (conv.side, conv.rank, conv.layers, conv.alternatives) == ("tucker", (2, 3, 4), 2, {})
    assert sizes(conv) == (2 * 4 * (4 * 2 + 5 * 3 + 6 * 4), 0, 2 * 2 * 4 * (2 * 3 * 4), 0)


def test_norms_and_directions_of_the_residual_are_other():
    tx = ng.galore_adamw(1.0, rank=2, residual="fira")
    report = ng.memory_report(tx, PARAMS)
    assert row(report, "stack").other_bytes == 2 * 4 * 3  # of each of three matrices
    assert report.part_bytes["shared"] == 2 * 4  # two step counters


WRAPPED = {
    "adamw": optax.adamw(1.0),
    "adafactor": optax.adafactor(1.0, min_dim_size_to_factor=2),
    "muon": optax.contrib.muon(1.0),
    "lbfgs": optax.lbfgs(),
    "noise": optax.add_noise(1.0, 0.5, jax.random.key(0)),
    "natural": natural(),
    "chain": ng.chain(ng.natural_galore(rank=2), optax.adafactor(1.0, min_dim_size_to_factor=2)),
    "optax chain": optax.chain(ng.natural_galore(rank=2), optax.adamw(1.0)),
    "outside": ng.woodbury_natural_gradient(history=3),
    "partition": optax.partition({"hidden": natural(), "rest": optax.adam(1.0)}, LABELS),
    "masked": optax.masked(natural(), {k: k != "bias" for k in PARAMS}),
    "steps outside": optax.MultiSteps(natural(), 4),
    "steps inside": ng.chain(
        ng.low_rank_project(rank=2), optax.MultiSteps(optax.adam(1.0), 4), ng.project_back()
    ),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=1.0),
    "two subspaces": ng.chain(
        *(ng.low_rank_project(rank=2, side="left"), optax.trace(0.9), ng.project_back()),
        *(ng.low_rank_project(rank=3, side="both"), optax.trace(0.9), ng.project_back()),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_total_is_the_sum_over_the_real_state(name):
    tx = WRAPPED[name]
    report = ng.memory_report(tx, PARAMS)
    real = sum(jnp.asarray(x).nbytes for x in jax.tree.leaves(tx.init(PARAMS)))
    assert report.total_state_bytes == real > 0
    assert sum(report.part_bytes.values()) == real
    adamw = jax.tree.leaves(optax.adamw(1.0).init(PARAMS))
    assert report.adamw_state_bytes == sum(x.nbytes for x in adamw)
    assert report.weight_bytes == sum(x.nbytes for x in PARAMS.values())
    assert ng.memory_report(tx, PARAMS) == report  # tracing again records the subspaces again


@pytest.mark.parametrize("name", ["natural", "partition", "masked", "steps outside"])
def test_wrappers_change_nothing_for_the_matrices(name):
    alone = row(ng.memory_report(natural(), PARAMS), "tall")
    wrapped = row(ng.memory_report(WRAPPED[name], PARAMS), "tall")
    accumulator = 240 if name == "steps outside" else 0
    assert sizes(wrapped) == (*sizes(alone)[:2], alone.inner_bytes + accumulator, 0)
    assert (wrapped.side, wrapped.rank) == ("right", 2)


def test_steps_inside_accumulate_in_low_rank():
    wide = row(ng.memory_report(WRAPPED["steps inside"], PARAMS), "wide")
    assert wide.inner_bytes == 3 * 4 * (2 * 10)


def test_labels_that_are_names_of_parameters():
    params = {"a": jnp.zeros((6, 10)), "b": jnp.zeros((6, 10))}
    tx = optax.partition({"a": optax.sgd(1.0, 0.9), "b": optax.adam(1.0)}, {"a": "b", "b": "a"})
    report = ng.memory_report(tx, params)
    assert [p.inner_bytes for p in report.parameters] == [480, 240]
    assert report.shared_bytes == 4


def test_a_mask_may_be_a_prefix():
    params = {"net": {"w": jnp.zeros((6, 10)), "b": jnp.zeros(10)}, "head": jnp.zeros((10, 4))}
    tx = optax.masked(optax.adam(1.0), {"net": False, "head": True})
    report = ng.memory_report(tx, params)
    assert {p.path: p.inner_bytes for p in report.parameters} == {
        "head": 320,
        "net/b": 0,
        "net/w": 0,
    }


def test_a_state_without_attribution_is_shared():
    with pytest.warns(UserWarning, match=r"init reads its parameters.*IndexError.*as shared"):
        report = ng.memory_report(optax.lbfgs(), PARAMS)
    assert report.shared_bytes == report.total_state_bytes


def test_a_bare_array_is_a_parameter():
    report = ng.memory_report(optax.adam(1.0), jnp.zeros((3, 4)))
    (only,) = report.parameters
    assert (only.path, only.inner_bytes, report.shared_bytes) == ("(root)", 96, 4)


def test_json_round_trip():
    report = ng.memory_report(natural(), PARAMS)
    d = report.to_dict()
    assert json.loads(json.dumps(d)) == d
    assert d["total_state_bytes"] == report.total_state_bytes
    assert (
        sum(p["state_bytes"] for p in d["parameters"]) + report.shared_bytes
        == (d["total_state_bytes"])
    )
    wide = next(p for p in d["parameters"] if p["path"] == "wide")
    assert (wide["shape"], wide["side"], wide["rank"]) == ([6, 10], "left", 2)


def test_table_groups_equal_parameters():
    layer = {"q": jnp.zeros((6, 10)), "k": jnp.zeros((6, 10)), "norm": jnp.zeros(6)}
    report = ng.memory_report(natural(), {"layers": [layer, layer]})
    assert [(g.count, g.parameter.shape) for g in report.groups] == [(4, (6, 10)), (2, (6,))]
    lines = str(report).splitlines()
    header, first, second = (line.split() for line in lines[:3])
    assert header[:3] == ["parameter", "count", "shape"]
    assert first[:7] == ["layers/*/*", "4", "6×10", "float32", "2", "left", "960"]
    assert second[:2] == ["layers/*/norm", "2"]
    assert lines[4].split()[0] == "total"
    assert lines[6].startswith("state if the side were")


@pytest.mark.parametrize(
    "count, text", [(0, "-"), (999, "999 B"), (1000, "1.00 kB"), (99_960, "100 kB")]
)
def test_sizes_have_three_digits_and_decimal_units(count, text):
    params = {"w": jax.ShapeDtypeStruct((count,), jnp.int8)}
    weights = str(ng.memory_report(optax.sgd(1.0), params)).splitlines()[1].split()[6:]
    assert " ".join(weights).startswith(text)


def test_shapes_are_enough_and_give_what_arrays_give():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert ng.memory_report(natural(), shapes) == ng.memory_report(natural(), PARAMS)


def test_abstract_nnx_state():
    model = nnx.eval_shape(lambda: nnx.Linear(6, 10, rngs=nnx.Rngs(0)))
    report = ng.memory_report(natural(), nnx.state(model, nnx.Param))
    assert [(p.path, p.side) for p in report.parameters] == [
        ("bias/value", None),
        ("kernel/value", "left"),
    ]
    assert sizes(report.parameters[1]) == (48, 240 + SMALL, 160, 0)


def test_seven_billion_parameters_from_shapes():
    d, f, L, V, r, s = 4096, 11008, 32, 32_000, 1024, 10

    def bf16(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    layer = {name: bf16(d, d) for name in "qkvo"}
    layer |= {"gate": bf16(d, f), "up": bf16(d, f), "down": bf16(f, d)}
    layer |= {"norm_1": bf16(d), "norm_2": bf16(d)}
    params = {"embed": bf16(V, d), "layers": [layer] * L, "head": bf16(d, V), "norm": bf16(d)}
    report = ng.memory_report(natural(rank=r, history=s, side="short"), params)
    assert report.weight_bytes == 2 * 6_738_415_616

    low_rank = 4 * L * r * d + 3 * L * r * f  # the longer side stays
    rest = 2 * V * d + (2 * L + 1) * d
    assert report.part_bytes == {
        "basis": 2 * 7 * L * d * r,
        "history": 2 * s * low_rank + 7 * L * 4 * (s * s + s + 1),
        "inner": 2 * 2 * (low_rank + rest),
        "other": 0,
        "shared": 12,
    }
    # What the method costs at this rank, stated and not hidden: more than all of AdamW.
    assert report.total_state_bytes > report.adamw_state_bytes


def test_errors_are_those_of_init():
    with pytest.raises(TypeError, match="gradient transformation"):
        ng.memory_report(lambda g: g, PARAMS)
    with pytest.raises(ValueError, match="where selects no parameter"):
        ng.memory_report(natural(rank=64), PARAMS)


def training_step(tx):
    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.sin(x @ p["w"]).sum() + p["b"].sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled_step(tx, params, donated, rows=64):
    shapes = jax.eval_shape(lambda p: (p, tx.init(p), jnp.zeros((rows, 32))), params)
    return jax.jit(training_step(tx), donate_argnums=donated).lower(*shapes).compile()


@pytest.mark.parametrize("donated", [(), (0, 1)])
def test_a_whole_step(donated):
    tx = ng.galore_adamw(1e-2, rank=4)
    params = {"w": jnp.zeros((32, 48)), "b": jnp.zeros(3)}
    report = ng.memory_report(tx, params, step=compiled_step(tx, params, donated))
    step = report.step
    kept = report.weight_bytes + report.total_state_bytes
    assert step.argument_bytes == kept + 4 * 64 * 32
    # Results that have no argument's place: all of them, and the pointers to them, or pointers.
    assert (step.result_bytes >= kept) == (not donated)
    assert step.gradient_bytes == report.weight_bytes
    # cos(x w) is kept for the backward pass, and gone when there are gradients.
    assert step.gradient_bytes + step.activation_bytes >= 4 * 64 * 48
    assert report.to_dict()["step"]["total_bytes"] == step.total_bytes
    assert str(report).splitlines()[-1].split() == ["total", f"{step.total_bytes / 1000:.1f}", "kB"]


def test_gradients_that_live_at_the_same_time_may_be_fewer():
    tx = ng.galore_adamw(1e-2, rank=4)
    params = {"w": jnp.zeros((32, 48)), "b": jnp.zeros(3)}
    compiled = compiled_step(tx, params, (0, 1))
    whole = ng.memory_report(tx, params, step=compiled).step
    step = ng.memory_report(tx, params, step=compiled, live_gradients=100).step
    assert step.gradient_bytes == 100 and step.total_bytes == whole.total_bytes
    with pytest.raises(ValueError, match=r"live_gradients=100 needs a compiled step"):
        ng.memory_report(tx, params, live_gradients=100)
    with pytest.raises(ValueError, match="live_gradients must be at least 0, got -5"):
        ng.memory_report(tx, params, step=compiled, live_gradients=-5)
    with pytest.raises(TypeError, match=r"live_gradients must be an integer, got 1\.5"):
        ng.memory_report(tx, params, step=compiled, live_gradients=1.5)
    with pytest.raises(TypeError, match="step must be a compiled step"):
        ng.memory_report(tx, params, step=jax.jit(training_step(tx)))
    # A Python number among the parameters has four bytes, as without a step.
    step = ng.memory_report(tx, params | {"n": 1.0}, step=compiled).step
    assert step.gradient_bytes == whole.gradient_bytes + 4


def test_without_a_step_there_is_no_account_of_it():
    report = ng.memory_report(natural(), PARAMS)
    assert report.step is None and report.to_dict()["step"] is None
    assert "a step" not in str(report)


def test_gradients_of_a_sharded_step_are_counted_on_one_device():
    mesh = jax.make_mesh((8,), ("data",), devices=jax.devices()[:8])
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    params = {"w": jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=rows)}
    descent = optax.sgd(0.1)
    x = jax.ShapeDtypeStruct(
        (4, 64), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, jax.P())
    )

    def step(params, x):
        grads = jax.grad(lambda p: jnp.sin(x @ p["w"]).sum())(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    compiled = jax.jit(step, donate_argnums=0).lower(params, x).compile()
    account = ng.memory_report(descent, params, step=compiled).step
    assert account.gradient_bytes <= 4 * 64 * 48 // 8
    assert account.argument_bytes == 4 * (64 * 48 // 8 + 4 * 64)


def test_parameters_on_a_mesh_with_explicit_axes_are_counted_whole():
    mesh = jax.make_mesh((4,), ("data",))
    columns = jax.NamedSharding(mesh, jax.P(None, "data"))
    sharded = {"w": jax.device_put(jnp.ones((6, 8)), columns)}
    assert ng.memory_report(natural(), sharded) == ng.memory_report(
        natural(), {"w": jnp.ones((6, 8))}
    )


# Without an embedding. "pairs" has a norm per layer that looks like R.
SIDES = {k: v for k, v in PARAMS.items() if k != "embed"} | {"pairs": jnp.zeros((2, 10, 6, 10))}


@pytest.mark.parametrize("residual", ["fira", "fisher"])
@pytest.mark.parametrize("history", [2, 3])  # 2 is the rank: then a Gram matrix looks like R
@pytest.mark.parametrize(
    "wrap",
    [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 4), lambda tx: optax.chain(tx, optax.adam(1))],
    ids=["plain", "steps", "full-size moments"],
)
def test_alternatives_are_what_the_other_sides_cost(wrap, history, residual):
    def report(side):
        tx = natural(side=side, history=history, history_dtype=jnp.bfloat16, residual=residual)
        return ng.memory_report(wrap(tx), SIDES)

    found = report("left").alternative_state_bytes
    assert list(found) == ["short", "long", "both", "left", "right"]
    for side, total in found.items():
        assert total == report(side).total_state_bytes
        again = report(side).alternative_state_bytes
        assert again == found


def test_alternatives_of_both_sides_are_exact():
    params = {"a": jnp.zeros((7, 9)), "b": jnp.zeros((3, 11, 8))}

    def report(side):
        return ng.memory_report(ng.galore_adamw(1.0, rank=3, side=side), params)

    for side in ("short", "both"):
        for other, total in report(side).alternative_state_bytes.items():
            assert total == report(other).total_state_bytes


def test_alternatives_with_axes():
    params = {"q": jnp.zeros((3, 12, 2, 4))}  # layers, embed, heads, head_dim

    def report(side):
        axes = ng.MatrixAxes(rows=1, cols=(2, 3))
        return ng.memory_report(natural(side=side, axes=axes), params)

    (q,) = report("short").parameters
    assert (q.side, q.layers) == ("right", 3)
    for side, total in q.alternatives.items():
        assert total == report(side).parameters[0].state_bytes


def test_unprojected_or_ambiguous_parameters_have_no_alternatives():
    report = ng.memory_report(WRAPPED["two subspaces"], PARAMS)
    assert {p.path: p.side for p in report.parameters}["wide"] == "left"
    assert report.alternative_state_bytes == {}
    assert ng.memory_report(optax.adamw(1.0), PARAMS).alternative_state_bytes == {}
