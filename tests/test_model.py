"""02_model.py: the grid, match and decode, where a cell looks, folding BN, loading weights."""

import math
import pickle

import numpy as np
import pytest
import torch

from common import CELL, UserError
from conftest import Sees, load

model = load("02_model")


def perfect_output(label_2d_array, picture_count, rows, columns, class_count, sure=20.0):
    """What a network that knows the labels would answer."""
    gt_offset_4d_array, gt_class_id_3d_array = model.match(label_2d_array, picture_count, rows, columns)
    output_4d = torch.zeros(picture_count, 2 + class_count, rows, columns)
    output_4d[:, :2] = torch.from_numpy(gt_offset_4d_array) / model.OFFSET_UNIT
    class_id_3d = torch.from_numpy(gt_class_id_3d_array).clamp(min=0)
    output_4d[:, 2:] = sure * torch.nn.functional.one_hot(class_id_3d, class_count).permute(0, 3, 1, 2)
    return output_4d


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
def test_the_network_gives_two_offsets_and_a_score_a_class_for_each_cell(rows, columns, class_count):
    network = model.KeypointNet(class_count).eval()
    with torch.no_grad():
        output_4d = network(torch.zeros(1, 3, rows * CELL, columns * CELL, dtype=torch.uint8))
    assert output_4d.shape == (1, 2 + class_count, rows, columns) and output_4d.dtype == torch.float32


def test_uint8_and_float_pictures_give_the_same_answers():
    network = random_network()
    image_4d = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(network(image_4d), network(image_4d.float()))


def test_a_cell_looks_where_its_prior_is_by_formula():
    size, jump, centre = model.receptive_field()
    assert jump == CELL and abs(centre - CELL / 2) <= 1 and size >= CELL


def test_a_cell_looks_where_its_prior_is_by_the_gradient_of_the_real_network():
    network = model.KeypointNet(3).eval()
    for parameter in network.parameters():  # all weights positive and equal: nothing cancels, no ReLU is ever shut
        parameter.data.fill_(0.01 if parameter.dim() == 4 else 1)
    size = model.receptive_field()[0]
    cells = 2 * math.ceil(size / 2 / CELL) + 1  # large enough for the middle cell to see no edge
    image_4d = torch.ones(1, 3, cells * CELL, cells * CELL, requires_grad=True)
    middle = cells // 2
    network(image_4d)[0, 0, middle, middle].backward()
    gradient_2d = image_4d.grad[0].abs().sum(dim=0)
    for dim in (0, 1):
        profile = gradient_2d.sum(dim=dim).double().numpy()
        seen = np.flatnonzero(profile)
        prior = (middle + 0.5) * CELL
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


# ---------------------------------------------------------------- match and decode

def test_priors_are_the_centres_of_the_cells():
    prior_3d = model.make_priors(3, 2)
    assert prior_3d.shape == (2, 3, 2)
    assert prior_3d[0].tolist() == [[CELL / 2, CELL * 1.5]] * 3 and prior_3d[1, :, 0].tolist() == [CELL / 2, CELL * 1.5, CELL * 2.5]


def places_all_over_the_grid(rows=60, columns=10):
    """Random places, and all kinds of places on borders and in corners of cells and of the picture."""
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
    label_2d_array = np.array([(i, 1 + i % 2, x, y) for i, (x, y) in enumerate(place_list)], np.float32)
    result_list = model.decode(perfect_output(label_2d_array, len(place_list), 60, 10, 3), max_per_class)
    assert len(result_list) == len(place_list)
    for (_, class_id, x, y), (keypoint_2d, class_id_1d, score_1d) in zip(label_2d_array, result_list):
        assert class_id_1d.tolist() == [class_id] and score_1d[0] > 0.99
        assert np.abs(keypoint_2d[0].numpy() - (x, y)).max() <= 1e-3


def test_two_keypoints_in_one_picture_are_told_apart():
    label_2d_array = np.array([(0, 1, 40, 50), (0, 2, 41, 90)], np.float32)
    keypoint_2d, class_id_1d, _ = model.decode(perfect_output(label_2d_array, 1, 4, 3, 3))[0]
    assert class_id_1d.tolist() == [1, 2] and np.allclose(keypoint_2d, [(40, 50), (41, 90)], atol=1e-3)


