"""Lesson 1: data. Draw a data set, or read your own LabelImg folder; check it; pack it into arrays.

    python 01_prepare_data.py                       # draws 1,465 pictures of an inspection rig
    python 01_prepare_data.py --source my_folder    # reads your pictures and their LabelImg XML files

Reads   the folder that --source names (pictures and XML side by side; with train/ and test/ inside, those are the split).
Writes  data/images/ (the drawn pictures), data/dataset.json, data/{train,test}_{images,labels}.npy and
        data/results/contact_sheet.png: look at this one before you train; wrong labels show here first.
Time    about a minute on two cores for drawing, 2.7 GB of disk for the arrays.
See     a report: pictures, keypoints by class, empty pictures, cut boxes, collisions, look-alikes.
Next    python 02_model.py shows the network; python 03_train.py trains it.
"""

import argparse
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from common import (CELL, COLOUR_LIST, DATA_FOLDER, IMAGE_SUFFIXES, Progress, UserError, draw_keypoints, pad_image,
                    read_image, replacing, round_up_to_cell, run_main, write_labelimg_xml)

PICTURE_COUNT = 1465  # as many as the rig that this was first written for had taken
MOST_PICTURES = 100_000  # to draw; their names have five digits
HEIGHT, WIDTH = 1920, 320  # px
BOX_SIDE = 30  # px; the label's box round a keypoint; the mark itself is about 28 px across
TRAIN_SHARE = 0.8  # of the pictures; the rest is the test split
EDGE_MARGIN = 12  # px; how near to the picture's edge a mark may be: its box may be cut there
MARK_DISTANCE = 46  # px between the centres of two marks: more than a cell's diagonal, so two never share a cell
LOOK_ALIKE = 1.0  # grey levels; two pictures whose 32x32 thumbnails differ by less, on average, look the same


# ---------------------------------------------------------------- drawing: the marks

# A shape is a signed distance: how many px a point (u, v) lies outside of it (inside: negative). u and v are px from the
# mark's centre, in the mark's own turned directions; one number each, or an array. np.minimum joins two shapes, np.maximum
# keeps what both have. Distances make sub-pixel drawing easy: 0.5 - distance, clipped to 0..1, is how much of a pixel is covered.
def ring(u, v):
    return np.abs(np.hypot(u, v) - 12.5) - 1.5


def bar(u, v):
    return np.maximum(np.abs(u) - 12.5, np.abs(v) - 1.5)


def disc(u, v):
    return np.hypot(u, v) - 12.5


def quarter(u, v):
    return np.maximum(disc(u, v), -np.minimum(u, v))


def square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) - 17


MARK_DICT = {
    "keyPoint_1": lambda u, v: np.minimum(ring(u, v), np.minimum(bar(u, v), bar(v, u))),
    "keyPoint_2": lambda u, v: np.minimum(ring(u, v), np.minimum(quarter(u, v), quarter(-u, -v))),
}
# What looks like a part of a mark and is none: only the whole shape tells, so the network cannot go by a corner of it.
DISTRACTOR_DICT = {
    "ring": ring,
    "screw": lambda u, v: np.minimum(ring(u, v), bar(u, v)),
    "cross": lambda u, v: np.minimum(bar(u, v), bar(v, u)),
    "disc": disc,
    "half": lambda u, v: np.minimum(ring(u, v), np.maximum(disc(u, v), u)),
    "quarter": lambda u, v: np.minimum(ring(u, v), quarter(u, v)),
}


def paint(picture_3d_array, x, y, angle, scale, shape, colour, opacity=1.0) -> None:
    """Paint a shape at the sub-pixel place (x, y), turned by `angle` (radians) and scaled, onto the picture itself."""
    reach = math.ceil(28 * scale)
    height, width = picture_3d_array.shape[:2]
    top, bottom = max(0, int(y) - reach), min(height, int(y) + reach)
    left, right = max(0, int(x) - reach), min(width, int(x) + reach)
    # Pixel (r, c) covers [c, c+1) x [r, r+1): its middle is at + 0.5. Forgetting this shifts all labels by half a pixel.
    dy = np.arange(top, bottom)[:, None] + 0.5 - y
    dx = np.arange(left, right)[None, :] + 0.5 - x
    u = (dx * math.cos(angle) + dy * math.sin(angle)) / scale
    v = (dy * math.cos(angle) - dx * math.sin(angle)) / scale
    coverage = np.clip(0.5 - shape(u, v) * scale, 0, 1)[:, :, None] * opacity
    patch = picture_3d_array[top:bottom, left:right]
    patch += coverage * (np.asarray(colour, np.float32) - patch)


