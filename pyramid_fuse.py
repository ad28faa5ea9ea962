"""Specialize and Fuse: a pyramid of outputs.

Chi-Wei Hsiao, Cheng Sun, Hwann-Tzong Chen, Min Sun: "Specialize and Fuse: Pyramidal Output
Representation for Semantic Segmentation", ICCV 2021, https://arxiv.org/abs/2108.01866.
Equations, sections, figures and tables have the paper's numbers.

The idea. Networks predict a label for every pixel, although most of an image is large and uniform:
a cell of 32x32 pixels of sky needs one label. Here the network predicts labels at several levels,
from coarse to fine. For each cell it also predicts whether all of its pixels have one class. Such
a cell is a unity-cell, any other a mix-cell. The result takes each pixel's label from the coarsest
unity-cell over it. Finer levels are not trained on what a coarser level has done, so each level
specializes in what is left to it.

The mathematics. Level l = 1 is the coarsest, L the finest. A cell of level l has s_l x s_l pixels,
(s_1, …, s_L) = (32, 16, 8, 4). Y_l are the labels of its cells, U_l is 1 for unity-cells and 0 for
mix-cells. A hat is a prediction: Ŷ_l are logits, Û_l is in 0…1. h x w = H/4 x W/4. Up repeats each
cell to the size h x w. 1[…] is 1 where it is true, else 0. ⊙ multiplies cell by cell.

    U_l, Y_l from the labels of the pixels, Sect. 3.1, App. B             -> pyramid_labels
    done by coarser: cells under a cell of a coarser level k that is a unity-cell, U_k = 1, and is
        predicted as one, Û_k >= τ = 0.9; they are ignored, Sect. 3.2     -> relabel
    loss = 1/L Σ_l CE(Ŷ_l, Y_l) + 1/(L-1) Σ_l<L BCE(Û_l, U_l)      (1)    -> pyramid_loss
    Ŷ = Σ_l 1[Up Û_l >= τ] ⊙ Up Ŷ_l ⊙ Π_k<l 1[Up Û_k < τ], Û_L = 1 (2)    -> fuse

    unity head, Sect. 4.1: X [N, D, h, w] are the backbone's features, W_… are 1x1 convolutions
    X_u = W_u X                       [N, 64, h, w]
    X_centroid = W_c mean(X_u)        [N, 64, H/s_l, W/s_l]     the mean over each cell
    X_diff = |W_e X_u - Up X_centroid|                          the bars are this file's
    Û_l = min over each cell of sigmoid(W_s X_diff)                       -> UnityHead

    semantic head, Sect. 4.2: X_L is a 1x1 convolution of X, [N, 512, h, w]
    X_l = AvgPool(X_L, s_l / s_L)                                  (3)    -> SemanticHead
    θ_0 = PyramidPool(X_L)  [N, 110, 512]  the context: 110 tokens (6)    -> PyramidPool
    X'_l = CA(X_l, θ_l-1), θ_l = CU(X'_l, θ_l-1), coarse to fine   (4) (5)
    Ŷ_l = Conv1x1(ReLU(BN(Conv1x1(X'_l))))                         (7)
    CA(X, θ): X_att = softmax(query(X) key(θ)ᵀ / √512) value(θ)    (8)
              X' = ReLU(BN(W_agg concat(X_att, X)))                (9)    -> ContextAggregation
    CU(X', θ): ReLU(BN(W_upd concat(PyramidPool(X'), θ)))     (10) (11)   -> ContextUpdate

Lists of levels run from coarse to fine. Read first `pyramid_labels`, `relabel` and `fuse`, then
`UnityHead`. Tests: tests/test_pyramid_fuse.py. To copy: this file and backbones.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

import backbones

IGNORE = 255  # "don't care"
POLICIES = ("true_positive", "ground_truth", "naive")
UNITIES = ("difference", "two", "tied")

# --------------------------------------------------------------------------------- pyramidal output


def pyramid_labels(labels, strides=(32, 16, 8, 4), finest="pixel"):
    """The ground truth of every level: (semantic, unity), two lists.

    labels int64 `[N, H, W]`, 255 = ignored; H and W have to be multiples of strides[0], else
    ValueError -> semantic: for each level `[N, H/s, W/s]`; unity: for all but the finest. App. B:

        the pixels of a cell                             semantic    unity
        all of one class                                 the class   1 (unity-cell)
        two or more classes, with or without 255         255         0 (mix-cell)
        one class and 255, or 255 alone                  255         255

    finest: "pixel" gives a cell of the finest level the label of its pixel (s/2, s/2);
    "ignore_mixed" applies the table to that level, too.
    """
    H, W = labels.shape[1:]
    if H % strides[0] or W % strides[0]:
        raise ValueError(f"labels of {H}x{W}: expected multiples of the stride {strides[0]}")
    semantic, unity = [], []
    for s in strides:
        cells = labels.unfold(1, s, s).unfold(2, s, s).flatten(3)  # [N, H/s, W/s, s²]
        smallest = cells.amin(3)  # 255 only where no pixel is labelled
        largest = cells.masked_fill(cells == IGNORE, -1).amax(3)  # of the labelled pixels
        u = torch.full_like(smallest, IGNORE)
        u[smallest < largest] = 0
        u[(cells == largest.unsqueeze(3)).all(3)] = 1  # a 255 makes it false
        semantic.append(smallest.masked_fill(u != 1, IGNORE))
        unity.append(u)
    if finest == "pixel":
        # Sect. 3.2: "all cells in the finest level L are assumed to be unity-cells".
        middle = strides[-1] // 2
        semantic[-1] = labels[:, middle :: strides[-1], middle :: strides[-1]]
    return semantic, unity[:-1]


def repeat_cells(x, like):
    """Up: x `[…, h, w]` at the size of `like`, each cell repeated."""
    by = like.shape[-1] // x.shape[-1]
    return x.repeat_interleave(by, -2).repeat_interleave(by, -1)


@torch.no_grad()
def relabel(semantic, unity, unity_prob, threshold=0.9, policy="true_positive"):
    """(semantic, unity) in which the cells that are "done by coarser" are 255 (Sect. 3.2).

    semantic, unity: of `pyramid_labels`. unity_prob: Û, for all levels but the finest `[N, h, w]`
    in 0…1. policy, Table 7: which cells make the finer cells under them "done". "true_positive":
    unity-cells that are predicted as such, Û >= threshold; "ground_truth", the paper's simple fix:
    all unity-cells; "naive": none. Raises ValueError for another policy.
    """
    backbones.check_choices(policy=(policy, POLICIES))
    relabelled, kept = [semantic[0]], []
    done = torch.zeros_like(semantic[0], dtype=torch.bool)
    for u, p, finer in zip(unity, unity_prob, semantic[1:]):
        kept.append(u.masked_fill(done, IGNORE))
        if policy == "true_positive":  # The paper gives no threshold here; this is Eq. (2)'s.
            done = done | ((u == 1) & (p >= threshold))
        elif policy == "ground_truth":
            done = done | (u == 1)
        done = repeat_cells(done, finer)
        relabelled.append(finer.masked_fill(done, IGNORE))
    return relabelled, kept


def chosen_level(unity_prob, like, threshold=0.9):
    """Which level Eq. (2) takes: int64 `[N, h, w]`, 0 the coarsest; `like` has the finest size."""
    finest = len(unity_prob)
    level = torch.full(like.shape[:1] + like.shape[-2:], finest, device=like.device)
    for i, p in reversed(list(enumerate(unity_prob))):
        level = level.masked_fill(repeat_cells(p >= threshold, like), i)  # the coarser overrides
    return level


def fuse(semantic, unity_prob, threshold=0.9):
    """Eq. (2): each finest cell has the logits of the coarsest predicted unity-cell over it.

    semantic: Ŷ, for each level `[N, K, h, w]`. unity_prob: Û, for all but the finest `[N, h, w]` in
    0…1 -> `[N, K, H/s_L, W/s_L]`.
    """
    level = chosen_level(unity_prob, semantic[-1], threshold).unsqueeze(1)
    fused = semantic[-1]
    for i, y in enumerate(semantic[:-1]):
        fused = torch.where(level == i, repeat_cells(y, fused), fused)
    return fused


def pyramid_loss(semantic_logits, unity_logits, semantic, unity):
    """Eq. (1): {"semantic": its first sum, "unity": its second sum}, scalars, float32.

    semantic_logits: for each level `[N, K, h, w]`; unity_logits, whose sigmoid is Û: for all but
    the finest `[N, h, w]`; semantic, unity: of `relabel`. CE and BCE are means over the cells of
    all processes that are not 255.
    """
    ce = [backbones.pixel_cross_entropy(y, label) for y, label in zip(semantic_logits, semantic)]
    bce = []
    for u, label in zip(unity_logits, unity):
        target = (label == 1).float()
        loss = F.binary_cross_entropy_with_logits(u.float(), target, reduction="none")
        bce.append(backbones.joint_mean(loss, label != IGNORE))
    return {"semantic": sum(ce) / len(ce), "unity": sum(bce) / len(bce)}


# ------------------------------------------------------------------------------------------- layers


def resized(x, size):
    """Pixels or cells x `[N, C, h, w]` at `size`, bilinear: cell i covers pixels 4i … 4i + 3."""
    if x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def resized_labels(labels, size):
    """Labels `[N, H, W]` at `size`: of each new pixel's centre."""
    labels = labels.unsqueeze(1).float()
    return F.interpolate(labels, size=tuple(size), mode="nearest-exact").squeeze(1).long()


