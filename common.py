"""What at least two of the six scripts need, and nothing else.

It imports none of the scripts, so it can be read first or last. In the order in which it stands:
geometry, where files live, telling the user what is wrong, device and seed, reading a picture,
drawing keypoints, writing LabelImg's XML, and a progress bar that refreshes in place.
"""

import contextlib
import json
import os
import shutil
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 32  # px; the network's stride: one cell of its grid looks after 32x32 px of the picture
DATA_FOLDER = Path(__file__).resolve().parent / "data"  # the default of every script's --data
Image.init()  # loads all formats now; read_image names those it wants, and Pillow would not load WEBP and TIFF for that
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns; ours comes before a pixel is decoded
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # and no others: Pillow would hand PostScript over to another program
MAX_PIXELS = 50_000_000  # a picture above this is refused: a few bytes of PNG can unpack to gigabytes
COLOUR_LIST = ["#00e5ff", "#ff4fd8", "#a6ff00", "#ffd400", "#ff7b3a", "#8f9bff"]  # one per class, in turn


class UserError(Exception):
    """Something that the user can mend: one sentence with the file, the value and the fix."""


def run_main(main) -> None:
    """Call `main()`; what a user can get wrong ends in one sentence and exit code 1, not in a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a name shows its code instead
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the output went into `head`, which had seen enough
        sys.stdout = None
    except OSError as error:  # no such folder, disk full, no permission
        sys.exit(f"error: {error.strerror or error}: {error.filename or 'a file of the data folder'}")
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C")


@contextlib.contextmanager
def replacing(path: Path):
    """Yield a temporary path beside `path`, moved into place at the end: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")  # the same name each time: what a kill left is overwritten
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_data_set(folder: Path) -> tuple[dict, dict]:
    """dataset.json as a dict, and {"train": (images, labels), "test": ...} as mapped arrays. Raises UserError."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it with 01_prepare_data.py")
    try:
        dataset_dict = json.loads(path.read_text(encoding="utf-8"))
        if missing := {"category_list", "box_size", "max_per_class", "train", "test"} - set(dataset_dict):
            raise ValueError(f"lacks {min(missing)}")
        array_dict = {}
        for split in ("train", "test"):
            path = folder / f"{split}_images.npy"
            images_4d_array = np.load(path, mmap_mode="r")
            path = folder / f"{split}_labels.npy"
            label_2d_array = np.load(path)
            picture_count = len(dataset_dict[split]["file_list"])
            if images_4d_array.ndim != 4 or len(images_4d_array) != picture_count or label_2d_array.shape[1:] != (4,):
                raise ValueError("does not fit dataset.json")
            array_dict[split] = images_4d_array, label_2d_array
    except (ValueError, EOFError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0][:80]}); make it again with 01_prepare_data.py") from None
    return dataset_dict, array_dict


def pick_device() -> torch.device:
    """The GPU where PyTorch can use one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_image(path) -> np.ndarray:
    """Read a picture as uint8 `[height, width, 3]`, RGB. `path`: a path, or an open binary file.

    Turned as its EXIF note says (LabelImg does so too); grey, palette and CMYK become RGB, what is transparent
    becomes white, 16-bit grey is divided by 257. Raises UserError for what is no picture.
    """
    name = path if isinstance(path, (str, os.PathLike)) else "the picture"
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{name}: {image.width} x {image.height} px is more than {MAX_PIXELS:,} px; shrink it")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip all above 255 to white
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except (OSError, ValueError, SyntaxError) as error:
        reason = str(error).split(" <")[0].split(" '")[0]
        raise UserError(f"{name}: not a readable picture ({reason}); save it again as JPEG or PNG") from None


