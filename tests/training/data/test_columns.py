"""Nothing is half read: what is ambiguous is refused with the option that decides, what is left out is said once."""

from __future__ import annotations

import json
import logging

import pytest

from ptv2_fast.training.data import read_examples


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def lines_of(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def refused(path, task, *parts, **options):
    with pytest.raises(ValueError) as caught:
        read_examples(path, task, **options)
    for part in parts:
        assert str(part) in str(caught.value)


SPAM = "".join(f"{'ham' if n % 3 else 'spam'}\tcall me at number {n} today\n" for n in range(40))


class TestHeaders:
    def test_label_before_text_is_refused_and_numbers_decide(self, tmp_path):
        path = write(tmp_path, "spam.tsv", SPAM)
        refused(path, "SEQ_CLS", "line 1", "2 and 40 values", "--text-column 2 --label-column 1")
        examples = read_examples(path, "SEQ_CLS", text_column="2", label_column="1")
        assert len(examples) == 40 and examples[0] == {"text": "call me at number 0 today", "label": "spam"}
        refused(path, "SEQ_CLS", "numbered 1 to 2", "['3']", text_column="3", label_column="1")

    def test_more_columns_without_a_header_are_numbered(self, tmp_path, caplog):
        path = write(tmp_path, "a.csv", "7,good film,1\n8,bad film,0\n")
        refused(path, "SEQ_CLS", "header", "got 3", "numbers")
        assert read_examples(path, "SEQ_CLS", text_column="2", label_column="3") == [
            {"text": "good film", "label": "1"},
            {"text": "bad film", "label": "0"},
        ]
        assert caplog.text.count("columns left out: 1 ('1')") == 1

    def test_a_header_is_no_example_where_columns_go_by_number(self, tmp_path):
        path = write(tmp_path, "a.tsv", "Label\ttext\nspam\tcall me now\n")
        refused(path, "SEQ_CLS", "line 1", "no header", "['Label', 'text']", text_column="2", label_column="1")
        refused(path, "SEQ_CLS", "line 1", "no header", text_column="2", labelled=False)

    def test_a_header_of_numbers_is_a_header(self, tmp_path):
        path = write(tmp_path, "a.csv", "0,1\ngood film,x\n")
        expected = [{"text": "good film", "label": "x"}]
        assert read_examples(path, "SEQ_CLS", text_column="0", label_column="1") == expected

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("Review Text\tStar Rating\nloved it\t5\nhated it\t1\n", id="numbers below a word"),
            pytest.param("body\tmood\nloved the film\tgood\nhated it all\tbad\n", id="sentences below a word"),
            pytest.param("The text\tThe mood\na\tgood\nb\tbad\nc\tgood\nd\tbad\n", id="a class of one row"),
        ],
    )
    def test_a_header_of_unknown_names_becomes_no_class(self, tmp_path, text):
        path = write(tmp_path, "a.tsv", text)
        refused(path, "SEQ_CLS", "line 1", "header", "--text-column and --label-column (text_column, label_column)")
        rows = text.count("\n")
        assert len(read_examples(path, "SEQ_CLS", text_column="1", label_column="2")) == rows
        first, second = text.split("\n")[0].split("\t")
        assert len(read_examples(path, "SEQ_CLS", text_column=first, label_column=second)) == rows - 1

    def test_a_class_with_the_name_of_a_column_is_no_header(self, tmp_path):
        path = write(tmp_path, "a.tsv", "I like it\treview\nwhy is that\tquestion\nso do I\treview\n")
        assert [e["label"] for e in read_examples(path, "SEQ_CLS")] == ["review", "question", "review"]

    def test_a_class_with_the_name_of_its_column_is_a_class(self, tmp_path):
        path = write(tmp_path, "a.tsv", "text\tlabel\nwhat is it\tlabel\nand this\tother\n")
        assert [e["label"] for e in read_examples(path, "SEQ_CLS")] == ["label", "other"]

    def test_columns_without_a_name_go_by_number(self, tmp_path, caplog):
        path = write(tmp_path, "a.csv", "v1,v2,,\nham,hello there,,\nspam,buy now, or else,\n")
        refused(path, "SEQ_CLS", "line 1", "header", "text_column")
        examples = read_examples(path, "SEQ_CLS", text_column="v2", label_column="v1")
        assert examples[1] == {"text": "buy now", "label": "spam"}
        assert "columns left out: 2 ('3', '4')" in caplog.text

    def test_a_second_column_that_prediction_leaves_out_is_said(self, tmp_path, caplog):
        path = write(tmp_path, "a.tsv", "good film\tx\nbad film\ty\n")
        assert read_examples(path, "SEQ_CLS", labelled=False) == [{"text": "good film"}, {"text": "bad film"}]
        assert caplog.text.count("the second of two columns is taken for the label and left out") == 1

    def test_a_header_in_the_middle_is_no_example(self, tmp_path):
        path = write(tmp_path, "a.csv", "text,label\na,x\ntext,label\nb,y\n")
        refused(path, "SEQ_CLS", "line 3", "repeats the header")

    def test_a_single_column(self, tmp_path):
        path = write(tmp_path, "a.csv", "story\nonce upon a time\n\nthere was a king\n")
        refused(path, "CAUSAL_LM", "line 1", "header", "--text-column 1")
        texts = [{"text": "once upon a time"}, {"text": "there was a king"}]
        assert read_examples(path, "CAUSAL_LM", text_column="story") == texts
        bare = write(tmp_path, "b.csv", "once upon a time\nthere was a king\n")
        assert read_examples(bare, "CAUSAL_LM") == texts
        assert read_examples(bare, "SEQ_CLS", labelled=False) == texts
        refused(write(tmp_path, "c.csv", "once upon a time\nthere was, it is said, a king\n"), "CAUSAL_LM", "line 2")

    def test_text_for_prediction_in_a_second_column_is_no_label(self, tmp_path):
        path = write(tmp_path, "a.tsv", "it rains today here\tthe street is wet\nsnow falls on us\tthe street is wet\n")
        refused(path, "SEQ_CLS", "line 1", "--text-column", labelled=False)
        pairs = read_examples(path, "SEQ_CLS", labelled=False, text_column=("1", "2"))
        assert pairs[0] == {"text": "it rains today here", "text_pair": "the street is wet"}

    @pytest.mark.parametrize(
        ("name", "text", "task"),
        [
            ("a.csv", "text;summary\na long story;short\n", "CAUSAL_LM"),
            ("a.csv", "question;answer\nwho is it;anna\n", "CAUSAL_LM"),
            ("a.csv", "text\tlabel\ngood\tx\n", "SEQ_CLS"),
            ("a.tsv", "text,label\ngood,x\n", "SEQ_CLS"),
            ("a.tsv", '"text","label"\n"good","x"\n', "SEQ_CLS"),
            ("a.csv", "body|mood\ngood film|x\nbad film|y\n", "SEQ_CLS"),
        ],
    )
    def test_columns_between_other_signs_are_not_one_text(self, tmp_path, name, text, task):
        refused(write(tmp_path, name, text), task, "line 1", "2 columns between", "--text-column 1")

    def test_lines_with_other_signs_are_texts(self, tmp_path):
        path = write(tmp_path, "a.csv", "once upon a time; or so\nthere was a king\n")
        assert len(read_examples(path, "CAUSAL_LM")) == 2
        alike = write(tmp_path, "b.csv", "a; b\nc; d\n")
        assert read_examples(alike, "CAUSAL_LM", text_column="1") == [{"text": "a; b"}, {"text": "c; d"}]

    def test_a_csv_for_other_tasks_needs_a_header(self, tmp_path):
        refused(write(tmp_path, "a.csv", "who,anna\n"), "QUESTION_ANS", "line 1", "header row", "QUESTION_ANS")


