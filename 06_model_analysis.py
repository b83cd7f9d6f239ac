"""Lesson 6: where the network's parameters, work, time and memory go, layer by layer.

    python 06_model_analysis.py              # memory for a batch of 8 whole images
    python 06_model_analysis.py --batch 2    # for a batch of 2

Reads   the data folder's weights; where none fit, an untrained network will do. An image of
        data/sample; with --data my_data one of yours, and so its size.
Writes  data/results/layers.png and data/results/receptive_field.png.
Time    ten seconds on two CPU cores.
See     six chapters. Each computes by formula, checks that PyTorch says the same, and shows both;
        a difference is an error. A MB is 2^20 bytes.
Next    change a line of LAYER_LIST in 02_model.py and run this again: what did it cost?
"""

import importlib
import inspect
import math
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import (CELL, UserError, command, make_parser, pad_image, print_table, replacing,
                    run_main)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

MB, GB = 2 ** 20, 2 ** 30  # bytes
CARD = 4 * GB - GB // 2  # bytes of a small card, less the half GB that CUDA itself takes
RUNS = 20  # timed calls; the fastest is shown: other programs can only slow a call down


# ---------------------------------------------------------------- compute: by formula alone

def describe_convolution(conv: nn.Conv2d, in_shape: tuple) -> dict:
    """Shape, parameters and work of a convolution; in_shape: channels, height, width.

    >>> row_dict = describe_convolution(nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 64, 32))
    >>> row_dict["out_shape"], row_dict["formula"], row_dict["parameters"]
    ((8, 32, 16), '3x3x3x8 + 8', 224)
    >>> row_dict["multiply_adds"]  # 8x32x16 numbers come out, each a sum of 3x3x3 products
    110592
    """
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    # The kernel's first place takes `kernel` px of the padded side, each further one `stride` more.
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in in_shape[1:])
    channels_in, channels_out = in_shape[0] // conv.groups, conv.out_channels
    weights = kernel * kernel * channels_in * channels_out
    biases = channels_out if conv.bias is not None else 0
    formula = f"{kernel}x{kernel}x{channels_in}x{channels_out}" + (f" + {biases}" if biases else "")
    return {"kind": "conv", "geometry": (kernel, stride, padding), "formula": formula,
            "out_shape": (channels_out, height, width), "parameters": weights + biases,
            "multiply_adds": weights * height * width}  # every place uses each weight once


def describe(layer_list, channels: int, height: int, width: int) -> list[dict]:
    """What formulas say of each layer of a chain, a dict each. Raises UserError."""
    row_list, geometry_list, shape = [], [], (channels, height, width)
    for layer in layer_list:
        row_dict = {"layer": layer, "in_shape": shape, "out_shape": shape, "formula": "",
                    "parameters": 0, "multiply_adds": 0}
        if isinstance(layer, nn.Conv2d):
            row_dict |= describe_convolution(layer, shape)
            geometry_list.append(row_dict["geometry"])
            size, jump, centre = model.receptive_field(geometry_list)
            row_dict |= {"size": size, "jump": jump, "centre": centre}
        elif isinstance(layer, nn.BatchNorm2d):  # a weight and a bias per channel
            row_dict |= {"kind": "BN", "formula": f"2x{shape[0]}", "parameters": 2 * shape[0]}
        elif isinstance(layer, nn.ReLU):
            row_dict["kind"] = "ReLU"
        else:
            raise UserError(f"02_model.py has a {type(layer).__name__}, which describe() in "
                            "06_model_analysis.py does not know; add it there")
        row_dict["name"] = f"{row_dict['kind']} {len(geometry_list)}"
        row_list.append(row_dict)
        shape = row_dict["out_shape"]
    return row_list


def float_bytes(batch: int, shape: tuple) -> int:
    return 4 * batch * math.prod(shape)  # a float32 number takes 4 bytes


def predict_saved(row_list, batch: int) -> list[int]:
    """Bytes that each layer saves for the backward pass.

    Convolution and BN save their input, BN also its batch's mean and 1 / deviation; ReLU saves its
    output. That is the next layer's input and counts once.
    """
    saved_list, kind_before = [], None
    for row_dict in row_list:
        kind, channels = row_dict["kind"], row_dict["out_shape"][0]
        shape = row_dict["out_shape"] if kind == "ReLU" else row_dict["in_shape"]
        saved = 0 if kind_before == "ReLU" else float_bytes(batch, shape)
        saved_list.append(saved + (2 * 4 * channels if kind == "BN" else 0))
        kind_before = kind
    return saved_list


