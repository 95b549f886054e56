"""Kinds of files and folders: CoNLL-U, Parquet, what `datasets` saved, packed files, splits; columns of 0 and 1."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

from ptv2_fast.training.data import read_examples

TABLE = "text,label\nfine day,good\ngrey day,bad\n"
READ = [{"text": "fine day", "label": "good"}, {"text": "grey day", "label": "bad"}]
CONLLU = (
    "# sent_id = 1\n# text = Vámonos al mar\n"
    "1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_\n"
    "1\tVamos\tir\tVERB\tV\t_\t0\troot\t_\t_\n2\tnos\tnosotros\tPRON\tP\t_\t1\tobj\t_\t_\n"
    "2.1\tya\tya\tADV\tR\t_\t_\t_\t_\t_\n"
    "3-4\tal\t_\t_\t_\t_\t_\t_\t_\t_\n3\ta\ta\tADP\tS\t_\t5\tcase\t_\t_\n"
    "4\tel\tel\tDET\tD\t_\t5\tdet\t_\t_\n5\tmar\tmar\tNOUN\tN\t_\t1\tobl\t_\t_"
)


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def refused(path, task, *parts, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_examples(path, task, **options)
    assert not [part for part in parts if str(part) not in str(caught.value)], caught.value


class TestConllu:
    def test_words_have_one_column_of_tags(self, tmp_path, caplog):
        path = write(tmp_path, "a.conllu", CONLLU)
        words = ["Vamos", "nos", "a", "el", "mar"]
        assert read_examples(path, "TOKEN_CLS") == [{"tokens": words, "tags": ["VERB", "PRON", "ADP", "DET", "NOUN"]}]
        assert "left out: 2 comments" in caplog.text and "left out: 3 ranges and empty words" in caplog.text
        assert read_examples(path, "TOKEN_CLS", label_column="deprel")[0]["tags"][0] == "root"
        assert read_examples(path, "TOKEN_CLS", text_column="lemma", label_column="5")[0]["tags"][0] == "V"
        assert read_examples(path, "TOKEN_CLS", labelled=False) == [{"tokens": words}]

    def test_refusals(self, tmp_path):
        path = write(tmp_path, "a.conllu", CONLLU)
        refused(path, "TOKEN_CLS", "upos", "'pos'", label_column="pos")
        refused(path, "SEQ_CLS", "TOKEN_CLS")
        refused(write(tmp_path, "b.conllu", "1\ta\tb\n"), "TOKEN_CLS", "line 1", "10 columns", "got 3")
        refused(write(tmp_path, "c.conllu", CONLLU.replace("\n5\t", "\n6\t")), "TOKEN_CLS", "number 5", "'6'")
        refused(write(tmp_path, "d.conll", CONLLU.split("\n", 2)[2]), "TOKEN_CLS", "--format conllu")


class TestFiles:
    def test_packed_files_are_read_like_others(self, tmp_path):
        packed = gzip.compress(TABLE.encode())
        assert read_examples(write(tmp_path, "a.csv.gz", packed), "SEQ_CLS") == READ
        refused(write(tmp_path, "b.csv.gz", packed[:-9]), "SEQ_CLS", "b.csv.gz", "gzip")

    def test_a_format_is_named_where_the_suffix_says_nothing(self, tmp_path):
        path = write(tmp_path, "eng.train", "EU B-ORG\nrejects O\n")
        refused(path, "TOKEN_CLS", "'.train'", "--format")
        assert read_examples(path, "TOKEN_CLS", format="conll")[0]["tags"] == ["B-ORG", "O"]
        refused(path, "TOKEN_CLS", "format: must be one of csv, tsv", "'xml'", format="xml")
        assert read_examples(write(tmp_path, "table.dat", TABLE), "SEQ_CLS", format="csv") == READ


class TestArrow:
    @pytest.fixture
    def pyarrow(self):
        return pytest.importorskip("pyarrow")

    def table(self, pyarrow, labels=("good", "bad")):
        return pyarrow.table({"text": ["fine day", "grey day"], "label": list(labels)})

    def test_parquet(self, pyarrow, tmp_path):
        import pyarrow.parquet as parquet

        path = tmp_path / "a.parquet"
        parquet.write_table(self.table(pyarrow), path)
        assert read_examples(path, "SEQ_CLS") == READ
        parquet.write_table(self.table(pyarrow, (1.5, None)), path)
        refused(path, "SEQ_CLS", f"{path}, row 0", "label", "1.5")
        refused(write(tmp_path, "b.parquet", b"PAR1 and no more"), "SEQ_CLS", "b.parquet", "Parquet")
        # Somebody has replaced a column that `datasets` had described.
        described = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}}}}
        for labels in (("good", "bad"), (1.5, None)):
            table = self.table(pyarrow, labels).replace_schema_metadata({"huggingface": json.dumps(described)})
            parquet.write_table(table, path)
            if labels[1] is not None:
                assert read_examples(path, "SEQ_CLS") == READ
        refused(path, "SEQ_CLS", f"{path}, row 0", "label", "1.5", "--problem-type regression")
        shards = [tmp_path / "data" / f"{name}.parquet" for name in ("test-0", "train-00000-of-2", "train-00001-of-2")]
        shards[0].parent.mkdir()
        for number, shard in enumerate(shards):
            parquet.write_table(self.table(pyarrow).slice(0, 1 + number % 2), shard)
        assert len(read_examples(tmp_path / "data", "SEQ_CLS", split="train")) == 3
        refused(tmp_path / "data", "SEQ_CLS", "split (--split)", "['test', 'train']")

    def test_what_datasets_wrote_is_read_without_it(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        names = ["O", "B-PER", "I-PER"]
        features = datasets.Features(
            tokens=datasets.List(datasets.Value("string")), ner_tags=datasets.List(datasets.ClassLabel(names=names))
        )
        rows = {"tokens": [["Anna", "Lee"], ["sings"]] * 3, "ner_tags": [[1, 2], [0]] * 3}
        saved = datasets.Dataset.from_dict(rows, features=features)
        datasets.DatasetDict({"train": saved, "validation": saved.select([0])}).save_to_disk(tmp_path / "both")
        saved.save_to_disk(tmp_path / "one", num_shards=2)
        saved.to_parquet(tmp_path / "one.parquet")
        code = f"""
