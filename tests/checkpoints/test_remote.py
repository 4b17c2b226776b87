import gc
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from web import Web

from optmerge_core import merge, open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.checkpoints import http as ranges
from optmerge_core.checkpoints import remote
from optmerge_core.checkpoints.formats import (
    INDEX_NAME,
    STORED_DTYPES,
    CheckpointError,
    parse_header,
)
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.checkpoints.remote import RemoteCheckpoint
from optmerge_core.checkpoints.writer import CheckpointWriter, side_files

TENSORS = {
    "a": torch.arange(5).bfloat16(),
    "b": torch.arange(600.0).view(20, 30),
    "empty": torch.zeros(0, 3),
    "f8": torch.arange(4.0).to(torch.float8_e4m3fn),
    "flag": torch.tensor([True, False]),
    "n": torch.tensor(3),
    "u": torch.tensor([1, 65535], dtype=torch.uint16),
}
SINGLE = "/model/model.safetensors"
PASSING = [
    {"bytes": 100, "cut": True},
    {"bytes": 1},
    {"shift": 1},
    {"status": 429, "headers": {"Retry-After": "1"}},
    {"status": 503},
]


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server of `tmp_path`/model, online, with waits that are noted instead of waited for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()
    (tmp_path / "model").mkdir()
    with Web({"model": tmp_path / "model"}) as server:
        server.waits = []
        monkeypatch.setattr(ranges, "sleep", server.waits.append)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def single(web, tmp_path):
    save_file(TENSORS, tmp_path / SINGLE[1:])
    return web


def stream(web, name="model", **options):
    return open_checkpoint(f"{web.url}/{name}", stream=True, **options)


def each_byte_once(sent) -> int:
    """The number of bytes sent; no byte of a file was sent twice."""
    last = {}
    for path, start, end in sorted(sent):
        assert start >= last.get(path, 0), (path, start)
        last[path] = end
    return sum(end - start for _, start, end in sent)


def same(checkpoint, tensors) -> bool:
    return checkpoint.keys() == tensors.keys() and all(
        torch.equal(checkpoint[name].float(), tensor.float())
        and checkpoint[name].dtype == tensor.dtype
        and checkpoint[name].shape == tensor.shape
        for name, tensor in tensors.items()
    )


def test_a_single_file(single, tmp_path):
    (tmp_path / "model" / "config.json").write_text('{"model_type": "tiny"}')
    checkpoint = stream(single)
    folder = checkpoint.folder
    assert isinstance(checkpoint, RemoteCheckpoint) and len(checkpoint) == len(TENSORS)
    header = sum(end - start for _, start, end in single.sent)
    assert checkpoint.shape("b") == (20, 30) and checkpoint.dtype("a") == torch.bfloat16
    assert checkpoint.config() == {"model_type": "tiny"} and checkpoint.revision is None
    single.sent.clear()
    read = {name: checkpoint[name] for name in checkpoint}
    assert same(read, TENSORS)
    assert header + each_byte_once(single.sent) == (tmp_path / SINGLE[1:]).stat().st_size
    assert checkpoint.sha256()["model.safetensors"].startswith("not hashed: ")
    assert list(checkpoint) == list(open_checkpoint(tmp_path / "model"))
    assert folder.exists() and repr(checkpoint).startswith("RemoteCheckpoint('http://127.0.0.1")
    del checkpoint
    gc.collect()
    assert not folder.exists()


def test_shards_and_an_index_that_may_not_leave_its_folder(web, tmp_path):
    folder = tmp_path / "model"
    with CheckpointWriter(folder, 1000, overwrite=True) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    assert same(stream(web), TENSORS)
    assert [file.name for file in stream(web).files] == [
        file.name for file in open_checkpoint(folder).files
    ]
    (folder / "model-00002-of-00003.safetensors").rename(folder / "lost")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: HTTP 404, no su"):
        stream(web)
    index = json.loads((folder / INDEX_NAME).read_text())
    for path in ("../secret.safetensors", "/a.safetensors", "b/c.safetensors", "..\\d.safetensors"):
        index["weight_map"]["a"] = path
        (folder / INDEX_NAME).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="'a' points to .*do not trust"):
            stream(web)
    assert not [path for path, _ in web.requests if "secret" in path or "/c." in path]


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        ({"bytes": 1000, "cut": True}, [1.0]),
        ({"bytes": 1000}, [1.0]),
        ({"bytes": 0, "cut": True}, [1.0]),
        ({"shift": 8}, [1.0]),
        ({"shift": 8, "bytes": 1000}, [1.0]),
        ({"shift": -8}, [1.0]),
        ({"status": 500}, [1.0]),
        ({"status": 429, "headers": {"Retry-After": "7"}}, [7.0]),
        ({"status": 429, "headers": {"Retry-After": "86400"}}, [300.0]),
        ({"status": 429, "headers": {"RateLimit": '"resolvers";r=0;t=41'}}, [42.0]),
        ({"status": 503, "headers": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}}, [0.0]),
    ],
)
def test_what_fails_for_now_goes_on_where_it_stopped(single, fault, waits):
    checkpoint = stream(single)
    single.sent.clear()
    single.faults[SINGLE] = [fault]
    assert torch.equal(checkpoint["b"], TENSORS["b"])
    assert single.waits == waits
    if "shift" not in fault:
        assert each_byte_once(single.sent) == TENSORS["b"].nbytes