# ---------------------------------------------------------------- drawing: the scene

def smooth_noise(rng, rows, columns):
    """Noise of mean 0 and spread about 1 that changes slowly: a few random numbers, scaled up."""
    coarse_2d_array = rng.normal(size=(rows, columns)).astype(np.float32)
    image = Image.fromarray(coarse_2d_array).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return np.asarray(image)  # [1920, 320]


def draw_scene(rng):
    """An amber panel with soft streaks, before it a dark rod and its holder.

    Returns float32 `[1920, 320, 3]` and the holder's box (left, top, right, bottom). The streaks
    are 16 px wide, five times as wide as a bar of a mark: none completes a mark.
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


def paint_mark(picture_3d_array, rng, x, y, shape) -> None:
    """Paint a mark: dark ink on bright ground, bright paint on dark, on a label on both."""
    angle, scale = rng.normal(0, math.radians(6)), rng.uniform(0.9, 1.1)
    top, left = max(0, int(y) - 16), max(0, int(x) - 16)
    ground = picture_3d_array[top:int(y) + 16, left:int(x) + 16].mean(axis=2)  # [32, 32]
    if np.ptp(ground) > 60 or rng.random() < 0.1:
        paper = np.array([205, 190, 160]) * rng.uniform(0.7, 1.1)
        paint(picture_3d_array, x, y, angle, scale, square, paper)
        ground = paper
    if ground.mean() > 85:
        ink = np.array([45, 30, 20]) * rng.uniform(0.4, 1.2)
    else:
        ink = np.array([215, 195, 150]) * rng.uniform(0.7, 1.1)
    paint(picture_3d_array, x, y, angle, scale, shape, ink, rng.uniform(0.75, 1))


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
    mark_count = rng.choice([0, 1, 2], p=[0.2, 0.5, 0.3])
    for name in rng.permutation(list(MARK_DICT))[:mark_count]:
        x, y = find_place(rng, holder_box, place_list)
        paint_mark(picture_3d_array, rng, x, y, MARK_DICT[name])
        half = BOX_SIDE / 2
        box = [x - half, y - half, x + half, y + half]
        keypoint_list.append({"class": str(name), "box": box})
    for name in rng.choice(list(DISTRACTOR_DICT), size=rng.poisson(5)):
        x, y = find_place(rng, holder_box, place_list)
        paint_mark(picture_3d_array, rng, x, y, DISTRACTOR_DICT[name])
    image = Image.fromarray(photograph(picture_3d_array, rng))
    with replacing(folder / f"{index:05d}.jpg") as temporary:
        image.save(temporary, "JPEG", quality=int(rng.integers(60, 96)))
    xml_path = folder / f"{index:05d}.xml"
    write_labelimg_xml(xml_path, f"{index:05d}.jpg", WIDTH, HEIGHT, keypoint_list)


def draw_pictures(folder: Path, count: int, seed: int) -> None:
    """Draw `count` pictures into `folder`, on all cores: processes, since drawing is Python code, and threads take turns at that."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if not (path.stem.isdigit() and len(path.stem) == 5) and not path.name.startswith("."):
            raise UserError(f"{path}: was not drawn by this script, and drawing might overwrite its neighbours; "
                            "choose another folder with --data")
    progress = Progress(count, "drawing")
    with ProcessPoolExecutor() as pool:
        jobs = pool.map(draw_picture, range(count), [seed] * count, [folder] * count, chunksize=8)
        for done, _ in enumerate(jobs, start=1):
            progress.show(done)
    for path in folder.glob("[0-9]" * 5 + ".*"):  # left over from an earlier, larger drawing
        if int(path.stem) >= count:
            path.unlink()


# ---------------------------------------------------------------- reading LabelImg's files

