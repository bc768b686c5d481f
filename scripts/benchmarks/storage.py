"""What storing weights in fewer bits costs in perplexity: one model, one text, each way of storing."""
import math
import sys
import time

from .runner import ROOT, WrongInput, print_table, progress

WINDOW = 512  # tokens that the model sees at a time, or its block_size


def report(options):
    """Measure and print; the results as (rows, {})."""
    sys.path.insert(0, str(ROOT))  # this process measures itself
    from gpt.errors import UserError
    from gpt.model.storage import STORAGE

    if options.model is None or options.text is None:
        raise WrongInput("storage needs --model, a run, Hugging Face folder or .gguf file, and --text, a file")
    rows = []
    for dtype in STORAGE:
        progress(f"{options.model} stored as {dtype}")
        try:
            rows.append(_measure(options, dtype))
        except (UserError, OSError, UnicodeDecodeError) as error:
            raise WrongInput(f"storage: {error}") from None
        rows[-1]["perplexity_vs_float32"] = rows[-1]["perplexity"] / rows[0]["perplexity"]
    print_table([f"{rows[0]['tokens']} tokens", "MB", "loss", "perplexity", "change"],
                [[row["dtype"], row["weights_mb"], f"{row['loss']:.4f}", f"{row['perplexity']:.4f}",
                  f"{100 * (row['perplexity_vs_float32'] - 1):+.2f} %"] for row in rows])
    return rows, {}


def _measure(options, dtype):
    """The figures of one way of storing, on the last tenth of the text: what training with our defaults leaves out."""
    import tensorgrad as tg
    from gpt.interop import load_with_tokenizer

    model, tokenizer, _ = load_with_tokenizer(options.model, dtype=dtype)
    text = options.text.read_text(encoding="utf-8")
    ids = [int(i) for i in tokenizer.encode(text[len(text) * 9 // 10:])][:options.tokens + 1]
    window, nats, count, started = min(WINDOW, model.config.block_size), 0.0, 0, time.perf_counter()
    with tg.no_grad():
        for start in range(0, len(ids) - 1, window):
            part = ids[start:start + window + 1]
            if len(part) > 1:
                _, loss = model(tg.tensor([part[:-1]]), tg.tensor([part[1:]]))
                nats += loss.item() * (len(part) - 1)
                count += len(part) - 1
    if not count:
        raise WrongInput(f"storage: {options.text} has too little text")
    size = sum(p.array.nbytes + (0 if getattr(p, "scale", None) is None else p.scale.nbytes)
               for p in model.parameters())
    return {"dtype": dtype, "tokens": count, "weights_mb": size / 1e6, "loss": nats / count,
            "perplexity": math.exp(nats / count), "seconds": time.perf_counter() - started}
