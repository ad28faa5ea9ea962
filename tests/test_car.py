"""car.py against the equations of the thesis, chapter 4, written here over their indices, in
float64; its layers against literal compositions; `regularize` with networks of many kinds.
"""

import copy
import doctest
import functools
import math
import types
from collections import OrderedDict
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import LIGHT, trained
from torch import nn
from torchvision.models import segmentation

import backbones
import caa
import car
import evaluate
import ksac
import pyramid_fuse
import spgnet

TERMS = ("intra_c2p", "inter_c2c", "inter_c2p")
TERM_FUNCTIONS = ("intra_center_to_pixel", "inter_center_to_center", "inter_center_to_pixel")
NONE = dict(intra=False, inter_c2c=False, inter_c2p=False)
HEADS = ("self_attention", "fcn", "uper", "ocr")
FORMS = [{}, {"literal": True}, {"released": True}]

pytestmark = pytest.mark.usefixtures("one_seed")


def scene(n=2, c=3, h=2, w=3, classes=3):
    """Features, and labels with ignored pixels, in which the last class does not occur."""
    features = torch.randn(n, c, h, w, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(classes - 1, (n, h, w))
    labels[0, 0, 0] = labels[-1, -1, -1] = 255
    return features, labels


def maps(*pixels):
    """One image, one row: `[1, C, 1, W]` of the pixels' features."""
    return torch.tensor(pixels, dtype=torch.float64).T[None, :, None]


# ---------------------------------------------------------------------------- the printed equations


def loop_centers(features, labels, K, images):
    """Eq. (4.1) over these images."""
    C, centers = features.shape[1], []
    for k in range(K):
        total, count = torch.zeros(C, dtype=features.dtype), 0
        for n in images:
            for i, j in product(*map(range, labels.shape[1:])):
                if labels[n, i, j] == k:
                    total, count = total + features[n, :, i, j], count + 1
        centers.append(total / max(count, 1))
    return torch.stack(centers)


def loop_intra(features, labels, centers, released, stop=True):
    """Eqs. (4.2), (4.3)."""
    N, C, H, W = features.shape
    centers = centers.detach() if stop else centers
    squares, absolutes = 0, 0
    for n, i, j in product(range(N), range(H), range(W)):
        sigma = 1 if labels[n, i, j] == 255 else 0
        for c in range(C):
            mu = 0 if sigma else (centers if centers.ndim == 2 else centers[n])[labels[n, i, j], c]
            d = (1 - sigma) * abs(mu - features[n, c, i, j])
            squares, absolutes = squares + d**2, absolutes + d
    count = N * C * H * W
    return torch.clamp((absolutes / count) ** 2, min=1e-5) if released else squares / count


def loop_c2c(centers, epsilon, released):
    """Eqs. (4.4)-(4.7), of one set of centres."""
    K, C = centers.shape
    sums = []
    for k in range(K):
        energy = [
            sum(centers[k, c] * centers[m, c].detach() for c in range(C)) / math.sqrt(C)
            for m in range(K)
        ]
        total = sum(torch.exp(e) for e in energy)
        above = [
            torch.clamp(torch.exp(energy[m]) / total - epsilon / (K - 1), min=0)
            for m in range(K)
            if m != k
        ]
        sums.append(sum(above))
    if released:
        return (sum(torch.clamp(s, 1e-7, 1 - 1e-7) for s in sums) / K) ** 2
    return sum(s**2 for s in sums) / K


def loop_c2p(features, labels, centers, epsilon, released=False, literal=False):
    """Eqs. (4.8)-(4.14); the own class's energy is replaced, the energies are divided by √C."""
    N, C, H, W = features.shape
    K, sums = centers.shape[-2], []
    for n, i, j in product(range(N), range(H), range(W)):
        mu = (centers if centers.ndim == 2 else centers[n]).detach()
        energy = []
        for k in range(K):
            other = features[n, :, i, j] if labels[n, i, j] != k else mu[k]
            e = sum(mu[k, c] * other[c] for c in range(C))
            energy.append(e if literal else e / math.sqrt(C))
        total = sum(torch.exp(e) for e in energy)
        above = [
            torch.clamp(torch.exp(energy[k]) / total - epsilon / (K - 1), min=0)
            for k in range(K)
            if k != labels[n, i, j]
        ]
        ignored = labels[n, i, j] == 255 and not released
        sums.append(torch.zeros((), dtype=features.dtype) if ignored else sum(above))
    if released:
        return (sum(torch.clamp(s, 1e-7, 1 - 1e-7) for s in sums) / len(sums)) ** 2
    return sum(s**2 for s in sums) / len(sums)


def number(loss):
    """The number of a loss of float64 features or centres."""
    assert loss.dtype == torch.float64
    return loss.item()


def same_with_gradients(found, expected, *inputs):
    assert found.dtype == expected.dtype
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


# ------------------------------------------------------------------------------------ class centres


@pytest.mark.equation
def test_eq_4_1_by_hand():
    features = torch.tensor(
        [[[[1.0, 3]], [[2.0, 4]]], [[[5.0, 7]], [[6.0, 8]]]]
    )  # pixels (1 2), (3 4); (5 6), (7 8)
    labels = torch.tensor([[[0, 1]], [[0, 255]]])
    centers, counts = car.class_centers(features, labels, 3)
    assert centers.tolist() == [[3, 4], [3, 4], [0, 0]]
    assert counts.tolist() == [2, 1, 0]
    centers, counts = car.class_centers(features, labels, 3, scope="image")
    assert centers.tolist() == [[[1, 2], [3, 4], [0, 0]], [[5, 6], [0, 0], [0, 0]]]
    assert counts.tolist() == [[1, 1, 0], [1, 0, 0]]


@pytest.mark.equation
def test_eq_4_1_equals_the_loop_with_gradients():
    features, labels = scene()
    pull = torch.randn(3, 3, dtype=torch.float64)
    centers, _ = car.class_centers(features, labels, 3)
    same_with_gradients(
        (centers * pull).sum(), (loop_centers(features, labels, 3, (0, 1)) * pull).sum(), features
    )
    centers, _ = car.class_centers(features, labels, 3, scope="image")
    expected = torch.stack([loop_centers(features, labels, 3, (n,)) for n in (0, 1)])
    same_with_gradients((centers * pull).sum(), (expected * pull).sum(), features)


# --------------------------------------------------------------------------------- the three losses


def one_row(*rows):
    """One row of pixels per image: `[N, C, 1, W]` of the pixels' features."""
    return torch.tensor(rows, dtype=torch.float64).permute(0, 2, 1)[:, :, None]


@pytest.mark.equation
def test_eqs_4_2_4_3_intra_by_hand():
    # |μ - X|: (1 1), (0 2); an ignored pixel that is far away, (0 3)
    features = one_row([(2, 3), (5, 9)], [(100, 100), (1, 5)])
    labels = torch.tensor([[[0, 1]], [[255, 0]]])
    centers = torch.tensor([[1.0, 2], [5, 7], [9, 9]], dtype=torch.float64)
    loss = car.intra_center_to_pixel(features, labels, centers)
    assert number(loss) == pytest.approx(
        (1 + 1 + 0 + 4 + 0 + 0 + 0 + 9) / (4 * 2)
    )  # 4 pixels of 2 channels
    # centres of each image: those of the second are moved by (0 3)
    centers = torch.stack([centers, centers + torch.tensor([0, 3])])
    loss = car.intra_center_to_pixel(features, labels, centers)
    assert number(loss) == pytest.approx((1 + 1 + 0 + 4) / 8)


@pytest.mark.equation
def test_released_intra_squares_the_mean_by_hand():
    # |μ - X| as above: (1 1), (0 2), ignored, (0 3)
    features = one_row([(2, 3), (5, 9)], [(100, 100), (1, 5)])
    labels = torch.tensor([[[0, 1]], [[255, 0]]])
    centers = torch.tensor([[1.0, 2], [5, 7], [9, 9]], dtype=torch.float64)
    loss = car.intra_center_to_pixel(features, labels, centers, released=True)
    assert number(loss) == pytest.approx(((1 + 1 + 2 + 3) / 8) ** 2)
    # pixels at their centre: no loss is below 1e-5
    loss = car.intra_center_to_pixel(one_row([(1, 2)]), labels[:1, :, :1], centers, released=True)
    assert number(loss) == pytest.approx(1e-5)


@pytest.mark.equation
def test_eqs_4_4_to_4_7_between_centres_by_hand():
    # √C = 2. Energies ln 3 against 0 and ln 7 against 0: A = (3/4, 1/4), (1/8, 7/8); above 1/16:
    # 3/16 and 1/16
    norms = torch.tensor([2 * math.log(3), 2 * math.log(7), 0, 0], dtype=torch.float64).sqrt()
    centers = torch.diag(norms)[:2]
    loss = car.inter_center_to_center(centers, epsilon=1 / 16)
    assert number(loss) == pytest.approx((3**2 + 1) / 16**2 / 2)
    # a second image, whose centres are in one place: A = 1/2; above 1/16: 7/16 twice
    loss = car.inter_center_to_center(torch.stack([centers, 0 * centers + 1]), epsilon=1 / 16)
    assert number(loss) == pytest.approx((9 + 1 + 49 + 49) / 16**2 / 4)
    # three centres in one place: A = 1/3 each; above ε_0/2 = 1/4 twice 1/12
    loss = car.inter_center_to_center(torch.ones(3, 5, dtype=torch.float64))
    assert number(loss) == pytest.approx((1 / 6) ** 2, rel=1e-5)


@pytest.mark.equation
def test_released_c2c_squares_the_mean_by_hand():
    # as above: 3/16 and 1/16 above the threshold
    norms = torch.tensor([2 * math.log(3), 2 * math.log(7), 0, 0], dtype=torch.float64).sqrt()
    loss = car.inter_center_to_center(torch.diag(norms)[:2], epsilon=1 / 16, released=True)
    assert number(loss) == pytest.approx((2 / 16) ** 2)
    # nothing is above it, and each class is clipped at 1e-7
    loss = car.inter_center_to_center(torch.diag(norms)[:2], epsilon=1, released=True)
    assert number(loss) == pytest.approx(1e-14, rel=1e-3, abs=0)


def between_centres_and_pixels():
    """Two classes, √C = 2, |μ_0|² = 2 ln 3 and |μ_1|² = 2 ln 7."""
    a, b = math.sqrt(2 * math.log(3)), math.sqrt(2 * math.log(7))
    centers = torch.tensor([[a, 0, 0, 0], [0, b, 0, 0]], dtype=torch.float64)
    # Λ_c2p with the other class: 0 and 2 ln 3; 0 and, ignored, 0 with both
    features = one_row([(7, 0, 0, 0), (0, 2 * math.log(3) / b, 0, 0)], [(0, 9, 0, 0), (0, 0, 0, 0)])
    return features, torch.tensor([[[0, 0]], [[1, 255]]]), centers


@pytest.mark.equation
def test_eqs_4_8_to_4_14_between_centres_and_pixels_by_hand():
    # Own energies are replaced: (ln 3, 0), (ln 3, ln 3); (ln 7, 0). A of the other class: 1/4, 1/2;
    # 1/8. Above 1/16: 3/16, 7/16; 1/16, and 0 where it is ignored.
    loss = car.inter_center_to_pixel(*between_centres_and_pixels(), epsilon=1 / 16)
    assert number(loss) == pytest.approx((3**2 + 7**2 + 1) / 16**2 / 4)


@pytest.mark.equation
def test_eq_4_11_as_printed_has_no_root_of_c():
    # Energies are twice as large: (2 ln 3, 0), (2 ln 3, 2 ln 3); (2 ln 7, 0). A: 1/10, 1/2; 1/50
    loss = car.inter_center_to_pixel(*between_centres_and_pixels(), epsilon=1 / 16, literal=True)
    assert number(loss) == pytest.approx(((1 / 10 - 1 / 16) ** 2 + (7 / 16) ** 2) / 4)


@pytest.mark.equation
def test_released_inter_c2p_counts_ignored_pixels_and_squares_the_mean():
    # the ignored pixel is 1/2 on both classes, neither of which is its own: 7/16 twice
    loss = car.inter_center_to_pixel(*between_centres_and_pixels(), epsilon=1 / 16, released=True)
    assert number(loss) == pytest.approx(((3 + 7 + 1 + 14) / 16 / 4) ** 2)


def scene_with_centers(scope):
    """A scene, and the centres of its batch `[K, C]` or of its images `[N, K, C]`."""
    features, labels = scene()
    images = [(0, 1)] if scope == "batch" else [(0,), (1,)]
    centers = [loop_centers(features, labels, 3, part).detach() for part in images]
    return features, labels, centers[0] if scope == "batch" else torch.stack(centers)


@pytest.mark.equation
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("scope", ["batch", "image"])
def test_eqs_4_2_4_3_intra_equals_the_loop_with_gradients(scope, released):
    features, labels, centers = scene_with_centers(scope)
    loss = car.intra_center_to_pixel(features, labels, centers, released)
    same_with_gradients(loss, loop_intra(features, labels, centers, released), features)


@pytest.mark.equation
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["batch", "image"])
def test_eqs_4_8_to_4_14_between_centres_and_pixels_equal_the_loop_with_gradients(scope, form):
    features, labels, centers = scene_with_centers(scope)
    loss = car.inter_center_to_pixel(features, labels, centers, 0.25, **form)
    same_with_gradients(loss, loop_c2p(features, labels, centers, 0.25, **form), features)


