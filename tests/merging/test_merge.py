import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import optmerge_core
from optmerge_core.checkpoints.folder import Digest
from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.checkpoints.writer import CheckpointWriter
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.loop import merge_tensors
from optmerge_core.merging.merge import merge, merge_part
from optmerge_core.merging.plan import plan_merge
from optmerge_core.methods import BASED, DRAWN, EXPERTS
from optmerge_core.methods.dare import dare
from optmerge_core.methods.registry import METHODS
from optmerge_core.study.recipe import load_recipe
from optmerge_core.task_vectors.stack import apply, derive_seed

UP = "language_model.model.layers.0.mlp.up_proj.weight"
FAST = {"wudi": {"steps": 5}, "optmerge": {"steps": 5}}


def whole(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read without this package."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def naive(tiny, method, options, scaling_coefficient) -> dict[str, torch.Tensor]:
    """The merged model, computed from whole models in memory."""
    base, experts = whole(tiny.base), {n: whole(path) for n, path in few(tiny, method).items()}
    merged = dict(base)
    for name in mergeable({name: tensor.shape for name, tensor in base.items()}, "internvl"):
        stack = torch.stack(
            [expert[name].float() - base[name].float() for expert in experts.values()]
        )
        if method in DRAWN:
            seeds = [derive_seed(3, name, expert) for expert in experts]
            options = options | {"generator": [torch.Generator().manual_seed(s) for s in seeds]}
        if method in BASED:
            options = options | {"base": base[name].float()}
        task_vector = METHODS[method](stack, **options)
        merged[name] = (base[name].float() + scaling_coefficient * task_vector).half()
    return merged


def few(tiny, method):
    """As many of the experts as the method is for."""
    return dict(list(tiny.experts.items())[: EXPERTS.get(method, 3)])


@pytest.fixture
def damaged(tiny, tmp_path):
    """A function that puts a changed copy of expert ocr among the experts, and returns them."""

    def change(**changes):
        tensors = whole(tiny.experts["ocr"]) | changes
        folder = tmp_path / "damaged"
        folder.mkdir()
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
        shutil.copy(tiny.base / "config.json", folder)
        return tiny.experts | {"ocr": folder}

    return change


@pytest.mark.parametrize("method", METHODS)
def test_merged_folder_equals_a_naive_merge_bit_for_bit(tiny, tmp_path, method):
    out, options = tmp_path / "out", FAST.get(method, {})
    merge(
        tiny.base, few(tiny, method), out, method=method, method_options=options,
        scaling_coefficient=0.7, seed=3, max_shard_size="20KB",
    )  # fmt: skip
    expected, merged = naive(tiny, method, options, 0.7), whole(out)
    assert merged.keys() == expected.keys()
    assert all(merged[name].dtype == torch.float16 for name in merged)
    assert [name for name in merged if not torch.equal(merged[name], expected[name])] == []
    assert not torch.equal(merged[UP], whole(tiny.base)[UP])


def test_merged_folder_opens_and_generates(tiny, tmp_path):
    from transformers import AutoTokenizer, InternVLForConditionalGeneration

    report = merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", max_shard_size="20KB")
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    inputs = {
        "input_ids": torch.tensor([[2, 2, 2, 2, 3, 4]]),
        "pixel_values": torch.zeros(1, 3, 28, 28),
    }
    generated = model.float().generate(
        **inputs, attention_mask=torch.ones(1, 6, dtype=torch.long), max_new_tokens=3,
        do_sample=False,
    )  # fmt: skip
    assert generated.shape[1] > 6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False) == "red"
    )
    for name in ("modeling_custom.py", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny.base / name).read_bytes()
    assert report.parameters_kept + len(report.parameters) == len(whole(tiny.base))


