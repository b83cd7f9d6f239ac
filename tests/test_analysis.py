"""06_model_analysis.py: formulas against answers worked by hand, and against what PyTorch does."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common
from common import UserError, read_image
from conftest import REPOSITORY, call_main, load, noise_image

analysis, model = load("06_model_analysis"), load("02_model")


def small_layer_list():  # everything can be worked out on paper
    return [nn.Conv2d(3, 4, 6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 2, 2, bias=False), nn.Conv2d(4, 5, 3, 1, 1)]


def real_layer_list():
    network = model.KeypointNet(class_count=3)
    return [*network.body, network.head]


def grouped_layer_list():
    return [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 5, 1, 2, groups=4),
            nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 3, 2, 1, groups=2, bias=False)]


def other_order_list():
    return [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 4, 2, 1)]


def shifted_layer_list():  # with 3x3 kernels a cell looks elsewhere than its prior is
    return [nn.Conv2d(3 if i == 0 else 2, 2, 3, 2, 1) for i in range(5)]


every_network = pytest.mark.parametrize("build", [
    small_layer_list, grouped_layer_list, real_layer_list, other_order_list, shifted_layer_list])


def random_images(count, height, width):  # in memory as images are
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run 06 on a noisy image; returns what it printed. It times two runs only."""
    def run_on(height, width, folder=tmp_path):
        image = np.asarray(noise_image(0, height, width))
        monkeypatch.setattr(model, "example", lambda data_folder: (image, None))
        assert call_main(analysis, monkeypatch, "--data", folder, "--batch", 1) == (0, "")
        return capsys.readouterr().out
    monkeypatch.setattr(analysis, "RUNS", 2)
    return run_on


def test_shapes_parameters_and_work_by_hand():
    row_list = analysis.describe(small_layer_list(), 3, 64, 32)
    # (64 + 2 - 6) / 4 + 1 = 16, (32 + 2 - 6) / 4 + 1 = 8; 2x2 halves; 3x3, padding 1 keeps
    assert [row["out_shape"] for row in row_list] == 3 * [(4, 16, 8)] + [(4, 8, 4), (5, 8, 4)]
    # 6*6*3*4, 2*4, -, 2*2*4*4, 3*3*4*5 + 5; the convolutions' weights times 16*8, 8*4 and 8*4
    assert [row["parameters"] for row in row_list] == [432, 8, 0, 64, 185]
    assert [row["multiply_adds"] for row in row_list] == [55296, 0, 0, 2048, 5760]
    assert [row["name"] for row in row_list] == ["conv 1", "BN 1", "ReLU 1", "conv 2", "conv 3"]
    row, = analysis.describe([nn.Conv2d(1, 1, 3, 2, 0, bias=False)], 1, 10, 9)
    assert row["out_shape"] == (1, 4, 4)  # (10 - 3) / 2 + 1 = 4.5, (9 - 3) / 2 + 1 = 4
    row_list = analysis.describe(grouped_layer_list(), 3, 64, 32)
    assert [row["formula"] for row in row_list if row["formula"]] == [
        "3x3x3x8 + 8", "5x5x2x12 + 12", "2x12", "3x3x6x6"]


@every_network
def test_shapes_parameters_and_work_are_pytorch_s(build):
    layer_list = build()
    row_list = analysis.describe(layer_list, 3, 64, 64)
    assert [row["parameters"] for row in row_list] == [
        sum(p.numel() for p in layer.parameters()) for layer in layer_list]
    with FlopCounterMode(display=False) as counter:
        output_4d = nn.Sequential(*layer_list)(torch.zeros(2, 3, 64, 64))  # BN: more than one
    assert row_list[-1]["out_shape"] == output_4d.shape[1:]
    assert 2 * 2 * sum(row["multiply_adds"] for row in row_list) == counter.get_total_flops()


def test_receptive_field_by_hand():
    row_list = analysis.describe(small_layer_list(), 3, 64, 32)
    # conv 1: 6 px, next cell 4 px on, its pixels -1 to 4: centre 2. conv 2: 4 px more, centre
    # between two cells, 2 px on. conv 3: two cells of 8 px more, the centre stays.
    assert [row["field"] for row in row_list if row["kind"] == "conv"] == [
        (6, 4, 2.0), (10, 8, 4.0), (26, 8, 4.0)]
    assert analysis.describe(shifted_layer_list(), 3, 64, 64)[-1]["field"] == (63, 32, 16 - 15.5)
    row_list = analysis.describe(real_layer_list(), 3, 1920, 320)
    assert row_list[-1]["field"] == model.receptive_field() == (142, 32, 16.0)
    assert sum(row["multiply_adds"] for row in row_list) == 560_716_800  # told in docs/faq.md


@every_network
def test_the_real_gradient_reaches_as_far_as_the_formula_says(build):
    layer_list = build()
    row_list = analysis.describe(layer_list, 3, 320, 320)
    nn.Sequential(*layer_list).eval()
    map_2d_array = analysis.print_receptive_field(row_list)
    size, jump, centre = row_list[-1]["field"]
    assert len(map_2d_array) > size == np.count_nonzero(map_2d_array.any(axis=0))
    for wrong in ((size + 1, jump, centre), (size, jump, centre + 0.5)):
        row_list[-1]["field"] = wrong
        with pytest.raises(UserError, match="the formula says"):
            analysis.print_receptive_field(row_list)


