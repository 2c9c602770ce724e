"""Findings count everything, show some examples, and have the treatment of a build."""

import pickle

from pipeline.data.sharding.rules import SHOWN, Findings, Rule, Treatment


def test_findings_count_and_keep_first_examples() -> None:
    findings = Findings()
    findings.add_all(Rule.EMPTY_IMAGE, range(3), str)
    findings.add_all(Rule.EMPTY_IMAGE, range(3, 1003), str)
    findings.add(Rule.NO_AREA, "x")
    findings.add_all(Rule.OUTSIDE, [], str)
    assert list(findings) == [(Rule.NO_AREA, 1, ["x"]), (Rule.EMPTY_IMAGE, 1003, ["0", "1", "2", "3", "4"])]
    assert SHOWN == 5


def test_add_all_describes_only_shown_items() -> None:
    described = []
    Findings().add_all(Rule.EMPTY_IMAGE, range(10**6), lambda item: described.append(item) or "")
    assert described == [0, 1, 2, 3, 4]


def test_merge_equals_adding() -> None:
    first, second, both = Findings(), Findings(), Findings()
    for findings, names in ((first, "abc"), (second, "defg")):
        for name in names:
            findings.add(Rule.MISSING_FILE, name)
            both.add(Rule.MISSING_FILE, name)
    first.merge(pickle.loads(pickle.dumps(second)))
    assert list(first) == list(both) == [(Rule.MISSING_FILE, 7, ["a", "b", "c", "d", "e"])]


def test_refused_lists_only_refusals() -> None:
    findings = Findings()
    for rule in Rule:
        findings.add(rule, f"<{rule.name}>")
    refused = findings.refused()
    assert len(refused) == sum(rule.treatment is Treatment.REFUSE for rule in Rule)
    assert 0 < len(refused) < len(Rule)
    assert any("<MISSING_FILE>" in line for line in refused)
    assert not any("<EMPTY_IMAGE>" in line for line in refused)


def test_table_is_sorted_by_strictness() -> None:
    findings = Findings()
    assert findings.table() == []
    findings.add_all(Rule.CROSSES_EDGE, range(1234), str)
    findings.add(Rule.MISSING_FILE, "a.jpg")
    header, missing, example, crossing, examples = findings.table()
    assert header.split() == ["count", "done", "to", "what"]
    assert missing.split()[:4] == ["1", "refuse", "missing", "image"]
    assert example.strip() == "a.jpg"
    assert crossing.split()[:3] == ["1,234", "clamp", "boxes"]
    assert examples.strip() == "0, 1, 2, 3, 4, ..."


def test_rules_are_sorted_by_strictness() -> None:
    order = [list(Treatment).index(rule.treatment) for rule in Rule]
    assert order == sorted(order)