@pytest.mark.equation
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("scope", ["batch", "image"])
def test_eqs_4_4_to_4_7_between_centres_equal_the_loop_with_gradients(scope, released):
    centers = scene_with_centers(scope)[2].requires_grad_()
    loss = car.inter_center_to_center(centers, 0.5, released)
    if scope == "batch":
        expected = loop_c2c(centers, 0.5, released)
    elif released:
        expected = (sum(loop_c2c(mu, 0.5, released).sqrt() for mu in centers) / 2) ** 2
    else:
        expected = sum(loop_c2c(mu, 0.5, released) for mu in centers) / 2
    same_with_gradients(loss, expected, centers)


@pytest.mark.equation
def test_thresholds_are_shared_by_the_other_classes():
    centers = 3 * torch.randn(5, 4, dtype=torch.float64)
    A = torch.softmax(centers @ centers.T / 2, dim=1)
    D = sum(F.relu(A[k, m] - 0.5 / 4) for k, m in product(range(5), range(5)) if k != m)
    loss = car.inter_center_to_center(centers, released=True)
    assert D > 0 and number(loss) == pytest.approx((D / 5).item() ** 2, rel=1e-5, abs=1e-8)


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.equation
@pytest.mark.parametrize("term", ["intra_center_to_pixel", "inter_center_to_pixel"])
def test_no_gradient_reaches_the_centres_of_the_pixel_terms(term):
    features, labels = scene()
    centers = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    loss = getattr(car, term)(features, labels, centers)
    assert torch.autograd.grad(loss, (features, centers), allow_unused=True)[1] is None


@pytest.mark.equation
def test_gradient_reaches_one_of_the_two_centres_between_centres():
    centers = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(car.inter_center_to_center(centers, 0.1), centers)

    def moved(k, c, h):  # row k of A is recomputed, the column stays: the key side does not move
        query = centers.detach().clone()
        query[k, c] += h
        A = torch.softmax(query @ centers.detach().T / 2, dim=1) * (1 - torch.eye(3))
        return F.relu(A - 0.1 / 2).sum(1).square().mean()

    for k, c in product(range(3), range(4)):
        assert found[k, c].item() == pytest.approx(
            ((moved(k, c, 1e-6) - moved(k, c, -1e-6)) / 2e-6).item(), abs=1e-8
        )


@pytest.mark.equation
def test_gradient_of_intra_through_the_centres_cancels():
    features, labels = scene(h=4, w=5)
    centers, _ = car.class_centers(features, labels, 3)
    through = loop_intra(features, labels, centers, released=False, stop=False)
    same_with_gradients(car.intra_center_to_pixel(features, labels, centers), through, features)
    centers, _ = car.class_centers(features, labels, 3)
    released = loop_intra(
        features, labels, centers, released=True, stop=False
    )  # a mean of distances: there it does not
    found = car.intra_center_to_pixel(features, labels, centers, released=True)
    a, b = (torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in (found, released))
    assert not torch.allclose(a, b, atol=1e-3)


# -------------------------------------------------------------------------------------------- traps


