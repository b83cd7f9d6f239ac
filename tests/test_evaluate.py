"""04_evaluate.py: pairing, the confusion matrix and what follows from it, on hand-worked cases."""

import json
import math
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from conftest import REPOSITORY, Sees, call_main, load, sentence_of

model, evaluate = load("02_model"), load("04_evaluate")
Keypoint = evaluate.Keypoint

CATEGORIES = ["background", "left", "right"]
ABOUT = {"category_list": CATEGORIES, "box_size": [30, 30], "max_per_class": 1, "scale": 1.0,
         "checksum_list": []}
FILES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]
SEES = Sees().eval()


def points(*image_list):
    """A list of Keypoints an image, from rows: class id, x, y[, score], by default 0.9."""
    return [[Keypoint(image, *row, *([0.9] if len(row) == 3 else [])) for row in row_list]
            for image, row_list in enumerate(image_list)]


def pairs(predictions_list, truths_list):
    return evaluate.pair_all(truths_list, predictions_list, threshold=0)


def summary(predictions_list, truths_list, scale=1.0):
    return evaluate.summarise(pairs(predictions_list, truths_list), len(truths_list), CATEGORIES,
                              scale)


# ---- pairing

@pytest.mark.parametrize("found, truth, expected", [
    ([(1, 5, 5)], [(1, 8, 9)], {(0, 0)}),  # 5 px off
    ([(1, 5, 5)], [(1, 5, 15)], {(0, 0)}),  # just within
    ([(1, 5, 5)], [(1, 5, 15.1)], set()),  # just too far
    ([(1, 0, 0), (1, 4, 0)], [(1, 5, 0)], {(1, 0)}),  # the nearer prediction gets it
    ([(1, 0, 0)], [(1, 6, 0), (1, 3, 0)], {(0, 1)}),  # one label only
    # The nearest pair first, though two pairs could be made.
    ([(1, 0, 0), (1, 4, 0)], [(1, 3, 0), (1, 11, 0)], {(1, 0)}),
    ([(1, 0, 0), (2, 1, 0)], [(2, 0, 0)], {(1, 0)}),  # own class before a nearer other one
    ([(1, 0, 0), (2, 6, 0)], [(2, 0, 0), (1, 6, 0)], {(0, 1), (1, 0)}),
    ([(1, 0, 0)], [(2, 3, 0)], {(0, 0)}),  # a confusion
    ([(1, 0, 0)], [(2, 3, 10)], set()),  # too far for one
    ([], [(1, 0, 0)], set()), ([(1, 0, 0)], [], set()), ([], [], set())])
def test_pairs_are_one_to_one_own_class_first_nearest_first(found, truth, expected):
    (found_list,), (truth_list,) = points(found), points(truth)
    assert {(found_list.index(prediction), truth_list.index(truth))
            for truth, prediction in evaluate.pair(truth_list, found_list)
            if truth and prediction} == expected


def test_each_prediction_and_each_label_is_in_exactly_one_pair_of_its_image():
    rng = np.random.default_rng(0)

    def random_points():
        return points(*[[(int(rng.integers(1, 3)), *rng.uniform(0, 30, 2))
                         for _ in range(rng.integers(0, 8))] for _ in range(4)])
    for _ in range(50):
        predictions_list, truths_list = random_points(), random_points()
        pair_list = pairs(predictions_list, truths_list)
        assert sorted(found for _, found in pair_list if found) == sorted(sum(predictions_list, []))
        assert sorted(truth for truth, _ in pair_list if truth) == sorted(sum(truths_list, []))
        for truth, found in pair_list:
            if truth and found:
                assert truth.image == found.image
                assert math.dist(truth[2:4], found[2:4]) <= evaluate.PAIR_RADIUS


def test_labels_that_are_equal_in_all_are_still_two():
    (label, _), = truths_list = points([(1, 5, 5), (1, 5, 5)])
    assert pairs([[label]], truths_list) == [(label, label), (label, None)]


def test_scores_are_compared_as_the_network_compares_them_unrounded():
    score = float(np.float32(0.7))  # 0.69999999: below the 0.7 of Python, equal to that of 32 bits
    assert score < 0.7
    for threshold, count in ((0.7, 1), (0.69999, 1), (0.70001, 0)):
        assert len(evaluate.pair_all([[]], points([(1, 5, 5, score)]), threshold)) == count


# ---- confusion matrix, precision, recall

