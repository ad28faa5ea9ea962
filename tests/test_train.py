import contextlib
import gc
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_group, without_posix
from PIL import Image
from torch import nn

import data
import evaluate
import train
from data import UserError

pytestmark = pytest.mark.system

METHOD = """
import os
import time

import torch
from torch import nn
import backbones

RECIPES = {"folder": dict(iterations=6, lr=0.3, batch_size=4, crop_size=24, option={"width": 3})}


class Net(nn.Module):
    # no batch norm: two processes must equal one
    def __init__(
        self, num_classes, *, width=4, drop=0.5, fail_at=None, norm=False, name="classifier",
        pair=(), idle=False, free=False
    ):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, width, 3, padding=1), nn.Dropout(drop)
        self.fail_at, self.calls = fail_at, 0
        self.name = name
        setattr(self, name, nn.Conv2d(width, num_classes, 1))
        self.norm = nn.BatchNorm2d(width) if norm else None
        self.idle = nn.Parameter(torch.ones(2), requires_grad=free) if idle else None

    def forward(self, images, labels=None):
        x = self.conv(images).relu()
        if self.norm is not None:
            x = x + self.norm(x.mean((2, 3), keepdim=True))
        logits = getattr(self, self.name)(self.drop(x))
        if labels is None:
            return logits
        self.calls += 1
        if self.calls > int(os.environ.get("SLOW_FROM", 10**9)):
            time.sleep(0.05)
        loss = backbones.pixel_cross_entropy(logits, labels)
        factor = float("nan") if self.calls == self.fail_at else 0.5
        return {"pixels": loss, "extra": loss * factor}


def build(num_classes, backbone="resnet18", *, weights=None, **options):
    return Net(num_classes, **backbones.check_options(Net, options))
"""


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    """A student's method: one file, nothing registered."""
    folder = tmp_path_factory.mktemp("method")
    (folder / "my_method.py").write_text(METHOD)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def flags(method, photos):
    return (
        f"--method my_method --dataset folder --data-root {photos} --device cpu --workers 0".split()
    )


