"""01_prepare_data.py: drawing, boxes into points, LabelImg folders into splits and arrays.

What may be wrong with labels, pictures and disks stands in hardening/test_labels.py.
"""

import json
import math
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

import common
from common import CELL, UserError
from conftest import (
    call_main,
    centroid,
    contents,
    load,
    paint_dot,
    run_script,
    write_example,
    write_own_pictures,
    xml_text,
)

prepare_data = load("01_prepare_data")
SPLIT_LIST = ["train", "val", "test"]


def prepare(monkeypatch, source, data, *arguments):
    """Run main() on a folder: exit code and sentence."""
    return call_main(prepare_data, monkeypatch, "--source", source, "--data", data, *arguments)


def draw(monkeypatch, data, *arguments):
    """Run main() where it draws four pictures, without other processes: exit code and sentence."""
    return call_main(prepare_data, monkeypatch, "--data", data, "--pictures", 4, *arguments)


def read_dataset(data):
    return json.loads((data / "dataset.json").read_text(encoding="utf-8"))


def place_dict(data):
    """File name -> the places of its keypoints, over all splits."""
    dataset, found_dict = read_dataset(data), {}
    for split in SPLIT_LIST:
        for picture, _, x, y in np.load(data / f"{split}_labels.npy").tolist():
            found_dict.setdefault(dataset[split]["file_list"][int(picture)], []).append((x, y))
    return found_dict


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("name", prepare_data.MARK_LIST)
@pytest.mark.parametrize(
    "x, y, angle, scale",
    [(60, 50, 0, 1), (60.25, 49.5, 0.1, 1), (59.99, 50.73, -0.2, 0.9), (60.5, 50.5, 1.0, 1.1)],
)
def test_a_marks_middle_is_painted_at_the_sub_pixel_place(name, x, y, angle, scale):
    picture = np.zeros((100, 120, 3), np.float32)
    prepare_data.paint(picture, x, y, angle, scale, name, (1, 1, 1))
    found_x, found_y = centroid(picture[:, :, 0])
    assert math.hypot(found_x - x, found_y - y) < 0.05
    assert (
        250 < picture[:, :, 0].sum() < 700
    )  # px of ink; and nothing was cut off at the side of the painted patch


def test_a_shape_is_painted_with_its_colour_and_opacity():
    picture = np.full((60, 60, 3), 100, np.float32)
    prepare_data.paint(picture, 30, 30, 0, 1, "disc", (200, 0, 100), opacity=0.5)
    assert picture[30, 30].tolist() == [150, 50, 100] and picture[2, 2].tolist() == [100, 100, 100]


def test_a_shape_at_the_edge_is_painted_as_far_as_there_is_picture():
    picture, whole = np.zeros((60, 60, 3), np.float32), np.zeros((160, 160, 3), np.float32)
    prepare_data.paint(picture, 3.25, 58.5, 0.3, 1, "keyPoint_2", (1, 1, 1))
    prepare_data.paint(whole, 53.25, 108.5, 0.3, 1, "keyPoint_2", (1, 1, 1))
    assert np.allclose(picture, whole[50:110, 50:110], atol=1e-4)


def test_the_same_seed_and_index_draw_the_same_picture_and_others_do_not(tmp_path):
    for folder, index, seed in (("a", 3, 0), ("b", 3, 0), ("c", 3, 1), ("d", 4, 0)):
        prepare_data.draw_picture(index, seed, tmp_path / folder)
    same = [(tmp_path / folder / "00003.jpg").read_bytes() for folder in "abc"]
    assert same[0] == same[1] != same[2] != (tmp_path / "d" / "00004.jpg").read_bytes()
    first, second = (
        (tmp_path / folder / "00003.xml").read_text().split("</folder>")[1] for folder in "ab"
    )
    assert first == second


def test_marks_keep_their_distance_so_that_two_never_share_a_cell():
    rng, place_list = np.random.default_rng(0), []
    for _ in range(40):
        prepare_data.find_place(rng, (100, 800, 220, 1000), place_list)
    places = np.array(place_list)
    distance = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1)) + 1e9 * np.eye(
        len(places)
    )
    assert distance.min() >= prepare_data.MARK_DISTANCE > CELL * math.sqrt(2)


