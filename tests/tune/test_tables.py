"""The paper's tables as cells of a recipe."""

from pathlib import Path

import pytest

from pipelines.cli import load_toml
from pipelines.config import Config
from pipelines.errors import UserError
from tune.tables import TABLES, changes, chosen, fitting

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "pipelines/recipes").glob("*.toml"))
# What no recipe can have: sizes between those of a decoder of two blocks, a tokenizer, and blocks that it has not.
NOT_HERE = {"1a": {"2", "4"}, "1d": {"dVAE token"}, "fig9": {"6", "12", "18"}}
VIT_L = Config.model_validate({"model": {"arch": "vit_large_patch16_224", "target": "raw"}})


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_cell_builds_on_every_recipe(recipe, table):
    config = load_toml(Config, str(recipe))
    rows = fitting(table, config)
    depth = {str(config.model.depth)} if table == "fig9" else set()
    assert {row.label for row in rows if row.values is None} == NOT_HERE.get(table, set()) - depth
    assert len({row.label for row in rows}) == len(rows)
    assert {label for claim in TABLES[table].claims for pair in claim.pairs for label in pair} <= {
        row.label for row in rows
    }
    cells = [changes(config, row) for row in rows if row.values is not None]
    if table != "fig9":
        # The recipe itself is one of them, the same in all tables; no two are the same.
        assert cells.count({}) == 1
        assert all(cells.count(cell) == 1 for cell in cells)


def test_sizes_are_the_papers_with_the_papers_decoder():
    def values(table, key):
        return [(row.values or {})[key] for row in TABLES[table].rows(VIT_L)]

    assert values("1a", "model.decoder_depth") == [1, 2, 4, 8, 12]
    assert values("1b", "model.decoder_width") == [128, 256, 512, 768, 1024]
    assert values("fig7", "train.epochs") == [100, 200, 400, 800, 1600]
    assert [row.values for row in TABLES["1d"].rows(VIT_L)][2] == {"model.target": "pca", "model.target_components": 96}
    assert [row.note for table in ("1a", "1b", "fig7") for row in TABLES[table].rows(VIT_L)] == [""] * 15


def test_sizes_of_a_small_decoder_are_shares_of_it():
    small = load_toml(Config, str(ROOT / "pipelines/recipes/digits.toml"))
    depths = {row.label: (row.values, row.note) for row in TABLES["1a"].rows(small)}
    assert depths["1"] == ({"model.decoder_depth": 1}, "")
    assert depths["8"] == ({"model.decoder_depth": 2}, "2 blocks")
    assert depths["12"] == ({"model.decoder_depth": 3}, "3 blocks")
    widths = [(row.values or {})["model.decoder_width"] for row in TABLES["1b"].rows(small)]
    assert widths == [16, 32, 64, 96, 128]
    # The recipe counts steps, not epochs.
    assert [row.values for row in TABLES["fig7"].rows(small)] == [{"train.steps": n} for n in (75, 150, 300, 600, 1200)]


def test_what_cannot_be_built_is_left_out_and_says_why():
    odd = Config.model_validate({"data": {"image_size": (48, 48)}, "model": {"patch_size": 16}})
    rows = {row.label: row for row in fitting("1f", odd)}
    assert rows["grid 75 %"].values is None
    assert "needs a mask ratio of 0.75 and an even grid" in rows["grid 75 %"].note
    assert rows["random 75 %"].values is not None


def test_some_rows_are_asked_for_by_their_labels():
    rows = fitting("fig5", Config())
    assert [row.label for row in chosen(rows, ["75 %", "50 %"])] == ["50 %", "75 %"], "in the table's order"
    assert chosen(rows, []) == rows
    with pytest.raises(UserError, match="no row '55 %'; its rows are '10 %', '20 %'"):
        chosen(rows, ["75 %", "55 %"])
