"""04_evaluate.py: pairing, the confusion matrix and what follows from it, on hand-worked cases."""

import json
import math
import shlex

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from conftest import Sees, call_main, load

model, evaluate = load("02_model"), load("04_evaluate")
Keypoint = evaluate.Keypoint

CATEGORIES = ["background", "left", "right"]
ABOUT = {"category_list": CATEGORIES, "box_size": [30, 30], "max_per_class": 1}
FILES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]


def points(*picture_list):
    """Keypoints; for each picture a list of rows: class id, x, y[, score], by default 0.9."""
    return [Keypoint(picture, *row, *([0.9] if len(row) == 3 else []))
            for picture, row_list in enumerate(picture_list) for row in row_list]


def classes(pair_list):
    return [(truth.class_id, prediction.class_id) for truth, prediction in pair_list]


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
    ([(1, 0, 0), (2, 6, 0)], [(2, 0, 0)], {(1, 0)}),
    ([(1, 0, 0)], [(2, 3, 0)], {(0, 0)}),  # a confusion
    ([(1, 0, 0)], [(2, 3, 10)], set()),  # too far for one
    ([], [(1, 0, 0)], set()), ([(1, 0, 0)], [], set()), ([], [], set())])
def test_pairs_are_one_to_one_own_class_first_nearest_first(found, truth, expected):
    found_list, truth_list = points(found), points(truth)
    assert {(found_list.index(prediction), truth_list.index(truth))
            for truth, prediction in evaluate.pair(found_list, truth_list)
            if truth.class_id and prediction.class_id} == expected


def random_points(rng, pictures=4):
    return points(*[[(int(rng.integers(1, 3)), *rng.uniform(0, 30, 2))
                     for _ in range(rng.integers(0, 8))] for _ in range(pictures)])


def test_each_prediction_and_each_label_is_in_exactly_one_pair():
    rng = np.random.default_rng(0)
    for _ in range(50):
        found_list, truth_list = random_points(rng), random_points(rng)
        pair_list = evaluate.pair(found_list, truth_list)
        assert sorted(found for _, found in pair_list if found.class_id) == sorted(found_list)
        assert sorted(truth for truth, _ in pair_list if truth.class_id) == sorted(truth_list)
        for truth, found in pair_list:
            assert truth.picture == found.picture and (truth.class_id or found.class_id)
            distance = math.dist(truth[2:4], found[2:4])
            most = evaluate.PAIR_RADIUS if truth.class_id and found.class_id else 0
            assert distance <= most


def test_labels_that_are_equal_in_all_are_still_two():
    pair_list = evaluate.pair(points([(1, 5, 5)]), points([(1, 5, 5), (1, 5, 5)]))
    assert sorted(classes(pair_list)) == [(1, 0), (1, 1)]


def test_keypoints_of_different_pictures_are_never_paired():
    pair_list = evaluate.pair(points([], [(1, 5, 5)]), points([(1, 5, 5)], []))
    assert classes(pair_list) == [(1, 0), (0, 1)]


# ---- confusion matrix, precision, recall

FOUND = points([(1, 10, 10), (2, 50, 50)],  # both right
               [(2, 10, 10)],  # a confusion
               [(1, 200, 200)],  # a false alarm and a miss
               [],  # an empty picture left empty
               [],  # a miss
               [(2, 11, 10), (2, 13, 10)])  # one right and one too many
TRUTH = points([(1, 10, 13), (2, 50, 46)], [(1, 10, 12)], [(1, 10, 10)], [], [(2, 7, 7)],
               [(2, 10, 10)])
PAIRS = evaluate.pair(FOUND, TRUTH)
MATRIX = [[1, 1, 1], [1, 1, 1], [1, 0, 2]]  # worked out by hand; rows: background, left, right


def test_the_confusion_matrix_equals_one_worked_out_by_hand():
    assert evaluate.confusion_matrix(PAIRS, 3).tolist() == [[0, 1, 1], *MATRIX[1:]]
    assert summary()["confusion_matrix"] == MATRIX  # an empty picture that was left empty


