"""Remarks on data: equal ones are counted, and nothing of a file reaches a terminal raw or without end."""

from gptoss_jax.data.remarks import Remarks


def test_equal_remarks_are_one_counted_with_its_first_example() -> None:
    remarks = Remarks()
    for number in range(1, 1201):
        remarks.say("taken for ShareGPT", f"a.jsonl, line {number}")
    remarks.say("left out, of no kind that is read", "b.docx", "file")
    remarks.say("left out, of no kind that is read", "c.png", "file")
    remarks.say("dropped", "a.jsonl, line 7")
    assert remarks.lines() == [
        "taken for ShareGPT: 1,200 rows, first a.jsonl, line 1",
        "left out, of no kind that is read: 2 files, b.docx; c.png",
        "dropped: 1 row, a.jsonl, line 7",
    ]


def test_three_examples_are_named_and_of_more_the_first() -> None:
    for count, named in ((3, "line 1; line 2; line 3"), (4, "first line 1")):
        remarks = Remarks()
        for number in range(1, count + 1):
            remarks.say("dropped", f"line {number}")
        assert remarks.lines() == [f"dropped: {count} rows, {named}"]


def test_no_remark_is_no_line() -> None:
    assert Remarks().lines() == []


def test_an_example_steers_no_terminal_and_has_an_end() -> None:
    remarks = Remarks()
    remarks.say("left out", "a\x1b[2J\nb" + "c" * 10**6, "file")
    (line,) = remarks.lines()
    assert line.startswith("left out: 1 file, a\N{REPLACEMENT CHARACTER}[2J bccc")
    assert line.isprintable() and len(line) < 300
