"""Lesson 5: use it. Images in; drawn images, JSON, LabelImg's XML and maps of scores out.

    python 05_predict.py                                 # the images of data/sample
    python 05_predict.py photo.jpg my_folder --map       # your own; how sure each cell is
    python 05_predict.py my_folder --json found.json     # keypoints only, nothing is drawn
    python 05_predict.py my_folder --xml --out round_2   # labels to correct in a label tool

Reads   data/weights.pt (else data/pretrained.pt) and the images.
Writes  to data/results/predictions (or --out, a new folder): NUMBER_NAME.jpg, drawn; with --map
        NUMBER_NAME_map.png; with --xml labelimg/, a copy of each image with its XML.
Time    about 100 images a second on two CPU cores; a second each with --map.
See     a line an image with class, score and place; where nothing was found, the best scores.
Next    python 06_model_analysis.py shows where parameters, memory and time go.
"""

import functools
import importlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from common import (CELL, COLOUR_LIST, IMAGE_SUFFIXES, UserError, command, make_parser,
                    names_to_draw, read_image, resize_image, run_main, write_json)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model, prepare = (importlib.import_module(name) for name in ("02_model", "01_prepare_data"))

THREADS = min(4, os.cpu_count() or 1)  # images at the same time; each takes 30 bytes a pixel
JPEG_QUALITY = 90  # of 100; a PNG would take twenty times as long to write
MAP_CLASSES = 6  # the most on a map: the likeliest


def find_in_image(network, about_dict: dict, image_3d_array: np.ndarray, threshold: float):
    """Keypoints in px of the image as it came; and each class's probability in each cell."""
    # As large as in training: scale times its own size, in whole px.
    seen_3d_array = resize_image(image_3d_array, about_dict["scale"])
    found_list, map_3d_array = model.find_keypoints(network, about_dict, seen_3d_array, threshold)
    # Back to own px: not 1 / scale exactly, since the size was rounded. Of x, then of y.
    factor_list = np.divide(image_3d_array.shape[1::-1], seen_3d_array.shape[1::-1]).tolist()
    keypoint_list = []
    for found in found_list:
        x, y, *box = np.multiply([found["x"], found["y"], *found["box"]], factor_list * 3).tolist()
        keypoint_list.append({**found, "x": x, "y": y, "box": box})
    return keypoint_list, map_3d_array


def draw_keypoints(image: Image.Image, keypoint_list: list[dict], category_list: list[str]) -> None:
    """Draw each keypoint's box, cross, name and score into an image."""
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for number, keypoint in enumerate(keypoint_list):
        class_id = category_list.index(keypoint["class"])
        colour = COLOUR_LIST[class_id % len(COLOUR_LIST)]
        # Pixel c covers [c, c + 1), and its middle is c + 0.5: where Pillow says c.
        x, y, xmin, ymin, xmax, ymax = (value - 0.5 for value in (
            keypoint["x"], keypoint["y"], *keypoint["box"]))
        for width, ink in ((4, "black"), (2, colour)):  # with a dark rim it shows on any ground
            canvas.rectangle([xmin, ymin, xmax, ymax], outline=ink, width=width)
            canvas.line([x - 5, y, x + 5, y], fill=ink, width=width - 1)
            canvas.line([x, y - 5, x, y + 5], fill=ink, width=width - 1)
        text = f"{names_to_draw(category_list)[class_id]} {keypoint['score']:.2f}"
        _, _, width, height = canvas.textbbox((0, 0), text, font=font, stroke_width=2)
        # Above its box, but every second below, so that neighbours' texts keep apart.
        top = ymax + 2 if number % 2 or ymin < height + 2 else ymin - height - 2
        place = max(0, min(xmin, image.width - width)), min(top, image.height - height)
        canvas.text(place, text, colour, font, stroke_width=2, stroke_fill="black")


def draw_map(path: Path, drawn: Image.Image, image_3d_array, map_3d_array, name_list, scale):
    """The drawn image, and beside it under each class's map: bright cells are likely ones."""
    _, rows, columns = map_3d_array.shape
    best_1d_array = map_3d_array.max(axis=(1, 2))
    shown_list = sorted(np.argsort(-best_1d_array)[:MAP_CLASSES])
    width, height = np.divide(drawn.size, max(150, drawn.width / 5, drawn.height / 15))  # inches
    panels = 1 + len(shown_list)
    figure = Figure((1 + panels * (width + 0.6), 1 + height), layout="compressed")
    first, *axes_list = figure.subplots(1, panels, sharey=True)
    first.imshow(drawn)
    for axes, index in zip(axes_list, shown_list):
        axes.imshow(image_3d_array)
        shown = axes.imshow(map_3d_array[index], cmap="inferno", vmin=0, vmax=1, alpha=0.6,
                            extent=(0, columns * CELL / scale, rows * CELL / scale, 0))
        axes.set(xlim=(0, drawn.width), ylim=(drawn.height, 0))
        axes.set_title(f"{name_list[index + 1]}\nbest {best_1d_array[index]:.3f}", parse_math=False)
    figure.colorbar(shown, ax=axes_list, label="probability", aspect=40, pad=0.01)
    figure.savefig(path, dpi=110)


# ---- The lesson ends here; what follows makes it comfortable to use.

def in_words(keypoint_list: list[dict], name_list: list[str], best_list, threshold: float) -> str:
    """What was found; else the best score of each class: "nearly", or "not at all"?

    >>> in_words([], ["keyPoint_1", "keyPoint_2"], [0.31, 0.99998], threshold=1)
    'nothing found with threshold 1; best scores: keyPoint_1 0.310, keyPoint_2 0.999'
    """
    if keypoint_list:
        form = "{class} {score:.3f} at ({x:.2f}, {y:.2f})"
        return "  ".join(form.format(**keypoint) for keypoint in keypoint_list)
    # Cut, not rounded: 0.99998 would read 1.000, as if it had reached the threshold.
    cut_list = [f"{name} {int(best * 1e3) / 1e3:.3f}" for name, best in zip(name_list, best_list)]
    return f"nothing found with threshold {threshold:g}; best scores: " + ", ".join(cut_list)


