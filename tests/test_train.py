"""03_train.py: the loader thread, the changes of the pictures, the loss, accumulation, a tiny run."""

import json
import threading
import time

import numpy as np
import pytest
import torch

from common import CELL
from conftest import call_main, centroid, load, paint_dot

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
    """Call the function in a thread; its result, or a failed test if it takes longer: a test must not hang."""
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
    batch_list = found_in_time(lambda: list(loader))
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
    assert crops_4d_array.shape == (train.BATCH, train.CROP, train.CROP, 3) and crops_4d_array.dtype == np.uint8
    assert gt_offset_4d_array.shape == (train.BATCH, 2, cells, cells) and gt_offset_4d_array.dtype == np.float32
    assert gt_class_id_3d_array.shape == (train.BATCH, cells, cells) and gt_class_id_3d_array.dtype == np.int64


def test_pictures_smaller_than_a_crop_are_taken_whole(small_training, monkeypatch):
    monkeypatch.setattr(train, "CROP", 192)
    crops_4d_array, gt_offset_4d_array, _ = make_loader(data=dots(height=64, width=224)).make_batch(0)
    assert crops_4d_array.shape[1:3] == (64, 192) and gt_offset_4d_array.shape[2:] == (2, 6)


def test_the_queue_is_bounded_and_the_thread_sleeps_while_it_is_full(small_training, monkeypatch):
    monkeypatch.setattr(train, "QUEUE_SIZE", 2)
    loader, made_list = make_loader(0, 10 ** 9), []
    real = loader.make_batch
    loader.make_batch = lambda step: (made_list.append(step), real(step))[1]
    loader.start()
    time.sleep(0.4)
    assert loader.queue.qsize() == 2 and len(made_list) == 3  # two in the queue, one in the thread's hand
    cpu_before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - cpu_before < 0.1  # asleep, not asking again and again
    loader.stop()


def test_the_loader_stops_cleanly_while_it_is_blocked_in_put(small_training, monkeypatch):
    monkeypatch.setattr(train, "QUEUE_SIZE", 1)
    loader = make_loader(0, 10 ** 9)
    loader.start()
    time.sleep(0.3)
    assert loader.is_alive()
    start_time = time.perf_counter()
    found_in_time(lambda: (loader.stop(), True)[1])
    assert not loader.is_alive() and time.perf_counter() - start_time < 2


def test_stopping_twice_after_the_end_or_before_the_start_does_not_hang(small_training):
    loader = make_loader(0, 2)
    loader.start()
    found_in_time(lambda: list(loader))
    for stopped in (loader, loader, make_loader()):
        found_in_time(lambda: (stopped.stop(), True)[1])


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
            for item in loader:
                got_list.append(item)
        except ValueError as error:
            return got_list, str(error)
    assert found_in_time(consume) == ([0, 1], "step 2 is broken")
    loader.join(5)
    assert not loader.is_alive()


def test_an_error_in_a_full_queue_does_not_keep_the_loader_from_stopping(small_training, monkeypatch):
    monkeypatch.setattr(train, "QUEUE_SIZE", 1)
    loader = make_loader(0, 5)
    loader.make_batch = lambda step: step if step == 0 else 1 / 0
    loader.start()
    time.sleep(0.2)
    assert loader.is_alive()  # the error waits for its place in the queue
    found_in_time(lambda: (loader.stop(), True)[1])
    assert not loader.is_alive()


def test_the_loader_thread_does_not_keep_a_dying_program_alive():
    assert make_loader().daemon


# ---------------------------------------------------------------- labels follow the picture

