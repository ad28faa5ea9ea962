"""Class-Aware Regularization (CAR).

Ye Huang, Di Kang, Liang Chen, Xuefei Zhe, Wenjing Jia, Linchao Bao, Xiangjian He: "CAR: Class-aware
Regularizations for Semantic Segmentation", ECCV 2022, https://arxiv.org/abs/2203.07160. The numbers
below are those of Ye Huang's thesis "Context-aware Image Semantic Segmentation" (University of
Technology Sydney, 2022), chapter 4.

The idea: a class should be recognised whatever it appears with. The centre of a class is the mean
of its pixels' features, by the ground truth. Three losses act on the features that enter the
classifier: pixels move to the centre of their class, centres move apart, and pixels move away from
the centres of other classes. At inference nothing of it is left.

    Eq.  (4.1)          class centres μ                     -> class_centers
    Eqs. (4.2), (4.3)   L_intra-c2p                         -> intra_center_to_pixel
    Eqs. (4.4)-(4.7)    L_inter-c2c                         -> inter_center_to_center
    Eqs. (4.8)-(4.14)   L_inter-c2p                         -> inter_center_to_pixel
    Sect. 4.4.2.3       moving average of the centres       -> ClassAwareRegularization(centers=)
    Fig. 4.3            before any network's classifier     -> regularize, CARNet
    Fig. 4.4            similarity of a pixel to all pixels -> pixel_relation, CARNet.figures
    Fig. 4.5            class-dependency map                -> class_dependency

What the paper prints and cannot mean:
- Eq. (4.10) adds Λ_c to the energy of every class. Meant, and in the released code, is that it
  replaces the own class's: Λ_c2p(1 - Y) + Λ_c·Y.
- Eqs. (4.4), (4.8) print μᵀ·μ and μᵀ·X; for matrices [classes, C], [HW, C] and the printed results
  read μ·μᵀ and X·μᵀ.

Where the paper is silent, as the released code does:
- No gradient flows to the centres in L_intra-c2p and L_inter-c2p, nor to one of the two μ in Eq.
  (4.4). In L_intra-c2p that changes nothing where μ is the batch's own: Σ(μ - X) over a class is 0,
  so in a mean of squares the gradient through μ cancels.
- A class that is absent has centre 0 and takes part in both softmaxes. All loss weights are 1.
- Labels are taken at the features' positions by nearest neighbour. UPerNet's features are averaged
  2x2 first (stride 8).
- The terms are computed in float32, also under mixed precision.
Ignored pixels are 0 in Eq. (4.3) and count in its mean; so too, in the paper's form, in Eq. (4.14).

released=True is the authors' code where it departs from the equations:
- Each f_mse is the square of the mean, not the mean of the squares.
- Eq. (4.11) divides by √C, as Eq. (4.4) does. (As printed, L_inter-c2p can outweigh the cross
  entropy.)
- In L_inter-c2p ignored pixels are not left out: every class is another class to them.
- Sums over the classes are clipped to 1e-7 … 1 - 1e-7, L_intra-c2p to at least 1e-5.
- CARNet puts a 1x1 convolution (bias, no norm, no activation, at most 512 channels) before its last
  convolution; the losses act on its output. In the paper's form they act on the last convolution's,
  which enters the classifier.

Over several processes sums and counts of Eq. (4.1) are added up, with gradient; losses and
gradients, as DistributedDataParallel averages them, are those of one process with the joint batch.

    Table 4.1            intra, inter_c2c, inter_c2p, pointwise; S1 to S8: head="uper" and swin_t
    Sect. 4.4.2.3        channels=256; pool_pointwise=True
    Table 4.2            centers="moving", decay
    Table 4.3            centers="image"
    Tables 4.4, 4.5      head, backbone; epsilon_0=0.25 for rows marked §; CCNet, DANet and CPNet
                         through `regularize`
    Tables 4.6, 4.7      head, backbone, auxiliary; RECIPES; evaluate.py --scales … --flip
    Table 4.8            train.py --seed --deterministic
(OCR on HRNet's four maps together is not there.)

To copy: this file, backbones.py, ksac.py and caa.py. What stands above the heads needs backbones.py
alone, and down to `ClassAwareRegularization` torch alone.
"""

