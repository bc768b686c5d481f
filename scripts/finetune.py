"""Fine-tune a model on text or examples of one's own: a LoRA adapter, or all weights with --lora_r 0.

    python scripts/finetune.py --init_from model.gguf --data conversations.jsonl       # chat, prompts or texts by line
    python scripts/finetune.py --init_from SmolLM2-135M-Instruct --data my_book.txt --lora_merge
    python scripts/finetune.py --init_from out --data other.txt --lora_r 0 --out_dir out-other
    python scripts/sample.py --init_from out-finetune --prompt "..." --chat

A .jsonl file has on each line {"text"}, {"prompt", "completion"} (the prompt is read, not learned) or {"messages"}
(put into the model's own chat template; the assistant's parts are learned). docs/finetuning.md says more,
configs/finetune.toml has the defaults. `--help` lists every field. Exit codes: 0 done, 1 a fault of ours, 2 wrong
input, 130 interrupted (and saved).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from gpt.cli import finetune  # noqa: E402

if __name__ == "__main__":
    sys.exit(finetune())
