"""05_predict.py on the command line: drawn images, maps, JSON, LabelImg XML and the way into 01.

Nothing of the user's is written over. What bad images do stands here, too: a user meets both.
"""

import json
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from conftest import (ENVIRONMENT, REPOSITORY, call_main, contents, load, noise_image,
                      run_script, save_weights, sentence_of)

model, prepare, predict = load("02_model"), load("01_prepare_data"), load("05_predict")

ABOUT = {"category_list": ["background", "keyPoint_1", "keyPoint_2"], "box_size": [30.0, 30.0],
         "max_per_class": 1, "scale": 1.0}


@pytest.fixture
def data(tmp_path) -> Path:
    """A data folder with untrained weights and three samples."""
    save_weights(tmp_path / "data")
    (tmp_path / "data" / "sample").mkdir()
    for seed in range(3):
        noise_image(seed).save(tmp_path / "data" / "sample" / f"{seed}.png")
    return tmp_path / "data"


def call(monkeypatch, capsys, *arguments) -> str:
    """Run the script's main() as a command line would, to a good end; returns what it printed."""
    assert call_main(predict, monkeypatch, *arguments) == (0, "")
    return capsys.readouterr().out


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what it finds and writes

@pytest.mark.filterwarnings("error")
def test_the_samples_of_the_repository_are_found_where_their_labels_say(tmp_path):
    """The first thing that a user does, with the weights that come along."""
    result = run_script("05_predict.py", "--json", tmp_path / "found.json",
                        "--out", tmp_path / "out")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    entry_list = read_json(tmp_path / "found.json")
    count_list = [len(entry["keypoints"]) for entry in entry_list]
    images, empty = len(count_list), count_list.count(0)
    assert f"{sum(count_list)} keypoints in {images - empty} of {images} images, {empty} without " \
        "any" in result.stdout
    assert images > empty > 0
    for entry in entry_list:
        label_list = []
        for item in ElementTree.parse(Path(entry["image"]).with_suffix(".xml")).iter("object"):
            xmin, ymin, xmax, ymax = (float(value.text) for value in item.find("bndbox"))
            label_list.append((item.findtext("name"), (xmin + xmax) / 2, (ymin + ymax) / 2))
        assert len(label_list) == len(entry["keypoints"])
        for keypoint, (name, x, y) in zip(entry["keypoints"], sorted(label_list)):
            assert keypoint["class"] == name
            assert (keypoint["x"], keypoint["y"]) == pytest.approx((x, y), abs=3)


def test_json_has_the_format_of_the_design_and_drawn_images_their_size(
        data, tmp_path, monkeypatch, capsys):
    found = tmp_path / "new" / "found.json"
    call(monkeypatch, capsys, "--data", data, "--threshold", 0, "--json", found,
         "--out", tmp_path / "drawn")
    entry_list = read_json(found)
    assert [entry["image"] for entry in entry_list] == [
        str(data / "sample" / f"{i}.png") for i in range(3)]
    for entry in entry_list:
        assert list(entry) == ["image", "keypoints"]
        assert [k["class"] for k in entry["keypoints"]] == ["keyPoint_1", "keyPoint_2"]
        for keypoint in entry["keypoints"]:
            assert list(keypoint) == ["class", "x", "y", "score", "box"]
            xmin, ymin, xmax, ymax = keypoint["box"]
            assert (xmax - xmin, ymax - ymin) == pytest.approx((30, 30), abs=0.002)
            middle = (xmin + xmax) / 2, (ymin + ymax) / 2
            assert middle == pytest.approx((keypoint["x"], keypoint["y"]), abs=0.002)
            assert keypoint["x"] == round(keypoint["x"], 3)
            assert keypoint["score"] == round(keypoint["score"], 6)
    assert names_in(tmp_path / "drawn") == ["0001_0.jpg", "0002_1.jpg", "0003_2.jpg"]
    with Image.open(tmp_path / "drawn" / "0001_0.jpg") as drawn:
        assert drawn.size == (64, 96)


def test_with_json_alone_nothing_is_drawn(data, tmp_path, monkeypatch, capsys):
    call(monkeypatch, capsys, "--data", data, "--json", tmp_path / "found.json")
    assert names_in(data / "results" / "predictions") == []
    call(monkeypatch, capsys, "--data", data, "--json", tmp_path / "again.json", "--map")
    assert {name[-8:] for name in names_in(data / "results" / "predictions")} == {"_map.png"}