def test_waits_grow_and_end(single, capsys):
    checkpoint = stream(single)
    single.faults[SINGLE] = [{"bytes": 1, "cut": True}] * 5
    assert torch.equal(checkpoint["b"], TENSORS["b"])
    assert single.waits == [1, 2, 4, 8, 16]
    single.waits.clear()
    single.faults[SINGLE] = [{"status": 502, "always": True}]
    with pytest.raises(CheckpointError, match=f"{SINGLE}: HTTP 502; given up after 8 attempts;"):
        checkpoint["b"]
    assert single.waits == [1, 2, 4, 8, 16, 32, 60]
    assert "HTTP 502; again in 32 s" in capsys.readouterr().err


def test_progress_makes_up_for_failures(single, monkeypatch):
    monkeypatch.setattr(ranges, "PROGRESS", 100)
    checkpoint = stream(single)
    single.faults[SINGLE] = [{"bytes": 100, "cut": True}] * 20
    assert torch.equal(checkpoint["b"], TENSORS["b"])
    assert single.waits == [1] * 20


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"status": 404}, "HTTP 404, no such file there"),
        ({"status": 401}, "HTTP 401, access denied; .*hf auth login"),
        ({"status": 403}, "HTTP 403, access denied; .*hf auth login"),
        ({"status": 418}, "HTTP 418 is not understood; download"),
        ({"whole": True}, "the server does not read ranges; download the checkpoint"),
        ({"more": 1}, r"\d+ bytes, version .* where \d+ bytes.* the file has changed"),
        ({"etag": '"2"'}, "the file has changed"),
        ({"encoding": "gzip"}, "compresses the weights; download"),
        ({"status": 416}, "HTTP 416, the file is shorter"),
    ],
)
def test_what_will_not_get_better_is_one_error(single, fault, text):
    checkpoint = stream(single)
    single.faults[SINGLE] = [fault]
    with pytest.raises(CheckpointError, match=f"{SINGLE}: .*{text}"):
        checkpoint["b"]
    assert single.waits == []
    assert torch.equal(checkpoint["b"], TENSORS["b"])


def test_no_server_and_no_checkpoint(web, tmp_path):
    with pytest.raises(CheckpointError, match="no model.safetensors or model.safetensors.index.js"):
        stream(web)
    gone = Web({})
    gone.server_close()
    with pytest.raises(CheckpointError, match=r"/config.json: .*given up after 4 attempts; check"):
        stream(gone)
    for address in (
        "http://user:hush@127.0.0.1/model",
        f"{web.url}/model?token=1",
        "http:///model",
    ):
        with pytest.raises(CheckpointError, match="give the plain URL") as error:
            open_checkpoint(address, stream=True)
        assert "hush" not in str(error.value) and "token" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"stream it \(stream=True, --stream\)"):
        open_checkpoint(f"{web.url}/model")
    with pytest.raises(CheckpointError, match="has no revision"):
        open_checkpoint(f"{web.url}/model", revision="main", stream=True)


def test_offline_mode_is_respected(web, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="offline mode is enabled"):
        stream(web)
    assert web.requests == []


def test_an_expert_is_streamed_only_if_asked(single):
    base = stream(single)
    with pytest.raises(CheckpointError, match="is not downloaded; stream it"):
        open_expert(f"{single.url}/model", base)
    assert open_expert(f"{single.url}/model", base, stream=True).source == f"{single.url}/model"


