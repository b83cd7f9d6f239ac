"""Lesson 1: data. LabelImg's XML becomes points; pictures and points become arrays.

    python 01_prepare_data.py                                    # draws 1,465 pictures first
    python 01_prepare_data.py --source my_folder --data my_data  # reads your own pictures

Reads   pictures and LabelImg's XML files, side by side in the folder of --source.
Writes  data/{train,val,test}_{images,labels}.npy, data/dataset.json, data/results/contact_sheet.png
        and, where it draws, data/images/.
Time    about a minute on two cores; 2.7 GB of disk.
See     what each split holds; and contact_sheet.png, where wrong labels show first.
Next    python 02_model.py shows the network; python 03_train.py trains it.

The drawing stands last. It makes an example whose labels are right, and can be skipped.
"""

import functools
import json
import math
import multiprocessing
import os
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from common import (CELL, REACH, UserError, colour_of, command, files_in, make_parser,
                    names_to_draw, pad_image, print_table, read_image, replacing, round_up_to_cell,
                    run_main, save_close_ups, track, write_json, write_labelimg_xml)

SPLIT_LIST = ["train", "val", "test"]  # to learn from, to choose settings on, for the final score
TRAIN_SHARE = 0.8  # of a folder without splits; a tenth of these become val

PICTURE_COUNT = 1465  # to draw
HEIGHT, WIDTH = 1920, 320  # px, of a drawn picture
BOX_SIDE = 30  # px; the label's box round a drawn mark, which is about 28 px across
EDGE_MARGIN = 12  # px; how near to the edge a mark may be: its box may be cut there
MARK_DISTANCE = 46  # px between two marks: more than a cell's diagonal, so none share a cell


# ---------------------------------------------------------------- LabelImg's XML into points

def read_labels(xml_path: Path, width: int, height: int) -> list[dict]:
    """Read one file: a list of {"class": name, "box": [xmin, ymin, xmax, ymax]}, in px.

    `width`, `height`: the picture's own size. Raises UserError for what cannot be right.
    """
    keypoint_list = []
    try:  # each ValueError gets the file's name and the fix at the end
        root = ElementTree.fromstring(xml_path.read_bytes())
        if root.tag != "annotation":
            raise ValueError(f"begins with <{root.tag[:40]}>, not with <annotation> of Pascal VOC")
        size_list = [root.findtext(f"size/{tag}", "").strip()[:20] for tag in ("width", "height")]
        if size_list not in ([str(width), str(height)], ["", ""]):
            raise ValueError(f"says {' x '.join(size_list)} px, but the picture has {width} x "
                             f"{height}: was it scaled after labelling?")
        for node in root.iter("object"):
            name = node.findtext("name", "").strip()
            box = [float(node.findtext(f"bndbox/{side}", "no number"))
                   for side in ("xmin", "ymin", "xmax", "ymax")]
            xmin, ymin, xmax, ymax = box
            # LabelImg may go a pixel beyond the edge. NaN makes every comparison false.
            is_inside = -1 <= xmin < xmax <= width + 1 and -1 <= ymin < ymax <= height + 1
            if name in ("", "background") or not is_inside:
                raise ValueError(f"{name[:20]!r} at {box} needs a name other than background, and "
                                 f"a box inside of {width} x {height} px")
            keypoint_list.append({"class": name, "box": box})
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        reason = str(error)[:200]
        raise UserError(f"{xml_path}: bad label ({reason}); mend it in LabelImg") from None
    return keypoint_list


def find_centre(low: float, high: float, length: int, side: float | None) -> float:
    """Where the point lies, in x or in y, that a box from `low` to `high` was drawn round.

    In its middle, unless the edge of the picture (`length` px) has cut the box. Then the side that
    is whole tells, where all whole boxes are `side` px long.

    >>> find_centre(0, 18, length=320, side=30), find_centre(0, 18, length=320, side=None)
    (3.0, 9.0)
    """
    is_low_cut, is_high_cut = low <= 1, high >= length  # LabelImg writes 1 for 0
    if side is None or is_low_cut == is_high_cut:
        return (low + high) / 2
    return high - side / 2 if is_low_cut else low + side / 2


def to_label_array(example_list: list[dict], category_list: list[str], one_size) -> np.ndarray:
    """Float32 `[M, 4]`, a row per keypoint: picture index, class id, x, y in px.

    `one_size`: width and height of all whole boxes, (None, None) where they differ.
    """
    row_list = []
    for index, example in enumerate(example_list):
        width, height = example["size"]
        for keypoint in example["keypoints"]:
            xmin, ymin, xmax, ymax = keypoint["box"]
            x = find_centre(xmin, xmax, width, one_size[0])
            y = find_centre(ymin, ymax, height, one_size[1])
            # Of a cut box, the point may lie outside: up to REACH it is kept.
            if max(-x, -y, x - width, y - height) < REACH:
                row_list.append((index, category_list.index(keypoint["class"]), x, y))
    return np.array(row_list, np.float32).reshape(-1, 4)