def conv_of_maps(maps, weight, bias=None):
    """A 1x1 convolution of X = concat(maps, each at the first one's size): `[N, C, h, w]`.

    maps: the backbone's, finest first. weight `[C, D, 1, 1]`, D is the sum of their channels.

    Derivation: the weight has a block W_i for each map, so W concat(m_i) = Σ W_i m_i. A 1x1
    convolution mixes channels and resizing mixes positions, so they can change places:

        W concat(resize(m_i)) = Σ W_i resize(m_i) = Σ resize(W_i m_i)

    The coarser maps are convolved at their own size, and X is not materialised.
    """
    blocks = weight.split([m.shape[1] for m in maps], dim=1)
    x = F.conv2d(maps[0], blocks[0], bias)
    for m, block in zip(maps[1:], blocks[1:]):
        x = x + backbones.resize(F.conv2d(m, block), x)
    return x


class UnityHead(nn.Module):
    """Sect. 4.1: maps, finest first -> Û's logits: float32 `[N, h/k, w/k]` for each k in `factors`.

    factors: the side of a cell, counted on the finest map, (8, 4, 2). All levels share the four
    convolutions. No activation follows them, because Sect. 4.1 names none.

    unity: readings of "a shared Conv1x1" and "measure the difference". "difference": W_e and W_c
    are one, and X_diff is an absolute value, so deviations of either sign count. The text does not
    print the bars, but this form finds the most unity-cells: see docs/results.md. "two": signed;
    W_e and W_c differ, "shared" means by the levels. It diverged on CamVid. "tied": signed; W_e and
    W_c are one. The differences of a cell then have a mean of 0, and W_s keeps that. So their
    minimum is at most 0, and Û <= sigmoid(W_s's bias), whatever the cell holds.
    """

    def __init__(self, in_channels, factors, unity="difference", channels=64):
        super().__init__()
        backbones.check_choices(unity=(unity, UNITIES))
        self.factors, self.unity = factors, unity
        # No biases here: subtracted, they would only add a constant to that of W_s.
        self.reduce = nn.Conv2d(in_channels, channels, 1, bias=False)  # W_u
        self.embed = nn.Conv2d(channels, channels, 1, bias=False)  # W_e
        two = unity == "two"
        self.centroid = nn.Conv2d(channels, channels, 1, bias=False) if two else None  # W_c
        self.same = nn.Conv2d(channels, 1, 1)  # W_s

    def forward(self, maps):
        x_u = conv_of_maps(maps, self.reduce.weight)  # [N, 64, h, w]
        embedding, unity = self.embed(x_u), []
        for k in self.factors:
            centroid = (self.centroid or self.embed)(F.avg_pool2d(x_u, k))  # [N, 64, h/k, w/k]
            difference = embedding - repeat_cells(centroid, embedding)  # X_diff  [N, 64, h, w]
            difference = difference.abs() if self.unity == "difference" else difference
            logits = self.same(difference)  # X_unity is its sigmoid  [N, 1, h, w]
            unity.append(-F.max_pool2d(-logits, k).squeeze(1))  # min pooling  [N, h/k, w/k]
        return [u.to(torch.promote_types(u.dtype, torch.float32)) for u in unity]


