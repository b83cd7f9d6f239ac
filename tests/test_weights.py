"""Weights and checkpoints: which are used; bad ones are refused, and nothing in them runs."""

import io
import pickle
import re
import shlex
import types

import numpy as np
import pytest
import torch

import common
from common import UserError
from conftest import call_main, contents, load, save_weights, saved, sentence_of, train_in
from test_model import ABOUT_DICT, random_network

model, train = load("02_model"), load("03_train")

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


def test_loaded_weights_answer_as_the_saved_network_and_a_gpus_load_where_there_is_none(
        tmp_path, monkeypatch, capsys):
    network, option_list, real = random_network(), [], torch.load
    torch.save({"network": network.state_dict(), **ABOUT_DICT}, tmp_path / "weights.pt")
    monkeypatch.setattr(torch, "load", lambda *a, **o: option_list.append(o) or real(*a, **o))
    loaded, about_dict = model.load_weights(tmp_path)
    assert capsys.readouterr().out == f"using {tmp_path / 'weights.pt'}\n"
    image_4d = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        answer_4d = loaded(image_4d.to(loaded.head.weight.device)).cpu()
        assert torch.allclose(network(image_4d), answer_4d, rtol=1e-4, atol=1e-4)
    assert about_dict == ABOUT_DICT and not loaded.training
    assert [torch.device(o["map_location"]).type for o in option_list] == ["cpu"]
    assert [o["weights_only"] for o in option_list] == [True]


def test_only_the_default_folder_falls_back_to_the_weights_that_come_along(
        data, tmp_path, monkeypatch):
    save_weights(tmp_path, ["background", "came along"])
    (tmp_path / "weights.pt").rename(data / "pretrained.pt")
    with pytest.raises(UserError, match="(?i)weights.pt: no such file") as caught:
        model.load_weights(data)
    sentence = str(caught.value)
    named = sentence[sentence.index("python "):].split(", or ")[0]  # this command works
    words = shlex.split(named)
    assert words[1].endswith("03_train.py")
    with monkeypatch.context() as changed:
        assert call_main(train, changed, *words[2:], "--updates", 1) == (0, "")
    assert model.load_weights(data)[1]["category_list"][1] == "left eye"
    for module in (common, model):
        monkeypatch.setattr(module, "DATA_FOLDER", data)
    assert model.load_weights(data)[1]["category_list"][1] == "left eye"  # its own come first
    (data / "weights.pt").unlink()
    assert model.load_weights(data)[1]["category_list"][1] == "came along"
    (data / "pretrained.pt").unlink()
    for folder in (data, tmp_path / "mistyped"):
        with pytest.raises(UserError, match="(?i)no such file.*03_train"):
            model.load_weights(folder)
    assert not (tmp_path / "mistyped").exists()


def test_weights_that_may_not_be_read_are_told_as_that_and_not_as_damaged(tmp_path, monkeypatch):
    def forbidden(path, **options):
        raise PermissionError(13, "Permission denied", str(path))
    save_weights(tmp_path)
    monkeypatch.setattr(torch, "load", forbidden)
    script = types.SimpleNamespace(__name__="05", main=lambda: model.load_weights(tmp_path))
    sentence = sentence_of(script, monkeypatch)
    assert "Permission denied" in sentence and str(tmp_path / "weights.pt") in sentence
    assert "not weights" not in sentence


# ---------------------------------------------------------------- weights that are none