def read_labels(xml_path: Path, width: int, height: int) -> list[dict]:
    """Read one LabelImg XML file: a list of {"class": str, "box": [xmin, ymin, xmax, ymax]}, in px.

    `width`, `height`: the picture's true size, which the file must agree with. Raises UserError naming file and value.
    """
    raw = xml_path.read_bytes()
    if b"<!DOCTYPE" in raw.replace(b"\0", b""):  # entities in a DOCTYPE can unpack to gigabytes; LabelImg writes none
        raise UserError(f"{xml_path}: has a DOCTYPE, which LabelImg never writes; remove it")
    try:
        root = ElementTree.fromstring(raw)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"{xml_path}: not readable as XML ({error}); save it again in LabelImg") from None
    if root.tag != "annotation":
        raise UserError(f"{xml_path}: begins with <{root.tag[:40]}> and not with LabelImg's <annotation>; "
                        "save it as Pascal VOC in LabelImg")
    said_width, said_height = root.findtext("size/width", ""), root.findtext("size/height", "")
    if said_width and said_height and (said_width.strip(), said_height.strip()) != (str(width), str(height)):
        raise UserError(f"{xml_path}: says {said_width[:20]} x {said_height[:20]} px but the picture has {width} x {height}; "
                        "was it scaled after labelling? label it again")
    keypoint_list = []
    for number, node in enumerate(root.iter("object"), start=1):
        name = (node.findtext("name") or "").strip()
        if not name or name == "background":
            raise UserError(f"{xml_path}: object {number} has {'the reserved name background' if name else 'no name'}; name it")
        box = []
        for tag in ("xmin", "ymin", "xmax", "ymax"):
            text = (node.findtext(f"bndbox/{tag}") or "").strip()
            try:
                box.append(float(text))
            except ValueError:
                raise UserError(f"{xml_path}: {tag} of object {number} ({name}) is {text[:40]!r}, not a number; "
                                "draw the box again") from None
        xmin, ymin, xmax, ymax = box
        # One chained comparison finds NaN, infinity, swapped sides and empty boxes: each makes a comparison false.
        # One px beyond the edge is allowed: LabelImg may write that.
        if not (-1 <= xmin < xmax <= width + 1 and -1 <= ymin < ymax <= height + 1):
            raise UserError(f"{xml_path}: box {box} of object {number} ({name}) is empty, swapped or outside of the "
                            f"{width} x {height} picture; draw it again")
        keypoint_list.append({"class": name, "box": box})
    return keypoint_list


def read_folder(folder: Path) -> tuple[list[dict], list[str]]:
    """Read all pictures and labels of a folder. Returns what is good, and one sentence for each bad file.

    An example is {"path", "size": (width, height), "keypoints": list, "thumbnail": uint8 [32, 32]}.
    """
    file_list = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    image_list = [path for path in file_list if path.suffix.lower() in IMAGE_SUFFIXES]
    xml_dict = {path.stem: path for path in file_list if path.suffix.lower() == ".xml"}
    example_list, problem_list, seen_dict = [], [], {}
    progress = Progress(len(image_list), "reading")
    for number, path in enumerate(image_list, start=1):
        try:
            if not path.name.isprintable():
                raise UserError(f"{ascii(str(path))}: its name holds bytes that are no text; rename it")
            if path.stem in seen_dict:
                raise UserError(f"{path}: has the same name as {seen_dict[path.stem].name}, so one XML would label both; rename it")
            seen_dict[path.stem] = path
            if path.stem not in xml_dict:
                raise UserError(f"{path}: has no {path.stem}.xml beside it; if it holds no keypoint, save an empty label in LabelImg")
            image_3d_array = read_image(path)
            height, width = image_3d_array.shape[:2]
            example_list.append({
                "path": path, "size": (width, height), "keypoints": read_labels(xml_dict[path.stem], width, height),
                "thumbnail": np.asarray(Image.fromarray(image_3d_array).convert("L").resize((32, 32), Image.Resampling.BOX))})
        except (UserError, OSError) as error:
            problem_list.append(str(error))
        progress.show(number)
    problem_list += [f"{path}: there is no picture of this name; remove it or bring the picture back"
                     for stem, path in xml_dict.items() if stem not in seen_dict]
    return example_list, problem_list


def read_source(folder: Path, seed: int) -> tuple[dict[str, list[dict]], list[str]]:
    """Read a LabelImg folder into {"train": examples, "test": examples}; splits it 80/20 where it is not split already."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --source needs one with pictures and LabelImg's XML files")
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        (train_list, train_problems), (test_list, test_problems) = read_folder(folder / "train"), read_folder(folder / "test")
        return {"train": train_list, "test": test_list}, train_problems + test_problems
    example_list, problem_list = read_folder(folder)
    order = np.random.default_rng(seed).permutation(len(example_list))
    train_count = min(round(TRAIN_SHARE * len(order)), len(order) - 1)  # at least one is left to test with
    val_count = round(train_count / 10)
    split_dict = {"train": order[val_count:train_count], "val": order[:val_count], "test": order[max(train_count, 0):]}
    return {split: [example_list[i] for i in sorted(index)] for split, index in split_dict.items()}, problem_list


# ---------------------------------------------------------------- from boxes to points, and what to know about them

def is_cut(box, width: int, height: int) -> tuple[bool, bool, bool, bool]:
    """Which sides of a box the picture's edge has cut: left, top, right, bottom. LabelImg writes 1, not 0, at left and top."""
    xmin, ymin, xmax, ymax = box
    return xmin <= 1, ymin <= 1, xmax >= width, ymax >= height


