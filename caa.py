"""Channelized Axial Attention (CAA).

Ye Huang, Di Kang, Wenjing Jia, Liu Liu, Xiangjian He, AAAI 2022, https://arxiv.org/abs/2101.07434.
Equations, tables and sections have the numbers of Ye Huang's thesis "Context-aware Image Semantic
Segmentation" (University of Technology Sydney, 2022), chapter 3.

The idea. Spatial attention decides which positions a pixel reads, channel attention which channels
count. Earlier networks compute the two apart, in parallel or in sequence, and their results can
conflict: a channel that matters for a small object may not matter for the whole image. CAA puts
channel attention inside spatial attention. Spatial attention is done in two steps, first along the
columns, then along the rows. Each step multiplies features by attention weights and sums them. A
gate acts on the channels between the multiplication and the sum. In the column step every row has
its own gate, in the row step every column.

The mathematics. x [N, C, H, W] are the features. θ, φ and g are 1x1 convolutions: θ(x) and φ(x)
[N, 64, H, W] are queries and keys at once, g(x) [N, C, H, W] are the values. (i, j) is the position
in row i and column j, m is another row, n another column, ⊙ multiplies channel by channel.

    column step
    A_col(ij, mj) = softmax_m( θ(x_ij)ᵀ θ(x_mj) )           [N, W, H, H]  (3.3) -> column_attention
    α_ijm  = A_col(ij, mj) g(x_mj)                          [C] each      (3.6)
    gate_i = Sigmoid(ReLU( Σ_m,j α_ijm / (H·W) · ω_c1) ω_c2) [N, H, C]    (3.9) -> ChannelAttention
    z_ij   = Σ_m gate_i ⊙ α_ijm                             [N, C, H, W]        -> channelized

    row step: values from z, queries and keys from x
    A_row(ij, in) = softmax_n( φ(x_ij)ᵀ φ(x_in) )           [N, H, W, W]  (3.4) -> row_attention
    β_ijn  = A_row(ij, in) z_in                             [C] each      (3.7), of the gated z
    gate_j = Sigmoid(ReLU( Σ_i,n β_ijn / (H·W) · ω_r1) ω_r2) [N, W, C]   (3.10) -> ChannelAttention
    y_ij   = Σ_n gate_j ⊙ β_ijn                             [N, C, H, W] (3.11) -> SpatialAttention

The weights ω_c1, ω_r1 are [C, 128], ω_c2, ω_r2 [128, C]. `channelized` computes the means of the
gates. Others: self-attention, (3.1), (3.2) -> SpatialAttention(attention="self"); axial attention
without gates, (3.5), (3.8) -> channelized(gate=None); Algorithm 2 -> channelized_grouped; the
conflicts of Sect. 3.2 -> DualAttention.

Read first `column_attention`, then `channelized_grouped`, which is Algorithm 2 as it is printed,
then `channelized`, which computes the same much faster. Tests: tests/test_caa.py.
To copy: this file and backbones.py. What is above CAANet needs torch and torchvision alone.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

import backbones

# ---------------------------------------------------------------------------------------- equations


def column_attention(query):
    """Eq. (3.3): how much each row attends to each other row, in every column.

    query `[N, c, H, W]`, which is the key as well -> `[N, W, H, H]`, indexed [n, j, i, m]: in
    column j, query row i attends to row m. Sums to 1 over m. Always float32 (float64 for float64),
    under autocast too: a product over 64 channels can exceed float16's largest number.
    """
    if query.requires_grad:
        # On the CPU, batch norm's backward pass misreads permuted gradients of one-column maps.
        query.register_hook(lambda gradient: None if gradient is None else gradient.contiguous())
    with torch.autocast(query.device.type, enabled=False):
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        q = query.permute(0, 3, 2, 1)  # [N, W, H, c]
        return torch.softmax(q @ q.mT, dim=-1)  # Eq. (3.3)  [N, W, H, H]


def row_attention(query):
    """Eq. (3.4): how much each column attends to each other column, in every row.

    query `[N, c, H, W]` -> `[N, H, W, W]`: row i, column j of the query, attended column n.
    """
    return column_attention(query.mT)  # the same with rows and columns exchanged


def axial_attention(query, axis):
    """`column_attention` for axis="column", `row_attention` for axis="row"."""
    return {"column": column_attention, "row": row_attention}[axis](query)


def channelized_grouped(attention, value, gate, axis, groups):
    """Algorithm 2: the column step, Eqs. (3.6), (3.9), (3.11), one group of query rows at a time.

    attention `[N, W, H, H]` of `column_attention`, value `[N, C, H, W]` -> `[N, C, H, W]`. gate: a
    callable `[N, L, C] -> [N, L, C]` with values in 0…1, L the number of rows; None is plain axial
    attention, Eq. (3.5). axis="row" is the row step, Eqs. (3.7), (3.10), (3.11): attention `[N, H,
    W, W]` of `row_attention`, L the number of columns.

    For reading and comparing: α takes N·H/groups·H·W·C numbers, in training groups times that.
    """
    if axis == "row":  # the algorithm is printed for columns
        return channelized_grouped(attention, value.mT, gate, "column", groups).mT
    N, C, H, W = value.shape
    padding = -H % groups  # line 1 prints H % groups: of 5 rows and 3 groups 2, where 1 is missing
    # Line 2: query row first. (The thesis' A is [N, H, H, W], the column last.)
    A = attention.to(value.dtype).permute(2, 0, 3, 1)  # [H, N, H, W]
    A = F.pad(A, (0, 0, 0, 0, 0, 0, 0, padding))  # lines 3, 4  [H+, N, H, W]
    A = A.reshape(groups, -1, N, H, W)  # line 5  [G, H+/G, N, H, W]
    Y = []
    for A_g in A:  # lines 6 to 8: the channelization of one group
        # Eq. (3.6) prints g(x_mn), values of another column than the map's. That would cost
        # O(H²W²), not Sect. 3.3.1.2's O(H²W). Fig. 3.5 and the released code have one column.
        alpha = A_g[:, :, None] * value  # [H+/G, N, C, H, W]
        if gate is not None:
            pooled = alpha.sum(dim=(3, 4)) / (H * W)  # Σ_m,j α / HW  [H+/G, N, C]
            weight = gate(pooled.transpose(0, 1)).transpose(0, 1)  # Eq. (3.9)  [H+/G, N, C]
            alpha = weight.to(alpha.dtype)[..., None, None] * alpha
        Y.append(alpha.sum(dim=3))  # Σ_m  [H+/G, N, C, W]
    Y = torch.cat(Y)[:H]  # lines 9 to 11; line 9 counts one group too many, 0 … G  [H, N, C, W]
    return Y.permute(1, 2, 0, 3)  # line 12  [N, C, H, W]


def channelized(attention, value, gate, axis):
    """The same as `channelized_grouped`, by one matrix product, without the weighted features.

    Derivation: in Eq. (3.9) the gate multiplies α_ijm and does not depend on m, the index of the
    sum in Eq. (3.11). So it can be taken out of the sum. With z_ij = Σ_m α_ijm, a matrix product,

        Σ_m gate_i ⊙ α_ijm = gate_i ⊙ z_ij

    The gate itself is computed from a sum over m, which is z again, averaged over the columns j:

        Σ_m,j α_ijm / (H·W) = Σ_j z_ij / (H·W) = mean_j(z_ij) / H
    """
    if axis == "row":
        return channelized(attention, value.mT, gate, "column").mT
    value = value.permute(0, 3, 2, 1)  # [N, W, H, C]
    z = attention.to(value.dtype) @ value  # Σ_m α  [N, W, H, C]
    if gate is not None:
        # The mean is float32: dividing half-precision features by H would underflow.
        pooled = z.mean(dim=1, dtype=torch.promote_types(z.dtype, torch.float32)) / z.shape[2]
        z = gate(pooled)[:, None].to(z.dtype) * z  # Eq. (3.9)  [N, 1, H, C] · [N, W, H, C]
    return z.permute(0, 3, 2, 1)  # [N, C, H, W]


def channel_map(x):
    """The channel attention map of DANet (Sect. 3.1): x `[N, C, H, W]` -> `[N, C, C]`, float32.

    softmax(X Xᵀ) as in its paper (Fu et al., CVPR 2019); its released code has softmax(max - X Xᵀ).
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        return torch.softmax(x @ x.mT, dim=-1)


