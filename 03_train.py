"""Lesson 3: training. A loader thread with a queue, the loss, and the loop with its updates.

    python 03_train.py                  # on a fresh clone it draws the data set first
    python 03_train.py --data my_data   # on what 01_prepare_data.py --source made of yours
    python 03_train.py --resume         # goes on where a stopped run was

Reads   data/dataset.json and the arrays that 01_prepare_data.py wrote.
Writes  data/weights.pt (to predict with), data/checkpoint.pt (for --resume); what an earlier run
        left of them is kept as data/weights.old.pt and data/checkpoint.old.pt. And
        data/results/train_crops.png, what the network learns from, and data/results/loss.png.
Time    four to six minutes on two CPU cores, and a minute for drawing.
See     a loss that falls; both of its parts fall, on the validation split too.
Next    python 04_evaluate.py says how good the result is.

Words: a step is one forward and backward pass over one batch; an update changes the weights after
every STEPS_PER_UPDATE steps; an epoch is as many crops as the training split has pictures.
"""

import copy
import importlib
import queue
import shutil
import subprocess
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

from common import (CELL, Progress, UserError, command, is_default, make_parser, pick_device,
                    read_data_set, replacing, run_main, save_figure, short_reason)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

UPDATES = 8000  # changes of the weights, however many pictures there are
STEPS_PER_UPDATE = 2  # their gradients add up: a batch of 32 with the memory of 16
BATCH = 16  # crops a step
# A cell sees 142 px: in a crop every cell sees some of the zero padding, in a whole picture only
# those at its rim do. Larger crops were worse for the same work (docs/experiments.md).
CROP = 128  # px; side of the squares that are cut out for training
KEYPOINT_SHARE = 0.75  # of the crops lie round a keypoint, the others anywhere
QUEUE_SIZE = 8  # batches; enough to bridge a slow one, and few megabytes
LEARNING_RATE = 6e-3  # the largest
WARM_UP = 0.025  # share of the run in which the learning rate rises from 0
HALVINGS = 5  # of the learning rate, evenly over the run
LOCATION_LOSS = "L1"  # |error|; or "MSE", its square, which cares little about small errors
U = 0.3  # loss = location + U x confidence
HARD_NEGATIVES = 6  # background cells a crop that count: those with the largest loss
AVERAGE_DECAY = 0.998  # of the weights' moving average (EMA): it looks back over 500 updates
LIGHT, CONTRAST, COLOUR = 0.25, 0.25, 0.08  # largest random change: 0.25 is 25 %
NOISE, BLUR = 8.0, 1.0  # grey levels; 1.0 replaces each pixel by the mean of 3x3
TURN, ZOOM = 20.0, 0.25  # a warp turns by up to 20 degrees and zooms by 0.75 to 1.25
WARP_PICTURES = 100  # 100 / pictures is the share of warped crops: few pictures need variety more
SHOW_EVERY, SAVE_EVERY = 50, 500  # updates between two progress lines, two checkpoints


# ---------------------------------------------------------------- the loader thread

