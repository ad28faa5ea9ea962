"""Class-Aware Regularization (CAR).

Ye Huang, Di Kang, Liang Chen, Xuefei Zhe, Wenjing Jia, Linchao Bao, Xiangjian He, ECCV 2022,
https://arxiv.org/abs/2203.07160. Equations, tables and sections have the numbers of Ye Huang's
thesis "Context-aware Image Semantic Segmentation" (University of Technology Sydney, 2022),
chapter 4.

The idea. A network that has always seen cows on grass takes a sheep on grass for a cow. It should
recognise a class whatever the class appears with. CAR adds three losses to the training of any
segmentation network. They act on the features before the classifier. A class has a centre: the mean
feature of its pixels, found with the ground truth. The first loss pulls pixels to the centre of
their class. The second pushes centres apart. The third pushes pixels away from the centres of other
classes. Inference does not change.

The mathematics. X [HW, C] are the features of all positions. Y [HW, K] are their labels, one-hot;
for an ignored pixel the row of Y is 0 and σ is 1, elsewhere σ is 0. K is the thesis's N_class.
N_non-zero [K] counts the pixels of each class. A product with · is a matrix product, others are
elementwise. f_sum adds over the classes, f_mse is the mean of the squares, softmax is over the last
index. The code adds a leading N for the images, and f_mse averages over them too. ε_0 = 0.5,
ε_1 = 0.25.

    class centres, of all images of the batch
    μ = Yᵀ·X / N_non-zero                                 [K, C]    (4.1) -> class_centers

    pixels to the centre of their class
    D_intra = (1 - σ) |Y·μ - X|                          [HW, C]    (4.3)
    L_intra-c2p = f_mse(D_intra)                                    (4.2) -> intra_center_to_pixel

    centres apart
    A_c2c = softmax(μ·μᵀ / √C)                            [K, K]    (4.4)
    D_c2c = (1 - eye(K)) A_c2c                            [K, K]    (4.5)
    L_inter-c2c = f_mse( f_sum( max(D_c2c - ε_0 / (K-1), 0) ) )
                                        f_sum: [K]   (4.6), (4.7) -> inter_center_to_center
    pixels away from the centres of other classes
    Λ_c2p = X·μᵀ                                         [HW, K]    (4.8)
    Λ_c = diag(μ·μᵀ)                                         [K]    (4.9)
    Λ' = (1 - Y) Λ_c2p + Y Λ_c                           [HW, K]   (4.10)
    A_c2p = softmax(Λ' / √C)                             [HW, K]   (4.11)
    D_c2p = (1 - Y) A_c2p                                [HW, K]   (4.12)
    L_inter-c2p = f_mse( (1 - σ) f_sum( max(D_c2p - ε_1 / (K-1), 0) ) )
                                        f_sum: [HW]  (4.13), (4.14) -> inter_center_to_pixel

Gradients are stopped at every μ but the first one of (4.4). Also here: moving centres, Sect.
4.4.2.3 -> ClassAwareRegularization; Fig. 4.4 -> pixel_relation; Fig. 4.5 -> evaluate.py.

Read first `class_centers`, then the three losses, then `ClassAwareRegularization`. `regularize`
adds them to a network of your own. Tests: tests/test_car.py. To copy: this file and backbones.py.
"""

import inspect
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

import backbones

# ---------------------------------------------------------------------------------------- equations


def without_autocast(function):
    """`function` without autocast, which would compute its matrix products in half precision."""
    return torch.autocast("cpu", enabled=False)(torch.autocast("cuda", enabled=False)(function))


@without_autocast
def class_centers(features, labels, num_classes, scope="batch"):
    """Eq. (4.1): (μ, N_non-zero), the mean feature and the number of pixels of each class.

    features `[N, C, h, w]`, labels int64 `[N, h, w]`, 255 = ignored -> float32 `[K, C]`, `[K]` over
    the batch; scope="image": `[N, K, C]`, `[N, K]`. An absent class has centre 0. In distributed
    training the batch is that of all processes, and each must call this. Here and below float64
    stays float64. Raises ValueError as backbones.check_labels.
    """
    Y = one_hot(labels, num_classes, features)  # [N, HW, K]
    X = flat(features, labels)  # [N, HW, C]
    sums, counts = Y.mT @ X, Y.sum(1)  # Yᵀ·X  [N, K, C]; N_non-zero  [N, K]
    if scope == "batch":
        sums, counts = sum_over_processes(sums.sum(0)), sum_over_processes(counts.sum(0))
    return sums / counts.clamp(min=1).unsqueeze(-1), counts  # Eq. (4.1)


