import hashlib
import json
import pickle
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
import torch
from lora import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optmerge_core.checkpoints import pickles
from optmerge_core.checkpoints.formats import INDEX_NAME, CheckpointError, side_files
from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.checkpoints.weights import as_weights
from optmerge_core.checkpoints.writer import CheckpointWriter, parse_size

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.ones(5).bfloat16(),
    "n": torch.tensor(3),
}


@pytest.fixture
def sharded(tmp_path):
    """Two shards with an index, and the index to tamper with."""
    folder = tmp_path / "sharded"
    with CheckpointWriter(folder, 25) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    return folder


def tamper(folder, name, file):
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"][name] = file
    (folder / INDEX_NAME).write_text(json.dumps(index))


def same(checkpoint, tensors) -> bool:
    return checkpoint.keys() == tensors.keys() and all(
        torch.equal(checkpoint[name], tensor) and checkpoint[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )


def test_sharded_single_and_unnamed_files_read_alike(sharded, tmp_path):
    checkpoint = open_checkpoint(sharded)
    assert same(checkpoint, TENSORS)
    assert checkpoint.shape("b") == (2, 3) and checkpoint.dtype("a") == torch.bfloat16
    assert checkpoint.folder == sharded
    assert [file.name for file in checkpoint.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    for name in ("model.safetensors", "other.safetensors"):
        (tmp_path / name).mkdir()
        save_file(TENSORS, tmp_path / name / name)
        assert same(open_checkpoint(str(tmp_path / name)), TENSORS)


def test_reads_what_transformers_writes(tiny):
    checkpoint = open_checkpoint(tiny.base)
    assert len(checkpoint.files) > 1
    for file in checkpoint.files:
        for name, tensor in load_file(file).items():
            assert torch.equal(checkpoint[name], tensor)
            assert checkpoint.shape(name) == tuple(tensor.shape)
    assert checkpoint.config()["model_type"] == "internvl"


def test_sha256(sharded):
    files = {path.name: path.read_bytes() for path in sharded.glob("*.safetensors")}
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert len(expected) > 1 and open_checkpoint(sharded).sha256() == expected


def test_two_shards_are_in_memory_at_most_and_the_last_is_written_while_others_work(tmp_path):
    kept = []
    with CheckpointWriter(tmp_path / "model", 4000) as writer:
        for number in range(12):
            tensor = torch.full((500,), float(number))  # two a shard
            kept.append(weakref.ref(tensor))
            writer.add(f"{number:02d}", tensor)
            del tensor
            assert sum(reference() is not None for reference in kept) <= 4
        writer.flush()
        assert len(writer._written) == 6 and not writer._pending
        writer.flush()  # has nothing to do
        assert len(writer.digests()) == 6
    assert list(open_checkpoint(tmp_path / "model")) == [f"{number:02d}" for number in range(12)]


@pytest.mark.parametrize("workers", [1, 4])
def test_hashes_taken_beside_reading_are_those_of_the_files(tmp_path, monkeypatch, workers):
    """In any order, any names left out, by any number of threads: of every byte, once."""
    monkeypatch.setattr("optmerge_core.checkpoints.folder.PIECE", 100)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{i:02d}": torch.randn(i, 7, generator=generator) for i in range(40)}
    with CheckpointWriter(tmp_path / "model", 3000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        written = writer.digests()
    checkpoint = open_checkpoint(tmp_path / "model")
    order = torch.randperm(40, generator=generator)[:30].tolist()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(checkpoint.hash_beside, (f"{i:02d}" for i in order)))
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.files
    }
    assert len(expected) > 5 and checkpoint.sha256() == expected == written
    assert checkpoint.sha256() == expected


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", 3, ".."],
)
def test_index_may_not_leave_the_folder(sharded, file):
    tamper(sharded, "a", file)
    with pytest.raises(CheckpointError, match="'a' points to .*not a safetensors file of this"):
        open_checkpoint(sharded)