class Loader(threading.Thread):
    """Cuts crops out of the pictures in a thread of its own, and hands batches over in a queue.

    A thread helps where it waits or works outside of Python: reading the mapped file, copying in
    numpy and warping in Pillow let go of Python's lock (GIL), and the loop's convolutions do too.
    Batch number i depends on (seed, i) alone, so a resumed run gets the same ones.
    """

    def __init__(self, images_4d_array, label_2d_array, first_step: int, last_step: int, seed: int,
                 mirror: bool):
        super().__init__(daemon=True)  # daemon: the program may end though this thread runs
        self.images_4d_array, self.label_2d_array = images_4d_array, label_2d_array
        self.first_step, self.last_step = first_step, last_step
        self.seed, self.mirror = seed, mirror
        self.crop_height, self.crop_width = (min(CROP, side) for side in images_4d_array.shape[1:3])
        self.warp_share = min(1.0, WARP_PICTURES / len(images_4d_array))
        self.wait_seconds = 0.0  # how long the loop has waited for batches
        # Bounded: `put` sleeps while it is full, `get` while it is empty, and memory stays flat.
        self.queue = queue.Queue(maxsize=QUEUE_SIZE)

    def run(self) -> None:
        """What the thread does, from start() on."""
        try:
            for step in range(self.first_step, self.last_step):
                self.queue.put(self.make_batch(step))
        except BaseException as error:  # through the queue: otherwise the loop would wait for ever
            self.queue.put(error)

    def next_batch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start_time = time.perf_counter()
        item = self.queue.get()
        self.wait_seconds += time.perf_counter() - start_time
        if isinstance(item, BaseException):
            raise item
        return item

    def make_batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Batch number `step`: crops uint8 `[N, 128, 128, 3]`, and what their cells should answer:
        gt_offset float32 `[N, 2, 4, 4]`, gt_class_id int64 `[N, 4, 4]`.
        """
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
        """A crop and its picture's labels, x and y from the crop's corner.

        Labels outside of the crop stay: one just outside teaches the cells along the rim.
        """
        height, width = self.images_4d_array.shape[1:3]
        # Of 600 cells one holds a keypoint: crops from anywhere would show too few of them.
        if len(self.label_2d_array) and rng.random() < KEYPOINT_SHARE:
            picture, _, x, y = self.label_2d_array[rng.integers(len(self.label_2d_array))]
            left, top = x - rng.uniform(0, self.crop_width), y - rng.uniform(0, self.crop_height)
        else:
            picture = rng.integers(len(self.images_4d_array))
            left = rng.uniform(0, width - self.crop_width + 1)
            top = rng.uniform(0, height - self.crop_height + 1)
        left = int(np.clip(left, 0, width - self.crop_width))
        top = int(np.clip(top, 0, height - self.crop_height))
        picture_3d_array = self.images_4d_array[int(picture)]  # [1920, 320, 3]; still on the disk
        crop_3d_array = picture_3d_array[top:top + self.crop_height, left:left + self.crop_width]
        # 01 writes the labels picture by picture: those of one are a stretch, found by bisection.
        first, last = np.searchsorted(self.label_2d_array[:, 0], (picture, picture + 1))
        label_2d_array = self.label_2d_array[first:last].copy()
        if rng.random() < self.warp_share:
            crop_3d_array, label_2d_array[:, 2:] = warp(
                rng, picture_3d_array, left, top, crop_3d_array.shape, label_2d_array[:, 2:])
        else:
            label_2d_array[:, 2:] -= left, top
        if self.mirror:
            crop_3d_array, label_2d_array[:, 2:] = mirror_and_turn(
                rng, crop_3d_array, label_2d_array[:, 2:])
        return crop_3d_array, label_2d_array


def warp(rng, picture_3d_array, left, top, crop_shape, place_2d_array):
    """A crop of the picture, turned and zoomed about its middle; its places `[M, 2]` move along.

    Places go forwards: new = matrix (old - middle) + half. For pixels Pillow asks where each new
    one comes from: old = inverse (new - half) + middle, its six numbers are the inverse and the
    shift middle - inverse half. Beyond the picture it is black.
    """
    angle, zoom = np.radians(rng.uniform(-TURN, TURN)), rng.uniform(1 - ZOOM, 1 + ZOOM)
    matrix_2d_array = zoom * np.array([[np.cos(angle), -np.sin(angle)],
                                       [np.sin(angle), np.cos(angle)]])
    height, width = crop_shape[:2]
    half = np.array([width / 2, height / 2])
    middle = half + (left, top)
    place_2d_array = (place_2d_array - middle) @ matrix_2d_array.T + half
    # Pillow gets the crop and two cells round it: to copy the whole picture would take too long.
    x, y = max(0, left - 2 * CELL), max(0, top - 2 * CELL)
    part_3d_array = picture_3d_array[y:top + height + 2 * CELL, x:left + width + 2 * CELL]
    inverse_2d_array = np.linalg.inv(matrix_2d_array)
    shift_x, shift_y = middle - (x, y) - inverse_2d_array @ half
    image = Image.fromarray(np.ascontiguousarray(part_3d_array)).transform(
        (width, height), Image.Transform.AFFINE,
        (*inverse_2d_array[0], shift_x, *inverse_2d_array[1], shift_y), Image.Resampling.BILINEAR)
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


# ---------------------------------------------------------------- on the device: images and loss

def to_device(batch, device):
    """A batch as tensors on the device. Pictures travel as uint8, a quarter of float32's bytes."""
    images_4d, gt_offset_4d, gt_class_id_3d = (torch.from_numpy(a).to(device) for a in batch)
    images_4d = images_4d.permute(0, 3, 1, 2).float()  # [16, 3, 128, 128]
    return images_4d, gt_offset_4d, gt_class_id_3d


