import pytest

from pumice.jobs import read_pairs, read_prompts

GOOD = {
    "a.txt": b'\xef\xbb\xbfa red ball\n\n  two, "words" \r\n<b>bold</b>',
    "a.csv": b'id,prompt\n1,a red ball\n2,"two, ""words"""\n\n3,<b>bold</b>\n',
    "a.jsonl": b'{"prompt": "a red ball"}\n\n"two, \\"words\\""\n{"id": 3, "prompt": "<b>bold</b>"}\n',
}


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_list(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name])
    assert read_prompts(tmp_path / name) == ["a red ball", 'two, "words"', "<b>bold</b>"]


def test_a_field_of_a_csv_may_hold_a_line_break(tmp_path):
    (tmp_path / "a.csv").write_text('prompt\n"two\nlines"\none\n')
    assert read_prompts(tmp_path / "a.csv") == ["two\nlines", "one"]


BAD = {
    "empty text": ("a.txt", b"\n  \n", "has no prompts"),
    "not UTF-8": ("a.txt", b"good\nb\xff\xfed\n", "a.txt, line 2: not UTF-8"),
    "a NUL": ("a.txt", b"good\nb\0d\n", "a.txt, line 2: has a NUL"),
    "no column": ("a.csv", b"id,text\n1,a\n", "a.csv, line 1: the header needs one column 'prompt'"),
    "two columns": ("a.csv", b"prompt,prompt\na,b\n", "a.csv, line 1: the header needs one column 'prompt'"),
    "empty csv": ("a.csv", b"", "a.csv, line 1: the header"),
    "no rows": ("a.csv", b"prompt\n", "has no prompts"),
    "too many fields": ("a.csv", b"id,prompt\n1,a\n2,a,b\n", "a.csv, line 3: 3 fields, the header has 2"),
    "an open quote": ("a.csv", b'prompt\nok\n"open\n', "a.csv, line 3: unexpected end of data"),
    "an empty field": ("a.csv", b"id,prompt\n1,\n", "a.csv, line 2: has no prompt"),
    "not JSON": ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "a.jsonl, line 2: not JSON"),
    "no key": ("a.jsonl", b'{"text": "a"}\n', "a.jsonl, line 1: has no prompt"),
    "a number": ("a.jsonl", b'{"prompt": "a"}\n7\n', "a.jsonl, line 2: has no prompt"),
    "another kind": ("a.xlsx", b"", "is not a .txt, .csv, .jsonl file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD.keys())
def test_broken_lists_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^prompts: .*{message}") as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"^prompts: cannot read '.*gone.txt': No such file"):
        read_prompts(tmp_path / "gone.txt")


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "pictures" / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.csv", "picture,prompt\npictures/a.png,one\npictures/b.png,two\npictures/b.png, one \n"),
        (
            "l.jsonl",
            '{"prompt": "one", "picture": "pictures/a.png"}\n{"prompt": "two", "picture": "pictures/b.png"}\n'
            '{"prompt": "one", "picture": "pictures/b.png"}\n',
        ),
    ],
)
def test_pictures_by_prompt(pictures, name, content):
    (pictures / name).write_text(content)
    a, b = (pictures / "pictures" / file for file in ("a.png", "b.png"))
    assert read_pairs(pictures / name) == {"one": [a, b], "two": [b]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "one\n", "prompts: .* has no pictures"),
        ("l.csv", "prompt\none\n", "line 1: the header needs one column 'picture'"),
        ("l.csv", "prompt,picture\none,\n", "line 2: has no picture"),
        ("l.csv", "prompt,picture\none,pictures/c.png\n", r"pictures: l.csv, line 2: '.*c.png' is not there"),
        ("l.jsonl", '"one"\n', "line 1: has no picture"),
        ("l.csv", "prompt,picture\n", "has no prompts"),
    ],
)
def test_bad_pairs(pictures, name, content, message):
    (pictures / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(pictures / name)
