"""05_predict.py on the command line: good and bad files together, JSON, LabelImg XML and the way back into 01."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common

model = importlib.import_module("02_model")
prepare = importlib.import_module("01_prepare_data")
predict = importlib.import_module("05_predict")

SCRIPT = Path(predict.__file__)


def save_weights(data_folder: Path, category_list=("background", "keyPoint_1", "keyPoint_2"), max_per_class: int = 1) -> None:
    """Untrained weights: their answers mean nothing, but with --threshold 0 there is one of each class."""
    torch.manual_seed(0)
    network = model.KeypointNet(len(category_list))
    data_folder.mkdir(parents=True, exist_ok=True)
    torch.save({"network": network.state_dict(), "category_list": list(category_list), "box_size": [30.0, 30.0],
                "max_per_class": max_per_class}, data_folder / "weights.pt")


def noise_image(seed: int, height: int = 96, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def data(tmp_path) -> Path:
    """A data folder with untrained weights and three samples."""
    save_weights(tmp_path / "data")
    (tmp_path / "data" / "sample").mkdir()
    for seed in range(3):
        noise_image(seed).save(tmp_path / "data" / "sample" / f"{seed}.png")
    return tmp_path / "data"


def call(monkeypatch, capsys, *arguments) -> str:
    """Run the script's main() as a command line would; returns what it printed."""
    monkeypatch.setattr(sys, "argv", ["05_predict.py", *map(str, arguments)])
    predict.main()
    return capsys.readouterr().out


def test_without_a_picture_it_takes_the_samples(data, monkeypatch, capsys):
    output = call(monkeypatch, capsys, "--data", data)
    assert output.splitlines()[0] == f"using {data / 'weights.pt'}"
    assert sorted(path.name for path in (data / "results" / "predictions").iterdir()) == ["0.png", "1.png", "2.png"]
    assert "nothing reaches 0.5; best: keyPoint_1 0." in output  # untrained, and it says how near it came


def test_json_has_the_format_of_the_design_and_drawn_pictures_their_size(data, tmp_path, monkeypatch, capsys):
    call(monkeypatch, capsys, "--data", data, "--threshold", 0, "--json", tmp_path / "new" / "found.json",
         "--out", tmp_path / "drawn")
    entry_list = json.loads((tmp_path / "new" / "found.json").read_text(encoding="utf-8"))
    assert [entry["image"] for entry in entry_list] == [str(data / "sample" / f"{i}.png") for i in range(3)]
    for entry in entry_list:
        assert list(entry) == ["image", "keypoints"]
        assert [keypoint["class"] for keypoint in entry["keypoints"]] == ["keyPoint_1", "keyPoint_2"]
        for keypoint in entry["keypoints"]:
            assert list(keypoint) == ["class", "x", "y", "score", "box"] and 0 <= keypoint["score"] <= 1
            xmin, ymin, xmax, ymax = keypoint["box"]
            assert (xmax - xmin, ymax - ymin) == pytest.approx((30, 30), abs=0.011)
            assert ((xmin + xmax) / 2, (ymin + ymax) / 2) == pytest.approx((keypoint["x"], keypoint["y"]), abs=0.011)
    with Image.open(tmp_path / "drawn" / "0.png") as drawn:
        assert drawn.size == (64, 96)
        assert np.any(np.asarray(drawn) != np.asarray(noise_image(0)))


