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

import shutil
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
TEST_SHARE, VAL_SHARE = 0.2, 0.08  # of a folder without splits; without val/, a tenth of train/
BOX_SIDE = 30  # px; taken where the labels are points without a box
SIDE_LIST = ["xmin", "ymin", "xmax", "ymax"]


# ---------------------------------------------------------------- XML into points

def read_labels(xml_path: Path, width: int, height: int) -> list[dict]:
    """Read one file: a list of {"class": name, "box": [xmin, ymin, xmax, ymax]}, in px.

    `width`, `height`: the image's own size. All of a file is understood, or it is refused: raises
    UserError.
    """
    try:  # each ValueError gets the file's name and the fix at the end
        root = ElementTree.fromstring(xml_path.read_bytes())
        check_frame(root, width, height)
        object_list = root.findall("object")
        keypoint_list = [read_object(node, number, width, height)
                         for number, node in enumerate(object_list, start=1)]
        if (count := len(list(root.iter("bndbox")))) != len(keypoint_list):
            raise ValueError(f"holds {count} <bndbox>, but {len(keypoint_list)} of them in an "
                             "<object> of the <annotation>")
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"{xml_path}: {str(error)[:250]}; mend it in your label tool") from None
    return keypoint_list


def read_object(node, number: int, width: int, height: int) -> dict:
    """One <object> of the XML as {"class", "box"}. Raises ValueError."""
    # One form of Unicode, and blanks and line breaks made one: else one class becomes two.
    name_list = [" ".join(unicodedata.normalize("NFC", child.text or "").split())
                 for child in node.findall("name")]
    name = name_list[0] if name_list else ""
    what = f"object {number} ({ascii(name)})"
    if len(name_list) != 1 or name in ("", "background") or not name.isprintable():
        raise ValueError(f"{what} needs one name, of letters that can be seen, other than "
                         "background")
    box_list = node.findall("bndbox")
    if len(box_list) != 1:
        found = ", ".join(child.tag for child in node if len(child)) or "nothing else"
        raise ValueError(f"{what} holds {len(box_list)} <bndbox> in place of one (found: {found})")
    if sorted(child.tag for child in box_list[0] if child.tag in SIDE_LIST) != sorted(SIDE_LIST):
        raise ValueError(f"the box of {what} needs xmin, ymin, xmax and ymax, each once")
    box = [float(box_list[0].findtext(side)) for side in SIDE_LIST]
    check_box(box, what, width, height)
    return {"class": name, "box": box}


def find_centre(low: float, high: float, length: int, side: float) -> float:
    """Where the point lies, in x or in y, that a box from `low` to `high` was drawn round.

    In its middle, unless the edge of the image (`length` px) has cut the box: a box that touches
    the edge and is smaller than the usual `side` had its middle half a side from its whole edge.

    >>> find_centre(0, 18, length=320, side=30), find_centre(100, 118, length=320, side=30)
    (3.0, 109.0)
    """
    is_low_cut, is_high_cut = low <= 1, high >= length - 1  # tools write 0 or 1, 319 or 320
    if is_low_cut == is_high_cut or high - low >= side:
        return (low + high) / 2
    return high - side / 2 if is_low_cut else low + side / 2


def place_points(example_list: list[dict]) -> list[float]:
    """Give every keypoint its "x" and "y", in px. Returns the usual box's width and height.

    The usual box is the median of those that have a size and that no edge has cut.
    """
    side_list = []
    for example in example_list:
        width, height = example["size"]
        for xmin, ymin, xmax, ymax in (point["box"] for point in example["keypoints"]):
            is_whole = min(xmin, ymin) > 1 and xmax < width - 1 and ymax < height - 1
            if is_whole and xmin < xmax:
                side_list.append((xmax - xmin, ymax - ymin))
    box_size = np.median(side_list or [(BOX_SIDE, BOX_SIDE)], axis=0).round(2).tolist()
    for example in example_list:
        for point in example["keypoints"]:
            xmin, ymin, xmax, ymax = point["box"]
            point["x"] = find_centre(xmin, xmax, example["size"][0], box_size[0])
            point["y"] = find_centre(ymin, ymax, example["size"][1], box_size[1])
    return box_size


