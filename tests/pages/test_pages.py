"""The report and its page: what a job writes fits the schema, and the page shows it, escaped, complete and harmless."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pages.document import REPORT_VERSION, Report
from pages.errors import NotAReport
from pages.render import content_policy, parse, render, stylesheet
from pages.words import between, label_of, percent, shown
from repair.checkpoint import Checkpoint
from repair.checks.limits import limits_of
from repair.checks.packs import BUNDLED, load_pack
from repair.checks.planner import Plan, Reference, plan
from tests.checks.acting import SAMPLES, SECRET, UPLOAD, Character, chat_of, policy_of
from tests.pages.known import unknown
from tests.tiny import tiny_pair

if TYPE_CHECKING:
    from collections.abc import Callable

VOID = {"meta", "br", "link", "input", "img", "hr"}
CHARACTERS = {
    "released_unchanged": Character(obeys_above=2),
    "released_repaired": Character(),
    "quarantined": Character(obeys_above=0.1),
}
HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"


class Reader(HTMLParser):
    """The page as a browser takes it apart: open elements, attributes, words, rows of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.ids: set[str] = set()
        self.captions = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids |= {str(value) for name, value in attrs if name == "id"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(page: str) -> Reader:
    found = Reader()
    found.feed(page)
    assert found.open == []
    return found


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Plan]:
    """One plan for each verdict, made once."""
    folder = tmp_path_factory.mktemp("pair")
    aligned, base = map(Checkpoint.open, tiny_pair(folder))
    made: dict[str, Plan] = {}

    def of(verdict: str) -> Plan:
        if verdict not in made:
            character = replace(CHARACTERS[verdict], log=[])
            reference = Reference(aligned=aligned, base=base, chat=chat_of(character), digest="sha256:feed")
            made[verdict] = plan(
                UPLOAD,
                reference=reference,
                policy=policy_of(strength=[0.95, 0.85, 0.82]),
                work_dir=tmp_path_factory.mktemp(verdict),
                samples=SAMPLES,
            )
        assert made[verdict].verdict.value == verdict
        return made[verdict]

    return of


def document_of(found: Plan) -> dict[str, Any]:
    document = {"report_version": REPORT_VERSION, **found.as_dict(), "limits": limits_of(found)}
    return json.loads(json.dumps(document))  # type: ignore[no-any-return] # an object went in


@pytest.mark.parametrize("verdict", CHARACTERS)
def test_a_report_fits_the_schema_and_has_no_field_that_the_schema_does_not_tell(
    planned: Callable[[str], Plan], verdict: str
) -> None:
    """A new number in a report must be written down, or this fails."""
    document = document_of(planned(verdict))
    report = parse(document)
    assert unknown(document, report.model_dump(mode="json")) == []


def test_the_schema_refuses_what_is_no_report(planned: Callable[[str], Plan]) -> None:
    """Another version, a missing number, a word in the place of one: named by field, never by value."""
    good = document_of(planned("released_unchanged"))
    for change, field in (
        ({"report_version": 2}, "report_version"),
        ({"verdict": "fine"}, "verdict"),
        ({"input": {**good["input"], "tokens": SECRET}}, "input.tokens"),
        ({"aligned": {**good["aligned"], "checks": [{"name": "harmful"}]}}, "aligned.checks.0.version"),
    ):
        with pytest.raises(NotAReport, match=re.escape(field)) as caught:
            parse({**good, **change})
        assert SECRET not in str(caught.value)
    with pytest.raises(NotAReport, match="the whole document"):
        parse(b"{")


@pytest.mark.parametrize("verdict", CHARACTERS)
def test_the_page_tells_every_number_of_every_arm(planned: Callable[[str], Plan], verdict: str) -> None:
    """Counts, shares and intervals as they stand in the report, and the reason of each rule."""
    found = planned(verdict)
    text = read(render(document_of(found))).text
    for arm in (found.aligned_report, found.input_report, found.certify_report):
        for check in () if arm is None else arm.checks:
            if check.hits is not None and check.n and check.rate is not None:
                assert f"{check.hits} of {check.n}" in text
                assert percent(check.rate) in text.replace(" %", "\u00a0%")
    deciding = found.certify_report or found.input_report
    for check in deciding.checks:
        assert " ".join(check.reason.split()) in text
    for candidate in found.candidates:
        assert candidate.lost in text
    for limit in limits_of(found):
        assert limit in text
    for digest in deciding.suite["packs"].values():
        assert digest in text