def test_a_redirect_within_a_server_keeps_the_token(single, tmp_path):
    (tmp_path / "model" / "moved.safetensors").write_bytes((tmp_path / SINGLE[1:]).read_bytes())
    single.redirects[SINGLE] = f"{single.url}/model/moved.safetensors"
    file = ranges.RemoteFile(f"{single.url}{SINGLE}", {"authorization": "Bearer secret"})
    assert file.read(0, 10) + file.read(10, 20) == (tmp_path / SINGLE[1:]).read_bytes()[:20]
    asked = [headers.get("authorization") for _, headers in single.requests]
    assert asked == ["Bearer secret"] * 3


def test_redirects_are_remembered_and_never_see_the_token(single, tmp_path):
    with Web({"cdn": tmp_path / "model"}) as cdn:
        single.redirects[SINGLE] = f"{cdn.url}/cdn/model.safetensors?signed=1"
        token = {"authorization": "Bearer secret"}
        file = ranges.RemoteFile(f"{single.url}{SINGLE}", token)
        content = (tmp_path / SINGLE[1:]).read_bytes()
        for start in range(0, 40, 10):
            assert file.read(start, start + 10) == content[start : start + 10]
        asked = [headers.get("authorization") for _, headers in single.requests]
        assert asked == ["Bearer secret"] and len(cdn.requests) == 4
        cdn.faults["/cdn/model.safetensors"] = [{"status": 403}]  # the signature is too old
        assert file.read(40, 50) == content[40:50]
        assert len(single.requests) == 2 and len(cdn.requests) == 6 and single.waits == [0.0]
        assert not [
            x for _, headers in cdn.requests for x in headers if x.lower() == "authorization"
        ]


def header(**tensors) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}} | tensors).encode()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_headers():
    assert parse_header(header(b=entry(offsets=(8, 16)), a=entry()), 16) == [
        ("a", (2,), torch.float32, 0),
        ("b", (2,), torch.float32, 8),
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff{", "utf-8"),
        (b"[]", "header"),
        (b"3", "header"),
        (header(a=3), "header"),
        (header(a={"shape": [2]}), "header: KeyError 'data_offsets'"),
        (header(a=entry(offsets=(0, 8, 16))), "unpack"),
        (header(a=entry(offsets=("x", 8))), "header|bytes x"),
        (header(a=entry(dtype="F4")), "dtype F4 is not supported"),
        (header(a=entry(shape=(-2,))), "shape"),
        (header(a=entry(shape=(True, 2))), "shape"),
        (header(a=entry(shape=(0, 1 << 70), offsets=(0, 0))), "shape"),
        (header(a=entry(shape=(3,))), r"bytes 0 to 8, after 0, for F32 \[3\]"),
        (header(a=entry(), b=entry()), "after 8"),
        (header(a=entry(), b=entry(offsets=(12, 20))), "after 8"),
        (header(a=entry(offsets=(8, 0))), "bytes 8 to 0"),
        (header(), "16 bytes of data where 0"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[" * 100_000, "header: RecursionError|Recursion|JSON"),
    ],
)
def test_damaged_headers_are_refused(content, text):
    with pytest.raises(ValueError, match=text):
        parse_header(content, 16)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 150), st.binary(min_size=1, max_size=3))
def test_no_header_is_accepted_that_safetensors_refuses(position, change):
    file = bytearray(save({"a": torch.ones(2, 3), "b": torch.ones(4).half(), "c": torch.ones(())}))
    length = struct.unpack("<Q", file[:8])[0]
    position = 8 + position % length
    file[position : position + len(change)] = change
    file = file[: 8 + length + 24 + 8 + 4]
    try:
        found = parse_header(file[8 : 8 + length], len(file) - 8 - length)
    except ValueError:
        return
    try:
        tensors = load(bytes(file))
    except SafetensorError as error:
        pytest.fail(f"{file[8 : 8 + length]!r}: {error}")
    assert {name: (shape, dtype) for name, shape, dtype, _ in found} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