def weights(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)["net"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start(arguments, method, processes=1, **how):
    """train.py as a user starts it, its output going to pipes."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    environment = os.environ | {
        "PYTHONPATH": str(method),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "SLOW_FROM": "30",  # so that a run lasts until a test ends it
    }
    command = [sys.executable, *launcher, train.__file__, *arguments]
    how = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | how
    # Tests in the background of a shell ignore SIGINT; a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, **how)
    finally:
        signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------- settings


def test_settings_are_defaults_then_recipe_then_flags(flags):
    given, output, resume = train.arguments([*flags, "--lr", "0.5", "--option", "drop=0.1"])
    settings, origin = train.resolve(given)
    assert (output, resume) == (None, False)
    assert (settings["momentum"], origin["momentum"]) == (0.9, "default")
    assert (settings["iterations"], origin["iterations"]) == (6, "recipe my_method/folder")
    assert (settings["lr"], origin["lr"]) == (0.5, "command line")
    assert settings["option"] == {
        "width": 3,
        "drop": 0.1,
    }  # the recipe's options and the command line's


def test_the_papers_recipe_is_taken():
    settings, origin = train.resolve({"method": "caa", "dataset": "cityscapes"})
    assert (
        settings["crop_size"],
        settings["batch_size"],
        settings["iterations"],
        settings["lr"],
    ) == (769, 8, 80_000, 0.01)
    assert (
        origin["crop_size"] == "recipe caa/cityscapes"
        and settings["data_root"] == "datasets/cityscapes"
    )


def test_every_recipe_names_known_settings_only():
    for method in ("caa", "ksac", "car", "spgnet", "pyramid_fuse", "hfgd"):
        for dataset in evaluate.method_file(method).RECIPES:
            settings, origin = train.resolve({"method": method, "dataset": dataset})
            assert f"recipe {method}/{dataset}" in origin.values()


def test_the_recipe_of_shapes_holds_for_its_switches():
    plain, _ = train.resolve({"method": "caa", "dataset": "shapes"})
    switched, origin = train.resolve({"method": "caa", "dataset": "shapes+form+thin"})
    assert origin["option"] == "recipe caa/shapes" and switched["dataset"] == "shapes+form+thin"
    assert (plain["optimizer"], plain["iterations"], origin["iterations"]) == (
        "adamw",
        340,
        "shapes",
    )
    names = {"dataset": 0, "data_root": 0}
    assert plain | names == switched | names


def test_what_shapes_sets_holds_for_a_method_without_a_recipe_and_without_a_backbone(method):
    command = ["--method", "my_method", "--dataset", "shapes", "--head-lr", "3"]
    settings, origin = train.resolve(train.arguments(command[:-2])[0])
    assert (settings["lr"], origin["lr"], settings["head_lr"]) == (5e-4, "shapes", 4.0)
    net = evaluate.network("my_method", 3, "none")
    train.State(net, settings, origin, torch.device("cpu"), 0)
    assert settings["head_lr"] == 1.0  # the method names no backbone
    assert origin["head_lr"] == "no backbone"
    settings, origin = train.resolve(train.arguments(command)[0])
    with pytest.raises(evaluate.UserError, match="--head-lr: my_method has no part named backbone"):
        train.State(net, settings, origin, torch.device("cpu"), 0)


@pytest.mark.parametrize("name", ["caa", "ksac", "car", "spgnet", "pyramid_fuse", "hfgd"])
def test_the_first_run_of_each_method_has_settings_of_shapes(name):
    settings, origin = train.resolve({"method": name})
    assert f"recipe {name}/shapes" in origin.values() and settings["optimizer"] == "adamw"
    parts = settings["backbone"], None, settings["output_stride"], settings["option"]
    net = evaluate.network(name, 12, *parts)
    optimizer = train.State(net, settings, origin, torch.device("cpu"), 0).optimizer
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {settings["lr"], settings["lr"] * settings["head_lr"]}
    losses = net(torch.randn(2, 3, 96, 96), torch.randint(12, (2, 96, 96)))
    assert sum(losses.values()).isfinite()


def test_norms_and_biases_are_left_out_of_the_decay_only_where_asked(flags):
    settings, _ = train.resolve(train.arguments(flags)[0])
    net = evaluate.network("my_method", 3, "none")
    (whole,) = train.make_optimizer(net, settings).param_groups
    assert len(whole["params"]) == 4
    decayed, free = train.make_optimizer(net, settings | {"decay_norms": False}).param_groups
    assert [p.ndim for p in decayed["params"]] == [4, 4] and decayed["weight_decay"] == 1e-4
    assert [p.ndim for p in free["params"]] == [1, 1] and free["weight_decay"] == 0
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        assert type(train.make_optimizer(net, settings | {"optimizer": name})) is kind


def test_what_is_not_the_backbone_learns_at_a_multiple(flags):
    settings, _ = train.resolve(train.arguments([*flags, "--lr", "0.2", "--head-lr", "10"])[0])
    net = nn.Module()
    net.backbone, net.head = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    groups = train.make_optimizer(net, settings).param_groups
    assert [(g["params"], g["lr"]) for g in groups] == [
        (list(net.backbone.parameters()), 0.2),
        (list(net.head.parameters()), 2.0),
    ]
    state = train.State(net, settings, {}, torch.device("cpu"), 0)
    state.optimizer.step()
    state.schedule.step()
    first, second = state.schedule.get_last_lr()
    assert second == pytest.approx(10 * first) and first < 0.2
    groups = train.make_optimizer(net, settings | {"decay_norms": False}).param_groups
    rates = [(g["lr"], g["weight_decay"], g["params"][0].ndim) for g in groups]
    assert rates == [(0.2, 1e-4, 4), (0.2, 0.0, 1), (2.0, 1e-4, 4), (2.0, 0.0, 1)]
    with pytest.raises(UserError, match="--head-lr: my_method has no part named backbone"):
        train.make_optimizer(nn.Conv2d(1, 1, 1), settings)


def test_spgnets_encoders_are_its_backbone_and_keep_their_names(flags):
    settings, _ = train.resolve({"method": "spgnet", "dataset": "shapes", "head_lr": 4.0})
    net = evaluate.network("spgnet", 3, "resnet18", options={"channels": 16})
    assert train.resolve({"method": "spgnet"})[0]["head_lr"] == 1.0  # that of docs/results.md
    slow, fast = train.make_optimizer(net, settings).param_groups
    assert fast["lr"] == 4 * slow["lr"]
    inside = ("stages.0.stem.", "stages.0.levels.", "stages.1.levels.")
    names = {id(p): name for name, p in net.named_parameters()}
    assert len(slow["params"]) + len(fast["params"]) == len(names)
    assert all(names[id(p)].startswith(inside) for p in slow["params"])
    assert not any(names[id(p)].startswith(inside) for p in fast["params"])


def test_learning_rate_falls_as_the_recipe_says(flags):
    settings, _ = train.resolve(train.arguments([*flags, "--iterations", "10", "--lr", "0.8"])[0])

    def rates(**changes):
        state = train.State(nn.Conv2d(1, 1, 1), settings | changes, {}, torch.device("cpu"), 0)
        found = []
        for _ in range(10):
            found += state.schedule.get_last_lr()
            state.optimizer.step()
            state.schedule.step()
        return found

    assert rates() == pytest.approx([0.8 * (1 - step / 10) ** 0.9 for step in range(10)])
    assert rates(halve_every=4) == pytest.approx([0.8] * 4 + [0.4] * 4 + [0.2] * 2)


# --------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_what_the_docstring_says(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    assert (
        train.main([*flags, "--iterations", "25", "--eval-every", "10", "--output", str(folder)])
        == 0
    )
    out = capsys.readouterr().out
    assert "recipe my_method/folder" in out and "command line" in out and "best mIoU" in out
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["iterations"] == {"value": 25, "from": "command line"}
    assert config["settings"]["lr"] == {"value": 0.3, "from": "recipe my_method/folder"}
    assert config["versions"]["torch"] == torch.__version__
    log = train.read_log(folder)
    assert [line["step"] for line in log if "loss" in line] == [10, 20, 25]
    assert [line["step"] for line in log if "mIoU" in line] == [10, 20, 25]
    for line in log:
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["pixels"] + line["extra"])
            assert line["extra"] == pytest.approx(line["pixels"] / 2)
            assert line["lr"] == pytest.approx(0.3 * (1 - (line["step"] - 1) / 25) ** 0.9)
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["best"] == max(line["mIoU"] for line in log if "mIoU" in line)
    assert best["best"] > 0.7  # dark or bright: this network can tell
    assert Image.open(folder / "curves.png").size == (1440, 340)
    assert Image.open(folder / "samples.png").width > 3 * 240
    assert not list(folder.glob("*.part"))


def test_images_per_second_is_of_training_alone(flags, tmp_path, monkeypatch):
    clock = [0.0]

    def taking(function, seconds):
        def slow(*arguments):
            clock[0] += seconds
            return function(*arguments)

        return slow

    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train, "train_step", taking(train.train_step, 0.5))
    monkeypatch.setattr(train, "validate", taking(train.validate, 1000))
    monkeypatch.setattr(train.State, "save", taking(train.State.save, 1000))
    given = [*flags, "--iterations", "40", "--eval-every", "24", "--save-every", "24"]
    step = train.train_step

    def terminated(model, state, *rest):
        if state.step == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        step(model, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", terminated)
        assert train.main([*given, "--output", str(tmp_path / "a")]) == 128 + signal.SIGTERM
    assert train.main(["--output", str(tmp_path / "a"), "--resume"]) == 0
    log = [line for line in train.read_log(tmp_path / "a") if "loss" in line]
    assert [line["images_per_second"] for line in log] == [4 / 0.5] * 4


def test_losses_are_looked_at_where_they_are_logged_or_a_file_follows(flags, tmp_path, monkeypatch):
    # Each look waits for a GPU.
    looks, look = [], train.look_at_losses

    def counted(state):
        looks.append((state.step, len(state.recent)))
        look(state)

    monkeypatch.setattr(train, "look_at_losses", counted)
    given = [*flags, "--iterations", "25", "--eval-every", "25", "--save-every", "12"]
    assert train.main([*given, "--output", str(tmp_path / "a")]) == 0
    assert looks == [(1, 1), (10, 9), (12, 2), (20, 8), (24, 4), (25, 1)]


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(flags, tmp_path, monkeypatch):
    logs, step = [], train.train_step

    def terminated(model, state, *rest):
        if state.step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, state, *rest)

    for name in ("whole", "parts"):
        given = [*flags, "--iterations", "25", "--output", str(tmp_path / name)]
        with monkeypatch.context() as patch:
            if name == "parts":
                patch.setattr(train, "train_step", terminated)
            train.main(given)
        train.main(["--output", str(tmp_path / name), "--resume"])
        log = train.read_log(tmp_path / name)
        logs.append([{**line, "images_per_second": 0} for line in log])
    assert logs[0] == logs[1]


def test_last_pt_is_read_after_the_lock_is_taken(flags, tmp_path, monkeypatch, capsys):
    # Another run of this folder may have ended, and written its last checkpoint, before that.
    folder, lock = tmp_path / "run", train.lock_folder
    assert train.main([*flags, "--output", str(folder)]) == 0
    ended = (folder / "last.pt").read_bytes()
    torch.save(torch.load(folder / "last.pt") | {"step": 2}, folder / "last.pt")

    def late(*arguments):
        (folder / "last.pt").write_bytes(ended)
        return lock(*arguments)

    monkeypatch.setattr(train, "lock_folder", late)
    assert train.main(["--output", str(folder), "--resume"]) == 0
    assert "goes on after step 6 of 6" in capsys.readouterr().out


def test_a_step_that_float16_skips_does_not_move_the_learning_rate(
    flags, tmp_path, monkeypatch, recwarn
):
    monkeypatch.setattr(evaluate, "amp_dtype", lambda amp, device: torch.float16)
    monkeypatch.setattr(evaluate, "autocast", lambda device, amp: contextlib.nullcontext())
    step = train.train_step

    def overflowing(model, state, *rest):
        hook = model.conv.weight.register_hook(lambda g: g * (math.inf if state.step < 3 else 1))
        step(model, state, *rest)
        hook.remove()

    monkeypatch.setattr(train, "train_step", overflowing)
    given = [*flags, "--iterations", "10", "--output", str(tmp_path / "a")]
    assert train.main(given) == 0
    (line,) = [line for line in train.read_log(tmp_path / "a") if "loss" in line]
    assert line["lr"] == pytest.approx(0.3 * (1 - 6 / 10) ** 0.9)  # the tenth step is the seventh
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_trainval_trains_on_val_too_and_says_so(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*flags, "--train-split", "trainval", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "9 training images" in out and "val is trained on too" in out
    given = ["--checkpoint", str(folder / "last.pt"), "--device", "cpu", "--workers", "0"]
    assert evaluate.main(given) == 0
    assert "warning: val was trained on" in capsys.readouterr().err


def test_workers_and_evaluations_change_nothing(flags, tmp_path):
    assert train.main([*flags, "--output", str(tmp_path / "a")]) == 0
    assert (
        train.main([*flags, "--output", str(tmp_path / "b"), "--workers", "2", "--eval-every", "2"])
        == 0
    )
    assert train.main([*flags, "--output", str(tmp_path / "c"), "--seed", "1"]) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_says_how_to_go_on_and_the_resumed_run_is_the_same(
    flags, tmp_path, monkeypatch, capsys, name
):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*flags, "--eval-every", "2"]
    assert train.main([*flags, "--output", str(whole)]) == 0
    step = train.train_step

    def terminated(model, state, *rest):
        if state.step == 3:
            os.kill(os.getpid(), number)
        return step(model, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", terminated)
        assert train.main([*flags, "--output", str(parts)]) == 128 + number
    assert (
        f"stopped after step 4, checkpoint saved; go on with: python train.py --output {parts} "
        "--resume" in capsys.readouterr().out
    )
    assert torch.load(parts / "last.pt", weights_only=True)["step"] == 4
    assert train.main(["--output", str(parts), "--resume"]) == 0
    assert same(weights(whole), weights(parts)) and same(
        weights(whole, "best.pt"), weights(parts, "best.pt")
    )
    speedless = [
        [{**line, "images_per_second": 0} for line in train.read_log(folder)]
        for folder in (whole, parts)
    ]
    assert [line for line in speedless[0] if "mIoU" in line] == [
        line for line in speedless[1] if "mIoU" in line
    ]
    assert signal.getsignal(number) is signal.SIG_DFL  # as it was before the run
    signal.signal(number, before)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_whole_group_saves_too(flags, method, tmp_path, capsys, processes):
    # `timeout`, torchrun and job schedulers signal every process of a group, the loaders' workers
    # among them
    folder = tmp_path / "run"
    flags = [*flags, "--iterations", "100000", "--workers", "2", "--output", str(folder)]
    process = start(flags, method, processes, start_new_session=True)
    while not (folder / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    # The folder is the run's: no other may take it.
    assert "belongs to a run that is training now" in mistake(capsys, *flags)
    resume = mistake(capsys, "--output", str(folder), "--resume")
    assert "belongs to a run that is training now" in resume or "nothing to resume" in resume
    if processes == 1:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    out, err = process.communicate(timeout=600)
    assert "checkpoint saved; go on with: " in out, err
    assert process.returncode == (143 if processes == 1 else 1)  # torchrun has a status of its own
    assert torch.load(folder / "last.pt", weights_only=True)["step"] >= train.LOG_EVERY


def children(process):
    """The ids of the processes that it started, its loaders."""
    folder = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in folder.read_text().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_every_process_saves_too(flags, method, tmp_path, name):
    # as the end of a container, SLURM's --signal and Ctrl-C send it
    folder, number = tmp_path / "run", getattr(signal, name)
    flags = [*flags, "--iterations", "100000", "--workers", "2", "--output", str(folder)]
    process = start(flags, method)
    while not (folder / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    loaders = children(process)
    assert len(loaders) == 2
    for each in (*loaders, process.pid, *loaders):
        os.kill(each, number)
    out, err = process.communicate(timeout=600)
    assert "checkpoint saved; go on with: " in out, err
    assert process.returncode == 128 + number
    assert torch.load(folder / "last.pt", weights_only=True)["step"] >= train.LOG_EVERY
    for loader in loaders:  # they end with it
        with pytest.raises(ProcessLookupError):
            os.kill(loader, 0)


def test_output_that_nobody_reads_and_closed_streams_end_nothing(flags, method, tmp_path):
    # evaluate.py and data.py go through the same `guarded`
    environment = os.environ | {"PYTHONPATH": str(method), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, train.__file__, *flags, "--output"]
    how = dict(cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*command, "a"], stdout=writing, text=True, **how)
    os.close(writing)
    assert done.returncode == 0 and "the output cannot be written (Broken pipe)" in done.stderr
    done = subprocess.run(shlex.join([*command, "b"]) + " 2>&-", shell=True, **how)
    assert done.returncode == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_loader_process_that_was_killed_is_told_at_any_moment(capsys, monkeypatch):
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    explained, calls = data._explained, []

    def interrupted(error):
        calls.append(error)
        if len(calls) == 1:  # PyTorch's handler of SIGCHLD raises
            raise killed
        return explained(error)

    def lost():
        raise ConnectionResetError(104, "Connection reset by peer")

    assert data.guarded("x.py", lost) == 2
    assert "x.py: a loader process was killed" in capsys.readouterr().err
    monkeypatch.setattr(data, "_explained", interrupted)
    assert data.guarded("x.py", lost) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "a loader process was killed" in lines[0]


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(flags, method, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [
        *flags,
        "--iterations",
        "200",
        "--save-every",
        "20",
        "--eval-every",
        "100",
        "--workers",
        "1",
    ]
    assert train.main([*flags, "--output", str(whole)]) == 0
    process = start([*flags, "--output", str(parts)], method)
    while not (parts / "last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < torch.load(parts / "last.pt", weights_only=True)["step"] < 200
    (parts / "log.jsonl").open("a").write('{"step": 9')  # a line that the kill cut short
    assert train.main(["--output", str(parts), "--resume"]) == 0
    assert same(weights(whole), weights(parts))
    logs = [
        [(line["step"], line.get("loss"), line.get("mIoU")) for line in train.read_log(folder)]
        for folder in (whole, parts)
    ]
    assert logs[0][-1] == logs[1][-1]
    assert len(logs[0]) == len(logs[1])


def test_two_processes_equal_one_with_the_joint_batch(flags, method, tmp_path, two_processes):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [
        *flags,
        "--option",
        "drop=0.0",
        "--eval-every",
        "3",
    ]  # each process has its own dropout
    flags += [
        "--option",
        "idle=true",
    ]  # as the norms of a Swin Transformer's finer maps, where nothing reads those
    assert train.main([*flags, "--output", str(one)]) == 0
    run = partial(in_group, train.main, [*flags, "--output", str(two)], path=method)
    (first, printed), (second, nothing) = two_processes(run)
    assert first == second == 0
    assert printed.count("best mIoU") == 1 and nothing == ""
    a, b = weights(one), weights(two)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    results = [
        [line["mIoU"] for line in train.read_log(folder) if "mIoU" in line] for folder in (one, two)
    ]
    assert results[0] == pytest.approx(results[1], abs=0.01)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(
    flags, method, tmp_path, two_processes, processes
):
    flags = [*flags, "--option", "drop=0.0", "--option", "idle=true", "--batch-size", "8"]
    found, logs = [], []
    for parts in (1, 2, 4):
        folder = tmp_path / str(parts)
        given = [*flags, "--accumulate", str(parts), "--output", str(folder)]
        if processes == 1:
            assert train.main(given) == 0
        else:
            run = partial(in_group, train.main, given, path=method)
            assert [status for status, _ in two_processes(run)] == [0, 0]
        found.append(weights(folder))
        logs.append(train.read_log(folder)[0])
    for other, log in zip(found[1:], logs[1:]):
        assert all(torch.allclose(found[0][k], other[k], atol=1e-6) for k in other)
        assert log["pixels"] == pytest.approx(logs[0]["pixels"], rel=1e-5)


def test_a_parameter_without_a_gradient_is_told_where_processes_exchange_gradients(
    flags, method, tmp_path
):
    flags = [
        *flags,
        "--option",
        "idle=true",
        "--option",
        "free=true",
        "--output",
        str(tmp_path / "a"),
    ]
    process = start(flags, method, 2)
    assert "a parameter of the network gets no gradient" in process.communicate(timeout=600)[1]


def test_shares_of_a_step_are_those_of_its_labels():
    labels = torch.zeros(4, 2, 3, dtype=torch.int64)
    labels[1], labels[2, 0] = 255, 255
    assert train.shares([labels]) == [1.0]
    assert train.shares(list(labels.chunk(4))).tolist() == pytest.approx(
        [6 / 15, 0, 3 / 15, 6 / 15]
    )
    assert train.shares(list(torch.full((2, 1, 1), 255).chunk(2))).tolist() == [0, 0]


def test_a_part_that_is_not_finite_ends_the_run(flags, tmp_path, capsys):
    given = [*flags, "--accumulate", "2", "--option", "fail_at=4", "--output", str(tmp_path / "a")]
    assert "not finite after step 1 (pixels " in mistake(capsys, *given)
    given = [*flags, "--accumulate", "3", "--output", str(tmp_path / "b")]
    assert "make it a multiple of the 1 processes with --accumulate 3" in mistake(capsys, *given)


def test_resume_with_a_full_command_starts_the_run_or_goes_on(flags, tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert train.main([*flags, "--output", str(whole)]) == 0
    given = [*flags, "--resume", "--output", str(folder)]
    assert "nothing to resume" in mistake(capsys, "--resume", "--output", str(folder))
    assert train.main(given) == 0
    assert "there is nothing to resume yet: the run starts" in capsys.readouterr().out
    assert train.main(given) == 0  # nothing is left to do
    assert "goes on after step 6 of 6" in capsys.readouterr().out
    assert same(weights(whole), weights(folder))
    assert "--lr 9.0 differs" in mistake(capsys, *given, "--lr", "9")


def test_a_run_that_did_not_start_leaves_its_folder_free(flags, tmp_path, capsys):
    given = [*flags, "--option", "norm=true", "--output", str(tmp_path / "run"), "--batch-size"]
    assert "take a --batch-size of at least 2" in mistake(capsys, *given, "1")
    assert train.main([*given, "2"]) == 0
    steps = [line["step"] for line in train.read_log(tmp_path / "run")]
    assert steps == [6, 6]  # nothing of the first attempt


def test_classes_that_no_label_holds_are_named_and_nothing_to_measure_is_said(
    flags, photos, tmp_path, capsys
):
    copy, folder = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(photos, copy)
    given = [*flags, "--data-root", str(copy), "--output", str(folder)]
    assert train.main(given) == 0
    assert "warning: no label of folder val holds never" in capsys.readouterr().err
    for file in (copy / "labels" / "val").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(file)), 255)).save(file)
    shutil.rmtree(folder)
    assert train.main(given) == 0
    printed = capsys.readouterr()
    assert "there is nothing to measure" in printed.err and "no best.pt" in printed.out
    assert not (folder / "best.pt").exists() and (folder / "last.pt").exists()
    assert "NaN" not in (folder / "log.jsonl").read_text()
    assert train.read_log(folder)[-1]["mIoU"] is None


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with train.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_leaves_sigint_ignored_where_it_was(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for its `&`
    try:
        with train.Stop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(train.fcntl, "lockf", no_locks)
    monkeypatch.chdir(tmp_path)
    folder, _ = train.lock_folder(None, {"method": "caa", "dataset": "shapes"}, False, 0)
    assert str(folder) == os.path.join("runs", "caa-shapes")
    assert "cannot be locked here" in capsys.readouterr().err
    monkeypatch.setattr(train, "fcntl", None)  # as on Windows
    train.lock_folder("other", {"method": "caa", "dataset": "shapes"}, False, 0)
    assert "'other' cannot be locked here" in capsys.readouterr().err


def test_a_lost_last_pt_is_told_and_nothing_is_overwritten(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*flags, "--output", str(folder)]) == 0
    (folder / "last.pt").unlink()
    line = mistake(capsys, "--resume", "--output", str(folder))
    assert "last.pt' is not there; start a new run with --init" in line and "best.pt" in line
    line = mistake(capsys, *flags, "--resume", "--output", str(folder))
    assert (
        "holds config.json already; --resume goes on where there is a last.pt; else move it away"
        in line
    )
    assert (folder / "best.pt").exists()


@pytest.mark.parametrize("name", train.FILES)
def test_a_folder_with_any_file_of_a_run_is_taken_and_stays_as_it_is(
    flags, tmp_path, capsys, name, monkeypatch
):
    project = tmp_path / "project"
    project.mkdir()
    (project / name).write_text("of somebody else")
    line = mistake(capsys, *flags, "--output", str(project))
    assert f"holds {name} already" in line and os.listdir(project) == [name]
    assert (project / name).read_text() == "of somebody else"
    monkeypatch.chdir(project)
    assert f"holds {name} already" in mistake(capsys, *flags, "--output", ".")


def test_what_cannot_be_a_folder_is_told(flags, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for output in ("file", "file/inside"):
        line = mistake(capsys, *flags, "--output", output)
        assert "cannot be the folder of a run" in line and "take another --output" in line
    (tmp_path / "runs").touch()
    assert "cannot be the folder of a run" in mistake(capsys, *flags)


def test_a_run_can_be_resumed_from_its_first_step_on(flags, tmp_path, monkeypatch):
    step, folder = train.train_step, tmp_path / "run"

    def killed(model, state, *rest):
        if state.step == 2:
            raise SystemExit
        step(model, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", killed)
        with pytest.raises(SystemExit):
            train.main([*flags, "--output", str(folder)])
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 1
    assert train.main([*flags, "--output", str(folder), "--resume"]) == 0


def test_settings_are_the_checkpoints_and_an_edited_record_is_refused(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    resume = "--output", str(folder), "--resume"
    assert train.main([*flags, "--output", str(folder)]) == 0
    record = (folder / "config.json").read_text()
    edited = json.loads(record)
    edited["settings"]["lr"]["value"] = 9
    (folder / "config.json").write_text(json.dumps(edited))
    line = mistake(capsys, *resume)
    assert "config.json' says lr 9, the run has 0.3" in line
    for damaged in ("{", "[]", '{"settings": [1]}', '{"settings": {"lr": 1}}'):
        (folder / "config.json").write_text(damaged)
        assert "config.json' is damaged; remove it" in mistake(capsys, *resume)
    (folder / "config.json").write_text(record)
    assert train.main(resume) == 0


def test_float16_that_never_steps_ends_the_run(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "amp_dtype", lambda amp, device: torch.float16)
    monkeypatch.setattr(evaluate, "autocast", lambda device, amp: contextlib.nullcontext())
    step = train.train_step

    def overflowing(model, state, *rest):
        hook = model.conv.weight.register_hook(lambda g: g * math.inf)
        step(model, state, *rest)
        hook.remove()

    monkeypatch.setattr(train, "train_step", overflowing)
    given = [*flags, "--iterations", "100", "--output", str(tmp_path / "a")]
    assert "float16 overflowed in 50 steps in a row" in mistake(capsys, *given)
    log = train.read_log(tmp_path / "a")
    assert [line["skipped_steps"] for line in log] == [10] * 4
    assert not (tmp_path / "a" / "best.pt").exists()


def test_a_loss_that_some_steps_do_not_have_is_0_there(flags, tmp_path, monkeypatch):
    forward = []

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, images, labels):
            forward.append(1)
            return {"a": self.weight} | ({"b": 2 * self.weight} if len(forward) == 2 else {})

    settings = train.resolve(train.arguments(flags)[0])[0]
    net = Sometimes()
    state = train.State(net, settings, {}, torch.device("cpu"), 0)
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for looks in (False, True, True):  # the second look sees another set of names
        train.train_step(net, state, images, torch.zeros(4, 8, 8, dtype=torch.uint8))
        if looks:
            train.look_at_losses(state)
    assert [list(losses) for losses in state.window] == [["a", "b"], ["a", "b"], ["a"]]
    assert state.window[0]["b"] == 0 and state.window[1]["b"] > 1
    state.folder, state.seconds, state_b = tmp_path, 1.0, state.window[1]["b"]
    train.log_losses(state, 0.1, train.tqdm(disable=True))
    (line,) = train.read_log(tmp_path)
    assert line["b"] == pytest.approx(state_b / 3)


def test_checkpoints_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append("synced"))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: done.append("renamed") or rename(*names))
    evaluate.replace(tmp_path / "last.pt", lambda path: path.write_text("all"))
    assert done == ["synced", "renamed"]


def test_best_pt_never_comes_without_last_pt(flags, tmp_path, monkeypatch):
    save, files = train.State.save, []
    monkeypatch.setattr(train.State, "save", lambda *a: files.append(a[1]) or save(*a))
    given = [*flags, "--eval-every", "2", "--save-every", "6", "--output", str(tmp_path / "a")]
    assert train.main(given) == 0
    assert files[:2] == ["last.pt", "best.pt"] and files[-1] == "last.pt"


def test_init_from_other_classes_says_so(flags, tmp_path, capsys):
    assert train.main([*flags, "--output", str(tmp_path / "a")]) == 0
    last = tmp_path / "a" / "last.pt"
    net = evaluate.network("my_method", 3, "none", options={"width": 3})
    note = train.initialise(net, last, ["right", "left", "never"])
    assert note.endswith("its classes have other names or order")
    assert "other names" not in train.initialise(net, last, ["left", "right", "never"])


def test_an_edited_log_ends_nothing(flags, tmp_path):
    folder = tmp_path / "run"
    assert train.main([*flags, "--eval-every", "3", "--output", str(folder)]) == 0
    saved = torch.load(folder / "last.pt", weights_only=True)
    torch.save(saved | {"step": 3, "evaluated": 3}, folder / "last.pt")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": "x", "loss": 1}\n{"step": 2, "loss": "abc", "mIoU": [1]}\n')
    assert train.main(["--output", str(folder), "--resume"]) == 0


def test_a_lost_best_pt_is_written_again(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*flags, "--output", str(folder)]) == 0
    saved = torch.load(folder / "last.pt", weights_only=True)
    torch.save(saved | {"step": 3, "evaluated": 3, "best": 2.0}, folder / "last.pt")
    (folder / "best.pt").unlink()
    assert train.main(["--output", str(folder), "--resume"]) == 0
    assert (folder / "best.pt").exists()


def test_output_that_fails_in_any_way_does_not_end_the_work(capsys):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        flush, fileno = write, lambda self: os.dup(1)

    stream = data.Stream("x.py", Full())
    stream.write("a")
    error = capsys.readouterr().err
    assert "x.py: the output cannot be written (No space left on device)" in error


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'5\n{}\n\xff\xfe\n{"step": 3, "loss": 1}\n[1]\n')
    assert train.read_log(tmp_path) == [{"step": 3, "loss": 1}]


def test_other_classes_are_not_resumed(flags, photos, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    given = [*flags, "--output", str(tmp_path / "run")]
    assert train.main(given) == 0
    (copy / "classes.txt").write_text("right\nleft\nnever\n")
    line = mistake(capsys, "--output", str(tmp_path / "run"), "--resume", "--data-root", str(copy))
    assert "has other classes than this run" in line


def test_car_trains_any_method_and_saves_it_as_it_is(flags, method, tmp_path, two_processes):
    one, two, without = tmp_path / "one", tmp_path / "two", tmp_path / "without"
    flags = [*flags, "--option", "drop=0.0"]
    assert train.main([*flags, "--output", str(without)]) == 0
    flags.append("--car")
    assert train.main([*flags, "--output", str(one)]) == 0
    run = partial(in_group, train.main, [*flags, "--output", str(two)], path=method)
    assert [status for status, _ in two_processes(run)] == [0, 0]
    a, b, c = weights(one), weights(two), weights(without)
    assert list(a) == list(c) and not torch.allclose(a["conv.weight"], c["conv.weight"], atol=1e-4)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    steps = [[line for line in train.read_log(folder) if "loss" in line] for folder in (one, two)]
    names = ["pixels", "extra", "intra_c2p", "inter_c2c", "inter_c2p"]
    assert [name for name in steps[0][0] if name in names] == names
    for name in names:
        assert steps[0][0][name] == pytest.approx(steps[1][0][name], abs=1e-5)
    assert train.main(["--output", str(one), "--resume"]) == 0  # --car is the run's own setting
    first = {}
    for form in ("paper", "released"):
        assert (
            train.main([*flags, form, "--iterations", "1", "--output", str(tmp_path / form)]) == 0
        )
        first[form] = train.read_log(tmp_path / form)[0]
    assert first["paper"]["pixels"] == first["released"]["pixels"]
    assert (
        first["paper"]["intra_c2p"] > first["released"]["intra_c2p"]
    )  # the mean of squares, the square of the mean


def test_car_finds_the_one_convolution_that_gives_the_classes(flags, tmp_path, capsys):
    options = "--option", "width=4", "--option", "drop=0.0"
    for name in ("classifier", "cls"):
        named = *options, "--option", f"name={name}", "--output", str(tmp_path / name)
        assert train.main([*flags, *named, "--car", "--iterations", "2"]) == 0
        assert f"--car acts on what enters .{name}, because" in capsys.readouterr().out
    first, second = (train.read_log(tmp_path / name)[0] for name in ("classifier", "cls"))
    assert first["inter_c2p"] == second["inter_c2p"] > 0


def test_init_carries_the_weights_over_and_names_what_is_new(flags, tmp_path, capsys):
    assert train.main([*flags, "--output", str(tmp_path / "a")]) == 0
    net = evaluate.network("my_method", 7, "none", options={"width": 3})
    before = net.classifier.weight.clone()
    note = train.initialise(net, tmp_path / "a" / "last.pt", ["left", "right", "never"])
    assert note.startswith("; 2 of 4 tensors") and "the others are new" in note
    assert torch.equal(net.conv.weight, weights(tmp_path / "a")["conv.weight"])
    assert torch.equal(net.classifier.weight, before)
    last = str(tmp_path / "a" / "last.pt")
    assert (
        train.main([*flags, "--init", last, "--iterations", "1", "--output", str(tmp_path / "b")])
        == 0
    )
    assert "4 of 4 tensors" in capsys.readouterr().out


def test_it_trains_and_evaluates_from_any_folder_without_what_windows_lacks(photos, tmp_path):
    flags = f"--dataset folder --data-root {photos} --backbone resnet18 --output-stride 32"
    flags += " --iterations 3 --batch-size 2 --crop-size 32 --workers 1 --device cpu --output run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    how = dict(cwd=tmp_path, capture_output=True, text=True, env=environment)
    done = subprocess.run(without_posix(train.__file__, *flags.split()), **how)
    assert done.returncode == 0, done.stderr
    assert "cannot be locked here" in done.stderr and "best mIoU" in done.stdout
    flags = "--checkpoint run/best.pt --workers 1 --device cpu --json n.json"
    done = subprocess.run(without_posix(evaluate.__file__, *flags.split()), **how)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "n.json").read_text())["images"] == 5


def test_a_run_that_is_refused_leaves_no_folder(flags, tmp_path, capsys):
    for wrong in (["--batch-size", "3", "--accumulate", "2"], ["--head-lr", "2"],
                  ["--option", "depth=3"]):  # fmt: skip
        mistake(capsys, *flags, *wrong, "--output", str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_bf16_on_the_cpu_trains(flags, tmp_path):
    assert train.main([*flags, "--amp", "bf16", "--output", str(tmp_path / "a")]) == 0
    assert weights(tmp_path / "a")["conv.weight"].dtype == torch.float32


def test_caa_learns_to_tell_dark_from_bright(photos, tmp_path):
    flags = "--method caa --dataset folder --iterations 12 --batch-size 4 --crop-size 32"
    flags += " --output-stride 32 --bn-momentum 0.5"
    root = [
        "--data-root",
        str(photos),
        "--device",
        "cpu",
        "--workers",
        "0",
        "--output",
        str(tmp_path / "a"),
    ]
    assert train.main([*flags.split(), *root]) == 0
    steps = [line["cross_entropy"] for line in train.read_log(tmp_path / "a") if "loss" in line]
    assert steps[-1] < 0.8 * steps[0] or steps[-1] < 0.3


# ----------------------------------------------------------------------------------------- mistakes


def mistake(capsys, *flags):
    assert train.main(list(flags)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: ")
    return lines[0]


def test_a_loss_that_is_not_finite_prints_every_term_and_keeps_the_last_checkpoint(
    flags, tmp_path, capsys
):
    folder = tmp_path / "run"
    line = mistake(
        capsys, *flags, "--option", "fail_at=5", "--save-every", "3", "--output", str(folder)
    )
    assert "not finite after step 4 (pixels " in line and "extra nan" in line
    assert "if there is a last.pt, it holds an earlier step" in line
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    assert checkpoint["step"] == 3 and all(
        value.isfinite().all() for value in checkpoint["net"].values()
    )


def test_mistakes_are_one_line(flags, photos, tmp_path, capsys):
    assert "unknown method 'nothing'" in mistake(capsys, "--method", "nothing")
    assert "unknown dataset 'nothing'" in mistake(capsys, "--dataset", "nothing")
    assert "shapes has no switch 'tiny'" in mistake(capsys, "--dataset", "shapes+tiny")
    assert "camvid train not found" in mistake(
        capsys, "--dataset", "camvid", "--data-root", str(tmp_path)
    )
    assert "unknown backbone 'resnet'" in mistake(capsys, "--backbone", "resnet")
    assert "no weights at 'w.pth'" in mistake(capsys, "--weights", "w.pth")
    assert "Net has no option depth; its options and defaults are width=4" in mistake(
        capsys, *flags, "--option", "depth=3"
    )
    assert "--iterations: expected a whole number from 1 to 1000000000, not 0" in mistake(
        capsys, *flags, "--iterations", "0"
    )
    for flag in ("--crop-size", "--iterations", "--batch-size", "--lr"):
        assert f"{flag}: expected a" in mistake(capsys, *flags, flag, "99999999999")
        assert f"{flag}: expected a" in mistake(capsys, *flags, flag, "many")
    assert "--seed: expected" in mistake(capsys, *flags, "--seed", "9" * 30)
    assert "from 0 to 1, not 3" in mistake(capsys, *flags, "--bn-momentum", "3")
    assert "from 0.001 to 1000" in mistake(capsys, *flags, "--scale", "1e-320", "1")
    assert "--scale-step 1e-300" in mistake(capsys, *flags, "--scale-step", "1e-300")
    assert "expected two factors" in mistake(capsys, *flags, "--scale", "2", "1")
    assert "invalid choice: 'rmsprop'" in mistake(capsys, *flags, "--optimizer", "rmsprop")
    assert "unrecognized arguments: --layers" in mistake(capsys, *flags, "--layers", "3")
    assert "needs the run's folder" in mistake(capsys, "--resume")
    assert "nothing to resume" in mistake(capsys, "--resume", "--output", str(tmp_path))
    assert "fp16 needs a CUDA GPU" in mistake(capsys, *flags, "--amp", "fp16")
    assert "no checkpoint 'x.pt'" in mistake(capsys, *flags, "--init", "x.pt")
    assert "from 0 to" in mistake(capsys, *flags, "--seed", "-1")
    assert "--lr: expected a number from 0 to" in mistake(capsys, *flags, "--lr", "-1")
    assert "weights is not an --option" in mistake(capsys, *flags, "--option", "weights=imagenet")
    assert "cannot be built with the options width='wide'" in mistake(
        capsys, *flags, "--option", "width=wide"
    )
    for method in ("car", "hfgd"):
        line = mistake(
            capsys,
            "--method",
            method,
            "--car",
            "--backbone",
            "resnet18",
            "--output",
            str(tmp_path / method),
        )
        assert "--car: this " in line and "has CAR's losses already: add them once" in line
    line = mistake(capsys, *flags, "--car", "--option", "name=cls")  # conv has 3 channels too
    assert "my_method has no .classifier, the convolution that gives the logits; 3 chan" in line
    assert line.endswith("come from conv, cls; name one of its own: self.classifier = …")
    small = [
        *flags,
        "--batch-size",
        "1",
        "--option",
        "norm=true",
        "--output",
        str(tmp_path / "small"),
    ]
    assert "take a --batch-size of at least 2" in mistake(capsys, *small)


@pytest.mark.parametrize(
    "given, reason",
    [
        ("--momentum 0.5 --optimizer adam", "--momentum has no effect here: the optimizer is adam"),
        ("--optimizer adam", "adam: give --lr too; 0.0005 is for adamw ('shapes')"),
        ("--power 1 --halve-every 2", "--power has no effect here: the learning rate is halved"),
        ("--init a.pt --weights imagenet", "--weights has no effect here: --init gives"),
        ("--dataset shapes --data-root a", "--data-root has no effect here: shapes is drawn"),
    ],
)
def test_a_flag_without_effect_is_refused(given, reason, capsys):
    assert reason in mistake(capsys, *given.split())


def test_training_labels_without_a_labelled_pixel_end_the_run(flags, photos, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(photos, root)
    for path in (root / "labels/train").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    given = [*flags[:4], "--data-root", str(root), *flags[6:], "--output", str(tmp_path / "a")]
    assert "no pixel of 6 steps has a label" in mistake(capsys, *given)


def test_a_run_says_first_what_was_chosen_and_what_its_files_weigh(flags, tmp_path, capsys):
    assert train.main([*flags, "--lr", "0.1", "--output", str(tmp_path / "a")]) == 0
    lines = capsys.readouterr().out.splitlines()
    chosen = [line.split()[0] for line in lines if line.endswith("command line")]
    assert chosen == ["method", "dataset", "data_root", "lr", "workers", "device"]
    assert lines[: len(chosen)] == [line for line in lines if line.endswith("command line")]
    recipe = [line for line in lines if line.endswith("recipe my_method/folder")]
    assert lines.index(recipe[0]) == len(chosen) and "momentum 0.9" in lines[len(chosen + recipe)]
    assert "best mIoU" in lines[-2] and "samples.png" in lines[-2]
    command = lines[-1].split("evaluate.py ")[1].split()
    assert evaluate.main([*command[:-1], str(tmp_path / "f"), "--workers", "0"]) == 0
    last, best = (torch.load(tmp_path / "a" / f, weights_only=True) for f in ("last.pt", "best.pt"))
    assert "optimizer" in last and not {"optimizer", "schedule", "scaler"} & set(best)


def test_a_damaged_run_is_not_resumed(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([*flags, "--output", str(folder)]) == 0
    resume = "--resume", "--output", str(folder)
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    del checkpoint["optimizer"]
    torch.save(checkpoint, folder / "last.pt")
    assert "lacks the optimizer's state" in mistake(capsys, *resume)
    torch.save(checkpoint | {"optimizer": {}}, folder / "last.pt")
    assert "lacks the optimizer's state" in mistake(capsys, *resume)
    torch.save(checkpoint | {"optimizer": {}, "net": {}}, folder / "last.pt")
    assert "the checkpoint's weights do not fit" in mistake(capsys, *resume)
    (folder / "last.pt").unlink()
    line = mistake(capsys, *resume)
    assert f"last.pt' is not there; start a new run with --init {folder}/best.pt" in line


def test_a_run_is_never_overwritten_and_resumes_only_as_it_was(flags, tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert train.main([*flags, "--output", folder]) == 0
    assert "config.json already; --resume goes on where there is a last.pt" in mistake(
        capsys, *flags, "--output", folder
    )
    line = mistake(capsys, "--lr", "0.1", "--output", folder, "--resume")
    assert "--lr 0.1 differs from this run's 0.3; leave it out" in line
    line = mistake(capsys, "--iterations", "60", "--output", folder, "--resume")
    new = f"python train.py --method my_method --dataset folder --init {folder}/last.pt"
    assert f"or start a new run with its weights: {new} --iterations …, and" in line
    assert train.main(["--output", folder, "--resume", "--workers", "1"]) == 0  # nothing left to do
    assert train.main([*flags, "--option", "pair=(1,2)", "--output", folder + "2"]) == 0
    assert (
        train.main(["--option", "pair=(1,2)", "--output", folder + "2", "--resume"]) == 0
    )  # config.json has it as a list
    last = tmp_path / "run" / "last.pt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["settings"]["of an earlier version"] = 1
    for later in ("halve_every", "scale", "train_split"):  # as if later versions had added them
        del checkpoint["settings"][later]
    torch.save(checkpoint, last)
    (tmp_path / "run" / "config.json").unlink()  # it is for people
    assert train.main(["--output", folder, "--resume", "--halve-every", "0"]) == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert written["halve_every"] == {"value": 0, "from": "default"}
    assert written["lr"] == {"value": 0.3, "from": "recipe my_method/folder"}
    assert written["scale"]["value"] == [0.75, 1.5] and "of an earlier version" not in written


def test_crops_have_one_side_or_two(flags, tmp_path, capsys):
    sides = {"24": 24, "24 32": [24, 32]}
    for text, expected in sides.items():
        settings, _ = train.resolve(train.arguments([*flags, "--crop-size", *text.split()])[0])
        assert settings["crop_size"] == expected
    assert "--crop-size [1, 2, 3]: expected one side, or height and width" in mistake(
        capsys, *flags, *"--crop-size 1 2 3".split()
    )
    assert "--crop-size: expected a whole number from 1 to 100000, not 0" in mistake(
        capsys, *flags, *"--crop-size 24 0".split()
    )
    folder = str(tmp_path / "run")
    assert train.main([*flags, "--crop-size", "24", "32", "--output", folder]) == 0
    assert train.main(["--output", folder, "--resume", "--crop-size", "24", "32"]) == 0
    assert "--crop-size 24 differs from this run's [24, 32]" in mistake(
        capsys, "--output", folder, "--resume", "--crop-size", "24"
    )


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"method": "caa", "dataset": "shapes"}
    first, _ = train.lock_folder(None, settings, False, 0)
    assert str(first) == os.path.join("runs", "caa-shapes")
    # A folder without a checkpoint is taken again: the run that made it did not start.
    assert str(train.lock_folder(None, settings, False, 0)[0]) == str(first)
    (first / "log.jsonl").touch()  # any file that a run writes
    assert str(train.lock_folder(None, settings, False, 0)[0]) == str(first) + "-2"


def test_a_wrong_label_ends_the_run_with_its_file(flags, photos, tmp_path, capsys, monkeypatch):
    # When the loader is collected, torch waits so long for each of its processes; else 5 s.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    Image.fromarray(np.full((43, 51), 9, np.uint8)).save(copy / "labels" / "train" / "1.png")
    flags = [*flags, "--data-root", str(copy), "--workers", "2", "--output", str(tmp_path / "run")]
    line = mistake(capsys, *flags)
    assert line.endswith(
        "1.png' holds the label ids [9]; this dataset has 0-2, 255; write 255 there, or add a line"
        " to classes.txt"
    )
    gc.collect()


def test_without_git_a_run_has_no_revision(flags, tmp_path, monkeypatch):
    def no_git(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(train.subprocess, "run", no_git)
    assert train.main([*flags, "--iterations", "1", "--output", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["git"] is None


def test_weights_that_are_not_finite_are_never_saved(flags, tmp_path):
    state = train.State(
        evaluate.network("my_method", 3, "none"),
        train.resolve({"head_lr": 1.0})[0],
        {},
        torch.device("cpu"),
        0,
    )
    state.folder, state.recorded = tmp_path, True
    dataset = data.dataset("shapes")
    state.save("last.pt", dataset)
    with torch.no_grad():
        state.net.conv.bias[0] = float("nan")
    with pytest.raises(
        UserError,
        match="step 0: conv.bias is not finite; if there is a last.pt, it holds an earlier step",
    ):
        state.save("last.pt", dataset)
    assert weights(tmp_path)["conv.bias"].isfinite().all()


def test_curves_stand_strange_values(tmp_path):
    for step, loss in ((10, -3.0), (20, 5.0)):
        train.append_log(tmp_path, step=step, lr=0.1, loss=loss)
    train.append_log(tmp_path, step=20, mIoU=float("nan"), pixel_accuracy=0.5, class_accuracy=0.5)
    train.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_rewinding_the_log_drops_what_came_after_the_checkpoint(tmp_path):
    for line in (
        {"step": 10, "loss": 1},
        {"step": 10, "mIoU": 0.1},
        {"step": 20, "loss": 1},
        {"step": 20, "mIoU": 0.2},
    ):
        train.append_log(tmp_path, **line)
    train.rewind_log(tmp_path, step=20, evaluated=10)
    assert [list(line) for line in train.read_log(tmp_path)] == [
        ["step", "loss"],
        ["step", "mIoU"],
        ["step", "loss"],
    ]


def test_replace_leaves_the_old_file_where_writing_fails(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        evaluate.replace(path, fail)
    assert path.read_text() == "old"


def test_mistake_is_a_value_error():
    assert issubclass(UserError, ValueError) and UserError is data.UserError
