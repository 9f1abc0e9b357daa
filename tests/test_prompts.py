"""Files of prompts: what they mean, and that whatever is wrong with one is said with its place."""

import json

import pytest

from features.errors import ProbeError
from probe.prompts import read_prompts

CLASSES = ("benign", "grade 2: late", "X-ray")


def read(tmp_path, text, classes=CLASSES, *, findings=False, name="prompts.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_prompts(path, classes, findings=findings)


def test_every_prompt_goes_into_every_template_in_the_classes_order(tmp_path):
    text = """
        # of my data set
        template: a scan: {}.
        {} under a microscope
        X-ray : "a ray" | rays
        grade 2: late: late {stage}
        benign: nothing
    """.replace("{stage}", "stage: two")
    found = read(tmp_path, text)
    assert found.classes == CLASSES
    assert found.positive == (
        ("a scan: nothing.", "nothing under a microscope"),
        ("a scan: late stage: two.", "late stage: two under a microscope"),
        ("a scan: a ray.", "a ray under a microscope", "a scan: rays.", "rays under a microscope"),
    )
    assert found.negative == ()
    assert len(found.texts()) == 8


def test_what_the_file_looks_like_doesn_t_change_the_digest(tmp_path):
    plain = read(tmp_path, "{} there\nX-ray: a|b\ngrade 2: late: c\nbenign: d\n")
    windows = read(
        tmp_path, "\ufeff# x\r\nbenign:d\r\ngrade 2: late :c\r\nX-ray: b | a\r\n{} there"
    )
    values = {"benign": "d", "X-ray": ["a", "b"], "templates": "{} there", "grade 2: late": ["c"]}
    as_json = read(tmp_path, json.dumps(values), name="prompts.JSON")
    other = read(tmp_path, "{} there\nX-ray: a|b\ngrade 2: late: c\nbenign: e\n")
    assert plain.digest == windows.digest == as_json.digest != other.digest


def test_a_class_called_templates_and_findings_with_a_negative_side(tmp_path):
    found = read(tmp_path, '{"templates": "a", "b": "c"}', ("templates", "b"), name="p.json")
    assert found.positive == (("a",), ("c",))
    found = read(tmp_path, "edema: yes | no\nmass: it\nof {}", ("edema", "mass"), findings=True)
    assert found.positive == (("of yes",), ("of it",))
    assert found.negative == (("of no",), ())


FINE = "benign: a\ngrade 2: late: b\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has no prompts: want `class: prompt` for benign, grade 2: late, X-ray"),
        ("a {}\n# benign: a", "it has no prompts"),
        (FINE, "no prompt for X-ray. Want benign, grade 2: late, X-ray"),
        (FINE + "x-ray: c\nother: d", "no class of this data set is called x-ray, other; no prompt "
         "for X-ray; x-ray may be X-ray"),
        (FINE + "X-ray: c\nbenign: d", r"benign stands twice \(line 1 and line 4\): want its"),
        (FINE + "X-ray: c\na {}\n\na {}", "template 'a {}' is there twice"),
        (FINE + "X-ray: c | d |c", "line 3 has the prompt 'c' twice"),
        (FINE + "X-ray: c |", "line 3 has an empty prompt"),
        (FINE + "X-ray:", "line 3 has an empty prompt"),
        (FINE + "X-ray: a", "benign and X-ray have the same prompts"),
        (FINE + "X-ray: c\n{} and {}", "template '{} and {}' has 2 {}, want one"),
        (FINE + "X-ray: a {}", "line 3 has {} in the prompt of X-ray: .*`template: X-ray: a {}`"),
        (FINE + "X-ray: c {class}", "line 3 has braces in 'c {class}'"),
        (FINE + "X-ray", "line 3 is 'X-ray': want `class: prompt`, or a template with {}"),
        (FINE.encode() + "X-ray: Röntgen".encode("latin-1"), "line 3 is not UTF-8"),
        (FINE.encode("utf-16"), "line 1 is not UTF-8"),
        (FINE.encode("utf-16-le"), "zero bytes"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, said):
    with pytest.raises(ProbeError, match=r"prompts\.txt.*" + said):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has no prompts"),
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[1]", "want an object"),
        (r'{"a": "\ud800", "b": "c"}', "zeros or halves of characters"),
        (r'{"a": "x", "b": ["c", "\u0000"]}', "zeros or halves of characters"),
        ('{"a": 1, "b": "c"}', "a: want a text or a list of texts"),
        ('{"a": [], "b": "c"}', '"a" has an empty prompt'),
        ('{"a": "x", "b": "c", "a": "y"}', "a stands twice"),
        ('{"a": "x", "b": "y", "templates": ["no slot"]}', "'no slot' has 0 {}, want one"),
    ],
)
def test_what_is_wrong_with_json_is_said(tmp_path, text, said):
    with pytest.raises(ProbeError, match=r"p\.json: .*" + said):
        read(tmp_path, text, ("a", "b"), name="p.json")


def test_findings_have_two_sides_and_a_missing_file_is_said(tmp_path):
    with pytest.raises(ProbeError, match=r"line 1 has 3 prompts of edema: .*positive \| negative"):
        read(tmp_path, "edema: a | b | c", ("edema",), findings=True)
    with pytest.raises(ProbeError, match="nowhere: the prompts can't be read"):
        read_prompts(tmp_path / "nowhere", CLASSES, findings=False)
    with pytest.raises(ProbeError, match="the prompts can't be read"):
        read_prompts(tmp_path, CLASSES, findings=False)
