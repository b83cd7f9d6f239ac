"""01_prepare_data.py: boxes into points, images into splits, scaling, arrays, what is told.

Which labels it understands, and what it says of the others, stands in test_labels.py.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import common
from conftest import (ENVIRONMENT, REPOSITORY, call_main, centroid, contents, copy_of, load,
                      paint_dot, run_script, sentence_of, write_example, write_own_pictures)
from test_labels import GOOD, line_with

prepare_data = load("01_prepare_data")
SPLIT_LIST = ["train", "val", "test"]


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    """Run main() from source/ to data/, which must end well; returns what dataset.json says."""
    def call(*arguments, sheet=False):
        if not sheet:  # it takes most of the time
            monkeypatch.setattr(prepare_data, "draw_contact_sheet", lambda *arguments: None)
        arguments = ["--source", tmp_path / "source", "--data", tmp_path / "data", *arguments]
        assert call_main(prepare_data, monkeypatch, *arguments) == (0, "")
        return json.loads((tmp_path / "data" / "dataset.json").read_text(encoding="utf-8"))
    return call


def place_dict(data):
    """File name -> the places (x, y) of its keypoints, over all splits."""
    dataset, found_dict = json.loads((data / "dataset.json").read_text(encoding="utf-8")), {}
    for split in SPLIT_LIST:
        for image, _, x, y in np.load(data / f"{split}_labels.npy").tolist():
            found_dict.setdefault(dataset[split]["file_list"][int(image)], []).append((x, y))
    return found_dict


# ---------------------------------------------------------------- from boxes to points

@pytest.mark.parametrize("first, less, scale", [
    (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, -1, 1), (0, 1, 2), (1, 1, 0.5)], ids=[
    "as it is", "LabelImg", "last pixel: X-AnyLabeling, Supervisely, Label Studio", "one beyond",
    "twice as large", "half as large"])
def test_boxes_cut_by_an_edge_keep_their_points_whatever_a_tool_writes_there(
        tmp_path, prepare, capsys, first, less, scale):
    true_dict = {"left.png": (3, 50), "right.png": (157, 52), "top.png": (70, 4),
                 "bottom.png": (75, 115)}
    for name, (x, y) in true_dict.items():
        box = [max(first, x - 15), max(first, y - 15), min(160 - less, x + 15),
               min(120 - less, y + 15)]
        write_example(tmp_path / "source", name[:-4], [("eye", *box), ("odd", 60, 60, 101, 101)],
                      160, 120)
    for name in "abcdef":  # whole, of the usual size and, 2 px from the edge, a little smaller
        write_example(tmp_path / "source", name, [("eye", 2, 30, 29, 60)] + [
            ("eye", 50, 30, 80, 60)] * 2, 160, 120)
        true_dict[f"{name}.png"] = (15.5, 45)
    dataset = prepare("--scale", scale)
    found_dict = place_dict(tmp_path / "data")
    assert dataset["box_size"] == [30 * scale, 30 * scale]
    for name, (x, y) in true_dict.items():
        assert found_dict[name][0] == pytest.approx((x * scale, y * scale), abs=0.01), name
    assert line_with(capsys.readouterr().out, "cut", "edge", "4 images", ".png")


def test_a_point_far_outside_is_left_out_and_told(tmp_path, prepare, capsys):
    for name, xmin in (("a", 50), ("b", 55), ("c", 60)):  # at x = 65, 70, 75 of 64
        write_example(tmp_path / "source", name, [("eye", xmin, 40, 64, 70), GOOD])
    prepare()
    found_dict = place_dict(tmp_path / "data")
    assert [found_dict[f"{name}.png"][0] for name in "abc"] == [(65, 55), (70, 55), (25, 35)]
    assert line_with(capsys.readouterr().out, "left out", "1 images", "c.png")


def test_what_is_written_as_labelimg_xml_reads_back_equal_and_cut_where_it_sticks_out(tmp_path):
    keypoint_list = [{"class": name, "box": [10.25, 20.5, 40.25, 50.75]}
                     for name in ("eye", "左 <眼> & \"co\"", "🎯", "n" * 500)]
    outside = {"class": "eye", "box": [-5.0, 80.0, 25.0, 110.0]}
    prepare_data.write_labelimg_xml(tmp_path / "a.xml", "a & b.jpg", 64, 96,
                                    [*keypoint_list, outside])
    assert prepare_data.read_labels(tmp_path / "a.xml", 64, 96) == [
        *keypoint_list, {"class": "eye", "box": [0, 80, 25, 96]}]
    text = (tmp_path / "a.xml").read_text(encoding="utf-8")
    assert re.findall(r"<truncated>(\d)", text) == list("00001")
    assert os.listdir(tmp_path) == ["a.xml"]


# ---------------------------------------------------------------- splits

def split_of(name_list, seed=0):
    """File name -> split."""
    split_dict = prepare_data.make_splits({"": [{"path": Path(name)} for name in name_list]}, seed)
    assert sum(map(len, split_dict.values())) == len(name_list)
    return {example["path"].name: split for split, part_list in split_dict.items()
            for example in part_list}


@pytest.mark.parametrize("form", ["IMG_{:04d}.jpg", "{}.png", "frame {:06d}.bmp"])
def test_images_that_are_added_move_none_of_the_others(form):
    name_list = [form.format(number) for number in range(360)]
    before, after = split_of(name_list[::3]), split_of(name_list)
    assert all(after[name] == split for name, split in before.items())
    for split, share in (("train", 0.72), ("val", 0.08), ("test", 0.2)):
        assert abs(list(after.values()).count(split) / 360 - share) < 0.07
    assert split_of(name_list) == after != split_of(name_list, seed=1)


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_each_split_has_an_image_however_few_there_are(count):
    for seed in range(60):
        found_dict = split_of([f"{number}.jpg" for number in range(count)], seed)
        assert set(found_dict.values()) == set(SPLIT_LIST), seed
        example_list = [{"path": Path(f"{number}.jpg")} for number in range(count - 1)]
        split_dict = prepare_data.make_splits({"train": example_list, "test": example_list}, seed)
        assert split_dict["train"] and split_dict["val"]


SOURCE_DICT = {  # case: file -> its boxes
    "no image": {}, "one image": {"a": [GOOD]}, "two images": {"a": [GOOD], "b": [GOOD]},
    "no keypoint": dict.fromkeys("abc", []), "all bad": dict.fromkeys("abc", [("eye", 9, 5, 5, 9)]),
    "no test": {"train/a": [GOOD], "train/b": [GOOD], "train/c": [GOOD]},
    "none in train": {"train/a": [], "train/b": [], "test/d": [GOOD]},
    "all left out": {**dict.fromkeys(["train/a", "train/b"], [("eye", 60, 40, 64, 70)]),
                     "test/d": [GOOD]}}


@pytest.mark.parametrize("arguments", [[], ["--skip-bad"]])
@pytest.mark.parametrize("case", ["missing", *SOURCE_DICT])
def test_a_source_that_cannot_be_used_is_refused_in_one_sentence(
        tmp_path, monkeypatch, case, arguments):
    source = tmp_path / "source"
    if case != "missing":
        (source / "test" if case == "no test" else source).mkdir(parents=True)
    for name, boxes in SOURCE_DICT.get(case, {}).items():
        write_example((source / name).parent, name[-1], boxes)
    arguments = ["--source", source, "--data", tmp_path / "data", *arguments]
    assert str(source) in sentence_of(prepare_data, monkeypatch, *arguments)
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------- arrays

def test_own_images_are_packed_with_their_points(own):
    dataset, array_dict = common.read_data_set(own)
    source = own.parent / "my pictures"
    assert dataset["category_list"] == ["background", "left eye", "right eye"]
    assert dataset["source"] == str(source) and dataset["scale"] == 1 == dataset["max_per_class"]
    assert (dataset["height"], dataset["width"], dataset["box_size"]) == (96, 64, [30, 30])
    for split, (images_4d_array, label_2d_array) in array_dict.items():
        assert images_4d_array.dtype == np.uint8 and label_2d_array.dtype == np.float32
        assert (np.diff(label_2d_array[:, 0]) >= 0).all()  # by image: the loader relies on it
        for index, name in enumerate(dataset[split]["file_list"]):
            x = 20 + 2 * int(name.split(" ")[1].split(".")[0])
            of_image = label_2d_array[label_2d_array[:, 0] == index, 1:].tolist()
            assert of_image == ([[1, x, 30], [2, x, 60]] if x < 38 else [])
            assert np.array_equal(images_4d_array[index], np.asarray(Image.open(source / name)))
    assert not list(own.rglob(".writing-*"))
    assert Image.open(own / "results" / "contact_sheet.png").width > 500


def test_images_of_several_sizes_and_formats_are_padded_and_pixels_have_a_checksum(
        tmp_path, prepare):
    source = tmp_path / "source"
    write_example(source, "tall", [("eye", 10, 20, 40, 50)], width=40, height=100, suffix=".TIF")
    write_example(source, "wide", [("eye", 60, 10, 90, 40)], width=100, height=50, suffix=".webp")
    write_example(source, "b", [("eye", 60, 10, 90, 40)], width=100, height=50, suffix=".JPEG")
    (source / "b.xml").rename(source / "b.XML")
    dataset = prepare()
    assert (dataset["height"], dataset["width"]) == (128, 128)
    for split in SPLIT_LIST:
        (name,), ((width, height),) = dataset[split]["file_list"], dataset[split]["size_list"]
        image, = np.load(tmp_path / "data" / f"{split}_images.npy")
        label, = np.load(tmp_path / "data" / f"{split}_labels.npy")
        assert (width, height) == ((40, 100) if name == "tall.TIF" else (100, 50))
        assert (image[:, width:] == image[:, width - 1:width]).all()
        assert (image[height:] == image[height - 1:height]).all()
        assert label[2:].tolist() == ([25, 35] if name == "tall.TIF" else [75, 25])
        of_file = zlib.crc32(np.asarray(Image.open(source / name)).tobytes())
        assert dataset[split]["checksum_list"] == [of_file]


@pytest.mark.parametrize("width, height, scale", [
    (1000, 801, 0.15), (401, 333, 0.37), (95, 130, 1.7), (640, 480, 1)])
def test_a_label_stays_on_its_dot_through_scaling(tmp_path, prepare, width, height, scale):
    rng, side = np.random.default_rng(0), 15 / scale
    for name in "abc":
        x, y = (rng.uniform(0.35, 0.65, 2) * (width, height)).round(2)
        write_example(tmp_path / "source", name, [("eye", x - side, y - side, x + side, y + side)],
                      width, height)
        image_3d_array = np.zeros((height, width, 3), np.uint8)
        paint_dot(image_3d_array, x, y, sigma=0.05 * min(width, height))
        Image.fromarray(image_3d_array).save(tmp_path / "source" / f"{name}.png")
    dataset = prepare("--scale", scale)
    assert dataset["scale"] == scale and dataset["box_size"] == pytest.approx([30, 30], abs=0.4)
    for split in SPLIT_LIST:
        image_3d_array, = np.load(tmp_path / "data" / f"{split}_images.npy")
        (_, _, x, y), = np.load(tmp_path / "data" / f"{split}_labels.npy")
        (wide, high), = dataset[split]["size_list"]
        assert (wide, high) == (round(width * scale), round(height * scale))
        own_3d_array = np.ascontiguousarray(image_3d_array[:high, :wide])
        assert math.dist(centroid(own_3d_array[:, :, 0]), (x, y)) < 0.05
        assert dataset[split]["checksum_list"] == [zlib.crc32(own_3d_array)]


# ---------------------------------------------------------------- what is told

@pytest.mark.parametrize("side, scale, advice", [
    (204, 1, ["0.15"]), (204, 0.5, ["0.15"]), (10, 1, ["3"]), (22, 1, []), (43, 1, []),
    (204, 0.15, [])])
def test_a_scale_is_advised_where_boxes_are_not_about_30_px(
        tmp_path, prepare, capsys, side, scale, advice):
    for name in "abc":
        write_example(tmp_path / "source", name, [("eye", 50, 50, 50 + side, 50 + side)], 300, 320)
    prepare("--scale", scale)
    said = capsys.readouterr().out
    assert line_with(said, "boxes are", f"{side * scale:g} x ")
    assert re.findall(r"--scale ([\d.]+)", said) == advice


def test_what_each_split_holds_is_a_table(tmp_path, prepare, capsys):
    write_own_pictures(tmp_path / "source" / "train", 3, ["left eye"])
    write_example(tmp_path / "source" / "val", "v", [])
    write_own_pictures(tmp_path / "source" / "test", 3)
    prepare()
    said = capsys.readouterr().out
    for start, count_list in (("images", "313"), ("without", "111"), ("left eye", "202"),
                              ("right eye", "002")):
        line, = [line for line in said.splitlines() if line.strip().startswith(start)]
        assert line.split()[-3:] == list(count_list)
    assert line_with(said, "right eye", "no training image", "2 images", "picture 0.png")


@pytest.mark.parametrize("where, most", [("train", 2), ("val", 1), ("test", 1)])
def test_the_most_of_a_class_is_that_of_training_and_one_stray_label_is_named(
        tmp_path, prepare, capsys, where, most):
    for split in SPLIT_LIST:
        for name in "ab":
            twice = split == where and name == "b"
            write_example(tmp_path / "source" / split, f"{split} {name}", [GOOD] * (1 + twice))
    assert prepare()["max_per_class"] == most
    said = capsys.readouterr().out
    assert line_with(said, "of a class", where, "1 images", f"{where} b.png")
    assert line_with(said, "share a cell", "1 images", f"{where} b.png")


@pytest.fixture
def figure_list(monkeypatch):
    """The figures that 01 makes, beside drawing them."""
    made_list = []
    monkeypatch.setattr(prepare_data, "Figure", lambda *arguments, **options: made_list.append(
        Figure(*arguments, **options)) or made_list[-1])
    return made_list


@pytest.mark.filterwarnings("error")
def test_the_contact_sheet_shows_the_points_that_are_trained_and_whose_they_are(
        tmp_path, prepare, capsys, figure_list):
    class_list = ["$\\frac$", "右眼", "wheel_of_a_long_trailer_in", "wheel_of_a_long_trailer_out"]
    image_3d_array = np.zeros((96, 64, 3), np.uint8)
    paint_dot(image_3d_array, 25, 35, sigma=2)
    for name in [f"a_day_with_a_long_name_{number}" for number in range(6)]:
        write_example(tmp_path / "source", name, [(of, 10, 20, 40, 50) for of in class_list])
        Image.fromarray(image_3d_array).save(tmp_path / "source" / f"{name}.png")
    dataset = prepare(sheet=True)
    figure, = figure_list
    count = 4 * len(dataset["train"]["file_list"])
    title_list = ["".join(axes.get_title().split()) for axes in figure.axes]
    assert f"{count} of {count}" in figure.get_suptitle()
    assert len(title_list) == len(set(title_list)) == count
    for word, times in (*((name[-8:], 4) for name in dataset["train"]["file_list"]),
                        *((word, count / 4) for word in ("$\\frac$", "class", "_in", "_out"))):
        assert sum(word in title for title in title_list) == times, word
    for axes in figure.axes:
        assert axes.get_xlim() == (-20, 70) and axes.get_ylim() == (80, -10)
        assert [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines] == [(25, 35)]
        left, _, _, top = axes.images[0].get_extent()
        x, y = centroid(np.asarray(axes.images[0].get_array())[:, :, 0])
        assert math.dist((left + x, top + y), (25, 35)) < 0.1
    assert line_with(capsys.readouterr().out, "右眼 as class ")


# ---------------------------------------------------------------- never half old, never half new

def is_whole(data):
    try:
        return bool(common.read_data_set(data))
    except common.UserError as error:
        assert "01_prepare_data.py" in str(error)
        return False


@pytest.mark.parametrize("error", [
    KeyboardInterrupt(), OSError(28, "No space left on device", "test_images.npy")])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_data_folder_made_anew_is_never_half_old(
        tmp_path, prepare, monkeypatch, own, error, steps):
    """Stopped after so many steps of writing it is no data set; repeated, it is the new one."""
    data, count, real = copy_of(own, tmp_path / "data"), 0, prepare_data.pack_images
    source = write_own_pictures(tmp_path / "source", 5, ["nose"])

    def step(*arguments):
        nonlocal count
        count += 1
        if count > steps:
            raise error
        return real(*arguments)
    with monkeypatch.context() as stopped:
        for name in ("pack_images", "draw_contact_sheet"):
            stopped.setattr(prepare_data, name, step)
        code, said = call_main(prepare_data, stopped, "--source", source, "--data", data)
    assert code == 1 and ("stopped" in said or "No space left" in said)
    assert not is_whole(data) and not list(data.rglob(".writing-*"))
    dataset = prepare()
    assert is_whole(data) and dataset["category_list"] == ["background", "nose"]


def test_a_bad_source_and_a_disk_that_is_too_small_leave_the_data_set_made_before(
        tmp_path, monkeypatch, own):
    data = copy_of(own, tmp_path / "data")
    (tmp_path / "empty").mkdir()
    before = contents(data)
    sentence_of(prepare_data, monkeypatch, "--source", tmp_path / "empty", "--data", data)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    source = own.parent / "my pictures"
    sentence = sentence_of(prepare_data, monkeypatch, "--source", source, "--data", data)
    assert str(data) in sentence and "GB" in sentence and "--scale" in sentence
    assert contents(data) == before


def test_the_source_stays_as_it_is_also_inside_of_the_data_folder(tmp_path, prepare):
    source = write_own_pictures(tmp_path / "data" / "images", 5)
    before = contents(source)
    for _ in range(2):
        prepare("--source", source)
    result = run_script("01_prepare_data.py", "--data", source.parent)  # would draw into images/
    assert result.returncode == 1 and str(source) in result.stderr
    assert "Traceback" not in result.stderr and contents(source) == before
    assert is_whole(source.parent)


posix = pytest.mark.skipif(os.name == "nt" or not shutil.which("ps"), reason="needs POSIX and ps")


@posix
@pytest.mark.parametrize("closed, code", [("| head -1", 141), (">&-", 0)])
def test_an_output_that_nobody_reads_ends_without_a_traceback(tmp_path, closed, code):
    source = write_own_pictures(tmp_path / "source", 4)
    line = shlex.join(map(str, [sys.executable, REPOSITORY / "01_prepare_data.py", "--source",
                                source, "--data", tmp_path / "data"]))
    result = subprocess.run(["bash", "-c", f"{line} {closed}; echo ${{PIPESTATUS[0]}} >&2"],
                            capture_output=True, text=True, env=ENVIRONMENT)
    assert result.stderr == f"{code}\n" and result.stdout.count("\n") == (code == 141)


def processes_of_group(number):
    """Process numbers of a group that are alive, zombies left out."""
    result = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True)
    return [int(pid) for pid, group, state in map(str.split, result.stdout.splitlines())
            if int(group) == number and not state.startswith("Z")]


def wait_until(is_so, seconds):
    end_time = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end_time
        time.sleep(0.05)


@posix
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_who_stops_the_drawing_stops_all_its_processes(tmp_path, how):
    line = [sys.executable, str(REPOSITORY / "01_prepare_data.py"), "--data", str(tmp_path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          start_new_session=True, env=ENVIRONMENT, preexec_fn=lambda: signal.signal(
                              signal.SIGINT, signal.SIG_DFL)) as process:
        try:
            wait_until(lambda: len(list(tmp_path.glob("images/*.xml"))) >= 2, 100)
            assert len(processes_of_group(process.pid)) >= 3  # 01, the drawing, its workers
            if how == "Ctrl-C":  # a terminal sends it to all processes of the group
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.send_signal(getattr(signal, how))
            output, _ = process.communicate(timeout=30)  # half a second on a quiet machine
            assert process.returncode != 0 and "Traceback" not in output, output
            wait_until(lambda: not processes_of_group(process.pid), 2)
        finally:
            if processes_of_group(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "dataset.json").exists()