# ------------------------------------------------------------------------------------------- layers


class ChannelAttention(nn.Module):
    """The gate of Eqs. (3.9), (3.10): `[N, L, C] -> [N, L, C]` in 0…1, in its weights' precision.

    `layers` hidden layers of `width` channels each; activation "leaky_relu" or "relu".
    With layers=1, activation="relu" it is as printed: fc[0] is ω_c1 or ω_r1, fc[1] ω_c2 or ω_r2.
    Raises ValueError for other values.
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
            # PyTorch's smaller weights would shrink the signal a hundredfold. The gates are near
            # 1/2 at the start in any case: Σα/HW carries a factor 1/H.
            nn.init.kaiming_normal_(fc.weight, a=self.slope)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.fc[0].weight.dtype)
            for fc in self.fc[:-1]:
                x = F.leaky_relu(fc(x), self.slope)
            return torch.sigmoid(self.fc[-1](x))


class SpatialAttention(nn.Module):
    """Attention over positions, `[N, C, H, W] -> [N, C, H, W]`.

    attention: "axial", Eq. (3.11), or "self", Eq. (3.1) with one gate for each pixel.
    channelization: use gates, **gate are keywords of ChannelAttention. released: see CAANet. The
    sizes here and in CAA are the released code's.
    """

    def __init__(self, channels=512, attention="axial", channelization=True, query_channels=64,
                 released=False, **gate):  # fmt: skip
        super().__init__()
        if attention not in ("axial", "self"):
            raise ValueError(f"attention={attention!r}: it is 'axial' or 'self'")
        self.axial = attention == "axial"
        self.theta = self.query(channels, query_channels, released)
        self.phi = self.query(channels, query_channels, released) if self.axial else None
        self.g = Conv2dNormActivation(channels, channels, 1)  # its ReLU is the released code's
        nn.init.dirac_(self.g[0].weight)  # so the output starts near a multiple of x
        gates = channelization, channelization and self.axial
        gates = [ChannelAttention(channels, **gate) if wanted else None for wanted in gates]
        self.gate_col, self.gate_row = gates

    @staticmethod
    def query(channels, query_channels, released):
        """θ or φ: "a 1x1 convolution layer" (Sect. 3.3.1.1), into which its batch norm folds."""
        # After the released code's ReLU all products are at least 0, so a position with a large
        # norm attracts attention from unrelated positions.
        act = nn.ReLU if released else None
        layer = Conv2dNormActivation(channels, query_channels, 1, activation_layer=act)
        nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
        # A query's product with itself starts near 64 · 0.7² = 31; after a ReLU it is 32.
        nn.init.constant_(layer[1].weight, 1.0 if released else 0.7)
        return layer

    def maps(self, x):
        """(column map `[N, W, H, H]`, row map `[N, H, W, W]`); self: (`[N, 1, HW, HW]`, None)."""
        if self.axial:
            return column_attention(self.theta(x)), row_attention(self.phi(x))
        return column_attention(self.theta(x).flatten(2)[..., None]), None  # Eq. (3.2)

    def forward(self, x):
        col, row = self.maps(x)
        if self.axial:
            z = channelized(col, self.g(x), self.gate_col, "column")  # the inner sum of Eq. (3.11)
            return channelized(row, z, self.gate_row, "row")  # the outer sum
        # Eq. (3.1): the column step of one column that holds all positions  [N, C, HW, 1]
        y = channelized(col, self.g(x).flatten(2)[..., None], self.gate_col, "column")
        return y.reshape(x.shape)


class CAA(nn.Module):
    """The head, `[N, in_channels, H, W] -> [N, 256, H, W]`; attention=None leaves attention out."""

    def __init__(self, in_channels, attention="axial", channelization=True, se=False,
                 released=False, **gate):  # fmt: skip
        super().__init__()
        self.reduce = Conv2dNormActivation(in_channels, 512, 3)
        self.attention = nn.Identity()
        if attention is not None:
            self.attention = SpatialAttention(512, attention, channelization, 64, released, **gate)
        # Table 3.2, "+ SE": with SENet's reduction of 16, as the thesis does not say.
        self.se = SqueezeExcitation(512, 512 // 16) if se else nn.Identity()
        self.after = Conv2dNormActivation(512, 512, 1)
        nn.init.dirac_(self.after[0].weight)
        # No batch norm: after pooling there is one value per channel and image.
        self.image_level = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, 512, 1), nn.ReLU())
        self.project, self.channels = Conv2dNormActivation(1024, 256, 1), 256

    def forward(self, x):
        x = self.reduce(x)  # [N, 512, H, W]
        y = self.after(self.se(self.attention(x)))
        return self.project(torch.cat([y, self.image_level(x).expand_as(x)], dim=1))


class DualAttention(nn.Module):
    """The two earlier designs of Fig. 3.1, whose branches can conflict (Sect. 3.2).

    "parallel", (a): spatial + channel attention; "sequential", (b): channel, then spatial
    attention. `[N, in_channels, H, W]` -> (features `[N, 512, H, W]`, the branches' logits by name,
    `[N, K, H, W]`): "spatial" and "channel" (Sect. 3.2.1); of "sequential" "channel" alone.

    The layout is DANet's, the spatial attention this file's: the designs differ in the place of
    channel attention alone. (DANet has separate queries and keys, and no norms.)
    """

    def __init__(self, in_channels, num_classes, design="parallel", attention="axial",
                 released=False):  # fmt: skip
        super().__init__()
        if design not in ("parallel", "sequential"):
            raise ValueError(f"dual={design!r}: it is None, 'parallel' or 'sequential'")
        self.design, self.channels = design, 512
        self.reduce = Conv2dNormActivation(in_channels, 512, 3)
        self.attention = SpatialAttention(512, attention, channelization=False, released=released)
        self.gamma_spatial, self.gamma_channel = (nn.Parameter(torch.zeros(())) for _ in range(2))
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
            logits = self.channel_logits(channel.detach())  # Sect. 3.2.1: it trains no more
            return self.after(self.spatial(channel)), {"channel": logits}
        spatial = self.after(self.spatial(self.reduce(x)))
        channel = self.after_channel(self.channel(self.reduce_channel(x)))
        logits = {"spatial": self.spatial_logits(spatial), "channel": self.channel_logits(channel)}
        return spatial + channel, logits


# ------------------------------------------------------------------------------------------ network


class CAANet(nn.Module):
    """Backbone, CAA, classifier, bilinear upsampling of the logits (Sects. 3.4.1.1, 3.4.1.2).

    net(images): float `[N, 3, H, W]` -> logits float32 `[N, num_classes, H, W]`. net(images,
    labels), labels int64 `[N, H, W]`, 255 = ignored -> dict of scalar losses: "cross_entropy",
    "auxiliary", and with `dual` those of the branches (of weight 1, as DANet's).

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
    output_stride    of the backbone: 8, 16, 32       8              Tables 3.1 to 3.6
    released         True: ReLU after the queries     False          the authors' code
    """

    caption = "The marked pixel takes features from the bright positions."

    def __init__(self, num_classes, backbone="resnet50", weights=None, *, attention="axial",
                 channelization=True, channel_layers=5, channel_width=128, activation="leaky_relu",
                 se=False, dual=None, auxiliary=True, decoder=False, output_stride=8,
                 released=False):  # fmt: skip
        super().__init__()
        grid = (1, 2, 4) if backbone.startswith("resnet") else None  # the released code's
        self.backbone = backbones.build(backbone, output_stride, weights, grid)
        self.backbone.reads(*([0, 3] if decoder else [3]))
        low, *_, high = self.backbone.channels
        if dual is not None:
            if attention is None or se:
                raise ValueError("dual has attention='axial' or 'self', and no se")
            self.head = DualAttention(high, num_classes, dual, attention, released)
            self.caption, self.about_pixel = "What each branch predicts alone.", False
        else:
            gate = dict(layers=channel_layers, width=channel_width, activation=activation)
            self.head = CAA(high, attention, channelization, se, released, **gate)
        self.decoder = backbones.Decoder(self.head.channels, low) if decoder else None
        self.stride, self.drop = self.backbone.strides[-1], nn.Dropout(0.1)
        self.classifier = nn.Conv2d((self.decoder or self.head).channels, num_classes, 1)
        self.regularized = "decoder.fuse.1.1" if decoder else "drop" if dual else "head.project.1"
        layers = Conv2dNormActivation(high, 256, 1), nn.Dropout(0.1), nn.Conv2d(256, num_classes, 1)
        self.auxiliary = nn.Sequential(*layers) if auxiliary else None

    def forward(self, images, labels=None):
        low, *_, high = self.backbone(images)
        features, branches, stride = self.head(high), {}, self.stride
        if isinstance(self.head, DualAttention):
            features, branches = features
        if self.decoder is not None:
            features, stride = self.decoder(features, low, self.backbone.resize), 4
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
            logits = upsample(self.auxiliary(high), self.stride, size)
            losses["auxiliary"] = 0.4 * backbones.pixel_cross_entropy(logits, labels)
        return losses

    @torch.no_grad()
    def figures(self, image, pixel=None):
        """The pictures of one image `[3, H, W]` or `[1, 3, H, W]`, each `[H, W]`: how much the
        position at `pixel` (row, column; None: the centre) attends to each, before the gates. Dual
        attention: label maps of its branches and the prediction (Figs. 3.3, 3.4). Empty for
        attention=None. ValueError in training mode, and for a pixel outside.
        """
        image = backbones.one_image(self, image)
        size, x = image.shape[2:], self.backbone(image)[-1]
        row, column = backbones.one_pixel(pixel, size)
        if isinstance(self.head, DualAttention):
            logits = {f"prediction, {name} branch": y for name, y in self.head(x)[1].items()}
            logits = {k: self.backbone.upsample(y, self.stride, size) for k, y in logits.items()}
            return {k: y.argmax(1)[0] for k, y in (logits | {"prediction": self(image)}).items()}
        if not isinstance(self.head.attention, SpatialAttention):
            return {}
        positions = [self.backbone.positions(self.stride, n) for n in x.shape[2:]]
        rows, columns = map(backbones.nearest, positions, size)
        maps = attended(self.head.attention, self.head.reduce(x), rows[row], columns[column])
        return {f"{k} of the marked pixel": m[rows[:, None], columns] for k, m in maps.items()}


def attended(attention, x, i, j):
    """What position (i, j) of x `[1, C, H, W]` attends to in a SpatialAttention: maps `[H, W]`.

    "both steps" is A_row(ij, in) · A_col(in, mn) at (m, n): together they reach every position.
    """
    (H, W), (col, row) = x.shape[2:], attention.maps(x)
    if row is None:
        return {"attention": col[0, 0, i * W + j].reshape(H, W)}
    column, across = col.new_zeros(H, W), col.new_zeros(H, W)
    column[:, j], across[i] = col[0, j, i], row[0, i, j]
    maps = {"column step": column, "row step": across, "both steps": row[0, i, j] * col[0, :, i].T}
    return {f"{name}: attention": m for name, m in maps.items()}


_COMMON = dict(
    # Sect. 3.4.1.1; stride 8 to compare with others, 16 for the ablations
    backbone="resnet101", weights="imagenet", output_stride=8,
    # Sect. 3.4.1.3; augmentation is "the most basic"
    optimizer="sgd", lr=0.01, power=0.9, batch_size=16, color="none",
    # Open; the released configuration's. Its decay of 0.9997 is PyTorch's momentum 0.0003.
    crop_size=513, scale=(0.5, 2.0), scale_step=0.1, momentum=0.9, weight_decay=1e-4,
    bn_momentum=0.0003,
)  # fmt: skip
RECIPES = {
    # Ours, for the first run: minutes on two CPU cores, from random weights.
    "shapes": dict(optimizer="adamw", lr=5e-4, head_lr=4.0, output_stride=16, batch_size=4,
                   iterations=340, scale=(1.0, 1.0), option=dict(decoder=True)),
    "pascal_context": _COMMON | dict(iterations=40_000),  # Sect. 3.4.2
    "coco_stuff10k": _COMMON | dict(iterations=40_000),  # Sect. 3.4.3; its "172 classes" are 171
    "cityscapes": _COMMON | dict(iterations=80_000, batch_size=8, crop_size=769),  # 3.4.4
    # Sect. 3.4.5 names the backbone. Iterations are open; SegFormer's.
    "coco_stuff164k": _COMMON | dict(iterations=80_000, backbone="efficientnet_b5"),
}  # fmt: skip


def build(num_classes, backbone="resnet50", *, weights=None, **options):
    """A CAANet. `options` are its keywords; ValueError for an unknown one."""
    return CAANet(num_classes, backbone, weights, **backbones.check_options(CAANet, options))
