"""Lesson 3: training. A loader thread with a queue, the loss, and the loop with an update at every second step.

    python 03_train.py                  # on a fresh clone it draws the data set first
    python 03_train.py --data my_data   # on what 01_prepare_data.py --source ... --data my_data made
    python 03_train.py --resume         # goes on where a stopped run was

Reads   data/dataset.json and data/{train,test}_{images,labels}.npy.
Writes  data/weights.pt (to predict with), data/checkpoint.pt (for --resume), data/results/loss.png; what an earlier run left
        of the first two is kept as data/weights.old.pt and data/checkpoint.old.pt.
Time    six to seven minutes on two CPU cores, and a minute for drawing.
See     a loss that falls from about 4.6 to 0.1; both of its parts fall, on the test split too.
Next    python 04_evaluate.py says how good the result is.

Words: a step is one forward and backward pass over one batch; an update changes the weights and follows every second step;
an epoch is as many crops as the training split has pictures.
"""

import argparse
import importlib
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from common import CELL, DATA_FOLDER, Progress, UserError, pick_device, read_data_set, replacing, run_main

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

UPDATES = 17000  # changes of the weights; set in updates, not epochs, so that 100 pictures are learned as long as 1,000
STEPS_PER_UPDATE = 2  # gradients of two steps add up before an update: a batch of 32 with the memory of 16
BATCH = 16  # crops a step
CROP = 128  # px; side of the squares that are cut out for training; the network is convolutional, so any size will do
KEYPOINT_SHARE = 0.75  # of the crops lie round a keypoint; the others lie anywhere: most of a picture is background
QUEUE_SIZE = 8  # batches; enough to bridge a slow one, and few megabytes
LEARNING_RATE = 3e-3  # at the start
HALVINGS = 4  # of the learning rate, evenly over the run
WEIGHT_DECAY = 1e-3  # pulls weights towards zero, a little
LOCATION_LOSS = "L1"  # or "MSE": |error|, or its square, which cares little once errors are small
U = 1.0  # weight of the confidence loss against the location loss
HARD_NEGATIVES = 6  # background cells a crop that count in the confidence loss: those with the largest loss
AVERAGE_DECAY = 0.998  # of the moving average of the weights, per update: it looks back over the last 500
LIGHT, CONTRAST, COLOUR = 0.25, 0.25, 0.08  # largest random change, as a share
NOISE, BLUR = 8.0, 1.0  # largest random noise (grey levels of 255) and share of a 3x3 mean
TURN, ZOOM = 20.0, 0.25  # a warped crop is turned by up to so many degrees and zoomed by up to such a share
WARP_SHARE, WARP_PICTURES = 1.0, 100  # of the crops are warped: all, but at most 100 / pictures (of 1,000: one in ten)
SAVE_EVERY = 500  # updates between two checkpoints and two test losses


# ---------------------------------------------------------------- the loader thread

