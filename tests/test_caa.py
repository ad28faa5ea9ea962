"""caa.py against the equations of the thesis, written here as loops over the printed indices i, j,
m, n, in float64.
"""

import doctest
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import LIGHT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import caa
import evaluate

pytestmark = pytest.mark.usefixtures("one_seed")

R = math.sqrt(math.log(3))  # exp(R * R) = 3
SIZES = [(3, 4), (4, 2), (1, 3), (3, 1)]
THREE_MAPS = torch.tensor(
    [[[0.5, 0.5], [0.25, 0.75]], [[0.5, 0.5], [0.5, 0.5]], [[0.75, 0.25], [0.5, 0.5]]]
)
OPTIONS = [
    dict(),
    dict(channelization=False),
    dict(channelization=False, se=True),
    dict(attention="self"),
    dict(attention="self", channelization=False),
    dict(decoder=True, auxiliary=False),
    dict(dual="parallel"),
    dict(dual="parallel", attention="self", auxiliary=False),
    dict(dual="sequential", decoder=True),
    dict(released=True),
]


# ---------------------------------------------------------------------------- the printed equations


def loop_map(query, axis):
    """Eqs. (3.3), (3.4): A[b, i, j] is the softmax of query (i, j) over m of its column or n of its
    row.
    """
    N, _, H, W = query.shape
    A = {}
    for b, i, j in product(range(N), range(H), range(W)):
        keys = [(m, j) for m in range(H)] if axis == "column" else [(i, n) for n in range(W)]
        e = [torch.exp((query[b, :, i, j] * query[b, :, m, n]).sum()) for m, n in keys]
        A[b, i, j] = [x / sum(e) for x in e]
    return A


def loop_column(A, g, gate):
    """Eqs. (3.6), (3.9) and the sum over m of Eqs. (3.8), (3.11); the column is n, see caa's
    docstring.
    """
    N, C, H, W = g.shape
    alpha = {
        (b, i, n, m): A[b, i, n][m] * g[b, :, m, n]
        for b, i, n, m in product(range(N), range(H), range(W), range(H))
    }
    y = [[[None] * W for _ in range(H)] for _ in range(N)]
    for b, i in product(range(N), range(H)):
        pooled = sum(alpha[b, i, j, m] for m in range(H) for j in range(W)) / (H * W)
        weight = 1 if gate is None else gate(pooled)
        for j in range(W):
            y[b][i][j] = sum(weight * alpha[b, i, j, m] for m in range(H))
    return torch.stack([torch.stack([torch.stack(row, 1) for row in image], 1) for image in y])


def loop_row(A, z, gate):
    """Eqs. (3.7), (3.10) and the sum over n of Eqs. (3.8), (3.11); z is the sum over m."""
    N, C, H, W = z.shape
    beta = {
        (b, i, j, n): A[b, i, j][n] * z[b, :, i, n]
        for b, i, j, n in product(range(N), range(H), range(W), range(W))
    }
    y = [[[None] * W for _ in range(H)] for _ in range(N)]
    for b, j in product(range(N), range(W)):
        pooled = sum(beta[b, i, j, n] for i in range(H) for n in range(W)) / (H * W)
        weight = 1 if gate is None else gate(pooled)
        for i in range(H):
            y[b][i][j] = sum(weight * beta[b, i, j, n] for n in range(W))
    return torch.stack([torch.stack([torch.stack(row, 1) for row in image], 1) for image in y])


def loop_gate(gate):
    """One vector through the gate, from its weights; None stays None."""

    def of_vector(p):
        for layer in gate.fc[:-1]:
            p = (layer.weight * p).sum(1)
            p = torch.where(p > 0, p, 0.2 * p)
        return 1 / (1 + torch.exp(-(gate.fc[-1].weight * p).sum(1)))

    return gate and of_vector


def map_of(query, axis):
    """`loop_map` as a tensor: `[N, W, H, H]` of columns, `[N, H, W, W]` of rows."""
    (N, _, H, W), A = query.shape, loop_map(query, axis)
    lines = product(range(N), range(W), range(H)) if axis == "column" else None
    keys = [(b, i, j) for b, j, i in lines] if lines else [*product(range(N), range(H), range(W))]
    shape = (N, W, H, H) if axis == "column" else (N, H, W, W)
    return torch.stack([torch.stack(A[key]) for key in keys]).view(shape)


def loop_axis(query, value, gate, axis):
    step = loop_column if axis == "column" else loop_row
    return step(loop_map(query, axis), value, loop_gate(gate))


def inputs(H, W, C=3, c=2, N=2):
    query = torch.randn(N, c, H, W, dtype=torch.float64, requires_grad=True)
    value = torch.randn(N, C, H, W, dtype=torch.float64, requires_grad=True)
    return query, value


def strong_gate(C, width=4, layers=2):
    """A gate far from a constant 1/2."""
    gate = caa.ChannelAttention(C, width, layers).double()
    for p in gate.parameters():
        torch.nn.init.normal_(p)
    return gate


def assert_same(fast, literal, wanted):
    """Equal values, and equal gradients of a random weighted sum with respect to `wanted`."""
    assert fast.shape == literal.shape
    torch.testing.assert_close(fast, literal, rtol=0, atol=1e-10)
    weight = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad(fast, wanted, weight), torch.autograd.grad(literal, wanted, weight)
    ):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------ by hand


@pytest.mark.equation
def test_the_example_in_the_docstring_holds():
    failed, attempted = doctest.testmod(caa)
    assert failed == 0 and attempted >= 1


@pytest.mark.equation
def test_eq_3_3_column_map_by_hand():
    # column 0 is (0, R): products 0, 0 | 0, ln 3 -> 1/2 1/2 | 1/4 3/4; column 1 is 0; column 2 is
    # (R, 0)
    query = torch.tensor([[0, 0, R], [R, 0, 0]])[None, None]
    torch.testing.assert_close(caa.column_attention(query), THREE_MAPS[None])


@pytest.mark.equation
def test_eq_3_4_row_map_by_hand():
    query = torch.tensor([[0, R], [0, 0], [R, 0]])[None, None]  # rows as the columns above
    torch.testing.assert_close(caa.row_attention(query), THREE_MAPS[None])


@pytest.mark.equation
def test_eq_3_9_by_hand():
    # Σ_m α:  column 0: 8/2, 8·3/4;  column 1: 2/2, 2/2;  column 2: 4/4, 4/2  -> rows 4 1 1 and 6 1
    # 2 Σ_{m,j} α / HW: 6/6 and 9/6;  ω_c1 = 1, ω_c2 = 2 ln 2:  sigmoid(2 ln 2) = 4/5, sigmoid(3 ln
    # 2) = 8/9
    # A: the maps of the three columns of the test of Eq. (3.3)
    value = torch.tensor([[0.0, 0, 0], [8, 2, 4]])[None, None]
    gate = caa.ChannelAttention(1, 1, 1, activation="relu")
    gate.load_state_dict(
        {"fc.0.weight": torch.ones(1, 1), "fc.1.weight": torch.full((1, 1), 2 * math.log(2))}
    )
    A = THREE_MAPS[None]
    plain = torch.tensor([[4.0, 1, 1], [6, 1, 2]])[None, None]
    gated = torch.tensor([[16 / 5, 4 / 5, 4 / 5], [48 / 9, 8 / 9, 16 / 9]])[None, None]
    torch.testing.assert_close(caa.channelized(A, value, None, "column"), plain)
    torch.testing.assert_close(caa.channelized(A, value, gate, "column"), gated)
    torch.testing.assert_close(caa.channelized_grouped(A, value, gate, "column", 2), gated)


@pytest.mark.equation
def test_eq_3_10_by_hand():
    # the example above with the axes exchanged: Σ_n β has the columns 4 1 1 and 6 1 2
    value = torch.tensor([[0.0, 8], [0, 2], [0, 4]])[None, None]
    gate = caa.ChannelAttention(1, 1, 1, activation="relu")
    gate.load_state_dict(
        {"fc.0.weight": torch.ones(1, 1), "fc.1.weight": torch.full((1, 1), 2 * math.log(2))}
    )
    A = THREE_MAPS[None]
    plain = torch.tensor([[4.0, 6], [1, 1], [1, 2]])[None, None]
    gated = torch.tensor([[16 / 5, 48 / 9], [4 / 5, 8 / 9], [4 / 5, 16 / 9]])[None, None]
    torch.testing.assert_close(caa.channelized(A, value, None, "row"), plain)
    torch.testing.assert_close(caa.channelized(A, value, gate, "row"), gated)
    torch.testing.assert_close(caa.channelized_grouped(A, value, gate, "row", 2), gated)


@pytest.mark.equation
def test_eq_3_11_by_hand_with_two_channels_and_two_images():
    # Image 0 has queries of 0: every row attends to both rows alike, every column to all three.
    # Image 1 is the column 0, R of Eq. (3.3) in all columns, and the row step as in image 0.
    value = torch.zeros(2, 2, 2, 3)
    value[:, 0, 1] = torch.tensor([8.0, 4, 0])  # channel 0: row 1
    value[:, 1, 0] = 12.0  # channel 1: row 0

    def double(pooled):  # a gate that tells channels and rows (columns) apart
        return pooled * torch.tensor([1.0, 0.5])

    # Column step, image 0. z of channel 0 is half of 8 4 0 in both rows, of channel 1 6 everywhere.
    # Σ_m,j α / HW: channel 0 (4 + 2 + 0) / 6 = 1, channel 1 18 / 6 = 3; gates 1 and 1.5 Image 1,
    # row 0: the same. Row 1 has weights 1/4, 3/4: 6 3 0, 9 / 6 = 1.5; 3 3 3, 9 / 6 / 2 = 3/4
    z = torch.tensor(
        [
            [[[4.0, 2, 0], [4, 2, 0]], [[9.0, 9, 9], [9, 9, 9]]],
            [[[4.0, 2, 0], [9, 4.5, 0]], [[9.0, 9, 9], [2.25, 2.25, 2.25]]],
        ]
    )
    A_row = torch.full((2, 2, 3, 3), 1 / 3)
    A_col = torch.full((2, 3, 2, 2), 0.5)
    A_col[1, :, 1] = torch.tensor([0.25, 0.75])
    torch.testing.assert_close(caa.channelized(A_col, value, double, "column"), z)
    torch.testing.assert_close(caa.channelized_grouped(A_col, value, double, "column", 2), z)
    # Row step: each row's mean; Σ_i,n β / HW is for each column the sum of the two rows' means / 6.
    # Image 0: means 2, 2 | 9, 9; gates 4/6 | 18/6/2. Image 1: 2, 4.5 | 9, 2.25; 6.5/6 | 11.25/12
    y = torch.tensor([[[4 / 3, 4 / 3], [13.5, 13.5]], [[13 / 6, 4.875], [8.4375, 2.109375]]])
    y = y[..., None].expand(2, 2, 2, 3)
    torch.testing.assert_close(caa.channelized(A_row, z, double, "row"), y)
    torch.testing.assert_close(caa.channelized_grouped(A_row, z, double, "row", 3), y)


