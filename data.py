"""Datasets of (image, label) pairs, training augmentation, the sampler, and a report on any of them.

    train = data.dataset("camvid", "datasets/camvid", "train", train=True, crop_size=160)
    image, label = train[0]   # float32 [3, 160, 160] normalised; int64 [160, 160], 255 = ignored
    train.classes, train.palette, train.num_classes

    python data.py camvid --data-root datasets/camvid --split train   # reads every label, prints a report, draws a sheet

`shapes`, the default, is drawn by index and needs no files. Its name takes switches: shapes+scale, shapes+company,
shapes+unity, shapes+thin, or several (class Shapes says what each does).

Randomness: every sample is augmented by (seed, its position in the run) alone, `dataset[index, position]`. So a run does
not depend on the number of workers or processes, nor on having been interrupted.

To copy: this file stands alone.
"""

import argparse
import colorsys
import itertools
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

IGNORE = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's weights expect


class Mistake(ValueError):
    """Something the user can mend: its text says what was wrong, what was expected, what to do. Always one line."""


# ------------------------------------------------------------------------------------------------------------ datasets


def dataset(name, root=None, split="train", train=False, **augmentation):
    """The dataset `name` in the folder `root` (datasets/NAME).

    Items are (image float32 `[3, H, W]` with ImageNet's mean and deviation taken off, label int64 `[H, W]`, 255 = ignored).
    train: augment, by `augment(**augmentation)` (crop_size, scale, scale_step, color), else the whole image; `seed` sets
    the randomness. Has `.classes` (names), `.palette` (RGB 0…255), `.num_classes`, `.name(index)`.

    Raises Mistake for an unknown name, missing files (it names what it looked for), a broken image, a wrong label id.
    """
    seed, transform = augmentation.pop("seed", 0), augment(**augmentation)
    transform = transform if train else v2.Compose(NORMALISE)
    kind, *switches = name.split("+")
    if kind == "shapes":
        return Shapes(split, switches, transform, seed)
    if kind not in _LAYOUTS or switches:
        raise Mistake(f"unknown dataset '{name}'; there are shapes, {', '.join(_LAYOUTS)}")
    return Pairs(*_LAYOUTS[kind](Path(root or f"datasets/{name}"), split), transform, seed)


class Pairs(Dataset):
    """Images and label maps in files. lut: 256 numbers, raw id -> train id, 255 = ignored, -1 = no such id."""

    def __init__(self, files, classes, palette, lut, transform, seed=0):
        self.files, self.classes, self.palette, self.lut = files, classes, palette, lut
        self.transform, self.seed, self.num_classes = transform, seed, len(classes)

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return self.files[index][0].stem

    def raw(self, index):
        """(image uint8 `[3, H, W]`, label uint8 `[H, W]`) before any transform, as tv_tensors."""
        image_file, label_file = self.files[index]
        image, label = read_image(image_file), read_label(label_file, self.lut)
        if image.shape[1:] != label.shape:
            (h, w), (H, W) = label.shape, image.shape[1:]
            raise Mistake(f"'{label_file}' is {w}x{h} and '{image_file}' {W}x{H}; a label has its image's size")
        return image, label

    def __getitem__(self, key):
        index, position = key if isinstance(key, tuple) else (key, key)
        return _transformed(self, *self.raw(index), position)


def _transformed(self, image, label, position):
    with torch.random.fork_rng(devices=[]):  # the CPU's generator alone: torch.manual_seed would reseed the GPUs as well
        torch.default_generator.manual_seed(seed_of(self.seed, position))
        image, label = self.transform(image, label)
    return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor).long()


