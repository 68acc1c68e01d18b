"""util/schema.py and its readers: JSON, CSV and names that are not what they should be."""

import json
import multiprocessing
import os
import tracemalloc

import pytest
from PIL import Image

from evaluation import pairsets, results
from evaluation.captions import read_captions
from util.schema import check, read_json

ITEMS = {"name?": str, "items": [{"id?": (int, str), "weight?": float, "captions": [str]}]}
ONE = {"captions": ["a"]}


@pytest.mark.parametrize(
    "value, complaint",
    [
        ({"items": [ONE, ONE, ONE, {"captions": 5}]}, "items[3].captions: expected list, found n"),
        ({"items": [{"captions": ["a", None]}]}, "items[0].captions[1]: expected text, found null"),
        ({"items": [{"captions": "a dog"}]}, "items[0].captions: expected list, found text"),
        ({"items": [{"id": True, **ONE}]}, "id: expected whole number or text, found true or fal"),
        ({"items": [{"id": 1.5, **ONE}]}, "items[0].id: expected whole number or text, found num"),
        ({"items": [{"weight": float("nan"), **ONE}]}, "[0].weight: expected number, found nan"),
        ({"items": [{"weight": 10**400, **ONE}]}, "expected number, found number of 401 digits"),
        ({"items": [], "name": -(10**400)}, "name: expected text, found number of 401 digits"),
        ({"items": [{"captoins": []}]}, "items[0]: captions is missing"),
        ({"items": [], "nmae": "x"}, "nmae is unknown (did you mean name?)"),
        ({"items": [{"captions": ["\ud800"]}]}, "expected text, found text that is no Unicode"),
        ({"items": [], "\x1b[2J": 1}, "\\x1b[2J is unknown"),
        ([], "the file: expected object, found list"),
        (None, "the file: expected object, found null"),
    ],
)  # fmt: skip
def test_the_place_of_the_fault_is_named(value, complaint):
    with pytest.raises(ValueError) as error:
        check(value, ITEMS)
    assert str(error.value).startswith(complaint) or complaint in str(error.value)


