"""trl's SFTTrainer for wrapped models: its data, collators and configuration, with the wrapped model's own loss."""

from __future__ import annotations

from typing import Any

import trl
from transformers import Trainer

from ptv2_fast.training.batches import PredictableLabels


class SFTTrainer(trl.SFTTrainer):
    """`trl.SFTTrainer`, but the loss comes from the model's forward.

    trl computes the loss in a forward of its own, for every token and in tiles. A wrapped model's forward computes the
    same loss of labelled rows alone (`StepOptions.labelled_rows_loss`), without the labels of tokens that follow
    padding in front, which are not counted either. trl's token accuracy and entropy are not logged.

    Example:
        ```python
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        from trl import SFTConfig

        from ptv2_fast import PTuningV2Config, get_ptv2_model
        from ptv2_fast.training.sft import SFTTrainer

        words = ["[PAD]", "[UNK]", "[END]", "good", "morning"]
        splits = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        splits.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=splits, pad_token="[PAD]", eos_token="[END]")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        model = get_ptv2_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100)), PTuningV2Config("CAUSAL_LM"))
        args = SFTConfig("run", max_steps=1, bf16=False, gradient_checkpointing=False, report_to=[])
        rows = Dataset.from_list([{"text": "good morning"}] * 4)
        SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
        ```
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator = PredictableLabels(self.data_collator)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch, and the outputs where asked for."""
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Loss, logits and labels of one batch of evaluation."""
        return Trainer.prediction_step(self, *args, **kwargs)
