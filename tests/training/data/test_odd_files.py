"""Files that are otherwise than they look: what would be read wrongly is refused, or read right, and said."""

from __future__ import annotations

import csv
import json

import pytest

from ptv2_fast.training.data import read_examples
from ptv2_fast.training.task_data import TaskCodec

TABLE = "text,label\nfine day,1\nbad day,0\n"
READ = [{"text": "fine day", "label": "1"}, {"text": "bad day", "label": "0"}]


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def refused(path, task, *parts, **options):
    with pytest.raises(ValueError) as caught:
        read_examples(path, task, **options)
    for part in parts:
        assert str(part) in str(caught.value), caught.value


class TestEncodings:
    @pytest.mark.parametrize(("name", "mark"), [("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("utf-16-le", "NUL")])
    @pytest.mark.parametrize("suffix", ["csv", "txt"])
    def test_wide_characters_are_named(self, tmp_path, name, mark, suffix):
        path = write(tmp_path, f"a.{suffix}", TABLE.encode(name))
        refused(path, "CAUSAL_LM" if suffix == "txt" else "SEQ_CLS", "line 1", "UTF-8", mark)

    @pytest.mark.parametrize("end", ["\r", "\r\n", "\r\r\n", "\n"])
    def test_every_end_of_a_line_is_one(self, tmp_path, end):
        tabs = TABLE.replace(",", "\t").replace("\n", end)
        assert read_examples(write(tmp_path, "a.tsv", tabs), "SEQ_CLS") == READ
        conll = write(tmp_path, "a.conll", f"Anna B-PER{end}sings O{end}{end}Bob B-PER{end}")
        assert [e["tokens"] for e in read_examples(conll, "TOKEN_CLS")] == [["Anna", "sings"], ["Bob"]]
        lines = write(tmp_path, "a.jsonl", end.join(map(json.dumps, READ)))
        assert read_examples(lines, "SEQ_CLS") == READ
        texts = write(tmp_path, "a.txt", f"one{end}two{end}")
        assert read_examples(texts, "CAUSAL_LM") == [{"text": "one"}, {"text": "two"}]
        if end != "\r\r\n":
            assert read_examples(write(tmp_path, "a.csv", TABLE.replace("\n", end)), "SEQ_CLS") == READ

    @pytest.mark.parametrize(("suffix", "task"), [("tsv", "SEQ_CLS"), ("conll", "TOKEN_CLS"), ("txt", "CAUSAL_LM")])
    def test_two_lines_in_one_are_refused(self, tmp_path, suffix, task):
        path = write(tmp_path, f"a.{suffix}", "a\tO\na\tO\rb\tB-X\n")
        refused(path, task, f"{path}, line 2", "carriage return")

    def test_joined_files_and_pointers_to_files_are_refused(self, tmp_path):
        joined = write(tmp_path, "a.tsv", "\ufefftext\tlabel\na\t1\n\ufefftext\tlabel\nb\t0\n")
        refused(joined, "SEQ_CLS", f"{joined}, line 3", "byte-order mark")
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
        refused(write(tmp_path, "a.txt", pointer), "CAUSAL_LM", "line 1", "git lfs pull")


class TestTables:
    @pytest.mark.parametrize("above", ["# made by, me\n", "fine day,1\n", "sep=,\n", "Label,Text\n"])
    @pytest.mark.parametrize("labelled", [True, False])
    def test_a_header_below_the_first_line_is_refused(self, tmp_path, above, labelled):
        path = write(tmp_path, "a.csv", above + TABLE)
        refused(path, "SEQ_CLS", f"{path}, line 2", "['text', 'label']", "header", labelled=labelled)

    def test_quotes_behind_a_blank_are_said(self, tmp_path, caplog):
        path = write(tmp_path, "a.csv", 'text,label\n"a, b", "1"\n"c d", "0"\n')
        read_examples(path, "SEQ_CLS")
        assert f"{path}, line 2: 2 cells stand in quotes, which are kept: a blank is in front of them" in caplog.text

    def test_a_line_in_a_quoted_cell_of_a_tsv_says_what_quotes_are(self, tmp_path):
        path = write(tmp_path, "a.tsv", 'text\tlabel\n"two\nlines"\t1\nbad day\t0\n')
        refused(path, "SEQ_CLS", "line 2: expected 2 columns", "a quote is open", "only where its header is")
        path.write_text(path.read_text().replace("text\tlabel", '"text"\t"label"'))
        assert [example["text"] for example in read_examples(path, "SEQ_CLS")] == ["two\nlines", "bad day"]

    def test_a_cell_holds_a_long_document(self, tmp_path):
        limit, document = csv.field_size_limit(), "word " * 30_000
        path = write(tmp_path, "a.csv", f"{TABLE}{document},1\n")
        assert [len(example["text"]) for example in read_examples(path, "SEQ_CLS")] == [8, 7, len(document) - 1]
        assert csv.field_size_limit() == limit

    def test_tokens_are_in_no_table(self, tmp_path):
        path = write(tmp_path, "a.csv", "tokens,tags\n\"['a','b']\",\"['O','O']\"\n")
        refused(path, "TOKEN_CLS", str(path), "CoNLL", "JSON", ".csv")

    def test_a_class_for_nearly_every_example_is_said(self, tmp_path, caplog):
        rows = [f"text number {n}\t{n / 7:.3f}" for n in range(60)]
        read_examples(write(tmp_path, "a.tsv", "\n".join(["sentence\tlabel", *rows])), "SEQ_CLS")
        assert "60 classes in 60 examples (0.000, " in caplog.text and "label_column" in caplog.text
        caplog.clear()
        rows = [f"text number {n}\t{n % 20}" for n in range(60)]
        read_examples(write(tmp_path, "b.tsv", "\n".join(["sentence\tlabel", *rows])), "SEQ_CLS")
        assert not caplog.text

    def test_a_folder_of_several_formats_is_refused(self, tmp_path):
        pytest.importorskip("datasets")
        write(tmp_path, "a.csv", TABLE)
        write(tmp_path, "b.jsonl", json.dumps(READ[0]))
        write(tmp_path, "README.txt", "about it")
        refused(tmp_path, "SEQ_CLS", str(tmp_path), "one format", ".csv, .jsonl")


GERMEVAL = (
    "#\thttp://de.wikipedia.org/wiki/Manfred [2009-10-17]\n"
    "1\tAnna\tB-PER\tO\n2\tLee\tI-PER\tO\n3\tsings\tO\tO\n\n"
    "#\thttp://de.wikipedia.org/wiki/Paris [2009-10-17]\n"
    "1\tin\tO\tO\n2\tParis\tB-LOC\tO\n"
)


class TestConll:
    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ("sentence\tlabel\ngood film\t1\nbad film\t0\n", "line 1: ['sentence', 'label'] looks like a header"),
            ("Word POS\nthe DET\ncat NOUN\n", "line 1: ['Word', 'POS'] looks like a header"),
            ("good film\t1\nbad film\t0\nfine\t1\n", "line 1: expected one word a line and its tag; got 'good film'"),
        ],
    )
    def test_a_table_is_no_list_of_words(self, tmp_path, content, part):
        refused(write(tmp_path, "a.tsv", content), "TOKEN_CLS", part, "a table of texts and labels is for SEQ_CLS")

    def test_a_comment_of_two_words_is_no_token_where_tabs_part_columns(self, tmp_path, caplog):
        path = write(tmp_path, "a.conll", "# newdoc\nthe\tDET\n#\tSYM\n\n# newpar\ncats\tNOUN\n")
        assert [example["tokens"] for example in read_examples(path, "TOKEN_CLS")] == [["the", "#"], ["cats"]]
        assert "2 comments" in caplog.text

    @pytest.mark.parametrize("comment", ["# id = 1", "# text = Anna sings here", "# id 5239d808\tdomain=en\tand so on"])
    @pytest.mark.parametrize("tagged", [True, False])
    def test_comments_are_no_tokens(self, tmp_path, caplog, comment, tagged):
        words = ["Anna B-PER", "sings O", "", "# O", "Bob B-PER"]
        lines = [comment, *words[:3], comment, comment, *words[3:]]
        if not tagged:
            lines = [line if line == comment else line.split(" ")[0] for line in lines]
        path = write(tmp_path, "a.conll", "\n".join(lines) + "\n")
        found = read_examples(path, "TOKEN_CLS", labelled=tagged)
        assert [example["tokens"] for example in found] == [["Anna", "sings"], ["#", "Bob"]]
        assert "3 comments" in caplog.text

    def test_counted_tokens_are_no_tokens(self, tmp_path, caplog):
        path = write(tmp_path, "a.conll", GERMEVAL)
        refused(path, "TOKEN_CLS", f"{path}, line 2", "counts", "--text-column 2 --label-column")
        refused(path, "TOKEN_CLS", f"{path}, line 2", "counts", labelled=False)
        found = read_examples(path, "TOKEN_CLS", text_column="2", label_column="3")
        assert found == [
            {"tokens": ["Anna", "Lee", "sings"], "tags": ["B-PER", "I-PER", "O"]},
            {"tokens": ["in", "Paris"], "tags": ["O", "B-LOC"]},
        ]
        assert "left out: 2 of 4 columns and 2 comments" in caplog.text
        assert read_examples(path, "TOKEN_CLS", text_column="2", labelled=False) == [
            {"tokens": example["tokens"]} for example in found
        ]

    @pytest.mark.parametrize(("text", "label"), [("5", "2"), ("2", "0"), ("words", "3"), ("2", "tag")])
    def test_columns_go_by_number(self, tmp_path, text, label):
        path = write(tmp_path, "a.conll", GERMEVAL)
        refused(path, "TOKEN_CLS", f"{path}, line 2", "columns numbered 1 to 4", text_column=text, label_column=label)

    def test_one_named_column_leaves_the_other_as_it_is(self, tmp_path):
        path = write(tmp_path, "a.conll", "Anna NNP B-PER\nsings VB O\n")
        assert read_examples(path, "TOKEN_CLS", text_column="1")[0]["tags"] == ["B-PER", "O"]
        assert read_examples(path, "TOKEN_CLS", label_column="3")[0]["tokens"] == ["Anna", "sings"]

    def test_lines_of_other_lengths_are_said(self, tmp_path, caplog):
        path = write(tmp_path, "a.conll", "Anna B-PER\nsings O\nNew York B-LOC\n")
        read_examples(path, "TOKEN_CLS")
        assert "line 3 has 3 columns, most have 2" in caplog.text

    def test_sentences_are_no_tokens(self, tmp_path):
        path = write(tmp_path, "a.txt", "Anna is here\nBob too\n")
        refused(path, "TOKEN_CLS", f"{path}, line 1", "one token a line", "standard input", labelled=False)
        tagged = write(tmp_path, "b.txt", "Anna B-PER\nis O\n")
        assert read_examples(tagged, "TOKEN_CLS", labelled=False) == [{"tokens": ["Anna", "is"]}]


class TestQuestions:
    context = "Paris lies on the Seine."

    def record(self, **changes):
        answers = {"text": ["Seine"], "answer_start": [18]}
        return {"question": "Where?", "context": self.context, "answers": answers, **changes}

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"is_impossible": False, "answers": []}, ["is_impossible is false", "answers"]),
            ({"is_impossible": "false"}, ["is_impossible", "true or false", "'false'"]),
        ],
    )
    def test_what_contradicts_itself_is_refused(self, tmp_path, changes, parts):
        path = write(tmp_path, "a.jsonl", json.dumps(self.record(**changes)))
        refused(path, "QUESTION_ANS", f"{path}, line 1", *parts)

    def test_a_question_has_the_context_of_its_paragraph(self, tmp_path):
        paragraph = {"context": self.context, "qas": [self.record(context="another text")]}
        path = write(tmp_path, "a.json", json.dumps({"data": [{"paragraphs": [paragraph]}]}))
        refused(path, "QUESTION_ANS", "data[0].paragraphs[0].qas[0]", "'context'", "paragraph")

    def test_ids_do_not_depend_on_where_the_file_lies(self, tmp_path):
        (tmp_path / "a, b").mkdir()
        for folder in (tmp_path, tmp_path / "a, b"):
            path = write(folder, "a.jsonl", json.dumps(self.record()) + "\n" + json.dumps(self.record()))
            assert [example["id"] for example in read_examples(path, "QUESTION_ANS")] == ["line 1", "line 2"]


