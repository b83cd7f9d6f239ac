"""01_prepare_data.py: drawing, reading LabelImg folders, cut boxes, collisions, packing, and all that may be wrong with files."""

import json
import math
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from common import CELL, UserError
from conftest import call_main, centroid, load, run_script, write_example, write_own_pictures, xml_text

prepare_data = load("01_prepare_data")


def prepare(monkeypatch, source, data, *arguments):
    """Run main() on a folder: exit code and sentence."""
    return call_main(prepare_data, monkeypatch, "--source", source, "--data", data, *arguments)


def read_dataset(data):
    return json.loads((data / "dataset.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- drawing

@pytest.mark.parametrize("name", list(prepare_data.MARK_DICT))
@pytest.mark.parametrize("x, y, angle, scale", [(60, 50, 0, 1), (60.25, 49.5, 0.1, 1), (59.99, 50.73, -0.2, 0.9), (60.5, 50.5, 1.0, 1.1)])
def test_a_marks_middle_is_painted_at_the_sub_pixel_place(name, x, y, angle, scale):
    picture = np.zeros((100, 120, 3), np.float32)
    prepare_data.paint(picture, x, y, angle, scale, prepare_data.MARK_DICT[name], (1, 1, 1))
    found_x, found_y = centroid(picture[:, :, 0])
    assert math.hypot(found_x - x, found_y - y) < 0.05
    assert 250 < picture[:, :, 0].sum() < 700  # px of ink; and nothing was cut off at the side of the painted patch


def test_a_shape_is_painted_with_its_colour_and_opacity():
    picture = np.full((60, 60, 3), 100, np.float32)
    prepare_data.paint(picture, 30, 30, 0, 1, prepare_data.disc, (200, 0, 100), opacity=0.5)
    assert picture[30, 30].tolist() == [150, 50, 100] and picture[2, 2].tolist() == [100, 100, 100]


def test_a_shape_at_the_edge_is_painted_as_far_as_there_is_picture():
    picture, whole = np.zeros((60, 60, 3), np.float32), np.zeros((160, 160, 3), np.float32)
    prepare_data.paint(picture, 3.25, 58.5, 0.3, 1, prepare_data.MARK_DICT["keyPoint_2"], (1, 1, 1))
    prepare_data.paint(whole, 53.25, 108.5, 0.3, 1, prepare_data.MARK_DICT["keyPoint_2"], (1, 1, 1))
    assert np.allclose(picture, whole[50:110, 50:110], atol=1e-4)


def test_the_same_seed_and_index_draw_the_same_picture_and_others_do_not(tmp_path):
    for folder, index, seed in (("a", 3, 0), ("b", 3, 0), ("c", 3, 1), ("d", 4, 0)):
        prepare_data.draw_picture(index, seed, tmp_path / folder)
    same = [(tmp_path / folder / "00003.jpg").read_bytes() for folder in "abc"]
    assert same[0] == same[1] != same[2] != (tmp_path / "d" / "00004.jpg").read_bytes()
    first, second = ((tmp_path / folder / "00003.xml").read_text().split("</folder>")[1] for folder in "ab")
    assert first == second


def test_marks_keep_their_distance_so_that_two_never_share_a_cell():
    rng, place_list = np.random.default_rng(0), []
    for _ in range(40):
        prepare_data.find_place(rng, (100, 800, 220, 1000), place_list)
    places = np.array(place_list)
    distance = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1)) + 1e9 * np.eye(len(places))
    assert distance.min() >= prepare_data.MARK_DISTANCE > CELL * math.sqrt(2)


