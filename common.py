"""What the six scripts share. Read it when you need it."""

import argparse
import contextlib
import ctypes
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

CELL = 32  # px; the network's stride: one cell of its grid looks after 32x32 px of the picture
REACH = CELL / 4  # px; a cell learns keypoints as far beyond its border, see match in 02_model.py
DATA_FOLDER = Path(__file__).resolve().parent / "data"  # the default of every script's --data
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # no EPS: Pillow would run Ghostscript
MAX_PIXELS = 50_000_000  # a picture above this is refused: a few bytes can unpack to gigabytes
COLOUR_LIST = ["#00e5ff", "#ff4fd8", "#a6ff00", "#ffd400", "#ff7b3a", "#8f9bff"]  # class by class
TURN_DICT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
             4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
             6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
             8: Image.Transpose.ROTATE_90}  # by EXIF tag 274: how a camera was held
Image.init()  # or Pillow would not know WEBP and TIFF in Image.open(formats=...)
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns; ours refuses


# ---------------------------------------------------------------- talking with the user

class UserError(Exception):
    """Something that the user can mend: one sentence with the file, the value and the fix."""


def run_main(main) -> None:
    """Call `main()`. What a user can get wrong ends in one sentence and exit code 1."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a letter shows its code
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    # A polite kill ends the program like an error does: with its clean-up, and its children.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the output went into `head`, which had seen enough
        sys.stdout = None
    except OSError as error:  # no such folder, disk full, no permission
        where = error.filename or "the file that was being written"
        sys.exit(f"error: {error.strerror or error}: {where}")
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C")  # below the progress line
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once


def keep_freed_memory() -> None:
    """Let malloc keep what is freed: a prediction takes half the time; no new block is zeroed."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only Linux has mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2 ** 30)  # M_TRIM_THRESHOLD, bytes
        mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD, bytes: the largest that is allowed


def make_parser(description: str, data_help: str) -> argparse.ArgumentParser:
    """A parser with --data; its help shows each option's default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA_FOLDER, help=data_help)
    return parser


def short_reason(error: Exception) -> str:
    """What Pillow, PyTorch or numpy say of damaged bytes, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split(' <')[0].split())[:80]}"


def is_default(folder: Path) -> bool:
    return folder.resolve() == DATA_FOLDER.resolve()  # data may be a link to a larger disk


def command(script: str, data_folder: Path, *argument_list) -> str:
    """The command line that a user types next, with quotes where a name needs them."""
    data_list = [] if is_default(data_folder) else ["--data", data_folder]
    return shlex.join(["python", script, *map(str, data_list), *map(str, argument_list)])


def print_table(header, row_list, digits: int = 2) -> None:
    """Columns as wide as their widest cell, the first to the left, the others to the right.

    >>> print_table(("layer", "numbers", "MB"), [("conv 1", 1228800, 4.6875), ("all", None, 4.69)])
       layer     numbers    MB
       conv 1  1,228,800  4.69
       all             -  4.69
    """
    def text_of(cell) -> str:
        if isinstance(cell, (float, np.floating)):
            return f"{cell:,.{digits}f}"
        return "-" if cell is None else cell if isinstance(cell, str) else f"{cell:,}"

    text_list = [list(map(text_of, row)) for row in (header, *row_list)]
    first_width, *width_list = [max(map(len, column)) for column in zip(*text_list)]
    for first, *rest in text_list:
        line = "".join(f"  {cell:>{width}}" for cell, width in zip(rest, width_list))
        print(f"   {first:{first_width}}{line}".rstrip())