def pad_image(image_3d_array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat the right column and the bottom row until the picture is `height` x `width`: no coordinate changes."""
    rows, columns = image_3d_array.shape[:2]
    if (rows, columns) == (height, width):
        return image_3d_array
    return np.pad(image_3d_array, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge")


def round_up_to_cell(length: int) -> int:
    """The next multiple of 32, since the grid has whole cells. // rounds down; the two minus signs make it round up.

    >>> round_up_to_cell(416), round_up_to_cell(417)
    (416, 448)
    """
    return -(-length // CELL) * CELL


def draw_keypoints(image: Image.Image, keypoint_list: list[dict]) -> Image.Image:
    """A copy of the picture with box, cross, name and score of each keypoint (dicts as 05_predict.py's JSON has them).

    Each line is drawn twice, dark and wide below bright and thin, so that it shows on any ground. Texts come last, each
    above, below, right or left of its box: where the fewest other texts are.
    """
    image = image.convert("RGB")
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=14)
    for keypoint in keypoint_list:
        x, y, box = keypoint["x"], keypoint["y"], keypoint["box"]
        for width, ink in ((4, "black"), (2, keypoint.get("colour", COLOUR_LIST[0]))):
            canvas.rectangle([v - 0.5 for v in box], outline=ink, width=width)  # pixel c covers [c, c+1): centre c + 0.5
            canvas.line([x - 5.5, y - 0.5, x + 4.5, y - 0.5], fill=ink, width=width - 1)
            canvas.line([x - 0.5, y - 5.5, x - 0.5, y + 4.5], fill=ink, width=width - 1)
    taken_list = []  # x, y, width of the texts so far
    for keypoint in keypoint_list:
        xmin, ymin, xmax, ymax = keypoint["box"]
        text = keypoint["class"] + (f" {keypoint['score']:.2f}" if "score" in keypoint else "")
        _, _, width, height = canvas.textbbox((0, 0), text, font=font, stroke_width=2)
        place_list = [(xmin, ymin - height - 3), (xmin, ymax + 2), (xmax + 4, ymin + 4), (xmin - width - 4, ymin + 4)]
        place_list = [(min(max(2, x), image.width - width - 2), min(max(0, y), image.height - height)) for x, y in place_list]

        def overlaps(place):
            return sum(abs(place[1] - y) < height and place[0] < x + w and x < place[0] + width for x, y, w in taken_list)

        x, y = min(place_list, key=overlaps)
        if y < ymax and ymin < y + height and xmin - width < x < xmax:  # pushed onto its own box by the picture's edge
            x, y = place_list[1]
        taken_list.append((x, y, width))
        canvas.text((x, y), text, fill=keypoint.get("colour", COLOUR_LIST[0]), font=font, stroke_width=2, stroke_fill="black")
    return image


def write_labelimg_xml(path: Path, image_name: str, width: int, height: int, keypoint_list: list[dict]) -> None:
    """Write keypoints (dicts with "class" and "box") as LabelImg does; a box that sticks out is cut, `truncated` is 1.

    Two decimals are kept. LabelImg opens them, but saves whole pixels, truncated: 0.5 px up and left on average.
    """
    root = ElementTree.Element("annotation")
    for tag, text in (("folder", path.parent.name), ("filename", image_name), ("path", image_name)):
        ElementTree.SubElement(root, tag).text = text
    size = ElementTree.SubElement(root, "size")
    for tag, number in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, tag).text = str(number)
    ElementTree.SubElement(root, "segmented").text = "0"
    for keypoint in keypoint_list:
        xmin, ymin, xmax, ymax = keypoint["box"]
        cut_box = [max(xmin, 0), max(ymin, 0), min(xmax, width), min(ymax, height)]
        node = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(node, "name").text = keypoint["class"]
        ElementTree.SubElement(node, "pose").text = "Unspecified"
        ElementTree.SubElement(node, "truncated").text = str(int(cut_box != [xmin, ymin, xmax, ymax]))
        ElementTree.SubElement(node, "difficult").text = "0"
        bndbox = ElementTree.SubElement(node, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), cut_box):
            ElementTree.SubElement(bndbox, tag).text = f"{value:.2f}"
    ElementTree.indent(root, "\t")
    with replacing(path) as temporary:
        ElementTree.ElementTree(root).write(temporary, encoding="utf-8")


def time_calls(function, device: torch.device, runs: int) -> list[float]:
    """Times of so many calls in ms, after three to warm up. A GPU works on its own, so it is waited for."""
    time_list = []
    for _ in range(3 + runs):
        start_time = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()  # without it, only the handing over would be timed
        time_list.append((time.perf_counter() - start_time) * 1e3)
    return time_list[3:]


class Progress:
    """A progress line that refreshes in place: `\\r` goes back to the line's start without starting a new one.

    Into a file or a pipe, where nothing can be overwritten, it prints a plain line at each tenth of the way, and for
    what is done within three seconds only the last one.
    """

    def __init__(self, total: int, what: str, first: int = 0):
        self.total, self.what = total, what
        self.first = first  # what was done before this run (--resume) says nothing about the time left
        self.in_place = sys.stdout.isatty()
        self.start_time = self.last_time = time.perf_counter()
        self.next_tenth = 1

    def show(self, done: int, text: str = "") -> None:
        """Show that `done` of `total` are done, with `text` after it; at most five times a second."""
        now = time.perf_counter()
        seconds_each = (now - self.start_time) / (done - self.first)
        seconds_left = round(seconds_each * (self.total - done))
        left = f"{seconds_left // 60}:{seconds_left % 60:02d} left" if done < self.total else f"{now - self.start_time:.0f} s"
        if self.in_place:
            if now - self.last_time < 0.2 and done < self.total:
                return
            self.last_time = now
            filled = round(20 * done / self.total)
            line = f"{self.what} [{'#' * filled}{'.' * (20 - filled)}] {done}/{self.total}  {text}  {left}"
            columns = shutil.get_terminal_size().columns - 1  # a line that wraps could not be overwritten
            print("\r" + line[:columns].ljust(columns), end="\n" if done == self.total else "", flush=True)
        elif done == self.total or (done * 10 >= self.next_tenth * self.total and now - self.start_time > 3):
            self.next_tenth = done * 10 // self.total + 1
            print(f"{self.what} {done}/{self.total}  {text}  {left}", flush=True)
