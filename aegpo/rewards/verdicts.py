"""What a language model decided, read off the last line of its answer; None where that is not said without a doubt.

A number or a letter somewhere in an answer is no verdict: "I can count 2", "8 (on a scale from 0 to 10)" and "A circle
is in both" have one, too. So the last line must hold one candidate alone; where it does not, the model is asked again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LONGEST = 1000  # characters of a line that may be a verdict
_DIGITS = r"\d+(?:[.,]\d+)?"
_SIGNED = rf"[-+\u2212]?{_DIGITS}"
_ENDS = r"(?!\w|[.,]\d)"  # of a number: the 1.2 of 1.2.3 is none
_NUMBER = re.compile(rf"(?<![\w.,])[-+\u2212\u2013\u2014]?{_DIGITS}{_ENDS}")
_OF = re.compile(rf"(?:[/\u2044\u2215\uff0f]|\bout\s+of\b|\bscale\s+of\b)\s*({_SIGNED}){_ENDS}", re.IGNORECASE)
_BETWEEN = r"(?:\bto\b|\band\b|[-\u2013\u2014]|\.\.\.?)"
_FROM_TO = re.compile(
    rf"(?:\b(?:from|between)\s+)?(?<![\w.,])({_SIGNED})\s*{_BETWEEN}\s*({_SIGNED}){_ENDS}", re.IGNORECASE
)
_DOUBTFUL = re.compile(  # 8 %, 8th, 7,500, .5 and minus 3: more than the number that would be read
    r"\d\s*%|(?<!\w)\d[\d.,]*[^\W\d]|\d,\d{3}(?!\d)|(?<!\d)[.,]\d|\bminus\b|\bnegative\b", re.IGNORECASE
)
_CHOICE = re.compile(r"(?<!\w)(A|B|TIE|Tie|tie)(?!\w)")
_SHARES = {"A": 1.0, "B": 0.0, "TIE": 0.5}
_LEADING = frozenset(  # words that leave the letter after them what it is; "not" and "worse" do not
    {"the", "my", "it", "is", "i", "one", "so", "therefore", "thus", "hence", "overall", "final", "better", "best"}
    | {"answer", "choice", "verdict", "preference", "decision", "result", "winner", "picture", "image", "photo"}
    | {"option", "prefer", "choose", "pick", "would"}
)


def read_grade(answer: str, lowest: float, highest: float) -> float | None:
    """The one number of the last line, the scale that was asked for aside: "7/10", "7 out of 10", "7 (from 0 to 10)".

    Without any, with two, or with one outside of the scale there is none. "7,5" is seven and a half.
    """
    line = _last_line(answer)
    line = _OF.sub(lambda found: "" if _value(found[1]) == highest else found[0], line)
    line = _FROM_TO.sub(lambda found: "" if _is_scale(found, lowest, highest) else found[0], line)
    numbers: Sequence[str] = _NUMBER.findall(line)
    if len(numbers) != 1 or _DOUBTFUL.search(line):
        return None
    grade = _value(numbers[0])
    return grade if lowest <= grade <= highest else None


def read_choice(answer: str) -> float | None:
    """1 if the last line ends with A as the choice, 0 with B, a half with TIE, None where none or several are named.

    An article is no choice, nor is a letter after words that may turn it around: "A circle", "the worse one is A".
    """
    line = _last_line(answer)
    choices = _CHOICE.findall(line)
    before, _, after = line.rpartition(choices[-1]) if choices else ("", "", "")
    if len(choices) != 1 or re.search(r"\w", after):
        return None
    words = re.findall(r"[^\W\d]+", before.lower())
    return _SHARES[choices[0].upper()] if set(words) <= _LEADING else None


def _last_line(answer: str) -> str:
    """The last line with a letter or a digit, which a line of dashes or of a code fence has not; none if too long."""
    line = next((line for line in reversed(answer.splitlines()) if re.search(r"[^\W_]", line)), "")
    return line if len(line) <= _LONGEST else ""


def _is_scale(found: re.Match[str], lowest: float, highest: float) -> bool:
    return (_value(found[1]), _value(found[2])) == (lowest, highest)


def _value(number: str) -> float:
    return float(re.sub("[\u2212\u2013\u2014]", "-", number).replace(",", "."))