import contextlib
import functools
import inspect
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

import backbones
import caa
import ksac

IGNORE = 255

# ---------------------------------------------------------------------------------------- equations


def in_float32(term):
    """`term`, with autocast off: it would make halves of the matrix products."""

    @functools.wraps(term)
    def outside(first, *rest, **options):
        with torch.autocast(first.device.type, enabled=False):
            return term(first, *rest, **options)

    return outside


@in_float32
def class_centers(features, labels, num_classes, scope="batch"):
    """Eq. (4.1): (μ, N_non-zero), the mean feature and the number of pixels of each class.

    features `[N, C, h, w]`, labels int64 `[N, h, w]`, 255 = ignored -> `[K, C]`, `[K]` over the
    batch of all processes, which must all call it; scope="image": `[N, K, C]`, `[N, K]`. float32 at
    least. A class that is absent has centre 0.
    """
    X, Y = flat(features), one_hot(labels, num_classes, features)  # [N, HW, C], [N, HW, K]
    sums, counts = Y.transpose(1, 2) @ X, Y.sum(1)  # Yᵀ·X  [N, K, C]; N_non-zero  [N, K]
    if scope == "batch":
        sums, counts = over_processes(sums.sum(0)), over_processes(counts.sum(0))
    return sums / counts.clamp(min=1).unsqueeze(-1), counts  # Eq. (4.1)


@in_float32
def intra_center_to_pixel(features, labels, centers, released=False):
    """L_intra-c2p, Eqs. (4.2), (4.3): how far the pixels are from the centre of their class.
    Scalar, at least 0.

    features `[N, C, h, w]`, labels int64 `[N, h, w]`, 255 = ignored, centers `[K, C]` or `[N, K,
    C]`.
    """
    # [N, HW, C], [N, K, C]
    X, mu = (
        flat(features),
        centers.detach().expand(len(features), *centers.shape[-2:]),
    )
    sigma = (labels == IGNORE).flatten(1).unsqueeze(2)  # [N, HW, 1]
    own = labels.flatten(1).masked_fill(sigma[..., 0], 0).unsqueeze(2).expand(-1, -1, X.shape[2])
    # Y·μ without the product: the centre of each pixel's class  [N, HW, C]
    Y_mu = mu.gather(1, own)
    D = (Y_mu - X).abs().masked_fill(sigma, 0)  # Eq. (4.3)
    return over_mean(D).square().clamp(min=1e-5) if released else D.square().mean()  # Eq. (4.2)


@in_float32
def inter_center_to_center(centers, epsilon=0.5, released=False):
    """L_inter-c2c, Eqs. (4.4)-(4.7): how much of a class's similarity goes to the other classes.
    Scalar in 0…1.

    centers `[K, C]` or `[N, K, C]`, K at least 2; gradient flows to one of the two μ, the rows of
    A. epsilon: ε_0.
    """
    K, C = centers.shape[-2:]
    A = torch.softmax(centers @ centers.detach().mT / math.sqrt(C), dim=-1)  # Eq. (4.4)  [K, K]
    D = (1 - torch.eye(K, device=A.device)) * A  # Eq. (4.5)
    D = F.relu(D - epsilon / (K - 1)).sum(-1)  # Eq. (4.6)  [K]
    # Eq. (4.7)
    return over_mean(D.clamp(1e-7, 1 - 1e-7)).square() if released else D.square().mean()


@in_float32
def inter_center_to_pixel(features, labels, centers, epsilon=0.25, released=False):
    """L_inter-c2p, Eqs. (4.8)-(4.14): how much of a pixel's similarity goes to the centres of other
    classes. Scalar in 0…1.

    features `[N, C, h, w]`, labels int64 `[N, h, w]`, 255 = ignored, centers `[K, C]` or `[N, K,
    C]`, K at least 2.
    epsilon: ε_1.
    """
    K, C = centers.shape[-2:]
    mu = centers.detach()
    X, Y = flat(features), one_hot(labels, K, features)  # [N, HW, C], [N, HW, K]
    energy = X @ mu.mT  # Λ_c2p, Eq. (4.8)  [N, HW, K]
    own = mu.square().sum(-1).unsqueeze(-2)  # Λ_c, Eq. (4.9)  [1, K] or [N, 1, K]
    energy = energy * (1 - Y) + own * Y  # Λ', Eq. (4.10)
    # Eq. (4.11)  [N, HW, K]
    A = torch.softmax(energy / math.sqrt(C) if released else energy, dim=-1)
    D = (1 - Y) * A  # Eq. (4.12)
    D = F.relu(D - epsilon / (K - 1)).sum(-1)  # Eq. (4.13)  [N, HW]
    if released:
        return over_mean(D.clamp(1e-7, 1 - 1e-7)).square()
    return D.masked_fill((labels == IGNORE).flatten(1), 0).square().mean()  # Eq. (4.14)


