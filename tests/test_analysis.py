"""06_model_analysis.py: formulas against answers worked by hand, and against what PyTorch does."""

import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common
from common import UserError
from conftest import call_main, load, noise_image, run_script

analysis, model = load("06_model_analysis"), load("02_model")


def small_layer_list():
    """A network for which everything can be worked out on paper."""
    return [nn.Conv2d(3, 4, 6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 2, 2, bias=False), nn.Conv2d(4, 5, 3, 1, 1)]


def real_layer_list():
    network = model.KeypointNet(class_count=3)
    return [*network.body, network.head]


def grouped_layer_list():
    return [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 5, 1, 2, groups=4),
            nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 3, 2, 1, groups=2, bias=False)]


def write_data_set(folder, height, width):
    """A data set of two noisy pictures and one label, as 01_prepare_data.py writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        images = np.stack([np.asarray(noise_image(i, height, width)) for i in range(2)])
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", np.array([[0, 1, 9, 9]], np.float32))
    splits = {split: {"file_list": ["a.png", "b.png"], "size_list": [[width, height]] * 2}
              for split in ("train", "val", "test")}
    about = {"category_list": ["background", "keyPoint_1", "keyPoint_2"], "box_size": [30, 30],
             "max_per_class": 1, "height": height, "width": width}
    (folder / "dataset.json").write_text(json.dumps({**about, **splits}), encoding="utf-8")
    return folder


@pytest.fixture
def fast(monkeypatch):
    """Times are measured once: they mean nothing, but all chapters run."""
    monkeypatch.setattr(analysis, "RUNS", 1)


# ---------------------------------------------------------------- formulas

def test_shapes_parameters_and_work_by_hand():
    row_list = analysis.describe(small_layer_list(), 3, 64, 32)
    # (64 + 2 - 6) / 4 + 1 = 16, (32 + 2 - 6) / 4 + 1 = 8; 2x2 halves; 3x3, padding 1 keeps
    assert [row["out_shape"] for row in row_list] == [
        (4, 16, 8), (4, 16, 8), (4, 16, 8), (4, 8, 4), (5, 8, 4)]
    # 6*6*3*4, 2*4, -, 2*2*4*4, 3*3*4*5 + 5; the convolutions' weights times 16*8, 8*4 and 8*4
    assert [row["parameters"] for row in row_list] == [432, 8, 0, 64, 185]
    assert [row["multiply_adds"] for row in row_list] == [55296, 0, 0, 2048, 5760]
    assert [row["name"] for row in row_list] == ["conv 1", "BN 1", "ReLU 1", "conv 2", "conv 3"]


def test_odd_lengths_are_rounded_down():
    row, = analysis.describe([nn.Conv2d(1, 1, 3, 2, 0, bias=False)], 1, 10, 9)
    assert row["out_shape"] == (1, 4, 4)  # (10 - 3) / 2 + 1 = 4.5, (9 - 3) / 2 + 1 = 4


def test_groups_and_biases_are_counted():
    layer_list = grouped_layer_list()
    row_list = analysis.describe(layer_list, 3, 64, 32)
    assert [row["formula"] for row in row_list if row["formula"]] == [
        "3x3x3x8 + 8", "5x5x2x12 + 12", "2x12", "3x3x6x6"]
    assert [row["parameters"] for row in row_list] == [
        sum(p.numel() for p in layer.parameters()) for layer in layer_list]
    with FlopCounterMode(display=False) as counter:
        output_4d = nn.Sequential(*layer_list)(torch.zeros(1, 3, 64, 32))
    assert row_list[-1]["out_shape"] == output_4d.shape[1:]
    assert 2 * sum(row["multiply_adds"] for row in row_list) == counter.get_total_flops()


def test_receptive_field_by_hand():
    row_list = analysis.describe(small_layer_list(), 3, 64, 32)
    # conv 1: 6 px, next cell 4 px on, its pixels -1 to 4: centre 2. conv 2: 4 px more, centre
    # between two cells, 2 px on. conv 3: two cells of 8 px more, the centre stays.
    seen_list = [(row["size"], row["jump"], row["centre"]) for row in row_list if "size" in row]
    assert seen_list == [(6, 4, 2.0), (10, 8, 4.0), (26, 8, 4.0)]


@pytest.mark.parametrize("build", [small_layer_list, grouped_layer_list, real_layer_list])
def test_the_real_gradient_reaches_as_far_as_the_formula_says(build):
    layer_list = build()
    row_list = analysis.describe(layer_list, 3, 320, 320)
    nn.Sequential(*layer_list).eval()
    map_2d_array = analysis.print_receptive_field(row_list)
    assert len(map_2d_array) > row_list[-1]["size"] == np.count_nonzero(map_2d_array.any(axis=0))
    row_list[-1]["size"] += 1
    with pytest.raises(UserError, match="the formula says"):
        analysis.print_receptive_field(row_list)


@pytest.mark.parametrize("kernel, padding, off", [(3, 1, -15.5), (4, 1, 0.0), (4, 0, 31.0)])
def test_the_real_gradient_lies_where_the_formula_says(kernel, padding, off):
    layer_list = [nn.Conv2d(3 if i == 0 else 2, 2, kernel, 2, padding) for i in range(5)]
    row_list = analysis.describe(layer_list, 3, 320, 320)
    assert row_list[-1]["centre"] - row_list[-1]["jump"] / 2 == off
    analysis.print_receptive_field(row_list)


def test_formulas_of_02_and_06_are_one():
    row_list = analysis.describe(real_layer_list(), 3, 1920, 320)
    last = row_list[-1]
    assert (last["size"], last["jump"], last["centre"]) == model.receptive_field()
    assert round(sum(row["multiply_adds"] for row in row_list) / 1e6, 1) == 560.7


# ---------------------------------------------------------------- memory

def test_memory_by_hand():
    row_list = analysis.describe(small_layer_list(), 3, 64, 32)
    saved_list, peak = analysis.predict_memory(row_list, batch=2)
    picture, wide, pooled = (4 * 2 * n for n in (3 * 64 * 32, 4 * 16 * 8, 4 * 8 * 4))  # bytes
    # conv 1 its input; BN its input, 4 means and 4 deviations; ReLU its output, which is
    # conv 2's input; conv 3 its input
    assert saved_list == [picture, wide + 32, wide, 0, pooled]
    # ReLU's turn, when the first three are still there, with the gradient that comes and the one
    # that goes; or conv 3's
    assert peak == max(picture + 2 * wide + 32 + 2 * wide,
                       sum(saved_list) + 4 * 2 * 5 * 8 * 4 + pooled)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("build", [small_layer_list, grouped_layer_list])
def test_memory_prediction_is_what_autograd_saves(build, inplace):
    layer_list = build()
    for layer in layer_list:
        if isinstance(layer, nn.ReLU):
            layer.inplace = inplace
    saved_list, _ = analysis.predict_memory(analysis.describe(layer_list, 3, 64, 32), 2)
    assert analysis.saved_bytes(layer_list, analysis.random_pictures(2, 64, 32)) == saved_list


@pytest.mark.parametrize("batch, height, width", [(1, 320, 96), (3, 128, 128)])
def test_the_real_network_within_one_percent(batch, height, width):
    layer_list = real_layer_list()
    saved_list, _ = analysis.predict_memory(analysis.describe(layer_list, 3, height, width), batch)
    measured_list = analysis.saved_bytes(layer_list, analysis.random_pictures(batch, height, width))
    assert sum(saved_list) == pytest.approx(sum(measured_list), rel=0.01)


@pytest.mark.parametrize("build", [real_layer_list, small_layer_list])
def test_peak_is_what_the_allocator_hands_out(build):
    """PyTorch's profiler sees every allocation on a CPU; small kernels borrow little."""
    layer_list = build()
    network, images_4d = nn.Sequential(*layer_list), analysis.random_pictures(4, 512, 512)
    network(images_4d.float()).sum().backward()  # gradients exist from here on
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profiler:
        network(images_4d.float()).sum().backward()
    event_list = [(event.start_ns(), event.nbytes())
                  for event in profiler.profiler.kineto_results.events()
                  if event.name() == "[memory]"]
    held = measured = 0
    for _, change in sorted(event_list):
        held += change
        measured = max(measured, held)
    _, peak = analysis.predict_memory(analysis.describe(layer_list, 3, 512, 512), 4)
    assert peak == pytest.approx(measured, rel=0.05)


