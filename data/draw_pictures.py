"""Draw the example data set: marks as a camera finds them, decoys, and labels that are right.

    python data/draw_pictures.py --pictures 1465 --seed 0

Writes  images/00000.jpg, 00000.xml and so on in the data folder; images/.drawn marks it as drawn.
Time    a quarter of a minute on two cores.
See     keyPoint_1, a ring with a cross; keyPoint_2, the same with one quarter filled; and decoys,
        which lack a part of a mark or have one too many.
Next    python 01_prepare_data.py, which starts this program itself.
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
from PIL import Image, ImageChops, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where common.py lies
from common import UserError, make_parser, run_main

write_labelimg_xml = importlib.import_module("01_prepare_data").write_labelimg_xml

BILINEAR = Image.Resampling.BILINEAR
HEIGHT, WIDTH = 1920, 320  # px
EDGE_MARGIN, MARK_DISTANCE = 12, 50  # px, at least, to the image's edge and between two marks
MARK_LIST = ["keyPoint_1", "keyPoint_2"]
MARK_COUNT_SHARES = [0.1, 0.3, 0.6]  # of images with none, one and both of them
DECOY_LIST = ["ring", "cross", "disc", "screw", "three arms", "half", "quarter", "two quarters"]
DECOYS = 4  # an image, on average
TILT = 0.002  # of the perspective, at most: it makes one end of a mark 5 % larger than the other
LEAST_CONTRAST = 20  # grey levels between ink and ground, however faint; the noise is 1 to 7
HIDDEN_SHARE = 0.2  # of marks and decoys over which a strip lies: a rod, a tape or a reflection
STRIP_LIST = [((40, 34, 30), 1), ((205, 195, 165), 1), ((255, 250, 235), 4)]  # colour, soft px


def outside(name, u, v):
    """Distance in px from (u, v), seen from the shape's middle, to its edge: inside below 0."""
    disc = np.hypot(u, v) - 12.5
    ring = np.abs(disc) - 1.5
    level = np.maximum(np.abs(u) - 12.5, np.abs(v) - 1.5)  # a bar from left to right
    upright = np.maximum(np.abs(v) - 12.5, np.abs(u) - 1.5)
    quarter = np.maximum(disc, -np.minimum(u, v))  # the largest of two distances intersects
    part_dict = {
        "keyPoint_1": (ring, level, upright),
        "keyPoint_2": (ring, level, upright, quarter),
        "ring": (ring,), "cross": (level, upright), "disc": (disc,), "screw": (ring, level),
        "three arms": (ring, level, np.maximum(upright, -v)),
        "half": (ring, np.maximum(disc, u)), "quarter": (ring, quarter),
        "two quarters": (ring, level, upright, quarter, np.maximum(disc, np.maximum(u, v))),
        "paper": (np.maximum(np.abs(u), np.abs(v)) - 17,),
        "strip": (np.maximum(np.abs(u) - 26, np.abs(v) - 6),)}
    return functools.reduce(np.minimum, part_dict[name])  # the smallest joins


def paint(image_3d_array, x, y, name, colour, angle, scale, tilt=0.0, softness=1, opacity=1.0):
    """Paint a shape at the sub-pixel place (x, y) into an image, uint8 `[1920, 320, 3]`."""
    reach = math.ceil(28 * scale)  # px
    top, left = max(0, int(y) - reach), max(0, int(x) - reach)
    patch_3d_array = image_3d_array[top:int(y) + reach, left:int(x) + reach]
    rows, columns = patch_3d_array.shape[:2]
    # Pixel c covers [c, c + 1): its middle is at c + 0.5. Forgotten, labels lie half a pixel off.
    dx = np.arange(left, left + columns)[None, :] + 0.5 - x
    dy = np.arange(top, top + rows)[:, None] + 0.5 - y
    u = (dx * math.cos(angle) + dy * math.sin(angle)) / scale
    v = (dy * math.cos(angle) - dx * math.sin(angle)) / scale
    farther = 1 + tilt * v  # perspective: what is farther away is smaller; the middle stays
    # A pixel is covered wholly where it lies half a pixel inside, not at all half a pixel outside.
    share_2d_array = 0.5 - outside(name, u * farther, v * farther) * scale / softness
    share_3d_array = share_2d_array.clip(0, 1)[:, :, None] * opacity
    patch_3d_array[:] = patch_3d_array * (1 - share_3d_array) + colour.clip(0, 255) * share_3d_array


