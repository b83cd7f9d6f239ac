"""Training that is stopped, killed and resumed, runs out of disk, or has very many pictures.

What was saved before stays, what goes on gives the same weights, and the reader gets a sentence.
docs/reliability.md lists what is tried in this folder and beside it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from common import UserError, read_data_set
from conftest import (ENVIRONMENT, REPOSITORY, call_main, contents, full_disk, load,
                      sentence_of)

model, train, prepare_data = load("02_model"), load("03_train"), load("01_prepare_data")


def copy_of(own, tmp_path, name="data"):
    """The data set of own pictures, without weights, in a folder that a test may write to."""
    return Path(shutil.copytree(own, tmp_path / name, ignore=shutil.ignore_patterns("*.pt")))


def run(monkeypatch, data, updates, *arguments):
    """Train in this process; it must end well."""
    result = call_main(train, monkeypatch, "--data", data, "--updates", updates, *arguments)
    assert result == (0, "")


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def saved(data):
    """What a run left that later runs depend on."""
    checkpoint = torch.load(data / "checkpoint.pt", weights_only=True)
    return (torch.load(data / "weights.pt", weights_only=True),
            {key: checkpoint[key] for key in ("network", "average", "optimizer", "update")})


# ---------------------------------------------------------------- stopped and resumed

@pytest.mark.parametrize("number, expected", [
    (signal.SIGINT, (1, "\nstopped by Ctrl-C")), (signal.SIGTERM, (143, ""))])
@pytest.mark.parametrize("when", [
    "update_average", "show_progress", "mean_loss", "val_loss", "save_run"])
def test_a_run_stopped_by_a_signal_and_resumed_gives_the_weights_of_an_uninterrupted_one(
        small_training, own, tmp_path, monkeypatch, when, number, expected):
    whole, stopped = copy_of(own, tmp_path, "whole"), copy_of(own, tmp_path, "stopped")
    monkeypatch.setattr(train, "SHOW_EVERY", 2)
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    run(monkeypatch, whole, 12)
    real, call_list = getattr(train, when), []

    def interrupted(*arguments):
        call_list.append(when)
        if len(call_list) == (2 if when in ("val_loss", "save_run") else 5):
            signal.raise_signal(number)
        return real(*arguments)
    with monkeypatch.context() as changed:
        changed.setattr(train, when, interrupted)
        result = call_main(train, changed, "--data", stopped, "--updates", 12)
    assert result == expected
    assert saved(stopped)[1]["update"] % 3 == 0 and not same(saved(whole), saved(stopped))
    model.load_weights(stopped)
    run(monkeypatch, stopped, 12, "--resume")
    assert same(saved(whole), saved(stopped))
    curve_list = [torch.load(data / "checkpoint.pt", weights_only=True)["curves"]["val"]
                  for data in (whole, stopped)]
    assert curve_list[0] == curve_list[1]


def test_a_run_that_is_finished_is_told_so_and_nothing_is_written(
        small_training, own, tmp_path, monkeypatch, capsys):
    data = copy_of(own, tmp_path)
    run(monkeypatch, data, 3)
    before = {path: (raw, path.stat().st_mtime_ns) for path, raw in contents(data).items()}
    capsys.readouterr()
    run(monkeypatch, data, 3, "--resume")
    out = capsys.readouterr().out
    assert "finished" in out and "wrote" not in out and "crops in" not in out
    assert before == {path: (raw, path.stat().st_mtime_ns) for path, raw in contents(data).items()}


# A tiny training run as a program of its own: argument 1 is the repository, the others are 03's.
SMALL_RUN = """
import sys
repository = sys.argv.pop(1)
sys.path[:0] = [repository, repository + "/tests"]
import common, conftest
train, model = conftest.load("03_train"), conftest.load("02_model")
conftest.make_small(train, model, setattr)
train.SAVE_EVERY = 4
"""
# The same, killed again and again at random moments. Forked, so that torch is imported once.
KILLED_RUNS = SMALL_RUN + """
import os, pathlib, random, signal, time
import torch
whole, data, updates = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
kills = int(sys.argv[4])
train.draw_curves = lambda *arguments: None

