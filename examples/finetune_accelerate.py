"""A plain accelerate loop, for one process or sharded over many by the configuration it is launched with:

    accelerate launch --config_file training/configs/fsdp2.yaml examples/finetune_accelerate.py OUT --model MODEL
    accelerate launch --config_file training/configs/deepspeed.yaml examples/finetune_accelerate.py OUT --model MODEL

A rank whose batch holds no picture takes part all the same: the model embeds zero tiles in training, so that all ranks
reduce the same gradients.
"""

from pathlib import Path

import torch
import typer
from accelerate import Accelerator
from records import encode_record, read_records
from torch.utils.data import DataLoader

from mono_internvl import MonoInternVLForCausalLM, MonoInternVLProcessor
from mono_internvl.training.data import Collator


HERE = Path(__file__).resolve().parent


def main(
    out: Path,
    model: str = str(HERE.parent),
    data: Path = HERE / "plates.jsonl",
    epochs: int = 20,
    batch_size: int = 1,
    learning_rate: float = 4e-5,
) -> None:
    """Fine-tune MODEL on DATA and save it to OUT; BATCH_SIZE is that of one process."""
    accelerator = Accelerator()
    processor = MonoInternVLProcessor.from_pretrained(model)
    collate = Collator(processor.tokenizer.pad_token_id)
    loader = DataLoader(
        read_records(data),  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=True,
        collate_fn=lambda records: collate([encode_record(processor, record) for record in records]),
    )
    loaded = MonoInternVLForCausalLM.from_pretrained(model, dtype="float32")
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=learning_rate, weight_decay=0.01)
    loaded, optimizer, loader = accelerator.prepare(loaded.train(), optimizer, loader)
    for epoch in range(epochs):
        total = torch.zeros((), device=accelerator.device)
        for batch in loader:
            loss = loaded(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(loaded.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() / len(loader)
        mean = accelerator.reduce(total, "mean")
        accelerator.print(f"epoch {epoch + 1}: loss {mean:.4f}")
    # All ranks take part: the shards are gathered.
    state = accelerator.get_state_dict(loaded)
    if accelerator.is_main_process:
        accelerator.unwrap_model(loaded).save_pretrained(out, state_dict=state)
        processor.save_pretrained(out)
    accelerator.end_training()


if __name__ == "__main__":
    typer.run(main)
