"""Whatever the files hold, a reader opens them or raises its own error: never another, no hang."""

import json
import math
import struct
import time
from datetime import date, datetime

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from optmerge_core.checkpoints.factors import Factors
from optmerge_core.checkpoints.formats import INDEX_NAME, CheckpointError
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.merging.families import FAMILIES, mergeable
from optmerge_core.methods.registry import METHODS
from optmerge_core.study.mergekit import NAMES
from optmerge_core.study.parsing import MAX_NODES
from optmerge_core.study.recipe import Recipe, RecipeError, load_recipe

# Not derived from the test's name alone: the same examples on every machine and in every run.
fuzz = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = pytest.mark.filterwarnings("ignore")

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5).bfloat16()}
NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**60, 2**63, 2**64, 10**400, 0.5, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def fill(folder, **files: bytes) -> None:
    """Exactly these files, each new: a memory map of an old one keeps what it had."""
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def opened(folder, **options):
    """The checkpoint, after everything it says of itself was read; None if it is refused."""
    try:
        checkpoint = open_checkpoint(folder, **options)
    except CheckpointError:
        return None
    for name in checkpoint:
        tensor = checkpoint[name]
        assert (tuple(tensor.shape), tensor.dtype) == (
            checkpoint.shape(name),
            checkpoint.dtype(name),
        )
        assert tensor.nbytes == checkpoint.nbytes(name)
    return checkpoint


def weights(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


@fuzz
@given(st.binary(max_size=200))
@example(weights(b"{}", b"", 2**60))
@example(weights(b"{}", b"", 2**64 - 1))
@example(weights(b"{}", b""))
@example(weights(b"[" * 100_000, b""))
@example(weights(b'{"a":' * 50_000, b""))
@example(weights(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[NaN,4]}}', bytes(4)))
@example(
    weights(b'{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}', b"")
)
@example(weights(b'{"a\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)))
def test_any_bytes_as_weights(folder, content):
    fill(folder, **{"model.safetensors": content})
    opened(folder)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "", "__metadata__", "../x", "\0"]) | st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "C64", "F4", "X"])
                | JSON,
                "shape": st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**63, -1, 0.5]), max_size=4)
                | JSON,
                "data_offsets": st.lists(st.sampled_from([0, 4, 8, 12, 24, 2**63, -4]), max_size=3)
                | JSON,
            }
        )
        | JSON,
        max_size=3,
    ),
    st.binary(max_size=32),
)
@example({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4))
@example({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b"")
def test_any_header(folder, header, body):
    fill(folder, **{"model.safetensors": weights(json.dumps(header).encode(), body)})
    opened(folder)


@fuzz
@given(st.data())
def test_damaged_weights(folder, data):
    content = bytearray(save(TENSORS, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.integers(0, 12))
        content[place : place + length] = data.draw(st.binary(max_size=12))
    fill(folder, **{"model.safetensors": bytes(content)})
    opened(folder)


FILES = st.sampled_from(
    [
        *("model-1.safetensors", "model-2.safetensors", "missing.safetensors", ".safetensors"),
        *("../model-1.safetensors", "/model-1.safetensors", "a/b.safetensors", "..\\x.safetensors"),
        *(
            "\0.safetensors",
            "C:model-1.safetensors",
            "//server/x.safetensors",
            "ä\u202e.safetensors",
        ),
        *("adapter_model.safetensors", "x" * 5000 + ".safetensors", "..", ".", ""),
    ]
)


@fuzz
@given(
    st.dictionaries(st.sampled_from(["a", "b"]) | st.text(max_size=4), FILES | JSON, max_size=3)
    | JSON,
    JSON,
)
@example({"a": "model-1.safetensors", "b": "model-2.safetensors"}, None)
def test_any_index(folder, weight_map, metadata):
    index = json.dumps({"weight_map": weight_map, "metadata": metadata}).encode()
    shards = {f"model-{i}.safetensors": save({n: TENSORS[n]}) for i, n in enumerate("ab", 1)}
    fill(folder, **shards | {INDEX_NAME: index})
    checkpoint = opened(folder)
    if weight_map == {"a": "model-1.safetensors", "b": "model-2.safetensors"}:
        assert checkpoint.keys() == TENSORS.keys()
    for file in checkpoint.files if checkpoint else ():
        assert file.parent == folder and file.name in shards


@fuzz
@given(
    st.binary(max_size=100)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))
)
@example(b"[" * 100_000)
@example(b"9" * 5000)
@example(b'{"weight_map": {"a": {"b": ' * 3000)
@example(b"\xff\xfe{\x00}\x00")
def test_any_text_as_json(folder, content):
    for name in (INDEX_NAME, "config.json"):
        fill(folder, **{"model-1.safetensors": save(TENSORS), name: content})
        checkpoint = opened(folder)
        try:
            assert checkpoint is None or isinstance(checkpoint.config(), dict)
        except CheckpointError:
            pass


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(["model_type", "architectures", "text_config", "tie_word_embeddings"]),
        JSON | st.lists(st.text(max_size=8), max_size=2),
    )
)
def test_any_config(folder, config):
    name = "model.layers.0.mlp.up_proj.weight"
    content = {"model.safetensors": save({name: torch.ones(2, 2)})}
    fill(folder, **content | {"config.json": json.dumps(config).encode()})
    checkpoint = opened(folder)
    try:
        model_type = checkpoint.config().get("model_type")
    except CheckpointError:
        return
    assert mergeable(checkpoint.shapes(), model_type) == [name]


