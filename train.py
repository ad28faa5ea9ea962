"""Train any method of this repository: plain PyTorch, one process or many, mixed precision on CUDA.

    python train.py                                    # CAA on synthetic images, in minutes
    python train.py --method caa --dataset camvid --data-root DIR    # any dataset, see data.py
    torchrun --nproc-per-node 8 train.py --method caa --dataset pascal_context    # as the paper did
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py …
    python train.py --output runs/caa-shapes --resume                  # go on where a run stopped

Settings are, in this order: the defaults below, the method's RECIPES for the dataset, the flags.
Each is printed and kept in config.json with where it came from. `--batch-size` is that of all
processes together.

A run's folder: config.json; log.jsonl, a line for each logged step (`step`, `lr`, `loss`, its
terms, `images_per_second`) and each evaluation (`step`, `mIoU`, `pixel_accuracy`, `class_accuracy`,
`IoU`); last.pt and best.pt (highest mIoU); curves.png; samples.png.

The same seed gives the same run: each sample's augmentation depends on (seed, position in the run),
each step's dropout on (seed, step, process), so workers, interruptions and --resume change nothing;
on the CPU bit for bit. Several processes equal one with the joint batch up to dropout, of which
each has its own, and batch norm, which is synchronized on CUDA alone. On several machines --output
must be a folder that all of them see.
"""

import argparse
import importlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR, StepLR
from torch.utils.data import DataLoader
from tqdm import tqdm

import backbones
import data
import evaluate
from data import Mistake

# name: (default, what it is); the defaults are those of the small world `shapes`, and of every
# dataset without a recipe
SETTINGS = {
    # what
    "method": ("caa", "the file METHOD.py"),
    "dataset": ("shapes", "a name of data.py: shapes, shapes+company, camvid, folder, …"),
    "data_root": (None, "the dataset's folder (datasets/NAME)"),
    "backbone": ("resnet18", ", ".join(backbones.NAMES)),
    "weights": (None, "of the backbone: none, imagenet, or the path of a state dict"),
    "output_stride": (
        None,
        "of the backbone, 32, 16, 8; hfgd: of the logits, 4, 2, 1 (the method's own)",
    ),
    "option": ({}, "an option of the method's build, may be repeated"),
    "car": (None, "car.py's losses; paper: Eq. (4.11) as printed; released: the authors' form"),
    "init": (None, "start from the weights of this checkpoint"),
    # how long, how fast
    "iterations": (140, "optimizer steps"),
    "batch_size": (8, "images a step, of all processes together"),
    "optimizer": ("sgd", "sgd, adam or adamw"),
    "lr": (0.02, "learning rate at the start"),
    "head_lr": (1.0, "multiple of lr at which what is not the backbone learns"),
    "power": (0.9, "of the decay lr · (1 - step/iterations)^power"),
    "halve_every": (
        0,
        "steps after which lr is halved, again and again, in place of that decay (0: not)",
    ),
    "momentum": (0.9, "of sgd"),
    "weight_decay": (1e-4, "L2 (decoupled with adamw)"),
    "decay_norms": (True, "false leaves the decay off norms and biases"),
    "bn_momentum": (0.1, "share of the new batch in the running statistics of batch norm"),
    # augmentation
    "crop_size": (96, "of the training crop: its side, or height and width"),
    "scale": ((0.75, 1.5), "range of the random scale"),
    "scale_step": (0.0, "grid of that scale, 0: none"),
    "base_size": (None, "longer side of an image at scale 1, in pixels (its own)"),
    "color": ("none", "none, brightness or photometric"),
    # the machine, and what is kept
    "seed": (0, "of everything random"),
    "deterministic": (False, "only deterministic kernels"),
    "workers": (2, "loader processes of each training process"),
    "amp": ("auto", "mixed precision: auto, bf16, fp16, off (auto: on CUDA)"),
    "compile": (False, "torch.compile"),
    "device": (None, "cpu, cuda, cuda:1 (a GPU if there is one)"),
    "eval_every": (None, "steps between evaluations (a tenth of the run, at least 100)"),
    "save_every": (None, "steps between checkpoints (as eval_every)"),
}
# What may differ when a run goes on: it changes no result, or rounding alone
FREE = {"workers", "device", "eval_every", "save_every", "data_root", "compile"}
WHOLE = {
    "output_stride",
    "eval_every",
    "save_every",
    "base_size",
}  # whole numbers whose default is None
AUGMENTATION = ("seed", "crop_size", "scale", "scale_step", "base_size", "color")
LOG_EVERY = 10  # steps


