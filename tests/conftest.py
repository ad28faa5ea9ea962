import contextlib
import gc
import io
import sys
import traceback
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MARKS = {"equation", "network", "system", "cuda"}


def pytest_collection_modifyitems(items):
    """Every test says what kind it is, once."""
    marks = {item.nodeid: MARKS & {mark.name for mark in item.iter_markers()} for item in items}
    wrong = [name for name, found in marks.items() if len(found) != 1]
    if wrong:
        expected = ", ".join(sorted(MARKS))
        raise pytest.UsageError(f"not one mark of {expected}: {', '.join(wrong[:5])}")


def pytest_collection_finish():
    """Without this the garbage collector takes a tenth of the tests' time."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On maps this small several threads are slower, and on a busy machine much slower."""
    torch.set_num_threads(1)


# A sixth of ResNet-18's weights, for networks that are trained. In evaluation mode its features are
# next to 0 without pretrained norms, and tests would compare nothing.
LIGHT = "mobilenet_v2"


@pytest.fixture
def meta():
    """Networks of the test have no weights, which is enough to see what layers they have."""
    with torch.device("meta"):
        yield


class Largest(TorchDispatchMode):
    """The most numbers that any tensor holds while it is active."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                numbers = x.untyped_storage().nbytes() // x.element_size()
                self.numbers = max(self.numbers, numbers)
        return out


@pytest.fixture
def largest():
    """Entered by a `with`, it finds the largest tensor of what is computed there."""
    return Largest()


def trained(module):
    """The module in evaluation mode, with norms that do something."""
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        for x in (norm.running_mean, norm.bias):
            None if x is None else torch.nn.init.normal_(x, std=0.3)
        for x in (norm.running_var, norm.weight):
            None if x is None else torch.nn.init.uniform_(x, 0.5, 2)
    return module.eval()


def normed(x, conv, norm, activation=F.relu):
    """A convolution without bias, batch norm, ReLU, as they are in the layers."""
    assert conv.bias is None
    y = F.conv2d(x, conv.weight, stride=conv.stride, padding=conv.kernel_size[0] // 2)
    y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return activation(y * norm.weight[:, None, None] + norm.bias[:, None, None])


@pytest.fixture
def one_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """A function of `share`, which stands in a module: the results of share(0) and share(1) in a
    process group of two.

    The two stay for all tests: starting them takes longer than what they do.
    """
    folder, context = tmp_path_factory.mktemp("two"), torch.multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    both = [
        context.Process(target=process, args=(rank, folder, pipes[rank][1]), daemon=True)
        for rank in range(2)
    ]
    for one in both:
        one.start()

    def run(share):
        for pipe, _ in pipes:
            pipe.send(share)
        errors = [pipe.recv() if pipe.poll(600) else "no answer" for pipe, _ in pipes]
        assert errors == ["", ""]
        return [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    yield run
    for pipe, _ in pipes:
        pipe.send(None)
    for one in both:
        one.join(30)


# Hides what Windows lacks. As sitecustomize.py on PYTHONPATH it does so in every process.
WITHOUT_POSIX = """
import os, signal, sys
for module, names in (
    (os, "setsid killpg getpgid sched_getaffinity"),
    (signal, "SIGHUP SIGUSR1 SIGALRM setitimer ITIMER_REAL sigwaitinfo"),
):
    for name in names.split():
        vars(module).pop(name, None)
sys.modules["fcntl"] = None
"""


def without_posix(script, *arguments):
    """The command that runs a script as on Windows, as far as names can be missing here."""
    run = """
import runpy
del sys.argv[0]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return [sys.executable, "-c", WITHOUT_POSIX + run, str(script), *map(str, arguments)]


def in_group(main, arguments, rank, path=None):
    """(status, output) of a script's `main(arguments)` as one process of `two_processes`, which are
    a process group already. path: a folder to import from.
    """
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        if path:
            patch.syspath_prepend(path)
        patch.setenv("WORLD_SIZE", "2")
        patch.setattr(dist, "init_process_group", lambda _: dist.barrier())
        patch.setattr(dist, "destroy_process_group", lambda: None)
        return main(arguments), output.getvalue()


def process(rank, folder, pipe):
    torch.set_num_threads(1)
    how = dict(init_method=f"file://{folder}/store", timeout=timedelta(seconds=600))
    dist.init_process_group("gloo", rank=rank, world_size=2, **how)
    while (share := pipe.recv()) is not None:
        try:
            torch.save(share(rank), folder / f"{rank}.pt")
            pipe.send("")
        except Exception:
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A `folder` dataset of 4 + 5 small pictures, each of its own size: dark at the left, bright at
    the right.
    """
    root = tmp_path_factory.mktemp("photos")
    (root / "classes.txt").write_text("left\nright\nnever\n")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 5)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for i in range(count):
            h, w = 40 + 3 * i, 50 + i
            label = np.zeros((h, w), np.uint8)
            label[:, w // 2 :] = 1
            label[:3] = 255
            image = rng.integers(0, 60, (h, w, 3)) + 150 * (label == 1)[..., None]
            Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{i}.png")
    return root