def test_the_matrix_counts_each_label_and_each_prediction_once():
    matrix = evaluate.confusion_matrix(PAIRS, 3)
    assert matrix[1:].sum() == len(TRUTH) and matrix[:, 1:].sum() == len(FOUND)


def test_precision_and_recall_of_a_class_come_from_its_column_and_row():
    matrix = np.array(MATRIX)
    left = {"precision": 0.5, "recall": 0.3333, "f1": 0.4, "support": 3}
    right = {"precision": 0.5, "recall": 0.6667, "f1": 0.5714, "support": 3}
    assert evaluate.precision_recall(matrix, [1]) == left
    assert evaluate.precision_recall(matrix, [2]) == right
    both = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 6}
    assert evaluate.precision_recall(matrix, [1, 2]) == evaluate.overall(PAIRS, 3) == both


@pytest.mark.parametrize("matrix, expected", [
    ([[3, 0], [0, 0]], (None, None, None, 0)),  # nothing to find, nothing found
    ([[0, 0], [4, 0]], (None, 0.0, 0.0, 4)),  # never predicted
    ([[0, 4], [0, 0]], (0.0, None, 0.0, 0))])  # only false alarms
def test_where_nothing_can_be_divided_there_is_none(matrix, expected):
    assert tuple(evaluate.precision_recall(np.array(matrix), [1]).values()) == expected


