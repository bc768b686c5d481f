"""A conversation as text: by the tokenizer's own template (Jinja, run in its sandbox), or as plain "User:" lines.

    messages = [{"role": "system" | "user" | "assistant", "content": "..."}, ...]
"""
from ..errors import UserError


def render(tokenizer, messages, add_generation_prompt=True):
    """The text of a conversation; with `add_generation_prompt` it ends where the assistant's next answer begins.

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

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    try:
        return environment.from_string(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt,
            bos_token=names.get(tokenizer.bos_id, ""), eos_token=names.get(tokenizer.eos_id, ""))
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses this conversation: {error}") from None


def _plain(messages, add_generation_prompt):
    lines = [m["content"] if m["role"] == "system" else f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return "".join(line + "\n" for line in lines) + ("Assistant:" if add_generation_prompt else "")
