"""Lesson 1: data. LabelImg's XML becomes points; images and points become arrays.

    python 01_prepare_data.py                                    # draws 1,465 images first
    python 01_prepare_data.py --source my_folder --data my_data  # reads your own images

Reads   images and their XML files (Pascal VOC), side by side in the folder of --source.
Writes  data/{train,val,test}_{images,labels}.npy, data/dataset.json, data/results/contact_sheet.png
        and, where it draws, data/images/.
Time    half a minute on two cores; 2.7 GB of disk.
See     what each split holds; and contact_sheet.png, where wrong labels show first.
Next    python 02_model.py shows the network; python 03_train.py trains it.
"""

import random
import shutil
import textwrap
import unicodedata
import xml.etree.ElementTree as ElementTree
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from common import (CELL, COLOUR_LIST, IMAGE_SUFFIXES, REACH, UserError, command, make_parser,
                    names_to_draw, pad_image, print_table, read_image, replacing, resize_image,
                    run_main, run_script, write_json)

SPLIT_LIST = ["train", "val", "test"]  # to learn from, to choose settings on, for the final score
FOLDER_DICT = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TEST_SHARE, VAL_SHARE = 0.2, 0.08  # of a folder without train/ and test/
VAL_OF_TRAIN = 0.1  # where there are train/ and test/, but no val/
BOX_SIDE = 30  # px; taken where the labels are points without a box
SIDE_LIST = ["xmin", "ymin", "xmax", "ymax"]


# ---------------------------------------------------------------- XML into points

def read_labels(xml_path: Path, width: int, height: int) -> list[dict]:
    """One file as a list of {"class": name, "box": [xmin, ymin, xmax, ymax]}, in px.

    `width`, `height`: the image's own. A file is understood in full, or refused with UserError.
    """
    try:  # each ValueError gets the file's name and the fix at the end
        root = ElementTree.fromstring(xml_path.read_bytes())
        check_frame(root, width, height)
        return [read_object(node, number, width, height)
                for number, node in enumerate(root.findall("object"), start=1)]
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"{xml_path}: {str(error)[:250]}; fix it in your label tool") from None


def read_object(node, number: int, width: int, height: int) -> dict:
    """One <object> of the XML as {"class", "box"}. Raises ValueError."""
    # One form of Unicode, and blanks and line breaks made one: else one class becomes two.
    name = " ".join(unicodedata.normalize("NFC", node.findtext("name") or "").split())
    what = f"object {number} ({ascii(name)})"
    if name in ("", "background") or not name.isprintable() or len(node.findall("name")) != 1:
        raise ValueError(f"{what} needs one name, of letters that can be seen, not background")
    box_list = list(node.iter("bndbox"))  # also those of an <object>'s parts
    if len(box_list) != 1 or box_list[0] not in list(node):
        found = ", ".join(f"<{child.tag}>" for child in node if len(child)) or "a name alone"
        raise ValueError(f"{what} holds {len(box_list)} <bndbox> in place of one (found: {found})")
    text_list = [[child.text for child in box_list[0].findall(side)] for side in SIDE_LIST]
    try:
        box = [float(text) for text, in text_list]  # the comma: exactly one text for each side
    except (TypeError, ValueError):
        raise ValueError(f"the box of {what} needs xmin, ymin, xmax, ymax, each once and a number "
                         f"(found: {text_list})") from None
    check_box(box, what, width, height)
    return {"class": name, "box": box}


def find_centre(low: float, high: float, length: int, side: float) -> float:
    """Where the point lies, in x or in y, that a box from `low` to `high` was drawn round.

    In its middle, unless the edge of the image (`length` px) has cut the box: a box that touches
    the edge and is smaller than the usual `side` has its point half a side from its uncut edge.

    >>> find_centre(0, 18, length=320, side=30), find_centre(100, 118, length=320, side=30)
    (3.0, 109.0)
    """
    is_low_cut, is_high_cut = low <= 1, high >= length - 1  # tools write 0 or 1, 319 or 320
    if is_low_cut == is_high_cut or not 0 < high - low < side:
        return (low + high) / 2
    return high - side / 2 if is_low_cut else low + side / 2


