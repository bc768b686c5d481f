"""Convert a model between the formats.

    python scripts/convert.py out exported                         # a run -> a folder for Hugging Face's transformers
    python scripts/convert.py out model.gguf --dtype float16       # a run -> a file for llama.cpp
    python scripts/convert.py SmolLM2.gguf out/smollm --to run     # anything -> a run folder of ours
    python scripts/convert.py my_model.npz out/zero --to run --lora lora_weights.npz    # reference system 0's weights
    python scripts/convert.py out-finetune tuned.gguf                      # an adapter's run: merged
    python scripts/convert.py model.gguf tuned --lora out-finetune/peft    # a PEFT folder, merged into any model

The source is a run folder, a Hugging Face folder or name on its hub, a PEFT folder, a .gguf or an .npz file.
Cost: seconds; memory for the weights twice in float32. `--help` lists every field. Exit codes: 0 done, 1 a fault of
ours, 2 wrong input, 130 interrupted.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from gpt.cli import convert_model  # noqa: E402

if __name__ == "__main__":
    sys.exit(convert_model())