def predict_peak(row_list, batch: int) -> int:
    """The most bytes that saved tensors and gradients of activations take together.

    Backward walks from the last layer to the first; what later layers saved is free again. At a
    layer it needs what this one and those before it saved, and the gradients of output and input.
    """
    peak = saved = 0
    for row_dict, saved_here in zip(row_list, predict_saved(row_list, batch)):
        saved += saved_here
        gradients = float_bytes(batch, row_dict["out_shape"])
        if row_dict is not row_list[0]:  # nobody asks for the image's gradient
            gradients += float_bytes(batch, row_dict["in_shape"])
        peak = max(peak, saved + gradients)
    return peak


# ---------------------------------------------------------------- check: ask PyTorch

def check(what: str, by_formula, by_pytorch, tolerance: float = 0.0) -> None:
    """End the script where the two differ by more than `tolerance`, a share."""
    if not np.allclose(by_formula, by_pytorch, rtol=tolerance, atol=0):
        raise UserError(f"{what}: the formula says {by_formula}, PyTorch {by_pytorch}; mend the "
                        "formula in 06_model_analysis.py, or what was changed in 02_model.py")


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    """uint8 `[N, 3, height, width]`, in memory as images are: a pixel's colours side by side."""
    images_4d = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    return images_4d.permute(0, 3, 1, 2).to(model.pick_device())  # [N, 3, 1920, 320]


def times_of(function) -> list[float]:
    """ms of RUNS calls, after three that fetch memory and fill caches."""
    time_list = []
    for _ in range(3 + RUNS):
        start_time = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a GPU works on its own: without waiting, nothing is timed
        time_list.append((time.perf_counter() - start_time) * 1e3)
    return time_list[3:]


