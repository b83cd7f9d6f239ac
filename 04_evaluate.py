"""Lesson 4: how good is it? Confusion matrix, precision and recall, pixel error, speed, robustness.

    python 04_evaluate.py                  # the test split
    python 04_evaluate.py --split train    # finds labels that are probably wrong

Reads   data/weights.pt (else data/pretrained.pt), data/dataset.json and the arrays of the split.
Writes  data/results/metrics.json, confusion.png, errors.png, error_by_place.png, worst.png; label_check.png for --split train.
Time    about a minute on two CPU cores; with --quick, which leaves out robustness and shift, a few seconds.
See     precision and recall near 1, errors far below 3 px; and what a blind guess would have got, to compare with.
Next    python 05_predict.py finds keypoints in pictures of your own.
"""

import argparse
import importlib
import io
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from common import (CELL, COLOUR_LIST, DATA_FOLDER, Progress, UserError, draw_keypoints, pad_image, pick_device, read_data_set, read_image,
                    replacing, run_main, time_calls)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

PAIR_RADIUS = 10.0  # px; an answer farther than this from every keypoint is a false alarm
GOOD_ERROR = 3.0  # px; the share of errors within this is reported
MOST_PICTURES = 300  # the robustness table looks at so many at most, evenly spaced
SHIFT_PICTURES = 40  # likewise the shift test, at each of 32 shifts
SPEED_RUNS = 40  # the median of so many is quoted; a machine has always something else to do now and then
SUSPICIOUS_ERROR = 4.0  # px; a train label this far from the answer is worth a look


# ---------------------------------------------------------------- answers

@torch.inference_mode()
def answer(network, image_3d_array, max_per_class: int, threshold: float) -> np.ndarray:
    """Keypoints of one picture, `[K, 4]`: class id, x, y, score."""
    image_3d = torch.from_numpy(np.array(image_3d_array)).to(network.head.weight.device)  # a copy, uint8
    place_2d, class_id_1d, score_1d = model.detect(network, image_3d, max_per_class, threshold)
    found_2d = torch.cat((class_id_1d[:, None].float(), place_2d, score_1d[:, None]), dim=1)
    # A copy: what numpy() gives is PyTorch's memory, and thousands of small kept pieces of that hinder the reuse of the rest.
    return found_2d.cpu().numpy().copy()


def pair(found_2d_array, truth_2d_array, radius: float = PAIR_RADIUS) -> list[tuple[int, int]]:
    """Pair answers (class id, x, y, ...) with keypoints (class id, x, y) one to one, nearest first, within `radius` px.

    First those of one class, the right answers; then, among what is left, those of two classes, the confusions.

    >>> pair(np.array([[1, 5, 5], [2, 8, 8]]), np.array([[2, 5, 5], [1, 6, 5]]))
    [(0, 1), (1, 0)]
    """
    distance_2d_array = np.hypot(found_2d_array[:, None, 1] - truth_2d_array[None, :, 1],
                                 found_2d_array[:, None, 2] - truth_2d_array[None, :, 2])  # [found, truth]
    same_2d_array = found_2d_array[:, None, 0] == truth_2d_array[None, :, 0]
    pair_list, taken_found, taken_truth = [], set(), set()
    for allowed_2d_array in (same_2d_array, ~same_2d_array):
        near_2d_array = allowed_2d_array & (distance_2d_array <= radius)
        candidate_list = sorted((distance_2d_array[i, j], i, j) for i, j in zip(*np.nonzero(near_2d_array)))
        for _, i, j in candidate_list:
            if i not in taken_found and j not in taken_truth:
                taken_found.add(i)
                taken_truth.add(j)
                pair_list.append((int(i), int(j)))
    return pair_list


# ---------------------------------------------------------------- the confusion matrix and what follows from it

