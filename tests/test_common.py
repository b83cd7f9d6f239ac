"""common.py: pictures of all kinds, drawing and fonts, replacing files, LabelImg's XML, progress.

Pictures that are damaged or hostile stand in hardening/test_pictures.py.
"""

import io
import os
import shlex
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import common
from conftest import centroid, load, paint_dot, write_example


def save_and_read(image, path, **options):
    image.save(path, **options)
    return common.read_image(path)


# ---------------------------------------------------------------- pictures of all kinds

def test_an_rgb_picture_is_read_unchanged_in_rgb_order(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    read = save_and_read(Image.fromarray(array), tmp_path / "a.png")
    assert read.dtype == np.uint8 and np.array_equal(read, array)


def test_a_grey_picture_becomes_three_equal_channels(tmp_path):
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    read = save_and_read(Image.fromarray(grey), tmp_path / "a.bmp")
    assert np.array_equal(read, np.dstack([grey] * 3))


def test_a_palette_picture_gets_its_colours(tmp_path):
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert (save_and_read(image, tmp_path / "a.png") == (10, 20, 30)).all()


def test_what_is_transparent_becomes_white_and_half_transparent_mixes(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 255, 128)):
        image.putpixel((x, 0), (100, 0, 0, alpha))
    read = save_and_read(image, tmp_path / "a.png")[0].astype(int)
    assert read[0].tolist() == [255, 255, 255] and read[1].tolist() == [100, 0, 0]
    assert np.abs(read[2] - (177, 127, 127)).max() <= 1


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((1, 0), 1)
    read = save_and_read(image, tmp_path / "a.png", transparency=0)
    assert read[0].tolist() == [[255, 255, 255], [50, 60, 70]]


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    read = save_and_read(image, tmp_path / "a.jpg", quality=95)
    assert read.shape == (8, 8, 3) and read[4, 4, 0] > 200 and read[4, 4, 1:].max() < 60


def test_a_picture_can_be_read_from_an_open_file():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (1, 2, 3)).save(buffer, "PNG")
    buffer.seek(0)
    assert (common.read_image(buffer) == (1, 2, 3)).all()


# ---------------------------------------------------------------- how bright a number is

@pytest.mark.parametrize("name, dtype", [
    ("float.tif", np.float32), ("whole.tif", np.int32), ("grey.png", np.uint16),
    ("grey.tif", np.uint16)])
def test_numbers_whose_white_is_not_known_are_refused_by_name(tmp_path, name, dtype):
    array = np.linspace(0, 255, 48).astype(dtype).reshape(6, 8)
    with pytest.raises(common.UserError) as caught:
        save_and_read(Image.fromarray(array), tmp_path / name)
    for wanted in (str(tmp_path / name), "more than 8 bits", "save it with 8 bits"):
        assert wanted in str(caught.value)


# ---------------------------------------------------------------- turned by the orientation alone

ORIENTATION, IMAGE_WIDTH, RESOLUTION_UNIT = 274, 256, 296  # EXIF tags
ASCII, SHORT, RATIONAL = 2, 3, 5  # EXIF types


def exif_bytes(*tag_list):
    """An EXIF block made by hand: Pillow would write no tag of a wrong type. (tag, type, value)."""
    data_start = 8 + 2 + 12 * len(tag_list) + 4
    head, data = struct.pack("<2sHIH", b"II", 42, 8, len(tag_list)), b""
    for tag, kind, value in sorted(tag_list):
        head += struct.pack("<HHI", tag, kind, 1)
        if kind == RATIONAL:
            head += struct.pack("<I", data_start + len(data))
            data += struct.pack("<II", value, 1)
        else:
            head += value.ljust(4, b"\0") if kind == ASCII else struct.pack("<HH", value, 0)
    return b"Exif\0\0" + head + bytes(4) + data


# How a picture looks that a camera has saved with this orientation, from the one saved.
TURN_DICT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1],
             4: lambda a: a[::-1], 5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 3),
             7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, 1)}


def picture_with_a_white_corner():
    array = np.zeros((16, 32, 3), np.uint8)
    array[:8, :8], array[8:, :8] = 255, 128
    return array


@pytest.mark.parametrize("orientation", TURN_DICT)
@pytest.mark.parametrize("odd_tag_list", [
    [], [(IMAGE_WIDTH, RATIONAL, 32)], [(RESOLUTION_UNIT, ASCII, b"2")],
    [(IMAGE_WIDTH, ASCII, b"32")]], ids=["plain", "width", "unit", "text"])