def test_damaged_folders_are_refused_with_file_and_remedy(sharded, tmp_path):
    def damaged(text, change):
        folder = tmp_path / "damaged"
        shutil.copytree(sharded, folder)
        change(folder)
        with pytest.raises(CheckpointError, match=text):
            open_checkpoint(folder)
        shutil.rmtree(folder)

    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    damaged(f"{second}: missing shard.*again", lambda f: (f / second).unlink())
    damaged(f"'a' is not in {first}", lambda f: tamper(f, "a", first))
    damaged("'ghost' is not in", lambda f: tamper(f, "ghost", first))
    damaged(f"{second}: tensor 'b' is also in {first}", lambda f: save_file(TENSORS, f / second))
    damaged(
        f"{second}: truncated", lambda f: (f / second).write_bytes((f / first).read_bytes()[:-4])
    )
    damaged(f"{first}: truncated or not", lambda f: (f / first).write_bytes(b"\xff" * 64))
    damaged(f"{first}: truncated or not", lambda f: (f / first).write_bytes(b""))
    damaged(f"{INDEX_NAME}: not valid JSON", lambda f: (f / INDEX_NAME).write_text("{"))
    damaged(f"{INDEX_NAME}: an empty file; down", lambda f: (f / INDEX_NAME).write_text(""))
    damaged(f"{INDEX_NAME}: a JSON object", lambda f: (f / INDEX_NAME).write_text("[]"))
    damaged(f"{INDEX_NAME}: no weight_map", lambda f: (f / INDEX_NAME).write_text("{}"))


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        open_checkpoint(tmp_path)
    torch.save({}, tmp_path / "training_args.bin")
    with pytest.raises(CheckpointError, match=r"training_args.bin: what a training run keeps"):
        open_checkpoint(tmp_path)
    for suffix in ("bin", "safetensors"):
        (tmp_path / f"adapter_model.{suffix}").write_bytes(b"")
        with pytest.raises(CheckpointError, match="PEFT adapter"):
            open_checkpoint(tmp_path)


def test_a_link_to_weights_that_are_gone_is_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("blobs/0")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a link to blobs/0, which"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (["model.Q4_K_M.gguf"], "model.Q4_K_M.gguf: llama.cpp's format; give the Hugging Face"),
        (["latest", "zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"], "DeepSpeed's"),
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "run `python zero_to_fp32.py"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "optimizer.bin"], "FSDP's training state; run `acc"),
        (["consolidated.00.pth", "params.json"], "the authors' own format; give the model's Hugg"),
        (["epoch=1-step=10.ckpt"], "Lightning's; load the model from it"),
        (
            ["optimizer.safetensors", "scheduler.bin"],
            "what a training run keeps beside its weights",
        ),
        (["trainer_state.json", "training_args.bin"], "give the folder where these were saved"),
        (["final/model.safetensors", "runs/events.1"], "no weights here, .*; give one of: final$"),
        (["config.json", "merged/pytorch_model.bin"], "; give one of: merged$"),
        (
            [
                *(f"checkpoint-{n}00/adapter_model.safetensors" for n in (10, 5)),
                "training_args.bin",
            ],
            "; give one of: checkpoint-500, checkpoint-1000$",
        ),
        (["v0/checkpoint-5/model-00001-of-00002.safetensors"], "; give one of: v0/checkpoint-5$"),
        (
            ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
            r"2 of 3 shards \(model-00001-of-00003.safetensors, …\), and no model.safetensors",
        ),
        (["pytorch_model-00002-of-00002.bin"], "1 of 2 shards .*, and no pytorch_model.bin.index"),
        (
            ["adapter_config.json", "README.md"],
            "an adapter's settings without its",
        ),
        (["config.json"], "nor any other; copy or download the model's, or give"),
        (["weights.pt"], r"and no other weights with a known name \(weights.pt\); convert"),
    ],
)
def test_a_folder_given_by_mistake_says_what_it_is_and_what_to_give(tmp_path, files, text):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    for adapter in (False, True):
        with pytest.raises(CheckpointError, match=f"^{tmp_path}: .*{text}"):
            open_checkpoint(tmp_path, adapter=adapter)


def test_a_pointer_in_place_of_weights_is_named(tmp_path):
    for file in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
        with pytest.raises(CheckpointError, match=f"{file}: Git LFS's pointer to it; run `git lfs"):
            open_checkpoint(tmp_path)


