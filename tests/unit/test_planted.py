"""Each planted fault still finds the code that it changes, and the test that should fail."""

from faults.planted import FAULTS, REPOSITORY


def test_the_text_of_each_fault_is_in_its_file_once():
    found = {fault: (REPOSITORY / name).read_text().count(old) for fault, name, old, _, _ in FAULTS}
    assert found == dict.fromkeys(found, 1)
    assert len(found) == len(FAULTS)
    assert all((REPOSITORY / test.partition("::")[0]).is_file() for *_, test in FAULTS)
