import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A `folder` dataset of 4 + 5 small pictures, each of its own size: dark at the left, bright at the right."""
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