def test_the_curve_holds_precision_and_recall_of_what_reaches_each_threshold():
    found_list = points([(1, 10, 10, 0.7), (2, 90, 90, 0.3)], [(1, 50, 50, 0.1)])
    curve = evaluate.precision_recall_curve(found_list, points([(1, 10, 10)], [(1, 50, 50)]), 3)
    assert curve.shape == (49, 3) and (np.diff(curve[:, 0]) > 0).all()
    for threshold, precision, recall in curve:
        right = sum(score >= threshold for score in (0.7, 0.1))
        predictions = right + (0.3 >= threshold)
        expected = right / predictions if predictions else np.nan
        assert recall == right / 2 and precision == pytest.approx(expected, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("max_per_class", [1, 9])
def test_predictions_at_a_threshold_are_those_of_a_lower_one_whose_score_reaches_it(max_per_class):
    torch.manual_seed(0)
    network, about_dict = model.KeypointNet(3).eval(), {**ABOUT, "max_per_class": max_per_class}
    images_4d_array = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    all_list = evaluate.predict(network, about_dict, images_4d_array, 0.0)
    for threshold in (0.2, 0.3, 0.4):
        found_list = evaluate.predict(network, about_dict, images_4d_array, threshold)
        assert found_list == [found for found in all_list if found.score >= threshold]


# ---- errors in px

def summary(found_list=FOUND, truth_list=TRUTH, all_list=FOUND, pictures=6):
    pair_list = evaluate.pair(found_list, truth_list)
    return evaluate.summarise(pair_list, all_list, truth_list, pictures, CATEGORIES)


def test_errors_are_prediction_minus_truth_of_the_right_pairs_only():
    assert evaluate.right_errors(PAIRS).tolist() == [[0, -3], [0, 4], [1, 0]]


def test_the_summary_equals_one_worked_out_by_hand():
    result = summary()
    error = result["error_px"]
    assert result["images"] == 6 and result["confusion_matrix"] == MATRIX
    assert (error["mean"], error["median"], error["max"]) == (2.667, 3, 4)
    assert error["within_3px"] == 0.6667 and error["bias"] == [0.333, 0.333]
    assert error["p90"] == pytest.approx(3.8) and error["p99"] == pytest.approx(3.98)
    assert result["classes"]["left"]["error_px"] == {"mean": 3, "p95": 3}
    assert result["classes"]["right"]["error_px"]["mean"] == 2.5


def test_recall_within_is_the_share_of_all_labels_that_are_right_and_so_near():
    assert summary()["recall_within"] == {"2px": 0.1667, "5px": 0.5, "10px": 0.5}  # 1, 3 and 3 of 6


def test_all_points_counts_each_label_with_its_classes_best_cell_whatever_the_score():
    best_list = points(*[[(1, 10, 10, 0.1), (2, 50, 50, 0.02)]] * 6)
    left = [3, 2, 0]  # from (10, 10) to the left labels; from (50, 50) to the right ones
    right = [4, np.hypot(43, 43), np.hypot(40, 40)]
    expected = pytest.approx(np.mean(left + right), abs=1e-3)
    assert summary(all_list=best_list)["error_px"]["all_points"] == expected
    worse_list = points(*[[(1, 99, 99, 0.05), (2, 9, 9, 0.01)]] * 6)  # the best of a class counts
    for all_list in (worse_list + best_list, best_list + worse_list):
        assert summary(all_list=all_list)["error_px"]["all_points"] == expected


def test_all_points_is_none_where_a_picture_holds_several_of_a_class():
    several_list = points([(1, 10, 10), (1, 90, 90)], [(2, 50, 50)])
    assert summary(several_list, several_list, several_list, 2)["error_px"]["all_points"] is None
    spread_list = points([(1, 10, 10), (2, 90, 90)], [(1, 50, 50)])
    assert summary(spread_list, spread_list, spread_list, 2)["error_px"]["all_points"] == 0


def test_a_summary_without_any_prediction_or_label_holds_none():
    best_list = points([(1, 10, 10, 0.1), (2, 50, 50, 0.1)])
    for truth_list in ([], points([(1, 3, 3)])):
        result = summary([], truth_list, best_list, 1)
        assert result["error_px"]["mean"] is None and result["error_px"]["bias"] is None
        assert result["overall"]["precision"] is None
        assert (result["error_px"]["all_points"] is None) == (len(truth_list) == 0)
        share = 0 if truth_list else None
        assert result["recall_within"] == {"2px": share, "5px": share, "10px": share}


def test_the_blind_guess_answers_each_classs_median_place_in_the_training_split():
    label_list = [(0, 1, 10, 10), (1, 1, 12, 30), (2, 1, 90, 20), (0, 2, 50, 50)]
    label_2d_array = np.array(label_list, np.float32)
    truth_list = points([(1, 12, 24), (2, 80, 10)], [])  # the medians are (12, 20) and (50, 50)
    guess = evaluate.blind_guess(label_2d_array, truth_list, 2, CATEGORIES)
    # Four guesses, one right; errors 4 and 50.
    assert guess == {"precision": 0.25, "recall": 0.5, "error_px": 27.0}


def test_the_blind_guess_knows_only_classes_that_the_training_split_holds():
    truth_list = points([(1, 12, 20), (2, 80, 10)])
    guess = evaluate.blind_guess(np.array([(0, 1, 12, 20)], np.float32), truth_list, 1, CATEGORIES)
    assert guess == {"precision": 1.0, "recall": 0.5, "error_px": 0.0}
    guess = evaluate.blind_guess(np.zeros((0, 4), np.float32), truth_list, 1, CATEGORIES)
    assert guess["precision"] is None and guess["recall"] == 0 and guess["error_px"] is None


# ---- tests of a network

SEES = Sees().eval()


def seen_pictures():
    """Three grey pictures: two keypoints, one, none; a pixel each."""
    images_4d_array = np.full((3, 96, 128, 3), 128, np.uint8)
    truth_list = points([(1, 40.5, 33.5), (2, 100.5, 70.5)], [(1, 64.5, 31.5)], [])
    for picture, class_id, x, y, _ in truth_list:
        images_4d_array[picture, int(y), int(x)] = (255, 255, 255) if class_id == 1 else (255, 0, 0)
    return images_4d_array, truth_list


def test_predictions_hold_picture_class_place_and_score_and_each_class_without_a_threshold():
    images_4d_array, truth_list = seen_pictures()
    found_list = evaluate.predict(SEES, ABOUT, images_4d_array, 0.5)
    expected_list = [truth[:4] for truth in truth_list]
    assert np.allclose([found[:4] for found in found_list], expected_list, atol=1e-3)
    assert all(found.score > 0.99 for found in found_list)
    all_list = evaluate.predict(SEES, ABOUT, images_4d_array, 0.0)
    assert [found[:2] for found in all_list] == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert all_list[3].score < 0.01  # a class that is not there has its best cell, too


def test_a_network_in_training_mode_is_not_judged_in_silence():
    network = model.KeypointNet(3).train()
    with pytest.raises(AssertionError, match="eval"):
        evaluate.predict(network, ABOUT, np.zeros((1, 64, 64, 3), np.uint8), 0.5)


def test_the_shift_test_gives_zero_for_a_network_that_moves_its_answer_with_the_picture():
    result = evaluate.shift_test(SEES, ABOUT, *seen_pictures(), 0.5)
    assert result["std_px"] <= 0.001 and result["max_px"] <= 0.001 and result["lost"] == 0


def test_the_shift_test_shows_an_answer_that_depends_on_the_place_in_the_cell():
    result = evaluate.shift_test(Sees(snap=8).eval(), ABOUT, *seen_pictures(), 0.5)
    # Over 32 shifts it lies evenly 0.5 to 7.5 px off: sqrt((64 - 1) / 12) px in x, and in y.
    assert result["std_px"] == pytest.approx(np.sqrt(2 * 63 / 12), abs=0.01) and result["lost"] == 0
    assert 3.5 < result["max_px"] <= 3.5 * np.sqrt(2) + 0.01


def test_the_shift_test_counts_what_is_not_found():
    images_4d_array, _ = seen_pictures()
    truth_list = points([(1, 40.5, 33.5), (2, 20, 20)])
    assert evaluate.shift_test(SEES, ABOUT, images_4d_array, truth_list, 0.5)["lost"] == 0.5
    result = evaluate.shift_test(SEES, ABOUT, images_4d_array, points([(2, 20, 20)]), 0.5)
    assert result == {"std_px": None, "max_px": None, "lost": 1}
    result = evaluate.shift_test(SEES, ABOUT, images_4d_array, [], 0.5)
    assert result == {"std_px": None, "max_px": None, "lost": None}


def test_the_robustness_table_has_a_row_a_change_and_the_unchanged_row_is_right():
    result = evaluate.robustness(SEES, ABOUT, *seen_pictures(), 0.5)
    assert list(result) == list(evaluate.CHANGE_DICT)
    unchanged = result["as it is"]
    assert unchanged["precision"] == unchanged["recall"] == 1
    assert unchanged["mean_error_px"] <= 0.001
    assert any(row["recall"] == 0 for row in result.values())  # a pixel does not survive them all


def test_the_shift_test_asks_for_so_many_pictures_at_most_each_32_times(monkeypatch):
    monkeypatch.setattr(evaluate, "SHIFT_PICTURES", 3)
    asked_list = []
    monkeypatch.setattr(evaluate, "predict", lambda network, about_dict, images, threshold:
                        asked_list.extend(image.min() for image in images) or [])
    truth_list = points([], *[[(1, 40.5, 33.5)]] * 6)
    images_4d_array = np.ones((7, 64, 64, 3), np.uint8) * np.arange(7).reshape(7, 1, 1, 1)
    evaluate.shift_test(SEES, ABOUT, images_4d_array, truth_list, 0.5)
    assert sorted(asked_list) == [1] * 32 + [2] * 32 + [3] * 32


@pytest.mark.parametrize("name", list(evaluate.CHANGE_DICT))
def test_a_change_of_the_surroundings_keeps_size_and_place_and_repeats(name):
    array = np.full((48, 64, 3), 120, np.uint8)
    array[16:32, 20:44] = (200, 150, 60)
    changed = [np.asarray(evaluate.CHANGE_DICT[name](Image.fromarray(array))) for _ in range(2)]
    assert changed[0].shape == array.shape and np.array_equal(*changed)
    assert (name == "as it is") == np.array_equal(changed[0], array)
    bright = changed[0].astype(float).sum(axis=2)
    row, column = np.nonzero(bright > (bright[24, 32] + bright[4, 4]) / 2)
    assert abs(np.median(row) - 23.5) <= 1 and abs(np.median(column) - 31.5) <= 1


@pytest.mark.parametrize("name, expected", [
    ("warmer", (108, 100, 90)), ("cooler", (92, 100, 110)),
    ("darker, x 0.8", (80, 80, 80)), ("brighter, x 1.2", (120, 120, 120))])
def test_light_and_colour_change_by_the_factors_that_are_told(name, expected):
    changed = evaluate.CHANGE_DICT[name](Image.new("RGB", (4, 4), (100, 100, 100)))
    assert np.abs(np.asarray(changed)[0, 0].astype(int) - expected).max() <= 1


def test_the_speed_report_holds_plausible_numbers(monkeypatch):
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 3)
    network = model.fold_batch_norm(model.KeypointNet(3).eval())
    result = evaluate.speed(network, ABOUT, np.zeros((70, 96, 3), np.uint8))
    assert list(result) == ["decode_ms", "network_ms", "picture_ms", "pictures_per_second"]
    assert 0 < result["network_ms"] and 0 < result["decode_ms"] < result["picture_ms"] < 1000
    assert result["pictures_per_second"] == pytest.approx(1000 / result["picture_ms"], rel=0.02)


