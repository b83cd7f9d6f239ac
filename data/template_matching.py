"""The opponent: the drawing's own shapes, laid over every place of an image. Nothing is learned.

    python data/template_matching.py

Reads   the data set. Writes nothing. Takes some minutes.
See     precision, recall, F1 and mean error in px on the test split, and on the half of its images
        whose marks are plain or hard to see, by the contrast of the faintest.
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
from common import make_parser, print_table, read_data_set, run_main

evaluate = importlib.import_module("04_evaluate")
HALF = 20  # px, half a template's side
DISC_2D_ARRAY = np.hypot(*(np.mgrid[:2 * HALF, :2 * HALF] + 0.5 - HALF)) < 16  # what is compared


def make_templates(shape):
    """(class id, spectrum) of 15 poses a class, each with mean 0 and length 1 on the disc."""
    template_list = []
    for class_id, name in enumerate(draw_pictures.MARK_LIST, start=1):
        for turn, size in [(t, s) for t in (-20, -10, 0, 10, 20) for s in (0.85, 1, 1.15)]:
            image_3d_array = np.zeros((2 * HALF, 2 * HALF, 3), np.uint8)
            draw_pictures.paint(image_3d_array, HALF, HALF, name, np.full(3, 255),
                                math.radians(turn), size)
            mark_2d_array = image_3d_array[:, :, 0] - image_3d_array[DISC_2D_ARRAY].mean()
            mark_2d_array *= DISC_2D_ARRAY
            mark_2d_array /= np.linalg.norm(mark_2d_array)
            template_list.append((class_id, np.fft.rfft2(mark_2d_array, shape).conj()))
    return template_list


def find_marks(number, image_3d_array, template_list, disc_2d_array):
    """The best place of each class, as 04's Keypoints; the score is the correlation, 0 to 1."""
    grey_2d_array = np.pad(image_3d_array.mean(axis=2), HALF, mode="edge")
    spectrum_2d_array, shape = np.fft.rfft2(grey_2d_array), grey_2d_array.shape
    # One product of spectra gives the sums over a template, or over the disc, at all places.
    total_2d_array = np.fft.irfft2(spectrum_2d_array * disc_2d_array, shape)
    square_2d_array = np.fft.irfft2(np.fft.rfft2(grey_2d_array ** 2) * disc_2d_array, shape)
    count = DISC_2D_ARRAY.sum()  # px; where grey changes by less than 3, there is only noise:
    length_2d_array = np.sqrt(np.maximum(square_2d_array - total_2d_array ** 2 / count, 9 * count))
    best_dict = {}
    for class_id, template_2d_array in template_list:
        score_2d_array = np.abs(np.fft.irfft2(spectrum_2d_array * template_2d_array, shape))
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
    options = make_parser("Match templates.", "folder with the data set").parse_args()
    _, array_dict = read_data_set(options.data)
    shape = [side + 2 * HALF for side in array_dict["val"][0].shape[1:3]]
    template_list, disc_2d_array = make_templates(shape), np.fft.rfft2(DISC_2D_ARRAY, shape).conj()
    for split in ("val", "test"):
        images_4d_array, label_2d_array = array_dict[split]
        start_time = time.perf_counter()
        answers_list = [find_marks(number, image_3d_array, template_list, disc_2d_array)
                        for number, image_3d_array in enumerate(images_4d_array)]
        ms = (time.perf_counter() - start_time) / len(images_4d_array) * 1e3
        truths_list, faintest_list = [[] for _ in images_4d_array], [math.inf] * len(answers_list)
        for number, class_id, x, y in label_2d_array.tolist():
            number, left, top = int(number), int(x) - 6, int(y) - 6
            truths_list[number].append(evaluate.Keypoint(number, int(class_id), x, y))
            spread = images_4d_array[number, top:top + 12, left:left + 12].std()
            faintest_list[number] = min(faintest_list[number], spread)
        if split == "val":  # the threshold is chosen here
            threshold = max(np.arange(0.4, 0.95, 0.01), key=lambda least: evaluate.overall(
                evaluate.pair_all(truths_list, answers_list, least), 3)["f1"])
    order_list, row_list = np.argsort(faintest_list), []
    marked = len(order_list) - faintest_list.count(math.inf)  # images with marks come first
    for part, number_list in (("all", order_list), ("plain half", order_list[marked // 2:marked]),
                              ("hard half", order_list[:marked // 2])):
        pair_list = evaluate.pair_all([truths_list[number] for number in number_list],
                                      [answers_list[number] for number in number_list], threshold)
        *rate_list, _ = evaluate.overall(pair_list, 3).values()
        mean = evaluate.error_px(evaluate.right_errors(pair_list, scale=1))["mean"]
        row_list.append((part, *rate_list, mean))
    print_table([("", "precision", "recall", "F1", "mean px"), *row_list])
    print(f"threshold {threshold:.2f}, chosen on val; {ms:.0f} ms an image")


if __name__ == "__main__":
    run_main(main)
