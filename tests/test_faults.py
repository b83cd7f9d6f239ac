"""A run is stopped or killed, the disk is full, another run is at work: nothing saved is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch

from conftest import (ENVIRONMENT, REPOSITORY, call_main, contents, copy_of, full_disk, load,
                      saved, sentence_of, train_in, write_own_pictures)

model, train, prepare_data = load("02_model"), load("03_train"), load("01_prepare_data")


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(autouse=True)
def save_often(monkeypatch):
    monkeypatch.setattr(train, "SHOW_EVERY", 3)
    monkeypatch.setattr(train, "SAVE_EVERY", 3)


def at_call(number, function, what):
    """The function, but before its call number so and so `what()` is called."""
    call_list = []

    def changed(*arguments, **options):
        call_list.append(function)
        if len(call_list) == number:
            what()
        return function(*arguments, **options)
    return changed


# ---------------------------------------------------------------- stopped and resumed

# A save calls the loss eight times, for eight batches of validation crops.
@pytest.mark.parametrize("owner, name, call, number, expected", [
    (train, "detection_loss", 17, "SIGINT", (1, "\nstopped by Ctrl-C")),  # in the fifth update
    (train, "detection_loss", 24, "SIGTERM", (143, "")),  # while the second save validates
    (torch, "save", 3, "SIGHUP", (129, "")),  # before weights.pt of the second save
    (torch, "save", 4, "SIGINT", (1, "\nstopped by Ctrl-C"))])  # before its checkpoint.pt
def test_a_run_stopped_by_a_signal_and_resumed_gives_the_weights_of_an_uninterrupted_one(
        data, own, tmp_path, monkeypatch, owner, name, call, number, expected):
    if not hasattr(signal, number):
        pytest.skip("Windows knows no SIGHUP")
    whole = train_in(copy_of(own, tmp_path / "whole"), monkeypatch, 9)
    with monkeypatch.context() as changed:
        changed.setattr(owner, name, at_call(call, getattr(owner, name), lambda:
                                             signal.raise_signal(getattr(signal, number))))
        assert call_main(train, changed, "--data", data, "--updates", 9) == expected
    model.load_weights(data)
    assert not same(saved(data), whole) and not list(data.rglob(".writing-*"))
    assert same(train_in(data, monkeypatch, 9, "--resume"), whole)


# Argument 1 is the repository, 2 a data folder. Dies while it writes weights or checkpoint, at the
# start, in the middle, or before the file gets its name; then it goes on.
KILLED_RUNS = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import torch
import conftest
train, data = conftest.load("03_train"), Path(sys.argv[2])
conftest.make_small(train, conftest.load("02_model"), setattr)
train.SHOW_EVERY = train.SAVE_EVERY = 3
torch.optim.Adam([torch.zeros(1)], fused=True)  # imports much, which no child then need repeat
real, write_count = torch.save, 0

def save(content, path):
    global write_count
    write_count += 1
    real(content, path)
    if write_count == deadly:
        os.truncate(path, os.path.getsize(path) // 3 * part)
        os._exit(9)

torch.save = save
for deadly in (1, 2, 3, 4, None):
    part = (deadly or 0) % 4
    pid = os.fork()
    if not pid:
        resume = ["--resume"] if (data / "checkpoint.pt").exists() else []
        sys.argv = ["03_train.py", "--data", str(data), "--updates", "9", *resume]
        train.main()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (9 if deadly else 0), code
    for path in data.glob("[!.]*.pt"):
        torch.load(path, weights_only=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_while_it_writes_what_stands_under_its_name_is_whole_and_the_end_is_the_same(
        data, own, tmp_path, monkeypatch):
    whole = train_in(copy_of(own, tmp_path / "whole"), monkeypatch, 9)
    result = subprocess.run([sys.executable, "-c", KILLED_RUNS, REPOSITORY, data], text=True,
                            capture_output=True, timeout=100, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert same(saved(data), whole)


# ---------------------------------------------------------------- stopped while 01 draws for it

def alive_in_session(session):
    """Command lines of all programs of a session that still run; zombies do not."""
    alive_list = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                alive_list.append((folder / "cmdline").read_text().replace("\0", " "))
    return alive_list


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for programs in /proc")
def test_who_stops_the_training_while_it_draws_its_data_set_stops_all_of_it(tmp_path):
    """The README's first command in fresh clones: 03 starts 01, 01 the drawing and its workers."""
    program_dict = {}
    try:
        for how in ("Ctrl-C", "SIGHUP", "nohup, then SIGTERM"):
            clone = tmp_path / how
            (clone / "data").mkdir(parents=True)
            for name in ("common.py", "01_prepare_data.py", "02_model.py", "03_train.py",
                         "data/draw_pictures.py"):
                shutil.copy(REPOSITORY / name, clone / name)

            def as_a_shell_would():  # in its background, pytest would hand on "ignore" for Ctrl-C
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in how else signal.SIG_DFL)
            program_dict[how] = subprocess.Popen(
                [sys.executable, "03_train.py"], cwd=clone, env=ENVIRONMENT, text=True,
                stderr=subprocess.PIPE, start_new_session=True, preexec_fn=as_a_shell_would)
        for how, program in program_dict.items():
            image_list = (tmp_path / how / "data" / "images").glob
            until(lambda: any(image_list("*.jpg")))
            assert len(alive_in_session(program.pid)) >= 4, how  # 03, 01, the drawing, workers
            if how == "Ctrl-C":  # a terminal sends it to all programs of the foreground
                os.killpg(program.pid, signal.SIGINT)
            else:
                program.send_signal(signal.SIGHUP)
            if "nohup" in how:
                count = len(list(image_list("*.jpg")))
                until(lambda: len(list(image_list("*.jpg"))) > count + 4)  # it draws on
                program.send_signal(signal.SIGTERM)
        for (how, program), code in zip(program_dict.items(), (1, 129, 143), strict=True):
            _, err = program.communicate(timeout=60)
            until(lambda: not alive_in_session(program.pid), 5)
            assert program.returncode == code and "Traceback" not in err, (how, err)
            assert not [*(tmp_path / how).rglob("dataset.json"),
                        *(tmp_path / how).rglob(".writing-*")]
    finally:
        for program in program_dict.values():
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)