def offsets_of_dots(loader, steps, border=12):
    """Centre of the dot minus its label, in px, over the crops in which the whole dot is seen. Returns `[D, 2]`."""
    difference_list = []
    for step in range(steps):
        crops_4d_array, gt_offset_4d_array, gt_class_id_3d_array = loader.make_batch(step)
        height, width = crops_4d_array.shape[1:3]
        prior_3d_array = model.make_priors(height // CELL, width // CELL).numpy()
        for crop_3d_array, gt_offset_3d_array, gt_class_id_2d_array in zip(crops_4d_array, gt_offset_4d_array, gt_class_id_3d_array):
            for row, column in np.argwhere(gt_class_id_2d_array > 0):
                x, y = (prior_3d_array + gt_offset_3d_array)[:, row, column]
                if border <= x <= width - border and border <= y <= height - border:
                    difference_list.append(np.subtract(centroid(crop_3d_array[:, :, 0]), (x, y)))
    assert len(difference_list) > 15
    return np.array(difference_list)


@pytest.mark.parametrize("warp_share, mirror, worst, bias", [(0, False, 0.1, 0.03), (0, True, 0.1, 0.03),
                                                             (1, False, 0.25, 0.06), (1, True, 0.25, 0.06)])
def test_labels_follow_the_picture_through_crop_warp_mirror_and_turn(small_training, monkeypatch, warp_share, mirror, worst, bias):
    monkeypatch.setattr(train, "WARP_SHARE", warp_share)
    monkeypatch.setattr(train, "KEYPOINT_SHARE", 1.0)
    monkeypatch.setattr(train, "CROP", 96)
    monkeypatch.setattr(train, "BATCH", 16)
    difference_2d_array = offsets_of_dots(make_loader(mirror=mirror), 6)
    assert np.hypot(*difference_2d_array.T).max() < worst
    assert np.abs(difference_2d_array.mean(axis=0)).max() < bias  # half a pixel would show here


def test_the_warp_really_turns_and_zooms(small_training, monkeypatch):
    monkeypatch.setattr(train, "KEYPOINT_SHARE", 1.0)
    batch_list = []
    for warp_share in (0, 1):
        monkeypatch.setattr(train, "WARP_SHARE", warp_share)
        batch_list.append(make_loader().make_batch(0))
    assert not same(*batch_list)


def test_mirroring_is_off_unless_asked_for_and_gives_all_eight_positions(small_training, monkeypatch):
    monkeypatch.setattr(train, "WARP_SHARE", 0)
    image_3d_array = np.zeros((train.CROP, train.CROP, 3), np.uint8)
    image_3d_array[:16, :32] = 255  # a bar that tells all eight apart
    data = image_3d_array[None], np.zeros((0, 4), np.float32)
    position_dict = {mirror: {crop.tobytes() for step in range(40) for crop in make_loader(mirror=mirror, data=data).make_batch(step)[0]}
                     for mirror in (False, True)}
    assert len(position_dict[False]) == 1 and len(position_dict[True]) == 8


def test_a_label_outside_of_its_crop_is_left_out(small_training, monkeypatch):
    monkeypatch.setattr(train, "KEYPOINT_SHARE", 0)
    monkeypatch.setattr(train, "WARP_SHARE", 0)
    monkeypatch.setattr(train, "BATCH", 40)
    crops_4d_array, _, gt_class_id_3d_array = make_loader(data=dots(margin=20)).make_batch(0)
    labelled = (gt_class_id_3d_array > 0).any(axis=(1, 2))
    # Away from the crop's border a dot is seen exactly where there is a label.
    middle = crops_4d_array[:, 10:-10, 10:-10].max(axis=(1, 2, 3)) > 190
    assert labelled.any() and not labelled.all() and labelled[middle].all()
    assert not labelled[crops_4d_array.max(axis=(1, 2, 3)) == 0].any()


def test_a_label_on_the_pictures_rim_may_lie_in_a_crop(small_training, monkeypatch):
    monkeypatch.setattr(train, "KEYPOINT_SHARE", 1.0)
    label_2d_array = np.array([(0, 1, 159.99, 255.99), (1, 1, 0, 0)], np.float32)
    data = np.zeros((2, 256, 160, 3), np.uint8), label_2d_array
    gt_class_id_3d_array = np.concatenate([make_loader(data=data).make_batch(step)[2] for step in range(10)])
    assert (gt_class_id_3d_array[:, -1, -1] == 1).any() and (gt_class_id_3d_array[:, 0, 0] == 1).any()


def light(images_4d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    strip_1d = torch.randn(2 * images_4d.numel(), generator=generator)
    return train.augment(images_4d.clone(), generator, strip_1d)


def test_changes_of_light_and_focus_move_no_dot_and_stay_within_0_to_255(monkeypatch):
    monkeypatch.setattr(train, "NOISE", 0)
    images_4d = torch.from_numpy(dots(8, 96, 96, margin=30)[0]).permute(0, 3, 1, 2).float()
    changed_4d = light(images_4d)
    assert changed_4d.shape == images_4d.shape and not torch.equal(changed_4d, images_4d)
    assert changed_4d.min() >= 0 and changed_4d.max() <= 255
    for before, after in zip(images_4d[:, 0].numpy(), changed_4d[:, 0].numpy()):
        after = after - np.median(after)  # a change of contrast lifts the ground
        assert np.abs(np.subtract(centroid(before), centroid(np.where(after > 8, after, 0)))).max() < 0.1


def test_changes_of_light_differ_by_picture_and_repeat_with_the_seed():
    images_4d = torch.full((4, 3, 64, 64), 120.0)
    changed_4d = light(images_4d)
    assert torch.equal(changed_4d, light(images_4d)) and not torch.equal(changed_4d, light(images_4d, seed=1))
    mean_1d = changed_4d.mean(dim=(1, 2, 3))
    assert len({round(float(m), 2) for m in mean_1d}) == 4 and changed_4d[0].std() > 0.1


# ---------------------------------------------------------------- the loss

def random_case(count=4, rows=4, columns=4, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    output_4d = torch.randn(count, 2 + classes, rows, columns, generator=generator)
    label_2d_array = np.array([(i, 1 + i % 2, 20 + 23 * i, 100 - 17 * i) for i in range(count)], np.float32)
    gt_offset_4d_array, gt_class_id_3d_array = model.match(label_2d_array, count, rows, columns)
    return output_4d, torch.from_numpy(gt_offset_4d_array), torch.from_numpy(gt_class_id_3d_array)


@pytest.mark.parametrize("kind", ["L1", "MSE"])
def test_the_loss_equals_one_worked_out_by_hand(monkeypatch, kind):
    monkeypatch.setattr(train, "LOCATION_LOSS", kind)
    monkeypatch.setattr(train, "HARD_NEGATIVES", 2)
    output_4d = torch.zeros(2, 5, 2, 2)
    output_4d[0, :2, 0, 1] = torch.tensor([0.5, -0.25])  # in half cells
    output_4d[0, 2:, 0, 1] = torch.tensor([0.0, 2.0, 0.0])
    output_4d[0, 2:, 1, 0] = torch.tensor([0.0, 1.0, 0.0])  # a background cell that looks like class 1
    output_4d[0, 2:, 1, 1] = torch.tensor([3.0, 0.0, 0.0])  # an easy one
    gt_offset_4d, gt_class_id_3d = torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, dtype=torch.int64)
    gt_class_id_3d[0, 0, 1] = 1
    gt_offset_4d[0, :, 0, 1] = torch.tensor([4.0, 4.0])
    location, confidence = train.detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
    # Location: errors 0.5 - 4/unit and -0.25 - 4/unit in one cell; over two pictures.
    error_list = [0.5 - 4 / model.OFFSET_UNIT, -0.25 - 4 / model.OFFSET_UNIT]
    by_hand = sum(abs(e) if kind == "L1" else e * e for e in error_list) / 2
    assert location.item() == pytest.approx(by_hand, rel=1e-5)
    # Confidence: the positive; the two hardest of picture 0: log(2 + e) and log 3; two cells of picture 1: log 3 each.
    e = np.e
    by_hand = (np.log(2 + e ** 2) - 2 + np.log(2 + e) + np.log(3) + 2 * np.log(3)) / 2
    assert confidence.item() == pytest.approx(by_hand, rel=1e-5)


def test_pictures_without_keypoints_have_a_finite_loss_and_no_location_part():
    output_4d = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    location, confidence = train.detection_loss(output_4d, torch.zeros(3, 2, 4, 4), torch.zeros(3, 4, 4, dtype=torch.int64))
    assert location.item() == 0 and np.isfinite(confidence.item()) and confidence.item() > 0
    (location + confidence).backward()
    assert torch.isfinite(output_4d.grad).all() and not output_4d.grad[:, :2].any() and output_4d.grad[:, 2:].any()


def test_a_perfect_answer_has_next_to_no_loss():
    _, gt_offset_4d, gt_class_id_3d = random_case()
    output_4d = torch.cat((gt_offset_4d / model.OFFSET_UNIT,
                           50.0 * torch.nn.functional.one_hot(gt_class_id_3d.clamp(min=0), 3).permute(0, 3, 1, 2)), dim=1)
    location, confidence = train.detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
    assert abs(location.item()) < 1e-6 and abs(confidence.item()) < 1e-6


def test_cells_beside_a_keypoint_may_say_background_or_its_class_and_no_other():
    gt_class_id_3d = torch.zeros(1, 2, 2, dtype=torch.int64)
    gt_class_id_3d[0, 0, 0], gt_class_id_3d[0, 0, 1] = 1, -1
    output_4d, gt_offset_4d = torch.zeros(1, 5, 2, 2), torch.zeros(1, 2, 2, 2)
    output_4d[0, 2] = 50.0  # all cells: background, surely
    output_4d[0, 2:, 0, 0] = torch.tensor([0.0, 50.0, 0.0])  # but the keypoint's own: class 1, surely
    for beside, by_hand in (((50, 0, 0), 0), ((0, 50, 0), 0), ((50, 50, 0), 0), ((0, 0, 0), np.log(1.5)), ((0, 0, 50), 50 - np.log(2))):
        output_4d[0, 2:, 0, 1] = torch.tensor(beside)
        location, confidence = train.detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
        assert location == 0 and confidence.item() == pytest.approx(by_hand, abs=1e-5)
    output_4d[0, 0, 0, 1] = 0.5
    assert train.detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)[0].item() == pytest.approx(0.5 if train.LOCATION_LOSS == "L1" else 0.25)


def test_a_grid_with_fewer_cells_than_hard_negatives_is_no_problem(monkeypatch):
    monkeypatch.setattr(train, "HARD_NEGATIVES", 1000)
    output_4d, gt_offset_4d, gt_class_id_3d = random_case()
    _, confidence = train.detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
    share_4d = output_4d[:, 2:].softmax(dim=1)
    right_3d = share_4d.gather(1, gt_class_id_3d.abs()[:, None])[:, 0] + share_4d[:, 0] * (gt_class_id_3d < 0)
    assert confidence.item() == pytest.approx(-right_3d.log().sum().item() / len(output_4d), rel=1e-5)


def test_the_gradients_of_two_half_batches_add_up_to_those_of_the_whole():
    torch.manual_seed(0)
    network = model.KeypointNet(3).eval()  # BN in training mode sees only half of a half batch
    images_4d = torch.randint(0, 256, (4, 3, 128, 128)).float()
    _, gt_offset_4d, gt_class_id_3d = random_case()

    def gradients(parts):
        network.zero_grad()
        for part in torch.arange(4).split(4 // parts):
            location, confidence = train.detection_loss(network(images_4d[part]), gt_offset_4d[part], gt_class_id_3d[part])
            ((location + train.U * confidence) / parts).backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    whole, halves = gradients(1), gradients(2)
    assert whole.abs().max() > 1e-4 and (whole - halves).abs().max() <= 1e-5 * whole.abs().max()


def test_the_loop_accumulates_the_gradients_of_the_whole_batch_and_forgets_them_after_each_update(small_training, own, tmp_path, monkeypatch):
    def gradients(steps_per_update):
        """The gradients at two updates, when each sees the same four crops in one step or in two."""
        gradient_list = []

        class Spy(torch.optim.AdamW):
            def step(self, *arguments, **options):
                gradient_list.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))

        def make_batch(self, step):
            part = slice(None) if steps_per_update == 1 else slice(0, 2) if step % 2 == 0 else slice(2, 4)
            return tuple(array[part] for array in batch)
        with monkeypatch.context() as changed:
            changed.setattr(train, "BATCH", 4)
            batch = make_loader(data=dots(height=96, width=64)).make_batch(0)
            changed.setattr(train, "STEPS_PER_UPDATE", steps_per_update)
            changed.setattr(train.Loader, "make_batch", make_batch)
            changed.setattr(train, "augment", lambda images_4d, *rest: images_4d)
            changed.setattr(model.KeypointNet, "train", lambda self, mode=True: torch.nn.Module.train(self, False))  # BN as in use
            changed.setattr(torch.optim, "AdamW", Spy)
            run(changed, data, 2)
        return gradient_list
    data = copy_of(own, tmp_path)
    whole, halves = gradients(1), gradients(2)
    assert len(whole) == len(halves) == 2 and whole[0].abs().max() > 1e-4
    for gradient in (whole[1], *halves):
        assert (gradient - whole[0]).abs().max() <= 1e-5 * whole[0].abs().max()


