"""A baseline: the drawing's own shapes, laid over every place of an image. Nothing is learned.

    python data/template_matching.py

Reads   the data set and the weights. Writes nothing. Takes some minutes.
See     templates and network on the test split, on its plain and its faint half, where both found.
"""

import importlib
import math
import sys
import time
from pathlib import Path

import numpy as np

# Python looks for modules in this script's folder, data/; the others lie one above it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import draw_pictures
from common import make_parser, print_table, run_main

evaluate = importlib.import_module("04_evaluate")
HALF = 20  # px, half a template's side
DISC_2D_ARRAY = np.hypot(*(np.mgrid[:2 * HALF, :2 * HALF] + 0.5 - HALF)) < 16  # what is compared
SHAPE = draw_pictures.HEIGHT + 2 * HALF, draw_pictures.WIDTH + 2 * HALF
DISC_SPECTRUM_2D_ARRAY = np.fft.rfft2(DISC_2D_ARRAY.astype(np.float32), SHAPE).conj()


def make_templates():
    """(class id, spectrum) of 15 poses a class, each with mean 0 and length 1 on the disc."""
    for class_id, name in enumerate(draw_pictures.MARK_LIST, start=1):
        for turn, size in [(t, s) for t in (-20, -10, 0, 10, 20) for s in (0.85, 1, 1.15)]:
            image_3d_array = np.zeros((2 * HALF, 2 * HALF, 3), np.uint8)
            draw_pictures.paint(image_3d_array, HALF, HALF, name, np.full(3, 255),
                                math.radians(turn), size)
            mark_2d_array = image_3d_array[:, :, 0] - image_3d_array[DISC_2D_ARRAY].mean()
            mark_2d_array *= DISC_2D_ARRAY
            mark_2d_array /= np.linalg.norm(mark_2d_array)
            yield class_id, np.fft.rfft2(mark_2d_array.astype(np.float32), SHAPE).conj()


def find_marks(number, image_3d_array, template_list):
    """The best place of each class, as 04's Keypoints; the score is the correlation, 0 to 1."""
    grey_2d_array = np.pad(image_3d_array.mean(axis=2, dtype=np.float32), HALF, mode="edge")
    spectrum_2d_array = np.fft.rfft2(grey_2d_array)
    # One product of spectra gives the sums over a template, or over the disc, at all places.
    total_2d_array = np.fft.irfft2(spectrum_2d_array * DISC_SPECTRUM_2D_ARRAY, SHAPE)
    square_2d_array = np.fft.rfft2(grey_2d_array ** 2)
    square_2d_array = np.fft.irfft2(square_2d_array * DISC_SPECTRUM_2D_ARRAY, SHAPE)
    count = DISC_2D_ARRAY.sum()  # px; where grey changes by less than 3, there is only noise:
    length_2d_array = np.sqrt(np.maximum(square_2d_array - total_2d_array ** 2 / count, 9 * count))
    best_dict = {}
    for class_id, template_2d_array in template_list:
        score_2d_array = np.abs(np.fft.irfft2(spectrum_2d_array * template_2d_array, SHAPE))
        score_2d_array = (score_2d_array / length_2d_array)[:-2 * HALF, :-2 * HALF]
        inside_2d_array = score_2d_array[1:-1, 1:-1]
        y, x = np.unravel_index(inside_2d_array.argmax(), inside_2d_array.shape)
        near_2d_array = score_2d_array[y:y + 3, x:x + 3]
        if class_id not in best_dict or near_2d_array[1, 1] > best_dict[class_id].score:
            # Between pixels: where the parabola through three values is highest.
            dx, dy = ((low - high) / 2 / (low - 2 * middle + high - 1e-9)
                      for low, middle, high in (near_2d_array[1], near_2d_array[:, 1]))
            best_dict[class_id] = evaluate.Keypoint(number, class_id, x + 1 + dx, y + 1 + dy,
                                                    near_2d_array[1, 1])
    return list(best_dict.values())


def main():
    options = make_parser("Match templates.", "folder with data set and weights").parse_args()
    template_list = list(make_templates())
    for split in ("val", "test"):
        network, about_dict, image_list, truths_list, _ = evaluate.load(options.data, split)
        start_time = time.perf_counter()
        found_list = [find_marks(number, image_3d_array, template_list)
                      for number, image_3d_array in enumerate(image_list)]
        ms = (time.perf_counter() - start_time) / len(image_list) * 1e3
        if split == "val":  # the threshold with the best F1 is chosen here
            curve_2d_array = evaluate.precision_recall_curve(truths_list, found_list, 3)
            f1_1d_array = curve_2d_array[:, 1:].prod(axis=1) / curve_2d_array[:, 1:].sum(axis=1)
            threshold = curve_2d_array[np.nanargmax(f1_1d_array), 0]
    pairs_dict = {"templates": evaluate.pair_all(truths_list, found_list, threshold),
                  "network": evaluate.pair_all(truths_list, evaluate.predict(
                      network, about_dict, image_list), 0.5)}
    faintest_dict, right_list = {}, []  # of each image with marks, the least contrast
    for number, x, y in [(one.image, int(one.x), int(one.y)) for one in sum(truths_list, [])]:
        spread = image_list[number][y - 6:y + 6, x - 6:x + 6].std()
        faintest_dict[number] = min(spread, faintest_dict.get(number, math.inf))
    for pair_list in pairs_dict.values():
        right_list.append({truth for truth, found in pair_list
                           if truth and found and truth.class_id == found.class_id})
    both_set, middle = right_list[0] & right_list[1], np.median(list(faintest_dict.values()))
    row_list = [("", "precision", "recall", "F1", "mean px")]
    plain_dict = {number: spread >= middle for number, spread in faintest_dict.items()}
    for part, is_in in (
            ("all", lambda truth, number: True),
            ("plain half", lambda truth, number: plain_dict.get(number, False)),
            ("faint half", lambda truth, number: not plain_dict.get(number, True)),
            ("found by both", lambda truth, number: truth in both_set)):
        for name, pair_list in pairs_dict.items():
            own_list = [(truth, found) for truth, found in pair_list
                        if is_in(truth, (truth or found).image)]
            *rate_list, _ = evaluate.overall(own_list, 3).values()
            mean = evaluate.error_px(evaluate.right_errors(own_list, scale=1))["mean"]
            row_list.append((f"{part}: {name}", *rate_list, mean))
    print_table(row_list)
    print(f"threshold {threshold:.2f}, chosen on val; {ms:.0f} ms an image, the network "
          f"{evaluate.speed(network, about_dict, image_list[0])['picture_ms']:.0f} ms")


if __name__ == "__main__":
    run_main(main)