def draw_scene(rng):
    """An amber panel, a dark rod and its holder; the light of each 8x8 px; the holder's middle."""
    few = Image.fromarray(rng.normal(1, 0.12, (5, 16)).astype(np.float32))
    light_2d_array = np.array(few.resize((WIDTH // 8, HEIGHT // 8), BILINEAR))  # upright streaks
    y, x = np.mgrid[:HEIGHT:8, :WIDTH:8] - rng.uniform(0, (HEIGHT, WIDTH))[:, None, None]
    if rng.random() < 0.5:  # a shadow with a slanting, soft edge
        depth = ((x + y * rng.uniform(-1, 1)) / rng.uniform(16, 60)).clip(0, 1)
        light_2d_array *= 1 - depth * rng.uniform(0.2, 0.5)
    if rng.random() < 0.5:  # a glare
        far = np.hypot(x / rng.uniform(25, 90), y / rng.uniform(40, 250))
        light_2d_array += np.exp(-far ** 2) * rng.uniform(0.2, 0.8)
    light_2d_array = light_2d_array.clip(0.5, 2)
    panel, dark = ((light_2d_array[:, :, None] * colour).clip(0, 255).astype(np.uint8)
                   for colour in (rng.uniform((165, 105, 30), (215, 150, 70)), [35, 30, 27]))
    image, dark = (Image.fromarray(lit).resize((WIDTH, HEIGHT), BILINEAR) for lit in (panel, dark))
    x, y = rng.integers((90, 150), (WIDTH - 90, HEIGHT - 150)).tolist()
    width, height = rng.integers((50, 75), (80, 150)).tolist()  # half of the holder's
    rod_box = (x - 20, 0, x + 20, y) if rng.random() < 0.5 else (x - 20, y, x + 20, HEIGHT)
    for box in (rod_box, (x - width, y - height, x + width, y + height)):
        image.paste(dark.crop(box), box)
    return np.array(image), light_2d_array, (x, y)


def find_place(rng, holder, place_list):
    """A place for a mark, three times in five near the holder, away from those before."""
    while True:
        near = rng.random() < 0.6
        x, y = rng.normal(holder, (60, 110)) if near else rng.uniform((0, 0), (WIDTH, HEIGHT))
        is_free = all(math.dist((x, y), place) >= MARK_DISTANCE for place in place_list)
        if is_free and min(x, y, WIDTH - x, HEIGHT - y) >= EDGE_MARGIN:
            return x, y


def paint_mark(image_3d_array, rng, x, y, name, light, softness):
    """Paint a mark: dark ink on bright ground, bright paint on dark, on paper where it is both."""
    angle, scale = math.radians(rng.triangular(-25, 0, 25)), rng.triangular(0.75, 1, 1.25)
    pose = angle, scale, rng.uniform(-TILT, TILT), softness
    ground = image_3d_array[max(0, int(y) - 16):int(y) + 16, max(0, int(x) - 16):int(x) + 16]
    if np.ptp(ground.mean(axis=2)) > 60 * light or rng.random() < 0.1:
        ground = np.array([205, 190, 160]) * rng.uniform(0.7, 1) * light
        paint(image_3d_array, x, y, "paper", ground, *pose)
    ink = [45, 30, 20] if ground.mean() > 85 * light else [215, 195, 150]
    ink = np.array(ink) * rng.uniform(0.6, 1.1) * light
    opacity = max(rng.uniform(0.25, 1), LEAST_CONTRAST / abs(ground.mean() - ink.mean()))
    paint(image_3d_array, x, y, name, ink, *pose, min(opacity, 1))
    if rng.random() < HIDDEN_SHARE:
        # The strip's near side passes the middle at 0.4 to 0.8 of the mark's radius, 14 px: it
        # hides up to 25 %; a stub of each arm and quarter stays, and tells class and place.
        far = rng.uniform(0.4, 0.8) * 14 * scale + 6  # px, to the strip's own middle
        angle = rng.uniform(0, 2 * math.pi)
        colour, softness = STRIP_LIST[rng.integers(len(STRIP_LIST))]
        paint(image_3d_array, x - far * math.sin(angle), y + far * math.cos(angle), "strip",
              np.array(colour) * rng.uniform(0.8, 1.1) * light, angle, 1, softness=softness)


def photograph(image_3d_array, rng):
    """Light, colour, contrast, motion, noise, by Pillow: numpy takes ten times as long."""
    grey_1d_array = 75 + (np.arange(256) - 75) * rng.uniform(0.75, 1.15)
    gain_2d_array = rng.uniform(0.8, 1.15) * rng.normal(1, 0.04, (3, 1))  # red, green, blue
    table = (gain_2d_array * grey_1d_array).clip(0, 255).astype(int).ravel().tolist()
    image = Image.fromarray(image_3d_array).point(table)
    if rng.random() < 0.3:  # it moved by up to 5 px, in x or in y
        blur_list = rng.permutation([rng.uniform(0.8, 2), 0]).tolist()  # px to each side
        image = image.filter(ImageFilter.BoxBlur(blur_list))
    strength = rng.uniform(0.015, 0.1)  # random bytes, 0 to 255, become noise of spread 1 to 7
    number_1d_array = rng.integers(2 ** 64, size=image_3d_array.size // 8, dtype=np.uint64)
    noise = Image.frombytes("RGB", image.size, number_1d_array.tobytes())
    noise = noise.point([round(128 + (value - 127.5) * strength) for value in range(256)] * 3)
    return ImageChops.add(image, noise, offset=-128)


def draw_picture(index, seed, folder):
    """Draw image number `index`, folder/00042.jpg and .xml: the same for the same seed."""
    rng = np.random.default_rng([seed, index])
    image_3d_array, light_2d_array, holder = draw_scene(rng)
    place_list, keypoint_list, softness = [], [], rng.uniform(1, 2.2)  # px; 1 is in focus
    name_list = rng.permutation(MARK_LIST)[:rng.choice(3, p=MARK_COUNT_SHARES)].tolist()
    for name in name_list + rng.choice(DECOY_LIST, size=rng.poisson(DECOYS)).tolist():
        x, y = find_place(rng, holder, place_list)
        place_list.append((x, y))
        light = light_2d_array[int(y) // 8, int(x) // 8]
        paint_mark(image_3d_array, rng, x, y, name, light, softness)
        if name in MARK_LIST:  # labelled with a box of 30x30 px, however large it is
            keypoint_list.append({"class": name, "box": [x - 15, y - 15, x + 15, y + 15]})
    path = folder / f"{index:05d}.jpg"
    photograph(image_3d_array, rng).save(path, quality=int(rng.integers(60, 96)))
    write_labelimg_xml(path.with_suffix(".xml"), path.name, WIDTH, HEIGHT, keypoint_list)


def claim_folder(folder: Path, count: int, seed: int) -> None:
    """Mark the folder as ours. UserError where it holds what no drawing of ours has left there."""
    marker = folder / ".drawn"
    text = marker.read_text(encoding="utf-8") if marker.is_file() else ""
    drawn = int(text.split()[0]) if text else 0
    own_set = {f"{index:05d}{suffix}" for index in range(drawn) for suffix in (".jpg", ".xml")}
    folder.mkdir(parents=True, exist_ok=True)
    path_list = sorted(folder.glob("[!.]*"))
    for path in path_list:
        if path.name not in own_set:
            raise UserError(f"{path}: was not drawn by this script; choose another --data folder")
    for path in path_list:  # left by a larger drawing, it would be a part of this data set
        if int(path.stem) >= count:
            path.unlink()
    marker.write_text(f"{count} images, seed {seed}\n", encoding="utf-8")


def main():
    parser = make_parser("Draw the example data set.", "folder in which images/ is drawn")
    parser.add_argument("--pictures", type=int, default=1465, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    options = parser.parse_args()
    if not 3 <= options.pictures <= 100_000 or options.seed < 0:  # names have five digits
        parser.error("--pictures must lie between 3 and 100,000, and --seed be at least 0")
    folder = options.data / "images"
    claim_folder(folder, options.pictures, options.seed)
    print(f"drawing {options.pictures} images into {folder}", flush=True)
    draw = functools.partial(draw_picture, seed=options.seed, folder=folder)
    # Processes, since threads take turns at Python code; leaving the `with` ends them. Ctrl-C goes
    # to all of a terminal: they ignore it and leave it to this one. Windows takes 63 at most.
    with multiprocessing.Pool(min(os.cpu_count() or 1, 60), signal.signal,
                              (signal.SIGINT, signal.SIG_IGN)) as pool:
        list(pool.imap_unordered(draw, range(options.pictures), chunksize=8))


if __name__ == "__main__":
    run_main(main)