# ---------------------------------------------------------------- runs

def test_the_learning_rate_is_halved_by_plan(small_training, own, tmp_path, monkeypatch):
    rate_list = []

    class Spy(torch.optim.AdamW):
        def step(self, *arguments, **options):
            rate_list.append(self.param_groups[0]["lr"])
            return super().step(*arguments, **options)
    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    run(monkeypatch, copy_of(own, tmp_path), 12)
    assert len(rate_list) == 12 and rate_list[0] == train.LEARNING_RATE
    assert all(later == earlier or later <= earlier / 2 for earlier, later in zip(rate_list, rate_list[1:]))
    assert rate_list[-1] == pytest.approx(train.LEARNING_RATE * 0.5 ** train.HALVINGS)


def test_the_average_forgets_the_start_at_once_and_moves_slowly_later(small_training):
    network, average = model.KeypointNet(3), model.KeypointNet(3)

    def share_left(update):
        """How much of the way from 0 to the network's 1 the average has left after one more update."""
        for now, mean in zip(network.state_dict().values(), average.state_dict().values()):
            now.fill_(1)
            mean.fill_(0)
        train.update_average(average, network, update)
        left_list = [1 - mean.double().mean().item() for name, mean in average.state_dict().items() if "num_batches" not in name]
        assert max(left_list) - min(left_list) < 1e-6 and any("running_var" in name for name in average.state_dict())
        return left_list[0]
    assert share_left(0) < 0.5 and 0.9 < share_left(100_000) < 1