FOUND = points([(1, 10, 10), (2, 50, 50)],  # both right
               [(2, 10, 10)],  # a confusion
               [(1, 200, 200)],  # a false alarm and a miss
               [],  # an empty image left empty
               [],  # a miss
               [(2, 11, 10), (2, 13, 10)])  # one right and one too many
TRUTH = points([(1, 10, 13), (2, 50, 46)], [(1, 10, 12)], [(1, 10, 10)], [], [(2, 7, 7)],
               [(2, 10, 10)])
MATRIX = [[1, 1, 1], [1, 1, 1], [1, 0, 2]]  # worked out by hand; rows: background, left, right


def test_the_confusion_matrix_equals_one_worked_out_by_hand():
    matrix_2d_array = evaluate.confusion_matrix(pairs(FOUND, TRUTH), 3)
    assert matrix_2d_array.tolist() == [[0, 1, 1], *MATRIX[1:]]
    assert summary(FOUND, TRUTH)["confusion_matrix"] == MATRIX  # an empty image was left empty
    assert matrix_2d_array[1:].sum() == len(sum(TRUTH, []))  # each label once
    assert matrix_2d_array[:, 1:].sum() == len(sum(FOUND, []))


def test_precision_and_recall_of_a_class_come_from_its_column_and_row():
    left = {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "support": 3}
    right = {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "support": 3}
    both = {"precision": 3 / 6, "recall": 3 / 6, "f1": 6 / 12, "support": 6}
    for class_id_list, expected in (([1], left), ([2], right), ([1, 2], both)):
        assert evaluate.precision_recall(np.array(MATRIX), class_id_list) == expected
    assert evaluate.overall(pairs(FOUND, TRUTH), 3) == both


@pytest.mark.parametrize("matrix, expected", [
    ([[3, 0], [0, 0]], (math.nan, math.nan, math.nan, 0)),  # nothing to find, nothing found
    ([[0, 0], [4, 0]], (math.nan, 0, 0, 4)),  # never predicted
    ([[0, 4], [0, 0]], (0, math.nan, 0, 0))])  # only false alarms
def test_where_nothing_can_be_divided_there_is_no_number(matrix, expected):
    result = evaluate.precision_recall(np.array(matrix), [1])
    assert tuple(result.values()) == pytest.approx(expected, nan_ok=True)


def test_the_curve_holds_precision_and_recall_of_what_reaches_each_threshold():
    predictions_list = points([(1, 10, 10, 0.71), (2, 90, 90, 0.31)], [(1, 50, 50, 0.11)])
    truths_list = points([(1, 10, 10)], [(1, 50, 50)])
    curve = evaluate.precision_recall_curve(truths_list, predictions_list, 3)
    assert curve.shape == (49, 3) and (np.diff(curve[:, 0]) > 0).all()
    for threshold, precision, recall in curve:
        right = int(0.71 >= threshold) + int(0.11 >= threshold)
        predictions = right + (0.31 >= threshold)
        expected = right / predictions if predictions else np.nan
        assert recall == right / 2 and precision == pytest.approx(expected, nan_ok=True)


# ---- errors in px

def test_the_summary_equals_one_worked_out_by_hand():
    assert evaluate.right_errors(pairs(FOUND, TRUTH), 1.0).tolist() == [[0, -3], [0, 4], [1, 0]]
    result = summary(FOUND, TRUTH)
    error = result["error_px"]
    assert result["images"] == 6
    assert (error["mean"], error["median"], error["max"]) == pytest.approx((8 / 3, 3, 4))
    assert error["within_3px"] == 2 / 3 and error["bias"] == pytest.approx([1 / 3, 1 / 3])
    assert error["p90"] == pytest.approx(3.8) and error["p99"] == pytest.approx(3.98)
    assert result["classes"]["left"]["error_px"] == {"mean": 3, "p95": 3}
    assert result["classes"]["right"]["error_px"]["mean"] == 2.5
    # The share of all labels that are right and so near: 1, 3 and 3 of 6.
    assert result["recall_within"] == {"2px": 1 / 6, "5px": 0.5, "10px": 0.5}


def test_errors_are_told_in_px_of_the_users_images():
    result = summary(FOUND, TRUTH, scale=0.5)  # the network's images are half as large
    assert result["error_px"]["mean"] == pytest.approx(16 / 3)
    assert result["error_px"]["within_3px"] == 1 / 3
    assert result["recall_within"] == {"2px": 1 / 6, "5px": 1 / 6, "10px": 0.5}
    (_, text), = [evaluate.describe_pair(*case, CATEGORIES, 0.5) for case in
                  pairs(points([(1, 50, 54)]), points([(1, 50, 50)]))]
    assert text == "left at x 100, y 100: 8.00 px off"