@pytest.mark.equation
def test_algorithm_2_pads_five_rows_to_three_groups_of_two():
    (query, value), gate, seen = inputs(5, 2), strong_gate(3), []

    def watched(pooled):
        seen.append(pooled.shape)
        return gate(pooled)

    A = map_of(query, "column")
    grouped = caa.channelized_grouped(A, value, watched, "column", 3)
    assert seen == [(2, 2, 3)] * 3  # [N, H+/G, C] of each group, the last row of padding
    assert_same(
        grouped, loop_axis(query, value, gate, "column"), (query, value, *gate.parameters())
    )


@pytest.mark.equation
def test_columns_and_rows_are_each_other_on_exchanged_axes():
    query, _ = inputs(3, 4)
    row, column = caa.row_attention(query), caa.column_attention(query.mT)
    assert torch.equal(row, column) and torch.equal(row, caa.axial_attention(query, "row"))
    assert torch.equal(caa.column_attention(query), caa.axial_attention(query, "column"))


@pytest.mark.equation
def test_eq_3_10_is_eq_3_9_on_exchanged_axes():
    (query, value), gate = inputs(3, 4), strong_gate(3)
    A = map_of(query, "row")
    by_row = caa.channelized(A, value, gate, "row")
    assert torch.equal(by_row, caa.channelized(A, value.mT, gate, "column").mT)


@pytest.mark.equation
def test_gate_by_hand_printed_and_leaky():
    # one channel: ω1 = 1, ω2 = ln 3;  x = 1: sigmoid(ln 3) = 3/4;  x = -5: ReLU 0 -> 1/2, leaky -1
    # -> sigmoid(-ln 3) = 1/4
    x = torch.tensor([[[1.0], [-5.0]]])
    for gate, low in (
        (caa.ChannelAttention(1, 1, 1, activation="relu"), 0.5),
        (caa.ChannelAttention(1, 1, 1), 0.25),
    ):
        gate.load_state_dict(
            {"fc.0.weight": torch.ones(1, 1), "fc.1.weight": torch.full((1, 1), math.log(3))}
        )
        torch.testing.assert_close(gate(x), torch.tensor([[[0.75], [low]]]))


@pytest.mark.equation
def test_gate_printed_form_is_two_matrices():
    gate, x = caa.ChannelAttention(5, 3, 1, activation="relu"), torch.randn(2, 4, 5)
    w1, w2 = (fc.weight.T for fc in gate.fc)
    torch.testing.assert_close(gate(x), 1 / (1 + torch.exp(-(x @ w1).clamp(min=0) @ w2)))


@pytest.mark.equation
def test_channel_map_by_hand():
    # channels 0 and R at one position, as in Eq. (3.3); DANet's released code would give 3/4 1/4 in
    # the second row
    x = torch.tensor([0, R]).view(1, 2, 1, 1)
    torch.testing.assert_close(caa.channel_map(x), torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]))


# ------------------------------------------------------------------------------------ against loops


@pytest.mark.equation
@pytest.mark.parametrize("axis", ["column", "row"])
def test_eq_3_3_and_3_4_maps_equal_loops(axis):
    query, _ = inputs(3, 4)
    attention = caa.column_attention if axis == "column" else caa.row_attention
    A, literal = attention(query), loop_map(query, axis)
    assert A.shape == ((2, 4, 3, 3) if axis == "column" else (2, 3, 4, 4))
    torch.testing.assert_close(A.sum(-1), torch.ones_like(A[..., 0]))
    for (b, i, j), expected in literal.items():
        actual = A[b, j, i] if axis == "column" else A[b, i, j]
        torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=1e-10)
    assert_same(A, map_of(query, axis), (query,))


@pytest.mark.equation
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", ["column", "row"])
def test_eq_3_6_and_3_7_without_gate_equal_loops(axis, size):
    query, value = inputs(*size)
    fast = caa.channelized(map_of(query, axis), value, None, axis)
    literal = loop_axis(query, value, None, axis)
    if (axis, 1) in (
        ("column", size[0]),
        ("row", size[1]),
    ):  # nothing to choose from: the query has no gradient
        torch.testing.assert_close(fast, value)
        torch.testing.assert_close(literal, value)
    else:
        assert_same(fast, literal, (query, value))


@pytest.mark.equation
@pytest.mark.parametrize("axis", ["column", "row"])
def test_eq_3_9_and_3_10_gated_equal_loops(axis):
    for size in ((3, 4), (4, 2)):
        (query, value), gate = inputs(*size), strong_gate(3)
        fast = caa.channelized(map_of(query, axis), value, gate, axis)
        assert_same(fast, loop_axis(query, value, gate, axis), (query, value, *gate.parameters()))


@pytest.mark.equation
@pytest.mark.parametrize("gated", [True, False])
def test_column_step_equals_the_loop_for_all_rows_and_for_some(gated):
    for rows in (slice(None), slice(1, None), slice(1)):
        (query, value), gate = inputs(3, 4), strong_gate(3) if gated else None
        step = caa.column_step(map_of(query, "column")[:, :, rows], value, gate)
        literal = loop_axis(query, value, gate, "column")[:, :, rows]
        assert_same(step, literal, (query, value, *gate.parameters()) if gated else (query, value))


@pytest.mark.equation
def test_eq_3_9_gate_pools_over_keys_and_width():
    query, value = inputs(3, 4)
    seen = []
    caa.channelized(map_of(query, "column"), value, lambda p: seen.append(p) or p, "column")
    A = loop_map(query, "column")
    for b, i in product(range(2), range(3)):
        alpha = [A[b, i, j][m] * value[b, :, m, j] for m in range(3) for j in range(4)]
        torch.testing.assert_close(seen[0][b, i], sum(alpha) / 12)
    assert len(seen) == 1 and seen[0].shape == (2, 3, 3)  # [N, H, C]


@pytest.mark.equation
def test_eq_3_10_gate_pools_over_keys_and_height():
    query, value = inputs(3, 4)
    seen = []
    caa.channelized(map_of(query, "row"), value, lambda p: seen.append(p) or p, "row")
    A = loop_map(query, "row")
    for b, j in product(range(2), range(4)):
        beta = [A[b, i, j][n] * value[b, :, i, n] for i in range(3) for n in range(4)]
        torch.testing.assert_close(seen[0][b, j], sum(beta) / 12)
    assert len(seen) == 1 and seen[0].shape == (2, 4, 3)  # [N, W, C]


@pytest.mark.equation
@pytest.mark.parametrize("channelization", [True, False])
def test_eq_3_11_and_3_5_spatial_attention_equals_loops(channelization):
    for H, W in ((3, 4), (4, 2)):
        net = (
            caa.SpatialAttention(3, "axial", channelization, layers=2, width=4, query_channels=2)
            .double()
            .eval()
        )
        for p in net.parameters():
            torch.nn.init.normal_(p)
        x = torch.randn(2, 3, H, W, dtype=torch.float64, requires_grad=True)
        theta, phi, g = net.theta(x), net.phi(x), net.g(x)
        inner = loop_column(loop_map(theta, "column"), g, loop_gate(net.gate_col))
        literal = loop_row(loop_map(phi, "row"), inner, loop_gate(net.gate_row))
        assert_same(net(x), literal, (x, *net.parameters()))


@pytest.mark.equation
@pytest.mark.parametrize("channelization", [True, False])
def test_eq_3_1_and_3_2_self_attention_equals_loops(channelization):
    net = (
        caa.SpatialAttention(3, "self", channelization, layers=2, width=4, query_channels=2)
        .double()
        .eval()
    )
    for p in net.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    theta, g = net.theta(x), net.g(x)
    gate, rows = loop_gate(net.gate_col), []
    for b, i, j in product(range(2), range(3), range(4)):
        keys = list(product(range(3), range(4)))
        e = [torch.exp((theta[b, :, i, j] * theta[b, :, m, n]).sum()) for m, n in keys]
        alpha = [a / sum(e) * g[b, :, m, n] for a, (m, n) in zip(e, keys)]
        weight = gate(sum(alpha) / (3 * 4)) if channelization else 1
        rows.append(sum(weight * a for a in alpha))
    literal = torch.stack(rows).view(2, 3, 4, 3).permute(0, 3, 1, 2)
    assert_same(net(x), literal, (x, *net.parameters()))


@pytest.mark.equation
def test_eq_3_5_as_printed_is_another_sum_unless_there_is_one_column():
    for H, W in ((3, 1), (3, 4)):
        theta, g = inputs(H, W)
        phi = torch.randn(2, 2, H, W, dtype=torch.float64)
        col, row = loop_map(theta, "column"), loop_map(phi, "row")
        printed = torch.zeros_like(g)
        for b, i, j in product(range(2), range(H), range(W)):
            printed[b, :, i, j] = sum(
                row[b, i, j][n] * sum(col[b, i, j][m] * g[b, :, m, n] for m in range(H))
                for n in range(W)
            )
        y = caa.channelized(caa.axial_attention(theta, "column"), g, None, "column")
        y = caa.channelized(caa.axial_attention(phi, "row"), y, None, "row")
        torch.testing.assert_close(y, loop_row(row, loop_column(col, g, None), None))
        assert torch.allclose(y, printed) == (W == 1)


