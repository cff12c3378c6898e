"""What a killed search leaves behind is taken up, and nothing else."""

from __future__ import annotations

from pathlib import Path

from jexport.quantization.trial_log import Journal


def test_a_measurement_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "search.jsonl"
    Journal(path).keep("all int8", {"metrics": {"cosine_mean": 0.99}, "failures": []})
    again = Journal(path)
    assert again.recall("all int8") == {"metrics": {"cosine_mean": 0.99}, "failures": []}
    assert again.recall("3 of 10 wide") is None
    assert len(again) == 1


def test_half_a_line_is_no_measurement_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    Journal(path).keep("first", {"value": 1})
    whole = path.read_bytes()
    Journal(path).keep("second", {"value": 2})
    for cut in range(len(whole), path.stat().st_size):
        broken = tmp_path / f"{cut}.jsonl"
        broken.write_bytes(path.read_bytes()[:cut])
        journal = Journal(broken)
        assert journal.recall("first") == {"value": 1}
        journal.keep("third", {"value": 3})
        after = Journal(broken)
        assert after.recall("third") == {"value": 3}
        assert after.recall("first") == {"value": 1}


def test_binary_rubbish_is_an_empty_journal(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    path.write_bytes(b'\xff\xfe\x00[1]\n{"key": 1}\n{"value": {}}\n"text"\n')
    assert len(Journal(path)) == 0


def test_without_a_file_it_remembers_for_the_run(tmp_path: Path) -> None:
    journal = Journal()
    journal.keep("key", {"value": 1})
    assert journal.recall("key") == {"value": 1}
    journal.forget()
    assert not list(tmp_path.iterdir())


def test_forgotten_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    journal = Journal(path)
    journal.keep("key", {"value": 1})
    journal.forget()
    journal.forget()
    assert not path.exists()