def test_what_is_right_passes():
    check({"items": [{"id": 10**400, "weight": 1, **ONE}, {"id": "x", "captions": []}]}, ITEMS)
    check({"a": 1, "b": {}}, {"a": int, ...: object})
    check([1, "x", None], [(int, str, object)])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"a": 1} {}', bytes(100)]
)
def test_what_is_no_json_is_a_line(tmp_path, content):
    (tmp_path / "\x1b.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"--flag .*\\x1b.json is not JSON") as error:
        read_json(tmp_path / "\x1b.json", object, "--flag")
    assert len(str(error.value)) < 400
    (tmp_path / "mark.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "mark.json", [int], "") == [1]


# -- sets of pairs -------------------------------------------------------------------------------
def test_a_misspelt_key_of_a_set_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {"image": "a.png", "captions": ["x", "y"]}
    file = tmp_path / "set.json"
    for content, words in (
        ({"items": [good], "templte": "a {}"}, "templte is unknown .did you mean template"),
        ({"items": [{**good, "catgory": "x"}]}, r"items\[0\].catgory is unknown .did you mean cat"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words):
            pairsets.read_json(file)


def test_what_moves_a_cursor_is_escaped_where_a_set_is_shown(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    entry = {"id": "\x1b[2J", "category": "a\nb\x07", "image": "a.png", "captions": ["x", "y"]}
    (tmp_path / "set.json").write_text(json.dumps({"name": "\x1bc", "items": [entry]}))
    found = pairsets.read_json(tmp_path / "set.json")
    assert (found.name, found.items[0].name) == ("\\x1bc", "\\x1b[2J")
    assert found.items[0].category == "a b\\x07"
    (tmp_path / "doubts.json").write_text(json.dumps({"swap": ["\x1b[2J"]}))
    [swapped] = pairsets.apply_doubts(found.items, tmp_path / "doubts.json")
    assert swapped.captions == ("y", "x")


@pytest.mark.parametrize(
    "doubts, words",
    [
        ({"leave_out": "12"}, "leave_out: expected list, found text"),
        ({"leaveout": [1]}, "leaveout is unknown (did you mean leave_out?)"),
        ({"swap": [1.5]}, "swap[0]: expected whole number or text, found number"),
        ({"swap": [None]}, "swap[0]: expected"),
        ([1], "expected object, found list"),
        ({"swap": list(range(100_000))}, "names 0, 10, 100, 1000, 10000"),
    ],
)
def test_doubts_of_another_shape_are_refused(tmp_path, doubts, words):
    items = [pairsets.Item("all", ("a", "b"), ("x", "y"), "1-2")]
    (tmp_path / "doubts.json").write_text(json.dumps(doubts))
    with pytest.raises(ValueError) as error:
        pairsets.apply_doubts(items, tmp_path / "doubts.json")
    assert words in str(error.value) and len(str(error.value)) < 500


@pytest.fixture
def mmvp(tmp_path):
    """Write Questions.csv beside a folder of pictures."""
    (tmp_path / "MMVP_VLM_Images" / "Color").mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (8, 8)).save(tmp_path / "MMVP_VLM_Images" / "Color" / f"{number}.jpg")

    def write(rows):
        head = b"Question ID,Type,Statement\n"
        (tmp_path / "Questions.csv").write_bytes(head + rows)
        return tmp_path

    return write


def test_a_question_of_a_huge_number_takes_no_memory(mmvp):
    folder = mmvp(b"1,Color,a\n2,Color,b\n1000000000,Color,c\n")
    tracemalloc.start()
    with pytest.raises(ValueError, match="lacks 999999997 of the ids 1 to 1000000000: 3, 4, 5"):
        pairsets.read_mmvp(folder)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "rows, words",
    [
        (b"0,Color,a\n1,Color,b\n", "has id 0"),
        (b"-5,Color,a\n2,Color,b\n", "has id -5"),
        (b"9" * 5000 + b",Color,a\n", "is not a number"),
        (b"1,Color,\xe9\n", "cannot be read as a table"),
        (b'1,Color,"' + b"x" * 200_000 + b'"\n', "cannot be read as a table"),
        (b"1\n", "has no Type"),
        (b"1,../../etc,a\n2,../../etc,b\n", "picture 1.jpg is missing"),
    ],
)
def test_tables_of_another_shape_are_a_line(mmvp, rows, words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        pairsets.read_mmvp(mmvp(rows))
    assert words in str(error.value) and len(str(error.value)) < 400


# -- captions ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "content, words",
    [
        ([{"file": "a.png", "captions": "a dog"}], "[0].captions: expected list, found text"),
        ([{"file": ["a.png"], "captions": []}], "[0].file: expected text, found list"),
        ({"images": 5, "annotations": []}, "images: expected list, found number"),
        ({"images": [{"id": [], "file_name": "x"}], "annotations": []}, "images[0].id: expected"),
        ({"images": [{"id": 1, "file_name": "a.png"}],
          "annotations": [{"image_id": 2, "caption": "x"}]},
         "annotations[0].image_id: no image has that id"),
        ({"images": [{"filename": "a.png", "sentences": "abc"}]}, "[0].sentences: expected list"),
        ({"images": [{"filename": "a.png", "sentences": ["abc"]}]}, "[0].sentences[0]: expected"),
        ({"pictures": []}, "none of the known formats"),
        ("images", "none of the known formats"),
        ([{"file": "\x1b[2J.png", "captions": ["a"]}], "\\x1b[2J.png is missing"),
    ],
)  # fmt: skip
def test_captions_of_another_shape_are_named(tmp_path, content, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_captions(str(tmp_path / "c.json"), "")
    assert words in str(error.value)


def test_a_table_of_captions_that_is_no_text_is_named(tmp_path):
    (tmp_path / "c.csv").write_bytes(b"a.png| 0| \xff\n")
    with pytest.raises(ValueError, match="c.csv cannot be read as a table"):
        read_captions(str(tmp_path / "c.csv"), "")


# -- results -------------------------------------------------------------------------------------
def take(folder, gate, asked, found):
    gate.wait()
    found.put((asked, results.place(folder, "toy", {"asked": asked}).name))


def test_evaluations_at_the_same_time_take_different_names(tmp_path):
    """Eight at once, two of each kind: the same question has one name, another has another."""
    context = multiprocessing.get_context("fork")
    gate, found = context.Barrier(8), context.Queue()
    asked = [number // 2 for number in range(8)]
    everybody = [context.Process(target=take, args=(tmp_path, gate, a, found)) for a in asked]
    for one in everybody:
        one.start()
    names = [found.get(timeout=60) for _ in everybody]
    for one in everybody:
        one.join()
    assert len(set(names)) == 4 and len({name for _, name in names}) == 4
    assert sorted(os.listdir(tmp_path)) == ["toy-2.json", "toy-3.json", "toy-4.json", "toy.json"]
    for asked, name in names:
        assert json.loads((tmp_path / f"{name}.json").read_text()) == {
            "evaluation": {"asked": asked}
        }


def test_a_result_that_is_brackets_alone_is_somebody_elses(tmp_path):
    (tmp_path / "toy.json").write_text("[" * 100_000)
    assert results.place(tmp_path, "toy", {}).name == "toy-2"


def test_a_disk_without_links_will_do(tmp_path, monkeypatch):
    def link(*paths):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert results.place(tmp_path, "toy", {"a": 1}).name == "toy"
    assert results.place(tmp_path, "toy", {"a": 2}).name == "toy-2"
    assert results.place(tmp_path, "toy", {"a": 1}).name == "toy"
    assert len(os.listdir(tmp_path)) == 2
