"""Small steps in isolation: `pytest tests/test_benchmark_micro.py --benchmark-enable`."""

import pytest
import torch

import esl_fast
from benchmarks.cases import common

CPU = torch.device("cpu")
BATCH = 256


@pytest.fixture(params=common.AGGREGATORS)
def head(request):
    torch.manual_seed(0)
    return common.make_head(request.param, CPU).eval()


@pytest.fixture
def features():
    return common.make_features(BATCH, 5 * BATCH, CPU, torch.float32)


@torch.no_grad()
def test_aggregate(benchmark, head, features):
    units = benchmark(head.image_units, features[0])
    assert units.shape == (BATCH, common.UNITS)


@torch.no_grad()
def test_fold(benchmark, head, features):
    units = head.text_units(features[1])
    assert benchmark(head.fold, units, "text").shape == units.shape


@torch.no_grad()
def test_similarity(benchmark, head, features):
    images, texts, _ = features
    assert benchmark(head, images, texts).shape == (BATCH, 5 * BATCH)


def test_retrieval_ranks(benchmark, features):
    images, texts, owners = features
    image_ranks, text_ranks = benchmark(esl_fast.retrieval_ranks, images, texts, owners)
    assert image_ranks.shape == (BATCH,)
    assert text_ranks.shape == (5 * BATCH,)


def test_contrastive_loss(benchmark, features):
    images, texts, _ = features
    loss = benchmark(esl_fast.contrastive_loss, images, texts[:BATCH], 1.0)
    assert loss.isfinite()
