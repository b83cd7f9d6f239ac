"""common.py: images of all kinds, also damaged ones; files that are replaced; what is told."""

import io
import os
import shlex
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common
from conftest import copy_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of odd sizes and tags


def save_and_read(image, path, **options):
    image.save(path, **options)
    return common.read_image(path)


def as_file(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- images of all kinds

RED = (200, 30, 40)


@pytest.mark.parametrize("mode, value, suffix, expected", [
    ("RGB", RED, ".png", RED), ("RGB", RED, ".bmp", RED), ("RGB", RED, ".tif", RED),
    ("L", 90, ".png", (90, 90, 90)), ("1", 1, ".png", (255, 255, 255)),
    ("RGBA", (*RED, 255), ".png", RED), ("RGBA", (*RED, 0), ".png", (255, 255, 255)),
    ("RGBA", (100, 0, 0, 128), ".webp", (177, 127, 127)), ("LA", (90, 0), ".png", (255, 255, 255)),
    ("CMYK", (0, 255, 255, 0), ".jpg", (254, 0, 0))])
def test_every_kind_of_image_becomes_rgb_with_white_under_what_is_transparent(
        tmp_path, mode, value, suffix, expected):
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    read = save_and_read(Image.new(mode, (7, 5), value), tmp_path / f"a{suffix}", **options)
    assert read.dtype == np.uint8 and read.shape == (5, 7, 3)
    assert np.abs(read.astype(int) - expected).max() <= 1


def test_a_palette_gets_its_colours_and_its_transparent_entry_becomes_white(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((1, 0), 1)
    assert save_and_read(image, tmp_path / "a.png").tolist() == [[[9, 9, 9], [50, 60, 70]]]
    read = save_and_read(image, tmp_path / "b.png", transparency=0)
    assert read.tolist() == [[[255, 255, 255], [50, 60, 70]]]


def test_a_jpeg_of_several_images_as_telephones_make_it_is_read_as_its_first(tmp_path):
    first, second = Image.new("RGB", (32, 24), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    read = common.read_image(tmp_path / "a.jpg")
    assert read.shape == (24, 32, 3) and (read[:, :, 0] > 200).all()


def png(width, height, bits, colour_type):
    """A PNG by hand: Pillow writes none of 16 bits in colour, nor one that lacks pixels."""
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    row = b"\0" + struct.pack(">H", 4000) * {0: 1, 2: 3, 4: 2, 6: 4}[colour_type] * 8
    return (b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(row * 6)) + chunk(b"IEND", b""))


def colour_tiff():
    """A TIFF of 16 bits a colour by hand: 8 x 6 px, RGB."""
    head = struct.pack("<2sHIH", b"II", 42, 8, 9)
    for tag, kind, count, value in (
            (256, 3, 1, 8), (257, 3, 1, 6), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, 128), (277, 3, 1, 3), (278, 3, 1, 6), (279, 4, 1, 288)):
        head += struct.pack("<HHII", tag, kind, count, value)
    return head + struct.pack("<IHHH", 0, 16, 16, 16) + struct.pack("<H", 4000) * 144


DEEP_DICT = {
    "grey.png": png(8, 6, 16, 0), "colour.png": png(8, 6, 16, 2), "colour.tif": colour_tiff(),
    "grey with alpha.png": png(8, 6, 16, 4), "colour with alpha.png": png(8, 6, 16, 6),
    "grey.tif": as_file(Image.new("I;16", (8, 6), 4000), "TIFF"),
    "float.tif": as_file(Image.new("F", (8, 6), 0.5), "TIFF"),
    "whole.tif": as_file(Image.new("I", (8, 6), 200), "TIFF")}


@pytest.mark.parametrize("name", DEEP_DICT)
def test_more_than_8_bits_a_colour_are_refused_by_name_and_not_read_as_black(tmp_path, name):
    (tmp_path / name).write_bytes(DEEP_DICT[name])
    with pytest.raises(common.UserError) as caught:
        common.read_image(tmp_path / name)
    assert name in str(caught.value) and "more than 8 bits" in str(caught.value)


# ---------------------------------------------------------------- turned by the orientation alone

ORIENTATION, IMAGE_WIDTH, RESOLUTION_UNIT = 274, 256, 296  # EXIF tags
ASCII, SHORT, RATIONAL = 2, 3, 5  # EXIF types


def exif_bytes(*tag_list):
    """An EXIF block by hand: Pillow would write no tag of a wrong type. (tag, type, 4 bytes)."""
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tag_list))
    for tag, kind, value in sorted(tag_list):
        head += struct.pack("<HHI4s", tag, kind, 1, value)
    return b"Exif\0\0" + head + bytes(4)