class TestCells:
    def test_a_tsv_with_a_quoted_header_is_quoted(self, tmp_path):
        text = b'\xef\xbb\xbf"text"\t"label"\r\n"he said ""hi""\tto me"\t"good"\r\n\r\n"two\nlines"\t"bad"\r\n'
        assert read_examples(write(tmp_path, "a.tsv", text), "SEQ_CLS") == [
            {"text": 'he said "hi"\tto me', "label": "good"},
            {"text": "two\nlines", "label": "bad"},
        ]
        refused(write(tmp_path, "b.tsv", '"text"\t"label"\n"open\tx\n'), "SEQ_CLS", "line 2", "tab-separated")

    def test_other_quotes_in_a_tsv_are_kept_and_counted(self, tmp_path, caplog):
        path = write(tmp_path, "a.tsv", 'text\tlabel\n"hello"\tx\nplain\ty\n"bye"\tx\n')
        assert [e["text"] for e in read_examples(path, "SEQ_CLS")] == ['"hello"', "plain", '"bye"']
        assert caplog.text.count("2 cells stand in quotes") == 1

    @pytest.mark.parametrize(
        ("name", "row", "mark"), [("a.csv", ", \n", ","), ("a.tsv", "\t\n", "\t"), ("a.csv", '"",""\n', ",")]
    )
    def test_rows_of_empty_cells_are_counted(self, tmp_path, caplog, name, row, mark):
        path = write(tmp_path, name, f"text{mark}label\n{row * 3}good{mark}x\n")
        assert read_examples(path, "SEQ_CLS") == [{"text": "good", "label": "x"}]
        assert caplog.text.count("3 rows of empty cells are left out") == 1

    def test_blank_lines_are_no_rows(self, tmp_path, caplog):
        path = write(tmp_path, "a.csv", "\n\r\ntext,label\r\n\r\ngood,x\n\n")
        assert len(read_examples(path, "SEQ_CLS")) == 1 and not caplog.records

    @pytest.mark.parametrize(
        ("labels", "two"),
        [("1 1.0", "'1' and '1.0'"), ("01 1", "'01' and '1'"), ("caf\u00e9 cafe\u0301", "caf"), ("+1 1", "'+1'")],
    )
    def test_one_label_in_two_spellings_is_refused(self, tmp_path, labels, two):
        rows = "".join(f"text {n}\t{label}\n" for n, label in enumerate(labels.split()))
        refused(write(tmp_path, "a.tsv", "sentence\tlabel\n" + rows), "SEQ_CLS", "spelled", two)

    def test_labels_of_one_spelling_stay_as_they_are(self, tmp_path, caplog):
        path = write(tmp_path, "a.tsv", "sentence\tlabel\na\t1.0\nb\t2.0\nc\tYes\nd\tyes\n")
        assert [e["label"] for e in read_examples(path, "SEQ_CLS")] == ["1.0", "2.0", "Yes", "yes"]
        assert "upper and lower case" in caplog.text

    def test_a_name_twice_in_an_object_is_refused(self, tmp_path):
        twice = '{"text": "a", "text": "b", "label": 1}\n'
        refused(write(tmp_path, "a.jsonl", twice), "SEQ_CLS", "line 1", "repeated: ['text']")
        refused(write(tmp_path, "a.json", f"[{twice}]"), "SEQ_CLS", "repeated: ['text']")

    @pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM", "TOKEN_CLS"])
    def test_half_a_surrogate_pair_is_refused(self, tmp_path, task):
        key, value = ("tokens", '["a", "\\ud83d"]') if task == "TOKEN_CLS" else ("text", '"a \\ud83d"')
        path = write(tmp_path, "a.jsonl", f'{{"{key}": {value}, "tags": ["O", "O"], "label": 1}}\n')
        refused(path, task, "line 1", "surrogate")


