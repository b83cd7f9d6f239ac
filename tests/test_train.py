"""03_train.py: loader thread, crops, loss, the loop; runs that are stopped: test_faults.py."""

import functools
import json
import queue
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from conftest import call_main, centroid, copy_of, load, paint_dot, sentence_of, train_in

model, train = load("02_model"), load("03_train")


def dots(count=6, height=256, width=160, margin=8):
    """Dark images, in each one bright dot that stands at its label."""
    rng = np.random.default_rng(0)
    images_4d_array = np.zeros((count, height, width, 3), np.uint8)
    label_list = []
    for image in range(count):
        x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
        paint_dot(images_4d_array[image], x, y)
        label_list.append((image, 1 + image % 2, x, y))
    return images_4d_array, np.array(label_list, np.float32)


# ---------------------------------------------------------------- the loader thread

@pytest.fixture(autouse=True)
def no_waiting_for_ever(monkeypatch):
    """Where nothing comes for ten seconds, whoever waits for the queue gets queue.Empty."""
    monkeypatch.setattr(queue.Queue, "get", functools.partialmethod(queue.Queue.get, timeout=10))


def test_batches_come_in_the_order_of_the_steps_and_the_thread_ends_with_them():
    loader = train.Loader(lambda step: step * step, range(3, 20))
    assert loader.daemon  # a dying program need not wait for it
    loader.start()
    assert [loader.next_batch() for _ in range(17)] == [step * step for step in range(3, 20)]
    loader.join(5)
    assert not loader.is_alive()


def test_the_queue_is_bounded_and_the_thread_waits_while_it_is_full(monkeypatch):
    monkeypatch.setattr(train, "QUEUE_SIZE", 2)
    made_list = []
    loader = train.Loader(made_list.append, range(1000))
    loader.start()
    time.sleep(0.2)
    assert loader.queue.qsize() == 2 and len(made_list) == 3  # two in the queue, one in hand
    assert [loader.next_batch() for _ in range(1000)] == [None] * 1000


def test_a_thread_that_dies_ends_the_loop_with_its_exception_after_what_it_made_before(monkeypatch):
    monkeypatch.setattr(train, "QUEUE_SIZE", 1)
    loader = train.Loader(lambda step: 1 / (2 - step), range(5))
    loader.start()
    time.sleep(0.1)  # the exception waits for its place in the queue
    assert [loader.next_batch(), loader.next_batch()] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        loader.next_batch()
    loader.join(5)
    assert not loader.is_alive()


def test_a_loader_that_cannot_read_ends_training_in_a_sentence_and_leaves_the_weights(
        data, monkeypatch):
    real = train.make_batch
    (data / "weights.pt").write_bytes(b"weights of an earlier run")

    def make_batch(images_4d_array, label_2d_array, seed, step, **options):
        if step == 3 and isinstance(threading.current_thread(), train.Loader):
            raise OSError(5, "Input/output error", "train_images.npy")
        return real(images_4d_array, label_2d_array, seed, step, **options)
    monkeypatch.setattr(train, "make_batch", make_batch)
    sentence = sentence_of(train, monkeypatch, "--data", data)
    assert "Input/output error" in sentence and "train_images.npy" in sentence
    assert (data / "weights.pt").read_bytes() == b"weights of an earlier run"


# ---------------------------------------------------------------- crops, and what they teach

@pytest.mark.parametrize("height, rows", [(256, 2), (32, 1)])  # one is smaller than a crop
def test_a_batch_has_the_shapes_and_types_that_the_loop_expects_and_repeats(
        small_training, height, rows):
    data = dots(height=height)
    batch = train.make_batch(*data, 0, 3)
    assert [array.shape for array in batch] == [(3, 32 * rows, 64, 3), (3, 2, rows, 2),
                                                (3, rows, 2)]
    assert [array.dtype for array in batch] == [np.uint8, np.float32, np.int64]
    for seed, step in ((0, 3), (1, 3), (0, 4)):
        again = train.make_batch(*data, seed, step)
        assert all(map(np.array_equal, batch, again)) == ((seed, step) == (0, 3))


