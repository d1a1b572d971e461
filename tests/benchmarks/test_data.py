"""The data sets: shapes, ranges, determinism, both sources of each, and the statistics that their docstrings state."""

import numpy as np
import pytest
from scipy import integrate, interpolate, linalg, special

from benchmarks import data
from benchmarks.data import cifar10, faces, shakespeare, smooth_curves

SHAPES = {"cifar10": (32, 32, 3), "curves": (28, 28), "digits": (8, 8), "faces": (25, 25), "mnist": (28, 28)}


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch):
    monkeypatch.delenv("CURVAX_DATA", raising=False)


@pytest.fixture
def folder(tmp_path):
    """Files with the keys and dtypes of the real ones, few examples in each."""
    rng = np.random.default_rng(0)

    def images(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    for name, shape in [("mnist", (28, 28)), ("cifar10", (32, 32, 3))]:
        np.savez(
            tmp_path / f"{name}_subset.npz",
            x_train=images(12, *shape),
            y_train=(np.arange(12) % 10).astype(np.uint8),
            x_test=images(5, *shape),
            y_test=np.arange(5, dtype=np.uint8),
        )
    np.savez(tmp_path / "olivetti_faces.npz", images=images(40, 64, 64), subject=np.arange(40, dtype=np.uint8))
    (tmp_path / "tiny_shakespeare.txt").write_text("To be, or not to be.\n" * 20, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", SHAPES)
def test_images_are_flat_float32_rows_in_range_and_always_the_same(name):
    dataset = data.load(name, num_train=60, num_test=20)
    assert dataset.name == name
    assert dataset.image_shape == SHAPES[name]
    width = np.prod(SHAPES[name])
    assert dataset.train_inputs.shape == (60, width)
    assert dataset.test_inputs.shape == (20, width)
    assert dataset.train_inputs.dtype == dataset.test_inputs.dtype == np.float32
    for rows in (dataset.train_inputs, dataset.test_inputs):
        pixels = dataset.pixels(rows)
        assert pixels.shape == (len(rows), *SHAPES[name])
        assert pixels.min() >= 0
        assert pixels.max() <= 1
        assert np.all(rows.std(axis=1) > 0)
    if name != "faces":
        np.testing.assert_array_equal(dataset.pixels(dataset.test_inputs).reshape(20, -1), dataset.test_inputs)

    again = data.load(name, num_train=60, num_test=20)
    np.testing.assert_array_equal(again.train_inputs, dataset.train_inputs)
    np.testing.assert_array_equal(again.test_inputs, dataset.test_inputs)
    assert again.source == dataset.source
    assert dataset.source in str(dataset)
    assert not np.array_equal(dataset.train_inputs[:20], dataset.test_inputs)


@pytest.mark.parametrize("name", ["cifar10", "digits", "mnist"])
def test_classes_are_int32_below_ten_and_follow_the_inputs(name):
    dataset = data.load(name, num_train=200, num_test=20)
    assert dataset.num_classes == 10
    assert dataset.train_targets.shape == (200,)
    assert dataset.test_targets.shape == (20,)
    assert dataset.train_targets.dtype == dataset.test_targets.dtype == np.int32
    assert set(dataset.train_targets.tolist()) == set(range(10))


@pytest.mark.parametrize("name", ["curves", "faces"])
def test_autoencoder_sets_have_no_targets(name):
    dataset = data.load(name, num_train=5, num_test=5)
    assert dataset.train_targets is None
    assert dataset.test_targets is None
    assert dataset.num_classes is None


def test_digits_are_split_1437_and_360_without_overlap():
    dataset = data.load("digits")
    assert len(dataset.train_inputs) == 1437
    assert len(dataset.test_inputs) == 360
    rows = np.concatenate([dataset.train_inputs, dataset.test_inputs])
    assert len(np.unique(rows, axis=0)) == 1797


def test_enlarged_digits_keep_the_corners_and_the_classes():
    small, large = data.load("digits"), data.load("mnist")
    corners = np.ix_(range(360), [0, -1], [0, -1])
    before, after = small.pixels(small.test_inputs), large.pixels(large.test_inputs)
    np.testing.assert_allclose(after[corners], before[corners], atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(small.test_targets, large.test_targets)


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_files_in_the_folder_are_used(folder, monkeypatch, by):
    if by == "environment":
        monkeypatch.setenv("CURVAX_DATA", str(folder))
    argument = folder if by == "argument" else None
    for name in ("mnist", "cifar10"):
        dataset = data.load(name, argument)
        with np.load(folder / f"{name}_subset.npz") as arrays:
            for part, inputs, targets in [
                ("train", dataset.train_inputs, dataset.train_targets),
                ("test", dataset.test_inputs, dataset.test_targets),
            ]:
                np.testing.assert_allclose(inputs * 255, arrays[f"x_{part}"].reshape(len(inputs), -1), rtol=1e-6)
                np.testing.assert_array_equal(targets, arrays[f"y_{part}"])
                assert targets.dtype == np.int32
        assert f"{name}_subset.npz" in dataset.source
        assert "instead" not in dataset.source
    assert "instead" not in data.load("faces", argument, num_train=60, num_test=20).source
    assert "instead" not in data.load("shakespeare", argument).source


@pytest.mark.parametrize("name", ["cifar10", "faces", "mnist", "shakespeare"])
def test_the_source_says_why_a_substitute_is_used(name, tmp_path):
    without, empty = (data.load(name, folder, num_train=5, num_test=5).source for folder in (None, tmp_path))
    assert "instead" in without
    assert "no data folder given" in without
    assert "in the data folder" in empty
    assert str(tmp_path) not in empty


def test_the_first_examples_are_taken_and_more_than_there_are_is_an_error(folder):
    whole, part = data.load("mnist", folder), data.load("mnist", folder, num_train=3, num_test=0)
    np.testing.assert_array_equal(part.train_inputs, whole.train_inputs[:3])
    np.testing.assert_array_equal(part.train_targets, whole.train_targets[:3])
    assert part.test_inputs.shape == (0, 784)
    with pytest.raises(ValueError, match="Asked for 13 examples of mnist for training, of which there are 12"):
        data.load("mnist", folder, num_train=13)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'imagenet'.*curves.*mnist"):
        data.load("imagenet")


def test_curves_do_not_depend_on_how_many_are_drawn_but_on_the_seed():
    many = data.curves(700, seed=3)
    np.testing.assert_array_equal(data.curves(20, seed=3), many[:20])
    assert not np.array_equal(data.curves(20, seed=4), many[:20])
    assert data.curves(0, seed=3).shape == (0, 784)
    assert data.curves(900, seed=3).shape == (900, 784)  # more than one block holds


def test_curves_are_mostly_black_have_a_bright_stroke_and_stay_off_the_border():
    images = data.curves(500, seed=0).reshape(-1, 28, 28)
    assert np.mean(images == 0) > 0.75
    assert images.max(axis=(1, 2)).min() > 0.9
    border = np.ones((28, 28), bool)
    border[2:-2, 2:-2] = False
    assert images[:, border].max() < 0.15


def test_curves_are_as_hard_for_pca_as_those_of_the_paper():
    """5.85 per test image with 18 components on the full set, as the module states; the paper's figure 2A has 5.90."""
    train, test = data.curves(2500, seed=0), data.curves(800, seed=1)
    mean = train.mean(axis=0)
    centred = train - mean
    components = linalg.eigh(centred.T @ centred, subset_by_index=[784 - 18, 783])[1]
    residual = (test - mean) - (test - mean) @ components @ components.T
    assert 5.6 < np.mean(np.sum(residual**2, axis=1)) < 6.1


def test_a_stroke_is_the_natural_cubic_spline_through_its_points():
    points = np.random.default_rng(0).uniform(5, 22, (3, 2))
    path = smooth_curves.spline_weights() @ points
    spline = interpolate.CubicSpline([0, 1, 2], points, bc_type="natural")
    np.testing.assert_allclose(path, spline(np.linspace(0, 2, len(path))), rtol=1e-12)


def test_a_stroke_is_gaussian_ink_integrated_along_the_spline():
    points = np.array([[7.0, 18.0], [12.0, 9.0], [20.0, 13.0]])
    spline = interpolate.CubicSpline([0, 1, 2], points, bc_type="natural")
    image = smooth_curves.draw(points[None]).reshape(28, 28)
    for row, column in [(9, 12), (12, 9), (18, 7), (11, 16), (14, 12), (5, 20)]:

        def ink(position, pixel=(column, row)):
            squared_distance = np.sum((spline(position) - pixel) ** 2)
            return np.exp(-squared_distance / 2) / np.sqrt(2 * np.pi) * np.linalg.norm(spline(position, 1))

        expected = integrate.quad(ink, 0, 1)[0] + integrate.quad(ink, 1, 2)[0]
        assert abs(image[row, column] - min(expected, 1)) < 0.5 / 255 + 2e-3


def test_a_straight_stroke_has_a_gaussian_profile():
    image = smooth_curves.draw(np.array([[[4.0, 14.0], [14.0, 14.0], [24.0, 14.0]]])).reshape(28, 28)
    offsets = np.arange(28) - 14
    np.testing.assert_allclose(image[:, 14], np.exp(-(offsets**2) / 2), atol=0.5 / 255 + 1e-4)


def test_points_of_curves_are_apart_and_turn_gently():
    points = smooth_curves.smooth_triples(np.random.default_rng(0))
    assert 150 < len(points) < 1000
    first, second = points[:, 0] - points[:, 1], points[:, 2] - points[:, 1]
    lengths = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    assert min(map(np.min, lengths)) >= 4
    angles = np.degrees(np.arccos(np.sum(first * second, axis=1) / (lengths[0] * lengths[1])))
    assert angles.min() >= 60 - 1e-9


def test_entropy_floor_is_the_least_cross_entropy_of_any_reconstruction():
    rng = np.random.default_rng(0)
    images = rng.random((1500, 6)).astype(np.float32)  # more than one chunk
    images[:, 0], images[:, 1] = 0, 1
    x = images.astype(np.float64)
    expected = np.mean(np.sum(special.entr(x) + special.entr(1 - x), axis=1))
    floor = data.entropy_floor(images)
    np.testing.assert_allclose(floor, expected, rtol=1e-12)

    def cross_entropy(prediction):
        return np.mean(np.sum(-special.xlogy(x, prediction) - special.xlog1py(1 - x, -prediction), axis=1))

    np.testing.assert_allclose(cross_entropy(x), floor, rtol=1e-12)
    for size in (-1e-3, 1e-3):
        assert cross_entropy(np.clip(x + size, 1e-12, 1 - 1e-12)) > floor


def test_faces_are_standardised_with_the_training_statistics(folder):
    dataset = data.load("faces", folder, num_train=300, num_test=50)
    np.testing.assert_allclose(dataset.train_inputs.mean(axis=0, dtype=np.float64), 0, atol=1e-5)
    np.testing.assert_allclose(np.mean(dataset.train_inputs.var(axis=0, dtype=np.float64)), 1, rtol=1e-5)
    assert dataset.pixel_mean.shape == (625,)
    assert abs(dataset.test_inputs.mean(axis=0)).max() > 1e-3


def test_faces_of_the_last_ten_people_are_only_for_testing(folder):
    """Each person here is one constant grey, so that every patch tells whose it is."""
    grey = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None] * 6, (40, 64, 64))
    np.savez(folder / "olivetti_faces.npz", images=grey, subject=np.arange(40))
    dataset = data.load("faces", folder, num_train=60, num_test=30)

    def people(rows):
        patches = dataset.pixels(rows) * 255 / 6
        np.testing.assert_allclose(patches.std(axis=(1, 2)), 0, atol=1e-4)
        return np.round(patches.mean(axis=(1, 2))).astype(int)

    np.testing.assert_array_equal(np.sort(people(dataset.train_inputs)), np.repeat(np.arange(30), 2))
    np.testing.assert_array_equal(np.sort(people(dataset.test_inputs)), np.repeat(np.arange(30, 40), 3))


def test_patches_are_turned_scaled_shifted_and_mirrored_as_stated():
    """On an image whose pixel is a linear function of its place, a patch is one too, and its slopes are the map."""
    down, right = np.mgrid[:64, :64].astype(np.float32)
    images = np.stack([down, right])
    uniform = np.random.default_rng(0).random((200, 5), np.float32)
    rows, columns = faces.patch_positions(uniform, max_degrees=15)
    one = np.zeros(200, int)
    np.testing.assert_allclose(faces.interpolated(images, one, rows, columns), rows, atol=1e-4)
    np.testing.assert_allclose(faces.interpolated(images, one + 1, rows, columns), columns, atol=1e-4)

    rows, columns = rows.reshape(-1, 25, 25), columns.reshape(-1, 25, 25)
    centres = np.stack([rows[:, 12, 12], columns[:, 12, 12]])
    assert 1.8 < np.abs(centres - 31.5).max() <= 2 + 1e-5
    step = np.hypot(rows[:, 13, 12] - rows[:, 12, 12], columns[:, 13, 12] - columns[:, 12, 12])
    np.testing.assert_allclose(step, 1.4 + 0.4 * uniform[:, 1], atol=1e-4)
    sine = (rows[:, 12, 13] - rows[:, 12, 12]) / step
    np.testing.assert_allclose(np.degrees(np.arcsin(sine)), 15 * (2 * uniform[:, 0] - 1), atol=1e-2)
    mirrored = columns[:, 12, 13] < columns[:, 12, 12]
    np.testing.assert_array_equal(mirrored, uniform[:, 4] >= 0.5)


def test_patches_at_any_angle_stay_inside_their_face():
    extreme = np.array([[turn, 1, down, right, 0] for turn in (0.25, 0.75) for down in (0, 1) for right in (0, 1)])
    rows, columns = faces.patch_positions(extreme.astype(np.float32), max_degrees=90)
    assert min(rows.min(), columns.min()) >= 0
    assert max(rows.max(), columns.max()) < 63


def test_patches_do_not_depend_on_how_many_are_cut():
    images, _ = faces.drawn_faces()
    np.testing.assert_array_equal(faces.patches(images, 1100, 15, seed=2)[:30], faces.patches(images, 30, 15, seed=2))


def test_drawn_faces_look_alike_within_a_person():
    images, people = faces.drawn_faces()
    assert images.shape == (400, 64, 64)
    np.testing.assert_array_equal(people, np.repeat(np.arange(40), 10))
    centre = images[:, 16:48, 16:48].reshape(40, 10, -1)
    within = np.mean(np.var(centre, axis=1))
    between = np.mean(np.var(np.mean(centre, axis=1), axis=0))
    assert between > within


def test_generated_shapes_can_be_told_apart_by_shape_alone():
    """The mean mask of each class, on shapes of one place and size, differs from that of every other class."""
    v, u = (np.mgrid[:41, :41] - 20) / 16
    masks = np.stack([cifar10.depth(index, u, v) > 0 for index in range(10)])
    assert np.all(masks.mean(axis=(1, 2)) > 0.05)
    different = np.mean(masks[:, None] != masks[None], axis=(2, 3)) + np.eye(10)
    assert different.min() > 0.02


def test_text_rows_are_followed_by_the_same_rows_one_character_later(folder):
    dataset = data.load("shakespeare", folder, sequence_length=7)
    text = (folder / "tiny_shakespeare.txt").read_text(encoding="utf-8")
    train, test = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    assert dataset.vocabulary == "".join(sorted(set(text)))
    assert dataset.num_classes == len(dataset.vocabulary)
    assert dataset.image_shape is None
    for inputs, targets, part in [
        (dataset.train_inputs, dataset.train_targets, train),
        (dataset.test_inputs, dataset.test_targets, test),
    ]:
        assert inputs.dtype == targets.dtype == np.int32
        assert inputs.shape == targets.shape == ((len(part) - 1) // 7, 7)
        decoded = "".join(dataset.vocabulary[code] for code in inputs.reshape(-1))
        assert decoded == part[: len(decoded)]
        np.testing.assert_array_equal(inputs.reshape(-1)[1:], targets.reshape(-1)[:-1])
        assert dataset.vocabulary[targets[-1, -1]] == part[len(decoded)]
    assert "rows of 7 characters" in str(dataset)
    with pytest.raises(ValueError, match="not images"):
        dataset.pixels(dataset.train_inputs)


def test_text_from_the_grammar_is_long_and_always_the_same():
    text = shakespeare.text_from_grammar()
    assert 300_000 < len(text) < 600_000
    assert text == shakespeare.text_from_grammar()
    assert "Widow:\n" in text