def test_the_verdict_and_its_rule_stand_at_the_top(planned: Callable[[str], Plan]) -> None:
    """Each of the four in words that need no field knowledge."""
    top = {name: read(render(document_of(planned(name)))).text[:600] for name in CHARACTERS}
    assert "Released unchanged" in top["released_unchanged"]
    assert "Released, repaired" in top["released_repaired"]
    assert "scale" in top["released_repaired"]
    assert "Quarantined" in top["quarantined"]
    # No finalist was found, so the upload's own failure is the rule that decided.
    assert "attack success: stopped after 32 of 104" in top["quarantined"]
    refused = {
        "report_version": 1, "verdict": "refused", "adapter": {"digest": "sha256:1", "files": []},
        "refusal": {"file": "w.safetensors", "field": "x.lora_A", "rule": "nan-weight", "detail": "not a number"},
    }  # fmt: skip
    text = read(render(refused)).text
    assert "Rule nan-weight: not a number (w.safetensors · x.lora_A)" in text
    assert "Attack success" not in text.partition("Glossary")[0]


def test_the_paired_table_counts_the_same_requests(planned: Callable[[str], Plan]) -> None:
    """Both, only one, only the other, neither: recounted from the rows."""
    found = planned("released_repaired")
    document = document_of(found)
    assert found.certify_report is not None
    ours, theirs = (
        {row.id: row.outcome.value == "harmful_compliance" for row in arm.rows if row.pack == "core_harmful"}
        for arm in (found.certify_report, found.aligned_report)
    )
    excess = next(one for one in document["certify"]["checks"] if one["name"] == "harmful")["details"][
        "excess_over_aligned"
    ]
    assert excess["both"] == sum(ours[one] and theirs[one] for one in ours)
    assert excess["neither"] == sum(not ours[one] and not theirs[one] for one in ours)
    assert excess["both"] + excess["neither"] + excess["this_only"] + excess["aligned_only"] == len(ours)


def test_the_page_runs_nothing_loads_nothing_and_is_well_formed(planned: Callable[[str], Plan]) -> None:
    """No script, no address, no style that its own policy would not allow; every table has a caption; links lead."""
    page = render(document_of(planned("released_repaired")))
    found = read(page)
    assert not {"script", "iframe", "object", "link", "img", "form"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in {"src", "style", "action"}]
    links = [str(value) for name, value in found.attributes if name == "href"]
    assert links
    assert {link[1:] for link in links if link.startswith("#")} == {link[1:] for link in links} <= found.ids
    assert found.tags.count("table") == found.tags.count("caption") > 5
    assert found.tags.count("svg") == sum(name == "role" and value == "img" for name, value in found.attributes) > 2
    assert page.count("<style>") == 1
    assert f"<style>{stylesheet()}</style>" in page
    assert ("content", content_policy()) in found.attributes


def test_no_prompt_and_no_reply_stands_in_the_page(planned: Callable[[str], Plan]) -> None:
    """Nothing that was asked and nothing that was answered."""
    for verdict in CHARACTERS:
        text = read(render(document_of(planned(verdict)))).text
        assert SECRET not in text
        for folder in BUNDLED.iterdir():
            assert not [row.id for row in load_pack(folder.name).rows if len(row.text) > 20 and row.text in text]


def test_what_a_stranger_wrote_is_shown_and_never_obeyed(planned: Callable[[str], Plan]) -> None:
    """Names of modules, parameters, reasons, notes and digests may hold anything."""
    document = document_of(planned("released_repaired"))
    for place in (document["modules"][0], document["candidates"][0]["modules"][0]):
        place["name"] = place["reason"] = HOSTILE
        place["decision"] = f'"{HOSTILE}'
    document["candidates"][0]["lost"] = HOSTILE + "\u202eevil"
    document["parameters"] = {HOSTILE: HOSTILE}
    document["limits"] = [HOSTILE, "x" * 5000]
    document["certify"]["suite"]["packs"] = {HOSTILE: HOSTILE}
    document["adapter"] = {"digest": HOSTILE, "files": [{"name": HOSTILE, "sha256": HOSTILE}]}
    document["certify"]["suite"]["unable"] = {HOSTILE: HOSTILE}
    document["certify"]["checks"][0]["details"]["alpha"] = {HOSTILE: 0.01}
    document["certify"]["checks"][0]["details"]["by_category"] = {HOSTILE: {"hits": 1, "n": 2, "low": 0.0, "high": 1.0}}
    page = render(document)
    clean = read(render(document_of(planned("released_repaired"))))
    found = read(page)
    assert set(found.tags) == set(clean.tags)
    assert {name for name, _ in found.attributes} == {name for name, _ in clean.attributes}
    assert "{{ 7 * 7 }}" in found.text
    assert "\u202e" not in page
    assert "x" * 500 not in page