def seed_of(*numbers):
    """One 63-bit seed from several whole numbers (of at least 0)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def read_image(path, upright=False):
    """The photograph at `path`, uint8 `[3, H, W]`; gray ones become RGB. Mistake where it cannot be read.

    upright: turn it as its camera noted (EXIF). Not for images with labels, which follow the pixels as they are stored.
    """
    image = _open(path)
    return TF.to_image((ImageOps.exif_transpose(image) if upright else image).convert("RGB"))


def read_label(path, lut):
    """The label map at `path` through `lut`, uint8 `[H, W]`. Mistake for an id that `lut` gives as -1."""
    raw = np.asarray(_open(path, label=True))  # mode P or L: the ids themselves
    if raw.ndim != 2 or raw.dtype not in (np.uint8, np.bool_):
        raise Mistake(f"'{path}' is no label map: expected one 8-bit channel of class ids (PNG mode P or L)")
    raw = raw.astype(np.uint8)
    label = lut[raw]
    if label.min(initial=0) < 0:
        wrong = sorted(set(raw[label < 0].tolist()))
        known = sorted(np.flatnonzero(lut >= 0).tolist())
        raise Mistake(f"'{path}' holds the label ids {wrong[:8]}; this dataset has {_ranges(known)}; correct the file")
    return tv_tensors.Mask(torch.from_numpy(label.astype(np.uint8)))


def _open(path, label=False):
    try:
        image = Image.open(path)
        stored = image.tile[0][3] if image.tile else ""
        image.load()
    except FileNotFoundError:
        raise Mistake(f"no file '{path}'") from None
    except Exception as error:  # Pillow raises many kinds for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Mistake(f"'{path}' cannot be read as an image ({reason}); replace or remove it") from None
    if label and stored in ("L;2", "L;4"):  # Pillow stretches these to 0…255
        raise Mistake(f"'{path}' holds {stored[-1]}-bit gray values, not class ids; save it with 8 bits a pixel")
    return image


def _ranges(numbers):
    groups = [[n for _, n in group] for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)


def _lut(known, rest):
    """Raw id -> train id from the dict `known`; 255 stays 255, all other ids become `rest`."""
    lut = np.full(256, rest, np.int16)
    lut[IGNORE] = IGNORE
    for raw, train in known.items():
        lut[raw] = train
    return lut


def _pairs(images, labels, what):
    """The files of two folders, paired by their stems."""
    kinds = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
    files = [path for path in sorted(images.glob("*")) if path.suffix.lower() in kinds]
    found = {path.stem: path for path in files}
    truth = {path.stem: path for path in labels.glob("*") if path.suffix.lower() == ".png"}
    if len(found) < len(files):
        twice = next(path for path in files if found[path.stem] != path)
        raise Mistake(f"'{twice}' and '{found[twice.stem]}' share the label of one name; rename one of them")
    if not found or not truth:
        side = images if not found else labels
        state = "empty" if side.is_dir() else "no such folder"
        raise Mistake(f"{what} not found: looked for images in '{side}' ({state}); --data-root is the dataset's folder")
    single = sorted(set(found) ^ set(truth))
    if single:
        raise Mistake(f"{len(single)} files of '{images}' and '{labels}' lack their partner, the first is '{single[0]}'")
    return [(found[stem], truth[stem]) for stem in found]


_CAMVID = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


def _camvid(root, split):
    """`train/ trainannot/ val/ valannot/ test/ testannot/`, same file names; 0–10, 11 = unlabelled."""
    if split not in ("train", "val", "test"):
        raise Mistake(f"camvid has no split '{split}'; it has train, val, test")
    files = _pairs(root / split, root / f"{split}annot", f"camvid {split}")
    known = {i: i for i in range(11)} | {11: IGNORE}
    return files, list(_CAMVID), list(_CAMVID.values()), _lut(known, rest=-1)


def _folder(root, split):
    """`images/{split}/*`, `labels/{split}/*.png`, `classes.txt`: one name a line, its number the id; 255 = ignored."""
    names = root / "classes.txt"
    if not names.is_file():
        raise Mistake(f"folder not found: looked for '{names}', images/, labels/; --data-root is the dataset's folder")
    try:
        classes = [line.strip() for line in names.read_text(encoding="utf-8").strip().splitlines()]
    except UnicodeDecodeError:
        raise Mistake(f"'{names}' is no UTF-8 text; save it as such, one class name a line") from None
    if not 0 < len(classes) < IGNORE or "" in classes:
        raise Mistake(f"'{names}' names {len(classes)} classes; expected 1 to {IGNORE - 1}, one a line, no line empty")
    files = _pairs(root / "images" / split, root / "labels" / split, f"folder {split}")
    hues = [colorsys.hsv_to_rgb(0.618 * i % 1, 0.9 - 0.4 * (i % 2), 0.95 - 0.25 * (i % 3)) for i in range(len(classes))]
    palette = [tuple(int(255 * c) for c in hue) for hue in hues]
    return files, classes, palette, _lut({i: i for i in range(len(classes))}, rest=-1)


_LAYOUTS = {"camvid": _camvid, "folder": _folder}


# -------------------------------------------------------------------------------------------------------- augmentation


def _sides(size):
    """(height, width) of a square's side, or of both."""
    return (size, size) if isinstance(size, int) else tuple(size)


