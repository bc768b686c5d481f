"""Text from a model: prompt to ids, ids to text."""
import tensorgrad as tg

from ..errors import UserError


def write_text(model, tokenizer, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=None):
    """`prompt` and its continuation by `max_new_tokens` tokens, as text.

    `temperature` and `top_p` are those of `GPT.generate`; a `top_k` of 0 is no limit. Without a prompt the model starts
    as at the beginning of a text. Raises UserError for characters that the tokenizer does not know. Leaves the model in
    the mode it was in.
    """
    start = tokenizer.encode(prompt) or beginning(tokenizer)
    idx = tg.tensor([start], device=next(model.parameters()).device)  # (1, T)
    was_training = model.training
    model.eval()
    try:
        ids = model.generate(idx, max_new_tokens, temperature=temperature, top_k=top_k or None, top_p=top_p)
    finally:
        model.train(was_training)
    shown = ids[0].tolist()[0 if prompt else len(start):]
    return tokenizer.decode([i for i in shown if i < tokenizer.vocab_size])  # a padded vocabulary has ids without text


def beginning(tokenizer):
    """What stands before the first token of a text: the end of the text before it, or a new line."""
    if tokenizer.eot_id is not None:
        return [tokenizer.eot_id]
    try:
        return tokenizer.encode("\n")
    except UserError:  # a character vocabulary without line ends
        return [0]