# ---- labels that are probably wrong

def test_suspicious_labels_are_moved_swapped_missing_and_not_there(capsys):
    found_list = points(*[[(1, 10, 10)]] * 4, [], [(1, 10, 10)])
    truth_list = points([(1, 10, 10.5)], [(1, 17, 10)], [(1, 80, 10)], [(2, 11, 10)], [(2, 5, 5)],
                        [])
    evaluate.print_suspicious(evaluate.pair(found_list, truth_list), FILES, CATEGORIES)
    head, *line_list = capsys.readouterr().out.strip().split("\n")
    assert "disagree in 6 places" in head
    text_list = [line.strip() for line in line_list if line.split()[0] in FILES]
    false_alarm = "label background, prediction left: false alarm, 0.90"
    assert sorted(text_list) == ["b.jpg  x 17 y 10  label left, prediction left: 7.00 px off",
                                 f"c.jpg  x 10 y 10  {false_alarm}",
                                 "c.jpg  x 80 y 10  label left, prediction background: missed",
                                 "d.jpg  x 11 y 10  label right, prediction left: confused, 0.90",
                                 "e.jpg  x 5 y 5  label right, prediction background: missed",
                                 f"f.jpg  x 10 y 10  {false_alarm}"]


def test_where_no_label_disagrees_nothing_is_announced(capsys):
    pair_list = evaluate.pair(points([(1, 5, 5)]), points([(1, 5, 8.9)]))
    evaluate.print_suspicious(pair_list, FILES, CATEGORIES)
    output = capsys.readouterr().out
    assert "disagree in 0 places" in output and "worst" not in output and ":" not in output