class TestColumns:
    @pytest.mark.parametrize(
        ("record", "task", "parts"),
        [
            ({"content": "a long story", "summary": "short"}, "CAUSAL_LM", ["'summary'", "--completion-column"]),
            ({"prompt": "a", "completion": "b", "text": "c"}, "CAUSAL_LM", ["any of", "--text-column"]),
            ({"prompt": "a question", "text": "an answer"}, "CAUSAL_LM", ["'prompt'", "--prompt-column"]),
            ({"prompt": "a", "response": "b"}, "CAUSAL_LM", ["prompt_column", "['prompt', 'response']"]),
            ({"text": "a b", "review": "c d", "label": 1}, "SEQ_CLS", ["any of", "'review'", "--text-column"]),
            ({"text": "a b", "title": "a long new title", "label": 1}, "SEQ_CLS", ["['title']", "--text-column"]),
            ({"text": "a b", "label": 1, "sentiment": "x"}, "SEQ_CLS", ["any of", "'sentiment'", "--label-column"]),
            ({"premise": "a", "hypothesis": "b", "text": "c", "label": 1}, "SEQ_CLS", ["['text']"]),
            (
                {"sentence1": "a", "sentence2": "b", "question1": "c", "question2": "d", "label": 1},
                "SEQ_CLS",
                ["'sentence1' and 'sentence2', 'question1' and 'question2'"],
            ),
            ({"tokens": ["a"], "words": ["b"], "tags": ["O"]}, "TOKEN_CLS", ["any of 'tokens', 'words'"]),
            ({"tokens": ["a"], "tags": ["O"], "ner_tags": ["O"]}, "TOKEN_CLS", ["'ner_tags'", "--label-column"]),
        ],
    )
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    def test_what_could_be_meant_twice_is_refused(self, tmp_path, record, task, parts, name):
        text = lines_of(record) if name == "a.jsonl" else json.dumps([record])
        refused(write(tmp_path, name, text), task, *parts)

    def test_records_with_other_columns_are_not_read_by_halves(self, tmp_path):
        path = write(tmp_path, "a.jsonl", lines_of({"text": "a", "label": 1}, {"sentence": "b", "label": 0}))
        refused(path, "SEQ_CLS", "any of 'text', 'sentence'")
        refused(path, "SEQ_CLS", "line 2", "expected the column 'text'", text_column="text")

    def test_the_named_columns_are_read_and_the_others_noted_once(self, tmp_path, caplog):
        record = {"id": 1, "content": "a long story", "summary": "short", "label": "x"}
        path = write(tmp_path, "a.jsonl", lines_of(record, record))
        examples = read_examples(path, "CAUSAL_LM", prompt_column="content", completion_column="summary")
        assert examples == [{"prompt": "a long story", "completion": "short"}] * 2
        assert caplog.text.count("columns left out: 2 ('id', 'label')") == 1
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert read_examples(path, "CAUSAL_LM", text_column="summary") == [{"text": "short"}] * 2
        unlabelled = read_examples(path, "CAUSAL_LM", prompt_column="content", labelled=False)
        assert unlabelled[0] == {"prompt": "a long story"}

    def test_two_columns_without_a_header_are_a_prompt_and_its_completion_when_asked(self, tmp_path):
        path = write(tmp_path, "a.csv", "2+2=,4\n3+3=,6\n")
        refused(path, "CAUSAL_LM", "line 1", "--prompt-column 1 --completion-column 2")
        pairs = read_examples(path, "CAUSAL_LM", prompt_column="1", completion_column="2")
        assert pairs == [{"prompt": "2+2=", "completion": "4"}, {"prompt": "3+3=", "completion": "6"}]

    def test_marks_and_single_words_are_left_out_with_a_note(self, tmp_path, caplog):
        path = write(tmp_path, "a.csv", ",text,topic,label\n0,a fine film,art,1\n1,a bad film,art,0\n")
        assert read_examples(path, "SEQ_CLS")[0] == {"text": "a fine film", "label": "1"}
        assert "columns left out: 2 ('1', 'topic')" in caplog.text

    def test_labels_are_not_needed_and_not_read_for_prediction(self, tmp_path):
        path = write(tmp_path, "a.jsonl", lines_of({"text": "a", "label": 0.5, "class": "x"}, {"text": "b"}))
        assert read_examples(path, "SEQ_CLS", labelled=False) == [{"text": "a"}, {"text": "b"}]

    @pytest.mark.parametrize(
        ("task", "options", "part"),
        [
            ("SEQ_CLS", {"prompt_column": "a"}, "prompt_column: only CAUSAL_LM"),
            ("CAUSAL_LM", {"completion_column": "a", "text_column": "b"}, "completion_column: must be None"),
            ("CAUSAL_LM", {"prompt_column": "a", "completion_column": "a"}, "must differ"),
            ("SEQ_CLS", {"text_column": "a", "label_column": "a"}, "must differ"),
        ],
    )
    def test_columns_that_contradict_each_other(self, tmp_path, task, options, part):
        refused(write(tmp_path, "a.csv", "a,b\nx,y\n"), task, part, **options)