# How an image looks that a camera has saved with this orientation, from the one saved.
TURN_DICT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1],
             4: lambda a: a[::-1], 5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 3),
             7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, 1),
             0: lambda a: a, 9: lambda a: a, 65535: lambda a: a}
CORNER = np.zeros((16, 32, 3), np.uint8)
CORNER[:8, :8], CORNER[8:, :8] = 255, 128


@pytest.mark.parametrize("orientation", TURN_DICT)
@pytest.mark.parametrize("odd_tag_list", [
    [], [(IMAGE_WIDTH, RATIONAL, b"\x0e\0\0\0")], [(RESOLUTION_UNIT, ASCII, b"2")],
    [(IMAGE_WIDTH, ASCII, b"32")]], ids=["plain", "width", "unit", "text"])
def test_a_jpeg_is_turned_as_its_orientation_says_whatever_other_tags_are_like(
        tmp_path, orientation, odd_tag_list):
    exif = exif_bytes((ORIENTATION, SHORT, struct.pack("<HH", orientation, 0)), *odd_tag_list)
    read = save_and_read(Image.fromarray(CORNER), tmp_path / "a.jpg", exif=exif, quality=100,
                         subsampling=0)
    turned = TURN_DICT[orientation](CORNER)
    assert read.shape == turned.shape and np.abs(read.astype(int) - turned).max() < 40


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_other_formats_are_turned_once_and_not_twice(tmp_path, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    options = {"lossless": True} if suffix == ".webp" else {}
    read = save_and_read(Image.fromarray(CORNER), tmp_path / f"a{suffix}", exif=exif, **options)
    assert np.array_equal(read, np.rot90(CORNER, 3))


JPEG = as_file(Image.effect_noise((64, 64), 50), "JPEG")
TIFF = as_file(Image.new("RGB", (32, 24)), "TIFF")
BAD_DICT = {
    "empty": b"", "cut off": JPEG[:len(JPEG) // 2], "cut in the header": JPEG[:30],
    "not an image": b"hello, I am a text", "XML": b"<annotation></annotation>",
    "enormous": png(60000, 60000, 8, 2), "large": png(20000, 3000, 8, 2),
    "zero wide": png(0, 10, 8, 2), "too few pixels": png(640, 640, 8, 2),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    # Where the pixels lie (tag 273) is said to be a text.
    "TIFF with a damaged byte": TIFF.replace(b"\x11\1\4\0", b"\x11\1\2\0")}


@pytest.mark.parametrize("kind", BAD_DICT)
def test_a_bad_image_is_refused_in_one_sentence_with_its_name(tmp_path, kind):
    path = tmp_path / "bad.jpg"
    path.write_bytes(BAD_DICT[kind])
    with pytest.raises(common.UserError) as caught:
        common.read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert ("too many" in str(caught.value)) == (kind in ("enormous", "large"))


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file or directory"),
                                   PermissionError(13, "Permission denied")])
def test_an_image_that_cannot_be_opened_is_not_called_damaged(monkeypatch, error):
    def refuse(*arguments, **options):
        raise error
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(common.UserError) as caught:
        common.read_image("a.jpg")
    assert "a.jpg" in str(caught.value) and error.strerror in str(caught.value)
    assert "readable" not in str(caught.value)