def test_the_drawn_label_stands_where_the_mark_was_painted(tmp_path, monkeypatch):
    painted = []
    real = prepare_data.paint
    monkeypatch.setattr(prepare_data, "paint", lambda picture, x, y, angle, scale, shape, *rest: (
        painted.append((shape, x, y)), real(picture, x, y, angle, scale, shape, *rest)))
    for index in range(3):
        prepare_data.draw_picture(index, 5, tmp_path)
        boxes = {k["class"]: k["box"] for k in prepare_data.read_labels(tmp_path / f"{index:05d}.xml", prepare_data.WIDTH, prepare_data.HEIGHT)}
        for name, shape in prepare_data.MARK_DICT.items():
            place_list = [(x, y) for used, x, y in painted if used is shape]
            assert len(place_list) == (name in boxes)
            for x, y in place_list:
                label = prepare_data.to_label_array(
                    [{"size": (prepare_data.WIDTH, prepare_data.HEIGHT), "keypoints": [{"class": name, "box": boxes[name]}]}],
                    ["background", name], (prepare_data.BOX_SIDE, prepare_data.BOX_SIDE))
                assert np.abs(label[0, 2:] - (x, y)).max() < 0.011  # two decimals
        painted.clear()


def test_the_drawn_data_set_has_what_the_design_promises(drawn):
    dataset = read_dataset(drawn)
    assert dataset["category_list"] == ["background", *prepare_data.MARK_DICT] and dataset["max_per_class"] == 1
    assert (dataset["height"], dataset["width"]) == (prepare_data.HEIGHT, prepare_data.WIDTH) and dataset["box_size"] == [30, 30]
    total = 0
    for split in ("train", "test"):
        images = np.load(drawn / f"{split}_images.npy", mmap_mode="r")
        labels = np.load(drawn / f"{split}_labels.npy")
        count = len(dataset[split]["file_list"])
        assert images.shape == (count, prepare_data.HEIGHT, prepare_data.WIDTH, 3) and images.dtype == np.uint8
        assert labels.dtype == np.float32 and labels.shape[1] == 4
        assert np.isin(labels[:, 0], range(count)).all() and np.isin(labels[:, 1], (1, 2)).all()
        assert (np.diff(labels[:, 0]) >= 0).all()  # sorted by picture: the loader relies on it
        assert dataset[split]["size_list"] == [[prepare_data.WIDTH, prepare_data.HEIGHT]] * count
        picture = np.asarray(Image.open(drawn / "images" / dataset[split]["file_list"][-1]))
        assert np.array_equal(images[count - 1], picture)
        total += count
    assert total == 12 and Image.open(drawn / "results" / "contact_sheet.png").width > 500


def test_drawing_fewer_pictures_removes_what_an_earlier_drawing_left(tmp_path, monkeypatch):
    for name in ("00000.jpg", "00007.jpg", "00007.xml"):
        (tmp_path / name).write_bytes(b"")
    prepare_data.draw_pictures(tmp_path, 0, 0)
    assert list(tmp_path.iterdir()) == []


