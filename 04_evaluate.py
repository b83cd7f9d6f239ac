"""Lesson 4: how good is it? Precision and recall, confusion matrix, pixel error, robustness.

    python 04_evaluate.py                  # the test split: the final figures
    python 04_evaluate.py --split val      # to choose settings and threshold by, so test stays new
    python 04_evaluate.py --split train    # finds labels that are probably wrong

Reads   data/weights.pt (else data/pretrained.pt), and what 01_prepare_data.py wrote.
Writes  data/results/metrics.json, confusion.png, precision_recall.png, errors.png, worst.png; for
        another split metrics_val.json and so on.
Time    half a minute on two CPU cores; a few seconds with --quick, which leaves out robustness.
See     how many keypoints were found, how far off they are, and the worst cases with their files.
Next    python 05_predict.py finds keypoints in images of your own.
"""

import importlib
import io
import json
import math
import os
import timeit
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image, ImageEnhance, ImageFilter

from common import (COLOUR_LIST, UserError, command, make_parser, names_to_draw, print_table,
                    read_data_set, read_image, resize_image, run_main, write_json)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

PAIR_RADIUS = 10.0  # px of the network's images; farther apart, label and prediction are no pair
CHANGED_IMAGES = 100  # the most that each row of the robustness table looks at
SPEED_RUNS = 20  # of which the median is told: a machine always has something else to do
THREADS = min(4, os.cpu_count() or 1)  # images at the same time; each takes memory
WORST_CASES = 20  # the most that are shown

# A label or a prediction: number of the image in the split, class, place in px of the network's
# images, and a probability. Labels have no score of their own.
Keypoint = namedtuple("Keypoint", "image class_id x y score", defaults=[1.0])


def predict(network, about_dict, image_list, change=lambda image: image):
    """For each image, uint8 `[H, W, 3]`, its list of Keypoints, however low their scores are;
    `change` is done to the Pillow image before the network sees it.
    """
    def find(number):
        image = change(Image.fromarray(image_list[number]))
        found_list, _ = model.find_keypoints(network, about_dict, np.asarray(image), threshold=0.0)
        return [Keypoint(number, about_dict["category_list"].index(found["class"]), found["x"],
                         found["y"], found["score"]) for found in found_list]

    # PyTorch, numpy and Pillow let go of Python's lock while they compute: an image for each core
    # takes less time than all cores for one. Each thread must be told: main's setting is not its.
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(find, range(len(image_list))))


def pair(truth_list, prediction_list):
    """Pair an image's labels and predictions: a list of (truth, prediction), None for nobody.

    One to one, at most 10 px apart, nearest first: first those of one class (true positives), then,
    among what is left, those of two classes (confusions). A label without a partner is missed
    (false negative), a prediction without one is a false alarm (false positive).

    >>> label, near, far = Keypoint(0, 1, 50, 50), Keypoint(0, 1, 50, 53), Keypoint(0, 1, 58, 50)
    >>> pair([label], [far, near]) == [(label, near), (None, far)]
    True
    """
    candidate_list = []  # all that are near enough: of two classes? distance, places in the lists
    for t, truth in enumerate(truth_list):
        for p, prediction in enumerate(prediction_list):
            distance = math.hypot(truth.x - prediction.x, truth.y - prediction.y)
            if distance <= PAIR_RADIUS:
                candidate_list.append((truth.class_id != prediction.class_id, distance, t, p))
    pair_list = []
    missed_dict, alarm_dict = dict(enumerate(truth_list)), dict(enumerate(prediction_list))
    for _, _, t, p in sorted(candidate_list):  # False comes before True, then the nearest
        if t in missed_dict and p in alarm_dict:  # neither has a partner yet
            pair_list.append((missed_dict.pop(t), alarm_dict.pop(p)))
    pair_list += [(truth, None) for truth in missed_dict.values()]
    return pair_list + [(None, prediction) for prediction in alarm_dict.values()]


def pair_all(truths_list, predictions_list, threshold):
    """The pairs of all images; a prediction counts if its score reaches the threshold."""
    least = float(np.float32(threshold))  # as decode compares: scores are 32-bit numbers
    pair_list = []
    for truth_list, prediction_list in zip(truths_list, predictions_list):
        pair_list += pair(truth_list, [found for found in prediction_list if found.score >= least])
    return pair_list


