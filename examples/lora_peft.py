"""LoRA with PEFT and transformers' Trainer:

    python examples/lora_peft.py OUT --model MODEL --data DATA.jsonl
    python examples/lora_peft.py OUT --targets 'visual_mlp\\.(gate|up|down)_proj'      the visual experts alone

OUT holds the adapter; `PeftModel.from_pretrained(model, OUT).merge_and_unload()` is a model as before, `chat` included.
"""

from pathlib import Path

import torch
import typer
from peft import LoraConfig, get_peft_model
from records import encode_record, read_records
from transformers import Trainer, TrainingArguments

from mono_internvl import MonoInternVLForCausalLM, MonoInternVLProcessor
from mono_internvl.training.data import Collator


HERE = Path(__file__).resolve().parent


def main(
    out: Path,
    model: str = str(HERE.parent),
    data: Path = HERE / "plates.jsonl",
    # Attention and both experts of every layer; a pattern for the end of a module's name.
    targets: str = r"(self_attn|mlp|visual_mlp)\.(visual_)?(q|k|v|o|gate|up|down)_proj",
    rank: int = 16,
    steps: int = 100,
    batch_size: int = 2,
    learning_rate: float = 2e-4,
) -> None:
    """Train an adapter for MODEL on DATA and save it to OUT."""
    processor = MonoInternVLProcessor.from_pretrained(model)
    collate = Collator(processor.tokenizer.pad_token_id)
    adapted = get_peft_model(
        MonoInternVLForCausalLM.from_pretrained(model, dtype="float32"),
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=rf".*\.{targets}"),
    )
    adapted.print_trainable_parameters()
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=read_records(data),
        data_collator=lambda records: collate([encode_record(processor, record) for record in records]),
    )
    trainer.train()
    adapted.save_pretrained(str(out))


if __name__ == "__main__":
    typer.run(main)
