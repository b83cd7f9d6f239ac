"""common.py: files that are replaced whole, pictures of all kinds, LabelImg's XML, the progress line."""

import io
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import common
from conftest import load, write_example


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
    assert np.array_equal(save_and_read(Image.fromarray(grey), tmp_path / "a.bmp"), np.dstack([grey] * 3))


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
    assert save_and_read(image, tmp_path / "a.png", transparency=0)[0].tolist() == [[255, 255, 255], [50, 60, 70]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    array = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert save_and_read(Image.fromarray(array), tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_becomes_rgb(tmp_path):
    read = save_and_read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=95)
    assert read.shape == (8, 8, 3) and read[4, 4, 0] > 200 and read[4, 4, 1:].max() < 60


@pytest.mark.parametrize("orientation, turn", [(3, 2), (6, 3), (8, 1)])
def test_a_picture_with_an_exif_rotation_is_turned(tmp_path, orientation, turn):
    array = np.zeros((16, 32, 3), np.uint8)
    array[:8, :8] = 255
    image, exif = Image.fromarray(array), Image.Exif()
    exif[0x0112] = orientation
    read = save_and_read(image, tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    turned = np.rot90(array, turn)
    assert read.shape == turned.shape and np.abs(read.astype(int) - turned).max() < 40


def test_the_size_that_counts_for_the_labels_is_the_turned_one(tmp_path):
    prepare_data = load("01_prepare_data")
    write_example(tmp_path, "a", [("eye", 10, 10, 20, 20)], width=64, height=96)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png", exif=exif)
    example_list, problem_list = prepare_data.read_folder(tmp_path)
    assert problem_list == [] and tuple(example_list[0]["size"]) == (64, 96)


def png_header(width, height):
    """A PNG that claims a size and holds no pixels: a few bytes."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


def bad_pictures():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    return {"empty": b"", "cut off": jpeg[:len(jpeg) // 2], "cut in the header": jpeg[:30], "not a picture": b"hello, I am a text",
            "XML": b"<annotation></annotation>", "enormous": png_header(60000, 60000), "large": png_header(20000, 3000),
            "zero wide": png_header(0, 10), "PNG without pixels": png_header(64, 64),
            "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"}


@pytest.mark.parametrize("kind", list(bad_pictures()))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_picture_is_refused_in_one_sentence_with_its_name(tmp_path, kind):
    path = tmp_path / "bad.jpg"
    path.write_bytes(bad_pictures()[kind])
    with pytest.raises(common.UserError) as caught:
        common.read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_picture_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(common.UserError, match="none.jpg" if path != tmp_path else str(tmp_path.name)):
            common.read_image(path)


def test_a_picture_can_be_read_from_an_open_file():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (1, 2, 3)).save(buffer, "PNG")
    buffer.seek(0)
    assert (common.read_image(buffer) == (1, 2, 3)).all()


# ---------------------------------------------------------------- geometry

def test_padding_repeats_the_edge_and_moves_nothing():
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    padded = common.pad_image(array, 5, 6)
    assert padded.shape == (5, 6, 3) and np.array_equal(padded[:3, :4], array)
    assert (padded[3:, :4] == array[2]).all() and (padded[:3, 4:] == array[:, 3:]).all() and (padded[3:, 4:] == array[2, 3]).all()


def test_a_side_is_rounded_up_to_whole_cells():
    assert [common.round_up_to_cell(n * common.CELL + d) // common.CELL for n, d in ((1, 0), (1, 1), (2, -1), (60, 0))] == [1, 2, 2, 60]


def test_a_drawn_cross_has_its_middle_on_the_keypoint():
    dot = {"class": "", "x": 50.0, "y": 40.0, "box": [35, 25, 65, 55], "colour": "#ffffff"}
    drawn = np.asarray(common.draw_keypoints(Image.new("RGB", (100, 100), (90, 90, 90)), [dot])).astype(int)
    for lines, middle in ((drawn[44:45, 40:60], 50.0), (drawn[30:50, 54:55].transpose(1, 0, 2), 40.0)):
        changed = np.flatnonzero((lines[0] != 90).any(axis=1))  # across one arm of the cross
        first = 40 if middle == 50 else 30
        assert abs(first + (changed.min() + changed.max() + 1) / 2 - middle) <= 0.5


def test_drawing_leaves_the_given_picture_alone_and_takes_any_place_and_name():
    image = Image.new("RGB", (64, 48), "gray")
    before = image.tobytes()
    for x, name in ((-30.0, "关键点 🎯"), (63.9, "n" * 300), (500.0, "")):
        box = [x - 15, 5, x + 15, 35]
        assert common.draw_keypoints(image, [{"class": name, "x": x, "y": 20.0, "box": box, "score": 0.5}]).size == (64, 48)
    assert image.tobytes() == before


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
    prepare_data = load("01_prepare_data")
    keypoint_list = [{"class": name, "box": [10.25, 20.5, 40.25, 50.75]} for name in ("eye", "左 <眼> & \"co\"", "🎯", "n" * 500)]
    common.write_labelimg_xml(tmp_path / "a.xml", "a.jpg", 64, 96, keypoint_list)
    assert prepare_data.read_labels(tmp_path / "a.xml", 64, 96) == keypoint_list


def test_a_box_that_sticks_out_is_written_cut_and_marked_truncated(tmp_path):
    common.write_labelimg_xml(tmp_path / "a.xml", "a.jpg", 64, 96, [{"class": "eye", "box": [-5.0, 80.0, 25.0, 110.0]},
                                                                    {"class": "eye", "box": [5.0, 8.0, 35.0, 38.0]}])
    text = (tmp_path / "a.xml").read_text(encoding="utf-8")
    assert text.count("<truncated>1</truncated>") == 1 and text.count("<truncated>0</truncated>") == 1
    assert load("01_prepare_data").read_labels(tmp_path / "a.xml", 64, 96)[0]["box"] == [0, 80, 25, 96]


# ---------------------------------------------------------------- errors and progress

@pytest.mark.parametrize("error, sentence", [
    (common.UserError("a.jpg: bad"), "error: a.jpg: bad"),
    (OSError(28, "No space left on device", "/disk/file"), "error: No space left on device: /disk/file"),
    (KeyboardInterrupt(), "stopped by Ctrl-C")])
def test_what_a_user_can_mend_ends_in_one_sentence(error, sentence):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        common.run_main(main)
    assert caught.value.code == sentence


def test_a_programming_error_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        common.run_main(lambda: 1 / 0)


def test_progress_into_a_file_prints_at_most_ten_plain_lines(capsys):
    progress = common.Progress(1000, "training")
    progress.start_time -= 60  # as if it had taken a minute: what is done at once needs fewer lines still
    for done in range(1, 1001):
        progress.show(done, "loss 1")
    out = capsys.readouterr().out
    assert "\r" not in out and 9 <= len(out.splitlines()) <= 11 and "1000/1000" in out.splitlines()[-1]


def test_progress_on_a_terminal_refreshes_one_line_and_ends_it(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = common.Progress(3, "training")
    for done in (1, 2, 3):
        progress.last_time -= 1  # as if a second had passed
        progress.show(done, "x" * 500)
    out = capsys.readouterr().out
    assert out.count("\r") == 3 and out.count("\n") == 1 and out.endswith("\n") and "3/3" in out
    assert len({len(line) for line in out.strip("\n").split("\r")[1:]}) == 1  # each overwrites all of the one before


def test_progress_after_resuming_counts_only_what_this_run_did(capsys):
    progress = common.Progress(100, "training", first=90)
    progress.start_time -= 10  # ten seconds ago
    progress.show(91)  # one done in this run: ten seconds each, nine to go
    left = capsys.readouterr().out
    assert "1:30 left" in left