def confusion_matrix(pair_list, class_count):
    """Rows truth, columns prediction; nobody is background: column 0 misses, row 0 false alarms."""
    matrix_2d_array = np.zeros((class_count, class_count), int)
    for truth, prediction in pair_list:
        row, column = (point.class_id if point else 0 for point in (truth, prediction))
        matrix_2d_array[row, column] += 1
    return matrix_2d_array


def precision_recall(matrix_2d_array, class_id_list):
    """Precision, recall, F1 and support (labels) of one class, or of several together.

    Precision: the share of the predictions (columns) that are right. Recall: the share of the
    labels (rows) that were found. F1: their harmonic mean. Several classes: add up, then divide.

    >>> precision_recall(np.array([[5, 1, 0], [2, 7, 1], [0, 0, 4]]), [1])
    {'precision': 0.875, 'recall': 0.7, 'f1': 0.7777777777777778, 'support': 10}
    """
    right = int(matrix_2d_array[class_id_list, class_id_list].sum())  # true positives: the diagonal
    predictions = int(matrix_2d_array[:, class_id_list].sum())
    labels = int(matrix_2d_array[class_id_list].sum())
    return {"precision": share(right, predictions), "recall": share(right, labels),
            "f1": share(2 * right, predictions + labels), "support": labels}


def share(part, whole):
    return part / whole if whole else math.nan  # nothing to divide by: no number


def overall(pair_list, class_count):
    return precision_recall(confusion_matrix(pair_list, class_count), list(range(1, class_count)))


def precision_recall_curve(truths_list, predictions_list, class_count):
    """Threshold, precision, recall in a row, `[49, 3]`; NaN where there is no such number."""
    row_list = []
    for threshold in np.linspace(0.02, 0.98, 49):  # pairs anew; the network need not look again
        rates = overall(pair_all(truths_list, predictions_list, threshold), class_count)
        row_list.append((threshold, rates["precision"], rates["recall"]))
    return np.array(row_list)


def right_errors(pair_list, scale):
    """Prediction minus truth of the right pairs: dx, dy in px of the user's images, `[P, 2]`."""
    error_list = [(prediction.x - truth.x, prediction.y - truth.y) for truth, prediction
                  in pair_list if truth and prediction and truth.class_id == prediction.class_id]
    return np.array(error_list).reshape(-1, 2) / scale  # the network's images are so much larger


def error_px(error_2d_array):
    """Mean, percentiles and bias of errors `[P, 2]`, px; NaN where there are none.

    p95: 95 of 100 are smaller. bias: the mean of dx and of dy; half a pixel lost shows here.
    """
    count = len(error_2d_array)
    error_2d_array = error_2d_array if count else np.full((1, 2), math.nan)
    distance_1d_array = np.hypot(*error_2d_array.T)  # [P]
    median, p90, p95, p99, most = np.percentile(distance_1d_array, (50, 90, 95, 99, 100)).tolist()
    near = int((distance_1d_array <= 3).sum())
    return {"mean": float(distance_1d_array.mean()), "median": median, "p90": p90, "p95": p95,
            "p99": p99, "max": most, "within_3px": share(near, count),
            "bias": error_2d_array.mean(axis=0).tolist()}


def summarise(pair_list, image_count, category_list, scale):
    """What metrics.json says of the pairs."""
    matrix_2d_array = confusion_matrix(pair_list, len(category_list))
    # Background has no places to count, so [0][0] counts images: empty ones that were left empty.
    matrix_2d_array[0, 0] = image_count - len({(one or other).image for one, other in pair_list})
    class_dict = {}
    for class_id, name in enumerate(category_list[1:], start=1):
        own_list = [case for case in pair_list if case[0] and case[0].class_id == class_id]
        error_dict = error_px(right_errors(own_list, scale))
        class_dict[name] = {**precision_recall(matrix_2d_array, [class_id]),
                            "error_px": {key: error_dict[key] for key in ("mean", "p95")}}
    rates, error_2d_array = overall(pair_list, len(category_list)), right_errors(pair_list, scale)
    distance_1d_array = np.hypot(*error_2d_array.T)  # [P]
    return {"images": image_count, "classes": class_dict, "overall": rates,
            "confusion_matrix": matrix_2d_array.tolist(), "error_px": error_px(error_2d_array),
            # The pairing caps each error, so misses never raise the mean; they show here.
            "recall_within": {f"{radius}px": share(int((distance_1d_array <= radius).sum()),
                                                   rates["support"]) for radius in (2, 5, 10)}}


