"""Answers in texts: canonical spellings, and votes that compare them."""

import pytest
from hypothesis import given, strategies as st

from ec_agents.candidates import Candidate
from ec_agents.scoring import MajorityVote, scorer_named
from ec_agents.scoring.answers import ANSWERS, answer_key, boxed, choice, code, last_line, last_number, voting_on


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("last-number", "First 3, then\nAnswer: $1,200.50.", "1200.5"),
        ("last-number", "3/4 of it", "3/4"),
        ("last-number", "x = -5 apples", "-5"),
        ("last-number", "2-1=1.0", "1"),
        ("last-number", "none", None),
        ("boxed", r"\boxed{1}, no, \boxed{\frac{1} {2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1", None),
        ("choice", "(A) is wrong. The answer is **(C)**.", "C"),
        ("choice", "It cannot be A, so\nB", "B"),
        ("choice", "A cat sat", None),
        ("last-line", "thinking\n\n**Answer: Yes.**\n", "yes"),
        ("code", "Here:\n```python\ndef f(x):\n    '''doc'''\n    return  x # it\n```", "def f(x):\n    return x"),
        ("code", "def f(:", "def f(:"),
    ],
)
def test_answers(name: str, text: str, answer: str | None):
    assert ANSWERS[name](text) == answer


@given(st.text())
def test_any_text(text: str):
    for find in (last_number, boxed, choice, last_line, code):
        found = find(text)
        assert found is None or found


@given(st.integers(-(10**12), 10**12))
def test_spellings_of_a_number(number: int):
    spellings = {f"so {number}", f"{number:,}.", f"= {number}.00", f"**{number}**"}
    assert {last_number(text) for text in spellings} == {str(number)}


def test_votes_compare_answers():
    """Different derivations of one number are one vote; tool calls stay actions; a text without a number abstains."""
    texts = ("2 + 2 = 5", "four: 4", "It is 4.0", "no idea")
    candidates = [Candidate(index=i, content=text) for i, text in enumerate(texts)]
    key = answer_key(last_number)
    assert MajorityVote()(candidates).tolist() == [1, 1, 1, 1]
    assert voting_on(MajorityVote(), key)(candidates).tolist()[:3] == [1, 2, 2]
    call = Candidate(index=0, content="7", tool_calls=[{"name": "f", "args": {}}])
    assert key(call) == answer_key(None)(call)
    names = scorer_named("majority-tool-names")
    assert voting_on(names, key) is names
