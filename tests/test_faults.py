"""Faults that need a whole script: foreign weights, folders that cannot be written, full disks, odd names, many pictures, random requests.

docs/reliability.md lists what is tried, in this file and in the others.
"""

import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import REPOSITORY, call_main, full_disk, load, make_small, run_script, write_own_pictures
from test_predict import noise_image, save_weights
from test_serve import PICTURE, request, start_server

prepare_data, model, train, evaluate = load("01_prepare_data"), load("02_model"), load("03_train"), load("04_evaluate")
predict, analysis = load("05_predict"), load("06_model_analysis")


@pytest.fixture
def small_data(small_training, own, tmp_path):
    """The own pictures in a folder that a test may write to, with weights of a tiny network, and a picture to look at."""
    data = Path(shutil.copytree(own, tmp_path / "data"))
    save_weights(data, ("background", "left eye", "right eye"))
    noise_image(0).save(tmp_path / "picture.png")
    return data


def sentence_of(module, monkeypatch, *arguments):
    """Run a script's main() where it must end in one sentence; returns it. A traceback fails the test."""
    code, sentence = call_main(module, monkeypatch, *arguments)
    assert code == 1 and sentence.startswith("error: ") and "\n" not in sentence and len(sentence) < 600
    return sentence


def quick(setattr):
    """Leave out what 04 and 06 measure, which takes long; what they write stays."""
    setattr(evaluate, "SPEED_RUNS", 1)
    for name in ("work", "batch_norm", "memory", "bytes", "readers", "threads"):
        setattr(analysis, f"print_{name}", lambda *arguments: None)
    setattr(analysis, "print_receptive_field", lambda *arguments: (np.ones((32, 32)), 16))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- weights of another format

