from __future__ import annotations

import json
import lzma
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pathswitch.data import IndexedTokens, Prepared, Tokenizer, VersionText, load_prepared, prepare, train_tokenizer
from pathswitch.errors import ConfigError, DataError

CORPUS = Path(__file__).parents[3] / "launch" / "sotu"
SEPARATOR = "\n\n\n"


def text_of(version: int, split: str, pieces: int) -> str:
    with lzma.open(CORPUS / f"v{version}_{split}.txt.xz", "rt", encoding="utf-8") as file:
        return SEPARATOR.join(piece[:2000] for piece in file.read().split(SEPARATOR)[:pieces])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass
class Site:
    """A folder with the text of three versions, and the arguments to prepare it."""

    base: Path
    out: Path
    said: list[str] = field(default_factory=list)
    separator: str | None = SEPARATOR
    vocab_size: int = 340
    tokenizer_model: Path | None = None

    def versions(self, *numbers: int) -> list[VersionText]:
        return [VersionText(f"v{i}", (f"text/v{i}_train*.txt",), (f"text/v{i}_test.txt",)) for i in numbers]

    def prepare(self, *numbers: int, versions: list[VersionText] | None = None) -> Prepared:
        self.said.clear()
        return prepare(
            self.versions(*numbers) if versions is None else versions,
            base=self.base,
            out=self.out,
            vocab_size=self.vocab_size,
            tokenizer_model=self.tokenizer_model,
            separator=self.separator,
            progress=self.said.append,
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "text").mkdir()
    for version in (1, 2, 3):
        for split, pieces in (("train", 6), ("test", 3)):
            path = tmp_path / "text" / f"v{version}_{split}.txt"
            path.write_text(text_of(version, split, pieces), encoding="utf-8")
    return Site(tmp_path, tmp_path / "run" / "data")


def digests(prepared: Prepared) -> list[str]:
    return [prepared.version_digest(name) for name in prepared.names]


def decoded(prepared: Prepared, tokens: Any) -> list[str]:
    """The documents of a token file, by their end-of-sequence tokens."""
    documents: list[list[int]] = [[]]
    for token in tokens.tolist():
        if token == prepared.tokenizer.eos_id:
            documents.append([])
        else:
            documents[-1].append(token)
    assert documents.pop() == [], "the last token ends a document"
    return [prepared.tokenizer.decode(document) for document in documents]


def test_token_files_hold_the_text_of_their_version_and_split(site: Site) -> None:
    prepared = site.prepare(1, 2)
    for name in ("v1", "v2"):
        train, test = (
            (site.base / "text" / f"{name}_{split}.txt").read_text(encoding="utf-8") for split in ("train", "test")
        )
        assert decoded(prepared, prepared.train_tokens(name)) == train.split(SEPARATOR)
        assert decoded(prepared, prepared.test_tokens(name)) == test.split(SEPARATOR)
        assert prepared.test_bytes(name) == sum(len(piece.encode()) for piece in test.split(SEPARATOR))
    assert prepared.names == ("v1", "v2")


def test_the_files_are_under_their_documented_names(site: Site) -> None:
    prepared = site.prepare(1)
    assert set(files_of(site.out)) == {
        *("tokenizer.model", "data.json"),
        *("v1_train.bin", "v1_train.idx", "v1_test.bin", "v1_test.idx"),
    }
    assert IndexedTokens(site.out / "v1_test").tokens.tolist() == prepared.test_tokens("v1").tolist()


def test_the_record_counts_documents_tokens_and_bytes(site: Site) -> None:
    prepared = site.prepare(1)
    record = json.loads((site.out / "data.json").read_text())
    train = record["versions"]["v1"]["train"]
    assert record["format"] == 1
    assert record["tokenizer"] == prepared.tokenizer.digest
    assert train["documents"] == 6
    assert train["tokens"] == prepared.train_tokens("v1").size
    assert list(train["files"]) == ["text/v1_train.txt"]


def test_the_tokenizer_knows_the_first_versions_training_text_only(site: Site, tmp_path: Path) -> None:
    prepared = site.prepare(1, 2, 3)
    documents = (site.base / "text" / "v1_train.txt").read_text(encoding="utf-8").split(SEPARATOR)
    train_tokenizer(documents, vocab_size=site.vocab_size, model_path=tmp_path / "m")
    assert Tokenizer(tmp_path / "m").digest == prepared.tokenizer.digest


