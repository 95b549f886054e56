"""Images: deep prompts (VPT-deep) on a frozen ViT beside a head without any, on scikit-learn's digits.

    python examples/vit_prompts.py --output digits-prompt

Without --model a tiny ViT first learns which of the digits 0 to 4 it sees and how it is turned; the task is 5 to 9.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTModel, set_seed

from ptv2_fast import PTuningV2Config, get_ptv2_model

TINY = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a ViT, by its hub name or folder; without one a tiny ViT is trained first")
    parser.add_argument("--output", type=Path, default=Path("digits-prompt"), help="folder for the trained prompt")
    parser.add_argument("--num-virtual-tokens", type=int, default=8)
    parser.add_argument("--first-epochs", type=int, default=3, help="of the tiny ViT")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01, 0.05, 0.2], help="rates to choose from on dev")
    parser.add_argument("--batch-size", type=int, default=32)
    return parser.parse_args()


def digits(config: ViTConfig) -> list[dict]:
    """Shuffled rows of an image of the model's size, between -1 and 1, and its digit."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float)[:, None] / 8 - 1
    images = interpolate(images, config.image_size).expand(-1, config.num_channels, -1, -1)
    return [{"pixel_values": images[i], "labels": int(data.target[i])} for i in torch.randperm(len(images))]


def turned(row: dict) -> list[dict]:
    """The eight ways to turn and mirror an image, each a class of its own."""
    sides = (row["pixel_values"], row["pixel_values"].flip(2))
    images = [torch.rot90(side, quarter, (1, 2)) for side in sides for quarter in range(4)]
    return [{"pixel_values": image, "labels": 8 * row["labels"] + k} for k, image in enumerate(images)]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trained(model, lr: float, epochs: int, rows: list[dict], options: argparse.Namespace) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        num_train_epochs=epochs,
        learning_rate=lr,
        per_device_train_batch_size=options.batch_size,
        save_strategy="no",
        report_to=[],
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, compute_metrics=accuracy)
    trainer.train()
    return trainer


def main() -> None:
    options = options_of()
    set_seed(0)

    config = ViTConfig(**TINY, image_size=8, patch_size=2, num_channels=1, num_labels=40)
    backbone = ViTModel.from_pretrained(options.model, add_pooling_layer=False) if options.model else None
    rows = digits(backbone.config if backbone else config)
    if backbone is None:
        first = [row for each in rows if each["labels"] < 5 for row in turned(each)]
        backbone = trained(ViTForImageClassification(config), 2e-3, options.first_epochs, first, options).model.vit

    later = [{**row, "labels": row["labels"] - 5} for row in rows if row["labels"] >= 5]
    dev, test, train = later[:150], later[150:400], later[400:]
    backbone.config.num_labels = 5
    base = ViTForImageClassification(backbone.config)
    base.vit = backbone.requires_grad_(False)
    config = PTuningV2Config("IMAGE_CLS", options.num_virtual_tokens, injection="deep")
    for name, made in {"head": lambda model: model, "prompts": lambda model: get_ptv2_model(model, config)}.items():
        runs = [trained(made(copy.deepcopy(base)), lr, options.epochs, train, options) for lr in options.lr]
        scores = [run.evaluate(dev)["eval_accuracy"] for run in runs]
        best = runs[scores.index(max(scores))]
        print(f"{name}: dev accuracy {max(scores):.4f}, test accuracy {best.evaluate(test)['eval_accuracy']:.4f}")
    best.model.print_trainable_parameters()
    best.model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
