"""Lesson 4: how good is it? Precision and recall, confusion matrix, pixel error, robustness, speed.

    python 04_evaluate.py                  # the test split: the final score
    python 04_evaluate.py --split val      # to choose settings and threshold by, so test stays new
    python 04_evaluate.py --split train    # finds labels that are probably wrong

Reads   data/weights.pt (else data/pretrained.pt), and what 01_prepare_data.py wrote.
Writes  data/results/metrics.json, confusion.png, precision_recall.png, errors.png, worst.png;
        for another split metrics_val.json and so on, and label_check.png is train's worst.png.
Time    about a minute on two CPU cores, three for train; with --quick (no robustness, no shift
        test) a few seconds.
See     precision and recall near 1, errors far below 3 px, and what a blind guess would get.
Next    python 05_predict.py finds keypoints in pictures of your own.
"""

import importlib
import io
import math
import statistics
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance, ImageFilter

from common import (CELL, UserError, colour_of, command, make_parser, names_to_draw, print_table,
                    read_data_set, read_image, run_main, save_close_ups, save_figure, time_calls,
                    track, write_json)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

PAIR_RADIUS = 10.0  # px; farther apart, a prediction and a label are no pair
SHIFT_PICTURES = 40  # the most that the shift test looks at, 32 times each
SPEED_RUNS = 40  # of which the median is told: a machine has always something else to do
SUSPICIOUS_ERROR = 4.0  # px; a label this far from its prediction is worth a look


# ---------------------------------------------------------------- predictions and labels in pairs

class Keypoint(NamedTuple):
    """A label or a prediction."""
    picture: int  # its number in the split
    class_id: int
    x: float  # px
    y: float
    score: float = 1.0  # probability

    def distance_to(self, other):
        return math.hypot(self.x - other.x, self.y - other.y)


def predict(network, about_dict, images, threshold):
    """The Keypoints of pictures, uint8 `[H, W, 3]` each: what 05_predict.py would find."""
    return [Keypoint(picture, about_dict["category_list"].index(found["class"]), found["x"],
                     found["y"], found["score"])
            for picture, image_3d_array in enumerate(images)
            for found in model.find_keypoints(network, about_dict, image_3d_array, threshold)]


def pair(prediction_list, truth_list):
    """Pair labels and predictions into (truth, prediction), one to one.

    Nearest first, at most 10 px apart: first those of the same class (right), then, among what is
    left, those of different classes (confused). What is still left is paired with background,
    class 0, at its own place: such a label is missed, such a prediction is a false alarm. All that
    follows is counted from these pairs.

    >>> near, far = Keypoint(0, 1, 50, 53), Keypoint(0, 1, 58, 50)
    >>> pair_list = pair([far, near], [Keypoint(0, 1, 50, 50)])
    >>> [(truth.class_id, prediction.class_id) for truth, prediction in pair_list]
    [(0, 1), (1, 1)]
    """
    labels_dict = {}  # picture -> its labels, each with its index
    for truth_index, truth in enumerate(truth_list):
        labels_dict.setdefault(truth.picture, []).append((truth_index, truth))
    # Every pair that is possible: is it confused? its distance; the indices of both.
    candidate_list = []
    for index, prediction in enumerate(prediction_list):
        for truth_index, truth in labels_dict.get(prediction.picture, []):
            distance = prediction.distance_to(truth)
            if distance <= PAIR_RADIUS:
                is_confused = prediction.class_id != truth.class_id
                candidate_list.append((is_confused, distance, index, truth_index))
    # The best come first, False before True. Who has a partner is free no more.
    pair_list = []
    free_dict, missed_dict = dict(enumerate(prediction_list)), dict(enumerate(truth_list))
    for _, _, index, truth_index in sorted(candidate_list):
        if index in free_dict and truth_index in missed_dict:
            pair_list.append((missed_dict.pop(truth_index), free_dict.pop(index)))
    # What is left has background for a partner.
    pair_list += [(truth, truth._replace(class_id=0)) for truth in missed_dict.values()]
    pair_list += [(alarm._replace(class_id=0), alarm) for alarm in free_dict.values()]
    return sorted(pair_list)  # by picture, a Keypoint's first value


