"""What a model is given to read, and where it stops: prompts and conversations as token ids."""
from ..errors import UserError
from ..text.templates import render
from ..training.sampling import beginning


def as_ids(tokenizer, prompt):
    """The ids of a prompt, with what the model expects before a text; an empty one begins as a text does."""
    start = [tokenizer.bos_id] if tokenizer.adds_bos else []
    return start + tokenizer.encode(prompt) or beginning(tokenizer)


def ends(tokenizer):
    """The ids after which a model has nothing more to say."""
    return tuple({token for token in (tokenizer.eos_id, tokenizer.eot_id) if token is not None})


def conversation_ids(tokenizer, messages):
    """The ids of a conversation, up to where the assistant's next answer begins.

    messages: a list of {"role", "content"}; what they say is text, even where it spells a special token. Raises
    UserError for a template that cannot be used."""
    if tokenizer.chat_template:
        return tokenizer.encode(render(tokenizer, messages), special="all")
    if not _knows_names(tokenizer):
        return as_ids(tokenizer, "".join(m["content"] + "\n" for m in messages))
    return as_ids(tokenizer, render(tokenizer, messages))


def dialogue_stops(tokenizer):
    """The texts that end an answer where the conversation is written as a dialogue; none where there is a template."""
    if tokenizer.chat_template:
        return ()
    return ("\nUser:", "\nAssistant:") if _knows_names(tokenizer) else ("\n",)


def _knows_names(tokenizer):
    try:
        return bool(tokenizer.encode("User: \nAssistant:"))
    except UserError:
        return False