@pytest.mark.equation
@pytest.mark.parametrize("wrong", [math.inf, math.nan])
@pytest.mark.parametrize("centers", ["batch", "image", "moving"])
def test_what_an_ignored_pixel_holds_changes_no_loss_and_no_gradient(centers, wrong):
    features, labels = scene(c=4, classes=4)
    module = car.ClassAwareRegularization(4, 4, centers=centers).double().eval()
    results = []
    for value in (0.0, wrong):
        with torch.no_grad():
            features[0, :, 0, 0] = features[1, 2, -1, -1] = value  # scene ignores these two
        losses = module(features, labels)
        (gradient,) = torch.autograd.grad(sum(losses.values()), features)
        assert not gradient[0, :, 0, 0].any() and gradient.any()
        results.append([*losses.values(), gradient])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.equation
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("centers", ["batch", "image", "moving"])
@pytest.mark.parametrize(
    "case", ["all ignored", "one class", "one position", "all classes absent but one pixel"]
)
def test_losses_and_gradients_stay_finite(case, centers, form):
    features, labels = scene(n=1, c=4, h=5, w=3, classes=6)
    if case == "one position":
        features, labels = scene(n=1, c=4, h=1, w=1, classes=6)
        labels[:] = 0
    elif case != "one class":
        labels[:] = 255
        labels[0, 2, 1] = 255 if case == "all ignored" else 5
    else:
        labels[:] = 2
    module = car.ClassAwareRegularization(6, 4, centers=centers, **form).double()
    losses = module(features, labels)
    (gradient,) = torch.autograd.grad(sum(losses.values()), features)
    assert all(loss.isfinite() and loss >= 0 for loss in losses.values())
    assert gradient.isfinite().all()
    if case == "all ignored" and "released" not in form:
        assert losses["intra_c2p"] == losses["inter_c2p"] == 0 and not gradient.any()


@pytest.mark.equation
@pytest.mark.parametrize(
    "function", ["class_centers", "intra_center_to_pixel", "inter_center_to_pixel"]
)
@pytest.mark.parametrize("wrong", [3, -1, 254])
def test_labels_that_are_no_class_are_named(wrong, function):
    features, labels = scene()
    labels[1, 0, 0] = wrong
    last = 3 if function == "class_centers" else torch.zeros(3, 3)
    message = rf"labels \[{wrong}\] with num_classes=3: expected 0 to 2, or 255 = ignored"
    with pytest.raises(ValueError, match=message):
        getattr(car, function)(features, labels, last)


@pytest.mark.equation
@pytest.mark.parametrize("scope", ["batch", "image"])
def test_absent_and_ignored_classes_have_centre_0_with_a_zero_gradient(scope):
    features, labels = scene(classes=4)
    labels[:] = 255
    labels[0, 0, 0] = 2
    centers, counts = car.class_centers(features, labels, 4, scope)
    (gradient,) = torch.autograd.grad(centers.sum(), features)
    assert centers[..., [0, 1, 3], :].abs().max() == 0
    assert counts.sum() == 1
    assert gradient[0, :, 0, 0].tolist() == [1, 1, 1]
    assert gradient.sum() == 3


@pytest.mark.equation
@pytest.mark.parametrize("term", ["intra_center_to_pixel", "inter_center_to_pixel"])
def test_nothing_labelled_is_a_loss_of_0_with_a_zero_gradient(term):
    features, labels = scene()
    loss = getattr(car, term)(features, labels.fill_(255), torch.ones(3, 3))
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss == 0
    assert gradient.abs().max() == 0


@pytest.mark.equation
@pytest.mark.parametrize("function", ["class_centers", *TERM_FUNCTIONS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_float32(dtype, function):
    # the squares of the norms exceed float16's 65504
    features, labels = (30 * torch.randn(2, 16, 4, 4)).to(dtype), torch.randint(5, (2, 4, 4))
    centers = (90 * torch.randn(5, 16)).to(dtype)
    call = getattr(car, function)
    if function == "class_centers":
        found, expected = (call(x, labels, 5)[0] for x in (features, features.float()))
    elif function == "inter_center_to_center":
        found, expected = call(centers), call(centers.float())
    else:
        found, expected = (call(x, labels, centers.float()) for x in (features, features.float()))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected) and found.isfinite().all()


@pytest.mark.equation
def test_labels_as_loaders_give_them_are_refused_with_the_advice_to_convert_them():
    features, labels = scene()
    for dtype in (torch.uint8, torch.float32, torch.int32):
        with pytest.raises(
            ValueError, match=f"labels are {dtype}: expected int64, call labels.long"
        ):
            car.class_centers(features, labels.to(dtype), 3)


@pytest.mark.equation
def test_labels_of_the_image_are_refused_with_the_advice_to_take_them_at_the_positions():
    features, labels = scene()
    large = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    message = r"labels \[2, 8, 12\] do not match \[2, 3, 2, 3\]: .*labels_at\("
    for function in (car.class_centers, car.ClassAwareRegularization.__call__):
        first = [] if function is car.class_centers else [car.ClassAwareRegularization(3)]
        with pytest.raises(ValueError, match=message):
            function(*first, features, large, *([3] if not first else []))
    assert torch.equal(car.labels_at(large, (2, 3)), labels)  # and the advice is right


@pytest.mark.equation
def test_absent_classes_have_centre_0_and_take_part_in_the_softmax():
    centers = torch.zeros(4, 9)
    centers[0] = 100
    A = torch.tensor(
        [[0.0, 0, 0], [1 / 4] * 3, [1 / 4] * 3, [1 / 4] * 3]
    )  # of the others: class 0 sees itself alone
    expected = F.relu(A - 0.5 / 3).sum(1).square().mean()
    assert car.inter_center_to_center(centers).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.equation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    features = (30 * torch.randn(2, 16, 4, 4)).to(
        dtype
    )  # squares of the norms exceed float16's 65504
    features[0, :, 0, 0] = 200
    labels = torch.randint(5, (2, 4, 4))
    module = car.ClassAwareRegularization(5, 16, centers="moving")
    exact = copy.deepcopy(module)(features.float(), labels)
    centers, _ = car.class_centers(features.float(), labels, 5)
    with torch.autocast("cpu", dtype):
        losses, found = module(features, labels), car.class_centers(features, labels, 5)[0]
    assert all(
        losses[name].dtype == torch.float32 and torch.equal(losses[name], exact[name])
        for name in TERMS
    )
    assert torch.equal(found, centers)


@pytest.mark.network
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_figures_are_no_rougher_than_the_features(dtype):
    net, image, labels = (
        Identity().eval(),
        300 * torch.rand(1, 3, 9, 9).to(dtype),
        torch.randint(2, (1, 9, 9)),
    )
    exact = car.pixel_relation(net, image.float())
    with torch.autocast("cpu", dtype):
        assert torch.equal(car.pixel_relation(net, image), exact)
    dependency = evaluate.class_dependency(net, [(image.float(), labels)], 2)
    with torch.autocast("cpu", dtype):
        assert torch.equal(evaluate.class_dependency(net, [(image, labels)], 2), dependency)


@pytest.mark.equation
@pytest.mark.parametrize("centers", ["batch", "image", "moving"])
def test_nothing_of_pixels_times_classes_times_channels_is_materialised(centers, largest):
    N, C, h, w, K = 2, 24, 12, 12, 20
    features, labels = torch.randn(N, C, h, w, requires_grad=True), torch.randint(K, (N, h, w))
    with largest:
        losses = car.ClassAwareRegularization(K, C, centers=centers)(features, labels)
        sum(losses.values()).backward()
    assert N * h * w * max(K, C) <= largest.numbers <= N * h * w * max(K, C)


# --------------------------------------------------------------------------------------- the module


@pytest.mark.equation
def test_the_example_of_four_pixels():
    failed, attempted = doctest.testmod(car)
    assert failed == 0 and attempted > 0


@pytest.mark.equation
def test_module_gives_the_terms_that_are_on():
    features, labels = scene()
    centers, _ = car.class_centers(features, labels, 3)
    losses = car.ClassAwareRegularization(3)(features, labels)
    assert tuple(losses) == TERMS
    expected = (
        car.intra_center_to_pixel(features, labels, centers),
        car.inter_center_to_center(centers, 0.5),
        car.inter_center_to_pixel(features, labels, centers, 0.25),
    )
    assert [losses[name].item() for name in TERMS] == pytest.approx(
        [loss.item() for loss in expected]
    )
    for name, option in zip(TERMS, NONE):
        assert tuple(
            car.ClassAwareRegularization(3, **(NONE | {option: True}))(features, labels)
        ) == (name,)
    assert car.ClassAwareRegularization(3, **NONE)(features, labels) == {}
    thresholds = car.ClassAwareRegularization(3, epsilon_0=0.1, epsilon_1=0.2)(features, labels)
    assert thresholds["inter_c2c"].item() == pytest.approx(
        car.inter_center_to_center(centers, 0.1).item()
    )
    assert thresholds["inter_c2p"].item() == pytest.approx(
        car.inter_center_to_pixel(features, labels, centers, 0.2).item()
    )
    printed = car.ClassAwareRegularization(3, literal=True)(features, labels)
    expected = car.inter_center_to_pixel(features, labels, centers, literal=True).item()
    assert printed["inter_c2p"].item() == pytest.approx(expected)
    assert abs(expected - losses["inter_c2p"].item()) > 1e-3


@pytest.mark.equation
def test_moving_average_by_hand():
    module = car.ClassAwareRegularization(3, 1, centers="moving", decay=0.75)

    def averaged(first, second, labels=(0, 1)):
        centers, counts = car.class_centers(
            one_row([(first,), (second,)]).float(), torch.tensor([[labels]]), 3
        )
        return module.moving_average(centers, counts > 0).flatten().tolist()

    assert averaged(8, 4) == [8, 4, 0]  # what is new is taken as it is
    assert averaged(16, 0) == [0.75 * 8 + 0.25 * 16, 3, 0]
    assert averaged(2, 4, labels=(0, 0)) == [
        0.75 * 10 + 0.25 * 3,
        3,
        0,
    ]  # absent: class 1 keeps its own
    module.eval()
    assert averaged(0, 0) == [0.75 * 8.25, 2.25, 0] and module.mu.flatten().tolist() == [8.25, 3, 0]


@pytest.mark.equation
def test_moving_centres_of_a_forward_pass_know_which_classes_it_held():
    module = car.ClassAwareRegularization(3, 1, centers="moving", decay=0.75)
    module(one_row([(8,), (4,)]).float(), torch.tensor([[[0, 255]]]))
    module(one_row([(16,), (4,)]).float(), torch.tensor([[[0, 1]]]))
    assert module.mu.flatten().tolist() == [10, 4, 0]
    assert module.known.tolist() == [True, True, False]


@pytest.mark.equation
def test_moving_centres_outlive_an_overflow():
    module = car.ClassAwareRegularization(2, 1, centers="moving")
    labels = torch.tensor([[[0, 1]]])
    module(one_row([(8,), (4,)]).float(), labels)
    module(one_row([(math.inf,), (4,)]).float(), labels)
    assert module.mu.isfinite().all()


@pytest.mark.network
def test_moving_centres_have_the_same_gradient_when_compiled():
    features, labels = torch.randn(1, 4, 2, 3), torch.tensor([[[0, 1, 2], [0, 1, 2]]])
    gradients = []
    for compiled in (False, True):
        x = features.clone().requires_grad_()
        module = car.ClassAwareRegularization(3, 4, centers="moving")
        called = torch.compile(module, backend="aot_eager") if compiled else module
        sum(called(x, labels).values()).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.equation
def test_gradient_flows_through_the_new_part_of_the_moving_average():
    module = car.ClassAwareRegularization(2, 3, centers="moving", decay=0.9).double()
    features, labels = scene(classes=3)
    gradients = []
    for _ in range(2):
        centers, counts = car.class_centers(features, labels, 2)
        gradients.append(
            torch.autograd.grad(module.moving_average(centers, counts > 0).sum(), features)[0]
        )
    torch.testing.assert_close(gradients[1], 0.1 * gradients[0])
    assert gradients[0].abs().max() > 0


@pytest.mark.network
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_classes=1), "expected 2 to 255"),
        (dict(num_classes=256), "expected 2 to 255"),
        (dict(num_classes=2, centers="class"), "'batch', 'image', 'moving'"),
        (dict(num_classes=2, decay=1.0), "below 1"),
        (dict(num_classes=2, epsilon_1=-0.1), "at least 0"),
        (dict(num_classes=2, centers="moving"), "needs channels"),
        (dict(num_classes=2, literal=True, released=True), "exclude each other"),
    ],
)
def test_module_says_what_it_expects(options, message):
    with pytest.raises(ValueError, match=message):
        car.ClassAwareRegularization(**options)


