"""Sentences of real reviews with their ratings, which pip fetches from PyPI and which stay in a cache folder.

    python -m ptv2_fast.demo.reviews

fetches them beforehand. They come with vaderSentiment 0.5 (MIT licence), whose source archive holds another one with
snippets of film and product reviews and the mean of twenty people's ratings of each, from -4 to 4.

Source: Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, 2014.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]

REQUIREMENT = "vaderSentiment==0.5"
ARCHIVE = "vaderSentiment-0.5.zip"
DIGEST = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
_INNER = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_SNIPPETS = "hutto_ICWSM_2014/{}ReviewSnippets_GroundTruth.txt"
# Ratings nearer to 0 are of sentences that people do not agree on, or that say nothing good or bad.
_CLEAR = 0.7
# A machine without a network has its answer at once, one behind a firewall after two of pip's tries of ten seconds.
_PIP = ("--quiet", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "10")
_SECONDS = 180


class Unavailable(Exception):
    """The reviews cannot be had; the message says why, in a few words."""


def archive(folder: Path | None = None) -> Path:
    """The package's source archive in the cache folder, fetched if it is not there.

    Raises:
        Unavailable: there is none and pip brings none, or what is there has another digest.
    """
    folder = folder or cache_folder()
    path = folder / ARCHIVE
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(path)
        content = path.read_bytes()
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != DIGEST:
        raise Unavailable(f"{path} is another file than expected (sha256)")
    return path


def cache_folder() -> Path:
    """Where the archive is kept: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptv2_fast"


def _fetch(path: Path) -> None:
    """Let pip download the archive; it looks at the digest before it looks into the file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        wanted = Path(place, "wanted.txt")
        wanted.write_text(f"{REQUIREMENT} --hash=sha256:{DIGEST}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", *_PIP, "--no-deps", "--no-binary", "vaderSentiment"]
        command += ["--require-hashes", "--requirement", str(wanted), "--dest", place]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"pip did not bring {REQUIREMENT} within {_SECONDS} s") from None
        if done.returncode or not Path(place, ARCHIVE).is_file():
            raise Unavailable(f"pip could not bring {REQUIREMENT}")
        os.replace(Path(place, ARCHIVE), path)


def snippets(path: Path, kind: str) -> list[Row]:
    """The snippets of "movie" or "amazon" with a clear rating, each once, in an order that chance made once for all.

    Read from memory: nothing of the archive is written anywhere.
    """
    with zipfile.ZipFile(path) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(_INNER))) as inner:
        file = inner.extractfile(_SNIPPETS.format(kind))
        assert file is not None, "a file, as the digest says"
        text = file.read().decode("utf-8")
    rows: dict[str, Row] = {}
    for line in text.split("\r\n"):
        if line:
            _, rating, snippet = line.split("\t", 2)
            if abs(float(rating)) >= _CLEAR:
                label = "positive" if float(rating) > 0 else "negative"
                rows.setdefault(_plain(snippet), {"text": snippet.strip(), "label": label})
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    return shuffled


def _plain(text: str) -> str:
    """What two equal sentences have in common."""
    return "".join(character for character in text.lower() if character.isalnum())


def split_balanced(rows: list[Row], count: int) -> tuple[list[Row], list[Row]]:
    """The first `count` rows of which half are of each class, in turn, and the others."""
    halves = [[row for row in rows if row["label"] == label][: count // 2] for label in ("positive", "negative")]
    taken = [row for pair in zip(*halves, strict=True) for row in pair]
    gone = {id(row) for row in taken}
    return taken, [row for row in rows if id(row) not in gone]


if __name__ == "__main__":
    # Who has no network hears of it from the demo, which goes on without.
    with suppress(Unavailable):
        archive()