@pytest.mark.equation
@pytest.mark.parametrize("axis", ["column", "row"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "groups", [1, 2, 3, 4, 5, 6, 9]
)  # of 6 or 4: groups that divide, do not, and are too many
def test_algorithm_2_equals_channelized(groups, gated, axis):
    (query, value), gate = inputs(6, 4), strong_gate(3) if gated else None
    fast = caa.channelized(map_of(query, axis), value, gate, axis)
    grouped = caa.channelized_grouped(map_of(query, axis), value, gate, axis, groups)
    assert_same(fast, grouped, (query, value, *gate.parameters()) if gated else (query, value))


@pytest.mark.equation
def test_algorithm_2_gives_the_gate_one_group_at_a_time():
    (query, value), seen = inputs(7, 4), []
    A = caa.axial_attention(query, "column")
    caa.channelized_grouped(A, value, lambda p: seen.append(p.shape) or p, "column", 2)
    assert seen == [(2, 4, 3)] * 2  # [N, H+ / G, C], H+ = 8


@pytest.mark.equation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_algorithm_2_keeps_the_values_precision(dtype):
    query, value = (t.detach().float() for t in inputs(5, 4))
    gate = strong_gate(3).float()  # map and gate are float32
    for axis, g in product(("column", "row"), (None, gate)):
        A = caa.axial_attention(query, axis)
        grouped = caa.channelized_grouped(A, value.to(dtype), g, axis, 2)
        assert grouped.dtype == dtype
        torch.testing.assert_close(
            grouped.float(), caa.channelized(A, value, g, axis), rtol=0, atol=0.03
        )


@pytest.mark.equation
def test_channel_map_and_channel_step_equal_loops():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    net = caa.DualAttention(4, 2).double()
    torch.nn.init.constant_(net.gamma_channel, 0.7)
    A, y = torch.zeros(2, 3, 3, dtype=torch.float64), torch.zeros_like(x)
    for b, c in product(range(2), range(3)):
        e = [
            torch.exp(sum(x[b, c, i, j] * x[b, d, i, j] for i in range(2) for j in range(4)))
            for d in range(3)
        ]
        A[b, c] = torch.stack(e) / sum(e)
        y[b, c] = x[b, c] + 0.7 * sum(A[b, c, d] * x[b, d] for d in range(3))
    torch.testing.assert_close(caa.channel_map(x), A)
    torch.testing.assert_close(net.channel(x), y)


@pytest.mark.equation
@pytest.mark.parametrize("axis", ["column", "row"])
def test_gradients_pass_gradcheck(axis):
    (query, value), gate = inputs(2, 3, C=2, N=1), strong_gate(2)

    def step(query, value, *_):
        return caa.channelized(map_of(query, axis), value, gate, axis)

    assert torch.autograd.gradcheck(step, (query, value, *gate.parameters()))
    assert torch.autograd.gradcheck(lambda q: caa.axial_attention(q, axis), (query,))
    assert torch.autograd.gradcheck(caa.channel_map, (value,))


# ---------------------------------------------------------------------------------- the gate's size


@pytest.mark.equation
@pytest.mark.parametrize(
    "layers, width, expected",  # the last two rows print 0.00027 and 0.00030, see caa's docstring
    [
        (1, 128, "0.00024"),
        (7, 128, "0.00043"),
        (5, 64, "0.00015"),
        (5, 256, "0.00098"),
        (3, 128, "0.00031"),
        (5, 128, "0.00037"),
    ],
)
def test_table_3_1_counts_the_weights_of_two_gates(layers, width, expected):
    one = sum(p.numel() for p in caa.ChannelAttention(512, width, layers).parameters())
    assert f"{2 * one / 2**30:.5f}" == expected


@pytest.mark.network
def test_default_gate_has_five_hidden_layers_of_128():
    shapes = [(128, 512)] + [(128, 128)] * 4 + [(512, 128)]
    spatial = caa.SpatialAttention()
    for gate in (
        caa.ChannelAttention(512),
        spatial.gate_col,
        spatial.gate_row,
        caa.CAA(8).attention.gate_col,
    ):
        assert [tuple(p.shape) for p in gate.parameters()] == shapes


@pytest.mark.equation
def test_gates_start_from_kaimings_initialisation():
    for fc in caa.ChannelAttention(
        512
    ).fc:  # of leaky ReLU 0.2: variance 2 / (1 + 0.2²) / what goes in
        assert fc.weight.std().item() == pytest.approx(
            math.sqrt(2 / 1.04 / fc.in_features), rel=0.03
        )
        assert abs(fc.weight.mean().item()) < 0.03 / math.sqrt(fc.in_features)


@pytest.mark.network
@pytest.mark.parametrize("attention", ["axial", "self"])
def test_queries_are_linear_as_printed_and_behind_a_relu_as_released(attention):
    def queries(released):
        torch.manual_seed(0)
        net = caa.SpatialAttention(8, attention, query_channels=6, released=released).eval()
        return [layer for layer in (net.theta, net.phi) if layer is not None]

    x, y = torch.randn(2, 8, 3, 4), torch.randn(2, 8, 3, 4)
    assert len(queries(False)) == len(queries(True)) == (2 if attention == "axial" else 1)
    for printed, released in zip(queries(False), queries(True)):
        torch.testing.assert_close(printed(2 * x - 3 * y), 2 * printed(x) - 3 * printed(y))
        torch.testing.assert_close(released(x), printed(x).relu() / 0.7)


@pytest.mark.usefixtures("meta")
@pytest.mark.network
@pytest.mark.parametrize(
    "options", [dict(), dict(dual="parallel"), dict(dual="sequential")], ids=str
)
def test_released_reaches_the_queries(options):
    for released in (False, True):
        attention = caa.build(3, "resnet18", released=released, **options).head.attention
        assert has_relu(attention.theta) == has_relu(attention.phi) == released


@pytest.mark.usefixtures("meta")
@pytest.mark.network
def test_queries_are_linear_where_nothing_is_said():
    for attention in (
        caa.SpatialAttention(8),
        caa.CAA(8).attention,
        caa.build(3, "resnet18").head.attention,
    ):
        assert not has_relu(attention.theta) and not has_relu(attention.phi)


def has_relu(query):
    return any(isinstance(layer, torch.nn.ReLU) for layer in query)


@pytest.mark.network
@pytest.mark.parametrize("released", [False, True])
def test_a_querys_product_with_itself_starts_near_32(released):
    net, x = caa.SpatialAttention(128, released=released), torch.randn(8, 128, 9, 9)
    for query in (net.theta(x), net.phi(x)):
        assert query.square().sum(1).mean().item() == pytest.approx(32, rel=0.03)


@pytest.mark.equation
def test_behind_a_relu_a_long_query_draws_positions_that_show_something_else():
    # a column of five: the last is three times as long and shows something else (its products with
    # the others are below 0)
    z = torch.tensor([[1.0, -1.4], [1.2, -1.5], [0.8, -1.1], [1.1, -1.3], [3.0, 3.2]]).T.reshape(
        1, 2, 5, 1
    )
    assert caa.axial_attention(z.relu(), "column")[0, 0].argmax(-1).tolist() == [4, 4, 4, 4, 4]
    assert caa.axial_attention(z, "column")[0, 0, :4].argmax(-1).max() < 4


@pytest.mark.network
def test_options_reach_the_gates_and_no_more():
    def count(**options):
        with torch.device("meta"):
            net = caa.build(3, "resnet18", **options)
        return sum(p.numel() for p in net.parameters())

    plain = count(channelization=False)
    assert count() - plain == 2 * (512 * 128 + 4 * 128 * 128 + 128 * 512)
    assert count(channel_layers=3, channel_width=64) - plain == 2 * (
        512 * 64 + 2 * 64 * 64 + 64 * 512
    )
    assert (
        count(channelization=False, se=True) - plain == 512 * 32 + 32 + 32 * 512 + 512
    )  # reduction 16
    assert (
        count(attention="self") - count(attention="self", channelization=False)
        == 512 * 128 + 4 * 128 * 128 + 128 * 512
    )
    assert (
        plain - count(attention="self", channelization=False) == 512 * 64 + 2 * 64
    )  # φ and its batch norm
    assert plain - count(channelization=False, auxiliary=False) == 512 * 256 + 2 * 256 + 256 * 3 + 3


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.equation
def test_maps_are_exact_under_autocast():
    query = torch.randn(1, 16, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        for axis in ("column", "row"):
            A = caa.axial_attention(query.bfloat16(), axis)
            assert A.dtype == torch.float32
            torch.testing.assert_close(
                A,
                caa.axial_attention(query.bfloat16().double(), axis).float(),
                rtol=1e-4,
                atol=1e-6,
            )
        A = caa.channel_map(query.bfloat16())
        assert A.dtype == torch.float32
    torch.testing.assert_close(
        A, caa.channel_map(query.bfloat16().double()).float(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.equation
def test_gate_is_exact_under_autocast():
    gate, x = caa.ChannelAttention(8, 4, 3), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        under = gate(x)
    assert under.dtype == torch.float32 and torch.equal(under, gate(x))


@pytest.mark.network
@pytest.mark.parametrize("attention", ["axial", "self"])
def test_spatial_attention_under_autocast_is_close_to_float32(attention):
    net, x = caa.SpatialAttention(32, attention, query_channels=8).eval(), torch.randn(2, 32, 7, 9)
    with torch.no_grad():
        expected = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            actual = net(x)
    assert actual.isfinite().all()
    assert (actual - expected).norm() < 0.02 * expected.norm()


@pytest.mark.equation
def test_float16_queries_beyond_65504_give_a_finite_map():
    query = (300 + 30 * torch.randn(1, 64, 5, 6)).half()
    product_of_two = query[0, :, 0, 0].float() @ query[0, :, 1, 0].float()
    assert product_of_two > 65504 and product_of_two.half().isinf()
    for axis in ("column", "row"):
        A = caa.axial_attention(query, axis)
        assert A.dtype == torch.float32 and A.isfinite().all()
        assert torch.equal(A.argmax(-1), caa.axial_attention(query.double(), axis).argmax(-1))
    assert caa.channel_map(10 * query).isfinite().all()


class Written(TorchDispatchMode):
    """The numbers of all tensors that are computed while it is active, one after the other or at
    once. Views are no new tensors.
    """

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        old = {x.data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        new = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numbers += sum(x.numel() for x in new if x.data_ptr() not in old)
        return out


@pytest.mark.equation
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("axis", ["column", "row"])
def test_weighted_features_are_never_computed(axis, gated, largest):
    N, C, H, W = 2, 16, 24, 24
    A, value = torch.randn(N, W, H, H).softmax(-1), torch.randn(N, C, H, W)
    gate = strong_gate(C).float() if gated else None
    with largest, Written() as written:
        caa.channelized(A, value, gate, axis)
    assert largest.numbers <= A.numel(), (
        f"one tensor holds {largest.numbers} numbers; expected at most the {A.numel()} of the map"
    )
    alpha = N * C * H * W * H  # α of Eq. (3.6), also where it is computed group by group
    assert written.numbers < alpha, (
        f"the steps compute {written.numbers} numbers together; expected fewer than the {alpha} of "
        "the weighted features α, which need not be computed at all"
    )


@pytest.mark.equation
def test_float16_features_are_pooled_in_float32():
    # Σα/HW of values 1e-3 at 32 x 32 is 3e-5, below 6.1e-5, float16's smallest normal number
    value = (1e-3 * torch.rand(1, 4, 32, 32)).half()
    for axis in ("column", "row"):
        A, seen = torch.randn(1, 32, 32, 32).softmax(-1), []
        y = caa.channelized(
            A, value, lambda p, seen=seen: seen.append(p) or torch.ones_like(p), axis
        )
        z = caa.channelized(A, value, None, axis).double()
        assert seen, "the gate was not called"
        assert y.dtype == torch.float16 and seen[0].dtype == torch.float32
        pooled = z.mean(3 if axis == "column" else 2).transpose(1, 2) / 32
        torch.testing.assert_close(seen[0].double(), pooled, rtol=1e-4, atol=0)


# -------------------------------------------------------------------------------------- the network


def small(num_classes=5, output_stride=16, backbone="resnet18", **options):
    return caa.build(num_classes, backbone, output_stride=output_stride, **options)


def batch(N=2, H=64, W=48, num_classes=5):
    return torch.randn(N, 3, H, W), torch.randint(num_classes, (N, H, W))


def open_gammas(net):
    """The dual designs start without attention; here it counts."""
    for name, p in net.named_parameters():
        if "gamma" in name:
            torch.nn.init.ones_(p)
    return net


def recorded(module, of="output"):
    """What goes in or comes out of `module`, a list that grows."""
    seen = []
    module.register_forward_hook(
        lambda _, given, out: seen.append(given[0] if of == "input" else out)
    )
    return seen


def at_pixels(m, stride, size):
    """Linear between the positions of `m` `[N, K, h, w]`, the i-th of which lies at pixel i *
    stride.
    """
    rows, columns = (
        (1 - (torch.arange(side)[:, None] / stride - torch.arange(n)).abs()).clamp(min=0)
        for side, n in zip(size, m.shape[2:])
    )
    return rows @ m @ columns.T


@pytest.mark.network
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains_every_parameter(options):
    net, (images, labels) = open_gammas(small(backbone=LIGHT, **options)), batch()
    losses = net(images, labels)
    names = {"cross_entropy"} | ({"auxiliary"} if options.get("auxiliary", True) else set())
    names |= {"parallel": {"spatial", "channel"}, "sequential": {"channel"}}.get(
        options.get("dual"), set()
    )
    assert set(losses) == names
    assert all(
        loss.shape == () and loss.dtype == torch.float32 and loss > 0 for loss in losses.values()
    )
    sum(losses.values()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.network
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_have_the_size_of_any_image_alone_or_in_a_batch(options):
    net = open_gammas(small(**options)).eval()
    for size in ((65, 97), (48, 33)):
        images, _ = batch(2, *size)
        with torch.no_grad():
            logits, alone = net(images), net(images[1:])
        assert logits.shape == (2, 5, *size) and logits.dtype == torch.float32
        assert logits.std() > 0
        torch.testing.assert_close(alone, logits[1:], rtol=1e-3, atol=1e-4)


@pytest.mark.network
def test_logits_and_losses_are_float32_under_autocast():
    net, (images, labels) = small().eval(), batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, losses = net(images), net(images, labels)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        torch.testing.assert_close(
            losses["cross_entropy"], net(images, labels)["cross_entropy"], rtol=0.02, atol=0
        )


@pytest.mark.network
@pytest.mark.parametrize(
    "stride, decoder, wide, size",
    [
        (8, False, 57, (9, 8)),
        (16, False, 65, (5, 5)),
        (32, False, 65, (3, 3)),
        (16, True, 65, (17, 17)),
    ],
)
def test_logits_at_pixel_i_times_stride_are_the_1x1_classifiers_of_position_i(
    stride, decoder, wide, size
):
    net, image = small(7, stride, decoder=decoder).eval(), torch.randn(1, 3, 58, 50)
    features, given = torch.randn(1, 256, *size), recorded(net.backbone.body, "input")
    shapes = []
    net.classifier.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape) or features)
    with torch.no_grad():
        logits = net(image)
        expected = torch.einsum("kc,nchw->nkhw", net.classifier.weight[:, :, 0, 0], features)
        expected += net.classifier.bias.view(7, 1, 1)
    assert shapes == [features.shape]
    # continued to k * stride + 1 pixels: the last row and the last column are repeated
    assert torch.equal(
        given[0],
        image[:, :, torch.arange(65).clamp(max=57)][:, :, :, torch.arange(wide).clamp(max=49)],
    )
    step = 4 if decoder else stride
    torch.testing.assert_close(
        logits[:, :, ::step, ::step],
        expected[:, :, : -(-58 // step), : -(-50 // step)],
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(logits, at_pixels(expected, step, (58, 50)), rtol=1e-4, atol=1e-5)


@pytest.mark.network
def test_decoder_puts_the_features_at_their_pixels_of_the_fine_map():
    net = small(decoder=True).eval()
    coarse, fine, fused = (
        recorded(net.head),
        recorded(net.decoder.low),
        recorded(net.decoder.fuse, "input"),
    )
    with torch.no_grad():
        net(torch.randn(1, 3, 40, 65))
    assert coarse[0].shape == (1, 256, 4, 5) and fused[0].shape == (1, 304, 13, 17)
    torch.testing.assert_close(fused[0][:, :256], at_pixels(coarse[0], 4, (13, 17)))
    assert torch.equal(fused[0][:, 256:], fine[0])


@pytest.mark.network
@pytest.mark.parametrize(
    "options", [dict(), dict(attention="self"), dict(channelization=False, se=True)], ids=str
)
def test_a_training_step_takes_one_image(options):
    net, (images, labels) = small(**options), batch(1, 33, 49)
    for query in filter(None, (net.head.attention.theta, net.head.attention.phi)):
        torch.nn.init.constant_(
            query[1].weight, 0.1
        )  # else the maps of twelve random positions are the identity, to rounding
    before, reduced = (
        {name: p.detach().clone() for name, p in net.named_parameters()},
        recorded(net.head.reduce),
    )
    sum(net(images, labels).values()).backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert reduced[0].shape == (1, 512, 3, 4)
    assert all(p.isfinite().all() for p in net.parameters())
    same = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    # At the start `after` is the identity, whose batch norm undoes the scale of each value channel.
    # What the image level adds to all positions of one image, the norm of `project` takes off.
    level = {f"head.image_level.1.{name}" for name in ("weight", "bias")}
    assert same <= {"head.attention.g.1.weight"} | level


@pytest.mark.network
def test_resnet_has_multi_grid_1_2_4_and_others_build_without():
    layer4 = caa.build(3, "resnet50", output_stride=16).backbone.body.layer4
    assert [layer4.get_submodule(str(i)).conv2.dilation for i in range(3)] == [
        (2, 2),
        (4, 4),
        (8, 8),
    ]
    net = caa.build(3, "mobilenet_v2", output_stride=16).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 40, 33)).shape == (1, 3, 40, 33)


@pytest.mark.network
def test_image_level_branch_adds_the_same_to_every_position():
    head, x = caa.CAA(8).eval(), 10 * torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        assert head(x).std(dim=(2, 3)).max() > 1e-3
        head.project[0].weight[:, :512] = 0  # what comes from the attention
        y = head(x)
        conv = head.image_level[1]
        assert conv.bias.abs().max() > 0
        level = (head.reduce(x).mean((2, 3)) @ conv.weight[:, :, 0, 0].T + conv.bias).clamp(
            min=0
        )  # no batch norm
        expected = F.relu(
            head.project[1]((level @ head.project[0].weight[:, 512:, 0, 0].T)[:, :, None, None])
        )
    assert y.shape == (2, 256, 5, 6) and y.max() > 0
    torch.testing.assert_close(y, expected.expand_as(y), rtol=1e-4, atol=1e-5)


@pytest.mark.network
def test_squeeze_and_excitation_scales_what_the_attention_gives():
    head, x = caa.CAA(8, channelization=False, se=True).eval(), torch.randn(1, 8, 5, 6)
    attended, excited = recorded(head.attention), recorded(head.after, "input")
    with torch.no_grad():
        head(x)
        scale = torch.sigmoid(
            head.se.fc2(F.relu(head.se.fc1(attended[0].mean((2, 3), keepdim=True))))
        )
    torch.testing.assert_close(excited[0], scale * attended[0])


# ------------------------------------------------------------------- layers as literal compositions


def settled(net):
    """`net` in double, in evaluation mode, its batch norms and gammas far from where they start."""
    net = net.double().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for x, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                torch.nn.init.uniform_(x, low, high)
    return open_gammas(net)


def layer(net, name, x, kernel, relu=True):
    """Convolution without bias, batch norm, ReLU: with the weights of `net` at `name`."""
    state = {key: value for key, value in net.state_dict().items() if key.startswith(name + ".")}
    weight, gamma, beta, mean, var, _ = state.values()
    assert weight.shape[2:] == (kernel, kernel)
    y = F.conv2d(x, weight, padding=kernel // 2)
    mean, var, gamma, beta = (v[:, None, None] for v in (mean, var, gamma, beta))
    y = (y - mean) / torch.sqrt(var + 1e-5) * gamma + beta
    return y.clamp(min=0) if relu else y


def literal_gate(net, name, pooled, slope=0.2):
    """The gate of Eqs. (3.9), (3.10) with its weights at `name`."""
    *hidden, last = [v for key, v in net.state_dict().items() if key.startswith(name + ".")]
    for weight in hidden:
        pooled = pooled @ weight.T
        pooled = torch.where(pooled > 0, pooled, slope * pooled)
    return 1 / (1 + torch.exp(-pooled @ last.T))


def literal_axial(net, name, x, gated=True, released=False, slope=0.2):
    """Eq. (3.11), the whole of an axial SpatialAttention, written with the printed indices."""
    H, W = x.shape[2:]
    theta, phi = (layer(net, f"{name}.{q}", x, 1, relu=released) for q in ("theta", "phi"))
    g = layer(net, f"{name}.g", x, 1)
    A_col = torch.softmax(torch.einsum("bcij,bcmj->bijm", theta, theta), dim=-1)  # Eq. (3.3)
    A_row = torch.softmax(torch.einsum("bcij,bcin->bijn", phi, phi), dim=-1)  # Eq. (3.4)
    alpha = torch.einsum("bijm,bcmj->bcijm", A_col, g)  # Eq. (3.6)
    if gated:
        pooled = alpha.sum((3, 4)).mT / (H * W)  # [N, H, C]
        alpha = literal_gate(net, f"{name}.gate_col", pooled, slope).mT[..., None, None] * alpha
    beta = torch.einsum("bijn,bcin->bcijn", A_row, alpha.sum(4))  # Eq. (3.7)
    if gated:
        pooled = beta.sum((2, 4)).mT / (H * W)  # [N, W, C]
        gate = literal_gate(net, f"{name}.gate_row", pooled, slope).mT
        beta = gate[:, :, None, :, None] * beta
    return beta.sum(4)


@pytest.mark.network
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (1, 4), (3, 1)])
def test_spatial_attention_layer_by_layer(gated, released, size):
    net = caa.SpatialAttention(6, "axial", gated, query_channels=4, released=released)
    net, x = settled(net), torch.randn(2, 6, *size, dtype=torch.float64)
    torch.testing.assert_close(net(x), literal_axial(Prefixed(net), "a", x, gated, released))


class Prefixed:
    """The state dict of a module as if it were the submodule "a"."""

    def __init__(self, net):
        self.net = net

    def state_dict(self):
        return {f"a.{key}": value for key, value in self.net.state_dict().items()}


@pytest.mark.network
@pytest.mark.parametrize("options", [dict(), dict(se=True, channelization=False)], ids=str)
def test_head_layer_by_layer(options):
    net, x = settled(caa.CAA(5, width=7, layers=2, **options)), torch.randn(2, 5, 3, 4).double()
    r = layer(net, "reduce", x, 3)
    y = literal_axial(net, "attention", r, options.get("channelization", True))
    if options:
        w1, b1, w2, b2 = (v for key, v in net.state_dict().items() if key.startswith("se."))
        assert w1.shape[:2] == (32, 512)  # SENet's reduction
        squeezed = (y.mean((2, 3)) @ w1[:, :, 0, 0].T + b1).clamp(min=0)
        excited = 1 / (1 + torch.exp(-(squeezed @ w2[:, :, 0, 0].T + b2)))
        y = y * excited[..., None, None]
    y = layer(net, "after", y, 1)
    conv = net.image_level[1]
    level = (r.mean((2, 3)) @ conv.weight[:, :, 0, 0].T + conv.bias).clamp(min=0)  # no batch norm
    joined = torch.cat([y, level[..., None, None].expand(-1, -1, 3, 4)], dim=1)
    torch.testing.assert_close(net(x), layer(net, "project", joined, 1))


@pytest.mark.network
def test_without_attention_the_head_is_the_rest_of_it():
    net, x = settled(caa.CAA(5, None)), torch.randn(2, 5, 3, 4).double()
    r = layer(net, "reduce", x, 3)
    conv = net.image_level[1]
    level = (r.mean((2, 3)) @ conv.weight[:, :, 0, 0].T + conv.bias).clamp(min=0)
    joined = torch.cat([layer(net, "after", r, 1), level[..., None, None].expand(-1, -1, 3, 4)], 1)
    torch.testing.assert_close(net(x), layer(net, "project", joined, 1))
    whole = small(attention=None).eval()
    assert not [name for name in whole.state_dict() if name.startswith("head.attention")]
    assert whole.figures(torch.randn(3, 40, 40)) == {}
    for options in (dict(attention=None), dict(se=True)):
        with pytest.raises(ValueError, match="dual has attention='axial' or 'self', and no se"):
            small(dual="parallel", **options)


@pytest.mark.network
@pytest.mark.parametrize("design", ["parallel", "sequential"])
def test_dual_attention_layer_by_layer(design):
    net, x = settled(caa.DualAttention(5, 3, design)), torch.randn(2, 5, 3, 4).double()

    def channel_step(y):
        X = y.flatten(2)
        A = torch.softmax(torch.einsum("bcp,bdp->bcd", X, X), dim=-1)
        return y + torch.einsum("bcd,bdp->bcp", A, X).reshape(y.shape)

    def spatial_step(y):
        return y + literal_axial(net, "attention", y, gated=False)

    def logits(name, y):
        dropout, conv = getattr(net, name)
        assert dropout.p == 0.1 and conv.kernel_size == (1, 1)
        return torch.einsum("kc,bchw->bkhw", conv.weight[:, :, 0, 0], y) + conv.bias[:, None, None]

    features, branches = net(x)
    if design == "parallel":
        spatial = layer(net, "after", spatial_step(layer(net, "reduce", x, 3)), 3)
        channel = channel_step(layer(net, "reduce_channel", x, 3))
        channel = layer(net, "after_channel", channel, 3)
        expected = spatial + channel
        torch.testing.assert_close(branches["spatial"], logits("spatial_logits", spatial))
    else:
        channel = channel_step(layer(net, "reduce", x, 3))
        expected = layer(net, "after", spatial_step(channel), 3)
    torch.testing.assert_close(branches["channel"], logits("channel_logits", channel))
    torch.testing.assert_close(features, expected)


@pytest.mark.network
def test_classifiers_have_dropout_of_0_1_and_the_auxiliary_a_1x1_layer_before():
    net = settled(small())
    assert net.drop.p == 0.1 and net.auxiliary[1].p == 0.1
    given, seen = recorded(net.auxiliary, "input"), recorded(net.auxiliary)
    dropped, classified = recorded(net.drop), recorded(net.classifier, "input")
    head = recorded(net.head)
    images, labels = batch()
    with torch.no_grad():
        net(images.double(), labels)
    assert given[0].shape[1] == 512 and dropped[0] is classified[0]
    assert torch.equal(dropped[0], head[0])
    conv = net.auxiliary[2]
    hidden = layer(net.auxiliary, "0", given[0], 1)
    assert hidden.shape[1] == 256
    expected = torch.einsum("kc,bchw->bkhw", conv.weight[:, :, 0, 0], hidden)
    torch.testing.assert_close(seen[0], expected + conv.bias[:, None, None])


@pytest.mark.network
@pytest.mark.parametrize("size", [(1, 4, 7, 1), (2, 4, 7, 1), (2, 4, 1, 7), (2, 4, 5, 3)], ids=str)
@pytest.mark.parametrize("attention", ["axial", "self"])
@pytest.mark.parametrize("channelization", [True, False])
def test_gradients_of_spatial_attention_on_maps_one_position_wide(size, attention, channelization):
    # PyTorch's batch norm on the CPU misreads a permuted gradient of such a map
    gate = dict(layers=1, width=3) if channelization else {}
    net = caa.SpatialAttention(4, attention, channelization, query_channels=3, **gate).double()
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in net.named_parameters()))

    def run(x, *parameters):
        net.train()
        return torch.func.functional_call(net, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.network
@pytest.mark.parametrize("attention, queries", [("axial", 2), ("self", 1)])
def test_the_norms_of_the_queries_receive_contiguous_gradients(attention, queries):
    net, strides = caa.SpatialAttention(4, attention, query_channels=3), []
    for query in filter(None, (net.theta, net.phi)):
        query[1].register_full_backward_pre_hook(lambda _, g: strides.append(g[0].stride()))
    net(torch.randn(2, 4, 5, 7)).square().sum().backward()
    assert strides == [(105, 35, 7, 1)] * queries


@pytest.mark.network
@pytest.mark.parametrize("activation, slope", [("leaky_relu", 0.2), ("relu", 0.0)])
def test_activation_is_the_gates(activation, slope):
    net = settled(caa.SpatialAttention(6, query_channels=4, layers=2, activation=activation))
    for gate in (net.gate_col, net.gate_row):
        for fc in gate.fc:
            torch.nn.init.normal_(fc.weight)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x), literal_axial(Prefixed(net), "a", x, slope=slope))
    reached = small(activation=activation).head.attention
    assert reached.gate_col.slope == reached.gate_row.slope == slope
    for wrong in (dict(activation="gelu"), dict(channel_layers=0), dict(channel_width=0)):
        with pytest.raises(ValueError, match="at least one layer and channel, 'leaky_relu' or"):
            small(**wrong)


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.network
@pytest.mark.parametrize("dual", [None, "parallel", "sequential"])
def test_losses_are_the_means_over_labelled_pixels_with_the_auxiliary_at_0_4(dual):
    net, (images, labels) = open_gammas(small(dual=dual)).eval(), batch()
    labels[:, 20:40] = 255
    labels[1] = 2  # so that the images have different numbers of labelled pixels
    seen = {"cross_entropy": recorded(net.classifier), "auxiliary": recorded(net.auxiliary)}
    if dual == "parallel":
        seen["spatial"] = recorded(net.head.spatial_logits)
    if dual:
        seen["channel"] = recorded(net.head.channel_logits)
    with torch.no_grad():
        losses = net(images, labels)
    assert set(losses) == set(seen)
    for name, loss in losses.items():
        log_p = at_pixels(seen[name][0], 16, (64, 48)).log_softmax(1)
        n, i, j = (labels != 255).nonzero(as_tuple=True)
        weight = 0.4 if name == "auxiliary" else 1
        torch.testing.assert_close(loss, -weight * log_p[n, labels[n, i, j], i, j].mean())


@pytest.mark.network
@pytest.mark.parametrize("dual", [None, "parallel"])
def test_ignored_pixels_pull_on_no_logits(dual, monkeypatch):
    net, (images, labels) = small(dual=dual), batch()
    labels[0, :30] = labels[1, :, 10:] = 255
    upsampled, plain = [], net.backbone.upsample

    def upsample(*arguments):
        upsampled.append(plain(*arguments))
        upsampled[-1].retain_grad()
        return upsampled[-1]

    monkeypatch.setattr(net.backbone, "upsample", upsample)
    losses = net(images, labels)
    sum(losses.values()).backward()
    assert len(upsampled) == len(losses) == (4 if dual else 2)
    for logits in upsampled:
        pull = logits.grad.abs().sum(1)
        assert (pull[labels == 255] == 0).all() and (pull[labels != 255] > 0).all()


@pytest.mark.network
@pytest.mark.parametrize("dual", [None, "parallel", "sequential"])
def test_no_labelled_pixel_gives_zero_losses_and_zero_gradients(dual):
    net, (images, labels) = open_gammas(small(dual=dual)), batch()
    losses = net(images, torch.full_like(labels, 255))
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all((p.grad == 0).all() for p in net.parameters())  # False also for NaN


@pytest.mark.network
@pytest.mark.parametrize("name", ["cross_entropy", "auxiliary"])
def test_each_loss_trains_the_backbone(name):
    net, (images, labels) = small(decoder=True), batch()
    net(images, labels)[name].backward()
    assert all(p.grad.abs().max() > 0 for p in net.backbone.parameters())
    reached = {key for key, p in net.named_parameters() if p.grad is not None}
    assert any(key.startswith("head") for key in reached) == (name == "cross_entropy")


# ----------------------------------------------------------------------------------- dual attention


@pytest.mark.network
def test_sequential_branch_trains_only_its_own_logits():
    net, (images, labels) = open_gammas(small(dual="sequential")), batch()
    net(images, labels)["channel"].backward()
    trained = {
        name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert trained == {"head.channel_logits.1.weight", "head.channel_logits.1.bias"}


@pytest.mark.network
def test_parallel_branches_train_their_own_side():
    net, (images, labels) = open_gammas(small(dual="parallel")), batch()
    net(images, labels)["channel"].backward()
    trained = {
        name
        for name, p in net.head.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    assert {name.split(".")[0] for name in trained} == {
        "reduce_channel", "gamma_channel", "after_channel", "channel_logits",
    }  # fmt: skip
    assert net.backbone.body.conv1.weight.grad.abs().max() > 0


@pytest.mark.network
def test_parallel_features_are_the_sum_of_the_branches():
    net = open_gammas(small(dual="parallel")).eval()
    branches = [
        recorded(layer, "input") for layer in (net.head.spatial_logits, net.head.channel_logits)
    ]
    features = recorded(net.classifier, "input")
    with torch.no_grad():
        net(torch.randn(1, 3, 64, 48))
    assert not torch.allclose(branches[0][0], branches[1][0])
    torch.testing.assert_close(features[0], branches[0][0] + branches[1][0])


@pytest.mark.network
def test_sequential_spatial_attention_reads_what_channel_attention_gives():
    net = open_gammas(small(dual="sequential")).eval()
    reduced, channel = recorded(net.head.reduce), recorded(net.head.channel_logits, "input")
    attended, features = recorded(net.head.attention), recorded(net.classifier, "input")
    with torch.no_grad():
        net(torch.randn(1, 3, 64, 48))
        torch.testing.assert_close(channel[0], net.head.channel(reduced[0]))
        torch.testing.assert_close(attended[0], net.head.attention(channel[0]))
        torch.testing.assert_close(features[0], net.head.after(channel[0] + attended[0]))
    assert not torch.allclose(channel[0], reduced[0])


@pytest.mark.network
@pytest.mark.parametrize("design", ["parallel", "sequential"])
def test_dual_attention_is_absent_at_first_and_can_be_learned(design):
    net, x = caa.DualAttention(8, 3, design), torch.randn(2, 512, 3, 4)
    assert torch.equal(net.spatial(x), x) and torch.equal(net.channel(x), x)
    (net.spatial(x) * x + net.channel(x) * x).sum().backward()
    assert net.gamma_spatial.grad != 0 and net.gamma_channel.grad != 0
    open_gammas(net)
    torch.testing.assert_close(net.spatial(x), x + net.attention(x))


@pytest.mark.network
@pytest.mark.parametrize("attention", ["axial", "self"])
def test_dual_attention_has_no_gates_and_either_attention(attention):
    net = small(dual="parallel", attention=attention)
    assert not [name for name, _ in net.named_parameters() if "gate" in name]
    maps = caa.attended(net.head.attention.eval(), torch.randn(1, 512, 3, 4), 0, 0)
    assert ("attention" in maps) == (attention == "self")


# ------------------------------------------------------------------------------------------ figures


@pytest.mark.network
@pytest.mark.parametrize(
    "pixel, cell",
    [
        ((0, 0), (0, 0)),
        ((59, 0), (4, 0)),
        ((7, 89), (0, 6)),
        ((8, 23), (1, 1)),
        ((55, 24), (3, 2)),
        (None, (2, 3)),
    ],
)
def test_figures_show_the_column_and_row_of_the_position_nearest_to_the_pixel(pixel, cell):
    net, image = (
        small().eval(),
        torch.randn(3, 60, 90),
    )  # continued to 65 x 97: 5 x 7 positions at stride 16
    given = recorded(net.head.attention, "input")
    figures = net.figures(image, pixel)
    ends = ": attention of the marked pixel"
    figures = {name: figure for name, figure in figures.items() if "gates" not in name}
    assert set(figures) == {f"{name}{ends}" for name in ("column step", "row step", "both steps")}
    with torch.no_grad():
        net(image[None])
        maps = caa.attended(net.head.attention, given[-1], *cell)
    assert given[-1].shape == (1, 512, 5, 7)
    # position i is nearest to the pixels 16 i - 8 … 16 i + 7
    rows, columns = (
        torch.arange(5).repeat_interleave(16)[8:68],
        torch.arange(7).repeat_interleave(16)[8:98],
    )
    for name, figure in figures.items():
        assert (
            figure.shape == (60, 90) and figure.dtype == torch.float32 and not figure.requires_grad
        )
        assert torch.equal(
            figure, maps[name.removesuffix(" of the marked pixel")][rows][:, columns]
        )
    assert maps["column step: attention"].sum().item() == pytest.approx(1)
    own_row, own_column = (
        (rows == cell[0])[:, None].expand(60, 90),
        (columns == cell[1]).expand(60, 90),
    )
    assert torch.equal(figures[f"column step{ends}"] > 0, own_column)
    assert torch.equal(figures[f"row step{ends}"] > 0, own_row)
    assert (figures[f"both steps{ends}"] > 0).all()


@pytest.mark.network
@pytest.mark.parametrize("dual", [None, "parallel"])
def test_figures_are_of_one_image_in_evaluation_mode(dual):
    net, image = small(dual=dual), torch.randn(3, 33, 17)
    with pytest.raises(ValueError, match="evaluation mode"):
        net.figures(image)
    net.eval()
    with pytest.raises(ValueError, match=r"\[2, 3, 33, 17\]"):
        net.figures(torch.stack([image, image]))
    alone = net.figures(image)
    assert all(torch.equal(m, alone[name]) for name, m in net.figures(image[None]).items())


@pytest.mark.network
def test_figures_of_a_pixel_outside_the_image_are_refused():
    net, image = (
        small().eval(),
        torch.randn(3, 33, 18),
    )  # 33 x 33 with its continuation, which is not of the image
    for pixel in ((33, 0), (0, 18), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="33 rows and 18 columns"):
            net.figures(image, pixel)
    attention = list(net.figures(image, (32, 17)).values())[:3]
    assert all(m.shape == (33, 18) for m in attention)


@pytest.mark.network
def test_attended_are_the_weights_of_every_position():
    net = caa.SpatialAttention(4, channelization=False, query_channels=3).double().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    col, row = net.maps(x)
    for i, j in product(range(3), range(5)):
        A_col, A_row = loop_map(net.theta(x), "column"), loop_map(net.phi(x), "row")
        maps = {
            name: torch.zeros(3, 5).double()
            for name in ("column step: attention", "row step: attention", "both steps: attention")
        }
        for m, n in product(range(3), range(5)):
            maps["column step: attention"][m, j] = A_col[0, i, j][m]
            maps["row step: attention"][i, n] = A_row[0, i, j][n]
            maps["both steps: attention"][m, n] = A_row[0, i, j][n] * A_col[0, i, n][m]
        value = torch.zeros(1, 1, 3, 5, dtype=torch.float64, requires_grad=True)
        y = caa.channelized(row, caa.channelized(col, value, None, "column"), None, "row")
        (influence,) = torch.autograd.grad(y[0, 0, i, j], value)
        torch.testing.assert_close(influence[0, 0], maps["both steps: attention"])
        torch.testing.assert_close(caa.attended(net, x, i, j), maps)


@pytest.mark.network
def test_attended_of_self_attention_are_its_weights():
    net = caa.SpatialAttention(4, "self", channelization=False, query_channels=3).double().eval()
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    theta = net.theta(x)
    for i, j in product(range(3), range(5)):
        e = torch.exp((theta * theta[:, :, i : i + 1, j : j + 1]).sum(1))[0]
        torch.testing.assert_close(caa.attended(net, x, i, j), {"attention": e / e.sum()})


@pytest.mark.network
@pytest.mark.parametrize(
    "design, branches", [("parallel", ("spatial", "channel")), ("sequential", ("channel",))]
)
def test_figures_of_dual_attention_are_label_maps_of_its_branches(design, branches):
    net, image = open_gammas(small(dual=design)).eval(), torch.randn(3, 65, 50)
    layers = {name: getattr(net.head, f"{name}_logits") for name in branches}
    seen = {name: recorded(layer) for name, layer in layers.items()}
    with torch.no_grad():
        net(image[None])
        for name, layer in layers.items():  # no class wins everywhere
            layer[1].bias -= seen[name][0].mean((0, 2, 3))
    figures = net.figures(image)
    assert set(figures) == {"prediction", *(f"prediction, {name} branch" for name in branches)}
    assert all(m.shape == (65, 50) and m.dtype == torch.int64 for m in figures.values())
    with torch.no_grad():
        assert torch.equal(figures["prediction"], net(image[None]).argmax(1)[0])
    for name in branches:
        labels = at_pixels(seen[name][1], 16, (65, 50)).argmax(1)[0]
        assert len(labels.unique()) > 1 and torch.equal(
            figures[f"prediction, {name} branch"], labels
        )


@pytest.mark.equation
def test_gates_that_are_drawn_are_those_of_the_channels_that_differ_most_by_hand():
    gates = torch.full((3, 10), 0.5)
    gates[:, 0] = torch.tensor([0.91, 0.92, 0.9])  # large, but alike
    for channel in range(1, 9):
        gates[:, channel] = torch.tensor([0.0, 0.1, 1.0]) * channel / 8
    expected = torch.tensor([[0.0], [0.1], [1.0]]) * torch.arange(8, 0, -1) / 8
    torch.testing.assert_close(caa.most_varied(gates), expected)
    assert caa.most_varied(gates[:1]).isfinite().all()  # one position high


def gated(**options):
    """A network whose gates are far from a constant 1/2."""
    net = small(**options).eval()
    for gate in (net.head.attention.gate_col, net.head.attention.gate_row):
        for fc in gate.fc:
            torch.nn.init.normal_(fc.weight, std=0.3)
    return net


@pytest.mark.network
def test_figures_show_the_gates_beside_the_rows_and_columns_of_the_image():
    net = gated()
    gates = [recorded(net.head.attention.gate_col), recorded(net.head.attention.gate_row)]
    figures = {k: m for k, m in net.figures(torch.randn(3, 60, 81)).items() if "gates" in k}
    what = "the 8 channels that vary most | 0, closed | 1, open"
    assert list(figures) == [
        f"gates of the rows, from left to right {what}",
        f"gates of the columns, from top to bottom {what}",
    ]
    by_row, by_column = figures.values()
    # Extended to 65 x 81. The fifth of the rows 0, 16, … is the nearest of the image's last ones.
    assert gates[0][0].shape == (1, 5, 512) and gates[1][0].shape == (1, 6, 512)
    for figure, gate, length in ((by_row, gates[0], 5), (by_column.T, gates[1], 6)):
        shown = gate[0][0, :length]
        most = shown.std(0, correction=0).argsort(descending=True)[:8]
        assert torch.equal(figure, shown[:, most]) and len(gate) == 1
        assert (figure.std(0, correction=0) > 0).all()


@pytest.mark.network
@pytest.mark.parametrize("backbone, stride", [("resnet18", 16), ("convnext_tiny", 32)])
def test_gates_are_those_of_the_forward_pass_and_analysed_on_the_image_alone(backbone, stride):
    net, images = gated(backbone=backbone, output_stride=stride), torch.randn(2, 3, 60, 40)
    modules = net.head.attention.gate_col, net.head.attention.gate_row
    seen = [recorded(module) for module in modules]
    with torch.no_grad():
        net(images)
        found = net.gates(net.backbone(images)[3])
        (deviations,) = net.analyse([(images, None)]).values()
    # 16: extended to 65 x 49, 5 x 4 positions. 32: to 64 x 64, 2 x 2 patches, all with pixels.
    lengths = (4, 3) if stride == 16 else (2, 2)
    for gate, whole, i in zip(found, seen, (0, 1)):
        assert gate.shape[1] == lengths[i] + (stride == 16) and len(whole) == 3
        torch.testing.assert_close(gate, whole[0])
        own = whole[0][:, : lengths[i]].double()
        within = own.var(1, correction=0).mean().sqrt()
        between = own.mean(1).var(0, correction=0).mean().sqrt()
        torch.testing.assert_close(deviations[:, i], torch.stack([within, between]))
    assert [len(module._forward_hooks) for module in modules] == [1, 1]  # those of this test


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.equation
def test_conflicts_by_hand():
    labels = torch.tensor([[[0, 1, 2]], [[1, 255, 0]]])
    fused = torch.tensor([[[0, 0, 1]], [[0, 0, 2]]])  # wrong at four pixels
    spatial = torch.tensor([[[1, 1, 2]], [[2, 255, 2]]])  # right at two of them
    channel = torch.tensor([[[0, 1, 0]], [[1, 255, 1]]])  # at two, one of them another
    branches = torch.stack([spatial, channel])
    assert caa.conflicts(branches, fused, labels).tolist() == [2, 2, 3, 4]


@pytest.mark.equation
@pytest.mark.parametrize("count", [1, 2])
def test_conflicts_equal_the_loop(count):
    labels = torch.randint(3, (2, 5, 4))
    labels[0, 1:3] = 255
    fused, branches = torch.randint(3, (2, 5, 4)), torch.randint(3, (count, 2, 5, 4))
    expected = [0] * (count + 2)
    for n, i, j in product(range(2), range(5), range(4)):
        if labels[n, i, j] == 255 or fused[n, i, j] == labels[n, i, j]:
            continue
        right = [bool(branches[b, n, i, j] == labels[n, i, j]) for b in range(count)]
        expected = [a + b for a, b in zip(expected, [*right, any(right), True])]
    assert caa.conflicts(branches, fused, labels).tolist() == expected and min(expected) > 0
    assert caa.conflicts(branches, labels, labels).sum() == 0


@pytest.mark.equation
def test_deviations_of_gates_by_hand():
    # Column step, two images of two rows, two channels. Channel 0: 0.1 0.5 and 0.3 0.7; channel 1
    # the same. Within: 0.2 in each. The means are 0.3 and 0.5: 0.1 between them.
    first = torch.tensor([[0.1, 0.5], [0.3, 0.7]])[..., None].expand(2, 2, 2)
    # Row step, one column for channel 0 of 0.2, channel 1 of 0.4 and 0.8: 0, 0.2 between images.
    second = torch.tensor([[[0.2, 0.4]], [[0.2, 0.8]]])
    found = caa.gate_deviations([[first, second]])
    expected = torch.tensor([[0.2, 0.0], [0.1, math.sqrt((0 + 0.04) / 2)]])
    torch.testing.assert_close(found, expected.double())


@pytest.mark.equation
def test_deviations_of_gates_equal_the_loop_over_batches_of_different_sizes():
    shapes = [(2, 4, 6), (1, 3, 1), (3, 5, 2)]  # images, rows, columns
    batches = [[torch.rand(n, h, 3), torch.rand(n, w, 3)] for n, h, w in shapes]
    found = caa.gate_deviations(iter(batches))
    assert found.shape == (2, 2) and found.dtype == torch.float64
    for step in range(2):
        images = [image.double() for batch in batches for image in batch[step]]
        assert len(images) == 6
        within, between = [], []
        for c in range(3):
            means = []
            for image in images:
                line = image[:, c].tolist()
                means.append(sum(line) / len(line))
                within.append(sum((x - means[-1]) ** 2 for x in line) / len(line))
            mean = sum(means) / 6
            between.append(sum((m - mean) ** 2 for m in means) / 6)
        expected = [math.sqrt(sum(v) / len(v)) for v in (within, between)]
        torch.testing.assert_close(found[:, step], torch.tensor(expected).double())


@pytest.mark.equation
def test_gates_that_are_all_the_same_do_not_differ():
    # Rounding makes the mean of these squares lower than the square of the mean.
    batches = [[torch.full((1, 3, 4), 0.03), torch.full((1, 1, 4), 0.12)]] * 38
    assert caa.gate_deviations(batches).tolist() == [[0, 0], [0, 0]]


@pytest.mark.network
def test_analyse_measures_the_gates_of_all_images():
    net = gated()
    pairs = [(torch.randn(n, 3, *size), None) for n, size in ((2, (60, 81)), (1, (33, 40)))]
    seen = [recorded(net.head.attention.gate_col), recorded(net.head.attention.gate_row)]
    with torch.no_grad():
        for images, _ in pairs:
            net(images)
    inside = (4, 6), (3, 3)  # rows, columns at 0, 16, … on the image
    batches = [[seen[step][k][:, : inside[k][step]] for step in range(2)] for k in range(2)]
    ((key, found),) = net.analyse(iter(pairs)).items()
    assert key.partition(": ")[0] == "gates"
    axes = ["within an image, between images", "column step, row step"]
    assert key.split(" | ")[1:] == axes
    torch.testing.assert_close(found, caa.gate_deviations(batches), rtol=1e-3, atol=1e-6)
    assert (found > 1e-4).all()


@pytest.mark.network
@pytest.mark.parametrize(
    "options",
    [dict(channelization=False, se=True), dict(attention="self"), dict(attention=None)],
    ids=str,
)
def test_without_two_gates_there_is_nothing_to_measure_and_no_gate_to_see(options):
    net, (images, labels) = small(**options).eval(), batch(1)
    assert net.analyse([(images, labels)]) == {}
    assert not [name for name in net.figures(images) if "gates" in name]


@pytest.mark.network
@pytest.mark.parametrize(
    "design, branches", [("parallel", ["spatial", "channel"]), ("sequential", ["channel"])]
)
def test_analyse_of_dual_attention_counts_what_a_branch_knew(design, branches):
    net, (images, labels) = open_gammas(small(3, dual=design)).eval(), batch(3, 33, 20, 3)
    labels[:, :9] = 255
    layers = [getattr(net.head, f"{name}_logits")[1] for name in branches] + [net.classifier]
    seen = [recorded(layer) for layer in layers]
    with torch.no_grad():
        net(images)
        for layer, found in zip(layers, seen):  # no class wins everywhere
            layer.bias -= found[0].mean((0, 2, 3))
    right, wrong = [0] * (len(branches) + 1), 0
    for image, label in zip(images, labels):
        figures = net.figures(image)
        for i, j in product(range(33), range(20)):
            if label[i, j] in (255, figures["prediction"][i, j]):
                continue
            known = [
                bool(figures[f"prediction, {b} branch"][i, j] == label[i, j]) for b in branches
            ]
            right = [a + b for a, b in zip(right, [*known, any(known)])]
            wrong += 1
    pairs = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    ((key, found),) = net.analyse(iter(pairs)).items()
    assert key.partition(": ")[0] == "conflicts" and "less is better" in key
    assert key.split(" | ")[1:] == ["share", ", ".join([*branches, "any"])]
    torch.testing.assert_close(found, torch.tensor([right]) / wrong, rtol=0, atol=2 / wrong)
    assert min(right) > 0 and wrong > max(right)


@pytest.mark.system
@pytest.mark.parametrize("options", [dict(), dict(dual="parallel")], ids=str)
def test_the_numbers_are_printed_in_a_table(options, tmp_path, capsys):
    class Pictures(torch.utils.data.Dataset):
        classes, num_classes = ["a", "b"], 2

        def __len__(self):
            return 2

        def __getitem__(self, index):
            label = torch.full((40, 33), index, dtype=torch.uint8)
            return torch.randint(256, (3, 40, 33), dtype=torch.uint8), label

    flags = ["--checkpoint", "x.pt", "--analyse", "--figures", str(tmp_path), "--workers", "0"]
    net, args = small(2, **options).eval(), evaluate.arguments(flags)
    found = evaluate.analyse(net, Pictures(), torch.device("cpu"), args)
    name = "conflicts" if options else "gates"
    lines = capsys.readouterr().out.splitlines()
    title = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
    shown = ["spatial", "channel", "any"] if options else ["column", "step", "row", "step"]
    assert lines[title + 1].split() == shown
    numbers = [f"{x:.3f}" for x in found[name][0]]
    assert lines[title + 2].split()[-len(numbers) :] == numbers
    assert (tmp_path / f"{name}.png").exists()


# -------------------------------------------------------------------------------------------- build


@pytest.mark.network
@pytest.mark.parametrize("backbone, decoder", [("swin_t", False), ("convnext_tiny", True)])
def test_patches_lie_where_they_are_on_what_cannot_be_dilated(backbone, decoder):
    net = caa.build(3, backbone, decoder=decoder).eval()
    caught = []
    net.classifier.register_forward_hook(lambda module, inputs, output: caught.append(output))
    images = torch.randn(1, 3, 65, 40)
    with torch.no_grad():
        logits = net(images)
        stride, size = (4, (24, 16)) if decoder else (8, (12, 8))  # of the image at 96x64
        assert caught[0].shape[2:] == size
        whole = F.interpolate(caught[0], scale_factor=stride, mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, whole[:, :, :65, :40])
        pictures = net.figures(images[0], (7, 39))
        shapes = [tuple(m.shape) for m in pictures.values()]
        # 65 x 40 pixels are the nearest ones of 9 or 3 rows, of 5 or 2 columns.
        gates = [(3, 8), (8, 2)] if decoder and net.stride == 32 else [(9, 8), (8, 5)]
        assert shapes == [(65, 40)] * 3 + gates
        assert pictures["column step: attention of the marked pixel"][:, 31].max() == 0
        assert (
            net.figures(images[0], (7, 39))["column step: attention of the marked pixel"][
                :, 32
            ].max()
            > 0
        )  # pixels 32 to 39 are one patch
        net.auxiliary.register_forward_hook(lambda module, inputs, output: caught.append(output))
        labels = torch.randint(3, (1, 65, 40))
        losses = net(images, labels)
        auxiliary = F.interpolate(caught[-1], scale_factor=8, mode="bilinear", align_corners=False)[
            :, :, :65, :40
        ]
    assert losses["auxiliary"].item() == pytest.approx(
        0.4 * F.cross_entropy(auxiliary, labels).item(), rel=1e-5
    )


@pytest.mark.usefixtures("meta")
@pytest.mark.network
@pytest.mark.parametrize("decoder", [False, True])
def test_the_finest_level_learns_where_the_decoder_reads_it(decoder):
    norms = caa.build(3, "swin_t", decoder=decoder).backbone.norms
    assert [norm.weight.requires_grad for norm in norms] == [decoder, True, True, True]


@pytest.mark.network
@pytest.mark.parametrize("options", [dict(), dict(decoder=True), dict(dual="parallel")], ids=str)
def test_regularized_takes_the_last_convolutions_output_or_the_features_of_dual(options):
    net = small(backbone=LIGHT, **options).eval()
    given = recorded(net.get_submodule(net.regularized), "input")
    classified, features = recorded(net.classifier, "input"), recorded(net.head)
    last = net.decoder.fuse[1] if "decoder" in options else getattr(net.head, "project", None)
    convolved = recorded(last[0]) if last else None
    net.drop.train(last is None)  # so that dual's features differ from what is after dropout
    with torch.no_grad():
        net(torch.randn(1, 3, 64, 48))
    if last:
        assert torch.equal(given[0], convolved[0])
        torch.testing.assert_close(last[1](given[0]).relu(), classified[0])
    else:
        assert given[0] is features[0][0]


@pytest.mark.network
def test_values_and_the_layer_after_start_as_the_identity():
    head = caa.CAA(8)
    for conv in (head.attention.g[0], head.after[0]):
        assert torch.equal(conv.weight[:, :, 0, 0], torch.eye(512))


@pytest.mark.usefixtures("meta")
@pytest.mark.network
def test_unknown_option_lists_the_known_ones_with_their_defaults():
    with pytest.raises(ValueError) as error:
        caa.build(3, "resnet18", heads=8)
    for part in (
        "heads", "attention='axial'", "channelization=True", "channel_layers=5",
        "channel_width=128", "se=False", "dual=None", "released=False", "auxiliary=True",
        "decoder=False", "output_stride=8",
    ):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.usefixtures("meta")
@pytest.mark.network
@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: caa.SpatialAttention(8, attention="rows"), ("'rows'", "'axial'", "'self'")),
        (lambda: caa.CAA(8, attention="rows"), ("'rows'", "'axial'", "'self'")),
        (lambda: caa.DualAttention(8, 3, attention="rows"), ("'rows'", "'axial'", "'self'")),
        (lambda: caa.DualAttention(8, 3, "both"), ("'both'", "'parallel'", "'sequential'")),
        (lambda: caa.build(3, "resnet18", attention="rows"), ("'rows'", "'axial'", "'self'")),
        (lambda: caa.build(3, "resnet18", dual="both"), ("'both'", "'parallel'", "'sequential'")),
    ],
)
def test_wrong_value_is_named_with_the_right_ones(make, named):
    with pytest.raises(ValueError) as error:
        make()
    assert all(part in str(error.value) for part in named)


