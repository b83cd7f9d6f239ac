"""Pictures that are damaged, hostile or none: read_image gives a picture or raises UserError."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import common

# The 600 MB that a claimed size would take are never touched; Pillow warns of it all the same.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning",
                                        "ignore::PIL.Image.DecompressionBombWarning")


def png_header(width, height):
    """A PNG that claims a size and holds no pixels: a few bytes."""
    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return (b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


def as_file(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff_with_a_wrong_type():
    """A TIFF in which one byte is damaged: where its pixels lie (tag 273) is said to be a text."""
    whole = bytearray(as_file(Image.new("RGB", (32, 24)), "TIFF"))
    place = whole.index(struct.pack("<H", 273))
    whole[place + 2] = 2
    return bytes(whole)


JPEG = as_file(Image.effect_noise((64, 64), 50), "JPEG")
BAD_DICT = {
    "empty": b"", "cut off": JPEG[:len(JPEG) // 2], "cut in the header": JPEG[:30],
    "not a picture": b"hello, I am a text", "XML": b"<annotation></annotation>",
    "enormous": png_header(60000, 60000), "large": png_header(20000, 3000),
    "zero wide": png_header(0, 10), "PNG without pixels": png_header(64, 64),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "TIFF with a damaged byte": tiff_with_a_wrong_type()}


@pytest.mark.parametrize("kind", list(BAD_DICT))
def test_a_bad_picture_is_refused_in_one_sentence_with_its_name(tmp_path, kind):
    path = tmp_path / "bad.jpg"
    path.write_bytes(BAD_DICT[kind])
    with pytest.raises(common.UserError) as caught:
        common.read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_picture_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(common.UserError) as caught:
            common.read_image(path)
        assert str(path) in str(caught.value)


def read_or_refuse(path, content):
    """Whether a picture of this content is refused; neither may be anything but proper."""
    path.write_bytes(content)
    try:
        array = common.read_image(path)
        assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size
    except common.UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    return False


def whole_pictures():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    grey_16 = Image.fromarray(rng.integers(0, 65536, (24, 32), dtype=np.uint16))
    return [as_file(image, "JPEG", exif=exif), as_file(image.convert("CMYK"), "JPEG"),
            as_file(image, "PNG", exif=exif), as_file(image.convert("P"), "PNG", transparency=3),
            as_file(image.convert("RGBA"), "PNG"), as_file(grey_16, "PNG"),
            as_file(image, "BMP"), as_file(image.convert("P"), "BMP"),
            as_file(image, "TIFF", exif=exif), as_file(grey_16, "TIFF"),
            as_file(image, "TIFF", compression="tiff_lzw"), as_file(image, "WEBP", exif=exif)]


def test_random_changes_of_pictures_end_in_a_sentence_or_in_a_picture(tmp_path):
    rng, whole_list = np.random.default_rng(0), whole_pictures()
    refused_count = 0
    for turn in range(1200):
        whole = whole_list[turn % len(whole_list)]
        changed = bytearray(whole)
        reach = min(len(whole), 200 if turn % 3 else 10 ** 6)
        for place in rng.integers(0, reach, rng.integers(1, 8)):
            changed[place] = rng.integers(256)
        if turn % 10 == 0:
            changed = changed[:rng.integers(len(whole))]
        refused_count += read_or_refuse(tmp_path / "a.jpg", changed)
    assert 150 < refused_count < 1200


def test_every_single_byte_of_tags_may_be_damaged(tmp_path):
    """The tags of a TIFF and of a JPEG's EXIF block, byte by byte: where types go wrong."""
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x0100: 32, 0x0128: 2, 0x011A: 72.0})
    image = Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3))
    refused_count = 0
    for whole in (as_file(image, "TIFF", exif=exif), as_file(image, "JPEG", exif=exif)):
        for place in range(min(len(whole), 260)):
            for value in (2, 5, 255):  # as types: text, fraction, none
                changed = bytearray(whole)
                changed[place] = value
                refused_count += read_or_refuse(tmp_path / "a.tif", changed)
    assert refused_count > 50
