"""Readers: what each format gives, and the message for each kind of bad record."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptv2_fast.training.data import LabelSet, read_examples
from ptv2_fast.training.data.tags import to_iob2


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def refused(path, task, *parts, **options):
    """Reads, expects a ValueError, and expects each part in its message."""
    with pytest.raises(ValueError) as caught:
        read_examples(path, task, **options)
    for part in parts:
        assert str(part) in str(caught.value)


class TestClassification:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.tsv", "sentence\tlabel\nfine day\t1\nbad day\t0\n"),
            ("a.tsv", "fine day\t1\nbad day\t0\n"),
            ("a.tsv", "\ufeffSentence\tLabel\r\nfine day\t1\r\n\r\nbad day\t0"),
            ("a.csv", "label,text\n1,fine day\n0,bad day\n"),
            ("a.csv", 'fine day,1\n"bad day","0"\n'),
            ("a.jsonl", '{"text": "fine day", "label": 1}\n\n{"text": "bad day", "label": "0"}\n'),
            ("a.json", '[{"text": "fine day", "label": 1}, {"text": "bad day", "label": 0}]'),
            ("a.json", '{"text": "fine day", "label": 1}\n{"text": "bad day", "label": 0}\n'),
        ],
    )
    def test_formats_agree(self, tmp_path, name, text):
        expected = [{"text": "fine day", "label": "1"}, {"text": "bad day", "label": "0"}]
        assert read_examples(write(tmp_path, name, text), "SEQ_CLS") == expected

    def test_single_json_line_under_json(self, tmp_path):
        path = write(tmp_path, "a.json", '{"text": "x", "label": "y"}\n')
        assert read_examples(path, "SEQ_CLS") == [{"text": "x", "label": "y"}]

    def test_pair_of_texts(self, tmp_path):
        path = write(tmp_path, "a.csv", "premise,hypothesis,label\nIt rains,It is wet,entailment\n")
        expected = {"text": "It rains", "text_pair": "It is wet", "label": "entailment"}
        assert read_examples(path, "SEQ_CLS") == [expected]

    def test_named_columns(self, tmp_path):
        path = write(tmp_path, "a.tsv", "body\tTitle\tstars\nlong\tshort\t5\n")
        expected = {"text": "short", "text_pair": "long", "label": "5"}
        options = {"text_column": ("Title", "body"), "label_column": "stars"}
        assert read_examples(path, "SEQ_CLS", **options) == [expected]

    def test_tsv_has_no_quotes_and_csv_keeps_newlines_in_them(self, tmp_path):
        tsv = write(tmp_path, "a.tsv", '"Hi, he said\tpositive\n')
        assert read_examples(tsv, "SEQ_CLS")[0]["text"] == '"Hi, he said'
        csv = write(tmp_path, "a.csv", 'text,label\n"two\nlines",a\nx,y,z\n')
        refused(csv, "SEQ_CLS", f"{csv}, line 4", "expected 2 columns", "got 3")

    def test_max_examples_and_known_labels(self, tmp_path):
        path = write(tmp_path, "a.tsv", "a\tx\nb\ty\nc\tz\n")
        assert len(read_examples(path, "SEQ_CLS", max_examples=2)) == 2
        refused(path, "SEQ_CLS", f"{path}, line 3", "'z'", "not seen in training", labels=["x", "y"])
        assert len(read_examples(path, "SEQ_CLS", labels=LabelSet(("x", "y", "z")))) == 3

    def test_single_word_with_a_rare_label_is_not_taken_for_a_header(self, tmp_path):
        path = write(tmp_path, "a.tsv", "a\tx\nb\ty\nc\tz\n")
        assert [e["label"] for e in read_examples(path, "SEQ_CLS")] == ["x", "y", "z"]

    def test_text_without_labels_for_prediction(self, tmp_path):
        text = write(tmp_path, "a.txt", "one\n\ntwo\n")
        assert read_examples(text, "SEQ_CLS", labelled=False) == [{"text": "one"}, {"text": "two"}]
        refused(text, "SEQ_CLS", f"{text}, line 1", "label_column")
        lines = write(tmp_path, "a.jsonl", '{"text": "x", "label": null}\n')
        assert read_examples(lines, "SEQ_CLS", labelled=False) == [{"text": "x"}]

    @pytest.mark.parametrize(
        ("name", "text", "parts"),
        [
            ("a.tsv", "sentence\tlabel\nfine\t1\nbad\n", ["line 3", "expected 2 columns", "got 1"]),
            ("a.tsv", "sentence\tlabel\nfine\t\n", ["line 2", "expected a label", "''"]),
            ("a.tsv", "sentence\tlabel\n \t1\n", ["line 2", "expected text"]),
            ("a.tsv", "a\tb\tc\n", ["line 1", "header", "got 3"]),
            ("a.csv", "text,text\na,b\n", ["line 1", "must differ", "text"]),
            ("a.csv", "text,other\na,b\n", ["line 2", "label_column", "['text', 'other']"]),
            ("a.csv", "id,label\na,b\n", ["line 2", "text_column", "['id', 'label']"]),
            ("a.csv", 'text,label\n"open,1\n', ["line 2", "comma-separated"]),
            ("a.tsv", "body\tstars\nx y\t1\nz w\t1\n", ["line 1", "header", "text_column"]),
            ("a.jsonl", '{"text": "x", "label": 1}\n{"text": }\n', ["line 2", "JSON", "column 10"]),
            ("a.jsonl", "[1]\n", ["line 1", "expected a JSON object", "list"]),
            ("a.jsonl", '{"text": "x", "label": 0.5}\n', ["line 1", "label", "0.5"]),
            ("a.jsonl", '{"text": 7, "label": 1}\n', ["line 1", "expected text", "7"]),
            ("a.json", '{"text":\n "x" "y"}', ["line 2", "JSON"]),
            pytest.param("a.json", "[" * 200_000, ["expected JSON"], id="endless nesting of a document"),
            pytest.param("a.jsonl", "[" * 200_000, ["line 1", "expected one JSON object"], id="endless nesting"),
            pytest.param(
                "a.jsonl",
                '{"text": "x", "label": 1}\n{"text": "x", "label": ' + "9" * 5000 + "}\n",
                ["line 2", "expected one JSON object"],
                id="endless number",
            ),
            ("a.csv", "", ["line 1", "empty"]),
            ("a.csv", " \n\n", ["line 1", "empty"]),
            ("a.csv", "text,label\n", ["line 1", "at least one example"]),
            ("a.tsv", b"good\t1\nna\xefve\t0\n", ["line 2", "UTF-8", "byte 9", "0xef"]),
        ],
    )
    def test_refusals(self, tmp_path, name, text, parts):
        path = write(tmp_path, name, text)
        refused(path, "SEQ_CLS", path, *parts)

    def test_bad_arguments(self, tmp_path):
        path = write(tmp_path, "a.tsv", "a\tx\n")
        refused(path, "CLS", "task", "SEQ_CLS", "'CLS'")
        refused(path, "SEQ_CLS", "max_examples", "0", max_examples=0)
        refused(path, "SEQ_CLS", "split", "'train'", split="train")
        refused(path, "SEQ_CLS", "text_column", "at most 2", text_column=("a", "b", "c"))
        refused(path, "CAUSAL_LM", "label_column", label_column="label")
        refused(path, "SEQ_CLS", f"{path}, line 1", "['body']", text_column="body", label_column="x")
        refused(write(tmp_path, "a.xml", "<a/>"), "SEQ_CLS", ".jsonl", "'.xml'")
        refused(write(tmp_path, "a.conll", "a O\n"), "SEQ_CLS", "TOKEN_CLS")
        with pytest.raises(FileNotFoundError, match="nowhere.tsv"):
            read_examples(tmp_path / "nowhere.tsv", "SEQ_CLS")


class TestTokens:
    def test_columns_separators_and_stray_spaces(self, tmp_path):
        text = "-DOCSTART- -X- O\n\nAnna NNP B-PER\nsings VB O\n\t\n \n Lisbon \tB-LOC \r\n,  O\nNew York\tx\tB-LOC\n"
        assert read_examples(write(tmp_path, "a.conll", text), "TOKEN_CLS") == [
            {"tokens": ["Anna", "sings"], "tags": ["B-PER", "O"]},
            {"tokens": ["Lisbon", ",", "New York"], "tags": ["B-LOC", "O", "B-LOC"]},
        ]

    @pytest.mark.parametrize("token", ["\u00a0", "\ufe0f", "\u2003", "\x0b", "#", "-"])
    def test_odd_characters_are_tokens(self, tmp_path, token):
        path = write(tmp_path, "a.conll", f"{token} O\n{token}\tO\n")
        assert read_examples(path, "TOKEN_CLS") == [{"tokens": [token] * 2, "tags": ["O"] * 2}]

    def test_line_of_an_odd_blank_is_no_separator(self, tmp_path):
        path = write(tmp_path, "a.conll", "a\tO\n\u00a0\nb\tO\n")
        refused(path, "TOKEN_CLS", f"{path}, line 2", "token<TAB>tag")

    @pytest.mark.parametrize("suffix", ["tsv", "txt", "iob2"])
    def test_other_suffixes(self, tmp_path, suffix):
        path = write(tmp_path, f"a.{suffix}", "Anna\tB-PER\n")
        assert read_examples(path, "TOKEN_CLS") == [{"tokens": ["Anna"], "tags": ["B-PER"]}]

    def test_jsonl(self, tmp_path):
        path = write(tmp_path, "a.jsonl", '{"words": ["a", "b"], "ner_tags": ["O", "I-x"]}\n')
        assert read_examples(path, "TOKEN_CLS") == [{"tokens": ["a", "b"], "tags": ["O", "B-x"]}]

    def test_tokens_without_tags_for_prediction(self, tmp_path):
        path = write(tmp_path, "a.conll", "Anna\nsings\n\nhere\n")
        expected = [{"tokens": ["Anna", "sings"]}, {"tokens": ["here"]}]
        assert read_examples(path, "TOKEN_CLS", labelled=False) == expected

    @pytest.mark.parametrize(
        ("name", "text", "parts"),
        [
            ("a.conll", "a\tO\n\nb\tO\nc\tPER\n", ["line 4", "B-x", "'PER'"]),
            ("a.conll", "a\tB-\n", ["line 1", "'B-'"]),
            ("a.conll", "a O\nb\n", ["line 2", "token<TAB>tag", "'b'"]),
            ("a.conll", "\tO\n", ["line 1", "token<TAB>tag"]),
            ("a.conll", "-DOCSTART- O\n\n", ["line 1", "at least one example"]),
            ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', ["line 1", "2 tokens", "1 tags"]),
            ("a.jsonl", '{"tokens": ["a"], "tags": [3]}', ["line 1", "token 1", "3"]),
            ("a.jsonl", '{"tokens": ["a"]}', ["line 1", "label_column"]),
            ("a.jsonl", '{"tokens": "a b", "tags": ["O"]}', ["line 1", "list of words", "'a b'"]),
            ("a.jsonl", '{"tokens": ["a"], "tags": "O"}', ["line 1", "list of IOB tags"]),
            ("a.conll", b"a\tO\n\nb\xff\tO\n", ["line 3", "UTF-8", "byte 6"]),
        ],
    )
    def test_refusals(self, tmp_path, name, text, parts):
        path = write(tmp_path, name, text)
        refused(path, "TOKEN_CLS", path, *parts)

    def test_tag_that_training_did_not_have(self, tmp_path):
        path = write(tmp_path, "a.conll", "a\tO\nb\tB-GPE\n")
        refused(path, "TOKEN_CLS", f"{path}, line 2", "'B-GPE'", labels=["O", "B-PER", "I-PER"])

    # Any character can be a token but those that separate, and a document's mark.
    characters = st.characters(exclude_categories=("Cs",), exclude_characters=" \t\r\n\0")
    token = st.text(characters, min_size=1, max_size=6).filter(
        lambda token: token != "-DOCSTART-" and not token.startswith("\ufeff")
    )
    tag = st.sampled_from(["O", "B-PER", "I-PER", "B-creative-work"])
    sentence = st.lists(st.tuples(token, tag), min_size=1, max_size=5)

    @given(sentences=st.lists(sentence, min_size=1, max_size=4))
    def test_round_trip(self, tmp_path_factory, sentences):
        examples = [{"tokens": [token for token, _ in s], "tags": [tag for _, tag in s]} for s in sentences]
        text = "\n\n".join("\n".join(map("\t".join, s)) for s in sentences) + "\n\n"
        path = write(tmp_path_factory.getbasetemp(), "round_trip.conll", text)
        # A file of nothing but white space characters counts as empty.
        if text.strip():
            expected = [{**example, "tags": to_iob2(example["tags"])} for example in examples]
            assert read_examples(path, "TOKEN_CLS") == expected


class TestQuestions:
    context = "Paris lies on the Seine."
    answers = {"text": ["Seine"], "answer_start": [18]}

    def test_flat_and_nested_agree(self, tmp_path):
        flat = {"id": "7", "question": "Where?", "context": self.context, "answers": self.answers}
        pairs = [{"text": "Seine", "answer_start": 18}]
        nested = {"id": "7", "question": "Where?", "answers": pairs, "is_impossible": False}
        paragraphs = [{"context": self.context, "qas": [nested]}]
        lines = write(tmp_path, "a.jsonl", json.dumps(flat) + "\n")
        squad = write(tmp_path, "a.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
        assert read_examples(lines, "QUESTION_ANS") == [flat]
        assert read_examples(squad, "QUESTION_ANS") == [flat]

    def test_no_answer_and_no_answers(self, tmp_path):
        record = {"question": "Who?", "context": self.context, "answers": [], "is_impossible": True}
        path = write(tmp_path, "a.jsonl", json.dumps(record))
        assert read_examples(path, "QUESTION_ANS")[0]["answers"] == {"text": [], "answer_start": []}
        del record["answers"]
        path = write(tmp_path, "b.jsonl", json.dumps(record))
        assert "answers" not in read_examples(path, "QUESTION_ANS", labelled=False)[0]
        refused(path, "QUESTION_ANS", "line 1", "answers")

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"answers": {"text": ["Seine"], "answer_start": [17]}}, ["17", "' Sein'", "'Seine'"]),
            ({"answers": {"text": ["Seine"], "answer_start": [-6]}}, ["-6", "'Seine'"]),
            ({"answers": {"text": ["Seine"], "answer_start": []}}, ["as many"]),
            ({"answers": {"text": ["Seine"], "answer_start": ["18"]}}, ["integer", "'18'"]),
            ({"answers": "Seine"}, ["answers", "'Seine'"]),
            ({"answers": [{"text": "Seine"}]}, ["integer answer_start", "None"]),
            ({"is_impossible": True}, ["is_impossible"]),
            ({"question": ""}, ["'question'"]),
            ({"context": None}, ["'context'"]),
        ],
    )
    def test_refusals(self, tmp_path, change, parts):
        record = {"question": "Where?", "context": self.context, "answers": self.answers, **change}
        path = write(tmp_path, "a.jsonl", "\n" + json.dumps(record))
        refused(path, "QUESTION_ANS", f"{path}, line 2", *parts)

    def test_structure(self, tmp_path):
        path = write(tmp_path, "a.jsonl", '{"question": "x"}\n')
        refused(path, "QUESTION_ANS", "line 1", "'context'")
        path = write(tmp_path, "a.json", '{"data": [{"paragraphs": [{"context": "x"}]}]}')
        refused(path, "QUESTION_ANS", "data[0].paragraphs[0]", "'qas'")
        record = {"id": "q", "question": "x", "context": "y", "answers": []}
        path = write(tmp_path, "b.jsonl", (json.dumps(record) + "\n") * 2)
        refused(path, "QUESTION_ANS", "ids must differ", "1 and 2", "'q'")


class TestLanguage:
    def test_lines_columns_and_prompts(self, tmp_path):
        text = write(tmp_path, "a.txt", "one line\n\n  another\n")
        assert read_examples(text, "CAUSAL_LM") == [{"text": "one line"}, {"text": "  another"}]
        column = write(tmp_path, "a.csv", "id,text\n1,hello\n")
        assert read_examples(column, "CAUSAL_LM") == [{"text": "hello"}]
        pairs = write(tmp_path, "a.jsonl", '{"prompt": "2+2=", "completion": "4"}\n')
        assert read_examples(pairs, "CAUSAL_LM") == [{"prompt": "2+2=", "completion": "4"}]
        named = write(tmp_path, "b.csv", "story,id\nonce,1\n")
        assert read_examples(named, "CAUSAL_LM", text_column="story") == [{"text": "once"}]

    def test_refusals(self, tmp_path):
        path = write(tmp_path, "a.jsonl", '{"prompt": "x"}\n')
        refused(path, "CAUSAL_LM", "line 1", "text_column")
        path = write(tmp_path, "b.jsonl", '{"prompt": "x", "completion": ""}\n')
        refused(path, "CAUSAL_LM", "line 1", "'completion'")


class TestLabelSet:
    @pytest.mark.parametrize(
        ("labels", "names"),
        [
            (["10", "9", "2", "9"], ("2", "9", "10")),
            (["-1", "1", "0"], ("-1", "0", "1")),
            (["10", "9", "x"], ("10", "9", "x")),
            (["positive", "negative"], ("negative", "positive")),
        ],
    )
    def test_order(self, labels, names):
        assert LabelSet.from_examples({"label": label} for label in labels).names == names

    def test_tags_come_in_pairs_after_o(self):
        examples = [{"tags": ["B-PER", "O"]}, {"tags": ["I-LOC"]}]
        names = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
        assert LabelSet.from_examples(examples).names == names

    def test_both_directions(self):
        labels = LabelSet(("no", "yes"))
        assert [labels.to_id(name) for name in labels.names] == [0, 1]
        assert [labels.to_name(index) for index in range(len(labels))] == ["no", "yes"]
        assert "yes" in labels and "maybe" not in labels
        with pytest.raises(ValueError, match=r"\['no', 'yes'\]; got 'maybe'"):
            labels.to_id("maybe")
        for index in (-1, 2):
            with pytest.raises(ValueError, match=r"\[0, 2\)"):
                labels.to_name(index)

    def test_refusals(self):
        with pytest.raises(ValueError, match="must differ"):
            LabelSet(("a", "a"))
        with pytest.raises(ValueError, match="at least one"):
            LabelSet(())
        with pytest.raises(ValueError, match="neither"):
            LabelSet.from_examples([{"text": "x"}])


class TestDatasets:
    @pytest.fixture
    def datasets(self, monkeypatch, tmp_path):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        datasets.disable_progress_bars()
        return datasets

    def table(self, datasets, labels=(1, 0)):
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
        return datasets.Dataset.from_dict({"text": ["fine day", "grey day"], "label": list(labels)}, features=features)

    def test_saved_splits(self, datasets, tmp_path):
        splits = {"train": self.table(datasets), "test": self.table(datasets, (0, 0))}
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
        assert read_examples(tmp_path / "saved", "SEQ_CLS", split="train") == [
            {"text": "fine day", "label": "good"},
            {"text": "grey day", "label": "bad"},
        ]
        refused(tmp_path / "saved", "SEQ_CLS", "split", "['test', 'train']", "None")

    def test_saved_table_of_tags(self, datasets, tmp_path):
        features = datasets.Features(
            tokens=datasets.List(datasets.Value("string")),
            ner_tags=datasets.List(datasets.ClassLabel(names=["O", "B-PER"])),
        )
        table = {"tokens": [["Anna", "sings"]], "ner_tags": [[1, 0]]}
        datasets.Dataset.from_dict(table, features=features).save_to_disk(str(tmp_path / "saved"))
        expected = [{"tokens": ["Anna", "sings"], "tags": ["B-PER", "O"]}]
        assert read_examples(str(tmp_path / "saved"), "TOKEN_CLS") == expected

    def test_a_data_set_in_memory_is_to_be_saved(self, datasets):
        with pytest.raises(ValueError, match="path_or_name must be a file, .*; got a Dataset: what save_to_disk"):
            read_examples(datasets.Dataset.from_dict({"text": ["a"]}), "CAUSAL_LM")

    def test_folder_of_files(self, datasets, tmp_path):
        (tmp_path / "folder").mkdir()
        write(tmp_path / "folder", "train.csv", "text,label\nfine day,1\n")
        expected = [{"text": "fine day", "label": "1"}]
        assert read_examples(tmp_path / "folder", "SEQ_CLS", split="train") == expected

    def test_split_without_labels(self, datasets, tmp_path):
        self.table(datasets, (-1, -1)).save_to_disk(str(tmp_path / "saved"))
        refused(tmp_path / "saved", "SEQ_CLS", "row 0", "expected a label", "None")
        texts = read_examples(tmp_path / "saved", "SEQ_CLS", labelled=False)
        assert texts == [{"text": "fine day"}, {"text": "grey day"}]

    def test_name_with_configuration(self, datasets, monkeypatch):
        calls = []

        def load_dataset(*arguments):
            calls.append(arguments)
            return {"train": self.table(datasets)}

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert len(read_examples("glue:sst2", "SEQ_CLS")) == 2
        assert len(read_examples("imdb", "SEQ_CLS", split="train")) == 2
        assert calls == [("glue", "sst2"), ("imdb", None)]

    def test_dataset_that_cannot_be_loaded(self, datasets, monkeypatch):
        def load_dataset(*arguments):
            raise ConnectionError("the hub cannot be reached")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(FileNotFoundError, match="no-such-set.*cannot be reached"):
            read_examples("no-such-set", "SEQ_CLS")
