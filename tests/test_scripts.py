"""The scripts as a reader runs them, on tiny data sets; and what a reader may do wrong ends in a sentence, never in a traceback."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import call_main, load, run_script, write_own_pictures

model, train, evaluate = load("02_model"), load("03_train"), load("04_evaluate")

CLASS_KEYS = {"precision", "recall", "f1", "support", "error_px"}
ERROR_KEYS = {"mean", "median", "p90", "p95", "p99", "max", "within_3px", "bias", "all_points"}


def good(result):
    """The output of a script that should have ended well."""
    assert result.returncode == 0 and "Traceback" not in result.stderr and "Warning" not in result.stderr, result.stderr
    return result.stdout


def bad(result, *parts):
    """A script that should have ended in one sentence."""
    assert result.returncode in (1, 2) and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert str(part) in result.stderr


def check_metrics(path, category_list, images, quick):
    """metrics.json holds all that the design promises."""
    metrics = json.loads(path.read_text(encoding="utf-8"))
    assert metrics["images"] == images and list(metrics["classes"]) == category_list[1:]
    assert all(set(row) >= CLASS_KEYS and set(row["error_px"]) == {"mean", "p95"} for row in metrics["classes"].values())
    assert set(metrics["overall"]) == CLASS_KEYS - {"error_px"} and set(metrics["error_px"]) == ERROR_KEYS
    assert np.shape(metrics["confusion_matrix"]) == (len(category_list),) * 2
    assert set(metrics["blind_guess"]) == {"precision", "recall", "error_px"}
    assert {"decode_ms", "network_ms", "picture_ms", "pictures_per_second"} <= set(metrics["speed"])
    assert bool(metrics["robustness"]) != quick and bool(metrics["shift"]) != quick
    if not quick:
        assert set(metrics["shift"]) == {"std_px", "max_px", "lost"} and set(metrics["robustness"]) == set(evaluate.CHANGE_DICT)
        assert all(set(row) == {"precision", "recall", "mean_error_px"} for row in metrics["robustness"].values())
    keypoint_count = sum(row["support"] for row in metrics["classes"].values())
    assert metrics["overall"]["support"] == keypoint_count == np.sum(metrics["confusion_matrix"][1:])


def check_picture(path):
    with Image.open(path) as image:
        image.load()
        assert min(image.size) > 50


@pytest.fixture(scope="module")
def trained(drawn):
    """The drawn data set with weights of a run of four updates."""
    output = good(run_script("03_train.py", "--updates", 4, "--data", drawn))
    assert "04_evaluate.py" in output and "4/4" in output
    return drawn


@pytest.fixture(scope="module")
def own_trained(own, tmp_path_factory):
    """The own pictures with weights of two updates, in a folder of their own."""
    data = tmp_path_factory.mktemp("own_trained") / "data"
    shutil.copytree(own, data)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call_main(train, monkeypatch, "--data", data, "--updates", 2) == (0, "")
    return data


def test_01_reports_what_it_drew_and_what_comes_next(drawn):
    report = (drawn / "report.txt").read_text(encoding="utf-8")
    for part in ("pictures", "without a keypoint", "keyPoint_1", "keyPoint_2", "lost by collision", "03_train.py"):
        assert part in report
    assert len(list((drawn / "images").glob("*.jpg"))) == len(list((drawn / "images").glob("*.xml"))) == 12
    check_picture(drawn / "results" / "contact_sheet.png")
    assert not list(drawn.rglob(".writing-*"))


def test_02_shows_the_shape_after_every_layer():
    output = good(run_script("02_model.py"))
    assert "[1, 3, 1920, 320]" in output and "[1, 5, 60, 10]" in output and output.count("conv ") == len(model.LAYER_LIST)
    assert "[[100.25, 700.5]]" in output.split("decode")[1]


def test_03_writes_weights_checkpoint_and_loss_curve(trained):
    network, about_dict = model.load_weights(trained / "weights.pt")
    assert about_dict["category_list"] == ["background", "keyPoint_1", "keyPoint_2"] and (trained / "weights.pt").stat().st_size < 1_500_000
    assert torch.load(trained / "checkpoint.pt", weights_only=True)["update"] == 4
    check_picture(trained / "results" / "loss.png")
    assert not list(trained.rglob(".writing-*"))


def test_04_quick_writes_metrics_without_robustness_and_shift(trained):
    output = good(run_script("04_evaluate.py", "--quick", "--data", trained))
    assert output.startswith(f"using {trained / 'weights.pt'}") and "05_predict.py" in output
    check_metrics(trained / "results" / "metrics.json", ["background", "keyPoint_1", "keyPoint_2"], 2, quick=True)
    check_picture(trained / "results" / "confusion.png")
    check_picture(trained / "results" / "worst.png")


def test_04_writes_the_whole_metrics_and_the_pictures(own_trained):
    good(run_script("04_evaluate.py", "--threshold", 0.01, "--data", own_trained))
    check_metrics(own_trained / "results" / "metrics.json", ["background", "left eye", "right eye"], 2, quick=False)
    check_picture(own_trained / "results" / "confusion.png")
    check_picture(own_trained / "results" / "worst.png")


def test_04_on_the_training_split_lists_labels_that_disagree(own_trained):
    output = good(run_script("04_evaluate.py", "--split", "train", "--quick", "--data", own_trained))
    assert "labels disagree" in output and "picture " in output.split("labels disagree")[1]
    check_metrics(own_trained / "results" / "metrics_train.json", ["background", "left eye", "right eye"], 8, quick=True)
    check_picture(own_trained / "results" / "label_check.png")


@pytest.mark.parametrize("name", ["01_prepare_data", "03_train", "04_evaluate"])
def test_every_script_says_what_its_flags_do_and_what_their_defaults_are(name, monkeypatch, capsys):
    assert call_main(load(name), monkeypatch, "--help")[0] == 0
    flag_list = capsys.readouterr().out.split("options:")[1].split("\n  --")[1:]
    assert len(flag_list) >= 3
    for flag in flag_list:
        assert "default: " in " ".join(flag.split()), flag


# ---------------------------------------------------------------- what a reader may do wrong

def test_weights_that_are_none_end_in_one_sentence(own, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(own, data)
    (data / "weights.pt").write_text("I am a text")
    bad(run_script("04_evaluate.py", "--data", data), data / "weights.pt", "03_train.py")


def call(module, monkeypatch, *arguments):
    """Run a script's main() in this process where it should end in one sentence; returns it."""
    code, sentence = call_main(module, monkeypatch, *arguments)
    assert code == 1 and sentence.startswith("error: ") and "\n" not in sentence
    return sentence


