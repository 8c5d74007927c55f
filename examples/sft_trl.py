"""Fine-tuning with TRL's SFTTrainer:

    python examples/sft_trl.py OUT --model MODEL --data DATA.jsonl

TRL's collator for pictures would learn the image placeholders and the questions too; this project's takes its place,
with the loss on the answers alone.
"""

from pathlib import Path

import torch
import typer
from datasets import Dataset
from records import encode_record, read_records
from trl import SFTConfig, SFTTrainer

from mono_internvl import MonoInternVLForCausalLM, MonoInternVLProcessor
from mono_internvl.training.data import Collator


HERE = Path(__file__).resolve().parent


def main(
    out: Path,
    model: str = str(HERE.parent),
    data: Path = HERE / "plates.jsonl",
    steps: int = 100,
    batch_size: int = 2,
    learning_rate: float = 4e-5,
) -> None:
    """Fine-tune MODEL on DATA and save it to OUT."""
    processor = MonoInternVLProcessor.from_pretrained(model)
    collate = Collator(processor.tokenizer.pad_token_id)
    trainer = SFTTrainer(
        model=MonoInternVLForCausalLM.from_pretrained(model, dtype="float32"),
        args=SFTConfig(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            # Nothing is cut: a picture's tokens must all be there. Lower max_tiles instead.
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            # Its default precision, bf16, is for GPUs.
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=Dataset.from_list(read_records(data)),
        # Pictures are read when a batch needs them.
        data_collator=lambda records: collate([encode_record(processor, record) for record in records]),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(str(out))


if __name__ == "__main__":
    typer.run(main)
