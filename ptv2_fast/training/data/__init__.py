"""Data: examples of the tasks from files, folders and data sets, checked one by one.

It goes one way: a place (`formats`) has rows, a task's columns are chosen among theirs (`columns`), and rows become
examples, plain dicts of plain values:

    SEQ_CLS       {"text", "text_pair" (pairs only), "label"}; for regression "label" is a float, for several labels a
                  row there is "labels", a list
    TOKEN_CLS     {"tokens", "tags"}                        tags are IOB2 (O, B-x, I-x), or classes
    QUESTION_ANS  {"id", "question", "context", "answers": {"text": [...], "answer_start": [...]}}
    MULTIPLE_CHOICE {"text", "choices": [...], "label"}     the label is an index; COPA's own fields are read too
    SENTENCE_RETRIEVAL {"query", "positive", "negative" (if the file has them)}; {"text"} without labels
    CAUSAL_LM     {"text"}, {"prompt", "completion"}, or {"messages": [{"role", "content"}, ...]}; the two of the second
                  may be lists of messages too

Nothing is dropped on the way: a record that cannot be used is an error that names file and line, and what is left out,
guessed or rewritten is said in one warning. Neither torch nor transformers is imported here.
"""

from ptv2_fast.training.data.read import TASKS as TASKS
from ptv2_fast.training.data.read import read_examples as read_examples
from ptv2_fast.training.data.read import read_rows as read_rows
from ptv2_fast.training.data.source import DataSource as DataSource
from ptv2_fast.training.labels import LabelSet as LabelSet
