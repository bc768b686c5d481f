"""A conversation as text: by the tokenizer's own template (Jinja, run in its sandbox), or as plain "User:" lines.

    messages = [{"role": "system" | "user" | "assistant", "content": "..."}, ...]
"""
import json
import re
from datetime import datetime
from functools import partial

from ..errors import UserError

_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")  # a tag around what the assistant says


def render(tokenizer, messages, add_generation_prompt=True):
    """The text of a conversation; with `add_generation_prompt` it ends where the assistant's next answer begins.

    With a template it is to be encoded with special="all": what the messages say is quoted (`Tokenizer.quote`), so that
    the special tokens are those of the template, and nobody ends his turn by spelling its end.
    Raises UserError for a template that cannot be used, or that refuses the conversation."""
    if not tokenizer.chat_template:
        return _plain(messages, add_generation_prompt)
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("this model's chat template needs Jinja: pip install jinja2") from None

    def raise_exception(message):
        raise TemplateError(message)

    # what transformers offers to templates, too
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    try:
        source = _GENERATION.sub(lambda tag: tag[1] + ("endif" if tag[2] else "if true") + tag[3],
                                 tokenizer.chat_template)
        return environment.from_string(source).render(
            messages=[message | {"content": tokenizer.quote(message["content"])} for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=names.get(tokenizer.bos_id, ""), eos_token=names.get(tokenizer.eos_id, ""))
    except Exception as error:  # the template is a program that came with the model: whatever it does wrong is its own
        raise UserError(f"the model's chat template refuses this conversation: {error}") from None


def _plain(messages, add_generation_prompt):
    lines = [m["content"] if m["role"] == "system" else f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return "".join(line + "\n" for line in lines) + ("Assistant:" if add_generation_prompt else "")