@pytest.mark.parametrize("warp_share, mirror, worst, bias", [
    (0, False, 0.1, 0.03), (0, True, 0.1, 0.03), (1, False, 0.25, 0.06), (1, True, 0.25, 0.06)])
def test_labels_follow_the_image_through_crop_warp_mirror_and_turn(
        monkeypatch, warp_share, mirror, worst, bias):
    """Where the whole dot is seen, its centre lies at its label: half a pixel would show."""
    for name, value in (("KEYPOINT_SHARE", 1.0), ("CROP", 96)):
        monkeypatch.setattr(train, name, value)
    prior_3d_array, difference_list = model.make_priors(3, 3).numpy(), []
    for step in range(6):
        for crop_3d_array, gt_offset_3d, gt_class_id_2d in zip(*train.make_batch(
                *dots(), 0, step, mirror=mirror, warp_share=warp_share)):
            for row, column in np.argwhere(gt_class_id_2d):
                x, y = (prior_3d_array + gt_offset_3d)[:, row, column]
                if 12 <= min(x, y) and max(x, y) <= 96 - 12:
                    difference_list.append(np.subtract(centroid(crop_3d_array[:, :, 0]), (x, y)))
    assert len(difference_list) > 15
    assert np.hypot(*np.transpose(difference_list)).max() < worst
    assert np.abs(np.mean(difference_list, axis=0)).max() < bias


def test_mirroring_is_off_unless_asked_for_and_gives_all_eight_positions(small_training):
    image_3d_array = np.zeros((train.CROP, train.CROP, 3), np.uint8)
    image_3d_array[:16, :32] = 255  # a bar that tells all eight apart
    data = image_3d_array[None], np.zeros((0, 4), np.float32)
    for option_dict, positions in (({}, 1), ({"mirror": True}, 8)):
        crop_set = {crop.tobytes() for step in range(40)
                    for crop in train.make_batch(*data, 0, step, **option_dict)[0]}
        assert len(crop_set) == positions


def taught_crops(monkeypatch, label_2d_array, keypoint_share, batches=10):
    """(image, left, top, gt_offset, gt_class_id) of crops of 64 px out of three images.

    Red is x and green is y of each pixel: a crop's first pixel says where it was cut out.
    """
    monkeypatch.setattr(train, "CROP", 64)
    monkeypatch.setattr(train, "KEYPOINT_SHARE", keypoint_share)
    images_4d_array = np.zeros((3, 192, 160, 3), np.uint8)
    images_4d_array[..., 0] = np.arange(160)[None, :]
    images_4d_array[..., 1] = np.arange(192)[:, None]
    images_4d_array[..., 2] = np.arange(3)[:, None, None]
    for step in range(batches):
        for crop_3d_array, gt_offset_3d, gt_class_id_2d in zip(*train.make_batch(
                images_4d_array, np.array(label_2d_array, np.float32), 0, step)):
            left, top, image = map(int, crop_3d_array[0, 0])
            yield image, left, top, gt_offset_3d, gt_class_id_2d


def test_every_crop_teaches_what_match_says_of_its_place(monkeypatch):
    label_2d_array = np.array([(0, 1, 50, 60), (0, 2, 120, 100), (1, 2, 80, 150)])
    seen_set, beside = set(), 0
    for image, left, top, gt_offset_3d, gt_class_id_2d in taught_crops(
            monkeypatch, label_2d_array, 0.5):
        here = label_2d_array[label_2d_array[:, 0] == image] * (0, 1, 1, 1) - (0, 0, left, top)
        wanted_offset_4d, wanted_class_id_3d = model.match(here, 1, 2, 2)
        assert np.array_equal(gt_class_id_2d, wanted_class_id_3d[0])
        assert np.allclose(gt_offset_3d, wanted_offset_4d[0])
        seen_set.add((image, bool(gt_class_id_2d.any())))
        is_inside = (0 <= here[:, 2:]).all() and (here[:, 2:] < 64).all()
        beside += len(here) == 1 and not is_inside and gt_class_id_2d.any()
    assert seen_set == {(0, False), (0, True), (1, False), (1, True), (2, False)}
    assert beside  # a label just outside of a crop teaches the cells along its rim


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory from /proc")
def test_memory_stays_flat_while_crops_are_read_from_twenty_thousand_images(
        small_training, tmp_path):
    def private_memory():  # RssAnon: bytes that the system cannot drop, as it can a mapped file's
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0]) * 1024
    path, count = tmp_path / "train_images.npy", 20_000
    try:  # 36.9 GB, no byte of it on the disk
        np.lib.format.open_memmap(path, "w+", np.uint8, (count, 1920, 320, 3))
    except OSError:
        pytest.skip("this file system has no sparse files")
    rng, images_4d_array = np.random.default_rng(0), np.load(path, mmap_mode="r")
    label_2d_array = np.column_stack([np.arange(count), np.ones(count), rng.uniform(0, 320, count),
                                      rng.uniform(0, 1920, count)]).astype(np.float32)
    train.make_batch(images_4d_array, label_2d_array, 0, 0)
    before = private_memory()
    for step in range(1, 20):
        train.make_batch(images_4d_array, label_2d_array, 0, step)
    assert private_memory() - before < 30e6
    path.unlink()


