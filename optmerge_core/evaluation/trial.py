"""A merged model opened and tried: one prompt, its logits, an answer, and the adapters it is of."""

import inspect
import re
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from optmerge_core.checkpoints import URL
from optmerge_core.checkpoints.formats import dtype_name
from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.errors import extra
from optmerge_core.evaluation import chat
from optmerge_core.merging.checks import with_preset
from optmerge_core.merging.merge_adapters import merge_adapters
from optmerge_core.merging.processor import has_tokens
from optmerge_core.merging.report import pinned
from optmerge_core.merging.spaces import check_possible
from optmerge_core.merging.templates import (
    QUESTION,
    TEXT,
    processor_class,
    prompt_fault,
    takes_pictures,
)

with extra("models"):
    import transformers
    from peft import PeftModel
    from PIL import Image, ImageDraw
    from transformers import AutoTokenizer

    from optmerge_core.evaluation.placed import placed

SIDE = 224  # pixels of the picture at most: what counts is that there is one
NEW_TOKENS = 8
ADAPTER = re.compile("adapter_model")
TOLERANCE = 4, 1e-3
"""Of the difference to the adapters: times what rounding does, and of what they change at all. Both
round the same weights, but where float32 falls on either side; iterations end 1e-4 apart."""
PROCESSOR = "take an expert's processor (processor, --processor)"


def run(check, weights, report, device, trust_remote_code=False, model_class=None):
    """Fill in a `Check` of a merged folder, opened as `weights`; report: its merge_report.json."""
    with _quiet():
        model = _opened(check, weights, device, trust_remote_code, model_class)
        if model is None:
            return
        inputs, decode = _prompt(check, weights, model, trust_remote_code)
        logits = _logits(check, model, inputs)
        if not check.logits_finite:
            check.not_checked.append("a greedy answer, for want of logits")
            return
        _answer(check, model, inputs, decode)
        kind = type(model)
        del model
        if report.get("added_tokens") is not None:  # an Omni model's
            check.not_checked.append("prompts but of text, which the specialists' processors make")
            return
        try:
            _compare(check, report, kind, inputs, logits)
        except (ValueError, OSError, RuntimeError, UserWarning) as error:
            check.not_checked.append(f"the adapters applied to the base: {_reason(error)}")