def test_a_keypoint_belongs_to_the_cell_that_it_lies_in():
    for x, y, row, column in ((CELL, CELL, 1, 1), (CELL - 0.01, CELL, 1, 0), (0, 0, 0, 0), (3 * CELL - 0.01, 2 * CELL + 1, 2, 2)):
        _, gt_class_id_3d_array = model.match(np.array([(0, 1, x, y)]), 1, 3, 3)
        assert np.argwhere(gt_class_id_3d_array[0] > 0).tolist() == [[row, column]]


def test_the_offset_points_from_the_prior_to_the_keypoint_in_px():
    gt_offset_4d_array, _ = model.match(np.array([(0, 1, 10, 70)]), 1, 3, 3)
    assert gt_offset_4d_array[0, :, 2, 0].tolist() == [10 - 16, 70 - 80]


def test_every_cell_that_learns_an_offset_learns_the_way_to_the_nearest_keypoint():
    label_2d_array = np.array([(0, 1, 70.5, 60.25), (1, 2, 33, 1)], np.float32)
    gt_offset_4d_array, gt_class_id_3d_array = model.match(label_2d_array, 2, 4, 5)
    place_4d_array = gt_offset_4d_array + model.make_priors(4, 5).numpy()
    for picture, _, x, y in label_2d_array:
        learns = gt_class_id_3d_array[int(picture)] != 0
        assert learns.any() and np.allclose(place_4d_array[int(picture)][:, learns].T, (x, y))


def test_of_two_keypoints_in_one_cell_the_one_nearer_to_the_prior_stays():
    near, far = (0, 1, 45, 50), (0, 2, 34, 34)
    for label_list in ([near, far], [far, near]):
        gt_offset_4d_array, gt_class_id_3d_array = model.match(np.array(label_list), 1, 3, 3)
        assert gt_class_id_3d_array[0, 1, 1] == 1 and gt_offset_4d_array[0, :, 1, 1].tolist() == [-3, 2]
        assert (gt_class_id_3d_array == 2).sum() == 0


def test_the_own_cell_of_a_keypoint_is_never_given_to_a_neighbours_keypoint():
    label_2d_array = np.array([(0, 1, 31.5, 16), (0, 2, 62, 2)])  # the first lies closer to the second cell's prior than the second
    _, gt_class_id_3d_array = model.match(label_2d_array, 1, 2, 3)
    assert gt_class_id_3d_array[0, 0, 0] == 1 and gt_class_id_3d_array[0, 0, 1] == 2


def test_a_keypoint_outside_of_the_grid_does_not_come_in_on_the_other_side():
    label_2d_array = np.array([(0, 1, -40, 16), (0, 1, 16, -40), (0, 1, 3 * CELL + 40, 16), (0, 1, 16, 3 * CELL + 40)])
    assert (model.match(label_2d_array, 1, 3, 3)[1] == 0).all()


def test_pictures_without_keypoints_match_to_background_only():
    gt_offset_4d_array, gt_class_id_3d_array = model.match(np.zeros((0, 4)), 2, 4, 3)
    assert gt_offset_4d_array.shape == (2, 2, 4, 3) and gt_class_id_3d_array.shape == (2, 4, 3)
    assert not gt_offset_4d_array.any() and not gt_class_id_3d_array.any()