# ---- pictures and report

def test_the_worst_cases_are_the_wrong_ones_and_then_the_largest_errors():
    text_list = [f"{truth.picture}: {evaluate.verdict(truth, found)}"
                 for truth, found in evaluate.worst_cases(PAIRS)]
    assert sorted(text_list[:5]) == ["1: confused, 0.90", "2: false alarm, 0.90", "2: missed",
                                     "4: missed", "5: false alarm, 0.90"]
    assert text_list[5:] == ["0: 4.00 px off", "0: 3.00 px off", "5: 1.00 px off"]


def test_the_surest_false_alarms_come_first():
    found_list = points(*[[(1, 10, 10, score)] for score in (0.6, 0.95, 0.8)])
    case_list = evaluate.worst_cases(evaluate.pair(found_list, []))
    assert [truth.picture for truth, _ in case_list] == [1, 2, 0]


def test_of_many_worst_cases_twenty_are_shown_five_of_them_errors():
    truth_list = points(*[[(1, 5, 5)]] * 60)
    case_list = evaluate.worst_cases(evaluate.pair(truth_list[:30], truth_list))
    assert classes(case_list) == [(1, 0)] * 15 + [(1, 1)] * 5


@pytest.fixture
def figure_list(monkeypatch):
    """The figures that would have been saved, drawn."""
    result_list = []
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, path: result_list.append(figure))
    return result_list


@pytest.mark.parametrize("names", [
    ["left", "right"], ["$\\frac$", "a_$b$^{c"], ["name " * 30, "n" * 200],
    [f"part {number} of a mouse" for number in range(17)]])