LIGHT_LIST = ["LIGHT", "CONTRAST", "COLOUR", "NOISE", "BLUR"]


@pytest.mark.parametrize("name", LIGHT_LIST)
def test_each_change_is_there_and_goes_with_its_constant(monkeypatch, name):
    generator = torch.Generator().manual_seed(0)
    images_4d = 80 + 80 * torch.rand((4, 3, 32, 32), generator=generator)
    noise_1d = torch.randn(2 * images_4d.numel(), generator=generator)

    def light(images_4d):
        return train.augment(images_4d.clone(), noise_1d, generator)
    for other in LIGHT_LIST:
        if other != name:
            monkeypatch.setattr(train, other, 0.0)
    assert not torch.allclose(light(images_4d), images_4d, atol=1)
    monkeypatch.setattr(train, name, 0.0)
    assert torch.allclose(light(images_4d), images_4d, atol=1e-3)


# ---------------------------------------------------------------- the loss

def test_the_loss_equals_one_worked_out_by_hand(monkeypatch):
    monkeypatch.setattr(train, "HARD_NEGATIVES", 2)
    output_4d = torch.zeros(2, 5, 2, 2)
    output_4d[0, :2, 0, 1] = torch.tensor([0.5, -0.25])  # in half cells
    output_4d[0, 2:, 0, 1] = torch.tensor([0.0, 2.0, 0.0])
    output_4d[0, 2:, 1, 0] = torch.tensor([0.0, 1.0, 0.0])  # background that looks like class 1
    output_4d[0, 2:, 1, 1] = torch.tensor([3.0, 0.0, 0.0])  # an easy one
    gt_offset_4d, gt_class_id_3d = torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, dtype=torch.int64)
    gt_class_id_3d[0, 0, 1] = 1
    gt_offset_4d[0, :, 0, 1] = torch.tensor([4.0, 4.0])  # px: a quarter of half a cell
    location, confidence = train.detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
    assert location.item() == pytest.approx((abs(0.5 - 0.25) + abs(-0.25 - 0.25)) / 2, rel=1e-5)
    # Confidence: the positive; the two hardest of image 0; two of image 1, log 3 each.
    e = np.e
    by_hand = (np.log(2 + e ** 2) - 2 + np.log(2 + e) + np.log(3) + 2 * np.log(3)) / 2
    assert confidence.item() == pytest.approx(by_hand, rel=1e-5)


def test_only_the_hardest_background_cells_of_an_image_learn(monkeypatch):
    monkeypatch.setattr(train, "HARD_NEGATIVES", 3)
    output_4d = torch.zeros(1, 5, 4, 4)
    output_4d[0, 3] = torch.arange(16.0).view(4, 4)  # the last three cells are most wrongly sure
    output_4d.requires_grad_()
    nothing = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    location, confidence = train.detection_loss(output_4d, *nothing)
    (location + confidence).backward()
    assert location.item() == 0 and not output_4d.grad[0, :2].any()
    learns = output_4d.grad[0, 2:].abs().sum(dim=0) > 0
    assert learns.flatten().nonzero().flatten().tolist() == [13, 14, 15]
    monkeypatch.setattr(train, "HARD_NEGATIVES", 1000)  # more than there are cells: all of them
    _, confidence = train.detection_loss(output_4d, *nothing)
    every = -output_4d[0, 2:].log_softmax(dim=0)[0].sum().item()
    assert confidence.item() == pytest.approx(every, rel=1e-5)


