"""Lesson 6: where the network's parameters, work, time and memory go, layer by layer.

    python 06_model_analysis.py              # memory for a batch of 8 whole pictures
    python 06_model_analysis.py --batch 2    # for a batch of 2

Reads   data/weights.pt, else data/pretrained.pt; else an untrained network will do. A picture of
        data/sample; with --data my_data one of yours, and so its size.
Writes  data/results/layers.png and data/results/receptive_field.png.
Time    half a minute on two CPU cores.
See     nine chapters: what a formula says beside what PyTorch says. Where they differ, the script
        ends with an error. A MB is 2^20 bytes.
Next    change a line of LAYER_LIST in 02_model.py and run this again: what did it cost?
"""

import copy
import importlib
import inspect
import io
import math
import threading
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import (CELL, UserError, command, make_parser, pad_image, pick_device, print_table,
                    read_image, round_up_to_cell, run_main, save_figure, time_calls)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

MB, GB = 2 ** 20, 2 ** 30  # bytes
CARD = 4 * GB - GB // 2  # bytes of a small card, less the half GB that CUDA itself takes
RUNS = 15  # calls, of which the fastest is quoted


# ---------------------------------------------------------------- compute, check, show

def describe(layer_list, channels: int, height: int, width: int) -> list[dict]:
    """What formulas say of each layer, a dict each; PyTorch is not asked.

    >>> row, = describe([nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1)], 3, 64, 32)
    >>> row["out_shape"], row["formula"], row["parameters"]
    ((8, 32, 16), '3x3x3x8 + 8', 224)
    >>> row["multiply_adds"]  # 8x32x16 numbers come out, each of them a sum of 3x3x3 products
    110592
    """
    row_list, geometry_list = [], []
    for layer in layer_list:
        row = {"layer": layer, "in_shape": (channels, height, width), "parameters": 0,
               "multiply_adds": 0, "formula": ""}
        if isinstance(layer, nn.Conv2d):
            kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
            height = (height + 2 * padding - kernel) // stride + 1
            width = (width + 2 * padding - kernel) // stride + 1
            geometry_list.append((kernel, stride, padding))
            row["size"], row["jump"], row["centre"] = model.receptive_field(geometry_list)
            channels_in, channels = channels // layer.groups, layer.out_channels
            weights = kernel * kernel * channels_in * channels
            biases = channels if layer.bias is not None else 0
            formula = f"{kernel}x{kernel}x{channels_in}x{channels}"
            row.update(kind="conv", geometry=(kernel, stride, padding),
                       formula=f"{formula} + {biases}" if biases else formula,
                       parameters=weights + biases, multiply_adds=weights * height * width)
        elif isinstance(layer, nn.BatchNorm2d):
            row.update(kind="BN", parameters=2 * channels, formula=f"2x{channels}")
        elif isinstance(layer, nn.ReLU):
            row["kind"] = "ReLU"
        else:
            raise UserError(f"02_model.py has a {type(layer).__name__}, which describe() in "
                            "06_model_analysis.py does not know; add it there")
        row.update(name=f"{row['kind']} {len(geometry_list)}", out_shape=(channels, height, width))
        row_list.append(row)
    return row_list


def check(what: str, by_formula, by_pytorch, tolerance: float = 0.0) -> None:
    """End the script where the two differ by more than `tolerance`, a share."""
    if not np.allclose(by_formula, by_pytorch, rtol=tolerance, atol=0):
        raise UserError(f"{what}: the formula says {by_formula}, PyTorch {by_pytorch}; mend the "
                        "formula in 06_model_analysis.py, or what was changed in 02_model.py")


def best_ms(function) -> float:
    """The fastest of RUNS calls, in ms: other programs can only slow a call down."""
    return min(time_calls(function, pick_device(), RUNS))


def random_pictures(count: int, height: int, width: int) -> torch.Tensor:
    """uint8 `[N, 3, height, width]`, in memory as pictures are: a pixel's colours side by side."""
    images_4d = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    return images_4d.permute(0, 3, 1, 2)  # [N, 3, 1920, 320]


