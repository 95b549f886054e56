"""Supervised fine-tuning of a frozen chat model by prompts, then generation with what was saved.

    python examples/sft_causal_lm.py --data chat.jsonl --output sft-prompt --ask "Who are you?"

Each line of the data is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ptv2_fast import PTuningV2Config, PTuningV2Model, get_ptv2_model


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="with a chat template")
    parser.add_argument("--data", type=Path, default=Path("chat.jsonl"), help="one conversation a line")
    parser.add_argument("--output", type=Path, default=Path("sft-prompt"), help="folder for the trained prompt")
    parser.add_argument("--ask", help="what to ask the trained model (default: the first question of the data)")
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch-size", type=int, default=8)
    return parser.parse_args()


def encode(messages: list[dict], tokenizer, max_length: int = 1024) -> dict[str, list[int]]:
    """The conversation's tokens; only those of its last message, the reply, are learned."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("the chat template must put the reply behind the prompt and leave the prompt as it is")
    given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    # What does not fit is cut at the conversation's beginning.
    return {"input_ids": (given + reply)[-max_length:], "labels": ([-100] * len(given) + reply)[-max_length:]}


def main() -> None:
    options = options_of()
    set_seed(0)
    lines = options.data.read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line)["messages"] for line in lines if line.strip()]

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    config = PTuningV2Config("CAUSAL_LM", options.num_virtual_tokens, injection="prefix")
    replies = [messages[-1]["content"] for messages in conversations[: options.num_virtual_tokens]]
    model = get_ptv2_model(base, config, tokenizer=tokenizer, init_text=replies)
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        per_device_train_batch_size=options.batch_size,
        save_strategy="no",
        logging_strategy="epoch",
        logging_first_step=True,
        report_to=[],
    )
    rows = [encode(messages, tokenizer) for messages in conversations]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.train()
    model.save_pretrained(options.output)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} in the last epoch")

    # Another program needs the base and the saved folder only.
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device)
    model = PTuningV2Model.from_pretrained(base, options.output)
    question = [{"role": "user", "content": options.ask}] if options.ask else conversations[0][:-1]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(device)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    print("reply:", tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
