"""Lesson 3: training. A loader thread with a queue, the loss, and the loop with its updates.

    python 03_train.py                  # on a fresh clone it draws the data set first
    python 03_train.py --data my_data   # on what 01_prepare_data.py --source made of yours
    python 03_train.py --resume         # goes on where a stopped run was

Reads   data/dataset.json and the arrays that 01_prepare_data.py wrote.
Writes  data/weights.pt (to predict with; an earlier run's is kept as weights.old.pt),
        data/checkpoint.pt (for --resume), and in data/results: train_crops.png (what the network
        learns from), loss.png, hard_negatives.png (background that still costs).
Time    three to six minutes on two CPU cores.
See     a loss that falls; both of its parts fall, on the validation split too.
Next    python 04_evaluate.py --split val says how good the result is.

Words: a step is one forward and backward pass over one batch; an update changes the weights after
every STEPS_PER_UPDATE steps.
"""

import copy
import functools
import importlib
import queue
import shutil
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from common import (CELL, DATA_FOLDER, UserError, command, make_parser, read_data_set, replacing,
                    run_main, run_script)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

UPDATES = 5000  # changes of the weights, however many images there are
STEPS_PER_UPDATE = 2  # their gradients add up: a batch of 32 with the memory of 16
BATCH = 16  # crops a step
# A cell sees 142 px: in a crop every cell sees some of the zero padding, in a whole image only
# those at its rim do. Larger crops were worse for the same work (docs/experiments.md).
CROP = 128  # px; side of the squares that are cut out for training
KEYPOINT_SHARE = 0.75  # of the crops lie round a keypoint, the others anywhere
QUEUE_SIZE = 8  # batches; enough to bridge a slow one, and few megabytes
LEARNING_RATE = 6e-3  # the largest
WARM_UP = 0.025  # share of the run in which the learning rate rises from 0
HALVINGS = 2  # of the learning rate, evenly over the run
U = 0.15  # loss = location + U x confidence
HARD_NEGATIVES = 6  # background cells a crop that count: those with the largest loss
AVERAGE_DECAY = 0.998  # of the weights' moving average (EMA): it looks back over 500 updates
LIGHT, CONTRAST, COLOUR = 0.25, 0.25, 0.08  # largest random change: 0.25 is 25 %
NOISE, BLUR = 8.0, 1.0  # grey levels; 1.0 replaces each pixel by the mean of 3x3
TURN, ZOOM = 20.0, 0.25  # a warp turns by up to 20 degrees and zooms by 0.75 to 1.25
WARP_IMAGES = 100  # 100 / images is the share of warped crops: few images need variety more
SHOW_EVERY, SAVE_EVERY = 50, 500  # updates between two progress lines, two checkpoints


# ---------------------------------------------------------------- crops and the loader thread