# -------------------------------------------------------------------------------- several processes

CASES = [dict(centers=c, **form) for c in ("batch", "image", "moving") for form in FORMS]


def joint_batch():
    """Two images that share some classes; class 4 occurs in the second alone, class 5 in none."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (2, 3, 5), generator=generator)
    labels[0, :2, 0], labels[1, 1, :3] = 255, 4
    return features, labels


def terms_of(features, labels, options):
    """Two steps of the module: the losses of the second, their gradient, and the centres."""
    features = features.clone().requires_grad_()
    module = car.ClassAwareRegularization(6, 4, **options).double()
    module(features.detach() + 1, labels)
    losses = module(features, labels)
    (gradient,) = torch.autograd.grad(
        sum((i + 1) * loss for i, loss in enumerate(losses.values())), features
    )
    centers, counts = car.class_centers(features.detach(), labels, 6)
    return (
        {name: loss.detach() for name, loss in losses.items()},
        gradient,
        centers,
        counts,
        module.state_dict(),
    )


def share_of_the_batch(rank):
    features, labels = joint_batch()
    results = [
        terms_of(features[rank : rank + 1], labels[rank : rank + 1], options) for options in CASES
    ]
    return results


@pytest.mark.system
def test_two_processes_have_the_centres_losses_and_gradients_of_one_with_the_joint_batch(
    two_processes,
):
    results = two_processes(share_of_the_batch)
    for options, first, second in zip(CASES, *results, strict=True):
        losses, gradient, centers, counts, state = terms_of(*joint_batch(), options)
        for name in TERMS:  # train.py logs the mean over the processes
            torch.testing.assert_close((first[0][name] + second[0][name]) / 2, losses[name])
        # DDP averages over the processes; image r's part of the gradient comes from process r alone
        torch.testing.assert_close(torch.cat([first[1], second[1]]) / 2, gradient)
        for share in (first, second):
            torch.testing.assert_close(share[2], centers)
            torch.testing.assert_close(share[3], counts)
            assert all(torch.allclose(share[4][name], value) for name, value in state.items())


# ----------------------------------------------------------------------------- where the labels are


def numbered(height, width):
    """Labels that tell where they are: 1000 · row + column."""
    return (1000 * torch.arange(height)[:, None] + torch.arange(width))[None]


@pytest.mark.equation
def test_labels_are_resized_by_nearest_neighbour():
    for sides, size in (
        ((16, 24), (2, 3)),
        ((224, 100), (16, 60)),
        ((7, 5), (7, 5)),
        ((40, 9), (1, 9)),
    ):
        labels = numbered(*sides)
        expected = F.interpolate(labels[None].double(), size=size, mode="nearest-exact")[0].long()
        assert torch.equal(car.labels_at(labels, size), expected)
    assert car.labels_at(numbered(8, 8), (2, 2)).tolist() == [[[2002, 2006], [6002, 6006]]]


@pytest.mark.equation
def test_labels_are_read_at_the_pixels_given_and_at_the_last_beyond():
    rows, columns = torch.tensor([0, 4, 8]), torch.tensor([2, 6])
    found = car.labels_at(numbered(7, 6), (3, 2), [rows, columns])
    assert found.tolist() == [[[2, 5], [4002, 4005], [6002, 6005]]]


@functools.cache
def without_weights(name, output_stride):
    with torch.device("meta"):
        return backbones.build(name, output_stride)


@pytest.mark.equation
@pytest.mark.parametrize("side", [513, 512, 360, 97, 64, 50, 34, 33, 2])
@pytest.mark.parametrize("name, output_stride", [("resnet18", 32), ("resnet18", 8), ("swin_t", 32)])
def test_networks_of_this_repository_know_where_their_positions_are(name, output_stride, side):
    net = nn.Module()
    net.backbone, net.regularized = without_weights(name, output_stride), "classifier"
    maps = net.backbone(torch.empty(1, 3, 64, side, device="meta"))
    for stride, x in zip(net.backbone.strides, maps):
        expected = [net.backbone.positions(stride, n).tolist() for n in x.shape[2:]]
        assert [p.tolist() for p in backbones.pixels_of(net, (64, side), x.shape[2:])] == expected


@pytest.mark.equation
def test_positions_of_other_maps_are_spread_evenly():
    other = nn.Module()
    assert [p.tolist() for p in backbones.pixels_of(other, (16, 9), (2, 3))] == [[4, 12], [1, 4, 7]]
    ours = nn.Module()  # a map of another size: resized images, as in Specialize and Fuse
    ours.backbone, ours.regularized = (
        backbones.Backbone(nn.Identity(), None, [3], [32]),
        "classifier",
    )
    assert [p.tolist() for p in backbones.pixels_of(ours, (48, 33), (2, 3))] == [
        [12, 36],
        [5, 16, 27],
    ]


# -------------------------------------------------------------------------------------- any network


class Other(nn.Module):
    """Somebody's network: no losses of its own, logits at half the size, `returned` as told."""

    def __init__(self, returned=lambda logits: logits):
        super().__init__()
        self.body, self.unused = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(3, 3, 1)
        self.seg = nn.ModuleDict({"cls": nn.Conv2d(8, 4, 1)})
        self.returned = returned

    def forward(self, x):
        return self.returned(self.seg["cls"](self.body(x).relu()))