class PyramidPool(nn.Module):
    """Eqs. (6), (10): `[N, C, h, w]` -> `[N, 110, C]`, averages of 1x1, 3x3, 6x6 and 8x8 bins.

    One product with a `[110, h·w]` matrix reads x once, in its channels-last order. A bin's weight
    of a position is its row's times its column's, which pooled identity matrices give.
    """

    bins = (1, 3, 6, 8)

    def forward(self, x):
        h, w = (torch.eye(side, device=x.device, dtype=x.dtype) for side in x.shape[2:])
        weights = []
        for n in self.bins:
            rows, columns = F.adaptive_avg_pool1d(h, n), F.adaptive_avg_pool1d(w, n)  # [side, n]
            weights.append(torch.einsum("ia,jb->abij", rows, columns).reshape(n * n, -1))
        return torch.cat(weights) @ x.flatten(2).mT


class ContextAggregation(nn.Module):
    """CA, Eqs. (8), (9): X `[N, C, h, w]`, context θ `[N, T, C]` -> X' `[N, C, h, w]`."""

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 1)
        self.key, self.value = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.aggregate = Conv2dNormActivation(2 * channels, channels, 1)

    def printed(self, x, theta):
        """As the equations are printed. "Attention" in Eq. (8) has the 1/√C of its source."""
        q = self.query(x).flatten(2).mT  # [N, hw, C]
        attended = F.scaled_dot_product_attention(q, self.key(theta), self.value(theta))  # Eq. (8)
        return self.aggregate(torch.cat([attended.mT.reshape(x.shape), x], dim=1))  # Eq. (9)

    def forward(self, x, theta):
        """The same as `printed`, cheaper: W_q and a half of W_agg are applied to the T tokens, not
        to the h·w positions.

        Derivation: of Eq. (8), for one position x, one key k, and query(x) = W_q x + b_q,

            query(x)ᵀ k = xᵀ (W_qᵀ k) + b_qᵀ k

        Of Eq. (9), with W_agg = [W_a, W_x] and X_att = A value(θ), A the softmax of Eq. (8),

            W_agg concat(X_att, X) = A (W_a value(θ)) + W_x X
        """
        convolution, norm, relu = self.aggregate
        w_a, w_x = convolution.weight.flatten(1).chunk(2, dim=1)  # [C, C] each
        key = self.key(theta) / math.sqrt(x.shape[1])
        folded = key @ self.query.weight.flatten(1)  # W_qᵀ k  [N, T, C]
        scores = x.flatten(2).mT @ folded.mT + (key @ self.query.bias).unsqueeze(1)
        A = scores.softmax(2)  # Eq. (8)  [N, hw, T]
        y = A @ (self.value(theta) @ w_a.mT)  # [N, hw, C]
        y = y.mT.reshape(x.shape) + F.conv2d(x, w_x[..., None, None])  # Eq. (9)
        return relu(norm(y))