class Loader(threading.Thread):
    """Cuts crops out of the pictures in a thread of its own, and hands batches over through a bounded queue.

    A Python thread helps where it waits or works outside of Python: reading the memory-mapped file, copying in numpy and
    warping in Pillow let go of the interpreter's lock, and the loop's convolutions do too. Two threads of plain Python
    arithmetic would just take turns. `put` sleeps while the queue is full and `get` while it is empty: nobody polls.

    Batch number i depends on (seed, i) alone, so a resumed run gets the batches that an uninterrupted one would have got.
    Iterating gives (images uint8 `[N, crop, crop, 3]`, gt_offset float32 `[N, 2, 4, 4]`, gt_class_id int64 `[N, 4, 4]`).
    """

    def __init__(self, images_4d_array, label_2d_array, first_step: int, last_step: int, seed: int, mirror: bool):
        super().__init__(daemon=True)  # daemon: if the program ends by an error, this thread does not keep it alive
        self.images_4d_array, self.label_2d_array = images_4d_array, label_2d_array
        self.first_step, self.last_step, self.seed, self.mirror = first_step, last_step, seed, mirror
        height, width = images_4d_array.shape[1:3]
        self.crop_height, self.crop_width = min(CROP, height), min(CROP, width)
        # Few pictures show few poses, so more must be made up; many show them themselves, and warping costs time.
        self.warp_share = min(WARP_SHARE, WARP_PICTURES / len(images_4d_array))
        # Labels are sorted by picture: those of picture i are rows first_row[i] to first_row[i + 1].
        self.first_row = np.searchsorted(label_2d_array[:, 0], np.arange(len(images_4d_array) + 1))
        self.queue = queue.Queue(maxsize=QUEUE_SIZE)
        self.stopping = threading.Event()

    def run(self) -> None:
        """What the thread does. An error travels through the queue, or the loop would wait for ever for a dead thread."""
        try:
            for step in range(self.first_step, self.last_step):
                if self.stopping.is_set():
                    return
                self.queue.put(self.make_batch(step))
            self.queue.put(None)  # the end
        except BaseException as error:
            self.queue.put(error)

    def __iter__(self):
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        """End the thread. It may be sleeping in `put`: emptying the queue wakes it, and then it sees that it should stop."""
        self.stopping.set()
        while self.is_alive():
            try:
                self.queue.get(timeout=0.05)
            except queue.Empty:
                pass

    def make_batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, step])
        crops_4d_array = np.empty((BATCH, self.crop_height, self.crop_width, 3), np.uint8)
        label_list = []
        for index in range(BATCH):
            crops_4d_array[index], label_2d_array = self.make_crop(rng)
            label_2d_array[:, 0] = index
            label_list.append(label_2d_array)
        rows, columns = self.crop_height // CELL, self.crop_width // CELL
        return crops_4d_array, *model.match(np.concatenate(label_list), BATCH, rows, columns)

    def make_crop(self, rng) -> tuple[np.ndarray, np.ndarray]:
        """One crop and its labels (x, y from the crop's corner)."""
        height, width = self.images_4d_array.shape[1:3]
        if len(self.label_2d_array) and rng.random() < KEYPOINT_SHARE:  # a keypoint anywhere in the crop, its border too
            picture, _, x, y = self.label_2d_array[rng.integers(len(self.label_2d_array))]
            picture = int(picture)
            left, top = x - rng.uniform(0, self.crop_width), y - rng.uniform(0, self.crop_height)
        else:
            picture = int(rng.integers(len(self.images_4d_array)))
            left, top = rng.uniform(0, width - self.crop_width + 1), rng.uniform(0, height - self.crop_height + 1)
        left = int(np.clip(left, 0, width - self.crop_width))
        top = int(np.clip(top, 0, height - self.crop_height))
        crop_3d_array = self.images_4d_array[picture, top:top + self.crop_height, left:left + self.crop_width]
        label_2d_array = self.label_2d_array[self.first_row[picture]:self.first_row[picture + 1]].copy()
        label_2d_array[:, 2:] -= left, top
        if rng.random() < self.warp_share:
            crop_3d_array, label_2d_array = self.warp(rng, picture, left, top, label_2d_array)
        if self.mirror:
            crop_3d_array, label_2d_array = mirror_and_turn(rng, crop_3d_array, label_2d_array)
        x, y = label_2d_array[:, 2], label_2d_array[:, 3]
        inside = (0 <= x) & (x < self.crop_width) & (0 <= y) & (y < self.crop_height)
        return crop_3d_array, label_2d_array[inside]

    def warp(self, rng, picture, left, top, label_2d_array):
        """Turn and zoom a crop a little about its middle. Takes what it needs from around the crop, as far as there is any."""
        angle, zoom = np.radians(rng.uniform(-TURN, TURN)), rng.uniform(1 - ZOOM, 1 + ZOOM)
        turn_2d_array = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * zoom
        middle = np.array([self.crop_width / 2, self.crop_height / 2])
        margin = 2 * CELL  # enough for TURN and ZOOM
        region_left, region_top = max(0, left - margin), max(0, top - margin)
        region_3d_array = self.images_4d_array[picture, region_top:top + self.crop_height + margin,
                                               region_left:left + self.crop_width + margin]
        # Pillow asks where in the region an output pixel comes from: the inverse of where a keypoint goes.
        inverse_2d_array = np.linalg.inv(turn_2d_array)
        shift = middle - inverse_2d_array @ middle + (left - region_left, top - region_top)
        image = Image.fromarray(np.ascontiguousarray(region_3d_array)).transform(
            (self.crop_width, self.crop_height), Image.Transform.AFFINE,
            (*inverse_2d_array[0], shift[0], *inverse_2d_array[1], shift[1]), Image.Resampling.BILINEAR)
        label_2d_array[:, 2:] = (label_2d_array[:, 2:] - middle) @ turn_2d_array.T + middle
        return np.asarray(image), label_2d_array


