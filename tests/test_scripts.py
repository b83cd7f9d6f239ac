"""The scripts as a reader runs them, one after the other, and what a reader may do wrong.

What is done wrong ends in one sentence, never in a traceback.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import (call_main, contents, load, run_script, save_weights, sentence_of,
                      write_example, write_own_pictures)

model, train, evaluate = load("02_model"), load("03_train"), load("04_evaluate")
prepare_data, predict = load("01_prepare_data"), load("05_predict")

SCRIPT_LIST = ["01_prepare_data", "02_model", "03_train", "04_evaluate", "05_predict",
               "06_model_analysis"]
CLASS_KEYS = {"precision", "recall", "f1", "support", "error_px"}
ERROR_KEYS = {"mean", "median", "p90", "p95", "p99", "max", "within_3px", "bias", "all_points"}
SPEED_KEYS = {"decode_ms", "network_ms", "picture_ms", "pictures_per_second"}


def good(result):
    """The output of a script that should have ended well."""
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result.stdout


def check_picture(path):
    with Image.open(path) as image:
        image.load()
        assert min(image.size) > 50


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def check_metrics(path, data, split, quick):
    """metrics.json holds all that the design promises."""
    metrics, dataset_dict = read_json(path), read_json(data / "dataset.json")
    category_list = dataset_dict["category_list"]
    assert metrics["images"] == len(dataset_dict[split]["file_list"])
    assert list(metrics["classes"]) == category_list[1:]
    for row_dict in metrics["classes"].values():
        assert set(row_dict) == CLASS_KEYS and set(row_dict["error_px"]) == {"mean", "p95"}
    assert set(metrics["overall"]) == CLASS_KEYS - {"error_px"}
    assert set(metrics["error_px"]) == ERROR_KEYS
    assert set(metrics["blind_guess"]) == {"precision", "recall", "error_px"}
    assert set(metrics["speed"]) == SPEED_KEYS
    assert bool(metrics["robustness"]) != quick and bool(metrics["shift"]) != quick
    if not quick:
        assert set(metrics["shift"]) == {"std_px", "max_px", "lost"}
        assert set(metrics["robustness"]) == set(evaluate.CHANGE_DICT)
        for row_dict in metrics["robustness"].values():
            assert set(row_dict) == {"precision", "recall", "mean_error_px"}
    assert np.shape(metrics["confusion_matrix"]) == (len(category_list),) * 2
    label_count = len(np.load(data / f"{split}_labels.npy"))
    assert label_count == sum(row["support"] for row in metrics["classes"].values())
    assert label_count == metrics["overall"]["support"] == np.sum(metrics["confusion_matrix"][1:])


# ---------------------------------------------------------------- one script after the other

@pytest.fixture(scope="module")
def trained(drawn, tmp_path_factory):
    """The drawn data set with weights of a run of four updates, in a folder of its own."""
    data = tmp_path_factory.mktemp("trained") / "data"
    shutil.copytree(drawn, data)
    output = good(run_script("03_train.py", "--updates", 4, "--data", data))
    assert "4/4" in output and "04_evaluate.py --data" in output
    return data


@pytest.fixture(scope="module")
def own_trained(own, tmp_path_factory):
    """The own pictures with weights of two updates, in a folder of their own."""
    data = tmp_path_factory.mktemp("own_trained") / "data"
    shutil.copytree(own, data)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call_main(train, monkeypatch, "--data", data, "--updates", 2) == (0, "")
    return data


def test_01_draws_pictures_with_labels_and_packs_three_splits(drawn):
    report = (drawn / "report.txt").read_text(encoding="utf-8")
    for part in ("keyPoint_1", "keyPoint_2", "03_train.py"):
        assert part in report
    dataset_dict = read_json(drawn / "dataset.json")
    assert dataset_dict["drawn"] is True
    assert sum(len(dataset_dict[split]["file_list"]) for split in ("train", "val", "test")) == 12
    assert len(list((drawn / "images").glob("*.jpg"))) == 12
    assert len(list((drawn / "images").glob("*.xml"))) == 12
    check_picture(drawn / "results" / "contact_sheet.png")
    assert not list(drawn.rglob(".writing-*"))


def test_02_shows_the_shape_after_every_layer_and_the_grid(drawn, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    output = good(run_script("02_model.py", "--data", data))
    assert "[1, 3, 1920, 320]" in output and "[1, 5, 60, 10]" in output
    assert output.count("conv ") == len(model.LAYER_LIST)
    form = r"class (\d) at x ([\d.]+), y ([\d.]+)"
    label_list = re.findall(f"^a keypoint of {form}$", output, re.MULTILINE)
    found_list = re.findall(f"^decode: {form}, score 1$", output, re.MULTILINE)
    assert label_list and sorted(label_list) == found_list  # what went into match comes out
    _, label_2d_array = model.example(data)
    assert [tuple(map(float, row)) for row in label_list] == [
        tuple(row) for row in label_2d_array[:, 1:].round(2).tolist()]
    assert output.count("the cell at row") >= len(label_list)
    assert "03_train.py --data" in output
    check_picture(data / "results" / "grid.png")


def test_03_writes_weights_checkpoint_and_pictures(trained):
    network, about_dict = model.load_weights(trained)
    assert about_dict["category_list"] == ["background", "keyPoint_1", "keyPoint_2"]
    assert (trained / "weights.pt").stat().st_size < 1_500_000
    assert torch.load(trained / "checkpoint.pt", weights_only=True)["update"] == 4
    for name in ("loss.png", "train_crops.png"):
        check_picture(trained / "results" / name)
    assert not list(trained.rglob(".writing-*"))


def test_04_quick_writes_metrics_without_robustness_and_shift(trained):
    output = good(run_script("04_evaluate.py", "--quick", "--data", trained))
    assert output.startswith(f"using {trained / 'weights.pt'}") and "05_predict.py" in output
    check_metrics(trained / "results" / "metrics.json", trained, "test", quick=True)
    for name in ("confusion.png", "worst.png"):
        check_picture(trained / "results" / name)


def test_04_writes_the_whole_metrics_and_the_pictures(own_trained):
    good(run_script("04_evaluate.py", "--threshold", 0.01, "--data", own_trained))
    check_metrics(own_trained / "results" / "metrics.json", own_trained, "test", quick=False)
    for name in ("confusion.png", "worst.png"):
        check_picture(own_trained / "results" / name)


@pytest.mark.parametrize("split", ["val", "train"])
def test_04_on_another_split_leaves_what_it_says_of_the_test_split(own_trained, split, monkeypatch):
    results = own_trained / "results"
    for path in results.glob("*_*.*"):  # of another split
        path.unlink()
    (results / "confusion.png").write_text("of the test split")
    before = contents(results)
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 1)
    arguments = ["--split", split, "--quick", "--data", own_trained]
    assert call_main(evaluate, monkeypatch, *arguments) == (0, "")
    after = contents(results)
    assert {path: after[path] for path in before} == before
    check_metrics(results / f"metrics_{split}.json", own_trained, split, quick=True)
    check_picture(results / f"confusion_{split}.png")


SIZE_DICT = {  # width, height: the arrays hold all of them padded to 192 x 160
    "tall": (40, 160), "wide": (165, 50), "small": (33, 65), "whole": (64, 96), "odd": (77, 131)}


def test_04_finds_in_pictures_of_different_sizes_what_05_finds_in_their_files(
        tmp_path, monkeypatch):
    source, data, found = (tmp_path / name for name in ("source", "data", "found.json"))
    for number in range(10):
        name, (width, height) = list(SIZE_DICT.items())[number % 5]
        write_example(source, f"{name} {number}", [("nose", 5, 5, 25, 25)], width, height)
    assert call_main(prepare_data, monkeypatch, "--source", source, "--data", data) == (0, "")
    save_weights(data, ["background", "nose", "mouth"])
    dataset_path = data / "dataset.json"  # the second class lies nowhere, but has its best cell
    dataset_dict = read_json(dataset_path)
    dataset_dict["category_list"].append("mouth")
    dataset_path.write_text(json.dumps(dataset_dict), encoding="utf-8")
    arguments = ["--data", data, "--threshold", 0]
    assert call_main(predict, monkeypatch, *arguments, "--json", found, source) == (0, "")
    of_05_dict = {entry["image"]: [(k["class"], k["x"], k["y"], k["score"])
                                   for k in entry["keypoints"]] for entry in read_json(found)}
    seen_list, real = [], evaluate.predict
    monkeypatch.setattr(evaluate, "predict",
                        lambda *a, **k: seen_list.append(real(*a, **k)) or seen_list[-1])
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 1)
    of_04_dict = {}
    for split in ("train", "val", "test"):
        result = call_main(evaluate, monkeypatch, *arguments, "--quick", "--split", split)
        assert result == (0, "")
        for picture, name in enumerate(dataset_dict[split]["file_list"]):
            of_04_dict[str(source / name)] = [
                (dataset_dict["category_list"][found.class_id], *found[2:])
                for found in seen_list[-1] if found.picture == picture]
    assert len(of_05_dict) == 10 and sum(map(len, of_05_dict.values())) > 10
    assert of_04_dict == of_05_dict


@pytest.mark.parametrize("name", SCRIPT_LIST)
def test_every_script_says_what_its_flags_do_and_what_their_defaults_are(name, monkeypatch, capsys):
    assert call_main(load(name), monkeypatch, "--help")[0] == 0
    flag_list = capsys.readouterr().out.split("options:")[1].split("\n  --")[1:]
    assert flag_list
    for flag in flag_list:
        assert "default: " in " ".join(flag.split()), flag


# ---------------------------------------------------------------- what a reader may do wrong

def test_a_data_folder_that_is_a_file_ends_in_one_sentence(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("I am no folder")
    source = write_own_pictures(tmp_path / "source", 5)
    for arguments in (["--source", source, "--data", blocked],
                      ["--pictures", 4, "--data", blocked / "data"]):
        assert str(blocked) in sentence_of(prepare_data, monkeypatch, *arguments)


def test_weights_that_are_none_end_in_one_sentence(own, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(own, data)
    (data / "weights.pt").write_text("I am a text")
    result = run_script("04_evaluate.py", "--data", data)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert str(data / "weights.pt") in result.stderr and "03_train.py" in result.stderr


def test_evaluating_before_there_is_a_data_set_ends_in_one_sentence(
        own_trained, tmp_path, monkeypatch):
    shutil.copy(own_trained / "weights.pt", tmp_path / "weights.pt")
    assert "01_prepare_data.py" in sentence_of(evaluate, monkeypatch, "--data", tmp_path)


def test_weights_for_other_classes_than_the_data_set_has_end_in_one_sentence(
        own_trained, tmp_path, monkeypatch):
    source, data = write_own_pictures(tmp_path / "source", 5, ["nose", "mouth"]), tmp_path / "data"
    assert call_main(prepare_data, monkeypatch, "--source", source, "--data", data)[0] == 0
    shutil.copy(own_trained / "weights.pt", data / "weights.pt")
    sentence = sentence_of(evaluate, monkeypatch, "--data", data)
    for part in ("nose", "left eye", "03_train.py"):
        assert part in sentence


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan", "high"])
def test_a_threshold_out_of_range_ends_with_code_2(tmp_path, monkeypatch, value):
    arguments = ["--data", tmp_path, "--threshold", value]
    assert call_main(evaluate, monkeypatch, *arguments)[0] == 2


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


DAMAGE_DICT = {  # what: (file, what is done to it)
    "description cut off": ("dataset.json", lambda path: cut(path, 60)),
    "description lacks an entry": ("dataset.json", lambda path: path.write_text("{}")),
    "description is no text": ("dataset.json", lambda path: path.write_bytes(b"\xff\xfe\0\x80")),
    "pictures missing": ("test_images.npy", lambda path: path.unlink()),
    "pictures cut off": ("test_images.npy", lambda path: cut(path, 1000)),
    "pictures empty": ("val_images.npy", lambda path: path.write_bytes(b"")),
    "labels cut off": ("train_labels.npy", lambda path: cut(path, 140)),
    "labels a pickle": ("train_labels.npy", lambda path: np.save(path, np.array([{}]))),
}


@pytest.mark.parametrize("kind", DAMAGE_DICT)
def test_a_damaged_data_set_ends_training_and_evaluation_in_one_sentence(
        own_trained, tmp_path, monkeypatch, kind):
    data = tmp_path / "data"
    shutil.copytree(own_trained, data)
    name, damage = DAMAGE_DICT[kind]
    damage(data / name)
    before = contents(data)
    for module, arguments in ((train, ["--updates", 1]), (evaluate, ["--quick"])):
        assert name in sentence_of(module, monkeypatch, "--data", data, *arguments)
    assert contents(data) == before