def only_right(pair_list):
    return [(truth, prediction) for truth, prediction in pair_list
            if truth.class_id == prediction.class_id]


# ---------------------------------------------------------------- confusion matrix and rates

def confusion_matrix(pair_list, class_count):
    """Rows truth, columns prediction: misses in column 0, false alarms in row 0."""
    matrix_2d_array = np.zeros((class_count, class_count), int)
    for truth, prediction in pair_list:
        matrix_2d_array[truth.class_id, prediction.class_id] += 1
    return matrix_2d_array


def precision_recall(matrix_2d_array, class_id_list):
    """Precision, recall, F1 and support (labels) of one class, or of several together.

    Precision: the share of the predictions (columns) that are right. Recall: the share of the
    labels (rows) that were found. For several classes add up first, then divide.

    >>> precision_recall(np.array([[5, 1, 0], [2, 7, 1], [0, 0, 4]]), [1])
    {'precision': 0.875, 'recall': 0.7, 'f1': 0.7778, 'support': 10}
    """
    right = int(matrix_2d_array[class_id_list, class_id_list].sum())  # true positives: the diagonal
    predictions = int(matrix_2d_array[:, class_id_list].sum())
    labels = int(matrix_2d_array[class_id_list].sum())
    return {"precision": share(right, predictions), "recall": share(right, labels),
            "f1": share(2 * right, predictions + labels), "support": labels}


def share(part, whole):
    """part / whole; None where there is nothing to divide by."""
    return round(float(part / whole), 4) if whole else None


def overall(pair_list, class_count):
    return precision_recall(confusion_matrix(pair_list, class_count), list(range(1, class_count)))


def precision_recall_curve(all_list, truth_list, class_count):
    """Threshold, precision, recall in a row, `[49, 3]`; NaN where there is no such number."""
    row_list = []
    for threshold in np.linspace(0.02, 0.98, 49):
        prediction_list = [point for point in all_list if point.score >= threshold]
        rates = overall(pair(prediction_list, truth_list), class_count)
        row_list.append((threshold, rates["precision"], rates["recall"]))
    return np.array(row_list, float)


# ---------------------------------------------------------------- pixel error

def right_errors(pair_list):
    """Prediction minus truth of the right pairs: dx, dy in px, `[P, 2]`."""
    error_list = [(prediction.x - truth.x, prediction.y - truth.y)
                  for truth, prediction in only_right(pair_list)]
    return np.array(error_list).reshape(-1, 2)


def error_px(pair_list):
    """Mean, percentiles and bias of the right predictions' errors, in px; None of nothing."""
    error_2d_array = right_errors(pair_list)
    if not len(error_2d_array):
        return dict.fromkeys(["mean", "median", "p90", "p95", "p99", "max", "within_3px", "bias"])
    distance_1d_array = np.hypot(*error_2d_array.T)  # [P]
    percentiles = np.percentile(distance_1d_array, (50, 90, 95, 99, 100)).round(3).tolist()
    return {"mean": round(float(distance_1d_array.mean()), 3),
            **dict(zip(("median", "p90", "p95", "p99", "max"), percentiles)),
            "within_3px": share((distance_1d_array <= 3).sum(), len(distance_1d_array)),
            "bias": error_2d_array.mean(axis=0).round(3).tolist()}


def distance_to_best(prediction_list, truth_list):
    """Mean px from labels to the likeliest prediction of their class, however unlikely it is.

    DeepLabCut and Lightning Pose report this. One answer cannot stand for several labels of a
    class, though: there it is None.
    """
    best_dict = {}
    for prediction in sorted(prediction_list, key=lambda prediction: prediction.score):
        best_dict[prediction.picture, prediction.class_id] = prediction  # the likeliest comes last
    distance_list = [truth.distance_to(best_dict[truth[:2]])
                     for truth in truth_list if truth[:2] in best_dict]
    is_single = len({truth[:2] for truth in truth_list}) == len(truth_list)
    return round(statistics.fmean(distance_list), 3) if distance_list and is_single else None


