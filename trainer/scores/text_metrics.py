"""Measures of generated answers against expected ones: by libraries of the extra `metrics` where they exist, else defined here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from model.errors import ConfigError

Texts = Sequence[str]

ANLS_THRESHOLD = 0.5
"""Normalised distance from which on an answer counts nothing (Biten et al. 2019, Scene Text Visual Question Answering)."""
CHOICES = (re.compile(r"\(?([A-Z])\)?[.:)]?"), re.compile(r"\(?([A-Z])[.:)] .*", re.DOTALL))
"""An answer that is a letter, or that begins with one: "B", "(B)", "B.", "B. the second"."""
NAMED_CHOICE = re.compile(r"[Tt]he answer is \(?([A-Z])\b")
"""An answer that names the letter in a sentence, as in LLaVA's evaluation of ScienceQA (eval_science_qa.py)."""


@dataclass(frozen=True)
class Metric:
    """A measure of all answers together."""

    score: Callable[[Texts, Texts], float | None]  # of answers and expected ones; None where nothing can be measured
    package: str = ""  # the library that it needs
    lower_is_better: bool = False


def exact_match(answers: Texts, expected: Texts) -> float:
    """Return the share of answers that are the expected text, white space around both left out."""
    return sum(a.strip() == e.strip() for a, e in zip(answers, expected)) / len(answers)


def contains(answers: Texts, expected: Texts) -> float:
    """Return the share of answers that the expected text stands in, whatever case and white space, as OCRBench counts."""
    return sum(_plain(e) in _plain(a) for a, e in zip(answers, expected)) / len(answers)


def choice(answers: Texts, expected: Texts) -> float | None:
    """Return the share of answers that choose the expected letter, among the records whose expected answer is one; else None."""
    pairs = [(choice_of(a), letter) for a, e in zip(answers, expected) if (letter := choice_of(e))]
    return sum(a == e for a, e in pairs) / len(pairs) if pairs else None


def choice_of(text: str) -> str:
    """Return the letter that an answer to a question with choices names, or ""."""
    text = text.strip()
    found = next(filter(None, (form.fullmatch(text) for form in CHOICES)), None) or NAMED_CHOICE.search(text)
    return found[1] if found else ""


def anls(answers: Texts, expected: Texts) -> float:
    """Return the mean normalised Levenshtein similarity, 0 for answers that differ in half of their characters or more.

    Case and white space around the texts are left out.
    """
    from rapidfuzz.distance import Levenshtein

    distances = [Levenshtein.normalized_distance(_plain(a), _plain(e)) for a, e in zip(answers, expected)]
    return sum(1 - distance for distance in distances if distance < ANLS_THRESHOLD) / len(distances)


def wer(answers: Texts, expected: Texts) -> float:
    """Return the word error rate: wrong, missing and surplus words per expected word, over all answers together."""
    import jiwer

    return float(jiwer.wer(list(expected), list(answers)))


def bleu(answers: Texts, expected: Texts) -> float:
    """Return BLEU of all answers together, 0 to 100, tokenised as sacreBLEU does by default (13a)."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(answers), [list(expected)]).score)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


METRICS = {
    "exact_match": Metric(exact_match),
    "anls": Metric(anls, "rapidfuzz"),
    "wer": Metric(wer, "jiwer", lower_is_better=True),
    "choice": Metric(choice),
    "contains": Metric(contains),
    "bleu": Metric(bleu, "sacrebleu"),
}
"""Every measure by name. A new one is an entry here, a name in `trainer.config.ValidationConfig.metrics` and a line of docs."""


def check_metrics(names: Sequence[str], setting: str) -> None:
    """Check that every measure is known and its library installed. Raises `ConfigError`; `setting` is what named them."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"{setting}: {name!r} is not {' | '.join(METRICS)}")
    packages = sorted({METRICS[name].package for name in names} - {""})
    if missing := [package for package in packages if find_spec(package) is None]:
        needing = ", ".join(name for name in names if METRICS[name].package in missing)
        raise ConfigError(f"{setting}: {needing} needs {', '.join(missing)}: pip install -e '.[metrics]'")


def score_texts(names: Sequence[str], answers: Texts, expected: Texts) -> dict[str, float]:
    """Return the value of each measure that can be measured, by name; none of no answers."""
    found = {name: METRICS[name].score(answers, expected) for name in names} if answers else {}
    return {name: value for name, value in found.items() if value is not None}


def lower_is_better(value: str) -> bool:
    """Tell whether less of a validation's value, such as val/loss or val/wer, is better."""
    name = value.rpartition("/")[2]
    return METRICS[name].lower_is_better if name in METRICS else name.endswith("loss")