class RandomScaledCrop(v2.Transform):
    """Scale by a random factor and take a random crop: the source window is cut out, and that resized.

    crop_size: a side, or (height, width); scale: range of the factor; step: 0, or its grid (0.1: 0.5, 0.6, …). Where the
    scaled image is smaller than the crop, all of that side is kept (PadTo fills it up).
    """

    def __init__(self, crop_size, scale=(0.5, 2.0), step=0.0):
        super().__init__()
        self.crop_size, self.scale, self.step = _sides(crop_size), scale, step

    def make_params(self, inputs):
        low, high = self.scale
        if self.step:
            factor = low + self.step * torch.randint(int((high - low) / self.step + 1e-6) + 1, ()).item()
        else:
            factor = low + (high - low) * torch.rand(()).item()
        window = []
        for side, crop in zip(inputs[0].shape[-2:], self.crop_size):
            source = min(side, max(1, round(crop / factor)))
            size = crop if source < side else max(1, min(crop, round(side * factor)))
            window.append((torch.randint(side - source + 1, ()).item(), source, size))
        return dict(zip(("rows", "columns"), window))

    def transform(self, inpt, params):
        (top, height, new_height), (left, width, new_width) = params["rows"], params["columns"]
        cut = TF.crop(inpt, top, left, height, width)
        if isinstance(inpt, tv_tensors.Mask):
            # The centres of the new pixels, as bilinear resizing of the image takes them. (Masks are else resized by
            # "nearest", which takes their upper left corners.)
            exact = InterpolationMode.NEAREST_EXACT
            cut = TF.resize_image(cut.as_subclass(torch.Tensor)[None], [new_height, new_width], interpolation=exact)[0]
            return tv_tensors.wrap(cut, like=inpt)
        cut = cut[None].contiguous(memory_format=torch.channels_last)[0]  # resized two to three times faster than a view
        return tv_tensors.wrap(TF.resize_image(cut, [new_height, new_width], antialias=True), like=inpt)


class RandomBrightness(v2.Transform):
    """Half of the images get one whole number in -10 … 10 added to all pixels (of 0 … 255), as in HRNet's training."""

    def make_params(self, inputs):
        return dict(shift=torch.randint(-10, 11, ()).item() if torch.rand(()) < 0.5 else 0)

    def transform(self, inpt, params):
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        return tv_tensors.wrap((inpt.to(torch.int16) + params["shift"]).clamp(0, 255).to(torch.uint8), like=inpt)


class PadTo(v2.Transform):
    """Pad to `size` (a side, or height and width) at the right and the bottom: images with 0, the mean, labels with 255."""

    def __init__(self, size):
        super().__init__()
        self.size = _sides(size)

    def transform(self, inpt, params):
        height, width = inpt.shape[-2:]
        fill = IGNORE if isinstance(inpt, tv_tensors.Mask) else 0.0
        return TF.pad(inpt, [0, 0, self.size[1] - width, self.size[0] - height], fill=fill)


_COLOR = {"none": (), "brightness": (RandomBrightness,), "photometric": (v2.RandomPhotometricDistort,)}
NORMALISE = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize(MEAN, STD)]


def augment(crop_size=513, scale=(0.5, 2.0), scale_step=0.0, color="none"):
    """The training transform: random scale and crop, colour ("none", "brightness", "photometric"), flip, normalise, pad."""
    if color not in _COLOR:
        raise Mistake(f"unknown color '{color}'; there are {', '.join(_COLOR)}")
    crop = RandomScaledCrop(crop_size, scale, scale_step)
    return v2.Compose([crop, *(make() for make in _COLOR[color]), v2.RandomHorizontalFlip(), *NORMALISE, PadTo(crop_size)])


