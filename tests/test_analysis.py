"""06_model_analysis.py: formulas against answers worked by hand, and predictions against what PyTorch does."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from common import UserError

analysis = importlib.import_module("06_model_analysis")
model = importlib.import_module("02_model")
ROOT = Path(__file__).resolve().parents[1]


def small_layer_list():
    """A network for which everything can be worked out on paper."""
    return [nn.Conv2d(3, 4, 6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, 1, 1)]


def wrap(layer_list):
    """A network whose forward runs the layers on the picture as float32, as KeypointNet does."""
    network = nn.Sequential(*layer_list)
    network.forward = lambda images_4d: nn.Sequential.forward(network, images_4d.float())
    return network


def test_shapes_parameters_and_work_by_hand():
    row_list = analysis.describe(small_layer_list(), 3, 64, 32)
    # (64 + 2 - 6) / 4 + 1 = 16, (32 + 2 - 6) / 4 + 1 = 8; pooling halves them; 3x3 with padding 1 keeps them
    assert [row["out_shape"] for row in row_list] == [(4, 16, 8), (4, 16, 8), (4, 16, 8), (4, 8, 4), (5, 8, 4)]
    assert [row["parameters"] for row in row_list] == [432, 8, 0, 0, 185]  # 6*6*3*4, 2*4, -, -, 3*3*4*5 + 5
    assert [row["multiply_adds"] for row in row_list] == [55296, 0, 0, 0, 5760]  # 432 * 16*8, 180 * 8*4
    assert [row["name"] for row in row_list] == ["conv 1", "BN 1", "ReLU 1", "pool 2", "conv 3"]


def test_odd_lengths_are_rounded_down():
    row, = analysis.describe([nn.Conv2d(1, 1, 3, 2, 0, bias=False)], 1, 10, 9)
    assert row["out_shape"] == (1, 4, 4)  # (10 - 3) / 2 + 1 = 4.5, (9 - 3) / 2 + 1 = 4


def test_receptive_field_by_hand():
    row_list = analysis.describe(small_layer_list(), 3, 64, 32)
    # conv 1: 6 px, next cell 4 px on, its pixels -1 to 4: centre 2. Pooling: 4 px more, centre between two cells, 2 px on.
    # conv 3: two cells of 8 px more, the centre stays.
    seen_list = [(row["size"], row["jump"], row["centre"]) for row in row_list if "kernel" in row]
    assert seen_list == [(6, 4, 2.0), (10, 8, 4.0), (26, 8, 4.0)]


@pytest.mark.parametrize("kernel, off", [(3, -15.5), (4, 0.0)])
def test_receptive_field_is_seen_where_the_formula_says(kernel, off):
    layer_list = [nn.Conv2d(3 if i == 0 else 2, 2, kernel, 2, 1) for i in range(5)]
    row = analysis.describe(layer_list, 3, 320, 320)[-1]
    assert row["centre"] - row["jump"] / 2 == off
    assert analysis.seen_area(layer_list, row["size"]) == (row["size"], off)


def test_memory_by_hand():
    row_list = analysis.describe(small_layer_list(), 3, 64, 32)
    saved_list, peak = analysis.predict_memory(row_list, batch=2)
    picture, wide, pooled = 4 * 2 * 3 * 64 * 32, 4 * 2 * 4 * 16 * 8, 4 * 2 * 4 * 8 * 4  # bytes of float32
    # conv 1 its input; BN its input, 4 means and 4 deviations; ReLU its output; pooling has that already, and saves an int64 for
    # each number it gives out; conv 3 its input.
    assert saved_list == [picture, wide + 32, wide, 2 * pooled, pooled]
    # The peak: in backward, ReLU's turn, when the first three are still there, with the gradient that comes and the one that
    # goes; or conv 3's.
    assert peak == max(picture + 2 * wide + 32 + 2 * wide, sum(saved_list) + 4 * 2 * 5 * 8 * 4 + pooled)


@pytest.mark.parametrize("inplace", [True, False])
def test_memory_prediction_is_what_autograd_saves(inplace):
    layer_list = small_layer_list()
    layer_list[2] = nn.ReLU(inplace=inplace)
    saved_list, _ = analysis.predict_memory(analysis.describe(layer_list, 3, 64, 32), 2)
    images_4d = analysis.random_pictures(2, 64, 32)
    assert analysis.saved_bytes(wrap(layer_list), layer_list, images_4d) == saved_list


@pytest.mark.parametrize("batch, height, width", [(1, 320, 96), (3, 128, 128)])
def test_the_real_network_within_one_percent(batch, height, width):
    network = model.KeypointNet(class_count=3)
    layer_list = [*network.body, network.head]
    row_list = analysis.describe(layer_list, 3, height, width)
    images_4d = analysis.random_pictures(batch, height, width)
    assert row_list[-1]["out_shape"] == tuple(network(images_4d).shape[1:])
    assert sum(row["parameters"] for row in row_list) == sum(p.numel() for p in network.parameters())
    assert (row_list[-1]["size"], row_list[-1]["jump"], row_list[-1]["centre"]) == model.receptive_field()
    predicted, measured = analysis.predict_memory(row_list, batch)[0], analysis.saved_bytes(network, layer_list, images_4d)
    assert sum(predicted) == pytest.approx(sum(measured), rel=0.01)


def real_network():
    return model.KeypointNet(class_count=3)


def small_network():
    return wrap(small_layer_list())


@pytest.mark.parametrize("build", [real_network, small_network])
def test_peak_is_what_the_allocator_hands_out(build):
    """PyTorch's profiler sees every allocation on a CPU. Large pictures, small kernels: what the kernels borrow is little."""
    network, images_4d = build(), analysis.random_pictures(4, 512, 512)
    layer_list = [*network.body, network.head] if build is real_network else list(network)
    network(images_4d).sum().backward()  # gradients exist from here on, and are no part of the peak
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        network(images_4d).sum().backward()
    event_list = [(event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
                  if event.name() == "[memory]"]
    held = measured = 0
    for _, change in sorted(event_list):
        held += change
        measured = max(measured, held)
    _, peak = analysis.predict_memory(analysis.describe(layer_list, 3, 512, 512), 4)
    assert peak == pytest.approx(measured, rel=0.05)


def test_a_mismatch_is_an_error():
    analysis.check("same", 100, 100.5, tolerance=0.01)
    with pytest.raises(UserError, match="the formula says 1, PyTorch 2"):
        analysis.check("parameters", 1, 2)
    with pytest.raises(UserError, match="Sigmoid"):
        analysis.describe([nn.Sigmoid()], 3, 64, 32)


def test_script_end_to_end(tmp_path):
    (tmp_path / "dataset.json").write_text('{"height": 256, "width": 160}', encoding="utf-8")
    done = subprocess.run([sys.executable, str(ROOT / "06_model_analysis.py"), "--data", str(tmp_path), "--batch", "1"],
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for number in range(1, 10):
        assert f"\n{number}. " in done.stdout
    assert done.stdout.count("\n") < 130
    for name in ("layers.png", "receptive_field.png"):
        assert (tmp_path / "results" / name).stat().st_size > 5000


def test_bad_batch_is_refused():
    done = subprocess.run([sys.executable, str(ROOT / "06_model_analysis.py"), "--batch", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "--batch must be at least 1" in done.stderr