def confusion_matrix(found_list, truth_list, class_count: int) -> np.ndarray:
    """Rows truth, columns answer, background (0) first: a miss stands in column 0, a false alarm in row 0.

    found_list, truth_list: an array a picture, class id in column 0, x and y in 1 and 2. Background has no places that
    could be counted, so [0][0] counts the empty pictures that were left empty.
    """
    matrix = np.zeros((class_count, class_count), int)
    for found_2d_array, truth_2d_array in zip(found_list, truth_list):
        pair_list = pair(found_2d_array, truth_2d_array)
        for i, j in pair_list:
            matrix[int(truth_2d_array[j, 0]), int(found_2d_array[i, 0])] += 1
        for i in set(range(len(found_2d_array))) - {i for i, _ in pair_list}:
            matrix[0, int(found_2d_array[i, 0])] += 1  # false alarm
        for j in set(range(len(truth_2d_array))) - {j for _, j in pair_list}:
            matrix[int(truth_2d_array[j, 0]), 0] += 1  # miss
        if len(found_2d_array) == 0 and len(truth_2d_array) == 0:
            matrix[0, 0] += 1
    return matrix


def precision_recall(matrix: np.ndarray, class_id_list: list[int]) -> dict:
    """Precision, recall, F1, support of the given classes together; one class in the list gives that class.

    Precision: of the answers (columns), how many are right. Recall: of the keypoints (rows), how many were found. With
    nothing to divide by there is no such number, and None says so.

    >>> precision_recall(np.array([[5, 1, 0], [2, 7, 1], [0, 0, 4]]), [1])
    {'precision': 0.875, 'recall': 0.7, 'f1': 0.7778, 'support': 10}
    """
    right = int(matrix[class_id_list, class_id_list].sum())  # true positives, on the diagonal
    answers, keypoints = int(matrix[:, class_id_list].sum()), int(matrix[class_id_list].sum())
    return {"precision": round(right / answers, 4) if answers else None, "recall": round(right / keypoints, 4) if keypoints else None,
            "f1": round(2 * right / (answers + keypoints), 4) if answers + keypoints else None, "support": keypoints}


def right_errors(found_list, truth_list) -> tuple[np.ndarray, np.ndarray]:
    """Answer minus truth of all right pairs `[P, 2]` in px, and their keypoints `[P, 4]`: picture, class id, x, y."""
    error_list, keypoint_list = [], []
    for picture, (found_2d_array, truth_2d_array) in enumerate(zip(found_list, truth_list)):
        for i, j in pair(found_2d_array, truth_2d_array):
            if found_2d_array[i, 0] == truth_2d_array[j, 0]:
                error_list.append(found_2d_array[i, 1:3] - truth_2d_array[j, 1:3])
                keypoint_list.append((picture, *truth_2d_array[j, :3]))
    return np.array(error_list).reshape(-1, 2), np.array(keypoint_list).reshape(-1, 4)


def mean_or_none(values, digits: int = 3):
    return round(float(np.mean(values)), digits) if len(values) else None


def summarise(found_list, best_list, truth_list, category_list) -> dict:
    """All of metrics.json that needs the answers alone."""
    matrix = confusion_matrix(found_list, truth_list, len(category_list))
    error_2d_array, keypoint_2d_array = right_errors(found_list, truth_list)
    distance = np.hypot(*error_2d_array.T)
    point_list = [np.hypot(*(best_2d_array[int(class_id) - 1, 1:3] - (x, y)))
                  for best_2d_array, truth_2d_array in zip(best_list, truth_list) for class_id, x, y in truth_2d_array[:, :3]]
    class_dict = {}
    for class_id, name in enumerate(category_list[1:], start=1):
        own = distance[keypoint_2d_array[:, 1] == class_id]
        p95 = round(float(np.percentile(own, 95)), 3) if len(own) else None
        class_dict[name] = {**precision_recall(matrix, [class_id]), "error_px": {"mean": mean_or_none(own), "p95": p95}}
    error_dict = {"mean": mean_or_none(distance)}
    for name, percentile in (("median", 50), ("p90", 90), ("p95", 95), ("p99", 99), ("max", 100)):
        error_dict[name] = round(float(np.percentile(distance, percentile)), 3) if len(distance) else None
    error_dict["within_3px"] = mean_or_none(distance <= GOOD_ERROR, 4)
    error_dict["bias"] = [round(float(b), 3) for b in error_2d_array.mean(axis=0)] if len(distance) else None
    error_dict["all_points"] = mean_or_none(point_list)
    return {"images": len(truth_list), "classes": class_dict, "overall": precision_recall(matrix, list(range(1, len(category_list)))),
            "confusion_matrix": matrix.tolist(), "error_px": error_dict}