@pytest.mark.filterwarnings("error")
def test_a_summary_without_any_prediction_or_label_holds_no_numbers():
    for truths_list, share in (([[]], math.nan), (points([(1, 3, 3)]), 0)):
        result = summary([[]], truths_list)
        assert math.isnan(result["error_px"]["mean"])
        assert np.isnan(result["error_px"]["bias"]).all()
        assert math.isnan(result["overall"]["precision"])
        assert list(result["recall_within"].values()) == pytest.approx([share] * 3, nan_ok=True)


# ---- a network's predictions

def seen_images():
    """Three grey images with two keypoints, one, none; a pixel each."""
    images_4d_array = np.full((3, 96, 128, 3), 128, np.uint8)
    truths_list = points([(1, 40.5, 33.5), (2, 100.5, 70.5)], [(1, 64.5, 31.5)], [])
    for image, class_id, x, y, _ in sum(truths_list, []):
        images_4d_array[image, int(y), int(x)] = (255, 255, 255) if class_id == 1 else (255, 0, 0)
    return images_4d_array, truths_list


def test_predictions_hold_image_class_place_and_score_whatever_the_score():
    images_4d_array, truths_list = seen_images()
    predictions_list = evaluate.predict(SEES, ABOUT, images_4d_array)
    assert [found[:2] for found in sum(predictions_list, [])] == [
        (0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    pair_list = evaluate.pair_all(truths_list, predictions_list, 0.5)
    error_2d_array = evaluate.right_errors(pair_list, 1.0)
    assert len(pair_list) == len(error_2d_array) == 3 and np.allclose(error_2d_array, 0, atol=1e-3)
    assert predictions_list[1][1].score < 0.01  # a class that is not there has its best cell, too


@pytest.mark.parametrize("max_per_class", [1, 9])
def test_predictions_at_a_threshold_are_those_of_05_with_this_threshold(max_per_class):
    torch.manual_seed(0)
    network, about_dict = model.KeypointNet(3).eval(), {**ABOUT, "max_per_class": max_per_class}
    images_4d_array = np.random.default_rng(0).integers(0, 256, (5, 96, 128, 3), dtype=np.uint8)
    predictions_list = evaluate.predict(network, about_dict, images_4d_array)
    scores = sorted(found.score for found in sum(predictions_list, []))
    for threshold in (0.2, 0.4, scores[len(scores) // 2]):
        pair_list = evaluate.pair_all([[]] * 5, predictions_list, threshold)
        expected_list = [
            (found["x"], found["y"], found["score"]) for image_3d_array in images_4d_array
            for found in model.find_keypoints(network, about_dict, image_3d_array, threshold)[0]]
        assert [found[2:] for _, found in pair_list] == expected_list


def test_a_network_in_training_mode_is_not_judged_in_silence():
    with pytest.raises(AssertionError, match="eval"):
        evaluate.predict(model.KeypointNet(3).train(), ABOUT, np.zeros((1, 64, 64, 3), np.uint8))


# ---- robustness and speed

CHANGES = [(f"{name} {strength}", change, strength)
           for name, change, *strength_list in evaluate.CHANGE_LIST for strength in strength_list]


def test_the_robustness_table_has_a_row_for_each_change_mild_and_strong(capsys):
    images_4d_array, truths_list = seen_images()
    result = evaluate.robustness(SEES, ABOUT, images_4d_array, truths_list, 0.5)
    assert list(result) == [name.strip() for name, _, _ in CHANGES] and len(result) == 1 + 20
    unchanged = result["as they are"]
    assert unchanged["precision"] == unchanged["recall"] == 1
    assert unchanged["mean_error_px"] <= 0.001
    assert any(row["recall"] == 0 for row in result.values())  # a pixel does not survive them all
    output = capsys.readouterr().out
    assert "3 images" in output and all(name in output for name in result)


def test_of_a_large_split_every_nth_image_is_changed(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "CHANGED_IMAGES", 3)
    seen_list = []
    monkeypatch.setattr(evaluate, "predict", lambda network, about_dict, image_list, change: (
        seen_list.append(list(image_list)), [[] for _ in image_list])[1])
    truths_list = points(*[[(1, 5, 5)]] * 7)
    evaluate.robustness(SEES, ABOUT, list("abcdefg"), truths_list, 0.5)
    assert seen_list == [["a", "d", "g"]] * len(CHANGES)


@pytest.mark.parametrize("name, change, strength", CHANGES)
def test_a_change_keeps_size_and_place_and_repeats(name, change, strength):
    array = np.full((64, 96, 3), 120, np.uint8)
    array[20:44, 32:64] = (200, 150, 60)
    changed, again = (np.asarray(change(Image.fromarray(array), strength)) for _ in range(2))
    assert changed.shape == array.shape and np.array_equal(changed, again)
    assert (name == "as they are ") == np.array_equal(changed, array)
    if name.startswith(("darker, x 0.1", "noise, up to 80", "JPEG quality 2")):
        return  # too much is left of nothing to measure its place
    bright = changed.astype(float) @ (1, 1, -1)
    row, column = np.nonzero(bright > (bright[32, 48] + bright[4, 4]) / 2)
    assert abs(np.median(row) - 31.5) <= 1 and abs(np.median(column) - 47.5) <= 1


@pytest.mark.parametrize("name, expected", [
    ("darker, x 0.8", (80, 80, 80)), ("brighter, x 1.2", (120, 120, 120)),
    ("warmer, x 1.1", (110, 100, 91)), ("haze, share 0.1", (115, 115, 115)),
    ("out of focus, px 9", (100, 100, 100))])
def test_light_and_colour_change_by_the_factors_that_are_told(name, expected):
    (change, strength), = [row[1:] for row in CHANGES if row[0] == name]
    changed = np.asarray(change(Image.new("RGB", (4, 4), (100, 100, 100)), strength))
    assert np.abs(changed[0, 0].astype(int) - expected).max() <= 1


def test_the_speed_is_one_figure(monkeypatch):
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 3)
    network = model.KeypointNet(3).eval()
    size_list, real = [], evaluate.read_image
    monkeypatch.setattr(evaluate, "read_image", lambda file: (
        size_list.append(Image.open(file).size), real(file))[1])
    result = evaluate.speed(network, {**ABOUT, "scale": 0.5}, np.zeros((70, 96, 3), np.uint8))
    assert list(result) == ["picture_ms", "pictures_per_second"] and 0 < result["picture_ms"] < 1000
    assert result["pictures_per_second"] == pytest.approx(1000 / result["picture_ms"])
    assert size_list == [(192, 140)] * 3  # as large as the user's


# ---- worst cases

@pytest.fixture
def figure_list(monkeypatch):
    """The figures that are saved; they are drawn, too."""
    result_list = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: (
        result_list.append(figure), FigureCanvasAgg(figure).draw()))
    return result_list


def show_worst(path, capsys, pair_list, file_list=FILES):
    image_list = [np.full((100, 90, 3), 128, np.uint8)] * len(file_list)
    evaluate.show_worst(path, pair_list, image_list, file_list, CATEGORIES, 1.0)
    return [line.strip() for line in capsys.readouterr().out.splitlines() if ". " in line]


def test_the_worst_cases_are_told_with_file_place_and_what_is_wrong(tmp_path, capsys):
    predictions_list = points(*[[(1, 10, 10)]] * 4, [], [(1, 10, 10)])
    truths_list = points([(1, 10, 10.5)], [(1, 17, 10)], [(1, 80, 10)], [(2, 11, 10)], [(2, 5, 5)],
                         [])
    line_list = show_worst(tmp_path / "worst.png", capsys, pairs(predictions_list, truths_list))
    assert [line.split(".", 1)[0] for line in line_list] == list("1234567")
    with Image.open(tmp_path / "worst.png") as image:
        assert image.width > 1000
    text_list = [line.split(". ", 1)[1] for line in line_list]
    assert sorted(text_list[:3]) == ["c.jpg  left at x 10, y 10: false alarm, score 0.90",
                                     "d.jpg  right at x 11, y 10: taken for left, score 0.90",
                                     "f.jpg  left at x 10, y 10: false alarm, score 0.90"]
    assert sorted(text_list[3:5]) == ["c.jpg  left at x 80, y 10: missed",
                                      "e.jpg  right at x 5, y 5: missed"]
    assert text_list[5:] == ["b.jpg  left at x 17, y 10: 7.00 px off",
                             "a.jpg  left at x 10, y 10: 0.50 px off"]


def test_the_surest_false_alarms_come_first_and_twenty_are_shown(figure_list, capsys):
    score_list = [number / 100 for number in range(60)]
    pair_list = pairs(points(*[[(1, 10, 10, score)] for score in score_list]), [[]] * 60)
    file_list = [f"{score}.jpg" for score in score_list]
    line_list = show_worst("worst.png", capsys, pair_list, file_list)
    assert [line.split()[1] for line in line_list] == file_list[:-21:-1]


def test_a_close_up_shows_the_label_in_white_and_the_prediction_in_colour(figure_list, capsys):
    image_list = [np.zeros((100, 100, 3), np.uint8), np.ones((200, 150, 3), np.uint8)]
    truths_list = points([(1, 9.5, 9.5)], [(2, 53.5, 100.5)])
    pair_list = pairs(points([], [(1, 50.5, 100.5), (2, 90, 20)]), truths_list)
    file_list = ["first.jpg", "x" * 60 + "second.jpg"]
    evaluate.show_worst("worst.png", pair_list, image_list, file_list, CATEGORIES, 1.0)
    figure, = figure_list
    assert all(word in figure.get_suptitle() for word in ("white", "coloured", "10 px"))
    one, two = (evaluate.COLOUR_LIST[class_id] for class_id in (1, 2))
    expected_dict = {"false alarm": [(90, 20, two)], "missed": [(9.5, 9.5, "white")],
                     "taken for left": [(53.5, 100.5, "white"), (50.5, 100.5, one)]}
    box_list = []
    for axes in figure.axes:
        what = axes.get_title().split("\n")[-1].split(",")[0]
        assert [(*line.get_xdata(), *line.get_ydata(), line.get_color())
                for line in axes.lines] == expected_dict.pop(what)
        circle, = axes.patches  # of the radius, round the label or the false alarm
        assert circle.center == tuple(axes.lines[0].get_xydata()[0]) and circle.radius == 10
        assert min(map(abs, np.diff([axes.get_xlim(), axes.get_ylim()]).flat)) >= 60  # it shows
        box_list.append(axes.title.get_window_extent())
    assert not expected_dict
    for box, following in zip(box_list, box_list[1:]):
        assert box.x1 < following.x0  # titles do not run into each other


# ---- plots

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", [
    ["left", "right"], ["$\\frac$", "a_$b$^{c"], ["name " * 30, "n" * 200],
    [f"part {number} of a mouse" for number in range(17)]])
