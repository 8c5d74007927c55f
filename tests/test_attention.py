"""Attention maps: the numbers are the model's own, the heat lies where the patches lie, and the command draws them."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conftest import ROOT
from mono_internvl.evaluation.attention import AttentionMaps, collect_attention, draw_attention, heat_map
from mono_internvl_cli import app
from mono_internvl_cli.attention import parse_layers, spread_layers


pytest.importorskip("matplotlib")
RED = Image.new("RGB", (160, 60), "red")


@pytest.fixture(scope="module")
def maps(model, processor):
    return collect_attention(model, processor, RED, "What?", layers=(0, 2), max_new_tokens=5)


def test_the_weights_are_those_of_the_forward_pass(model, processor, maps):
    seen = []
    handle = model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    maps = collect_attention(model, processor, RED, "What?", layers=(0, 2), max_new_tokens=5)
    handle.remove()
    whole = seen[-1]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    expected = model(**whole, output_attentions=True).attentions
    model.set_attn_implementation(before)
    answers = len(maps.answer)
    for layer, weights in maps.layers.items():
        torch.testing.assert_close(weights, expected[layer][0].mean(0))
    for layer, rows in enumerate(maps.answer_rows):
        torch.testing.assert_close(rows, expected[layer][0].mean(0)[-answers - 1 : -1])


def test_the_model_is_left_as_it_was(model, processor):
    def hooks():
        return [len(layer.self_attn._forward_hooks) for layer in model.get_decoder().layers]

    before = hooks()
    collect_attention(model, processor, RED, "What?", max_new_tokens=1)
    assert model.config.text_config._attn_implementation == "sdpa" and hooks() == before


def test_shapes_and_segments(maps):
    total = len(maps.visual)
    assert list(maps.layers) == [0, 2] and all(weights.shape == (total, total) for weights in maps.layers.values())
    assert maps.answer_rows.shape == (3, len(maps.answer), total)
    torch.testing.assert_close(maps.layers[0].sum(-1), torch.ones(total))
    assert maps.layers[0].triu(1).abs().max() == 0
    assert maps.grid == (3, 1) and maps.visual.sum() == 4 * 4  # three tiles and the thumbnail
    kinds = [kind for kind, _, _ in maps.segments]
    assert kinds == ["text", "image", "text", "answer"]
    assert maps.segments[1][2] - maps.segments[1][1] == 16 and maps.segments[-1][2] == total


def invented(grid, tiles, hot) -> AttentionMaps:
    """One text token, 2 x 2 patches a tile and one answer token that looks at visual token `hot` alone."""
    visual = torch.tensor([False] + [True] * (4 * tiles) + [False])
    rows = torch.zeros(1, 1, len(visual))
    rows[0, 0, 1 + hot] = 1.0
    return AttentionMaps({0: torch.eye(len(visual))}, rows, visual, ["x"], grid)


@pytest.mark.parametrize(
    ("grid", "tiles", "hot", "place"),
    [
        ((1, 1), 1, 1, (0, 1)),
        ((2, 1), 3, 4 + 2, (1, 2)),  # second tile, lower left patch
        ((2, 2), 5, 2 * 4 + 1, (2, 1)),  # third tile begins the second row
        ((2, 2), 4, 3 * 4 + 3, (3, 3)),  # without a thumbnail
    ],
)
def test_heat_lies_where_the_patch_lies(grid, tiles, hot, place):
    heat = heat_map(invented(grid, tiles, hot), 0)
    assert heat.shape == (grid[1] * 2, grid[0] * 2)
    assert heat[place] == 1 and heat.sum() == 1


def test_the_thumbnails_heat_is_spread_over_what_it_shows():
    heat = heat_map(invented((3, 1), 4, 3 * 4 + 1), 0)  # its upper right patch
    assert heat.sum() == pytest.approx(1) and heat[0, 5] == heat.max()
    assert heat[0, 3:].sum() > 0.5 and heat[1, :3].sum() < 0.2


def test_heat_is_the_share_that_falls_on_the_picture(maps):
    share = maps.answer_rows[:, 0, maps.visual].sum(-1).mean()
    assert 0 < share < 1
    assert heat_map(maps, 0).sum() == pytest.approx(share.item(), rel=1e-5)


def test_bad_layers_are_named(model, processor):
    with pytest.raises(ValueError, match="layer 7 does not exist; this model has layers 0 to 2"):
        collect_attention(model, processor, RED, "What?", layers=(0, 7))


def test_drawing_changes_with_the_token(maps):
    first, second = (draw_attention(maps, RED, token) for token in (0, 1))
    assert first.size == second.size and first.mode == "RGB" and first.width > 2 * first.height
    assert first.tobytes() != second.tobytes()


def test_layer_lists():
    assert parse_layers("1,8, 24") == [0, 7, 23] and parse_layers(None) is None
    assert spread_layers(24) == [0, 8, 15, 23] and spread_layers(2) == [0, 1] and spread_layers(1) == [0]


@pytest.mark.skipif(not (ROOT / "model.safetensors").exists(), reason="the nano is not in the repository")
def test_the_command(tmp_path):
    def run(*options):
        return CliRunner().invoke(app, ["attention", str(ROOT / "examples" / "plate.png"), *map(str, options)])

    out = tmp_path / "out.png"
    done = run("What color is the star?", "-o", out, "--layers", "1,7")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("*   1 ") and Image.open(out).size[0] > 500
    done = run("What color is the star?", "-o", tmp_path / "no.png", "--token", 60)
    assert done.exit_code == 1 and done.stderr.startswith("error: --token 60: the answer ends with token ")
    done = run("What?", "-o", tmp_path / "no.png", "--layers", "2,8")
    assert done.exit_code == 1 and done.stderr.strip() == "error: --layers 8: this model has layers 1 to 7"
    done = run(" ", "-o", tmp_path / "no.png")
    assert done.exit_code == 2 and "the question is empty" in done.stderr
    done = run("What?", "-o", tmp_path)
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1
    done = run("What?", "-o", tmp_path / "no.png", "--layers", "0")
    assert done.exit_code == 2 and not (tmp_path / "no.png").exists()