class Payload:
    """A pickle that would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def foreign_weights(kind, trap):
    """Bytes of files that people call weights and that are none of this network."""
    buffer = io.BytesIO()
    if kind == "safetensors":
        head = json.dumps({"body.0.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        return len(head).to_bytes(8, "little") + head + bytes(4)
    if kind == "ONNX":
        return b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(200)
    if kind == "HDF5 (Keras)":
        return b"\x89HDF\r\n\x1a\n" + bytes(500)
    if kind == "numpy":
        np.savez(buffer, weight=np.zeros(3))
    elif kind == "a zip of something":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("readme.txt", "hello")
    elif kind == "a whole module":
        torch.save(torch.nn.Linear(2, 2), buffer)
    elif kind == "a TorchScript program":
        torch.save({"network": {}, "category_list": ["background", "a"], "code": print}, buffer)
    elif kind == "malicious pickle":
        return pickle.dumps(Payload(trap))
    elif kind == "malicious entry":
        torch.save({"category_list": ["background", "a"], "network": Payload(trap)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["safetensors", "ONNX", "HDF5 (Keras)", "numpy", "a zip of something", "a whole module",
                                  "a TorchScript program", "malicious pickle", "malicious entry"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_weights_of_another_format_are_never_used_by_any_script(small_data, tmp_path, monkeypatch, capsys, kind):
    (small_data / "weights.pt").write_bytes(foreign_weights(kind, tmp_path / "trap"))
    before = contents(small_data)
    for module, arguments in ((evaluate, ["--quick"]), (predict, [tmp_path / "picture.png"]), (predict, ["--serve", "127.0.0.1:0"])):
        assert str(small_data / "weights.pt") in sentence_of(module, monkeypatch, "--data", small_data, *arguments)
    assert contents(small_data) == before and not (tmp_path / "trap").exists()
    quick(monkeypatch.setattr)  # 06 needs no weights: it says what is wrong and takes an untrained network
    capsys.readouterr()
    assert call_main(analysis, monkeypatch, "--data", small_data) == (0, "")
    output = capsys.readouterr().out
    assert "weights.pt: not the weights of this network" in output and "untrained network" in output
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("changes", [{"box_size": None}, {"box_size": "30"}, {"max_per_class": "one"},
                                     {"category_list": ["background", 1, 2]}])
def test_weights_whose_plain_values_are_of_another_kind_are_refused(small_data, tmp_path, monkeypatch, changes):
    path = small_data / "weights.pt"
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    assert str(path) in sentence_of(predict, monkeypatch, "--data", small_data, "--threshold", 0, tmp_path / "picture.png")


# ---------------------------------------------------------------- checkpoints

@pytest.fixture
def stopped_run(small_data, monkeypatch):
    """A data folder with the checkpoint of a run of two updates; going on with it is quick."""
    monkeypatch.setattr(train, "draw_curves", lambda *arguments: None)
    assert call_main(train, monkeypatch, "--data", small_data, "--updates", 2) == (0, "")
    return small_data


@pytest.mark.parametrize("changes", [{"run": 7}, {"optimizer": {}}, {"network": {}}, {"average": [1, 2]}])
def test_a_checkpoint_whose_entries_are_of_another_kind_is_refused(stopped_run, monkeypatch, changes):
    path = stopped_run / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    assert str(path) in sentence_of(train, monkeypatch, "--data", stopped_run, "--updates", 2, "--resume")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_bytes_in_a_checkpoint_end_in_a_sentence_or_go_on(stopped_run, monkeypatch):
    path, rng, refused = stopped_run / "checkpoint.pt", np.random.default_rng(0), 0
    whole = path.read_bytes()
    for turn in range(30):
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole) if turn % 2 else 3000, rng.integers(1, 6)):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        code, sentence = call_main(train, monkeypatch, "--data", stopped_run, "--updates", 2, "--resume")
        assert code == 0 or (code == 1 and str(path) in sentence and "\n" not in sentence)
        refused += code
    assert refused > 10


# ---------------------------------------------------------------- a damaged data set, for 06

@pytest.mark.parametrize("content", [b'{"height": 96, "wid', b"\xff\xfe\0\x80", b"[1, 2]", b'{"height": "tall"}'])
def test_a_damaged_dataset_json_ends_06_in_a_sentence(small_data, monkeypatch, content):
    (small_data / "dataset.json").write_bytes(content)
    monkeypatch.setattr(analysis, "describe", None)  # never so far: what comes after takes half a minute
    assert "dataset.json" in sentence_of(analysis, monkeypatch, "--data", small_data)


@pytest.mark.parametrize("kind", ["fewer pictures", "labels of another shape", "pictures of another shape"])
def test_arrays_of_another_data_set_end_training_and_evaluation_in_a_sentence(small_data, monkeypatch, kind):
    for split in ("train", "test"):
        images, labels = small_data / f"{split}_images.npy", small_data / f"{split}_labels.npy"
        if kind == "fewer pictures":
            np.save(images, np.load(images)[:1])
        elif kind == "labels of another shape":
            np.save(labels, np.zeros(7, np.float32))
        else:
            np.save(images, np.load(images)[..., 0])
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 1)
    for module, arguments in ((train, ["--updates", 2]), (evaluate, ["--quick", "--split", "train"])):
        assert ".npy" in sentence_of(module, monkeypatch, "--data", small_data, *arguments)


# ---------------------------------------------------------------- numbers that are too large

def test_a_seed_too_large_for_pytorch_ends_with_code_2(small_data, monkeypatch):
    for seed in (2 * 10 ** 13, 10 ** 30):
        assert call_main(train, monkeypatch, "--data", small_data, "--updates", 1, "--seed", seed)[0] == 2


def test_more_pictures_than_five_digits_can_name_end_with_code_2(tmp_path, monkeypatch):
    assert call_main(prepare_data, monkeypatch, "--data", tmp_path / "data", "--pictures", 100_001)[0] == 2
    assert not (tmp_path / "data").exists()


def test_a_disk_without_room_for_the_arrays_is_told_before_the_drawing(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 0, 10 ** 9))
    assert "GB left" in sentence_of(prepare_data, monkeypatch, "--data", tmp_path, "--pictures", 1000)
    assert not (tmp_path / "images").exists()


def test_a_batch_that_no_memory_holds_ends_06_in_a_sentence(small_data, monkeypatch):
    before = contents(small_data)
    for batch in (10 ** 9, 10 ** 30):
        assert f"--batch {batch}" in sentence_of(analysis, monkeypatch, "--data", small_data, "--batch", batch)
    assert contents(small_data) == before


# ---------------------------------------------------------------- folders that cannot be written, full disks

def test_a_place_that_cannot_be_written_ends_in_a_sentence_with_its_name(small_data, tmp_path, monkeypatch):
    """A path below a file cannot be made by anybody, root or not: as a read-only folder, and everywhere."""
    blocked, picture, before = tmp_path / "a file", tmp_path / "picture.png", contents(small_data)
    blocked.write_text("I am no folder")
    for arguments in (["--out", blocked / "out"], ["--out", blocked / "out", "--xml"],
                      ["--out", tmp_path / "out", "--json", blocked / "found.json"]):
        assert str(blocked) in sentence_of(predict, monkeypatch, "--data", small_data, *arguments, picture)
    assert contents(small_data) == before and blocked.read_text() == "I am no folder"


def test_a_read_only_data_folder_ends_every_script_that_writes_in_a_sentence(small_data, tmp_path, monkeypatch):
    shutil.rmtree(small_data / "results", ignore_errors=True)
    before = contents(small_data)
    small_data.chmod(0o555)
    write_own_pictures(tmp_path / "source", 3)
    try:
        if os.access(small_data, os.W_OK):
            pytest.skip("root may write everywhere, and Windows knows no such folder")
        quick(monkeypatch.setattr)
        for module, arguments in ((prepare_data, ["--source", tmp_path / "source"]), (train, ["--updates", 1]), (evaluate, ["--quick"]),
                                  (predict, [tmp_path / "picture.png"]), (analysis, [])):
            assert str(small_data) in sentence_of(module, monkeypatch, "--data", small_data, *arguments)
        assert contents(small_data) == before
    finally:
        small_data.chmod(0o755)


def test_a_file_where_the_results_should_be_ends_04_and_06_in_a_sentence(small_data, monkeypatch):
    """Nobody can write below a file, root or not: as a read-only folder, and everywhere."""
    quick(monkeypatch.setattr)
    shutil.rmtree(small_data / "results")
    (small_data / "results").write_text("a file where a folder should be")
    before = contents(small_data)
    for module, arguments in ((evaluate, ["--quick"]), (analysis, [])):
        assert str(small_data / "results") in sentence_of(module, monkeypatch, "--data", small_data, *arguments)
    assert contents(small_data) == before


def test_training_whose_results_cannot_be_drawn_has_saved_its_weights_before(small_data, monkeypatch):
    shutil.rmtree(small_data / "results")
    (small_data / "results").write_text("a file where a folder should be")
    (small_data / "weights.pt").unlink()
    assert str(small_data / "results") in sentence_of(train, monkeypatch, "--data", small_data, "--updates", 2)
    model.load_weights(small_data / "weights.pt")
    assert torch.load(small_data / "checkpoint.pt", weights_only=True)["update"] == 2


def test_a_full_disk_while_packing_ends_in_a_sentence_and_leaves_no_data_set_that_looks_whole(small_data, own, monkeypatch):
    weights = (small_data / "weights.pt").read_bytes()
    with full_disk(10_000):
        sentence_of(prepare_data, monkeypatch, "--source", own.parent / "my pictures", "--data", small_data)
    assert not (small_data / "dataset.json").exists() and not list(small_data.rglob(".writing-*"))
    assert (small_data / "weights.pt").read_bytes() == weights


@pytest.mark.parametrize("reads", [4, 14])
def test_a_disk_that_can_be_read_no_more_ends_01_in_a_sentence(small_data, own, monkeypatch, capsys, reads):
    """Ten pictures are read to be checked, and once more to be packed: the disk breaks in the one or in the other."""
    before, real, count = contents(small_data), Image.open, 0

    def read(*arguments, **options):
        nonlocal count
        count += 1
        if count > reads:
            raise OSError(5, "Input/output error")
        return real(*arguments, **options)
    monkeypatch.setattr(common.Image, "open", read)
    sentence = sentence_of(prepare_data, monkeypatch, "--source", own.parent / "my pictures", "--data", small_data)
    assert "Input/output error" in (sentence if reads > 10 else capsys.readouterr().out)
    if reads > 10:  # while packing: no data set that looks whole
        before.pop(small_data / "dataset.json")
    assert contents(small_data) == before


def test_a_full_disk_while_evaluating_or_predicting_leaves_what_was_written_before(small_data, tmp_path, monkeypatch):
    out, found = tmp_path / "out", tmp_path / "found.json"
    arguments = ["--data", small_data, "--threshold", 0, "--out", out, "--json", found, tmp_path / "picture.png"]
    assert call_main(predict, monkeypatch, *arguments) == (0, "")
    (small_data / "results" / "metrics.json").write_text("of an earlier run")
    before = {**contents(out), **contents(small_data), found: found.read_bytes()}
    monkeypatch.setattr(evaluate, "SPEED_RUNS", 1)
    for module, most_bytes, its_arguments in ((predict, 300, arguments), (evaluate, 300, ["--quick", "--data", small_data])):
        with full_disk(most_bytes):
            sentence_of(module, monkeypatch, *its_arguments)
    assert before == {**contents(out), **contents(small_data), found: found.read_bytes()}


def test_a_full_disk_while_06_writes_leaves_the_pictures_of_an_earlier_run(small_data, monkeypatch):
    quick(monkeypatch.setattr)
    (small_data / "results").mkdir(exist_ok=True)
    for name in ("layers.png", "receptive_field.png"):
        (small_data / "results" / name).write_text("of an earlier run")
    before = contents(small_data)
    with full_disk(3000):
        assert "File too large" in sentence_of(analysis, monkeypatch, "--data", small_data)
    assert contents(small_data) == before


def test_a_full_disk_while_drawing_leaves_the_pictures_and_the_data_set_of_an_earlier_drawing(drawn, tmp_path):
    resource = pytest.importorskip("resource")
    data = tmp_path / "data"
    shutil.copytree(drawn / "images", data / "images")
    shutil.copy(drawn / "dataset.json", data)
    before = contents(data)
    result = subprocess.run(  # the processes that draw inherit the limit
        [sys.executable, str(REPOSITORY / "01_prepare_data.py"), "--data", str(data), "--pictures", "4", "--seed", "1"],
        capture_output=True, text=True, encoding="utf-8", timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])))
    assert result.returncode == 1 and result.stderr.startswith("error: File too large") and result.stderr.count("\n") == 1, result.stderr
    assert contents(data) == before


def test_drawn_pictures_never_take_the_place_of_the_pictures_themselves(small_data, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise_image(1).save(pictures / "a.png")
    before = contents(pictures)
    assert str(pictures) in sentence_of(predict, monkeypatch, "--data", small_data, "--threshold", 0, "--out", pictures, pictures)
    assert contents(pictures) == before


# ---------------------------------------------------------------- killed without a warning

def assert_whole(path):
    """A file that a reader would take for a good one must be one."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".npy":
        np.load(path)
    else:
        read = {".json": json.loads, ".xml": ElementTree.fromstring, ".pt": lambda raw: torch.load(io.BytesIO(raw), weights_only=True)}
        read[path.suffix](path.read_bytes())