def flat(features):
    """X_flat (Sect. 4.3.1): `[N, C, h, w]` -> `[N, HW, C]`, float32 at least."""
    return features.flatten(2).mT.to(torch.promote_types(features.dtype, torch.float32))


def one_hot(labels, num_classes, features):
    """Y_flat (Sect. 4.3.1): int64 `[N, h, w]` -> `[N, HW, K]` for `features`; an ignored pixel
    belongs to no class.
    """
    Y = F.one_hot(
        labels.flatten(1).where(labels.flatten(1) != IGNORE, num_classes), num_classes + 1
    )
    return Y[..., :num_classes].to(torch.promote_types(features.dtype, torch.float32))


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs. (PyTorch's is deprecated.)"""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


def over_processes(x):
    """The sum of x over all processes, with its gradient."""
    return _AllReduce.apply(x) if dist.is_initialized() else x


def over_mean(x):
    """The mean of x over all processes, with its gradient."""
    return over_processes(x.mean()) / (dist.get_world_size() if dist.is_initialized() else 1)


# ------------------------------------------------------------------------------------------- module


class ClassAwareRegularization(nn.Module):
    """The three terms of Sect. 4.3: (features `[N, C, h, w]`, labels `[N, h, w]`) -> dict of scalar
    losses, float32.

    The names are "intra_c2p", "inter_c2c", "inter_c2p"; of them those that are switched on.

    num_classes: at least 2; channels: C, needed for centers="moving" alone
    centers: "batch" (of all processes), "image", "moving": `decay` times the centres so far plus 1
    - decay times the batch's, through which alone gradient flows; a class that is absent keeps its
    own, one that is new takes the batch's epsilon_0, epsilon_1: the thresholds of Eqs. (4.6) and
    (4.13), divided by the number of other classes
    released: the authors' released form
    """

    def __init__(
        self,
        num_classes,
        channels=None,
        *,
        intra=True,
        inter_c2c=True,
        inter_c2p=True,
        centers="batch",
        decay=0.9,
        epsilon_0=0.5,
        epsilon_1=0.25,
        released=False,
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"num_classes={num_classes}: the terms between classes need at least 2"
            )
        if centers not in ("batch", "image", "moving"):
            raise ValueError(f"centers={centers!r}: it is 'batch', 'image' or 'moving'")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: expected a number from 0 on, below 1")
        self.num_classes, self.centers, self.decay, self.released = (
            num_classes,
            centers,
            decay,
            released,
        )
        self.intra, self.inter_c2c, self.inter_c2p = intra, inter_c2c, inter_c2p
        self.epsilon_0, self.epsilon_1 = epsilon_0, epsilon_1
        if centers == "moving":
            if channels is None:
                raise ValueError(
                    "centers='moving' needs channels, the number of the features (regularize: a "
                    "convolution's)"
                )
            self.register_buffer("mu", torch.zeros(num_classes, channels))
            self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, features, labels):
        if not (self.intra or self.inter_c2c or self.inter_c2p):
            return {}
        scope = "image" if self.centers == "image" else "batch"
        mu, counts = class_centers(features, labels, self.num_classes, scope)
        if self.centers == "moving":
            mu = self.moving_average(mu, counts > 0)
        losses = {}
        if self.intra:
            losses["intra_c2p"] = intra_center_to_pixel(features, labels, mu, self.released)
        if self.inter_c2c:
            losses["inter_c2c"] = inter_center_to_center(mu, self.epsilon_0, self.released)
        if self.inter_c2p:
            losses["inter_c2p"] = inter_center_to_pixel(
                features, labels, mu, self.epsilon_1, self.released
            )
        return losses

    def moving_average(self, mu, present):
        """Sect. 4.4.2.3: the averaged centres `[K, C]`; in training mode they are kept."""
        # the buffers change before the backward pass
        old, known = (
            self.mu.clone(),
            self.seen.clone().unsqueeze(1),
        )
        mixed = torch.where(known, self.decay * old + (1 - self.decay) * mu, mu)
        mu = torch.where(present.unsqueeze(1), mixed, old)
        if self.training:
            self.mu.copy_(mu.detach())
            self.seen |= present
        return mu


