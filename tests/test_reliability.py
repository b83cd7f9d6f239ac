"""Faults and interruptions: what was saved before stays, what goes on gives the same weights, and the reader gets a sentence.

docs/reliability.md lists what is tried. Bad labels stand in test_prepare_data.py, bad weights in test_model.py.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import REPOSITORY, call_main, full_disk, load

model, train = load("02_model"), load("03_train")


def copy_of(own, tmp_path, name="data"):
    """The data set of own pictures, without weights, in a folder that a test may write to."""
    return Path(shutil.copytree(own, tmp_path / name, ignore=shutil.ignore_patterns("*.pt")))


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

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_stopped_by_a_signal_and_resumed_gives_the_weights_of_an_uninterrupted_one(
        small_training, own, tmp_path, monkeypatch, capsys, number, code):
    whole, stopped = copy_of(own, tmp_path, "whole"), copy_of(own, tmp_path, "stopped")
    assert call_main(train, monkeypatch, "--data", whole, "--updates", 12) == (0, "")
    real = train.update_average

    def interrupted(average, network, update):
        if update == 6:
            signal.raise_signal(number)
        real(average, network, update)
    monkeypatch.setattr(train, "update_average", interrupted)
    assert call_main(train, monkeypatch, "--data", stopped, "--updates", 12) == (code, "")
    out = capsys.readouterr().out
    assert "stopped after update 7" in out and "--resume" in out
    monkeypatch.setattr(train, "update_average", real)
    assert saved(stopped)[1]["update"] == 7 and not same(saved(whole), saved(stopped))
    model.load_weights(stopped / "weights.pt")
    assert call_main(train, monkeypatch, "--data", stopped, "--updates", 12, "--resume") == (0, "")
    assert "going on after update 7 of 12" in capsys.readouterr().out
    assert same(saved(whole), saved(stopped))


def test_resuming_a_run_that_had_ended_changes_no_weight(small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    assert call_main(train, monkeypatch, "--data", data, "--updates", 3) == (0, "")
    before = saved(data)
    assert call_main(train, monkeypatch, "--data", data, "--updates", 3, "--resume") == (0, "")
    assert same(before, saved(data))


# A tiny training run as a program of its own: argument 1 is the repository, the others are those of 03_train.py.
SMALL_RUN = """
import sys
repository = sys.argv.pop(1)
sys.path[:0] = [repository, repository + "/tests"]
import common, conftest
train, model = conftest.load("03_train"), conftest.load("02_model")
conftest.make_small(train, model, setattr)
train.SAVE_EVERY = 4
"""
# The same, killed again and again at random moments. Forked, so that torch is imported once and not twenty times.
KILLED_RUNS = SMALL_RUN + """
import os, pathlib, random, signal, time
import torch
whole, data, updates, kills = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
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
            model.load_weights(data / "weights.pt")