def under_final_names(folder):
    return {path: raw for path, raw in contents(folder).items() if not path.name.startswith(".writing-")}


def start_again(module, folder, argument_list, deadly_size=None):
    """Run a script in a child of this process; returns its number. It dies where a file grows beyond `deadly_size` bytes."""
    pid = os.fork()
    if pid:
        return pid
    code, sys.argv, sys.stdout = 1, ["script.py", *argument_list], io.StringIO()
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if deadly_size:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an error of it, as full_disk has it; so it is death
            resource.setrlimit(resource.RLIMIT_FSIZE, (deadly_size, deadly_size))
        module.main()
        code = 0
    except common.UserError as error:
        (folder / "sentence").write_text(str(error), encoding="utf-8")
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def die_again_and_again(script, folder, kills, *argument_list):
    """In a program of its own, which forks, so that torch is imported once: run, be killed in the middle, look, run again.

    Half of the deaths come in the middle of a write, when a file has reached a random size; the others after a random
    time. At the start of each turn folder/data is what folder/before keeps: as it was before the first run.
    """
    import matplotlib.pyplot  # noqa: F401  here, or every child would import it anew
    module, folder, kills, rng, died = load(script), Path(folder), int(kills), random.Random(0), []
    make_small(train, model, setattr)
    quick(setattr)
    data = folder / "data"

    def wait(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    start_time = time.monotonic()
    assert wait(start_again(module, folder, argument_list)) == 0
    seconds = time.monotonic() - start_time
    before = {data / path.relative_to(folder / "before"): raw for path, raw in contents(folder / "before").items()}
    after = under_final_names(data)
    written_list = [len(raw) for path, raw in after.items() if before.get(path) != raw]
    for turn in range(kills):
        shutil.rmtree(data)
        shutil.copytree(folder / "before", data)
        if turn % 2:
            code = wait(start_again(module, folder, argument_list, deadly_size=rng.randrange(min(written_list), max(written_list))))
        else:
            pid = start_again(module, folder, argument_list)
            time.sleep(rng.uniform(0.05, 1) * seconds * (1 - turn / kills))  # earlier and earlier, so that some do meet it alive
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
        assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ), code
        died.append(code)
        left = under_final_names(data)
        for path, raw in left.items():
            if before.get(path) != raw:
                assert_whole(path)
        lost_set = set(before) - set(left)
        if script.startswith("01"):  # where dataset.json stands, all beside it belongs to it
            lost_set.discard(data / "dataset.json")
            if (raw := left.get(data / "dataset.json")) is not None:
                whole = before if raw == before[data / "dataset.json"] else after
                assert all(left[path] == whole[path] for path in whole if path.suffix in (".npy", ".json"))
                common.read_data_set(data)
        assert not lost_set and all(left[path] == raw for path, raw in before.items() if path.suffix == ".pt")
        if turn < kills - 2:
            continue
        if (data / "out" / "labelimg").is_dir() and any((data / "out" / "labelimg").iterdir()):  # perhaps corrected by hand
            assert wait(start_again(module, folder, argument_list)) == 3 and "--out" in (folder / "sentence").read_text(encoding="utf-8")
            shutil.rmtree(data / "out" / "labelimg")
        assert wait(start_again(module, folder, argument_list)) == 0
        assert under_final_names(data).keys() == after.keys() and not list(data.rglob(".writing-*"))
    print(f"killed by SIGKILL {died.count(-signal.SIGKILL)} times, in the middle of a write {died.count(-signal.SIGXFSZ)} times")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("script, kills, argument_list", [
    ("01_prepare_data", 8, ["--source", "SOURCE"]), ("04_evaluate", 4, ["--quick", "--threshold", "0"]), ("06_model_analysis", 4, []),
    ("05_predict", 6, ["SOURCE", "--threshold", "0", "--out", "DATA/out", "--json", "DATA/found.json", "--xml"])])
