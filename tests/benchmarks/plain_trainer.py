"""What a user would write in place of `hfbatch finetune`: transformers' Trainer on texts with labels, from Parquet.

Prints one JSON line: `rows` seen and `train_s`, the time of the steps alone.

    python -m tests.benchmarks.plain_trainer MODEL TRAIN.parquet bfloat16 32 1 out/
"""

from __future__ import annotations

import json
import sys
from typing import Any

MOST_TOKENS = 256


def main() -> None:
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    model, source, dtype, size, epochs, out = sys.argv[1:]
    rows: Any = load_dataset("parquet", data_files=source, split="train")
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = rows.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=MOST_TOKENS), batched=True
    ).select_columns(["input_ids", "attention_mask", "token_type_ids", "label"])
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=max(rows["label"]) + 1, dtype="float32"
        ),
        args=TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=int(size),
            num_train_epochs=float(epochs),
            use_cpu=True,
            bf16=dtype == "bfloat16",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    done = trainer.train()
    print(
        json.dumps({"rows": len(rows) * float(epochs), "train_s": done.metrics["train_runtime"]}), flush=True
    )


if __name__ == "__main__":
    main()