# ---------------------------------------------------------------- the chapters
# Each chapter's docstring is printed as its heading.

def print_shapes(row_list, image_4d) -> None:
    """1. SHAPES: (side + 2 x padding - kernel)/stride + 1, rounded down; BN, ReLU change none."""
    feature_4d, table_list = image_4d.float(), []
    for row in row_list:
        feature_4d = row["layer"](feature_4d)
        check(f"shape after {row['name']}", row["out_shape"], feature_4d.shape[1:])
        if row["kind"] == "conv":
            kernel, stride, padding = row["geometry"]
            how = f"({row['in_shape'][1]} + 2x{padding} - {kernel})/{stride} + 1"
            shape = " x ".join(map(str, row["out_shape"]))
            table_list.append((row["name"], how, shape, feature_4d.nbytes / MB))
    print_table(("layer", "height", "comes out", "MB"), table_list)


def print_parameters(row_list, network) -> None:
    """2. PARAMETERS: kernel x kernel x channels in x channels out, and two a channel for BN.
    BN would subtract a bias, so only the head, which no BN follows, has one.
    """
    total, table_list = sum(row["parameters"] for row in row_list), []
    for row in row_list:
        counted = sum(parameter.numel() for parameter in row["layer"].parameters())
        check(f"parameters of {row['name']}", row["parameters"], counted)
        if counted:
            share = f"{counted / total:.1%}"
            table_list.append((row["name"], row["formula"], row["parameters"], counted, share))
    counted = sum(parameter.numel() for parameter in network.parameters())
    check("parameters of all layers", total, counted)
    table_list.append(("together", "", total, counted, "100.0%"))
    print_table(("layer", "formula", "by formula", "by PyTorch", "share"), table_list)


def print_work(row_list, network, image_4d) -> None:
    """3. WORK AND TIME of one picture: BN and ReLU work little, but move all numbers to and fro."""
    feature_4d, table_list = image_4d.float(), []
    for row in row_list:
        scratch_4d = feature_4d.clone()  # an in-place ReLU writes into it
        ms = best_ms(lambda: row["layer"](scratch_4d))
        feature_4d = row["layer"](feature_4d)
        table_list.append((row["name"], row["multiply_adds"] / 1e6, ms,
                           row["multiply_adds"] / ms / 1e6))
    total = sum(row["multiply_adds"] for row in row_list)
    with FlopCounterMode(display=False) as counter:
        network(image_4d)
    check("multiply-adds", total, counter.get_total_flops() / 2)  # PyTorch counts two operations
    print_table(("layer", "million multiply-adds", "ms", "billion a second"), table_list)
    side = 4096 if image_4d.is_cuda else 512  # large enough to keep all of the device busy
    matrix_2d = torch.rand(side, side, device=image_4d.device)
    rate = side ** 3 / best_ms(lambda: matrix_2d @ matrix_2d) / 1e6
    folded = model.fold_batch_norm(network)
    print(f"   Together {total / 1e6:.1f} million; a product of matrices does {rate:,.0f} billion "
          f"a second.\n   In one go {best_ms(lambda: network(image_4d)):.1f} ms; with BN folded "
          f"into the convolutions {best_ms(lambda: folded(image_4d)):.1f} ms.")