def summarise(pair_list, all_list, truth_list, picture_count, category_list):
    """What metrics.json says of predictions and labels."""
    matrix_2d_array = confusion_matrix(pair_list, len(category_list))
    # Background has no places to count, so [0][0] counts pictures: empty ones left empty.
    matrix_2d_array[0, 0] = picture_count - len({truth.picture for truth, _ in pair_list})
    class_dict = {}
    for class_id, name in enumerate(category_list[1:], start=1):
        error_dict = error_px([(truth, prediction) for truth, prediction in pair_list
                               if truth.class_id == class_id])
        class_dict[name] = precision_recall(matrix_2d_array, [class_id])
        class_dict[name]["error_px"] = {"mean": error_dict["mean"], "p95": error_dict["p95"]}
    distance_1d_array = np.hypot(*right_errors(pair_list).T)  # [P]
    return {"images": picture_count, "classes": class_dict,
            "overall": overall(pair_list, len(category_list)),
            "confusion_matrix": matrix_2d_array.tolist(),
            "error_px": {**error_px(pair_list),
                         "all_points": distance_to_best(all_list, truth_list)},
            # The pairing caps the mean error at 10 px; what was missed shows here.
            "recall_within": {f"{radius}px": share((distance_1d_array <= radius).sum(),
                                                   len(truth_list)) for radius in (2, 5, 10)}}


def blind_guess(train_label_2d_array, truth_list, picture_count, category_list):
    """What one gets without looking: in every picture, each class at its median place in train."""
    guess_list = []
    for class_id in range(1, len(category_list)):
        own_2d_array = train_label_2d_array[train_label_2d_array[:, 1] == class_id]
        if len(own_2d_array):
            x, y = np.median(own_2d_array[:, 2:], axis=0).tolist()
            guess_list += [Keypoint(picture, class_id, x, y) for picture in range(picture_count)]
    rates = overall(pair(guess_list, truth_list), len(category_list))
    return {"precision": rates["precision"], "recall": rates["recall"],
            "error_px": distance_to_best(guess_list, truth_list)}


# ---------------------------------------------------------------- robustness, shift, speed

def add_noise(image, spread):
    noise_3d_array = np.random.default_rng(0).normal(0, spread, np.shape(image))
    return Image.fromarray((np.asarray(image) + noise_3d_array).clip(0, 255).astype(np.uint8))