class TestTags:
    iob1 = "Anna\tI-PER\nLee\tI-PER\nmet\tO\nBob\tI-PER\nAnn\tB-PER\nRome\tI-LOC\n"

    def test_iob1_is_read_as_iob2_and_said(self, tmp_path, caplog):
        path = write(tmp_path, "a.conll", self.iob1)
        tags = ["B-PER", "I-PER", "O", "B-PER", "B-PER", "B-LOC"]
        assert read_examples(path, "TOKEN_CLS")[0]["tags"] == tags
        assert caplog.text.count("IOB1 tags are read as IOB2: 3 I-x") == 1
        again = write(tmp_path, "b.conll", "".join(f"w\t{tag}\n" for tag in tags))
        caplog.clear()
        assert read_examples(again, "TOKEN_CLS", labels=["O", "B-LOC", "I-LOC", "B-PER", "I-PER"])[0]["tags"] == tags
        assert not caplog.records

    def test_labels_without_b_are_the_callers_own(self, tmp_path):
        path = write(tmp_path, "a.conll", "a\tI-PER\nb\tO\n")
        assert read_examples(path, "TOKEN_CLS", labels=["O", "I-PER"])[0]["tags"] == ["I-PER", "O"]

    def test_columns_between_token_and_tag_are_counted(self, tmp_path, caplog):
        path = write(tmp_path, "a.conll", "-DOCSTART- -X- -X- O\n\nAnna NNP B-NP B-PER\nsings VBZ B-VP O\n")
        assert read_examples(path, "TOKEN_CLS") == [{"tokens": ["Anna", "sings"], "tags": ["B-PER", "O"]}]
        assert "up to 2 columns between token and tag and 1 document marks" in caplog.text

    def test_a_column_named_lines_is_a_column(self, tmp_path):
        path = write(tmp_path, "a.jsonl", lines_of({"tokens": ["a"], "tags": ["X"], "lines": 3}))
        refused(path, "TOKEN_CLS", "line 1, token 1", "'X'")