def box_centre(box, cut, box_size) -> tuple[float, float]:
    """The point that a box was drawn round. `box_size`: (width, height) of every uncut box, or None where they differ.

    A box cut by the edge is no longer centred on its point: the side that is whole tells where the point is.

    >>> box_centre([0, 50, 18, 80], (True, False, False, False), (30, 30))
    (3.0, 65.0)
    """
    xmin, ymin, xmax, ymax = box
    x, y = (xmin + xmax) / 2, (ymin + ymax) / 2
    if box_size:
        left, top, right, bottom = cut
        if left != right:
            x = xmax - box_size[0] / 2 if left else xmin + box_size[0] / 2
        if top != bottom:
            y = ymax - box_size[1] / 2 if top else ymin + box_size[1] / 2
    return x, y


def to_label_array(example_list, category_list, one_size) -> np.ndarray:
    """Float32 `[M, 4]`, a row a keypoint: picture index, class id, centre x, centre y."""
    row_list = []
    for index, example in enumerate(example_list):
        for keypoint in example["keypoints"]:
            x, y = box_centre(keypoint["box"], is_cut(keypoint["box"], *example["size"]), one_size)
            width, height = example["size"]
            # A label may end on the picture's last edge; its cell must still exist.
            x, y = np.clip((x, y), 0, (width - 0.01, height - 0.01))
            row_list.append((index, category_list.index(keypoint["class"]), x, y))
    return np.array(row_list, np.float32).reshape(-1, 4)


