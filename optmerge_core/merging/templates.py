"""Chat templates as transformers reads them, and whether they make a prompt of a question."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

QUESTION = "What colour is the circle?"
"""The fixed question that a chat template has to render."""
PICTURE = {"type": "image", "image": "circle.png"}
TEXT = {"type": "text", "text": QUESTION}
JSON_FILES = ("chat_template.json", "tokenizer_config.json")


def chat_template(folder: Path) -> Any:
    """A folder's template, or its several as transformers keeps them; None where there is none."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        for name in JSON_FILES:
            if (template := json_of(folder / name).get("chat_template")) is not None:
                return template.strip() if isinstance(template, str) else template
    return None


def default_template(template: Any) -> str | None:
    """The one of several that a prompt is made by unless another is named."""
    if isinstance(template, list):
        pairs = [x for x in template if isinstance(x, dict)]
        template = {x.get("name"): x.get("template") for x in pairs}
    if isinstance(template, dict):
        template = template.get("default")
    return template.strip() if isinstance(template, str) else None


def processor_class(folder: Path) -> str | None:
    """The saved processor's class, "" where not told, None if there is an image processor alone."""
    names = [json_of(folder / f"{x}_config.json") for x in ("processor", "preprocessor")]
    told = next((x["processor_class"] for x in names if "processor_class" in x), None)
    if isinstance(told, str):
        return told
    return "" if (folder / "processor_config.json").is_file() else None


def fault(folder: Path, template: Any, pictures: bool) -> str | None:
    """What is wrong with the prompts of a template (see `prompt_fault`), rendered by Jinja alone.

    `folder` has the special tokens that the template may write. None for none.
    """
    text = default_template(template)
    if text is None:
        return "there is no chat template" + " of the name default" * (template is not None)
    tokens = json_of(folder / "special_tokens_map.json") | json_of(folder / "tokenizer_config.json")
    special = {
        key: token.get("content") if isinstance(token, dict) else token
        for key, token in tokens.items()
        if key.endswith("_token")
    }

    def render(content: Any) -> str:
        messages = [{"role": "user", "content": content}]
        variables = {"messages": messages, "add_generation_prompt": True}
        return str(environment().from_string(text).render(special | variables))

    return prompt_fault(render, pictures)


def prompt_fault(render: Callable[[Any], str], pictures: bool) -> str | None:
    """Why a prompt is empty: without the user's text, or without a place for the picture.

    `render`: the content of a user's message -> the prompt. With `pictures` the content is a
    picture and a text, as `evaluation.chat` asks; else a text.
    """
    try:
        if not pictures:
            prompts = [render(QUESTION)]
            if QUESTION not in prompts[0]:
                prompts = [render([TEXT])]
        else:
            prompts = [render([PICTURE, TEXT]), render([TEXT])]
    except Exception as error:  # of any type: a template is a program
        asked = "a picture and a text" if pictures else "a text"
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"the chat template does not render {asked} ({reason})"
    if QUESTION not in prompts[0]:
        return "the chat template makes empty prompts, which leave out the user's text"
    if pictures and (prompts[0] == prompts[1] or str(PICTURE)[1:-1] in prompts[0]):
        return "the chat template makes prompts without the image's tokens"
    return None


def environment() -> Any:
    """Jinja as transformers sets it up for templates, which are not to be trusted: a sandbox."""
    from jinja2 import TemplateError, nodes  # slow, and a merge's end needs it anyway
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what training learns; a prompt has its content."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False} | options)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": refuse, "strftime_now": datetime.now().strftime}
    return made


def json_of(path: Path) -> dict[str, Any]:
    """A file's mapping; an empty one for any other content, which no merge hangs on."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def takes_pictures(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether a model is asked with pictures, by a processor that puts them into prompts."""
    return "vision_config" in config and processor_class(folder) is not None