class ContextUpdate(nn.Module):
    """CU, Eqs. (10), (11): X' `[N, C, h, w]`, θ of the coarser level `[N, T, C]` -> θ, the same."""

    def __init__(self, channels):
        super().__init__()
        self.pool = PyramidPool()
        self.update = Conv2dNormActivation(2 * channels, channels, 1)

    def forward(self, x, theta):
        both = torch.cat([self.pool(x), theta], dim=2)  # Eq. (10)  [N, T, 2C]
        return self.update(both.mT.unsqueeze(3)).squeeze(3).mT  # Eq. (11)


class APNB(nn.Module):
    """ANL's block (Zhu et al., ICCV 2019), which Tables 5, 6 and A compare: `[N, C, h, w]` -> same.

    Unlike CA it reads its own map. One convolution with norm and ReLU gives queries and keys. Keys
    and values are pooled after their convolutions. The last layer starts at 0. Its authors' sizes.
    """

    def __init__(self, channels):
        super().__init__()
        self.pool, width = PyramidPool(), channels // 2
        self.query = Conv2dNormActivation(channels, width, 1)
        self.value, self.out = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.aggregate = Conv2dNormActivation(2 * channels, channels, 1)
        self.drop = nn.Dropout2d(0.05)

    def forward(self, x):
        q = self.query(x)  # [N, C/2, h, w]
        key, value = self.pool(q), self.pool(self.value(x))  # [N, 110, C/2]
        y = F.scaled_dot_product_attention(q.flatten(2).mT, key, value).mT.reshape(q.shape)
        return self.drop(self.aggregate(torch.cat([self.out(y), x], dim=1)))