def test_bad_pictures_get_their_sentence_and_the_others_go_on(data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    noise_image(1).save(folder / "good.jpg")
    noise_image(2).convert("CMYK").save(folder / "cmyk.jpg")
    noise_image(3).convert("L").save(folder / "grey.png")
    noise_image(4).convert("RGBA").save(folder / "rgba.png")
    noise_image(5).convert("P").save(folder / "palette.png")
    Image.fromarray(np.random.default_rng(6).integers(0, 65535, (96, 64), dtype=np.uint16)).save(folder / "sixteen.png")
    noise_image(7, 1, 1).save(folder / "one_pixel.png")
    noise_image(8, 417, 33).save(folder / "odd_size.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # a telephone held upright: 64 wide and 96 high on disk, 96 x 64 for the eye
    noise_image(9).save(folder / "turned.jpg", exif=exif)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    (folder / "half.png").write_bytes((folder / "good.jpg").read_bytes()[:400])
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.png").write_text("not looked at")
    bomb = Image.new("1", (9000, 9000))
    bomb.save(folder / "bomb.png")
    (tmp_path / "no_pictures").mkdir()
    with pytest.raises(common.UserError, match="6 of what you named"):
        call(monkeypatch, capsys, folder, tmp_path / "no_pictures", tmp_path / "missing.jpg", "--data", data,
             "--json", tmp_path / "found.json")
    output = capsys.readouterr().out
    bad_list = sorted(line for line in output.splitlines() if line.startswith("bad: "))
    assert len(bad_list) == 6 and "Traceback" not in output
    for name, words in (("empty.png", "not a readable picture"), ("text.jpg", "not a readable picture"),
                        ("half.png", "not a readable picture"), ("bomb.png", "9000 x 9000 px is more than"),
                        ("no_pictures", "holds no picture"), ("missing.jpg", "no such file")):
        assert sum(name in line and words in line for line in bad_list) == 1, name
    entry_list = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert sorted(Path(entry["image"]).stem for entry in entry_list) == \
        ["cmyk", "good", "grey", "odd_size", "one_pixel", "palette", "rgba", "sixteen", "turned"]
    assert "turned.jpg  96 x 64 px" in output


def test_pictures_of_one_name_do_not_overwrite_each_other(data, tmp_path, monkeypatch, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        noise_image(1).save(tmp_path / folder / "same.png")
    noise_image(2).save(tmp_path / "b" / "same.jpg")
    call(monkeypatch, capsys, tmp_path / "a", tmp_path / "b", tmp_path / "a" / "same.png", "--data", data,
         "--out", tmp_path / "out", "--xml")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["same.png", "same_2.png", "same_3.png"]
    assert sorted(path.name for path in (tmp_path / "out" / "labelimg").iterdir()) == \
        ["same.png", "same.xml", "same_2.jpg", "same_2.xml", "same_3.png", "same_3.xml"]


def test_xml_goes_back_into_01_and_gives_the_same_points(data, tmp_path, monkeypatch, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(6):
        noise_image(seed, 160, 96).save(pictures / f"{seed}.JPG")
    noise_image(9, 160, 96).save(pictures / "other.webp")  # 01 does not look for WEBP, so the copy is a PNG
    call(monkeypatch, capsys, pictures, pictures / "other.webp", "--data", data, "--threshold", 0, "--xml",
         "--json", tmp_path / "found.json", "--out", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["01", "--source", str(tmp_path / "out" / "labelimg"), "--data", str(tmp_path / "round_2")])
    prepare.main()
    dataset_dict = json.loads((tmp_path / "round_2" / "dataset.json").read_text(encoding="utf-8"))
    assert dataset_dict["category_list"] == ["background", "keyPoint_1", "keyPoint_2"] and dataset_dict["box_size"] == [30, 30]
    entry_list = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    entry_dict = {Path(entry["image"]).stem: entry["keypoints"] for entry in entry_list}
    seen = 0
    for split in ("train", "test"):
        label_2d_array = np.load(tmp_path / "round_2" / f"{split}_labels.npy")
        for index, class_id, x, y in label_2d_array:
            keypoint = entry_dict[Path(dataset_dict[split]["file_list"][int(index)]).stem][int(class_id) - 1]
            assert (x, y) == pytest.approx((min(max(keypoint["x"], 0), 96), min(max(keypoint["y"], 0), 160)), abs=0.02)
            seen += 1
    assert seen == 14 and sorted(entry_dict) == ["0", "1", "2", "3", "4", "5", "other"]
    # Labels that were perhaps corrected by hand are not overwritten by a second run.
    with pytest.raises(common.UserError, match="perhaps corrected by hand"):
        call(monkeypatch, capsys, pictures, "--data", data, "--xml", "--out", tmp_path / "out")


def test_an_answer_in_the_padding_is_none(data, monkeypatch):
    """A picture 40 px wide is padded to 64; a point at x 60 has its whole box in the padding, one at x 50 has not."""
    def answers(network, about_dict, image_3d_array, threshold):
        return [{"class": "keyPoint_1", "x": x, "y": 20.0, "score": 0.9, "box": [x - 15, 5.0, x + 15, 35.0]}
                for x in (60.0, 50.0, 20.0)]
    monkeypatch.setattr(model, "find_keypoints", answers)
    assert [keypoint["x"] for keypoint in predict.predict(None, {}, np.zeros((64, 40, 3), np.uint8), 0.5)] == [50.0, 20.0]


def test_the_reader_passes_on_errors_in_order_and_dies_loudly(tmp_path, monkeypatch):
    for seed in range(12):
        noise_image(seed).save(tmp_path / f"{seed:02d}.png")
    (tmp_path / "05.png").write_bytes(b"broken")
    path_list = sorted(tmp_path.iterdir())
    reader = predict.Reader(path_list)
    reader.start()
    time.sleep(0.2)
    assert reader.queue.qsize() <= predict.QUEUE_SIZE  # it waits; memory stays flat
    item_list = list(reader)
    assert [path for path, _ in item_list] == path_list
    assert [isinstance(picture, common.UserError) for _, picture in item_list] == [index == 5 for index in range(12)]
    reader.join(timeout=5)
    assert not reader.is_alive()

    monkeypatch.setattr(predict, "read_image", lambda path: 1 / 0)
    reader = predict.Reader(path_list)
    reader.start()
    with pytest.raises(ZeroDivisionError):  # or the loop would wait for ever
        next(iter(reader))


def test_a_long_run_shows_its_progress(data, tmp_path, monkeypatch, capsys):
    for seed in range(predict.LONG_RUN):
        noise_image(seed, 32, 32).save(tmp_path / f"{seed}.png")
    output = call(monkeypatch, capsys, tmp_path, "--data", data)
    assert f"predicting {predict.LONG_RUN}/{predict.LONG_RUN}" in output
    assert sum("32 x 32 px" in line for line in output.splitlines()) == predict.LONG_RUN


@pytest.mark.parametrize("arguments, words", [
    (["--threshold", "1.5"], "--threshold must lie between 0 and 1"),
    (["--threshold", "nan"], "--threshold must lie between 0 and 1"),
    (["--threshold", "high"], "invalid float value"),
    (["--serve", "127.0.0.1:0", "--xml"], "--serve takes its pictures from clients"),
    (["--serve", "8000"], "not HOST:PORT"),
    (["--serve", "127.0.0.1:99999"], "not HOST:PORT"),
    (["--serve", "192.0.2.1:8000"], "cannot serve there"),  # an address that no machine has
    (["--json", "."], "needs the name of a file"),
    (["--data", "nowhere_at_all"], "no such"),
])
def test_wrong_command_lines_get_one_sentence(arguments, words, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, common.UserError)) as caught:
        call(monkeypatch, capsys, "--data", data, *arguments)
    sentence = capsys.readouterr().err + str(caught.value)
    assert words in sentence and "Traceback" not in sentence


def test_as_a_user_runs_it(data, tmp_path):
    """The real command: the drawn picture is there, no warning is printed, and a bad file makes exit code 1."""
    (tmp_path / "bad.png").write_bytes(b"x")
    command = [sys.executable, str(SCRIPT), "--data", str(data), str(data / "sample"), str(tmp_path / "bad.png")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: 1 of what you named could not be read, see the lines that begin with bad: above"
    assert len(list((data / "results" / "predictions").iterdir())) == 3
