"""For worker scripts: a tiny LLaMA in Hugging Face's Trainer, and the LRs that its updates used and its log shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import USED_LRS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

VOCABULARY, SAVED = 16, 4


def make_model() -> LlamaForCausalLM:
    """Return a LLaMA of about a thousand parameters."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes))


def train(
    model: PreTrainedModel | Callable[[], PreTrainedModel],
    folder: Path,
    steps: int,
    resume: Path | None,
    optimizers: tuple[Any, Any] = (None, None),
    **settings: Any,
) -> dict[str, Any]:
    """Train up to a step, saving at step 4; ``model`` may be a function where arguments must be made first (ZeRO 3)."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_steps=SAVED,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(VOCABULARY, (64, 8))]
    network = model if isinstance(model, PreTrainedModel) else model()
    trainer = Trainer(model=network, args=arguments, train_dataset=rows, optimizers=optimizers)  # type: ignore[arg-type]
    USED_LRS.clear()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    logged = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    return {"used": list(USED_LRS), "logged": list(logged.values())}