# -------------------------------------------------------------------------------------- any network


def regularize(net, classifier, num_classes, **terms):
    """CAR for any segmentation network: wraps `net` so that a call with labels also returns CAR's
    losses.

    classifier: the name of the submodule of `net` whose input `[N, C, h, w]` is regularised, as in
    `net.get_submodule(name)`: "classifier" in this repository, "classifier.4" in torchvision's
    networks. Where it is called several times, the last call counts. terms: keywords of
    ClassAwareRegularization.

    Called with images alone the wrapper is `net`, unchanged. Called with labels int64 `[N, H, W]`,
    255 = ignored, it returns a dict of scalar losses: CAR's beside those of `net`. If the forward
    of `net` takes no `labels`, its own are the cross entropy of what it returns: logits `[N, K, h,
    w]`, or torchvision's dict of "out" and perhaps "aux", weighted by half.

    Raises ValueError for a name that `net` does not have, and in the forward pass where that
    submodule is not reached, or by something else than a feature map. Wrap first, then let
    DistributedDataParallel or torch.compile wrap that.
    """
    return Regularized(net, classifier, num_classes, terms)


class Regularized(nn.Module):
    """What `regularize` returns: `.net`, as it was given, and `.car`."""

    def __init__(self, net, classifier, num_classes, terms):
        super().__init__()
        modules = dict(net.named_modules())
        if not classifier or classifier not in modules:
            last = [
                name
                for name, module in modules.items()
                if isinstance(module, (nn.Conv2d, nn.Linear))
            ][-4:]
            raise ValueError(
                f"{type(net).__name__} has no submodule '{classifier}'; its last layers are "
                f"{', '.join(last)}"
            )
        self.net, self.classifier = net, classifier
        channels = getattr(modules[classifier], "in_channels", None)
        terms = backbones.check_options(ClassAwareRegularization, terms)
        self.car = ClassAwareRegularization(num_classes, channels, **terms).to(
            next(net.parameters()).device
        )
        self.takes_labels = "labels" in inspect.signature(net.forward).parameters

    def forward(self, images, labels=None):
        if labels is None:
            return self.net(images)
        with inputs_of(self.net, self.classifier) as seen:
            if self.takes_labels:
                losses = self.net(images, labels)
            else:
                losses = logits_losses(self.net(images), labels)
        features = feature_map(seen, self.classifier)
        shift = half_patch(self.net, labels, features.shape[2:])
        return losses | self.car(features, labels_at(labels, features.shape[2:], shift))


@contextlib.contextmanager
def inputs_of(net, name):
    """The first input of each call of the submodule `name` while the context is open, as a list."""
    seen = []
    handle = net.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: seen.extend(inputs[:1])
    )
    try:
        yield seen
    finally:
        handle.remove()


def feature_map(seen, name):
    """The last of the inputs that were `seen`; ValueError where it is no feature map."""
    if not seen:
        raise ValueError(
            f"the submodule '{name}' took no part in the forward pass: name the one that gives the "
            "logits"
        )
    if not isinstance(seen[-1], torch.Tensor) or seen[-1].ndim != 4:
        shape = (
            list(seen[-1].shape) if isinstance(seen[-1], torch.Tensor) else type(seen[-1]).__name__
        )
        raise ValueError(
            f"what enters '{name}' is no feature map [N, C, h, w] but {shape}: name another "
            "submodule"
        )
    return seen[-1]