def test_an_empty_path_is_not_the_folder_one_is_in(sharded, monkeypatch):
    monkeypatch.chdir(sharded)
    for path in ("", " "):
        with pytest.raises(CheckpointError, match="an empty path, where .* hub id is needed"):
            open_checkpoint(path)
    assert same(open_checkpoint("."), TENSORS)


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path):
    for number, name in enumerate(TENSORS, 1):
        torch.save({name: TENSORS[name]}, tmp_path / f"pytorch_model-0000{number}-of-00003.bin")
    assert same(open_checkpoint(tmp_path), TENSORS)
    for number, name in enumerate(TENSORS, 1):
        save_file({name: TENSORS[name]}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    assert same(open_checkpoint(tmp_path), TENSORS)
    assert all(path.suffix == ".safetensors" for path in open_checkpoint(tmp_path).files)


@pytest.mark.parametrize("kind", ["single", "shards", "pickle"])
def test_whole_weights_are_taken_before_an_adapter_and_it_is_said(sharded, tmp_path, kind):
    folder = sharded if kind == "shards" else tmp_path / kind
    folder.mkdir(exist_ok=True)
    if kind == "single":
        save_file(TENSORS, folder / "model.safetensors")
    if kind == "pickle":
        torch.save(TENSORS, folder / "pytorch_model.bin")
    save_file(
        {"base_model.model.x.lora_A.weight": TENSORS["b"]}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text("{}")
    for adapter in (False, True):
        with pytest.warns(match=f"{folder} holds an adapter .*beside whole weights, which are tak"):
            checkpoint = open_checkpoint(folder, adapter=adapter)
        assert same(checkpoint, TENSORS) and not checkpoint.is_adapter
    assert "adapter_config.json" not in {path.name for path in side_files(folder)}


WRAPPED = [
    "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.module.{}",
    "_fsdp_wrapped_module.{}", "_forward_module.{}", "base_model.model.{}",
    "module.base_model.model.{}",
]  # fmt: skip


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("pickled", [True, False])
def test_the_names_of_wrappers_are_no_part_of_a_whole_model_s(tmp_path, wrapped, pickled):
    tensors = {wrapped.format(name): tensor for name, tensor in TENSORS.items()}
    if pickled:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert same(checkpoint, TENSORS) and checkpoint.shape("b") == (2, 3)
    assert checkpoint.dtype("a") == torch.bfloat16 and checkpoint.nbytes("a") == 10
    assert checkpoint.own_name("b") == wrapped.format("b")
    assert same(open_expert(tensors, checkpoint), TENSORS)  # the same in memory


def test_a_wrapper_s_name_within_and_one_that_is_not_around_all(tmp_path):
    inner = {
        "layers.0._checkpoint_wrapped_module.up.weight": TENSORS["b"],
        "module.x": TENSORS["a"],
    }
    save_file(inner, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["layers.0.up.weight", "module.x"]
    save_file({"a": TENSORS["b"], "_orig_mod.a": TENSORS["a"]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="same tensors with and without a wrapper's name"):
        open_checkpoint(tmp_path)


def test_peft_s_whole_state_is_read_merged_and_refused_unmerged(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["up_proj"]))
    plain = tiny_model().state_dict()
    state = {n: t for n, t in model.state_dict().items() if "lora_" not in n}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert same(open_checkpoint(tmp_path), plain)
    for unmerged in (model.state_dict(), model.base_model.model.state_dict(), model):
        if unmerged is not model:
            torch.save(unmerged, tmp_path / "pytorch_model.bin")
            with pytest.raises(CheckpointError, match=f"{tmp_path} is a PEFT model .* unmerged"):
                open_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="a model in memory is a PEFT .*merge_and_unload"):
            open_expert(unmerged, as_weights(plain))
    # Phi-4-multimodal's own weights have factors: those of its modalities.
    own = {f"layers.0.up.{n}.weight": TENSORS["b"] for n in ("base_layer", "lora_A.vision")}
    torch.save(own, tmp_path / "pytorch_model.bin")
    assert same(open_checkpoint(tmp_path), own)


@pytest.mark.parametrize("adapter", [True, False])
def test_what_zero_3_leaves_empty(tmp_path, adapter):
    name = "base_model.model.x.lora_A.weight" if adapter else "model.norm.weight"
    file = "adapter_model.safetensors" if adapter else "model.safetensors"
    save_file({name: torch.ones(0), "model.x.bias": torch.ones(0)}, tmp_path / file)
    with pytest.raises(CheckpointError, match=rf"1 of 2 tensors are empty \({name}\), as DeepSp"):
        open_checkpoint(tmp_path, adapter=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_read_where_there_are_no_safetensors(tmp_path, zipped, monkeypatch):
    monkeypatch.setattr(pickles, "KEPT_BYTES", 30)  # so that files are mapped more than once
    tied = TENSORS | {"t": TENSORS["b"], "p": torch.nn.Parameter(TENSORS["b"].mT)}
    format = {"_use_new_zipfile_serialization": zipped}
    torch.save(tied, tmp_path / "pytorch_model.bin", **format)
    for _ in range(2):
        assert same(open_checkpoint(tmp_path), tied)
    assert open_checkpoint(tmp_path).shape("p") == (3, 2)
    assert not open_checkpoint(tmp_path)["p"].requires_grad
    (tmp_path / "pytorch_model.bin").unlink()
    shards = {"pytorch_model-00001-of-00002.bin": ["a"], "pytorch_model-00002-of-00002.bin": ["b"]}
    for shard, names in shards.items():
        torch.save({name: TENSORS[name] for name in names}, tmp_path / shard, **format)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert same(checkpoint, {name: TENSORS[name] for name in "ab"})
    assert set(checkpoint.sha256()) == set(shards)
    index["weight_map"]["a"] = "../pytorch_model.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a bin file of this folder"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert same(open_checkpoint(tmp_path), {"a": torch.ones(1)})


def test_pickled_adapters_open(tmp_path):
    name = "base_model.model.layers.0.up_proj"
    factors = {
        f"{name}.lora_A.weight": torch.ones(2, 3),
        f"{name}.lora_B.weight": torch.ones(4, 2),
    }
    torch.save(factors, tmp_path / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    base = tmp_path / "base"
    base.mkdir()
    torch.save({"layers.0.up_proj.weight": torch.zeros(4, 3)}, base / "pytorch_model.bin")
    adapter = open_expert(tmp_path, open_checkpoint(base))
    assert torch.equal(adapter["layers.0.up_proj.weight"], torch.full((4, 3), 4.0))


class Malicious:
    """Unpickled as Python does it, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_nothing(tmp_path, zipped):
    trace = tmp_path / "trace"
    path = tmp_path / "model" / "pytorch_model.bin"
    path.parent.mkdir()
    content = TENSORS | {"x": Malicious(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="pytorch_model.bin: this pickle asks for .* not run"):
        open_checkpoint(path.parent)
    path.write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    with pytest.raises(CheckpointError, match="pytorch_model.bin: .*not run"):
        open_checkpoint(path.parent)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({}, "not a state dict"),
        ([torch.ones(1)], "not a state dict"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is a dict, not a tensor, as in a tra"),
        ({3: torch.ones(1)}, "3 is a Tensor"),
        ({"a": torch.eye(3).to_sparse()}, "'a' is torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64, which is not supported"),
        (torch.nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear"),
        (b"", "truncated, or not a pickle"),
        (b"\xff" * 64, "truncated, or not a pickle"),
        (b"PK\x03\x04" + bytes(60), "truncated, or not a pickle"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path, content, text):
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin: .*{text}"):
        open_checkpoint(tmp_path)


def test_a_truncated_pickle_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for length in (len(whole) - 3, len(whole) // 2, 10):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match="pytorch_model.bin: truncated, or not"):
                open_checkpoint(tmp_path)


def test_hub_ids(sharded, monkeypatch, tmp_path):
    asked = {}

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision)
        if repo == "owner/missing":
            raise FileNotFoundError("no such repository")
        return str(sharded)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("owner/name", revision="main")
    assert same(checkpoint, TENSORS) and asked == {"repo": "owner/name", "revision": "main"}
    assert checkpoint.revision == sharded.name
    with pytest.raises(CheckpointError, match="owner/missing.*check name and network"):
        open_checkpoint("owner/missing")
    assert same(open_checkpoint("owner/name@refs/pr/1"), TENSORS)
    assert asked == {"repo": "owner/name", "revision": "refs/pr/1"}
    open_checkpoint("owner/name@v1", revision="v1")
    with pytest.raises(CheckpointError, match="@v1: revision 'v2' says otherwise; give only one"):
        open_checkpoint("owner/name@v1", revision="v2")
    (tmp_path / "owner").mkdir()
    shutil.copytree(sharded, tmp_path / "owner" / "name@v1")
    assert open_checkpoint("owner/name@v1").revision is None  # a folder of that name
    for text in ("a/b/c", "owner/name@", "owner@v1", "owner/name@../x"):
        with pytest.raises(CheckpointError, match="no such folder, nor a hub id"):
            open_checkpoint(text)
    with pytest.raises(CheckpointError, match="revision is for hub ids"):
        open_checkpoint(sharded, revision="main")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(sharded / INDEX_NAME)


def test_offline_mode_takes_the_cache_or_names_the_remedy(sharded, monkeypatch, tmp_path):
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(sharded, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for location in ("owner/name@v1", f"owner/name@{commit}"):
        for stream in (False, True):
            checkpoint = open_checkpoint(location, stream=stream)
            assert checkpoint.revision == commit and checkpoint.source == "hub"
            assert same(checkpoint, TENSORS)
    text = (
        r"owner/name \(revision v2\) is no folder, and not complete in .*unset HF_HUB_OFFLINE, or"
    )
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint("owner/name@v2")
    next((repository / "snapshots" / commit).glob("*-00002-of-*")).unlink()
    for stream in (False, True):
        with pytest.raises(CheckpointError, match=r"\(revision v1\) is no folder"):
            open_checkpoint("owner/name@v1", stream=stream)


def test_writer_bounds_shards_and_writes_the_hub_format(sharded):
    index = json.loads((sharded / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 24 + 10 + 8
    for file in set(index["weight_map"].values()):
        with safe_open(sharded / file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            names = list(handle.keys())
        assert all(index["weight_map"][name] == file for name in names)
        assert len(names) == 1 or sum(TENSORS[name].nbytes for name in names) <= 25


def test_one_shard_has_no_index_and_bytes_repeat(tmp_path):
    for folder in ("one", "two"):
        with CheckpointWriter(tmp_path / folder, "1MB") as writer:
            for name, tensor in TENSORS.items():
                writer.add(name, tensor)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    one, two = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_writer_leaves_nothing_on_error_and_a_killed_writers_rest_is_no_obstacle(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "00001").write_text("rest")
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "out", 4) as writer:
        writer.add("a", TENSORS["a"])
        writer.add("b", TENSORS["b"])
        writer.digests()
        assert {path.name for path in writer.folder.iterdir()} == {"00001", "00002"}
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "count"), [(1, 1), ("0.5KB", 500), ("1.5 gb", 15 * 10**8), ("9" * 400, int("9" * 400))]
)
def test_sizes(text, count):
    assert parse_size("max_shard_size", text) == count


@pytest.mark.parametrize("text", [0, -1, "0.5B", "0.0001KB", "1e3", "MB", True])
def test_no_sizes(text):
    with pytest.raises(ValueError, match=f"most {text!r}: give bytes"):
        parse_size("most", text)


def test_writer_refusals(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    CheckpointWriter(out)  # an empty folder is as good as none
    (out / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="exists"):
        CheckpointWriter(out)
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        CheckpointWriter(out, overwrite=True)
    with pytest.raises(CheckpointError, match="GB needed.*GB free"):
        CheckpointWriter(tmp_path / "a" / "b", expected_bytes=10**18)
    with pytest.raises(ValueError, match="max_shard_size"):
        CheckpointWriter(tmp_path / "new", "huge")
    with pytest.raises(CheckpointError, match="'a' added twice"):
        with CheckpointWriter(tmp_path / "new") as writer:
            writer.add("a", TENSORS["a"])
            writer.add("a", TENSORS["a"])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_overwriting_replaces_at_the_end_only(sharded):
    with pytest.raises(RuntimeError), CheckpointWriter(sharded, overwrite=True) as writer:
        writer.add("new", torch.zeros(1))
        raise RuntimeError
    assert same(open_checkpoint(sharded), TENSORS)
    with CheckpointWriter(sharded, overwrite=True) as writer:
        writer.add("new", torch.zeros(1))
    assert same(open_checkpoint(sharded), {"new": torch.zeros(1)})
    assert {path.name for path in sharded.parent.iterdir()} == {"sharded"}


def test_side_files_are_all_but_weights(tiny, tmp_path):
    names = {path.name for path in side_files(tiny.base)}
    assert names >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "preprocessor_config.json", "chat_template.jinja", "modeling_custom.py",
    }  # fmt: skip
    assert not [name for name in names if "safetensors" in name]
    base = tmp_path / "base"
    (base / "additional_chat_templates").mkdir(parents=True)
    for name in (
        "config.json",
        "optimizer.pt",
        "x.bin",
        "README.md",
        "adapter_config.json",
        "trainer_state.json",
        "random_states_0.pkl",
        ".hidden",
        "pytorch.index.json",
    ):
        (base / name).write_text("")
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.copy_side_files(base)
        writer.add("a", torch.ones(1))
    assert sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")
    ) == [
        "additional_chat_templates",
        "additional_chat_templates/tools.jinja",
        "config.json",
        "model.safetensors",
    ]
