"""What at least two of the scripts need. No lesson; of packages only numpy and Pillow."""

import argparse
import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

CELL = 32  # px; the network's stride: one cell of its grid is responsible for 32x32 px
REACH = 8  # px; a cell learns keypoints as far beyond its border, see match in 02_model.py
DATA_FOLDER = Path(__file__).resolve().parent / "data"  # the default of every script's --data
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # no EPS: Pillow would run Ghostscript
MAX_PIXELS = 50_000_000  # an image above this is refused: a few bytes can unpack to gigabytes
COLOUR_LIST = ["#8f9bff", "#00e5ff", "#ff4fd8", "#a6ff00", "#ffd400", "#ff7b3a"]  # class_id % 6
Image.init()  # or Pillow would not know WEBP and TIFF in Image.open(formats=...)
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns; ours refuses


class UserError(Exception):
    """Something that the user can fix: one sentence with the file, the value and the remedy."""


def run_main(main) -> None:
    """Call `main()`. What a user can get wrong ends in one sentence and exit code 1."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # there is none after `>&-`
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(errors="backslashreplace")  # a letter that cannot be shown: its code
    keep_freed_memory()
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) == signal.SIG_DFL:  # after nohup it is not
            # End as an error does: with the clean-up, and with the children.
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the output went into `head`, which had seen enough
        sys.stdout = None
        sys.exit(141)
    except OSError as error:  # disk full, no permission
        sys.exit(f"error: {error.strerror or error}: {error.filename or 'a file being written'}")
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C")  # below the progress line


def keep_freed_memory() -> None:
    """Let malloc keep what is freed: no new block is zeroed, a prediction takes a third less."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only Linux has mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2 ** 30)  # M_TRIM_THRESHOLD, bytes
        mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD, bytes: the largest that is allowed


def make_parser(description: str, data_help: str) -> argparse.ArgumentParser:
    """A parser with --data; its help shows each option's default."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--data", type=Path, default=DATA_FOLDER, help=data_help)
    return parser


def command(script: str, data_folder: Path, *argument_list) -> str:
    """The command line that a user types next, from the folder in which they stand."""
    word_list = ["python", Path(sys.argv[0]).parent / script]
    if data_folder.resolve() != DATA_FOLDER.resolve():  # data may be a link to a disk
        word_list += ["--data", data_folder]
    return shlex.join(map(str, [*word_list, *argument_list]))


def run_script(script: str, *argument_list) -> None:
    """Run another script as a reader would. Whatever ends this one ends that one, too."""
    word_list = [sys.executable, DATA_FOLDER.parent / script, *argument_list]
    process = subprocess.Popen(list(map(str, word_list)))
    try:
        if process.wait():
            raise UserError(f"{script} did not end well; its own message stands above")
    except KeyboardInterrupt:  # of a terminal: the other script has got it, too, and ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # s
        raise
    finally:
        process.terminate()
        process.wait()


def print_table(row_list) -> None:
    """Print rows of texts and numbers, each column as wide as its widest cell."""
    text_list = [[cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int)
                  else f"{cell:,.3f}" for cell in row] for row in row_list]
    first_width, *width_list = [max(map(len, column)) for column in zip(*text_list)]
    for first, *rest in text_list:
        line = "".join(f"  {cell:>{width}}" for cell, width in zip(rest, width_list))
        print(f"   {first:{first_width}}{line}".rstrip())


@contextlib.contextmanager
def replacing(path: Path):
    """Yield a temporary path, moved to `path` at the end: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")  # each process has its own
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with replacing(path) as temporary:  # a file's name need not be proper Unicode, hence errors
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_data_set(folder: Path) -> tuple[dict, dict]:
    """What 01_prepare_data.py wrote: dataset.json, and {"train": (images, labels), "val": ...}.

    Images are uint8 `[N, H, W, 3]`, mapped: only what is looked at is read from the disk; labels
    are float32 `[M, 4]`: image index, class id, x, y. Raises UserError.
    """
    array_dict = {}
    try:
        dataset_dict = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        for split in ("train", "val", "test"):
            images_4d_array = np.load(folder / f"{split}_images.npy", mmap_mode="r")
            array_dict[split] = images_4d_array, np.load(folder / f"{split}_labels.npy")
            if len(images_4d_array) != len(dataset_dict[split]["checksum_list"]):
                raise ValueError(f"{split}_images.npy does not fit dataset.json")
    except (FileNotFoundError, ValueError, EOFError, TypeError, KeyError) as error:
        fix = command("01_prepare_data.py", folder, "--source", "FOLDER")
        raise UserError(f"{folder}: no whole data set there ({str(error)[-120:]}); make it with "
                        f"{fix}, without --source to draw one") from None
    return dataset_dict, array_dict


def read_image(path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image file, open or by its path, as uint8 `[height, width, 3]`, RGB, turned as its EXIF
    orientation says; what is transparent becomes white. Raises UserError.
    """
    name = path if isinstance(path, (str, os.PathLike)) else "the picture"
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise UserError(f"{image.width} x {image.height} px are too many; shrink it to "
                                f"{max_pixels:,} or fewer")
            # White may then be 255, 4095, 65535 or 1.0. The tile says how Pillow would unpack it.
            if image.mode[0] in "IF" or re.search(";(16|32)[BLN]", str(image.tile)):
                raise UserError("holds more than 8 bits a colour; save it with 8 bits")
            image.getexif()  # read now: without the bytes no odd tag can stop exif_transpose
            image.info.pop("exif", None)
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except Exception as error:  # damaged bytes can raise nearly anything
        reason = error if isinstance(error, UserError) else getattr(error, "strerror", None)
        raise UserError(f"{name}: {reason or 'not a readable picture; save it as JPEG or PNG'}"
                        ) from None


def resize_image(image_3d_array: np.ndarray, scale: float) -> np.ndarray:
    """`scale` times as large, in whole px. Places go along: new x = x * new width / width."""
    if scale == 1:
        return image_3d_array
    height, width = (max(1, round(side * scale)) for side in image_3d_array.shape[:2])
    image = Image.fromarray(image_3d_array).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def pad_image(image_3d_array: np.ndarray, height: int = 0, width: int = 0) -> np.ndarray:
    """Repeat right column and bottom row up to `height` x `width`, and up to whole cells."""
    rows, columns = image_3d_array.shape[:2]
    height, width = (-(-max(sides) // CELL) * CELL for sides in ((height, rows), (width, columns)))
    return np.pad(image_3d_array, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge")


def names_to_draw(category_list: list[str]) -> list[str]:
    """The names as pictures show them: the fonts at hand may lack letters beyond ASCII."""
    return [name if name.isascii() else f"class {i}" for i, name in enumerate(category_list)]