def test_a_second_call_does_nothing(site: Site) -> None:
    first = site.prepare(1, 2)
    assert len(site.said) == 5
    before = {path: path.stat().st_mtime_ns for path in [site.out, *site.out.iterdir()]}
    again = site.prepare(1, 2)
    assert site.said == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(set(digests(first))) == len(first.names)
    assert digests(again) == digests(first) == digests(load_prepared(site.out))


def test_a_further_version_touches_nothing_that_is_there(site: Site) -> None:
    first = site.prepare(1)
    before = files_of(site.out)
    longer = site.prepare(1, 2)
    after = files_of(site.out)
    assert {name for name in after if after[name] != before.get(name)} == {
        "data.json",
        *(f"v2_{split}.{ending}" for split in ("train", "test") for ending in ("bin", "idx")),
    }
    assert digests(longer)[: len(first.names)] == digests(first)
    assert longer.names == ("v1", "v2")


def test_a_version_may_leave_at_the_end_and_come_back(site: Site) -> None:
    first = site.prepare(1)
    both = site.prepare(1, 2)
    shorter = site.prepare(1)
    assert shorter.names == ("v1",)
    assert digests(shorter) == digests(first)
    with pytest.raises(DataError, match="'v2' is not prepared; prepared: v1"):
        shorter.train_tokens("v2")
    assert digests(site.prepare(1, 2)) == digests(both)
    assert site.said == []


def test_two_folders_from_the_same_text_are_equal(site: Site) -> None:
    site.prepare(1, 2)
    other = replace(site, out=site.base / "other", said=[])
    other.prepare(1)
    other.prepare(1, 2)
    assert files_of(other.out) == files_of(site.out)


def test_training_ranks_need_no_text(site: Site) -> None:
    prepared = site.prepare(1, 2)
    for path in (site.base / "text").iterdir():
        path.unlink()
    loaded = load_prepared(site.out)
    assert loaded.names == ("v1", "v2")
    assert loaded.train_tokens("v2").tolist() == prepared.train_tokens("v2").tolist()
    assert digests(loaded) == digests(prepared)


@pytest.mark.parametrize("split", ["train", "test"])
def test_text_that_changed_is_refused_by_name(site: Site, split: str) -> None:
    site.prepare(1, 2)
    before = files_of(site.out)
    path = site.base / "text" / f"v2_{split}.txt"
    path.write_text(path.read_text(encoding="utf-8") + "!", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(f"{path}: this file has changed since version 'v2'")):
        site.prepare(1, 2, 3)
    assert files_of(site.out) == before


def test_text_files_that_come_or_go_are_refused_by_name(site: Site) -> None:
    site.prepare(1)
    extra = site.base / "text" / "v1_train_more.txt"
    extra.write_text("more")
    with pytest.raises(DataError, match=re.escape(f"{extra}: this file is new")):
        site.prepare(1)
    (site.base / "text" / "v1_train.txt").unlink()
    with pytest.raises(DataError, match=r"v1_train\.txt: this file is gone"):
        site.prepare(1)


def test_moving_text_and_folder_together_is_no_change(site: Site) -> None:
    before = digests(site.prepare(1))
    (site.base / "moved").mkdir()
    for name in ("text", "run"):
        (site.base / name).rename(site.base / "moved" / name)
    moved = Site(site.base / "moved", site.base / "moved" / "run" / "data")
    assert digests(moved.prepare(1)) == before
    assert moved.said == []


def test_a_given_tokenizer_is_copied_and_kept(site: Site) -> None:
    model = site.base / "given.model"
    train_tokenizer([text_of(3, "train", 4)], vocab_size=333, model_path=model)
    site.tokenizer_model, site.vocab_size = model, 333
    prepared = site.prepare(1)
    assert (site.out / "tokenizer.model").read_bytes() == model.read_bytes()
    assert decoded(prepared, prepared.test_tokens("v1")) == text_of(1, "test", 3).split(SEPARATOR)
    site.prepare(1, 2)
    train_tokenizer([text_of(2, "train", 4)], vocab_size=333, model_path=model)
    with pytest.raises(ConfigError, match=re.escape(f"sha256 of tokenizer {model}: given")):
        site.prepare(1, 2)