def test_the_confusion_plot_keeps_its_titles_whatever_classes_are_called(figure_list, names):
    matrix_list = np.eye(1 + len(names), dtype=int).tolist()
    evaluate.draw_confusion("confusion.png", matrix_list, ["background", *names])
    axes, = figure_list[0].axes
    label_list = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(label_list)) == 1 + len(names)  # cut, they are still different
    for text in (axes.xaxis.label, axes.yaxis.label, *axes.get_yticklabels()):
        box = text.get_window_extent()
        assert text.get_text() and axes.figure.bbox.contains(box.x0, box.y0)
        assert axes.figure.bbox.contains(box.x1, box.y1)
    assert axes.bbox.width > 100


def test_the_confusion_plot_shows_each_count_but_that_of_the_images(figure_list):
    matrix_list = [[23, 1, 0], [2, 30, 4], [5, 6, 40]]
    evaluate.draw_confusion("confusion.png", matrix_list, CATEGORIES)
    axes, = figure_list[0].axes
    text_dict = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert {place: text for place, text in text_dict.items() if text} == {
        (0, 1): "1", (1, 0): "2", (1, 1): "30", (1, 2): "4", (2, 0): "5", (2, 1): "6", (2, 2): "40"}
    colour = axes.images[0].get_array()
    assert colour.tolist() == [[0, 2, 0], [2, 1, 2], [2, 2, 1]]  # wrong 2, right 1
    assert matrix_list[0][0] == 23  # what goes into metrics.json stays