@without_autocast
def intra_center_to_pixel(features, labels, centers, released=False):
    """L_intra-c2p, Eqs. (4.2), (4.3): squared distance of pixels from the centre of their class.

    features `[N, C, h, w]`, labels int64 `[N, h, w]`, 255 = ignored, centers `[K, C]` or
    `[N, K, C]` -> scalar, at least 0. released: see ClassAwareRegularization, here and below.
    Raises ValueError as backbones.check_labels.
    """
    backbones.check_labels(labels, features, centers.shape[-2])
    # Gradients are stopped at the centres, as in the released code; the thesis does not say. With
    # the batch's centres and a mean of squares they would be 0: Σ(μ - X) over a class is 0.
    mu = centers.detach().expand(len(features), *centers.shape[-2:])  # [N, K, C]
    X, sigma = flat(features, labels), ignored(labels)  # [N, HW, C], [N, HW, 1]
    index = labels.flatten(1).unsqueeze(2).masked_fill(sigma, 0).expand(-1, -1, mu.shape[2])
    Y_mu = mu.gather(1, index)  # Y·μ: looking centres up is cheaper than multiplying  [N, HW, C]
    # Ignored pixels add zero loss but stay in the denominator.
    D = (Y_mu - X).abs().masked_fill(sigma, 0)  # Eq. (4.3)  [N, HW, C]
    loss = f_mse(D, released)  # Eq. (4.2)
    return loss.clamp(min=1e-5) if released else loss


@without_autocast
def inter_center_to_center(centers, epsilon=0.5, released=False):
    """L_inter-c2c, Eqs. (4.4)-(4.7): how far a class's similarities to others exceed ε_0/(K-1).

    centers `[K, C]` or `[N, K, C]`, K at least 2 -> scalar in 0…1. epsilon: ε_0.
    """
    K, C = centers.shape[-2:]
    mu = centers.to(torch.promote_types(centers.dtype, torch.float32))
    # Here and in Eqs. (4.8), (4.9) the thesis prints the transpose on the left. The shapes that it
    # prints are those of μ·μᵀ and X·μᵀ. The gradient is stopped at the second μ, as in the released
    # code. Absent classes have centre 0 and take part in the softmax, here and in Eq. (4.11).
    A = torch.softmax(mu @ mu.detach().mT / math.sqrt(C), dim=-1)  # Eq. (4.4)  [K, K]
    D = (1 - torch.eye(K, device=A.device)) * A  # Eq. (4.5)
    D = F.relu(D - epsilon / (K - 1)).sum(-1)  # Eq. (4.6)  [K]
    return f_mse(D.clamp(1e-7, 1 - 1e-7) if released else D, released)  # Eq. (4.7)


@without_autocast
def inter_center_to_pixel(features, labels, centers, epsilon=0.25, released=False, literal=False):
    """L_inter-c2p, Eqs. (4.8)-(4.14): how far the similarities of a pixel to the centres of other
    classes exceed ε_1/(K-1).

    features `[N, C, h, w]`, labels int64 `[N, h, w]`, 255 = ignored, centers `[K, C]` or
    `[N, K, C]`, K at least 2 -> scalar in 0…1. epsilon: ε_1. literal: Eq. (4.11) as printed,
    without √C. Raises ValueError as backbones.check_labels.
    """
    K, C = centers.shape[-2:]
    Y = one_hot(labels, K, features)  # [N, HW, K]
    X = flat(features) if released else flat(features, labels)  # [N, HW, C]
    mu = centers.detach().to(X.dtype)  # stopped as in the released code; the thesis does not say
    energy = X @ mu.mT  # Λ_c2p, Eq. (4.8)  [N, HW, K]
    diagonal = mu.square().sum(-1).unsqueeze(-2)  # Λ_c, Eq. (4.9)  [1, K] or [N, 1, K]
    # Erratum: Eq. (4.10) prints + Λ_c without Y. The text and the released code replace.
    energy = (1 - Y) * energy + Y * diagonal  # Λ', Eq. (4.10)
    # Erratum: Eq. (4.11) prints no √C. Eq. (4.4) has it; this loss is "similar to the calculation
    # of" that one; the released code has it; Eq. (4.10), of the same block, is misprinted too.
    # Without it the network trains much worse (docs/results.md).
    A = torch.softmax(energy if literal else energy / math.sqrt(C), dim=-1)  # Eq. (4.11)
    D = (1 - Y) * A  # Eq. (4.12)  [N, HW, K]
    D = F.relu(D - epsilon / (K - 1)).sum(-1)  # Eq. (4.13)  [N, HW]
    # Ignored pixels are masked, as in Eq. (4.3). Eqs. (4.12) to (4.14) print no σ: our choice.
    masked = D.masked_fill(ignored(labels).squeeze(2), 0)
    return f_mse(D.clamp(1e-7, 1 - 1e-7) if released else masked, released)  # Eq. (4.14)