@pytest.mark.filterwarnings("error")
def test_the_confusion_picture_keeps_its_titles_whatever_classes_are_called(figure_list, names):
    matrix_list = np.eye(1 + len(names), dtype=int).tolist()
    evaluate.draw_confusion("confusion.png", matrix_list, ["background", *names])
    figure, = figure_list
    FigureCanvasAgg(figure).draw()
    axes, = figure.axes
    tick_list = axes.get_xticklabels() + axes.get_yticklabels()
    for text in (axes.xaxis.label, axes.yaxis.label, *tick_list):
        box = text.get_window_extent()
        assert text.get_text() and figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)
    assert axes.bbox.width > 100


def test_the_confusion_picture_shows_each_count_but_that_of_the_pictures(figure_list):
    matrix_list = [[23, 1, 0], [2, 30, 4], [5, 6, 40]]
    evaluate.draw_confusion("confusion.png", matrix_list, CATEGORIES)
    axes, = figure_list[0].axes
    text_dict = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert text_dict == {(0, 1): "1", (1, 0): "2", (1, 1): "30", (1, 2): "4",
                         (2, 0): "5", (2, 1): "6", (2, 2): "40"}
    share = axes.images[0].get_array()
    assert share[1, 1] == pytest.approx(30 / 36)
    assert share[0, 0] == 0 and share[0, 1] == pytest.approx(1 / 37)
    assert matrix_list[0][0] == 23  # what goes into metrics.json stays


def test_the_curve_and_the_errors_are_drawn_as_they_are(figure_list):
    curve = np.array([(0.2, 0.5, 1.0), (0.4, 0.75, 0.5), (0.6, np.nan, 0.0)])
    evaluate.draw_curve("curve.png", curve, 0.5)
    evaluate.draw_errors("errors.png", np.array([(0.5, -0.25), (3, 1)]))
    precision, recall, threshold = figure_list[0].axes[0].lines
    assert np.array_equal(precision.get_ydata(), curve[:, 1], equal_nan=True)
    assert (precision.get_label(), recall.get_label()) == ("precision", "recall")
    assert list(recall.get_ydata()) == [1, 0.5, 0] and set(threshold.get_xdata()) == {0.5}
    axes, = figure_list[1].axes
    assert axes.collections[0].get_offsets().tolist() == [[0.5, -0.25], [3, 1]]
    assert axes.get_xlim() == (-3, 3) and axes.get_ylim() == (3, -3)  # y points down