LORA = {
    f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{side}.weight": torch.ones(shape)
    for layer in range(2)
    for side, shape in (("A", (2, 3)), ("B", (4, 2)))
}
SETTINGS = {
    "peft_type": "LORA", "lora_alpha": 4, "r": 2, "use_rslora": False,
    "target_modules": ["up_proj"],
}  # fmt: skip


@fuzz
@given(
    st.dictionaries(
        st.sampled_from([*SETTINGS, "alpha_pattern", "rank_pattern", "use_dora", "target_modules"]),
        JSON | st.dictionaries(st.sampled_from(["up_proj", "(", ".*", "a{99999999}"]), JSON),
    )
)
@example({"alpha_pattern": {"(": 1}})
@example({"alpha_pattern": {"up_proj": "8"}})
@example({"alpha_pattern": ["up_proj"]})
@example({"lora_alpha": float("nan")})
@example({"lora_alpha": 10**400})
@example({})
def test_any_adapter_config(folder, changes):
    config = json.dumps(SETTINGS | changes).encode()
    fill(folder, **{"adapter_model.safetensors": save(LORA), "adapter_config.json": config})
    try:
        factors = Factors(open_checkpoint(folder, adapter=True))
    except CheckpointError:
        assert changes
        return
    assert len(factors) == 2
    assert all(b.isfinite().all() and a.isfinite().all() for b, a in factors.values())


@fuzz
@given(
    st.lists(st.sampled_from([*LORA, "x", "base_model.model.lora_A.weight"]), unique=True),
    st.data(),
)
def test_any_adapter_tensors(folder, names, data):
    shapes = st.lists(st.integers(0, 3), max_size=3)
    tensors = {name: torch.ones(data.draw(shapes)) for name in names}
    config = json.dumps(SETTINGS).encode()
    fill(folder, **{"adapter_model.safetensors": save(tensors), "adapter_config.json": config})
    try:
        factors = Factors(open_checkpoint(folder, adapter=True))
    except CheckpointError:
        return
    for module, (b, a) in factors.items():
        outputs, *inputs = factors.shape(module)  # of a convolution, its kernel's too
        assert (b @ a).shape == (outputs, math.prod(inputs))


def loaded(folder, text: str | bytes) -> Recipe | None:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    try:
        return load_recipe(path)
    except RecipeError as error:
        assert str(error).startswith(str(path))
        return None