# ---------------------------------------------------------------- the chapters

def test_a_mismatch_is_an_error():
    analysis.check("same", 100, 100.5, tolerance=0.01)
    analysis.check("same", (8, 32, 16), torch.Size((8, 32, 16)))
    with pytest.raises(UserError, match="the formula says 1, PyTorch 2"):
        analysis.check("parameters", 1, 2)
    with pytest.raises(UserError, match="Sigmoid"):
        analysis.describe([nn.Sigmoid()], 3, 64, 32)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (2528, 64)])
def test_small_and_narrow_pictures_are_enough(fast, tmp_path, monkeypatch, capsys, height, width):
    """A picture of one cell ended chapter 5 in a traceback; one narrower than what a cell sees
    made chapter 4 tell the crop's size as the network's.
    """
    seen = {}
    monkeypatch.setattr(analysis, "draw_receptive_field",
                        lambda path, map_2d_array, size: seen.update(map=map_2d_array, size=size))
    data = write_data_set(tmp_path / "data", height, width)
    assert call_main(analysis, monkeypatch, "--data", data, "--batch", 1) == (0, "")
    output = capsys.readouterr().out
    assert f"[1, 3, {max(64, height)}, {max(64, width)}] on cpu" in output
    assert len(seen["map"]) > seen["size"] == model.receptive_field()[0]
    # The prior is in the middle, and the gradient reaches as far to both sides.
    column_1d_array = np.flatnonzero(seen["map"].any(axis=0))
    assert column_1d_array[0] + column_1d_array[-1] + 1 == len(seen["map"])
    assert len(column_1d_array) == seen["size"] > 64  # px: not cut by the picture's width
    # The picture says what is printed.
    chapter = output[output.index("\n4. "):output.index("\n5. ")]
    head_line, = (line for line in chapter.splitlines() if "head" in line)
    assert head_line.split()[-2:] == [str(seen["size"])] * 2  # by formula, by gradient