# ----------------------------------------------------------------------------------------- settings


def arguments(argv=None):
    """(flags that were given, output folder or None, resume)"""
    parser = argparse.ArgumentParser(
        description="Train a segmentation method; see the top of train.py."
    )
    for name, (default, what) in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        known = dict(
            default=argparse.SUPPRESS,
            help=f"{what} [{default}]" if default not in (None, {}) else what,
        )
        if name == "option":
            parser.add_argument(flag, action="append", metavar="KEY=VALUE", **known)
        elif name == "scale":
            parser.add_argument(flag, nargs=2, type=float, metavar=("LOW", "HIGH"), **known)
        elif name == "crop_size":
            parser.add_argument(flag, nargs="+", type=int, metavar="N", **known)
        elif name == "car":
            parser.add_argument(
                flag, nargs="?", const="default", choices=("default", "paper", "released"), **known
            )
        elif name == "decay_norms":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **known)
        elif isinstance(default, bool):
            parser.add_argument(flag, action="store_true", **known)
        else:
            kind = type(default) if default is not None else int if name in WHOLE else str
            choices = {
                "optimizer": ("sgd", "adam", "adamw"),
                "amp": ("auto", "bf16", "fp16", "off"),
            }.get(name)
            parser.add_argument(flag, type=kind, choices=choices, **known)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="the run's folder (runs/METHOD-DATASET, with a number where taken)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output, with its settings"
    )
    given = vars(parser.parse_args(argv))
    output, resume = given.pop("output"), given.pop("resume")
    if "option" in given:
        given["option"] = evaluate.parse_options(given["option"])
    if "crop_size" in given and len(given["crop_size"]) == 1:
        given["crop_size"] = given["crop_size"][0]
    if given.get("weights") == "none":
        given["weights"] = None
    return given, output, resume


def resolve(given):
    """(settings, where each came from): defaults, then the method's recipe, then the flags."""
    settings = {name: default for name, (default, _) in SETTINGS.items()}
    origin = dict.fromkeys(settings, "default")
    method = evaluate.method_file(given.get("method", settings["method"]))
    dataset = given.get("dataset", settings["dataset"])
    recipe = getattr(method, "RECIPES", {}).get(dataset, {})
    strange = set(recipe) - set(SETTINGS)
    if strange:
        raise Mistake(
            f"the recipe for {dataset} in {method.__name__}.py has unknown settings: "
            f"{', '.join(sorted(strange))}"
        )
    sources = (recipe, f"recipe {method.__name__}/{dataset}"), (given, "command line")
    for values, source in sources:
        for name, value in values.items():
            settings[name] = settings[name] | value if name == "option" else value
            origin[name] = source
    return completed(settings), origin


def completed(settings):
    """The settings with defaults that depend on others filled in, if all numbers are in range."""
    if settings["data_root"] is None:
        settings["data_root"] = f"datasets/{settings['dataset']}"
    for name in ("iterations", "batch_size", "eval_every", "save_every", "base_size"):
        if settings[name] is None and name != "base_size":  # eval_every, save_every
            settings[name] = max(100, math.ceil(settings["iterations"] / 10))
        evaluate.at_least(1, name.replace("_", "-"), settings[name])
    sides = settings["crop_size"]
    sides = [sides] if isinstance(sides, int) else list(sides)
    evaluate.check_sides("crop-size", sides)
    settings["crop_size"] = sides if len(sides) == 2 else sides[0]
    numbers = (
        "seed workers lr head_lr power momentum weight_decay bn_momentum scale_step halve_every"
    )
    for name in numbers.split():
        evaluate.at_least(0, name.replace("_", "-"), settings[name])
    low, high = settings["scale"] = list(settings["scale"])
    if not 0 < low <= high < float("inf"):
        raise Mistake(f"--scale {low} {high}: expected two factors above 0, the smaller one first")
    return settings