def test_drawing_refuses_a_folder_that_holds_a_users_pictures(tmp_path):
    for name in ("00007.jpg", "holiday.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(prepare_data.UserError, match="holiday.jpg"):
        prepare_data.draw_pictures(tmp_path, 0, 0)
    assert len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------- from boxes to points

@pytest.mark.parametrize("box, centre", [
    ((20, 30, 50, 60), (35, 45)),  # whole
    ((0, 30, 18, 60), (3, 45)), ((1, 30, 18, 60), (3, 45)),  # cut at the left; LabelImg writes 1
    ((20, 0, 50, 18), (35, 3)), ((20, 1, 50, 18), (35, 3)),  # at the top
    ((320 - 18, 30, 320, 60), (317, 45)), ((20, 480 - 18, 50, 480), (35, 477)),  # right, bottom
    ((1, 1, 18, 20), (3, 5)), ((300, 470, 320, 480), (315, 485))])  # corners
def test_a_cut_box_gives_its_point_from_the_sides_that_are_whole(box, centre):
    assert prepare_data.box_centre(box, prepare_data.is_cut(box, 320, 480), (30, 30)) == centre


def test_where_box_sizes_differ_a_cut_box_gives_its_middle():
    box = (0, 30, 18, 60)
    assert prepare_data.box_centre(box, prepare_data.is_cut(box, 320, 480), None) == (9, 45)


def test_cut_boxes_end_as_points_in_the_packed_labels(tmp_path, monkeypatch, capsys):
    source = tmp_path / "source"
    write_example(source, "a", [("eye", 20, 30, 50, 60)])
    write_example(source, "b", [("eye", 1, 30, 20, 60)])  # centre at x = 5
    write_example(source, "c", [("eye", 20, 75, 50, 96)])  # centre at y = 90
    write_example(source, "d", [("eye", 50, 40, 64, 70)])  # centre at x = 65: outside, but the cell must exist
    assert prepare(monkeypatch, source, tmp_path / "data") == (0, "")
    dataset, place_dict = read_dataset(tmp_path / "data"), {}
    for split in ("train", "test"):
        for picture, _, x, y in np.load(tmp_path / "data" / f"{split}_labels.npy"):
            place_dict[dataset[split]["file_list"][int(picture)]] = (float(x), float(y))
    assert place_dict["a.png"] == (35, 45) and place_dict["b.png"] == (5, 45) and place_dict["c.png"] == (35, 90)
    assert 63.9 < place_dict["d.png"][0] < 64
    assert "cut by the picture's edge: 3" in capsys.readouterr().out


@pytest.mark.parametrize("other_side, centre", [(31, 5), (40, 10)])
def test_boxes_that_differ_by_the_pixel_that_labelimg_truncates_are_still_of_one_size(tmp_path, monkeypatch, other_side, centre):
    for name, box in (("a", (20, 30, 50, 60)), ("b", (20, 30, 50, 60)), ("c", (20, 30, 20 + other_side, 30 + other_side)), ("d", (0, 30, 20, 60))):
        write_example(tmp_path / "source", name, [("eye" if name != "d" else "cut", *box)])
    assert prepare(monkeypatch, tmp_path / "source", tmp_path / "data")[0] == 0
    label_2d_array = np.concatenate([np.load(tmp_path / "data" / f"{split}_labels.npy") for split in ("train", "test")])
    assert label_2d_array[label_2d_array[:, 1] == 1, 2].tolist() == [centre]  # the class "cut" comes first


@pytest.mark.parametrize("label_list, max_per_class, lost", [
    ([(0, 1, 40, 40), (0, 2, 60, 60)], 1, 1),  # one cell
    ([(0, 1, 40, 40), (1, 2, 60, 60)], 1, 0),  # two pictures
    ([(0, 1, 40, 40), (0, 1, 70, 40)], 1, 0),  # neighbours; the best cell answers anyway
    ([(0, 1, 40, 40), (0, 1, 70, 40)], 2, 1),  # neighbours of one class
    ([(0, 1, 40, 40), (0, 2, 70, 40)], 2, 0),  # neighbours of two classes
    ([(0, 1, 40, 40), (0, 1, 100, 40)], 2, 0),  # two cells apart
    ([], 1, 0)])
def test_collisions_are_counted(label_list, max_per_class, lost):
    assert prepare_data.count_collisions(np.array(label_list, np.float32).reshape(-1, 4), max_per_class) == lost


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


@pytest.mark.parametrize("name", ["left eye", "关键点", "🎯", "n" * 5000, "<&>'\"", "a/b\\c", "null", "0", "-", "É"])
def test_odd_class_names_are_kept_as_they_are(tmp_path, name):
    assert read(tmp_path, xml_text([(name, *GOOD[1:])]))[0]["class"] == name


def test_space_round_names_and_numbers_does_not_matter(tmp_path):
    assert read(tmp_path, xml_text([("  eye\n", " 10 ", "\n20\t", "40.5", "5e1")])) == [{"class": "eye", "box": [10, 20, 40.5, 50]}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1", "cp1252"])
def test_other_encodings_are_read_where_the_file_says_which(tmp_path, encoding):
    text = f'<?xml version="1.0" encoding="{encoding.replace("-sig", "")}"?>' + xml_text([("É", *GOOD[1:])])
    assert read(tmp_path, text.encode(encoding))[0]["class"] == "É"


def test_a_label_without_objects_is_an_empty_picture_and_one_without_a_size_is_fine(tmp_path):
    assert read(tmp_path, xml_text([])) == []
    assert len(read(tmp_path, "<annotation>" + xml_text([GOOD]).split("</size>")[1])) == 1


def test_several_objects_of_one_class_are_all_read(tmp_path):
    assert [k["box"][0] for k in read(tmp_path, xml_text([GOOD, ("eye", 11, 20, 41, 50)]))] == [10, 11]


LAUGHS = ("<!DOCTYPE a [<!ENTITY l0 'ha'>" + "".join(f"<!ENTITY l{i} '{f'&l{i - 1};' * 10}'>" for i in range(1, 10)) + "]>"
          + xml_text([GOOD]).replace("eye", "&l9;"))
BAD_XML = {
    "empty": b"", "cut off": xml_text([GOOD])[:150].encode(), "not XML": b"\x89PNG\r\n\x1a\n\0\0\0", "text": b"hello",
    "wrong encoding": xml_text([("É", *GOOD[1:])]).encode("latin-1"),
    "unknown encoding": b'<?xml version="1.0" encoding="klingon"?>' + xml_text([GOOD]).encode(),
    "encoding that expat cannot": b'<?xml version="1.0" encoding="utf-7"?>' + xml_text([GOOD]).encode(),
    "doctype": b'<!DOCTYPE annotation SYSTEM "http://example.invalid/a.dtd">' + xml_text([GOOD]).encode(),
    "billion laughs": LAUGHS.encode(), "billion laughs in UTF-16": ('<?xml version="1.0" encoding="utf-16"?>' + LAUGHS).encode("utf-16"),
    "external entity": b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>" + xml_text([GOOD]).replace("eye", "&x;").encode(),
    "unknown entity": xml_text([GOOD]).replace("eye", "&nbsp;").encode(),
    "null byte": xml_text([GOOD]).replace("eye", "e\0e").encode(),
    "another kind of XML": b"<svg><rect/></svg>", "two roots": (xml_text([GOOD]) * 2).encode(),
    "no name": xml_text([("", *GOOD[1:])]).encode(), "blank name": xml_text([("  ", *GOOD[1:])]).encode(),
    "name tag missing": xml_text([GOOD]).replace("<name>eye</name>", "").encode(),
    "reserved name": xml_text([("background", *GOOD[1:])]).encode(),
    "no box": xml_text([GOOD]).replace("bndbox", "polygon").encode(), "half a box": xml_text([GOOD]).replace("xmax", "wide").encode(),
    "empty number": xml_text([("eye", "", 20, 40, 50)]).encode(), "no number": xml_text([("eye", "ten", 20, 40, 50)]).encode(),
    "comma": xml_text([("eye", "10,5", 20, 40, 50)]).encode(),
    **{f"box with {value} as {tag}": xml_text([("eye", *(value if tag == at else number for at, number in
                                                        (("xmin", 10), ("ymin", 20), ("xmax", 40), ("ymax", 50))))]).encode()
       for value in ("nan", "inf", "-inf", "1e300", "1e400", "-10") for tag in ("xmin", "ymin", "xmax", "ymax")},
    "swapped in x": xml_text([("eye", 40, 20, 10, 50)]).encode(), "swapped in y": xml_text([("eye", 10, 50, 40, 20)]).encode(),
    "no width": xml_text([("eye", 10, 20, 10, 50)]).encode(), "no height": xml_text([("eye", 10, 20, 40, 20)]).encode(),
    "outside": xml_text([("eye", 100, 20, 130, 50)]).encode(), "sticking out": xml_text([("eye", 50, 20, 80, 50)]).encode(),
    "other size": xml_text([GOOD], width=96, height=64).encode(), "size is no number": xml_text([GOOD], width="wide").encode(),
}


@pytest.mark.parametrize("kind", list(BAD_XML))
def test_a_bad_label_is_refused_in_one_short_sentence_with_its_name(tmp_path, kind):
    with pytest.raises(UserError) as caught:
        read(tmp_path, BAD_XML[kind])
    assert "label.xml" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) - len(str(tmp_path)) < 300


@pytest.mark.parametrize("kind, value", [("no number", "'ten'"), ("other size", "96"), ("swapped in x", "40"), ("box with nan as xmax", "nan"),
                                         ("reserved name", "background"), ("comma", "10,5")])
def test_the_sentence_about_a_bad_label_holds_the_bad_value(tmp_path, kind, value):
    with pytest.raises(UserError) as caught:
        read(tmp_path, BAD_XML[kind])
    assert value in str(caught.value).split("label.xml")[1]


def test_a_box_one_pixel_over_the_edge_is_still_good_as_labelimg_may_write_it(tmp_path):
    assert read(tmp_path, xml_text([("eye", 0, 0, 65, 97)]))[0]["box"] == [0, 0, 65, 97]


def test_a_very_deep_xml_ends_in_a_sentence_or_in_nothing(tmp_path):
    try:
        assert read(tmp_path, "<annotation>" + "<a>" * 50000 + "</a>" * 50000 + "</annotation>") == []
    except UserError:
        pass


def test_random_changes_of_a_label_end_in_a_sentence_or_in_good_boxes(tmp_path):
    rng = np.random.default_rng(0)
    whole = xml_text([GOOD, ("关键点", 0, 20.5, 18, 50.5)]).encode("utf-8")
    refused = 0
    for _ in range(500):
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 5)):
            changed[place] = rng.integers(256) if rng.random() < 0.3 else rng.choice(np.frombuffer(b"<>/&;\"0123456789.-einfa\0", np.uint8))
        if rng.random() < 0.2:
            changed = changed[:rng.integers(len(changed))]
        try:
            for keypoint in read(tmp_path, bytes(changed)):
                xmin, ymin, xmax, ymax = keypoint["box"]
                assert keypoint["class"] and -1 <= xmin < xmax <= 65 and -1 <= ymin < ymax <= 97
        except UserError:
            refused += 1
    assert 100 < refused < 500