def place_points(example_list: list[dict]) -> np.ndarray:
    """Give every keypoint its "x" and "y", in px of the arrays. Returns the usual box's size.

    An example is one image: {"path", "size", "scaled_size", "keypoints", "notes" for the user}.
    The usual box, `[2]`, is the median of those that no edge has cut.
    """
    side_list = []
    for example in example_list:
        width, height = example["size"]
        for xmin, ymin, xmax, ymax in (point["box"] for point in example["keypoints"]):
            if xmin < xmax and min(xmin, ymin) > 1 and xmax < width - 1 and ymax < height - 1:
                side_list.append((xmax - xmin, ymax - ymin))
    usual_1d_array = np.median(side_list or [(BOX_SIDE, BOX_SIDE)], axis=0)
    for example in example_list:
        (width, height), (new_width, new_height) = example["size"], example["scaled_size"]
        for point in example["keypoints"]:
            xmin, ymin, xmax, ymax = point["box"]
            x = find_centre(xmin, xmax, width, usual_1d_array[0])
            y = find_centre(ymin, ymax, height, usual_1d_array[1])
            if xmin == xmax:
                example["notes"].append("labels without a size, taken as points")
            elif (x, y) != ((xmin + xmax) / 2, (ymin + ymax) / 2):
                example["notes"].append("boxes cut by the edge, completed from their whole sides")
            point["x"], point["y"] = x * new_width / width, y * new_height / height
    return usual_1d_array