def resumed(output, given):
    """(settings, origin, checkpoint) of the run in `output`; a flag that would change its result is
    a Mistake.
    """
    if output is None:
        raise Mistake("--resume needs the run's folder: --output runs/NAME")
    path = Path(output) / "config.json"
    if not path.is_file():
        raise Mistake(
            f"nothing to resume: '{path}' is not there; expected the --output folder of an earlier "
            "run"
        )
    try:
        saved = json.loads(path.read_text())["settings"]
        settings, origin = {}, {}
        for name, (default, _) in SETTINGS.items():
            if name in saved or name == "method":
                settings[name], origin[name] = saved[name]["value"], saved[name]["from"]
            else:  # a setting that a later version added
                settings[name], origin[name] = json.loads(json.dumps(default)), "default"
    except (ValueError, KeyError, TypeError):
        raise Mistake(
            f"'{path}' is damaged; start a new run with --init {output}/last.pt"
        ) from None
    if "option" in given:  # those of the recipe need not be repeated
        given["option"] = settings["option"] | given["option"]
    given = json.loads(json.dumps(given))  # as config.json has it: lists, not tuples
    for name, value in given.items():
        if name not in FREE and value != settings[name]:
            raise Mistake(
                f"--{name.replace('_', '-')} {value} differs from this run's {settings[name]}; "
                "leave it out, "
                f"or start a new run with --init {output}/last.pt"
            )
        if value != settings[name]:
            settings[name], origin[name] = value, "command line"
    last = Path(output) / "last.pt"
    return completed(settings), origin, evaluate.read_checkpoint(last) if last.exists() else None


def new_folder(output, settings):
    """The folder of a new run; a Mistake where the one asked for holds a run already."""
    if output is not None:
        if (Path(output) / "config.json").exists():
            raise Mistake(
                f"'{output}' holds a run already; add --resume to go on with it, or take another "
                "--output"
            )
        return Path(output)
    name = f"runs/{settings['method']}-{settings['dataset']}"
    number = 1
    while Path(folder := name if number == 1 else f"{name}-{number}").exists():
        number += 1
    return Path(folder)


def write_config(folder, settings, origin, device, world):
    """config.json, and the same to read on the screen."""
    packages = {
        name: importlib.import_module(name).__version__
        for name in ("torch", "torchvision", "numpy", "PIL")
    }
    try:
        command = ["git", "describe", "--always", "--dirty"]
        git = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:
        git = None  # no git on this machine
    config = {
        "settings": {
            name: {"value": value, "from": origin[name]} for name, value in settings.items()
        },
        "versions": packages | {"python": platform.python_version(), "cuda": torch.version.cuda},
        "git": git or None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": world,
    }
    replace(
        folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=1) + "\n")
    )
    for name, value in settings.items():
        print(f"  {name:<14} {value!s:<28} {origin[name]}")


# ----------------------------------------------------------------------------------- files of a run


def replace(path, write):
    """Write under a temporary name, then rename: whoever reads `path` finds the old file or the new
    one, never a part.
    """
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


def read_log(folder):
    """The lines of log.jsonl; one that was cut short by a kill is left out."""
    path, lines = folder / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def rewind_log(folder, step, evaluated):
    """Drop what a run logged after its last checkpoint: it will be logged again."""
    kept = [
        line for line in read_log(folder) if line["step"] <= (evaluated if "mIoU" in line else step)
    ]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    replace(folder / "log.jsonl", lambda path: path.write_text(text))