# ---------------------------------------------------------------- folders

def test_own_pictures_are_packed_with_their_points(own):
    dataset = read_dataset(own)
    assert dataset["category_list"] == ["background", "left eye", "right eye"]
    assert (dataset["height"], dataset["width"], dataset["box_size"]) == (96, 64, [30, 30])
    assert len(dataset["train"]["file_list"]) == 8 and len(dataset["test"]["file_list"]) == 2
    for split in ("train", "test"):
        images, labels = np.load(own / f"{split}_images.npy"), np.load(own / f"{split}_labels.npy")
        for index, name in enumerate(dataset[split]["file_list"]):
            number = int(name.split(" ")[1].split(".")[0])
            expected = [(1, 20 + 2 * number, 30), (2, 20 + 2 * number, 60)] if number < 9 else []
            assert np.allclose(labels[labels[:, 0] == index, 1:], np.array(expected).reshape(-1, 3))
            assert np.array_equal(images[index], np.asarray(Image.open(own.parent / "my pictures" / name)))


def test_a_folder_split_by_hand_keeps_its_split(tmp_path, monkeypatch):
    write_own_pictures(tmp_path / "source" / "train", 3)
    write_own_pictures(tmp_path / "source" / "test", 4)
    assert prepare(monkeypatch, tmp_path / "source", tmp_path / "data")[0] == 0
    dataset = read_dataset(tmp_path / "data")
    assert len(dataset["train"]["file_list"]) == 3 and len(dataset["test"]["file_list"]) == 4


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
    write_example(source, "wide", [("eye", 60, 10, 90, 40)], width=100, height=50)
    assert prepare(monkeypatch, source, tmp_path / "data")[0] == 0
    dataset = read_dataset(tmp_path / "data")
    assert (dataset["height"], dataset["width"]) == (128, 128)
    for split in ("train", "test"):
        name, (width, height) = dataset[split]["file_list"][0], dataset[split]["size_list"][0]
        image, label = np.load(tmp_path / "data" / f"{split}_images.npy")[0], np.load(tmp_path / "data" / f"{split}_labels.npy")[0]
        assert (width, height) == ((40, 100) if name == "tall.png" else (100, 50))
        assert (image[:, width:] == image[:, width - 1:width]).all() and (image[height:] == image[height - 1:height]).all()
        assert label[2:].tolist() == ([25, 35] if name == "tall.png" else [75, 25])


