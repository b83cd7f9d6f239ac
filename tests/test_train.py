"""03_train.py: the loader thread, the changes of the pictures, the loss, the loop, a tiny run.

Runs that are stopped, killed and resumed stand in hardening/test_reliability.py.
"""

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import CELL
from conftest import call_main, centroid, load, one_hot, paint_dot

model, train = load("02_model"), load("03_train")


def dots(count=6, height=256, width=160, seed=0, margin=8):
    """Dark pictures, in each one bright dot that stands at its label."""
    rng = np.random.default_rng(seed)
    images_4d_array = np.zeros((count, height, width, 3), np.uint8)
    label_list = []
    for picture in range(count):
        x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
        paint_dot(images_4d_array[picture], x, y)
        label_list.append((picture, 1 + picture % 2, x, y))
    return images_4d_array, np.array(label_list, np.float32)


def make_loader(first_step=0, last_step=5, seed=0, mirror=False, data=None):
    return train.Loader(*(data or dots()), first_step, last_step, seed, mirror)


def found_in_time(function, seconds=10.0):
    """Call the function in a thread: its result, or a failed test where it takes longer."""
    box = []
    thread = threading.Thread(target=lambda: box.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert box, f"still waiting after {seconds} s"
    return box[0]


# ---------------------------------------------------------------- the loader thread

def same(batch, other):
    return all(np.array_equal(a, b) for a, b in zip(batch, other, strict=True))


def test_batches_come_in_order_and_each_depends_on_seed_and_step_alone(small_training):
    loader = make_loader(3, 9)
    loader.start()
    batch_list = found_in_time(lambda: [loader.next_batch() for _ in range(6)])
    loader.join(5)
    assert len(batch_list) == 6 and not loader.is_alive()
    other = make_loader(0, 0)  # never started
    for step, batch in enumerate(batch_list, start=3):
        assert same(batch, other.make_batch(step))
    assert not same(batch_list[0], batch_list[1])
    assert not same(batch_list[0], make_loader(seed=1).make_batch(3))


def test_a_batch_has_the_shapes_and_types_that_the_loop_expects(small_training):
    crops_4d_array, gt_offset_4d_array, gt_class_id_3d_array = make_loader().make_batch(0)
    cells = train.CROP // CELL
    assert crops_4d_array.shape == (train.BATCH, train.CROP, train.CROP, 3)
    assert gt_offset_4d_array.shape == (train.BATCH, 2, cells, cells)
    assert gt_class_id_3d_array.shape == (train.BATCH, cells, cells)
    assert crops_4d_array.dtype == np.uint8
    assert gt_offset_4d_array.dtype == np.float32 and gt_class_id_3d_array.dtype == np.int64


def test_pictures_smaller_than_a_crop_are_taken_whole(small_training, monkeypatch):
    monkeypatch.setattr(train, "CROP", 192)
    loader = make_loader(data=dots(height=64, width=224))
    crops_4d_array, gt_offset_4d_array, _ = loader.make_batch(0)
    assert crops_4d_array.shape[1:3] == (64, 192) and gt_offset_4d_array.shape[2:] == (2, 6)


def test_the_queue_is_bounded_and_the_thread_sleeps_while_it_is_full(small_training, monkeypatch):
    monkeypatch.setattr(train, "QUEUE_SIZE", 2)
    loader, made_list = make_loader(0, 10 ** 9), []
    real = loader.make_batch
    loader.make_batch = lambda step: (made_list.append(step), real(step))[1]
    loader.start()
    time.sleep(0.4)
    assert loader.queue.qsize() == 2 and len(made_list) == 3  # two in the queue, one in hand
    cpu_before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - cpu_before < 0.1  # asleep, not asking again and again


def test_an_error_in_the_thread_reaches_the_loop(small_training):
    loader = make_loader(0, 5)

    def make_batch(step):
        if step == 2:
            raise ValueError("step 2 is broken")
        return step
    loader.make_batch = make_batch
    loader.start()

    def consume():
        got_list = []
        try:
            while True:
                got_list.append(loader.next_batch())
        except ValueError as error:
            return got_list, str(error)
    assert found_in_time(consume) == ([0, 1], "step 2 is broken")
    loader.join(5)
    assert not loader.is_alive()


def test_the_loader_thread_does_not_keep_a_dying_program_alive():
    assert make_loader().daemon


def test_an_error_in_a_full_queue_reaches_the_loop_after_what_was_made_before(
        small_training, monkeypatch):
    monkeypatch.setattr(train, "QUEUE_SIZE", 1)
    loader = make_loader(0, 5)
    loader.make_batch = lambda step: step if step == 0 else 1 / 0
    loader.start()
    time.sleep(0.2)  # the error waits for its place in the queue
    assert found_in_time(loader.next_batch) == 0
    with pytest.raises(ZeroDivisionError):
        loader.next_batch()


# ---------------------------------------------------------------- labels follow the picture

def unwarped(monkeypatch):
    monkeypatch.setattr(train, "WARP_PICTURES", 0)


def offsets_of_dots(loader, steps, border=12):
    """Centre of the dot minus its label, in px, where the whole dot is seen. Returns `[D, 2]`."""
    difference_list = []
    for step in range(steps):
        for crop_3d_array, gt_offset_3d, gt_class_id_2d in zip(*loader.make_batch(step)):
            height, width = crop_3d_array.shape[:2]
            priors_3d_array = model.make_priors(height // CELL, width // CELL).numpy()
            for row, column in np.argwhere(gt_class_id_2d > 0):
                x, y = (priors_3d_array + gt_offset_3d)[:, row, column]
                if border <= x <= width - border and border <= y <= height - border:
                    difference_list.append(np.subtract(centroid(crop_3d_array[:, :, 0]), (x, y)))
    assert len(difference_list) > 15
    return np.array(difference_list)


@pytest.mark.parametrize("warp, mirror, worst, bias", [
    (False, False, 0.1, 0.03), (False, True, 0.1, 0.03), (True, False, 0.25, 0.06),
    (True, True, 0.25, 0.06)])
def test_labels_follow_the_picture_through_crop_warp_mirror_and_turn(
        small_training, monkeypatch, warp, mirror, worst, bias):
    if not warp:
        unwarped(monkeypatch)
    for name, value in (("KEYPOINT_SHARE", 1.0), ("CROP", 96), ("BATCH", 16)):
        monkeypatch.setattr(train, name, value)
    loader = make_loader(mirror=mirror)
    assert loader.warp_share == warp
    difference_2d_array = offsets_of_dots(loader, 6)
    assert np.hypot(*difference_2d_array.T).max() < worst
    assert np.abs(difference_2d_array.mean(axis=0)).max() < bias  # half a pixel would show here


def test_few_pictures_are_warped_always_and_many_seldom(small_training, monkeypatch):
    images_4d_array, label_2d_array = dots()
    warped = make_loader(data=(images_4d_array, label_2d_array)).make_batch(0)
    many = np.broadcast_to(images_4d_array[:1], (1000, *images_4d_array.shape[1:]))
    assert make_loader(data=(many, label_2d_array)).warp_share == train.WARP_PICTURES / 1000
    unwarped(monkeypatch)
    plain = make_loader(data=(images_4d_array, label_2d_array)).make_batch(0)
    assert not same(warped, plain)


def test_a_warp_of_nothing_gives_the_crop_itself(monkeypatch):
    monkeypatch.setattr(train, "TURN", 0)
    monkeypatch.setattr(train, "ZOOM", 0)
    picture_3d_array = np.random.default_rng(0).integers(0, 256, (256, 160, 3), dtype=np.uint8)
    for left, top in ((0, 0), (96, 192), (37, 101)):
        crop_3d_array, place_2d_array = train.warp(
            np.random.default_rng(0), picture_3d_array, left, top, (64, 64, 3),
            np.array([[50.0, 120.0]]))
        assert np.array_equal(crop_3d_array, picture_3d_array[top:top + 64, left:left + 64])
        assert np.allclose(place_2d_array, [[50 - left, 120 - top]])


def test_mirroring_is_off_unless_asked_for_and_gives_all_eight_positions(
        small_training, monkeypatch):
    unwarped(monkeypatch)
    image_3d_array = np.zeros((train.CROP, train.CROP, 3), np.uint8)
    image_3d_array[:16, :32] = 255  # a bar that tells all eight apart
    data = image_3d_array[None], np.zeros((0, 4), np.float32)
    for mirror, positions in ((False, 1), (True, 8)):
        loader = make_loader(mirror=mirror, data=data)
        crop_list = [crop.tobytes() for step in range(40) for crop in loader.make_batch(step)[0]]
        assert len(set(crop_list)) == positions


# ---------------------------------------------------------------- crops and what they teach

def pictures_that_know_their_places(count=3, height=192, width=160):
    """Red is x and green is y of each pixel: a crop's first pixel says where it was cut out."""
    images_4d_array = np.zeros((count, height, width, 3), np.uint8)
    images_4d_array[..., 0] = np.arange(width)[None, :]
    images_4d_array[..., 1] = np.arange(height)[:, None]
    images_4d_array[..., 2] = np.arange(count)[:, None, None]
    return images_4d_array


def taught_crops(monkeypatch, label_2d_array, batches=10, **settings):
    """(left, top, gt_offset, gt_class_id) of crops of 64 px, neither warped nor mirrored."""
    unwarped(monkeypatch)
    for name, value in {"BATCH": 16, **settings}.items():
        monkeypatch.setattr(train, name, value)
    loader = make_loader(data=(pictures_that_know_their_places(), label_2d_array))
    for step in range(batches):
        for crop_3d_array, gt_offset_3d, gt_class_id_2d in zip(*loader.make_batch(step)):
            left, top, picture = crop_3d_array[0, 0]
            yield int(picture), int(left), int(top), gt_offset_3d, gt_class_id_2d


def test_every_crop_teaches_what_match_says_of_its_place(small_training, monkeypatch):
    label_2d_array = np.array([(0, 1, 50, 60), (0, 2, 120, 100), (1, 2, 80, 150)], np.float32)
    seen_set = set()
    for picture, left, top, gt_offset_3d, gt_class_id_2d in taught_crops(
            monkeypatch, label_2d_array, KEYPOINT_SHARE=0.5):
        here = label_2d_array[label_2d_array[:, 0] == picture] * (0, 1, 1, 1) - (0, 0, left, top)
        wanted_offset_4d, wanted_class_id_3d = model.match(here, 1, 2, 2)
        assert np.array_equal(gt_class_id_2d, wanted_class_id_3d[0])
        assert np.allclose(gt_offset_3d, wanted_offset_4d[0])
        seen_set.add((picture, bool(gt_class_id_2d.any())))
    assert seen_set == {(0, False), (0, True), (1, False), (1, True), (2, False)}


def test_a_label_just_outside_of_a_crop_teaches_the_cells_along_its_rim(
        small_training, monkeypatch):
    label_2d_array = np.array([(0, 1, 80, 96), (1, 1, 80, 96), (2, 1, 80, 96)], np.float32)
    outside, reach = 0, model.NEIGHBOUR_REACH - CELL / 2  # px beyond the border
    for _, left, top, gt_offset_3d, gt_class_id_2d in taught_crops(
            monkeypatch, label_2d_array, batches=20, KEYPOINT_SHARE=0):
        x, y = 80 - left, 96 - top
        if 64 <= x < 64 + reach and 0 <= y < 64:  # to the right of the crop
            outside += 1
            row = y // CELL
            assert gt_class_id_2d[row, 1] == 1
            assert gt_offset_3d[:, row, 1].tolist() == [x - 48, y - (row + 0.5) * CELL]
    assert outside >= 3


def test_most_crops_lie_round_a_keypoint_that_may_be_anywhere_in_them(small_training, monkeypatch):
    label_2d_array = np.array([(0, 1, 80, 96)], np.float32)
    place_list = [(80 - left, 96 - top) for picture, left, top, *_ in
                  taught_crops(monkeypatch, label_2d_array, KEYPOINT_SHARE=1.0)]
    assert len(place_list) == 160 and np.min(place_list) >= 0 and np.max(place_list) <= 64
    assert (np.ptp(place_list, axis=0) > 50).all()


def test_a_label_on_the_pictures_rim_may_lie_in_a_crop(small_training, monkeypatch):
    label_2d_array = np.array([(0, 1, 159.99, 191.99), (1, 1, 0, 0)], np.float32)
    class_id_3d = np.array([gt_class_id_2d for *_, gt_class_id_2d in taught_crops(
        monkeypatch, label_2d_array, KEYPOINT_SHARE=1.0)])
    assert (class_id_3d[:, -1, -1] == 1).any() and (class_id_3d[:, 0, 0] == 1).any()


# ---------------------------------------------------------------- light and focus

def light(images_4d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise_1d = torch.randn(2 * images_4d.numel(), generator=generator)
    return train.augment(images_4d.clone(), noise_1d, generator)


def test_changes_of_light_and_focus_move_no_dot_and_stay_within_0_to_255(monkeypatch):
    monkeypatch.setattr(train, "NOISE", 0)
    images_4d = torch.from_numpy(dots(8, 96, 96, margin=30)[0]).permute(0, 3, 1, 2).float()
    changed_4d = light(images_4d)
    assert changed_4d.shape == images_4d.shape and not torch.equal(changed_4d, images_4d)
    assert changed_4d.min() >= 0 and changed_4d.max() <= 255
    for before, after in zip(images_4d[:, 0].numpy(), changed_4d[:, 0].numpy()):
        after = after - np.median(after)  # a change of contrast lifts the ground
        after = np.where(after > 8, after, 0)
        assert np.abs(np.subtract(centroid(before), centroid(after))).max() < 0.1


def test_changes_of_light_differ_by_picture_and_repeat_with_the_seed():
    images_4d = torch.full((4, 3, 64, 64), 120.0)
    changed_4d = light(images_4d)
    assert torch.equal(changed_4d, light(images_4d))
    assert not torch.equal(changed_4d, light(images_4d, seed=1))
    mean_1d = changed_4d.mean(dim=(1, 2, 3))
    assert len({round(float(mean), 2) for mean in mean_1d}) == 4 and changed_4d[0].std() > 0.1


@pytest.mark.parametrize("name", ["LIGHT", "CONTRAST", "COLOUR", "NOISE", "BLUR"])
def test_each_change_is_there_and_goes_with_its_constant(monkeypatch, name):
    constant_list = ["LIGHT", "CONTRAST", "COLOUR", "NOISE", "BLUR"]
    for other in constant_list:
        monkeypatch.setattr(train, other, 0.0)
    generator = torch.Generator().manual_seed(1)
    images_4d = 80 + 80 * torch.rand((4, 3, 32, 32), generator=generator)
    assert torch.allclose(light(images_4d), images_4d, atol=1e-3)
    monkeypatch.undo()
    for other in constant_list:
        if other != name:
            monkeypatch.setattr(train, other, 0.0)
    assert not torch.allclose(light(images_4d), images_4d, atol=1)


# ---------------------------------------------------------------- the loss

def random_case(count=4, rows=4, columns=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    output_4d = torch.randn(count, 2 + classes, rows, columns, generator=generator)
    label_2d_array = np.array([(i, 1 + i % 2, 20 + 23 * i, 100 - 17 * i) for i in range(count)],
                              np.float32)
    return output_4d, *map(torch.from_numpy, model.match(label_2d_array, count, rows, columns))


@pytest.mark.parametrize("kind", ["L1", "MSE"])
def test_the_loss_equals_one_worked_out_by_hand(monkeypatch, kind):
    monkeypatch.setattr(train, "LOCATION_LOSS", kind)
    monkeypatch.setattr(train, "HARD_NEGATIVES", 2)
    output_4d = torch.zeros(2, 5, 2, 2)
    output_4d[0, :2, 0, 1] = torch.tensor([0.5, -0.25])  # in half cells
    output_4d[0, 2:, 0, 1] = torch.tensor([0.0, 2.0, 0.0])
    output_4d[0, 2:, 1, 0] = torch.tensor([0.0, 1.0, 0.0])  # background that looks like class 1
    output_4d[0, 2:, 1, 1] = torch.tensor([3.0, 0.0, 0.0])  # an easy one
    gt_offset_4d = torch.zeros(2, 2, 2, 2)
    gt_class_id_3d = torch.zeros(2, 2, 2, dtype=torch.int64)
    gt_class_id_3d[0, 0, 1] = 1
    gt_offset_4d[0, :, 0, 1] = torch.tensor([4.0, 4.0])
    location, confidence = train.detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
    # Location: errors 0.5 - 4/unit and -0.25 - 4/unit in one cell; over two pictures.
    error_list = [0.5 - 4 / model.OFFSET_UNIT, -0.25 - 4 / model.OFFSET_UNIT]
    by_hand = sum(abs(e) if kind == "L1" else e * e for e in error_list) / 2
    assert location.item() == pytest.approx(by_hand, rel=1e-5)
    # Confidence: the positive; the two hardest of picture 0; two of picture 1, log 3 each.
    e = np.e
    by_hand = (np.log(2 + e ** 2) - 2 + np.log(2 + e) + np.log(3) + 2 * np.log(3)) / 2
    assert confidence.item() == pytest.approx(by_hand, rel=1e-5)


def test_only_the_hardest_background_cells_count(monkeypatch):
    monkeypatch.setattr(train, "HARD_NEGATIVES", 3)
    output_4d = torch.zeros(1, 5, 4, 4)
    output_4d[0, 3] = torch.arange(16.0).view(4, 4)  # the last three cells are most wrongly sure
    output_4d.requires_grad_()
    _, confidence = train.detection_loss(
        output_4d, torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))
    confidence.backward()
    learns = output_4d.grad[0, 2:].abs().sum(dim=0) > 0
    assert learns.flatten().nonzero().flatten().tolist() == [13, 14, 15]


def test_pictures_without_keypoints_have_a_finite_loss_and_no_location_part():
    output_4d, *_ = random_case()
    output_4d.requires_grad_()
    location, confidence = train.detection_loss(
        output_4d, torch.zeros(4, 2, 4, 4), torch.zeros(4, 4, 4, dtype=torch.int64))
    assert location.item() == 0 and np.isfinite(confidence.item()) and confidence.item() > 0
    (location + confidence).backward()
    gradient_4d = output_4d.grad
    assert torch.isfinite(gradient_4d).all()
    assert not gradient_4d[:, :2].any() and gradient_4d[:, 2:].any()


def test_a_perfect_answer_has_next_to_no_loss():
    _, gt_offset_4d, gt_class_id_3d = random_case()
    offset_4d, score_4d = gt_offset_4d / model.OFFSET_UNIT, 50 * one_hot(gt_class_id_3d, 3)
    output_4d = torch.cat((offset_4d, score_4d), dim=1)
    location, confidence = train.detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
    assert abs(location.item()) < 1e-6 and abs(confidence.item()) < 1e-6


def test_cells_beside_a_keypoint_learn_its_offset_and_its_class_like_its_own():
    label_2d_array = np.array([(0, 2, 36, 60)], np.float32)  # teaches four cells
    gt_offset_4d, gt_class_id_3d = map(torch.from_numpy, model.match(label_2d_array, 1, 4, 4))
    output_4d = torch.zeros(1, 5, 4, 4, requires_grad=True)
    location, confidence = train.detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
    (location + confidence).backward()
    learns_place = output_4d.grad[0, :2].abs().sum(dim=0) > 0
    learns_class = output_4d.grad[0, 4] < 0  # towards class 2
    assert learns_place.sum() == 4 and torch.equal(learns_place, learns_class)
    assert torch.equal(learns_place, gt_class_id_3d[0] == 2)


def test_a_grid_with_fewer_cells_than_hard_negatives_is_no_problem(monkeypatch):
    monkeypatch.setattr(train, "HARD_NEGATIVES", 1000)
    output_4d, gt_offset_4d, gt_class_id_3d = random_case()
    _, confidence = train.detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
    probability_4d = output_4d[:, 2:].softmax(dim=1).gather(1, gt_class_id_3d[:, None])
    by_hand = -probability_4d.log().sum().item() / len(output_4d)
    assert confidence.item() == pytest.approx(by_hand, rel=1e-5)


def test_the_gradients_of_two_half_batches_add_up_to_those_of_the_whole():
    torch.manual_seed(0)
    network = model.KeypointNet(3).eval()  # BN in training mode sees only half of a half batch
    images_4d = torch.randint(0, 256, (4, 3, 128, 128)).float()
    _, gt_offset_4d, gt_class_id_3d = random_case()

    def gradients(parts):
        network.zero_grad()
        for part in torch.arange(4).split(4 // parts):
            location, confidence = train.detection_loss(
                network(images_4d[part]), gt_offset_4d[part], gt_class_id_3d[part])
            ((location + train.U * confidence) / parts).backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    whole, halves = gradients(1), gradients(2)
    assert whole.abs().max() > 1e-4 and (whole - halves).abs().max() <= 1e-5 * whole.abs().max()


# ---------------------------------------------------------------- the loop

def copy_of(own, tmp_path):
    """The data set without weights, in a folder that a test may write to."""
    return Path(shutil.copytree(own, tmp_path / "data", ignore=shutil.ignore_patterns("*.pt")))


def run(monkeypatch, data, updates, *arguments):
    """Train in this process; returns the checkpoint."""
    code, sentence = call_main(train, monkeypatch, "--data", data, "--updates", updates, *arguments)
    assert (code, sentence) == (0, "")
    return torch.load(data / "checkpoint.pt", weights_only=True)


def test_the_loop_adds_up_the_gradients_of_the_whole_batch_and_forgets_them_after_each_update(
        small_training, own, tmp_path, monkeypatch):
    def gradients(steps_per_update):
        """The gradients at two updates that see the same four crops, in one step or in two."""
        gradient_list = []

        class Spy(torch.optim.Adam):
            def step(self, *arguments, **options):
                parameter_list = self.param_groups[0]["params"]
                gradient_list.append(torch.cat([p.grad.flatten() for p in parameter_list]))

        def make_batch(self, step):
            if steps_per_update == 1:
                return batch
            part = slice(0, 2) if step % 2 == 0 else slice(2, 4)
            return tuple(array[part] for array in batch)

        def as_in_use(self, mode=True):  # in training BN would see only half of a half batch
            return torch.nn.Module.train(self, False)
        with monkeypatch.context() as changed:
            changed.setattr(train, "BATCH", 4)
            batch = make_loader(data=dots(height=96, width=64)).make_batch(0)
            changed.setattr(train, "STEPS_PER_UPDATE", steps_per_update)
            changed.setattr(train.Loader, "make_batch", make_batch)
            changed.setattr(train, "augment", lambda images_4d, *rest: images_4d)
            changed.setattr(model.KeypointNet, "train", as_in_use)
            changed.setattr(torch.optim, "Adam", Spy)
            run(changed, data, 2)
        return gradient_list
    data = copy_of(own, tmp_path)
    whole, halves = gradients(1), gradients(2)
    assert len(whole) == len(halves) == 2 and whole[0].abs().max() > 1e-4
    for gradient in (whole[1], *halves):
        assert (gradient - whole[0]).abs().max() <= 1e-5 * whole[0].abs().max()


def test_the_learning_rate_is_halved_by_plan(small_training, own, tmp_path, monkeypatch):
    rate_list = []

    class Spy(torch.optim.Adam):
        def step(self, *arguments, **options):
            rate_list.append(self.param_groups[0]["lr"])
            return super().step(*arguments, **options)
    monkeypatch.setattr(torch.optim, "Adam", Spy)
    monkeypatch.setattr(train, "WARM_UP", 0)
    monkeypatch.setattr(train, "HALVINGS", 3)
    run(monkeypatch, copy_of(own, tmp_path), 12)
    share_list = [rate / train.LEARNING_RATE for rate in rate_list]
    assert share_list == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125]


def test_the_learning_rate_rises_during_the_warm_up_and_follows_the_plan_after_it(monkeypatch):
    monkeypatch.setattr(train, "WARM_UP", 0)
    plan_list = [train.learning_rate(update, 1000) for update in range(1000)]
    monkeypatch.setattr(train, "WARM_UP", 0.05)  # of the run: 50 updates of 1,000
    rate_list = [train.learning_rate(update, 1000) for update in range(1000)]
    assert rate_list[0] == pytest.approx(train.LEARNING_RATE / 50)
    assert np.allclose(np.diff(rate_list[:50]), train.LEARNING_RATE / 50)
    assert rate_list[49:] == plan_list[49:] and max(rate_list) == train.LEARNING_RATE


def test_the_average_forgets_the_start_at_once_and_moves_slowly_later(small_training):
    network, average = model.KeypointNet(3), model.KeypointNet(3)

    def share_left(update):
        """How much of the way from 0 to the network's 1 is left after one more update."""
        for now, mean in zip(network.state_dict().values(), average.state_dict().values()):
            now.fill_(1)
            mean.fill_(0)
        train.update_average(average, network, update)
        left_dict = {name: 1 - mean.double().mean().item()
                     for name, mean in average.state_dict().items() if "num_batches" not in name}
        assert any("running_var" in name for name in left_dict)
        assert max(left_dict.values()) - min(left_dict.values()) < 1e-6
        return max(left_dict.values())
    assert share_left(0) < 0.5 and 0.9 < share_left(100_000) < 1


def flat(state_dict):
    return torch.cat([value.flatten().double() for value in state_dict.values()])


def test_what_is_saved_for_use_is_the_average_over_the_updates(
        small_training, own, tmp_path, monkeypatch):
    data, real, step_list = copy_of(own, tmp_path), train.update_average, []

    def watched(average, network, update):
        step_list.append(flat(network.state_dict()))
        real(average, network, update)
    monkeypatch.setattr(train, "update_average", watched)
    checkpoint = run(monkeypatch, data, 4)
    saved = torch.load(data / "weights.pt", weights_only=True)["network"]
    assert len(step_list) == 4 and torch.equal(step_list[-1], flat(checkpoint["network"]))
    assert torch.equal(flat(saved), flat(checkpoint["average"]))
    assert not torch.equal(flat(saved), step_list[-1])
    mean = torch.stack(step_list).mean(dim=0)  # nearer to it than any single update's weights
    assert all((flat(saved) - mean).norm() < (step - mean).norm() for step in step_list[::3])


# ---------------------------------------------------------------- runs

def test_a_tiny_run_learns_its_pictures_by_heart(small_training, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "LAYER_LIST", [(*g, 16) for *g, _ in model.LAYER_LIST])
    for name, value in (("BATCH", 8), ("CROP", 96), ("LEARNING_RATE", 0.01), ("SAVE_EVERY", 10)):
        monkeypatch.setattr(train, name, value)
    unwarped(monkeypatch)
    data = tmp_path / "data"
    data.mkdir()
    images_4d_array, label_2d_array = dots(4, 96, 96, margin=20)
    images_4d_array[1::2, ..., 1:] = 0  # dots of class 2 are red, those of class 1 white
    dataset_dict = {"category_list": ["background", "a", "b"], "box_size": [30, 30],
                    "height": 96, "width": 96, "max_per_class": 1}
    for split in ("train", "val", "test"):
        np.save(data / f"{split}_images.npy", images_4d_array)
        np.save(data / f"{split}_labels.npy", label_2d_array)
        dataset_dict[split] = {"file_list": list("abcd"), "size_list": [[96, 96]] * 4}
    (data / "dataset.json").write_text(json.dumps(dataset_dict))
    curve_dict = run(monkeypatch, data, 100)["curves"]
    assert [row[0] for row in curve_dict["val"]] == list(range(10, 101, 10))
    assert [row[0] for row in curve_dict["train"]] == [50, 100]
    first, last = (sum(row[1:]) for row in (curve_dict["val"][0], curve_dict["val"][-1]))
    assert np.isfinite(last) and last < first / 3
    assert (data / "results" / "loss.png").stat().st_size > 5000


def test_the_dotted_curve_looks_at_the_validation_split_and_at_no_other(
        small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    seen_list, real = [], train.make_val_batches
    monkeypatch.setattr(train, "make_val_batches",
                        lambda arrays, device: seen_list.append(arrays) or real(arrays, device))
    np.save(data / "test_labels.npy", np.full((1, 4), np.nan, np.float32))  # nobody looks at it
    run(monkeypatch, data, 2)
    (images_4d_array, label_2d_array), = seen_list
    assert np.array_equal(images_4d_array, np.load(data / "val_images.npy"))
    assert np.array_equal(label_2d_array, np.load(data / "val_labels.npy"))


def test_validation_crops_are_always_the_same_and_never_warped(small_training, monkeypatch):
    def grids():
        batch_list = train.make_val_batches(dots(), "cpu")
        return torch.cat([torch.cat((gt_offset_4d, gt_class_id_3d[:, None]), dim=1)
                          for _, gt_offset_4d, gt_class_id_3d in batch_list])
    first = grids()
    monkeypatch.setattr(train, "TURN", 90)
    assert torch.equal(first, grids())


def test_the_sheet_of_training_crops_shows_what_the_network_gets(own, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CROP", 64)
    dataset_dict, array_dict = train.read_data_set(own)
    loader = make_loader(data=array_dict["train"])
    given_list, real = [], train.augment
    monkeypatch.setattr(train, "augment",
                        lambda *a: given_list.append(real(*a)) or given_list[-1])
    noise_1d, generator = torch.randn(2 * train.BATCH * 64 * 64 * 3), torch.Generator()
    batch = train.to_device(loader.make_batch(0), "cpu")
    train.draw_crops(tmp_path, batch, noise_1d, generator)
    crops_4d, = given_list
    assert crops_4d.shape == (train.BATCH, 3, 64, 64)
    assert (tmp_path / "results" / "train_crops.png").stat().st_size > 20_000


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
        small_training, own, tmp_path, monkeypatch):
    data, weights_list = copy_of(own, tmp_path), []
    for seed in (0, 0, 1):
        run(monkeypatch, data, 3, "--seed", seed)
        weights_list.append(flat(torch.load(data / "weights.pt", weights_only=True)["network"]))
    assert torch.equal(weights_list[0], weights_list[1])
    assert not torch.equal(weights_list[0], weights_list[2])


def test_trained_weights_load_and_know_their_data_set(small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    run(monkeypatch, data, 2, "--mirror")
    network, about_dict = model.load_weights(data)
    dataset_dict = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    for key in ("category_list", "box_size", "max_per_class"):
        assert about_dict[key] == dataset_dict[key]
    assert about_dict["category_list"] == ["background", "left eye", "right eye"]
    image_3d_array = np.zeros((96, 64, 3), np.uint8)
    assert isinstance(model.find_keypoints(network, about_dict, image_3d_array), list)


def test_the_loader_thread_has_ended_when_training_has(small_training, own, tmp_path, monkeypatch):
    before_set = set(threading.enumerate())
    run(monkeypatch, copy_of(own, tmp_path), 2)
    for thread in set(threading.enumerate()) - before_set:
        thread.join(5)
        assert not thread.is_alive()


# ---------------------------------------------------------------- where there is no data set yet

@pytest.mark.parametrize("stopped_while", [None, "drawing", "packing"])
def test_a_default_folder_without_a_whole_data_set_is_drawn_and_trained_on(
        small_training, own, tmp_path, monkeypatch, capsys, stopped_while):
    data = tmp_path / "default folder"
    if stopped_while:  # 01 leaves this mark until all is packed
        data.mkdir()
        (data / "dataset.json").write_text('{"drawn": true}')
    if stopped_while == "packing":
        shutil.copy(own / "train_labels.npy", data)
    monkeypatch.setattr(common, "DATA_FOLDER", data)
    monkeypatch.setattr(train, "draw_data_set",
                        lambda folder: shutil.copytree(own, folder, dirs_exist_ok=True))
    assert call_main(train, monkeypatch, "--updates", 2) == (0, "")
    assert "01_prepare_data.py" in capsys.readouterr().out.splitlines()[0]
    assert (data / "weights.pt").is_file()


def test_a_default_folder_with_a_data_set_of_ones_own_is_trained_on_as_it_is(
        small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    monkeypatch.setattr(common, "DATA_FOLDER", data)
    monkeypatch.setattr(train, "draw_data_set", None)
    assert call_main(train, monkeypatch, "--updates", 2) == (0, "")


def test_another_folder_without_a_data_set_gets_a_sentence_with_the_commands_and_stays_as_it_is(
        tmp_path, monkeypatch):
    monkeypatch.setattr(train.subprocess, "Popen", None)  # nobody draws
    data = tmp_path / "WRONG NAME"
    code, sentence = call_main(train, monkeypatch, "--data", data)
    assert code == 1 and sentence.startswith("error: ") and "\n" not in sentence
    for part in (str(data), f"python 01_prepare_data.py --data '{data}'", "--source"):
        assert part in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_drawing_that_fails_ends_the_training_in_a_sentence(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("I am no folder")
    with pytest.raises(train.UserError, match="01_prepare_data.py"):
        train.draw_data_set(blocked)


@pytest.mark.parametrize("arguments", [["--updates", "0"], ["--updates", "ten"], ["--seed", "-1"],
                                       ["--seed", 2 ** 32], ["--seed", 10 ** 30]])
def test_a_wrong_flag_ends_with_code_2(tmp_path, monkeypatch, arguments):
    assert call_main(train, monkeypatch, "--data", tmp_path, *arguments)[0] == 2