def logits_losses(output, labels):
    """The losses of what a network without losses of its own returns, logits or torchvision's dict
    of them.
    """
    outputs = output if isinstance(output, dict) else {"out": output}
    losses = {}
    for key, name, weight in (("out", "cross_entropy", 1.0), ("aux", "auxiliary", 0.5)):
        if key in outputs:
            logits = F.interpolate(
                outputs[key].float(), size=labels.shape[1:], mode="bilinear", align_corners=False
            )
            losses[name] = weight * backbones.pixel_cross_entropy(logits, labels)
    if "cross_entropy" not in losses:
        raise ValueError(
            f"the network returns a dict of {', '.join(map(str, outputs))}; expected logits, or a "
            "dict with 'out'"
        )
    return losses


def stride_of(side, length):
    """The power of two that is next to side / length, from above; at least 1."""
    return 2 ** max(0, math.ceil(math.log2(side / length)))


def pixels_of(side, length):
    """Which pixel of `side` each of the `length` positions of a feature map lies at: int64
    `[length]`.

    The stride is stride_of(side, length), and position i lies at i·stride, the last ones perhaps
    behind the end, where a network has continued the image: by less than a stride, to k·32 + 1
    pixels, or to k·32. Where the map has no such size, its positions are spread evenly.
    """
    stride = stride_of(side, length)
    last = (length - 1) * stride
    if (
        last < side + stride - 1
        or last == -(-(side - 1) // 32) * 32
        or last + stride == -(-side // 32) * 32
    ):
        return torch.arange(length) * stride
    return ((torch.arange(length) + 0.5) * (side / length)).long()


def labels_at(labels, size, shift=0, stride=None):
    """Labels `[N, H, W]` at the positions of a feature map of `size`, `shift` pixels on: nearest
    neighbour, `[N, h, w]`.

    stride: the map's; pixels_of finds it if None.
    """
    found = (
        torch.arange(length) * stride if stride else pixels_of(side, length)
        for side, length in zip(labels.shape[1:], size)
    )
    rows, columns = (
        (p + shift).clamp(max=side - 1).to(labels.device)
        for p, side in zip(found, labels.shape[1:])
    )
    return labels[:, rows[:, None], columns]


def half_patch(net, labels, size):
    """How far the middle of a patch is from its corner: for the networks here that cut the image
    into patches, else 0.
    """
    backbone = getattr(net, "backbone", None)
    if not isinstance(backbone, backbones.Backbone):
        return 0
    return first_pixel(backbone, stride_of(labels.shape[1], size[0]))


def first_pixel(backbone, stride):
    """The pixel of the first position of a map at `stride`."""
    return backbone.positions(stride, 1).item()


# ------------------------------------------------------------------------------------------ figures


@torch.no_grad()
def pixel_relation(net, image, pixel=None, classifier="classifier"):
    """Fig. 4.4: the dot product of the feature at `pixel` with that of every pixel, `[H, W]`,
    scaled to 0…1.

    image `[3, H, W]` or `[1, 3, H, W]`; pixel: (row, column), the image's centre if None;
    classifier as in `regularize`. Products below 0 are drawn as 0. ValueError in training mode, for
    a batch, for a pixel outside the image.
    """
    image = backbones.one_image(net, image)
    H, W = image.shape[2:]
    row, column = backbones.one_pixel(pixel, (H, W))
    with inputs_of(net, classifier) as seen:
        net(image)
    X = feature_map(seen, classifier)[0].float()  # [C, h, w]
    grids = (pixels_of(side, length) for side, length in zip((H, W), X.shape[1:]))
    rows, columns = (
        (torch.arange(side)[:, None] - grid).abs().argmin(1) for side, grid in zip((H, W), grids)
    )
    similarity = (X[:, rows[row], columns[column]][:, None, None] * X).sum(0).clamp(min=0)
    return (similarity / similarity.max().clamp(min=1e-12))[rows[:, None], columns]


@torch.no_grad()
def class_dependency(net, pairs, num_classes, classifier="classifier"):
    """Fig. 4.5: the dot products of the centres of every two classes over a whole data set, `[K,
    K]`.

    pairs: an iterable of (images `[N, 3, H, W]`, labels `[N, H, W]`); the centres are the means of
    all their pixels. A row is scaled to 0…1 by its greatest value, products below 0 are 0; row and
    column of a class that does not occur are 0. `net` is to be in evaluation mode. classifier as in
    `regularize`.
    """
    sums, total = 0, 0
    for images, labels in pairs:
        with inputs_of(net, classifier) as seen:
            net(images)
        features = feature_map(seen, classifier)
        positions = labels_at(
            labels, features.shape[2:], half_patch(net, labels, features.shape[2:])
        )
        mu, counts = class_centers(features, positions, num_classes, scope="image")
        sums, total = (
            sums + (mu * counts.unsqueeze(2)).sum(0).double(),
            total + counts.sum(0).double(),
        )
    mu = sums / total.clamp(min=1).unsqueeze(1)
    similarity = (mu @ mu.T).clamp(min=0)
    return similarity / similarity.amax(1, keepdim=True).clamp(min=1e-12)


# -------------------------------------------------------------------------------------------- heads


class SelfAttention(nn.Module):
    """Self-attention (Wang et al., "Non-local Neural Networks", CVPR 2018, "embedded Gaussian"), as
    in the released code.

    `[N, in_channels, h, w]` -> `[N, 512, h, w]`. Queries and keys of 64 channels, with one
    initialisation; no scale, no output projection. In float32: an unscaled product can exceed
    float16. reduce: what stands before it, a 3x3 convolution if None.
    """

    def __init__(self, in_channels, reduce=None):
        super().__init__()
        self.reduce = reduce or Conv2dNormActivation(in_channels, 512, 3)
        self.query, self.key, self.value = (
            nn.Conv2d(512, 64, 1),
            nn.Conv2d(512, 64, 1),
            nn.Conv2d(512, 512, 1),
        )
        self.key.load_state_dict(self.query.state_dict())

    def forward(self, x):
        x = self.reduce(x)
        query, key, value = (layer(x).flatten(2).mT for layer in (self.query, self.key, self.value))
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=1.0)
        return x + y.mT.reshape(x.shape).to(x.dtype)


class UPer(nn.Module):
    """UPerNet's pyramid pooling on top of a feature pyramid (Xiao et al., "Unified Perceptual
    Parsing", ECCV 2018).

    Four maps, finest first -> `[N, 4·512, h, w]` of the finest, still to be fused by a convolution
    (CARNet.last). resize: the backbone's. pointwise: a 1x1 convolution after the pooling, not 3x3.
    """

    def __init__(self, channels, pointwise=False):
        super().__init__()
        self.pools = nn.ModuleList(Conv2dNormActivation(channels[-1], 512, 1) for _ in (1, 2, 3, 6))
        self.top = Conv2dNormActivation(channels[-1] + 4 * 512, 512, 1 if pointwise else 3)
        self.lateral = nn.ModuleList(Conv2dNormActivation(c, 512, 1) for c in channels[:-1])
        self.smooth = nn.ModuleList(Conv2dNormActivation(512, 512, 3) for _ in channels[:-1])

    def forward(self, maps, resize):
        *finer, x = maps
        how = dict(size=x.shape[2:], mode="bilinear", align_corners=False)
        pooled = [
            F.interpolate(pool(backbones.average_pool(x, size)), **how)
            for pool, size in zip(self.pools, (1, 2, 3, 6))
        ]
        x = self.top(torch.cat([x, *pooled], dim=1))
        pyramid = [x]
        for level, lateral, smooth in reversed(list(zip(finer, self.lateral, self.smooth))):
            lateral = lateral(level)
            x = lateral + resize(x, lateral)
            pyramid.insert(0, smooth(x))
        return torch.cat([resize(level, pyramid[0]) for level in pyramid], dim=1)


class OCR(nn.Module):
    """Object-contextual representations (Yuan et al., "Object-Contextual Representations", ECCV
    2020, Eqs. 1 to 4).

    x `[N, in_channels, h, w]` and the map of the level before -> (pixels and their object context
    `[N, 2·512, h, w]`, still to be fused by a 1x1 convolution (CARNet.last); logits `[N, K, …]` of
    the soft object regions, found on the level before). resize: the backbone's.
    """

    def __init__(self, in_channels, before_channels, num_classes):
        super().__init__()
        self.pixels = Conv2dNormActivation(in_channels, 512, 3)
        self.regions = nn.Sequential(
            Conv2dNormActivation(before_channels, 512, 3), nn.Conv2d(512, num_classes, 1)
        )
        self.phi = nn.Sequential(
            Conv2dNormActivation(512, 256, 1), Conv2dNormActivation(256, 256, 1)
        )
        self.psi = nn.Sequential(
            Conv2dNormActivation(512, 256, 1), Conv2dNormActivation(256, 256, 1)
        )
        self.delta, self.rho = Conv2dNormActivation(512, 256, 1), Conv2dNormActivation(256, 512, 1)

    def forward(self, x, before, resize):
        coarse, x = self.regions(before), self.pixels(x)
        with torch.autocast(x.device.type, enabled=False):
            m = resize(coarse.float(), x).flatten(2).softmax(2)  # [N, K, hw]
            # the object regions' features  [N, 512, K, 1]
            f = (m @ x.float().flatten(2).mT).mT.unsqueeze(3)
        query, key, value = (
            y.flatten(2).mT.float() for y in (self.phi(x), self.psi(f), self.delta(f))
        )
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # [N, hw, 256]
        y = self.rho(y.mT.reshape(len(x), 256, *x.shape[2:]))
        return torch.cat([x, y], dim=1), coarse


# ------------------------------------------------------------------------------------------ network


class CARNet(nn.Module):
    """Backbone, head, last convolution, CAR on what enters the classifier, bilinear upsampling of
    the logits (Fig. 4.3).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of scalar losses: "cross_entropy"; with
    `auxiliary`, and for OCR, "auxiliary" (0.4 of it); and CAR's "intra_c2p", "inter_c2c",
    "inter_c2p".

    head: "self_attention"; "fcn"; "deeplabv3" (ksac.ASPP); "uper"; "ocr"; "caa" (caa.CAA)
    intra, inter_c2c, inter_c2p: the terms (Table 4.1)
    pointwise: the paper's "A": the last convolution before the classifier is 1x1, not 3x3 (after
    OCR and CAA it always is) centers, decay, epsilon_0, epsilon_1, released: see
    ClassAwareRegularization; released: also caa.CAA's
    channels: of the last convolution; the head's own if None (512; 256 for DeepLabv3 and CAA), 256
    in Sect. 4.4.2.3
    pool_pointwise: UPer's convolution after the pooling is 1x1 too (Sect. 4.4.2.3: half a point to
    one better)
    auxiliary: a loss on the backbone's last map (Table 4.6)
    output_stride: of the backbone; 8, or 32 for UPer, if None (Sect. 4.4.1)
    """

    def __init__(
        self,
        num_classes,
        backbone="resnet50",
        weights=None,
        *,
        head="self_attention",
        intra=True,
        inter_c2c=True,
        inter_c2p=True,
        pointwise=True,
        centers="batch",
        decay=0.9,
        epsilon_0=0.5,
        epsilon_1=0.25,
        released=False,
        channels=None,
        pool_pointwise=False,
        auxiliary=False,
        output_stride=None,
    ):
        super().__init__()
        output_stride = output_stride or (32 if head == "uper" else 8)
        grid = (1, 2, 4) if backbone.startswith("resnet") and output_stride < 32 else None
        self.backbone = backbones.build(backbone, output_stride, weights, grid)
        levels = self.backbone.channels
        if head == "self_attention":
            self.head, width = SelfAttention(levels[-1]), 512
        elif head == "fcn":
            self.head, width = Conv2dNormActivation(levels[-1], 512, 3), 512
        elif head == "deeplabv3":
            self.head, width = (
                ksac.ASPP(levels[-1], [rate * 16 // output_stride for rate in (6, 12, 18)]),
                256,
            )
        elif head == "uper":
            self.head, width = UPer(levels, pool_pointwise), 4 * 512
        elif head == "ocr":
            self.head, width = OCR(levels[-1], levels[-2], num_classes), 2 * 512
        elif head == "caa":
            self.head, width = caa.CAA(levels[-1], released=released), 256
        else:
            raise ValueError(
                f"head={head!r}: it is self_attention, fcn, deeplabv3, uper, ocr or caa"
            )
        self.stride = self.backbone.strides[0 if head == "uper" else -1]
        self.linear = nn.Conv2d(width, min(512, width), 1) if released else nn.Identity()
        width = min(512, width) if released else width
        channels = channels or min(512, width)
        self.last = Conv2dNormActivation(
            width, channels, 1 if pointwise or head in ("ocr", "caa") else 3
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        layers = (
            Conv2dNormActivation(levels[-1], 256, 1),
            nn.Dropout(0.1),
            nn.Conv2d(256, num_classes, 1),
        )
        self.auxiliary = nn.Sequential(*layers) if auxiliary and head != "ocr" else None
        # the terms act on what enters this submodule
        self.regularized = "last" if released else "classifier"
        terms = dict(
            intra=intra, inter_c2c=inter_c2c, inter_c2p=inter_c2p, centers=centers, decay=decay
        )
        terms |= dict(epsilon_0=epsilon_0, epsilon_1=epsilon_1, released=released)
        self.car = ClassAwareRegularization(num_classes, width if released else channels, **terms)

    def forward(self, images, labels=None):
        size, strides, coarse = images.shape[2:], self.backbone.strides, None
        maps = self.backbone(images)
        if isinstance(self.head, OCR):
            x, coarse = self.head(maps[-1], maps[-2], self.backbone.resize)
        elif isinstance(self.head, UPer):
            x = self.head(maps, self.backbone.resize)
        else:
            x = self.head(maps[-1])
        x = self.linear(x)
        features = self.last(x)
        logits = self.backbone.upsample(self.classifier(features), self.stride, size)
        if labels is None:
            return logits
        losses = {"cross_entropy": backbones.pixel_cross_entropy(logits, labels)}
        if self.auxiliary is not None:
            coarse = self.auxiliary(maps[-1])
        if coarse is not None:
            stride = strides[-2 if isinstance(self.head, OCR) else -1]
            coarse = self.backbone.upsample(coarse, stride, size)
            losses["auxiliary"] = 0.4 * backbones.pixel_cross_entropy(coarse, labels)
        features, stride = x if self.car.released else features, self.stride
        shift = first_pixel(self.backbone, stride)
        if isinstance(self.head, UPer):
            features, shift, stride = (
                F.avg_pool2d(features, 2, ceil_mode=True),
                shift + stride // 2,
                2 * stride,
            )
        return losses | self.car(features, labels_at(labels, features.shape[2:], shift, stride))

    def figures(self, image, pixel=None):
        """Fig. 4.4: the similarity of each pixel to `pixel` (pixel_relation), `[H, W]` in 0…1."""
        return {"similarity": pixel_relation(self, image, pixel, self.regularized)}


# Sect. 4.4.1. SGD, poly decay, synchronized batch norm, stride 8 (CARNet's own); Table 4.1's row
# R8. For Table 4.6's last row: --backbone convnext_large --option head=caa --option auxiliary=True
# --optimizer adam --iterations 40000 --lr 6e-5 (the rate is open, Swin's own for segmentation).
_COMMON = dict(
    backbone="resnet50",
    weights="imagenet",  # open
    iterations=30_000,
    batch_size=16,
    optimizer="sgd",
    lr=0.01,
    power=0.9,  # open; the released configuration's
    momentum=0.9,  # open; the released configuration's
    # the thesis's; the released configuration and the HFGD paper, of the same authors, have 1e-4
    weight_decay=1e-3,
    crop_size=513,  # open; the released configuration's
    scale=(0.5, 2.0),  # open; the released configuration's
    scale_step=0.1,  # open; the released configuration's
    color="brightness",  # open; the released configuration's
    bn_momentum=0.0003,  # open; the released configuration's (Keras 0.9997)
)
RECIPES = {
    "pascal_context": _COMMON,  # Sect. 4.4.2
    "coco_stuff10k": _COMMON,  # Sect. 4.4.3
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A CARNet; `options` are its keywords, the thesis's final setting by default. ValueError for
    an unknown one.
    """
    return CARNet(num_classes, backbone, weights, **backbones.check_options(CARNet, options))