def start(folder):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resume = ["--resume"] if (folder / "checkpoint.pt").is_file() else []
        sys.argv = ["03_train.py", "--data", str(folder), "--updates", updates, *resume]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.main()
        code = 0
    except common.UserError as error:
        print(error, file=sys.stderr)
        code = 3
    except KeyboardInterrupt:
        code = 1
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert wait(start(whole)) == 0
rng, done, ended = random.Random(0), 0, []
number_list = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]
for round in range(200):
    pid = start(data)
    if done < kills:
        time.sleep(rng.uniform(0.02, 0.25))
        os.kill(pid, number_list[done % 3])
    code = wait(pid)
    if code == 0:
        ended.append(data / f"end {len(ended)}")
        ended[-1].mkdir()
        for name in ("weights.pt", "checkpoint.pt"):
            (data / name).rename(ended[-1] / name)
        if done >= kills:
            break
    else:
        assert code in (-9, -15, 1, 130, 143), code
        done += 1
        if (data / "weights.pt").is_file():
            model.load_weights(data)
print(f"killed {done} times, ended {len(ended)} times")
"""


def start_program(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, str(REPOSITORY), *map(str, arguments)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            encoding="utf-8", env=ENVIRONMENT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_twenty_times_at_random_moments_weights_load_and_the_end_is_the_same_bit_for_bit(
        own, tmp_path):
    whole, data = copy_of(own, tmp_path, "whole"), copy_of(own, tmp_path, "killed")
    program = start_program(KILLED_RUNS, whole, data, 40, 21)
    try:
        out, err = program.communicate(timeout=100)
    finally:
        program.kill()
    assert program.returncode == 0 and "killed 21 times" in out, err
    end_list = sorted(data.glob("end *"))
    assert end_list and saved(whole)[1]["update"] == 40
    for end in end_list:
        assert same(saved(whole), saved(end))


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process alone")
def test_ctrl_c_ends_a_real_run_soon_with_a_sentence_and_saved_weights(own, tmp_path):
    data = copy_of(own, tmp_path)
    program = start_program(SMALL_RUN + "common.run_main(train.main)",
                            "--data", data, "--updates", 1_000_000)
    try:
        deadline = time.monotonic() + 60
        while not (data / "checkpoint.pt").is_file():
            assert program.poll() is None and time.monotonic() < deadline, program.communicate()
            time.sleep(0.02)
        program.send_signal(signal.SIGINT)
        start_time = time.monotonic()
        _, err = program.communicate(timeout=30)
        seconds = time.monotonic() - start_time
    finally:
        program.kill()
    # Well under two seconds on a quiet machine; on a busy one only that it does not go on shows.
    assert seconds < 20 and program.returncode == 1 and err.strip() == "stopped by Ctrl-C"
    weights, checkpoint = saved(data)  # both can be read
    assert "network" in weights and checkpoint["update"] % 4 == 0


# ---------------------------------------------------------------- stopped while it draws

def alive_in_session(session):
    """Command lines of all programs of a session that still run; zombies do not."""
    alive_list = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                alive_list.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended meanwhile
            continue
    return alive_list


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for programs in /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_who_stops_the_training_while_it_draws_its_data_set_stops_all_of_it(tmp_path, how):
    """The README's first command, in a fresh clone: 03 starts 01, which starts workers."""
    for name in ("common.py", "01_prepare_data.py", "02_model.py", "03_train.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    program = subprocess.Popen([sys.executable, "03_train.py"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True, env=ENVIRONMENT,
                               # in the background of a shell, pytest would hand on "ignore"
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        deadline = time.monotonic() + 60
        while not any(tmp_path.rglob("*.jpg")):
            assert program.poll() is None and time.monotonic() < deadline, program.communicate()
            time.sleep(0.02)
        assert len(alive_in_session(program.pid)) >= 3  # 03, 01, and who draws for it
        if how == "Ctrl-C":  # a terminal sends it to all programs of the foreground
            os.killpg(program.pid, signal.SIGINT)
        else:
            program.send_signal(signal.SIGTERM)
        program.wait(timeout=60)  # half a second on a quiet machine
        time.sleep(1)
        assert alive_in_session(program.pid) == []
        out, err = program.communicate(timeout=10)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == (1 if how == "Ctrl-C" else 143)
    sentence_list = list(filter(None, err.split("\n")))  # 01 and 03 say one each
    assert "Traceback" not in err and len(sentence_list) <= 2, err
    with pytest.raises(UserError):
        read_data_set(tmp_path / "data")


# ---------------------------------------------------------------- a new run keeps the run before

def files_of(data, suffix=".pt"):
    return [(data / f"{name}{suffix}").read_bytes() for name in ("weights", "checkpoint")]


def test_a_new_run_keeps_the_weights_and_the_checkpoint_of_the_run_before(
        small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "draw_curves", lambda *arguments: None)
    run(monkeypatch, data, 2)
    first = files_of(data)
    assert not list(data.glob("*.old.pt"))  # there was nothing to keep
    run(monkeypatch, data, 6, "--seed", 1)  # saves three times, keeps once
    second = files_of(data)
    assert files_of(data, ".old.pt") == first and second != first
    with monkeypatch.context() as stopped:  # Ctrl-C after the first save, which keeps
        stopped.setattr(train, "update_average", lambda average, network, update:
                        signal.raise_signal(signal.SIGINT) if update == 2 else None)
        call_main(train, stopped, "--data", data, "--updates", 4)
    assert files_of(data, ".old.pt") == second and saved(data)[1]["update"] == 2
    run(monkeypatch, data, 4, "--resume")  # that is no new run
    assert files_of(data, ".old.pt") == second


# Kills itself in the middle of its third update, before its first save.
DIES_BEFORE_SAVING = SMALL_RUN + """
import os, signal
def die(average, network, update):
    if update == 2:
        os.kill(os.getpid(), signal.SIGKILL)
train.update_average = die
train.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGKILL")
def test_a_new_run_that_is_killed_before_its_first_save_has_touched_nothing(
        small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    run(monkeypatch, data, 2)
    before = contents(data)
    program = start_program(DIES_BEFORE_SAVING, "--data", data, "--updates", 8, "--seed", 1)
    try:
        _, err = program.communicate(timeout=100)
    finally:
        program.kill()
    assert program.returncode == -signal.SIGKILL, err
    assert before == contents(data)


# ---------------------------------------------------------------- checkpoints of other runs

@pytest.fixture
def stopped_run(small_training, own, tmp_path, monkeypatch):
    """A data folder with the checkpoint of a run of four updates."""
    data = copy_of(own, tmp_path)
    run(monkeypatch, data, 4)
    return data


def refused(data, monkeypatch, *arguments):
    """Resume where it must be refused; returns the sentence. Nothing may be changed by it."""
    before = contents(data)
    sentence = sentence_of(train, monkeypatch, "--data", data, "--resume", *arguments)
    assert sentence.startswith(f"error: {data / 'checkpoint.pt'}") and before == contents(data)
    return sentence


@pytest.mark.parametrize("arguments, parts", [
    (["--updates", 5], ("--updates", "4", "5")),
    (["--updates", 4, "--seed", 1], ("--seed", "0", "1")),
    (["--updates", 4, "--mirror"], ("--mirror", "False", "True"))])
def test_a_checkpoint_of_a_run_with_other_options_is_refused(
        stopped_run, monkeypatch, arguments, parts):
    sentence = refused(stopped_run, monkeypatch, *arguments)
    assert all(part in sentence for part in parts)


@pytest.mark.parametrize("module, name, value", [
    (train, "HALVINGS", 3), (train, "U", 2.0), (train, "CROP", 96),
    (train, "LOCATION_LOSS", "MSE"), (train, "WARM_UP", 0.77), (model, "NEIGHBOUR_REACH", 20),
    (model, "OFFSET_UNIT", 8.0)])
def test_a_checkpoint_of_a_run_with_another_setting_is_refused_by_the_settings_name(
        stopped_run, monkeypatch, module, name, value):
    before = getattr(module, name)
    monkeypatch.setattr(module, name, value)
    sentence = refused(stopped_run, monkeypatch, "--updates", 4)
    assert f"{name} = {before}" in sentence and str(value) in sentence


def test_a_checkpoint_of_other_layers_or_classes_is_refused(stopped_run, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr(model, "LAYER_LIST", [(*g, c + 1) for *g, c in model.LAYER_LIST])
        assert "LAYER_LIST" in refused(stopped_run, changed, "--updates", 4)
    path = stopped_run / "dataset.json"
    text = path.read_text(encoding="utf-8").replace("left eye", "nose")
    path.write_text(text, encoding="utf-8")
    assert "nose" in refused(stopped_run, monkeypatch, "--updates", 4)


@pytest.mark.parametrize("what", ["another seed", "a label mended", "the same again"])
def test_a_checkpoint_of_other_data_is_refused_though_all_counts_are_the_same(
        small_training, own, tmp_path, monkeypatch, what):
    source, data = tmp_path / "source", tmp_path / "data"
    shutil.copytree(own.parent / "my pictures", source)

    def prepare(*arguments):
        assert call_main(prepare_data, monkeypatch, "--source", source, "--data", data,
                         *arguments) == (0, "")
    prepare()
    run(monkeypatch, data, 2)
    if what == "a label mended":  # moved by 3 px, in all pictures, so in those of the training
        for path in source.glob("*.xml"):
            path.write_text(path.read_text(encoding="utf-8").replace("<ymin>15", "<ymin>12")
                            .replace("<ymax>45", "<ymax>42"), encoding="utf-8")
    prepare(*(["--seed", 1] if what == "another seed" else []))
    if what == "the same again":
        run(monkeypatch, data, 2, "--resume")
    else:
        assert "data" in refused(data, monkeypatch, "--updates", 2)


def test_a_checkpoint_that_a_gpu_saved_goes_on_where_there_is_none(stopped_run, monkeypatch):
    call_list, real = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **o: call_list.append(o) or real(*a, **o))
    run(monkeypatch, stopped_run, 4, "--resume")
    options, = call_list
    assert torch.device(options["map_location"]).type == "cpu" and options["weights_only"] is True


def test_resuming_where_there_is_no_checkpoint_is_refused(
        small_training, own, tmp_path, monkeypatch):
    refused(copy_of(own, tmp_path), monkeypatch, "--updates", 4)


# ---------------------------------------------------------------- faults while training

def fails(data, monkeypatch, *arguments):
    """Train where a fault must end it in one sentence with the weights as they were."""
    weights = b"weights of an earlier run"
    (data / "weights.pt").write_bytes(weights)
    sentence = sentence_of(train, monkeypatch, "--data", data, *arguments)
    assert (data / "weights.pt").read_bytes() == weights and not list(data.rglob(".writing-*"))
    return sentence


def test_a_loss_that_is_no_number_ends_in_a_sentence_and_leaves_the_weights(
        small_training, own, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LEARNING_RATE", 1e30)
    sentence = fails(copy_of(own, tmp_path), monkeypatch, "--updates", 4)
    assert ("nan" in sentence or "inf" in sentence) and "LEARNING_RATE" in sentence


def test_weights_that_are_no_numbers_are_never_saved_though_the_last_loss_was_one(
        small_training, own, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LEARNING_RATE", float("inf"))
    fails(copy_of(own, tmp_path), monkeypatch, "--updates", 1)  # the loss comes before the update


def test_a_loader_that_cannot_read_ends_training_in_a_sentence(
        small_training, own, tmp_path, monkeypatch):
    real = train.Loader.make_batch

    def make_batch(self, step):
        if threading.current_thread() is self and step == 3:
            raise OSError(5, "Input/output error", "train_images.npy")
        return real(self, step)
    monkeypatch.setattr(train.Loader, "make_batch", make_batch)
    sentence = fails(copy_of(own, tmp_path), monkeypatch, "--updates", 4)
    assert "Input/output error" in sentence and "train_images.npy" in sentence


def test_a_full_disk_while_saving_ends_in_a_sentence_and_leaves_the_weights(
        small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    with full_disk(12_000):
        assert str(data) in fails(data, monkeypatch, "--updates", 1)


@pytest.mark.parametrize("full_for", ["weights", "checkpoint"])
def test_a_disk_that_is_full_at_the_second_save_loses_nothing_and_the_run_goes_on_later(
        small_training, own, tmp_path, monkeypatch, full_for):
    whole, data = copy_of(own, tmp_path, "whole"), copy_of(own, tmp_path)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    run(monkeypatch, whole, 6)
    weights_bytes, checkpoint_bytes = map(len, files_of(whole))
    most_bytes = weights_bytes // 2
    if full_for == "checkpoint":
        most_bytes = (weights_bytes + checkpoint_bytes) // 2
    real = train.update_average
    with ExitStack() as until_there_is_room, monkeypatch.context() as full:
        def fill_the_disk(average, network, update):
            if update == 3:  # update 2 is saved, update 4 will be
                until_there_is_room.enter_context(full_disk(most_bytes))
            real(average, network, update)
        full.setattr(train, "update_average", fill_the_disk)
        sentence = sentence_of(train, full, "--data", data, "--updates", 6)
    assert str(data / f"{full_for}.pt") in sentence and "--resume" in sentence
    assert saved(data)[1]["update"] == 2 and not list(data.rglob(".writing-*"))
    model.load_weights(data)  # of update 2, or of 4 where the checkpoint had no room
    run(monkeypatch, data, 6, "--resume")
    assert same(saved(whole), saved(data))


def test_results_that_cannot_be_drawn_end_a_training_before_it_begins(own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    shutil.rmtree(data / "results")
    (data / "results").write_text("a file where a folder should be")
    before = contents(data)
    assert str(data / "results") in sentence_of(train, monkeypatch, "--data", data)
    assert contents(data) == before


def test_training_whose_curve_cannot_be_drawn_has_saved_its_weights_before(
        small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    shutil.rmtree(data / "results")
    (data / "results").write_text("a file where a folder should be")
    assert str(data / "results") in sentence_of(train, monkeypatch, "--data", data, "--updates", 2)
    model.load_weights(data)
    assert saved(data)[1]["update"] == 2


# ---------------------------------------------------------------- very many pictures

def private_memory():
    """Bytes that the system cannot drop: RssAnon, not the mapped arrays' pages."""
    text = Path("/proc/self/status").read_text()
    line, = (line for line in text.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory from /proc")
def test_memory_stays_flat_while_the_loader_reads_from_twenty_thousand_pictures(
        small_training, tmp_path):
    path, count = tmp_path / "train_images.npy", 20_000
    shape = (count, 1920, 320, 3)
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        try:
            file.truncate(file.tell() + int(np.prod(shape)))  # 36.9 GB, no byte on the disk
        except OSError:
            pytest.skip("this file system has no sparse files")
    rng = np.random.default_rng(0)
    label_2d_array = np.column_stack([np.arange(count), rng.integers(1, 3, count),
                                      rng.uniform(0, 320, count), rng.uniform(0, 1920, count)])
    images_4d_array = np.load(path, mmap_mode="r")
    loader = train.Loader(images_4d_array, label_2d_array.astype(np.float32), 0, 40, 0, False)
    loader.make_batch(0)
    before = private_memory()
    loader.start()
    for _ in range(40):
        loader.next_batch()
    assert private_memory() - before < 30e6
    path.unlink()


def test_a_batch_takes_no_longer_where_there_are_a_hundred_times_more_pictures(
        small_training, monkeypatch):
    monkeypatch.setattr(train, "WARP_PICTURES", 0)  # few are warped more often: that takes time
    loader_list = []
    for count in (200, 20_000):  # with twenty keypoints each
        rng, rows = np.random.default_rng(0), 20 * count
        label_2d_array = np.column_stack([np.repeat(np.arange(count), 20),
                                          rng.integers(1, 3, rows), rng.uniform(0, 64, (rows, 2))])
        images_4d_array = np.zeros((count, 64, 64, 3), np.uint8)  # untouched until looked at
        loader_list.append(train.Loader(images_4d_array, label_2d_array.astype(np.float32), 0, 0,
                                        0, False))
    seconds_list = [[], []]
    for step in range(60):  # in turn, so that whatever else the machine does hits both
        for loader, seconds in zip(loader_list, seconds_list):
            start_time = time.thread_time()
            loader.make_batch(step)
            seconds.append(time.thread_time() - start_time)
    few, many = map(np.median, seconds_list)
    assert many < 3 * few


# ---------------------------------------------------------------- the list itself

def test_every_test_that_the_list_names_is_there():
    text = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    named_list = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert len(named_list) > 80
    text_dict = {path.name: path.read_text(encoding="utf-8")
                 for path in (REPOSITORY / "tests").rglob("test_*.py")}
    assert [(name, test) for name, test in named_list
            if f"def {test}(" not in text_dict.get(name, "")] == []