# ---------------------------------------------------------------- the loop

def test_the_loop_averages_the_steps_of_an_update_and_forgets_their_gradients_after_it(
        data, monkeypatch):
    batch = train.make_batch(*dots(height=96, width=64), 0, 0)
    batch = tuple(np.concatenate((array, array[:1])) for array in batch)  # four crops

    def gradients(steps_per_update):
        """The gradients of two updates that see the same four crops, in one step or in two."""
        gradient_list = []

        class Spy(torch.optim.Adam):
            def step(self, *arguments, **options):
                parameter_list = self.param_groups[0]["params"]
                gradient_list.append(torch.cat([p.grad.flatten() for p in parameter_list]))

        def make_batch(images_4d_array, label_2d_array, seed, step, **options):
            part = slice(step % 2 * 2, step % 2 * 2 + 2) if steps_per_update == 2 else slice(4)
            return tuple(array[part] for array in batch)

        def as_in_use(self, mode=True):  # in training BN would see only half of a half batch
            return torch.nn.Module.train(self, False)
        with monkeypatch.context() as changed:
            for owner, name, value in (
                    (train, "STEPS_PER_UPDATE", steps_per_update), (train, "BATCH", 4),
                    (train, "make_batch", make_batch), (torch.optim, "Adam", Spy),
                    (train, "augment", lambda images_4d, *rest: images_4d),
                    (model.KeypointNet, "train", as_in_use)):
                changed.setattr(owner, name, value)
            train_in(data, changed, 2)
        return gradient_list
    whole, halves = gradients(1), gradients(2)
    assert len(whole) == len(halves) == 2 and whole[0].abs().max() > 1e-4
    for gradient in (whole[1], *halves):
        assert (gradient - whole[0]).abs().max() <= 1e-5 * whole[0].abs().max()


def test_the_loop_halves_the_learning_rate_evenly_after_the_warm_up(data, monkeypatch):
    rate_list = []

    class Spy(torch.optim.Adam):
        def step(self, *arguments, **options):
            rate_list.append(self.param_groups[0]["lr"] / train.LEARNING_RATE)
            return super().step(*arguments, **options)
    for owner, name, value in ((torch.optim, "Adam", Spy), (train, "WARM_UP", 2 / 12),
                               (train, "HALVINGS", 3)):
        monkeypatch.setattr(owner, name, value)
    train_in(data, monkeypatch, 12)
    assert rate_list == [0.5, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125]


# ---------------------------------------------------------------- runs

def test_a_tiny_run_learns_its_images_by_heart(small_training, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "LAYER_LIST", [(*g, 16) for *g, _ in model.LAYER_LIST])
    for name, value in (("BATCH", 8), ("CROP", 96), ("LEARNING_RATE", 0.01), ("WARP_IMAGES", 0)):
        monkeypatch.setattr(train, name, value)
    images_4d_array, label_2d_array = dots(4, 96, 96, margin=20)
    images_4d_array[1::2, ..., 1:] = 0  # dots of class 2 are red, those of class 1 white
    dataset_dict = {"category_list": ["background", "a", "b"], "box_size": [30, 30], "scale": 1.0,
                    "height": 96, "width": 96, "max_per_class": 1}
    for split in ("train", "val", "test"):
        np.save(tmp_path / f"{split}_images.npy", images_4d_array)
        np.save(tmp_path / f"{split}_labels.npy", label_2d_array)
        dataset_dict[split] = {"file_list": list("abcd"), "size_list": [[96, 96]] * 4,
                               "checksum_list": [1, 2, 3, 4]}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_dict))
    train_in(tmp_path, monkeypatch, 100)
    network, about_dict = model.load_weights(tmp_path)
    for image_3d_array, (_, class_id, x, y) in zip(images_4d_array, label_2d_array):
        found_list, _ = model.find_keypoints(network, about_dict, image_3d_array, threshold=0)
        best = max(found_list, key=lambda found: found["score"])
        assert best["class"] == " ab"[int(class_id)] and best["score"] > 0.3
        assert np.hypot(best["x"] - x, best["y"] - y) < 1.5  # px