def collect_images(options) -> list[Path]:
    """The images that the user named, and those directly in the folders. Raises UserError."""
    path_list = []
    for path in options.images or [options.data / "sample"]:
        found_list = [path] if options.images and not path.is_dir() else sorted(
            file for file in path.glob("[!.]*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found_list:
            fix = command("05_predict.py", options.data, "my_folder")
            raise UserError(f"{path}: no such folder, or no image in it; name another: {fix}")
        path_list += found_list
    return list(dict.fromkeys(path_list))  # named twice, looked at once


def predict_file(network, about_dict: dict, options, folder: Path, path: Path, number: int):
    """Find, draw and write. Returns JSON's entry and a line; for a bad image None and a line."""
    try:
        image_3d_array = read_image(path)
    except UserError as error:
        return None, f"bad: {error}"
    category_list, (height, width) = about_dict["category_list"], image_3d_array.shape[:2]
    keypoint_list, map_3d_array = find_in_image(network, about_dict, image_3d_array,
                                                options.threshold)
    stem = "".join(letter if letter.isprintable() else "_" for letter in path.stem[:60])
    name = f"{number:04}_{stem}"  # a/1.jpg and b/1.jpg stay apart
    drawn = Image.fromarray(image_3d_array)
    draw_keypoints(drawn, keypoint_list, category_list)
    if options.out or not options.json:  # who only asks for JSON need not wait for drawings
        drawn.save(folder / f"{name}.jpg", quality=JPEG_QUALITY)
    if options.map:
        draw_map(folder / f"{name}_map.png", drawn, image_3d_array, map_3d_array,
                 names_to_draw(category_list), about_dict["scale"])
    if options.xml:
        suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".jpg"  # for 01
        folder, file = folder / "labelimg", f"{name}{suffix}"
        shutil.copyfile(path, folder / file)
        prepare.write_labelimg_xml(folder / f"{name}.xml", file, width, height, keypoint_list)
    best_1d_array = map_3d_array.max(axis=(1, 2))
    words = in_words(keypoint_list, category_list[1:], best_1d_array, options.threshold)
    for keypoint in keypoint_list:  # nothing is compared any more
        x, y, *box = (round(value, 3) for value in (keypoint["x"], keypoint["y"], *keypoint["box"]))
        keypoint |= {"x": x, "y": y, "score": round(keypoint["score"], 6), "box": box}
    entry_dict = {"image": str(path), "keypoints": keypoint_list}
    return entry_dict, f"{path}  {width} x {height} px  {words}"


def predict_files(network, about_dict: dict, options, path_list: list[Path]) -> None:
    """All images, several at a time. Raises UserError if one was bad."""
    folder = options.out or options.data / "results" / "predictions"
    (folder / "labelimg" if options.xml else folder).mkdir(parents=True, exist_ok=True)
    start_time, entry_list = time.perf_counter(), []
    predict = functools.partial(predict_file, network, about_dict, options, folder)
    # A thread a core; main's set_num_threads is not theirs. Matplotlib bears one thread only.
    with ThreadPoolExecutor(1 if options.map else THREADS, initializer=torch.set_num_threads,
                            initargs=(1,)) as pool:
        for number, (entry, line) in enumerate(pool.map(predict, path_list, count(1)), start=1):
            print(f"{number}/{len(path_list)}  {line}", flush=True)
            entry_list += [entry] if entry else []
    if options.json:
        write_json(options.json, entry_list)
    count_list = [len(entry["keypoints"]) for entry in entry_list]
    empty, place = count_list.count(0), folder if options.out or not options.json else options.json
    print(f"{sum(count_list)} keypoints in {len(count_list) - empty} of {len(path_list)} images, "
          f"{empty} without any; {time.perf_counter() - start_time:.1f} s; look at {place}")
    step = command("06_model_analysis.py", options.data)
    if options.xml:
        again = command("01_prepare_data.py", options.data, "--source", "YOUR_FOLDER")
        step = (f"correct {folder / 'labelimg'}, move its files into your folder of labelled "
                f"images, and prepare that again: {again}")
    print(f"next: {step}")
    if bad := len(path_list) - len(entry_list):
        raise UserError(f"{bad} of {len(path_list)} images are bad: see the lines above")


def main() -> None:
    parser = make_parser("Find keypoints in images.", "folder with the weights")
    parser.add_argument("images", type=Path, nargs="*", help="images and folders; else DATA/sample")
    parser.add_argument("--out", type=Path, help="new folder; else DATA/results/predictions")
    parser.add_argument("--json", type=Path, help="new file; only --out then draws images, too")
    parser.add_argument("--xml", action="store_true", help="write images with LabelImg's XML")
    parser.add_argument("--map", action="store_true", help="draw the probabilities of the cells")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score, 0 to 1")
    options = parser.parse_args()
    if not 0 <= options.threshold <= 1:
        parser.error("--threshold must lie between 0 and 1")
    if options.xml and not options.out:
        parser.error("--xml needs --out: a new folder, since you will correct what it holds")
    for name, path in (("--out", options.out), ("--json", options.json)):
        if path and path.exists():
            raise UserError(f"{path}: is there already; choose a new name for {name}")
    predict_files(*model.load_weights(options.data), options, collect_images(options))


if __name__ == "__main__":
    run_main(main)