print(f"killed {done} times, ended {len(ended)} times")
"""


def start_program(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, str(REPOSITORY), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8",
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_twenty_times_at_random_moments_weights_load_and_the_end_is_the_same_bit_for_bit(own, tmp_path):
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
    program = start_program(SMALL_RUN + "common.run_main(train.main)", "--data", data, "--updates", 1_000_000)
    try:
        deadline = time.monotonic() + 60
        while not (data / "checkpoint.pt").is_file():
            assert program.poll() is None and time.monotonic() < deadline, program.communicate()
            time.sleep(0.02)
        program.send_signal(signal.SIGINT)
        start_time = time.monotonic()
        out, err = program.communicate(timeout=30)
        seconds = time.monotonic() - start_time
    finally:
        program.kill()
    # It takes well under two seconds on a quiet machine; a test on a busy one can only tell that it does not go on.
    assert seconds < 20 and program.returncode == 130 and "Traceback" not in err
    assert "stopped after update" in out.splitlines()[-1] and "--resume" in out.splitlines()[-1]
    stopped_after = int(out.split("stopped after update ")[1].split(";")[0])
    checkpoint = torch.load(data / "checkpoint.pt", weights_only=True)
    assert checkpoint["update"] == stopped_after
    assert same(torch.load(data / "weights.pt", weights_only=True)["network"], checkpoint["average"])


# ---------------------------------------------------------------- a new run keeps what the run before has learned

def files_of(data, suffix=".pt"):
    return [(data / f"{name}{suffix}").read_bytes() for name in ("weights", "checkpoint")]


def test_a_new_run_keeps_the_weights_and_the_checkpoint_of_the_run_before(small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "draw_curves", lambda *arguments: None)
    assert call_main(train, monkeypatch, "--data", data, "--updates", 2) == (0, "")
    first = files_of(data)
    assert not list(data.glob("*.old.pt"))  # there was nothing to keep
    assert call_main(train, monkeypatch, "--data", data, "--updates", 6, "--seed", 1) == (0, "")  # saves three times, keeps once
    second = files_of(data)
    assert files_of(data, ".old.pt") == first and second != first
    with monkeypatch.context() as stopped:  # Ctrl-C at once: it saves, and keeps
        stopped.setattr(train, "update_average", lambda *arguments: signal.raise_signal(signal.SIGINT))
        assert call_main(train, stopped, "--data", data, "--updates", 4) == (130, "")
    assert files_of(data, ".old.pt") == second and saved(data)[1]["update"] == 1
    assert call_main(train, monkeypatch, "--data", data, "--updates", 4, "--resume") == (0, "")  # that is no new run
    assert files_of(data, ".old.pt") == second


# Kills itself in the middle of its third update, before its first save.
DIES_BEFORE_SAVING = SMALL_RUN + """
import os, signal
train.update_average = lambda average, network, update: os.kill(os.getpid(), signal.SIGKILL) if update == 2 else None
train.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGKILL")
def test_a_new_run_that_is_killed_before_its_first_save_has_touched_nothing(small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    assert call_main(train, monkeypatch, "--data", data, "--updates", 2) == (0, "")
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    program = start_program(DIES_BEFORE_SAVING, "--data", data, "--updates", 8, "--seed", 1)
    try:
        _, err = program.communicate(timeout=100)
    finally:
        program.kill()
    assert program.returncode == -signal.SIGKILL, err
    assert before == {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- checkpoints that do not fit

@pytest.fixture
def stopped_run(small_training, own, tmp_path, monkeypatch):
    """A data folder with the checkpoint of a run of four updates."""
    data = copy_of(own, tmp_path)
    assert call_main(train, monkeypatch, "--data", data, "--updates", 4) == (0, "")
    return data


def refused(data, monkeypatch, *arguments):
    """Resume where it must be refused; returns the sentence. Nothing may be changed by it."""
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    code, sentence = call_main(train, monkeypatch, "--data", data, "--resume", *arguments)
    assert code == 1 and sentence.startswith(f"error: {data / 'checkpoint.pt'}") and "\n" not in sentence
    assert before == {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    return sentence


@pytest.mark.parametrize("arguments, parts", [(["--updates", 5], ("4", "5")), (["--updates", 4, "--seed", 1], ("0", "1")),
                                              (["--updates", 4, "--mirror"], ("False", "True"))])
def test_a_checkpoint_of_a_run_with_other_options_is_refused(stopped_run, monkeypatch, arguments, parts):
    sentence = refused(stopped_run, monkeypatch, *arguments)
    assert all(part in sentence for part in parts)


def test_a_checkpoint_of_other_layers_or_classes_is_refused(stopped_run, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr(model, "LAYER_LIST", [(k, s, p, c + 1) for k, s, p, c in model.LAYER_LIST])
        refused(stopped_run, changed, "--updates", 4)
    path = stopped_run / "dataset.json"
    path.write_text(path.read_text(encoding="utf-8").replace("left eye", "nose"), encoding="utf-8")
    assert "nose" in refused(stopped_run, monkeypatch, "--updates", 4)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["cut off", "text", "empty", "weights.pt", "malicious", "a list", "half a checkpoint"])
def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_runs(stopped_run, monkeypatch, tmp_path, kind):
    path = stopped_run / "checkpoint.pt"
    whole = path.read_bytes()
    if kind in ("cut off", "text", "empty"):
        path.write_bytes({"cut off": whole[:len(whole) // 2], "text": b"I am a text", "empty": b""}[kind])
    elif kind == "weights.pt":
        shutil.copy(stopped_run / "weights.pt", path)
    elif kind == "half a checkpoint":
        torch.save({"run": torch.load(path, weights_only=True)["run"]}, path)
    else:
        torch.save({"run": Payload(tmp_path / "trap")} if kind == "malicious" else [1, 2], path)
    refused(stopped_run, monkeypatch, "--updates", 4)
    assert not (tmp_path / "trap").exists()


def test_resuming_where_there_is_no_checkpoint_is_refused(small_training, own, tmp_path, monkeypatch):
    refused(copy_of(own, tmp_path), monkeypatch, "--updates", 4)


# ---------------------------------------------------------------- faults while training

def fails(data, monkeypatch, *arguments):
    """Train where a fault must end it in one sentence with the weights as they were; returns the sentence."""
    weights = b"weights of an earlier run"
    (data / "weights.pt").write_bytes(weights)
    code, sentence = call_main(train, monkeypatch, "--data", data, *arguments)
    assert code == 1 and sentence.startswith("error: ") and "\n" not in sentence
    assert (data / "weights.pt").read_bytes() == weights and not list(data.rglob(".writing-*"))
    assert not any(isinstance(thread, train.Loader) for thread in threading.enumerate())
    return sentence


def test_a_loss_that_is_no_number_ends_in_a_sentence_and_leaves_the_weights(small_training, own, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LEARNING_RATE", 1e30)
    sentence = fails(copy_of(own, tmp_path), monkeypatch, "--updates", 4)
    assert ("nan" in sentence or "inf" in sentence) and "LEARNING_RATE" in sentence


def test_weights_that_are_no_numbers_are_never_saved_though_the_last_loss_was_one(small_training, own, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "LEARNING_RATE", float("inf"))
    fails(copy_of(own, tmp_path), monkeypatch, "--updates", 1)  # the loss is worked out before the update that spoils them


def test_a_loader_that_cannot_read_ends_training_in_a_sentence(small_training, own, tmp_path, monkeypatch):
    real = train.Loader.make_batch

    def make_batch(self, step):
        if threading.current_thread() is self and step == 3:
            raise OSError(5, "Input/output error", "train_images.npy")
        return real(self, step)
    monkeypatch.setattr(train.Loader, "make_batch", make_batch)
    sentence = fails(copy_of(own, tmp_path), monkeypatch, "--updates", 4)
    assert "Input/output error" in sentence and "train_images.npy" in sentence


def test_a_full_disk_while_saving_ends_in_a_sentence_and_leaves_the_weights(small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    with full_disk(12_000):
        sentence = fails(data, monkeypatch, "--updates", 1)
    assert str(data) in sentence


@pytest.mark.parametrize("full_for", ["weights", "checkpoint"])
def test_a_disk_that_is_full_at_the_second_save_loses_nothing_and_the_run_goes_on_later(
        small_training, own, tmp_path, monkeypatch, full_for):
    whole, data = copy_of(own, tmp_path, "whole"), copy_of(own, tmp_path)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    assert call_main(train, monkeypatch, "--data", whole, "--updates", 6) == (0, "")
    weights_bytes, checkpoint_bytes = map(len, files_of(whole))
    most_bytes = weights_bytes // 2 if full_for == "weights" else (weights_bytes + checkpoint_bytes) // 2
    real = train.update_average
    with ExitStack() as until_there_is_room, monkeypatch.context() as full:
        def fill_the_disk(average, network, update):
            if update == 3:  # update 2 is saved, update 4 will be
                until_there_is_room.enter_context(full_disk(most_bytes))
            real(average, network, update)
        full.setattr(train, "update_average", fill_the_disk)
        code, sentence = call_main(train, full, "--data", data, "--updates", 6)
    assert code == 1 and str(data / f"{full_for}.pt") in sentence and "--resume" in sentence and "\n" not in sentence
    assert saved(data)[1]["update"] == 2 and not list(data.rglob(".writing-*"))
    model.load_weights(data / "weights.pt")  # of update 2, or of update 4 where only the checkpoint found no room
    assert call_main(train, monkeypatch, "--data", data, "--updates", 6, "--resume") == (0, "")
    assert same(saved(whole), saved(data))


# ---------------------------------------------------------------- large data, random bytes

def private_memory():
    """Bytes that the system cannot drop: RssAnon, not the mapped arrays' pages."""
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory from /proc")
def test_memory_stays_flat_while_the_loader_reads_from_twenty_thousand_pictures(small_training, tmp_path):
    path, shape = tmp_path / "train_images.npy", (20_000, 1920, 320, 3)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        try:
            file.truncate(file.tell() + int(np.prod(shape)))  # 36.9 GB without a byte on the disk
        except OSError:
            pytest.skip("this file system has no sparse files")
    rng = np.random.default_rng(0)
    label_2d_array = np.column_stack([np.arange(20_000), rng.integers(1, 3, 20_000), rng.uniform(0, 320, 20_000),
                                      rng.uniform(0, 1920, 20_000)])
    loader = train.Loader(np.load(path, mmap_mode="r"), label_2d_array.astype(np.float32), 0, 40, 0, False)
    loader.make_batch(0)
    before = private_memory()
    loader.start()
    assert sum(1 for _ in loader) == 40
    assert private_memory() - before < 30e6
    path.unlink()


def test_a_batch_takes_no_longer_where_there_are_a_hundred_times_more_pictures(small_training, monkeypatch):
    monkeypatch.setattr(train, "WARP_SHARE", 0.0)  # few pictures are warped more often, and that does take time
    loader_list = []
    for count in (200, 20_000):  # with twenty keypoints each
        rng, rows = np.random.default_rng(0), 20 * count
        label_2d_array = np.column_stack([np.repeat(np.arange(count), 20), rng.integers(1, 3, rows), rng.uniform(0, 64, (rows, 2))])
        images_4d_array = np.zeros((count, 64, 64, 3), np.uint8)  # no byte of it is touched before a batch looks at it
        loader_list.append(train.Loader(images_4d_array, label_2d_array.astype(np.float32), 0, 0, 0, False))
    seconds_list = [[], []]
    for step in range(60):  # in turn, so that whatever else the machine does hits both
        for loader, seconds in zip(loader_list, seconds_list):
            start_time = time.thread_time()
            loader.make_batch(step)
            seconds.append(time.thread_time() - start_time)
    few, many = map(np.median, seconds_list)
    assert many < 3 * few


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_changes_of_pictures_end_in_a_sentence_or_in_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    image, exif = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)), Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    whole_list = []
    for kind, mode, options in (("JPEG", "RGB", {"exif": exif}), ("JPEG", "CMYK", {}), ("PNG", "RGB", {"exif": exif}),
                                ("PNG", "P", {"transparency": 3}), ("PNG", "RGBA", {}), ("PNG", "I;16", {}),
                                ("BMP", "RGB", {}), ("BMP", "P", {})):
        buffer = io.BytesIO()
        (image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)).save(buffer, kind, **options)
        whole_list.append(buffer.getvalue())
    path, refused_count = tmp_path / "a.jpg", 0
    for turn in range(800):
        whole = whole_list[turn % len(whole_list)]
        changed = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 200 if turn % 3 else 10 ** 6), rng.integers(1, 8)):
            changed[place] = rng.integers(256)
        path.write_bytes(changed[:rng.integers(len(whole))] if turn % 10 == 0 else changed)
        try:
            array = common.read_image(path)
            assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size > 0
        except common.UserError as error:
            refused_count += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert 100 < refused_count < 800


# ---------------------------------------------------------------- the list itself

def test_every_test_that_the_list_names_is_there():
    named_list = re.findall(r"`(test_\w+\.py)::(\w+)`", (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert len(named_list) > 80
    text_dict = {name: (REPOSITORY / "tests" / name).read_text(encoding="utf-8") for name in {name for name, _ in named_list}}
    assert [(name, test) for name, test in named_list if f"def {test}(" not in text_dict[name]] == []
