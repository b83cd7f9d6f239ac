"""Lesson 6: where the network's parameters, work, milliseconds and memory go, layer by layer, predicted and then measured.

    python 06_model_analysis.py              # memory for a batch of 8 whole pictures
    python 06_model_analysis.py --batch 2    # for a batch of 2

Reads   data/weights.pt (else data/pretrained.pt; where they do not fit LAYER_LIST it takes an untrained network), and a
        picture of data/sample, if there.
Writes  data/results/layers.png (parameters and memory) and data/results/receptive_field.png.
Time    half a minute on two CPU cores.
See     nine short chapters. What a formula says stands beside what PyTorch says; if they differ, it ends with an error.
Next    change a line of LAYER_LIST in 02_model.py and run this again: what did it cost?

Words: MB are 2^20 bytes; a float32 number takes 4 bytes, a uint8 number 1. Activations are what the layers give out.
"""

import argparse
import copy
import importlib
import io
import itertools
import json
import math
import os
import queue
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import (CELL, DATA_FOLDER, IMAGE_SUFFIXES, UserError, pick_device, read_image, replacing, round_up_to_cell, run_main,
                    time_calls)

# A module's name cannot start with a digit in an import statement; importlib takes any name.
model = importlib.import_module("02_model")

HEIGHT, WIDTH = 1920, 320  # px of a picture, where no data set says otherwise
CROP, CROP_BATCH = 128, 16  # px and crops a step, as 03_train.py trains
CARD = 4 * 2 ** 30  # bytes; the graphics card of the question "which batch fits?"
CARD_TAKEN = 2 ** 29  # bytes that CUDA's own code takes before the first tensor; between 0.3 and 0.6 GB on most cards
RUNS = 15  # calls whose fastest is quoted
FEED_STEPS = 15  # steps of each row of the thread comparison
QUEUE_SIZE = 4  # batches
MB = 2 ** 20


def check(what: str, predicted, measured, tolerance: float = 0.0) -> None:
    """Nothing here is believed: a formula that PyTorch contradicts ends the script. tolerance: a share of `measured`."""
    if not (predicted == measured if tolerance == 0 else abs(predicted - measured) <= tolerance * abs(measured)):
        raise UserError(f"{what}: the formula says {predicted}, PyTorch {measured}; mend the formula in 06_model_analysis.py, "
                        "which does not know what was changed in 02_model.py")


def best_ms(function, device) -> float:
    """Fastest of RUNS calls, in ms: other programs can only slow one down."""
    return min(time_calls(function, device, RUNS))


# ---------------------------------------------------------------- formulas; none of them asks PyTorch