def test_reruns_are_byte_identical(tiny, tmp_path):
    for folder in ("one", "two"):
        merge(tiny.base, tiny.experts, tmp_path / folder, method="dare_ties", max_shard_size="20KB")
    files = sorted((tmp_path / "one").glob("*.safetensors*"))
    assert len(files) > 2
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_inputs_are_hashed_while_they_are_read(tiny, tmp_path, monkeypatch):
    """Nothing is left to read for it at the end, but what did not merge; parts hash nothing."""
    left, finish, hashed = {}, Digest.finish, []

    def recorded(self):
        left[self.path] = self.path.stat().st_size - self._bytes
        return finish(self)

    def waiting(self, end):
        """As `advance`, which another thread at the same file would make do nothing."""
        with self._lock:
            hashed.append(self._hash_to(end))

    monkeypatch.setattr(Digest, "finish", recorded)
    monkeypatch.setattr(Digest, "advance", waiting)
    for scope in ("all", "linear"):
        left.clear()
        merge(tiny.base, tiny.experts, tmp_path / scope, method="ties", scope=scope)
        assert len(left) > len(tiny.experts)
        own = {path: rest for path, rest in left.items() if path.parent == Path(tiny.base)}
        assert set((left if scope == "all" else own).values()) == {0}
    hashed.clear()
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "parts", method="ties")
    merge_part(plan, 0)
    assert hashed == []


