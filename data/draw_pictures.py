"""Draw the example data set: images of an amber panel with marks, and labels that are right.

    python data/draw_pictures.py --pictures 1465 --seed 0

Reads   nothing.
Writes  images/00000.jpg, 00000.xml and so on in the data folder, and images/.drawn, by which it
        knows its own drawing again: it draws into no other folder.
Time    a minute on two cores.
See     keyPoint_1, a ring with a cross, and keyPoint_2, a ring with two opposite quarters filled.
Next    python 01_prepare_data.py, which starts this program where it is given no pictures.
"""

import functools
import importlib
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

# Python looks for modules in this script's folder, data/; the others lie one above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, make_parser, replacing, run_main

HEIGHT, WIDTH = 1920, 320  # px
BOX_SIDE = 30  # px; the label's box round a drawn mark, which is about 28 px across
EDGE_MARGIN = 12  # px; how near to the edge a mark may be: its box may be cut there
MARK_DISTANCE = 46  # px between two marks: more than a cell's diagonal, so none share a cell
write_labelimg_xml = importlib.import_module("01_prepare_data").write_labelimg_xml
MARK_LIST = ["keyPoint_1", "keyPoint_2"]
# Parts of marks, but no marks: to tell them apart the network must see all of a mark.
DISTRACTOR_LIST = ["ring", "screw", "cross", "disc", "half", "quarter"]


def outside(name, u, v):
    """Signed distance from (u, v), seen from the mark's middle, to a shape in px: inside below 0.

    The smallest of several distances joins shapes, the largest intersects them.
    """
    disc = np.hypot(u, v) - 12.5
    ring = np.abs(disc) - 1.5
    level = np.maximum(np.abs(u) - 12.5, np.abs(v) - 1.5)  # a bar from left to right
    upright = np.maximum(np.abs(v) - 12.5, np.abs(u) - 1.5)
    quarter = np.maximum(disc, -np.minimum(u, v))
    opposite = np.maximum(disc, np.maximum(u, v))
    part_dict = {
        "keyPoint_1": (ring, level, upright), "keyPoint_2": (ring, quarter, opposite),
        "ring": (ring,), "screw": (ring, level), "cross": (level, upright), "disc": (disc,),
        "half": (ring, np.maximum(disc, u)), "quarter": (ring, quarter),
        "paper": (np.maximum(np.abs(u), np.abs(v)) - 17,)}
    return functools.reduce(np.minimum, part_dict[name])


def paint(picture_3d_array, x, y, angle, scale, name, colour, opacity=1.0) -> None:
    """Paint a shape at the sub-pixel place (x, y), turned by `angle` (radians) and scaled."""
    reach = math.ceil(28 * scale)  # px; the corners of the paper are 24 px from its middle
    height, width = picture_3d_array.shape[:2]
    top, bottom = max(0, int(y) - reach), min(height, int(y) + reach)
    left, right = max(0, int(x) - reach), min(width, int(x) + reach)
    # Pixel c covers [c, c + 1): its middle is at c + 0.5. Forgotten, labels lie half a pixel off.
    dx = np.arange(left, right)[None, :] + 0.5 - x
    dy = np.arange(top, bottom)[:, None] + 0.5 - y
    u = (dx * math.cos(angle) + dy * math.sin(angle)) / scale
    v = (dy * math.cos(angle) - dx * math.sin(angle)) / scale
    # How much of each pixel is covered: all where it lies half a pixel inside, none outside.
    coverage = np.clip(0.5 - outside(name, u, v) * scale, 0, 1)[:, :, None] * opacity
    patch = picture_3d_array[top:bottom, left:right]
    patch += coverage * (np.asarray(colour, np.float32) - patch)


def smooth_noise(rng, rows, columns):
    """Noise of mean 0 and spread about 1 that changes slowly: a few random numbers, scaled up."""
    coarse_2d_array = rng.normal(size=(rows, columns)).astype(np.float32)
    image = Image.fromarray(coarse_2d_array).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return np.asarray(image)


def draw_scene(rng):
    """An amber panel with soft streaks; before it a dark rod and its holder, whose box it returns.

    The streaks are 16 px wide, five times as wide as a bar of a mark: none completes a mark.
    """
    light_2d_array = 1 + 0.12 * smooth_noise(rng, 5, 3) + 0.08 * smooth_noise(rng, 4, 20)
    amber = rng.uniform((165, 105, 30), (215, 150, 70))
    dark = rng.uniform((25, 20, 15), (50, 42, 40))
    x, y = rng.uniform(90, WIDTH - 90), rng.uniform(150, HEIGHT - 150)
    half_width, half_height = rng.uniform(50, 80), rng.uniform(75, 150)
    holder_box = (x - half_width, y - half_height, x + half_width, y + half_height)
    rod_box = (x - 20, 0, x + 20, y) if rng.random() < 0.5 else (x - 20, y, x + 20, HEIGHT)
    picture_3d_array = np.empty((HEIGHT, WIDTH, 3), np.float32)
    picture_3d_array[:] = amber
    for left, top, right, bottom in (rod_box, holder_box):
        picture_3d_array[int(top):int(bottom), int(left):int(right)] = dark
    return picture_3d_array * light_2d_array[:, :, None], holder_box


