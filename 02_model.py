"""Lesson 2: the network, its grid of priors, match (keypoints -> grid) and decode (grid -> keypoints).

    python 02_model.py

Reads   a picture of data/sample, if there; else a black one.
Writes  nothing: it pushes one picture through and prints the shape after every layer.
Time    a second.
See     1920x320 px become a grid of 60x10 cells with five values each, and a keypoint survive match and decode.
Next    python 03_train.py trains what stands here.

Every cell of the grid looks after 32x32 px. Its prior is its centre, and it answers with five values: dx and dy, the way
from the prior to the keypoint, and a score for each class: background, keyPoint_1, keyPoint_2. SSD has several maps and
several prior boxes a cell, so it must compare boxes (IoU), encode widths and heights, and sort out double answers (NMS).
Points of one size need one map and one prior a cell: then a keypoint belongs to the cell it lies in, and that is all.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import CELL, DATA_FOLDER, IMAGE_SUFFIXES, UserError, pad_image, read_image, round_up_to_cell, run_main

# The layers, as (kernel, stride, padding, channels out), in px. The strides multiply to 4 * 2 * 2 * 2 = 32 = CELL.
# Kernels of down-sampling layers are even: with kernel = stride + 2 and padding 1 a cell looks exactly where its prior
# is. A 3x3 kernel with stride 2 looks half a pixel up-left of it, and five in a row look 15.5 px off.
LAYER_LIST = [
    (6, 4, 1, 16),  # 1920x320 -> 480x80
    (4, 2, 1, 32),  # -> 240x40
    (3, 1, 1, 32),
    (4, 2, 1, 64),  # -> 120x20
    (3, 1, 1, 64),
    (4, 2, 1, 128),  # -> 60x10
    (1, 1, 0, 128),
]
OFFSET_UNIT = CELL / 2  # px; the network says offsets in half cells, so that what it learns lies within -1 to 1
NEIGHBOUR_REACH = CELL  # px; cells whose prior is within this of a keypoint, in x and in y, learn its offset: the four nearest
LOOK_SIDE = 3 * CELL  # px; side of look_again's crops: the keypoint's cell in the middle, and one more on each side
# It shifts its four crops by these x, y (px). Divided by 4, the first layer's stride, each leaves another remainder.
LOOK_LIST = [(-10, 5), (-5, 12), (5, -10), (12, -5)]


class KeypointNet(nn.Module):
    """A plain stack of convolution, BN, ReLU; then a 1x1 convolution that gives a cell's 2 + class_count values.

    class_count: categories with background, 3 here. Input: `[N, 3, H, W]`, uint8 or float, 0 to 255, H and W multiples
    of 32. Output: float32 `[N, 2 + class_count, H / 32, W / 32]`; channels 0, 1: dx, dy in half cells; from 2: class scores.
    """

    def __init__(self, class_count: int):
        super().__init__()  # comes first: it sets up what keeps track of the layers
        layer_list, channels_in = [], 3
        for kernel, stride, padding, channels_out in LAYER_LIST:
            # No bias: BN subtracts each channel's mean, and with it any bias; BN brings a bias of its own.
            layer_list += [nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False),
                           nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
            channels_in = channels_out
        self.body = nn.Sequential(*layer_list)
        self.head = nn.Conv2d(channels_in, 2 + class_count, kernel_size=1)
        # Weights stand in memory channels-last, as pictures do: convolutions on a CPU run about 1.3 times as fast.
        self.to(memory_format=torch.channels_last)

    def forward(self, images_4d: torch.Tensor) -> torch.Tensor:
        """What network(images_4d) does: PyTorch calls this."""
        # No division by 255: the first BN divides by each channel's spread, and with it undoes any factor.
        feature_4d = self.body(images_4d.float())  # [N, 128, 60, 10]
        return self.head(feature_4d)  # [N, 5, 60, 10]


def make_priors(rows: int, columns: int, device="cpu") -> torch.Tensor:
    """The centres of the cells in px, `[2, rows, columns]`: x, y.

    >>> make_priors(60, 10)[:, 0, :2]
    tensor([[16., 48.],
            [16., 16.]])
    """
    y = (torch.arange(rows, device=device) + 0.5) * CELL
    x = (torch.arange(columns, device=device) + 0.5) * CELL
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))  # [2, 60, 10]


def match(label_2d_array: np.ndarray, picture_count: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Ground truth onto the grid: what each cell should answer.

    label_2d_array: `[M, 4]`, a row a keypoint: picture index, class id, x, y in px. Returns gt_offset `[N, 2, rows, columns]`
    in px, float32, and gt_class_id `[N, rows, columns]`, int64: 0 background, the class in a keypoint's own cell, and minus
    the class in the cells beside it.

    The nearest cells beside a keypoint's own learn the offset too: four lessons from one label. Whether they also say its class
    is left to them, since a keypoint on a border belongs to both cells about as much. Where keypoints compete, own cells
    come first, then the nearer to the prior.

    >>> gt_offset, gt_class_id = match(np.array([[0, 2, 40, 20]]), 1, 3, 3)
    >>> gt_offset[0, :, 0, 1], gt_class_id[0, 0].tolist()  # the cell at row 0, column 1; its prior is (48, 16)
    (array([-8.,  4.], dtype=float32), [-2, 2, 0])
    """
    gt_offset_4d_array = np.zeros((picture_count, 2, rows, columns), np.float32)
    gt_class_id_3d_array = np.zeros((picture_count, rows, columns), np.int64)
    label_2d_array = np.asarray(label_2d_array, np.float32).reshape(-1, 4)
    picture, class_id = label_2d_array[:, 0].astype(int), label_2d_array[:, 1].astype(int)
    x, y = label_2d_array[:, 2], label_2d_array[:, 3]
    # Nine candidates a keypoint: its own cell and the eight round it.
    step_row, step_column = np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij")
    row = np.floor(y / CELL).astype(int)[:, None] + step_row.ravel()  # [M, 9]
    column = np.floor(x / CELL).astype(int)[:, None] + step_column.ravel()
    dx, dy = x[:, None] - (column + 0.5) * CELL, y[:, None] - (row + 0.5) * CELL
    is_own = np.broadcast_to((step_row.ravel() == 0) & (step_column.ravel() == 0), row.shape)
    picture, class_id = np.broadcast_to(picture[:, None], row.shape), np.broadcast_to(class_id[:, None], row.shape)
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    inside &= is_own | ((np.abs(dx) < NEIGHBOUR_REACH) & (np.abs(dy) < NEIGHBOUR_REACH))
    # Written from the worst candidate to the best, so that the best stays: own cells last, the nearest to the prior very last.
    # lexsort sorts by its last key first: by is_own, and among equals by the distance.
    order = np.lexsort((-np.hypot(dx, dy)[inside], is_own[inside]))
    cell = picture[inside][order], row[inside][order], column[inside][order]
    gt_class_id_3d_array[cell] = np.where(is_own, class_id, -class_id)[inside][order]
    gt_offset_4d_array[cell[0], 0, cell[1], cell[2]] = dx[inside][order]
    gt_offset_4d_array[cell[0], 1, cell[1], cell[2]] = dy[inside][order]
    return gt_offset_4d_array, gt_class_id_3d_array