def test_the_drawn_label_stands_where_the_mark_was_painted(tmp_path, monkeypatch):
    painted = []
    real = prepare_data.paint
    monkeypatch.setattr(
        prepare_data,
        "paint",
        lambda picture, x, y, angle, scale, shape, *rest: (
            painted.append((shape, x, y)),
            real(picture, x, y, angle, scale, shape, *rest),
        ),
    )
    for index in range(3):
        prepare_data.draw_picture(index, 5, tmp_path)
        boxes = {
            k["class"]: k["box"]
            for k in prepare_data.read_labels(
                tmp_path / f"{index:05d}.xml", prepare_data.WIDTH, prepare_data.HEIGHT
            )
        }
        for name in prepare_data.MARK_LIST:
            place_list = [(x, y) for used, x, y in painted if used == name]
            assert len(place_list) == (name in boxes)
            for x, y in place_list:
                label = prepare_data.to_label_array(
                    [
                        {
                            "size": (prepare_data.WIDTH, prepare_data.HEIGHT),
                            "keypoints": [{"class": name, "box": boxes[name]}],
                        }
                    ],
                    ["background", name],
                    (prepare_data.BOX_SIDE, prepare_data.BOX_SIDE),
                )
                assert np.abs(label[0, 2:] - (x, y)).max() < 0.011  # two decimals
        painted.clear()


def test_the_drawn_data_set_has_what_the_design_promises(drawn):
    dataset = read_dataset(drawn)
    assert (
        dataset["category_list"] == ["background", *prepare_data.MARK_LIST]
        and dataset["max_per_class"] == 1
    )
    assert (dataset["height"], dataset["width"]) == (
        prepare_data.HEIGHT,
        prepare_data.WIDTH,
    ) and dataset["box_size"] == [30, 30]
    assert dataset["drawn"] is True
    total = 0
    for split in SPLIT_LIST:
        images = np.load(drawn / f"{split}_images.npy", mmap_mode="r")
        labels = np.load(drawn / f"{split}_labels.npy")
        count = len(dataset[split]["file_list"])
        assert (
            images.shape == (count, prepare_data.HEIGHT, prepare_data.WIDTH, 3)
            and images.dtype == np.uint8
        )
        assert labels.dtype == np.float32 and labels.shape[1] == 4
        assert np.isin(labels[:, 0], range(count)).all() and np.isin(labels[:, 1], (1, 2)).all()
        assert (np.diff(labels[:, 0]) >= 0).all()  # sorted by picture: the loader relies on it
        assert dataset[split]["size_list"] == [[prepare_data.WIDTH, prepare_data.HEIGHT]] * count
        picture = np.asarray(Image.open(drawn / "images" / dataset[split]["file_list"][-1]))
        assert np.array_equal(images[count - 1], picture)
        total += count
    assert total == 12 and Image.open(drawn / "results" / "contact_sheet.png").width > 500
    thumbnails = [
        np.asarray(Image.open(path).convert("L").resize((32, 32)), float).ravel()
        for path in sorted((drawn / "images").glob("*.jpg"))
    ]
    assert (
        min(np.abs(a - b).mean() for a in thumbnails for b in thumbnails if a is not b) > 1
    )  # no two look alike, in any two splits


# ---------------------------------------------------------------- nothing of the user's is lost

ODD_NAME_LIST = [
    "00004.jpg",  # of a larger drawing
    "01500.jpg",
    "01500.xml",
    "holiday.jpg",
    "notes.txt",
    "1.jpg",
    "00001.png",
    "00001.jpg.txt",
    "00001.JPG",
    "٠٠٠٠١.jpg",  # Arabic digits
    "train",
]


@pytest.mark.parametrize("name", ODD_NAME_LIST)
def test_a_file_that_a_drawing_would_not_draw_stops_it_before_anything_is_written(
    tmp_path, monkeypatch, name
):
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "dataset.json").write_text('{"drawn": true}')
    (images / "00000.jpg").write_bytes(b"of an earlier drawing")
    if name == "train":
        (images / "train").mkdir()
        (images / "train" / "00000.jpg").write_bytes(b"mine")
    else:
        (images / name).write_bytes(b"mine")
    before = contents(tmp_path)
    monkeypatch.setattr(prepare_data, "draw_picture", None)
    code, sentence = draw(monkeypatch, tmp_path)
    assert code == 1 and sentence.startswith(f"error: {images / name}: ") and "\n" not in sentence
    assert "move it away" in sentence and "--data" in sentence
    assert contents(tmp_path) == before


def test_a_drawing_may_be_repeated_and_made_larger_and_leaves_hidden_files_alone(
    tmp_path, monkeypatch
):
    images = tmp_path / "images"
    assert draw(monkeypatch, tmp_path) == (0, "")
    first = contents(images)
    assert len(first) == 8
    for name in (".writing-00007.jpg", ".DS_Store"):  # of a drawing that was killed; of macOS
        (images / name).write_bytes(b"hidden")
    assert draw(monkeypatch, tmp_path, "--seed", 1) == (0, "")
    second = contents(images)
    assert second.keys() - first.keys() == {images / ".writing-00007.jpg", images / ".DS_Store"}
    assert all(second[path] != raw for path, raw in first.items() if path.suffix == ".jpg")
    assert draw(monkeypatch, tmp_path, "--pictures", 5) == (0, "")  # the later flag counts
    dataset = common.read_data_set(tmp_path)[0]
    assert sum(len(dataset[split]["file_list"]) for split in SPLIT_LIST) == 5


