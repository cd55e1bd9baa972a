"""The benchmarks measure what they say: parity comes first, baselines are right, failures are recorded."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import memory, registry, report, timing
from benchmarks.cases import contrastive, ranks
from esl_fast import reference

CPU = torch.device("cpu")
CASES = registry.find("cpu")
TINY = {case.name: case for case in map(registry.Case.tiny, CASES)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for one another cost more than such small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", TINY)
def test_parity_and_every_competitor(name):
    problem = TINY[name].problem(CPU)
    parity = problem.parity()
    assert parity.holds, parity
    assert {"ours", "limit"} < problem.competitors.keys()
    for competitor, run in problem.competitors.items():
        if competitor != "compiled":
            run()


def test_cases_of_a_gpu_have_distinct_names():
    for device in ("cpu", "cuda"):
        names = [case.name for case in registry.find(device)]
        assert len(names) == len(set(names)) > 0


def test_pattern_finds_cases():
    (case,) = registry.find("cpu", "contrastive*2048")
    assert case.name == "contrastive_loss/2048x2048/float32"


def test_ranks_from_matrix():
    torch.manual_seed(0)
    scores, owners = torch.randn(7, 20).round(decimals=1), torch.arange(20) % 7
    for result, expected in zip(
        ranks.from_matrix(scores, owners), reference.ranks.retrieval_ranks(scores, owners), strict=True
    ):
        assert torch.equal(result, expected)


def test_a_wrong_rank_is_an_error():
    scores = torch.tensor([[0.5, 0.4, 0.3, 0.2]], dtype=torch.float64)
    error = [ranks.rank_error(torch.tensor([rank]), scores, torch.tensor([1])) for rank in range(4)]
    assert error == pytest.approx([0.2, 0.0, 0.2, 0.4])


def test_contrastive_baselines():
    torch.manual_seed(0)
    images, texts, scale = torch.randn(9, 5).double(), torch.randn(9, 5).double(), torch.tensor(1.5).double()

    def definition(x, y, scale):
        return reference.contrastive.contrastive_loss(reference.similarity.similarity(x, y), scale)

    expected = contrastive.step(definition, images, texts, scale)
    for results in (
        contrastive.exact_step(images, texts, scale),
        contrastive.step(contrastive.from_matrix, images, texts, scale),
    ):
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted)


def test_region_word_baselines():
    from benchmarks.cases import region_word

    regions, words, lengths = region_word.make_units(3, 4, CPU, torch.float64)
    arguments = regions, words, torch.tensor(9.0).double(), lengths
    expected = reference.region_word.region_word_similarity(*arguments)
    torch.testing.assert_close(region_word.by_caption(*arguments), expected)
    torch.testing.assert_close(region_word.batched(*arguments), expected)


def test_competitors_take_turns():
    calls = []
    runs = {"fast": lambda: calls.append("fast"), "slow": lambda: calls.append("slow"), "broken": lambda: 1 / 0}
    seconds = {"fast": 1.0, "slow": 4.0}

    def once(run):
        run()
        return timing.Sample(seconds[calls[-1]])

    outcomes = timing.interleaved(runs, once, 40.0)
    assert outcomes["broken"] == {"failed": "ZeroDivisionError: division by zero"}
    assert (outcomes["fast"]["runs"], outcomes["slow"]["runs"]) == (40, 10)
    assert outcomes["slow"]["median"] == 4.0
    timed = calls[4:]
    assert all(timed[i : i + 25].count("slow") == 5 for i in (0, 25))
    turns = [i for i, name in enumerate(timed) if name == "slow"]
    assert len({after - before for before, after in pairwise(turns)}) > 1  # not always after the same one


def test_memory_of_a_fresh_process():
    n = 2048
    case = registry.Case(contrastive.contrastive_loss, n, n)
    matrix = 4 * n * n
    assert 2 * matrix < memory.peak(case, "pytorch", CPU, 1)["peak_memory"] < 10 * matrix
    assert memory.peak(case, "nobody", CPU, 1) == {"memory_failed": "KeyError: 'nobody'"}


def _result(n: int, holds: bool = True) -> dict:
    times = {"p20": 1.0, "p80": 3.0, "runs": 5}
    return {
        "case": f"made up/{n}", "family": "made up", "options": {}, "n": n, "m": n, "dtype": "float32", "flops": 1e12,
        "parity": {"error": 1.0, "tolerance": 2.0, "compared": "all", "holds": holds},
        "competitors": {"ours": {"median": 2.0, **times}, "pytorch": {"median": 8.0, **times, "peak_memory": 1e6},
                        "limit": {"median": 1.0, **times}, "loop": {"failed": "out of memory"}},
    }  # fmt: skip


def test_table():
    table = "\n".join(report.lines([_result(1)]))
    assert "4.00x" in table
    assert "50.0%" in table
    assert "out of memory" in table
    table = "\n".join(report.lines([_result(1, holds=False)]))
    assert "PARITY FAILED" in table
    assert "4.00x" not in table
    assert not report.succeeded(_result(1, holds=False))


def test_plots(tmp_path):
    picture = tmp_path / "a.png"
    assert not report.draw([_result(1)], "one size", picture)
    assert report.draw([_result(1), _result(10)], "two sizes", picture)
    assert picture.exists()


def test_wrong_result_is_not_timed(monkeypatch, tmp_path, capsys):
    from benchmarks import __main__ as command

    case = replace(CASES[0], n=5, m=6, memory=())
    broken = registry.Problem({"ours": pytest.fail}, lambda: registry.Parity(1.0, 0.1, "all"), 1.0)
    monkeypatch.setattr(registry.Case, "problem", lambda *_: broken)
    monkeypatch.setattr(registry, "find", lambda *_: [case])
    monkeypatch.setattr(memory, "limit_to_available", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert command.main(["--output", str(tmp_path / "a.json")]) == 1
    assert "PARITY FAILED" in capsys.readouterr().out


def test_command(tmp_path):
    output = tmp_path / "out" / "a.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--cases", "contrastive_loss/64x64", "--output", output]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    content = json.loads(output.read_text())
    assert content["environment"].keys() == {"device", "hardware", "versions", "date", "git"}
    (result,) = content["results"]
    assert result["parity"]["holds"]
    assert result["competitors"]["ours"]["runs"] >= timing.MIN_RUNS