def test_a_data_folder_that_is_a_file_ends_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("I am no folder")
    write_own_pictures(tmp_path / "source", 3)
    assert str(tmp_path / "file") in call(load("01_prepare_data"), monkeypatch, "--source", tmp_path / "source", "--data", tmp_path / "file")
    assert str(tmp_path / "file") in call(load("01_prepare_data"), monkeypatch, "--pictures", 2, "--data", tmp_path / "file" / "data")


def test_evaluating_before_there_is_a_data_set_ends_in_one_sentence(own_trained, tmp_path, monkeypatch):
    shutil.copy(own_trained / "weights.pt", tmp_path / "weights.pt")
    assert "01_prepare_data.py" in call(evaluate, monkeypatch, "--data", tmp_path)


def test_weights_for_other_classes_than_the_data_set_has_end_in_one_sentence(own_trained, tmp_path, monkeypatch):
    write_own_pictures(tmp_path / "source", 3, ["nose", "mouth"])
    assert call_main(load("01_prepare_data"), monkeypatch, "--source", tmp_path / "source", "--data", tmp_path / "data")[0] == 0
    shutil.copy(own_trained / "weights.pt", tmp_path / "data" / "weights.pt")
    sentence = call(evaluate, monkeypatch, "--data", tmp_path / "data")
    assert "nose" in sentence and "left eye" in sentence and "03_train.py" in sentence


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan", "high"])
def test_a_threshold_out_of_range_ends_with_code_2(tmp_path, monkeypatch, value):
    assert call_main(evaluate, monkeypatch, "--data", tmp_path, "--threshold", value)[0] == 2


def damage(data, kind):
    """Spoil a data set; returns the file that the sentence should name."""
    if kind == "dataset.json is cut off":
        path = data / "dataset.json"
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "dataset.json lacks an entry":
        path = data / "dataset.json"
        path.write_text("{}")
    elif kind == "dataset.json is not text":
        path = data / "dataset.json"
        path.write_bytes(b"\xff\xfe\0\x80")
    elif kind == "pictures are missing":
        path = data / "test_images.npy"
        path.unlink()
    elif kind == "pictures are cut off":
        path = data / "test_images.npy"
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "pictures are empty":
        path = data / "test_images.npy"
        path.write_bytes(b"")
    elif kind == "labels are cut off":
        path = data / "train_labels.npy"
        path.write_bytes(path.read_bytes()[:140])
    elif kind == "labels are a pickle":
        path = data / "train_labels.npy"
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return path


@pytest.mark.parametrize("kind", ["dataset.json is cut off", "dataset.json lacks an entry", "dataset.json is not text", "pictures are missing",
                                  "pictures are cut off", "pictures are empty", "labels are cut off", "labels are a pickle"])
def test_a_damaged_data_set_ends_training_and_evaluation_in_one_sentence(own_trained, tmp_path, monkeypatch, kind):
    data = tmp_path / "data"
    shutil.copytree(own_trained, data)
    path = damage(data, kind)
    weights = (data / "weights.pt").read_bytes()
    for module in (train, evaluate):
        assert path.name in call(module, monkeypatch, "--data", data, *(["--updates", 1] if module is train else ["--quick"]))
    assert (data / "weights.pt").read_bytes() == weights