def jpeg_again(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


# On purpose not the code of 03_train.py: a mistake there would not show here.
CHANGE_DICT = {
    "as it is": lambda image: image,
    "darker, x 0.8": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "brighter, x 1.2": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "less contrast, x 0.8": lambda image: ImageEnhance.Contrast(image).enhance(0.8),
    "more contrast, x 1.2": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "warmer": lambda image: image.convert("RGB", (1.08, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0.9, 0)),
    "cooler": lambda image: image.convert("RGB", (0.92, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1.1, 0)),
    "blur, sigma 1 px": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "noise, sigma 6": lambda image: add_noise(image, 6),
    "JPEG quality 50": lambda image: jpeg_again(image, 50),
}


def robustness(network, about_dict, image_list, truth_list, threshold):
    """Precision, recall and mean error under each slight change of the surroundings."""
    result_dict = {}
    for name in track(CHANGE_DICT, "robustness"):
        images = (np.asarray(CHANGE_DICT[name](Image.fromarray(image_3d_array)))
                  for image_3d_array in image_list)  # made one by one: memory stays flat
        pair_list = pair(predict(network, about_dict, images, threshold), truth_list)
        rates = overall(pair_list, len(about_dict["category_list"]))
        result_dict[name] = {"precision": rates["precision"], "recall": rates["recall"],
                             "mean_error_px": error_px(pair_list)["mean"]}
    return result_dict


def shift_test(network, about_dict, image_list, truth_list, threshold):
    """Does the answer depend on where the grid lies? Shift pictures by 0 to 31 px, and back.

    Edge pixels are repeated, so that nothing leaves the picture. std_px: root mean square distance
    of one label's predictions from their mean, 0 at best; max_px: the largest; lost: the share not
    found.
    """
    picture_list = sorted({truth.picture for truth in truth_list})[:SHIFT_PICTURES]
    wanted, distance_list = 0, []
    for picture in track(picture_list, "shift test"):
        places_dict = {truth: [] for truth in truth_list if truth.picture == picture}
        for right in range(CELL):
            down = right * 7 % CELL  # 0, 7, 14, ...: each of 0 to 31 once, too
            margin_list = [(down, CELL - down), (right, CELL - right), (0, 0)]
            shifted = np.pad(image_list[picture], margin_list, mode="edge")
            back_list = [found._replace(picture=picture, x=found.x - right, y=found.y - down)
                         for found in predict(network, about_dict, [shifted], threshold)]
            for truth, back in only_right(pair(back_list, list(places_dict))):
                places_dict[truth].append((back.x, back.y))
        wanted += CELL * len(places_dict)
        for place_list in filter(None, places_dict.values()):
            middle = np.mean(place_list, axis=0)
            distance_list += [math.dist(place, middle) for place in place_list]
    lost = share(wanted - len(distance_list), wanted)
    if not distance_list:
        return {"std_px": None, "max_px": None, "lost": lost}
    mean_square = statistics.fmean(distance ** 2 for distance in distance_list)
    return {"std_px": round(math.sqrt(mean_square), 3), "max_px": round(max(distance_list), 3),
            "lost": lost}


def speed(network, about_dict, image_3d_array):
    """Median ms to decode a JPEG, of the network alone, and from picture file to keypoints."""
    file = io.BytesIO()
    Image.fromarray(image_3d_array).save(file, "JPEG", quality=90)
    function_dict = {
        "decode_ms": lambda: read_image(file),
        "network_ms": lambda: model.run_network(network, image_3d_array),
        "picture_ms": lambda: model.find_keypoints(network, about_dict, read_image(file))}
    result_dict = {}
    for name, function in function_dict.items():
        time_list = time_calls(function, network.head.weight.device, SPEED_RUNS)
        result_dict[name] = round(statistics.median(time_list), 2)
    return {**result_dict, "pictures_per_second": round(1000 / result_dict["picture_ms"], 1)}


# ---------------------------------------------------------------- pictures

def draw_confusion(path, matrix_list, name_list):
    """Colours: share of the labels in a row; of false alarms, of the predictions in the column."""
    matrix_2d_array = np.array(matrix_list)
    matrix_2d_array[0, 0] = 0  # stays blank: it counts pictures, all others keypoints
    share_2d_array = matrix_2d_array / np.maximum(matrix_2d_array.sum(axis=1, keepdims=True), 1)
    share_2d_array[0] = matrix_2d_array[0] / np.maximum(matrix_2d_array.sum(axis=0), 1)
    name_list = [name[:25] for name in name_list]
    side = 2 + 0.45 * max(4, len(name_list)) + 0.1 * max(map(len, name_list))
    axes = Figure(figsize=(side, side), layout="constrained").subplots()
    axes.imshow(share_2d_array, cmap="Blues", vmin=0, vmax=1.6)  # black text shows on every blue
    for (row, column), count in np.ndenumerate(matrix_2d_array):
        if count:
            axes.text(column, row, str(count), ha="center", va="center")
    axes.set_xticks(range(len(name_list)), name_list, rotation=90, parse_math=False)
    axes.set_yticks(range(len(name_list)), name_list, parse_math=False)
    axes.set(xlabel="prediction (background: missed)", ylabel="truth (background: false alarm)")
    save_figure(axes.figure, path)


def draw_curve(path, curve_2d_array, threshold):
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    axes.plot(curve_2d_array[:, 0], curve_2d_array[:, 1:], label=["precision", "recall"])
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:g}")
    axes.set(title="precision and recall against the threshold", xlabel="threshold")
    axes.legend(loc="lower left")
    save_figure(axes.figure, path)


