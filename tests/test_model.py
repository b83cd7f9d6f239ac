"""02_model.py: the grid, match and decode, where a cell looks, folding BN, loading weights.

Weights that are damaged or hostile stand in hardening/test_weights.py.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import CELL, UserError
from conftest import Sees, load, one_hot

model = load("02_model")

ABOUT_DICT = {"category_list": ["background", "left", "right"], "box_size": [30.0, 20.0],
              "max_per_class": 1}


def perfect_output(label_2d_array, picture_count, rows, columns, class_count):
    """What a network that knows the labels would answer."""
    gt_offset_4d_array, gt_class_id_3d_array = model.match(label_2d_array, picture_count, rows,
                                                           columns)
    offset_4d = torch.from_numpy(gt_offset_4d_array) / model.OFFSET_UNIT
    return torch.cat((offset_4d, 20 * one_hot(gt_class_id_3d_array, class_count)), dim=1)


def random_network(class_count=3, seed=0):
    """A network as training might leave it: BN with statistics, factors and summands of its own."""
    torch.manual_seed(seed)
    network = model.KeypointNet(class_count).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.2, 2)
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.3)
    return network


# ---------------------------------------------------------------- the network

@pytest.mark.parametrize("rows, columns, class_count", [(60, 10, 3), (1, 1, 2), (13, 13, 18)])
def test_each_cell_gets_two_offsets_and_a_score_a_class(rows, columns, class_count):
    network = model.KeypointNet(class_count).eval()
    with torch.no_grad():
        output_4d = network(torch.zeros(1, 3, rows * CELL, columns * CELL, dtype=torch.uint8))
    assert output_4d.shape == (1, 2 + class_count, rows, columns)
    assert output_4d.dtype == torch.float32


def test_uint8_and_float_pictures_give_the_same_answers():
    network = random_network()
    image_4d = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(network(image_4d), network(image_4d.float()))


def test_parameters_are_those_that_the_readme_names():
    network = model.KeypointNet(3)
    assert sum(parameter.numel() for parameter in network.parameters()) == 238_517


def test_a_cell_looks_where_its_prior_is_by_formula():
    size, jump, centre = model.receptive_field()
    assert jump == CELL and abs(centre - CELL / 2) <= 1 and size >= CELL


def test_a_cell_looks_where_its_prior_is_by_the_gradient_of_the_real_network():
    network = model.KeypointNet(3).eval()
    for parameter in network.parameters():  # positive and equal: nothing cancels, no ReLU is shut
        parameter.data.fill_(0.01 if parameter.dim() == 4 else 1)
    size = model.receptive_field()[0]
    cells = 2 * math.ceil(size / 2 / CELL) + 1  # so many that the middle cell sees no edge
    image_4d = torch.ones(1, 3, cells * CELL, cells * CELL, requires_grad=True)
    middle = cells // 2
    network(image_4d)[0, 0, middle, middle].backward()
    gradient_2d = image_4d.grad[0].abs().sum(dim=0)
    prior = (middle + 0.5) * CELL
    for dim in (0, 1):
        profile = gradient_2d.sum(dim=dim).double().numpy()
        seen = np.flatnonzero(profile)
        assert seen[-1] - seen[0] + 1 == size
        assert abs((seen[0] + seen[-1] + 1) / 2 - prior) <= 1
        assert abs(profile @ (np.arange(len(profile)) + 0.5) / profile.sum() - prior) <= 1


def test_folding_bn_into_the_convolutions_changes_no_answer():
    network = random_network()
    folded = model.fold_batch_norm(network)
    image_4d = torch.randint(0, 256, (2, 3, 96, 64), dtype=torch.uint8)
    with torch.no_grad():
        before_4d, after_4d = network(image_4d), folded(image_4d)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    assert (before_4d - after_4d).abs().max() <= 1e-5 * max(1, before_4d.abs().max())
    assert before_4d.std() > 1e-2  # a network that says nothing would agree with anything


def test_folding_leaves_the_network_itself_as_it_was():
    network = random_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model.fold_batch_norm(network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


# ---------------------------------------------------------------- match

def test_priors_are_the_centres_of_the_cells():
    prior_3d = model.make_priors(3, 2)
    assert prior_3d.shape == (2, 3, 2)
    assert prior_3d[0].tolist() == [[CELL / 2, CELL * 1.5]] * 3
    assert prior_3d[1, :, 0].tolist() == [CELL / 2, CELL * 1.5, CELL * 2.5]


def cells_that_learn(x, y, rows=3, columns=3):
    """(row, column) of each cell that a keypoint at this place teaches."""
    _, gt_class_id_3d_array = model.match(np.array([(0, 1, x, y)]), 1, rows, columns)
    return list(map(tuple, np.argwhere(gt_class_id_3d_array[0] == 1).tolist()))


@pytest.mark.parametrize("x, y, expected", [
    (48, 48, [(1, 1)]),  # in the middle of its cell: no other is near
    (39, 48, [(1, 0), (1, 1)]),
    (48, 60, [(1, 1), (2, 1)]),
    (39, 60, [(1, 0), (1, 1), (2, 0), (2, 1)]),
    (40, 56, [(1, 1)]),  # 8 px from both borders
    (32, 32, [(0, 0), (0, 1), (1, 0), (1, 1)]),  # on a corner
    (0, 0, [(0, 0)]),
    (95.99, 95.99, [(2, 2)])])
def test_a_keypoint_teaches_its_own_cell_and_the_nearest_beside_it(x, y, expected):
    assert cells_that_learn(x, y) == expected


def test_at_most_four_cells_learn_a_keypoint_and_its_own_always_does():
    for x in np.arange(32, 64, 0.5):
        for y in np.arange(32, 64, 0.5):
            cell_list = cells_that_learn(x, y)
            assert (1, 1) in cell_list and len(cell_list) <= 4


def test_the_offset_points_from_the_prior_to_the_keypoint_in_px():
    gt_offset_4d_array, _ = model.match(np.array([(0, 1, 10, 70)]), 1, 3, 3)
    assert gt_offset_4d_array[0, :, 2, 0].tolist() == [10 - 16, 70 - 80]


def test_every_cell_that_learns_learns_the_way_to_the_keypoint():
    label_2d_array = np.array([(0, 1, 70.5, 60.25), (1, 2, 33, 1)], np.float32)
    gt_offset_4d_array, gt_class_id_3d_array = model.match(label_2d_array, 2, 4, 5)
    place_4d_array = gt_offset_4d_array + model.make_priors(4, 5).numpy()
    for picture, class_id, x, y in label_2d_array:
        learns = gt_class_id_3d_array[int(picture)] == class_id
        assert learns.sum() > 1
        assert np.allclose(place_4d_array[int(picture)][:, learns].T, (x, y))
    assert not gt_offset_4d_array.transpose(0, 2, 3, 1)[gt_class_id_3d_array == 0].any()


def test_of_two_keypoints_in_one_cell_the_one_nearer_to_the_prior_has_it():
    near, far = (0, 1, 45, 50), (0, 2, 34, 34)
    for label_list in ([near, far], [far, near]):
        gt_offset_4d_array, gt_class_id_3d_array = model.match(np.array(label_list), 1, 3, 3)
        assert gt_class_id_3d_array[0, 1, 1] == 1
        assert gt_offset_4d_array[0, :, 1, 1].tolist() == [-3, 2]
        assert gt_class_id_3d_array[0, 0, 0] == 2  # a cell beside it answers for the other


def test_the_own_cell_of_a_keypoint_is_never_given_to_a_neighbours_keypoint():
    first, second = (0, 1, 31.5, 16), (0, 2, 62, 2)  # the second is hardly nearer to its own prior
    for label_list in ([first, second], [second, first]):
        _, gt_class_id_3d_array = model.match(np.array(label_list), 1, 2, 3)
        assert gt_class_id_3d_array[0, 0, :2].tolist() == [1, 2]


def test_a_keypoint_just_outside_of_the_grid_teaches_the_cells_along_its_rim():
    for x, y, expected in ((-4, 39, [(0, 0), (1, 0)]), (39, 3 * CELL + 4, [(2, 0), (2, 1)]),
                           (-4, -4, [(0, 0)])):
        assert cells_that_learn(x, y) == expected


def test_a_keypoint_far_outside_of_the_grid_does_not_come_in_on_the_other_side():
    for x, y in ((-40, 16), (16, -40), (3 * CELL + 40, 16), (16, 3 * CELL + 40), (-9999, 16)):
        assert cells_that_learn(x, y) == []


def test_pictures_without_keypoints_match_to_background_only():
    gt_offset_4d_array, gt_class_id_3d_array = model.match(np.zeros((0, 4)), 2, 4, 3)
    assert gt_offset_4d_array.shape == (2, 2, 4, 3) and gt_class_id_3d_array.shape == (2, 4, 3)
    assert gt_offset_4d_array.dtype == np.float32 and gt_class_id_3d_array.dtype == np.int64
    assert not gt_offset_4d_array.any() and not gt_class_id_3d_array.any()


# ---------------------------------------------------------------- decode

def places_all_over_the_grid(rows=60, columns=10):
    """Random places, and all kinds of places on borders and in corners of cells and picture."""
    rng = np.random.default_rng(0)
    width, height = columns * CELL, rows * CELL
    place_list = [(rng.uniform(0, width), rng.uniform(0, height)) for _ in range(300)]
    near = (0, 1e-3, 0.5, CELL / 2, CELL - 0.5, CELL - 1e-2)
    for column in (0, 1, columns - 1):
        for row in (0, 1, rows // 2, rows - 1):
            place_list += [(column * CELL + x, row * CELL + y) for x in near for y in near]
    return place_list


@pytest.mark.parametrize("max_per_class", [1, 3])
def test_match_then_decode_is_the_identity_all_over_the_grid(max_per_class):
    place_list = places_all_over_the_grid()
    label_2d_array = np.array([(i, 1 + i % 2, x, y) for i, (x, y) in enumerate(place_list)],
                              np.float32)
    output_4d = perfect_output(label_2d_array, len(place_list), 60, 10, 3)
    result_list = model.decode(output_4d, max_per_class)
    assert len(result_list) == len(place_list)
    for (_, class_id, x, y), result in zip(label_2d_array, result_list):
        keypoint_2d, class_id_1d, score_1d = result
        assert class_id_1d.tolist() == [class_id] and score_1d[0] > 0.99
        assert np.abs(keypoint_2d[0].numpy() - (x, y)).max() <= 1e-3


def test_two_keypoints_in_one_picture_are_told_apart():
    label_2d_array = np.array([(0, 1, 40, 50), (0, 2, 41, 90)], np.float32)
    keypoint_2d, class_id_1d, _ = model.decode(perfect_output(label_2d_array, 1, 4, 3, 3))[0]
    assert class_id_1d.tolist() == [1, 2]
    assert np.allclose(keypoint_2d, [(40, 50), (41, 90)], atol=1e-3)


def scores(class_count, rows, columns, score_dict):
    """Output with these probabilities {(class_id, row, column): score}, and nearly 0 elsewhere."""
    output_4d = torch.zeros(1, 2 + class_count, rows, columns)
    output_4d[:, 2] = 12
    for (class_id, row, column), score in score_dict.items():
        output_4d[0, 2, row, column] = 0
        output_4d[0, 3:, row, column] = -30
        output_4d[0, 2 + class_id, row, column] = math.log(score / (1 - score))
    return output_4d


def answers(output_4d, **options):
    """What decode finds, as sorted (class id, cell row, cell column, score to two places)."""
    keypoint_2d, class_id_1d, score_1d = model.decode(output_4d, **options)[0]
    return sorted((class_id, int(y // CELL), int(x // CELL), round(score, 2))
                  for (x, y), class_id, score in
                  zip(keypoint_2d.tolist(), class_id_1d.tolist(), score_1d.tolist()))


def test_the_score_is_the_probability_of_the_class_in_its_cell():
    output_4d = torch.zeros(1, 5, 2, 2)
    output_4d[0, 2:, 1, 0] = torch.tensor([0.0, 3.0, 1.0])  # exp: 1, 20.1, 2.7
    (_, class_id_1d, score_1d), = model.decode(output_4d, threshold=0.34)  # elsewhere 1/3 each
    assert class_id_1d.tolist() == [1] and score_1d.item() == pytest.approx(0.8438, abs=1e-4)


def test_only_the_best_cell_of_a_class_answers_where_a_picture_holds_one():
    output_4d = scores(3, 6, 6, {(1, 0, 0): 0.8, (1, 4, 4): 0.9, (2, 2, 2): 0.6})
    assert answers(output_4d) == [(1, 4, 4, 0.9), (2, 2, 2, 0.6)]


def test_every_local_best_answers_where_a_picture_holds_several_of_a_class():
    output_4d = scores(3, 6, 6, {(1, 0, 0): 0.8, (1, 1, 1): 0.7, (1, 4, 4): 0.9, (2, 1, 1): 1e-4})
    output_4d[0, 3, 0, 1] = -30
    assert answers(output_4d, max_per_class=2) == [(1, 0, 0, 0.8), (1, 4, 4, 0.9)]


def test_what_stays_below_the_threshold_is_no_answer():
    output_4d = scores(3, 3, 3, {(1, 1, 1): 0.4})
    for max_per_class in (1, 2):
        options = {"max_per_class": max_per_class}
        assert answers(output_4d, **options) == []
        assert answers(output_4d, **options, threshold=0.3) == [(1, 1, 1, 0.4)]


@pytest.mark.parametrize("max_per_class", [1, 2])
def test_two_cells_that_are_equally_sure_give_one_answer(max_per_class):
    output_4d = scores(3, 4, 4, {(1, 1, 1): 0.9, (1, 1, 2): 0.9})
    output_4d[0, 3, 1, 1:3] = 60  # softmax rounds both to exactly 1, as in a well trained network
    output_4d[0, 0, 1, 1], output_4d[0, 0, 1, 2] = 0.9, -0.9  # they mean places 3.2 px apart
    assert [answer[0] for answer in answers(output_4d, max_per_class=max_per_class)] == [1]


def test_pictures_of_a_batch_are_decoded_each_for_itself():
    output_4d = torch.cat((scores(3, 3, 3, {}), scores(3, 3, 3, {(2, 0, 1): 0.9})))
    first, second = model.decode(output_4d)
    assert first[0].shape == (0, 2) and len(first[1]) == len(first[2]) == 0
    assert second[1].tolist() == [2] and second[0].tolist() == [[CELL * 1.5, CELL / 2]]


# ---------------------------------------------------------------- a picture in, keypoints out

def test_find_keypoints_takes_pictures_of_any_size_and_gives_px_of_the_picture():
    for height, width in ((96, 96), (70, 75), (65, 100), (300, 90)):
        image_3d_array = np.zeros((height, width, 3), np.uint8)
        image_3d_array[60, 70] = (255, 0, 0)
        image_3d_array.flags.writeable = False  # as a mapped data set is
        keypoint, = model.find_keypoints(Sees().eval(), ABOUT_DICT, image_3d_array)
        assert keypoint["class"] == "right" and keypoint["score"] > 0.99
        assert np.allclose((keypoint["x"], keypoint["y"]), (70.5, 60.5), atol=0.01)
        assert np.allclose(keypoint["box"], (55.5, 50.5, 85.5, 70.5), atol=0.01)


def test_a_keypoint_in_the_padding_is_none(monkeypatch):
    """40 x 50 px are padded to 64 x 64: what lies there with all of its box is left out."""
    place_list = [(20, 25), (50, 25), (60, 25), (20, 55), (20, 65), (-10, 25), (-15, 25), (20, -5),
                  (20, -10)]
    result = torch.tensor(place_list), torch.ones(len(place_list), dtype=int), torch.ones(
        len(place_list))
    monkeypatch.setattr(model, "run_network", lambda *arguments: None)
    monkeypatch.setattr(model, "decode", lambda *arguments: [result])
    found_list = model.find_keypoints(None, ABOUT_DICT, np.zeros((50, 40, 3), np.uint8))
    assert [(found["x"], found["y"]) for found in found_list] == [
        (20, 25), (50, 25), (20, 55), (-10, 25), (20, -5)]  # the box is 30 x 20 px


def test_places_are_rounded_to_hundredths_of_a_px_and_scores_to_four_digits(monkeypatch):
    result = torch.tensor([[20.12345, 25.98765]]), torch.tensor([2]), torch.tensor([0.987654])
    monkeypatch.setattr(model, "run_network", lambda *arguments: None)
    monkeypatch.setattr(model, "decode", lambda *arguments: [result])
    assert model.find_keypoints(None, ABOUT_DICT, np.zeros((50, 40, 3), np.uint8)) == [
        {"class": "right", "x": 20.12, "y": 25.99, "score": 0.9877,
         "box": [5.12, 15.99, 35.12, 35.99]}]


def test_a_network_in_training_mode_answers_nobody():
    network, image_3d_array = model.KeypointNet(3), np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(AssertionError, match="eval"):
        model.find_keypoints(network, ABOUT_DICT, image_3d_array)
    assert model.find_keypoints(network.eval(), ABOUT_DICT, image_3d_array, threshold=1) == []


@pytest.mark.filterwarnings("error::UserWarning")
def test_find_keypoints_does_not_make_torch_warn(request):
    torch.set_warn_always(True)  # else torch warns once a process, perhaps in another test
    request.addfinalizer(lambda: torch.set_warn_always(False))
    image_3d_array = np.zeros((64, 64, 3), np.uint8)
    image_3d_array.flags.writeable = False
    network = model.KeypointNet(3).eval()
    assert model.find_keypoints(network, ABOUT_DICT, image_3d_array, threshold=1.0) == []


# ---------------------------------------------------------------- loading weights

def test_loaded_weights_answer_like_the_saved_network(tmp_path):
    network, path = random_network(), tmp_path / "weights.pt"
    torch.save({"network": network.state_dict(), **ABOUT_DICT}, path)
    loaded, about_dict = model.load_weights(tmp_path)
    image_4d = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(network(image_4d), loaded(image_4d)) and not loaded.training
    assert about_dict == ABOUT_DICT


def test_weights_that_a_gpu_saved_load_where_there_is_none(tmp_path, monkeypatch):
    path, call_list = tmp_path / "weights.pt", []
    torch.save({"network": random_network().state_dict(), **ABOUT_DICT}, path)
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **o: call_list.append(o) or real(*a, **o))
    model.load_weights(tmp_path)
    options, = call_list
    assert torch.device(options["map_location"]).type == "cpu" and options["weights_only"] is True


def test_missing_weights_are_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "DATA_FOLDER", tmp_path)
    with pytest.raises(UserError, match="pretrained.pt.*03_train"):
        model.load_weights(tmp_path)


def test_the_data_folders_own_weights_come_before_those_of_the_repository(tmp_path):
    category_list = model.load_weights(tmp_path)[1]["category_list"]
    assert category_list == ["background", "keyPoint_1", "keyPoint_2"]
    torch.save({"network": random_network().state_dict(), **ABOUT_DICT}, tmp_path / "weights.pt")
    assert model.load_weights(tmp_path)[1] == ABOUT_DICT


def test_04_and_05_use_a_folded_network_and_are_told_which(tmp_path, capsys):
    network, path = random_network(), tmp_path / "weights.pt"
    torch.save({"network": network.state_dict(), **ABOUT_DICT}, path)
    folded, about_dict = model.load_for_use(tmp_path)
    assert capsys.readouterr().out == f"using {path}\n" and about_dict == ABOUT_DICT
    assert not folded.training
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    image_3d_array = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    output_list = [model.run_network(*pair) for pair in ((network, image_3d_array),
                                                         (folded, image_3d_array))]
    assert output_list[0].shape == (1, 5, 3, 3)
    assert torch.allclose(*[output_4d.cpu() for output_4d in output_list], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the picture that is shown

def test_the_default_folder_shows_the_sample_whatever_data_set_it_holds(own, tmp_path, monkeypatch):
    """The README walks through this picture and its figures."""
    data = Path(shutil.copytree(own, tmp_path / "data"))
    shutil.copytree(common.DATA_FOLDER / "sample", data / "sample")
    for module in (common, model):
        monkeypatch.setattr(module, "DATA_FOLDER", data)
    image_3d_array, label_2d_array = model.example(data)
    assert np.array_equal(image_3d_array, common.read_image(data / "sample" / "00113.jpg"))
    assert np.allclose(label_2d_array, [[0, 1, 188.57, 888.34]])


def test_another_folder_shows_its_first_picture_with_a_keypoint(own, tmp_path):
    data = Path(shutil.copytree(own, tmp_path / "data"))
    labels_path = data / "train_labels.npy"
    label_2d_array = np.load(labels_path)
    label_2d_array = label_2d_array[label_2d_array[:, 0] >= 2]  # as if two pictures held none
    np.save(labels_path, label_2d_array)
    image_3d_array, shown_2d_array = model.example(data)
    assert np.array_equal(image_3d_array, np.load(data / "train_images.npy")[2])
    assert np.array_equal(shown_2d_array[:, 1:], label_2d_array[:2, 1:])
    assert not shown_2d_array[:, 0].any()  # picture 0 of the one that is shown


def test_another_folder_without_a_data_set_is_told_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="01_prepare_data.py --data"):
        model.example(tmp_path)


def test_a_cell_between_two_keypoints_of_a_class_beats_neither_of_them():
    """Three cells apart: the cell between them has learned the left one and is surest of all."""
    output_4d = scores(3, 3, 5, {(1, 1, 1): 0.8, (1, 1, 2): 0.99, (1, 1, 3): 0.9})
    output_4d[0, 0, 1, 2] = -1.4  # 22 px to the left: in the cell beside it
    assert [cell[:3] for cell in answers(output_4d, max_per_class=3)] == [(1, 1, 1), (1, 1, 3)]


@pytest.mark.parametrize("x", [-7.5, -3.0, 5.0, 195.0, 199.5])
def test_a_keypoint_just_outside_is_found_also_where_a_picture_holds_several(x):
    label_2d_array = np.array([[0, 1, x, 40], [0, 1, 100, 40]])
    gt_offset_4d_array, gt_class_id_3d_array = model.match(label_2d_array, 1, 4, 6)
    score_4d = 20.0 * torch.nn.functional.one_hot(torch.from_numpy(gt_class_id_3d_array))
    offset_4d = torch.from_numpy(gt_offset_4d_array) / model.OFFSET_UNIT
    output_4d = torch.cat((offset_4d, score_4d.permute(0, 3, 1, 2)), dim=1)
    (keypoint_2d, _, _), = model.decode(output_4d, max_per_class=2)
    assert sorted(keypoint_2d[:, 0].tolist()) == sorted([x, 100])


@pytest.mark.parametrize("row, column", [(0, 0), (0, 2), (1, 1), (2, 2)])
def test_a_cell_whose_answer_lies_far_outside_of_it_is_silent_wherever_it_is(row, column):
    output_4d = scores(3, 3, 3, {(1, row, column): 0.9})
    output_4d[0, 0] = -1.4 if column == 2 else 1.4  # all cells answer 22 px beside their prior
    output_4d[0, 1] = 1.4 if row == 0 else -1.4
    assert answers(output_4d, max_per_class=2) == []
