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
index. The code adds a leading N for the images, and f_mse averages over them too. `≠ print`: the
thesis prints another form; the line of code says why.

    class centres, of all images of the batch
    μ = Yᵀ·X / N_non-zero    Sect. 4.3.1                 [K, C]    (4.1) -> class_centers

    pixels to the centre of their class
    D_intra = (1 - σ) |Y·μ - X|                         [HW, C]    (4.3)
    L_intra-c2p = f_mse(D_intra)                                   (4.2) -> intra_center_to_pixel

    centres apart; ε_0 = 0.5
    A_c2c = softmax(μ·μᵀ / √C)                           [K, K]    (4.4)             ≠ print
    D_c2c = (1 - eye(K)) A_c2c                           [K, K]    (4.5)
    L_inter-c2c = f_mse( f_sum( max(D_c2c - ε_0 / (K-1), 0) ) )    (4.6), (4.7)
                                                    f_sum: [K]     -> inter_center_to_center
    pixels away from the centres of other classes; ε_1 = 0.25
    Λ_c2p = X·μᵀ                                        [HW, K]    (4.8)             ≠ print
    Λ_c = diag(μ·μᵀ)                                        [K]    (4.9)             ≠ print
    Λ' = (1 - Y) Λ_c2p + Y Λ_c                          [HW, K]    (4.10)            ≠ print
    A_c2p = softmax(Λ' / √C)                            [HW, K]    (4.11)            ≠ print
    D_c2p = (1 - Y) A_c2p                               [HW, K]    (4.12)
    L_inter-c2p = f_mse( (1 - σ) f_sum( max(D_c2p - ε_1 / (K-1), 0) ) )
                                                    f_sum: [HW]    (4.13), (4.14)    ≠ print
                                                                   -> inter_center_to_pixel
As in the released code, gradients reach μ only as the left μ of (4.4). Also here: moving centres,
Sect. 4.4.2.3 -> ClassAwareRegularization; Fig. 4.4 -> pixel_relation. Fig. 4.5 is in evaluate.py.
Read first `ClassAwareRegularization` with its example of four pixels, then `class_centers` and the
losses. To use them on your network: `regularize`. Tests: tests/test_car.py. To copy: this file and
backbones.py.
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
    the batch, because some images are noisy (Sect. 4.3.1); scope="image": `[N, K, C]`, `[N, K]`.
    An absent class has centre 0 (ours). In distributed training the batch is that of all processes:
    each must call this. Float64 stays float64, below too. ValueError as backbones.check_labels.
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
    `[N, K, C]` -> scalar, at least 0. released: the authors' code, here and below: f_mse is the
    square of the mean, and results are clipped. Raises ValueError as backbones.check_labels.
    """
    K, C = centers.shape[-2:]
    backbones.check_labels(labels, features, K)
    # Gradients are stopped at the centres, as in the released code; the thesis does not say. With
    # the batch's centres and a mean of squares they would be 0: Σ(μ - X) over a class is 0.
    mu = centers.detach().expand(len(features), K, C)  # [N, K, C]
    X, sigma = flat(features, labels), ignored(labels)  # [N, HW, C], [N, HW, 1]
    own = labels.flatten(1).unsqueeze(2).masked_fill(sigma, 0)  # each pixel's class  [N, HW, 1]
    Y_mu = mu.gather(1, own.expand(-1, -1, C))  # Y·μ: looked up, not multiplied  [N, HW, C]
    # Ignored pixels add zero loss but stay in the denominator.
    D = (Y_mu - X).abs().masked_fill(sigma, 0)  # Eq. (4.3)  [N, HW, C]
    loss = f_mse(D, released)  # Eq. (4.2)
    return loss.clamp(min=1e-5) if released else loss


@without_autocast
def inter_center_to_center(centers, epsilon=0.5, released=False):
    """L_inter-c2c, Eqs. (4.4)-(4.7): how far a class's similarities to others exceed ε_0/(K-1).

    centers `[K, C]` or `[N, K, C]`, K at least 2 -> scalar in 0…1. epsilon: ε_0. Why there is
    a threshold (Sect. 4.3.3.2): the size of the feature space, and wrong labels.
    """
    K, C = centers.shape[-2:]
    mu = centers.to(torch.promote_types(centers.dtype, torch.float32))
    # Erratum: here and in Eqs. (4.8), (4.9) the print has the transpose on the left. The shapes in
    # print are those of μ·μᵀ and X·μᵀ. The gradient is stopped at the second μ, as in the released
    # code; the thesis does not say. Absent classes have centre 0 and take part, in (4.11) too.
    A = torch.softmax(mu @ mu.detach().mT / math.sqrt(C), dim=-1)  # Eq. (4.4)  [K, K]
    D = (1 - torch.eye(K, device=A.device)) * A  # Eq. (4.5)  [K, K]
    D = F.relu(D - epsilon / (K - 1)).sum(-1)  # Eq. (4.6)  [K]
    return f_mse(D.clamp(1e-7, 1 - 1e-7) if released else D, released)  # Eq. (4.7)


@without_autocast
def inter_center_to_pixel(features, labels, centers, epsilon=0.25, released=False, literal=False):
    """L_inter-c2p, Eqs. (4.8)-(4.14): how far the similarities of a pixel to the centres of other
    classes exceed ε_1/(K-1), which is 0.0043 for 59 classes.

    features `[N, C, h, w]`, labels int64 `[N, h, w]`, 255 = ignored, centers `[K, C]` or
    `[N, K, C]`, K at least 2 -> scalar in 0…1. epsilon: ε_1. literal: Eq. (4.11) as printed,
    without √C. Raises ValueError as backbones.check_labels.
    """
    K, C = centers.shape[-2:]
    Y = one_hot(labels, K, features)  # [N, HW, K]
    # In the released form ignored pixels count: all classes are other classes to them.
    X = flat(features) if released else flat(features, labels)  # [N, HW, C]
    mu = centers.detach().to(X.dtype)  # stopped as in the released code; the thesis does not say
    energy = X @ mu.mT  # Λ_c2p, Eq. (4.8)  [N, HW, K]
    diagonal = mu.square().sum(-1).unsqueeze(-2)  # Λ_c, Eq. (4.9)  [1, K] or [N, 1, K]
    # A pixel's product with its own centre is replaced by μ·μ, its ideal value (Sect. 4.3.3.3).
    # Erratum: the print adds Λ_c without Y, so to all classes; text and released code replace.
    energy = (1 - Y) * energy + Y * diagonal  # Λ', Eq. (4.10)  [N, HW, K]
    # Erratum: Eq. (4.11) prints no √C. Eq. (4.4) and the released code have it. Without it this
    # loss's gradient is as large as the cross entropy's; the network learns less (docs/results.md).
    scale = 1 if literal else math.sqrt(C)
    A = torch.softmax(energy / scale, dim=-1)  # Eq. (4.11)  [N, HW, K]
    D = (1 - Y) * A  # Eq. (4.12)  [N, HW, K]
    D = F.relu(D - epsilon / (K - 1)).sum(-1)  # Eq. (4.13)  [N, HW]
    if released:
        return f_mse(D.clamp(1e-7, 1 - 1e-7), released)
    # Ignored pixels are masked, as in Eq. (4.3). Eqs. (4.12) to (4.14) print no σ: our choice.
    return f_mse(D.masked_fill(ignored(labels).squeeze(2), 0))  # Eq. (4.14)


def flat(features, labels=None):
    """X_flat, Sect. 4.3.1: `[N, C, h, w]` -> `[N, HW, C]`, float32.

    labels: of the positions. Rows of ignored pixels become 0, because in Yᵀ·X 0 · ∞ is NaN.
    """
    X = features.flatten(2).mT.to(torch.promote_types(features.dtype, torch.float32))
    return X if labels is None else X.masked_fill(ignored(labels), 0)


def ignored(labels):
    """σ of Eq. (4.3): labels `[N, h, w]` -> bool `[N, HW, 1]`, True for ignored pixels."""
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
    H, W = labels.shape[1:]
    rows, columns = pixels or backbones.spread((H, W), size)
    rows, columns = rows.clamp(max=H - 1), columns.clamp(max=W - 1)
    return labels[:, rows[:, None].to(labels.device), columns.to(labels.device)]


def sum_over_processes(x):
    """The sum of x over all processes. Its gradient is multiplied by their number.

    DistributedDataParallel divides by it. So the result is the gradient of one process with the
    joint batch, if all processes compute the same loss from the sum.
    """
    if not dist.is_initialized():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    # The value is total: the bracket is 0. The gradient is the number of processes times that of x.
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

    Called with features `[N, C, h, w]` and their labels int64 `[N, h, w]`, 255 = ignored (labels_at
    finds them) -> dict of float32 scalars, added to the cross entropy. Four pixels, one channel:

    >>> X = torch.tensor([[[[10.0, 30], [40, 0]]]])
    >>> labels = torch.tensor([[[0, 0], [1, 2]]])
    >>> class_centers(X, labels, 3)[0].flatten().tolist()
    [20.0, 40.0, 0.0]
    >>> {k: round(loss.item(), 4) for k, loss in ClassAwareRegularization(3)(X, labels).items()}
    {'intra_c2p': 50.0, 'inter_c2c': 0.1968, 'inter_c2p': 0.27}

    intra  10 and 30 are 10 from their centre, 20; 40 and 0 are centres: (10² + 10²) / 4 = 50
    c2c    excess: what other classes have above 0.5/2. μ 20: A is 0 1 0, excess 3/4
           μ 40: A is 0 1 0, excess 0.  μ 0: A is 1/3 1/3 1/3, excess 1/12 + 1/12
           ((3/4)² + 0² + (1/6)²) / 3 = 0.1968
    c2p    X 10: A is 1/2 1/2 0, as 10·40 = 20², which replaces 10·20; above 0.25/2: 3/8
           X 30: A is 0 1 0, 7/8.  X 40: 0 1 0, 0.  X 0: 1/3 1/3 1/3, 5/24 + 5/24
           ((3/8)² + (7/8)² + 0² + (5/12)²) / 4 = 0.27

    num_classes: K, 2 to 255. channels: C, for "moving" alone. CARNet has a table of the others.
    ValueError for what does not fit, and as backbones.check_labels.
    """

    def __init__(self, num_classes, channels=None, *, intra=True, inter_c2c=True, inter_c2p=True,
                 centers="batch", decay=0.9, epsilon_0=0.5, epsilon_1=0.25, literal=False,
                 released=False):  # fmt: skip
        super().__init__()
        backbones.check_choices(centers=(centers, ("batch", "image", "moving")))
        if not 2 <= num_classes <= 255:
            raise ValueError(f"num_classes={num_classes}: expected 2 to 255; label 255 is ignored")
        if not 0 <= decay < 1 or min(epsilon_0, epsilon_1) < 0:
            found = f"decay={decay}, epsilon_0={epsilon_0}, epsilon_1={epsilon_1}"
            raise ValueError(
                f"{found}: expected 0 to below 1 for the decay, at least 0 for epsilon"
            )
        if literal and released:
            raise ValueError("literal and released exclude each other: the released code has √C")
        if centers == "moving" and channels is None:
            raise ValueError("centers='moving' needs channels, how many the features have")
        self.num_classes, self.centers, self.decay = num_classes, centers, decay
        self.intra, self.inter_c2c, self.inter_c2p = intra, inter_c2c, inter_c2p
        self.epsilon_0, self.epsilon_1 = epsilon_0, epsilon_1
        self.literal, self.released = literal, released
        if centers == "moving":
            self.register_buffer("mu", torch.zeros(num_classes, channels))
            self.register_buffer("known", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, features, labels):
        scope = "image" if self.centers == "image" else "batch"
        mu, counts = class_centers(features, labels, self.num_classes, scope)
        if self.centers == "moving":
            mu = self.moving_average(mu, counts > 0)
        losses, given, released = {}, (features, labels, mu), self.released
        if self.intra:
            losses["intra_c2p"] = intra_center_to_pixel(*given, released)
        if self.inter_c2c:
            losses["inter_c2c"] = inter_center_to_center(mu, self.epsilon_0, released)
        if self.inter_c2p:
            options = self.epsilon_1, released, self.literal
            losses["inter_c2p"] = inter_center_to_pixel(*given, *options)
        return losses

    @torch.compiler.disable  # compiled, the backward pass would read the new buffers
    def moving_average(self, mu, present):
        """Sect. 4.4.2.3: decay · old + (1 - decay) · μ, `[K, C]`; in training mode also stored.

        An absent class keeps its centre; one that is seen for the first time takes the batch's.
        """
        # `known` is cloned, because the buffer changes before the backward pass, which reads it.
        old, known = self.mu, self.known.clone().unsqueeze(1)
        mixed = torch.where(known, self.decay * old + (1 - self.decay) * mu, mu)
        mu = torch.where(present.unsqueeze(1), mixed, old)
        if self.training:
            self.mu.copy_(mu.detach().where(mu.isfinite(), old))  # float16 may overflow once
            self.known |= present
        return mu


# ----------------------------------------------------------------------------------------- networks


class CARNet(nn.Module):
    """Backbone, head, last convolution, classifier, bilinear upsampling of the logits (Fig. 4.3).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of scalar losses: "cross_entropy";
    with `auxiliary`, and always for OCR, "auxiliary"; CAR's "intra_c2p", "inter_c2c", "inter_c2p".

    option           values                                        default           thesis
    head             "self_attention", "fcn", "uper", "ocr"        "self_attention"  Table 4.5
    pointwise        "A": the last convolution (the thesis's       True              Table 4.1
                     "leading") is 1x1, else 3x3, which mixes classes at borders; OCR's is 1x1
    channels         of the last convolution; the thesis tries 256 512               Sect. 4.4.2.3
    pool_pointwise   UPer's convolution after the pooling is 1x1   False             Sect. 4.4.2.3
    auxiliary        a loss on the last map, of weight 0.4 (ours)  False             Table 4.6
    output_stride    None: 8; for UPer and HRNets 32 (ours)        None              Sect. 4.4.1
    place            the losses act on the last convolution's      "linear"          ours
                     "input", on its "linear" output, after its batch "norm", after its "relu"
    intra, inter_c2c, inter_c2p  False: without this loss          True              Table 4.1
    centers          "batch", "image"; "moving"                    "batch"           Table 4.3; 4.2
    decay            of moving centres, 0 ≤ decay < 1              0.9               Table 4.2
    epsilon_0, epsilon_1  ε_0, ε_1; ε_0 = 0.25: Table 4.5, §       0.5, 0.25         Sect. 4.4.1
    literal          True: Eq. (4.11) as printed, without √C       False             Eq. (4.11)
    released         True: the authors' losses, on the output of   False             authors' code
                     a 1x1 convolution (bias, no norm, no ReLU) that is kept at inference

    place: Fig. 4.3 says only "right before the logit prediction module", and Table 4.4 has
    no extra cost at inference. All four places fit both; "linear" is best in docs/results.md. OCR
    has the last two maps, not HRNet's four together.
    """

    caption = "Bright: features like the marked pixel's. CAR wants them in its class alone."

    def __init__(self, num_classes, backbone="resnet50", weights=None, *, head="self_attention",
                 pointwise=True, channels=512, pool_pointwise=False, auxiliary=False,
                 output_stride=None, place="linear", released=False, **terms):  # fmt: skip
        super().__init__()
        # The submodules that the features of each place enter.
        entered = {"input": "last.0", "linear": "last.1", "norm": "last.2", "relu": "classifier"}
        heads = "self_attention", "fcn", "uper", "ocr"
        backbones.check_choices(head=(head, heads), place=(place, list(entered)))
        if released and place != "linear":
            raise ValueError(f"place={place!r}: released=True has its own, leave it out")
        if output_stride is None:
            output_stride = 32 if head == "uper" or str(backbone).startswith("hrnet") else 8
        # Multi-grid is the released configuration's.
        grid = (1, 2, 4) if str(backbone).startswith("resnet") and output_stride < 32 else None
        self.backbone = backbones.build(backbone, output_stride, weights, grid)
        before, high = self.backbone.channels[-2:]
        levels, self.stride = [3], self.backbone.strides[-1]
        if head == "self_attention":
            self.head, width = SelfAttention(high), 512
        elif head == "fcn":
            self.head, width = Conv2dNormActivation(high, 512, 3), 512
        elif head == "uper":
            self.head, width = UPer(self.backbone.channels, pool_pointwise), 4 * 512
            levels, self.stride = [0, 1, 2, 3], self.backbone.strides[0]
        else:
            self.head, width = OCR(high, before, num_classes), 2 * 512
            levels = [2, 3]
        self.backbone.reads(*levels)
        self.released_conv = nn.Conv2d(width, 512, 1) if released else nn.Identity()
        width, place = (512, "input") if released else (width, place)
        self.last = Conv2dNormActivation(width, channels, 1 if pointwise or head == "ocr" else 3)
        self.last[2].inplace = False  # what enters it may be regularized
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        layers = Conv2dNormActivation(high, 256, 1), nn.Dropout(0.1), nn.Conv2d(256, num_classes, 1)
        self.auxiliary = nn.Sequential(*layers) if auxiliary and head != "ocr" else None
        self.place, self.regularized = place, entered[place]
        channels = width if place == "input" else channels
        self.car = ClassAwareRegularization(num_classes, channels, released=released, **terms)

    def forward(self, images, labels=None):
        size, resize, maps = images.shape[2:], self.backbone.resize, self.backbone(images)
        coarse, coarse_stride = None, self.backbone.strides[-1]
        if isinstance(self.head, OCR):
            x, coarse = self.head(maps[-1], maps[-2], resize)
            coarse_stride = self.backbone.strides[-2]
        elif isinstance(self.head, UPer):
            x = self.head(maps, resize)
        else:
            x = self.head(maps[-1])
        features = {"input": self.released_conv(x)}
        features["linear"] = self.last[0](features["input"])
        features["norm"] = self.last[1](features["linear"])
        features["relu"] = self.last[2](features["norm"])
        logits = self.backbone.upsample(self.classifier(features["relu"]), self.stride, size)
        if labels is None:
            return logits
        backbones.check_labels(labels, images, self.car.num_classes)
        losses = {"cross_entropy": backbones.pixel_cross_entropy(logits, labels)}
        if self.auxiliary is not None:
            coarse = self.auxiliary(maps[-1])
        if coarse is not None:
            coarse = self.backbone.upsample(coarse, coarse_stride, size)
            losses["auxiliary"] = 0.4 * backbones.pixel_cross_entropy(coarse, labels)
        X = features[self.place]
        pixels = [self.backbone.positions(self.stride, n) for n in X.shape[2:]]
        if isinstance(self.head, UPer):  # averaged to stride 8, as in the released code
            X = F.avg_pool2d(X, 2, ceil_mode=True)
            pixels = [p[::2] + self.stride // 2 for p in pixels]
        return losses | self.car(X, labels_at(labels, X.shape[2:], pixels))

    def figures(self, image, pixel=None):
        """Fig. 4.4: pixel_relation to `pixel`, `[H, W]`, over that of `pixel` to itself (ours)."""
        products = pixel_relation(self, image, pixel, self.regularized)
        row, column = backbones.one_pixel(pixel, products.shape)
        title = "dot product of features with the marked pixel's, divided by its own"
        return {title: products / products[row, column].clamp(min=1e-12)}


def regularize(net, classifier, num_classes, regularized=None, **terms):
    """CAR for any segmentation network: `net`, wrapped. Called with images alone, it is `net`.

    Called with images `[N, 3, H, W]` and labels int64 `[N, H, W]`, 255 = ignored, it returns a dict
    of scalars: the losses of `net`, and CAR's. The original network is `.net`.
    classifier: name of the submodule that gives the logits, as in net.get_submodule(name)
    regularized: name of the submodule whose input the losses act on. Best is the batch norm after
    the last convolution ("classifier.2" of torchvision's DeepLabv3): features after ReLU did worse
    than no losses (docs/results.md). None: `net.regularized`, which the networks here have, else
    the classifier. Features are taken before Dropout, because noise cannot be trained away.
    terms: keywords of ClassAwareRegularization

    `net` is called with labels if its forward takes `labels`. Its losses, by what it returns:
    with labels   a scalar, or an object with .loss: "loss"; a dict of scalars: the same
    images alone  logits `[N, K, h, w]`, or a tuple that starts with them: "cross_entropy"; a dict
                  with "out", perhaps "aux": "cross_entropy", "auxiliary" of weight 0.5
    ValueError for all else. First `regularize`, then DistributedDataParallel or torch.compile.
    """
    return Regularized(net, classifier, num_classes, regularized, terms)


class Regularized(nn.Module):
    """What `regularize` returns: `.net`, whose Dropouts are set to inplace=False, and `.car`."""

    def __init__(self, net, classifier, num_classes, regularized, terms):
        super().__init__()
        self.net, self.classifier, self.num_classes = net, classifier, num_classes
        self.regularized = regularized or getattr(net, "regularized", None) or classifier
        self.takes_labels = "labels" in inspect.signature(net.forward).parameters
        kind, modules = type(net).__name__, dict(net.named_modules(remove_duplicate=False))
        if kind in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
            raise ValueError(f"regularize the network first, then wrap it in {kind}")
        for name in (self.regularized, classifier):
            if not name or name not in modules:
                layers = [k for k, m in modules.items() if isinstance(m, (nn.Conv2d, nn.Linear))]
                layers = ", ".join(layers[-4:])
                raise ValueError(f"{kind} has no '{name}'; its last layers: {layers}")
        if any(isinstance(module, ClassAwareRegularization) for module in modules.values()):
            raise ValueError(f"this {kind} has CAR's losses already: add them once")
        layer = modules[self.regularized]
        if isinstance(layer, (nn.Linear, nn.LayerNorm)):
            raise ValueError(f"the input of '{self.regularized}' is no feature map [N, C, h, w]")
        dropouts = [m for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        for module in (*layer.modules(), *dropouts):
            if hasattr(module, "inplace"):
                module.inplace = False  # what enters must not be overwritten
        channels = getattr(layer, "in_channels", None) or getattr(layer, "num_features", None)
        channels = terms.pop("channels", channels)
        terms = backbones.check_options(ClassAwareRegularization, terms)
        self.car = ClassAwareRegularization(num_classes, channels, **terms)
        self.car.to(next(net.parameters()).device)

    def forward(self, images, labels=None):
        if labels is None:
            return self.net(images)
        backbones.check_labels(labels, images, self.num_classes)
        inputs = {"labels": labels} if self.takes_labels else {}
        output, X, logits = watch(self.net, self.regularized, self.classifier, images, **inputs)
        if getattr(logits, "ndim", None) == 4 and logits.shape[1] != self.num_classes:
            text = f"'{self.classifier}' gives {logits.shape[1]} channels, but num_classes"
            raise ValueError(f"{text}={self.num_classes}: name the submodule that gives logits")
        losses = self.losses_of(output, labels)
        pixels = backbones.pixels_of(self.net, labels.shape[1:], X.shape[2:])
        return losses | self.car(X, labels_at(labels, X.shape[2:], pixels))

    def losses_of(self, output, labels):
        """The losses of a network that returned `output`; see `regularize`."""
        K, losses = self.num_classes, {}
        if self.takes_labels:
            expected = "a scalar, an object with .loss, or a dict of scalars"
            loss = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
            found = output if loss is None else {"loss": loss}
            found = found if isinstance(found, dict) else {}
            if all(isinstance(x, torch.Tensor) and x.numel() == 1 for x in found.values()):
                losses = {name: x.reshape(()) for name, x in found.items()}
        else:
            expected = f"logits [N, {K}, h, w], a tuple that starts with them, or a dict with 'out'"
            first = output[0] if isinstance(output, tuple) and output else output
            found = output if isinstance(output, dict) else {"out": first}
            for key, name, weight in (("out", "cross_entropy", 1.0), ("aux", "auxiliary", 0.5)):
                logits = found.get(key)
                if getattr(logits, "ndim", None) != 4 or logits.shape[1] != K:
                    break
                logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
                losses[name] = weight * backbones.pixel_cross_entropy(logits, labels)
        if not losses:
            names = f" of {', '.join(map(str, output))}" if isinstance(output, dict) else ""
            text = f"the network returned {type(output).__name__}{names}"
            raise ValueError(f"{text}; expected {expected}")
        return losses


def watch(net, input_of, output_of, *args, **kwargs):
    """net(*args, **kwargs), the input of submodule `input_of`, before any Dropout, and the output
    of `output_of`, of the last call of each. ValueError if not called, or not a feature map.
    """
    first, second, calls = net.get_submodule(input_of), net.get_submodule(output_of), {}
    dropouts = {m for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd)}

    def note(module, args, kwargs, output):
        x = [*args, *kwargs.values(), None][0]
        calls[module] = x, output
        if module in dropouts and output is not x:
            output.undropped = getattr(x, "undropped", x)

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in {first, second, *dropouts}]
    try:
        result = net(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for module, name in ((first, input_of), (second, output_of)):
        if module not in calls:
            raise ValueError(f"'{name}' was not called in the forward pass: name another submodule")
    X = getattr(calls[first][0], "undropped", calls[first][0])
    if getattr(X, "ndim", None) != 4:
        shape = list(getattr(X, "shape", [type(X).__name__]))
        raise ValueError(f"what enters '{input_of}' is {shape}, no feature map [N, C, h, w]")
    return result, X, calls[second][1]


@torch.no_grad()
def pixel_relation(net, image, pixel=None, classifier="classifier"):
    """Fig. 4.4: the dot product of the feature at `pixel` with that of every pixel, `[H, W]`.

    Products below 0 are 0 (ours). image `[3, H, W]` or `[1, 3, H, W]`; pixel: (row, column), None:
    the centre; classifier: the submodule whose input is compared. ValueError as backbones.one_image
    and one_pixel.
    """
    image = backbones.one_image(net, image)
    size = image.shape[2:]
    row, column = backbones.one_pixel(pixel, size)
    _, X, _ = watch(net, classifier, classifier, image)
    X = X[0].float()  # [C, h, w]
    rows, columns = backbones.pixels_of(net, size, X.shape[1:])  # of the map's positions
    rows, columns = backbones.nearest(rows, size[0]), backbones.nearest(columns, size[1])
    marked = X[:, rows[row], columns[column], None, None]  # [C, 1, 1]
    similarity = (marked * X).sum(0).clamp(min=0)  # [h, w]
    return similarity[rows[:, None], columns]


# ------------------------------------------------------------------------------ other papers' heads


class SelfAttention(nn.Module):
    """Self-attention (Wang et al., "Non-local Neural Networks", CVPR 2018, "embedded Gaussian").

    `[N, in_channels, h, w]` -> `[N, 512, h, w]`. reduce: the layer before, None: a 3x3 convolution.
    Sizes, one initialisation for queries and keys, no scale and no output projection: released
    code. In float32, because an unscaled product can exceed float16.
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
    maps = [x]
    for pool, bins in zip(pools, (1, 2, 3, 6)):
        y = pool(backbones.average_pool(x, bins))
        maps.append(F.interpolate(y, size=x.shape[2:], mode="bilinear"))
    return torch.cat(maps, dim=1)


class UPer(nn.Module):
    """UPerNet's head: pyramid pooling on top of a feature pyramid (Xiao et al., ECCV 2018).

    Four maps, finest first, and the backbone's resize -> `[N, 4·512, h, w]` at the finest map's
    size; CARNet.last fuses them. pointwise: 1x1, not 3x3, after the pooling.
    """

    def __init__(self, channels, pointwise=False):
        super().__init__()
        self.pools = nn.ModuleList(Conv2dNormActivation(channels[-1], 512, 1) for _ in (1, 2, 3, 6))
        self.top = Conv2dNormActivation(channels[-1] + 4 * 512, 512, 1 if pointwise else 3)
        self.lateral = nn.ModuleList(Conv2dNormActivation(c, 512, 1) for c in channels[:-1])
        self.smooth = nn.ModuleList(Conv2dNormActivation(512, 512, 3) for _ in channels[:-1])

    def forward(self, maps, resize):
        x = self.top(pyramid_pool(maps[3], self.pools))
        pyramid = [x]
        for i in (2, 1, 0):
            lateral = self.lateral[i](maps[i])
            x = lateral + resize(x, lateral)
            pyramid.insert(0, self.smooth[i](x))
        return torch.cat([resize(level, pyramid[0]) for level in pyramid], dim=1)


class OCR(nn.Module):
    """Object-contextual representations (Yuan et al., ECCV 2020, Eqs. 1 to 4).

    x `[N, in_channels, h, w]`, the next finer map, the backbone's resize -> (pixels and object
    context `[N, 2·512, h, w]`, which CARNet.last fuses; logits `[N, K, …]` of the soft object
    regions, of the finer map).
    """

    def __init__(self, in_channels, before_channels, num_classes):
        super().__init__()
        conv = Conv2dNormActivation
        self.pixels = conv(in_channels, 512, 3)
        self.regions = nn.Sequential(conv(before_channels, 512, 3), nn.Conv2d(512, num_classes, 1))
        self.phi = nn.Sequential(conv(512, 256, 1), conv(256, 256, 1))
        self.psi = nn.Sequential(conv(512, 256, 1), conv(256, 256, 1))
        self.delta, self.rho = nn.Sequential(conv(512, 256, 1)), nn.Sequential(conv(256, 512, 1))

    def forward(self, x, before, resize):
        coarse, x = self.regions(before), self.pixels(x)
        with torch.autocast(x.device.type, enabled=False):
            m = resize(coarse.float(), x).flatten(2).softmax(2)  # [N, K, hw]
            f = (m @ flat(x)).mT.unsqueeze(3)  # Eq. (1)  [N, 512, K, 1]
        query, key, value = flat(self.phi(x)), flat(self.psi(f)), flat(self.delta(f))
        with torch.autocast(x.device.type, enabled=False):  # Eqs. (2), (3)  [N, hw, 256]
            y = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        y = self.rho(y.mT.reshape(x.shape[0], 256, *x.shape[2:]))
        return torch.cat([x, y], dim=1), coarse


# Others of Table 4.5: --method caa --car, --method ksac --option head=aspp --car, with these
# settings; CCNet, DANet and CPNet are not here. Table 4.6's last row: --method caa --car --backbone
# convnext_large --optimizer adam --iterations 40000 --lr 6e-5. The rate is open; it is Swin's.
_COMMON = dict(
    backbone="resnet50",  # Table 4.1
    # Sect. 4.4.1. The released configuration and the HFGD paper have a weight decay of 1e-4.
    iterations=30_000, batch_size=16, optimizer="sgd", lr=0.01, weight_decay=1e-3,
    # Not in chapter 4; the released configuration's. Its decay 0.9997 is PyTorch's 0.0003.
    weights="imagenet", crop_size=513, scale=(0.5, 2.0), scale_step=0.1, color="brightness",
    power=0.9, momentum=0.9, bn_momentum=0.0003,
)  # fmt: skip
RECIPES = {
    "shapes": dict(option=dict(head="uper", channels=128)),  # ours, as SHAPES in train.py
    "pascal_context": _COMMON, "coco_stuff10k": _COMMON,  # Sects. 4.4.2, 4.4.3
}  # fmt: skip


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A CARNet. `options` are its keywords; ValueError for an unknown one."""
    options = backbones.check_options(CARNet, options, ClassAwareRegularization)
    return CARNet(num_classes, backbone, weights, **options)