class WithLosses(Other):
    """Somebody's network that returns what it is told when it is called with labels."""

    def forward(self, pixel_values, labels=None):
        logits = self.seg["cls"](self.body(pixel_values).relu())
        return self.returned(logits) if labels is not None else logits


class ModelOutput(OrderedDict):
    """As Hugging Face's: a dict whose entries are attributes too."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


def batch(size=(16, 24)):
    return torch.randn(2, 3, *size), torch.randint(4, (2, *size))


@pytest.mark.network
def test_regularize_adds_the_losses_of_what_enters_the_classifier():
    net = Other()
    images, labels = batch()
    labels[0, :5] = 255
    losses = car.regularize(net, "seg.cls", 4, inter_c2c=False)(images, labels)
    assert list(losses) == ["cross_entropy", "intra_c2p", "inter_c2p"]

    features, small = net.body(images).relu(), labels[:, 1::2, 1::2]  # the middles, rounded up
    expected = car.ClassAwareRegularization(4, inter_c2c=False)(features, small)
    logits = F.interpolate(net.seg["cls"](features), size=(16, 24), mode="bilinear")
    expected["cross_entropy"] = F.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(losses, {name: expected[name] for name in losses})
    sum(losses.values()).backward()
    alone = torch.autograd.grad(sum(expected.values()), net.body.weight)[0]
    torch.testing.assert_close(net.body.weight.grad, alone)


@pytest.mark.network
def test_regularize_changes_nothing_at_inference():
    net = Other()
    images, labels = batch()
    before, names = net(images), list(net.state_dict())
    wrapped = car.regularize(net, "seg.cls", 4)
    wrapped(images, labels)
    assert torch.equal(wrapped(images), before) and list(wrapped.net.state_dict()) == names
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert [name for name, _ in wrapped.named_parameters()] == [
        f"net.{name}" for name, _ in net.named_parameters()
    ]


@pytest.mark.network
def test_patches_of_anyones_network_are_labelled_in_the_middle():
    net = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 4, 1))
    images, labels = batch()
    losses = car.regularize(net, "1", 4)(images, labels)
    expected = car.ClassAwareRegularization(4)(net[0](images), labels[:, 2::4, 2::4])
    torch.testing.assert_close({name: losses[name] for name in TERMS}, expected)


@pytest.mark.network
def test_dropouts_are_followed_in_the_order_of_their_calls():
    class Twice(nn.Module):
        """Two Dropouts, the later one registered first, and the first called by keyword."""

        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Dropout(0.3), nn.Dropout(0.3)
            self.body, self.cls = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.cls(input=self.second(self.first(input=self.body(x))))

    net, (images, labels) = Twice().train(), batch()
    losses = car.regularize(net, "cls", 4)(images, labels)
    expected = car.ClassAwareRegularization(4)(net.body(images), labels)
    torch.testing.assert_close({name: losses[name] for name in TERMS}, expected)


@pytest.mark.network
def test_layers_in_place_do_not_overwrite_what_is_regularized():
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    net, (images, labels) = nn.Sequential(nn.Conv2d(3, 8, 1), head), batch()
    losses = car.regularize(net, "1", 4)(images, labels)
    expected = car.ClassAwareRegularization(4)(net[0](images), labels)
    torch.testing.assert_close({name: losses[name] for name in TERMS}, expected)


@pytest.mark.network
@pytest.mark.parametrize("inplace", [False, True])
def test_regularize_takes_the_features_before_dropout(inplace):
    class Dropped(nn.Sequential):
        """Dropout before the classifier, and another that has nothing to do with it."""

    layers = nn.Conv2d(3, 8, 1), nn.Dropout(0.3), nn.Conv2d(8, 8, 1), nn.Dropout2d(0.5, inplace)
    net = Dropped(*layers, nn.Conv2d(8, 4, 1)).train()
    images, labels = batch()
    torch.manual_seed(1)
    losses = car.regularize(net, "4", 4)(images, labels)
    torch.manual_seed(1)
    features = net[2](net[1](net[0](images)))
    expected = car.ClassAwareRegularization(4)(features, labels)
    torch.testing.assert_close({name: losses[name] for name in TERMS}, expected)


def scalars(logits):
    return {"own": logits.square().mean(), "more": logits.abs().mean()}


def model_output(logits):
    return ModelOutput(loss=logits.square().mean(), logits=logits)


@pytest.mark.network
@pytest.mark.parametrize(
    "returned, expected",
    [
        (scalars, scalars),
        (lambda y: y.square().mean(), lambda y: {"loss": y.square().mean()}),
        (lambda y: y.square().mean().reshape(1), lambda y: {"loss": y.square().mean()}),
        (model_output, lambda y: {"loss": y.square().mean()}),
    ],
)
def test_regularize_takes_the_losses_of_a_network_that_has_its_own(returned, expected):
    net = WithLosses(returned)
    images, labels = batch()
    losses = car.regularize(net, "seg.cls", 4)(images, labels)
    expected = expected(net(images))
    assert list(losses) == [*expected, *TERMS]
    torch.testing.assert_close({name: losses[name] for name in expected}, expected)


@pytest.mark.network
@pytest.mark.parametrize(
    "returned, message",
    [
        (lambda y: y, "Tensor; expected a scalar"),
        (
            lambda y: {"loss": y.mean(), "logits": y},
            "dict of loss, logits; expected a scalar",
        ),
        (lambda y: (y.mean(), y), "tuple; expected a scalar"),
        (lambda y: [y.mean()], "list; expected a scalar"),
        (lambda y: ModelOutput(loss=None, logits=y), "ModelOutput of loss, logits;"),
        (lambda y: None, "NoneType"),
        (lambda y: {}, "dict of ;"),
        (lambda y: {"a": y.mean(), "b": []}, "dict of a, b;"),
    ],
)
def test_what_is_no_loss_is_refused_and_named(returned, message):
    with pytest.raises(ValueError, match="the network returned " + message):
        car.regularize(WithLosses(returned), "seg.cls", 4)(*batch())


@pytest.mark.network
@pytest.mark.parametrize(
    "returned",
    [
        lambda y: y,
        lambda y: (y, torch.zeros(2, 3)),  # segmentation_models.pytorch with aux_params
        lambda y: {"out": y},
        lambda y: ModelOutput(out=y, features=y),
    ],
)
def test_regularize_finds_the_logits(returned):
    net = Other(returned)
    images, labels = batch()
    losses = car.regularize(net, "seg.cls", 4)(images, labels)
    assert list(losses) == ["cross_entropy", *TERMS]
    logits = net.seg["cls"](net.body(images).relu())
    expected = F.cross_entropy(F.interpolate(logits, size=(16, 24), mode="bilinear"), labels)
    torch.testing.assert_close(losses["cross_entropy"], expected)


@pytest.mark.network
@pytest.mark.parametrize(
    "returned, message",
    [
        (
            lambda y: [y, y],
            r"list; expected logits \[N, 4, h, w\]",
        ),
        (lambda y: {"logits": y}, "dict of logits;"),
        (lambda y: (), "tuple"),
        (lambda y: {"out": y[:, :3]}, "dict of out;"),  # of other classes
        (lambda y: {"out": y[:, :3], "aux": y}, "dict of out, aux;"),
        (lambda y: (y[:, :3], y), "tuple; expected"),
        (lambda y: y.mean(), "Tensor; expected"),
    ],
)
def test_what_is_no_logits_is_refused_and_named(returned, message):
    with pytest.raises(ValueError, match="the network returned " + message):
        car.regularize(Other(returned), "seg.cls", 4)(*batch())


class Staged(nn.Module):
    """A stage, a Dropout, and a classifier of 7 classes."""

    def __init__(self):
        super().__init__()
        self.stage, self.dropout = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), nn.Dropout(0.1)
        self.classifier = nn.Conv2d(8, 7, 1)

    def forward(self, x):
        return self.classifier(self.dropout(self.stage(x)))


@pytest.mark.network
@pytest.mark.parametrize(
    "name, K, message",
    [
        ("dropout", 7, "'dropout' gives 8 channels, but num_classes=7: name the submodule that"),
        ("stage", 7, "'stage' gives 8 channels, but num_classes=7"),
        ("stage.0", 7, "'stage.0' gives 8 channels, but num_classes=7"),
        ("classifier", 21, "'classifier' gives 7 channels, but num_classes=21"),
    ],
)
def test_a_submodule_that_is_not_the_classifier_is_refused(name, K, message):
    images, labels = batch()
    with pytest.raises(ValueError, match=message):
        car.regularize(Staged(), name, K)(images, labels)


@pytest.mark.network
def test_regularize_says_what_it_expects():
    images, labels = batch((8, 8))
    with pytest.raises(
        ValueError, match="Other has no 'classifier'; its last layers: body, unused, seg.cls"
    ):
        car.regularize(Other(), "classifier", 4)
    with pytest.raises(ValueError, match="Other has no 'neck'"):
        car.regularize(Other(), "seg.cls", 4, regularized="neck")
    with pytest.raises(ValueError, match="'unused' was not called in the forward pass"):
        car.regularize(Other(), "seg.cls", 4, regularized="unused")(images, labels)
    with pytest.raises(ValueError, match="no option epsilon"):
        car.regularize(Other(), "seg.cls", 4, epsilon=0.5)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Unflatten(1, (4, 1, 1)))
    with pytest.raises(ValueError, match="the input of '1' is no feature map"):
        car.regularize(flat, "1", 4)
    with pytest.raises(ValueError, match=r"what enters '2' is \[2, 4\], no feature map"):
        car.regularize(flat, "2", 4)(images, labels)
    with pytest.raises(
        ValueError, match="regularize the network first, then wrap it in DataParallel"
    ):
        car.regularize(nn.DataParallel(Other()), "module.seg.cls", 4)
    with pytest.raises(
        ValueError, match="regularize the network first, then wrap it in OptimizedMod"
    ):
        car.regularize(torch.compile(Other()), "_orig_mod.seg.cls", 4)
    with pytest.raises(ValueError, match="this CARNet has CAR's losses already"):
        car.regularize(car.build(4, "resnet18"), "classifier", 4)
    wrapped = car.regularize(Other(), "seg.cls", 4)
    with pytest.raises(ValueError, match=r"labels \[2, 4, 4\] do not match \[2, 3, 8, 8\]"):
        wrapped(images, labels[:, ::2, ::2])
    with pytest.raises(ValueError, match=r"labels \[4\] with num_classes=4"):
        wrapped(images, labels.clone().fill_(4))


@pytest.mark.network
def test_regularize_keeps_a_moving_average_of_what_it_acts_on():
    assert car.regularize(Other(), "seg.cls", 4, centers="moving").car.mu.shape == (4, 8)
    net = caa.build(4, "resnet18")
    assert car.regularize(net, "classifier", 4, centers="moving").car.mu.shape == (4, 256)


@pytest.mark.network
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_regularize_takes_torchvisions_networks(name):
    kwargs = dict(weights=None, weights_backbone=None, num_classes=4)
    net = segmentation.__dict__[name](**kwargs, aux_loss=True).train()
    for dropout in (module for module in net.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    images, labels = torch.randn(2, 3, 33, 33), torch.randint(4, (2, 33, 33))
    labels[0, :5] = 255
    losses = car.regularize(net, "classifier.4", 4)(images, labels)
    assert list(losses) == ["cross_entropy", "auxiliary", *TERMS]
    out = net(images)
    for key, name, weight in (("out", "cross_entropy", 1), ("aux", "auxiliary", 0.5)):
        expected = weight * F.cross_entropy(out[key], labels, ignore_index=255)
        torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=1e-5)
    sum(losses.values()).backward()
    assert net.backbone["conv1"].weight.grad.abs().sum() > 0
    wrapped = car.regularize(net.eval(), "classifier.4", 4)
    assert torch.equal(wrapped(images)["out"], net(images)["out"])


OURS = [
    (caa, {}, "head.project"),
    (caa, dict(decoder=True, output_stride=16), "decoder.fuse.1"),
    (caa, dict(dual="parallel"), None),
    (ksac, {}, "head.project.0"),
    (ksac, dict(head="aspp"), "head.project"),
    (ksac, dict(head="fcn"), "head.0"),
    (ksac, dict(decoder=True), "decoder.fuse.1"),
    (spgnet, {}, None),
    (pyramid_fuse, {}, "semantic.project.3"),
    (pyramid_fuse, dict(output="single"), "semantic.project.0"),
]


@pytest.mark.network
@pytest.mark.parametrize("method, options, last", OURS)
def test_every_network_names_its_last_linear_output_or_its_features_before_dropout(
    method, options, last
):
    """Or, where it has none, its features before dropout (R3)."""
    backbone = {} if method is spgnet else {"backbone": "resnet18"}
    options = options | (dict(backbones=("resnet18",), channels=32) if method is spgnet else {})
    net = method.build(4, **backbone, **options).eval()
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(4, (2, 64, 64))
    with torch.no_grad():
        _, X, _ = car.watch(net, net.regularized, "classifier", images)
        _, features, _ = car.watch(net, "classifier", "classifier", images)
    if last is None:
        assert torch.equal(X, features)
    else:
        norm = net.get_submodule(last)[1]
        assert isinstance(norm, nn.BatchNorm2d) and net.get_submodule(net.regularized) is norm
        torch.testing.assert_close(norm(X).relu(), features)  # no dropout in between
    torch.manual_seed(1)
    own = net(images, labels)
    losses = car.regularize(net, "classifier", 4)(images, labels)
    assert list(losses) == [*own, *TERMS] and all(torch.equal(losses[k], own[k]) for k in own)


# ---------------------------------------------------------------------------------------- the heads


@pytest.mark.network
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_every_parameter_at_odd_sizes(head, released):
    net = car.build(4, LIGHT, head=head, released=released, auxiliary=True).train()
    images, labels = torch.randn(2, 3, 37, 50), torch.randint(4, (2, 37, 50))
    losses = net(images, labels)
    assert list(losses) == ["cross_entropy", "auxiliary", *TERMS]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    logits = net(images[:1, :, :31])
    assert logits.shape == (1, 4, 31, 50) and logits.dtype == torch.float32
    assert isinstance(net.classifier, nn.Conv2d) and net.classifier.kernel_size == (1, 1)


@pytest.mark.network
@pytest.mark.parametrize(
    "backbone, head",
    [("resnet18", "uper"), ("resnet18", "ocr"), ("resnet18", "fcn"), ("swin_t", "uper")],
)
def test_losses_are_those_of_the_logits_and_the_auxiliary_logits(backbone, head):
    net = car.build(4, backbone, head=head, auxiliary=True).eval()
    images, labels = torch.randn(1, 3, 50, 70), torch.randint(4, (1, 50, 70))
    labels[0, :9] = 255
    with torch.no_grad():
        losses, logits = net(images, labels), net(images)
        torch.testing.assert_close(
            losses["cross_entropy"], F.cross_entropy(logits, labels, ignore_index=255)
        )
        maps = net.backbone(images)
        if head == "ocr":  # the regions are found on the level before the last
            coarse, stride = net.head.regions(maps[-2]), net.backbone.strides[-2]
        else:
            coarse, stride = net.auxiliary(maps[-1]), net.backbone.strides[-1]
        coarse = net.backbone.upsample(coarse, stride, (50, 70))
        expected = 0.4 * F.cross_entropy(coarse, labels, ignore_index=255)
        torch.testing.assert_close(losses["auxiliary"], expected)
        features = entering(net, "classifier", images)
        expected = net.backbone.upsample(net.classifier(features), net.stride, (50, 70))
        torch.testing.assert_close(logits, expected)


def entering(net, name, images):
    """What enters the submodule `name` of `net`."""
    return car.watch(net, name, name, images)[1]


@pytest.mark.network
def test_every_option_reaches_its_place():
    def parts(**options):
        with torch.device("meta"):
            net = car.build(4, "resnet50", **options)
        return net, net.car

    net, terms = parts()
    found = terms.epsilon_0, terms.epsilon_1, terms.centers, terms.literal, terms.released
    assert found == (0.5, 0.25, "batch", False, False)  # Sect. 4.4.1
    assert (terms.intra, terms.inter_c2c, terms.inter_c2p) == (True, True, True)
    dilations = [block.conv2.dilation[0] for block in net.backbone.body.layer4.children()]
    assert dilations == [4, 8, 16]  # multi-grid (1, 2, 4)
    _, terms = parts(centers="moving", decay=0.8, epsilon_0=0.25, epsilon_1=0.125, inter_c2c=False)
    found = terms.centers, terms.decay, terms.epsilon_0, terms.epsilon_1
    assert found == ("moving", 0.8, 0.25, 0.125) and terms.mu.shape == (4, 512)
    assert (terms.intra, terms.inter_c2c, terms.inter_c2p) == (True, False, True)
    assert parts(literal=True)[1].literal
    net, terms = parts(channels=256, centers="moving")
    assert net.classifier.in_channels == 256 and terms.mu.shape == (4, 256)
    assert parts(channels=256, centers="moving", place="input")[1].mu.shape == (4, 512)
    net, terms = parts(head="uper", released=True, centers="moving")
    assert terms.released and terms.mu.shape == (4, 512) and net.released_conv.out_channels == 512
    assert net.backbone.strides == (4, 8, 16, 32) and net.head.top[0].kernel_size == (3, 3)
    convs = [m for m in net.backbone.body.layer4.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.dilation == (1, 1) for conv in convs)
    assert parts(head="uper", pool_pointwise=True)[0].head.top[0].kernel_size == (1, 1)


@pytest.mark.system
def test_recipes_are_the_papers():
    assert set(car.RECIPES) == {
        "pascal_context",
        "coco_stuff10k",
        "shapes",
    }  # that of shapes is ours
    for recipe in car.RECIPES["pascal_context"], car.RECIPES["coco_stuff10k"]:  # Sect. 4.4.1
        settings = ("iterations", "batch_size", "optimizer", "lr", "weight_decay", "backbone")
        assert [recipe[name] for name in settings] == [30_000, 16, "sgd", 0.01, 0.001, "resnet50"]


@pytest.mark.network
def test_without_losses_it_is_the_baseline():
    net = car.build(4, "resnet18", **NONE).train()
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(4, (2, 32, 32))
    assert list(net(images, labels)) == ["cross_entropy"]


@pytest.mark.network
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pointwise", [True, False])
def test_the_last_convolution_is_1x1_or_3x3_with_batch_norm_and_relu(head, pointwise):
    with torch.device("meta"):
        net = car.build(4, "resnet50", head=head, pointwise=pointwise)
    conv, norm, relu = net.last
    assert conv.kernel_size[0] == (1 if pointwise or head == "ocr" else 3) and conv.bias is None
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(relu, nn.ReLU)
    assert net.classifier.kernel_size == (1, 1)


PLACES = ["input", "linear", "norm", "relu"]


@pytest.mark.network
@pytest.mark.parametrize("place", [*PLACES, None, "released"])
def test_the_losses_act_where_place_says(place):
    images, labels = torch.randn(2, 3, 33, 41), torch.randint(4, (2, 33, 41))
    options = {None: {}, "released": dict(released=True)}.get(place, dict(place=place))
    net = trained(car.build(4, "resnet18", **options))
    x = net.head(net.backbone(images)[-1])
    if place == "released":
        assert net.released_conv.bias is not None and net.released_conv.out_channels == 512
        x = F.conv2d(x, net.released_conv.weight, net.released_conv.bias)
    linear = F.conv2d(x, net.last[0].weight)
    bn = net.last[1]
    norm = F.batch_norm(linear, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    steps = dict(zip(PLACES, (x, linear, norm, norm.relu())))
    X = steps[{None: "linear", "released": "input"}.get(place, place)]
    expected = net.car(X, labels[:, ::8, ::8])
    losses = net(images, labels)
    torch.testing.assert_close({term: losses[term] for term in TERMS}, expected)
    torch.testing.assert_close(entering(net, net.regularized, images), X)
    logits = F.conv2d(norm.relu(), net.classifier.weight, net.classifier.bias)
    torch.testing.assert_close(net(images), net.backbone.upsample(logits, 8, (33, 41)))


@pytest.mark.network
@pytest.mark.parametrize(
    "backbone, size, start", [("resnet18", (9, 13), 2), ("swin_t", (8, 12), 4)]
)
def test_upers_features_are_averaged_to_stride_8_and_labelled_in_the_middle(backbone, size, start):
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(4, (2, 64, 96))
    net = car.build(4, backbone, head="uper").eval()
    features = F.avg_pool2d(entering(net, "last.1", images), 2, ceil_mode=True)
    assert features.shape[2:] == size
    rows, columns = (
        [min(start + 8 * i, side - 1) for i in range(n)] for side, n in zip((64, 96), size)
    )
    expected = net.car(features, labels[:, rows][:, :, columns])
    losses = net(images, labels)
    assert all(torch.equal(losses[term], expected[term]) for term in TERMS)


def layers(module):
    """(kernel size, inputs, outputs, ReLU or not) of its convolutions; each has batch norm."""
    found = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU))]
    kinds = "".join({nn.Conv2d: "c", nn.BatchNorm2d: "n", nn.ReLU: "r"}[type(m)] for m in found)
    convs = [m for m in found if isinstance(m, nn.Conv2d)]
    return kinds, [(conv.kernel_size[0], conv.in_channels, conv.out_channels) for conv in convs]


@pytest.mark.network
def test_the_heads_layers():
    with torch.device("meta"):
        head = car.SelfAttention(6)
        assert layers(head.reduce) == ("cnr", [(3, 6, 512)])
        convs = [head.query, head.key, head.value]
        assert [(c.kernel_size[0], c.out_channels, c.bias is not None) for c in convs] == [
            (1, 64, True), (1, 64, True), (1, 512, True)]  # fmt: skip
        head = car.OCR(6, 5, 4)
        assert layers(head.pixels) == ("cnr", [(3, 6, 512)])
        assert layers(head.regions) == ("cnrc", [(3, 5, 512), (1, 512, 4)])
        for transform in (head.phi, head.psi):
            assert layers(transform) == ("cnrcnr", [(1, 512, 256), (1, 256, 256)])
        assert layers(head.delta) == ("cnr", [(1, 512, 256)])
        assert layers(head.rho) == ("cnr", [(1, 256, 512)])
        head = car.UPer((4, 6, 8, 10))
        assert all(layers(pool) == ("cnr", [(1, 10, 512)]) for pool in head.pools)
        assert layers(head.top) == ("cnr", [(3, 10 + 4 * 512, 512)])
        assert [layers(c) for c in head.lateral] == [("cnr", [(1, c, 512)]) for c in (4, 6, 8)]
        assert [layers(c) for c in head.smooth] == [("cnr", [(3, 512, 512)])] * 3
        net = car.build(4, "resnet18", head="fcn", auxiliary=True)
        assert layers(net.head) == ("cnr", [(3, 512, 512)])
        assert layers(net.auxiliary) == ("cnrc", [(1, 512, 256), (1, 256, 4)])
        assert net.auxiliary[1].p == 0.1


@pytest.mark.equation
def test_self_attention_is_the_unscaled_softmax_with_a_residual():
    head = car.SelfAttention(6).eval()
    x = torch.randn(2, 6, 3, 4)
    r = head.reduce(x)
    q, k, v = ((layer(r)).flatten(2) for layer in (head.query, head.key, head.value))
    weight = torch.softmax(torch.einsum("ncp,ncm->npm", q, k), dim=-1)
    expected = r + torch.einsum("npm,ncm->ncp", weight, v).reshape(r.shape)
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=1e-4)
    assert (
        torch.equal(head.query.weight, head.key.weight) and head.query.weight is not head.key.weight
    )


@pytest.mark.equation
def test_ocr_is_its_papers_equations():
    head = car.OCR(5, 4, 3).eval()
    x, before = torch.randn(1, 5, 2, 3), torch.randn(1, 4, 2, 3)
    features, coarse = head(x, before, backbones.resize)
    pixels = head.pixels(x)[0].flatten(1)  # [512, hw]
    assert torch.equal(coarse, head.regions(before))
    m = torch.softmax(coarse[0].flatten(1), dim=1)  # [K, hw]
    f = torch.stack([sum(m[k, i] * pixels[:, i] for i in range(6)) for k in range(3)])  # Eq. (1)
    regions = f.T[None, ..., None]
    phi, psi, delta = (
        transform(y)[0].flatten(1)
        for transform, y in (
            (head.phi, pixels.view(1, 512, 2, 3)),
            (head.psi, regions),
            (head.delta, regions),
        )
    )
    w = torch.softmax(
        torch.stack([torch.stack([phi[:, i] @ psi[:, k] for k in range(3)]) for i in range(6)]),
        dim=1,
    )  # Eq. (3)
    y = torch.stack(
        [sum(w[i, k] * delta[:, k] for k in range(3)) for i in range(6)], dim=1
    )  # Eq. (2)
    y = head.rho(y.reshape(1, 256, 2, 3))
    torch.testing.assert_close(
        features, torch.cat([pixels.view(1, 512, 2, 3), y], dim=1), atol=1e-5, rtol=1e-4
    )


@pytest.mark.network
@pytest.mark.parametrize("patches", [True, False])
def test_uper_level_by_level(patches):
    head = car.UPer((4, 6, 8, 10)).eval()
    x4, x8, x16, x32 = (torch.randn(1, c, s, s + 1) for c, s in zip((4, 6, 8, 10), (17, 9, 5, 7)))

    def up(x, like, corners=not patches):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=corners)

    pooled = [
        up(pool(F.adaptive_avg_pool2d(x32, s)), x32, False)
        for pool, s in zip(head.pools, (1, 2, 3, 6))
    ]
    y32 = head.top(torch.cat([x32, *pooled], 1))
    y16 = head.lateral[2](x16) + up(y32, x16)
    y8 = head.lateral[1](x8) + up(y16, x8)
    y4 = head.lateral[0](x4) + up(y8, x4)
    pyramid = [head.smooth[0](y4), head.smooth[1](y8), head.smooth[2](y16), y32]
    found = head([x4, x8, x16, x32], lambda x, like: backbones.resize(x, like, patches))
    torch.testing.assert_close(found, torch.cat([up(y, x4) for y in pyramid], 1))


@pytest.mark.network
def test_only_the_norms_of_levels_that_a_head_reads_learn(meta):
    for head, levels in (("fcn", [3]), ("uper", [0, 1, 2, 3]), ("ocr", [2, 3])):
        norms = car.build(4, "swin_t", head=head, output_stride=32).backbone.norms
        learning = [
            i for i, norm in enumerate(norms) if all(p.requires_grad for p in norm.parameters())
        ]
        assert learning == levels


@pytest.mark.network
def test_swin_tiny_with_uper_is_table_4_1s_second_network():
    net = car.build(4, "swin_t", head="uper").train()
    images, labels = torch.randn(2, 3, 65, 40), torch.randint(4, (2, 65, 40))
    losses = net(images, labels)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(images).shape == (2, 4, 65, 40) and net.stride == 4


@pytest.mark.network
def test_caa_with_car_on_swin_with_jpu_is_table_4_6s_network():
    net = caa.build(4, "swin_t").eval()
    images, labels = torch.randn(2, 3, 65, 40), torch.randint(4, (2, 65, 40))
    assert net.stride == 8 and net.backbone.jpu is not None
    features = entering(net, "head.project.1", images)
    assert features.shape[2:] == (12, 8)  # of 96x64
    rows, columns = (
        [min(4 + 8 * i, side - 1) for i in range(n)] for side, n in ((65, 12), (40, 8))
    )  # middles of patches
    expected = car.ClassAwareRegularization(4)(features, labels[:, rows][:, :, columns])
    losses = car.regularize(net, "classifier", 4)(images, labels)
    assert all(torch.equal(losses[term], expected[term]) for term in TERMS)


@pytest.mark.network
def test_options_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="head='caa': it is one of 'self_attention', 'fcn'"):
        car.build(4, "resnet18", head="caa")
    with pytest.raises(ValueError, match="CARNet has no option intra_c2p; .*epsilon_0=0.5"):
        car.build(4, "resnet18", intra_c2p=False)
    with pytest.raises(ValueError, match="intra='no': expected True or False"):
        car.build(4, "resnet18", intra="no")
    with pytest.raises(ValueError, match="epsilon_0='abc': expected a number"):
        car.build(4, "resnet18", epsilon_0="abc")
    with pytest.raises(ValueError, match="labels .* do not match"):
        car.build(4, "resnet18")(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="place='classifier': it is one of"):
        car.build(4, "resnet18", place="classifier")
    with pytest.raises(ValueError, match="released=True has its own"):
        car.build(4, "resnet18", place="relu", released=True)


# ------------------------------------------------------------------------------------------ figures


class Identity(nn.Module):
    """A network whose features are the image."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.classifier(x)


