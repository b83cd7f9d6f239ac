"""Faults round the scripts: folders that cannot be written, full disks, kills, odd names.

docs/reliability.md lists what is tried in this folder and beside it.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import (ENVIRONMENT, REPOSITORY, call_main, contents, full_disk, load, make_small,
                      noise_image, quick, run_script, sentence_of,
                      write_own_pictures)

prepare_data, model, train = load("01_prepare_data"), load("02_model"), load("03_train")
evaluate, predict, analysis = load("04_evaluate"), load("05_predict"), load("06_model_analysis")


# ---------------------------------------------------------------- a damaged data set

@pytest.mark.parametrize("content", [b'{"height": 96, "wid', b"\xff\xfe\0\x80", b"[1, 2]",
                                     b'{"height": "tall"}'])
def test_a_damaged_dataset_json_ends_06_in_a_sentence(small_data, monkeypatch, content):
    (small_data / "dataset.json").write_bytes(content)
    monkeypatch.setattr(analysis, "describe", None)  # never so far: what comes after takes long
    assert "dataset.json" in sentence_of(analysis, monkeypatch, "--data", small_data)


@pytest.mark.parametrize("kind", ["fewer pictures", "labels of another shape",
                                  "pictures of another shape"])
def test_arrays_of_another_data_set_end_training_and_evaluation_in_a_sentence(
        small_data, monkeypatch, kind):
    for split in ("train", "val", "test"):
        images, labels = (small_data / f"{split}_{what}.npy" for what in ("images", "labels"))
        if kind == "fewer pictures":
            np.save(images, np.load(images)[:-1])
        elif kind == "labels of another shape":
            np.save(labels, np.zeros(7, np.float32))
        else:
            np.save(images, np.load(images)[..., 0])
    for module, arguments in ((train, ["--updates", 2]), (evaluate, ["--quick"])):
        assert ".npy" in sentence_of(module, monkeypatch, "--data", small_data, *arguments)


# ---------------------------------------------------------------- numbers that are too large

def test_more_pictures_than_five_digits_can_name_end_with_code_2(tmp_path, monkeypatch):
    arguments = ["--data", tmp_path / "data", "--pictures", 100_001]
    assert call_main(prepare_data, monkeypatch, *arguments)[0] == 2
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------- what cannot be written

def test_a_place_that_cannot_be_written_ends_in_a_sentence_with_its_name(
        small_data, tmp_path, monkeypatch):
    """Nobody can write below a file, root or not: as a read-only folder, and everywhere."""
    blocked, picture, out = tmp_path / "a file", tmp_path / "picture.png", tmp_path / "out"
    blocked.write_text("I am no folder")
    before = contents(small_data)
    for arguments in (["--out", blocked / "out"], ["--out", blocked / "out", "--xml"],
                      ["--out", out, "--json", blocked / "found.json"]):
        sentence = sentence_of(predict, monkeypatch, "--data", small_data, *arguments, picture)
        assert str(blocked) in sentence
    assert contents(small_data) == before and blocked.read_text() == "I am no folder"


def test_a_read_only_data_folder_ends_every_script_that_writes_in_a_sentence(
        small_data, tmp_path, monkeypatch):
    shutil.rmtree(small_data / "results", ignore_errors=True)
    before = contents(small_data)
    small_data.chmod(0o555)
    source = write_own_pictures(tmp_path / "source", 5)
    try:
        if os.access(small_data, os.W_OK):
            pytest.skip("root may write everywhere, and Windows knows no such folder")
        quick(monkeypatch.setattr)
        for module, arguments in ((prepare_data, ["--source", source]), (train, ["--updates", 1]),
                                  (evaluate, ["--quick"]), (predict, [tmp_path / "picture.png"]),
                                  (analysis, [])):
            sentence = sentence_of(module, monkeypatch, "--data", small_data, *arguments)
            assert str(small_data) in sentence
        assert contents(small_data) == before
    finally:
        small_data.chmod(0o755)


def test_a_file_where_the_results_should_be_ends_04_and_06_in_a_sentence(small_data, monkeypatch):
    quick(monkeypatch.setattr)
    shutil.rmtree(small_data / "results")
    (small_data / "results").write_text("a file where a folder should be")
    before = contents(small_data)
    for module, arguments in ((evaluate, ["--quick"]), (analysis, [])):
        sentence = sentence_of(module, monkeypatch, "--data", small_data, *arguments)
        assert str(small_data / "results") in sentence
    assert contents(small_data) == before


# ---------------------------------------------------------------- full disks

def test_a_full_disk_while_packing_ends_in_a_sentence_and_leaves_no_data_set_that_looks_whole(
        small_data, own, monkeypatch):
    weights = (small_data / "weights.pt").read_bytes()
    source = own.parent / "my pictures"
    with full_disk(10_000):
        sentence_of(prepare_data, monkeypatch, "--source", source, "--data", small_data)
    with pytest.raises(common.UserError, match="01_prepare_data.py"):
        common.read_data_set(small_data)
    assert not list(small_data.rglob(".writing-*"))
    assert (small_data / "weights.pt").read_bytes() == weights


@pytest.mark.parametrize("reads", [4, 14])
def test_a_disk_that_can_be_read_no_more_ends_01_in_a_sentence(
        small_data, own, monkeypatch, capsys, reads):
    """Ten pictures are read to be checked, then again to be packed: it breaks in either."""
    before, real, count = contents(small_data), Image.open, 0

    def read(*arguments, **options):
        nonlocal count
        count += 1
        if count > reads:
            raise OSError(5, "Input/output error")
        return real(*arguments, **options)
    monkeypatch.setattr(common.Image, "open", read)
    source = own.parent / "my pictures"
    sentence = sentence_of(prepare_data, monkeypatch, "--source", source, "--data", small_data)
    assert "Input/output error" in (sentence if reads > 10 else capsys.readouterr().out)
    after = contents(small_data)
    if reads > 10:  # while packing: no data set that looks whole
        with pytest.raises(common.UserError, match="01_prepare_data.py"):
            common.read_data_set(small_data)
        del before[small_data / "dataset.json"], after[small_data / "dataset.json"]
    assert after == before


def test_a_full_disk_while_evaluating_or_predicting_leaves_what_was_written_before(
        small_data, tmp_path, monkeypatch):
    arguments = ["--data", small_data, "--threshold", 0, "--map", tmp_path / "picture.png"]
    assert call_main(predict, monkeypatch, *arguments) == (0, "")
    (small_data / "results" / "metrics.json").write_text("of an earlier run")
    before = contents(tmp_path)
    assert small_data / "results" / "predictions" / "picture_map.png" in before
    quick(monkeypatch.setattr)
    new_list = ["--out", tmp_path / "out", "--json", tmp_path / "found.json"]
    for module, its_arguments in ((predict, arguments), (predict, [*arguments, *new_list]),
                                  (evaluate, ["--quick", *arguments[:2]])):
        with full_disk(300):
            sentence_of(module, monkeypatch, *its_arguments)
    assert contents(tmp_path) == before


def test_a_full_disk_while_06_writes_leaves_the_pictures_of_an_earlier_run(small_data, monkeypatch):
    quick(monkeypatch.setattr)
    (small_data / "results").mkdir(exist_ok=True)
    for name in ("layers.png", "receptive_field.png"):
        (small_data / "results" / name).write_text("of an earlier run")
    before = contents(small_data)
    with full_disk(3000):
        assert "File too large" in sentence_of(analysis, monkeypatch, "--data", small_data)
    assert contents(small_data) == before


def test_a_full_disk_while_drawing_leaves_the_pictures_and_the_data_set_of_an_earlier_drawing(
        drawn, tmp_path):
    resource = pytest.importorskip("resource")
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for path in (drawn / "images").glob("0000[0-3].*"):
        shutil.copy(path, data / "images")
    shutil.copy(drawn / "dataset.json", data)
    before = contents(data)

    def limit():  # the processes that draw inherit it
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "01_prepare_data.py"), "--data", str(data), "--pictures",
         "4", "--seed", "1"], capture_output=True, text=True, encoding="utf-8", timeout=120,
        env=ENVIRONMENT, preexec_fn=limit)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: File too large")
    assert contents(data) == before


def test_drawn_pictures_never_take_the_place_of_the_pictures_themselves(
        small_data, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise_image(1).save(pictures / "a.png")
    before = contents(pictures)
    arguments = ["--data", small_data, "--threshold", 0, "--out", pictures, pictures]
    assert str(pictures) in sentence_of(predict, monkeypatch, *arguments)
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
        read_dict = {".json": json.loads, ".xml": ElementTree.fromstring,
                     ".pt": lambda raw: torch.load(io.BytesIO(raw), weights_only=True)}
        read_dict[path.suffix](path.read_bytes())


def under_final_names(folder):
    return {path: raw for path, raw in contents(folder).items()
            if not path.name.startswith(".writing-")}


def start_again(module, folder, argument_list, deadly_size=None):
    """Run a script in a child; returns its number. It dies where a file grows beyond so much."""
    pid = os.fork()
    if pid:
        return pid
    code, sys.argv, sys.stdout = 1, ["script.py", *argument_list], io.StringIO()
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if deadly_size:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an error of it
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


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_again_and_again(script, folder, kills, *argument_list):
    """In a program of its own, which forks, so that torch is imported once: run, die, look.

    Half of the deaths come in the middle of a write, when a file has reached a random size; the
    others after a random time. At the start of each turn folder/data is as folder/before keeps it.
    """
    module, folder, kills = load(script), Path(folder), int(kills)
    rng, died_list, data = random.Random(0), [], folder / "data"
    make_small(train, model, setattr)
    quick(setattr)
    start_time = time.monotonic()
    assert wait(start_again(module, folder, argument_list)) == 0
    seconds = time.monotonic() - start_time
    before = {data / path.relative_to(folder / "before"): raw
              for path, raw in contents(folder / "before").items()}
    after = under_final_names(data)
    written_list = [len(raw) for path, raw in after.items() if before.get(path) != raw]
    for turn in range(kills):
        shutil.rmtree(data)
        shutil.copytree(folder / "before", data)
        if turn % 2:
            size = rng.randrange(min(written_list), max(written_list))
            code = wait(start_again(module, folder, argument_list, deadly_size=size))
        else:
            pid = start_again(module, folder, argument_list)
            # Earlier and earlier, so that some do meet it alive.
            time.sleep(rng.uniform(0.05, 1) * seconds * (1 - turn / kills))
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
        assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ), code
        died_list.append(code)
        look_at_what_is_left(data, before, after)
        if turn >= kills - 2:
            let_it_end(module, folder, argument_list, after)
    print(f"killed by SIGKILL {died_list.count(-signal.SIGKILL)} times, "
          f"in the middle of a write {died_list.count(-signal.SIGXFSZ)} times")


def look_at_what_is_left(data, before, after):
    """What is new must be whole, and nothing that was there may be lost."""
    left = under_final_names(data)
    for path, raw in left.items():
        if before.get(path) != raw:
            assert_whole(path)
    lost_set = set(before) - set(left)
    path = data / "dataset.json"
    if b'"train"' in left[path]:  # where it is whole, all beside it belongs to it
        whole = before if left[path] == before[path] else after
        assert all(left[path] == whole[path] for path in [path, *data.glob("*.npy")])
        common.read_data_set(data)
    assert not lost_set
    assert all(left[path] == raw for path, raw in before.items() if path.suffix == ".pt")


def let_it_end(module, folder, argument_list, after):
    """Run it once more, alive. Where --out or --json is there already it asks for other places."""
    out, found = folder / "data" / "out", folder / "data" / "found.json"
    if out.is_dir() and any(out.iterdir()):
        assert wait(start_again(module, folder, argument_list)) == 3
        assert "--out" in (folder / "sentence").read_text(encoding="utf-8")
        shutil.rmtree(out)
    if found.exists():
        assert wait(start_again(module, folder, argument_list)) == 3
        assert "--json" in (folder / "sentence").read_text(encoding="utf-8")
        found.unlink()
    assert wait(start_again(module, folder, argument_list)) == 0
    assert under_final_names(folder / "data").keys() == after.keys()
    assert not list((folder / "data").rglob(".writing-*"))


KILLED_RUNS = """
import sys
sys.path[:0] = sys.argv[1:4]
import test_faults
test_faults.die_again_and_again(*sys.argv[4:])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("script, kills, argument_list", [
    ("01_prepare_data", 8, ["--source", "SOURCE"]),
    ("04_evaluate", 4, ["--quick", "--threshold", "0"]),
    ("05_predict", 6, ["SOURCE", "--threshold", "0", "--out", "DATA/out", "--json",
                       "DATA/found.json", "--xml"]),
    ("05_predict", 6, ["SOURCE", "--threshold", "0"]),
    ("06_model_analysis", 4, [])])
