"""Every error that can leave the code has its row of facts."""

from services.core.errors import BY_LABEL, FACTS, DiptychError, WorkerLost, facts, from_label


def subclasses(kind: type[DiptychError]) -> set[type[DiptychError]]:
    return {kind, *(one for child in kind.__subclasses__() for one in subclasses(child))}


def test_every_error_has_facts_and_a_label_of_its_own() -> None:
    assert subclasses(DiptychError) - {DiptychError} == set(FACTS)
    assert len(BY_LABEL) == len(FACTS)


def test_an_error_survives_its_label() -> None:
    for kind, row in FACTS.items():
        error = from_label(row.label, "text")
        assert type(error) is kind
        assert facts(error) is row
        assert error.message == "text"


def test_a_label_of_a_newer_peer_is_a_lost_worker() -> None:
    assert isinstance(from_label("invented_later", "text"), WorkerLost)