# ---------------------------------------------------------------- two runs in one folder

@pytest.mark.parametrize("call", [3, 17])  # of the loss: before the first save, after it
def test_of_two_runs_in_one_folder_the_second_to_save_says_so_and_the_first_is_unharmed(
        data, monkeypatch, call):
    left_list = []

    def other_run():
        train_in(data, monkeypatch, 2, "--seed", 1)
        left_list.append(contents(data))
    monkeypatch.setattr(train, "detection_loss", at_call(call, train.detection_loss, other_run))
    sentence = sentence_of(train, monkeypatch, "--data", data, "--updates", 6)
    assert str(data / "weights.pt") in sentence and "another run" in sentence
    assert [contents(data)] == left_list


def test_a_new_run_keeps_the_weights_of_the_run_before_once_it_has_some_of_its_own(
        data, monkeypatch):
    old = data / "weights.old.pt"
    train_in(data, monkeypatch, 2)
    first = (data / "weights.pt").read_bytes()
    assert not old.exists()  # there was nothing to keep
    train_in(data, monkeypatch, 9, "--seed", 1)  # saves three times, keeps once
    before = contents(data)
    assert old.read_bytes() == first != before[data / "weights.pt"]
    with monkeypatch.context() as changed:  # stopped before its first save
        changed.setattr(train, "detection_loss", at_call(3, train.detection_loss, lambda:
                                                         signal.raise_signal(signal.SIGINT)))
        call_main(train, changed, "--data", data)
    assert contents(data) == before
    train_in(data, monkeypatch, 9, "--seed", 1, "--resume")  # that is no new run
    assert old.read_bytes() == first


# ---------------------------------------------------------------- what cannot be written

@pytest.mark.parametrize("full_for", ["weights.pt", "checkpoint.pt"])
def test_a_disk_that_is_full_at_the_second_save_loses_nothing_and_the_run_goes_on_later(
        data, own, tmp_path, monkeypatch, full_for):
    whole_data = copy_of(own, tmp_path / "whole")
    whole = train_in(whole_data, monkeypatch, 9)
    sizes = [(whole_data / name).stat().st_size for name in ("weights.pt", "checkpoint.pt")]
    most_bytes = sizes[0] // 2 if full_for == "weights.pt" else sum(sizes) // 2
    with ExitStack() as until_there_is_room, monkeypatch.context() as full:
        full.setattr(train, "detection_loss", at_call(17, train.detection_loss, lambda:
                     until_there_is_room.enter_context(full_disk(most_bytes))))
        sentence = sentence_of(train, full, "--data", data, "--updates", 9)
    assert str(data / full_for) in sentence and "--resume" in sentence
    assert not list(data.rglob(".writing-*"))
    model.load_weights(data)
    assert same(train_in(data, monkeypatch, 9, "--resume"), whole)


# ---------------------------------------------------------------- odd names, from first to last

def test_spaces_chinese_and_emoji_in_all_names_from_01_to_05(
        small_training, tmp_path, monkeypatch):
    folder = tmp_path / "my work 我的 🎯 'quoted'"
    source = write_own_pictures(folder / "source 图片", 5, ["left 眼", "🎯 & <b>"])
    for path in list(source.iterdir()):
        path.rename(path.with_name(path.name.replace("picture", "图 🎯")))
    out, found = folder / "out 🎯", folder / "found 结果.json"
    for script, arguments in (
            ("01_prepare_data", ["--source", source]), ("02_model", []),
            ("03_train", ["--updates", 2]), ("04_evaluate", []),
            ("05_predict", [source, "--threshold", 0, "--xml", "--out", out]),
            ("05_predict", [source, "--threshold", 0, "--json", found])):
        result = call_main(load(script), monkeypatch, "--data", folder / "data 数据", *arguments)
        assert result == (0, ""), script
    entry_list = json.loads(found.read_text(encoding="utf-8"))
    for number, entry in zip(range(5), entry_list, strict=True):
        assert Path(entry["image"]).name == f"图 🎯 {number}.png"
        label_list = prepare_data.read_labels(next(out.rglob(f"*图 🎯 {number}.xml")), 64, 96)
        class_list = [found["class"] for found in entry["keypoints"]]
        assert class_list == [label["class"] for label in label_list]
        assert class_list and set(class_list) <= {"left 眼", "🎯 & <b>"}