def augment(images_4d: torch.Tensor, noise_1d: torch.Tensor, generator) -> torch.Tensor:
    """Random colour, light, contrast, focus and noise for `[N, 3, H, W]`, float, 0 to 255."""
    count, _, height, width = images_4d.shape

    def uniform(low, high, channels=1):
        shape = count, channels, 1, 1
        return low + (high - low) * torch.rand(shape, generator=generator, device=images_4d.device)

    images_4d = images_4d * uniform(1 - COLOUR, 1 + COLOUR, channels=3)
    mean_4d = images_4d.mean(dim=(1, 2, 3), keepdim=True)  # [N, 1, 1, 1]
    images_4d = (images_4d - mean_4d) * uniform(1 - CONTRAST, 1 + CONTRAST)
    images_4d += mean_4d * uniform(1 - LIGHT, 1 + LIGHT)
    kernel_4d = torch.full((3, 1, 3, 3), 1 / 9, device=images_4d.device)  # the mean of 3x3
    blurred_4d = nn.functional.conv2d(images_4d, kernel_4d, groups=3)  # each colour by itself
    images_4d[:, :, 1:-1, 1:-1].lerp_(blurred_4d, uniform(0, BLUR))
    # A random stretch of a long strip: fresh numbers for every pixel take a tenth of the step.
    first = torch.randint(len(noise_1d) - images_4d.numel(), (1,), generator=generator,
                          device=images_4d.device).item()
    noise_4d = noise_1d[first:first + images_4d.numel()].view(count, height, width, 3)
    images_4d += noise_4d.permute(0, 3, 1, 2) * uniform(0, NOISE)
    return images_4d.clamp(0, 255)


def detection_loss(output_4d, gt_offset_4d, gt_class_id_3d):
    """Location and confidence loss, each summed over a picture's cells, then the mean of pictures.

    output_4d `[N, 5, 4, 4]`, offsets in half cells; gt_offset_4d `[N, 2, 4, 4]` in px;
    gt_class_id_3d `[N, 4, 4]`. The mean of two half batches' losses is the whole batch's, and so
    are the gradients. Only BN differs: it sees each half by itself.
    """
    is_positive_3d = gt_class_id_3d > 0  # [N, 4, 4], bool
    error_4d = output_4d[:, :2] - gt_offset_4d / model.OFFSET_UNIT  # [N, 2, 4, 4]
    error_4d = error_4d.abs() if LOCATION_LOSS == "L1" else error_4d.square()
    location = (error_4d * is_positive_3d[:, None]).sum() / len(output_4d)
    # cross_entropy takes scores [N, C, ...] before softmax and class ids [N, ...]. An untrained
    # network, for which all classes are alike, pays log(3) = 1.1 a cell.
    cell_loss_3d = nn.functional.cross_entropy(output_4d[:, 2:], gt_class_id_3d, reduction="none")
    positive = (cell_loss_3d * is_positive_3d).sum()
    # Nearly all cells are background and soon easy. Only the hardest of each picture count, or
    # they would drown the few keypoints.
    negative_2d = (cell_loss_3d * ~is_positive_3d).flatten(start_dim=1)  # [N, 16]
    hardest_2d, _ = negative_2d.topk(min(HARD_NEGATIVES, negative_2d.shape[1]), dim=1)  # [N, 6]
    confidence = (positive + hardest_2d.sum()) / len(output_4d)
    return location, confidence


# ---------------------------------------------------------------- the training loop

