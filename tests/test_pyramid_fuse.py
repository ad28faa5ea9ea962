"""pyramid_fuse.py against the definitions and equations of its paper, written here cell by cell."""

import doctest
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import LIGHT, normed, trained

import backbones
import evaluate
import pyramid_fuse as pf

pytestmark = pytest.mark.usefixtures("one_seed")


X = 255
# An 8x8 map: a uniform quarter of class 0, one with a border between 1 and 2, one of class 1 with a
# pixel that is not labelled, one of two classes with one.
MAP = torch.tensor(
    [
        [0, 0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 2, 2, 2],
        [0, 0, 0, 0, 1, 2, 2, 2],
        [1, 1, 1, 1, 2, 2, X, 2],
        [1, 1, 1, X, 2, 2, 2, 0],
        [1, 1, 1, 1, 0, 0, X, X],
        [1, 1, 1, 1, 0, 0, X, X],
    ]
)[None]
STRIDES = (8, 4, 2)


# ------------------------------------------------------------------------------------- ground truth


@pytest.mark.equation
def test_pyramid_labels_by_hand():
    semantic, unity = pf.pyramid_labels(MAP, STRIDES)
    assert unity[0].tolist() == [[[0]]]
    assert semantic[0].tolist() == [[[X]]]
    assert unity[1].tolist() == [[[1, 0], [X, 0]]]
    assert semantic[1].tolist() == [[[0, X], [X, X]]]
    # the finest: the pixel at the lower right of each cell's middle
    assert semantic[2].tolist() == [[[0, 0, 1, 2], [0, 0, 2, 2], [1, X, 2, 0], [1, 1, 0, X]]]
    # App. B for the finest level too: of its cells two hold several classes, two a pixel of 255
    other = pf.pyramid_labels(MAP, STRIDES, "ignore_mixed")
    assert other[0][2].tolist() == [[[0, 0, 1, 2], [0, 0, X, 2], [1, X, 2, X], [1, 1, 0, X]]]
    for found, expected in zip(other[0][:2] + other[1], semantic[:2] + unity, strict=True):
        assert torch.equal(found, expected)