@pytest.mark.filterwarnings("error")
def test_plots_and_close_ups_are_drawn_where_nothing_was_found(tmp_path):
    pair_list = evaluate.pair([], points([(1, 3, 3)]))
    evaluate.draw_errors(tmp_path / "errors.png", evaluate.right_errors(pair_list))
    curve_2d_array = evaluate.precision_recall_curve([], points([(1, 3, 3)]), 3)
    evaluate.draw_curve(tmp_path / "curve.png", curve_2d_array, 0.5)
    matrix_list = [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    evaluate.draw_confusion(tmp_path / "confusion.png", matrix_list, CATEGORIES)
    images_4d_array = np.zeros((1, 64, 64, 3), np.uint8)
    for number, case_list in enumerate((pair_list, [])):
        path = tmp_path / f"cases {number}.png"
        evaluate.draw_cases(path, case_list, images_4d_array, FILES)
    for name in ("errors", "curve", "confusion", "cases 0", "cases 1"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 100


def test_a_close_up_shows_label_in_white_and_prediction_in_colour(monkeypatch):
    call_list = []
    monkeypatch.setattr(evaluate, "save_close_ups", lambda *a, **o: call_list.append((*a, o)))
    image_list = [np.zeros((100, 100, 3), np.uint8), np.ones((200, 150, 3), np.uint8)]
    truth_list = points([(1, 9.5, 9.5)], [(2, 53.5, 100.5)])
    pair_list = evaluate.pair(points([], [(1, 50.5, 100.5), (2, 90, 20)]), truth_list)
    evaluate.draw_cases("cases.png", pair_list, image_list, ["first.jpg", "x" * 30 + "second.jpg"])
    (path, tile_list, _), = call_list
    assert path == "cases.png"
    colour_list = evaluate.colour_of(1), evaluate.colour_of(2)
    expected_dict = {  # title: place in the middle, crosses
        "first.jpg: missed": (9.5, 9.5, [(9.5, 9.5, "white")]),
        "xxxxxsecond.jpg: confused, 0.90": (
            53.5, 100.5, [(53.5, 100.5, "white"), (50.5, 100.5, colour_list[0])]),
        "xxxxxsecond.jpg: false alarm, 0.90": (90, 20, [(90, 20, colour_list[1])])}
    assert len(set(colour_list)) == 2 and len(tile_list) == 3
    for title, image_3d_array, x, y, reach, point_list in tile_list:
        assert (x, y, point_list) == expected_dict[title]
        assert image_3d_array is image_list[not title.startswith("first")]
        assert reach >= 3 * evaluate.PAIR_RADIUS  # what was paired shows


def test_the_report_can_be_printed_where_there_is_nothing_to_report(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 1)
    metrics = summary([], [], [], 1)
    metrics["blind_guess"] = {"precision": None, "recall": None, "error_px": None}
    network, image_3d_array = model.KeypointNet(3).eval(), np.zeros((64, 64, 3), np.uint8)
    metrics["speed"] = evaluate.speed(network, ABOUT, image_3d_array)
    metrics["robustness"] = {"as it is": {"precision": None, "recall": None, "mean_error_px": None}}
    metrics["shift"] = {"std_px": None, "max_px": None, "lost": None}
    evaluate.print_report(metrics, CATEGORIES)
    output = capsys.readouterr().out
    assert "left" in output and "None" not in output and "all_points" not in output


# ---- the whole script, with a network that knows

def make_data_set(folder, category_list=CATEGORIES, max_per_class=1):
    """A data set of grey pictures as 01 would pack it, and weights that Sees stands in for."""
    images_4d_array, truth_list = seen_pictures()
    label_2d_array = np.array([truth[:4] for truth in truth_list], np.float32)
    folder.mkdir(parents=True)
    dataset_dict = {"category_list": category_list, "box_size": [30, 30],
                    "max_per_class": max_per_class}
    for split in ("train", "val", "test"):
        np.save(folder / f"{split}_images.npy", images_4d_array)
        np.save(folder / f"{split}_labels.npy", label_2d_array)
        dataset_dict[split] = {"file_list": FILES[:3], "size_list": [[128, 96]] * 3}
    (folder / "dataset.json").write_text(json.dumps(dataset_dict), encoding="utf-8")
    (folder / "weights.pt").write_bytes(b"")
    return folder


@pytest.fixture
def knowing(monkeypatch):
    """04 finds what the pictures hold; the dict is what the weights know of their data."""
    about_dict = dict(ABOUT)
    monkeypatch.setattr(model, "load_weights", lambda folder, device: (
        print(f"using {folder / 'weights.pt'}"), (SEES, about_dict))[1])
    monkeypatch.setattr(model, "fold_batch_norm", lambda network: network)
    monkeypatch.setattr(evaluate, "speed", lambda *arguments: {"network_ms": 1})
    return about_dict


@pytest.fixture
def no_pictures(monkeypatch):
    for name in ("confusion", "curve", "errors", "cases"):
        monkeypatch.setattr(evaluate, f"draw_{name}", lambda *arguments: None)


def run(monkeypatch, *arguments):
    assert call_main(evaluate, monkeypatch, "--quick", *arguments) == (0, "")


def test_each_split_has_metrics_and_pictures_of_its_own(knowing, tmp_path, monkeypatch):
    data = make_data_set(tmp_path / "data")
    results = data / "results"
    name_list = ["metrics.json", "confusion.png", "precision_recall.png", "errors.png", "worst.png"]
    before_dict = {}
    for split in ("test", "val", "train"):
        run(monkeypatch, "--data", data, *(["--split", split] if split != "test" else []))
        suffix = "" if split == "test" else f"_{split}"
        own_set = {name.replace(".", f"{suffix}.") for name in name_list}
        if split == "train":
            own_set = own_set - {"worst_train.png"} | {"label_check.png"}
        after_dict = {path.name: (path.stat().st_mtime_ns, path.read_bytes())
                      for path in results.iterdir()}
        assert set(after_dict) - set(before_dict) == own_set
        assert before_dict.items() <= after_dict.items()  # nothing of another split was touched
        before_dict = after_dict
    metrics = json.loads((results / "metrics_val.json").read_text(encoding="utf-8"))
    assert metrics["overall"] == {"precision": 1, "recall": 1, "f1": 1, "support": 3}
    assert metrics["confusion_matrix"] == [[1, 0, 0], [0, 2, 0], [0, 0, 1]]
    assert metrics["recall_within"] == {"2px": 1, "5px": 1, "10px": 1}
    assert metrics["error_px"]["all_points"] <= 0.001


def test_the_blind_guess_learns_from_train_whatever_split_is_judged(
        knowing, no_pictures, tmp_path, monkeypatch):
    data = make_data_set(tmp_path / "data")
    np.save(data / "train_labels.npy", np.array([(0, 2, 100.5, 67.5)], np.float32))
    run(monkeypatch, "--data", data, "--split", "val")
    metrics = json.loads((data / "results" / "metrics_val.json").read_text(encoding="utf-8"))
    assert metrics["blind_guess"] == {"precision": 0.3333, "recall": 0.3333, "error_px": 3}


def test_the_next_command_leads_to_the_same_folder_whatever_it_is_called(
        knowing, no_pictures, tmp_path, monkeypatch, capsys):
    data = make_data_set(tmp_path / "my data's folder")
    run(monkeypatch, "--data", data)
    next_line, = (line for line in capsys.readouterr().out.split("\n") if line.startswith("next: "))
    word_list = shlex.split(next_line)
    assert word_list[2] == "05_predict.py" and word_list[word_list.index("--data") + 1] == str(data)


def test_weights_that_know_fewer_of_a_class_than_the_data_holds_are_told_in_the_first_lines(
        knowing, no_pictures, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--data", make_data_set(tmp_path / "nine", max_per_class=9))
    first, second, *_ = capsys.readouterr().out.split("\n")
    assert first.startswith("using ")
    assert " 1 " in second and "9" in second and "03_train.py" in second
    knowing["max_per_class"] = 9
    for most in (9, 2):
        run(monkeypatch, "--data", make_data_set(tmp_path / f"at most {most}", max_per_class=most))
        assert "03_train.py" not in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_class_names_without_letters_in_any_font_are_drawn_as_numbers(
        knowing, tmp_path, monkeypatch):
    names = ["background", "左眼", "𓂀 eye"]
    knowing["category_list"] = names
    drawn_list, real = [], evaluate.draw_confusion

    def draw(path, matrix_list, name_list):
        drawn_list.append(name_list)
        real(path, matrix_list, name_list)

    monkeypatch.setattr(evaluate, "draw_confusion", draw)
    data = make_data_set(tmp_path / "data", names)
    path = data / "dataset.json"  # the names of pictures are drawn, too
    text = path.read_text(encoding="utf-8").replace("a.jpg", "图 🎯.jpg")
    path.write_text(text, encoding="utf-8")
    run(monkeypatch, "--data", data, "--split", "train")
    (_, *shown_list), = drawn_list
    assert shown_list == ["1", "2"]
    metrics = json.loads((data / "results" / "metrics_train.json").read_text(encoding="utf-8"))
    assert list(metrics["classes"]) == names[1:]


def test_weights_of_other_classes_end_in_a_sentence_with_the_command_that_helps(
        knowing, tmp_path, monkeypatch, capsys):
    data = make_data_set(tmp_path / "data", ["background", "nose", "mouth"])
    code, sentence = call_main(evaluate, monkeypatch, "--data", data)
    assert code == 1
    for part in (data, "left", "nose", "03_train.py --data"):
        assert str(part) in sentence
    assert f"using {data / 'weights.pt'}" in capsys.readouterr().out


def test_a_class_called_overall_has_its_own_row(capsys, monkeypatch):
    metrics = summary()
    metrics["classes"] = {"overall": metrics["classes"]["left"]}
    metrics |= {"robustness": {}, "blind_guess": {}, "shift": {}, "speed": {}}
    evaluate.print_report(metrics, ["background", "overall"])
    first_list = [line.split()[:1] for line in capsys.readouterr().out.splitlines()[:4]]
    assert first_list.count(["overall"]) == 2