def train(options, device: torch.device) -> None:
    dataset_dict, array_dict = read_data_set(options.data)
    torch.manual_seed(options.seed)
    network = model.KeypointNet(len(dataset_dict["category_list"])).to(device)
    average = copy.deepcopy(network).eval()  # what is saved for use: the mean of many updates
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
    part_dict = {"network": network, "average": average, "optimizer": optimizer}
    run_dict = describe_run(options, dataset_dict, array_dict["train"][1])
    curve_dict, first_update = {"train": [], "val": []}, 0
    if options.resume:
        first_update, curve_dict = load_checkpoint(options.data, part_dict, run_dict)
        if first_update == options.updates:
            print(f"the run of {first_update} updates is finished; nothing was changed")
            return
        print(f"going on after update {first_update}")

    loader = Loader(*array_dict["train"], first_update * STEPS_PER_UPDATE,
                    options.updates * STEPS_PER_UPDATE, options.seed, options.mirror)
    generator = torch.Generator(device).manual_seed(options.seed)  # of augment's random numbers
    noise_1d = torch.randn(2 * BATCH * CROP * CROP * 3, generator=generator, device=device)
    val_batch_list = make_val_batches(array_dict["val"], device)
    draw_crops(options.data, to_device(loader.make_batch(0), device), noise_1d, generator)
    print_plan(options, loader, network, device)
    loader.start()
    progress = Progress(options.updates, "training", first_update)
    loss_list = []
    network.train()
    for update in range(first_update, options.updates):
        optimizer.param_groups[0]["lr"] = learning_rate(update, options.updates)
        optimizer.zero_grad()  # forget the gradients of the last update: backward adds to them
        for step in range(STEPS_PER_UPDATE):
            images_4d, gt_offset_4d, gt_class_id_3d = to_device(loader.next_batch(), device)
            # A seed for each step, so that --resume goes on with the same random numbers.
            generator.manual_seed(1_000_003 * options.seed + update * STEPS_PER_UPDATE + step)
            images_4d = augment(images_4d, noise_1d, generator)  # [16, 3, 128, 128]
            output_4d = network(images_4d)  # [16, 5, 4, 4]
            location, confidence = detection_loss(output_4d, gt_offset_4d, gt_class_id_3d)
            # Divided by the number of steps: the sum of the gradients is then their mean.
            ((location + U * confidence) / STEPS_PER_UPDATE).backward()
            loss_list.append(torch.stack((location, confidence)).detach())
        optimizer.step()  # the update
        update_average(average, network, update)

        done = update + 1
        is_last = done == options.updates
        if done % SHOW_EVERY == 0 or is_last:
            curve_dict["train"].append([done, *mean_loss(loss_list, done)])
            show_progress(progress, done, curve_dict["train"][-1], optimizer, loader)
            loss_list = []
        if done % SAVE_EVERY == 0 or is_last:
            curve_dict["val"].append([done, *val_loss(average, val_batch_list, done)])
            save_run(options.data, part_dict, dataset_dict, run_dict, done, curve_dict)
    draw_curves(options.data, curve_dict)
    print_result(options.data, curve_dict)