def test_a_jpeg_is_turned_as_its_orientation_says_whatever_other_tags_are_like(
        tmp_path, orientation, odd_tag_list):
    array = picture_with_a_white_corner()
    exif = exif_bytes((ORIENTATION, SHORT, orientation), *odd_tag_list)
    read = save_and_read(Image.fromarray(array), tmp_path / "a.jpg", exif=exif, quality=100,
                         subsampling=0)
    turned = TURN_DICT[orientation](array)
    assert read.shape == turned.shape and np.abs(read.astype(int) - turned).max() < 40


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_other_formats_are_turned_once_and_not_twice(tmp_path, suffix):
    array, exif = picture_with_a_white_corner(), Image.Exif()
    exif[ORIENTATION] = 6
    options = {"lossless": True} if suffix == ".webp" else {}
    read = save_and_read(Image.fromarray(array), tmp_path / f"a{suffix}", exif=exif, **options)
    assert np.array_equal(read, np.rot90(array, 3))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(tmp_path, orientation):
    exif = exif_bytes((ORIENTATION, SHORT, orientation))
    image = Image.fromarray(picture_with_a_white_corner())
    assert save_and_read(image, tmp_path / "a.jpg", exif=exif).shape == (16, 32, 3)


def test_the_size_that_counts_for_the_labels_is_the_turned_one(tmp_path):
    prepare_data = load("01_prepare_data")
    write_example(tmp_path, "a", [("eye", 10, 10, 20, 20)], width=64, height=96)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png", exif=exif)
    example_list, problem_list = prepare_data.read_folder(tmp_path)
    assert problem_list == [] and tuple(example_list[0]["size"]) == (64, 96)


# ---------------------------------------------------------------- geometry

def test_padding_repeats_the_edge_and_moves_nothing():
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    padded = common.pad_image(array, 5, 6)
    assert padded.shape == (5, 6, 3) and np.array_equal(padded[:3, :4], array)
    assert (padded[3:, :4] == array[2]).all() and (padded[:3, 4:] == array[:, 3:]).all()
    assert (padded[3:, 4:] == array[2, 3]).all()


def test_a_side_is_rounded_up_to_whole_cells():
    length_list = [common.CELL, common.CELL + 1, 2 * common.CELL - 1, 60 * common.CELL]
    cell_list = [common.round_up_to_cell(length) // common.CELL for length in length_list]
    assert cell_list == [1, 2, 2, 60]


# ---------------------------------------------------------------- drawing

def drawn_close_ups(monkeypatch, tile_list, columns=5):
    """Draw close-ups: the figure's axes, and of each what it shows as float [rows, columns]."""
    figure_list = []
    monkeypatch.setattr(common, "save_figure", lambda figure, path: figure_list.append(figure))
    common.save_close_ups(Path("sheet.png"), tile_list, columns)
    figure, = figure_list
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    sheet_3d_array = np.asarray(canvas.buffer_rgba())[..., :3].astype(float)
    part_list = []
    for axes in figure.axes:
        left, bottom, right, top = axes.get_window_extent().extents.round().astype(int)
        height = len(sheet_3d_array)
        part_list.append(sheet_3d_array[height - top:height - bottom, left:right].mean(axis=2))
    return figure.axes, part_list


@pytest.mark.parametrize("x, y", [(50.5, 40.5), (20.25, 9.75), (3, 94), (97.5, 1)])
def test_a_close_up_has_its_place_in_the_middle_and_a_cross_on_each_point(monkeypatch, x, y):
    image_3d_array = np.zeros((96, 100, 3), np.uint8)
    paint_dot(image_3d_array, x, y, sigma=2)
    tile = "a.jpg: missed", image_3d_array, x, y, 33, [(x, y, "white"), (x + 5, y, "red")]
    (axes,), _ = drawn_close_ups(monkeypatch, [tile])
    assert axes.get_title() == "a.jpg: missed"
    assert axes.get_xlim() == (x - 33, x + 33) and axes.get_ylim() == (y + 33, y - 33)
    point_list = [(*line.get_xdata(), *line.get_ydata(), line.get_color()) for line in axes.lines]
    assert point_list == [(x, y, "white"), (x + 5, y, "red")]
    (axes,), (part_2d_array,) = drawn_close_ups(monkeypatch, [(*tile[:5], [])])
    part_2d_array = part_2d_array[2:-2, 2:-2]  # without the frame
    height, width = part_2d_array.shape
    assert min(height, width) > 150
    # Beyond the picture all is grey: the dot is as far as the picture reaches.
    columns, rows = (np.arange(side) / side * 66 - 33 for side in (width, height))
    inside_2d_array = ((columns + x > 1) & (columns + x < 99)) * (
        (rows + y > 1) & (rows + y < 95))[:, None]
    bright_x, bright_y = centroid(part_2d_array ** 2 * inside_2d_array)
    if 9 < x < 91 and 9 < y < 87:  # nothing of the dot is cut off
        assert abs(bright_x - width / 2) < 1 and abs(bright_y - height / 2) < 1
    peak_y, peak_x = np.unravel_index((part_2d_array * inside_2d_array).argmax(), (height, width))
    assert abs(peak_x - width / 2) < 7 and abs(peak_y - height / 2) < 7  # a pixel has nearly 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("x, y", [(-98, 40), (162, 40), (30, -99), (30, 195), (-33, 40),
                                  (1e4, -1e4)])