def to_label_array(example_list: list[dict], category_list: list[str]) -> np.ndarray:
    """Float32 `[M, 4]`, a row per keypoint: image index, class id, x, y in px of the arrays."""
    row_list = []
    for index, example in enumerate(example_list):
        cell_set, (width, height) = set(), example["scaled_size"]
        for point in example["keypoints"]:
            x, y = point["x"], point["y"]
            # Of a cut box, the point may lie outside: up to REACH it is kept.
            if max(-x, -y, x - width, y - height) >= REACH:
                example["notes"].append(f"left out: points {REACH} px or more outside")
                continue
            if (x // CELL, y // CELL) in cell_set:  # a cell answers once
                example["notes"].append("keypoints that share a cell: one of them may be lost")
            cell_set.add((x // CELL, y // CELL))
            row_list.append((index, category_list.index(point["class"]), x, y))
    return np.array(row_list, np.float32).reshape(-1, 4)


# ---------------------------------------------------------------- splits and arrays

def split_off(example_list: list[dict], seed: int, limit: float, keep: int) -> tuple:
    """Part examples in two: those whose number lies below `limit`, and the others.

    The number depends on seed and file name alone, no shuffle: images that are added move none of
    the others from one split to another. At least one is taken, and `keep` are left.
    """
    def number_of(example) -> float:  # 0 to 1; Random takes the hash of a text as its seed
        return random.Random(f"{seed} {example['path'].name}").random()

    ordered_list = sorted(example_list, key=number_of)
    count = sum(number_of(example) < limit for example in ordered_list)
    count = max(1, min(count, len(ordered_list) - keep))
    return ordered_list[:count], ordered_list[count:]


def make_splits(folder_dict: dict, seed: int) -> dict:
    """{"train": examples, "val": ..., "test": ...} of {split, or "" for all: examples}."""
    split_dict, val_limit = dict(folder_dict), VAL_OF_TRAIN
    if "" in split_dict:
        split_dict["test"], split_dict["train"] = split_off(split_dict[""], seed, TEST_SHARE, 2)
        val_limit = TEST_SHARE + VAL_SHARE  # those below TEST_SHARE are taken
    if "val" not in split_dict:
        split_dict["val"], split_dict["train"] = split_off(split_dict["train"], seed, val_limit, 1)
    return {split: sorted(split_dict[split], key=lambda example: example["path"])
            for split in SPLIT_LIST}


def pack_images(path: Path, example_list: list[dict], dataset_dict: dict) -> list[int]:
    """Write uint8 `[N, height, width, 3]`; returns a checksum of each image's pixels."""
    shape = len(example_list), dataset_dict["height"], dataset_dict["width"], 3
    with replacing(path) as temporary:
        # A file mapped into memory: memory stays flat, however many images there are.
        images_4d_array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)

        def pack(index: int) -> int:
            image_3d_array = read_image(example_list[index]["path"])
            image_3d_array = resize_image(image_3d_array, dataset_dict["scale"])
            images_4d_array[index] = pad_image(image_3d_array, *shape[1:3])
            return zlib.crc32(image_3d_array)

        with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock (GIL)
            checksum_list = list(pool.map(pack, range(len(example_list))))
        del images_4d_array  # closes the file, which Windows wants before it is renamed
    return checksum_list


def collect_facts(split_dict: dict, scale: float) -> dict:
    """What dataset.json says of names, sizes and boxes; gives the keypoints their places."""
    def most_of(example: dict) -> int:  # keypoints of one class
        return max(Counter(point["class"] for point in example["keypoints"]).values(), default=0)

    all_list = sum(split_dict.values(), [])
    name_set = {point["class"] for example in all_list for point in example["keypoints"]}
    width, height = np.max([example["scaled_size"] for example in all_list], axis=0).tolist()
    dataset_dict = {
        "category_list": ["background", *sorted(name_set)], "scale": scale,
        "max_per_class": max(map(most_of, split_dict["train"])),  # decides how decode (02) works
        "box_size": (scale * place_points(all_list)).round(2).tolist(),
        "height": -(-height // CELL) * CELL, "width": -(-width // CELL) * CELL}  # whole cells
    for split, example_list in split_dict.items():
        dataset_dict[split] = {"file_list": [example["path"].name for example in example_list],
                               "size_list": [example["scaled_size"] for example in example_list]}
        for example in example_list:
            if most_of(example) > (1 if split == "train" else dataset_dict["max_per_class"]):
                example["notes"].append(f"{most_of(example)} of a class in a {split} image")
    return dataset_dict


# ---- The lesson ends here; what follows makes it comfortable to use.

def write_labelimg_xml(path: Path, image_name: str, width: int, height: int,
                       keypoint_list: list[dict]) -> None:
    """Write keypoints (dicts with "class" and "box") as LabelImg does; a box is cut at the edge.

    Two decimals are kept. LabelImg opens them, but saves whole px, truncated: 0.5 px up and left.
    """
    name = escape(image_name)
    text = (f"<annotation><folder>{escape(path.parent.name)}</folder>\n"
            f"<filename>{name}</filename><path>{name}</path>\n"
            f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n"
            "<segmented>0</segmented>\n")
    for keypoint in keypoint_list:
        xmin, ymin, xmax, ymax = keypoint["box"]
        box = [max(xmin, 0), max(ymin, 0), min(xmax, width), min(ymax, height)]
        sides = "".join(f"<{side}>{value:.2f}</{side}>" for side, value in zip(SIDE_LIST, box))
        text += (f"<object><name>{escape(keypoint['class'])}</name><pose>Unspecified</pose>\n"
                 f"<truncated>{int(box != list(keypoint['box']))}</truncated>"
                 f"<difficult>0</difficult>\n<bndbox>{sides}</bndbox></object>\n")
    with replacing(path) as temporary:
        temporary.write_text(f"{text}</annotation>\n", encoding="utf-8")


def check_frame(root, width: int, height: int) -> None:
    """Is it Pascal VOC, and of this image? Raises ValueError with what is there in its place."""
    if root.tag != "annotation":
        raise ValueError(f"begins with <{root.tag[:40]}>, not with <annotation> of Pascal VOC")
    for child in root:
        if len(child) and child.tag not in ("object", "size", "source", "owner"):
            raise ValueError(f"holds <{child.tag[:40]}>, which is no part of Pascal VOC")
    text_list = [(root.findtext(f"size/{tag}") or "").strip() for tag in ("width", "height")]
    said_list = [0.0 if text in ("", "None") else float(text) for text in text_list]
    if any(said not in (0, side) for said, side in zip(said_list, (width, height))):  # 0: not said
        reason = "was it scaled after labelling?"
        if said_list == [height, width]:
            reason = "swapped, as by a tool that ignores the EXIF tag which turns the image"
        raise ValueError(f"says {said_list[0]:g} x {said_list[1]:g} px, but the image has "
                         f"{width} x {height}: {reason}")


def check_box(box: list[float], what: str, width: int, height: int) -> None:
    """Raises ValueError for a box that cannot be right. A box of no size is a point, and good."""
    xmin, ymin, xmax, ymax = box
    for is_wrong, why in [
            (min(width, height) > 1 and 0 <= min(box) and max(box) <= 1,
             "these are shares of the image, not px"),
            (not (xmin <= xmax and ymin <= ymax) or (xmin == xmax) != (ymin == ymax),
             "xmin must lie below xmax, ymin below ymax"),
            # LabelImg may go a pixel beyond the edge. NaN makes every comparison false.
            (not (min(xmin, ymin) >= -1 and xmax <= width + 1 and ymax <= height + 1),
             f"not inside of the image's {width} x {height} px")]:
        if is_wrong:
            raise ValueError(f"{what} at {box}: {why}")


def find_folders(source: Path) -> dict[str, Path]:
    """The folders to read: {"train": path, ...}, or {"": source} where all lies in one."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; --source needs images and their XML")
    folder_dict = {}
    for path in sorted(source.iterdir()):
        split = FOLDER_DICT.get(path.name.lower()) if path.is_dir() else None
        if split in folder_dict:
            raise UserError(f"{source}: {folder_dict[split].name}/ and {path.name}/ are both for "
                            f"{split}; put their images into one")
        if split:
            folder_dict[split] = path
    if folder_dict and not {"train", "test"} <= set(folder_dict):
        raise UserError(f"{source}: holds {', '.join(folder_dict)}, so it needs both train/ and "
                        "test/; add what lacks, or put all images into one folder")
    return folder_dict or {"": source}


def find_pairs(folder: Path, problem_list: list[str]) -> list[tuple[Path, Path]]:
    """(image, XML) of a folder; to problem_list comes a sentence for whatever nearly is a pair."""
    group_dict, pair_list = {}, []  # one group: A.JPG, a.jpg.xml, A.xml.xml, a.txt
    for path in sorted(path for path in folder.glob("[!.]*") if path.is_file()):
        name = unicodedata.normalize("NFC", path.name).casefold()
        while Path(name).suffix in {".xml", ".txt", ".json", ".heic", ".gif", *IMAGE_SUFFIXES}:
            name = Path(name).stem
        group_dict.setdefault(name.strip(), []).append(path)
    for group in group_dict.values():
        image_list = [path for path in group if path.suffix.lower() in IMAGE_SUFFIXES]
        xml_list = [path for path in group if path.suffix.lower() == ".xml"]
        stem_set = {path.stem for path in image_list + xml_list}
        if len(image_list) == len(xml_list) == len(stem_set) == 1:
            pair_list.append((image_list[0], xml_list[0]))
        elif stem_set:
            problem = "has no image beside it; bring the image back"
            if len(group) > 1:
                problem = ("which belongs to which? An image (.jpg, .png) and an .xml (Pascal "
                           "VOC), spelled alike, are a pair; fix names, or save in these formats")
            elif image_list:
                problem = f"has no {group[0].stem}.xml beside it; bring it here, or label the image"
            names = ", ".join(ascii(path.name)[1:-1] for path in group)
            problem_list.append(f"{folder / names}: {problem}")
    return pair_list


def count_unused(source: Path, folder_list: list[Path]) -> str:
    """What lies below `source` and is no image or XML of the folders: "14 .txt in labels/"."""
    count_dict = Counter()
    for path in sorted(source.rglob("*")):
        inside, suffix = path.relative_to(source), path.suffix.lower()
        is_hidden = any(part.startswith(".") for part in inside.parts)
        is_read = path.parent in folder_list and suffix in {".xml", *IMAGE_SUFFIXES}
        if path.is_file() and not is_hidden and not is_read:
            kind = "images" if suffix in IMAGE_SUFFIXES else f"{suffix or path.name} files"
            count_dict[f"{kind} in {inside.parent.as_posix()}/"] += 1
    found_list = [f"{count} {what}" for what, count in count_dict.most_common()]
    return ", ".join(found_list[:6]) + (", ..." if len(found_list) > 6 else "")


def read_source(source: Path, scale: float, skip_bad: bool) -> dict:
    """{split, or "" for all: examples}. Every file below `source` is used, or told as not used."""
    folder_dict, problem_list, example_dict = find_folders(source), [], {}
    pairs_dict = {split: find_pairs(folder, problem_list) for split, folder in folder_dict.items()}
    if not any(pairs_dict.values()):
        example_list = [problem for problem in problem_list if ".xml: which" in problem][:1]
        found_list = [count_unused(source, []) or "nothing", *example_list]
        raise UserError(f"{source}: no image has its XML (Pascal VOC, not YOLO's .txt nor .json) "
                        "beside it; put a.jpg and a.xml side by side, in this folder or in its "
                        f"train/, val/ and test/; found: {'; '.join(found_list)}")
    if found := count_unused(source, list(folder_dict.values())):
        print(f"not used: {found}")
    with ThreadPoolExecutor() as pool:
        for split, pair_list in pairs_dict.items():
            print(f"reading {len(pair_list)} images{split and ' of '}{split}", flush=True)
            result_list = list(pool.map(lambda pair: read_example(*pair, scale), pair_list))
            example_dict[split] = [result for result in result_list if isinstance(result, dict)]
            problem_list += [result for result in result_list if isinstance(result, str)]
    for problem in problem_list[:50]:
        print(f"bad{', left out' if skip_bad else ''}: {problem}")
    if len(problem_list) > 50:
        print(f"... and {len(problem_list) - 50} more like these")
    if problem_list and not skip_bad:
        raise UserError(f"{source}: {len(problem_list)} bad files, listed above; fix them, or "
                        "leave them out with --skip-bad")
    return example_dict


def read_example(path: Path, xml_path: Path, scale: float) -> dict | str:
    """{"path", "size", "scaled_size", "keypoints", "notes"}; or a sentence: what is wrong."""
    try:
        height, width = read_image(path).shape[:2]
        keypoint_list = read_labels(xml_path, width, height)
        str(path).encode()  # dataset.json cannot hold a name whose bytes are no text
    except UnicodeEncodeError:
        return f"{ascii(str(path))}: its name holds bytes that are no text; rename it"
    except (UserError, OSError) as error:
        return str(error)
    with Image.open(path) as image:
        note_dict = {"turned by their EXIF tag, which some label tools ignore":
                     image.getexif().get(274, 1) in range(2, 9),
                     "grey": image.mode in ("1", "L", "LA"), "transparent, white there now":
                     image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255}
    return {"path": path, "size": (width, height), "keypoints": keypoint_list,
            "scaled_size": (max(1, round(width * scale)), max(1, round(height * scale))),
            "notes": [note for note, is_so in note_dict.items() if is_so]}


def report(split_dict: dict, label_dict: dict, dataset_dict: dict) -> None:
    """A table of the splits, and all that a user should know, with names of images."""
    name_list, (width, height) = dataset_dict["category_list"], dataset_dict["box_size"]
    column_list = [("", "images", "without a keypoint", *name_list[1:])]
    for split, example_list in split_dict.items():
        empty = sum(not example["keypoints"] for example in example_list)
        class_id_list = label_dict[split][:, 1].tolist()
        column_list.append((split, len(example_list), empty, *(
            class_id_list.count(class_id) for class_id in range(1, len(name_list)))))
    print_table(zip(*column_list))
    print(f"boxes are {width:g} x {height:g} px; a training image holds at most "
          f"{dataset_dict['max_per_class']} of a class")
    if not 20 <= (width + height) / 2 <= 45:
        print("this network is made for marks of about 30 px: try --scale "
              f"{dataset_dict['scale'] * 60 / (width + height):.2g}")
    for name, drawn in zip(name_list, names_to_draw(name_list)):
        if name != drawn:
            print(f"pictures show {name} as {drawn}")
    folded_list = [name.casefold() for name in name_list]
    if same_list := [name for name in name_list if folded_list.count(name.casefold()) > 1]:
        print(f"classes that differ by case alone (are they one?): {', '.join(same_list)}")
    names_dict = {}  # note -> the names of its images
    for example in sum(split_dict.values(), []):
        example["notes"] += [f"no training image holds {name}, so it cannot be learned"
                             for name in (point["class"] for point in example["keypoints"])
                             if name_list.index(name) not in label_dict["train"][:, 1]]
        for note in dict.fromkeys(example["notes"]):
            names_dict.setdefault(note, []).append(example["path"].name)
    for note, file_list in sorted(names_dict.items()):
        print(f"{note}: {len(file_list)} images, {', '.join(file_list[:3])}"
              + (", ..." if len(file_list) > 3 else ""))


def draw_contact_sheet(data_folder: Path, dataset_dict: dict, label_2d_array) -> None:
    """Up to fifty training keypoints close up, class by class, with file name and class."""
    images_4d_array = np.load(data_folder / "train_images.npy", mmap_mode="r")
    name_list = names_to_draw(dataset_dict["category_list"])
    reach = 1.5 * max(dataset_dict["box_size"])  # px
    label_2d_array = label_2d_array[np.argsort(label_2d_array[:, 1], kind="stable")]
    count = min(50, len(label_2d_array))
    figure = Figure(figsize=(15, 2 * -(-count // 10) + 0.6), layout="constrained")
    figure.suptitle(f"{count} of {len(label_2d_array)} training keypoints")
    row_1d_array = np.linspace(0, len(label_2d_array) - 1, count).astype(int)
    for number, (index, class_id, x, y) in enumerate(label_2d_array[row_1d_array], start=1):
        left, top = max(0, int(x - reach)), max(0, int(y - reach))
        part_3d_array = images_4d_array[int(index), top:int(y + reach) + 1, left:int(x + reach) + 1]
        height, width = part_3d_array.shape[:2]
        axes = figure.add_subplot(-(-count // 10), 10, number, facecolor="grey")
        axes.imshow(part_3d_array, extent=(left, left + width, top + height, top))
        axes.plot(x, y, "+", color=COLOUR_LIST[int(class_id) % len(COLOUR_LIST)], markersize=24)
        axes.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach), xticks=[], yticks=[])
        words = f"{dataset_dict['train']['file_list'][int(index)]} {name_list[int(class_id)]}"
        words = textwrap.fill(words.encode("ascii", "replace").decode(), 22)
        axes.set_title(words, fontsize=7, parse_math=False)
    figure.savefig(data_folder / "results" / "contact_sheet.png", dpi=110)


def write_arrays(data_folder: Path, split_dict: dict, label_dict: dict, dataset_dict: dict) -> None:
    """Write the arrays, the contact sheet and, last, dataset.json."""
    image_bytes = dataset_dict["height"] * dataset_dict["width"] * 3
    need = sum(map(len, split_dict.values())) * image_bytes
    (data_folder / "results").mkdir(parents=True, exist_ok=True)
    # A mapped file that meets a full disk would end the program without a word.
    if need > (free := shutil.disk_usage(data_folder).free):
        raise UserError(f"{data_folder}: the arrays take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                        "are free; make room, or make the images smaller with --scale")
    path = data_folder / "dataset.json"
    if path.exists() and b'"category_list"' not in path.read_bytes():
        raise UserError(f"{path}: was not made by this script; choose another --data folder")
    path.unlink(missing_ok=True)  # where it is, the arrays belong to it
    for split, example_list in split_dict.items():
        print(f"packing {len(example_list)} images of {split}", flush=True)
        image_path = data_folder / f"{split}_images.npy"
        checksum_list = pack_images(image_path, example_list, dataset_dict)
        np.save(data_folder / f"{split}_labels.npy", label_dict[split])
        dataset_dict[split]["checksum_list"] = checksum_list
        both_set = set(checksum_list) & set(dataset_dict["train"]["checksum_list"])
        if split != "train" and both_set:
            print(f"{len(both_set)} images of {split} are also in train: its figures flatter")
    draw_contact_sheet(data_folder, dataset_dict, label_dict["train"])
    write_json(path, dataset_dict)


def main() -> None:
    parser = make_parser("Draw or read labelled images, and pack them.", "folder to write to")
    parser.add_argument("--source", type=Path, help="images and their XML; without it, drawn ones")
    parser.add_argument("--pictures", type=int, default=1465, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0, help="of drawing and split")
    parser.add_argument("--scale", type=float, default=1.0, help="of images; marks of 30 px suit")
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad files")
    options = parser.parse_args()
    if not 0.01 <= options.scale <= 10:
        parser.error("--scale must lie between 0.01 and 10")
    source = options.source or options.data / "images"
    if options.source is None:
        run_script("data/draw_pictures.py", "--data", options.data, "--pictures", options.pictures,
                   "--seed", options.seed)
    split_dict = make_splits(read_source(source, options.scale, options.skip_bad), options.seed)
    if not all(split_dict.values()):
        raise UserError(f"{source}: train, val and test need an image each that can be used")
    dataset_dict = {"source": str(source), **collect_facts(split_dict, options.scale)}
    label_dict = {split: to_label_array(example_list, dataset_dict["category_list"])
                  for split, example_list in split_dict.items()}
    if not len(label_dict["train"]):
        raise UserError(f"{source}: no training image holds a keypoint; label some")
    report(split_dict, label_dict, dataset_dict)
    write_arrays(options.data, split_dict, label_dict, dataset_dict)
    print(f"look at {options.data / 'results' / 'contact_sheet.png'}\n"
          f"next: {command('03_train.py', options.data)}")


if __name__ == "__main__":
    run_main(main)