def learning_rate(update: int, updates: int) -> float:
    """It rises during the warm-up, then is halved again and again, evenly over the run.

    >>> [learning_rate(update, 1000) / LEARNING_RATE for update in (4, 100, 200, 999)]
    [0.2, 1.0, 0.5, 0.03125]
    """
    rise = min(1.0, (update + 1) / (WARM_UP * updates)) if WARM_UP else 1.0
    return LEARNING_RATE * rise * 0.5 ** (update * (HALVINGS + 1) // updates)


@torch.no_grad()  # nothing is kept for a backward pass
def update_average(average, network, update: int) -> None:
    """Move the averaged network a little towards the one in training: weights jitter, means don't.

    BN's running mean and variance are averaged, too, since they must fit the averaged weights. At
    first the average looks back less far, or it would remember the random weights of the start.
    state_dict() gives the tensors themselves, no copies: to change them changes the network.
    """
    decay = min(AVERAGE_DECAY, (update + 1) / (update + 10))
    for mean, now in zip(average.state_dict().values(), network.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)  # BN's counter of batches


def mean_loss(loss_list, done: int) -> list[float]:
    """Mean location and confidence loss; a loss that is no number ends the run."""
    location, confidence = torch.stack(loss_list).mean(dim=0).tolist()
    if not np.isfinite(location + confidence):
        raise UserError(f"the loss is {location + confidence} at update {done}; the weights saved "
                        "before are untouched; look at the labels in results/contact_sheet.png, "
                        "or lower LEARNING_RATE in 03_train.py")
    return [location, confidence]


def make_val_batches(arrays, device) -> list:
    """Eight batches of fixed crops of the validation split, neither warped nor augmented."""
    loader = Loader(*arrays, 0, 0, seed=12345, mirror=False)  # never started
    loader.warp_share = 0.0
    return [to_device(loader.make_batch(step), device) for step in range(8)]


@torch.no_grad()
def val_loss(average, val_batch_list, done: int) -> list[float]:
    loss_list = [torch.stack(detection_loss(average(images_4d), gt_offset_4d, gt_class_id_3d))
                 for images_4d, gt_offset_4d, gt_class_id_3d in val_batch_list]
    return mean_loss(loss_list, done)


# ---------------------------------------------------------------- round the loop: save and go on

def describe_run(options, dataset_dict, label_2d_array) -> dict:
    """All settings of a run, and its data: --resume goes on only where they are the same."""
    data_bytes = repr(dataset_dict["train"]["file_list"]).encode() + label_2d_array.tobytes()
    run_dict = {"--updates": options.updates, "--seed": options.seed, "--mirror": options.mirror,
                "data (checksum of file names and labels)": zlib.crc32(data_bytes),
                "categories": dataset_dict["category_list"]}
    for module in (model, sys.modules[__name__]):  # the settings stand in capitals
        run_dict |= {name: value for name, value in vars(module).items()
                     if name.isupper() and isinstance(value, (int, float, str, list))}
    return run_dict


def save_run(data_folder: Path, part_dict, dataset_dict, run_dict, update: int, curve_dict) -> None:
    """Write weights.pt, to predict with, and checkpoint.pt, to go on from."""
    about_dict = {key: dataset_dict[key] for key in ("category_list", "box_size", "max_per_class")}
    weights_dict = {"network": part_dict["average"].state_dict(), **about_dict}
    state_dict = {name: part.state_dict() for name, part in part_dict.items()}
    checkpoint_dict = {**state_dict, "update": update, "curves": curve_dict, "run": run_dict}
    for name, content in (("weights.pt", weights_dict), ("checkpoint.pt", checkpoint_dict)):
        path = data_folder / name
        try:
            if path.is_file() and len(curve_dict["val"]) == 1:  # a first save keeps the last run's
                with replacing(path.with_suffix(".old.pt")) as temporary:
                    shutil.copyfile(path, temporary)
            with replacing(path) as temporary:
                torch.save(content, temporary)
        except (OSError, RuntimeError) as error:  # RuntimeError is what torch makes of a full disk
            raise UserError(f"{path}: could not be written ({short_reason(error)}); make room on "
                            f"the disk; {update} updates are done, --resume goes on from the last "
                            "save, if there was one") from None


def load_checkpoint(data_folder: Path, part_dict, run_dict) -> tuple[int, dict]:
    """Put the checkpoint into network, average and optimizer. Returns updates done, and curves."""
    path = data_folder / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such file, so nothing to resume; train without --resume")
    try:
        # map_location: what a GPU has saved can go on where there is none.
        saved_dict = torch.load(path, map_location="cpu", weights_only=True)
        saved_run_dict = dict(saved_dict["run"])
        for name, value in run_dict.items():
            if saved_run_dict.get(name) != value:
                raise UserError(f"{path}: was made with {name} = {saved_run_dict.get(name)}, this "
                                f"run has {value}; make them equal, or train without --resume")
        for name, part in part_dict.items():
            part.load_state_dict(saved_dict[name])
        return saved_dict["update"], saved_dict["curves"]
    except UserError:
        raise
    except Exception as error:  # damaged bytes can raise nearly anything
        raise UserError(f"{path}: not a checkpoint of this network ({short_reason(error)}); train "
                        "without --resume") from None


# ---------------------------------------------------------------- what the user sees

def print_plan(options, loader, network, device) -> None:
    pictures = len(loader.images_4d_array)
    epochs = options.updates * STEPS_PER_UPDATE * BATCH / pictures
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{pictures} pictures; {options.updates} updates of {STEPS_PER_UPDATE} x {BATCH} crops = "
          f"{epochs:.0f} epochs; on {device}; {parameters:,} parameters")


