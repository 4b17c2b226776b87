"""What is wrong with the inputs is said in one line before long work, and nothing is lost."""

import ast
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cases import fitted
from safetensors.torch import load_file, save_file

from optmerge_core import merge_adapters
from optmerge_core.__main__ import main
from optmerge_core.checkpoints.formats import INDEX_NAME, CheckpointError, side_files
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.checkpoints.writer import CheckpointWriter
from optmerge_core.merging.merge import merge
from optmerge_core.methods.registry import METHODS
from optmerge_core.study.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
UP = "language_model.model.layers.0.mlp.up_proj.weight"
MODULE = "model.language_model.layers.0.mlp.up_proj"


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: files with their bytes, links with their targets, folders."""
    return {
        str(path): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }  # fmt: skip


@pytest.fixture
def study(tiny, tmp_path):
    """Copies of the tiny models to damage, and the content of a recipe that merges them."""
    root = tmp_path / "inputs"
    for folder in (tiny.base, *tiny.experts.values()):
        shutil.copytree(folder, root / folder.name)
    content = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": name} for name in tiny.experts],
    }
    return SimpleNamespace(root=root, content=content, arguments=[], output=tmp_path / "out")


def run(study) -> int:
    """The command line on the study; 20 KB shards, so that the small model has several."""
    recipe = study.root / "recipe.yaml"
    if isinstance(study.content, dict):
        study.content = yaml.safe_dump(study.content)
    recipe.write_text(study.content)
    options = ["--output", str(study.output), "--no-check", *study.arguments]
    return main(["merge", str(recipe), *options])


# Each damages one thing; the name says what the error is about.


def first_shard(study, name="ocr") -> Path:
    return sorted((study.root / name).glob("*.safetensors"))[0]


def change_tensor(study, expert, change) -> None:
    """Replace a parameter of a model in its shard."""
    index = json.loads((study.root / expert / INDEX_NAME).read_text())
    shard = study.root / expert / index["weight_map"][UP]
    tensors = load_file(shard)
    save_file(tensors | {UP: change(tensors[UP].clone())}, shard, {"format": "pt"})


def change_index(study, file) -> None:
    path = study.root / "ocr" / INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"][UP] = file
    path.write_text(json.dumps(index))


def change_recipe(study, **changes) -> None:
    study.content |= changes


def truncated_shard(study):
    shard = first_shard(study)
    shard.write_bytes(shard.read_bytes()[:-100])


def corrupt_header(study):
    shard = first_shard(study)
    shard.write_bytes(shard.read_bytes().replace(b'"dtype"', b'"dty"e"', 1))


def header_without_end(study):
    first_shard(study).write_bytes(b"\xff" * 8 + b"{}")


def pointer_of_git_lfs(study):
    first_shard(study).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")


def index_outside(study):
    save_file({UP: torch.zeros(48, 32).half()}, study.root / "secret.safetensors")
    change_index(study, "../secret.safetensors")


def index_absolute(study):
    change_index(study, str(first_shard(study, "vqa")))


def index_at_a_missing_file(study):
    change_index(study, "model-00009-of-00002.safetensors")


def missing_shard(study):
    first_shard(study).unlink()


def duplicate_tensors(study):
    first, second, *_ = sorted((study.root / "ocr").glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})


def put_nan(tensor):
    tensor[1, 1] = float("nan")
    return tensor


def put_inf(tensor):
    tensor[3, 4] = -float("inf")
    return tensor


def nan_in_an_expert(study):
    change_tensor(study, "ocr", put_nan)


def inf_in_the_base(study):
    change_tensor(study, "base", put_inf)


def all_experts_equal_the_base(study):
    for name in ("chart", "ocr", "vqa"):
        shutil.rmtree(study.root / name)
        shutil.copytree(study.root / "base", study.root / name)


def wrong_base(study):
    change_tensor(study, "base", lambda tensor: tensor[:, :16].contiguous())


def base_of_another_architecture(study):
    shutil.rmtree(study.root / "base")
    with CheckpointWriter(study.root / "base") as writer:
        writer.add("model.layers.0.mlp.up_proj.weight", torch.ones(4, 4))
        writer.write_text("config.json", '{"model_type": "llama"}')


def write_adapter(folder, module=MODULE, shape=(48, 32), **settings) -> None:
    folder.mkdir()
    prefix = f"base_model.model.{module}.lora_"
    factors = {"A.weight": torch.ones(2, shape[1]), "B.weight": torch.ones(shape[0], 2)}
    save_file({prefix + k: v for k, v in factors.items()}, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "target_modules": [module]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(content))


def adapter_of_another_base(study):
    shutil.rmtree(study.root / "ocr")
    write_adapter(study.root / "ocr", shape=(48, 64))


def adapter_of_a_deeper_base(study):
    shutil.rmtree(study.root / "ocr")
    write_adapter(study.root / "ocr", MODULE.replace("layers.0", "layers.7"))


def adapter_without_its_magnitudes(study):
    shutil.rmtree(study.root / "ocr")
    write_adapter(study.root / "ocr", use_dora=True)


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def pickle_that_runs_code(study):
    for path in (study.root / "ocr").glob("*.safetensors*"):
        path.unlink()
    trace = str(study.root / "was run")
    torch.save({UP: Malicious(trace)}, study.root / "ocr" / "pytorch_model.bin")


def no_weights(study):
    for path in (study.root / "ocr").glob("*.safetensors*"):
        path.unlink()


def config_that_is_no_json(study):
    (study.root / "base" / "config.json").write_text("{")


def config_with_wrong_types(study):
    (study.root / "base" / "config.json").write_text('{"model_type": ["internvl"]}')


def link_out_of_the_base(study):
    (study.root / "secret.txt").write_text("secret")
    (study.root / "base" / "vocab.txt").symlink_to(study.root / "secret.txt")


def link_to_nothing(study):
    (study.root / "base" / "vocab.txt").symlink_to("gone.txt")


def output_is_a_file(study):
    study.output = study.root / "notes.txt"
    study.output.write_text("notes")
    study.arguments = ["--overwrite"]


def output_below_a_file(study):
    (study.root / "notes.txt").write_text("notes")
    study.output = study.root / "notes.txt" / "out"


def output_inside_an_input(study):
    study.output = study.root / "ocr" / "merged"


def output_holds_an_input(study):
    study.output = study.root / "base"
    study.arguments = ["--overwrite"]


def output_holds_other_files(study):
    study.output = study.root / "thesis"
    study.output.mkdir()
    (study.output / "thesis.tex").write_text("years of work")
    study.arguments = ["--overwrite"]


def output_exists(study):
    study.output = study.root / "earlier"
    shutil.copytree(study.root / "base", study.output)


def output_in_proc(study):
    study.output = Path("/proc/out")


DAMAGES = {
    truncated_shard: r"ocr.model-00001-of-0000\d.safetensors: truncated .*copy it again",
    corrupt_header: r"ocr.model-00001-of-0000\d.safetensors: truncated or not a safetensors file",
    header_without_end: r"ocr.model-00001-of-0000\d.safetensors: truncated or not",
    pointer_of_git_lfs: r"ocr.model-00001-of-0000\d.safetensors: Git LFS's pointer to it; run",
    index_outside: rf"{INDEX_NAME}: tensor '{UP}' points to '../secret.* do not trust",
    index_absolute: rf"{INDEX_NAME}: tensor '{UP}' points to '/.* do not trust",
    index_at_a_missing_file: r"model-00009-of-00002.safetensors: missing shard, named in",
    missing_shard: r"model-00001-of-0000\d.safetensors: missing shard, named in",
    duplicate_tensors: r"model-00002.*: tensor '\S+' is also in model-00001.* remove the shard",
    nan_in_an_expert: rf"1 parameters are not finite:\n  {UP}: expert ocr has 1 NaN or Inf\nUse an",
    inf_in_the_base: rf"1 parameters are not finite:\n  {UP}: the base has 1 NaN or Inf\nUse an",
    all_experts_equal_the_base: r"every expert \(chart, ocr, vqa\) equals the base model in all 14",
    wrong_base: rf"{UP}: expert ocr has shape \(48, 32\).*, the base shape \(48, 16\)",
    base_of_another_architecture: r"expert chart has shape \(48, 32\).*, the base shape \(4, 4\)",
    adapter_of_another_base: r"has shape \(48, 64\).* another base model\?",
    adapter_of_a_deeper_base: r"layers.7.mlp.up_proj stands for none .*another base model's",
    adapter_without_its_magnitudes: r"no numbers of magnitude .*; save the adapter again",
    pickle_that_runs_code: r"pytorch_model.bin: this pickle asks for \w+.mkdir.* was not run",
    no_weights: r"ocr: no safetensors weights.* give the folder that has them",
    config_that_is_no_json: r"base.config.json: not valid JSON .* download it again",
    config_with_wrong_types: r"base.config.json: model_type is \['internvl'\]",
    link_out_of_the_base: r"base.vocab.txt is a link to \S+secret.txt, which is outside",
    link_to_nothing: r"base.vocab.txt is a link to \S+gone.txt, which is .*missing",
    output_is_a_file: r"notes.txt is not a checkpoint folder, so it is not overwritten",
    output_below_a_file: r"notes.txt is a file, not a folder; choose another output folder",
    output_inside_an_input: r"merged is inside expert ocr: choose another output folder",
    output_holds_an_input: r"base holds the base model: choose another output folder",
    output_holds_other_files: r"thesis is not a checkpoint folder, so it is not overwritten",
    output_exists: r"earlier exists: choose another output folder, or ask to overwrite it",
    output_in_proc: r"/proc/out.* choose another output folder",
}

# No header tells: they are found while the parameters are read.
SEEN_WHILE_MERGING = (nan_in_an_expert, inf_in_the_base, all_experts_equal_the_base)

RECIPES = {
    "empty expert list": ({"models": []}, "models: .*at least 1 item"),
    "base alone": ({"models": [{"model": "base"}]}, "only the base model is listed; add an expert"),
    "models is no list": ({"models": "ocr"}, "models: .*valid list"),
    "expert twice": ({"models": [{"model": "ocr"}] * 2}, "names are not unique"),
    "empty base": ({"base_model": ""}, "base_model: an empty text, where a folder"),
    "missing folder": ({"base_model": "bases"}, "base_model: 'bases' is neither a folder"),
    "base_model is a list": ({"base_model": ["base"]}, "base_model: .*valid string"),
    "no base_model": ({"base_model": None}, "base_model: .*valid string"),
    "unknown method": ({"merge_method": "slerpy"}, "no merge method 'slerpy'; methods are weight"),
    "method is a number": ({"merge_method": 3}, "merge_method: .*valid string"),
    "unknown option": ({"parameters": {"dense": 1}}, "no option 'dense'; its options are density"),
    "option of a wrong type": ({"parameters": {"density": "much"}}, "density 'much'"),
    "option out of range": ({"parameters": {"density": 2}}, r"density is 2.* must lie in \(0, 1\]"),
    "parameters is a list": ({"parameters": [1]}, "parameters: .*valid dictionary"),
    "lambda has a text": ({"parameters": {"lambda": [1, "x"]}}, "lambda 'x': one finite number"),
    "lambda is NaN": ({"parameters": {"lambda": float("nan")}}, "lambda nan: one finite number"),
    "unknown family": ({"family": "gpt9"}, "family: Input should be 'internvl'"),
    "unknown key": ({"modles": []}, "modles: unknown key; valid are .*models"),
    "dtype": ({"dtype": "int8"}, "dtype: Input should be 'float64'"),
    "seed": ({"seed": "many"}, "seed: .*valid integer"),
    "trim": ({"trim": "layer"}, "trim: Input should be 'tensor' or 'model'"),
    "trust": ({"trust_remote_code": "perhaps"}, "trust_remote_code: .*valid boolean"),
    "coefficients": ({"scaling_coefficients": [0.1, "x"]}, "scaling_coefficients.1: .*number"),
    "a name that is a path": ({"name": "../../x"}, "name: '../../x' is to be a folder's name"),
    "no YAML": ("models: [", "not valid YAML"),
    "no mapping": ("- ocr", "a recipe is a mapping with the keys"),
    "empty": ("", "a recipe is a mapping with the keys"),
    "bomb": ("a: &a [x]\nb: &b [*a, *a, *b]", "with its aliases written out it has more than"),
}


def refused(study, capfd, text: str, before_merging: bool = True) -> None:
    """The command refuses with one `error:` that has the text, and changes nothing at all."""
    recipe = study.root / "recipe.yaml"
    recipe.touch()
    before, beside = snapshot(study.root), set(study.root.parent.iterdir())
    assert run(study) == 1
    out, err = capfd.readouterr()
    lines = err.replace("\r", "\n").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1 and out == "" and "Traceback" not in err, err
    pytest.raises(ValueError, throw, "\n".join(lines[starts[0] :])).match(text)
    assert before_merging == ("merging (" not in err)
    assert snapshot(study.root) == before | {str(recipe): recipe.read_bytes()}
    assert set(study.root.parent.iterdir()) == beside


def throw(text: str) -> None:
    raise ValueError(text)


@pytest.mark.filterwarnings("default")  # the command line shows warnings as notices
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_inputs(study, capfd, damage):
    if damage is output_in_proc and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    damage(study)
    refused(study, capfd, DAMAGES[damage], before_merging=damage not in SEEN_WHILE_MERGING)
    assert not (study.root / "was run").exists()


@pytest.mark.parametrize("case", RECIPES)
def test_wrong_recipes(study, capfd, case):
    changes, text = RECIPES[case]
    study.content = study.content | changes if isinstance(changes, dict) else changes
    refused(study, capfd, r"recipe.yaml: .*" + text)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--method", "slerpy"], "no merge method 'slerpy'; methods are weight_average"),
        (["--scaling-coefficient", "nan"], "scaling_coefficient nan: give a finite number"),
        (["--device", "abacus"], "device 'abacus': give 'auto', 'cpu' or 'cuda'"),
    ],
)
def test_wrong_arguments(study, capfd, arguments, text):
    study.arguments = arguments
    refused(study, capfd, text)


@pytest.mark.parametrize("limit", ["file size", "side files", "flush", "rename"])
def test_a_disk_that_fills_up_on_the_way(study, capfd, monkeypatch, limit):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == "file size":  # the kernel's own error, in the middle of the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    elif limit == "side files":
        monkeypatch.setattr(shutil, "copyfile", full)
    elif limit == "flush":  # where a file system with delayed allocation says it
        monkeypatch.setattr(os, "fsync", full)
    else:
        study.output, study.arguments = study.root / "base2", ["--overwrite"]
        shutil.copytree(study.root / "base", study.output)
        monkeypatch.setattr(Path, "rename", full)
    try:
        text = r"cannot be written \(.*(File too large|No space).*\); free some space or choose"
        refused(study, capfd, text, before_merging=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_too_small_a_disk_and_a_folder_without_permission(study, capfd, monkeypatch):
    usage, rest = shutil.disk_usage(study.root), study.root.parent / ".out.partial"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30_000))
        refused(study, capfd, "0.00 GB needed, 0.00 GB free on that disk; free some space")
        # What a killed merge left is removed first, so its space counts as free.
        rest.mkdir()
        (rest / "00001").write_bytes(bytes(200_000))
        patched.setattr(
            shutil,
            "disk_usage",
            lambda path: usage._replace(free=30_000 if rest.exists() else 230_000),
        )
        assert run(study) == 0
        assert not rest.exists()
    shutil.rmtree(study.output)
    capfd.readouterr()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    refused(study, capfd, "is not writable; choose another output folder")
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13)))
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    refused(study, capfd, "cannot be written .*choose another output folder")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_merge_leaves_nothing(tiny, tmp_path, monkeypatch, error):
    def interrupted(self, base_folder):
        assert self._written
        raise error

    monkeypatch.setattr(CheckpointWriter, "copy_side_files", interrupted)
    with pytest.raises(error):
        merge(tiny.base, tiny.experts, tmp_path / "a" / "b" / "out", method="ties")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_folder(tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out) as first:
        first.add("a", torch.zeros(1))
        second = CheckpointWriter(out, overwrite=True)
        with pytest.raises(CheckpointError, match="out: another process is writing there; wait"):
            second.__enter__()
        with CheckpointWriter(tmp_path / "other") as other:  # of another folder: no matter
            other.add("a", torch.zeros(1))
        assert first.folder.is_dir()
    waiting = CheckpointWriter(tmp_path / "third")
    shutil.copytree(out, tmp_path / "third")  # done by another one in the meantime
    with pytest.raises(CheckpointError, match="third exists"):
        waiting.__enter__()
    (tmp_path / ".out.lock").touch()  # left by a killed process: nobody holds it
    with CheckpointWriter(out, overwrite=True) as writer:
        writer.add("b", torch.zeros(1))
    assert list(open_checkpoint(out)) == ["b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "third"]


def test_what_appears_during_a_merge_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="out exists"), CheckpointWriter(out) as writer:
        writer.add("a", torch.zeros(1))
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    assert list(tmp_path.iterdir()) == [out]


def test_an_expert_equal_to_the_base_is_a_notice(tiny, tmp_path):
    shutil.copytree(tiny.base, tmp_path / "copy")
    for lora in (False, True):
        if lora:  # a new adapter: PEFT starts with B = 0
            shutil.rmtree(tmp_path / "copy")
            write_adapter(tmp_path / "copy")
            file = tmp_path / "copy" / "adapter_model.safetensors"
            save_file({k: v * ("A" in k) for k, v in load_file(file).items()}, file)
        experts = tiny.experts | {"fresh": tmp_path / "copy"}
        with pytest.warns(UserWarning, match="expert fresh equals the base model in all 14"):
            report = merge(tiny.base, experts, tmp_path / f"out{lora}", method="ties")
        norms = report.parameters[0]["expert_norms"]
        assert norms["fresh"] == 0 and norms["ocr"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_zero_task_vectors_give_finite_numbers(method):
    torch.manual_seed(0)
    options = {"steps": 3} if "steps" in signature(METHODS[method]).parameters else {}
    for shape in ((6, 4), (5,)):
        stack = torch.randn(3, *shape)
        stack[1] = 0
        stack, more = fitted(method, stack)
        merged = METHODS[method](stack, **more | options)
        assert merged.isfinite().all() and merged.any()
        assert not METHODS[method](torch.zeros_like(stack), **more | options).any()


def test_adapters_merged_alone_are_checked_too(tmp_path):
    write_adapter(tmp_path / "good")
    write_adapter(tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    save_file({name: put_nan(tensor) for name, tensor in load_file(file).items()}, file)
    experts = {"good": tmp_path / "good", "bad": tmp_path / "bad"}
    with pytest.raises(ValueError, match=f"{MODULE}: expert bad has 1 NaN or Inf"):
        merge_adapters(experts, tmp_path / "out", method="task_arithmetic")
    save_file({}, file)
    with pytest.raises(CheckpointError, match="bad: no LoRA factors"):
        merge_adapters(experts, tmp_path / "out", method="task_arithmetic")
    assert {path.name for path in tmp_path.iterdir()} == {"good", "bad"}


def test_code_in_a_checkpoint_is_copied_and_never_run(study, capfd):
    trace = study.root / "was run"
    for folder in ("base", "ocr"):
        code = f"open({str(trace)!r}, 'w').close()\n"
        (study.root / folder / "modeling_custom.py").write_text(code)
        config = json.loads((study.root / folder / "config.json").read_text())
        config["auto_map"] = dict.fromkeys(["AutoConfig", "AutoModel"], "modeling_custom.Custom")
        (study.root / folder / "config.json").write_text(json.dumps(config))
    assert run(study) == 0
    assert main(["inspect", str(study.root / "recipe.yaml")]) == 0
    assert not trace.exists()
    for name in ("modeling_custom.py", "config.json"):
        assert (study.output / name).read_bytes() == (study.root / "base" / name).read_bytes()
    assert load_recipe(study.root / "recipe.yaml").trust_remote_code is False


def test_nothing_trusts_remote_code_of_itself():
    """Wherever transformers is asked, trust_remote_code is left out or a variable."""
    cells = []
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        notebook = json.loads(path.read_text())
        code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
        cells += [(path, text) for text in code if "trust_remote_code" in text]
    files = [(path, path.read_text()) for path in (ROOT / "optmerge_core").rglob("*.py")]
    for path, text in files + cells:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not isinstance(node.value, ast.Constant) or not node.value.value, path
    for path in (ROOT / "data" / "recipes").glob("*.yaml"):
        assert not yaml.safe_load(path.read_text()).get("trust_remote_code"), path


def test_links_within_a_checkpoint_and_the_hubs_cache_are_followed(tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot_folder = repository / "snapshots" / "0123"
    (snapshot_folder / "additional_chat_templates").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("{}")
    (snapshot_folder / "config.json").symlink_to("../../blobs/abc")
    nested = snapshot_folder / "additional_chat_templates" / "tools.jinja"
    nested.symlink_to("../../../blobs/abc")
    (snapshot_folder / "generation_config.json").symlink_to("config.json")
    (tmp_path / "link").symlink_to(snapshot_folder)
    for folder in (snapshot_folder, tmp_path / "link"):
        assert len(side_files(folder)) == 3
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.copy_side_files(tmp_path / "link")
        writer.add("a", torch.zeros(1))
    copy = tmp_path / "out" / "config.json"
    assert copy.read_text() == "{}" and not copy.is_symlink()

    (tmp_path / "models--owner--other").mkdir()
    (tmp_path / "models--owner--other" / "secret.json").write_text("{}")
    stolen = snapshot_folder / "vocab.json"
    stolen.symlink_to("../../../models--owner--other/secret.json")
    with pytest.raises(CheckpointError, match="vocab.json is a link to .*outside this checkpoint"):
        side_files(snapshot_folder)


def killing(what: str, folder: Path) -> dict[str, int]:
    """The counts of tests/killing.py, which asserts that nothing is lost and nothing is half."""
    (folder / "place").mkdir()
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), what, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    for number, name in enumerate(("base", "chart", "ocr", "vqa")):
        generator = torch.Generator().manual_seed(number)
        with CheckpointWriter(tmp_path / name, "2MB") as writer:
            for layer in range(16):
                tensor = torch.randn(256, 512, generator=generator)
                writer.add(f"model.layers.{layer}.mlp.up_proj.weight", tensor)
            writer.write_text("config.json", '{"model_type": "llama"}')
            writer.write_text("tokenizer.json", '{"words": "%s"}' % ("word " * 100_000))
    models = [{"model": name} for name in ("chart", "ocr", "vqa")]
    recipe = {"merge_method": "ties", "base_model": "base", "models": models}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    counts = killing("merges", tmp_path)
    assert counts["killed"] == 20 and counts["nothing"] >= 3 and counts["old"] >= 3
    assert counts["rest"] >= 5  # killed while it wrote


def test_killed_at_every_step_of_writing(tmp_path):
    counts = killing("steps", tmp_path)
    assert counts["new"] > 20 and counts["replacing"] > counts["new"] and counts["put back"] == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_the_command_itself_killed_while_it_writes(study, end):
    """SIGTERM as a scheduler sends it, SIGHUP as a terminal that closes: nothing catches them."""
    study.arguments = ["--overwrite"]
    assert run(study) == 0
    expected = snapshot(study.output)
    command = [sys.executable, "-m", "optmerge_core", "merge", str(study.root / "recipe.yaml")]
    command += ["--output", str(study.output)]
    partial = study.output.with_name(".out.partial")
    shutil.rmtree(study.output)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    handled = signal.signal(end, signal.SIG_DFL) if end != signal.SIGKILL else None
    started = subprocess.Popen(command, **silent)  # which inherits whether SIGHUP is ignored
    if handled is not None:
        signal.signal(end, handled)
    while not partial.exists() and started.poll() is None:
        time.sleep(0.001)
    started.send_signal(end)
    assert started.wait() == -end and not study.output.exists()
    assert partial.exists() and study.output.with_name(".out.lock").exists()
    assert run(study) == 0
    same = {path for path, content in snapshot(study.output).items() if expected[path] == content}
    assert expected.keys() - same == {str(study.output / "merge_report.json")}
    assert set(study.root.parent.iterdir()) == {study.root, study.output}