def test_a_word_without_characters_is_refused(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"tokens": ["a", "", "b"], "tags": ["O", "B-X", "O"]}\n')
    refused(path, "TOKEN_CLS", f"{path}, line 1, token 2", "word", "''")


@pytest.mark.parametrize(
    ("task", "short", "long", "said"),
    [
        ("SEQ_CLS", {"text": "good"}, {"text": "good " * 9}, "1 of 2 texts"),
        ("SEQ_CLS", {"text": "good", "text_pair": "a"}, {"text": "a", "text_pair": "bad " * 9}, "1 of 2 texts"),
        ("TOKEN_CLS", {"tokens": ["good"]}, {"tokens": ["good"] * 9}, "1 of 2 sentences"),
        ("CAUSAL_LM", {"prompt": "a", "completion": "b"}, {"prompt": "a" * 9, "completion": "b"}, "1 of 2 examples"),
        ("CAUSAL_LM", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 9}, "1 of 2 examples"),
    ],
)
def test_what_is_cut_is_said(request, caplog, task, short, long, said):
    tokenizer = request.getfixturevalue("byte_tokenizer" if task == "CAUSAL_LM" else "tiny_tokenizer")
    codec = TaskCodec(task, tokenizer, max_length=8)
    codec.encode([short, short])
    codec.encode([long], quiet=True)
    assert not caplog.text
    codec.encode([short, long])
    assert f"{said} were cut at 8 tokens" in caplog.text