def bad_weights(good, trap):
    """{what it is: bytes that load_weights must refuse}."""
    first, network, whole = next(iter(good["network"])), good["network"], as_file(good)
    malicious = {**good, "extra": Payload(trap)}
    numpy_file = io.BytesIO()
    np.savez(numpy_file, weight=np.zeros(3))
    raw_dict = {
        "half": whole[:len(whole) // 2], "nearly whole": whole[:-30], "empty": b"",
        "text": b"I am a text\n" * 20, "safetensors": b"\x40" + bytes(7) + b'{"a": {"dtype": "F32"',
        "numpy": numpy_file.getvalue(), "malicious pickle": pickle.dumps(Payload(trap)),
        "malicious, old format": as_file(malicious, _use_new_zipfile_serialization=False)}
    content_dict = {
        "malicious entry": malicious, "a whole module": torch.nn.Linear(2, 2),
        "fewer classes": {**good, "category_list": ["background", "a"]},
        "a layer is missing": {**good, "network": {
            key: value for key, value in network.items() if key != first}},
        "a layer of another shape": {**good, "network": {**network, first: network[first][:1]}},
        "categories are a number": {**good, "category_list": 3},
        "of the second edition": {key: good[key] for key in ("network", "category_list")},
        "box size is a text": {**good, "box_size": "30"},
        "no scale": {**good, "scale": None}, "scale 0": {**good, "scale": 0},
        "a list": [1, 2], "tensors alone": network}
    return raw_dict | {kind: as_file(content) for kind, content in content_dict.items()}


def test_what_is_no_weights_is_refused_as_that_and_nothing_in_it_runs(small_training, tmp_path):
    path, trap, wrong_list = tmp_path / "weights.pt", tmp_path / "trap", []
    save_weights(tmp_path, ("background", "a", "b"))
    for kind, raw in bad_weights(torch.load(path, weights_only=True), trap).items():
        path.write_bytes(raw)
        with pytest.raises(UserError) as caught:
            model.load_weights(tmp_path)
        sentence = str(caught.value)
        if not re.fullmatch(f"{path}: not weights .{{,200}}03_train.py --data .*", sentence):
            wrong_list.append((kind, sentence))
    assert wrong_list == [] and not trap.exists()
    pickle.loads(pickle.dumps(Payload(trap))).close()
    assert trap.exists()  # by a less careful reader


# ---------------------------------------------------------------- checkpoints

@pytest.fixture
def trained(data, monkeypatch):
    """A data folder with the weights and the checkpoint of a run of two updates."""
    train_in(data, monkeypatch, 2)
    return data


def refused(data, monkeypatch, *arguments):
    """--resume must be refused, and change nothing; returns the sentence."""
    before = contents(data)
    sentence = sentence_of(train, monkeypatch, "--data", data, "--resume", *arguments)
    assert sentence.startswith(f"error: {data / 'checkpoint.pt'}") and contents(data) == before
    return sentence


def test_what_is_no_checkpoint_of_this_network_is_refused_and_nothing_in_it_runs(
        trained, monkeypatch, tmp_path):
    path, trap, (_, checkpoint_dict) = trained / "checkpoint.pt", tmp_path / "trap", saved(trained)
    whole = path.read_bytes()
    for raw in (whole[:len(whole) // 2], b"I am a text", b"", (trained / "weights.pt").read_bytes(),
                as_file({**checkpoint_dict, "extra": Payload(trap)}), as_file([1, 2]),
                *(as_file({**checkpoint_dict, key: 7}) for key in ("network", "optimizer"))):
        path.write_bytes(raw)
        refused(trained, monkeypatch, "--updates", 2)
    path.unlink()
    assert "o such file" in refused(trained, monkeypatch, "--updates", 2)
    assert not trap.exists()


@pytest.mark.parametrize("arguments, parts", [
    (["--updates", 5], ("--updates", "2", "5")),
    (["--updates", 2, "--seed", 1], ("--seed", "0", "1")),
    (["--updates", 2, "--mirror"], ("--mirror", "False", "True"))])
def test_a_checkpoint_of_a_run_with_other_options_is_refused(
        trained, monkeypatch, arguments, parts):
    sentence = refused(trained, monkeypatch, *arguments)
    assert all(part in sentence for part in parts)


def test_a_checkpoint_of_other_labels_or_another_network_is_refused(trained, monkeypatch):
    label_2d_array = np.load(trained / "train_labels.npy")
    np.save(trained / "train_labels.npy", label_2d_array + np.float32([0, 0, 0, 3]))  # px
    assert "labels" in refused(trained, monkeypatch, "--updates", 2)
    np.save(trained / "train_labels.npy", label_2d_array)
    train_in(trained, monkeypatch, 2, "--resume")  # the same again
    monkeypatch.setattr(model, "LAYER_LIST", [(*g, c + 1) for *g, c in model.LAYER_LIST])
    refused(trained, monkeypatch, "--updates", 2)