def scores(class_count, rows, columns, score_dict):
    """Output whose class scores after softmax are those of score_dict {(class_id, row, column): score}, else nearly 0."""
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
    return sorted((c, int(y // CELL), int(x // CELL), round(s, 2)) for (x, y), c, s in
                  zip(keypoint_2d.tolist(), class_id_1d.tolist(), score_1d.tolist()))


def test_only_the_best_cell_of_a_class_answers_where_a_picture_holds_one():
    output_4d = scores(3, 6, 6, {(1, 0, 0): 0.8, (1, 4, 4): 0.9, (2, 2, 2): 0.6})
    assert answers(output_4d) == [(1, 4, 4, 0.9), (2, 2, 2, 0.6)]


def test_every_local_best_answers_where_a_picture_holds_several_of_a_class():
    output_4d = scores(3, 6, 6, {(1, 0, 0): 0.8, (1, 1, 1): 0.7, (1, 4, 4): 0.9, (2, 1, 1): 0.0001})
    output_4d[0, 3, 0, 1] = -30
    assert answers(output_4d, max_per_class=2) == [(1, 0, 0, 0.8), (1, 4, 4, 0.9)]


def test_what_stays_below_the_threshold_is_no_answer():
    output_4d = scores(3, 3, 3, {(1, 1, 1): 0.4})
    for max_per_class in (1, 2):
        assert answers(output_4d, max_per_class=max_per_class) == []
        assert answers(output_4d, max_per_class=max_per_class, threshold=0.3) == [(1, 1, 1, 0.4)]


@pytest.mark.parametrize("max_per_class", [1, 2])
def test_two_cells_that_are_equally_sure_give_one_answer(max_per_class):
    output_4d = scores(3, 4, 4, {(1, 1, 1): 0.9, (1, 1, 2): 0.9})
    output_4d[0, 3, 1, 1:3] = 60  # softmax rounds both to exactly 1, as a well trained network's scores are
    output_4d[0, 0, 1, 1], output_4d[0, 0, 1, 2] = 0.9, -0.9  # they mean places 3.2 px apart
    assert [class_id for class_id, *_ in answers(output_4d, max_per_class=max_per_class)] == [1]


def test_pictures_of_a_batch_are_decoded_each_for_itself():
    output_4d = torch.cat((scores(3, 3, 3, {}), scores(3, 3, 3, {(2, 0, 1): 0.9})))
    first, second = model.decode(output_4d)
    assert first[0].shape == (0, 2) and len(first[1]) == len(first[2]) == 0
    assert second[1].tolist() == [2] and second[0].tolist() == [[CELL * 1.5, CELL / 2]]


def test_find_keypoints_takes_pictures_of_any_size_and_gives_px_of_the_picture():
    about_dict = {"category_list": ["background", "left", "right"], "box_size": [30, 20], "max_per_class": 1}
    for height, width in ((96, 96), (70, 75), (65, 100), (300, 90)):
        image_3d_array = np.zeros((height, width, 3), np.uint8)
        image_3d_array[60, 70] = (255, 0, 0)
        image_3d_array.flags.writeable = False  # as read_image gives them
        keypoint, = model.find_keypoints(Sees(), about_dict, image_3d_array)
        assert keypoint["class"] == "right" and keypoint["score"] > 0.99
        assert np.allclose((keypoint["x"], keypoint["y"]), (70.5, 60.5), atol=0.01)
        assert np.allclose(keypoint["box"], (55.5, 50.5, 85.5, 70.5), atol=0.01)


def test_looking_again_moves_nothing_for_a_network_that_moves_its_answer_with_the_picture():
    height, width = 8 * CELL, 5 * CELL
    # Not a dot in the outermost row or column: crops that stick out repeat those, and then there are many dots.
    for x in (1, 2, 31, 32, 33, 47, 80, width - 33, width - 32, width - 2):
        for y in (1, 15, 16, 63, 64, 130, height - 32, height - 2):
            image_3d = torch.zeros(height, width, 3, dtype=torch.uint8)
            image_3d[y, x] = 255
            place_2d = torch.tensor([(x + 0.5, y + 0.5)])
            again_2d, score_1d = model.look_again(Sees(), image_3d, place_2d, torch.tensor([2]))
            assert (again_2d - place_2d).abs().max() <= 1e-3 and score_1d.shape == (1,)


def test_looks_at_a_keypoint_in_the_corner_differ_as_much_as_elsewhere():
    """Kept inside of the picture, its four crops would be one and the same, and their mean worth no more than one."""
    image_3d = torch.zeros(8 * CELL, 5 * CELL, 3, dtype=torch.uint8)
    for x, y in ((77, 101), (3, 2), (5 * CELL - 4, 8 * CELL - 2)):
        image_3d[y, x] = 255
        dot_place_list = []

        class Watched(Sees):
            def forward(self, images_4d):
                dot_place_list.extend(tuple(place) for place in (images_4d[:, 0] == 255).nonzero()[:, 1:].tolist())
                return super().forward(images_4d)

        model.look_again(Watched(), image_3d, torch.tensor([(x + 0.5, y + 0.5)]), torch.tensor([1]))
        assert len(dot_place_list) == len(set(dot_place_list)) == len(model.LOOK_LIST)  # where the dot lies in each crop
        image_3d[y, x] = 0


def test_looking_again_mends_what_the_place_in_the_raster_does_and_never_jumps_to_another_keypoint():
    image_3d = torch.zeros(8 * CELL, 5 * CELL, 3, dtype=torch.uint8)
    image_3d[101, 77] = 255
    (first_2d, _, _), = model.decode(Sees(snap=8)(image_3d.permute(2, 0, 1)[None]))
    again_2d, _ = model.look_again(Sees(snap=8), image_3d, first_2d, torch.tensor([1]))
    truth_1d = torch.tensor([77.5, 101.5]) - 4  # snapping down to a multiple of 8 px is 4 px to the upper left on average
    assert (again_2d[0] - truth_1d).norm() < (first_2d[0] - truth_1d).norm()
    other_2d = torch.tensor([(77.5 + 12, 101.5)])  # a look that sees another keypoint, 12 px away, has no say
    assert torch.equal(model.look_again(Sees(), image_3d, other_2d, torch.tensor([1]))[0], other_2d)


def test_a_keypoint_needs_both_looks():
    image_3d = torch.zeros(8 * CELL, 5 * CELL, 3, dtype=torch.uint8)
    image_3d[101, 77] = 255

    class Doubts(Sees):
        def forward(self, images_4d):
            output_4d = super().forward(images_4d)
            output_4d[:, 2] += 10 * (images_4d.shape[2] < 8 * CELL)  # on crops it takes background for as likely as the class
            return output_4d

    (place_2d, class_id_1d, score_1d), no_keypoint = model.detect(Sees(), image_3d), model.detect(Doubts(), image_3d, threshold=0.6)
    assert np.allclose(place_2d, [[77.5, 101.5]], atol=1e-3) and class_id_1d.tolist() == [1] and score_1d > 0.99
    assert [len(part) for part in no_keypoint] == [0, 0, 0]
    assert model.detect(Doubts(), image_3d, threshold=0.3)[2] == pytest.approx(0.5, abs=0.03)


@pytest.mark.filterwarnings("error::UserWarning")
def test_find_keypoints_does_not_make_torch_warn(request):
    torch.set_warn_always(True)  # else torch warns once a process, which may have been in another test
    request.addfinalizer(lambda: torch.set_warn_always(False))
    image_3d_array = np.zeros((64, 64, 3), np.uint8)
    image_3d_array.flags.writeable = False
    about_dict = {"category_list": ["background", "a"], "box_size": [30, 30], "max_per_class": 1}
    assert model.find_keypoints(model.KeypointNet(2).eval(), about_dict, image_3d_array, threshold=1.0) == []


# ---------------------------------------------------------------- loading weights

def saved(trained, **changes):
    return {"network": trained.state_dict(), "category_list": ["background", "a", "b"], "box_size": [30.0, 30.0], "max_per_class": 1,
            **changes}


def test_loaded_weights_answer_like_the_saved_network(tmp_path):
    network = random_network()
    torch.save(saved(network), tmp_path / "weights.pt")
    loaded, about_dict = model.load_weights(tmp_path / "weights.pt")
    image_4d = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(network(image_4d), loaded(image_4d)) and not loaded.training
    assert {key: about_dict[key] for key in ("category_list", "box_size", "max_per_class")} == {
        "category_list": ["background", "a", "b"], "box_size": [30.0, 30.0], "max_per_class": 1}


class Payload:
    """A pickle that would run code when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def write_bad_weights(path, kind, trap):
    """Write what load_weights must refuse."""
    network = random_network()
    torch.save(saved(network), path)
    whole = path.read_bytes()
    state_dict = network.state_dict()
    first = next(iter(state_dict))
    if kind in ("half", "nearly whole", "a few bytes", "empty", "text"):
        path.write_bytes({"half": whole[:len(whole) // 2], "nearly whole": whole[:-30], "a few bytes": whole[:7], "empty": b"",
                          "text": b"I am a text\n" * 20}[kind])
    elif kind == "malicious pickle":
        path.write_bytes(pickle.dumps(Payload(trap)))
    elif kind == "malicious entry":
        torch.save(saved(network, extra=Payload(trap)), path)
    elif kind == "malicious, old format":
        torch.save(saved(network, extra=Payload(trap)), path, _use_new_zipfile_serialization=False)
    elif kind == "harmless pickle":
        path.write_bytes(pickle.dumps({"category_list": ["background", "a"]}))
    else:
        torch.save({
            "other class count": lambda: saved(network, category_list=["background", "a"]),
            "more classes": lambda: saved(network, category_list=["background", "a", "b", "c"]),
            "missing layer": lambda: saved(network, network={k: v for k, v in state_dict.items() if k != first}),
            "other layer shape": lambda: saved(network, network={**state_dict, first: state_dict[first][:1]}),
            "another network": lambda: saved(torch.nn.Linear(3, 3)),
            "no categories": lambda: {"network": state_dict},
            "categories are a number": lambda: saved(network, category_list=3),
            "weights are a list": lambda: saved(network, network=[1, 2]),
            "a tensor": lambda: torch.zeros(3),
            "a list": lambda: [1, 2],
            "a number": lambda: 7,
            "nothing": lambda: None,
            "a whole network's state_dict": lambda: state_dict,
        }[kind](), path)


BAD_WEIGHTS = ["half", "nearly whole", "a few bytes", "empty", "text", "malicious pickle", "malicious entry", "malicious, old format",
               "harmless pickle", "other class count", "more classes", "missing layer", "other layer shape", "another network",
               "no categories", "categories are a number", "weights are a list", "a tensor", "a list", "a number", "nothing",
               "a whole network's state_dict"]


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_that_do_not_fit_are_refused_in_one_sentence_and_nothing_in_them_runs(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(model, "LAYER_LIST", [(k, s, p, 8) for k, s, p, _ in model.LAYER_LIST])  # small files
    path, trap = tmp_path / "weights.pt", tmp_path / "trap"
    write_bad_weights(path, kind, trap)
    with pytest.raises(UserError) as caught:
        model.load_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not trap.exists()


def test_the_malicious_pickle_of_these_tests_would_really_run_code(tmp_path):
    write_bad_weights(tmp_path / "weights.pt", "malicious pickle", tmp_path / "trap")
    pickle.loads((tmp_path / "weights.pt").read_bytes()).close()
    assert (tmp_path / "trap").exists()


def test_weights_of_a_network_with_other_layers_are_refused(tmp_path, monkeypatch):
    torch.save(saved(random_network()), tmp_path / "weights.pt")
    monkeypatch.setattr(model, "LAYER_LIST", [(k, s, p, c + 8) for k, s, p, c in model.LAYER_LIST])
    with pytest.raises(UserError, match="weights.pt"):
        model.load_weights(tmp_path / "weights.pt")


def test_missing_weights_are_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match="03_train"):
        model.load_weights(tmp_path / "weights.pt")


def test_the_data_folders_own_weights_come_before_those_of_the_repository(tmp_path):
    assert model.find_weights(tmp_path).name == "pretrained.pt"
    (tmp_path / "weights.pt").write_bytes(b"")
    assert model.find_weights(tmp_path) == tmp_path / "weights.pt"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_bytes_in_weights_end_in_a_sentence_or_load(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "LAYER_LIST", [(k, s, p, 4) for k, s, p, _ in model.LAYER_LIST])
    path, rng = tmp_path / "weights.pt", np.random.default_rng(0)
    refused = 0
    for new_format in (True, False):
        torch.save(saved(model.KeypointNet(3)), path, _use_new_zipfile_serialization=new_format)
        whole = path.read_bytes()
        for _ in range(100):
            changed = bytearray(whole)
            for place in rng.integers(0, len(whole) if rng.random() < 0.5 else 1500, rng.integers(1, 6)):
                changed[place] = rng.integers(256)
            path.write_bytes(changed)
            try:
                model.load_weights(path)
            except UserError:
                refused += 1
    assert refused > 20