OWN_DATASET = {
    "own": '{"source": "mine", "drawn": false}',
    "of another program": '{"name": "faces"}',
    "damaged": '{"sour',
    "none": None,
}


@pytest.mark.parametrize("dataset", list(OWN_DATASET))
@pytest.mark.parametrize("name", ["00000", "holiday"])
def test_a_folder_that_was_not_drawn_is_not_drawn_into(tmp_path, monkeypatch, dataset, name):
    write_example(tmp_path / "images", name, [GOOD])
    if OWN_DATASET[dataset]:
        (tmp_path / "dataset.json").write_text(OWN_DATASET[dataset])
    before = contents(tmp_path)
    code, sentence = draw(monkeypatch, tmp_path)
    assert code == 1 and str(tmp_path) in sentence and "--data" in sentence and "\n" not in sentence
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stopped", [False, True])
def test_a_data_set_of_ones_own_pictures_is_not_drawn_over(tmp_path, monkeypatch, own, stopped):
    data = tmp_path / "data"
    shutil.copytree(own, data)
    if stopped:  # while it was packed; 03_train.py starts a drawing where it finds this in data
        (data / "dataset.json").write_text('{"drawn": false}')
    before = contents(data)
    code, sentence = draw(monkeypatch, data)
    assert code == 1 and str(data / "dataset.json") in sentence and "--source" in sentence
    assert contents(data) == before


def test_own_pictures_named_as_drawn_ones_are_neither_overwritten_nor_deleted(tmp_path):
    for number in range(12):
        write_example(
            tmp_path / "mine" / "images", f"{number:05d}", [GOOD], suffix=".jpg", seed=number
        )
    before = contents(tmp_path)
    result = run_script("01_prepare_data.py", "--data", tmp_path / "mine", "--pictures", 4)
    assert result.returncode == 1 and "mine" in result.stderr and contents(tmp_path) == before