def show_progress(progress, done: int, row, optimizer, loader) -> None:
    _, location, confidence = row
    steps = (done - progress.first) * STEPS_PER_UPDATE  # of this run
    step_ms = (time.perf_counter() - progress.start_time) / steps * 1e3
    epoch = done * STEPS_PER_UPDATE * BATCH / len(loader.images_4d_array)
    progress.show(done, f"epoch {epoch:5.1f}  loss {location + U * confidence:6.4f} = "
                        f"{location:6.4f} + {U:g} x {confidence:6.4f}  "
                        f"lr {optimizer.param_groups[0]['lr']:.1e}  {step_ms:4.1f} ms a step, "
                        f"{loader.wait_seconds / steps * 1e3:.1f} waiting")


def print_result(data_folder: Path, curve_dict) -> None:
    _, location, confidence = curve_dict["val"][-1]
    print(f"validation loss {location + U * confidence:.4f} = {location:.4f} + {U:g} x "
          f"{confidence:.4f}\nwrote weights.pt, checkpoint.pt, results/loss.png and "
          f"results/train_crops.png to {data_folder}")


def draw_crops(data_folder: Path, batch, noise_1d, generator) -> None:
    """train_crops.png: the crops of batch 0, changed as in training, and what each cell learns."""
    images_4d, gt_offset_4d, gt_class_id_3d = batch
    images_4d = augment(images_4d, noise_1d, generator.manual_seed(0)) / 255
    figure = Figure(figsize=(9, 9), layout="constrained")
    # The way back to numpy is by the processor: an array cannot live on a GPU.
    array_list = [tensor.cpu().numpy()
                  for tensor in (images_4d.permute(0, 2, 3, 1), gt_offset_4d, gt_class_id_3d)]
    for axes, *targets in zip(figure.subplots(4, 4).flat, *array_list):
        model.draw_targets(axes, *targets)
        axes.tick_params(labelbottom=False, labelleft=False)
    figure.suptitle("training crops with all changes; tinted cells learn a keypoint, a colour per "
                    "class; arrows lead to it")
    save_figure(figure, data_folder / "results" / "train_crops.png")


def draw_curves(data_folder: Path, curve_dict) -> None:
    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    for split, style, alpha in (("train", "-", 0.6), ("val", "o:", 1)):
        update_1d_array, *loss_list = np.array(curve_dict[split]).T
        for name, loss_1d_array, colour in zip(("location", "confidence"), loss_list,
                                               ("tab:blue", "tab:orange")):
            axes.plot(update_1d_array, loss_1d_array, style, color=colour, markersize=3,
                      alpha=alpha, label=f"{name}, {split}")
    axes.set(xlabel="update", ylabel="loss per crop", yscale="log",
             title="training loss, and validation loss of the averaged weights")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(axes.figure, data_folder / "results" / "loss.png")


# ---------------------------------------------------------------- the program

def is_prepared(data_folder: Path) -> bool:
    """Did 01_prepare_data.py come to its end here? It names the splits in dataset.json last."""
    path = data_folder / "dataset.json"
    return path.is_file() and b'"train":' in path.read_bytes()


def draw_data_set(data_folder: Path) -> None:
    """Start 01_prepare_data.py as a reader would. If this script is stopped, that one is, too."""
    script = Path(__file__).resolve().parent / "01_prepare_data.py"
    process = subprocess.Popen([sys.executable, str(script), "--data", str(data_folder)])
    try:
        if process.wait():
            raise UserError("01_prepare_data.py did not end well; its own message stands above")
    finally:
        process.terminate()
        process.wait()


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
    if is_default(options.data) and not is_prepared(options.data):
        print("data holds no data set yet; starting 01_prepare_data.py to draw one", flush=True)
        draw_data_set(options.data)
    train(options, pick_device())
    print(f"next: {command('04_evaluate.py', options.data)}")


if __name__ == "__main__":
    run_main(main)