def test_suffixes_in_capitals_png_bmp_and_odd_paths_are_read(tmp_path, monkeypatch):
    source = tmp_path / "my pictures 我的图片"
    for name, suffix in (("a b", ".JPG"), ("图", ".PNG"), ("c", ".bmp"), ("d.e", ".jpeg")):
        write_example(source, name, [("eye", *GOOD[1:])], suffix=suffix)
    (source / "a b.xml").rename(source / "a b.XML")
    assert prepare(monkeypatch, source, tmp_path / "data 数据")[0] == 0
    dataset = read_dataset(tmp_path / "data 数据")
    assert sorted(dataset["train"]["file_list"] + dataset["test"]["file_list"]) == ["a b.JPG", "c.bmp", "d.e.jpeg", "图.PNG"]


def test_a_class_may_occur_several_times_in_a_picture(tmp_path, monkeypatch):
    source = tmp_path / "source"
    for name in "abc":
        write_example(source, name, [("eye", 10, 20, 40, 50), ("eye", 10, 60, 40, 90), ("ear", 30, 60, 60, 90)])
    assert prepare(monkeypatch, source, tmp_path / "data")[0] == 0
    assert read_dataset(tmp_path / "data")["max_per_class"] == 2


def test_collisions_are_told_with_the_recall_that_they_allow(tmp_path, monkeypatch, capsys):
    source = tmp_path / "source"
    for name in "abcd":
        write_example(source, name, [("eye", 34, 34, 54, 54), ("ear", 36, 36, 56, 56)] if name == "a" else [("eye", 5, 5, 25, 25)])
    assert prepare(monkeypatch, source, tmp_path / "data")[0] == 0
    assert "recall cannot exceed 0.800" in capsys.readouterr().out