def decode(output_4d: torch.Tensor, max_per_class: int = 1, threshold: float = 0.5):
    """Network output into keypoints, a (keypoint_2d `[K, 2]` x and y in px, class_id_1d `[K]`, score_1d `[K]`) a picture.

    max_per_class: the most keypoints of one class that a picture of the data set holds. Where it is 1, the best cell of
    each class answers, if its score passes the threshold; else every cell that passes it and beats its eight neighbours.
    """
    score_4d = output_4d[:, 2:].softmax(dim=1)[:, 1:]  # [N, 2, 60, 10]; dim=1: over a cell's classes; background left out
    # A cell answers if its number is that of the best cell. Scores can't tell: a sure network gives several cells exactly 1.
    rows, columns = score_4d.shape[2:]
    cell_2d = torch.arange(rows * columns, device=score_4d.device).view(rows, columns)  # [60, 10]
    if max_per_class == 1:
        best_4d = score_4d.flatten(start_dim=2).argmax(dim=2)[:, :, None, None]  # [N, 2, 1, 1]
    else:
        _, best_4d = nn.functional.max_pool2d(score_4d, kernel_size=3, stride=1, padding=1, return_indices=True)  # [N, 2, 60, 10]
    answers_4d = (best_4d == cell_2d) & (score_4d >= threshold)  # [N, 2, 60, 10]
    place_4d = make_priors(rows, columns, output_4d.device) + output_4d[:, :2] * OFFSET_UNIT  # [N, 2, 60, 10]
    result_list = []
    for answers_3d, score_3d, place_3d in zip(answers_4d, score_4d, place_4d):
        class_index, row, column = answers_3d.nonzero(as_tuple=True)
        result_list.append((place_3d[:, row, column].T, class_index + 1, score_3d[class_index, row, column]))
    return result_list