def mirror_and_turn(rng, crop_3d_array, label_2d_array):
    """Mirror and quarter-turn a crop at random, labels too. Mirroring is x -> W - x: pixel c covers [c, c + 1)."""
    height, width = crop_3d_array.shape[:2]
    x, y = label_2d_array[:, 2].copy(), label_2d_array[:, 3].copy()
    if rng.random() < 0.5:
        crop_3d_array, x = crop_3d_array[:, ::-1], width - x
    if rng.random() < 0.5:
        crop_3d_array, y = crop_3d_array[::-1], height - y
    if height == width and rng.random() < 0.5:  # with the two mirrors before, swapping x and y gives all eight positions
        crop_3d_array, x, y = crop_3d_array.transpose(1, 0, 2), y, x
    label_2d_array[:, 2], label_2d_array[:, 3] = x, y
    return crop_3d_array, label_2d_array


# ---------------------------------------------------------------- changes of light, on the device, a whole batch at once

def augment(images_4d: torch.Tensor, generator: torch.Generator, noise_1d: torch.Tensor) -> torch.Tensor:
    """Random light, contrast, colour, focus and noise, in place, for float images `[N, 3, H, W]`, 0 to 255.

    noise_1d: a long strip of normal random numbers, of which each batch takes another stretch: to draw fresh ones for
    every pixel takes longer than the network does.
    """
    count, _, height, width = images_4d.shape

    def uniform(low, high, channels=1):
        number_4d = torch.rand(count, channels, 1, 1, generator=generator, device=images_4d.device)
        return number_4d * (high - low) + low  # [N, 1, 1, 1]

    # mul_ and its like work in place: no new 3 MB for every line, whose memory would cost more than the arithmetic.
    # A factor a colour, written out along a row: multiplying three numbers at a time is slow on a CPU, a row is quick.
    colour_4d = uniform(1 - COLOUR, 1 + COLOUR, channels=3).expand(-1, -1, -1, width)  # [N, 3, 1, 128]
    images_4d.mul_(colour_4d.contiguous(memory_format=torch.channels_last))
    # new = mean * light + (old - mean) * contrast
    mean_4d = images_4d.mean(dim=(1, 2, 3), keepdim=True)  # [N, 1, 1, 1]
    contrast_4d = uniform(1 - CONTRAST, 1 + CONTRAST)
    images_4d.mul_(contrast_4d).add_(mean_4d * (uniform(1 - LIGHT, 1 + LIGHT) - contrast_4d))
    # Focus: mixed with its own 3x3 mean. groups=3: each colour is averaged by itself.
    mean_kernel_4d = torch.full((3, 1, 3, 3), 1 / 9, device=images_4d.device)
    blurred_4d = nn.functional.conv2d(images_4d, mean_kernel_4d, groups=3)  # [N, 3, 126, 126]: the border stays sharp
    images_4d[:, :, 1:-1, 1:-1].lerp_(blurred_4d, uniform(0, BLUR))
    first = int(torch.randint(len(noise_1d) - images_4d.numel(), (1,), generator=generator, device=images_4d.device))
    noise_4d = noise_1d[first:first + images_4d.numel()].view(count, height, width, 3).permute(0, 3, 1, 2)
    return images_4d.addcmul_(noise_4d, uniform(0, NOISE)).clamp_(0, 255)


# ---------------------------------------------------------------- the loss

def detection_loss(output_4d, gt_offset_4d, gt_class_id_3d):
    """Location and confidence loss, each a mean over pictures: summed over a picture's own cells, divided by N.

    output_4d `[N, 5, 4, 4]`, offsets in half cells; gt_offset_4d `[N, 2, 4, 4]` in px; gt_class_id_3d `[N, 4, 4]`.
    As a mean over pictures, the mean of two half batches' losses is the loss of the whole batch: divided by STEPS_PER_UPDATE,
    accumulated gradients are those of the whole (but BN has seen two halves).
    """
    count = len(output_4d)
    # Location: the cells that hold a keypoint (class id above 0) or lie beside one (below 0), picked by a boolean mask.
    has_offset_3d = gt_class_id_3d != 0  # [N, 4, 4]
    error_4d = output_4d[:, :2] - gt_offset_4d / model.OFFSET_UNIT  # [N, 2, 4, 4]
    error_4d = error_4d.abs() if LOCATION_LOSS == "L1" else error_4d.square()
    location = (error_4d * has_offset_3d[:, None]).sum() / count
    # Confidence: cross_entropy takes scores [N, C, ...] before softmax and the target's class ids [N, ...].
    score_4d = output_4d[:, 2:]  # [N, 3, 4, 4]
    cell_loss_3d = nn.functional.cross_entropy(score_4d, gt_class_id_3d.abs(), reduction="none")  # [N, 4, 4]
    # Beside a keypoint background and its class are both right, so their shares are added; only another class is wrong.
    background_loss_3d = nn.functional.cross_entropy(score_4d, torch.zeros_like(gt_class_id_3d), reduction="none")
    beside_loss_3d = -torch.logaddexp(-cell_loss_3d, -background_loss_3d)  # [N, 4, 4]; log(a + b) from log a and log b
    positive = (cell_loss_3d * (gt_class_id_3d > 0)).sum() + (beside_loss_3d * (gt_class_id_3d < 0)).sum()
    # Nearly all cells are background and soon easy. Only the hardest count, or they would drown the few keypoints.
    negative_2d = (cell_loss_3d * (gt_class_id_3d == 0)).flatten(start_dim=1)  # [N, 16]
    negative = negative_2d.topk(min(HARD_NEGATIVES, negative_2d.shape[1]), dim=1).values.sum()
    confidence = (positive + negative) / count
    return location, confidence