@pytest.mark.system
@pytest.mark.parametrize(
    "options", [dict(decoder=True), dict(dual="parallel"), dict(attention="self", se=True)], ids=str
)
def test_saved_weights_reproduce_the_outputs(options, tmp_path):
    first, second, (images, labels) = small(**options), small(**options).eval(), batch()
    first(images, labels)  # moves the running means of the batch norms
    first.eval()
    torch.save(first.state_dict(), tmp_path / "net.pt")
    with torch.no_grad():
        assert not torch.equal(first(images), second(images))
        second.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
        assert torch.equal(first(images), second(images))


@pytest.mark.system
def test_build_loads_the_backbones_weights(tmp_path):
    state = small().backbone.body.state_dict()
    torch.save(state, tmp_path / "resnet18.pt")
    loaded = small(weights=tmp_path / "resnet18.pt").backbone.body.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


STATED = {  # the thesis, section by section
    "pascal_context": dict(iterations=40_000, batch_size=16, output_stride=8, backbone="resnet101"),
    "coco_stuff10k": dict(iterations=40_000, batch_size=16, output_stride=8, backbone="resnet101"),
    "cityscapes": dict(iterations=80_000, batch_size=8, crop_size=769, backbone="resnet101"),
    "coco_stuff164k": dict(batch_size=16, backbone="efficientnet_b5"),
}


@pytest.mark.system
@pytest.mark.parametrize("dataset", STATED)
def test_recipes_have_what_sects_3_4_1_to_3_4_5_state(dataset):
    stated = dict(optimizer="sgd", lr=0.01, power=0.9, weights="imagenet") | STATED[dataset]
    recipe = caa.RECIPES[dataset]
    assert {key: recipe[key] for key in stated} == stated
    assert set(caa.RECIPES) - {"shapes"} == set(STATED)  # that of shapes is ours
