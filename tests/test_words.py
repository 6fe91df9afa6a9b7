"""Test that prose has no words that only the project's authors would understand, and that commit subjects are short."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".md", ".sh", ".toml", ".yml", ".yaml", ".cff"}
# Maps each forbidden word to its replacement. The parts of identifiers also count as words.
PRIVATE = {
    "door": "integration",
    "doors": "integrations",
    "hastened": "fast",
    "nobody": "name the subject",
    "whoever": "name the subject",
    "theirs": "name the owner",
    "its own": "separate, its",
    "their own": "separate, their",
    "stands in": "is in, replaces",
    "stand in": "are in, replace",
    "standing in": "in, replacing",
    "stands for": "means, replaces",
    "lies in": "is in",
    "lie in": "are in",
    "lies on": "is on",
    "lie on": "are on",
    "beside": "next to, in addition to, compared with",
    "behind": "after",
    "judgement": "evaluation",
    "judge": "evaluate",
    "judged": "evaluated",
    "handed": "passed",
    "in one piece": "atomically",
    "equal to the bit": "bit-identical",
    "to the bit": "bit-identical",
    "left out": "skipped",
    "anew": "again",
    "at hand": "available",
    "takes part": "is valid",
    "take part": "are valid",
    "taking part": "valid",
    "takes no part": "is not valid",
    "has no part": "is not used",
    "taken": "valid, mask",
    "wrong has no speed": "incorrect results are not timed",
    "whereof": "of which",
    "thereof": "of it",
    "hereof": "of this",
    "wherever else": "elsewhere",
}
# Maps (file, word) to the reason why the word may stay in the file.
ALLOWED: dict[tuple[str, str], str] = {}
# Commits made before commit subjects were limited to 72 characters, and the reason why each is allowed.
LONG_SUBJECTS = {"d6ba7e0": "written before the rule was tested"}
RULE_SINCE = "5d75bb5"


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if Path(name).suffix in SUFFIXES or Path(name).name == "Makefile"]
    return [ROOT / name for name in names if name != "tests/test_words.py" and (ROOT / name).exists()]


def private_words(text: str) -> list[tuple[int, str]]:
    """Find the words and phrases of PRIVATE in `text`. Return pairs (line number, word). A phrase may span two lines."""
    # Names in snake_case are split without changing the length, so that positions in `split` are also positions in `text`.
    split = re.sub(r"(?<=[A-Za-z0-9])_(?=[A-Za-z0-9])", " ", text)
    words = "|".join(re.escape(word).replace(r"\ ", r"\s+(?:#\s*)?") for word in sorted(PRIVATE, key=len, reverse=True))
    pattern = re.compile(rf"(?<![A-Za-z])({words})(?![a-z])", re.IGNORECASE)
    return [
        (text.count("\n", 0, match.start()) + 1, re.sub(r"[\s#]+", " ", match[1]).lower()) for match in pattern.finditer(split)
    ]


def test_no_private_words() -> None:
    found = []
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        found += [
            f"{name}:{line}: {word!r}: write {PRIVATE[word]}"
            for line, word in private_words(path.read_text(encoding="utf-8"))
            if (name, word) not in ALLOWED
        ]
    assert not found, f"{len(found)} private words:\n" + "\n".join(found)


def test_allowed_words_are_there() -> None:
    for (name, word), reason in ALLOWED.items():
        assert reason and word in [each for _, each in private_words((ROOT / name).read_text(encoding="utf-8"))], (name, word)


def test_private_words_are_found() -> None:
    assert private_words("a\nsnake_taking_part = 1") == [(2, "taking part")]
    assert private_words("x  # it takes\n    # part in it") == [(1, "takes part")]
    assert private_words("besides, indoors, nobodyx") == []


def test_commit_subjects_are_short() -> None:
    # A shallow clone may lack RULE_SINCE. In that case, all of its commits are checked.
    for since in ([f"{RULE_SINCE}..HEAD"], []):
        log = subprocess.run(["git", "log", "--format=%h %s", *since], cwd=ROOT, capture_output=True, text=True)
        if log.returncode == 0:
            break
    else:
        pytest.skip("not a git checkout")
    commits = [line.partition(" ") for line in log.stdout.splitlines()]
    long = [f"{commit} {subject}" for commit, _, subject in commits if len(subject) > 72 and commit[:7] not in LONG_SUBJECTS]
    assert not long, "subjects of more than 72 characters:\n" + "\n".join(long)