def test_of_many_classes_those_with_mistakes_are_shown_in_a_plot_of_bounded_size(figure_list):
    matrix_2d_array = np.eye(301, dtype=int) * 7
    matrix_2d_array[40, 255] = 3
    name_list = [f"class {number}" for number in range(301)]
    evaluate.draw_confusion("many.png", matrix_2d_array.tolist(), name_list)
    shown = [label.get_text() for label in figure_list[0].axes[0].get_yticklabels()]
    assert len(shown) <= 31 and {"40 class 40", "255 class 255"} < set(shown)
    assert max(figure_list[0].get_size_inches()) < 18


def test_the_curve_and_the_errors_are_drawn_as_they_are(figure_list):
    curve = np.array([(0.2, 0.5, 1.0), (0.4, 0.75, 0.5), (0.6, np.nan, 0.0)])
    evaluate.draw_curve("curve.png", curve, 0.5)
    evaluate.draw_errors("errors.png", np.array([(0.5, -0.25), (3, 1)]))
    axes, = figure_list[0].axes
    precision, recall, threshold = axes.lines
    assert np.array_equal(precision.get_ydata(), curve[:, 1], equal_nan=True)
    assert (precision.get_label(), recall.get_label()) == ("precision", "recall")
    assert list(recall.get_ydata()) == [1, 0.5, 0] and set(threshold.get_xdata()) == {0.5}
    legend, = figure_list[0].legends
    assert not legend.get_window_extent().overlaps(axes.bbox)  # it covers no curve
    axes, = figure_list[1].axes
    assert axes.collections[0].get_offsets().tolist() == [[0.5, -0.25], [3, 1]]
    assert axes.get_xlim() == pytest.approx((-3.15, 3.15))  # the farthest dot is whole
    assert axes.get_ylim() == pytest.approx((3.15, -3.15))  # y points down