def test_weights_know_their_data_set_the_scale_and_the_images_they_learned_from(data, monkeypatch):
    dataset_dict = {**json.loads((data / "dataset.json").read_text(encoding="utf-8")), "scale": 0.5}
    (data / "dataset.json").write_text(json.dumps(dataset_dict), encoding="utf-8")
    train_in(data, monkeypatch, 2, "--mirror")
    _, about_dict = model.load_weights(data)
    assert about_dict == {
        **{key: dataset_dict[key] for key in ("category_list", "box_size", "max_per_class")},
        "scale": 0.5, "checksum_list": dataset_dict["train"]["checksum_list"]}
    assert len(set(about_dict["checksum_list"])) == len(np.load(data / "train_images.npy"))
    assert about_dict["category_list"] == ["background", "left eye", "right eye"]


@pytest.mark.parametrize("rate, updates", [(1e30, 4), (float("inf"), 1)])
def test_a_loss_or_weights_that_are_no_numbers_are_never_saved(data, monkeypatch, rate, updates):
    """Of one update the only loss is finite: it was worked out before the update."""
    monkeypatch.setattr(train, "LEARNING_RATE", rate)
    sentence = sentence_of(train, monkeypatch, "--data", data, "--updates", updates)
    assert ("nan" in sentence or "inf" in sentence) and "LEARNING_RATE" in sentence
    assert not list(data.glob("*.pt"))


def test_an_empty_default_folder_is_drawn_first_and_one_with_a_data_set_is_taken_as_it_is(
        small_training, own, tmp_path, monkeypatch, capsys):
    data, called_list = tmp_path / "default folder", []

    def run_script(*arguments):
        called_list.append(arguments)
        copy_of(own, data)
    for owner, name, value in ((common, "DATA_FOLDER", data), (train, "DATA_FOLDER", data),
                               (train, "run_script", run_script)):
        monkeypatch.setattr(owner, name, value)
    assert call_main(train, monkeypatch, "--updates", 2) == (0, "")
    assert "01_prepare_data.py" in capsys.readouterr().out.splitlines()[0]
    assert (data / "weights.pt").is_file()
    assert call_main(train, monkeypatch, "--updates", 2) == (0, "")
    assert called_list == [("01_prepare_data.py",)]


def test_another_folder_without_a_data_set_gets_a_sentence_and_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run_script", None)  # nobody draws
    data = tmp_path / "WRONG NAME"
    sentence = sentence_of(train, monkeypatch, "--data", data)
    assert f"01_prepare_data.py --data '{data}'" in sentence and "--source" in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--updates", "0"], ["--seed", "-1"], ["--seed", 2 ** 32]])
def test_a_wrong_flag_ends_with_code_2(tmp_path, monkeypatch, arguments):
    assert call_main(train, monkeypatch, "--data", tmp_path, *arguments)[0] == 2


# ---------------------------------------------------------------- the average (EMA)

def flat(state_dict):
    return torch.cat([value.flatten().double() for value in state_dict.values()])


def test_what_is_saved_for_use_is_the_average_over_the_updates(data, monkeypatch):
    real, step_list = train.update_average, []

    def watched(average, network, update):
        step_list.append(flat(network.state_dict()))
        real(average, network, update)
    monkeypatch.setattr(train, "update_average", watched)
    weights_dict, checkpoint_dict = train_in(data, monkeypatch, 4)
    used = flat(weights_dict["network"])
    assert len(step_list) == 4 and torch.equal(step_list[-1], flat(checkpoint_dict["network"]))
    assert torch.equal(used, flat(checkpoint_dict["average"]))
    assert not torch.equal(used, step_list[-1])
    mean = torch.stack(step_list).mean(dim=0)  # nearer to it than any single update's weights
    assert all((used - mean).norm() < (step - mean).norm() for step in step_list[::3])
