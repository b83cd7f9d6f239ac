"""What at least two of the six scripts need, and nothing else.

It imports none of the scripts, so it can be read first or last. It holds, in this order: geometry
and folders, telling the user what is wrong, reading the data set, device and timing, reading a
picture, drawing keypoints and plots, writing LabelImg's XML, and a progress bar.
"""

import contextlib
import functools
import json
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
from PIL import Image, ImageDraw, ImageFont

CELL = 32  # px; the network's stride: one cell of its grid looks after 32x32 px of the picture
DATA_FOLDER = Path(__file__).resolve().parent / "data"  # the default of every script's --data
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # Pillow would hand PostScript to a program
MAX_PIXELS = 50_000_000  # a picture above this is refused: a few bytes can unpack to gigabytes
COLOUR_LIST = ["#00e5ff", "#ff4fd8", "#a6ff00", "#ffd400", "#ff7b3a", "#8f9bff"]  # class by class
Image.init()  # loads every format now, since Pillow would load WEBP and TIFF too late
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns; ours refuses


# ---------------------------------------------------------------- talking with the user

class UserError(Exception):
    """Something that the user can mend: one sentence with the file, the value and the fix."""


def run_main(main) -> None:
    """Call `main()`. What a user can get wrong ends in one sentence and exit code 1."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a letter shows its code
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # A polite kill ends the program like an error does: with its clean-up, and its children.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the output went into `head`, which had seen enough
        sys.stdout = None
    except OSError as error:  # no such folder, disk full, no permission
        where = error.filename or "a file of the data folder"
        sys.exit(f"error: {error.strerror or error}: {where}")
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one must not disturb the ending


def command(script: str, data_folder: Path, *argument_list) -> str:
    """The command line that a user types next.

    >>> command("03_train.py", Path("my data"), "--resume")
    "python 03_train.py --data 'my data' --resume"
    """
    data_list = [] if data_folder == DATA_FOLDER else ["--data", data_folder]
    return shlex.join(["python", script, *map(str, data_list), *map(str, argument_list)])


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


# ---------------------------------------------------------------- data set, device, time

def read_data_set(folder: Path) -> tuple[dict, dict]:
    """Read what 01_prepare_data.py wrote. Raises UserError where a file is missing or damaged.

    Returns dataset.json as a dict, and {"train": (images, labels), "val": ..., "test": ...}: uint8
    `[N, H, W, 3]`, mapped, so that only what is looked at is read from the disk; float32 `[M, 4]`.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        fix = command("01_prepare_data.py", folder)
        raise UserError(f"{path}: no such file; make it with {fix}, for your own pictures --source")
    try:
        dataset_dict = json.loads(path.read_text(encoding="utf-8"))
        for name in ("category_list", "box_size", "max_per_class", "train", "val", "test"):
            dataset_dict[name]  # a KeyError here rather than later
        array_dict = {}
        for split in ("train", "val", "test"):
            path = folder / f"{split}_images.npy"
            images_4d_array = np.load(path, mmap_mode="r")
            path = folder / f"{split}_labels.npy"
            label_2d_array = np.load(path)
            expected = len(dataset_dict[split]["file_list"])
            is_whole = images_4d_array.ndim == 4 and len(images_4d_array) == expected
            if not is_whole or label_2d_array.shape[1:] != (4,):
                raise ValueError("does not fit dataset.json")
            array_dict[split] = images_4d_array, label_2d_array
    except (ValueError, EOFError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0][:80]
        fix = "make it again with 01_prepare_data.py"
        raise UserError(f"{path}: damaged ({reason}); {fix}") from None
    return dataset_dict, array_dict


def pick_device() -> torch.device:
    """The GPU where PyTorch can use one, else the processor.

    To stay on the processor of a computer with a card, put CUDA_VISIBLE_DEVICES= before the
    command; CUDA_VISIBLE_DEVICES=1 takes the second card.
    """
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


# ---------------------------------------------------------------- reading a picture

ORIENTATION_DICT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
                    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
                    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
                    8: Image.Transpose.ROTATE_90}  # EXIF tag 274: how a camera was held