def copy_of(own, tmp_path):
    """The data set without weights, in a folder that a test may write to."""
    data = tmp_path / "data"
    data.mkdir()
    for path in own.iterdir():
        if path.suffix in (".json", ".npy"):
            (data / path.name).write_bytes(path.read_bytes())
    return data


def run(monkeypatch, data, updates, *arguments):
    code, sentence = call_main(train, monkeypatch, "--data", data, "--updates", updates, *arguments)
    assert (code, sentence) == (0, "")
    return torch.load(data / "checkpoint.pt", weights_only=True)


def test_a_tiny_run_learns_its_pictures_by_heart(small_training, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "LAYER_LIST", [(k, s, p, 24) for k, s, p, _ in model.LAYER_LIST])
    monkeypatch.setattr(train, "BATCH", 8)
    monkeypatch.setattr(train, "WARP_SHARE", 0)
    monkeypatch.setattr(train, "SAVE_EVERY", 10)
    data = tmp_path / "data"
    data.mkdir()
    images_4d_array, label_2d_array = dots(4, 96, 96, margin=20)
    for split in ("train", "test"):
        np.save(data / f"{split}_images.npy", images_4d_array)
        np.save(data / f"{split}_labels.npy", label_2d_array)
    names = {"file_list": list("abcd"), "size_list": [[96, 96]] * 4}
    (data / "dataset.json").write_text(json.dumps({"source": "dots", "category_list": ["background", "a", "b"], "height": 96, "width": 96,
                                                   "box_size": [30, 30], "max_per_class": 1, "train": names, "test": names}))
    test_curve = run(monkeypatch, data, 100)["test_curve"]
    first, last = (sum(row[1:]) for row in (test_curve[0], test_curve[-1]))
    assert np.isfinite(last) and last < first / 2
    assert (data / "results" / "loss.png").stat().st_size > 5000


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    weights_list = []
    for seed in (0, 0, 1):
        run(monkeypatch, data, 3, "--seed", seed)
        network = torch.load(data / "weights.pt", weights_only=True)["network"]
        weights_list.append(torch.cat([value.flatten().double() for value in network.values()]))
    assert torch.equal(weights_list[0], weights_list[1]) and not torch.equal(weights_list[0], weights_list[2])


def test_trained_weights_load_and_know_their_data_set(small_training, own, tmp_path, monkeypatch):
    data = copy_of(own, tmp_path)
    run(monkeypatch, data, 2, "--mirror")
    network, about_dict = model.load_weights(data / "weights.pt")
    dataset_dict = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    assert about_dict["category_list"] == dataset_dict["category_list"] == ["background", "left eye", "right eye"]
    assert about_dict["box_size"] == dataset_dict["box_size"] and about_dict["max_per_class"] == dataset_dict["max_per_class"]
    assert isinstance(model.find_keypoints(network, about_dict, np.zeros((96, 64, 3), np.uint8)), list)


def test_the_loader_thread_has_ended_when_training_has(small_training, own, tmp_path, monkeypatch):
    run(monkeypatch, copy_of(own, tmp_path), 2)
    assert not any(isinstance(thread, train.Loader) for thread in threading.enumerate())


@pytest.mark.parametrize("arguments", [["--updates", "0"], ["--seed", "-1"], ["--updates", "ten"]])
def test_a_wrong_flag_ends_with_code_2(tmp_path, monkeypatch, arguments):
    assert call_main(train, monkeypatch, "--data", tmp_path, *arguments)[0] == 2