def to_label_array(example_list: list[dict], category_list: list[str]) -> np.ndarray:
    """Float32 `[M, 4]`, a row per keypoint: image index, class id, x, y in px."""
    row_list = []
    for index, example in enumerate(example_list):
        width, height = example["size"]
        for point in example["keypoints"]:
            x, y = point["x"], point["y"]
            # Of a cut box, the point may lie outside: up to REACH it is kept.
            if max(-x, -y, x - width, y - height) < REACH:
                row_list.append((index, category_list.index(point["class"]), x, y))
    return np.array(row_list, np.float32).reshape(-1, 4)


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
        cut_box = [max(xmin, 0), max(ymin, 0), min(xmax, width), min(ymax, height)]
        corners = "".join(f"<{tag}>{value:.2f}</{tag}>" for tag, value in zip(SIDE_LIST, cut_box))
        truncated = int(cut_box != list(keypoint["box"]))
        text += (f"<object><name>{escape(keypoint['class'])}</name><pose>Unspecified</pose>\n"
                 f"<truncated>{truncated}</truncated><difficult>0</difficult>\n"
                 f"<bndbox>{corners}</bndbox></object>\n")
    with replacing(path) as temporary:
        temporary.write_text(f"{text}</annotation>\n", encoding="utf-8")


# ---------------------------------------------------------------- splits and arrays

def split_by_name(example_list: list[dict], seed: int, *share_list: float) -> list[list[dict]]:
    """Deal examples into parts of the given shares, at least one each; the last part is the rest.

    A checksum of name and seed decides, not a shuffle: images that are added move none of the
    others from one split to another.
    """
    def number_of(example) -> float:  # 0 to 1, as good as random
        return zlib.crc32(f"{seed} {example['path'].name}".encode()) / 2 ** 32

    rest_list, part_list, limit = sorted(example_list, key=number_of), [], 0.0
    for share in share_list:
        limit += share
        count = max(1, sum(number_of(example) < limit for example in rest_list))
        part_list.append(rest_list[:count])
        rest_list = rest_list[count:]
    return [sorted(part, key=lambda example: example["path"]) for part in (*part_list, rest_list)]


def make_splits(folder_dict: dict, seed: int) -> dict:
    """{"train": examples, "val": ..., "test": ...} of {split, or "" for all: examples}."""
    if "" in folder_dict:
        test_list, val_list, train_list = split_by_name(
            folder_dict[""], seed, TEST_SHARE, VAL_SHARE)
        return {"train": train_list, "val": val_list, "test": test_list}
    if "val" not in folder_dict:
        val_list, train_list = split_by_name(folder_dict["train"], seed, 0.1)
        return {"train": train_list, "val": val_list, "test": folder_dict["test"]}
    return {split: folder_dict[split] for split in SPLIT_LIST}


def pack_images(path: Path, example_list: list[dict], height: int, width: int,
                scale: float) -> list[int]:
    """Write uint8 `[N, height, width, 3]`; returns a checksum of each image's pixels.

    The array is a file that is mapped into memory: memory stays flat. Two threads a core decode:
    Pillow lets go of Python's lock (GIL) while it does.
    """
    with replacing(path) as temporary:
        images_4d_array = np.lib.format.open_memmap(
            temporary, "w+", np.uint8, (len(example_list), height, width, 3))

        def pack(index: int) -> int:
            image_3d_array = resize_image(read_image(example_list[index]["path"]), scale)
            images_4d_array[index] = pad_image(image_3d_array, height, width)
            return zlib.crc32(image_3d_array)

        with ThreadPoolExecutor() as pool:
            checksum_list = list(pool.map(pack, range(len(example_list))))
        del images_4d_array  # closes the file, which Windows wants before it is renamed
    return checksum_list


