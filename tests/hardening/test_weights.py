"""Weights and checkpoints that are damaged, hostile or none: refused, and nothing in them runs."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

from common import UserError
from conftest import call_main, contents, load, quick, save_weights, sentence_of

model, train, evaluate = load("02_model"), load("03_train"), load("04_evaluate")
predict, analysis = load("05_predict"), load("06_model_analysis")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Payload:
    """A pickle that would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def as_file(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- weights

@pytest.fixture
def weights(small_training, tmp_path):
    """Good weights of a tiny network; returns their path."""
    save_weights(tmp_path, ("background", "a", "b"))
    return tmp_path / "weights.pt"


def bad_weights(kind, path, trap):
    """Bytes that load_weights must refuse, made of the good ones at `path`."""
    whole, good = path.read_bytes(), torch.load(path, weights_only=True)
    first = next(iter(good["network"]))
    cut_dict = {key: value for key, value in good["network"].items() if key != first}
    reshaped_dict = {**good["network"], first: good["network"][first][:1]}
    raw_dict = {"half": whole[:len(whole) // 2], "nearly whole": whole[:-30],
                "a few bytes": whole[:7], "empty": b"", "text": b"I am a text\n" * 20,
                "malicious pickle": pickle.dumps(Payload(trap)),
                "harmless pickle": pickle.dumps({"category_list": ["background", "a"]})}
    content_dict = {
        "malicious entry": {**good, "extra": Payload(trap)},
        "fewer classes": {**good, "category_list": ["background", "a"]},
        "more classes": {**good, "category_list": ["background", "a", "b", "c"]},
        "a layer is missing": {**good, "network": cut_dict},
        "a layer of another shape": {**good, "network": reshaped_dict},
        "another network": {**good, "network": torch.nn.Linear(3, 3).state_dict()},
        "no categories": {"network": good["network"]},
        "categories are a number": {**good, "category_list": 3},
        "categories are numbers": {**good, "category_list": ["background", 1, 2]},
        "the weights are a list": {**good, "network": [1, 2]},
        "no box size": {**good, "box_size": None},
        "box size is a text": {**good, "box_size": "30"},
        "the most is a word": {**good, "max_per_class": "one"},
        "a tensor": torch.zeros(3), "a list": [1, 2], "a number": 7, "nothing": None,
        "tensors alone": good["network"]}
    if kind == "malicious, old format":
        return as_file(content_dict["malicious entry"], _use_new_zipfile_serialization=False)
    return raw_dict[kind] if kind in raw_dict else as_file(content_dict[kind])


@pytest.mark.parametrize("kind", [
    "half", "nearly whole", "a few bytes", "empty", "text", "malicious pickle", "malicious entry",
    "malicious, old format", "harmless pickle", "fewer classes", "more classes",
    "a layer is missing", "a layer of another shape", "another network", "no categories",
    "categories are a number", "categories are numbers", "the weights are a list", "no box size",
    "box size is a text", "the most is a word", "a tensor", "a list", "a number", "nothing",
    "tensors alone"])
def test_weights_that_do_not_fit_are_refused_in_one_sentence_and_nothing_in_them_runs(
        weights, tmp_path, kind):
    trap = tmp_path / "trap"
    weights.write_bytes(bad_weights(kind, weights, trap))
    with pytest.raises(UserError) as caught:
        model.load_weights(weights.parent)
    sentence = str(caught.value)
    assert str(weights) in sentence and "\n" not in sentence and len(sentence) < 400
    assert not trap.exists()


def test_the_malicious_pickle_of_these_tests_would_really_run_code(weights, tmp_path):
    pickle.loads(bad_weights("malicious pickle", weights, tmp_path / "trap")).close()
    assert (tmp_path / "trap").exists()


def test_weights_of_a_network_with_other_layers_are_refused(weights, monkeypatch):
    monkeypatch.setattr(model, "LAYER_LIST", [(*g, c + 8) for *g, c in model.LAYER_LIST])
    with pytest.raises(UserError, match="weights.pt"):
        model.load_weights(weights.parent)


def changed_bytes(whole, rng, reach):
    """A copy in which one to five bytes of the first so many are others."""
    changed = bytearray(whole)
    for place in rng.integers(0, reach, rng.integers(1, 6)):
        changed[place] = rng.integers(256)
    return bytes(changed)


def test_random_bytes_in_weights_end_in_a_sentence_or_load(weights):
    good, rng, refused = torch.load(weights, weights_only=True), np.random.default_rng(0), 0
    for new_format in (True, False):
        whole = as_file(good, _use_new_zipfile_serialization=new_format)
        for _ in range(100):
            reach = len(whole) if rng.random() < 0.5 else 1500
            weights.write_bytes(changed_bytes(whole, rng, reach))
            try:
                model.load_weights(weights.parent)
            except UserError:
                refused += 1
    assert refused > 20


# ---------------------------------------------------------------- weights of another format

def foreign_weights(kind, trap):
    """Bytes of files that people call weights and that are none of this network."""
    if kind == "safetensors":
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        head = json.dumps({"body.0.weight": entry}).encode()
        return len(head).to_bytes(8, "little") + head + bytes(4)
    if kind == "ONNX":
        return b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(200)
    if kind == "HDF5 (Keras)":
        return b"\x89HDF\r\n\x1a\n" + bytes(500)
    if kind == "malicious pickle":
        return pickle.dumps(Payload(trap))
    categories = {"category_list": ["background", "a"]}
    if kind == "malicious entry":
        return as_file({**categories, "network": Payload(trap)})
    if kind == "an entry that is a function":
        return as_file({**categories, "network": {}, "code": print})
    if kind == "a whole module":
        return as_file(torch.nn.Linear(2, 2))
    buffer = io.BytesIO()
    if kind == "numpy":
        np.savez(buffer, weight=np.zeros(3))
    elif kind == "a zip of something":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("readme.txt", "hello")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [
    "safetensors", "ONNX", "HDF5 (Keras)", "numpy", "a zip of something", "a whole module",
    "an entry that is a function", "malicious pickle", "malicious entry"])
def test_weights_of_another_format_are_never_used_by_any_script(
        small_data, tmp_path, monkeypatch, capsys, kind):
    path, trap = small_data / "weights.pt", tmp_path / "trap"
    path.write_bytes(foreign_weights(kind, trap))
    before = contents(small_data)
    for module, arguments in ((evaluate, ["--quick"]), (predict, [tmp_path / "picture.png"]),
                              (predict, ["--serve", "127.0.0.1:0"])):
        assert str(path) in sentence_of(module, monkeypatch, "--data", small_data, *arguments)
    assert contents(small_data) == before and not trap.exists()
    quick(monkeypatch.setattr)  # 06 needs no weights: it says so and takes an untrained network
    capsys.readouterr()
    assert call_main(analysis, monkeypatch, "--data", small_data) == (0, "")
    output = capsys.readouterr().out
    assert str(path) in output and "untrained" in output
    assert not trap.exists()


# ---------------------------------------------------------------- checkpoints

@pytest.fixture
def stopped_run(small_data, monkeypatch):
    """A data folder with the checkpoint of a run of two updates; it counts as stopped after one."""
    monkeypatch.setattr(train, "draw_curves", lambda *arguments: None)
    assert call_main(train, monkeypatch, "--data", small_data, "--updates", 2) == (0, "")
    path = small_data / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), "update": 1}, path)
    return small_data


