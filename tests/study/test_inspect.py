from types import SimpleNamespace

import pandas as pd
import pytest
from published import HUB

from optmerge_core.study.inspect import _print_table, summary

LINEAR = "linear layer of the language model"
EXPERTS = "linear layers of a mixture's experts"


def test_summary_has_a_row_for_each_kind():
    shapes = {
        "lm_head.weight": (64, 8),
        "model.embed_tokens.weight": (64, 8),
        "model.layers.0.mlp.up_proj.weight": (16, 8),
        "model.layers.0.mlp.experts.down_proj": (4, 8, 8),
        "model.layers.0.mlp.gate.weight": (4, 8),
        "model.layers.0.self_attn.q_proj.bias": (8,),
        "model.layers.0.post_attention_layernorm.weight": (8,),
        "model.layers.10.mlp.up_proj.weight": (16, 8),
        "model.norm.weight": (8,),
        "visual.blocks.0.attn.qkv.weight": (12, 4),
        "visual.blocks.0.attn.qkv.bias": (12,),
        "visual.blocks.1.attn.qkv.weight": (12, 4),
        "visual.patch_embed.proj.weight": (4, 3, 2, 2, 2),
    }
    table = summary(shapes, "qwen2_vl", router="base")
    assert list(table.columns) == ["parameters", "count", "shapes", "entries", "merges", "why"]
    assert table.values.tolist() == [
        ["lm_head.weight", 1, "64 × 8", 512, False, "head"],
        ["model.embed_tokens.weight", 1, "64 × 8", 512, False, "embeddings"],
        ["model.layers.*.mlp.up_proj.weight", 2, "16 × 8", 256, True, LINEAR],
        ["model.layers.*.mlp.experts.down_proj", 1, "4 × 8 × 8", 256, True, EXPERTS],
        ["model.layers.*.mlp.gate.weight", 1, "4 × 8", 32, False, "router: base"],
        ["model.layers.*.self_attn.q_proj.bias", 1, "8", 8, False, "bias"],
        ["model.layers.*.post_attention_layernorm.weight", 1, "8", 8, False, "norm"],
        ["model.norm.weight", 1, "8", 8, False, "norm"],
        ["visual.*", 4, "12 × 4, 12, …", 204, False, "outside the language model"],
    ]
    table = summary(shapes | {"scale": ()}, "qwen2_vl", scope="all")
    assert table["merges"].tolist() == [True] * 9 + [False]
    assert table["why"][8] == "scope all: outside the language model"
    assert table["count"].sum() == len(shapes) + 1


def test_words_stand_left_and_numbers_right_and_no_rows_give_no_table():
    rows = pd.DataFrame({"expert": ["a", "b"], "relative_norm": [0.125, float("nan")], "n": [1, 2]})
    printed = []
    console = SimpleNamespace(print=printed.append)
    _print_table(console, "title", rows)
    _print_table(console, "nothing", rows[:0])
    (table,) = printed
    assert [(x.header, x.justify, list(x.cells)) for x in table.columns] == [
        ("expert", "left", ["a", "b"]),
        ("relative norm", "right", ["12.5%", "–"]),
        ("n", "right", ["1", "2"]),
    ]


@pytest.mark.parametrize("name", [name for name, _ in HUB])
def test_summary_counts_what_merges(name):
    (model_type,) = (kind for checkpoint, kind in HUB if checkpoint == name)
    merging, kept = HUB[name, model_type]
    table = summary(kept | merging, model_type)
    assert table.groupby("merges")["count"].sum().to_dict() == {
        True: len(merging),
        False: len(kept),
    }
    assert LINEAR in set(table["why"][table["merges"]]) <= {LINEAR, EXPERTS}
    assert LINEAR not in set(table["why"][~table["merges"]])


def test_summary_of_what_merges_beside_the_layers_or_if_asked():
    shapes = {
        "model.language_model.layers.0.laurel.linear_left.weight": (64, 2048),
        "model.language_model.per_layer_model_projection.weight": (8960, 2048),
        "model.language_model.embed_tokens.weight": (262400, 2048),
    }
    table = summary(shapes, "gemma3n")
    assert table["why"].tolist() == [LINEAR, LINEAR, "embeddings"]
    assert table["merges"].tolist() == [True, True, False]
    layers = [f"{part}.model.layers.0.x.weight" for part in ("thinker", "talker")]
    shapes = dict.fromkeys(layers, (4, 4)) | {"talker.codec_head.weight": (8, 4)}
    assert summary(shapes, "qwen2_5_omni")["count"].tolist() == [1, 2]
    table = summary(shapes, "qwen2_5_omni", "speech")
    assert table["merges"].tolist() == [True, True, False]  # the head is none of its layers
