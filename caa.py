"""Channelized Axial Attention (CAA).

Ye Huang, Di Kang, Wenjing Jia, Liu Liu, Xiangjian He, AAAI 2022, https://arxiv.org/abs/2101.07434.
Equations, tables and sections have the numbers of Ye Huang's thesis "Context-aware Image Semantic
Segmentation" (University of Technology Sydney, 2022), chapter 3.

The idea. Spatial attention decides which positions a pixel reads, channel attention which channels
count. Earlier networks compute the two apart, in parallel or in sequence, and their results can
conflict: a channel that matters for a small object may not matter for the whole image. CAA puts
channel attention inside axial attention, which reads first a column, then a row:

    . . r . . .      r r r r r r      o is (i, j), r what it has read. The column step reads its
    . . o . . .  ->  r r o r r r      column. The row step reads its row, where each position has
    . . r . . .      r r r r r r      read its own column. So after two steps it has read all.

Each step multiplies features by attention weights and sums them. In between, a gate acts on the
channels. In the column step every row has its own gate, in the row step every column.

The mathematics. x [N, C, H, W] are the features. θ, φ and g are 1x1 convolutions: θ(x) and φ(x)
[N, 64, H, W] are queries and keys at once, g(x) [N, C, H, W] are the values. (i, j) is the position
in row i and column j, m runs over the rows, n over the columns, ⊙ multiplies channel by channel.

    column step -> column_step
    A_col(ij, mj) = softmax_m( θ(x_ij)ᵀ θ(x_mj) )           [N, W, H, H]  (3.3) -> column_attention
    α_ijm  = A_col(ij, mj) g(x_mj)                          [C] each      (3.6) ≠ print, g(x_mn)
    gate_i = Sigmoid(ReLU( Σ_m,j α_ijm / (H·W) · ω_c1) ω_c2) [N, H, C]    (3.9) -> ChannelAttention
    z_ij   = Σ_m gate_i ⊙ α_ijm, in print Σ_m C_col(α)      [N, C, H, W], a part of (3.11)

    row step, the same on exchanged axes: values from z, queries and keys from x
    A_row(ij, in) = softmax_n( φ(x_ij)ᵀ φ(x_in) )           [N, H, W, W]  (3.4) -> row_attention
    β_ijn  = A_row(ij, in) z_in                             [C] each      (3.7) ≠ print, Σ_m α_ijmn
    gate_j = Sigmoid(ReLU( Σ_i,n β_ijn / (H·W) · ω_r1) ω_r2) [N, W, C]   (3.10) -> ChannelAttention
    y_ij   = Σ_n gate_j ⊙ β_ijn                             [N, C, H, W] (3.11) -> SpatialAttention

ω_c1, ω_r1 are [C, 128], ω_c2, ω_r2 [128, C]. The default gate is deeper: five hidden layers with
leaky ReLU (Table 3.1, Sect. 3.3.2.3). Others: self-attention, (3.1), (3.2), and axial attention
without gates, (3.5), (3.8) -> SpatialAttention; Algorithm 2 -> channelized_grouped.

Read first `column_attention`, then `column_step`, the equations line by line, then `channelized`,
which computes the same faster. Tests: tests/test_caa.py.
To copy: this file and backbones.py; for the equations alone torch is enough.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

import backbones

# ---------------------------------------------------------------------------------------- equations


def column_attention(query):
    """Eq. (3.3): how much each row attends to each other row, in every column.

    query `[N, c, H, W]`, the key as well -> `[N, W, H, H]`, indexed [image, j, i, m]: in column j,
    row i attends to row m. Float32 (float64 for float64), also under autocast: a product over 64
    channels can exceed float16's largest number.
    """
    with torch.autocast(query.device.type, enabled=False):
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        q = query.permute(0, 3, 2, 1)  # [N, W, H, c]
        return torch.softmax(q @ q.mT, dim=-1)  # Eq. (3.3)  [N, W, H, H]


def row_attention(query):
    """Eq. (3.4), the same in each row: query `[N, c, H, W]` -> `[N, H, W, W]`, [image, i, j, n]."""
    return column_attention(query.mT)  # rows and columns exchanged


def axial_attention(query, axis):
    """`column_attention` for axis="column", `row_attention` for axis="row"."""
    return row_attention(query) if axis == "row" else column_attention(query)


def column_step(attention, value, gate):
    """The column step, line by line: Eqs. (3.6), (3.9) and the sum over m of Eq. (3.11).

    attention `[N, W, h, H]`: `column_attention`, or h of its query rows; value `[N, C, H, W]` ->
    `[N, C, h, W]`. gate: a callable `[N, h, C] -> [N, h, C]` with values in 0…1; None is the
    inner sum of Eq. (3.5). To read, not to train with: α is h times as large as `value`.
    """
    H, W = value.shape[2:]
    # Eq. (3.6) prints g(x_mn), the values of all columns. That would cost O(H²W²), not the
    # O(HW² + H²W) of Sect. 3.3.1.2. Fig. 3.5 and the released code have column j alone.
    A = attention.to(value.dtype).permute(0, 2, 3, 1).contiguous()  # [N, h, H, W]: i, m, j
    alpha = A[:, None] * value[:, :, None]  # Eq. (3.6)  [N, C, h, H, W]
    if gate is not None:
        # i remains: "each row has its own channel attention" (Sect. 3.3.2.2). The section's "keeps
        # a W dimension" fits the row step alone ("W or H", Sect. 3.3.2.3).
        average = alpha.sum(dim=(3, 4)) / (H * W)  # Σ_m,j α / HW  [N, C, h]
        weight = gate(average.mT).mT.to(alpha.dtype)  # Eq. (3.9)  [N, C, h]
        alpha = weight[..., None, None] * alpha
    return alpha.sum(dim=3)  # Σ_m  [N, C, h, W]


def channelized_grouped(attention, value, gate, axis, groups):
    """Algorithm 2: `column_step` for one group of query rows at a time, which takes less memory.

    Arguments and result are those of `channelized`. In training the α of all groups are kept.
    """
    if axis == "row":  # the algorithm is printed for columns
        return channelized_grouped(attention, value.mT, gate, "column", groups).mT
    H = value.shape[2]
    padding = -H % groups  # line 1 prints H % groups: 2 for 5 rows and 3 groups; 1 is needed
    A = F.pad(attention, (0, 0, 0, padding))  # lines 3, 4: query rows of zeros  [N, W, H+, H]
    Y = [column_step(A_g, value, gate) for A_g in A.chunk(groups, dim=2)]  # lines 5 to 8
    # Lines 9 to 11; line 9 counts one group too many, 0 … G. Lines 2 and 12 transpose: not needed.
    return torch.cat(Y, dim=2)[:, :, :H]  # [N, C, H, W]


def channelized(attention, value, gate, axis):
    """`column_step`, or for axis="row" the row step, by one matrix product, without α.

    axis="column": attention `[N, W, H, H]`, value `[N, C, H, W]` -> `[N, C, H, W]`, gate `[N, H, C]
    -> [N, H, C]` or None. "row", Eqs. (3.7), (3.10), (3.11): the same on exchanged axes.

    Three rows, two columns, one channel. The α of row 0 are 4/2, 2/2, 0 in column 0 and 0, 3, 0 in
    column 1. Their average is 6/6; rows 1 and 2 have 3/6 and 1.5/6. This gate returns the average.

    >>> value = torch.tensor([[[[4.0, 2], [2, 3], [1, 0]]]])
    >>> attention = torch.tensor([[[[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]],  # column 0
    ...                            [[0, 1, 0], [0.5, 0, 0.5], [0.25, 0, 0.75]]]])  # column 1
    >>> channelized(attention, value, None, "column")[0, 0].tolist()
    [[3.0, 3.0], [2.0, 1.0], [1.0, 0.5]]
    >>> channelized(attention, value, lambda average: average, "column")[0, 0].tolist()
    [[3.0, 3.0], [1.0, 0.5], [0.25, 0.125]]

    Derivation: the gate of Eq. (3.9) does not depend on m, so it can move out of the sum of (3.11).
    With z_ij = Σ_m α_ijm (no gate yet), a matrix product, the gated sum and the gate's average are

        Σ_m gate_i ⊙ α_ijm = gate_i ⊙ z_ij,    Σ_m,j α_ijm / (H·W) = mean_j(z_ij) / H
    """
    if axis == "row":
        return channelized(attention, value.mT, gate, "column").mT
    value = value.permute(0, 3, 2, 1)  # [N, W, H, C]
    # Sect. 3.7 expects CAA to be slow because it breaks up this product. Here it stays whole.
    z = attention.to(value.dtype) @ value  # Σ_m α  [N, W, H, C]
    if gate is not None:
        # The mean is float32: dividing half-precision features by H would underflow.
        average = z.mean(dim=1, dtype=torch.promote_types(z.dtype, torch.float32)) / z.shape[2]
        z = gate(average)[:, None].to(z.dtype) * z  # Eq. (3.9)  [N, 1, H, C] · [N, W, H, C]
    return z.permute(0, 3, 2, 1)  # [N, C, H, W]


# ------------------------------------------------------------------------------------------- layers


class ChannelAttention(nn.Module):
    """The gate of Eqs. (3.9), (3.10): `[N, L, C] -> [N, L, C]` in 0…1, in its weights' precision.

    layers=1, activation="relu": as printed, fc[0] is ω_c1 or ω_r1, fc[1] ω_c2 or ω_r2. Why deeper
    and leaky (Sect. 3.3.2.3): L rows hold more information than SENet's one vector.
    """

    def __init__(self, channels, width=128, layers=5, activation="leaky_relu"):
        super().__init__()
        if layers < 1 or width < 1 or activation not in ("leaky_relu", "relu"):
            given = f"layers={layers}, width={width}, activation={activation!r}"
            raise ValueError(f"{given}: at least one layer and channel, 'leaky_relu' or 'relu'")
        sizes = [channels] + [width] * layers + [channels]
        # No biases and a slope of 0.2, as in the released code.
        self.fc = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in zip(sizes, sizes[1:]))
        self.slope = 0.2 if activation == "leaky_relu" else 0.0
        for fc in self.fc:
            # Ours. PyTorch's smaller weights would shrink the signal a hundredfold.
            nn.init.kaiming_normal_(fc.weight, a=self.slope)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.fc[0].weight.dtype)
            for fc in self.fc[:-1]:
                x = F.leaky_relu(fc(x), self.slope)
            return torch.sigmoid(self.fc[-1](x))


class SpatialAttention(nn.Module):
    """Attention over positions, `[N, C, H, W] -> [N, C, H, W]`.

    attention: "axial", Eq. (3.11), or "self", Eq. (3.1), gated per pixel as Table 3.3 compares.
    channelization: use gates, **gate are keywords of ChannelAttention. released: see CAANet.
    """

    def __init__(self, channels=512, attention="axial", channelization=True, query_channels=64,
                 released=False, **gate):  # fmt: skip
        super().__init__()
        backbones.check_choices(attention=(attention, ("axial", "self")))
        self.axial = attention == "axial"
        self.theta = self.query(channels, query_channels, released)
        self.phi = self.query(channels, query_channels, released) if self.axial else None
        self.g = Conv2dNormActivation(channels, channels, 1)  # its ReLU is the released code's
        nn.init.dirac_(self.g[0].weight)  # ours: the output starts near a multiple of x
        self.gate_col = self.gate_row = None
        if channelization:
            self.gate_col = ChannelAttention(channels, **gate)
            self.gate_row = ChannelAttention(channels, **gate) if self.axial else None

    @staticmethod
    def query(channels, query_channels, released):
        """θ or φ: "a 1 × 1 convolution layer" (Sect. 3.3.1.1), into which its batch norm folds."""
        # After a ReLU a query with a large norm attracts attention from unrelated positions.
        act = nn.ReLU if released else None
        layer = Conv2dNormActivation(channels, query_channels, 1, activation_layer=act)
        nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
        # Ours. |θ|² starts near 64 · 0.7² = 31, with ReLU 64 / 2: equally peaked softmax.
        nn.init.constant_(layer[1].weight, 1.0 if released else 0.7)
        return layer

    def maps(self, x):
        """(column map `[N, W, H, H]`, row map `[N, H, W, W]`); self: (`[N, 1, HW, HW]`, None)."""
        theta = backbones.contiguous_gradient(self.theta(x))
        if not self.axial:  # Eq. (3.2): one column that holds all positions
            return column_attention(theta.flatten(2)[..., None]), None
        phi = backbones.contiguous_gradient(self.phi(x))
        return column_attention(theta), row_attention(phi)

    def forward(self, x):
        (col, row), g = self.maps(x), self.g(x)
        if not self.axial:  # Eq. (3.1): the column step of that column  [N, C, HW, 1]
            y = channelized(col, g.flatten(2)[..., None], self.gate_col, "column")
            return y.reshape(x.shape)
        z = channelized(col, g, self.gate_col, "column")  # the inner sum of Eq. (3.11)
        # Eq. (3.7) prints Σ_m α_ijmn. The row step reads the gated sum at (i, n), as in Eq. (3.11).
        return channelized(row, z, self.gate_row, "row")  # the outer sum


class CAA(nn.Module):
    """The head, `[N, in_channels, H, W] -> [N, 256, H, W]`; attention=None leaves attention out."""

    def __init__(self, in_channels, attention="axial", channelization=True, se=False,
                 released=False, **gate):  # fmt: skip
        super().__init__()
        # Chapter 3 describes the attention alone; layers and sizes are the released code's.
        self.reduce = Conv2dNormActivation(in_channels, 512, 3)
        self.attention = nn.Identity()
        if attention is not None:
            self.attention = SpatialAttention(512, attention, channelization, 64, released, **gate)
        # Table 3.2, "+ SE". The reduction is open; SENet's is 16.
        self.se = SqueezeExcitation(512, 512 // 16) if se else nn.Identity()
        self.after = Conv2dNormActivation(512, 512, 1)
        nn.init.dirac_(self.after[0].weight)  # ours, as in SpatialAttention
        # No batch norm: after pooling there is one value per channel and image.
        self.image_level = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, 512, 1), nn.ReLU())
        self.project, self.channels = Conv2dNormActivation(1024, 256, 1), 256

    def forward(self, x):
        x = self.reduce(x)  # [N, 512, H, W]
        y = self.after(self.se(self.attention(x)))
        return self.project(torch.cat([y, self.image_level(x).expand_as(x)], dim=1))


# ------------------------------------------------------------------------------------------ network


class CAANet(nn.Module):
    """Backbone, CAA, classifier, bilinear upsampling of the logits (Sects. 3.4.1.1, 3.4.1.2).

    net(images): `[N, 3, H, W]` -> logits float32 `[N, K, H, W]`. net(images, labels), int64 `[N, H,
    W]`, 255 = ignored -> dict of losses: cross entropy, auxiliary, those of `dual` of weight 1.

    option           values                           default        thesis
    attention        "axial", "self", None: without   "axial"        Table 3.3, Figs. 3.6 to 3.8
    channelization   False: without the gates         True           Tables 3.1 to 3.3, 3.5
    channel_layers   hidden layers of a gate          5              Table 3.1
    channel_width    their channels                   128            Table 3.1
    activation       "relu": as Eq. (3.9) prints it   "leaky_relu"   Sect. 3.3.2.3
    se               True: SE after the attention     False          Table 3.2, no channelization
    dual             "parallel", "sequential"         None           Fig. 3.1 (a), (b), without CAA
    auxiliary        True: a loss on the last map     True           Table 3.4 (Aux)
    decoder          True: DeepLabv3+'s               False          Table 3.7
    output_stride    of the backbone: 8, 16; ours: 32 8              Tables 3.3 to 3.6
    released         True: ReLU after the queries     False          the authors' code
    """

    caption = "The marked cell takes features from the bright ones. Gates weight channels, 0 to 1."

    def __init__(self, num_classes, backbone="resnet50", weights=None, *, attention="axial",
                 channelization=True, channel_layers=5, channel_width=128, activation="leaky_relu",
                 se=False, dual=None, auxiliary=True, decoder=False, output_stride=8,
                 released=False):  # fmt: skip
        super().__init__()
        grid = (1, 2, 4) if str(backbone).startswith("resnet") else None  # released multi-grid
        self.backbone = backbones.build(backbone, output_stride, weights, grid)
        self.backbone.reads(0 if decoder else 3, 3)
        low, high = self.backbone.channels[0], self.backbone.channels[3]
        if dual is None:
            gate = dict(layers=channel_layers, width=channel_width, activation=activation)
            self.head = CAA(high, attention, channelization, se, released, **gate)
        elif attention is None or se:
            raise ValueError("dual has attention='axial' or 'self', and no se")
        else:
            self.head = DualAttention(high, num_classes, dual, attention, released)
            self.caption, self.about_pixel = "What each branch predicts alone.", False
        self.decoder = backbones.Decoder(self.head.channels, low) if decoder else None
        self.stride, self.drop = self.backbone.strides[3], nn.Dropout(0.1)
        last = self.decoder if decoder else self.head
        self.classifier = nn.Conv2d(last.channels, num_classes, 1)
        # CAR (car.py) acts on the input of this layer: what the last convolution, or `dual`, gives.
        head = "drop" if dual else "head.project.1"
        self.regularized = "decoder.fuse.1.1" if decoder else head
        layers = Conv2dNormActivation(high, 256, 1), nn.Dropout(0.1), nn.Conv2d(256, num_classes, 1)
        self.auxiliary = nn.Sequential(*layers) if auxiliary else None

    def forward(self, images, labels=None):
        maps, branches = self.backbone(images), {}
        features, stride = self.head(maps[3]), self.stride
        if isinstance(self.head, DualAttention):
            features, branches = features
        if self.decoder is not None:
            features, stride = self.decoder(features, maps[0], self.backbone.resize), 4
        upsample, size = self.backbone.upsample, images.shape[2:]
        logits = upsample(self.classifier(self.drop(features)), stride, size)
        if labels is None:
            return logits
        backbones.check_labels(labels, images, self.classifier.out_channels)
        losses = {"cross_entropy": backbones.pixel_cross_entropy(logits, labels)}
        for name, branch in branches.items():
            logits = upsample(branch, self.stride, size)
            losses[name] = backbones.pixel_cross_entropy(logits, labels)
        if self.auxiliary is not None:  # its weight is the released code's
            logits = upsample(self.auxiliary(maps[3]), self.stride, size)
            losses["auxiliary"] = 0.4 * backbones.pixel_cross_entropy(logits, labels)
        return losses

    def predictions(self, images):
        """Label maps `[N, H, W]` as in Figs. 3.3, 3.4: of each branch of `dual`, and the fused."""
        size, upsample = images.shape[2:], self.backbone.upsample
        _, branches = self.head(self.backbone(images)[3])
        maps = {k: upsample(y, self.stride, size).argmax(1) for k, y in branches.items()}
        return maps, self(images).argmax(1)

    def gates(self, x):
        """The gates of both steps, `[N, h, C]` and `[N, w, C]`, for x, the backbone's last map."""
        attention, seen = self.head.attention, []
        gates = attention.gate_col, attention.gate_row
        hooks = [gate.register_forward_hook(lambda *call: seen.append(call[2])) for gate in gates]
        attention(self.head.reduce(x))
        for hook in hooks:
            hook.remove()
        return seen

    @torch.no_grad()
    def figures(self, image, pixel=None):
        """Ours: pictures `[H, W]` of one image `[3, H, W]` or `[1, 3, H, W]`, how much the position
        at `pixel` (row, column; None: the centre) attends to each, before the gates; the gates.
        Dual attention: label maps as in Figs. 3.3, 3.4. ValueError in training mode, or outside.
        """
        image = backbones.one_image(self, image)
        size, x = image.shape[2:], self.backbone(image)[3]
        row, column = backbones.one_pixel(pixel, size)
        if isinstance(self.head, DualAttention):
            branches, fused = self.predictions(image)
            pictures = {f"prediction, {name} branch": m[0] for name, m in branches.items()}
            return pictures | {"prediction": fused[0]}
        attention = self.head.attention
        if not isinstance(attention, SpatialAttention):
            return {}
        # For each row and column of the image the nearest one of the map.
        rows = backbones.nearest(self.backbone.positions(self.stride, x.shape[2]), size[0])
        columns = backbones.nearest(self.backbone.positions(self.stride, x.shape[3]), size[1])
        maps = attended(attention, self.head.reduce(x), rows[row], columns[column])
        pictures = {f"{k} of the marked pixel": m[rows[:, None], columns] for k, m in maps.items()}
        if attention.gate_row is not None:
            lines = rows[-1] + 1, columns[-1] + 1  # without positions far beyond the image
            by_row, by_column = (most_varied(g[0, :n]) for g, n in zip(self.gates(x), lines))
            ends = "the 8 channels that vary most | 0, closed | 1, open"
            pictures[f"gates of the rows, from left to right {ends}"] = by_row  # [h, 8]
            pictures[f"gates of the columns, from top to bottom {ends}"] = by_column.T  # [8, w]
        return pictures

    @torch.no_grad()
    def analyse(self, pairs):
        """Of (images, labels): with `dual` the conflicts of Sect. 3.2; with two gates (ours) how
        much they differ within an image. If they hardly did, one gate for all rows would do.
        """
        if isinstance(self.head, DualAttention):
            counts = 0
            for images, labels in pairs:
                branches, fused = self.predictions(images)
                counts = counts + conflicts(torch.stack([*branches.values()]), fused, labels)
            what = "conflicts: share of the wrong pixels that a branch had right; less is better"
            names = "spatial, channel, any" if self.head.design == "parallel" else "channel, any"
            return {f"{what} | share | {names}": (counts[None, :-1] / counts[-1]).cpu()}
        if getattr(self.head.attention, "gate_row", None) is None:
            return {}
        what = "gates: standard deviation of a channel's; more within than between, and one gate"
        what += " for the whole image would not do"
        axes = "within an image, between images | column step, row step"

        def batches():
            for images, _ in pairs:
                gates = zip(self.gates(self.backbone(images)[3]), images.shape[2:])
                # Without the position beyond the image, which exists where it is extended.
                yield [gate[:, : -(-side // self.stride)] for gate, side in gates]

        return {f"{what} | {axes}": gate_deviations(batches()).cpu()}


def conflicts(branches, fused, labels):
    """Sect. 3.2: counts of the pixels where `fused` is wrong: those that each branch has right,
    those that any has right, all. Label maps: branches `[B, N, H, W]`, fused and labels `[N, H,
    W]`, 255 = ignored -> `[B + 2]`.
    """
    wrong = (fused != labels) & (labels != 255)  # [N, H, W]
    right = wrong & (branches == labels)  # [B, N, H, W]
    return torch.stack([*right.sum((1, 2, 3)), right.any(0).sum(), wrong.sum()])


def gate_deviations(batches):
    """Standard deviations of each step's gates, `[2, steps]`, root mean squares over the channels.
    Row 0: over the L rows or columns of an image. Row 1: of their mean, over the images.
    batches: iterable of lists, for each step the gates `[N, L, C]`; L may change.
    """
    sums, count = 0, 0
    for gates in batches:
        moments = [torch.var_mean(g.double(), dim=1, correction=0) for g in gates]  # 2 of [N, C]
        moments = [torch.stack([var, mean, mean.square()]).sum(1) for var, mean in moments]
        sums, count = sums + torch.stack(moments), count + len(gates[0])  # [steps, 3, C]
    within, mean, square = (sums / count).unbind(1)
    return torch.stack([within, square - mean.square()]).clamp(min=0).mean(2).sqrt()


def most_varied(gates):
    """Of the gates `[L, C]` of an image the 8 channels that differ most over L, `[L, 8]`."""
    return gates[:, gates.var(0, correction=0).topk(8).indices]


def attended(attention, x, i, j):
    """What position (i, j) of x `[1, C, H, W]` attends to in a SpatialAttention: maps `[H, W]`."""
    H, W = x.shape[2:]
    col, row = attention.maps(x)
    if row is None:
        return {"attention": col[0, 0, i * W + j].reshape(H, W)}
    column, across = col.new_zeros(H, W), col.new_zeros(H, W)
    column[:, j], across[i] = col[0, j, i], row[0, i, j]
    both = row[0, i, j] * col[0, :, i].T  # at (m, n) A_row(ij, in) · A_col(in, mn)
    return {"column step: attention": column, "row step: attention": across,
            "both steps: attention": both}  # fmt: skip


# -------------------------------------------------------------------------------------- comparisons


def channel_map(x):
    """DANet's channel attention map (Sect. 3.1): x `[N, C, H, W]` -> `[N, C, C]`, float32."""
    # As in its paper (Fu et al., CVPR 2019). Its released code has softmax(max - X Xᵀ).
    with torch.autocast(x.device.type, enabled=False):
        x = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        return torch.softmax(x @ x.mT, dim=-1)


class DualAttention(nn.Module):
    """The earlier designs of Fig. 3.1, whose results can conflict (Sect. 3.2): "parallel", (a):
    spatial + channel attention; "sequential", (b): channel attention, then spatial.

    `[N, in_channels, H, W]` -> features `[N, 512, H, W]`, {branch: logits `[N, K, H, W]`}. Layout
    of DANet; spatial attention of this file. (DANet's has separate queries and keys, no norms.)
    """

    def __init__(self, in_channels, num_classes, design="parallel", attention="axial",
                 released=False):  # fmt: skip
        super().__init__()
        backbones.check_choices(dual=(design, ("parallel", "sequential")))
        self.design, self.channels = design, 512
        self.reduce = Conv2dNormActivation(in_channels, 512, 3)
        self.attention = SpatialAttention(512, attention, channelization=False, released=released)
        self.gamma_spatial = nn.Parameter(torch.zeros(()))
        self.gamma_channel = nn.Parameter(torch.zeros(()))
        self.after = Conv2dNormActivation(512, 512, 3)
        self.channel_logits = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(512, num_classes, 1))
        if design == "parallel":
            self.reduce_channel = Conv2dNormActivation(in_channels, 512, 3)
            self.after_channel = Conv2dNormActivation(512, 512, 3)
            self.spatial_logits = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(512, num_classes, 1))

    def spatial(self, x):
        return x + self.gamma_spatial * self.attention(x)

    def channel(self, x):
        y = channel_map(x).to(x.dtype) @ x.flatten(2)  # [N, 512, HW]
        return x + self.gamma_channel * y.reshape(x.shape)

    def forward(self, x):
        if self.design == "sequential":
            channel = self.channel(self.reduce(x))
            logits = self.channel_logits(channel.detach())  # Sect. 3.2.1: trains nothing else
            return self.after(self.spatial(channel)), {"channel": logits}
        spatial = self.after(self.spatial(self.reduce(x)))
        channel = self.after_channel(self.channel(self.reduce_channel(x)))
        logits = {"spatial": self.spatial_logits(spatial), "channel": self.channel_logits(channel)}
        return spatial + channel, logits


_COMMON = dict(
    backbone="resnet101", weights="imagenet", output_stride=8,  # Sect. 3.4.1.1; 16 for ablations
    optimizer="sgd", lr=0.01, power=0.9, batch_size=16, color="none",  # Sect. 3.4.1.3
    # Open; the released configuration's. Its batch norm decays by 0.9997.
    crop_size=513, scale=(0.5, 2.0), scale_step=0.1, momentum=0.9, weight_decay=1e-4,
    bn_momentum=0.0003,
)  # fmt: skip
RECIPES = {
    "shapes": dict(output_stride=16, option=dict(decoder=True)),  # ours, as SHAPES in train.py
    "pascal_context": _COMMON | dict(iterations=40_000),  # Sect. 3.4.2
    "coco_stuff10k": _COMMON | dict(iterations=40_000),  # Sect. 3.4.3; its "172 classes" are 171
    "cityscapes": _COMMON | dict(iterations=80_000, batch_size=8, crop_size=769),  # 3.4.4, 3.4.1.3
    # Sect. 3.4.5 names the backbone. Iterations are open; SegFormer's.
    "coco_stuff164k": _COMMON | dict(iterations=80_000, backbone="efficientnet_b5"),
}  # fmt: skip


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A CAANet. `options` are its keywords; ValueError for an unknown one."""
    return CAANet(num_classes, backbone, weights, **backbones.check_options(CAANet, options))