def refused(data, monkeypatch):
    """--resume must be refused, and change nothing; returns the sentence."""
    before = contents(data)
    sentence = sentence_of(train, monkeypatch, "--data", data, "--updates", 2, "--resume")
    assert sentence.startswith(f"error: {data / 'checkpoint.pt'}") and contents(data) == before
    return sentence


@pytest.mark.parametrize("kind", ["cut off", "text", "empty", "weights.pt", "malicious", "a list",
                                  "half a checkpoint"])
def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_runs(
        stopped_run, monkeypatch, tmp_path, kind):
    path, trap = stopped_run / "checkpoint.pt", tmp_path / "trap"
    whole, run_dict = path.read_bytes(), torch.load(path, weights_only=True)["run"]
    path.write_bytes({
        "cut off": whole[:len(whole) // 2], "text": b"I am a text", "empty": b"",
        "weights.pt": (stopped_run / "weights.pt").read_bytes(),
        "malicious": as_file({"run": Payload(trap)}), "a list": as_file([1, 2]),
        "half a checkpoint": as_file({"run": run_dict})}[kind])
    refused(stopped_run, monkeypatch)
    assert not trap.exists()


@pytest.mark.parametrize("changes", [{"run": 7}, {"optimizer": {}}, {"network": {}},
                                     {"average": [1, 2]}])
def test_a_checkpoint_whose_entries_are_of_another_kind_is_refused(
        stopped_run, monkeypatch, changes):
    path = stopped_run / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    refused(stopped_run, monkeypatch)


def test_random_bytes_in_a_checkpoint_end_in_a_sentence_or_go_on(stopped_run, monkeypatch):
    path, rng, refused_count = stopped_run / "checkpoint.pt", np.random.default_rng(0), 0
    whole = path.read_bytes()
    for turn in range(30):
        path.write_bytes(changed_bytes(whole, rng, len(whole) if turn % 2 else 3000))
        code, sentence = call_main(train, monkeypatch, "--data", stopped_run, "--updates", 2,
                                   "--resume")
        assert code == 0 or (code == 1 and str(path) in sentence and "\n" not in sentence)
        refused_count += code
    assert refused_count > 10
