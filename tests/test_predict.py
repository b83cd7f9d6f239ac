"""05_predict.py on the command line: drawn pictures, maps, JSON, LabelImg XML and the way into 01.

Nothing of the user's is written over. What bad pictures and odd places do stands here, too, since
a user meets both; the service is in test_serve.py.
"""

import json
import shlex
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import (Sees, call_main, contents, load, noise_image, run_script,
                      save_weights, sentence_of)

model, prepare, predict = load("02_model"), load("01_prepare_data"), load("05_predict")

ABOUT_DICT = {"category_list": ["background", "keyPoint_1", "keyPoint_2"], "box_size": [30.0, 30.0],
              "max_per_class": 1}


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


def odd_exif_bytes() -> bytes:
    """EXIF as some programs write it: ImageWidth as a fraction; and Orientation 6, upright."""
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 2)
    width = struct.pack("<HHII", 0x0100, 5, 1, 38)
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    return b"Exif\0\0" + head + width + orientation + struct.pack("<III", 0, 64, 1)


# ---------------------------------------------------------------- what it finds and writes

def test_without_a_picture_it_takes_the_samples(data, monkeypatch, capsys):
    output = call(monkeypatch, capsys, "--data", data)
    assert output.splitlines()[0] == f"using {data / 'weights.pt'}"
    predictions = data / "results" / "predictions"
    assert sorted(path.name for path in predictions.iterdir()) == ["0.png", "1.png", "2.png"]
    assert output.count("keyPoint_1 0.") == 3  # untrained; it says how near it came


@pytest.mark.filterwarnings("error")
def test_the_samples_of_the_repository_are_found_where_their_labels_say(tmp_path):
    """The first thing that a user does, with the weights that come along."""
    result = run_script("05_predict.py", "--json", tmp_path / "found.json",
                        "--out", tmp_path / "out")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    entry_list = read_json(tmp_path / "found.json")
    assert len(entry_list) == 6
    for entry in entry_list:
        label_list = []
        for item in ElementTree.parse(Path(entry["image"]).with_suffix(".xml")).iter("object"):
            xmin, ymin, xmax, ymax = (float(value.text) for value in item.find("bndbox"))
            label_list.append((item.findtext("name"), (xmin + xmax) / 2, (ymin + ymax) / 2))
        assert len(label_list) == len(entry["keypoints"])
        for keypoint, (name, x, y) in zip(entry["keypoints"], sorted(label_list)):
            assert keypoint["class"] == name
            assert (keypoint["x"], keypoint["y"]) == pytest.approx((x, y), abs=3)


