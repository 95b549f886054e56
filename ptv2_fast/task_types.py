"""The tasks: one row of a table each. What a room does for a task it looks up by a field of the row.

Nothing is imported here but the standard library: objects of higher rooms (classes, functions) go by their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

# transformers' word for what a head solves that nobody says otherwise of: one class for each row.
SINGLE_LABEL = "single_label_classification"
# The label that every loss of this package leaves out.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class TaskType:
    """One task.

    Attributes:
        name: what `task_type` says.
        gives: what the model gives: "row" (one vector for each row, which a head may read), "token" (one for each
            token, patch or frame), "span" (start and end among the tokens), "text" (the next tokens) or "states" (the
            backbone's own).
        auto_class: transformers' class that loads a base for the task.
        output_class: the class of outputs, transformers' own where it has one.
        hub_tag: the hub's pipeline_tag.
        class_suffix: how transformers' classes with a head for the task end; None where such a head is not trained.
        pipelines: transformers' pipelines that run the task's model.
        reads: the base's main input.
        has_head: whether heads of this kind are trained, copied from the base or our own.
        names_labels: whether labels are classes with names.
        in_groups: whether an example is several rows that are compared, so that inputs are (B, C, N).
        packs: whether the loss can be computed of a packed batch.
        max_length: tokens of a text in training where nobody says otherwise; None where `ptv2_fast.training` and the
            command line do not serve the task.
        predicts: what `ptv2_fast.training` makes of the model's output, by which it finds its functions.
        metric: what epochs are compared by, a key of `ptv2_fast.training.metrics.METRICS`.
    """

    name: str
    gives: str
    auto_class: str
    output_class: str
    hub_tag: str
    class_suffix: str | None = None
    pipelines: tuple[str, ...] = ()
    reads: str = "input_ids"
    has_head: bool = False
    names_labels: bool = False
    in_groups: bool = False
    packs: bool = False
    max_length: int | None = None
    predicts: str | None = None
    metric: str | None = None

    @property
    def pools_itself(self) -> bool:
        """Whether pooled states are what the model gives, with no head that pools them."""
        return self.gives == "row" and not self.has_head

    @property
    def solves_others(self) -> bool:
        """Whether heads of this kind may solve another problem than choosing one class."""
        return self.gives == "row" and self.names_labels

    def solving(self, problem_type: str) -> TaskType:
        """The row of a head that solves this problem.

        Raises:
            ValueError: no head of the task does.
        """
        if problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}; got {problem_type!r}")
        if problem_type == SINGLE_LABEL:
            return self
        if not self.solves_others:
            raise ValueError(f"problem_type must be {SINGLE_LABEL!r} for {self.name}; got {problem_type!r}")
        problem = next(problem for problem in _PROBLEMS if problem.name == problem_type)
        trained = (problem.predicts, problem.metric) if self.predicts is not None else (None, None)
        return replace(self, names_labels=problem.names_labels, predicts=trained[0], metric=trained[1])


@dataclass(frozen=True)
class ProblemType:
    """What a head over rows solves beside choosing one class; fields as those of a task that they replace."""

    name: str
    names_labels: bool
    predicts: str
    metric: str


_TASKS = (
    TaskType(
        "SEQ_CLS",
        gives="row",
        auto_class="AutoModelForSequenceClassification",
        output_class="SequenceClassifierOutput",
        hub_tag="text-classification",
        class_suffix="ForSequenceClassification",
        pipelines=("text-classification", "sentiment-analysis", "zero-shot-classification"),
        has_head=True,
        names_labels=True,
        packs=True,
        max_length=128,
        predicts="class",
        metric="accuracy",
    ),
    TaskType(
        "TOKEN_CLS",
        gives="token",
        auto_class="AutoModelForTokenClassification",
        output_class="TokenClassifierOutput",
        hub_tag="token-classification",
        class_suffix="ForTokenClassification",
        pipelines=("token-classification", "ner"),
        has_head=True,
        names_labels=True,
        packs=True,
        max_length=128,
        predicts="tags",
        metric="entity_f1",
    ),
    TaskType(
        "QUESTION_ANS",
        gives="span",
        auto_class="AutoModelForQuestionAnswering",
        output_class="QuestionAnsweringModelOutput",
        hub_tag="question-answering",
        class_suffix="ForQuestionAnswering",
        pipelines=("question-answering",),
        has_head=True,
        packs=True,
        max_length=384,
        predicts="answer",
        metric="answer_f1",
    ),
    TaskType(
        "MULTIPLE_CHOICE",
        gives="row",
        auto_class="AutoModelForMultipleChoice",
        output_class="MultipleChoiceModelOutput",
        hub_tag="multiple-choice",
        class_suffix="ForMultipleChoice",
        has_head=True,
        in_groups=True,
        packs=True,
        max_length=128,
        predicts="choice",
        metric="choice_accuracy",
    ),
    TaskType(
        "CAUSAL_LM",
        gives="text",
        auto_class="AutoModelForCausalLM",
        output_class="CausalLMOutputWithPast",
        hub_tag="text-generation",
        pipelines=("text-generation",),
        packs=True,
        max_length=512,
        predicts="text",
        metric="perplexity",
    ),
    TaskType(
        "SEQ_2_SEQ_LM",
        gives="text",
        auto_class="AutoModelForSeq2SeqLM",
        output_class="Seq2SeqLMOutput",
        hub_tag="text2text-generation",
        pipelines=("summarization", "translation", "text2text-generation"),
    ),
    TaskType(
        "FEATURE_EXTRACTION",
        gives="states",
        auto_class="AutoModel",
        output_class="BaseModelOutput",
        hub_tag="feature-extraction",
        pipelines=("feature-extraction",),
    ),
    TaskType(
        "SENTENCE_RETRIEVAL",
        gives="row",
        auto_class="AutoModel",
        output_class="SentenceEmbeddingOutput",
        hub_tag="sentence-similarity",
        in_groups=True,
        max_length=128,
        predicts="embedding",
        metric="mrr",
    ),
    TaskType(
        "IMAGE_CLS",
        gives="row",
        auto_class="AutoModelForImageClassification",
        output_class="ImageClassifierOutput",
        hub_tag="image-classification",
        class_suffix="ForImageClassification",
        pipelines=("image-classification",),
        reads="pixel_values",
        has_head=True,
        names_labels=True,
    ),
    TaskType(
        "AUDIO_CLS",
        gives="row",
        auto_class="AutoModelForAudioClassification",
        output_class="SequenceClassifierOutput",
        hub_tag="audio-classification",
        class_suffix="ForAudioClassification",
        pipelines=("audio-classification",),
        reads="input_features",
        has_head=True,
        names_labels=True,
    ),
)

TASKS: Mapping[str, TaskType] = MappingProxyType({task.name: task for task in _TASKS})
# Those that `ptv2_fast.training` and the command line serve.
TRAINED_TASKS = tuple(name for name, task in TASKS.items() if task.predicts is not None)

_PROBLEMS = (
    ProblemType("regression", names_labels=False, predicts="number", metric="pearson"),
    ProblemType("multi_label_classification", names_labels=True, predicts="labels", metric="micro_f1"),
)
PROBLEM_TYPES = (SINGLE_LABEL, *(problem.name for problem in _PROBLEMS))