def blind_guess(train_label_2d_array, truth_list, category_list) -> dict:
    """What one gets without looking: in every picture, each class at its median place in the training split."""
    place_dict = {class_id: np.median(train_label_2d_array[train_label_2d_array[:, 1] == class_id, 2:], axis=0)
                  for class_id in range(1, len(category_list)) if (train_label_2d_array[:, 1] == class_id).any()}
    guess_2d_array = np.array([(class_id, *place) for class_id, place in place_dict.items()]).reshape(-1, 3)
    matrix = confusion_matrix([guess_2d_array] * len(truth_list), truth_list, len(category_list))
    result = precision_recall(matrix, list(range(1, len(category_list))))
    distance_list = [np.hypot(*(place_dict[int(class_id)] - (x, y))) for truth_2d_array in truth_list
                     for class_id, x, y in truth_2d_array[:, :3] if int(class_id) in place_dict]
    return {"precision": result["precision"], "recall": result["recall"], "error_px": mean_or_none(distance_list)}


# ---------------------------------------------------------------- robustness

def jpeg_again(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def tint(image: Image.Image, red: float, blue: float) -> Image.Image:
    """Colour temperature: a factor for red and one for blue, by a table of 256 entries a channel."""
    return image.point([min(255, round(v * factor)) for factor in (red, 1, blue) for v in range(256)])


def add_noise(image: Image.Image, spread: float) -> Image.Image:
    array = np.asarray(image, np.float32)
    noise = np.random.default_rng(array.shape[0]).normal(0, spread, array.shape)
    return Image.fromarray((array + noise).clip(0, 255).astype(np.uint8))


# Fixed changes of one picture, on purpose not the code of 03_train.py: a test must not share code with the training.
CHANGE_DICT = {
    "as it is": lambda image: image,
    "darker, x 0.8": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "brighter, x 1.2": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "less contrast, x 0.8": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "more contrast, x 1.2": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "warmer": lambda image: tint(image, 1.08, 0.9),
    "cooler": lambda image: tint(image, 0.92, 1.1),
    "blur, sigma 1 px": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "noise, sigma 6": lambda image: add_noise(image, 6),
    "JPEG quality 50": lambda image: jpeg_again(image, 50),
}


def robustness(network, images_4d_array, truth_list, about_dict, threshold: float) -> dict:
    """Precision, recall and mean error under each slight change of the surroundings."""
    index_list = np.unique(np.linspace(0, len(truth_list) - 1, min(MOST_PICTURES, len(truth_list))).astype(int))
    chosen_truth_list = [truth_list[index] for index in index_list]
    class_id_list = list(range(1, len(about_dict["category_list"])))
    progress = Progress(len(CHANGE_DICT) * len(index_list), "robustness")
    result_dict = {}
    for number, (name, change) in enumerate(CHANGE_DICT.items()):
        found_list = []
        for done, index in enumerate(index_list, start=1):
            changed = np.asarray(change(Image.fromarray(images_4d_array[index])))
            found_list.append(answer(network, changed, about_dict["max_per_class"], threshold))
            progress.show(number * len(index_list) + done)
        matrix = confusion_matrix(found_list, chosen_truth_list, len(class_id_list) + 1)
        overall = precision_recall(matrix, class_id_list)
        error_2d_array, _ = right_errors(found_list, chosen_truth_list)
        result_dict[name] = {"precision": overall["precision"], "recall": overall["recall"],
                             "mean_error_px": mean_or_none(np.hypot(*error_2d_array.T))}
    return result_dict


def shift_test(network, images_4d_array, truth_list, about_dict, threshold: float) -> dict:
    """Shift the picture by 0 to 31 px right and down and the answer back: what remains depends on the place in the cell.

    Edge pixels are repeated, so that nothing leaves the picture. std_px: spread of one point's answers round their mean;
    max_px: the farthest that one lies from it; lost: the share of answers that were not there.
    """
    with_keypoint = [index for index, truth in enumerate(truth_list) if len(truth)]
    picture_count = min(SHIFT_PICTURES, len(with_keypoint))
    index_list = [with_keypoint[i] for i in np.linspace(0, len(with_keypoint) - 1, picture_count).astype(int)]
    height, width = (side + CELL for side in images_4d_array.shape[1:3])
    square_list, lost, wanted = [], 0, 0
    progress = Progress(len(index_list), "shift test")
    for done, index in enumerate(index_list, start=1):
        place_dict = {j: [] for j in range(len(truth_list[index]))}
        for shift in range(CELL):
            right, down = shift, shift * 7 % CELL  # 7 and 32 have no common divisor: down takes each value once, too
            shifted = np.pad(images_4d_array[index], ((down, 0), (right, 0), (0, 0)), mode="edge")
            found_2d_array = answer(network, pad_image(shifted, height, width), about_dict["max_per_class"], threshold)
            found_2d_array = found_2d_array - (0, right, down, 0)
            for i, j in pair(found_2d_array, truth_list[index]):
                if found_2d_array[i, 0] == truth_list[index][j, 0]:
                    place_dict[j].append(found_2d_array[i, 1:3])
        for place_list in place_dict.values():
            wanted += CELL
            lost += CELL - len(place_list)
            if place_list:
                square_list += list(np.square(place_list - np.mean(place_list, axis=0)).sum(axis=1))
        progress.show(done)
    return {"std_px": round(float(np.sqrt(np.mean(square_list))), 3) if square_list else None,
            "max_px": round(float(np.sqrt(np.max(square_list))), 3) if square_list else None,
            "lost": round(lost / wanted, 4) if wanted else None}


# ---------------------------------------------------------------- speed

def median_ms(function, device) -> float:
    """Median time of a call, in ms: what one has to expect."""
    return statistics.median(time_calls(function, device, SPEED_RUNS))


def speed(network, image_3d_array, about_dict) -> dict:
    """Decoding a JPEG, the network alone, and picture file to keypoints, in ms; and the network's multiply-adds.

    floor_ms: how long they would take at the rate of a matrix product.
    """
    device = network.head.weight.device
    buffer = io.BytesIO()
    Image.fromarray(image_3d_array).save(buffer, "JPEG", quality=90)
    image_4d = torch.from_numpy(np.array(image_3d_array)).to(device).permute(2, 0, 1)[None]  # uint8 [1, 3, 1920, 320]

    def from_file():
        buffer.seek(0)
        return model.find_keypoints(network, about_dict, read_image(buffer))

    def decode_file():
        buffer.seek(0)
        return read_image(buffer)

    with torch.inference_mode():
        network_ms = median_ms(lambda: network(image_4d), device)
    matrix_2d = torch.rand(1024, 1024, device=device)
    matmul_ms = median_ms(lambda: matrix_2d @ matrix_2d, device)
    multiply_adds = model.multiply_adds(*image_3d_array.shape[:2], len(about_dict["category_list"]))
    picture_ms = median_ms(from_file, device)
    return {"decode_ms": round(median_ms(decode_file, device), 2), "network_ms": round(network_ms, 2), "picture_ms": round(picture_ms, 2),
            "pictures_per_second": round(1000 / picture_ms, 1), "multiply_adds": multiply_adds,
            "matmul_rate": round(1024 ** 3 / matmul_ms / 1e6, 1), "floor_ms": round(multiply_adds / 1024 ** 3 * matmul_ms, 2)}


# ---------------------------------------------------------------- pictures

def draw_plots(folder: Path, metrics: dict, category_list, error_2d_array, keypoint_2d_array) -> None:
    import matplotlib
    matplotlib.use("Agg")  # draws into files; needs no screen
    import matplotlib.pyplot as plt

    def save(figure, name):
        with replacing(folder / name) as temporary:
            figure.savefig(temporary, dpi=110)
        plt.close(figure)

    matrix = np.array(metrics["confusion_matrix"])
    side = 2.5 + 0.45 * max(4, len(category_list))
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(matrix):
        if value:
            axes.text(column, row, str(value), ha="center", va="center", color="white" if share[row, column] > 0.5 else "black")
    name_list = [name.replace("$", "\\$") for name in category_list]
    axes.set_xticks(range(len(category_list)), name_list, rotation=90 if len(category_list) > 4 else 0)
    axes.set_yticks(range(len(category_list)), name_list)
    axes.set(xlabel="answer (background: missed)", ylabel="truth (background: false alarm)", title="confusion matrix")
    save(figure, "confusion.png")

    distance = np.hypot(*error_2d_array.T)
    if not len(distance):  # nothing to draw, and what an earlier evaluation drew would mislead
        for name in ("errors.png", "error_by_place.png"):
            (folder / name).unlink(missing_ok=True)
        return
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.hist(distance, bins=np.linspace(0, max(np.percentile(distance, 99.5), 0.1), 60), color="tab:blue")
    for name, style in (("mean", "-"), ("p95", "--")):
        axes.axvline(metrics["error_px"][name], color="black", linestyle=style, label=f"{name} {metrics['error_px'][name]:.2f} px")
    axes.set(xlabel="error in px", ylabel="keypoints", title=f"localisation error of {len(distance)} keypoints")
    axes.legend()
    save(figure, "errors.png")

    # By place in the cell: a half-pixel mistake shows as arrows that all point one way, a seam as dark squares at the rim.
    bins = 8
    column, row = ((keypoint_2d_array[:, i] % CELL / CELL * bins).astype(int) for i in (2, 3))
    mean_2d_array, arrow_3d_array = np.full((bins, bins), np.nan), np.full((2, bins, bins), np.nan)
    for i in range(bins):
        for j in range(bins):
            here = (row == i) & (column == j)
            if here.any():
                mean_2d_array[i, j] = distance[here].mean()
                arrow_3d_array[:, i, j] = error_2d_array[here].mean(axis=0)
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    image = axes.imshow(mean_2d_array, cmap="viridis", extent=(0, CELL, CELL, 0), vmin=0)
    figure.colorbar(image, label="mean error, px")
    centre = (np.arange(bins) + 0.5) * CELL / bins
    axes.quiver(centre, centre, *arrow_3d_array, angles="xy", scale_units="xy", scale=distance.mean() / 4, color="white", width=0.005)
    axes.set(xlabel="x mod 32", ylabel="y mod 32", title=f"error by place in the cell\n(an arrow of 4 px here is {distance.mean():.2f} px)")
    save(figure, "error_by_place.png")


def draw_cases(path: Path, images_4d_array, case_list, category_list) -> None:
    """Close-ups: truth in white, answer in colour. A case: (title, picture, truth row or None, found row or None)."""
    tile, columns = 200, 5
    sheet = Image.new("RGB", (columns * (tile + 6) + 6, max(1, -(-len(case_list) // columns)) * (tile + 26) + 6), "white")
    for number, (title, picture, truth, found) in enumerate(case_list):
        point = truth if truth is not None else found
        x, y = round(float(point[1])), round(float(point[2]))
        keypoint_list = []
        for row, colour in ((truth, "#ffffff"), (found, COLOUR_LIST[(int(found[0]) - 1) % len(COLOUR_LIST)] if found is not None else "")):
            if row is not None:
                px, py = (float(row[1]) - x + 33) * 3, (float(row[2]) - y + 33) * 3
                keypoint_list.append({"class": category_list[int(row[0])], "x": px, "y": py, "box": [px - 45, py - 45, px + 45, py + 45],
                                      "colour": colour})
        crop = Image.fromarray(images_4d_array[picture]).crop((x - 33, y - 33, x + 34, y + 34))
        crop = crop.resize((201, 201), Image.Resampling.NEAREST)
        left, top = 6 + number % columns * (tile + 6), 6 + number // columns * (tile + 26)
        sheet.paste(draw_keypoints(crop, keypoint_list).crop((0, 0, tile, tile)), (left, top + 20))
        ImageDraw.Draw(sheet).text((left, top), title, fill="black", font=ImageFont.load_default(size=13))
    with replacing(path) as temporary:
        sheet.save(temporary)


def worst_cases(found_list, truth_list) -> list:
    """Misses, false alarms and confusions first, then the largest errors."""
    wrong_list, error_list = [], []
    for picture, (found_2d_array, truth_2d_array) in enumerate(zip(found_list, truth_list)):
        pair_list = pair(found_2d_array, truth_2d_array)
        for i, j in pair_list:
            found, truth = found_2d_array[i], truth_2d_array[j]
            distance = float(np.hypot(*(found[1:3] - truth[1:3])))
            if found[0] != truth[0]:
                wrong_list.append((f"{picture}: confusion, {found[3]:.2f}", picture, truth, found))
            else:
                error_list.append((distance, (f"{picture}: {distance:.2f} px", picture, truth, found)))
        wrong_list += [(f"{picture}: false alarm, {found_2d_array[i, 3]:.2f}", picture, None, found_2d_array[i])
                       for i in sorted(set(range(len(found_2d_array))) - {i for i, _ in pair_list})]
        wrong_list += [(f"{picture}: miss", picture, truth_2d_array[j], None)
                       for j in sorted(set(range(len(truth_2d_array))) - {j for _, j in pair_list})]
    error_list.sort(key=lambda item: -item[0])
    return (wrong_list[:15] + [case for _, case in error_list])[:20]


def suspicious_labels(found_list, truth_list, category_list) -> list:
    """Train labels that disagree most with the answers: (suspicion, sentence, picture, truth row, found row), worst first."""
    result_list = []
    for picture, (found_2d_array, truth_2d_array) in enumerate(zip(found_list, truth_list)):
        pair_list = pair(found_2d_array, truth_2d_array)
        free_found = set(range(len(found_2d_array))) - {i for i, _ in pair_list}
        free_truth = set(range(len(truth_2d_array))) - {j for _, j in pair_list}
        # What is left may be a label that was moved far: so the same class is paired at any distance here.
        for i in sorted(free_found):
            same = [j for j in free_truth if truth_2d_array[j, 0] == found_2d_array[i, 0]]
            if same:
                j = min(same, key=lambda j: np.hypot(*(found_2d_array[i, 1:3] - truth_2d_array[j, 1:3])))
                pair_list.append((i, j))
                free_found, free_truth = free_found - {i}, free_truth - {j}
        for i, j in pair_list:
            found, truth = found_2d_array[i], truth_2d_array[j]
            distance = float(np.hypot(*(found[1:3] - truth[1:3])))
            names = category_list[int(truth[0])], category_list[int(found[0])]
            if names[0] != names[1]:
                result_list.append((1 + found[3], f"swapped? labelled {names[0]}, looks like {names[1]}", picture, truth, found))
            elif distance > SUSPICIOUS_ERROR:
                suspicion = found[3] * min(distance / PAIR_RADIUS, 2)
                result_list.append((suspicion, f"moved? {names[0]} is {distance:.1f} px off", picture, truth, found))
        for i in free_found:
            found = found_2d_array[i]
            result_list.append((found[3], f"missing? {category_list[int(found[0])]}, score {found[3]:.2f}", picture, None, found))
        for j in free_truth:
            truth = truth_2d_array[j]
            result_list.append((0.5, f"not there? {category_list[int(truth[0])]} was not found", picture, truth, None))
    return sorted(result_list, key=lambda item: -item[0])


# ---------------------------------------------------------------- report

def cell_text(value, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def print_report(metrics: dict, category_list) -> None:
    print(f"\n{'class':20}{'precision':>10}{'recall':>9}{'F1':>9}{'support':>9}{'mean px':>9}{'p95 px':>9}")
    for name, row in (*metrics["classes"].items(), ("overall", {**metrics["overall"], "error_px": metrics["error_px"]})):
        print(f"{name[:19]:20}{cell_text(row['precision']):>10}{cell_text(row['recall']):>9}{cell_text(row['f1']):>9}{row['support']:>9}"
              f"{cell_text(row['error_px']['mean']):>9}{cell_text(row['error_px']['p95']):>9}")
    if len(category_list) <= 8:
        print("\nconfusion matrix: rows truth, columns answer; column background: misses, row background: false alarms")
        print(" " * 20 + "".join(f"{name[:11]:>12}" for name in category_list))
        for name, row in zip(category_list, metrics["confusion_matrix"]):
            print(f"{name[:19]:20}" + "".join(f"{value:12}" for value in row))
    error = metrics["error_px"]
    print("\nerror in px: " + ", ".join(f"{name} {cell_text(error[name])}" for name in ("mean", "median", "p90", "p95", "p99", "max"))
          + f"; within 3 px {cell_text(error['within_3px'], 4)}; bias {error['bias']}; all labels, missed ones too {cell_text(error['all_points'])}")
    guess = metrics["blind_guess"]
    print(f"a blind guess: precision {cell_text(guess['precision'])}, recall {cell_text(guess['recall'])}, error {cell_text(guess['error_px'], 1)} px")
    rate = metrics["speed"]
    print(f"speed: decoding {rate['decode_ms']} ms, network {rate['network_ms']} ms, file to keypoints {rate['picture_ms']} ms = "
          f"{rate['pictures_per_second']} pictures a second\n"
          f"       {rate['multiply_adds'] / 1e6:.0f} million multiply-adds; a 1024 x 1024 matrix product runs at {rate['matmul_rate']:.0f} billion "
          f"a second here: at that rate they take {rate['floor_ms']} ms")
    if metrics["robustness"]:
        print(f"\n{'change':24}{'precision':>10}{'recall':>9}{'mean px':>9}")
        for name, row in metrics["robustness"].items():
            print(f"{name:24}{cell_text(row['precision']):>10}{cell_text(row['recall']):>9}{cell_text(row['mean_error_px']):>9}")
        shift = metrics["shift"]
        print(f"shifted by 0 to 31 px: std {cell_text(shift['std_px'])} px, max {cell_text(shift['max_px'])} px, lost {cell_text(shift['lost'], 4)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the trained network on the test or train split.")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER, help="folder with data set and weights (default: data)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which split (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of an answer, 0 to 1 (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="leave out robustness and shift test (default: do them)")
    options = parser.parse_args()
    if not 0 <= options.threshold <= 1:
        parser.error("--threshold must lie between 0 and 1")
    weights_path = model.find_weights(options.data)
    print(f"using {weights_path}")
    network, about_dict = model.load_weights(weights_path, pick_device())
    network = model.fold_batch_norm(network)
    dataset_dict, array_dict = read_data_set(options.data)
    category_list = dataset_dict["category_list"]
    if category_list != about_dict["category_list"]:
        raise UserError(f"{weights_path}: knows {about_dict['category_list'][1:]}, the data set has {category_list[1:]}; "
                        "train on it with 03_train.py")
    images_4d_array, label_2d_array = array_dict[options.split]
    truth_list = [label_2d_array[label_2d_array[:, 0] == index, 1:] for index in range(len(images_4d_array))]  # class id, x, y

    found_list, best_list = [], []
    progress = Progress(len(images_4d_array), "answering")
    for done, image_3d_array in enumerate(images_4d_array, start=1):
        found_list.append(answer(network, image_3d_array, about_dict["max_per_class"], options.threshold))
        best_list.append(answer(network, image_3d_array, 1, 0.0))  # each class where it would be if one had to say
        progress.show(done)
    metrics = summarise(found_list, best_list, truth_list, category_list)
    metrics["blind_guess"] = blind_guess(array_dict["train"][1], truth_list, category_list)
    metrics["speed"] = speed(network, images_4d_array[0], about_dict)
    metrics["robustness"], metrics["shift"] = {}, {}
    if not options.quick:
        metrics["robustness"] = robustness(network, images_4d_array, truth_list, about_dict, options.threshold)
        metrics["shift"] = shift_test(network, images_4d_array, truth_list, about_dict, options.threshold)
    print_report(metrics, category_list)

    folder = options.data / "results"
    suffix = "" if options.split == "test" else "_train"
    with replacing(folder / f"metrics{suffix}.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1, ensure_ascii=False), encoding="utf-8")
    draw_plots(folder, metrics, category_list, *right_errors(found_list, truth_list))
    draw_cases(folder / "worst.png", images_4d_array, worst_cases(found_list, truth_list), category_list)
    if options.split == "train":
        suspicious_list = suspicious_labels(found_list, truth_list, category_list)
        print(f"\n{len(suspicious_list)} labels disagree with the answers; the first of them (open them in LabelImg):")
        file_list = dataset_dict["train"]["file_list"]
        for _, sentence, picture, truth, found in suspicious_list[:20]:
            point = truth if truth is not None else found
            print(f"  {file_list[picture]}  x {point[1]:.0f} y {point[2]:.0f}  {sentence}")
        draw_cases(folder / "label_check.png", images_4d_array,
                   [(sentence.split("?")[0] + f"? {file_list[picture]}"[:24], picture, truth, found)
                    for _, sentence, picture, truth, found in suspicious_list[:20]], category_list)
    print(f"\nwrote metrics{suffix}.json and pictures to {folder}\nnext: python 05_predict.py PICTURE_OR_FOLDER")


if __name__ == "__main__":
    run_main(main)