def test_json_has_the_format_of_the_design_and_drawn_pictures_their_size(
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
            assert 0 <= keypoint["score"] <= 1
            xmin, ymin, xmax, ymax = keypoint["box"]
            assert (xmax - xmin, ymax - ymin) == pytest.approx((30, 30), abs=0.011)
            middle = (xmin + xmax) / 2, (ymin + ymax) / 2
            assert middle == pytest.approx((keypoint["x"], keypoint["y"]), abs=0.011)
    with Image.open(tmp_path / "drawn" / "0.png") as drawn:
        assert drawn.size == (64, 96)
        assert np.any(np.asarray(drawn) != np.asarray(noise_image(0)))


def test_a_threshold_that_nothing_reaches_is_never_shown_as_reached(data, monkeypatch, capsys):
    maps = np.full((2, 3, 2), 0.99998, np.float32)
    monkeypatch.setattr(predict, "class_maps", lambda *arguments: maps)
    output = call(monkeypatch, capsys, "--data", data, "--threshold", 1)
    assert output.count("keyPoint_1 0.999, keyPoint_2 0.999") == 3 and "1.000" not in output


def test_pictures_of_one_name_do_not_overwrite_each_other(data, tmp_path, monkeypatch, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        noise_image(1).save(tmp_path / folder / "same.png")
    noise_image(2).save(tmp_path / "b" / "same.jpg")
    noise_image(3).save(tmp_path / "b" / "same_map.jpg")
    out = tmp_path / "out"
    call(monkeypatch, capsys, tmp_path / "a", tmp_path / "b", tmp_path / "a" / "same.png",
         "--data", data, "--out", out, "--xml", "--map")
    assert sorted(path.name for path in out.glob("*.png")) == [
        "same.png", "same_2.png", "same_2_map.png", "same_3.png", "same_3_map.png",
        "same_map.png", "same_map_2.png", "same_map_2_map.png"]
    assert sorted(path.name for path in (out / "labelimg").iterdir()) == [
        "same.png", "same.xml", "same_2.jpg", "same_2.xml", "same_3.png", "same_3.xml",
        "same_map_2.jpg", "same_map_2.xml"]


def test_the_next_line_can_be_typed_as_it_stands(data, tmp_path, monkeypatch, capsys):
    mine = data.rename(tmp_path / "my data")
    next_line = call(monkeypatch, capsys, "--data", mine).splitlines()[-1]
    words = shlex.split(next_line.removeprefix("next: "))
    assert words == ["python", "06_model_analysis.py", "--data", str(mine)]
    out = tmp_path / "round 2"
    next_line = call(monkeypatch, capsys, "--data", mine, "--xml", "--out", out).splitlines()[-1]
    words = shlex.split(next_line)
    assert words[words.index("--source") + 1] == str(out / "labelimg")


def test_class_names_are_drawn_as_names_to_draw_says(data, monkeypatch, capsys):
    """A class that no font can write is drawn as its number; JSON and lines keep the name."""
    save_weights(data, ["background", "左眼", "右眼"])
    seen_list = []

    def draw(image, keypoint_list, category_list, name_list):
        seen_list.extend((k["class"], name_list[category_list.index(k["class"])])
                         for k in keypoint_list)
        return image
    monkeypatch.setattr(predict, "draw_keypoints", draw)
    monkeypatch.setattr(predict, "names_to_draw", lambda name_list: ["0", "1", "2"])
    output = call(monkeypatch, capsys, "--data", data, "--threshold", 0, "--map")
    assert set(seen_list) == {("左眼", "1"), ("右眼", "2")} and "左眼" in output


# ---------------------------------------------------------------- drawing

def drawn(keypoint_list, size=(100, 100), ground=(90, 90, 90), name_list=("", "one", "two")):
    """What draw_keypoints makes of points (class_id, x, y) with boxes of 30 px, as int."""
    dict_list = [{"class": f"class {class_id}", "x": x, "y": y, "score": 0.5,
                  "box": [x - 15, y - 15, x + 15, y + 15]} for class_id, x, y in keypoint_list]
    image = Image.new("RGB", size, ground)
    before = image.tobytes()
    result = predict.draw_keypoints(image, dict_list, ["", "class 1", "class 2"], name_list)
    assert image.tobytes() == before and result.size == size
    return np.asarray(result).astype(int)


def test_a_drawn_cross_has_its_middle_on_the_keypoint():
    picture = drawn([(1, 50.0, 40.0)])
    across_upright, across_level = picture[44, 40:60], picture[30:50, 54]  # across one arm each
    for line, first, middle in ((across_upright, 40, 50.0), (across_level, 30, 40.0)):
        changed = np.flatnonzero((line != 90).any(axis=1))
        assert abs(first + (changed.min() + changed.max() + 1) / 2 - middle) <= 0.5


def test_any_place_and_any_length_of_name_can_be_drawn():
    for x in (-30.0, 63.9, 500.0):
        for name in ("n" * 300, ""):
            drawn([(1, x, 20.0)], size=(64, 48), name_list=("", name, ""))


def test_the_name_that_is_given_is_drawn_and_each_class_has_its_colour():
    same = ("", "same", "same")
    assert (drawn([(1, 50, 50)], name_list=same) != drawn([(2, 50, 50)], name_list=same)).any()
    one, other = (drawn([(1, 50, 50)], name_list=("", name, "")) for name in ("1", "class 1"))
    assert (one != other).any()


def test_texts_above_and_below_keep_neighbours_apart():
    """Of two keypoints side by side, and at the upper edge, the names can be read."""
    ink = np.flatnonzero((drawn([(1, 50, 50), (2, 90, 50)], (200, 100)) != 90).any(axis=(1, 2)))
    assert ink.min() < 34 - 10 and ink.max() > 66 + 10  # above the boxes, and below
    at_edge = drawn([(1, 50, 12)], (200, 100))
    assert (at_edge[30:60] != 90).any()  # no room above: below


# ---------------------------------------------------------------- the map

def test_a_map_holds_the_probability_of_each_class_in_each_cell():
    image_3d_array = np.zeros((90, 64, 3), np.uint8)
    image_3d_array[40, 50] = 255  # class 1, in the cell at row 1, column 1
    map_3d_array = predict.class_maps(model.run_network(Sees().eval(), image_3d_array))
    assert map_3d_array.shape == (2, 3, 2) and map_3d_array.dtype == np.float32
    assert 0 <= map_3d_array.min() and map_3d_array.sum(axis=0).max() < 1
    keypoint, = model.find_keypoints(Sees().eval(), ABOUT_DICT, image_3d_array, 0.5)
    assert keypoint["score"] == pytest.approx(map_3d_array[0].max(), abs=1e-4)
    assert map_3d_array[0, 1, 1] > 0.99 and map_3d_array[1].max() < 0.01


@pytest.fixture
def figure_list(monkeypatch):
    """The figures of the maps; they are saved, too."""
    result_list, real = [], predict.save_figure
    monkeypatch.setattr(predict, "save_figure", lambda figure, path: (
        result_list.append(figure), real(figure, path)))
    return result_list


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("height, width", [(320, 64), (64, 320), (310, 60), (1, 1)])
def test_a_drawn_map_shows_the_picture_lit_where_a_class_is_likely(
        figure_list, tmp_path, height, width):
    image_3d_array = np.full((height, width, 3), 200, np.uint8)
    map_3d_array = np.zeros((2, -(-height // 32), -(-width // 32)), np.float32)
    map_3d_array[0, 0, 0], map_3d_array[1, -1, -1] = 0.8, 0.02
    drawn = Image.fromarray(np.full((height, width, 3), 7, np.uint8))
    predict.draw_map(tmp_path / "map.png", drawn, image_3d_array, map_3d_array,
                     ["background", "one", "$\\frac$"])
    with Image.open(tmp_path / "map.png") as image:
        assert min(image.size) > 50
    first, *axes_list, bar = figure_list[0].axes
    assert (first.images[0].get_array() == 7).all() and first.get_title() == ""
    assert bar.get_ylabel() == "probability"
    for axes, map_2d_array, title in zip(axes_list, map_3d_array, (
            "one\nbest 0.800", "$\\frac$\nbest 0.020"), strict=True):
        assert axes.get_title() == title
        below, above = axes.images
        assert np.array_equal(below.get_array(), image_3d_array)
        assert np.array_equal(above.get_array(), map_2d_array) and above.get_clim() == (0, 1)
        # The cells lie where the network has them: they reach beyond a picture that is padded.
        rows, columns = map_2d_array.shape
        assert above.get_extent() == [0, 32 * columns, 32 * rows, 0] and 0 < above.get_alpha() < 1
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, width), (height, 0))


def test_a_map_has_a_panel_for_each_class_six_at_most_the_likeliest(figure_list, tmp_path):
    image_3d_array = np.zeros((96, 64, 3), np.uint8)
    map_3d_array = np.zeros((8, 3, 2), np.float32)
    map_3d_array[:, 1, 1] = 0.5, 0.1, 0.6, 0.2, 0.9, 0.7, 0.8, 0.4
    arguments = Image.fromarray(image_3d_array), image_3d_array, map_3d_array, list("-abcdefgh")
    predict.draw_map(tmp_path / "map.png", *arguments)
    title_list = [axes.get_title().split("\n")[0] for axes in figure_list[0].axes]
    assert title_list == ["", *"acefgh", ""]  # the drawn picture, six classes, the colour bar


def test_maps_are_written_beside_the_drawn_pictures(data, figure_list, monkeypatch, capsys):
    save_weights(data, ["background", *"abcdefgh"])
    call(monkeypatch, capsys, "--data", data, "--map")
    predictions = data / "results" / "predictions"
    assert sorted(path.name for path in predictions.iterdir()) == [
        f"{i}{end}.png" for i in range(3) for end in ("", "_map")]
    assert [len(figure.axes) for figure in figure_list] == [1 + 6 + 1] * 3
    for number, figure in enumerate(figure_list):
        with Image.open(predictions / f"{number}.png") as drawn:
            assert np.array_equal(figure.axes[0].images[0].get_array(), drawn)


# ---------------------------------------------------------------- bad pictures, bad command lines

def test_bad_pictures_get_their_sentence_and_the_others_go_on(data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    noise_image(1).save(folder / "good.jpg")
    noise_image(2).convert("CMYK").save(folder / "cmyk.jpg")
    noise_image(3).convert("L").save(folder / "grey.png")
    noise_image(4).convert("RGBA").save(folder / "rgba.png")
    noise_image(5).convert("P").save(folder / "palette.png")
    sixteen_2d_array = np.random.default_rng(6).integers(0, 65535, (96, 64), dtype=np.uint16)
    Image.fromarray(sixteen_2d_array).save(folder / "sixteen.png")
    noise_image(7, 1, 1).save(folder / "one_pixel.png")
    noise_image(8, 417, 33).save(folder / "odd_size.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # a telephone held upright: 64 wide, 96 high on disk, 96 x 64 for the eye
    noise_image(9).save(folder / "turned.jpg", exif=exif)
    noise_image(9).save(folder / "odd_exif.jpg", exif=odd_exif_bytes())
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    (folder / "half.png").write_bytes((folder / "good.jpg").read_bytes()[:400])
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.png").write_text("not looked at")
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    missing, found = tmp_path / "missing.jpg", tmp_path / "found.json"
    sentence = sentence_of(predict, monkeypatch, folder, missing, "--data", data, "--json", found)
    assert "6 of 15" in sentence
    output = capsys.readouterr().out
    bad_list = [line for line in output.splitlines() if line.startswith("bad: ")]
    assert len(bad_list) == 6
    for name, words in (("empty.png", "not a readable picture"), ("bomb.png", "9000 x 9000 px"),
                        ("text.jpg", "not a readable picture"), ("missing.jpg", "No such file"),
                        ("half.png", "not a readable picture"), ("sixteen.png", "8 bits")):
        assert sum(name in line and words in line for line in bad_list) == 1, name
    assert sorted(Path(entry["image"]).stem for entry in read_json(found)) == [
        "cmyk", "good", "grey", "odd_exif", "odd_size", "one_pixel", "palette", "rgba", "turned"]
    for name in ("turned.jpg", "odd_exif.jpg"):
        assert f"{name}  96 x 64 px" in output


@pytest.mark.parametrize("arguments, words", [
    (["--threshold", "1.5"], "--threshold must lie between 0 and 1"),
    (["--threshold", "nan"], "--threshold must lie between 0 and 1"),
    (["--threshold", "high"], "invalid float value"),
    (["--serve", "127.0.0.1:0", "--xml"], "--serve takes pictures from clients"),
    (["--serve", "127.0.0.1:0", "--map"], "--serve takes pictures from clients"),
    (["--serve", "photo.jpg"], "HOST:PORT"),
    (["--serve", "127.0.0.1:99999"], "HOST:PORT"),
    (["--serve", "192.0.2.1:8000"], "192.0.2.1:8000: cannot serve there"),  # no machine's address
    (["--json", "."], "new file for --json"),
    (["nothing"], "nothing: no such folder, or no picture in it"),
    (["--data", "nowhere_at_all"], "no such"),
])
def test_wrong_command_lines_get_one_sentence(arguments, words, data, tmp_path, monkeypatch,
                                              capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    code, sentence = call_main(predict, monkeypatch, "--data", data, *arguments)
    assert code in (1, 2) and words in sentence + capsys.readouterr().err


def test_as_a_user_runs_it(data, tmp_path):
    """The real command: nothing but one sentence in stderr, and exit code 1 for a bad file."""
    (tmp_path / "bad.png").write_bytes(b"x")
    result = run_script("05_predict.py", "--data", data, data / "sample", tmp_path / "bad.png")
    assert result.returncode == 1 and result.stderr.startswith("error: 1 of 4 pictures")
    assert result.stderr.count("\n") == 1
    assert len(list((data / "results" / "predictions").iterdir())) == 3


# ---------------------------------------------------------------- nothing of the user's is lost

@pytest.fixture
def idle(monkeypatch):
    """Where it must be refused before any work: whoever begins is caught."""
    monkeypatch.setattr(predict, "read_image", None)
    monkeypatch.setattr(model, "run_network", None)


@pytest.mark.parametrize("name, content", [
    ("labels.json", '{"version": "5.0", "shapes": []}'), ("ours.json", "[]"), ("photo.jpg", "x"),
    ("no suffix", ""), (".hidden", "x")])
def test_json_never_takes_the_place_of_another_file(
        data, tmp_path, monkeypatch, idle, name, content):
    path = tmp_path / name
    path.write_text(content)
    before = contents(tmp_path)
    for arguments in ([], ["--out", tmp_path / "new"], [path]):
        sentence = sentence_of(predict, monkeypatch, "--data", data, "--json", path, *arguments)
        assert sentence.startswith(f"error: {path}: ") and "--json" in sentence
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()


def test_json_is_written_to_any_new_file_once(data, tmp_path, monkeypatch, capsys):
    path = tmp_path / "new folder" / "found.txt"
    call(monkeypatch, capsys, "--data", data, "--json", path)
    assert len(read_json(path)) == 3
    before = contents(tmp_path)
    assert "--json" in sentence_of(predict, monkeypatch, "--data", data, "--json", path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["1.png", "1_map.png", "notes.txt", ".hidden", "folder"])
@pytest.mark.parametrize("arguments", [[], ["--map", "--xml"]])
def test_a_folder_that_holds_anything_is_not_drawn_into(
        data, tmp_path, monkeypatch, idle, name, arguments):
    out = tmp_path / "out"
    if name == "folder":
        (out / name).mkdir(parents=True)
    else:
        out.mkdir()
        (out / name).write_bytes(contents(data)[data / "sample" / "0.png"])
    before = contents(tmp_path)
    sentence = sentence_of(predict, monkeypatch, "--data", data, "--out", out, *arguments,
                           "--json", tmp_path / "found.json")
    assert sentence.startswith(f"error: {out}: ") and "--out" in sentence
    assert contents(tmp_path) == before  # refused before anything is written


def test_an_empty_folder_is_drawn_into_and_the_default_place_again_and_again(
        data, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    call(monkeypatch, capsys, "--data", data, "--out", tmp_path / "empty")
    drawn_list = []
    for threshold in (1, 0, 0):
        call(monkeypatch, capsys, "--data", data, "--threshold", threshold, "--map")
        drawn_list.append(contents(data / "results" / "predictions"))
    assert drawn_list[0].keys() == drawn_list[1].keys() and len(drawn_list[0]) == 6
    first, second, third = drawn_list
    assert all(first[path] != second[path] for path in first) and second == third
    assert len(contents(tmp_path / "empty")) == 3


def test_labels_in_the_default_place_are_never_written_over(data, monkeypatch, capsys, idle):
    labels = data / "results" / "predictions" / "labelimg"
    labels.mkdir(parents=True)
    for before in ({}, {labels / "0.xml": b"corrected by hand"}):
        for path, raw in before.items():
            path.write_bytes(raw)
        sentence = sentence_of(predict, monkeypatch, "--data", data, "--xml")
        assert str(labels) in sentence and "--out" in sentence
        assert contents(data / "results") == before
    monkeypatch.undo()
    call(monkeypatch, capsys, "--data", data)  # without --xml nobody touches them
    assert before.items() < contents(data / "results").items()


def test_the_folder_of_the_pictures_is_not_drawn_into(data, monkeypatch):
    noise_image(5).save(data / "sample" / "photo.jpg")  # photo.png would be new, but looked at
    before = contents(data)
    sentence = sentence_of(predict, monkeypatch, "--data", data, "--out", data / "sample",
                           data / "sample" / "photo.jpg")
    assert str(data / "sample") in sentence and contents(data) == before


# ---------------------------------------------------------------- labels for LabelImg and 01

def test_xml_goes_back_into_01_and_gives_the_same_points(data, tmp_path, monkeypatch, capsys):
    pictures, out, round_2 = (tmp_path / name for name in ("pictures", "out", "round_2"))
    pictures.mkdir()
    for seed in range(6):
        noise_image(seed, 160, 96).save(pictures / f"{seed}.JPG")
    noise_image(9, 160, 96).save(pictures / "other.jfif", format="JPEG")  # 01 looks for no .jfif
    arguments = ["--data", data, "--threshold", 0, "--xml", "--out", out]
    call(monkeypatch, capsys, pictures, pictures / "other.jfif", "--json", tmp_path / "found.json",
         *arguments)
    assert call_main(prepare, monkeypatch, "--source", out / "labelimg", "--data", round_2)[0] == 0
    dataset_dict = read_json(round_2 / "dataset.json")
    assert dataset_dict["category_list"] == ["background", "keyPoint_1", "keyPoint_2"]
    assert dataset_dict["box_size"] == [30, 30]
    entry_dict = {Path(entry["image"]).stem: entry["keypoints"]
                  for entry in read_json(tmp_path / "found.json")}
    assert sorted(entry_dict) == ["0", "1", "2", "3", "4", "5", "other"]
    count = 0
    for split in ("train", "val", "test"):
        for index, class_id, x, y in np.load(round_2 / f"{split}_labels.npy"):
            stem = Path(dataset_dict[split]["file_list"][int(index)]).stem
            keypoint = entry_dict[stem][int(class_id) - 1]
            wanted = np.clip([keypoint["x"], keypoint["y"]], 0, [96, 160])
            assert (x, y) == pytest.approx(wanted, abs=0.02)
            count += 1
    assert count == 14
    before = contents(out)  # corrected by hand, perhaps: a second run must not touch them
    assert str(out) in sentence_of(predict, monkeypatch, pictures, *arguments)
    assert contents(out) == before