def add_noise(image, most):
    noise_3d_array = np.random.default_rng(0).integers(-most, most + 1, np.shape(image), np.int16)
    return Image.fromarray((np.asarray(image) + noise_3d_array).clip(0, 255).astype(np.uint8))


def jpeg_again(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


# Each change mild, as training has it, and strong, well beyond: where does it end? On purpose this
# is not the code of 03_train.py: a mistake there would not show here. A shift needs no row: marks
# lie anywhere in their cells.
CHANGE_LIST = [
    ("as they are", lambda image, _: image, ""),
    ("darker, x", lambda image, light: ImageEnhance.Brightness(image).enhance(light), 0.8, 0.1),
    ("brighter, x", lambda image, light: ImageEnhance.Brightness(image).enhance(light), 1.2, 4),
    ("less contrast, x", lambda image, x: ImageEnhance.Contrast(image).enhance(x), 0.8, 0.1),
    ("haze, share", lambda image, x: Image.blend(image, Image.new("RGB", image.size, "white"), x),
     0.1, 0.8),
    ("warmer, x", lambda image, x: image.convert("RGB", (x, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1 / x, 0)),
     1.1, 4),
    ("coarser, px", lambda image, px: image.reduce(px).resize(
        image.size, box=(0, 0, image.width / px, image.height / px)), 2, 6),
    ("out of focus, px", lambda image, px: image.filter(ImageFilter.BoxBlur(px // 2)), 3, 9),
    ("motion blur, px", lambda image, px: image.filter(ImageFilter.BoxBlur((px // 2, 0))), 3, 15),
    ("noise, up to", add_noise, 10, 80),
    ("JPEG quality", jpeg_again, 50, 2),
]


def robustness(network, about_dict, image_list, truths_list, threshold):
    """Precision, recall and mean error under each change; prints them row by row."""
    step = math.ceil(len(image_list) / CHANGED_IMAGES)
    image_list, truths_list, result_dict = image_list[::step], truths_list[::step], {}
    print(f"\n   {f'{len(image_list)} images, changed':22}precision  recall  mean px")
    for words, change, *strength_list in CHANGE_LIST:
        for strength in strength_list:
            predictions_list = predict(network, about_dict, image_list,
                                       lambda image: change(image, strength))
            pair_list = pair_all(truths_list, predictions_list, threshold)
            rates = overall(pair_list, len(about_dict["category_list"]))
            error = error_px(right_errors(pair_list, about_dict["scale"]))["mean"]
            row_list = [rates["precision"], rates["recall"], error]
            name = f"{words} {strength}".strip()
            print("   {:21}{:10.3f}{:8.3f}{:9.3f}".format(name, *row_list), flush=True)
            result_dict[name] = dict(zip(("precision", "recall", "mean_error_px"), row_list))
    return result_dict


def speed(network, about_dict, image_3d_array):
    """Median ms from an image file, a JPEG as large as the user's, to its keypoints."""
    scale, file = about_dict["scale"], io.BytesIO()
    Image.fromarray(resize_image(image_3d_array, 1 / scale)).save(file, "JPEG", quality=90)
    second_list = timeit.repeat(number=1, repeat=SPEED_RUNS, stmt=lambda: model.find_keypoints(
        network, about_dict, resize_image(read_image(file), scale)))
    picture_ms = 1e3 * float(np.median(second_list))
    return {"picture_ms": picture_ms, "pictures_per_second": 1000 / picture_ms}


# ---- The lesson ends here; what follows makes it comfortable to use.

def print_report(metrics, category_list):
    row_list = [("class", "precision", "recall", "F1", "labels", "mean px", "p95 px")]
    together_dict = {**metrics["overall"], "error_px": metrics["error_px"]}
    for name, row in [*metrics["classes"].items(), ("overall", together_dict)]:
        row_list.append((name, row["precision"], row["recall"], row["f1"], row["support"],
                         row["error_px"]["mean"], row["error_px"]["p95"]))
    print_table(row_list)
    if len(category_list) <= 20:
        print("\nconfusion matrix: rows truth, columns prediction")
        print_table([("", *map(str, range(len(category_list))))] + [
            (f"{number} {name}", *metrics["confusion_matrix"][number])
            for number, name in enumerate(category_list)])
    print()
    for key in ("error_px", "recall_within"):
        text_list = [f"{name} {np.round(value, 3)}" for name, value in metrics[key].items()]
        print(f"{key}: " + ", ".join(text_list))
    print("image file to keypoints: {picture_ms:.1f} ms, {pictures_per_second:.1f} images a "
          "second".format(**metrics["speed"]))


def describe_pair(truth, prediction, category_list, scale):
    """How bad a pair is, to sort by; and in words, with its place in px of the user's image."""
    point = truth or prediction
    place = f"{category_list[point.class_id]} at x {point.x / scale:.0f}, y {point.y / scale:.0f}"
    if not prediction:
        return (1, 0), f"{place}: missed"
    if truth and truth.class_id == prediction.class_id:
        distance = math.dist(truth[2:4], prediction[2:4]) / scale
        return (0, distance), f"{place}: {distance:.2f} px off"
    what = f"taken for {category_list[prediction.class_id]}" if truth else "false alarm"
    return (2, prediction.score), f"{place}: {what}, score {prediction.score:.2f}"


def show_worst(path, pair_list, image_list, file_list, category_list, scale):
    """Print the worst cases and draw a close-up of each: false alarms and confusions come first."""
    case_list = [(*describe_pair(*case, category_list, scale), *case) for case in pair_list]
    case_list = sorted(case_list, key=lambda case: case[0], reverse=True)[:WORST_CASES]
    print(f"\nthe worst cases, see {path}")
    rows = max(1, math.ceil(len(case_list) / 5))
    figure = Figure((12, 0.6 + 2.8 * rows), layout="constrained")
    figure.suptitle(f"white +: label; coloured x: prediction; circle: {PAIR_RADIUS:g} px")
    for number, (_, text, truth, prediction) in enumerate(case_list, start=1):
        point = truth or prediction
        left, top, file = int(point.x) - 33, int(point.y) - 33, file_list[point.image]
        print(f"{number:4}. {file}  {text}")
        axes = figure.add_subplot(rows, 5, number, xticks=[], yticks=[])
        part = Image.fromarray(image_list[point.image]).crop((left, top, left + 67, top + 67))
        axes.imshow(part, extent=(left, left + 67, top + 67, top))
        axes.add_patch(Circle((point.x, point.y), PAIR_RADIUS, fill=False, color="white", lw=0.7))
        if truth:
            axes.plot(truth.x, truth.y, "+", color="white", markersize=24)
        if prediction:
            colour = COLOUR_LIST[prediction.class_id % len(COLOUR_LIST)]
            axes.plot(prediction.x, prediction.y, "x", color=colour, markersize=16)
        title = f"{number}. {file[-28:]}\n{text.replace(': ', chr(10))}".encode("ascii", "replace")
        axes.set_title(title.decode(), fontsize=8, parse_math=False)  # fonts may lack more letters
    figure.savefig(path, dpi=110)


def draw_confusion(path, matrix_list, name_list):
    """Of more than 30 classes those with the most mistakes: a plot that stops growing."""
    matrix_2d_array = np.array(matrix_list)
    matrix_2d_array[0, 0] = 0  # stays blank: it counts images, all others keypoints
    wrong_2d_array = matrix_2d_array - np.diag(matrix_2d_array.diagonal())
    wrong_1d_array = wrong_2d_array.sum(axis=0) + wrong_2d_array.sum(axis=1)
    number_list = sorted(np.argsort(-wrong_1d_array, kind="stable")[:31].tolist())
    shown = np.ix_(number_list, number_list)
    axes = Figure([5 + 0.35 * len(number_list)] * 2, layout="constrained").subplots()
    axes.imshow((np.sign(matrix_2d_array) + np.sign(wrong_2d_array))[shown], vmin=0, vmax=2,
                cmap=ListedColormap(["white", "lightblue", "orange"]))
    for (row, column), count in np.ndenumerate(matrix_2d_array[shown]):
        axes.text(column, row, str(count or ""), ha="center", va="center")
    label_list = [f"{number} {name_list[number][:30]}" for number in number_list]
    axes.set_xticks(range(len(number_list)), number_list)
    axes.set_yticks(range(len(number_list)), label_list, parse_math=False)
    axes.set(title="blue: right, orange: wrong", xlabel="prediction (0: missed)",
             ylabel="truth (0: false alarm)")
    axes.figure.savefig(path, dpi=110)


def draw_curve(path, curve_2d_array, threshold):
    axes = Figure((7, 4), layout="constrained").subplots()
    axes.plot(curve_2d_array[:, 0], curve_2d_array[:, 1:], label=["precision", "recall"])
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:g}")
    axes.set(xlabel="threshold", ylim=(None, 1.01))
    axes.figure.legend(loc="outside upper center", ncols=3)  # where it covers no curve
    axes.figure.savefig(path, dpi=110)


def draw_errors(path, error_2d_array):
    reach = 1.05 * max(1, np.abs(error_2d_array).max(initial=0))
    axes = Figure((6, 6), layout="constrained").subplots()
    axes.scatter(*error_2d_array.T, s=8, alpha=0.5)
    axes.grid()
    axes.set(title=f"prediction minus label of {len(error_2d_array)} keypoints, x and y in px",
             xlim=(-reach, reach), ylim=(reach, -reach))
    axes.figure.savefig(path, dpi=110)


def load(data_folder, split):
    """Network and its about_dict; a split's images, labels and file names. Raises UserError."""
    network, about_dict = model.load_weights(data_folder)
    dataset_dict, array_dict = read_data_set(data_folder)
    split_dict, (images_4d_array, label_2d_array) = dataset_dict[split], array_dict[split]
    fix = f"train on it with {command('03_train.py', data_folder)}"
    for key in ("category_list", "scale"):
        if about_dict[key] != dataset_dict[key]:
            raise UserError(f"{data_folder}: the data set's {key} is {dataset_dict[key]}, that of "
                            f"the weights {about_dict[key]}; {fix}")
    if about_dict["max_per_class"] < dataset_dict["max_per_class"]:
        print(f"these weights know at most {about_dict['max_per_class']} of a class in an image, "
              f"training images hold {dataset_dict['max_per_class']}; {fix}")
    if learned := sum(one in about_dict["checksum_list"] for one in split_dict["checksum_list"]):
        print(f"the weights learned from {learned} of these {len(images_4d_array)} images: on new "
              "ones they do worse")
    # In the arrays all images are as large as the largest; here each gets its own size back.
    image_list = [image_3d_array[:height, :width] for image_3d_array, (width, height)
                  in zip(images_4d_array, split_dict["size_list"])]
    truths_list = [[] for _ in image_list]
    for image, class_id, x, y in label_2d_array.tolist():
        truths_list[int(image)].append(Keypoint(int(image), int(class_id), x, y))
    return network, about_dict, image_list, truths_list, split_dict["file_list"]


def main():
    parser = make_parser("Evaluate the trained network.", "folder with data set and weights")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="images")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score, 0 to 1")
    parser.add_argument("--quick", action="store_true", help="leave out the robustness table")
    options = parser.parse_args()
    if not 0 <= options.threshold <= 1:
        parser.error("--threshold must lie between 0 and 1")
    torch.set_num_threads(1)  # for speed; see predict
    network, about_dict, image_list, truths_list, file_list = load(options.data, options.split)
    category_list, scale = about_dict["category_list"], about_dict["scale"]

    print(f"looking at {len(image_list)} images\n", flush=True)
    predictions_list = predict(network, about_dict, image_list)
    pair_list = pair_all(truths_list, predictions_list, options.threshold)
    metrics = summarise(pair_list, len(image_list), category_list, scale)
    metrics["speed"] = speed(network, about_dict, image_list[0])
    print_report(metrics, category_list)
    metrics["robustness"] = {} if options.quick else robustness(
        network, about_dict, image_list, truths_list, options.threshold)

    folder, end = options.data / "results", "" if options.split == "test" else f"_{options.split}"
    no_nan_dict = json.loads(json.dumps(metrics), parse_constant=lambda _: None)  # JSON says null
    write_json(folder / f"metrics{end}.json", no_nan_dict)
    draw_confusion(folder / f"confusion{end}.png", metrics["confusion_matrix"],
                   names_to_draw(category_list))
    curve_2d_array = precision_recall_curve(truths_list, predictions_list, len(category_list))
    draw_curve(folder / f"precision_recall{end}.png", curve_2d_array, options.threshold)
    draw_errors(folder / f"errors{end}.png", right_errors(pair_list, scale))
    show_worst(folder / f"worst{end}.png", pair_list, image_list, file_list, category_list, scale)
    print(f"\nwrote metrics{end}.json and plots to {folder}")
    print(f"next: {command('05_predict.py', options.data, 'IMAGE_OR_FOLDER')}")


if __name__ == "__main__":
    run_main(main)