def test_report_and_model_card(tiny, tmp_path):
    out = tmp_path / "out"
    report = merge(
        tiny.base, tiny.experts, out, method="ties", method_options={"density": 0.5},
        scaling_coefficient=0.3,
    )  # fmt: skip
    written = json.loads((out / "merge_report.json").read_text())
    assert written == json.loads(report.to_json())
    assert written["base_model"]["sha256"] == open_checkpoint(tiny.base).sha256()
    assert written["experts"]["ocr"]["sha256"] == open_checkpoint(tiny.experts["ocr"]).sha256()
    assert written["peak_memory_bytes"] > 1e7 and written["seconds"] > 0
    record = next(record for record in written["parameters"] if record["name"] == UP)
    task_vector = whole(tiny.experts["vqa"])[UP].float() - whole(tiny.base)[UP].float()
    assert record["expert_norms"]["vqa"] == pytest.approx(task_vector.norm().item())
    assert record["merged_norm"] > 0 and record["shape"] == [48, 32]

    card = (out / "README.md").read_text()
    assert "InternVLForConditionalGeneration.from_pretrained" in card
    (tmp_path / "again.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
    recipe = load_recipe(tmp_path / "again.yaml")
    assert recipe.options() == {"density": 0.5} and recipe.scaling_coefficient == 0.3
    assert list(recipe.experts) == list(tiny.experts)


def test_dtype_converts_all_and_the_config(tiny, tmp_path):
    merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", dtype="bfloat16")
    merged, base = whole(tmp_path / "out"), whole(tiny.base)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    embedding = "language_model.model.embed_tokens.weight"
    assert torch.equal(merged[embedding], base[embedding].bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_merge_tensors_shares_the_loop(tiny, tmp_path):
    base = open_checkpoint(tiny.base)
    experts = {name: open_checkpoint(folder) for name, folder in tiny.experts.items()}
    names = mergeable(base.shapes(), "internvl")
    merged = merge_tensors(base, experts, names, method="dare_task_arithmetic", seed=5)
    backwards = merge_tensors(base, experts, names[::-1], method="dare_task_arithmetic", seed=5)
    assert all(torch.equal(merged[name], backwards[name]) for name in names)
    other = merge_tensors(base, experts, names, method="dare_task_arithmetic", seed=6)
    assert not torch.equal(merged[UP], other[UP])

    merge(tiny.base, tiny.experts, tmp_path / "out", method="dare_task_arithmetic", seed=5)
    folder = open_checkpoint(tmp_path / "out")
    for name in names:
        assert torch.equal(folder[name], apply(base[name], merged[name], 1.0))


def test_experts_order_does_not_move_what_dare_drops(tiny):
    base = open_checkpoint(tiny.base)
    experts = {name: open_checkpoint(folder) for name, folder in tiny.experts.items()}
    arguments = {"method": "dare_task_arithmetic", "method_options": {"drop_rate": 0.5}}
    forth = merge_tensors(base, experts, [UP], **arguments)[UP]
    back = merge_tensors(base, dict(reversed(experts.items())), [UP], **arguments)[UP]
    torch.testing.assert_close(forth, back, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_trimming_over_the_model_equals_sorting_it(tiny, method):
    base = open_checkpoint(tiny.base)
    experts = {name: open_checkpoint(folder) for name, folder in tiny.experts.items()}
    names = mergeable(base.shapes(), "internvl")
    merged = merge_tensors(
        base, experts, names, method=method, method_options={"density": 0.3}, trim="model"
    )
    stacks = {}
    for name in names:
        stacks[name] = torch.stack([e[name].float() - base[name].float() for e in experts.values()])
        if method == "dare_ties":
            seeds = [derive_seed(0, name, expert) for expert in experts]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            stacks[name] = dare(stacks[name], 0.2, generators)
    model = torch.cat([stack.flatten(1).abs() for stack in stacks.values()], dim=1)
    thresholds = model.sort(dim=1).values[:, int(0.7 * model.shape[1]) - 1]
    for name in names:
        assert torch.equal(merged[name], METHODS["ties"](stacks[name], thresholds=thresholds))
    per_tensor = merge_tensors(base, experts, names, method=method, method_options={"density": 0.3})
    assert any(not torch.equal(merged[name], per_tensor[name]) for name in names)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does")
def test_memory_is_bounded_by_a_parameter_and_a_shard(tmp_path):
    """96 MB models of 1/2 MB parameters: the peak is a few parameters a core, not a model."""
    folders = [tmp_path / name for name in ("base", "a", "b", "c")]
    for number, folder in enumerate(folders):
        with CheckpointWriter(folder, "8MB") as writer:
            for layer in range(192):
                tensor = torch.full((256, 512), number + layer / 100)
                writer.add(f"model.layers.{layer}.mlp.up_proj.weight", tensor)
            writer.write_text("config.json", '{"model_type": "llama"}')

    def growth(shard) -> float:
        """MB above a small merge's memory, in a process that has freed nothing to reuse."""
        script = f"""if True:
            import resource
            from pathlib import Path
            from optmerge_core import merge
            root = Path({str(tmp_path)!r})
            experts = {{name: root / name for name in ("a", "b", "c")}}
            merge(root / "base", experts, root / "warm up", method="weight_average",
                  max_shard_size="4MB", overwrite=True)
            before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            report = merge(root / "base", experts, root / "out", method="weight_average",
                           max_shard_size={shard!r}, overwrite=True)
            print((report.peak_memory_bytes - before) / 1e6)
        """
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return float(run.stdout)

    assert growth("8MB") < 48
    assert growth("1GB") > 64  # holds a model, so the first could have failed


def test_mismatches_are_one_error_naming_parameter_expert_and_both_shapes(tiny, damaged, tmp_path):
    extra = UP.replace("layers.0", "layers.2")
    o_proj = UP.replace("mlp.up_proj", "self_attn.o_proj")
    gate, down = UP.replace("up_", "gate_"), UP.replace("up_", "down_")
    experts = damaged(
        **{
            UP: torch.zeros(48, 16).half(),
            gate: None,
            down: torch.zeros(32, 48).to(torch.int8),
            extra: torch.ones(2, 2),
        }
    )
    with pytest.raises(ValueError) as caught:
        merge(tiny.base, experts, tmp_path / "out")
    text = str(caught.value)
    assert "4 parameters cannot be merged" in text and o_proj not in text
    assert f"{UP}: expert ocr has shape (48, 16) float16, the base shape (48, 32) float16" in text
    assert f"{gate}: expert ocr has no such parameter, the base shape (48, 32) float16" in text
    assert f"{down}: expert ocr has shape (32, 48) int8, the base shape (32, 48) float16" in text
    assert f"{extra}: expert ocr has shape (2, 2) float32, the base no such parameter" in text
    assert "correct base_model" in text
    assert not (tmp_path / "out").exists()


def test_differences_outside_the_merge_are_a_notice(tiny, damaged, tmp_path):
    embedding = "language_model.model.embed_tokens.weight"
    with pytest.warns(UserWarning, match=rf"1 parameters outside.*{embedding}: expert ocr"):
        merge(tiny.base, damaged(**{embedding: torch.zeros(24, 32).half()}), tmp_path / "out")
    assert torch.equal(whole(tmp_path / "out")[embedding], whole(tiny.base)[embedding])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(tiny, damaged, tmp_path, bad):
    tensor = whole(tiny.experts["ocr"])[UP]
    tensor[1, 2] = bad
    with pytest.raises(ValueError, match=f"{UP}: expert ocr has 1 NaN or Inf"):
        merge(tiny.base, damaged(**{UP: tensor}), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "magic"}, "magic.*weight_average"),
        ({"method": "ties", "method_options": {"dense": 1}}, "dense.*density"),
        ({"method": "ties", "method_options": {"density": 0}}, "density"),
        ({"method": "ties", "method_options": {"density": "x"}}, "ties.*density.*wrong type"),
        ({"method": "ties", "method_options": {"thresholds": 0}}, "follows from trim"),
        ({"method": "dare_ties", "method_options": {"generator": 0}}, "follows from seed"),
        ({"experts": {}}, "at least one"),
        ({"experts": ["folder"]}, "mapping"),
        ({"scaling_coefficient": float("nan")}, "finite"),
        ({"trim": "layer"}, "'tensor' or 'model'"),
        ({"seed": "x"}, "seed 'x': give a whole number"),
        ({"seed": True}, "seed True: give a whole number"),
        ({"family": 3}, "family 3: give a model type"),
        ({"scaling_coefficient": "1"}, "scaling_coefficient '1': give a finite number"),
        ({"max_shard_size": "0.5B"}, "max_shard_size '0.5B': give bytes"),
        ({"trim": "model", "method": "tsv"}, "tsv does not trim"),
        ({"device": "abacus"}, "abacus"),
        ({"dtype": "int8"}, "int8"),
        ({"family": "llama"}, "no parameter to merge.*llama"),
        ({"base_model": "a/b/c"}, "no such folder"),
        ({"scaling_coefficient": 1e9, "method": "ties"}, "out of the range of float16"),
    ],
)  # fmt: skip
def test_refusals_leave_nothing(tiny, tmp_path, arguments, text):
    arguments = {"base_model": tiny.base, "experts": tiny.experts} | arguments
    with pytest.raises(ValueError, match=text):
        merge(output_dir=tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_output_folders(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge(tiny.base, tiny.experts, out, method="ties")
    before = whole(out)
    with pytest.raises(CheckpointError, match="exists"):
        merge(tiny.base, tiny.experts, out, method="ties", scaling_coefficient=0.5)
    merge(tiny.base, tiny.experts, out, method="ties", scaling_coefficient=0.5, overwrite=True)
    assert not torch.equal(whole(out)[UP], before[UP])
    shutil.copytree(tiny.base, tmp_path / "base")
    with pytest.raises(ValueError, match="holds the base model"):
        merge(tmp_path / "base", tiny.experts, tmp_path / "base", overwrite=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="GB needed"):
        merge(tiny.base, tiny.experts, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "base"}


def test_failures_on_the_way_leave_nothing(tiny, tmp_path, monkeypatch):
    def full_disk(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointWriter, "add", full_disk)
    with pytest.raises(OSError, match="No space left"):
        merge(tiny.base, tiny.experts, tmp_path / "out", method="ties")
    assert list(tmp_path.iterdir()) == []


def test_same_folder_twice_is_a_notice(tiny, tmp_path):
    experts = {"a": tiny.experts["ocr"], "b": tiny.experts["ocr"]}
    with pytest.warns(UserWarning, match="expert b is the same folder as expert a"):
        merge(tiny.base, experts, tmp_path / "one", method="ties")
    with (
        pytest.warns(UserWarning, match="expert a is the same folder as the base model"),
        pytest.raises(ValueError, match=r"every expert \(a\) equals the base model"),
    ):
        merge(tiny.base, {"a": tiny.base}, tmp_path / "two")


def test_package_exports():
    assert set(optmerge_core.__all__) == {
        "METHODS", "MergePlan", "TABLE_METHODS", "__version__", "check_merged", "extract_adapter",
        "join", "load_plan", "load_recipe", "merge", "merge_adapters", "merge_part",
        "open_checkpoint", "open_expert", "plan_merge", "svc",
    }  # fmt: skip
    assert optmerge_core.merge is merge and optmerge_core.__version__ == "0.1.0"
