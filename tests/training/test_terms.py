import numpy as np
import pytest

from medvl_sam2.training import phantom, phantom_findings
from medvl_sam2.training.questions import REMOVABLE, make_questions
from medvl_sam2.training.reports import facts_findings, report_findings, write_report
from medvl_sam2.training.requests import make_requests
from medvl_sam2.training.terms import ENLARGED, FINDING_TERMS, PAIRS, PHASES, REGION_SECTIONS, STRUCTURE_TERMS


def test_terms_cover_exactly_what_phantoms_have():
    assert set(STRUCTURE_TERMS) == set(phantom.STRUCTURES)
    assert {*FINDING_TERMS, "absent_organ"} == set(phantom.FINDINGS)
    assert {kind for kind, term in FINDING_TERMS.items() if term.masked} == set(phantom_findings.MASKED)
    assert set(REGION_SECTIONS) == set(phantom.REGIONS)
    assert set(PHASES) == set(phantom.PHASES)
    assert set(REMOVABLE) == set(phantom_findings.ABSENT)
    assert set(ENLARGED) < set(FINDING_TERMS)
    assert {name for pair in PAIRS.values() for name in pair} < set(STRUCTURE_TERMS)


@pytest.mark.parametrize("seed", range(300, 324))
def test_language_of_real_phantoms(seed):
    facts = phantom.make_phantom(seed).facts
    rng = np.random.default_rng(seed)
    assert report_findings(write_report(facts, rng)) == facts_findings(facts)
    answers = [question.answer for question in make_questions(facts, rng)]
    assert answers.count("Yes.") == answers.count("No.") > 0
    assert {request.kind for request in make_requests(facts, rng)} >= {"name", "description", "several", "absent"}


@pytest.mark.parametrize("kind", phantom.FINDINGS)
def test_every_finding_of_a_phantom_reaches_its_report(kind):
    facts = phantom.make_phantom(41, region="thorax and abdomen", findings=[kind]).facts
    report = write_report(facts, np.random.default_rng(0))
    assert report_findings(report) == facts_findings(facts)
    assert len(facts_findings(facts)) == 1