@contextlib.contextmanager
def replacing(path: Path):
    """Yield a temporary path, moved to `path` at the end: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with replacing(path) as temporary:  # a file's name need not be proper Unicode, hence errors
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


# ---------------------------------------------------------------- data set, device, time

def read_data_set(folder: Path) -> tuple[dict, dict]:
    """Read what 01_prepare_data.py wrote. Raises UserError where a file is missing or damaged.

    Returns dataset.json, and {"train": (images, labels), "val": ..., "test": ...}: uint8
    `[N, H, W, 3]`, mapped: only what is looked at is read from the disk; float32 `[M, 4]`.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        fix = command("01_prepare_data.py", folder)
        raise UserError(f"{path}: no such file; make it with {fix}, for your own pictures --source")
    array_dict = {}
    try:
        dataset_dict = json.loads(path.read_text(encoding="utf-8"))
        for name in ("category_list", "box_size", "max_per_class", "train", "val", "test"):
            dataset_dict[name]  # a KeyError here rather than later
        for split in ("train", "val", "test"):
            path = folder / f"{split}_images.npy"
            images_4d_array = np.load(path, mmap_mode="r")
            path = folder / f"{split}_labels.npy"
            label_2d_array = np.load(path)
            count_set = {len(images_4d_array), *(len(dataset_dict[split][name])
                                                 for name in ("file_list", "size_list"))}
            if images_4d_array.ndim != 4 or label_2d_array.shape[1:] != (4,) or len(count_set) > 1:
                raise ValueError("does not fit dataset.json")
            array_dict[split] = images_4d_array, label_2d_array
    except (ValueError, EOFError, TypeError, KeyError, FileNotFoundError) as error:
        raise UserError(f"{path}: damaged ({short_reason(error)}); make it again with "
                        + command("01_prepare_data.py", folder)) from None
    return dataset_dict, array_dict


def pick_device() -> torch.device:
    """The GPU, else the processor. CUDA_VISIBLE_DEVICES= before a command hides all cards."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_calls(function, device: torch.device, runs: int) -> list[float]:
    """Times of so many calls in ms, after three to warm up."""
    time_list = []
    for _ in range(3 + runs):
        start_time = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()  # a GPU works on its own: without waiting, nothing is timed
        time_list.append((time.perf_counter() - start_time) * 1e3)
    return time_list[3:]


# ---------------------------------------------------------------- pictures

def read_image(path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a picture as uint8 `[height, width, 3]`, RGB. `path`: a path, or an open binary file.

    Turned as its EXIF orientation says (LabelImg does so too); grey, palette and CMYK become RGB,
    what is transparent becomes white. Raises UserError, and nothing else, for what is no picture.
    """
    name = path if isinstance(path, (str, os.PathLike)) else "the picture"
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise UserError(f"{name}: {image.width} x {image.height} px is more than "
                                f"{max_pixels:,} px; shrink it")
            if image.mode[0] in "IF":  # 16 or 32 bits, whose white may be 255, 4095, 65535 or 1.0
                raise UserError(f"{name}: holds more than 8 bits a pixel; save it with 8 bits")
            image.load()
            orientation = image.getexif().get(274)
            if orientation in TURN_DICT:
                image = image.transpose(TURN_DICT[orientation])
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise nearly anything
        if isinstance(error, OSError) and error.errno:  # not there, no file, no permission
            raise UserError(f"{name}: {error.strerror}") from None
        raise UserError(f"{name}: not a readable picture ({short_reason(error)}); save it again "
                        "as JPEG or PNG") from None


def files_in(folder: Path, suffix_set=IMAGE_SUFFIXES) -> list[Path]:
    return [path for path in sorted(folder.glob("*")) if path.suffix.lower() in suffix_set
            and path.is_file() and not path.name.startswith(".")]


def round_up_to_cell(length: int) -> int:
    """The next multiple of 32, since the grid has whole cells: 416 stays, 417 becomes 448."""
    return (length + CELL - 1) // CELL * CELL