def draw_errors(path, error_2d_array):
    """A dot per keypoint. Half a pixel forgotten somewhere shows as a cloud beside the cross."""
    reach = max(1, np.abs(error_2d_array).max(initial=0))
    axes = Figure(figsize=(6, 6), layout="constrained").subplots()
    axes.scatter(*error_2d_array.T, s=8, alpha=0.5)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.axvline(0, color="black", linewidth=0.5)
    axes.set(title=f"prediction minus label of {len(error_2d_array)} keypoints", xlabel="x, px",
             ylabel="y, px", xlim=(-reach, reach), ylim=(reach, -reach))
    save_figure(axes.figure, path)


def worst_cases(pair_list):
    """Up to 15 wrong pairs, false alarms and confusions before misses; then the largest errors."""
    wrong_list = [case for case in pair_list if case[0].class_id != case[1].class_id]
    wrong_list.sort(key=lambda case: (case[1].class_id == 0, -case[1].score))
    right_list = sorted(only_right(pair_list), key=lambda case: -case[0].distance_to(case[1]))
    return (wrong_list[:15] + right_list)[:20]


def verdict(truth, prediction):
    if truth.class_id == prediction.class_id:
        return f"{truth.distance_to(prediction):.2f} px off"
    if prediction.class_id == 0:
        return "missed"
    return f"{'confused' if truth.class_id else 'false alarm'}, {prediction.score:.2f}"


def draw_cases(path, pair_list, image_list, file_list):
    """Close-ups: the label in white, the prediction in its class's colour."""
    tile_list = []
    for truth, prediction in pair_list:
        point_list = [(point.x, point.y, colour) for point, colour in (
            (truth, "white"), (prediction, colour_of(prediction.class_id))) if point.class_id]
        title = f"{file_list[truth.picture][-15:]}: {verdict(truth, prediction)}"
        tile_list.append((title, image_list[truth.picture], truth.x, truth.y, 33, point_list))
    save_close_ups(path, tile_list, columns=5)


# ---------------------------------------------------------------- report

def print_report(metrics, category_list):
    overall_dict = {**metrics["overall"], "error_px": metrics["error_px"]}
    row_list = []
    for name, row_dict in [*metrics["classes"].items(), ("overall", overall_dict)]:
        *rate_list, error_dict = row_dict.values()
        row_list.append((name[:25], *rate_list, error_dict["mean"], error_dict["p95"]))
    print_table(("class", "precision", "recall", "F1", "support", "mean px", "p95 px"), row_list, 3)
    if len(category_list) <= 8:
        print("\nconfusion matrix: rows truth, columns prediction")
        name_list = [name[:12] for name in category_list]
        print_table(("", *name_list), [(name, *row) for name, row
                                       in zip(name_list, metrics["confusion_matrix"])])
    if metrics["robustness"]:
        print()
        print_table(("change", "precision", "recall", "mean px"), [
            (name, *row_dict.values()) for name, row_dict in metrics["robustness"].items()], 3)
    print()
    for key in ("error_px", "recall_within", "blind_guess", "shift", "speed"):
        text_list = [f"{name} {value}" for name, value in metrics[key].items() if value is not None]
        if text_list:
            print(f"{key}: " + ", ".join(text_list))


def print_suspicious(pair_list, file_list, category_list):
    suspicious_list = [(truth, prediction) for truth, prediction in pair_list
                       if truth.class_id != prediction.class_id
                       or truth.distance_to(prediction) > SUSPICIOUS_ERROR]
    print(f"\nlabels and predictions disagree in {len(suspicious_list)} places"
          + ("; the worst (see label_check.png):" if suspicious_list else ""))
    for truth, prediction in worst_cases(suspicious_list):
        print(f"  {file_list[truth.picture]}  x {truth.x:.0f} y {truth.y:.0f}  label "
              f"{category_list[truth.class_id]}, prediction {category_list[prediction.class_id]}: "
              f"{verdict(truth, prediction)}")


