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
mix-cells. A hat is a prediction: Ŷ_l are logits of K classes (the paper's C), Û_l is in 0…1.
h x w = H/4 x W/4. Up repeats each cell to the size h x w. 1[…] is 1 where it is true, else 0.
⊙ multiplies cell by cell. `≠ print`: the paper prints something else; the code says why.

    U_l, Y_l from the labels of the pixels, Sect. 3.1, App. B             -> pyramid_labels
    a cell of level l is done by coarser if, for some k < l, the cell of level k over it has
        U_k = 1 and Û_k >= τ (ours: τ of (2), 0.9); in (1) it is 255      -> relabel
    loss = 1/L Σ_l CE(Ŷ_l, Y_l) + 1/(L-1) Σ_l<L BCE(Û_l, U_l)      (1)    -> pyramid_loss
    Ŷ = Σ_l 1[Up Û_l >= τ] ⊙ Up Ŷ_l ⊙ Π_k<l 1[Up Û_k < τ], Û_L = 1 (2)    -> fuse

    unity head, Sect. 4.1: X [N, D, h, w] are the backbone's features, W_… are 1x1 convolutions
    X_u = W_u X                       [N, 64, h, w]
    X_centroid = W_e mean(X_u)        [N, 64, H/s_l, W/s_l]     the mean over each cell
    X_diff = |W_e X_u - Up X_centroid|   [N, 64, h, w]     ≠ print: the bars and one W_e are ours
    Û_l = min over each cell of sigmoid(W_s X_diff)                       -> UnityHead

    semantic head, Sect. 4.2: X_L is a 1x1 convolution of X, [N, 512, h, w]
    X_l = AvgPool(X_L, s_l / s_L)                                  (3)    ≠ print
    θ_0 = PyramidPool(X_L)  [N, 110, 512]  the context: 110 tokens (6)    -> PyramidPool
    X'_l = CA(X_l, θ_{l-1}), θ_l = CU(X'_l, θ_{l-1})          (4) (5)     from coarse to fine
    Ŷ_l = Conv1x1(ReLU(BN(Conv1x1(X'_l))))                         (7)    -> SemanticHead
    CA(X, θ): X_att = softmax(query(X) key(θ)ᵀ / √512) value(θ)    (8)
              X' = ReLU(BN(W_agg concat(X_att, X)))                (9)    -> ContextAggregation
    CU(X', θ): ReLU(BN(W_upd concat(PyramidPool(X'), θ)))     (10) (11)   -> ContextUpdate

Lists of levels run from coarse to fine. Read first `pyramid_labels`, `relabel`, `fuse` (with an
example), then `UnityHead`. Tests: tests/test_pyramid_fuse.py. To copy: this file and backbones.py.
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
        two or more classes (and 255: ours)              255         0 (mix-cell)
        one class and 255 (255 alone: ours)              255         255

    finest: "ignore_mixed" has this table there, too. But "all cells in the finest level L are
    assumed to be unity-cells" (Sect. 3.2): "pixel" has the label of pixel (s/2, s/2), our choice.
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
        middle = strides[-1] // 2
        semantic[-1] = labels[:, middle :: strides[-1], middle :: strides[-1]]
    return semantic, unity[:-1]


def repeat_cells(x, like):
    """Up: x `[…, h, w]` at the size of `like`, each cell repeated."""
    by = like.shape[-1] // x.shape[-1]
    rows, columns = (torch.arange(n, device=x.device) // by for n in like.shape[-2:])
    return x.index_select(-2, rows).index_select(-1, columns)


@torch.no_grad()
def relabel(semantic, unity, unity_prob, threshold=0.9, policy="true_positive"):
    """(semantic, unity) in which the cells that are "done by coarser" are 255 (Sect. 3.2).

    semantic, unity: of `pyramid_labels`. unity_prob: Û, for all levels but the finest `[N, h, w]`
    in 0…1. policy, Table 7: which cells make the finer cells under them "done". "true_positive":
    unity-cells that are predicted as such, Û >= threshold; "naive": none; "ground_truth", the
    paper's simple fix: all, also missed ones, where finer levels decide at inference (Sect. 5.4).
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
    for i in range(finest - 1, -1, -1):  # from fine to coarse: the coarser overrides
        p = unity_prob[i]
        level = level.masked_fill(repeat_cells(p >= threshold, like), i)
    return level


def fuse(semantic, unity_prob, threshold=0.9):
    """Eq. (2): each finest cell has the logits of the coarsest predicted unity-cell over it.

    semantic: Ŷ, for each level `[N, K, h, w]`. unity_prob: Û, for all but the finest `[N, h, w]` in
    0…1 -> `[N, K, H/s_L, W/s_L]`. τ is high because "a false positive always introduces error",
    while a finer level can mend a false negative (Sect. 5.1.3).

    Three images of 8x8 pixels, one coarse cell each: a unity-cell that is found, one that is
    missed, a mix-cell. The finer level is trained on the last two. A level's logits are its stride.

    >>> labels = torch.full((3, 8, 8), 7)
    >>> labels[2, 4:, 6:] = 1
    >>> semantic, unity = pyramid_labels(labels, strides=(8, 4))
    >>> unity[0].flatten().tolist(), semantic[0].flatten().tolist()
    ([1, 1, 0], [7, 7, 255])
    >>> unity_prob = [torch.tensor([0.95, 0.6, 0.1]).view(3, 1, 1)]
    >>> relabel(semantic, unity, unity_prob)[0][1].tolist()
    [[[255, 255], [255, 255]], [[7, 7], [7, 7]], [[7, 7], [7, 1]]]
    >>> levels = [torch.full((3, 1, 1, 1), 8), torch.full((3, 1, 2, 2), 4)]
    >>> fuse(levels, unity_prob).squeeze(1).tolist()
    [[[8, 8], [8, 8]], [[4, 4], [4, 4]], [[4, 4], [4, 4]]]
    """
    level = chosen_level(unity_prob, semantic[-1], threshold).unsqueeze(1)
    fused = semantic[-1]
    for i, y in enumerate(semantic[:-1]):
        fused = torch.where(level == i, repeat_cells(y, fused), fused)
    return fused


def pyramid_loss(semantic_logits, unity_logits, semantic, unity):
    """Eq. (1): {"semantic": its first sum, "unity": its second sum}, scalars, float32.

    semantic_logits: for each level `[N, K, h, w]`; unity_logits, whose sigmoid is Û: for all but
    the finest `[N, h, w]`; semantic, unity: of `relabel`. Means over all processes, without 255.
    """
    ce = [backbones.pixel_cross_entropy(y, label) for y, label in zip(semantic_logits, semantic)]
    bce = []
    for u, label in zip(unity_logits, unity):
        loss = F.binary_cross_entropy_with_logits(u.float(), (label == 1).float(), reduction="none")
        bce.append(backbones.joint_mean(loss, label != IGNORE))
    return {"semantic": sum(ce) / len(ce), "unity": sum(bce) / len(bce)}


def unity_counts(unity_prob, unity, threshold=0.9):
    """Cells of each level by U, in rows, and Û >= τ, in columns, without U's 255: `[L-1, 2, 2]`."""
    pairs = zip(unity_prob, unity)
    return torch.stack([backbones.confusion(p >= threshold, u, 2) for p, u in pairs])


# ------------------------------------------------------------------------------------------- layers


def resized(x, size):
    """Pixels or cells x `[N, C, h, w]` at `size`, bilinear: cell i covers pixels 4i … 4i + 3."""
    # Sizes are not compared: an exported program would then take only equal ones, or only others.
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def to_pixels(logits, size):
    """Logits of cells of 4x4 pixels, float32, at the resized image's size, then at `size`."""
    return resized(resized(logits.float(), [4 * n for n in logits.shape[2:]]), size)


def resized_labels(labels, size):
    """Labels `[N, H, W]` at `size`: of each new pixel's centre."""
    labels = labels.unsqueeze(1).float()
    return F.interpolate(labels, size=tuple(size), mode="nearest-exact").squeeze(1).long()


class UnityHead(nn.Module):
    """Sect. 4.1: X `[N, D, h, w]` -> Û's logits: float32 `[N, h/k, w/k]` for each k in `factors`.

    factors: the side of a cell, counted on X, (8, 4, 2). All levels share the convolutions. The
    embeddings of a unity-cell are close to its centroid. One that is far makes it a mix-cell: min.

    unity: three readings of Sect. 4.1, ours. "difference": W_e for pixels and centroids, and an
    absolute value, so deviations of either sign count; it finds the most unity-cells
    (docs/results.md). "two": signed, and centroids have their own W_c, which the levels share; it
    diverged on CamVid. "tied": signed, W_e for both. The differences of a cell then have a mean of
    0, and W_s keeps that, so Û <= sigmoid(W_s's bias), whatever the cell holds.
    """

    def __init__(self, in_channels, factors, unity="difference", channels=64):
        super().__init__()
        backbones.check_choices(unity=(unity, UNITIES))
        self.factors, self.unity = factors, unity
        # Sect. 4.1 names neither norm nor ReLU. Biases would cancel, or add a constant to W_s's.
        self.reduce = nn.Conv2d(in_channels, channels, 1, bias=False)  # W_u
        self.embed = nn.Conv2d(channels, channels, 1, bias=False)  # W_e
        two = unity == "two"
        self.centroid = nn.Conv2d(channels, channels, 1, bias=False) if two else None  # W_c
        self.same = nn.Conv2d(channels, 1, 1)  # W_s

    def forward(self, x):
        x_u = self.reduce(x)  # [N, 64, h, w]
        embedding = self.embed(x_u)
        embed_centroid = self.embed if self.centroid is None else self.centroid
        unity = []
        for k in self.factors:
            centroid = embed_centroid(F.avg_pool2d(x_u, k))  # X_centroid  [N, 64, h/k, w/k]
            difference = embedding - repeat_cells(centroid, embedding)  # X_diff  [N, 64, h, w]
            if self.unity == "difference":
                difference = difference.abs()  # ≠ print: signed deviations cancel, see "tied"
            logits = self.same(difference)  # X_unity is its sigmoid  [N, 1, h, w]
            unity.append(-F.max_pool2d(-logits, k).squeeze(1))  # min pooling  [N, h/k, w/k]
        return [u.to(torch.promote_types(u.dtype, torch.float32)) for u in unity]


class PyramidPool(nn.Module):
    """Eqs. (6), (10): `[N, C, h, w]` -> `[N, 110, C]`, averages of 1x1, 3x3, 6x6 and 8x8 bins."""

    bins = (1, 3, 6, 8)

    def forward(self, x):
        pooled = [backbones.average_pool(x, n).flatten(2) for n in self.bins]  # [N, C, n²] each
        return torch.cat(pooled, dim=2).mT


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
        """`printed`, cheaper: W_q and half of W_agg act on the T tokens, not on the h·w positions.

        Derivation: for a position x and a key k, with W_agg = [W_a, W_x] and X_att = A value(θ),
            query(x)ᵀ k = (W_q x + b_q)ᵀ k = xᵀ (W_qᵀ k) + b_qᵀ k             Eq. (8)
            W_agg concat(X_att, X) = A (W_a value(θ)) + W_x X                 Eq. (9)
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
    """CU, Eqs. (10), (11): X' `[N, C, h, w]`, θ of coarser levels `[N, T, C]` -> θ with X' too."""

    def __init__(self, channels):
        super().__init__()
        self.pool = PyramidPool()
        self.update = Conv2dNormActivation(2 * channels, channels, 1)

    def forward(self, x, theta):
        both = torch.cat([self.pool(x), theta], dim=2)  # Eq. (10)  [N, T, 2C]
        return self.update(both.mT.unsqueeze(3)).squeeze(3).mT  # Eq. (11)


class SemanticHead(nn.Module):
    """Sect. 4.2: X `[N, D, h, w]` -> each level's features before its classifier, a list.

    factors: k of each level, (8, 4, 2, 1); its features are `[N, channels, h/k, w/k]`. context:
    "ours"; "anl", an APNB at the finest level before it is pooled; "anl_multi", one at each level;
    None. outputs: only the finest `outputs` levels are returned.
    """

    def __init__(self, in_channels, factors, context="ours", outputs=4, channels=512):
        super().__init__()
        backbones.check_choices(context=(context, ("ours", "anl", "anl_multi", None)))
        self.factors, self.context, levels = factors, context, len(factors)
        self.reduce, self.pool = nn.Conv2d(in_channels, channels, 1), PyramidPool()
        self.aggregate, self.update, self.anl = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        if context == "ours":
            self.aggregate.extend(ContextAggregation(channels) for _ in range(levels))
            self.update.extend(ContextUpdate(channels) for _ in range(levels - 1))
        elif context is not None:
            self.anl.extend(APNB(channels) for _ in range(1 if context == "anl" else levels))
        self.project = nn.ModuleList()
        self.project.extend(Conv2dNormActivation(channels, channels, 1) for _ in range(outputs))

    def forward(self, x):
        x = self.reduce(x)  # X_L  [N, 512, h, w]
        if self.context == "anl":
            x = self.anl[0](x)
        # Eq. (3) prints 2^(L-l), which is k for the four strides, but not for (32, 4).
        levels = [F.avg_pool2d(x, k) if k > 1 else x for k in self.factors]
        if self.context == "anl_multi":
            levels = [block(level) for block, level in zip(self.anl, levels)]
        theta = self.pool(x) if self.context == "ours" else None  # Eq. (6)
        for i, aggregate in enumerate(self.aggregate):
            levels[i] = aggregate(levels[i], theta)  # Eq. (4)
            if i < len(self.update):
                theta = self.update[i](levels[i], theta)  # Eq. (5)
        levels = levels[-len(self.project) :]
        return [layer(y) for layer, y in zip(self.project, levels)]  # Eq. (7) but its last layer


class ResNetDecoder(nn.Module):
    """App. D: a ResNet's four maps, finest first -> maps of 48, 96, 192 and 384 channels, fused by
    HRNet's last stage, which has three modules. It is faster and needs less memory than a ResNet
    dilated to stride 8 (Table B). Batch norm and ReLU of the 3x3 convolutions are ours.
    """

    channels = (48, 96, 192, 384)

    def __init__(self, channels):
        super().__init__()
        pairs = zip(channels, self.channels)
        self.reduce = nn.ModuleList(Conv2dNormActivation(a, b, 3) for a, b in pairs)
        modules = [backbones.HighResolutionModule(self.channels) for _ in range(3)]
        self.fuse = nn.Sequential(*modules)

    def forward(self, maps):
        return self.fuse([reduce(x) for reduce, x in zip(self.reduce, maps)])


# ------------------------------------------------------------------------------------------ network


class SpecializeAndFuse(nn.Module):
    """Backbone (with the decoder if it is not an HRNet), unity head, semantic head, fused (Fig. 2).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of the scalar losses "semantic"
    and, of output="pyramid", "unity", Eq. (1); of output="auxiliary", "auxiliary". Images are
    resized to multiples of the coarsest stride (Sect. 3.1); ours: labels too, logits back.

    option      values                                      default           paper
    strides     coarse to fine; the last is 4               (32, 16, 8, 4)    Table A, K: (32, 4)
    context     "ours", "anl", "anl_multi", None            "ours"            Table 6
    output      "pyramid"; "single", the finest level;      "pyramid"         Table 6
                "auxiliary", that and 0.4 · the mean loss of the others       Table 8
    policy      "true_positive", "ground_truth", "naive"    "true_positive"   Table 7
    threshold   τ, in 0…1                                   0.9               Sect. 5.1.3
    unity       "difference", "two", "tied": UnityHead      "difference"      readings of Sect. 4.1
    finest      "pixel", "ignore_mixed": pyramid_labels     "pixel"           Sect. 3.2; App. B

    Ours: other outputs ignore policy, threshold and unity; "single" learns the finest labels.

    Table A   A, B, C: output="single" with context=None, "anl", "ours"
              D, E, F: context=None with policy="naive", "ground_truth", "true_positive"
              G, H, I: context="anl", "anl_multi", "ours"; J: output="auxiliary"; K: strides=(32, 4)
    """

    caption = (
        "A pixel has the label of the coarsest stride that finds one class in its cell (unity)."
    )

    def __init__(self, num_classes, backbone="resnet50", weights=None, *, strides=(32, 16, 8, 4),
                 context="ours", output="pyramid", policy="true_positive", threshold=0.9,
                 unity="difference", finest="pixel"):  # fmt: skip
        super().__init__()
        strides = tuple(strides) if isinstance(strides, (tuple, list)) else (strides,)
        whole = all(type(s) is int for s in strides) and len(strides) > 1 and strides[-1] == 4
        if not whole or any(a <= b or a % b for a, b in zip(strides, strides[1:])):
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
        hrnet = isinstance(self.backbone.body, backbones.HRNet)
        self.decoder = None if hrnet else ResNetDecoder(self.backbone.channels)
        channels = (self.decoder or self.backbone).channels
        factors = [stride // 4 for stride in strides]
        if output == "single" and context != "ours":
            factors = factors[-1:]  # nothing needs the coarser levels
        outputs = 1 if output == "single" else len(factors)
        self.semantic = SemanticHead(sum(channels), factors, context, outputs)
        self.unity = UnityHead(sum(channels), factors[:-1], unity) if output == "pyramid" else None
        classifiers = [nn.Conv2d(512, num_classes, 1) for _ in range(outputs)]
        self.classifier = classifiers[-1]  # the finest level's
        self.coarse_classifiers = nn.ModuleList(classifiers[:-1])
        self.regularized = f"semantic.project.{outputs - 1}.1"  # car.py acts on this norm's input

    def pyramids(self, images):
        """(logits of Ŷ, each level `[N, K, h, w]`; logits of Û, all but the finest `[N, h, w]`)."""
        s = self.strides[0]
        size = [max(1, (side + s // 2) // s) * s for side in images.shape[2:]]  # nearest multiples
        maps = self.backbone(resized(images, size), extend=False)
        if self.decoder is not None:
            maps = self.decoder(maps)
        x = torch.cat([backbones.resize(m, maps[0]) for m in maps], dim=1)  # X  [N, D, h, w]
        classifiers = [*self.coarse_classifiers, self.classifier]  # the last layers of Eq. (7)
        semantic = [layer(level) for layer, level in zip(classifiers, self.semantic(x))]
        return semantic, [] if self.unity is None else self.unity(x)

    def forward(self, images, labels=None):
        semantic, unity = self.pyramids(images)
        unity_prob = [u.sigmoid() for u in unity]
        if labels is None:
            fused = fuse(semantic, unity_prob, self.threshold) if unity else semantic[-1]
            return to_pixels(fused, images.shape[2:])
        backbones.check_labels(labels, images, self.classifier.out_channels)
        labels = resized_labels(labels, [4 * n for n in semantic[-1].shape[2:]])
        truth, unity_truth = pyramid_labels(labels, self.strides, self.finest)
        if unity:
            truth = relabel(truth, unity_truth, unity_prob, self.threshold, self.policy)
            return pyramid_loss(semantic, unity, *truth)
        pairs = zip(semantic, truth[-len(semantic) :])
        losses = [backbones.pixel_cross_entropy(y, label) for y, label in pairs]
        if self.output == "single":
            return {"semantic": losses[-1]}
        # J: all coarser levels, as in App. C's text (Table A prints {4, 8, 16}). The mean is ours.
        return {"semantic": losses[-1], "auxiliary": 0.4 * sum(losses[:-1]) / len(losses[:-1])}

    @torch.no_grad()
    def figures(self, image):
        """Fig. A of one image `[3, H, W]` or `[1, 3, H, W]`: label maps, 254 where they are not
        taken, and maps in 0…1. Empty for one level. ValueError in training mode.
        """
        images = backbones.one_image(self, image)
        if self.unity is None:
            return {}
        semantic, unity = self.pyramids(images)
        unity_prob = [u.sigmoid() for u in unity]
        level = chosen_level(unity_prob, semantic[-1], self.threshold)[0]
        labels = [y.argmax(1)[0] for y in semantic]
        pictures = {f"prediction of stride {s} alone": y for s, y in zip(self.strides, labels)}
        for s, p in zip(self.strides, unity_prob):
            title = f"unity, stride {s}: probability of one class, taken from {self.threshold:g}"
            pictures[f"{title} | 0 | 1 | {self.threshold:g}"] = p[0]
        for i, s in enumerate(self.strides):
            cells = repeat_cells(labels[i], level)
            pictures[f"cells taken from stride {s}"] = cells.masked_fill(level != i, 254)
        name = f"level that is taken | stride {self.strides[0]} | stride 4"
        return pictures | {name: level / len(unity_prob)}

    @torch.no_grad()
    def levels(self, images):
        """The level Eq. (2) takes; a list: labels of each level, of the fused: `[N, H, W]`; Û."""
        semantic, unity = self.pyramids(images)
        unity_prob = [u.sigmoid() for u in unity]
        taken = chosen_level(unity_prob, semantic[-1], self.threshold)
        cells = [repeat_cells(y, semantic[-1]) for y in semantic]
        cells.append(fuse(semantic, unity_prob, self.threshold))
        predicted = [to_pixels(y, images.shape[2:]).argmax(1) for y in cells]
        return resized_labels(taken, images.shape[2:]), predicted, unity_prob

    def analyse(self, pairs):
        """Table 9 (coarse to fine; the paper: fine to coarse), Fig. C. Ours: each level's share;
        recall and precision of unity-cells, without those under a coarser true positive ("done by
        coarser", Sect. 3.1). NaN where nothing is counted. Empty for one level.
        """
        if self.unity is None:
            return {}
        K, L, counts, cells = self.classifier.out_channels, len(self.strides), 0, 0
        for images, labels in pairs:
            taken, predicted, unity_prob = self.levels(images)
            at_level = [labels.masked_fill(taken != i, IGNORE) for i in range(L)]
            found = [backbones.confusion(y, at, K) for y in predicted for at in at_level]
            counts = counts + torch.stack(found).view(L + 1, L, K, K)
            size = [self.strides[0] * n for n in unity_prob[0].shape[1:]]
            truth = pyramid_labels(resized_labels(labels, size), self.strides)
            _, unity_truth = relabel(*truth, unity_prob, self.threshold)
            cells = cells + unity_counts(unity_prob, unity_truth, self.threshold)
        alone, fused = counts[:-1], counts[-1]
        table = "levels: mIoU of the row's level on the column's pixels; its own should be the best"
        less = "levels alone: IoU of a level less that of the fused result; below 0, fusing helps"
        share = "pixels: share taken from each level; more from coarse levels is more parsimonious"
        found = f"unity: unity-cells not done by coarser, τ = {self.threshold:g}; higher is better"
        strides = ", ".join(f"stride {s}" for s in self.strides)
        axes = f"recall, precision | {strides.rpartition(', ')[0]}"
        hits, true, positive = cells[:, 1, 1], cells.sum(2)[:, 1], cells.sum(1)[:, 1]
        return {
            f"{table} | {strides} | {strides}": backbones.iou(alone).nanmean(2),
            f"{less} | {strides}": backbones.iou(alone.sum(1)) - backbones.iou(fused.sum(0)),
            f"{share} | share | {strides}": fused.sum((1, 2))[None] / fused.sum(),
            f"{found} | {axes}": torch.stack([hits / true, hits / positive]),
        }


class APNB(nn.Module):
    """ANL's block (Zhu et al., ICCV 2019), which Tables 1, 3 to 6 and A compare: `[N, C, h, w]`.

    Unlike CA it reads its own map. One convolution with norm and ReLU gives queries and keys. Keys
    and values are pooled after their convolutions. `out` starts at 0. The sizes are its authors'.
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


# Sect. 5.1.1; iterations are epochs · images / 16. base_size (the longer side at scale 1)
# and head_lr are HRNet-OCR's, whose code the paper follows. --weights: HRNet's file, or "imagenet".
_COMMON = dict(
    backbone="hrnet_w48", optimizer="sgd", momentum=0.9, power=0.9, weight_decay=1e-4,
    batch_size=16, crop_size=512, scale=(0.5, 2.0), base_size=520, color="brightness",
)  # fmt: skip
RECIPES = {
    "shapes": dict(lr=1e-3, head_lr=1.0, iterations=560, option=dict(strides=(16, 8, 4))),  # ours
    "ade20k": _COMMON | dict(lr=0.02, iterations=151_575),  # 120 epochs of 20,210
    "ade20k_16k": _COMMON | dict(backbone="hrnet_w32", lr=0.02, iterations=121_260),  # of 16,168
    "coco_stuff10k": _COMMON | dict(lr=0.001, head_lr=10, iterations=61_875),  # 110 of 9,000
    "pascal_context": _COMMON | dict(lr=0.001, head_lr=10, iterations=62_475),  # 200 of 4,998
}


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A SpecializeAndFuse. `options` are its keywords; ValueError for an unknown one."""
    options = backbones.check_options(SpecializeAndFuse, options)
    return SpecializeAndFuse(num_classes, backbone, weights, **options)
