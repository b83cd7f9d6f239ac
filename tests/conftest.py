"""What several test files need: the scripts as modules, tiny data sets, ways to run a script."""

import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
from PIL import Image

import common

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}  # of programs

torch.set_num_threads(1)  # the networks here are tiny: more threads would only wait for each other

# In the background or under nohup signals are ignored, and the scripts that tests start would
# inherit that: then nothing could be stopped.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def load(name):
    """A script as a module; its name starts with a digit, so `import` cannot say it."""
    return importlib.import_module(name)


def run_script(script, *arguments, environment=None):
    """Run a script in a process of its own, as a user does; returns what subprocess.run returns."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / script), *map(str, arguments)],
        capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=300,
        cwd=REPOSITORY, env={**ENVIRONMENT, **(environment or {})})


def call_main(module, monkeypatch, *arguments):
    """Call a script's main() in this process: exit code and sentence, (0, "") if all went well.

    An exception that a user would see as a traceback comes through and fails the test.
    """
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
    try:
        common.run_main(module.main)
    except SystemExit as stop:
        return (1, stop.code) if isinstance(stop.code, str) else (stop.code or 0, "")
    return 0, ""


def sentence_of(module, monkeypatch, *arguments):
    """Run a script's main() where it must end in one sentence; returns it."""
    code, sentence = call_main(module, monkeypatch, *arguments)
    is_sentence = sentence.startswith("error: ") and "\n" not in sentence and len(sentence) < 600
    assert code == 1 and is_sentence, (code, sentence)
    return sentence


def contents(folder):
    """All files below a folder, as {path: bytes}."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def full_disk(most_bytes):
    """No file may grow beyond so many bytes: write fails half way, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        with redirect_stdout(io.TextIOWrapper(io.BytesIO())):  # pytest's own file would be full
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def signals_as_before():
    """Scripts put their own answers to signals in place; the tests' own must stay."""
    before = {number: signal.getsignal(number) for number in
              (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------- images and networks

def noise_image(seed, height=96, width=64):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def paint_dot(image_3d_array, x, y, sigma=3.0, peak=200.0):
    """Add a bell-shaped bright dot, whose intensity-weighted centre is (x, y), to a picture."""
    height, width = image_3d_array.shape[:2]
    column, row = np.arange(width)[None, :] + 0.5, np.arange(height)[:, None] + 0.5
    dot = peak * np.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma ** 2))
    image_3d_array[:] = np.minimum(image_3d_array + np.round(dot)[:, :, None], 255)


def centroid(grey_2d_array):
    """Intensity-weighted centre (x, y) in px; pixel c covers [c, c + 1)."""
    grey = np.asarray(grey_2d_array, np.float64)
    return tuple((grey.sum(axis=axis) @ (np.arange(grey.shape[1 - axis]) + 0.5)) / grey.sum()
                 for axis in (0, 1))


class Sees(load("02_model").KeypointNet):
    """A network that knows every pure white pixel (class 1) and red one (class 2), and answers
    whole multiples of `snap` px. Of cells that know the same keypoint the last is the surest."""

    def __init__(self, snap=None):
        super().__init__(class_count=3)
        self.snap = snap

    def forward(self, images_4d):
        count, _, height, width = images_4d.shape
        assert height % common.CELL == width % common.CELL == 0
        rows, columns = height // common.CELL, width // common.CELL
        label_list = []
        for class_id, colour in ((1, (255, 255, 255)), (2, (255, 0, 0))):
            is_colour = (images_4d == torch.tensor(colour)[None, :, None, None]).all(dim=1)
            label_list += [(image, class_id, column + 0.5, row + 0.5)
                           for image, row, column in is_colour.nonzero().tolist()]
        label_2d_array = np.array(label_list, np.float32).reshape(-1, 4)
        if self.snap:
            label_2d_array[:, 2:] = label_2d_array[:, 2:] // self.snap * self.snap
        output_4d = perfect_output(label_2d_array, count, rows, columns, sure=10)
        output_4d[:, 3:] += torch.linspace(0, 0.1, rows * columns).view(rows, columns)
        return output_4d