def look_back(feature_4d, images_4d, jump: int) -> tuple[np.ndarray, int, float]:
    """What the middle cell sees: |gradient| of each pixel, px across, px that its middle is off."""
    rows, columns = feature_4d.shape[2:]
    middle = feature_4d[:, :, rows // 2, columns // 2].sum()
    gradient_4d, = torch.autograd.grad(middle, images_4d, retain_graph=True)  # [24, 3, 224, 224]
    # Back to numpy: cpu() fetches the numbers, since numpy sees no card's memory. (A tensor with a
    # graph behind it, as feature_4d, would need detach() first.)
    map_2d_array = gradient_4d.abs().mean(dim=(0, 1)).cpu().numpy()  # [224, 224]
    column_1d_array = np.flatnonzero(map_2d_array.any(axis=0))  # those with any gradient
    prior = (columns // 2 + 0.5) * jump  # x of the middle cell's
    return map_2d_array, len(column_1d_array), float(column_1d_array.mean()) + 0.5 - prior


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


def train_two_steps(network, images_4d) -> torch.optim.Optimizer:
    """The first step makes gradients and averages; the second is as all others."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0)  # it changes no weight
    for _ in range(2):
        if images_4d.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        network(images_4d).sum().backward()
        optimizer.step()
    return optimizer


# ---------------------------------------------------------------- show: the chapters
# Each chapter's docstring is printed as its heading.

def print_shapes(row_list, image_4d) -> None:
    """1. SHAPES: (side + 2 x padding - kernel)/stride + 1, rounded down; BN, ReLU change none."""
    feature_4d, table_list = image_4d.float(), [("layer", "height", "comes out", "MB")]
    for row_dict in row_list:
        feature_4d = row_dict["layer"](feature_4d)
        check(f"shape after {row_dict['name']}", row_dict["out_shape"], feature_4d.shape[1:])
        if row_dict["kind"] == "conv":
            kernel, stride, padding = row_dict["geometry"]
            how = f"({row_dict['in_shape'][1]} + 2x{padding} - {kernel})/{stride} + 1"
            shape = " x ".join(map(str, row_dict["out_shape"]))
            table_list.append((row_dict["name"], how, shape, feature_4d.nbytes / MB))
    print_table(table_list)


def print_parameters(row_list, network) -> None:
    """2. PARAMETERS: kernel x kernel x channels in x channels out, and two per channel for BN.
    BN would subtract a bias, so only the head, which no BN follows, has one.
    """
    total = sum(row_dict["parameters"] for row_dict in row_list)
    table_list = [("layer", "formula", "by formula", "by PyTorch", "share")]
    for row_dict in row_list:
        name, by_formula = row_dict["name"], row_dict["parameters"]
        counted = sum(parameter.numel() for parameter in row_dict["layer"].parameters())
        check(f"parameters of {name}", by_formula, counted)
        if counted:
            share = f"{counted / total:.1%}"
            table_list.append((name, row_dict["formula"], by_formula, counted, share))
    counted = sum(parameter.numel() for parameter in network.parameters())
    check("parameters of all layers", total, counted)
    print_table([*table_list, ("together", "", total, counted, "100.0%")])


def print_work(row_list, network, image_4d) -> None:
    """3. WORK AND TIME of one image. BN and ReLU multiply little, but move all numbers to and fro.
    """
    total = sum(row_dict["multiply_adds"] for row_dict in row_list)
    with FlopCounterMode(display=False) as counter:
        network(image_4d)
    check("multiply-adds", total, counter.get_total_flops() / 2)  # PyTorch counts two operations
    feature_4d = image_4d.float()
    table_list = [("layer", "million multiply-adds", "ms", "billion a second")]
    for row_dict in row_list:
        if row_dict["kind"] == "conv":
            work, ms = row_dict["multiply_adds"], min(times_of(lambda: row_dict["layer"](feature_4d)))
            table_list.append((row_dict["name"], work / 1e6, ms, work / ms / 1e6))
        feature_4d = row_dict["layer"](feature_4d)
    print_table(table_list)
    side = 4096 if image_4d.is_cuda else 512  # large enough to keep all of the device busy
    matrix_2d = torch.rand(side, side, device=image_4d.device)
    rate = side ** 3 / min(times_of(lambda: matrix_2d @ matrix_2d)) / 1e6
    whole_list = times_of(lambda: network(image_4d))
    folded = model.fold_batch_norm(network)
    print(f"   Together {total / 1e6:.1f} million; a product of matrices does {rate:,.0f} billion a "
          f"second.\n   The whole network takes {min(whole_list):.1f} ms; with BN folded into the "
          f"convolutions {min(times_of(lambda: folded(image_4d))):.1f} ms.")
    first, second = (np.median(half) for half in np.array_split(whole_list, 2))
    if max(first, second) > 4 / 3 * min(first, second):
        print("   The machine is busy: two halves of the runs differ by more than a third. These "
              "times mean\n   little.")


def print_receptive_field(row_list) -> np.ndarray:
    """4. RECEPTIVE FIELD: a layer adds (kernel - 1) x jump to what a cell sees, moves its centre by
    ((kernel - 1)/2 - padding) x jump, and multiplies the jump to the next cell by its stride. The
    first cell's prior is at jump/2. Measured by the gradient on random images.
    """
    # More cells than one sees, and an odd number: one is in the middle.
    cells = row_list[-1]["size"] // row_list[-1]["jump"] // 2 * 2 + 3
    side = cells * row_list[-1]["jump"]
    images_4d = random_images(24, side, side).float().requires_grad_()  # [24, 3, 224, 224]
    feature_4d, table_list = images_4d, [
        ("layer", "jump", "centre", "prior", "off by gradient", "sees, px", "by gradient")]
    for row_dict in row_list:
        feature_4d = row_dict["layer"](feature_4d)  # [24, 5, 7, 7] at the end
        if row_dict["kind"] == "conv":
            size, jump, centre = row_dict["size"], row_dict["jump"], row_dict["centre"]
            map_2d_array, seen, off = look_back(feature_4d, images_4d, jump)
            check(f"what {row_dict['name']} sees", (size, centre - jump / 2), (seen, off))
            table_list.append((row_dict["name"], jump, centre, jump / 2, off, size, seen))
    print_table(table_list)
    return map_2d_array


def print_batch_norm() -> None:
    """5. BN BY ITSELF, on 1, 3, 5, 7. In training: (x - mean)/sqrt(variance) of the batch, mean 4,
    variance (9 + 1 + 1 + 9)/4 = 5. A step also moves two averages a tenth of the way:
      mean      0 to 0.9 x 0 + 0.1 x 4    = 0.4
      variance  1 to 0.9 x 1 + 0.1 x 20/3 = 1.567  (here divided by n - 1)
    In evaluation it uses these.
    """
    norm = nn.BatchNorm2d(1).requires_grad_(False)
    value_1d = torch.tensor([1.0, 3.0, 5.0, 7.0])
    trained_by_hand_1d = (value_1d - 4) / math.sqrt(5 + norm.eps)
    used_by_hand_1d = (value_1d - 0.4) / math.sqrt(0.9 + 0.1 * 20 / 3 + norm.eps)
    trained_1d = norm.train()(value_1d.view(1, 1, 1, 4)).flatten()
    used_1d = norm.eval()(value_1d.view(1, 1, 1, 4)).flatten()
    check("BN in training", trained_by_hand_1d, trained_1d, 1e-5)
    check("BN in evaluation", used_by_hand_1d, used_1d, 1e-5)
    table_2d = torch.stack([value_1d, trained_by_hand_1d, trained_1d, used_by_hand_1d, used_1d])
    print_table([("x", "training: (x - 4)/sqrt(5)", "by PyTorch",
                  "evaluation: (x - 0.4)/sqrt(1.567)", "by PyTorch"), *table_2d.T.tolist()])


def fixed_memory(row_list, network, optimizer) -> list[tuple]:
    """What a training run holds whatever its batch: name, bytes by formula, by PyTorch."""
    weights = 4 * sum(row_dict["parameters"] for row_dict in row_list)
    parameter_list, state_list = list(network.parameters()), list(optimizer.state.values())
    return [
        ("weights", weights, bytes_of(parameter_list)),
        ("gradients, one a weight", weights, bytes_of(p.grad for p in parameter_list)),
        ("Adam: two averages a weight, a counter a tensor", 2 * weights + 4 * len(parameter_list),
         bytes_of(tensor for state_dict in state_list for tensor in state_dict.values())),
        ("BN: two averages a channel, an int64 counter",
         sum(2 * 4 * row_dict["out_shape"][0] + 8 for row_dict in row_list
             if row_dict["kind"] == "BN"), bytes_of(network.buffers()))]


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def print_memory(row_list, network, batch: int) -> None:
    """6. MEMORY of a training step: convolution and BN save their input, ReLU its output. A layer
    that is not listed shares a tensor with the one above it. Images travel as uint8, in a quarter
    of the bytes, and become float32 on arrival.
    """
    network.train()
    images_4d = random_images(batch, *row_list[0]["in_shape"][1:])
    measured_list = saved_bytes([row_dict["layer"] for row_dict in row_list], images_4d)
    table_list = fixed_memory(row_list, network, train_two_steps(network, images_4d))
    fixed = sum(by_formula for _, by_formula, _ in table_list)
    table_list.append(("the batch as uint8", images_4d.numel(), images_4d.nbytes))
    saved_list = predict_saved(row_list, batch)
    table_list += [(f"saved by {row_dict['name']}", saved, measured) for row_dict, saved, measured
                   in zip(row_list, saved_list, measured_list) if saved or measured]
    table_list.append(("saved by all layers", sum(saved_list), sum(measured_list)))
    for name, by_formula, by_pytorch in table_list:
        check(f"bytes, {name}", by_formula, by_pytorch, 0.01 if images_4d.is_cuda else 0.0)
    of_images = images_4d.nbytes + predict_peak(row_list, batch)
    table_list.append(("at most, with the gradients of activations", fixed + of_images,
                       torch.cuda.max_memory_allocated() if images_4d.is_cuda else "no GPU here"))
    print_table([(f"{batch} images", "bytes by formula", "by PyTorch", "MB"),
                 *((*line, line[1] / MB) for line in table_list)])
    print("   A card of 4 GB, of which CUDA takes half a GB, holds a batch of "
          f"{(CARD - fixed) * batch // of_images:,}.")


# ---- The lesson ends here; what follows makes it comfortable to use.

def draw_layers(path: Path, row_list) -> None:
    """Parameters beside memory; a convolution together with its BN and ReLU."""
    conv_list = [index for index, row_dict in enumerate(row_list) if row_dict["kind"] == "conv"]
    name_list = [row_list[index]["name"] for index in conv_list]
    figure = Figure(figsize=(9, 1 + 0.36 * len(conv_list)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title, colour, cost_list in (
            (left, "parameters, thousands", "tab:blue",
             [row_dict["parameters"] / 1e3 for row_dict in row_list]),
            (right, "saved for backward, MB an image", "tab:orange",
             [saved / MB for saved in predict_saved(row_list, batch=1)])):
        value_list = np.add.reduceat(cost_list, conv_list)  # sums from each conv to the next
        bars = axes.barh(name_list, value_list, color=colour)
        axes.bar_label(bars, [f"{value:.1f}" for value in value_list], padding=3)
        axes.set(title=f"{title}: {sum(value_list):.1f}", xlim=(0, 1.15 * max(value_list)))
    left.invert_yaxis()
    save(figure, path)
