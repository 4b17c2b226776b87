"""The same parameter under another name: on disk, in memory, in another version of transformers.

Two ideas: names differ in the words for the whole model and its halves (`bare`), and what follows a
layer's number never differs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

HALVES = {"model", "language_model", "text_model", "vision_model", "thinker"}
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""of torch.compile, FSDP, activation checkpointing and Lightning, anywhere in a name"""
PREFIX = "base_model.model."  # what PEFT puts before a module's path
TOWER = re.compile(
    r"vision|visual|(?:^|[._])(?:vit|[va]pm\.)|image|img|clip|siglip|dino|audio|speech|video"
    r"|projector|connector"
    r"|merger|mlp1|resampler|qformer|perceiver|abstractor"
    r"|talker|token2wav|code2wav",
    re.IGNORECASE,
)
"""a word of what feeds a language model, a tower of another modality or its connector, or of what
speaks for it (Qwen-Omni's)"""
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""in a language model's own checkpoint"""
MIXTURES = {
    ".block_sparse_moe.": ".mlp.",  # Mixtral, MiniMax, GraniteMoe
    **{".input_linear.weight": ".experts.gate_up_proj", ".router.layer.": ".router."},
    **{".output_linear.weight": ".experts.down_proj", ".gate.moe_statics.": ".moe_statics."},
    **{".experts.fc1.weight": ".experts.gate_up_proj", ".experts.fc2.weight": ".experts.down_proj"},
    "backbone.": "",  # NemotronH
}
"""words of a mixture's published files -> transformers 5's in memory, or what stands for either"""

_STACK = re.compile(
    r"(?:^|\.)(?:experts|moe)\."
    r"(?:gate_up_proj|(?:gate|up|down)_proj|w[123]|(?:w13|w2)_weight|(?:gate_and_up|down)_projs)"
    r"(?:\.weight)?$"
)
_BLOCK = re.compile(r"(.+?)\.experts\.|(.+?\.moe)\.")
_ROUTER = re.compile(r"(.+)\.(?:gate|router)\..+")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks|h)(\.(?P<number>\d+)\..+)")
_LANGUAGE = re.compile(r"layers\.\d+\..+|embed_tokens\.weight|norm\.weight")
_EMBEDDINGS = re.compile(r"(?:embed_tokens|tok_embeddings|wte)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|language_model\.output)\.weight$")


def bare(name: str) -> str:
    """A name without the words for the whole model and its halves.

    Versions of transformers write `language_model.model.layers.0…`,
    `model.language_model.layers.0…` or `model.layers.0…` for the same module.
    """
    return ".".join(word for word in name.split(".") if word not in HALVES)


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """A whole model's names -> the same without what training puts around it or its modules."""
    found = {n: ".".join(word for word in n.split(".") if word not in WRAPPERS) for n in names}

    def without(prefix: str) -> bool:
        return bool(found) and all(name.startswith(prefix) for name in found.values())

    while without("module."):  # DistributedDataParallel, DeepSpeed
        found = {own: name.removeprefix("module.") for own, name in found.items()}
    if without(PREFIX):
        plain = (name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in found.values())
        found = dict(zip(found, plain, strict=True))
    return found


def any_words(name: str) -> str:
    """A bare name, with one of the two words that `MIXTURES` has for a thing."""
    name = bare(name)
    for word, other in MIXTURES.items():
        name = name.replace(word, other)
    return name


def is_stack(name: str, shape: Collection[int]) -> bool:
    """Whether a tensor holds a matrix of each expert of a mixture: (experts, rows, columns)."""
    return len(shape) == 3 and 0 not in shape and _STACK.search(any_words(name)) is not None


def routers(names: Collection[str]) -> set[str]:
    """The parameters of a mixture's routers: of a module `gate` or `router` beside its experts."""
    words = {name: any_words(name) for name in names}
    blocks = {found[1] or found[2] for word in words.values() if (found := _BLOCK.match(word))}
    parts = {name: _ROUTER.fullmatch(word) for name, word in words.items()}
    return {name for name, match in parts.items() if match and match[1] in blocks}


def other_names(ours: Collection[str], theirs: Collection[str]) -> dict[str, str]:
    """Our name -> their name, for the parameters that only another naming keeps apart.

    Names that both have stay; the others are the same if their bare names are equal, and no third
    name's is; of mixtures of experts, `any_words` of either.
    """

    def unique(names: Collection[str], but: Collection[str]) -> dict[str, str]:
        keys = {name: any_words(name) for name in names}
        times = Counter(keys.values())
        return {key: name for name, key in keys.items() if times[key] == 1 and name not in but}

    mine, others = unique(ours, theirs), unique(theirs, ours)
    return {name: others[same] for same, name in mine.items() if same in others}


def closest_names(name: str, candidates: Iterable[str]) -> list[str]:
    """Those of the candidates that may be the same parameter, whatever model they are part of.

    They end alike, from the layer's number on or else in the last two bare words, and have the
    fewest words that only one of the two names has. A tower's name stands for a tower's alone, and
    one that is nothing but a layer, as in a language model by itself, for a language model's.
    """
    layer, tower = _LAYER.search(name), bool(TOWER.search(name))
    end = layer[1] if layer else "." + ".".join(bare(name).split(".")[-2:])
    found = [x for x in candidates if f".{x}".endswith(end)]
    if tower or _LANGUAGE.fullmatch(bare(name)):
        found = [x for x in found if bool(TOWER.search(x)) == tower]
    words = {*name.split(".")}
    odd = {x: len(words ^ {*x.split(".")}) for x in found}
    return [x for x, count in odd.items() if count == min(odd.values())]


def language_name(name: str) -> str | None:
    """A parameter's name in the language model's own checkpoint; None for a tower's."""
    own = bare(name)
    if own == HEAD:
        return HEAD
    return f"model.{own}" if _LANGUAGE.fullmatch(own) and not TOWER.search(name) else None


def is_embeddings(name: str) -> bool:
    """Whether a parameter is the language model's token embeddings, by its name."""
    return _EMBEDDINGS.search(name) is not None


def is_head(name: str) -> bool:
    """Whether a parameter is the language model's head, by its name."""
    return _HEAD.search(name) is not None


def layer_index(name: str) -> int | None:
    """Number of the layer a parameter is in: 3 for `model.layers.3.mlp.up_proj.weight`."""
    match = _LAYER.search(name)
    return int(match["number"]) if match else None


def module_kind(name: str) -> str:
    """The module's own name: `up_proj` for `model.layers.3.mlp.up_proj.weight`."""
    return re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[2]
