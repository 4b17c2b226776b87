"""What checkpoint folders look like: file names, indices, headers, dtypes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import torch

from optmerge_core.checkpoints import HUB_ID

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
FORMATS = {
    ".safetensors": (SINGLE_NAME, ADAPTER_NAME, INDEX_NAME),
    ".bin": ("pytorch_model.bin", "adapter_model.bin", "pytorch_model.bin.index.json"),
}  # suffix -> names of a single file, of an adapter, of the index; in order of preference
OTHERS = {
    ".safetensors": re.compile(r"(?!optimizer|scheduler)[^/]*\.safetensors"),
    ".bin": re.compile(r"pytorch_model(?:_fsdp|-\d+-of-\d+)\.bin"),
}  # suffix -> weights without a known name or index
SHARD = re.compile(r"-\d{1,9}-of-(\d{1,9})\.")
WEIGHTS_BELOW = re.compile(r"(.+)/[^/]*model[^/]*\.(?:safetensors|bin)")
OTHER_KINDS = {
    r"\.gguf$": "llama.cpp's format; give the Hugging Face folder that it was made from",
    r"(?:^|/)zero_to_fp32\.py$|(?:model|optim)_states\.pt$": "DeepSpeed's training state; run "
    "`python zero_to_fp32.py . whole` there, and give the folder `whole`, with the model's config",
    r"\.distcp$": "FSDP's training state; run `accelerate merge-weights` on the folder of these "
    "files, and give the folder of its output, with the model's config",
    r"^consolidated.*\.pth$": "the authors' own format; give the model's Hugging Face folder, or "
    "make it with transformers' convert_..._weights_to_hf.py",
    r"\.ckpt$": "Lightning's; load the model from it and save it with save_pretrained(...)",
    r"^(?:training_args|optimizer|scheduler|rng_state|trainer_state)\b": "what a training run "
    "keeps beside its weights; give the folder where these were saved",
    r"^adapter_config\.json$": "an adapter's settings without its weights; copy or download "
    "adapter_model.safetensors too",
}
"""files that tell what a folder without weights is -> what that is, and what to give"""
SPEAKERS = "spk_dict.pt"  # Qwen2.5-Omni's voices, without which its class does not open a folder
SIDE_PATTERNS = [
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "README.md", SPEAKERS)
]
"""of a hub's repository: what is read beside weights, of the card the licence"""
PICKLE_PATTERNS = ["pytorch_model*.bin", "adapter_model.bin"]
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf",
)  # fmt: skip
LEFT_OUT = {
    "README.md",
    "merge_report.json",
    ADAPTER_CONFIG,
    "trainer_state.json",
    "zero_to_fp32.py",
}
"""of a checkpoint's folder: what is about other weights, or their training"""
STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip

MAX_HEADER = 100_000_000  # bytes, as in safetensors

Entry = tuple[str, tuple[int, ...], torch.dtype, int]
"""of a tensor: name, shape, dtype, first byte"""
Bytes = bytes | bytearray


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file and the remedy."""

    again = True
    """On another machine, or later, files and networks may do better."""


class NotYet(CheckpointError):
    """The same command may succeed later: others are at work. A command ends with EX_TEMPFAIL."""

    exit_status = 75


def parse_hub_id(location: str, revision: str | None = None) -> tuple[str, str | None]:
    """`owner/name` or `owner/name@revision` as (id, revision); None is the hub's default branch.

    Raises `CheckpointError` for what is not a hub id, and where `revision` says otherwise.
    """
    match = HUB_ID.fullmatch(location)
    if match is None:
        raise CheckpointError(
            f"{location}: no such folder, nor a hub id (owner/name or owner/name@revision)"
        )
    if match["revision"] and revision not in (None, match["revision"]):
        raise CheckpointError(f"{location}: revision {revision!r} says otherwise; give only one")
    return match["id"], match["revision"] or revision


def weight_files(
    place: str, folder: Path, present: Collection[str], adapter: bool
) -> tuple[list[str], dict[str, str]]:
    """The weight files of a folder and the index to check them against, if it has one.

    In transformers' order: the single file, the files of the index, whatever other safetensors are
    there; then the same for pickles. An adapter's are taken only where there is none of these.
    """
    adapters = [name for _, name, _ in FORMATS.values() if name in present]
    for suffix, (single, _, index_name) in FORMATS.items():
        files, index = [single], dict[str, str]()
        if single not in present and index_name in present:
            index = read_index(folder / index_name, place)
            files = sorted(set(index.values()))
        elif single not in present:
            files = [] if adapters else sorted(n for n in present if OTHERS[suffix].fullmatch(n))
        for file in files:
            if file not in present:
                raise CheckpointError(
                    f"{place}/{file}: missing shard, named in {index_name}; download or copy it "
                    "again"
                )
        numbered = SHARD.search(files[0]) if files and not index else None
        if numbered and len(files) < int(numbered[1]):
            raise CheckpointError(
                f"{place}: {len(files)} of {int(numbered[1])} shards ({files[0]}, …), and no "
                f"{index_name}; download or copy the checkpoint again"
            )
        if files:
            return files, index
    if adapters and not adapter:
        raise CheckpointError(
            f"{place} is a PEFT adapter, where a whole model is needed; give its base model "
            f"(base_model_name_or_path in {ADAPTER_CONFIG})"
        )
    return adapters[:1] or _no_weights(place, folder, present), {}


def _no_weights(place: str, folder: Path, present: Collection[str]) -> NoReturn:
    """Raise the `CheckpointError` that says what a folder is instead, and what to give."""
    for path in sorted(folder.iterdir()):
        if path.suffix in WEIGHT_SUFFIXES and path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{place}/{path.name} is a link to {path.readlink()}, which is missing; download "
                "or copy it again"
            )
    inner = (path for pattern in ("*/*", "*/*/*") for path in folder.glob(pattern))
    names = {*present, *(path.relative_to(folder).as_posix() for path in inner)}
    below = {match[1] for match in map(WEIGHTS_BELOW.fullmatch, names) if match}
    if below:
        some = ", ".join(sorted(below, key=lambda name: (len(name), name))[:5])
        raise CheckpointError(f"{place}: no weights here, but further down; give one of: {some}")
    for pattern, text in OTHER_KINDS.items():
        if found := sorted(name for name in names if re.search(pattern, name)):
            raise CheckpointError(f"{place}: no safetensors weights, but {found[0]}: {text}")
    others = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth")))
    if not others:
        raise CheckpointError(
            f"{place}: no safetensors weights, nor any other; copy or download the model's, or "
            "give the folder that has them"
        )
    raise CheckpointError(
        f"{place}: no safetensors weights, and no other weights with a known name ({others[0]}); "
        "convert the model to safetensors with from_pretrained(...).save_pretrained(...)"
    )


def side_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint folder that are neither weights nor their index, nor `LEFT_OUT`.

    Raises `CheckpointError` for a link that leads out of the folder (and of the hub cache's
    repository it is in): a published merge must not carry whatever such a link points to.
    """
    folder = Path(folder)
    files = sorted(
        path
        for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja"))
        if (path.is_file() or path.is_symlink() and not path.exists())
        and not path.name.startswith(".")
        and (path.suffix not in WEIGHT_SUFFIXES or path.name == SPEAKERS)
        and not path.name.endswith(".index.json")
        and path.name not in LEFT_OUT
    )
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    for path in files:
        target = path.resolve()
        if not any(target.is_relative_to(own) for own in inside) or not target.is_file():
            raise CheckpointError(
                f"{path} is a link to {target}, which is outside this checkpoint or missing; put "
                "the file itself there if it belongs to the model, or remove the link"
            )
    return files