class SemanticHead(nn.Module):
    """Sect. 4.2: maps, finest first -> each level's features before its classifier, a list.

    factors: k of each level, (8, 4, 2, 1); its features are `[N, channels, h/k, w/k]`. context:
    "ours"; "anl", an APNB at the finest level before it is pooled; "anl_multi", one at each level;
    None. outputs: only the finest `outputs` levels are returned.
    """

    def __init__(self, in_channels, factors, context="ours", outputs=4, channels=512):
        super().__init__()
        backbones.check_choices(context=(context, ("ours", "anl", "anl_multi", None)))
        self.factors, self.context, levels = factors, context, len(factors)
        self.reduce, self.pool = nn.Conv2d(in_channels, channels, 1), PyramidPool()
        aggregates, updates = (levels, levels - 1) if context == "ours" else (0, 0)
        blocks = {"anl": 1, "anl_multi": levels}.get(context, 0)
        self.aggregate = nn.ModuleList(ContextAggregation(channels) for _ in range(aggregates))
        self.update = nn.ModuleList(ContextUpdate(channels) for _ in range(updates))
        self.anl = nn.ModuleList(APNB(channels) for _ in range(blocks))
        layers = (Conv2dNormActivation(channels, channels, 1) for _ in range(outputs))
        self.project = nn.ModuleList(layers)

    def forward(self, maps):
        x = conv_of_maps(maps, self.reduce.weight, self.reduce.bias)  # X_L  [N, 512, h, w]
        if self.context == "anl":
            x = self.anl[0](x)
        levels = [F.avg_pool2d(x, k) if k > 1 else x for k in self.factors]  # Eq. (3)
        if self.context == "anl_multi":
            levels = [block(level) for block, level in zip(self.anl, levels)]
        theta = self.pool(x) if self.context == "ours" else None  # Eq. (6)
        for i, aggregate in enumerate(self.aggregate):
            levels[i] = aggregate(levels[i], theta)  # Eq. (4)
            if i < len(self.update):
                theta = self.update[i](levels[i], theta)  # Eq. (5)
        pairs = zip(self.project, levels[-len(self.project) :])
        return [project(level) for project, level in pairs]  # Eq. (7), all but its last layer