def test_what_other_policies_measure_is_shown_too(planned: Callable[[str], Plan]) -> None:
    """The flip rate, the doubt that was spent, intervals by category, the guess without the judge's errors."""
    document = document_of(planned("released_repaired"))
    document["certify"]["suite"]["decoding"]["flip_rate"] = None
    plain = read(render(document)).text
    assert "was not measured in this job" in plain
    changed = {"flips": 1, "rate": 0.03125, "low": 0.0008, "high": 0.162}
    same = {"flips": 3, "rate": 0.09375, "low": 0.01, "high": 0.25}
    document["certify"]["suite"]["decoding"]["flip_rate"] = {
        "n": 32,
        "batch_size": 21,
        "text": same,
        "outcome": changed,
    }
    harmful = next(one for one in document["certify"]["checks"] if one["name"] == "harmful")["details"]
    harmful["alpha"] = {"rate": 0.0125, "judge": 0.025}
    harmful["rogan_gladen"] = 0.0321
    harmful["by_category"] = {"weapons": {"hits": 2, "n": 10, "low": 0.025, "high": 0.556}}
    harmful["excess_over_aligned"] |= {"p": 0.0123, "p_at_most": 0.0167, "lower_bound": -0.1}
    text = read(render(document)).text
    for words in (
        "Of 32 requests that were asked again in other batches, 1 ended in another outcome (3.1 %",
        "rate 1.2 %, judge 2.5 %",
        "the best guess of attack success is 3.2 %",
        "2 of 10 (2.5 to 55.6 %)",
        "p = 0.012, wanted at most 0.017",
    ):
        assert words in text
        assert words not in plain


def test_what_it_took_is_told_by_part(planned: Callable[[str], Plan]) -> None:
    """Every part with its tokens, their sum, and what the budget limits; an older report shows what it has."""
    found = planned("released_repaired")
    document = document_of(found)
    text = read(render(document)).text
    cost = found.cost
    for line in (
        f"The aligned model, certify half {cost.aligned_certify} 1.00",
        f"The adapter as uploaded {cost.upload}",
        f"Choosing among the repairs {cost.choosing}",
        f"In all {cost.in_all}",
        f"(here to {cost.choosing_limit} tokens)",
    ):
        assert line in text
    document["cost"] = {"full_check": 100, "choosing": 250, "building": 0, "certifying": 90}
    old = read(render(document)).text
    assert "Choosing among the repairs 250 2.50" in old
    assert "In all" not in old


def test_equal_reports_give_equal_pages(planned: Callable[[str], Plan]) -> None:
    """From JSON in any order of keys, and from its bytes."""
    document = document_of(planned("quarantined"))
    turned = json.loads(json.dumps(document), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    text = json.dumps(document).encode()
    assert render(document) == render(text)
    assert len(render(turned)) == len(render(document))


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (None, "-"),
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.0001, "< 0.1 %"),
        (0.9999, "> 99.9 %"),
        (0.0673, "6.7 %"),
        (0.08, "8 %"),
    ],
)
def test_a_share_is_never_rounded_to_nothing_or_to_all(share: float | None, words: str) -> None:
    assert percent(share) == words.replace(" ", "\u00a0")


def test_words_of_candidates_and_intervals() -> None:
    """Steps by name in their order; what is empty or hidden is not shown as if it were nothing."""
    steps = {"steps": [{"method": "scale", "parameters": {"strength": 0.5, "strengths": []}}, {"method": "patch"}]}
    assert label_of("compose", steps) == "scale (strength 0.5), then patch"
    assert between(0.0266, 0.1338) == "2.7 to 13.4\u00a0%"
    assert between(None, 0.5) == ""
    assert shown("a\u202eb\x00c") == "a\\u202eb\\u0000c"


def test_the_schema_is_one_that_others_can_read() -> None:
    """Required fields are those that every verdict has."""
    schema = json.loads((Path(__file__).parents[2] / "docs" / "schemas" / "report-v1.json").read_text())
    assert schema["required"] == ["report_version", "verdict"]
    assert set(schema["properties"]) == set(Report.model_fields)
