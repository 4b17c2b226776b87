"""A merged model opened and tried: one prompt, its logits, an answer, and the adapters it is of."""

import inspect
import warnings
from contextlib import contextmanager
from functools import partial

import torch
from tqdm.auto import tqdm

from optmerge_core.checkpoints.formats import dtype_name
from optmerge_core.errors import extra
from optmerge_core.evaluation import chat
from optmerge_core.evaluation.compared import compare, language_part
from optmerge_core.merging.processor import has_tokens
from optmerge_core.merging.templates import (
    QUESTION,
    TEXT,
    processor_class,
    prompt_fault,
    takes_pictures,
)

with extra("models"):
    import transformers
    from PIL import Image, ImageDraw
    from transformers import AutoTokenizer

REMOTE = "transformers_modules."  # of classes that are Python code of a folder
SIDE = 224  # pixels of the picture at most: what counts is that there is one
NEW_TOKENS = 8
PROCESSOR = "take an expert's processor (processor, --processor)"


def run(check, weights, report, device, trust_remote_code=False, model_class=None):
    """Fill in a `Check` of a merged folder, opened as `weights`; report: its merge_report.json."""
    with _quiet(), tqdm(total=4, desc="checking", unit="step", leave=False) as progress:
        progress.set_postfix_str("opening the merged model")
        whole = _opened(check, weights, device, trust_remote_code, model_class)
        if whole is None:
            return
        _advance(progress, "asking it")
        kind, model = type(whole), language_part(whole)
        inputs, decode = _prompt(check, weights, model, trust_remote_code)
        logits = _logits(check, model, inputs)
        if not check.logits_finite:
            check.not_checked.append("a greedy answer, for want of logits")
            return
        _advance(progress, "answering")
        _answer(check, model, inputs, decode)
        del whole, model
        _advance(progress, "comparing it with the adapters it is of")
        if report.get("added_tokens") is not None:  # an Omni model's
            check.not_checked.append("prompts but of text, which the specialists' processors make")
            return
        try:
            compare(check, report, kind, inputs, logits)
        except (ValueError, OSError, RuntimeError, UserWarning) as error:
            check.not_checked.append(f"the adapters applied to the base: {_reason(error)}")


def _advance(progress, now):
    progress.update()
    progress.set_postfix_str(now)


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
    plain, info = transformers.PreTrainedModel, {"missing_keys": []}
    # Qwen2.5-Omni's own from_pretrained cannot tell what is missing.
    tells = not issubclass(kind, plain) or (
        kind.from_pretrained.__func__ is plain.from_pretrained.__func__
    )
    try:
        options |= {"output_loading_info": True} if tells else {}
        model = kind.from_pretrained(weights.folder, dtype="auto", **options)
        model, info = model if tells else (model, info)
    except ImportError as error:
        check.not_checked.append(f"the model, whose class {name} needs more ({_reason(error)})")
        return None
    except Exception as error:  # of any type: the class decides
        cause = (
            "its Python code is for another version of transformers than "
            f"{transformers.__version__}: open it with the one that its card names"
            if "trust_remote_code" in options
            else "config.json is not that of these weights: give the base model's whole folder"
        )
        check.failed.append(
            f"the folder does not open as {name} ({_reason(error)}), probably since {cause}"
        )
        return None
    if not tells:
        check.not_checked.append(f"whether parameters are missing, which {name} does not tell")
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
    folder, config, inputs, tokenizer = weights.folder, weights.config(), None, None
    if config.get("thinker_config") or config.get("audio_config"):
        unasked = "pictures and sound" if "thinker_config" in config else "sound"
        check.not_checked.append(f"prompts of {unasked}")
    if pictures := takes_pictures(config, folder):
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
        if type(model).__module__.startswith(REMOTE):
            check.not_checked.append(
                f"logits: {check.model_class}, the folder's own code, takes more than a prompt "
                f"({_reason(error)})"
            )
            return None
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


def _reason(error, most=200):
    return " ".join(str(error).split())[:most] or type(error).__name__