class ResNetDecoder(nn.Module):
    """App. D: a ResNet's four maps, finest first -> maps of 48, 96, 192 and 384 channels, fused by
    HRNet's last stage, which has three modules. The 3x3 convolutions have batch norm and ReLU.
    """

    channels = (48, 96, 192, 384)

    def __init__(self, channels):
        super().__init__()
        pairs = zip(channels, self.channels)
        self.reduce = nn.ModuleList(Conv2dNormActivation(a, b, 3) for a, b in pairs)
        self.fuse = nn.Sequential(*map(backbones.HighResolutionModule, 3 * [self.channels]))

    def forward(self, maps):
        return self.fuse([reduce(x) for reduce, x in zip(self.reduce, maps)])


def confusions(alone, taken, labels, num_classes):
    """The pixels of each (level that predicts, level that is taken, true class, predicted class),
    `[L, L, K, K]`.

    alone: L label maps, taken: the level of each pixel, labels: 255 = ignored; int64 `[N, H, W]`.
    """
    L, K, valid = len(alone), num_classes, labels != 255
    both = (taken * K + labels)[valid]
    counts = [torch.bincount(both * K + y[valid], minlength=L * K * K) for y in alone]
    return torch.stack(counts).view(L, L, K, K)


def iou(counts):
    """IoU of each class, of pixels by (true, predicted) class: `[…, K, K]` -> `[…, K]`."""
    hit = counts.diagonal(dim1=-2, dim2=-1)
    return hit / (counts.sum(-1) + counts.sum(-2) - hit)


# ------------------------------------------------------------------------------------------ network


