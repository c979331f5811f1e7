"""What looks into an encoder, against slow references, and the sheets by their pixels."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import Block

from mae_core.looking import cls_attention, nearest, pca_colours
from mae_core.model import MaskedAutoencoder
from mae_core.sheets import confusion_picture, heat_overlay, neighbour_sheet, titled_grid


def small_model(**changes) -> MaskedAutoencoder:
    """A model with random values everywhere, so that attention is far from uniform."""
    sizes = {"patch_size": 4, "width": 24, "depth": 2, "num_heads": 3, "decoder_width": 16, "decoder_depth": 1}
    sizes |= {"decoder_heads": 2, "image_size": (16, 24)}
    model = MaskedAutoencoder("vit_tiny_patch16_224", **{**sizes, **changes})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    return model


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# Attention of the class token


@pytest.mark.parametrize("class_tokens", [1, 3])
def test_attention_is_the_one_that_timm_computes_unfused(class_tokens: int) -> None:
    model, images = small_model(class_tokens=class_tokens), randn(5, 3, 16, 24)
    block = model.encoder.blocks[1]
    assert isinstance(block, Block)
    attn: Any = block.attn
    assert attn.fused_attn
    found = cls_attention(model, images)
    assert found.shape == (5, 3, 4, 6)
    assert not found.requires_grad

    attn.fused_attn = False
    weights = []
    handle = attn.attn_drop.register_forward_hook(lambda _module, _inputs, output: weights.append(output.detach()))
    model.encode(images)
    handle.remove()
    of_class = weights[0][:, :, :class_tokens].mean(dim=2)
    torch.testing.assert_close(found, of_class[:, :, class_tokens:].reshape(5, 3, 4, 6))
    # What is missing to 1 is the share of the class tokens themselves.
    torch.testing.assert_close(1 - found.sum(dim=(2, 3)), of_class[:, :, :class_tokens].sum(dim=2))
    assert weights[0][:, :, 0].std(dim=2).min() > 1e-3  # else everything would agree


def test_attention_stands_where_the_patch_is() -> None:
    # With one block a patch's key is its own, so the odds between all others stay as they are.
    model, images = small_model(depth=1), randn(1, 3, 16, 24)
    changed = images.clone()
    changed[:, :, 4:8, 16:20] *= -3.0  # row 1, column 4
    before, after = (cls_attention(model, x)[0].log() for x in (images, changed))
    shift = (after - before) - (after - before)[:, :1, :1]
    moved = torch.zeros(4, 6, dtype=torch.bool)
    moved[1, 4] = True
    assert (shift[:, moved].abs() > 1e-2).all()
    assert (shift[:, ~moved].abs() < 1e-4).all()


def test_attention_leaves_the_model_as_it_was_and_refuses_other_images() -> None:
    model, images = small_model(), randn(2, 3, 16, 24)
    latent = model.encode(images)
    first, second = cls_attention(model, images), cls_attention(model, images)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(ValueError, match="do not fit this model"):
        cls_attention(model, randn(2, 3, 16, 16))
    torch.testing.assert_close(model.encode(images), latent, rtol=0, atol=0)
    assert model.encode(images).requires_grad
    pickle.dumps(model)  # a hook left behind could not travel


# Principal components as colours


def planted(num_images: int = 4, grid: tuple[int, int] = (6, 9), width: int = 32) -> tuple[torch.Tensor, np.ndarray]:
    """Features [B, N, D] along three orthonormal directions, and the skewed amounts [B, rows, columns, 3]."""
    amount = torch.rand(num_images * grid[0] * grid[1], 3, generator=torch.Generator().manual_seed(2)).pow(3)
    directions = torch.linalg.qr(randn(width, 3, seed=3)).Q
    features = randn(width, seed=4) * 3 + (amount * torch.tensor([9.0, 6.0, 4.0])) @ directions.T
    features = features + 0.01 * randn(*features.shape, seed=5)
    return features.unflatten(0, (num_images, -1)), amount.reshape(num_images, *grid, 3).numpy()


def test_planted_directions_are_the_colours_in_their_order() -> None:
    features, amount = planted()
    colours = pca_colours(features, (6, 9))
    assert colours.shape == (4, 6, 9, 3)
    assert colours.dtype == np.uint8
    for channel in range(3):
        # Positive: the rarer side is the brighter one.
        assert np.corrcoef(colours[..., channel].ravel(), amount[..., channel].ravel())[0, 1] > 0.98
        assert colours[..., channel].min() == 0
        assert colours[..., channel].max() == 255


def test_colours_do_not_depend_on_the_basis_of_the_features() -> None:
    features, _ = planted()
    colours = pca_colours(features, (6, 9)).astype(int)
    np.testing.assert_array_equal(colours, pca_colours(features, (6, 9)))
    np.testing.assert_array_equal(colours, pca_colours(-features, (6, 9)))
    for seed in range(4):
        flipped = features * torch.where(randn(32, seed=seed) < 0, -1.0, 1.0)
        assert np.abs(colours - pca_colours(flipped, (6, 9))).max() <= 1
        rotation = torch.linalg.qr(randn(32, 32, seed=seed)).Q
        assert np.abs(colours - pca_colours(features @ rotation, (6, 9))).max() <= 1


def test_all_images_share_their_colours() -> None:
    features, _ = planted()
    features[2] = features[0]
    colours = pca_colours(features, (6, 9))
    np.testing.assert_array_equal(colours[0], colours[2])
    # One image among others does not get a range of its own.
    features[3] = features[:1].mean(dim=1) + 0.05 * randn(54, 32)
    assert pca_colours(features, (6, 9))[3, ..., 0].astype(float).std() < 10


def test_an_outlier_does_not_darken_the_others() -> None:
    features, amount = planted()
    features[0, 0] += 20 * (features.flatten(0, 1)[amount[..., 0].argmax()] - features.mean(dim=(0, 1)))
    shades = pca_colours(features, (6, 9))[..., 0].ravel()[1:]
    assert shades.std() > 40


def test_what_does_not_vary_is_grey() -> None:
    features, _ = planted()
    line = features.mean(dim=(0, 1)) + torch.rand(4, 54, 1) * randn(32)
    colours = pca_colours(line, (6, 9))
    assert len(np.unique(colours[..., 0])) > 50
    assert (colours[..., 1:] == 128).all()
    assert (pca_colours(torch.ones(2, 54, 32) * randn(32), (6, 9)) == 128).all()


def test_features_that_fit_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="without the class token"):
        pca_colours(randn(2, 55, 32), (6, 9))
    with pytest.raises(ValueError, match="not finite"):
        pca_colours(torch.full((2, 54, 32), torch.nan), (6, 9))


# Nearest neighbours


@pytest.mark.parametrize("block", [1, 7, 40, 1 << 24])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_neighbours_are_those_of_the_whole_table(block: int, exclude_self: bool) -> None:
    base = randn(37, 8).double() * torch.rand(37, 1, generator=torch.Generator().manual_seed(1)) * 9
    query = base[:23]
    table = torch.nn.functional.cosine_similarity(query[:, None], base[None], dim=2).numpy()
    if exclude_self:
        np.fill_diagonal(table, -np.inf)
    expected = np.argsort(-table, axis=1)[:, :5]
    index, similarity = nearest(query, base, 5, exclude_self, block=block)
    np.testing.assert_array_equal(index.numpy(), expected)
    np.testing.assert_allclose(similarity.numpy(), np.take_along_axis(table, expected, 1), atol=1e-5)
    assert (index[:, 0] == torch.arange(23)).all() == (not exclude_self)
    assert similarity.max() <= 1


@pytest.mark.parametrize("block", [3, 1 << 24])
def test_no_more_neighbours_than_there_are(block: int) -> None:
    base = randn(6, 8)
    index, similarity = nearest(base, base, 50, exclude_self=True, block=block)
    assert [sorted(row) for row in index.tolist()] == [[i for i in range(6) if i != row] for row in range(6)]
    assert similarity.isfinite().all()


def test_memory_stays_bounded() -> None:
    # All similarities at once would be 256 MB; 4 MB are allowed, and a few buffers of that size.
    query, base = randn(32_000, 2), randn(32_000, 2, seed=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        nearest(query[:2_000], base, 3, block=1 << 20)
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert largest <= 3 * 4 * (1 << 20)


def test_neighbours_that_cannot_be_found_are_refused() -> None:
    with pytest.raises(ValueError, match="8 wide, base features 9"):
        nearest(randn(3, 8), randn(3, 9), 1)
    with pytest.raises(ValueError, match="leave exclude_self out"):
        nearest(randn(4, 8), randn(3, 8), 1, exclude_self=True)
    with pytest.raises(ValueError, match="no neighbour"):
        nearest(randn(1, 8), randn(1, 8), 1, exclude_self=True)
    with pytest.raises(ValueError, match="not finite in 1 of 3"):
        nearest(randn(3, 8), torch.tensor([[1.0] * 8, [torch.nan] * 8, [0.0] * 8]), 1)


# Sheets


def places(page: Image.Image, image: np.ndarray, factor: int) -> list[tuple[int, int]]:
    """(top, left) of every place where an image stands on the page, enlarged by a factor."""
    wanted = np.broadcast_to(image, (*image.shape[:2], 3)).repeat(factor, 0).repeat(factor, 1)
    view, (height, width) = np.asarray(page), wanted.shape[:2]
    corners = np.argwhere((view[: -height + 1, : -width + 1] == wanted[0, 0]).all(axis=2))
    return [(y, x) for y, x in corners.tolist() if (view[y : y + height, x : x + width] == wanted).all()]


def margins_are_white(page: Image.Image, width: int = 4) -> bool:
    view = np.asarray(page)
    return all((edge == 255).all() for edge in (view[:width], view[-width:], view[:, :width], view[:, -width:]))


def ink(page: Image.Image, box: tuple[int, int, int, int]) -> int:
    """How many pixels of (left, top, right, bottom) are not white."""
    return int((np.asarray(page.crop(box)) != 255).any(axis=2).sum())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_of_neighbours_for_every_query(channels: int) -> None:
    queries, neighbours = pixels(2, 32, 32, channels), pixels(2, 3, 32, 32, channels, seed=1)
    similarity = torch.tensor([[0.999, 0.5, -0.25], [0.75, 0.5, 0.0]])
    page = neighbour_sheet(queries, neighbours, similarity)
    assert margins_are_white(page)
    tops, lefts = set(), []
    for row in range(2):
        (query_place,) = places(page, queries[row], 4)
        found = [places(page, image, 4) for image in neighbours[row]]
        assert all(len(place) == 1 for place in found)
        line = [query_place, *(place[0] for place in found)]
        assert len({top for top, _ in line}) == 1
        tops.add(line[0][0])
        lefts.append([left for _, left in line])
        # Under each neighbour stands its similarity, under the query nothing.
        below = [ink(page, (left, top + 128, left + 128, top + 144)) for top, left in line]
        assert below[0] == 0
        assert min(below[1:]) > 20
    assert len(tops) == 2
    assert lefts[0] == lefts[1] == sorted(lefts[0])


def test_the_similarity_is_what_is_written() -> None:
    queries, neighbours = pixels(1, 32, 32, 3), pixels(1, 1, 32, 32, 3, seed=1)
    pages = [np.asarray(neighbour_sheet(queries, neighbours, np.array([[x]]))) for x in (0.5, 0.5001, 0.6)]
    np.testing.assert_array_equal(pages[0], pages[1])
    assert (pages[0] != pages[2]).any()
    with pytest.raises(ValueError, match="do not go together"):
        neighbour_sheet(queries, neighbours, np.array([[0.5, 0.1]]))


def test_heat_is_brightest_where_it_is_most() -> None:
    image = np.full((16, 24, 3), 100, np.uint8)
    heat = torch.arange(24).reshape(4, 6).float()
    drawn = heat_overlay(image, heat)
    assert drawn.shape == (16, 24, 3)
    assert drawn.dtype == np.uint8
    blocks = drawn.reshape(4, 4, 6, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()  # a cell is one block
    light = blocks[:, 0, :, 0] @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(light.ravel()) > 0).all()
    # Only the form of the map counts, and the image is seen through it.
    np.testing.assert_array_equal(drawn, heat_overlay(image, 7 * heat - 3))
    brighter = np.concatenate([image[:, :12], image[:, 12:] + 100], axis=1)
    difference = heat_overlay(brighter, heat).astype(int) - drawn
    assert (difference[:, :12] == 0).all()
    assert (difference[:, 12:] > 20).all()


def test_a_broken_or_flat_map_still_gets_its_picture() -> None:
    image = pixels(16, 24, 1)
    flat = heat_overlay(image, np.full((4, 6), 0.3))
    np.testing.assert_array_equal(flat, heat_overlay(image, np.full((4, 6), np.nan)))
    heat = np.zeros((4, 6))
    heat[0, 0], heat[3, 5] = np.nan, 1.0
    drawn = heat_overlay(image, heat)
    np.testing.assert_array_equal(drawn[:12], flat[:12])
    assert (drawn[12:, 20:] != flat[12:, 20:]).any()
    with pytest.raises(ValueError, match="float64 images"):
        heat_overlay(image / 255, heat)


def test_a_grid_stands_in_order_between_its_titles() -> None:
    rows = pixels(3, 2, 32, 32, 3)
    titles = ["mask 50 %", "mask 75 %", "a much longer title of a row, that pushes the grid to the right"]
    page = titled_grid([list(row) for row in rows], titles, ["reconstructed", "original"])
    assert margins_are_white(page)
    found = [[places(page, image, 4) for image in row] for row in rows]
    assert all(len(place) == 1 for row in found for place in row)
    place = np.array(found)[:, :, 0]
    assert (place[:, 0, 0] == place[:, 1, 0]).all()
    assert (place[0, :, 1] == place[2, :, 1]).all()
    assert (np.diff(place[:, 0, 0]) > 128).all()
    assert place[0, 0, 1] + 128 < place[0, 1, 1]
    for row, top in enumerate(place[:, 0, 0]):
        middle = (16, int(top) + 50, int(place[0, 0, 1]), int(top) + 78)
        assert ink(page, middle) > 50  # the title, at half the image's height ...
        assert ink(page, (0, int(top), int(place[0, 0, 1]), int(top) + 40)) == 0  # ... and nowhere else
        assert (ink(page, (0, int(top), 200, int(top) + 128)) > 0) == (row == 2)  # the long one begins far left
    np.testing.assert_array_equal(np.asarray(page), titled_grid(rows, titles, ["reconstructed", "original"]))


def test_a_grid_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="bring them to one size"):
        titled_grid([[pixels(8, 8, 3), pixels(8, 9, 3)]], ["a"], ["b", "c"])
    with pytest.raises(ValueError, match="a title for every row"):
        titled_grid([[pixels(8, 8, 3)]], ["a"], ["b", "c"])
    with pytest.raises(ValueError, match="no two may be alike"):
        titled_grid([[pixels(8, 8, 3), pixels(8, 8, 3)]], ["a"], ["b", "b"])


def cells(page: Image.Image, num: int) -> np.ndarray:
    """The colour of each cell, from its lower right corner, where no number stands: [C, C, 3]."""
    view = np.asarray(page).astype(int)
    size = max(14, min(56, 640 // num))
    bottom = view.shape[0] - 60
    frame = np.flatnonzero((view[bottom] == 112).all(axis=1))  # the line under the matrix
    left, right = frame[0] + 1, frame[-1]
    assert right - left == num * size
    top = bottom - num * size
    return view[top + size - 2 : bottom : size, left + size - 2 : right : size]


@pytest.mark.parametrize("num", [2, 10, 26, 100])
def test_a_confusion_matrix_is_drawn_by_rows(num: int) -> None:
    counts = np.eye(num) * 80
    counts[0, 1] = 20
    counts[1] = 0
    names = [f"class {number}" for number in range(num)]
    page = confusion_picture(counts, names)
    assert margins_are_white(page)
    colour = cells(page, num)
    assert colour.shape == (num, num, 3)
    dark = 255 - colour.mean(axis=2)
    assert dark[0, 0] > dark[0, 1] > 50
    assert (colour[1] == colour[1, 0]).all()  # no sample: neither white nor blue
    assert 0 < dark[1, 0] < 50
    white = np.ones((num, num), bool)
    white[np.diag_indices(num)] = white[0, 1] = False
    white[1] = False
    assert (dark[white] == 0).all()
    if num > 2:
        assert (np.diag(dark)[2:] > dark[0, 0]).all()
    # Rows are shares: ten times the samples of one class change nothing.
    counts[0] *= 10
    np.testing.assert_array_equal(np.asarray(page), confusion_picture(torch.from_numpy(counts).long(), names))


def test_true_classes_go_down_and_predicted_ones_across() -> None:
    counts = np.array([[0, 9, 0], [0, 9, 0], [0, 9, 0]])
    page = confusion_picture(counts, ["a", "b", "c"])
    colour = cells(page, 3)
    assert (colour[:, 1] < 150).any(axis=1).all()
    assert (colour[:, [0, 2]] == 255).all()
    # A percentage stands in each cell that is not empty, and on the diagonal.
    top, view = page.height - 60 - 3 * 56, np.asarray(page)
    left = int(np.flatnonzero((view[page.height - 60] == 112).all(axis=1))[0]) + 1
    blocks = view[top : top + 168, left : left + 168].reshape(3, 56, 3, 56, 3)
    written = (blocks != blocks[:, :1, :, :1]).any(axis=(1, 3, 4))
    np.testing.assert_array_equal(written, [[True, True, False], [False, True, False], [False, True, True]])


def test_names_stand_at_both_sides_and_long_ones_are_cut() -> None:
    counts = np.eye(40)
    plain = confusion_picture(counts, [""] * 40)
    named = confusion_picture(counts, ["", "snow leopard", *[""] * 38])
    longest = confusion_picture(counts, ["", "snow leopard " * 40, *[""] * 38])
    assert plain.width < named.width < longest.width < plain.width + 200
    grown = named.width - plain.width
    cell, left, top = 16, named.width - 16 - 640, named.height - 60 - 640
    assert grown == named.height - plain.height
    assert ink(named, (28, top + cell, left - 1, top + 2 * cell)) > 50  # at the left of row 1
    assert ink(named, (left + cell, 28, left + 2 * cell, top - 1)) > 50  # above column 1
    for other in (0, 3, 39):
        assert ink(named, (28, top + other * cell, left - 1, top + (other + 1) * cell)) == 0
        assert ink(named, (left + other * cell, 28, left + (other + 1) * cell, top - 1)) == 0


def test_a_matrix_that_is_none_is_refused() -> None:
    for counts, num in ((np.eye(3), 2), (np.ones((2, 3)), 2), (np.eye(1), 1), (np.eye(101), 101)):
        with pytest.raises(ValueError, match="of 2 to 100 classes"):
            confusion_picture(counts, ["x"] * num)
    with pytest.raises(ValueError, match="none below 0"):
        confusion_picture(np.array([[1, -1], [0, 1]]), ["a", "b"])