def test_a_close_up_of_a_place_far_outside_of_the_picture_shows_nothing_of_it(monkeypatch, x, y):
    """An untrained network may be sure of a keypoint there, where boxes are large."""
    tile = "a.jpg", np.full((96, 64, 3), 255, np.uint8), x, y, 33, [(x, y, "white")]
    _, (part_2d_array,) = drawn_close_ups(monkeypatch, [(*tile[:5], [])])
    assert part_2d_array[3:-3, 3:-3].max() < 200  # grey
    assert len(drawn_close_ups(monkeypatch, [tile])[0][0].lines) == 1


@pytest.mark.filterwarnings("error")
def test_close_ups_take_any_title_and_any_number_of_tiles(monkeypatch):
    image_3d_array = np.zeros((50, 50, 3), np.uint8)
    title_list = ["图 🎯 1.png: missed", "$\\frac$", "a_$b$^{c", "n" * 200, "", "é.jpg", "g"]
    tile_list = [(title, image_3d_array, 20, 20, 10, []) for title in title_list]
    axes_list, _ = drawn_close_ups(monkeypatch, tile_list, columns=3)
    shown_list = [axes.get_title() for axes in axes_list]
    assert shown_list[0] == "? ? 1.png: missed" and shown_list[1:5] == title_list[1:5]
    assert len({axes.get_position().y0.round(3) for axes in axes_list}) == 3  # rows
    assert drawn_close_ups(monkeypatch, [])[0] == []


# ---------------------------------------------------------------- names in other scripts

CHINESE = ["background", "左眼", "右眼"]


def test_names_that_a_font_may_lack_become_numbers_and_are_told_once(capsys):
    assert common.names_to_draw(CHINESE)[1:] == ["1", "2"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "1 = 左眼" in said and "2 = 右眼" in said
    assert common.names_to_draw(["background", "left eye"]) == ["background", "left eye"]
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- files

def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        with common.replacing(path) as temporary:
            temporary.write_text("half of the n")
            1 / 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]
    with common.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace a file that is open")
def test_who_has_the_old_file_open_goes_on_reading_the_old_one_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with open(path) as file:
        with common.replacing(path) as temporary:
            temporary.write_text("new")
        assert file.read() == "old" and path.read_text() == "new"


def test_what_is_written_as_labelimg_xml_reads_back_equal(tmp_path):
    keypoint_list = [{"class": name, "box": [10.25, 20.5, 40.25, 50.75]}
                     for name in ("eye", "左 <眼> & \"co\"", "🎯", "n" * 500)]
    common.write_labelimg_xml(tmp_path / "a.xml", "a.jpg", 64, 96, keypoint_list)
    assert load("01_prepare_data").read_labels(tmp_path / "a.xml", 64, 96) == keypoint_list


def test_a_box_that_sticks_out_is_written_cut_and_marked_truncated(tmp_path):
    box_list = [[-5.0, 80.0, 25.0, 110.0], [5.0, 8.0, 35.0, 38.0]]
    common.write_labelimg_xml(tmp_path / "a.xml", "a.jpg", 64, 96,
                              [{"class": "eye", "box": box} for box in box_list])
    text = (tmp_path / "a.xml").read_text(encoding="utf-8")
    assert text.count("<truncated>1</truncated>") == text.count("<truncated>0</truncated>") == 1
    keypoint_list = load("01_prepare_data").read_labels(tmp_path / "a.xml", 64, 96)
    assert keypoint_list[0]["box"] == [0, 80, 25, 96]


# ---------------------------------------------------------------- what is said, and progress