# ---- the whole script, with a network that knows

def make_data_set(folder, category_list=CATEGORIES, **dataset_dict):
    """A data set of grey images as 01 would pack it, and weights that Sees stands in for."""
    images_4d_array, truths_list = seen_images()
    label_2d_array = np.array([truth[:4] for truth in sum(truths_list, [])], np.float32)
    folder.mkdir(parents=True)
    dataset_dict = {"category_list": category_list, "box_size": [30, 30], "max_per_class": 1,
                    "scale": 1.0, **dataset_dict}
    for number, split in enumerate(("train", "val", "test")):
        np.save(folder / f"{split}_images.npy", images_4d_array)
        np.save(folder / f"{split}_labels.npy", label_2d_array)
        dataset_dict[split] = {"file_list": FILES[:3], "size_list": [[128, 96]] * 3,
                               "checksum_list": [3 * number, 3 * number + 1, 3 * number + 2]}
    (folder / "dataset.json").write_text(json.dumps(dataset_dict), encoding="utf-8")
    return folder


@pytest.fixture
def knowing(monkeypatch):
    """04 finds what the images hold; the dict is what the weights know of their data."""
    about_dict = {**ABOUT, "checksum_list": [0, 1, 2]}  # of train
    monkeypatch.setattr(model, "load_weights", lambda folder: (
        print(f"using {folder / 'weights.pt'}"), (SEES, about_dict))[1])
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 1)
    return about_dict


def run(monkeypatch, *arguments):
    assert call_main(evaluate, monkeypatch, "--quick", *arguments) == (0, "")


def test_each_split_has_metrics_and_plots_of_its_own(knowing, tmp_path, monkeypatch):
    data = make_data_set(tmp_path / "data")
    before_dict = {}
    for split, end in (("test", ""), ("val", "_val"), ("train", "_train")):
        run(monkeypatch, "--data", data, "--split", split)
        after_dict = {path.name: path.stat().st_mtime_ns for path in (data / "results").iterdir()}
        assert set(after_dict) - set(before_dict) == {
            f"metrics{end}.json", f"confusion{end}.png", f"precision_recall{end}.png",
            f"errors{end}.png", f"worst{end}.png"}
        assert before_dict.items() <= after_dict.items()  # nothing of another split was touched
        before_dict = after_dict
    metrics = json.loads((data / "results" / "metrics_val.json").read_text(encoding="utf-8"))
    assert list(metrics) == ["images", "classes", "overall", "confusion_matrix", "error_px",
                             "recall_within", "speed", "robustness"]
    assert metrics["overall"] == {"precision": 1, "recall": 1, "f1": 1, "support": 3}
    assert metrics["confusion_matrix"] == [[1, 0, 0], [0, 2, 0], [0, 0, 1]]
    assert metrics["recall_within"] == {"2px": 1, "5px": 1, "10px": 1}