def read_image(path) -> np.ndarray:
    """Read a picture as uint8 `[height, width, 3]`, RGB. `path`: a path, or an open binary file.

    Turned as its EXIF orientation says (LabelImg does so too); grey, palette and CMYK become RGB,
    what is transparent becomes white. Raises UserError, and nothing else, for what is no picture.
    """
    name = path if isinstance(path, (str, os.PathLike)) else "the picture"
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} px"
                raise UserError(f"{name}: {size} is more than {MAX_PIXELS:,} px; shrink it")
            image.load()
            orientation = image.getexif().get(274)
            if orientation in ORIENTATION_DICT:
                image = image.transpose(ORIENTATION_DICT[orientation])
            return np.array(to_rgb(image, name))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except Exception as error:  # damaged bytes can raise nearly anything
        reason = f"{str(error).split(' <')[0].split(chr(10))[0][:80]}" or type(error).__name__
        fix = "save it again as JPEG or PNG"
        raise UserError(f"{name}: not a readable picture ({reason}); {fix}") from None


def to_rgb(image: Image.Image, name) -> Image.Image:
    """RGB with 8 bits a colour. What does not say how bright its numbers are is refused."""
    if image.mode.startswith("I;16"):  # convert("RGB") would clip all above 255 to white
        grey_2d_array = np.asarray(image).astype(np.int32)
        if 0 < grey_2d_array.max() < 4096:
            raise UserError(f"{name}: 16-bit grey that holds numbers up to {grey_2d_array.max()} "
                            "only, nearly black; save it with 8 bits")
        return Image.fromarray((grey_2d_array // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit whole numbers" if image.mode == "I" else "floating-point numbers"
        raise UserError(f"{name}: holds {kind}, whose white is not known; save it with 8 bits")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pad_image(image_3d_array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat right column and bottom row up to `height` x `width`: no coordinate changes."""
    rows, columns = image_3d_array.shape[:2]
    if (rows, columns) == (height, width):
        return image_3d_array
    return np.pad(image_3d_array, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge")


def round_up_to_cell(length: int) -> int:
    """The next multiple of 32, since the grid has whole cells.

    >>> round_up_to_cell(416), round_up_to_cell(417)
    (416, 448)
    """
    return (length + CELL - 1) // CELL * CELL


# ---------------------------------------------------------------- drawing

@functools.lru_cache
def find_font(text: str):
    """A font of this computer that has all letters of `text` (matplotlib's entry), else None."""
    from matplotlib import font_manager, ft2font
    entry_list = font_manager.fontManager.ttflist
    for entry in sorted(entry_list, key=lambda entry: entry.name != "DejaVu Sans"):
        if entry.name.startswith("Last Resort"):  # matplotlib's own, with a box for every letter
            continue
        try:
            if {ord(letter) for letter in text} <= set(ft2font.FT2Font(entry.fname).get_charmap()):
                return entry
        except (OSError, RuntimeError):  # listed, but gone or damaged
            continue
    return None


def names_to_draw(category_list: list[str]) -> list[str]:
    """The names as pictures show them: a class's number where no font has the letters."""
    if "".join(category_list).isascii() or find_font("".join(category_list)):
        return category_list
    print("no font of this computer has the letters of the class names: pictures show numbers, "
          + ", ".join(f"{i} = {name}" for i, name in enumerate(category_list) if i))
    return [category_list[0], *map(str, range(1, len(category_list)))]


def draw_keypoints(image: Image.Image, keypoint_list: list[dict]) -> Image.Image:
    """A copy of the picture with box, cross and text of each keypoint (dicts as in 05's JSON).

    "colour" and "label" (the text) may be given besides. Each line is drawn twice, dark and wide
    below bright and thin, so that it shows on any ground.
    """
    image = image.convert("RGB")
    canvas = ImageDraw.Draw(image)
    for keypoint in keypoint_list:
        x, y = keypoint["x"] - 0.5, keypoint["y"] - 0.5  # pixel c covers [c, c + 1)
        for width, ink in ((4, "black"), (2, keypoint.get("colour", COLOUR_LIST[0]))):
            canvas.rectangle([v - 0.5 for v in keypoint["box"]], outline=ink, width=width)
            canvas.line([x - 5, y, x + 5, y], fill=ink, width=width - 1)
            canvas.line([x, y - 5, x, y + 5], fill=ink, width=width - 1)
    taken_list = [keypoint["box"] for keypoint in keypoint_list]  # no text covers a box or a text
    for keypoint in keypoint_list:
        text = keypoint.get("label", keypoint["class"])
        text += f" {keypoint['score']:.2f}" if "score" in keypoint else ""
        entry = None if text.isascii() else find_font(text)
        font = ImageFont.truetype(entry.fname, 14) if entry else ImageFont.load_default(14)
        _, _, *size = canvas.textbbox((0, 0), text, font=font, stroke_width=2)
        place = place_text(keypoint["box"], size, image.size, taken_list)
        canvas.text(place, text, keypoint.get("colour", COLOUR_LIST[0]), font, stroke_width=2,
                    stroke_fill="black")
    return image


def place_text(box, size, image_size, taken_list: list) -> tuple[float, float]:
    """Above, below, right or left of the box, in the picture: where it covers least."""
    (xmin, ymin, xmax, ymax), (width, height) = box, size

    def move_inside(x, y):
        return min(max(0, x), image_size[0] - width), min(max(0, y), image_size[1] - height)

    def count_covered(place):
        x, y = place
        return sum(left < x + width and x < right and top < y + height and y < bottom
                   for left, top, right, bottom in taken_list)

    place_list = [(xmin, ymin - height - 2), (xmin, ymax + 2), (xmax + 4, ymin),
                  (xmin - width - 4, ymin)]
    x, y = min((move_inside(*place) for place in place_list), key=count_covered)
    taken_list.append((x, y, x + width, y + height))
    return x, y


def pyplot(text: str = ""):
    """matplotlib.pyplot, drawing into files without a screen, in a font with `text`'s letters."""
    import matplotlib
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    entry = None if text.isascii() else find_font(text)
    matplotlib.rcParams["font.family"] = entry.name if entry else "DejaVu Sans"
    return plt


def save_figure(figure, path: Path, dpi: int = 110) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    pyplot().close(figure)


# ---------------------------------------------------------------- LabelImg's XML

def write_labelimg_xml(path: Path, image_name: str, width: int, height: int,
                       keypoint_list: list[dict]) -> None:
    """Write keypoints (dicts with "class" and "box") as LabelImg does; a box is cut at the edge.

    Two decimals are kept. LabelImg opens them, but saves whole pixels, truncated: 0.5 px up and
    left on average.
    """
    name = escape(image_name)
    line_list = [f"<annotation><folder>{escape(path.parent.name)}</folder>",
                 f"<filename>{name}</filename><path>{name}</path>",
                 f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
                 "<segmented>0</segmented>"]
    for keypoint in keypoint_list:
        xmin, ymin, xmax, ymax = keypoint["box"]
        cut_box = [max(xmin, 0), max(ymin, 0), min(xmax, width), min(ymax, height)]
        corners = "".join(f"<{tag}>{value:.2f}</{tag}>" for tag, value
                          in zip(("xmin", "ymin", "xmax", "ymax"), cut_box))
        truncated = int(cut_box != list(keypoint["box"]))
        line_list += [f"<object><name>{escape(keypoint['class'])}</name><pose>Unspecified</pose>",
                      f"<truncated>{truncated}</truncated><difficult>0</difficult>",
                      f"<bndbox>{corners}</bndbox></object>"]
    text = "\n".join([*line_list, "</annotation>\n"])
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


# ---------------------------------------------------------------- the progress bar

class Progress:
    """A progress line that refreshes in place: `\\r` goes back to the line's start.

    Into a file or a pipe, where nothing can be overwritten, it prints a plain line at each tenth
    of the way; of what is done within three seconds only the last.
    """

    def __init__(self, total: int, what: str, first: int = 0):
        self.total, self.what = total, what
        self.first = first  # what was done before this run (--resume) says nothing about the rest
        self.in_place = sys.stdout.isatty()
        self.start_time = self.last_time = time.perf_counter()
        self.next_tenth = 1

    def show(self, done: int, text: str = "") -> None:
        """Show that `done` of `total` are done, with `text` after it."""
        now = time.perf_counter()
        is_last = done == self.total
        seconds = now - self.start_time
        left = round(seconds / (done - self.first) * (self.total - done))
        when = f"{seconds:.0f} s" if is_last else f"{left // 60}:{left % 60:02d} left"
        if self.in_place and (is_last or now - self.last_time > 0.2):  # five times a second at most
            self.last_time = now
            filled = round(20 * done / self.total)
            bar = "#" * filled + "." * (20 - filled)
            columns = shutil.get_terminal_size().columns - 1  # a wrapped line can't be overwritten
            line = f"{self.what} [{bar}] {done}/{self.total}  {text}  {when}"
            print("\r" + line[:columns].ljust(columns), end="\n" if is_last else "", flush=True)
        elif not self.in_place and (is_last or (done * 10 >= self.next_tenth * self.total
                                                and seconds > 3)):
            self.next_tenth = done * 10 // self.total + 1
            print(f"{self.what} {done}/{self.total}  {text}  {when}", flush=True)