def print_receptive_field(row_list) -> np.ndarray:
    """4. RECEPTIVE FIELD: a layer adds (kernel - 1) x jump to what a cell sees, moves its centre by
    ((kernel - 1)/2 - padding) x jump, and multiplies the jump to the next cell by its stride. The
    first cell's prior is at jump/2. Measured by the gradient on random pictures.
    """
    # More cells than one sees, and an odd number: one is in the middle.
    cells = row_list[-1]["size"] // row_list[-1]["jump"] // 2 * 2 + 3
    side = cells * row_list[-1]["jump"]
    images_4d = random_pictures(24, side, side).to(pick_device()).float()  # [24, 3, 224, 224]
    images_4d.requires_grad_()
    feature_4d, table_list = images_4d, []
    for row in row_list:
        feature_4d = row["layer"](feature_4d)  # [24, 5, 7, 7] at the end
        if row["kind"] == "conv":
            cell, jump = feature_4d.shape[-1] // 2, row["jump"]
            middle = feature_4d[:, :, cell, cell].sum()
            gradient_4d, = torch.autograd.grad(middle, images_4d, retain_graph=True)
            # Back to numpy: cpu() fetches the numbers, since numpy sees no card's memory. (A tensor
            # with a graph behind it, as feature_4d, would need detach() first.)
            map_2d_array = gradient_4d.abs().mean(dim=(0, 1)).cpu().numpy()  # [224, 224]
            column_1d_array = np.flatnonzero(map_2d_array.any(axis=0))  # those with any gradient
            seen = len(column_1d_array)
            off = float(column_1d_array.mean()) + 0.5 - (cell + 0.5) * jump
            check(f"what {row['name']} sees", (row["size"], row["centre"] - jump / 2), (seen, off))
            table_list.append((row["name"], jump, row["centre"], jump / 2, off, row["size"], seen))
    print_table(("layer", "jump", "centre", "prior", "off by gradient", "sees, px", "by gradient"),
                table_list)
    return map_2d_array


def print_batch_norm(row_list, image_4d) -> None:
    """5. BN BY ITSELF, on 1, 3, 5, 7. In training: (x - mean)/sqrt(variance) of the batch, mean 4,
    variance (9 + 1 + 1 + 9)/4 = 5. A step also moves two averages a tenth of the way:
      mean      0 to 0.9 x 0 + 0.1 x 4    = 0.4
      variance  1 to 0.9 x 1 + 0.1 x 20/3 = 1.567  (here divided by n - 1)
    In evaluation it uses these. Then the network without its head, in two orders: which keeps less?
    """
    norm = nn.BatchNorm2d(1).requires_grad_(False)
    value_1d = torch.tensor([1.0, 3.0, 5.0, 7.0])
    trained_1d = norm.train()(value_1d.view(1, 1, 1, 4)).flatten()
    used_1d = norm.eval()(value_1d.view(1, 1, 1, 4)).flatten()
    trained_by_hand_1d = (value_1d - 4) / math.sqrt(5 + norm.eps)
    used_by_hand_1d = (value_1d - 0.4) / math.sqrt(0.9 + 0.1 * 20 / 3 + norm.eps)
    check("BN in training", trained_by_hand_1d, trained_1d, 1e-5)
    check("BN in evaluation", used_by_hand_1d, used_1d, 1e-5)
    table_2d = torch.stack([value_1d, trained_by_hand_1d, trained_1d, used_by_hand_1d, used_1d])
    print_table(("x", "training: (x - 4)/sqrt(5)", "by PyTorch",
                 "evaluation: (x - 0.4)/sqrt(1.567)", "by PyTorch"), table_2d.T.tolist())
    print_orders([row["layer"] for row in row_list[:-1] if row["kind"] == "conv"], image_4d)


def print_orders(conv_list, image_4d) -> None:
    """The end of chapter 5. A BN before the first convolution works on all of the picture."""
    table_list = []
    for order in ("conv, BN, ReLU", "BN, ReLU, conv"):
        layer_list = []
        for conv in map(copy.deepcopy, conv_list):
            if order.startswith("conv"):
                layer_list += [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)]
            else:
                layer_list += [nn.BatchNorm2d(conv.in_channels), nn.ReLU(inplace=True), conv]
        chain = nn.Sequential(*layer_list).to(image_4d.device)
        parameters = sum(parameter.numel() for parameter in chain.parameters())
        saved = sum(saved_bytes(layer_list, image_4d))
        with torch.no_grad():
            ms = best_ms(lambda: chain(image_4d.float()))
        table_list.append((order, parameters, saved / MB, ms))
    print_table(("order", "parameters", "MB saved for backward", "ms forward"), table_list)


