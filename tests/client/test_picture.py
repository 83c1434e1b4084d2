"""A drawn embedding has the right colours at the right places."""

import numpy as np
import pytest

from sidecar.picture import draw_components, principal_components
from sidecar.vision.grid import Grid

# Three orthonormal directions whose largest entries are positive, as the sign rule has it.
DIRECTIONS = np.zeros((3, 8))
DIRECTIONS[0, [1, 2]] = -0.6, 0.8
DIRECTIONS[1, [5, 0]] = 0.96, -0.28
DIRECTIONS[2, [4, 7]] = 0.8, 0.6
GAP = 8


def embedding_of_place(rows, columns):
    """Tokens whose first component grows downwards, the second to the right, the third towards two opposite corners."""
    down, right = np.mgrid[:rows, :columns]
    down, right = down - down.mean(), right - right.mean()
    fields = [field / field.std() for field in (down, right, down * right)]
    scores = np.stack([9 * fields[0], 4 * fields[1], 2 * fields[2]], axis=-1)
    return (scores.reshape(-1, 3) @ DIRECTIONS + 5).astype(np.float32), fields


def stretched(field):
    return np.round((field - field.min()) / (field.max() - field.min()) * 255)


@pytest.mark.parametrize(
    ("grid", "merge", "cell"),
    [
        (Grid(1, 6, 10), 2, (10, 20)),
        (Grid(1, 10, 6), 2, (7, 5)),
        (Grid(1, 4, 16), 2, (30, 30)),
        (Grid(1, 9, 6), 3, (4, 9)),
    ],
)
def test_every_tokens_colour_is_at_its_place(grid, merge, cell):
    rows, columns = grid.h // merge, grid.w // merge
    embedding, fields = embedding_of_place(rows, columns)
    photo = np.random.default_rng(0).integers(0, 256, (rows * cell[0], columns * cell[1], 3), np.uint8)

    picture = np.asarray(draw_components(photo, embedding, grid, merge, opacity=1.0)).astype(int)

    width = photo.shape[1]
    assert np.array_equal(picture[:, :width], photo)
    assert (picture[:, width : width + GAP] == 255).all()
    colours = np.stack([stretched(field) for field in fields], axis=-1)
    expected = colours.repeat(cell[0], axis=0).repeat(cell[1], axis=1)
    assert picture[:, width + GAP :].shape == expected.shape
    assert np.abs(picture[:, width + GAP :] - expected).max() <= 1


def test_the_photo_shines_through():
    embedding, _ = embedding_of_place(3, 5)
    photo = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    overlay, opaque = (
        np.asarray(draw_components(photo, embedding, Grid(1, 6, 10), 2, opacity=opacity))[:, 50 + GAP :].astype(float)
        for opacity in (0.75, 1.0)
    )
    assert np.abs(overlay - (0.25 * photo + 0.75 * opaque)).max() <= 1


def test_the_same_embedding_is_always_drawn_the_same():
    # Noise has no clear components: whatever is random in the search for them shows.
    embedding = np.random.default_rng(2).standard_normal((400, 300)).astype(np.float32)
    first, second = (
        draw_components(np.zeros((40, 40, 3), np.uint8), embedding, Grid(1, 40, 40), 2).tobytes() for _ in range(2)
    )
    assert first == second


def test_components_are_the_principal_ones_of_a_wide_embedding():
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((60, 200)) * np.geomspace(20, 0.1, 200)
    centred = rows - rows.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    exact = left[:, :3] * values[:3]
    ours = principal_components(rows)
    agreement = [abs(np.corrcoef(exact[:, i], ours[:, i])[0, 1]) for i in range(3)]
    assert min(agreement) > 0.999


def test_one_token_far_out_leaves_the_others_their_colours():
    embedding, _ = embedding_of_place(12, 12)
    embedding[77] += 1000 * DIRECTIONS[0].astype(np.float32)
    picture = np.asarray(draw_components(np.zeros((12, 12, 3), np.uint8), embedding, Grid(1, 24, 24), 2, opacity=1))
    reds = np.delete(picture[:, 12 + GAP :, 0].reshape(-1), 77)
    assert np.ptp(reds) > 200


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (6, 1), (6, 2)])
def test_missing_components_are_grey(rows, width):
    embedding = np.random.default_rng(4).standard_normal((rows, width)).astype(np.float32)
    grid = Grid(1, 2, 2 * rows)
    picture = np.asarray(draw_components(np.zeros((8, 60, 3), np.uint8), embedding, grid, 2, opacity=1.0))
    missing = picture[:, 60 + GAP :, min(rows - 1, width) :]
    assert np.unique(missing).tolist() == [128]


@pytest.mark.parametrize(
    ("grid", "rows"), [(Grid(1, 6, 10), 14), (Grid(1, 6, 10), 16), (Grid(2, 6, 10), 30), (Grid(2, 6, 10), 15)]
)
def test_rows_that_do_not_fill_the_grid_are_refused(grid, rows):
    with pytest.raises(ValueError, match="tokens, got rows of"):
        draw_components(np.zeros((9, 9, 3), np.uint8), np.ones((rows, 4), np.float32), grid, 2)


def test_values_that_are_not_finite_are_refused():
    embedding, _ = embedding_of_place(3, 5)
    embedding[3, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        draw_components(np.zeros((9, 9, 3), np.uint8), embedding, Grid(1, 6, 10), 2)