import sys
from ptv2_fast.training.data import read_examples
for place, split in (("both", "train"), ("one", None), ("one.parquet", None)):
    found = read_examples({str(tmp_path)!r} + "/" + place, "TOKEN_CLS", split=split)
    assert len(found) == 6 and found[0] == {{"tokens": ["Anna", "Lee"], "tags": ["B-PER", "I-PER"]}}, (place, found)
assert len(read_examples({str(tmp_path / "both")!r}, "TOKEN_CLS", split="dev")) == 1
print(sorted({{"datasets", "torch", "transformers", "numpy"}} & set(sys.modules)))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() in ("[]", "['numpy']"), "pyarrow alone may want numpy"

    def test_a_damaged_folder_is_named(self, tmp_path):
        write(tmp_path, "state.json", '{"_data_files": [{"filename": "../up.arrow"}]}')
        refused(tmp_path, "SEQ_CLS", "state.json", "Arrow files")
        write(tmp_path, "state.json", '{"_data_files": [{"filename": "a.arrow"}]}')
        refused(tmp_path, "SEQ_CLS", "a.arrow", "there is none")
        state = {"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}
        write(tmp_path, "state.json", json.dumps(state))
        refused(tmp_path, "SEQ_CLS", "state.json", "flatten_indices")

    @pytest.mark.parametrize("place", ["./no/such", "no/such/folder", "C:\\data", "no such"])
    def test_what_can_be_no_name_on_the_hub_is_not_asked_for(self, tmp_path, monkeypatch, place):
        monkeypatch.setitem(sys.modules, "datasets", None)
        for name in (place, str(tmp_path / "nosuch")):
            with pytest.raises(FileNotFoundError, match="expected a data file .*; there is none"):
                read_examples(name, "SEQ_CLS")


class TestFolders:
    def test_splits_are_told_by_names(self, tmp_path):
        write(tmp_path, "train.conll", "Anna B-PER\n")
        write(tmp_path, "dev.conll", "Bob B-PER\n")
        write(tmp_path, "nested/test_1.conll", "Lee B-PER\n")
        write(tmp_path, "README.txt", "about it")
        for split, word in (("train", "Anna"), ("dev", "Bob"), ("validation", "Bob"), ("test", "Lee")):
            assert read_examples(tmp_path, "TOKEN_CLS", split=split)[0]["tokens"] == [word]
        write(tmp_path, "more.conll", "Eve B-PER\n")
        refused(tmp_path, "TOKEN_CLS", "train, dev or test", "more.conll", split="train")

    def test_files_without_such_names_are_one_split(self, tmp_path):
        write(tmp_path, "a.csv", TABLE)
        write(tmp_path, "b.csv", "text,label\nnew day,good\n")
        assert read_examples(tmp_path, "SEQ_CLS") == [*READ, {"text": "new day", "label": "good"}]
        (tmp_path / "empty").mkdir()
        refused(tmp_path / "empty", "SEQ_CLS", "data files", "got none")


class TestFlags:
    problem = {"problem_type": "multi_label_classification"}

    def test_columns_of_0_and_1_are_labels(self, tmp_path):
        path = write(tmp_path, "a.csv", "id,text,toxic,severe\n1,you fool,1,0\n2,fine day,0,0\n3,fool and more,1,1\n")
        found = [example["labels"] for example in read_examples(path, "SEQ_CLS", **self.problem)]
        assert found == [["toxic"], [], ["severe", "toxic"]]
        one = read_examples(path, "SEQ_CLS", label_column=["severe", "toxic"], **self.problem)
        assert [example["labels"] for example in one] == found
        refused(path, "SEQ_CLS", "several columns", "multi_label_classification", label_column=["toxic", "severe"])
        refused(path, "SEQ_CLS", "'severe'", "not seen in training", labels=["toxic"], **self.problem)

    def test_what_is_neither_is_refused(self, tmp_path):
        path = write(tmp_path, "a.csv", "text,toxic,severe\nyou fool,1,\nfine day,0,0\n")
        names = ["toxic", "severe"]
        refused(path, "SEQ_CLS", "line 2", "0 or 1 in 'severe'", "''", label_column=names, **self.problem)

    def test_other_signs_part_no_labels(self, tmp_path, caplog):
        path = write(tmp_path, "a.csv", 'text,labels\na b,"news,sport"\nc d,news\n')
        assert read_examples(path, "SEQ_CLS", **self.problem)[0]["labels"] == ["news,sport"]
        assert "labels are parted by '|' alone" in caplog.text


def test_a_class_that_was_an_empty_cell_is_asked_about(tmp_path, caplog):
    read_examples(write(tmp_path, "a.csv", "text,label\na b,nan\nc d,1\n"), "SEQ_CLS")
    assert "a class is called 'nan'" in caplog.text