# ---------------------------------------------------------------- folders into splits

def read_source(folder: Path, seed: int) -> tuple[dict, list[str]]:
    """Read a LabelImg folder: {"train": examples, "val": ..., "test": ...}, and what is bad.

    train/, test/ and val/ inside are the splits; without val/, a tenth of train/ is. A folder
    without them is split at random, the same for the same seed: 72 % to 8 % to 20 %.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --source needs pictures and LabelImg's XML")
    inside_list = [split for split in SPLIT_LIST if (folder / split).is_dir()]
    if inside_list and not {"train", "test"} <= set(inside_list):
        raise UserError(f"{folder}: holds {inside_list[0]}/, so it needs both train/ and test/; "
                        "add what lacks, or put all pictures into one folder")
    if inside_list and (loose_list := files_in(folder)):
        print(f"not used: {len(loose_list)} pictures of {folder} that lie beside train/ and test/")
    split_dict, problem_list = {}, []
    for name in inside_list or [""]:  # folder / "" is the folder itself
        example_list, bad_list = read_folder(folder / name)
        # Shuffled, to pick val and test from; sorted again at the end, to be read quickly.
        order_1d_array = np.random.default_rng(seed).permutation(len(example_list))
        split_dict[name] = [example_list[index] for index in order_1d_array]
        problem_list += bad_list
    if not inside_list:
        all_list = split_dict.pop("")
        count = min(round(TRAIN_SHARE * len(all_list)), len(all_list) - 1)
        split_dict["train"], split_dict["test"] = all_list[:count], all_list[count:]
    if "val" not in split_dict:
        train_list = split_dict["train"]
        count = max(1, round(len(train_list) / 10))
        split_dict["val"], split_dict["train"] = train_list[:count], train_list[count:]
    return {split: sorted(split_dict[split], key=lambda example: example["path"])
            for split in SPLIT_LIST}, problem_list


def read_folder(folder: Path) -> tuple[list[dict], list[str]]:
    """Read a folder: what is good, and a sentence for each bad file.

    An example is {"path", "size": (width, height), "keypoints"}; all pictures together may be
    larger than the memory.
    """
    image_list = files_in(folder)
    xml_dict = {path.stem: path for path in files_in(folder, {".xml"})}
    example_list, problem_list = [], []
    for path in track(image_list, "reading"):
        try:
            example_list.append(read_example(path, xml_dict.pop(path.stem, None)))
        except (UserError, OSError) as error:
            problem_list.append(str(error))
    problem_list += [f"{path}: has no picture beside it; bring the picture back or remove this"
                     for path in xml_dict.values()]
    return example_list, problem_list


def read_example(path: Path, xml_path: Path | None) -> dict:
    if not path.name.isprintable():
        raise UserError(f"{ascii(str(path))}: its name holds bytes that are no text; rename it")
    if not xml_path:
        raise UserError(f"{path}: has no {path.stem}.xml of its own; if it shows no keypoint, "
                        "save an empty label in LabelImg")
    height, width = read_image(path).shape[:2]
    keypoint_list = read_labels(xml_path, width, height)
    return {"path": path, "size": (width, height), "keypoints": keypoint_list}


def check(split_dict: dict, problem_list: list[str], source: Path, skip_bad: bool) -> None:
    for problem in problem_list:
        print(f"bad{', left out' if skip_bad else ''}: {problem}")
    if problem_list and not skip_bad:
        raise UserError(f"{source}: {len(problem_list)} bad files, listed above; mend them, or "
                        "leave them out with --skip-bad")
    for split, example_list in split_dict.items():
        if not example_list:
            raise UserError(f"{source}: no good picture is left for {split}; 3 are the least")
    if not any(example["keypoints"] for example in split_dict["train"]):
        raise UserError(f"{source}: no train picture holds a keypoint; label some in LabelImg")


# ---------------------------------------------------------------- describe and report

def describe(split_dict: dict) -> dict:
    """What dataset.json says of names, sizes and boxes."""
    all_list = sum(split_dict.values(), [])
    # The class names of each picture.
    names_list = [[keypoint["class"] for keypoint in example["keypoints"]] for example in all_list]
    return {
        "category_list": ["background", *sorted({name for names in names_list for name in names})],
        "max_per_class": max(names.count(name) for names in names_list for name in names),
        "height": round_up_to_cell(max(example["size"][1] for example in all_list)),
        "width": round_up_to_cell(max(example["size"][0] for example in all_list)),
        **measure_boxes(all_list),
        **{split: {"file_list": [example["path"].name for example in example_list],
                   "size_list": [example["size"] for example in example_list]}
           for split, example_list in split_dict.items()}}


def measure_boxes(example_list: list[dict]) -> dict:
    """Median size of the whole boxes; whether they all have it (one_size); how many are cut."""
    box_2d_array = np.array([[*keypoint["box"], *example["size"]]
                             for example in example_list for keypoint in example["keypoints"]])
    low_2d_array, high_2d_array, size_2d_array = np.split(box_2d_array, 3, axis=1)  # x, y each
    is_cut_1d_array = ((low_2d_array <= 1) | (high_2d_array >= size_2d_array)).any(axis=1)
    side_2d_array = high_2d_array - low_2d_array
    if not is_cut_1d_array.all():
        side_2d_array = side_2d_array[~is_cut_1d_array]
    box_size = np.median(side_2d_array, axis=0).round(2).tolist()
    is_one_size = np.ptp(side_2d_array, axis=0).max() <= 1  # px; LabelImg's truncating changes one
    return {"box_size": box_size, "one_size": box_size if is_one_size else [None, None],
            "cut_boxes": int(is_cut_1d_array.sum())}


def report(split_dict: dict, label_dict: dict, dataset_dict: dict) -> None:
    most, name_list = dataset_dict["max_per_class"], dataset_dict["category_list"][1:]
    column_list = []
    for example_list, label_2d_array in zip(split_dict.values(), label_dict.values()):
        count_list = [int((label_2d_array[:, 1] == class_id).sum())
                      for class_id in range(1, 1 + len(name_list))]
        empty = sum(not example["keypoints"] for example in example_list)
        column_list.append([len(example_list), empty, *count_list,
                            count_collisions(label_2d_array, most)])
    row_name_list = ["pictures", "without a keypoint", *(name[:25] for name in name_list),
                     "may be lost by collision"]
    print_table(("", *split_dict), list(zip(row_name_list, *column_list)))
    for name, count in zip(name_list, column_list[0][2:]):
        if not count:
            print(f"none in train: {name}")
    width, height = dataset_dict["box_size"]
    print(f"boxes are {width:g} x {height:g} px; a picture holds at most {most} of a class")
    how = "what is left" if None in dataset_dict["one_size"] else "the sides that are whole"
    print(f"boxes cut by the picture's edge: {dataset_dict['cut_boxes']}; points taken from {how}")
    box_count = sum(len(example["keypoints"]) for example in sum(split_dict.values(), []))
    if far := box_count - sum(map(len, label_dict.values())):
        print(f"left out: {far} points that lie {REACH:g} px or more outside of the picture")


def count_collisions(label_2d_array: np.ndarray, max_per_class: int) -> int:
    """Keypoints that may be lost, since a cell answers once and another keypoint lies there.

    With several of a class in a picture, the best of nine cells answers.

    >>> count_collisions(np.array([[0, 1, 40, 40], [0, 2, 60, 60], [1, 2, 40, 40]]), 1)
    1
    """
    taken_dict, lost = {}, 0
    for index, class_id, x, y in label_2d_array:
        column, row = x // CELL, y // CELL
        nine_list = [taken_dict.get((index, row + down, column + right))
                     for down in (-1, 0, 1) for right in (-1, 0, 1)]
        own = nine_list[4]
        if own or (max_per_class > 1 and class_id in nine_list):
            lost += 1
        else:
            taken_dict[index, row, column] = class_id
    return lost


# ---------------------------------------------------------------- arrays onto the disk

def pack(data_folder: Path, split_dict: dict, label_dict: dict, dataset_dict: dict) -> None:
    """Write the arrays, then dataset.json: where it is whole, the arrays beside it belong to it."""
    write_json(data_folder / "dataset.json", {"drawn": dataset_dict["drawn"]})
    for split, example_list in split_dict.items():
        pack_images(data_folder / f"{split}_images.npy", example_list,
                    dataset_dict["height"], dataset_dict["width"])
        with replacing(data_folder / f"{split}_labels.npy") as temporary:
            np.save(temporary, label_dict[split])
    draw_contact_sheet(data_folder, dataset_dict)
    write_json(data_folder / "dataset.json", dataset_dict)


def pack_images(path: Path, example_list: list[dict], height: int, width: int) -> None:
    """Write uint8 `[N, height, width, 3]` picture after picture: memory stays flat."""
    shape = (len(example_list), height, width, 3)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        header_dict = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header_dict)
        for example in track(example_list, f"packing {path.name}"):
            file.write(pad_image(read_image(example["path"]), height, width).tobytes())


def check_place(data_folder: Path, picture_count: int) -> None:
    """Overwrite nothing of the user's: dataset.json, written first, tells what this script made.

    picture_count: how many will be drawn, 0 where they are read.
    """
    path = data_folder / "dataset.json"
    try:
        was_drawn = json.loads(path.read_text(encoding="utf-8"))["drawn"]
    except (OSError, ValueError, TypeError, KeyError):
        was_drawn = None
    # A drawing may replace a drawing, a reading all that this script made.
    is_ours = was_drawn is True or (was_drawn is False and not picture_count)
    other_list = [] if is_ours else [path, *data_folder.glob("*_images.npy"),
                                     *data_folder.glob("*_labels.npy")]
    if picture_count:
        own_set = {f"{index:05d}" for index in range(picture_count)} if was_drawn else set()
        other_list += [path for path in sorted(data_folder.glob("images/[!.]*"))
                       if path.stem not in own_set or path.suffix not in (".jpg", ".xml")]
    for path in filter(Path.exists, other_list):
        raise UserError(f"{path}: is nothing that this run would write, so it is left alone; move "
                        "it away, or choose another folder with --data (--source reads your own "
                        "pictures)")


def draw_contact_sheet(data_folder: Path, dataset_dict: dict) -> None:
    """Up to fifty keypoints of the training arrays close up, equally many of each class."""
    images_4d_array = np.load(data_folder / "train_images.npy", mmap_mode="r")
    label_2d_array = np.random.default_rng(0).permutation(np.load(data_folder / "train_labels.npy"))
    name_list = names_to_draw(dataset_dict["category_list"])
    chosen_list = []
    for class_id in range(1, len(name_list)):
        of_class_2d_array = label_2d_array[label_2d_array[:, 1] == class_id]
        chosen_list += list(of_class_2d_array[:max(1, 50 // (len(name_list) - 1))])
    reach = 1.5 * max(dataset_dict["box_size"])  # px
    tile_list = [(name_list[int(class_id)][:25], images_4d_array[int(picture)], x, y, reach,
                  [(x, y, colour_of(class_id))]) for picture, class_id, x, y in chosen_list[:50]]
    save_close_ups(data_folder / "results" / "contact_sheet.png", tile_list, columns=10)


# ---------------------------------------------------------------- the drawing

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


def draw_pictures(data_folder: Path, count: int, seed: int) -> None:
    """Draw into images/ on all cores: processes, since threads take turns at Python code."""
    folder = data_folder / "images"
    if not (data_folder / "dataset.json").exists():
        write_json(data_folder / "dataset.json", {"drawn": True})
    folder.mkdir(exist_ok=True)
    print(f"drawing {count} pictures into {folder}; your own pictures: --source FOLDER")
    draw = functools.partial(draw_picture, seed=seed, folder=folder)
    # Leaving the `with` ends the processes. Ctrl-C reaches all of a terminal: each of them begins
    # with signal.signal(...), and leaves it to this one. Windows waits for 63 at most.
    with multiprocessing.Pool(min(os.cpu_count() or 1, 60), initializer=signal.signal,
                              initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        drawn = pool.imap_unordered(draw, range(count), chunksize=8)
        for _ in track(range(count), "drawing"):
            next(drawn)


def main() -> None:
    parser = make_parser("Draw or read labelled pictures, and pack them.", "folder to write to")
    parser.add_argument("--source", type=Path, help="folder with pictures and LabelImg's XML; "
                        "without it pictures are drawn")
    parser.add_argument("--pictures", type=int, default=PICTURE_COUNT, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0, help="of drawing and random split")
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad files")
    options = parser.parse_args()
    if not 3 <= options.pictures <= 100_000 or options.seed < 0:  # names have five digits
        parser.error("--pictures must lie between 3 and 100,000, and --seed be at least 0")

    is_drawn = options.source is None
    source = options.data / "images" if is_drawn else options.source
    name = f"drawn, {options.pictures} pictures, seed {options.seed}" if is_drawn else source.name
    check_place(options.data, options.pictures if is_drawn else 0)
    if is_drawn:
        draw_pictures(options.data, options.pictures, options.seed)
    split_dict, problem_list = read_source(source, options.seed)
    check(split_dict, problem_list, source, options.skip_bad)
    dataset_dict = {"source": name, "drawn": is_drawn, **describe(split_dict)}
    label_dict = {split: to_label_array(example_list, dataset_dict["category_list"],
                                        dataset_dict["one_size"])
                  for split, example_list in split_dict.items()}
    report(split_dict, label_dict, dataset_dict)
    pack(options.data, split_dict, label_dict, dataset_dict)
    print(f"look at {options.data / 'results' / 'contact_sheet.png'}")
    print(f"next: {command('03_train.py', options.data)}")


if __name__ == "__main__":
    run_main(main)