def detect(network: KeypointNet, image_3d: torch.Tensor, max_per_class: int = 1, threshold: float = 0.5):
    """Keypoints of one picture, uint8 `[H, W, 3]`: keypoint_2d `[K, 2]`, class_id_1d `[K]`, score_1d `[K]`.

    The first look takes in the whole picture and names candidates; the second looks at each of them again. The score is the
    smaller of what the two say: a part of a mark may pass for the whole once, but seldom twice.
    """
    output_4d = network(image_3d.permute(2, 0, 1)[None])  # [1, 5, 60, 10]
    (keypoint_2d, class_id_1d, score_1d), = decode(output_4d, max_per_class, threshold)  # the comma unpacks a list of one
    if len(keypoint_2d) == 0:
        return keypoint_2d, class_id_1d, score_1d
    keypoint_2d, second_score_1d = look_again(network, image_3d, keypoint_2d, class_id_1d)
    score_1d = torch.minimum(score_1d, second_score_1d)
    passes_1d = score_1d >= threshold
    return keypoint_2d[passes_1d], class_id_1d[passes_1d], score_1d[passes_1d]


def look_again(network: KeypointNet, image_3d: torch.Tensor, keypoint_2d: torch.Tensor, class_id_1d: torch.Tensor):
    """Look at each keypoint from four slightly different positions: the mean place `[K, 2]` and the mean score `[K]`.

    image_3d: uint8 `[H, W, 3]`. What a network says of a point depends a little on how the point lies to the 4-px raster
    of the first layer and to the cells, an error that differs from position to position: the mean of several is better.
    A look takes a crop of 3x3 cells, the keypoint in the middle one: 1.5 % of the picture's work.
    """
    looks, device = len(LOOK_LIST), keypoint_2d.device
    height, width = image_3d.shape[:2]
    first_2d = keypoint_2d.repeat_interleave(looks, dim=0)  # [K * 4, 2]
    corner_2d = (first_2d - LOOK_SIDE / 2).round().long() + torch.tensor(LOOK_LIST, device=device).repeat(len(keypoint_2d), 1)
    # At the picture's rim a crop sticks out as little as its remainder allows, 0 to 3 px; there the edge pixels are repeated.
    stride = LAYER_LIST[0][1]
    largest_1d = torch.tensor([width, height], device=device) - LOOK_SIDE
    corner_2d = corner_2d.maximum(-(-corner_2d % stride))
    corner_2d = corner_2d.minimum(largest_1d + (corner_2d - largest_1d) % stride)
    side_1d = torch.arange(LOOK_SIDE, device=device)
    column_2d = (corner_2d[:, :1] + side_1d).clamp(0, width - 1)  # [K * 4, 96]
    row_2d = (corner_2d[:, 1:] + side_1d).clamp(0, height - 1)
    crops_4d = image_3d[row_2d[:, :, None], column_2d[:, None]]  # [K * 4, 96, 96, 3]
    output_4d = network(crops_4d.permute(0, 3, 1, 2))  # [K * 4, 5, 3, 3]
    cell_2d = ((first_2d - corner_2d) // CELL).long().clamp(0, LOOK_SIDE // CELL - 1)  # column and row that the keypoint lies in
    output_2d = output_4d[torch.arange(len(cell_2d), device=device), :, cell_2d[:, 1], cell_2d[:, 0]]  # [K * 4, 5]
    place_2d = corner_2d + (cell_2d + 0.5) * CELL + output_2d[:, :2] * OFFSET_UNIT
    # A look that means another place altogether (a border, another keypoint) counts as a repetition of the first.
    place_2d = torch.where(((place_2d - first_2d).abs() < CELL / 4).all(dim=1, keepdim=True), place_2d, first_2d)
    score_2d = output_2d[:, 2:].softmax(dim=1).view(-1, looks, output_2d.shape[1] - 2).mean(dim=1)  # [K, 3]: of every class
    # gather picks from each row the column that class_id_1d names.
    return place_2d.view(-1, looks, 2).mean(dim=1), score_2d.gather(1, class_id_1d[:, None])[:, 0]


def receptive_field(layer_list=None) -> tuple[int, int, float]:
    """Size of what a cell of the last layer sees, jump from one cell to the next, and the first cell's centre, all in px.

    The rules of Dumoulin and Visin, "A guide to convolution arithmetic": each layer adds (kernel - 1) * jump to the size
    and moves the centre by ((kernel - 1) / 2 - padding) * jump; then the jump grows by the stride.

    >>> receptive_field([(3, 2, 1, 8)] * 5)  # the usual 3x3 with stride 2: centre 0.5, but the prior is at 16
    (63, 32, 0.5)
    """
    size, jump, centre = 1, 1, 0.5  # a pixel of the picture sees itself, is 1 px from the next, and its centre is at 0.5
    for kernel, stride, padding, _ in layer_list or LAYER_LIST:
        size += (kernel - 1) * jump
        centre += ((kernel - 1) / 2 - padding) * jump
        jump *= stride
    return size, jump, centre


def multiply_adds(height: int, width: int, class_count: int = 3) -> int:
    """Multiplications (each with an addition) of the convolutions for one picture of height x width px.

    Each value that comes out is a sum over kernel x kernel x channels in. Training costs three times as much: once
    forward, once for the gradient of the weights, once for the gradient of the input.
    """
    total, channels_in = 0, 3
    for kernel, stride, padding, channels_out in LAYER_LIST + [(1, 1, 0, 2 + class_count)]:
        height, width = (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1
        total += height * width * channels_out * kernel * kernel * channels_in
        channels_in = channels_out
    return total


def fold_batch_norm(network: KeypointNet) -> KeypointNet:
    """A copy of a trained network for use: each BN multiplied into the convolution before it. Same answers, less work.

    In evaluation mode BN is y = (x - mean) / sqrt(variance + eps) * weight + bias: a factor and a summand a channel, and a
    convolution is linear, so the factor goes into its weights and the summand becomes its bias.
    """
    layer_list = []
    for layer in network.body:
        if isinstance(layer, nn.BatchNorm2d):
            factor_1d = layer.weight / torch.sqrt(layer.running_var + layer.eps)
            old = layer_list.pop()
            conv = nn.Conv2d(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
            conv.weight.data = old.weight.data * factor_1d[:, None, None, None].data
            conv.bias.data = (layer.bias - layer.running_mean * factor_1d).data
            layer = conv
        layer_list.append(layer)
    folded = KeypointNet(network.head.out_channels - 2)
    folded.body, folded.head = nn.Sequential(*layer_list), network.head
    return folded.to(network.head.weight.device).eval()


def load_weights(path: Path, device="cpu") -> tuple[KeypointNet, dict]:
    """Load what 03_train.py saved: the network in evaluation mode, and {"category_list", "box_size", "max_per_class"}.

    weights_only=True reads tensors and plain values and executes nothing that a file may hold. Raises UserError.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; train with 03_train.py first")
    try:
        saved_dict = torch.load(path, map_location="cpu", weights_only=True)
        network = KeypointNet(len(saved_dict["category_list"]))
        network.load_state_dict(saved_dict["network"])
        about_dict = {key: saved_dict[key] for key in ("category_list", "box_size", "max_per_class")}
        width, height = about_dict["box_size"]
        names_are_text = all(isinstance(name, str) for name in about_dict["category_list"])
        if not names_are_text or not min(width, height, about_dict["max_per_class"]) > 0:
            raise ValueError("impossible categories, box size or number of keypoints")
    except Exception as error:  # damaged bytes can raise nearly anything
        reason = f"{type(error).__name__} {str(error).strip().splitlines()[0][:80] if str(error).strip() else ''}".strip()
        raise UserError(f"{path}: not the weights of this network ({reason}); train again with 03_train.py") from None
    return network.to(device).eval(), about_dict


def find_weights(data_folder: Path) -> Path:
    """The data folder's own weights, else those that come with the repository."""
    own = data_folder / "weights.pt"
    return own if own.is_file() else DATA_FOLDER / "pretrained.pt"


@torch.inference_mode()  # nothing is kept for a backward pass
def find_keypoints(network: KeypointNet, about_dict: dict, image_3d_array: np.ndarray, threshold: float = 0.5) -> list[dict]:
    """Keypoints of one picture, uint8 `[height, width, 3]`, any size: dicts with class, x, y, score, box (px)."""
    height, width = image_3d_array.shape[:2]
    padded_3d_array = pad_image(image_3d_array, round_up_to_cell(height), round_up_to_cell(width))
    padded_3d_array = np.require(padded_3d_array, requirements=["C", "W"])  # a copy where from_numpy needs one
    image_3d = torch.from_numpy(padded_3d_array).to(network.head.weight.device)  # uint8 [1920, 320, 3]
    keypoint_2d, class_id_1d, score_1d = detect(network, image_3d, about_dict["max_per_class"], threshold)
    half_width, half_height = about_dict["box_size"][0] / 2, about_dict["box_size"][1] / 2
    return [{"class": about_dict["category_list"][class_id], "x": round(x, 2), "y": round(y, 2), "score": round(score, 4),
             "box": [round(x - half_width, 2), round(y - half_height, 2), round(x + half_width, 2), round(y + half_height, 2)]}
            for (x, y), class_id, score in zip(keypoint_2d.tolist(), class_id_1d.tolist(), score_1d.tolist())]


def main() -> None:
    torch.manual_seed(0)
    network = KeypointNet(class_count=3).eval()
    sample_list = sorted(p for p in (DATA_FOLDER / "sample").glob("*") if p.suffix in IMAGE_SUFFIXES)
    image_3d_array = read_image(sample_list[0]) if sample_list else np.zeros((1920, 320, 3), np.uint8)
    print(f"a picture as numpy reads it:        {image_3d_array.dtype} {list(image_3d_array.shape)}  height, width, RGB")
    # from_numpy shares the array's memory; permute reorders the dimensions without moving a byte; [None] adds one.
    image_4d = torch.from_numpy(np.require(image_3d_array, requirements="W")).permute(2, 0, 1)[None]
    print(f"as a batch of one for the network:  {image_4d.dtype} {list(image_4d.shape)}\n")
    feature_4d = image_4d.float()
    with torch.no_grad():
        for layer in network.body:
            feature_4d = layer(feature_4d)
            if isinstance(layer, nn.Conv2d):
                print(f"conv {layer.kernel_size[0]}x{layer.kernel_size[0]} stride {layer.stride[0]} padding {layer.padding[0]}"
                      f"  -> {list(feature_4d.shape)}")
        output_4d = network.head(feature_4d)
    print(f"head 1x1                      -> {list(output_4d.shape)}: 2 offsets and 3 class scores a cell\n")
    size, jump, centre = receptive_field()
    print(f"a cell sees {size}x{size} px; cells are {jump} px apart; the first looks at {centre} px, its prior is at {CELL / 2}\n")

    label_2d_array = np.array([[0, 1, 100.25, 700.5]], np.float32)  # picture 0, class 1, x, y
    gt_offset_4d_array, gt_class_id_3d_array = match(label_2d_array, 1, 60, 10)
    row, column = (int(i[0]) for i in np.nonzero(gt_class_id_3d_array[0] == 1))
    print(f"match: a keypoint of class 1 at x 100.25, y 700.5 belongs to the cell at row {row}, column {column};")
    print(f"       from its prior (112, 688) it is {gt_offset_4d_array[0, :, row, column].tolist()} px away")
    perfect_4d = torch.zeros(1, 5, 60, 10)  # the output that a perfect network would give
    perfect_4d[:, :2] = torch.from_numpy(gt_offset_4d_array) / OFFSET_UNIT
    class_id_3d = torch.from_numpy(gt_class_id_3d_array).clamp(min=0)  # the cells beside it say background
    perfect_4d[:, 2:] = 20 * nn.functional.one_hot(class_id_3d, 3).permute(0, 3, 1, 2)
    (keypoint_2d, class_id_1d, score_1d), = decode(perfect_4d)
    print(f"decode: keypoint {keypoint_2d.tolist()}, class {class_id_1d.tolist()}, score {score_1d.tolist()}")


if __name__ == "__main__":
    run_main(main)