def test_killed_at_random_moments_what_stands_under_its_name_is_whole_and_the_next_run_ends(
        small_data, tmp_path, script, kills, argument_list):
    write_own_pictures(tmp_path / "source", 12, ["nose", "mouth"])
    for name in ("metrics", "confusion", "layers"):
        (small_data / "results" / f"{name}{'.json' if name == 'metrics' else '.png'}").write_text("of an earlier run")
    (small_data / "found.json").write_text("[]")
    shutil.copytree(small_data, tmp_path / "before")
    argument_list = [text.replace("SOURCE", str(tmp_path / "source")).replace("DATA", str(small_data)) for text in argument_list]
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import test_faults; test_faults.die_again_and_again(*sys.argv[3:])"
    result = subprocess.run([sys.executable, "-c", code, str(REPOSITORY), str(REPOSITORY / "tests"), script, str(tmp_path), str(kills),
                             "--data", str(small_data), *argument_list], capture_output=True, text=True, encoding="utf-8", timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split("SIGKILL ")[1].split()[0]) and int(result.stdout.split("write ")[1].split()[0]), result.stdout


# ---------------------------------------------------------------- odd names, from the first script to the last

def test_spaces_chinese_and_emoji_in_all_names_from_01_to_05(tmp_path):
    folder = tmp_path / "my work 我的 🎯 'quoted'"
    source = write_own_pictures(folder / "source 图片", 5, ["left 眼", "🎯 & <b>"])
    for path in list(source.iterdir()):
        path.rename(path.with_name(path.name.replace("picture", "图 🎯")))
    data, out = folder / "data 数据", folder / "out 🎯"
    for script, arguments in (("01_prepare_data.py", ["--source", source]), ("03_train.py", ["--updates", 2]),
                              ("05_predict.py", [source, "--threshold", 0, "--xml", "--out", out, "--json", folder / "found 结果.json"])):
        result = run_script(script, "--data", data, *arguments)
        assert result.returncode == 0 and result.stderr == "", result.stderr
    entry_list = json.loads((folder / "found 结果.json").read_text(encoding="utf-8"))
    assert [Path(entry["image"]).name for entry in entry_list] == [f"图 🎯 {number}.png" for number in range(5)]
    assert {k["class"] for entry in entry_list for k in entry["keypoints"]} <= {"left 眼", "🎯 & <b>"}
    assert any(entry["keypoints"] for entry in entry_list)
    for entry in entry_list:
        keypoint_list = prepare_data.read_labels(out / "labelimg" / (Path(entry["image"]).stem + ".xml"), 64, 96)
        assert [k["class"] for k in keypoint_list] == [k["class"] for k in entry["keypoints"]]