def describe(layer_list, channels: int, height: int, width: int) -> list[dict]:
    """What formulas say of each layer: a dict with name, shapes, parameters, multiply-adds and receptive field.

    >>> row, = describe([nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1)], 3, 64, 32)
    >>> row["out_shape"], row["parameters"], row["multiply_adds"]  # 8 x 3x3x3 + 8; 8 x 32 x 16 numbers of 3x3x3 products
    ((8, 32, 16), 224, 110592)
    """
    row_list, number = [], 0
    size, jump, centre = 1, 1, 0.5  # a pixel of the picture sees itself, is 1 px from the next, and its centre is at 0.5
    for layer in layer_list:
        row = {"layer": layer, "in_shape": (channels, height, width), "parameters": 0, "multiply_adds": 0}
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            number += 1
            kernel, stride, padding = (value[0] if isinstance(value, tuple) else value
                                       for value in (layer.kernel_size, layer.stride, layer.padding))
            row.update(kernel=kernel, stride=stride, padding=padding)
            # How many places the kernel can stand at: the padded length less the kernel, in strides, and the first place.
            height, width = (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1
            size += (kernel - 1) * jump
            centre += ((kernel - 1) / 2 - padding) * jump
            jump *= stride
        if isinstance(layer, nn.Conv2d):
            row["name"] = f"conv {number}"
            weights_each = kernel * kernel * channels // layer.groups  # for one number of the output
            channels = layer.out_channels
            row["parameters"] = weights_each * channels + (channels if layer.bias is not None else 0)
            row["multiply_adds"] = weights_each * channels * height * width
        elif isinstance(layer, nn.BatchNorm2d):
            row["name"], row["parameters"] = f"BN {number}", 2 * channels
        elif isinstance(layer, nn.MaxPool2d):
            row["name"] = f"pool {number}"
        elif isinstance(layer, nn.ReLU):
            row["name"] = f"ReLU {number}"
        else:
            raise UserError(f"02_model.py has a {type(layer).__name__}; describe() in 06_model_analysis.py needs its formulas")
        row.update(block=number, out_shape=(channels, height, width), size=size, jump=jump, centre=centre)
        row_list.append(row)
    return row_list


def split_blocks(row_list) -> list[list[dict]]:
    """The rows of each convolution (or pooling) together with the BN and ReLU that follow it."""
    return [list(group) for _, group in itertools.groupby(row_list, key=lambda row: row["block"])]


def predict_memory(row_list, batch: int) -> tuple[list[int], int]:
    """Bytes that each layer saves for backward, first layers first; and the most that activations and their gradients take.

    Convolution, BN and pooling save their input, BN also its batch's mean and 1 / deviation, pooling an int64 index for
    every number it gives out, ReLU its output. What a layer shares with one before it is counted there, once. An in-place
    ReLU writes over BN's output, and the next convolution's input is that same memory: three names for one tensor.

    In backward, a layer needs what it and all before it have saved, the gradient that comes in and the one that goes out.
    """
    byte_dict = {"picture": 4 * batch * math.prod(row_list[0]["in_shape"])}  # name of a piece of memory: its bytes
    current, keeps_list = "picture", []
    for row in row_list:
        layer, keeps = row["layer"], []
        if not isinstance(layer, nn.ReLU):
            keeps.append(current)
        if isinstance(layer, nn.BatchNorm2d):
            byte_dict[row["name"] + " statistics"] = 2 * 4 * row["out_shape"][0]
            keeps.append(row["name"] + " statistics")
        if isinstance(layer, nn.MaxPool2d):
            byte_dict[row["name"] + " index"] = 8 * batch * math.prod(row["out_shape"])
            keeps.append(row["name"] + " index")
        if not getattr(layer, "inplace", False):
            current = row["name"]
            byte_dict[current] = 4 * batch * math.prod(row["out_shape"])
        if isinstance(layer, nn.ReLU):
            keeps.append(current)
        keeps_list.append(keeps)
    saved_list, saved_set = [], set()
    peak = 0
    for index, (row, keeps) in enumerate(zip(row_list, keeps_list)):
        saved_list.append(sum(byte_dict[name] for name in set(keeps) - saved_set))
        saved_set |= set(keeps)
        gradient_out = 4 * batch * math.prod(row["out_shape"])
        gradient_in = 4 * batch * math.prod(row["in_shape"]) if index else 0  # nobody asks for the picture's gradient
        peak = max(peak, sum(saved_list) + gradient_out + gradient_in)
    return saved_list, peak


# ---------------------------------------------------------------- measurements

def device_memory(device) -> float:
    """Bytes of the memory that tensors on this device live in; infinite where the system does not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def random_pictures(count: int, height: int, width: int) -> torch.Tensor:
    """uint8 `[N, 3, height, width]`, in memory as pictures stand there: the three colours of a pixel side by side."""
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)


def saved_bytes(network, layer_list, images_4d) -> list[int]:
    """Bytes that autograd really saves in each layer: a hook sees every tensor that is put aside for backward.

    Two tensors on one piece of memory count once; parameters and BN's running numbers, which are there anyway, not at all.
    """
    known_set = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    saved_list, current = [0] * len(layer_list), [0]

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known_set:
            known_set.add(storage.data_ptr())
            saved_list[current[0]] += storage.nbytes()
        return tensor

    def enter(index):
        return layer_list[index].register_forward_pre_hook(lambda layer, inputs: current.__setitem__(0, index))

    handle_list = [enter(index) for index in range(len(layer_list))]
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output_4d = network(images_4d)
    for handle in handle_list:
        handle.remove()
    del output_4d  # until here it held the graph, so that no memory was given out twice
    return saved_list


def seen_area(layer_list, size: int) -> tuple[int, float]:
    """Side of the area that one cell sees, and its centre as a number of px from the cell's prior, both by gradient.

    Weights of one sign and neither BN nor ReLU: then no way from a pixel to the cell is closed, and none cancels another.
    """
    side = round_up_to_cell(2 * size)
    picture_4d = torch.zeros(1, 3, side, side, dtype=torch.float64, requires_grad=True)
    feature_4d = picture_4d
    for layer in layer_list:
        if isinstance(layer, nn.Conv2d):
            weight_4d = torch.full(layer.weight.shape, 1 / layer.weight[0].numel(), dtype=torch.float64)
            feature_4d = nn.functional.conv2d(feature_4d, weight_4d, None, layer.stride, layer.padding, groups=layer.groups)
        elif isinstance(layer, nn.MaxPool2d):
            feature_4d = nn.functional.avg_pool2d(feature_4d, layer.kernel_size, layer.stride, layer.padding)
    jump, cell = side // feature_4d.shape[-1], feature_4d.shape[-1] // 2
    feature_4d[0, 0, cell, cell].backward()
    column = picture_4d.grad[0].sum(dim=(0, 1)).nonzero()
    first, last = int(column.min()), int(column.max())
    return last - first + 1, (first + last + 1) / 2 - (cell + 0.5) * jump


def gradient_map(network, image_3d_array, size: int, count: int = 24) -> np.ndarray:
    """How much one cell's five answers change with each pixel round it: mean |gradient| over `count` places, `[side, side]`."""
    cells = min(round_up_to_cell(size) + 2 * CELL, *image_3d_array.shape[:2]) // CELL
    cells -= 1 - cells % 2  # an odd number has a middle
    side = cells * CELL
    rng = np.random.default_rng(0)
    crop_list = []
    for _ in range(count):
        top, left = (rng.integers(length - side + 1) for length in image_3d_array.shape[:2])
        crop_list.append(image_3d_array[top:top + side, left:left + side])
    images_4d = torch.from_numpy(np.stack(crop_list)).permute(0, 3, 1, 2).float()  # [24, 3, 224, 224]
    images_4d = images_4d.to(network.head.weight.device).requires_grad_()
    network(images_4d)[:, :, cells // 2, cells // 2].sum().backward()
    return images_4d.grad.abs().mean(dim=(0, 1)).cpu().numpy()


def side_with_share(map_2d_array: np.ndarray, share: float) -> int:
    """Side of the smallest square round the middle that holds this share of the map.

    >>> side_with_share(np.ones((10, 10)), 0.36)
    6
    """
    middle = len(map_2d_array) // 2
    for half in range(1, middle + 1):
        if map_2d_array[middle - half:middle + half, middle - half:middle + half].sum() >= (share - 1e-9) * map_2d_array.sum():
            return 2 * half
    return 2 * middle


# ---------------------------------------------------------------- the chapters

def print_shapes(row_list, layer_list, image_4d) -> None:
    print("\n1. SHAPES: (length + 2 x padding - kernel) / stride + 1, rounded down. BN and ReLU change no shape.")
    print(f"   {'layer':9}{'kernel':>6}{'stride':>7}{'padding':>8}   {'height':33}{'width':31}{'numbers out':>14}{'MB':>7}")
    feature_4d = image_4d.float()
    for row, layer in zip(row_list, layer_list):
        feature_4d = layer(feature_4d)
        check(f"shape after {row['name']}", row["out_shape"], tuple(feature_4d.shape[1:]))
        if "kernel" in row:
            height, width = (f"({before} + 2x{row['padding']} - {row['kernel']})/{row['stride']} + 1 = {after}"
                             for before, after in zip(row["in_shape"][1:], row["out_shape"][1:]))
            channels, rows, columns = row["out_shape"]
            print(f"   {row['name']:9}{row['kernel']:6}{row['stride']:7}{row['padding']:8}   {height:33}{width:29}"
                  f"{f'{channels}x{rows}x{columns}':>16}{4 * math.prod(row['out_shape']) / MB:7.2f}")


def print_parameters(row_list, network) -> None:
    print("\n2. PARAMETERS: a convolution has kernel x kernel x channels in weights for each channel out, BN two a channel.")
    print(f"   {'layer':9}{'convolution':>24}{'PyTorch':>10}   {'BN':>9}{'PyTorch':>9}{'share':>9}")
    total = sum(row["parameters"] for row in row_list)
    for block_row_list in split_blocks(row_list):
        text = f"   {block_row_list[0]['name']:9}"
        for row in block_row_list:
            count = sum(p.numel() for p in row["layer"].parameters())
            check(f"parameters of {row['name']}", row["parameters"], count)
            if isinstance(row["layer"], nn.Conv2d):
                bias = f" + {row['out_shape'][0]}" if row["layer"].bias is not None else ""
                channels_in = row["in_shape"][0] // row["layer"].groups
                formula = f"{row['kernel']}x{row['kernel']}x{channels_in}x{row['out_shape'][0]}{bias}"
                text += f"{formula:>24}{count:10,}   "
            elif isinstance(row["layer"], nn.BatchNorm2d):
                text += f"{'2 x ' + str(row['out_shape'][0]):>9}{count:9,}"
        print(f"{text:64}{sum(row['parameters'] for row in block_row_list) / total:9.1%}")
    check("all parameters", total, sum(p.numel() for p in network.parameters()))
    print(f"   together {total:,} by formula and by PyTorch, {4 * total / MB:.2f} MB. The head has a bias: no BN follows it.")


def print_work(row_list, network, folded, image_4d, device) -> None:
    side = 4096 if device.type == "cuda" else 512  # of a matrix that keeps all of the device busy, for about a millisecond
    matrix_2d = torch.rand(side, side, device=device)
    multiply_rate = side ** 3 / best_ms(lambda: matrix_2d @ matrix_2d, device)  # multiply-adds a ms
    source_1d, target_1d = torch.rand(2 ** 24, device=device), torch.rand(2 ** 24, device=device)  # 64 MB: no cache holds it
    copy_rate = 2 * 4 * 2 ** 24 / best_ms(lambda: target_1d.copy_(source_1d), device)  # bytes a ms; each is read and written
    print("\n3. WORK AND TIME of one picture, in ms. Predicted is the longer of two times: to multiply and to move. This\n"
          f"   machine does {multiply_rate / 1e6:,.0f} billion multiply-adds a second in a matrix product and moves "
          f"{copy_rate / 1e6:,.1f} GB/s in a copy.")
    print(f"   {'layer':9}{'million multiply-adds':>21}{'MB moved':>10}{'multiply':>10}{'move':>7}{'measured':>10}   "
          f"{'BN + ReLU: MB moved':>20}{'predicted':>11}{'measured':>10}")
    feature_4d, sum_1d_array = image_4d.float(), np.zeros(2)
    for block_row_list in split_blocks(row_list):
        text, rest_1d_array = "", np.zeros(3)
        for row in block_row_list:
            scratch_4d = feature_4d.clone()  # an in-place ReLU writes into it
            measured = best_ms(lambda: row["layer"](scratch_4d), device)
            feature_4d = row["layer"](feature_4d)
            moved = 4 * (math.prod(row["in_shape"]) + math.prod(row["out_shape"]) + row["parameters"])
            multiply, move = row["multiply_adds"] / multiply_rate, moved / copy_rate
            sum_1d_array += max(multiply, move), measured
            if "kernel" in row:
                text = f"{row['multiply_adds'] / 1e6:21.1f}{moved / MB:10.2f}{multiply:10.2f}{move:7.2f}{measured:10.2f}   "
            else:
                rest_1d_array += moved / MB, move, measured
        rest = f"{rest_1d_array[0]:20.2f}{rest_1d_array[1]:11.2f}{rest_1d_array[2]:10.2f}" if len(block_row_list) > 1 else ""
        print(f"   {block_row_list[0]['name']:9}{text}{rest}".rstrip())
    total = sum(row["multiply_adds"] for row in row_list)
    with FlopCounterMode(display=False) as counter:
        network(image_4d)
    check("multiply-adds", total, counter.get_total_flops() // 2)  # PyTorch counts a multiply-add as two operations
    whole_ms, folded_ms = best_ms(lambda: network(image_4d), device), best_ms(lambda: folded(image_4d), device)
    print(f"   together {total / 1e6:.0f} million multiply-adds, by PyTorch's counter too; {sum_1d_array[0]:.1f} ms predicted, "
          f"{sum_1d_array[1]:.1f} ms measured.\n"
          f"   In one go {whole_ms:.1f} ms; with BN folded into the convolutions (chapter 5) {folded_ms:.1f} ms.\n"
          "   Slower than predicted: few channels fill a processor badly. Faster: what fits into its cache moves faster than\n"
          "   64 MB do, and convolutions come from another library than matrix products, with wider instructions at times.")


def print_receptive_field(row_list, layer_list, network, image_3d_array, ground: str):
    """Prints the chapter; returns the gradient map and the side of the square that holds 90 % of it, px."""
    print("\n4. RECEPTIVE FIELD: a layer adds (kernel - 1) x jump to what a cell sees, and moves its centre by\n"
          "   ((kernel - 1)/2 - padding) x jump; then the stride multiplies the jump to the next cell. The prior is at jump / 2.")
    print(f"   {'layer':9}{'sees, px':>9}{'by gradient':>12}{'jump':>6}{'centre':>8}{'prior':>7}{'off by':>8}{'by gradient':>12}")
    for index, row in enumerate(row_list):
        if "kernel" in row:
            size, off = seen_area(layer_list[:index + 1], row["size"])
            check(f"receptive field of {row['name']}", (row["size"], row["centre"] - row["jump"] / 2), (size, off))
            print(f"   {row['name']:9}{row['size']:9}{size:12}{row['jump']:6}{row['centre']:8.1f}{row['jump'] / 2:7.1f}"
                  f"{row['centre'] - row['jump'] / 2:8.1f}{off:12.1f}")
    check("receptive field in 02_model.py", (row["size"], row["jump"], row["centre"]), model.receptive_field())
    map_2d_array = gradient_map(network, image_3d_array, row["size"])
    most = side_with_share(map_2d_array, 0.9)
    usual = model.receptive_field([(3, 2, 1, 8)] * 5)
    print(f"   Five 3x3 convolutions with stride 2, the usual way, are centred on {usual[2]} px, {CELL / 2 - usual[2]} px off.\n"
          f"   A cell can see {row['size']} px, but 90 % of the gradient, on {ground}, lies within {most}x{most} px "
          "(receptive_field.png).")
    return map_2d_array, most


def print_batch_norm(row_list, network, folded, image_4d, device) -> None:
    print("\n5. BN BY ITSELF: four numbers a channel. weight and bias are trained; running_mean and running_var are averages\n"
          "   over the batches seen, which no gradient and no optimizer touches. (And one counter of batches a layer.)")
    norm = nn.BatchNorm2d(1)
    value_4d = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 1, 4)
    trained = norm.train()(value_4d).flatten().tolist()
    used = norm.eval()(value_4d).flatten().tolist()
    mean, variance, unbiased = 4.0, 5.0, 20 / 3  # by hand: (9 + 1 + 1 + 9) / 4, and / 3 for the running one
    running_mean, running_variance = 0.9 * 0 + 0.1 * mean, 0.9 * 1 + 0.1 * unbiased  # they start at 0 and 1
    for v, got_trained, got_used in zip((1, 3, 5, 7), trained, used):
        check("BN in training", (v - mean) / math.sqrt(variance + norm.eps), got_trained, 1e-5)
        check("BN in use", (v - running_mean) / math.sqrt(running_variance + norm.eps), got_used, 1e-5)
    print("   A batch 1 3 5 7 has mean 4 and variance 20/4 = 5. In training, BN uses these and moves its averages a tenth\n"
          "   of the way: 0 to 0.4, and 1 to 0.9 + 0.1 x 20/3 = 1.567 (divided by 3 here, not 4). In evaluation it uses them.")
    for name, value_list in (("in training:    (x - 4) / sqrt(5)", trained), ("in evaluation:  (x - 0.4) / sqrt(1.567)", used)):
        print(f"   {name:42}= {' '.join(f'{value:6.3f}' for value in value_list)}, by PyTorch too")
    with torch.no_grad():  # on the processor: a GPU's convolutions round to TF32, three digits
        output_4d, folded_4d = (copy.deepcopy(one).cpu()(image_4d.cpu()) for one in (network, folded))
    difference = float((output_4d - folded_4d).abs().max() / output_4d.abs().max())
    if difference > 1e-5:
        raise UserError(f"fold_batch_norm in 02_model.py changes answers by {difference:.1e} of the largest; mend it (1e-5)")
    print("   Folded into the convolution before it, as a factor and a bias, BN costs nothing: answers differ by\n"
          f"   {difference:.0e} of the largest one.\n"
          f"   {'order':16}{'parameters':>11}{'MB saved a picture':>20}{'ms forward':>12}   BN that stays")
    conv_list = [row["layer"] for row in row_list[:-1] if isinstance(row["layer"], nn.Conv2d)]
    for order in ("conv-BN-ReLU", "BN-ReLU-conv"):
        chain_list = []
        for conv in conv_list:
            norm = nn.BatchNorm2d(conv.out_channels if order.startswith("conv") else conv.in_channels)
            trio = [copy.deepcopy(conv), norm, nn.ReLU(inplace=True)]
            chain_list += trio if order.startswith("conv") else trio[1:] + trio[:1]
        chain = nn.Sequential(*chain_list).to(device).train()
        chain_row_list = describe(chain_list, *row_list[0]["in_shape"])
        count, saved = sum(row["parameters"] for row in chain_row_list), sum(predict_memory(chain_row_list, 1)[0])
        check(f"parameters of {order}", count, sum(p.numel() for p in chain.parameters()))
        check(f"bytes saved by {order}", saved, sum(saved_bytes(chain, chain_list, image_4d.float())), 0.01)
        with torch.no_grad():
            milliseconds = best_ms(lambda: chain(image_4d.float()), device)
        left = "none" if order.startswith("conv") else "the first: no convolution stands before it"
        print(f"   {order:16}{count:11,}{saved / MB:20.2f}{milliseconds:12.1f}   {left}")
    print("   In a chain the second is the first shifted by one, but it normalises the whole picture, cuts off its darker half\n"
          "   (ReLU) before a convolution has seen it, and ends without BN. It belongs in networks with skip connections.")


def print_memory(row_list, layer_list, network, batch: int, device) -> None:
    channels, height, width = row_list[0]["in_shape"]
    network.zero_grad()  # those of chapter 4
    others = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # what the chapters before still hold, and the network
    others -= sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    images_4d = random_pictures(batch, height, width).to(device)
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.0)  # it fills its state but changes nothing
    measured_list = saved_bytes(network, layer_list, images_4d)
    for _ in range(2):  # in the first step gradients and optimizer state come into being, the second is like all others
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        network(images_4d).sum().backward()
        optimizer.step()
    parameters, tensors = sum(row["parameters"] for row in row_list), len(list(network.parameters()))
    norm_list = [row for row in row_list if isinstance(row["layer"], nn.BatchNorm2d)]
    saved_list, activation_peak = predict_memory(row_list, batch)
    line_list = [
        ("weights", 4 * parameters, sum(p.nbytes for p in network.parameters())),
        ("gradients: one a weight", 4 * parameters, sum(p.grad.nbytes for p in network.parameters())),
        ("AdamW: two numbers a weight, a counter a tensor", 2 * 4 * parameters + 4 * tensors,
         sum(t.nbytes for state in optimizer.state.values() for t in state.values())),
        ("BN: two running averages a channel, an int64 counter", sum(2 * 4 * row["out_shape"][0] + 8 for row in norm_list),
         sum(b.nbytes for b in network.buffers()))]
    fixed = sum(predicted for _, predicted, _ in line_list)
    line_list.append(("the batch as uint8", batch * channels * height * width, images_4d.nbytes))
    for block_row_list in split_blocks(row_list):
        here = slice(row_list.index(block_row_list[0]), row_list.index(block_row_list[-1]) + 1)
        name = " + ".join([block_row_list[0]["name"], *(row["name"].split()[0] for row in block_row_list[1:])])
        extra = ", with the batch as float32" if here.start == 0 else "" if sum(saved_list[here]) else ": its input stands above"
        line_list.append((f"saved by {name}{extra}", sum(saved_list[here]), sum(measured_list[here])))
    line_list.append(("saved for backward, all layers", sum(saved_list), sum(measured_list)))
    print(f"\n6. MEMORY of a training step, {batch} x {height}x{width} px, in MB. For backward, convolution and BN save their\n"
          "   input, ReLU its output. BN's output, ReLU's (in place) and the next convolution's input are one tensor.")
    print(f"   {'':56}{'predicted':>10}{'measured':>10}{'off by':>9}")
    for name, predicted, measured in line_list:
        check(name, predicted, measured, 0.01)
        print(f"   {name:56}{predicted / MB:10.3f}{measured / MB:10.3f}{predicted / measured - 1 if measured else 0:9.2%}")
    peak = fixed + images_4d.nbytes + activation_peak
    line = f"   {'at most at one time, with the gradients of activations':56}{peak / MB:10.3f}"
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated() - others
        print(f"{line}{measured / MB:10.3f}{peak / measured - 1:9.2%}")
        if peak < 0.95 * measured:
            print("   The rest is work space that cuDNN's convolutions borrow: the card's choice, not the network's.")
    else:
        print(f"{line}   not measured: there is no GPU here")
    saved, outputs = sum(saved_list), 4 * batch * sum(math.prod(row["out_shape"]) for row in row_list)
    in_place = 4 * batch * sum(math.prod(row["out_shape"]) for row in row_list if getattr(row["layer"], "inplace", False))
    print(f"   Usual rules: the sum of all outputs is {outputs / MB:.1f} MB ({outputs / saved - 1:+.0%}); twice that, for "
          f"backward, is {2 * outputs / saved - 1:+.0%}.\n"
          f"   The sum counts in-place ReLU again ({in_place / MB:+.1f} MB) and forgets the float32 batch "
          f"({-4 * images_4d.nbytes / MB:+.1f} MB): two mistakes.\n"
          "   And no gradient of an activation lives longer than one layer's turn: they add "
          f"{activation_peak / saved - 1:.0%}, not 100 %.")
    crops_4d = random_pictures(CROP_BATCH, CROP, CROP).to(device)
    crop_saved_list, crop_peak = predict_memory(describe(layer_list, channels, CROP, CROP), CROP_BATCH)
    check("saved for a batch of crops", sum(crop_saved_list), sum(saved_bytes(network, layer_list, crops_4d)), 0.01)
    picture_bytes = (activation_peak + images_4d.nbytes) // batch
    crop_bytes = (crop_peak + 4 * crops_4d.nbytes) // CROP_BATCH  # 03_train.py hands over float32: it has changed the light
    room = CARD - CARD_TAKEN - fixed
    print(f"   Which batch fits in {CARD / 2 ** 30:.0f} GB? CUDA itself takes {CARD_TAKEN / 2 ** 30:.1f} GB, the first four "
          f"lines {fixed / MB:.1f} MB, a picture {picture_bytes / MB:.1f} MB:\n"
          f"   {room // picture_bytes:,} pictures. Of 03_train.py's {CROP}x{CROP} crops, {crop_bytes / MB:.2f} MB each, "
          f"{room // crop_bytes:,}; its {CROP_BATCH} a step take {(fixed + CROP_BATCH * crop_bytes) / MB:.0f} MB.")


def print_bytes(batch: int, height: int, width: int, device) -> None:
    uint8_4d = random_pictures(batch, height, width)
    float_4d, here_4d = uint8_4d.float(), uint8_4d.to(device)
    convert_ms = best_ms(here_4d.float, device)
    time_list = [best_ms(lambda: batch_4d.to(device, copy=True), device) for batch_4d in (uint8_4d, float_4d)]
    what = "To the GPU they travel" if device.type == "cuda" else "No GPU to send them to; a copy in memory takes"
    many = 1465 * 3 * height * width / 1e9  # GB of a data set as uint8
    print(f"\n7. UINT8 AGAINST FLOAT32: the same batch is {uint8_4d.nbytes / MB:.1f} or {float_4d.nbytes / MB:.1f} MB. {what}\n"
          f"   {time_list[0]:.1f} or {time_list[1]:.1f} ms, converting there {convert_ms:.1f} ms: send and keep bytes. "
          f"1,465 pictures are {many:.1f} or {4 * many:.1f} GB.")


def print_readers(image_3d_array, device) -> None:
    buffer = io.BytesIO()
    Image.fromarray(image_3d_array).save(buffer, "JPEG", quality=90)

    def by_pillow():
        buffer.seek(0)
        return read_image(buffer)

    print(f"\n8. PIL AGAINST CV2: Pillow reads a JPEG of {image_3d_array.shape[0]}x{image_3d_array.shape[1]} px in "
          f"{best_ms(by_pillow, device):.1f} ms, as RGB.")
    try:
        import cv2
    except ImportError:
        print("   cv2 is not installed, so there is nothing to compare; pip install opencv-python-headless, and run this again.")
        return
    bytes_1d_array = np.frombuffer(buffer.getvalue(), np.uint8)
    bgr_3d_array = cv2.imdecode(bytes_1d_array, cv2.IMREAD_COLOR)
    pillow_3d_array = by_pillow().astype(int)
    as_it_is, turned = (int(np.abs(pillow_3d_array - array).max()) for array in (bgr_3d_array, bgr_3d_array[..., ::-1]))
    same = float((pillow_3d_array == bgr_3d_array[..., ::-1]).all(axis=2).mean())
    cv2_ms = best_ms(lambda: cv2.imdecode(bytes_1d_array, cv2.IMREAD_COLOR), device)
    others = f", the others off by up to {turned} of 255" if turned else ""
    print(f"   cv2 {cv2.__version__} reads it in {cv2_ms:.1f} ms, as BGR. Taken for RGB, red and blue are swapped: off by up to "
          f"{as_it_is} of 255.\n   Turned round by array[..., ::-1], {same:.1%} of the pixels are identical{others}.")


def feed(make_batch, step, threaded: bool) -> tuple[float, float]:
    """Median ms that the loop waits for a batch, and that its whole turn takes; batches made in the loop, or by a thread.

    The thread is the least that works; the one of 03_train.py can also be stopped, and hands on its errors.
    """
    batch_queue = queue.Queue(maxsize=QUEUE_SIZE)  # bounded: `put` sleeps when the loop falls behind, and memory stays flat

    def run():
        for _ in range(FEED_STEPS):
            batch_queue.put(make_batch())

    if threaded:
        threading.Thread(target=run, daemon=True).start()
    wait_list, turn_list = [], []
    for _ in range(FEED_STEPS):
        start_time = time.perf_counter()
        batch = batch_queue.get() if threaded else make_batch()
        wait_list.append((time.perf_counter() - start_time) * 1e3)
        step(batch)
        turn_list.append((time.perf_counter() - start_time) * 1e3)
    return statistics.median(wait_list), statistics.median(turn_list)


def print_threads(network, device) -> None:
    crops_4d = random_pictures(8, CROP, CROP)
    image = Image.fromarray(crops_4d[0].permute(1, 2, 0).numpy())
    work_dict = {"sleeping, as one waits for a disk": lambda: time.sleep(1e-3),
                 "Pillow, which lets go of Python's lock": lambda: image.rotate(10, Image.Resampling.BICUBIC),
                 "Python itself, which holds the lock": lambda: sum(range(10000))}

    def step(images_4d):
        network(images_4d.to(device)).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step_ms = best_ms(lambda: step(crops_4d), device)
    print(f"\n9. THREAD AND QUEUE: a training step of {step_ms:.1f} ms; to make a batch takes three quarters of that. In ms:")
    print(f"   {'the batch is made by':40}{'in the loop: waits':>19}{'whole':>8}{'by a thread: waits':>21}{'whole':>8}")
    for name, work in work_dict.items():
        times = max(1, round(0.75 * step_ms / best_ms(work, device)))

        def make_batch():
            for _ in range(times):
                work()
            return crops_4d

        alone, threaded = feed(make_batch, step, False), feed(make_batch, step, True)
        print(f"   {name:40}{alone[0]:19.1f}{alone[1]:8.1f}{threaded[0]:21.1f}{threaded[1]:8.1f}")
    print("   A thread hides the waiting. The whole turn gets shorter where the work sleeps, or lets go of the lock on a free "
          "core.")


# ---------------------------------------------------------------- pictures

def draw_pictures(folder: Path, row_list, map_2d_array, most: int) -> None:
    """layers.png: parameters and memory by block. receptive_field.png: what a cell looks at. most: side with 90 %, px."""
    import matplotlib
    matplotlib.use("Agg")  # draws into files; needs no screen
    import matplotlib.pyplot as plt

    def save(figure, name):
        with replacing(folder / name) as temporary:
            figure.savefig(temporary, dpi=110)
        plt.close(figure)

    saved_list, block_list = predict_memory(row_list, 1)[0], split_blocks(row_list)
    saved_dict = {id(row): saved for row, saved in zip(row_list, saved_list)}
    figure, axes_pair = plt.subplots(1, 2, figsize=(9, 1 + 0.36 * len(block_list)), layout="constrained", sharey=True)
    parameters_list = [sum(row["parameters"] for row in rows) / 1e3 for rows in block_list]
    memory_list = [sum(saved_dict[id(row)] for row in rows) / MB for rows in block_list]
    for axes, title, colour, value_list in ((axes_pair[0], "parameters, thousands", "tab:blue", parameters_list),
                                            (axes_pair[1], "saved for backward, MB a picture", "tab:orange", memory_list)):
        bars = axes.barh([rows[0]["name"] for rows in block_list], value_list, color=colour)
        axes.bar_label(bars, [f"{value:.1f}" for value in value_list], padding=3)
        axes.set(title=f"{title}: {sum(value_list):.1f}", xlim=(0, 1.15 * max(value_list)))
        axes.spines[["top", "right"]].set_visible(False)
    axes_pair[0].invert_yaxis()
    save(figure, "layers.png")

    half, size = len(map_2d_array) / 2, row_list[-1]["size"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.3), layout="constrained")
    image = left.imshow(np.sqrt(map_2d_array / map_2d_array.max()), cmap="magma", extent=(-half, half, half, -half))
    figure.colorbar(image, ax=left, label="root of |gradient|, largest = 1", shrink=0.8)
    right.plot(np.arange(len(map_2d_array)) + 0.5 - half, map_2d_array.sum(axis=0) / map_2d_array.sum() * 100, color="black")
    for side, colour, name in ((size, "tab:green", "can see"), (most, "tab:cyan", "90 % of the gradient"),
                               (CELL, "tab:red", "its own cell")):
        left.add_patch(plt.Rectangle((-side / 2, -side / 2), side, side, fill=False, edgecolor=colour, linewidth=1.6))
        right.axvspan(-side / 2, side / 2, color=colour, alpha=0.2, label=f"{name}: {side} px")
    left.set(xlabel="px from the prior", ylabel="px from the prior", title="what one cell looks at")
    right.set(xlabel="px from the prior", ylabel="% of the gradient", title="column by column", xlim=(-half, half))
    right.set_ylim(0, 1.35 * right.get_ylim()[1])  # room for the legend
    right.legend(loc="upper left", fontsize=8)
    save(figure, "receptive_field.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Analyse the network layer by layer.")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER, help="folder with weights and results (default: data)")
    parser.add_argument("--batch", type=int, default=8, help="pictures in the batch of chapters 6 and 7 (default: %(default)s)")
    options = parser.parse_args()
    if options.batch < 1:
        parser.error("--batch must be at least 1")
    device = pick_device()
    torch.manual_seed(0)
    weights_path = model.find_weights(options.data)
    try:
        network, _ = model.load_weights(weights_path, device)
        print(f"using {weights_path}")
        is_trained = True
    except UserError as error:  # none, or of another LAYER_LIST; this lesson can do without
        network = model.KeypointNet(class_count=3).to(device).eval()
        print(f"{error}\nso this is an untrained network: shapes, counts and bytes are the same, gradients are not")
        is_trained = False
    dataset_path = options.data / "dataset.json"
    try:
        dataset_dict = json.loads(dataset_path.read_text(encoding="utf-8")) if dataset_path.is_file() else {}
        height, width = int(dataset_dict.get("height", HEIGHT)), int(dataset_dict.get("width", WIDTH))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{dataset_path}: damaged ({str(error)[:80]}); make it again with 01_prepare_data.py") from None
    sample_list = sorted(p for p in (options.data / "sample").glob("*") if p.suffix in IMAGE_SUFFIXES)
    noise_3d_array = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image_3d_array = read_image(sample_list[0]) if sample_list else noise_3d_array
    image_4d = torch.from_numpy(noise_3d_array).to(device).permute(2, 0, 1)[None]  # uint8 [1, 3, 1920, 320]
    print(f"one picture: uint8 {list(image_4d.shape)}, on {device}, with {torch.get_num_threads()} threads")

    layer_list = [*network.body, network.head]
    row_list = describe(layer_list, *image_4d.shape[1:])
    row_list[-1]["name"] = "head"
    needed, memory = predict_memory(row_list, options.batch)[1], device_memory(device)
    if needed > memory:
        raise UserError(f"--batch {options.batch}: chapter 6 would need {needed // 2 ** 30:,} GB, the {device.type} has "
                        f"{memory // 2 ** 30:,} GB; choose a smaller one")
    with torch.no_grad():
        if not is_trained:  # BN's averages have seen nothing yet; without this, chapter 5 would fold factors of 1
            network.train()(image_4d)
            network.eval()
        folded = model.fold_batch_norm(network)
        print_shapes(row_list, layer_list, image_4d)
        print_parameters(row_list, network)
        print_work(row_list, network, folded, image_4d, device)
    ground = "a picture" if sample_list else "noise"
    map_2d_array, most = print_receptive_field(row_list, layer_list, network, image_3d_array, ground)
    print_batch_norm(row_list, network, folded, image_4d, device)
    print_memory(row_list, layer_list, network, options.batch, device)
    print_bytes(options.batch, height, width, device)
    print_readers(image_3d_array, device)
    print_threads(network, device)
    folder = options.data / "results"
    draw_pictures(folder, row_list, map_2d_array, most)
    print(f"\nwrote layers.png and receptive_field.png to {folder}")
    print("next: change a line of LAYER_LIST in 02_model.py, run this again")


if __name__ == "__main__":
    run_main(main)