def find_place(rng, holder_box, place_list):
    """A place for a mark, three times in five on or near the holder, away from those before."""
    left, top, right, bottom = holder_box
    while True:
        if rng.random() < 0.6:
            x, y = rng.uniform(left - 30, right + 30), rng.uniform(top - 60, bottom + 60)
        else:
            x, y = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)
        is_inside = (EDGE_MARGIN <= x <= WIDTH - EDGE_MARGIN
                     and EDGE_MARGIN <= y <= HEIGHT - EDGE_MARGIN)
        if is_inside and all(math.dist((x, y), place) >= MARK_DISTANCE for place in place_list):
            place_list.append((x, y))
            return x, y


def paint_mark(picture_3d_array, rng, x, y, name) -> None:
    """Paint a mark: dark ink on bright ground, bright paint on dark, on paper where it is both."""
    angle, scale = rng.normal(0, math.radians(6)), rng.uniform(0.9, 1.1)
    top, left = max(0, int(y) - 16), max(0, int(x) - 16)
    ground = picture_3d_array[top:int(y) + 16, left:int(x) + 16].mean(axis=2)
    if np.ptp(ground) > 60 or rng.random() < 0.1:
        paper = np.array([205, 190, 160]) * rng.uniform(0.7, 1.1)
        paint(picture_3d_array, x, y, angle, scale, "paper", paper)
        ground = paper
    if ground.mean() > 85:
        ink = np.array([45, 30, 20]) * rng.uniform(0.4, 1.2)
    else:
        ink = np.array([215, 195, 150]) * rng.uniform(0.7, 1.1)
    paint(picture_3d_array, x, y, angle, scale, name, ink, rng.uniform(0.75, 1))


def photograph(picture_3d_array, rng):
    """Light, colour, contrast, focus and noise of a working day. Returns uint8 `[1920, 320, 3]`."""
    picture_3d_array = picture_3d_array * rng.uniform(0.75, 1.2) * (1 + rng.normal(0, 0.04, 3))
    mean = picture_3d_array.mean()
    picture_3d_array = mean + (picture_3d_array - mean) * rng.uniform(0.75, 1.15)
    image = Image.fromarray(picture_3d_array.clip(0, 255).astype(np.uint8))
    picture_3d_array = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.4))))
    noise_3d_array = rng.standard_normal(picture_3d_array.shape, np.float32) * rng.uniform(1, 7)
    return (picture_3d_array + noise_3d_array).clip(0, 255).astype(np.uint8)


def draw_picture(index: int, seed: int, folder: Path) -> None:
    """Draw picture number `index`, folder/00042.jpg and .xml: the same for the same seed."""
    rng = np.random.default_rng([seed, index])
    picture_3d_array, holder_box = draw_scene(rng)
    place_list, keypoint_list = [], []
    half, mark_count = BOX_SIDE / 2, rng.choice([0, 1, 2], p=[0.2, 0.5, 0.3])
    for name in rng.permutation(MARK_LIST)[:mark_count].tolist():
        x, y = find_place(rng, holder_box, place_list)
        paint_mark(picture_3d_array, rng, x, y, name)
        keypoint_list.append({"class": name, "box": [x - half, y - half, x + half, y + half]})
    for name in rng.choice(DISTRACTOR_LIST, size=rng.poisson(5)).tolist():
        paint_mark(picture_3d_array, rng, *find_place(rng, holder_box, place_list), name)
    image, path = Image.fromarray(photograph(picture_3d_array, rng)), folder / f"{index:05d}.jpg"
    with replacing(path) as temporary:
        image.save(temporary, "JPEG", quality=int(rng.integers(60, 96)))
    write_labelimg_xml(path.with_suffix(".xml"), path.name, WIDTH, HEIGHT, keypoint_list)


def claim_folder(folder: Path, count: int, seed: int) -> None:
    """Mark the folder as ours. UserError where it holds what no drawing of ours has left there."""
    marker = folder / ".drawn"
    drawn = int(marker.read_text(encoding="utf-8").split()[0]) if marker.is_file() else 0
    own_set = {f"{index:05d}{suffix}" for index in range(drawn) for suffix in (".jpg", ".xml")}
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("[!.]*")):
        if path.name not in own_set:
            raise UserError(f"{path}: was not drawn, so nothing is drawn beside it; move it away, "
                            "or choose another folder with --data")
    for name in own_set:  # left by a larger drawing, it would be a part of this data set
        if int(name[:5]) >= count:
            (folder / name).unlink(missing_ok=True)
    marker.write_text(f"{count} pictures, seed {seed}\n", encoding="utf-8")


def main() -> None:
    parser = make_parser("Draw the example data set.", "folder in which images/ is drawn")
    parser.add_argument("--pictures", type=int, default=1465, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    options = parser.parse_args()
    if not 3 <= options.pictures <= 100_000 or options.seed < 0:  # names have five digits
        parser.error("--pictures must lie between 3 and 100,000, and --seed be at least 0")
    folder = options.data / "images"
    claim_folder(folder, options.pictures, options.seed)
    print(f"drawing {options.pictures} pictures into {folder}", flush=True)
    draw = functools.partial(draw_picture, seed=options.seed, folder=folder)
    # Processes, since threads take turns at Python code. Leaving the `with` ends them. Ctrl-C
    # reaches all of a terminal: each of them begins with signal.signal(...), and leaves it to this
    # one. Windows waits for 63 at most.
    with multiprocessing.Pool(min(os.cpu_count() or 1, 60), initializer=signal.signal,
                              initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        for _ in pool.imap_unordered(draw, range(options.pictures), chunksize=8):
            pass


if __name__ == "__main__":
    run_main(main)