def test_a_score_counts_unrounded(data, tmp_path, monkeypatch, capsys):
    keypoint = {"class": "keyPoint_1", "x": 5.00049, "y": 6.0, "score": 0.99999997,
                "box": [0.0, 0.0, 10.0, 12.0]}
    asked_list = []
    monkeypatch.setattr(model, "find_keypoints", lambda network, about_dict, image, threshold: (
        asked_list.append(threshold), ([dict(keypoint)], np.zeros((2, 3, 2), np.float32)))[1])
    call(monkeypatch, capsys, "--data", data, "--threshold", 0.9999999, "--json",
         tmp_path / "found.json")
    assert asked_list == [0.9999999] * 3
    found, = read_json(tmp_path / "found.json")[0]["keypoints"]
    assert (found["x"], found["score"]) == (5.0, 1.0)


def test_a_threshold_that_nothing_reaches_is_never_shown_as_reached(data, monkeypatch, capsys):
    maps = np.full((2, 3, 2), 0.99998, np.float32)
    monkeypatch.setattr(model, "find_keypoints", lambda *arguments: ([], maps))
    output = call(monkeypatch, capsys, "--data", data, "--threshold", 1)
    assert output.count("keyPoint_1 0.999, keyPoint_2 0.999") == 3 and "1.000" not in output
    assert "0 keypoints in 0 of 3 images, 3 without any" in output