def test_how_many_images_the_weights_learned_from_is_told_before_the_figures(
        knowing, tmp_path, monkeypatch, capsys):
    data = make_data_set(tmp_path / "data")
    for split, count in (("test", 0), ("train", 3)):
        run(monkeypatch, "--data", data, "--split", split)
        first, second, *_ = capsys.readouterr().out.splitlines()
        assert (f"learned from {count} of these 3 images" in second) == (count > 0)
        assert ("learned" in second) == (count > 0)
    knowing["checksum_list"] = [1, 7, 99]
    run(monkeypatch, "--data", data)  # another split than in training
    assert "learned from 1 of these 3 images" in capsys.readouterr().out.splitlines()[1]


def test_the_main_table_comes_before_the_long_one_and_the_next_command_works_anywhere(
        knowing, tmp_path, monkeypatch, capsys):
    data = make_data_set(tmp_path / "my data's folder")
    assert call_main(evaluate, monkeypatch, "--data", data) == (0, "")
    output = capsys.readouterr().out
    assert 0 < output.index("overall") < output.index("changed") < output.index("JPEG quality 2")
    word_list = shlex.split(output.splitlines()[-1].removeprefix("next: "))
    assert word_list[1].endswith("05_predict.py") and word_list[2:4] == ["--data", str(data)]


def test_weights_that_know_fewer_of_a_class_than_the_data_holds_are_told_in_the_first_lines(
        knowing, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--data", make_data_set(tmp_path / "nine", max_per_class=9))
    second = capsys.readouterr().out.splitlines()[1]
    assert " 1 " in second and "9" in second and "03_train.py" in second
    knowing["max_per_class"] = 9
    for most in (9, 2):
        run(monkeypatch, "--data", make_data_set(tmp_path / f"at most {most}", max_per_class=most))
        assert "03_train.py" not in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_names_without_letters_in_any_font_reach_json_and_table(
        knowing, tmp_path, monkeypatch, capsys):
    names = knowing["category_list"] = ["background", "左眼", "overall"]
    data = make_data_set(tmp_path / "data", names)
    text = (data / "dataset.json").read_text(encoding="utf-8").replace("a.jpg", "ü $\\\\frac$.jpg")
    (data / "dataset.json").write_text(text, encoding="utf-8")
    np.save(data / "test_labels.npy", np.zeros((0, 4), np.float32))  # and nothing to find
    run(monkeypatch, "--data", data)
    metrics = json.loads((data / "results" / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["classes"]) == names[1:] and metrics["overall"]["recall"] is None
    output = capsys.readouterr().out
    assert "左眼" in output and "ü $\\frac$.jpg" in output
    first_list = [line.split()[:1] for line in output.splitlines()]
    assert first_list.count(["overall"]) == 2  # a class called overall has its own row


@pytest.mark.parametrize("changed, words", [
    ({"category_list": ["background", "nose", "mouth"]}, ["left", "nose"]),
    ({"scale": 0.25}, ["scale", "0.25", "1.0"])])
def test_weights_of_other_data_end_in_a_sentence_with_the_command_that_helps(
        knowing, tmp_path, monkeypatch, changed, words):
    data = make_data_set(tmp_path / "data", **changed)
    sentence = sentence_of(evaluate, monkeypatch, "--data", data)
    for part in (data, "03_train.py --data", *words):
        assert str(part) in sentence


@pytest.mark.parametrize("threshold", ["1.5", "-0.1", "nan"])
def test_a_threshold_lies_between_0_and_1(monkeypatch, capsys, threshold):
    assert call_main(evaluate, monkeypatch, "--threshold", threshold)[0] == 2
    assert "--threshold must lie between 0 and 1" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_each_thread_of_the_pool_computes_on_one_core_alone():
    """main's set_num_threads(1) is not theirs: OpenMP would give each as many as there are cores."""
    code = """if 1:
        import importlib, os
        import numpy as np
        import torch
        evaluate, count_list = importlib.import_module("04_evaluate"), []
        network = evaluate.model.KeypointNet(3).eval()
        about_dict = {"category_list": ["background", "a", "b"], "max_per_class": 1, "scale": 1.0,
                      "box_size": [30, 30]}
        evaluate.THREADS = 2
        def change(image):
            count_list.append(len(os.listdir("/proc/self/task")))
            return image
        before = len(os.listdir("/proc/self/task"))
        images = list(np.zeros((8, 320, 320, 3), np.uint8))
        evaluate.predict(network, about_dict, images, change)
        print(max(count_list) - before)
    """
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "2"}).stdout
    assert int(output) == 2
