"""04_evaluate.py: pairing, the confusion matrix and what follows from it, the blind guess, the shift test, on hand-worked cases."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import Sees, load

model, evaluate = load("02_model"), load("04_evaluate")

CATEGORIES = ["background", "left", "right"]
ABOUT = {"category_list": CATEGORIES, "box_size": [30, 30], "max_per_class": 1}


def rows(*row_list, columns=4):
    """Rows (class id, x, y[, score]) as an array; a score of 0.9 where none is given."""
    return np.array([(*row, 0.9)[:columns] for row in row_list], float).reshape(-1, columns)


def truths(*row_list):
    return rows(*row_list, columns=3)


# ---------------------------------------------------------------- pairing

@pytest.mark.parametrize("found, truth, expected", [
    (rows((1, 5, 5)), truths((1, 8, 9)), {(0, 0)}),  # 5 px off
    (rows((1, 5, 5)), truths((1, 5, 15)), {(0, 0)}),  # just within
    (rows((1, 5, 5)), truths((1, 5, 15.1)), set()),  # just too far
    (rows((1, 0, 0), (1, 4, 0)), truths((1, 5, 0)), {(1, 0)}),  # the nearer answer gets it
    (rows((1, 0, 0)), truths((1, 6, 0), (1, 3, 0)), {(0, 1)}),  # one keypoint only
    (rows((1, 0, 0), (1, 4, 0)), truths((1, 3, 0), (1, 11, 0)), {(1, 0)}),  # nearest pair first, though two pairs could be made
    (rows((1, 0, 0), (2, 1, 0)), truths((2, 0, 0)), {(1, 0)}),  # own class before a nearer other one
    (rows((1, 0, 0), (2, 6, 0)), truths((2, 0, 0), (1, 6, 0)), {(0, 1), (1, 0)}),
    (rows((1, 0, 0), (2, 6, 0)), truths((2, 0, 0)), {(1, 0)}),
    (rows((1, 0, 0)), truths((2, 3, 0)), {(0, 0)}),  # a confusion
    (rows(), truths((1, 0, 0)), set()), (rows((1, 0, 0)), truths(), set()), (rows(), truths(), set())])
def test_answers_and_keypoints_are_paired_one_to_one_own_class_first_nearest_first(found, truth, expected):
    assert set(evaluate.pair(found, truth)) == expected


def test_pairing_never_uses_an_answer_or_a_keypoint_twice():
    rng = np.random.default_rng(0)
    for _ in range(50):
        found, truth = (np.column_stack([rng.integers(1, 3, n), rng.uniform(0, 30, (n, 2))]) for n in rng.integers(0, 8, 2))
        pair_list = evaluate.pair(found, truth)
        assert len({i for i, _ in pair_list}) == len({j for _, j in pair_list}) == len(pair_list)
        for i, j in pair_list:
            assert np.hypot(*(found[i, 1:] - truth[j, 1:])) <= evaluate.PAIR_RADIUS


# ---------------------------------------------------------------- confusion matrix, precision, recall

FOUND = [rows((1, 10, 10), (2, 50, 50)),  # both right
         rows((2, 10, 10)),  # a confusion
         rows((1, 200, 200)),  # a false alarm and a miss
         rows(), rows(), rows((2, 11, 10), (2, 13, 10))]  # an empty picture left empty; a miss; one right and one answer too many
TRUTH = [truths((1, 10, 13), (2, 50, 46)), truths((1, 10, 12)), truths((1, 10, 10)), truths(), truths((2, 7, 7)), truths((2, 10, 10))]


def test_the_confusion_matrix_equals_one_worked_out_by_hand():
    # Rows truth, columns answer: background, left, right.
    assert evaluate.confusion_matrix(FOUND, TRUTH, 3).tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 2]]


def test_the_matrix_counts_each_keypoint_and_each_answer_once():
    matrix = evaluate.confusion_matrix(FOUND, TRUTH, 3)
    assert matrix[1:].sum() == sum(map(len, TRUTH)) and matrix[:, 1:].sum() == sum(map(len, FOUND))


def test_precision_and_recall_of_a_class_come_from_its_column_and_row():
    matrix = evaluate.confusion_matrix(FOUND, TRUTH, 3)
    assert evaluate.precision_recall(matrix, [1]) == {"precision": 0.5, "recall": 0.3333, "f1": 0.4, "support": 3}
    assert evaluate.precision_recall(matrix, [2]) == {"precision": 0.5, "recall": 0.6667, "f1": 0.5714, "support": 3}
    assert evaluate.precision_recall(matrix, [1, 2]) == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 6}


@pytest.mark.parametrize("matrix, expected", [
    ([[3, 0], [0, 0]], (None, None, None, 0)),  # nothing to find, nothing found
    ([[0, 0], [4, 0]], (None, 0.0, 0.0, 4)),  # never answered
    ([[0, 4], [0, 0]], (0.0, None, 0.0, 0))])  # only false alarms
def test_where_nothing_can_be_divided_there_is_none(matrix, expected):
    assert tuple(evaluate.precision_recall(np.array(matrix), [1]).values()) == expected


# ---------------------------------------------------------------- errors in px

def test_errors_are_answer_minus_truth_of_the_right_pairs_only():
    error_2d_array, keypoint_2d_array = evaluate.right_errors(FOUND, TRUTH)
    assert error_2d_array.tolist() == [[0, -3], [0, 4], [1, 0]]
    assert keypoint_2d_array.tolist() == [[0, 1, 10, 13], [0, 2, 50, 46], [5, 2, 10, 10]]


def summary():
    best_list = [rows((1, 10, 10), (2, 50, 50))] * len(TRUTH)
    return evaluate.summarise(FOUND, best_list, TRUTH, CATEGORIES)


def test_the_summary_equals_one_worked_out_by_hand():
    result = summary()
    error = result["error_px"]
    assert result["images"] == 6 and result["confusion_matrix"] == [[1, 1, 1], [1, 1, 1], [1, 0, 2]]
    assert (error["mean"], error["median"], error["max"]) == (2.667, 3, 4) and error["within_3px"] == 0.6667
    assert error["bias"] == [0.333, 0.333] and error["p90"] == pytest.approx(3.8) and error["p99"] == pytest.approx(3.98)
    assert result["classes"]["left"]["error_px"] == {"mean": 3, "p95": 3} and result["classes"]["right"]["error_px"]["mean"] == 2.5


def test_all_points_counts_each_keypoint_with_its_classes_best_cell_whatever_the_score():
    left = [3, 2, 0]  # from (10, 10) to the left truths; from (50, 50) to the right ones
    right = [4, np.hypot(43, 43), np.hypot(40, 40)]
    assert summary()["error_px"]["all_points"] == pytest.approx(np.mean(left + right), abs=1e-3)


def test_a_summary_without_any_answer_or_keypoint_holds_none():
    nothing = [rows((1, 10, 10), (2, 50, 50))]
    for truth in (truths(), truths((1, 3, 3))):
        result = evaluate.summarise([rows()], nothing, [truth], CATEGORIES)
        assert result["error_px"]["mean"] is None and result["error_px"]["bias"] is None and result["overall"]["precision"] is None
        assert (result["error_px"]["all_points"] is None) == (len(truth) == 0)


def test_the_blind_guess_answers_each_classs_median_place_in_the_training_split():
    train_label_2d_array = np.array([(0, 1, 10, 10), (1, 1, 12, 30), (2, 1, 90, 20), (0, 2, 50, 50)], np.float32)  # medians (12, 20), (50, 50)
    truth_list = [truths((1, 12, 24), (2, 80, 10)), truths()]
    guess = evaluate.blind_guess(train_label_2d_array, truth_list, CATEGORIES)
    assert guess == {"precision": 0.25, "recall": 0.5, "error_px": 27.0}  # four guesses, one right; errors 4 and 50


def test_the_blind_guess_knows_only_classes_that_the_training_split_holds():
    truth_list = [truths((1, 12, 20), (2, 80, 10))]
    guess = evaluate.blind_guess(np.array([(0, 1, 12, 20)], np.float32), truth_list, CATEGORIES)
    assert guess == {"precision": 1.0, "recall": 0.5, "error_px": 0.0}
    guess = evaluate.blind_guess(np.zeros((0, 4), np.float32), truth_list, CATEGORIES)
    assert guess["precision"] is None and guess["recall"] == 0 and guess["error_px"] is None


# ---------------------------------------------------------------- tests of a network

def seen_pictures():
    """Three grey pictures: two keypoints, one, none; a pixel each."""
    images_4d_array = np.full((3, 96, 128, 3), 128, np.uint8)
    truth_list = [truths((1, 40.5, 33.5), (2, 100.5, 70.5)), truths((1, 64.5, 31.5)), truths()]
    for image_3d_array, truth in zip(images_4d_array, truth_list):
        for class_id, x, y in truth:
            image_3d_array[int(y), int(x)] = (255, 255, 255) if class_id == 1 else (255, 0, 0)
    return images_4d_array, truth_list


def test_answers_hold_class_place_and_score_and_the_best_cell_of_each_class():
    images_4d_array, truth_list = seen_pictures()
    found = evaluate.answer(Sees(), images_4d_array[0], 1, 0.5)
    assert np.allclose(found[:, :3], truth_list[0], atol=1e-3) and (found[:, 3] > 0.99).all()
    assert np.allclose(evaluate.answer(Sees(), images_4d_array[0], 1, 0.0)[:, :3], truth_list[0], atol=1e-3)
    found, best = (evaluate.answer(Sees(), images_4d_array[1], 1, threshold) for threshold in (0.5, 0.0))
    assert found[:, 0].tolist() == [1] and best[:, 0].tolist() == [1, 2] and best[1, 3] < 0.01  # the absent class has its best guess, too


def test_the_shift_test_gives_zero_for_a_network_that_moves_its_answer_with_the_picture():
    result = evaluate.shift_test(Sees(), *seen_pictures(), ABOUT, 0.5)
    assert result["std_px"] <= 0.001 and result["max_px"] <= 0.001 and result["lost"] == 0


def test_the_shift_test_shows_an_answer_that_depends_on_the_place_in_the_cell(monkeypatch):
    # The first look alone: several would hide a part.
    monkeypatch.setattr(model, "look_again", lambda network, image_3d, keypoint_2d, class_id_1d: (keypoint_2d, torch.ones(len(keypoint_2d))))
    result = evaluate.shift_test(Sees(snap=8), *seen_pictures(), ABOUT, 0.5)
    # Over 32 shifts the answer lies evenly 0.5 to 7.5 px off: a spread of sqrt((64 - 1) / 12) px in x, likewise in y.
    assert result["std_px"] == pytest.approx(np.sqrt(2 * 63 / 12), abs=0.01) and result["lost"] == 0
    assert 3.5 < result["max_px"] <= 3.5 * np.sqrt(2) + 0.01


def test_the_shift_test_counts_what_is_not_found():
    result = evaluate.shift_test(Sees(), seen_pictures()[0], [truths((1, 40.5, 33.5), (2, 20, 20)), truths(), truths()], ABOUT, 0.5)
    assert result["lost"] == 0.5
    result = evaluate.shift_test(Sees(), seen_pictures()[0], [truths()] * 3, ABOUT, 0.5)
    assert result == {"std_px": None, "max_px": None, "lost": None}


def test_the_robustness_table_has_a_row_a_change_and_the_unchanged_row_is_right():
    result = evaluate.robustness(Sees(), *seen_pictures(), ABOUT, 0.5)
    assert set(result) == set(evaluate.CHANGE_DICT)
    unchanged = next(iter(result.values()))
    assert unchanged["precision"] == unchanged["recall"] == 1 and unchanged["mean_error_px"] <= 0.001
    assert any(row["recall"] == 0 for row in result.values())  # a single white pixel does not survive them all


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


def test_the_speed_report_holds_plausible_numbers(monkeypatch):
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 3)
    network = model.fold_batch_norm(model.KeypointNet(3).eval())
    result = evaluate.speed(network, np.zeros((64, 96, 3), np.uint8), ABOUT)
    assert 0 < result["network_ms"] and 0 < result["decode_ms"] < result["picture_ms"] < 1000
    assert result["pictures_per_second"] == pytest.approx(1000 / result["picture_ms"], rel=0.02)
    counted = 0
    def count(layer, inputs, output):
        nonlocal counted
        counted += output.numel() * layer.weight[0].numel()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, 64, 96))
    assert result["multiply_adds"] == counted


# ---------------------------------------------------------------- labels that are probably wrong, and pictures

def test_suspicious_labels_are_moved_missing_swapped_and_not_there():
    found_list = [rows((1, 10, 10)), rows((1, 10, 10)), rows((1, 10, 10)), rows((1, 10, 10)), rows(), rows((1, 10, 10))]
    truth_list = [truths((1, 10, 10.5)), truths((1, 17, 10)), truths((1, 80, 10)), truths((2, 11, 10)), truths((2, 5, 5)), truths()]
    case_dict = {picture: sentence for _, sentence, picture, _, _ in evaluate.suspicious_labels(found_list, truth_list, CATEGORIES)}
    assert {picture: sentence.split("?")[0] for picture, sentence in case_dict.items()} == {
        1: "moved", 2: "moved", 3: "swapped", 4: "not there", 5: "missing"}
    assert "7.0 px" in case_dict[1] and "70.0 px" in case_dict[2] and "right" in case_dict[3] and "left" in case_dict[3]


def test_suspicious_labels_come_worst_first():
    found_list = [np.array([(1, 10, 10, score)]) for score in (0.6, 0.95, 0.8)]
    result = evaluate.suspicious_labels(found_list, [truths()] * 3, CATEGORIES)
    assert [picture for _, _, picture, _, _ in result] == [1, 2, 0]


def test_the_worst_cases_are_the_wrong_ones_and_then_the_largest_errors():
    case_list = evaluate.worst_cases(FOUND, TRUTH)
    wrong = [title.split(": ")[1].split(",")[0] for title, *_ in case_list[:-3]]
    assert sorted(wrong) == ["confusion", "false alarm", "false alarm", "miss", "miss"]
    assert [title for title, *_ in case_list[-3:]] == ["0: 4.00 px", "0: 3.00 px", "5: 1.00 px"]


@pytest.mark.parametrize("names", [["background", "left", "right"], ["background", "$\\frac$", "a_$b$^{c"],
                                   ["background", "关键点" * 30, "n" * 200]])
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout")
def test_plots_are_drawn_whatever_the_classes_are_called(tmp_path, names):
    metrics = evaluate.summarise(FOUND, [rows((1, 0, 0), (2, 0, 0))] * len(TRUTH), TRUTH, names)
    evaluate.draw_plots(tmp_path, metrics, names, *evaluate.right_errors(FOUND, TRUTH))
    for name in ("confusion.png", "errors.png", "error_by_place.png"):
        assert Image.open(tmp_path / name).width > 100


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
def test_plots_and_case_pictures_are_drawn_where_nothing_was_found(tmp_path):
    metrics = evaluate.summarise([rows()], [rows((1, 0, 0), (2, 0, 0))], [truths((1, 3, 3))], CATEGORIES)
    (tmp_path / "errors.png").write_bytes(b"of an earlier evaluation")
    evaluate.draw_plots(tmp_path, metrics, CATEGORIES, *evaluate.right_errors([rows()], [truths((1, 3, 3))]))
    assert not (tmp_path / "errors.png").exists()
    for case_list in (evaluate.worst_cases([rows()], [truths((1, 3, 3))]), []):
        evaluate.draw_cases(tmp_path / "worst.png", np.zeros((1, 64, 64, 3), np.uint8), case_list, CATEGORIES)
        assert Image.open(tmp_path / "worst.png").width > 100
    assert (tmp_path / "confusion.png").is_file()


def test_the_report_can_be_printed_where_there_is_nothing_to_report(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 1)
    metrics = evaluate.summarise([rows()], [rows((1, 0, 0), (2, 0, 0))], [truths()], CATEGORIES)
    metrics["blind_guess"] = {"precision": None, "recall": None, "error_px": None}
    metrics["speed"] = evaluate.speed(model.KeypointNet(3).eval(), np.zeros((64, 64, 3), np.uint8), ABOUT)
    metrics["robustness"] = {"as it is": {"precision": None, "recall": None, "mean_error_px": None}}
    metrics["shift"] = {"std_px": None, "max_px": None, "lost": None}
    evaluate.print_report(metrics, CATEGORIES)
    assert "left" in capsys.readouterr().out