def test_pictures_of_both_splits_that_look_the_same_are_told(tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        write_own_pictures(tmp_path / "source" / split, 2)
    write_example(tmp_path / "source" / "test", "other", [GOOD], seed=77)
    assert prepare(monkeypatch, tmp_path / "source", tmp_path / "data")[0] == 0
    out = capsys.readouterr().out
    assert "2 test pictures look the same" in out and "picture 0.png" in out


def test_all_bad_files_are_listed_at_once_and_skipped_where_the_reader_says_so(tmp_path, monkeypatch, capsys):
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
    assert code == 1 and "5 bad files" in sentence and "--skip-bad" in sentence and not (tmp_path / "data" / "dataset.json").exists()
    for name in ("broken.jpg", "no label.png", "no picture.xml", "bad box.xml", "twin.png"):
        assert sum(line.startswith("bad: ") and name in line.split(": ")[1] for line in out.splitlines()) == 1, name
    assert prepare(monkeypatch, source, tmp_path / "data", "--skip-bad")[0] == 0
    assert "left out 5 bad files" in capsys.readouterr().out
    dataset = read_dataset(tmp_path / "data")
    assert len(dataset["train"]["file_list"]) + len(dataset["test"]["file_list"]) == 6


def write_case(folder, case):
    """A --source folder that cannot be used."""
    folder.mkdir()
    if case == "one picture":
        write_example(folder, "a", [GOOD])
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
@pytest.mark.parametrize("case", ["empty folder", "one picture", "no keypoint", "all bad", "only XML", "empty test"])
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, monkeypatch, case, arguments):
    write_case(tmp_path / "source", case)
    code, sentence = prepare(monkeypatch, tmp_path / "source", tmp_path / "data", *arguments)
    assert code == 1 and sentence.startswith("error: ") and "\n" not in sentence and not (tmp_path / "data" / "dataset.json").exists()


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
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("right eye"))
    assert line.split()[2:4] == ["0", "2"] and "none to learn from" in line


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, own):
    data = tmp_path / "data"
    shutil.copytree(own, data)
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    code, sentence = prepare(monkeypatch, own.parent / "my pictures", data)
    assert code == 1 and "GB" in sentence and str(data) in sentence
    assert (data / "dataset.json").read_bytes() == (own / "dataset.json").read_bytes()


