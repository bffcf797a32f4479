"""The list of planted bugs follows the source, and a few of them are planted here, on every run of the tests.

All of them take long: `python tests/mutants.py`. What that recorded must be about the list as it is.
"""

import json

import pytest

from mutants import METHODS, MUTANTS, ROOT, as_expected, mutate, run, table

RECORD = ROOT / "docs" / "results" / "mutation.json"
#: Of each kind one, and the cheapest test that sees it.
PLANTED = {
    "chunked: state never decays": "tests/test_exact.py::test_layers_are_equal_over_the_fractions",
    "anchored: dg without reads": "tests/test_segments.py::test_each_path_alone_is_bitwise_equal_on_dyadic_inputs",
    "segments: nothing decays from segment to segment": "tests/test_segments.py::test_segments_of_one_direction",
    "launch: any number of segments": "tests/test_segments.py::test_a_sequence_is_cut_into_few_segments",
}


def test_every_anchor_is_found_once(tmp_path):
    for mutant in MUTANTS:
        path = tmp_path / mutant.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((ROOT / mutant.path).read_text())
        mutate(mutant, tmp_path)  # raises if it is not
        assert path.read_text() != (ROOT / mutant.path).read_text(), mutant.name


def test_the_list_is_long_and_its_names_differ():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_seen(name):
    (mutant,) = (m for m in MUTANTS if m.name == name)
    assert list(run(mutant, [PLANTED[name]], thorough=False)) == [METHODS[PLANTED[name].split("::")[0]]]


def test_without_a_bug_those_tests_pass():
    assert run(None, [*PLANTED.values()], thorough=True) == {}


def test_the_record_is_of_this_list():
    """If there is one: the bugs of the list, each killed by one method at least or argued to be none."""
    if RECORD.exists():
        record = json.loads(RECORD.read_text())
        listed = [mutant._asdict() for mutant in MUTANTS]
        assert [{key: m[key] for key in listed[0]} for m in record["mutants"]] == listed
        assert [m["name"] for m in record["mutants"] if not as_expected(m)] == []
        assert table(record).count("\n") == len(MUTANTS) + 2
        shown = (ROOT / "docs" / "verification.md").read_text().partition("<!-- begin mutation.json -->\n")[2]
        assert shown.partition("\n<!-- end")[0].strip() == table(record).strip()