# ---------------------------------------------------------------- the training loop

def to_device(batch, device):
    """A loader's batch as tensors. Pictures travel as uint8, a quarter of float32's bytes, and become float there."""
    crops_4d_array, gt_offset_4d_array, gt_class_id_3d_array = batch
    images_4d = torch.from_numpy(crops_4d_array).to(device).permute(0, 3, 1, 2).float()  # [N, 3, 128, 128]
    return images_4d, torch.from_numpy(gt_offset_4d_array).to(device), torch.from_numpy(gt_class_id_3d_array).to(device)


@torch.no_grad()  # nothing is kept for a backward pass
def update_average(average, network, update: int) -> None:
    """Move the averaged network a little towards the one in training: weights jitter, and their mean is better than any.

    BN's running mean and variance are averaged too, since they must fit the averaged weights. At first the average looks
    back less far, or it would remember the random weights of the start.
    """
    decay = min(AVERAGE_DECAY, (update + 1) / (update + 10))
    for mean, now in zip(average.state_dict().values(), network.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)  # BN's counter of batches


@torch.no_grad()
def loss_on_test_crops(network, batch_list) -> list[float]:
    """Mean location and confidence loss of the averaged network over fixed crops of the test split."""
    loss_list = [torch.stack(detection_loss(network(images_4d), gt_offset_4d, gt_class_id_3d))
                 for images_4d, gt_offset_4d, gt_class_id_3d in batch_list]
    return torch.stack(loss_list).mean(dim=0).tolist()