# ---------------------------------------------------------------- many pictures

# 01 and 04 on few and on many pictures, in a program of its own. Prints for each: its name, peak of RssAnon, CPU seconds.
# 192 px: below about 128 KB a picture, malloc leaves holes between the labels, and the heap grows though nothing is kept.
MANY_PICTURES = """
import shutil, sys, time
from pathlib import Path
repository, folder = sys.argv[1], Path(sys.argv[2])
sys.path[:0] = [repository, repository + "/tests"]
import torch
from PIL import Image
import common, conftest
prepare, model, train, evaluate = map(conftest.load, ("01_prepare_data", "02_model", "03_train", "04_evaluate"))
conftest.make_small(train, model, setattr)
evaluate.SPEED_RUNS = 1
evaluate.draw_plots = evaluate.draw_cases = evaluate.print_report = lambda *arguments: None
peak = 0

def look(*arguments):
    global peak
    line, = (line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    peak = max(peak, int(line.split()[1]) * 1024)

common.Progress.show = look
print_before, evaluate.print, prepare.print = print, look, look

def measure(script, name, *arguments):
    global peak
    peak, start_time = 0, time.process_time()
    sys.argv = ["script", *map(str, arguments)]
    script.main()
    look()
    print_before(name, peak, time.process_time() - start_time)

for count in (20, 200, 2000):  # the first warms up
    source, data = folder / f"source {count}", folder / f"data {count}"
    source.mkdir()
    for number in range(count):
        Image.new("RGB", (192, 192), (number % 256, number // 256 * 30, number % 7)).save(source / f"{number}.png", compress_level=1)
        (source / f"{number}.xml").write_text(conftest.xml_text([("eye", 20, 20, 50, 50)], 192, 192))
    measure(prepare, f"01/{count}", "--source", source, "--data", data)
    torch.manual_seed(0)
    torch.save({"network": model.KeypointNet(2).state_dict(), "category_list": ["background", "eye"], "box_size": [30, 30],
                "max_per_class": 1}, data / "weights.pt")
    measure(evaluate, f"04/{count}", "--data", data, "--quick", "--threshold", "1")
    shutil.rmtree(data)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory from /proc")
def test_memory_of_01_and_04_stays_flat_and_their_time_grows_no_faster_than_the_pictures(tmp_path):
    result = subprocess.run([sys.executable, "-c", MANY_PICTURES, str(REPOSITORY), str(tmp_path)], capture_output=True, text=True,
                            encoding="utf-8", timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 0, result.stderr
    row_dict = {name: (int(peak), float(seconds)) for name, peak, seconds in map(str.split, result.stdout.splitlines())}
    for script in ("01", "04"):
        (few_peak, few_seconds), (many_peak, many_seconds) = row_dict[f"{script}/200"], row_dict[f"{script}/2000"]
        assert many_peak - few_peak < 20e6, row_dict  # the pictures themselves are 200 MB more in 01, 40 MB in 04
        assert many_seconds < 20 * few_seconds, row_dict  # ten times the pictures


# ---------------------------------------------------------------- random requests

@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_requests_get_an_answer_and_harm_nobody(small_data):
    server = start_server(small_data, small_data / "none")
    rng = np.random.default_rng(0)
    head = ("POST /predict?threshold=0.01 HTTP/1.1\r\nHost: here\r\nContent-Type: image/jpeg\r\n"
            f"Content-Length: {len(PICTURE)}\r\n\r\n").encode()
    get = b"GET /sample/0 HTTP/1.1\r\nHost: here\r\n\r\n"
    sign_list = np.frombuffer(b"\r\n :;/?%=.-0123456789\0\xff", np.uint8)
    status_list = []
    try:
        wanted = request(server, body=PICTURE)
        for turn in range(200):
            if turn % 4 == 3:
                raw = rng.bytes(int(rng.integers(1, 400))) + (b"\r\n\r\n" if turn % 8 == 3 else b"")
            else:  # the head, the picture, or a request without a body is changed
                changed = bytearray((head, PICTURE, get)[turn % 4])
                for place in rng.integers(0, len(changed), rng.integers(1, 6)):
                    changed[place] = rng.integers(256) if rng.random() < 0.5 else rng.choice(sign_list)
                changed = changed[:rng.integers(len(changed))] if turn % 9 == 0 else changed
                raw = (bytes(changed) + PICTURE, head + bytes(changed), bytes(changed))[turn % 4]
            with socket.create_connection(server.server_address, timeout=10) as connection:
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            if answer:
                first_line = answer.split(b"\r\n", 1)[0].split()
                assert first_line[0] == b"HTTP/1.1", (raw, answer)
                status_list.append(int(first_line[1]))
            else:  # as http.server does where the first line is blank
                assert not raw.split(b"\n")[0].strip(), raw
        status, _, body = request(server, body=PICTURE)
        assert (status, body) == (200, wanted[2])
    finally:
        server.shutdown()
        server.server_close()
    assert set(status_list) <= {100, 200, 400, 404, 405, 408, 411, 413, 414, 415, 431, 501, 505} and len(set(status_list)) >= 5
    assert not any("mistake in the service" in line for line in server.said_list)