class SpecializeAndFuse(nn.Module):
    """Backbone (with the decoder if it is not an HRNet), unity head, semantic head, fused (Fig. 2).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of the scalar losses of Eq. (1),
    "semantic" and "unity"; output="single": "semantic"; "auxiliary": "semantic" and "auxiliary".
    Images whose sides are not multiples of the coarsest stride are resized to the nearest size that
    is, and the logits back (Sect. 3.1).

    option      values                                      default           paper
    strides     coarse to fine; the last is 4               (32, 16, 8, 4)    Table A, K: (32, 4)
    context     "ours", "anl", "anl_multi", None            "ours"            Table 6
    output      "pyramid"; "single", the finest level;      "pyramid"         Table 6
                "auxiliary", that and 0.4 · the mean loss of the others       Table 8
    policy      "true_positive", "ground_truth", "naive"    "true_positive"   Table 7
    threshold   τ, in 0…1                                   0.9               Sect. 5.1.3
    unity       "difference", "two", "tied": UnityHead      "difference"      readings of Sect. 4.1
    finest      "pixel", "ignore_mixed": pyramid_labels     "pixel"           Sect. 3.2; App. B

    policy, threshold and unity belong to output="pyramid".

    Table A   A, B, C: output="single" with context=None, "anl", "ours"
              D, E, F: context=None with policy="naive", "ground_truth", "true_positive"
              G, H, I: context="anl", "anl_multi", "ours"; J: output="auxiliary"; K: strides=(32, 4)
    """

    caption = "Large regions are taken from coarse levels, borders and small things from finer."

    def __init__(self, num_classes, backbone="resnet50", weights=None, *, strides=(32, 16, 8, 4),
                 context="ours", output="pyramid", policy="true_positive", threshold=0.9,
                 unity="difference", finest="pixel"):  # fmt: skip
        super().__init__()
        strides = tuple(strides) if isinstance(strides, (tuple, list)) else (strides,)
        pairs = list(zip(strides, strides[1:]))
        whole = all(type(s) is int for s in strides) and strides[-1:] == (4,)
        if not whole or not pairs or any(a <= b or a % b for a, b in pairs):
            raise ValueError(f"strides={strides}: expected multiples, coarse to fine, the last 4")
        backbones.check_choices(
            output=(output, ("pyramid", "single", "auxiliary")), policy=(policy, POLICIES),
            unity=(unity, UNITIES), finest=(finest, ("pixel", "ignore_mixed")),
        )  # fmt: skip
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}: expected a number in 0…1")
        if output == "single" and context == "anl_multi":
            raise ValueError("'anl_multi' is for several levels: with output='single' take 'anl'")
        self.strides, self.output, self.policy = strides, output, policy
        self.threshold, self.finest = threshold, finest
        self.backbone = backbones.build(backbone, 32, weights)
        hrnet = backbone.startswith("hrnet")
        self.decoder = None if hrnet else ResNetDecoder(self.backbone.channels)
        channels = (self.decoder or self.backbone).channels
        factors = [stride // 4 for stride in strides]
        if output == "single" and context != "ours":
            factors = factors[-1:]  # nothing needs the coarser levels
        outputs = 1 if output == "single" else len(factors)
        self.semantic = SemanticHead(sum(channels), factors, context, outputs)
        pyramid = output == "pyramid"
        self.unity = UnityHead(sum(channels), factors[:-1], unity) if pyramid else None
        *coarser, self.classifier = (nn.Conv2d(512, num_classes, 1) for _ in range(outputs))
        self.coarse_classifiers = nn.ModuleList(coarser)
        self.regularized = f"semantic.project.{outputs - 1}.1"  # CAR acts on its input: linear

    def pyramids(self, images):
        """(logits of Ŷ, each level `[N, K, h, w]`; logits of Û, all but the finest `[N, h, w]`)."""
        maps = self.backbone(images, extend=False)  # they are resized instead, see `fitted`
        maps = maps if self.decoder is None else self.decoder(maps)
        classifiers = [*self.coarse_classifiers, self.classifier]
        levels = zip(classifiers, self.semantic(maps))
        semantic = [classifier(level) for classifier, level in levels]  # the last layer of Eq. (7)
        return semantic, [] if self.unity is None else self.unity(maps)

    def fitted(self, images):
        """The images at the nearest size of which the coarsest stride is a divisor."""
        s = self.strides[0]
        return resized(images, [max(1, (side + s // 2) // s) * s for side in images.shape[2:]])

    @staticmethod
    def to_pixels(logits, fitted, images):
        """Logits of cells at the size of the fitted images, then at that of the given ones."""
        return resized(resized(logits.float(), fitted.shape[2:]), images.shape[2:])

    def forward(self, images, labels=None):
        fitted = self.fitted(images)
        semantic, unity = self.pyramids(fitted)
        unity_prob = [u.sigmoid() for u in unity]
        if labels is None:
            fused = fuse(semantic, unity_prob, self.threshold) if unity else semantic[-1]
            return self.to_pixels(fused, fitted, images)
        backbones.check_labels(labels, images, self.classifier.out_channels)
        labels = resized_labels(labels, fitted.shape[2:])
        truth, unity_truth = pyramid_labels(labels, self.strides, self.finest)
        if unity:
            labels = relabel(truth, unity_truth, unity_prob, self.threshold, self.policy)
            return pyramid_loss(semantic, unity, *labels)
        pairs = zip(reversed(semantic), reversed(truth))
        finest, *coarser = [backbones.pixel_cross_entropy(y, label) for y, label in pairs]
        if not coarser:
            return {"semantic": finest}
        # J: all levels but the finest, as App. C's text says (Table A prints {4, 8, 16}); of 0.4 it
        # does not say whether it is that of their mean, as here, or of their sum.
        return {"semantic": finest, "auxiliary": 0.4 * sum(coarser) / len(coarser)}

    @torch.no_grad()
    def levels(self, images):
        """(Level that Eq. (2) takes, 0 the coarsest; what each level alone predicts, a list; the
        prediction), int64 `[N, H, W]` each.
        """
        fitted = self.fitted(images)
        semantic, unity = self.pyramids(fitted)
        unity_prob = [u.sigmoid() for u in unity]
        taken = chosen_level(unity_prob, semantic[-1], self.threshold)
        alone = [repeat_cells(y, semantic[-1]) for y in semantic]
        fused = fuse(semantic, unity_prob, self.threshold)
        *alone, fused = [self.to_pixels(y, fitted, images).argmax(1) for y in [*alone, fused]]
        return resized_labels(taken, images.shape[2:]), alone, fused

    def analyse(self, pairs):
        """Table 9 (coarse to fine; the paper: fine to coarse) and Fig. C, of (images, labels).

        NaN where a class or a level does not occur. Empty for one level.
        """
        if self.unity is None:
            return {}
        counts, fused_counts, K = 0, 0, self.classifier.out_channels
        for images, labels in pairs:
            taken, alone, fused = self.levels(images)
            counts = counts + confusions(alone, taken, labels, K)
            fused_counts = fused_counts + confusions([fused], 0 * taken, labels, K)[0, 0]
        strides = ", ".join(f"stride {s}" for s in self.strides)
        title = "levels: mIoU of the level of the row where the level of the column is taken; each "
        title += f"should be the best in its own column | {strides} | {strides}"
        alone = "levels alone: IoU of each class if one level predicts, less that of the fused "
        alone += f"result; less than 0 says that fusing helps | {strides}"
        difference = iou(counts.sum(1)) - iou(fused_counts)  # [L, K]
        return {title: iou(counts).nanmean(2), alone: difference}

    @torch.no_grad()
    def figures(self, image):
        """Fig. A, of one image `[3, H, W]` or `[1, 3, H, W]`: label maps, and maps in 0…1.

        Of each level: prediction, unity, labels where they are taken, else 254; then the level that
        is taken, 0 … 1, the finest. Empty for one level. ValueError in training mode.
        """
        images = self.fitted(backbones.one_image(self, image))
        if self.unity is None:
            return {}
        semantic, unity = self.pyramids(images)
        unity_prob = [u.sigmoid() for u in unity]
        labels = [y.argmax(1)[0] for y in semantic]
        level = chosen_level(unity_prob, semantic[-1], self.threshold)[0]
        pictures = {f"prediction of stride {s} alone": y for s, y in zip(self.strides, labels)}
        for s, p in zip(self.strides, unity_prob):
            pictures[f"unity, stride {s}: taken from {self.threshold:g} | 0 | 1"] = p[0]
        for i, (s, y) in enumerate(zip(self.strides, labels)):
            y = repeat_cells(y, level).masked_fill(level != i, 254)
            pictures[f"cells taken from stride {s}"] = y
        ends = f"stride {self.strides[0]} | stride {s}"
        return pictures | {f"level that is taken | {ends}": level / i}


# Sect. 5.1.1; iterations are epochs · images / 16. It follows HRNet-OCR's code: there scale 1 makes
# the longer side 520 pixels, and for the last two datasets all but the backbone learns ten times as
# fast. --weights: a path to HRNet's ImageNet weights, or with a ResNet "imagenet".
_COMMON = dict(
    backbone="hrnet_w48", optimizer="sgd", momentum=0.9, power=0.9, weight_decay=1e-4,
    batch_size=16, crop_size=512, scale=(0.5, 2.0), base_size=520, color="brightness",
)  # fmt: skip
RECIPES = {
    "ade20k": _COMMON | dict(lr=0.02, iterations=151_575),  # 120 epochs of 20,210
    "ade20k_16k": _COMMON | dict(backbone="hrnet_w32", lr=0.02, iterations=121_260),  # Sect. 5.4
    "coco_stuff10k": _COMMON | dict(lr=0.001, head_lr=10, iterations=61_875),  # 110 of 9,000
    "pascal_context": _COMMON | dict(lr=0.001, head_lr=10, iterations=62_475),  # 200 of 4,998
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A SpecializeAndFuse. `options` are its keywords; ValueError for an unknown one."""
    options = backbones.check_options(SpecializeAndFuse, options)
    return SpecializeAndFuse(num_classes, backbone, weights, **options)