@contextmanager
def _quiet():
    """Without the remarks and progress of transformers and PEFT, which are about another use."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _opened(check, weights, device, trust_remote_code, model_class):
    """The model, ready to answer; None where it does not open, which the check then says."""
    config, options = weights.config(), {}
    name = next(iter(config.get("architectures") or ["nothing"]))
    kind = model_class or getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        own = [x for x in config.get("auto_map") or {} if x.startswith("AutoModel")]
        if not own or not trust_remote_code:
            check.not_checked.append(
                f"the model, whose class {name} is Python code in its folder, which is not run "
                "unless the recipe says trust_remote_code: true"
                if own
                else f"the model, whose class {name} is not one of transformers"
            )
            return None
        kind, options = getattr(transformers, own[0]), {"trust_remote_code": True}
    try:
        model, info = kind.from_pretrained(
            weights.folder, dtype="auto", output_loading_info=True, **options
        )
    except ImportError as error:
        check.not_checked.append(f"the model, whose class {name} needs more ({_reason(error)})")
        return None
    except Exception as error:  # of any type: the class decides
        check.failed.append(
            f"the folder does not open as {name} ({_reason(error)}), probably since config.json is "
            "not that of these weights: give the base model's whole folder"
        )
        return None
    if missing := sorted(info["missing_keys"]):
        check.failed.append(
            f"{len(missing)} parameters of {name} are in no file ({missing[0]}) and would be drawn "
            "at random, probably since the base model's folder is not complete: download it again"
        )
        return None
    check.model_class, check.dtype = type(model).__name__, dtype_name(model.dtype)
    check.device = str(device)
    return model.to(device).eval()


def _prompt(check, weights, model, trust_remote_code):
    """What the model takes, by its own chat template where it has one, and what decodes an answer.

    Without a tokenizer a few of its tokens.
    """
    folder, inputs, tokenizer = weights.folder, None, None
    if pictures := takes_pictures(weights.config(), folder):
        try:
            processor = chat.load_processor(folder, trust_remote_code)
            tokenizer = processor.tokenizer
            inputs = _with_a_picture(check, processor, model)
        except Exception as error:  # of any type: the class decides
            name = processor_class(folder) or "its processor"
            if tokenizer is None and not hasattr(transformers, name):
                check.not_checked.append(f"prompts: transformers has no {name}")
            else:
                check.failed.append(
                    f"{name} makes no prompt of a picture and a text ({_reason(error)}), probably "
                    f"since its files are not of one version: {PROCESSOR}"
                )
    if inputs is None:
        tokenizer, inputs = _text(check, folder, tokenizer, trust_remote_code, whole=not pictures)
    if inputs is None:
        rows = model.get_input_embeddings().weight.shape[0]
        inputs = {"input_ids": torch.arange(min(NEW_TOKENS, rows))[None]}
    taken = inspect.signature(model.forward).parameters
    inputs = {k: x for k, x in inputs.items() if k != "token_type_ids" or k in taken}
    ready = {
        k: x.to(model.device, model.dtype if x.is_floating_point() else None)
        for k, x in inputs.items()
        if isinstance(x, torch.Tensor)
    }
    return ready, tokenizer and partial(tokenizer.decode, skip_special_tokens=True)


def _with_a_picture(check, processor, model):
    """A red circle and the question, as the processor prepares them; None if that is empty."""
    if problem := prompt_fault(partial(chat.prompt_of, processor), pictures=True):
        check.failed.append(f"{problem}: {PROCESSOR}")
        return None
    side = min(SIDE, chat.least_side(processor))
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).ellipse([side // 4, side // 4, 3 * side // 4, 3 * side // 4], "red")
    content = [{"type": "image", "image": picture}, TEXT]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    asked = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(asked, return_tensors="pt", **options)
    names = ("image_token_id", "image_token_index")
    own = [getattr(x, name, None) for x in (processor, model.config) for name in names]
    token = next((x for x in own if x is not None), None)
    count = int((inputs["input_ids"] == token).sum()) if token is not None else 0
    if not count:
        check.failed.append(f"the prompt has none of the image's tokens ({token}): {PROCESSOR}")
        return None
    check.prompt_tokens, check.image_tokens = inputs["input_ids"].shape[1], count
    return inputs


def _text(check, folder, tokenizer, trust_remote_code, whole):
    """The tokenizer, and what it makes of the question alone, by its template if it has one.

    whole: whether that is all that the model is asked with.
    """
    if not has_tokens(folder):  # transformers would make an empty one up
        check.not_checked.append("prompts and answers in words: the folder has no tokenizer")
        return None, None
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        plain = tokenizer(QUESTION, return_tensors="pt")
        if tokenizer.chat_template is None or not whole:
            if whole:
                check.not_checked.append("prompts: the folder has no chat template")
            return tokenizer, plain
        if problem := prompt_fault(partial(chat.prompt_of, tokenizer), pictures=False):
            check.failed.append(f"{problem}: {PROCESSOR}")
            return tokenizer, plain
        text = chat.prompt_of(tokenizer, QUESTION)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        check.prompt_tokens = inputs["input_ids"].shape[1]
        return tokenizer, inputs
    except Exception as error:  # of any type: the class decides
        check.failed.append(
            f"the tokenizer does not open ({_reason(error)}), probably since its files are not of "
            f"one version: {PROCESSOR}"
        )
        return None, None


def _logits(check, model, inputs):
    """Of the prompt, (tokens, vocabulary) float32 on the CPU; None where there are none."""
    try:
        logits = getattr(model(**inputs), "logits", None)
    except Exception as error:  # of any type: the class decides
        check.failed.append(
            f"the model computes nothing of the prompt ({_reason(error)}), probably since the "
            f"processor is another model's, or its tokens are: {PROCESSOR}"
        )
        return None
    if logits is None:
        check.not_checked.append(f"logits: {check.model_class} has none")
        return None
    logits = logits[0].float().cpu()
    check.logits_finite = bool(logits.isfinite().all())
    if not check.logits_finite:
        cause = "a scaling coefficient too large: lower it"
        if check.dtype == "float16":
            cause = "float16's range: merge with dtype: bfloat16 or float32"
        check.failed.append(f"the logits of a prompt have NaN or Inf, probably by {cause}")
    return logits


def _answer(check, model, inputs, decode):
    if not model.can_generate() or decode is None:
        why = "no tokenizer writes it" if decode is None else f"{check.model_class} does not do so"
        check.not_checked.append(f"a greedy answer: {why}")
        return
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "max_length": None}
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = 0
    try:
        tokens = model.generate(**inputs, **settings)
    except Exception as error:  # of any type: the class decides
        check.failed.append(
            f"the model does not generate ({_reason(error)}), probably by generation_config.json: "
            "compare it with the base's"
        )
        return
    check.answer = decode(tokens[0, inputs["input_ids"].shape[1] :])


def _compare(check, report, kind, inputs, logits):
    """The adapters that were merged, as one adapter on the base, beside the folder's logits.

    Only where all experts are adapters. Raises `ValueError` where that has no such adapter.
    """
    experts = report.get("experts", {})
    if not experts or not all(any(map(ADAPTER.match, x["sha256"])) for x in experts.values()):
        return
    places = {name: pinned(item) for name, item in experts.items()}
    if streamed := [x for x in (*places.values(), pinned(report["base_model"])) if URL.match(x)]:
        raise ValueError(f"{streamed[0]} was streamed, and is not read again")
    method = report["method"]
    options = with_preset(method, report["method_options"], "full")
    check_possible(method, options)
    base = open_checkpoint(pinned(report["base_model"]))
    merged = {record["name"] for record in report["parameters"]}
    for name, place in places.items():
        if outside := sorted(set(open_expert(place, base).changes or ()) - merged):
            raise ValueError(f"expert {name} adapts what did not merge ({outside[0]})")
    with TemporaryDirectory() as folder:
        adapter = merge_adapters(
            places, Path(folder, "adapter"), method=method, method_options=options,
            scaling_coefficient=report["scaling_coefficient"], base_model=base.folder,
        )  # fmt: skip
        applied, plain, rounded = _applied(adapter, base.folder, kind, check.dtype, inputs)
    difference, rounding, change = (
        float((x - applied).norm() / applied.norm()) for x in (logits, rounded, plain)
    )
    check.adapter_difference, check.adapter_rounding = difference, rounding
    if not difference <= TOLERANCE[0] * rounding + TOLERANCE[1] * change:
        check.failed.append(
            f"the adapters on the base give other logits than the folder ({difference:.1e} of "
            f"their norm; rounding makes {rounding:.1e}), probably since PEFT reads their alpha, "
            "rank or modules otherwise: compare with merge_and_unload() of each"
        )


def _applied(adapter, base_folder, kind, dtype, inputs):
    """Logits on the CPU: of base and adapter, of the base, of the base with the adapter merged."""
    model = kind.from_pretrained(base_folder, dtype=getattr(torch, dtype)).eval()
    model = model.to(inputs["input_ids"].device)
    paths = placed(open_checkpoint(adapter, adapter=True), model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, adapter, **paths)

    def logits_of(model):
        return model(**inputs).logits[0].float().cpu()

    applied = logits_of(adapted)
    with adapted.disable_adapter():
        plain = logits_of(adapted)
    return applied, plain, logits_of(adapted.merge_and_unload())


def _reason(error, most=200):
    return " ".join(str(error).split())[:most] or type(error).__name__
