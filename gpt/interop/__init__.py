"""Models of others, and ours for others.

    model, tokenizer_path, config = load("openai-community/gpt2")     # or a folder, a run, a .gguf file, an .npz file
    export_hf(model, "folder", tokenizer)                             # transformers opens it
    export_gguf(model, "model.gguf", tokenizer)                       # llama.cpp runs it

load.py finds out what is given. hugging_face.py, gguf.py, peft.py and reference0.py are the formats, safetensors.py and
gguf_file.py read the files, architectures.py and names.py know what published models are and how their tensors are
called, exporting.py what all exports share, convert.py goes from any to any.
"""
from .gguf import export_gguf, load_gguf
from .hugging_face import export_hf, load_hf
from .load import load, load_with_tokenizer, shape_of, tokenizer_of
from .reference0 import load_reference0

__all__ = ["export_gguf", "export_hf", "load", "load_gguf", "load_hf", "load_reference0", "load_with_tokenizer",
           "shape_of", "tokenizer_of"]