@pytest.mark.filterwarnings("error")
def test_other_layers_are_followed_and_any_name_of_the_folder(fast, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "LAYER_LIST", [(6, 4, 1, 4), (3, 1, 1, 6), (4, 2, 1, 8),
                                              (6, 4, 1, 8), (4, 2, 1, 8)])  # 64 px to a cell
    data = write_data_set(tmp_path / "data 数据 $x$ $\\frac$", 256, 160)
    assert call_main(analysis, monkeypatch, "--data", data, "--batch", 1) == (0, "")
    output = capsys.readouterr().out
    assert "untrained network" in output and "6x6x8x8" in output


def test_the_default_folder_shows_the_sample_picture(fast, tmp_path, monkeypatch, capsys):
    """Whatever data set it holds, so that all readers see the figures of the README."""
    write_data_set(tmp_path, 96, 64)
    monkeypatch.setattr(common, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(analysis, "draw_receptive_field", lambda *arguments: None)
    assert call_main(analysis, monkeypatch, "--batch", 1) == (0, "")
    assert "a picture: torch.uint8 [1, 3, 1920, 320]" in capsys.readouterr().out


@pytest.mark.parametrize("is_there", [True, False])
def test_cv2_is_compared_where_there_is_one(fast, monkeypatch, capsys, is_there):
    fake = types.ModuleType("cv2")
    fake.IMREAD_COLOR = 1
    fake.imdecode = lambda array, flag: analysis.read_image(
        analysis.io.BytesIO(array.tobytes()))[..., ::-1]
    monkeypatch.setitem(sys.modules, "cv2", fake if is_there else None)
    analysis.print_readers(np.asarray(noise_image(0)))
    output = capsys.readouterr().out
    assert ("100.0%" in output) == is_there
    assert ("pip install opencv-python-headless" in output) != is_there


def test_the_threads_chapter_has_a_row_for_each_kind_of_job(fast, monkeypatch, capsys):
    monkeypatch.setattr(analysis, "best_ms", lambda function: (function(), 1.0)[1])
    analysis.print_threads()
    output = capsys.readouterr().out
    for name in ("sleep", "numpy", "PyTorch", "plain Python"):
        assert re.search(rf"^   {name} +1\.00 +1\.00$", output, re.MULTILINE)


def test_script_end_to_end(tmp_path):
    done = run_script("06_model_analysis.py", "--data", write_data_set(tmp_path, 256, 160),
                      "--batch", 1)
    assert done.returncode == 0, done.stderr
    for number in range(1, 10):
        assert f"\n{number}. " in done.stdout
    assert done.stdout.count("\n") < 160 and "[1, 3, 256, 160]" in done.stdout
    for name in ("layers.png", "receptive_field.png"):
        with Image.open(tmp_path / "results" / name) as image:
            assert min(image.size) > 300


def test_bad_batches_are_refused(monkeypatch):
    for batch in (0, 101, 10 ** 9):
        assert call_main(analysis, monkeypatch, "--batch", batch)[0] == 2