def flat(features, labels=None):
    """X_flat, Sect. 4.3.1: `[N, C, h, w]` -> `[N, HW, C]`, float32.

    labels: those of the positions. The rows of ignored pixels are then 0: products with 0 in Y
    would not remove a feature that is infinite.
    """
    X = features.flatten(2).mT.to(torch.promote_types(features.dtype, torch.float32))
    return X if labels is None else X.masked_fill(ignored(labels), 0)


def ignored(labels):
    """σ, Sect. 4.3: labels `[N, h, w]` -> bool `[N, HW, 1]`, True for ignored pixels."""
    return (labels == 255).flatten(1).unsqueeze(2)


def one_hot(labels, num_classes, features):
    """Y_flat, Sect. 4.3.1: `[N, h, w]` -> `[N, HW, K]`; the row of an ignored pixel is 0."""
    backbones.check_labels(labels, features, num_classes)
    Y = labels.flatten(1).unsqueeze(2) == torch.arange(num_classes, device=labels.device)
    return Y.to(torch.promote_types(features.dtype, torch.float32))


def labels_at(labels, size, pixels=None):
    """The labels of a feature map's positions: `[N, H, W]` -> `[N, h, w]`, size: (h, w).

    pixels: row and column indices of the positions in the image, int64 `[h]`, `[w]`; those beyond
    it are clamped. None: spread evenly, which is resizing by "nearest-exact".
    """
    pairs = zip(pixels or backbones.spread(labels.shape[1:], size), labels.shape[1:])
    rows, columns = (p.clamp(max=side - 1).to(labels.device) for p, side in pairs)
    return labels[:, rows[:, None], columns]


def sum_over_processes(x):
    """The sum of x over all processes. Its gradient is multiplied by their number.

    DistributedDataParallel divides gradients by that number. The result is the gradient of one
    process with the joint batch, if all processes compute the same loss from the sum.
    """
    if not dist.is_initialized():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (x - x.detach())


def f_mse(D, released=False):
    """The mean of the squares; released: the square of the mean, which is over all processes."""
    if not released:
        return D.square().mean()
    world = dist.get_world_size() if dist.is_initialized() else 1
    return (sum_over_processes(D.mean()) / world).square()


# ------------------------------------------------------------------------------------------- module