def describe(split_dict: dict) -> dict:
    """What dataset.json says of names, sizes and boxes; gives the keypoints their places."""
    all_list = sum(split_dict.values(), [])
    name_set = {point["class"] for example in all_list for point in example["keypoints"]}
    return {"category_list": ["background", *sorted(name_set)],
            "max_per_class": max(map(most_of_a_class, split_dict["train"])),
            "box_size": place_points(all_list),
            "height": -(-max(example["size"][1] for example in all_list) // CELL) * CELL,
            "width": -(-max(example["size"][0] for example in all_list) // CELL) * CELL,
            **{split: {"file_list": [example["path"].name for example in example_list],
                       "size_list": [example["size"] for example in example_list]}
               for split, example_list in split_dict.items()}}


def most_of_a_class(example: dict) -> int:
    """How many keypoints of one class an example holds at most."""
    return max(Counter(point["class"] for point in example["keypoints"]).values(), default=0)


# ---- The lesson ends here; what follows makes it comfortable to use.

def check_frame(root, width: int, height: int) -> None:
    """Is it Pascal VOC, and of this image? Raises ValueError with what is there in its place."""
    if root.tag != "annotation":
        raise ValueError(f"begins with <{root.tag[:40]}>, not with <annotation> of Pascal VOC")
    for child in root:
        if len(child) and child.tag not in ("object", "size", "source", "owner"):
            raise ValueError(f"holds <{child.tag[:40]}>, which is no part of Pascal VOC")
    text_list = [(root.findtext(f"size/{tag}") or "").strip() for tag in ("width", "height")]
    said = [0.0 if text in ("", "None") else float(text) for text in text_list]  # 0: not said
    if all(side in (0, own) for side, own in zip(said, (width, height))):
        return
    is_swapped = all(side in (0, own) for side, own in zip(said, (height, width)))
    raise ValueError(f"says {said[0]:g} x {said[1]:g} px, but the image has {width} x {height}: "
                     + ("width and height are swapped, as by a tool that ignores the EXIF tag by "
                        "which the image is turned" if is_swapped else "was it scaled?"))


def check_box(box: list[float], what: str, width: int, height: int) -> None:
    """Raises ValueError for a box that cannot be right. A box of no size is a point, and good."""
    xmin, ymin, xmax, ymax = box
    if width > 1 and height > 1 and 0 <= min(box) and max(box) <= 1:
        raise ValueError(f"{what} lies at {box}: these are shares of the image, not px")
    if not (xmin <= xmax and ymin <= ymax) or (xmin == xmax) != (ymin == ymax):
        raise ValueError(f"{what} at {box} is no box: xmin must lie below xmax, ymin below ymax")
    # LabelImg may go a pixel beyond the edge. NaN makes every comparison false.
    if not (min(xmin, ymin) >= -1 and xmax <= width + 1 and ymax <= height + 1):
        raise ValueError(f"{what} at {box} is not inside of the image's {width} x {height} px")


def find_folders(source: Path) -> dict[str, Path]:
    """The folders to read: {"train": path, ...}, or {"": source} where all lies in one."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; --source needs images and their XML")
    folder_dict = {}
    for path in sorted(path for path in source.iterdir() if path.is_dir()):
        split = FOLDER_DICT.get(path.name.lower())
        if split in folder_dict:
            raise UserError(f"{source}: {folder_dict[split].name}/ and {path.name}/ are both for "
                            f"{split}; put their images into one")
        if split:
            folder_dict[split] = path
    if folder_dict and not {"train", "test"} <= set(folder_dict):
        raise UserError(f"{source}: holds {', '.join(folder_dict)}, so it needs both train/ and "
                        "test/; add what lacks, or put all images into one folder")
    return folder_dict or {"": source}


def loose_stem(path: Path) -> str:
    """What the names of an image and its label share, however they are spelled.

    >>> {loose_stem(Path(name)) for name in ("A.JPG", "a.jpg.xml", "A.xml.xml", "a.txt")}
    {'a'}
    """
    name = unicodedata.normalize("NFC", path.name).casefold()
    while Path(name).suffix in (".xml", ".txt", ".json", *IMAGE_SUFFIXES):
        name = name[:-len(Path(name).suffix)]
    return name.strip()


def find_pairs(folder: Path, problem_list: list[str]) -> list[tuple[Path, Path]]:
    """(image, XML) of a folder; to problem_list comes a sentence for whatever nearly is a pair."""
    group_dict, pair_list = {}, []
    for path in sorted(folder.glob("[!.]*")):
        if path.is_file():
            group_dict.setdefault(loose_stem(path), []).append(path)
    for group in group_dict.values():
        image_list = [path for path in group if path.suffix.lower() in IMAGE_SUFFIXES]
        xml_list = [path for path in group if path.suffix.lower() == ".xml"]
        if [path.stem for path in image_list] == [path.stem for path in xml_list] and len(
                image_list) == 1:
            pair_list.append((image_list[0], xml_list[0]))
        elif len(group) > 1 and image_list + xml_list:
            names = ", ".join(ascii(path.name)[1:-1] for path in group)
            problem_list.append(f"{folder}: {names}: which belongs to which? An image and its XML "
                                "need one name, a.jpg and a.xml, that no other has; rename them")
        elif image_list:
            problem_list.append(f"{group[0]}: has no {group[0].stem}.xml; label it, or save it "
                                "without a box in your label tool if it shows no keypoint")
        elif xml_list:
            problem_list.append(f"{group[0]}: has no image beside it; bring the image back")
    return pair_list


def unused_files(source: Path, folder_list: list[Path]) -> str:
    """What lies below `source` and is no image or XML of the folders: "14 .txt in labels/"."""
    count_dict = Counter()
    for path in sorted(source.rglob("*")):
        kind, inside = path.suffix.lower(), path.relative_to(source)
        is_ours = kind in IMAGE_SUFFIXES or kind == ".xml"
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if path.is_file() and not is_hidden and not (is_ours and path.parent in folder_list):
            kind = "images" if kind in IMAGE_SUFFIXES else kind or "files"
            count_dict[f"{kind} in {inside.parent.as_posix()}/"] += 1
    found = ", ".join(f"{count} {what}" for what, count in count_dict.items())
    if ".txt in" in found or ".json in" in found:
        found += "; is it YOLO's .txt or a .json? Let your label tool save Pascal VOC (XML)"
    return found


def read_source(source: Path, scale: float, skip_bad: bool) -> dict:
    """{split, or "" for all: examples}. Every file below `source` is used, or told as not used."""
    folder_dict, problem_list, example_dict = find_folders(source), [], {}
    pairs_dict = {split: find_pairs(folder, problem_list) for split, folder in folder_dict.items()}
    count = sum(map(len, pairs_dict.values()))
    if not count:
        raise UserError(f"{source}: no image has its XML beside it, a.jpg and a.xml in this folder "
                        "or in train/, val/ and test/ of it; found: "
                        + (unused_files(source, []) or "nothing"))
    if found := unused_files(source, list(folder_dict.values())):
        print(f"not used: {found}")
    print(f"reading {count} images")
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        for split, pair_list in pairs_dict.items():
            result_list = list(pool.map(lambda pair: read_example(*pair, scale), pair_list))
            example_dict[split] = [result for result in result_list if isinstance(result, dict)]
            problem_list += [result for result in result_list if isinstance(result, str)]
    for problem in problem_list:
        print(f"bad{', left out' if skip_bad else ''}: {problem}")
    if problem_list and not skip_bad:
        raise UserError(f"{source}: {len(problem_list)} bad files, listed above; mend them, or "
                        "leave them out with --skip-bad")
    return example_dict


def read_example(path: Path, xml_path: Path, scale: float) -> dict | str:
    """{"path", "size", "keypoints", "changes"}, in scaled px; or a sentence: what is wrong."""
    try:
        height, width = read_image(path).shape[:2]
        keypoint_list = read_labels(xml_path, width, height)
        str(path).encode()  # dataset.json cannot hold a name whose bytes are no text
    except UnicodeEncodeError:
        return f"{ascii(str(path))}: its name holds bytes that are no text; rename it"
    except (UserError, OSError) as error:
        return str(error)
    with Image.open(path) as image:
        change_dict = {"turned": image.getexif().get(274, 1) in range(2, 9),  # EXIF orientation
                       "grey": image.mode in ("1", "L", "LA"),
                       "transparent": "A" in image.mode or "transparency" in image.info}
    size = max(1, round(width * scale)), max(1, round(height * scale))
    for point in keypoint_list:
        point["box"] = [value * new / old for value, new, old
                        in zip(point["box"], 2 * size, 2 * (width, height))]
    return {"path": path, "size": size, "keypoints": keypoint_list,
            "changes": [change for change, is_so in change_dict.items() if is_so]}


def tell(what: str, example_list: list[dict]) -> None:
    """Print what holds of these images, with three of their names; nothing where it is none."""
    name_list = list(dict.fromkeys(example["path"].name for example in example_list))
    if name_list:
        print(f"{what}: {len(name_list)} images, {', '.join(name_list[:3])}"
              + (", ..." if len(name_list) > 3 else ""))


def report(split_dict: dict, label_dict: dict, dataset_dict: dict) -> None:
    """A table of the splits, and what a user should know of their classes."""
    all_list, category_list = sum(split_dict.values(), []), dataset_dict["category_list"]
    row_list = [("images", *map(len, split_dict.values())), ("without a keypoint", *(
        sum(not example["keypoints"] for example in part) for part in split_dict.values()))]
    for class_id, name in enumerate(category_list[1:], start=1):
        row_list.append((name, *(int((label_2d_array[:, 1] == class_id).sum())
                                 for label_2d_array in label_dict.values())))
    print_table([("", *split_dict), *row_list])
    drawn_list = names_to_draw(category_list)
    folded_list = [name.casefold() for name in category_list]
    for class_id, (name, train_count, *_) in enumerate(row_list[2:], start=1):
        if not train_count:
            tell(f"nothing to learn {name} from, since no training image holds it", [
                example for example in all_list
                if name in [point["class"] for point in example["keypoints"]]])
        if folded_list.count(folded_list[class_id]) > 1:
            print(f"another class differs from {name} by case alone: are they one?")
        if name != drawn_list[class_id]:
            print(f"pictures show {name} as {drawn_list[class_id]}")


def report_points(split_dict: dict, label_dict: dict, dataset_dict: dict) -> None:
    """What a user should know of changed images, of boxes and of crowded points."""
    all_list, (width, height) = sum(split_dict.values(), []), dataset_dict["box_size"]
    print(f"boxes are {width:g} x {height:g} px; a training image holds at most "
          f"{dataset_dict['max_per_class']} of a class")
    if not 20 <= (width + height) / 2 <= 45:
        print("this network is made for marks of about 30 px: try --scale "
              f"{dataset_dict['scale'] * 60 / (width + height):.2g}")
    for split, example_list in split_dict.items():
        allowed = 1 if split == "train" else dataset_dict["max_per_class"]
        tell(f"more than {allowed} of a class in {split}", [
            example for example in example_list if most_of_a_class(example) > allowed])
        cell_2d_array = np.column_stack((label_dict[split][:, 0], label_dict[split][:, 2:] // CELL))
        cell_2d_array, count_1d_array = np.unique(cell_2d_array, axis=0, return_counts=True)
        tell(f"keypoints in one cell, of which one is lost, in {split}", [
            example_list[int(index)] for index, *_ in cell_2d_array[count_1d_array > 1]])
    for change, words in (("turned", "turned by their EXIF tag, which some label tools ignore"),
                          ("grey", "grey"), ("transparent", "white where they were transparent")):
        tell(words, [example for example in all_list if change in example["changes"]])
    point_list = [(example, point, *point["box"]) for example in all_list
                  for point in example["keypoints"]]
    tell("a label without a size, taken as a point", [
        example for example, _, xmin, _, xmax, _ in point_list if xmin == xmax])
    tell("a box that the edge cuts, completed from its whole sides", [
        example for example, point, xmin, ymin, xmax, ymax in point_list
        if (point["x"], point["y"]) != ((xmin + xmax) / 2, (ymin + ymax) / 2)])
    tell(f"left out, a point {REACH} px or more outside of the image", [
        example for example, point, *_ in point_list
        if not -REACH < point["x"] < example["size"][0] + REACH
        or not -REACH < point["y"] < example["size"][1] + REACH])


def draw_contact_sheet(path: Path, dataset_dict: dict, images_4d_array, label_2d_array) -> None:
    """Up to fifty training keypoints close up, equally many of each class, with file and class."""
    name_list = names_to_draw(dataset_dict["category_list"])
    label_2d_array, chosen_list = np.random.default_rng(0).permutation(label_2d_array), []
    for class_id in range(1, len(name_list)):
        own_2d_array = label_2d_array[label_2d_array[:, 1] == class_id]
        chosen_list += list(own_2d_array[:max(1, 50 // (len(name_list) - 1))])
    reach = 1.5 * max(dataset_dict["box_size"])  # px
    figure = Figure(figsize=(15, 1.9 * -(-len(chosen_list[:50]) // 10) + 0.6), layout="constrained")
    figure.suptitle(f"{len(chosen_list[:50])} of {len(label_2d_array)} training keypoints")
    for number, (index, class_id, x, y) in enumerate(chosen_list[:50], start=1):
        image_3d_array = images_4d_array[int(index)]
        left, top = max(0, int(x - reach)), max(0, int(y - reach))
        part_3d_array = image_3d_array[top:int(y + reach) + 1, left:int(x + reach) + 1]
        height, width = part_3d_array.shape[:2]
        axes = figure.add_subplot(-(-len(chosen_list[:50]) // 10), 10, number, facecolor="grey")
        axes.imshow(part_3d_array, extent=(left, left + width, top + height, top))
        axes.plot(x, y, "+", color=COLOUR_LIST[int(class_id) % len(COLOUR_LIST)], markersize=24)
        file = ascii(dataset_dict["train"]["file_list"][int(index)][-20:])[1:-1]
        axes.set_title(f"{file}\n{name_list[int(class_id)][:20]}", fontsize=7, parse_math=False)
        axes.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach), xticks=[], yticks=[])
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def write_arrays(data_folder: Path, split_dict: dict, label_dict: dict, dataset_dict: dict):
    """Write the arrays, the contact sheet and, last, dataset.json."""
    height, width = dataset_dict["height"], dataset_dict["width"]
    need = sum(map(len, split_dict.values())) * height * width * 3  # bytes
    data_folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(data_folder).free
    if need > free:  # a mapped file that meets a full disk would end the program without a word
        raise UserError(f"{data_folder}: the arrays take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                        "are free; make room, or make the images smaller with --scale")
    (data_folder / "dataset.json").unlink(missing_ok=True)  # where it is, the arrays belong to it
    for split, example_list in split_dict.items():
        print(f"packing {len(example_list)} images of {split}")
        dataset_dict[split]["checksum_list"] = pack_images(
            data_folder / f"{split}_images.npy", example_list, height, width,
            dataset_dict["scale"])
        with replacing(data_folder / f"{split}_labels.npy") as temporary:
            with open(temporary, "wb") as file:  # to a path, np.save would add .npy
                np.save(file, label_dict[split])
    images_4d_array = np.load(data_folder / "train_images.npy", mmap_mode="r")
    draw_contact_sheet(data_folder / "results" / "contact_sheet.png", dataset_dict,
                       images_4d_array, label_dict["train"])
    write_json(data_folder / "dataset.json", dataset_dict)


def main() -> None:
    parser = make_parser("Draw or read labelled images, and pack them.", "folder to write to")
    parser.add_argument("--source", type=Path, help="folder with images and their XML; without it "
                        "images are drawn")
    parser.add_argument("--pictures", type=int, default=1465, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0, help="of drawing and split")
    parser.add_argument("--scale", type=float, default=1.0, help="make images so many times as "
                        "large; for marks that are not about 30 px")
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad files")
    options = parser.parse_args()
    if not 0.01 <= options.scale <= 10:
        parser.error("--scale must lie between 0.01 and 10")
    source = options.source or options.data / "images"
    if options.source is None:
        run_script("data/draw_pictures.py", "--pictures", options.pictures, "--seed", options.seed,
                   "--data", options.data)
    folder_dict = read_source(source, options.scale, options.skip_bad)
    split_dict = make_splits(folder_dict, options.seed)
    for split, example_list in split_dict.items():
        if not example_list:
            raise UserError(f"{source}: no image is left for {split}; three are the least")
    dataset_dict = {"source": str(source), "scale": options.scale, **describe(split_dict)}
    label_dict = {split: to_label_array(example_list, dataset_dict["category_list"])
                  for split, example_list in split_dict.items()}
    if not len(label_dict["train"]):
        raise UserError(f"{source}: no training image holds a keypoint; label some")
    report(split_dict, label_dict, dataset_dict)
    report_points(split_dict, label_dict, dataset_dict)
    write_arrays(options.data, split_dict, label_dict, dataset_dict)
    print(f"look at {options.data / 'results' / 'contact_sheet.png'}\n"
          f"next: {command('03_train.py', options.data)}")


if __name__ == "__main__":
    run_main(main)