def test_damaged_files_are_refused(single, tmp_path):
    path = tmp_path / SINGLE[1:]
    whole = path.read_bytes()
    for content in (whole[:-4], whole + b"0000", b"\xff" * 64, whole[:20], whole[:3], b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{SINGLE}: .*(truncated|shorter)"):
            stream(single)


def test_a_streamed_merge_is_that_of_the_folders(tiny, web, tmp_path, monkeypatch):
    options = {"method": "dare_ties", "max_shard_size": "60KB"}
    merge(tiny.base, tiny.experts, tmp_path / "local", **options)
    web.folders |= {path.name: path for path in (tiny.base, *tiny.experts.values())}
    experts = {name: f"{web.url}/{name}" for name in tiny.experts} | {"vqa": tiny.experts["vqa"]}
    totals = []
    monkeypatch.setattr("optmerge_core.checkpoints.remote.tqdm", lambda **bar: Bar(totals, **bar))
    report = merge(f"{web.url}/base", experts, tmp_path / "out", stream=True, **options)

    names = {path.name for path in (tmp_path / "local").iterdir()} - {"modeling_custom.py"}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    for name in names - {"README.md", "merge_report.json"}:
        streamed, local = (tmp_path / folder / name for folder in ("out", "local"))
        assert streamed.read_bytes() == local.read_bytes(), name
    each_byte_once(web.sent)
    merged = {record["name"] for record in report.parameters}
    base = open_checkpoint(tiny.base)
    bytes_of_base, bytes_merged = (sum(base.nbytes(n) for n in x) for x in (base, merged))
    assert totals == [(bytes_of_base + 2 * bytes_merged, bytes_of_base + 2 * bytes_merged)]
    assert report.base_model["source"] == f"{web.url}/base" == report.base_model["location"]
    assert report.experts["vqa"]["source"] == "folder"
    assert report.experts["vqa"]["sha256"] == open_checkpoint(tiny.experts["vqa"]).sha256()
    assert all(x.startswith("not hashed") for x in report.experts["ocr"]["sha256"].values())


class Bar:
    """A progress bar that notes what was announced, and what came."""

    def __init__(self, totals, total, disable, **bar):
        self.totals, self.total, self.came, self.update = totals, total, 0, self.add

    def add(self, count):
        self.came += count

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.totals.append((self.total, self.came))


def test_a_streamed_merge_of_all_parameters_reads_once(tiny, web, tmp_path):
    web.folders |= {path.name: path for path in (tiny.base, *tiny.experts.values())}
    experts = {name: f"{web.url}/{name}" for name in tiny.experts}
    options = {"method": "task_arithmetic", "scope": "all", "dtype": "float32"}
    merge(f"{web.url}/base", experts, tmp_path / "out", stream=True, **options)
    each_byte_once(web.sent)
    merge(tiny.base, tiny.experts, tmp_path / "local", **options)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_a_merge_survives_a_bad_network(tiny, web, tmp_path):
    """Half of all requests for weights fail in some way, at random; the result is the same."""
    web.folders |= {path.name: path for path in (tiny.base, *tiny.experts.values())}
    draw = random.Random(0)
    for path in (tiny.base, *tiny.experts.values()):
        for file in path.glob("*.safetensors"):
            faults = [draw.choice([{}, draw.choice(PASSING)]) for _ in range(60)]
            web.faults[f"/{path.name}/{file.name}"] = [dict(fault) for fault in faults]
    experts = {name: f"{web.url}/{name}" for name in tiny.experts}
    merge(f"{web.url}/base", experts, tmp_path / "out", stream=True, method="ties")
    merge(tiny.base, tiny.experts, tmp_path / "local", method="ties")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert len(web.waits) > 50


def test_a_failed_stream_leaves_nothing(tiny, web, tmp_path):
    broken = tmp_path / "model"
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    tensors = dict(open_checkpoint(tiny.experts["ocr"]).items())
    tensors[name][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    for path in side_files(tiny.base):
        shutil.copy(path, broken)
    experts = {"chart": tiny.experts["chart"], "ocr": f"{web.url}/model"}
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=f"{name}: expert ocr has 1 NaN or Inf; use an earlier"):
        merge(tiny.base, experts, out, stream=True, method="tsv")
    with pytest.raises(ValueError, match=f"{name}: the base has 1 NaN or Inf"):
        merge(f"{web.url}/model", {"chart": tiny.experts["chart"]}, out, stream=True)
    with pytest.raises(ValueError, match="trim='model' reads all weights three times.*download"):
        merge(tiny.base, experts, out, stream=True, method="ties", trim="model")
    web.folders["base"] = tiny.base
    with pytest.raises(ValueError, match="every expert .chart. equals the base model in all 14"):
        merge(tiny.base, {"chart": f"{web.url}/base"}, out, stream=True, method="ties")
    web.faults[SINGLE] = [{}, {}, {}, {"status": 500, "always": True}]
    with pytest.raises(CheckpointError, match="HTTP 500; given up after 8 attempts"):
        merge(tiny.base, experts, out, stream=True, method="ties")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_adapters_stream(tiny, web, tmp_path):
    folder = tmp_path / "model"
    module = "model.language_model.layers.1.mlp.up_proj"
    factors = {"A": torch.randn(4, 32), "B": torch.randn(48, 4)}
    save_file(
        {f"base_model.model.{module}.lora_{side}.weight": x for side, x in factors.items()},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    base = open_checkpoint(tiny.base)
    adapter = open_expert(f"{web.url}/model", base, stream=True)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    assert torch.equal(adapter.task_vector(name), 2 * factors["B"] @ factors["A"])
    with pytest.raises(CheckpointError, match="no model.safetensors or model.safetensors.index"):
        open_checkpoint(f"{web.url}/model", stream=True)
    for out, location, streamed in (("a", folder, False), ("b", f"{web.url}/model", True)):
        web.sent.clear()
        merge(tiny.base, {"e": location}, tmp_path / out, method="ties", stream=streamed)
    each_byte_once(web.sent)
    file = "model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("shards", [1000, "1MB"])
def test_streamed_too_whole_weights_are_taken_before_an_adapter(web, tmp_path, shards):
    folder = tmp_path / "model"
    with CheckpointWriter(folder, shards, overwrite=True) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text("{}")
    with pytest.warns(match=f"{web.url}/model holds an adapter .* beside whole weights, which are"):
        checkpoint = open_checkpoint(f"{web.url}/model", stream=True, adapter=True)
    assert same(checkpoint, TENSORS)


def test_remote_code_comes_along(single, tmp_path):
    folder = tmp_path / "model"
    auto_map = {"AutoModel": "modeling_x.X", "AutoConfig": "other/repo--configuration_y.Y"}
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    (folder / "modeling_x.py").write_text("from .helper_x import help\nimport torch\n")
    (folder / "helper_x.py").write_text("def help(): ...\n")
    checkpoint = stream(single)
    found = {path.name for path in checkpoint.folder.iterdir()}
    assert found == {"config.json", "modeling_x.py", "helper_x.py"}


def test_a_server_cannot_keep_a_client_for_ever(single, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "m0.X"}}')
    for number in range(9):
        (folder / f"m{number}.py").write_text(f"from .m{number + 1} import x\n")
    monkeypatch.setattr(remote, "MAX_MODULES", 5)
    checkpoint = stream(single)
    assert len(list(checkpoint.folder.glob("*.py"))) == 5
    monkeypatch.setattr(ranges, "MAX_WHOLE", 10)
    with pytest.raises(CheckpointError, match="/config.json: larger than 10 bytes; download"):
        stream(single)


def test_command_line(tiny, web, tmp_path, capsys):
    web.folders |= {path.name: path for path in (tiny.base, *tiny.experts.values())}
    models = [{"model": f"{web.url}/{name}", "name": name} for name in tiny.experts]
    recipe = {"merge_method": "ties", "base_model": f"{web.url}/base", "models": models}
    path = tmp_path / "streamed.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(path), "--output", str(tmp_path / "out")]) == 1
    assert "--stream" in capsys.readouterr().err
    assert main(["merge", str(path), "--output", str(tmp_path / "out"), "--stream"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_every_dtype_streams(web, tmp_path):
    tensors = {name: torch.zeros(3, dtype=dtype) for name, dtype in STORED_DTYPES.items()}
    save_file(tensors, tmp_path / SINGLE[1:])
    assert same(stream(web), tensors)


HUB = """
import json, sys
import torch
from huggingface_hub import constants
from optmerge_core import open_checkpoint
from optmerge_core.checkpoints.formats import CheckpointError

found = {}
streamed = open_checkpoint("owner/name@v1", stream=True)
found["streamed"] = {name: tensor.float().sum().item() for name, tensor in streamed.items()}
found["kind"] = [type(streamed).__name__, streamed.revision, streamed.source]
found["sha256"] = streamed.sha256()
found["folder"] = sorted(path.name for path in streamed.folder.iterdir())
found["config"] = streamed.config()
for location in ("owner/none", "owner/gated", "owner/name@none", "owner/pickled"):
    try:
        opened = open_checkpoint(location, stream=True)
    except CheckpointError as error:
        found[location] = str(error)
constants.HF_HUB_OFFLINE = True
try:
    open_checkpoint("owner/name@v1", stream=True)
except CheckpointError as error:
    found["offline"] = str(error)
constants.HF_HUB_OFFLINE = False
cached = open_checkpoint("owner/name@v1")
found["cached"] = {name: tensor.float().sum().item() for name, tensor in cached.items()}
found["pickled"] = {name: x.sum().item() for name, x in open_checkpoint("owner/pickled").items()}
again = open_checkpoint("owner/name@v1", stream=True)
found["again"] = [type(again).__name__, again.source]
constants.HF_HUB_OFFLINE = True
found["then offline"] = open_checkpoint("owner/name@v1", stream=True).revision
print(json.dumps(found))
"""


class Hub(Web):
    """The hub's answers for repositories whose files lie in `folders`, weights on another host."""

    commit = "0123456789" * 4

    def __init__(self, folders, cdn):
        served = {f"{repo}/resolve/{self.commit}": path for repo, path in folders.items()}
        super().__init__(served)
        for repo, folder in folders.items():
            files = [
                {"path": path.name, "size": path.stat().st_size, "oid": "b" * 40, "type": "file"}
                for path in sorted(folder.iterdir())
            ]
            for file in files:
                if file["path"].endswith((".safetensors", ".bin")):
                    file["lfs"] = {"oid": "c" * 64, "size": file["size"], "pointerSize": 130}
                    at = f"/{repo}/resolve/{self.commit}/{file['path']}"
                    self.redirects[at] = f"{cdn.url}/{repo}/{file['path']}"
            siblings = [
                {"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]}
                | ({"lfs": {"sha256": "c" * 64} | file["lfs"]} if "lfs" in file else {})
                for file in files
            ]
            siblings.append({"rfilename": "onnx/model.safetensors", "size": 8})
            info = {"id": repo, "sha": self.commit, "siblings": siblings}
            for revision in ("", "/revision/main", "/revision/v1", f"/revision/{self.commit}"):
                self.pages[f"/api/models/{repo}{revision}"] = info
            self.pages[f"/api/models/{repo}/tree/{self.commit}"] = files

    def headers(self, path):
        size = {"X-Linked-Size": str(self.file(path).stat().st_size)}
        linked = {"X-Linked-Etag": "c" * 64} | size if path in self.redirects else {}
        return {"X-Repo-Commit": self.commit} | linked


def test_the_hub(tmp_path):
    repos = {"owner/name": tmp_path / "name", "owner/pickled": tmp_path / "pickled"}
    for folder in repos.values():
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "tiny"}')
    save_file(TENSORS, repos["owner/name"] / "model.safetensors")
    torch.save({"a": TENSORS["b"]}, repos["owner/pickled"] / "pytorch_model.bin")
    with Web(repos) as cdn, Hub(repos, cdn) as hub:
        denied = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
        missing = {"X-Error-Code": "RepoNotFound"}
        revision = {"X-Error-Code": "RevisionNotFound"}
        hub.faults = {
            "/api/models/owner/gated": [{"status": 403, "headers": denied}],
            "/api/models/owner/none": [{"status": 404, "headers": missing}],
            "/api/models/owner/name/revision/none": [{"status": 404, "headers": revision}],
        }
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_secret",
            "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", HUB],
            env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        tokens = [headers.get("authorization") for _, headers in cdn.requests]
        assert set(tokens) == {None} and tokens
        assert any(
            headers.get("authorization") == "Bearer hf_secret" for _, headers in hub.requests
        )
    sums = {name: tensor.float().sum().item() for name, tensor in TENSORS.items()}
    assert found["streamed"] == found["cached"] == sums
    source = f"{hub.url}/owner/name/resolve/{hub.commit}"
    assert found["kind"] == ["RemoteCheckpoint", hub.commit, source]
    assert found["sha256"] == {"model.safetensors": "c" * 64}
    assert found["folder"] == ["config.json"] and found["config"] == {"model_type": "tiny"}
    assert "check the name; for a private model" in found["owner/none"]
    assert "accept the conditions" in found["owner/gated"]
    assert found["owner/name@none"].startswith("owner/name (revision none): ")
    assert "no such branch, tag or commit" in found["owner/name@none"]
    assert "a pickle cannot be streamed; download" in found["owner/pickled"]
    assert found["offline"].startswith("owner/name (revision v1) is no folder, and not complete in")
    assert "unset HF_HUB_OFFLINE, or run `hf download owner/name`" in found["offline"]
    assert found["pickled"] == {"a": TENSORS["b"].sum().item()}
    assert found["again"] == ["Checkpoint", "hub"] and found["then offline"] == hub.commit