def save(path: Path, content: dict) -> None:
    """Save tensors and plain values. A stop in the middle leaves the old file as it was."""
    try:
        with replacing(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch makes of a full disk
        raise UserError(f"{path}: could not be written ({str(error).splitlines()[0][:80]}); "
                        "make room on the disk, then go on with --resume") from None


def draw_curves(path: Path, train_list, test_list) -> None:
    import matplotlib
    matplotlib.use("Agg")  # draws into files; needs no screen
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for column, (name, colour) in enumerate((("location", "tab:blue"), ("confidence", "tab:orange")), start=1):
        for curve_list, split, style in ((train_list, "train", "-"), (test_list, "test", "o:")):
            curve_2d_array = np.array(curve_list).reshape(-1, 3)
            axes.plot(curve_2d_array[:, 0], curve_2d_array[:, column], style, color=colour, markersize=3,
                      alpha=0.6 if split == "train" else 1, label=f"{name}, {split}")
    axes.set(xlabel="update", ylabel="loss a crop", yscale="log", title="training loss, and test loss of the averaged weights")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def train(data_folder: Path, updates: int, seed: int, mirror: bool, resume: bool, device: torch.device) -> None:
    dataset_dict, array_dict = read_data_set(data_folder)
    category_list = dataset_dict["category_list"]
    train_images_4d_array = array_dict["train"][0]
    torch.manual_seed(seed)
    network = model.KeypointNet(len(category_list)).to(device)
    average = model.KeypointNet(len(category_list)).to(device).eval()
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    first_update, train_curve, test_curve = 0, [], []
    run_dict = {"updates": updates, "seed": seed, "mirror": mirror, "categories": category_list,
                "layers": [list(layer) for layer in model.LAYER_LIST],
                "data set": f"{dataset_dict['source']}, {len(train_images_4d_array)} pictures, {len(array_dict['train'][1])} labels",
                "settings": [STEPS_PER_UPDATE, BATCH, CROP, KEYPOINT_SHARE, LEARNING_RATE, HALVINGS, WEIGHT_DECAY, LOCATION_LOSS, U, HARD_NEGATIVES,
                             AVERAGE_DECAY, LIGHT, CONTRAST, COLOUR, NOISE, BLUR, TURN, ZOOM, WARP_SHARE, WARP_PICTURES]}
    checkpoint_path = data_folder / "checkpoint.pt"
    if resume:
        saved_dict = load_checkpoint(checkpoint_path, run_dict)
        try:
            network.load_state_dict(saved_dict["network"])
            average.load_state_dict(saved_dict["average"])
            optimizer.load_state_dict(saved_dict["optimizer"])
        except Exception as error:  # damaged bytes can raise nearly anything
            raise UserError(f"{checkpoint_path}: damaged ({type(error).__name__}); train without --resume") from None
        first_update, train_curve, test_curve = saved_dict["update"], saved_dict["train_curve"], saved_dict["test_curve"]
        print(f"going on after update {first_update} of {updates}")

    test_loader = Loader(*array_dict["test"], 0, 0, seed=12345, mirror=False)  # never started: its make_batch is all we need
    test_loader.warp_share = 0.0
    test_batch_list = [to_device(test_loader.make_batch(step), device) for step in range(8)]
    steps = updates * STEPS_PER_UPDATE
    print(f"{len(train_images_4d_array)} pictures, {len(category_list) - 1} classes, {updates} updates of {STEPS_PER_UPDATE} x {BATCH} "
          f"crops = {steps * BATCH / len(train_images_4d_array):.0f} epochs, on {device}, "
          f"{sum(p.numel() for p in network.parameters()):,} parameters")

    def save_all(update: int) -> None:
        if not resume and not test_curve[1:]:  # the first save of a new run: what an earlier one has learned is kept
            for path in (data_folder / "weights.pt", checkpoint_path):
                if path.is_file():
                    with replacing(path.with_suffix(".old.pt")) as temporary:
                        shutil.copyfile(path, temporary)
        save(data_folder / "weights.pt", {
            "network": average.state_dict(), "category_list": category_list, "box_size": dataset_dict["box_size"],
            "max_per_class": dataset_dict["max_per_class"]})
        save(checkpoint_path, {
            "network": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
            "update": update, "train_curve": train_curve, "test_curve": test_curve, "run": run_dict})

    # Ctrl-C and a polite kill set a flag; the loop looks at it after each update, saves, and ends.
    stop_signal_list = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signal_number, frame: stop_signal_list.append(signal_number))

    generator = torch.Generator(device).manual_seed(seed)
    noise_1d = torch.randn(2 * BATCH * CROP * CROP * 3, generator=generator, device=device)
    loader = Loader(*array_dict["train"], first_update * STEPS_PER_UPDATE, steps, seed, mirror)
    loader.start()
    batches = iter(loader)
    progress = Progress(updates, "training", first_update)
    loss_sum = torch.zeros(2, device=device)  # stays on the device: fetching it at every step would make a GPU wait
    wait_seconds, mark_time, mark_update = 0.0, time.perf_counter(), first_update
    network.train()
    try:
        for update in range(first_update, updates):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 ** (update * (HALVINGS + 1) // updates)
            optimizer.zero_grad()  # forget the gradients of the last update; backward adds to what it finds
            for step in range(update * STEPS_PER_UPDATE, (update + 1) * STEPS_PER_UPDATE):
                start_time = time.perf_counter()
                batch = next(batches)
                wait_seconds += time.perf_counter() - start_time
                images_4d, gt_offset_4d, gt_class_id_3d = to_device(batch, device)
                generator.manual_seed(seed * 1_000_003 + step)  # like the loader: the step alone decides
                output_4d = network(augment(images_4d, generator, noise_1d))  # [16, 5, 4, 4]
                location, confidence = detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
                # Divided by the number of steps, so that the accumulated gradient is the mean, not the sum.
                ((location + U * confidence) / STEPS_PER_UPDATE).backward()
                loss_sum += torch.stack((location.detach(), confidence.detach()))
            optimizer.step()
            update_average(average, network, update)

            done = update + 1
            if done % 50 == 0 or done == updates or stop_signal_list:
                step_count = (done - mark_update) * STEPS_PER_UPDATE
                location_mean, confidence_mean = (loss_sum / step_count).tolist()
                loss_mean = location_mean + U * confidence_mean
                if not np.isfinite(loss_mean):
                    raise UserError(f"the loss is {loss_mean} at update {done}; the weights saved before are untouched; "
                                    "look at the labels in results/contact_sheet.png, or lower LEARNING_RATE in 03_train.py")
                train_curve.append([done, location_mean, confidence_mean])
                milliseconds = (time.perf_counter() - mark_time) / step_count * 1e3
                progress.show(done, f"epoch {done * STEPS_PER_UPDATE * BATCH / len(train_images_4d_array):5.1f}  "
                                    f"loss {loss_mean:6.4f} = {location_mean:6.4f} + {U:g} x {confidence_mean:6.4f}  "
                                    f"lr {optimizer.param_groups[0]['lr']:.1e}  "
                                    f"{milliseconds:4.1f} ms a step, {wait_seconds / step_count * 1e3:.1f} waiting")
                loss_sum.zero_()
                wait_seconds, mark_time, mark_update = 0.0, time.perf_counter(), done
            if done % SAVE_EVERY == 0 or done == updates or stop_signal_list:
                test_curve.append([done, *loss_on_test_crops(average, test_batch_list)])
                if not np.isfinite(test_curve[-1]).all():
                    raise UserError(f"the test loss is nan at update {done}; the weights saved before are untouched; "
                                    "lower LEARNING_RATE in 03_train.py")
                save_all(done)
            if stop_signal_list:
                print(f"\nstopped after update {done}; weights and checkpoint are saved: go on with --resume")
                sys.exit(128 + stop_signal_list[0])
    finally:
        loader.stop()
    seconds = time.perf_counter() - progress.start_time
    crops = (updates - first_update) * STEPS_PER_UPDATE * BATCH
    work = 3 * model.multiply_adds(loader.crop_height, loader.crop_width, len(category_list)) * crops
    print(f"{crops} crops in {seconds:.0f} s: {work / seconds / 1e9:.0f} billion multiply-adds a second")
    draw_curves(data_folder / "results" / "loss.png", train_curve, test_curve)
    print(f"test loss {test_curve[-1][1] + U * test_curve[-1][2]:.4f} = {test_curve[-1][1]:.4f} + {U:g} x {test_curve[-1][2]:.4f}; "
          f"wrote {data_folder / 'weights.pt'} and {data_folder / 'results' / 'loss.png'}")


def load_checkpoint(path: Path, run_dict: dict) -> dict:
    """Load what --resume needs; refuses a checkpoint of another run."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, so there is nothing to resume; train without --resume")
    try:
        saved_dict = torch.load(path, weights_only=True)
        for key in ("network", "average", "optimizer", "update", "train_curve", "test_curve"):
            saved_dict[key]  # a KeyError here, rather than later
        saved_run_dict = dict(saved_dict["run"])
    except Exception as error:
        raise UserError(f"{path}: not a checkpoint ({type(error).__name__}); train without --resume") from None
    for key, value in run_dict.items():
        if saved_run_dict.get(key) != value:
            raise UserError(f"{path}: was made with {key} = {saved_run_dict.get(key)}, this run has {value}; "
                            "give the same options, or train without --resume")
    return saved_dict


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the network.")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER, help="folder with what 01_prepare_data.py made (default: data)")
    parser.add_argument("--updates", type=int, default=UPDATES, help="changes of the weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, crops and changes of light (default: %(default)s)")
    parser.add_argument("--mirror", action="store_true",
                        help="mirror and quarter-turn crops: for classes that mean the same then (default: off)")
    parser.add_argument("--resume", action="store_true", help="go on where a stopped run was (default: start anew)")
    options = parser.parse_args()
    if options.updates < 1 or not 0 <= options.seed < 2 ** 32:
        parser.error("--updates must be at least 1 and --seed at least 0 and below 2**32")
    if not (options.data / "dataset.json").is_file():
        print(f"{options.data} holds no data set yet; starting 01_prepare_data.py to draw one", flush=True)
        script = Path(__file__).resolve().parent / "01_prepare_data.py"
        if subprocess.run([sys.executable, str(script), "--data", str(options.data)]).returncode:
            raise UserError("01_prepare_data.py did not end well; its own message stands above")
    train(options.data, options.updates, options.seed, options.mirror, options.resume, pick_device())
    suffix = "" if options.data == DATA_FOLDER else f" --data {options.data}"
    print(f"next: python 04_evaluate.py{suffix}")


if __name__ == "__main__":
    run_main(main)