def count_collisions(label_2d_array, max_per_class: int) -> int:
    """Keypoints that cannot be found since a cell answers once, or, where a class may occur several times, since of one
    class only the best of neighbouring cells answers.

    >>> count_collisions(np.array([[0, 1, 40, 40], [0, 2, 60, 60], [0, 2, 70, 60]]), max_per_class=1)
    1
    """
    taken_dict, lost = {}, 0
    for index, class_id, x, y in label_2d_array:
        column, row = int(x // CELL), int(y // CELL)
        near = [taken_dict.get((index, row + i, column + j)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        if near[4] is not None or (max_per_class > 1 and class_id in near):
            lost += 1
        else:
            taken_dict[index, row, column] = class_id
    return lost


def find_look_alikes(train_list, test_list) -> list[tuple[str, str]]:
    """Pairs of a train and a test picture that look the same: what was learned by heart would be counted as skill."""
    # Pictures that differ by less than a level have means that do, too: sorted by mean, few are left to compare.
    train_list = sorted(train_list, key=lambda example: example["thumbnail"].mean())
    train_3d_array = np.array([example["thumbnail"] for example in train_list], np.float32)  # [train, 32, 32]
    mean_1d_array = train_3d_array.mean(axis=(1, 2))
    pair_list = []
    for example in test_list:
        thumbnail_2d_array = example["thumbnail"].astype(np.float32)
        first, last = np.searchsorted(mean_1d_array, thumbnail_2d_array.mean() + np.array([-LOOK_ALIKE, LOOK_ALIKE]))
        difference = np.abs(train_3d_array[first:last] - thumbnail_2d_array).mean(axis=(1, 2))
        if len(difference) and difference.min() < LOOK_ALIKE:
            pair_list.append((train_list[first + difference.argmin()]["path"].name, example["path"].name))
    return pair_list


# ---------------------------------------------------------------- packing

def check_room(data_folder: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for: arrays of so many bytes."""
    data_folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(data_folder).free
    if needed > free:
        raise UserError(f"{data_folder}: the arrays need {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left; "
                        "choose another place with --data")


def pack_images(path: Path, example_list, height: int, width: int) -> None:
    """Write uint8 `[N, height, width, 3]` picture after picture: memory stays flat however many there are."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(example_list), height, width, 3)}
    progress = Progress(len(example_list), f"packing {path.name}")
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for number, example in enumerate(example_list, start=1):
            file.write(pad_image(read_image(example["path"]), height, width).tobytes())
            progress.show(number)


def contact_sheet(example_list, category_list, seed: int) -> Image.Image:
    """A row of whole pictures with their labels, and thirty keypoints close up, three times as large."""
    rng = np.random.default_rng(seed)
    sheet = Image.new("RGB", (1970, 1010), "white")

    def to_keypoint(keypoint, left=0, top=0, zoom=1.0):
        xmin, ymin, xmax, ymax = ((v - offset) * zoom for v, offset in zip(keypoint["box"], (left, top, left, top)))
        return {"class": keypoint["class"], "x": (xmin + xmax) / 2, "y": (ymin + ymax) / 2, "box": [xmin, ymin, xmax, ymax],
                "colour": COLOUR_LIST[(category_list.index(keypoint["class"]) - 1) % len(COLOUR_LIST)]}

    left = 10
    for index in rng.permutation(len(example_list)):
        example = example_list[index]
        image = Image.fromarray(read_image(example["path"]))
        image = draw_keypoints(image, [to_keypoint(keypoint) for keypoint in example["keypoints"]])
        image.thumbnail((380, 380))
        if left + image.width > sheet.width - 10:
            break
        sheet.paste(image, (left, 10))
        left += image.width + 10
    by_class = {name: [] for name in category_list[1:]}
    for index in rng.permutation(len(example_list)):
        for keypoint in example_list[index]["keypoints"]:
            by_class[keypoint["class"]].append((index, keypoint))
    # One of each class in turn, so that a rare class is seen too.
    in_turn = [pairs[turn] for turn in range(30) for pairs in by_class.values() if turn < len(pairs)][:30]
    for place, (index, keypoint) in enumerate(in_turn):
        middle = to_keypoint(keypoint)
        left, top = round(middle["x"]) - 31, round(middle["y"]) - 31
        image = Image.fromarray(read_image(example_list[index]["path"]))
        crop = image.crop((left, top, left + 62, top + 62)).resize((186, 186), Image.Resampling.NEAREST)
        crop = draw_keypoints(crop, [to_keypoint(keypoint, left, top, zoom=3)])
        sheet.paste(crop, (10 + 196 * (place % 10), 410 + 196 * (place // 10)))
    return sheet


def prepare(split_dict: dict[str, list[dict]], data_folder: Path, source: str, seed: int) -> None:
    """Report what was found and write the arrays, dataset.json and the contact sheet."""
    train_list, test_list = split_dict["train"], split_dict["test"]
    both_list = train_list + split_dict["val"] + test_list
    if not train_list or not test_list:
        raise UserError(f"{source}: {len(train_list)} good pictures to train with and {len(test_list)} to test with; "
                        "at least one of each is needed")
    box_list = [k["box"] + list(e["size"]) for e in both_list for k in e["keypoints"]]
    if not box_list:
        raise UserError(f"{source}: no label holds a keypoint, so there is nothing to learn; draw some boxes in LabelImg")
    if not any(e["keypoints"] for e in train_list):
        raise UserError(f"{source}: none of the {len(train_list)} train pictures holds a keypoint, so there is nothing to learn; "
                        "label some")
    cut_list = [any(is_cut(box[:4], *box[4:])) for box in box_list]
    side_list = [(box[2] - box[0], box[3] - box[1]) for box, cut in zip(box_list, cut_list) if not cut]
    side_list = side_list or [(box[2] - box[0], box[3] - box[1]) for box in box_list]
    box_size = [round(float(side), 2) for side in np.median(side_list, axis=0)]
    one_size = box_size if np.ptp(side_list, axis=0).max() <= 1 else None  # 1 px: what truncating to whole pixels changes

    category_list = ["background"] + sorted({k["class"] for e in both_list for k in e["keypoints"]})
    label_dict = {split: to_label_array(example_list, category_list, one_size) for split, example_list in split_dict.items()}
    # The most keypoints of one class in a picture: where it is 1, decode (02_model.py) takes the best cell only.
    max_per_class = max(int(np.unique(label[:, :2], axis=0, return_counts=True)[1].max())
                        for label in label_dict.values() if len(label))
    height = round_up_to_cell(max(e["size"][1] for e in both_list))
    width = round_up_to_cell(max(e["size"][0] for e in both_list))

    print(f"\n{'':24}{'train':>8}{'test':>8}")
    print(f"{'pictures':24}{len(train_list):8}{len(test_list):8}")
    print(f"{'  without a keypoint':24}" + "".join(f"{sum(not e['keypoints'] for e in s):8}" for s in (train_list, test_list)))
    for class_id, name in enumerate(category_list[1:], start=1):
        count_list = [int((label_dict[split][:, 1] == class_id).sum()) for split in ("train", "test")]
        print(f"{name[:23]:24}{count_list[0]:8}{count_list[1]:8}" + ("" if count_list[0] else "   none to learn from"))
    lost_list = [count_collisions(label_dict[split], max_per_class) for split in ("train", "test")]
    print(f"{'lost by collision':24}{lost_list[0]:8}{lost_list[1]:8}   two in one cell, or of one class in neighbour cells")
    keypoint_count = len(label_dict["train"]) + len(label_dict["test"])
    if sum(lost_list):
        print(f"  a cell answers once: recall cannot exceed {1 - sum(lost_list) / keypoint_count:.3f}")
    print(f"arrays are {height} x {width} px; boxes {box_size[0]:g} x {box_size[1]:g} px; at most {max_per_class} of a class in a picture")
    print(f"boxes cut by the picture's edge: {sum(cut_list)}; their points were taken "
          + ("from the sides that are whole" if one_size else "as the middle of what is left, since box sizes differ"))
    pair_list = find_look_alikes(train_list, test_list)
    if pair_list:
        print(f"warning: {len(pair_list)} test pictures look the same as a train picture, "
              f"for example {pair_list[0][1]} and {pair_list[0][0]}: test results will flatter")

    check_room(data_folder, len(both_list) * height * width * 3)
    # dataset.json is removed first and written last: where it stands, the arrays beside it are whole and belong to it.
    (data_folder / "dataset.json").unlink(missing_ok=True)
    for split, example_list in split_dict.items():
        pack_images(data_folder / f"{split}_images.npy", example_list, height, width)
        with replacing(data_folder / f"{split}_labels.npy") as temporary:
            np.save(temporary, label_dict[split])
    with replacing(data_folder / "results" / "contact_sheet.png") as temporary:
        contact_sheet(train_list, category_list, seed).save(temporary)
    dataset_dict = {"source": source, "category_list": category_list, "height": height, "width": width, "box_size": box_size,
                    "max_per_class": max_per_class}
    dataset_dict["drawn"] = True
    for split, example_list in split_dict.items():
        dataset_dict[split] = {"file_list": [e["path"].name for e in example_list], "size_list": [e["size"] for e in example_list]}
    with replacing(data_folder / "dataset.json") as temporary:
        temporary.write_text(json.dumps(dataset_dict, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"wrote {data_folder / 'dataset.json'} and the arrays; look at {data_folder / 'results' / 'contact_sheet.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a data set or read a LabelImg folder, check it, pack it into arrays.")
    parser.add_argument("--source", type=Path, help="folder with pictures and LabelImg XML (default: draw a data set)")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER, help="folder to write to (default: data)")
    parser.add_argument("--pictures", type=int, default=PICTURE_COUNT, help="number of pictures to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing and of the 80/20 split (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="go on without files that are bad (default: stop and list them)")
    options = parser.parse_args()
    if not 2 <= options.pictures <= MOST_PICTURES or options.seed < 0:
        parser.error(f"--pictures must lie between 2 and {MOST_PICTURES:,}, and --seed be at least 0")

    source = options.source
    if source is None:
        source = options.data / "images"
        print(f"drawing {options.pictures} pictures into {source}; for your own use --source FOLDER")
        check_room(options.data, options.pictures * HEIGHT * WIDTH * 3)  # rather now than after an hour of drawing
        draw_pictures(source, options.pictures, options.seed)
    split_dict, problem_list = read_source(source, options.seed)
    for problem in problem_list:
        print(f"bad: {problem}")
    if problem_list and not options.skip_bad:
        raise UserError(f"{len(problem_list)} bad files, listed above; mend them, or leave them out with --skip-bad")
    if problem_list:
        print(f"left out {len(problem_list)} bad files")
    name = f"drawn, {options.pictures} pictures, seed {options.seed}" if options.source is None else source.name
    prepare(split_dict, options.data, name, options.seed)
    print("next: python 03_train.py" + ("" if options.data == DATA_FOLDER else f" --data {options.data}"))


if __name__ == "__main__":
    run_main(main)
