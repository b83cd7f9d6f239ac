"""data/draw_pictures.py: labels that are right, one drawing for one seed, and no file of others."""

import contextlib
import math
import sys
import types

import numpy as np
import pytest
from PIL import Image

from conftest import REPOSITORY, call_main, centroid, contents, load

sys.path.append(str(REPOSITORY / "data"))
drawing, prepare_data = load("draw_pictures"), load("01_prepare_data")
MARK_LIST = ["keyPoint_1", "keyPoint_2"]


@pytest.mark.parametrize("name", MARK_LIST)
@pytest.mark.parametrize("x, y, angle, scale", [
    (60, 50, 0, 1), (60.25, 49.5, 0.1, 1), (59.99, 50.73, -0.2, 0.9), (60.5, 50.5, 1.0, 1.1)])
def test_a_marks_middle_is_painted_at_the_sub_pixel_place(name, x, y, angle, scale):
    image_3d_array = np.zeros((100, 120, 3), np.float32)
    turned_3d_array = np.zeros_like(image_3d_array)  # both together are the same upside down
    drawing.paint(image_3d_array, x, y, name, np.ones(3), angle, scale)
    drawing.paint(turned_3d_array, x, y, name, np.ones(3), angle + math.pi, scale)
    assert math.dist(centroid((image_3d_array + turned_3d_array)[:, :, 0]), (x, y)) < 0.05
    assert 200 < image_3d_array[:, :, 0].sum() < 800  # px of ink


def test_the_label_is_the_middle_of_what_is_painted_and_each_class_occurs_once(
        tmp_path, monkeypatch):
    painted_list, label_count, real = [], 0, drawing.paint

    def paint(image_3d_array, x, y, name, *arguments, **options):
        painted_list.append((name, x, y))
        real(image_3d_array, x, y, name, *arguments, **options)
    monkeypatch.setattr(drawing, "paint", paint)
    for index in range(6):
        painted_list.clear()
        drawing.draw_picture(index, 5, tmp_path)
        with Image.open(tmp_path / f"{index:05d}.jpg") as image:
            size = image.size
        point_list = prepare_data.read_labels(tmp_path / f"{index:05d}.xml", *size)
        name_list = [point["class"] for point in point_list]
        assert len(name_list) == len(set(name_list))
        assert set(name_list) == {name for name, *_ in painted_list if name in MARK_LIST}
        for name, x, y in painted_list:
            for box in (point["box"] for point in point_list if point["class"] == name):
                if min(box) > 0 and box[2] < size[0] and box[3] < size[1]:  # no edge has cut it
                    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                    assert math.dist((x, y), middle) < 0.02  # two decimals are written
        label_count += len(point_list)
    assert label_count >= 3


def test_an_image_depends_on_its_seed_and_index_alone(drawn, tmp_path):
    """Not on how many are drawn, nor on the process that draws it."""
    for index, seed in ((3, 0), (10, 0), (3, 1)):
        drawing.draw_picture(index, seed, tmp_path)
        path = tmp_path / f"{index:05d}.jpg"
        same = drawn / "images" / path.name
        assert (path.read_bytes() == same.read_bytes()) == (seed == 0)
        point_list, same_list = (prepare_data.read_labels(of.with_suffix(".xml"), 320, 1920)
                                 for of in (path, same))
        assert point_list == same_list or seed == 1
    assert len({path.read_bytes() for path in (drawn / "images").glob("*.jpg")}) == 12


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Run main() without other processes, and with short texts in place of images."""
    def draw_picture(index, seed, folder):
        for suffix in (".jpg", ".xml"):
            (folder / f"{index:05d}{suffix}").write_text(f"drawn with seed {seed}")
    pool = types.SimpleNamespace(imap_unordered=lambda function, numbers, chunksize: map(
        function, numbers))
    monkeypatch.setattr(drawing, "draw_picture", draw_picture)
    monkeypatch.setattr(drawing.multiprocessing, "Pool",
                        lambda *arguments, **options: contextlib.nullcontext(pool))
    return lambda *arguments: call_main(drawing, monkeypatch, "--data", tmp_path, *arguments)


def test_a_drawing_may_be_repeated_enlarged_and_made_smaller(draw, tmp_path, monkeypatch):
    images = tmp_path / "images"
    with monkeypatch.context() as stopped:  # also one that was stopped is known again
        stopped.setattr(drawing, "draw_picture", lambda index, seed, folder: (
            folder / f"{index + 5:05d}.jpg").write_text("half") and 1 / (index < 2))
        with pytest.raises(ZeroDivisionError):
            draw("--pictures", 9)
    for count, seed in ((5, 0), (5, 1), (8, 1), (3, 2), (4, 2)):
        assert draw("--pictures", count, "--seed", seed) == (0, "")
        assert {path.name for path in images.glob("[!.]*")} == {
            f"{index:05d}{suffix}" for index in range(count) for suffix in (".jpg", ".xml")}
        assert all(path.read_text() == f"drawn with seed {seed}" for path in images.glob("[!.]*"))
        (images / ".DS_Store").write_text("of macOS")
    assert (images / ".DS_Store").exists()


@pytest.mark.parametrize("name", [
    "00004.jpg", "01500.xml", "holiday.jpg", "notes.txt", "1.jpg", "00001.png", "00001.JPG",
    "00001.jpg.txt", "٠٠٠٠١.jpg", "train", "00001.jpg"])
@pytest.mark.parametrize("is_drawn", [True, False])
def test_a_folder_with_files_of_others_is_not_drawn_into(draw, tmp_path, name, is_drawn):
    images = tmp_path / "images"
    if is_drawn:
        assert draw("--pictures", 4) == (0, "")
        if name == "00001.jpg":  # of the drawing; a full disk may leave the marker empty
            (images / ".drawn").write_text("")
    images.mkdir(exist_ok=True)
    (images / name).mkdir() if name == "train" else (images / name).write_text("mine")
    before = contents(tmp_path)
    for count in (3, 4, 9):
        code, sentence = draw("--pictures", count)
        assert code == 1 and sentence.startswith(f"error: {images}") and "\n" not in sentence
        assert name in sentence or name == "00001.jpg"
        assert "--data" in sentence and contents(tmp_path) == before