def pad_image(image_3d_array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat right column and bottom row up to `height` x `width`: no coordinate changes."""
    rows, columns = image_3d_array.shape[:2]
    return np.pad(image_3d_array, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge")


def colour_of(class_id: int) -> str:
    return COLOUR_LIST[(int(class_id) - 1) % len(COLOUR_LIST)]


def names_to_draw(category_list: list[str]) -> list[str]:
    """The names as pictures show them: numbers where a font might lack the letters."""
    if "".join(category_list).isascii():
        return category_list
    print("pictures show the classes as numbers: "
          + ", ".join(f"{i} = {name}" for i, name in enumerate(category_list) if i))
    return list(map(str, range(len(category_list))))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib Figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def save_close_ups(path: Path, tile_list: list[tuple], columns: int) -> None:
    """Parts of pictures side by side, `columns` in a row.

    A tile: (title, picture `[H, W, 3]`, x, y, reach, points); it shows the picture as far as
    `reach` px from (x, y), and each point (x, y, colour) as a cross.
    """
    rows = max(1, math.ceil(len(tile_list) / columns))
    figure = Figure((1.8 * columns, 2 * rows))
    for number, (title, image_3d_array, x, y, reach, point_list) in enumerate(tile_list, start=1):
        left, top, right, bottom = (max(0, int(side)) for side in (
            x - reach, y - reach, x + reach + 1, y + reach + 1))
        part_3d_array = image_3d_array[top:bottom, left:right]
        height, width = part_3d_array.shape[:2]
        axes = figure.add_subplot(rows, columns, number, facecolor="grey")
        if height and width:  # else all of it lies outside of the picture
            axes.imshow(part_3d_array, extent=(left, left + width, top + height, top))
        for point_x, point_y, colour in point_list:
            axes.plot(point_x, point_y, "+", color=colour, markersize=24)
        axes.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach), xticks=[], yticks=[])
        title = title.encode("ascii", "replace").decode()  # a font might lack a file name's letters
        axes.set_title(title, fontsize=8, parse_math=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.25 / (2 * rows), 0.05, 0.15)
    save_figure(figure, path)


# ---------------------------------------------------------------- LabelImg's XML

def write_labelimg_xml(path: Path, image_name: str, width: int, height: int,
                       keypoint_list: list[dict]) -> None:
    """Write keypoints (dicts with "class" and "box") as LabelImg does; a box is cut at the edge.

    Two decimals are kept. LabelImg opens them, but saves whole pixels, truncated: 0.5 px up and
    left on average.
    """
    name = escape(image_name)
    text = (f"<annotation><folder>{escape(path.parent.name)}</folder>\n"
            f"<filename>{name}</filename><path>{name}</path>\n"
            f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n"
            "<segmented>0</segmented>\n")
    for keypoint in keypoint_list:
        xmin, ymin, xmax, ymax = keypoint["box"]
        cut_box = [max(xmin, 0), max(ymin, 0), min(xmax, width), min(ymax, height)]
        corners = "".join(f"<{tag}>{value:.2f}</{tag}>" for tag, value
                          in zip(("xmin", "ymin", "xmax", "ymax"), cut_box))
        truncated = int(cut_box != list(keypoint["box"]))
        text += (f"<object><name>{escape(keypoint['class'])}</name><pose>Unspecified</pose>\n"
                 f"<truncated>{truncated}</truncated><difficult>0</difficult>\n"
                 f"<bndbox>{corners}</bndbox></object>\n")
    with replacing(path) as temporary:
        temporary.write_text(f"{text}</annotation>\n", encoding="utf-8")


# ---------------------------------------------------------------- the progress bar

def track(item_list, what: str):
    """Yield the items, while a progress line counts what is done."""
    progress = Progress(len(item_list), what)
    for done, item in enumerate(item_list, start=1):
        yield item
        progress.show(done)


class Progress:
    """A progress line that refreshes in place: `\\r` goes back to the line's start.

    Into a file or a pipe, where nothing can be overwritten, a plain line every twenty seconds.
    """

    def __init__(self, total: int, what: str, first: int = 0):
        self.total, self.what = total, what
        self.first = first  # what was done before this run (--resume) says nothing about the rest
        self.start_time = self.last_time = time.perf_counter()

    def show(self, done: int, text: str = "") -> None:
        """Show that `done` of `total` are done, with `text` after it."""
        now, is_last, in_place = time.perf_counter(), done == self.total, sys.stdout.isatty()
        if not is_last and now - self.last_time < (0.2 if in_place else 20):  # s
            return
        self.last_time, seconds = now, now - self.start_time
        left = round(seconds / (done - self.first) * (self.total - done))
        when = f"{seconds:.0f} s" if is_last else f"{left // 60}:{left % 60:02d} left"
        line = f"{done}/{self.total}  {text}  {when}"
        if not in_place:
            print(f"{self.what} {line}", flush=True)
            return
        bar = ("#" * round(20 * done / self.total)).ljust(20, ".")
        columns = shutil.get_terminal_size().columns - 1  # a wrapped line can't be overwritten
        line = f"{self.what} [{bar}] {line}"[:columns].ljust(columns)
        print(f"\r{line}", end="\n" if is_last else "", flush=True)