def predict_memory(row_list, batch: int) -> tuple[list[int], int]:
    """Bytes that each layer saves for backward; and the most that these and gradients take.

    Convolution and BN save their input, BN also its batch's mean and 1 / deviation, ReLU its
    output: that is the next convolution's input, so it counts once. Backward walks from the end;
    what later layers saved is free again. At a layer it needs what this one and those before it
    saved, and the gradients of its output and input: the largest sum is the peak.
    """
    saved_list, peak, kind_before = [], 0, None
    for row in row_list:
        bytes_in, bytes_out = (4 * batch * math.prod(row[key]) for key in ("in_shape", "out_shape"))
        if row["kind"] == "ReLU":
            saved = bytes_out
        else:
            saved = 0 if kind_before == "ReLU" else bytes_in
        saved_list.append(saved + (2 * 4 * row["out_shape"][0] if row["kind"] == "BN" else 0))
        gradient_in = bytes_in if kind_before else 0  # nobody asks for the picture's gradient
        peak = max(peak, sum(saved_list) + bytes_out + gradient_in)
        kind_before = row["kind"]
    return saved_list, peak


def saved_bytes(layer_list, images_4d) -> list[int]:
    """Bytes that autograd saves in each layer: a hook sees all that is put aside for backward.

    Two tensors on one piece of memory count once, parameters and BN's averages not at all.
    """
    known_set = {tensor.untyped_storage().data_ptr() for layer in layer_list
                 for tensor in (*layer.parameters(), *layer.buffers())}
    saved_list = []

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known_set:
            known_set.add(storage.data_ptr())
            saved_list[-1] += storage.nbytes()
        return tensor

    feature_4d = images_4d.float()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        for layer in layer_list:
            saved_list.append(0)
            feature_4d = layer(feature_4d)  # it holds all before it: no memory is used twice
    return saved_list


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def print_memory(row_list, network, batch: int) -> None:
    """6. MEMORY of a training step: convolution and BN save their input, ReLU its output.
    A layer that is not listed shares a tensor with the one above it.
    """
    network.train()
    images_4d = random_pictures(batch, *row_list[0]["in_shape"][1:]).to(pick_device())
    measured_list = saved_bytes([row["layer"] for row in row_list], images_4d)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0)  # it changes nothing
    for _ in range(2):  # the first step makes gradients and averages, the second is as all others
        if images_4d.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        network(images_4d).sum().backward()
        optimizer.step()
    parameter_list, state_list = list(network.parameters()), list(optimizer.state.values())
    weights = 4 * sum(row["parameters"] for row in row_list)
    table_list = [
        ("weights", weights, bytes_of(parameter_list)),
        ("gradients, one a weight", weights, bytes_of(p.grad for p in parameter_list)),
        ("Adam: two averages a weight, a counter a tensor", 2 * weights + 4 * len(parameter_list),
         bytes_of(tensor for state in state_list for tensor in state.values())),
        ("BN: two averages a channel, an int64 counter",
         sum(2 * 4 * row["out_shape"][0] + 8 for row in row_list if row["kind"] == "BN"),
         bytes_of(network.buffers()))]
    fixed = sum(by_formula for _, by_formula, _ in table_list)
    table_list.append(("the batch as uint8", images_4d.numel(), images_4d.nbytes))
    saved_list, activation_peak = predict_memory(row_list, batch)
    table_list += [(f"saved by {row['name']}", saved, measured) for row, saved, measured
                   in zip(row_list, saved_list, measured_list) if saved or measured]
    table_list.append(("saved by all layers", sum(saved_list), sum(measured_list)))
    for name, by_formula, by_pytorch in table_list:
        check(f"bytes, {name}", by_formula, by_pytorch, 0.01)
    peak = fixed + images_4d.nbytes + activation_peak
    table_list.append(("at most, with the gradients of activations", peak,
                       torch.cuda.max_memory_allocated() if images_4d.is_cuda else "no GPU here"))
    print_table((f"{batch} pictures", "bytes by formula", "by PyTorch", "MB"),
                [(*line, line[1] / MB) for line in table_list])
    fits = (CARD - fixed) * batch // (peak - fixed)  # peak - fixed is what the pictures need
    print(f"   A card of 4 GB, of which CUDA takes half a GB, holds a batch of {fits:,}.")


