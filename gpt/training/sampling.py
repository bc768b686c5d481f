"""Text from a model: prompt to ids, ids to text."""
import tensorgrad as tg


def write_text(model, tokenizer, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=None):
    """`prompt` and its continuation by up to `max_new_tokens` tokens, as text. `temperature`, `top_p` as for
    `GPT.generate`; a `top_k` of 0 is no limit. An empty prompt starts from the end-of-text token, or a newline.
    Leaves the model in the mode it was in. Raises UserError for characters that the tokenizer does not know."""
    start = tokenizer.encode(prompt) or ([tokenizer.eot_id] if tokenizer.eot_id is not None else tokenizer.encode("\n"))
    idx = tg.tensor([start], device=next(model.parameters()).device)  # (1, T)
    was_training = model.training
    model.eval()
    try:
        ids = model.generate(idx, max_new_tokens, temperature=temperature, top_k=top_k or None, top_p=top_p)  # (1, T + new)
    finally:
        model.train(was_training)
    known = [i for i in ids[0].tolist() if i < tokenizer.vocab_size]  # a padded vocabulary has ids that mean nothing
    return tokenizer.decode(known)