def test_a_bad_source_leaves_the_data_set_made_before(tmp_path, monkeypatch, own):
    data = tmp_path / "data"
    shutil.copytree(own, data)
    (tmp_path / "empty").mkdir()
    assert prepare(monkeypatch, tmp_path / "empty", data)[0] == 1
    for path in own.iterdir():
        if path.is_file():
            assert (data / path.name).read_bytes() == path.read_bytes()


def test_a_failure_while_packing_leaves_no_data_set_that_looks_whole(tmp_path, monkeypatch, own):
    data = tmp_path / "data"
    shutil.copytree(own, data)

    def full(*arguments):
        raise OSError(28, "No space left on device", str(data / "test_images.npy"))
    monkeypatch.setattr(prepare_data, "contact_sheet", full)
    code, sentence = prepare(monkeypatch, own.parent / "my pictures", data)
    assert code == 1 and "No space left" in sentence and not (data / "dataset.json").exists()
    assert not list(data.rglob(".writing-*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file names that are not text")
def test_a_file_name_that_is_no_text_is_packed_or_refused_in_a_sentence(tmp_path, monkeypatch):
    source = write_own_pictures(tmp_path / "source", 4)
    try:
        for suffix in (b".png", b".xml"):
            shutil.copy(source / ("picture 0" + suffix.decode()), os.path.join(os.fsencode(source), b"caf\xe9" + suffix))
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such names")
    result = run_script("01_prepare_data.py", "--source", source, "--data", tmp_path / "data")
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr, result.stderr


def test_class_names_that_the_terminal_cannot_show_do_not_stop_it(tmp_path):
    source = write_own_pictures(tmp_path / "source", 4, ["关键点", "🎯"])
    result = run_script("01_prepare_data.py", "--source", source, "--data", tmp_path / "data",
                        environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert result.returncode == 0 and read_dataset(tmp_path / "data")["category_list"][1:] == ["关键点", "🎯"], result.stderr


@pytest.mark.parametrize("arguments", [["--pictures", "1"], ["--pictures", "many"], ["--seed", "-1"], ["--sauce", "x"]])
def test_a_wrong_flag_ends_with_code_2_and_the_usage(tmp_path, monkeypatch, capsys, arguments):
    code, _ = call_main(prepare_data, monkeypatch, "--data", tmp_path / "data", *arguments)
    assert code == 2 and arguments[0] in capsys.readouterr().err and not (tmp_path / "data").exists()


# ---------------------------------------------------------------- real pictures, where they are at hand

def test_real_pictures_of_a_mouse_with_17_points_are_read(tmp_path, monkeypatch, capsys):
    source = prepare_data.DATA_FOLDER.parent.parent / "shared" / "data" / "mouse_mirror"
    if not source.is_dir():
        pytest.skip("the mouse pictures are not here")
    assert prepare(monkeypatch, source, tmp_path / "data")[0] == 0
    dataset = read_dataset(tmp_path / "data")
    assert (dataset["height"], dataset["width"]) == (416, 416) and len(dataset["category_list"]) == 1 + 17
    assert dataset["box_size"] == [30, 30] and "recall cannot exceed 0.9" in capsys.readouterr().out