def append_log(folder, **line):
    """One more line of log.jsonl."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def draw_curves(folder):
    """curves.png: the loss and its terms, the learning rate, and mIoU, pixel and class accuracy,
    over the steps.
    """
    log = read_log(folder)
    steps, results = (
        [line for line in log if "loss" in line],
        [line for line in log if "mIoU" in line],
    )
    terms = [
        name
        for name in (steps[0] if steps else {})
        if name not in ("step", "lr", "images_per_second")
    ]
    panels = [
        ("loss", {name: [(line["step"], line[name]) for line in steps] for name in terms}),
        ("learning rate", {"lr": [(line["step"], line["lr"]) for line in steps]}),
        (
            "validation",
            {
                n: [(line["step"], line[n]) for line in results]
                for n in ("mIoU", "pixel_accuracy", "class_accuracy")
            },
        ),
    ]
    picture = Image.new("RGB", (480 * len(panels), 340), "white")
    for i, (title, series) in enumerate(panels):
        picture.paste(_panel(title, series), (480 * i, 0))
    replace(folder / "curves.png", lambda path: picture.save(path, format="png"))


def _panel(title, series, width=480, height=340):
    # drawn at twice the size, for smooth lines
    picture = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(24)
    left, top, right, bottom = 120, 30 * len(series) + 40, 2 * width - 40, 2 * height - 60
    draw.text((left, 16), title, "black", font)
    series = {
        name: [point for point in line if math.isfinite(point[1])] for name, line in series.items()
    }
    points = [point for line in series.values() for point in line]
    (x_step, x_end), (y_step, y_end) = (
        _ticks(max((abs(point[i]) for point in points), default=0)) for i in (0, 1)
    )
    y_start = -y_end if any(y < 0 for _, y in points) else 0

    def place(x, y):
        return left + (right - left) * x / x_end, bottom - (bottom - top) * (y - y_start) / (
            y_end - y_start
        )

    for i in range(round(y_start / y_step), round(y_end / y_step) + 1):
        x, y = place(0, i * y_step)
        draw.line((x, y, right, y), "#dddddd", 2)
        draw.text((x - 12, y), f"{i * y_step:.4g}", "black", font, anchor="rm")
    for i in range(round(x_end / x_step) + 1):
        x, y = place(i * x_step, y_start)
        draw.text((x, y + 14), f"{i * x_step:g}", "black", font, anchor="mt")
    colors = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf")
    for i, (name, line) in enumerate(series.items()):
        color, corners = colors[i % len(colors)], [place(*point) for point in line]
        draw.line(corners, color, 4, joint="curve")
        for x, y in corners if len(corners) < 30 else []:
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), color)
        last = f"  {line[-1][1]:.3g}" if line else ""
        draw.text((right, 16 + 30 * i), f"{name.replace('_', ' ')}{last}", color, font, anchor="ra")
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _ticks(highest):
    """(distance, end) of round ticks from 0 to at least `highest`, at most six of them."""
    power = 10.0 ** math.floor(math.log10(highest or 1))
    distance = next(d * power for d in (0.2, 0.5, 1, 2) if highest <= 5 * d * power)
    return distance, distance * max(1, math.ceil(highest / distance - 1e-9))


def draw_samples(folder, net, dataset, device, amp, count=4):
    """samples.png: image, truth, prediction of a few validation images, evenly spread."""
    rows = []
    for index in sorted({i * len(dataset) // count for i in range(count)}):
        image, truth = dataset[index]
        prediction = evaluate.label_map(net, image, device, amp)
        rows.append([image, *(data.colorize(y, dataset.palette) for y in (truth, prediction))])
    picture = data.sheet(rows, ["image", "truth", "prediction"], dataset.classes, dataset.palette)
    replace(folder / "samples.png", lambda path: picture.save(path, format="png"))


# ----------------------------------------------------------------------------------------- training


def make_optimizer(net, s):
    """SGD, Adam or AdamW.

    With decay_norms=False what has one dimension (norms, biases) is not decayed. What is not in
    net.backbone learns at head_lr · lr.
    """
    parts = [(list(net.parameters()), s["lr"])]
    if s["head_lr"] != 1:
        if not hasattr(net, "backbone"):
            raise Mistake(f"--head-lr: {s['method']} has no part named backbone; leave it out")
        inside = set(net.backbone.parameters())
        head = [p for p in net.parameters() if p not in inside]
        parts = [(list(net.backbone.parameters()), s["lr"]), (head, s["head_lr"] * s["lr"])]
    groups = []
    for parameters, lr in parts:
        decayed = [p for p in parameters if p.ndim > 1 or s["decay_norms"]]
        groups.append({"params": decayed, "lr": lr})
        if not s["decay_norms"]:
            rest = [p for p in parameters if p.ndim <= 1]
            groups.append({"params": rest, "lr": lr, "weight_decay": 0.0})
    if s["optimizer"] == "sgd":
        return torch.optim.SGD(
            groups, s["lr"], momentum=s["momentum"], weight_decay=s["weight_decay"]
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s["optimizer"]]
    return kind(groups, s["lr"], weight_decay=s["weight_decay"])


def initialise(net, path):
    """--init: every tensor of the checkpoint that fits; a line says which do not (a classifier of
    other classes, say).
    """
    saved, own = evaluate.read_checkpoint(path)["net"], net.state_dict()
    fitting = {
        name: value
        for name, value in saved.items()
        if name in own and own[name].shape == value.shape
    }
    if not fitting:
        raise Mistake(
            f"nothing in '{path}' fits this network; expected a checkpoint of the same method and "
            "backbone"
        )
    net.load_state_dict(fitting, strict=False)
    left = [name for name in own if name not in fitting]
    return f"{len(fitting)} of {len(own)} tensors from {path}" + (
        f"; as new: {', '.join(left)}" if left else ""
    )


class Stop:
    """Remembers, while it is entered, that SIGINT or SIGTERM came; a second Ctrl-C ends the process
    at once.

    A second SIGTERM does not: launchers send it both to torchrun and, through that, to its
    processes.
    """

    def __enter__(self):
        self.signal = None
        self.before = {
            number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __call__(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def mean_over_processes(values, device):
    """The numbers, each the mean over all processes: one exchange, one wait for the device."""
    values = torch.stack(
        [torch.as_tensor(value, dtype=torch.float32, device=device).detach() for value in values]
    )
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


class State:
    """All that the next step reads, and so all that a checkpoint holds: the random numbers come
    from (seed, step).
    """

    def __init__(self, net, s, folder, device, rank):
        self.net, self.settings, self.folder, self.device, self.rank = net, s, folder, device, rank
        self.optimizer = make_optimizer(net, s)
        if s["halve_every"]:
            self.schedule = StepLR(self.optimizer, s["halve_every"], 0.5)
        else:
            self.schedule = PolynomialLR(self.optimizer, s["iterations"], s["power"])
        fp16 = evaluate.amp_dtype(s["amp"], device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.step, self.evaluated, self.best = 0, 0, -1.0

    def load(self, checkpoint):
        evaluate.restore(self.net, checkpoint)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        if checkpoint["scaler"]:  # empty where the run had no fp16 until now
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.evaluated, self.best = (
            checkpoint[name] for name in ("step", "evaluated", "best")
        )

    def save(self, name, dataset):
        """Write the checkpoint `name`, but never one whose weights are not finite."""
        state = {
            part: getattr(self, part).state_dict()
            for part in ("net", "optimizer", "schedule", "scaler")
        }
        broken = [key for key, value in state["net"].items() if not value.isfinite().all()]
        if broken:
            raise Mistake(
                f"weights are not finite after step {self.step} ({broken[0]} and {len(broken) - 1} "
                "more); "
                f"{self.kept()}; try a lower --lr, or --amp off"
            )
        state |= dict(
            step=self.step, evaluated=self.evaluated, best=self.best, settings=self.settings
        )
        state |= dict(classes=dataset.classes, palette=[list(color) for color in dataset.palette])
        state |= dict(raw_ids=getattr(dataset, "raw_ids", None))
        replace(self.folder / name, lambda temporary: torch.save(state, temporary))

    def kept(self):
        """What is left of the run, in words."""
        last = self.folder / "last.pt"
        return f"{last} is from before" if last.exists() else "no checkpoint was written yet"


def make_net(s, num_classes, resumes, device, world):
    """(the network on its device, a line about the weights it starts from or None)."""
    torch.manual_seed(s["seed"])
    weights = None if resumes or s["init"] else s["weights"]
    net = evaluate.network(
        s["method"], num_classes, s["backbone"], weights, s["output_stride"], s["option"]
    )
    note = initialise(net, s["init"]) if s["init"] and not resumes else None
    if world > 1 and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = s["bn_momentum"]
    # the faster layout for convolutions, on CPU and CUDA alike
    return net.to(device, memory_format=torch.channels_last), note


def regularized(net, s, num_classes, rank):
    """--car: the terms of car.py join in training; what is saved and evaluated is `net`."""
    form = {"paper": {"literal": True}, "released": {"released": True}}.get(s["car"], {})
    try:
        model = evaluate.method_file("car").regularize(net, "classifier", num_classes, **form)
    except ValueError as error:
        raise Mistake(f"--car: {error}") from error
    if rank == 0 and not hasattr(net, "regularized"):
        print("--car acts on what enters .classifier, because the network names no .regularized")
    return model


def run(given, output, resume):
    """One run, from its first step or its last checkpoint to its end. Returns the exit status."""
    if resume:
        s, origin, checkpoint = resumed(output, given)
        folder = Path(output)
    else:
        (s, origin), checkpoint = resolve(given), None
        # before the processes meet: none may see what another one made
        folder = new_folder(output, s)
    if s["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not s["deterministic"]
    device, rank, world = evaluate.processes(s["device"])
    augmentation = {name: s[name] for name in AUGMENTATION}
    train_set = data.dataset(s["dataset"], s["data_root"], "train", train=True, **augmentation)
    val_set = data.dataset(s["dataset"], s["data_root"], "val")

    net, note = make_net(s, train_set.num_classes, checkpoint is not None, device, world)
    state = State(net, s, folder, device, rank)
    if checkpoint:
        state.load(checkpoint)
        del checkpoint
    sampler = data.PositionSampler(
        len(train_set), s["batch_size"], state.step, s["iterations"], s["seed"], rank, world
    )
    loader = DataLoader(
        train_set,
        batch_sampler=sampler,
        num_workers=s["workers"],
        collate_fn=data.collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=evaluate.own_session,
    )
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, s, origin, device, world)
        parameters = sum(p.numel() for p in net.parameters()) / 1e6
        print(
            f"{parameters:.2f} M parameters, {len(train_set)} training images, {world} x "
            f"{device.type}, {folder}"
        )
        if note:
            print(note)
        if resume:
            rewind_log(folder, state.step, state.evaluated)
            print(f"goes on after step {state.step} of {s['iterations']}")

    model = regularized(net, s, train_set.num_classes, rank) if s["car"] else net
    if world > 1:
        # Some weights never learn, as the norms of finer maps that nothing reads: a static graph
        # finds out which, once (torch.compile cannot have one).
        how = dict(find_unused_parameters=True) if s["compile"] else dict(static_graph=True)
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, **how
        )
    if s["compile"]:
        model = torch.compile(model)
    how = dict(total=s["iterations"], initial=state.step, desc="training", unit="step")
    with Stop() as stop, tqdm(**how, disable=rank > 0 or None) as bar:
        stopped = loop(model, state, iter(loader), train_set, val_set, stop, bar)
    if rank == 0 and stopped:
        again = f"--output {shlex.quote(str(folder))} --resume"
        print(
            f"stopped after step {state.step}, checkpoint saved; go on with: python train.py "
            f"{again}"
        )
    elif rank == 0:
        results = [line for line in read_log(folder) if "mIoU" in line]
        print(evaluate.table(results[-1], val_set.classes) if results else "log.jsonl is gone")
        print(
            f"best mIoU {state.best:.4f}; in {folder}: samples.png, curves.png, log.jsonl, "
            "last.pt, best.pt"
        )
    return 128 + (stop.signal or signal.SIGTERM) if stopped else 0


def loop(model, state, batches, train_set, val_set, stop, bar):
    """The steps that are left, with evaluations, log and checkpoints. Returns whether a signal
    ended them.
    """
    s, stopped, sums, since = state.settings, False, {}, time.perf_counter()
    while True:
        last = state.step == s["iterations"]
        if (
            (last or (state.step and state.step % s["eval_every"] == 0))
            and state.evaluated < state.step
            and not stopped
        ):
            stopped = validate(state, train_set, val_set, stop)
            since = time.perf_counter()
        if state.rank == 0 and (
            stopped or last or (state.step and state.step % s["save_every"] == 0)
        ):
            state.save("last.pt", train_set)
        if stopped or last:
            # no process leaves before the checkpoint is written
            mean_over_processes([0.0], state.device)
            return stopped

        lr = state.schedule.get_last_lr()[0]
        losses, stopped = train_step(model, state, *next(batches), stop)
        bar.update()
        for name, value in losses.items():
            sums.setdefault(name, []).append(value)
        if state.step % LOG_EVERY == 0 or state.step == s["iterations"]:
            means = {name: sum(line) / len(line) for name, line in sums.items()}
            speed = s["batch_size"] * len(next(iter(sums.values()))) / (time.perf_counter() - since)
            sums, since = {}, time.perf_counter()
            loss = sum(means.values())
            text = f"loss {loss:.4f} lr {lr:.2e} {speed:.1f} img/s"
            bar.set_postfix_str(text)
            if state.rank == 0:
                append_log(
                    state.folder,
                    step=state.step,
                    lr=lr,
                    loss=loss,
                    **means,
                    images_per_second=round(speed, 2),
                )
                if bar.disable:  # no terminal: a plain line instead of the bar
                    left = (s["iterations"] - state.step) * s["batch_size"] / speed
                    print(
                        f"step {state.step}/{s['iterations']} {text}, {left / 60:.1f} min left",
                        flush=True,
                    )


def train_step(model, state, images, labels, stop):
    """One step of the optimizer. Returns (each loss, the mean over the processes; whether any
    process was told to stop).
    """
    s, device = state.settings, state.device
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    images, labels = data.normalise(images), labels.to(device, non_blocking=True).long()
    torch.manual_seed(data.seed_of(s["seed"], state.step, state.rank))
    state.optimizer.zero_grad(set_to_none=True)
    model.train()
    with evaluate.autocast(device, s["amp"]):
        losses = model(images, labels)
    state.scaler.scale(sum(losses.values())).backward()
    *values, stopped = mean_over_processes([*losses.values(), stop.signal or 0], device)
    losses = dict(zip(losses, values))
    if not all(map(math.isfinite, values)):
        terms = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        raise Mistake(
            f"the loss is not finite after step {state.step} ({terms}); {state.kept()}; try a "
            "lower --lr, or --amp off"
        )
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.schedule.step()
    state.step += 1
    return losses, stopped > 0


def validate(state, train_set, val_set, stop):
    """Evaluate, log, draw, keep the best. Returns whether any process was told to stop: then
    nothing is recorded.
    """
    s, net, device, folder = state.settings, state.net, state.device, state.folder
    net.eval()
    if dist.is_initialized():
        # batch norm's statistics, each process's own on the CPU: all evaluate one network
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    result = evaluate.evaluate(
        net, val_set, device, s["amp"], s["workers"], stopped=lambda: stop.signal is not None
    )
    if mean_over_processes([stop.signal or 0], device)[0] > 0:
        return True
    state.evaluated = state.step
    better = result["mIoU"] > state.best
    if better:
        state.best = result["mIoU"]
    if state.rank == 0:
        append_log(folder, step=state.step, **result)
        draw_curves(folder)
        draw_samples(folder, net, val_set, device, s["amp"])
        tqdm.write(
            f"step {state.step}: mIoU {result['mIoU']:.4f}, pixel accuracy "
            f"{result['pixel_accuracy']:.4f}"
        )
        if better:
            state.save("best.pt", train_set)
    return False


def main(argv=None):
    """Exit status 0; 2 after a mistake, explained in a line; 130 or 143 after Ctrl-C or SIGTERM."""
    return evaluate.guarded("train.py", lambda: run(*arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
