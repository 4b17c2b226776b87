"""Adapters drawn at random: what PEFT itself makes of base and adapter, or a refusal by name.

The tiny models are those of `merging/test_real_classes.py`; the adapters are PEFT's own, with any
setting of `LoraConfig`, then saved, stored and renamed as people's are, and in part edited by hand.
"""

import json
import re
import shutil
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merging import test_real_classes as real
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from optmerge_core import merge_adapters, open_checkpoint
from optmerge_core.checkpoints.adapters import Adapter
from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.lora_settings import CONVERT, EXACT, FIELDS, HARMLESS, STARTS
from optmerge_core.checkpoints.names import HEAD, is_head
from optmerge_core.checkpoints.open import open_expert

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES = sorted(real.FAMILIES)
TIED = ("gemma", "gemma2", "gemma3", "gemma3_text", "internvl", "paligemma", "qwen2")
OTHERS = (torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
WRAPPERS = {
    "": "",
    r"lora_([AB])\.weight": r"lora_\1.default.weight",
    r"^base_model": r"module.base_model",
    r"^base_model\.": r"_orig_mod.base_model.",
    r"^base_model\.model\.": r"base_model.model._orig_mod.",
    r"(\.layers\.\d+)\.": r"\1._fsdp_wrapped_module.",
    r"^base_model\.model\.model\.(language_model|text_model)\.": r"base_model.model.model.",
}
"""What the names in people's files have more than PEFT's, or less (the text model's own)."""
STACKS = ["experts.gate_up_proj", "mlp.experts.down_proj"]
ODD = [
    *({"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}),
    *({"modules_to_save": names} for names in (["norm"], ["embed_tokens"], ["lm_head", "q_proj"])),
    *({"trainable_token_indices": [1, 2]}, {"target_parameters": STACKS}, {"use_dora": True}),
    *({"alora_invocation_tokens": [3]}, {"lora_dropout": 0.1}, {"layer_replication": [[0, 2]]}),
    *({"fan_in_fan_out": True}, {"ensure_weight_tying": True}, {"task_type": "CAUSAL_LM"}),
    *({"inference_mode": True}, {"revision": "main"}, {"qalora_group_size": 4}),
]
"""Settings that are given to PEFT with the others, one at most."""
EDITS = {
    "init_lora_weights": "corda", "layers_to_transform": [0], "layers_pattern": "blocks", "r": 7,
    "exclude_modules": [".+0.+", "q_proj"], "target_modules": ["v_proj"], "use_rslora": True,
    "lora_alpha": 2.5, "alpha_pattern": {"layers.1..*": 11, ".*_proj": 3}, "rank_pattern": {"x": 1},
    "arrow_config": {"top_k": 1}, "use_bdlora": {"nblocks": 2}, "a_new_variant": True,
    "a_new_size": 16, "eva_config": {"rho": 2.0}, "monteclora_config": {"num_samples": 2},
    "megatron_config": {"a": 1}, "runtime_config": {}, "kasa_config": {"a": 1},
}  # fmt: skip
"""Settings changed in the saved file, one at most."""


def rarely(options: list[dict]) -> st.SearchStrategy:
    """One of the settings, in a third of the cases."""
    return st.just({}) | st.just({}) | st.sampled_from(options)


@st.composite
def cases(draw) -> dict:
    family, dtype = draw(st.sampled_from(FAMILIES)), draw(st.sampled_from(DTYPES))
    tied = draw(st.booleans()) if family in TIED else False
    linears, others = kinds_of(family, torch.nn.Linear), kinds_of(family, OTHERS)
    targets = draw(st.lists(st.sampled_from(linears), min_size=1, max_size=4, unique=True))
    targets += draw(st.just([]) | st.just([]) | st.sampled_from([[kind] for kind in others]))
    layers = st.sampled_from([r"layers\.0\..*", r".*\.1\..+", *(re.escape(x) for x in targets)])
    form = draw(st.sampled_from(["list", "list", "expression"]))
    config = {
        "r": draw(st.integers(1, 6) | st.just(20)),
        "lora_alpha": draw(st.sampled_from([1, 3, 8, 16])),
        "target_modules": targets if form == "list" else rf"(.*\.)?({'|'.join(targets)})",
        "use_rslora": draw(st.booleans()),
        "init_lora_weights": draw(
            st.sampled_from([
                *(True, True, True, False, "gaussian", "orthogonal", "eva", "mica"),
                *("pissa", "pissa", "pissa", "olora", "olora", "pissa_niter_2", "lora_ga"),
            ])
        ),
        "rank_pattern": draw(st.dictionaries(layers, st.integers(1, 5), max_size=2)),
        "alpha_pattern": draw(st.dictionaries(layers, st.integers(1, 9), max_size=2)),
    }  # fmt: skip
    config |= draw(st.just({}) | st.sampled_from(ODD))
    if not has_stacks(family):
        config.pop("target_parameters", None)
    if {*targets} - {*linears} or {"lora_bias", "target_parameters"} & {*config}:
        config["init_lora_weights"] = True  # the one of all kinds
    if "ensure_weight_tying" in config:  # PEFT would merge tied factors twice
        config["exclude_modules"] = ["embed_tokens", "wte"]
    if config["init_lora_weights"] in ("orthogonal", "mica"):  # these want few, and even numbers
        config |= {"r": 2, "rank_pattern": {}}
    return {
        "base": (family, dtype, tied, draw(st.sampled_from(["1MB", "9KB"]))),
        "config": config,
        "edit": draw(rarely([{key: value} for key, value in EDITS.items()])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "trained": draw(st.booleans()),
        "pickled": draw(st.booleans()),
        "wrapper": draw(st.sampled_from(list(WRAPPERS))),
    }


@cache
def kinds_of(family: str, classes: type | tuple[type, ...]) -> list[str]:
    modules = real.build(family).named_modules()
    kinds = {name.split(".")[-1] for name, module in modules if isinstance(module, classes)}
    return sorted(kind for kind in kinds if not kind.isdigit())


@cache
def has_stacks(family: str) -> bool:
    return any(name.endswith("experts.down_proj") for name in real.build(family).state_dict())


@cache
def base_folder(root: Path, family: str, dtype: torch.dtype, tied: bool, shard: str) -> Path:
    model = real.build(family).to(dtype)
    model = model if tied else untied(model)
    folder = Path(mkdtemp(dir=root))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path, family: str, untie: bool = False) -> torch.nn.Module:
    name = real.FAMILIES[family].model
    cls = getattr(real, name, None) or getattr(transformers, name)
    model = cls.from_pretrained(folder, dtype="auto")
    return untied(model) if untie else model


def untied(model: torch.nn.Module) -> torch.nn.Module:
    """With a head of its own, which has the embeddings' values."""
    text = model.config.get_text_config()
    text.tie_word_embeddings = model.config.tie_word_embeddings = False
    if (head := model.get_output_embeddings()) is not None:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


def merged_by_peft(base: Path, family: str, adapter: Path, untie: bool) -> dict[str, torch.Tensor]:
    """Name on disk -> tensor, of PEFT's merge_and_unload.

    A head that is tied must not be when it is merged: PEFT would change the embeddings with it.
    """
    merged = PeftModel.from_pretrained(load(base, family, untie), adapter).merge_and_unload()
    merged.save_pretrained(adapter / "merged")
    return load_file(adapter / "merged" / "model.safetensors")


def save_adapter(case: dict, base: Path, folder: Path) -> None:
    """As PEFT saves it after some training; then in another dtype or format, or edited."""
    torch.manual_seed(len(case["config"]["target_modules"]))
    model = get_peft_model(load(base, case["base"][0]), LoraConfig(**case["config"]))
    if case["trained"]:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = {n: t.to(case["dtype"]) for n, t in load_file(path).items()}
    if case["pickled"]:
        path.unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | case["edit"]))


def renamed(folder: Path, target: Path, pattern: str, replacement: str) -> Path:
    """The same adapter under other names."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("merged"))
    if (path := target / "adapter_model.bin").exists():
        torch.save({re.sub(pattern, replacement, n): t for n, t in torch.load(path).items()}, path)
    else:
        path = target / "adapter_model.safetensors"
        save_file({re.sub(pattern, replacement, n): t for n, t in load_file(path).items()}, path)
    return target


def check(case: dict, root: Path) -> str:
    """What happened: "equal", "refused: <why>", or "not made", by PEFT itself."""
    family, dtype = case["base"][:2]
    base, folder = base_folder(root, *case["base"]), Path(mkdtemp(dir=root))
    try:
        save_adapter(case, base, folder / "own")
    except (ValueError, RuntimeError, TypeError, AttributeError):  # of PEFT, in many ways
        return "not made"
    wrapper = case["wrapper"]
    given = renamed(folder / "own", folder / "given", wrapper, WRAPPERS[wrapper])
    try:
        adapter = open_expert(given, open_checkpoint(base))
    except CheckpointError as error:
        return f"refused: {reason(case, given, str(error))}"
    untie = case["base"][2] and any(is_head(name) for name in adapter.changes)
    expected = merged_by_peft(base, family, folder / "own", untie)
    ours = {HEAD if is_head(name) else name: tensor for name, tensor in adapter.items()}
    expected = {HEAD if is_head(name) else name: tensor for name, tensor in expected.items()}
    assert expected.keys() == ours.keys(), expected.keys() ^ ours.keys()
    for name, tensor in expected.items():
        close(ours[name].to(dtype), tensor, largest_term(adapter, name))
    options = {"method": "weight_average", "base_model": base}
    try:
        out = merge_adapters({"one": folder / "own"}, folder / "out", **options)
    except CheckpointError as error:
        plain = "lm_head: expert one has its base's weight beside", "more than factors of linear"
        assert any(text in str(error) for text in plain), str(error)
        return "equal, no adapter"
    again = merged_by_peft(base, family, out, untie)
    for name, tensor in again.items():
        own = HEAD if is_head(name) else name
        close(tensor, expected[own], 2 * largest_term(adapter, own))
    return "equal"


def largest_term(adapter: Adapter, name: str) -> float:
    """Of the sums that make a parameter."""
    names = [n for n in adapter.changes if n == name or (name == HEAD and is_head(n))]
    modules = [adapter.modules.get(name) for name in names]
    if None in modules:  # a parameter's own factors, or none
        modules = [*adapter.factors]
    pairs = [adapter.factors[module] for module in modules]
    return max(((b.abs() @ a.abs()).max().item() for b, a in pairs), default=0.0)


def close(ours: torch.Tensor, theirs: torch.Tensor, largest: float) -> None:
    """Equal but for the dtype's rounding, of entries as large as the largest of what was added.

    PEFT divides by the norm of a row that DoRA scales, be it 0 as a padding token's is.
    """
    assert ours.dtype == theirs.dtype and torch.equal(ours.isnan(), theirs.isnan())
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    limit = 4 * torch.finfo(theirs.dtype).eps * max(theirs.abs().max().item(), largest)
    assert (ours.float() - theirs.float()).abs().max() <= limit


def reason(case: dict, given: Path, message: str) -> str:
    """What the case has of the kinds that are refused, as the message names it."""
    config = json.loads((given / "adapter_config.json").read_text())
    named = [k for k, v in config.items() if v and FIELDS.get(k) not in (EXACT, HARMLESS)]
    if STARTS.get(start := config["init_lora_weights"], CONVERT) not in (EXACT, HARMLESS):
        named += ["init_lora_weights"] if isinstance(start, str) else []
    named += ["target_modules", "exclude_modules", "layers_"] if case["edit"] else []
    # PEFT sorts the patterns when it saves, and finds another one the first that fits.
    sorted_ = len(config["rank_pattern"]) > 1 or {"r", "rank_pattern"} & case["edit"].keys()
    named += ["rank_pattern"] if sorted_ else []
    named += ["target_parameters, r and"] if "r" in case["edit"] else []
    by_rows = (
        config["trainable_token_indices"] and "embed_tokens" in case["config"]["target_modules"]
    )
    named += ["token_adapter"] if by_rows else []
    named += [".bias stands for none"] if config["lora_bias"] else []  # PEFT merges none either
    named += ["is tied to the embeddings, which init_lora_weights"] if case["base"][2] else []
    found = [word for word in named if word in message]
    assert found, f"refused without a reason: {message}"
    return found[0]


def outcomes(root: Path, number: int) -> Counter:
    """What happened -> times, in this many cases, the same on every machine."""
    found = Counter()

    @settings(
        max_examples=number, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(cases())
    def draw(case: dict) -> None:
        found[check(case, root)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def test_adapters_are_what_peft_makes_of_them(root):
    found = outcomes(root, 20)
    assert found["equal"] + found["equal, no adapter"] >= 8 and found["not made"] <= 4, found


def test_factors_of_parameters_are_no_adapter_even_untrained(root):
    plain = {"r": 2, "target_modules": ["k_proj"], "target_parameters": STACKS}
    case = {"base": ("qwen3_moe", torch.float32, False, "1MB"), "config": plain, "edit": {}}
    case |= {"dtype": torch.float32, "trained": False, "pickled": False}
    base = base_folder(root, *case["base"])
    save_adapter(case, base, root / "parameters")
    for more in ({}, {"base_model": base}):
        with pytest.raises(CheckpointError, match=r"factors of a parameter \(target_parameters\)"):
            merge_adapters({"one": root / "parameters"}, root / "out", **more)


@pytest.mark.slow
def test_five_hundred_adapters_are_what_peft_makes_of_them(root):
    found = outcomes(root, 500)
    assert found["equal"] >= 100 and found["equal, no adapter"] >= 60, found
    assert found["not made"] <= 75, found
    assert len(found) > 10, found