def test_the_next_command_names_the_data_folder_where_it_is_not_the_default():
    assert common.command("03_train.py", common.DATA_FOLDER) == "python 03_train.py"
    folder = Path("my 'own' data")
    line = common.command("05_predict.py", folder, "a b.jpg", "--threshold", 0.5)
    assert shlex.split(line) == ["python", "05_predict.py", "--data", str(folder), "a b.jpg",
                                 "--threshold", "0.5"]


@pytest.mark.skipif(os.name == "nt", reason="Windows lets not everybody make links")
def test_a_default_folder_that_is_a_link_to_another_disk_is_still_the_default(
        tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(common, "DATA_FOLDER", tmp_path / "data")
    for folder in (tmp_path / "data", tmp_path / "disk", tmp_path / "data" / ".." / "disk"):
        assert common.is_default(folder)
        assert common.command("03_train.py", folder) == "python 03_train.py"
    assert not common.is_default(tmp_path)


def test_every_parser_has_data_and_its_help_shows_the_defaults():
    parser = common.make_parser("Do it.", "folder to write to")
    parser.add_argument("--seed", type=int, default=7, help="of all")
    assert parser.parse_args([]).data == common.DATA_FOLDER
    assert parser.parse_args(["--data", "my data"]).data == Path("my data")
    text = " ".join(parser.format_help().split())
    assert "folder to write to (default: " in text and "of all (default: 7)" in text


@pytest.mark.parametrize("error, reason", [
    (ValueError("a\n  b"), "ValueError: a b"), (EOFError(), "EOFError: "),
    (OSError("no picture <_io.BytesIO object at 0x7f>"), "OSError: no picture"),
    (KeyError("n" * 500), "KeyError: '" + "n" * 79)])
def test_a_reason_is_one_short_line_without_addresses(error, reason):
    assert common.short_reason(error) == reason


def test_pictures_of_a_folder_are_files_with_a_pictures_suffix_that_are_not_hidden(tmp_path):
    for name in ("b.JPG", "a.png", ".c.png", "d.txt", "e.xml", "g.webp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "f.png").mkdir()
    assert [path.name for path in common.files_in(tmp_path)] == ["a.png", "b.JPG", "g.webp"]
    assert common.files_in(tmp_path / "nowhere") == []


def test_a_folder_with_the_name_of_a_label_is_no_label(tmp_path):
    write_example(tmp_path, "a", [("eye", 10, 10, 20, 20)])
    (tmp_path / "old.xml").mkdir()
    example_list, problem_list = load("01_prepare_data").read_folder(tmp_path)
    assert len(example_list) == 1 and problem_list == []


def test_six_classes_have_colours_of_their_own():
    colour_list = [common.colour_of(np.int64(class_id)) for class_id in range(1, 7)]
    assert colour_list == common.COLOUR_LIST and common.colour_of(7) == colour_list[0]


@pytest.mark.parametrize("error, sentence", [
    (common.UserError("a.jpg: bad"), "error: a.jpg: bad"),
    (OSError(28, "No space left on device", "/disk/file"),
     "error: No space left on device: /disk/file"),
    (KeyboardInterrupt(), "\nstopped by Ctrl-C")])
def test_what_a_user_can_mend_ends_in_one_sentence(error, sentence):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        common.run_main(main)
    assert caught.value.code == sentence


def test_a_programming_error_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        common.run_main(lambda: 1 / 0)


def test_progress_into_a_file_prints_a_plain_line_every_twenty_seconds(capsys):
    progress = common.Progress(1000, "training")
    for done in range(1, 1001):
        progress.last_time -= 0.5  # as if half a second had passed
        progress.show(done, "loss 1")
    line_list = capsys.readouterr().out.splitlines()
    assert 24 <= len(line_list) <= 27 and "1000/1000" in line_list[-1]
    assert not any("\r" in line for line in line_list)


def test_progress_on_a_terminal_refreshes_one_line_and_ends_it(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = common.Progress(3, "training")
    for done in (1, 2, 3):
        progress.last_time -= 1  # as if a second had passed
        progress.show(done, "x" * 500)
    out = capsys.readouterr().out
    assert out.count("\r") == 3 and out.count("\n") == 1 and out.endswith("\n") and "3/3" in out
    line_list = out.strip("\n").split("\r")[1:]
    assert len({len(line) for line in line_list}) == 1  # each overwrites all of the one before


def test_progress_after_resuming_counts_only_what_this_run_did(capsys):
    progress = common.Progress(100, "training", first=90)
    progress.start_time -= 10  # ten seconds ago
    progress.last_time -= 30
    progress.show(91)  # one done in this run: ten seconds each, nine to go
    assert "1:30 left" in capsys.readouterr().out