def cell_by_cell(labels, strides, finest="pixel"):
    """App. B's three cases."""
    N, H, W = labels.shape
    semantic, unity = [], []
    for stride in strides:
        y = torch.full((N, H // stride, W // stride), X)
        u = y.clone()
        for n, i, j in product(range(N), range(H // stride), range(W // stride)):
            cell = (
                labels[n, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
                .flatten()
                .tolist()
            )
            classes = set(cell) - {X}
            if len(classes) > 1:
                u[n, i, j] = 0
            elif X not in cell:
                u[n, i, j], y[n, i, j] = 1, cell[0]
        semantic.append(y)
        unity.append(u)
    if finest == "pixel":
        middle = strides[-1] // 2
        semantic[-1] = labels[:, middle :: strides[-1], middle :: strides[-1]]
    return semantic, unity[:-1]


@pytest.mark.equation
@pytest.mark.parametrize("finest", ["pixel", "ignore_mixed"])
@pytest.mark.parametrize("strides", [(32, 16, 8, 4), (32, 4), (16, 8, 4), (32, 16, 8, 1)])
def test_pyramid_labels_are_the_three_cases_of_appendix_b(strides, finest):
    labels = torch.randint(3, (2, 8, 12)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, 32:, 32:64] = 1
    labels[0, torch.randint(64, (9,)), torch.randint(96, (9,))] = X
    labels[1, :8] = X
    labels[1, 32:, 64:] = 2
    labels[1, 40, 70] = X
    both = (f(labels, strides, finest) for f in (pf.pyramid_labels, cell_by_cell))
    for found, expected in zip(*both):
        assert len(found) == len(expected) and all(
            torch.equal(a, b) for a, b in zip(found, expected)
        )
    assert {0, 1, 255} == set(pf.pyramid_labels(labels, strides)[1][0].flatten().tolist())


@pytest.mark.equation
def test_labels_of_another_size_are_refused():
    with pytest.raises(ValueError, match="labels of 32x48: expected multiples of the stride 32"):
        pf.pyramid_labels(torch.zeros(1, 32, 48, dtype=torch.int64))


# -------------------------------------------------------------------------------------- relabelling


@pytest.mark.equation
def test_relabelling_by_hand():
    semantic, unity = cell_by_cell(MAP, STRIDES)
    # the whole is a mix-cell; of its quarters the first is a true positive, the second and third
    # false positives
    prob = [torch.tensor([[[0.95]]]), torch.tensor([[[0.9, 0.95], [0.99, 0.1]]])]
    found, u = pf.relabel(semantic, unity, prob)
    assert found[0].tolist() == semantic[0].tolist() and found[1].tolist() == semantic[1].tolist()
    assert u[0].tolist() == [[[0]]] and u[1].tolist() == unity[1].tolist()
    assert found[2].tolist() == [[[X, X, 1, 2], [X, X, 2, 2], [1, X, 2, 0], [1, 1, 0, X]]]
    missed, _ = pf.relabel(
        semantic, unity, [prob[0], torch.zeros(1, 2, 2)]
    )  # a false negative: the finer level must learn it
    assert torch.equal(missed[2], semantic[2])
    simple, _ = pf.relabel(semantic, unity, [prob[0], torch.zeros(1, 2, 2)], policy="ground_truth")
    assert torch.equal(simple[2], found[2])
    naive, _ = pf.relabel(semantic, unity, prob, policy="naive")
    assert all(torch.equal(a, b) for a, b in zip(naive, semantic))


def ancestors(i, j, level, strides):
    """The cells above (i, j) of a level, coarse to fine: (level, row, column)."""
    return [
        (k, i * strides[level] // strides[k], j * strides[level] // strides[k])
        for k in range(level)
    ]


def big_scene():
    strides = (32, 16, 8, 4)
    labels = torch.randint(2, (2, 4, 6)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels[:, 32:, :32] = 2
    labels[0, 3, 5] = labels[1, 40, 70] = X
    labels[:, ::7, 50] = 3
    semantic, unity = cell_by_cell(labels, strides)
    return strides, semantic, unity, [torch.rand(u.shape) for u in unity]


@pytest.mark.equation
@pytest.mark.parametrize("policy", pf.POLICIES)
def test_relabelling_looks_at_every_ancestor(policy):
    strides, semantic, unity, prob = big_scene()
    found, kept = pf.relabel(semantic, unity, prob, 0.5, policy)
    changed = 0
    for level in range(4):
        for n, i, j in product(*map(range, semantic[level].shape)):
            done = False
            for k, a, b in ancestors(i, j, level, strides):
                settled = unity[k][n, a, b] == 1 and (
                    policy == "ground_truth" or prob[k][n, a, b] >= 0.5
                )
                done = done or (settled and policy != "naive")
            assert found[level][n, i, j] == (X if done else semantic[level][n, i, j])
            if level < 3:
                assert kept[level][n, i, j] == (X if done else unity[level][n, i, j])
            changed += bool(done)
    assert (changed > 0) == (policy != "naive")


@pytest.mark.equation
def test_nothing_below_a_dont_care_cell_is_relabelled():
    labels = torch.zeros(1, 32, 32, dtype=torch.int64)
    labels[0, 0, 0] = X
    semantic, unity = cell_by_cell(labels, (32, 16, 8, 4))
    prob = [torch.ones(u.shape) for u in unity]
    for policy in pf.POLICIES:
        found, kept = pf.relabel(semantic, unity, prob, policy=policy)
        assert found[1][0, 0, 0] == X and kept[1][0, 0, 0] == X  # its own ground truth
        assert torch.equal(found[3][0, :2, :2], semantic[3][0, :2, :2]) and found[3][0, 0, 0] == 0


@pytest.mark.equation
def test_relabelling_has_a_threshold_of_nine_tenths():
    semantic, unity = cell_by_cell(torch.zeros(1, 8, 16, dtype=torch.int64), (8, 4))
    prob = [torch.tensor([[[0.9, 0.8999]]])]
    assert pf.relabel(semantic, unity, prob)[0][1].tolist() == [[[X, X, 0, 0]] * 2]


@pytest.mark.equation
def test_fusion_has_a_threshold_of_nine_tenths():
    prob = [torch.tensor([[[0.9, 0.8999]]])]
    assert pf.chosen_level(prob, torch.zeros(1, 2, 4)).tolist() == [[[0, 0, 1, 1]] * 2]
    levels = [torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 2, 4)]
    assert pf.fuse(levels, prob).tolist() == [[[[0, 0, 1, 1]] * 2]]


@pytest.mark.equation
def test_unknown_policy_is_named():
    semantic, unity = cell_by_cell(MAP, STRIDES)
    with pytest.raises(
        ValueError, match="policy='best': it is one of 'true_positive', 'ground_truth', 'naive'"
    ):
        pf.relabel(semantic, unity, [torch.zeros(u.shape) for u in unity], policy="best")


# ------------------------------------------------------------------------------------------- fusion


@pytest.mark.equation
def test_eq_2_by_hand():
    levels = [torch.full((1, 1, 2**i, 2**i), float(i)) for i in range(3)]
    prob = [torch.tensor([[[0.2]]]), torch.tensor([[[0.9, 0.89], [0.0, 1.0]]])]
    assert pf.fuse(levels, prob)[0, 0].tolist() == [
        [1, 1, 2, 2],
        [1, 1, 2, 2],
        [2, 2, 1, 1],
        [2, 2, 1, 1],
    ]
    prob[0][:] = 0.9  # at least τ: the coarsest cell is taken
    assert pf.fuse(levels, prob).unique().tolist() == [0]


@pytest.mark.equation
def test_eq_2_equals_its_sum_with_gradients():
    L, tau = 4, 0.6
    semantic = [
        torch.randn(2, 3, 2**i, 3 * 2**i, dtype=torch.float64, requires_grad=True) for i in range(L)
    ]
    prob = [torch.rand(2, 2**i, 3 * 2**i) for i in range(L - 1)] + [torch.ones(2, 8, 24)]
    expected = torch.zeros(2, 3, 8, 24, dtype=torch.float64)
    for i, j in product(range(8), range(24)):
        for n in range(2):
            for level in range(L):
                by = 2 ** (L - 1 - level)
                here = prob[level][n, i // by, j // by] >= tau
                before = all(
                    prob[k][n, i // 2 ** (L - 1 - k), j // 2 ** (L - 1 - k)] < tau
                    for k in range(level)
                )
                if here and before:
                    expected[n, :, i, j] = (
                        expected[n, :, i, j] + semantic[level][n, :, i // by, j // by]
                    )
    found = pf.fuse(semantic, prob[:-1], tau)
    assert torch.equal(found, expected)
    pull = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * pull).sum(), semantic),
        torch.autograd.grad((expected * pull).sum(), semantic),
    ):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0


@pytest.mark.equation
def test_thresholds_at_their_ends():
    strides, _, unity, prob = big_scene()
    semantic = [torch.randn(2, 3, *u.shape[1:]) for u in unity] + [torch.randn(2, 3, 16, 24)]
    coarsest = semantic[0].repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(pf.fuse(semantic, prob, 0.0), coarsest)
    assert torch.equal(pf.fuse(semantic, prob, 1.01), semantic[-1])
    assert pf.chosen_level(prob, semantic[-1], 0.0).unique().tolist() == [0]
    assert pf.chosen_level(prob, semantic[-1], 1.01).unique().tolist() == [3]


@pytest.mark.equation
def test_the_example_in_the_docstring_runs():
    failed, attempted = doctest.testmod(pf)
    assert failed == 0 and attempted > 0


# --------------------------------------------------------------------------------------------- loss


def logit(p):
    return torch.logit(torch.tensor(p, dtype=torch.float64))


@pytest.mark.equation
def test_eq_1_by_hand():
    quarter = torch.tensor([[[[0.25]], [[0.75]]]]).log()  # the second level: of class 0 twice 1/8
    eighth = torch.tensor([[[[0.125, 0.5]], [[0.875, 0.5]]]]).log()
    semantic_logits = [quarter, eighth.expand(1, 2, 1, 2)]
    semantic = [torch.tensor([[[0]]]), torch.tensor([[[1, X]]])]
    unity_logits = [logit([[[0.2]]]), logit([[[0.5, 0.125]]])]
    unity = [torch.tensor([[[1]]]), torch.tensor([[[X, 0]]])]
    losses = pf.pyramid_loss(semantic_logits, unity_logits, semantic, unity)
    assert losses["semantic"].item() == pytest.approx((math.log(4) + math.log(8 / 7)) / 2, rel=1e-5)
    assert losses["unity"].item() == pytest.approx((math.log(5) + math.log(8 / 7)) / 2, rel=1e-5)


@pytest.mark.equation
def test_eq_1_equals_torchs_losses_with_gradients():
    semantic_logits = [torch.randn(2, 3, s, s, requires_grad=True) for s in (1, 2, 4, 8)]
    unity_logits = [torch.randn(2, s, s).requires_grad_() for s in (1, 2, 4)]
    semantic = [torch.randint(3, (2, s, s)) for s in (1, 2, 4, 8)]
    unity = [torch.randint(2, (2, s, s)) for s in (1, 2, 4)]
    semantic[3][0], unity[2][1, 0] = X, X
    losses = pf.pyramid_loss(semantic_logits, unity_logits, semantic, unity)
    ce = sum(F.cross_entropy(a, b, ignore_index=X) for a, b in zip(semantic_logits, semantic)) / 4
    pairs = [(u.sigmoid()[b != X], b[b != X].float()) for u, b in zip(unity_logits, unity)]
    bce = sum(F.binary_cross_entropy(p, b) for p, b in pairs) / 3  # of the probabilities Û
    for name, expected, inputs in (("semantic", ce, semantic_logits), ("unity", bce, unity_logits)):
        torch.testing.assert_close(losses[name], expected)
        found, expected = (torch.autograd.grad(y, inputs) for y in (losses[name], expected))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.equation
def test_all_ignored_is_0_and_certain_mistakes_keep_their_gradient():
    logits, u = [torch.randn(1, 3, 1, 1), torch.randn(1, 3, 2, 2)], torch.tensor([[[40.0]]])
    u.requires_grad_()  # its sigmoid is 1 in float32
    nothing = [torch.full((1, 1, 1), X), torch.full((1, 2, 2), X)]
    losses = pf.pyramid_loss(logits, [u], nothing, nothing[:1])
    assert sum(losses.values()) == 0 and not torch.autograd.grad(losses["unity"], u)[0].any()
    loss = pf.pyramid_loss(logits, [u], nothing, [torch.tensor([[[0]]])])["unity"]
    assert loss == 40 and torch.autograd.grad(loss, u)[0] == 1


@pytest.mark.equation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_losses_are_float32(dtype):
    logits, prob = (
        [torch.randn(1, 3, 2, 2).to(dtype), torch.randn(1, 3, 4, 4).to(dtype)],
        [torch.rand(1, 2, 2).to(dtype)],
    )
    labels = [torch.randint(3, (1, 2, 2)), torch.randint(3, (1, 4, 4))]
    losses = pf.pyramid_loss(logits, prob, labels, [torch.randint(2, (1, 2, 2))])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def joint_batch():
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, 3, s, s, generator=generator) for s in (1, 2)]
    prob = [torch.randn(2, 1, 1, generator=generator)]
    semantic = [torch.tensor([[[X]], [[1]]]), torch.tensor([[[0, 1], [2, X]], [[X, X], [X, 0]]])]
    return logits, prob, semantic, [torch.tensor([[[0]], [[X]]])]


def share_of_the_batch(rank):
    return pf.pyramid_loss(*([x[rank : rank + 1] for x in part] for part in joint_batch()))


@pytest.mark.system
def test_two_processes_have_the_loss_of_the_joint_batch(two_processes):
    first, second = two_processes(share_of_the_batch)
    expected = pf.pyramid_loss(*joint_batch())
    assert all(
        (first[name] + second[name]).item() / 2 == pytest.approx(expected[name].item())
        for name in expected
    )


# -------------------------------------------------------------------------------------------- heads


def same_with_gradients(found, expected, inputs):
    """Equal lists of tensors, and equal gradients of them all."""
    pulls = [torch.randn_like(x) for x in found]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    sums = [sum((x * pull).sum() for x, pull in zip(xs, pulls)) for xs in (found, expected)]
    for a, b in zip(
        *(torch.autograd.grad(y, inputs, retain_graph=True) for y in sums), strict=True
    ):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0


# Two images of one cell of 2x2 positions and two channels. The first image has 1 3 5 7 (mean 4) and
# 0 0 0 4 (mean 1), the second 2 2 2 2 and 1 1 1 1. W_u and W_e are the identity, W_s gives
# w = y_1 - y_2 + 2.
# tied: differences (-3 -1 1 3), (-1 -1 -1 3): w gives 0 2 4 2. Second image: 0 and 0, w gives 2.
# difference: (3 1 1 3), (1 1 1 3): 4 2 2 2, and 2.
# two: W_c doubles the first channel. (-7 -5 -3 -1), (-1 -1 -1 3): -4 -2 0 -2. (-2), (0): 0.
@pytest.mark.equation
@pytest.mark.parametrize(
    "unity, expected", [("tied", [0, 2]), ("difference", [2, 2]), ("two", [-4, 0])]
)
def test_sect_4_1_unity_head_by_hand(unity, expected):
    head = pf.UnityHead(2, (2,), unity, channels=2)
    with torch.no_grad():
        for conv in (head.reduce, head.embed):
            conv.weight.copy_(torch.eye(2)[..., None, None])
        if unity == "two":
            head.centroid.weight.copy_(torch.tensor([[2.0, 0], [0, 1]])[..., None, None])
        head.same.weight.copy_(torch.tensor([[1.0, -1]])[..., None, None])
        head.same.bias.fill_(2)
    x = torch.tensor([[[[1.0, 3], [5, 7]], [[0, 0], [0, 4]]], [[[2, 2], [2, 2]], [[1, 1], [1, 1]]]])
    (found,) = head(x)
    assert found.tolist() == [[[value]] for value in expected]


@pytest.mark.equation
@pytest.mark.parametrize("unity", ["two", "tied", "difference"])
def test_unity_head_takes_the_pixel_least_like_its_centroid(unity):
    head = pf.UnityHead(5, (4, 2), unity, channels=3).double()
    x = torch.randn(2, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    convs = head.reduce, head.embed, head.centroid or head.embed, head.same
    w_u, e, c, w = (conv.weight[:, :, 0, 0] for conv in convs)
    assert (head.centroid is None) == (unity != "two")
    assert all(conv.bias is None for conv in convs[:3])
    expected = []
    for k in (4, 2):
        unities = []
        for n, a, b in product(range(2), range(4 // k), range(8 // k)):
            cell = x[n, :, a * k : (a + 1) * k, b * k : (b + 1) * k].flatten(1).T  # [k², 5]
            x_u = cell @ w_u.T
            difference = x_u @ e.T - c @ x_u.mean(0)
            difference = difference.abs() if unity == "difference" else difference
            probabilities = torch.sigmoid(difference @ w.T + head.same.bias)
            unities.append(probabilities.min())
        expected.append(torch.stack(unities).view(2, 4 // k, 8 // k))
    found = [u.sigmoid() for u in head(x)]
    same_with_gradients(found, expected, [x, *head.parameters()])


@pytest.mark.equation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unity_logits_of_half_precision_are_float32(dtype):
    for unity in ("two", "difference"):
        head = pf.UnityHead(4, (2,), unity, channels=3)
        torch.nn.init.constant_(head.same.bias, 9.0)
        with torch.autocast("cpu", dtype):
            found = head(torch.zeros(1, 4, 4, 4))[0]
        assert found.dtype == torch.float32 and found.tolist() == [[[9, 9], [9, 9]]]


@pytest.mark.equation
@pytest.mark.parametrize("size", [(9, 13), (1, 5), (8, 8), (24, 3)])
def test_eqs_6_10_pool_has_110_tokens(size):
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    bins = [F.adaptive_avg_pool2d(x, n).flatten(2) for n in (1, 3, 6, 8)]
    found = pf.PyramidPool()(x)
    assert found.shape == (2, 110, 2)
    same_with_gradients([found], [torch.cat(bins, 2).mT], [x])


def set_block(block, queries, norm_bias):
    """A CA or CU of two channels with W_q, W_k, W_v, without biases, and the bias of its norm."""
    convolution, norm, _ = block.aggregate if hasattr(block, "aggregate") else block.update
    with torch.no_grad():
        for layer, weight in queries.items():
            layer.weight.copy_(torch.tensor(weight).view_as(layer.weight))
            layer.bias.zero_()
        norm.bias.copy_(torch.tensor(norm_bias))
    norm.eps = 0.0
    return convolution


@pytest.mark.equation
def test_eqs_8_9_by_hand_with_two_tokens():
    # x is (√2, 0) in the first image, 0 in the second. Tokens (ln 3, 0), (0, 5). All keys = tokens:
    # x·k / √2 is (ln 3, 0): attention 3/4, 1/4; then 1/2, 1/2. Values (4 ln 3, 0), (0, 40):
    # X_att = (3 ln 3, 10), then (2 ln 3, 20). W_agg: y_1 = X_att,1 + x_1, y_2 = X_att,2 - 7 x_2.
    # The norm's bias is (0, -15), so ReLU gives (3 ln 3 + √2, 0), then (2 ln 3, 5).
    block, L = pf.ContextAggregation(2).eval(), math.log(3)
    one = [[1.0, 0], [0, 1]]
    layers = {block.query: one, block.key: one, block.value: [[4.0, 0], [0, 8]]}
    convolution = set_block(block, layers, [0.0, -15.0])
    with torch.no_grad():
        weight = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, -7]])
        convolution.weight.copy_(weight[..., None, None])
    x = torch.tensor([[[[2**0.5]], [[0]]], [[[0]], [[0]]]])
    theta = torch.tensor([[[L, 0], [0, 5]]]).expand(2, 2, 2)
    expected = torch.tensor([[3 * L + 2**0.5, 0], [2 * L, 5]])[..., None, None]
    for form in (block, block.printed):
        torch.testing.assert_close(form(x, theta), expected)


@pytest.mark.equation
def test_eqs_8_9_aggregation_equals_the_loop_with_gradients():
    block = trained(pf.ContextAggregation(4)).double()
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    theta = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    w = {n: getattr(block, n).weight.flatten(1) for n in ("query", "key", "value")}
    b = {n: getattr(block, n).bias for n in w}
    rows = []
    for n, i, j in product(range(2), range(2), range(3)):
        q = w["query"] @ x[n, :, i, j] + b["query"]
        keys = [w["key"] @ theta[n, t] + b["key"] for t in range(5)]
        a = (torch.stack([q @ k for k in keys]) / math.sqrt(4)).softmax(0)
        rows.append(sum(a[t] * (w["value"] @ theta[n, t] + b["value"]) for t in range(5)))
    attended = torch.stack(rows).view(2, 2, 3, 4).permute(0, 3, 1, 2)
    convolution, norm, activation = block.aggregate
    assert convolution.kernel_size == (1, 1) and isinstance(activation, torch.nn.ReLU)
    expected = normed(torch.cat([attended, x], 1), convolution, norm)
    inputs = [x, theta, *(p for n, p in block.named_parameters() if n != "key.bias")]
    for form in (block, block.printed):  # the softmax takes no notice of a key's bias
        same_with_gradients([form(x, theta)], [expected], inputs)


@pytest.mark.equation
def test_eqs_10_11_by_hand_with_two_tokens():
    # Both tokens pool the mean of x, (3, 6). W_upd: y_1 = pooled_1 + θ_1, y_2 = pooled_2 - 10 θ_2.
    # θ is (1, 0), (0, 1): (4, 6), (3, -4). The norm's bias is (-3.5, 0): (0.5, 6), (0, 0).
    block = pf.ContextUpdate(2).eval()
    block.pool.bins = (1, 1)
    convolution = set_block(block, {}, [-3.5, 0.0])
    with torch.no_grad():
        weight = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, -10]])
        convolution.weight.copy_(weight[..., None, None])
    x = torch.tensor([[[[1.0, 5]], [[6, 6]]]])
    assert block(x, torch.eye(2)[None]).tolist() == [[[0.5, 6], [0, 0]]]


@pytest.mark.equation
def test_eqs_10_11_update_joins_new_and_old_context():
    block = trained(pf.ContextUpdate(4))
    x, theta = torch.randn(2, 4, 8, 8), torch.randn(2, 110, 4)
    bins = [F.adaptive_avg_pool2d(x, n).flatten(2) for n in (1, 3, 6, 8)]
    joint = torch.cat([torch.cat(bins, 2), theta.mT], 1)[..., None]
    convolution, norm, activation = block.update
    assert convolution.kernel_size == (1, 1) and isinstance(activation, torch.nn.ReLU)
    torch.testing.assert_close(block(x, theta), normed(joint, convolution, norm)[..., 0].mT)


@pytest.mark.equation
def test_eqs_3_to_7_coarse_to_fine():
    head = trained(pf.SemanticHead(6, (8, 4, 2, 1), channels=4))
    x = torch.randn(1, 6, 8, 16)
    x4 = F.conv2d(x, head.reduce.weight, head.reduce.bias)  # neither norm nor activation
    theta = pf.PyramidPool()(x4)  # Eq. (6)
    for i, (k, found) in enumerate(zip((8, 4, 2, 1), head(x), strict=True)):
        refined = head.aggregate[i](F.avg_pool2d(x4, k), theta)  # Eqs. (3), (4)
        if i < 3:
            theta = head.update[i](refined, theta)  # Eq. (5)
        convolution, norm, activation = head.project[i]
        assert convolution.kernel_size == (1, 1) and isinstance(activation, torch.nn.ReLU)
        torch.testing.assert_close(found, normed(refined, convolution, norm))


@pytest.mark.network
def test_levels_share_no_weight():
    with torch.device("meta"):
        net, anl = pf.build(4, "hrnet_w18"), pf.build(4, "hrnet_w18", context="anl_multi")
    head, classifiers = net.semantic, [*net.coarse_classifiers, net.classifier]
    parts = [head.aggregate, head.update, head.project, classifiers, anl.semantic.anl]
    assert [len({id(layer) for layer in part}) for part in parts] == [4, 3, 4, 4, 4]
    assert not head.anl and not anl.semantic.aggregate and not anl.semantic.update


@pytest.mark.equation
def test_anls_block_equals_its_loop():
    block = trained(pf.APNB(4)).double()
    torch.nn.init.normal_(block.out.weight)
    assert not pf.APNB(4).out.weight.any() and not pf.APNB(4).out.bias.any()
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64, requires_grad=True)
    query, (norm, activation) = block.query[0], (block.query[1], block.query[2])
    assert isinstance(activation, torch.nn.ReLU) and query.weight.shape == (2, 4, 1, 1)
    q, v = normed(x, query, norm), F.conv2d(x, block.value.weight, block.value.bias)
    bins = (1, 3, 6, 8)
    key, value = (
        torch.cat([F.adaptive_avg_pool2d(y, n).flatten(2) for n in bins], 2) for y in (q, v)
    )
    rows = []
    for n, i, j in product(range(2), range(8), range(9)):
        a = (key[n].T @ q[n, :, i, j] / math.sqrt(2)).softmax(0)
        rows.append(value[n] @ a)
    y = torch.stack(rows).view(2, 8, 9, 2).permute(0, 3, 1, 2)
    y = F.conv2d(y, block.out.weight, block.out.bias)
    expected = normed(torch.cat([y, x], 1), *list(block.aggregate)[:2])
    same_with_gradients([block(x)], [expected], [x, *block.parameters()])


@pytest.mark.network
def test_anl_refines_the_finest_level_or_each():
    x = torch.randn(1, 6, 8, 8)
    one, each = (pf.SemanticHead(6, (2, 1), c, 2, channels=4).eval() for c in ("anl", "anl_multi"))
    for block in [*one.anl, *each.anl]:
        torch.nn.init.normal_(block.out.weight)
    refined = one.anl[0](one.reduce(x))
    for found, k, project in zip(one(x), (2, 1), one.project, strict=True):
        torch.testing.assert_close(found, project(F.avg_pool2d(refined, k)))
    for found, k, block, project in zip(each(x), (2, 1), each.anl, each.project, strict=True):
        level = F.avg_pool2d(each.reduce(x), k)
        torch.testing.assert_close(found, project(block(level)))


@pytest.mark.network
def test_app_d_decoder_has_3x3_convolutions_and_hrnets_last_stage(narrow_decoder):
    decoder, sizes = trained(pf.ResNetDecoder((5, 6, 7, 8))), ((8, 12), (4, 6), (2, 3), (1, 2))
    maps = [torch.randn(1, c, *s) for c, s in zip((5, 6, 7, 8), sizes)]
    reduced = []
    for m, layer in zip(maps, decoder.reduce):
        convolution, norm, activation = layer
        assert convolution.kernel_size == (3, 3) and isinstance(activation, torch.nn.ReLU)
        reduced.append(normed(m, convolution, norm))
    for found, expected in zip(decoder(maps), decoder.fuse(reduced)):
        torch.testing.assert_close(found, expected)


@pytest.mark.network
def test_app_d_decoder_has_720_channels():
    with torch.device("meta"):
        decoder = pf.ResNetDecoder((256, 512, 1024, 2048))
        last = backbones.build("hrnet_w48").body.stage4
    assert decoder.channels == (48, 96, 192, 384) and sum(decoder.channels) == 720  # D
    assert [p.shape for p in decoder.fuse.parameters()] == [p.shape for p in last.parameters()]


# ------------------------------------------------------------------------------------------ network

EXPERIMENTS = dict(
    A=dict(context=None, output="single"),
    B=dict(context="anl", output="single"),
    C=dict(output="single"),
    D=dict(context=None, policy="naive"),
    E=dict(context=None, policy="ground_truth"),
    F=dict(context=None),
    G=dict(context="anl"),
    H=dict(context="anl_multi"),
    I=dict(),
    J=dict(output="auxiliary"),
    K=dict(strides=(32, 4)),
)


@pytest.fixture
def narrow_decoder(monkeypatch):
    """A sixth of the decoder's channels: its 50 million weights are most of a small network."""
    monkeypatch.setattr(pf.ResNetDecoder, "channels", (8, 16, 32, 64))


@pytest.mark.network
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_of_table_a_trains_every_parameter(name, narrow_decoder):
    net = pf.build(4, LIGHT, **EXPERIMENTS[name]).train()
    images, labels = torch.randn(2, 3, 64, 32), torch.randint(4, (2, 64, 32))
    for side, top in ((32, 0), (16, 32), (8, 48)):  # every level has unity-cells of its own
        blocks = (
            torch.randint(4, (2, 1, 32 // side))
            if side < 32
            else torch.ones(2, 1, 1, dtype=torch.int64)
        )
        labels[:, top : top + side] = blocks.repeat_interleave(side, 1).repeat_interleave(side, 2)
    losses = net(images, labels)
    single = {
        "A": ["semantic"],
        "B": ["semantic"],
        "C": ["semantic"],
        "J": ["semantic", "auxiliary"],
    }
    assert list(losses) == single.get(name, ["semantic", "unity"])
    sum(losses.values()).backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all()
        # The softmax takes no notice of a key's bias. APNB's last convolution starts at 0.
        silent = key.endswith("key.bias") or (".anl." in key and ("query" in key or "value" in key))
        assert p.grad.abs().max() > 0 or silent, key
    assert net.eval()(images).shape == (2, 4, 64, 32) and net.classifier.kernel_size == (1, 1)


@pytest.mark.network
def test_losses_are_of_the_relabelled_pyramids(narrow_decoder):
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(4, (2, 64, 96))
    labels[:, :40, :70] = 1
    for policy in pf.POLICIES:
        net = pf.build(4, "resnet18", context=None, policy=policy, threshold=0.3).eval()
        semantic, unity = net.pyramids(images)
        prob = [u.sigmoid() for u in unity]
        truth = pf.relabel(*pf.pyramid_labels(labels), prob, 0.3, policy)
        expected = pf.pyramid_loss(semantic, unity, *truth)
        losses = net(images, labels)
        assert all(torch.equal(losses[name], expected[name]) for name in expected)


def mixed(images):
    """A network whose threshold lies so that several levels are chosen."""
    net = pf.build(4, "resnet18").eval()
    torch.nn.init.normal_(net.unity.same.weight)
    prob = [u.sigmoid() for u in net.pyramids(images)[1]]
    net.threshold = prob[1].median().item()
    assert len(pf.chosen_level(prob, images[:, :, ::4, ::4], net.threshold).unique()) > 1
    return net


@pytest.mark.network
def test_logits_are_the_fused_levels_upsampled():
    images = torch.randn(1, 3, 64, 96)
    net = mixed(images)
    semantic, unity = net.pyramids(images)
    fused = pf.fuse(semantic, [u.sigmoid() for u in unity], net.threshold)
    torch.testing.assert_close(net(images), F.interpolate(fused, size=(64, 96), mode="bilinear"))
    maps = net.decoder(net.backbone(images, extend=False))
    kwargs = dict(size=(16, 24), mode="bilinear", align_corners=True)
    joint = torch.cat([F.interpolate(m, **kwargs) for m in maps], 1)
    torch.testing.assert_close(unity, net.unity(joint))
    found = net.semantic(joint)
    torch.testing.assert_close(semantic[3], net.classifier(found[3]))
    torch.testing.assert_close(semantic[1], net.coarse_classifiers[1](found[1]))
    single = pf.build(4, "resnet18", output="auxiliary").eval()
    expected = F.interpolate(single.pyramids(images)[0][-1], size=(64, 96), mode="bilinear")
    torch.testing.assert_close(single(images), expected)


@pytest.mark.network
def test_auxiliary_levels_weigh_two_fifths_of_their_mean():
    net = pf.build(4, "resnet18", output="auxiliary").eval()
    images, labels = (
        torch.randn(1, 3, 64, 64),
        torch.randint(4, (1, 2, 2)).repeat_interleave(32, 1).repeat_interleave(32, 2),
    )
    semantic, _ = net.pyramids(images)
    truth, _ = pf.pyramid_labels(labels)
    ce = [F.cross_entropy(y, label, ignore_index=X) for y, label in zip(semantic, truth)]
    losses = net(images, labels)
    torch.testing.assert_close(losses["semantic"], ce[3])
    torch.testing.assert_close(losses["auxiliary"], 0.4 * sum(ce[:3]) / 3)


@pytest.mark.network
@pytest.mark.parametrize(
    "size, fitted",
    [((64, 96), (64, 96)), ((50, 79), (64, 64)), ((47, 33), (32, 32)), ((5, 1), (32, 32))],
)
def test_other_sizes_are_resized_to_the_nearest_multiple_and_back(size, fitted, narrow_decoder):
    net = pf.build(4, "resnet18", context=None).eval()
    images, labels = torch.randn(1, 3, *size), torch.randint(4, (1, *size))
    assert [4 * n for n in net.pyramids(images)[0][-1].shape[2:]] == list(fitted)
    logits = net(images)
    assert logits.shape == (1, 4, *size) and logits.dtype == torch.float32
    inner = F.interpolate(images, size=fitted, mode="bilinear")
    expected = F.interpolate(net(inner), size=size, mode="bilinear")
    torch.testing.assert_close(logits, expected)
    rows, columns = ([int((i + 0.5) * side / n) for i in range(n)] for side, n in zip(size, fitted))
    losses, expected = net(images, labels), net(inner, labels[:, rows][:, :, columns])
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


@pytest.mark.usefixtures("meta")
@pytest.mark.network
def test_sides_half_way_between_are_enlarged(narrow_decoder):
    net = pf.build(4, "resnet18", output="single", context=None).eval()
    for side, fitted in ((48, 64), (80, 96), (79, 64), (1, 32)):
        assert net.pyramids(torch.zeros(1, 3, side, 32))[0][0].shape[2:] == (fitted // 4, 8)


@pytest.mark.network
def test_hrnet_needs_no_decoder_and_has_720_channels():
    with torch.device("meta"):
        net, small = pf.build(4, "hrnet_w48"), pf.build(4, "hrnet_w18")
    assert (
        net.decoder is None
        and net.semantic.reduce.in_channels == 720
        and net.unity.reduce.out_channels == 64
    )
    assert net.semantic.reduce.out_channels == 512 and small.semantic.reduce.in_channels == 270
    assert net.threshold == 0.9 and net.strides == (32, 16, 8, 4)
    assert net.regularized == "semantic.project.3.1"  # the finest level's norm
    forms = net.unity.unity, pf.UnityHead(4, (2,)).unity, net.finest, net.policy, net.output
    assert forms == ("difference", "difference", "pixel", "true_positive", "pyramid")


@pytest.mark.network
def test_bf16_trains():
    net = pf.build(4, "resnet18").train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = net(torch.randn(2, 3, 64, 64), torch.randint(4, (2, 64, 64)))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


@pytest.mark.usefixtures("meta")
@pytest.mark.network
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(strides=(32, 8)), "the last 4"),
        (dict(strides=32), "the last 4"),
        (dict(threshold="high"), "threshold='high': expected a number"),
        (dict(strides=(8, 32, 4)), "coarse to fine"),
        (dict(output="both"), "output='both': it is one of 'pyramid', 'single', 'auxiliary'"),
        (dict(unity="three"), "unity='three': it is one of 'difference', 'two', 'tied'"),
        (dict(strides=(32.0, 4)), "the last 4"),
        (dict(strides=(None, 4)), "the last 4"),
        (dict(threshold=float("nan")), "threshold=nan: expected a number in 0…1"),
        (dict(threshold=2), "threshold=2: expected a number in 0…1"),
        (dict(finest="none"), "finest='none': it is one of 'pixel', 'ignore_mixed'"),
        (dict(policy="best"), "'true_positive', 'ground_truth', 'naive'"),
        (dict(context="ocr"), "'ours', 'anl', 'anl_multi', None"),
        (dict(context="anl_multi", output="single"), "take 'anl'"),
        (dict(levels=3), "SpecializeAndFuse has no option levels"),
    ],
)
def test_mistakes_name_what_is_expected(options, message):
    with pytest.raises(ValueError, match=message):
        pf.build(4, "resnet18", **options)


@pytest.mark.system
def test_recipes_are_the_papers():
    papers = {name: r for name, r in pf.RECIPES.items() if name != "shapes"}  # that one is ours
    settings = {name: (r["lr"], r["iterations"]) for name, r in papers.items()}
    assert settings["ade20k_16k"] == (0.02, round(120 * 16_168 / 16))  # Sect. 5.4
    assert pf.RECIPES["ade20k_16k"]["backbone"] == "hrnet_w32"
    assert settings["ade20k"] == (0.02, round(120 * 20_210 / 16)) and settings["coco_stuff10k"] == (
        0.001,
        110 * 9_000 // 16,
    )
    assert settings["pascal_context"] == (0.001, 200 * 4_998 // 16)
    for name, r in papers.items():
        assert name == "ade20k_16k" or r["backbone"] == "hrnet_w48"
        assert (r["momentum"], r["power"]) == (0.9, 0.9)
        assert (r["batch_size"], r["crop_size"], r["weight_decay"], r["scale"], r["color"]) == (
            16,
            512,
            1e-4,
            (0.5, 2.0),
            "brightness",
        )


# ----------------------------------------------------------------------------- figures and analysis


@pytest.mark.network
def test_fig_a_greys_what_is_done_by_coarser():
    image = torch.randn(3, 64, 96)
    net = mixed(image[None])
    figures, strides = net.figures(image), (32, 16, 8, 4)
    names = [f"prediction of stride {s} alone" for s in strides]
    tau = f"{net.threshold:g}"  # the third part of a scale is marked on its bar
    unity = [
        f"unity, stride {s}: probability of one class, taken from {tau} | 0 | 1 | {tau}"
        for s in strides[:3]
    ]
    taken = [f"cells taken from stride {s}" for s in strides]
    ends = "level that is taken | stride 32 | stride 4"
    assert list(figures) == [*names, *unity, *taken, ends]
    chosen = torch.stack([figures[name] for name in taken])
    assert ((chosen < 4).sum(0) == 1).all()  # each cell is taken from one level, 254 in the others
    assert ((chosen == 254).sum(0) == 3).all()
    semantic, prob = net.pyramids(image[None])
    fused = pf.fuse(semantic, [p.sigmoid() for p in prob], net.threshold).argmax(1)[0]
    assert torch.equal(chosen.amin(0), fused) and len(figures[ends].unique()) > 1
    level = (3 * figures[ends]).round().long()
    assert torch.equal((chosen < 4).int().argmax(0), level)
    assert figures[unity[2]].shape == (8, 12)
    assert 0 <= figures[unity[2]].min() <= figures[unity[2]].max() <= 1
    assert pf.build(4, "resnet18", output="single").eval().figures(image) == {}
    panel = evaluate.draw_figure(taken[3], figures[taken[3]], image, [(i, i, i) for i in range(4)])
    done = panel.tile[:, figures[taken[3]] == 254]
    assert (done == 215).all() and done.numel() > 0  # grey, as in Fig. A


@pytest.mark.network
def test_levels_are_those_of_eq_2_and_each_level_alone():
    images = torch.randn(1, 3, 64, 96)
    net = mixed(images)
    taken, (*alone, fused), prob = net.levels(images)
    assert torch.equal(fused, net(images).argmax(1))
    assert all(torch.equal(p, u.sigmoid()) for p, u in zip(prob, net.pyramids(images)[1]))
    figures = net.figures(images)
    level = figures["level that is taken | stride 32 | stride 4"]
    wanted = (3 * level).round().long().repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(taken[0], wanted) and len(alone) == 4
    for logits, found in zip(net.pyramids(images)[0], alone):
        by = 16 // logits.shape[2]
        cells = logits.repeat_interleave(by, 2).repeat_interleave(by, 3)
        full = F.interpolate(cells, size=(64, 96), mode="bilinear")
        assert torch.equal(found, full.argmax(1))


def counted(predicted, labels, K):
    """`confusion` by a loop over the pixels."""
    counts = torch.zeros(K, K, dtype=torch.long)
    for y, label in zip(predicted.flatten().tolist(), labels.flatten().tolist()):
        if label != X:
            counts[label, y] += 1
    return counts


@pytest.mark.network
def test_analyse_is_table_9_and_fig_c_of_all_images(narrow_decoder):
    net, seen = pf.build(3, "resnet18", strides=(8, 4), context=None).eval(), []
    pairs = [(torch.randn(1, 3, 32, 48), torch.randint(3, (1, 32, 48))) for _ in range(2)]
    pairs[1][1][:, :5] = X
    labels = torch.cat([label for _, label in pairs])
    predicted = [torch.randint(3, (2, 32, 48)) for _ in range(3)]  # coarse, fine, fused
    taken, prob = (torch.rand(2, 32, 48) > 0.3).long(), torch.rand(2, 4, 6)

    def answers(images):
        seen.append(images)
        part = slice(len(seen) - 1, len(seen))
        return taken[part], [y[part] for y in predicted], [prob[part]]

    net.levels = answers
    numbers = net.analyse(pairs)
    names = [key.partition(":")[0] for key in numbers]
    assert names == ["levels", "levels alone", "pixels", "unity"]
    strides = "stride 8, stride 4"
    axes = [f"{strides} | {strides}", strides, f"share | {strides}", "recall, precision | stride 8"]
    assert [key.partition(" | ")[2] for key in numbers] == axes
    table, difference, share, _ = numbers.values()
    for i, level in product(range(2), range(2)):
        at = labels.where(taken == level, X)
        expected = backbones.iou(counted(predicted[i], at, 3)).mean()
        torch.testing.assert_close(table[i, level], expected)
    fused = backbones.iou(counted(predicted[2], labels, 3))
    for i in range(2):
        expected = backbones.iou(counted(predicted[i], labels, 3)) - fused
        torch.testing.assert_close(difference[i], expected)
    known = labels != X
    expected = [(taken[known] == level).float().mean() for level in (0, 1)]
    torch.testing.assert_close(share, torch.stack(expected)[None])
    assert pf.build(3, "resnet18", output="single").analyse(pairs) == {}


@pytest.mark.network
def test_mean_iou_leaves_out_classes_that_do_not_occur(narrow_decoder):
    net = pf.build(3, "resnet18", strides=(8, 4), context=None).eval()
    labels = torch.zeros(1, 32, 32, dtype=torch.int64)
    net.levels = lambda images: (labels, 3 * [labels], [torch.zeros(1, 4, 4)])
    table, _, share, _ = net.analyse([(torch.randn(1, 3, 32, 32), labels)]).values()
    assert table[:, 0].tolist() == [1, 1] and table[:, 1].isnan().all()
    assert share.tolist() == [[1, 0]]


@pytest.mark.equation
def test_unity_cells_are_counted_by_hand():
    unity = [torch.tensor([[[1, 1, 0]]]), torch.tensor([[[1, 0, 0, 1, X, X]]])]
    prob = [torch.tensor([[[0.9, 0.8, 0.95]]]), torch.tensor([[[1, 1, 0.1, 0.2, 1, 0]]])]
    # rows: mix-cells, unity-cells; columns: below 0.9, at least 0.9; of 255 nothing counts
    assert pf.unity_counts(prob, unity).tolist() == [[[0, 1], [1, 1]], [[1, 1], [1, 1]]]
    assert pf.unity_counts(prob, unity, 0.2).tolist() == [[[0, 1], [0, 2]], [[1, 1], [0, 2]]]


@pytest.mark.equation
def test_unity_cells_are_counted_as_in_the_loop():
    _, _, unity, prob = big_scene()
    counts = torch.zeros(3, 2, 2, dtype=torch.long)
    for level, (u, p) in enumerate(zip(unity, prob)):
        for n, i, j in product(*map(range, u.shape)):
            if u[n, i, j] != X:
                counts[level, u[n, i, j], int(p[n, i, j] >= 0.4)] += 1
    assert counts.min() > 0 and torch.equal(pf.unity_counts(prob, unity, 0.4), counts)


@pytest.mark.network
def test_analyse_has_recall_and_precision_of_unity_cells_that_no_coarser_level_has_found():
    # 16x24 pixels are resized to 16x32: 1x2 cells of stride 16, 2x4 of stride 8.
    net = pf.build(3, LIGHT, strides=(16, 8, 4), context=None, threshold=0.7).eval()
    labels = torch.zeros(3, 16, 24, dtype=torch.long)
    labels[0, :9, 12:20], labels[1, 8:, 4:] = 1, 2
    labels[1, 0, -1] = X
    images, given = torch.randn(3, 3, 16, 24), []
    prob = [torch.rand(3, 1, 2), torch.rand(3, 2, 4)]
    prob[0][0], prob[1][0] = torch.tensor([[0.7, 0.75]]), 0.9  # a true, a false positive
    prob[0][2] = torch.tensor([[0.6, 0.1]])  # two false negatives: their finer cells count

    def levels(images):
        n = len(given)
        given.append(images)
        part = slice(n, n + len(images))
        return labels[part], 4 * [labels[part]], [p[part] for p in prob]

    net.levels = levels
    numbers = net.analyse([(images[:1], labels[:1]), (images[1:], labels[1:])])
    found = list(numbers.values())[3]
    assert list(numbers)[3].endswith(" | recall, precision | stride 16, stride 8")
    assert "τ = 0.7" in list(numbers)[3]
    wide = labels[:, :, [int((j + 0.5) * 24 / 32) for j in range(32)]]
    _, unity = cell_by_cell(wide, (16, 8, 4))
    for level in (0, 1):
        hits, true, positive, left_out = 0, 0, 0, 0
        for n, i, j in product(*map(range, unity[level].shape)):
            u, p = unity[level][n, i, j], prob[level][n, i, j]
            above = (n, i // 2, j // 2)
            done = level == 1 and unity[0][above] == 1 and prob[0][above] >= 0.7
            left_out += bool(done)
            if u != X and not done:
                true, positive = true + (u == 1), positive + (p >= 0.7)
                hits += (u == 1) and (p >= 0.7)
        expected = torch.stack([hits / true, hits / positive])
        torch.testing.assert_close(found[:, level], expected)
        assert left_out == 4 * level
    assert ((found > 0) & (found <= 1)).all() and found.unique().numel() > 2


@pytest.mark.network
def test_precision_is_nan_where_no_cell_is_taken_and_recall_where_there_is_none(narrow_decoder):
    net = pf.build(3, "resnet18", strides=(8, 4), context=None).eval()
    images, labels = torch.randn(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.long)
    for uniform, prob in ((True, 0.0), (False, 1.0)):
        labels[:, ::3] = 0 if uniform else 1
        net.levels = lambda images, p=prob: (labels, 3 * [labels], [torch.full((1, 4, 4), p)])
        recall, precision = list(net.analyse([(images, labels)]).values())[3].flatten()
        assert (
            (recall == 0 and precision.isnan()) if uniform else (recall.isnan() and precision == 0)
        )


@pytest.mark.network
def test_layers_that_are_copied_name_an_unknown_option():
    with pytest.raises(ValueError, match="unity='three': it is one of"):
        pf.UnityHead(4, (2,), "three")
    with pytest.raises(ValueError, match="context='ocr': it is one of"):
        pf.SemanticHead(4, (2, 1), "ocr")