class ClassAwareRegularization(nn.Module):
    """The three losses of Sect. 4.3, each with weight 1, as in the released code.

    Called with features `[N, C, h, w]`, labels int64 `[N, h, w]`, 255 = ignored -> dict of float32
    scalars "intra_c2p", "inter_c2c", "inter_c2p". In a training step:

        terms = ClassAwareRegularization(num_classes=59)
        x = net.last_conv(images)  # before batch norm and ReLU  [N, C, h, w]
        logits = net.upsample(net.classifier(net.norm(x).relu()))
        losses = terms(x, labels_at(labels, x.shape[2:]))
        sum(losses.values(), start=cross_entropy(logits, labels)).backward()

    argument                     values                                     default    thesis
    num_classes, channels        K, 2 to 255; C, for "moving" alone
    intra, inter_c2c, inter_c2p  False: without this loss                   True       Table 4.1
    centers                      "batch", "image", "moving"                 "batch"    Table 4.3
    decay                        of moving centres, 0 ≤ decay < 1           0.9        Table 4.2
    epsilon_0, epsilon_1         thresholds of Eqs. (4.6), (4.13)           0.5, 0.25  Sect. 4.4.1
    literal                      True: Eq. (4.11) as printed, without √C    False      Eq. (4.11)
    released                     True: the authors' code                    False

                        released=True                         the authors' code
    f_mse               square of the mean of all processes   of the mean of each replica
    clipping            f_sum to 1e-7 … 1 - 1e-7,             the same
                        L_intra-c2p to at least 1e-5
    ignored pixels      all classes are other classes         the same
                        to them in L_inter-c2p
    1x1 convolution     CARNet's and HFGD's, see there        in each network, before the last one
    moving centres      as without `released`                 start from noise; no gradient to c2c
    features of OCR     as they are                           pooled 2x2
    weight decay        --weight-decay 2e-4 --no-decay-norms  Keras' l2(1e-4) on kernels alone

    Raises ValueError for K, centers, decay and channels that do not fit, for literal and released
    together, and as backbones.check_labels.
    """

    def __init__(self, num_classes, channels=None, *, intra=True, inter_c2c=True, inter_c2p=True,
                 centers="batch", decay=0.9, epsilon_0=0.5, epsilon_1=0.25, literal=False,
                 released=False):  # fmt: skip
        super().__init__()
        if not 2 <= num_classes <= 255:
            raise ValueError(f"num_classes={num_classes}: expected 2 to 255; label 255 is ignored")
        if centers not in ("batch", "image", "moving"):
            raise ValueError(f"centers={centers!r}: it is 'batch', 'image' or 'moving'")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: expected a number from 0 to below 1")
        if literal and released:
            raise ValueError("literal and released exclude each other: the released code has √C")
        self.num_classes, self.centers, self.decay = num_classes, centers, decay
        self.intra, self.inter_c2c, self.inter_c2p = intra, inter_c2c, inter_c2p
        if min(epsilon_0, epsilon_1) < 0:
            raise ValueError(f"epsilon_0={epsilon_0}, epsilon_1={epsilon_1}: expected at least 0")
        self.epsilon_0, self.epsilon_1 = epsilon_0, epsilon_1
        self.literal, self.released = literal, released
        if centers == "moving":
            if channels is None:
                raise ValueError("centers='moving' needs channels, how many the features have")
            self.register_buffer("mu", torch.zeros(num_classes, channels))
            self.register_buffer("known", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, features, labels):
        scope = "image" if self.centers == "image" else "batch"
        mu, counts = class_centers(features, labels, self.num_classes, scope)
        if self.centers == "moving":
            mu = self.moving_average(mu, counts > 0)
        losses, released = {}, self.released
        if self.intra:
            losses["intra_c2p"] = intra_center_to_pixel(features, labels, mu, released)
        if self.inter_c2c:
            losses["inter_c2c"] = inter_center_to_center(mu, self.epsilon_0, released)
        if self.inter_c2p:
            losses["inter_c2p"] = inter_center_to_pixel(
                features, labels, mu, self.epsilon_1, released, self.literal
            )
        return losses

    @torch.compiler.disable  # compiled, the backward pass would read the new buffers
    def moving_average(self, mu, present):
        """Sect. 4.4.2.3: decay · old + (1 - decay) · μ, `[K, C]`; in training mode also stored.

        Gradients flow only through the current batch's μ. An absent class keeps its centre; a class
        that is seen for the first time takes the batch's.
        """
        # Cloned, because the buffers change before the backward pass.
        old, known = self.mu.clone(), self.known.clone().unsqueeze(1)
        mixed = torch.where(known, self.decay * old + (1 - self.decay) * mu, mu)
        mu = torch.where(present.unsqueeze(1), mixed, old)
        if self.training:
            self.mu.copy_(mu.detach().where(mu.isfinite(), old))  # float16 may overflow once
            self.known |= present
        return mu


# ------------------------------------------------------------------------------------------ network


