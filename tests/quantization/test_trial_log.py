"""What a killed search leaves behind is taken up, and nothing else."""

from __future__ import annotations

from pathlib import Path

from jexport.quantization.trial_log import TrialLog


def test_a_measurement_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "search.jsonl"
    TrialLog(path).append("all int8", {"metrics": {"cosine_mean": 0.99}, "failures": []})
    again = TrialLog(path)
    assert again.get("all int8") == {"metrics": {"cosine_mean": 0.99}, "failures": []}
    assert again.get("3 of 10 layers at higher precision") is None
    assert len(again) == 1


def test_half_a_line_is_no_measurement_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    TrialLog(path).append("first", {"value": 1})
    whole = path.read_bytes()
    TrialLog(path).append("second", {"value": 2})
    for cut in range(len(whole), path.stat().st_size):
        broken = tmp_path / f"{cut}.jsonl"
        broken.write_bytes(path.read_bytes()[:cut])
        log = TrialLog(broken)
        assert log.get("first") == {"value": 1}
        log.append("third", {"value": 3})
        after = TrialLog(broken)
        assert after.get("third") == {"value": 3}
        assert after.get("first") == {"value": 1}


def test_binary_rubbish_is_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    path.write_bytes(b'\xff\xfe\x00[1]\n{"key": 1}\n{"value": {}}\n"text"\n')
    assert len(TrialLog(path)) == 0


def test_without_a_file_it_remembers_for_the_run(tmp_path: Path) -> None:
    log = TrialLog()
    log.append("key", {"value": 1})
    assert log.get("key") == {"value": 1}
    log.delete()
    assert not list(tmp_path.iterdir())


def test_forgotten_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    log = TrialLog(path)
    log.append("key", {"value": 1})
    log.delete()
    log.delete()
    assert not path.exists()