# ---------------------------------------------------------------- the program

def load(data_folder, split):
    """Network, its about_dict, dataset.json and arrays; UserError where they do not fit."""
    network, about_dict = model.load_for_use(data_folder)
    dataset_dict, array_dict = read_data_set(data_folder)
    fix = f"train on it with {command('03_train.py', data_folder)}"
    known_list, category_list = about_dict["category_list"], dataset_dict["category_list"]
    if known_list != category_list:
        raise UserError(f"{data_folder}: holds {category_list[1:]}, but the weights know "
                        f"{known_list[1:]}; {fix}")
    known_most, most = about_dict["max_per_class"], dataset_dict["max_per_class"]
    if known_most < most:
        print(f"these weights know at most {known_most} of a class in a picture, the data set "
              f"holds {most}; {fix}")
    return network, about_dict, dataset_dict, array_dict


def parse_options():
    parser = make_parser("Evaluate the trained network.", "folder with data set and weights")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test",
                        help="split to evaluate")
    parser.add_argument("--threshold", type=float, default=0.5,
                        help="least score of a prediction, 0 to 1")
    parser.add_argument("--quick", action="store_true", help="leave out robustness and shift test")
    options = parser.parse_args()
    if not 0 <= options.threshold <= 1:
        parser.error("--threshold must lie between 0 and 1")
    return options


def main():
    options = parse_options()
    network, about_dict, dataset_dict, array_dict = load(options.data, options.split)
    images_4d_array, label_2d_array = array_dict[options.split]
    category_list, count = dataset_dict["category_list"], len(images_4d_array)
    # In the arrays all pictures are as large as the largest; here each gets its own size back.
    image_list = [images_4d_array[index, :height, :width] for index, (width, height)
                  in enumerate(dataset_dict[options.split]["size_list"])]
    truth_list = [Keypoint(int(picture), int(class_id), x, y)
                  for picture, class_id, x, y in label_2d_array.tolist()]

    # Which cells are the best does not depend on the threshold. So all is found at 0, and a
    # threshold's predictions are those whose score reaches it: each picture is looked at once.
    all_list = predict(network, about_dict, track(image_list, "predicting"), threshold=0.0)
    pair_list = pair([point for point in all_list if point.score >= options.threshold], truth_list)
    metrics = summarise(pair_list, all_list, truth_list, count, category_list)
    metrics["blind_guess"] = blind_guess(array_dict["train"][1], truth_list, count, category_list)
    metrics["speed"] = speed(network, about_dict, image_list[0])
    metrics["robustness"], metrics["shift"] = {}, {}
    if not options.quick:
        argument_list = [network, about_dict, image_list, truth_list, options.threshold]
        metrics["robustness"] = robustness(*argument_list)
        metrics["shift"] = shift_test(*argument_list)
    print_report(metrics, category_list)

    folder = options.data / "results"
    suffix = "" if options.split == "test" else f"_{options.split}"
    write_json(folder / f"metrics{suffix}.json", metrics)
    curve_2d_array = precision_recall_curve(all_list, truth_list, len(category_list))
    draw_curve(folder / f"precision_recall{suffix}.png", curve_2d_array, options.threshold)
    draw_confusion(folder / f"confusion{suffix}.png", metrics["confusion_matrix"],
                   names_to_draw(category_list))
    draw_errors(folder / f"errors{suffix}.png", right_errors(pair_list))
    file_list = dataset_dict[options.split]["file_list"]
    sheet = "label_check.png" if options.split == "train" else f"worst{suffix}.png"
    draw_cases(folder / sheet, worst_cases(pair_list), image_list, file_list)
    if options.split == "train":
        print_suspicious(pair_list, file_list, category_list)
    print(f"\nwrote metrics{suffix}.json and pictures to {folder}")
    print(f"next: {command('05_predict.py', options.data, 'PICTURE_OR_FOLDER')}")


if __name__ == "__main__":
    run_main(main)