def print_bytes(batch: int, height: int, width: int) -> None:
    """7. UINT8 AGAINST FLOAT32: bytes travel, a quarter as much, and become float32 on arrival."""
    uint8_4d, table_list = random_pictures(batch, height, width), []  # [8, 3, 1920, 320]
    here_4d = uint8_4d.to(pick_device())
    for images_4d in (uint8_4d, uint8_4d.float()):
        ms = best_ms(lambda: images_4d.to(here_4d.device, copy=True))
        table_list.append((str(images_4d.dtype), images_4d.nbytes / MB, ms))
    print_table((f"{batch} pictures", "MB", f"ms to {here_4d.device}"), table_list)
    print(f"   The batch lives on {uint8_4d.device}, its copy on {here_4d.device}, where float32 "
          f"takes {best_ms(here_4d.float):.1f} ms to make.")


def print_readers(image_3d_array) -> None:
    """8. PIL AGAINST CV2: both read the same JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image_3d_array).save(buffer, "JPEG", quality=90)
    print(f"   Pillow gives RGB, in {best_ms(lambda: read_image(buffer)):.1f} ms.")
    try:
        import cv2
    except ImportError:
        print("   cv2 is not installed; pip install opencv-python-headless, and run this again.")
        return
    jpeg_1d_array = np.frombuffer(buffer.getvalue(), np.uint8)
    ms = best_ms(lambda: cv2.imdecode(jpeg_1d_array, cv2.IMREAD_COLOR))
    rgb_3d_array = cv2.imdecode(jpeg_1d_array, cv2.IMREAD_COLOR)[..., ::-1]
    same = (read_image(buffer) == rgb_3d_array).all(axis=2).mean()
    print(f"   cv2 gives BGR, in {ms:.1f} ms; turned round by array[..., ::-1], {same:.1%} of the "
          "pixels are Pillow's.")


def print_threads() -> None:
    """9. THREADS: two jobs, first in turn, then in two threads. Sleep, numpy and PyTorch let go of
    Python's lock while they work; plain Python holds it, so two pieces of it take turns.
    """
    torch.set_num_threads(1)  # leaves a core to the other job; this chapter is the last
    values_1d_array, matrix_2d = np.random.default_rng(0).random(500_000), torch.rand(500, 500)
    job_dict = {"sleep": lambda: time.sleep(0.02),
                "numpy": lambda: np.sort(values_1d_array),
                "PyTorch": lambda: matrix_2d @ matrix_2d @ matrix_2d @ matrix_2d,
                "plain Python": lambda: sum(number * number for number in range(300_000))}

    def in_two_threads(job):
        other = threading.Thread(target=job)
        other.start()
        job()
        other.join()

    print_table(("two jobs of", "ms in turn", "ms in two threads"), [
        (name, best_ms(lambda: (job(), job())), best_ms(lambda: in_two_threads(job)))
        for name, job in job_dict.items()])


# ---------------------------------------------------------------- pictures

def draw_layers(path: Path, row_list) -> None:
    """Parameters beside memory; a convolution together with its BN and ReLU."""
    conv_list = [index for index, row in enumerate(row_list) if row["kind"] == "conv"]
    figure = Figure(figsize=(9, 1 + 0.36 * len(conv_list)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title, colour, cost_list in (
            (left, "parameters, thousands", "tab:blue", [row["parameters"] / 1e3
                                                         for row in row_list]),
            (right, "saved for backward, MB a picture", "tab:orange",
             [saved / MB for saved in predict_memory(row_list, batch=1)[0]])):
        value_list = np.add.reduceat(cost_list, conv_list)  # sums from each conv to the next
        bars = axes.barh([row_list[index]["name"] for index in conv_list], value_list, color=colour)
        axes.bar_label(bars, [f"{value:.1f}" for value in value_list], padding=3)
        axes.set(title=f"{title}: {sum(value_list):.1f}", xlim=(0, 1.15 * max(value_list)))
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    save_figure(figure, path)


def draw_receptive_field(path: Path, map_2d_array, size: int) -> None:
    """What the middle cell looks at; size: px that it can see."""
    half = len(map_2d_array) / 2
    axes = Figure(figsize=(6.5, 5.5), layout="constrained").subplots()
    image = axes.imshow(np.sqrt(map_2d_array / map_2d_array.max()), cmap="magma",
                        extent=(-half, half, half, -half))
    axes.figure.colorbar(image, label="root of |gradient|, largest = 1")
    for side, colour, name in ((size, "tab:green", "can see"), (CELL, "tab:red", "its own cell")):
        axes.add_patch(Rectangle((-side / 2, -side / 2), side, side, fill=False, edgecolor=colour,
                                 linewidth=2, label=f"{name}: {side} px"))
    axes.set(xlabel="px from the prior", ylabel="px from the prior",
             title="what one cell looks at, on random pictures")
    axes.legend(loc="upper left")
    save_figure(axes.figure, path)


# ---------------------------------------------------------------- the program

def run_chapter(chapter, *arguments):
    print(f"\n{inspect.getdoc(chapter)}")
    return chapter(*arguments)


def main() -> None:
    parser = make_parser("Analyse the network layer by layer.", "folder with weights and data set")
    parser.add_argument("--batch", type=int, default=8, help="pictures in chapters 6 and 7")
    options = parser.parse_args()
    if not 1 <= options.batch <= 100:  # 30 MB of memory a picture
        parser.error("--batch must lie between 1 and 100")
    torch.manual_seed(0)
    device = pick_device()
    try:
        network, _ = model.load_weights(options.data, device)
    except UserError as error:  # those of another LAYER_LIST
        print(f"{error}\nso this is an untrained network: shapes, counts and bytes are the same")
        network = model.KeypointNet(class_count=3).to(device).eval()
    image_3d_array, _ = model.example(options.data)  # the picture that 02_model.py shows
    # At least two cells a side: in training, BN needs more than one number a channel.
    height, width = (max(2 * CELL, round_up_to_cell(side)) for side in image_3d_array.shape[:2])
    image_3d = torch.from_numpy(pad_image(image_3d_array, height, width))  # [1920, 320, 3]
    image_4d = image_3d.to(device).permute(2, 0, 1)[None]  # [1, 3, 1920, 320]
    print(f"a picture: {image_4d.dtype} {list(image_4d.shape)} on {image_4d.device}, "
          f"{torch.get_num_threads()} threads")

    row_list = describe([*network.body, network.head], *image_4d.shape[1:])
    row_list[-1]["name"] = "head"
    with torch.no_grad():
        run_chapter(print_shapes, row_list, image_4d)
        run_chapter(print_parameters, row_list, network)
        run_chapter(print_work, row_list, network, image_4d)
    map_2d_array = run_chapter(print_receptive_field, row_list)
    run_chapter(print_batch_norm, row_list, image_4d)
    run_chapter(print_memory, row_list, network, options.batch)
    run_chapter(print_bytes, options.batch, height, width)
    run_chapter(print_readers, image_3d_array)
    run_chapter(print_threads)
    folder, size = options.data / "results", row_list[-1]["size"]
    draw_layers(folder / "layers.png", row_list)
    draw_receptive_field(folder / "receptive_field.png", map_2d_array, size)
    print(f"\nwrote layers.png and receptive_field.png to {folder}")
    again = command("06_model_analysis.py", options.data)
    print(f"next: change a line of LAYER_LIST in 02_model.py, and see the price with {again}")


if __name__ == "__main__":
    run_main(main)