def test_killed_at_random_moments_what_stands_under_its_name_is_whole_and_the_next_run_ends(
        small_data, tmp_path, script, kills, argument_list):
    write_own_pictures(tmp_path / "source", 12, ["nose", "mouth"])
    for name in ("metrics.json", "confusion.png", "layers.png"):
        (small_data / "results" / name).write_text("of an earlier run")
    predictions = small_data / "results" / "predictions"
    predictions.mkdir()
    for number in range(12):  # these it may write over, but only with whole ones
        (predictions / f"picture {number}.png").write_text("of an earlier run")
    shutil.copytree(small_data, tmp_path / "before")
    argument_list = [text.replace("SOURCE", str(tmp_path / "source"))
                     .replace("DATA", str(small_data)) for text in argument_list]
    folder_list = [REPOSITORY, REPOSITORY / "tests", Path(__file__).parent]
    result = subprocess.run(
        [sys.executable, "-c", KILLED_RUNS, *map(str, folder_list), script, str(tmp_path),
         str(kills), "--data", str(small_data), *argument_list],
        capture_output=True, text=True, encoding="utf-8", timeout=300, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    for what in ("SIGKILL ", "write "):
        assert int(result.stdout.split(what)[1].split()[0]), result.stdout


# ---------------------------------------------------------------- odd names, from first to last

def test_spaces_chinese_and_emoji_in_all_names_from_01_to_05(tmp_path):
    folder = tmp_path / "my work 我的 🎯 'quoted'"
    source = write_own_pictures(folder / "source 图片", 5, ["left 眼", "🎯 & <b>"])
    for path in list(source.iterdir()):
        path.rename(path.with_name(path.name.replace("picture", "图 🎯")))
    data, out, found = folder / "data 数据", folder / "out 🎯", folder / "found 结果.json"
    for script, arguments in (
            ("01_prepare_data.py", ["--source", source]), ("02_model.py", []),
            ("03_train.py", ["--updates", 2]), ("04_evaluate.py", ["--quick"]),
            ("05_predict.py", [source, "--threshold", 0, "--xml", "--out", out, "--json", found])):
        result = run_script(script, "--data", data, *arguments)
        assert result.returncode == 0 and result.stderr == "", result.stderr
    entry_list = json.loads(found.read_text(encoding="utf-8"))
    name_list = [Path(entry["image"]).name for entry in entry_list]
    assert name_list == [f"图 🎯 {number}.png" for number in range(5)]
    class_set = {k["class"] for entry in entry_list for k in entry["keypoints"]}
    assert class_set and class_set <= {"left 眼", "🎯 & <b>"}
    for entry in entry_list:
        label = out / "labelimg" / (Path(entry["image"]).stem + ".xml")
        keypoint_list = prepare_data.read_labels(label, 64, 96)
        assert [k["class"] for k in keypoint_list] == [k["class"] for k in entry["keypoints"]]


# ---------------------------------------------------------------- many pictures

# 01 and 04 on few and on many pictures, in a program of its own. Prints for each: its name, peak of
# RssAnon, CPU seconds. 192 px: below about 128 KB a picture, malloc leaves holes between the
# labels, and the heap grows though nothing is kept.
MANY_PICTURES = """
import shutil, sys, time
from pathlib import Path
repository, folder = sys.argv[1], Path(sys.argv[2])
sys.path[:0] = [repository, repository + "/tests"]
import torch
from PIL import Image
import common, conftest
prepare, model, train, evaluate = map(
    conftest.load, ("01_prepare_data", "02_model", "03_train", "04_evaluate"))
conftest.make_small(train, model, setattr)
evaluate.SPEED_RUNS = 1
peak = 0

def look(*arguments):
    global peak
    line, = (line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    peak = max(peak, int(line.split()[1]) * 1024)

common.Progress.show = look
print_before = print
common.print = prepare.print = model.print = evaluate.print = look

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
        image = Image.new("RGB", (192, 192), (number % 256, number // 256 * 30, number % 7))
        image.save(source / f"{number}.png", compress_level=1)
        text = conftest.xml_text([("eye", 20, 20, 50, 50)], 192, 192)
        (source / f"{number}.xml").write_text(text)
    measure(prepare, f"01/{count}", "--source", source, "--data", data)
    conftest.save_weights(data, ("background", "eye"))
    measure(evaluate, f"04/{count}", "--data", data, "--quick", "--threshold", "1")
    shutil.rmtree(data)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory from /proc")
def test_memory_of_01_and_04_stays_flat_and_their_time_grows_no_faster_than_the_pictures(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", MANY_PICTURES, str(REPOSITORY), str(tmp_path)], capture_output=True,
        text=True, encoding="utf-8", timeout=500, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    row_dict = {name: (int(peak), float(seconds))
                for name, peak, seconds in map(str.split, result.stdout.splitlines())}
    for script in ("01", "04"):
        few_peak, few_seconds = row_dict[f"{script}/200"]
        many_peak, many_seconds = row_dict[f"{script}/2000"]
        assert many_peak - few_peak < 20e6, row_dict  # there are 200 MB more pictures in 01
        assert many_seconds < 20 * few_seconds, row_dict  # ten times the pictures