class CARNet(nn.Module):
    """Backbone, head, last convolution, classifier, bilinear upsampling of the logits (Fig. 4.3).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of scalar losses: "cross_entropy";
    with `auxiliary`, and always for OCR, "auxiliary"; CAR's "intra_c2p", "inter_c2c", "inter_c2p".

    option          values                                         default           thesis
    head            "self_attention"; "fcn"; "ocr"; "uper", whose  "self_attention"  Table 4.5
                    features are averaged 2x2 for the losses
    pointwise       "A": the last convolution is 1x1, else 3x3;    True              Table 4.1
                    OCR's is always 1x1. (Sect. 4.4.2.3 calls it the leading convolution.)
    channels        of the last convolution                        512               Sect. 4.4.2.3
    pool_pointwise  UPer's convolution after the pooling is 1x1    False             Sect. 4.4.2.3
    auxiliary       a loss on the last map, of weight 0.4          False             Table 4.6
    output_stride   of the backbone; None: 8, UPer and HRNets 32   None              Sect. 4.4.1
    place           the losses act on the last convolution's       "linear"          see below
                    "input", on its "linear" output, after its batch "norm", after its "relu"
    released        a 1x1 convolution (bias, no norm, no           False             authors' code
                    activation) before the last one, also at inference; the losses act on its output
    **terms         intra, inter_c2c, inter_c2p, centers, decay, epsilon_0, epsilon_1, literal of
                    ClassAwareRegularization. Rows with § in Table 4.5 have epsilon_0=0.25.

    Fig. 4.3 says of the place only "right before the logit prediction module". Table 4.4 rules out
    an extra convolution at inference, but none of the four; "linear" is best in docs/results.md.
    Others of Table 4.5: `--method caa --car`, `--method ksac --option head=aspp --car`, with the
    settings of RECIPES below. CCNet, DANet, CPNet are not here. OCR has the last two maps, not
    HRNet's four together.
    """

    caption = "Bright pixels have features like the marked one's: with CAR those of its class."

    def __init__(self, num_classes, backbone="resnet50", weights=None, *, head="self_attention",
                 pointwise=True, channels=512, pool_pointwise=False, auxiliary=False,
                 output_stride=None, place="linear", released=False, **terms):  # fmt: skip
        super().__init__()
        places = ["input", "linear", "norm", "relu"]
        if place not in places or released and place != "linear":
            raise ValueError(f"place={place!r}: it is one of {places}; released=True has its own")
        if output_stride is None:
            output_stride = 32 if head == "uper" or backbone.startswith("hrnet") else 8
        # Multi-grid is the released configuration's.
        grid = (1, 2, 4) if backbone.startswith("resnet") and output_stride < 32 else None
        self.backbone = backbones.build(backbone, output_stride, weights, grid)
        *_, before, high = self.backbone.channels
        if head == "self_attention":
            self.head, width = SelfAttention(high), 512
        elif head == "fcn":
            self.head, width = Conv2dNormActivation(high, 512, 3), 512
        elif head == "uper":
            self.head, width = UPer(self.backbone.channels, pool_pointwise), 4 * 512
        elif head == "ocr":
            self.head, width = OCR(high, before, num_classes), 2 * 512
        else:
            raise ValueError(f"head={head!r}: it is 'self_attention', 'fcn', 'uper' or 'ocr'")
        self.backbone.reads(*{"uper": (0, 1, 2, 3), "ocr": (2, 3)}.get(head, (3,)))
        self.stride = self.backbone.strides[0 if head == "uper" else -1]
        self.released_conv = nn.Conv2d(width, 512, 1) if released else nn.Identity()
        width = 512 if released else width
        self.last = Conv2dNormActivation(width, channels, 1 if pointwise or head == "ocr" else 3)
        self.last[2].inplace = False  # what enters it may be regularized
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        layers = Conv2dNormActivation(high, 256, 1), nn.Dropout(0.1), nn.Conv2d(256, num_classes, 1)
        self.auxiliary = nn.Sequential(*layers) if auxiliary and head != "ocr" else None
        self.place = 0 if released else places.index(place)  # the losses act on last[place]'s input
        self.regularized = ["last.0", "last.1", "last.2", "classifier"][self.place]
        channels = width if self.place == 0 else channels
        self.car = ClassAwareRegularization(num_classes, channels, released=released, **terms)

    def forward(self, images, labels=None):
        size, strides, maps = images.shape[2:], self.backbone.strides, self.backbone(images)
        coarse, coarse_stride = None, strides[-1]
        if isinstance(self.head, OCR):
            x, coarse = self.head(maps[-1], maps[-2], self.backbone.resize)
            coarse_stride = strides[-2]
        elif isinstance(self.head, UPer):
            x = self.head(maps, self.backbone.resize)
        else:
            x = self.head(maps[-1])
        steps = [self.released_conv(x)]
        for layer in self.last:  # convolution, batch norm, ReLU
            steps.append(layer(steps[-1]))
        logits = self.backbone.upsample(self.classifier(steps[-1]), self.stride, size)
        if labels is None:
            return logits
        backbones.check_labels(labels, images, self.car.num_classes)
        losses = {"cross_entropy": backbones.pixel_cross_entropy(logits, labels)}
        if self.auxiliary is not None:
            coarse = self.auxiliary(maps[-1])
        if coarse is not None:
            coarse = self.backbone.upsample(coarse, coarse_stride, size)
            losses["auxiliary"] = 0.4 * backbones.pixel_cross_entropy(coarse, labels)
        X = steps[self.place]
        pixels = [self.backbone.positions(self.stride, n) for n in X.shape[2:]]
        if isinstance(self.head, UPer):  # averaged to stride 8, as in the released code
            X = F.avg_pool2d(X, 2, ceil_mode=True)
            pixels = [p[::2] + self.stride // 2 for p in pixels]
        return losses | self.car(X, labels_at(labels, X.shape[2:], pixels))

    def figures(self, image, pixel=None):
        """Fig. 4.4: the similarity of each pixel to `pixel` (pixel_relation), `[H, W]`."""
        title = "similarity of each pixel's feature to that of the marked pixel"
        return {title: pixel_relation(self, image, pixel, self.regularized)}


# -------------------------------------------------------------------------------------- any network


def regularize(net, classifier, num_classes, regularized=None, **terms):
    """CAR for any segmentation network: `net`, wrapped. Called with images alone, it is `net`.

    Called with images `[N, 3, H, W]` and labels int64 `[N, H, W]`, 255 = ignored, it returns a dict
    of scalars: the losses of `net`, and CAR's. The original network is `.net`.

    classifier: name of the submodule that gives the logits, as in net.get_submodule(name)
    regularized: name of the submodule whose input the losses act on. Best is the batch norm after
    the last convolution ("classifier.2" of torchvision's DeepLabv3): features after ReLU did worse
    than no losses (docs/results.md). None: `net.regularized`, which the networks here have, else
    the classifier. If a Dropout gives that input, the Dropout's own input is taken: noise cannot be
    trained away. If a submodule is called several times, the last call counts.
    terms: keywords of ClassAwareRegularization

    what `net` returns                                     losses
    called with labels, if its forward takes `labels`:
      a scalar, or an object with .loss (Hugging Face)     "loss"
      a dict of scalars (this repository)                  the same
    otherwise, called with images:
      logits `[N, K, h, w]`                                "cross_entropy"
      a tuple (segmentation_models.pytorch, aux_params)    "cross_entropy" of its first
      a dict with "out", perhaps "aux" (torchvision)       "cross_entropy"; "auxiliary", 0.5 of it

    refused with a ValueError                              the message names
    a submodule that `net` does not have                   the last layers
    one that is not called, or gets no `[N, C, h, w]`      what it gets
    a classifier that does not give K channels             both numbers, the layers that give K
    other outputs: a list, a dict that holds logits        what came back, what is expected
    labels of another size, or not in 0 … K-1 and 255      both sizes, the labels
    a network that has CAR's losses, or is wrapped         its class
      already: regularize first, then DistributedDataParallel or torch.compile
    """
    return Regularized(net, classifier, num_classes, regularized, terms)


class Regularized(nn.Module):
    """What `regularize` returns: `.net`, whose Dropouts no longer work in place, and `.car`."""

    def __init__(self, net, classifier, num_classes, regularized, terms):
        super().__init__()
        self.net, self.classifier, self.num_classes = net, classifier, num_classes
        self.regularized = regularized or getattr(net, "regularized", None) or classifier
        self.takes_labels = "labels" in inspect.signature(net.forward).parameters
        modules = dict(net.named_modules(remove_duplicate=False))
        wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel
        if isinstance(net, wrappers) or hasattr(net, "_orig_mod"):
            raise ValueError(f"regularize the network first, then wrap it in {type(net).__name__}")
        for name in (self.regularized, classifier):
            if not name or name not in modules:
                layers = [k for k, m in modules.items() if isinstance(m, (nn.Conv2d, nn.Linear))]
                layers = ", ".join(layers[-4:])
                raise ValueError(f"{type(net).__name__} has no '{name}'; its last layers: {layers}")
        if any(isinstance(module, ClassAwareRegularization) for module in modules.values()):
            raise ValueError(f"this {type(net).__name__} has CAR's losses already: add them once")
        self.check_classes(getattr(modules[classifier], "out_channels", num_classes))
        layer = modules[self.regularized]
        if isinstance(layer, (nn.Linear, nn.LayerNorm)):
            kind = f"'{self.regularized}' is a {type(layer).__name__}"
            raise ValueError(f"{kind}: its input is no feature map [N, C, h, w]")
        for module in (*layer.modules(), *dropouts(net)):
            if hasattr(module, "inplace"):
                module.inplace = False  # what enters must not be overwritten
        channels = getattr(layer, "in_channels", getattr(layer, "num_features", None))
        channels = terms.pop("channels", channels)
        terms = backbones.check_options(ClassAwareRegularization, terms)
        self.car = ClassAwareRegularization(num_classes, channels, **terms)
        self.car.to(next(net.parameters()).device)

    def check_classes(self, channels):
        if channels != self.num_classes:
            K, modules = self.num_classes, self.net.named_modules()
            fit = [name for name, m in modules if getattr(m, "out_channels", None) == K]
            raise ValueError(
                f"'{self.classifier}' gives {channels} channels, but num_classes={K}; layers that "
                f"give {K}: {', '.join(fit) or 'none'}"
            )

    def forward(self, images, labels=None):
        if labels is None:
            return self.net(images)
        backbones.check_labels(labels, images, self.num_classes)
        inputs = {"labels": labels} if self.takes_labels else {}
        output, X, logits = watch(self.net, self.regularized, self.classifier, images, **inputs)
        if is_map(logits):
            self.check_classes(logits.shape[1])
        losses = own_losses(output) if self.takes_labels else self.logits_losses(output, labels)
        pixels = backbones.pixels_of(self.net, labels.shape[1:], X.shape[2:])
        return losses | self.car(X, labels_at(labels, X.shape[2:], pixels))

    def logits_losses(self, output, labels):
        """The cross entropies of a network that has no losses of its own; see `regularize`."""
        outputs = {"out": output[0] if isinstance(output, tuple) and output else output}
        outputs, losses = output if isinstance(output, dict) else outputs, {}
        for key, name, weight in (("out", "cross_entropy", 1.0), ("aux", "auxiliary", 0.5)):
            logits = outputs.get(key)
            if is_map(logits) and logits.shape[1] == self.num_classes:
                logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
                losses[name] = weight * backbones.pixel_cross_entropy(logits, labels)
        if "cross_entropy" not in losses:
            raise ValueError(
                f"called with images, the network returned {type(output).__name__} "
                f"{shapes(output)}; expected logits [N, {self.num_classes}, h, w], a tuple that "
                "starts with them, or a dict with 'out'"
            )
        return losses


def own_losses(output):
    """The losses of a network that was called with labels; see `regularize`."""
    loss = getattr(output, "loss", None if isinstance(output, dict) else output)
    losses = output if loss is None else {"loss": loss}
    scalar = isinstance(losses, dict) and len(losses) > 0
    if scalar and all(isinstance(x, torch.Tensor) and x.numel() == 1 for x in losses.values()):
        return {name: x.reshape(()) for name, x in losses.items()}
    raise ValueError(
        f"called with labels, the network returned {type(output).__name__} {shapes(output)}; "
        "expected a scalar, an object with .loss, or a dict of scalars"
    )


def is_map(x):
    """Whether x can be a feature map `[N, C, h, w]`."""
    return isinstance(x, torch.Tensor) and x.ndim == 4


def shapes(x):
    """The shape of a tensor, or of each in a dict, list or tuple; for messages."""
    if isinstance(x, dict):
        return {key: shapes(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [shapes(value) for value in x]
    return list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__


def watch(net, input_of, output_of, *args, **kwargs):
    """net(*args, **kwargs), the input of its submodule `input_of` and the output of `output_of`, of
    the last call of each. ValueError if one is not called, or if the input is no feature map.
    """
    first, second = net.get_submodule(input_of), net.get_submodule(output_of)
    drops, calls, before = dropouts(net), {}, {}

    def note(module, args, kwargs, output):
        calls[module] = next(iter([*args, *kwargs.values()]), None), output
        if module in drops:
            before[id(output)] = calls[module]  # both are kept, so that no other has this id

    watched = {first, second, *drops}
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in watched]
    try:
        result = net(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for module, name in ((first, input_of), (second, output_of)):
        if module not in calls:
            raise ValueError(f"'{name}' was not called in the forward pass: name another submodule")
    X = calls[first][0]
    while before.get(id(X), (X,))[0] is not X:  # the output of a Dropout
        X = before[id(X)][0]
    if not is_map(X):
        raise ValueError(f"what enters '{input_of}' is no feature map [N, C, h, w] but {shapes(X)}")
    return result, X, calls[second][1]


def dropouts(net):
    """The set of its layers of the Dropout family."""
    return {m for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd)}


# ------------------------------------------------------------------------------------------ figures


@torch.no_grad()
def pixel_relation(net, image, pixel=None, classifier="classifier"):
    """Fig. 4.4: the dot product of the feature at `pixel` with that of every pixel, `[H, W]`.

    Products below 0 are 0. image `[3, H, W]` or `[1, 3, H, W]`; pixel: (row, column), None: the
    centre; classifier: the submodule whose input is compared. ValueError in training mode, for a
    batch, for a pixel outside the image.
    """
    image = backbones.one_image(net, image)
    size = image.shape[2:]
    row, column = backbones.one_pixel(pixel, size)
    X = watch(net, classifier, classifier, image)[1][0].float()  # [C, h, w]
    rows, columns = map(backbones.nearest, backbones.pixels_of(net, size, X.shape[1:]), size)
    similarity = (X[:, rows[row], columns[column], None, None] * X).sum(0).clamp(min=0)
    return similarity[rows[:, None], columns]


# ------------------------------------------------------------------------------ other papers' heads


class SelfAttention(nn.Module):
    """Self-attention (Wang et al., "Non-local Neural Networks", CVPR 2018, "embedded Gaussian").

    `[N, in_channels, h, w]` -> `[N, 512, h, w]`. reduce: the layer before it, a 3x3 convolution if
    None. The sizes, one initialisation for queries and keys, no scale and no output projection are
    the released code's. In float32, because an unscaled product can exceed float16.
    """

    def __init__(self, in_channels, reduce=None):
        super().__init__()
        self.reduce = reduce or Conv2dNormActivation(in_channels, 512, 3)
        self.query, self.key = nn.Conv2d(512, 64, 1), nn.Conv2d(512, 64, 1)
        self.value = nn.Conv2d(512, 512, 1)
        self.key.load_state_dict(self.query.state_dict())

    def forward(self, x):
        x = self.reduce(x)
        query, key, value = (layer(x).flatten(2).mT for layer in (self.query, self.key, self.value))
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=1.0)
        return x + y.mT.reshape(x.shape).to(x.dtype)


def pyramid_pool(x, pools):
    """Pyramid pooling (Zhao et al., CVPR 2017): x and its averages over 1, 2, 3, 6 bins a side.

    x `[N, C, h, w]`; pools: the layer after each average, of D channels -> `[N, C + 4·D, h, w]`.
    """
    pooled = (pool(backbones.average_pool(x, n)) for pool, n in zip(pools, (1, 2, 3, 6)))
    pooled = [F.interpolate(y, size=x.shape[2:], mode="bilinear") for y in pooled]
    return torch.cat([x, *pooled], dim=1)


class UPer(nn.Module):
    """UPerNet's head: pyramid pooling on top of a feature pyramid (Xiao et al., ECCV 2018).

    Four maps, finest first -> `[N, 4·512, h, w]` at the finest one's size; CARNet.last fuses them.
    resize: the backbone's. pointwise: 1x1, not 3x3, after the pooling.
    """

    def __init__(self, channels, pointwise=False):
        super().__init__()
        self.pools = nn.ModuleList(Conv2dNormActivation(channels[-1], 512, 1) for _ in (1, 2, 3, 6))
        self.top = Conv2dNormActivation(channels[-1] + 4 * 512, 512, 1 if pointwise else 3)
        self.lateral = nn.ModuleList(Conv2dNormActivation(c, 512, 1) for c in channels[:-1])
        self.smooth = nn.ModuleList(Conv2dNormActivation(512, 512, 3) for _ in channels[:-1])

    def forward(self, maps, resize):
        *finer, x = maps
        x = self.top(pyramid_pool(x, self.pools))
        pyramid = [x]
        for level, lateral, smooth in reversed(list(zip(finer, self.lateral, self.smooth))):
            lateral = lateral(level)
            x = lateral + resize(x, lateral)
            pyramid.insert(0, smooth(x))
        return torch.cat([resize(level, pyramid[0]) for level in pyramid], dim=1)


class OCR(nn.Module):
    """Object-contextual representations (Yuan et al., ECCV 2020, Eqs. 1 to 4).

    x `[N, in_channels, h, w]` and the next finer map -> (pixels and their object context
    `[N, 2·512, h, w]`, which CARNet.last fuses; logits `[N, K, …]` of the soft object regions, of
    the finer map). resize: the backbone's.
    """

    def __init__(self, in_channels, before_channels, num_classes):
        super().__init__()

        def convs(*channels):
            pairs = zip(channels, channels[1:])
            return nn.Sequential(*(Conv2dNormActivation(a, b, 1) for a, b in pairs))

        self.pixels = Conv2dNormActivation(in_channels, 512, 3)
        before = Conv2dNormActivation(before_channels, 512, 3)
        self.regions = nn.Sequential(before, nn.Conv2d(512, num_classes, 1))
        self.phi, self.psi = convs(512, 256, 256), convs(512, 256, 256)
        self.delta, self.rho = convs(512, 256), convs(256, 512)

    def forward(self, x, before, resize):
        coarse, x = self.regions(before), self.pixels(x)
        with torch.autocast(x.device.type, enabled=False):
            m = resize(coarse.float(), x).flatten(2).softmax(2)  # [N, K, hw]
            f = (m @ flat(x)).mT.unsqueeze(3)  # Eq. (1)  [N, 512, K, 1]
        query, key, value = map(flat, (self.phi(x), self.psi(f), self.delta(f)))
        with torch.autocast(x.device.type, enabled=False):  # Eqs. (2), (3)  [N, hw, 256]
            y = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        y = self.rho(y.mT.reshape(len(x), 256, *x.shape[2:]))
        return torch.cat([x, y], dim=1), coarse


# ------------------------------------------------------------------------------------------ recipes

# For Table 4.6's last row: --method caa --car --backbone convnext_large --optimizer adam
# --iterations 40000 --lr 6e-5; the rate is open, and that of Swin's authors for segmentation.
_COMMON = dict(
    backbone="resnet50",  # Table 4.1
    # Sect. 4.4.1. The released configuration and the HFGD paper have a weight decay of 1e-4.
    iterations=30_000, batch_size=16, optimizer="sgd", lr=0.01, weight_decay=1e-3,
    # Not in the thesis; the released configuration's. Its decay 0.9997 is PyTorch's 0.0003.
    weights="imagenet", crop_size=513, scale=(0.5, 2.0), scale_step=0.1, color="brightness",
    power=0.9, momentum=0.9, bn_momentum=0.0003,
)  # fmt: skip
RECIPES = {
    "pascal_context": _COMMON,  # Sect. 4.4.2
    "coco_stuff10k": _COMMON,  # Sect. 4.4.3
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A CARNet. `options` are its keywords; ValueError for an unknown one."""
    options = backbones.check_options(CARNet, options, ClassAwareRegularization)
    return CARNet(num_classes, backbone, weights, **options)