@pytest.mark.parametrize("name", ["dataset.json", "train_images.npy", "val_labels.npy"])
@pytest.mark.parametrize("draws", [True, False])
def test_a_file_of_our_names_that_is_not_ours_is_not_overwritten(
    tmp_path, monkeypatch, name, draws
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text('{"name": "faces"}')
    source = write_own_pictures(tmp_path / "source", 4)
    before = contents(tmp_path)
    code, sentence = (
        draw(monkeypatch, tmp_path / "data")
        if draws
        else prepare(monkeypatch, source, tmp_path / "data")
    )
    assert code == 1 and name in sentence and "--data" in sentence and contents(tmp_path) == before


def test_a_drawing_that_was_stopped_is_repeated(tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(prepare_data.multiprocessing, "Pool", stop)
        code, _ = draw(stopped, tmp_path)
    assert code == 1 and read_dataset(tmp_path) == {"drawn": True}
    with pytest.raises(UserError, match="dataset.json"):
        common.read_data_set(tmp_path)
    (tmp_path / "images" / "00000.jpg").write_bytes(b"half a picture")
    assert draw(monkeypatch, tmp_path) == (0, "")
    common.read_data_set(tmp_path)


def test_packing_that_was_stopped_is_repeated(tmp_path, monkeypatch):
    source = write_own_pictures(tmp_path / "source", 5)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(prepare_data, "draw_contact_sheet", stop)
        assert prepare(stopped, source, tmp_path / "data")[0] == 1
    assert (tmp_path / "data" / "test_images.npy").exists()
    assert prepare(monkeypatch, source, tmp_path / "data") == (0, "")
    common.read_data_set(tmp_path / "data")


def test_pictures_inside_of_the_data_folder_stay_as_they_are(tmp_path, monkeypatch):
    source = write_own_pictures(tmp_path / "images", 5)
    before = contents(source)
    for _ in range(2):
        assert prepare(monkeypatch, source, tmp_path) == (0, "")
    assert contents(source) == before and read_dataset(tmp_path)["drawn"] is False
    assert draw(monkeypatch, tmp_path)[0] == 1 and contents(source) == before


# ---------------------------------------------------------------- from boxes to points


@pytest.mark.parametrize(
    "low, high, centre",
    [
        (20, 50, 35),  # whole
        (0, 18, 3),
        (1, 18, 3),  # cut at the left or at the top; LabelImg writes 1
        (302, 320, 317),
        (310, 321, 325),  # at the right or at the bottom; the point may lie outside
        (0, 320, 160),  # at both
    ],
)
def test_a_cut_box_gives_its_point_from_the_side_that_is_whole(low, high, centre):
    assert prepare_data.find_centre(low, high, 320, 30) == centre


def test_where_box_sizes_differ_a_cut_box_gives_its_middle():
    assert prepare_data.find_centre(0, 18, 320, None) == 9


CUT_DICT = {
    "a": (20, 30, 50, 60),
    "b": (1, 30, 20, 60),
    "c": (20, 75, 50, 96),
    "d": (50, 40, 64, 70),
    "e": (55, 40, 64, 70),
    "f": (0, 40, 4, 70),
}


def test_cut_boxes_end_as_points_in_the_packed_labels(tmp_path, monkeypatch, capsys):
    for name, box in CUT_DICT.items():
        write_example(tmp_path / "source", name, [("eye", *box), ("other", 20, 30, 50, 60)])
    assert prepare(monkeypatch, tmp_path / "source", tmp_path / "data") == (0, "")
    found = {name: places[0] for name, places in place_dict(tmp_path / "data").items()}
    assert found == {
        "a.png": (35, 45),
        "b.png": (5, 45),
        "c.png": (35, 90),
        "d.png": (65, 55),
        "e.png": (70, 55),
        "f.png": (35, 45),
    }  # d and e: outside. f: 11 px outside, left out; what remains is the other
    out = capsys.readouterr().out
    assert "cut by the picture's edge: 5" in out and "left out: 1 points" in out


def test_a_point_outside_that_is_kept_is_learned_and_one_that_is_left_out_would_not_be():
    model = load("02_model")
    for outside, is_learned in (
        (0, True),
        (prepare_data.REACH - 0.1, True),
        (prepare_data.REACH, False),
    ):
        for x, y in (
            (-outside - 0.001, 40),
            (64 + outside, 40),
            (20, -outside - 0.001),
            (20, 96 + outside),
        ):
            _, gt_class_id_3d_array = model.match(np.array([[0, 1, x, y]]), 1, 3, 2)
            assert gt_class_id_3d_array.any() == is_learned, (x, y)


@pytest.fixture
def tile_list(monkeypatch):
    """The tiles of the contact sheet; it is drawn, too."""
    result_list, real = [], prepare_data.save_close_ups

    def save(path, tiles, columns):
        result_list.extend(tiles)
        real(path, tiles, columns)

    monkeypatch.setattr(prepare_data, "save_close_ups", save)
    return result_list


def test_the_contact_sheet_shows_the_point_that_is_trained(tmp_path, monkeypatch, tile_list):
    """A dot at x = 3 in a box that the edge cuts lies in the middle of its tile, as the cross."""
    for name in "abc":
        write_example(tmp_path / "source", name, [("eye", 1, 35, 18, 65)])
        image_3d_array = np.zeros((96, 64, 3), np.uint8)
        paint_dot(image_3d_array, 3, 50, sigma=2)
        Image.fromarray(image_3d_array).save(tmp_path / "source" / f"{name}.png")
    write_example(tmp_path / "source", "d", [("whole", 10, 20, 40, 50)])
    assert prepare(monkeypatch, tmp_path / "source", tmp_path / "data") == (0, "")
    _, image_3d_array, x, y, reach, point_list = next(
        tile for tile in tile_list if tile[0] == "eye"
    )
    bright_x, bright_y = centroid(image_3d_array[:, :, 0].astype(float) ** 2)
    assert math.hypot(bright_x - x, bright_y - y) < 0.2  # px; the edge cuts the dot a little
    assert reach == 1.5 * 30 and point_list == [(x, y, common.COLOUR_LIST[0])]
    with Image.open(tmp_path / "data" / "results" / "contact_sheet.png") as image:
        assert image.width > 500


def test_the_contact_sheet_has_fifty_tiles_at_most_and_as_many_of_each_class(
    tmp_path, monkeypatch, tile_list
):
    source = tmp_path / "source"
    for number in range(40):
        boxes = [("left eye", 10, 20, 40, 50), ("right eye", 20, 50, 50, 80)]
        write_example(source, f"{number}", boxes if number % 2 else boxes * 2)
    assert prepare(monkeypatch, source, tmp_path / "data") == (0, "")
    name_list = [tile[0] for tile in tile_list]
    assert len(name_list) == 50 and name_list.count("left eye") == 25


@pytest.mark.parametrize("other_side, centre", [(31, 5), (40, 10)])
def test_boxes_that_differ_by_the_pixel_that_labelimg_truncates_are_still_of_one_size(
    tmp_path, monkeypatch, other_side, centre
):
    for name, box in (
        ("a", (20, 30, 50, 60)),
        ("b", (20, 30, 50, 60)),
        ("c", (20, 30, 20 + other_side, 30 + other_side)),
        ("d", (0, 30, 20, 60)),
    ):
        write_example(tmp_path / "source", name, [("eye" if name != "d" else "cut", *box)])
    assert prepare(monkeypatch, tmp_path / "source", tmp_path / "data")[0] == 0
    label_2d_array = np.concatenate(
        [np.load(tmp_path / "data" / f"{split}_labels.npy") for split in SPLIT_LIST]
    )
    assert label_2d_array[label_2d_array[:, 1] == 1, 2].tolist() == [
        centre
    ]  # the class "cut" comes first


@pytest.mark.parametrize(
    "label_list, max_per_class, lost",
    [
        ([(0, 1, 40, 40), (0, 2, 60, 60)], 1, 1),  # one cell
        ([(0, 1, 40, 40), (1, 2, 60, 60)], 1, 0),  # two pictures
        ([(0, 1, 40, 40), (0, 1, 70, 40)], 1, 0),  # neighbours; the best cell answers anyway
        ([(0, 1, 40, 40), (0, 1, 70, 40)], 2, 1),  # neighbours of one class
        ([(0, 1, 40, 40), (0, 2, 70, 40)], 2, 0),  # neighbours of two classes
        ([(0, 1, 40, 40), (0, 1, 100, 40)], 2, 0),  # two cells apart
        ([], 1, 0),
    ],
)
def test_collisions_are_counted(label_list, max_per_class, lost):
    assert (
        prepare_data.count_collisions(
            np.array(label_list, np.float32).reshape(-1, 4), max_per_class
        )
        == lost
    )


# ---------------------------------------------------------------- reading XML


def read(tmp_path, content, width=64, height=96):
    path = tmp_path / "label.xml"
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return prepare_data.read_labels(path, width, height)


GOOD = ("eye", 10, 20, 40, 50)


def test_a_file_as_labelimg_writes_it_is_read(tmp_path):
    text = """<annotation>
\t<folder>images</folder>
\t<filename>some other name.jpg</filename>
\t<path>C:\\Users\\me\\elsewhere\\some other name.jpg</path>
\t<source>
\t\t<database>Unknown</database>
\t</source>
\t<size>
\t\t<width>64</width>
\t\t<height>96</height>
\t\t<depth>3</depth>
\t</size>
\t<segmented>0</segmented>
\t<object>
\t\t<name>left eye</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>1</truncated>
\t\t<difficult>0</difficult>
\t\t<bndbox>
\t\t\t<xmin>1</xmin>
\t\t\t<ymin>20</ymin>
\t\t\t<xmax>18</xmax>
\t\t\t<ymax>50</ymax>
\t\t</bndbox>
\t</object>
</annotation>
"""
    assert read(tmp_path, text) == [{"class": "left eye", "box": [1, 20, 18, 50]}]


@pytest.mark.parametrize(
    "name", ["left eye", "关键点", "🎯", "n" * 5000, "<&>'\"", "a/b\\c", "null", "0", "É"]
)
def test_odd_class_names_are_kept_as_they_are(tmp_path, name):
    assert read(tmp_path, xml_text([(name, *GOOD[1:])]))[0]["class"] == name


def test_space_round_names_and_numbers_does_not_matter(tmp_path):
    assert read(tmp_path, xml_text([("  eye\n", " 10 ", "\n20\t", "40.5", "5e1")])) == [
        {"class": "eye", "box": [10, 20, 40.5, 50]}
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1", "cp1252"])
def test_other_encodings_are_read_where_the_file_says_which(tmp_path, encoding):
    text = f'<?xml version="1.0" encoding="{encoding.replace("-sig", "")}"?>' + xml_text(
        [("É", *GOOD[1:])]
    )
    assert read(tmp_path, text.encode(encoding))[0]["class"] == "É"


def test_a_label_without_objects_is_an_empty_picture_and_one_without_a_size_is_fine(tmp_path):
    assert read(tmp_path, xml_text([])) == []
    assert len(read(tmp_path, "<annotation>" + xml_text([GOOD]).split("</size>")[1])) == 1


def test_several_objects_of_one_class_are_all_read(tmp_path):
    assert [k["box"][0] for k in read(tmp_path, xml_text([GOOD, ("eye", 11, 20, 41, 50)]))] == [
        10,
        11,
    ]


# ---------------------------------------------------------------- folders


def test_own_pictures_are_packed_with_their_points(own):
    dataset = read_dataset(own)
    assert (
        dataset["category_list"] == ["background", "left eye", "right eye"]
        and dataset["drawn"] is False
    )
    assert (dataset["height"], dataset["width"], dataset["box_size"]) == (96, 64, [30, 30])
    assert [len(dataset[split]["file_list"]) for split in SPLIT_LIST] == [7, 1, 2]
    for split in SPLIT_LIST:
        images, labels = np.load(own / f"{split}_images.npy"), np.load(own / f"{split}_labels.npy")
        for index, name in enumerate(dataset[split]["file_list"]):
            number = int(name.split(" ")[1].split(".")[0])
            expected = [(1, 20 + 2 * number, 30), (2, 20 + 2 * number, 60)] if number < 9 else []
            assert np.allclose(labels[labels[:, 0] == index, 1:], np.array(expected).reshape(-1, 3))
            assert np.array_equal(
                images[index], np.asarray(Image.open(own.parent / "my pictures" / name))
            )


def split_sizes(data):
    return [len(read_dataset(data)[split]["file_list"]) for split in SPLIT_LIST]


@pytest.mark.parametrize(
    "count_dict, sizes",
    [
        ({"train": 20, "test": 4}, [18, 2, 4]),  # a tenth of train/ becomes val
        ({"train": 3, "test": 4}, [2, 1, 4]),
        ({"train": 3, "val": 2, "test": 4}, [3, 2, 4]),
    ],
)
def test_a_folder_split_by_hand_keeps_its_split(tmp_path, monkeypatch, count_dict, sizes):
    for split, count in count_dict.items():
        for number in range(count):
            write_example(tmp_path / "source" / split, f"{split}{number}", [GOOD])
    assert prepare(monkeypatch, tmp_path / "source", tmp_path / "data")[0] == 0
    assert split_sizes(tmp_path / "data") == sizes
    dataset = read_dataset(tmp_path / "data")
    assert all(name.startswith("test") for name in dataset["test"]["file_list"])
    assert all(
        name.startswith("val" if "val" in count_dict else "train")
        for name in dataset["val"]["file_list"]
    )


@pytest.mark.parametrize("inside", [["train", "val"], ["val", "test"], ["train"], ["val"]])
@pytest.mark.parametrize("loose", [0, 4])
def test_a_split_folder_without_its_fellows_is_refused_and_nothing_dropped(
    tmp_path, monkeypatch, inside, loose
):
    for split in inside:
        write_own_pictures(tmp_path / "source" / split, 3)
    write_own_pictures(tmp_path / "source", loose)
    code, sentence = prepare(monkeypatch, tmp_path / "source", tmp_path / "data")
    assert (
        code == 1
        and "train/" in sentence
        and "test/" in sentence
        and str(tmp_path / "source") in sentence
    )
    assert not (tmp_path / "data").exists()


def test_pictures_beside_train_and_test_are_counted_and_told(tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        write_own_pictures(tmp_path / "source" / split, 3)
    assert prepare(monkeypatch, tmp_path / "source", tmp_path / "data")[0] == 0
    assert "not used" not in capsys.readouterr().out
    write_own_pictures(tmp_path / "source", 5)
    assert prepare(monkeypatch, tmp_path / "source", tmp_path / "data")[0] == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("not used"))
    assert (
        " 5 " in line
        and str(tmp_path / "source") in line
        and split_sizes(tmp_path / "data") == [2, 1, 3]
    )


@pytest.mark.parametrize(
    "count, sizes", [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [3, 1, 1]), (12, [9, 1, 2])]
)
def test_a_small_folder_has_a_picture_for_each_split(tmp_path, count, sizes):
    split_dict, _ = prepare_data.read_source(write_own_pictures(tmp_path / "source", count), 0)
    assert [len(split_dict[split]) for split in SPLIT_LIST] == sizes
    path_list = [
        example["path"] for example_list in split_dict.values() for example in example_list
    ]
    assert len(set(path_list)) == count


def test_the_default_drawing_is_split_as_ever(tmp_path, monkeypatch):
    """The pictures of each split decide every figure of the README."""
    monkeypatch.setattr(
        prepare_data,
        "read_folder",
        lambda folder: ([{"path": number} for number in range(1465)], []),
    )
    split_dict, _ = prepare_data.read_source(tmp_path, 0)
    order = np.random.default_rng(0).permutation(1465)
    for split, part in (("val", order[:117]), ("train", order[117:1172]), ("test", order[1172:])):
        assert [example["path"] for example in split_dict[split]] == sorted(part)


def test_the_seed_alone_decides_the_split(tmp_path, monkeypatch):
    source = write_own_pictures(tmp_path / "source", 12)
    test_list = []
    for seed in (0, 0, 1):
        split_dict, _ = prepare_data.read_source(source, seed)
        test_list.append([example["path"].name for example in split_dict["test"]])
    assert test_list[0] == test_list[1] != test_list[2]


def test_pictures_of_several_sizes_are_padded_to_the_largest_and_labels_stay(tmp_path, monkeypatch):
    source = tmp_path / "source"
    write_example(source, "tall", [("eye", 10, 20, 40, 50)], width=40, height=100)
    for name in ("wide", "wider"):
        write_example(source, name, [("eye", 60, 10, 90, 40)], width=100, height=50)
    assert prepare(monkeypatch, source, tmp_path / "data")[0] == 0
    dataset = read_dataset(tmp_path / "data")
    assert (dataset["height"], dataset["width"]) == (128, 128)
    for split in SPLIT_LIST:
        name, (width, height) = dataset[split]["file_list"][0], dataset[split]["size_list"][0]
        image, label = (
            np.load(tmp_path / "data" / f"{split}_images.npy")[0],
            np.load(tmp_path / "data" / f"{split}_labels.npy")[0],
        )
        assert (width, height) == ((40, 100) if name == "tall.png" else (100, 50))
        assert (image[:, width:] == image[:, width - 1 : width]).all() and (
            image[height:] == image[height - 1 : height]
        ).all()
        assert label[2:].tolist() == ([25, 35] if name == "tall.png" else [75, 25])


def test_suffixes_in_capitals_png_bmp_and_odd_paths_are_read(tmp_path, monkeypatch):
    source = tmp_path / "my pictures 我的图片"
    for name, suffix in (("a b", ".JPG"), ("图", ".PNG"), ("c", ".bmp"), ("d.e", ".jpeg")):
        write_example(source, name, [("eye", *GOOD[1:])], suffix=suffix)
    (source / "a b.xml").rename(source / "a b.XML")
    assert prepare(monkeypatch, source, tmp_path / "data 数据")[0] == 0
    dataset = read_dataset(tmp_path / "data 数据")
    assert sorted(name for split in SPLIT_LIST for name in dataset[split]["file_list"]) == [
        "a b.JPG",
        "c.bmp",
        "d.e.jpeg",
        "图.PNG",
    ]


def test_a_class_may_occur_several_times_in_a_picture(tmp_path, monkeypatch):
    source = tmp_path / "source"
    for name in "abc":
        write_example(
            source,
            name,
            [("eye", 10, 20, 40, 50), ("eye", 10, 60, 40, 90), ("ear", 30, 60, 60, 90)],
        )
    assert prepare(monkeypatch, source, tmp_path / "data")[0] == 0
    assert read_dataset(tmp_path / "data")["max_per_class"] == 2


def test_keypoints_that_may_be_lost_are_counted_split_by_split(tmp_path, monkeypatch, capsys):
    source = tmp_path / "source"
    for split in SPLIT_LIST:
        for name in "ab":
            crowded = [("eye", 34, 34, 54, 54), ("ear", 36, 36, 56, 56)]
            write_example(
                source / split,
                name,
                crowded if split != "val" or name == "a" else [("eye", 5, 5, 25, 25)],
            )
    assert prepare(monkeypatch, source, tmp_path / "data")[0] == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "collision" in line)
    assert line.split()[-3:] == ["2", "1", "2"] and "may be lost" in line


def test_all_bad_files_are_listed_at_once_and_skipped_where_the_reader_says_so(
    tmp_path, monkeypatch, capsys
):
    source = write_own_pictures(tmp_path / "source", 5)
    (source / "broken.jpg").write_bytes(b"not a picture")
    shutil.copy(source / "picture 0.xml", source / "broken.xml")
    shutil.copy(source / "picture 0.png", source / "no label.png")
    shutil.copy(source / "picture 0.xml", source / "no picture.xml")
    write_example(source, "bad box", [("eye", 40, 20, 10, 50)])
    write_example(source, "twin", [GOOD])
    write_example(source, "twin", [GOOD], suffix=".jpg")
    code, sentence = prepare(monkeypatch, source, tmp_path / "data")
    out = capsys.readouterr().out
    assert (
        code == 1
        and "5 bad files" in sentence
        and "--skip-bad" in sentence
        and not (tmp_path / "data").exists()
    )
    for name in ("broken.jpg", "no label.png", "no picture.xml", "bad box.xml", "twin.png"):
        assert (
            sum(
                line.startswith("bad: ") and name in line.split(": ")[1]
                for line in out.splitlines()
            )
            == 1
        ), name
    assert prepare(monkeypatch, source, tmp_path / "data", "--skip-bad")[0] == 0
    assert sum("left out" in line for line in capsys.readouterr().out.splitlines()) == 5
    assert sum(split_sizes(tmp_path / "data")) == 6


def write_case(folder, case):
    """A --source folder that cannot be used."""
    folder.mkdir()
    if case == "one picture":
        write_example(folder, "a", [GOOD])
    elif case == "two pictures":
        write_own_pictures(folder, 2)
    elif case == "no keypoint":
        for name in "abc":
            write_example(folder, name, [])
    elif case == "all bad":
        for name in "abc":
            write_example(folder, name, [("eye", 5, 5, 5, 5)])
    elif case == "only XML":
        (folder / "a.xml").write_text(xml_text([GOOD]), encoding="utf-8")
    elif case == "empty test":
        write_own_pictures(folder / "train", 3)
        (folder / "test").mkdir()


@pytest.mark.parametrize("arguments", [[], ["--skip-bad"]])
@pytest.mark.parametrize(
    "case",
    [
        "empty folder",
        "one picture",
        "two pictures",
        "no keypoint",
        "all bad",
        "only XML",
        "empty test",
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path, monkeypatch, case, arguments
):
    write_case(tmp_path / "source", case)
    code, sentence = prepare(monkeypatch, tmp_path / "source", tmp_path / "data", *arguments)
    assert (
        code == 1
        and sentence.startswith("error: ")
        and "\n" not in sentence
        and not (tmp_path / "data").exists()
    )


def test_a_missing_source_and_a_file_as_source_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in ("missing", "file"):
        code, sentence = prepare(monkeypatch, tmp_path / name, tmp_path / "data")
        assert code == 1 and str(tmp_path / name) in sentence


def test_a_training_split_without_any_keypoint_is_refused(tmp_path, monkeypatch):
    for name in "abc":
        write_example(tmp_path / "source" / "train", name, [])
    write_example(tmp_path / "source" / "test", "d", [GOOD])
    code, sentence = prepare(monkeypatch, tmp_path / "source", tmp_path / "data")
    assert code == 1 and "train" in sentence


def test_a_class_that_only_the_test_split_holds_is_told(tmp_path, monkeypatch, capsys):
    write_own_pictures(tmp_path / "source" / "train", 3, ["left eye"])
    write_own_pictures(tmp_path / "source" / "test", 3)
    assert prepare(monkeypatch, tmp_path / "source", tmp_path / "data")[0] == 0
    output = capsys.readouterr().out
    (line,) = (line for line in output.splitlines() if line.strip().startswith("right eye"))
    assert line.split()[2:5] == ["0", "0", "2"] and "none in train: right eye" in output


@pytest.mark.filterwarnings("error")
def test_the_contact_sheet_shows_chinese_names_as_numbers(
    tmp_path, monkeypatch, capsys, tile_list
):
    source = write_own_pictures(tmp_path / "source", 6, ["左眼", "关键点"])
    assert prepare(monkeypatch, source, tmp_path / "data") == (0, "")
    assert read_dataset(tmp_path / "data")["category_list"] == ["background", "关键点", "左眼"]
    assert {tile[0] for tile in tile_list} == {"1", "2"}
    assert "1 = 关键点" in capsys.readouterr().out


def test_the_next_command_can_be_typed_as_it_stands(tmp_path, monkeypatch, capsys):
    data = tmp_path / "my data's"
    assert prepare(monkeypatch, write_own_pictures(tmp_path / "source", 4), data) == (0, "")
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line.removeprefix("next: ")) == [
        "python",
        "03_train.py",
        "--data",
        str(data),
    ]


@pytest.mark.parametrize(
    "arguments", [["--pictures", "2"], ["--pictures", "many"], ["--seed", "-1"], ["--sauce", "x"]]
)
def test_a_wrong_flag_ends_with_code_2_and_the_usage(tmp_path, monkeypatch, capsys, arguments):
    code, _ = call_main(prepare_data, monkeypatch, "--data", tmp_path / "data", *arguments)
    assert (
        code == 2 and arguments[0] in capsys.readouterr().err and not (tmp_path / "data").exists()
    )


# ---------------------------------------------------------------- real pictures, where they are


def test_real_pictures_of_a_mouse_with_17_points_are_read(tmp_path, monkeypatch, capsys):
    source = common.DATA_FOLDER.parent.parent / "shared" / "data" / "mouse_mirror"
    if not source.is_dir():
        pytest.skip("the mouse pictures are not here")
    assert prepare(monkeypatch, source, tmp_path / "data")[0] == 0
    dataset = read_dataset(tmp_path / "data")
    assert (dataset["height"], dataset["width"]) == (416, 416) and len(
        dataset["category_list"]
    ) == 1 + 17
    assert dataset["box_size"] == [30, 30] and [
        len(dataset[split]["file_list"]) for split in SPLIT_LIST
    ] == [65, 7, 18]
    assert "may be lost" in capsys.readouterr().out