def test_padding_repeats_the_edge_moves_nothing_and_ends_at_whole_cells():
    array = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
    padded = common.pad_image(array, 33, 20)
    assert padded.shape == (64, 64, 3) and np.array_equal(padded[:3, :40], array)
    assert (padded[3:] == padded[2]).all() and (padded[:, 40:] == padded[:, 39:40]).all()
    assert common.pad_image(padded).shape == padded.shape


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
        assert path.read_text() == "old" and str(os.getpid()) in temporary.name  # a process's own
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("name, content", [
    ("dataset.json", None), ("dataset.json", b'{"height": 96, "wid'), ("dataset.json", b"[1, 2]"),
    ("dataset.json", b"\xff\xfe\0\x80"), ("dataset.json", b'{"name": "faces"}'),
    ("test_images.npy", None), ("val_images.npy", b""), ("train_labels.npy", b"\x93NUMPY"),
    ("val_images.npy", np.zeros((9, 32, 32, 3), np.uint8)), ("val_labels.npy", np.array([{}]))])
def test_a_data_set_that_is_not_whole_is_refused_with_the_command_that_makes_it(
        own, tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(sys, "argv", ["02_model.py"])
    data = copy_of(own, tmp_path / "my data")
    assert sorted(common.read_data_set(data)[1]) == ["test", "train", "val"]
    if content is None:
        (data / name).unlink()
    elif isinstance(content, bytes):
        (data / name).write_bytes(content)
    else:
        np.save(data / name, content)
    with pytest.raises(common.UserError) as caught:
        common.read_data_set(data)
    fix = shlex.join(["python", "01_prepare_data.py", "--data", str(data), "--source", "FOLDER"])
    assert fix in str(caught.value) and "\n" not in str(caught.value)
    assert content is not None or name in str(caught.value)


@pytest.mark.parametrize("called", ["02_model.py", "../scripts/02_model.py"])
def test_the_next_command_works_from_the_folder_in_which_the_user_stands(
        tmp_path, monkeypatch, called):
    monkeypatch.setattr(sys, "argv", [called])
    script = called.replace("02_model", "05_predict")
    line = common.command("05_predict.py", Path("my 'own' data"), "a b.jpg", "--threshold", 0.5)
    assert shlex.split(line) == [
        "python", script, "--data", "my 'own' data", "a b.jpg", "--threshold", "0.5"]
    (tmp_path / "disk").mkdir()
    if os.name != "nt":  # Windows lets not everybody make links
        (tmp_path / "data").symlink_to(tmp_path / "disk")  # the default folder, on another disk
        monkeypatch.setattr(common, "DATA_FOLDER", tmp_path / "data")
    for folder in {common.DATA_FOLDER, common.DATA_FOLDER.resolve()}:
        assert common.command("05_predict.py", folder) == f"python {script}"


def test_headings_and_names_of_a_table_are_not_cut(capsys):
    name_list = [f"left_front_wheel_of_the_trailer_{side}" for side in ("inner", "outer")]
    common.print_table([("", *name_list)] + [(name, 1234, 0.5) for name in name_list])
    line_list = capsys.readouterr().out.splitlines()
    assert line_list[0].split() == name_list and len({len(line) for line in line_list}) == 1
    assert line_list[2].split() == [name_list[1], "1,234", "0.500"]


@pytest.mark.parametrize("error, sentence", [
    (common.UserError("a.jpg: bad"), "error: a.jpg: bad"),
    (OSError(28, "No space left on device", "/disk/file"),
     "error: No space left on device: /disk/file"),
    (BrokenPipeError(32, "Broken pipe"), 141), (KeyboardInterrupt(), "\nstopped by Ctrl-C")])
def test_what_a_user_can_mend_ends_in_one_sentence(monkeypatch, error, sentence):
    def main():
        raise error
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # run_main takes it away from a broken pipe
    with pytest.raises(SystemExit) as caught:
        common.run_main(main)
    assert caught.value.code == sentence


@pytest.mark.parametrize("stream", [
    None, io.StringIO(), io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)],
    ids=["none", "a notebook's", "a terminal that knows no such letters"])
def test_what_is_printed_stops_nothing_wherever_it_goes(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    common.run_main(lambda: print("左眼"))
    if isinstance(stream, io.TextIOWrapper):
        assert stream.buffer.getvalue().split() == [b"\\u5de6\\u773c"]