def make_batch(images_4d_array, label_2d_array, seed: int, step: int, mirror: bool = False,
               warp_share: float = 0.0):
    """Batch number `step`: crops, uint8 `[N, 128, 128, 3]`, and what match makes of their labels.

    It depends on (seed, step) alone, so a resumed run gets the same batches.
    """
    rng = np.random.default_rng([seed, step])
    height, width = (min(CROP, side) for side in images_4d_array.shape[1:3])
    crop_list, label_list = [], []
    for index in range(BATCH):
        crop_3d_array, own_2d_array = make_crop(
            images_4d_array, label_2d_array, height, width, rng, warp_share)
        if mirror:
            crop_3d_array, own_2d_array[:, 2:] = mirror_and_turn(
                rng, crop_3d_array, own_2d_array[:, 2:])
        own_2d_array[:, 0] = index
        crop_list.append(crop_3d_array)
        label_list.append(own_2d_array)
    targets = model.match(np.concatenate(label_list), BATCH, height // CELL, width // CELL)
    return np.array(crop_list), *targets


def make_crop(images_4d_array, label_2d_array, height: int, width: int, rng, warp_share: float):
    """A crop `[height, width, 3]` and its image's labels, x and y from the crop's corner.

    Labels outside of the crop stay: one just outside teaches the cells along the rim.
    """
    rows, columns = images_4d_array.shape[1:3]
    # Of 600 cells one or two hold a keypoint: crops from anywhere would show too few of them.
    if len(label_2d_array) and rng.random() < KEYPOINT_SHARE:
        index, _, x, y = label_2d_array[rng.integers(len(label_2d_array))]
        left, top = x - rng.uniform(0, width), y - rng.uniform(0, height)
    else:
        index = rng.integers(len(images_4d_array))
        left, top = rng.uniform(0, columns - width + 1), rng.uniform(0, rows - height + 1)
    left, top = int(np.clip(left, 0, columns - width)), int(np.clip(top, 0, rows - height))
    image_3d_array = images_4d_array[int(index)]  # [1920, 320, 3]; still on the disk
    own_2d_array = label_2d_array[label_2d_array[:, 0] == index]  # a copy
    if rng.random() < warp_share:
        crop_3d_array, own_2d_array[:, 2:] = warp(
            rng, image_3d_array, left, top, height, width, own_2d_array[:, 2:])
    else:
        crop_3d_array = image_3d_array[top:top + height, left:left + width]
        own_2d_array[:, 2:] -= left, top
    return crop_3d_array, own_2d_array


def warp(rng, image_3d_array, left, top, height, width, place_2d_array):
    """A crop of the image, turned and zoomed about its middle; its places `[M, 2]` move along.

    Places go forward: new = forward (old - middle) + half. For pixels Pillow asks backward, where
    each new one comes from: old = backward (new - half) + middle. Beyond the image it is black.
    """
    angle, zoom = np.radians(rng.uniform(-TURN, TURN)), rng.uniform(1 - ZOOM, 1 + ZOOM)
    forward_2d_array = zoom * np.array([[np.cos(angle), -np.sin(angle)],
                                        [np.sin(angle), np.cos(angle)]])
    backward_2d_array = np.linalg.inv(forward_2d_array)
    half = np.array([width / 2, height / 2])
    middle = half + (left, top)
    place_2d_array = (place_2d_array - middle) @ forward_2d_array.T + half
    # Pillow gets the crop and two cells round it: to copy the whole image would take too long.
    x, y = max(0, left - 2 * CELL), max(0, top - 2 * CELL)
    part_3d_array = image_3d_array[y:top + height + 2 * CELL, x:left + width + 2 * CELL]
    shift_x, shift_y = middle - (x, y) - backward_2d_array @ half
    image = Image.fromarray(np.ascontiguousarray(part_3d_array)).transform(
        (width, height), Image.Transform.AFFINE,
        (*backward_2d_array[0], shift_x, *backward_2d_array[1], shift_y), Image.Resampling.BILINEAR)
    return np.asarray(image), place_2d_array


def mirror_and_turn(rng, crop_3d_array, place_2d_array):
    """Mirror and quarter-turn a crop at random, places `[M, 2]` too. Mirroring is x -> W - x."""
    height, width = crop_3d_array.shape[:2]
    x, y = place_2d_array.T
    if rng.random() < 0.5:
        crop_3d_array, x = crop_3d_array[:, ::-1], width - x
    if rng.random() < 0.5:
        crop_3d_array, y = crop_3d_array[::-1], height - y
    if height == width and rng.random() < 0.5:  # swapping x and y gives all eight positions
        crop_3d_array, x, y = crop_3d_array.transpose(1, 0, 2), y, x
    return crop_3d_array, np.stack((x, y), axis=1)


class Loader(threading.Thread):
    """Makes batches in a thread of its own, and hands them over in a queue.

    A thread helps where it waits or works outside of Python: reading the mapped file, copying in
    numpy and warping in Pillow let go of Python's lock (GIL), and the loop's convolutions do too.
    """

    def __init__(self, make, steps):
        super().__init__(daemon=True)  # daemon: the program may end though this thread runs
        self.make, self.steps = make, steps
        # Bounded: `put` sleeps while it is full, `get` while it is empty, and memory stays flat.
        self.queue = queue.Queue(maxsize=QUEUE_SIZE)
        self.wait_seconds = 0.0  # how long the loop has waited for batches

    def run(self) -> None:
        """What the thread does, from start() on."""
        try:
            for step in self.steps:
                self.queue.put(self.make(step))
        except BaseException as error:  # through the queue: otherwise the loop would wait for ever
            self.queue.put(error)

    def next_batch(self):
        start_time = time.perf_counter()
        item = self.queue.get()
        self.wait_seconds += time.perf_counter() - start_time
        if isinstance(item, BaseException):
            raise item
        return item


# ---------------------------------------------------------------- on the device: images and loss

def to_device(batch, device):
    """A batch as tensors on the device. Images travel as uint8, a quarter of float32's bytes."""
    images_4d, gt_offset_4d, gt_class_id_3d = (torch.from_numpy(a).to(device) for a in batch)
    images_4d = images_4d.permute(0, 3, 1, 2).float()  # [16, 3, 128, 128]
    return images_4d, gt_offset_4d, gt_class_id_3d


def augment(images_4d: torch.Tensor, noise_1d: torch.Tensor, generator) -> torch.Tensor:
    """Random colour, light, contrast, focus and noise for `[N, 3, H, W]`, float, 0 to 255.

    In place (*=, +=, a name that ends in _): new memory for each change would double its time.
    """
    count, _, height, width = images_4d.shape
    random_dict = {"generator": generator, "device": images_4d.device}

    def uniform(low, high, channels=1):  # [16, 1, 1, 1]
        return low + (high - low) * torch.rand((count, channels, 1, 1), **random_dict)

    images_4d *= uniform(1 - COLOUR, 1 + COLOUR, channels=3)
    mean_4d = images_4d.mean(dim=(1, 2, 3), keepdim=True)  # [16, 1, 1, 1]
    contrast_4d = uniform(1 - CONTRAST, 1 + CONTRAST)
    images_4d *= contrast_4d  # round 0; the next line sets the mean to a random share of the old
    images_4d += mean_4d * (uniform(1 - LIGHT, 1 + LIGHT) - contrast_4d)
    kernel_4d = torch.full((3, 1, 3, 3), 1 / 9, device=images_4d.device)  # the mean of 3x3
    blurred_4d = nn.functional.conv2d(images_4d, kernel_4d, groups=3)  # each colour by itself
    images_4d[:, :, 1:-1, 1:-1].lerp_(blurred_4d, uniform(0, BLUR))
    # A random stretch of a long strip: fresh numbers for every pixel take a tenth of the step.
    first = torch.randint(len(noise_1d) - images_4d.numel(), (1,), **random_dict).item()
    noise_4d = noise_1d[first:first + images_4d.numel()].view(count, height, width, 3)
    images_4d.addcmul_(noise_4d.permute(0, 3, 1, 2), uniform(0, NOISE))
    return images_4d.clamp_(0, 255)


def detection_loss(output_4d, gt_offset_4d, gt_class_id_3d):
    """Location and confidence loss, each summed over an image's cells, then the mean of images.

    output_4d `[N, 5, 4, 4]`, offsets in half cells; gt_offset_4d `[N, 2, 4, 4]` in px;
    gt_class_id_3d `[N, 4, 4]`. The mean of two half batches' losses is the whole batch's, and so
    are the gradients. Only BN differs: it sees each half by itself.
    """
    is_positive_3d = gt_class_id_3d > 0  # [N, 4, 4], bool
    error_4d = (output_4d[:, :2] - gt_offset_4d / model.OFFSET_UNIT).abs()  # [N, 2, 4, 4], L1
    location = (error_4d * is_positive_3d[:, None]).sum() / len(output_4d)
    # cross_entropy takes scores [N, C, ...] before softmax and class ids [N, ...]. An untrained
    # network, for which all classes are alike, pays log(3) = 1.1 a cell.
    cell_loss_3d = nn.functional.cross_entropy(output_4d[:, 2:], gt_class_id_3d, reduction="none")
    positive = (cell_loss_3d * is_positive_3d).sum()
    # Nearly all cells are background and soon easy. Only the hardest of each image count (hard
    # negative mining), or they would drown the few keypoints.
    negative_2d = (cell_loss_3d * ~is_positive_3d).flatten(start_dim=1)  # [N, 16]
    hardest_2d, _ = negative_2d.topk(min(HARD_NEGATIVES, negative_2d.shape[1]), dim=1)  # [N, 6]
    confidence = (positive + hardest_2d.sum()) / len(output_4d)
    return location, confidence


# ---------------------------------------------------------------- the training loop

def train(options, device: torch.device) -> None:
    dataset_dict, array_dict = read_data_set(options.data)
    results = options.data / "results"
    results.mkdir(exist_ok=True)
    torch.manual_seed(options.seed)
    network = model.KeypointNet(len(dataset_dict["category_list"])).to(device)
    average = copy.deepcopy(network).eval()  # what is saved for use: the mean of many updates
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
    part_dict = {"network": network, "average": average, "optimizer": optimizer}
    run_dict = {"same": {"--updates": options.updates, "--seed": options.seed, "--mirror":
                         options.mirror, "labels (checksum)": zlib.crc32(array_dict["train"][1])},
                "train": [], "val": []}  # --resume needs the same; the curves of the losses
    first = load_run(options.data, part_dict, run_dict) if options.resume else 0
    last_save = written_at(options.data / "weights.pt")

    make = functools.partial(make_batch, *array_dict["train"], options.seed, mirror=options.mirror,
                             warp_share=min(1.0, WARP_IMAGES / len(array_dict["train"][0])))
    loader = Loader(make, range(first * STEPS_PER_UPDATE, options.updates * STEPS_PER_UPDATE))
    generator = torch.Generator(device).manual_seed(options.seed)  # of augment's random numbers
    noise_1d = torch.randn(2 * BATCH * CROP * CROP * 3, generator=generator, device=device)
    val_batch_list = [to_device(make_batch(*array_dict["val"], 12345, step), device)
                      for step in range(8)]  # fixed crops, neither warped nor augmented
    images_4d, *targets = to_device(make(0), device)
    draw_crops(results / "train_crops.png", augment(images_4d, noise_1d, generator), *targets)
    loader.start()
    progress, loss_list = Progress(options.updates, first, loader), []
    network.train()
    for update in range(first, options.updates):
        optimizer.param_groups[0]["lr"] = learning_rate(update, options.updates)
        optimizer.zero_grad()  # forget the gradients of the last update: backward adds to them
        for step in range(update * STEPS_PER_UPDATE, (update + 1) * STEPS_PER_UPDATE):
            images_4d, *targets = to_device(loader.next_batch(), device)
            # A seed for each step, so that --resume goes on with the same random numbers.
            generator.manual_seed(1_000_003 * options.seed + step)
            output_4d = network(augment(images_4d, noise_1d, generator))  # [16, 5, 4, 4]
            location, confidence = detection_loss(output_4d, *targets)
            # Divided by the number of steps: the sum of the gradients is then their mean.
            ((location + U * confidence) / STEPS_PER_UPDATE).backward()
            loss_list.append(torch.stack((location, confidence)).detach())
        optimizer.step()  # the update
        update_average(average, network, update)
        done, is_last = update + 1, update + 1 == options.updates
        if done % SHOW_EVERY == 0 or is_last:
            run_dict["train"].append([done, *mean_loss(loss_list, done)])
            progress.show(*run_dict["train"][-1], optimizer.param_groups[0]["lr"])
            loss_list = []
        if done % SAVE_EVERY == 0 or is_last:
            run_dict["val"].append([done, *val_loss(average, val_batch_list, done)])
            last_save = save_run(options.data, part_dict, run_dict, dataset_dict, last_save)
    draw_curves(results / "loss.png", run_dict)
    draw_hard_negatives(results / "hard_negatives.png", average, *val_batch_list[0])


def learning_rate(update: int, updates: int) -> float:
    """It rises during the warm-up, then is halved again and again, evenly over the run: step decay.

    >>> [learning_rate(update, 1000) / LEARNING_RATE for update in (4, 100, 400, 999)]
    [0.2, 1.0, 0.5, 0.25]
    """
    rise = min(1.0, (update + 1) / (WARM_UP * updates)) if WARM_UP else 1.0
    return LEARNING_RATE * rise * 0.5 ** (update * (HALVINGS + 1) // updates)


@torch.no_grad()  # nothing is kept for a backward pass
def update_average(average, network, update: int) -> None:
    """Move the averaged network (EMA) a little towards the one in training.

    BN's running mean and variance are averaged, too: they must fit the averaged weights. At first
    the average looks back less far, or it would remember the random weights of the start.
    state_dict() gives the tensors themselves, no copies: to change them changes the network.
    """
    decay = min(AVERAGE_DECAY, (update + 1) / (update + 10))
    for mean, now in zip(average.state_dict().values(), network.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)  # BN's counter of batches


def mean_loss(loss_list, done: int) -> list[float]:
    """Mean location and confidence loss; a loss that is not a finite number ends the run."""
    location, confidence = torch.stack(loss_list).mean(dim=0).tolist()
    if not np.isfinite(location + confidence):
        raise UserError(f"the loss is {location + confidence} at update {done}; the weights saved "
                        "before are untouched; look at the labels in results/contact_sheet.png, "
                        "or lower LEARNING_RATE in 03_train.py")
    return [location, confidence]


@torch.no_grad()
def val_loss(average, val_batch_list, done: int) -> list[float]:
    """Mean location and confidence loss of the validation crops."""
    return mean_loss([torch.stack(detection_loss(average(images_4d), *targets))
                      for images_4d, *targets in val_batch_list], done)


class Progress:
    r"""A progress bar that refreshes in place: `\r` goes back to the line's start.

    Into a file or a pipe, where nothing can be overwritten, a plain line at every save.
    """

    def __init__(self, updates: int, first: int, loader: Loader):
        self.updates, self.first, self.loader = updates, first, loader
        self.start_time = time.perf_counter()

    def show(self, done: int, location: float, confidence: float, rate: float) -> None:
        updates = done - self.first  # of this run
        seconds = (time.perf_counter() - self.start_time) / updates  # an update takes
        left, to_ms = round(seconds * (self.updates - done)), 1e3 / STEPS_PER_UPDATE
        line = (f"{done}/{self.updates}  loss {location + U * confidence:6.4f} = {location:6.4f} + "
                f"{U:g} x {confidence:6.4f}  lr {rate:.1e}  {seconds * to_ms:4.1f} ms a step, "
                f"{self.loader.wait_seconds / updates * to_ms:.1f} waiting  "
                f"{left // 60}:{left % 60:02d} left")
        if sys.stdout.isatty():
            bar = ("#" * round(20 * done / self.updates)).ljust(20, ".")
            columns = shutil.get_terminal_size().columns - 1  # a wrapped line can't be overwritten
            print(f"\r{f'[{bar}] {line}'[:columns]:{columns}}", end="", flush=True)
        elif done % SAVE_EVERY == 0 or done == self.updates:
            print(line, flush=True)


# ---- The lesson ends here; what follows makes it comfortable to use.

def written_at(path: Path) -> int:
    """When a file was last written, in ns; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def save_run(data_folder: Path, part_dict, run_dict, dataset_dict, last_save: int) -> int:
    """Write weights.pt, to predict with, and checkpoint.pt, to go on from; returns when."""
    path = data_folder / "weights.pt"
    if written_at(path) != last_save:
        raise UserError(f"{path}: another run has written it since this one began; give each run "
                        "a folder of its own with --data")
    if last_save and len(run_dict["val"]) == 1:  # the first save: they are an earlier run's
        shutil.copyfile(path, path.with_suffix(".old.pt"))
    state_dict = {name: part.state_dict() for name, part in part_dict.items()}
    about_dict = {key: dataset_dict[key] for key in (
        "category_list", "box_size", "max_per_class", "scale")}
    about_dict["checksum_list"] = dataset_dict["train"]["checksum_list"]
    for target, content in ((path, {"network": state_dict["average"], **about_dict}),
                            (data_folder / "checkpoint.pt", state_dict | run_dict)):
        try:
            with replacing(target) as temporary:
                torch.save(content, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise UserError(f"{target}: could not be written ({str(error)[:80]}); make room on the "
                            "disk; --resume goes on from the last save") from None
    return written_at(path)


def load_run(data_folder: Path, part_dict, run_dict) -> int:
    """Put checkpoint.pt into network, average, optimizer and run_dict; returns the updates done."""
    path = data_folder / "checkpoint.pt"
    try:  # map_location: what a GPU has saved can go on where there is none
        saved_dict = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in run_dict["same"].items():
            if (saved := saved_dict["same"][name]) != value:
                raise ValueError(f"made with {name} = {saved}, now it is {value}")
        for name, part in part_dict.items():
            part.load_state_dict(saved_dict[name])
        run_dict.update(train=saved_dict["train"], val=saved_dict["val"])
        done = run_dict["val"][-1][0]
    except Exception as error:  # damaged bytes can raise nearly anything
        raise UserError(f"{path}: cannot go on from it ({' '.join(str(error).split())[:90]}); "
                        "train without --resume") from None
    print(f"going on after update {done}")
    return done


def draw_crops(path: Path, images_4d, gt_offset_4d, gt_class_id_3d) -> None:
    """Sixteen crops as the network sees them, and what each of their cells learns."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    # numpy reads only the CPU's memory: from a GPU, copy to the CPU first.
    array_list = [tensor.cpu().numpy() for tensor in (
        images_4d.permute(0, 2, 3, 1) / 255, gt_offset_4d, gt_class_id_3d)]
    for axes, *crop in zip(figure.subplots(4, 4).flat, *array_list):
        model.draw_targets(axes, *crop)
        axes.tick_params(labelbottom=False, labelleft=False)
    figure.suptitle("training crops with all changes; tinted cells learn a keypoint")
    figure.savefig(path, dpi=110)


def draw_curves(path: Path, curve_dict) -> None:
    """The losses of training and validation against the update."""
    axes = Figure(figsize=(9, 4.5), layout="constrained").subplots()
    for split, style, alpha in (("train", "-", 0.6), ("val", "o:", 1)):
        update_1d_array, *loss_list = np.array(curve_dict[split]).T
        for name, loss_1d_array, colour in zip(("location", "confidence"), loss_list, ("C0", "C1")):
            axes.plot(update_1d_array, loss_1d_array, style, color=colour, markersize=3,
                      alpha=alpha, label=f"{name}, {split}")
    axes.set(xlabel="update", ylabel="loss per crop", yscale="log", title="val: averaged weights")
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside right upper")  # beside the axes it covers no curve
    axes.figure.savefig(path, dpi=110)


@torch.no_grad()
def draw_hard_negatives(path: Path, average, images_4d, gt_offset_4d, gt_class_id_3d) -> None:
    """The validation crop whose background costs most: the hardest cells, red, count."""
    loss_3d = nn.functional.cross_entropy(average(images_4d)[:, 2:], gt_class_id_3d,
                                          reduction="none")  # [16, 4, 4]
    number = (loss_3d * (gt_class_id_3d == 0)).amax(dim=(1, 2)).argmax()
    image_3d_array, *target_list, loss_2d_array = (tensor[number].cpu().numpy() for tensor in (
        images_4d, gt_offset_4d, gt_class_id_3d, loss_3d))
    negative_list = np.argwhere(target_list[1] == 0).tolist()
    negative_list.sort(key=lambda cell: loss_2d_array[tuple(cell)], reverse=True)
    axes = Figure(figsize=(5, 5.4), layout="constrained").subplots()
    model.draw_targets(axes, image_3d_array.transpose(1, 2, 0) / 255, *target_list)
    for place, (row, column) in enumerate(negative_list):
        axes.text(column * CELL + 2, row * CELL + 18, f"{abs(loss_2d_array[row, column]):.3f}",
                  color="white", backgroundcolor="red" if place < HARD_NEGATIVES else "none")
    axes.set(title=f"loss of background cells; the {HARD_NEGATIVES} hardest (red) count")
    axes.figure.savefig(path, dpi=110)


def main() -> None:
    parser = make_parser("Train the network.", "folder with what 01_prepare_data.py made")
    parser.add_argument("--updates", type=int, default=UPDATES, help="changes of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops and augmentation")
    parser.add_argument("--mirror", action="store_true", help="mirror and quarter-turn crops: for "
                        "classes that mean the same then")
    parser.add_argument("--resume", action="store_true", help="go on where a stopped run was")
    options = parser.parse_args()
    if options.updates < 1 or not 0 <= options.seed < 2 ** 32:
        parser.error("--updates must be at least 1 and --seed at least 0 and below 2**32")
    is_default = options.data.resolve() == DATA_FOLDER.resolve()
    if is_default and not (DATA_FOLDER / "dataset.json").exists():
        print("data holds no data set yet; 01_prepare_data.py draws one", flush=True)
        run_script("01_prepare_data.py")
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is the loader's
    train(options, model.pick_device())
    print(f"\nwrote weights.pt, checkpoint.pt, and the pictures in results to "
          f"{options.data}\nnext: {command('04_evaluate.py', options.data, '--split', 'val')}")


if __name__ == "__main__":
    run_main(main)