def test_images_of_one_name_do_not_overwrite_each_other(data, tmp_path, monkeypatch, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        noise_image(1).save(tmp_path / folder / "same.png")
    noise_image(2).save(tmp_path / "b" / "same.jpg")
    out = tmp_path / "out"
    call(monkeypatch, capsys, tmp_path / "a", tmp_path / "b", tmp_path / "a" / "same.png",
         "--data", data, "--out", out, "--xml", "--map")
    name_list = [f"000{number}_same" for number in (1, 2, 3)]  # one was named twice
    assert names_in(out) == sorted([*(f"{name}.jpg" for name in name_list), "labelimg",
                                    *(f"{name}_map.png" for name in name_list)])
    assert names_in(out / "labelimg") == ["0001_same.png", "0001_same.xml", "0002_same.jpg",
                                          "0002_same.xml", "0003_same.png", "0003_same.xml"]


def test_the_next_line_can_be_typed_as_it_stands(data, tmp_path, monkeypatch, capsys):
    mine = data.rename(tmp_path / "my data")
    next_line = call(monkeypatch, capsys, "--data", mine).splitlines()[-1]
    words = shlex.split(next_line.removeprefix("next: "))
    assert words[1].endswith("06_model_analysis.py") and words[2:] == ["--data", str(mine)]
    out = tmp_path / "round 2"
    next_line = call(monkeypatch, capsys, "--data", mine, "--xml", "--out", out).splitlines()[-1]
    assert next_line.startswith(f"next: correct {out / 'labelimg'}, move its files into your")
    words = shlex.split(next_line.split(": ")[-1])
    assert words[1].endswith("01_prepare_data.py")
    assert words[2:] == ["--data", str(mine), "--source", "YOUR_FOLDER"]


# ---- scale: the network sees another size than the user

def test_answers_are_in_px_of_the_users_image(monkeypatch):
    image_3d_array = np.zeros((403, 201, 3), np.uint8)
    asked_list = []

    def find_keypoints(network, about_dict, seen_3d_array, threshold):
        asked_list.append(seen_3d_array.shape)
        return [{"class": "keyPoint_1", "x": 25.0, "y": 50.5, "score": 1.0,
                 "box": [20.0, 40.0, 30.0, 61.0]}], None
    monkeypatch.setattr(model, "find_keypoints", find_keypoints)
    (found,), _ = predict.find_in_image(None, {**ABOUT, "scale": 0.25}, image_3d_array, 0.5)
    assert asked_list == [(101, 50, 3)]
    assert (found["x"], found["y"]) == pytest.approx((100.5, 201.5), abs=0.05)  # the middle
    assert found["box"] == pytest.approx([20 * 4.02, 40 * 403 / 101, 30 * 4.02, 61 * 403 / 101])


# ---- drawing

def drawn(keypoint_list, size=(100, 100), ground=(90, 90, 90), names=("one", "two")):
    """What draw_keypoints makes of points (class_id, x, y) with boxes of 30 px, as int."""
    dict_list = [{"class": names[class_id - 1], "x": x, "y": y, "score": 0.5,
                  "box": [x - 15, y - 15, x + 15, y + 15]} for class_id, x, y in keypoint_list]
    image = Image.new("RGB", size, ground)
    predict.draw_keypoints(image, dict_list, ["background", *names])
    assert image.size == size
    return np.asarray(image).astype(int)


def test_a_drawn_cross_has_its_middle_on_the_keypoint():
    image = drawn([(1, 50.0, 40.0)])
    across_upright, across_level = image[44, 40:60], image[30:50, 54]  # across one arm each
    for line, first, middle in ((across_upright, 40, 50.0), (across_level, 30, 40.0)):
        changed = np.flatnonzero((line != 90).any(axis=1))
        assert abs(first + (changed.min() + changed.max() + 1) / 2 - middle) <= 0.5


def test_any_place_and_any_length_of_name_can_be_drawn():
    for x in (-30.0, 63.9, 500.0):
        for name in ("n" * 300, "", "左眼"):
            drawn([(1, x, 20.0)], size=(64, 48), names=(name, "two"))


def test_name_and_colour_tell_the_class():
    images = [drawn([(class_id, 50, 50)], names=names) for class_id, names in (
        (1, ("same", "other")), (2, ("other", "same")), (1, ("another", "other")))]
    assert (images[0] != images[1]).any() and (images[0] != images[2]).any()


def test_texts_above_and_below_keep_neighbours_apart():
    """Of two keypoints side by side, and at the upper edge, the names can be read."""
    ink = np.flatnonzero((drawn([(1, 50, 50), (2, 90, 50)], (200, 100)) != 90).any(axis=(1, 2)))
    assert ink.min() < 34 - 10 and ink.max() > 66 + 10  # above the boxes, and below
    at_edge = drawn([(1, 50, 12)], (200, 100))
    assert (at_edge[30:60] != 90).any()  # no room above: below


# ---- the map

@pytest.fixture
def figure_list(monkeypatch):
    """The figures of the maps; they are saved, too."""
    result_list, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: (
        result_list.append(figure), real(figure, *arguments, **options)))
    return result_list


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("height, width", [(320, 64), (64, 320), (310, 60), (1, 1)])
def test_a_drawn_map_shows_the_image_lit_where_a_class_is_likely(
        figure_list, tmp_path, height, width):
    image_3d_array = np.full((height, width, 3), 200, np.uint8)
    map_3d_array = np.zeros((2, -(-height // 32), -(-width // 32)), np.float32)
    map_3d_array[0, 0, 0], map_3d_array[1, -1, -1] = 0.8, 0.02
    image = Image.fromarray(np.full((height, width, 3), 7, np.uint8))
    predict.draw_map(tmp_path / "map.png", image, image_3d_array, map_3d_array,
                     ["background", "one", "$\\frac$"], 1.0)
    first, *axes_list, bar = figure_list[0].axes
    assert (first.images[0].get_array() == 7).all() and first.get_title() == ""
    assert bar.get_ylabel() == "probability"
    for axes, map_2d_array, title in zip(axes_list, map_3d_array, (
            "one\nbest 0.800", "$\\frac$\nbest 0.020"), strict=True):
        assert axes.get_title() == title
        below, above = axes.images
        assert np.array_equal(below.get_array(), image_3d_array)
        assert np.array_equal(above.get_array(), map_2d_array) and above.get_clim() == (0, 1)
        # The cells lie where the network has them: they reach beyond an image that is padded.
        rows, columns = map_2d_array.shape
        assert above.get_extent() == [0, 32 * columns, 32 * rows, 0] and 0 < above.get_alpha() < 1
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, width), (height, 0))


def test_a_map_has_a_panel_for_each_class_six_at_most_the_likeliest(figure_list, tmp_path):
    image_3d_array = np.zeros((96, 64, 3), np.uint8)
    map_3d_array = np.zeros((8, 3, 2), np.float32)
    map_3d_array[:, 1, 1] = 0.5, 0.1, 0.6, 0.2, 0.9, 0.7, 0.8, 0.4
    predict.draw_map(tmp_path / "map.png", Image.fromarray(image_3d_array), image_3d_array,
                     map_3d_array, list("-abcdefgh"), 0.5)
    title_list = [axes.get_title().split("\n")[0] for axes in figure_list[0].axes]
    assert title_list == ["", *"acefgh", ""]  # the drawn image, six classes, the colour bar
    assert figure_list[0].axes[1].images[1].get_extent() == [0, 2 * 64, 2 * 96, 0]  # scale 0.5


# ---- bad images, bad command lines

def test_bad_images_get_their_sentence_and_the_others_go_on(data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, mode in (("cmyk.jpg", "CMYK"), ("grey.png", "L"), ("palette.png", "P")):
        noise_image(2).convert(mode).save(folder / name)
    noise_image(7, 1, 1).save(folder / "one_pixel.png")
    noise_image(8, 417, 33).save(folder / "odd_size.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # a telephone held upright: 64 wide, 96 high on disk, 96 x 64 for the eye
    noise_image(9).save(folder / "turned.jpg", exif=exif)
    (folder / "text.jpg").write_text("no image")
    (folder / "half.png").write_bytes((folder / "grey.png").read_bytes()[:400])
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.png").write_text("not looked at")
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    missing, found = tmp_path / "missing.jpg", tmp_path / "found.json"
    sentence = sentence_of(predict, monkeypatch, folder, missing, "--data", data, "--json", found)
    assert "4 of 10" in sentence
    output = capsys.readouterr().out
    bad_list = [line for line in output.splitlines() if "  bad: " in line]
    for name, words in (("bomb.png", "9000 x 9000 px"), ("text.jpg", "not a readable"),
                        ("missing.jpg", "No such file"), ("half.png", "not a readable")):
        assert sum(name in line and words in line for line in bad_list) == 1, name
    assert sorted(Path(entry["image"]).stem for entry in read_json(found)) == [
        "cmyk", "grey", "odd_size", "one_pixel", "palette", "turned"]
    assert "turned.jpg  96 x 64 px" in output and "in 0 of 10 images, 6 without any" in output


@pytest.mark.parametrize("arguments, words", [
    (["--threshold", "1.5"], "--threshold must lie between 0 and 1"),
    (["--threshold", "nan"], "--threshold must lie between 0 and 1"),
    (["--threshold", "high"], "invalid float value"),
    (["--xml"], "--xml needs --out"),
    (["--json", "."], "choose a new name for --json"),
    (["nothing"], "nothing: no such folder, or no image in it"),
    (["--data", "nowhere_at_all"], "nowhere_at_all"),
])
def test_wrong_command_lines_get_one_sentence_and_make_nothing(
        arguments, words, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, sentence = call_main(predict, monkeypatch, "--data", data, *arguments)
    assert code in (1, 2) and words in sentence + capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("ending", ["| head -1", ">&-"])
def test_output_that_nobody_reads_ends_as_with_other_programs(data, tmp_path, ending):
    command = shlex.join([sys.executable, str(REPOSITORY / "05_predict.py"), "--data", str(data)])
    result = subprocess.run(["bash", "-c", f"{command} {ending}; echo ${{PIPESTATUS[0]}} >&2"],
                            capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert result.stderr.strip() == ("141" if "head" in ending else "0")


# ---- nothing of the user's is lost

@pytest.mark.parametrize("option, name", [
    ("--json", "labels.json"), ("--json", ".hidden"), ("--out", "round_1"), ("--out", "file")])
def test_what_is_there_already_is_not_written_to(data, tmp_path, monkeypatch, option, name):
    monkeypatch.setattr(predict, "read_image", None)  # refused before any work
    path = tmp_path / name
    if name == "round_1":
        path.mkdir()
    else:
        path.write_text("mine")
    before = contents(tmp_path)
    sentence = sentence_of(predict, monkeypatch, "--data", data, option, path)
    assert sentence.startswith(f"error: {path}: ") and option in sentence
    assert contents(tmp_path) == before and not (data / "results").exists()


def test_the_default_place_is_drawn_into_again_and_again(data, monkeypatch, capsys):
    drawn_list = []
    for threshold in (1, 0, 0):
        call(monkeypatch, capsys, "--data", data, "--threshold", threshold, "--map")
        drawn_list.append(contents(data / "results" / "predictions"))
    first, second, third = drawn_list
    assert first.keys() == second.keys() and len(first) == 6
    assert all(first[path] != second[path] for path in first) and second == third


# ---- labels for a label tool and 01

def test_xml_goes_back_into_01_and_gives_the_same_points(data, tmp_path, monkeypatch, capsys):
    images, out, round_2 = (tmp_path / name for name in ("images", "out", "round_2"))
    images.mkdir()
    for seed in range(6):
        noise_image(seed, 160, 96).save(images / f"{seed}.JPG")
    noise_image(9, 160, 96).save(images / "other.jfif", format="JPEG")  # 01 looks for no .jfif
    call(monkeypatch, capsys, images, images / "other.jfif", "--data", data, "--threshold", 0,
         "--json", tmp_path / "found.json", "--xml", "--out", out)
    assert call_main(prepare, monkeypatch, "--source", out / "labelimg", "--data", round_2)[0] == 0
    dataset_dict = read_json(round_2 / "dataset.json")
    assert dataset_dict["category_list"] == ["background", "keyPoint_1", "keyPoint_2"]
    assert dataset_dict["box_size"] == [30, 30]
    entry_list, count = read_json(tmp_path / "found.json"), 0
    for split in ("train", "val", "test"):
        for index, class_id, x, y in np.load(round_2 / f"{split}_labels.npy"):
            file = dataset_dict[split]["file_list"][int(index)]
            number = int(Path(file).name.split("_")[0])
            keypoint = entry_list[number - 1]["keypoints"][int(class_id) - 1]
            wanted = np.clip([keypoint["x"], keypoint["y"]], 0, [96, 160])
            assert (x, y) == pytest.approx(wanted, abs=0.02)
            count += 1
    assert count == 14