class PositionSampler(Sampler):
    """Batches of (index, position) for the steps `start` … `stop` - 1 of a run: a `batch_sampler` for the DataLoader.

    Position p of the run is sample p mod n of epoch p // n, whose order is a permutation drawn from (seed, epoch). A step
    takes batch_size positions, of which each of `world` processes gets its consecutive share.
    """

    def __init__(self, length, batch_size, start, stop, seed=0, rank=0, world=1):
        if batch_size % world:
            raise Mistake(f"a batch of {batch_size} cannot be shared by {world} processes; make it a multiple of {world}")
        self.length, self.batch_size, self.start, self.stop = length, batch_size, start, stop
        self.seed, self.share = seed, range(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        drawn, order = None, None
        for step in range(self.start, self.stop):
            batch = []
            for position in (step * self.batch_size + i for i in self.share):
                epoch = position // self.length
                if epoch != drawn:
                    generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
                    drawn, order = epoch, torch.randperm(self.length, generator=generator).tolist()
                batch.append((order[position % self.length], position))
            yield batch


# -------------------------------------------------------------------------------------------------------------- shapes


class Shapes(Dataset):
    """A small drawn world with exact labels: "things" told apart by form, never by colour, on textured "stuff".

    Splits: train, val; val_small and val_large (things of other sizes); val_shuffled (things in any company). Switches:

    scale    the things of train and val are 18 to 30 % of the image's side, those of val_small 6 to 12, of val_large 40
             to 60. Without it train and val range from 6 to 50.
    company  in train and val 95 % of the things whose centre lies on stuff are of its `COMPANY`; in val_shuffled any.
    unity    one or two regions and one to three things: most of the image is large and uniform.
    thin     two of three things are rings, crosses and lines, 2 to 3 pixels wide.
    """

    STUFF = {
        "sky": (120, 180, 235),
        "grass": (80, 140, 50),
        "water": (35, 80, 150),
        "sand": (215, 190, 130),
        "rock": (115, 110, 110),
    }
    THINGS = {
        "disk": (230, 25, 75),
        "ring": (245, 130, 48),
        "square": (255, 225, 25),
        "triangle": (145, 30, 180),
        "cross": (240, 50, 230),
        "star": (70, 240, 240),
        "line": (250, 190, 212),
    }
    COMPANY = {
        "sky": ["star", "disk"],
        "grass": ["triangle", "cross"],
        "water": ["ring"],
        "sand": ["square"],
        "rock": ["line"],
    }
    SPLITS = ("train", "val", "val_small", "val_large", "val_shuffled")
    SWITCHES = ("scale", "company", "unity", "thin")

    def __init__(self, split="train", switches=(), transform=None, seed=0, size=96, length=None):
        if split not in self.SPLITS:
            raise Mistake(f"shapes has no split '{split}'; it has {', '.join(self.SPLITS)}")
        unknown = sorted(set(switches) - set(self.SWITCHES))
        if unknown:
            raise Mistake(f"shapes has no switch '{unknown[0]}'; it has {', '.join(self.SWITCHES)}, as in shapes+scale+thin")
        self.split, self.switches, self.size = split, frozenset(switches), size
        self.length = length or (2000 if split == "train" else 100)
        self.transform, self.seed = transform or v2.Compose(NORMALISE), seed
        self.classes = [*self.STUFF, *self.THINGS]
        self.palette = [*self.STUFF.values(), *self.THINGS.values()]
        self.num_classes = len(self.classes)

    def __len__(self):
        return self.length

    def name(self, index):
        return f"{self.split}_{index:06d}"

    def __getitem__(self, key):
        index, position = key if isinstance(key, tuple) else (key, key)
        return _transformed(self, *self.raw(index), position)

    def raw(self, index):
        """(image uint8 `[3, size, size]`, label uint8 `[size, size]`), the same for the same index, ever."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of {self.length} images")
        rng = np.random.default_rng([self.SPLITS.index(self.split), index])  # the world does not change with the run's seed
        image, label = self._stuff(rng)
        low, high = {"val_small": (0.06, 0.12), "val_large": (0.4, 0.6)}.get(
            self.split, (0.18, 0.3) if "scale" in self.switches else (0.06, 0.5)
        )
        count = rng.integers(1, 4) if "unity" in self.switches else rng.integers(4, 10)
        for side in sorted(np.exp(rng.uniform(np.log(low), np.log(high), count)), reverse=True):  # small ones in front
            self._thing(rng, image, label, side * self.size / 2)
        image = torch.from_numpy((image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8))
        return tv_tensors.Image(image.permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(label))

    def _noise(self, rng, cells_y, cells_x):
        """Smooth noise `[size, size]`, about -1 … 1, with so many cells."""
        grid = Image.fromarray(rng.uniform(-1, 1, (cells_y + 1, cells_x + 1)).astype(np.float32))
        return np.asarray(grid.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def _stuff(self, rng):
        """Regions between curved borders: thresholds of a tilted, waved plane. Each class has its colour and texture."""
        y, x = np.mgrid[: self.size, : self.size] / self.size
        texture = {
            "sky": 18 * self._noise(rng, 4, 3) - 40 * (y - 0.5),
            "grass": 30 * self._noise(rng, self.size // 6, self.size // 2),
            "water": 22 * np.sin(2 * np.pi * (9 * y + 0.4 * self._noise(rng, 3, 3))),
            "sand": rng.normal(0, 16, (self.size, self.size)),
            "rock": 38 * self._noise(rng, 10, 10),
        }
        count = rng.integers(1, 3) if "unity" in self.switches else rng.integers(2, 5)
        chosen = rng.permutation(len(self.STUFF))[:count]
        angle = rng.uniform(0, 2 * np.pi)
        plane = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5) + 0.12 * self._noise(rng, 2, 2)
        borders = np.quantile(plane, (np.arange(1, count) + rng.uniform(-0.25, 0.25, count - 1)) / count)
        label = chosen[np.digitize(plane, borders)].astype(np.uint8)
        colors = np.array(list(self.STUFF.values())) + rng.uniform(-20, 20, (len(self.STUFF), 3))
        image = colors[label] + np.choose(label, [texture[name] for name in self.STUFF])[..., None]
        return image, label

    def _thing(self, rng, image, label, radius):
        names, size = list(self.THINGS), self.size
        cy, cx = rng.uniform(0.05, 0.95, 2) * size
        thin = "thin" in self.switches and rng.random() < 2 / 3
        kinds = ["ring", "cross", "line"] if thin else names
        ground = label[int(cy), int(cx)]
        if "company" in self.switches and self.split != "val_shuffled" and ground < len(self.STUFF) and rng.random() < 0.95:
            kinds = self.COMPANY[list(self.STUFF)[ground]]
        kind = kinds[rng.integers(len(kinds))]
        width = rng.uniform(2, 3) / radius if thin else None  # in units of the radius
        angle = rng.uniform(0, 2 * np.pi)
        y, x = (np.mgrid[:size, :size] + 0.5 - np.array([cy, cx])[:, None, None]) / radius
        u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        inside = _inside(kind, u, v, width)
        color = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 1), rng.uniform(0.35, 1))) * 255
        image[inside] = (color * (1 + 0.2 * u[..., None] * rng.uniform(-1, 1)))[inside]
        label[inside] = len(self.STUFF) + names.index(kind)


def _inside(kind, u, v, width=None):
    """Which points of the plane lie in the unit-sized form; width of its strokes, or None for a broad form."""
    rho, phi = np.hypot(u, v), np.arctan2(v, u)
    if kind == "disk":
        return rho < 1
    if kind == "ring":
        return (rho < 1) & (rho > 1 - (width or 0.4))
    if kind == "square":
        return np.maximum(abs(u), abs(v)) < 0.8
    if kind == "triangle":
        return np.maximum.reduce([u * np.cos(a) + v * np.sin(a) for a in (0, 2 * np.pi / 3, 4 * np.pi / 3)]) < 0.5
    if kind == "cross":
        return (np.minimum(abs(u), abs(v)) < (width or 0.5) / 2) & (np.maximum(abs(u), abs(v)) < 1)
    if kind == "star":
        tip = abs(phi / (2 * np.pi / 5) % 1 - 0.5) * 2  # 1 at the five tips, 0 between
        return rho < 0.4 + 0.6 * tip
    return (abs(v) < (width or 0.3) / 2) & (abs(u) < 1)  # line


# ------------------------------------------------------------------------------------------------------------- pictures


def photograph(image):
    """A normalised image `[3, H, W]` -> uint8 0…255, as it was."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((image.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def colorize(label, palette):
    """A label map `[H, W]` -> uint8 `[3, H, W]` in the palette's colours; what is ignored is black."""
    table = torch.zeros(256, 3, dtype=torch.uint8)
    table[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return table[label.cpu().long()].permute(2, 0, 1)


def overlay(image, label, palette):
    """The label map `[H, W]` drawn over the uint8 image `[3, H, W]`; what is ignored stays as photographed."""
    masks = torch.stack([label.cpu() == i for i in range(len(palette))])
    return draw_segmentation_masks(image, masks, alpha=0.6, colors=[tuple(color) for color in palette])


def sheet(rows, titles, classes=(), palette=(), width=240):
    """A PIL picture: rows of uint8 tiles `[3, h, w]`, each `width` wide, and a legend of the classes.

    titles: of the columns, or a list for each row.
    """
    font, line = ImageFont.load_default(13), 20
    titles = titles if titles and isinstance(titles[0], list) else [titles] + [[]] * (len(rows) - 1)
    tiles = [[Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in row] for row in rows]
    tiles = [[tile.resize((width, max(1, round(tile.height * width / tile.width))), 0) for tile in row] for row in tiles]
    columns = max(len(row) for row in [*tiles, *titles])
    total = columns * (width + 4) + 4
    entries = [*zip(classes, palette), ("ignored", (0, 0, 0))] if classes else []
    across = max(1, total // 120)
    heights = [
        max(tile.height for tile in row) + 4 + (line if names else 0) for row, names in zip(tiles, titles, strict=True)
    ]
    canvas = Image.new("RGB", (total, sum(heights) + line * -(-len(entries) // across) + 8), "white")
    draw, y = ImageDraw.Draw(canvas), 4
    for row, names, height in zip(tiles, titles, heights):
        for column, title in enumerate(names):
            draw.text((4 + column * (width + 4), y), title, "black", font)
        for column, tile in enumerate(row):
            canvas.paste(tile, (4 + column * (width + 4), y + (line if names else 0)))
        y += height
    for i, (name, color) in enumerate(entries):
        x, top = 4 + i % across * 120, y + i // across * line
        draw.rectangle((x, top + 4, x + 12, top + 16), tuple(color), "black")
        draw.text((x + 18, top + 3), name[:14], "black", font)
    return canvas


# --------------------------------------------------------------------------------------------------------------- report


def report(data, title):
    """Reads every label of `data`; prints how many there are, their ids and class frequencies. A wrong id ends it."""
    counts, images = np.zeros(256, np.int64), np.zeros(256, np.int64)
    sizes = set()
    for index in tqdm(range(len(data)), desc="labels", unit="file", disable=None):
        label = data.raw(index)[1]
        ids = np.bincount(label.numpy().ravel(), minlength=256)
        counts += ids
        images += ids > 0
        sizes.add(tuple(label.shape))
    (h, w), (H, W) = min(sizes), max(sizes)
    print(
        f"{title}: {len(data)} images, {w}x{h}"
        + (f" to {W}x{H}" if len(sizes) > 1 else "")
        + f", {data.num_classes} classes"
    )
    print(f"ids after the look-up table: {_ranges(np.flatnonzero(counts).tolist())}")
    print(f"{'id':>4} {'class':<20} {'pixels':>14} {'share':>8} {'images':>7}")
    for i in [*range(data.num_classes), IGNORE]:
        name = data.classes[i] if i < data.num_classes else "(ignored)"
        print(f"{i:>4} {name:<20} {counts[i]:>14} {counts[i] / counts.sum():>8.2%} {images[i]:>7}")
    absent = [data.classes[i] for i in range(data.num_classes) if not counts[i]]
    if absent:
        print(f"never seen: {', '.join(absent)}")


def main(arguments=None):
    """`python data.py NAME --data-root DIR --split train`"""
    parser = argparse.ArgumentParser(description="Check a dataset: every label is read; a report and a contact sheet.")
    parser.add_argument("name", metavar="NAME", help=f"shapes (also shapes+scale+company+unity+thin), {', '.join(_LAYOUTS)}")
    parser.add_argument("--data-root", metavar="DIR", help="the dataset's folder (datasets/NAME)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--output", metavar="FILE", help="the contact sheet (NAME-SPLIT.png)")
    args = parser.parse_args(arguments)
    output = Path(args.output or f"{args.name}-{args.split}.png")
    try:
        if output.suffix not in (".png", ".jpg"):
            raise Mistake(f"--output {output}: expected a file that ends in .png or .jpg")
        data = dataset(args.name, args.data_root, args.split)
        report(data, f"{args.name} {args.split}")
        chosen = sorted(random.Random(0).sample(range(len(data)), min(8, len(data))))
        rows = []
        for index in chosen:
            image, label = data.raw(index)
            rows.append([image, colorize(label, data.palette), overlay(image, label, data.palette)])
        pairs = [a + b for a, b in itertools.zip_longest(rows[::2], rows[1::2], fillvalue=[])]
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet(pairs, ["image", "label", "overlay"] * 2, data.classes, data.palette).save(output)
        print(f"contact sheet: {output}")
    except (Mistake, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