def read_index(path: Path, place: str) -> dict[str, str]:
    """Tensor name -> file name, from an index; `place` is what error messages call its folder."""
    suffix = f".{path.name.split('.')[1]}"
    weight_map = read_json(path, f"{place}/{path.name}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{place}/{path.name}: no weight_map in the index; save the checkpoint again"
        )
    for name, file in weight_map.items():
        # A name, not a resolved path, is checked: the hub's cache is made of links to elsewhere.
        if (
            not isinstance(file, str)
            or not file.endswith(suffix)
            or (PurePosixPath(file).name != file or PureWindowsPath(file).name != file)
        ):
            raise CheckpointError(
                f"{place}/{path.name}: tensor {name!r} points to {file!r}, which is not a "
                f"{suffix[1:]} file of this folder; do not trust this checkpoint"
            )
    return weight_map


def read_json(path: Path, shown: str | None = None) -> dict[str, Any]:
    """A JSON object from a file, which errors call `shown` (default: its path)."""
    shown = shown or str(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{shown} cannot be read ({error}); put it there, or give a file that can"
        ) from error
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON ({error})" if path.stat().st_size else "an empty file"
        raise CheckpointError(f"{shown}: {problem}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{shown}: a JSON object is expected; download it again")
    return content


def read_header(first: Bytes, more: Callable[[int], Bytes], size: int, shown: str) -> list[Entry]:
    """The tensors of a safetensors file, sorted by name; first bytes are counted in the file.

    first: its first eight bytes; `more(length)` gives the bytes after them. `size` is that of the
    file, `shown` what errors call it. Raises `CheckpointError`.
    """
    length = int.from_bytes(first, "little")
    content = more(length) if length <= min(MAX_HEADER, size - 8) else b""
    try:
        entries = parse_header(content, size - 8 - length)
    except CheckpointError as error:
        raise CheckpointError(f"{shown}: {error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{shown}: truncated or not a safetensors file ({error}); download or copy it again"
        ) from error
    return sorted((name, shape, dtype, 8 + length + start) for name, shape, dtype, start in entries)


def parse_header(content: Bytes, size: int) -> list[Entry]:
    """Name, shape, dtype and first byte of each tensor, of a header before `size` bytes of data.

    Raises `ValueError` for what safetensors refuses: tensors must fill the data without gap or
    overlap; `CheckpointError` for a dtype that is not supported. Source: the format's description,
    github.com/huggingface/safetensors.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    entries, end = [], 0
    try:
        header = json.loads(content, object_pairs_hook=unique)
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            name.encode()  # JSON can say half a character, safetensors refuses it
            shape, dtype, (start, stop) = entry["shape"], entry["dtype"], entry["data_offsets"]
            if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
                raise ValueError(f"{name!r}: shape {shape}, bytes {start} to {stop}")
            if math.prod(number or 1 for number in shape) >= 1 << 63:
                raise ValueError(f"{name!r}: shape {shape}")
            if dtype not in STORED_DTYPES:
                raise CheckpointError(f"{name!r}: dtype {dtype} is not supported")
            if start != end or stop - start != math.prod(shape) * STORED_DTYPES[dtype].itemsize:
                raise ValueError(
                    f"{name!r}: bytes {start} to {stop}, after {end}, for {dtype} {shape}"
                )
            entries.append((name, tuple(shape), STORED_DTYPES[dtype], start))
            end = stop
    except (AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"header: {type(error).__name__} {error}") from error
    if end != size:
        raise ValueError(f"{size} bytes of data where {end} are expected")
    return entries


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