@fuzz
@given(
    st.text(max_size=80) | st.text("{}[]&*a1:-?!|>'\"\n ,<", max_size=60) | st.binary(max_size=40)
)
@example("a: !!int ''")
@example("a: !!bool maybe")
@example("a: !!timestamp x")
@example("a: 2001-13-45")
@example("a: !!binary ä")
@example("a: !!python/object/apply:os.system [echo]")
@example("[" * 5000)
@example("a: " + "9" * 5000)
@example("&a {name: *a}")
@example("&a [*a]")
@example("? {a: b}\n: c")
@example("\0")
def test_any_text_as_recipe(folder, text):
    fill(folder)
    assert loaded(folder, text) is None


VALUES = (
    JSON
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from([date(2020, 1, 1), datetime(2020, 1, 1), float("nan"), float("inf"), 10**12])
    | st.sampled_from([*METHODS, *NAMES, *FAMILIES, "owner/name", "~nobody/x", "x" * 300, "a\0b"])
)
OPTIONS = st.dictionaries(
    st.sampled_from(
        [
            *(
                "lambda",
                "weight",
                "density",
                "drop_rate",
                "normalize",
                "rescale",
                "preset",
                "steps",
            ),
            *("center", "subspace", "init", "optimizer", "learning_rate", "momentum", "rank_ratio"),
            *("shrink", "svd", "on_step", "thresholds", "generator", "exp_time", "int8_mask"),
        ]
    ),
    VALUES,
    max_size=3,
)


@settings(fuzz, max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([*Recipe.model_fields, "slices", "modules", "tokenizer", "chat_template"])
        | st.text(max_size=5)
        | st.integers(),
        VALUES | OPTIONS,
        max_size=3,
    ),
    st.sampled_from([*METHODS, *NAMES]),
    OPTIONS,
    st.lists(OPTIONS | JSON, max_size=2),
)
@example({"name": "../../x"}, "ties", {}, [])
@example({"base_model": "~nobody/x"}, "ties", {}, [])
@example({"base_model": "x" * 5000}, "ties", {}, [])
@example({}, "optmerge", {"steps": 10**12}, [])
@example({}, "optmerge", {"on_step": 3}, [])
def test_any_structure_as_recipe(folder, changes, method, options, beside):
    fill(folder)
    models = [{"model": "a/b"}, {"model": "a/c"}]
    for model, parameters in zip(models, beside, strict=False):
        model["parameters"] = parameters
    content = {"merge_method": method, "base_model": "a/base", "models": models}
    content |= {"parameters": options} | changes
    recipe = loaded(folder, yaml.safe_dump(content))
    assert recipe is None or set(recipe.experts) <= {"b", "c", "base_model"} or "models" in changes


@pytest.mark.parametrize("kind", ["list", "mapping", "merged mapping"])
def test_aliases_of_aliases_are_refused_at_once(folder, kind):
    """Nine levels of nine aliases: 9^9 values in a kilobyte."""
    lines = ["l0: &l0 {a: 1}"]
    for level in range(1, 10):
        aliases = [f"*l{level - 1} "] * 9
        if kind == "mapping":
            aliases = [f"k{number}: {alias}" for number, alias in enumerate(aliases)]
        text = ", ".join(aliases)
        brackets = {"list": "[%s]", "mapping": "{%s}", "merged mapping": "{<<: [%s], k: 1}"}[kind]
        lines.append(f"l{level}: &l{level} {brackets % text}")
    (folder / "bomb.yaml").write_text("\n".join(lines))
    started = time.perf_counter()
    with pytest.raises(RecipeError, match=f"more than {MAX_NODES} values"):
        load_recipe(folder / "bomb.yaml")
    assert time.perf_counter() - started < 5


def test_anchors_of_an_honest_size_are_understood(folder):
    fill(folder)
    text = "base_model: a/base\nmodels: [{model: a/b}]\nparameters: &p {density: 0.5}\n"
    recipe = loaded(folder, text + "merge_method: ties\nmethod_options: {ties: *p}")
    assert recipe.options() == {"density": 0.5}