def perfect_output(label_2d_array, image_count, rows, columns, class_count=3, sure=20):
    """What a network that knows the labels would answer."""
    model = load("02_model")
    gt_offset_4d, gt_class_id_3d = map(torch.from_numpy, model.match(
        label_2d_array, image_count, rows, columns))
    score_4d = torch.nn.functional.one_hot(gt_class_id_3d, class_count).permute(0, 3, 1, 2)
    return torch.cat((gt_offset_4d / model.OFFSET_UNIT, float(sure) * score_4d), dim=1)


def save_weights(data, category_list=("background", "keyPoint_1", "keyPoint_2"), max_per_class=1):
    """Untrained weights: they mean nothing, but with --threshold 0 one of each class answers."""
    torch.manual_seed(0)
    network = load("02_model").KeypointNet(len(category_list))
    data.mkdir(parents=True, exist_ok=True)
    torch.save({"network": network.state_dict(), "category_list": list(category_list),
                "box_size": [30.0, 30.0], "max_per_class": max_per_class, "scale": 1.0,
                "checksum_list": []}, data / "weights.pt")


def make_small(train, model, setattr):
    """An update in milliseconds: eight channels a layer, small crops and batches, no pictures."""
    setattr(model, "LAYER_LIST", [(*geometry, 8) for *geometry, _ in model.LAYER_LIST])
    setattr(train, "BATCH", 3)
    setattr(train, "CROP", 64)
    for name in [name for name in vars(train) if name.startswith("draw_")]:
        setattr(train, name, lambda *arguments: None)


@pytest.fixture
def small_training(monkeypatch):
    """03_train.py with a tiny network, crops and batches."""
    make_small(load("03_train"), load("02_model"), monkeypatch.setattr)


# ---------------------------------------------------------------- data sets

def xml_text(box_list, width=64, height=96, root="annotation"):
    """LabelImg's XML as text; box_list: (name, xmin, ymin, xmax, ymax), values as they are."""
    objects = "".join(
        f"<object><name>{escape(str(name))}</name><truncated>0</truncated><bndbox><xmin>{xmin}"
        f"</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
        for name, xmin, ymin, xmax, ymax in box_list)
    return (f"<{root}><folder>images</folder><filename>a.jpg</filename>"
            f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            f"<segmented>0</segmented>{objects}</{root}>")


def write_example(folder, name, box_list, width=64, height=96, suffix=".png", seed=0):
    """A small noisy picture and its XML, side by side in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    noise_image([seed, len(name), *map(ord, name[:20])], height, width).save(
        folder / f"{name}{suffix}")
    (folder / f"{name}.xml").write_text(xml_text(box_list, width, height), encoding="utf-8")


def copy_of(own, folder):
    """The data set in a folder that a test may write to."""
    return Path(shutil.copytree(own, folder))


def train_in(data, monkeypatch, updates, *arguments):
    """Train in this process, which must end well: what weights.pt and checkpoint.pt hold then."""
    arguments = ["--data", data, "--updates", updates, *arguments]
    assert call_main(load("03_train"), monkeypatch, *arguments) == (0, "")
    return saved(data)


def saved(data):
    """What a run left in a data folder: the contents of weights.pt and of checkpoint.pt."""
    return [torch.load(data / name, weights_only=True) for name in ("weights.pt", "checkpoint.pt")]


def write_own_pictures(folder, count=10, class_list=("left eye", "right eye")):
    """A folder as a reader might have it: small pictures, two classes, the last one empty."""
    for number in range(count):
        boxes = [(name, 5 + 2 * number, 15 + 30 * i, 35 + 2 * number, 45 + 30 * i)
                 for i, name in enumerate(class_list)]
        write_example(folder, f"picture {number}", boxes if number < count - 1 else [], seed=number)
    return folder


def prepare(data, *arguments):
    with pytest.MonkeyPatch.context() as monkeypatch:
        result = call_main(load("01_prepare_data"), monkeypatch, "--data", data, *arguments)
    assert result == (0, "")
    return data


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A data folder with twelve drawn images; not to be changed."""
    return prepare(tmp_path_factory.mktemp("drawn"), "--pictures", 12)


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """A data folder made from ten small pictures labelled in LabelImg's way; not to be changed."""
    folder = tmp_path_factory.mktemp("own")
    return prepare(folder / "data", "--source", write_own_pictures(folder / "my pictures"))


@pytest.fixture
def data(small_training, own, tmp_path):
    """The own images without weights, in a folder that a test may write to; runs are tiny."""
    return copy_of(own, tmp_path / "data")