def test_memory_by_hand():
    row_list = analysis.describe(small_layer_list(), 3, 64, 32)
    saved_list = analysis.predict_saved(row_list, batch=2)
    image, wide, pooled = (4 * 2 * n for n in (3 * 64 * 32, 4 * 16 * 8, 4 * 8 * 4))  # bytes
    # conv 1 its input; BN its input, 4 means and 4 deviations; ReLU its output, which is
    # conv 2's input; conv 3 its input
    assert saved_list == [image, wide + 32, wide, 0, pooled]
    # ReLU's turn, when the first three are there, with two gradients; or conv 3's
    assert analysis.predict_peak(row_list, batch=2) == max(
        image + 2 * wide + 32 + 2 * wide, sum(saved_list) + 4 * 2 * 5 * 8 * 4 + pooled)


@pytest.mark.parametrize("batch, height, width", [(1, 320, 96), (2, 64, 32), (3, 128, 128)])
@pytest.mark.parametrize("inplace", [True, False])
@every_network
def test_memory_prediction_is_what_autograd_saves(build, inplace, batch, height, width):
    layer_list = build()
    for layer in layer_list:
        layer.inplace = inplace  # a ReLU's; it means nothing to the others
    row_list = analysis.describe(layer_list, 3, height, width)
    measured_list = analysis.saved_bytes(layer_list, random_images(batch, height, width))
    assert measured_list == analysis.predict_saved(row_list, batch)  # to the byte


@pytest.mark.parametrize("build", [real_layer_list, small_layer_list])
def test_peak_is_what_the_allocator_hands_out(build):
    """PyTorch's profiler sees every allocation on a CPU; small kernels borrow little."""
    layer_list, images_4d = build(), random_images(4, 512, 512)
    network = nn.Sequential(*layer_list)
    network(images_4d.float()).sum().backward()  # gradients exist from here on
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        network(images_4d.float()).sum().backward()
    change_list = sorted((event.start_ns(), event.nbytes())
                         for event in profiler.profiler.kineto_results.events()
                         if event.name() == "[memory]")
    measured = np.cumsum([change for _, change in change_list]).max()
    peak = analysis.predict_peak(analysis.describe(layer_list, 3, 512, 512), 4)
    assert peak == pytest.approx(measured, rel=0.05)


def test_a_mismatch_is_an_error():
    analysis.check("same", 100, 100.5, tolerance=0.01)
    analysis.check("same", (8, 32, 16), torch.Size((8, 32, 16)))
    with pytest.raises(UserError, match="the formula says 1, PyTorch 2"):
        analysis.check("parameters", 1, 2)
    with pytest.raises(UserError, match="Sigmoid"):
        analysis.describe([nn.Sigmoid()], 3, 64, 32)


@pytest.mark.parametrize("name", ["predict_saved", "saved_bytes", "held_bytes"])
def test_one_wrong_byte_ends_the_memory_chapter(monkeypatch, name):
    network, right = model.KeypointNet(3), getattr(analysis, name)
    row_list = analysis.describe([*network.body, network.head], 3, 64, 64)
    analysis.print_memory(row_list, network, 1)
    monkeypatch.setattr(analysis, name, lambda *arguments: 1 + np.array(right(*arguments)))
    with pytest.raises(UserError, match="bytes, "):
        analysis.print_memory(row_list, network, 1)


@pytest.mark.parametrize("factor, is_told", [(1.0, False), (2.0, True)])
def test_a_busy_machine_is_told(monkeypatch, capsys, factor, is_told):
    monkeypatch.setattr(analysis, "times_of", lambda *arguments: [5, 5, 5 * factor, 5 * factor])
    network = model.KeypointNet(3).eval()
    row_list = analysis.describe([*network.body, network.head], 3, 64, 64)
    analysis.print_work(row_list, network, random_images(1, 64, 64))
    output = capsys.readouterr().out
    assert ("busy" in output) == is_told and output.count("conv") == 9 and "ReLU 1" not in output


@pytest.mark.parametrize("height, width", [(32, 32), (2528, 64)])
def test_small_and_narrow_images_are_enough(run, monkeypatch, height, width):
    """An image of one cell, and one narrower than what a cell sees, once failed."""
    seen_list = []
    monkeypatch.setattr(analysis, "draw_receptive_field",
                        lambda *arguments: (seen_list.extend(arguments), analysis.Figure())[1])
    assert f"[1, 3, {max(64, height)}, {max(64, width)}] on cpu" in run(height, width)
    map_2d_array, size = seen_list
    column_1d_array = np.flatnonzero(map_2d_array.any(axis=0))
    assert column_1d_array[0] + column_1d_array[-1] + 1 == len(map_2d_array) > size  # in the middle
    assert len(column_1d_array) == size == model.receptive_field()[0]


@pytest.mark.filterwarnings("error")
def test_other_layers_are_followed_and_any_name_of_the_folder(run, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "LAYER_LIST", [(6, 4, 1, 4), (3, 1, 1, 6), (4, 2, 1, 8),
                                              (6, 4, 1, 8), (4, 2, 1, 8)])  # 64 px to a cell
    output = run(256, 160, tmp_path / "data 数据 $x$ $\\frac$")
    assert "untrained network" in output and "6x6x8x8" in output


def test_the_default_folder_shows_the_sample_image(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(REPOSITORY / "data" / "sample", tmp_path / "sample")
    monkeypatch.setattr(common, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(model, "DATA_FOLDER", tmp_path)
    assert call_main(analysis, monkeypatch, "--batch", 1) == (0, "")
    output = capsys.readouterr().out
    assert "an image: torch.uint8 [1, 3, 1920, 320]" in output and "29.3" in output
    assert all(f"\n{number}. " in output for number in range(1, 7)) and output.count("\n") < 120
    for name in ("layers.png", "receptive_field.png"):
        assert min(read_image(tmp_path / "results" / name).shape[:2]) > 300


@pytest.mark.parametrize("batch", [0, 101, 10 ** 9])
def test_bad_batches_are_refused(monkeypatch, batch):
    assert call_main(analysis, monkeypatch, "--batch", batch)[0] == 2