@pytest.mark.equation
def test_fig_4_4_by_hand():
    image = torch.tensor(
        [[[1.0, 2, 0]], [[0.0, 1, 3]], [[0.0, 0, -1]]]
    )  # pixels (1 0 0), (2 1 0), (0 3 -1)
    net = Identity().eval()
    assert car.pixel_relation(net, image, (0, 1)).tolist() == [[2, 5, 3]]
    assert car.pixel_relation(net, image[None], (0, 0)).tolist() == [[1, 2, 0]]
    assert car.pixel_relation(net, -image.flip(0), (0, 2)).tolist() == [[0, 3, 10]]
    opposite = image * torch.tensor([1.0, -1, 1])  # the product with the pixel (-2 -1 0) is -2
    assert car.pixel_relation(net, opposite, (0, 0)).tolist() == [[1, 0, 0]]
    with pytest.raises(ValueError, match="outside the image: it has 1 rows and 3 columns"):
        car.pixel_relation(net, image, (1, 0))
    with pytest.raises(ValueError, match="evaluation mode"):
        car.pixel_relation(net.train(), image)


@pytest.mark.network
def test_fig_4_4_of_a_network_has_the_images_size_and_knows_the_place():
    net = car.build(4, "resnet18").eval()
    image = torch.randn(3, 45, 70)
    (similarity,) = net.figures(image, (19, 39)).values()
    features = entering(net, "last.1", image[None])[0]
    assert similarity.shape == (45, 70) and similarity.min() >= 0
    assert similarity[19, 39] == 1  # the marked pixel's product with itself
    dots = torch.einsum(
        "c,chw->hw", features[:, 2, 5], features
    )  # stride 8: rows 16 to 24, columns 32 to 40
    assert similarity[43, 69] == pytest.approx(
        (dots[5, 9] / dots[2, 5]).item(), rel=1e-4
    )  # next to row 40, column 72
    products = car.pixel_relation(net, image, (19, 39), "last.1")
    torch.testing.assert_close(similarity * dots[2, 5], products)


@pytest.mark.equation
def test_fig_4_4_is_drawn_over_the_marked_pixels_own_product(monkeypatch):
    net, products = types.SimpleNamespace(regularized="last"), torch.tensor([[2.0, 6, 0]])
    monkeypatch.setattr(car, "pixel_relation", lambda *given: products)
    for pixel, expected in ((0, 0), [[1.0, 3, 0]]), ((0, 1), [[1 / 3, 1, 0]]):
        (found,) = car.CARNet.figures(net, torch.zeros(3, 1, 3), pixel).values()
        torch.testing.assert_close(found, torch.tensor(expected))
    products[:] = 0  # the marked pixel's feature is 0
    (found,) = car.CARNet.figures(net, torch.zeros(3, 1, 3), (0, 2)).values()
    assert found.tolist() == [[0, 0, 0]]