def test_a_given_tokenizer_of_another_size_is_refused(site: Site) -> None:
    site.tokenizer_model = site.base / "given.model"
    train_tokenizer([text_of(3, "train", 4)], vocab_size=333, model_path=site.tokenizer_model)
    with pytest.raises(ConfigError, match="vocab_size: given 340; allowed: 333"):
        site.prepare(1)
    site.vocab_size = 333
    site.prepare(1)


def test_settings_other_than_the_folders_are_refused(site: Site) -> None:
    site.prepare(1, 2)
    with pytest.raises(ConfigError, match="vocab_size: given 350; allowed: 340, as in"):
        replace(site, vocab_size=350).prepare(1)
    with pytest.raises(ConfigError, match="separator: given None"):
        replace(site, separator=None).prepare(1)
    with pytest.raises(ConfigError, match="trained on: given 'v2'; allowed: 'v1'"):
        site.prepare(2, 1)


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "a/b", "v1\n"])
def test_bad_names_are_refused(site: Site, name: str) -> None:
    with pytest.raises(ConfigError, match="version name") as caught:
        site.prepare(versions=[replace(site.versions(1)[0], name=name)])
    assert repr(name) in str(caught.value)
    assert not site.out.exists()


def test_bad_lists_are_refused_before_anything_is_written(site: Site) -> None:
    with pytest.raises(ConfigError, match="which no other version has"):
        site.prepare(1, 2, 1)
    with pytest.raises(ConfigError, match="at least one version"):
        site.prepare()
    with pytest.raises(ConfigError, match=r"v9_train\*\.txt"):
        site.prepare(1, 9)
    assert not site.out.exists()


def overwrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def test_a_folder_that_is_damaged_is_refused(site: Site) -> None:
    site.prepare(1)
    good = files_of(site.out)
    cases: list[tuple[str, Callable[[bytes], bytes], str]] = [
        ("v1_train.bin", lambda data: data[:-2], "bytes found"),
        ("data.json", lambda data: data[:-5], "not the record of a prepared folder"),
        ("data.json", lambda data: data.replace(b'"format": 1', b'"format": 2'), "format 2; allowed: 1"),
        ("data.json", lambda data: data.replace(b'"documents"', b'"papers"'), "not the record"),
        ("data.json", lambda _: b"[]", "not the record"),
        ("tokenizer.model", lambda _: b"", "SentencePiece"),
    ]
    for name, change, says in cases:
        overwrite(site.out / name, change)
        with pytest.raises(DataError, match=re.escape(says)):
            load_prepared(site.out)
        with pytest.raises(DataError, match=re.escape(says)):
            site.prepare(1)
        (site.out / name).write_bytes(good[name])
    assert load_prepared(site.out).names == ("v1",)


def test_another_tokenizer_or_other_token_files_under_the_same_names_are_refused(site: Site) -> None:
    site.prepare(1, 2)
    for ending in ("bin", "idx"):
        (site.out / f"v2_test.{ending}").replace(site.out / f"v1_test.{ending}")
    with pytest.raises(DataError, match=r"v1_test\.bin: \d+ tokens found, \d+ recorded"):
        load_prepared(site.out)
    train_tokenizer([text_of(3, "train", 4)], vocab_size=340, model_path=site.out / "tokenizer.model")
    with pytest.raises(DataError, match=r"tokenizer\.model: given sha256"):
        load_prepared(site.out)


def test_a_folder_without_a_record_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "data.json"))):
        load_prepared(tmp_path)


def killed_at(event: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a child that dies at its n-th sync or rename; False when it came to its end."""
    child = os.fork()
    if child == 0:
        left = [event]

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return call(*arguments)

            return wrapped

        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.slow
def test_killed_at_any_point_the_next_call_completes(site: Site) -> None:
    before = digests(site.prepare(1, 2))
    whole = files_of(site.out)
    for event in range(100):
        folder = replace(site, out=site.base / f"killed{event}", said=[])
        if not killed_at(event, lambda folder=folder: folder.prepare(1, 2)):  # type: ignore[misc]
            break
        assert ("data.json" not in files_of(folder.out)) or load_prepared(folder.out).names in (("v1",), ("v1", "v2"))
        assert digests(folder.prepare(1, 2)) == before
        left = files_of(folder.out)
        assert {name: left.get(name) for name in whole} == whole
        assert all(name.startswith(("data.json.", "tokenizer.model.")) for name in left.keys() - whole.keys())
    assert event > 30, "every sync and rename of the tokenizer, four token files and two records was a place to die"
